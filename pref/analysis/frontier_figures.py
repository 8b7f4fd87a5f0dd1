"""The figure of a score against the KL to the base model: what is gained for leaving it?"""

import re
from pathlib import Path

from pref.analysis import equal_kl
from pref.analysis.figure_parts import (
    Look,
    add_legend_below,
    distinct,
    draw_untrained,
    scale_distance,
)
from pref.files import drawing

LABEL = (0.11, 0.045)  # room that a beta takes, in shares of the panel


def draw_frontier(stem: Path, part: dict, look: Look) -> None:
    """A curve per loss and tau, its cells in order of KL, with the SD over seeds as a band, and a
    small point for each run.

    part: of a measure in aggregated_metrics.json.
    """
    rows = part["frontier"]
    notes = [
        *look.notes,
        "Small: a run. Line: mean over seeds; band: their SD. Dotted: the untrained model.",
    ]
    title = look.headed("{} against KL to the base model")
    figure = drawing.new_figure(drawing.HALF, 4.2, title, notes)
    axis = figure.subplots()
    for name in distinct(row["curve"] for row in trained(rows)):
        cells = [row for row in trained(rows) if row["curve"] == name]
        cells.sort(key=lambda row: row["kl"])
        style = look.styles.series(*(cells[0][key] for key in ("loss", "tau", "settings")))
        draw_runs(axis, cells, part["frontier_runs"], style)
        draw_curve(axis, cells, name, style)
    untrained = [row["score"] for row in rows if row["untrained"]]
    draw_untrained(axis, untrained)
    scale_distance(axis, [row["kl"] for row in part["frontier_runs"]])
    if axis.get_xscale() == "linear":  # a log axis has no 0
        star = {"marker": "*", "markersize": 11, "linestyle": "", "color": drawing.GREY}
        axis.plot([0.0] * len(untrained), untrained, clip_on=False, **star)
    name_betas(axis, trained(rows), look)
    answers = rows[0]["kl_answers"]
    axis.set_xlabel(f"on-policy KL to the base model (nats an answer to {answers})")
    axis.set_ylabel(look.label)
    axis.grid(alpha=0.25)
    add_legend_below(figure, [axis], ncols=3)
    drawing.save_figure(figure, stem)


def trained(rows: list[dict]) -> list[dict]:
    return [row for row in rows if not row["untrained"]]


def draw_runs(axis, cells: list[dict], runs: list[dict], style: dict) -> None:
    """The single runs of some cells."""
    labels = {row["label"] for row in cells}
    own = [row for row in runs if row["label"] in labels]
    small = {"markersize": 3, "alpha": 0.45, "linestyle": ""}
    axis.plot([row["kl"] for row in own], [row["score"] for row in own], **style | small)


def draw_curve(axis, cells: list[dict], name: str, style: dict) -> None:
    """One curve: the line through its cells, and a band of the SD over seeds."""
    x, y = [row["kl"] for row in cells], [row["score"] for row in cells]
    spread = [row["score_sd"] or 0.0 for row in cells]
    axis.plot(x, y, label=name, linewidth=1.4, **style)
    low, high = ([a + sign * b for a, b in zip(y, spread)] for sign in (-1, 1))
    axis.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)


def name_betas(axis, rows: list[dict], look: Look) -> None:
    """The beta beside each point, or the learning rate of a curve over these, from the furthest
    on; where it would cover another, none.
    """
    axis.get_ylim()  # settles the limits, which the transforms below do not
    placed: list[tuple[float, float]] = []  # in shares of the panel
    for row in sorted(rows, key=lambda row: -row["kl"]):
        if (name := point_name(row)) is None:
            continue
        point = (row["kl"], row["score"])
        x, y = axis.transAxes.inverted().transform(axis.transData.transform(point))
        if any(abs(x - a) < LABEL[0] and abs(y - b) < LABEL[1] for a, b in placed):
            continue
        placed.append((x, y))
        text = {"xytext": (4, 5), "textcoords": "offset points", "fontsize": 8}
        axis.annotate(name, point, color=look.styles.colour(row["loss"]), **text)


def point_name(row: dict) -> str | None:
    if row["curve"].endswith(f"over {equal_kl.RATE}"):
        return re.search(rf"{equal_kl.RATE}=(\S+)", row["settings"])[1]
    return None if row["beta"] is None else f"β={row['beta']:g}"
