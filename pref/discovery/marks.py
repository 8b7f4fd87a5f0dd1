"""What the figures of a report share: colours, units, and the places that lead to a proposal."""

from pathlib import Path
from typing import NamedTuple

from pref.discovery.archive import SEED
from pref.discovery.report_data import Story
from pref.files import drawing

BLACK, BAND, PALE = "#222222", "#e9e6e0", "#dddddd"
CONTROL = "#882255"  # the random control, which is no arm of the search
FILES = ("png", "svg")  # of a figure
MOST_LINKS = 1500  # places in a figure that lead to a proposal
FEW = 150  # measured candidates, up to which every error bar is drawn at full strength


class Spot(NamedTuple):
    """A place in a figure that stands for a proposal, in points of the SVG as it is shown."""

    x: float
    y: float
    radius: float
    id: str


class Drawn(NamedTuple):
    """A figure on disk and the places in it that lead to a proposal."""

    stem: Path
    spots: list[Spot]


Place = tuple[object, float, float, str]  # axis, x and y in its data, id


class Palette(NamedTuple):
    """The colour of each proposer: seeds are black, arms as they come."""

    arms: tuple[str, ...]

    def colour(self, by: str) -> str:
        if by not in self.arms:
            return BLACK
        return drawing.COLOURS[self.arms.index(by) % len(drawing.COLOURS)]


def palette_of(story: Story) -> Palette:
    return Palette(tuple(name for name in story.proposers if name != SEED))


def points(fraction: float) -> float:
    """A fraction of the pairs in points of accuracy."""
    return 100 * fraction


def signed(fraction: float) -> str:
    """A fraction as points with their sign: "+1.2"; nothing is "0.0"."""
    text = f"{points(fraction):+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def shown_name(text: str, most: int = 24) -> str:
    """A name as a figure shows it: one line of ordinary characters, cut where it is long."""
    text = "".join(x if x.isprintable() else "?" for x in text)
    return text if len(text) <= most else text[: most - 1] + "…"


def measured_on(story: Story) -> str:
    """What the numbers of the search rest on, for the notes of a figure."""
    pairs = f"{story.pairs} validation pairs" if story.pairs else "the search's validation pairs"
    return f"Accuracy on {pairs} that the search selected on"


def save(figure, stem: Path, places: list[Place], radius: float = 4.0) -> Drawn:
    """Write the figure; find where its places are in the SVG, which begins below the heading."""
    drawing.save_figure(figure, stem, dpi=110, suffixes=FILES)
    above = max(0.0, 72 * drawing.heading_of(figure).height - 2)
    height, scale = 72 * figure.get_figheight(), 72 / figure.dpi
    spots = []
    for axis, x, y, id in places[:MOST_LINKS]:
        across, up = axis.transData.transform((x, y)) * scale
        spots.append(Spot(across, height - up - above, radius, id))
    return Drawn(stem, spots)


def blend(colour: str, share: float) -> str:
    """`colour` on white: share 0 is white, 1 the colour itself."""
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(255 + share * (part - 255)):02x}" for part in parts)
