"""The process in which a task's own code runs: started by tasks.py, with limits and without keys.

    python task_child.py FILE SECONDS OPEN_SECONDS MEMORY_MIB REQUESTS REPLIES

A score may take SECONDS, the import and a call of `questions` OPEN_SECONDS. REQUESTS and REPLIES
are file descriptors of pipes. The first reply says what FILE holds; after that, each line of
JSON is answered by one. What the task prints is dropped. This file imports nothing of the toolkit,
so that the task cannot see it either.

Who ends what:

    a call that takes too long            the parent kills this process and its children
    the same after the parent has died    SIGALRM, which no Python code needs to run for
    children that compute forever         RLIMIT_CPU, which they inherit
    more memory, or larger files          RLIMIT_AS, RLIMIT_FSIZE
    the parent has died, or is done       the end of REQUESTS
"""

import importlib.util
import io
import json
import math
import numbers
import os
import resource
import signal
import sys
import time
import traceback

ERROR, RANGE, MEMORY, OUTPUT = (
    f"program_{name}" for name in ("error", "range", "memory", "output")
)
MODULE = "pref_task"  # the name under which FILE is imported: its own may be that of a library
MOST_PRINTED = 2**20  # characters in one call
MOST_REPLIED = 2**20  # bytes of explain's words and scores
MOST_QUESTIONS = 2**26  # bytes of all rows
MOST_WRITTEN = 2**26  # bytes of a file
ROUNDING = 1e-9  # a mean of weights that sum to 1 may be above it by this


class Fault(Exception):
    """What the task did wrong. status: see ERROR and the others."""

    def __init__(self, status: str, text: str):
        super().__init__(text)
        self.status, self.text = status, text


class TooMuchPrinted(BaseException):
    """Ends the call. No Exception, which the task might catch."""


class Nowhere(io.TextIOBase):
    """stdout and stderr of the task: counted and dropped."""

    printed = 0  # characters in this call

    def write(self, text: str) -> int:
        self.printed += len(text)
        if self.printed > MOST_PRINTED:
            raise TooMuchPrinted
        return len(text)

    def writable(self) -> bool:
        return True


class Child:
    """The task, and how it is called."""

    def __init__(self, path: str, score_seconds: float, open_seconds: float):
        self.path, self.folder = path, os.path.dirname(path)
        self.score_seconds, self.open_seconds = score_seconds, open_seconds
        self.pid, self.sink = os.getpid(), Nowhere()
        self.opened: set[str] = set()  # data files in the task's folder
        sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = self.sink
        sys.addaudithook(self.note_opened)

    def note_opened(self, event: str, values: tuple) -> None:
        """Note a file of the task's folder that is read: its content may decide a score."""
        if event != "open" or not isinstance(values[0], str | bytes):
            return
        if isinstance(values[2], int) and values[2] & os.O_ACCMODE != os.O_RDONLY:
            return
        folder, name = os.path.split(os.fsdecode(values[0]))
        file = os.path.join(os.path.realpath(folder), name)
        if file.startswith(self.folder + os.sep) and not file.endswith((".py", ".pyc")):
            self.opened.add(os.path.relpath(file, self.folder))

    def call(self, function, *values):
        """What `function` returns. Raises Fault for everything that goes wrong in it."""
        self.sink.printed = 0
        try:
            result = function(*values)
        except TooMuchPrinted:
            result = None
        except MemoryError:
            raise Fault(MEMORY, "needs more memory than the limit") from None
        except BaseException as error:  # SystemExit too: the task does not end this process
            if os.getpid() != self.pid:
                os._exit(1)
            raise Fault(ERROR, self.describe(error)) from None
        if os.getpid() != self.pid:  # a child of the task's that came back from here
            os._exit(0)
        if self.sink.printed > MOST_PRINTED:
            raise Fault(OUTPUT, f"prints more than {MOST_PRINTED >> 20} MiB in one call")
        return result

    def set_limits(self, seconds: float) -> None:
        """The time that a request may take if nobody ends it earlier."""
        signal.setitimer(signal.ITIMER_REAL, seconds)
        limit("RLIMIT_CPU", math.ceil(time.process_time() + seconds) + 1)

    def describe(self, error: BaseException) -> str:
        """'constraints.py:12: ValueError: no such kind'."""
        frames = traceback.extract_tb(error.__traceback__)
        places = [(frame.filename, frame.lineno) for frame in frames]
        try:
            text = str(error)
            if isinstance(error, SyntaxError) and error.filename:
                places.append((error.filename, error.lineno))
                text = error.msg
        except BaseException:  # the error is the task's own class
            text = ""
        text = " ".join(text.encode("utf-8", "backslashreplace").decode().split())[:300]
        name = type(error).__name__
        own = [place for place in places if place[0].startswith(self.folder + os.sep)]
        where = f"{os.path.relpath(own[-1][0], self.folder)}:{own[-1][1]}: " if own else ""
        return f"{where}{name}: {text}" if text else f"{where}{name}"

    def open(self) -> dict:
        """Import the task: what it has."""
        self.task = self.call(self.load)
        missing = [n for n in ("questions", "score") if not callable(getattr(self.task, n, None))]
        if missing:
            raise Fault(ERROR, f"has no function {' and no function '.join(missing)}")
        self.explain = getattr(self.task, "explain", None)
        if self.explain is not None and not callable(self.explain):
            raise Fault(ERROR, "explain is no function")
        generation = getattr(self.task, "GENERATION", None)
        try:
            json.dumps(generation)
        except (TypeError, ValueError) as error:
            raise Fault(ERROR, f"GENERATION is no JSON: {error}") from None
        return {"generation": generation, "explains": self.explain is not None}

    def load(self):
        sys.path.insert(0, self.folder)
        spec = importlib.util.spec_from_file_location(MODULE, self.path)
        module = sys.modules[MODULE] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def questions(self, split: str, number: int, seed: int) -> dict:
        rows = self.call(self.task.questions, split, number, seed)
        if not isinstance(rows, list | tuple):
            raise Fault(ERROR, f"questions(...) gave {kind(rows)}, not a list")
        texts, size = [], 0
        for place, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise Fault(ERROR, f"questions(...): row {place} is {kind(row)}, not a dict")
            try:
                texts.append(json.dumps(row, allow_nan=False))
            except (TypeError, ValueError, RecursionError) as error:
                text = str(error)[:200]
                raise Fault(ERROR, f"questions(...): row {place} is no JSON: {text}") from None
            size += len(texts[-1])
            if size > MOST_QUESTIONS:
                most = MOST_QUESTIONS >> 20
                raise Fault(OUTPUT, f"questions(...) gave more than {most} MiB")
        return {"rows": [json.loads(text) for text in texts]}

    def score(self, line: bytes) -> dict:
        """The score of an answer and, if the task explains it, words and other readings. Each
        function gets a question of its own, which it may change.
        """
        values = json.loads(line)["score"]
        score = as_share("score(...)", self.call(self.task.score, *values))
        if self.explain is None:
            return {"score": score, "text": "", "scores": {}}
        words = self.call(self.explain, *json.loads(line)["score"])
        return {"score": score, **read_words(words)}

    def reply_to(self, line: bytes) -> dict:
        is_score = line.startswith(b'{"score"')
        self.set_limits(self.score_seconds if is_score else self.open_seconds)
        try:
            if is_score:
                reply = self.score(line)
            elif line.startswith(b'{"questions"'):
                reply = self.questions(*json.loads(line)["questions"])
            else:
                reply = self.open()
        except Fault as fault:
            reply = {"fault": fault.status, "text": fault.text}
        except MemoryError:
            reply = {"fault": MEMORY, "text": "needs more memory than the limit"}
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self.opened:
            reply["opened"] = sorted(self.opened)
            self.opened.clear()
        return reply


def as_share(what: str, value) -> float:
    """`value` as a number from 0 to 1. Raises Fault."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise Fault(RANGE, f"{what} gave {kind(value)}, not a number from 0 to 1")
    try:
        number = float(value)
    except Exception:
        raise Fault(RANGE, f"{what} gave a number that no float can hold") from None
    if not -ROUNDING <= number <= 1 + ROUNDING:  # NaN too
        raise Fault(RANGE, f"{what} gave {number:g}, not a number from 0 to 1")
    return min(max(number, 0.0), 1.0)


def read_words(words) -> dict:
    """explain's result, checked. Raises Fault."""
    if not isinstance(words, dict) or words.keys() - {"text", "scores"}:
        gave = (
            f"the keys {', '.join(map(str, words))[:100]}"
            if isinstance(words, dict)
            else kind(words)
        )
        raise Fault(ERROR, f"explain(...) gave {gave}, not a dict of 'text' and 'scores'")
    text, scores = words.get("text", ""), words.get("scores", {})
    if not isinstance(text, str) or not isinstance(scores, dict):
        raise Fault(ERROR, "explain(...): 'text' must be text, and 'scores' a dict of numbers")
    if len(text) > MOST_REPLIED or len(scores) > 1000:
        raise Fault(OUTPUT, f"explain(...) gave more than {MOST_REPLIED >> 20} MiB of words")
    shares = {}
    for name, value in scores.items():
        if not isinstance(name, str) or not 0 < len(name) <= 100:
            raise Fault(
                ERROR, "explain(...): a name in 'scores' must be text of 1 to 100 characters"
            )
        shares[name] = as_share(f"explain(...)'s {name}", value)
    return {"text": text, "scores": shares}


def kind(value) -> str:
    """A value in a message: "the text 'high'", 'a value of type list'."""
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    return f"a value of type {type(value).__name__}"


def limit(name: str, most: int) -> None:
    """Set a limit of this process. Not every system has every one."""
    try:
        number = getattr(resource, name)
        _, hard = resource.getrlimit(number)
        soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(number, (soft, hard))
    except (AttributeError, OSError, ValueError):
        pass


def write_line(file: int, reply: dict) -> None:
    """A line of JSON; characters beyond ASCII are escaped, lone surrogates too."""
    data = json.dumps(reply).encode() + b"\n"
    while data:
        data = data[os.write(file, data) :]


def main(
    path: str, seconds: str, open_seconds: str, memory_mib: str, requests: str, replies: str
) -> None:
    # 1) The limits that hold from here on.
    limit("RLIMIT_AS", int(memory_mib) << 20)
    limit("RLIMIT_FSIZE", MOST_WRITTEN)
    limit("RLIMIT_CORE", 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the task may have a handler of its own
    sys.dont_write_bytecode = True
    os.chdir(os.path.dirname(path))
    # 2) The task, then one reply to each request.
    sys.argv = [path]
    child = Child(path, float(seconds), float(open_seconds))
    write_line(int(replies), child.reply_to(b""))
    with open(int(requests), "rb") as lines:
        for line in lines:
            write_line(int(replies), child.reply_to(line))
    os._exit(0)  # what the task has registered for the end does not run


if __name__ == "__main__":
    main(*sys.argv[1:])
