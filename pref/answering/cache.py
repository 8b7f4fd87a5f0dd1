"""Keys and values of all answers in flight, and the attention function that writes and reads them.

The buffers of a layer have one row per answer: (rows, K, length, D) with K key-value heads of D
channels. A pass through the model carries no padding: it is one flat sequence of N tokens, and the
cache knows row and position of each. There are two kinds of pass:

    prompts       rows      [2 2 2 2]     the tokens of a row, from its start; then, to score
                  positions [0 1 2 3]     answers, those of the next row
    next tokens   rows      [0 1 2]       one token of every row, in order
                  positions [8 3 4]

In a pass of next tokens a row attends over its own length, rounded up to a multiple of STRETCH:
rows of the same rounded length form a `Group` and share one call. So neither the shape of a call
nor its result, also in bf16, depends on how long the other rows are.
"""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from pref.model.packing import to_device

STRETCH = 256  # positions: see `group_rows`, and set to zero at a time
IMPLEMENTATION = "answers"  # name of the attention function in transformers


class Group(NamedTuple):
    """Rows that attend over the same number of positions in a pass of next tokens."""

    rows: list[int]
    length: int


def group_rows(positions: list[int]) -> list[Group]:
    """Rows 0, 1, ... by the position of their next token, rounded up.

    >>> group_rows([8, 300, 255])
    [Group(rows=[0, 2], length=256), Group(rows=[1], length=512)]
    """
    groups: dict[int, list[int]] = {}
    for row, position in enumerate(positions):
        groups.setdefault(rounded_up(position + 1), []).append(row)
    return [Group(groups[length], length) for length in sorted(groups)]


def rounded_up(length: int) -> int:
    """The next multiple of STRETCH."""
    return -(-length // STRETCH) * STRETCH


def on_device(values: list, device: torch.device) -> Tensor:
    """`values` as a tensor on `device`, which the host does not wait for."""
    return to_device([torch.tensor(values)], device)[0]


class Cache:
    """Keys and values of `rows` rows of `length` positions. Buffers are made when a layer first
    asks for them.

    A pass over next tokens reads each row beyond its end. What the row has not written there is
    masked, i.e. multiplied by 0, so it must be finite: zeros are written ahead of the longest row.
    """

    def __init__(self, rows: int, length: int):
        self.rows, self.length = rows, length
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys, values: (rows, K, length, D)
        self.zeroed = 0  # positions that hold a number in every row

    def begin(
        self,
        rows: list[int],
        positions: list[int],
        groups: list[Group] | None,
        device: torch.device,
    ) -> None:
        """Announce a pass: row and position of each token, N of both. groups: of next tokens, for
        rows 0 to N - 1; rows in none of them are free. None for prompts.
        """
        self.token_rows, self.positions = on_device(rows, device), on_device(positions, device)
        self.groups = groups
        if groups is None:
            self.prompts = [(row, len(list(run))) for row, run in itertools.groupby(rows)]
        elif len(groups) == 1:
            self.members = [slice(len(groups[0].rows))]  # all rows: a slice needs no copy
        else:
            self.members = [on_device(group.rows, device) for group in groups]
        self.masks: dict[tuple, Tensor] = {}  # shared by the layers of the pass
        end = rounded_up(max(positions) + 1)
        if end > self.zeroed:
            for buffers in self.layers.values():
                for buffer in buffers:
                    buffer[:, :, self.zeroed : end] = 0
            self.zeroed = end

    def buffers(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self.layers:
            buffers = tuple(
                new.new_empty(self.rows, new.shape[1], rounded_up(self.length), new.shape[3])
                for new in (key, value)
            )
            for buffer in buffers:
                buffer[:, :, : self.zeroed] = 0
            self.layers[layer] = buffers
        return self.layers[layer]

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_,
    ) -> tuple[Tensor, None]:
        """An attention function as transformers calls it. query (1, H, N, D), key and value
        (1, K, N, D) -> (1, N, H, D). `attention_mask` is ignored.
        """
        keys, values = self.buffers(module.layer_idx, key, value)
        keys[self.token_rows, :, self.positions] = key[0].transpose(0, 1)  # (N, K, D)
        values[self.token_rows, :, self.positions] = value[0].transpose(0, 1)
        attend = self.attend_prompt if self.groups is None else self.attend_next
        return attend(query, keys, values, sliding_window, scaling, softcap), None

    def attend_next(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        window: int | None,
        scaling: float | None,
        softcap: float | None,
    ) -> Tensor:
        """One token of each of rows 0 to N - 1."""
        heads, count, kv_heads = query.shape[1], query.shape[2], keys.shape[1]
        # The H / K query heads of a group read the same keys. Laid out as if they were that many
        # positions of one head, they need no copies of the keys.
        grouped = query[0].transpose(0, 1).reshape(count, kv_heads, heads // kv_heads, -1)
        output = query.new_zeros(*grouped.shape[:3], values.shape[3])  # (N, K, H/K, D)
        for number, (group, chosen) in enumerate(zip(self.groups, self.members, strict=True)):
            output[chosen] = weigh(
                grouped[chosen],
                keys[chosen, :, : group.length],  # (n, K, length, D)
                values[chosen, :, : group.length],
                self.next_mask(number, window),
                scaling,
                softcap,
            )
        return output.reshape(1, count, heads, -1)

    def attend_prompt(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        window: int | None,
        scaling: float | None,
        softcap: float | None,
    ) -> Tensor:
        """Prompts, one after the other, each in its own row."""
        group = query.shape[1] // keys.shape[1]
        outputs, begin = [], 0
        for row, count in self.prompts:
            row_keys, row_values = (
                buffer[row, :, :count].repeat_interleave(group, 0)[None]
                for buffer in (keys, values)
            )  # (1, H, n, D)
            part = query[:, :, begin : begin + count]
            mask = self.prompt_mask(count, window)
            outputs.append(weigh(part, row_keys, row_values, mask, scaling, softcap))
            begin += count
        return torch.cat(outputs, dim=2).transpose(1, 2)

    def next_mask(self, number: int, window: int | None) -> Tensor:
        """(n, 1, 1, length) bool: what the next token of each row of a group sees."""
        if (number, window) not in self.masks:
            chosen, length = self.members[number], self.groups[number].length
            mask = visible(self.positions[chosen], length, window)
            self.masks[number, window] = mask[:, None, None]
        return self.masks[number, window]

    def prompt_mask(self, count: int, window: int | None) -> Tensor:
        """(count, count) bool: what the tokens of a prompt see."""
        if ("prompt", count, window) not in self.masks:
            positions = torch.arange(count, device=self.positions.device)
            self.masks["prompt", count, window] = visible(positions, count, window)
        return self.masks["prompt", count, window]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of row `source` to row `target`."""
        for buffers in self.layers.values():
            for buffer in buffers:
                buffer[target, :, :length] = buffer[source, :, :length]


def visible(positions: Tensor, length: int, window: int | None) -> Tensor:
    """(n, length) bool: the keys that a token at each of n positions sees.

    Positions [0, 2], length 4, window 2:    1 0 0 0
                                             0 1 1 0
    """
    keys = torch.arange(length, device=positions.device)
    mask = keys <= positions[:, None]
    return mask if window is None else mask & (keys > positions[:, None] - window)


def weigh(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Attention. softcap: scores become softcap * tanh(score / softcap) before the softmax
    (Gemma 2).
    """
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(query.float() @ key.float().transpose(-1, -2) * scaling / softcap)
    return (scores.masked_fill(~mask, -math.inf).softmax(-1) @ value.float()).to(query.dtype)


def install(model: nn.Module, cache: Cache) -> None:
    """Let every attention layer of `model` use `cache`."""
    model.set_attn_implementation(IMPLEMENTATION)
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.answer_cache = cache


def attend(module: nn.Module, *args, **kwargs) -> tuple[Tensor, None]:
    return module.answer_cache.attend(module, *args, **kwargs)


AttentionInterface.register(IMPLEMENTATION, attend)


def uninstall(model: nn.Module, implementation: str) -> None:
    """Give the model its own attention function back."""
    model.set_attn_implementation(implementation)
    for module in model.modules():
        vars(module).pop("answer_cache", None)
