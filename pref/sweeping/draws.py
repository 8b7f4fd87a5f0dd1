"""Axes whose values are drawn instead of listed: `LRS loguniform 5e-6 5e-5 x 6`.

A draw depends on DRAW_SEED and on the axis' name only. So every loss gets the same values, none
gets more tries than another, and a larger number adds values to those of a smaller one.
"""

import math
import random
import re
from collections.abc import Iterator

from pref.files.console import UserError

KINDS = ("uniform", "loguniform")
DIGITS = 3  # significant ones, of a value that is not a whole number
MOST = 1000  # values of an axis
TRIES = 200  # for each value, before a range counts as too narrow for that many
FORM = "LOW HIGH x NUMBER, for instance loguniform 5e-6 5e-5 x 6"


def is_drawn(text: str) -> bool:
    """Whether an axis' values are to be drawn."""
    return any(word in KINDS for word in text.split())


def values(text: str, axis: str, whole: bool, seed: str) -> list[str]:
    """The values that an axis' text asks for, in the order in which they are drawn.

    text: "uniform 0 1 x 4". axis: its name, AXIS_offset for instance. whole: draw whole numbers,
    for an argument that takes no others. seed: DRAW_SEED. Raises UserError for a text that cannot
    be drawn from.
    """
    if not re.fullmatch(r"\d{1,9}", seed):
        raise UserError(f"DRAW_SEED={seed}: must be a whole number, 0 or more")
    kind, low, high, number = read(text, axis, whole)
    found: list[str] = []
    above = high + 1 if whole else high  # rounded down, so that the ends are as likely as the rest
    for draw in draws(f"{seed} {axis}", TRIES * number):
        value = low + (above - low) * draw
        if kind == "loguniform":
            value = low * (above / low) ** draw
        value = math.floor(value) if whole else float(f"{value:.{DIGITS}g}")
        # Rounding may leave the range, or meet a value that is there already.
        if low <= value <= high and (name := f"{value:.10g}") not in found:
            found.append(name)
        if len(found) == number:
            return found
    what = "whole numbers" if whole else f"numbers of {DIGITS} digits"
    raise UserError(
        f"{name_of(axis)} {text}: only {len(found)} different {what} were found from {low:g} to "
        f"{high:g}; ask for fewer, or widen the range"
    )


def draws(seed: str, number: int) -> Iterator[float]:
    """Numbers in [0, 1), the same ones wherever Python runs."""
    generator = random.Random(seed)
    for _ in range(number):
        yield generator.random()


def read(text: str, axis: str, whole: bool) -> tuple[str, float, float, int]:
    """(kind, low, high, number). Raises UserError."""
    place = f"{name_of(axis)} {text}"
    words = text.split()
    if len(words) != 5 or words[0] not in KINDS or words[3] != "x":
        kind = next(word for word in words if word in KINDS)
        raise UserError(f"{place}: a drawn axis is written {name_of(axis)} {kind} {FORM}")
    kind, *bounds, _, count = words
    try:
        low, high = map(float, bounds)
    except ValueError:
        raise UserError(
            f"{place}: LOW and HIGH must be numbers, not {' and '.join(bounds)}"
        ) from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"{place}: LOW must be below HIGH, and both finite")
    if kind == "loguniform" and low <= 0:
        raise UserError(f"{place}: LOW must be above 0 for loguniform; use uniform")
    if whole and not (low.is_integer() and high.is_integer()):
        raise UserError(f"{place}: takes whole numbers, so LOW and HIGH must be some")
    if not re.fullmatch(r"[1-9]\d*", count) or int(count) > MOST:
        raise UserError(f"{place}: NUMBER must be a whole number from 1 to {MOST}, not {count}")
    return kind, low, high, int(count)


def name_of(axis: str) -> str:
    """An axis as a grid file has it: AXIS_offset -> AXIS offset."""
    return axis.replace("AXIS_", "AXIS ", 1)
