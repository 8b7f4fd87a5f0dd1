"""what must be said, what is missing"""

import argparse
from collections import Counter

from pref.analysis import estimates, run_metrics
from pref.files import judgements


def note_runs(runs: list[dict], cells: list[dict], notes: list[str]) -> None:
    for run in runs:
        if run["status"] == "diverged":
            steps = run["summary"]["nonfinite_steps"]
            count = f" ({steps} non-finite steps)" if steps else ""
            notes.append(
                f"diverged: {run['run_id']}{count}; counted, and the numbers it has are in the means"
            )
        elif run["status"] == "unfinished":
            notes.append(
                f"unfinished, left out of the comparison: {run['run_id']} (no summary.json)"
            )
        elif run["status"] not in ("finished", "untrained", "no training record"):
            notes.append(
                f"status of {run['run_id']} is {run['status']!r}; its numbers are averaged with the others"
            )
    for run in runs:
        bad = sum(
            pair is None for pair in estimates.best_pairs(run["val"], run["summary"]).values()
        )
        if bad:
            notes.append(
                f"{run['run_id']}: {bad} validation pairs have a non-finite log-probability, counted as wrong"
            )
    trained = [cell for cell in cells if cell["runs"][0]["args"]["loss"]]
    seeds = {seed for cell in trained for seed in cell_seeds(cell)}
    for cell in trained:
        if lacking := seeds - cell_seeds(cell):
            notes.append(
                f"unbalanced grid: {cell['label']} has no seed {', '.join(map(str, sorted(lacking)))}"
            )


def cell_seeds(cell: dict) -> set[int]:
    return {run["args"]["seed"] for run in cell["runs"] if run["args"]["seed"] is not None}


def note_judge(judge: dict, judged: dict, questions: set, left_out: dict, notes: list[str]) -> None:
    name = run_metrics.judge_title(judge)
    if mark := run_metrics.smoke_mark(judge):
        notes.append(f"{name}: {mark}")
    elif judge["judge_params_b"] is None:
        notes.append(
            f"{name}: its size is not known; taken as {judgements.SMOKE_TEST_BELOW_B:g}B or more"
        )
    if left_out:
        runs = sorted({run_id for lacking in left_out.values() for run_id in lacking})
        notes.append(
            f"{name}: compared on the {len(questions)} of {len(questions) + len(left_out)} questions that all runs "
            f"were judged on; left out {', '.join(map(str, left_out))} (lacking or partly judged in {', '.join(runs)})"
        )
    for run_id, rows in judged.items():
        if failed := Counter(str(row["status"]) for row in rows if row["status"] != "ok"):
            why = ", ".join(f"{status} {n}" for status, n in sorted(failed.items()))
            notes.append(
                f"{name}: {run_id}: {failed.total()} of {len(rows)} judgements have no score ({why})"
            )
    served = {row["served_model"] for rows in judged.values() for row in rows} - {None}
    if len(served) > 1:
        notes.append(
            f"{name}: answered by different versions of the model: {', '.join(sorted(served))}"
        )


def find_missing(runs: list[dict], judges: list[dict], args: argparse.Namespace) -> list[dict]:
    """What could not be done, of which runs, and what would supply it."""
    trained = [run for run in runs if run["args"]["loss"]]
    unfinished = [run for run in trained if run["status"] == "unfinished"]
    unrecorded = [run for run in trained if run["status"] == "no training record"]
    ended = [run for run in trained if run["summary"]]
    # A run that diverged before its first evaluation has no adapter: nothing to judge, no best
    # evaluation.
    useless = [*unfinished, *(run for run in ended if run["summary"]["best_step"] is None)]
    usable = [run for run in runs if run not in useless]
    gaps = [
        ("accuracy (unfinished)", unfinished, "the same train_pref.py command again"),
        ("accuracy (no summary.json)", unrecorded, "train_pref.py"),
        (
            "learning curve (no metrics.jsonl)",
            [r for r in ended if not r["steps"] and not r["evals"]],
            "train_pref.py",
        ),
        (
            "margins (no val_pairs.jsonl)",
            [r for r in ended if r in usable and not r["val"]],
            "train_pref.py",
        ),
        (
            "MT-Bench (no judgements)",
            [r for r in usable if not r["judged"]],
            "gen_mtbench.py, then judge.py",
        ),
    ]
    for judge in judges if len(judges) > 1 else ():
        key = tuple(judge[name] for name in ("judge", "prompts", "refs"))
        lacking = [run for run in usable if run["judged"] and key not in run["judged"]]
        gaps.append(
            (
                f"MT-Bench by {run_metrics.judge_title(judge)}",
                lacking,
                f"judge.py --judge {judge['judge']}",
            )
        )
    missing = [
        {"what": what, "runs": [r["run_id"] for r in found], "next": next_}
        for what, found, next_ in gaps
        if found
    ]
    if not any(run["pairs"] for run in runs):
        missing.append(
            {
                "what": "win rates (no pairwise judgements)",
                "runs": [],
                "next": "judge.py --grading pair",
            }
        )
    if not any(run["kl"] for run in usable):
        missing.append(
            {
                "what": "score against KL (no log-probs in answers)",
                "runs": [],
                "next": "gen_mtbench.py --kl",
            }
        )
    if len(trained) == len(runs):
        missing.append(
            {
                "what": "the untrained model (run base)",
                "runs": [],
                "next": "gen_mtbench.py and judge.py",
            }
        )
    for flag in ("baseline", "proposed"):
        if (loss := getattr(args, flag)) not in {run["loss"] for run in runs}:
            what = f"improvement of {args.proposed} over {args.baseline} (no run of {loss})"
            missing.append(
                {
                    "what": what,
                    "runs": [],
                    "next": f"train_pref.py --loss {loss}, or another --{flag}",
                }
            )
    return missing


def missing_text(gap: dict) -> str:
    of = f" of {', '.join(gap['runs'])}" if gap["runs"] else ""
    return f"{gap['what']}{of}; next: {gap['next']}"
