"""The folder of one run, results/<run_id>/: what is written there, when, and whether a second start
continues the same run.

    args.json         open_folder: when the run starts, with an entry in `starts` for every start
    metrics.jsonl     Log: a line per optimiser step and per evaluation
    val_pairs.jsonl   write_pairs at step 0; publish adds the best step's
    adapter/          publish: the best adapter, or
    model/            the best weights where all parameters are trained
    summary.json      publish, last: a folder that has it is finished
"""

import argparse
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from losses import COUPLES_BATCH
from pref.files import disk, run_folders
from pref.files.console import UserError
from pref.model import sharding, weights
from pref.model.architecture import Architecture
from pref.model.logps import ResponseLogps, trainable
from pref.model.ranks import Ranks
from pref.training import arguments, best_model, checkpoint, loss_options, settings
from pref.training.checkpoint import Progress
from pref.training.peak_memory import peak_gib
from pref.training.plan import Plan
from pref.training.reference import Split, response_lengths

# May differ between two starts of one run. A loss that couples the pairs of a micro-batch also
# depends on how the work is divided.
NOT_THE_RUN = {*arguments.names_affecting("place", "speed", "kernel"), "versions", "logits"}
NOT_THE_RUN_UNLESS_COUPLED = {*arguments.names_affecting("coupled"), "world_size"}
EARLIER_EVAL_STEPS = 20  # the default of versions that recorded it
# What a refused run is told about a change that is not an argument's.
CHANGED = {
    "data_sha256": "the pairs in --data have changed",
    "model_sha256": "the base model's weights or configuration have changed",
    "base_sha256": "the base model's weights, as loaded, have changed",
    "reference": "the token ids have changed: another tokenizer or chat template, or other pairs "
    "that are left out",
    "init_adapter_sha256": "the adapter in --init_adapter has changed",
    "loss_file_sha256": "the loss in --loss_file has changed",
}


# ---- args.json ----------------------------------------------------------------------------------


def begin_record(args: argparse.Namespace, parameters: dict, own_loss: dict, ranks: Ranks) -> dict:
    """What args.json will hold, as far as it is known without weights and token ids. own_loss:
    from arguments.check_own_loss.
    """
    absent = arguments.UNLESS_RECORDED
    given = {
        key: value
        for key, value in vars(args).items()
        if key not in arguments.NOT_RECORDED
        and not (key in absent and value in (None, absent[key]))
    }
    return {
        **{key: str(value) if isinstance(value, Path) else value for key, value in given.items()},
        **parameters,
        **own_loss,
        "data_sha256": {
            split: disk.sha256_file(args.data / f"{split}.jsonl") for split in ("train", "val")
        },
        "world_size": ranks.world,
        "couples_batch": args.loss in COUPLES_BATCH,
        "versions": disk.versions(),
    }


def settled_record(planned: Plan, counts: dict[str, int], command: str) -> dict:
    """What is known once token ids and the plan are. counts: of truncated pairs. command: continues
    the run.
    """
    return {
        **counts,
        **{key: getattr(planned.args, key) for key in settings.SETTLED_LATE},
        "eval_every": planned.args.eval_steps,  # `eval_steps` is as given, which may be null
        "planned_steps": planned.steps,
        "planned_gib": planned.memory.total,
        "command": command,
    }


def check_same_run(folder: Path, record: dict) -> None:
    """Raise UserError, naming what differs, if `folder` holds another run than that of `record`, or
    one of which nobody knows what it is.
    """
    if not (folder / "args.json").is_file():
        if has_checkpoint(folder):
            raise UserError(
                f"{folder}: has a checkpoint and no args.json, which says what was trained; put it "
                "back, give another --run_id, or remove the folder"
            )
        return
    old, new = disk.read_json(folder / "args.json"), json.loads(json.dumps(record))
    old, new = arguments.UNLESS_RECORDED | old, arguments.UNLESS_RECORDED | new
    old = {"tune": "lora"} | old  # which earlier versions lack
    free = NOT_THE_RUN
    if old.get("loss") not in COUPLES_BATCH:
        free = NOT_THE_RUN | NOT_THE_RUN_UNLESS_COUPLED
    if old.get("optim") == "adamw_8bit":
        free = free - {"world_size"}  # its moments are scaled in blocks of a rank's own shards
    if new.get("eval_steps") is None and old.get("eval_steps") == EARLIER_EVAL_STEPS:
        # Begun by an earlier version with its default, or by one that was given the same.
        free = free | {"eval_steps"}
    if new.get("init_adapter_sha256"):  # which says how its matrices are scaled
        free = free | {"use_rslora"}
    different = [key for key in new if key in old and key not in free and old[key] != new[key]]
    if different:
        changes = ", ".join(
            CHANGED.get(key) or f"{key} was {old[key]}, is {new[key]}" for key in different
        )
        raise UserError(
            f"{folder}: holds another run ({changes}); give --run_id or remove the folder"
        )


def check_computed_as_before(folder: Path, model: Architecture) -> None:
    """Raise UserError if version 1.0.0 began the run in `folder` and computed `model` in another
    way: half of its steps would be of another policy, with another reference.
    """
    if not has_checkpoint(folder):
        return
    old = disk.read_json(folder / "args.json")
    if "model_sha256" in old:  # later versions record it
        return
    # Attention's dropout was off already.
    noise = [name for name in model.noise if not name.startswith("attention_dropout ")]
    same_attention = old.get("packing") == "off" and model.attention == "sdpa"
    if noise:
        change = f"the base model's own {', '.join(noise)} was on, is off"
    elif model.unpacked and not same_attention:
        change = f"{model.name} {model.unpacked}, which version 1.0.0 left out"
    else:
        return
    raise UserError(
        f"{folder}: begun by version 1.0.0, which computed this model in another way ({change}); "
        "give --run_id to train it anew, or remove the folder"
    )


def check_first_rows(folder: Path, progress: Progress, rows: list[dict]) -> None:
    """Raise UserError if the run in `folder` is past its first evaluation, and val_pairs.jsonl has
    not its lines any more. rows: the validation pairs.
    """
    if progress.evaluated < 0:
        return
    path = folder / "val_pairs.jsonl"
    lines = [line for _, line in disk.read_jsonl(path)] if path.is_file() else []
    ids = [line.get("id") for line in lines if line.get("step") == 0]
    if ids != [row["id"] for row in rows]:
        raise UserError(
            f"{path}: holds {len(ids)} of the {len(rows)} lines of step 0, or other ones; put it "
            f"back, or remove {folder} to train the run again"
        )


def has_checkpoint(folder: Path) -> bool:
    return bool(checkpoint.saved_states(folder / "checkpoint"))


def is_finished(folder: Path) -> bool:
    return (folder / "summary.json").is_file()


def start_command(argv: list[str], ranks: Ranks) -> str:
    """The command line that started this run, ready to be typed again."""
    local = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = f"torchrun --nproc_per_node {local}" if local and ranks.world > 1 else "python"
    script = sys.argv[0] if Path(sys.argv[0]).name == "train_pref.py" else "train_pref.py"
    return f"{launcher} {shlex.join([script, *argv])}"


def open_folder(folder: Path, record: dict, progress: Progress, args: argparse.Namespace) -> None:
    """Write args.json, with an entry in `starts` for this start. Without a checkpoint to continue
    from, remove what an earlier attempt left.
    """
    starts = []
    if progress.step or progress.evaluated == 0:
        starts = disk.read_json(folder / "args.json").get("starts", [])
    else:
        if (folder / "args.json").is_file():
            print(f"{folder}: an earlier attempt left no checkpoint; starting over", flush=True)
        for name in (*run_folders.WEIGHTS.values(), "checkpoint"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("metrics.jsonl", "val_pairs.jsonl"):
            (folder / name).unlink(missing_ok=True)
    this_start = {"step": progress.step}
    this_start |= {key: record[key] for key in ("world_size", "versions")}
    with checkpoint.saving(folder / "args.json"):
        disk.write_json(folder / "args.json", record | {"starts": [*starts, this_start]})
        if args.loss in loss_options.FROM_FILES:
            shutil.copyfile(args.loss_file.rpartition(":")[0], folder / "loss.py")


# ---- metrics.jsonl ------------------------------------------------------------------------------


class Log:
    """metrics.jsonl, a line per optimiser step and per evaluation, written by rank 0 as it happens.

    size: bytes at the checkpoint that the run continues from; later lines are cut off, because
    their steps are repeated. wandb, if given, gets the same rows.
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
        with checkpoint.saving(self.path):
            checkpoint.sync(self.path)
        return self.path.stat().st_size


def open_wandb(folder: Path):
    """A Weights & Biases run with the run's own name, continued if it exists. wandb finds its key
    itself (WANDB_API_KEY or ~/.netrc); no file of this toolkit holds it. Raises UserError if wandb
    refuses.
    """
    import wandb

    record = disk.read_json(folder / "args.json")
    project = os.environ.get("WANDB_PROJECT") or folder.resolve().parent.name
    identity = disk.sha256_json([str(folder.resolve()), record["data_sha256"]])[:16]
    try:
        return wandb.init(
            project=project,
            name=record["run_id"],
            id=identity,
            resume="allow",
            config=record,
            dir=folder,
        )
    except wandb.Error as error:
        raise UserError(
            f"--report_to wandb: {error}; set WANDB_API_KEY, or WANDB_MODE=offline to send later"
        ) from None


# ---- weights and validation pairs ---------------------------------------------------------------


def pair_rows(split: Split, step: int, logps: Tensor) -> list[dict]:
    """Lines of val_pairs.jsonl: log-probs of each pair, summed over tokens (nats), and lengths in
    tokens. logps: (pairs, 2) the policy's; chosen, rejected.
    """
    columns = zip(
        split.rows,
        logps.tolist(),
        split.reference.sums.tolist(),
        response_lengths(split.pairs).tolist(),
    )
    return [
        {
            "id": row["id"],
            "step": step,
            "policy_chosen": policy_chosen,
            "policy_rejected": policy_rejected,
            "ref_chosen": ref_chosen,
            "ref_rejected": ref_rejected,
            "len_chosen": len_chosen,
            "len_rejected": len_rejected,
        }
        for (
            row,
            (policy_chosen, policy_rejected),
            (ref_chosen, ref_rejected),
            (len_chosen, len_rejected),
        ) in columns
    ]


def write_pairs(run: Path, rows: list[dict]) -> None:
    with checkpoint.saving(run):
        disk.write_jsonl(run / "val_pairs.jsonl", rows)


def save_best(
    args: argparse.Namespace, policy: ResponseLogps, rows: list[dict], folder: Path, ranks: Ranks
) -> str | None:
    """Write `folder`: the weights as they are now, and the validation pairs as they rank them. To
    be called on all ranks. Returns the sha256 of the weights on rank 0.
    """
    if args.tune == "full":
        origin = weights.find_model(args.model).folder
        dtype = getattr(torch, args.dtype)
        return best_model.save(policy, dtype, origin, rows, folder, ranks)
    return save_best_adapter(policy, rows, folder, ranks)


def save_best_adapter(
    policy: ResponseLogps, rows: list[dict], folder: Path, ranks: Ranks
) -> str | None:
    """`save_best` for an adapter: a PEFT directory (fp32 safetensors)."""
    shards = {
        name.removeprefix("model."): parameter.detach()
        for name, parameter in trainable(policy).items()
    }
    state = sharding.gather(shards, ranks)
    if not ranks.main:
        return None
    temporary = folder.with_suffix(".tmp")
    with checkpoint.saving(folder):
        for leftover in (temporary, folder):  # of an evaluation that is now repeated
            shutil.rmtree(leftover, ignore_errors=True)
        policy.model.save_pretrained(
            temporary / "adapter", state_dict=state, save_embedding_layers=False
        )
        disk.as_umask_says(temporary / "adapter")
        checkpoint.sync(temporary / "adapter" / "adapter_model.safetensors")
        disk.write_jsonl(temporary / "val_pairs.jsonl", rows)
        temporary.rename(folder)
    return disk.sha256_file(folder / "adapter" / "adapter_model.safetensors")


def publish(run: Path, best: Path | None, summary: dict) -> None:
    """Write the run's weights and validation pairs from `best` and then, last, its summary; remove
    the checkpoints. best: None if no step was evaluated.
    """
    with checkpoint.saving(run):
        if best is not None:
            publish_weights(run, best)
            rows = [row for _, row in disk.read_jsonl(run / "val_pairs.jsonl") if row["step"] == 0]
            rows += [row for _, row in disk.read_jsonl(best / "val_pairs.jsonl")]
            write_pairs(run, rows)
        disk.write_json(run / "summary.json", summary)
    shutil.rmtree(run / "checkpoint", ignore_errors=True)


def publish_weights(run: Path, best: Path) -> None:
    """Put the weights in `best` into the run's folder: a copy of an adapter, a whole model itself.
    A run that is killed before its summary is there takes the model back when it continues.
    """
    if (best / "model").is_dir():
        shutil.rmtree(run / "model", ignore_errors=True)
        shutil.move(best / "model", run / "model")
        return
    temporary, adapter = run / "adapter.tmp", run / "adapter"
    for leftover in (temporary, adapter):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(best / "adapter", temporary)
    checkpoint.sync(temporary / "adapter_model.safetensors")
    temporary.rename(adapter)


def summary_of(
    args: argparse.Namespace, progress: Progress, device: torch.device, beta_mix: float | None
) -> dict:
    """The content of summary.json. beta_mix: the learned one, if it was learned."""
    return {
        "status": "diverged" if progress.in_a_row >= args.max_nonfinite else "finished",
        "steps": progress.step,
        "best_acc_ref": progress.best_acc_ref,
        "best_step": progress.best_step,
        "final_acc_ref": progress.final["eval/acc_ref"],
        "final_acc_sum": progress.final["eval/acc_sum"],
        "final_acc_mean": progress.final["eval/acc_mean"],
        "nonfinite_steps": progress.nonfinite,
        "step0_difference": progress.step0_difference,
        "wall_s": progress.wall_s,
        "save_s": progress.save_s,
        "tokens": progress.tokens,
        "peak_gib": peak_gib(device),
        "beta_mix": beta_mix,
    }


# ---- on the terminal ----------------------------------------------------------------------------


def start_text(args: argparse.Namespace, parameters: dict, ranks: Ranks, progress: Progress) -> str:
    return (
        f"run {args.run_id}: {args.loss} {parameters}, {ranks.world} rank(s) on "
        f"{ranks.device.type}, {args.dtype}, quant {args.quant}"
        + (", all parameters" if args.tune == "full" else "")
        + (f"; continued after step {progress.step}" if progress.step else "")
    )


def step_text(step: int, steps: int, line: dict, seconds_left: float, finite: bool) -> str:
    hours, rest = divmod(int(seconds_left), 3600)
    return (
        f"step {step}/{steps}  loss {line['loss']:.4f}  acc {line['rewards/accuracies']:.3f}  "
        f"rho {line['margin/rho']:+.4f}  grad {line['grad_norm']:.3g}  lr {line['lr']:.2e}  "
        f"{line['tok_per_s']:.0f} tok/s  {hours}:{rest // 60:02}:{rest % 60:02} left"
        + ("" if finite else "  NON-FINITE: step not taken")
    )


def compiled_text() -> str:
    """How many graphs torch.compile has made in this process, and why it made more than one of a
    function: code that it cannot compile is computed eagerly between two graphs.
    """
    from torch._dynamo.utils import counters  # takes seconds, which most commands need not wait

    graphs, breaks = counters["stats"]["unique_graphs"], counters["graph_break"]
    text = f"compiled: {graphs} graphs, {sum(breaks.values())} graph breaks"
    return "; ".join([text, *(str(reason).partition("\n")[0] for reason in list(breaks)[:3])])


def summary_text(summary: dict, folder: Path) -> str:
    return (
        f"{summary['status']} after {summary['steps']} steps and {summary['wall_s']:.0f} s: "
        f"acc_ref {summary['best_acc_ref']} at step {summary['best_step']} (best), "
        f"{summary['final_acc_ref']} (final)\n"
        f"results: {folder}\n"
        f"next: python gen_mtbench.py {shlex.quote(str(folder.parent))}"
    )


def print_status(folder: Path) -> int:
    """Print the state of every run in `folder`. Returns 1 if one has not ended, else 0."""
    ended = []
    for run in run_folders.find_runs([folder]):
        if run.resolve().name != run_folders.BASE_RUN:
            has_ended, text = checkpoint.status_of(run)
            ended.append(has_ended)
            print(text)
    print(f"{sum(ended)} of {len(ended)} runs have ended")
    return 0 if all(ended) else 1
