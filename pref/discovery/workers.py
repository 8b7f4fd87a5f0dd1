"""Candidates through workers: what the search calls to have them read and tried.

    with Workers(count=2, features=Path("features/k.safetensors"), settings={"visited": 3.0}) as w:
        print(f"sandbox: {w.sandbox}")
        results = w.read([{"id": "p0001", "text": text, "name": "mine", "coupled": False}])
        results = w.proxy([{"id": "p0001", "text": printed, "seeds": [1, 2], "steps": 10,
                            "learning_rate": 0.3}])

Results come in the order of the jobs and do not depend on the number of workers; their fields are
described in stages.py. A worker (worker.py) knows nothing of this process's environment. One that
dies, or computes longer than `seconds` for a candidate, stops that candidate, at "worker", and
another takes its place.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pref.files.console import UserError

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "pref.discovery.worker")
RESULTS = {  # what a result has beside `id` and `stopped`
    "read": ("program", "selftest", "field", "cell", "gradient"),
    "proxy": ("accuracy", "bits", "correct", "margins"),
}
SECONDS = 10.0  # of CPU time, for a candidate, or for a seed of the proxy
PATIENCE = 12  # wall-clock time that a candidate may take, in SECONDS: the machine may be busy
START_SECONDS = 600.0  # wall-clock; torch may come from a slow disk
STARTS = 2  # attempts
MOST_WORKERS = 16  # as many as a round has candidates; each holds torch and the features
MOST_REPLIED = 1 << 28  # bytes
# What a worker knows of this process's environment: where its libraries are. Keys are none of it.
KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME")
SETTINGS = {
    "visited": 10.0,  # nats that training visits: the scale of the fingerprint
    "batch": 8,  # pairs in a step of the proxy
    "seconds": SECONDS,
    "without": [],  # names of layers of confine.py to leave out
}


class Ended(Exception):
    """The worker has ended; says how."""


class Workers:
    """`count` worker processes, at most MOST_WORKERS. Use as a context manager.

    features: of the pairs for `proxy`; None if only `read` is called. settings: see SETTINGS.
    """

    def __init__(self, count: int, features: Path | None = None, settings: dict | None = None):
        given = settings or {}
        if unknown := given.keys() - SETTINGS.keys():
            raise TypeError(f"unknown settings {', '.join(sorted(unknown))}")
        where = None if features is None else str(Path(features).resolve())
        self.settings = SETTINGS | given | {"features": where}
        self.count = min(max(1, count), MOST_WORKERS)
        self.workers: list[Worker] = []

    def __enter__(self) -> "Workers":
        # They start side by side, and while the caller goes on.
        self.pool = ThreadPoolExecutor(self.count)
        self.workers = [Worker(self.settings) for _ in range(self.count)]
        self.free: queue.Queue[Worker] = queue.Queue()
        for worker in self.workers:
            self.free.put(worker)
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.close()
        self.pool.shutdown(cancel_futures=True)

    @property
    def sandbox(self) -> str:
        """What stands between a model's text and this machine, in words."""
        return "; ".join(filter(None, ("translated", ", ".join(self.workers[0].layers()))))

    def read(self, jobs: Sequence[dict]) -> list[dict]:
        """Form, self-test, range and fingerprint of each job {"id", "text", "name", "coupled"}."""
        return list(self.pool.map(lambda job: self.run("read", job, 1), jobs))

    def proxy(self, jobs: Sequence[dict]) -> list[dict]:
        """Proxy training of each job {"id", "text", "seeds", "steps", "learning_rate"}."""
        assert self.settings["features"] is not None, "proxy needs features"
        return list(self.pool.map(lambda job: self.run("proxy", job, len(job["seeds"])), jobs))

    def run(self, kind: str, job: dict, times: int) -> dict:
        """The result of one job, by whichever worker is free."""
        worker = self.free.get()
        try:
            return worker.ask(kind, job, times * self.settings["seconds"])
        except Ended as ended:
            nothing = dict.fromkeys(RESULTS[kind])
            return {"id": job["id"], **nothing, "stopped": {"at": "worker", "why": str(ended)}}
        finally:
            self.free.put(worker)


class Worker:
    """One process, started again when it has ended. Used by one thread at a time."""

    def __init__(self, settings: dict):
        self.settings, self.closed = settings, False
        self.held: list[str] | None = None  # what confines it; None before its first reply
        self.start()

    def start(self) -> None:
        """Start the process; `layers` waits for it."""
        self.held = None
        self.process = subprocess.Popen(
            COMMAND,
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is this process's
        )
        with contextlib.suppress(BrokenPipeError):
            self.send(self.settings)

    def close(self) -> None:
        self.closed = True
        self.end()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(OSError):
                pipe.close()

    def layers(self) -> list[str]:
        """What confines the process, once it is ready. Raises UserError if it does not start."""
        attempts = 0
        while self.held is None:
            attempts += 1
            try:
                hello = self.receive(START_SECONDS)
            except Ended as ended:
                words = self.process.stderr.read().decode(errors="replace").strip()
                self.end()
                if self.closed or attempts == STARTS:
                    last = words.splitlines()[-1] if words else str(ended)
                    raise UserError(f"a worker does not start: {last}") from None
                self.start()
                continue
            if "fault" in hello:
                raise UserError(hello["fault"])
            self.held = hello["sandbox"]
        return self.held

    def ask(self, do: str, job: dict, seconds: float) -> dict:
        """The reply to a job. Raises Ended if the process ends over it, or takes too long."""
        request = {"do": do, "job": job, "seconds": seconds}
        while True:
            if self.process.poll() is not None and not self.closed:
                self.end()  # meanwhile, without a job
                self.start()
            self.layers()
            try:
                self.send(request)
            except BrokenPipeError:
                continue
            break
        try:
            return self.receive(seconds, patience=PATIENCE)
        except Ended:
            self.end()
            raise

    def send(self, request: dict) -> None:
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()

    def receive(self, seconds: float, patience: float = 1) -> dict:
        """The next line of the process, which may take `seconds` of CPU time, and that times
        `patience` by the clock. Raises Ended.
        """
        line, late = b"", threading.Event()

        def kill() -> None:
            late.set()
            self.process.kill()

        timer = threading.Timer(seconds * patience, kill)
        timer.daemon = True
        timer.start()
        try:
            line = self.process.stdout.readline(MOST_REPLIED)
            return json.loads(line)
        except ValueError:  # no line, a cut one, or a closed pipe
            if late.is_set():
                raise Ended(f"gives no answer within {seconds * patience:g} s") from None
            if line.endswith(b"\n"):
                raise Ended("the worker's answer is no JSON") from None
            raise Ended(self.how_it_ended(seconds)) from None
        finally:
            timer.cancel()

    def how_it_ended(self, seconds: float) -> str:
        """In words, for a process whose output has ended."""
        try:
            code = self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "the worker closed its output"
        if code in (-signal.SIGPROF, -signal.SIGXCPU):
            return f"computes longer than {seconds:g} s"
        if code < 0:
            memory = " (out of memory?)" if code == -signal.SIGKILL else ""
            return f"the worker was ended by {signal.Signals(-code).name}{memory}"
        return f"the worker ended (exit code {code})"


def environment() -> dict[str, str]:
    """Of a worker. A fixed hash seed: what it says must not depend on the process."""
    return {k: os.environ[k] for k in KEPT if k in os.environ} | {"PYTHONHASHSEED": "0"}
