"""The data folder of a study's task: made where it is missing, compared with the task where not."""

import shlex
import subprocess
from pathlib import Path

from pref.files import disk
from pref.files.console import UserError
from pref.sweeping import commands, grid
from pref.sweeping.grid import Study

TRAIN_QUESTIONS = "train_questions.jsonl"  # where the manifest does not name the file


def folder(study: Study) -> Path:
    return commands.bench_folder(study, study.task)


def train_questions(study: Study) -> Path:
    """The file of the task's train questions."""
    path = folder(study) / "manifest.json"
    manifest = disk.read_json(path) if path.is_file() else {}
    return folder(study) / manifest.get("train_questions", TRAIN_QUESTIONS)


def prepare_command(study: Study) -> list[str]:
    """The command that writes the task's questions."""
    given = ["--task", study.settings["TASK"], "--out", str(folder(study))]
    return commands.stage_process(study, "prep", given + shlex.split(study.settings["TASK_ARGS"]))


def is_missing(study: Study) -> bool:
    """Whether the study has a task whose questions are still to be written."""
    return bool(study.task) and not (folder(study) / "manifest.json").is_file()


def sha256_of(study: Study) -> str:
    """The hash of the task's file. Raises UserError if there is none."""
    path = Path(study.settings["TASK"])
    if not path.is_file():
        raise UserError(f"TASK={path}: no such file; give the path of a task's Python file")
    return disk.sha256_file(path)


def prepare(study: Study) -> None:
    """Write the task's questions if they are missing. Raises UserError if that fails, or if the
    folder holds those of another version of the task.
    """
    if not study.task:
        return
    sha256 = sha256_of(study)
    if is_missing(study):
        command = prepare_command(study)
        print(f"+ {grid.display(command)}", flush=True)
        if code := subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
            raise UserError(f"TASK={study.settings['TASK']}: no questions (exit code {code})")
        return
    path = folder(study) / "manifest.json"
    made_by = (disk.read_json(path).get("task") or {}).get("sha256") or {}
    if made_by.get(Path(study.settings["TASK"]).name) != sha256:
        raise UserError(
            f"{path}: these questions are another version's of TASK={study.settings['TASK']}; "
            f"remove {folder(study)} to have them written again, or give another BENCH_DATA"
        )
