"""Claims: how they are stated, and which cells they are about. verdicts.py judges them.

claims.json next to this file holds the claims of the study. RESULTS_DIR/claims.json, or the file
given with --claims, adds others in the same form: a list of objects. Every claim has

    id      a short name, unique over both files
    claim   the sentence
    kind    what is tested
    model   the model that the claim was made for (optional; a verdict on another model says so)

and, depending on its kind,

    kind                 fields                     what is claimed
    difference           a, b, metric, at_least     mean of a - mean of b is at_least or more
    equivalence          a, b, metric, margin       they differ by less than margin, either way
    variance_reduction   a, b, metric, at_least     the variance over beta of a is smaller than that
                                                    of b, by this share or more
    rarely               a, event, bound            the rate of such runs is below bound
    often                a, event, at_least         the rate of such runs is above at_least

metric is one of measures.py: mt_bench, rating (in points), acc_ref (validation accuracy, as a share
of pairs), alpaca_eval, alpaca_eval_lc, arena_hard, arena_hard_style, win_rate (in percent of
comparisons), reward (in the reward model's unit), or task:NAME, an imported task. A claim gets a
verdict by each judge, baseline and version that it was measured with. event is diverged, or
nonfinite (diverged, or a step with a non-finite loss or gradient).

a and b select cells by the arguments of their runs:

    {"loss": "td_dpo", "beta": 2.5, "tau": 2}

A value is a number or text, a list of alternatives, {"at_least": x}, or "best": of the cells that
match, the one with the best validation accuracy. seed and run_id cannot be selected: a cell is all
of its seeds. If several cells match without "best", the two that differ in the fewest settings are
compared, chosen by validation accuracy among equals; the verdict names the choice.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

from pref.analysis import estimates, measures
from pref.analysis.runs import LATER_OPTIONS, Cell, Values
from pref.files import disk
from pref.files.console import UserError

STUDY_CLAIMS = Path(__file__).with_name("claims.json")
EVENTS = ("diverged", "nonfinite")
FIELDS = {
    "difference": ("a", "b", "metric", "at_least"),
    "equivalence": ("a", "b", "metric", "margin"),
    "variance_reduction": ("a", "b", "metric", "at_least"),
    "rarely": ("a", "event", "bound"),
    "often": ("a", "event", "at_least"),
}


# ---- reading and checking -----------------------------------------------------------------------


def load_claims(results_dir: Path, path: Path | None = None) -> list[dict]:
    """The user's claims, of `path`, or of `results_dir`/claims.json if it exists; then the study's.

    Raises UserError for a claim that is not well formed, or whose id is taken.
    """
    default = results_dir / "claims.json"
    path = path or (default if default.is_file() else None)
    study, others = read_claims(STUDY_CLAIMS), read_claims(path) if path else []
    if taken := {claim["id"] for claim in study} & {claim["id"] for claim in others}:
        raise UserError(
            f"{path}: the study's own claims have the ids {', '.join(sorted(taken))}; choose others"
        )
    return others + study


def read_claims(path: Path) -> list[dict]:
    """Claims of one file, checked. Raises UserError with file, claim and fault."""
    claims = disk.read_json_value(path)
    if not isinstance(claims, list) or not all(isinstance(claim, dict) for claim in claims):
        raise UserError(f"{path}: expected a list of claims; see pref/analysis/claims.json")
    for number, claim in enumerate(claims, 1):
        problem = find_problem(claim)
        if any(claim.get("id") == other.get("id") for other in claims[: number - 1]):
            problem = problem or "an earlier claim has the same id"
        if problem:
            raise UserError(f"{path}: claim {number} ({claim.get('id', 'no id')}): {problem}")
    return claims


def find_problem(claim: dict) -> str | None:
    """What is wrong with a claim, or None."""
    kind = claim.get("kind")
    if not isinstance(kind, str) or kind not in FIELDS:
        return f"kind {kind!r} is none of {', '.join(FIELDS)}"
    if bad := [key for key in ("id", "claim") if not isinstance(claim.get(key), str)]:
        return f"{bad[0]!r} must be text"
    if missing := [key for key in FIELDS[kind] if key not in claim]:
        return f"kind {kind} needs {', '.join(missing)}"
    if extra := sorted(set(claim) - {*FIELDS[kind], "id", "claim", "kind", "model"}):
        return f"kind {kind} has no {', '.join(extra)}"
    for key in ("at_least", "margin", "bound"):
        if key in claim and not is_finite_number(claim[key]):
            return f"{key!r} must be a number"
    if "event" in FIELDS[kind] and not 0 < rate_limit(claim) < 1:
        return f"a rate of {rate_limit(claim):g} must lie between 0 and 1"
    if claim.get("margin", 1) <= 0:
        return "'margin' must be above 0"
    if "metric" in claim and not is_metric(claim["metric"]):
        return f"metric {claim['metric']!r} is none of {', '.join(measures.metric_names())}"
    if claim.get("event", EVENTS[0]) not in EVENTS:
        return f"event {claim['event']!r} is none of {', '.join(EVENTS)}"
    problems = [find_selector_problem(side, claim[side]) for side in ("a", "b") if side in claim]
    return next(filter(None, problems), None)


def is_metric(name) -> bool:
    return isinstance(name, str) and measures.of_metric(name) is not None


def find_selector_problem(side: str, selector) -> str | None:
    if not isinstance(selector, dict) or not isinstance(selector.get("loss"), str):
        return f'{side} must be an object with a loss, such as {{"loss": "dpo", "beta": 0.1}}'
    if varying := {"seed", "run_id"} & set(selector):
        return f"{side} cannot select by {', '.join(varying)}: a cell is all of its seeds"
    for key, wanted in selector.items():
        if isinstance(wanted, dict) and not (
            set(wanted) == {"at_least"} and is_finite_number(wanted["at_least"])
        ):
            return f'{side}: {key} must be a value, a list, "best" or {{"at_least": number}}'
    return None


def is_finite_number(value) -> bool:
    return disk.is_number(value) and math.isfinite(value)


def rate_limit(claim: dict) -> float:
    """The rate that a claim of kind rarely or often is about."""
    return claim["bound"] if claim["kind"] == "rarely" else claim["at_least"]


def unknown_arguments(claim: dict, cells: list[Cell]) -> list[str]:
    """Arguments in a claim's selectors that no run has. A misspelt name would otherwise silently
    match no run.
    """
    known = {key for cell in cells for run in cell.runs for key in run.args}
    return sorted({key for side in ("a", "b") for key in claim.get(side, ())} - known)


def concerns(claim: dict, cells: list[Cell], model: str) -> bool:
    """Whether a claim is about cells that are there and their model, whatever it says of arguments
    that no run has: they may be misspelt.

    model: that the runs were trained from. A model is the same in another folder.
    """
    made_for = claim.get("model")
    if made_for and Path(made_for).name.lower() != Path(model).name.lower():
        return False
    unknown = unknown_arguments(claim, cells)
    sides = [claim[side] for side in ("a", "b") if side in claim]
    known = [{key: side[key] for key in side if key not in unknown} for side in sides]
    return all(select_cells(cells, side) for side in known)


# ---- which cells --------------------------------------------------------------------------------


class NotMeasurable(Exception):
    """Why a claim cannot be judged on these runs; the text becomes the verdict's `why`."""


class Candidates(NamedTuple):
    """Cells that the selectors of a claim match."""

    a: list[Cell]
    b: list[Cell]


class PairChoice(NamedTuple):
    """The two cells that a claim is judged on."""

    a: Cell
    b: Cell
    remark: str  # how they were chosen and in what they differ; may be empty


class SeriesChoice(NamedTuple):
    """The two series over beta that a claim is judged on, each one cell per beta."""

    a: list[Cell]
    b: list[Cell]
    remark: str


def select_cells(cells: list[Cell], selector: dict) -> list[Cell]:
    """Trained cells that match `selector`; "best" matches any value."""
    selected = [cell for cell in cells if cell.loss == selector["loss"] and not cell.untrained]
    for key, wanted in selector.items():
        if key != "loss" and wanted != "best":
            selected = [cell for cell in selected if matches(argument(cell, key), wanted)]
    return selected


def argument(cell: Cell, key: str):
    """A cell's value of an argument; of one that older runs do not record, the one they had."""
    value = cell.runs[0].args.get(key)
    return LATER_OPTIONS.get(key) if value is None else value


def matches(value, wanted) -> bool:
    if isinstance(wanted, dict):
        return isinstance(value, int | float) and value >= wanted.get("at_least", -math.inf)
    if isinstance(wanted, list):
        return any(matches(value, one) for one in wanted)
    if isinstance(wanted, int | float) and isinstance(value, int | float):
        return math.isclose(value, wanted)
    return value == wanted


def wants_best(selector: dict) -> bool:
    return "best" in selector.values()


def describe(selector: dict) -> str:
    """A selector as text: td_dpo beta 2.5 tau 2."""
    values = [f"{key} {json.dumps(value)}" for key, value in selector.items() if key != "loss"]
    return " ".join([selector["loss"], *values]).replace('"', "")


def find_candidates(claim: dict, cells: list[Cell], values: Values) -> Candidates:
    """Cells of both selectors. Raises NotMeasurable if none of a side's cells has values."""
    candidates = Candidates(*(select_cells(cells, claim[side]) for side in ("a", "b")))
    for side, selected in zip(("a", "b"), candidates):
        if not any(estimates.runs_with_values(cell, values) for cell in selected):
            raise NotMeasurable(f"No such runs: {describe(claim[side])}.")
    return candidates


def best_cell(cells: list[Cell]) -> Cell | None:
    """The cell with the best validation accuracy; None if there are several and one has none."""
    if len(cells) > 1 and any(cell.accuracy is None for cell in cells):
        return None
    return max(cells, key=lambda cell: (cell.accuracy or 0, cell.round))


def choose_pair(claim: dict, candidates: Candidates, values: Values) -> PairChoice:
    """The two cells that are compared. Raises NotMeasurable if validation accuracy would have to
    choose and is not known.

    Without "best" in a selector, only those pairs of cells are considered that differ in the fewest
    settings.
    """
    cells_a, cells_b = (
        [cell for cell in cells if estimates.runs_with_values(cell, values)] for cells in candidates
    )
    n_matches = Candidates(len(cells_a), len(cells_b))
    if not wants_best(claim["a"]) and not wants_best(claim["b"]):
        pairs = [(len(estimates.differences(a, b)), a, b) for a in cells_a for b in cells_b]
        fewest = min(count for count, _, _ in pairs)
        cells_a = [a for count, a, _ in pairs if count == fewest]
        cells_b = [b for count, _, b in pairs if count == fewest]

    def choose(side: str, cells: list[Cell]) -> Cell:
        cell = best_cell(cells)
        if cell is None:
            raise NotMeasurable(
                f"Several cells of {describe(claim[side])} and no validation accuracy to choose by."
            )
        return cell

    a = choose("a", cells_a)
    b = choose("b", cells_b if wants_best(claim["b"]) else estimates.nearest(a, cells_b))
    remarks = [
        f"{cell.label} is one of {count} cells that match, chosen by validation accuracy."
        for cell, count in ((a, n_matches.a), (b, n_matches.b))
        if count > 1
    ]
    if claim["metric"] == "acc_ref" and remarks:
        remarks.append("It was chosen on the very pairs that it is judged on.")
    if differing := estimates.differences_text(a, b):
        remarks.append(f"They differ in {differing}.")
    return PairChoice(a, b, " ".join(remarks))


def choose_series(claim: dict, candidates: Candidates, values: Values) -> SeriesChoice:
    """The two series over beta that are compared. Raises NotMeasurable if there are none.

    Of several series (of different tau or settings), a's is the one with the best cell by
    validation accuracy, b's the one nearest to it in settings.
    """
    all_a, all_b = (estimates.beta_series(cells, values) for cells in candidates)
    for side, all_series in (("a", all_a), ("b", all_b)):
        if not all_series:
            raise NotMeasurable(f"No series of at least two betas: {describe(claim[side])}.")

    def choose(side: str, all_series: list[list[Cell]]) -> list[Cell]:
        if len(all_series) == 1:
            return all_series[0]
        best = best_cell([cell for series in all_series for cell in series])
        if best is None:
            selector = describe(claim[side])
            raise NotMeasurable(
                f"Several series of {selector} and no validation accuracy to choose by."
            )
        return next(series for series in all_series if best in series)

    a = choose("a", all_a)
    near = estimates.nearest(a[0], [series[0] for series in all_b])
    b = choose("b", [series for series in all_b if series[0] in near])
    remarks = [
        f"The series of {series[0].label} is one of {len(all_series)}, "
        "chosen by validation accuracy."
        for series, all_series in ((a, all_a), (b, all_b))
        if len(all_series) > 1
    ]
    if differing := estimates.differences_text(a[0], b[0]):
        remarks.append(f"They differ in {differing}.")
    return SeriesChoice(a, b, " ".join(remarks))
