"""Figures of curves and grids: how does a result depend on step, beta, tau and distance?

draw_learning_curves  accuracy, margin, loss and gradient norm over optimiser steps, by loss
draw_heatmaps         a score over beta x tau
draw_beta_curves      a score over beta, with its interval
draw_movement         accuracy and score of each run over its distance from the reference
"""

import math
import textwrap
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from pref.analysis.figure_parts import (
    INTERVAL,
    UNTRAINED,
    Look,
    Styles,
    add_legend_below,
    distinct,
    draw_cells,
    draw_untrained,
    legend_keys,
    scale_beta,
    scale_distance,
    tau_text,
)
from pref.analysis.run_figures import Points, points
from pref.analysis.runs import Run
from pref.files import drawing

# ---- over optimiser steps -----------------------------------------------------------------------


class CurvePanel(NamedTuple):
    source: str  # of the run: "evals" or "steps"
    key: str  # in metrics.jsonl
    label: str


CURVE_PANELS = (
    CurvePanel("evals", "eval/acc_ref", "validation acc_ref"),
    CurvePanel("steps", "margin/rho", "training margin rho (nats)"),
    CurvePanel("steps", "loss", "training loss"),
    CurvePanel("steps", "grad_norm", "gradient norm"),
)
MOST_POINTS = 60  # of a training curve: more are a blur at the size at which they are shown
COMPARABLE = ("eval/acc_ref", "margin/rho")  # the same scale for all losses


def has_curve(run: Run) -> bool:
    """Whether a run belongs in `draw_learning_curves`."""
    return not run.untrained and bool(run.steps or run.evals)


def draw_learning_curves(stem: Path, runs: list[Run], styles: Styles) -> None:
    """A column of panels per loss and a line per run, its shade for beta, its dashes for tau.

    runs: those of `has_curve`.
    """
    losses = distinct(run.loss for run in runs)
    notes = ["One line a run; loss and gradient are not comparable between losses."]
    if any(len(run.steps) > MOST_POINTS for run in runs):
        notes.append(f"Training: means over 1/{MOST_POINTS} of the steps each.")
    width = max(drawing.HALF if len(losses) == 1 else drawing.WIDE, 1.9 * len(losses))
    figure = drawing.new_figure(width, 8, "Learning curves by loss", notes)
    axes = figure.subplots(len(CURVE_PANELS), len(losses), squeeze=False, sharex=True)
    for panel, row in zip(CURVE_PANELS, axes):
        for axis in row[1:] if panel.key in COMPARABLE else ():
            axis.sharey(row[0])

    betas = sorted({run.beta for run in runs if run.beta is not None})
    for run in runs:
        colour = styles.colour(run.loss)
        if run.beta is not None:
            colour = styles.shade(run.loss, betas.index(run.beta), len(betas))
        style = {"color": colour, "linestyle": styles.dashes(run.tau), "linewidth": 1}
        for panel, axis in zip(CURVE_PANELS, axes[:, losses.index(run.loss)]):
            curve = points(getattr(run, panel.source), panel.key)
            # A dot for each evaluation; of training, only where a line would show nothing.
            marker = "." if panel.source == "evals" or len(curve.steps) == 1 else None
            axis.plot(*thinned(curve), marker=marker, **style)

    for loss, column in zip(losses, axes.T):
        top, bottom = column[0], column[-1]
        top.set_title(loss)
        bottom.set_xlabel("optimiser step")
    for panel, row in zip(CURVE_PANELS, axes):
        leftmost = row[0]
        leftmost.set_ylabel(panel.label)
        if panel.key == "grad_norm":
            for axis in row:
                shown = [value for line in axis.get_lines() for value in line.get_ydata()]
                drawing.plain_log(axis.yaxis, shown)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    figure.align_ylabels(axes[:, 0])
    dashes = legend_keys(styles, [], [run.tau for run in runs])
    for key in dashes:
        key.set_marker("")
    add_legend_below(figure, [], ncols=8, more=shade_keys(styles, betas) + dashes)
    drawing.save_figure(figure, stem)


def thinned(curve: Points) -> Points:
    """At most MOST_POINTS points: means of as many steps each, NaN where one of them is."""
    if len(curve.steps) <= MOST_POINTS:
        return curve
    size = math.ceil(len(curve.steps) / MOST_POINTS)
    starts = range(0, len(curve.steps), size)
    return Points(*([mean(values[i : i + size]) for i in starts] for values in curve))


def shade_keys(styles: Styles, betas: list[float]) -> list:
    """Lines in shades of grey that explain those of each loss's colour."""
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color=styles.shade(None, k, len(betas)), linewidth=3, label=f"β={beta:g}")
        for k, beta in enumerate(betas)
    ]


# ---- over beta x tau ----------------------------------------------------------------------------


class Grid(NamedTuple):
    """The cells of one panel share these."""

    loss: str
    settings: str | None  # besides beta and tau, e.g. "learning_rate=1e-05"


def find_grids(rows: list[dict], metric: str) -> dict[Grid, list[dict]]:
    """The cells of each grid with more than one; empty if no cell has a score."""
    grids: dict[Grid, list[dict]] = {}
    for row in rows:
        if row["beta"] is not None:
            grids.setdefault(Grid(row["loss"], row["settings"]), []).append(row)
    grids = {grid: cells for grid, cells in grids.items() if len(cells) > 1}
    scored = any(row[metric] is not None for cells in grids.values() for row in cells)
    return grids if scored else {}


def draw_heatmaps(stem: Path, grids: dict[Grid, list[dict]], look: Look) -> None:
    """A panel per grid with beta down and tau across, all on one colour scale.

    grids: of `find_grids`.
    """
    every = [row for cells in grids.values() for row in cells]
    betas = axis_values(every, "beta")  # the same rows in all panels
    widths = [len(axis_values(cells, "tau")) for cells in grids.values()]
    width = drawing.HALF if sum(widths) <= 6 else max(drawing.WIDE, 0.9 * sum(widths))
    notes = [*look.notes, "Mean ± SD over seeds (n: seeds). Yellow: high. Empty: not run."]
    title = look.headed("{} over β and τ")
    figure = drawing.new_figure(width, 0.9 + 0.56 * len(betas), title, notes)
    panels = {"squeeze": False, "width_ratios": widths, "sharey": True}
    axes = list(figure.subplots(1, len(grids), **panels).flat)

    scores = [row[look.metric] for row in every if row[look.metric] is not None]
    low, high = min(scores), max(scores)
    high = high if high > low else low + 1
    for axis, (grid, cells) in zip(axes, grids.items()):
        draw_heatmap(axis, cells, betas, look, low, high)
        axis.set_title(grid.loss + (f"\n{grid.settings}" if grid.settings else ""))
    axes[0].set_ylabel("β")
    drawing.save_figure(figure, stem)


def axis_values(cells: list[dict], name: str) -> list[float | None]:
    """The different values of beta or tau, ascending; None comes first."""
    return sorted({row[name] for row in cells}, key=lambda value: (value is not None, value or 0))


def draw_heatmap(
    axis, cells: list[dict], betas: list[float], look: Look, low: float, high: float
) -> None:
    """One panel. betas: its rows. low, high: the ends of the colour scale."""
    taus = axis_values(cells, "tau")
    scores = [[math.nan] * len(taus) for _ in betas]
    for row in cells:
        x, y = taus.index(row["tau"]), betas.index(row["beta"])
        score = row[look.metric]
        colour = "black"
        if score is not None:
            scores[y][x] = score
            colour = "white" if (score - low) / (high - low) < 0.5 else "black"  # on a dark cell
        centred = {"ha": "center", "va": "center", "fontsize": 8.5, "color": colour}
        axis.text(x, y, cell_text(row, look), **centred)
    draw_cells(axis, scores, "cividis", low, high)
    axis.set_xticks(range(len(taus)), ["no τ" if tau is None else f"{tau:g}" for tau in taus])
    axis.set_yticks(range(len(betas)), [f"{beta:g}" for beta in betas])
    axis.set_xlabel("τ" if taus != [None] else "")


def cell_text(row: dict, look: Look) -> str:
    """E.g. "7.00", below it "± 1.00" and "n=3, 1 diverged"."""
    diverged = f"{row['n_diverged']} diverged" if row["n_diverged"] else ""
    score, sd = row[look.metric], row[f"{look.metric}_sd"]
    if score is None:
        return diverged or "none"
    spread = f"± {sd:.{look.digits}f}" if sd is not None else ""
    lines = [f"{score:.{look.digits}f}", spread, f"n={row['n_seeds']}", diverged]
    return "\n".join(filter(None, lines))


# ---- over beta ----------------------------------------------------------------------------------


class Series(NamedTuple):
    """The cells of one line share these."""

    loss: str
    tau: float | None
    settings: str | None

    def label(self) -> str:
        return " ".join(filter(None, (tau_text(self.tau), self.settings)))


def find_series(rows: list[dict], metric: str) -> dict[Series, list[dict]]:
    """The cells of each series in order of beta, where two or more have a score."""
    series: dict[Series, list[dict]] = {}
    for row in rows:
        if row["beta"] is not None and row[metric] is not None:
            key = Series(row["loss"], row["tau"], row["settings"])
            series.setdefault(key, []).append(row)
    return {
        key: sorted(cells, key=lambda row: row["beta"])
        for key, cells in series.items()
        if len(cells) > 1
    }


def draw_beta_curves(
    stem: Path, series: dict[Series, list[dict]], untrained: list[float], look: Look
) -> None:
    """A panel per loss and in it a line per series, with the interval of each point.

    series: of `find_series`. untrained: scores of untrained models, drawn across every panel.
    """
    losses = distinct(key.loss for key in series)
    across = min(3, len(losses))
    down = math.ceil(len(losses) / across)
    notes = [*look.notes, f"Error bar: {INTERVAL}. Axis of β: logarithmic."]
    title, height = look.headed("{} over β"), 0.7 + 2.3 * down
    figure = drawing.new_figure(drawing.HALF, height, title, notes)
    axes = list(figure.subplots(down, across, sharey=True, squeeze=False).flat)
    betas = {row["beta"] for cells in series.values() for row in cells}
    panels = dict(zip(losses, axes))
    for loss, axis in panels.items():
        own = {key: cells for key, cells in series.items() if key.loss == loss}
        for k, (key, cells) in enumerate(own.items()):
            aside = 0.022 * (k - (len(own) - 1) / 2)  # so that error bars do not hide each other
            draw_beta_curve(axis, key, cells, look, aside)
        draw_untrained(axis, untrained)
        axis.set_title(loss)
        scale_beta(axis, betas, (drawing.HALF - 0.6) / across - 0.2)
        axis.set_xlabel("β")
        axis.grid(alpha=0.25)
    for unused in axes[len(panels) :]:
        unused.axis("off")
    for axis in axes[::across]:
        axis.set_ylabel(textwrap.fill(look.label, 27))
    # The same marker stands for a tau in the colour of each loss: the legend's are black.
    keys = [key for axis in axes for key in axis.get_legend_handles_labels()[0]]
    add_legend_below(figure, [], ncols=4, more=beta_keys(look.styles, series, keys))
    drawing.save_figure(figure, stem)


def draw_beta_curve(axis, key: Series, cells: list[dict], look: Look, aside: float) -> None:
    """One line. aside: how far its points are moved, as a share of the range of beta."""
    betas = [row["beta"] for row in cells]
    if betas[0] > 0:
        betas = [beta * (betas[-1] / betas[0]) ** aside for beta in betas]
    scores = [row[look.metric] for row in cells]
    below, above = (
        [0.0 if row[end] is None else abs(row[end] - row[look.metric]) for row in cells]
        for end in ("low", "high")
    )
    style = look.styles.series(*key)
    axis.errorbar(betas, scores, yerr=[below, above], **style, markersize=5, elinewidth=1)


def beta_keys(styles: Styles, series: dict[Series, list[dict]], drawn: list) -> list:
    """Black artists for each tau and setting, and that of the untrained model."""
    from matplotlib.lines import Line2D

    keys = {}
    for key in series:
        style = styles.series(*key) | {"color": "black"}
        if style["markerfacecolor"] != "white":
            style["markerfacecolor"] = "black"
        keys.setdefault(key.label(), Line2D([], [], **style, label=key.label()))
    keys = list(keys.values()) if len(keys) > 1 else []
    return keys + [artist for artist in drawn if artist.get_label() == UNTRAINED][:1]


# ---- over the distance from the reference -------------------------------------------------------

MOVEMENT_LABELS = {
    "kl": "on-policy KL to the base (nats an answer)",
    "anchor": "anchor 0.5 (a² + b²) at the end of training",
    "accuracy": "validation accuracy (best acc_ref)",
}


class MovementPanel(NamedTuple):
    distance: str  # the row's key: "kl" or "anchor"
    gain: str  # the row's key: "accuracy" or "score, <judge>"

    def shows(self, row: dict) -> bool:
        return row[self.distance] is not None and row[self.gain] is not None


def find_movement_panels(rows: list[dict]) -> list[MovementPanel]:
    """Panels for which at least two runs have both values."""
    scores = [key for key in (rows[0] if rows else {}) if key.startswith("score, ")]
    panels = [
        MovementPanel(distance, gain)
        for distance in ("kl", "anchor")
        for gain in ("accuracy", *scores)
    ]
    return [panel for panel in panels if sum(map(panel.shows, rows)) > 1]


def draw_movement(
    stem: Path, rows: list[dict], panels: list[MovementPanel], styles: Styles
) -> None:
    """What each run gained for its distance from the reference, a point per run.

    rows: of "movement" in aggregated_metrics.json. panels: of `find_movement_panels`.
    """
    across = min(2, len(panels))
    down = math.ceil(len(panels) / across)
    title = "Gain of each run against its distance from the reference"
    notes = ["One point a run. Dotted: the untrained model."]
    scores = distinct(panel.gain for panel in panels if panel.gain not in MOVEMENT_LABELS)
    labels = dict(MOVEMENT_LABELS)
    if len(scores) == 1:  # the judge's name is too long for an axis
        labels[scores[0]] = "MT-Bench score"
        notes.insert(0, f"MT-Bench {scores[0]}")
    figure = drawing.new_figure(drawing.HALF, 0.6 + 2.7 * down, title, notes)
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    trained = [row for row in rows if row["loss"] in styles.losses]
    for axis, panel in zip(axes, panels):
        for row in filter(panel.shows, trained):
            style = styles.points(row["loss"], row["tau"])
            axis.plot(row[panel.distance], row[panel.gain], **style, alpha=0.8, markersize=4.5)
        untrained = [row[panel.gain] for row in rows if row not in trained and panel.shows(row)]
        draw_untrained(axis, untrained)
        scale_distance(axis, [row[panel.distance] for row in trained if panel.shows(row)])
        axis.set_xlabel(textwrap.fill(MOVEMENT_LABELS[panel.distance], 28), fontsize=9)
        gain = labels.get(panel.gain, panel.gain)
        axis.set_ylabel(textwrap.fill(gain, 28), fontsize=9)
        axis.grid(alpha=0.25)
    for unused in axes[len(panels) :]:
        unused.axis("off")
    losses = distinct(row["loss"] for row in trained)
    keys = legend_keys(styles, losses, [row["tau"] for row in trained])
    for key in keys:
        key.set_linestyle("")
    add_legend_below(figure, [], ncols=min(4, len(keys)), more=keys)
    drawing.save_figure(figure, stem)
