"""Keys and values of all answers in flight, and the attention function that writes and reads them.

The buffers of a layer have one row per answer: (rows, K, length, D) with K key-value heads of D
channels. A pass through the model carries no padding: it is one flat sequence of N tokens, and the
cache knows row and position of each. There are two kinds of pass:

    prompts       rows      [2 2 2 2 0 0 0]     piece 1: four tokens of row 2, piece 2: three of
                  positions [0 1 2 3 5 6 7]     row 0, which holds five tokens already
    next tokens   rows      [0 1 2]             one token of each row in flight, in order
                  positions [8 3 4]
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

STRETCH = 256  # positions set to zero at a time
IMPLEMENTATION = "answers"  # name of the attention function in transformers


class Piece(NamedTuple):
    """Tokens [start, end) of a pass continue `row`, which holds `before` tokens already."""

    row: int
    start: int
    end: int
    before: int

    @property
    def after(self) -> int:
        """Tokens in the row once the piece is written."""
        return self.before + self.end - self.start


class Cache:
    """Keys and values of `rows` rows of `length` positions. Buffers are made when a layer first
    asks for them.

    Rows in flight differ in length, and a pass over their next tokens reads all of them up to the
    longest. What a shorter row has not written is masked, i.e. multiplied by 0, so it must be
    finite: zeros are written ahead of the longest row, a stretch at a time.
    """

    def __init__(self, rows: int, length: int):
        self.rows, self.length = rows, length
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys, values: (rows, K, length, D)
        self.zeroed = 0  # positions that hold a number in every row

    def begin(self, rows: Tensor, positions: Tensor, pieces: list[Piece] | None) -> None:
        """Announce a pass: row and position of each token, (N,) both. pieces: of prompts; None for
        the next token of rows 0 to N - 1.
        """
        self.token_rows, self.positions, self.pieces = rows, positions, pieces
        self.masks: dict[tuple, Tensor] = {}  # shared by the layers of the pass
        self.longest = int(positions.max()) + 1
        if self.longest > self.zeroed:
            end = self.longest + STRETCH
            for buffers in self.layers.values():
                for buffer in buffers:
                    buffer[:, :, self.zeroed : end] = 0
            self.zeroed = end

    def buffers(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self.layers:
            buffers = tuple(
                new.new_empty(self.rows, new.shape[1], self.length, new.shape[3])
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
        attend = self.attend_next if self.pieces is None else self.attend_pieces
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
        output = weigh(
            grouped,  # (N, K, H/K, D)
            keys[:count, :, : self.longest],  # (N, K, longest, D)
            values[:count, :, : self.longest],
            self.next_mask(window),
            scaling,
            softcap,
        )
        return output.reshape(1, count, heads, -1)

    def attend_pieces(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        window: int | None,
        scaling: float | None,
        softcap: float | None,
    ) -> Tensor:
        """Prompts, each over its own row."""
        group = query.shape[1] // keys.shape[1]
        outputs = []
        for piece in self.pieces:
            row_keys, row_values = (
                buffer[piece.row, :, : piece.after].repeat_interleave(group, 0)[None]
                for buffer in (keys, values)
            )  # (1, H, after, D)
            asked = query[:, :, piece.start : piece.end]  # (1, H, tokens, D)
            mask = self.piece_mask(piece, window)
            outputs.append(weigh(asked, row_keys, row_values, mask, scaling, softcap))
        return torch.cat(outputs, 2).transpose(1, 2)

    def next_mask(self, window: int | None) -> Tensor:
        """(N, 1, 1, longest) bool: what each row's next token sees."""
        if window not in self.masks:
            self.masks[window] = visible(self.positions, self.longest, window)[:, None, None]
        return self.masks[window]

    def piece_mask(self, piece: Piece, window: int | None) -> Tensor:
        """(tokens of the piece, tokens of its row) bool."""
        if (piece, window) not in self.masks:
            positions = torch.arange(piece.before, piece.after, device=self.positions.device)
            self.masks[piece, window] = visible(positions, piece.after, window)
        return self.masks[piece, window]

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
