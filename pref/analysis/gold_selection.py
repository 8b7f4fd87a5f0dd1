"""What selection by validation accuracy really selects, where a program knows the true score.

The best cell of a loss is selected by validation accuracy (analyze.py). Does that find the cell
whose answers score best, and what does it cost where it does not?

The best of several noisy scores is flattered by its noise. What the best cell by score would have
given is therefore measured on scores that had no part in selecting it: the questions are split into
two halves, and for each half and seed the cell is selected on the other half and the other seeds.
Its values on its own half and seed are compared with those of the cell that validation selects, by
the toolkit's test of questions and seeds. (With one seed, the halves alone are kept apart.)
"""

import math
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from statistics import fmean

import numpy as np
from scipy import special
from scipy import stats as scipy_stats

from pref.analysis import estimates, stats
from pref.analysis.runs import Cell, ScoredCell, Values

ALL = "all losses"
FEWEST_CELLS = 4  # of which a rank correlation is given


def find(scored: list[ScoredCell], metric: str, values: Values) -> dict:
    """What aggregated_metrics.json has of it: `gold_selection` (a row a loss) and `gold_points` (a
    row a cell). Later rounds are left out: their accuracies are on pairs of their own.
    """
    known = [
        one
        for one in scored
        if not one.cell.untrained and one.cell.round == 1
        if one.cell.accuracy is not None and one.row[metric] is not None
    ]
    points = [
        {
            **{key: one.row[key] for key in ("label", "loss", "beta", "tau", "settings")},
            "accuracy": one.cell.accuracy,
            "score": one.row[metric],
        }
        for one in known
    ]
    selection = rows(known, metric, values)
    return {"gold_selection": selection, "gold_points": points if selection else []}


def rows(known: list[ScoredCell], metric: str, values: Values) -> list[dict]:
    """One row for each loss with at least two cells, and one for all of them together.

    known: trained cells with a score and a validation accuracy.
    """
    grids: dict[str, list[ScoredCell]] = defaultdict(list)
    for one in known:
        grids[one.cell.loss].append(one)
    if len(grids) > 1:
        grids[ALL] = known
    return [grid_row(name, grid, metric, values) for name, grid in grids.items() if len(grid) > 1]


def grid_row(name: str, grid: list[ScoredCell], metric: str, values: Values) -> dict:
    """One loss's grid. cost: what the cell that scores best would give above the selected one,
    without the flattery of having been selected on the same scores; apparent_cost: with it.
    """
    by_accuracy = max(grid, key=lambda one: one.cell.rank)
    by_score = max(grid, key=lambda one: one.row[metric])
    accuracies, scores = [one.cell.accuracy for one in grid], [one.row[metric] for one in grid]
    cells = [one.cell for one in grid if estimates.runs_with_values(one.cell, values)]
    compared = None
    if by_accuracy.cell in cells and len(cells) > 1:
        best, of_best = best_by_score(cells, values)
        compared = estimates.compare_cells(best, by_accuracy.cell, values | of_best)
    columns = estimates.comparison_columns(compared, has_rate=False)
    return {
        "loss": name,
        "cells": len(grid),
        **rank_correlation(accuracies, scores),
        "by_accuracy": by_accuracy.row["label"],
        "by_accuracy_score": by_accuracy.row[metric],
        "by_score": by_score.row["label"],
        "by_score_score": by_score.row[metric],
        "rank_of_selected": 1 + sum(score > by_accuracy.row[metric] for score in scores),
        "apparent_cost": by_score.row[metric] - by_accuracy.row[metric],
        "cost": columns.pop("estimate"),
        **columns,
    }


def rank_correlation(a: list[float], b: list[float]) -> dict:
    """Spearman's correlation over cells, with the 95 % interval of Bonett and Wright (2000), which
    takes the cells to be independent; None below FEWEST_CELLS cells or without variation.
    """
    names = ("spearman", "spearman_low", "spearman_high")
    a, b = (stats.without_rounding(np.array(values)) for values in (a, b))
    if len(a) < FEWEST_CELLS or np.ptp(a) == 0 or np.ptp(b) == 0:
        return dict.fromkeys(names)
    rho = float(scipy_stats.spearmanr(a, b).statistic)
    if not abs(rho) < 1:
        return dict(zip(names, (rho, None, None)))
    half = -special.ndtri(stats.ALPHA / 2) * math.sqrt((1 + rho**2 / 2) / (len(a) - 3))
    return dict(zip(names, (rho, *(math.tanh(math.atanh(rho) + s * half) for s in (-1, 1)))))


# ---- the best by score, without flattery --------------------------------------------------------


def best_by_score(cells: list[Cell], values: Values) -> tuple[Cell, Values]:
    """A cell, and its values, that has for each seed and half of the questions those of the cell
    whose other seeds score best on the other half.

    Seeds and questions are those that all of `cells` have.
    """
    by_cell = [estimates.runs_with_values(cell, values) for cell in cells]
    seeds = sorted(set.intersection(*map(set, by_cell)), key=str)
    units = estimates.shared_parts([values[run] for runs in by_cell for run in runs.values()])
    runs, found = [], {}
    for seed in seeds:
        others = [other for other in seeds if other != seed] or [seed]
        of_seed = {}
        for half, rest in halves(units):
            scores = [mean_score(values, (own[s] for s in others), units, rest) for own in by_cell]
            best = by_cell[int(np.argmax(scores))][seed]
            of_seed |= {unit: {0: score_of(values, best, unit, units)} for unit in half}
        name = f"best by score, seed {seed}"
        runs.append(
            replace(cells[0].runs[0], run_id=name, args=cells[0].runs[0].args | {"seed": seed})
        )
        found[name] = of_seed
    return replace(cells[0], runs=runs, label="best by score"), found


def halves(units: dict) -> list[tuple[list, list]]:
    """(a half, the other one), both ways. Drawn at random, always the same: neighbouring questions
    may be of the same kind, and every other one too.
    """
    order = sorted(units, key=str)
    random.Random(0).shuffle(order)
    middle = len(order) // 2
    return [(order[:middle], order[middle:]), (order[middle:], order[:middle])]


def mean_score(values: Values, run_ids: Iterable[str], units: dict, chosen: list) -> float:
    """Mean of runs' scores on the chosen units; 0 of none."""
    scores = [score_of(values, run_id, unit, units) for run_id in run_ids for unit in chosen]
    return fmean(scores) if scores else 0.0


def score_of(values: Values, run_id: str, unit, units: dict) -> float:
    return estimates.mean_of_parts(values[run_id][unit], units[unit])
