"""Figures of scores: how good is each cell, by validation accuracy or by what a judge says?

draw_bars        the mean of every cell, next to the untrained model and the baseline
draw_boxes       every run, by loss: how much do beta, tau and the seed matter?
draw_categories  a benchmark by category, for the cell of each loss that validation selects

Each figure says below its title what its error bars are.
"""

from pathlib import Path
from statistics import median

from pref.analysis.figure_parts import Look, add_legend_below, distinct, span, width_for
from pref.analysis.table_parts import order_categories
from pref.files import drawing


def draw_bars(stem: Path, rows: list[dict], look: Look, reference_lines: dict[str, float]) -> None:
    """One row per cell with its number. The error bar is the SD over seeds, or the SE of one seed.

    rows: of "cells" in aggregated_metrics.json. reference_lines: name -> value, drawn across.
    """
    height = 0.75 + 0.21 * len(rows) + 0.2 * (len(reference_lines) + 1)
    width = width_for(row["label"] for row in rows)
    figure = drawing.new_figure(width, height, look.headed("{} by cell"), look.notes)
    axis = figure.subplots()

    # 1) A point for each cell, with its number to the right of the panel.
    ends = list(reference_lines.values())
    for y, row in enumerate(rows):
        score, (error, label) = row[look.metric], error_bar(row, look)
        axis.text(1.02, y, bar_text(row, look, error), **beside(axis))
        if score is None:
            continue
        style = look.styles.points(row["loss"], row["tau"], row["settings"])
        axis.plot(score, y, **style, markersize=6)
        ends += [score - (error or 0), score + (error or 0)]
        if error is not None:
            thin = 0.8 if row["n_seeds"] == 1 else 1.8
            axis.errorbar(score, y, xerr=error, fmt="none", ecolor="black", elinewidth=thin)
            axis.plot([], [], color="black", linewidth=thin, label=label)

    # 2) The lines that they are read against.
    for (name, value), dashes in zip(reference_lines.items(), ("--", ":", "-.")):
        label = f"{name}: {value:.{look.digits}f}"
        axis.axvline(value, color="black", linewidth=1.1, linestyle=dashes, label=label, zorder=0)

    axis.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    axis.set_xlim(*span(ends or [0.0], look.limits))
    axis.set_xlabel(look.label)
    axis.grid(alpha=0.25)
    axis.tick_params(axis="y", length=0)
    add_legend_below(figure, [axis], ncols=1)
    drawing.save_figure(figure, stem)


def beside(axis, fontsize: float = 8.5) -> dict:
    """Arguments of a text whose x is a share of the panel's width and whose y is that of a row."""
    transform = axis.get_yaxis_transform()
    return {"transform": transform, "va": "center", "fontsize": fontsize}


def error_bar(row: dict, look: Look) -> tuple[float | None, str]:
    """Half the length of a cell's error bar, and its label."""
    if row["n_seeds"] > 1:
        return row[f"{look.metric}_sd"], "error bar: SD over seeds"
    label = f"error bar, thin: SE over {look.se_over} (one seed)"
    return row[f"se_over_{look.se_over}"], label


def bar_text(row: dict, look: Look, error: float | None) -> str:
    """E.g. "7.00 ± 1.00  n=3, 1 diverged"."""
    diverged = f"{row['n_diverged']} diverged" if row["n_diverged"] else ""
    if row[look.metric] is None:
        return f"none: {diverged}" if diverged else "none"
    spread = f" ± {error:.{look.digits}f}" if error is not None else ""
    seeds = "" if row["untrained"] else f"  n={row['n_seeds']}"
    return f"{row[look.metric]:.{look.digits}f}{spread}{seeds}" + (diverged and f", {diverged}")


def draw_boxes(stem: Path, runs: list[dict], look: Look) -> None:
    """The value of every run as a point, by loss, over a box with their quartiles and median.

    runs: of "runs" in aggregated_metrics.json, each with a loss and a value.
    """
    values_of: dict[str, list[float]] = {}
    for run in runs:
        values_of.setdefault(run["loss"], []).append(run["value"])
    notes = [
        *look.notes,
        "In brackets: runs. Box: quartiles over cells and seeds; line and number: median.",
    ]
    n = len(values_of)
    figure = drawing.new_figure(drawing.HALF, 0.8 + 0.42 * n, look.headed("{} of every run"), notes)
    axis = figure.subplots()
    whole_range = {"whis": (0, 100), "showfliers": False, "orientation": "horizontal"}
    black_median = {"medianprops": {"color": "black"}}
    axis.boxplot(list(values_of.values()), widths=0.6, **whole_range, **black_median)
    for i, (loss, values) in enumerate(values_of.items()):
        # Boxes stand at 1, 2, ...; points are spread sideways, but the same way every time.
        y = i + 1
        offsets = [y - 0.18 + 0.36 * (k % 7) / 6 for k in range(len(values))]
        axis.plot(values, offsets, **look.styles.points(loss), alpha=0.7, markersize=4.5)
        axis.text(1.02, y, f"{median(values):.{look.digits}f}", **beside(axis))
    names = [f"{loss} ({len(values)})" for loss, values in values_of.items()]
    axis.set_yticks(range(1, n + 1), names)
    axis.set_ylim(n + 0.5, 0.5)  # the first loss on top
    axis.set_xlim(*span([run["value"] for run in runs], look.limits))
    axis.set_xlabel(look.label)
    axis.grid(axis="x", alpha=0.25)
    axis.tick_params(axis="y", length=0)
    drawing.save_figure(figure, stem)


def draw_categories(stem: Path, part: dict, look: Look) -> None:
    """Scores by category, for the untrained model and the cell of each loss that validation
    selects; without a selection, for the first six cells. The table has all cells.

    part: of one judge in aggregated_metrics.json, with "categories".
    """
    labels = [row["label"] for row in part["cells"] if row["untrained"]]
    labels += [row["selected"] for row in part["selection"]]
    labels = distinct(labels) or [row["label"] for row in part["cells"]][:6]
    rows = [row for row in part["categories"] if row["label"] in labels]
    categories = order_categories(rows)
    notes = [
        *look.notes,
        "The cell of each loss that validation selects; error bar: SD over seeds.",
    ]
    height = 1.0 + 0.32 * len(categories) + 0.1 * len(labels)
    figure = drawing.new_figure(drawing.HALF, height, look.headed("{} by category"), notes)
    axis = figure.subplots()
    ends = []
    for k, label in enumerate(labels):
        own = [row for row in rows if row["label"] == label and row["score"] is not None]
        if not own:
            continue
        # Side by side within a category, so that no point hides another.
        aside = 0.56 * (k / (len(labels) - 1) - 0.5) if len(labels) > 1 else 0.0
        places = [categories.index(row["category"]) + aside for row in own]
        scores = [row["score"] for row in own]
        errors = [row["score_sd"] or 0.0 for row in own]
        style = look.styles.points(own[0]["loss"], own[0]["tau"], own[0]["settings"])
        if own[0]["untrained"]:
            style |= {"marker": "*"}
        axis.errorbar(scores, places, xerr=errors, **style, markersize=5, elinewidth=1, label=label)
        ends += [score + sign * sd for score, sd in zip(scores, errors) for sign in (-1, 1)]
    axis.set_yticks(range(len(categories)), categories)
    axis.set_ylim(len(categories) - 0.5, -0.5)  # the first category on top
    for edge in range(1, len(categories)):
        axis.axhline(edge - 0.5, color=drawing.GREY, linewidth=0.5, alpha=0.4)
    axis.set_xlim(*span(ends or [0.0], look.limits))
    axis.set_xlabel(look.label)
    axis.grid(axis="x", alpha=0.25)
    axis.tick_params(axis="y", length=0)
    add_legend_below(figure, [axis], ncols=2)
    drawing.save_figure(figure, stem)
