"""Scores of two losses at the same KL to the base model, by interpolation over beta.

A loss is better if it scores more at the same distance; at its best beta it may only have gone
further. A curve is a loss at one tau and one set of other settings, over its betas; where there is
one beta alone, over the learning rates, for example drawn ones.

1. For each seed, the runs of a curve are sorted by their KL. Between two neighbours the score is
   taken to be linear in KL. Nothing is extrapolated, and the untrained model is no point of it.
2. Two curves are compared at KLs that all of their seeds reach: at a quarter, half and three
   quarters of the common range, in the root of the KL, with which scores rise about linearly
   (Gao et al. 2022).
3. The interpolated score is a weighted mean of two runs. So is its value for a question, and the
   toolkit's test of questions and seeds applies (estimates.compare_cells).
4. A run's KL is an estimate too. If a question's answers are further away than the average, the run
   seems to have gone further, and its score belongs to a smaller KL: the value of a question is
   lowered by the curve's slope times its excess of KL. On average that changes nothing; in the
   error, it counts what is not known of the KL.
"""

from collections import defaultdict
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from pref.analysis import cell_rows, estimates, run_metrics, stats
from pref.analysis.runs import Cell, Run, Values

RATE = "learning_rate"
PLACES = (0.25, 0.5, 0.75)  # of the common range, in the root of the KL


class Point(NamedTuple):
    """A run of a curve: score and KL on the same questions, in the same order."""

    run: Run
    scores: np.ndarray  # (Q,)
    distances: np.ndarray  # (Q,) nats an answer

    @property
    def kl(self) -> float:
        return float(self.distances.mean())


Curve = dict[float, list[Point]]  # seed -> its runs in order of KL


class Between(NamedTuple):
    """The two neighbours of a KL, and the weight of the further one."""

    near: Point
    far: Point
    weight: float


def rows(cells: list[Cell], bench: str, values: Values, baseline: str) -> list[dict]:
    """Each curve of the other losses against the baseline's curve that differs in the fewest
    settings, at three KLs; one row that says why where the two cannot be compared.

    bench: whose answers were scored. p_adjusted: Holm over all rows.
    """
    with_values = [cell for cell in cells if estimates.runs_with_values(cell, values)]
    curves = {name: curve for name, curve in list_curves(with_values).items() if len(curve) > 1}
    references = {curve[0]: name for name, curve in curves.items() if curve[0].loss == baseline}
    found = []
    for name, curve in curves.items():
        if not references or curve[0].loss == baseline:
            continue
        other = references[estimates.nearest(curve[0], list(references))[0]]
        found += compare_series({name: curve, other: curves[other]}, bench, values)
    tested = stats.holm([float("nan") if row["p"] is None else row["p"] for row in found])
    return [row | {"p_adjusted": estimates.finite(p)} for row, p in zip(found, tested)]


def list_curves(cells: list[Cell]) -> dict[str, list[Cell]]:
    """Name -> cells of a curve, such as "td_dpo τ=2"; the untrained model is in none."""
    over_beta: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        if not cell.untrained:
            name = cell_rows.cell_label(cell.loss, None, cell.tau, cell.settings)
            over_beta[name].append(cell)
    found: dict[str, list[Cell]] = defaultdict(list)
    for name, curve in over_beta.items():
        first = curve[0]
        if len(curve) == 1 and RATE in first.settings:
            others = {key: value for key, value in first.settings.items() if key != RATE}
            label = cell_rows.cell_label(first.loss, first.beta, first.tau, others)
            found[f"{label} over {RATE}"] += curve
        else:
            found[name] += curve
    return dict(found)


def compare_series(pair: dict[str, list[Cell]], bench: str, values: Values) -> list[dict]:
    """The rows of one curve against the baseline's. pair: the two of `list_curves`, by name."""
    (name, other), (ours, theirs) = pair, pair.values()
    facts = {
        **{key: getattr(ours[0], key) for key in ("loss", "tau")},
        "curve": name,
        "baseline": other,
        "differs_in": estimates.differences_text(ours[0], theirs[0]),
    }

    def row(kl=None, score=None, baseline_score=None, compared=None, why=None) -> dict:
        scores = {"kl": kl, "score": score, "baseline_score": baseline_score}
        columns = estimates.comparison_columns(compared, has_rate=False)
        return facts | scores | columns | {"why": why}

    questions = shared_questions([*ours, *theirs], bench, values)
    curves = [make_curve(one, bench, values, questions) for one in (ours, theirs)]
    ranges = dict(zip(pair, map(range_of, curves)))
    if lacking := [one for one, span in ranges.items() if span is None]:
        return [row(why=f"{lacking[0]}: no KL that all of its seeds reach, from below and above")]
    low, high = max(span[0] for span in ranges.values()), min(span[1] for span in ranges.values())
    if not low < high:
        reached = [f"{one} {span[0]:.2f} to {span[1]:.2f}" for one, span in ranges.items()]
        return [row(why=f"no common range of KL: {' and '.join(reached)} nats")]
    found = []
    for kl in common_distances(low, high):
        (a, of_a), (b, of_b) = (
            cell_at(one, series[0], curve, kl, questions)
            for (one, series), curve in zip(pair.items(), curves)
        )
        compared = estimates.compare_cells(a, b, of_a | of_b)
        means = (float(estimates.cell_table(*one).mean()) for one in ((a, of_a), (b, of_b)))
        found.append(row(kl, *means, compared))
    return found


def common_distances(low: float, high: float) -> list[float]:
    """PLACES of the range, to three digits where these still lie in it. A KL near 0 may have been
    estimated below 0, where there is no root.
    """
    power = 2 if low >= 0 else 1
    low_root, high_root = (end ** (1 / power) for end in (low, high))
    exact = [(low_root + place * (high_root - low_root)) ** power for place in PLACES]
    short = [float(f"{kl:.3g}") for kl in exact]
    return [b if low <= b <= high else a for a, b in zip(exact, short)]


# ---- curves -------------------------------------------------------------------------------------


def shared_questions(cells: list[Cell], bench: str, values: Values) -> dict[int, set]:
    """question -> parts of it that all runs with a KL have a score of; and that have a KL in all
    of them.
    """
    runs = [run for cell in cells for run in measured(cell, bench, values)]
    if not runs:
        return {}
    parts = estimates.shared_parts([values[run.run_id] for run in runs])
    with_kl = set.intersection(*(set(distances(run, bench)) for run in runs))
    return {question: of_one for question, of_one in parts.items() if question in with_kl}


def measured(cell: Cell, bench: str, values: Values) -> list[Run]:
    return [run for run in cell.runs if values.get(run.run_id) and run.bench(bench).kl]


def distances(run: Run, bench: str) -> dict[int, float]:
    return run_metrics.kl_by_question(run.bench(bench).answers)


def make_curve(series: list[Cell], bench: str, values: Values, questions: dict[int, set]) -> Curve:
    """The runs of a series by seed, in order of KL, of seeds with at least two; empty if the runs
    share no question.
    """
    curve: Curve = {}
    for cell in series if questions else ():
        for run in measured(cell, bench, values):
            of_run, far = values[run.run_id], distances(run, bench)
            scores = [estimates.mean_of_parts(of_run[q], parts) for q, parts in questions.items()]
            point = Point(run, np.array(scores), np.array([far[q] for q in questions]))
            curve.setdefault(run.seed, []).append(point)
    return {
        seed: sorted(points, key=lambda point: point.kl)
        for seed, points in curve.items()
        if len(points) > 1
    }


def range_of(curve: Curve) -> tuple[float, float] | None:
    """The KLs that all seeds reach; None if there are none."""
    if not curve:
        return None
    low = max(points[0].kl for points in curve.values())
    high = min(points[-1].kl for points in curve.values())
    return (low, high) if low < high else None


def between(points: list[Point], kl: float) -> Between:
    """points: in order of KL, from at most `kl` to at least `kl`."""
    place = int(np.searchsorted([point.kl for point in points], kl))
    far = points[min(max(place, 1), len(points) - 1)]
    near = points[min(max(place, 1), len(points) - 1) - 1]
    gap = far.kl - near.kl
    return Between(near, far, (kl - near.kl) / gap if gap > 0 else 0.5)


def interpolated(points: list[Point], kl: float) -> np.ndarray:
    """(Q,) values of the questions at a KL, whose mean is the interpolated score. The module's
    docstring says why a question's excess of KL lowers its value.

    points: as for `between`.
    """
    near, far, weight = between(points, kl)
    gap = far.kl - near.kl
    slope = (far.scores.mean() - near.scores.mean()) / gap if gap > 0 else 0.0
    excess = (1 - weight) * (near.distances - near.kl) + weight * (far.distances - far.kl)
    return (1 - weight) * near.scores + weight * far.scores - slope * excess


def cell_at(
    name: str, cell: Cell, curve: Curve, kl: float, questions: dict[int, set]
) -> tuple[Cell, Values]:
    """A cell whose runs are the curve's seeds at this KL, and the values of its questions. name: of
    the curve, of which `cell` is one.
    """
    runs, values = [], {}
    for seed, points in curve.items():
        run_id = f"{name}, seed {seed}, at KL {kl!r}"
        runs.append(replace(points[0].run, run_id=run_id))
        at_kl = interpolated(points, kl)
        values[run_id] = {q: {0: float(value)} for q, value in zip(questions, at_kl)}
    return replace(cell, runs=runs, label=f"{name} at KL {kl:g}"), values
