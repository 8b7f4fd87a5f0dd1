"""Checkpoints, the run's lock and its state: what lets a run stop at any moment and continue as if
it had not.

    results/<run_id>/checkpoint/step-000040.safetensors   adapter, optimisers and progress after
                                                          step 40; the newest two are kept
    results/<run_id>/checkpoint/best-000040/              the best adapter so far, and the
                                                          validation pairs as it ranks them
    results/<run_id>/.lock                                held by the process that trains the run

Nothing else needs saving: the order of pairs, dropout and the learning rate are functions of seed
and step. `checkpoint/` is removed when the run is finished. Where all parameters are trained, a
state is a folder that every rank writes to: sharded_checkpoint.py.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from pref.files import disk, run_folders
from pref.files.console import UserError
from pref.model import sharding
from pref.model.ranks import Ranks

KEPT = 2  # checkpoints: if the newest is damaged, the run continues from the one before it
Trained = dict[str, tuple[torch.nn.Parameter, torch.optim.Optimizer]]


@dataclass
class Progress:
    """The state of a run after `step` optimiser steps, besides its tensors: whatever later lines,
    decisions and the summary depend on. Saved by field name in every checkpoint.
    """

    step: int = 0
    evaluated: int = -1  # the last step whose evaluation was completed; 0 is before the first step
    best_acc_ref: float | None = None
    best_step: int | None = None
    best_sha256: str | None = None  # of the weights of that step's adapter
    final: dict[str, float] = field(default_factory=dict)  # metrics of the last evaluation
    step0_difference: float | None = None  # mean |policy - reference| before training, nats/token
    nonfinite: int = 0  # steps that were not taken
    in_a_row: int = 0  # the last of these, without a finite step between them
    tokens: int = 0
    running_rho: float = 0.0  # moving average of the steps' mean rho, nats (beta_dpo)
    wall_s: float = 0.0  # over all starts
    save_s: float = 0.0  # the part of wall_s spent on checkpoints
    metrics_bytes: int = 0  # length of metrics.jsonl; lines after it belong to repeated steps


# ---- writing ------------------------------------------------------------------------------------


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn a failed write into a UserError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise not_written(path, error) from None


def not_written(path: Path, reason: object) -> UserError:
    return UserError(
        f"{path}: not written ({reason}); make room and run the same command again: it continues "
        "from the last checkpoint"
    )


def on_all(
    work: Callable[[], object], place: Path, ranks: Ranks, partial: Path | None = None
) -> list:
    """What `work` returns on each rank, by rank. If it cannot write on one of them, every rank
    raises the UserError that says so, and rank 0 removes the folder `partial`.
    """
    result, reason = None, None
    try:
        result = work()
    except (OSError, SafetensorError) as error:
        reason = str(error)
    outcomes = ranks.of_all((result, reason))
    if reasons := [reason for _, reason in outcomes if reason]:
        if partial is not None and ranks.main:
            shutil.rmtree(partial, ignore_errors=True)
        raise not_written(place, reasons[0])
    return [result for result, _ in outcomes]


def on_main(
    work: Callable[[], object], place: Path, ranks: Ranks, partial: Path | None = None
) -> object:
    """What `work` returns on rank 0, which alone does it; otherwise as `on_all`."""
    return on_all(lambda: work() if ranks.main else None, place, ranks, partial)[0]


def sync(path: Path) -> None:
    """Return when `path` is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


class Checkpoints:
    """The checkpoints of one run. trained: parameters by name, each with its optimiser.

    A file holds, for every parameter, `value/<name>` and the optimiser's state as `exp_avg/<name>`,
    `exp_avg_sq/<name>` and `step/<name>`; progress and a checksum are in its metadata.
    """

    def __init__(self, run: Path, trained: Trained, ranks: Ranks):
        self.folder, self.metrics = run / "checkpoint", run / "metrics.jsonl"
        self.trained, self.ranks = trained, ranks

    def best(self, progress: Progress) -> Path | None:
        """The folder of the best adapter so far; None if there is none."""
        return best_folder(self.folder, progress.best_step)

    def save(self, progress: Progress) -> None:
        """Write the state after `progress.step` steps; to be called on all ranks. Raises UserError
        if it cannot be written; the checkpoint before it is then still there.
        """
        # 1) Gather every tensor on rank 0, which alone writes.
        tensors = {}
        for name, (parameter, optimizer) in self.trained.items():
            for kind, value in {"value": parameter.detach(), **optimizer.state[parameter]}.items():
                tensors[f"{kind}/{name}"] = value
        tensors = sharding.gather(tensors, self.ranks)
        if not self.ranks.main:
            return

        # 2) Write a temporary file, then rename it: a kill leaves the old state or the new one.
        path = self.folder / f"step-{progress.step:06}.safetensors"
        temporary = path.with_suffix(".tmp")
        text = json.dumps(asdict(progress))
        metadata = {"progress": text, "sha256": digest(tensors, text)}
        try:
            with saving(path):
                self.folder.mkdir(exist_ok=True)
                save_file(tensors, temporary, metadata=metadata)
                disk.as_umask_says(temporary)
                sync(temporary)
                os.replace(temporary, path)
        except UserError:
            temporary.unlink(missing_ok=True)
            raise
        self.prune()

    def prune(self) -> None:
        """Remove all but the newest checkpoints, and best adapters that none of them names."""
        for path in (*saved_states(self.folder)[:-KEPT], *self.folder.glob("*.tmp")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        prune_best(self.folder)

    # ---- reading --------------------------------------------------------------------------------

    def restore(self) -> Progress | None:
        """Load the newest undamaged checkpoint into parameters and optimisers, on all ranks.
        Returns its progress, or None if there is none.
        """
        # 1) Rank 0 reads; the others learn the tensors' names, shapes and dtypes.
        progress, tensors = self.newest() if self.ranks.main else (None, {})
        progress = self.ranks.from_main(progress)
        if progress is None:
            return None
        shapes = self.ranks.from_main({key: (t.shape, t.dtype) for key, t in tensors.items()})

        # 2) Tensor by tensor, so that no rank holds more than one whole tensor at a time.
        for name, (parameter, optimizer) in self.trained.items():
            for key, (shape, dtype) in shapes.items():
                kind, _, owner = key.partition("/")
                if owner != name:
                    continue
                full = tensors[key] if self.ranks.main else torch.empty(shape, dtype=dtype)
                value = self.distribute(full, parameter)
                if kind == "value":
                    with torch.no_grad():
                        parameter.copy_(value)
                elif kind == "step":  # AdamW keeps its count of steps on the CPU
                    optimizer.state[parameter][kind] = value
                else:
                    # A copy: what is read may be a view of the file, which is soon removed.
                    optimizer.state[parameter][kind] = value.to(parameter.device, copy=True)
        return progress

    def distribute(self, full: Tensor, parameter: Tensor) -> Tensor:
        """Rank 0's `full` tensor, sharded as `parameter` is. A tensor of another shape, such as
        AdamW's count of steps, is copied to every rank.
        """
        if not (isinstance(parameter, DTensor) and full.shape == parameter.shape):
            return self.ranks.from_main(full)
        # Every rank receives the tensor and keeps its part: one plain collective.
        full = full.to(self.ranks.device, copy=True)
        dist.broadcast(full, 0)
        mesh, placements = parameter.device_mesh, parameter.placements
        part = distribute_tensor(full, mesh, placements, src_data_rank=None)
        return torch.empty_like(part).copy_(part)  # a tensor of its own, not a view of all of it

    def newest(self) -> tuple[Progress | None, dict[str, Tensor]]:
        """Progress and tensors of the newest checkpoint that can be used. A damaged one is
        reported and renamed to *.damaged.
        """
        for path in reversed(saved_states(self.folder)):
            try:
                return self.read(path)
            except (SafetensorError, ValueError) as error:
                print(f"{path}: damaged ({error}); continuing without it", flush=True)
                path.rename(path.with_suffix(".damaged"))
        return None, {}

    def read(self, path: Path) -> tuple[Progress, dict[str, Tensor]]:
        """Raises ValueError with the reason if the checkpoint is damaged, and UserError if it is
        whole but not of this run, or metrics.jsonl has lost lines that precede it.
        """
        disk.check_readable(path)
        with safe_open(path, framework="pt") as file:
            names, metadata = file.keys(), file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in names}
        if metadata.get("sha256") != digest(tensors, metadata.get("progress", "")):
            raise ValueError("its checksum is wrong")

        # 1) Whole, but nothing that can be continued: not to be thrown away as if it were damaged.
        progress = progress_in(path)
        if progress is None:
            raise of_another_version(path)
        shapes = {k.removeprefix("value/"): t.shape for k, t in values_of(tensors)}
        check_parameters(path, shapes, self.trained, "another --lora_targets, or version of PEFT")

        # 2) What goes with it.
        if best := self.best(progress):
            weights = best / "adapter" / "adapter_model.safetensors"
            if not weights.is_file():
                raise ValueError(f"{best.name} is missing")
            if disk.sha256_file(weights) != progress.best_sha256:
                raise ValueError(f"the adapter in {best.name} is not the one that was saved there")
        check_metrics(self.metrics, progress, path)
        return progress, tensors


def values_of(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The trained parameters in a checkpoint, without the optimiser's state."""
    return ((key, tensor) for key, tensor in tensors.items() if key.startswith("value/"))


def of_another_version(path: Path) -> UserError:
    return UserError(
        f"{path}: written by another version of this toolkit; continue the run with that version, "
        f"or remove {path.parent.parent} to train it again"
    )


def check_parameters(path: Path, shapes: dict, trained: Trained, cause: str) -> None:
    """Raise UserError if a checkpoint holds other parameters (shapes by name) than are trained."""
    if shapes != {name: parameter.shape for name, (parameter, _) in trained.items()}:
        raise UserError(
            f"{path}: holds other parameters than this run trains ({cause}); put back what has "
            f"changed, or remove {path.parent.parent} to train the run again"
        )


def check_metrics(metrics: Path, progress: Progress, path: Path) -> None:
    """Raise UserError if metrics.jsonl has lost lines that precede the checkpoint `path`."""
    if (metrics.stat().st_size if metrics.exists() else 0) < progress.metrics_bytes:
        raise UserError(
            f"{metrics}: shorter than when {path.name} was saved; put it back, or remove "
            f"{metrics.parent} to train the run again"
        )


# ---- a folder of checkpoints --------------------------------------------------------------------


def saved_states(checkpoints: Path) -> list[Path]:
    """The states in a run's checkpoint/, files or folders, oldest first."""
    return sorted(
        path for path in checkpoints.glob("step-*") if path.suffix in ("", ".safetensors")
    )


def prune_best(checkpoints: Path) -> None:
    """Remove the best weights that none of the states that are kept names."""
    states = saved_states(checkpoints)[-KEPT:]
    wanted = {best_folder(checkpoints, p.best_step) for path in states if (p := progress_in(path))}
    for best in set(checkpoints.glob("best-*")) - wanted:
        shutil.rmtree(best)


def best_folder(checkpoints: Path, step: int | None) -> Path | None:
    return None if step is None else checkpoints / f"best-{step:06}"


def progress_in(path: Path) -> Progress | None:
    """The progress that a checkpoint holds, read without its tensors; None if it cannot be read."""
    try:
        if path.is_dir():
            return Progress(**json.loads((path / "progress.json").read_text())["progress"])
        with safe_open(path, framework="pt") as file:
            return Progress(**json.loads((file.metadata() or {})["progress"]))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return None


def digest(tensors: dict[str, Tensor], text: str) -> str:
    """sha256 of a checkpoint's content: its progress as text, then names and bytes of its tensors,
    sorted by name.
    """
    sha256 = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        sha256.update(name.encode())
        sha256.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()


# ---- one process, one state ---------------------------------------------------------------------


@contextmanager
def run_lock(run: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the lock of `run`. Raises UserError if another process holds it."""
    if not ranks.main:
        yield
        return
    with disk.locked(run, ".lock", "is being trained"):
        yield


def status_of(run: Path) -> tuple[bool, str]:
    """Whether `run` has ended, and a line or two that say how, or how to continue it."""
    record = disk.read_json(run / "args.json")
    if (run / "summary.json").is_file():
        summary = disk.read_json(run / "summary.json")
        kind = run_folders.WEIGHTS.get(run_folders.tune_of(record), "weights")
        ending = f"; no {kind}: it was never evaluated after a step"
        if summary["best_step"] is not None:
            ending = f"; best acc_ref {summary['best_acc_ref']:.4f} at step {summary['best_step']}"
        return True, f"{run.name}: {summary['status']} after {summary['steps']} steps{ending}"

    paths = saved_states(run / "checkpoint")
    saved = [progress.step for path in paths if (progress := progress_in(path))]
    state = "nothing saved yet"
    if saved:
        state = f"saved after step {max(saved)} of {record.get('planned_steps', '?')}"
    if process := disk.lock_holder(run):
        return False, f"{run.name}: running ({process}), {state}"
    verb = "continue" if saved else "start again"
    command = record.get("command", "the command that started it")
    return False, f"{run.name}: stopped, {state}; {verb} with\n    {command}"
