"""A reward model as a judge: `--judge rm:PATH`.

It gives the answer that ends a conversation a number. The higher the better, and only differences
between answers to one question mean something. Nothing is generated, and there is nothing to parse.

judge.py asks for one conversation at a time, a reward model is fast with many. So it is told of all
of them beforehand (`prepare`), and asked for one (`score`) it computes a whole batch of those that
are still to come:

    prepare([c1, c2, c3, c4, ...])
    score(c1)    computes c1, c3 and c4, which have a similar length
    score(c2)    computes c2, ...
    score(c3)    is known

torch and transformers are imported with reward_scorer.py, when a model is loaded.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Iterable

from pref.files import disk
from pref.files.console import UserError
from pref.judging import judges
from pref.judging.judges import Judge, NoScore

AHEAD = 1024  # conversations among which a batch is looked for


def open_reward_judge(args: argparse.Namespace) -> Judge:
    """Load the reward model of --judge rm:PATH. Raises UserError if it is none."""
    # Imported here because it loads torch, which a judge behind a server does not need.
    from pref.judging import reward_scorer

    scorer = reward_scorer.load(args.judge.removeprefix("rm:"), args.dtype)
    queue = Queue(scorer)
    return judges.score_judge(
        args.judge, scorer.params_b, scorer.parameters, queue.score, queue.prepare
    )


class Queue:
    """Conversations that are to be scored, and the scores that are known."""

    def __init__(self, scorer):
        """scorer: reward_scorer.Scorer."""
        self.scorer = scorer
        self.waiting: dict[str, list[dict]] = {}  # by key, in the order in which they are needed
        self.rows: dict[str, object] = {}  # reward_scorer.Row of those that were looked at
        self.scores: dict[str, float | NoScore] = {}

    def prepare(self, requests: Iterable[dict]) -> None:
        """Note the conversations of all requests that will be made."""
        for request in requests:
            for name in ("messages", "baseline_messages"):
                if request.get(name):
                    self.waiting.setdefault(key_of(request[name]), request[name])
        self.report_control_tokens()

    def report_control_tokens(self) -> None:
        """Say how many answers hold tokens that the model reads as the end of a turn."""
        from pref.model import template

        pattern = template.any_of(template.control_tokens(self.scorer.tokenizer))
        found = [
            match for c in self.waiting.values() if (match := pattern.search(c[-1]["content"]))
        ]
        if found:
            print(
                f"{len(found)} answers hold control tokens of the reward model ({found[0][0]} "
                "first): it reads them as such, so that their scores say little",
                file=sys.stderr,
            )

    def score(self, messages: list[dict]) -> float:
        """The score of the last message. Raises NoScore if it has none."""
        key = key_of(messages)
        if key not in self.scores:
            self.waiting.setdefault(key, messages)
            self.compute(key)
        result = self.scores[key]
        if isinstance(result, NoScore):
            raise result
        return result

    def compute(self, key: str) -> None:
        """Score this conversation, and with it those that fill its batch."""
        from pref.judging.reward_scorer import rows_of, width_of

        # 1) Those within reach as token ids. What cannot be scored is done.
        for other in [key, *itertools.islice(self.waiting, AHEAD)]:
            if other not in self.rows and other not in self.scores:
                self.encode(other)
        if key in self.scores:
            return
        # 2) The first of the same width, this one in any case.
        limit = self.scorer.limit
        widths = {other: width_of(row, limit) for other, row in self.rows.items()}
        width = widths[key]
        batch = [key, *(other for other in widths if widths[other] == width and other != key)]
        batch = batch[: rows_of(width)]
        # 3) Their scores.
        rows = [self.rows.pop(other) for other in batch]
        for other, result in zip(batch, self.compute_rows(rows, width)):
            self.scores[other] = result
            self.waiting.pop(other, None)

    def encode(self, key: str) -> None:
        """Add a conversation's Row, or the reason why it has none."""
        try:
            row = self.scorer.encode(self.waiting[key])
        except UserError as error:
            result = NoScore("template", str(error))
        else:
            size, limit = len(row.ids), self.scorer.limit
            if limit is None or size <= limit:
                self.rows[key] = row
                return
            # Cut off, the answer would have a score that is not its own.
            result = NoScore("too_long", f"{size} tokens; the reward model reads at most {limit}")
        self.scores[key] = result
        self.waiting.pop(key)

    def compute_rows(self, rows: list, width: int) -> list[float | NoScore]:
        """Scores, or why there is none. A batch that does not fit into the memory is computed row
        by row.
        """
        import torch

        try:
            return [checked(score) for score in self.scorer.compute(rows, width)]
        except torch.OutOfMemoryError:
            size = len(rows[0].ids)
            if len(rows) == 1:
                return [NoScore("memory", f"{size} tokens need more GPU memory")]
        return [self.compute_rows([row], len(row.ids))[0] for row in rows]


def checked(score: float) -> float | NoScore:
    if math.isfinite(score):
        return score
    return NoScore("nonfinite", f"the reward model's score is {score}")


def key_of(messages: list[dict]) -> str:
    return disk.sha256_json(messages)
