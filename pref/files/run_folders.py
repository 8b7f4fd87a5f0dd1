"""Run ids, and the folders of runs below a results folder: `results/<run_id>/`."""

import re
from collections.abc import Iterable
from pathlib import Path

from pref.files import disk, tensor_files
from pref.files.console import UserError

BASE_RUN = "base"  # run id of the untrained model
# The folder of a run's weights, by the `tune` of its args.json.
WEIGHTS = {"lora": "adapter", "full": "model"}


def is_run_id(name: str) -> bool:
    """Whether a name is a plain folder name, which cannot lead out of its results folder."""
    return bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}", name)) and ".." not in name


def check_run_id(run_id: str, place: str | Path | None = None) -> str:
    """Return `run_id` if it is a plain folder name, which cannot lead out of its results folder.

    place: file that the id comes from, for the message. Raises UserError for any other id.
    """
    if not is_run_id(run_id):
        where = f"{place}: " if place else ""
        raise UserError(
            f"{where}run id {run_id!r}: use letters, digits and . _ + - only, at most 128 of them, "
            "a letter or digit first, and no '..'"
        )
    return run_id


def find_runs(paths: Iterable[Path], check: bool = True) -> list[Path]:
    """Folders of runs in `paths`, each of which is a run (it has args.json) or a results folder.

    The base model comes first, then the others by run id. check: run ids too. Raises UserError for
    a folder that does not exist or has no runs and, with `check`, for a name that is not a run id.
    """
    runs: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"{path}: no such folder")
        if (path / "args.json").is_file():
            runs.append(path)
            continue
        inside = sorted(file.parent for file in path.glob("*/args.json"))
        if not inside:
            raise UserError(
                f"{path}: no runs here (a run is a folder with args.json); "
                "train one with train_pref.py"
            )
        runs += inside
    if check:
        for run in runs:
            check_run_id(run.resolve().name)

    def base_first(run: Path) -> tuple[bool, str]:
        name = run.resolve().name
        return name != BASE_RUN, name

    return sorted(dict.fromkeys(runs), key=base_first)


def tune_of(record: dict) -> str:
    """What a run trains, by its args.json: `lora`, also where nothing is recorded, or `full`."""
    return record.get("tune", "lora")


def weights_of(run: Path) -> Path:
    """Where a run's trained weights are, or will be: `adapter/` (PEFT's format), or `model/` (a
    folder that transformers loads) where all parameters are trained.

    Raises UserError if the run has no args.json, or one that says something else of `tune`.
    """
    tune = tune_of(disk.read_json(run / "args.json"))
    if tune not in WEIGHTS:
        raise UserError(
            f"{run / 'args.json'}: tune is {tune!r}, which this version does not know; use the "
            "version that trained the run"
        )
    return run / WEIGHTS[tune]


def weights_name(run: Path) -> str:
    """`adapter` or `model`; the first one of a folder without args.json."""
    return weights_of(run).name if (run / "args.json").is_file() else WEIGHTS["lora"]


def weight_files(run: Path) -> list[Path]:
    """The files of a run's trained weights. None if there are none: it is the untrained model, has
    not finished, or diverged before an evaluation.
    """
    name = weights_name(run)
    pattern = "adapter_model.safetensors" if name == WEIGHTS["lora"] else "*.safetensors"
    return sorted((run / name).glob(pattern))


def has_weights(run: Path) -> bool:
    return bool(weight_files(run))


def weights_sha256(run: Path) -> str | None:
    """Which trained weights a run has, as its answers keep it (`adapter_sha256` in answers.jsonl):
    the hash of an adapter's file, or one of all tensors of a model. None if it has none.
    """
    paths = weight_files(run)
    if not paths:
        return None
    if paths[0].parent.name == WEIGHTS["lora"]:
        return disk.sha256_file(paths[0])
    return tensor_files.digest_of(paths)


def folder_of(run: Path) -> Path:
    """The results folder that `run` is in: as the user wrote it, where the path has it."""
    above, real = run.parent, run.resolve().parent
    return above if above.resolve() == real else real
