"""The data folders of the benchmarks: texts of questions, answers of the official baselines.

    data/mt_bench/question.jsonl
    data/<bench>/questions.json or question.jsonl
                 baseline/*.jsonl          answers that runs are compared with, in the form of a
                                           run's answers.jsonl

prep_data.py writes them. Everything here may be missing: the report then lacks texts, and what
rests on them is not checked. Length control needs df_gamed.csv (length_control.py).
"""

from dataclasses import dataclass, field
from pathlib import Path

from pref.analysis.runs import MT_BENCH
from pref.files import benchmarks, mt_bench

QUESTION_FILES = ("question.jsonl", "questions.json", "questions.jsonl", "test_questions.jsonl")


@dataclass(frozen=True)
class BenchData:
    """What is known of a benchmark besides the runs' answers; everything may be empty."""

    folder: Path | None = None  # None: there is none
    questions: dict[int, list[str]] = field(default_factory=dict)  # question -> its turns
    baselines: dict[str, dict] = field(default_factory=dict)  # name -> AnswerKey -> answer row


AllData = dict[str, BenchData]  # by the benchmark's name


def read_data(benches: list[str], folders: dict[str, Path], data: Path) -> AllData:
    """The data folders of `benches`.

    folders: of benchmarks whose folder was named; others are in `data`. Raises UserError for files
    that are there and cannot be read.
    """
    return {bench: read_bench(folders.get(bench, data / bench)) for bench in benches}


def read_bench(folder: Path) -> BenchData:
    if not folder.is_dir():
        return BenchData()
    paths = [folder / name for name in QUESTION_FILES if (folder / name).is_file()]
    rows = mt_bench.read_questions(paths[0], mt_bench=False) if paths else []
    return BenchData(
        folder=folder,
        questions={row["question_id"]: row["turns"] for row in rows},
        baselines=benchmarks.read_baselines(folder, turns=None),
    )


def of(data: AllData | None, bench: str = MT_BENCH) -> BenchData:
    """The data of a benchmark; empty if nothing is known."""
    return (data or {}).get(bench) or BenchData()
