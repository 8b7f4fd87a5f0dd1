"""How well judges agree with human votes: what judge.py --validate has found, beside every score.

    results/judges/<judge>/validation.json

A validation is of a judge's name and address. Its settings count only where several validations of
the same judge disagree: a judge that writes one token for AlpacaEval and two thousand for MT-Bench
is the same model.

What follows from it:

    as humans: yes          no mark, however small the judge is
    warnings                marked as a judge below 7B is: its scores measure nothing
    as humans: no           said beside every number; below 7B, marked as before
    not measured, or none   a judge below 7B is marked
"""

from collections.abc import Iterable
from pathlib import Path

from pref.files import disk
from pref.files.console import UserError

YES, NO, NOT_MEASURED = "yes", "no", "not measured"
IDENTITY = ("judge", "judge_address", "judge_settings", "judge_id", "grading")
SUMMARY = ("data", "n_pairs", "agreement", "agreement_no_ties", "kappa", "as_humans", "warnings")


def read_validations(results_dir: Path) -> list[dict]:
    """The validations of a results folder, checked. Raises UserError for a file that is none."""
    validations = []
    for path in sorted((results_dir / "judges").glob("*/validation.json")):
        found = disk.read_json(path)
        if not isinstance(found.get("judge"), str):
            raise UserError(f"{path}: no 'judge'; rerun judge.py --validate")
        if found.get("as_humans") not in (YES, NO, NOT_MEASURED):
            raise UserError(
                f"{path}: 'as_humans' is {found.get('as_humans')!r}, not yes, no or not measured; "
                "rerun judge.py --validate"
            )
        warnings = found.get("warnings") or []
        if not (isinstance(warnings, list) and all(isinstance(text, str) for text in warnings)):
            raise UserError(f"{path}: 'warnings' must be a list of texts; run judge.py --validate")
        n_pairs = found.get("n_pairs")
        if n_pairs is not None and not disk.is_number(n_pairs):
            raise UserError(f"{path}: 'n_pairs' must be a number; rerun judge.py --validate")
        validations.append(found | {"warnings": warnings})
    return validations


def add_validations(rows: Iterable[dict], validations: list[dict]) -> None:
    """Give every judgement the `validation` of its judge, None where there is none."""
    known: dict[tuple, dict | None] = {}
    for row in rows:
        judge = tuple(row.get(name) for name in IDENTITY)
        if judge not in known:
            known[judge] = find_validation(dict(zip(IDENTITY, judge)), validations)
        row["validation"] = known[judge]


def find_validation(row: dict, validations: list[dict]) -> dict | None:
    """The validation of a judge. row: IDENTITY of its judgements.

    Of several, one that measured something before one that did not, and one against votes on
    MT-Bench before another; of these, that of the same prompts and grading, then of the same
    grading (a judge may rate well and compare badly), then of the same settings.
    """
    judge, address = row["judge"], row["judge_address"] or None
    found = [
        one
        for one in validations
        if one["judge"] == judge and (one.get("judge_address") or None) == address
    ]
    return max(
        found,
        key=lambda one: (
            one["as_humans"] != NOT_MEASURED,
            one.get("data") == "mt_bench_human",
            one.get("judge_id") == row["judge_id"],
            one.get("grading") == row["grading"],
            same_settings(one.get("judge_settings"), row["judge_settings"]),
            one.get("n_pairs") or 0,
        ),
        default=None,
    )


def same_settings(one, other: str | None) -> bool:
    """judge_settings are JSON text in judgements.csv; validation.json may hold the object."""
    return one == other or disk.sha256_json(one) == disk.sha256_json(parsed(other))


def parsed(text: str | None):
    try:
        return None if text is None else disk.parse_object(text.encode(), "judge_settings")
    except UserError:
        return text


def judge_facts(judge: str, validation: dict | None, too_small: bool) -> dict:
    """What is said of a judge beside its scores.

    Returns `as_humans`, `agreement_text` (the sentence), `validation` (its numbers, or None),
    `smoke_test` (whether the scores measure nothing) and `judge_warnings`.
    """
    as_humans = validation["as_humans"] if validation else NOT_MEASURED
    warnings = validation["warnings"] if validation else []
    return {
        "smoke_test": bool(warnings) or (too_small and as_humans != YES),
        "as_humans": as_humans,
        "agreement_text": sentence(judge, as_humans),
        "judge_warnings": warnings,
        "validation": validation and {key: validation.get(key) for key in SUMMARY},
    }


def sentence(judge: str, as_humans: str) -> str:
    return f"judge {judge} agrees with human votes as often as humans do: {as_humans}"
