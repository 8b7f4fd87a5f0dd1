"""Checkpoints of runs that train all parameters: every rank writes its own shards, and reads those
rows of them that it needs.

    results/<run_id>/checkpoint/step-000040/
        rank-00003-part-0000.safetensors   rows of tensors, about PART_BYTES of them
        progress.json                      Progress, and the sha256 of every other file
    results/<run_id>/checkpoint/best-000040/
        model/                             the best weights so far, as model_folder.py writes them
        val_pairs.jsonl                    the validation pairs as they rank them

A state is written to `step-000040.tmp` and renamed when all ranks have done their part, so that a
kill leaves the old states or one more. A damaged one is reported and renamed to `*.damaged`.

The tensors are called as in checkpoint.py: `value/<name>`, and the optimiser's state by its kind. A
file holds consecutive rows of each, and says in its metadata where in the whole tensor they begin.
Any number of ranks can therefore continue from them. All ranks must see the results folder.

torch.distributed.checkpoint writes such files too (HuggingFaceStorageWriter), but with all of what
a rank writes in the host's memory, twice: 2.3 GiB more for a state of 1.1 GiB, where a part at a
time takes what one part does. It has no checksums either.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from pref.files import disk
from pref.model.ranks import Ranks
from pref.training.best_model import sha256_of
from pref.training.checkpoint import (
    KEPT,
    Progress,
    Trained,
    best_folder,
    check_metrics,
    check_parameters,
    of_another_version,
    on_all,
    on_main,
    progress_in,
    prune_best,
    saved_states,
    sync,
)

PART_BYTES = 2**30  # of a file: what a rank holds in the host's memory while it writes


class Rows(NamedTuple):
    """Consecutive rows of a tensor, or a tensor that only this rank has."""

    key: str  # `<kind>/<name>`
    values: Tensor
    first: int | None  # row of the whole tensor; None if there is no whole
    shape: tuple[int, ...]  # of the whole tensor


class Stored(NamedTuple):
    """`Rows` in a file."""

    file: safe_open
    rank: int  # that wrote them
    key: str
    first: int | None
    shape: tuple[int, ...]
    count: int  # rows; 0 for a tensor without dimensions

    @property
    def dtype(self) -> torch.dtype:
        return (self.file.get_slice(self.key)[:0] if self.shape else self.whole()).dtype

    def whole(self) -> Tensor:
        return self.file.get_tensor(self.key)

    def rows(self, start: int, end: int) -> Tensor:
        """Rows `start` to `end` of the whole tensor, which must be here."""
        return self.file.get_slice(self.key)[start - self.first : end - self.first]


class ShardedCheckpoints:
    """The checkpoints of one run, as `checkpoint.Checkpoints` keeps them. Each method is to be
    called on all ranks. trained: parameters by name, each with its optimiser.
    """

    def __init__(self, run: Path, trained: Trained, ranks: Ranks):
        self.run, self.folder = run, run / "checkpoint"
        self.trained, self.ranks = trained, ranks
        self.newest_step: int | None = None  # whose tensors are on the disk

    def best(self, progress: Progress) -> Path | None:
        """The folder of the best weights so far; None if there are none."""
        return best_folder(self.folder, progress.best_step)

    # ---- writing --------------------------------------------------------------------------------

    def save(self, progress: Progress) -> None:
        """Write the state after `progress.step` steps. Raises UserError on all ranks if one of them
        cannot write; the checkpoint before it is then still there.
        """
        path = self.folder / f"step-{progress.step:06}"
        temporary = path.with_suffix(".tmp")
        is_new = self.ranks.from_main(progress.step != self.newest_step or not path.is_dir())

        # 1) The tensors, unless they are there: a run that is stopped twice in a step, with an
        #    evaluation between, has only counted on.
        if is_new:
            on_main(lambda: make_empty(self.folder, temporary), path, self.ranks)
            parts = on_all(lambda: self.write_parts(temporary), path, self.ranks, temporary)
            files = {name: sha256 for part in parts for name, sha256 in part.items()}

        # 2) Progress, and then the name that says that all is there.
        def finish() -> None:
            if is_new:
                write_progress(temporary, progress, files)
                temporary.rename(path)
            else:
                write_progress(path, progress, read_progress(path)["files"])

        on_main(finish, path, self.ranks, temporary)
        self.newest_step = progress.step
        if self.ranks.main:
            self.prune()

    def write_parts(self, folder: Path) -> dict[str, str]:
        """Write this rank's rows. Returns the sha256 of each file that it wrote."""
        written, rank = {}, self.ranks.rank
        for number, part in enumerate(in_parts(self.rows())):
            path = folder / f"rank-{rank:05}-part-{number:04}.safetensors"
            # Copies on the CPU, of one part at a time.
            tensors = {rows.key: rows.values.to("cpu", copy=True).contiguous() for rows in part}
            places = {rows.key: [rows.first, list(rows.shape)] for rows in part}
            metadata = {"rank": str(rank), "places": json.dumps(places)}
            save_file(tensors, path, metadata=metadata)
            disk.as_umask_says(path)
            sync(path)
            written[path.name] = disk.sha256_file(path)
        return written

    def rows(self) -> Iterator[Rows]:
        """What this rank has to write: its shards, and on rank 0 what every rank has."""
        for name, (parameter, optimizer) in self.trained.items():
            is_sharded = isinstance(parameter, DTensor)
            state = {"value": parameter.detach(), **optimizer.state.get(parameter, {})}
            for kind, tensor in state.items():
                tensor = torch.as_tensor(tensor)  # bitsandbytes counts steps in a plain number
                first, values = place_of(tensor)
                if is_sharded and kind != "step" and not isinstance(tensor, DTensor):
                    first = None  # 8-bit moments: in blocks of this rank's rows, with their scales
                if first is None or isinstance(tensor, DTensor):
                    is_mine = values.numel() > 0
                else:
                    is_mine = self.ranks.main
                if is_mine:
                    yield Rows(f"{kind}/{name}", values, first, tuple(tensor.shape))

    def prune(self) -> None:
        """Remove all but the newest states, and the best weights that none of them names."""
        for path in saved_states(self.folder)[:-KEPT]:
            discard(path)
        for path in (*self.folder.glob("*.damaged"), *self.folder.glob("*.tmp")):
            shutil.rmtree(path)
        prune_best(self.folder)

    # ---- reading --------------------------------------------------------------------------------

    def restore(self) -> Progress | None:
        """Load the newest undamaged state into parameters and optimisers. Returns its progress, or
        None if there is none. Raises UserError if it is whole but not of this run.
        """
        for path in self.ranks.from_main(saved_states(self.folder)[::-1]):
            if reason := self.damage_in(path):
                if self.ranks.main:
                    print(f"{path}: damaged ({reason}); continuing without it", flush=True)
                    path.rename(path.with_suffix(".damaged"))
                continue
            progress = self.ranks.from_main(progress_in(path))
            if progress is None:
                raise of_another_version(path)
            self.load(path)
            check_metrics(self.run / "metrics.jsonl", progress, path)
            self.newest_step = progress.step
            if self.ranks.main:  # of later steps, which are repeated
                shutil.rmtree(self.run / "model", ignore_errors=True)
            return progress
        return None

    def damage_in(self, path: Path) -> str | None:
        """What is wrong with the state in `path` or with the best weights that it names; None if
        nothing is. Every rank reads its share of the files.
        """
        # 1) The list of the files.
        record, reason = None, None
        if self.ranks.main:
            try:
                record = read_progress(path)
            except ValueError as error:
                reason = str(error)
        record, reason = self.ranks.from_main((record, reason))
        if reason:
            return reason

        # 2) The files, and the best weights.
        files = sorted(record["files"].items())
        wrong = [
            problem
            for name, expected in files[self.ranks.rank :: self.ranks.world]
            if (problem := wrong_file(path / name, expected))
        ]
        if self.ranks.main and not wrong and (progress := progress_in(path)):
            wrong = [problem for problem in [self.wrong_best(progress)] if problem]
        return next((problems[0] for problems in self.ranks.of_all(wrong) if problems), None)

    def wrong_best(self, progress: Progress) -> str | None:
        """What is wrong with the best weights of `progress`, or None. A run that was killed between
        publishing them and its summary gets them back.
        """
        best, published = self.best(progress), self.run / "model"
        if best is None:
            return None
        is_moved = best.is_dir() and not (best / "model").exists() and published.is_dir()
        model = published if is_moved else best / "model"
        if not model.is_dir():
            return f"{best.name} is missing"
        if sha256_of(model) != progress.best_sha256:
            return f"the model in {best.name} is not the one that was saved there"
        if is_moved:
            published.rename(best / "model")
        return None

    def load(self, path: Path) -> None:
        """Fill parameters and optimisers from the state in `path`."""
        with ExitStack() as files:
            stored = stored_in(path, files)
            shapes = {
                key.removeprefix("value/"): torch.Size(pieces[0].shape)
                for key, pieces in stored.items()
                if key.startswith("value/")
            }
            check_parameters(path, shapes, self.trained, "another --freeze, or version of the code")
            for key, pieces in stored.items():
                kind, _, name = key.partition("/")
                parameter, optimizer = self.trained[name]
                if kind == "value":
                    fill(parameter.detach(), pieces)
                elif (value := self.state_in(pieces, kind, parameter)) is not None:
                    optimizer.state[parameter][kind] = value

    def state_in(self, pieces: list[Stored], kind: str, parameter: Tensor) -> Tensor | int | None:
        """The optimiser's state of one kind for a parameter; None if this rank has none."""
        if pieces[0].first is None:
            own = (p.whole() for p in pieces if p.rank == self.ranks.rank)
            value = next(own, None)
            return None if value is None else value.to(parameter.device, copy=True)
        if kind == "step":  # which AdamW keeps on the CPU
            value = pieces[0].whole()
            return value if value.is_floating_point() else int(value)
        if pieces[0].shape != parameter.shape:  # scales of 8-bit moments that are not sharded
            return pieces[0].whole().to(parameter.device, copy=True)
        return fill(torch.empty_like(parameter, dtype=pieces[0].dtype).detach(), pieces)


# ---- rows of tensors ----------------------------------------------------------------------------


def place_of(tensor: Tensor) -> tuple[int, Tensor]:
    """The row at which this rank's part of a tensor begins, and the part. FSDP gives every rank the
    same number of rows, but for the last ones, which may have fewer or none.
    """
    if not isinstance(tensor, DTensor):
        return 0, tensor
    assert tensor.placements == (Shard(0),), tensor.placements
    mesh = tensor.device_mesh
    per_rank = -(-tensor.shape[0] // mesh.size())
    return min(mesh.get_local_rank() * per_rank, tensor.shape[0]), tensor.to_local()


def in_parts(rows: Iterator[Rows]) -> Iterator[list[Rows]]:
    """`rows` in groups of at most PART_BYTES, or of a single tensor."""
    part: list[Rows] = []
    size = 0
    for one in rows:
        if part and size + one.values.nbytes > PART_BYTES:
            yield part
            part, size = [], 0
        part.append(one)
        size += one.values.nbytes
    if part:
        yield part


def stored_in(path: Path, files: ExitStack) -> dict[str, list[Stored]]:
    """The rows of each tensor in a state, by key. files: closes what is opened here."""
    stored: dict[str, list[Stored]] = {}
    for part in sorted(path.glob("*.safetensors")):
        file = files.enter_context(safe_open(part, framework="pt"))
        metadata = file.metadata()
        for key, (first, shape) in json.loads(metadata["places"]).items():
            count = file.get_slice(key).get_shape()[0] if shape else 0
            piece = Stored(file, int(metadata["rank"]), key, first, tuple(shape), count)
            stored.setdefault(key, []).append(piece)
    return stored


def fill(tensor: Tensor, pieces: list[Stored]) -> Tensor:
    """`tensor`, with this rank's rows copied from where they are stored."""
    first, local = place_of(tensor)
    if not local.shape:
        return tensor.copy_(pieces[0].whole())
    end, copied = first + len(local), 0
    for piece in pieces:
        start, stop = max(first, piece.first), min(end, piece.first + piece.count)
        if start < stop:
            local[start - first : stop - first].copy_(piece.rows(start, stop))
            copied += stop - start
    assert copied == len(local), f"{pieces[0].key}: {copied} of {len(local)} rows"
    return tensor


# ---- files --------------------------------------------------------------------------------------


def make_empty(folder: Path, temporary: Path) -> None:
    """Make `temporary` in `folder`, without what a killed process left there."""
    for leftover in folder.glob("*.tmp"):
        shutil.rmtree(leftover)
    temporary.mkdir(parents=True)


def discard(path: Path) -> None:
    """Remove a folder that nothing may read half of."""
    gone = path.with_suffix(".tmp")
    path.rename(gone)
    shutil.rmtree(gone)


def write_progress(folder: Path, progress: Progress, files: dict[str, str]) -> None:
    record = {"progress": asdict(progress), "files": files}
    record["sha256"] = disk.sha256_json(record)
    disk.write_text(folder / "progress.json", json.dumps(record, indent=1) + "\n")  # may have NaN


def read_progress(folder: Path) -> dict:
    """What `write_progress` wrote. Raises ValueError with the reason if that cannot be read."""
    path = folder / "progress.json"
    if not path.is_file():
        raise ValueError("progress.json is missing")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        expected = record.pop("sha256")
    except (ValueError, KeyError, AttributeError):
        raise ValueError("progress.json cannot be read") from None
    if disk.sha256_json(record) != expected:
        raise ValueError("the checksum of progress.json is wrong")
    return record


def wrong_file(path: Path, sha256: str) -> str | None:
    """What is wrong with a file of which the checksum is known, or None."""
    if not path.is_file():
        return f"{path.name} is missing"
    return None if disk.sha256_file(path) == sha256 else f"the checksum of {path.name} is wrong"
