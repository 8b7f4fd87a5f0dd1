"""The figures of a search's report: which exist, and how they are drawn.

file name      question
score          How good was what was tried, and is the best more than luck?
lineage        What was made of what? (lineage.py, with `ancestry`)
ancestry       How did the winner come about?
curves         What does the best do that DPO does not?
funnel         Where did the proposals end?
cells          Which shapes were tried, and which are good?
agreement      Does the proxy rank losses as training does?
confirmation   What is left of the search's estimates on unseen pairs?

One colour a proposer in all of them. Gains are differences to DPO in accuracy, in points.
"""

from pathlib import Path

from pref.analysis.stats import sd
from pref.discovery import curves, estimates, fingerprint, lineage, marks, status
from pref.discovery.archive import SEED
from pref.discovery.marks import Drawn, Palette, points, save, shown_name, signed
from pref.discovery.report_data import Candidate, Story
from pref.files import drawing

GREENS, REDS = "#1b7837", "#b2182b"


def draw_all(story: Story, folder: Path) -> dict[str, Drawn]:
    """Draw every figure that there is something for, to folder/<name>.{png,svg}."""
    palette = marks.palette_of(story)
    drawers = {
        "score": draw_score,
        "ancestry": lineage.draw_ancestry,
        "lineage": lineage.draw_lineage,
        "curves": curves.draw_losses,
        "funnel": draw_funnel,
        "cells": draw_cells,
        "agreement": draw_agreement,
        "confirmation": draw_confirmation,
    }
    with drawing.own_style():
        drawn = {name: draw(story, palette, folder / name) for name, draw in drawers.items()}
    return {name: one for name, one in drawn.items() if one}


# ---- score --------------------------------------------------------------------------------------


def draw_score(story: Story, palette: Palette, stem: Path) -> Drawn | None:
    """What was measured of each proposal, and the running best by shrunk gain."""
    shown = [one for one in story.candidates if one.gain and one is not story.dpo]
    if not shown:
        return None
    notes = [
        f"{marks.measured_on(story)}, as a difference to DPO. Bars: one standard error.",
        "Lines: the best by shrunk gain, which is the part of a difference that is expected again; "
        "numbers of the whole search at its end.",
    ]
    figure = drawing.new_figure(drawing.WIDE, 4.2, "Gain over DPO, proposal by proposal", notes)
    axis = figure.subplots()
    draw_dpo_band(story, axis)
    for by in story.proposers:
        for kind in ("proxy", "trained"):
            some = [x for x in shown if (x.entry.by, x.gain.measured) == (by, kind)]
            draw_points(axis, some, palette.colour(by), by, kind, len(shown) > marks.FEW)
    last = story.candidates[-1].number
    draw_best(axis, story.ranking, last, {"color": marks.BLACK, "label": "best so far, shrunk"})
    control = [one for one in story.control if one.gain and one.entry.by != SEED]
    style = {"color": marks.CONTROL, "linestyle": "--", "label": "random control, shrunk"}
    draw_best(axis, control, last, style)
    frame(axis, shown, last)
    figure.legend(*legend_of(axis), loc="outside lower center", ncols=6, frameon=False)
    y = [(one.number, points(one.gain.difference), one.id) for one in shown]
    low, high = axis.get_ylim()
    return save(figure, stem, [(axis, x, min(max(y, low), high), id) for x, y, id in y])


def draw_points(axis, shown: list[Candidate], colour: str, by: str, kind: str, many: bool) -> None:
    if not shown:
        return
    x, y = [one.number for one in shown], [points(one.gain.difference) for one in shown]
    errors = [points(one.gain.se) for one in shown]
    full = kind == "trained"
    style = {"color": colour, "marker": "o", "linestyle": "", "elinewidth": 0.8}
    style |= {"markersize": 5.5 if full else 3.6, "zorder": 4 if full else 2}
    style |= {"markerfacecolor": colour if full else "white", "markeredgewidth": 0.9}
    label = f"{shown_name(by)}, {'trained' if full else 'proxy'}"
    _, _, bars = axis.errorbar(x, y, errors, label=label, **style)
    for bar in bars:
        bar.set_alpha(0.9 if full else 0.18 if many else 0.45)


def draw_dpo_band(story: Story, axis) -> None:
    """DPO at 0, and how far its own seeds are apart."""
    seeds = [run["acc_ref"] for run in story.dpo.entry.runs.values() if run["acc_ref"] is not None]
    spread = sd(seeds)
    if spread is not None:
        band = {"color": marks.BAND, "zorder": 0, "label": f"DPO ± SD of its {len(seeds)} seeds"}
        axis.axhspan(-points(spread), points(spread), linewidth=0, **band)
    axis.axhline(0, color=drawing.GREY, linewidth=1, zorder=1, label="DPO")


def draw_best(axis, candidates: list[Candidate], last: int, style: dict) -> None:
    """Steps of the best shrunk gain among the proposals so far."""
    x, y = [], []
    for one in sorted(candidates, key=lambda one: one.number):
        if not y or points(one.gain.gain) > y[-1]:
            x.append(one.number)
            y.append(points(one.gain.gain))
    if y:
        axis.step([*x, last], [*y, y[-1]], where="post", linewidth=1.8, zorder=5, **style)


def frame(axis, shown: list[Candidate], last: int) -> None:
    """Axes that leave the few far below, which are no candidates for anything, at the edge."""
    values = [points(one.gain.difference) for one in shown]
    errors = [points(one.gain.se) for one in shown]
    high = max([value + error for value, error in zip(values, errors)] + [1.0])
    low = max(min(value - error for value, error in zip(values, errors)), -1.6 * high - 4)
    axis.set_ylim(low - 0.5, high + 0.5)
    axis.set_xlim(0, last + 1)
    axis.set_xlabel("proposal")
    axis.set_ylabel("gain over DPO (points)")
    axis.grid(axis="y", alpha=0.25)


def legend_of(axis) -> tuple[list, list[str]]:
    handles, labels = axis.get_legend_handles_labels()
    found = dict(zip(labels, handles))
    return list(found.values()), list(found)


# ---- funnel -------------------------------------------------------------------------------------


def funnel_counts(story: Story) -> dict[str, dict[str, int]]:
    """{stage: {proposer: proposals that passed it}}, from "proposed" to "in the confirmation"."""
    arms = [by for by in story.proposers if by != SEED]
    left = [one.entry for one in story.candidates if one.entry.by != SEED]
    stages = {"proposed": left}
    for stage, places in status.FUNNEL.items():
        left = [one for one in left if one.stopped is None or one.stopped["at"] not in places]
        stages[stage] = left
    for k in sorted({event["k"] for event in story.state.rungs}):
        ids = {id for event in story.state.rungs if event["k"] == k for id in event["ids"]}
        stages[f"trained, rung {k}"] = [one for one in left if one.id in ids]
    confirmed = {row["id"] for row in (story.confirmation or {}).get("candidates", [])}
    stages["in the confirmation"] = [one for one in left if one.id in confirmed]
    return {
        stage: {by: sum(one.by == by for one in passed) for by in arms}
        for stage, passed in stages.items()
    }


def draw_funnel(story: Story, palette: Palette, stem: Path) -> Drawn | None:
    """Bars of the proposals that passed each stage, a colour a proposer."""
    counts = funnel_counts(story)
    if not any(counts["proposed"].values()):
        return None
    notes = ["Seeds are left out. What ended where, and why: in the tables below."]
    height = 0.9 + 0.3 * len(counts)
    figure = drawing.new_figure(drawing.HALF, height, "How far the proposals came", notes)
    axis = figure.subplots()
    largest = sum(counts["proposed"].values())
    for row, by_arm in enumerate(counts.values()):
        left = 0
        for by, count in by_arm.items():
            axis.barh(row, count, left=left, height=0.72, color=palette.colour(by))
            left += count
        axis.text(left + 0.012 * largest, row, str(left), va="center", fontsize=9)
    for by in counts["proposed"]:
        axis.barh(0, 0, color=palette.colour(by), label=shown_name(by))
    axis.set_yticks(range(len(counts)), list(counts))
    axis.set_ylim(len(counts) - 0.4, -0.6)
    axis.set_xlim(0, 1.1 * largest)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("proposals")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return save(figure, stem, [])


# ---- cells --------------------------------------------------------------------------------------


def best_of_cells(story: Story) -> dict[tuple[str, ...], Candidate]:
    """The candidate of the largest shrunk gain in each cell, by the cell's parts."""
    best: dict[tuple[str, ...], Candidate] = {}
    for one in story.candidates:
        if one.gain is None or one.entry.cell is None:
            continue
        cell = tuple(one.entry.cell.split(","))
        if cell not in best or one.gain.gain > best[cell].gain.gain:
            best[cell] = one
    return best


def draw_cells(story: Story, palette: Palette, stem: Path) -> Drawn | None:
    """A map of the shapes: for each cell the best in it; empty ones are grey."""
    best = best_of_cells(story)
    if not best:
        return None
    tried = [one.entry.cell for one in story.candidates if one.entry.cell]
    note = "Each cell: the best shrunk gain in points, whose it is, and how many were tried."
    title = "Shapes of the gradient, and the best of each"
    figure = drawing.new_figure(drawing.HALF, 3.5, title, [note])
    axes = figure.subplots(1, len(fingerprint.SHIFT), sharey=True)
    largest = max([abs(points(one.gain.gain)) for one in best.values()] + [0.5])
    places = []
    for axis, shift in zip(axes, fingerprint.SHIFT):
        for column, left in enumerate(fingerprint.LEFT):
            for row, right in enumerate(fingerprint.RIGHT):
                one = best.get((left, right, shift))
                count = tried.count(f"{left},{right},{shift}")
                draw_cell(axis, column, row, one, count, largest)
                places += [(axis, column, row, one.id)] if one else []
        axis.set_title("both responses\n" + SHIFTS[shift], fontsize=9)
        frame_cells(axis)
    axes[0].set_ylabel("pairs ranked right")
    figure.supxlabel("pairs ranked wrong", fontsize=9.5)
    return save(figure, stem, places, radius=18.0)


SHIFTS = {"free": "may rise together", "held": "are held together"}


def draw_cell(axis, column: int, row: int, one: Candidate | None, count: int, most: float) -> None:
    gain = points(one.gain.gain) if one else 0.0
    colour = marks.blend(GREENS if gain > 0 else REDS, abs(gain) / most) if one else "#eeeeee"
    axis.bar(column, 0.94, bottom=row - 0.47, width=0.94, color=colour)
    if one:
        dark = abs(gain) / most > 0.6
        text = f"{signed(one.gain.gain)}\n{one.id}\n{count} tried"
        style = {"ha": "center", "va": "center", "fontsize": 7.5, "linespacing": 1.2}
        axis.text(column, row, text, color="white" if dark else marks.BLACK, **style)


def frame_cells(axis) -> None:
    names = [[words.replace("-", "\n") for words in side] for side in CELL_NAMES]
    axis.set_xticks(range(len(names[0])), names[0], fontsize=8)
    axis.set_yticks(range(len(names[1])), names[1], fontsize=8)
    axis.set_xlim(-0.5, len(names[0]) - 0.5)
    axis.set_ylim(len(names[1]) - 0.5, -0.5)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


CELL_NAMES = (fingerprint.LEFT, fingerprint.RIGHT)


# ---- can it be believed? ------------------------------------------------------------------------


def draw_agreement(story: Story, palette: Palette, stem: Path) -> Drawn | None:
    """What the proxy and what training made of the same candidates."""
    both = [
        one
        for one in story.candidates
        if one.gain and one.gain.measured == "trained" and one.entry.proxy
    ]
    if len(both) < 3:
        return None
    figure = drawing.new_figure(
        drawing.HALF, 3.6, "The proxy against training", [agreement_text(story)]
    )
    axis = figure.subplots()
    for by in dict.fromkeys(one.entry.by for one in both):
        shown = [one for one in both if one.entry.by == by]
        proxies = [one.entry.proxy for one in shown]
        axis.errorbar(
            [points(proxy["difference"]) for proxy in proxies],
            [points(one.gain.difference) for one in shown],
            [points(one.gain.se) for one in shown],
            [points(proxy["se"]) for proxy in proxies],
            color=palette.colour(by),
            marker="o",
            linestyle="",
            markersize=5,
            elinewidth=0.7,
            alpha=0.85,
            label=shown_name(by),
        )
    for line in (axis.axhline, axis.axvline):
        line(0, color=drawing.GREY, linewidth=0.8, zorder=0)
    axis.set_xlabel("gain on the proxy (points)")
    axis.set_ylabel("gain in training (points)")
    axis.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    places = [(points(x.entry.proxy["difference"]), points(x.gain.difference), x.id) for x in both]
    return save(figure, stem, [(axis, *place) for place in places])


def agreement_text(story: Story) -> str:
    """Kendall's tau between the proxy and training, in words."""
    found = estimates.agreement(story.state)
    if found.tau != found.tau:
        return (
            f"Kendall's tau between proxy and training is not known: {found.candidates} candidates "
            "have both."
        )
    return (
        f"Kendall's tau {found.tau:.2f}, 95 % interval {found.low:.2f} to {found.high:.2f}, over "
        f"{found.candidates} losses that have both, DPO among them. Most of them were chosen by "
        "the proxy."
    )


def draw_confirmation(story: Story, palette: Palette, stem: Path) -> Drawn | None:
    """For each confirmed candidate: measured in the search, shrunk, confirmed."""
    rows = [
        (story.by_id[row["id"]], row)
        for row in (story.confirmation or {}).get("candidates", [])
        if row["id"] in story.by_id and story.by_id[row["id"]].gain
    ]
    if not rows:
        return None
    pairs = story.confirmation.get("pairs")
    notes = [
        f"Arrows lead from the search's pairs to {pairs} unseen ones with new seeds and tuned DPO.",
        "Bars: in the search one standard error, confirmed a 95 % interval.",
    ]
    title = "What is left of the search's estimates"
    figure = drawing.new_figure(drawing.HALF, 0.9 + 0.75 * len(rows), title, notes)
    axis = figure.subplots()
    for row, (one, confirmed) in enumerate(rows):
        draw_shift(axis, row, one, confirmed, palette.colour(one.entry.by))
    axis.axvline(0, color=drawing.GREY, linewidth=1, zorder=0)
    axis.set_yticks(range(len(rows)), [shown_name(one.label, 18) for one, _ in rows])
    axis.set_ylim(len(rows) - 0.5, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("gain over DPO (points)")
    axis.grid(axis="x", alpha=0.25)
    style = {"loc": "outside lower center", "ncols": 3, "fontsize": 8.5, "columnspacing": 1.0}
    for label, sign in SIGNS.items():  # in grey: a colour says whose it is
        axis.plot([], [], color=drawing.GREY, label=label, **sign)
    figure.legend(*legend_of(axis), **style, frameon=False)
    places = [(axis, points(x.gain.difference), n - 0.2, x.id) for n, (x, _) in enumerate(rows)]
    return save(figure, stem, places)


SIGNS = {
    "measured in the search": {"marker": "o", "linestyle": "", "markerfacecolor": "white"},
    "shrunk": {"marker": "D", "linestyle": "", "markersize": 4},
    "confirmed": {"marker": "o", "linestyle": ""},
}


def draw_shift(axis, row: int, one: Candidate, confirmed: dict, colour: str) -> None:
    """One candidate's three numbers, with an arrow from the first to the last."""
    measured, shrunk, found = (
        points(value) for value in (one.gain.difference, one.gain.gain, confirmed["difference"])
    )
    first, second, last = ({"color": colour, **sign} for sign in SIGNS.values())
    axis.errorbar(measured, row - 0.2, None, points(one.gain.se), elinewidth=1, **first)
    axis.plot(shrunk, row, **second)
    axis.plot(found, row + 0.2, **last)
    if confirmed["low"] is not None:  # it is not known where nothing varies
        ends = [points(confirmed["low"]), points(confirmed["high"])]
        axis.plot(ends, [row + 0.2] * 2, color=colour, linewidth=1)
    arrow = {"arrowstyle": "-|>", "color": colour, "shrinkA": 5, "shrinkB": 5, "linewidth": 1.2}
    axis.annotate("", (found, row + 0.2), (measured, row - 0.2), arrowprops=arrow)
