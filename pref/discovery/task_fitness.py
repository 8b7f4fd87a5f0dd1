"""--task: fitness by a score with ground truth, at equal KL.

A loss that goes further from the base model may score more for that alone. So a candidate's score
is compared with DPO's at the candidate's own KL:

1. DPO is trained with three learning rates (RATES times the given one), the candidate with one.
2. Between two of DPO's runs the score is taken to be linear in KL (pref/analysis/equal_kl.py).
   Nothing is extrapolated: a candidate whose KL DPO does not reach cannot be compared.
3. A question's gap is the candidate's score minus DPO's at that KL. KLs are estimates too: where a
   question's answers are further away than the average, its gap is lowered by DPO's slope times the
   excess, which changes nothing on average and counts in the error.

The questions are the search's own, of a seed that no other study of the task has.
"""

import csv
import shlex
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from pref.analysis import equal_kl, run_metrics
from pref.discovery.settings import Settings
from pref.files import mt_bench
from pref.files.console import UserError

RATES = (0.5, 1.0, 2.0)
# Of the questions: those of the search, and those that the confirmation's runs answer.
SEED, FRESH_SEED = 7001, 7002
DIGITS = 6


class Result(NamedTuple):
    """A run's answers to the task, by question."""

    scores: dict[int, float]  # mean over choices
    kl: dict[int, float]  # nats an answer


def question_lines(settings: Settings, folder: Path, are_fresh: bool = False) -> dict[str, str]:
    """Lines of a grid file for answers to the task's questions: the search's own, or fresh ones."""
    seed, place = (FRESH_SEED, "fresh_task") if are_fresh else (SEED, "task")
    return {
        "TASK": settings.task,
        "TASK_ARGS": f"--seed {seed} {settings.task_args}".strip(),
        "BENCH_DATA": str(folder / place),
        "GEN_ARGS": f"--kl {settings.gen_args}".strip(),
    }


def grid_lines(settings: Settings, folder: Path) -> dict[str, str]:
    """What a grid file needs besides, with the learning rate as an axis."""
    rate = settings.training().learning_rate
    return {
        **question_lines(settings, folder),
        "STAGES": "train gen judge",
        "LRS": f"{rate:g}",
        "LRS_dpo": " ".join(f"{rate * factor:g}" for factor in RATES),
        "TRAIN_ARGS": shlex.join(without_rate(settings.given_train_args())),
    }


def without_rate(words: list[str]) -> list[str]:
    """train_pref.py's arguments without --learning_rate."""
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word == "--learning_rate":
            skip = True
        elif not word.startswith("--learning_rate="):
            kept.append(word)
    return kept


def read(run: Path, task: str) -> Result:
    """Raises UserError for a run of which a question has no score or no KL: all runs are compared
    on all questions.
    """
    folder = run / task
    found = defaultdict(list)
    with open(folder / "judgements.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["status"] == "ok" and row["score"]:
                found[int(row["question_id"])].append(float(row["score"]))
    answers = mt_bench.read_answers(folder / "answers.jsonl", None)
    kl = run_metrics.kl_by_question(answers)
    questions = sorted({key[0] for key in answers})
    if lacking := [q for q in questions if q not in found or q not in kl]:
        raise UserError(
            f"{folder}: question {lacking[0]} has no score or no KL (judgements.csv says why); "
            "correct the task or its answers, then run the same command again"
        )
    return Result({q: fmean(found[q]) for q in questions}, {q: kl[q] for q in questions})


def gaps(candidate: Result, dpo: list[Result]) -> list[float] | None:
    """(questions,) the candidate's scores minus DPO's at the candidate's KL; None if DPO's runs do
    not reach it from below and above.
    """
    shared = sorted(set(candidate.scores).intersection(*(one.scores for one in dpo)))
    points = sorted((point_of(one, shared) for one in dpo), key=lambda point: point.kl)
    own = point_of(candidate, shared)
    if not points[0].kl <= own.kl <= points[-1].kl:
        return None
    near, far, _ = equal_kl.between(points, own.kl)
    width = far.kl - near.kl
    slope = (far.scores.mean() - near.scores.mean()) / width if width > 0 else 0.0
    at_kl = equal_kl.interpolated(points, own.kl)
    values = own.scores - slope * (own.distances - own.kl) - at_kl
    return np.round(values, DIGITS).tolist()


def point_of(one: Result, questions: list[int]) -> equal_kl.Point:
    scores, kl = (np.array([values[q] for q in questions]) for values in (one.scores, one.kl))
    return equal_kl.Point(SimpleNamespace(), scores, kl)


def fitness(candidate: Path | None, dpo: list[Path], task: str) -> dict:
    """What a `trained` event says about the task: score, kl and gaps. candidate: None for DPO
    itself, whose gaps are 0; dpo: its runs with the same seed, in the order of RATES.
    """
    of_dpo = [read(run, task) for run in dpo]
    own = of_dpo[RATES.index(1.0)] if candidate is None else read(candidate, task)
    found = [0.0] * len(own.scores) if candidate is None else gaps(own, of_dpo)
    return {
        "score": fmean(own.scores.values()),
        "kl": fmean(own.kl.values()),
        "gaps": found,
    }
