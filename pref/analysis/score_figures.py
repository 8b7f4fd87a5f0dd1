"""Figures of scores: how good is each cell, by validation accuracy or by MT-Bench?

draw_bars        the mean of every cell, next to the untrained model and the baseline
draw_boxes       every run, by loss: how much do beta, tau and the seed matter?
draw_categories  MT-Bench by category, for the cell of each loss that validation selects

Each number is written next to its bar, box or row, and each figure names what its error bars are.
"""

import math
import textwrap
from pathlib import Path
from statistics import median

from pref.analysis.figure_parts import Look, add_legend_below, distinct, series_style
from pref.files import drawing, mt_bench


def draw_bars(stem: Path, rows: list[dict], look: Look, reference_lines: dict[str, float]) -> None:
    """One bar per cell with its number. The error bar is the SD over seeds, or the SE of one seed.

    rows: of "cells" in aggregated_metrics.json. reference_lines: name -> value, drawn across.
    """
    figure = drawing.new_figure(10, 2.3 + 0.3 * len(rows), look.title)
    axis = figure.subplots()

    # 1) The bars, with their numbers to the right of the panel.
    losses = distinct(row["loss"] for row in rows if not row["untrained"])
    for y, row in enumerate(rows):
        colour = drawing.GREY
        if not row["untrained"]:
            colour = drawing.COLOURS[losses.index(row["loss"]) % len(drawing.COLOURS)]
        axis.barh(y, row[look.metric] or 0, height=0.7, color=colour, alpha=0.85)
        error, style = error_bar(row, look)
        if error is not None:
            style |= {"color": "black", "capsize": 3, "fmt": "none"}
            axis.errorbar(row[look.metric], y, xerr=error, **style)
        text_style = {"transform": axis.get_yaxis_transform(), "va": "center", "fontsize": 9}
        axis.text(1.01, y, bar_text(row, look, error), **text_style)

    # 2) The lines that the bars are read against.
    for (name, value), dashes in zip(reference_lines.items(), ("--", ":", "-.")):
        label = f"{name}: {value:.{look.digits}f}"
        axis.axvline(value, color="black", linewidth=1.2, linestyle=dashes, label=label)

    axis.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=9)
    axis.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    axis.set_xlim(*look.limits)
    axis.set_xlabel(look.label)
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)
    add_legend_below(figure, [axis], ncols=1, fontsize=9)
    drawing.save_figure(figure, stem)


def limits_of(values: list[float]) -> tuple[float, float]:
    """The axis of a score without limits of its own: from 0, or from below it, to beyond the
    largest value.
    """
    low, high = min([0.0, *values]), max([0.0, *values])
    room = 0.1 * (high - low) or 1.0
    return (low - room if low < 0 else 0.0), (high + room if high > 0 else 0.0)


def error_bar(row: dict, look: Look) -> tuple[float | None, dict]:
    """Half the length of a cell's error bar, and its style and label."""
    if row["n_seeds"] > 1:
        return row[f"{look.metric}_sd"], {"label": "error bar: SD over seeds", "elinewidth": 1.6}
    label = f"error bar, thin: SE over {look.se_over} (one seed)"
    return row[f"se_over_{look.se_over}"], {"label": label, "elinewidth": 0.7}


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
    title = f"{look.title}\nevery run; box: quartiles over its cells and seeds"
    figure = drawing.new_figure(2.5 + 1.5 * len(values_of), 4.8, title)
    axis = figure.subplots()
    whole_range = {"whis": (0, 100), "showfliers": False}
    black_median = {"medianprops": {"color": "black"}}
    axis.boxplot(list(values_of.values()), widths=0.5, **whole_range, **black_median)
    for i, values in enumerate(values_of.values()):
        # Boxes stand at 1, 2, ...; points are spread sideways, but the same way every time.
        x = i + 1
        offsets = [x - 0.12 + 0.24 * (k % 7) / 6 for k in range(len(values))]
        axis.plot(offsets, values, linestyle="", alpha=0.7, markersize=5, **series_style(i))
        middle = median(values)
        axis.annotate(f"{middle:.{look.digits}f}", (x + 0.28, middle), fontsize=8, va="center")
    names = [f"{loss}\n({len(values)} runs)" for loss, values in values_of.items()]
    axis.set_xticks(range(1, len(names) + 1), names, fontsize=9)
    axis.set_xlim(0.4, len(names) + 0.75)
    axis.set_ylabel(look.label)
    axis.grid(axis="y", alpha=0.25)
    drawing.save_figure(figure, stem)


def draw_categories(stem: Path, judge: dict, title: str) -> None:
    """MT-Bench by category, as a radar and as a table, for the untrained model and the cell of each
    loss that validation selects; without a selection, for the first six cells.

    judge: of "mt_bench" in aggregated_metrics.json.
    """
    labels = [row["label"] for row in judge["cells"] if row["untrained"]]
    labels += [row["selected"] for row in judge["selection"]]
    labels = labels or [row["label"] for row in judge["cells"]][:6]
    rows_of = {  # label -> category -> row
        label: {row["category"]: row for row in judge["categories"] if row["label"] == label}
        for label in labels
    }
    names = {name for rows in rows_of.values() for name in rows}
    categories = [name for name in mt_bench.CATEGORIES if name in names]
    categories += sorted(names - set(categories))

    title = f"{title}\nby category: the cell of each loss that validation selects"
    figure = drawing.new_figure(13, 5.2, title)
    left, right = figure.add_gridspec(1, 2, width_ratios=[1, 1.5])
    radar = figure.add_subplot(left, projection="polar")
    draw_radar(radar, rows_of, categories)
    draw_category_table(figure.add_subplot(right), rows_of, categories)
    add_legend_below(figure, [radar], ncols=3)
    drawing.save_figure(figure, stem)


def draw_radar(axis, rows_of: dict[str, dict[str, dict]], categories: list[str]) -> None:
    """A closed line per label; a category without a score is a gap.

    rows_of: label -> category -> row.
    """
    angles = [2 * math.pi * i / len(categories) for i in range(len(categories))]
    for i, (label, rows) in enumerate(rows_of.items()):
        scores = [rows[name]["score"] if name in rows else None for name in categories]
        values = [math.nan if score is None else score for score in scores]
        closed = [*angles, angles[0]], [*values, values[0]]
        axis.plot(*closed, linewidth=1.3, markersize=4, label=label, **series_style(i))
    axis.set_xticks(angles, categories, fontsize=8)
    axis.tick_params(axis="x", pad=9)
    axis.set_ylim(0, 10)
    axis.tick_params(axis="y", labelsize=7)


def draw_category_table(axis, rows_of: dict[str, dict[str, dict]], categories: list[str]) -> None:
    """The numbers of the radar. rows_of: label -> category -> row."""
    axis.axis("off")
    cells = [[category_text(rows.get(name)) for name in categories] for rows in rows_of.values()]
    labels = [textwrap.fill(label, 26) for label in rows_of]
    headers = {"rowLabels": labels, "colLabels": categories}
    table = axis.table(cells, **headers, loc="center", cellLoc="center")
    table.auto_set_font_size(False)
    table.set_fontsize(7.5)
    table.scale(1, 1.9)
    axis.set_title("mean over seeds; (-n): n judgements without a score", fontsize=8)


def category_text(row: dict | None) -> str:
    if row is None or row["score"] is None:
        return "-"
    unscored = row["n_judged"] - row["n_scored"]
    return f"{row['score']:.2f}" + (f"\n(-{unscored})" if unscored else "")
