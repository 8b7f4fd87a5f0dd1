"""Rows of judgements.csv: what a judgement needs before any number is made of it."""

import json
import math
from pathlib import Path

from pref.analysis.runs import MT_BENCH
from pref.files import disk
from pref.files.console import UserError
from pref.files.judgements import ORDERS, REWRITE, SHAPE_COUNTS
from pref.files.verdict_labels import LABELS

GRADINGS = ("single", "pair", "reward", "program")


def check_judgement(row: dict, path: Path, run_id: str) -> None:
    """Raises UserError for a row that is no judgement."""
    of_mt_bench = path.parent.name == MT_BENCH
    known = row["question_id"] is not None and row["turn"] is not None and row["turn"] >= 1
    known = known and row["grading"] in GRADINGS and row["judge"]
    if of_mt_bench:
        known = known and row["turn"] <= 2 and row["category"]
    if not known:
        fields = {key: row[key] for key in ("question_id", "turn", "category", "judge", "grading")}
        turns = "turn 1 or 2, category" if of_mt_bench else "turn"
        raise UserError(
            f"{path}: a row without question, {turns}, judge, or grading: {fields}; rerun judge.py"
        )
    place = f"{path}: question {row['question_id']}"
    if row["grading"] == "pair":
        check_pair(row, path, run_id, of_mt_bench)
    if row["grading"] == "reward" and row["status"] == "ok" and not is_finite(row["score"]):
        raise UserError(f"{place}: status ok but reward {row['score']} is no number; {REWRITE}")
    if row["grading"] == "program" and row["status"] == "ok" and not is_share(row["score"]):
        raise UserError(
            f"{place}: status ok but score {row['score']} is not from 0 to 1; {REWRITE}"
        )
    preference = row["preference"]
    if preference is not None and not 1 <= preference <= 2:  # also NaN
        raise UserError(f"{place}: preference {preference} is not between 1 and 2; {REWRITE}")
    if preference is not None and not row["baseline"]:
        raise UserError(f"{place}: a preference without a baseline; {REWRITE}")
    if row["label"] is not None and path.parent.name.startswith("arena_hard"):
        check_label(row, place)
    check_shape(row["shape"], place)


def check_pair(row: dict, path: Path, run_id: str, of_mt_bench: bool) -> None:
    winners = (run_id, row["model_id"], row["baseline"], "tie")
    is_known = row["winner"] is not None and row["winner"] in winners
    if not row["baseline"] or (of_mt_bench and row["order"] not in ORDERS):
        raise UserError(
            f"{path}: a comparison without baseline, or of order {row['order']!r}, which must "
            "be 1 or 2; rerun judge.py"
        )
    if row["status"] != "ok" or is_known:
        return
    if of_mt_bench or row["winner"] is not None:
        raise UserError(
            f"{path}: question {row['question_id']}: the winner {row['winner']!r} is neither "
            f"{run_id}, nor {row['baseline']}, nor tie; rerun judge.py"
        )
    if row["preference"] is None and row["label"] is None:
        raise UserError(
            f"{path}: question {row['question_id']}: status ok, but no preference, label or "
            f"winner; {REWRITE}"
        )


def check_label(row: dict, place: str) -> None:
    if row["label"] not in LABELS:
        raise UserError(
            f"{place}: label {row['label']!r} is none of {', '.join(LABELS)}; {REWRITE}"
        )
    if row["order"] not in ORDERS:
        raise UserError(f"{place}: a label of order {row['order']!r}, not 1 or 2; {REWRITE}")


def check_shape(text: str | None, place: str) -> None:
    """{"run": counts, "baseline": counts} of the two answers that were compared, as JSON."""
    if text is None:
        return
    try:
        shape = json.loads(text)
        for counts in (shape[side] for side in ("run", "baseline") if shape.get(side) is not None):
            if not all(is_finite(counts[name]) and counts[name] >= 0 for name in SHAPE_COUNTS):
                raise ValueError("not counts")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{place}: shape {text[:60]!r} has no counts of both answers; {REWRITE}"
        ) from None


def is_share(value) -> bool:
    return is_finite(value) and 0 <= value <= 1


def is_finite(value) -> bool:
    return disk.is_number(value) and math.isfinite(value)
