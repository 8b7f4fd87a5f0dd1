"""FlexAttention over packed rows, which is how CUDA computes attention: its mask, and its call.

Which keys a token sees is a span of the sequence with a hole in it, both known from the token alone
(`Batch.spans`). For the row that attention.py draws, prompt 2, first 2, second 1:

    index        0       1       2       3       4
    part         p       p       f       f       s
    sees        0:1     0:2     0:3     0:4     0:2 4:5      from `start` to itself, but for
    hole        0:0     0:0     0:0     0:0     2:4          `hole_start` to `hole_end`

FlexAttention computes the mask a block of 128 x 128 at a time. Blocks in which nothing is visible
are skipped, in those that are all visible `is_visible` is not asked, and the others ask it for
every element. Rows of 500 to 1,000 tokens have mostly blocks of the third kind, so it is kept
cheap: 32-bit integers, looked up by the query alone.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from pref.model.packing import FLEX_BLOCK, Batch

# Options of FlexAttention's kernels (torch's FlexKernelOptions): {"BACKEND": "FLASH"} tries
# FlashAttention 4 on a Hopper or Blackwell GPU, where the package is installed.
KERNEL_OPTIONS: dict | None = None

# Dynamo compiles a function anew for other shapes, dtypes, or with gradients, so many times, eight
# unless it is told otherwise. From then on it runs the function and all that this calls
# uncompiled. FlexAttention would then hold heads x T x T scores in fp32, 8 GiB a layer at 8,192
# tokens, with a line in the log. So that is an error: of FlexAttention by itself by `fullgraph`, in
# compiled layers by `forbid_fallback`. A layer needs about five versions (T fixed and variable,
# with gradients and without), a model with several kinds of layers more.
VERSIONS = 32


@functools.cache
def compiled_attention() -> Callable[..., Tensor]:
    """FlexAttention, compiled; made when it is first needed, because a CPU never does."""
    return torch.compile(flex_attention, fullgraph=True)


def forbid_fallback() -> None:
    """Let dynamo stop the run where it would continue uncompiled."""
    torch._dynamo.config.recompile_limit = VERSIONS
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def block_mask(batch: Batch) -> BlockMask:
    """FlexAttention's mask of a packed batch (1, T).

    The same as `create_block_mask(is_visible, ...)`, whose T x T elements take 3 GiB at 32k tokens.
    Here the visible elements of a block are counted from the spans: T x T / 128 numbers.
    """
    device, length = batch.input_ids.device, batch.input_ids.shape[1]
    # Copies, because compiled code should get tensors of their own, not parts of a larger one.
    start, hole_start, hole_end = (row.clone() for row in batch.spans)

    def is_visible(_batch, _head, q, k):
        return (k >= start[q]) & (k <= q) & ((k < hole_start[q]) | (k >= hole_end[q]))

    # 1) How many keys of each block a query sees: (T, blocks). No span ends before it starts.
    ends = torch.arange(1, length + 1, dtype=torch.int32, device=device)  # a token sees itself
    seen = keys_per_block(start, hole_start, length) + keys_per_block(hole_end, ends, length)

    # 2) Summed over the queries of a block: (blocks, blocks).
    count = seen.shape[1]
    seen = F.pad(seen, (0, 0, 0, count * FLEX_BLOCK - length))
    elements = seen.reshape(count, FLEX_BLOCK, count).sum(1)
    full = elements == FLEX_BLOCK**2
    return BlockMask.from_kv_blocks(
        *chosen_first((elements > 0) & ~full),
        *chosen_first(full),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=is_visible,
        seq_lengths=(length, length),
    )


def keys_per_block(starts: Tensor, ends: Tensor, length: int) -> Tensor:
    """How many keys of each block are within a query's span: starts, ends (T,) -> (T, blocks)."""
    first = torch.arange(0, length, FLEX_BLOCK, dtype=torch.int32, device=starts.device)
    overlap = torch.minimum(ends[:, None], first + FLEX_BLOCK)
    return (overlap - torch.maximum(starts[:, None], first)).clamp_(min=0)


def chosen_first(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of blocks: how many are chosen, (1, 1, blocks), and the indices of all, those of
    the chosen ones first and in order, (1, 1, blocks, blocks).
    """
    chosen = chosen.int()[None, None]
    indices = torch.argsort(chosen, dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), indices.int()


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """query (1, heads, T, D); key, value (1, heads or a divisor of it, T, D or another width) ->
    (1, heads, T, the values' width).

    Raises dynamo's FailOnRecompileLimitHit instead of computing without a fused kernel.
    """
    # Inside of a compiled layer it is compiled along with it.
    attention = flex_attention if torch.compiler.is_compiling() else compiled_attention()
    return attention(
        query,
        key,
        value,
        block_mask=mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=KERNEL_OPTIONS,
    )
