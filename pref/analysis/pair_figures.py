"""Figures of pairs: does one cell beat another, and by how much?

draw_differences  each loss against the baseline and the untrained model, with interval and p
draw_win_matrix   each cell against each baseline run in pairwise judgements
"""

import math
import textwrap
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from pref.analysis.figure_parts import INTERVAL, Look, distinct, draw_cells, width_for
from pref.files import drawing

COMPARISON_NAMES = {
    "best of grid": "best of each grid against {} (Holm)",
    "matched beta": "at the same β, against {} (BH)",
    "untrained model": "best of each grid against the untrained model, {} (BH)",
}
# Over the line at 0, in a row of its own.
HEADING = {"va": "center", "fontsize": 8.5, "color": "#555555"}
HEADING["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1}


def draw_differences(stem: Path, rows: list[dict], look: Look) -> None:
    """A forest plot: the difference of each pair with its interval, both as numbers too, and the
    adjusted p-value; a heading for each kind of comparison.

    rows: of "improvement" in aggregated_metrics.json, those with an estimate.
    """
    lines = forest_lines(rows)
    notes = [*look.notes, f"Error bar: {INTERVAL}. p: adjusted (Holm or BH)."]
    if all(row["paired"] == "one seed" for row in rows):
        notes.append("One seed each: the interval is over questions or pairs alone.")
    title, height = look.headed("Differences in {}"), 0.6 + 0.21 * len(lines)
    width = width_for(line.text for line in lines if line.row)
    figure = drawing.new_figure(width, height, title, notes)
    axis = figure.subplots()
    for y, line in enumerate(lines):
        if line.row is None:
            if y:
                axis.axhline(y - 0.5, color=drawing.GREY, linewidth=0.6, alpha=0.6)
            axis.text(0, y, line.text, transform=axis.get_yaxis_transform(), **HEADING)
        else:
            draw_difference(axis, y, line.row, look)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(lines)), [line.text if line.row else "" for line in lines])
    axis.set_ylim(len(lines) - 0.4, -0.6)  # the first row on top
    axis.set_xlabel(f"difference of {look.label}")
    axis.grid(axis="x", alpha=0.25)
    axis.tick_params(axis="y", length=0)
    drawing.save_figure(figure, stem)


class Line(NamedTuple):
    text: str
    row: dict | None  # None: a heading


def forest_lines(rows: list[dict]) -> list[Line]:
    """A heading for each kind of comparison, which names what all of its rows are compared with,
    and its rows. A row names its baseline only where it is not clear without.
    """
    lines = []
    for kind in distinct(row["comparison"] for row in rows):
        own = [row for row in rows if row["comparison"] == kind]
        baselines = distinct(row["baseline"] for row in own)
        several = max(Counter(row["proposed"] for row in own).values()) > 1
        common = baselines[0] if len(baselines) == 1 else baselines[0].split()[0]
        lines.append(Line(COMPARISON_NAMES[kind].format(common), None))
        for row in own:
            name = f"{row['proposed']} - {row['baseline']}" if several else row["proposed"]
            lines.append(Line(name, row))
    return lines


def draw_difference(axis, y: float, row: dict, look: Look) -> None:
    low, high = (row["estimate"] if row[key] is None else row[key] for key in ("low", "high"))
    style = look.styles.points(row["loss"], row["tau"])
    axis.errorbar(
        row["estimate"],
        y,
        xerr=[[max(0, row["estimate"] - low)], [max(0, high - row["estimate"])]],
        **style,
        capsize=2,
        markersize=5,
    )
    text = {"transform": axis.get_yaxis_transform(), "va": "center", "fontsize": 8.5}
    axis.text(1.02, y, difference_text(row, look.digits), **text)


def difference_text(row: dict, digits: int) -> str:
    """E.g. "+0.50 [+0.10, +0.90]  p 0.02"."""
    estimate, low, high = (
        "?" if row[key] is None else f"{row[key]:+.{digits}f}"
        for key in ("estimate", "low", "high")
    )
    p = row["p_adjusted"]
    p = "no test" if p is None else "p < 0.0001" if p < 1e-4 else f"p {p:.2g}"
    return f"{estimate} [{low}, {high}]  {p}"


def draw_win_matrix(stem: Path, rows: list[dict]) -> None:
    """Win rate of each cell (row) against each baseline run (column) of each judge, with its
    interval and counts.

    rows: of "pairs" in aggregated_metrics.json.
    """
    labels = distinct(row["label"] for row in rows)
    columns = distinct((row["title"], row["baseline"]) for row in rows)
    notes = ["A tie counts one half; a win must be one in both orders."]
    notes.append(f"In brackets: {INTERVAL}; below: wins / ties / losses.")
    if any(row["smoke_test"] for row in rows):
        notes.append("SMOKE TEST: a judge too small, or with warnings: these rates measure nothing")
    width = width_for(labels) if len(columns) < 4 else drawing.WIDE
    title, height = "Win rates in pairwise judgements", 0.9 + 0.42 * len(labels)
    figure = drawing.new_figure(width, height, title, notes)
    axis = figure.subplots()
    rates = [[math.nan] * len(columns) for _ in labels]
    for row in rows:
        y, x = labels.index(row["label"]), columns.index((row["title"], row["baseline"]))
        rates[y][x] = row["win_rate"]
        low, high = ("?" if row[key] is None else f"{row[key]:.2f}" for key in ("low", "high"))
        interval = f"{row['win_rate']:.2f} [{low}, {high}]"
        counts = f"{row['wins']} / {row['ties']} / {row['losses']}"
        colour = "black" if 0.2 < row["win_rate"] < 0.8 else "white"
        centred = {"ha": "center", "va": "center", "fontsize": 8.5, "color": colour}
        axis.text(x, y, f"{interval}\n{counts}", **centred)
    draw_cells(axis, rates, "PuOr", 0, 1)
    letters = int(13 * width / len(columns)) - 8
    names = [f"{baseline}\n{textwrap.fill(judge, letters)}" for judge, baseline in columns]
    axis.set_xticks(range(len(columns)), names)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_xlabel("against")
    drawing.save_figure(figure, stem)
