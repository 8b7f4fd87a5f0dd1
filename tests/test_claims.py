"""claims.py and verdicts.py: each verdict from runs whose scores are made to give it, which cells a
claim is about, and claims that cannot be read.
"""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from studies import MODEL, a_cell, a_run

from pref.analysis import claims, estimates, texts, verdicts
from pref.analysis.runs import Scores
from pref.files.console import UserError

JUDGE = "judge big"


def make_cell(loss, beta=0.1, tau=None, accuracy=0.6, seeds=(42, 43, 44), ends=None, **settings):
    """ends: (status, non-finite steps) of each run."""
    ends = ends or [("finished", 0)] * len(seeds)
    suffix = settings.get("learning_rate", "")
    runs = [
        a_run(
            *(f"{loss}_{beta:g}_{tau}_{seed}{suffix}", loss, beta, tau, seed, settings),
            status=status,
            summary={"nonfinite_steps": nonfinite, "steps": 10},
        )
        for seed, (status, nonfinite) in zip(seeds, ends)
    ]
    return a_cell(runs, f"{loss} {beta:g} {tau}", accuracy)


def scores(cells_levels, noise=0.5, seed_sd=0.0, questions=80):
    """values of cells: question difficulty + level + noise, from [(cell, level)]."""
    rng = np.random.default_rng(0)
    difficulty = rng.normal(5, 1.5, questions)
    values = {}
    for cell, level in cells_levels:
        for run in cell.runs:
            rated = difficulty + level + rng.normal(0, seed_sd) + rng.normal(0, noise, questions)
            values[run.run_id] = {q: {1: float(value)} for q, value in enumerate(rated)}
    return values


def scores_of(values, metric="mt_bench", smoke=""):
    return Scores(metric=metric, judge=JUDGE, smoke=smoke, values=values, results={})


def judged(claim, cells, values, metric="mt_bench", smoke=""):
    claim = {"id": "x", "claim": "A sentence.", "metric": metric, **claim}
    assert claims.find_problem(claim) is None
    measured = [scores_of(values, metric, smoke)]
    (row,) = verdicts.judge_claims([claim], cells, measured, MODEL, draws=1000)
    return row


def difference(**fields):
    return {
        "kind": "difference",
        "a": {"loss": "td_dpo"},
        "b": {"loss": "dpo"},
        "at_least": 0.5,
        **fields,
    }


EQUIVALENCE = {"kind": "equivalence", "a": {"loss": "td_dpo"}, "b": {"loss": "dpo"}, "margin": 0.3}
A, B = make_cell("td_dpo", tau=1.0), make_cell("dpo")


# ---- differences --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "word"), [(1.0, "supported"), (0.0, "contradicted"), (0.5, "undecided")]
)
def test_difference(level, word):
    row = judged(difference(), [A, B], scores([(A, level), (B, 0)]))
    assert row["verdict"] == word and row["estimate"] == pytest.approx(level, abs=0.15)
    assert row["low"] < row["estimate"] < row["high"] and (row["n_units"], row["n_seeds"]) == (
        80,
        3,
    )
    assert row["p_holm"] == row["p"] and row["a"] == "td_dpo 0.1 1.0"
    if word == "undecided":
        assert "the difference is as measured" in row["why"] and "questions" in row["why"]


def test_test_and_interval_are_one_rule():
    """A difference at its limit: supported exactly where the interval begins at or above it."""
    row = judged(difference(at_least=0.0), [A, B], scores([(A, 0.5), (B, 0)], noise=1.5))
    for at_least in (row["low"] - 1e-6, row["low"] + 1e-6):
        again = judged(difference(at_least=at_least), [A, B], scores([(A, 0.5), (B, 0)], noise=1.5))
        assert (again["verdict"] == "supported") == (at_least < row["low"])
        assert again["p"] == pytest.approx(0.025, abs=1e-4)  # one-sided


def test_the_best_of_more_cells_is_said_to_be_favoured_by_chance():
    several = [make_cell("td_dpo", 0.1, tau, accuracy=0.6 + tau / 100) for tau in (0.5, 1.0, 2.0)]
    values = scores([*((cell, 0.8) for cell in several), (B, 0)])
    row = judged(difference(), [*several, B], values)
    # the expected maximum of three standard normal variables is 3 / (2 sqrt(pi))
    half_width = (row["high"] - row["low"]) / 2
    gain = float(re.search(r"up to ([\d.]+) too high", row["why"]).group(1))
    assert "Best of 3 against best of 1" in row["why"]
    found = estimates.compare_cells(several[-1], B, values).difference
    assert gain == pytest.approx(1.5 / math.sqrt(math.pi) * found.se / math.sqrt(2), rel=0.06)
    assert 0 < gain < half_width
    # What chance may give is not enough to support a claim, and not enough to contradict one.
    low, high = row["low"], row["high"]
    for limit, word in ((low - 1.1 * gain, "supported"), (low - 0.9 * gain, "undecided")):
        again = judged(difference(at_least=limit), [*several, B], values)
        assert again["verdict"] == word
    assert "not clear of what chance gives" in again["why"]
    swapped = difference(a={"loss": "dpo"}, b={"loss": "td_dpo"})
    for limit, word in ((-low + 1.1 * gain, "contradicted"), (-low + 0.9 * gain, "undecided")):
        again = judged(swapped | {"at_least": limit}, [*several, B], values)
        assert again["verdict"] == word
    assert high > gain
    assert "chance" not in judged(difference(), [A, B], scores([(A, 1.0), (B, 0)]))["why"]


@pytest.mark.parametrize(
    ("level", "word"), [(0.0, "supported"), (0.9, "contradicted"), (-0.9, "contradicted")]
)
def test_parity_is_tested_as_equivalence(level, word):
    row = judged(EQUIVALENCE, [A, B], scores([(A, level), (B, 0)], noise=0.3))
    assert (
        row["verdict"] == word and row["test"] == "two one-sided tests against a difference of 0.3"
    )


def test_no_difference_found_is_not_parity():
    row = judged(EQUIVALENCE | {"margin": 0.05}, [A, B], scores([(A, 0.0), (B, 0)]))
    assert row["low"] < 0 < row["high"] and row["verdict"] == "undecided"
    assert "questions with these 3 seeds" in row["why"] and "if they are truly equal" in row["why"]


def test_one_seed_decides_nothing():
    a, b = make_cell("td_dpo", seeds=(42,)), make_cell("dpo", seeds=(42,))
    row = judged(difference(), [a, b], scores([(a, 3.0), (b, 0)]))
    assert row["verdict"] == "undecided" and row["low"] > 2 and "One seed" in row["why"]


def test_a_judge_below_7b_measures_nothing():
    row = judged(
        difference(),
        [A, B],
        scores([(A, 3.0), (B, 0)]),
        smoke="SMOKE TEST: judge of 0.135B parameters",
    )
    assert (
        row["verdict"] == "not measured"
        and "0.135B" in row["why"]
        and row["estimate"] == pytest.approx(3, abs=0.2)
    )


def test_no_such_runs():
    row = judged(difference(a={"loss": "dlrml", "beta": 0.05}), [A, B], scores([(A, 1.0), (B, 0)]))
    assert row["verdict"] == "not measured" and row["why"] == "No such runs: dlrml beta 0.05."


def test_no_judgements():
    claim = difference(id="x", claim="y", metric="mt_bench")
    (row,) = verdicts.judge_claims([claim], [A, B], [], MODEL, draws=500)
    assert (row["verdict"], row["why"]) == ("not measured", "No judgements.")


def test_holm_over_the_claims_of_one_judge():
    cells = [A, B, make_cell("ipo")]
    values = scores([(A, 0.75), (B, 0), (cells[2], 0.75)], noise=1.5)
    family = [
        {
            "id": str(i),
            "claim": "s",
            "metric": "mt_bench",
            **difference(a={"loss": loss}, at_least=0.3),
        }
        for i, loss in enumerate(("td_dpo", "ipo"))
    ]
    rows = verdicts.judge_claims(family, cells, [scores_of(values)], MODEL, draws=500)
    assert (
        sorted(row["p_holm"] / row["p"] for row in rows) == pytest.approx([1, 2])
        or rows[0]["p_holm"] == rows[1]["p_holm"]
    )


def test_the_model_that_a_claim_was_made_for_is_said():
    row = judged(difference(model="mistral"), [A, B], scores([(A, 1.0), (B, 0)]))
    assert f"Made for mistral, measured here on {MODEL}." in row["why"]


# ---- which runs ---------------------------------------------------------------------------------


def test_best_is_chosen_by_validation_accuracy():
    low, high = make_cell("dpo", 0.1, accuracy=0.6), make_cell("dpo", 0.5, accuracy=0.7)
    values = scores(
        [(A, 1.0), (low, 0.8), (high, 0.0)]
    )  # the better score is not the one that validation selects
    row = judged(difference(b={"loss": "dpo", "beta": "best"}), [A, low, high], values)
    assert row["b"] == "dpo 0.5 None" and row["verdict"] == "supported"
    low, high = (replace(cell, accuracy=None) for cell in (low, high))
    row = judged(difference(b={"loss": "dpo", "beta": "best"}), [A, low, high], values)
    assert row["verdict"] == "not measured" and "no validation accuracy" in row["why"]


def test_selectors():
    cells = [make_cell("dpo", beta) for beta in (0.01, 0.25, 2.5)]
    chosen = lambda selector: [  # noqa: E731
        cell.beta for cell in claims.select_cells(cells, {"loss": "dpo", **selector})
    ]
    assert chosen({}) == [0.01, 0.25, 2.5] and chosen({"beta": 0.25}) == [0.25]
    assert chosen({"beta": {"at_least": 0.25}}) == [0.25, 2.5] and chosen(
        {"beta": [0.01, 2.5]}
    ) == [0.01, 2.5]
    assert chosen({"learning_rate": 1}) == []


def test_of_several_cells_those_alike_in_other_settings_are_compared_and_it_is_said():
    ours = make_cell("td_dpo", learning_rate=5e-5)
    alike, other = (
        make_cell("dpo", accuracy=0.6, learning_rate=5e-5),
        make_cell("dpo", accuracy=0.9, learning_rate=1e-6),
    )
    values = scores([(ours, 1.0), (alike, 0.0), (other, 5.0)])
    row = judged(difference(), [ours, alike, other], values)
    assert row["verdict"] == "supported" and "is one of 2 cells that match" in row["why"]
    row = judged(difference(), [ours, other], values)
    assert (
        row["verdict"] == "contradicted"
        and "They differ in learning_rate 5e-05 / 1e-06." in row["why"]
    )


def test_seeds_that_diverged_without_a_score_are_not_passed_over():
    ends = [("finished", 0)] * 2 + [("diverged", 10)] * 2
    a = make_cell("td_dpo", seeds=(42, 43, 44, 45), ends=ends)
    values = scores([(a, 3.0), (B, 0)])
    for run in a.runs[2:]:
        del values[run.run_id]
    row = judged(difference(), [a, B], values)
    assert (
        row["verdict"] == "undecided"
        and "2 of 4 runs of td_dpo 0.1 None diverged and have no score." in row["why"]
    )


def test_equal_ratings_everywhere_decide_nothing():
    values = {
        run.run_id: {q: {1: 6.0 if cell is A else 5.0} for q in range(4)}
        for cell in (A, B)
        for run in cell.runs
    }
    row = judged(difference(), [A, B], values)
    assert (
        row["verdict"] == "undecided"
        and row["p"] is None
        and "nothing measures the error" in row["why"]
    )


def test_an_argument_that_no_run_has():
    row = judged(
        difference(a={"loss": "td_dpo", "lerning_rate": None}), [A, B], scores([(A, 1.0), (B, 0)])
    )
    assert (row["verdict"], row["why"]) == ("not measured", "No run has an argument lerning_rate.")


# ---- rates --------------------------------------------------------------------------------------


def rate(kind, ends, **fields):
    """Verdict on runs that end with these (status, non-finite steps)."""
    claim = {"id": "x", "claim": "s", "kind": kind, "event": "nonfinite", "a": {"loss": "discopop"}}
    claim |= fields
    assert claims.find_problem(claim) is None
    cell = make_cell("discopop", seeds=range(len(ends)), ends=ends)
    (row,) = verdicts.judge_claims([claim], [cell], [], MODEL, draws=500)
    return row


def test_rarely():
    row = rate("rarely", [("finished", 0)] * 29, bound=0.1)
    assert (
        row["verdict"] == "supported"
        and row["p"] == pytest.approx(0.9**29)
        and row["why"].startswith("0 of 29 runs. The test is one-sided")
        and row["low"] < row["limit"] < row["high"]
    )
    assert row["test"] == "exact binomial, rate below 0.1"
    row = rate("rarely", [("finished", 0)] * 28, bound=0.1)
    assert row["verdict"] == "undecided" and "29 runs without one" in row["why"]
    row = rate("rarely", [("finished", 0)] * 199 + [("finished", 1)], bound=0.1)
    assert row["verdict"] == "supported" and row["why"] == "1 of 200 runs."
    assert (
        rate("rarely", [("diverged", 1)] * 4 + [("finished", 0)], bound=0.1)["verdict"]
        == "contradicted"
    )


def test_often():
    failed = [("diverged", 10)]
    assert rate("often", failed * 9 + [("finished", 0)] * 3, at_least=0.4)["verdict"] == "supported"
    assert rate("often", [("finished", 0)] * 12, at_least=0.4)["verdict"] == "contradicted"
    row = rate("often", failed * 6 + [("finished", 0)] * 6, at_least=0.4)
    assert (
        row["verdict"] == "undecided"
        and row["estimate"] == 0.5
        and row["low"] == pytest.approx(0.2109, abs=1e-4)
    )


def test_divergence_is_no_nonfinite_step_and_the_other_way_round():
    assert rate("often", [("finished", 1)] * 12, at_least=0.4, event="diverged")["estimate"] == 0
    assert rate("often", [("diverged", 0)] * 12, at_least=0.4, event="nonfinite")["estimate"] == 1


# ---- variance over beta -------------------------------------------------------------------------

SPREAD = {
    "kind": "variance_reduction",
    "a": {"loss": "td_dpo"},
    "b": {"loss": "dpo"},
    "at_least": 0.2,
}
BETAS = (0.01, 0.05, 0.5, 2.5)


def over_beta(pattern_a, pattern_b, noise=0.3, seeds=(42, 43, 44)):
    ours = [make_cell("td_dpo", beta, 1.0, seeds=seeds) for beta in BETAS]
    theirs = [make_cell("dpo", beta, seeds=seeds) for beta in BETAS]
    return [*ours, *theirs], scores([*zip(ours, pattern_a), *zip(theirs, pattern_b)], noise)


@pytest.mark.parametrize(
    ("ours", "theirs", "word"),
    [
        ((-0.2, 0.1, 0.2, -0.1), (-2, 1, 2, -1), "supported"),
        ((0, 0, 0, 0), (-2, 1, 2, -1), "supported"),  # as flat as can be: a reduction by 100 %
        ((-2, 1, 2, -1), (-0.5, 0.3, 0.5, -0.3), "contradicted"),
        ((-2, 1, 2, -1), (0, 0, 0, 0), "contradicted"),
    ],
)
def test_variance_reduction(ours, theirs, word):
    cells, values = over_beta(ours, theirs)
    row = judged(SPREAD, cells, values)
    assert row["verdict"] == word
    if row["estimate"] is not None:
        assert row["low"] <= row["estimate"] <= row["high"] <= 1
    if not any(ours):
        assert row["estimate"] > 0.99


@pytest.mark.parametrize("noise", [0, 0.3])
def test_a_reduction_of_no_variance_is_undecided(noise):
    cells, values = over_beta((0, 0, 0, 0), (0, 0, 0, 0), noise)
    row = judged(SPREAD, cells, values)
    assert row["verdict"] == "undecided"
    assert "The variance of dpo over beta cannot be told from 0" in row["why"]


def test_a_contradiction_without_a_ratio_shows_its_interval():
    row = judged(SPREAD, *over_beta((-2, 1, 2, -1), (0, 0, 0, 0.02), noise=0.2))
    assert row["verdict"] == "contradicted" and row["estimate"] is None
    assert row["high"] < 0 and row["low"] == -math.inf
    assert texts.verdict_texts(row)["interval"].endswith(
        ", none] variance over beta (td_dpo τ=1 against dpo)"
    )


def test_variance_that_is_not_decided_says_what_would():
    cells, values = over_beta((-0.5, 0.2, 0.5, -0.2), (-0.6, 0.3, 0.6, -0.3), noise=1.0)
    row = judged(SPREAD, cells, values)
    assert row["verdict"] == "undecided" and "more betas" in row["why"]


def test_variance_of_one_seed_is_undecided():
    cells, values = over_beta((0, 0.1, 0.2, 0), (-2, 1, 2, -1), seeds=(42,))
    assert judged(SPREAD, cells, values)["verdict"] == "undecided"


# ---- files --------------------------------------------------------------------------------------


def test_the_studys_own_claims_can_be_read():
    own = claims.read_claims(claims.STUDY_CLAIMS)
    assert [claim["id"][0] for claim in own] == ["1", "2", "2", "2", "3", "4", "5", "5", "6", "6"]


def scored(**fields):
    """claims.json with one claim about scores."""
    kind = {key: fields.pop(key) for key in ("margin",) if key in fields}
    claim = fields if fields.get("kind") == "equivalence" else difference(**fields)
    return json.dumps([{"id": "a", "claim": "s", "metric": "mt_bench", **claim, **kind}])


RATE_OF_ZERO = (
    '[{"id": "a", "claim": "", "kind": "rarely", "a": {"loss": "x"}, "event": "diverged", '
    '"bound": 0}]'
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not valid JSON"),
        ("{}", "expected a list of claims"),
        (
            '[{"id": "a", "claim": "s", "kind": "better"}]',
            r"claim 1 \(a\): kind 'better' is none of difference",
        ),
        ('[{"kind": "rarely"}]', r"claim 1 \(no id\): 'id' must be text"),
        (
            '[{"id": "a", "claim": "s", "kind": "rarely", "a": {"loss": "dpo"}}]',
            "needs event, bound",
        ),
        (scored(b={}), "b must be an object"),
        (scored(metric="bleu"), "metric 'bleu'"),
        (scored(at_least="x"), "must be a number"),
        (scored(at_least=math.nan), "must be a number"),
        (scored(event="diverged"), "has no event"),
        (scored(**EQUIVALENCE | {"margin": -1}), "above 0"),
        (scored(a={"loss": "x", "seed": 1}), "cannot select by seed"),
        (scored(a={"loss": "x", "beta": {"atleast": 1}}), "beta must be a value"),
        (RATE_OF_ZERO, "a rate of 0 must lie between 0 and 1"),
        ('[{"id": "a", "claim": "s", "kind": ["x"]}]', "is none of"),
        (f"[{scored()[1:-1]}, {scored()[1:]}", "claim 2 .*the same id"),
    ],
)
def test_bad_claims(tmp_path, text, message):
    (tmp_path / "claims.json").write_text(text)
    with pytest.raises(UserError, match=message):
        claims.read_claims(tmp_path / "claims.json")


def test_claims_beside_the_results_are_added(tmp_path):
    extra = {"id": "mine", "claim": "Ours.", "metric": "acc_ref", **difference()}
    (tmp_path / "claims.json").write_text(json.dumps([extra]))
    found = claims.load_claims(tmp_path)
    assert found[0]["id"] == "mine" and len(found) == 11
    other = tmp_path / "other.json"
    other.write_text("[]")
    assert len(claims.load_claims(tmp_path, other)) == 10  # instead of the one beside the results
    other.write_text(json.dumps([extra | {"id": "2a"}]))
    with pytest.raises(UserError, match="the study's own claims have the ids 2a"):
        claims.load_claims(tmp_path, other)


def test_variance_over_beta_takes_one_series_of_several(tmp_path):
    cells, values = over_beta((-0.2, 0.1, 0.2, -0.1), (-2, 1, 2, -1))
    # as wide as dpo, but better on validation
    other = [make_cell("td_dpo", beta, 2.0, accuracy=0.9) for beta in BETAS]
    values |= scores(zip(other, (-2, 1, 2, -1)), noise=0.3)
    row = judged(SPREAD, cells + other, values)
    assert (
        row["a"] == "td_dpo τ=2" and row["verdict"] != "supported" and "is one of 2" in row["why"]
    )
    row = judged({**SPREAD, "a": {"loss": "td_dpo", "tau": 1.0}}, cells + other, values)
    assert row["a"] == "td_dpo τ=1" and row["verdict"] == "supported"


class Measured:
    """As much of a stats.Difference as a verdict reads."""

    seeds = "paired"

    def __init__(self, p_below: float):
        self.p_below = p_below

    def p(self, null=0.0, side=0):
        return self.p_below if side == -1 else 1 - self.p_below


@pytest.mark.parametrize(("others", "verdict"), [(0, "contradicted"), (3, "undecided")])
def test_a_contradiction_is_adjusted_for_the_other_claims(others, verdict):
    """p 0.02 on the other side decides alone; among four claims Holm makes it 0.08."""
    row = {"metric": "mt_bench", "judge": "j", "kind": "difference", "limit": 0.0, "p": 0.98}
    row |= {"low": -0.9, "high": -0.01, "why": "", "estimate": -0.4, "n_units": 80}
    p_values = [0.02] + [0.9] * others
    cases = [verdicts.PendingVerdict(dict(row), Measured(p), "", 0.0) for p in p_values]
    verdicts.decide(cases)
    assert cases[0].row["verdict"] == verdict
