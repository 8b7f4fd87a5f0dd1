"""judgements.csv"""

import csv
import io
import re
from collections.abc import Iterable
from pathlib import Path

from pref.files import disk
from pref.files.console import UserError

SMOKE_TEST_BELOW_B = (
    7.0  # judges with fewer billions of parameters test the path, they measure nothing
)
JUDGEMENT_COLUMNS = (
    "question_id",
    "turn",
    "category",
    "model_id",
    "choice",
    "grading",
    "order",
    "baseline",
    "judge",
    "judge_params_b",
    "prompts",
    "repeat",
    "refs",
    "score",
    "winner",
    "status",
    "judgement",
    "request_sha256",
    "answer_sha256",
    "served_model",
    "system_fingerprint",
    "prompt_tokens",
    "completion_tokens",
    "cost_usd",
    "tstamp",
)


def write_judgements(path: Path, rows: Iterable[dict]) -> None:
    """Write judgements.csv: JUDGEMENT_COLUMNS, empty where a value is None."""
    buffer = io.StringIO()
    # All text quoted: a lone \r in a judgement would otherwise end the row when it is read back.
    writer = csv.DictWriter(
        buffer, JUDGEMENT_COLUMNS, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC
    )
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {key: "" if row.get(key) is None else row[key] for key in JUDGEMENT_COLUMNS}
        )
    disk.write_text(path, buffer.getvalue())


def read_judgements(path: Path) -> list[dict]:
    """Rows of judgements.csv with numbers as numbers and empty fields as None. Raises UserError
    with file and line.
    """
    rows = []
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a judge may write
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [c for c in JUDGEMENT_COLUMNS if c not in (reader.fieldnames or [])]
            if missing:
                raise UserError(
                    f"{path}: missing columns {', '.join(missing)}; rerun judge.py to write it again"
                )
            for row in reader:
                rows.append(_typed_judgement(row, f"{path}:{reader.line_num}"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a UTF-8 CSV file: {error}") from None
    return rows


def _typed_judgement(row: dict, place: str) -> dict:
    if None in row or None in row.values():
        raise UserError(
            f"{place}: wrong number of fields (a torn line?); rerun judge.py to write the file again"
        )
    typed = {key: value if value != "" else None for key, value in row.items()}
    try:
        for key in (
            "question_id",
            "turn",
            "choice",
            "repeat",
            "prompt_tokens",
            "completion_tokens",
        ):
            typed[key] = int(typed[key]) if typed[key] is not None else None
        for key in ("score", "judge_params_b", "cost_usd", "tstamp"):
            typed[key] = float(typed[key]) if typed[key] is not None else None
    except ValueError as error:
        raise UserError(f"{place}: {error}; rerun judge.py to write the file again") from None
    if typed["status"] == "ok" and typed["grading"] == "single":
        if typed["score"] is None or not 1 <= typed["score"] <= 10:
            raise UserError(
                f"{place}: status ok but score {typed['score']} is not a rating from 1 to 10"
            )
    return typed


def params_from_name(model: str) -> float | None:
    """Billions of parameters as a model's name states them ('Qwen-72B' 72, 'SmolLM2-135M' 0.135,
    '8x7B' 56).
    """
    sizes = re.findall(r"(?<![a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", model.lower())
    found = [
        int(times or 1) * float(size) / (1 if unit == "b" else 1000) for times, size, unit in sizes
    ]
    return max(found) if found else None
