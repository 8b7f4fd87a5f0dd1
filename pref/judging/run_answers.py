"""The answers that are judged: read per run, and checked before anything is paid for.

Answers of one run are a dict by (question_id, choice), as `mt_bench.read_answers` returns them.
"""

import functools
import sys
from pathlib import Path
from typing import NamedTuple

from pref.files import benchmarks, console, mt_bench, run_folders
from pref.files.benchmarks import MT_BENCH
from pref.files.console import UserError
from pref.judging.benchmark import PAIR, PROGRAM, Bench

MOST_EMPTY = 0.1  # share of a run's answers that may have an empty or failed turn
FAILED = "$ERROR$"  # what FastChat writes in place of an answer that could not be made


def read_runs(paths: list[Path], bench: Bench, allow_incomplete: bool) -> dict[Path, dict]:
    """Answers by run folder, of every run under `paths` that has some.

    Raises UserError for answers that cannot be judged, and for runs of several results folders.
    """
    runs = {}
    for run in run_folders.find_runs(paths):
        if not (run / bench.name / "answers.jsonl").is_file():
            remedy = f"run {answer_command(run, bench.name)}"
            print(f"no answers for run {run.resolve().name}; {remedy}", file=sys.stderr)
            continue
        runs[run] = read_checked(run, bench)
    if not runs:
        raise UserError(
            f"none of the runs has answers ({bench.name}/answers.jsonl); run "
            f"{answer_command(None, bench.name)} first"
        )
    if not allow_incomplete:
        turns, empty_counts = len(bench.turns), bench.grading != PROGRAM
        check_complete(runs, bench.name, turns, empty_counts)
    if len(parents := {run.resolve().parent for run in runs}) > 1:
        raise UserError(
            f"runs of {len(parents)} results folders ({', '.join(map(str, sorted(parents)))}): "
            "each has its own judgements.sqlite; judge one folder at a time"
        )
    return runs


def answer_command(run: Path | None, bench: str) -> str:
    """The command that answers a benchmark's questions."""
    more = "" if bench == MT_BENCH else f" --bench {bench}"
    if run is None:
        return f"gen_mtbench.py{more}"
    if run.resolve().name == run_folders.BASE_RUN:  # the untrained model, beside the others
        return f"python gen_mtbench.py {run_folders.folder_of(run)} --base{more}"
    return f"python gen_mtbench.py {run}{more}"


def read_checked(run: Path, bench: Bench) -> dict:
    """The answers of one run. Raises UserError for answers that cannot be judged."""
    path = run / bench.name / "answers.jsonl"
    answers = mt_bench.read_answers(path, turns=len(bench.turns))
    check_answers(path, answers, bench)
    check_questions(path, answers, bench)
    check_adapter(run, answers, bench.name)
    return answers


def check_answers(path: Path, answers: dict, bench: Bench) -> None:
    """Raise UserError for answers to unknown questions, invalid text, or a missing choice."""
    known = {question["question_id"] for question in bench.questions}
    choices: dict[int, set[int]] = {}
    for (question_id, choice), row in answers.items():
        if question_id not in known:
            raise UserError(
                f"{path}: question_id {question_id} is not in {bench.question_file}; "
                f"give {option_of(bench)} the folder whose questions were answered"
            )
        choices.setdefault(question_id, set()).add(choice)
        try:
            "".join(row["turns"]).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{path}: the answer to question {question_id} is not valid Unicode"
            ) from None
    if not choices:
        raise UserError(f"{path}: no answers; delete the file and rerun gen_mtbench.py")
    every_choice = set.union(*choices.values())
    for question_id, given in choices.items():
        if given != every_choice:
            raise UserError(
                f"{path}: question {question_id} has choices {sorted(given)}, others have "
                f"{sorted(every_choice)}; rerun gen_mtbench.py to complete them"
            )


def check_questions(path: Path, answers: dict, bench: Bench) -> None:
    """Raise UserError for answers to questions that were edited since: the judge would see an
    answer below a question that the model has never read.

    Answers that keep no hash of their question (FastChat's) cannot be checked.
    """
    turns_of = {question["question_id"]: question["turns"] for question in bench.questions}
    changed = {
        question_id
        for (question_id, _), row in answers.items()
        if not mt_bench.is_answer_to(row, turns_of[question_id])
    }
    if changed:
        number = "" if len(changed) == 1 else f" (and {len(changed) - 1} others)"
        raise UserError(
            f"{path}: question {min(changed)}{number} is not the one that was answered: "
            f"{bench.question_file} has another text now, or the answer's temperature was edited; "
            f"restore the file that was answered ({option_of(bench)}), or delete the answers and "
            f"run {answer_command(path.parent.parent, bench.name)}"
        )


def check_adapter(run: Path, answers: dict, bench: str = MT_BENCH) -> None:
    """Raise UserError for answers of weights that the run no longer has."""
    answered_by = {row["adapter_sha256"] for row in answers.values() if row.get("adapter_sha256")}
    if not answered_by:
        return
    now = run_folders.weights_sha256(run)
    if now is not None and answered_by != {now}:
        raise UserError(
            f"run {run.resolve().name}: its answers are from an older "
            f"{run_folders.weights_name(run)}; answer again with {answer_command(run, bench)}"
        )


def option_of(bench: Bench) -> str:
    return "--mt_bench" if bench.name == MT_BENCH else "--bench_data"


def check_complete(
    runs: dict[Path, dict], bench: str = MT_BENCH, turns: int = 2, empty_counts: bool = True
) -> None:
    """Raise UserError for a run that lacks answers another run has, or has many empty ones.

    Mean scores over different questions are not comparable. A run with many empty answers is more
    likely broken than bad, and judging it wastes money. empty_counts: False for a task's function,
    which costs nothing: that answers are empty is part of what it measures.
    """
    all_keys = set().union(*runs.values())
    for run, answers in runs.items():
        name = run.resolve().name
        if missing := sorted(all_keys - answers.keys()):
            first_question, _ = missing[0]
            raise UserError(
                f"run {name}: {len(missing)} of {len(all_keys)} answers are missing that other "
                f"runs have (question {first_question} first); run {answer_command(None, bench)} "
                "again, or judge what is there with --allow_incomplete"
            )
        empty = [
            question_id
            for (question_id, _), row in answers.items()
            if has_failed(row["turns"], turns)
            or (empty_counts and not all(turn.strip() for turn in row["turns"]))
        ]
        if len(empty) > MOST_EMPTY * len(answers):
            raise UserError(
                f"run {name}: {len(empty)} of {len(answers)} answers have an empty turn (question "
                f"{empty[0]} first; {FAILED} counts as empty); look at them, or judge what is "
                "there with --allow_incomplete"
            )


def has_failed(answer: list[str], turn: int) -> bool:
    """Whether what is judged at `turn` (the turns up to it) holds a failed one."""
    return any(text.strip() == FAILED for text in answer[:turn])


# ---- baselines -----------------------------------------------------------------------------------


class Baselines(NamedTuple):
    """Whom the runs are compared with."""

    names: dict[int, str]  # by question_id: a run, or an outside model; {}: no comparison
    # By name: theirs, and those of the outside models, with which the runs may have been compared
    # before.
    answers: dict[str, dict]

    def answers_to(self, question_id: int) -> dict:
        """The answers of the baseline of this question; {} if it has none."""
        return self.answers.get(self.names.get(question_id, ""), {})


def read_baselines(runs: dict[Path, dict], bench: Bench, name: str | None) -> Baselines:
    """The baselines of the benchmark, or `name` (--baseline) in their place for every question.

    A name is that of a run, from `runs` or in a folder next to theirs, or of an outside model whose
    answers are in the benchmark's folder baseline/. Raises UserError if one has no answers, or some
    that cannot be judged.
    """
    names = dict(bench.baselines)
    if name is not None:
        names = {question["question_id"]: name for question in bench.questions}
    check = functools.partial(check_answers, bench=bench)
    with console.remedy(f"the answers of other models: {benchmarks.how_to_make(bench.name)}"):
        outside = benchmarks.read_baselines(bench.folder, len(bench.turns), check)
    answers = {
        one: read_baseline(runs, one, bench, outside) for one in dict.fromkeys(names.values())
    }
    compared = 0
    for one, given in answers.items():
        asked = {question_id for question_id, baseline in names.items() if baseline == one}
        needed = {key for key in set().union(*runs.values()) if key[0] in asked}
        compared += len(needed & given.keys())
        if missing := sorted(needed - given.keys()):
            print(
                f"--baseline {one}: lacks {len(missing)} answers that other runs have (question "
                f"{missing[0][0]} first); these are not compared",
                file=sys.stderr,
            )
    if bench.grading == PAIR and not compared:
        raise UserError(
            f"nothing can be compared: the baseline ({', '.join(answers)}) has no answer to a "
            "question that the runs have answered; give the --baseline and --bench_data that "
            "belong to these runs"
        )
    return Baselines(names, outside | answers)


def read_baseline(
    runs: dict[Path, dict], name: str, bench: Bench, outside: dict[str, dict]
) -> dict:
    """Answers of the run `name`, from `runs` or from its folder next to theirs, or of the `outside`
    model. Raises UserError if it has none, or some that cannot be judged.
    """
    answers_of = outside | {run.resolve().name: answers for run, answers in runs.items()}
    if name in answers_of:
        return answers_of[name]
    if name in bench.baselines.values():
        raise UserError(
            f"{bench.folder / 'baseline'}: no answers of {name}, the baseline of {bench.title}; "
            f"{benchmarks.how_to_make(bench.name)}, or compare with a run: --baseline RUN"
        )
    results = next(iter(runs)).resolve().parent
    path = results / run_folders.check_run_id(name) / bench.name / "answers.jsonl"
    if path.is_file():
        return read_checked(path.parent.parent, bench)
    answered = ", ".join(sorted(answers_of))
    raise UserError(f"--baseline {name}: no answers at {path}; runs with answers: {answered}")
