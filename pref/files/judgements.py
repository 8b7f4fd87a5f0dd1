"""judgements.csv: a run's judgements as judge.py writes and analyze.py reads them.

README.md in this folder says what each column holds. Also here: the size of a judge, as its name
tells it, and the size below which its scores count as a smoke test.
"""

import csv
import io
import math
import re
from collections.abc import Iterable
from pathlib import Path

from pref.files import disk
from pref.files.console import UserError

# Judges with fewer billions of parameters than this show that the pipeline works; their scores
# measure nothing.
SMOKE_TEST_BELOW_B = 7.0

# Columns in file order, with the type of their values. An empty field is None.
COLUMN_TYPES = {
    "question_id": int,
    "turn": int,
    "category": str,
    "model_id": str,
    "choice": int,
    "grading": str,
    "order": str,
    "baseline": str,
    "judge": str,
    "judge_params_b": float,
    "prompts": str,
    "repeat": int,
    "refs": str,
    "score": float,
    "winner": str,
    "status": str,
    "judgement": str,
    "request_sha256": str,
    "answer_sha256": str,
    "served_model": str,
    "system_fingerprint": str,
    "prompt_tokens": int,
    "completion_tokens": int,
    "cost_usd": float,
    "tstamp": float,
    # Since version 1.1.0; None in older files
    "judge_id": str,
    "judge_address": str,
    "judge_settings": str,
    "rating_mass": float,
    "reading": str,
    # Since version 1.2.0; None in older files
    "bench": str,
    "preference": float,
    "label": str,
    "token_logprobs": str,
    "shape": str,
}
# Column `order`: which answer of a comparison was shown first, as A.
RUN_IS_A, RUN_IS_B = "1", "2"
ORDERS = (RUN_IS_A, RUN_IS_B)
SHAPE_COUNTS = ("chars", "headers", "lists", "bold")  # of each answer in the column `shape`
JUDGEMENT_COLUMNS = tuple(COLUMN_TYPES)
NEW_COLUMNS = (
    *("judge_id", "judge_address", "judge_settings", "rating_mass", "reading"),
    *("bench", "preference", "label", "token_logprobs", "shape"),
)
REWRITE = "rerun judge.py to write the file again"


def write_judgements(path: Path, rows: Iterable[dict]) -> None:
    """Write judgements.csv with JUDGEMENT_COLUMNS; None becomes an empty field."""
    buffer = io.StringIO()
    # All text is quoted: an unquoted \r within a judgement would end its row when it is read.
    writer = csv.DictWriter(
        buffer, JUDGEMENT_COLUMNS, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC
    )
    writer.writeheader()
    for row in rows:
        values = {column: row.get(column) for column in JUDGEMENT_COLUMNS}
        writer.writerow({c: "" if value is None else value for c, value in values.items()})
    disk.write_text(path, buffer.getvalue())


def read_judgements(path: Path) -> list[dict]:
    """Rows of judgements.csv, each value of its column's type, None where the field is empty.

    Raises UserError with file and line.
    """
    rows = []
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a judge may write
    try:
        # utf-8-sig: a spreadsheet that saved the file again may have put a mark at its start.
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            given = {*(reader.fieldnames or []), *NEW_COLUMNS}
            missing = [column for column in JUDGEMENT_COLUMNS if column not in given]
            if missing:
                raise UserError(f"{path}: missing columns {', '.join(missing)}; {REWRITE}")
            for row in reader:
                rows.append(parse_judgement(row, f"{path}:{reader.line_num}"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a UTF-8 CSV file: {error}; {REWRITE}") from None
    return rows


def parse_judgement(row: dict, place: str) -> dict:
    """`row`, as csv reads it, with typed values. Raises UserError, beginning with `place`."""
    if None in row or None in row.values():
        raise UserError(f"{place}: wrong number of fields (an incomplete line?); {REWRITE}")
    typed = dict.fromkeys(NEW_COLUMNS)
    for column, text in row.items():
        kind = COLUMN_TYPES.get(column, str)
        try:
            typed[column] = None if text == "" else kind(text)
        except ValueError as error:
            raise UserError(f"{place}: {column}: {error}; {REWRITE}") from None
    if problem := find_problem(typed):
        raise UserError(f"{place}: status ok but {problem}; {REWRITE}")
    return typed


def find_problem(row: dict) -> str | None:
    """What is wrong with a row whose status is "ok", or None."""
    score, preference = row["score"], row["preference"]
    if row["status"] != "ok":
        return None
    if row["grading"] == "single" and (score is None or not 1 <= score <= 10):
        return f"score {score} is not a rating from 1 to 10"
    if row["grading"] == "reward" and (score is None or not math.isfinite(score)):
        return f"score {score} is not a number"
    if row["grading"] == "program" and (score is None or not 0 <= score <= 1):
        return f"score {score} is not from 0 to 1"
    if preference is not None and not 1 <= preference <= 2:
        return f"preference {preference} is not from 1 to 2"
    return None


# A size in a model's name: "7b", "0.5B", "8x22B", "qwen2p5-1p5b", "bloom-7b1", "135M".
SIZE = re.compile(
    r"(?:(?P<experts>\d+)x)?(?P<whole>\d+)(?:[.p](?P<decimals>\d+))?"
    r"(?P<unit>[bm])(?P<after>\d?)(?![a-z0-9])"
)
# Families whose names do not tell their size, in billions.
KNOWN_SIZES = {
    r"phi-?(?:3|3\.5|4)-mini": 3.8,
    r"phi-?2(?![.\d])": 2.7,
    r"phi-?1(?:[._]5)?(?![.\d])": 1.3,
}


def params_from_name(model: str) -> float | None:
    """Billions of parameters in a model's name or path; None if it has none.

    'Qwen-72B' -> 72, 'SmolLM2-135M' -> 0.135, 'Qwen-1_8B' -> 1.8, 'Mixtral-8x7B' -> 56,
    'Qwen3-30B-A3B' -> 30 (A3B: active in each token), 'OLMoE-1B-7B' -> 7 (in all),
    'TinyLlama-1.1B-step-50K-105b' -> 1.1 (the first; 105b are tokens), 'gpt-5-mini' -> None
    """
    for part in reversed(model.lower().split("/")):  # of a path, the last part with a size
        if size := size_in(part):
            return size
    return None


def size_in(name: str) -> float | None:
    """The size in one part of a name, in lower case."""
    name = re.sub(r"[0-9a-f]{12,}", "", name)  # the hash of a commit
    name = re.sub(r"(?<![0-9a-z_.])([01])_(?=\d+b)", r"\1.", name)  # 1_8b, but not llama_2_7b
    sizes, end = [], None
    for match in SIZE.finditer(name):
        # "a3b" are the active parameters, "iq4b" is a quantisation, "gpt4.1b" no size at all.
        if re.search(r"[0-9.]$|(?<![a-z])(?:a|q|iq|v)$", name[: match.start()]):
            continue
        value = int(match["experts"] or 1) * float(
            f"{match['whole']}.{match['decimals'] or match['after'] or 0}"
        )
        if match["unit"] == "m" and value < 14:  # "1m" is a context
            continue
        if end is not None and name[end : match.start()] != "-":
            break  # only "1b-7b" is one statement
        sizes.append(value / (1 if match["unit"] == "b" else 1000))
        end = match.end()
    known = (size for pattern, size in KNOWN_SIZES.items() if re.search(pattern, name))
    return max(sizes, default=next(known, None))
