"""Turn a results folder into verdicts, tables, figures and a report. Trains, generates and judges
nothing.

Reads   results/<run_id>/{args.json, summary.json, metrics.jsonl, val_pairs.jsonl,
mt_bench/{answers.jsonl,
        judgements.csv}}, results/claims.json if it is there, and question.jsonl for the report's
        answer browser
Writes  results/<run_id>/metrics.json and results/<run_id>/figures/<run_id>_learning_curve.{pdf,png}
        results/comparison/{report.html, aggregated_metrics.json, tables/*.{csv,md,tex},
        figures/*.{pdf,png}}

    python analyze.py results/
    python analyze.py results/ --run_ids '["base", "dpo_b0.05_s42", "td_dpo_b0.05_t1_s42"]'

It works with whatever part is there and says what it could not do. Runs that share loss, beta, tau
and every other setting are one cell of the grid; a cell's number is the mean over its seeds. Never
averaged together: trial runs with full ones, one judge with another, other questions, another
model, other data.

What a difference means: error over questions and over seeds both count (stats.py says how;
bench/calibration.py, how often that errs). Claims and their verdicts: claims.py and claims.json.
"""

import argparse
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from pref.analysis import (
    estimates,
    paper_tables,
    report,
    results_folder,
    run_metrics,
    stats,
    table_files,
    terminal,
    texts,
)
from pref.analysis.claims import OWN_CLAIMS, judge_claims, read_claims
from pref.analysis.figures import draw_all, figure_order, figure_title
from pref.analysis.notes import find_missing, missing_text, note_judge, note_runs
from pref.files import console, disk
from pref.files.console import UserError
from pref.files.mt_bench import read_questions

ACCURACY_COLUMNS = (*results_folder.ACCURACIES, "margin_rho_first", "margin_rho_best")
COMPARISONS = ("best of grid", "matched beta", "best baseline", "untrained model")
REPORT_JUDGEMENT = (
    "question_id",
    "turn",
    "choice",
    "repeat",
    "judge",
    "grading",
    "score",
    "winner",
    "baseline",
    "order",
    "status",
    "judgement",
)
SCORE_COLUMNS = ("score", "turn_1", "turn_2", "score_without_wrong_references")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results_dir", type=Path, help="results folder: a folder of run folders")
    parser.add_argument(
        "--run_ids", help='use these runs alone, a JSON list: \'["base", "dpo_b0.05_s42"]\''
    )
    parser.add_argument(
        "--baseline", default="dpo", help="loss that improvement is measured from (default: dpo)"
    )
    parser.add_argument(
        "--proposed", default="td_dpo", help="loss whose improvement is printed (default: td_dpo)"
    )
    parser.add_argument(
        "--claims",
        type=Path,
        help="JSON file of further claims to judge (default: RESULTS_DIR/claims.json, if there)",
    )
    parser.add_argument(
        "--mt_bench",
        type=Path,
        default=Path("data/mt_bench"),
        help="folder with question.jsonl, whose text the report shows (default: data/mt_bench, if there)",
    )
    parser.add_argument(
        "--draws", type=int, default=stats.DRAWS, help="bootstrap draws (default: %(default)s)"
    )
    parser.add_argument(
        "--skip_bad",
        action="store_true",
        help="leave out, by name, runs whose files cannot be read",
    )
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
    if run_ids is None or (
        isinstance(run_ids, list) and run_ids and all(isinstance(r, str) for r in run_ids)
    ):
        return run_ids
    raise UserError(
        f'--run_ids {text}: expected a JSON list of run ids in quotes, such as \'["base", "dpo_b0.1_s42"]\''
    )


def make_cells(runs: list[dict]) -> list[dict]:
    """Group runs by loss, beta, tau and every other setting: what is left inside a cell is its
    seeds.
    """
    differing, cells = differing_settings(runs), {}
    for run in runs:
        settings = {key: run["settings"].get(key) for key in differing[run["loss"]]}
        key = (run["loss"], run["args"]["beta"], run["args"]["tau"], json.dumps(settings))
        cell = cells.setdefault(
            key, {"loss": key[0], "beta": key[1], "tau": key[2], "settings": settings, "runs": []}
        )
        if twin := next(
            (other for other in cell["runs"] if other["args"]["seed"] == run["args"]["seed"]), None
        ):
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
    return {
        loss: sorted(key for key in keys if len(keys[key]) > 1) for loss, keys in values.items()
    }


def cell_order(cell: dict) -> tuple:
    untrained = cell["runs"][0]["args"]["loss"] is None
    values = [(value is not None, value or 0) for value in (cell["beta"], cell["tau"])]
    return (not untrained, cell["loss"], *values, json.dumps(cell["settings"]))


def cell_columns(cell: dict) -> dict:
    settings = " ".join(f"{key}={texts.show(value)}" for key, value in cell["settings"].items())
    values = [
        f"{letter}={cell[key]:g}"
        for key, letter in (("beta", "β"), ("tau", "τ"))
        if cell[key] is not None
    ]
    return {
        "label": " ".join([cell["loss"], *values, *([settings] if settings else [])]),
        "untrained": cell["runs"][0]["args"]["loss"] is None,
        **{key: cell[key] for key in ("loss", "beta", "tau")},
        "settings": settings or None,
    }


def cell_row(cell: dict, values: dict[str, dict], names: tuple[str, ...], se: str) -> dict | None:
    """One row of a table: mean, SD and count over seeds of each name; `se` is kept where there is
    one seed alone.

    values: run_id -> name -> number or None. None if no run of the cell has values and none
    diverged. A diverged run's numbers are in the means, and a cell that only diverged keeps its
    row: without them the loss looks better.
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
        numbers = [
            values[run["run_id"]][name] for run in found if values[run["run_id"]][name] is not None
        ]
        row |= {
            name: run_metrics.mean(numbers),
            f"{name}_sd": run_metrics.sd(numbers),
            f"{name}_n": len(numbers),
        }
    return row | {se: values[with_value[0]["run_id"]][se] if len(with_value) == 1 else None}


def compare_accuracy(cells: list[dict], args: argparse.Namespace) -> dict:
    numbers = {
        run["run_id"]: accuracy_numbers(run)
        for cell in cells
        for run in cell["runs"]
        if run["summary"]
    }
    values = {
        run["run_id"]: estimates.accuracy_values(run) for cell in cells for run in cell["runs"]
    }
    rows = [cell_row(cell, numbers, ACCURACY_COLUMNS, "se_over_pairs") for cell in cells]
    for cell, row in zip(cells, rows):
        cell["accuracy"] = row and row["best_acc_ref"]
    compared = compare_scores(cells, rows, "best_acc_ref", numbers, values, args)
    for row in compared["improvement"]:
        row["mcnemar"] = (
            estimates.mcnemar_rows(*row["cells"], values)
            if row["comparison"] == "best of grid"
            else []
        )
    return {"values": values, **compared}


def accuracy_numbers(run: dict) -> dict:
    margins = run_metrics.run_margins(run)
    rho = {
        f"margin_rho_{name}": margins[name]["rho"]["mean"] if margins else None
        for name in ("first", "best")
    }
    return run_metrics.run_accuracy(run) | rho


def compare_mt_bench(
    key: tuple,
    cells: list[dict],
    answers: dict[str, dict],
    args: argparse.Namespace,
    notes: list[str],
) -> dict:
    """MT-Bench by one judge over the questions that every run was judged on, so that no run has an
    easier exam.
    """
    judged = {
        run["run_id"]: run["judged"][key]
        for cell in cells
        for run in cell["runs"]
        if key in run["judged"]
    }
    judge = run_metrics.describe_judge(key, [row for rows in judged.values() for row in rows])
    questions, left_out = common_questions(judged)
    note_judge(judge, judged, questions, left_out, notes)
    kept = {
        run_id: [row for row in rows if row["question_id"] in questions]
        for run_id, rows in judged.items()
    }
    scores = {run_id: run_metrics.score_ratings(rows) for run_id, rows in kept.items()}
    values = {
        run_id: estimates.rating_values(run_metrics.turn_means(rows))
        for run_id, rows in kept.items()
    }
    rows = [mt_bench_row(cell, scores) for cell in cells]
    reliability = estimates.judge_rows(kept, answers)
    return judge | {
        "values": values,
        "questions": sorted(questions),
        "questions_left_out": sorted(left_out),
        "categories": [row for cell in cells for row in category_rows(cell, scores)],
        **compare_scores(cells, rows, "score", scores, values, args),
        **reliability,
        "variance": estimates.variance_rows(cells, values, reliability["retest"]),
    }


def compare_scores(
    cells: list[dict],
    rows: list,
    metric: str,
    numbers: dict,
    values: dict,
    args: argparse.Namespace,
) -> dict:
    """What accuracy and MT-Bench have in common: cells with intervals, differences, selection,
    spread over beta.

    numbers: run_id -> name -> number, of whole runs; values: by question or pair, for estimates.
    """
    for cell, row in zip(cells, rows):
        if row:
            row["low"], row["high"] = estimates.cell_interval(cell, row["runs"], values, args.draws)
    runs = [run for cell in cells for run in cell["runs"]]
    return {
        "cells": [row for row in rows if row],
        "runs": [
            {"run_id": run["run_id"], "loss": run["loss"], "value": numbers[run["run_id"]][metric]}
            for run in runs
            if numbers.get(run["run_id"], {}).get(metric) is not None
        ],
        "improvement": improvement_rows(cells, rows, metric, values, args),
        "selection": estimates.selection_rows(cells, rows, metric, args.baseline),
        "spread": estimates.spread_rows(cells, values, args.baseline, args.draws),
    }


def common_questions(judged: dict[str, list[dict]]) -> tuple[set[int], dict[int, list[str]]]:
    """Questions judged in every run on the same turns, and for each other one the runs that lack it
    or a turn.

    A question whose judgement failed is judged: were it not, 1 % of failures in 40 runs would leave
    few questions.
    """
    turns = {run_id: defaultdict(set) for run_id in judged}
    union = defaultdict(set)
    for run_id, rows in judged.items():
        for row in rows:
            turns[run_id][row["question_id"]].add(row["turn"])
            union[row["question_id"]].add(row["turn"])
    lacking = {
        q: [run_id for run_id in judged if turns[run_id][q] != union[q]] for q in sorted(union)
    }
    return {q for q, runs in lacking.items() if not runs}, {
        q: runs for q, runs in lacking.items() if runs
    }


def mt_bench_row(cell: dict, scores: dict[str, dict]) -> dict | None:
    row = cell_row(cell, scores, SCORE_COLUMNS, "se_over_questions")
    return row and row | sum_counts(
        scores[run["run_id"]] for run in cell["runs"] if run["run_id"] in scores
    )


def category_rows(cell: dict, scores: dict[str, dict]) -> list[dict]:
    mine = [scores[run["run_id"]]["categories"] for run in cell["runs"] if run["run_id"] in scores]
    rows = []
    for name in dict.fromkeys(name for categories in mine for name in categories):
        found = [categories[name] for categories in mine if name in categories]
        numbers = [category["score"] for category in found if category["score"] is not None]
        row = {
            "category": name,
            "score": run_metrics.mean(numbers),
            "score_sd": run_metrics.sd(numbers),
            "n_seeds": len(numbers),
        }
        rows.append(cell_columns(cell) | row | sum_counts(found))
    return rows


def sum_counts(scored: Iterable[dict]) -> dict:
    scored = list(scored)
    return {key: sum(one[key] for one in scored) for key in ("n_scored", "n_judged")}


def improvement_rows(
    cells: list[dict], rows: list, metric: str, values: dict, args: argparse.Namespace
) -> list[dict]:
    """Every loss against the baseline: its best cell against the baseline's best (the headline),
    each of its cells against the baseline at its own beta and against the baseline's best; and
    every loss's best against the untrained model. A best cell is chosen by validation accuracy
    where that is known for all of the loss's cells (METHODS.md 5); chosen by the score itself, the
    maximum flatters the larger grid.

    p_adjusted: Holm over the headline, Benjamini and Hochberg over the cells of each other
    comparison.
    """
    by_loss: dict[str, list[tuple]] = defaultdict(list)
    for cell, row in zip(cells, rows):
        if row and row[metric] is not None:
            by_loss[cell["loss"]].append((cell, row))
    untrained = [pairs[0] for pairs in by_loss.values() if estimates.is_untrained(pairs[0][0])]
    trained = {
        loss: pairs for loss, pairs in by_loss.items() if not estimates.is_untrained(pairs[0][0])
    }
    best = {loss: pick_best(pairs, metric) for loss, pairs in trained.items()}
    theirs = trained.get(args.baseline, [])
    found = []

    def add(kind: str, one: tuple, other: tuple, selected_by: str | None) -> None:
        row = improvement(kind, one, other, metric) | {"selected_by": selected_by}
        compared = estimates.compare_cells(one[0], other[0], values, args.draws)
        row |= estimates.comparison_columns(compared) | {"cells": (one[0], other[0])}
        # Of the same runs and units as interval and test: seeds or ratings may lack in one of the
        # two
        if compared:
            row |= {"difference": row["estimate"], "improvement_rate": row["rate"]}
        labels = row["proposed"], row["baseline"]
        row["sensitivity"] = (
            estimates.sensitivity_rows(*labels, compared)
            if compared and kind == "best of grid"
            else []
        )
        counts = {
            "proposed_cells": len(trained[one[0]["loss"]]),
            "baseline_cells": len(by_loss[other[0]["loss"]]),
        }
        found.append(row | counts)

    for loss, pairs in trained.items():
        ours, how = best[loss]
        for other in untrained:
            add("untrained model", ours, other, how)
        if loss == args.baseline or not theirs:
            continue
        best_theirs, how_theirs = best[args.baseline]
        add(
            "best of grid",
            ours,
            best_theirs,
            how if how == how_theirs else f"proposed: {how}; baseline: {how_theirs}",
        )
        for one in pairs:
            for other in matched(one, theirs):
                add("matched beta", one, other, None)
            add("best baseline", one, best_theirs, how_theirs)
    for kind in COMPARISONS:
        same = [row for row in found if row["comparison"] == kind]
        adjust = stats.holm if kind == "best of grid" else stats.benjamini_hochberg
        for row, p in zip(
            same, adjust([math.nan if row["p"] is None else row["p"] for row in same])
        ):
            row["p_adjusted"] = estimates.known(p)
    return sorted(found, key=lambda row: COMPARISONS.index(row["comparison"]))


def pick_best(pairs: list[tuple], metric: str) -> tuple[tuple, str]:
    if all(cell.get("accuracy") is not None for cell, _ in pairs) and metric != "best_acc_ref":
        return max(pairs, key=lambda pair: pair[0]["accuracy"]), "validation accuracy"
    return max(pairs, key=lambda pair: pair[1][metric]), "the score itself"


def matched(ours: tuple, theirs: list[tuple]) -> list[tuple]:
    """Baseline cells of the same beta; of several, those that differ from ours in the fewest other
    settings.
    """
    same = [pair for pair in theirs if pair[0]["beta"] == ours[0]["beta"]]
    nearest = estimates.nearest(ours[0], [cell for cell, _ in same])
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
        "differs_in": estimates.differences_text(ours[0], theirs[0]),
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
        notes.append(
            f"{len(judges)} judges or judge settings: each has tables of its own, never averaged"
        )
    mt_bench = [compare_mt_bench(key, cells, answers, args, notes) for key in judges]
    model = runs[0]["args"]["model"]
    comparison = {
        "model": model,
        "data_sha256": next(
            (run["args"]["data_sha256"] for run in runs if run["args"].get("data_sha256")), None
        ),
        "baseline": args.baseline,
        "proposed": args.proposed,
        "draws": args.draws,
        "runs": [{key: run[key] for key in ("run_id", "status")} for run in runs],
        "unfinished": unfinished,
        "diverged": [run["run_id"] for run in runs if run["status"] == "diverged"],
        "claims": judge_claims(
            load_claims(args), cells, measured_scores(accuracy, mt_bench), model, args.draws
        ),
        "accuracy": accuracy,
        "mt_bench": mt_bench,
        "pairs": estimates.win_rows(cells, args.draws),
        "stability": estimates.stability_rows(cells),
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
        raise UserError(
            f"{path}: the study's own claims have the ids {', '.join(sorted(twice))}; choose others"
        )
    return claims + more


def measured_scores(accuracy: dict, judges: list[dict]) -> list[dict]:
    """What claims can be judged on: validation accuracy, and MT-Bench by each judge."""
    found = [
        {
            "metric": "mt_bench",
            "judge": run_metrics.judge_title(judge),
            "values": judge["values"],
            "smoke": run_metrics.smoke_mark(judge),
        }
        for judge in judges
    ]
    if any(accuracy["values"].values()):
        found.append(
            {"metric": "acc_ref", "judge": None, "values": accuracy["values"], "smoke": ""}
        )
    return found


def movement_rows(runs: list[dict], judges: list[dict]) -> list[dict]:
    """How far each run went from the reference, and what it got for it: KL of its own answers where
    they carry log-probs, the anchor 0.5 (a^2 + b^2) over the last tenth of the training steps,
    accuracy, and score by judge.
    """
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
            "anchor": run_metrics.mean(anchors),
            "accuracy": run["summary"] and run["summary"]["best_acc_ref"],
        }
        for judge in judges:
            turns = judge["values"].get(run["run_id"], {})
            row[f"score, {run_metrics.judge_title(judge)}"] = run_metrics.mean(
                v for parts in turns.values() for v in parts.values()
            )
        rows.append(row)
    return rows


def report_page(
    runs: list[dict], comparison: dict, tables: list, folder: Path, mt_bench: Path
) -> dict:
    """What report.py lays out."""
    judges = [
        f"{run_metrics.judge_title(judge)} {run_metrics.smoke_mark(judge)}".strip()
        for judge in comparison["mt_bench"]
    ]
    figures = sorted((folder / "figures").glob("comparison_*.png"), key=figure_order)
    return {
        "title": "Preference-optimisation study",
        "facts": [
            ["model", comparison["model"]],
            [
                "runs",
                ", ".join(
                    f"{n} {word}" for word, n in sorted(Counter(r["status"] for r in runs).items())
                ),
            ],
            ["judges", "; ".join(judges) or "none"],
            ["baseline", comparison["baseline"]],
            [
                "data sha256",
                json.dumps(comparison["data_sha256"]) if comparison["data_sha256"] else None,
            ],
            [
                "intervals",
                f"95 %, {comparison['draws']:,} bootstrap draws over questions and seeds",
            ],
        ],
        "verdicts": [texts.verdict_texts(row) for row in comparison["claims"]],
        "notes": comparison["notes"],
        "missing": [missing_text(gap) for gap in comparison["missing"]],
        "tables": [table.page() for table in tables if table.id != "verdicts"],
        "figures": [
            {"title": figure_title(path), "png": path, "alt": figure_title(path)}
            for path in figures
        ],
        "runs": [report_run(run) for run in runs],
        "questions": report_questions(runs, mt_bench),
        "answers": [
            {
                "run_id": run["run_id"],
                "question_id": question,
                "choice": choice,
                "turns": row["turns"],
            }
            for run in runs
            for (question, choice), row in run["answers"].items()
        ],
        "judgements": [
            {
                "run_id": run["run_id"],
                **{key: row[key] for key in REPORT_JUDGEMENT},
                "judge": run_metrics.judge_title(row).removeprefix("judge "),
            }
            for run in runs
            for row in [*(row for rows in run["judged"].values() for row in rows), *run["pairs"]]
        ],
    }


def report_run(run: dict) -> dict:
    summary = run["summary"] or {}
    numbers = {
        key: summary.get(key)
        for key in (
            *results_folder.ACCURACIES,
            "best_step",
            "nonfinite_steps",
            "wall_s",
            "peak_gib",
        )
    }
    for key, rows in run["judged"].items():
        judge = run_metrics.describe_judge(key, rows)
        mark = " (smoke test)" if judge["smoke_test"] else ""
        numbers[f"score, {run_metrics.judge_title(judge)}{mark}"] = run_metrics.score_ratings(rows)[
            "score"
        ]
    return {
        "run_id": run["run_id"],
        "status": run["status"],
        "arguments": run["args"],
        "numbers": numbers,
    }


def report_questions(runs: list[dict], mt_bench: Path) -> dict[int, dict]:
    """Question texts where question.jsonl is at hand; of the others at least the category."""
    path = mt_bench / "question.jsonl"
    known = {row["question_id"]: row for row in read_questions(path)} if path.is_file() else {}
    found = {
        question: row.get("category")
        for run in runs
        for (question, _), row in run["answers"].items()
    }
    for run in runs:
        found |= {
            row["question_id"]: row["category"] for rows in run["judged"].values() for row in rows
        }
    return {
        question: {
            "category": category,
            "turns": known[question]["turns"] if question in known else None,
        }
        for question, category in sorted(found.items())
    }


def print_summary(results_dir: Path, comparison: dict) -> None:
    statuses = Counter(run["status"] for run in comparison["runs"])
    print(
        f"\n{len(comparison['runs'])} runs: {', '.join(f'{n} {status}' for status, n in sorted(statuses.items()))}"
    )
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
    runs = results_folder.load_runs(args.results_dir, args.run_ids, notes, args.skip_bad)
    comparison = compare(
        runs, args, notes
    )  # before anything is written: its errors must leave no half-new results
    print(
        f"{args.results_dir}: {len(runs)} runs; writing metrics, figures, tables and the report",
        flush=True,
    )
    folder = args.results_dir / "comparison"
    for run in runs:
        disk.write_json(run["path"] / "metrics.json", run_metrics.run_metrics(run))
    draw_all(runs, comparison, folder / "figures")
    tables = paper_tables.list_tables(comparison)
    table_files.write_tables(folder / "tables", tables)
    disk.write_json(folder / "aggregated_metrics.json", comparison)
    report.write_report(
        folder / "report.html", report_page(runs, comparison, tables, folder, args.mt_bench)
    )
    terminal.print_tables(comparison, args.proposed)
    print_summary(args.results_dir, comparison)


if __name__ == "__main__":
    console.run_main(main)
