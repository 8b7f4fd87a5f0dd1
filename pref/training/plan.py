"""What a run will need, worked out before any weight is loaded: steps, micro-batches, memory by
part.

`train_pref.py --dry_run` prints it, and `--checkpointing auto` decides by it.
"""

import argparse
import copy
import os
import shutil
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pref.files import disk
from pref.model import logps, lora
from pref.model.chat import TokenPair
from pref.model.logps import ResponseLogps
from pref.model.packing import FLEX_BLOCK, Packing, make_batch, share_out
from pref.model.ranks import Ranks
from pref.training import peak_memory, schedule, settings

NF4_BYTES = 0.5 + 0.127 / 8  # a weight: four bits, and its share of the doubly quantised scales
PROBE_TOKENS = 258
# Of what autograd keeps, kept by compiled layers too (measured on a Llama: 18.7 of 24.1 kB)
COMPILED_SHARE = 0.78
CPU_GROWTH = (
    0.55 * 2**30
)  # a process on CPU grows by this before the first step: kernels, threads, check_logps
CPU_HEAP = {
    "off": 1.5,
    "on": 1.15,
}  # the C library's heap over what lives in it, by --compile (measured)
COMPILE_FLOP = (
    4e13  # what a CPU computes in a minute or two, so that compiling for half a minute is worth it
)
MEMORY_SHARE = 0.7  # of the device that a run without checkpointing may plan to use


class Load(NamedTuple):
    """Micro-batches of a run over `world` ranks."""

    micro_batches: tuple[int, int]  # a step and rank, least and most
    tokens: int  # of all steps and ranks, without padding
    computed: int  # the same with padding
    largest: int  # tokens of the largest micro-batch, with padding
    responses: int  # most response tokens in a micro-batch


class Memory(NamedTuple):
    """GiB a rank at its peak, by part."""

    process: float
    weights: float
    adapter: float
    optimiser: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum(self)


def computed_tokens(pairs: list[TokenPair], packing: Packing, on_cuda: bool) -> int:
    """Tokens of one micro-batch that pass through the model, padding among them."""
    rows = [sum(map(len, row)) for pair in pairs for row in packing.rows(pair)]
    total = max(rows) * len(rows) if packing.padded else sum(rows)
    return total + (-total % FLEX_BLOCK if on_cuda and not packing.plain else 0)


def load_of(
    pairs: list[TokenPair], steps: list[list[int]], packing: Packing, world: int, on_cuda: bool
) -> Load:
    """What `steps`, the pairs of each optimiser step, come to."""
    counts, tokens, computed, largest, responses = [], 0, 0, 0, 0
    for members in steps:
        shares = [share_out(members, pairs, packing, rank, world) for rank in range(world)]
        counts += [len(share) for share in shares]
        for micro in (micro for share in shares for micro in share if micro):
            inside = [pairs[i] for i in micro]
            size = computed_tokens(inside, packing, on_cuda)
            tokens, computed = tokens + sum(map(packing.size, inside)), computed + size
            largest = max(largest, size)
            responses = max(responses, sum(len(p.chosen) + len(p.rejected) for p in inside))
    return Load((min(counts), max(counts)), tokens, computed, largest, responses)


def shapes_of(
    model: str, layers: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """The model of a hub id or folder on the meta device, whole or cut to so many layers."""
    config = copy.deepcopy(AutoConfig.from_pretrained(model))
    inner = config.get_text_config()
    if layers is not None:
        inner.num_hidden_layers = layers
        if getattr(inner, "layer_types", None):
            inner.layer_types = inner.layer_types[:layers]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)


def with_lora(base: nn.Module, args: argparse.Namespace) -> PeftModel:
    """`base`, which is on the meta device, with its adapter there too: no value is drawn."""
    with torch.device("meta"):
        return lora.add_lora(
            base, args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_targets, args.seed
        )


def saved_bytes(args: argparse.Namespace, layers: int) -> int:
    """Bytes a token that autograd keeps for the backward pass through `layers` layers, counted by
    running them on the meta device, where tensors have shapes and no values.
    """
    dtype = getattr(torch, args.dtype)
    policy = ResponseLogps(with_lora(shapes_of(args.model, layers, dtype), args).to(dtype).train())
    third = [0] * (PROBE_TOKENS // 3)
    batch = make_batch([TokenPair(third, third, third)], Packing(pad_id=0), torch.device("meta"))
    parameters = {p.untyped_storage()._cdata for p in policy.parameters()}
    kept: dict[int, tuple] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = (
                storage.nbytes(),
                tensor,
            )  # the tensor, so that its storage's address stays taken
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = policy.hidden(batch)
    size = sum(size for size, _ in kept.values())
    del hidden
    return size // batch.input_ids.numel()


def memory_of(args: argparse.Namespace, load: Load, world: int, on_cuda: bool) -> Memory:
    """Peak memory of a rank: allocated on a GPU, or resident in RAM."""
    base = shapes_of(args.model)
    config, width = base.config.get_text_config(), 2 if args.dtype == "bfloat16" else 4
    blocks = logps.decoder_layers(ResponseLogps(base))
    linears = {id(m.weight) for m in blocks.modules() if isinstance(m, nn.Linear)}
    quantised = NF4_BYTES if args.quant == "nf4" else width
    weights = sum(p.numel() * (quantised if id(p) in linears else width) for p in base.parameters())
    layers = config.num_hidden_layers
    if args.shard == "full":
        one_layer = sum(p.numel() for p in blocks[0].parameters()) * width
        outside = weights - layers * one_layer
        weights = (
            weights / world + outside + 2 * one_layer
        )  # what is gathered: the root, this layer, the next
    trainable = sum(p.numel() for p in with_lora(base, args).parameters() if p.requires_grad)
    one, two = (saved_bytes(args, count) for count in (1, 2))
    per_layer, rest = (
        (two - one) * (COMPILED_SHARE if args.compile == "on" else 1),
        max(0, 2 * one - two),
    )
    if args.checkpointing == "on":
        activations = load.largest * (layers * config.hidden_size * width + 2 * per_layer + rest)
    else:
        activations = load.largest * ((layers + 1) * per_layer + rest)
    chunk = min(logps.LOGITS_CHUNK, load.responses * config.vocab_size)
    heap = 1 if on_cuda else CPU_HEAP[args.compile]
    parts = (
        0 if on_cuda else peak_memory.resident_bytes() + CPU_GROWTH,
        weights,
        trainable * 4 / world
        + trainable / layers * width
        + (trainable * 4 if args.init_adapter else 0),
        trainable * 12 / world,  # two moments and the gradient, fp32
        heap * activations,
        heap * (chunk * (width + 12) + 2 * load.responses * config.hidden_size * width),
    )
    return Memory(*(part / 2**30 for part in parts))


def decide(args: argparse.Namespace, load: Load, ranks: Ranks) -> tuple[argparse.Namespace, Memory]:
    """`args` with --compile auto and --checkpointing auto settled, and the memory that the run will
    then need.
    """
    on_cuda = ranks.device.type == "cuda"
    if args.compile == "auto":
        work = 4 * load.computed * sum(p.numel() for p in shapes_of(args.model).parameters())
        compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
        worth_it = not on_cuda and compiler and work / ranks.world > COMPILE_FLOP
        args = settings.replaced(args, compile="on" if worth_it else "off")
    if args.checkpointing == "auto":
        args = settings.replaced(args, checkpointing="off")
        memory = memory_of(args, load, ranks.world, on_cuda)
        if on_cuda:
            there = torch.cuda.get_device_properties(ranks.device).total_memory
        else:
            there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks.world
        if memory.total * 2**30 <= MEMORY_SHARE * there:
            return args, memory
        args = settings.replaced(args, checkpointing="on")
    return args, memory_of(args, load, ranks.world, on_cuda)


class Plan(NamedTuple):
    """What a run will do, and what it will need."""

    args: argparse.Namespace  # with every `auto` settled
    steps: int
    warmup_steps: int
    evaluations: list[int]  # optimiser steps after which validation runs; 0 is before the first
    world: int
    load: Load
    memory: Memory

    def as_json(self) -> dict:
        return {
            "steps": self.steps,
            "warmup_steps": self.warmup_steps,
            "evaluations": self.evaluations,
            "ranks": self.world,
            "tokens": self.load.tokens,
            "padding_tokens": self.load.computed - self.load.tokens,
            "largest_microbatch_tokens": self.load.largest,
            "total_gib": self.memory.total,  # of a rank, as the parts
            "parts_gib": self.memory._asdict(),
            "adapter_gib": self.memory.optimiser * self.world / 3,  # one copy, fp32
        }


def of_run(
    args: argparse.Namespace, pairs: list[TokenPair], packing: Packing, ranks: Ranks
) -> Plan:
    """The plan of a run on the training pairs `pairs`."""
    steps = schedule.number_of_steps(args, len(pairs))
    members = [
        schedule.pairs_of_step(step, len(pairs), args.global_batch, args.seed)
        for step in range(steps)
    ]
    load = load_of(pairs, members, packing, ranks.world, ranks.device.type == "cuda")
    args, memory = decide(args, load, ranks)
    evaluations = [
        step
        for step in range(steps + 1)
        if step == 0 or schedule.is_evaluated(step, steps, len(pairs), args)
    ]
    return Plan(
        args=args,
        steps=steps,
        warmup_steps=schedule.warmup_steps(steps, args),
        evaluations=evaluations,
        world=ranks.world,
        load=load,
        memory=memory,
    )


def show(plan: Plan, ranks: Ranks) -> None:
    """Print the plan; with --plan_json, write it too."""
    args, load = plan.args, plan.load
    least, most = load.micro_batches
    padding = load.computed - load.tokens
    how = ", ".join(
        f"{key} {getattr(args, key)}" for key in ("quant", "shard", "checkpointing", "compile")
    )
    ranks.print(
        f"steps: {plan.steps}, warm-up {plan.warmup_steps}, evaluated after "
        f"{', '.join(map(str, plan.evaluations))}"
    )
    ranks.print(
        f"tokens: {load.tokens:,} in all steps, {padding:,} more of padding "
        f"({padding / load.computed:.1%} of what is computed)"
    )
    ranks.print(
        f"accumulation: {least}{f' to {most}' if most > least else ''} micro-batches per step and "
        f"rank, {plan.world} rank(s); the largest has {load.largest:,} tokens"
    )
    ranks.print(f"peak memory of a rank, GiB ({ranks.device.type}, {args.dtype}, {how}):")
    for name, part in plan.memory._asdict().items():
        ranks.print(f"  {name:<12}{part:7.2f}")
    ranks.print(f"  {'total':<12}{plan.memory.total:7.2f}")
    if args.plan_json and ranks.main:
        disk.write_json(args.plan_json, plan.as_json())
