"""The best weights of a run that trains all parameters: a model folder that the run is published
with.
"""

import shutil
from pathlib import Path

import torch

from pref.files import disk
from pref.model import model_folder
from pref.model.logps import ResponseLogps
from pref.model.ranks import Ranks
from pref.training.checkpoint import on_main, prune_best, sync


def save(
    policy: ResponseLogps,
    dtype: torch.dtype,
    origin: Path,
    rows: list[dict],
    folder: Path,
    ranks: Ranks,
) -> str:
    """Write `folder`: the policy's weights in `dtype` as a model folder, and the validation pairs
    as they rank them. To be called on all ranks. Returns the hash of the weights.

    origin: the folder of the model that training started from. Best weights that no checkpoint
    names are removed first: a run that is killed now repeats the evaluation that they came from.
    """
    temporary = folder.with_suffix(".tmp")
    state = model_folder.gathered(policy.causal[0], dtype, ranks)

    def write() -> str:
        prune_best(folder.parent)
        for leftover in (temporary, folder):  # of an evaluation that is now repeated
            shutil.rmtree(leftover, ignore_errors=True)
        model = temporary / "model"
        model.mkdir(parents=True)
        model_folder.write(policy.causal[0], model, origin, dtype, state)
        for path in model.glob("*.safetensors"):
            sync(path)
        disk.write_jsonl(temporary / "val_pairs.jsonl", rows)
        temporary.rename(folder)
        return sha256_of(folder / "model")

    return on_main(write, folder, ranks, temporary)


def sha256_of(model: Path) -> str:
    """Hex SHA-256 of the weights in a model folder, whatever number of files they are in."""
    files = sorted(model.glob("*.safetensors"))
    return disk.sha256_json({file.name: disk.sha256_file(file) for file in files})
