"""Load the frozen base model, completely or not at all."""

import contextlib
import hashlib
import logging
import pickle
import re
from collections.abc import Iterable, Iterator

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    Mxfp4Config,
    PreTrainedModel,
)

from pref.files.console import UserError, first_line
from pref.model.weights import ModelFiles, check_files, find_model

# Stored tensors that a model may do without: buffers of other versions of transformers, and the
# scales of an 8-bit cache of keys and values, which is not used here.
HARMLESS = re.compile(r"rotary_emb\.inv_freq$|attn\.masked_bias$|\.[kvq]_scale$")
# Quantised checkpoints whose layers have no backward pass. Their weights are computed once, when
# they are loaded, in the compute dtype.
DEQUANTISED = {
    "fp8": lambda: FineGrainedFP8Config(dequantize=True),
    "mxfp4": lambda: Mxfp4Config(dequantize=True),
    "compressed-tensors": lambda: CompressedTensorsConfig(run_compressed=False),
}
OUT_OF_MEMORY = {"--model ": "--quant nf4", "--judge hf:": "serve it and give --base_url"}
LINEARITY_TOLERANCE = 0.05  # relative, of a quantised layer's gradient in bf16


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called `name`. 'auto' is bf16 where the hardware computes in it, else fp32."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Builds of torch without oneDNN, such as those for macOS on ARM, lack the operator.
        supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        has_bf16 = supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def load_base(
    model: str,
    dtype: torch.dtype,
    quant: str,
    device: torch.device,
    storage: torch.dtype = torch.uint8,
) -> PreTrainedModel:
    """The base model of a hub id or folder, on `device`, frozen.

    quant: 'nf4' (4 bits, double quantisation) or 'none'. storage: dtype of the tensors that hold
    packed 4-bit weights. On the meta device the model has its shapes only; no weights are read.

    Raises UserError if the model cannot be loaded completely or is not a causal language model.
    """
    files = find_model(model)
    if device.type == "meta":
        config = AutoConfig.from_pretrained(files.name, trust_remote_code=False)
        with device:
            base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        quantisation = None
        if quant == "nf4":
            quantisation = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
                bnb_4bit_quant_storage=storage,
            )
        base = load_model(files, dtype, device, quantisation)
    base.requires_grad_(False)
    base.config.use_cache = False
    if files.quantisation and device.type != "meta":
        check_backward(base, f"--model {model}")
    return base


def load_model(
    files: ModelFiles,
    dtype: torch.dtype,
    device: torch.device,
    quantisation: BitsAndBytesConfig | None = None,
    option: str = "--model ",
    auto: type = AutoModelForCausalLM,
    elsewhere: Iterable[str] = (),
    **settings,
) -> PreTrainedModel:
    """All weights of a checkpoint, and nothing but them, on `device`.

    quantisation: of weights that are not quantised yet. A checkpoint that is quantised itself is
    loaded as it is, or in the compute dtype (DEQUANTISED). auto: transformers' class for the kind
    of model. elsewhere: stored tensors that the caller loads. settings: of the configuration, in
    place of its own. Raises UserError, beginning with `option`, that names what is missing, left
    over, of another shape or not finite.
    """
    place, own = f"{option}{files.name}", files.quantisation
    if own and quantisation:
        raise UserError(f"{place}: its weights are quantised already ({own}); give --quant none")
    try:
        if own in DEQUANTISED:
            quantisation = DEQUANTISED[own]()
        # A quantization_config of None would replace the checkpoint's own one.
        options = {"quantization_config": quantisation} if quantisation else {}
        with without_report() if elsewhere else contextlib.nullcontext():
            model, keys = auto.from_pretrained(
                files.name,
                dtype=dtype,
                device_map={"": device},
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported below, with their names
                **options,
                **settings,
            )
    except torch.OutOfMemoryError:
        remedy = OUT_OF_MEMORY.get(option, "give a smaller one, or --dtype bfloat16")
        raise UserError(f"{place}: does not fit into the memory of {device}; {remedy}") from None
    except (ImportError, OSError, ValueError, TypeError, RuntimeError, KeyError) as error:
        raise UserError(unloadable(files, place, error)) from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{place}: its pickled weights (.bin) are damaged, or hold code, which is never run; "
            "give a release with .safetensors files"
        ) from None
    except (SafetensorError, EOFError) as error:
        raise UserError(
            f"{place}: a weight file cannot be read ({first_line(error)}); download the model again"
        ) from None
    check_files(files.folder, files.config, place)  # of a hub id they are here only now
    keys["unexpected_keys"] = set(keys["unexpected_keys"]) - set(elsewhere)
    check_keys(type(model).__name__, keys, place)
    check_tied(model, place)
    check_finite(model.named_parameters(), place)
    if own:
        check_scaled(model, place)
    return model


@contextlib.contextmanager
def without_report() -> Iterator[None]:
    """Without transformers' table of what a checkpoint lacks and holds besides: where some tensors
    are loaded elsewhere it would alarm the user, and `check_keys` names the others.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def unloadable(files: ModelFiles, place: str, error: Exception) -> str:
    """The message for a model that transformers does not load."""
    reason = first_line(error)
    if isinstance(error, KeyError):
        reason = f"unknown: {reason}"
    if files.quantisation:
        return (
            f"{place}: its weights are quantised ({files.quantisation}) and cannot be loaded on "
            f"this machine ({reason}); install what is missing, or give the model's release that "
            "is not quantised, with --quant nf4 to save memory"
        )
    remedy = "check its files"
    if not files.is_local:
        remedy = "give a folder, or a hub id that this machine can reach (gated models need `hf "
        remedy += "auth login`)"
    return f"{place}: cannot be loaded ({reason}); {remedy}"


# ---- whether everything was loaded --------------------------------------------------------------


def check_keys(architecture: str, keys: dict, place: str) -> None:
    """Raise UserError if the checkpoint and the model do not have the same tensors. keys: what
    from_pretrained reports; tied weights and what an architecture declares dispensable are not in
    it.
    """
    missing = sorted(keys["missing_keys"])
    unexpected = sorted(key for key in keys["unexpected_keys"] if not HARMLESS.search(key))
    other_shape = sorted(key for key, *_ in keys["mismatched_keys"])
    problems = []
    if missing:
        problems.append(f"lacks {named(missing)}, which would be random numbers")
    if other_shape:
        problems.append(f"has another shape of {named(other_shape)} than its config.json says")
    if unexpected:
        problems.append(f"holds {named(unexpected)}, which {architecture} does not use")
    hint = "Check its architecture in config.json, and how it was saved"
    if missing == ["lm_head.weight"]:
        hint = "If its output head is its embedding, set tie_word_embeddings in config.json to true"
    if problems:
        raise UserError(
            f"{place}: its weights are not those of a whole {architecture}: the checkpoint "
            f"{'; it '.join(problems)}. {hint}"
        )


def check_tied(model: PreTrainedModel, place: str) -> None:
    """Raise UserError if head and embedding differ that the configuration says are one tensor:
    programs disagree on which of them is then meant.
    """
    modules = (model.get_output_embeddings(), model.get_input_embeddings())
    both = {id(module.weight) for module in modules if hasattr(module, "weight")}
    if model.config.tie_word_embeddings and len(both) == 2:
        raise UserError(
            f"{place}: its config.json says that the output head and the embedding share their "
            "weights, but the checkpoint has different ones; set tie_word_embeddings to false"
        )


def named(keys: list[str], most: int = 3) -> str:
    more = f", ... {len(keys)} in all" if len(keys) > most else ""
    return f"{', '.join(keys[:most])}{more}"


@torch.no_grad()
def check_finite(tensors: Iterable[tuple[str, Tensor]], place: str) -> None:
    """Raise UserError that names the tensors with a NaN or an infinity in them."""
    bad = []
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel():
            low, high = torch.aminmax(tensor)  # without a copy; a NaN becomes both
            if not (low.isfinite() and high.isfinite()):
                bad.append(name)
    if bad:
        raise UserError(
            f"{place}: weights that are NaN or infinite: {named(bad)}; the checkpoint is damaged, "
            "or overflowed when it was saved"
        )


def check_scaled(model: PreTrainedModel, place: str) -> None:
    """Raise UserError if 8-bit weights were left without the scales that they are multiplied by."""
    bare = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module.weight.itemsize == 1
    ]
    if bare:
        raise UserError(
            f"{place}: the checkpoint has no scales for its 8-bit weights of {named(bare)}; "
            "download the model again, or give its release that is not quantised"
        )


def check_backward(base: PreTrainedModel, place: str) -> None:
    """Raise UserError if a gradient does not pass through the layers of a quantised checkpoint: it
    would never reach the adapters below, or reach them wrong.

    A linear layer f has f(x) - f(0) = W x, so that for any u and x the product u.(f(x) - f(0)) is
    equal to x.(W^T u), where W^T u is what the backward pass computes. One layer of each class is
    tried, in train mode and with gradients: see lora.only_adapter_trains.
    """
    tried: dict[type, tuple[str, nn.Module]] = {}
    for name, module in base.named_modules():
        if type(module) is not nn.Linear and hasattr(module, "in_features"):
            tried.setdefault(type(module), (name, module))
    generator, mode = torch.Generator().manual_seed(0), base.training
    base.train()
    for kind, (name, layer) in tried.items():
        x = torch.randn(8, layer.in_features, generator=generator)
        x = x.to(base.device, base.dtype).requires_grad_()
        try:
            output, constant = layer(x), layer(torch.zeros_like(x))
            u = torch.randn(output.shape, generator=generator).to(output)
            output.backward(u)
        except (RuntimeError, NotImplementedError) as error:
            raise UserError(no_gradient(place, kind, name, first_line(error))) from None
        with torch.no_grad():
            through = (u.float() * (output - constant).float()).sum(-1)  # (8,)
            scale = u.float().norm(dim=-1) * output.float().norm(dim=-1)
        back = torch.zeros_like(through)
        if x.grad is not None:
            back = (x.detach().float() * x.grad.float()).sum(-1)
        error = ((through - back) / scale).abs().max().item()
        if not error <= LINEARITY_TOLERANCE:
            raise UserError(no_gradient(place, kind, name, f"it is off by {error:.0%}"))
    base.train(mode)


def no_gradient(place: str, kind: type, name: str, reason: str) -> str:
    return (
        f"{place}: its quantised layers ({kind.__name__}, first {name}) have no usable gradient "
        f"({reason}), so nothing below them would be trained; give the model's release that is not "
        "quantised, with --quant nf4 to save memory"
    )


# ---- records of version 1.0.0 -------------------------------------------------------------------


def fingerprint(base: PreTrainedModel, dtype: torch.dtype | None = None) -> str:
    """sha256 over a sample of every parameter as loaded, at most 8,191 values of each; as if loaded
    in `dtype`, where it is given.

    What version 1.0.0 knew a model by. It depends on quantisation and dtype, and misses changes
    between its samples: weights.identity does not.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(base.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 4096)].contiguous()
        if dtype is not None and sample.dtype == torch.float32:
            sample = sample.to(dtype)
        digest.update(f"{name} {tuple(parameter.shape)} {sample.dtype}".encode())
        digest.update(sample.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()
