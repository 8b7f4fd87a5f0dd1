"""Tokens and memory of a run, computed before any weight is loaded.

Token ids and the pairs of each step give the micro-batches and their sizes (`load_of`). The model's
configuration gives the shapes of its weights, and a forward pass on the meta device the bytes that
autograd keeps per token (`kept_bytes`); together they give the memory of a rank by part
(`memory_of`). `train_pref.py --dry_run` prints the plan, and `decide` resolves `--checkpointing
auto` and `--compile auto` by it.
"""

import argparse
import os
import shutil
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig

from pref.files import disk
from pref.model import architecture, logps, lora
from pref.model.chat import TokenPair
from pref.model.logps import ResponseLogps
from pref.model.packing import FLEX_BLOCK, Packing, make_batch, share_out
from pref.model.ranks import Ranks
from pref.training import peak_memory, schedule, settings

# Bytes per weight: four bits, and a share of the doubly quantised scales.
NF4_BYTES = 0.5 + 0.127 / 8
PROBE_TOKENS = 258
# Share of the activations autograd keeps that compiled layers keep too: measured on a Llama, 18.7
# of 24.1 kB per token.
COMPILED_SHARE = 0.78
# Growth of a process on CPU before the first step, bytes: kernels, threads, check_logps.
CPU_GROWTH = 0.55 * 2**30
# Size of the C library's heap over that of the tensors in it, by --compile (measured).
CPU_HEAP = {"off": 1.5, "on": 1.15}
# Operations that take a CPU one to two minutes: from here on, half a minute of compiling pays.
COMPILE_FLOP = 4e13
# Share of the device's memory that a run without checkpointing may plan to use.
MEMORY_SHARE = 0.7


class Load(NamedTuple):
    """The micro-batches of a run, over all its steps and ranks."""

    micro_batches: tuple[int, int]  # fewest and most in one step on one rank
    tokens: int  # in total, without padding
    computed: int  # in total, with padding
    largest: int  # tokens of the largest micro-batch, with padding
    responses: int  # most response tokens in a micro-batch


class Memory(NamedTuple):
    """Peak memory of a rank by part, GiB."""

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
    """Tokens of one micro-batch that pass through the model, padding included.

    Take one pair with a prompt of 50 tokens and responses of 30 and 40. With prefix sharing it is
    one row of 50 + 30 + 40 = 120 tokens. Without, it is two rows of 80 and 90: 170 tokens packed
    end to end, 180 padded to the longest. On CUDA, FlexAttention needs multiples of FLEX_BLOCK: 120
    become 128 and 170 become 256. The 180 are a plain batch for the model's own attention.
    """
    rows = [sum(map(len, row)) for pair in pairs for row in packing.rows(pair)]  # tokens of each
    total = max(rows) * len(rows) if packing.padded else sum(rows)
    in_blocks = on_cuda and not packing.plain
    return total + (-total % FLEX_BLOCK if in_blocks else 0)


def load_of(
    pairs: list[TokenPair], steps: list[list[int]], packing: Packing, world: int, on_cuda: bool
) -> Load:
    """Count the micro-batches and tokens of a run. steps: for each optimiser step, the indices of
    its pairs.
    """
    counts, micro_batches = [], []
    for members in steps:
        for rank in range(world):
            share = share_out(members, pairs, packing, rank, world)
            counts.append(len(share))
            # An empty micro-batch only keeps this rank in step with the others.
            micro_batches += [[pairs[i] for i in micro] for micro in share if micro]
    sizes = [computed_tokens(micro, packing, on_cuda) for micro in micro_batches]
    return Load(
        micro_batches=(min(counts), max(counts)),
        tokens=sum(packing.size(pair) for micro in micro_batches for pair in micro),
        computed=sum(sizes),
        largest=max(sizes),
        responses=max(
            sum(len(pair.chosen) + len(pair.rejected) for pair in micro) for micro in micro_batches
        ),
    )


def shapes_of(model: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The model of a hub id or folder on the meta device: shapes without values."""
    return architecture.on_meta(
        AutoConfig.from_pretrained(model, trust_remote_code=False), None, dtype
    )


def with_lora(base: nn.Module, args: argparse.Namespace) -> PeftModel:
    """`base` with its adapter, both on the meta device. Raises UserError if plain PEFT would not
    load the adapter back.
    """
    with torch.device("meta"):
        adapted = lora.add_lora(
            base, args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_targets, args.seed
        )
        lora.check_loads_back(adapted)
    return adapted


class Kept(NamedTuple):
    """Bytes per token that autograd keeps for the backward pass."""

    layers: list[int]  # in each layer
    rest: int  # outside of them


def kept_bytes(args: argparse.Namespace) -> Kept:
    """What autograd keeps, counted in a forward pass on the meta device; where the architecture
    cannot be run there (it looks at values), the inputs and outputs of all linear layers.
    """
    # 1) The model with its adapter, and a batch of one pair.
    dtype, plain = getattr(torch, args.dtype), "on" not in (args.packing, args.prefix_sharing)
    adapted = with_lora(shapes_of(args.model, dtype), args).to(dtype)
    policy = ResponseLogps(adapted, settings.attention_of(args))
    layers = logps.decoder_layers(policy)
    third = [0] * (PROBE_TOKENS // 3)
    packing = Packing(pad_id=0, padded=plain, shared=not plain)
    batch = make_batch([TokenPair(third, third, third)], packing, torch.device("meta"))

    # 2) Every storage that autograd saves, once each and with the layer that it belongs to, without
    #    the parameters. The tensors are kept with their sizes: a freed storage's address could be
    #    given to another one.
    parameters = {p.untyped_storage()._cdata for p in policy.parameters()}
    saved: dict[int, tuple[int, int, torch.Tensor]] = {}
    current = [-1]

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved.setdefault(storage._cdata, (current[0], storage.nbytes(), tensor))
        return tensor

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, n=number: current.__setitem__(0, n))
        layer.register_forward_hook(lambda *_: current.__setitem__(0, -1))
    try:
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            hidden = policy.hidden(batch)
    except architecture.REJECTIONS:
        return Kept([linear_bytes(layer, dtype) for layer in layers], 0)
    tokens, sizes = batch.input_ids.numel(), [0] * (len(layers) + 1)
    for number, nbytes, _ in saved.values():
        sizes[number] += nbytes  # the last one is what has no layer
    del hidden  # held the graph, and with it the saved tensors, until here
    return Kept([size // tokens for size in sizes[:-1]], sizes[-1] // tokens)


def linear_bytes(layer: nn.Module, dtype: torch.dtype) -> int:
    """Bytes per token of the inputs and outputs of a layer's linear layers."""
    linears = [m for m in layer.modules() if isinstance(m, nn.Linear)]
    return dtype.itemsize * sum(m.in_features + m.out_features for m in linears)


def memory_of(args: argparse.Namespace, load: Load, world: int, on_cuda: bool) -> Memory:
    """Peak memory of a rank: allocated on a GPU, or resident in RAM. `args` must be settled: memory
    depends on what each `auto` resolves to.
    """
    # 1) Weights: quantised linear layers, everything else in the compute dtype. Sharded, a rank
    #    holds its share, and gathers the root and two layers, this one and the next.
    base = shapes_of(args.model)
    config, width = base.config.get_text_config(), 2 if args.dtype == "bfloat16" else 4
    blocks = architecture.find_layers(base)
    linears = {id(m.weight) for m in blocks.modules() if isinstance(m, nn.Linear)}
    linear_width = NF4_BYTES if args.quant == "nf4" else width
    weights = sum(
        p.numel() * (linear_width if id(p) in linears else width) for p in base.parameters()
    )
    layers = len(blocks)
    if args.shard == "full":
        one_layer = max(sum(p.numel() for p in block.parameters()) for block in blocks) * width
        root = weights - layers * one_layer
        weights = weights / world + root + 2 * one_layer

    # 2) Adapter (fp32, one layer gathered in the compute dtype, a copy if it is part of the
    #    reference) and optimiser (two moments and the gradient, fp32).
    trainable = sum(p.numel() for p in with_lora(base, args).parameters() if p.requires_grad)
    is_copied = args.init_adapter and args.reference_model == "start"
    reference_adapter = trainable * 4 if is_copied else 0
    adapter = trainable * 4 / world + trainable / layers * width + reference_adapter
    optimiser = trainable * 12 / world

    # 3) Activations: what the layers keep, one of them a second time for its gradient, and the
    #    rest. With checkpointing, each layer keeps its input, and two at a time are recomputed.
    kept, share = kept_bytes(args), COMPILED_SHARE if args.compile == "on" else 1
    if args.checkpointing == "on":
        per_token = layers * config.hidden_size * width + 2 * share * max(kept.layers) + kept.rest
    else:
        per_token = share * (sum(kept.layers) + max(kept.layers)) + kept.rest
    activations = load.largest * per_token

    # 4) Logits: one chunk of them in the compute dtype and three times in fp32, and the hidden
    #    states of response tokens with their gradient.
    chunk = min(logps.LOGITS_CHUNK, load.responses * config.vocab_size)
    logits = chunk * (width + 12) + 2 * load.responses * config.hidden_size * width

    heap = 1 if on_cuda else CPU_HEAP[args.compile]
    resident = peak_memory.resident_bytes()
    parts = Memory(
        process=0 if on_cuda else resident + CPU_GROWTH,
        weights=weights,
        adapter=adapter,
        optimiser=optimiser,
        activations=heap * activations,
        logits=heap * logits,
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
