"""Questions that no judge prompt belongs to: a task's, or any file of the user's own.

Score judges (py:FILE, rm:PATH) see question and answer alone, so that they can score the answers to
any questions. The questions are those that gen_mtbench.py has answered: `--bench NAME` with a
data folder, data/NAME, or `--bench FILE`.
"""

import argparse
from pathlib import Path

from pref.files import benchmarks, mt_bench, run_folders
from pref.files.benchmarks import BenchFolder
from pref.files.console import UserError
from pref.judging.benchmark import REWARD, Bench, Benchmark


def is_file(text: str) -> bool:
    """Whether --bench names a file rather than a benchmark."""
    return "/" in text or text.endswith((".jsonl", ".json"))


def resolve(args: argparse.Namespace) -> None:
    """Turn --bench FILE into a name and the file's folder: `bench`, `bench_data`, `bench_file`."""
    args.bench_file = None
    if not is_file(args.bench):
        return
    path = Path(args.bench).expanduser()
    if args.bench_data is not None:
        raise UserError(f"--bench {path} names a file of questions: leave --bench_data out")
    if not path.is_file():
        raise UserError(f"--bench {path}: no such file of questions")
    found = benchmarks.folder_of_questions(path)
    if found is None and path.stem in benchmarks.PREPARED_BY:
        raise UserError(
            f"--bench {path}: {path.stem} is a benchmark's name, and this file is not in its data "
            "folder; rename the file"
        )
    args.bench = found.name if found else run_folders.check_run_id(path.stem, path)
    args.bench_data, args.bench_file = path.parent, path


def read(args: argparse.Namespace) -> Bench:
    """The questions, checked. Raises UserError for those that cannot be judged."""
    folder = find_folder(args)
    if folder is None:
        questions = mt_bench.read_questions(args.bench_file, mt_bench=False)
        file = args.bench_file
    else:
        questions, file = benchmarks.read_questions(folder), folder.questions_file
    turns = {len(question["turns"]) for question in questions}
    if len(turns) > 1:
        raise UserError(f"{file}: questions of {min(turns)} and of {max(turns)} turns; split it")
    return Bench(
        benchmark=make_benchmark(args.bench, file, turns.pop()),
        folder=file.parent,
        questions=questions,
        grading=REWARD,
        prompts={},
        label=args.bench,
        parameters={},
    )


def find_folder(args: argparse.Namespace) -> BenchFolder | None:
    """The data folder; None for a file that is of no data folder."""
    if args.bench_file is not None:
        return benchmarks.folder_of_questions(args.bench_file)
    return benchmarks.open_folder(args.bench, args.bench_data)


def make_benchmark(name: str, file: Path, turns: int) -> Benchmark:
    def refuse(*_: object) -> None:
        raise UserError(f"--bench {name}: has no judge prompts; give --judge py:FILE or rm:PATH")

    return Benchmark(
        name=name,
        title=name,
        read=refuse,
        asks=refuse,
        read_reply=refuse,
        turns=turns,
        question_file=file.name,
    )
