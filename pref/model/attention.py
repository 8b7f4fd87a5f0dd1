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
# tokens of prompt and response. Measured: 1.7 times as fast as flash attention at 350 tokens, 1.4
# times at 700, 0.9 times at 1,800. In fp32 they are slower at any length.
CHUNK_QUERIES = 256
LONGEST_BY_PRODUCTS = 1024


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


@torch.library.custom_op("pref::branch_attention", mutates_args=())
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
            before = normaliser[:, :, queries]
            both = torch.logaddexp(before, lse)
            old, new = (torch.exp(part - both).unsqueeze(-1) for part in (before, lse))
            out, lse = old * output[:, :, queries] + new * out, both
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


def _gradients_by_flash(
    inputs: Backward, rows: list[RowLayout], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`branch_attention_backward` of some rows, zeros elsewhere, by flash attention's.

    It recomputes a block's attention weights from the log-normaliser. Given the output and
    normaliser over all of a query's blocks, it returns exactly the block's share of the gradients;
    the shares are added.
    """
    grad, query, key, value, output, lse = inputs
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


def _less(tensor: Tensor, value: Tensor) -> Tensor:
    """(..., T, D) in bf16 and (..., T) in fp32 -> (..., T, D + 2) in bf16, whose product with
    columns that end in 1, 1 is that of `tensor` less `value`.

    The product itself then subtracts, in fp32, and its result is near 0 where it matters when it is
    rounded to bf16. Two numbers in bf16 hold 16 of a value's 24 bits.
    """
    high = (-value).to(tensor.dtype)
    low = (-value - high.float()).to(tensor.dtype)
    return torch.cat([tensor, high.unsqueeze(-1), low.unsqueeze(-1)], dim=-1)


def _set_by_products(
    gradients: tuple[Tensor, Tensor, Tensor],
    inputs: Backward,
    rows: list[RowLayout],
    scale: float,
) -> None:
    """Write `branch_attention_backward` of some rows into `gradients`, by products of the matrices
    themselves, which processors have units for in bf16. With the incoming gradient dO:

        P  = exp(scale Q K^T - lse)          dV = P^T dO
        dS = P * (dO V^T - rowsum(dO * O))   dQ = scale dS K      dK = scale dS^T Q

    The query heads that share a key head are rows of the same product, which adds them up.
    """
    # 1) By key head: (groups, shared, T, D + 2) and (groups, T, D + 2).
    grad, query, key, value, output, lse = inputs
    groups, width = key.shape[1], key.shape[-1]
    grad, query, output, lse, d_query = (
        t[0].unflatten(0, (groups, -1)) for t in (grad, query, output, lse, gradients[0])
    )
    queries = _less(query * scale, lse)
    grads = _less(grad, (grad.float() * output).sum(-1))
    ones = key.new_ones(*key.shape[1:3], 2)
    keys, values = (torch.cat([t[0], ones], dim=-1) for t in (key, value))

    # 2) Chunk by chunk. What is added up, for key and value, is in fp32.
    sums = tuple(torch.zeros_like(t[0], dtype=torch.float32) for t in (key, value))
    for chunk in _chunks(rows):
        own = chunk.queries.stop - chunk.queries.start
        q, g = (t[:, :, chunk.queries].flatten(1, 2) for t in (queries, grads))
        k, v = (torch.cat([t[:, at] for at in chunk.keys], dim=1) for t in (keys, values))
        weights = torch.bmm(q, k.mT).exp_()  # (groups, shared * own, keys)
        weights.unflatten(1, (-1, own))[..., -own:].tril_()
        slopes = torch.bmm(g, v.mT).mul_(weights)
        product = torch.bmm(slopes, k[..., :width]).mul_(scale)
        d_query[:, :, chunk.queries] = product.unflatten(1, (-1, own))
        for total, left, right in ((sums[0], slopes, q), (sums[1], weights, g)):
            product = torch.bmm(left.mT, right[..., :width])
            sizes = [at.stop - at.start for at in chunk.keys]
            for at, share in zip(chunk.keys, product.split(sizes, dim=1)):
                total[:, at] += share
    for start, *parts in rows:
        row = slice(start, start + sum(parts))
        for gradient, total in zip(gradients[1:], sums):
            gradient[0, :, row] = total[:, row]


@torch.library.custom_op("pref::branch_attention_backward", mutates_args=())
def branch_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
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
    inputs = Backward(grad, query, key, value, output, lse)
    if by_flash:
        gradients = _gradients_by_flash(inputs, by_flash, scale)
    else:
        gradients = tuple(torch.zeros_like(t) for t in (query, key, value))  # padding gets none
    if by_products:
        _set_by_products(gradients, inputs, by_products, scale)
    return gradients


@branch_attention_backward.register_fake
def _(grad, query, key, value, output, lse, layout, scale):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx, inputs, output):
    query, key, value, layout, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, layout)


def _gradients(ctx, grad, _grad_of_normaliser):
    query, key, value, output, lse, layout = ctx.saved_tensors
    gradients = branch_attention_backward(grad, query, key, value, output, lse, layout, ctx.scale)
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
