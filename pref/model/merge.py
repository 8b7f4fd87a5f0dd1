"""A LoRA adapter merged into its base, and how far log-probs move by it.

    W' = W + scaling * B A

The sum is taken in fp32 and rounded once, to the dtype of W. In 16 bits that moves log-probs by as
much as any other rounding of the weights; an adapter that was hardly trained can drown in it. So
`compare` sets what merging changes against what the adapter changes.
"""

from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from pref.files.console import UserError
from pref.model import loading, lora
from pref.model.chat import TokenPair
from pref.model.logps import ResponseLogps
from pref.model.packing import Packing, make_batch

# Mean nats a token that rounding explains, and the share of the adapter's own effect that it may be
# beyond that. Measured on SmolLM2-135M with an adapter that moves log-probs by 0.63: 0.068 in bf16.
# Where a matrix is missing or wrong, the difference is as large as the adapter's effect.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
MOST_SHARE = 0.5


class Comparison(NamedTuple):
    """Mean absolute differences of log-probs, nats a response token."""

    merging: float  # of the merged model from base + adapter
    adapter: float  # of base + adapter from the base
    tokens: int

    @property
    def share(self) -> float:
        """What merging changes, as a share of what the adapter changes."""
        return self.merging / self.adapter if self.adapter else float("inf")


@torch.no_grad()
def merged(model: PeftModel, place: str) -> PreTrainedModel:
    """The base of `model` with its adapter in the weights, which change in place. Raises UserError,
    beginning with `place`, if the sum leaves the range of the dtype.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        weight = layer.get_base_layer().weight
        a, b = (getattr(layer, f"lora_{side}")["default"].weight.float() for side in "AB")
        delta = layer.scaling["default"] * (b @ a)
        weight.copy_(weight.float() + delta.to(weight.device))
    loading.check_finite(
        ((f"the merged {name}", tensor) for name, tensor in model.named_parameters()), place
    )
    return model.unload()


@torch.no_grad()
def token_logps(
    model: PeftModel | PreTrainedModel, pairs: list[TokenPair], attention: str, progress=iter
) -> Tensor:
    """(tokens,) log-probs, nats, of the response tokens of `pairs`, on the CPU, by the model's own
    `attention`, a pair at a time.
    """
    policy = ResponseLogps(model, attention)
    packing = Packing(pad_id=0, padded=True, shared=False)
    found = []
    with lora.dropout(model, active=False):
        for pair in progress(pairs):
            batch = make_batch([pair], packing, policy.causal[0].device)
            found.append(policy(batch).logps.float().cpu())
    return torch.cat(found)


def compare(base: Tensor, adapted: Tensor, after: Tensor, dtype: torch.dtype) -> Comparison:
    """How far merging has moved log-probs (tokens,). Raises UserError if further than rounding can,
    or if one of them is not finite.
    """
    if not (adapted.isfinite().all() and after.isfinite().all()):
        raise UserError(
            "log-probs of the validation pairs are not finite; export in another --dtype"
        )
    found = Comparison(
        merging=(after - adapted).abs().mean().item(),
        adapter=(adapted - base).abs().mean().item(),
        tokens=len(after),
    )
    if found.merging > TOLERANCE[dtype] and found.share > MOST_SHARE:
        raise UserError(
            f"the merged model's log-probs differ from those of base + adapter by "
            f"{found.merging:.3g} nats a token, and the adapter itself changes them by "
            f"{found.adapter:.3g}: it was not written. Serve base and adapter instead"
        )
    return found
