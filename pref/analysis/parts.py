"""A part: one measure by one judge, against one baseline, as far as the runs have it.

`Part` is what part_sources.py makes of the runs' files and analyze.py compares. The functions here
are what all sources share: grouping rows by who judged and what was compared, counting judgements,
lengths of answers.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

from pref.analysis import bench_data, cell_rows, judge_identity, stats
from pref.analysis.bench_data import AllData, BenchData
from pref.analysis.cell_rows import CommonQuestions
from pref.analysis.runs import MT_BENCH, BenchFiles, JudgeKey, Run, Values
from pref.files.alpaca_eval import GamedFile

BENCH_SIZES = {"mt_bench": 80, "alpaca_eval": 805, "arena_hard_v0.1": 500, "arena_hard_v2.0": 750}
CATEGORY_SIZES = {"hard_prompt": 500, "creative_writing": 250}  # of Arena-Hard v2.0
BENCH_TITLES = {
    "mt_bench": "MT-Bench",
    "alpaca_eval": "AlpacaEval 2",
    "arena_hard_v0.1": "Arena-Hard v0.1",
    "arena_hard_v2.0": "Arena-Hard v2.0",
}


class Sources(NamedTuple):
    """What parts are made from, besides the runs."""

    data: AllData  # by benchmark
    gamed: GamedFile | None = None  # df_gamed.csv; None: not there

    def of(self, bench: str) -> BenchData:
        return bench_data.of(self.data, bench)


@dataclass(frozen=True)
class Part:
    facts: dict  # who judged, what was compared; keys of aggregated_metrics.json
    numbers: dict[str, dict]  # run id -> field -> number of the whole run
    values: Values
    judged: dict[str, list[dict]] = field(default_factory=dict)  # run id -> all judgements
    questions: CommonQuestions | None = None  # those that are compared; None: nothing is asked
    notes: list[str] = field(default_factory=list)
    without_gamed: Values = field(default_factory=dict)  # of a length-controlled win rate
    extra: dict = field(default_factory=dict)  # further keys of aggregated_metrics.json


class Source(NamedTuple):
    """Who judged, and what was compared: rows of different sources are never averaged."""

    bench: str
    judge: JudgeKey
    grading: str
    baseline: str | None = None
    category: str | None = None  # where each category is a score of its own


def bench_title(bench: str) -> str:
    return BENCH_TITLES.get(bench, bench)


def source_name(facts: dict) -> str:
    """What a note on a part's judgements begins with; of MT-Bench, the judge's title."""
    if "bench" not in facts:
        return str(facts.get("title"))
    category = f", {facts['category']}" if facts["category"] else ""
    return f"{bench_title(facts['bench'])}{category}, {facts['title']}"


def judged_by(facts: dict) -> str | None:
    """What a claim's verdict is beside: the judge's title and, where one measure is of several
    benchmarks or categories, which. No two parts of a measure share it. None: nobody judged.
    """
    title = facts.get("title")
    if not title or "bench" not in facts:
        return title
    if facts["bench"] == "alpaca_eval" and facts["grading"] == "pair":
        return title  # its measures are of this benchmark alone
    category = f", {facts['category']}" if facts["category"] else ""
    return f"{title}, on {bench_title(facts['bench'])}{category}"


def describe_source(source: Source, rows: list[dict]) -> dict:
    """The facts of a part: those of its judge, the benchmark and the baseline."""
    facts = judge_identity.describe_judge(source.judge, rows)
    title = facts["title"].replace(", refs original", "")  # these benchmarks have no references
    if source.baseline:
        title += f", baseline {source.baseline}"
    place = {"bench": source.bench, "baseline": source.baseline, "category": source.category}
    return facts | place | {"grading": source.grading, "title": title}


def group_rows(runs: list[Run], bench: str, rows_of, key_of) -> dict[Source, dict[str, list[dict]]]:
    """source -> run id -> rows. rows_of: (BenchFiles) -> rows; key_of: (row) -> Source or None."""
    groups: dict[Source, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for row in rows_of(run.bench(bench)):
            if (source := key_of(row)) is not None:
                groups[source][run.run_id].append(row)
    return {source: dict(groups[source]) for source in sorted(groups, key=str)}


def comparisons(files: BenchFiles) -> list[dict]:
    """Rows that compare an answer with a baseline's."""
    return [*files.pairs, *(row for row in files.rewards if row["baseline"])]


class Common(NamedTuple):
    """The judgements on the questions that all runs were judged on."""

    rows: dict[str, list[dict]]
    questions: CommonQuestions


def keep_common(judged: dict[str, list[dict]]) -> Common:
    questions = cell_rows.common_questions(judged)
    rows = {
        run_id: [row for row in rows if row["question_id"] in questions.common]
        for run_id, rows in judged.items()
    }
    return Common(rows, questions)


def bench_size(
    bench: str, category: str | None, questions: CommonQuestions, data: BenchData
) -> int:
    """Number of questions of a benchmark; of an unknown one, as far as anybody knows them."""
    known = CATEGORY_SIZES.get(category) if category else BENCH_SIZES.get(bench)
    seen = len(questions.common) + len(questions.left_out)
    return known or max(len(data.questions), seen)


def count_rows(rows: list[dict], scored: Iterable, size: int) -> dict:
    """n_scored and n_judged questions, the size of the benchmark, and failures by reason.

    scored: the questions that have a number.
    """
    failures = Counter(str(row["status"]) for row in rows if row["status"] != "ok")
    return {
        "n_scored": len(set(scored)),
        "n_judged": len({row["question_id"] for row in rows}),
        "n_bench": size,
        "failures": dict(sorted(failures.items())),
    }


def judge_usd(judged: dict[str, list[dict]]) -> float | None:
    """Dollars that the judgements cost; None where no price is recorded."""
    costs = [row.get("cost_usd") for rows in judged.values() for row in rows]
    costs = [cost for cost in costs if cost is not None]
    return math.fsum(costs) if costs else None


# ---- answers ------------------------------------------------------------------------------------


class Lengths(NamedTuple):
    """Characters of two answers that were compared; None where they are not known."""

    run: float | None
    baseline: float | None


def answer_lengths(rows: list[dict], answers: dict, baseline_answers: dict) -> dict[int, Lengths]:
    """question -> characters of the run's answer and the baseline's, mean over choices, of the
    column `shape`, else of the answers themselves.
    """
    found: dict[int, list[Lengths]] = defaultdict(list)
    for row in rows:
        shape = json.loads(row["shape"]) if row.get("shape") else {}
        key = (row["question_id"], row["choice"] or 0)
        found[row["question_id"]].append(
            Lengths(
                side_length(shape.get("run"), answers.get(key), row["turn"]),
                side_length(
                    shape.get("baseline"),
                    baseline_answers.get(key) or baseline_answers.get((row["question_id"], 0)),
                    row["turn"],
                ),
            )
        )
    return {
        question: Lengths(*(mean_or_none(side) for side in zip(*lengths)))
        for question, lengths in found.items()
    }


def side_length(shape: dict | None, answer: dict | None, turn: int) -> float | None:
    if shape:
        return shape["chars"]
    turns = answer["turns"] if answer else []
    return len(turns[turn - 1]) if len(turns) >= turn else None


def mean_or_none(numbers: Iterable[float | None]) -> float | None:
    numbers = list(numbers)
    return None if None in numbers else fmean(numbers)


def mean_length(lengths: dict[int, Lengths]) -> float | None:
    """Mean length of a run's answers, in characters."""
    return stats.mean(one.run for one in lengths.values() if one.run is not None)


def baseline_answers(source: Source, runs: list[Run], sources: Sources) -> dict:
    """The baseline's answers: of a run of the study, or of the data folder; {} if not known."""
    for run in runs:
        if run.run_id == source.baseline:
            return run.bench(source.bench).answers
    return sources.of(source.bench).baselines.get(source.baseline, {})


def other_benches(runs: list[Run]) -> list[str]:
    """The benchmarks besides MT-Bench."""
    return sorted({name for run in runs for name in run.benches} - {MT_BENCH})
