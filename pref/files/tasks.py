"""A task: questions whose answers a program scores, in a Python file of the user's.

    questions(split, number, seed)   rows with question_id, category, turns ([prompt]) and whatever
                                     the checker needs; split is "train" or "test"
    score(question, answer)          a number from 0 to 1; deterministic
    explain(question, answer)        optional: {"text": the checker's words, "scores": {name:
                                     another reading, from 0 to 1}}
    GENERATION                       optional: {"temperature": ..., "max_new_tokens": ...}, how its
                                     questions are answered unless the user says otherwise

Its code runs in a process of its own (task_child.py), without this process's environment, with a
limit on the time of a call, on memory and on what it prints. Whatever goes wrong there is a
TaskFault, which says where, what and what to do, and the next call works again. This guards against
mistakes, not against malice: a task is code that the user has chosen to run.

    with tasks.open_task(Path("examples/tasks/constraints.py")) as task:
        rows = task.questions("test", 96, seed=42)
        task.score(rows[0], "Today is a good day.").score
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pref.files import benchmarks, disk, task_child, task_identity
from pref.files.console import UserError

ERROR, RANGE, MEMORY, OUTPUT = (
    task_child.ERROR,
    task_child.RANGE,
    task_child.MEMORY,
    task_child.OUTPUT,
)
TIMEOUT = "program_timeout"
SECONDS = 10.0  # of one score
MEMORY_MIB = 4096  # of address space, of which a process uses a part
OPEN_SECONDS = 120.0  # of the import, and of `questions`
GRACE_SECONDS = 5.0  # after which the child ends itself, should this process have died
LOOK_EVERY_S = 0.5  # how often a process that gives no reply is looked at
BATCH = 64  # answers that are sent at a time
CHUNK = 2**16  # bytes
PREFIX = "py:"
GENERATION = {"temperature": 1.0, "max_new_tokens": 256}  # of a task that names none
TRAIN, TEST = "train", "test"
# What the child knows of this process's environment. Keys are none of it.
ENVIRONMENT = {"PATH", "HOME", "USER", "LANG", "TMPDIR", "TZ", "PYTHONPATH", "VIRTUAL_ENV"}
ENVIRONMENT |= {"LD_LIBRARY_PATH", "NLTK_DATA", "LC_ALL", "LC_CTYPE"}
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
REMEDIES = {
    ERROR: "correct the task",
    RANGE: "correct the task",
    TIMEOUT: "make it faster, or let it give up with a score",
    MEMORY: "let it need less, or give up with a score",
    OUTPUT: "let it print and return less",
}


class TaskFault(UserError):
    """The task's code has failed. status: program_error, program_timeout, program_range,
    program_memory or program_output. text: file, question, fact and remedy, on one line.
    """

    def __init__(self, status: str, text: str):
        super().__init__(text)
        self.status, self.text = status, text


class Scored(NamedTuple):
    """The score of an answer, from 0 to 1, and what the task's `explain` says of it."""

    score: float
    text: str = ""
    scores: dict[str, float] = {}  # noqa: RUF012  other readings by name; never changed


def path_of(text: str | Path) -> Path:
    """The file of a task, given as a path or as py:PATH. Raises UserError if it is none."""
    given = str(text).removeprefix(PREFIX)
    path = Path(given).expanduser()
    path = path.parent.resolve() / path.name  # a link to a file has a name of its own
    if path.is_dir():
        raise UserError(f"{given}: is a folder, expected a task's Python file")
    if not path.is_file():
        raise UserError(
            f"{given}: no such file; a task is a Python file with `questions` and `score`"
        )
    if path.suffix != ".py":
        raise UserError(f"{given}: its name must end with .py")
    disk.check_readable(path)
    return path


def open_task(
    path: str | Path,
    *,
    seconds: float = SECONDS,
    memory_mib: int = MEMORY_MIB,
    hash_seed: int = 0,
) -> "Task":
    """Start a task's process. Use as a context manager, or call `close`.

    seconds: wall-clock time that one score may take, its explanation included. memory_mib: its
    address space. hash_seed: PYTHONHASHSEED. Raises UserError for a file that is no task, and
    TaskFault for one that fails when it is imported.
    """
    return Task(path_of(path), seconds, memory_mib, hash_seed)


class Task:
    """A task, and the process that runs it.

    name: the file's stem. identity: what its scores depend on, see task_identity.py. generation:
    GENERATION, checked. late_files: data files beside it that it has opened since the import, whose
    content is no part of the identity.
    """

    def __init__(self, path: Path, seconds: float, memory_mib: int, hash_seed: int):
        self.path, self.name = path, path.stem
        self.seconds, self.memory_mib, self.hash_seed = seconds, memory_mib, hash_seed
        self.late_files: set[str] = set()
        sources, _ = task_identity.sources_of(path)
        before = task_identity.hashes(path.parent, sources)
        hello = self.start()
        self.data_files = {*hello.get("opened", ())}
        self.generation = check_generation(hello["generation"], path.name)
        self.explains: bool = hello["explains"]
        self.identity: dict = task_identity.identify(path, self.data_files)
        if not before.items() <= self.identity["sha256"].items():
            raise self.changed()

    def __enter__(self) -> "Task":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, and those that it has started."""
        self.end()

    # ---- what a user of a task calls -------------------------------------------------------------

    def questions(self, split: str, number: int, seed: int) -> list[dict]:
        """The rows as the task gives them; task_data.py checks them. Raises TaskFault."""
        line = encode({"questions": [split, number, seed]})
        reply = next(self.exchange([line], OPEN_SECONDS))
        if "fault" in reply:
            fact = f"{reply['text']} (questions({split!r}, {number}, {seed}))"
            raise self.fault(reply["fault"], fact)
        return reply["rows"]

    def score(self, question: dict, answer: str) -> Scored:
        """The score of one answer. Raises TaskFault."""
        (scored,) = self.score_many([(question, answer)])
        if isinstance(scored, TaskFault):
            raise scored
        return scored

    def score_many(self, answers: Sequence[tuple[dict, str]]) -> list[Scored | TaskFault]:
        """The score of each (question, answer), or why it has none."""
        found: list[Scored | TaskFault] = []
        while len(found) < len(answers):
            found += self.score_some(answers[len(found) :])
        return found

    def score_some(self, answers: Sequence[tuple[dict, str]]) -> list[Scored | TaskFault]:
        """The same of the first answers only, at least one: up to BATCH, or up to a fault that has
        ended the process. A caller that may be interrupted waits no longer than that.
        """
        answers = answers[:BATCH]
        replies = self.exchange([encode({"score": pair}) for pair in answers], self.seconds)
        return [self.read_score(reply, question) for reply, (question, _) in zip(replies, answers)]

    def read_score(self, reply: dict, question: dict) -> Scored | TaskFault:
        self.late_files |= {*reply.get("opened", ())} - self.data_files
        if "fault" in reply:
            place = f"question {question.get('question_id')}: "
            return self.fault(reply["fault"], place + reply["text"])
        return Scored(reply["score"], reply["text"], reply["scores"])

    def fault(self, status: str, fact: str) -> TaskFault:
        return TaskFault(status, f"{self.path.name}: {fact}; {REMEDIES[status]}")

    def changed(self) -> UserError:
        return UserError(
            f"{self.path}: the file, or one beside it that it reads, was changed meanwhile; run "
            "the same command again"
        )

    # ---- the process -----------------------------------------------------------------------------

    def start(self) -> dict:
        """Start the process and import the task in it. Its first reply."""
        self.unsent, self.unread = b"", bytearray()
        theirs, self.requests = os.pipe()
        self.replies, ours = os.pipe()
        os.set_blocking(self.requests, False)
        limits = (self.seconds + GRACE_SECONDS, OPEN_SECONDS + GRACE_SECONDS, self.memory_mib)
        given = (self.path, *limits, theirs, ours)
        self.process = subprocess.Popen(
            [sys.executable, "-P", task_child.__file__, *map(str, given)],
            env=child_environment(self.hash_seed),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs, ours),
            start_new_session=True,  # Ctrl-C is this process's; its children are ended with it
        )
        os.close(theirs)
        os.close(ours)
        # Also when this object, or this process, comes to its end.
        pipes = (self.requests, self.replies)
        self.end = weakref.finalize(self, end_process, os.getpid(), self.process, *pipes)
        reply = next(self.read_replies(1, OPEN_SECONDS))
        if "fault" in reply:
            self.end()
            raise self.fault(reply["fault"], reply["text"])
        return reply

    def restart(self) -> None:
        """Start the process again. Raises UserError if the task is not the one that it was."""
        self.start()
        hashes = self.identity["sha256"]
        if task_identity.hashes(self.path.parent, hashes) != hashes:
            raise self.changed()

    def exchange(self, lines: list[bytes], seconds: float) -> Iterator[dict]:
        """Send `lines`, yield the reply to each. After a fault that has ended the process there are
        no further replies.
        """
        if self.process.poll() is not None:
            self.end()
        if not self.end.alive:
            self.restart()
        self.unsent = b"".join(lines)
        for reply in self.read_replies(len(lines), seconds):
            if reply.get("fault") not in (None, ERROR, RANGE):
                self.end()  # its memory may be full
            yield reply
            if not self.end.alive:
                return

    def read_replies(self, number: int, seconds: float) -> Iterator[dict]:
        """Yield the next `number` replies, each of which may take `seconds`. If the process ends,
        or does not reply in time, the last one is a fault, and the process is dead.
        """
        for _ in range(number):
            deadline, searched = time.monotonic() + seconds, 0
            while (end := self.unread.find(b"\n", searched)) < 0:
                searched = len(self.unread)
                if (fault := self.wait(deadline, seconds)) is not None:
                    self.end()
                    yield fault
                    return
            line = bytes(self.unread[:end])
            del self.unread[: end + 1]
            try:
                yield disk.as_object(json.loads(line), "")
            except (ValueError, UserError):
                self.end()
                yield {"fault": ERROR, "text": "writes into its process's file descriptors"}
                return

    def wait(self, deadline: float, seconds: float) -> dict | None:
        """Send and receive what the pipes take now. None, or the fault of a process that gives no
        reply any more.
        """
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return {"fault": TIMEOUT, "text": f"takes longer than {seconds:g} s"}
        # A child of the task's may hold the pipe open when the process has ended.
        ended = self.process.poll() is not None
        writing = [self.requests] if self.unsent and not ended else []
        patience = 0.0 if ended else min(remaining, LOOK_EVERY_S)
        readable, writable, _ = select.select([self.replies], writing, [], patience)
        if writable:
            # If the process has ended, the next look says so.
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                self.unsent = self.unsent[os.write(self.requests, self.unsent[:CHUNK]) :]
        data = os.read(self.replies, CHUNK) if readable else b""
        self.unread += data
        if (readable and not data) or (ended and not readable):
            return self.how_it_ended(seconds)
        return None

    def how_it_ended(self, seconds: float) -> dict:
        """The fault of a process that has ended, or has closed its pipe."""
        try:
            code = self.process.wait(timeout=LOOK_EVERY_S)
        except subprocess.TimeoutExpired:
            return {"fault": ERROR, "text": "closes its process's file descriptors"}
        if -code in (signal.SIGALRM, signal.SIGXCPU):
            return {"fault": TIMEOUT, "text": f"takes longer than {seconds:g} s"}
        if code < 0:
            memory = " (out of memory?)" if -code == signal.SIGKILL else ""
            return {
                "fault": ERROR,
                "text": f"its process was ended by {signal_name(-code)}{memory}",
            }
        return {"fault": ERROR, "text": f"ends its own process (exit code {code})"}


def check_generation(given, name: str) -> dict:
    """GENERATION with what it lacks. Raises UserError for what cannot be used."""
    if given is None:
        return dict(GENERATION)
    where = f"{name}: GENERATION"
    unknown = disk.as_object(given, where).keys() - GENERATION.keys()
    if unknown:
        raise UserError(
            f"{where}: unknown {', '.join(sorted(unknown))}; it may have {' and '.join(GENERATION)}"
        )
    return benchmarks.check_generation(GENERATION | given, where)


def check_same(task: Task, question: dict, answer: str, one: Scored, two: Scored) -> None:
    """Raise UserError if two processes disagree about an answer."""
    if one == two:
        return
    what = "score" if one.score != two.score else "explain"
    gave = f"{one.score:g} and {two.score:g}" if what == "score" else "different words"
    raise UserError(
        f"{task.path.name}: question {question['question_id']}: {what}(...) gives {gave} for the "
        f"same answer, {answer[:40]!r}; it must depend on question and answer alone"
    )


def late_file_note(name: str) -> str:
    """What is wrong with a data file that a task opens after its import."""
    return (
        f"opens {name} after its import: such a file is no part of what identifies the judge, and "
        "scores by two versions of it would be mixed; read it at the top of the task"
    )


def encode(request: dict) -> bytes:
    """A request as a line of JSON. It has no NaN, which `questions` refuses."""
    return json.dumps(request).encode() + b"\n"


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def child_environment(hash_seed: int) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in ENVIRONMENT}
    return kept | ONE_THREAD | {"PYTHONHASHSEED": str(hash_seed)}


def end_process(owner: int, process: subprocess.Popen, *pipes: int) -> None:
    """Kill a task's process with those that it has started, and close this side of its pipes.

    owner: the process that may do so; a fork of it must not.
    """
    if os.getpid() != owner:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    for pipe in pipes:
        os.close(pipe)
