"""What a search is: its settings, recorded in settings.json when it begins.

What the archive depends on is recorded, and another value on a restart is refused by name. What is
not given on a restart is as recorded. What only says how the work is done (JOBS, --concurrency,
--max_usd, --max_hours, prices, the server's address) may differ from start to start.
"""

import argparse
import shlex
from pathlib import Path
from typing import NamedTuple

from pref import ROOT
from pref.discovery import features, seeds
from pref.files import disk
from pref.files.console import UserError
from pref.model import weights
from pref.sweeping import task_settings
from pref.training import arguments, schedule

FILE = "settings.json"
QUICKSTART_MODEL = ROOT / "quickstart" / "SmolLM2-135M-Instruct"
QUICKSTART_DATA = ROOT / "quickstart" / "data" / "preferences"
PER_ROUND = 16
MOST_PROPOSALS = 9900  # ids have four digits
MOST_CONFIRMED = 3

SMALL = (
    "--global_batch 8 --per_device_batch 8 --lora_r 16 --lora_dropout 0 --learning_rate 2e-3 "
    "--max_steps {steps}"
)
PRESETS = {
    "quick": {
        "max_proposals": 96,
        "rung": (3,),
        "seeds_per_rung": (1,),
        "train_args": SMALL.format(steps=8),
    },
    "hour": {
        "max_proposals": 800,
        "rung": (12, 5, 3),
        "seeds_per_rung": (1, 2, 3),
        "train_args": SMALL.format(steps=12),
    },
    "study": {
        "max_proposals": 2400,
        "rung": (16, 8, 4),
        "seeds_per_rung": (1, 2, 3),
        "train_args": "--epochs 1",
    },
}
# The search's own arguments of train_pref.py.
TAKEN = ("model", "data", "results_dir", "run_id", "loss", "loss_file", "seed", "mode", "dry_run")
TAKEN += ("status", "eval_steps", "plan_json", "init_adapter")


class Settings(NamedTuple):
    """What the archive depends on."""

    model: str
    data: str
    preset: str
    seed: int
    max_proposals: int
    rung: tuple[int, ...]  # candidates that are trained, rung by rung
    seeds_per_rung: tuple[int, ...]
    seeds_from: tuple[str, ...]  # losses that the archive begins with; dpo is the first
    coupled: bool
    proxy: str  # on, filter, off
    proposer: tuple[str, ...]
    parameters: dict | None  # of a model's requests
    train_args: str
    task: str  # a file, or ""
    task_args: str  # of prep_data.py --task
    gen_args: str  # of gen_mtbench.py, for the task's questions
    features: str  # a file, or ""

    @property
    def is_stand_in(self) -> bool:
        """Whether a features file is all there is, and the proxy stands in for a model."""
        return not self.model

    @property
    def rounds(self) -> int:
        """Rounds of proposals, after round 0, which has the seeds."""
        return -(-self.max_proposals // PER_ROUND)

    def proposals_of(self, number: int) -> int:
        """How many proposals round `number` has."""
        return min(PER_ROUND, self.max_proposals - PER_ROUND * (number - 1))

    def given_train_args(self) -> list[str]:
        """Arguments of every training run; `--eval_steps 0`: the last step counts, so that nothing
        is chosen by accuracy within a candidate.
        """
        return [*shlex.split(self.train_args), "--eval_steps", "0"]

    def training(self) -> argparse.Namespace:
        """The arguments of train_pref.py, read."""
        return arguments.parse_args(["--loss", "dpo", *self.given_train_args()])

    def steps(self, pairs: int) -> int:
        """Optimiser steps of a run on `pairs` pairs."""
        return schedule.number_of_steps(self.training(), pairs)


def unit_of(gain, settings: Settings | None) -> str:
    """What an estimates.Gain is counted in. Gains on the proxy are always of accuracy."""
    if settings and settings.task and gain.measured == "trained":
        return f"points of {Path(settings.task).stem}'s score at equal KL"
    return "points of accuracy"


# ---- from arguments -----------------------------------------------------------------------------


def settle(args: argparse.Namespace) -> Settings:
    """The settings of the search in args.folder: as recorded, or of the arguments and the preset.
    Raises UserError for values that cannot be, and for one that differs from what is recorded.
    """
    recorded = read(args.folder)
    settings = recorded or from_arguments(args)
    if recorded:
        for name, value in given(args).items():
            if value != getattr(recorded, name):
                raise UserError(
                    f"--{name} {shown(value)}: {args.folder} was begun with "
                    f"{shown(getattr(recorded, name))}; leave it out, or search in a new folder"
                )
    check(settings)
    return settings


def given(args: argparse.Namespace) -> dict:
    """The settings that the command line gives, by name."""
    values = {name: getattr(args, name) for name in Settings._fields}
    values = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    if values["seeds_from"]:
        values["seeds_from"] = seed_names(values["seeds_from"])
    for name in ("model", "data", "task", "features"):
        if values[name]:
            values[name] = as_path(values[name])
    return {
        name: value for name, value in values.items() if value is not None and value is not False
    }


def as_path(text: str) -> str:
    """An absolute path where there is such a file or folder; a hub id stays one."""
    return str(Path(text).resolve()) if Path(text).exists() else text


def from_arguments(args: argparse.Namespace) -> Settings:
    values = given(args)
    if not {"model", "data"} & values.keys():
        needs_no_model = "features" in values and features.is_world(Path(values["features"]))
        values |= {"model": "", "data": ""} if needs_no_model else of_quickstart()
    for name, example in (("model", "FOLDER"), ("data", "data/my_pairs")):
        if name not in values:
            raise UserError(f"--{name} is missing; give --{name} {example} too")
    is_default = values["data"] in ("", str(QUICKSTART_DATA))
    preset = values.get("preset", "quick" if is_default else "hour")
    defaults = {
        "preset": preset,
        "seed": 0,
        "seeds_from": seed_names(seeds.DEFAULT),
        "coupled": False,
        "proxy": "on",
        "proposer": ("evolve",),
        "parameters": None,
        "task": "",
        "task_args": "",
        "gen_args": "",
        "features": "",
    }
    return Settings(**(PRESETS[preset] | defaults | values))


def of_quickstart() -> dict[str, str]:
    """The embedded model and pairs. Raises UserError if quickstart.sh has not made them."""
    for path in (QUICKSTART_MODEL / "config.json", QUICKSTART_DATA / "train.jsonl"):
        if not path.is_file():
            raise UserError(
                f"{path}: not there; run `bash quickstart.sh` first, whose model and pairs are the "
                "default, or give --model and --data"
            )
    return {"model": str(QUICKSTART_MODEL), "data": str(QUICKSTART_DATA)}


def seed_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Losses that the archive begins with: dpo first, `all` in place of all their names."""
    names = tuple(seeds.SEEDS) if tuple(names) == ("all",) else names
    if unknown := [name for name in names if name not in seeds.SEEDS]:
        raise UserError(
            f"--seeds_from {unknown[0]}: not one of the losses that the form can write; these are "
            f"all, {', '.join(seeds.SEEDS)}"
        )
    return tuple(dict.fromkeys(("dpo", *names)))


# ---- checks -------------------------------------------------------------------------------------


def check(settings: Settings) -> None:
    """Raise UserError for settings that no search can have."""
    if not 1 <= settings.max_proposals <= MOST_PROPOSALS:
        raise UserError(
            f"--max_proposals {settings.max_proposals}: must be from 1 to {MOST_PROPOSALS}"
        )
    rung, per_rung = settings.rung, settings.seeds_per_rung
    if len(rung) != len(per_rung):
        raise UserError(
            f"--rung {shown(rung)} --seeds_per_rung {shown(per_rung)}: must be as many numbers; "
            "12,5,3 and 1,2,3 train 12 candidates with one seed, the best 5 with two more, the "
            "best 3 with three more"
        )
    if min(rung + per_rung) < 1 or list(rung) != sorted(rung, reverse=True):
        raise UserError(f"--rung {shown(rung)}: numbers of at least 1, none above the one before")
    if max(per_rung) > 99:
        raise UserError(f"--seeds_per_rung {shown(per_rung)}: at most 99 each")
    coupled = set(settings.seeds_from) & set(seeds.COUPLED)
    if coupled and not settings.coupled:
        raise UserError(
            f"--seeds_from {sorted(coupled)[0]}: couples the pairs of a batch; add --coupled, and "
            "know that such a loss depends on --per_device_batch"
        )
    if settings.features and settings.proxy == "off":
        raise UserError("--features: has no effect with --proxy off; leave one of them out")
    check_task(settings)
    check_train_args(settings)


def check_task(settings: Settings) -> None:
    if settings.task and not Path(settings.task).is_file():
        raise UserError(f"--task {settings.task}: no such file; examples/tasks/ has three")
    if settings.task:
        task_settings.check_name(settings.task, Path(settings.task).stem)
    for name in ("task_args", "gen_args"):
        if getattr(settings, name) and not settings.task:
            raise UserError(f"--{name}: is for a search with a task; give --task FILE")
        check_words(f"--{name}", getattr(settings, name))


def check_words(option: str, text: str) -> list[str]:
    """The arguments in a text. Raises UserError for one that a shell could not read."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{option} {text}: {error}; close what is open") from None


def check_train_args(settings: Settings) -> None:
    for word in check_words("--train_args", settings.train_args):
        name = word.partition("=")[0].removeprefix("--")
        if name in TAKEN or name in arguments.loss_arguments():
            raise UserError(
                f"--train_args: --{name} is the search's own; leave it out of --train_args"
            )
    try:
        arguments.check_args(settings.training(), world=1)
    except SystemExit:
        raise UserError(
            f"--train_args {settings.train_args!r}: train_pref.py does not understand it (above); "
            "python train_pref.py --help"
        ) from None


# ---- the file -----------------------------------------------------------------------------------


def read(folder: Path) -> Settings | None:
    """The recorded settings; None before a search has begun."""
    path = folder / FILE
    if not path.is_file():
        return None
    values = disk.read_json(path)
    lists = ("rung", "seeds_per_rung", "seeds_from", "proposer")
    try:
        return Settings(
            **{n: tuple(values[n]) if n in lists else values[n] for n in Settings._fields}
        )
    except KeyError as error:
        raise UserError(f"{path}: has no {error}; restore it, or search in a new folder") from None


def record(folder: Path, settings: Settings) -> None:
    """Write settings.json, or compare it with what there is now. Raises UserError if data, weights
    or chat template are no longer those of the search.
    """
    path, now = folder / FILE, identity(settings)
    if not path.is_file():
        disk.write_json(path, settings._asdict() | {"identity": now, "versions": disk.versions()})
        return
    before = disk.read_json(path)
    what = {
        "train_sha256": f"the pairs in {settings.data}/train.jsonl",
        "model_sha256": f"the weights of {settings.model}",
        "template_sha256": f"the chat template of {settings.model}",
        "task_sha256": f"the task {settings.task}",
        "features_sha256": f"the features in {settings.features}",
    }
    for name, value in now.items():
        if before["identity"].get(name) != value:
            raise UserError(
                f"{folder}: {what[name]} are not those that the search was begun with (sha256); "
                "restore them, or search in a new folder"
            )
    changed = {
        name: f"{old} -> {disk.versions().get(name)}"
        for name, old in before["versions"].items()
        if name in ("torch", "numpy") and disk.versions().get(name) != old
    }
    for name, change in changed.items():
        print(f"warning: {name} {change}: later numbers may differ in their last digits")


def identity(settings: Settings) -> dict[str, str | None]:
    """Hashes of what the archive depends on. val.jsonl is none of it: only --confirm reads it."""
    if settings.is_stand_in:
        return {"features_sha256": disk.sha256_file(Path(settings.features))}
    train = Path(settings.data) / "train.jsonl"
    if not train.is_file():
        raise UserError(f"--data {settings.data}: no train.jsonl there; make it with prep_data.py")
    files = weights.find_model(settings.model)
    template = files.folder / "chat_template.jinja"
    tokenizer = files.folder / "tokenizer_config.json"
    found = [path for path in (template, tokenizer) if path.is_file()]
    optional = {"task_sha256": settings.task, "features_sha256": settings.features}
    return {
        "train_sha256": disk.sha256_file(train),
        "model_sha256": weights.identity(files) if files.is_local else None,
        "template_sha256": disk.sha256_json([disk.sha256_file(path) for path in found]),
        **{name: disk.sha256_file(Path(path)) for name, path in optional.items() if path},
    }


def shown(value: object) -> str:
    """A setting as it is written on the command line."""
    if isinstance(value, tuple | list):
        separator = " " if value and isinstance(value[0], str) else ","
        return separator.join(map(str, value))
    return str(value)
