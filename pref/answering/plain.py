"""Answers by transformers' own `generate`, one conversation at a time.

For models whose layers do what the engine cannot do (see fitness.py): state-space models, linear
attention, attention sinks and so on. Slower; otherwise the same as `generation.Engine`: the same
requests, adapters, seeds and draws.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from pref.answering.adapters import Adapters
from pref.answering.generation import Request, TurnTokens, finite, pick


class PlainEngine:
    """Has the interface of `generation.Engine`. Replaces the model's generation config."""

    rows = 1

    def __init__(self, model: PreTrainedModel, adapters: Adapters, length: int, ends: list[int]):
        self.model, self.adapters, self.length, self.ends = model, adapters, length, set(ends)
        # `generate` fills what a call leaves open from here, e.g. with a repetition penalty.
        model.generation_config = GenerationConfig(
            eos_token_id=sorted(ends) or None, pad_token_id=min(ends, default=0)
        )

    @torch.inference_mode()
    def run(self, source: Iterator[Request], finished: Callable[[Request], Request | None]) -> None:
        """See `Engine.run`."""
        for request in source:
            while request is not None:
                self.answer(request)
                request = finished(request)

    def answer(self, request: Request) -> None:
        self.announce(request.adapter)
        ids = torch.tensor([request.prompt], device=self.model.device)

        def one_hot_pick(_, logits: Tensor) -> Tensor:
            """(1, V) logits that leave `generate`, which is greedy, only the token of `pick`."""
            (token,) = pick(logits.float().clone(), [request])
            return torch.full_like(logits, -torch.inf).index_fill_(
                1, torch.tensor([token], device=logits.device), 0.0
            )

        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            use_cache=True,
            logits_processor=LogitsProcessorList([one_hot_pick]),
        )
        request.tokens = output[0, len(request.prompt) :].tolist()

    @torch.inference_mode()
    def score(self, turns: list[TurnTokens], adapter: str | None) -> list[float]:
        """See `Engine.score`. One turn after the other."""
        self.announce(adapter)
        return [self.score_one(turn, adapter) for turn in turns]

    def score_one(self, turn: TurnTokens, adapter: str | None) -> float:
        context, answer = turn
        ids = torch.tensor([[*context, *answer[:-1]]], device=self.model.device)
        logits = self.model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 :]
        targets = torch.tensor(answer, device=logits.device)
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        return finite(-losses.double().sum().item(), adapter)

    def announce(self, adapter: str | None) -> None:
        """Every token of the passes to come belongs to `adapter`."""
        self.adapters.use({adapter})
        self.adapters.begin([adapter])
