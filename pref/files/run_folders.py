"""run ids and run folders"""

import re
from collections.abc import Iterable
from pathlib import Path

from pref.files.console import UserError

BASE_RUN = "base"  # run id of the untrained model


def check_run_id(run_id: str, path: Path | None = None) -> str:
    """Return `run_id` if it is a plain folder name that cannot leave its results folder, else raise
    UserError.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}", run_id) or ".." in run_id:
        place = f"{path}: " if path else ""
        raise UserError(
            f"{place}run id {run_id!r}: use letters, digits and . _ + - only (at most 128, no '..')"
        )
    return run_id


def find_runs(paths: Iterable[Path], check: bool = True) -> list[Path]:
    """Run directories among `paths`: each is one itself (it has args.json) or is a results folder
    full of them.

    Order: the base model first, then by run id. Raises UserError if nothing is found, and with
    `check` for a folder whose name is no run id.
    """
    runs: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"{path}: no such folder")
        found = (
            [path]
            if (path / "args.json").is_file()
            else sorted(p.parent for p in path.glob("*/args.json"))
        )
        if not found:
            raise UserError(
                f"{path}: no runs here (a run is a folder with args.json); train one with train_pref.py"
            )
        runs.update(dict.fromkeys(found))
    for run in runs if check else ():
        check_run_id(run.resolve().name)
    return sorted(runs, key=lambda run: (run.resolve().name != BASE_RUN, run.resolve().name))
