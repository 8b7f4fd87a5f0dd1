"""Many answers at once over one base model: rows of different LoRA adapters, temperatures and ages
in one batch.

A row is filled again as soon as its answer ends, so that nobody waits for the slowest; a follow-up
that begins with what its row has computed already (turn 2 of a conversation) keeps those keys and
values. The adapters in flight are stacked: one product with all their A, a mask that leaves each
row its own, one product with all their B.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from pref.files.console import UserError
from pref.model import chat, logps, lora

GREEDY_BELOW = 1e-4  # FastChat takes the most probable token at temperatures below this
PREFILL_TOKENS = 4096  # prompt tokens that go through the model at once
STRETCH = 256  # positions
MOST_ADAPTERS = 8  # in flight: the stacked products grow with their number


@dataclass
class Request:
    """One answer to write: a prompt's token ids, whose adapter (None: the base's), how to
    sample.
    """

    prompt: list[int]
    adapter: str | None
    temperature: float
    seed: int
    max_new_tokens: int
    tag: object = None  # the caller's
    tokens: list[int] = field(default_factory=list)  # the answer so far, its end token included
    generator: torch.Generator | None = None


class Piece(NamedTuple):
    """Tokens [start, end) of a pass continue `row`, which holds `before` tokens already."""

    row: int
    start: int
    end: int
    before: int


class Cache:
    """Keys and values of all rows, and the attention that writes and reads them.

    A pass is a flat sequence of tokens, each of some row: either pieces of prompts, or the next
    token of rows 0 to n - 1 in order. Buffers are made as the model asks for them. What a shorter
    row has not written is read too, with weight 0: it must be a number, so that zeros are laid out
    ahead, a stretch at a time.
    """

    def __init__(self, rows: int, length: int):
        self.shape, self.layers, self.laid_out = (rows, length), {}, 0

    def begin(self, rows: Tensor, positions: Tensor, pieces: list[Piece] | None) -> None:
        """The pass to come: (N,) row and position of each token."""
        self.rows, self.positions, self.pieces, self.masks = rows, positions, pieces, {}
        self.longest = int(positions.max()) + 1
        if self.longest > self.laid_out:
            until = self.longest + STRETCH
            for buffers in self.layers.values():
                for one in buffers:
                    one[:, :, self.laid_out : until] = 0
            self.laid_out = until

    def attend(
        self,
        module,
        query,
        key,
        value,
        attention_mask=None,
        scaling=None,
        sliding_window=None,
        softcap=None,
        **_,
    ) -> tuple[Tensor, None]:
        """transformers' attention function. query (1, H, N, D), key and value (1, K, N, D) -> (1,
        N, H, D).
        """
        if module.layer_idx not in self.layers:
            rows, length = self.shape
            self.layers[module.layer_idx] = tuple(
                one.new_empty(rows, one.shape[1], length, one.shape[3]) for one in (key, value)
            )
            for one in self.layers[module.layer_idx]:
                one[:, :, : self.laid_out] = 0
        keys, values = self.layers[module.layer_idx]
        keys[self.rows, :, self.positions] = key[0].transpose(0, 1)
        values[self.rows, :, self.positions] = value[0].transpose(0, 1)
        heads, count, kv_heads = query.shape[1], query.shape[2], key.shape[1]
        group = heads // kv_heads
        if (
            self.pieces is None
        ):  # the heads of a group ask the same keys: as if they were that many positions
            asked = query[0].transpose(0, 1).reshape(count, kv_heads, group, -1)
            seen = (one[:count, :, : self.longest] for one in (keys, values))
            output = weigh(asked, *seen, self.next_mask(sliding_window), scaling, softcap)
            return output.reshape(1, count, heads, -1), None
        outputs = []
        for piece in self.pieces:
            seen = [
                one[piece.row, :, : piece.before + piece.end - piece.start]
                for one in (keys, values)
            ]
            seen = [one.repeat_interleave(group, 0)[None] for one in seen]
            mask = self.piece_mask(piece, sliding_window)
            outputs.append(
                weigh(query[:, :, piece.start : piece.end], *seen, mask, scaling, softcap)
            )
        return torch.cat(outputs, 2).transpose(1, 2), None

    def next_mask(self, window: int | None) -> Tensor:
        """(n, 1, 1, longest): what each row's next token sees."""
        if window not in self.masks:
            self.masks[window] = visible(self.positions, self.longest, window)[:, None, None]
        return self.masks[window]

    def piece_mask(self, piece: Piece, window: int | None) -> Tensor:
        """(tokens, tokens with those before)."""
        if (piece, window) not in self.masks:
            after = piece.before + piece.end - piece.start
            positions = torch.arange(piece.before, after, device=self.positions.device)
            self.masks[piece, window] = visible(positions, after, window)
        return self.masks[piece, window]

    def move(self, source: int, target: int, length: int) -> None:
        """Row `source` becomes row `target`."""
        for buffers in self.layers.values():
            for one in buffers:
                one[target, :, :length] = one[source, :, :length]


def visible(positions: Tensor, length: int, window: int | None) -> Tensor:
    """(n, length) bool: the keys that a token at each position sees."""
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
):
    """Attention, squashed before the softmax where the architecture does so (Gemma 2)."""
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(query.float() @ key.float().transpose(-1, -2) * scaling / softcap)
    return (scores.masked_fill(~mask, -math.inf).softmax(-1) @ value.float()).to(query.dtype)


def attend(module, *args, **kwargs):
    return module.answer_cache.attend(module, *args, **kwargs)


AttentionInterface.register("answers", attend)


class Stack(NamedTuple):
    """The adapters in flight of one linear layer, their ranks end to end (R in all)."""

    a: Tensor  # (R, in)
    b: Tensor  # (R, out)
    owners: tuple[int, ...]  # (R,) number of the adapter of each
    scales: tuple[float, ...]  # (R,)


class Adapters:
    """LoRA adapters by name. Those in flight are loaded and stacked, the others stay on disk."""

    def __init__(self, model: PreTrainedModel, folders: dict[str, Path]):
        self.linears = {
            name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
        }
        self.folders, self.dtype, self.device = folders, model.dtype, model.device
        self.loaded: dict[str, dict] = {}
        self.stacks: dict[str, Stack] = {}
        self.numbers: dict[str, int] = {}
        self.rows: Tensor | None = (
            None  # number of each token's adapter in this pass; None: all are the base's
        )
        for name, folder in folders.items():
            for layer in check_adapter(name, folder, self.linears):
                module = self.linears[layer]
                if not isinstance(module.forward, partial):
                    module.forward = partial(self.forward, layer, module.forward)

    def use(self, names: Iterable[str | None]) -> None:
        """Stack the adapters `names`, unless they are stacked already."""
        names = sorted(set(names) - {None})
        if all(name in self.numbers for name in names):
            return
        self.loaded = {name: self.loaded.get(name) or self.load(name) for name in names}
        self.numbers = {name: number for number, name in enumerate(names)}
        self.stacks = {}
        for layer in {layer for weights in self.loaded.values() for layer in weights}:
            parts = [
                (self.numbers[name], *self.loaded[name][layer])
                for name in names
                if layer in self.loaded[name]
            ]
            owners = [number for number, a, _, _ in parts for _ in range(len(a))]
            scales = [scale for _, a, _, scale in parts for _ in range(len(a))]
            a, b = (torch.cat([part[i] for part in parts]) for i in (1, 2))
            self.stacks[layer] = Stack(a, b, tuple(owners), tuple(scales))

    def load(self, name: str) -> dict[str, tuple[Tensor, Tensor, float]]:
        """By layer: A (r, in), B transposed (r, out), scaling."""
        config, found = lora.lora_config(self.folders[name]), {}
        with safe_open(self.folders[name] / "adapter_model.safetensors", framework="pt") as file:
            for layer in lora.lora_layers(file):
                a, b = (
                    file.get_tensor(f"base_model.model.{layer}.lora_{side}.weight").to(
                        self.device, self.dtype
                    )
                    for side in "AB"
                )
                scaling = config.lora_alpha / (math.sqrt(len(a)) if config.use_rslora else len(a))
                found[layer] = (a, b.t().contiguous(), scaling)
        return found

    def begin(self, names: list[str | None]) -> None:
        """The pass to come: the adapter of each of its tokens."""
        self.masks: dict[tuple, Tensor] = {}
        self.rows = None
        if any(names):
            self.rows = torch.tensor(
                [-1 if name is None else self.numbers[name] for name in names], device=self.device
            )

    def forward(self, layer: str, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """base(x) + scaling x A^T B of each row's own adapter. x (..., tokens, in), or the last of
        them for a head.
        """
        output, stack = base(x), self.stacks.get(layer)
        if self.rows is None or stack is None:
            return output
        low = F.linear(x, stack.a) * self.mask(stack)
        return output + low @ stack.b

    def mask(self, stack: Stack) -> Tensor:
        """(tokens, R): the scaling where row and adapter belong together, else 0."""
        key = (stack.owners, stack.scales)
        if key not in self.masks:
            owners = torch.tensor(stack.owners, device=self.device)
            scales = torch.tensor(stack.scales, device=self.device)
            self.masks[key] = ((owners == self.rows[:, None]) * scales).to(self.dtype)
        return self.masks[key]


def check_adapter(name: str, folder: Path, linears: dict[str, nn.Linear]) -> list[str]:
    """Names of the layers that the adapter in `folder` changes. Raises UserError unless it fits
    this base model.
    """
    config = lora.lora_config(folder)
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            layers, count = lora.lora_layers(file), len(list(file.keys()))
            for layer in layers:
                a, b = (
                    file.get_slice(f"base_model.model.{layer}.lora_{s}.weight").get_shape()
                    for s in "AB"
                )
                module = linears.get(layer)
                if (
                    module is None
                    or (a[1], b[0]) != (module.in_features, module.out_features)
                    or a[0] != b[1]
                ):
                    raise UserError(
                        f"{folder}: does not fit this base model ({layer}); it was trained on another"
                    )
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{folder}: adapter_model.safetensors cannot be read ({error}); train {name} again"
        ) from None
    targets = (
        ()
        if isinstance(config.target_modules, str) or config.layers_to_transform
        else config.target_modules
    )
    wanted = {
        layer
        for layer in linears
        if layer in targets or any(layer.endswith(f".{t}") for t in targets)
    }
    if lost := sorted(wanted - set(layers)):
        raise UserError(
            f"{folder}: does not fit this base model (nothing for {lost[0]}); train {name} again"
        )
    if not layers or count != 2 * len(layers):
        raise UserError(
            f"{folder}: holds other weights than LoRA's A and B of linear layers; not supported"
        )
    return layers


class Engine:
    """Answers requests with `rows` of them in flight, each of at most `length` tokens, prompt and
    answer together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        folders: dict[str, Path],
        rows: int,
        length: int,
        ends: list[int],
    ):
        self.model, self.rows, self.ends = model, rows, set(ends)
        self.cache = Cache(rows, length)
        self.adapters = Adapters(model, folders)
        model.set_attn_implementation("answers")
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module.answer_cache = self.cache
        self.passed = torch.ones(
            1, 1, 1, 1, dtype=torch.bool, device=model.device
        )  # a mask, so that none is made

    @torch.inference_mode()
    def run(self, source: Iterator[Request], finished: Callable[[Request], Request | None]) -> None:
        """Answer every request of `source`; `finished` is called with each answered one and may
        return its follow-up, which takes over the row.
        """
        active: list[Request] = []
        held: list[list[int]] = []  # tokens whose keys and values stand in each row
        waiting = next(source, None)
        while True:
            while waiting and len(active) < self.rows and self.has_room(waiting, active):
                active.append(waiting)
                held.append([])
                waiting = next(source, None)
            if not active:
                return
            self.adapters.use({request.adapter for request in active})
            rows = [row for row, request in enumerate(active) if not request.tokens]
            if rows:
                rows, logits = self.prefill(rows, active, held)
            else:
                rows, logits = range(len(active)), self.decode(active, held)
            for row, token in zip(rows, self.pick(logits, [active[row] for row in rows])):
                active[row].tokens.append(token)
            for row in sorted(rows, reverse=True):
                if self.is_finished(active[row]):
                    follow_up = finished(active[row])
                    if follow_up is not None:
                        active[row] = follow_up
                        continue
                    last_request, last_held = active.pop(), held.pop()
                    if row < len(active):
                        self.cache.move(len(active), row, len(last_held))
                        active[row], held[row] = last_request, last_held

    def has_room(self, request: Request, active: list[Request]) -> bool:
        """Whether the request's adapter is in flight, or another may be."""
        names = {one.adapter for one in active}
        return request.adapter in names or len(names) < MOST_ADAPTERS

    def is_finished(self, request: Request) -> bool:
        return bool(request.tokens) and (
            request.tokens[-1] in self.ends or len(request.tokens) >= request.max_new_tokens
        )

    def prefill(
        self, rows: list[int], active: list[Request], held: list[list[int]]
    ) -> tuple[list[int], Tensor]:
        """Run the prompts of some of `rows`. Returns which, and (n, V) logits of their first
        tokens.
        """
        tokens, pieces, names = [], [], []
        for row in rows:
            prompt = active[row].prompt
            before = min(chat.common_prefix(held[row], prompt), len(prompt) - 1)
            if pieces and len(tokens) + len(prompt) - before > PREFILL_TOKENS:
                break
            pieces.append(Piece(row, len(tokens), len(tokens) + len(prompt) - before, before))
            tokens += prompt[before:]
            names += [active[row].adapter] * (len(prompt) - before)
            held[row] = list(prompt)
        hidden = self.forward(tokens, names, pieces)
        self.adapters.begin(
            [active[piece.row].adapter for piece in pieces]
        )  # the head may carry an adapter too
        return [piece.row for piece in pieces], self.head(
            hidden[[piece.end - 1 for piece in pieces]]
        )

    def decode(self, active: list[Request], held: list[list[int]]) -> Tensor:
        """(rows, V) logits of every row's next token."""
        for request, tokens in zip(active, held):
            tokens.append(request.tokens[-1])
        return self.head(
            self.forward([tokens[-1] for tokens in held], [r.adapter for r in active], None, held)
        )

    def forward(
        self,
        tokens: list[int],
        names: list[str | None],
        pieces: list[Piece] | None,
        held: list[list[int]] = (),
    ) -> Tensor:
        """(N, H) last hidden states of a pass."""
        if pieces is None:
            rows, positions = list(range(len(held))), [len(one) - 1 for one in held]
        else:
            rows = [piece.row for piece in pieces for _ in range(piece.start, piece.end)]
            positions = [
                i - piece.start + piece.before
                for piece in pieces
                for i in range(piece.start, piece.end)
            ]
        ids, rows, positions = (
            torch.tensor(one, device=self.model.device) for one in (tokens, rows, positions)
        )
        self.cache.begin(rows, positions, pieces)
        self.adapters.begin(names)
        backbone = getattr(self.model, self.model.base_model_prefix)
        output = backbone(
            input_ids=ids[None],
            position_ids=positions[None],
            attention_mask=self.passed,
            use_cache=False,
        )
        return output.last_hidden_state[0]

    def head(self, hidden: Tensor) -> Tensor:
        """(n, H) -> (n, V) fp32."""
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return logps.capped(self.model.get_output_embeddings()(hidden), cap)

    def pick(self, logits: Tensor, requests: list[Request]) -> list[int]:
        """The next token of each row: the most probable, or argmax of logits / temperature + Gumbel
        noise from the request's own generator, so that no answer depends on who shares its batch.
        Raises UserError for NaN.
        """
        for row, request in enumerate(requests):
            if request.temperature >= GREEDY_BELOW:
                if request.generator is None:
                    request.generator = torch.Generator(logits.device).manual_seed(request.seed)
                noise = torch.empty_like(logits[row]).exponential_(generator=request.generator)
                logits[row] = logits[row] / request.temperature - noise.clamp_min_(1e-30).log_()
        values, tokens = logits.max(-1)
        if values.isnan().any():
            whose = requests[values.isnan().nonzero()[0].item()].adapter
            raise UserError(
                f"{whose or 'the base model'}: logits that are no numbers; its weights are broken"
            )
        return tokens.tolist()

    @torch.inference_mode()
    def score(self, prompt: list[int], answer: list[int], adapter: str | None) -> float:
        """Log-probability (nats) of `answer` after `prompt`, all its tokens fed at once. Nothing
        may be in flight.
        """
        tokens = [*prompt, *answer[:-1]]
        self.adapters.use({adapter})
        hidden = self.forward(tokens, [adapter] * len(tokens), [Piece(0, 0, len(tokens), 0)])[
            len(prompt) - 1 :
        ]
        total, targets = 0.0, torch.tensor(answer, device=hidden.device)
        size = max(1, logps.LOGITS_CHUNK // self.model.config.get_text_config().vocab_size)
        for start in range(0, len(answer), size):
            part = slice(start, start + size)
            self.adapters.begin([adapter] * len(answer[part]))
            total -= (
                F.cross_entropy(self.head(hidden[part]), targets[part], reduction="sum")
                .double()
                .item()
            )
        return total
