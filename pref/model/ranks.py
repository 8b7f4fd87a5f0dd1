"""The processes of a run: torchrun's ranks, or a single process, each with its device.

Two groups of all ranks exchange data on CUDA:

    NCCL   tensors: gradients, adapters, metrics. The host queues these like any other work of its
           device and goes on.
    gloo   what the hosts tell each other: whether a signal came, small objects of rank 0. It does
           not wait for the devices, and is the first to notice that a rank is gone.

On the CPU, and in a single process, there is gloo alone.
"""

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pref.files import console
from pref.files.console import Item, UserError

# The longest that ranks wait for another one. Where it is right that they wait, it takes minutes:
# rank 0 hashes and reads the weights of a large model from a slow disk, layers are compiled. A rank
# that hangs costs all the others this time.
TIMEOUT = timedelta(minutes=30)


class Ranks(NamedTuple):
    """This process's rank, the number of ranks, and this process's device."""

    rank: int
    world: int
    device: torch.device
    # A gloo group besides NCCL's: its collectives do not wait for the devices. None: not needed.
    hosts: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over ranks, in place (collective)."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, number: int) -> int:
        """The largest `number` of any rank, on every rank (collective). Work that is queued on the
        devices continues meanwhile.
        """
        if self.world == 1:
            return number
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.hosts)
        return int(tensor)

    def from_main(self, value: object) -> object:
        """Rank 0's `value`, on every rank (collective)."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0, group=self.hosts)
        return values[0]

    def of_all(self, value: object) -> list:
        """Every rank's `value`, by rank, on every rank (collective)."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value, group=self.hosts)
        return values

    def print(self, *args: object) -> None:
        """Print on rank 0 only."""
        if self.main:
            print(*args, flush=True)

    def progress(
        self, items: Iterable[Item], what: str, unit: str = "batches", total: int | None = None
    ) -> Iterator[Item]:
        """`items`, with rank 0 showing how far it has come through its share. total: how many there
        are, if they cannot be counted.
        """
        return console.progress(items, what, unit, total, enabled=self.main)


def init_ranks() -> Ranks:
    """Join torchrun's process group, or open one of this single process."""
    device, hosts = pick_device(int(os.environ.get("LOCAL_RANK", 0))), None
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        # It has nobody to exchange tensors with, so that NCCL would only take time and memory.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    elif device.type == "cuda":
        # With its device named, NCCL connects the ranks now, where an error is easy to place, and
        # its barrier does not have to guess the device.
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
        hosts = dist.new_group(backend="gloo", timeout=TIMEOUT)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    return Ranks(dist.get_rank(), dist.get_world_size(), device, hosts)


@contextmanager
def ended_by_lost_ranks(ranks: Ranks) -> Iterator[None]:
    """Context in which a collective that fails, because another rank has ended or has not come
    within TIMEOUT, ends this process with a line that says so.

    At once and without cleaning up: a device may still wait in a collective for the rank that is
    gone, and every exit that frees its memory would wait with it.
    """
    try:
        yield
    except RuntimeError as error:
        if ranks.world == 1 or not is_of_collective(error):
            raise
        print(
            f"error (rank {ranks.rank}): another rank has ended, or has not come within "
            f"{TIMEOUT} h ({console.first_line(error)}); its own message, if it has one, says why. "
            "A rank without any such line is the one that hangs. The same command continues from "
            "the last checkpoint",
            file=sys.stderr,
        )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)


def is_of_collective(error: RuntimeError) -> bool:
    """Whether an error comes from the exchange between ranks: NCCL and the store have classes of
    their own, gloo has its name in the text.
    """
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def pick_device(local_rank: int) -> torch.device:
    """This rank's GPU, or the CPU. Warns, once per machine, if the CPU may come as a surprise or
    other work keeps the machine busy. Raises UserError if there are fewer GPUs than ranks.
    """
    on_cuda = torch.cuda.is_available()
    if local_rank == 0:
        if shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            if not on_cuda:
                print(
                    "warning: this machine has nvidia-smi, but torch sees no GPU (a driver older "
                    "than its CUDA?); using the CPU",
                    file=sys.stderr,
                )
        elif torch.backends.mps.is_available():
            print("note: Apple's GPU (MPS) is not supported; using the CPU", file=sys.stderr)
        threads = 1 if on_cuda else torch.get_num_threads()
        if note := busy_note(os.getloadavg()[0], console.usable_cores(), threads):
            print(note, file=sys.stderr)
    if on_cuda:
        if local_rank >= (count := torch.cuda.device_count()):
            raise UserError(
                f"local rank {local_rank} has no GPU: this machine shows {count}; use torchrun "
                f"--nproc_per_node {count}, or see CUDA_VISIBLE_DEVICES"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def busy_note(load: float, cores: int, threads: int) -> str | None:
    """What to say if other processes keep this machine's cores busy; None if all is well.

    load: processes that want to run, averaged over the last minute. threads: of this process that
    compute together.
    """
    if load <= cores:
        return None
    text = f"note: other work keeps this machine busy (load {load:.1f} on {cores} cores)"
    if threads == 1:
        return f"{text}; this run takes longer than it would alone, and its times mean little"
    return (
        f"{text}. Each matrix product waits for the slowest of its {threads} threads, so that two "
        "processes take several times as long as one after the other; wait, or set "
        "OMP_NUM_THREADS=1 for each"
    )


def close_ranks() -> None:
    """Leave the process group, all ranks together."""
    dist.barrier()  # without it gloo aborts at exit when one rank is slower
    dist.destroy_process_group()
