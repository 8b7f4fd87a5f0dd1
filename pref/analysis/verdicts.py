"""Verdicts on claims: supported, contradicted, undecided, not measured.

claims.py says how claims are stated and which cells they are about. How they are judged:

    difference, equivalence   supported if the test, Holm-adjusted over the claims on the same
                              scores, says so and the whole 95 % interval fulfils the claim;
                              contradicted if the whole interval lies on the wrong side. Of a
                              difference, the end that counts is first moved by what chance may
                              give the side that is the best of more cells
    variance_reduction        by the interval of the ratio of the two variances
    rarely, often             exact binomial test on the number of runs

An undecided verdict says roughly how many seeds, questions or runs would decide. With one seed, or
where runs diverged and left no score, nothing is supported. Scores of a judge that is too small
measure nothing.
"""

import math
from typing import NamedTuple

from scipy.stats import binomtest

from pref.analysis import claims, estimates, length_control, measures, power, stats, variation
from pref.analysis.claims import Candidates, NotMeasurable
from pref.analysis.runs import Cell, Scores, Values

NUMBERS = (
    *("a", "b", "estimate", "low", "high", "test"),
    *("p", "p_holm", "limit", "n_units", "n_seeds"),
)
NO_LENGTH_CONTROL = (
    "Without df_gamed.csv there is no length-controlled win rate (prep_data.py --alpaca_eval); "
    f"{length_control.UNREGULARISED} is another number."
)


class PendingVerdict(NamedTuple):
    """A tested claim; its verdict waits for the p-values of other claims on the same scores."""

    row: dict
    difference: stats.Difference
    lost: str  # says which runs diverged and left no score, or ""
    gain: float  # how far chance may favour a, as the best of more cells; negative: it favours b
    scores: tuple = ()  # metric and judge: claims on the same scores are adjusted together


def judge_claims(
    study: list[dict], cells: list[Cell], measured: list[Scores], model: str, draws: int
) -> list[dict]:
    """Judge claims on the cells of a study.

    Returns one row for each claim and, where the claim is about scores, for each judge that gave
    some. `model` is the one that the runs were trained from.
    """
    rows: list[dict] = []
    pending: list[PendingVerdict] = []
    for claim in study:
        if unknown := claims.unknown_arguments(claim, cells):
            why = f"No run has an argument {', '.join(unknown)}."
            rows.append(verdict_row(claim, None, "not measured", why))
        elif "event" in claim:
            rows.append(judge_rate(claim, cells))
        else:
            sources = [scores for scores in measured if measures.fits(claim["metric"], scores)]
            for scores in sources:
                row, open_case = judge_scores(claim, cells, scores, draws)
                rows.append(row)
                pending += [open_case] if open_case else []
            if not sources:
                why = measures.of_metric(claim["metric"]).missing
                rows.append(verdict_row(claim, None, "not measured", why, concerns_runs=False))
    decide(pending)
    elsewhere = {one["id"] for one in study if not claims.concerns(one, cells, model)}
    for row in rows:
        row["concerns_runs"] &= row["id"] not in elsewhere
        if row["model"] not in (None, model) and row["verdict"] != "not measured":
            row["why"] += f" Made for {row['model']}, measured here on {model}."
    return rows


def verdict_row(claim: dict, judge: str | None, verdict: str, why: str = "", **numbers) -> dict:
    """A row of the table of verdicts: every key is present, None where there is no number."""
    measure = measures.of_metric(claim["metric"]) if claim.get("metric") else None
    return {
        **{key: claim.get(key) for key in ("id", "claim", "kind", "metric", "event", "model")},
        "unit": measure and measure.claim_unit,
        "judge": judge,
        "verdict": verdict,
        **dict.fromkeys(NUMBERS),
        "concerns_runs": True,  # or it is about other losses, settings, scores or another model
        **numbers,
        "why": why,
    }


def judge_scores(
    claim: dict, cells: list[Cell], scores: Scores, draws: int
) -> tuple[dict, PendingVerdict | None]:
    """Row of one claim about scores, and its test if the verdict is still pending."""
    pending = None
    if scores.results.get("definition") == length_control.UNREGULARISED:
        return verdict_row(claim, scores.judge, "not measured", NO_LENGTH_CONTROL), None
    try:
        candidates = claims.find_candidates(claim, cells, scores.values)
        if claim["kind"] == "variance_reduction":
            row = judge_spread(claim, candidates, scores, draws)
        else:
            pending = estimate_difference(claim, candidates, scores)
            row = pending.row
    except NotMeasurable as reason:
        return verdict_row(claim, scores.judge, "not measured", str(reason)), None
    row["unit"] = measures.of_metric(scores.metric).claim_unit
    if scores.smoke:  # the numbers are shown, but they measure nothing
        row |= {"verdict": "not measured", "why": f"{scores.smoke}."}
        pending = None
    elif claim["kind"] == "equivalence" and (why := scores.results.get("position_warning")):
        # A judge that goes by position finds all runs alike.
        row |= {"verdict": "undecided", "why": f"The judge cannot show it: {why}."}
        pending = None
    return row, pending


# ---- differences and equivalence ----------------------------------------------------------------


def estimate_difference(claim: dict, candidates: Candidates, scores: Scores) -> PendingVerdict:
    """Estimate and test the difference that a claim is about."""
    choice = claims.choose_pair(claim, candidates, scores.values)
    compared = estimates.compare_cells(choice.a, choice.b, scores.values)
    if compared is None:
        raise NotMeasurable("The runs share no question that was rated in all of them.")
    difference = compared.difference
    numbers = [count_measured(cells, scores.values) for cells in candidates]
    gain = variation.chance_gain(difference.se, *numbers) if difference.measurable() else 0.0
    if claim["kind"] == "equivalence":
        limit, p = claim["margin"], difference.p_equivalent(claim["margin"])
        test = f"two one-sided tests against a difference of {limit:g}"
    else:
        limit, p = claim["at_least"], difference.p(claim["at_least"], side=1)
        test = f"primary test, one-sided, of a difference of at least {limit:g}"
    row = verdict_row(
        claim,
        scores.judge,
        "pending",
        why=join_sentences(choice.remark, selection_remark(numbers, gain)),
        a=choice.a.label,
        b=choice.b.label,
        estimate=difference.estimate,
        low=estimates.finite(difference.low),
        high=estimates.finite(difference.high),
        test=test,
        p=estimates.finite(p),
        limit=limit,
        n_units=difference.n_questions,
        n_seeds=difference.n_seeds,
    )
    lost = [lost_runs(cell, scores.values) for cell in (choice.a, choice.b)]
    of_scores = (scores.metric, scores.judge)
    return PendingVerdict(row, difference, join_sentences(*lost), gain, of_scores)


def count_measured(cells: list[Cell], values: Values) -> int:
    """Number of cells that have values."""
    return sum(bool(estimates.runs_with_values(cell, values)) for cell in cells)


def selection_remark(numbers: list[int], gain: float) -> str:
    """Says how far chance alone may favour the side that is the best of more cells; "" if neither.

    numbers: of the cells of both sides. gain: by variation.chance_gain; a limit, since
    validation accuracy follows the noise of a score less than the score itself does.
    """
    if not gain:
        return ""
    return (
        f"Best of {numbers[0]} against best of {numbers[1]}: chance alone may have put the "
        f"difference up to {abs(gain):.2g} too {'high' if gain > 0 else 'low'}; the selection "
        "table compares at equal budget."
    )


def lost_runs(cell: Cell, values: Values) -> str:
    """Names runs that diverged and left nothing to compare, without which the loss looks better
    than it is; "" if there are none.
    """
    lost = [run for run in cell.runs if run.status == "diverged" and not values.get(run.run_id)]
    if not lost:
        return ""
    return f"{len(lost)} of {len(cell.runs)} runs of {cell.label} diverged and have no score."


def join_sentences(*sentences: str) -> str:
    return " ".join(filter(None, sentences))


def decide(pending: list[PendingVerdict]) -> None:
    """Set the verdicts of tested claims, Holm-adjusted over the claims on the same scores."""
    families: dict[tuple, list[PendingVerdict]] = {}
    for case in pending:
        families.setdefault(case.scores, []).append(case)
    for family in families.values():
        p_values = [math.nan if case.row["p"] is None else case.row["p"] for case in family]
        p_opposite = stats.holm([opposite_p(case) for case in family])
        for case, p, opposite in zip(family, stats.holm(p_values), p_opposite):
            case.row["p_holm"] = estimates.finite(p)
            verdict, why = decide_difference(case, opposite)
            case.row["verdict"] = verdict
            case.row["why"] = join_sentences(why, case.lost, case.row["why"])


def opposite_p(case: PendingVerdict) -> float:
    """p-value of the opposite of a claim: a smaller difference, or one beyond the margin."""
    limit, difference = case.row["limit"], case.difference
    if case.row["kind"] == "equivalence":
        return min(difference.p(limit, side=1), difference.p(-limit, side=-1))
    return difference.p(limit, side=-1)


def decide_difference(case: PendingVerdict, p_opposite: float) -> tuple[str, str]:
    """Verdict on a difference or an equivalence, and why. p_opposite: Holm-adjusted."""
    row, difference = case.row, case.difference
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
        outside = low > limit or high < -limit
    else:
        inside = low - max(0.0, case.gain) >= limit
        outside = high - min(0.0, case.gain) < limit
    if outside and p_opposite < stats.ALPHA:
        return "contradicted", "Test and interval agree on the opposite."
    if outside:
        why = "The whole interval lies on the other side, but there are several claims (Holm)."
        return "undecided", why
    if row["p_holm"] < stats.ALPHA and inside:
        if case.lost:
            return "undecided", "The runs with a score would support it."
        return "supported", "Test and interval agree."
    if row["kind"] == "difference" and (
        high < limit or (low >= limit and row["p_holm"] < stats.ALPHA)
    ):
        return "undecided", "The interval is not clear of what chance gives the best of more cells."
    return "undecided", what_would_decide(row, difference)


def what_would_decide(row: dict, difference: stats.Difference) -> str:
    """Roughly how many seeds or questions would decide: an equivalence if the two are truly equal,
    a difference if it is as measured.
    """
    equivalence = row["kind"] == "equivalence"
    gap = row["limit"] if equivalence else abs(row["estimate"] - row["limit"])
    if gap == 0:
        return "The measured difference is the limit itself."
    seeds, questions = power.required_sizes(difference, gap, equivalence)
    unit = measures.of_metric(row["metric"]).units
    n_seeds, n_questions = difference.n_seeds, difference.n_questions
    if (seeds and seeds <= n_seeds) or (questions and questions <= n_questions):
        return "It was close: a study of this size decides such a case four times in five."
    ways = [f"{seeds:,} seeds with these {n_questions} {unit}"] if seeds else []
    ways += [f"{questions:,} {unit} with these {n_seeds} seeds"] if questions else []
    given = "if they are truly equal" if equivalence else "if the difference is as measured"
    if not ways:
        return (
            f"Neither more seeds alone nor more {unit} alone would decide it, {given}: "
            "it needs both."
        )
    return f"It would take roughly {' or '.join(ways)}, {given} (80 % power)."


# ---- variance over beta -------------------------------------------------------------------------


def judge_spread(claim: dict, candidates: Candidates, scores: Scores, draws: int) -> dict:
    """Row of a claim that the variance over beta of a's series is smaller than that of b's."""
    choice = claims.choose_series(claim, candidates, scores.values)
    compared = estimates.compare_spreads(choice.a, choice.b, scores.values, draws)
    if compared is None:
        raise NotMeasurable("Fewer than two betas, or than two questions, that both have.")
    name_a, name_b = series_name(choice.a[0]), series_name(choice.b[0])
    numbers = {
        "a": name_a,
        "b": name_b,
        "limit": claim["at_least"],
        "n_seeds": compared.n_seeds,
        "p": compared.brown_forsythe_p,
        "test": f"interval of the ratio over {len(compared.betas)} betas; "
        "Brown-Forsythe on the beta means",
    }
    # A reduction is 1 - ratio: the interval's ends change places. It has a limit even where b's
    # variance is estimated as 0 or below, so that there is no estimate.
    if compared.ratio is not None or compared.low > 0:
        numbers |= {"low": 1 - compared.high, "high": 1 - compared.low}
    if compared.ratio is not None:
        numbers["estimate"] = 1 - compared.ratio
    verdict, why = decide_spread(compared, claim["at_least"], name_b, draws)
    why = join_sentences(why, choice.remark)
    return verdict_row(claim, scores.judge, verdict, why, **numbers)


def series_name(cell: Cell) -> str:
    return cell.loss + (f" τ={cell.tau:g}" if cell.tau is not None else "")


def decide_spread(
    compared: estimates.SpreadComparison, at_least: float, name_b: str, draws: int
) -> tuple[str, str]:
    """Verdict on a variance reduction of `at_least` or more, and why.

    name_b: the series whose variance is the denominator. draws: of each confidence distribution.
    """
    if compared.n_seeds < 2:
        return "undecided", "One seed: its noise cannot be told from beta."
    if compared.high <= 1 - at_least:
        return "supported", "The whole interval lies above the claim."
    if compared.low > 1 - at_least:
        return "contradicted", "The whole interval lies below the claim."
    sizes = what_would_decide_spread(compared, 1 - at_least, draws)
    if compared.high_open:
        why = f"The variance of {name_b} over beta cannot be told from 0: there is no upper limit."
        return "undecided", join_sentences(why, sizes)
    return "undecided", sizes


def what_would_decide_spread(compared: estimates.SpreadComparison, limit: float, draws: int) -> str:
    """How much larger a study would decide whether the ratio is at most `limit`, if the variances
    are as estimated.
    """
    for factor in (2, 4, 8, 16, 32, 64, 128):
        larger = [
            variation.with_less_noise(spread, factor, min(draws, 2000), stream)
            for stream, spread in enumerate((compared.spread_a, compared.spread_b))
        ]
        ratio = variation.variance_ratio(*larger)
        if not ratio["low"] <= limit <= ratio["high"]:
            size = f"{factor} times the seeds and the questions"
            return f"It would take roughly {size}, or more betas."
    return (
        "No number of seeds and questions up to 128 times these would decide it; more betas might."
    )


# ---- rates --------------------------------------------------------------------------------------


def judge_rate(claim: dict, cells: list[Cell]) -> dict:
    """Row of a claim about how often runs diverge or meet a non-finite step, with the exact
    binomial test and interval.
    """
    selected = claims.select_cells(cells, claim["a"])
    runs = [run for cell in selected for run in cell.runs if run.summary]
    if not runs:
        why = f"No such runs: {claims.describe(claim['a'])}."
        return verdict_row(claim, None, "not measured", why)
    failed = [run.status == "diverged" for run in runs]
    if claim["event"] == "nonfinite":
        failed = [bad or bool(run.summary["nonfinite_steps"]) for bad, run in zip(failed, runs)]
    count, total, limit = sum(failed), len(runs), claims.rate_limit(claim)
    below = float(binomtest(count, total, limit, alternative="less").pvalue)
    above = float(binomtest(count, total, limit, alternative="greater").pvalue)
    low, high = stats.exact_interval(count, total)
    rarely = claim["kind"] == "rarely"
    p_claimed, p_opposite = (below, above) if rarely else (above, below)
    if p_claimed < stats.ALPHA:
        verdict, sizes = "supported", why_beyond(limit, low, high)
    elif p_opposite < stats.ALPHA:
        verdict, sizes = "contradicted", why_beyond(limit, low, high)
    else:
        verdict, sizes = "undecided", runs_needed(claim, count / total)
    return verdict_row(
        claim,
        None,
        verdict,
        why=join_sentences(f"{count} of {total} runs.", sizes),
        a=claims.describe(claim["a"]),
        estimate=count / total,
        low=low,
        high=high,
        limit=limit,
        p=p_claimed,
        n_units=total,
        test=f"exact binomial, rate {'below' if rarely else 'above'} {limit:g}",
    )


def why_beyond(limit: float, low: float, high: float) -> str:
    """Says why a rate is decided although its interval holds the limit; "" if it does not."""
    if not low <= limit <= high:
        return ""
    return (
        "The test is one-sided, as the claim is; the two-sided interval reaches beyond the limit."
    )


def runs_needed(claim: dict, rate: float) -> str:
    """How many runs would decide a claim about a rate."""
    limit = claims.rate_limit(claim)
    if claim["kind"] == "rarely" and rate == 0:
        # Least n at which n runs without the event reject a rate of `limit`: (1 - limit)^n < ALPHA.
        runs = math.ceil(math.log(stats.ALPHA) / math.log(1 - limit))
        return f"It would take {runs} runs without one."
    if rate == limit:
        return "The rate is at the claimed limit itself."
    runs = power.required_runs(limit, rate)
    if runs is None:
        return "The rate is so near the limit that no feasible number of runs would decide it."
    return f"It would take roughly {runs} runs, if the rate is as measured (80 % power)."
