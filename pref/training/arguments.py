"""every argument of train_pref.py, and its checks"""

import argparse
import importlib.util
import math
from pathlib import Path

from losses import COUPLES_BATCH, LOSSES, NEEDS_TWO_PAIRS, PARAMETER_HELP
from pref.files import disk
from pref.files.console import UserError
from pref.training import loss_check, loss_options, schedule


def loss_arguments() -> dict[str, tuple]:
    """Every parameter of every loss: a default, for its type, and the losses that have it."""
    found: dict[str, tuple] = {}
    for loss in LOSSES:
        for name, default in loss_options.loss_defaults(loss).items():
            found.setdefault(name, (default, []))[1].append(loss)
    return found


def parse_args(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    own = load_own_loss(argv)
    return build_parser(own or "td_dpo", description).parse_args(argv)


def build_parser(
    default_loss: str = "td_dpo", description: str | None = None
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--option VALUE ...]  (--help explains all of them)",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_run_arguments(parser)
    add_loss_arguments(parser, default_loss)
    add_optimisation_arguments(parser)
    add_model_arguments(parser)
    return parser


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is trained on what")
    group.add_argument(
        "--model", default="meta-llama/Llama-2-7b-chat-hf", help="chat model: hub id or folder"
    )
    group.add_argument(
        "--data", type=Path, default=Path("data/dpo-mix-7k"), help="folder written by prep_data.py"
    )
    group.add_argument(
        "--results_dir", type=Path, default=Path("results"), help="folder of all runs"
    )
    group.add_argument(
        "--run_id",
        help="name of the run's folder (default: loss, beta, tau, seed and what differs)",
    )
    group.add_argument(
        "--mode",
        choices=["full", "trial"],
        default="full",
        help=f"trial: {schedule.TRIAL_STEPS} steps of anything, marked so that analyze.py refuses it",
    )
    group.add_argument(
        "--dry_run",
        type=int,
        nargs="?",
        const=0,
        metavar="RANKS",
        help="print steps, tokens, padding and memory by part, for so many ranks (default: this launch's), and stop",
    )
    group.add_argument(
        "--plan_json",
        type=Path,
        metavar="FILE",
        help="with --dry_run: write the plan to this file as JSON",
    )
    group.add_argument(
        "--seed", type=int, default=42, help="LoRA initialisation, order of pairs, dropout"
    )
    group.add_argument(
        "--save_steps",
        type=int,
        default=20,
        help="write a checkpoint every so many optimiser steps",
    )
    group.add_argument(
        "--report_to",
        choices=["none", "wandb"],
        default="none",
        help="send metrics.jsonl to Weights & Biases too (pip install wandb; WANDB_MODE=offline keeps it here)",
    )
    group.add_argument(
        "--status",
        type=Path,
        metavar="DIR",
        help="say where the run in DIR stands, or every run in it, and how to go on, and stop; exit code 1 if one has "
        "not ended",
    )


def add_loss_arguments(parser: argparse.ArgumentParser, default_loss: str) -> None:
    group = parser.add_argument_group(
        "loss (`python losses.py` lists them; a parameter left out takes the loss's own default, one that the loss "
        "does not have is an error)"
    )
    group.add_argument(
        "--loss", choices=list(LOSSES), default=default_loss, metavar="NAME", help=", ".join(LOSSES)
    )
    group.add_argument(
        "--loss_file", metavar="FILE.py:NAME", help="a loss of your own instead of --loss"
    )
    for name, (default, users) in loss_arguments().items():
        words = f"{', '.join(users) if len(users) < 6 else 'most'}: {PARAMETER_HELP.get(name, '')}"
        group.add_argument(
            f"--{name}",
            type=type(default),
            choices=loss_options.PARAMETER_CHOICES.get(name),
            help=words,
        )
    group.add_argument(
        "--learn_beta_mix", action="store_true", help="dlrml: train beta_mix, from --beta_mix on"
    )
    group.add_argument(
        "--beta_mix_lr", type=float, default=1e-3, help="learning rate of log beta_mix"
    )


def add_optimisation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimisation")
    group.add_argument("--learning_rate", type=float, default=1e-5)
    group.add_argument("--weight_decay", type=float, default=0.01)
    group.add_argument("--epochs", type=float, default=3, help="passes over the pairs")
    group.add_argument(
        "--max_steps",
        type=int,
        default=0,
        help="stop after so many optimiser steps (0: epochs decide)",
    )
    group.add_argument(
        "--global_batch", type=int, default=128, help="pairs an optimiser step, over all ranks"
    )
    group.add_argument(
        "--per_device_batch",
        type=int,
        default=4,
        help="pairs a micro-batch and rank, with --packing off and for losses that couple the pairs of a micro-batch",
    )
    group.add_argument("--max_length", type=int, default=2048, help="tokens of prompt + response")
    group.add_argument(
        "--truncation",
        choices=["keep_end", "keep_start"],
        default="keep_end",
        help="keep_end: cut a long prompt at its start, then responses; keep_start: keep the first tokens, as TRL does",
    )
    group.add_argument(
        "--warmup_ratio", type=float, default=0.1, help="share of the steps; then cosine to 0"
    )
    group.add_argument("--max_grad_norm", type=float, default=1.0)
    group.add_argument(
        "--eval_steps", type=int, default=20, help="evaluate every so many steps, and at epoch ends"
    )
    group.add_argument(
        "--max_nonfinite", type=int, default=10, help="non-finite steps in a row that end the run"
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and memory")
    group.add_argument(
        "--init_adapter",
        type=Path,
        metavar="DIR",
        help="LoRA adapter to start from (an SFT adapter, say); it is part of the reference, and brings its own r, "
        "alpha and targets",
    )
    group.add_argument("--lora_r", type=int, default=64)
    group.add_argument("--lora_alpha", type=int, default=16)
    group.add_argument("--lora_dropout", type=float, default=0.05)
    group.add_argument(
        "--lora_targets", default="all-linear", help="all-linear, or module names with commas"
    )
    group.add_argument(
        "--quant", choices=["auto", "nf4", "none"], default="auto", help="auto: nf4 on CUDA"
    )
    group.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float32"],
        default="auto",
        help="compute dtype; auto: bf16 where the hardware has it",
    )
    group.add_argument(
        "--shard",
        choices=["adapters", "full"],
        default="adapters",
        help="FSDP2: the frozen base replicated, or sharded too",
    )
    group.add_argument(
        "--checkpointing",
        choices=["auto", "on", "off"],
        default="auto",
        help="activation checkpointing: slower, much less memory; auto: if the plan would fill the device",
    )
    group.add_argument(
        "--tokens_per_microbatch",
        type=int,
        default=0,
        help="tokens that pairs are packed up to, a micro-batch and rank (0: per_device_batch x max_length)",
    )
    group.add_argument(
        "--prefix_sharing",
        choices=["on", "off"],
        default="on",
        help="compute a pair's prompt once, or twice",
    )
    group.add_argument(
        "--packing",
        choices=["on", "off"],
        default="on",
        help="rows end to end, or padded to the longest",
    )
    group.add_argument(
        "--compile",
        choices=["auto", "on", "off"],
        default="auto",
        help="torch.compile of the layers; auto: on CPU, if a C++ compiler is there and the run is long",
    )


def load_own_loss(argv: list[str] | None) -> str | None:
    """Add the loss of --loss_file, read ahead of the other arguments since it brings some of its
    own.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--loss_file")
    spec = parser.parse_known_args(argv)[0].loss_file
    if spec is None:
        return None
    taken = {action.dest for action in build_parser()._actions} - loss_arguments().keys()
    try:
        name = loss_options.load_loss_file(spec)
    except ValueError as error:
        raise UserError(f"--loss_file {error}") from None
    if clash := sorted(taken & loss_options.own_defaults(LOSSES[name]).keys()):
        del LOSSES[name]
        raise UserError(
            f"--loss_file {spec}: parameter {clash[0]} is an argument of train_pref.py; rename it"
        )
    return name


def loss_parameters(args: argparse.Namespace) -> dict:
    """The chosen loss's own parameters: given ones over its defaults. Raises UserError for one it
    does not have.
    """
    defaults = loss_options.loss_defaults(args.loss)
    given = {key: getattr(args, key) for key in loss_arguments() if getattr(args, key) is not None}
    if foreign := sorted(given.keys() - defaults.keys()):
        raise UserError(
            f"--{foreign[0]}: {args.loss} has no such parameter; it has {', '.join(defaults)}"
        )
    parameters = {**defaults, **given}
    try:
        loss_options.check_parameters(args.loss, parameters)
    except ValueError as error:
        raise UserError(str(error)) from None
    if unused := [
        key for key in given if key.startswith("score") and not uses_score(args.loss, parameters)
    ]:
        raise UserError(
            f"--{unused[0]}: has no effect without --sft_coef; the loss has no score in it"
        )
    if args.learn_beta_mix and args.loss != "dlrml":
        raise UserError(f"--learn_beta_mix: {args.loss} has no beta_mix; it belongs to dlrml")
    return parameters


def uses_score(loss: str, parameters: dict) -> bool:
    """Whether score_c is part of the loss."""
    return loss in ("sft", "orpo") or bool(parameters.get("sft_coef"))


def check_own_loss(args: argparse.Namespace, parameters: dict) -> dict:
    """Self-test of a loss from --loss_file, before anything is spent on it. Returns what args.json
    says of it.
    """
    if args.loss not in loss_options.FROM_FILES:
        return {}
    report = loss_check.check(args.loss)
    if wrong := report.failures or loss_check.try_parameters(
        loss_options.bind(args.loss, parameters)
    ):
        words = "; ".join(wrong) if isinstance(wrong, list) else f"with {parameters} it {wrong}"
        raise UserError(f"--loss_file {args.loss_file}: fails its self-test: {words}")
    for note in report.notes:
        print(f"{args.loss}: {note}", flush=True)
    return {"loss_file_sha256": disk.sha256_file(Path(args.loss_file.rpartition(":")[0]))}


def check_micro_batches(
    args: argparse.Namespace, pairs: dict[str, int], world: int, main: bool
) -> None:
    """Say that a coupling loss depends on the micro-batch. Raises UserError if one would hold a
    single pair where the loss is made of the batch's statistics.
    """
    if args.loss not in COUPLES_BATCH:
        return
    if main:
        print(
            f"{args.loss} couples the pairs of a micro-batch: the result depends on --per_device_batch "
            f"{args.per_device_batch} and on the number of ranks ({world})",
            flush=True,
        )
    if args.loss in NEEDS_TWO_PAIRS:
        last = pairs["train"] % args.global_batch or args.global_batch
        shares = {
            math.ceil((n - rank) / world)
            for n in (args.global_batch, last)
            for rank in range(world)
        }
        sizes = {
            share % args.per_device_batch or args.per_device_batch for share in shares if share > 0
        }
        if 1 in sizes or pairs["val"] < 2:
            raise UserError(
                f"--loss {args.loss}: some micro-batch would hold a single pair ({pairs['train']} pairs, {world} "
                f"rank(s), --global_batch {args.global_batch}, --per_device_batch {args.per_device_batch}); change one"
            )


def check_args(args: argparse.Namespace, world: int) -> None:
    """Raise UserError for values no run can be made of, before anything is loaded."""
    for key in (
        "learning_rate",
        "epochs",
        "global_batch",
        "per_device_batch",
        "max_grad_norm",
        "eval_steps",
        "save_steps",
        "lora_r",
        "lora_alpha",
        "max_nonfinite",
    ):
        if not 0 < getattr(args, key) < math.inf:
            raise UserError(f"--{key} {getattr(args, key)}: must be above 0")
    for key in ("weight_decay", "warmup_ratio", "lora_dropout"):
        if not 0 <= getattr(args, key) < 1:
            raise UserError(f"--{key} {getattr(args, key)}: must be in [0, 1)")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: must be 0 or more")
    if args.max_steps < 0:
        raise UserError(f"--max_steps {args.max_steps}: must be 0 (epochs decide) or more")
    if args.max_length < 16:
        raise UserError(f"--max_length {args.max_length}: needs at least 16 tokens")
    if args.global_batch % world:
        near = max(world, args.global_batch // world * world)
        raise UserError(
            f"--global_batch {args.global_batch} does not divide over {world} ranks; use {near} or another multiple"
        )
    if args.plan_json and args.dry_run is None:
        raise UserError("--plan_json: only with --dry_run")
    if args.report_to == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError("--report_to wandb needs the package wandb; pip install wandb")
    if args.shard == "full" and args.quant == "nf4":
        raise UserError(
            "--shard full with --quant nf4: sharded 4-bit weights are not verified; use --shard adapters"
        )
