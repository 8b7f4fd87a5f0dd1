"""AlpacaEval's df_gamed.csv: what its length-controlled win rate needs beside a run's judgements.

The file has a row for each answer of two baselines that were told to be verbose or concise
("gamed"): the preference for it over gpt4_1106_preview's answer, and the instruction's difficulty.
Columns: preference (0 to 1, empty if there is none), index (position of the instruction in
AlpacaEval's list, from 0), std_delta_len (difference in length in units of its standard deviation),
instruction_difficulty, not_gamed_baseline (False), model.
"""

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pref.files import disk
from pref.files.alpaca_eval_download import GAMED_COLUMNS, GAMED_SHA256
from pref.files.console import UserError

# Of AlpacaEval's list of instructions: disk.sha256_json of [question_id, instruction] in its order.
INSTRUCTIONS_SHA256 = "c31adcb80a42c4bda4592628efbfb8efc141b93828f9167f04b01fd01655130d"
REMEDY = "run python prep_data.py --alpaca_eval to fetch AlpacaEval's own file"


class Gamed(NamedTuple):
    """Rows of the gamed baselines, arrays of equal length in file order."""

    y: np.ndarray  # preference for the gamed answer, 0 to 1; NaN where there is none
    t: np.ndarray  # tanh of the standardised difference in length
    difficulty: np.ndarray  # of the row's instruction


class GamedFile(NamedTuple):
    """df_gamed.csv as it was read."""

    rows: Gamed
    difficulty: dict[int, float]  # index of the instruction, from 0 -> its difficulty
    official: bool  # whether it is AlpacaEval's file, byte for byte
    path: Path

    @property
    def note(self) -> str | None:
        """What a reader of the numbers must know of the file; None of the official one."""
        if self.official:
            return None
        return (
            f"{self.path} is not AlpacaEval's own file (its sha256 differs): length-controlled win "
            "rates are not quite those of the leaderboard"
        )


def question_id(index: int) -> int:
    """question_id of the instruction at `index` in AlpacaEval's list (see `mt_bench.as_turns`)."""
    return index + 1


def is_official(instructions: dict[int, str]) -> bool:
    """Whether these are AlpacaEval's instructions, by question_id: difficulty goes by that."""
    listed = [[number, instructions[number]] for number in sorted(instructions)]
    return disk.sha256_json(listed) == INSTRUCTIONS_SHA256


def read_gamed(path: Path) -> GamedFile:
    """Read df_gamed.csv. Raises UserError with file and line."""
    y, delta, difficulty, by_index = [], [], [], {}
    for place, row in read_csv(path, GAMED_COLUMNS):
        if row.get("not_gamed_baseline", "").lower() == "true":
            raise UserError(f"{place}: a row that is not of a gamed baseline; {REMEDY}")
        y.append(read_number(row["preference"], "preference", place, optional=True))
        if not (math.isnan(y[-1]) or 0 <= y[-1] <= 1):
            raise UserError(f"{place}: preference {y[-1]:g} is not from 0 to 1; {REMEDY}")
        delta.append(read_number(row["std_delta_len"], "std_delta_len", place))
        add_difficulty(by_index, row, place)
        difficulty.append(by_index[read_index(row["index"], place)])
    rows = Gamed(np.array(y), np.tanh(delta), np.array(difficulty))
    return GamedFile(rows, by_index, disk.sha256_file(path) == GAMED_SHA256, Path(path))


def read_difficulty(path: Path) -> dict[int, float]:
    """index -> difficulty, of a CSV file with columns index and instruction_difficulty, such as
    df_gamed.csv and AlpacaEval's instruction_difficulty.csv. Raises UserError with file and line.
    """
    by_index: dict[int, float] = {}
    for place, row in read_csv(path, ("index", "instruction_difficulty")):
        add_difficulty(by_index, row, place)
    return by_index


def add_difficulty(by_index: dict[int, float], row: dict, place: str) -> None:
    """Add a row's difficulty. Raises UserError if the instruction has another one already."""
    index = read_index(row["index"], place)
    number = read_number(row["instruction_difficulty"], "instruction_difficulty", place)
    if abs(by_index.setdefault(index, number) - number) > 1e-9:
        raise UserError(
            f"{place}: index {index} has difficulty {number:g} here and {by_index[index]:g} above"
        )


# ---- CSV -----------------------------------------------------------------------------------------


def read_csv(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (place, row) of a CSV file that has at least `columns`; values are text.

    Names of columns count without case and blanks around them; without a column "index" the one
    without a name is that, as pandas writes it. Fields are separated by commas, semicolons or
    tabs. Raises UserError with file and line.
    """
    n_rows = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            separator = max(",;\t", key=header.count)
            names = next(csv.reader([header], delimiter=separator), [])
            names = [name.strip().lower() for name in names]
            if names.count("") == 1 and "index" not in names:
                names[names.index("")] = "index"
            check_columns(names, columns, path)
            reader = csv.reader(file, delimiter=separator)
            for fields in reader:
                place = f"{path}:{reader.line_num + 1}"
                if not any(field.strip() for field in fields):
                    continue
                if len(fields) != len(names):
                    raise UserError(f"{place}: {len(fields)} fields, but {len(names)} columns")
                n_rows += 1
                yield place, {name: field.strip() for name, field in zip(names, fields)}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a UTF-8 CSV file: {error}") from None
    if not n_rows:
        raise UserError(f"{path}: no rows")


def check_columns(names: list[str], columns: tuple[str, ...], path: Path) -> None:
    """Raise UserError if one of `columns` is missing or appears twice."""
    if missing := [column for column in columns if column not in names]:
        there = ", ".join(names) or "no header"
        raise UserError(f"{path}: no column {', '.join(missing)}; it has {there}")
    if repeated := [column for column in columns if names.count(column) > 1]:
        raise UserError(f"{path}: column {repeated[0]} appears twice")


def read_number(text: str, name: str, place: str, optional: bool = False) -> float:
    """A finite number; NaN for a field that says there is none, if `optional`."""
    if text.lower() in ("", "nan", "na", "none", "null"):
        if optional:
            return math.nan
        raise UserError(f"{place}: no {name}")
    try:
        number = float(text)
    except ValueError:
        raise UserError(f"{place}: {name} {text!r} is not a number") from None
    if not math.isfinite(number):
        raise UserError(f"{place}: {name} {text} is not finite")
    return number


def read_index(text: str, place: str) -> int:
    number = read_number(text, "index", place)
    if number < 0 or number != int(number):
        raise UserError(f"{place}: index {text} is not a position in a list, from 0")
    return int(number)
