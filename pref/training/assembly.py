"""The parts of a run, in the order in which train_pref.py puts them together: checked arguments and
pairs, token ids, the policy, and the pairs with their reference log-probs.
"""

import argparse
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from pref.files.console import UserError
from pref.files.pairs import read_pairs
from pref.model import loading, sharding, trained, weights
from pref.model.chat import TokenPair
from pref.model.logps import ResponseLogps, check_logps
from pref.model.lora import add_lora, tied_head_warning
from pref.model.packing import Packing, make_batch
from pref.model.ranks import Ranks
from pref.training import arguments, gates, run_folder, run_id, schedule, settings, start_adapter
from pref.training.reference import BaseHashes, Split, cache_files, reference_logps


class Prepared(NamedTuple):
    """A run before any weight is loaded."""

    args: argparse.Namespace
    parameters: dict  # of the loss
    rows: dict[str, list[dict]]  # pairs as read, by split
    record: dict  # what args.json will hold, as far as it is known


def prepare(args: argparse.Namespace, ranks: Ranks) -> Prepared:
    """Check everything that can be checked without weights. Raises UserError."""
    # 1) The arguments, alone and together, and a loss from --loss_file.
    arguments.check_args(args, ranks.world)
    started = start_adapter.with_start(args)
    parameters = arguments.loss_parameters(args)
    own_loss = arguments.check_own_loss(args, parameters)

    # 2) The pairs.
    if not args.data.is_dir():
        if args.data.is_file():
            raise UserError(
                f"--data {args.data}: is a file; run python prep_data.py --dataset {args.data}, "
                "and give the folder that it writes"
            )
        raise UserError(
            f"--data {args.data}: no such folder; make it with prep_data.py --dataset ..."
        )
    rows = {
        split: read_pairs(args.data / f"{split}.jsonl", limit)
        for split, limit in schedule.pair_limits(args).items()
    }
    counts = {split: len(pairs) for split, pairs in rows.items()}
    arguments.check_micro_batches(args, counts, ranks.world, ranks.main)

    # 3) The run's name, from what the user gave; then the model's files, and each `auto`, resolved
    #    for this device.
    args = settings.replaced(started, run_id=run_id.choose(args, started, parameters))
    args = settings.for_tuning(args)
    if start_adapter.is_missing(args):
        args = start_adapter.check_missing(args, ranks)
    start_adapter.warn_of_divergence(args, ranks)
    start_adapter.check_pairs(args, ranks)
    files = weights.find_model(args.model, needs_weights=args.dry_run is None)
    args = settings.for_device(args, files, ranks)
    return Prepared(
        args, parameters, rows, run_folder.begin_record(args, parameters, own_loss, ranks)
    )


def build_policy(args: argparse.Namespace, ranks: Ranks) -> tuple[ResponseLogps, BaseHashes]:
    """The base model, with its adapter or with all its parameters to be trained, sharded over
    ranks, and which base model it is. Raises UserError if the adapter of --init_adapter does not
    fit it, or --freeze does not.
    """
    is_full = args.tune == "full"
    dtype, device = getattr(torch, args.dtype), ranks.device
    if args.shard == "full" and ranks.world > 1:
        # Rank 0 loads the weights into RAM; the others get their shards from it.
        device = torch.device("cpu" if ranks.main else "meta")
    loaded = torch.float32 if is_full else dtype
    base = loading.load_base(args.model, loaded, args.quant, device)
    hashes = None
    if ranks.main:
        model = weights.identity(weights.find_model(args.model))
        hashes = BaseHashes(model, loading.fingerprint(base, dtype if is_full else None))
    hashes = ranks.from_main(hashes)
    if is_full:
        trained.train_all(base, args.freeze, dtype)
        model = base
    else:
        start_adapter.check_base(args, hashes, ranks)
        model = with_adapter(args, base, ranks)
    policy = ResponseLogps(model, settings.attention_of(args))
    first = int(args.checkpointing) if args.checkpointing.isdecimal() else None
    on_cuda = ranks.device.type == "cuda"
    policy.prepare_layers(args.compile == "on", args.checkpointing != "off", first, on_cuda)
    sharding.shard(policy, args.shard, dtype, ranks)
    return policy, hashes


def with_adapter(args: argparse.Namespace, base: PreTrainedModel, ranks: Ranks) -> PeftModel:
    """`base` with the run's LoRA adapter."""
    adapted = add_lora(
        base,
        r=args.lora_r,
        alpha=args.lora_alpha,
        dropout=args.lora_dropout,
        targets=args.lora_targets,
        seed=args.seed,
        init=args.init_adapter,
        is_reference=args.reference_model == "start",
        rslora=args.use_rslora,
    )
    if warning := tied_head_warning(adapted):
        ranks.print(f"warning: {warning}")
    return adapted


def load_splits(
    args: argparse.Namespace,
    ranks: Ranks,
    policy: ResponseLogps,
    packing: Packing,
    record: dict,
    rows: dict[str, list[dict]],
    pairs: dict[str, list[TokenPair]],
) -> dict[str, Split]:
    """Pairs with their reference log-probs, by split; from the cache, or computed. record: from
    reference.identity.

    Raises UserError if our log-probs differ from the architecture's own.
    """
    # The shortest validation pairs through our layout and through the model's own forward pass.
    probe = gates.probe_of(pairs["val"])
    ours = make_batch(probe, packing, ranks.device)
    plain = make_batch(probe, packing._replace(padded=True, shared=False), ranks.device)
    dtype = getattr(torch, args.dtype)
    check_logps(policy, ours, plain, args.init_adapter is not None, dtype)
    if args.compile == "on" and ranks.device.type == "cuda":
        short = make_batch(gates.cut(probe), packing, ranks.device)
        gates.check_compiled(policy, short, dtype, ranks)
    files = cache_files(args.data, record)
    references = {
        split: reference_logps(policy, pairs[split], packing, files, ranks, split)
        for split in pairs
    }
    sharding.reshard(policy)  # the optimiser must get the shards
    return {split: Split(rows[split], pairs[split], references[split]) for split in pairs}
