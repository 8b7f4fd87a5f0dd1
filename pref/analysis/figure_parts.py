"""What several figures share: how a score is shown, a study's colours and markers, axes, legends.

One colour a loss in all figures of a study, whichever losses a figure shows; a marker and dashes
for each tau. Where a loss is shown over several betas, its colour goes from light to dark.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from pref.files import drawing

INTERVAL = "95 % interval over questions and seeds"
FAR = 20  # distances that differ by more are shown on a log scale
LONGEST_LABEL = 24  # characters that leave room for a panel in a figure of drawing.HALF
DASHES = ("-", "--", ":", "-.")
UNTRAINED = "untrained model"


class Styles(NamedTuple):
    """The colours and markers of a study. A loss that is not in it, such as base, is grey."""

    losses: tuple[str, ...] = ()
    taus: tuple[float, ...] = ()
    settings: tuple[str, ...] = ()  # besides loss, beta and tau

    def colour(self, loss: str) -> str:
        if loss not in self.losses:
            return drawing.GREY
        return drawing.COLOURS[self.losses.index(loss) % len(drawing.COLOURS)]

    def marker(self, tau: float | None) -> str:
        """A circle without tau, another marker for each tau."""
        others = drawing.MARKERS[1:]
        known = tau in self.taus
        return others[self.taus.index(tau) % len(others)] if known else drawing.MARKERS[0]

    def dashes(self, tau: float | None) -> str:
        return DASHES[self.taus.index(tau) % len(DASHES)] if tau in self.taus else DASHES[0]

    def series(self, loss: str, tau: float | None = None, settings: str | None = None) -> dict:
        """Arguments for `axis.plot`. The marker is hollow for every second of several settings, and
        for losses whose colour another loss has already.
        """
        second = self.settings.index(settings) % 2 if settings in self.settings else 0
        again = self.losses.index(loss) // len(drawing.COLOURS) if loss in self.losses else 0
        colour = self.colour(loss)
        return {
            "color": colour,
            "marker": self.marker(tau),
            "linestyle": self.dashes(tau),
            "markerfacecolor": "white" if (second + again) % 2 else colour,
        }

    def points(self, loss: str, tau: float | None = None, settings: str | None = None) -> dict:
        """Arguments for `axis.plot` of points without a line."""
        return self.series(loss, tau, settings) | {"linestyle": ""}

    def shade(self, loss: str | None, k: int, n: int) -> str:
        """The k-th of n shades of a loss's colour, or of grey, from light to dark."""
        colour = self.colour(loss) if loss else drawing.GREY
        place = k / (n - 1) if n > 1 else 0.5
        towards, share = (255, 0.55 - 1.1 * place) if place < 0.5 else (0, 1.1 * place - 0.55)
        parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        return "#" + "".join(f"{round(part + share * (towards - part)):02x}" for part in parts)


def styles_of(rows: Iterable[dict], baseline: str | None) -> Styles:
    """The styles of a study from all of its cells and runs: the baseline has the first colour.

    rows: with "loss", and "tau", "settings" and "untrained" where they have them.
    """
    rows = [row for row in rows if not row.get("untrained")]
    losses = {row["loss"] for row in rows}
    taus = {row.get("tau") for row in rows} - {None}
    settings = {row.get("settings") for row in rows}
    return Styles(
        losses=tuple(sorted(losses, key=lambda loss: (loss != baseline, loss))),
        taus=tuple(sorted(taus)),
        settings=tuple(sorted(settings, key=lambda one: (one is not None, one or ""))),
    )


class Look(NamedTuple):
    """How figures show one kind of score."""

    title: str  # the score's name within a title of one line
    label: str  # of the score's axis
    limits: tuple[float, float] | None  # of the score, beyond which no axis goes
    digits: int  # after the decimal point
    se_over: str  # the standard error of a single seed is in the row's "se_over_<this>"
    metric: str  # the score is in the row's "<this>", its SD over seeds in "<this>_sd"
    notes: tuple[str, ...] = ()  # which judge, on what; what limits the scores
    styles: Styles = Styles()

    def headed(self, form: str) -> str:
        """A figure's title, such as "Validation accuracy by cell" for "{} by cell"."""
        title = form.format(self.title)
        return title[:1].upper() + title[1:]


def width_for(labels: Iterable[str]) -> float:
    """The width of a figure whose rows have these labels and numbers beside them, in inches."""
    return drawing.HALF if max(map(len, labels), default=0) <= LONGEST_LABEL else drawing.WIDE


# ---- axes ---------------------------------------------------------------------------------------


def span(values: Iterable[float], limits: tuple[float, float] | None) -> tuple[float, float]:
    """The ends of an axis that shows `values` with some room, within `limits`."""
    values = list(values)
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - room, high + room
    if limits:
        low, high = max(low, limits[0] - room / 3), min(high, limits[1] + room / 3)
    return low, high


def scale_beta(axis, betas: Iterable[float], width: float) -> None:
    """A log axis with a tick and a plain number at every beta.

    width: of the axis in inches. Numbers that would touch are turned; a tick without room for its
    number stays without.
    """
    betas = sorted(set(betas))
    log = betas[0] > 0
    places = [math.log10(beta) for beta in betas] if log else betas
    extent = (places[-1] - places[0]) or 1.0
    if log:
        axis.set_xscale("log")
    points = 72 * width / (1.16 * extent)
    gaps = [(b - a) * points for a, b in zip(places, places[1:])]
    texts = [f"{beta:g}" for beta in betas]
    upright = min(gaps, default=math.inf) >= 6.2 * max(map(len, texts))
    labels, last = [], -math.inf
    for place, text in zip(places, texts):
        fits = upright or (place - last) * points >= 10
        labels.append(text if fits else "")
        last = place if fits else last
    axis.set_xticks(betas, labels, rotation=0 if upright else 90)
    axis.minorticks_off()
    ends = (places[0] - 0.08 * extent, places[-1] + 0.08 * extent)
    axis.set_xlim([10**end for end in ends] if log else ends)


def scale_distance(axis, distances: Iterable[float]) -> None:
    """A linear axis from 0, or a log axis with plain numbers where distances, other than the
    untrained model's 0, differ by more than a factor of FAR.
    """
    distances = [distance for distance in distances if distance]
    if not distances:
        return
    low, high = min(distances), max(distances)
    if low > 0 and high > FAR * low:
        drawing.plain_log(axis.xaxis, distances)
        axis.set_xlim(low / 1.4, high * 1.4)
    else:
        axis.set_xlim(min(0.0, 1.05 * low), max(0.0, 1.05 * high))


def draw_untrained(axis, scores: Iterable[float]) -> None:
    """A dotted line across the panel for each untrained model's score."""
    for score in scores:
        axis.axhline(score, color=drawing.GREY, linestyle=":", linewidth=1.2, label=UNTRAINED)


def draw_cells(axis, values: list[list[float]], cmap: str, low: float, high: float) -> None:
    """Coloured cells, the first row on top; NaN stays white. Unlike an image, cells stay sharp."""
    across, down = range(len(values[0]) + 1), range(len(values) + 1)
    edges = [x - 0.5 for x in across], [y - 0.5 for y in down]
    axis.pcolormesh(
        *edges, values, cmap=cmap, vmin=low, vmax=high, edgecolors="white", linewidth=1.5
    )
    axis.set_ylim(len(values) - 0.5, -0.5)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


# ---- legends ------------------------------------------------------------------------------------


def add_legend_below(
    figure, axes: Iterable, ncols: int = 3, fontsize: int = 9, more: Iterable = ()
) -> None:
    """One legend below the panels, with one entry for a label that several of them have.

    more: artists with labels, after those of the panels.
    """
    handle_of = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        handle_of |= dict(zip(labels, handles))
    handle_of |= {artist.get_label(): artist for artist in more}
    if handle_of:
        where = {"loc": "outside lower center", "ncols": ncols}
        handles, labels = list(handle_of.values()), list(handle_of)
        figure.legend(handles, labels, **where, fontsize=fontsize, frameon=False)


def legend_keys(styles: Styles, losses: Iterable[str], taus: Iterable[float | None]) -> list:
    """Artists that explain colours and, in black, the markers of tau if there is any."""
    from matplotlib.lines import Line2D

    keys = [Line2D([], [], **styles.points(loss) | {"marker": "o"}, label=loss) for loss in losses]
    taus = sorted(set(taus), key=lambda tau: (tau is not None, tau or 0))
    if taus == [None]:
        return keys
    for tau in taus:
        style = {"color": "black", "marker": styles.marker(tau), "linestyle": styles.dashes(tau)}
        keys.append(Line2D([], [], **style, linewidth=1, label=tau_text(tau)))
    return keys


def tau_text(tau: float | None) -> str:
    return "no τ" if tau is None else f"τ={tau:g}"


def distinct(values: Iterable) -> list:
    """The different values in order of first appearance."""
    return list(dict.fromkeys(values))
