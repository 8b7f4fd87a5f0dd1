"""Figures that need a known truth, or rounds.

draw_gold     validation accuracy against the score: what does selection really select?
draw_rounds   score and KL from round to round
"""

from pathlib import Path

from pref.analysis.figure_parts import (
    Look,
    add_legend_below,
    distinct,
    draw_untrained,
    legend_keys,
    scale_distance,
)
from pref.files import drawing


def draw_gold(stem: Path, part: dict, look: Look) -> None:
    """A point a cell, at its validation accuracy and its score; of each loss, a ring around the
    cell that accuracy selects and a square around that with the best score.

    part: of the measure, with `gold_points` and `gold_selection`.
    """
    points, selection = part["gold_points"], part["gold_selection"]
    whole = selection[-1]  # all losses together, or the only one
    notes = [*look.notes, "Ring: selected by accuracy. Square: the best score. " + agreement(whole)]
    figure = drawing.new_figure(drawing.HALF, 3.8, look.headed("{} against accuracy"), notes)
    axis = figure.subplots()
    place_of = {row["label"]: (row["accuracy"], row["score"]) for row in points}
    for row in points:
        style = look.styles.points(row["loss"], row["tau"], row["settings"])
        axis.plot(*place_of[row["label"]], **style, markersize=6)
    for row in selection[:-1] or selection:
        colour = look.styles.colour(row["loss"])
        ring = {"color": colour, "markerfacecolor": "none", "markersize": 13, "linestyle": ""}
        axis.plot(*place_of[row["by_accuracy"]], marker="o", **ring)
        axis.plot(*place_of[row["by_score"]], marker="s", **ring)
    axis.set_xlabel("validation accuracy (best acc_ref, mean over seeds)")
    axis.set_ylabel(look.label)
    axis.grid(alpha=0.25)
    losses = distinct(row["loss"] for row in points)
    keys = legend_keys(look.styles, losses, [row["tau"] for row in points])
    add_legend_below(figure, [], ncols=4, more=keys)
    drawing.save_figure(figure, stem)


def agreement(row: dict) -> str:
    """The rank correlation in a sentence."""
    if row["spearman"] is None:
        return ""
    text = f"Rank correlation over {row['cells']} cells: {row['spearman']:.2f}"
    if row["spearman_low"] is not None:
        text += f" [{row['spearman_low']:.2f}, {row['spearman_high']:.2f}]"
    return text + "."


def draw_rounds(stem: Path, rows: list[dict], untrained: list[float], look: Look) -> None:
    """Two panels: the score by round, and against the KL, with an arrow's line from round to round.

    rows: of "rounds". untrained: scores of the untrained models.
    """
    notes = [*look.notes, "Error bars: SD over seeds. Dotted: the untrained model."]
    title = look.headed("{} from round to round")
    figure = drawing.new_figure(drawing.WIDE, 3.6, title, notes)
    by_round, by_kl = figure.subplots(1, 2, sharey=True)
    for chain in distinct(row["chain"] for row in rows):
        own = [row for row in rows if row["chain"] == chain]
        style = look.styles.series(own[0]["loss"], own[0]["tau"])
        errors = {"capsize": 2, "linewidth": 1.4, "label": chain}
        scores, spread = [row["score"] for row in own], [row["score_sd"] or 0.0 for row in own]
        by_round.errorbar([row["round"] for row in own], scores, yerr=spread, **errors, **style)
        known = [row for row in own if row["kl"] is not None]
        by_kl.plot([row["kl"] for row in known], [row["score"] for row in known], **style)
        for row in known:
            text = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 8}
            by_kl.annotate(str(row["round"]), (row["kl"], row["score"]), **text)
    by_round.set_xticks(sorted({row["round"] for row in rows}))
    by_round.set_xlabel("round")
    by_round.set_ylabel(look.label)
    by_kl.set_xlabel("on-policy KL to the base model (nats an answer); numbers: round")
    scale_distance(by_kl, [row["kl"] for row in rows if row["kl"] is not None])
    for axis in (by_round, by_kl):
        draw_untrained(axis, untrained)
        axis.grid(alpha=0.25)
    add_legend_below(figure, [by_round], ncols=4)
    drawing.save_figure(figure, stem)
