"""Read a results folder: every run's files, checked, as `Run`s.

    results/<run_id>/args.json            required: without it a folder is not a run
                     summary.json         status, accuracies, cost of training
                     metrics.jsonl        learning curves
                     val_pairs.jsonl      log-probabilities of the validation pairs
                     <bench>/answers.jsonl, <bench>/judgements.csv
                     lm_eval/             results of lm-evaluation-harness
    results/judges/<judge>/validation.json    how well a judge agrees with human votes

Whatever else is missing leaves a field of `Run` empty. Whatever is there but unreadable raises a
UserError that names file and line: a number that is silently dropped would change a mean.
"""

import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from pref.analysis import (
    judge_identity,
    judge_validation,
    lm_eval_files,
    provenance,
    row_checks,
    run_metrics,
)
from pref.analysis.bench_data import AllData
from pref.analysis.runs import (
    ACCURACIES,
    LATER_OPTIONS,
    MT_BENCH,
    SUMMARY_KEYS,
    BenchFiles,
    Margins,
    Run,
)
from pref.files import disk, judgements, mt_bench, run_folders
from pref.files.benchmarks import TRAIN_SET
from pref.files.console import UserError

# Arguments that do not make another cell. Any other argument that differs does: a setting that
# nobody thought of must not pass for a seed.
NOT_SETTINGS = {
    # They have fields of their own, or are checked on their own.
    *("run_id", "loss", "beta", "tau", "seed", "mode", "model", "data", "data_sha256"),
    # Paths, and how it was started; where a file matters, its hash is another argument.
    *("results_dir", "command", "starts", "versions", "git", "loss_file", "init_adapter"),
    "model_sha256",  # older runs lack it; base_sha256 is a setting
    # How the same numbers are computed.
    *("reference", "per_device_batch", "world_size", "shard", "checkpointing", "compile"),
    *("tokens_per_microbatch", "prefix_sharing", "packing", "save_steps", "couples_batch"),
    # What was planned or counted.
    *("planned_gib", "planned_steps", "truncated_prompts", "truncated_responses", "eval_every"),
    *("merged_boundaries", "dropped_pairs", "template_date", "template_thoughts"),
}
CURVE_KEYS = (
    *("loss", "rewards/accuracies", "margin/rho", "margin/delta", "grad_norm", "lr", "anchor"),
    *("eval/loss", "eval/acc_ref", "eval/acc_sum", "eval/acc_mean"),
    *("eval/margin/rho", "eval/margin/delta"),
)
JUDGED_ONCE = ("grading", "baseline", "order", "question_id", "turn", "choice", "repeat")
VAL_KEYS = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")


def load_runs(
    results_dir: Path,
    run_ids: list[str] | None = None,
    skip_bad: bool = False,
    data: AllData | None = None,
) -> tuple[list[Run], list[str]]:
    """Read the full runs of `results_dir`, or those in `run_ids`; trial runs if all of them are.

    Returns (runs, notes). The notes name what was left out: trial runs and, with `skip_bad`, runs
    whose files cannot be read. What does not belong together is taken out of the runs, which name
    it themselves (`Run.stale`). data: by benchmark, with the questions as they are asked now.
    Raises UserError, one line per run, for unreadable files without `skip_bad`, for an unknown run
    id, and for runs of different models or data.
    """
    # 1) Which runs: the full ones, or trial runs where there is nothing else.
    found: dict[str, list[tuple[Path, dict]]] = {"full": [], "trial": []}
    bad = []
    for path in choose_folders(results_dir, run_ids):
        try:
            args = read_args(path / "args.json")
            found[args["mode"]].append((path, args))
        except UserError as error:
            bad.append(str(error))
    # The untrained model has no mode of its own.
    trained = any(args["loss"] is not None for _, args in found["full"])
    chosen = found["full"] if trained else found["full"] + found["trial"]
    trial = [path.name for path, _ in found["trial"]] if trained else []

    # 2) Their files.
    runs = []
    for path, args in chosen:
        try:
            runs.append(load_run(path, args))
        except UserError as error:
            bad.append(str(error))
    if bad and not (skip_bad and runs):
        raise UserError("\n       ".join(bad) + "; or leave out what cannot be read: --skip_bad")
    notes = [f"left out, cannot be read: {error}" for error in bad]
    notes += note_train_sets([run.path for run in runs])
    if trial:
        notes.append(
            f"left out, trial runs (they test the path, not the method): {', '.join(trial)}"
        )

    # 3) What of them belongs together.
    check_same_model_and_data(runs)
    validations = judge_validation.read_validations(results_dir)
    for bench in provenance.bench_names(runs):
        rows = [row for run in runs for row in run.bench(bench).judgements()]
        judge_identity.add_titles(rows)
        judge_validation.add_validations(rows, validations)
    return provenance.keep_what_belongs(runs, data or {}), notes


def choose_folders(results_dir: Path, run_ids: list[str] | None) -> list[Path]:
    """Run folders of `results_dir`, the untrained model first; those in `run_ids` if given."""
    if (results_dir / "args.json").is_file():
        raise UserError(
            f"{results_dir}: is one run; give the results folder above it and choose with --run_ids"
        )
    paths = {path.name: path for path in run_folders.find_runs([results_dir], check=False)}
    if unknown := sorted(set(run_ids or ()) - set(paths)):
        raise UserError(
            f"--run_ids: no {', '.join(unknown)} in {results_dir}; there are {', '.join(paths)}"
        )
    return [path for name, path in paths.items() if run_ids is None or name in run_ids]


def load_run(path: Path, args: dict) -> Run:
    """Read the files of one run folder; `args` are those of `read_args`."""
    summary = read_summary(path / "summary.json")
    steps, evals = read_metrics(path / "metrics.jsonl", is_growing=summary is None)
    val, length_differences = read_val_pairs(path / "val_pairs.jsonl")
    run = Run(
        run_id=path.name,
        path=path,
        loss=args["loss"] or path.name,
        args=args,
        settings={
            key: hashable(value) for key, value in args.items() if is_setting(key, value, args)
        },
        status=run_status(args, summary, has_metrics=bool(steps or evals)),
        summary=summary,
        steps=steps,
        evals=evals,
        val=val,
        benches={name: load_bench(path / name, path.name) for name in find_benches(path)},
        imported=lm_eval_files.read_run(path, path.name, args),
    )
    run = provenance.check_training(run)
    return replace(run, length_bias=run_metrics.length_bias(run.best_val, length_differences))


def read_args(path: Path) -> dict:
    """args.json, checked; beta, tau and seed are there, each a finite number or None."""
    args = {key: writable(value) for key, value in disk.read_json(path).items()}
    for key in ("loss", "model", "mode"):
        is_untrained = key == "loss" and args.get("loss", "") is None
        if not isinstance(args.get(key), str) and not is_untrained:
            raise UserError(
                f"{path}: {key!r} must be text, found {args.get(key)!r}; "
                "was it written by train_pref.py?"
            )
    if args["mode"] not in ("full", "trial"):
        raise UserError(f"{path}: mode {args['mode']!r} must be full or trial")
    if (tune := run_folders.tune_of(args)) not in run_folders.WEIGHTS:
        known = " or ".join(run_folders.WEIGHTS)
        raise UserError(f"{path}: tune {tune!r} must be {known}")
    for name in (path.parent.name, args.get("run_id", path.parent.name)):
        run_folders.check_run_id(str(name), path)
    numbers = {key: read_number(args, key, path) for key in ("beta", "tau", "seed")}
    if lost := [key for key, number in numbers.items() if number is None and args.get(key)]:
        raise UserError(f"{path}: {lost[0]!r} must be a finite number or null")
    return args | numbers


def is_setting(key: str, value, args: dict) -> bool:
    """Whether a run that differs in argument `key` belongs to another cell."""
    if key in ("per_device_batch", "world_size") and args.get("couples_batch"):
        return True  # the value of such a loss depends on how its batches are cut
    if key in LATER_OPTIONS and value in (None, LATER_OPTIONS[key]):
        return False
    if key == "init_adapter_sha256" and (args.get("round") or 1) > 1:
        return False  # each seed goes on from its own
    return key not in NOT_SETTINGS


def hashable(value):
    """A list or an object as JSON text, so that settings can be compared in sets."""
    return json.dumps(value, sort_keys=True) if isinstance(value, list | dict) else value


def writable(value):
    """Text without lone surrogates, which UTF-8 has no bytes for; other values as they are."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def read_number(row: dict, key: str, place: str | Path) -> float | None:
    """The number in `row[key]`; None for null, for a missing key, and for NaN or inf.

    Raises UserError for any other value.
    """
    value = row.get(key)
    if value is None:
        return None
    if not disk.is_number(value):
        raise UserError(f"{place}: {key!r} must be a number or null, found {value!r}")
    return value if math.isfinite(value) else None


def read_step(row: dict, place: str) -> float:
    if (step := read_number(row, "step", place)) is None:
        raise UserError(f"{place}: no 'step'; rerun train_pref.py")
    return step


def read_summary(path: Path) -> dict | None:
    """`status` and SUMMARY_KEYS of summary.json; None if there is no such file."""
    if not path.exists():
        return None
    summary = disk.read_json(path)
    if not isinstance(summary.get("status"), str):
        raise UserError(f"{path}: no 'status'; delete the file and rerun train_pref.py")
    numbers = {key: read_number(summary, key, path) for key in SUMMARY_KEYS}
    for key in ACCURACIES:
        if numbers[key] is not None and not 0 <= numbers[key] <= 1:
            raise UserError(f"{path}: {key!r} {numbers[key]:g} is no share of pairs (0 to 1)")
    for key in ("best_step", "steps", "nonfinite_steps"):
        if (number := numbers[key]) is not None:
            if number < 0 or number != int(number) or number > 1e15:
                raise UserError(f"{path}: {key!r} {number:g} is no number of steps")
            numbers[key] = int(number)
    return {"status": summary["status"]} | numbers


def run_status(args: dict, summary: dict | None, has_metrics: bool) -> str:
    if summary:
        return summary["status"]
    if args["loss"] is None:
        return "untrained"
    return "unfinished" if has_metrics else "no training record"


def read_metrics(path: Path, is_growing: bool = False) -> tuple[list[dict], list[dict]]:
    """Optimiser steps and evaluations of metrics.jsonl, each in order of step; empty lists if there
    is no such file.

    is_growing: the run has not ended. Then a last line without its end is one that is being
    written, or was when the run was killed: it does not count yet.
    """
    steps, evals = {}, {}
    for line, row in disk.read_jsonl(path, skip_torn_end=is_growing) if path.exists() else ():
        place = f"{path}:{line}"
        step = read_step(row, place)
        records = evals if any(key.startswith("eval/") for key in row) else steps
        # A resumed run repeats the steps after its checkpoint: the later record of a step counts.
        records[step] = {"step": step} | {
            key: read_number(row, key, place) for key in CURVE_KEYS if key in row
        }
    return [steps[step] for step in sorted(steps)], [evals[step] for step in sorted(evals)]


def read_val_pairs(
    path: Path,
) -> tuple[dict[float, dict[str, Margins | None]], dict[str, float]]:
    """Margins and length differences of val_pairs.jsonl; empty dicts if there is no such file.

    Returns
    -------
    margins : step -> pair id -> Margins, or None for a pair with a non-finite log-probability
    length_differences : pair id -> tokens of the chosen response less those of the rejected one,
        for pairs whose lengths the file has
    """
    margins: dict[float, dict] = defaultdict(dict)
    length_differences = {}
    for line, row in disk.read_jsonl(path) if path.exists() else ():
        place = f"{path}:{line}"
        if missing := [key for key in ("id", "step", *VAL_KEYS) if key not in row]:
            raise UserError(
                f"{place}: no {', '.join(missing)}; rerun train_pref.py to write the file again"
            )
        step, pair_id = read_step(row, place), str(row["id"])
        if pair_id in margins[step]:
            raise UserError(
                f"{place}: pair {pair_id} appears twice at step {step}; rerun train_pref.py"
            )
        logps = {key: read_number(row, key, place) for key in VAL_KEYS}
        margins[step][pair_id] = None if None in logps.values() else pair_margins(**logps)
        n_chosen, n_rejected = (
            read_number(row, key, place) for key in ("len_chosen", "len_rejected")
        )
        if n_chosen is not None and n_rejected is not None:
            length_differences[pair_id] = n_chosen - n_rejected
    return dict(margins), length_differences


def pair_margins(
    policy_chosen: float, policy_rejected: float, ref_chosen: float, ref_rejected: float
) -> Margins:
    return Margins(
        rho=(policy_chosen - ref_chosen) - (policy_rejected - ref_rejected),
        delta=policy_chosen - policy_rejected,
    )


def find_benches(run: Path) -> list[str]:
    """The benchmarks of which a run folder has answers or judgements. A task's train questions are
    none: pairs are made from the answers to them, and a score on them compares nothing.
    """
    return sorted(name for name in find_sets(run) if not name.endswith(TRAIN_SET))


def find_sets(run: Path) -> set[str]:
    """The sets of questions of which a run folder has answers or judgements."""
    files = [*run.glob("*/answers.jsonl"), *run.glob("*/judgements.csv")]
    return {file.parent.name for file in files}


def note_train_sets(paths: list[Path]) -> list[str]:
    """Names the sets that are read as train questions, and so not compared."""
    names = {name for path in paths for name in find_sets(path) if name.endswith(TRAIN_SET)}
    return [
        f"not compared: answers to {name}, the questions that pairs are made from (a benchmark's "
        f"name must not end in {TRAIN_SET})"
        for name in sorted(names)
    ]


def load_bench(folder: Path, run_id: str) -> BenchFiles:
    """Answers and judgements of one benchmark; each may be missing."""
    answers = read_answers(folder / "answers.jsonl", 2 if folder.name == MT_BENCH else None)
    files = load_judgements(folder / "judgements.csv", run_id)
    return replace(files, answers=answers, kl=run_metrics.run_kl(answers))


def read_answers(path: Path, turns: int | None) -> dict[mt_bench.AnswerKey, dict]:
    """Answers by question and choice; empty if there is no such file. Their hashes are text."""
    answers = mt_bench.read_answers(path, turns) if path.exists() else {}
    for key, row in answers.items():
        for name in ("adapter_sha256", "question_sha256"):
            if not isinstance(row.get(name), str | None):
                raise UserError(
                    f"{path}: question {key.question_id}: {name!r} must be text or null; "
                    "rerun gen_mtbench.py"
                )
    return answers


def load_judgements(path: Path, run_id: str) -> BenchFiles:
    """judgements.csv: ratings by judge, comparisons, and rewards; empty if there is no such file.

    Raises UserError for a judgement that appears twice, and for one that is none.
    """
    if not path.exists():
        return BenchFiles()
    judged, pairs, rewards, seen = defaultdict(list), [], [], set()
    for row in judgements.read_judgements(path):
        row_checks.check_judgement(row, path, run_id)
        judge = judge_identity.key_of(row)
        key = (judge, *(row[name] for name in JUDGED_ONCE))
        if key in seen:
            raise UserError(
                f"{path}: question {row['question_id']}, turn {row['turn']}, "
                f"choice {row['choice']}, repeat {row['repeat']} is judged twice by "
                f"{row['judge']}; rerun judge.py to write the file again"
            )
        seen.add(key)
        if row["grading"] == "single":
            judged[judge].append(row)
        else:
            (pairs if row["grading"] == "pair" else rewards).append(row)
    return BenchFiles(judged=dict(judged), pairs=pairs, rewards=rewards)


def check_same_model_and_data(runs: list[Run]) -> None:
    """Raise UserError, listing the groups, if runs are of different models or different data. Runs
    of later rounds have data of their own, made from answers: they are compared by their answers.
    """
    # A model is known by the hash of its files, wherever they are; of older runs, by its path.
    hashes = {run.args["model"]: sha for run in runs if (sha := run.args.get("model_sha256"))}
    paths: dict[str, str] = {}  # by model, for the message
    groups: dict[tuple, list[str]] = {}  # (model, hash of the data as JSON) -> run ids

    def data_of(run: Run):
        return run.args.get("data_sha256") if run.round == 1 else None

    for run in sorted(runs, key=lambda run: data_of(run) is None):
        path, data = run.args["model"], data_of(run)
        model = run.args.get("model_sha256") or hashes.get(path, path)
        paths[model] = path
        key = (model, json.dumps(data, sort_keys=True))
        if data is None:
            # The untrained model, say, has seen no data: it belongs with the runs trained from it,
            # which the sorting has put first.
            key = next((known for known in groups if known[0] == model), key)
        groups.setdefault(key, []).append(run.run_id)
    if len(groups) > 1:
        listed = [
            f"\n  model {paths[model]}, data {data[:60]}: {json.dumps(ids)}"
            for (model, data), ids in groups.items()
        ]
        raise UserError(
            f"runs of {len(groups)} groups with different model or data, which cannot be compared; "
            f"give one of these lists as --run_ids:{''.join(listed)}"
        )
