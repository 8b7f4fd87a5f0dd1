"""The features of pairs that the proxy (proxy.py) trains on: one file, its format and its checks.

A features file is a safetensors file. For each part `train` and `val`, and `confirm` where a file
has pairs that a search must not see, it holds these tensors of n pairs, fp32:

    {part}_ref_chosen, {part}_ref_rejected          (n,)  log-probs under the reference, nats,
                                                          summed over the response's tokens
    {part}_chosen_tokens, {part}_rejected_tokens    (n,)  response tokens, at least 1
    {part}_phi_chosen, {part}_phi_rejected          (n, D)  d log-prob / d theta at theta = 0

so that a policy of D parameters theta has, to first order, the log-prob ref_chosen + phi_chosen .
theta. Metadata: `key`, `model`, `data` (hashes of what they were computed from) and `sha256`, of
the tensors, all optional. feature_pass.py computes a file; one that was made in any other way can
be handed in.
"""

import hashlib
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pref.files import disk
from pref.files.console import UserError, first_line

REQUIRED, HIDDEN = ("train", "val"), "confirm"


class Part(NamedTuple):
    """Features of n pairs."""

    ref_chosen: Tensor  # (n,) nats
    ref_rejected: Tensor
    chosen_tokens: Tensor  # (n,)
    rejected_tokens: Tensor
    phi_chosen: Tensor  # (n, D)
    phi_rejected: Tensor

    @property
    def pairs(self) -> int:
        return len(self.ref_chosen)


class Features(NamedTuple):
    """The parts of a features file. phi is scaled so that phi_chosen - phi_rejected has a root mean
    square length of 1 over the training pairs: a learning rate then means the same for any model.
    """

    parts: dict[str, Part]
    metadata: dict[str, str]

    @property
    def train(self) -> Part:
        return self.parts["train"]

    @property
    def val(self) -> Part:
        return self.parts["val"]

    @classmethod
    def load(cls, path: Path) -> "Features":
        """The checked features in `path`. Raises UserError that names what is wrong with them."""
        tensors, metadata = read_tensors(path)
        names = [*REQUIRED, *([HIDDEN] if any(x.startswith(HIDDEN) for x in tensors) else [])]
        parts = {name: part_of(path, tensors, name) for name in names}
        widths = {part.phi_chosen.shape[1] for part in parts.values()}
        if len(widths) > 1:
            raise UserError(f"{path}: its parts have phi of different widths {sorted(widths)}")
        return cls(scaled(path, parts), metadata)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a features file."""
    remedy = "remove it to have it computed again, or make the file again"
    try:
        disk.check_readable(path)
        with safe_open(path, framework="pt") as file:
            # Copies: the tensors are the mapped file, and would change with it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a features file (--features)") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); {remedy}") from None
    if metadata.get("sha256", sha := sha256_tensors(tensors)) != sha:
        raise UserError(f"{path}: is damaged (its checksum differs); {remedy}")
    return tensors, metadata


def is_world(path: Path) -> bool:
    """Whether a features file has pairs to confirm with, so that no model is needed beside it."""
    tensors, _ = read_tensors(path)
    return any(name.startswith(HIDDEN) for name in tensors)


def part_of(path: Path, tensors: dict[str, Tensor], name: str) -> Part:
    """One part, with every value checked."""
    missing = [f for f in Part._fields if f"{name}_{f}" not in tensors]
    if missing:
        raise UserError(
            f"{path}: has no tensor {name}_{missing[0]}; a features file has {{train,val}}_"
            f"{{{','.join(Part._fields)}}}"
        )
    part = Part(*(tensors[f"{name}_{field}"].float() for field in Part._fields))
    count = len(part.ref_chosen) if part.ref_chosen.ndim else 0
    for field, tensor in zip(Part._fields, part):
        shape = (count, part.phi_chosen.shape[-1]) if field.startswith("phi") else (count,)
        if not count or tensor.shape != shape:
            raise UserError(
                f"{path}: {name}_{field} has shape {tuple(tensor.shape)}, expected {shape}, with "
                "at least one pair"
            )
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name}_{field} has values that are NaN or infinite")
    if min(part.chosen_tokens.min(), part.rejected_tokens.min()) < 1:
        raise UserError(f"{path}: {name} has a response of less than one token")
    return part


def scaled(path: Path, parts: dict[str, Part]) -> dict[str, Part]:
    """`parts` with phi in the unit that `Features` describes."""
    train = parts["train"]
    length = (train.phi_chosen - train.phi_rejected).double().square().sum(1).mean().sqrt().item()
    if length == 0:
        raise UserError(f"{path}: phi of chosen and rejected responses are equal in all pairs")
    return {
        name: part._replace(
            phi_chosen=part.phi_chosen / length, phi_rejected=part.phi_rejected / length
        )
        for name, part in parts.items()
    }


def write(path: Path, parts: dict[str, Part], metadata: dict[str, str]) -> None:
    """Write a features file in one step: a reader, or a crash, finds all of it or nothing."""
    tensors = {
        f"{name}_{field}": tensor.float().contiguous()
        for name, part in parts.items()
        for field, tensor in zip(Part._fields, part)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{time.time_ns()}.tmp")
    try:
        save_file(tensors, temporary, metadata={**metadata, "sha256": sha256_tensors(tensors)})
        disk.as_umask_says(temporary)
        temporary.rename(path)
    except SafetensorError as error:  # a full disk
        raise UserError(f"{path}: cannot be written ({first_line(error)})") from None
    finally:
        temporary.unlink(missing_ok=True)


def sha256_tensors(tensors: dict[str, Tensor]) -> str:
    """Hash of all tensors, their names and shapes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
