"""The data folder of a study's task: made if it is missing, else compared with the task."""

import shlex
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import prep_data
from pref.files import disk, task_data, tasks
from pref.files.console import UserError
from pref.sweeping import commands, grid
from pref.sweeping.grid import Study

POLL_S = 0.5


def folder(study: Study) -> Path:
    return commands.bench_folder(study, study.task)


def manifest_of(study: Study) -> dict:
    """The folder's manifest, which is written last; {} if it is missing."""
    path = folder(study) / "manifest.json"
    return disk.read_json(path) if path.is_file() else {}


def is_missing(study: Study) -> bool:
    """Whether the study has a task whose questions are still to be written."""
    return bool(study.task) and not manifest_of(study)


def train_questions(study: Study) -> Path:
    """The file of the task's train questions, which may still be to be written."""
    return folder(study) / manifest_of(study).get("train_questions", task_data.FILES[tasks.TRAIN])


def hashes(study: Study) -> dict[str, str]:
    """SHA-256 of the task's file and of the files beside it that its scores depend on, by name, as
    they were when the questions were written.
    """
    return manifest_of(study).get("task", {}).get("identity", {}).get("sha256", {})


def prepare_command(study: Study) -> list[str]:
    """The command that writes the task's questions."""
    return commands.stage_process(study, "prep", prepare_arguments(study))


def prepare_arguments(study: Study) -> list[str]:
    given = ["--task", study.settings["TASK"], "--out", str(folder(study))]
    return given + shlex.split(study.settings["TASK_ARGS"])


def prepare(study: Study) -> None:
    """Write the task's questions if they are missing. Raises UserError if that fails, or if the
    folder holds questions of another version of the task, or others than TASK_ARGS ask for.
    """
    if not study.task:
        return
    task = Path(study.settings["TASK"])
    if not task.is_file():
        raise UserError(f"TASK={task}: no such file; give the path of a task's Python file")
    with ExitStack() as stack:
        while is_missing(study):
            try:  # other tasks of an array wait
                activity = "the task's questions are written"
                stack.enter_context(disk.locked(study.results, ".task.lock", activity))
            except UserError:
                time.sleep(POLL_S)
                continue
            write(study)
            return
    check_version(study)
    check_numbers(study)


def write(study: Study) -> None:
    """Raises UserError if the task does not pass its checks."""
    command = prepare_command(study)
    print(f"+ {grid.display(command)}", flush=True)
    if code := subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
        raise UserError(f"TASK={study.settings['TASK']}: no questions (exit code {code})")


def check_version(study: Study) -> None:
    """Raise UserError if the task has changed since its questions were written."""
    beside, before = Path(study.settings["TASK"]).parent, hashes(study)
    for name, sha256 in before.items():
        if not (beside / name).is_file() or disk.sha256_file(beside / name) != sha256:
            raise UserError(
                f"{folder(study)}: these questions were written before {beside / name} was "
                "changed; remove the folder to have them written again, or give another BENCH_DATA"
            )
    if Path(study.settings["TASK"]).name not in before:
        raise UserError(f"{folder(study)}: holds other data; give another BENCH_DATA")


def check_numbers(study: Study) -> None:
    """Raise UserError if TASK_ARGS ask for other questions than those in the folder."""
    if not study.settings["TASK_ARGS"]:
        return
    args = prep_data.parse_args(prepare_arguments(study))
    asked = {"train": args.num_train, "test": args.num_test}
    written, seed = manifest_of(study)["task"]["numbers"], manifest_of(study)["task"]["seed"]
    for split, number in asked.items():
        if args.seed != seed or number not in (None, written[split]):
            raise UserError(
                f"{folder(study)}: has {written['train']} train and {written['test']} test "
                f"questions of seed {seed}, TASK_ARGS={study.settings['TASK_ARGS']!r} asks for "
                "others; remove the folder to have them written again, or give another BENCH_DATA"
            )
