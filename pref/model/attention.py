"""Micro-batches: which pairs go together, how their tokens are laid out, and the attention that
keeps them apart.

A pair is one row `[prompt | chosen | rejected]` in which both responses continue the same prompt:
positions restart after the prompt, and neither response sees the other (`--prefix_sharing off`: two
rows with a prompt each). Rows stand one after another in a single sequence without padding, as many
as fit a budget of tokens (`--packing off`: a fixed number of pairs, every row padded to the
longest). With both off a micro-batch is an ordinary padded batch with the model's own attention:
the path that the other three are compared with.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pref.model.packing import Batch


def needs_own_attention(model: str, longest: int) -> str | None:
    """Why a model (hub id or folder) whose longest sequence has `longest` tokens cannot use
    `branches`, or None.
    """
    config = AutoConfig.from_pretrained(model).get_text_config()
    if getattr(config, "attn_logit_softcapping", None):
        return f"{config.model_type} caps its attention logits"
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and longest > window:
        return f"a sequence of {longest} tokens is longer than {config.model_type}'s attention window of {window}"
    return None


def block_mask(batch: Batch) -> BlockMask:
    """FlexAttention's mask of a packed batch: within a row, a token sees the prompt and its own
    branch before it.
    """
    device, length = batch.input_ids.device, batch.input_ids.shape[1]
    row = torch.full((length,), -1, device=device)
    branch = torch.zeros(length, dtype=torch.long, device=device)
    for number, (start, prompt, first, second) in enumerate(batch.mask[0, 0, :-1].tolist()):
        row[start : start + prompt + first + second] = number
        branch[start + prompt : start + prompt + first] = 1
        branch[start + prompt + first : start + prompt + first + second] = 2

    def sees(_b, _h, q, k):
        return (q >= k) & (row[q] == row[k]) & ((branch[k] == 0) | (branch[q] == branch[k]))

    return create_block_mask(sees, None, None, length, length, device=device)


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _blocks(layout: Tensor) -> list[tuple[slice, slice, bool]]:
    """The dense blocks of the mask as (queries, keys, causal): prompt and first branch, which are
    an ordinary causal sequence; the second branch among itself; the second branch to the prompt.
    The last two share their queries.
    """
    blocks = []
    for start, prompt, first, second in layout[0, 0, :-1].tolist():
        trunk, end = slice(start, start + prompt + first), start + prompt + first
        blocks.append((trunk, trunk, True))
        if second:
            other = slice(end, end + second)
            blocks += [(other, other, True), (other, slice(start, start + prompt), False)]
    return blocks


def _all_heads(kv: Tensor, query: Tensor) -> Tensor:
    """Keys or values repeated for the query heads that share them. Inside the operator: outside,
    the repeated ones would be kept for the backward pass, and torch.compile turns their gradient's
    sum into scalar code.
    """
    groups = query.shape[1] // kv.shape[1]
    return kv.repeat_interleave(groups, dim=1) if groups > 1 else kv


@torch.library.custom_op("pref::branch_attention", mutates_args=())
def branch_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over packed rows on CPU, by flash attention on the mask's dense blocks alone.

    query (1, heads, T, D); key, value (1, heads or a divisor, T, D); layout as in Batch.mask.
    Returns the output (1, heads, T, D) and the logarithm of each query's normaliser (1, heads, T),
    fp32. Two blocks with the same queries are joined by their normalisers, as in ring attention
    (Liu et al. 2023).
    """
    key, value = (_all_heads(t, query) for t in (key, value))
    output = torch.zeros_like(query)
    normaliser = query.new_zeros(query.shape[:3], dtype=torch.float32)
    for queries, keys, causal in _blocks(layout):
        out, lse = _flash(
            query[:, :, queries], key[:, :, keys], value[:, :, keys], 0.0, causal, scale=scale
        )
        if not causal:
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
    """Gradients of branch_attention. With a query's whole output and normaliser, each block's flash
    backward gives that block's exact share.
    """
    repeated = (query, *(_all_heads(t, query) for t in (key, value)))
    gradients = tuple(torch.zeros_like(t) for t in repeated)  # zeros: padding gets none
    for queries, keys, causal in _blocks(layout):
        places = (queries, keys, keys)
        inputs = (t[:, :, place] for t, place in zip(repeated, places))
        parts = _flash_backward(
            grad[:, :, queries],
            *inputs,
            output[:, :, queries],
            lse[:, :, queries],
            0.0,
            causal,
            scale=scale,
        )
        for whole, part, place in zip(gradients, parts, places):
            if causal:  # the first to write here
                whole[:, :, place] = part
            else:
                whole[:, :, place] += part
    if key.shape == query.shape:
        return gradients
    by_group = (t.unflatten(1, (key.shape[1], -1)) for t in gradients[1:])
    return gradients[0], *(torch.sum(t, 2, out=torch.empty_like(key)) for t in by_group)


@branch_attention_backward.register_fake
def _(grad, query, key, value, output, lse, layout, scale):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx, inputs, output):
    query, key, value, layout, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, layout)


def _gradients(ctx, grad, _):
    query, key, value, output, lse, layout = ctx.saved_tensors
    return (
        *branch_attention_backward(grad, query, key, value, output, lse, layout, ctx.scale),
        None,
        None,
    )


branch_attention.register_autograd(_gradients, setup_context=_save)


def branches(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """transformers' attention function by what stands in the mask's place: a BlockMask (packed,
    CUDA), a layout (packed, CPU), or an ordinary mask. Returns (1, T, heads, D) and None.
    """
    if isinstance(attention_mask, BlockMask):
        return flex_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return branch_attention(query, key, value, attention_mask, scale)[0].transpose(1, 2), None


AttentionInterface.register("branches", branches)
AttentionMaskInterface.register("branches", sdpa_mask)
