"""Attention over packed rows: each response sees its prompt and itself, and nothing else.

packing.py lays rows `[prompt | first | second]` one after another. The mask, written out for a row
of prompt 2, first 2, second 1 (query down, key across; 1 = visible):

            p p f f s
        p   1 . . . .      prompt and first response: an ordinary causal sequence ("trunk")
        p   1 1 . . .
        f   1 1 1 . .
        f   1 1 1 1 .
        s   1 1 . . 1      second response: the prompt, and itself causally

Two implementations of the same mask:

CUDA  FlexAttention, which skips the blocks of a BlockMask that are all zero (flex.py).
CPU   three calls of flash attention per row on the dense parts of the mask, so that no work is
      spent on zeros (`branch_attention`). In bf16 the gradients of short rows by matrix products.

transformers finds both as the attention implementation "branches" (`branches`, registered below).
Plain padded batches go to its ordinary attention. Which architectures may use it is decided in
architecture.py.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pref.files.console import UserError
from pref.model import flex
from pref.model.packing import RowLayout, layout_rows

# Arguments of an attention function that change nothing here: a window is wider than the longest
# sequence (architecture.py), dropout is off (lora.py), masks and positions are in the layout.
HARMLESS = {
    "dropout",
    "sliding_window",
    "is_causal",
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
}


# Attention's gradients by matrix products in bf16: for so many queries at a time, and up to so many
# tokens of prompt and response. Measured: 1.7 times as fast as flash attention at 1,000 tokens, 1.4
# times at 1,500, 1.1 times at 2,000, 0.8 times at 3,500. In fp32 they are slower at any length.
CHUNK_QUERIES = 256
LONGEST_BY_PRODUCTS = 2048


def unused(arguments: dict) -> tuple[str, ...]:
    """Names of the arguments that attention over packed rows would ignore although they matter:
    attention sinks, caps on the logits, biases.
    """
    return tuple(
        name
        for name, value in arguments.items()
        if name not in HARMLESS and value is not None and value is not False
    )


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Block(NamedTuple):
    """A dense part of the mask: which queries see which keys, all of them or causally."""

    queries: slice
    keys: slice
    causal: bool


def _blocks(rows: list[RowLayout]) -> list[Block]:
    """The dense parts of the mask, row by row.

    For the row in the module's docstring: 0:4 to 0:4 causal, 4:5 to 4:5 causal, 4:5 to 0:2 full.
    The last two share their queries, the second response. Every query's first block is a causal
    one.
    """
    blocks = []
    for start, prompt, first, second in rows:
        prompt_end = start + prompt
        trunk = slice(start, prompt_end + first)
        blocks.append(Block(trunk, trunk, causal=True))
        if second:
            response = slice(trunk.stop, trunk.stop + second)
            blocks.append(Block(response, response, causal=True))
            blocks.append(Block(response, slice(start, prompt_end), causal=False))
    return blocks


def _all_heads(kv: Tensor, query: Tensor) -> Tensor:
    """Keys or values (1, groups, T, D) repeated for the query heads that share them.

    Done inside the operator: outside, the repeated tensors would be kept for the backward pass, and
    torch.compile turns the sum of their gradients into scalar code.
    """
    groups = query.shape[1] // kv.shape[1]
    return kv.repeat_interleave(groups, dim=1) if groups > 1 else kv


# torch.compile finds the graphs that it keeps on disk by an operator's name, whatever its gradients
# are: the number grows with each change of `_gradients`.
@torch.library.custom_op("pref::branch_attention_2", mutates_args=())
def branch_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over packed rows on the CPU, by flash attention on the mask's dense blocks.

    query (1, heads, T, D); key, value (1, heads or a divisor of it, T, D); layout as in Batch.mask.
    Returns the output (1, heads, T, D), and the logarithm of each query's softmax normaliser
    (1, heads, T) in fp32, for the backward pass. Padding gets zeros.

    A query with two blocks has an output o_i and a log-normaliser l_i from each. As in ring
    attention (Liu et al. 2023), its output over both is

        sum_i exp(l_i - l) o_i    with    l = log sum_i exp(l_i)
    """
    key, value = (_all_heads(t, query) for t in (key, value))
    output = torch.zeros_like(query)
    normaliser = query.new_zeros(query.shape[:3], dtype=torch.float32)
    for queries, keys, causal in _blocks(layout_rows(layout)):
        out, lse = _flash(
            query[:, :, queries], key[:, :, keys], value[:, :, keys], 0.0, causal, scale=scale
        )
        if not causal:  # the queries' second block: join it to the first
            first, before = output[:, :, queries], normaliser[:, :, queries]
            share = torch.sigmoid(lse - before).unsqueeze(-1)  # exp(lse - both)
            out = torch.lerp(first.to(share.dtype), out.to(share.dtype), share)
            lse = torch.logaddexp(before, lse)
        output[:, :, queries], normaliser[:, :, queries] = out, lse
    return output, normaliser


@branch_attention.register_fake
def _(query, key, value, layout, scale):
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


class Backward(NamedTuple):
    """What the backward pass starts from: the gradient of the output, and the forward pass's
    tensors as `branch_attention` has them.
    """

    grad: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    lse: Tensor  # the log-normaliser
    delta: Tensor  # rowsum(grad * output)


def _gradients_by_flash(
    inputs: Backward, rows: list[RowLayout], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`branch_attention_backward` of some rows, zeros elsewhere, by flash attention's.

    It recomputes a block's attention weights from the log-normaliser. Given the output and
    normaliser over all of a query's blocks, it returns exactly the block's share of the gradients;
    the shares are added.
    """
    grad, query, key, value, output, lse, _ = inputs
    repeated = (query, *(_all_heads(t, query) for t in (key, value)))
    gradients = tuple(torch.zeros_like(t) for t in repeated)  # zeros: padding gets none
    for queries, keys, causal in _blocks(rows):
        places = (queries, keys, keys)
        shares = _flash_backward(
            grad[:, :, queries],
            *(t[:, :, place] for t, place in zip(repeated, places)),
            output[:, :, queries],
            lse[:, :, queries],
            0.0,
            causal,
            scale=scale,
        )
        for gradient, share, place in zip(gradients, shares, places):
            if causal:  # the first block to write to this place
                gradient[:, :, place] = share
            else:
                gradient[:, :, place] += share
    if key.shape == query.shape:
        return gradients
    # Sum over the query heads that share a key or value head.
    by_group = (t.unflatten(1, (key.shape[1], -1)) for t in gradients[1:])
    sums = (torch.sum(t, 2, out=torch.empty_like(kv)) for t, kv in zip(by_group, (key, value)))
    return gradients[0], *sums


class Chunk(NamedTuple):
    """Some queries of a row, all of one response, and the keys that they see: their own, causally,
    which are the last keys, and every key before these.
    """

    queries: slice
    keys: tuple[slice, ...]


def _chunks(rows: list[RowLayout]) -> list[Chunk]:
    """All queries, at most CHUNK_QUERIES at a time, so that few products are with masked keys. For
    the row in the module's docstring: 0:4 with keys 0:4, and 4:5 with keys 0:2 and 4:5.
    """
    chunks = []
    for start, prompt, first, second in rows:
        trunk = slice(start, start + prompt + first)
        response = slice(trunk.stop, trunk.stop + second)
        for part, seen in ((trunk, ()), (response, (slice(start, start + prompt),))):
            length = part.stop - part.start
            count = math.ceil(length / CHUNK_QUERIES)
            edges = [part.start + length * i // count for i in range(count)] + [part.stop]
            for begin, end in zip(edges, edges[1:]):
                chunks.append(Chunk(slice(begin, end), (*seen, slice(part.start, end))))
    return chunks


def _set_less(place: Tensor, tensor: Tensor, value: Tensor) -> None:
    """Set `place` (..., D + 2) to `tensor` (..., D) and two columns. Its product with columns that
    end in 1, 1 is then that of `tensor`, less `value` (...) in fp32.

    The product itself subtracts, in fp32, and its result is near 0 where it matters when it is
    rounded to bf16. Two numbers in bf16 hold 16 of a value's 24 bits.
    """
    place[..., :-2] = tensor
    place[..., -2] = -value
    place[..., -1] = -value - place[..., -2]


def _set_by_products(
    gradients: tuple[Tensor, Tensor, Tensor],
    inputs: Backward,
    rows: list[RowLayout],
    scale: float,
) -> None:
    """Write `branch_attention_backward` of some rows into `gradients`, by products of the matrices
    themselves, which processors have units for in bf16. With the incoming gradient dO:

        P  = exp(scale Q K^T - lse)          dV = P^T dO
        dS = P * (dO V^T - delta)            dQ = scale dS K      dK = scale dS^T Q

    Two products that can be computed together are one call: Q K^T with dO V^T, P^T dO with dS^T Q.
    The query heads that share a key head are rows of the same product, which adds them up.
    """
    # 1) By key head, token by token: a chunk's rows are one block. (groups, T, shared, ...)
    grad, query, key, value, _, lse, delta = inputs
    groups, length, width = key.shape[1:]
    grad, query, lse, delta, d_query = (
        t[0].unflatten(0, (groups, -1)).transpose(1, 2)
        for t in (grad, query, lse, delta, gradients[0])
    )
    shared = query.shape[2]
    left = query.new_empty(3, groups, length, shared, width + 2)
    _set_less(left[0], grad, delta)
    _set_less(left[1], query, lse)
    left[2] = left[0]
    left = left.flatten(2, 3)  # dO, Q, dO: the last two for P and dS, the first two for dV and dK
    forward, back = left[1:].flatten(0, 1), left[:2, ..., :width].flatten(0, 1)
    right = key.new_ones(2, groups, length, width + 2)
    right[0, ..., :width], right[1, ..., :width] = key[0] * scale, value[0]
    right = right.flatten(0, 1)  # (2 groups, T, D + 2): K, V

    # 2) Chunk by chunk. What is added up, for value and key, is in fp32.
    sums = torch.zeros(right.shape[:2] + (width,))
    later = torch.ones(CHUNK_QUERIES, CHUNK_QUERIES, dtype=torch.bool).triu_(1)
    limits = key.new_full(later.shape, math.inf).masked_fill_(later, -math.inf)
    for chunk in _chunks(rows):
        own = chunk.queries.stop - chunk.queries.start
        at = slice(chunk.queries.start * shared, chunk.queries.stop * shared)
        seen = [right[:, keys] for keys in chunk.keys]
        seen = seen[0] if len(seen) == 1 else torch.cat(seen, dim=1)
        both = torch.bmm(forward[:, at], seen.mT)  # (2 groups, own * shared, keys)
        weights, slopes = both.split(groups)
        weights.unflatten(1, (own, shared))[..., -own:].clamp_max_(limits[:own, None, :own])
        slopes.mul_(weights.exp_())
        product = torch.bmm(slopes, seen[:groups, :, :width])
        d_query[:, chunk.queries] = product.unflatten(1, (own, shared))
        shares = torch.bmm(both.mT, back[:, at])
        sizes = [keys.stop - keys.start for keys in chunk.keys]
        for keys, share in zip(chunk.keys, shares.split(sizes, dim=1)):
            sums[:, keys].add_(share)
    d_value, d_key = sums.split(groups)
    d_key.mul_(scale)
    for start, *parts in rows:
        row = slice(start, start + sum(parts))
        gradients[1][0, :, row], gradients[2][0, :, row] = d_key[:, row], d_value[:, row]


@torch.library.custom_op("pref::branch_attention_2_backward", mutates_args=())
def branch_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    delta: Tensor,
    layout: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `branch_attention` for query, key and value.

    By flash attention's backward, and in bf16 for rows of short sequences by matrix products.
    """
    by_flash, by_products = [], []
    for row in layout_rows(layout):
        length = row.prompt + max(row.first, row.second)
        is_short = query.dtype == torch.bfloat16 and length <= LONGEST_BY_PRODUCTS
        (by_products if is_short else by_flash).append(row)
    inputs = Backward(grad, query, key, value, output, lse, delta)
    if by_flash:
        gradients = _gradients_by_flash(inputs, by_flash, scale)
    else:
        gradients = tuple(torch.zeros_like(t) for t in (query, key, value))  # padding gets none
    if by_products:
        _set_by_products(gradients, inputs, by_products, scale)
    return gradients


@branch_attention_backward.register_fake
def _(grad, query, key, value, output, lse, delta, layout, scale):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx, inputs, output):
    query, key, value, layout, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, layout)


def _gradients(ctx, grad, _grad_of_normaliser):
    query, key, value, output, lse, layout = ctx.saved_tensors
    # Not in the operator: here torch.compile makes one pass of it.
    delta = (grad.float() * output.float()).sum(-1)
    gradients = branch_attention_backward(
        grad, query, key, value, output, lse, delta, layout, ctx.scale
    )
    return *gradients, None, None  # none for layout and scale


branch_attention.register_autograd(_gradients, setup_context=_save)


def same_width(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three with heads of one width, padded with zeros: flash attention on the CPU wants it,
    and DeepSeek's values are narrower than its keys. Zeros change no product of query and key.
    """
    width = max(query.shape[-1], value.shape[-1])
    return tuple(
        t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1]))
        for t in (query, key, value)
    )


def branches(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention as transformers calls it. The kind of mask selects the implementation.

    attention_mask: a BlockMask (packed, CUDA), an int64 layout (packed, CPU), or an ordinary mask
    or None. Returns the output (1, T, heads, D) and no attention weights. Raises UserError for an
    argument that it would ignore.
    """
    if names := unused(kwargs):
        raise UserError(
            f"{type(module).__name__} gives its attention more than packed attention uses "
            f"({', '.join(names)}); add --packing off --prefix_sharing off"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(attention_mask, BlockMask):
        output = flex.attend(query, key, value, attention_mask, scale)
        return output.transpose(1, 2), None
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    width = value.shape[-1]
    output, _ = branch_attention(*same_width(query, key, value), attention_mask, scale)
    return output[..., :width].transpose(1, 2), None


AttentionInterface.register("branches", branches)
AttentionMaskInterface.register("branches", sdpa_mask)
