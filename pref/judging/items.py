"""From answers to what has to be judged: one `store.Item` for each judgement that is needed."""

import itertools
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pref.files import disk, mt_bench
from pref.judging import run_answers
from pref.judging.benchmark import (
    PAIR,
    PROGRAM,
    SCORE_GRADINGS,
    SINGLE,
    Ask,
    Bench,
    question_sha256,
)
from pref.judging.benchmarks import DEFAULT
from pref.judging.identity import Identity
from pref.judging.run_answers import Baselines
from pref.judging.store import Item


class Unit(NamedTuple):
    """A turn of one run's answer, to be judged once (or, as a pair, once in each order)."""

    model_id: str
    question: dict
    choice: int
    turn: int  # from 1
    repeat: int


def make_items(
    runs: dict[Path, dict], bench: Bench, baselines: Baselines, who: Identity, repeats: int
) -> list[Item]:
    """All judgements by `who` that the answers in `runs` need. A failed answer needs none.

    Ordered by repeat, then by question over all runs, so that an interrupted evaluation has judged
    every run on the same questions.
    """
    runs_of = {run.resolve().name: by_question(answers) for run, answers in runs.items()}
    items = []
    for repeat, question, (model_id, answers) in itertools.product(
        range(repeats * bench.samples), bench.questions, runs_of.items()
    ):
        given = answers.get(question["question_id"], {})
        for (choice, answer), turn in itertools.product(given.items(), bench.turns):
            unit = Unit(model_id, question, choice=choice, turn=turn, repeat=repeat)
            if not run_answers.has_failed(answer, turn):
                items += items_of(unit, answer, bench, baselines, who)
    return items


def by_question(answers: dict) -> dict[int, dict[int, list[str]]]:
    """Turns by question_id and choice, of answers by (question_id, choice)."""
    found: dict[int, dict[int, list[str]]] = defaultdict(dict)
    for (question_id, choice), row in answers.items():
        found[question_id][choice] = row["turns"]
    return found


def items_of(
    unit: Unit, answer: list[str], bench: Bench, baselines: Baselines, who: Identity
) -> Iterable[Item]:
    """The judgements of one answer: alone, or compared with the baseline's.

    An answer of the baseline itself is not compared, nor is one to which the baseline has none.
    """
    question_id = unit.question["question_id"]
    baseline, other = "", None
    if bench.grading != SINGLE:
        baseline = baselines.names.get(question_id, "")
        row = baselines.answers_to(question_id).get((question_id, unit.choice))
        if (
            row
            and baseline != unit.model_id
            and not run_answers.has_failed(row["turns"], unit.turn)
        ):
            other = row["turns"]
    if bench.grading == PAIR and other is None:
        return []
    shown = [answer] if other is None else [answer, other]
    answer_sha256 = mt_bench.answer_sha256(unit.turn, *shown)
    baseline = "" if other is None else baseline
    return [
        make_item(unit, ask, answer_sha256, baseline, bench, who)
        for ask in asks_of(bench, unit.question, unit.turn, answer, other)
    ]


def asks_of(
    bench: Bench, question: dict, turn: int, answer: list[str], other: list[str] | None
) -> list[Ask]:
    """What the judge is asked about a turn. A score judge gets the conversation, and the
    baseline's, in place of the benchmark's prompts; a program the question's whole row.
    """
    if bench.grading not in SCORE_GRADINGS:
        return bench.benchmark.asks(bench, question, turn, answer, other)
    extra = {}
    if bench.grading == PROGRAM:
        extra["question_sha256"] = question_sha256(question, turn)
    if other is not None:
        extra["baseline_messages"] = conversation(question["turns"], other, turn)
    return [Ask(conversation(question["turns"], answer, turn), extra=extra)]


def conversation(question: list[str], answer: list[str], turn: int) -> list[dict]:
    """The messages of the first `turn` turns."""
    return [
        {"role": role, "content": text}
        for pair in zip(question[:turn], answer[:turn])
        for role, text in zip(("user", "assistant"), pair)
    ]


def make_item(
    unit: Unit, ask: Ask, answer_sha256: str, baseline: str, bench: Bench, who: Identity
) -> Item:
    """The item of a unit, with the request that answers it."""
    extra = ask.extra if bench.name == DEFAULT else ask.extra | {"bench": bench.name}
    request = who.request(ask.messages, unit.repeat, bench.grading, **extra)
    return Item(
        model_id=unit.model_id,
        question_id=unit.question["question_id"],
        turn=unit.turn,
        choice=unit.choice,
        category=unit.question.get("category"),
        grading=bench.grading,
        order=ask.order,
        baseline=baseline,
        judge=who.judge,
        prompts=bench.label,
        repeat=unit.repeat,
        refs=bench.refs,
        answer_sha256=answer_sha256,
        request_sha256=disk.sha256_json(request),
        request=request,
        judge_id=who.id,
        bench=bench.name,
        known=ask.known,
    )
