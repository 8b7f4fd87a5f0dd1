"""Compare the runs of a results folder: verdicts on claims, tables, figures, and a report.

    python analyze.py results/
    python analyze.py results/ --run_ids base dpo_b0.05_s42 td_dpo_b0.05_t1_s42 --out results/three
    python analyze.py results/ --baseline simpo --proposed my_loss --claims my_claims.json

Reads   results/<run_id>/args.json                      without it, a folder is not a run
            summary.json, metrics.jsonl, val_pairs.jsonl            by train_pref.py
            <bench>/answers.jsonl, <bench>/judgements.csv           by gen_mtbench.py, judge.py
            lm_eval/                                                by lm-evaluation-harness
        results/judges/<judge>/validation.json          by judge.py --validate
        results/claims.json                             your own claims, added to the study's
        data/<bench>/                                   questions, as the report shows them;
                                                        AlpacaEval's df_gamed.csv
Writes  results/comparison/report.html                  start here; one file, opens from disk; or
                                                        another folder than comparison/ with --out
        results/comparison/aggregated_metrics.json      every number of the report
        results/comparison/tables/*.{csv,md,tex}, figures/*.{pdf,png,svg}
        results/<run_id>/metrics.json, figures/<run_id>_learning_curve.{pdf,png}

It trains, generates and judges nothing. It works with whatever is there, names what is missing and
the command that would supply it, and can be rerun at any time.

Runs that share loss, beta, tau and every other setting are one cell of the grid; a cell's number is
the mean over its seeds. Some things are never averaged together: trial runs with full ones, one
judge or baseline with another, different questions. Runs of different models or data are refused.
What is measured, and in which unit, is in pref/analysis/measures.py.

Differences come with an error over questions and over seeds (pref/analysis/stats.py). How claims
are stated is in pref/analysis/claims.py, how they are judged in pref/analysis/verdicts.py.
"""

import pref.files.interrupts  # noqa: F401  isort: skip

import argparse
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from pref.analysis import (
    answer,
    arguments,
    bench_data,
    bench_gaps,
    brief,
    cell_rows,
    claims,
    decisions,
    estimates,
    figures,
    frontier,
    gold_selection,
    grouping,
    judge_identity,
    length_control,
    measures,
    notes,
    opening,
    pairwise,
    paper_tables,
    parts,
    report,
    report_page,
    results_folder,
    rounds,
    run_metrics,
    stats,
    table_files,
    terminal,
    texts,
    verdicts,
)
from pref.analysis.bench_data import AllData
from pref.analysis.measures import Measure
from pref.analysis.parts import Part, Sources
from pref.analysis.runs import Cell, Run, ScoredCell, Scores, Values
from pref.files import alpaca_eval, console, disk, run_folders

COMPARISONS = ("best of grid", "matched beta", "best baseline", "untrained model")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return arguments.parse_args(argv, __doc__)


# ---- scores: what each cell reached -------------------------------------------------------------


def measure_runs(
    cells: list[Cell], runs: list[Run], args: argparse.Namespace, sources: Sources
) -> tuple[list[Scores], list[str], list[dict]]:
    """Every measure of every judge, notes on them, and what they lack besides MT-Bench."""
    scores, all_notes, gaps = [], [], bench_gaps.unjudged(runs)
    judges = {key for run in runs for key in run.judged}
    if len(judges) > 1:
        all_notes.append(
            f"{len(judges)} judges or judge settings: each has tables of its own, never averaged"
        )
    noted = set()  # sources whose judgements were described already
    for measure in measures.MEASURES:
        for part in measure.find(runs, sources):
            scores.append(compare_part(measure, part, cells, args))
            name = parts.source_name(part.facts)
            if part.judged and name not in noted:
                noted.add(name)
                all_notes += notes.note_judge(part.facts, part.judged, part.questions, name)
                gaps += bench_gaps.part_gaps(part, name, runs) if "bench" in part.facts else []
            part_notes = [*part.notes, *frontier.notes(scores[-1].results)]
            all_notes += [f"{measure.heading(part.facts)}: {note}" for note in part_notes]
            if measure is measures.ARENA_HARD and (warning := part.facts["position_warning"]):
                all_notes.append(f"{name}: {warning}")
    if sources.gamed and sources.gamed.note and any(s.metric == "alpaca_eval_lc" for s in scores):
        all_notes.append(sources.gamed.note)
    if any(one.results.get("definition") == length_control.UNREGULARISED for one in scores):
        gaps.append(bench_gaps.NO_DIFFICULTY)
    return scores, list(dict.fromkeys(all_notes)), gaps  # those on a judge stand once


def compare_part(
    measure: Measure, part: Part, cells: list[Cell], args: argparse.Namespace
) -> Scores:
    """What the cells reached in one part of a measure, and what differs between them."""
    numbers, values = part.numbers, part.values
    columns = tuple(measure.of_part(part.facts).columns)
    rows = [cell_rows.part_row(cell, numbers, columns, measure.se) for cell in cells]
    scored = [ScoredCell(cell, row) for cell, row in zip(cells, rows) if row]
    results = part.facts | {"judge_usd": parts.judge_usd(part.judged)}
    if part.questions:
        results |= {
            "questions": sorted(part.questions.common),
            "questions_left_out": sorted(part.questions.left_out),
        }
    if measure in (measures.MT, measures.TASK_SCORE):
        by_category = [row for cell in cells for row in cell_rows.category_rows(cell, numbers)]
        results["categories"] = by_category
    results |= compare_scores(measure, cells, scored, numbers, values, args)
    estimates.add_without_gamed(results["improvement"], cells, part.without_gamed)
    results |= part.extra
    smoke = ""
    if measure is not measures.ACCURACY:
        results["variance"] = estimates.variance_rows(cells, values, part.extra.get("retest"))
        results |= frontier.find(cells, scored, measure.value, part, args.baseline)
        of_runs = results["frontier_runs"]
        results["rounds"] = rounds.rows(scored, measure.value, of_runs, values)
        smoke = judge_identity.smoke_mark(part.facts)
    if measure is measures.TASK_SCORE:
        results |= gold_selection.find(scored, measure.value, values)
    if are_trial([run for cell in cells for run in cell.runs]):
        smoke = texts.TRIAL
    judged_by = parts.judged_by(part.facts)
    return Scores(measure.metric(part.facts), judged_by, smoke, values, results)


def are_trial(runs: list[Run]) -> bool:
    """Whether these are trial runs; results_folder.load_runs never mixes them with others."""
    return any(run.args["mode"] == "trial" for run in runs)


def compare_scores(
    measure: Measure,
    cells: list[Cell],
    scored: list[ScoredCell],
    numbers: dict[str, dict],
    values: Values,
    args: argparse.Namespace,
) -> dict:
    """Cells with intervals, differences, selection, spread over beta.

    scored: the cells that have a row. numbers: run id -> name -> number of the whole run. values:
    the same scores by question or pair, for estimates.
    """
    metric = measure.value
    if measure is measures.ACCURACY:  # later rounds have pairs of their own: nothing to compare
        cells = [cell for cell in cells if cell.round == 1]
    for cell, row in scored:
        row["low"], row["high"] = estimates.cell_interval(
            cell, row["runs"], values, measure.proportion
        )
    compared = [one for one in scored if one.cell in cells]
    known = [
        run
        for cell in cells
        for run in cell.runs
        if numbers.get(run.run_id, {}).get(metric) is not None
    ]
    return {
        "cells": [row for _, row in scored],
        "runs": [
            {"run_id": run.run_id, "loss": run.loss, "value": numbers[run.run_id][metric]}
            for run in known
        ],
        "improvement": improvement_rows(measure, compared, values, args),
        "selection": estimates.selection_rows(compared, metric, args.baseline),
        "spread": estimates.spread_rows(cells, values, args.baseline, args.draws),
    }


# ---- comparisons: which cells are set against which ---------------------------------------------


class CellPair(NamedTuple):
    """Two cells to compare."""

    comparison: str  # one of COMPARISONS
    proposed: ScoredCell
    baseline: ScoredCell
    selected_by: str | None  # how a best cell of the two was chosen


class BestCell(NamedTuple):
    """The best cell of a loss."""

    scored: ScoredCell
    selected_by: str


def list_pairs(scored: list[ScoredCell], metric: str, baseline: str) -> list[CellPair]:
    """The pairs of cells that are compared, in the order of COMPARISONS:

    best of grid      a loss's best cell against the baseline's best cell (the headline)
    matched beta      each cell of a loss against the baseline at the same beta
    best baseline     each cell of a loss against the baseline's best cell
    untrained model   every loss's best cell against the untrained model
    """
    grids: dict[str, list[ScoredCell]] = defaultdict(list)  # loss -> its cells
    for one in scored:
        if not one.cell.untrained:
            grids[one.cell.loss].append(one)
    untrained = [one for one in scored if one.cell.untrained]
    best = {loss: pick_best(grid, metric) for loss, grid in grids.items()}
    pairs = []
    for loss, grid in grids.items():
        ours = best[loss]
        for model in untrained:
            pairs.append(CellPair("untrained model", ours.scored, model, ours.selected_by))
        if loss == baseline or baseline not in grids:
            continue
        theirs = best[baseline]
        how = ours.selected_by
        if how != theirs.selected_by:
            how = f"proposed: {how}; baseline: {theirs.selected_by}"
        pairs.append(CellPair("best of grid", ours.scored, theirs.scored, how))
        for one in grid:
            for other in same_beta(one, grids[baseline]):
                pairs.append(CellPair("matched beta", one, other, None))
            pairs.append(CellPair("best baseline", one, theirs.scored, theirs.selected_by))
    return sorted(pairs, key=lambda pair: COMPARISONS.index(pair.comparison))


def pick_best(grid: list[ScoredCell], metric: str) -> BestCell:
    """The best cell of a loss: by validation accuracy if that is known for all of its cells.

    Selected by the score itself, the maximum would flatter the loss with the larger grid.
    """
    if metric != "best_acc_ref" and all(one.cell.accuracy is not None for one in grid):
        by = grouping.selector([one.cell for one in grid])
        return BestCell(max(grid, key=lambda one: one.cell.rank), by)
    return BestCell(max(grid, key=lambda one: one.row[metric]), "the score itself")


def same_beta(one: ScoredCell, grid: list[ScoredCell]) -> list[ScoredCell]:
    """Cells of `grid` at the beta of `one`; of several, those that differ from it in the fewest
    other settings.
    """
    matching = [other for other in grid if other.cell.beta == one.cell.beta]
    nearest = estimates.nearest(one.cell, [other.cell for other in matching])
    return [other for other in matching if other.cell in nearest]


def improvement_rows(
    measure: Measure, scored: list[ScoredCell], values: Values, args: argparse.Namespace
) -> list[dict]:
    """Every pair of `list_pairs`, with difference, interval and tests.

    p_adjusted: Holm over the headline (best of grid); Benjamini and Hochberg over the pairs of each
    other comparison.
    """
    metric = measure.value
    scored = [one for one in scored if one.row[metric] is not None]
    pairs = list_pairs(scored, metric, args.baseline)
    n_cells = Counter(one.cell.loss for one in scored)
    what = "comparing accuracy" if metric == "best_acc_ref" else "comparing scores"
    rows = []
    for pair in console.progress(pairs, what, "pairs of cells"):
        row = difference_row(pair, metric, values, measure.has_rate)
        row["proposed_cells"] = n_cells[pair.proposed.cell.loss]
        row["baseline_cells"] = n_cells[pair.baseline.cell.loss]
        rows.append(row)
    for comparison in COMPARISONS:
        family = [row for row in rows if row["comparison"] == comparison]
        p_values = [math.nan if row["p"] is None else row["p"] for row in family]
        adjust = stats.holm if comparison == "best of grid" else stats.benjamini_hochberg
        for row, p in zip(family, adjust(p_values)):
            row["p_adjusted"] = estimates.finite(p)
            row |= dict.fromkeys(decisions.SIZES)
    for pair, row in zip(pairs, rows):
        if pair.comparison in decisions.ANSWERING and decisions.is_open(row):
            compared = estimates.compare_cells(pair.proposed.cell, pair.baseline.cell, values)
            n_pairs = sum(other.comparison == pair.comparison for other in pairs)
            row |= decisions.sizes_to_decide(row, compared, n_pairs)
    if metric == "best_acc_ref":  # each unit is right or wrong: there is an exact test as well
        for pair, row in zip(pairs, rows):
            headline = pair.comparison == "best of grid"
            cells = pair.proposed.cell, pair.baseline.cell
            row["mcnemar"] = estimates.mcnemar_rows(*cells, values) if headline else []
    return rows


def difference_row(pair: CellPair, metric: str, values: Values, has_rate: bool) -> dict:
    """One row of a table of differences, before p-values are adjusted. has_rate: whether a
    difference relative to the baseline means something.
    """
    (our_cell, ours), (their_cell, theirs) = pair.proposed, pair.baseline
    value, base = ours[metric], theirs[metric]
    row = {
        "comparison": pair.comparison,
        **{key: ours[key] for key in ("loss", "beta", "tau")},
        "proposed": ours["label"],
        "proposed_score": value,
        "proposed_n_seeds": ours["n_seeds"],
        "baseline": theirs["label"],
        "baseline_score": base,
        "baseline_n_seeds": theirs["n_seeds"],
        "difference": value - base,
        "improvement_rate": (value - base) / base if base else None,
        "selected_by": pair.selected_by,
        "differs_in": estimates.differences_text(our_cell, their_cell),
    }
    compared = estimates.compare_cells(our_cell, their_cell, values)
    row |= estimates.comparison_columns(compared, has_rate)
    # The difference is that of the runs and units that interval and test are of: one of the two
    # cells may lack seeds or ratings that the other has.
    if not has_rate:
        row["improvement_rate"] = None
    if compared:
        row |= {"difference": row["estimate"], "improvement_rate": row["rate"]}
        row["seeds_compared"] += seeds_not_compared(compared, ours["n_seeds"], theirs["n_seeds"])
    row["sensitivity"] = []
    if compared and pair.comparison == "best of grid":
        row["sensitivity"] = estimates.sensitivity_rows(ours["label"], theirs["label"], compared)
    return row


def seeds_not_compared(compared: estimates.Comparison, ours: int, theirs: int) -> str:
    """Says that cells have more seeds than those that both have: the difference is not that of
    their means; "" if all are compared.
    """
    if (len(compared.table_a), len(compared.table_b)) == (ours, theirs):
        return ""
    return f", of {ours} and {theirs}"


# ---- the story ----------------------------------------------------------------------------------


def compare(
    runs: list[Run], args: argparse.Namespace, load_notes: list[str], sources: Sources
) -> dict:
    """Compare the runs: the contents of aggregated_metrics.json."""
    # 1) Cells. An unfinished run has no result yet: it is named in the notes and left out.
    used = [run for run in runs if run.status != "unfinished"]
    cells = grouping.make_cells(used)
    all_notes = [*load_notes, *notes.note_runs(runs, cells), *grouping.note_rounds(runs)]

    # 2) Scores: validation accuracy, and every measure by each judge on its own.
    (part,) = measures.ACCURACY.find(used, sources)
    accuracy = compare_part(measures.ACCURACY, part, cells, args)
    scored, score_notes, gaps = measure_runs(cells, used, args, sources)
    all_notes += score_notes

    # 3) Claims, on whatever was measured.
    model = runs[0].args["model"]
    measured = [*scored, *([accuracy] if any(accuracy.values.values()) else [])]
    study = claims.load_claims(args.results_dir, args.claims)
    judged = verdicts.judge_claims(study, cells, measured, model, args.draws)
    if are_trial(runs):
        judged = [row | {"verdict": "not measured", "why": f"{texts.TRIAL}."} for row in judged]
        all_notes.insert(0, texts.TRIAL)

    # 4) Everything under the keys of the file; what it comes to is derived from the rest.
    parts_of = {measure.key: [] for measure in measures.MEASURES}
    for scores in scored:
        parts_of[measures.of_metric(scores.metric).key].append(scores.results)
    trained_on = [run.args["data_sha256"] for run in runs if run.args.get("data_sha256")]
    comparison = {
        "model": model,
        "trial": are_trial(runs),
        "data_sha256": trained_on[0] if trained_on else None,
        "baseline": args.baseline,
        "proposed": args.proposed,
        "draws": args.draws,
        "runs": [cell_rows.run_row(run) for run in runs],
        "unfinished": [run.run_id for run in runs if run.status == "unfinished"],
        "diverged": [run.run_id for run in runs if run.status == "diverged"],
        "claims": judged,
        "accuracy": accuracy.results,
        **parts_of,
        "pairs": pairwise.win_rows(cells),
        "stability": estimates.stability_rows(cells),
        "movement": cell_rows.movement_rows(
            used, [one for one in scored if one.metric == measures.MT.name]
        ),
        "notes": all_notes,
        "missing": [*notes.find_missing(runs, parts_of["mt_bench"], args), *gaps],
    }
    answers = answer.find_answers(comparison)
    return {"answer": opening.find_opening(comparison).row(), "answers": answers} | comparison


def read_data(args: argparse.Namespace) -> AllData:
    """The data folders of the benchmarks that the runs have files of."""
    folders = {"mt_bench": args.mt_bench, "alpaca_eval": args.alpaca_eval}
    paths = run_folders.find_runs([args.results_dir], check=False)
    found = {name for path in paths for name in results_folder.find_benches(path)}
    return bench_data.read_data(sorted({*found, "mt_bench"}), folders, args.data)


def read_gamed(folder: Path) -> alpaca_eval.GamedFile | None:
    """What AlpacaEval's length control needs besides judgements; None if the file is not there."""
    path = folder / "df_gamed.csv"
    return alpaca_eval.read_gamed(path) if path.is_file() else None


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    folder = arguments.output_folder(args)

    # 1) Read and check every run.
    data = read_data(args)
    runs, load_notes = results_folder.load_runs(args.results_dir, args.run_ids, args.skip_bad, data)

    printed = []
    if args.run_ids and args.out is None and (note := notes.note_replaced(folder, len(runs))):
        printed.append(note)

    # 2) Compare before anything is written: an error must not leave half of the results new.
    sources = Sources(data, read_gamed(args.alpaca_eval))
    comparison = compare(runs, args, load_notes, sources)
    printed.append(brief.head_line(args.results_dir, comparison))
    print("\n".join(printed), flush=True)

    # 3) Write. Figures come first: drawing them adds notes on what could not be drawn, the report
    #    embeds them, and if they fail, everything else is still that of the last analysis.
    figures.draw_all(runs, comparison, folder / "figures")
    for run in runs:
        numbers = run_metrics.run_metrics(run) | {"scores": measures.run_scores(run, sources)}
        disk.write_json(run.path / "metrics.json", numbers)
    tables = paper_tables.list_tables(comparison)
    table_files.write_tables(folder / "tables", tables)
    disk.write_json(folder / "aggregated_metrics.json", comparison)
    page = report_page.make_page(runs, comparison, tables, folder, data)
    report.write_report(folder / "report.html", page)

    # 4) The same in short on the terminal.
    if args.verbose:
        terminal.print_tables(comparison, args.proposed)
        notes.print_summary(args.results_dir, folder, comparison)
    else:
        print("\n".join(brief.lines(comparison, folder, len(printed))))


if __name__ == "__main__":
    console.run_main(main)
