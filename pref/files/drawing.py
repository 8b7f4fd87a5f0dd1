"""Figures on disk, as PDF, PNG and SVG: the same numbers give the same bytes.

    with drawing.own_style():
        figure = drawing.new_figure(drawing.HALF, 3, "Loss over steps", ["one line a run"])
        axis = figure.subplots()
        axis.plot(steps, losses, color=drawing.COLOURS[0])
        drawing.save_figure(figure, Path("figures/loss"))   # loss.pdf, loss.png and loss.svg

Figures are drawn for the width at which they are shown: HALF is one of the report's two columns,
WIDE both. Text is then as large as the report's tables.

The PNG can carry a key of what the figure shows, so that `is_drawn` spares drawing it again. The
key should contain `drawing_version`: a change of the drawing code then redraws the figure too.
"""

import html
import io
import math
import os
import re
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pref.files import console, disk
from pref.files.console import UserError

HALF, WIDE = 5.6, 11.7  # inches: the width of a figure in one or both columns of the report
# Okabe and Ito's colours without their yellow, which is too pale for lines on white, then three of
# Paul Tol's: colour-blind readers can tell them apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
COLOURS += ("#332288", "#999933", "#882255")
MARKERS = "os^DvP*X"
GREY, RED = "#777777", "#D55E00"
FILES, PAGE_FILES = ("pdf", "png"), ("pdf", "png", "svg")  # PAGE_FILES: of figures in the report
TITLE_POINTS, NOTE_POINTS, SMALLEST_TITLE = 11, 8.5, 9
FONTS = ("DejaVu Sans", "Verdana")  # of the same widths; browsers take the one that they have
SVG_FONT = f"font-family: {', '.join([repr(font) for font in FONTS])}, sans-serif"
FORBIDDEN = "[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"  # characters, in XML
ABOVE = {  # arguments of a legend above its panel
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
    "fontsize": 9,
    "frameon": False,
    "borderaxespad": 0.2,
}
STYLE = {
    "text.parse_math": False,  # a dollar sign in the name of a run or a judge is no formula
    "pdf.fonttype": 42,  # TrueType: text in the PDF stays text
    "svg.fonttype": "none",  # text in the SVG stays text
    "svg.hashsalt": "preference study",  # else ids are random
    "font.sans-serif": list(FONTS),
    "font.size": 9.5,
    "axes.titlesize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@contextmanager
def own_style() -> Iterator[None]:
    """Draw with matplotlib's defaults and STYLE, whatever the user's matplotlibrc or style says,
    and put the user's settings back afterwards. Also a decorator: `@drawing.own_style()`.

    With `text.usetex`, fonts that are not installed, other colours or a cropped `savefig.bbox` the
    same numbers would give other figures, or none. Raises UserError if matplotlib cannot be used.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib is missing; install it: pip install matplotlib") from None
    except (ValueError, OSError) as error:  # of MPLBACKEND, or a matplotlibrc that is no text
        raise UserError(
            f"matplotlib cannot start: {console.first_line(error)}; correct the environment "
            "variable MPLBACKEND or the file matplotlibrc"
        ) from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


# ---- a figure and what stands above its panels ---------------------------------------------------


class Heading(NamedTuple):
    """What stands above the panels of a figure."""

    title: str
    notes: tuple[str, ...]
    height: float  # inches


def new_figure(width: float, height: float, title: str, notes: Iterable[str] = ()):
    """Return a matplotlib Figure whose panels have `width` x `height` inches, below a title of one
    line and small notes.

    title: shortened if it is too long for one line. Lines after its first are notes.

    The figure belongs to no pyplot state and needs no display. To be called within `own_style`.
    """
    from matplotlib.figure import Figure

    title, *more = title.split("\n")
    notes = [*more, *notes]
    wrapped = [line for note in notes for line in textwrap.wrap(note, note_characters(width))]
    above = (2 + 1.35 * TITLE_POINTS * bool(title) + 1.3 * NOTE_POINTS * len(wrapped) + 5) / 72
    figure = Figure(figsize=(width, height + above), layout="constrained")
    # The engine knows no titles in two sizes: it arranges what is below them.
    figure.get_layout_engine().set(rect=(0, 0, 1, height / (height + above)))
    y, left = 1 - 4 / 72 / (height + above), 6 / 72 / width
    place = {"ha": "left", "va": "top", "in_layout": False}
    shown, points = fit_title(title, width)
    figure.suptitle(shown, x=left, y=y, fontsize=points, **place)
    if wrapped:
        y -= 1.35 * TITLE_POINTS * bool(title) / 72 / (height + above)
        style = {"fontsize": NOTE_POINTS, "color": "#555555", "linespacing": 1.25, **place}
        figure.text(left, y, "\n".join(wrapped), **style)
    figure.heading = Heading(title, tuple(notes), above)
    return figure


def heading_of(figure) -> Heading:
    return getattr(figure, "heading", Heading("", (), 0.0))


def note_characters(width: float) -> int:
    """How many characters of a note fit into `width` inches."""
    return int((width * 72 - 12) / (0.56 * NOTE_POINTS))


def fit_title(title: str, width: float) -> tuple[str, float]:
    """The title and its size in points, so that it fits into one line: smaller, then shorter."""
    room = width * 72 - 12
    for points in (TITLE_POINTS, SMALLEST_TITLE):
        if text_width(title, points) <= room:
            return title, points
    while title and text_width(title + "…", SMALLEST_TITLE) > room:
        title = title[:-1]
    return title.rstrip(" ,;:(") + "…", SMALLEST_TITLE


def text_width(text: str, points: float) -> float:
    """The width of a line of text in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family="sans-serif", size=points)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]


def plain_log(axis, values: Iterable[float]) -> None:
    """Make an axis of a panel logarithmic, with numbers such as 0.1 and 20, never 10^-1.

    axis: `panel.xaxis` or `panel.yaxis`. values: those that are shown; if none is above 0, the axis
    stays linear.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    positive = [value for value in values if 0 < value < math.inf]
    if not positive:
        return
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    few = max(positive) < 100 * min(positive)  # less than two decades
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.set_minor_formatter(NullFormatter())


# ---- files ---------------------------------------------------------------------------------------


def save_figure(
    figure,
    stem: Path,
    key: str | None = None,
    dpi: int = 180,
    suffixes: Iterable[str] = PAGE_FILES,
) -> None:
    """Write a figure of `new_figure` to `stem`.pdf, `stem`.png and `stem`.svg.

    key: kept in the PNG for `is_drawn`. dpi: of the PNG. Each file appears complete or not at all.
    """
    # 1) Arrange the panels once. With a layout engine, even a spent one, `savefig` would draw the
    #    figure a second time for each format.
    if figure.axes:  # the engine warns about a figure without panels
        figure.get_layout_engine().execute(figure)
    figure.set_layout_engine(None)

    # 2) Draw it once per format. A creation date would make every PDF another file.
    stem.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "pdf": {"CreationDate": None},
        "png": {"Comment": key} if key else None,
        "svg": {"Date": None},
    }
    for suffix in suffixes:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, dpi=dpi, metadata=metadata[suffix])
        content = buffer.getvalue()
        if suffix == "svg":
            content = tidy_svg(content.decode(), heading_of(figure)).encode()

        # 3) Rename into place: a reader finds the old file or the new one, never a part.
        temporary = stem.with_name(f".{stem.name}.{suffix}.{os.getpid()}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, stem.with_name(f"{stem.name}.{suffix}"))


def tidy_svg(svg: str, heading: Heading) -> str:
    """matplotlib's SVG without what stands above the panels, which becomes its title and
    description: a page writes them beside it, in its own letters. Coordinates are cut to 0.01
    points, and ids that nothing refers to go: less than half of the bytes are left.
    """
    start, body = svg[svg.index("<svg") :].split(">", 1)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r"<[^>]*>", tidy_tag, body)  # tags alone: in the text, < and > are escaped
    body = body.replace("</style>", f" text{{{SVG_FONT}}}</style>", 1)
    body = re.sub(r"\n\s*", "\n", body)

    # The upper part, with title and notes, is left out of what is seen.
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', start).groups())
    top = max(0.0, heading.height * 72 - 2)
    size = f'width="{width:g}pt" height="{height - top:g}pt" viewBox="0 {top:g} {width:g} '
    title, description = html.escape(heading.title), html.escape("\n".join(heading.notes))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{size}{height - top:g}" role="img">\n<title>{title}</title>\n'
        f"<desc>{description}</desc>{body}"
    )
    return re.sub(FORBIDDEN, "?", svg)


def tidy_tag(match: re.Match) -> str:
    tag = re.sub(r'^<g id="[^"]*"', "<g", match[0])
    tag = re.sub(rf" ?{SVG_FONT};?", "", tag)
    tag = re.sub(r"(?<=\d\.)\d{3,}", lambda digits: digits[0][:2], tag)
    return re.sub(r"\s*\n\s*", " ", tag)


def is_drawn(stem: Path, key: str) -> bool:
    """Whether both files of a figure exist and the PNG carries `key`."""
    from PIL import Image, UnidentifiedImageError

    png = stem.with_name(f"{stem.name}.png")
    if not png.is_file() or not stem.with_name(f"{stem.name}.pdf").is_file():
        return False
    try:
        with Image.open(png) as image:
            return image.info.get("Comment") == key
    except (UnidentifiedImageError, OSError):  # truncated, or not a PNG: draw it again
        return False


@cache
def drawing_version(*sources: str) -> str:
    """The version of the code that draws a figure: of matplotlib, of this module, and of `sources`,
    the `__file__` of each other module that decides how the figure looks.
    """
    import matplotlib

    hashes = [disk.sha256_file(Path(source)) for source in (__file__, *sources)]
    return disk.sha256_json([matplotlib.__version__, *hashes])
