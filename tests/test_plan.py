"""The plan of a run: micro-batches, recomputed layers, memory, evaluations and hours, for this
machine and for cards that are not in it.
"""

import argparse
import contextlib
import json
import math
import os
import random
from pathlib import Path

import pytest
import torch
from test_engine import kept_bytes
from test_train import ONE, tiny_policy, train, train_args, val_pairs
from transformers import DeepseekV2Config, LlamaConfig, MixtralConfig

import train_pref  # noqa: F401  (sets the allocator's variables)
from pref.files import allocator, disk
from pref.files.console import UserError
from pref.model.chat import TokenPair
from pref.model.packing import FLEX_BLOCK, Packing, make_batch
from pref.training import (
    arguments,
    gates,
    hardware,
    memory,
    operations,
    plan,
    run_folder,
    schedule,
    settings,
)
from pref.training.hardware import CARDS, Device
from pref.training.memory import Kept, Sizes

LAYERS = 32
# Llama-2-7B with LoRA r 64 on all linear layers, and what autograd keeps of it with dropout: by
# hand 4 x 4096 x 4096 + 3 x 4096 x 11008 weights in a layer, and 64 x (in + out) of each for LoRA.
LLAMA = Sizes(
    parameters=6_738_415_616,
    linear=LAYERS * (4 * 4096 * 4096 + 3 * 4096 * 11008),
    used=LAYERS * (4 * 4096 * 4096 + 3 * 4096 * 11008),
    largest_linear=4096 * 11008,
    largest_block=202_383_360,
    layers=LAYERS,
    hidden=4096,
    vocabulary=32000,
    attention=4096,
    trainable=LAYERS * 64 * (4 * 8192 + 3 * 15104),
    kept=Kept([275_000] * LAYERS, 40_000),
)
PACKING = Packing(0, tokens=8192)


def settled(*more: str) -> argparse.Namespace:
    args = arguments.parse_args(["--quant", "nf4", "--dtype", "bfloat16", *more])
    return args if args.compile != "auto" else settings.replaced(args, compile="off")


def draft_of(gib: float, on_cuda: bool = True, longest: int = 1500, world: int = 1) -> plan.Draft:
    load = plan.Load((1, 1), 10**7, 10**7, largest=8192, responses=5000)
    return plan.Draft(load, LLAMA, longest, world, Device("x", on_cuda, gib * 2**30, {}))


def need(args: argparse.Namespace, draft: plan.Draft, **changes) -> float:
    """GiB for one micro-batch as large as `args` allows."""
    args = settings.replaced(args, **changes)
    load = draft.load._replace(largest=max(args.tokens_per_microbatch, draft.longest))
    return plan.memory_of(args, load, draft).total


# ---- micro-batches and recomputed layers ---------------------------------------------------------


def test_the_budget_is_lowered_before_a_layer_is_recomputed():
    """On an 80 GB card 8,192 tokens do not fit without recomputation; fewer of them do."""
    draft = draft_of(79.1)
    args = plan.decide(settled(), PACKING, draft)
    tokens, room = args.tokens_per_microbatch, 79.1 * plan.MEMORY_SHARE["cuda"]
    assert args.checkpointing == "off" and 4096 <= tokens < 8192 and tokens % FLEX_BLOCK == 0
    assert need(args, draft) <= room < need(args, draft, tokens_per_microbatch=tokens + FLEX_BLOCK)
    # As many tokens as the user allows, where all fit.
    big = plan.decide(settled(), PACKING, draft_of(178.3))
    assert (big.tokens_per_microbatch, big.checkpointing) == (8192, "off")


@pytest.mark.parametrize("longest", [1500, 3000])
def test_no_more_layers_are_recomputed_than_must_be(longest):
    draft = draft_of(23.5, longest=longest)
    args = plan.decide(settled(), PACKING, draft)
    count, room = int(args.checkpointing), 23.5 * plan.MEMORY_SHARE["cuda"]
    tokens, least = args.tokens_per_microbatch, {1500: 2048, 3000: 3072}[longest]
    assert 0 < count < LAYERS and tokens >= least and need(args, draft) <= room
    fewer = str(count - 1)
    assert need(args, draft, checkpointing=fewer, tokens_per_microbatch=least) > room
    assert need(args, draft, tokens_per_microbatch=tokens + FLEX_BLOCK) > room
    # Where nothing fits, whatever takes the least memory.
    args = plan.decide(settled(), PACKING, draft_of(6, longest=longest))
    assert args.checkpointing == "31"


def test_what_the_user_says_stays():
    draft = draft_of(79.1)
    assert (
        plan.decide(settled("--checkpointing", "on"), PACKING, draft).tokens_per_microbatch == 8192
    )
    args = settled("--tokens_per_microbatch", "8192")
    args = plan.decide(args, PACKING, draft)
    assert args.tokens_per_microbatch == 8192 and 0 < int(args.checkpointing) < LAYERS
    args = plan.decide(settled("--checkpointing", "off"), PACKING, draft_of(23.5))
    assert args.checkpointing == "off" and args.tokens_per_microbatch == 2048
    by_number = plan.decide(settled(), Packing(0, pairs=4), draft)
    assert by_number.tokens_per_microbatch == 0 and by_number.checkpointing != "off"
    with pytest.raises(UserError, match="--checkpointing 40: the model has 32 layers; give on"):
        plan.decide(settled("--checkpointing", "40"), PACKING, draft)
    with pytest.raises(SystemExit):
        arguments.parse_args(["--checkpointing", "0"])


def test_on_a_cpu_all_layers_are_recomputed_or_none():
    for gib, expected in ((512, "off"), (64, "on"), (1, "on")):
        args = plan.decide(settled("--quant", "none"), PACKING, draft_of(gib, on_cuda=False))
        assert (args.checkpointing, args.tokens_per_microbatch) == (expected, 8192)


def test_on_a_cpu_micro_batches_are_large_where_there_is_room():
    """Up to 4,096 tokens where 4 pairs of 512 tokens can have so many, not the 2,048 that are the
    rule elsewhere. Fewer before anything is recomputed, and recomputed they take little.
    """
    given, draft = settled("--quant", "none", "--max_length", "512"), draft_of(0, on_cuda=False)

    def gib(tokens: int) -> float:
        load = draft.load._replace(largest=tokens, responses=tokens)
        args = settings.replaced(given, checkpointing="off")
        return plan.memory_of(args, load, draft).total / plan.MEMORY_SHARE["cpu"]

    little, much = gib(2048), gib(4096)
    cases = (much + 1, "off", 4096), (much - 1, "off", 2048), (little - 1, "on", 4096)
    for size, checkpointing, tokens in cases:
        load = draft.load._replace(largest=4096, responses=4096)
        there = draft._replace(load=load, device=draft.device._replace(bytes=size * 2**30))
        args = plan.decide(given, Packing(0, tokens=4096), there)
        assert (args.checkpointing, args.tokens_per_microbatch) == (checkpointing, tokens)


def test_memory_of_k_layers_lies_between_all_and_none():
    draft = draft_of(79.1)
    values = [
        need(settled("--checkpointing", value, "--tokens_per_microbatch", "4096"), draft)
        for value in ("off", "1", "16", "31", "on")
    ]
    assert values[:4] == sorted(values[:4], reverse=True)
    per_layer = 4096 * (275_000 - 8192) / 2**30  # what it keeps, but for its input
    assert values[0] - values[1] == pytest.approx(per_layer)
    copied = LLAMA.trainable / LAYERS * 2 / 2**30  # of the adapter in bf16: cast anew
    assert values[1] - values[2] == pytest.approx(15 * (per_layer + copied))
    # The last layer is recomputed as soon as it has been computed: that saves next to nothing, what
    # the head's logits take at another time than the layer.
    assert abs(values[4] - values[3]) < per_layer / 6


def test_checkpointing_some_layers_changes_no_gradient(tiny_model, pairs_folder):
    pairs = val_pairs(tiny_model, pairs_folder)
    batch = make_batch(pairs[:2], Packing(0), ONE.device)
    kept, gradients = [], []
    for first in (0, 1):
        policy = tiny_policy(tiny_model)
        policy.prepare_layers(compiled=False, checkpointed=first > 0, first=first)
        kept.append(kept_bytes(policy, batch))
        gradients.append(gates.logps_and_gradients(policy, batch))
    # One of two layers, and what is kept outside of them.
    assert 0.45 * kept[0] < kept[1] < 0.75 * kept[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_a_gpu_holds_more_than_weights_and_activations():
    args = settings.replaced(settled("--checkpointing", "off"), init_adapter=None)
    one, eight = (memory.memory_of(args, LLAMA, 4096, 3000, world, True) for world in (1, 8))
    weight, adapter = 4096 * 11008 * 2 / 2**30, LLAMA.trainable / 2**30
    # Two weights of NF4 computed for a product, cuBLAS, and the adapter in bf16.
    assert one.process == pytest.approx(0.6)
    assert one.buffers == pytest.approx(2 * weight + 1 / 16 + 2 * adapter)
    # Whole gradients in fp32 until they are reduced, and those of one layer twice.
    assert eight.buffers - one.buffers == pytest.approx(adapter * (4 + 8 / LAYERS))
    assert eight.optimiser == one.optimiser / 8
    on_cpu = memory.memory_of(args, LLAMA, 4096, 3000, 8, False)
    assert on_cpu.buffers == 0


def test_layers_are_compiled_in_long_runs(tiny_model, monkeypatch):
    args = arguments.parse_args(["--model", str(tiny_model)])

    def decided(computed: int, on_cuda: bool, is_here: bool = False) -> str:
        draft = draft_of(79.1, on_cuda)
        device = draft.device._replace(is_here=is_here)
        draft = draft._replace(load=draft.load._replace(computed=computed), device=device)
        return "on" if plan.pays_to_compile(args, draft) else "off"

    assert [decided(n, on_cuda=False) for n in (10**3, 10**4)] == ["off", "on"]
    assert [decided(n, on_cuda=True) for n in (10**6, 10**7)] == ["off", "on"]
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
    assert decided(10**7, on_cuda=True, is_here=True) == "off"  # there is no Triton
    path = tiny_model.parent / "quantised"
    path.mkdir()
    config = disk.read_json(tiny_model / "config.json")
    disk.write_json(
        path / "config.json", config | {"quantization_config": {"quant_method": "gptq"}}
    )
    args = settings.replaced(args, model=str(path))
    assert decided(10**7, on_cuda=True) == "off" and decided(10**7, on_cuda=False) == "on"


def test_compiled_layers_that_compute_something_else_are_an_error(
    tiny_model, pairs_folder, monkeypatch
):
    """In place of a compiler, a layer whose output is off by 1 % except where all is eager."""
    policy, state = tiny_policy(tiny_model), {"eager": False, "factor": 1.0}
    pairs = val_pairs(tiny_model, pairs_folder)
    batch = make_batch(gates.cut(pairs), Packing(0), ONE.device)
    assert len(batch.lengths) == 4 and batch.tokens <= 6 * gates.CUT_TOKENS
    assert gates.cut(pairs)[0].prompt == pairs[0].prompt[-gates.CUT_TOKENS :]
    layer = policy.causal[0].model.layers[0]
    forward = layer.forward

    @contextlib.contextmanager
    def set_stance(stance):
        state["eager"] = stance == "force_eager"
        yield
        state["eager"] = False

    def compiled(*args, **more):
        return forward(*args, **more) * (1 if state["eager"] else state["factor"])

    monkeypatch.setattr(torch.compiler, "set_stance", set_stance)
    layer.forward = compiled
    gates.check_compiled(policy, batch, torch.float32, ONE)
    assert all(p.grad is None for p in policy.parameters())
    for state["factor"] in (1.01, math.nan):
        with pytest.raises(UserError, match="differ from eager ones by .* give --compile off"):
            gates.check_compiled(policy, batch, torch.float32, ONE)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_what_the_compiler_made_is_compared(tiny_model, pairs_folder, factor):
    """The same with torch.compile, whose backend multiplies all that it computes."""
    policy = tiny_policy(tiny_model)
    batch = make_batch(val_pairs(tiny_model, pairs_folder)[:1], Packing(0), ONE.device)

    def backend(graph, inputs):
        return lambda *args: [out * factor for out in graph(*args)]

    torch._dynamo.utils.counters.clear()
    for layer in policy.causal[0].model.layers:
        layer.forward = torch.compile(layer.forward, backend=backend)
    try:
        gates.check_compiled(policy, batch, torch.float32, ONE)
        assert factor == 1
    except UserError:
        assert factor != 1
    # Two: what goes into the first layer needs no gradient.
    assert run_folder.compiled_text() == "compiled: 2 graphs, 0 graph breaks"
    torch._dynamo.reset()


# ---- evaluations --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "epochs", "ratio", "expected", "count"),
    [
        (6750, 3, 750 / 20250, 53, 4),  # the first study: every 20 would be 17 % of it
        (6750, 3, 75 / 20250, 20, 11),
        (6750, 1, 750 / 6750, 20, 4),  # a third of its steps is less than 20
        (128 * 1000, 1, 1000 / 128000, 38, 28),
        (800, 3, 1.0, 20, 5),  # 21 steps
        (64, 1, 1.0, 20, 2),
    ],
)
def test_the_default_number_of_evaluations(pairs, epochs, ratio, expected, count):
    args = arguments.parse_args(["--epochs", str(epochs)])
    steps = schedule.number_of_steps(args, pairs)
    every = schedule.eval_interval(args, steps, pairs, ratio)
    assert every == expected
    args = settings.replaced(args, eval_steps=every)
    evaluated = [n for n in range(steps + 1) if schedule.is_evaluated(n, steps, pairs, args)]
    assert len(evaluated) == count
    for given in (0, 7):
        args = settings.replaced(args, eval_steps=given)
        assert schedule.eval_interval(args, steps, pairs, ratio) == given


def test_the_share_of_evaluation_stays_below_its_limit():
    """The count of evaluations in closed form is that of `is_evaluated`."""

    def share(args: argparse.Namespace, steps: int, pairs: int, ratio: float) -> float:
        count = sum(schedule.is_evaluated(n, steps, pairs, args) for n in range(steps + 1))
        return count * ratio / 2 / (1 + count * ratio / 2)

    rng, given = random.Random(0), arguments.parse_args([])
    for _ in range(100):
        pairs, ratio = rng.randint(100, 60_000), rng.uniform(0.0001, 0.05)
        args = settings.replaced(given, epochs=rng.choice([0.5, 1, 2.5, 3]))
        steps = schedule.number_of_steps(args, pairs)
        every = schedule.eval_interval(args, steps, pairs, ratio)
        now, before = (
            share(settings.replaced(args, eval_steps=n), steps, pairs, ratio)
            for n in (every, every - 1)
        )
        assert now < 0.1 or every == max(20, -(-steps // 3))
        assert before >= 0.1 or every == 20


def test_a_run_that_is_continued_keeps_its_evaluations(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    args, begun = arguments.parse_args([]), settings.as_begun
    record = {"eval_steps": None, "eval_every": 53, "compile": "on", "checkpointing": "12"}
    disk.write_json(tmp_path / "args.json", record | {"tokens_per_microbatch": 5632})
    kept = begun(args, tmp_path)
    assert (kept.eval_steps, kept.compile, kept.checkpointing) == (53, "on", "12")
    assert kept.tokens_per_microbatch == 5632
    # Of version 1.6 on a CPU, where it was always the product.
    disk.write_json(tmp_path / "args.json", record | {"tokens_per_microbatch": 0})
    assert begun(args, tmp_path).tokens_per_microbatch == 4 * 2048
    given = arguments.parse_args(["--eval_steps", "7", "--tokens_per_microbatch", "512"])
    kept = begun(given, tmp_path)
    assert (kept.eval_steps, kept.tokens_per_microbatch) == (7, 512)
    # Of version 1.4, whose default was 20.
    disk.write_json(tmp_path / "args.json", {"eval_steps": 20, "compile": "off"})
    assert begun(args, tmp_path).eval_steps == 20 and begun(args, tmp_path).checkpointing == "auto"


@pytest.mark.parametrize(
    ("old", "new", "is_same"),
    [(20, None, True), (None, None, True), (20, 20, True), (10, None, False), (20, 10, False)],
)
def test_the_default_of_earlier_versions_is_the_same_run(tmp_path, old, new, is_same):
    disk.write_json(tmp_path / "args.json", {"eval_steps": old, "loss": "dpo"})
    if is_same:
        run_folder.check_same_run(tmp_path, {"eval_steps": new, "loss": "dpo"})
        return
    with pytest.raises(UserError, match=f"eval_steps was {old}, is {new}"):
        run_folder.check_same_run(tmp_path, {"eval_steps": new, "loss": "dpo"})


# ---- hours --------------------------------------------------------------------------------------


def test_operations_by_hand():
    """A row [p p | c c c | r] of one pair: its queries attend to 1 + 2, 3 + 4 + 5 and 3 keys."""
    pair = TokenPair([1, 1], [2, 2, 2], [3])
    shared = operations.sums_of([pair], Packing(0))
    assert shared == (6, 1 + 2 + 3 + 4 + 5 + 3, 4)
    assert operations.sums_of([pair], Packing(0, shared=False)) == (8, 18 + 1 + 2, 4)
    work = operations.work_of(LLAMA, shared, shared, shared, checkpointed=8)
    frozen, head = 2 * LLAMA.linear * 6, 2 * 4096 * 32000 * 4
    adapter, attention = 2 * LLAMA.trainable * 6, 4 * LAYERS * 4096 * 18
    assert work.reference == work.evaluation == frozen + head + adapter + attention
    assert work.training == 2 * (frozen + head) + 3 * (adapter + attention)
    assert work.recomputed == (frozen + adapter + attention) / 4
    # An A100 at full speed has 312e12 a second.
    assert operations.hours(312e12 * 3600, CARDS["a100-80"], 0.5, 2) == 1


def test_a_token_of_llama_2_7b_takes_28_gflop():
    pair = TokenPair([1] * 400, [1] * 300, [1] * 300)
    sums = operations.sums_of([pair], Packing(0))
    work = operations.work_of(LLAMA, sums, sums, sums, LAYERS)
    assert 27.6e9 < work.training / 1000 < 28.4e9
    assert (work.training + work.recomputed) / work.training == pytest.approx(1.49, abs=0.01)


def test_a_token_uses_the_experts_that_it_goes_to():
    """Two of eight; of the DeepSeek kind six of 64."""
    assert memory.expert_share(LlamaConfig()) == 1
    assert memory.expert_share(MixtralConfig(num_local_experts=8, num_experts_per_tok=2)) == 0.25
    config = DeepseekV2Config(n_routed_experts=64, num_experts_per_tok=6)
    assert memory.expert_share(config) == 6 / 64


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA RTX A6000", "a6000"),
        ("Tesla T4", None),
    ],
)
def test_a_card_is_known_by_the_drivers_name(name, card):
    assert list(hardware.cards_named(name)) == ([card] if card else [])


def test_a_plan_for_cards_that_are_not_here(tiny_model, pairs_folder, tmp_path, capsys):
    def planned(*more) -> tuple[str, dict]:
        path = tmp_path / "plan.json"
        given = ("--global_batch", "16", "--dry_run", "8", "--plan_json", path, *more)
        assert train(*train_args(tiny_model, pairs_folder, tmp_path / "r", *given)) == 0
        return capsys.readouterr().out, json.loads(path.read_text())

    shown, written = planned("--gpu", "h100", "--dtype", "auto", "--quant", "auto", "--mfu", "0.5")
    assert "(h100, bfloat16, quant nf4, shard adapters, checkpointing off, compile off)" in shown
    assert "8 rank(s) at 50% of the card's dense bf16 peak" in shown and "(989 TFLOP/s)" in shown
    assert written["device_gib"] == 79.1 and list(written["hours"]) == ["h100"]
    per_hour = 8 * 989e12 * 0.5 * 3600
    assert written["hours"]["h100"] == pytest.approx(
        sum(written["operations"][key] for key in ("training", "recomputed", "evaluation"))
        / per_hour
    )
    assert f"{written['evaluation_share']:.1%} of the run's operations" in shown
    assert "give fewer validation pairs" in shown  # 8 of them, twice and more in 6 steps

    shown, written = planned("--gpu_gib", "0.5")
    assert "warning: the plan needs" in shown and "a card with 0.5 GiB has 0.5" in shown
    assert written["hours"] == {} and "hours" not in shown  # no card has so little
    assert written["tokens_per_microbatch"] == 2048 and written["parts_gib"]["buffers"] > 0


def test_the_cards_with_a_given_memory():
    args = arguments.parse_args(["--dry_run", "--gpu_gib", "80"])
    device = hardware.device_of(args, hardware.planned_ranks(args, ONE))
    assert list(device.cards) == ["a100-80", "h100"] and device.bytes == 80 * 2**30
    assert device.on_cuda and not device.is_here


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--gpu h100", "--gpu: only with --dry_run"),
        ("--mfu 0.5", "--mfu: only with --dry_run"),
        ("--dry_run --gpu h100 --gpu_gib 80", "--gpu and --gpu_gib: give one of them"),
        ("--dry_run --gpu_gib 0", "--gpu_gib 0.0: must be above 0"),
        ("--dry_run --mfu 1.5", "--mfu 1.5: must be above 0, at most 1"),
    ],
)
def test_bad_devices_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        arguments.check_args(arguments.parse_args(given.split()), world=1)


# ---- the allocator ------------------------------------------------------------------------------


def test_the_allocators_segments_are_expandable_unless_the_user_says_otherwise():
    assert all(os.environ.get(name) for name in allocator.NAMES)  # by importing train_pref
    environment = {}
    allocator.expand_segments(environment)
    assert environment == dict.fromkeys(allocator.NAMES, "expandable_segments:True")
    for name in allocator.NAMES:
        environment = {name: "max_split_size_mb:64"}
        allocator.expand_segments(environment)
        assert environment == {name: "max_split_size_mb:64"}
    lines = Path(train_pref.__file__).read_text(encoding="utf-8").splitlines()
    first = [n for n, line in enumerate(lines) if line.startswith("import pref.files.allocator")]
    assert first[0] < lines.index("import torch")
