"""The model card of an exported model: what it is, made of what, how, and how it scored."""

import json
from pathlib import Path

from pref.files import disk, run_folders

# Arguments of train_pref.py that say how a run was trained, in this order.
SHOWN = ("beta", "tau", "beta_mix", "discopop_tau", "kl", "gamma", "label_smoothing", "margin")
SHOWN += ("learning_rate", "epochs", "max_steps", "global_batch", "max_length", "weight_decay")
SHOWN += ("warmup_ratio", "loraplus_lr_ratio", "tune", "freeze", "optim", "lora_r", "lora_alpha")
SHOWN += ("use_rslora", "lora_dropout", "lora_targets", "quant", "dtype")
SHOWN += ("seed", "init_adapter", "round")
# Values of summary.json that are shown.
ACCURACIES = {
    "best_acc_ref": "accuracy against the reference, best step (that of these weights)",
    "final_acc_ref": "accuracy against the reference, last step",
    "steps": "optimiser steps",
    "best_step": "step of these weights",
}
MOST_HEADER = 100  # lines of a README that are searched for a licence


def text(record: dict, summary: dict, base: str, base_folder: Path, export: dict) -> str:
    """Markdown with the header that the hub reads.

    record, summary: args.json and summary.json of the run; base: hub id or folder of its base;
    export: what export.json holds.
    """
    data, licence = source_of(Path(str(record["data"]))), licence_of(base_folder)
    shown_base = base if not Path(base).is_absolute() else Path(base).name
    header = {
        "base_model": shown_base,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **({"license": licence} if licence else {}),
        "tags": ["preference-optimization", str(record["loss"])],
    }
    rows = {name: record[name] for name in SHOWN if record.get(name) is not None}
    is_full = run_folders.tune_of(record) == "full"
    how = "all parameters trained" if is_full else "the LoRA adapter is merged into the weights"
    lines = [
        "---",
        *(f"{name}: {json.dumps(value)}" for name, value in header.items()),
        "---",
        "",
        f"# {record['run_id']}",
        "",
        f"{shown_base}, trained with the loss `{record['loss']}` on the preference pairs of "
        f"`{data}`; {how} ({export['dtype']}).",
        "",
        f"Licence: {licence or 'that of the base model; its folder does not name one'}.",
        "",
        "| argument | value |",
        "|---|---|",
        *(f"| {name} | {cell(value)} |" for name, value in rows.items()),
        "",
        "| validation | value |",
        "|---|---|",
        *(
            f"| {name} | {number(summary[key])} |"
            for key, name in ACCURACIES.items()
            if disk.is_number(summary.get(key))
        ),
        "",
        *merging_lines(export.get("comparison")),
        f"Trained and {'exported' if is_full else 'merged'} with pref "
        f"{export['versions']['pref']}.",
        "",
    ]
    return "\n".join(lines)


def merging_lines(compared: dict | None) -> list[str]:
    """How far merging moved the log-probabilities; nothing where nothing was merged."""
    if compared is None:
        return []
    return [
        f"Merging changed the log-probabilities of {compared['tokens']:,} response tokens by "
        f"{compared['merging']:.2g} nats a token; the adapter itself changes them by "
        f"{compared['adapter']:.2g}.",
        "",
    ]


def source_of(data: Path) -> str:
    """Where the pairs came from, as prep_data.py recorded it; else the name of their folder."""
    path = data / "manifest.json"
    found = disk.read_json(path).get("source") if path.is_file() else None
    return cell(str(found or data.name))


def number(value: float) -> str:
    return f"{value:.4g}"


def cell(value) -> str:
    """A value in a Markdown table."""
    if isinstance(value, str) and Path(value).is_absolute():
        value = Path(value).name
    return str(value).replace("|", "\\|").replace("\n", " ")


def licence_of(folder: Path) -> str | None:
    """The licence that a model's own README names in its header, or None."""
    path = folder / "README.md"
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[:MOST_HEADER]
    if not lines or lines[0].strip() != "---":
        return None
    for line in lines[1:]:
        if line.strip() == "---":
            break
        name, _, value = line.partition(":")
        if name == "license":
            return value.strip().strip("\"'") or None
    return None
