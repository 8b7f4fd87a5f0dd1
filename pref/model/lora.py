"""The LoRA adapter: created, loaded, computed, and switched off for the reference.

A LoRA layer adds a product of two small matrices to a frozen linear layer:

    y = base(x) + scaling * dropout(x) A^T B^T      A (r, in), B (out, r), scaling = alpha / r

or alpha / sqrt(r) for rank-stabilised LoRA (rsLoRA, https://arxiv.org/abs/2312.03732).

B starts at zero, so that an untrained adapter is the identity and the policy equals its reference.
With --init_adapter training starts from another run's adapter. With --reference start that start
is part of the reference: its A and B are kept next to the trained ones (`initial_A`, `initial_B`).
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType

import torch
import torch.nn.functional as F
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft import __version__ as peft_version
from peft.tuners import tuners_utils
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pref.files import disk
from pref.files.console import UserError, first_line
from pref.model import architecture

try:
    from peft.utils import transformers_weight_conversion as conversion
except ImportError:  # PEFT before 0.19
    conversion = None

# Options of an adapter_config.json that have to be at these values: others are not plain LoRA.
PLAIN_LORA = {
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


def add_lora(
    base: PreTrainedModel,
    r: int,
    alpha: int,
    dropout: float,
    targets: str,
    seed: int,
    init: Path | None = None,
    is_reference: bool = True,
    rslora: bool = False,
) -> PeftModel:
    """`base` with LoRA adapters in fp32: A random from `seed` (the same for every loss), B zero.

    targets: 'all-linear' (every linear layer but the output head) or module names with commas.
    init: the folder of an adapter to start from; its config replaces r, alpha, targets and rslora.
    is_reference: it is part of the reference too; if not, the reference is `base` alone.
    rslora: updates are scaled by alpha / sqrt(r).

    Raises UserError if the targets are not in the model or `init` does not fit it.
    """
    # 1) The configuration.
    if init is not None:
        config = lora_config(init)
        config.lora_dropout, config.inference_mode = dropout, False
    else:
        config = LoraConfig(
            r=r,
            lora_alpha=alpha,
            use_rslora=rslora,
            lora_dropout=dropout,
            target_modules=targets if targets == "all-linear" else targets.split(","),
            task_type="CAUSAL_LM",
        )
        config.target_modules = usable_targets(base, config)

    # 2) PEFT's model with trainable matrices in fp32: in bf16, AdamW's steps at a learning rate of
    # 1e-5 round to nothing.
    torch.manual_seed(seed)
    try:
        model = get_peft_model(base, config)
    except ValueError as error:  # PEFT names the modules that it did not find
        raise UserError(f"--lora_targets {targets}: {first_line(error)}") from None
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if not isinstance(config.target_modules, str):
        # A set, which would be written to adapter_config.json in any order.
        config.target_modules = sorted(config.target_modules)

    # 3) Our forward in place of PEFT's.
    for module in model.modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear):
            module.forward = MethodType(lora_forward, module)
            module.initial_A = module.initial_B = None
    if init is not None:
        start_from(model, init, is_reference)
    return model


def usable_targets(base: PreTrainedModel, config: LoraConfig) -> str | list[str]:
    """The target modules of `config`, without the linear layers that "all-linear" cannot mean.

    Raises UserError for a named target that LoRA of linear layers cannot have.
    """
    linears = {name: m for name, m in base.named_modules() if is_linear(m)}
    refused = {
        leaf: reason
        for leaf in sorted({name.rpartition(".")[2] for name in linears})
        if (reason := refusal_of(base, config, leaf))
    }
    head = base.get_output_embeddings()
    if config.target_modules == "all-linear":
        refused |= dict.fromkeys(architecture.idle_linears(base.config), "is not called")
        others = [m for m in base.modules() if isinstance(m, nn.Linear) and not is_linear(m)]
        if not refused and not others and not refusal_of(base, config, "all-linear"):
            return config.target_modules
        names = [name for name in linears if name.rpartition(".")[2] not in refused]
        return sorted(name for name in names if linears[name] is not head)

    # 1) Targets that PEFT would take for something else, or not at all.
    for target in config.target_modules:
        leaf = target.rpartition(".")[2]
        if reason := refused.get(leaf) or refusal_of(base, config, leaf):
            raise UserError(f"--lora_targets {target}: {reason}; leave it out")
    # 2) Modules that are not linear layers.
    for name, module in base.named_modules():
        if not any(name == t or name.endswith(f".{t}") for t in config.target_modules):
            continue
        if name not in linears:
            raise UserError(
                f"--lora_targets {name}: is not a linear layer ({type(module).__name__}); name "
                "linear layers, or use all-linear"
            )
    return config.target_modules


def is_of_architecture(module: nn.Module) -> bool:
    """Whether a module's class belongs to one architecture, not to torch or to a quantisation."""
    return type(module).__module__.startswith("transformers.models.")


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes what a linear layer computes. Routers of experts and grouped layers
    are derived from nn.Linear too, and do something else; the quantised layers do not.
    """
    if isinstance(module, Conv1D):
        return True
    if not isinstance(module, nn.Linear):
        return False
    if not is_of_architecture(module) or type(module).forward is nn.Linear.forward:
        return True
    weight, bias = module.weight.detach(), module.bias
    x = torch.linspace(-1, 1, 2 * module.in_features, device=weight.device, dtype=weight.dtype)
    x = x.reshape(2, -1)
    try:
        with torch.no_grad():
            ours, expected = module(x), F.linear(x, weight, bias)
    except RuntimeError:  # it wants another shape
        return False
    if not isinstance(ours, Tensor) or ours.shape != expected.shape:
        return False
    return ours.is_meta or torch.allclose(ours, expected, rtol=0.05, atol=0.05)


def tied_head_warning(model: PeftModel) -> str:
    """What the user of an adapter on a head that is the embedding too should know, or ''."""
    base = model.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if not isinstance(head, LoraLayer) or head.get_base_layer().weight is not embedding.weight:
        return ""
    return (
        "the output head shares its weights with the embedding: use the adapter as it is, because "
        "merging it into the base would change the embedding too"
    )


def refusal_of(base: PreTrainedModel, config: LoraConfig, leaf: str) -> str:
    """Why PEFT does not adapt linear layers of this last name ("all-linear": of any) in `base`, or
    ''.

    PEFT has two such rules and no public way to ask for them, so they are tried on a copy of the
    configuration; a version without them has nothing to refuse. (1) Names of experts that
    transformers has fused into one tensor are taken for that tensor, wherever they occur. (2) The
    kernels of Mamba read the weights of some layers directly.
    """
    probe = copy.deepcopy(config)
    probe.target_modules = leaf if leaf == "all-linear" else {leaf}
    try:
        if convert := getattr(conversion, "convert_peft_config_for_transformers", None):
            convert(probe, model=base, conversions=None)
    except ValueError:  # one half of a fused tensor
        probe.target_parameters = {leaf}
    if probe.target_parameters:
        return "PEFT takes this name for the model's experts, which are not linear layers"
    try:
        if check := getattr(tuners_utils, "_check_lora_target_modules_mamba", None):
            check(config, base, leaf)
    except ValueError:
        return "PEFT does not adapt this layer of Mamba, whose kernels read its weights directly"
    return ""


def check_loads_back(model: PeftModel) -> None:
    """Raise UserError if PEFT does not find all of the adapter's matrices under the names that it
    saves them with: for some architectures it renames them on the way in, and then only warns.
    """
    result = set_peft_model_state_dict(model, get_peft_model_state_dict(model))
    lost = sorted({name.partition(".lora_")[0] for name in result.missing_keys if "lora_" in name})
    if lost:
        leaves = sorted({name.rpartition(".")[2] for name in lost})
        raise UserError(
            f"PEFT {peft_version} would not load an adapter on {lost[0].partition('.model.')[2]} "
            f"back into this architecture ({len(lost)} layers); name other layers in "
            f"--lora_targets, not {', '.join(leaves)}"
        )


def lora_config(folder: Path) -> LoraConfig:
    """The configuration of the adapter in `folder`. Raises UserError unless it is plain LoRA."""
    if not all(
        (folder / name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors")
    ):
        raise UserError(
            f"{folder}: no adapter there (adapter_config.json and adapter_model.safetensors)"
        )
    disk.check_readable(folder / "adapter_model.safetensors")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{folder}: adapter_config.json cannot be read ({first_line(error)})"
        ) from None
    if feature := unsupported_feature(config):
        raise UserError(
            f"{folder}: plain LoRA adapters only, this one has {feature}; merge it into its base"
        )
    return config


def unsupported_feature(config: PeftConfig) -> str | None:
    """What makes an adapter other than plain LoRA, or None."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        return kind
    for option, plain in PLAIN_LORA.items():
        if getattr(config, option, plain) not in (plain, None, []):
            return option
    if config.init_lora_weights not in (True, False, "gaussian"):
        return f"init_lora_weights {config.init_lora_weights}"
    return None


def lora_layers(file) -> list[str]:
    """Names of the layers that have a LoRA matrix A in an open adapter_model.safetensors."""
    pattern = r"base_model\.model\.(.+)\.lora_A\.weight"
    matches = (re.fullmatch(pattern, key) for key in list(file.keys()))
    return sorted(match[1] for match in matches if match)


def start_from(model: PeftModel, folder: Path, is_reference: bool) -> None:
    """Copy the adapter weights in `folder` into `model`; if it is part of the reference, keep a
    second copy for it.

    Raises UserError if they cannot be read or do not fit.
    """
    try:
        weights = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: adapter_model.safetensors cannot be read ({first_line(error)})"
        ) from None
    bad = [name for name, values in weights.items() if not values.isfinite().all()]
    if bad:
        raise UserError(f"{folder}: weights that are NaN or infinite ({bad[0]}); train it again")
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }
    expected = {f"{name}.lora_{side}.weight" for name in layers for side in "AB"}
    if unmatched := sorted(expected ^ weights.keys()):
        raise UserError(
            f"{folder}: does not fit this model ({unmatched[0]} is in only one of them)"
        )
    for name, layer in layers.items():
        if not isinstance(layer.get_base_layer(), nn.Linear):
            raise UserError(f"{folder}: adapts {name}, which is not a linear layer; not supported")
        for side in "AB":
            parameter = getattr(layer, f"lora_{side}")["default"].weight
            start = weights[f"{name}.lora_{side}.weight"]
            if parameter.shape != start.shape:
                raise UserError(f"{folder}: does not fit this model ({name} has another shape)")
            with torch.no_grad():
                parameter.copy_(start)
            if not is_reference:
                continue
            # A buffer instead of the attribute, so that it moves with the layer.
            delattr(layer, f"initial_{side}")
            layer.register_buffer(f"initial_{side}", parameter.detach().clone(), persistent=False)


def lora_forward(layer: LoraLayer, x: Tensor) -> Tensor:
    """The forward of PEFT's LoRA layer with one adapter; x (..., in) -> (..., out).

    The same sum as PEFT's, y = base(x) + scaling * dropout(x) A^T B^T, but the two small matrices
    are cast to the dtype of the activations, not every activation to that of the matrices, and the
    sum is part of the second product (`addmm`) where that saves a copy.
    """
    rows = x.flatten(0, -2)  # (T, in)
    output = layer.base_layer(rows)  # (T, out)

    # Switched off, a layer is its base alone, or with the matrices it started from; no dropout.
    is_reference = layer._disable_adapters
    if is_reference:
        matrix_a, matrix_b = layer.initial_A, layer.initial_B
    else:
        matrix_a, matrix_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    if matrix_a is None:
        return output.unflatten(0, x.shape[:-1])

    a, b = matrix_a.to(x.dtype), matrix_b.to(x.dtype)
    inputs = rows if is_reference else layer.lora_dropout["default"](rows)
    low = F.linear(inputs, a) * layer.scaling["default"]  # (T, r)
    if torch.compiler.is_compiling():
        # The compiler fuses this sum into what follows. In fp32, because it would take a sum in
        # bf16 for an addmm, which copies.
        output = (output.float() + F.linear(low, b).float()).to(output.dtype)
    elif type(layer.get_base_layer()) is nn.Linear:
        output = output.addmm_(low, b.t())  # in place: nothing else needs the base's output
    else:
        # A quantised layer's output may be a view of something that its backward needs.
        output = output.addmm(low, b.t())
    return output.unflatten(0, x.shape[:-1])


def is_ours(model: nn.Module) -> bool:
    """Whether `lora_forward` computes every LoRA layer, and PEFT's code none."""
    return all("forward" in vars(m) for m in model.modules() if isinstance(m, LoraLayer))


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Context in which `model` is the frozen reference: every LoRA layer is its base alone, or has
    the weights of --init_adapter (`add_lora`, is_reference).

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
def forward_of_peft(model: nn.Module) -> Iterator[None]:
    """Context in which PEFT's own code computes the LoRA layers, for comparison with ours."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and "forward" in vars(m)]
    ours = [layer.forward for layer in layers]
    for layer in layers:
        del layer.forward
    try:
        yield
    finally:
        for layer, forward in zip(layers, ours):
            layer.forward = forward


def only_adapter_trains(model: nn.Module) -> None:
    """Put everything but the adapter into evaluation mode: dropout, router noise and layer drop of
    the base act in train mode alone, whatever they are called.

    Except for quantised linear layers: on the CPU one eval forward of a 4-bit layer repacks its
    weights, and from then on every gradient upstream is silently zero.
    """
    for module in model.modules():
        quantised = isinstance(module, nn.Linear) and type(module) is not nn.Linear
        quantised = quantised and not is_of_architecture(module)
        module.training = quantised or isinstance(module, BaseTunerLayer)
    for module in lora_dropouts(model):
        module.training = True


def lora_dropouts(model: nn.Module) -> list[nn.Module]:
    """The adapter's own dropout modules."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return [part for layer in layers for part in layer.lora_dropout.values()]


@contextmanager
def dropout(model: nn.Module, active: bool) -> Iterator[None]:
    """Context in which the adapter's dropout is on or off."""
    modules = lora_dropouts(model)
    before = [module.training for module in modules]
    for module in modules:
        module.train(active)
    try:
        yield
    finally:
        for module, training in zip(modules, before):
            module.train(training)
