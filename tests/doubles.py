"""Stand-ins for what tests cannot use: an OpenAI-compatible server that fails on demand, and
FastChat's own code without its dependencies.
"""

import importlib.util
import json
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HANG_UP = 0  # instead of an HTTP status: close the connection without a reply


class Server:
    """An OpenAI-compatible server on loopback.

    `answer(body)` returns (HTTP status, JSON value or text) for each POST; a test replaces it.
    """

    def __init__(self):
        self.requests: list[dict] = []  # bodies of all POSTs
        self.retry_after = True  # ask the client to retry after 1 ms, in every reply
        self.models: list[str | dict] = []  # for GET /models
        self.answer = lambda body: completion("Fine. Rating: [[7]]")
        self.lock = threading.Lock()
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with double.lock:
                    double.requests.append(body)
                    status, reply = double.answer(body)
                if status == HANG_UP:
                    self.close_connection = True
                else:
                    self.reply(status, reply)

            def do_GET(self):
                models = [m if isinstance(m, dict) else {"id": m} for m in double.models]
                self.reply(200, {"object": "list", "data": models})

            def reply(self, status: int, value: str | dict) -> None:
                kind = "text/html" if isinstance(value, str) else "application/json"
                payload = (value if isinstance(value, str) else json.dumps(value)).encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(payload)))
                if double.retry_after:
                    self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *args):
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        # A client that timed out has closed its connection: no traceback for that.
        self.httpd.handle_error = lambda request, address: None
        self.url = f"http://127.0.0.1:{self.httpd.server_port}/v1"
        serve = {"target": self.httpd.serve_forever, "kwargs": {"poll_interval": 0.01}}
        threading.Thread(**serve, daemon=True).start()

    def paid(self, probe: list[dict]) -> list[dict]:
        """The requests other than probes, which have the messages `probe`."""
        return [body for body in self.requests if body["messages"] != probe]


def completion(text, finish="stop", **message) -> tuple[int, dict]:
    """A chat completion, as `Server.answer` returns it. message: further fields of the message."""
    choice = {
        "index": 0,
        "finish_reason": finish,
        "message": {"role": "assistant", "content": text, **message},
    }
    return 200, {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "served-7b",
        "system_fingerprint": "fp_1",
        "choices": [choice],
        "usage": {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14},
    }


def load_fastchat(monkeypatch) -> types.ModuleType:
    """llm_judge/common.py of the fschat wheel (requirements-dev.txt), with its imports replaced."""
    package = Path(importlib.util.find_spec("fastchat").submodule_search_locations[0])
    conversation = load_module("fastchat_conversation", package / "conversation.py")
    adapter = types.ModuleType("fastchat.model.model_adapter")
    adapter.get_conversation_template = lambda name: conversation.get_conv_template("chatgpt")
    adapter.OPENAI_MODEL_LIST, adapter.ANTHROPIC_MODEL_LIST = ("the-judge",), ()
    for name in ("openai", "anthropic", "fastchat", "fastchat.model"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fastchat.model.model_adapter", adapter)
    return load_module("fastchat_common", package / "llm_judge" / "common.py")


def load_module(name: str, path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up the module of their class
    spec.loader.exec_module(module)
    return module
