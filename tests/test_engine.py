"""The training engine: every layout, kernel, number of ranks and of micro-batches gives the numbers
of the plain path.
"""

import json
import math
import shutil
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_script, write_jsonl
from safetensors.torch import load_file
from test_train import ONE, metrics_of, tiny_policy, train_args, val_pairs
from torch.nn.attention.flex_attention import flex_attention

import train_pref
from pref.files.console import UserError
from pref.model import logps
from pref.model.attention import branch_attention
from pref.model.chat import TokenPair
from pref.model.flex import block_mask
from pref.model.logps import (
    ResponseLogps,
    TargetLogps,
    check_logps,
    logps_of,
    slopes_of,
    sum_by_row,
)
from pref.model.packing import Packing, fill_bins, layout_rows, make_batch, share_out
from pref.training import arguments, memory, schedule
from pref.training.memory import shapes_of
from pref.training.plan import load_of
from pref.training.reference import reference_key

LAYOUTS = {
    "shared, packed": Packing(2),
    "shared, padded": Packing(2, padded=True),
    "unshared, packed": Packing(2, shared=False),
    "plain": Packing(2, padded=True, shared=False),
}


@pytest.fixture(scope="module", name="val_pairs")
def pairs_of_val(tiny_model, pairs_folder) -> list[TokenPair]:
    return val_pairs(tiny_model, pairs_folder)


def policy_of(model) -> ResponseLogps:
    """A policy in fp32 whose adapter is not the identity."""
    policy = tiny_policy(model)
    torch.manual_seed(5)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    return policy


def logps_and_gradients(policy, pairs, packing) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Log-probs per token and per response, and the gradient of a weighted sum of margins."""
    batch = make_batch(pairs, packing, ONE.device)
    logps = policy(batch)[0]
    chosen, rejected = sum_by_row(logps, batch).chunk(2)
    policy.zero_grad()
    margins = chosen - rejected  # not through a sigmoid, which would be saturated
    (margins * torch.linspace(1, 2, len(pairs))).sum().backward()
    grads = {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad}
    return logps.detach(), torch.stack([chosen, rejected]).detach(), grads


def assert_equal(one: tuple, other: tuple, tolerance: float = 1e-5) -> None:
    for a, b in zip(one[:2], other[:2]):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance)
    for name in one[2]:
        size = one[2][name].norm()
        assert size > 0 and (one[2][name] - other[2][name]).norm() <= tolerance * size, name


# ---- layouts ------------------------------------------------------------------------------------


def test_the_layout_that_packings_docstring_shows():
    pairs = [TokenPair([11, 12], [21, 22], [31]), TokenPair([13], [23], [32, 33])]
    batch = make_batch(pairs, Packing(0), ONE.device)
    assert batch.input_ids.tolist() == [[11, 12, 21, 22, 31, 13, 23, 32, 33]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 1, 2]]
    assert layout_rows(batch.mask) == [(0, 2, 2, 1), (5, 1, 1, 2)]
    assert batch.targets.tolist() == [21, 22, 23, 31, 32, 33]
    assert batch.positions.tolist() == [1, 2, 5, 1, 5, 7]
    assert batch.segments.tolist() == [0, 0, 1, 2, 3, 3]
    assert batch.lengths.tolist() == [2, 1, 1, 2] and batch.chosen_tokens == 3
    sizes = [TokenPair([0] * (size - 2), [0], [0]) for size in (6, 5, 4, 3, 2)]
    assert fill_bins([0, 1, 2, 3, 4], sizes, Packing(0, tokens=11), 1) == [[0, 3, 4], [1, 2]]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "plain"])
def test_every_layout_has_the_plain_batchs_logps_and_gradients(tiny_model, val_pairs, layout):
    policy = policy_of(tiny_model)
    assert_equal(
        *(logps_and_gradients(policy, val_pairs, LAYOUTS[name]) for name in ("plain", layout))
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_plain_path_is_the_models_own_forward(tiny_model, val_pairs, attention):
    policy, batch = policy_of(tiny_model), make_batch(val_pairs, LAYOUTS["plain"], ONE.device)
    own = policy(batch, own_attention=attention)[0]
    assert torch.allclose(policy(batch)[0], own, rtol=1e-5, atol=1e-5)


def test_a_response_is_blind_to_its_neighbours(tiny_model, val_pairs):
    """Changing one response changes no other log-prob in the micro-batch, neither in its own pair
    nor in others.
    """
    policy = policy_of(tiny_model)
    changed = [
        val_pairs[0],
        val_pairs[1]._replace(rejected=[7] * 9 + val_pairs[1].rejected),
        val_pairs[2],
    ]
    sums = []
    for pairs in (val_pairs[:3], changed):
        batch = make_batch(pairs, LAYOUTS["shared, packed"], ONE.device)
        sums.append(sum_by_row(policy(batch)[0], batch))
    same = (sums[0] - sums[1]).abs() < 1e-4
    assert same.tolist() == [True, True, True, True, False, True]


@pytest.mark.slow
def test_compiled_layers_equal_eager_ones(tiny_model, val_pairs):
    """Also for other numbers of tokens and pairs than compiled first, and for a single pair."""
    eager, compiled = policy_of(tiny_model), policy_of(tiny_model)
    compiled.prepare_layers(compiled=True, checkpointed=False)
    for pairs in (val_pairs[:4], val_pairs, val_pairs[2:3]):
        assert_equal(
            *(logps_and_gradients(p, pairs, LAYOUTS["shared, packed"]) for p in (eager, compiled))
        )


def kept_bytes(policy, batch) -> int:
    """Bytes that autograd saves in one forward pass through the layers."""
    sizes = {}

    def keep(tensor):
        sizes[tensor.untyped_storage()._cdata] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = policy.hidden(batch)
    del hidden
    return sum(size for size, _ in sizes.values())


def test_checkpointing_keeps_less_and_changes_nothing(tiny_model, val_pairs):
    plain, checkpointed = policy_of(tiny_model), policy_of(tiny_model)
    checkpointed.prepare_layers(compiled=False, checkpointed=True)
    assert_equal(
        *(
            logps_and_gradients(p, val_pairs, LAYOUTS["shared, packed"])
            for p in (plain, checkpointed)
        )
    )
    batch = make_batch(val_pairs, LAYOUTS["shared, packed"], ONE.device)
    assert kept_bytes(checkpointed, batch) < kept_bytes(plain, batch) / 4


def test_meta_device_counts_what_a_step_keeps(tiny_model, val_pairs):
    """The plan's bytes per token, counted without weights, against a real forward pass."""
    policy = policy_of(tiny_model)
    batch = make_batch(val_pairs, LAYOUTS["shared, packed"], ONE.device)
    weights = sum(
        p.untyped_storage().nbytes()
        for p in {p.untyped_storage()._cdata: p for p in policy.parameters()}.values()
    )
    args = arguments.parse_args(
        ["--model", str(tiny_model), "--dtype", "float32", "--lora_r", "4", "--lora_dropout", "0"]
    )
    kept = memory.sizes_of(args, on_cuda=False).kept
    measured = (kept_bytes(policy, batch) - weights) / batch.tokens
    assert sum(kept.layers) + kept.rest == pytest.approx(measured, rel=0.1)


# ---- attention ----------------------------------------------------------------------------------

ROWS = torch.tensor([[[(0, 5, 7, 6), (18, 3, 4, 0), (25, 9, 40, 33), (0, 0, 0, 0)]]])
TOKENS = 107


def visible() -> torch.Tensor:
    """(T, T) written out token by token: which key each query sees."""
    mask = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    for start, prompt, first, second in ROWS[0, 0].tolist():
        branch = [0] * prompt + [1] * first + [2] * second
        for q in range(len(branch)):
            for k in range(q + 1):
                mask[start + q, start + k] = branch[k] in (0, branch[q])
    return mask


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_branch_attention_against_masked_attention(kv_heads):
    torch.manual_seed(0)
    q = torch.randn(1, 4, TOKENS, 16, requires_grad=True)
    k, v = (torch.randn(1, kv_heads, TOKENS, 16, requires_grad=True) for _ in range(2))
    upstream = torch.randn(1, 4, TOKENS, 16)
    results = []
    for attention in (
        lambda: branch_attention(q, k, v, ROWS, 0.3)[0],
        lambda: F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible(), scale=0.3, enable_gqa=True
        ),
    ):
        output = attention()
        results.append([output, *torch.autograd.grad(output, (q, k, v), upstream)])
    for ours, expected in zip(*results):
        assert torch.allclose(ours, expected, atol=2e-5)


def test_branch_attention_is_a_proper_operator():
    q, k = (
        torch.randn(1, heads, TOKENS, 16).transpose(1, 2).contiguous().transpose(1, 2)
        for heads in (4, 2)
    )
    torch.library.opcheck(branch_attention, (q.requires_grad_(), k, k, ROWS, 0.3))
    # Phi and StableLM turn a part of each key: its memory then has another order than the value's.
    k.requires_grad_()
    torch.library.opcheck(branch_attention, (q, k.contiguous(), k, ROWS, 0.3))


def test_flex_attentions_mask_is_the_same_mask():
    """The BlockMask used on CUDA, evaluated by FlexAttention itself on CPU."""
    torch.manual_seed(0)
    pairs = [TokenPair([1] * p, [1] * a, [1] * b) for _, p, a, b in ROWS[0, 0, :-1].tolist() if b]
    batch = make_batch(pairs, Packing(0), ONE.device)
    length = batch.input_ids.shape[1]
    q, k, v = (torch.randn(1, 2, length, 16) for _ in range(3))
    flex = flex_attention(q, k, v, block_mask=block_mask(batch))
    assert torch.allclose(flex, branch_attention(q, k, v, batch.mask, 16**-0.5)[0], atol=2e-5)


# ---- output head --------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_head_in_chunks_against_cross_entropy(softcap, chunk):
    torch.manual_seed(0)
    weight, bias, targets = torch.randn(50, 16), torch.randn(50), torch.randint(50, (23,))
    hidden, upstream = torch.randn(23, 16, requires_grad=True), torch.randn(23)
    logps = TargetLogps.apply(hidden, weight, bias, targets, softcap, chunk, logps_of, slopes_of)
    logits = F.linear(hidden, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = -F.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(logps, expected, atol=1e-5)
    gradient, expected_gradient = (
        torch.autograd.grad(values, hidden, upstream)[0] for values in (logps, expected)
    )
    assert torch.allclose(gradient, expected_gradient, atol=1e-5)


@pytest.mark.parametrize("is_trained", [False, True])
def test_the_heads_logits_in_bf16_are_not_rounded(is_trained):
    """Against float64: log-probs, and the gradients of hidden states and of a trained weight."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(300, 64) / 2).bfloat16(), torch.randn(500, 64).bfloat16()
    logits = hidden.double() @ weight.double().t()
    targets = torch.where(torch.rand(300) < 0.5, logits.argmax(-1), torch.randint(500, (300,)))
    upstream = torch.randn(300)
    inputs = [hidden.requires_grad_(), weight.requires_grad_(is_trained)][: 1 + is_trained]
    ours = TargetLogps.apply(hidden, weight, None, targets, None, 7, logps_of, slopes_of)
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    exact_weight = exact_inputs[1] if is_trained else weight.detach().double()
    exact = -F.cross_entropy(exact_inputs[0] @ exact_weight.t(), targets, reduction="none")
    rounded, normalisers = logps_of(F.linear(hidden, weight), targets, None)
    errors = [(values.detach() - exact.detach()).abs().mean() for values in (ours, rounded)]
    assert errors[0] < 1e-4 < errors[1] / 20

    gradients = torch.autograd.grad(ours, inputs, upstream)
    right = torch.autograd.grad(exact, exact_inputs, upstream.double())
    of_rounded = slopes_of(F.linear(hidden, weight), targets, normalisers, None, upstream) @ weight
    off = [((g - r).norm() / r.norm()).item() for g, r in zip(gradients, right)]
    assert off[0] < 0.004 < (of_rounded - right[0]).norm() / right[0].norm()
    assert off[-1] < 0.02


def test_a_certain_token_has_log_prob_0_and_no_tokens_have_none():
    hidden, weight = torch.ones(40, 64).bfloat16(), torch.linspace(-3, 3, 90).bfloat16()
    weight = weight.unsqueeze(1).repeat(1, 64).requires_grad_()
    inputs = hidden.requires_grad_(), weight, None, torch.full((40,), 89)
    logps = TargetLogps.apply(*inputs, None, 7, logps_of, slopes_of)
    assert logps.max() <= 0 and logps.min() > -0.02  # without a limit it is 1e-5 above
    none = TargetLogps.apply(
        hidden[:0], weight, None, torch.zeros(0, dtype=torch.long), None, 7, logps_of, slopes_of
    )
    none.sum().backward()
    assert none.shape == (0,) and hidden.grad.count_nonzero() == weight.grad.count_nonzero() == 0


def test_in_bf16_log_probs_do_not_depend_on_what_else_is_asked_for(
    tiny_model, val_pairs, monkeypatch
):
    """The cached reference is computed without it: a difference of rounding would be the policy's.
    And the architecture's own forward, which rounds its logits, is given a head that does not.
    """
    policy = ResponseLogps(policy_of(tiny_model).model.to(torch.bfloat16))
    policy.causal[0].get_output_embeddings().weight.data *= 100
    batch, plain = (
        make_batch(val_pairs, LAYOUTS[name], ONE.device) for name in ("shared, packed", "plain")
    )
    with torch.no_grad():
        alone = policy(batch).logps
        assert torch.equal(policy(batch, "full_fwd").logps, alone)
        assert torch.equal(policy(batch, None, {"score": "brier"}).logps, alone)
        check_logps(policy, batch, plain)
        ours, own = policy(plain).logps, policy(plain, own_attention="eager").logps
        monkeypatch.setattr(logps.head, "wide", lambda _: nullcontext())
        rounded = policy(plain, own_attention="eager").logps
    assert (own - ours).abs().mean() < 1e-2 < (rounded - ours).abs().mean()


def test_frozen_weights_get_no_gradient_and_prompts_no_logits(tiny_model, val_pairs, monkeypatch):
    policy, rows = policy_of(tiny_model), []
    head, linear = policy.causal[0].get_output_embeddings(), F.linear

    def count(x, weight, *more):
        if weight is head.weight:
            rows.append(len(x))
        return linear(x, weight, *more)

    monkeypatch.setattr(logps.F, "linear", count)
    batch = make_batch(val_pairs, LAYOUTS["shared, packed"], ONE.device)
    policy(batch)[0].sum().backward()
    assert sum(rows) == sum(len(p.chosen) + len(p.rejected) for p in val_pairs) < batch.tokens
    assert all((p.grad is not None) == p.requires_grad for p in policy.parameters())


# ---- micro-batches ------------------------------------------------------------------------------


def random_pairs(count: int) -> list[TokenPair]:
    sizes = np.random.default_rng(3).integers(1, 300, (count, 3))
    return [TokenPair([0] * p, [0] * a, [0] * b) for p, a, b in sizes.tolist()]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_bins_hold_every_pair_once_within_the_budget(world):
    pairs = [*random_pairs(61), TokenPair([0] * 3000, [0], [0])]
    packing, members = Packing(0, tokens=2048), list(range(62))
    bins = fill_bins(members, pairs, packing, world)
    assert sorted(i for one in bins for i in one) == members and len(bins) % world == 0
    loads = [sum(packing.size(pairs[i]) for i in one) for one in bins]
    assert all(load <= 2048 or one == [61] for load, one in zip(loads, bins))
    if world == 1:  # at most one more than necessary
        assert len(bins) <= math.ceil(sum(loads) / 2048) + 1


@pytest.mark.parametrize(("world", "expected"), [(1, 5), (2, 6), (4, 8)])
def test_bins_never_outnumber_pairs(world, expected):
    """An empty one is computed too, with weight 0: only as many as keep the ranks in step."""
    pairs = [TokenPair([0] * 3000, [0], [0])] * 5
    bins = fill_bins(list(range(5)), pairs, Packing(0, tokens=1024), world)
    assert len(bins) == expected and sorted(map(len, bins)) == [0] * (expected - 5) + [1] * 5


@pytest.mark.parametrize(
    "packing", [Packing(0, tokens=1000), Packing(0, pairs=3, padded=True)], ids=["tokens", "pairs"]
)
@pytest.mark.parametrize("count", [1, 3, 7, 16])
def test_ranks_share_a_step_without_overlap(packing, count):
    pairs, members = random_pairs(20), list(range(2, 2 + count))
    for world in (1, 2, 4):
        shares = [share_out(members, pairs, packing, rank, world) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1  # FSDP's collectives need all ranks
        assert sorted(i for share in shares for micro in share for i in micro) == members


def test_batches_follow_from_the_seed_alone():
    """Neither the loss nor the number of ranks is an argument. Another seed, another order."""
    epochs = [
        [schedule.pairs_of_step(step, 30, 8, seed) for step in range(8)] for seed in (1, 1, 2)
    ]
    assert epochs[0] == epochs[1] != epochs[2]
    for epoch in (epochs[0][:4], epochs[0][4:]):
        assert sorted(i for step in epoch for i in step) == list(range(30))
    assert epochs[0][:4] != epochs[0][4:]


# ---- whole runs ---------------------------------------------------------------------------------

SETTINGS = {
    "1 rank, 4 micro-batches": (0, "--tokens_per_microbatch", "800"),
    "1 rank, checkpointing": (0, "--checkpointing", "on"),
    "1 rank, plain path": (
        0,
        "--packing",
        "off",
        "--prefix_sharing",
        "off",
        "--per_device_batch",
        "3",
    ),
    "2 ranks": (2, "--tokens_per_microbatch", "800"),
    "2 ranks, base sharded": (
        2,
        "--tokens_per_microbatch",
        "800",
        "--shard",
        "full",
        "--checkpointing",
        "on",
    ),
    "4 ranks": (4,),
    # A pair or two a rank; in the ragged fourth step two of the ranks have none.
    "8 ranks": (8, "--tokens_per_microbatch", "800"),
}


def train(arguments, ranks: int = 0) -> None:
    """In this process, or with several ranks as torchrun starts them."""
    if ranks:
        done = run_script("train_pref.py", *arguments, torchrun=ranks)
        assert done.returncode == 0, done.stderr[-2000:]
    else:
        assert train_pref.main([str(a) for a in arguments]) == 0


@pytest.fixture(scope="module")
def one_rank(tiny_model, pairs_folder, tmp_path_factory):
    """Five steps of 8 pairs, the ragged fourth (30 = 3 x 8 + 6) among them."""
    folder = tmp_path_factory.mktemp("engine")
    train(five_steps(tiny_model, pairs_folder, folder, "one"))
    return folder / "one"


def five_steps(model, data, results, run_id, *more):
    arguments = train_args(model, data, results, "--run_id", run_id, "--eval_steps", "2", *more)
    return (*arguments, "--epochs", "2", "--max_steps", "5")


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_ranks_accumulation_and_layout_do_not_change_the_run(
    one_rank, tiny_model, pairs_folder, setting
):
    ranks, *more = SETTINGS[setting]
    run = one_rank.parent / setting.replace(" ", "").replace(",", "_")
    train(five_steps(tiny_model, pairs_folder, run.parent, run.name, *more), ranks)
    for expected, line in zip(metrics_of(one_rank), metrics_of(run), strict=True):
        assert expected.keys() == line.keys()
        differ = {"tok_per_s", "peak_gib"}
        if "plain" in setting:
            # Two prompts per pair. And while the policy equals the reference, which was read from a
            # packed run's file, rounding alone decides which pairs count as ranked right.
            differ.add("tokens")
            differ |= {key for key in expected if "acc" in key and expected["step"] < 2}
        for key in set(expected) - differ:
            # Sums of hundreds of nats in fp32 differ in their last digits, and so do their small
            # differences.
            exact = key.endswith(("loss", "preference", "grad_norm", "lr", "epoch"))
            tolerance = 1e-5 if exact else 5e-4
            assert line[key] == pytest.approx(expected[key], rel=tolerance, abs=tolerance), key
    one, other = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one_rank, run)
    )
    for name in one:
        assert torch.allclose(one[name], other[name], atol=2e-5), name


SUMS = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import Shard, distribute_tensor
from pref.files import console
from pref.model import sharding
from pref.model.ranks import close_ranks, init_ranks

def check_gather(mesh, ranks):
    shapes = [(1,), (2, 3), (7, 2), (4,), (9, 1, 2), (3, 5)]
    dtypes = [torch.float32, torch.bfloat16]
    tensors = {{"step": torch.tensor(3.0)}}
    for number, shape in enumerate(shapes):
        full = torch.arange(torch.Size(shape).numel(), dtype=dtypes[number % 2]).view(shape)
        tensors[str(number)] = distribute_tensor(full + number, mesh, (Shard(0),))
    expected = {{name: sharding.whole(tensor) for name, tensor in tensors.items()}}
    for size in (1, 30, 2**20):  # a bucket a tensor, several buckets, one for each dtype
        sharding.BUCKET_BYTES = size
        gathered = sharding.gather(tensors, ranks)
        assert list(gathered) == (list(tensors) if ranks.main else [])
        assert all(torch.equal(gathered[name], expected[name]) for name in gathered)
        assert all(gathered[name].dtype == expected[name].dtype for name in gathered)
    ranks.print("gathered")

def main():
    ranks = init_ranks()
    mesh = init_device_mesh("cpu", (ranks.world,))
    for dtype in (torch.float32, torch.bfloat16):
        sharding.check_gradient_sum(mesh, MixedPrecisionPolicy(dtype, torch.float32), ranks)
    ranks.print("summed")
    check_gather(mesh, ranks)
    if "divided" in sys.argv:
        sharding.sum_gradients = lambda module: (
            module.set_force_sum_reduction_for_comms(True),
            module.set_gradient_divide_factor(float(ranks.world)),
        )
        sharding.check_gradient_sum(mesh, MixedPrecisionPolicy(), ranks)
    close_ranks()

console.run_main(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_gradients_are_summed_over_ranks_and_a_division_is_an_error(tmp_path, ranks):
    """The check at the start of a run, with FSDP as `shard` sets it up and as it must not be; and
    `gather` against DTensor's own full_tensor, for shapes that ranks share unevenly.
    """
    script = tmp_path / "sums.py"
    script.write_text(SUMS)
    done = run_script(script, *["divided"] * (ranks == 2), torchrun=ranks)
    assert done.stdout.splitlines()[:2] == ["summed", "gathered"], done.stderr[-2000:]
    if ranks == 2:
        assert done.returncode != 0
        text = f"torch {torch.__version__} with gloo: FSDP reduced a gradient to 1.5 over 2 ranks"
        assert f"{text} instead of 3, their sum" in done.stderr
    else:
        assert done.returncode == 0


@pytest.mark.slow
def test_a_grid_shares_one_reference(one_rank, tiny_model, pairs_folder, tmp_path, capsys):
    """Read from the cache if model and pairs are the same. Not if quantisation, dtype, template or
    pairs differ.
    """
    data = tmp_path / "data"
    shutil.copytree(pairs_folder, data, ignore=shutil.ignore_patterns("reference"))
    rows = [json.loads(line) for line in (data / "val.jsonl").read_text().splitlines()]

    def cached(*more, model=tiny_model) -> int:
        """How many of the two splits' references a run reads from the cache."""
        train(train_args(model, data, tmp_path / "r", "--max_steps", "1", *more))
        return capsys.readouterr().out.count("read from")

    assert cached("--run_id", "first") == 0
    assert cached() == 2
    assert cached("--loss", "dpo", "--beta", "2.5", "--seed", "3", "--logp", "mean") == 2
    assert (
        cached("--tau", "4", "--lora_r", "8", "--learning_rate", "1e-4", "--lora_targets", "q_proj")
        == 2
    )
    assert cached("--quant", "nf4") == 0
    assert cached("--dtype", "bfloat16") == 0
    other = tmp_path / "model"
    shutil.copytree(tiny_model, other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("'\n' + m['content']", "'\n ' + m['content']"))
    assert cached("--run_id", "template", model=other) == 0
    rows[0]["chosen"][0]["content"] += " Indeed."
    write_jsonl(data / "val.jsonl", rows)
    assert cached("--run_id", "pairs") == 0  # both splits' files share one key


def test_reference_key_follows_weights_and_tokens(val_pairs):
    key = reference_key("weights", val_pairs)
    assert key == reference_key("weights", list(val_pairs)) != reference_key("other", val_pairs)
    assert key != reference_key("weights", [val_pairs[0]._replace(prompt=[1]), *val_pairs[1:]])


# ---- the plan -----------------------------------------------------------------------------------


def test_dry_run_counts_what_the_run_does_and_loads_nothing(
    one_rank, tiny_model, pairs_folder, tmp_path, capsys
):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model, ignore=shutil.ignore_patterns("*.safetensors"))
    train(five_steps(model, pairs_folder, tmp_path / "r", "x", "--dry_run"))
    output = capsys.readouterr().out
    assert "30 train and 8 val pairs" in output
    assert "steps: 5, warm-up 1, evaluated after 0, 2, 4, 5" in output
    steps = [line for line in metrics_of(one_rank) if "lr" in line]
    assert f"tokens: {sum(line['tokens'] for line in steps):,} in all steps" in output
    assert [line["step"] for line in metrics_of(one_rank) if "eval/loss" in line] == [0, 2, 4, 5]
    assert all(
        part in output
        for part in ("weights", "adapter", "optimiser", "activations", "logits", "total")
    )
    assert not (tmp_path / "r").exists()
    train(five_steps(model, pairs_folder, tmp_path / "r", "x", "--dry_run", "4"))
    assert "4 rank(s)" in capsys.readouterr().out


def test_padding_is_counted(val_pairs):
    steps, count = (
        [list(range(len(val_pairs)))],
        partial(load_of, val_pairs, world=1, on_cuda=False),
    )
    packed, padded = (
        count(steps=steps, packing=Packing(0, pairs=8, padded=p)) for p in (False, True)
    )
    assert packed.computed == packed.tokens == padded.tokens < padded.computed
    batch = make_batch(val_pairs, Packing(0, padded=True), ONE.device)
    assert padded.computed == batch.input_ids.numel() and padded.tokens == batch.tokens


def test_shapes_without_weights(tiny_model):
    """The plan counts the model's own size, and every layer's activations."""
    whole = shapes_of(str(tiny_model))
    assert all(p.is_meta for p in whole.parameters()) and len(whole.model.layers) == 2
    args = arguments.parse_args(["--model", str(tiny_model), "--dtype", "float32"])
    kept = memory.sizes_of(args, on_cuda=False).kept
    # The first layer's input needs no gradient: nothing before it is trained.
    assert 0 < kept.rest < kept.layers[0] < kept.layers[1]


def test_sharded_nf4_is_refused():
    with pytest.raises(UserError, match="not verified"):
        arguments.check_args(arguments.parse_args(["--shard", "full", "--quant", "nf4"]), world=1)
