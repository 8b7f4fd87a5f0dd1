"""Train a LoRA adapter on preference pairs with one of the losses in losses.py.

    python train_pref.py --data data/dpo-mix-7k --loss dpo --beta 0.1
    torchrun --nproc_per_node 8 train_pref.py --loss td_dpo --beta 2.5 --tau 2

Reads  data/<name>/{train,val}.jsonl (prep_data.py) and a chat model (hub id or folder).
Writes results/<run_id>/{args.json, metrics.jsonl, val_pairs.jsonl, adapter/, summary.json}
and    data/<name>/reference/<key>.safetensors, the reference log-probs that every run on this data and base shares.

The same command continues a run that was stopped, from results/<run_id>/checkpoint/, with the result of one that was
not. SIGTERM and SIGUSR1 save and leave with exit code 75; train_pref.py --status results/ says where runs stand.

The defaults are the first study's: Llama-2-7b-chat in 4 bit, LoRA r 64, AdamW at 1e-5, 128 pairs a step, 3 epochs.
"""

import argparse
import importlib.util
import json
import math
import os
import resource
import shlex
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import check_loss
from chat import TokenPair, load_tokenizer, tokenize_pairs
from checkpoint import Checkpoints, Progress, Stop, Stopped, best_folder, run_lock, saving, status_of, sync
from files import (
    BASE_RUN,
    UserError,
    check_run_id,
    find_runs,
    jsonl_line,
    read_json,
    read_jsonl,
    read_pairs,
    run_main,
    sha256_file,
    sha256_json,
    versions,
    write_json,
    write_jsonl,
)
from losses import (
    COUPLES_BATCH,
    FROM_FILES,
    FULL_KL,
    LOSSES,
    NEEDS_TWO_PAIRS,
    PARAMETER_CHOICES,
    PARAMETER_HELP,
    SFT_TERM,
    PairLogps,
    bind,
    check_parameters,
    chosen_score,
    k2,
    load_loss_file,
    loss_defaults,
    own_defaults,
    reduced,
    token_k3,
)
from modeling import (
    Ranks,
    ResponseLogps,
    add_lora,
    check_logps,
    close_ranks,
    dropout,
    fingerprint,
    init_ranks,
    load_base,
    local,
    lora_config,
    lora_layers,
    pick_dtype,
    shard,
    sum_by_row,
    whole,
)
from packing import Batch, Packing, make_batch, needs_own_attention, share_out
from plan import Memory, decide, describe, load_of
from reference import Reference, reference_key, reference_logps

# Mean |policy - reference| per response token (nats) at step 0, where the adapter is the identity. Not zero, because
# a pair meets other padding in the two passes, and matmuls round differently then. The mean, because in bf16 a single
# short response can be off by 0.1; a stale reference or other weights move all of them.
STEP0_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
TRIAL_STEPS, TRIAL_VAL_PAIRS = 2, 8

# How a parameter is named in the run id when it differs from its default; beta, tau and seed always stand there.
RUN_ID_TAGS = {
    "beta_mix": "mix", "learn_beta_mix": "learn", "discopop_tau": "t", "discopop_form": "", "label_smoothing": "ls",
    "margin": "m", "kl": "", "gamma": "g", "slic_delta": "d", "orpo_lambda": "l", "dpop_lambda": "l",
    "beta_dpo_alpha": "al", "logp": "", "sft_coef": "sft", "score": "", "score_alpha": "sa", "score_smoothing": "ss",
    "score_masked_log": "sm", "learning_rate": "lr", "beta_mix_lr": "mlr", "epochs": "ep", "max_steps": "steps",
    "global_batch": "gb", "max_length": "len", "truncation": "", "weight_decay": "wd", "warmup_ratio": "wu",
    "max_grad_norm": "clip", "lora_r": "r", "lora_alpha": "a", "lora_dropout": "do", "lora_targets": "", "quant": "",
    "dtype": "", "init_adapter_sha256": "init",
}  # fmt: skip
# May differ between two starts of one run without making it another run: where things lie, how the work is cut up,
# what is saved when. For the losses that couple a micro-batch, its cut is part of the result.
NOT_THE_RUN = {
    "results_dir", "run_id", "data", "loss_file", "init_adapter", "save_steps",
    "versions", "shard", "checkpointing", "compile", "tokens_per_microbatch", "prefix_sharing", "packing",
}  # fmt: skip
NOT_THE_RUN_UNLESS_COUPLED = {"per_device_batch", "world_size"}
SETTLED = ("compile", "checkpointing", "prefix_sharing", "packing")  # args.json says what they came to
# How a change that is not an argument's is named when a run is refused.
CHANGED = {
    "data_sha256": "the pairs in --data have changed",
    "base_sha256": "the base model's weights have changed",
    "reference": "the token ids have changed: another tokenizer or chat template",
    "init_adapter_sha256": "the adapter in --init_adapter has changed",
    "loss_file_sha256": "the loss in --loss_file has changed",
}

METRICS = (
    "loss", "preference", "anchor", "anchor_k1", "logps/chosen", "logps/rejected", "rewards/chosen",
    "rewards/rejected", "rewards/margins", "rewards/accuracies", "margin/rho", "margin/delta", "score",
)  # fmt: skip


# ---- arguments ----------------------------------------------------------------------------------


def loss_arguments() -> dict[str, tuple]:
    """Every parameter of every loss: a default, for its type, and the losses that have it."""
    found: dict[str, tuple] = {}
    for loss in LOSSES:
        for name, default in loss_defaults(loss).items():
            found.setdefault(name, (default, []))[1].append(loss)
    return found


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    own = load_own_loss(argv)
    return build_parser(own or "td_dpo").parse_args(argv)


def build_parser(default_loss: str = "td_dpo") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--option VALUE ...]  (--help explains all of them)",
        description=__doc__,
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
    group.add_argument("--model", default="meta-llama/Llama-2-7b-chat-hf", help="chat model: hub id or folder")
    group.add_argument("--data", type=Path, default=Path("data/dpo-mix-7k"), help="folder written by prep_data.py")
    group.add_argument("--results_dir", type=Path, default=Path("results"), help="folder of all runs")
    group.add_argument("--run_id", help="name of the run's folder (default: loss, beta, tau, seed and what differs)")
    group.add_argument(
        "--mode",
        choices=["full", "trial"],
        default="full",
        help=f"trial: {TRIAL_STEPS} steps of anything, marked so that analyze.py refuses it",
    )
    group.add_argument(
        "--dry_run",
        type=int,
        nargs="?",
        const=0,
        metavar="RANKS",
        help="print steps, tokens, padding and memory by part, for so many ranks (default: this launch's), and stop",
    )
    group.add_argument("--seed", type=int, default=42, help="LoRA initialisation, order of pairs, dropout")
    group.add_argument("--save_steps", type=int, default=20, help="write a checkpoint every so many optimiser steps")
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
    group.add_argument("--loss", choices=list(LOSSES), default=default_loss, metavar="NAME", help=", ".join(LOSSES))
    group.add_argument("--loss_file", metavar="FILE.py:NAME", help="a loss of your own instead of --loss")
    for name, (default, users) in loss_arguments().items():
        words = f"{', '.join(users) if len(users) < 6 else 'most'}: {PARAMETER_HELP.get(name, '')}"
        group.add_argument(f"--{name}", type=type(default), choices=PARAMETER_CHOICES.get(name), help=words)
    group.add_argument("--learn_beta_mix", action="store_true", help="dlrml: train beta_mix, from --beta_mix on")
    group.add_argument("--beta_mix_lr", type=float, default=1e-3, help="learning rate of log beta_mix")


def add_optimisation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimisation")
    group.add_argument("--learning_rate", type=float, default=1e-5)
    group.add_argument("--weight_decay", type=float, default=0.01)
    group.add_argument("--epochs", type=float, default=3, help="passes over the pairs")
    group.add_argument("--max_steps", type=int, default=0, help="stop after so many optimiser steps (0: epochs decide)")
    group.add_argument("--global_batch", type=int, default=128, help="pairs an optimiser step, over all ranks")
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
    group.add_argument("--warmup_ratio", type=float, default=0.1, help="share of the steps; then cosine to 0")
    group.add_argument("--max_grad_norm", type=float, default=1.0)
    group.add_argument("--eval_steps", type=int, default=20, help="evaluate every so many steps, and at epoch ends")
    group.add_argument("--max_nonfinite", type=int, default=10, help="non-finite steps in a row that end the run")


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
    group.add_argument("--lora_targets", default="all-linear", help="all-linear, or module names with commas")
    group.add_argument("--quant", choices=["auto", "nf4", "none"], default="auto", help="auto: nf4 on CUDA")
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
        "--prefix_sharing", choices=["on", "off"], default="on", help="compute a pair's prompt once, or twice"
    )
    group.add_argument(
        "--packing", choices=["on", "off"], default="on", help="rows end to end, or padded to the longest"
    )
    group.add_argument(
        "--compile",
        choices=["auto", "on", "off"],
        default="auto",
        help="torch.compile of the layers; auto: on CPU, if a C++ compiler is there and the run is long",
    )


def load_own_loss(argv: list[str] | None) -> str | None:
    """Add the loss of --loss_file, read ahead of the other arguments since it brings some of its own."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--loss_file")
    spec = parser.parse_known_args(argv)[0].loss_file
    if spec is None:
        return None
    taken = {action.dest for action in build_parser()._actions} - loss_arguments().keys()
    try:
        name = load_loss_file(spec)
    except ValueError as error:
        raise UserError(f"--loss_file {error}") from None
    if clash := sorted(taken & own_defaults(LOSSES[name]).keys()):
        del LOSSES[name]
        raise UserError(f"--loss_file {spec}: parameter {clash[0]} is an argument of train_pref.py; rename it")
    return name


def loss_parameters(args: argparse.Namespace) -> dict:
    """The chosen loss's own parameters: given ones over its defaults. Raises UserError for one it does not have."""
    defaults = loss_defaults(args.loss)
    given = {key: getattr(args, key) for key in loss_arguments() if getattr(args, key) is not None}
    if foreign := sorted(given.keys() - defaults.keys()):
        raise UserError(f"--{foreign[0]}: {args.loss} has no such parameter; it has {', '.join(defaults)}")
    parameters = {**defaults, **given}
    try:
        check_parameters(args.loss, parameters)
    except ValueError as error:
        raise UserError(str(error)) from None
    if unused := [key for key in given if key.startswith("score") and not uses_score(args.loss, parameters)]:
        raise UserError(f"--{unused[0]}: has no effect without --sft_coef; the loss has no score in it")
    if args.learn_beta_mix and args.loss != "dlrml":
        raise UserError(f"--learn_beta_mix: {args.loss} has no beta_mix; it belongs to dlrml")
    return parameters


def uses_score(loss: str, parameters: dict) -> bool:
    """Whether score_c is part of the loss."""
    return loss in ("sft", "orpo") or bool(parameters.get("sft_coef"))


def check_own_loss(args: argparse.Namespace, parameters: dict) -> dict:
    """Self-test of a loss from --loss_file, before anything is spent on it. Returns what args.json says of it."""
    if args.loss not in FROM_FILES:
        return {}
    report = check_loss.check(args.loss)
    if wrong := report.failures or check_loss.try_parameters(bind(args.loss, parameters)):
        words = "; ".join(wrong) if isinstance(wrong, list) else f"with {parameters} it {wrong}"
        raise UserError(f"--loss_file {args.loss_file}: fails its self-test: {words}")
    for note in report.notes:
        print(f"{args.loss}: {note}", flush=True)
    return {"loss_file_sha256": sha256_file(Path(args.loss_file.rpartition(":")[0]))}


def check_micro_batches(args: argparse.Namespace, pairs: dict[str, int], world: int, main: bool) -> None:
    """Say that a coupling loss depends on the micro-batch. Raises UserError if one would hold a single pair where the
    loss is made of the batch's statistics."""
    if args.loss not in COUPLES_BATCH:
        return
    if main:
        print(f"{args.loss} couples the pairs of a micro-batch: the result depends on --per_device_batch "
              f"{args.per_device_batch} and on the number of ranks ({world})", flush=True)  # fmt: skip
    if args.loss in NEEDS_TWO_PAIRS:
        last = pairs["train"] % args.global_batch or args.global_batch
        shares = {math.ceil((n - rank) / world) for n in (args.global_batch, last) for rank in range(world)}
        sizes = {share % args.per_device_batch or args.per_device_batch for share in shares if share > 0}
        if 1 in sizes or pairs["val"] < 2:
            raise UserError(
                f"--loss {args.loss}: some micro-batch would hold a single pair ({pairs['train']} pairs, {world} "
                f"rank(s), --global_batch {args.global_batch}, --per_device_batch {args.per_device_batch}); change one"
            )


def check_args(args: argparse.Namespace, world: int) -> None:
    """Raise UserError for values no run can be made of, before anything is loaded."""
    for key in ("learning_rate", "epochs", "global_batch", "per_device_batch", "max_grad_norm", "eval_steps",
                "save_steps", "lora_r", "lora_alpha", "max_nonfinite"):  # fmt: skip
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
    if args.report_to == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError("--report_to wandb needs the package wandb; pip install wandb")
    if args.shard == "full" and args.quant == "nf4":
        raise UserError("--shard full with --quant nf4: sharded 4-bit weights are not verified; use --shard adapters")


def run_id_of(args: argparse.Namespace, parameters: dict, defaults: argparse.Namespace) -> str:
    """td_dpo_b2.5_t2_s42, then every other parameter that differs from its default (_mean, _lr2e-05)."""
    parts = [args.loss]
    parts += [f"{tag}{parameters[key]:g}" for key, tag in (("beta", "b"), ("tau", "t")) if key in parameters]
    parts.append(f"s{args.seed}")
    values = {key: (value, loss_defaults(args.loss)[key]) for key, value in parameters.items()}
    other = [key for key in RUN_ID_TAGS if key not in loss_arguments() and hasattr(defaults, key)]
    values |= {key: (getattr(args, key), getattr(defaults, key)) for key in other}
    if args.init_adapter:  # its hash says what its r, alpha and targets are
        values |= dict.fromkeys(("lora_r", "lora_alpha", "lora_targets"), (None, None))
        values["init_adapter_sha256"] = (args.init_adapter_sha256[:8], None)
    for key in [*RUN_ID_TAGS, *(key for key in parameters if key not in RUN_ID_TAGS)]:
        value, default = values.get(key, (None, None))
        if value != default and key not in ("beta", "tau"):
            text = "" if value is True else f"{value:g}" if isinstance(value, float) else str(value)
            parts.append(f"{RUN_ID_TAGS.get(key, key)}{text}".replace(",", "+").replace("_", "-"))
    return "_".join([*parts, *(["trial"] if args.mode == "trial" else [])])


def run_id_from(argv: list[str]) -> str:
    """The run id that a start with these arguments would have. Raises UserError for arguments of no run."""
    args = parse_args(argv)
    check_args(args, world=1)
    take_init_adapter(args)
    return check_run_id(args.run_id or run_id_of(args, loss_parameters(args), parse_args([])))


# ---- plan: steps, order, shares, learning rate --------------------------------------------------


def steps_per_epoch(pairs: int, global_batch: int) -> int:
    return math.ceil(pairs / global_batch)


def number_of_steps(args: argparse.Namespace, pairs: int) -> int:
    steps = math.ceil(args.epochs * steps_per_epoch(pairs, args.global_batch))
    return min(steps, TRIAL_STEPS if args.mode == "trial" else args.max_steps or steps)


def pairs_of_step(step: int, pairs: int, global_batch: int, seed: int) -> list[int]:
    """Indices of the pairs of optimiser step `step` (from 0): a function of the seed and the step alone, so that all
    losses, rank counts and resumed runs see the same batches. The last step of an epoch takes what is left."""
    epoch, within = divmod(step, steps_per_epoch(pairs, global_batch))
    order = np.random.default_rng([seed, epoch]).permutation(pairs)
    return order[within * global_batch : (within + 1) * global_batch].tolist()


def is_evaluated(step: int, steps: int, pairs: int, args: argparse.Namespace) -> bool:
    """Whether an evaluation follows optimiser step `step` (from 1): every eval_steps, at epoch ends, and at the end."""
    return step == steps or step % args.eval_steps == 0 or step % steps_per_epoch(pairs, args.global_batch) == 0


def warmup_steps(steps: int, args: argparse.Namespace) -> int:
    return math.ceil(args.warmup_ratio * steps)


def learning_rate_at(step: int, steps: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then cosine to 0; `step` counts from 0 and the first step already moves."""
    warmup = warmup_steps(steps, args)
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    return args.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ---- one batch, one step, one evaluation --------------------------------------------------------


class Split(NamedTuple):
    """Pairs of train or val: rows as read, token ids, reference log-probs; all in one order."""

    rows: list[dict]
    pairs: list[TokenPair]
    reference: Reference


class LearnedMix:
    """dlrml's beta_mix where it is learned, with its own optimiser."""

    def __init__(self, args: argparse.Namespace, parameters: dict, device: torch.device):
        self.log_beta_mix = None  # its logarithm is what is trained, so that beta_mix stays positive
        self.optimizer = None
        if args.learn_beta_mix:
            start = torch.tensor(math.log(parameters["beta_mix"]), device=device)
            self.log_beta_mix = torch.nn.Parameter(start)
            self.optimizer = torch.optim.AdamW([self.log_beta_mix], lr=args.beta_mix_lr, weight_decay=0.0)

    @property
    def beta_mix(self) -> float | None:
        return None if self.log_beta_mix is None else self.log_beta_mix.exp().item()

    def take_step(self) -> None:
        if self.optimizer:
            self.optimizer.step()

    def zero_grad(self) -> None:
        if self.optimizer:
            self.optimizer.zero_grad()


class Study(NamedTuple):
    """What every step and evaluation of a run needs."""

    args: argparse.Namespace
    ranks: Ranks
    policy: ResponseLogps
    packing: Packing
    parameters: dict
    learned: LearnedMix
    progress: Progress
    stop: Stop

    @property
    def token_kl(self) -> str | None:
        """The token-level estimator that the loss reads from its input, if any."""
        kl = self.parameters.get("kl")
        return kl if kl in ("k3", *FULL_KL) else None

    @property
    def token_score(self) -> dict | None:
        """Arguments of losses.token_score, or None where score_c follows from the log-probs or is not in the loss."""
        terms = {key: self.parameters[key] for key in SFT_TERM if key != "sft_coef"}
        plain = all(terms[key] == SFT_TERM[key] for key in ("score", "score_smoothing", "score_masked_log"))
        return None if plain or not uses_score(self.args.loss, self.parameters) else terms

    def loss(self, inputs: PairLogps) -> tuple[Tensor, dict]:
        """Losses (B,) and terms of the run's loss with its parameters, the learned one among them."""
        mix = {} if self.learned.log_beta_mix is None else {"beta_mix": self.learned.log_beta_mix.exp()}
        inputs = inputs._replace(running_rho=self.progress.running_rho)
        return bind(self.args.loss, self.parameters | mix)(inputs)

    def pair_logps(self, split: Split, members: list[int]) -> tuple[PairLogps, Batch]:
        """Forward pairs `members` of `split`: what a loss may read, (len(members),) each."""
        kl = self.token_kl
        batch = make_batch([split.pairs[i] for i in members], self.packing, self.ranks.device)
        logps, divergence, scores = self.policy(batch, kl, self.token_score)
        if kl == "k3":
            divergence = token_k3(logps - split.reference.of(members).to(logps.device))
        sums = sum_by_row(logps, batch).chunk(2)
        refs = split.reference.sums[members].to(logps.device).unbind(1)
        kls = sum_by_row(divergence, batch).chunk(2) if kl else (None, None)
        score = None if scores is None else sum_by_row(scores, batch)[: len(members)]
        return PairLogps(*sums, *refs, *batch.lengths.float().chunk(2), *kls, score), batch

    def metric_rows(self, inputs: PairLogps) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (B,), and by name METRICS of each pair and `terms/*`, whatever else the loss logs; (B,) each.

        Log-probs, rewards and margins are sums over tokens, as in TRL (rewards of a loss without beta are NaN);
        `anchor` is the loss's own where it has one, else k2, and `score` is score_c: neither need be in the loss.
        """
        values, terms = self.loss(inputs)
        (a, b), rho, beta = inputs.log_ratios, inputs.rho, self.parameters.get("beta", math.nan)
        anchor = terms["anchor"] if "anchor" in terms else k2(reduced(inputs, self.parameters.get("logp", "sum")))
        rows = (values, terms.get("preference", values), anchor, a + b, inputs.chosen, inputs.rejected, beta * a,
                beta * b, beta * rho, ranked_right(rho), rho, inputs.delta, chosen_score(inputs))  # fmt: skip
        named = dict(zip(METRICS, rows))
        named |= {f"terms/{key}": term for key, term in terms.items() if key not in METRICS}
        return values, {name: row.detach().double() for name, row in named.items()}


def ranked_right(margin: Tensor) -> Tensor:
    """1 where the margin is above 0, 1/2 for a tie (every LoRA starts with rho = 0 on all pairs), else 0."""
    return (margin > 0).double() + 0.5 * (margin == 0).double()


def train_step(study: Study, split: Split, members: list[int]) -> tuple[dict, int, float]:
    """Gradients of one optimiser step: the loss summed over its pairs, divided by their number, so that ranks and
    micro-batches do not change it. Returns METRICS' means over the step's pairs, tokens, and the gradient norm."""
    args, ranks, policy = study.args, study.ranks, study.policy
    weight = ranks.world / len(members)  # times world: FSDP averages gradients over ranks
    totals = 0.0
    micro_batches = share_out(members, split.pairs, study.packing, ranks.rank, ranks.world)
    for number, micro in enumerate(micro_batches, 1):
        study.stop.check()
        policy.set_requires_gradient_sync(number == len(micro_batches))
        inputs, batch = study.pair_logps(split, micro or members[:2])  # an empty share runs along with weight 0
        values, rows = study.metric_rows(inputs)
        (values.sum() * (weight if micro else 0.0)).backward()
        sums = torch.stack([*(row.sum() for row in rows.values()), values.new_tensor(float(batch.tokens)).double()])
        totals = totals + (sums if micro else torch.zeros_like(sums))
    if study.learned.log_beta_mix is not None:
        study.learned.log_beta_mix.grad = ranks.sum(study.learned.log_beta_mix.grad) / ranks.world
    # Metrics and gradient norm: one collective, one wait of the host for the device.
    grads = [local(p.grad) for p in trainable(policy).values() if p.grad is not None]
    square = torch.stack(torch._foreach_norm(grads)).double().square().sum()
    reduced = ranks.sum(torch.cat([totals, square[None]]))
    clip = (args.max_grad_norm / (reduced[-1].sqrt() + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, clip.to(grads[0].dtype))
    *sums, tokens, square = reduced.tolist()
    return {name: total / len(members) for name, total in zip(rows, sums)}, int(tokens), math.sqrt(square)


@torch.no_grad()
def evaluate(study: Study, split: Split) -> tuple[dict, Tensor]:
    """Metrics over all pairs of `split`, and (pairs, 2) the policy's log-probs (sums; chosen, rejected)."""
    ranks = study.ranks
    table = torch.zeros(len(split.pairs), 5, device=ranks.device)
    batches = share_out(list(range(len(split.pairs))), split.pairs, study.packing, ranks.rank, ranks.world)
    with dropout(study.policy, active=False):
        for members in ranks.progress(batches, "evaluating"):
            study.stop.check()
            inputs, _ = study.pair_logps(split, members or [0])
            if members:
                columns = (inputs.chosen, inputs.rejected, inputs.kl_chosen, inputs.kl_rejected, inputs.score_chosen)
                for column, values in enumerate(columns):
                    if values is not None:
                        table[members, column] = values
    study.policy.reshard()
    table = ranks.sum(table).cpu()
    counts = response_lengths(split.pairs).float().unbind(1)
    kls = table[:, 2:4].unbind(1) if study.token_kl else (None, None)
    score = table[:, 4] if study.token_score else None
    inputs = PairLogps(table[:, 0], table[:, 1], *split.reference.sums.unbind(1), *counts, *kls, score)
    rows = study.metric_rows(inputs)[1]
    accuracies = {"acc_ref": inputs.rho, "acc_sum": inputs.delta, "acc_mean": inputs.mean().delta}
    metrics = {f"eval/{name}": row.mean().item() for name, row in rows.items()}
    return metrics | {f"eval/{k}": ranked_right(m).mean().item() for k, m in accuracies.items()}, table[:, :2]


def response_lengths(pairs: list[TokenPair]) -> Tensor:
    """(pairs, 2) response tokens, chosen and rejected."""
    return torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in pairs])


def trainable(policy: ResponseLogps) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


# ---- gates: stop before GPU-hours are spent on a broken run -------------------------------------


def check_step0(logps: Tensor, split: Split, dtype: torch.dtype) -> float:
    """Mean |policy - reference| per token before training (nats). Raises UserError above STEP0_TOLERANCE."""
    difference = ((logps - split.reference.sums).abs() / response_lengths(split.pairs)).mean().item()
    if not difference <= STEP0_TOLERANCE[dtype]:
        raise UserError(
            f"before training the policy differs from its reference by {difference:.3g} nats a token (tolerance "
            f"{STEP0_TOLERANCE[dtype]} in {dtype}): a stale file in the data folder's reference/ (delete it), or "
            "weights that change between two forwards"
        )
    return difference


def check_gradients(policy: ResponseLogps, ranks: Ranks) -> None:
    """Raise UserError if some LoRA matrix B got no gradient in the first step: it would never be trained."""
    grads = {name: p.grad for name, p in trainable(policy).items() if "lora_B" in name}
    sums = [0.0 if g is None else local(g).abs().sum().item() for g in grads.values()]
    totals = ranks.sum(torch.tensor(sums, device=ranks.device)).tolist()
    if dead := [name for name, total in zip(grads, totals) if total == 0]:
        raise UserError(
            f"{len(dead)} of {len(grads)} LoRA matrices B got a zero gradient in the first step ({dead[0]} first): the "
            "loss is saturated on every pair (try a smaller beta or a larger tau), or 4-bit weights were repacked"
        )


# ---- what is written ----------------------------------------------------------------------------


def save_best(policy: ResponseLogps, rows: list[dict], folder: Path, ranks: Ranks) -> None:
    """Write `folder`: the adapter as a PEFT directory (fp32 safetensors), and validation pairs as it ranks them."""
    state = {name.removeprefix("model."): whole(p.detach()) for name, p in trainable(policy).items()}
    if not ranks.main:
        return
    state = {name: tensor.cpu() for name, tensor in state.items()}
    temporary = folder.with_suffix(".tmp")
    with saving(folder):
        for leftover in (temporary, folder):  # of a step that is being done again
            shutil.rmtree(leftover, ignore_errors=True)
        policy.model.save_pretrained(temporary / "adapter", state_dict=state, save_embedding_layers=False)
        sync(temporary / "adapter" / "adapter_model.safetensors")
        write_jsonl(temporary / "val_pairs.jsonl", rows)
        temporary.rename(folder)


def publish(run: Path, best: Path | None, summary: dict) -> None:
    """Give the run its adapter, its validation pairs and, last, its summary; the checkpoints have served."""
    with saving(run):
        if best is not None:
            temporary, adapter = run / "adapter.tmp", run / "adapter"
            for leftover in (temporary, adapter):
                shutil.rmtree(leftover, ignore_errors=True)
            shutil.copytree(best / "adapter", temporary)
            sync(temporary / "adapter_model.safetensors")
            temporary.rename(adapter)
            before = [row for _, row in read_jsonl(run / "val_pairs.jsonl") if row["step"] == 0]
            write_jsonl(run / "val_pairs.jsonl", before + [row for _, row in read_jsonl(best / "val_pairs.jsonl")])
        write_json(run / "summary.json", summary)
    shutil.rmtree(run / "checkpoint", ignore_errors=True)


def pair_rows(split: Split, step: int, logps: Tensor) -> list[dict]:
    """Lines of val_pairs.jsonl: log-probs summed over tokens (nats) and lengths (tokens) of each validation pair."""
    columns = torch.cat([logps, split.reference.sums, response_lengths(split.pairs)], 1).tolist()
    names = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "len_chosen", "len_rejected")
    rows = [{"id": row["id"], "step": step, **dict(zip(names, c))} for row, c in zip(split.rows, columns)]
    return [row | {key: int(row[key]) for key in names[-2:]} for row in rows]


def open_wandb(folder: Path):
    """A Weights & Biases run under the run's own name, continued if it was begun. The key is wandb's own affair: it is
    read from WANDB_API_KEY or ~/.netrc and stands in no file of ours. Raises UserError if there can be none."""
    import wandb

    record = read_json(folder / "args.json")
    name, project = record["run_id"], os.environ.get("WANDB_PROJECT") or folder.resolve().parent.name
    identity = sha256_json([str(folder.resolve()), record["data_sha256"]])[:16]
    try:
        return wandb.init(project=project, name=name, id=identity, resume="allow", config=record, dir=folder)
    except wandb.Error as error:
        raise UserError(f"--report_to wandb: {error}; set WANDB_API_KEY, or WANDB_MODE=offline to send later") from None


class Log:
    """metrics.jsonl, a line per optimiser step and per evaluation, written by rank 0 as it happens. Lines behind the
    checkpoint that a run goes on from are cut off: their steps are done again. wandb, if given, gets the same rows."""

    def __init__(self, path: Path, ranks: Ranks, size: int, wandb=None):
        self.path, self.ranks, self.wandb = path, ranks, wandb
        if ranks.main and path.exists():
            os.truncate(path, size)

    def line(self, values: dict) -> None:
        if self.ranks.main:
            with saving(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(jsonl_line(values))
        if self.wandb is not None:
            self.wandb.log(values, step=values["step"])

    def size(self) -> int:
        """Bytes so far, on disk when this returns."""
        if not self.ranks.main or not self.path.exists():
            return 0
        with saving(self.path), open(self.path, "rb") as file:
            os.fsync(file.fileno())
        return self.path.stat().st_size


def peak_gib(device: torch.device) -> float:
    """Peak memory of this rank: allocated on the GPU, or resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def step_text(step: int, line: dict, steps: int, seconds_left: float, finite: bool) -> str:
    hours, rest = divmod(int(seconds_left), 3600)
    return (
        f"step {step}/{steps}  loss {line['loss']:.4f}  acc {line['rewards/accuracies']:.3f}  "
        f"rho {line['margin/rho']:+.4f}  grad {line['grad_norm']:.3g}  lr {line['lr']:.2e}  "
        f"{line['tok_per_s']:.0f} tok/s  {hours}:{rest // 60:02}:{rest % 60:02} left"
        + ("" if finite else "  NON-FINITE: step not taken")
    )


# ---- the run ------------------------------------------------------------------------------------


def prepare(args: argparse.Namespace, ranks: Ranks) -> tuple[dict, dict[str, list[dict]], dict]:
    """Check all that can be checked without weights. Returns the loss's parameters, rows by split, and what
    args.json will say. Raises UserError."""
    check_args(args, ranks.world)
    take_init_adapter(args)
    parameters = loss_parameters(args)
    own_loss = check_own_loss(args, parameters)
    if not args.data.is_dir():
        raise UserError(f"--data {args.data}: no such folder; make it with prep_data.py --dataset ...")
    trial = args.mode == "trial"
    limits = {"train": TRIAL_STEPS * args.global_batch, "val": TRIAL_VAL_PAIRS}
    rows = {split: read_pairs(args.data / f"{split}.jsonl", limits[split] if trial else None) for split in limits}
    check_micro_batches(args, {split: len(r) for split, r in rows.items()}, ranks.world, ranks.main)
    args.run_id = check_run_id(args.run_id or run_id_of(args, parameters, parse_args([])))
    if args.quant == "auto":
        args.quant = "nf4" if ranks.device.type == "cuda" and args.shard == "adapters" else "none"
    args.dtype = str(pick_dtype(args.dtype, ranks.device)).removeprefix("torch.")
    given = {key: value for key, value in vars(args).items() if key not in ("status", "dry_run", "report_to")}
    record = {
        **{key: str(value) if isinstance(value, Path) else value for key, value in given.items()},
        **parameters,
        **own_loss,
        "data_sha256": {split: sha256_file(args.data / f"{split}.jsonl") for split in limits},
        "world_size": ranks.world,
        "couples_batch": args.loss in COUPLES_BATCH,
        "versions": versions(),
    }
    return parameters, rows, record


def take_init_adapter(args: argparse.Namespace) -> None:
    """Fill in r, alpha and targets of --init_adapter. Raises UserError for others given beside it."""
    args.init_adapter_sha256 = None
    if args.init_adapter is None:
        return
    config, defaults = lora_config(args.init_adapter), build_parser()
    own = {"lora_r": config.r, "lora_alpha": config.lora_alpha, "lora_targets": targets_text(args.init_adapter)}
    for key, value in own.items():
        if getattr(args, key) not in (value, defaults.get_default(key)):
            raise UserError(f"--{key} {getattr(args, key)}: the adapter in --init_adapter has {value}; leave it out")
        setattr(args, key, value)
    args.init_adapter_sha256 = sha256_file(args.init_adapter / "adapter_model.safetensors")


def targets_text(adapter: Path) -> str:
    """The modules that the LoRA weights in `adapter` belong to, as --lora_targets would have them: by last names."""
    try:
        with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
            layers = lora_layers(file)
    except SafetensorError as error:
        raise UserError(f"{adapter}: adapter_model.safetensors cannot be read ({error})") from None
    return ",".join(sorted({layer.rpartition(".")[2] for layer in layers}))


def check_same_run(folder: Path, record: dict) -> None:
    """Raise UserError, naming what differs, if `folder` holds a run that `record` is no second start of."""
    if not (folder / "args.json").is_file():
        return
    old, new = read_json(folder / "args.json"), json.loads(json.dumps(record))
    ignored = NOT_THE_RUN | (set() if old.get("loss") in COUPLES_BATCH else NOT_THE_RUN_UNLESS_COUPLED)
    different = [key for key in new if key in old and key not in ignored and old[key] != new[key]]
    if different:
        what = ", ".join(CHANGED.get(key) or f"{key} was {old[key]}, is {new[key]}" for key in different)
        raise UserError(f"{folder}: holds another run ({what}); give --run_id or remove the folder")


def is_finished(folder: Path) -> bool:
    return (folder / "summary.json").is_file()


def start_command(argv: list[str], ranks: Ranks) -> str:
    """The command line that started this run, to be typed again."""
    local = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = f"torchrun --nproc_per_node {local}" if local and ranks.world > 1 else "python"
    script = sys.argv[0] if Path(sys.argv[0]).name == "train_pref.py" else "train_pref.py"
    return f"{launcher} {shlex.join([script, *argv])}"


def packing_of(args: argparse.Namespace, pad_id: int, longest: int, ranks: Ranks) -> Packing:
    """How pairs become micro-batches: by a budget of tokens, or by number where the loss reads a micro-batch's own
    statistics or packing is off. An ordinary padded batch for attention that packing does not know."""
    if "on" in (args.packing, args.prefix_sharing) and (reason := needs_own_attention(args.model, longest)):
        ranks.print(f"--packing off --prefix_sharing off: {reason}")
        args.packing = args.prefix_sharing = "off"
    by_number = args.packing == "off" or args.loss in COUPLES_BATCH
    budget = 0 if by_number else args.tokens_per_microbatch or args.per_device_batch * args.max_length
    return Packing(pad_id, args.per_device_batch, budget, args.packing == "off", args.prefix_sharing == "on")


def tokenise(args, tokenizer, rows: dict[str, list[dict]], ranks: Ranks) -> tuple[dict[str, list[TokenPair]], dict]:
    """Token ids by split, and counts of what was cut: said here and kept in args.json, truncation is never silent."""
    bar = partial(ranks.progress, what="tokenising", unit="pair")
    pairs = {split: tokenize_pairs(tokenizer, r, args.max_length, args.truncation, bar) for split, r in rows.items()}
    both = [pair for split in pairs.values() for pair in split]
    counts = {
        "truncated_prompts": sum(p.cut_prompt > 0 for p in both),
        "truncated_responses": sum(p.cut_response > 0 for p in both),
        "merged_boundaries": sum(p.merged > 0 for p in both),
    }
    words = ", ".join(f"{key.replace('_', ' ')} {count}" for key, count in counts.items())
    per_pair = sum(p.tokens for p in both) / len(both)
    ranks.print(f"{len(pairs['train'])} train and {len(pairs['val'])} val pairs, {per_pair:.0f} tokens each; {words}")
    return pairs, counts


def build_policy(args: argparse.Namespace, ranks: Ranks) -> tuple[ResponseLogps, str]:
    """The base model with its adapter, sharded over ranks, and the fingerprint of the base's weights."""
    dtype, device = getattr(torch, args.dtype), ranks.device
    if args.shard == "full" and ranks.world > 1:  # rank 0 loads into RAM; the others get their shards from it
        device = torch.device("cpu" if ranks.main else "meta")
    base = load_base(args.model, dtype, args.quant, device)
    weights = ranks.from_main(fingerprint(base) if ranks.main else None)
    lora = (args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_targets, args.seed, args.init_adapter)
    policy = ResponseLogps(add_lora(base, *lora).train())
    policy.prepare_layers(args.compile == "on", args.checkpointing == "on")
    shard(policy, args.shard, dtype, ranks)
    return policy, weights


def plan_run(args: argparse.Namespace, pairs: list[TokenPair], packing: Packing, ranks: Ranks) -> Memory:
    """Settle what is left to `auto`, and say what the run will need."""
    steps = number_of_steps(args, len(pairs))
    members = [pairs_of_step(step, len(pairs), args.global_batch, args.seed) for step in range(steps)]
    load = load_of(pairs, members, packing, ranks.world, ranks.device.type == "cuda")
    memory = decide(args, load, ranks)
    if args.dry_run is not None:
        how = f"{ranks.device.type}, {args.dtype}, " + ", ".join(
            f"{key} {getattr(args, key)}" for key in ("quant", "shard", "checkpointing", "compile")
        )
        evaluations = [0, *(step for step in range(1, steps + 1) if is_evaluated(step, steps, len(pairs), args))]
        describe(load, memory, steps, warmup_steps(steps, args), evaluations, ranks.world, how, ranks.print)
    return memory


def train(args: argparse.Namespace, ranks: Ranks, stop: Stop, command: str) -> int:
    """One run, from its arguments to its summary. Returns the exit code."""
    parameters, rows, record = prepare(args, ranks)
    folder = args.results_dir / args.run_id
    if args.dry_run is None:
        check_same_run(folder, record)
        if ranks.from_main(is_finished(folder)):
            ranks.print(f"{folder}: finished already; remove the folder to train it again")
            return 0
    tokenizer = load_tokenizer(args.model)
    pairs, counts = tokenise(args, tokenizer, rows, ranks)
    longest = max(pair.longest for split in pairs.values() for pair in split)
    packing = packing_of(args, tokenizer.pad_token_id, longest, ranks)
    keep_settled(args, folder)
    memory = plan_run(args, pairs["train"], packing, ranks)
    if args.dry_run is not None:
        return 0
    with run_lock(folder, ranks):
        if ranks.from_main(is_finished(folder)):  # by the process that held the lock until now
            return 0
        policy, weights = build_policy(args, ranks)
        reference = weights if args.init_adapter is None else sha256_json([weights, args.init_adapter_sha256])
        keys = {name: reference_key(reference, pairs[name]) for name in pairs}
        record |= {"base_sha256": weights, "reference": keys}
        check_same_run(folder, record)
        record |= counts | {key: getattr(args, key) for key in SETTLED} | {
            "planned_steps": number_of_steps(args, len(pairs["train"])), "planned_gib": memory.total,
            "command": command,
        }  # fmt: skip
        splits = load_splits(args, ranks, policy, packing, reference, rows, pairs)
        learned = LearnedMix(args, parameters, ranks.device)
        optimizer = torch.optim.AdamW(trainable(policy).values(), lr=args.learning_rate, weight_decay=args.weight_decay)
        trained = {name: (parameter, optimizer) for name, parameter in trainable(policy).items()}
        if learned.optimizer:
            trained["log_beta_mix"] = (learned.log_beta_mix, learned.optimizer)
        checkpoints = Checkpoints(folder, trained, ranks)
        progress = checkpoints.restore() or Progress()
        if ranks.main:
            open_folder(folder, record, progress, args)
        study = Study(args, ranks, policy, packing, parameters, learned, progress, stop)
        ranks.print(f"run {args.run_id}: {args.loss} {parameters}, {ranks.world} rank(s) on {ranks.device.type}, "
                    f"{args.dtype}, quant {args.quant}"
                    + (f"; going on after step {progress.step}" if progress.step else ""))  # fmt: skip
        if not run(study, optimizer, checkpoints, splits["train"], splits["val"], folder):
            ranks.print(f"{args.run_id}: saved after step {progress.step}; the same command continues:\n  {command}")
            return stop.exit_code
        summary = summarise(study)
        if ranks.main:
            publish(folder, best_folder(checkpoints.folder, progress.best_step), summary)
    ranks.print(
        f"{summary['status']} after {summary['steps']} steps and {summary['wall_s']:.0f} s: acc_ref "
        f"{summary['best_acc_ref']} at step {summary['best_step']} (best), {summary['final_acc_ref']} (final)\n"
        f"results: {folder}\nnext: python gen_mtbench.py {args.results_dir}"
    )
    return 0


def keep_settled(args: argparse.Namespace, folder: Path) -> None:
    """What `auto` came to when the run began, it stays: another kernel rounds otherwise."""
    if (folder / "checkpoint").is_dir():
        record = read_json(folder / "args.json")
        for key in SETTLED:
            if getattr(args, key) == "auto":
                setattr(args, key, record.get(key, "auto"))


def load_splits(
    args: argparse.Namespace,
    ranks: Ranks,
    policy: ResponseLogps,
    packing: Packing,
    reference: str,
    rows: dict[str, list[dict]],
    pairs: dict[str, list[TokenPair]],
) -> dict[str, Split]:
    """Pairs with the log-probs of the reference of that hash, after a look whether log-probs can be trusted here."""
    probe = min(pairs["val"], key=lambda pair: pair.tokens)
    plain = packing._replace(padded=True, shared=False)
    tolerance = STEP0_TOLERANCE[getattr(torch, args.dtype)]
    check_logps(policy, *(make_batch([probe], way, ranks.device) for way in (packing, plain)), tolerance)
    cache = args.data / "reference"
    references = {n: reference_logps(policy, p, packing, reference, cache, ranks, n) for n, p in pairs.items()}
    policy.reshard()  # a forward without a backward leaves the root's parameters whole: not those that are trained
    return {name: Split(rows[name], pairs[name], references[name]) for name in pairs}


def open_folder(folder: Path, record: dict, progress: Progress, args: argparse.Namespace) -> None:
    """Write args.json, with a line in `starts` for each time the run was started; without a checkpoint to go on from,
    clear what an attempt left."""
    starts = []
    if progress.step or progress.evaluated == 0:
        starts = read_json(folder / "args.json").get("starts", [])
    else:
        if (folder / "args.json").is_file():
            print(f"{folder}: an earlier attempt left no checkpoint; starting over", flush=True)
        for name in ("adapter", "checkpoint"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("metrics.jsonl", "val_pairs.jsonl"):
            (folder / name).unlink(missing_ok=True)
    starts.append({"step": progress.step, "world_size": record["world_size"], "versions": record["versions"]})
    with saving(folder / "args.json"):
        write_json(folder / "args.json", record | {"starts": starts})
        if args.loss in FROM_FILES:
            shutil.copyfile(args.loss_file.rpartition(":")[0], folder / "loss.py")


def run(
    study: Study, optimizer: torch.optim.Optimizer, checkpoints: Checkpoints, split: Split, val: Split, folder: Path
) -> bool:
    """Optimiser steps and evaluations from the last checkpoint on; `study.progress` moves. False if a signal stopped
    it, with everything saved."""
    args, ranks, progress = study.args, study.ranks, study.progress
    steps, per_epoch = number_of_steps(args, len(split.pairs)), steps_per_epoch(len(split.pairs), args.global_batch)
    wandb = open_wandb(folder) if args.report_to == "wandb" and ranks.main else None
    log = Log(folder / "metrics.jsonl", ranks, progress.metrics_bytes, wandb)
    first, begun, before = progress.step, time.monotonic(), progress.wall_s
    saved = progress.step

    def save() -> None:
        now = time.monotonic()
        progress.metrics_bytes, progress.wall_s = log.size(), before + now - begun
        checkpoints.save(progress)
        progress.save_s += time.monotonic() - now

    study.stop.deferred = True
    try:
        while progress.in_a_row < args.max_nonfinite:
            epoch = progress.step / per_epoch
            if progress.evaluated < progress.step and is_evaluated(progress.step, steps, len(split.pairs), args):
                keep_evaluation(study, val, folder, checkpoints, log, epoch)
            if progress.step == steps:
                break
            if progress.step % args.save_steps == 0 and progress.step > saved:
                save()
                saved = progress.step
            line = take_step(study, optimizer, split, steps)
            log.line({"step": progress.step, "epoch": progress.step / per_epoch, **line})
            left = (time.monotonic() - begun) / (progress.step - first) * (steps - progress.step)
            ranks.print(step_text(progress.step, line, steps, left, finite=progress.in_a_row == 0))
    except Stopped:
        save()
        return False
    progress.wall_s = before + time.monotonic() - begun
    return True


def take_step(study: Study, optimizer: torch.optim.Optimizer, split: Split, steps: int) -> dict:
    """One optimiser step, or, if its loss or gradient is not finite, none, which is counted. Returns the metrics."""
    args, ranks, progress, learned = study.args, study.ranks, study.progress, study.learned
    begun, lr = time.monotonic(), learning_rate_at(progress.step, steps, args)
    seed_dropout(args.seed, progress.step + 1, ranks.rank)
    members = pairs_of_step(progress.step, len(split.pairs), args.global_batch, args.seed)
    means, tokens, grad_norm = train_step(study, split, members)
    finite = math.isfinite(means["loss"]) and math.isfinite(grad_norm)  # the same on every rank
    if finite:
        if progress.step == 0:
            check_gradients(study.policy, ranks)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        learned.take_step()
        progress.running_rho = 0.9 * progress.running_rho + 0.1 * means["margin/rho"]
    optimizer.zero_grad()
    learned.zero_grad()
    progress.step += 1
    progress.tokens += tokens
    progress.nonfinite += not finite
    progress.in_a_row = 0 if finite else progress.in_a_row + 1
    rate = tokens / (time.monotonic() - begun)
    line = {**means, "grad_norm": grad_norm, "lr": lr, "tokens": tokens, "tok_per_s": rate,
            "peak_gib": peak_gib(ranks.device), "nonfinite": progress.nonfinite}  # fmt: skip
    return line if learned.beta_mix is None else line | {"beta_mix": learned.beta_mix}


def keep_evaluation(study: Study, val: Split, folder: Path, checkpoints: Checkpoints, log: Log, epoch: float) -> None:
    """Evaluate, log it, and keep the adapter if it is the best by acc_ref so far; a tie keeps the earlier step."""
    args, ranks, progress = study.args, study.ranks, study.progress
    final, logps = evaluate(study, val)
    log.line({"step": progress.step, "epoch": epoch, **final})
    rows, accuracy = pair_rows(val, progress.step, logps), final["eval/acc_ref"]
    if progress.step == 0:
        progress.step0_difference = check_step0(logps, val, getattr(torch, args.dtype))
        if ranks.main:
            with saving(folder):
                write_jsonl(folder / "val_pairs.jsonl", rows)
    else:
        ranks.print("  " + "  ".join(f"{k} {final[k]:.4f}" for k in ("eval/loss", "eval/acc_ref", "eval/margin/rho")))
        if progress.best_acc_ref is None or accuracy > progress.best_acc_ref:
            progress.best_acc_ref, progress.best_step = accuracy, progress.step
            best = best_folder(checkpoints.folder, progress.step)
            save_best(study.policy, rows, best, ranks)
            if ranks.main:
                progress.best_sha256 = sha256_file(best / "adapter" / "adapter_model.safetensors")
    progress.final, progress.evaluated = final, progress.step


def summarise(study: Study) -> dict:
    """summary.json's content."""
    progress, diverged = study.progress, study.progress.in_a_row >= study.args.max_nonfinite
    return {
        "status": "diverged" if diverged else "finished", "steps": progress.step,
        "best_acc_ref": progress.best_acc_ref, "best_step": progress.best_step,
        **{f"final_{key}": progress.final[f"eval/{key}"] for key in ("acc_ref", "acc_sum", "acc_mean")},
        "nonfinite_steps": progress.nonfinite, "step0_difference": progress.step0_difference,
        "wall_s": progress.wall_s, "save_s": progress.save_s, "tokens": progress.tokens,
        "peak_gib": peak_gib(study.ranks.device), "beta_mix": study.learned.beta_mix,
    }  # fmt: skip


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Dropout is a function of seed, step and rank alone, so that any step can be repeated."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def print_status(folder: Path) -> int:
    """A line for every run in `folder`. Returns 1 if one has not ended, else 0."""
    ended = []
    for path in find_runs([folder]):
        if path.resolve().name != BASE_RUN:
            done, words = status_of(path)
            ended.append(done)
            print(words)
    print(f"{sum(ended)} of {len(ended)} runs have ended")
    return 0 if all(ended) else 1


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.status:
        return print_status(args.status)
    ranks = init_ranks()
    command = start_command(sys.argv[1:] if argv is None else argv, ranks)
    if args.dry_run:
        ranks = ranks._replace(world=args.dry_run)
    with Stop(ranks) as stop:
        code = train(args, ranks, stop, command)
    close_ranks()  # not after an error: the other ranks may stand in a collective that this one will never join
    return code


if __name__ == "__main__":
    run_main(main)
