"""The model: device and ranks, loading, LoRA, FSDP2, and log-probabilities of responses.

Shared because a log-probability must mean the same in training, evaluation and the reference.
"""

import hashlib
import math
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from chat import TokenPair, first_line
from files import UserError
from losses import FULL_KL, token_full_kl, token_score

LOGITS_CHUNK = 2**24  # fp32 logits held at once, 64 MiB: 524 response tokens at a vocabulary of 32k


# ---- device and ranks ---------------------------------------------------------------------------


class Ranks(NamedTuple):
    """Where this process stands: its rank, the number of ranks, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def print(self, *args) -> None:
        if self.main:
            print(*args, flush=True)

    def progress(self, items: Iterable, what: str, unit: str = "batch") -> Iterable:
        """A bar with rate and time left on rank 0's terminal; nothing in a log file."""
        return tqdm(items, desc=what, unit=unit, disable=None if self.main else True, leave=False, dynamic_ncols=True)


def init_ranks() -> Ranks:
    """Join torchrun's process group (nccl on CUDA, gloo on CPU), or make one of this single process."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device, backend = torch.device("cuda", local_rank), "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        if shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES") != "" and local_rank == 0:
            print("warning: this machine has nvidia-smi, but torch sees no GPU (a driver older than its CUDA?); using "
                  "the CPU", file=sys.stderr)  # fmt: skip
    if "RANK" in os.environ:
        dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def close_ranks() -> None:
    dist.barrier()  # without it gloo aborts at exit when one rank is slower
    dist.destroy_process_group()


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' is bf16 where the hardware computes it, else fp32."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


# ---- loading ------------------------------------------------------------------------------------


def load_base(
    model: str, dtype: torch.dtype, quant: str, device: torch.device, storage: torch.dtype = torch.uint8
) -> PreTrainedModel:
    """The base model of a hub id or folder, on `device`, frozen. quant: 'nf4' (double quantisation) or 'none'.

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
        base = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, quantization_config=quantisation, device_map={"": device}
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model {model}: cannot be loaded ({first_line(error)}); "
            "give a folder, or a hub id that this machine reaches (gated models need `hf auth login`)"
        ) from None
    base.requires_grad_(False)
    base.config.use_cache = False
    # The model stays in train mode throughout (see `dropout`), where attention dropout would reach the reference too.
    for module in base.modules():
        if getattr(module, "attention_dropout", 0):
            module.attention_dropout = 0.0
    return base


def fingerprint(base: PreTrainedModel) -> str:
    """sha256 over a sample of every loaded parameter: equal only for the same weights, quantisation and dtype."""
    digest = hashlib.sha256()
    for name, parameter in sorted(base.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 4096)].contiguous().view(torch.uint8).cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def add_lora(base: PreTrainedModel, r: int, alpha: int, dropout: float, targets: str, seed: int) -> PeftModel:
    """`base` with LoRA adapters in fp32: A random from `seed` (the same for every loss), B zero.

    targets: 'all-linear' (every linear layer but the output head) or module names with commas.
    """
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
        raise UserError(f"--lora_targets {targets}: {first_line(error)}") from None
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # AdamW's steps at lr 1e-5 vanish in bf16 weights
    return model


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The frozen reference: `model` with every LoRA layer passed through.

    Not PEFT's `disable_adapter`, which also switches `requires_grad` and so confuses FSDP's parameter groups.
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
    """Dropout on or off. Never `model.eval()`: on CPU one eval forward of a 4-bit model repacks its weights, and
    from then on every gradient upstream is silently zero; and activation checkpointing is tied to train mode."""
    modules = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    before = [module.training for module in modules]
    for module in modules:
        module.train(active)
    try:
        yield
    finally:
        for module, training in zip(modules, before):
            module.train(training)


# ---- batches and log-probabilities --------------------------------------------------------------


class Batch(NamedTuple):
    """B pairs as 2B padded rows, chosen first, and where their response tokens are predicted."""

    input_ids: Tensor  # (2B, T)
    attention_mask: Tensor  # (2B, T)
    positions: Tensor  # (N,) index into the flattened (2B * T) hidden states that predicts each response token
    targets: Tensor  # (N,) the response tokens
    segments: Tensor  # (N,) row, 0 .. 2B-1, of each response token
    lengths: Tensor  # (2B,) response tokens a row
    tokens: int  # without padding
    chosen_tokens: int  # response tokens of the chosen rows; they stand first


def make_batch(pairs: list[TokenPair], pad_id: int, device: torch.device) -> Batch:
    rows = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    width = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    positions, targets, segments = [], [], []
    for i, (prompt, response) in enumerate(rows):
        length = len(prompt) + len(response)
        ids[i, :length] = torch.tensor(prompt + response)
        mask[i, :length] = 1
        positions += range(i * width + len(prompt) - 1, i * width + length - 1)
        targets += response
        segments += [i] * len(response)
    lengths = torch.tensor([len(response) for _, response in rows])
    tensors = (ids, mask, torch.tensor(positions), torch.tensor(targets), torch.tensor(segments), lengths)
    counts = {"tokens": int(mask.sum()), "chosen_tokens": sum(len(p.chosen) for p in pairs)}
    return Batch(*(t.to(device, non_blocking=True) for t in tensors), **counts)


def share_out(indices: list[int], pairs: list[TokenPair], ranks: Ranks, size: int) -> list[list[int]]:
    """This rank's micro-batches of at most `size` of `indices`: similar lengths together, and as many on every rank
    (some may be empty), because FSDP's collectives need all ranks."""

    def width(i: int) -> int:
        return len(pairs[i].prompt) + max(len(pairs[i].chosen), len(pairs[i].rejected))

    mine = sorted(indices, key=lambda i: (-width(i), i))[ranks.rank :: ranks.world]
    count = math.ceil(math.ceil(len(indices) / ranks.world) / size)
    return [mine[i * size : (i + 1) * size] for i in range(count)]


def sum_by_row(values: Tensor, batch: Batch) -> Tensor:
    """Per response token (the first n of N) -> (2B,) sums per row, fp32. Added in float64: the order, which CUDA does
    not fix, then leaves no trace, and equal tokens give equal sums."""
    zeros = values.new_zeros(len(batch.lengths), dtype=torch.float64)
    return zeros.index_add(0, batch.segments[: len(values)], values.double()).float()


class ResponseLogps(nn.Module):
    """A causal LM (PEFT-wrapped or plain) whose forward gives log-probabilities of response tokens.

    Only response positions reach the output head, a chunk of LOGITS_CHUNK logits at a time and recomputed in the
    backward pass, so that no [tokens, vocabulary] tensor is ever held in fp32 beyond one chunk.
    """

    def __init__(self, model: PeftModel | PreTrainedModel):
        super().__init__()
        self.model = model
        self.causal = [model.get_base_model() if isinstance(model, PeftModel) else model]  # in a list: not a submodule
        config = self.causal[0].config.get_text_config()
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.chunk_tokens = max(1, LOGITS_CHUNK // config.vocab_size)

    @property
    def backbone(self) -> nn.Module:
        return getattr(self.causal[0], self.causal[0].base_model_prefix)

    def hidden(self, batch: Batch) -> Tensor:
        """(N, H) last hidden state at the position that predicts each response token."""
        output = self.backbone(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        return output.last_hidden_state.flatten(0, 1)[batch.positions]

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, H) -> (n, V) fp32."""
        logits = self.causal[0].get_output_embeddings()(hidden).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def chunk(self, hidden: Tensor, targets: Tensor, reference: Tensor | None, kl: str | None, score: dict | None):
        """Of `targets` (n,): log-probs; divergence `kl` from the `reference` hidden states; proper `score`. (n,) each,
        None where not asked for."""
        logits = self.logits(hidden)
        logps = -F.cross_entropy(logits, targets, reduction="none")
        divergence = None
        if reference is not None:
            with torch.no_grad(), adapter_off(self.model):  # the head may carry an adapter too
                ref_logits = self.logits(reference)
            divergence = token_full_kl(logits, ref_logits, kl)
        return logps, divergence, None if score is None else token_score(logits, targets, **score)

    def forward(
        self, batch: Batch, kl: str | None = None, score: dict | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Per response token, fp32: log-prob (N,); for `kl` full_* its divergence from the adapter-off model (N,);
        for `score` (arguments of losses.token_score) the score of the chosen responses' tokens (the first of N)."""
        reference = None
        if kl in FULL_KL:
            with torch.no_grad(), adapter_off(self.model):
                reference = self.hidden(batch)
        hidden = self.hidden(batch)
        chosen = batch.chosen_tokens if score is not None else 0  # scored tokens, which come first
        edges = [*range(0, chosen, self.chunk_tokens), *range(chosen, len(hidden), self.chunk_tokens), len(hidden)]
        pieces = []
        for start, end in zip(edges, edges[1:]):
            ref = None if reference is None else reference[start:end]
            wanted = (batch.targets[start:end], ref, kl, score if start < chosen else None)
            pieces.append(checkpoint(self.chunk, hidden[start:end], *wanted, use_reentrant=False))
        columns = [[part for part in column if part is not None] for column in zip(*pieces)]
        logps, divergence, scores = (torch.cat(column) if column else None for column in columns)
        return logps, divergence, scores


@torch.no_grad()
def check_logps(policy: ResponseLogps, batch: Batch, tolerance: float) -> None:
    """Raise UserError if our path to the log-probs disagrees with the architecture's own forward on `batch`."""
    with dropout(policy, active=False):
        mine = policy(batch)[0]
        output = policy.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    logits = output.logits.flatten(0, 1)[batch.positions].float()
    theirs = -F.cross_entropy(logits, batch.targets, reduction="none")
    difference = (mine - theirs).abs().mean().item()
    if not difference <= tolerance:
        raise UserError(
            f"log-probabilities differ by {difference:.3g} nats a token from the model's own forward (tolerance "
            f"{tolerance}): this architecture ({type(policy.causal[0]).__name__}) computes its logits in its own way"
        )


def shard(policy: ResponseLogps, mode: str, dtype: torch.dtype, ranks: Ranks) -> None:
    """FSDP2 over all ranks, layer by layer. mode 'adapters': the frozen base is replicated; 'full': sharded too."""
    layers = getattr(policy.backbone, "layers", None)
    if layers is None:
        raise UserError(f"{type(policy.causal[0]).__name__}: no `layers` to shard; decoder-only models are supported")
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    frozen = {p for p in policy.parameters() if not p.requires_grad} if mode == "adapters" else set()
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision, ignored_params=frozen)
    fully_shard(policy, mesh=mesh, mp_policy=precision, ignored_params=frozen)


# ---- adapters on disk ---------------------------------------------------------------------------


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """`base` with the adapter in `folder`, in the base's dtype as in training. Raises UserError if it does not fit."""
    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder}: no adapter (adapter_config.json and adapter_model.safetensors); train it again")
    try:
        with warnings.catch_warnings():  # PEFT only warns of layers without weights, and they would answer as the base
            warnings.filterwarnings("error", message=".*missing adapter keys")
            model = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)
    except (RuntimeError, ValueError, OSError, SafetensorError, UserWarning) as error:
        lines = re.sub(r"\s+", " ", str(error))[:200]
        raise UserError(f"{folder}: this adapter does not load on this base model ({lines})") from None
    return model.to(base.dtype) if not getattr(base, "is_quantized", False) else model
