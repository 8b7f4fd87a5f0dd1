"""What only CUDA runs, run on the CPU: FlexAttention's mask and its call, the head's chunks."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from test_engine import LAYOUTS, assert_equal, logps_and_gradients, policy_of
from test_train import ONE
from test_train import val_pairs as pairs_of_val
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from pref.files.console import UserError
from pref.model import flex, head, logps
from pref.model.chat import TokenPair
from pref.model.flex import block_mask
from pref.model.packing import Packing, make_batch


@pytest.fixture(scope="module", name="val_pairs")
def val_pairs_of_tiny_model(tiny_model, pairs_folder) -> list[TokenPair]:
    return pairs_of_val(tiny_model, pairs_folder)


def batch_of(*sizes: tuple[int, int, int], padded: bool = False):
    """Pairs of these lengths: prompt, chosen, rejected."""
    pairs = [TokenPair([1] * p, [1] * c, [1] * r) for p, c, r in sizes]
    return make_batch(pairs, Packing(0, padded=padded), ONE.device)


def visible(batch) -> torch.Tensor:
    """(T, T), query by query: which key each one sees. Padding sees itself."""
    length = batch.input_ids.shape[1]
    mask = torch.eye(length, dtype=torch.bool)
    for start, prompt, first, second in batch.layout:
        part = torch.tensor([0] * prompt + [1] * first + [2] * second)
        for q in range(len(part)):
            before = part[: q + 1]  # itself too
            mask[start + q, start : start + q + 1] = (before == 0) | (before == part[q])
    return mask


# ---- the mask -----------------------------------------------------------------------------------

BATCHES = {
    "short rows": batch_of((5, 7, 6), (3, 4, 1), (9, 40, 33)),
    "one row, blocks all visible": batch_of((300, 200, 100)),
    "several blocks a part": batch_of((130, 260, 400), (1, 1, 1), (129, 127, 128)),
    "padded rows": batch_of((30, 20, 100), (20, 20, 20), padded=True),
    "whole blocks": batch_of((128, 128, 128), (128, 256, 128)),
}


@pytest.mark.parametrize("name", BATCHES)
def test_the_mask_of_spans_is_the_mask_written_out(name):
    batch = BATCHES[name]
    length = batch.input_ids.shape[1]
    mask = block_mask(batch)
    expected = visible(batch)
    assert torch.equal(
        create_mask(mask.mask_mod, None, None, length, length, "cpu")[0, 0], expected
    )

    # The blocks, counted from the spans, are those that torch finds in all T x T elements.
    dense = create_block_mask(lambda b, h, q, k: expected[q, k], None, None, length, length, "cpu")
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, indices = (getattr(mask, f"{kind}_{what}") for what in ("num_blocks", "indices"))
        assert counts.dtype == indices.dtype == torch.int32
        assert torch.equal(counts, getattr(dense, f"{kind}_num_blocks"))
        assert torch.equal(indices, getattr(dense, f"{kind}_indices"))
    assert mask.seq_lengths == (length, length)


def test_the_mask_of_a_long_sequence_takes_no_dense_matrix():
    """T x T elements would be 1 GiB, and several times that in between."""
    row = (1000, 1500, 1400)
    batch = batch_of(*[row] * 8)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            output = function(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor):
                largest = max(largest, output.numel())
            return output

    length = batch.input_ids.shape[1]
    with Largest():
        mask = block_mask(batch)
    assert largest <= 1.01 * length * length / 128
    # Per row of blocks: more than none, and all of them on or below the diagonal.
    seen = mask.kv_num_blocks + mask.full_kv_num_blocks
    assert (seen > 0).all() and (seen[0, 0] <= torch.arange(seen.shape[-1]) + 1).all()


def test_recompilation_beyond_the_limit_is_an_error_and_not_dense_attention():
    batch = BATCHES["short rows"]
    q = torch.randn(1, 2, batch.input_ids.shape[1], 16)
    with torch._dynamo.config.patch(recompile_limit=0), pytest.raises(FailOnRecompileLimitHit):
        flex.attend(q, q, q, block_mask(batch), 0.25)


def test_kernel_options_reach_flex_attention(monkeypatch):
    seen = {}

    def record(query, key, value, **options):
        seen.update(options)
        return query

    monkeypatch.setattr(flex, "compiled_attention", lambda: record)
    monkeypatch.setattr(flex, "KERNEL_OPTIONS", {"BACKEND": "FLASH"})
    q, k = torch.randn(1, 6, 4, 16), torch.randn(1, 2, 4, 16)
    flex.attend(q, k, k, None, 0.25)
    assert seen["kernel_options"] == {"BACKEND": "FLASH"} and seen["enable_gqa"]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_flex_attention_in_a_policy_equals_the_cpus_operator(
    tiny_model, val_pairs, monkeypatch, checkpointed
):
    """Forward and backward, traced as for CUDA and then run by torch's reference of the kernel, for
    several lengths one after another: the first is compiled as a constant, the others are not.
    """
    # torch refuses gradients on the CPU, because it has no kernel for them there.
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    traced = torch.compile(flex_attention, fullgraph=True, backend=backend)
    monkeypatch.setattr(flex, "compiled_attention", lambda: traced)
    ours, theirs = policy_of(tiny_model), policy_of(tiny_model)
    theirs.prepare_layers(compiled=False, checkpointed=checkpointed)
    hidden = theirs.hidden
    theirs.hidden = lambda batch: hidden(batch._replace(mask=block_mask(batch)))
    for some in (val_pairs[:2], val_pairs[:4], val_pairs[3:6], val_pairs):
        assert_equal(
            *(logps_and_gradients(p, some, LAYOUTS["shared, packed"]) for p in (ours, theirs))
        )
    # Not once for every mask: T fixed, T variable, and perhaps a T of a single block. One, if torch
    # knows T as a variable from the other case.
    assert 1 <= len(graphs) <= 3


# ---- the head -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "vocabulary, on_cpu, on_cuda",
    [
        (32_000, 524, 1024),
        (128_256, 130, 1024),
        (4096, 4096, 4096),
        (5000, 3355, 3328),
        (2**25, 1, 1024),
    ],
)
def test_chunks_of_the_head_fill_tiles_on_cuda(vocabulary, on_cpu, on_cuda):
    assert head.chunk_tokens(vocabulary, on_cuda=False) == on_cpu
    assert head.chunk_tokens(vocabulary, on_cuda=True) == on_cuda
    assert on_cuda % 256 == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_a_policy_prepared_for_cuda(tiny_model, val_pairs, monkeypatch, compiled):
    """Its numbers are the same; the head is compiled whatever --compile says, and in compiled
    layers too a recompilation beyond the limit stops the run.
    """
    functions, config = [], torch._dynamo.config
    monkeypatch.setattr(torch, "compile", lambda f, **options: functions.append((f, options)) or f)
    ours, theirs = policy_of(tiny_model), policy_of(tiny_model)
    with config.patch(fail_on_recompile_limit_hit=False, recompile_limit=8):
        theirs.prepare_layers(compiled=compiled, checkpointed=False, on_cuda=True)
        assert config.fail_on_recompile_limit_hit and config.recompile_limit == flex.VERSIONS
    layers = len(logps.decoder_layers(theirs)) if compiled else 0
    assert functions[layers:] == [(logps.logps_of, {}), (logps.slopes_of, {})]
    assert theirs.chunk_tokens % 256 == 0
    packing = LAYOUTS["shared, packed"]
    assert_equal(*(logps_and_gradients(policy, val_pairs, packing) for policy in (ours, theirs)))


def test_a_plain_batch_needs_no_compiler_on_cuda(tiny_model):
    policy = policy_of(tiny_model)
    logps.set_attention(policy.causal[0], "sdpa")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False, recompile_limit=8):
        policy.prepare_layers(compiled=False, checkpointed=False, on_cuda=True)
    assert policy.head_functions == (logps.logps_of, logps.slopes_of)


# ---- the start check ----------------------------------------------------------------------------


def batch_with(is_cuda: bool) -> SimpleNamespace:
    return SimpleNamespace(input_ids=SimpleNamespace(is_cuda=is_cuda))


def test_the_start_check_runs_what_training_runs_on_cuda():
    """There uncompiled FlexAttention is other code. On the CPU nothing is compiled for it."""
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    double = torch.compile(lambda x: 2 * x, backend=backend)

    def policy(_batch):
        return SimpleNamespace(logps=double(torch.ones(3)))

    for is_cuda in (False, True):
        assert logps.logps_as_trained(policy, batch_with(is_cuda)).tolist() == [2, 2, 2]
        assert len(compiled) == is_cuda


def test_what_cannot_be_compiled_is_an_error_with_a_remedy():
    def policy(_batch):
        raise TorchDynamoException("Failed to find C compiler. Please specify via CC.")

    with pytest.raises(UserError, match=r"Failed to find C compiler.*--compile off --packing off"):
        logps.logps_as_trained(policy, batch_with(is_cuda=True))
