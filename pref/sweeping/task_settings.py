"""The settings of a study with a task: its benchmark, its judge, and where rounds keep their pairs.

A task is a file that asks questions and scores answers. With ROUNDS the pairs are made of the
models' own answers to its train questions:

    RESULTS/base/<task>_train/pairs         round 1 of every point
    RESULTS/<run>/<task>_train/pairs        the round after <run>
"""

import re
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path

from pref.files import answer_pairs, benchmarks, run_folders
from pref.files.console import UserError

DEFAULTS = {
    "TASK": "",
    "TASK_ARGS": "",
    "ROUNDS": "",
    "REFERENCE": "start",
    "ROUND_GEN_ARGS": "--num_choices 4 --temperature 1",
    "PAIRS_ARGS": "",
}
REFERENCES = ("start", "base")
# Arguments of train_pref.py that follow from the settings of a study with rounds.
OF_ROUNDS = {
    "--init_adapter": "with ROUNDS round 1 starts from the base model, and later rounds from the "
    "one before; leave it out",
    "--data": "with ROUNDS the pairs are made of the models' own answers; leave it out",
    "--run_id": "with ROUNDS runs are named by what was varied and by their round; leave it out",
    "--reference": "with ROUNDS the setting REFERENCE says it; set REFERENCE",
    "--round": "with ROUNDS each run's round is known; leave it out",
    "--model": "with ROUNDS the model that answers is the one that is trained; set MODEL",
    "--results_dir": "with ROUNDS the runs are in RESULTS; set RESULTS",
}
OF_THE_JUDGE = ("JUDGE", "BASE_URL", "JUDGE_ARGS")


def name_of(settings: Mapping[str, str]) -> str:
    """The task's name, which is the stem of its file; "" without a task."""
    return Path(settings.get("TASK", "")).stem


def rounds_of(settings: Mapping[str, str]) -> int:
    """0: the pairs are those in DATA."""
    return int(settings["ROUNDS"] or 0)


def train_set(settings: Mapping[str, str]) -> str:
    """What the answers to the task's train questions are called."""
    return name_of(settings) + benchmarks.TRAIN_SET


def pairs_folder(settings: Mapping[str, str], run_id: str) -> Path:
    """Where the pairs made of a run's answers are."""
    return Path(settings["RESULTS"]) / run_id / train_set(settings) / answer_pairs.FOLDER


def complete(settings: dict[str, str], chosen: Collection[str]) -> dict[str, str]:
    """`settings` with what follows from TASK and ROUNDS.

    chosen: the names that the grid file or the environment gives. Raises UserError for settings
    that do not fit together.
    """
    check_rounds(settings)
    if not settings["TASK"]:
        for name in ("ROUNDS", "TASK_ARGS", "ROUND_GEN_ARGS", "PAIRS_ARGS"):
            if name in chosen:
                raise UserError(f"{name}: is for a study with a task; set TASK to a task's file")
        return settings

    # 1) The task is the benchmark, unless others are named, and scores its own answers. So JUDGE
    #    and its like are for the other benchmarks.
    task = name_of(settings)
    check_name(settings["TASK"], task)
    benches = settings["BENCHES"] if "BENCHES" in chosen else task
    if benches.split() == [task]:
        for name in OF_THE_JUDGE:
            if name in chosen:
                raise UserError(
                    f"{name}: no other benchmark than the task is judged, which scores its answers "
                    f"itself; leave it out, or set {name}_{task}"
                )
    own = {f"{name}_{task}": "" for name in OF_THE_JUDGE}
    own[f"JUDGE_{task}"] = f"py:{settings['TASK']}"
    settings = own | settings | {"BENCHES": benches}

    # 2) With rounds, DATA is where the first one's pairs are.
    if not rounds_of(settings):
        return settings
    check_train_args(settings)
    if "DATA" in chosen:
        raise UserError(
            "DATA: with ROUNDS the pairs are made of the models' own answers; leave one of them out"
        )
    base_pairs = pairs_folder(settings, run_folders.BASE_RUN)
    return settings | {"DATA": str(base_pairs)}


def check_train_args(settings: Mapping[str, str]) -> None:
    """Raise UserError for an argument in TRAIN_ARGS that is the rounds' own: it would be passed
    over, or train on other pairs than the models' own answers.
    """
    for name, value in settings.items():
        if not name.startswith("TRAIN_ARGS"):
            continue
        flags = {word.partition("=")[0] for word in shlex.split(value)}
        for flag, remedy in OF_ROUNDS.items():
            if flag in flags:
                raise UserError(f"{name}: {flag}: {remedy}")


def check_rounds(settings: Mapping[str, str]) -> None:
    """Raise UserError for values that ROUNDS or REFERENCE cannot have."""
    if not re.fullmatch(r"\d{0,3}", settings["ROUNDS"]):
        raise UserError(
            f"ROUNDS={settings['ROUNDS']}: must be a number of rounds, or 0 (the pairs in DATA)"
        )
    if rounds_of(settings) and settings["REFERENCE"] not in REFERENCES:
        raise UserError(
            f"REFERENCE={settings['REFERENCE']}: must be start (where the round starts) or base"
        )


def check_name(file: str, name: str) -> None:
    """Raise UserError for a task's file whose name cannot be that of its benchmark."""
    if not file.endswith(".py"):
        raise UserError(f"TASK={file}: must be a Python file; its name names the task's benchmark")
    benchmarks.check_task_name(name, f"TASK={file}")
