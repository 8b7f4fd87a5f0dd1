"""What is asked: the questions of a benchmark, or of a file, each with its temperature.

A benchmark's folder, data/<bench>/, says in its manifest where its questions are and how they are
answered unless the user says otherwise (benchmarks.py).
"""

from pathlib import Path

from pref.answering.work import Bench
from pref.files import benchmarks, mt_bench, run_folders
from pref.files.benchmarks import BenchFolder
from pref.files.console import UserError

MT_BENCH_FOLDER = benchmarks.DATA / benchmarks.MT_BENCH  # where prep_data.py --mt_bench puts it
MT_BENCH_TOKENS = 1024
# By category: temperature_config in FastChat's llm_judge/common.py.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}


def load_bench(
    bench: str = benchmarks.MT_BENCH,
    folder: Path | None = None,
    file: Path | None = None,
    temperature: float | None = None,
    count: int | None = None,
) -> Bench:
    """The questions, each with its temperature.

    bench, folder: a benchmark and its data folder, if that is not data/<bench>. file: questions in
    a file instead, which may be a benchmark's own. temperature: of all questions; None: as the
    benchmark has it. count: this many, spread over the file. Raises UserError for a folder or a
    question that cannot be used, with file and line, and for a question without temperature.
    """
    found = benchmarks.folder_of_questions(file) if file else open_bench(bench, folder)
    if found is None:  # a file of the user's own
        name, path = run_folders.check_run_id(file.stem, f"--questions {file}"), file
        questions, usual = mt_bench.read_questions(file, mt_bench=False), {}
    else:
        name, path = found.name, found.questions_file
        questions, usual = benchmarks.read_questions(found), found.generation
    if temperature is None:
        temperature = usual.get("temperature")
    for question in questions:
        question["temperature"] = temperature_of(question, temperature, path)
    return Bench(
        name,
        mt_bench.pick_questions(questions, count),
        max_new_tokens=usual.get("max_new_tokens", MT_BENCH_TOKENS),
        folder=found.folder if found else None,
        free=bool(usual),
    )


def open_bench(name: str, folder: Path | None) -> BenchFolder:
    """The benchmark's data folder. Raises UserError if it is none that runs answer."""
    name = benchmarks.name_of(name)
    if name in benchmarks.HAVE_ANSWERS:
        raise UserError(
            f"--bench {name}: its answers are given, no run answers it; a judge is measured on it: "
            "python judge.py results/ --validate --judge MODEL"
        )
    return benchmarks.open_folder(name, folder)


def temperature_of(question: dict, given: float | None, path: Path) -> float:
    """`given`, else MT-Bench's of the question's category. Raises UserError if there is none."""
    if given is None:
        given = TEMPERATURES.get(question.get("category"))
    if given is None:
        raise UserError(
            f"{path}: question {question['question_id']} has category "
            f"{question.get('category')!r}, for which MT-Bench defines no temperature; "
            "give --temperature"
        )
    return given
