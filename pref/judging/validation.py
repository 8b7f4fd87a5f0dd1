"""judge.py --validate: a judge compares answers that people have compared, and is compared to them.

    votes, answers -> human_votes.py: a sample of pairs -> items -> the store, as for any judgement
    store -> verdicts by pair -> validation_report.py -> results/judges/<judge>/validation.json

The requests are those of MT-Bench, byte for byte: a judge that has rated these answers before is
not asked again. The judgements are in no run's judgements.csv, because no run gave these answers.
"""

import argparse
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from pref.files import disk, mt_bench
from pref.files.benchmarks import DATA
from pref.files.console import UserError
from pref.files.judgements import ORDERS, RUN_IS_A
from pref.judging import benchmarks, human_votes, items, summary, validation_report
from pref.judging.benchmark import PAIR, Bench
from pref.judging.human_votes import LLMBAR, MIRRORED, TIE, A, B, Known, Pair
from pref.judging.identity import Identity
from pref.judging.items import Unit
from pref.judging.plan import Plan
from pref.judging.store import Item, Result
from pref.judging.validation_stats import Judged

LONGEST_SLUG = 60
NOT_JUDGED = Result().status


class Task(NamedTuple):
    """What a judge is validated on."""

    known: Known
    pairs: list[Pair]  # the sample, in the order in which it is judged
    bench: Bench  # MT-Bench, whose prompts and references are used


def read_task(args: argparse.Namespace) -> Task:
    """The pairs to judge. Raises UserError for data that cannot be used."""
    # --bench_data is the folder of the votes; MT-Bench's own is --mt_bench.
    of_bench = {"bench_data": None, "grading": args.grading or PAIR}
    bench = benchmarks.read_bench(argparse.Namespace(**vars(args) | of_bench))
    folder = args.bench_data or DATA / args.validate
    if args.validate == LLMBAR:
        known = human_votes.read_llmbar(folder)
    else:
        known = human_votes.read_votes(folder, bench.questions)
    return Task(known, human_votes.in_sample_order(known)[: args.pairs], bench)


# ---- what is asked -------------------------------------------------------------------------------


def make_items(task: Task, repeats: int, who: Identity) -> list[Item]:
    """The judgements that the pairs need: each pair in both orders, or each of the answers once.

    In the order of the sample, so that an interrupted validation has judged a sample too.
    """
    made: dict[tuple, Item] = {}  # by need: pairs share answers
    for repeat, pair in itertools.product(range(repeats), task.pairs):
        for item in items_of(task, pair, repeat, who):
            made.setdefault(need_of(item), item)
    return list(made.values())


def items_of(task: Task, pair: Pair, repeat: int, who: Identity) -> list[Item]:
    """The judgements of one pair."""
    bench, question = task.bench, task.known.questions[pair.question_id]
    models = (pair.model_a, pair.model_b)
    answers = [task.known.answers[model][pair.question_id] for model in models]
    units = [Unit(model, question, choice=0, turn=pair.turn, repeat=repeat) for model in models]
    if bench.grading == PAIR:
        sha256 = mt_bench.answer_sha256(pair.turn, *answers)
        asks = items.asks_of(bench, question, pair.turn, *answers)
        return [items.make_item(units[0], ask, sha256, pair.model_b, bench, who) for ask in asks]
    made = []
    for unit, answer in zip(units, answers):
        sha256 = mt_bench.answer_sha256(pair.turn, answer)
        asks = items.asks_of(bench, question, pair.turn, answer, None)
        made += [items.make_item(unit, ask, sha256, "", bench, who) for ask in asks]
    return made


def need_of(item: Item) -> tuple:
    """What tells the items of one validation apart."""
    return item.model_id, item.baseline, item.question_id, item.turn, item.order, item.repeat


# ---- verdicts by pair ----------------------------------------------------------------------------


class PairVerdict(NamedTuple):
    """What the judge said of a pair, in one repeat."""

    verdict: str | None  # A, TIE or B; TIE also where the two orders disagree
    status: str  # "ok", or why there is no verdict
    orders: tuple[str, str] | None = None  # the verdicts with a shown first, and with b shown first


def judged_rows(task: Task, made: list[Item], results: dict[str, Result]) -> list[Judged]:
    """A row for each pair, with its votes and what the judge said of it.

    made: all items, as `make_items` orders them. results: by request hash.
    """
    of_need = {need_of(item): results.get(item.request_sha256, Result()) for item in made}
    repeats = 1 + max((item.repeat for item in made), default=0)
    rows = []
    for pair in task.pairs:
        said = [read_pair(task, pair, repeat, of_need) for repeat in range(repeats)]
        rows.append(row_of(task.known, pair, said))
    return rows


def row_of(known: Known, pair: Pair, said: list[PairVerdict]) -> Judged:
    """The first repeat's verdict counts; the others tell how far it can be repeated."""
    first = said[0]
    return Judged(
        pair=pair,
        category=known.questions[pair.question_id]["category"],
        votes=known.votes[pair],
        lengths=lengths(known, pair),
        verdict=first.verdict,
        flipped=None if first.orders is None else first.orders[0] != first.orders[1],
        orders=first.orders,
        repeats=tuple(one.verdict for one in said),
    )


def read_pair(task: Task, pair: Pair, repeat: int, of_need: dict[tuple, Result]) -> PairVerdict:
    """The verdict of one repeat: of both orders, or of the two answers' scores."""
    place = (pair.question_id, pair.turn)
    if task.bench.grading == PAIR:
        models = (pair.model_a, pair.model_b)
        found = [of_need[*models, *place, order, repeat] for order in ORDERS]
    else:
        found = [of_need[model, "", *place, "", repeat] for model in (pair.model_a, pair.model_b)]
    for result in found:
        if result.status != "ok":
            return PairVerdict(None, result.status)
    if task.bench.grading == PAIR:
        orders = tuple(outcome_of(order, one.winner) for order, one in zip(ORDERS, found))
        return PairVerdict(orders[0] if orders[0] == orders[1] else TIE, "ok", orders)
    score_a, score_b = (result.score for result in found)
    return PairVerdict(TIE if score_a == score_b else A if score_a > score_b else B, "ok")


def outcome_of(order: str, winner: str) -> str:
    """A verdict in terms of the pair, from one of what was shown: "A", "B" or "tie"."""
    shown = {"A": A, "B": B, "tie": TIE}[winner]
    return shown if order == RUN_IS_A else MIRRORED[shown]


def lengths(known: Known, pair: Pair) -> tuple[int, int]:
    """Characters of the two answers, in all turns that were judged."""
    length_a, length_b = (
        sum(map(len, known.answers[model][pair.question_id][: pair.turn]))
        for model in (pair.model_a, pair.model_b)
    )
    return length_a, length_b


def published_rows(task: Task, rows: list[Judged]) -> list[Judged]:
    """GPT-4's verdicts of 2023 on those of the pairs that have a verdict in `rows`."""
    known = task.known
    return [
        row._replace(
            verdict=known.published[row.pair],
            flipped=row.pair in known.inconsistent,
            orders=None,
            repeats=(),
        )
        for row in rows
        if row.verdict is not None and row.pair in known.published
    ]


# ---- validation.json -----------------------------------------------------------------------------


def make_report(task: Task, made: Plan, results: dict[str, Result], repeats: int) -> dict:
    """All that validation.json holds."""
    rows = judged_rows(task, made.items, results)
    known, who = task.known, made.who
    no_verdict = reasons(task, made.items, results)
    # Pairs not judged yet make the sample smaller; those that failed may be the hard ones.
    asked = len(rows) - no_verdict.get(NOT_JUDGED, 0)
    missing = (asked - sum(row.verdict is not None for row in rows)) / max(1, asked)
    served = {result.served_model for result in results.values() if result.served_model}
    report = {
        "judge": who.judge,
        "judge_params_b": made.judge.params_b,
        "judge_address": who.server or None,
        "judge_settings": json.dumps(who.settings),
        "judge_id": who.id,
        "served_models": sorted(served),
        "prompts": task.bench.label,
        "refs": task.bench.refs,
        "grading": task.bench.grading,
        "data": known.name,
        "data_sha256": known.sha256,
        "n_pairs": len(rows),
        "n_pairs_of": len(known.votes),
        "n_judged": sum(row.verdict is not None for row in rows),
        "n_votes": sum(len(row.votes) for row in rows),
        "n_repeated_votes": human_votes.repeated_votes({row.pair: row.votes for row in rows}),
        "n_questions": len({row.pair.question_id for row in rows}),
        "repeats": repeats,
        "no_verdict": no_verdict,
    }
    if known.name == LLMBAR:
        report |= validation_report.measure_accuracy(rows)
        report["as_humans"] = validation_report.NOT_MEASURED
        report["as_humans_because"] = "LLMBar's pairs have a label and no votes"
        report["warnings"] = validation_report.accuracy_warnings(report, missing)
        return report
    report |= validation_report.measure(rows, who.judge)
    if published := published_rows(task, rows):
        report["gpt4_2023"] = validation_report.measure(published, "gpt-4")
    verdict, because = validation_report.as_humans(report, missing)
    report |= {"as_humans": verdict, "as_humans_because": because}
    report["warnings"] = validation_report.find_warnings(report, missing)
    return report


def reasons(task: Task, made: list[Item], results: dict[str, Result]) -> dict[str, int]:
    """How many pairs have no verdict, by why the first of their judgements has none."""
    of_need = {need_of(item): results.get(item.request_sha256, Result()) for item in made}
    statuses = Counter(read_pair(task, pair, 0, of_need).status for pair in task.pairs)
    return {status: n for status, n in statuses.most_common() if status != "ok"}


def write_report(path: Path, report: dict) -> None:
    """Write validation.json, unless it is there already for more pairs of the same data: a small
    sample does not take the place of a larger one. Prints which.
    """
    try:
        earlier = disk.read_json(path)
    except UserError:
        earlier = {}
    n = earlier.get("n_judged")
    same = earlier.get("data_sha256") == report["data_sha256"]
    if same and isinstance(n, int) and n > report["n_judged"]:
        print(f"not written: {path} has verdicts on {n} pairs, this is a part of them")
        return
    disk.write_json(path, report)
    print(f"written: {path}")


def report_path(results_dir: Path, report: dict) -> Path:
    """Where a validation is kept: a folder for each judge as it was asked, its name and a hash."""
    name = re.split(r"[/:]", report["judge"].rstrip("/"))[-1]
    slug = re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.")[:LONGEST_SLUG]
    asked = disk.sha256_json([report[key] for key in ("judge_id", "data", "grading")])
    return results_dir / "judges" / f"{slug}-{asked[:8]}".lstrip("-") / "validation.json"


# ---- what is printed -----------------------------------------------------------------------------


def announce(task: Task, made: Plan) -> None:
    """Print who judges, on what, and how much of it is still to be asked."""
    known = task.known
    print(f"{summary.judge_line(made.who, made.judge, task.bench)}, grading {task.bench.grading}")
    votes = sum(len(known.votes[pair]) for pair in task.pairs)
    what = "labels" if known.name == LLMBAR else "human votes"
    part = "" if len(task.pairs) == len(known.votes) else f" of {len(known.votes)} (a sample)"
    print(f"{known.name}: {len(task.pairs)} pairs{part} with {votes} {what}")
    if n := human_votes.repeated_votes({pair: known.votes[pair] for pair in task.pairs}):
        print(f"{n} of the votes are a second one by the same person on the same pair; they count")
    done = len({item.request_sha256 for item in made.items}) - len(made.pending)
    print(
        f"{len(made.items)} judgements: {done} requests already made, {len(made.pending)} to make"
    )


def print_report(report: dict) -> None:
    """Print the table and what speaks against the judge."""
    print(f"\n{validation_report.table(report)}")
    if report["no_verdict"]:
        listed = ", ".join(f"{n} {status}" for status, n in report["no_verdict"].items())
        print(f"without a verdict: {listed}, of {report['n_pairs']} pairs")
    for warning in report["warnings"]:
        print(f"WARNING: {warning}")
