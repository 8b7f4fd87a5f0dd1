"""figures on disk: PDF and PNG, same bytes for same numbers"""

import io
import os
import textwrap
from functools import lru_cache
from pathlib import Path

from pref.files import disk
from pref.files.console import UserError

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
MARKERS = "osD^vP*X"
GREY, RED = "#777777", "#D55E00"
ABOVE = {
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
    "fontsize": 8,
    "frameon": False,
    "borderaxespad": 0.2,
}


def new_figure(width: float, height: float, title: str, weight: str = "bold"):
    """A matplotlib Figure (inches). Not through pyplot: no display, no global state; imported where
    it is needed.

    weight: of the title; "normal" spares the PDF a second font, which takes a third of its time."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is missing; install it: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    lines = [part for line in title.split("\n") for part in textwrap.wrap(line, int(width * 11))]
    figure.suptitle("\n".join(lines), fontsize=11, fontweight=weight)
    return figure


def save_figure(figure, stem: Path, key: str | None = None, dpi: int = 150) -> None:
    """Write `stem`.pdf and .png, the same bytes for the same numbers, beside and renamed as
    files.write_text does.

    key: what the figure was made from, kept in the PNG for is_drawn."""
    from matplotlib import rc_context

    stem.parent.mkdir(parents=True, exist_ok=True)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, not again for each format
    for suffix in (".pdf", ".png"):
        buffer = io.BytesIO()
        metadata = {"CreationDate": None} if suffix == ".pdf" else {"Comment": key} if key else None
        with rc_context({"pdf.fonttype": 42}):  # TrueType: text in the PDF stays text
            figure.savefig(buffer, format=suffix[1:], dpi=dpi, metadata=metadata)
        temporary = stem.with_name(f".{stem.name}{suffix}.{os.getpid()}.tmp")
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, stem.with_name(stem.name + suffix))


def is_drawn(stem: Path, key: str) -> bool:
    """Whether both files of a figure are there and were made from `key`: 60 runs' figures take a
    minute to draw.
    """
    from PIL import Image, UnidentifiedImageError

    png = stem.with_name(stem.name + ".png")
    if not png.is_file() or not stem.with_name(stem.name + ".pdf").is_file():
        return False
    try:
        with Image.open(png) as image:
            return image.info.get("Comment") == key
    except (UnidentifiedImageError, OSError):  # torn or not ours: draw it again
        return False


@lru_cache
def drawing_version() -> str:
    import matplotlib

    return f"{matplotlib.__version__} {disk.sha256_file(Path(__file__))}"
