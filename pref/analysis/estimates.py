"""From runs to comparisons: which values, seeds and questions enter an estimate.

Scores arrive as `Values` (runs.py): run id -> unit -> part -> score, where a unit is a question or
a validation pair. `make_tables` turns the values of some runs into the (S, Q) arrays that stats.py
and variation.py work on, over the units and parts that all of these runs have: no run gets an
easier exam. The other functions choose the runs for one kind of comparison and return rows of
tables.
"""

import math
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from pref.analysis import grouping, power, stats, texts, usual_tests, variation
from pref.analysis.runs import LATER_OPTIONS, OF_TUNE, Cell, Run, ScoredCell, Values

DIFFERENCE_NUMBERS = ("estimate", "se", "df", "low", "high", "seed_share")
WITHOUT_GAMED = ("without_gamed", "without_gamed_low", "without_gamed_high")
FEWEST_QUESTIONS = 10  # with which error rates were simulated
SPREAD_NUMBERS = ("ratio", "low", "high", "high_open", "reduction_percent", "brown_forsythe_p")


# ---- tables of values ---------------------------------------------------------------------------


def shared_parts(runs: list[dict]) -> dict:
    """unit -> the parts that all runs have; units of which no part is shared are left out.

    runs: unit -> part -> score of each run. With {81: {1: 6, 2: 4}, 82: {1: 8}} and
    {81: {1: 7}, 83: {1: 9}}, only turn 1 of question 81 is shared: {81: {1}}.
    """
    shared = [unit for unit in runs[0] if all(unit in run for run in runs)]
    parts = {unit: set.intersection(*(set(run[unit]) for run in runs)) for unit in sorted(shared)}
    return {unit: common for unit, common in parts.items() if common}


def make_tables(values: Values, groups: list[list[str]]) -> list[np.ndarray]:
    """Tables of scores, one for each group of run ids, over the units that all of the runs have.

    Returns arrays (runs in the group, units). An entry is the mean of the parts that all runs have:
    a turn whose judgement is lost in one run counts in none.
    """
    parts = shared_parts([values[run_id] for group in groups for run_id in group])
    return [
        np.array(
            [[mean_of_parts(values[run_id][unit], parts[unit]) for unit in parts] for run_id in ids]
        )
        for ids in groups
    ]


def mean_of_parts(scores: dict, parts: set) -> float:
    return sum(scores[part] for part in parts) / len(parts)


def runs_with_values(cell: Cell, values: Values) -> dict:
    """seed -> run id of the cell's runs that have values."""
    return {run.seed: run.run_id for run in cell.runs if values.get(run.run_id)}


def cell_table(cell: Cell, values: Values) -> np.ndarray:
    """(S, Q) table of one cell over the units that its own runs share."""
    (table,) = make_tables(values, [list(runs_with_values(cell, values).values())])
    return table


# ---- settings in which cells differ -------------------------------------------------------------


def differences(one: Cell, other: Cell) -> list[str]:
    """Settings that both cells have and that differ; None is "does not apply", not a difference.
    What follows from another `tune` is none besides it.
    """
    a, b = settings_of(one), settings_of(other)
    different = [
        key for key in a if a[key] is not None and b.get(key) is not None and a[key] != b[key]
    ]
    return sorted(key for key in different if "tune" not in different or key not in OF_TUNE)


def settings_of(cell: Cell) -> dict:
    """The settings of a trained cell, with what older runs did not record."""
    return (LATER_OPTIONS if not cell.untrained else {}) | cell.runs[0].settings


def differences_text(one: Cell, other: Cell) -> str | None:
    a, b = settings_of(one), settings_of(other)
    pairs = [
        f"{key} {setting_text(a[key])} / {setting_text(b[key])}" for key in differences(one, other)
    ]
    return "; ".join(pairs) or None


def setting_text(value) -> str:
    return texts.setting_text(value)


def nearest(one: Cell, others: list[Cell]) -> list[Cell]:
    """Those of `others` that differ from `one` in the fewest settings besides beta and tau."""
    fewest = min((len(differences(one, other)) for other in others), default=0)
    return [other for other in others if len(differences(one, other)) == fewest]


# ---- differences of two cells -------------------------------------------------------------------


class Comparison(NamedTuple):
    """The difference of two cells, and the tables that it was estimated from."""

    difference: stats.Difference
    table_a: np.ndarray  # (S_a, Q)
    table_b: np.ndarray  # (S_b, Q)


def cell_interval(
    cell: Cell, counted: list[str], values: Values, proportion: bool = False
) -> tuple[float | None, float | None]:
    """95 % interval of a cell's mean over its seeds and units; of a single seed, over units alone.

    counted: ids of the runs in the mean that the interval is shown with. (None, None) if not all of
    them have values: it would be the interval of another mean. proportion: whether a value is right
    or wrong, 1 or 0.
    """
    runs = runs_with_values(cell, values)
    if not runs or set(runs.values()) != set(counted):
        return None, None
    table = cell_table(cell, values)
    if not table.size:
        return None, None
    interval = stats.proportion_interval if proportion else stats.mean_interval
    low, high = map(finite, interval(table))
    return low, high


def compare_cells(a: Cell, b: Cell, values: Values) -> Comparison | None:
    """Difference of two cells' means; None if they share no unit.

    Seeds that both cells have are paired. If there are fewer than two of these, all seeds count,
    unpaired. A trained cell with a single seed says nothing about other seeds: then one seed of
    each cell is compared, the same one where both have it.
    """
    seeds_a, seeds_b = runs_with_values(a, values), runs_with_values(b, values)
    if not seeds_a or not seeds_b:
        return None
    common = sorted(set(seeds_a) & set(seeds_b), key=str)
    one_seed = any(
        len(seeds) == 1 and not cell.untrained for cell, seeds in ((a, seeds_a), (b, seeds_b))
    )
    paired = bool(common) and (one_seed or len(common) > 1)
    if paired:
        groups = [[seeds[seed] for seed in common] for seeds in (seeds_a, seeds_b)]
    elif one_seed:
        groups = [list(seeds_a.values())[:1], list(seeds_b.values())[:1]]
    else:
        groups = [list(seeds_a.values()), list(seeds_b.values())]
    table_a, table_b = make_tables(values, groups)
    if not table_a.size:
        return None
    return Comparison(stats.difference(table_a, table_b, paired), table_a, table_b)


def comparison_columns(compared: Comparison | None, has_rate: bool = True) -> dict:
    """Columns of a table of differences; every key is present, with None where there is no
    comparison. has_rate: whether a difference relative to the baseline means something.
    """
    if compared is None:
        others = ("rate", "rate_low", "rate_high")
        others += ("p", "detectable", "n_units", "paired", "seeds_compared", "calibrated", "caveat")
        return dict.fromkeys((*DIFFERENCE_NUMBERS, *others))
    difference, table_a, table_b = compared
    rate = (math.nan,) * 3
    if has_rate:
        rate = stats.improvement_rate(table_a, table_b, difference.seeds != "unpaired")
    seeds_compared = {
        "paired": f"{len(table_a)} paired",
        "unpaired": f"{len(table_a)} against {len(table_b)}, unpaired",
        "one seed": "one seed",
    }
    return {
        **{key: finite(getattr(difference, key)) for key in DIFFERENCE_NUMBERS},
        **{key: finite(value) for key, value in zip(("rate", "rate_low", "rate_high"), rate)},
        "p": finite(difference.p()),
        "detectable": finite(power.minimum_detectable(difference)),
        "n_units": difference.n_questions,
        "paired": difference.seeds,
        "seeds_compared": seeds_compared[difference.seeds],
        "calibrated": (caveat := find_caveat(compared)) is None,
        "caveat": caveat,
    }


def add_without_gamed(rows: list[dict], cells: list[Cell], values: Values) -> None:
    """Add to rows of differences of length-controlled win rates what they are without the rows of
    AlpacaEval's gamed baselines (see length_control.control), with the 95 % interval.

    values: those without the gamed rows; {} for any other measure, whose rows stay as they are.
    """
    if not values:
        return
    by_label = {cell.label: cell for cell in cells}
    for row in rows:
        compared = compare_cells(by_label[row["proposed"]], by_label[row["baseline"]], values)
        numbers = ("estimate", "low", "high")
        found = [finite(getattr(compared.difference, key)) if compared else None for key in numbers]
        row |= dict(zip(WITHOUT_GAMED, found))


def find_caveat(compared: Comparison) -> str | None:
    """Why p and interval may not keep the error rates that bench/calibration.py has simulated; None
    if they do.
    """
    difference = compared.difference
    if difference.seeds == "one seed":
        return "one seed: how much other seeds would differ is not known"
    if difference.n_questions < FEWEST_QUESTIONS:
        return f"fewer than {FEWEST_QUESTIONS} questions or pairs: never tried in simulation"
    return None


def finite(value: float) -> float | None:
    """`value`, or None if it is NaN or infinite: rows say "not known" with None."""
    return value if math.isfinite(value) else None


def sensitivity_rows(label: str, baseline: str, compared: Comparison) -> list[dict]:
    """The primary test, then the usual ones, each with what it ignores."""
    difference, table_a, table_b = compared
    ignores = {
        "paired": "nothing of the two: questions and seeds are both sampled",
        "unpaired": "nothing of the two; the seeds differ, so that they are not paired",
        "one seed": "other seeds would differ: with one seed nothing is known of it",
    }
    primary = {
        "test": "primary: questions and seeds",
        "p": finite(difference.p()),
        "ignores": ignores[difference.seeds],
    }
    others = [row | {"p": finite(row["p"])} for row in usual_tests.sensitivity(table_a, table_b)]
    return [{"proposed": label, "baseline": baseline} | row for row in (primary, *others)]


def mcnemar_rows(a: Cell, b: Cell, values: Values) -> list[dict]:
    """Exact McNemar test on the same validation pairs, one row per seed: the pairs of several seeds
    are not independent.
    """
    seeds_a, seeds_b = runs_with_values(a, values), runs_with_values(b, values)
    rows = []
    for seed in sorted(set(seeds_a) & set(seeds_b), key=str):
        (right_a,), (right_b,) = make_tables(values, [[seeds_a[seed]], [seeds_b[seed]]])
        rows.append(
            {"seed": seed, "n_pairs": len(right_a), **usual_tests.mcnemar(right_a, right_b)}
        )
    return rows


# ---- a loss over beta ---------------------------------------------------------------------------


class SpreadComparison(NamedTuple):
    """Variance over beta of the series a against that of the series b."""

    betas: list[float]  # those that both series have
    spread_a: variation.BetaSpread
    spread_b: variation.BetaSpread
    ratio: float | None  # a's variance over beta / b's, and its interval
    low: float
    high: float
    high_open: bool  # the interval has no upper limit: b's variance may be 0
    reduction_percent: float | None
    n_seeds: int  # the smallest number in a cell
    brown_forsythe_p: float | None


def beta_series(cells: list[Cell], values: Values) -> list[list[Cell]]:
    """Cells of equal loss, tau and settings, in order of beta; series of at least two cells with
    values.
    """
    series: dict[tuple, list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell.beta is not None and runs_with_values(cell, values):
            series[cell.loss, cell.tau, str(cell.settings)].append(cell)
    return [sorted(line, key=lambda cell: cell.beta) for line in series.values() if len(line) > 1]


def spread_of(
    cells: list[Cell], values: Values, draws: int, stream: int = 0
) -> variation.BetaSpread | None:
    """Variance over beta of the cells' values on their common units; None with fewer than two: a
    single unit does not show how much units differ.
    """
    by_cell = [dict(sorted(runs_with_values(cell, values).items(), key=str)) for cell in cells]
    tables = make_tables(values, [list(runs.values()) for runs in by_cell])
    same_seeds = all(list(runs) == list(by_cell[0]) for runs in by_cell) and len(by_cell[0]) > 1
    if tables[0].shape[-1] < 2:
        return None
    return variation.beta_spread(tables, same_seeds, draws, stream)


def compare_spreads(
    a: list[Cell], b: list[Cell], values: Values, draws: int
) -> SpreadComparison | None:
    """Variance over beta of the series a against the series b, at the betas that both have; None
    with fewer than two such betas, or than two common units.
    """
    betas = sorted({cell.beta for cell in a} & {cell.beta for cell in b})
    a, b = ([cell for cell in cells if cell.beta in betas] for cells in (a, b))
    assert len(a) == len(b) == len(betas), "a beta appears twice"
    if len(betas) < 2:
        return None
    spread_a = spread_of(a, values, draws)
    spread_b = spread_of(b, values, draws, stream=1)
    if spread_a is None or spread_b is None:
        return None
    ratio = variation.variance_ratio(spread_a, spread_b)
    means_a, means_b = (
        [float(cell_table(cell, values).mean()) for cell in cells] for cells in (a, b)
    )
    return SpreadComparison(
        betas=betas,
        spread_a=spread_a,
        spread_b=spread_b,
        **ratio,
        high_open=ratio["high"] == math.inf,
        reduction_percent=None if ratio["ratio"] is None else 100 * (1 - ratio["ratio"]),
        n_seeds=min(len(runs_with_values(cell, values)) for cell in (*a, *b)),
        brown_forsythe_p=finite(variation.brown_forsythe(means_a, means_b)),
    )


def spread_rows(cells: list[Cell], values: Values, baseline: str, draws: int) -> list[dict]:
    """Variance over beta of each loss and tau, against the baseline's series that differs in the
    fewest settings.
    """
    all_series = beta_series(cells, values)
    references = {series[0]: series for series in all_series if series[0].loss == baseline}
    rows = []
    for series in all_series:
        if (spread := spread_of(series, values, draws)) is None:
            continue
        first, reference, against = series[0], None, None
        if references and first.loss != baseline:
            reference = references[nearest(first, list(references))[0]]
            against = compare_spreads(series, reference, values, draws)
        settings = [f"{key}={setting_text(value)}" for key, value in first.settings.items()]
        rows.append(
            {
                "loss": first.loss,
                "tau": first.tau,
                "settings": " ".join(settings) or None,
                "betas": [cell.beta for cell in series],
                "variance_of_means": spread.raw,
                "of_it_noise": spread.noise,
                "variance": spread.variance,
                **{key: getattr(against, key, None) for key in SPREAD_NUMBERS},
                "differs_in": differences_text(first, reference[0]) if against else None,
            }
        )
    return rows


# ---- a loss over its grid -----------------------------------------------------------------------


def selection_rows(scored: list[ScoredCell], metric: str, baseline: str) -> list[dict]:
    """The best cell of each loss by validation accuracy, and what its grid and the baseline's would
    give at equal budget.

    The best of a larger grid is better by chance alone. The budget is the number of cells of the
    smaller grid; what a grid gives is the expected score of the best of that many cells, drawn at
    random (variation.expected_best). Chance then favours neither.
    """
    grids: dict[str, list[ScoredCell]] = defaultdict(list)
    for one in scored:
        if one.row[metric] is not None and not one.cell.untrained:
            grids[one.cell.loss].append(one)
    rows = []
    for loss, grid in grids.items():
        scores, selector, how = grid_scores(grid, metric)
        best = grid[selector.index(max(selector))].row
        baseline_grid = grids.get(baseline)
        budget = min(len(grid), len(baseline_grid or grid))
        row = {
            "loss": loss,
            "cells": len(grid),
            "selected": best["label"],
            "selected_by": how,
            "value": best[metric],
            "budget": budget,
            "expected_selected": variation.expected_best(selector, scores, budget),
            "expected_maximum": variation.expected_best(scores, scores, budget),
            "maximum": max(scores),
        }
        if baseline_grid:
            of_baseline = grid_scores(baseline_grid, metric)
            expected = variation.expected_best(of_baseline.selector, of_baseline.scores, budget)
            row["baseline_expected_selected"] = expected
            if loss != baseline:
                row["expected_difference"] = row["expected_selected"] - expected
        rows.append(row)
    return rows


class GridScores(NamedTuple):
    """Scores of a loss's cells, and what the best cell is selected by."""

    scores: list[float]
    selector: list  # of floats, or of Cell.rank
    selected_by: str


def grid_scores(grid: list[ScoredCell], metric: str) -> GridScores:
    scores = [one.row[metric] for one in grid]
    cells = [one.cell for one in grid]
    if metric != "best_acc_ref" and all(cell.accuracy is not None for cell in cells):
        return GridScores(scores, [cell.rank for cell in cells], grouping.selector(cells))
    return GridScores(scores, scores, "the score itself")


def stability_rows(cells: list[Cell]) -> list[dict]:
    """Runs that diverged, runs with a non-finite step, and such steps, by loss and beta, with exact
    intervals.
    """
    groups: dict[tuple, list[Run]] = defaultdict(list)
    for cell in cells:
        if not cell.untrained:
            groups[cell.loss, cell.beta] += [run for run in cell.runs if run.summary]
    rows = []
    for (loss, beta), runs in groups.items():
        if not runs:
            continue
        bad_steps = [run.summary["nonfinite_steps"] or 0 for run in runs]
        n_steps = sum(run.summary["steps"] or 0 for run in runs)
        counts = {  # name: (count, total)
            "diverged": (sum(run.status == "diverged" for run in runs), len(runs)),
            "nonfinite_runs": (sum(map(bool, bad_steps)), len(runs)),
            "nonfinite_steps": (sum(bad_steps), n_steps),
        }
        row = {"loss": loss, "beta": beta}
        for name, (count, total) in counts.items():
            total = max(count, total)  # a step that was not taken may not be in `steps`
            low, high = stats.exact_interval(count, total)
            row |= {name: count, f"{name}_of": total, f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return rows


def variance_rows(cells: list[Cell], values: Values, retest: dict | None) -> list[dict]:
    """Variance of a question's score, split by source: question, beta and tau, seed, judge.

    For each loss with at least two cells that share at least two seeds. retest: of
    run_metrics.judge_reliability, whose `sd` gives the judge's part.
    """
    by_loss: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        if len(runs_with_values(cell, values)) > 1:
            by_loss[cell.loss].append(cell)
    rows = []
    for loss, grid in by_loss.items():
        by_seed = [runs_with_values(cell, values) for cell in grid]
        seeds = sorted(set.intersection(*map(set, by_seed)), key=str)
        if len(grid) < 2 or len(seeds) < 2:
            continue
        groups = [[runs[seed] for seed in seeds] for runs in by_seed]
        cube = np.array(make_tables(values, groups))  # (C, S, Q)
        if cube.shape[-1] < 2:
            continue
        parts = variation.variance_parts(cube)
        total = sum(parts.values())
        for source, variance in parts.items():
            share = variance / total if total else None
            rows.append({"loss": loss, "source": source, "variance": variance, "share": share})
        if retest:
            source = "judge, one rating (within residual)"
            variance = retest["sd"] ** 2
            rows.append({"loss": loss, "source": source, "variance": variance, "share": None})
    return rows
