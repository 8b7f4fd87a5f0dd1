"""An OpenAI-compatible server on loopback that answers each request by a script, several at a time,
and writes what `doubles.Server` cannot: raw bytes, a reply without an end.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from doubles import completion


class Answer(NamedTuple):
    """What is sent back. chunks: of the body, as they are to leave."""

    status: int
    chunks: Iterator[bytes] | list[bytes]
    headers: dict = {}  # noqa: RUF012  immutable in use


class ScriptedServer:
    """`script(body, authorization)` gives the answer to a POST: an `Answer`, or (status, JSON)."""

    def __init__(self, script: Callable | None = None):
        self.script = script or (lambda body, key: completion("OK"))
        self.requests: list[dict] = []
        self.retry_after = True  # ask the client to retry after 1 ms
        double, self.lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with double.lock:
                    double.requests.append(body)
                answer = double.script(body, self.headers.get("Authorization", ""))
                if not isinstance(answer, Answer):
                    status, value = answer
                    answer = Answer(status, [json.dumps(value).encode()])
                self.send_response(answer.status)
                if double.retry_after:
                    self.send_header("retry-after-ms", "1")
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Connection", "close")
                self.end_headers()
                for chunk in answer.chunks:
                    self.wfile.write(chunk)
                self.close_connection = True

            def log_message(self, *args):
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.handle_error = lambda request, address: None  # a client that has hung up
        self.url = f"http://127.0.0.1:{self.httpd.server_port}/v1"
        serve = {"target": self.httpd.serve_forever, "kwargs": {"poll_interval": 0.01}}
        threading.Thread(**serve, daemon=True).start()

    def close(self) -> None:
        self.httpd.shutdown()
        self.httpd.server_close()


def proposal(code: str, name: str = "idea", thought: str = "Because.", **usage) -> tuple[int, dict]:
    """A completion that holds a proposal. usage: prompt_tokens, completion_tokens."""
    text = json.dumps({"thought": thought, "name": name, "code": code})
    status, value = completion(text)
    value["usage"] = {**value["usage"], **usage}
    return status, value


def dripping(pause_s: float = 0.01) -> Answer:
    """A reply that goes on for ever, a blank at a time."""

    def blanks():
        while True:
            time.sleep(pause_s)
            yield b" "

    return Answer(200, blanks(), {"Content-Type": "application/json"})
