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

from pref.analysis import power, stats, usual_tests, variation

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

TINY = np.array([[1.0, 4.0, 4.0], [3.0, 4.0, 8.0]])


def test_mean_squares_by_hand():
    # means 3 (seed 1), 5 (seed 2); questions 2, 4, 6; grand 4; residuals 0 but for a swap of 1
    found = stats.mean_squares(TINY)
    assert found.question == pytest.approx(2 * (4 + 0 + 4) / 2)
    assert found.seed == pytest.approx(3 * (1 + 1) / 1)
    # residuals [0, 1, -1], [0, -1, 1]: sum of squares 4 over (2-1)(3-1)
    assert found.residual == pytest.approx(2)


def test_primary_test_by_hand():
    found = stats.difference(TINY, np.zeros((2, 3)), paired=True)
    # mean squares 8, 6, 2 over 3 * 2 scores; degrees of freedom 3 - 1 and 2 - 1
    assert found.estimate == pytest.approx(4) and found.residual == pytest.approx(2)
    assert found.error == pytest.approx((8 / 6, 2, 6 / 6, 1, 2 / 6))
    # seeds' variance: E max(0, 1 - Y / 3), Y ~ chi2(1/2) / (1/2), here a mean over its quantiles
    chance = scipy_stats.chi2.ppf((np.arange(50_000) + 0.5) / 50_000, 0.5) / 0.5
    seed_variance = np.maximum(0, 1 - chance / 3).mean()
    assert found.error.seed_variance() == pytest.approx(seed_variance, rel=1e-4)
    assert found.se == pytest.approx(math.sqrt(8 / 6 + seed_variance), rel=1e-4)
    t_questions, t_seeds = scipy_stats.t.ppf(0.975, 2), scipy_stats.t.ppf(0.975, 1)
    half_width = math.sqrt(t_questions**2 * 8 / 6 + t_seeds**2 * seed_variance)
    assert (found.low, found.high) == pytest.approx((4 - half_width, 4 + half_width), rel=1e-4)
    assert scipy_stats.t.ppf(0.975, found.df) * found.se == pytest.approx(half_width, rel=1e-4)


def test_one_seed_is_the_paired_t_test():
    found = stats.difference(A[:1], B[:1], paired=True)
    expected = scipy_stats.ttest_rel(A[0], B[0])
    assert found.p() == pytest.approx(expected.pvalue) and found.seeds == "one seed"
    assert found.df == expected.df == 19 and math.isnan(found.seed_share)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert found.p(0.3, side=1) == pytest.approx(
        scipy_stats.ttest_1samp(A[0] - B[0], 0.3, alternative="greater").pvalue
    )
    upper = scipy_stats.ttest_1samp(A[0] - B[0], 2.0, alternative="less").pvalue
    lower = scipy_stats.ttest_1samp(A[0] - B[0], -2.0, alternative="greater").pvalue
    assert found.p_equivalent(2.0) == pytest.approx(max(upper, lower))


def test_where_only_seeds_vary_it_is_the_t_test_on_seeds():
    levels = np.array([0.3, 0.9, 0.5])
    found = stats.difference(np.tile(levels[:, None], (1, 40)), np.zeros((3, 40)), paired=True)
    expected = scipy_stats.ttest_1samp(levels, 0)
    assert found.se == pytest.approx(levels.std(ddof=1) / math.sqrt(3))
    assert found.df == pytest.approx(2) and found.seed_share == pytest.approx(1)
    assert found.p() == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))


def test_where_only_unpaired_seeds_vary_it_is_welchs_test():
    a, b = np.array([0.3, 0.9, 0.5]), np.array([-0.2, 0.1, 0.15])
    tables = [np.tile(levels[:, None], (1, 40)) for levels in (a, b)]
    found = stats.difference(*tables, paired=False)
    expected = scipy_stats.ttest_ind(a, b, equal_var=False)
    assert found.p() == pytest.approx(expected.pvalue) and found.df == pytest.approx(expected.df)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert found.seeds == "unpaired" and found.n_seeds == 3
    fewer = stats.difference(tables[0], tables[1][:2], paired=False)
    parts = a.var(ddof=1) / 3, b[:2].var(ddof=1) / 2
    # each as if it had two seeds, one degree of freedom
    assert fewer.error.seeds_df == pytest.approx(sum(parts) ** 2 / (parts[0] ** 2 + parts[1] ** 2))
    assert fewer.se == pytest.approx(math.sqrt(sum(parts))) and fewer.n_seeds == 2


def test_with_many_seeds_and_questions_it_is_the_variance_of_both():
    rng = np.random.default_rng(0)
    table = rng.normal(0, 0.3, (300, 1)) + rng.normal(0, 1, 2000) + rng.normal(0, 1.2, (300, 2000))
    found = stats.difference(table, np.zeros_like(table), paired=True)
    assert found.se == pytest.approx(math.sqrt(0.09 / 300 + 1 / 2000 + 1.44 / 6e5), rel=0.05)
    assert found.seed_share == pytest.approx(0.0003 / found.se**2, rel=0.15)


def test_seeds_never_count_as_certain():
    # the seeds' means agree by chance: less than the residual would let them differ
    table = np.array([[1.0, -1.0, 2.0, -2.0], [-1.0, 1.0, -2.0, 2.01]])
    found = stats.difference(table, np.zeros((2, 4)), paired=True)
    assert found.error.seeds < found.error.chance / 100
    assert 0 < found.error.seed_variance() < found.error.seeds


@pytest.mark.parametrize("paired", [True, False])
def test_test_and_interval_agree(paired):
    found = stats.difference(A, B, paired)
    assert found.p(found.low) == found.p(found.high) == pytest.approx(0.05)
    assert found.p(found.low, side=1) == pytest.approx(0.025)
    assert found.p(found.high, side=-1) == pytest.approx(0.025)
    assert found.p(found.estimate) == 1 and found.p(found.estimate, side=1) == pytest.approx(0.5)
    assert found.p(found.estimate + 0.1, side=1) > 0.5
    # equivalence at 2.5 % is the interval inside the limits
    margin = max(-found.low, found.high)
    assert found.p_equivalent(margin) == pytest.approx(0.025)


def test_p_falls_with_the_distance_and_stays_above_zero():
    error = stats.difference(A, B, paired=True).error
    p_values = [error.p(distance) for distance in np.geomspace(0.01, 1e6, 60)]
    assert all(earlier > later > 0 for earlier, later in itertools.pairwise(p_values))
    assert stats.difference(A[:1] + 1e9, B[:1], paired=True).p() > 0


def test_equal_scores_are_no_finding():
    found = stats.difference(np.full((2, 5), 3.0), np.full((2, 5), 3.0), paired=True)
    assert found.estimate == 0 and math.isnan(found.low) and math.isnan(found.high)
    assert math.isnan(stats.improvement_rate(A, A, paired=True).low)
    assert all(math.isnan(end) for end in stats.mean_interval(np.full((3, 20), 4.0)))
    assert math.isnan(found.p()) and math.isnan(power.minimum_detectable(found))
    always = stats.difference(np.full((2, 5), 3.3), np.full((2, 5), 3.1), paired=True)
    assert (
        math.isnan(always.p())
        and math.isnan(always.p_equivalent(0.1))
        and math.isnan(always.p(0.75, side=1))
    )


def test_one_question_gives_no_test():
    found = stats.difference(A[:, :1], B[:, :1], paired=True)
    assert all(math.isnan(value) for value in (found.se, found.p(), found.df, found.low))
    assert power.required_sizes(found, 1.0) == (None, None)
    assert all(math.isnan(end) for end in stats.mean_interval(A[:, :1]))


# ---- what a study finds -------------------------------------------------------------------------


def measured(question: float, seed: float, residual: float, seeds=3, questions=80):
    """A difference whose true design has these components; a seed's estimate is median-unbiased."""
    chance = residual / (seeds * questions)
    median = scipy_stats.chi2.median(seeds - 1) / (seeds - 1)
    question_median = scipy_stats.chi2.median(questions - 1) / (questions - 1)
    error = stats.MeanError(
        questions=(question / questions + chance) * question_median,
        questions_df=questions - 1,
        seeds=(seed / seeds + chance) * median,
        seeds_df=seeds - 1,
        chance=chance,
    )
    return stats.Difference(0.2, error, questions, seeds, "paired", residual)


def simulated_power(question, seed, residual, effect, seeds, questions, studies=2000):
    """How often studies with these components find `effect`, drawn score by score in one go."""
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(studies):
        table = effect + rng.normal(0, math.sqrt(question), questions)
        table = table + rng.normal(0, math.sqrt(seed), (seeds, 1))
        table = table + rng.normal(0, math.sqrt(residual), (seeds, questions))
        one = stats.difference(table, np.zeros_like(table), paired=True)
        found += abs(one.estimate) > one.error.half_width()
    return found / studies


@pytest.mark.parametrize(("seed", "seeds"), [(0.0128, 3), (0.5, 3), (0.18, 2)])
def test_a_detectable_difference_is_found_four_times_in_five(seed, seeds):
    found = measured(question=1.28, seed=seed, residual=2.88, seeds=seeds)
    detectable = power.minimum_detectable(found)
    rate = simulated_power(1.28, seed, 2.88, detectable, seeds, 80)
    assert rate == pytest.approx(0.8, abs=0.025)


def test_power_of_one_seed_is_scipys():
    found = stats.difference(A[:1], B[:1], paired=True)
    detectable = power.minimum_detectable(found)
    design = power.true_design(found)
    noncentral = scipy_stats.nct(19, detectable / math.sqrt(design.questions))
    critical = scipy_stats.t.ppf(0.975, 19)
    assert noncentral.sf(critical) + noncentral.cdf(-critical) == pytest.approx(0.8, abs=1e-3)
    assert power.required_sizes(found, 0.5).seeds is None


def test_required_sizes_are_the_least():
    components = {"question": 0.4, "seed": 0.01, "residual": 0.24}
    seeds, questions = power.required_sizes(measured(**components), 0.35)
    for n_seeds, n_questions in ((seeds, 80), (3, questions)):
        found = measured(**components, seeds=n_seeds, questions=n_questions)
        assert power.minimum_detectable(found) <= 0.35
    for n_seeds, n_questions in ((seeds - 1, 80), (3, questions - 1)):
        found = measured(**components, seeds=n_seeds, questions=n_questions)
        assert power.minimum_detectable(found) > 0.35
    # questions alone leave 0.4 / 80, seeds alone 0.01 / 3: no number of the other is enough
    assert power.required_sizes(measured(**components), 0.15) == (None, None)
    assert power.required_sizes(measured(**components), 0) == (None, None)


def test_required_seeds_against_the_untrained_model_are_those_of_the_trained():
    rng = np.random.default_rng(4)
    trained = rng.normal(0, 1, 80) + rng.normal(0, 0.3, (3, 1)) + rng.normal(0, 1, (3, 80))
    against_one = stats.difference(trained, np.zeros((1, 80)), paired=False)
    alone = stats.difference(trained, np.zeros((3, 80)), paired=True)
    assert against_one.n_seeds == 1 and against_one.p() == pytest.approx(alone.p())
    assert power.required_sizes(against_one, 0.6) == power.required_sizes(alone, 0.6)


def test_required_sizes_of_an_equivalence():
    components = {"question": 0.4, "seed": 0.001, "residual": 0.24}
    seeds, _ = power.required_sizes(measured(**components), 0.3, equivalent=True)
    rng, inside = np.random.default_rng(2), 0
    for _ in range(1000):
        table = rng.normal(0, math.sqrt(0.4), 80) + rng.normal(0, math.sqrt(0.001), (seeds, 1))
        table = table + rng.normal(0, math.sqrt(0.24), (seeds, 80))
        one = stats.difference(table, np.zeros_like(table), paired=True)
        inside += max(-one.low, one.high) < 0.3
    assert inside / 1000 >= 0.77


@pytest.mark.parametrize(("limit", "rate"), [(0.1, 0.3), (0.4, 0.7), (0.1, 0.02), (0.4, 0.1)])
def test_required_runs_find_a_rate_by_enumeration(limit, rate):
    side = "less" if rate < limit else "greater"

    def finds(n: int) -> float:
        tests = [scipy_stats.binomtest(k, n, limit, alternative=side).pvalue for k in range(n + 1)]
        chances = scipy_stats.binom.pmf(np.arange(n + 1), n, rate)
        return sum(chances[k] for k in range(n + 1) if tests[k] < 0.05)

    runs = power.required_runs(limit, rate)
    assert min(finds(n) for n in range(runs, runs + 4)) >= 0.8 > finds(runs - 1)
    assert power.required_runs(0.1, 0.1001) is None


# ---- intervals of means and rates ---------------------------------------------------------------


def test_interval_of_a_mean_is_that_of_its_difference_from_nothing():
    found = stats.difference(A, np.zeros((3, 20)), paired=True)
    assert stats.mean_interval(A) == pytest.approx((found.low, found.high))
    expected = scipy_stats.ttest_1samp(A[0], 0).confidence_interval()
    assert stats.mean_interval(A[:1]) == pytest.approx(tuple(expected))


def test_interval_of_a_proportion_is_clopper_and_pearsons():
    wins = np.array([[1.0] * 20])
    found = stats.proportion_interval(wins)
    assert found == pytest.approx(stats.exact_interval(20, 20))  # 20 of 20 do not prove certainty
    assert stats.proportion_interval(0 * wins) == pytest.approx(stats.exact_interval(0, 20))
    some = np.array([[1.0] * 30 + [0.0] * 50])
    expected = stats.exact_interval(30, 80)  # a little narrower than with t for the normal quantile
    assert stats.proportion_interval(some) == pytest.approx(expected, abs=0.005)
    low, high = stats.proportion_interval(np.array([[1.0] * 79 + [0.0], [1.0] * 70 + [0.0] * 10]))
    assert 0 < low < 0.8 and 0.94 < high <= 1
    assert all(math.isnan(end) for end in stats.proportion_interval(wins[:, :1]))


def test_improvement_rate_by_hand():
    constant = np.full((2, 4), 6.0), np.full((2, 4), 5.0)
    rate = stats.improvement_rate(*constant, paired=True)
    assert rate.rate == pytest.approx(0.2) and math.isnan(rate.low) and math.isnan(rate.high)
    # Fieller, one seed: (a - (1 + r) b) has t-statistic +-t(19); its quadratic solved by hand
    a, b = A[0], B[0]
    t2 = scipy_stats.t.ppf(0.975, 19) ** 2 / 20
    cov = np.cov(a, b)
    quadratic = (
        b.mean() ** 2 - t2 * cov[1, 1],
        -2 * (a.mean() * b.mean() - t2 * cov[0, 1]),
        a.mean() ** 2 - t2 * cov[0, 0],
    )
    low, high = sorted(np.roots(quadratic) - 1)
    found = stats.improvement_rate(A[:1], B[:1], paired=True)
    assert found == pytest.approx((a.mean() / b.mean() - 1, low, high))


def test_a_rate_of_nothing_is_not_known():
    assert math.isnan(stats.improvement_rate(A, np.zeros((3, 20)), paired=True).rate)
    noisy = np.array([[-3.0, 3.1, -2.9, 3.2]])  # a mean that cannot be told from 0
    found = stats.improvement_rate(np.array([[5.0, 5.2, 4.9, 5.1]]), noisy, paired=True)
    assert found.low < found.rate and found.high == math.inf
    one_question = stats.improvement_rate(A[:, :1], B[:, :1], paired=True)
    assert math.isnan(one_question.low) and not math.isnan(one_question.rate)


# ---- the other tests, against SciPy -------------------------------------------------------------


def test_sensitivity_rows_are_scipys():
    found = {row["test"]: row for row in usual_tests.sensitivity(A, B)}
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
    found = {
        row["test"]: row["p"] for row in usual_tests.sensitivity(questions[None], np.zeros((1, 7)))
    }
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
    assert usual_tests.mcnemar(a, b) == {
        "only_a": 8,
        "only_b": 2,
        "ties": 1,
        "p": pytest.approx(112 / 1024),
    }
    assert usual_tests.mcnemar(a, a)["p"] == 1


# ---- over beta ----------------------------------------------------------------------------------


def test_beta_spread_by_hand():
    # two betas, two seeds, two questions; questions' difficulty 0 and 10 must not matter
    tables = [np.array([[1.0, 11.0], [3.0, 13.0]]), np.array([[6.0, 16.0], [8.0, 18.0]])]
    found = variation.beta_spread(tables, same_seeds=False, draws=500)
    assert found.raw == pytest.approx(12.5)  # means 7 and 12
    # no interaction; seed means 6, 8 and 11, 13: MS_seed 2 * 2 = 4, residual 0, 4 / (2 * 2) for
    # each beta
    assert found.noise == pytest.approx(1) and found.variance == pytest.approx(11.5)
    assert found.error.seeds_df == 2 and (found.draws >= 0).all()
    # with the same seeds the second is 2 above the first at both betas: nothing of it moves a beta
    # against another
    same = variation.beta_spread(tables, same_seeds=True, draws=500)
    assert same.noise == pytest.approx(0) and same.draws == pytest.approx(12.5)
    tables[1] = tables[1][
        ::-1
    ]  # now beta and seed interact: +-1 around the beta's mean, 2 of 2 betas, MS 8
    turned = variation.beta_spread(tables, same_seeds=True, draws=500)
    assert turned.noise == pytest.approx(2) and turned.error.seeds_df == 1


def test_beta_spread_noise_counts_the_questions_interaction_with_beta():
    tables = [np.array([[1.0, 3.0]]), np.array([[3.0, 1.0]])]
    # crossed residuals -1, 1, 1, -1: sum of squares 4 over (2-1)(2-1), over 2 questions
    assert variation.beta_spread(tables, False, draws=200).noise == pytest.approx(2)


def test_confidence_draws_invert_scipys_noncentral_chi_square():
    # noise that is known all but exactly, four betas
    error = stats.MeanError(questions=0.5, questions_df=1e9, seeds=0.0, seeds_df=0, chance=0.0)
    draws = variation.confidence_draws(2.0, error, n_betas=4, draws=40_000, stream=0)
    for level in (0.025, 0.5, 0.975):
        noncentrality = np.quantile(draws, level) * 3 / 0.5
        # as large a variance as was observed, or larger, has this probability
        above = scipy_stats.ncx2.sf(2.0 * 3 / 0.5, 3, noncentrality)
        assert above == pytest.approx(level, abs=0.01)
    # below the noise, most of the distribution lies on 0
    flat = variation.confidence_draws(0.1, error, n_betas=4, draws=40_000, stream=0)
    assert (flat == 0).mean() == pytest.approx(scipy_stats.chi2.sf(0.1 * 3 / 0.5, 3), abs=0.01)


@pytest.mark.parametrize("x", [0.5, 30.0, 999.0, 1001.0, 1e12])
def test_noncentrality_inverts_scipys_distribution(x):
    levels = np.array([0.01, 0.5, 0.99])
    found = variation.noncentrality(np.full(3, x), 3, levels)
    for value, level in zip(found, levels):
        if value == 0:
            assert scipy_stats.chi2.cdf(x, 3) <= level
        elif x < 1e4:
            assert scipy_stats.ncx2.cdf(x, 3, value) == pytest.approx(level, abs=2e-3)
        else:
            assert value == pytest.approx(x, rel=1e-5)


def spread(variance: float, draws: np.ndarray):
    error = stats.MeanError(0.01, 100, 0.01, 4, 0.005)
    return variation.BetaSpread(variance + 0.01, 0.01, variance, draws, error, 4)


def test_variance_ratio():
    wide, narrow = spread(4.0, np.linspace(3, 5, 201)), spread(1.0, np.full(201, 1.0))
    found = variation.variance_ratio(narrow, wide)
    assert found["ratio"] == 0.25
    assert found["low"] == pytest.approx(0.2, abs=0.01) and 0.32 < found["high"] < 0.34
    flat = spread(-0.1, np.zeros(201))
    assert variation.variance_ratio(flat, wide) == {"ratio": 0.0, "low": 0.0, "high": 0.0}
    shaky = spread(0.5, np.maximum(0, np.linspace(-1, 2, 201)))
    assert variation.variance_ratio(narrow, shaky)["high"] == math.inf
    # nothing to divide by: no ratio, but a lower limit where a's variance is not nothing
    undefined = variation.variance_ratio(wide, flat)
    assert undefined == {"ratio": None, "low": math.inf, "high": math.inf}
    both = variation.variance_ratio(flat, flat)
    assert both == {"ratio": None, "low": 0.0, "high": math.inf}


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


@pytest.mark.parametrize(
    ("world", "seeds", "seed_sd"),
    [
        *itertools.product(["normal"], [3, 2], [0.3, 1.0]),
        *[("rough, skewed", 3, 0.5), ("rough, heavy-tailed", 2, 0.5)],
    ],
)
def test_calibration(world, seeds, seed_sd):
    sizes, generate = calibration.Sizes(seeds), calibration.WORLDS[world]
    found = calibration.calibrate_differences(250, seed_sd, sizes=sizes, generate=generate)
    # 7 % and two standard errors of 250 studies
    assert found["primary"] <= 0.1 and found["holm"] <= 0.1 and found["coverage"] >= 0.9


def test_power_where_seeds_differ_little():
    # no test that errs in at most 5 % at every seed SD finds more than 0.56 of these
    design = {"seed_sd": 0.08, "sizes": calibration.Sizes(3)}
    assert 0.4 < calibration.found(300, 0.5, **design) < 0.6
    assert calibration.found(200, 1.0, **design) > 0.9


@pytest.mark.slow
def test_a_flatter_loss_is_supported_more_often():
    rates = [
        calibration.calibrate_ratio(60, 0.15, sd_a, 0.8, draws=300) for sd_a in (0, 0.4, 0.6, 0.8)
    ]
    supported = [rate["supported"] for rate in rates]
    assert supported == sorted(supported, reverse=True)
    assert supported[0] > 0.9 and supported[-1] <= 0.05
    assert all(rate["coverage"] >= 0.88 and rate["defined"] == 1 for rate in rates)
    # no variance left to divide by
    nothing = calibration.calibrate_ratio(40, 0.15, 0.1, 0.1, draws=300)
    assert nothing["defined"] < 0.9 and nothing["open"] > 0.8 and nothing["supported"] <= 0.05


def test_the_usual_tests_ignore_seeds():
    found = calibration.calibrate_differences(10, 2.0, sensitivity=10)["sensitivity"]
    assert found["paired t on questions"] > 0.4 and set(found) > {"Welch t on seed means"}


def test_rough_worlds_are_as_said():
    rng = np.random.default_rng(0)
    generate = calibration.WORLDS["rough, skewed"]
    tables = generate(rng, 0.5, 0.5, calibration.Sizes(500, 1000))
    assert tables.min() >= 1 and tables.max() <= 10 and not (tables * 2 % 1).any()
    assert tables[1:].mean((1, 2)) - tables[0].mean() == pytest.approx(0.5, abs=0.12)
    seed_sds = tables.mean(2).std(1)
    assert seed_sds[1] > 1.5 * seed_sds[0]
    skewness = scipy_stats.skew(tables[1].mean(1))
    assert skewness < -1
