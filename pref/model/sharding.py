"""FSDP2"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from pref.model import logps
from pref.model.logps import ResponseLogps
from pref.model.ranks import Ranks


def receive(module: nn.Module, ranks: Ranks) -> None:
    """Give `module` its values on the ranks that know only its shapes, from rank 0. What is sharded
    already stays.
    """
    for part in module.modules():
        tensors = [*part._parameters.items(), *part._buffers.items()]
        for name, tensor in tensors:
            if tensor is None or isinstance(tensor, DTensor):
                continue
            values = (
                tensor.detach().to(ranks.device)
                if ranks.main
                else torch.empty_like(tensor, device=ranks.device)
            )
            dist.broadcast(values, 0)
            if isinstance(tensor, nn.Parameter):
                part._parameters[name] = nn.Parameter(values, requires_grad=tensor.requires_grad)
            else:
                part._buffers[name] = values


def shard(policy: ResponseLogps, mode: str, dtype: torch.dtype, ranks: Ranks) -> None:
    """FSDP2 over all ranks, layer by layer. mode 'adapters': the frozen base is replicated. 'full':
    sharded too, and only rank 0 needs to hold the weights: each layer goes out to the others right
    before it is sharded.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    frozen = (
        {p for p in policy.parameters() if not p.requires_grad} if mode == "adapters" else set()
    )
    for part in (*logps.decoder_layers(policy), policy):
        if mode == "full" and ranks.world > 1:
            receive(part, ranks)
            policy.causal[0].tie_weights()
        fully_shard(part, mesh=mesh, mp_policy=precision, ignored_params=frozen)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of an FSDP shard, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of an FSDP shard (collective: call it on every rank), or the tensor
    itself.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
