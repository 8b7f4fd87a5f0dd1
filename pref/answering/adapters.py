"""Several LoRA adapters over one base model in the same batch.

The adapters in flight are stacked, layer by layer: one product with all their A, a mask that keeps
for each token the ranks of its own adapter, one product with all their B. Two adapters of rank 2
(r = 4 in all), three tokens, the middle one of the base model:

    owners  0 0 1 1      mask  s s 0 0    token of adapter 0, s: its scaling
                               0 0 0 0    token of the base model
                               0 0 s s    token of adapter 1

    output = base(x) + ((x A^T) * mask) B^T
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from pref.answering.cache import on_device
from pref.files.console import UserError
from pref.model import lora

WEIGHTS = "adapter_model.safetensors"
NO_ADAPTER = -1  # the number of the base model's tokens


class LayerWeights(NamedTuple):
    """One adapter's part in one linear layer."""

    a: Tensor  # (r, in)
    b: Tensor  # (r, out): B transposed
    scaling: float


class Stack(NamedTuple):
    """The adapters in flight of one linear layer, end to end: R is the sum of their ranks."""

    a: Tensor  # (R, in)
    b: Tensor  # (R, out)
    owners: tuple[int, ...]  # (R,) number of the adapter that each rank belongs to
    scales: tuple[float, ...]  # (R,) scaling of that adapter


class Adapters:
    """LoRA adapters by name. Those in flight are loaded and stacked, the others stay on disk.

    Raises UserError for a folder whose adapter does not fit `model`, before any is loaded.
    """

    def __init__(self, model: PreTrainedModel, folders: dict[str, Path]):
        self.folders, self.dtype, self.device = folders, model.dtype, model.device
        self.loaded: dict[str, dict[str, LayerWeights]] = {}  # by adapter, then by layer
        self.numbers: dict[str, int] = {}  # of the adapters in flight
        self.stacks: dict[str, Stack] = {}  # by layer
        self.tokens: Tensor | None = None  # (N,) adapter number of each token of the pass
        self.ranks: dict[tuple, tuple[Tensor, Tensor]] = {}  # owners and scales of stacks, (R,)
        linears = {
            name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
        }
        for name, folder in folders.items():
            for layer in check_adapter(name, folder, linears):
                module = linears[layer]
                if not isinstance(module.forward, partial):  # else another adapter was here first
                    module.forward = partial(self.forward, layer, module.forward)

    def use(self, names: Iterable[str | None]) -> None:
        """Stack the adapters `names` (None: the base model), unless they are stacked already."""
        names = sorted(set(names) - {None})
        if all(name in self.numbers for name in names):
            return
        self.loaded = {name: self.loaded.get(name) or self.load(name) for name in names}
        self.numbers = {name: number for number, name in enumerate(names)}
        layers = {layer for weights in self.loaded.values() for layer in weights}
        self.stacks = {layer: self.stack(layer) for layer in layers}
        # Here and not in a pass, where each copy to a GPU would hold up the host.
        self.ranks = {
            (stack.owners, stack.scales): (
                torch.tensor(stack.owners, device=self.device),
                torch.tensor(stack.scales, device=self.device),
            )
            for stack in self.stacks.values()
        }

    def stack(self, layer: str) -> Stack:
        parts = {
            self.numbers[name]: weights[layer]
            for name, weights in self.loaded.items()
            if layer in weights
        }
        return Stack(
            a=torch.cat([part.a for part in parts.values()]),
            b=torch.cat([part.b for part in parts.values()]),
            owners=tuple(number for number, part in parts.items() for _ in range(len(part.a))),
            scales=tuple(part.scaling for part in parts.values() for _ in range(len(part.a))),
        )

    def load(self, name: str) -> dict[str, LayerWeights]:
        """Weights of an adapter by layer, in the model's dtype and on its device."""
        config, weights = lora.lora_config(self.folders[name]), {}
        with safe_open(self.folders[name] / WEIGHTS, framework="pt") as file:
            for layer in lora.lora_layers(file):
                a, b = (
                    file.get_tensor(lora_key(layer, side)).to(self.device, self.dtype)
                    for side in "AB"
                )
                if not (a.isfinite().all() and b.isfinite().all()):
                    raise UserError(
                        f"{self.folders[name]}: weights that are NaN or infinite ({layer}); train "
                        f"{name} again"
                    )
                rank = len(a)
                weights[layer] = LayerWeights(
                    a=a,
                    b=b.t().contiguous(),
                    scaling=config.lora_alpha / (math.sqrt(rank) if config.use_rslora else rank),
                )
        return weights

    def begin(self, names: list[str | None]) -> None:
        """Announce a pass: the adapter of each of its N tokens."""
        self.masks: dict[tuple, Tensor] = {}  # shared by layers whose stacks have the same shape
        self.tokens = None
        if any(names):
            numbers = [NO_ADAPTER if name is None else self.numbers[name] for name in names]
            self.tokens = on_device(numbers, self.device)

    def forward(self, layer: str, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A linear layer with the adapter of each token. x (..., N, in) -> (..., N, out)."""
        output, stack = base(x), self.stacks.get(layer)
        if self.tokens is None or stack is None:
            return output
        low = F.linear(x, stack.a) * self.mask(stack)  # (..., N, R)
        return output + low @ stack.b

    def mask(self, stack: Stack) -> Tensor:
        """(N, R): the adapter's scaling where token and rank belong to the same one, else 0."""
        key = (stack.owners, stack.scales)
        if key not in self.masks:
            owners, scales = self.ranks[key]
            self.masks[key] = ((owners == self.tokens[:, None]) * scales).to(self.dtype)
        return self.masks[key]


def lora_key(layer: str, side: str) -> str:
    """Name of a LoRA matrix ('A' or 'B') in an adapter file, as PEFT writes it."""
    return f"base_model.model.{layer}.lora_{side}.weight"


def check_adapter(name: str, folder: Path, linears: dict[str, nn.Linear]) -> list[str]:
    """Names of the layers that the adapter in `folder` changes.

    Raises UserError unless it is plain LoRA of linear layers, all of them present in this base
    model with these shapes, all of them finite.
    """
    config = lora.lora_config(folder)
    misfit = f"{folder}: does not fit this base model"
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            layers, count = lora.lora_layers(file), len(list(file.keys()))
            for layer in layers:
                (rank_a, inputs), (outputs, rank_b) = (
                    file.get_slice(lora_key(layer, side)).get_shape() for side in "AB"
                )
                linear = linears.get(layer)
                fits = linear is not None and rank_a == rank_b
                if not fits or (inputs, outputs) != (linear.in_features, linear.out_features):
                    raise UserError(
                        f"{misfit} (which has no layer {layer} of the adapter's shape); "
                        "give --model with the model it was trained on"
                    )
                for side in "AB":
                    if not file.get_tensor(lora_key(layer, side)).isfinite().all():
                        raise UserError(
                            f"{folder}: has NaN or infinite weights ({layer}); train {name} again"
                        )
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{folder}: {WEIGHTS} cannot be read ({error}); train {name} again"
        ) from None
    # A list of module names tells which layers must be there; a pattern or a choice of layers
    # (layers_to_transform) does not.
    plain = not isinstance(config.target_modules, str) and not config.layers_to_transform
    targets = config.target_modules if plain else ()
    expected = {
        layer
        for layer in linears
        if layer in targets or any(layer.endswith(f".{target}") for target in targets)
    }
    if missing := sorted(expected - set(layers)):
        raise UserError(f"{misfit} (no weights for {missing[0]}); train {name} again")
    if not layers or count != 2 * len(layers):
        raise UserError(
            f"{folder}: holds weights other than LoRA's A and B of linear layers, which are not "
            "supported; train with LoRA on linear layers only"
        )
    return layers
