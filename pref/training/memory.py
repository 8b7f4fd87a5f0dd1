"""The memory of a rank by part, from shapes alone, before any weight is loaded.

The model's configuration gives the shapes of its weights and of the adapter, and a forward pass on
the meta device the bytes that autograd keeps per token (`sizes_of`); with the largest micro-batch
they give the memory of a rank (`memory_of`).
"""

import argparse
from functools import partial
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from pref.model import architecture, head, logps, lora, trained
from pref.model.chat import TokenPair
from pref.model.logps import ResponseLogps
from pref.model.packing import Packing, make_batch
from pref.training import peak_memory, settings

# Bytes per weight: four bits, and a share of the doubly quantised scales.
NF4_BYTES = 0.5 + 0.127 / 8
# Bytes of AdamW's two moments of a parameter, by --optim: fp32, or 8 bits each with an fp32 scale
# for 256 of them.
MOMENT_BYTES = {"adamw": 8, "adamw_8bit": 2 * (1 + 4 / 256)}
PROBE_TOKENS = 258
# Share of the activations autograd keeps that compiled layers keep too: measured on a Llama, 18.7
# of 24.1 kB per token.
COMPILED_SHARE = 0.78
# What the gradients in the last layer take, as a share of the activations that it keeps. On a CPU
# measured with CPU_HEAP; for CUDA from torch's MemTracker (bench/cuda_without_gpu.py): what the
# backward pass has read is freed, and its gradients take the place.
GRADIENTS = {"cpu": 1.0, "cuda": 0.25}
# Growth of a process on CPU before the first step, bytes: kernels, threads, check_logps.
CPU_GROWTH = 0.55 * 2**30
# Size of the C library's heap over that of the tensors in it, by --compile (measured).
CPU_HEAP = {"off": 1.5, "on": 1.15}
# On a GPU, bytes outside of torch's allocator, which torch's own peak does not count: the driver's
# context with its kernels, and NCCL's channels between ranks (usual values, not measured here).
CUDA_CONTEXT, NCCL = 0.6 * 2**30, 0.4 * 2**30
# cuBLAS keeps a workspace for the forward and one for the backward thread: 32 MiB on Hopper.
CUBLAS = 2 * 32 * 2**20


class Kept(NamedTuple):
    """Bytes per token that autograd keeps for the backward pass."""

    layers: list[int]  # in each layer
    rest: int  # outside of them


class Sizes(NamedTuple):
    """Numbers of elements of a model with its adapter, and what autograd keeps of a token."""

    parameters: int  # of the base
    linear: int  # of the linear layers' weights in all blocks; these are what is quantised
    used: float  # weights of all blocks that a token is multiplied with: not those of idle experts
    largest_linear: int
    largest_block: int
    layers: int
    hidden: int
    vocabulary: int
    attention: int  # heads * elements of a head
    trainable: int
    kept: Kept
    is_full: bool = False  # whether the base's own parameters are trained
    root: int = 0  # parameters outside of the blocks: embedding, head and norm
    head: int = 0  # elements of the head's weight, if it is trained


class Memory(NamedTuple):
    """Peak memory of a rank by part, GiB."""

    process: float  # resident before the first step, or outside of torch's allocator
    weights: float
    adapter: float  # 0 if all parameters are trained, as is the next one if an adapter is
    gradients: float
    optimiser: float  # of an adapter with its gradient
    buffers: float  # weights dequantised for a product, workspaces, what FSDP gathers and reduces
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum(self)


def shapes_of(model: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The model of a hub id or folder on the meta device: shapes without values."""
    return architecture.on_meta(
        AutoConfig.from_pretrained(model, trust_remote_code=False), None, dtype
    )


def with_lora(base: nn.Module, args: argparse.Namespace) -> PeftModel:
    """`base` with its adapter, both on the meta device. Raises UserError if plain PEFT would not
    load the adapter back.
    """
    with torch.device("meta"):
        adapted = lora.add_lora(
            base, args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_targets, args.seed
        )
        lora.check_loads_back(adapted)
    return adapted


def sizes_of(args: argparse.Namespace, on_cuda: bool) -> Sizes:
    """The sizes of the model and adapter of a run. It depends on --dtype, --packing and
    --prefix_sharing, which must be settled.
    """
    # 1) The base, before it has an adapter.
    base = shapes_of(args.model, getattr(torch, args.dtype))
    config, blocks = base.config.get_text_config(), architecture.find_layers(base)
    linears = {id(m.weight): m.weight for m in blocks.modules() if isinstance(m, nn.Linear)}
    in_linears = [weight.numel() for weight in linears.values()]
    heads = getattr(config, "num_attention_heads", None)
    heads = heads if isinstance(heads, int) else 0  # none, or another number in each layer
    of_head = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    parameters = sum(p.numel() for p in base.parameters())
    block_sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]

    # 2) With what is trained.
    if args.tune == "full":
        trained.train_all(base, args.freeze, getattr(torch, args.dtype))
        adapted = base
    else:
        adapted = with_lora(base, args)
    linear = base.get_output_embeddings()
    is_trained_head = args.tune == "full" and linear is not None and linear.weight.requires_grad
    return Sizes(
        parameters=parameters,
        linear=sum(in_linears),
        used=sum(in_linears) + (sum(block_sizes) - sum(in_linears)) * expert_share(config),
        largest_linear=max(in_linears, default=0),
        largest_block=max(block_sizes),
        layers=len(blocks),
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        attention=heads * of_head,
        trainable=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        kept=kept_bytes(args, adapted, on_cuda),
        is_full=args.tune == "full",
        root=parameters - sum(block_sizes),
        head=linear.weight.numel() if is_trained_head else 0,
    )


def expert_share(config: PretrainedConfig) -> float:
    """The share of a model's experts that each token goes to; 1 without experts. They are what a
    block has besides linear layers, but for a few vectors.
    """
    chosen = getattr(config, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    there = next((n for name in names if (n := getattr(config, name, None))), None)
    return chosen / there if chosen and there else 1.0


def kept_bytes(args: argparse.Namespace, adapted: nn.Module, on_cuda: bool) -> Kept:
    """What autograd keeps, counted in a forward pass on the meta device; where the architecture
    cannot be run there (it looks at values), the inputs and outputs of all linear layers.

    adapted: the model, with its adapter if it has one, on the meta device; all of it gets the dtype
    of the run.
    """
    # 1) The policy, and a batch of one pair.
    dtype, plain = getattr(torch, args.dtype), "on" not in (args.packing, args.prefix_sharing)
    policy = ResponseLogps(adapted.to(dtype), settings.attention_of(args))
    layers = logps.decoder_layers(policy)
    if on_cuda:
        for module in lora.lora_dropouts(policy):
            module.forward = partial(dropout_on_cuda, p=getattr(module, "p", 0.0))
    third = [0] * (PROBE_TOKENS // 3)
    packing = Packing(pad_id=0, padded=plain, shared=not plain)
    batch = make_batch([TokenPair(third, third, third)], packing, torch.device("meta"))

    # 2) Every storage that autograd saves, once each and with the layer that it belongs to, without
    #    the parameters. The tensors are kept with their sizes: a freed storage's address could be
    #    given to another one.
    parameters = {p.untyped_storage()._cdata for p in policy.parameters()}
    saved: dict[int, tuple[int, int, torch.Tensor]] = {}
    current = [-1]

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved.setdefault(storage._cdata, (current[0], storage.nbytes(), tensor))
        return tensor

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, n=number: current.__setitem__(0, n))
        layer.register_forward_hook(lambda *_: current.__setitem__(0, -1))
    try:
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            hidden = policy.hidden(batch)
    except architecture.REJECTIONS:
        return Kept([linear_bytes(layer, dtype) for layer in layers], 0)
    tokens, sizes = batch.input_ids.numel(), [0] * (len(layers) + 1)
    for number, nbytes, _ in saved.values():
        sizes[number] += nbytes  # the last one is what has no layer
    del hidden  # held the graph, and with it the saved tensors, until here
    return Kept([size // tokens for size in sizes[:-1]], sizes[-1] // tokens)


def dropout_on_cuda(x: torch.Tensor, p: float) -> torch.Tensor:
    """Dropout as CUDA computes it: a byte is kept for each element, where the CPU, and with it the
    meta device, keeps the factor that the element was multiplied with.
    """
    return torch.native_dropout(x, p, True)[0] if p else x


def linear_bytes(layer: nn.Module, dtype: torch.dtype) -> int:
    """Bytes per token of the inputs and outputs of a layer's linear layers."""
    linears = [m for m in layer.modules() if isinstance(m, nn.Linear)]
    return dtype.itemsize * sum(m.in_features + m.out_features for m in linears)


def memory_of(
    args: argparse.Namespace,
    sizes: Sizes,
    largest: int,
    responses: int,
    world: int,
    on_cuda: bool,
) -> Memory:
    """Peak memory of a rank: of a GPU, or resident in RAM. `args` must be settled: memory depends
    on what each `auto` resolves to.

    largest, responses: tokens of the largest micro-batch with padding, and the most response tokens
    of one.
    """
    # 1) What is held all the time.
    if sizes.is_full:
        held = full_bytes(args, sizes, world)
    else:
        held = lora_bytes(args, sizes, world)

    # 2) Logits: one chunk of them in the compute dtype and three times in fp32 (compiled on a CPU,
    #    in the compute dtype alone, with their gradient), and the hidden states of response tokens
    #    with their gradient. As attention, in bf16 on a CPU, the head has two copies of its weight.
    width = 2 if args.dtype == "bfloat16" else 4
    heap = 1 if on_cuda else CPU_HEAP[args.compile]
    is_compiled = args.compile == "on"
    tokens = head.chunk_tokens(sizes.vocabulary, on_cuda, is_compiled)
    each = 2 * width if is_compiled and not on_cuda else width + 12
    chunk = min(tokens, responses) * sizes.vocabulary * each
    if width == 2 and not on_cuda:
        chunk = max(chunk, 2 * sizes.vocabulary * sizes.hidden * width)
    logits = heap * (chunk + 2 * responses * sizes.hidden * width)
    kept, in_last = (heap * largest * size for size in bytes_per_token(args, sizes, on_cuda))
    # The chunk of logits is gone by then. On a CPU its memory is not: it stays in the heap.
    activations = kept + (max(0, in_last - chunk) if on_cuda else in_last)

    # 3) What the process has besides.
    if on_cuda:
        process = CUDA_CONTEXT + (NCCL if world > 1 else 0)
    else:
        process = peak_memory.resident_bytes() + CPU_GROWTH
    buffers = buffer_bytes(args, sizes, world) if on_cuda else 0
    if sizes.is_full:
        buffers = full_buffers(args, sizes, world, on_cuda, activations + logits)
    parts = Memory(process=process, **held, buffers=buffers, activations=activations, logits=logits)
    return Memory(*(part / 2**30 for part in parts))


def lora_bytes(args: argparse.Namespace, sizes: Sizes, world: int) -> dict[str, float]:
    """Bytes of a rank's weights, adapter and optimiser, where an adapter is trained."""
    # 1) Weights: quantised linear layers, everything else in the compute dtype. Sharded, a rank
    #    holds its share, and gathers the root and two layers, this one and the next.
    width = 2 if args.dtype == "bfloat16" else 4
    linear_width = NF4_BYTES if args.quant == "nf4" else width
    weights = sizes.linear * linear_width + (sizes.parameters - sizes.linear) * width
    if args.shard == "full":
        one_layer = sizes.largest_block * width
        root = weights - sizes.layers * one_layer
        weights = weights / world + root + 2 * one_layer

    # 2) Adapter (fp32, one layer gathered in the compute dtype, a copy if it is part of the
    #    reference) and optimiser (two moments and the gradient, fp32).
    trainable = sizes.trainable
    is_copied = args.init_adapter and args.reference_model == "start"
    reference_adapter = trainable * 4 if is_copied else 0
    adapter = trainable * 4 / world + trainable / sizes.layers * width + reference_adapter
    optimiser = trainable * 12 / world
    return {"weights": weights, "adapter": adapter, "gradients": 0, "optimiser": optimiser}


def full_bytes(args: argparse.Namespace, sizes: Sizes, world: int) -> dict[str, float]:
    """Bytes of a rank's shares of weights, gradients and moments, where all parameters are trained:
    fp32, but for frozen weights and 8-bit moments.
    """
    width = 2 if args.dtype == "bfloat16" else 4
    trainable, frozen = sizes.trainable, sizes.parameters - sizes.trainable
    return {
        "weights": (trainable * 4 + frozen * width) / world,
        "adapter": 0,
        "gradients": trainable * 4 / world,
        "optimiser": trainable * MOMENT_BYTES[args.optim] / world,
    }


def full_buffers(
    args: argparse.Namespace, sizes: Sizes, world: int, on_cuda: bool, activations: float
) -> float:
    """Bytes of what comes and goes beside `activations` (with logits), where all parameters are
    trained, at the moment when all of it is the most.
    """
    # 0) On a GPU cuBLAS. On a CPU the weights as they were loaded, of which FSDP makes its shards:
    #    what it frees stays with the process, in pieces (measured: bench/README.md).
    width, has_fsdp = 2 if args.dtype == "bfloat16" else 4, world > 1 or args.dtype == "bfloat16"
    loaded = sizes.parameters * 4 if has_fsdp else 0
    always = CUBLAS if on_cuda else loaded
    # 1) In the head's backward pass: its weight's gradient in fp32, and what a chunk adds to it.
    at_head = sizes.head * (4 + width)
    if not has_fsdp:  # nothing is gathered, and gradients are where they stay
        return always + at_head
    # 2) In the last layer's: the head's gradient, which waits for the embedding's, and the layer's
    #    own, in the compute dtype; those of this layer and the one before it as they are reduced.
    in_layer = sizes.head * width + sizes.largest_block * (width + 2 * 4)
    gathered = (sizes.root + 2 * sizes.largest_block) * width
    # 3) At the end: gradients of the root, as computed and as they are reduced. No activations.
    at_end = sizes.root * (width + width + 4)
    return always + max(gathered + max(at_head, in_layer), at_end - activations)


def checkpointed_layers(args: argparse.Namespace, layers: int) -> int:
    """How many of `layers`, the first ones, are recomputed with the settled --checkpointing."""
    named = {"off": 0, "on": layers}
    return named[args.checkpointing] if args.checkpointing in named else int(args.checkpointing)


def bytes_per_token(args: argparse.Namespace, sizes: Sizes, on_cuda: bool) -> tuple[float, float]:
    """Bytes of activations for each token of a micro-batch: those that the forward pass leaves, and
    those that come in the last layer's backward pass, when they are the most.

    The first k layers are checkpointed and leave their inputs; the others leave what autograd
    saves. The last layer's backward pass needs GRADIENTS besides. Until it comes to the k layers,
    which are then recomputed one at a time, those of all others are free. With k = L the last layer
    is one of them, and recomputed first.
    """
    width = 2 if args.dtype == "bfloat16" else 4
    share = COMPILED_SHARE if args.compile == "on" else 1
    count, kept = checkpointed_layers(args, sizes.layers), sizes.kept
    left = count * sizes.hidden * width + share * sum(kept.layers[count:]) + kept.rest
    in_last = share * GRADIENTS["cuda" if on_cuda else "cpu"] * max(kept.layers)
    if count == sizes.layers:
        in_last += share * max(kept.layers)
    return left, in_last


def buffer_bytes(args: argparse.Namespace, sizes: Sizes, world: int) -> float:
    """On a GPU, bytes that are neither weights nor activations."""
    # 1) A product with a quantised weight computes the weight first; one is freed after the next
    #    has been allocated.
    width = 2 if args.dtype == "bfloat16" else 4
    dequantised = 2 * sizes.largest_linear * width if args.quant == "nf4" else 0
    # 2) The adapter in the compute dtype, which the backward pass needs again: cast by each layer,
    #    unless that is recomputed (all but one), or gathered by FSDP.
    copied = sizes.trainable * width
    if world == 1:
        recomputed = max(0, checkpointed_layers(args, sizes.layers) - 1)
        copied *= 1 - recomputed / sizes.layers
        return CUBLAS + dequantised + copied
    # 3) FSDP adds up whole gradients in fp32 until the step's last micro-batch, when it reduces
    #    them layer by layer. A gathered layer of the base is copied from one buffer into tensors.
    gradients = sizes.trainable * 4 + 2 * sizes.trainable / sizes.layers * 4
    gathered = sizes.largest_block * width if args.shard == "full" else 0
    return CUBLAS + dequantised + copied + gradients + gathered
