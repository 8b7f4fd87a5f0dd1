"""A model whose checkpoints tests write on some ranks and read on others: its parameters have rows
that no number of ranks divides evenly. With four ranks "one" has rows on rank 0 alone, "five" none
on rank 3. "frozen" is not trained.
"""

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pref.model import sharding
from pref.training.sharded_checkpoint import ShardedCheckpoints

SHAPES = {"one": (1, 3), "five": (5,), "seven": (7, 2), "large": (64, 9), "frozen": (6, 2)}


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            parameter = torch.nn.Parameter(torch.randn(shape, generator=draw))
            self.register_parameter(name, parameter.requires_grad_(name != "frozen"))


def toy(run, ranks) -> ShardedCheckpoints:
    """The checkpoints of a new toy, sharded where there are several ranks, with its AdamW."""
    model = Toy()
    if ranks.world > 1:
        fully_shard(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    trained = {name: (parameter, optimizer) for name, parameter in parameters.items()}
    return ShardedCheckpoints(run, trained, ranks)


def step(checkpoints: ShardedCheckpoints, number: int) -> None:
    """A step on gradients that depend on its number alone: the same on any number of ranks."""
    draw = torch.Generator().manual_seed(number)
    for parameter, _ in checkpoints.trained.values():
        gradient = torch.randn(parameter.shape, generator=draw)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            gradient = distribute_tensor(gradient, mesh, placements)
        parameter.grad = gradient
    _, optimizer = next(iter(checkpoints.trained.values()))
    optimizer.step()


def content(checkpoints: ShardedCheckpoints) -> dict[str, torch.Tensor]:
    """All that is saved, whole, on every rank."""
    return {
        f"{kind}/{name}": sharding.whole(tensor).clone()
        for name, (parameter, optimizer) in checkpoints.trained.items()
        for kind, tensor in {"value": parameter.detach(), **optimizer.state[parameter]}.items()
    }
