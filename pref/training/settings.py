"""From the arguments as typed to the arguments as run: how each `auto` is resolved.

    arguments.parse_args
      -> start_adapter.with_start    lora_r, lora_alpha, lora_targets, init_adapter_sha256, round
      -> for_tuning          shard; no LoRA with --tune full
      -> for_device          quant, dtype
      -> for_attention       packing, prefix_sharing
      -> as_begun            compile, checkpointing, tokens_per_microbatch, eval_steps of a run
                             that is continued
      -> plan.of_run         the same of a new run

Every function returns a changed copy; none writes into the Namespace that it is given.
"""

import argparse
from pathlib import Path

import torch

from losses import COUPLES_BATCH
from pref.files import disk
from pref.files.console import UserError
from pref.model import architecture, loading, weights
from pref.model.packing import Packing
from pref.model.ranks import Ranks
from pref.training import arguments, hardware, optimisers

# Settled only once the token ids are known. They change how the work is done, not its result, so
# args.json is first compared without them and completed later.
SETTLED_LATE = arguments.names_affecting("kernel")
OPEN = ("auto", 0)  # values of these that are not settled yet


def replaced(args: argparse.Namespace, **values) -> argparse.Namespace:
    """A copy of `args` with these values."""
    return argparse.Namespace(**(vars(args) | values))


def for_tuning(args: argparse.Namespace) -> argparse.Namespace:
    """`args` with what --tune full implies: all of the model is sharded, and there is no adapter,
    so that the record of the run has no LoRA settings.
    """
    if args.tune == "lora":
        return args
    return replaced(args, shard="full", **dict.fromkeys(arguments.OF_LORA))


def for_device(
    args: argparse.Namespace, files: weights.ModelFiles, ranks: Ranks
) -> argparse.Namespace:
    """`args` with --quant and --dtype as this device and the model in `files` have them. Raises
    UserError if the model is quantised itself, and cannot be trained as asked for, or the device
    has no 8-bit optimiser.
    """
    quant = args.quant
    if args.optim == "adamw_8bit" and not hardware.is_elsewhere(args):
        optimisers.check_8bit(ranks.device)
    if own := files.quantisation:
        place = f"--model {args.model}: its weights are quantised already ({own})"
        if args.tune == "full":
            raise UserError(
                f"{place}, and only adapters on them can be trained; give the model's release that "
                "is not quantised, or --tune lora"
            )
        if quant == "nf4":
            raise UserError(f"{place}; leave out --quant nf4")
        if args.shard == "full":
            raise UserError(f"{place}, and sharding them is not verified; use --shard adapters")
        if quant == "auto":
            how = "in the compute dtype" if own in loading.DEQUANTISED else "as they are"
            ranks.print(f"--quant none: the model's weights are quantised ({own}); loaded {how}")
        quant = "none"
    if quant == "auto":
        quant = "nf4" if ranks.device.type == "cuda" and args.shard == "adapters" else "none"
    if args.dtype == "auto" and hardware.is_elsewhere(args):
        dtype = torch.bfloat16  # every card of CARDS computes in it
    else:
        dtype = loading.pick_dtype(args.dtype, ranks.device)
    return replaced(args, quant=quant, dtype=str(dtype).removeprefix("torch."))


def for_attention(args: argparse.Namespace, longest: int, ranks: Ranks) -> argparse.Namespace:
    """`args` with packing and prefix sharing off if the model cannot be computed on packed rows.
    longest: tokens of the longest sequence. Raises UserError if it cannot be computed at all.
    """
    model = architecture.read(args.model)
    if refusal := model.refusal(longest):
        raise UserError(f"--model {args.model}: {refusal}")
    if warning := model.warning(longest):
        ranks.print(f"warning: {warning}")
    if model.noise:
        ranks.print(
            f"the base model's own dropout and noise are off, as in TRL: {', '.join(model.noise)}"
        )
    reason = model.plain(longest)
    if not reason or "on" not in (args.packing, args.prefix_sharing):
        return args
    ranks.print(f"--packing off --prefix_sharing off: {reason}")
    return replaced(args, packing="off", prefix_sharing="off")


def attention_of(args: argparse.Namespace) -> str:
    """transformers' name of the attention that a run uses: the model's own on plain batches."""
    if "on" in (args.packing, args.prefix_sharing):
        return "branches"
    return architecture.read(args.model).attention


def packing_of(args: argparse.Namespace, pad_id: int) -> Packing:
    """How pairs become micro-batches: up to a budget of tokens; or, without packing and for losses
    that couple the pairs of a micro-batch, a fixed number of pairs.
    """
    by_number = args.packing == "off" or args.loss in COUPLES_BATCH
    return Packing(
        pad_id,
        pairs=args.per_device_batch,
        tokens=0 if by_number else args.tokens_per_microbatch or budget_of(args),
        padded=args.packing == "off",
        shared=args.prefix_sharing == "on",
    )


def budget_of(args: argparse.Namespace) -> int:
    """Tokens of a micro-batch without --tokens_per_microbatch. On a CPU plan.py may raise it."""
    return args.per_device_batch * args.max_length


def as_begun(args: argparse.Namespace, folder: Path) -> argparse.Namespace:
    """`args` with each `auto` as it was resolved when the run in `folder` began, if it has a
    checkpoint: another kernel would round differently, and other evaluations might choose another
    best step.
    """
    if not (folder / "checkpoint").is_dir():
        return args
    record = disk.read_json(folder / "args.json")
    unsettled = [key for key in SETTLED_LATE if getattr(args, key) in OPEN]
    begun = {key: record.get(key, getattr(args, key)) for key in unsettled}
    if args.eval_steps is None:
        # Earlier versions had a default of 20, which is what their records have.
        begun["eval_steps"] = record.get("eval_every", record.get("eval_steps"))
    if begun.get("tokens_per_microbatch") == 0:  # on a CPU, before it was raised there
        begun["tokens_per_microbatch"] = budget_of(args)
    return replaced(args, **begun)
