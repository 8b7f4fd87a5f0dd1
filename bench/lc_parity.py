"""Win rates of AlpacaEval 2 from annotations: one JSON object a model, on a line of its own.

    python bench/lc_parity.py annotations.csv --gamed df_gamed.csv
    python bench/lc_parity.py annotations.csv --gamed df_gamed.csv --difficulty difficulty.csv

    {"model": "NAME", "n": 805, "win_rate": 50.1, "standard_error": 1.4, "lc": 52.3, "lc_se": 1.5}

The annotations are a CSV file, in any order of rows and columns. Further columns are ignored.

model          name of the annotated model; without this column all rows are of one
index          position of the instruction in AlpacaEval's list of 805, from 0
preference     from 1 (baseline) to 2 (model); empty, NaN, None or null: there is none. 0 is a draw,
               as old files have it
len_baseline   characters of the baseline's answer
len_model      characters of the model's answer

n counts rows with a preference, lc is a mean over all rows of the model, and lc_se is its standard
error over instructions (the package's lc_standard_error is something else, 2 to 6 times smaller).
Difficulty is looked up by index, so a model may lack rows.

Without --gamed there is no length-controlled win rate; "lc_unregularised" is given in its place.
Where lengths do not allow one, "lc" is null and "why" says so; the exit code is 1 then.
"""

import argparse
import json
import sys
from collections import Counter
from math import isnan
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
from pref.analysis import length_control
from pref.files import alpaca_eval, console, win_rates
from pref.files.console import UserError

ROUNDING = 1e-9  # of a preference
LONGEST = 1e12  # more characters are no length of an answer
COLUMNS = ("index", "preference", "len_baseline", "len_model")


class Row(NamedTuple):
    y: float  # 0 to 1; NaN without a preference
    len_baseline: float  # NaN if unknown, which only a row without a preference may be
    len_model: float


def read_annotations(path: Path) -> dict[str, dict[int, Row]]:
    """model -> index -> Row. Raises UserError with file and line."""
    models: dict[str, dict[int, Row]] = {}
    lines: dict[tuple[str, int], str] = {}
    for place, fields in alpaca_eval.read_csv(path, COLUMNS):
        model = fields.get("model", path.stem)
        if not model:
            raise UserError(f"{place}: no model")
        index = alpaca_eval.read_index(fields["index"], place)
        if (model, index) in lines:
            raise UserError(
                f"{place}: {model} has index {index} twice (first at {lines[model, index]})"
            )
        lines[model, index] = place
        models.setdefault(model, {})[index] = read_row(fields, place)
    return models


def read_row(fields: dict[str, str], place: str) -> Row:
    preference = alpaca_eval.read_number(fields["preference"], "preference", place, optional=True)
    if preference == 0:
        preference = 1.5
    judged = not isnan(preference)
    if judged and not 1 - ROUNDING <= preference <= 2 + ROUNDING:
        raise UserError(f"{place}: preference {preference:g} is not from 1 (baseline) to 2 (model)")
    lengths = []
    for name in ("len_baseline", "len_model"):
        length = alpaca_eval.read_number(fields[name], name, place, optional=not judged)
        if not isnan(length) and not 0 <= length <= LONGEST:
            raise UserError(f"{place}: {name} {length:g} is not a number of characters")
        lengths.append(length)
    y = min(max(preference - 1, 0.0), 1.0) if judged else preference
    return Row(y, *lengths)


def check_indices(models: dict, difficulty: dict[int, float], path: Path) -> None:
    """Raise UserError if an instruction has no difficulty."""
    for model, rows in models.items():
        if unknown := sorted(set(rows) - set(difficulty)):
            shown = ", ".join(map(str, unknown[:5])) + (" ..." if len(unknown) > 5 else "")
            raise UserError(
                f"{model}: no difficulty of index {shown} in {path}, which has "
                f"{min(difficulty)} to {max(difficulty)}; index counts AlpacaEval's instructions "
                "from 0"
            )


def find_doubtful(models: dict[str, dict[int, Row]]) -> list[str]:
    """Notes on files that may count from 1, or have preferences on another scale."""
    notes = []
    if first := min(min(rows) for rows in models.values()):
        notes.append(
            f"no row has index 0, the first one is {first}: index counts AlpacaEval's instructions "
            "from 0; counted from 1, each row would get the difficulty of another instruction"
        )
    for model, rows in models.items():
        y = [row.y for row in rows.values() if not isnan(row.y)]
        if y and set(y) == {0.0, 0.5}:
            notes.append(
                f"{model}: all preferences are 0 (a draw) or 1 (the baseline wins); if they are "
                "1 where the model wins, add 1 to each"
            )
    return notes


def find_shifted(models: dict[str, dict[int, Row]]) -> list[str]:
    """Notes on models whose baseline answers have other lengths than those of most models: their
    index may count the rows of their own file, of which one is missing.
    """
    lengths: dict[int, Counter] = {}
    for rows in models.values():
        for index, row in rows.items():
            if not isnan(row.len_baseline):
                lengths.setdefault(index, Counter())[row.len_baseline] += 1
    usual = {index: counts.most_common(1)[0][0] for index, counts in lengths.items()}
    notes = []
    for model, rows in models.items():
        known = {
            index: row.len_baseline for index, row in rows.items() if not isnan(row.len_baseline)
        }
        others = [index for index, length in known.items() if length != usual[index]]
        if len(others) > len(rows) / 100:
            notes.append(
                f"{model}: the baseline's answer has another length than for most models at "
                f"{len(others)} indices (first {min(others)}). Do they count its own rows? "
                "Then difficulty is that of other instructions, as on the leaderboard"
            )
    return notes


def rate(model: str, rows: dict[int, Row], difficulty: dict | None, gamed) -> dict:
    """The line of one model; `why` says what it lacks."""
    order = sorted(rows)  # the folds of the cross-validation are those of AlpacaEval's order
    y, len_baseline, len_model = zip(*(rows[index] for index in order))
    name = "lc" if gamed else "lc_unregularised"
    won = win_rates.win_rate(1 + value for value in y if not isnan(value))
    line = {name: getattr(won, name) for name in ("n", "win_rate", "standard_error")}
    line = {"model": model} | line
    try:
        found = length_control.fit(
            y,
            len_baseline,
            len_model,
            difficulty and [difficulty[index] for index in order],
            gamed and gamed.rows,
        )
    except length_control.CannotControl as error:
        return line | {name: None, "lc_se": None, "why": str(error)}
    return line | {name: found.lc, "lc_se": finite(found.se)}


def finite(number: float) -> float | None:
    return None if isnan(number) else number


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("annotations", type=Path, metavar="ANNOTATIONS.csv")
    add("--gamed", type=Path, metavar="FILE", help="AlpacaEval's df_gamed.csv")
    add(
        "--difficulty",
        type=Path,
        metavar="FILE",
        help="CSV file with columns index and instruction_difficulty (default: those of --gamed)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    models = read_annotations(args.annotations)
    gamed = alpaca_eval.read_gamed(args.gamed) if args.gamed else None
    difficulty = gamed.difficulty if gamed else None
    if args.difficulty:
        difficulty = alpaca_eval.read_difficulty(args.difficulty)
    if difficulty is not None:
        check_indices(models, difficulty, args.difficulty or args.gamed)
    of_gamed = [gamed.note] if gamed and gamed.note else []
    for note in of_gamed + find_doubtful(models) + find_shifted(models):
        print(f"note: {note}", file=sys.stderr)

    lines = []
    for model, rows in models.items():
        lines.append(rate(model, rows, difficulty, gamed))
        print(json.dumps(lines[-1], ensure_ascii=False), flush=True)
    return 1 if any("why" in line for line in lines) else 0


if __name__ == "__main__":
    console.run_main(main)
