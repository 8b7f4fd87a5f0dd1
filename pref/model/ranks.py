"""torchrun's ranks"""

import os
import shutil
import sys
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm


class Ranks(NamedTuple):
    """Where this process stands: its rank, the number of ranks, and its device."""

    rank: int
    world: int
    device: torch.device
    hosts: dist.ProcessGroup | None = (
        None  # for what ranks say to each other without waiting for their devices
    )

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
        return tqdm(
            items,
            desc=what,
            unit=unit,
            disable=None if self.main else True,
            leave=False,
            dynamic_ncols=True,
        )


def init_ranks() -> Ranks:
    """Join torchrun's process group (nccl on CUDA, gloo on CPU), or make one of this single
    process.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device, backend = torch.device("cuda", local_rank), "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        if (
            shutil.which("nvidia-smi")
            and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
            and local_rank == 0
        ):
            print(
                "warning: this machine has nvidia-smi, but torch sees no GPU (a driver older than its CUDA?); using "
                "the CPU",
                file=sys.stderr,
            )
    if "RANK" in os.environ:
        dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    hosts = dist.new_group(backend="gloo") if backend == "nccl" else None
    return Ranks(dist.get_rank(), dist.get_world_size(), device, hosts)


def close_ranks() -> None:
    dist.barrier()  # without it gloo aborts at exit when one rank is slower
    dist.destroy_process_group()
