"""A judge's scores of a run's answers, from judgements.csv.

A program, a reward model and a judge that rates give each answer a score. A judge that compares two
answers does not.
"""

import math
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from pref.files import judgements, mt_bench, run_folders
from pref.files.console import UserError
from pref.files.mt_bench import AnswerKey

PAIRWISE = "pair"  # column `grading` of a comparison


class Judge(NamedTuple):
    """Whose scores may be compared and averaged."""

    name: str
    grading: str  # single, reward or program
    judge_id: str | None  # None: judgements of version 1.0
    settings: str | None  # JSON
    prompts: str | None
    refs: str | None

    @classmethod
    def of(cls, row: dict) -> "Judge":
        names = ("judge", "grading", "judge_id", "judge_settings", "prompts", "refs")
        return cls(*(row[name] for name in names))


class Scores(NamedTuple):
    """What one judge says of the answers."""

    judge: Judge
    means: dict[AnswerKey, float]  # over repeats
    failures: dict[AnswerKey, str]  # status of answers that were judged without a score
    notes: list[str]


def read_scores(path: Path, answers: dict[AnswerKey, dict], wanted: str | None) -> Scores:
    """The scores of `answers` by the judge `wanted`, a name or a judge_id; None: the only one.

    Judgements of answers that have been replaced are left out. Raises UserError if there are no
    scores, or if several judges gave some.
    """
    results = run_folders.folder_of(path.parent.parent)
    how = f"python judge.py {results} --bench {path.parent.name} --judge JUDGE"
    if not path.is_file():
        raise UserError(f"{path}: no such file, so nobody has scored these answers; {how}")
    # 1) Scores of the answers that are there now.
    rows = [row for row in judgements.read_judgements(path) if row["grading"] != PAIRWISE]
    if not rows:
        raise UserError(
            f"{path}: no scores. A comparison of two answers is no score of either; ask a program "
            f"(py:FILE), a reward model (rm:PATH) or a judge that rates: {how}"
        )
    current = [row for row in rows if is_current(row, answers)]
    if not current:
        raise UserError(
            f"{path}: none of the {len(rows):,} scores is of these answers, which have been "
            f"replaced, or were compared with a baseline; score them: {how}"
        )

    # 2) One judge's.
    judge = pick_judge(path, current, wanted)
    scores, failures = defaultdict(list), {}
    for row in (row for row in current if Judge.of(row) == judge):
        key = AnswerKey(row["question_id"], row["choice"])
        if row["status"] != "ok":
            failures[key] = row["status"]
        else:
            scores[key].append(checked_score(path, row))
    means = {key: statistics.mean(given) for key, given in scores.items()}  # exact, also of 0.1s
    failed = {key: status for key, status in failures.items() if key not in means}

    # 3) What the user should know of it.
    notes = []
    if others := len(rows) - len(current):
        notes.append(f"scores left out, of answers that have been replaced: {others:,}")
    if len({len(given) for given in scores.values()}) > 1:
        notes.append("some answers have fewer repeats of their score than others; means are used")
    return Scores(judge, means, failed, notes)


def checked_score(path: Path, row: dict) -> float:
    if row["score"] is None or not math.isfinite(row["score"]):
        raise UserError(
            f"{path}: question {row['question_id']}, choice {row['choice']}: score {row['score']} "
            f"is not a number; {judgements.REWRITE}"
        )
    return row["score"]


def pick_judge(path: Path, rows: list[dict], wanted: str | None) -> Judge:
    """The judge `wanted`, or the only one. Raises UserError with a list of those who gave scores.

    rows: scores, at least one.
    """
    counts = Counter(map(Judge.of, rows))
    matching = [judge for judge in counts if wanted in (None, judge.name, judge.judge_id)]
    if len(matching) == 1:
        return matching[0]
    listed = "\n".join(
        f"  {judge.name}  judge_id {judge.judge_id}  {judge.grading}  {count:,} judgements  "
        f"{(judge.settings or '')[:120]}".rstrip()
        for judge, count in counts.items()
    )
    if not matching:
        raise UserError(f"--judge {wanted}: {path} has no scores by that judge, but by\n{listed}")
    raise UserError(
        f"{path}: scores of {len(matching)} judges; choose one by its name or judge_id with "
        f"--judge:\n{listed}"
    )


def is_current(row: dict, answers: dict[AnswerKey, dict]) -> bool:
    """Whether a judgement is of the answer that is there now, and of it alone."""
    answer = answers.get(AnswerKey(row["question_id"], row["choice"]))
    if answer is None:
        return False
    return row["answer_sha256"] == mt_bench.answer_sha256(row["turn"], answer["turns"])
