"""The engine: many answers at once over one base model, with different LoRA adapters, temperatures
and ages in one batch (continuous batching).

The cache has a fixed number of rows. Each row in flight is described by a `Slot`; slots[n] belongs
to row n of the cache, and rows 0 to len(slots) - 1 are in use. Before each pass, waiting requests
take the free rows. A pass is either a prefill (the prompts of new requests) or a decode (one more
token for every row). An example with three rows, adapters A and B, and the requests A1, A2, B1, B2,
of which A1 has a follow-up (turn 2 of its conversation):

    pass        row 0   row 1   row 2   tokens through the model
    1 prefill   A1      A2      B1      three prompts, end to end, each in its own row
    2 decode    A1      A2      B1      3: one for each row, two with adapter A and one with B
                A2 ends: B1, the last row, moves into row 1, which leaves row 2 free
    3 prefill   A1      B1      B2      the prompt of B2; A1 and B1 wait for this pass
    4 decode    A1      B1      B2      3
                A1 ends: its follow-up keeps row 0 and the keys and values of turn 1
    5 prefill   A1'     B1      B2      the prompt of A1' beyond what row 0 holds
    6 decode    A1'     B1      B2      3

So no answer waits for the slowest of its batch, and a decode has no padding rows.
"""

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
from pref.answering.cache import Cache, Piece
from pref.files.console import UserError
from pref.model import chat, logps

GREEDY_BELOW = 1e-4  # FastChat takes the most probable token at temperatures below this
PREFILL_TOKENS = 4096  # prompt tokens that go through the model at once
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
    cached: list[int] = field(default_factory=list)  # tokens whose keys and values the row holds


class Pass(NamedTuple):
    """N tokens that go through the model together."""

    tokens: list[int]  # (N,) ids
    rows: list[int]  # (N,) the cache row of each
    positions: list[int]  # (N,) its position in that row
    adapters: list[str | None]  # (N,)
    pieces: list[Piece] | None  # the prompts of a prefill; None: a decode


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
        self.model, self.rows, self.ends = model, rows, set(ends)
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
                rows, logits = self.prefill(new, slots)  # perhaps not all of them fit one pass
            else:
                rows, logits = list(range(len(slots))), self.decode(slots)

            # 4) The next token of each of these rows.
            tokens = self.pick(logits, [slots[row].request for row in rows])
            for row, token in zip(rows, tokens):
                slots[row].request.tokens.append(token)

            # 5) Rows whose answer ends are refilled or given up. From the highest down: giving up
            # a row moves the last row into its place, and that one needs no second look.
            for row in sorted(rows, reverse=True):
                if self.is_finished(slots[row].request):
                    follow_up = finished(slots[row].request)
                    if follow_up is not None:
                        slots[row].request = follow_up
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
            self.cache.move(source=len(slots), target=row, length=len(last.cached))
            slots[row] = last

    def prefill(self, new: list[int], slots: list[Slot]) -> tuple[list[int], Tensor]:
        """Run the prompts of rows `new`, as many as one pass takes. Returns the rows that were run,
        and (n, V) logits of their first tokens.

        A prompt that begins with what its row holds is run from there on, but never less than its
        last token, which gives the logits.
        """
        flat = Pass(tokens=[], rows=[], positions=[], adapters=[], pieces=[])
        for row in new:
            slot = slots[row]
            prompt = slot.request.prompt
            before = min(chat.common_prefix(slot.cached, prompt), len(prompt) - 1)
            start, count = len(flat.tokens), len(prompt) - before
            if flat.pieces and start + count > PREFILL_TOKENS:
                break
            flat.pieces.append(Piece(row=row, start=start, end=start + count, before=before))
            flat.tokens.extend(prompt[before:])
            flat.rows.extend([row] * count)
            flat.positions.extend(range(before, len(prompt)))
            flat.adapters.extend([slot.request.adapter] * count)
            slot.cached = list(prompt)
        hidden = self.forward(flat)  # (N, H)
        rows = [piece.row for piece in flat.pieces]
        last = hidden[[piece.end - 1 for piece in flat.pieces]]  # (n, H)
        # The head sees n tokens instead of N, and may carry an adapter too.
        self.adapters.begin([slots[row].request.adapter for row in rows])
        return rows, self.head(last)

    def decode(self, slots: list[Slot]) -> Tensor:
        """Run the newest token of every row. Returns (rows in flight, V) logits of the next."""
        for slot in slots:
            slot.cached.append(slot.request.tokens[-1])
        hidden = self.forward(
            Pass(
                tokens=[slot.cached[-1] for slot in slots],
                rows=list(range(len(slots))),
                positions=[len(slot.cached) - 1 for slot in slots],
                adapters=[slot.request.adapter for slot in slots],
                pieces=None,
            )
        )
        return self.head(hidden)

    def forward(self, flat: Pass) -> Tensor:
        """(N, H) last hidden states of a pass."""
        ids, rows, positions = (
            torch.tensor(values, device=self.model.device)
            for values in (flat.tokens, flat.rows, flat.positions)
        )
        self.cache.begin(rows, positions, flat.pieces)
        self.adapters.begin(flat.adapters)
        backbone = getattr(self.model, self.model.base_model_prefix)
        output = backbone(
            input_ids=ids[None],  # (1, N)
            position_ids=positions[None],
            attention_mask=self.no_mask,
            use_cache=False,
        )
        return output.last_hidden_state[0]

    def head(self, hidden: Tensor) -> Tensor:
        """(n, H) -> (n, V) logits in fp32."""
        softcap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return logps.capped(self.model.get_output_embeddings()(hidden), softcap)

    def pick(self, logits: Tensor, requests: list[Request]) -> list[int]:
        """The next token of each request. logits (n, V); overwritten.

        Greedy requests take the most probable token. The others take the argmax of
        logits / temperature + Gumbel noise, which is a draw from the softmax. The noise comes from
        the request's own generator, so an answer does not depend on the rest of its batch. Raises
        UserError for NaN.
        """
        for row, request in enumerate(requests):
            if request.temperature >= GREEDY_BELOW:
                if request.generator is None:
                    request.generator = torch.Generator(logits.device).manual_seed(request.seed)
                noise = torch.empty_like(logits[row]).exponential_(generator=request.generator)
                logits[row] = logits[row] / request.temperature - noise.clamp_min_(1e-30).log_()
        values, tokens = logits.max(-1)
        if values.isnan().any():
            broken = requests[values.isnan().nonzero()[0].item()].adapter
            raise UserError(
                f"{broken or 'the base model'}: its logits are NaN, so its weights are broken; "
                + ("train it again" if broken else "try --dtype float32, or download it again")
            )
        return tokens.tolist()

    @torch.inference_mode()
    def score(self, prompt: list[int], answer: list[int], adapter: str | None) -> float:
        """Log-probability (nats) of `answer` after `prompt`, in one pass. Uses row 0 of the cache,
        so nothing may be in flight.
        """
        tokens = [*prompt, *answer[:-1]]  # the last token is predicted, never read
        count = len(tokens)
        self.adapters.use({adapter})
        hidden = self.forward(
            Pass(
                tokens=tokens,
                rows=[0] * count,
                positions=list(range(count)),
                adapters=[adapter] * count,
                pieces=[Piece(row=0, start=0, end=count, before=0)],
            )
        )
        hidden = hidden[len(prompt) - 1 :]  # (len(answer), H): each predicts one answer token
        targets = torch.tensor(answer, device=hidden.device)
        # The logits in chunks: a long answer over a large vocabulary is gigabytes of them.
        size = max(1, logps.LOGITS_CHUNK // self.model.config.get_text_config().vocab_size)
        total = 0.0
        for start in range(0, len(answer), size):
            part = slice(start, start + size)
            self.adapters.begin([adapter] * len(answer[part]))
            losses = F.cross_entropy(self.head(hidden[part]), targets[part], reduction="sum")
            total -= losses.double().item()
        return total
