"""The engine: many answers at once over one base model, with different LoRA adapters, temperatures
and ages in one batch (continuous batching).

The cache has a fixed number of rows. Each row in flight is described by a `Slot`; slots[n] belongs
to row n of the cache, and rows 0 to len(slots) - 1 are in use. Before each pass, waiting requests
take the free rows. A pass is either a prefill (the prompts of new requests) or a decode (one more
token for every row). An example with three rows, adapters A and B, and the requests A1, A2, B1, B2,
of which A1 has a follow-up (turn 2 of its conversation):

    pass        row 0   row 1   row 2   tokens through the model
    1 prefill   A1      A2      B1      three prompts, one after the other, each in its own row
    2 decode    A1      A2      B1      3: one for each row, two with adapter A and one with B
                A2 ends: B1, the last row, moves into row 1, which leaves row 2 free
    3 prefill   A1      B1      B2      the prompt of B2; A1 and B1 wait for this pass
    4 decode    A1      B1      B2      3
                A1 ends: its follow-up takes row 0
    5 prefill   A1'     B1      B2      the prompt of A1', turn 1 included
    6 decode    A1'     B1      B2      3

So no answer waits for the slowest of its batch.

What a row computes must not depend on the other rows, also in bf16, where the result of a matrix
product can change with the shape of its operands. Hence the shape of every operation is the same
whatever else is in flight: a prompt goes through the model by itself, a decode always has `rows`
tokens (free rows carry a token that nobody reads), and a row attends over its own length, rounded
up to a fixed step. Only the experts of a mixture still see tokens of other rows.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from pref.answering import cache
from pref.answering.adapters import Adapters
from pref.answering.cache import Cache, Group
from pref.files.console import UserError
from pref.model import head, logps

GREEDY_BELOW = 1e-4  # FastChat takes the most probable token at temperatures below this
BROKEN = -1  # in place of a token: the logits are not finite
MOST_ADAPTERS = 8  # in flight: the stacked products grow with their number


@dataclass
class Request:
    """One answer to write."""

    prompt: list[int]  # token ids
    adapter: str | None  # None: the base model
    temperature: float
    seed: int
    max_new_tokens: int
    tag: object = None  # whatever the caller needs to recognise the answer
    tokens: list[int] = field(default_factory=list)  # the answer so far, its end token included
    generator: torch.Generator | None = None


@dataclass
class Slot:
    """What a row of the cache is used for."""

    request: Request
    length: int = 0  # tokens whose keys and values the row holds


class TurnTokens(NamedTuple):
    """Token ids of an answered turn."""

    context: list[int]  # everything before the answer, of at least one token
    answer: list[int]


class Pass(NamedTuple):
    """N tokens that go through the model together."""

    tokens: list[int]  # (N,) ids
    rows: list[int]  # (N,) the cache row of each
    positions: list[int]  # (N,) its position in that row
    adapters: list[str | None]  # (N,)


class Engine:
    """Answers requests, `rows` of them in flight, each of at most `length` tokens (prompt and
    answer together). folders: adapters by name. ends: token ids that end an answer.

    Changes `model`: its attention and the linear layers that the adapters change are replaced.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        folders: dict[str, Path],
        rows: int,
        length: int,
        ends: list[int],
    ):
        self.model, self.rows, self.length, self.ends = model, rows, length, set(ends)
        self.cache = Cache(rows, length)
        self.adapters = Adapters(model, folders)
        cache.install(model, self.cache)
        # The cache does its own masking; passing a mask keeps transformers from building one.
        self.no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device)

    @torch.inference_mode()
    def run(self, source: Iterator[Request], finished: Callable[[Request], Request | None]) -> None:
        """Answer every request of `source`. `finished` is called with each answered one and may
        return a follow-up, which takes over the row.
        """
        slots: list[Slot] = []
        waiting = next(source, None)
        while True:
            # 1) Free rows go to waiting requests, in order. With nothing in flight, all is done.
            while waiting and len(slots) < self.rows and self.may_join(waiting, slots):
                slots.append(Slot(waiting))
                waiting = next(source, None)
            if not slots:
                return

            # 2) Load and stack the adapters in flight, if they have changed.
            self.adapters.use({slot.request.adapter for slot in slots})

            # 3) One pass. New prompts go first, because a decode is cheapest with all rows full.
            new = [row for row, slot in enumerate(slots) if not slot.request.tokens]
            if new:
                rows, logits = new[:1], self.prefill(new[0], slots[new[0]])
            else:
                rows, logits = list(range(len(slots))), self.decode(slots)

            # 4) The next token of each of these rows.
            tokens = pick(logits, [slots[row].request for row in rows])
            for row, token in zip(rows, tokens):
                slots[row].request.tokens.append(token)

            # 5) Rows whose answer ends are refilled or given up. From the highest down: giving up
            # a row moves the last row into its place, and that one needs no second look.
            for row in sorted(rows, reverse=True):
                if self.is_finished(slots[row].request):
                    follow_up = finished(slots[row].request)
                    if follow_up is not None:
                        slots[row] = Slot(follow_up)
                    else:
                        self.give_up(row, slots)

    def may_join(self, request: Request, slots: list[Slot]) -> bool:
        """Whether the request's adapter is in flight already, or one more may be."""
        names = {slot.request.adapter for slot in slots}
        return request.adapter in names or len(names) < MOST_ADAPTERS

    def is_finished(self, request: Request) -> bool:
        return bool(request.tokens) and (
            request.tokens[-1] in self.ends or len(request.tokens) >= request.max_new_tokens
        )

    def give_up(self, row: int, slots: list[Slot]) -> None:
        """Remove a row; the last one takes its place."""
        last = slots.pop()
        if row < len(slots):
            self.cache.move(source=len(slots), target=row, length=last.length)
            slots[row] = last

    def prefill(self, row: int, slot: Slot) -> Tensor:
        """Run the prompt of one row. Returns (1, V) logits of its first token."""
        prompt, adapter = slot.request.prompt, slot.request.adapter
        hidden = self.read([prompt], adapter, first_row=row)  # (N, H)
        slot.length = len(prompt)
        # The head sees one token instead of N, and may carry an adapter too.
        self.adapters.begin([adapter])
        return self.head(hidden[-1:])

    def decode(self, slots: list[Slot]) -> Tensor:
        """Run the newest token of every row. Returns (rows in flight, V) logits of the next."""
        free = self.rows - len(slots)
        positions = [slot.length for slot in slots]
        hidden = self.forward(
            Pass(
                tokens=[slot.request.tokens[-1] for slot in slots] + [0] * free,
                rows=list(range(self.rows)),
                positions=positions + [0] * free,
                adapters=[slot.request.adapter for slot in slots] + [None] * free,
            ),
            cache.group_rows(positions),
        )
        for slot in slots:
            slot.length += 1
        return self.head(hidden)[: len(slots)]

    def read(self, texts: list[list[int]], adapter: str | None, first_row: int = 0) -> Tensor:
        """(N, H) last hidden states of N tokens: of texts that fill one row each from its start."""
        flat = Pass(
            tokens=[token for text in texts for token in text],
            rows=[row for row, text in enumerate(texts, first_row) for _ in text],
            positions=[position for text in texts for position in range(len(text))],
            adapters=[adapter for text in texts for _ in text],
        )
        return self.forward(flat, groups=None)

    def forward(self, flat: Pass, groups: list[Group] | None) -> Tensor:
        """(N, H) last hidden states of a pass. groups: of a decode; None for a prompt."""
        device = self.model.device
        self.cache.begin(flat.rows, flat.positions, groups, device)
        self.adapters.begin(flat.adapters)
        backbone = getattr(self.model, self.model.base_model_prefix)
        output = backbone(
            input_ids=cache.on_device([flat.tokens], device),  # (1, N)
            position_ids=self.cache.positions[None],
            attention_mask=self.no_mask,
            use_cache=False,
        )
        return output.last_hidden_state[0]

    def head(self, hidden: Tensor) -> Tensor:
        """(n, H) -> (n, V) logits in fp32."""
        config = self.model.config.get_text_config()
        logits = self.model.get_output_embeddings()(hidden)
        scale = getattr(config, "logit_scale", None) or 1  # Cohere
        scale /= getattr(config, "logits_scaling", None) or 1  # Granite
        if scale != 1:
            logits = logits * scale
        return logps.capped(logits, getattr(config, "final_logit_softcapping", None))

    @torch.inference_mode()
    def score(self, turns: list[TurnTokens], adapter: str | None) -> list[float]:
        """Log-probability (nats) of each turn's answer after its context, in one pass. Takes at
        most `rows` turns, with answers of at least one token. Uses the rows of the cache, so
        nothing may be in flight.
        """
        self.adapters.use({adapter})
        # The last token of an answer is predicted, never read.
        texts = [[*context, *answer[:-1]] for context, answer in turns]
        hidden = self.read(texts, adapter)  # (N, H)
        ends = itertools.accumulate(len(text) for text in texts)
        # Each of these predicts one answer token.
        hidden = torch.cat(
            [hidden[end - len(turn.answer) : end] for end, turn in zip(ends, turns, strict=True)]
        )
        targets = torch.tensor([token for turn in turns for token in turn.answer])
        targets = targets.to(hidden.device)
        # The logits in chunks: a long answer over a large vocabulary is gigabytes of them.
        vocabulary = self.model.config.get_text_config().vocab_size
        size = head.chunk_tokens(vocabulary, hidden.is_cuda)
        losses = []
        for chunk, wanted in zip(hidden.split(size), targets.split(size), strict=True):
            self.adapters.begin([adapter] * len(chunk))
            losses.append(F.cross_entropy(self.head(chunk), wanted, reduction="none"))
        by_turn = torch.cat(losses).double().split([len(turn.answer) for turn in turns])
        return [finite(-part.sum().item(), adapter) for part in by_turn]


def pick(logits: Tensor, requests: list[Request]) -> list[int]:
    """The next token of each request. logits (n, V) in fp32; overwritten.

    Greedy requests take the most probable token. The others take the argmax of
    logits / temperature + Gumbel noise, which is a draw from the softmax. The noise comes from
    the request's own generator, so an answer does not depend on the rest of its batch. Raises
    UserError for logits that are NaN or infinite.

    The host waits for the device once, at the end.
    """
    temperatures = [r.temperature if r.temperature >= GREEDY_BELOW else 0.0 for r in requests]
    if any(temperatures):
        # Greedy rows keep their logits: divided by 1, and the logarithm of 1 is 0.
        noise = torch.ones_like(logits)
        for row, request in enumerate(requests):
            if temperatures[row]:
                if request.generator is None:
                    request.generator = torch.Generator(logits.device).manual_seed(request.seed)
                noise[row].exponential_(generator=request.generator)
        scales = cache.on_device(
            [[temperature or 1.0] for temperature in temperatures], logits.device
        )
        logits.div_(scales).sub_(noise.clamp_min_(1e-30).log_())
    values, tokens = logits.max(-1)  # NaN if any of them is
    picked = tokens.masked_fill_(~values.isfinite(), BROKEN).tolist()
    if BROKEN in picked:
        finite(math.nan, requests[picked.index(BROKEN)].adapter)
    return picked


def finite(value: float, adapter: str | None) -> float:
    """`value`, computed with `adapter`. Raises UserError if it is not finite."""
    if math.isfinite(value):
        return value
    raise UserError(
        f"{adapter or 'the base model'}: its logits are NaN or infinite, so its weights are "
        "broken or overflow; "
        + ("train it again" if adapter else "try --dtype float32, or download it again")
    )
