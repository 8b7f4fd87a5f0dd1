"""Turn a results folder into verdicts, tables, figures and a report. Trains, generates and judges nothing.

Reads   results/<run_id>/{args.json, summary.json, metrics.jsonl, val_pairs.jsonl, mt_bench/{answers.jsonl,
        judgements.csv}}, results/claims.json if it is there, and question.jsonl for the report's answer browser
Writes  results/<run_id>/metrics.json and results/<run_id>/figures/<run_id>_learning_curve.{pdf,png}
        results/comparison/{report.html, aggregated_metrics.json, tables/*.{csv,md,tex}, figures/*.{pdf,png}}

    python analyze.py results/
    python analyze.py results/ --run_ids '["base", "dpo_b0.05_s42", "td_dpo_b0.05_t1_s42"]'

It works with whatever part is there and says what it could not do. Runs that share loss, beta, tau and every
other setting are one cell of the grid; a cell's number is the mean over its seeds. Never averaged together:
trial runs with full ones, one judge with another, other questions, another model, other data.

What a difference means: error over questions and over seeds both count (stats.py says how; bench/calibration.py, how
often that errs). Claims and their verdicts: claims.py and claims.json.
"""

import argparse
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev

import inference
import stats
from claims import OWN_CLAIMS, judge_claims, read_claims
from figures import draw_all, figure_order, figure_title, judge_title, smoke_mark
from files import (
    CATEGORIES,
    SMOKE_TEST_BELOW_B,
    WRONG_REFERENCES,
    UserError,
    check_run_id,
    find_runs,
    read_answers,
    read_json,
    read_jsonl,
    read_judgements,
    read_questions,
    run_main,
    write_json,
)
from report import write_report
from tables import list_tables, print_tables, show, verdict_texts, write_tables

# Arguments that do not change what a run estimates, or that have a place of their own (loss, beta, tau, seed, ...).
# Any other argument that differs makes another cell: a setting nobody thought of must not pass for a seed.
NOT_SETTINGS = {
    "run_id", "loss", "beta", "tau", "seed", "mode", "model", "data", "data_sha256", "reference", "versions", "git",
    "results_dir", "per_device_batch", "world_size", "shard", "checkpointing", "compile", "tokens_per_microbatch",
    "prefix_sharing", "packing", "loss_file", "init_adapter", "save_steps", "command", "starts", "planned_gib",
    "planned_steps", "couples_batch", "truncated_prompts", "truncated_responses", "merged_boundaries",
}  # fmt: skip
CURVE_KEYS = (
    "loss", "rewards/accuracies", "margin/rho", "margin/delta", "grad_norm", "lr", "anchor",
    "eval/loss", "eval/acc_ref", "eval/acc_sum", "eval/acc_mean", "eval/margin/rho", "eval/margin/delta",
)  # fmt: skip
ACCURACIES = ("best_acc_ref", "final_acc_ref", "final_acc_sum", "final_acc_mean")
SUMMARY_KEYS = (*ACCURACIES, "best_step", "steps", "nonfinite_steps", "wall_s", "tokens", "peak_gib")
VAL_KEYS = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
ACCURACY_COLUMNS = (*ACCURACIES, "margin_rho_first", "margin_rho_best")
COMPARISONS = ("best of grid", "matched beta", "best baseline", "untrained model")
REPORT_JUDGEMENT = (
    "question_id", "turn", "choice", "repeat", "judge", "grading", "score", "winner", "baseline", "order", "status",
    "judgement",
)  # fmt: skip
SCORE_COLUMNS = ("score", "turn_1", "turn_2", "score_without_wrong_references")


# ---- arguments ----------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results_dir", type=Path, help="results folder: a folder of run folders")
    parser.add_argument("--run_ids", help='use these runs alone, a JSON list: \'["base", "dpo_b0.05_s42"]\'')
    parser.add_argument("--baseline", default="dpo", help="loss that improvement is measured from (default: dpo)")
    parser.add_argument("--proposed", default="td_dpo", help="loss whose improvement is printed (default: td_dpo)")
    parser.add_argument(
        "--claims", type=Path, help="JSON file of further claims to judge (default: RESULTS_DIR/claims.json, if there)"
    )
    parser.add_argument(
        "--mt_bench", type=Path, default=Path("data/mt_bench"),
        help="folder with question.jsonl, whose text the report shows (default: data/mt_bench, if there)",
    )  # fmt: skip
    parser.add_argument("--draws", type=int, default=stats.DRAWS, help="bootstrap draws (default: %(default)s)")
    parser.add_argument("--skip_bad", action="store_true", help="leave out, by name, runs whose files cannot be read")
    args = parser.parse_args(argv)
    if args.draws < 200:
        raise UserError(f"--draws {args.draws}: a 95 % interval needs at least 200")
    if args.baseline == args.proposed:
        raise UserError(f"--baseline and --proposed are both {args.baseline}: name two losses")
    args.run_ids = parse_run_ids(args.run_ids)
    return args


def parse_run_ids(text: str | None) -> list[str] | None:
    try:
        run_ids = json.loads(text) if text is not None else None
    except json.JSONDecodeError:
        run_ids = text
    if run_ids is None or (isinstance(run_ids, list) and run_ids and all(isinstance(r, str) for r in run_ids)):
        return run_ids
    raise UserError(
        f'--run_ids {text}: expected a JSON list of run ids in quotes, such as \'["base", "dpo_b0.1_s42"]\''
    )


# ---- reading ------------------------------------------------------------------------------------


def load_runs(results_dir: Path, run_ids: list[str] | None, notes: list[str], skip_bad: bool = False) -> list[dict]:
    """Every full run of `results_dir` (or those in `run_ids`), read and checked. Trial runs are named in `notes`.

    Raises UserError, a line a run, for files that cannot be read; with `skip_bad` these runs are named in `notes`.
    """
    if (results_dir / "args.json").is_file():
        raise UserError(f"{results_dir}: is one run; give the results folder above it and choose with --run_ids")
    paths = {path.name: path for path in find_runs([results_dir], check=False)}
    if unknown := sorted(set(run_ids or ()) - set(paths)):
        raise UserError(f"--run_ids: no {', '.join(unknown)} in {results_dir}; there are {', '.join(paths)}")
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
        notes.append(f"left out, trial runs (they test the path, not the method): {', '.join(trial)}")
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
    steps, evals = read_metrics(path / "metrics.jsonl") if (path / "metrics.jsonl").exists() else ([], [])
    val, lengths = read_val_pairs(path / "val_pairs.jsonl") if (path / "val_pairs.jsonl").exists() else ({}, {})
    answers_path = path / "mt_bench" / "answers.jsonl"
    answers = read_answers(answers_path) if answers_path.exists() else {}
    judged, pairs = read_ratings(path / "mt_bench" / "judgements.csv")
    return {
        "run_id": path.name,
        "path": path,
        "args": args,
        "loss": args["loss"] or path.name,  # an untrained model has no loss: it goes by its run id
        "settings": {key: plain(value) for key, value in args.items() if is_setting(key, value, args)},
        "status": run_status(args, summary, has_metrics=bool(steps or evals)),
        "summary": summary,
        "steps": steps,
        "evals": evals,
        "val": val,
        "length_bias": run_length_bias(val, lengths, summary),
        "judged": judged,
        "pairs": pairs,
        "answers": answers,
        "kl": inference.run_kl(answers),
    }


def read_args(path: Path) -> dict:
    args = read_json(path)
    for key in ("loss", "model", "mode"):
        if not isinstance(args.get(key), str) and not (key == "loss" and args.get(key) is None):
            raise UserError(f"{path}: {key!r} must be text, found {args.get(key)!r}; was it written by train_pref.py?")
    if args["mode"] not in ("full", "trial"):
        raise UserError(f"{path}: mode {args['mode']!r} must be full or trial")
    for name in (path.parent.name, args.get("run_id", path.parent.name)):
        check_run_id(str(name), path)
    return args | {key: number(args, key, path) for key in ("beta", "tau", "seed")}


def is_setting(key: str, value, args: dict) -> bool:
    if key in ("per_device_batch", "world_size") and args.get("couples_batch"):
        return True  # such a loss depends on how its batches are cut
    return key not in NOT_SETTINGS and not isinstance(value, dict)


def plain(value):
    return json.dumps(value) if isinstance(value, list) else value


def number(row: dict, key: str, place: str | Path) -> float | None:
    """The number in `row[key]`; None for null, for a missing key, and for NaN or inf. Raises UserError for others."""
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
    summary = read_json(path)
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
    for line, row in read_jsonl(path):
        place = f"{path}:{line}"
        step = step_of(row, place)
        kind = evals if any(key.startswith("eval/") for key in row) else steps
        # A resumed run repeats the steps after its checkpoint: the later record of a step is the one that counts.
        kind[step] = {"step": step} | {key: number(row, key, place) for key in CURVE_KEYS if key in row}
    return [steps[step] for step in sorted(steps)], [evals[step] for step in sorted(evals)]


def read_val_pairs(path: Path) -> tuple[dict[int, dict[str, tuple[float, float] | None]], dict[str, int]]:
    """step -> pair id -> (rho, delta) in nats, or None for a pair with a non-finite log-probability; and
    pair id -> tokens of the chosen response less those of the rejected one, where the file has them."""
    pairs: dict[int, dict] = defaultdict(dict)
    lengths = {}
    for line, row in read_jsonl(path):
        place = f"{path}:{line}"
        if missing := [key for key in ("id", "step", *VAL_KEYS) if key not in row]:
            raise UserError(f"{place}: no {', '.join(missing)}; rerun train_pref.py to write the file again")
        step, pair_id = step_of(row, place), str(row["id"])
        if pair_id in pairs[step]:
            raise UserError(f"{place}: pair {pair_id} stands twice at step {step}; rerun train_pref.py")
        logps = [number(row, key, place) for key in VAL_KEYS]
        pairs[step][pair_id] = None if None in logps else rho_and_delta(*logps)
        tokens = [number(row, key, place) for key in ("len_chosen", "len_rejected")]
        if None not in tokens:
            lengths[pair_id] = tokens[0] - tokens[1]
    return dict(pairs), lengths


def rho_and_delta(
    policy_chosen: float, policy_rejected: float, ref_chosen: float, ref_rejected: float
) -> tuple[float, float]:
    return (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected), policy_chosen - policy_rejected


def read_ratings(path: Path) -> tuple[dict[tuple, list[dict]], list[dict]]:
    """(judge, prompts, refs) -> its single-answer rows, and the rows of pairs. Raises UserError for a judgement that
    stands twice."""
    if not path.exists():
        return {}, []
    judged, pairs, seen = defaultdict(list), [], set()
    for row in read_judgements(path):
        check_judgement(row, path)
        judge = tuple(row[k] for k in ("judge", "prompts", "refs"))
        key = (*judge, *(row[k] for k in ("grading", "baseline", "order", "question_id", "turn", "choice", "repeat")))
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
    if row["question_id"] is None or row["turn"] not in (1, 2) or not (row["judge"] and row["category"]):
        found = {key: row[key] for key in ("question_id", "turn", "category", "judge")}
        raise UserError(f"{path}: a row without question, turn 1 or 2, category or judge: {found}; rerun judge.py")


def check_same_model_and_data(runs: list[dict]) -> None:
    """Raise UserError, listing the groups, if the runs are of different models or of different data."""
    groups: dict[tuple, list[str]] = {}
    for run in sorted(runs, key=lambda run: run["args"].get("data_sha256") is None):
        model, data = run["args"]["model"], run["args"].get("data_sha256")
        key = (model, json.dumps(data, sort_keys=True))
        if data is None:  # the untrained model has seen no data: it belongs with the runs trained from it
            key = next((known for known in groups if known[0] == model), key)
        groups.setdefault(key, []).append(run["run_id"])
    if len(groups) > 1:
        listed = [f"\n  model {model}, data {data[:60]}: {json.dumps(ids)}" for (model, data), ids in groups.items()]
        raise UserError(
            f"runs of {len(groups)} groups with different model or data, which cannot be compared; "
            f"give one of these lists as --run_ids:{''.join(listed)}"
        )


# ---- numbers of one run -------------------------------------------------------------------------


def mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return fmean(values) if values else None


def sd(values: Iterable[float]) -> float | None:
    """Sample standard deviation (n - 1); None for fewer than two values."""
    values = list(values)
    return stdev(values) if len(values) > 1 else None


def standard_error(values: list[float]) -> float | None:
    return sd(values) / math.sqrt(len(values)) if len(values) > 1 else None


def run_accuracy(run: dict) -> dict | None:
    """Validation accuracies of a run that ended; the standard error is over pairs, at the best evaluation."""
    if run["summary"] is None:
        return None
    best = inference.best_pairs(run["val"], run["summary"])
    hits = [inference.ranked_right(pair) for pair in best.values()]
    accuracy = {key: run["summary"][key] for key in (*ACCURACIES, "best_step")}
    return accuracy | {"n_pairs": len(hits), "se_over_pairs": standard_error(hits)}


def run_margins(run: dict) -> dict | None:
    """Mean rho and delta (nats) with standard error over validation pairs, at the first and the best evaluation."""
    if not run["val"]:
        return None
    best_step = (run["summary"] or {}).get("best_step")
    steps = {"first": min(run["val"]), "best": best_step if best_step in run["val"] else max(run["val"])}
    return {name: margin_at(step, run["val"][step]) for name, step in steps.items()}


def margin_at(step: int, pairs: dict) -> dict:
    finite = [pair for pair in pairs.values() if pair]
    margin = {"step": step, "n_pairs": len(finite), "n_nonfinite": len(pairs) - len(finite)}
    for i, name in enumerate(("rho", "delta")):
        values = [pair[i] for pair in finite]
        margin[name] = {"mean": mean(values), "se": standard_error(values)}
    return margin


def run_length_bias(val: dict, lengths: dict[str, int], summary: dict | None) -> list[dict]:
    best = inference.best_pairs(val, summary)
    return inference.length_bias({pair: value for pair, value in best.items() if pair in lengths}, lengths)


def score_ratings(rows: list[dict], questions: set[int] | None = None) -> dict:
    """MT-Bench scores of one run by one judge, over `questions` or all of them.

    Choices and repeats are averaged within a question's turn first. turn_1, turn_2 and score are then means over
    those: score over all turns that have a rating, as FastChat's show_result.py. A row without a rating counts in
    n_judged and in no mean. se_over_questions: clustered by question, since two turns of one are not independent.
    """
    rows = [row for row in rows if questions is None or row["question_id"] in questions]
    turns = turn_means(rows)
    by_turn = {which: [rating for (_, turn), rating in turns.items() if turn == which] for which in (1, 2)}
    return {
        "score": mean(turns.values()),
        "turn_1": mean(by_turn[1]),
        "turn_1_se": standard_error(by_turn[1]),
        "turn_2": mean(by_turn[2]),
        "turn_2_se": standard_error(by_turn[2]),
        "score_without_wrong_references": mean(
            rating for (question, _), rating in turns.items() if question not in WRONG_REFERENCES
        ),
        "se_over_questions": clustered_error(turns),
        "n_questions": len({row["question_id"] for row in rows}),
        **count_ratings(rows),
        "failures": dict(sorted(Counter(str(row["status"]) for row in rows if row["status"] != "ok").items())),
        "categories": {name: score_category(rows, name) for name in category_order(rows)},
    }


def clustered_error(turns: dict[tuple[int, int], float]) -> float | None:
    """Standard error of the mean rating, clustered by question: of the question means where all have both turns."""
    by_question = defaultdict(list)
    for (question, _), rating in turns.items():
        by_question[question].append(rating)
    n, total = len(by_question), len(turns)
    if n < 2:
        return None
    grand = fmean(turns.values())
    squares = sum((sum(ratings) - len(ratings) * grand) ** 2 for ratings in by_question.values())
    return math.sqrt(n / (n - 1) * squares) / total


def turn_means(rows: list[dict]) -> dict[tuple[int, int], float]:
    """(question, turn) -> mean rating over choices and repeats."""
    ratings = defaultdict(list)
    for row in rows:
        if row["status"] == "ok":
            ratings[row["question_id"], row["turn"]].append(row["score"])
    return {key: fmean(values) for key, values in sorted(ratings.items())}


def score_category(rows: list[dict], name: str) -> dict:
    rows = [row for row in rows if row["category"] == name]
    turns = turn_means(rows)
    return {"score": mean(turns.values()), "se": clustered_error(turns), **count_ratings(rows)}


def count_ratings(rows: list[dict]) -> dict:
    return {"n_scored": sum(row["status"] == "ok" for row in rows), "n_judged": len(rows)}


def category_order(rows: list[dict]) -> list[str]:
    found = {row["category"] for row in rows}
    return [name for name in CATEGORIES if name in found] + sorted(found - set(CATEGORIES))


def describe_judge(key: tuple, rows: list[dict]) -> dict:
    """What a score depends on besides the answers, and whether it measures anything."""
    judge, prompts, refs = key
    params_b, smoke = inference.judge_size(judge, rows)
    return {
        "judge": judge, "judge_params_b": params_b, "smoke_test": smoke,
        "prompts": prompts, "refs": refs, "grading": "single",
    }  # fmt: skip


def run_metrics(run: dict) -> dict:
    """What metrics.json of one run holds. Its MT-Bench scores are over all questions that this run was judged on."""
    args = run["args"]
    return {
        "run_id": run["run_id"],
        **{key: args[key] for key in ("loss", "beta", "tau", "seed", "mode", "model")},
        "status": run["status"],
        "accuracy": run_accuracy(run),
        "margins": run_margins(run),
        "length_bias": run["length_bias"],
        "training": {key: run["summary"][key] for key in SUMMARY_KEYS[5:]} if run["summary"] else None,
        "mt_bench": [
            describe_judge(key, rows)
            | score_ratings(rows)
            | inference.judge_rows({run["run_id"]: rows}, {run["run_id"]: run["answers"]})
            for key, rows in sorted(run["judged"].items(), key=lambda item: str(item[0]))
        ],
        "kl_to_base": run["kl"],
    }


# ---- the grid: cells, means over seeds, improvement ---------------------------------------------


def make_cells(runs: list[dict]) -> list[dict]:
    """Group runs by loss, beta, tau and every other setting: what is left inside a cell is its seeds."""
    differing, cells = differing_settings(runs), {}
    for run in runs:
        settings = {key: run["settings"].get(key) for key in differing[run["loss"]]}
        key = (run["loss"], run["args"]["beta"], run["args"]["tau"], json.dumps(settings))
        cell = cells.setdefault(key, {"loss": key[0], "beta": key[1], "tau": key[2], "settings": settings, "runs": []})
        if twin := next((other for other in cell["runs"] if other["args"]["seed"] == run["args"]["seed"]), None):
            raise UserError(
                f"{twin['run_id']} and {run['run_id']} have the same loss, beta, tau, settings and seed: one run would "
                "count twice; choose one with --run_ids"
            )
        cell["runs"].append(run)
    for cell in cells.values():
        cell["label"] = cell_columns(cell)["label"]
    return sorted(cells.values(), key=cell_order)


def differing_settings(runs: list[dict]) -> dict[str, list[str]]:
    """loss -> settings, besides beta and tau, that differ among its runs."""
    values: dict[str, dict[str, set]] = defaultdict(lambda: defaultdict(set))
    for run in runs:
        for key in {key for other in runs for key in other["settings"]}:
            values[run["loss"]][key].add(run["settings"].get(key))
    return {loss: sorted(key for key in keys if len(keys[key]) > 1) for loss, keys in values.items()}


def cell_order(cell: dict) -> tuple:
    untrained = cell["runs"][0]["args"]["loss"] is None
    values = [(value is not None, value or 0) for value in (cell["beta"], cell["tau"])]
    return (not untrained, cell["loss"], *values, json.dumps(cell["settings"]))


def cell_columns(cell: dict) -> dict:
    settings = " ".join(f"{key}={show(value)}" for key, value in cell["settings"].items())
    values = [f"{letter}={cell[key]:g}" for key, letter in (("beta", "β"), ("tau", "τ")) if cell[key] is not None]
    return {
        "label": " ".join([cell["loss"], *values, *([settings] if settings else [])]),
        "untrained": cell["runs"][0]["args"]["loss"] is None,
        **{key: cell[key] for key in ("loss", "beta", "tau")},
        "settings": settings or None,
    }


def cell_row(cell: dict, values: dict[str, dict], names: tuple[str, ...], se: str) -> dict | None:
    """One row of a table: mean, SD and count over seeds of each name; `se` is kept where there is one seed alone.

    values: run_id -> name -> number or None. None if no run of the cell has values and none diverged. A diverged
    run's numbers are in the means, and a cell that only diverged keeps its row: without them the loss looks better.
    """
    found = [run for run in cell["runs"] if run["run_id"] in values]
    with_value = [run for run in found if values[run["run_id"]][names[0]] is not None]
    n_diverged = sum(run["status"] == "diverged" for run in cell["runs"])
    if not found and not n_diverged:
        return None
    row = cell_columns(cell) | {
        "runs": [run["run_id"] for run in with_value],
        "seeds": [run["args"]["seed"] for run in with_value],
        "n_seeds": len(with_value),
        "n_diverged": n_diverged,
    }
    for name in names:
        numbers = [values[run["run_id"]][name] for run in found if values[run["run_id"]][name] is not None]
        row |= {name: mean(numbers), f"{name}_sd": sd(numbers), f"{name}_n": len(numbers)}
    return row | {se: values[with_value[0]["run_id"]][se] if len(with_value) == 1 else None}


def compare_accuracy(cells: list[dict], args: argparse.Namespace) -> dict:
    numbers = {run["run_id"]: accuracy_numbers(run) for cell in cells for run in cell["runs"] if run["summary"]}
    values = {run["run_id"]: inference.accuracy_values(run) for cell in cells for run in cell["runs"]}
    rows = [cell_row(cell, numbers, ACCURACY_COLUMNS, "se_over_pairs") for cell in cells]
    for cell, row in zip(cells, rows):
        cell["accuracy"] = row and row["best_acc_ref"]
    compared = compare_scores(cells, rows, "best_acc_ref", numbers, values, args)
    for row in compared["improvement"]:
        row["mcnemar"] = inference.mcnemar_rows(*row["cells"], values) if row["comparison"] == "best of grid" else []
    return {"values": values, **compared}


def accuracy_numbers(run: dict) -> dict:
    margins = run_margins(run)
    rho = {f"margin_rho_{name}": margins[name]["rho"]["mean"] if margins else None for name in ("first", "best")}
    return run_accuracy(run) | rho


def compare_mt_bench(
    key: tuple, cells: list[dict], answers: dict[str, dict], args: argparse.Namespace, notes: list[str]
) -> dict:
    """MT-Bench by one judge over the questions that every run was judged on, so that no run has an easier exam."""
    judged = {run["run_id"]: run["judged"][key] for cell in cells for run in cell["runs"] if key in run["judged"]}
    judge = describe_judge(key, [row for rows in judged.values() for row in rows])
    questions, left_out = common_questions(judged)
    note_judge(judge, judged, questions, left_out, notes)
    kept = {run_id: [row for row in rows if row["question_id"] in questions] for run_id, rows in judged.items()}
    scores = {run_id: score_ratings(rows) for run_id, rows in kept.items()}
    values = {run_id: inference.rating_values(turn_means(rows)) for run_id, rows in kept.items()}
    rows = [mt_bench_row(cell, scores) for cell in cells]
    reliability = inference.judge_rows(kept, answers)
    return judge | {
        "values": values,
        "questions": sorted(questions),
        "questions_left_out": sorted(left_out),
        "categories": [row for cell in cells for row in category_rows(cell, scores)],
        **compare_scores(cells, rows, "score", scores, values, args),
        **reliability,
        "variance": inference.variance_rows(cells, values, reliability["retest"]),
    }


def compare_scores(
    cells: list[dict], rows: list, metric: str, numbers: dict, values: dict, args: argparse.Namespace
) -> dict:
    """What accuracy and MT-Bench have in common: cells with intervals, differences, selection, spread over beta.

    numbers: run_id -> name -> number, of whole runs; values: by question or pair, for inference.
    """
    for cell, row in zip(cells, rows):
        if row:
            row["low"], row["high"] = inference.cell_interval(cell, row["runs"], values, args.draws)
    runs = [run for cell in cells for run in cell["runs"]]
    return {
        "cells": [row for row in rows if row],
        "runs": [
            {"run_id": run["run_id"], "loss": run["loss"], "value": numbers[run["run_id"]][metric]}
            for run in runs
            if numbers.get(run["run_id"], {}).get(metric) is not None
        ],
        "improvement": improvement_rows(cells, rows, metric, values, args),
        "selection": inference.selection_rows(cells, rows, metric, args.baseline),
        "spread": inference.spread_rows(cells, values, args.baseline, args.draws),
    }


def common_questions(judged: dict[str, list[dict]]) -> tuple[set[int], dict[int, list[str]]]:
    """Questions judged in every run on the same turns, and for each other one the runs that lack it or a turn.

    A question whose judgement failed is judged: were it not, 1 % of failures in 40 runs would leave few questions.
    """
    turns = {run_id: defaultdict(set) for run_id in judged}
    union = defaultdict(set)
    for run_id, rows in judged.items():
        for row in rows:
            turns[run_id][row["question_id"]].add(row["turn"])
            union[row["question_id"]].add(row["turn"])
    lacking = {q: [run_id for run_id in judged if turns[run_id][q] != union[q]] for q in sorted(union)}
    return {q for q, runs in lacking.items() if not runs}, {q: runs for q, runs in lacking.items() if runs}


def mt_bench_row(cell: dict, scores: dict[str, dict]) -> dict | None:
    row = cell_row(cell, scores, SCORE_COLUMNS, "se_over_questions")
    return row and row | sum_counts(scores[run["run_id"]] for run in cell["runs"] if run["run_id"] in scores)


def category_rows(cell: dict, scores: dict[str, dict]) -> list[dict]:
    mine = [scores[run["run_id"]]["categories"] for run in cell["runs"] if run["run_id"] in scores]
    rows = []
    for name in dict.fromkeys(name for categories in mine for name in categories):
        found = [categories[name] for categories in mine if name in categories]
        numbers = [category["score"] for category in found if category["score"] is not None]
        row = {"category": name, "score": mean(numbers), "score_sd": sd(numbers), "n_seeds": len(numbers)}
        rows.append(cell_columns(cell) | row | sum_counts(found))
    return rows


def sum_counts(scored: Iterable[dict]) -> dict:
    scored = list(scored)
    return {key: sum(one[key] for one in scored) for key in ("n_scored", "n_judged")}


def improvement_rows(cells: list[dict], rows: list, metric: str, values: dict, args: argparse.Namespace) -> list[dict]:
    """Every loss against the baseline: its best cell against the baseline's best (the headline), each of its cells
    against the baseline at its own beta and against the baseline's best; and every loss's best against the untrained
    model. A best cell is chosen by validation accuracy where that is known for all of the loss's cells (METHODS.md 5);
    chosen by the score itself, the maximum flatters the larger grid.

    p_adjusted: Holm over the headline, Benjamini and Hochberg over the cells of each other comparison.
    """
    by_loss: dict[str, list[tuple]] = defaultdict(list)
    for cell, row in zip(cells, rows):
        if row and row[metric] is not None:
            by_loss[cell["loss"]].append((cell, row))
    untrained = [pairs[0] for pairs in by_loss.values() if inference.is_untrained(pairs[0][0])]
    trained = {loss: pairs for loss, pairs in by_loss.items() if not inference.is_untrained(pairs[0][0])}
    best = {loss: pick_best(pairs, metric) for loss, pairs in trained.items()}
    theirs = trained.get(args.baseline, [])
    found = []

    def add(kind: str, one: tuple, other: tuple, selected_by: str | None) -> None:
        row = improvement(kind, one, other, metric) | {"selected_by": selected_by}
        compared = inference.compare_cells(one[0], other[0], values, args.draws)
        row |= inference.comparison_columns(compared) | {"cells": (one[0], other[0])}
        if compared:  # of the same runs and units as interval and test: seeds or ratings may lack in one of the two
            row |= {"difference": row["estimate"], "improvement_rate": row["rate"]}
        labels = row["proposed"], row["baseline"]
        row["sensitivity"] = (
            inference.sensitivity_rows(*labels, compared) if compared and kind == "best of grid" else []
        )
        counts = {"proposed_cells": len(trained[one[0]["loss"]]), "baseline_cells": len(by_loss[other[0]["loss"]])}
        found.append(row | counts)

    for loss, pairs in trained.items():
        ours, how = best[loss]
        for other in untrained:
            add("untrained model", ours, other, how)
        if loss == args.baseline or not theirs:
            continue
        best_theirs, how_theirs = best[args.baseline]
        add("best of grid", ours, best_theirs, how if how == how_theirs else f"proposed: {how}; baseline: {how_theirs}")
        for one in pairs:
            for other in matched(one, theirs):
                add("matched beta", one, other, None)
            add("best baseline", one, best_theirs, how_theirs)
    for kind in COMPARISONS:
        same = [row for row in found if row["comparison"] == kind]
        adjust = stats.holm if kind == "best of grid" else stats.benjamini_hochberg
        for row, p in zip(same, adjust([math.nan if row["p"] is None else row["p"] for row in same])):
            row["p_adjusted"] = inference.known(p)
    return sorted(found, key=lambda row: COMPARISONS.index(row["comparison"]))


def pick_best(pairs: list[tuple], metric: str) -> tuple[tuple, str]:
    if all(cell.get("accuracy") is not None for cell, _ in pairs) and metric != "best_acc_ref":
        return max(pairs, key=lambda pair: pair[0]["accuracy"]), "validation accuracy"
    return max(pairs, key=lambda pair: pair[1][metric]), "the score itself"


def matched(ours: tuple, theirs: list[tuple]) -> list[tuple]:
    """Baseline cells of the same beta; of several, those that differ from ours in the fewest other settings."""
    same = [pair for pair in theirs if pair[0]["beta"] == ours[0]["beta"]]
    nearest = inference.nearest(ours[0], [cell for cell, _ in same])
    return [pair for pair in same if pair[0] in nearest]


def improvement(comparison: str, ours: tuple, theirs: tuple, metric: str) -> dict:
    value, base = ours[1][metric], theirs[1][metric]
    return {
        "comparison": comparison,
        **{key: ours[1][key] for key in ("loss", "beta", "tau")},
        "proposed": ours[1]["label"],
        "proposed_score": value,
        "proposed_n_seeds": ours[1]["n_seeds"],
        "baseline": theirs[1]["label"],
        "baseline_score": base,
        "baseline_n_seeds": theirs[1]["n_seeds"],
        "difference": value - base,
        "improvement_rate": (value - base) / base if base else None,
        "selected_by": None,
        "differs_in": inference.differences_text(ours[0], theirs[0]),
    }


def compare(runs: list[dict], args: argparse.Namespace, notes: list[str]) -> dict:
    """aggregated_metrics.json: everything that is said over several runs."""
    unfinished = [run["run_id"] for run in runs if run["status"] == "unfinished"]
    used = [run for run in runs if run["status"] != "unfinished"]
    cells, answers = make_cells(used), {run["run_id"]: run["answers"] for run in used}
    note_runs(runs, cells, notes)
    accuracy = compare_accuracy(cells, args)
    judges = sorted({key for run in used for key in run["judged"]}, key=str)
    if len(judges) > 1:
        notes.append(f"{len(judges)} judges or judge settings: each has tables of its own, never averaged")
    mt_bench = [compare_mt_bench(key, cells, answers, args, notes) for key in judges]
    model = runs[0]["args"]["model"]
    comparison = {
        "model": model,
        "data_sha256": next((run["args"]["data_sha256"] for run in runs if run["args"].get("data_sha256")), None),
        "baseline": args.baseline,
        "proposed": args.proposed,
        "draws": args.draws,
        "runs": [{key: run[key] for key in ("run_id", "status")} for run in runs],
        "unfinished": unfinished,
        "diverged": [run["run_id"] for run in runs if run["status"] == "diverged"],
        "claims": judge_claims(load_claims(args), cells, measured_scores(accuracy, mt_bench), model, args.draws),
        "accuracy": accuracy,
        "mt_bench": mt_bench,
        "pairs": inference.win_rows(cells, args.draws),
        "stability": inference.stability_rows(cells),
        "movement": movement_rows(used, mt_bench),
        "notes": notes,
        "missing": find_missing(runs, mt_bench, args),
    }
    for part in (accuracy, *mt_bench):  # what served the comparisons and is no result
        part.pop("values")
        for row in part["improvement"]:
            row.pop("cells")
    return comparison


def load_claims(args: argparse.Namespace) -> list[dict]:
    """The study's own claims, then the user's."""
    own = args.results_dir / "claims.json"
    path = args.claims or (own if own.is_file() else None)
    claims, more = read_claims(OWN_CLAIMS), read_claims(path) if path else []
    if twice := {claim["id"] for claim in claims} & {claim["id"] for claim in more}:
        raise UserError(f"{path}: the study's own claims have the ids {', '.join(sorted(twice))}; choose others")
    return claims + more


def measured_scores(accuracy: dict, judges: list[dict]) -> list[dict]:
    """What claims can be judged on: validation accuracy, and MT-Bench by each judge."""
    found = [
        {"metric": "mt_bench", "judge": judge_title(judge), "values": judge["values"], "smoke": smoke_mark(judge)}
        for judge in judges
    ]
    if any(accuracy["values"].values()):
        found.append({"metric": "acc_ref", "judge": None, "values": accuracy["values"], "smoke": ""})
    return found


def movement_rows(runs: list[dict], judges: list[dict]) -> list[dict]:
    """How far each run went from the reference, and what it got for it: KL of its own answers where they carry
    log-probs, the anchor 0.5 (a^2 + b^2) over the last tenth of the training steps, accuracy, and score by judge."""
    rows = []
    for run in runs:
        kl = run["kl"]
        last = run["steps"][-max(1, len(run["steps"]) // 10) :]
        anchors = [row["anchor"] for row in last if row.get("anchor") is not None]
        row = {
            "run_id": run["run_id"],
            **{key: run["args"][key] for key in ("beta", "tau", "seed")},
            "loss": run["loss"],
            "kl": kl and kl["kl"],
            "kl_se": kl and kl["kl_se"],
            "kl_per_token": kl and kl["kl_per_token"],
            "anchor": mean(anchors),
            "accuracy": run["summary"] and run["summary"]["best_acc_ref"],
        }
        for judge in judges:
            turns = judge["values"].get(run["run_id"], {})
            row[f"score, {judge_title(judge)}"] = mean(v for parts in turns.values() for v in parts.values())
        rows.append(row)
    return rows


# ---- what must be said --------------------------------------------------------------------------


def note_runs(runs: list[dict], cells: list[dict], notes: list[str]) -> None:
    for run in runs:
        if run["status"] == "diverged":
            steps = run["summary"]["nonfinite_steps"]
            count = f" ({steps} non-finite steps)" if steps else ""
            notes.append(f"diverged: {run['run_id']}{count}; counted, and the numbers it has are in the means")
        elif run["status"] == "unfinished":
            notes.append(f"unfinished, left out of the comparison: {run['run_id']} (no summary.json)")
        elif run["status"] not in ("finished", "untrained", "no training record"):
            notes.append(f"status of {run['run_id']} is {run['status']!r}; its numbers are averaged with the others")
    for run in runs:
        bad = sum(pair is None for pair in inference.best_pairs(run["val"], run["summary"]).values())
        if bad:
            notes.append(f"{run['run_id']}: {bad} validation pairs have a non-finite log-probability, counted as wrong")
    trained = [cell for cell in cells if cell["runs"][0]["args"]["loss"]]
    seeds = {seed for cell in trained for seed in cell_seeds(cell)}
    for cell in trained:
        if lacking := seeds - cell_seeds(cell):
            notes.append(
                f"unbalanced grid: {cell_columns(cell)['label']} has no seed {', '.join(map(str, sorted(lacking)))}"
            )


def cell_seeds(cell: dict) -> set[int]:
    return {run["args"]["seed"] for run in cell["runs"] if run["args"]["seed"] is not None}


def note_judge(judge: dict, judged: dict, questions: set, left_out: dict, notes: list[str]) -> None:
    name = judge_title(judge)
    if mark := smoke_mark(judge):
        notes.append(f"{name}: {mark}")
    elif judge["judge_params_b"] is None:
        notes.append(f"{name}: its size is not known; taken as {SMOKE_TEST_BELOW_B:g}B or more")
    if left_out:
        runs = sorted({run_id for lacking in left_out.values() for run_id in lacking})
        notes.append(
            f"{name}: compared on the {len(questions)} of {len(questions) + len(left_out)} questions that all runs "
            f"were judged on; left out {', '.join(map(str, left_out))} (lacking or partly judged in {', '.join(runs)})"
        )
    for run_id, rows in judged.items():
        if failed := Counter(str(row["status"]) for row in rows if row["status"] != "ok"):
            why = ", ".join(f"{status} {n}" for status, n in sorted(failed.items()))
            notes.append(f"{name}: {run_id}: {failed.total()} of {len(rows)} judgements have no score ({why})")
    served = {row["served_model"] for rows in judged.values() for row in rows} - {None}
    if len(served) > 1:
        notes.append(f"{name}: answered by different versions of the model: {', '.join(sorted(served))}")


def find_missing(runs: list[dict], judges: list[dict], args: argparse.Namespace) -> list[dict]:
    """What could not be done, of which runs, and what would supply it."""
    trained = [run for run in runs if run["args"]["loss"]]
    unfinished = [run for run in trained if run["status"] == "unfinished"]
    unrecorded = [run for run in trained if run["status"] == "no training record"]
    ended = [run for run in trained if run["summary"]]
    # A run that diverged before its first evaluation has no adapter: nothing to judge, no best evaluation.
    useless = [*unfinished, *(run for run in ended if run["summary"]["best_step"] is None)]
    usable = [run for run in runs if run not in useless]
    gaps = [
        ("accuracy (unfinished)", unfinished, "the same train_pref.py command again"),
        ("accuracy (no summary.json)", unrecorded, "train_pref.py"),
        ("learning curve (no metrics.jsonl)", [r for r in ended if not r["steps"] and not r["evals"]], "train_pref.py"),
        ("margins (no val_pairs.jsonl)", [r for r in ended if r in usable and not r["val"]], "train_pref.py"),
        ("MT-Bench (no judgements)", [r for r in usable if not r["judged"]], "gen_mtbench.py, then judge.py"),
    ]
    for judge in judges if len(judges) > 1 else ():
        key = tuple(judge[name] for name in ("judge", "prompts", "refs"))
        lacking = [run for run in usable if run["judged"] and key not in run["judged"]]
        gaps.append((f"MT-Bench by {judge_title(judge)}", lacking, f"judge.py --judge {judge['judge']}"))
    missing = [
        {"what": what, "runs": [r["run_id"] for r in found], "next": next_} for what, found, next_ in gaps if found
    ]
    if not any(run["pairs"] for run in runs):
        missing.append({"what": "win rates (no pairwise judgements)", "runs": [], "next": "judge.py --grading pair"})
    if not any(run["kl"] for run in usable):
        missing.append(
            {"what": "score against KL (no log-probs in answers)", "runs": [], "next": "gen_mtbench.py --kl"}
        )
    if len(trained) == len(runs):
        missing.append({"what": "the untrained model (run base)", "runs": [], "next": "gen_mtbench.py and judge.py"})
    for flag in ("baseline", "proposed"):
        if (loss := getattr(args, flag)) not in {run["loss"] for run in runs}:
            what = f"improvement of {args.proposed} over {args.baseline} (no run of {loss})"
            missing.append({"what": what, "runs": [], "next": f"train_pref.py --loss {loss}, or another --{flag}"})
    return missing


# ---- the stage ----------------------------------------------------------------------------------


def report_page(runs: list[dict], comparison: dict, tables: list, folder: Path, mt_bench: Path) -> dict:
    """What report.py lays out."""
    judges = [f"{judge_title(judge)} {smoke_mark(judge)}".strip() for judge in comparison["mt_bench"]]
    figures = sorted((folder / "figures").glob("comparison_*.png"), key=figure_order)
    return {
        "title": "Preference-optimisation study",
        "facts": [
            ["model", comparison["model"]],
            ["runs", ", ".join(f"{n} {word}" for word, n in sorted(Counter(r["status"] for r in runs).items()))],
            ["judges", "; ".join(judges) or "none"],
            ["baseline", comparison["baseline"]],
            ["data sha256", json.dumps(comparison["data_sha256"]) if comparison["data_sha256"] else None],
            ["intervals", f"95 %, {comparison['draws']:,} bootstrap draws over questions and seeds"],
        ],
        "verdicts": [verdict_texts(row) for row in comparison["claims"]],
        "notes": comparison["notes"],
        "missing": [missing_text(gap) for gap in comparison["missing"]],
        "tables": [table.page() for table in tables if table.id != "verdicts"],
        "figures": [{"title": figure_title(path), "png": path, "alt": figure_title(path)} for path in figures],
        "runs": [report_run(run) for run in runs],
        "questions": report_questions(runs, mt_bench),
        "answers": [
            {"run_id": run["run_id"], "question_id": question, "choice": choice, "turns": row["turns"]}
            for run in runs
            for (question, choice), row in run["answers"].items()
        ],
        "judgements": [
            {
                "run_id": run["run_id"],
                **{key: row[key] for key in REPORT_JUDGEMENT},
                "judge": judge_title(row).removeprefix("judge "),
            }
            for run in runs
            for row in [*(row for rows in run["judged"].values() for row in rows), *run["pairs"]]
        ],
    }


def report_run(run: dict) -> dict:
    summary = run["summary"] or {}
    numbers = {key: summary.get(key) for key in (*ACCURACIES, "best_step", "nonfinite_steps", "wall_s", "peak_gib")}
    for key, rows in run["judged"].items():
        judge = describe_judge(key, rows)
        mark = " (smoke test)" if judge["smoke_test"] else ""
        numbers[f"score, {judge_title(judge)}{mark}"] = score_ratings(rows)["score"]
    return {"run_id": run["run_id"], "status": run["status"], "arguments": run["args"], "numbers": numbers}


def report_questions(runs: list[dict], mt_bench: Path) -> dict[int, dict]:
    """Question texts where question.jsonl is at hand; of the others at least the category."""
    path = mt_bench / "question.jsonl"
    known = {row["question_id"]: row for row in read_questions(path)} if path.is_file() else {}
    found = {question: row.get("category") for run in runs for (question, _), row in run["answers"].items()}
    for run in runs:
        found |= {row["question_id"]: row["category"] for rows in run["judged"].values() for row in rows}
    return {
        question: {"category": category, "turns": known[question]["turns"] if question in known else None}
        for question, category in sorted(found.items())
    }


def missing_text(gap: dict) -> str:
    of = f" of {', '.join(gap['runs'])}" if gap["runs"] else ""
    return f"{gap['what']}{of}; next: {gap['next']}"


def print_summary(results_dir: Path, comparison: dict) -> None:
    statuses = Counter(run["status"] for run in comparison["runs"])
    print(f"\n{len(comparison['runs'])} runs: {', '.join(f'{n} {status}' for status, n in sorted(statuses.items()))}")
    for note in comparison["notes"]:
        print(f"  note: {note}")
    for gap in comparison["missing"]:
        print(f"  missing: {missing_text(gap)}")
    if not comparison["missing"]:
        print("  nothing is missing")
    folder = results_dir / "comparison"
    print(f"report: {folder / 'report.html'}")
    print(f"results: {folder / 'aggregated_metrics.json'}, {results_dir}/<run_id>/metrics.json")
    for name in ("tables", "figures"):
        if found := sorted({path.stem for path in (folder / name).glob("*.*")}):
            print(f"{name}: {folder / name}/ ({', '.join(found)})")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    notes: list[str] = []
    runs = load_runs(args.results_dir, args.run_ids, notes, args.skip_bad)
    comparison = compare(runs, args, notes)  # before anything is written: its errors must leave no half-new results
    print(f"{args.results_dir}: {len(runs)} runs; writing metrics, figures, tables and the report", flush=True)
    folder = args.results_dir / "comparison"
    for run in runs:
        write_json(run["path"] / "metrics.json", run_metrics(run))
    draw_all(runs, comparison, folder / "figures")
    tables = list_tables(comparison)
    write_tables(folder / "tables", tables)
    write_json(folder / "aggregated_metrics.json", comparison)
    write_report(folder / "report.html", report_page(runs, comparison, tables, folder, args.mt_bench))
    print_tables(comparison, args.proposed)
    print_summary(args.results_dir, comparison)


if __name__ == "__main__":
    run_main(main)
