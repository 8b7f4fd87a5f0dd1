"""Whether the disk has room for a run that trains all parameters, before any weight is loaded."""

import shutil
from pathlib import Path
from typing import NamedTuple

from pref.files.console import UserError
from pref.training.checkpoint import KEPT


class Room(NamedTuple):
    """What a run takes on the disk, GiB."""

    state: float  # a checkpoint: values and moments of what is trained
    model: float  # the weights as they are published

    @property
    def most(self) -> float:
        """At the most: the states that are kept and the next one, the best weights that those name
        and those since.
        """
        return (KEPT + 1) * (self.state + self.model)

    def text(self) -> str:
        return (
            f"up to {self.most:.1f} GiB on the disk while it runs: {KEPT + 1} checkpoints of "
            f"{self.state:.1f} and as many models of {self.model:.1f}, of which one stays"
        )


def check_room(run: Path, room: Room) -> None:
    """Raise UserError if the disk of `run` has no room for it, beside what it has there already."""
    place = next(p for p in (run.absolute(), *run.absolute().parents) if p.exists())
    files = [path for path in (run / "checkpoint").rglob("*") if path.is_file()]
    free = shutil.disk_usage(place).free + sum(path.stat().st_size for path in files)
    if room.most * 2**30 > free:
        raise UserError(
            f"{place}: has room for {free / 2**30:.1f} GiB, and the run takes {room.text()}; make "
            "room, or give a --results_dir on another disk"
        )
