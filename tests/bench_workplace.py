"""What tests of several benchmarks share: for each a small data folder, and two runs' answers."""

from pathlib import Path

import bench_files
from doubles import completion
from judge_workplace import write_lines

import judge
import prep_data
from pref.files import mt_bench
from pref.files.judgements import read_judgements

RUNS = ("dpo", "simpo")
# Options of prep_data.py, and the baselines whose answers there are.
PREPARED = {
    "alpaca_eval": (["--alpaca_eval"], ()),
    "arena_hard_v0.1": (["--arena_hard", "v0.1"], ("gpt-4-0314",)),
    "arena_hard_v2.0": (["--arena_hard", "v2.0"], ("o3-mini-2025-01-31",)),
}


def make_data(folder: Path, name: str) -> Path:
    """The benchmark's data folder, as prep_data.py makes it of a few questions."""
    out = folder / "data" / name
    options, models = PREPARED[name]
    if name == "alpaca_eval":
        source = bench_files.alpaca_eval(folder / "source")
    else:
        source = bench_files.arena_hard(folder / "source", options[1], *models)
    words = [*options, str(source), "--out", str(out), "--allow_modified"]
    assert not prep_data.main(words)
    return out


def answer_rows(answers: dict[int, str], model: str) -> list[dict]:
    return [
        {"question_id": q, "model_id": model, "choices": [{"index": 0, "turns": [text]}]}
        for q, text in answers.items()
    ]


def make_answers(folder: Path, name: str, questions: Path) -> None:
    """Answers of two runs to the questions in a file, all of them different."""
    for run in RUNS:
        answers = {
            question["question_id"]: f"{run} says {question['question_id']}."
            for question in mt_bench.read_questions(questions, mt_bench=False)
        }
        path = folder / "results" / run
        write_lines(path / name / "answers.jsonl", answer_rows(answers, run))
        (path / "args.json").write_text("{}")


def verdict(name: str) -> tuple[int, dict]:
    """A reply that has a verdict: AlpacaEval's letter with its log-probability, or a label."""
    status, reply = completion("m" if name == "alpaca_eval" else "So: [[A>>B]]")
    alternatives = [{"token": "m", "logprob": -0.25}, {"token": "M", "logprob": -1.5}]
    reply["choices"][0]["logprobs"] = {"content": [{"top_logprobs": alternatives}]}
    return status, reply


def run_bench(folder: Path, name: str, server, *more: str) -> int:
    """Run judge.py, one call at a time, and return its exit code."""
    where = ["--bench", name, "--bench_data", str(folder / "data" / name)]
    given = ["--judge", "big-70b", "--base_url", server.url, "--concurrency", "1"]
    return judge.main([str(folder / "results"), *where, *given, *more])


def rows_of(folder: Path, name: str) -> list[dict]:
    return [
        row
        for run in RUNS
        for row in read_judgements(folder / "results" / run / name / "judgements.csv")
    ]
