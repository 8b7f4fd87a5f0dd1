"""args.json, metrics.jsonl, adapter/; is it the same run?"""

import argparse
import json
import os
import resource
import shlex
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from losses import COUPLES_BATCH
from pref.files import disk, run_folders
from pref.files.console import UserError
from pref.model import sharding
from pref.model.logps import ResponseLogps, trainable
from pref.model.ranks import Ranks
from pref.training import arguments, checkpoint, loss_options, reference
from pref.training.checkpoint import Progress
from pref.training.reference import Split

# May differ between two starts of one run. Losses that couple a micro-batch depend on how the batch
# is cut as well.
NOT_THE_RUN = {*arguments.names_affecting("place", "speed", "kernel"), "versions"}
NOT_THE_RUN_UNLESS_COUPLED = {*arguments.names_affecting("coupled"), "world_size"}
SETTLED = arguments.names_affecting("kernel")  # args.json records what `auto` was settled to
# How a change that is not an argument's is named when a run is refused.
CHANGED = {
    "data_sha256": "the pairs in --data have changed",
    "base_sha256": "the base model's weights have changed",
    "reference": "the token ids have changed: another tokenizer or chat template",
    "init_adapter_sha256": "the adapter in --init_adapter has changed",
    "loss_file_sha256": "the loss in --loss_file has changed",
}


def save_best(policy: ResponseLogps, rows: list[dict], folder: Path, ranks: Ranks) -> None:
    """Write `folder`: the adapter as a PEFT directory (fp32 safetensors), and validation pairs as
    it ranks them.
    """
    state = {
        name.removeprefix("model."): sharding.whole(p.detach())
        for name, p in trainable(policy).items()
    }
    if not ranks.main:
        return
    state = {name: tensor.cpu() for name, tensor in state.items()}
    temporary = folder.with_suffix(".tmp")
    with checkpoint.saving(folder):
        for leftover in (temporary, folder):  # of a step that is being done again
            shutil.rmtree(leftover, ignore_errors=True)
        policy.model.save_pretrained(
            temporary / "adapter", state_dict=state, save_embedding_layers=False
        )
        checkpoint.sync(temporary / "adapter" / "adapter_model.safetensors")
        disk.write_jsonl(temporary / "val_pairs.jsonl", rows)
        temporary.rename(folder)


def publish(run: Path, best: Path | None, summary: dict) -> None:
    """Give the run its adapter, its validation pairs and, last, its summary; the checkpoints have
    served.
    """
    with checkpoint.saving(run):
        if best is not None:
            temporary, adapter = run / "adapter.tmp", run / "adapter"
            for leftover in (temporary, adapter):
                shutil.rmtree(leftover, ignore_errors=True)
            shutil.copytree(best / "adapter", temporary)
            checkpoint.sync(temporary / "adapter_model.safetensors")
            temporary.rename(adapter)
            before = [
                row for _, row in disk.read_jsonl(run / "val_pairs.jsonl") if row["step"] == 0
            ]
            disk.write_jsonl(
                run / "val_pairs.jsonl",
                before + [row for _, row in disk.read_jsonl(best / "val_pairs.jsonl")],
            )
        disk.write_json(run / "summary.json", summary)
    shutil.rmtree(run / "checkpoint", ignore_errors=True)


def pair_rows(split: Split, step: int, logps: Tensor) -> list[dict]:
    """Lines of val_pairs.jsonl: log-probs summed over tokens (nats) and lengths (tokens) of each
    validation pair.
    """
    columns = torch.cat(
        [logps, split.reference.sums, reference.response_lengths(split.pairs)], 1
    ).tolist()
    names = (
        "policy_chosen",
        "policy_rejected",
        "ref_chosen",
        "ref_rejected",
        "len_chosen",
        "len_rejected",
    )
    rows = [
        {"id": row["id"], "step": step, **dict(zip(names, c))}
        for row, c in zip(split.rows, columns)
    ]
    return [row | {key: int(row[key]) for key in names[-2:]} for row in rows]


def open_wandb(folder: Path):
    """A Weights & Biases run under the run's own name, continued if it was begun. The key is
    wandb's own affair: it is read from WANDB_API_KEY or ~/.netrc and stands in no file of ours.
    Raises UserError if there can be none.
    """
    import wandb

    record = disk.read_json(folder / "args.json")
    name, project = (
        record["run_id"],
        os.environ.get("WANDB_PROJECT") or folder.resolve().parent.name,
    )
    identity = disk.sha256_json([str(folder.resolve()), record["data_sha256"]])[:16]
    try:
        return wandb.init(
            project=project, name=name, id=identity, resume="allow", config=record, dir=folder
        )
    except wandb.Error as error:
        raise UserError(
            f"--report_to wandb: {error}; set WANDB_API_KEY, or WANDB_MODE=offline to send later"
        ) from None


class Log:
    """metrics.jsonl, a line per optimiser step and per evaluation, written by rank 0 as it happens.
    Lines behind the checkpoint that a run goes on from are cut off: their steps are done again.
    wandb, if given, gets the same rows.
    """

    def __init__(self, path: Path, ranks: Ranks, size: int, wandb=None):
        self.path, self.ranks, self.wandb = path, ranks, wandb
        if ranks.main and path.exists():
            os.truncate(path, size)

    def line(self, values: dict) -> None:
        if self.ranks.main:
            with checkpoint.saving(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(disk.jsonl_line(values))
        if self.wandb is not None:
            self.wandb.log(values, step=values["step"])

    def size(self) -> int:
        """Bytes so far, on disk when this returns."""
        if not self.ranks.main or not self.path.exists():
            return 0
        with checkpoint.saving(self.path), open(self.path, "rb") as file:
            os.fsync(file.fileno())
        return self.path.stat().st_size


def peak_gib(device: torch.device) -> float:
    """Peak memory of this rank: allocated on the GPU, or resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def step_text(step: int, line: dict, steps: int, seconds_left: float, finite: bool) -> str:
    hours, rest = divmod(int(seconds_left), 3600)
    return (
        f"step {step}/{steps}  loss {line['loss']:.4f}  acc {line['rewards/accuracies']:.3f}  "
        f"rho {line['margin/rho']:+.4f}  grad {line['grad_norm']:.3g}  lr {line['lr']:.2e}  "
        f"{line['tok_per_s']:.0f} tok/s  {hours}:{rest // 60:02}:{rest % 60:02} left"
        + ("" if finite else "  NON-FINITE: step not taken")
    )


def check_same_run(folder: Path, record: dict) -> None:
    """Raise UserError, naming what differs, if `folder` holds a run that `record` is no second
    start of.
    """
    if not (folder / "args.json").is_file():
        return
    old, new = disk.read_json(folder / "args.json"), json.loads(json.dumps(record))
    ignored = NOT_THE_RUN | (
        set() if old.get("loss") in COUPLES_BATCH else NOT_THE_RUN_UNLESS_COUPLED
    )
    different = [key for key in new if key in old and key not in ignored and old[key] != new[key]]
    if different:
        what = ", ".join(
            CHANGED.get(key) or f"{key} was {old[key]}, is {new[key]}" for key in different
        )
        raise UserError(f"{folder}: holds another run ({what}); give --run_id or remove the folder")


def is_finished(folder: Path) -> bool:
    return (folder / "summary.json").is_file()


def start_command(argv: list[str], ranks: Ranks) -> str:
    """The command line that started this run, to be typed again."""
    local = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = f"torchrun --nproc_per_node {local}" if local and ranks.world > 1 else "python"
    script = sys.argv[0] if Path(sys.argv[0]).name == "train_pref.py" else "train_pref.py"
    return f"{launcher} {shlex.join([script, *argv])}"


def keep_settled(args: argparse.Namespace, folder: Path) -> None:
    """What `auto` came to when the run began, it stays: another kernel rounds otherwise."""
    if (folder / "checkpoint").is_dir():
        record = disk.read_json(folder / "args.json")
        for key in SETTLED:
            if getattr(args, key) == "auto":
                setattr(args, key, record.get(key, "auto"))


def open_folder(folder: Path, record: dict, progress: Progress, args: argparse.Namespace) -> None:
    """Write args.json, with a line in `starts` for each time the run was started; without a
    checkpoint to go on from, clear what an attempt left.
    """
    starts = []
    if progress.step or progress.evaluated == 0:
        starts = disk.read_json(folder / "args.json").get("starts", [])
    else:
        if (folder / "args.json").is_file():
            print(f"{folder}: an earlier attempt left no checkpoint; starting over", flush=True)
        for name in ("adapter", "checkpoint"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("metrics.jsonl", "val_pairs.jsonl"):
            (folder / name).unlink(missing_ok=True)
    starts.append(
        {"step": progress.step, "world_size": record["world_size"], "versions": record["versions"]}
    )
    with checkpoint.saving(folder / "args.json"):
        disk.write_json(folder / "args.json", record | {"starts": starts})
        if args.loss in loss_options.FROM_FILES:
            shutil.copyfile(args.loss_file.rpartition(":")[0], folder / "loss.py")


def print_status(folder: Path) -> int:
    """A line for every run in `folder`. Returns 1 if one has not ended, else 0."""
    ended = []
    for path in run_folders.find_runs([folder]):
        if path.resolve().name != run_folders.BASE_RUN:
            done, words = checkpoint.status_of(path)
            ended.append(done)
            print(words)
    print(f"{sum(ended)} of {len(ended)} runs have ended")
    return 0 if all(ended) else 1
