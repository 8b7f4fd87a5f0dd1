"""stats.py and variation.py: against SciPy called directly, against arithmetic by hand, against
published figures, and in simulation.
"""

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from pref.analysis import stats, variation

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import calibration

RNG = np.random.default_rng(7)
A, B = RNG.normal(6, 2, (3, 20)), RNG.normal(5.5, 2, (3, 20))
SHROUT_FLEISS = [
    [9, 2, 5, 8],
    [6, 1, 3, 2],
    [8, 4, 6, 8],
    [7, 1, 2, 6],
    [10, 5, 6, 9],
    [6, 2, 4, 7],
]  # 1979, table 2


# ---- the primary test ---------------------------------------------------------------------------


def test_mean_squares_by_hand():
    # means 3 (seed 1), 5 (seed 2); questions 2, 4, 6; grand 4; residuals 0 but for a swap of 1
    found = stats.mean_squares(np.array([[1.0, 4.0, 4.0], [3.0, 4.0, 8.0]]))
    assert found.question == pytest.approx(2 * (4 + 0 + 4) / 2)
    assert found.seed == pytest.approx(3 * (1 + 1) / 1)
    # residuals [0, 1, -1], [0, -1, 1]: sum of squares 4 over (2-1)(3-1)
    assert found.residual == pytest.approx(2)


def test_primary_test_by_hand():
    difference = stats.difference(
        np.array([[1.0, 4.0, 4.0], [3.0, 4.0, 8.0]]), np.zeros((2, 3)), paired=True, draws=500
    )
    # (MS_question 8 + MS_seed 6 - MS_residual 2) / (3 * 2) = 2; df 12^2 / (8^2/2 + 6^2/1 + 2^2/2) =
    # 144 / 70
    assert difference.estimate == pytest.approx(4)
    assert difference.se == pytest.approx(math.sqrt(2))
    assert difference.df == pytest.approx(144 / 70)
    assert difference.p() == pytest.approx(2 * scipy_stats.t.sf(4 / math.sqrt(2), 144 / 70))
    assert difference.variances == pytest.approx(
        ((8 - 2) / 2, (6 - 2) / 3, 2)
    )  # question, seed, residual


def test_one_seed_is_the_paired_t_test():
    found = stats.difference(A[:1], B[:1], paired=True, draws=500)
    expected = scipy_stats.ttest_rel(A[0], B[0])
    assert found.p() == pytest.approx(expected.pvalue) and found.seeds == "one seed"
    assert found.df == expected.df == 19
    assert found.p(0.3, side=1) == pytest.approx(
        scipy_stats.ttest_1samp(A[0] - B[0], 0.3, alternative="greater").pvalue
    )
    upper = scipy_stats.ttest_1samp(A[0] - B[0], 2.0, alternative="less").pvalue
    lower = scipy_stats.ttest_1samp(A[0] - B[0], -2.0, alternative="greater").pvalue
    assert found.p_equivalent(2.0) == pytest.approx(max(upper, lower))


def test_where_only_seeds_vary_it_is_the_t_test_on_seeds():
    levels = np.array([0.3, 0.9, 0.5])
    found = stats.difference(
        np.tile(levels[:, None], (1, 40)), np.zeros((3, 40)), paired=True, draws=500
    )
    expected = scipy_stats.ttest_1samp(levels, 0)
    assert found.se == pytest.approx(
        levels.std(ddof=1) / math.sqrt(3)
    ) and found.df == pytest.approx(2)
    assert found.p() == pytest.approx(expected.pvalue)


def test_unpaired_equals_paired_formula_with_separate_seed_components():
    found = stats.difference(A, B[:2], paired=False, draws=500)
    by_question = A.mean(0) - B[:2].mean(0)
    squares = [(stats.mean_squares(A), 3), (stats.mean_squares(B[:2]), 2)]
    seeds = sum((square.seed - square.residual) / (20 * n) for square, n in squares)
    expected = by_question.var(ddof=1) / 20 + max(0, seeds)
    assert found.se == pytest.approx(math.sqrt(expected)) and found.seeds == "unpaired"


def test_equal_scores_are_no_finding():
    found = stats.difference(np.full((2, 5), 3.0), np.full((2, 5), 3.0), paired=True, draws=500)
    assert (found.estimate, found.low, found.high) == (0, 0, 0)
    assert math.isnan(found.p()) and math.isnan(found.minimum_detectable())
    always = stats.difference(np.full((2, 5), 3.3), np.full((2, 5), 3.1), paired=True, draws=500)
    assert (
        math.isnan(always.p())
        and math.isnan(always.p_equivalent(0.1))
        and math.isnan(always.p(0.75, side=1))
    )


def test_one_question_gives_no_test():
    found = stats.difference(A[:, :1], B[:, :1], paired=True, draws=500)
    assert (
        math.isnan(found.se)
        and math.isnan(found.p())
        and stats.required_sizes(found, 1.0) == (None, None)
    )


def measured(**variances):
    """A difference of 0.2 with standard error 0.1 on 80 questions and 3 seeds."""
    unused = dict.fromkeys(("low", "high", "rate", "rate_low", "rate_high"), 0.0)
    sizes = {"n_questions": 80, "n_seeds": 3, "seeds": "paired"}
    components = stats.Variances(**variances)
    return stats.Difference(0.2, 0.1, 20.0, **unused, **sizes, variances=components)


def test_minimum_detectable_and_required_sizes_by_hand():
    found = measured(question=0.4, seed=0.006, residual=0.24)
    t = scipy_stats.t.ppf(0.975, 20) + scipy_stats.t.ppf(0.8, 20)
    assert found.minimum_detectable() == pytest.approx(0.1 * t)
    target = (0.3 / 2.8015852) ** 2  # normal quantiles 1.959964 + 0.841621
    assert stats.required_sizes(found, 0.3) == (
        math.ceil((0.006 + 0.24 / 80) / (target - 0.4 / 80)),
        math.ceil((0.4 + 0.24 / 3) / (target - 0.006 / 3)),
    )
    assert stats.required_sizes(found, 0.1) == (
        None,
        None,
    )  # questions alone leave 0.0707, seeds alone 0.045
    assert (
        stats.required_sizes(found, 0.15)[0] is None and stats.required_sizes(found, 0.15)[1] > 80
    )


def test_required_sizes_are_the_least():
    found = measured(question=0.4, seed=0.01, residual=0.24)
    seeds, questions = stats.required_sizes(found, 0.25)

    def detects(n_seeds: int, n_questions: int) -> bool:
        variance = 0.4 / n_questions + 0.01 / n_seeds + 0.24 / (n_seeds * n_questions)
        return 2.8015852 * math.sqrt(variance) <= 0.25

    assert detects(seeds, 80) and not detects(seeds - 1, 80)
    assert detects(3, questions) and not detects(3, questions - 1)


# ---- the interval -------------------------------------------------------------------------------


def test_crossed_bootstrap_against_loops():
    table = A[:2, :3]
    draws = stats.bootstrap(table, 4000)
    seeds, questions = (
        stats.bootstrap_weights(2, 4000, 0),
        stats.bootstrap_weights(3, 4000, stats.QUESTION_STREAM),
    )
    seeds = 0.5 + (seeds - 0.5) * math.sqrt(2)  # two seeds resampled have half their variance
    by_loop = [
        sum(seeds[d, s] * questions[d, q] * table[s, q] for s in range(2) for q in range(3))
        for d in range(50)
    ]
    assert draws[:50] == pytest.approx(by_loop)
    assert draws.mean() == pytest.approx(table.mean(), abs=0.05)
    # every equally likely resample, seeds x questions
    exact = [
        (0.5 + (np.bincount(s, minlength=2) / 2 - 0.5) * math.sqrt(2)) @ table[:, q].mean(1)
        for s in itertools.product(range(2), repeat=2)
        for q in itertools.product(range(3), repeat=3)
    ]
    assert draws.std() == pytest.approx(np.std(exact), rel=0.05)


def test_draws_are_the_same_every_time_and_seeds_are_paired():
    assert (stats.bootstrap(A, 300) == stats.bootstrap(A, 300)).all()
    shifted = stats.difference(A + 1, A, paired=True, draws=300)
    assert shifted.low == pytest.approx(1) and shifted.high == pytest.approx(
        1
    )  # only if both are drawn alike
    apart = stats.difference(A + 1, A, paired=False, draws=300)
    assert apart.low < 1 < apart.high


def test_improvement_rate_by_hand():
    found = stats.difference(np.full((2, 4), 6.0), np.full((2, 4), 5.0), paired=True, draws=300)
    assert (found.rate, found.rate_low, found.rate_high) == pytest.approx((0.2, 0.2, 0.2))


# ---- the other tests, against SciPy -------------------------------------------------------------


def test_sensitivity_rows_are_scipys():
    found = {row["test"]: row for row in stats.sensitivity(A, B)}
    questions = A.mean(0) - B.mean(0)
    assert found["paired t on questions"]["p"] == pytest.approx(
        scipy_stats.ttest_rel(A.mean(0), B.mean(0)).pvalue
    )
    assert found["Wilcoxon signed rank on questions"]["p"] == pytest.approx(
        scipy_stats.wilcoxon(questions).pvalue
    )
    welch = scipy_stats.ttest_ind(A.mean(1), B.mean(1), equal_var=False).pvalue
    assert found["Welch t on seed means"]["p"] == pytest.approx(welch)
    assert math.isnan(found["exact permutation of seeds"]["p"])
    assert "cannot be below 0.1" in found["exact permutation of seeds"]["ignores"]
    assert all(row["ignores"] for row in found.values())


def test_sign_flips_by_enumeration():
    questions = np.array([0.5, -0.2, 0.9, 0.4, 0.7, -0.1, 0.3])
    found = {row["test"]: row["p"] for row in stats.sensitivity(questions[None], np.zeros((1, 7)))}
    flips = [abs(np.mean(questions * signs)) for signs in itertools.product((1, -1), repeat=7)]
    expected = np.mean(np.array(flips) >= abs(questions.mean()) - 1e-12)
    assert found["sign-flip permutation on questions"] == pytest.approx(expected)


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = stats.holm([0.9, math.nan, 0.04])
    assert (
        adjusted[0] == pytest.approx(0.9)
        and math.isnan(adjusted[1])
        and adjusted[2] == pytest.approx(0.08)
    )
    assert stats.holm([]) == []


def test_benjamini_hochberg_is_scipys():
    p = [0.01, 0.04, 0.03, 0.005]
    assert stats.benjamini_hochberg(p) == pytest.approx(
        list(scipy_stats.false_discovery_control(p))
    )
    assert stats.benjamini_hochberg([math.nan, 0.2])[1] == pytest.approx(0.2)
    assert stats.benjamini_hochberg(p)[3] == pytest.approx(0.02)  # 0.005 * 4 / 1


def test_exact_interval_is_clopper_and_pearsons():
    assert stats.exact_interval(3, 12) == pytest.approx(
        (scipy_stats.beta.ppf(0.025, 3, 10), scipy_stats.beta.ppf(0.975, 4, 9))
    )
    assert stats.exact_interval(0, 12) == pytest.approx((0, 1 - 0.025 ** (1 / 12)))
    assert stats.exact_interval(0, 0) == (0, 1)


def test_mcnemar_by_hand():
    a = np.array([1] * 8 + [0] * 2 + [1] * 5 + [0.5])
    b = np.array([0] * 8 + [1] * 2 + [1] * 5 + [1])
    # two-sided binomial of 8 against 2: 2 * (1 + 10 + 45) / 1024
    assert stats.mcnemar(a, b) == {
        "only_a": 8,
        "only_b": 2,
        "ties": 1,
        "p": pytest.approx(112 / 1024),
    }
    assert stats.mcnemar(a, a)["p"] == 1


# ---- over beta ----------------------------------------------------------------------------------


def test_beta_spread_by_hand():
    # two betas, two seeds, two questions; questions' difficulty 0 and 10 must not matter
    tables = [np.array([[1.0, 11.0], [3.0, 13.0]]), np.array([[6.0, 16.0], [8.0, 18.0]])]
    found = variation.beta_spread(tables, same_seeds=False, draws=500)
    assert found.raw == pytest.approx(12.5)  # means 7 and 12
    # no interaction; seed means 6, 8 and 11, 13: MS_seed 2 * 2 = 4, residual 0, 4 / (2 * 2) for
    # each beta
    assert found.noise == pytest.approx(1) and found.variance == pytest.approx(11.5)
    assert found.draws.mean() == pytest.approx(11.5)
    # with the same seeds the second is 2 above the first at both betas: nothing of it moves a beta
    # against another
    assert variation.beta_spread(tables, same_seeds=True, draws=500).noise == pytest.approx(0)
    tables[1] = tables[1][
        ::-1
    ]  # now beta and seed interact: +-1 around the beta's mean, 2 of 2 betas, MS 8
    assert variation.beta_spread(tables, same_seeds=True, draws=500).noise == pytest.approx(2)


def test_beta_spread_noise_counts_the_questions_interaction_with_beta():
    tables = [np.array([[1.0, 3.0]]), np.array([[3.0, 1.0]])]
    # crossed residuals -1, 1, 1, -1: sum of squares 4 over (2-1)(2-1), over 2 questions
    assert variation.beta_spread(tables, False, draws=200).noise == pytest.approx(2)


def test_variance_ratio():
    wide = variation.BetaSpread(5.0, 1.0, 4.0, np.linspace(3, 5, 201))
    narrow = variation.BetaSpread(1.5, 0.5, 1.0, np.full(201, 1.0))
    found = variation.variance_ratio(narrow, wide)
    assert (
        found["ratio"] == 0.25
        and found["low"] == pytest.approx(0.2, abs=0.01)
        and found["high"] < 0.34
    )
    nothing = variation.BetaSpread(0.4, 0.5, -0.1, np.zeros(201))
    assert variation.variance_ratio(nothing, wide) == {"ratio": None, "low": None, "high": None}
    shaky = variation.BetaSpread(1.0, 0.5, 0.5, np.linspace(-1, 2, 201))
    assert variation.variance_ratio(narrow, shaky)["high"] == math.inf


def test_brown_forsythe_is_scipys():
    a, b = [6.1, 6.3, 5.2, 4.0], [6.0, 6.1, 5.9, 6.05]
    assert variation.brown_forsythe(a, b) == pytest.approx(
        scipy_stats.levene(a, b, center="median").pvalue
    )
    assert math.isnan(variation.brown_forsythe([1, 2], b))


# ---- the best of a grid -------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 2, 3, 5])
def test_expected_best_by_enumeration(budget):
    selector, scores = [0.6, 0.7, 0.5, 0.65, 0.55], [5.0, 6.0, 7.0, 4.0, 5.5]
    draws = [
        max(cells, key=lambda i: selector[i]) for cells in itertools.combinations(range(5), budget)
    ]
    assert variation.expected_best(selector, scores, budget) == pytest.approx(
        np.mean([scores[i] for i in draws])
    )
    maxima = [max(cells) for cells in itertools.combinations(scores, budget)]
    assert variation.expected_best(scores, scores, budget) == pytest.approx(np.mean(maxima))


# ---- variance, judge ----------------------------------------------------------------------------


def test_variance_parts_by_hand():
    # two cells (0, 2), two questions (0, 10), two seeds (-1, 1 in both cells), no noise
    seeds = np.array([-1.0, 1.0])
    cube = np.array([0.0, 2.0])[:, None, None] + seeds[None, :, None] + np.array([0.0, 10.0])
    nothing = ("residual", "question x beta and tau", "seed x beta and tau")
    expected = {"question": 50, "beta and tau": 2, "seed": 2, **dict.fromkeys(nothing, 0)}
    assert variation.variance_parts(cube) == pytest.approx(expected, abs=1e-9)
    cube[1] = cube[
        1, ::-1
    ]  # the second cell has the seeds the other way round: all of it is seed x cell
    turned = variation.variance_parts(cube)
    assert turned["seed"] == 0 and turned["seed x beta and tau"] == pytest.approx(
        4
    )  # residuals +-1: 4 over (2-1)(2-1)
    assert turned["beta and tau"] == pytest.approx(0)  # of 2 the seeds put 4 / 2 there


def test_variance_parts_recover_what_was_put_in():
    rng = np.random.default_rng(3)
    c, s, q = 150, 30, 200
    cube = (
        rng.normal(0, 0.5, (c, 1, 1))
        + rng.normal(0, 0.3, (c, s, 1))
        + rng.normal(0, 0.4, (s, 1))
        + rng.normal(0, 1.8, q)
        + rng.normal(0, 0.8, (c, 1, q))
        + rng.normal(0, 1.2, (c, s, q))
    )
    found = variation.variance_parts(cube)
    expected = {
        "question": 3.24,
        "beta and tau": 0.25,
        "question x beta and tau": 0.64,
        "seed": 0.16,
        "seed x beta and tau": 0.09,
        "residual": 1.44,
    }
    assert found == pytest.approx(expected, rel=0.35)


def test_retest_is_shrout_and_fleiss():
    found = variation.retest(SHROUT_FLEISS)
    assert (
        found["icc"] == pytest.approx(0.17, abs=0.005)
        and found["n_items"] == 6
        and found["identical"] == 0
    )
    assert variation.retest([[5, 5], [7, 7], [3, 3]])["icc"] == 1
    assert variation.retest([[5], [6, 6]]) is None


def test_length_correlation_is_within_questions():
    scores, lengths = np.array([1, 2, 3, 8, 9, 10.0]), np.array([30, 20, 10, 9, 8, 7.0])
    groups = ["a", "a", "a", "b", "b", "b"]
    centred = [
        np.concatenate([x[:3] - x[:3].mean(), x[3:] - x[3:].mean()]) for x in (scores, lengths)
    ]
    found = variation.length_correlation(scores, lengths, groups)
    assert found == {"n": 6, "spearman": pytest.approx(scipy_stats.spearmanr(*centred).statistic)}
    assert found["spearman"] < -0.8
    assert variation.length_correlation(scores, np.ones(6), groups) is None


# ---- how often it errs (short form of bench/calibration.py) -------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed_sd", [0.08, 0.15])
def test_calibration(seed_sd):
    found = calibration.calibrate_differences(500, seed_sd, draws=400, sensitivity=60)
    assert 0.005 <= found["primary"] <= 0.07 and found["coverage"] >= 0.93 and found["holm"] <= 0.07
    assert set(found["sensitivity"]) > {"paired t on questions", "Welch t on seed means"}


def test_power_and_coverage_of_a_true_difference():
    found = calibration.calibrate_differences(150, 0.08, effect=1.0, draws=400)
    assert found["primary"] > 0.9 and found["coverage"] >= 0.93


def test_calibration_of_the_variance_ratio():
    found = calibration.calibrate_ratio(150, 0.15, 0.3, 0.4, draws=400)
    assert found["coverage"] >= 0.92 and 0.9 < found["defined"] <= 1
    assert (
        calibration.calibrate_ratio(100, 0.15, 0.1, 0.1, draws=200)["defined"] < 0.6
    )  # no variance left to divide by
