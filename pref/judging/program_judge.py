"""A task's own function as a judge: `--judge py:FILE`.

The score of an answer is what `score(question, answer)` in FILE returns, a number from 0 to 1; what
its `explain` says is kept as the judgement. FILE runs in a process with limits
(pref/files/tasks.py). An answer on which it fails has a reason and no score.

judge.py asks for one score at a time, and a pipe is fast with many. So the judge is told of all
answers beforehand (`prepare`), and when it is asked for one it scores the next ones too. Some of
them are scored in two processes first: a task that draws its scores is refused, and one whose
scores depend on what it has scored before.

The judge is identified by the content of the file and of the modules beside it, and by the versions
of its packages. Another version of the file is another judge; another path to it is not.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterable

from pref.files import tasks
from pref.files.console import UserError
from pref.files.tasks import Scored, Task, TaskFault
from pref.judging import judges
from pref.judging.benchmark import Bench, question_sha256, question_up_to
from pref.judging.judges import Judge

BATCH_S = 0.5  # what a kill may cost, and how long Ctrl-C waits
# Answers, spread over all, that are scored in a second process too; and how long their first
# scores may take: fewer are checked of a slow task, but at least two.
CHECKED, CHECKED_S = 32, 1.0
# Answers in a row on which the task takes too long: so would the rest.
GIVE_UP_AFTER = 20

Key = tuple[str, str]  # hash of the question, answer


def open_program_judge(args: argparse.Namespace, bench: Bench) -> Judge:
    """The task of --judge py:FILE. Raises UserError for a file that is no task."""
    task = tasks.open_task(args.judge)
    queue = Queue(task, bench)
    return Judge(
        name=judges.recorded_name(args.judge),
        params_b=None,
        parameters={"method": "program", **task.identity},
        ask=queue.ask,
        concurrency=1,
        kind=judges.PROGRAM,
        prepare=queue.prepare,
    )


class Queue:
    """Answers that are to be scored, and the replies that are known."""

    def __init__(self, task: Task, bench: Bench):
        self.task = task
        # A request has the hash of its question alone: a store with each row for each answer would
        # be several times as large.
        self.questions: dict[str, dict] = {}
        for question, turn in itertools.product(bench.questions, bench.turns):
            self.questions[question_sha256(question, turn)] = question_up_to(question, turn)
        self.waiting: dict[Key, None] = {}  # in the order in which they are needed
        self.replies: dict[Key, dict] = {}
        self.batch = 1  # answers; the first says how long one takes
        self.timeouts = 0  # since the last answer with a reply of another kind
        self.reported: set[str] = set()  # data files

    def prepare(self, requests: Iterable[dict]) -> None:
        """Note the answers of all requests that will be made. Raises UserError for a task that
        gives an answer two scores: no number of such a task is kept.
        """
        self.waiting |= dict.fromkeys(map(key_of, requests))
        keys = list(self.waiting)
        keys = keys[:: max(1, len(keys) // CHECKED)][:CHECKED]
        answers = [(self.questions[sha256], text) for sha256, text in keys]
        with tasks.open_task(self.task.path, hash_seed=1) as again:
            check_answers(self.task, again, answers)

    def ask(self, request: dict) -> dict:
        """The reply to a request. Raises UserError when too many in a row have taken too long."""
        key = key_of(request)
        if key not in self.replies:
            self.compute(key)
        reply = self.replies[key]
        self.timeouts = self.timeouts + 1 if reply["status"] == tasks.TIMEOUT else 0
        if self.timeouts > GIVE_UP_AFTER:
            raise UserError(
                f"{self.timeouts} answers in a row took too long, so nothing more is scored: "
                f"{reply['judgement']}. The same command goes on with the next answers"
            )
        return reply

    def compute(self, key: Key) -> None:
        """Score this answer, and with it those that come next, as many as take BATCH_S."""
        self.waiting.pop(key, None)
        keys = [key, *itertools.islice(self.waiting, self.batch - 1)]
        begun = time.monotonic()
        found = self.task.score_some([(self.questions[sha256], text) for sha256, text in keys])
        seconds = (time.monotonic() - begun) / len(found)
        self.batch = max(1, min(tasks.BATCH, int(BATCH_S / max(seconds, 1e-9))))
        for one, result in zip(keys, found):
            self.replies[one] = as_reply(result, self.task.explains)
            self.waiting.pop(one, None)
        for name in sorted(self.task.late_files - self.reported):
            print(f"{self.task.path.name}: {tasks.late_file_note(name)}", file=sys.stderr)
        self.reported |= self.task.late_files


def check_answers(task: Task, again: Task, answers: list[tuple[dict, str]]) -> None:
    """Raise UserError if a task gives one of `answers` two scores. again: the same task in another
    process, which scores them backwards and then once more: a task that remembers what it has
    scored would otherwise give both the same. An answer without a score has its reason later.
    """
    until = time.monotonic() + CHECKED_S
    scored = []
    for number, answer in enumerate(answers, 1):
        (one,) = task.score_some([answer])
        if isinstance(one, Scored):
            scored.append((answer, one))
        if number > 1 and time.monotonic() > until:
            break
    for answer, one in [*scored[::-1], *scored]:
        (two,) = again.score_some([answer])
        if isinstance(two, Scored):
            tasks.check_same(task, *answer, one, two)


def key_of(request: dict) -> Key:
    return request["question_sha256"], request["messages"][-1]["content"]


def as_reply(result: Scored | TaskFault, explains: bool) -> dict:
    """The reply as the store takes it: a fault has no score."""
    if isinstance(result, TaskFault):
        return {"status": result.status, "judgement": result.text}
    words = {"text": result.text, "scores": result.scores}
    # A lone surrogate, which the store cannot hold, stays the escape that JSON has for it.
    text = json.dumps(words, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
    return {"status": "ok", "score": result.score, "judgement": text if explains else None}
