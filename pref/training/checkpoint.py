"""What lets a training run stop at any moment and go on as if it had not: checkpoints, the run's
lock, signals, status.

    results/<run_id>/checkpoint/step-000040.safetensors   adapter, optimiser and progress after step
    40; the newest two results/<run_id>/checkpoint/best-000040/              the best adapter so far
    and its validation pairs results/<run_id>/.lock                                held by the
    process that trains this run

Order of pairs, dropout and learning rate are functions of seed and step, so there is no more to a
run than this. `checkpoint/` is removed when the run is finished.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from pref.files import disk
from pref.files.console import UserError
from pref.model import sharding
from pref.model.ranks import Ranks

KEPT = 2  # checkpoints: should the newest be damaged, there is one before it
Trained = dict[str, tuple[torch.nn.Parameter, torch.optim.Optimizer]]


@dataclass
class Progress:
    """Where a run stands after `step` optimiser steps: whatever later lines, decisions and the
    summary depend on.
    """

    step: int = 0
    evaluated: int = -1  # the last step after which validation ran to its end
    best_acc_ref: float | None = None
    best_step: int | None = None
    best_sha256: str | None = None  # of that adapter's weights
    final: dict[str, float] = field(default_factory=dict)  # metrics of the last evaluation
    step0_difference: float | None = None  # mean |policy - reference| before training, nats a token
    nonfinite: int = 0  # steps not taken
    in_a_row: int = 0  # of these, the last ones without a step between
    tokens: int = 0
    running_rho: float = 0.0  # moving average of the steps' mean rho, nats (beta_dpo)
    wall_s: float = 0.0  # of all starts
    save_s: float = 0.0  # of these, spent on checkpoints
    metrics_bytes: int = (
        0  # length of metrics.jsonl: what stands behind it belongs to steps that will be done again
    )


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn a failed write into a UserError that says what is safe."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: not written ({error}); make room and run the same command again: it goes on from the last "
            "checkpoint"
        ) from None


def sync(path: Path) -> None:
    """Return when `path` is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


class Checkpoints:
    """The states of one run on disk. trained: parameters by name, each with its optimiser."""

    def __init__(self, run: Path, trained: Trained, ranks: Ranks):
        self.folder, self.metrics = run / "checkpoint", run / "metrics.jsonl"
        self.trained, self.ranks = trained, ranks

    def save(self, progress: Progress) -> None:
        """Write the state after `progress.step` steps, all ranks together. Raises UserError if the
        disk refuses; the checkpoint before it stays.
        """
        tensors = {}
        for name, (parameter, optimizer) in self.trained.items():
            for key, value in {"value": parameter.detach(), **optimizer.state[parameter]}.items():
                value = sharding.whole(value)
                if self.ranks.main:
                    tensors[f"{key}/{name}"] = value.cpu()
        if not self.ranks.main:
            return
        path = self.folder / f"step-{progress.step:06}.safetensors"
        temporary = path.with_suffix(".tmp")
        text = json.dumps(asdict(progress))
        try:
            with saving(path):
                self.folder.mkdir(exist_ok=True)
                save_file(
                    tensors, temporary, metadata={"progress": text, "sha256": digest(tensors, text)}
                )
                sync(temporary)
                os.replace(temporary, path)
        except UserError:
            temporary.unlink(missing_ok=True)
            raise
        self.prune()

    def prune(self) -> None:
        """Remove all but the newest checkpoints, and best adapters that none of them names."""
        paths = sorted(self.folder.glob("step-*.safetensors"))
        for path in (*paths[:-KEPT], *self.folder.glob("*.tmp")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        kept = [progress_in(path) for path in paths[-KEPT:]]
        wanted = {best_folder(self.folder, progress.best_step) for progress in kept if progress}
        for best in set(self.folder.glob("best-*")) - wanted:
            shutil.rmtree(best)

    def restore(self) -> Progress | None:
        """Load the newest checkpoint that is whole into parameters and optimisers, on all ranks;
        None if there is none. A damaged one is named and put aside.
        """
        progress, tensors = self.newest() if self.ranks.main else (None, {})
        progress = self.ranks.from_main(progress)
        if progress is None:
            return None
        shapes = self.ranks.from_main(
            {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
        )
        for name, (parameter, optimizer) in self.trained.items():
            for key in [key for key in shapes if key.partition("/")[2] == name]:
                full = (
                    tensors[key]
                    if self.ranks.main
                    else torch.empty(*shapes[key][:1], dtype=shapes[key][1])
                )
                kind, value = key.partition("/")[0], self.spread(full, parameter)
                if kind == "value":
                    with torch.no_grad():
                        parameter.copy_(value)
                else:  # AdamW keeps its count of steps on the CPU
                    optimizer.state[parameter][kind] = (
                        value if kind == "step" else value.to(parameter.device)
                    )
        return progress

    def spread(self, full: Tensor, parameter: Tensor) -> Tensor:
        """Rank 0's `full` tensor, sharded as `parameter` is; numbers such as AdamW's count of steps
        stay whole.
        """
        if isinstance(parameter, DTensor) and full.shape == parameter.shape:
            return distribute_tensor(
                full.to(self.ranks.device), parameter.device_mesh, parameter.placements
            )
        return self.ranks.from_main(full)

    def newest(self) -> tuple[Progress | None, dict[str, Tensor]]:
        for path in sorted(self.folder.glob("step-*.safetensors"), reverse=True):
            try:
                return self.read(path)
            except (SafetensorError, ValueError) as error:
                print(f"{path}: damaged ({error}); going on without it", flush=True)
                path.rename(path.with_suffix(".damaged"))
        return None, {}

    def read(self, path: Path) -> tuple[Progress, dict[str, Tensor]]:
        """Raises ValueError with the reason if the checkpoint cannot be used."""
        with safe_open(path, framework="pt") as file:
            names, metadata = file.keys(), file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in names}
        progress = progress_in(path)
        if progress is None:
            raise ValueError("it was written by another version of this toolkit")
        if metadata["sha256"] != digest(tensors, metadata["progress"]):
            raise ValueError("its checksum is wrong")
        if {key.partition("/")[2] for key in tensors} != self.trained.keys():
            raise ValueError("it holds other parameters")
        best = best_folder(self.folder, progress.best_step)
        weights = best and best / "adapter" / "adapter_model.safetensors"
        if weights and not weights.is_file():
            raise ValueError(f"{best.name} is missing")
        if weights and disk.sha256_file(weights) != progress.best_sha256:
            raise ValueError(f"the adapter in {best.name} is not what was saved there")
        if (self.metrics.stat().st_size if self.metrics.exists() else 0) < progress.metrics_bytes:
            raise UserError(
                f"{self.metrics}: shorter than when {path.name} was saved; put it back, or remove {self.folder.parent} "
                "to train the run again"
            )
        return progress, tensors


def best_folder(checkpoints: Path, step: int | None) -> Path | None:
    return None if step is None else checkpoints / f"best-{step:06}"


def progress_in(path: Path) -> Progress | None:
    """What a checkpoint says of itself, without its tensors; None if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return Progress(**json.loads((file.metadata() or {})["progress"]))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return None


def digest(tensors: dict[str, Tensor], text: str) -> str:
    """sha256 of a checkpoint's content."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


@contextmanager
def run_lock(run: Path, ranks: Ranks) -> Iterator[None]:
    """Hold `run` against a second start. Raises UserError if another process holds it."""
    if not ranks.main:
        yield
        return
    with disk.locked(run, ".lock", "is being trained"):
        yield


def status_of(run: Path) -> tuple[bool, str]:
    """Whether `run` has ended, and a line or two that say how, or how to go on."""
    record = disk.read_json(run / "args.json")
    if (run / "summary.json").is_file():
        summary = disk.read_json(run / "summary.json")
        ending = "; no adapter: it was never evaluated after a step"
        if summary["best_step"] is not None:
            ending = f"; best acc_ref {summary['best_acc_ref']:.4f} at step {summary['best_step']}"
        return True, f"{run.name}: {summary['status']} after {summary['steps']} steps{ending}"
    saved = [
        progress.step
        for path in (run / "checkpoint").glob("step-*.safetensors")
        if (progress := progress_in(path))
    ]
    where = (
        f"saved after step {max(saved)} of {record.get('planned_steps', '?')}"
        if saved
        else "nothing saved yet"
    )
    if process := disk.lock_holder(run):
        return False, f"{run.name}: running ({process}), {where}"
    command = record.get("command", "the command that started it")
    return (
        False,
        f"{run.name}: stopped, {where}; {'continue' if saved else 'start again'} with\n    {command}",
    )
