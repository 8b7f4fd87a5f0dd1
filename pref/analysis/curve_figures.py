"""Figures of curves and grids: how does a result depend on step, beta, tau and distance?

draw_learning_curves  accuracy, margin, loss and gradient norm over optimiser steps, by loss
draw_heatmaps         a score over beta x tau
draw_beta_curves      a score over beta, with its interval
draw_movement         accuracy and score of each run over its distance from the reference
"""

import math
import textwrap
from pathlib import Path
from typing import NamedTuple

from pref.analysis.figure_parts import INTERVAL, Look, add_legend_below, distinct, series_style
from pref.analysis.run_figures import points
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
COMPARABLE = ("eval/acc_ref", "margin/rho")  # the same scale for all losses


def has_curve(run: Run) -> bool:
    """Whether a run belongs in `draw_learning_curves`."""
    return not run.untrained and bool(run.steps or run.evals)


def draw_learning_curves(stem: Path, runs: list[Run]) -> None:
    """A column of panels per loss and a line per run, its colour for beta, its dashes for tau.

    runs: those of `has_curve`.
    """
    losses = distinct(run.loss for run in runs)
    notes = "one line per run; loss and gradient are not comparable between them"
    title = f"Learning curves by loss ({notes})"
    figure = drawing.new_figure(1.5 + 2.9 * len(losses), 10, title)
    axes = figure.subplots(len(CURVE_PANELS), len(losses), squeeze=False, sharex=True)
    for panel, row in zip(CURVE_PANELS, axes):
        for axis in row[1:] if panel.key in COMPARABLE else ():
            axis.sharey(row[0])

    styles = curve_styles(runs)
    for run, style in zip(runs, styles):
        for panel, axis in zip(CURVE_PANELS, axes[:, losses.index(run.loss)]):
            marker = "." if panel.source == "evals" else None
            records = getattr(run, panel.source)
            axis.plot(*points(records, panel.key), marker=marker, linewidth=1, **style)

    for loss, column in zip(losses, axes.T):
        top, bottom = column[0], column[-1]
        top.set_title(loss, fontsize=10)
        bottom.set_xlabel("optimiser step")
    for panel, row in zip(CURVE_PANELS, axes):
        leftmost = row[0]
        leftmost.set_ylabel(panel.label)
        if panel.key == "grad_norm":
            for axis in row:
                if any(value > 0 for line in axis.get_lines() for value in line.get_ydata()):
                    axis.set_yscale("log")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    figure.align_ylabels(axes[:, 0])
    add_legend_below(figure, axes.flat, ncols=2 + 2 * len(losses))
    drawing.save_figure(figure, stem)


def curve_styles(runs: list[Run]) -> list[dict]:
    """Colour, dashes and label of each run, by its beta and tau among those of all runs."""
    from matplotlib import colormaps

    betas = sorted({run.beta for run in runs if run.beta is not None})
    taus = sorted({run.tau for run in runs if run.tau is not None})
    palette = colormaps["viridis"]
    styles = []
    for run in runs:
        beta, tau = run.beta, run.tau
        colour, label, dashes = drawing.GREY, "no β", "-"
        if beta is not None:
            # From dark to light, without the palest yellow.
            colour = palette(0.05 + 0.85 * betas.index(beta) / max(1, len(betas) - 1))
            label = f"β={beta:g}"
        if tau is not None:
            dashes = ("-", "--", ":", "-.")[taus.index(tau) % 4]
            label += f" τ={tau:g}"
        styles.append({"color": colour, "linestyle": dashes, "label": label})
    return styles


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
    widths = [max(1.6, len(axis_values(cells, "tau"))) for cells in grids.values()]
    height = max(len(axis_values(cells, "beta")) for cells in grids.values())
    size = max(5.5, 1.8 + 1.25 * sum(widths)), 2.2 + max(1.9, 0.62 * height)
    figure = drawing.new_figure(*size, look.title)
    axes = list(figure.subplots(1, len(grids), squeeze=False, width_ratios=widths).flat)

    scores = [row[look.metric] for cells in grids.values() for row in cells]
    scores = [score for score in scores if score is not None]
    low, high = min(scores), max(scores)
    high = high if high > low else low + 1
    for axis, (grid, cells) in zip(axes, grids.items()):
        image = draw_heatmap(axis, cells, look, low, high)
        axis.set_title(grid.loss + (f"\n{grid.settings}" if grid.settings else ""), fontsize=10)
    figure.colorbar(image, ax=axes, label=look.label, shrink=0.9)
    figure.supxlabel("each cell: mean ± SD over seeds (n seeds); empty: not run", fontsize=8)
    drawing.save_figure(figure, stem)


def axis_values(cells: list[dict], name: str) -> list[float | None]:
    """The different values of beta or tau, ascending; None comes first."""
    return sorted({row[name] for row in cells}, key=lambda value: (value is not None, value or 0))


def draw_heatmap(axis, cells: list[dict], look: Look, low: float, high: float):
    """One panel; returns its image. low, high: the ends of the colour scale."""
    betas, taus = axis_values(cells, "beta"), axis_values(cells, "tau")
    scores = [[math.nan] * len(taus) for _ in betas]
    for row in cells:
        x, y = taus.index(row["tau"]), betas.index(row["beta"])
        score = row[look.metric]
        colour = "black"
        if score is not None:
            scores[y][x] = score
            colour = "white" if (score - low) / (high - low) < 0.5 else "black"  # on a dark cell
        centred = {"ha": "center", "va": "center", "fontsize": 8, "color": colour}
        axis.text(x, y, cell_text(row, look), **centred)
    axis.set_xticks(range(len(taus)), ["no tau" if tau is None else f"{tau:g}" for tau in taus])
    axis.set_yticks(range(len(betas)), [f"{beta:g}" for beta in betas])
    for i in range(1, len(betas)):
        axis.axhline(i - 0.5, color="white", linewidth=1.5)
    for i in range(1, len(taus)):
        axis.axvline(i - 0.5, color="white", linewidth=1.5)
    axis.set_xlabel("tau" if taus != [None] else "")
    axis.set_ylabel("beta")
    return axis.imshow(scores, cmap="cividis", vmin=low, vmax=high, aspect="auto")


def cell_text(row: dict, look: Look) -> str:
    """E.g. "7.00 ± 1.00", below it "(n=3, 1 diverged)"."""
    diverged = f"{row['n_diverged']} diverged" if row["n_diverged"] else ""
    score, sd = row[look.metric], row[f"{look.metric}_sd"]
    if score is None:
        return diverged or "none"
    spread = f" ± {sd:.{look.digits}f}" if sd is not None else ""
    counts = ", ".join(filter(None, (f"n={row['n_seeds']}", diverged)))
    return f"{score:.{look.digits}f}{spread}\n({counts})"


# ---- over beta ----------------------------------------------------------------------------------


class Series(NamedTuple):
    """The cells of one line share these."""

    loss: str
    tau: float | None
    settings: str | None

    def label(self) -> str:
        tau = "no τ" if self.tau is None else f"τ={self.tau:g}"
        return " ".join(filter(None, (tau, self.settings)))


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
    """A panel per loss and in it a line per series, with its interval as a band.

    series: of `find_series`. untrained: scores of untrained models, drawn across every panel.
    """
    losses = distinct(key.loss for key in series)
    title = f"{look.title}\nover beta; band: {INTERVAL}"
    figure = drawing.new_figure(1.5 + 3.2 * len(losses), 4.6, title)
    axes = list(figure.subplots(1, len(losses), sharey=True, squeeze=False).flat)
    panels = dict(zip(losses, axes))
    for key, cells in series.items():
        axis = panels[key.loss]
        style = series_style(len(axis.get_lines()))
        betas, scores = [row["beta"] for row in cells], [row[look.metric] for row in cells]
        axis.plot(betas, scores, label=key.label(), **style)
        banded = [row for row in cells if row["low"] is not None]
        axis.fill_between(
            x=[row["beta"] for row in banded],
            y1=[row["low"] for row in banded],
            y2=[row["high"] for row in banded],
            color=style["color"],
            alpha=0.15,
            linewidth=0,
        )
    betas = sorted({row["beta"] for cells in series.values() for row in cells})
    for loss, axis in panels.items():
        for score in untrained:
            axis.axhline(score, color=drawing.GREY, linestyle=":", label="untrained model")
        axis.set_title(loss, fontsize=10)
        axis.set_xscale("log")
        axis.set_xticks(betas, [f"{beta:g}" for beta in betas])
        axis.minorticks_off()
        axis.set_xlabel("beta (log scale)")
        axis.grid(alpha=0.25)
    leftmost = axes[0]
    leftmost.set_ylabel(look.label)
    add_legend_below(figure, axes, ncols=5)
    drawing.save_figure(figure, stem)


# ---- over the distance from the reference -------------------------------------------------------

MOVEMENT_LABELS = {
    "kl": "KL of own answers to the base (nats per answer)",
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


def draw_movement(stem: Path, rows: list[dict], panels: list[MovementPanel]) -> None:
    """What each run gained for its distance from the reference, a point per run.

    rows: of "movement" in aggregated_metrics.json. panels: of `find_movement_panels`.
    """
    losses = distinct(row["loss"] for row in rows)
    n_columns = min(3, len(panels))
    n_rows = math.ceil(len(panels) / n_columns)
    title = "Gain of each run against its distance from the reference (one point per run)"
    figure = drawing.new_figure(1 + 4.2 * n_columns, 1.2 + 3.7 * n_rows, title)
    axes = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
    for axis, panel in zip(axes, panels):
        for i, loss in enumerate(losses):
            shown = [row for row in rows if row["loss"] == loss and panel.shows(row)]
            distances = [row[panel.distance] for row in shown]
            gains = [row[panel.gain] for row in shown]
            axis.plot(distances, gains, linestyle="", alpha=0.8, label=loss, **series_style(i))
        axis.set_xscale("symlog", linthresh=0.1)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")  # text is drawn as it is, without TeX
        axis.set_xlabel(MOVEMENT_LABELS[panel.distance], fontsize=8)
        gain = MOVEMENT_LABELS.get(panel.gain, panel.gain)
        axis.set_ylabel(textwrap.fill(gain, 40), fontsize=8)
        axis.grid(alpha=0.25)
    for unused in axes[len(panels) :]:
        unused.axis("off")
    add_legend_below(figure, axes, ncols=len(losses))
    drawing.save_figure(figure, stem)
