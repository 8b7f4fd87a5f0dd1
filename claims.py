"""Claims and their verdicts: supported, contradicted, undecided, not measured.

claims.json beside this file holds the study's own claims; a file of the same form, results/claims.json or --claims,
adds others. A claim is an object with `id`, `claim` (the sentence), `kind`, and by kind:

  difference          a, b, metric, at_least (and value, the size that is claimed): a - b is at_least or more
  equivalence         a, b, metric, margin: a and b differ by less than margin either way (two one-sided tests)
  variance_reduction  a, b, metric, at_least: the variance over beta is smaller by this share
  never               a, event (diverged, nonfinite), bound: no run, and the rate is below bound
  often               a, event, at_least: the rate is above at_least

a and b choose runs: {"loss": "td_dpo", "beta": 2.5, "tau": 2}; beta and tau a number, a list, {"at_least": x}, or
"best" (the cell with the best validation accuracy); any other argument of a run may stand beside them. metric:
mt_bench or acc_ref. `model`, the one that a claim was made for, is only said.

A difference or equivalence is supported if its test, Holm-adjusted over the claims on the same scores, and its
interval agree; contradicted if the whole interval lies on the wrong side; of one seed nothing follows.
"""

import json
import math
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

import inference
import stats
from files import UserError

OWN_CLAIMS = Path(__file__).with_name("claims.json")
METRICS = ("mt_bench", "acc_ref", "alpaca_eval")
EVENTS = ("diverged", "nonfinite")
NEEDS = {
    "difference": ("a", "b", "metric", "at_least"),
    "equivalence": ("a", "b", "metric", "margin"),
    "variance_reduction": ("a", "b", "metric", "at_least"),
    "never": ("a", "event", "bound"),
    "often": ("a", "event", "at_least"),
}


# ---- reading ------------------------------------------------------------------------------------


def read_claims(path: Path) -> list[dict]:
    """Claims of one file, checked. Raises UserError with file, claim and fact."""
    try:
        claims = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(claims, list) or not all(isinstance(claim, dict) for claim in claims):
        raise UserError(f"{path}: expected a list of claims; see claims.json of the toolkit")
    for number, claim in enumerate(claims, 1):
        if problem := find_problem(claim):
            raise UserError(f"{path}: claim {number} ({claim.get('id', 'no id')}): {problem}")
    return claims


def find_problem(claim: dict) -> str | None:
    if claim.get("kind") not in NEEDS:
        return f"kind {claim.get('kind')!r} is none of {', '.join(NEEDS)}"
    for key in ("id", "claim"):
        if not isinstance(claim.get(key), str):
            return f"{key!r} must be text"
    if missing := [key for key in NEEDS[claim["kind"]] if key not in claim]:
        return f"kind {claim['kind']} needs {', '.join(missing)}"
    for key in ("a", "b"):
        if key in claim and not (isinstance(claim[key], dict) and isinstance(claim[key].get("loss"), str)):
            return f'{key} must be an object with a loss, such as {{"loss": "dpo", "beta": 0.1}}'
    for key in ("at_least", "margin", "bound", "value"):
        if key in claim and (isinstance(claim[key], bool) or not isinstance(claim[key], int | float)):
            return f"{key!r} must be a number"
    if claim.get("metric", METRICS[0]) not in METRICS:
        return f"metric {claim['metric']!r} is none of {', '.join(METRICS)}"
    if claim.get("event", EVENTS[0]) not in EVENTS:
        return f"event {claim['event']!r} is none of {', '.join(EVENTS)}"
    return None


# ---- which runs ---------------------------------------------------------------------------------


def select_cells(cells: list[dict], selector: dict) -> list[dict]:
    """Cells that `selector` chooses; "best" leaves the one with the best validation accuracy."""
    found = [cell for cell in cells if cell["loss"] == selector["loss"] and not inference.is_untrained(cell)]
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


def best_cell(cells: list[dict], values: dict) -> dict | None:
    """The cell with the best validation accuracy among those with values; of several without accuracy none."""
    cells = [cell for cell in cells if inference.runs_with_values(cell, values)]
    if len(cells) < 2:
        return cells[0] if cells else None
    if any(cell.get("accuracy") is None for cell in cells):
        return None
    return max(cells, key=lambda cell: cell["accuracy"])


def describe(selector: dict) -> str:
    values = [f"{key} {json.dumps(value)}" for key, value in selector.items() if key != "loss"]
    return " ".join([selector["loss"], *values]).replace('"', "")


# ---- verdicts -----------------------------------------------------------------------------------


def judge_claims(claims: list[dict], cells: list[dict], measured: list[dict], model: str, draws: int) -> list[dict]:
    """A verdict for each claim and, where it is about scores, each judge.

    measured: {"metric", "judge" (name or None), "values", "smoke": why the scores measure nothing, or ""}.
    """
    rows = []
    for claim in claims:
        if "event" in claim:
            rows.append(judge_rate(claim, cells))
            continue
        sources = [source for source in measured if source["metric"] == claim["metric"]]
        rows += [judge_scores(claim, cells, source, draws) for source in sources]
        if not sources:
            rows.append(verdict(claim, None, "not measured", why=why_unmeasured(claim["metric"])))
    decide(rows)
    for row in rows:
        if row["model"] and row["model"] != model:
            row["why"] += (
                f" Made for {row['model']}, measured here on {model}." if row["verdict"] != "not measured" else ""
            )
    return rows


def why_unmeasured(metric: str) -> str:
    if metric == "alpaca_eval":
        return "AlpacaEval is judged by its own program (gen_mtbench.py --export alpaca_eval)."
    return {"mt_bench": "No judgements.", "acc_ref": "No val_pairs.jsonl."}[metric]


def verdict(claim: dict, judge: str | None, word: str, why: str = "", **numbers) -> dict:
    row = {"id": claim["id"], "claim": claim["claim"], "kind": claim["kind"], "metric": claim.get("metric"),
           "event": claim.get("event"), "model": claim.get("model"), "judge": judge, "verdict": word, "a": None,
           "b": None,
           "estimate": None, "low": None, "high": None, "test": None, "p": None, "p_holm": None, "limit": None,
           "n_units": None, "n_seeds": None, "why": why}  # fmt: skip
    return row | numbers


def judge_scores(claim: dict, cells: list[dict], source: dict, draws: int) -> dict:
    """One claim about scores by one judge (or about accuracy); "pending" until the family's p-values are adjusted."""
    values, judge = source["values"], source["judge"]
    chosen = {side: select_cells(cells, claim[side]) for side in ("a", "b")}
    for side, found in chosen.items():
        if not any(inference.runs_with_values(cell, values) for cell in found):
            return verdict(claim, judge, "not measured", why=f"No such runs: {describe(claim[side])}.")
    if claim["kind"] == "variance_reduction":
        row = judge_spread(claim, chosen, values, judge, draws)
    else:
        row = judge_difference(claim, chosen, values, judge, draws)
    if source["smoke"] and row["verdict"] != "not measured":
        row |= {"verdict": "not measured", "why": f"{source['smoke'].capitalize()}."}
    return row


def judge_difference(claim: dict, chosen: dict, values: dict, judge: str | None, draws: int) -> dict:
    a, b = (best_cell(chosen[side], values) for side in ("a", "b"))
    if a is None or b is None:
        side = "a" if a is None else "b"
        why = f"Several cells of {describe(claim[side])} and no validation accuracy to choose by."
        return verdict(claim, judge, "not measured", why=why)
    found = inference.compare_cells(a, b, values, draws)
    if found is None:
        return verdict(claim, judge, "not measured", why="The runs share no question that was rated in all of them.")
    difference = found[0]
    if claim["kind"] == "equivalence":
        limit, p = claim["margin"], difference.p_equivalent(claim["margin"])
        test = f"two one-sided tests against a difference of {limit:g}"
    else:
        limit, p = claim["at_least"], difference.p(claim["at_least"], side=1)
        test = f"primary test, one-sided, of a difference of at least {limit:g}"
    return verdict(
        claim, judge, "pending", a=a["label"], b=b["label"], estimate=difference.estimate, low=difference.low,
        high=difference.high, test=test, p=inference.known(p), limit=limit, n_units=difference.n_questions,
        n_seeds=difference.n_seeds, difference=difference, gap=gap_of(claim, difference),
    )  # fmt: skip


def gap_of(claim: dict, difference: stats.Difference) -> float:
    """Distance from the claim's limit to the truth that planning assumes: the claim's, or what was measured."""
    if claim["kind"] == "equivalence":
        return claim["margin"]
    return abs(claim.get("value", difference.estimate) - claim["at_least"])


def decide(rows: list[dict]) -> None:
    """Replace "pending" by a verdict; Holm over the claims that are tested on the same scores."""
    families: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["verdict"] == "pending":
            families.setdefault((row["metric"], row["judge"]), []).append(row)
    for family in families.values():
        adjusted = stats.holm([math.nan if row["p"] is None else row["p"] for row in family])
        for row, p in zip(family, adjusted):
            row["p_holm"] = inference.known(p)
            decide_difference(row)
    for row in rows:
        row.pop("difference", None)
        row.pop("gap", None)


def decide_difference(row: dict) -> None:
    limit, significant = row["limit"], row["p_holm"] is not None and row["p_holm"] < stats.ALPHA
    if row["kind"] == "equivalence":
        inside, outside = -limit < row["low"] and row["high"] < limit, row["low"] > limit or row["high"] < -limit
    else:
        inside, outside = row["low"] >= limit, row["high"] < limit
    if row["difference"].seeds == "one seed":
        row |= {
            "verdict": "undecided",
            "why": "One seed: how much another seed would differ is not known; train three.",
        }
    elif outside:
        row |= {"verdict": "contradicted", "why": "The whole interval lies on the other side."}
    elif significant and inside:
        row |= {"verdict": "supported", "why": "Test and interval agree."}
    else:
        row |= {"verdict": "undecided", "why": what_would_decide(row)}


def what_would_decide(row: dict) -> str:
    difference = row["difference"]
    seeds, questions = stats.needed(difference, row["gap"])
    unit = "questions" if row["metric"] == "mt_bench" else "validation pairs"
    ways = []
    if seeds:
        ways.append(f"about {max(seeds, difference.n_seeds + 1):,} seeds with these {difference.n_questions} {unit}")
    if questions:
        more = max(questions, difference.n_questions + 1)
        ways.append(f"about {more:,} {unit} with these {difference.n_seeds} seeds")
    if not ways:
        return f"Neither more seeds alone nor more {unit} alone would decide it: it needs both."
    return f"It would take {' or '.join(ways)} (80 % power)."


def judge_spread(claim: dict, chosen: dict, values: dict, judge: str | None, draws: int) -> dict:
    """Variance over beta of a's cells against b's. With several values of tau, "best" is the tau of the best cell."""
    cells = {}
    for side in ("a", "b"):
        found = [cell for cell in chosen[side] if inference.runs_with_values(cell, values)]
        if len({cell["tau"] for cell in found}) > 1:
            best = best_cell(found, values)
            if best is None:
                why = f"Several tau of {describe(claim[side])} and no validation accuracy to choose by."
                return verdict(claim, judge, "not measured", why=why)
            found = [cell for cell in found if cell["tau"] == best["tau"]]
        cells[side] = found
    found = inference.compare_spreads(cells["a"], cells["b"], values, draws)
    if found is None:
        return verdict(claim, judge, "not measured", why="Fewer than two betas that both have.")
    tau = cells["a"][0]["tau"]
    labels = {"a": claim["a"]["loss"] + (f" τ={tau:g}" if tau is not None else ""), "b": claim["b"]["loss"]}
    numbers = {
        **labels, "limit": claim["at_least"], "n_seeds": found["n_seeds"], "p": found["brown_forsythe_p"],
        "test": f"bootstrap of the ratio over {len(found['betas'])} betas; p: Brown-Forsythe on the beta means",
    }  # fmt: skip
    if found["ratio"] is None:
        side = "a" if found["variance"] <= 0 else "b"
        why = (
            f"The ratio is undefined: what seeds and questions explain leaves no variance over beta for {labels[side]}."
        )
        return verdict(claim, judge, "undecided", why=f"{why} More seeds and questions would show it.", **numbers)
    numbers |= {"estimate": 1 - found["ratio"], "low": 1 - found["high"], "high": 1 - found["low"]}
    if found["n_seeds"] < 2:
        return verdict(claim, judge, "undecided", why="One seed: its noise cannot be told from beta.", **numbers)
    if numbers["low"] >= claim["at_least"]:
        return verdict(claim, judge, "supported", why="The whole interval lies above the claim.", **numbers)
    if numbers["high"] < claim["at_least"]:
        return verdict(claim, judge, "contradicted", why="The whole interval lies below the claim.", **numbers)
    why = what_would_decide_spread(cells, values, claim["at_least"], draws)
    return verdict(claim, judge, "undecided", why=why, **numbers)


def what_would_decide_spread(cells: dict, values: dict, at_least: float, draws: int) -> str:
    """By how much seeds and questions would have to grow, if the variances are as estimated: the draws' distance from
    their centre falls with the root of that factor."""
    a, b = (inference.spread_of(cells[side], values, draws)[0] for side in ("a", "b"))
    for factor in (2, 4, 8, 16, 32, 64, 128):
        shrunk = [s._replace(draws=s.variance + (s.draws - s.variance) / math.sqrt(factor)) for s in (a, b)]
        found = stats.variance_ratio(*shrunk)
        if found["ratio"] is not None and not found["low"] <= 1 - at_least <= found["high"]:
            return f"It would take about {factor} times the seeds and the questions, or more betas."
    return "No number of seeds and questions up to 128 times these would decide it; more betas might."


def judge_rate(claim: dict, cells: list[dict]) -> dict:
    """How often runs diverge or meet a non-finite step, with the exact binomial interval and test."""
    runs = [run for cell in select_cells(cells, claim["a"]) for run in cell["runs"] if run["summary"]]
    if not runs:
        return verdict(claim, None, "not measured", why=f"No such runs: {describe(claim['a'])}.")
    failed = [run["status"] == "diverged" for run in runs]
    if claim["event"] == "nonfinite":
        failed = [bad or bool(run["summary"]["nonfinite_steps"]) for bad, run in zip(failed, runs)]
    count, total = int(np.sum(failed)), len(runs)
    low, high = stats.exact_interval(count, total)
    limit = claim["bound"] if claim["kind"] == "never" else claim["at_least"]
    below = float(binomtest(count, total, limit, alternative="less").pvalue)
    above = float(binomtest(count, total, limit, alternative="greater").pvalue)
    numbers = {
        "a": describe(claim["a"]), "estimate": count / total, "low": low, "high": high, "limit": limit,
        "p": below if claim["kind"] == "never" else above, "n_units": total, "n_seeds": None,
        "test": f"exact binomial, rate {'below' if claim['kind'] == 'never' else 'above'} {limit:g}",
    }  # fmt: skip
    counted = f"{count} of {total} runs."
    if claim["kind"] == "never" and count:
        return verdict(claim, None, "contradicted", why=f"It happened: {counted}", **numbers)
    if numbers["p"] < stats.ALPHA:
        return verdict(claim, None, "supported", why=counted, **numbers)
    if claim["kind"] == "often" and below < stats.ALPHA:
        return verdict(claim, None, "contradicted", why=counted, **numbers)
    return verdict(claim, None, "undecided", why=f"{counted} {runs_needed(claim, count / total)}", **numbers)


def runs_needed(claim: dict, rate: float) -> str:
    if claim["kind"] == "never":
        runs = math.ceil(math.log(stats.ALPHA) / math.log(1 - claim["bound"]))
        return f"It would take {runs} runs without one."
    gap = abs(rate - claim["at_least"])
    if gap == 0:
        return "The rate is at the claimed limit itself."
    runs = math.ceil((1.645 + 0.842) ** 2 * claim["at_least"] * (1 - claim["at_least"]) / gap**2)
    return f"It would take about {runs} runs at this rate (80 % power)."
