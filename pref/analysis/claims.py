"""Claims and their verdicts: supported, contradicted, undecided, not measured.

claims.json beside this file holds the study's own claims; a file of the same form,
results/claims.json or --claims, adds others. A claim is an object with `id`, `claim` (the
sentence), `kind`, and by kind:

  difference          a, b, metric, at_least: a - b is at_least or more
  equivalence         a, b, metric, margin: a and b differ by less than margin either way (two
  one-sided tests) variance_reduction  a, b, metric, at_least: the variance over beta is smaller by
  this share rarely              a, event (diverged, nonfinite), bound: the rate of such runs is
  below bound often               a, event, at_least: it is above at_least

a and b choose runs: {"loss": "td_dpo", "beta": 2.5, "tau": 2}; beta and tau a number, a list,
{"at_least": x}, or "best" (the cell with the best validation accuracy); any other argument of a run
may stand beside them. Where several cells match, the two that differ in the fewest other settings
are compared, and the best of these; which, is said. metric: mt_bench or acc_ref. `model`, the one
that a claim was made for, is only said.

A difference or equivalence is supported if its test, Holm-adjusted over the claims on the same
scores, and its interval agree; contradicted if the whole interval lies on the wrong side and the
test of that agrees; of one seed, or where runs diverged and left no score, nothing is supported.
"""

import json
import math
from pathlib import Path

from scipy.stats import binomtest

from pref.analysis import estimates, stats
from pref.files import disk
from pref.files.console import UserError

OWN_CLAIMS = Path(__file__).with_name("claims.json")
METRICS = ("mt_bench", "acc_ref", "alpaca_eval")
EVENTS = ("diverged", "nonfinite")
NEEDS = {
    "difference": ("a", "b", "metric", "at_least"),
    "equivalence": ("a", "b", "metric", "margin"),
    "variance_reduction": ("a", "b", "metric", "at_least"),
    "rarely": ("a", "event", "bound"),
    "often": ("a", "event", "at_least"),
}


def read_claims(path: Path) -> list[dict]:
    """Claims of one file, checked. Raises UserError with file, claim and fact."""
    claims = disk.read_json_value(path)
    if not isinstance(claims, list) or not all(isinstance(claim, dict) for claim in claims):
        raise UserError(f"{path}: expected a list of claims; see claims.json of the toolkit")
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
    if not isinstance(kind, str) or kind not in NEEDS:
        return f"kind {kind!r} is none of {', '.join(NEEDS)}"
    if bad := [key for key in ("id", "claim") if not isinstance(claim.get(key), str)]:
        return f"{bad[0]!r} must be text"
    if missing := [key for key in NEEDS[kind] if key not in claim]:
        return f"kind {kind} needs {', '.join(missing)}"
    if extra := sorted(set(claim) - {*NEEDS[kind], "id", "claim", "kind", "model"}):
        return f"kind {kind} has no {', '.join(extra)}"
    for key in ("at_least", "margin", "bound"):
        if key in claim and not is_finite_number(claim[key]):
            return f"{key!r} must be a number"
    rate = claim.get("bound", claim.get("at_least"))
    if "event" in NEEDS[kind] and not 0 < rate < 1:
        return f"a rate of {rate:g} must lie between 0 and 1"
    if claim.get("margin", 1) <= 0:
        return "'margin' must be above 0"
    if claim.get("metric", METRICS[0]) not in METRICS:
        return f"metric {claim['metric']!r} is none of {', '.join(METRICS)}"
    if claim.get("event", EVENTS[0]) not in EVENTS:
        return f"event {claim['event']!r} is none of {', '.join(EVENTS)}"
    problems = [find_selector_problem(side, claim[side]) for side in ("a", "b") if side in claim]
    return next(filter(None, problems), None)


def find_selector_problem(side: str, selector) -> str | None:
    if not isinstance(selector, dict) or not isinstance(selector.get("loss"), str):
        return f'{side} must be an object with a loss, such as {{"loss": "dpo", "beta": 0.1}}'
    if varying := {"seed", "run_id"} & set(selector):
        return f"{side} cannot choose by {', '.join(varying)}: a cell is all its seeds"
    for key, wanted in selector.items():
        if isinstance(wanted, dict) and not (
            set(wanted) == {"at_least"} and is_finite_number(wanted["at_least"])
        ):
            return f'{side}: {key} must be a value, a list, "best" or {{"at_least": number}}'
    return None


def is_finite_number(value) -> bool:
    return disk.is_number(value) and math.isfinite(value)


def select_cells(cells: list[dict], selector: dict) -> list[dict]:
    """Cells that `selector` chooses; "best" leaves the one with the best validation accuracy."""
    found = [
        cell
        for cell in cells
        if cell["loss"] == selector["loss"] and not estimates.is_untrained(cell)
    ]
    for key, wanted in selector.items():
        if key != "loss" and wanted != "best":
            found = [cell for cell in found if matches(cell["runs"][0]["args"].get(key), wanted)]
    return found


def matches(value, wanted) -> bool:
    if isinstance(wanted, dict):
        return isinstance(value, int | float) and value >= wanted.get("at_least", -math.inf)
    if isinstance(wanted, list):
        return any(matches(value, one) for one in wanted)
    if isinstance(wanted, int | float) and isinstance(value, int | float):
        return math.isclose(value, wanted)
    return value == wanted


def best_cell(cells: list[dict]) -> dict | None:
    """The cell with the best validation accuracy; of several without accuracy none."""
    if len(cells) > 1 and any(cell.get("accuracy") is None for cell in cells):
        return None
    return max(cells, key=lambda cell: cell["accuracy"] or 0)


def choose_pair(claim: dict, chosen: dict, values: dict) -> tuple[dict, dict, str] | str:
    """(cell a, cell b, what is to be said of the choice), or why there is none. Where several cells
    match a selector without "best", those that differ in the fewest other settings are
    candidates.
    """
    found = {
        side: [cell for cell in cells if estimates.runs_with_values(cell, values)]
        for side, cells in chosen.items()
    }
    counts = {side: len(cells) for side, cells in found.items()}
    if "best" not in claim["a"].values() and "best" not in claim["b"].values():
        fewest = min(len(estimates.differences(a, b)) for a in found["a"] for b in found["b"])
        near = [
            (a, b)
            for a in found["a"]
            for b in found["b"]
            if len(estimates.differences(a, b)) == fewest
        ]
        found = {"a": [a for a, _ in near], "b": [b for _, b in near]}
    a = best_cell(found["a"])
    if a is None:
        return f"Several cells of {describe(claim['a'])} and no validation accuracy to choose by."
    near = found["b"] if "best" in claim["b"].values() else estimates.nearest(a, found["b"])
    b = best_cell(near)
    if b is None:
        return f"Several cells of {describe(claim['b'])} and no validation accuracy to choose by."
    said = [
        f"{cell['label']} is one of {counts[side]} cells that match, chosen by validation accuracy."
        for side, cell in (("a", a), ("b", b))
        if counts[side] > 1
    ]
    if claim["metric"] == "acc_ref" and said:
        said.append("It was chosen on the very pairs that it is judged on.")
    if differing := estimates.differences_text(a, b):
        said.append(f"They differ in {differing}.")
    return a, b, " ".join(said)


def describe(selector: dict) -> str:
    values = [f"{key} {json.dumps(value)}" for key, value in selector.items() if key != "loss"]
    return " ".join([selector["loss"], *values]).replace('"', "")


def judge_claims(
    claims: list[dict], cells: list[dict], measured: list[dict], model: str, draws: int
) -> list[dict]:
    """A verdict for each claim and, where it is about scores, each judge.

    measured: {"metric", "judge" (name or None), "values", "smoke": why the scores measure nothing,
    or ""}.
    """
    rows = []
    for claim in claims:
        if unknown := unknown_arguments(claim, cells):
            rows.append(
                verdict(
                    claim, None, "not measured", why=f"No run has an argument {', '.join(unknown)}."
                )
            )
            continue
        if "event" in claim:
            rows.append(judge_rate(claim, cells))
            continue
        sources = [source for source in measured if source["metric"] == claim["metric"]]
        rows += [judge_scores(claim, cells, source, draws) for source in sources]
        if not sources:
            rows.append(verdict(claim, None, "not measured", why=why_unmeasured(claim["metric"])))
    decide(rows)
    for row in rows:
        if row["model"] not in (None, model) and row["verdict"] != "not measured":
            row["why"] += f" Made for {row['model']}, measured here on {model}."
    return rows


def unknown_arguments(claim: dict, cells: list[dict]) -> list[str]:
    """Arguments in a's or b's selector that no run has: a slip of the pen would otherwise match
    every run.
    """
    known = {key for cell in cells for run in cell["runs"] for key in run["args"]}
    return sorted({key for side in ("a", "b") for key in claim.get(side, ())} - known)


def why_unmeasured(metric: str) -> str:
    if metric == "alpaca_eval":
        return "AlpacaEval is judged by its own program (gen_mtbench.py --export alpaca_eval)."
    return {"mt_bench": "No judgements.", "acc_ref": "No val_pairs.jsonl."}[metric]


def verdict(claim: dict, judge: str | None, word: str, why: str = "", **numbers) -> dict:
    row = {
        "id": claim["id"],
        "claim": claim["claim"],
        "kind": claim["kind"],
        "metric": claim.get("metric"),
        "event": claim.get("event"),
        "model": claim.get("model"),
        "judge": judge,
        "verdict": word,
        "a": None,
        "b": None,
        "estimate": None,
        "low": None,
        "high": None,
        "test": None,
        "p": None,
        "p_holm": None,
        "limit": None,
        "n_units": None,
        "n_seeds": None,
        "why": why,
    }
    return row | numbers


def judge_scores(claim: dict, cells: list[dict], source: dict, draws: int) -> dict:
    """One claim about scores by one judge (or about accuracy); "pending" until the family's
    p-values are adjusted.
    """
    values, judge = source["values"], source["judge"]
    chosen = {side: select_cells(cells, claim[side]) for side in ("a", "b")}
    for side, found in chosen.items():
        if not any(estimates.runs_with_values(cell, values) for cell in found):
            return verdict(
                claim, judge, "not measured", why=f"No such runs: {describe(claim[side])}."
            )
    judge_one = judge_spread if claim["kind"] == "variance_reduction" else judge_difference
    row = judge_one(claim, chosen, values, judge, draws)
    if source["smoke"] and row["verdict"] != "not measured":
        row |= {"verdict": "not measured", "why": f"{source['smoke']}."}
    return row


def judge_difference(
    claim: dict, chosen: dict, values: dict, judge: str | None, draws: int
) -> dict:
    pair = choose_pair(claim, chosen, values)
    if isinstance(pair, str):
        return verdict(claim, judge, "not measured", why=pair)
    a, b, said = pair
    found = estimates.compare_cells(a, b, values, draws)
    if found is None:
        return verdict(
            claim,
            judge,
            "not measured",
            why="The runs share no question that was rated in all of them.",
        )
    difference = found[0]
    if claim["kind"] == "equivalence":
        limit, p = claim["margin"], difference.p_equivalent(claim["margin"])
        test = f"two one-sided tests against a difference of {limit:g}"
    else:
        limit, p = claim["at_least"], difference.p(claim["at_least"], side=1)
        test = f"primary test, one-sided, of a difference of at least {limit:g}"
    return verdict(
        claim,
        judge,
        "pending",
        why=said,
        a=a["label"],
        b=b["label"],
        estimate=difference.estimate,
        low=difference.low,
        high=difference.high,
        test=test,
        p=estimates.known(p),
        limit=limit,
        n_units=difference.n_questions,
        n_seeds=difference.n_seeds,
        difference=difference,
        lost=" ".join(filter(None, (lost_runs(cell, values) for cell in (a, b)))),
    )


def lost_runs(cell: dict, values: dict) -> str:
    """Runs that diverged and left nothing to compare: without them the loss looks better than it
    is.
    """
    lost = [
        run for run in cell["runs"] if run["status"] == "diverged" and not values.get(run["run_id"])
    ]
    return (
        f"{len(lost)} of {len(cell['runs'])} runs of {cell['label']} diverged and have no score."
        if lost
        else ""
    )


def decide(rows: list[dict]) -> None:
    """Replace "pending" by a verdict; Holm over the claims that are tested on the same scores."""
    families: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["verdict"] == "pending":
            families.setdefault((row["metric"], row["judge"]), []).append(row)
    for family in families.values():
        adjusted = stats.holm([math.nan if row["p"] is None else row["p"] for row in family])
        for row, p in zip(family, adjusted):
            row["p_holm"] = estimates.known(p)
            word, why = decide_difference(row, row["difference"])
            row |= {"verdict": word, "why": " ".join(filter(None, (why, row["lost"], row["why"])))}
    for row in rows:
        row.pop("difference", None)
        row.pop("lost", None)


def decide_difference(row: dict, difference: stats.Difference) -> tuple[str, str]:
    limit, low, high = row["limit"], row["low"], row["high"]
    if row["p_holm"] is None:
        return (
            "undecided",
            "All differences are equal, or there is one question: nothing measures the error.",
        )
    if difference.seeds == "one seed":
        return (
            "undecided",
            "One seed: how much another seed would differ is not known; train three.",
        )
    if row["kind"] == "equivalence":
        inside = -limit < low and high < limit
        above = low > limit and difference.p(limit, side=1) < stats.ALPHA
        outside = above or (high < -limit and difference.p(-limit, side=-1) < stats.ALPHA)
    else:
        inside, outside = low >= limit, high < limit and difference.p(limit, side=-1) < stats.ALPHA
    if outside:
        return "contradicted", "The whole interval lies on the other side."
    if row["p_holm"] < stats.ALPHA and inside:
        if row["lost"]:
            return "undecided", "The runs with a score would support it."
        return "supported", "Test and interval agree."
    return "undecided", what_would_decide(row, difference)


def what_would_decide(row: dict, difference: stats.Difference) -> str:
    """Roughly how many seeds or questions: for parity, if the two are equal; else, if the
    difference is as measured.
    """
    equivalence = row["kind"] == "equivalence"
    gap = row["limit"] if equivalence else abs(row["estimate"] - row["limit"])
    if gap == 0:
        return "The measured difference is the limit itself."
    seeds, questions = stats.needed(difference, gap, equivalence)
    unit = "questions" if row["metric"] == "mt_bench" else "validation pairs"
    if (seeds and seeds <= difference.n_seeds) or (
        questions and questions <= difference.n_questions
    ):
        return "It was close: a study of this size decides such a case four times in five."
    ways = [f"{seeds:,} seeds with these {difference.n_questions} {unit}"] if seeds else []
    ways += [f"{questions:,} {unit} with these {difference.n_seeds} seeds"] if questions else []
    given = "if they are truly equal" if equivalence else "if the difference is as measured"
    if not ways:
        return f"Neither more seeds alone nor more {unit} alone would decide it, {given}: it needs both."
    return f"It would take roughly {' or '.join(ways)}, {given} (80 % power)."


def choose_series(
    claim: dict, chosen: dict, values: dict
) -> tuple[list[dict], list[dict], str] | str:
    """(cells of a, cells of b, what is to be said), a cell a beta; or why there are none. Of
    several series (tau, other settings) a's is the one with the best cell by validation accuracy,
    b's the nearest to it in settings.
    """
    series = {
        side: list(estimates.beta_series(cells, values).values()) for side, cells in chosen.items()
    }
    if missing := [side for side, found in series.items() if not found]:
        return f"No series of at least two betas: {describe(claim[missing[0]])}."
    best = {}
    for side, found in series.items():
        cells = [cell for cells in found for cell in cells]
        if side == "b":
            near = estimates.nearest(best["a"][0], [cells[0] for cells in found])
            cells = [cell for cells in found if cells[0] in near for cell in cells]
            found = [cells for cells in found if cells[0] in near]
        cell = cells[0] if len(found) == 1 else best_cell(cells)
        if cell is None:
            return f"Several series of {describe(claim[side])} and no validation accuracy to choose by."
        best[side] = next(cells for cells in found if cell in cells)
    said = [
        f"The series of {cells[0]['label']} is one of {len(series[side])}, chosen by validation accuracy."
        for side, cells in best.items()
        if len(series[side]) > 1
    ]
    if differing := estimates.differences_text(best["a"][0], best["b"][0]):
        said.append(f"They differ in {differing}.")
    return best["a"], best["b"], " ".join(said)


def judge_spread(claim: dict, chosen: dict, values: dict, judge: str | None, draws: int) -> dict:
    """Variance over beta of a's series against b's."""
    series = choose_series(claim, chosen, values)
    if isinstance(series, str):
        return verdict(claim, judge, "not measured", why=series)
    a, b, said = series
    found = estimates.compare_spreads(a, b, values, draws)
    if found is None:
        return verdict(
            claim,
            judge,
            "not measured",
            why="Fewer than two betas, or no question, that both have.",
        )
    names = [
        cells[0]["loss"] + (f" τ={cells[0]['tau']:g}" if cells[0]["tau"] is not None else "")
        for cells in (a, b)
    ]
    numbers = {
        "a": names[0],
        "b": names[1],
        "limit": claim["at_least"],
        "n_seeds": found["n_seeds"],
        "p": found["brown_forsythe_p"],
        "test": f"bootstrap of the ratio over {len(found['betas'])} betas; Brown-Forsythe on the beta means",
    }
    if found["ratio"] is not None:
        numbers |= {
            "estimate": 1 - found["ratio"],
            "low": 1 - found["high"],
            "high": 1 - found["low"],
        }
    word, why = decide_spread(found, claim["at_least"], names)
    return verdict(claim, judge, word, why=" ".join(filter(None, (why, said))), **numbers)


def decide_spread(found: dict, at_least: float, names: list[str]) -> tuple[str, str]:
    if found["ratio"] is None:
        name = names[0] if found["spreads"][0].variance <= 0 else names[1]
        why = f"The ratio is undefined: what seeds and questions explain leaves no variance over beta for {name}."
        return "undecided", f"{why} More seeds and questions would show it."
    if found["n_seeds"] < 2:
        return "undecided", "One seed: its noise cannot be told from beta."
    if found["high"] <= 1 - at_least:
        return "supported", "The whole interval lies above the claim."
    if found["low"] > 1 - at_least:
        return "contradicted", "The whole interval lies below the claim."
    for factor in (2, 4, 8, 16, 32, 64, 128):
        # if the variances are as estimated, the draws' distance from their centre falls with the
        # root of the factor
        shrunk = [
            s._replace(draws=s.variance + (s.draws - s.variance) / math.sqrt(factor))
            for s in found["spreads"]
        ]
        ratio = stats.variance_ratio(*shrunk)
        if not ratio["low"] <= 1 - at_least <= ratio["high"]:
            return (
                "undecided",
                f"It would take roughly {factor} times the seeds and the questions, or more betas.",
            )
    return (
        "undecided",
        "No number of seeds and questions up to 128 times these would decide it; more betas might.",
    )


def judge_rate(claim: dict, cells: list[dict]) -> dict:
    """How often runs diverge or meet a non-finite step, with the exact binomial interval and
    test.
    """
    runs = [
        run for cell in select_cells(cells, claim["a"]) for run in cell["runs"] if run["summary"]
    ]
    if not runs:
        return verdict(claim, None, "not measured", why=f"No such runs: {describe(claim['a'])}.")
    failed = [run["status"] == "diverged" for run in runs]
    if claim["event"] == "nonfinite":
        failed = [bad or bool(run["summary"]["nonfinite_steps"]) for bad, run in zip(failed, runs)]
    count, total = sum(failed), len(runs)
    low, high = stats.exact_interval(count, total)
    limit = claim["bound"] if claim["kind"] == "rarely" else claim["at_least"]
    below = float(binomtest(count, total, limit, alternative="less").pvalue)
    above = float(binomtest(count, total, limit, alternative="greater").pvalue)
    numbers = {
        "a": describe(claim["a"]),
        "estimate": count / total,
        "low": low,
        "high": high,
        "limit": limit,
        "p": below if claim["kind"] == "rarely" else above,
        "n_units": total,
        "n_seeds": None,
        "test": f"exact binomial, rate {'below' if claim['kind'] == 'rarely' else 'above'} {limit:g}",
    }
    counted = f"{count} of {total} runs."
    if numbers["p"] < stats.ALPHA:
        return verdict(claim, None, "supported", why=counted, **numbers)
    if (above if claim["kind"] == "rarely" else below) < stats.ALPHA:
        return verdict(claim, None, "contradicted", why=counted, **numbers)
    return verdict(
        claim, None, "undecided", why=f"{counted} {runs_needed(claim, count / total)}", **numbers
    )


def runs_needed(claim: dict, rate: float) -> str:
    if claim["kind"] == "rarely" and rate == 0:
        runs = math.ceil(math.log(stats.ALPHA) / math.log(1 - claim["bound"]))
        return f"It would take {runs} runs without one."
    limit = claim["bound"] if claim["kind"] == "rarely" else claim["at_least"]
    if rate == limit:
        return "The rate is at the claimed limit itself."
    runs = math.ceil((1.645 + 0.842) ** 2 * limit * (1 - limit) / (rate - limit) ** 2)
    return f"It would take roughly {runs} runs, if the rate is as measured (80 % power)."
