"""The figure of a score against the KL to the base model: what is gained for leaving it?"""

from pathlib import Path

from pref.analysis.figure_parts import Look, add_legend_below, distinct, series_style
from pref.files import drawing

FAR = 20


def draw_frontier(stem: Path, rows: list[dict], look: Look) -> None:
    """A curve per loss, its cells in order of KL, with the SD over seeds as a band.

    rows: of "frontier" in aggregated_metrics.json.
    """
    band = "band and error bar: SD over seeds"
    figure = drawing.new_figure(9, 5.6, f"{look.title}\nagainst KL to the base model; {band}")
    axis = figure.subplots()
    lines = distinct((row["loss"], row["tau"], row["settings"]) for row in trained(rows))
    for i, (loss, tau, settings) in enumerate(lines):
        own = (loss, tau, settings)
        cells = [row for row in trained(rows) if (row["loss"], row["tau"], row["settings"]) == own]
        cells.sort(key=lambda row: row["kl"])
        name = " ".join(filter(None, (loss, tau is not None and f"τ={tau:g}", settings)))
        draw_curve(axis, cells, name, series_style(i))
    for row in rows:
        if row["untrained"]:
            style = {"color": drawing.GREY, "marker": "*", "markersize": 11, "linestyle": ""}
            axis.plot(row["kl"], row["score"], label="untrained model", **style)
    scale_axis(axis, [row["kl"] for row in trained(rows)])
    answers = rows[0]["kl_answers"]
    axis.set_xlabel(f"on-policy KL to the base model, nats an answer (answers to {answers})")
    axis.set_ylabel(look.label)
    axis.grid(alpha=0.25)
    add_legend_below(figure, [axis], ncols=3)
    drawing.save_figure(figure, stem)


def scale_axis(axis, distances: list[float]) -> None:
    """Linear, or logarithmic from 0.1 on where the KL differs by more than a factor of FAR."""
    if max(distances) > FAR * max(0.1, min(distances)):
        axis.set_xscale("symlog", linthresh=0.1)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    room = 0.03 * max(0.1, *distances)
    axis.set_xlim(left=min(-room, *distances) if axis.get_xscale() == "linear" else -0.01)


def trained(rows: list[dict]) -> list[dict]:
    return [row for row in rows if not row["untrained"]]


def draw_curve(axis, cells: list[dict], name: str, style: dict) -> None:
    """One curve; each point is labelled with its beta."""
    x, y = [row["kl"] for row in cells], [row["score"] for row in cells]
    spread = [row["score_sd"] or 0.0 for row in cells]
    width = [row["kl_sd"] or 0.0 for row in cells]
    axis.errorbar(x, y, xerr=width, yerr=spread, label=name, capsize=2, linewidth=1.4, **style)
    low, high = ([a + sign * b for a, b in zip(y, spread)] for sign in (-1, 1))
    axis.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)
    for row in cells:
        if row["beta"] is not None:
            place = (row["kl"], row["score"])
            text = {"xytext": (4, 5), "textcoords": "offset points", "fontsize": 7}
            axis.annotate(f"β={row['beta']:g}", place, color=style["color"], **text)
