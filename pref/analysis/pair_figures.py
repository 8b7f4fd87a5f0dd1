"""Figures of pairs: does one cell beat another, and by how much?

draw_differences  each loss against the baseline and the untrained model, with interval and p
draw_win_matrix   each cell against each baseline run in pairwise judgements
"""

import math
import textwrap
from pathlib import Path

from pref.analysis.figure_parts import INTERVAL, Look, add_legend_below, distinct, series_style
from pref.files import drawing

COMPARISON_NAMES = {
    "best of grid": "best of grid (headline, Holm)",
    "matched beta": "same beta (BH)",
    "untrained model": "best against the untrained model (BH)",
}


def draw_differences(stem: Path, rows: list[dict], look: Look) -> None:
    """A forest plot: the difference of each pair with its interval, both as numbers too, and the
    adjusted p-value.

    rows: of "improvement" in aggregated_metrics.json, those with an estimate.
    """
    title = f"{look.title}\ndifferences; error bar: {INTERVAL}"
    figure = drawing.new_figure(12, 1.9 + 0.3 * len(rows), title)
    axis = figure.subplots()
    kinds = distinct(row["comparison"] for row in rows)
    for y, row in enumerate(rows):
        style = series_style(kinds.index(row["comparison"]))
        low, high = (row["estimate"] if row[key] is None else row[key] for key in ("low", "high"))
        axis.errorbar(
            row["estimate"],
            y,
            xerr=[[max(0, row["estimate"] - low)], [max(0, high - row["estimate"])]],
            capsize=3,
            fmt=style["marker"],
            color=style["color"],
            label=COMPARISON_NAMES[row["comparison"]],
        )
        text_style = {"transform": axis.get_yaxis_transform(), "va": "center", "fontsize": 8}
        axis.text(1.01, y, difference_text(row, look.digits), **text_style)
    axis.axvline(0, color="black", linewidth=0.8)
    names = [f"{row['proposed']}  -  {row['baseline']}" for row in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    axis.set_xlabel(f"difference of {look.label}")
    axis.grid(axis="x", alpha=0.25)
    add_legend_below(figure, [axis])
    drawing.save_figure(figure, stem)


def difference_text(row: dict, digits: int) -> str:
    """E.g. "+0.50 [+0.10, +0.90]  adjusted p 0.02, one seed"."""
    estimate, low, high = (
        "?" if row[key] is None else f"{row[key]:+.{digits}f}"
        for key in ("estimate", "low", "high")
    )
    p = "no test" if row["p_adjusted"] is None else f"adjusted p {row['p_adjusted']:.2g}"
    one_seed = ", one seed" if row["paired"] == "one seed" else ""
    return f"{estimate} [{low}, {high}]  {p}{one_seed}"


def draw_win_matrix(stem: Path, rows: list[dict]) -> None:
    """Win rate of each cell (row) against each baseline run (column) of each judge, with its
    interval and counts.

    rows: of "pairs" in aggregated_metrics.json.
    """
    labels = distinct(row["label"] for row in rows)
    columns = distinct((row["title"], row["baseline"]) for row in rows)
    title = "Win rate in pairwise judgements (a tie is one half; both orders must agree)"
    if any(row["smoke_test"] for row in rows):
        title += "\nSMOKE TEST: a judge too small, or with warnings: these rates measure nothing"
    title += f"\nin brackets: {INTERVAL}"
    figure = drawing.new_figure(4.5 + 2.4 * len(columns), 2.2 + 0.5 * len(labels), title)
    axis = figure.subplots()
    rates = [[math.nan] * len(columns) for _ in labels]
    for row in rows:
        y, x = labels.index(row["label"]), columns.index((row["title"], row["baseline"]))
        rates[y][x] = row["win_rate"]
        low, high = ("?" if row[key] is None else f"{row[key]:.2f}" for key in ("low", "high"))
        interval = f"{row['win_rate']:.2f} [{low}, {high}]"
        counts = f"{row['wins']} / {row['ties']} / {row['losses']}"
        colour = "black" if 0.2 < row["win_rate"] < 0.8 else "white"
        centred = {"ha": "center", "va": "center", "fontsize": 8, "color": colour}
        axis.text(x, y, f"{interval}\n{counts}", **centred)
    image = axis.imshow(rates, cmap="PuOr", vmin=0, vmax=1, aspect="auto")
    names = [f"{baseline}\n{textwrap.fill(judge, 30)}" for judge, baseline in columns]
    axis.set_xticks(range(len(columns)), names, fontsize=8)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set_xlabel("baseline (wins / ties / losses)")
    figure.colorbar(image, ax=axis, label="win rate", shrink=0.9)
    drawing.save_figure(figure, stem)
