"""The adapter that a run starts from (--init_adapter), and what follows from it: r, alpha and
targets, the reference, and which round of training on the model's own answers the run is.

    results/RUN          a finished run: its adapter/
    any other folder     an adapter in PEFT's format

What is there is checked against what the run is to be before any weight is loaded. An adapter that
is not there yet can be planned with (--dry_run), and one that is gone is not missed by a run that
is finished.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from pref.files import disk, run_folders
from pref.files.console import UserError
from pref.model import lora
from pref.model.ranks import Ranks
from pref.training import arguments, settings
from pref.training.reference import BaseHashes

OF_ADAPTER = ("lora_r", "lora_alpha", "use_rslora", "lora_targets", "init_adapter_sha256")


class Origin(NamedTuple):
    """Where an adapter comes from."""

    adapter: Path  # its folder
    run: Path | None  # the run that trained it; None: not one of this toolkit, or not known
    record: dict  # the run's args.json


def origin_of(path: Path) -> Origin:
    """The adapter that --init_adapter names, which need not exist."""
    if is_run(path):
        return Origin(path / "adapter", path, disk.read_json(path / "args.json"))
    above = path.resolve().parent
    if path.resolve().name == "adapter" and is_run(above):
        return Origin(path, above, disk.read_json(above / "args.json"))
    return Origin(path, None, {})


def is_run(folder: Path) -> bool:
    return (folder / "args.json").is_file() and not (folder / "adapter_config.json").is_file()


# ---- what follows from it -----------------------------------------------------------------------


def with_start(args: argparse.Namespace) -> argparse.Namespace:
    """`args` with the folder of --init_adapter, its r, alpha, scaling and targets, the hash of its
    weights and of how they are scaled where that is not by alpha / r, the reference and the round.

    The hash is None if there is no adapter (`is_missing`). Raises UserError if the adapter cannot
    be trained on, or other values were given along with it.
    """
    if args.init_adapter is None:
        if args.round not in (None, 1):
            raise UserError(
                f"--round {args.round}: a later round starts from the adapter of the round before; "
                "give it as --init_adapter results/RUN"
            )
        # Without a start adapter the two references are the same model.
        return settings.replaced(args, init_adapter_sha256=None, reference_model="start", round=1)
    origin = origin_of(args.init_adapter)
    if run_folders.tune_of(origin.record) == "full":
        raise UserError(
            f"--init_adapter {args.init_adapter}: has a model of its own and no adapter (--tune "
            f"full); give --model {origin.run / run_folders.WEIGHTS['full']} in its place"
        )
    args = settings.replaced(
        args,
        init_adapter=origin.adapter,
        init_adapter_sha256=None,
        round=args.round or next_round(args.init_adapter, origin),
    )
    if is_missing(args):
        return args
    check_run(args, origin)
    config = lora.lora_config(origin.adapter)
    found = {
        "lora_r": config.r,
        "lora_alpha": config.lora_alpha,
        "use_rslora": bool(config.use_rslora),
        "lora_targets": target_names(origin.adapter),
    }
    for key, value in found.items():
        if not is_same(given := getattr(args, key), value, arguments.DEFAULTS[key]):
            raise UserError(
                f"--{key} {given}: the adapter in --init_adapter has {value}; leave it out"
            )
    sha256 = disk.sha256_file(origin.adapter / "adapter_model.safetensors")
    if config.use_rslora:  # alpha / sqrt(r)
        sha256 = disk.sha256_json([sha256, "rslora"])
    return settings.replaced(args, **found, init_adapter_sha256=sha256)


def next_round(given: Path, origin: Origin) -> int:
    """The round of a run that does not say it: the first from SFT, and from a bare adapter's
    folder; one more than the round before from a run.
    """
    if not is_run(given):
        return 1 if given.exists() else 2
    before = origin.record.get("round", 1)
    if not isinstance(before, int):
        raise UserError(f"{origin.run / 'args.json'}: 'round' must be a number, found {before!r}")
    return 1 if origin.record.get("loss") == "sft" else before + 1


def is_same(given: int | str, found: int | str, default: int | str) -> bool:
    """Whether an argument asks for what the adapter has; target modules in any order."""
    if isinstance(found, str):
        return given == default or set(given.split(",")) == set(found.split(","))
    return given in (found, default)


def target_names(adapter: Path) -> str:
    """The modules that the weights in `adapter` belong to, in the form of --lora_targets: last
    names, sorted, joined by commas ("k_proj,q_proj").
    """
    try:
        with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
            layers = lora.lora_layers(file)
    except SafetensorError as error:
        raise UserError(f"{adapter}: adapter_model.safetensors cannot be read ({error})") from None
    return ",".join(sorted({layer.rpartition(".")[2] for layer in layers}))


# ---- checks -------------------------------------------------------------------------------------


def check_run(args: argparse.Namespace, origin: Origin) -> None:
    """Raise UserError if the run that trained the adapter is no start for this one."""
    mode = origin.record.get("mode")
    if mode == "trial" and args.mode != "trial":
        raise UserError(
            f"--init_adapter {origin.run}: is a trial run, whose adapter was trained for a few "
            "steps to test a set-up; train it in full, or add --mode trial"
        )


def warn_of_divergence(args: argparse.Namespace, ranks: Ranks) -> None:
    """Warn if the run that training starts from diverged: its adapter is the best before that."""
    run = origin_of(args.init_adapter).run if args.init_adapter else None
    path = run / "summary.json" if run else None
    if path and path.is_file() and disk.read_json(path).get("status") == "diverged":
        ranks.print(
            f"warning: --init_adapter {run}: diverged; training starts from the best adapter that "
            "it had before"
        )


def check_pairs(args: argparse.Namespace, ranks: Ranks) -> None:
    """Warn if the pairs in --data are answers of another model than the one that training starts
    from: such training is not on-policy.
    """
    path = args.data / "manifest.json"
    made_of = disk.read_json(path).get("from_answers") if path.is_file() else None
    if args.init_adapter is None or is_missing(args) or not isinstance(made_of, dict):
        return
    ours = disk.sha256_file(args.init_adapter / "adapter_model.safetensors")
    theirs = made_of.get("adapter_sha256")
    if theirs != ours:
        ranks.print(
            f"warning: --data {args.data}: its pairs are answers of {made_of.get('run')} (adapter "
            f"{theirs[:8] if theirs else 'none'}), and training starts from another adapter "
            f"({ours[:8]}): it is not on-policy"
        )


def check_base(args: argparse.Namespace, base: BaseHashes, ranks: Ranks) -> None:
    """Raise UserError if the adapter was trained on another base model. Where only the base's name
    is known, another name is a warning.
    """
    if args.init_adapter is None:
        return
    origin = origin_of(args.init_adapter)
    ours, theirs = base.model, origin.record.get("model_sha256")
    # A run of version 1.0.0 has only a sample of the weights as they were loaded.
    as_loaded = ("quant", "dtype")
    if not theirs and all(origin.record.get(key) == getattr(args, key) for key in as_loaded):
        ours, theirs = base.loaded, origin.record.get("base_sha256")
    if theirs and theirs != ours:
        raise UserError(
            f"--init_adapter {origin.adapter}: was trained on another base model "
            f"({origin.record.get('model')}, hash {theirs[:8]}) than --model {args.model} (hash "
            f"{ours[:8]}); give the base that it was trained on"
        )
    name = disk.read_json(origin.adapter / "adapter_config.json").get("base_model_name_or_path")
    if not theirs and name and Path(name).name != Path(args.model).name:
        ranks.print(
            f"warning: --init_adapter {origin.adapter}: names {name} as its base, and --model is "
            f"{args.model}; whether these are the same weights cannot be seen from it"
        )


# ---- an adapter that is not there ---------------------------------------------------------------


def is_missing(args: argparse.Namespace) -> bool:
    """Whether --init_adapter names something that does not exist (yet, or any more)."""
    return args.init_adapter is not None and not args.init_adapter.exists()


def check_missing(args: argparse.Namespace, ranks: Ranks) -> argparse.Namespace:
    """`args` for a run whose adapter is missing, where it can do without: to be planned, or
    finished already. args: with the run id. Raises UserError for every other.
    """
    if args.dry_run is not None:
        ranks.print(
            f"--init_adapter {args.init_adapter}: does not exist yet; planned with r "
            f"{args.lora_r} on {args.lora_targets}"
        )
        return args
    folder = args.results_dir / args.run_id
    if (folder / "summary.json").is_file():
        record = disk.read_json(folder / "args.json")
        paths = (str(args.init_adapter), str(args.init_adapter / "adapter"))
        if record.get("init_adapter") in paths:
            record = arguments.UNLESS_RECORDED | record
            return settings.replaced(args, **{key: record[key] for key in OF_ADAPTER})
    raise missing(args.init_adapter)


def missing(adapter: Path) -> UserError:
    """The error that --init_adapter is not there, and what to do."""
    run = adapter.parent
    if adapter.name != "adapter" or not is_run(run):
        return UserError(
            f"--init_adapter {adapter}: no such folder; give a finished run (results/RUN) or the "
            "folder of a LoRA adapter"
        )
    if (run / "summary.json").is_file():
        return UserError(
            f"--init_adapter {run}: its training ended without an adapter (it diverged before an "
            "evaluation); start from another run"
        )
    return UserError(
        f"--init_adapter {run}: its training has not finished, and an adapter is only written at "
        f"the end; continue it first (train_pref.py --status {run})"
    )
