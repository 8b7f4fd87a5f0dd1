"""What several figures share: how a score is shown, the style of a series, the legend below."""

from collections.abc import Iterable
from typing import NamedTuple

from pref.files import drawing

INTERVAL = "95 % interval over questions and seeds"


class Look(NamedTuple):
    """How figures show one kind of score."""

    title: str
    label: str  # of the score's axis
    limits: tuple[float, float]  # of the score's axis
    digits: int  # after the decimal point
    se_over: str  # the standard error of a single seed is in the row's "se_over_<this>"
    metric: str  # the score is in the row's "<this>", its SD over seeds in "<this>_sd"


def series_style(i: int) -> dict:
    """Colour and marker of the i-th of several series, which differ without colour too."""
    return {
        "color": drawing.COLOURS[i % len(drawing.COLOURS)],
        "marker": drawing.MARKERS[i % len(drawing.MARKERS)],
    }


def add_legend_below(figure, axes: Iterable, ncols: int = 3, fontsize: int = 8) -> None:
    """One legend below the panels, with one entry for a label that several of them have."""
    handle_of = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        handle_of |= dict(zip(labels, handles))
    if handle_of:
        where = {"loc": "outside lower center", "ncols": ncols}
        handles, labels = list(handle_of.values()), list(handle_of)
        figure.legend(handles, labels, **where, fontsize=fontsize, frameon=False)


def distinct(values: Iterable) -> list:
    """The different values in order of first appearance."""
    return list(dict.fromkeys(values))
