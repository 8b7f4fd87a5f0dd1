"""grid files and their points"""

import argparse
import itertools
import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from losses import LOSSES
from pref import ROOT
from pref.files.console import UserError
from pref.training import loss_options
from pref.training.arguments import load_own_loss
from pref.training.run_id import run_id_from

DEFAULT_GRID = "tddpo"
STAGES = ("train", "gen", "judge", "analyze")
AXES = {  # by name in a grid file: the argument of train_pref.py. The first ones vary most slowly.
    "SEEDS": "seed",
    "LRS": "learning_rate",
    "LOGP": "logp",
    "LOSSES": "loss",
    "BETAS": "beta",
    "TAUS": "tau",
    "BETA_MIXES": "beta_mix",
}
OF_EVERY_LOSS = ("seed", "learning_rate", "loss")
DEFAULTS = {
    "SEEDS": "42",
    "LRS": "default",
    "LOGP": "default",
    "LOSSES": "",
    "BETAS": "default",
    "TAUS": "default",
    "BETA_MIXES": "default",
    "MODEL": "meta-llama/Llama-2-7b-chat-hf",
    "DATA": "data/dpo-mix-7k",
    "MT_BENCH": "data/mt_bench",
    "RESULTS": "results",
    "JUDGE": "",
    "BASE_URL": "",
    "STAGES": " ".join(STAGES),
    "TRAIN_ARGS": "",
    "GEN_ARGS": "",
    "JUDGE_ARGS": "",
    "ANALYZE_ARGS": "",
    "GPUS_PER_RUN": "",
    "NPROC": "",
    "JOBS": "",
}
PER_LOSS = (*AXES, "TRAIN_ARGS")  # NAME_loss is for that loss alone


class Point(NamedTuple):
    """A run of the grid. arguments: of train_pref.py."""

    index: int
    run_id: str
    arguments: list[str]


def grid_path(name: str) -> Path:
    path = ROOT / "grids" / name if re.fullmatch(r"[\w-]+", name) else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in (ROOT / "grids").iterdir()))
        raise UserError(f"{path}: no such grid; there are {known}, or give a file")
    return path


def is_setting(key: str) -> bool:
    return key in DEFAULTS or any(key.startswith(f"{name}_") for name in PER_LOSS)


def read_grid(path: Path) -> dict[str, str]:
    """The lines `NAME value ...` of a grid file. Raises UserError with file and line for another
    line.
    """
    settings = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        key, _, value = line.partition("#")[0].strip().partition(" ")
        if key and not is_setting(key):
            raise UserError(
                f"{path}:{number}: {key} is no axis or setting; there are {', '.join(DEFAULTS)}"
            )
        if key in settings:
            raise UserError(
                f"{path}:{number}: {key} stands there twice; put its values on one line"
            )
        if key:
            settings[key] = value.strip()
    return settings


def settings_of(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """All settings, and those of them that the environment gave."""
    given = {key: value for key, value in os.environ.items() if is_setting(key) and value}
    in_file = read_grid(path)
    for name in PER_LOSS:  # BETAS in the environment is meant for every loss
        if name in given:
            in_file = {
                key: value for key, value in in_file.items() if not key.startswith(f"{name}_")
            }
    return DEFAULTS | in_file | given, given


def values_of(settings: dict[str, str], axis: str, loss: str) -> list[str]:
    parameter = AXES[axis]
    if parameter not in OF_EVERY_LOSS and parameter not in loss_options.loss_defaults(loss):
        return ["default"]
    return settings.get(f"{axis}_{loss}", settings[axis]).split() or ["default"]


def expand(settings: dict[str, str]) -> list[Point]:
    """Every combination of the axes, once. Raises UserError for what train_pref.py would refuse."""
    losses = settings["LOSSES"].split()
    if not losses:
        raise UserError("LOSSES: the grid names no loss; `python losses.py` lists them")
    slow = list(AXES)[:3]
    rows = []
    for loss in losses:
        check_loss_name(loss, settings)
        lists = [[loss] if axis == "LOSSES" else values_of(settings, axis, loss) for axis in AXES]
        ranks = [{value: n for n, value in enumerate(lists[k])} for k in range(len(slow))]
        for values in itertools.product(*lists):
            rows.append(([ranks[k][values[k]] for k in range(len(slow))], values))
    rows.sort(key=lambda row: row[0])
    points: dict[str, Point] = {}
    for _, values in rows:
        arguments = arguments_of(settings, dict(zip(AXES.values(), values)))
        run_id = run_id_from(arguments)
        points.setdefault(run_id, Point(len(points), run_id, arguments))
    return list(points.values())


def check_loss_name(loss: str, settings: dict[str, str]) -> None:
    load_own_loss(more_arguments(settings, loss))
    if loss not in LOSSES:
        raise UserError(f"LOSSES: there is no loss {loss!r}; `python losses.py` lists them")


def more_arguments(settings: dict[str, str], loss: str) -> list[str]:
    return [
        word
        for key in ("TRAIN_ARGS", f"TRAIN_ARGS_{loss}")
        for word in shlex.split(settings.get(key, ""))
    ]


def arguments_of(settings: dict[str, str], values: dict[str, str]) -> list[str]:
    """train_pref.py's arguments for one combination."""
    arguments = [
        "--model",
        settings["MODEL"],
        "--data",
        settings["DATA"],
        "--results_dir",
        settings["RESULTS"],
    ]
    for key in ("loss", "beta", "tau", "beta_mix", "seed", "learning_rate", "logp"):
        if values[key] != "default":
            arguments += [f"--{key}", values[key]]
    return arguments + more_arguments(settings, values["loss"])


class Study(NamedTuple):
    """What this start is to do. given: the settings that came from the environment."""

    args: argparse.Namespace
    settings: dict[str, str]
    given: dict[str, str]
    points: list[Point]
    stages: list[str]

    @property
    def results(self) -> Path:
        return Path(self.settings["RESULTS"])

    def folder(self, point: Point) -> Path:
        return self.results / point.run_id

    def log(self, name: str) -> Path:
        return self.results / "logs" / f"{name}.log"

    def again(self) -> str:
        """The command that continues, with what the environment gave it. A password in an address
        stays out of it.
        """
        given = [
            f'{key}="${key}"' if "@" in value else f"{key}={shlex.quote(value)}"
            for key, value in self.given.items()
        ]
        args = self.args
        words = [args.grid] * (args.grid != DEFAULT_GRID)
        words += [f"--stages {','.join(self.stages)}"] * bool(args.stages)
        words += [f"--index {args.index}"] * (args.index is not None) + [
            f"--nodes {args.nodes}"
        ] * (args.nodes > 1)
        return " ".join([*given, "bash", shlex.quote(os.path.relpath(ROOT / "sweep.sh")), *words])


def shown(words: list[str]) -> str:
    """A command line without a password that stands in an address."""
    return re.sub(r"//[^/@\s]*@", "//", shlex.join(words))


def load_study(args: argparse.Namespace) -> Study:
    settings, given = settings_of(grid_path(args.grid))
    stages = re.split(r"[\s,]+", (args.stages or settings["STAGES"]).strip())
    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise UserError(f"stage {unknown[0]!r}: there are {', '.join(STAGES)}")
    for key in ("GPUS_PER_RUN", "NPROC", "JOBS"):
        if settings[key] and not re.fullmatch(r"[1-9]\d*", settings[key]):
            raise UserError(f"{key}={settings[key]}: must be a whole number above 0")
    points = expand(settings)
    study = Study(args, settings, given, points, [stage for stage in STAGES if stage in stages])
    if args.index is not None:
        if not 0 <= args.index < len(points):
            raise UserError(
                f"--index {args.index}: the grid has points 0 to {len(points) - 1} (--list)"
            )
        return study._replace(points=[points[args.index]], stages=["train"])
    return study


def check_judge_is_named(study: Study) -> None:
    if "judge" in study.stages and not study.settings["JUDGE"]:
        raise UserError(
            "JUDGE is not set; JUDGE=MODEL (with BASE_URL for a server of your own), JUDGE=hf:FOLDER for a local "
            "model, or leave the stage out: --stages train,gen,analyze"
        )
