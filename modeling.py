"""The model: device and ranks, loading, LoRA, FSDP2, and log-probabilities of responses.

Shared because a log-probability must mean the same in training, evaluation and the reference.
"""

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MethodType
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from chat import first_line
from files import UserError
from losses import FULL_KL, token_full_kl, token_score
from packing import Batch, block_mask

LOGITS_CHUNK = 2**24  # fp32 logits held at once, 64 MiB: 524 response tokens at a vocabulary of 32k


# ---- device and ranks ---------------------------------------------------------------------------


class Ranks(NamedTuple):
    """Where this process stands: its rank, the number of ranks, and its device."""

    rank: int
    world: int
    device: torch.device
    hosts: dist.ProcessGroup | None = None  # for what ranks say to each other without waiting for their devices

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, number: int) -> int:
        """The largest `number` of any rank, on every rank; the devices go on meanwhile."""
        if self.world == 1:
            return number
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.hosts)
        return int(tensor)

    def from_main(self, value: object) -> object:
        """Rank 0's `value`, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, 0)
        return values[0]

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
    hosts = dist.new_group(backend="gloo") if backend == "nccl" else None
    return Ranks(dist.get_rank(), dist.get_world_size(), device, hosts)


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
    On the meta device: its shapes without its weights.

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


def add_lora(
    base: PreTrainedModel, r: int, alpha: int, dropout: float, targets: str, seed: int, init: Path | None = None
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
        raise UserError(f"--lora_targets {targets}: {first_line(error)}") from None
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # AdamW's steps at lr 1e-5 vanish in bf16 weights
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)  # a set, which would be written in any order
    for module in model.modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear):
            module.forward = MethodType(lora_forward, module)
            module.initial_A = module.initial_B = None
    if init is not None:
        start_from(model, init)
    return model


def lora_config(folder: Path) -> LoraConfig:
    """The configuration of the LoRA adapter in `folder`. Raises UserError for one that is not plain LoRA."""
    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder}: no adapter there (adapter_config.json and adapter_model.safetensors)")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder}: adapter_config.json cannot be read ({first_line(error)})") from None
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    usual = {"use_dora": False, "bias": "none", "modules_to_save": None, "layer_replication": None,
             "target_parameters": None, "trainable_token_indices": None, "lora_bias": False, "rank_pattern": {},
             "alpha_pattern": {}}  # fmt: skip
    odd = [key for key, value in usual.items() if getattr(config, key, value) not in (value, None, [])]
    if kind != "LORA" or odd or config.init_lora_weights not in (True, False, "gaussian"):
        what = kind if kind != "LORA" else odd[0] if odd else f"init_lora_weights {config.init_lora_weights}"
        raise UserError(f"{folder}: plain LoRA adapters only, this one has {what}; merge it into its base")
    return config


def lora_layers(file) -> list[str]:
    """Names of the layers that have a LoRA matrix A in an open adapter_model.safetensors."""
    found = (re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", key) for key in list(file.keys()))
    return sorted(match[1] for match in found if match)


def start_from(model: PeftModel, folder: Path) -> None:
    """Give `model` the adapter weights in `folder`, and keep them beside as the reference's."""
    try:
        weights = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: adapter_model.safetensors cannot be read ({first_line(error)})") from None
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    wanted = {f"{name}.lora_{side}.weight" for name in layers for side in "AB"}
    if strange := sorted(wanted ^ weights.keys()):
        raise UserError(f"{folder}: does not fit this model ({strange[0]} is in one of them only)")
    for name, module in layers.items():
        if not isinstance(module.get_base_layer(), nn.Linear):
            raise UserError(f"{folder}: adapts {name}, which is no linear layer; not supported")
        for side in "AB":
            parameter, start = getattr(module, f"lora_{side}")["default"].weight, weights[f"{name}.lora_{side}.weight"]
            if parameter.shape != start.shape:
                raise UserError(f"{folder}: does not fit this model ({name} has another shape)")
            with torch.no_grad():
                parameter.copy_(start)
            delattr(module, f"initial_{side}")  # a buffer instead, so that it goes wherever the layer goes
            module.register_buffer(f"initial_{side}", parameter.detach().clone(), persistent=False)


def lora_forward(layer: LoraLayer, x: Tensor) -> Tensor:
    """PEFT's LoRA layer with its one adapter, base(x) + scaling * dropout(x) A^T B^T, without PEFT's casts of every
    activation to the adapter's dtype and with the sum inside the second product."""
    rows = x.flatten(0, -2)
    output = layer.base_layer(rows)
    if layer._disable_adapters:
        matrices = (layer.initial_A, layer.initial_B)
    else:
        matrices = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    if matrices[0] is not None:
        a, b = (matrix.to(x.dtype) for matrix in matrices)
        inputs = rows if layer._disable_adapters else layer.lora_dropout["default"](rows)  # the reference has none
        low = F.linear(inputs, a) * layer.scaling["default"]
        if torch.compiler.is_compiling():  # joined to what follows; in fp32 it is not taken for an addmm, which copies
            output = (output.float() + F.linear(low, b).float()).to(output.dtype)
        else:  # in place where the base's output is a product's own and not a view of something that backward needs
            add = output.addmm_ if type(layer.get_base_layer()) is nn.Linear else output.addmm
            output = add(low, b.t())
    return output.unflatten(0, x.shape[:-1])


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The frozen reference: `model` with every LoRA layer passed through, or as it was in --init_adapter.

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
    from then on every gradient upstream is silently zero."""
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


def sum_by_row(values: Tensor, batch: Batch) -> Tensor:
    """Per response token (the first n of N) -> (2B,) sums per row, fp32. Added in float64: the order, which CUDA does
    not fix, then leaves no trace, and equal tokens give equal sums."""
    zeros = values.new_zeros(len(batch.lengths), dtype=torch.float64)
    return zeros.index_add(0, batch.segments[: len(values)], values.double()).float()


class TargetLogps(torch.autograd.Function):
    """Log-probabilities of target tokens from hidden states, through a frozen output head.

    d logp / d hidden = (onehot - softmax) W needs nothing from later layers, so it is computed beside the log-prob,
    chunk by chunk, and kept as (N, H); the backward pass only scales it. The logits are computed once and no chunk of
    them outlives its turn.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, softcap, chunk_tokens, logps_of, slopes_of):
        """hidden (N, H), weight (V, H), bias (V,) or None, targets (N,) -> (N,) fp32 nats."""
        logps = hidden.new_empty(len(targets), dtype=torch.float32)
        gradients = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = F.linear(hidden[rows], weight, bias)
            logps[rows], normaliser = logps_of(logits, targets[rows], softcap)
            if gradients is not None:
                torch.mm(slopes_of(logits, targets[rows], normaliser, softcap), weight, out=gradients[rows])
        ctx.save_for_backward(gradients)
        return logps

    @staticmethod
    def backward(ctx, grad):
        (gradients,) = ctx.saved_tensors
        return (grad.unsqueeze(1) * gradients).to(gradients.dtype), *[None] * 7


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """(n, V) logits in fp32, squashed where the architecture does so (Gemma 2)."""
    logits = logits.float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def logps_of(logits: Tensor, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Log-probs of `targets` and the logarithm of the normaliser, (n,) each, fp32."""
    logits = capped(logits, softcap)
    normaliser = logits.logsumexp(-1)
    return logits.gather(1, targets.unsqueeze(1)).squeeze(1) - normaliser, normaliser


def slopes_of(logits: Tensor, targets: Tensor, normaliser: Tensor, softcap: float | None) -> Tensor:
    """d logp / d logits: onehot - softmax, (n, V) in the logits' dtype."""
    squashed = capped(logits, softcap)
    slopes = -torch.exp(squashed - normaliser.unsqueeze(1))
    slopes = slopes + (torch.arange(logits.shape[1], device=logits.device) == targets.unsqueeze(1))
    if softcap is not None:
        slopes = slopes * (1 - (squashed / softcap) ** 2)
    return slopes.to(logits.dtype)


class ResponseLogps(nn.Module):
    """A causal LM (PEFT-wrapped or plain) whose forward gives log-probabilities of response tokens.

    Only response positions reach the output head, a chunk of LOGITS_CHUNK logits at a time, so that no [tokens,
    vocabulary] tensor is ever held in fp32 beyond one chunk, forward or backward.
    """

    def __init__(self, model: PeftModel | PreTrainedModel):
        super().__init__()
        self.model = model
        self.causal = [model.get_base_model() if isinstance(model, PeftModel) else model]  # in a list: not a submodule
        self.causal[0].set_attn_implementation("branches")  # packing.py's
        config = self.causal[0].config.get_text_config()
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.chunk_tokens = max(1, LOGITS_CHUNK // config.vocab_size)
        self.head_functions = (logps_of, slopes_of)

    @property
    def backbone(self) -> nn.Module:
        return getattr(self.causal[0], self.causal[0].base_model_prefix)

    def prepare_layers(self, compiled: bool, checkpointed: bool) -> None:
        """torch.compile and activation checkpointing, layer by layer: one graph serves all layers, and any number of
        tokens. Set on the layers' `forward`, not the modules, so that FSDP's hooks stay outside; and not by
        transformers, whose checkpointing moved from `__call__` into `forward` and would be compiled away."""
        for layer in decoder_layers(self):
            if compiled:
                # not dynamic=True: under FSDP the size of a head becomes a variable too, and its code scalar
                layer.forward = torch.compile(layer.forward)
            if checkpointed:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if compiled:
            self.head_functions = tuple(torch.compile(f, dynamic=True) for f in self.head_functions)

    def hidden(self, batch: Batch) -> Tensor:
        """(N, H) last hidden state at the position that predicts each response token."""
        packed = batch.position_ids is not None
        mask = block_mask(batch) if packed and batch.input_ids.is_cuda else batch.mask
        output = self.backbone(
            input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
        )
        return output.last_hidden_state.flatten(0, 1)[batch.positions]

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, H) -> (n, V) fp32."""
        return capped(self.causal[0].get_output_embeddings()(hidden), self.softcap)

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
        self, batch: Batch, kl: str | None = None, score: dict | None = None, own_forward: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Per response token, fp32: log-prob (N,); for `kl` full_* its divergence from the adapter-off model (N,);
        for `score` (arguments of losses.token_score) the score of the chosen responses' tokens (the first of N).
        own_forward: the log-probs alone, by the architecture's own forward on a plain batch, for comparison."""
        if own_forward:
            output = self.model(input_ids=batch.input_ids, attention_mask=batch.mask, use_cache=False)
            logits = output.logits.flatten(0, 1)[batch.positions].float()
            return -F.cross_entropy(logits, batch.targets, reduction="none"), None, None
        reference = None
        if kl in FULL_KL:
            with torch.no_grad(), adapter_off(self.model):
                reference = self.hidden(batch)
        hidden = self.hidden(batch)
        head = self.causal[0].get_output_embeddings()
        if reference is None and score is None and type(head) is nn.Linear and not head.weight.requires_grad:
            logps = TargetLogps.apply(
                hidden, head.weight, head.bias, batch.targets, self.softcap, self.chunk_tokens, *self.head_functions
            )
            return logps, None, None
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
def check_logps(policy: ResponseLogps, batch: Batch, plain: Batch, tolerance: float) -> None:
    """Raise UserError if our path to the log-probs of `batch` disagrees with the architecture's own forward on the
    same pairs as a `plain` padded batch."""
    with dropout(policy, active=False):
        mine = policy(batch)[0]
        with torch.compiler.set_stance("force_eager"):
            theirs = policy(plain, own_forward=True)[0]
    difference = (mine - theirs).abs().mean().item()
    if not difference <= tolerance:
        raise UserError(
            f"log-probabilities differ by {difference:.3g} nats a token from the model's own forward (tolerance "
            f"{tolerance}): this architecture ({type(policy.causal[0]).__name__}) computes its logits in its own way"
        )


def decoder_layers(policy: ResponseLogps) -> nn.ModuleList:
    layers = getattr(policy.backbone, "layers", None)
    if layers is None:
        raise UserError(f"{type(policy.causal[0]).__name__}: it has no `layers`; decoder-only models are supported")
    return layers


def receive(module: nn.Module, ranks: Ranks) -> None:
    """Give `module` its values on the ranks that know only its shapes, from rank 0. What is sharded already stays."""
    for part in module.modules():
        tensors = [*part._parameters.items(), *part._buffers.items()]
        for name, tensor in tensors:
            if tensor is None or isinstance(tensor, DTensor):
                continue
            values = tensor.detach().to(ranks.device) if ranks.main else torch.empty_like(tensor, device=ranks.device)
            dist.broadcast(values, 0)
            if isinstance(tensor, nn.Parameter):
                part._parameters[name] = nn.Parameter(values, requires_grad=tensor.requires_grad)
            else:
                part._buffers[name] = values


def shard(policy: ResponseLogps, mode: str, dtype: torch.dtype, ranks: Ranks) -> None:
    """FSDP2 over all ranks, layer by layer. mode 'adapters': the frozen base is replicated. 'full': sharded too, and
    only rank 0 needs to hold the weights: each layer goes out to the others right before it is sharded."""
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    frozen = {p for p in policy.parameters() if not p.requires_grad} if mode == "adapters" else set()
    for part in (*decoder_layers(policy), policy):
        if mode == "full" and ranks.world > 1:
            receive(part, ranks)
            policy.causal[0].tie_weights()
        fully_shard(part, mesh=mesh, mp_policy=precision, ignored_params=frozen)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of an FSDP shard, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of an FSDP shard (collective: call it on every rank), or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
