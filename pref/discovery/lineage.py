"""Who was made of what: the whole search as a cloud with edges, and the winner's own line."""

from pathlib import Path

from pref.analysis import texts
from pref.discovery import marks
from pref.discovery.archive import SEED
from pref.discovery.marks import Drawn, Palette, points, save, shown_name, signed
from pref.discovery.report_data import Candidate, Story
from pref.files import drawing

MOST_IN_LINE = 8  # candidates of the winner's line that have room for their names
UNMEASURED = "not measured"


def main_line(story: Story) -> list[Candidate]:
    """The winner and its first parents, the oldest first; empty without a measured proposal."""
    known, line = story.by_id, []
    one = story.ranking[0] if story.ranking else None
    while one and one not in line:
        line.insert(0, one)
        one = next((known[id] for id in one.entry.parents if id in known), None)
    return line


# ---- the whole search ---------------------------------------------------------------------------


def draw_lineage(story: Story, palette: Palette, stem: Path) -> Drawn | None:
    """Every proposal at its shrunk gain, with a line to each parent, the winner's line thick."""
    bred = [one for one in story.candidates if one.entry.parents]
    if not bred:
        return None
    notes = [
        "Lines lead to parents. The row of crosses: proposals that were refused, or not measured."
    ]
    figure = drawing.new_figure(drawing.WIDE, 4.2, "What was made of what", notes)
    axis = figure.subplots()
    height = heights(story)
    draw_edges(axis, story, height, palette)
    for by in story.proposers:
        shown = [one for one in story.candidates if one.entry.by == by]
        for full in (True, False):
            some = [one for one in shown if (one.gain is not None) == full]
            style = {"color": palette.colour(by), "linestyle": "", "zorder": 3}
            marker, size = ("o", 4.5) if full else ("x", 3)
            style |= {"marker": marker, "markersize": size}
            label = shown_name(by) if full else "_"
            x, y = [one.number for one in some], [height[one.id] for one in some]
            axis.plot(x, y, **style, label=label)
    draw_main_line(axis, main_line(story), height)
    axis.set_xlim(0, story.candidates[-1].number + 1)
    axis.set_xlabel("proposal")
    axis.set_ylabel("shrunk gain over DPO (points)")
    axis.grid(axis="y", alpha=0.25)
    axis.axhline(0, color=drawing.GREY, linewidth=0.8, zorder=0)
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    places = [(axis, one.number, height[one.id], one.id) for one in story.candidates]
    return save(figure, stem, places)


def heights(story: Story) -> dict[str, float]:
    """The place of each proposal on the y axis: its shrunk gain, or a row below all of them. The
    few that are far below the rest stay at the edge.
    """
    gains = {one.id: points(one.gain.gain) for one in story.candidates if one.gain}
    values = sorted(gains.values()) or [0.0]
    high, low = values[-1], values[len(values) // 20]
    low = min(low, -0.2 * abs(high), -0.2)
    below = low - 0.12 * (high - low)
    return {one.id: max(gains.get(one.id, below), low) if one.id in gains else below
            for one in story.candidates}  # fmt: skip


def draw_edges(axis, story: Story, height: dict[str, float], palette: Palette) -> None:
    from matplotlib.collections import LineCollection

    known = story.by_id
    few = len(story.candidates) <= 120
    for by in story.proposers:
        lines = [
            [(known[id].number, height[id]), (one.number, height[one.id])]
            for one in story.candidates
            if one.entry.by == by
            for id in one.entry.parents
            if id in known
        ]
        style = {"colors": palette.colour(by), "linewidths": 0.7, "alpha": 0.4 if few else 0.16}
        axis.add_collection(LineCollection(lines, **style, zorder=1))


def draw_main_line(axis, line: list[Candidate], height: dict[str, float]) -> None:
    if not line:
        return
    x, y = [one.number for one in line], [height[one.id] for one in line]
    axis.plot(x, y, color=marks.BLACK, linewidth=2.4, zorder=4, label="the winner's line")
    axis.plot(x[-1], y[-1], color=marks.BLACK, marker="*", markersize=12, zorder=5, linestyle="")


# ---- the winner's line --------------------------------------------------------------------------


def draw_ancestry(story: Story, palette: Palette, stem: Path) -> Drawn | None:
    """The winner's line, step by step, with the operator of each and the other parent."""
    line = main_line(story)
    if not line:
        return None
    left_out, line = line[:-MOST_IN_LINE], line[-MOST_IN_LINE:]
    steps = texts.count_text(len(left_out), "earlier steps")
    notes = [f"Left out: {steps}."] if left_out else []
    notes += [
        "Numbers: shrunk gain over DPO in points. Italics: how it was made. Small: another parent."
    ]
    title = f"How {shown_name(line[-1].label)} came about"
    figure = drawing.new_figure(drawing.WIDE, 1.7, title, notes)
    axis = figure.subplots()
    places = []
    for place, one in enumerate(line):
        if place:
            arrow = {"arrowstyle": "-|>", "color": marks.BLACK, "shrinkA": 9, "shrinkB": 9}
            axis.annotate("", (place, 0), (place - 1, 0), arrowprops={**arrow, "linewidth": 1.6})
            operator = shown_name(one.entry.operator, 20)
            style = {"ha": "center", "va": "bottom", "fontsize": 8, "style": "italic"}
            axis.text(place - 0.5, 0.16, operator, **style)
        draw_step(axis, place, one, palette)
        places.append((axis, place, 0.0, one.id))
        places += draw_other_parent(axis, place, line, story, palette)
    axis.set_xlim(-0.5, max(len(line), 4) - 0.5)
    axis.set_ylim(-1.5, 1.0)
    axis.axis("off")
    return save(figure, stem, places, radius=7.0)


def draw_step(axis, place: int, one: Candidate, palette: Palette) -> None:
    colour = palette.colour(one.entry.by)
    axis.plot(place, 0, marker="o", markersize=12, color=colour)
    gain = signed(one.gain.gain) if one.gain else UNMEASURED
    style = {"ha": "center", "fontsize": 8.5}
    axis.text(place, 0.42, gain, va="bottom", fontweight="bold", **style)
    by = "" if one.entry.by == SEED else f"\n{shown_name(one.entry.by, 16)}"
    axis.text(place, -0.26, shown_name(one.label, 19) + by, va="top", linespacing=1.25, **style)


def draw_other_parent(
    axis, place: int, line: list[Candidate], story: Story, palette: Palette
) -> list[marks.Place]:
    """The parent besides the one in the line, as a small mark under the arrow."""
    if not place:
        return []
    known, first = story.by_id, line[place - 1].id
    others = [known[id] for id in line[place].entry.parents if id in known and id != first]
    places = []
    for other in others[:1]:
        x, y, colour = place - 0.5, -1.05, palette.colour(other.entry.by)
        axis.plot([x, place], [y, 0], color=colour, linewidth=1, zorder=0)
        axis.plot(x, y, marker="o", markersize=6, color=colour)
        axis.text(x, y - 0.14, shown_name(other.label, 19), ha="center", va="top", fontsize=7.5)
        places.append((axis, x, y, other.id))
    return places
