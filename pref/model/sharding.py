"""FSDP2: spread a policy's weights over ranks, and sum its gradients exactly once.

A training step computes, on each rank, the gradient of the loss summed over that rank's pairs and
divided by the number of pairs of the whole step. The gradient of the step is therefore the *sum*
over ranks. FSDP averages by default, and how it divides depends on the version of torch and on the
backend, so `shard` switches the division off and `check_gradient_sum` tests the result.
"""

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from pref.files.console import UserError
from pref.model import logps, lora
from pref.model.logps import ResponseLogps
from pref.model.ranks import Ranks

BUCKET_BYTES = 2**26  # of each rank's shards in one collective of `gather`


def shard(policy: ResponseLogps, mode: str, dtype: torch.dtype, ranks: Ranks) -> None:
    """Apply FSDP2 to `policy` over all ranks, layer by layer. A single rank needs none, unless FSDP
    has to cast what is trained (`is_cast_by_fsdp`).

    mode: 'adapters' shards the adapter and replicates the frozen base. 'full' shards all weights;
    then only rank 0 has to hold them, and each layer is sent to the others just before it is
    sharded. dtype: of the computation; gradients are reduced in fp32.

    Raises UserError if gradients would not be summed over ranks.
    """
    if ranks.world == 1 and not is_cast_by_fsdp(policy, dtype):
        return
    mesh = mesh_of(ranks)
    # What goes into a layer stays as it is: OLMo's angles of positions are in fp32, as in one rank.
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    if ranks.world > 1:
        check_gradient_sum(mesh, precision, ranks)
    replicated = set()
    if mode == "adapters":
        replicated = {p for p in policy.parameters() if not p.requires_grad}
    for part in (*logps.decoder_layers(policy), policy):
        if mode == "full" and ranks.world > 1:
            receive(part, ranks)
            policy.causal[0].tie_weights()
        fully_shard(
            part,
            mesh=mesh,
            reshard_after_forward=mode == "full" and part is not policy,
            mp_policy=precision,
            ignored_params=replicated,
        )
        if ranks.world > 1:
            sum_gradients(part)


def is_cast_by_fsdp(policy: ResponseLogps, dtype: torch.dtype) -> bool:
    """Whether trained parameters, which are in fp32, are cast by FSDP: all but the matrices of LoRA
    layers that our own forward computes, which does that itself.
    """
    if isinstance(policy.model, PeftModel):
        return not lora.is_ours(policy)
    return any(p.dtype != dtype for p in logps.trainable(policy).values())


def mesh_of(ranks: Ranks) -> DeviceMesh:
    """All ranks in a row. A single process has a gloo group alone, for which its GPU would have to
    wait wherever FSDP calls a collective of one rank (torch before 2.10): NCCL's is queued.
    """
    if ranks.world == 1 and ranks.device.type == "cuda":
        return DeviceMesh.from_group(dist.new_group([0], backend="nccl"), "cuda")
    return init_device_mesh(ranks.device.type, (ranks.world,))


def prepare_backward(policy: ResponseLogps, mode: str, is_last: bool) -> None:
    """Before each micro-batch of a step: gradients are summed over ranks after it if `is_last`.

    Adapters alone (mode 'adapters') are gathered once a step, in the first forward pass, and kept
    until the last backward pass: they are small, and do not change before the optimiser's step. A
    base that is sharded is gathered anew in every pass. Where all parameters are trained, every
    micro-batch counts as the last: a rank would otherwise hold all of their gradients.
    """
    if isinstance(policy, FSDPModule):
        policy.set_requires_gradient_sync(is_last)
        policy.set_reshard_after_backward(is_last or mode == "full")


def reshard(policy: ResponseLogps) -> None:
    """Free what forward passes without a backward pass left gathered. Saving and the optimiser need
    the shards: gathered parameters are copies in the compute dtype.
    """
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def receive(module: nn.Module, ranks: Ranks) -> None:
    """Copy `module`'s tensors from rank 0 to the ranks that hold it on the meta device.

    Tensors that are sharded already are left alone.
    """
    for part in module.modules():
        tensors = [*part._parameters.items(), *part._buffers.items()]
        for name, tensor in tensors:
            if tensor is None or isinstance(tensor, DTensor):
                continue
            if ranks.main:
                values = tensor.detach().to(ranks.device)
            else:
                values = torch.empty_like(tensor, device=ranks.device)
            dist.broadcast(values, 0)
            if isinstance(tensor, nn.Parameter):
                part._parameters[name] = nn.Parameter(values, requires_grad=tensor.requires_grad)
            else:
                part._buffers[name] = values


def sum_gradients(module: FSDPModule) -> None:
    """Make FSDP add the gradients of `module`'s own parameters over ranks, without dividing them.

    Both settings are needed. A divide factor of 1 alone selects a reduction that exists in NCCL
    only; a forced sum alone still divides by the number of ranks. Without them torch 2.8 asks for
    ReduceOp.AVG, which its gloo backend computes as a sum: not divided on the CPU, but on CUDA.
    """
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


class Scale(nn.Module):
    """y = weight * x: the gradient of sum(y) is x. Created without random numbers."""

    def __init__(self, size: int, device: torch.device):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


def check_gradient_sum(mesh: DeviceMesh, precision: MixedPrecisionPolicy, ranks: Ranks) -> None:
    """Send a known gradient through FSDP and compare its sum over ranks (collective).

    Even ranks contribute 1, odd ranks 2: exact in every dtype, and neither the average nor one
    rank's own gradient equals the sum. Raises UserError.
    """
    probe = Scale(ranks.world, ranks.device)  # one element per rank
    fully_shard(probe, mesh=mesh, mp_policy=precision)
    sum_gradients(probe)
    probe(torch.full((ranks.world,), 1.0 + ranks.rank % 2, device=ranks.device)).sum().backward()
    expected, gradient = ranks.world + ranks.world // 2, whole(probe.weight.grad).tolist()
    if gradient != [expected] * ranks.world:
        raise UserError(
            f"torch {torch.__version__} with {dist.get_backend()}: FSDP reduced a gradient to "
            f"{gradient[0]:g} over {ranks.world} ranks instead of {expected}, their sum; training "
            "would use wrong gradients. Install the torch version that requirements.txt names, or "
            "train with one rank"
        )


def local(tensor: Tensor) -> Tensor:
    """This rank's part of an FSDP shard, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of an FSDP shard, or the tensor itself.

    Collective for a shard: call it on every rank.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(
    tensors: dict[str, Tensor], ranks: Ranks, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The full tensors of FSDP shards, by name, on the CPU of rank 0; {} on the other ranks.

    dtype: what they are converted to, before they are sent. Collective: call it on every rank. One
    collective moves up to BUCKET_BYTES of a rank's shards. An adapter and its optimiser's state are
    hundreds of small tensors, whose `full_tensor` would be a collective each and would end on every
    rank, although only rank 0 writes.
    """
    full, shards = {}, {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor) and ranks.world > 1:
            shards[name] = tensor
        elif ranks.main:
            full[name] = local(tensor).to("cpu", dtype or tensor.dtype)
    for bucket in buckets(shards):
        full |= gather_bucket(bucket, ranks, dtype)
    return {name: full[name] for name in tensors} if ranks.main else {}


def buckets(shards: dict[str, DTensor]) -> list[dict[str, DTensor]]:
    """`shards` in groups of one dtype and at most BUCKET_BYTES a rank, or of a single tensor."""
    groups: list[dict[str, DTensor]] = []
    for dtype in dict.fromkeys(shard.dtype for shard in shards.values()):
        size = BUCKET_BYTES + 1
        for name, shard in shards.items():
            if shard.dtype != dtype:
                continue
            added = shard_numel(shard) * dtype.itemsize
            if size + added > BUCKET_BYTES:
                groups.append({})
                size = 0
            groups[-1][name] = shard
            size += added
    return groups


def gather_bucket(
    bucket: dict[str, DTensor], ranks: Ranks, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The full tensors of shards of one dtype on the CPU of rank 0; {} on the other ranks."""
    # 1) This rank's shards, one after another. FSDP gives the last ranks fewer rows, or none.
    padded = []
    for shard in bucket.values():
        assert shard.placements == (Shard(0),), shard.placements
        values = local(shard).reshape(-1).to(dtype or shard.dtype)
        padded.append(torch.nn.functional.pad(values, (0, shard_numel(shard) - values.numel())))
    mine = torch.cat(padded)
    # 2) Those of all ranks, on rank 0.
    parts = [torch.empty_like(mine) for _ in range(ranks.world)] if ranks.main else None
    dist.gather(mine, parts, dst=0)
    if parts is None:
        return {}
    # 3) Each tensor is its pieces in the order of ranks; what was padded is at the end.
    parts = [part.cpu() for part in parts]
    full, start = {}, 0
    for name, shard in bucket.items():
        end = start + shard_numel(shard)
        pieces = torch.cat([part[start:end] for part in parts])
        full[name] = pieces[: shard.numel()].clone().view(shard.shape)
        start = end
    return full


def shard_numel(shard: DTensor) -> int:
    """Elements of rank 0's shard along dimension 0, which is the largest."""
    rows, world = shard.shape[0], shard.device_mesh.size()
    return -(-rows // world) * (shard.numel() // max(rows, 1))
