"""a results folder read and checked"""

import json
import math
from collections import defaultdict
from pathlib import Path

from pref.analysis import estimates
from pref.files import disk, judgements, mt_bench, run_folders
from pref.files.console import UserError

# Arguments that do not change what a run estimates, or that have a place of their own (loss, beta,
# tau, seed, ...). Any other argument that differs makes another cell: a setting nobody thought of
# must not pass for a seed.
NOT_SETTINGS = {
    "run_id",
    "loss",
    "beta",
    "tau",
    "seed",
    "mode",
    "model",
    "data",
    "data_sha256",
    "reference",
    "versions",
    "git",
    "results_dir",
    "per_device_batch",
    "world_size",
    "shard",
    "checkpointing",
    "compile",
    "tokens_per_microbatch",
    "prefix_sharing",
    "packing",
    "loss_file",
    "init_adapter",
    "save_steps",
    "command",
    "starts",
    "planned_gib",
    "planned_steps",
    "couples_batch",
    "truncated_prompts",
    "truncated_responses",
    "merged_boundaries",
}
CURVE_KEYS = (
    "loss",
    "rewards/accuracies",
    "margin/rho",
    "margin/delta",
    "grad_norm",
    "lr",
    "anchor",
    "eval/loss",
    "eval/acc_ref",
    "eval/acc_sum",
    "eval/acc_mean",
    "eval/margin/rho",
    "eval/margin/delta",
)
ACCURACIES = ("best_acc_ref", "final_acc_ref", "final_acc_sum", "final_acc_mean")
SUMMARY_KEYS = (
    *ACCURACIES,
    "best_step",
    "steps",
    "nonfinite_steps",
    "wall_s",
    "tokens",
    "peak_gib",
)
VAL_KEYS = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")


def load_runs(
    results_dir: Path, run_ids: list[str] | None, notes: list[str], skip_bad: bool = False
) -> list[dict]:
    """Every full run of `results_dir` (or those in `run_ids`), read and checked. Trial runs are
    named in `notes`.

    Raises UserError, a line a run, for files that cannot be read; with `skip_bad` these runs are
    named in `notes`.
    """
    if (results_dir / "args.json").is_file():
        raise UserError(
            f"{results_dir}: is one run; give the results folder above it and choose with --run_ids"
        )
    paths = {path.name: path for path in run_folders.find_runs([results_dir], check=False)}
    if unknown := sorted(set(run_ids or ()) - set(paths)):
        raise UserError(
            f"--run_ids: no {', '.join(unknown)} in {results_dir}; there are {', '.join(paths)}"
        )
    chosen = [path for name, path in paths.items() if run_ids is None or name in run_ids]
    runs, trial, bad = [], [], []
    for path in chosen:
        try:
            args = read_args(path / "args.json")
            if args["mode"] == "trial":
                trial.append(path.name)
            else:
                runs.append(load_run(path, args))
        except UserError as error:
            bad.append(str(error))
    if bad and not (skip_bad and runs):
        raise UserError("\n       ".join(bad) + "; or leave out what cannot be read: --skip_bad")
    notes += [f"left out, cannot be read: {error}" for error in bad]
    if trial:
        notes.append(
            f"left out, trial runs (they test the path, not the method): {', '.join(trial)}"
        )
    if not runs:
        raise UserError(
            f"{results_dir}: only trial runs here ({', '.join(trial)}), which measure nothing; "
            "train with train_pref.py --mode full"
        )
    check_same_model_and_data(runs)
    return runs


def load_run(path: Path, args: dict) -> dict:
    """All that stands in one run folder; what is missing is None or empty."""
    summary = read_summary(path / "summary.json") if (path / "summary.json").exists() else None
    steps, evals = (
        read_metrics(path / "metrics.jsonl") if (path / "metrics.jsonl").exists() else ([], [])
    )
    val, lengths = (
        read_val_pairs(path / "val_pairs.jsonl")
        if (path / "val_pairs.jsonl").exists()
        else ({}, {})
    )
    answers_path = path / "mt_bench" / "answers.jsonl"
    answers = mt_bench.read_answers(answers_path) if answers_path.exists() else {}
    judged, pairs = read_ratings(path / "mt_bench" / "judgements.csv")
    return {
        "run_id": path.name,
        "path": path,
        "args": args,
        "loss": args["loss"] or path.name,  # an untrained model has no loss: it goes by its run id
        "settings": {
            key: plain(value) for key, value in args.items() if is_setting(key, value, args)
        },
        "status": run_status(args, summary, has_metrics=bool(steps or evals)),
        "summary": summary,
        "steps": steps,
        "evals": evals,
        "val": val,
        "length_bias": run_length_bias(val, lengths, summary),
        "judged": judged,
        "pairs": pairs,
        "answers": answers,
        "kl": estimates.run_kl(answers),
    }


def read_args(path: Path) -> dict:
    args = disk.read_json(path)
    for key in ("loss", "model", "mode"):
        if not isinstance(args.get(key), str) and not (key == "loss" and args.get(key) is None):
            raise UserError(
                f"{path}: {key!r} must be text, found {args.get(key)!r}; was it written by train_pref.py?"
            )
    if args["mode"] not in ("full", "trial"):
        raise UserError(f"{path}: mode {args['mode']!r} must be full or trial")
    for name in (path.parent.name, args.get("run_id", path.parent.name)):
        run_folders.check_run_id(str(name), path)
    return args | {key: number(args, key, path) for key in ("beta", "tau", "seed")}


def is_setting(key: str, value, args: dict) -> bool:
    if key in ("per_device_batch", "world_size") and args.get("couples_batch"):
        return True  # such a loss depends on how its batches are cut
    return key not in NOT_SETTINGS and not isinstance(value, dict)


def plain(value):
    return json.dumps(value) if isinstance(value, list) else value


def number(row: dict, key: str, place: str | Path) -> float | None:
    """The number in `row[key]`; None for null, for a missing key, and for NaN or inf. Raises
    UserError for others.
    """
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{place}: {key!r} must be a number or null, found {value!r}")
    return value if math.isfinite(value) else None


def step_of(row: dict, place: str) -> float:
    if (step := number(row, "step", place)) is None:
        raise UserError(f"{place}: no 'step'; rerun train_pref.py")
    return step


def read_summary(path: Path) -> dict:
    summary = disk.read_json(path)
    if not isinstance(summary.get("status"), str):
        raise UserError(f"{path}: no 'status'; delete the file and rerun train_pref.py")
    return {"status": summary["status"]} | {key: number(summary, key, path) for key in SUMMARY_KEYS}


def run_status(args: dict, summary: dict | None, has_metrics: bool) -> str:
    if summary:
        return summary["status"]
    if args["loss"] is None:
        return "untrained"
    return "unfinished" if has_metrics else "no training record"


def read_metrics(path: Path) -> tuple[list[dict], list[dict]]:
    """(optimiser steps, evaluations) of metrics.jsonl in order of step."""
    steps, evals = {}, {}
    for line, row in disk.read_jsonl(path):
        place = f"{path}:{line}"
        step = step_of(row, place)
        kind = evals if any(key.startswith("eval/") for key in row) else steps
        # A resumed run repeats the steps after its checkpoint: the later record of a step is the
        # one that counts.
        kind[step] = {"step": step} | {
            key: number(row, key, place) for key in CURVE_KEYS if key in row
        }
    return [steps[step] for step in sorted(steps)], [evals[step] for step in sorted(evals)]


def read_val_pairs(
    path: Path,
) -> tuple[dict[int, dict[str, tuple[float, float] | None]], dict[str, int]]:
    """step -> pair id -> (rho, delta) in nats, or None for a pair with a non-finite
    log-probability; and pair id -> tokens of the chosen response less those of the rejected one,
    where the file has them.
    """
    pairs: dict[int, dict] = defaultdict(dict)
    lengths = {}
    for line, row in disk.read_jsonl(path):
        place = f"{path}:{line}"
        if missing := [key for key in ("id", "step", *VAL_KEYS) if key not in row]:
            raise UserError(
                f"{place}: no {', '.join(missing)}; rerun train_pref.py to write the file again"
            )
        step, pair_id = step_of(row, place), str(row["id"])
        if pair_id in pairs[step]:
            raise UserError(
                f"{place}: pair {pair_id} stands twice at step {step}; rerun train_pref.py"
            )
        logps = [number(row, key, place) for key in VAL_KEYS]
        pairs[step][pair_id] = None if None in logps else rho_and_delta(*logps)
        tokens = [number(row, key, place) for key in ("len_chosen", "len_rejected")]
        if None not in tokens:
            lengths[pair_id] = tokens[0] - tokens[1]
    return dict(pairs), lengths


def rho_and_delta(
    policy_chosen: float, policy_rejected: float, ref_chosen: float, ref_rejected: float
) -> tuple[float, float]:
    return (policy_chosen - ref_chosen) - (
        policy_rejected - ref_rejected
    ), policy_chosen - policy_rejected


def read_ratings(path: Path) -> tuple[dict[tuple, list[dict]], list[dict]]:
    """(judge, prompts, refs) -> its single-answer rows, and the rows of pairs. Raises UserError for
    a judgement that stands twice.
    """
    if not path.exists():
        return {}, []
    judged, pairs, seen = defaultdict(list), [], set()
    for row in judgements.read_judgements(path):
        check_judgement(row, path)
        judge = tuple(row[k] for k in ("judge", "prompts", "refs"))
        key = (
            *judge,
            *(
                row[k]
                for k in ("grading", "baseline", "order", "question_id", "turn", "choice", "repeat")
            ),
        )
        if key in seen:
            raise UserError(
                f"{path}: question {row['question_id']}, turn {row['turn']}, choice {row['choice']}, repeat "
                f"{row['repeat']} is judged twice by {row['judge']}; rerun judge.py to write the file again"
            )
        seen.add(key)
        if row["grading"] == "single":
            judged[judge].append(row)
        else:
            pairs.append(row)
    return dict(judged), pairs


def check_judgement(row: dict, path: Path) -> None:
    if (
        row["question_id"] is None
        or row["turn"] not in (1, 2)
        or not (row["judge"] and row["category"])
    ):
        found = {key: row[key] for key in ("question_id", "turn", "category", "judge")}
        raise UserError(
            f"{path}: a row without question, turn 1 or 2, category or judge: {found}; rerun judge.py"
        )


def check_same_model_and_data(runs: list[dict]) -> None:
    """Raise UserError, listing the groups, if the runs are of different models or of different
    data.
    """
    groups: dict[tuple, list[str]] = {}
    for run in sorted(runs, key=lambda run: run["args"].get("data_sha256") is None):
        model, data = run["args"]["model"], run["args"].get("data_sha256")
        key = (model, json.dumps(data, sort_keys=True))
        if (
            data is None
        ):  # the untrained model has seen no data: it belongs with the runs trained from it
            key = next((known for known in groups if known[0] == model), key)
        groups.setdefault(key, []).append(run["run_id"])
    if len(groups) > 1:
        listed = [
            f"\n  model {model}, data {data[:60]}: {json.dumps(ids)}"
            for (model, data), ids in groups.items()
        ]
        raise UserError(
            f"runs of {len(groups)} groups with different model or data, which cannot be compared; "
            f"give one of these lists as --run_ids:{''.join(listed)}"
        )


def run_length_bias(val: dict, lengths: dict[str, int], summary: dict | None) -> list[dict]:
    best = estimates.best_pairs(val, summary)
    return estimates.length_bias(
        {pair: value for pair, value in best.items() if pair in lengths}, lengths
    )
