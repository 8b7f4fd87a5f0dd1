"""Arena-Hard's verdict labels, from a judgement's text to what they count for.

A label speaks of the answers as they were shown: A first, B second. `judgements.csv` keeps it that
way (column `label`), with `order` to say which of them was the run's.
"""

from typing import NamedTuple

from pref.files.judgements import RUN_IS_A, RUN_IS_B


class Label(NamedTuple):
    """What a label says of A."""

    score: float  # 1: better than B, 0.5: as good, 0: worse
    rows: int  # how often it counts: a strong win three times (show_result.py of arena-hard-auto)


LABELS = {
    "A>>B": Label(1.0, 3),
    "A>B": Label(1.0, 1),
    "A=B": Label(0.5, 1),
    "B>A": Label(0.0, 1),
    "B>>A": Label(0.0, 3),
}
MIRRORED = dict(zip(LABELS, reversed(LABELS)))  # the same verdict, had the answers changed places
# Other ways to write a label, which judges use as well.
SPELLINGS = {"A<<B": "B>>A", "A<B": "B>A", "B=A": "A=B", "B<A": "A>B", "B<<A": "A>>B"}


def read_label(text: str) -> str | None:
    """The label in LABELS that `text` (without brackets) spells; None if it spells none."""
    label = SPELLINGS.get(text, text)
    return label if label in LABELS else None


def from_run_side(label: str, order: str) -> str:
    """A label with the run's answer as A, wherever it was shown: ("B>>A", "2") -> "A>>B".

    Raises KeyError for what is no label or no order.
    """
    return {RUN_IS_A: label, RUN_IS_B: MIRRORED[label]}[order]
