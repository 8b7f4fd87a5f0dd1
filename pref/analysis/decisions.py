"""What a difference decides, and by how much more a study would decide it.

A row of "improvement" in aggregated_metrics.json is decided as a claim is: by the adjusted test and
the interval together, never by one seed; a cell that lost runs is not shown to be better; and the
best of more cells must win by more than chance may give it. `why_open` says why a row is not
decided, with the seeds or questions that would do (power.py).
"""

import math

from pref.analysis import estimates, power, stats, texts, variation

ONE_SEED = "one seed: how much another seed would differ is not known; train three"
CLOSE = "it was close: a study of this size decides such a difference four times in five"
ANSWERING = ("best of grid", "untrained model")  # comparisons that answers are about
SIZES = ("seeds_to_decide", "units_to_decide", "seeds_now")  # of a row of "improvement"
OUT_OF_REACH = 100  # times the questions or seeds of the study


def verdict_of(row: dict, mark: str, lost: dict[str, str]) -> str:
    """What a row of "improvement" decides: "better", "worse", "not decided" or "not measured".

    mark: why the scores measure nothing, or "". lost: of `lost_runs`. A cell that lost runs looks
    better than it is: that it is better is then not decided.
    """
    if mark:
        return "not measured"
    p, low, high = row["p_adjusted"], row["low"], row["high"]
    if row.get("caveat"):  # the test's error rates are not known for such data
        return "not decided"
    if row["paired"] == "one seed" or None in (p, low, high) or p >= stats.ALPHA:
        return "not decided"
    gain = gain_by_selection(row)
    if low > max(0.0, gain) and row["proposed"] not in lost:
        return "better"
    if high < min(0.0, gain) and row["baseline"] not in lost:
        return "worse"
    return "not decided"


def gain_by_selection(row: dict) -> float:
    """How far chance alone may favour the side that is the best of more cells (variation.py)."""
    if None in (row["selected_by"], row["se"], row["p_adjusted"]):
        return 0.0
    return variation.chance_gain(row["se"], row["proposed_cells"], row["baseline_cells"])


def lost_runs(cells: list[dict], diverged: list[str]) -> dict[str, str]:
    """Label -> how many runs of the cell diverged and left no score; other cells have no key."""
    lost = {}
    for cell in cells:
        count = cell["n_diverged"] - len(set(cell["runs"]) & set(diverged))
        if count:
            runs = texts.count_text(count, "runs")
            lost[cell["label"]] = f"{runs} of {cell['label']} diverged and left no score"
    return lost


def why_open(row: dict, digits: int, units: str) -> list[str]:
    """Why a row is not decided, and what would decide it; then what a study of this size finds.

    units: on what runs are compared.
    """
    if row["paired"] == "one seed":
        return [ONE_SEED]
    if row.get("caveat"):
        return [f"{row['caveat']}; take at least {estimates.FEWEST_QUESTIONS} {units}"]
    if row["p_adjusted"] is None:
        return ["all differences are equal, or there is one question: nothing measures the error"]
    if row["detectable"] is None:
        return ["the data do not say which is better"]
    would = would_decide(row, units)
    if row["low"] is not None and (row["low"] > 0 or row["high"] < 0):
        why = "of so many comparisons, one such interval leaves out 0 by chance: p is adjusted"
        if row["p_adjusted"] < stats.ALPHA:
            why = "the difference is not clear of what chance gives the best of more cells"
        return [f"{why}; {would}"]
    if would == CLOSE:
        return [would]
    detectable = f"{row['detectable']:.{digits}f}"
    return [
        would,
        f"a study of this size finds a difference of {detectable} in four cases of five",
    ]


def would_decide(row: dict, units: str) -> str:
    """By how many more seeds or questions a row would be decided four times in five.

    E.g. "6 more seeds (9 in all) or 3 times the questions (900) would decide it, if the difference
    is as measured".
    """
    seeds, n_seeds = row.get("seeds_to_decide"), row.get("seeds_now")
    needed, n_units = row.get("units_to_decide"), row["n_units"]
    unknown = seeds is None and needed is None
    if (seeds and seeds <= n_seeds) or (needed and needed <= n_units):
        return CLOSE
    if unknown and abs(row["estimate"]) >= row["detectable"]:
        return CLOSE
    ways = []
    if seeds and seeds <= OUT_OF_REACH * n_seeds:
        ways.append(f"{texts.count_text(seeds - n_seeds, 'more seeds')} ({seeds} in all)")
    if needed and needed <= OUT_OF_REACH * n_units:
        ways.append(f"{times_text(needed / n_units)} the {units} ({needed:,})")
    if ways:
        return f"{' or '.join(ways)} would decide it, if the difference is as measured"
    return f"no feasible number of seeds alone or {units} alone would decide so small a difference"


def times_text(ratio: float) -> str:
    """E.g. "1.6 times", "twice", "3 times"."""
    if ratio < 9.95:
        text = f"{ratio:.1f}".removesuffix(".0")
        return "twice" if text == "2" else f"{text} times"
    return f"{ratio:.0f} times"


def is_open(row: dict) -> bool:
    """Whether more seeds or questions may decide a row: it has seeds and a test."""
    measures_both = row["p_adjusted"] is not None and row["paired"] != "one seed"
    return measures_both and verdict_of(row, "", {}) == "not decided"


def sizes_to_decide(row: dict, compared: estimates.Comparison, n_comparisons: int) -> dict:
    """SIZES of a row: the seeds or units with which a study would decide it with 80 % power, if the
    difference is as measured, and the seeds that it has now. None where no number would do.

    n_comparisons: with which the row's p is adjusted; the strictest level of Holm is taken.
    """
    difference = compared.difference
    gain = gain_by_selection(row) / row["se"] if row["se"] else 0.0
    found = power.required_sizes(
        difference,
        abs(difference.estimate),
        alpha=stats.ALPHA / n_comparisons,
        gain=max(0.0, math.copysign(1.0, difference.estimate) * gain),
    )
    now = sorted((len(compared.table_a), len(compared.table_b)))
    # An untrained model has one run: the other's seeds count, as in required_sizes.
    return dict(zip(SIZES, (*found, now[0] if now[0] > 1 else now[1])))
