"""the frozen base model"""

import hashlib

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from pref.files.console import UserError
from pref.model import chat


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' is bf16 where the hardware computes it, else fp32."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device.type == "cuda":
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float32
        )
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def load_base(
    model: str,
    dtype: torch.dtype,
    quant: str,
    device: torch.device,
    storage: torch.dtype = torch.uint8,
) -> PreTrainedModel:
    """The base model of a hub id or folder, on `device`, frozen. quant: 'nf4' (double quantisation)
    or 'none'. On the meta device: its shapes without its weights.

    Raises UserError if it cannot be had or is no causal language model.
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
            f"--model {model}: cannot be loaded ({chat.first_line(error)}); "
            "give a folder, or a hub id that this machine reaches (gated models need `hf auth login`)"
        ) from None
    base.requires_grad_(False)
    base.config.use_cache = False
    # The model stays in train mode throughout (see `dropout`), where attention dropout would reach
    # the reference too.
    for module in base.modules():
        if getattr(module, "attention_dropout", 0):
            module.attention_dropout = 0.0
    return base


def fingerprint(base: PreTrainedModel) -> str:
    """sha256 over a sample of every loaded parameter: equal only for the same weights, quantisation
    and dtype.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(base.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 4096)].contiguous().view(torch.uint8).cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
