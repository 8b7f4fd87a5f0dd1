"""What a run that trains all parameters takes on the disk, before any weight is loaded. Adapters
are small, and not looked at.
"""

import shutil
from pathlib import Path

from pref.files import disk
from pref.files.console import UserError
from pref.model.ranks import Ranks
from pref.training.checkpoint import KEPT
from pref.training.plan import Plan


def most_gib(plan: Plan) -> float:
    """GiB at the most: the states that are kept and the next one, the best weights that those name
    and those since.
    """
    return (KEPT + 1) * (plan.checkpoint_gib + plan.saved_gib)


def text(plan: Plan) -> str:
    return (
        f"up to {number(most_gib(plan))} GiB while it runs: {KEPT + 1} checkpoints of "
        f"{number(plan.checkpoint_gib)} and as many models of {number(plan.saved_gib)}, of which "
        "one stays"
    )


def number(gib: float) -> str:
    return f"{gib:,.1f}" if gib >= 1 else f"{gib:.2g}"


def show(plan: Plan, ranks: Ranks) -> None:
    if plan.args.tune == "full":
        ranks.print(f"disk: {text(plan)}")


def check(plan: Plan, run: Path) -> None:
    """Raise UserError if the disk of `run` has no room for it, beside what it has there already."""
    if plan.args.tune != "full":
        return
    place = disk.nearest(run)
    files = [path for path in (run / "checkpoint").rglob("*") if path.is_file()]
    free = shutil.disk_usage(place).free + sum(path.stat().st_size for path in files)
    if most_gib(plan) * 2**30 > free:
        raise UserError(
            f"{place}: has room for {number(free / 2**30)} GiB, and the run takes {text(plan)}; "
            "make room, or give a --results_dir on another disk"
        )
