"""Grids: a text file names axes and settings, their combinations are the grid's points (runs).

    grid file + environment -> settings -> points, each a run id and arguments of train_pref.py

A line of a grid file is a name and its value, `BETAS 0.01 0.05`. An environment variable of the
same name overrides it. `NAME_loss` applies to one loss only. `AXIS clip 0.1 0.5` makes an axis of
any other argument of train_pref.py; its environment variable is AXIS_clip. An axis may be drawn
(draws.py), and a study may have a task and rounds (task_settings.py).
"""

import argparse
import itertools
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from losses import LOSSES
from pref import ROOT
from pref.files import run_folders
from pref.files.console import UserError
from pref.judging.benchmarks import BENCHMARKS
from pref.sweeping import draws, task_settings
from pref.training import arguments, loss_options
from pref.training.run_id import run_id_from

DEFAULT_GRID = "tddpo"
STAGES = ("train", "gen", "judge", "analyze")
# Axis -> argument of train_pref.py. Points are ordered with the first three axes varying slowest,
# so that a whole seed is finished before the next one begins.
AXES = {
    "SEEDS": "seed",
    "LRS": "learning_rate",
    "LOGP": "logp",
    "LOSSES": "loss",
    "BETAS": "beta",
    "TAUS": "tau",
    "BETA_MIXES": "beta_mix",
    "TUNE": "tune",
}
TUNES = ("lora", "full")
SLOW_AXES = ("SEEDS", "LRS", "LOGP")
EVERY_LOSS_HAS = ("seed", "learning_rate", "loss")
AXIS_DEFAULTS = dict.fromkeys(AXES, "default") | {"SEEDS": "42", "LOSSES": ""}
SETTING_DEFAULTS = {
    "MODEL": "meta-llama/Llama-2-7b-chat-hf",
    "DATA": "data/dpo-mix-7k",
    "BENCHES": "mt_bench",
    "MT_BENCH": "data/mt_bench",
    "BENCH_DATA": "data",
    "RESULTS": "results",
    "STAGES": " ".join(STAGES),
    "JUDGE": "",
    "BASE_URL": "",
    "TRAIN_ARGS": "",
    "GEN_ARGS": "",
    "JUDGE_ARGS": "",
    "ANALYZE_ARGS": "",
    "DRAW_SEED": "42",
} | task_settings.DEFAULTS
PLACEMENT_DEFAULTS = dict.fromkeys(("GPUS_PER_RUN", "NPROC", "JOBS"), "")
DEFAULTS = AXIS_DEFAULTS | SETTING_DEFAULTS | PLACEMENT_DEFAULTS
PER_LOSS = (*AXES, "TRAIN_ARGS")  # these names may carry the suffix _loss, _lora or _full
PER_BENCH = ("GEN_ARGS", "JUDGE", "BASE_URL", "JUDGE_ARGS")  # and these the suffix _bench
OWN_AXIS = "AXIS_"  # AXIS_clip: an axis of the argument --clip


class Point(NamedTuple):
    """A run of the grid."""

    index: int  # of the combination of axes; the runs of all its rounds have the same
    run_id: str
    arguments: list[str]  # of train_pref.py
    round: int = 1
    start: str = run_folders.BASE_RUN  # the run whose answers its pairs are made of (ROUNDS)
    tune: str = "lora"  # what it trains: an adapter, or all parameters ("full")


class Study(NamedTuple):
    """What this start of sweep.sh is to do."""

    args: argparse.Namespace
    settings: dict[str, str]
    given: dict[str, str]  # the settings that came from the environment
    points: list[Point]
    stages: list[str]

    @property
    def results(self) -> Path:
        return Path(self.settings["RESULTS"])

    @property
    def benches(self) -> list[str]:
        """The benchmarks whose questions are answered and judged, in the order of BENCHES."""
        return self.settings["BENCHES"].split()

    @property
    def task(self) -> str:
        """The name of the study's task; "" if it has none."""
        return task_settings.name_of(self.settings)

    @property
    def rounds(self) -> int:
        """Rounds of pairs from the models' own answers; 0: the pairs are those in DATA."""
        return task_settings.rounds_of(self.settings)

    def of_bench(self, name: str, bench: str | None) -> str:
        """The value of a setting, which may be one in PER_BENCH, for one benchmark."""
        return self.settings.get(f"{name}_{bench}", self.settings[name])

    def folder(self, point: Point) -> Path:
        return self.results / point.run_id

    def log(self, name: str) -> Path:
        """The log file of a run or stage."""
        return self.results / "logs" / f"{name}.log"

    def resume_command(self) -> str:
        """The command that continues this study, with the settings from the environment. A value
        with a password in it is referred to by its name.
        """
        given = [
            f'{key}="${key}"' if "@" in value else f"{key}={shlex.quote(value)}"
            for key, value in self.given.items()
        ]
        options = []
        if self.args.grid != DEFAULT_GRID:
            options.append(self.args.grid)
        if self.args.stages:
            options.append(f"--stages {','.join(self.stages)}")
        if self.args.index is not None:
            options.append(f"--index {self.args.index}")
        if self.args.nodes > 1:
            options.append(f"--nodes {self.args.nodes}")
        script = shlex.quote(os.path.relpath(ROOT / "sweep.sh"))
        return " ".join([*given, "bash", script, *options])


# ---- settings -----------------------------------------------------------------------------------


def grid_path(name: str) -> Path:
    """The file of a grid: a name in grids/, or the path of a file. Raises UserError if there is
    none, or if the name means one of each.
    """
    shipped = ROOT / "grids" / name if re.fullmatch(r"[\w-]+", name) else None
    paths = [path for path in (shipped, Path(name)) if path is not None and path.is_file()]
    if len(paths) == 2 and not paths[0].samefile(paths[1]):
        raise UserError(f"{name}: is a grid in grids/ and a file here; write ./{name} for the file")
    if not paths:
        known = ", ".join(sorted(grid.name for grid in (ROOT / "grids").iterdir()))
        raise UserError(f"{name}: no such grid; use one of {known}, or the path of a file")
    return paths[0]


def is_setting(key: str, benches: Iterable[str] = BENCHMARKS) -> bool:
    prefixes = (OWN_AXIS, *(f"{name}_" for name in PER_LOSS))
    of_bench = {f"{name}_{bench}" for name in PER_BENCH for bench in benches}
    return key in DEFAULTS or key in of_bench or key.startswith(prefixes)


def read_grid(path: Path) -> dict[str, str]:
    """The settings in a grid file. Raises UserError with file and line for an unknown name or one
    that is given twice.
    """
    settings, line_of = {}, {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        key, value = split_setting(line.partition("#")[0])
        if key in settings:
            raise UserError(f"{path}:{number}: {key} is given twice; put its values on one line")
        if key:
            settings[key], line_of[key] = value, number
    benches = benches_named(settings)
    for key, number in line_of.items():
        if not is_setting(key, benches):
            known = ", ".join([*DEFAULTS, "AXIS name"])
            raise UserError(f"{path}:{number}: {key} is not an axis or setting; these are: {known}")
    return settings


def benches_named(in_file: dict[str, str]) -> set[str]:
    """The benchmarks that settings may be for: those that judge.py knows, and those that the file
    or the environment names.
    """
    both = (in_file, os.environ)
    named = [name for one in both for name in one.get("BENCHES", "").split()]
    tasks = [task_settings.name_of(one) for one in both]
    return {*BENCHMARKS, *named, *tasks} - {""}


def split_setting(line: str) -> tuple[str, str]:
    """(name, value): 'BETAS 0.1 0.2' -> BETAS, '0.1 0.2'; 'AXIS clip 0.1' -> AXIS_clip, '0.1'."""
    key, value = re.fullmatch(r"\s*((?:AXIS\s+)?\S*)\s*(.*?)\s*", line).groups()
    return "_".join(key.split()), value


def settings_of(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """All settings: defaults, then the file, then the environment; and the environment's alone."""
    in_file = read_grid(path)
    benches = benches_named(in_file)
    given = {key: value for key, value in os.environ.items() if is_setting(key, benches) and value}
    for name in PER_LOSS:
        if name in given:  # BETAS in the environment also replaces the file's BETAS_dlrml
            specific = f"{name}_"
            in_file = {k: value for k, value in in_file.items() if not k.startswith(specific)}
    task = task_settings.name_of(in_file | given)
    for name, bench in itertools.product(PER_BENCH, benches - {task}):
        if name in given:  # likewise JUDGE and the file's JUDGE_alpaca_eval, but not JUDGE_ARGS
            in_file.pop(f"{name}_{bench}", None)
    chosen = in_file | given
    check_quotes(chosen)
    return task_settings.complete(DEFAULTS | chosen, set(chosen)), given


def check_quotes(chosen: dict[str, str]) -> None:
    """Raise UserError for arguments of a stage that a shell could not read."""
    for name, value in chosen.items():
        try:
            shlex.split(value if "_ARGS" in name else "")
        except ValueError as error:
            raise UserError(f"{name}={value}: {error}; close what is open") from None


def load_study(args: argparse.Namespace) -> Study:
    """Raises UserError for settings that no run can be made of."""
    settings, given = settings_of(grid_path(args.grid))
    stages = re.split(r"[\s,]+", (args.stages or settings["STAGES"]).strip())
    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise UserError(f"unknown stage {unknown[0]!r}; the stages are {', '.join(STAGES)}")
    check_benches(settings["BENCHES"].split(), settings)
    for key in PLACEMENT_DEFAULTS:
        if settings[key] and not re.fullmatch(r"[1-9]\d*", settings[key]):
            raise UserError(f"{key}={settings[key]}: must be a whole number above 0")
    points = expand(settings)
    if task_settings.rounds_of(settings) and args.nodes > 1 and "SLURM_JOB_ID" not in os.environ:
        raise UserError(
            "--nodes: with ROUNDS only within Slurm, where one machine answers, scores and makes "
            "pairs for all"
        )
    study = Study(
        args=args,
        settings=settings,
        given=given,
        points=points,
        stages=[stage for stage in STAGES if stage in stages],
    )
    if args.index is None:
        return study
    own = [point for point in points if point.index == args.index]  # all its rounds
    if not own:
        last = max(point.index for point in points)
        raise UserError(f"--index {args.index}: the grid has points 0 to {last} (--list)")
    return study._replace(points=own, stages=["train"])


def check_benches(names: list[str], settings: dict[str, str]) -> None:
    """Raise UserError for a benchmark that neither judge.py nor a folder in BENCH_DATA knows."""
    known = ", ".join(BENCHMARKS)
    if not names:
        raise UserError(f"BENCHES: names no benchmark; these are known: {known}")
    folder = Path(settings["BENCH_DATA"])
    for name in names:
        is_own = run_folders.is_run_id(name) and (folder / name / "manifest.json").is_file()
        if name not in BENCHMARKS and name != task_settings.name_of(settings) and not is_own:
            raise UserError(
                f"BENCHES: there is no benchmark {name!r}; these are known: {known}, and the "
                f"folders with a manifest.json in BENCH_DATA={folder}, such as those that "
                "prep_data.py --task writes"
            )
        if names.count(name) > 1:
            raise UserError(f"BENCHES: {name} is given twice")


def check_judge_is_named(study: Study) -> None:
    if "judge" in study.stages and not all(study.of_bench("JUDGE", b) for b in study.benches):
        raise UserError(
            "JUDGE is not set; set JUDGE=MODEL (and BASE_URL for your own server) or "
            "JUDGE=hf:FOLDER for a local model, or leave judging out: --stages train,gen,analyze"
        )


# ---- points -------------------------------------------------------------------------------------


def expand(settings: dict[str, str]) -> list[Point]:
    """Every combination of the axes, once. Raises UserError for one that train_pref.py refuses.

    With SEEDS "42 43", LOSSES "dpo td_dpo" and TAUS "1 2" the order is

        dpo s42, td_dpo t1 s42, td_dpo t2 s42, dpo s43, td_dpo t1 s43, td_dpo t2 s43

    dpo has no tau, so it appears once per seed.
    """
    losses = settings["LOSSES"].split()
    if not losses:
        raise UserError("LOSSES: the grid names no loss; `python losses.py` lists them")
    names = [load_loss(loss, settings) for loss in losses]
    axes = axes_of(settings, names)

    # 1) All combinations, for each loss and what is trained, which may have values of their own for
    #    an axis.
    combinations = []
    kinds = [(*both, tune) for both in zip(losses, names) for tune in tunes_of(settings, both[1])]
    for loss, name, tune in kinds:
        values = {
            axis: values_of(settings, axis, parameter, name, tune)
            for axis, parameter in axes.items()
        }
        values |= {"LOSSES": [loss], "TUNE": [tune]}
        check_not_given_twice(settings, axes, values, name, tune)
        for choice in itertools.product(*values.values()):
            chosen = dict(zip(axes, choice))
            position = [values[axis].index(chosen[axis]) for axis in SLOW_AXES]
            combinations.append((position, chosen))

    # 2) Slow axes first. The sort is stable: within one position the order of step 1 remains.
    combinations.sort(key=lambda combination: combination[0])

    # 3) Different combinations can be the same run (`default` and its value); keep the first.
    points: dict[str, Point] = {}
    for _, chosen in combinations:
        given = arguments_of(settings, axes, chosen)
        run_id = run_id_from(given)
        points.setdefault(run_id, Point(len(points), run_id, given, tune=chosen["TUNE"]))

    # 4) Each of them once more for each later round.
    rounds = [list(points.values())]
    if task_settings.rounds_of(settings) > 1 and any(p.tune == "full" for p in points.values()):
        raise UserError(
            "ROUNDS: a later round starts from the adapter of the one before, and runs of TUNE "
            "full have none; set ROUNDS 1, or TUNE lora"
        )
    for number in range(2, task_settings.rounds_of(settings) + 1):
        rounds.append([next_round(point, number, settings) for point in rounds[-1]])
    return [point for points in rounds for point in points]


def next_round(point: Point, number: int, settings: dict[str, str]) -> Point:
    """The run that continues `point`, a run of the round before, as round `number`."""
    given = list(point.arguments)
    if point.round > 1:  # it has these itself
        given = given[: given.index("--init_adapter")]
    given[given.index("--data") + 1] = str(task_settings.pairs_folder(settings, point.run_id))
    given += ["--init_adapter", str(Path(settings["RESULTS"]) / point.run_id)]
    given += ["--reference", settings["REFERENCE"], "--round", str(number)]
    return Point(point.index, run_id_from(given), given, number, start=point.run_id)


def load_loss(loss: str, settings: dict[str, str]) -> str:
    """The name of a value of LOSSES: a loss in losses.py, or one of your own as FILE.py:NAME, which
    is loaded. Raises UserError if there is no such loss.
    """
    arguments.load_own_loss(loss_argument(loss))
    name = loss_name(loss)
    arguments.load_own_loss(extra_arguments(settings, name))  # TRAIN_ARGS may hold a --loss_file
    if name not in LOSSES:
        raise UserError(
            f"LOSSES: there is no loss {loss!r}; `python losses.py` lists them, and FILE.py:NAME "
            "names one of your own"
        )
    return name


def check_not_given_twice(
    settings: dict[str, str],
    axes: dict[str, str],
    values: dict[str, list[str]],
    loss: str,
    tune: str,
) -> None:
    """Raise UserError if TRAIN_ARGS give an argument that an axis has several values of: theirs
    would take the place of all of them.
    """
    flags = {word.partition("=")[0] for word in extra_arguments(settings, loss, tune)}
    if "--tune" in flags:
        raise UserError("TRAIN_ARGS: --tune is the axis TUNE (lora, full); set that")
    for axis, parameter in axes.items():
        if len(values[axis]) > 1 and f"--{parameter}" in flags:
            raise UserError(
                f"{draws.name_of(axis)}: TRAIN_ARGS have --{parameter} too, which would take the "
                "place of all values; leave one of them out"
            )


def loss_name(loss: str) -> str:
    return loss.rpartition(":")[2]


def loss_argument(loss: str) -> list[str]:
    return ["--loss_file" if ":" in loss else "--loss", loss]


def axes_of(settings: dict[str, str], losses: list[str]) -> dict[str, str]:
    """Axis -> argument of train_pref.py: AXES, and the grid's own. Raises UserError for an own axis
    whose argument does not exist, has an axis already, or does not tell runs apart.
    """
    axes = dict(AXES)
    of_losses = set().union(*map(loss_options.loss_defaults, losses))
    known = of_losses | (arguments.RUN_ID_TAGS.keys() - arguments.loss_arguments().keys())
    for key in settings:
        if not key.startswith(OWN_AXIS):
            continue
        parameter = key.removeprefix(OWN_AXIS)
        for axis, taken in AXES.items():
            if parameter == taken:
                raise UserError(f"AXIS {parameter}: this is the axis {axis}; use that name")
        if not settings[key].strip():
            raise UserError(f"AXIS {parameter}: has no values")
        if parameter not in known:
            raise UserError(
                f"AXIS {parameter}: neither a parameter of a loss in LOSSES nor an argument of "
                "train_pref.py that makes another run (train_pref.py --help)"
            )
        axes[key] = parameter
    return axes


def tunes_of(settings: dict[str, str], loss: str) -> list[str]:
    """What is trained with one loss: values of TUNE."""
    given = settings.get(f"TUNE_{loss}", settings["TUNE"]).replace("default", TUNES[0]).split()
    if unknown := [tune for tune in given if tune not in TUNES]:
        raise UserError(f"TUNE: {unknown[0]!r} must be one of {', '.join(TUNES)}")
    return list(dict.fromkeys(given))


def values_of(
    settings: dict[str, str], axis: str, parameter: str, loss: str, tune: str
) -> list[str]:
    """The values of an axis for one loss and what is trained; only `default` if the loss, or a run
    that trains this, has no such parameter. The loss's own values precede those of `tune`.
    """
    of_losses = parameter in arguments.loss_arguments()
    if of_losses and parameter not in loss_options.loss_defaults(loss):
        return ["default"]
    of_lora = (*arguments.OF_LORA, *arguments.LORA_OPTIONS)
    if parameter in (of_lora if tune == "full" else arguments.OF_FULL):
        return ["default"]
    text = settings.get(f"{axis}_{tune}", settings[axis])
    text = settings.get(f"{axis}_{loss}", text)
    if draws.is_drawn(text):
        return drawn_values(settings, text, axis, parameter)
    return text.split() or ["default"]


def drawn_values(settings: dict[str, str], text: str, axis: str, parameter: str) -> list[str]:
    """The values that `text` draws for an axis. Raises UserError for one that has no numbers."""
    declared = {argument.name: argument for argument in arguments.ARGUMENTS}
    kind = (declared | arguments.loss_arguments())[parameter].values
    if kind not in (int, float):
        name = draws.name_of(axis)
        raise UserError(f"{name} {text}: --{parameter} takes no numbers; list its values")
    return draws.values(text, axis, whole=kind is int, seed=settings["DRAW_SEED"])


def drawn_axes(settings: dict[str, str]) -> dict[str, list[str]]:
    """The values of each axis that is drawn, by its name: BETAS, or BETAS_dlrml if one loss has
    its own, LRS_full if full training has.
    """
    losses = [loss_name(loss) for loss in settings["LOSSES"].split()]
    found = {}
    for axis, parameter in axes_of(settings, losses).items():
        for name in (axis, *(f"{axis}_{kind}" for kind in (*losses, *TUNES))):
            if draws.is_drawn(text := settings.get(name, "")):
                found[draws.name_of(name)] = drawn_values(settings, text, axis, parameter)
    return found


def extra_arguments(settings: dict[str, str], loss: str, *tune: str) -> list[str]:
    """TRAIN_ARGS, then those of `tune` if it is known, then TRAIN_ARGS_loss, as a list."""
    names = ("TRAIN_ARGS", *(f"TRAIN_ARGS_{one}" for one in (*tune, loss)))
    texts = (settings.get(name, "") for name in names)
    return [argument for text in texts for argument in shlex.split(text)]


def arguments_of(
    settings: dict[str, str], axes: dict[str, str], chosen: dict[str, str]
) -> list[str]:
    """train_pref.py's arguments for one combination. axes: from axes_of; chosen: a value per
    axis.
    """
    given = ["--model", settings["MODEL"], "--data", settings["DATA"]]
    given += ["--results_dir", settings["RESULTS"], *loss_argument(chosen["LOSSES"])]
    of_table = ("BETAS", "TAUS", "BETA_MIXES", "SEEDS", "LRS", "LOGP")
    if chosen["TUNE"] != TUNES[0]:
        given += ["--tune", chosen["TUNE"]]
    for axis in (*of_table, *(axis for axis in axes if axis not in AXES)):
        if chosen[axis] != "default":
            given += [f"--{axes[axis]}", chosen[axis]]
    return given + extra_arguments(settings, loss_name(chosen["LOSSES"]), chosen["TUNE"])


def display(command: list[str]) -> str:
    """A command line as the user would type it, without a password in an address."""
    return re.sub(r"//[^/@\s]*@", "//", shlex.join(command))
