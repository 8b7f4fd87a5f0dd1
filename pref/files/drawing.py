"""Figures on disk, as PDF and PNG: the same numbers give the same bytes.

    with drawing.own_style():
        figure = drawing.new_figure(6, 4, "Loss over steps")
        axis = figure.subplots()
        axis.plot(steps, losses, color=drawing.COLOURS[0])
        drawing.save_figure(figure, Path("figures/loss"))   # figures/loss.pdf and figures/loss.png

The PNG can carry a key of what the figure shows, so that `is_drawn` spares drawing it again. The
key should contain `drawing_version`: a change of the drawing code then redraws the figure too.
"""

import io
import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from pref.files import console, disk
from pref.files.console import UserError

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
MARKERS = "osD^vP*X"
GREY, RED = "#777777", "#D55E00"
ABOVE = {  # arguments of a legend above its panel
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
    "fontsize": 8,
    "frameon": False,
    "borderaxespad": 0.2,
}


@contextmanager
def own_style() -> Iterator[None]:
    """Draw with matplotlib's defaults, whatever the user's matplotlibrc or style says, and put the
    user's settings back afterwards. Also a decorator: `@drawing.own_style()`.

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
        # A dollar sign in the name of a run or a judge is a dollar sign, not a formula.
        matplotlib.rcParams["text.parse_math"] = False
        matplotlib.rcParams["pdf.fonttype"] = 42  # TrueType: text in the PDF stays text
        yield


def new_figure(width: float, height: float, title: str, weight: str = "bold"):
    """Return a matplotlib Figure of `width` x `height` inches with a wrapped title.

    weight: of the title. "normal" saves embedding a second font, a third of the time of a PDF.

    The figure belongs to no pyplot state and needs no display. To be called within `own_style`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    lines = [part for line in title.split("\n") for part in textwrap.wrap(line, int(width * 11))]
    figure.suptitle("\n".join(lines), fontsize=11, fontweight=weight)
    return figure


def save_figure(figure, stem: Path, key: str | None = None, dpi: int = 150) -> None:
    """Write a figure of `new_figure` to `stem`.pdf and `stem`.png.

    key: kept in the PNG for `is_drawn`. dpi: of the PNG. Each file appears complete or not at all.
    """
    # 1) Arrange the panels once. With a layout engine, even a spent one, `savefig` would draw the
    #    figure a second time for each format.
    if figure.axes:  # the engine warns about a figure without panels
        figure.get_layout_engine().execute(figure)
    figure.set_layout_engine(None)

    # 2) Draw it once per format. A creation date would make every PDF another file.
    stem.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"pdf": {"CreationDate": None}, "png": {"Comment": key} if key else None}
    for suffix in ("pdf", "png"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, dpi=dpi, metadata=metadata[suffix])

        # 3) Rename into place: a reader finds the old file or the new one, never a part.
        temporary = stem.with_name(f".{stem.name}.{suffix}.{os.getpid()}.tmp")
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, stem.with_name(f"{stem.name}.{suffix}"))


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
