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
      spent on zeros (`branch_attention`).

transformers finds both as the attention implementation "branches" (`branches`, registered below).
Plain padded batches go to its ordinary attention. Which architectures may use it is decided in
architecture.py.
"""

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
from pref.model.packing import layout_rows

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


def _blocks(layout: Tensor) -> list[Block]:
    """The dense parts of the mask, row by row.

    For the row in the module's docstring: 0:4 to 0:4 causal, 4:5 to 4:5 causal, 4:5 to 0:2 full.
    The last two share their queries, the second response. Every query's first block is a causal
    one.
    """
    blocks = []
    for start, prompt, first, second in layout_rows(layout):
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
    for queries, keys, causal in _blocks(layout):
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

    Flash attention's backward recomputes a block's attention weights from the log-normaliser. Given
    the output and normaliser over all of a query's blocks, it returns exactly the block's share of
    the gradients; the shares are added.
    """
    repeated = (query, *(_all_heads(t, query) for t in (key, value)))
    gradients = tuple(torch.zeros_like(t) for t in repeated)  # zeros: padding gets none
    for queries, keys, causal in _blocks(layout):
        places = (queries, keys, keys)
        inputs = (t[:, :, place] for t, place in zip(repeated, places))
        shares = _flash_backward(
            grad[:, :, queries],
            *inputs,
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
