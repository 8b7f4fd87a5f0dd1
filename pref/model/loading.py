"""Load the frozen base model, and identify the weights that were loaded."""

import hashlib

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from pref.files.console import UserError, first_line


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

    Raises UserError if the model cannot be loaded or is not a causal language model.
    """
    quantisation = None
    if quant == "nf4":
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=storage,
        )
    try:
        if device.type == "meta":
            base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=dtype)
        else:
            base = AutoModelForCausalLM.from_pretrained(
                model, dtype=dtype, quantization_config=quantisation, device_map={"": device}
            )
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model {model}: cannot be loaded ({first_line(error)}); give a folder, or a hub id "
            "that this machine can reach (gated models need `hf auth login`)"
        ) from None
    base.requires_grad_(False)
    base.config.use_cache = False
    return base


def fingerprint(base: PreTrainedModel) -> str:
    """sha256 over a sample of every parameter as loaded, at most 8,191 values of each.

    Equal only for the same weights, quantisation and dtype.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(base.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 4096)].contiguous().view(torch.uint8).cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
