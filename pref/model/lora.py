"""the adapter: made, loaded, switched off"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pref.files.console import UserError
from pref.model import chat


def add_lora(
    base: PreTrainedModel,
    r: int,
    alpha: int,
    dropout: float,
    targets: str,
    seed: int,
    init: Path | None = None,
) -> PeftModel:
    """`base` with LoRA adapters in fp32: A random from `seed` (the same for every loss), B zero.

    targets: 'all-linear' (every linear layer but the output head) or module names with commas.
    init: start from the adapter in this folder instead, which then is part of the reference too.
    """
    if init is not None:
        config = lora_config(init)
        config.lora_dropout, config.inference_mode = dropout, False
    else:
        config = LoraConfig(
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=targets if targets == "all-linear" else targets.split(","),
            task_type="CAUSAL_LM",
        )
    torch.manual_seed(seed)
    try:
        model = get_peft_model(base, config)
    except ValueError as error:  # PEFT names the modules it did not find
        raise UserError(f"--lora_targets {targets}: {chat.first_line(error)}") from None
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = (
                parameter.data.float()
            )  # AdamW's steps at lr 1e-5 vanish in bf16 weights
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(
            config.target_modules
        )  # a set, which would be written in any order
    for module in model.modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear):
            module.forward = MethodType(lora_forward, module)
            module.initial_A = module.initial_B = None
    if init is not None:
        start_from(model, init)
    return model


def lora_config(folder: Path) -> LoraConfig:
    """The configuration of the LoRA adapter in `folder`. Raises UserError for one that is not plain
    LoRA.
    """
    if (
        not (folder / "adapter_config.json").is_file()
        or not (folder / "adapter_model.safetensors").is_file()
    ):
        raise UserError(
            f"{folder}: no adapter there (adapter_config.json and adapter_model.safetensors)"
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{folder}: adapter_config.json cannot be read ({chat.first_line(error)})"
        ) from None
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    usual = {
        "use_dora": False,
        "bias": "none",
        "modules_to_save": None,
        "layer_replication": None,
        "target_parameters": None,
        "trainable_token_indices": None,
        "lora_bias": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    odd = [
        key for key, value in usual.items() if getattr(config, key, value) not in (value, None, [])
    ]
    if kind != "LORA" or odd or config.init_lora_weights not in (True, False, "gaussian"):
        what = (
            kind
            if kind != "LORA"
            else odd[0]
            if odd
            else f"init_lora_weights {config.init_lora_weights}"
        )
        raise UserError(
            f"{folder}: plain LoRA adapters only, this one has {what}; merge it into its base"
        )
    return config


def lora_layers(file) -> list[str]:
    """Names of the layers that have a LoRA matrix A in an open adapter_model.safetensors."""
    found = (
        re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", key) for key in list(file.keys())
    )
    return sorted(match[1] for match in found if match)


def start_from(model: PeftModel, folder: Path) -> None:
    """Give `model` the adapter weights in `folder`, and keep them beside as the reference's."""
    try:
        weights = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: adapter_model.safetensors cannot be read ({chat.first_line(error)})"
        ) from None
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }
    wanted = {f"{name}.lora_{side}.weight" for name in layers for side in "AB"}
    if strange := sorted(wanted ^ weights.keys()):
        raise UserError(f"{folder}: does not fit this model ({strange[0]} is in one of them only)")
    for name, module in layers.items():
        if not isinstance(module.get_base_layer(), nn.Linear):
            raise UserError(f"{folder}: adapts {name}, which is no linear layer; not supported")
        for side in "AB":
            parameter, start = (
                getattr(module, f"lora_{side}")["default"].weight,
                weights[f"{name}.lora_{side}.weight"],
            )
            if parameter.shape != start.shape:
                raise UserError(f"{folder}: does not fit this model ({name} has another shape)")
            with torch.no_grad():
                parameter.copy_(start)
            delattr(
                module, f"initial_{side}"
            )  # a buffer instead, so that it goes wherever the layer goes
            module.register_buffer(f"initial_{side}", parameter.detach().clone(), persistent=False)


def lora_forward(layer: LoraLayer, x: Tensor) -> Tensor:
    """PEFT's LoRA layer with its one adapter, base(x) + scaling * dropout(x) A^T B^T, without
    PEFT's casts of every activation to the adapter's dtype and with the sum inside the second
    product.
    """
    rows = x.flatten(0, -2)
    output = layer.base_layer(rows)
    if layer._disable_adapters:
        matrices = (layer.initial_A, layer.initial_B)
    else:
        matrices = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    if matrices[0] is not None:
        a, b = (matrix.to(x.dtype) for matrix in matrices)
        inputs = (
            rows if layer._disable_adapters else layer.lora_dropout["default"](rows)
        )  # the reference has none
        low = F.linear(inputs, a) * layer.scaling["default"]
        if (
            torch.compiler.is_compiling()
        ):  # joined to what follows; in fp32 it is not taken for an addmm, which copies
            output = (output.float() + F.linear(low, b).float()).to(output.dtype)
        else:  # in place where the base's output is a product's own and not a view of something that backward needs
            add = output.addmm_ if type(layer.get_base_layer()) is nn.Linear else output.addmm
            output = add(low, b.t())
    return output.unflatten(0, x.shape[:-1])


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The frozen reference: `model` with every LoRA layer passed through, or as it was in
    --init_adapter.

    Not PEFT's `disable_adapter`, which also switches `requires_grad` and so confuses FSDP's
    parameter groups.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextmanager
def dropout(model: nn.Module, active: bool) -> Iterator[None]:
    """Dropout on or off. Never `model.eval()`: on CPU one eval forward of a 4-bit model repacks its
    weights, and from then on every gradient upstream is silently zero.
    """
    modules = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    before = [module.training for module in modules]
    for module in modules:
        module.train(active)
    try:
        yield
    finally:
        for module, training in zip(modules, before):
            module.train(training)
