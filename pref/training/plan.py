"""Steps, tokens, memory and hours of a run, computed before any weight is loaded.

Token ids and the pairs of each step give the micro-batches and their sizes (`load_of`), and these
with the model's shapes the memory of a rank (memory.py). From both follows how the work is done
(`decide`): the tokens of a micro-batch, how many layers are recomputed, whether layers are
compiled, and how often the run is evaluated. `train_pref.py --dry_run` prints the plan.
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from transformers import AutoConfig

from pref.files import disk
from pref.files.console import UserError
from pref.model.chat import TokenPair
from pref.model.packing import FLEX_BLOCK, Packing, share_out
from pref.model.ranks import Ranks
from pref.training import hardware, memory, operations, schedule, settings
from pref.training.hardware import Device
from pref.training.memory import Memory, Sizes
from pref.training.operations import Sums, Work

# Operations from where on compiling pays, on one rank. A CPU takes one to two minutes for them and
# half a minute to compile; an A100 takes five minutes, and compiles for one or two.
COMPILE_FLOP = {"cpu": 4e13, "cuda": 3e16}
# Share of the device's memory that may be planned for. On a GPU the rest is for what the plan
# cannot see, of which fragmentation is the largest part where segments cannot be expanded.
MEMORY_SHARE = {"cpu": 0.7, "cuda": 0.8}
# Tokens of a micro-batch below which layers are rather recomputed. Recomputing all of them costs
# 48 % more operations for each token. Half the tokens cost one more pass through the weights, for
# NF4 3 % (A100) to 5 % (H100) of the time from 4,096 to 2,048, and small products use a GPU badly.
LEAST_TOKENS = 2048
# Tokens of a micro-batch on a CPU, if as many pairs can have so many: each micro-batch takes the
# time of 250 tokens for itself, and steps of 1,800 tokens, which did not always fit into 2,048,
# take 1.15 times as long (bench/README.md).
CPU_TOKENS = 4096


class Load(NamedTuple):
    """The micro-batches of a run, over all its steps and ranks."""

    micro_batches: tuple[int, int]  # fewest and most in one step on one rank
    tokens: int  # in total, without padding
    computed: int  # in total, with padding
    largest: int  # tokens of the largest micro-batch, with padding
    responses: int  # most response tokens in a micro-batch


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


# ---- how the work is done -----------------------------------------------------------------------


class Draft(NamedTuple):
    """What `decide` settles the last `auto` by."""

    load: Load  # with the largest micro-batches that may be chosen
    sizes: Sizes
    longest: int  # tokens of the longest pair
    world: int
    device: Device


def decide(args: argparse.Namespace, packing: Packing, draft: Draft) -> argparse.Namespace:
    """`args` with --compile, --checkpointing and --tokens_per_microbatch settled.

    Raises UserError if more layers are to be checkpointed than there are.
    """
    layers = draft.sizes.layers
    if args.checkpointing.isdecimal() and int(args.checkpointing) > layers:
        raise UserError(
            f"--checkpointing {args.checkpointing}: the model has {layers} layers; give on"
        )
    if args.compile == "auto":
        args = settings.replaced(args, compile="on" if pays_to_compile(args, draft) else "off")
    return with_memory(args, packing, draft)


def pays_to_compile(args: argparse.Namespace, draft: Draft) -> bool:
    """Whether layers are compiled with --compile auto: in long runs, where there is a compiler. On
    CUDA not those of a checkpoint that is quantised itself: its layers' code has not been tried.
    """
    kind = "cuda" if draft.device.on_cuda else "cpu"
    work = 4 * draft.load.computed * draft.sizes.parameters / draft.world
    if kind == "cuda" and is_quantised(args.model):
        return False
    return work > COMPILE_FLOP[kind] and hardware.can_compile(draft.device)


def is_quantised(model: str) -> bool:
    """Whether the checkpoint itself is quantised, as its configuration says."""
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    return hasattr(config, "quantization_config")


def with_memory(args: argparse.Namespace, packing: Packing, draft: Draft) -> argparse.Namespace:
    """`args` with the micro-batches and the checkpointed layers that cost the least time of those
    that fit into the memory.

    First the tokens of a micro-batch are lowered, down to LEAST_TOKENS or the longest pair. Only
    then are layers recomputed, and no more of them than must be. On a CPU micro-batches have
    CPU_TOKENS, if there is room, and all layers are recomputed or none. Where nothing fits, it is
    what needs the least.
    """
    # 1) What there is to choose from, the fastest first.
    on_cuda, layers = draft.device.on_cuda, draft.sizes.layers
    budgets, choices = [draft.load.largest], [args.checkpointing]
    is_free = packing.tokens and not args.tokens_per_microbatch
    if is_free and on_cuda:
        most = -(-packing.tokens // FLEX_BLOCK) * FLEX_BLOCK
        least = -(-max(draft.longest, LEAST_TOKENS) // FLEX_BLOCK) * FLEX_BLOCK
        budgets = list(range(most, min(least, most) - 1, -FLEX_BLOCK))
    elif is_free:
        budgets = [packing.tokens, settings.budget_of(args)]
    if args.checkpointing == "auto":
        # Not the last layer: its backward pass comes at once, and what it kept would be the most.
        choices = ["off", *map(str, range(1, layers))] if on_cuda else ["off", "on"]

    # 2) The first that fits.
    there = MEMORY_SHARE["cuda" if on_cuda else "cpu"] * draft.device.bytes

    def fits(checkpointing: str, tokens: int) -> bool:
        tried = settings.replaced(args, checkpointing=checkpointing)
        largest = max(tokens, draft.longest) if is_free else tokens
        if not on_cuda:
            largest = min(largest, draft.load.largest)
        load = draft.load._replace(largest=largest, responses=min(draft.load.responses, largest))
        return memory_of(tried, load, draft).total * 2**30 <= there

    found = ((c, tokens) for c in choices for tokens in budgets if fits(c, tokens))
    checkpointing, tokens = next(found, (choices[-1], budgets[-1]))
    if is_free:
        args = settings.replaced(args, tokens_per_microbatch=tokens)
    return settings.replaced(args, checkpointing=checkpointing)


def memory_of(args: argparse.Namespace, load: Load, draft: Draft) -> Memory:
    return memory.memory_of(
        args, draft.sizes, load.largest, load.responses, draft.world, draft.device.on_cuda
    )


# ---- the plan -----------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What a run will do, and what it will need."""

    args: argparse.Namespace  # with every `auto` settled
    packing: Packing
    steps: int
    warmup_steps: int
    evaluations: list[int]  # optimiser steps after which validation runs; 0 is before the first
    world: int
    device: Device
    load: Load
    layers: int
    parameters: int  # of the model
    memory: Memory
    work: Work

    @property
    def mfu(self) -> float:
        return self.args.mfu or hardware.MFU

    def hours(self, work: float) -> dict[str, float]:
        """Hours that so many operations take on each card that the device may be."""
        return {
            name: operations.hours(work, card, self.mfu, self.world)
            for name, card in self.device.cards.items()
        }

    @property
    def saved_gib(self) -> float:
        """What a run leaves on the disk: the adapter in fp32, or the model in the compute dtype."""
        if self.args.tune == "lora":
            return self.memory.optimiser * self.world / 3
        width = 2 if self.args.dtype == "bfloat16" else 4
        return self.parameters * width / 2**30

    @property
    def checkpoint_gib(self) -> float:
        """Size on disk of a checkpoint: what is trained in fp32, and the optimiser's moments."""
        if self.args.tune == "lora":
            return self.memory.optimiser * self.world
        return (self.memory.gradients + self.memory.optimiser) * self.world

    def as_json(self) -> dict:
        work = self.work
        return {
            "steps": self.steps,
            "warmup_steps": self.warmup_steps,
            "evaluations": self.evaluations,
            "evaluation_share": work.evaluation_share,
            "ranks": self.world,
            "tokens": self.load.tokens,
            "padding_tokens": self.load.computed - self.load.tokens,
            "tokens_per_microbatch": self.packing.tokens,  # 0: pairs are counted
            "largest_microbatch_tokens": self.load.largest,
            "checkpointed_layers": memory.checkpointed_layers(self.args, self.layers),
            "compile": self.args.compile,
            "total_gib": self.memory.total,  # of a rank, as the parts
            "parts_gib": self.memory._asdict(),
            "device_gib": self.device.bytes / 2**30,
            "tune": self.args.tune,
            "adapter_gib": self.saved_gib,
            "checkpoint_gib": self.checkpoint_gib,
            "operations": work._asdict(),
            "mfu": self.mfu,
            "hours": self.hours(work.of_run),
            "reference_hours": self.hours(work.reference),
        }


def of_run(
    args: argparse.Namespace,
    pairs: list[TokenPair],
    packing: Packing,
    ranks: Ranks,
    val: Sequence[TokenPair] = (),
) -> Plan:
    """The plan of a run on the training pairs `pairs` and the validation pairs `val`.

    The micro-batches are those of the plan's own `packing`. Raises UserError as `decide` does.
    """
    # 1) Steps, tokens and sizes.
    device, world = hardware.device_of(args, ranks), ranks.world
    if packing.tokens and not (device.on_cuda or args.tokens_per_microbatch):
        # A pair can have twice --max_length: two responses.
        packing = packing._replace(tokens=max(packing.tokens, min(2 * packing.tokens, CPU_TOKENS)))
    steps = schedule.number_of_steps(args, len(pairs))
    members = [
        schedule.pairs_of_step(step, len(pairs), args.global_batch, args.seed)
        for step in range(steps)
    ]
    load = load_of(pairs, members, packing, world, device.on_cuda)
    draft = Draft(
        load, memory.sizes_of(args, device.on_cuda), max(map(packing.size, pairs)), world, device
    )

    # 2) How the work is done, and the load as it then is.
    args = decide(args, packing, draft)
    if packing.tokens and args.tokens_per_microbatch not in (0, packing.tokens):
        packing = packing._replace(tokens=args.tokens_per_microbatch)
        load = load_of(pairs, members, packing, world, device.on_cuda)

    # 3) When it is evaluated, and the work of it all.
    evaluated = sum(map(packing.size, val))
    interval = schedule.eval_interval(args, steps, len(pairs), evaluated / load.tokens)
    args = settings.replaced(args, eval_steps=interval)
    evaluations = [
        step
        for step in range(steps + 1)
        if step == 0 or schedule.is_evaluated(step, steps, len(pairs), args)
    ]
    trained = [pairs[i] for step in members for i in step]
    work = operations.work_of(
        draft.sizes,
        training=operations.sums_of(trained, packing),
        evaluation=Sums(*(n * len(evaluations) for n in operations.sums_of(val, packing))),
        reference=operations.sums_of([*pairs, *val], packing),
        checkpointed=memory.checkpointed_layers(args, draft.sizes.layers),
    )
    return Plan(
        args=args,
        packing=packing,
        steps=steps,
        warmup_steps=schedule.warmup_steps(steps, args),
        evaluations=evaluations,
        world=world,
        device=device,
        load=load,
        layers=draft.sizes.layers,
        parameters=draft.sizes.parameters,
        memory=memory_of(args, load, draft),
        work=work,
    )


# ---- on the terminal ----------------------------------------------------------------------------


def show(plan: Plan, ranks: Ranks) -> None:
    """Print the plan; with --plan_json, write it too."""
    args, load = plan.args, plan.load
    least, most = load.micro_batches
    padding = load.computed - load.tokens
    ranks.print(
        f"steps: {plan.steps}, warm-up {plan.warmup_steps}, evaluated after "
        f"{', '.join(map(str, plan.evaluations))}"
    )
    ranks.print(evaluation_text(plan))
    ranks.print(
        f"tokens: {load.tokens:,} in all steps, {padding:,} more of padding "
        f"({padding / load.computed:.1%} of what is computed)"
    )
    up_to = f"of up to {plan.packing.tokens:,} tokens " if plan.packing.tokens else ""
    ranks.print(
        f"accumulation: {least}{f' to {most}' if most > least else ''} micro-batches {up_to}per "
        f"step and rank, {plan.world} rank(s); the largest has {load.largest:,} tokens"
    )
    how = ", ".join(f"{key} {getattr(args, key)}" for key in ("quant", "shard"))
    ranks.print(
        f"peak memory of a rank, GiB ({plan.device.name}, {args.dtype}, {how}, checkpointing "
        f"{layers_text(plan)}, compile {args.compile}):"
    )
    other = "gradients" if args.tune == "lora" else "adapter"
    for name, part in plan.memory._asdict().items():
        if name != other:
            ranks.print(f"  {name:<12}{part:7.2f}")
    ranks.print(f"  {'total':<12}{plan.memory.total:7.2f}")
    for line in (*hours_text(plan), memory_warning(plan)):
        if line:
            ranks.print(line)
    if args.plan_json and ranks.main:
        disk.write_json(args.plan_json, plan.as_json())


def layers_text(plan: Plan) -> str:
    """What is recomputed: off, on, or how many layers."""
    value = plan.args.checkpointing
    return f"{value} of {plan.layers} layers" if value.isdecimal() else value


def evaluation_text(plan: Plan) -> str:
    share = plan.work.evaluation_share
    text = f"evaluation: {len(plan.evaluations)} times, {share:.1%} of the run's operations"
    if share <= schedule.EVALUATION_SHARE:
        return text
    return f"{text}; for less, give fewer validation pairs or more --eval_steps"


def hours_text(plan: Plan) -> list[str]:
    """Hours on each card, and what they assume; nothing where no card is known."""
    hours = plan.hours(plan.work.of_run)
    if not hours:
        return []
    references = plan.hours(plan.work.reference)
    lines = [
        f"hours, {plan.world} rank(s) at {plan.mfu:.0%} of the card's dense bf16 peak (--mfu; an "
        "assumption, not a measurement):"
    ]
    for name, value in hours.items():
        lines.append(
            f"  {name:<12}{value:7.2f}  ({plan.device.cards[name].tflops:g} TFLOP/s), and once for "
            f"all runs on these pairs {references[name]:.2f} for the reference"
        )
    lines.append("  not counted: loading, compiling, checkpoints, waiting for the slowest rank")
    return lines


def check_held(plan: Plan) -> None:
    """Raise UserError if weights, gradients and moments of all parameters alone are more than the
    device has: numbers that are known exactly, where the rest of the plan is an estimate.
    """
    held = plan.memory.weights + plan.memory.gradients + plan.memory.optimiser
    if plan.args.tune == "full" and held * 2**30 > plan.device.bytes:
        raise UserError(
            f"--tune full: weights, gradients and moments take {held:.1f} GiB on each of "
            f"{plan.world} rank(s), and {plan.device.name} has {plan.device.bytes / 2**30:.1f}: "
            f"give {full_remedy(plan)}"
        )


def full_remedy(plan: Plan) -> str:
    """What takes less memory where all parameters are trained."""
    eight_bit = "" if plan.args.optim == "adamw_8bit" else "--optim adamw_8bit, "
    return f"more ranks, {eight_bit}a smaller model, or --tune lora"


def memory_warning(plan: Plan) -> str | None:
    """What to do if the plan needs more than a GPU has."""
    device, need = plan.device, plan.memory.total
    if not device.on_cuda or need * 2**30 <= device.bytes:
        return None
    if memory.checkpointed_layers(plan.args, plan.layers) < plan.layers - 1:
        remedy = "--checkpointing on, or a smaller --tokens_per_microbatch"
    elif plan.args.tune == "full":
        remedy = f"a smaller --max_length, {full_remedy(plan)}"
    else:
        remedy = "a smaller --max_length, --lora_r or model"
        remedy += ", or --shard full" if plan.args.shard == "adapters" and plan.world > 1 else ""
    return (
        f"warning: the plan needs {need:.1f} GiB, {device.name} has {device.bytes / 2**30:.1f}: "
        f"give {remedy}"
    )
