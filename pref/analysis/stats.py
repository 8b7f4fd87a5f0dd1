"""Differences between two cells of the grid: tests, intervals, multiplicity, required sizes.

Functions on arrays, on top of SciPy. A "table" is the scores of one cell: shape (S, Q), with S
seeds (training runs) and Q questions. For MT-Bench, an entry is a question's mean rating over the
turns that all compared runs have. For validation accuracy, the "questions" are validation pairs
and an entry is 0, 0.5 (a tie) or 1.

Such a study samples two things, questions and seeds, and both contribute to the error: ratings of
another turn, or of another question in the same run, are not independent observations.
bench/calibration.py simulates how often these procedures err. Statistics of variation (over beta,
between sources, of a judge) are in variation.py.
"""

import math
from collections.abc import Iterable
from functools import lru_cache
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
from scipy import stats as scipy_stats

ALPHA = 0.05
POWER = 0.8
DRAWS = 10_000  # of a bootstrap, unless told otherwise
QUESTION_STREAM = 2**32 - 1  # random stream of resampled questions; seeds use 0, 1, ...


def mean(values: Iterable[float]) -> float | None:
    """Arithmetic mean; None of no values."""
    values = list(values)
    return fmean(values) if values else None


def sd(values: Iterable[float]) -> float | None:
    """Sample standard deviation (n - 1); None for fewer than two values."""
    values = list(values)
    return stdev(values) if len(values) > 1 else None


def standard_error(values: list[float]) -> float | None:
    """Standard error of the mean of independent values; None for fewer than two."""
    return sd(values) / math.sqrt(len(values)) if len(values) > 1 else None


class MeanSquares(NamedTuple):
    """Mean squares of a two-way layout, seeds x questions, without replication."""

    question: float
    seed: float
    residual: float  # the interaction of both factors, together with the noise


def mean_squares(table: np.ndarray) -> MeanSquares:
    """Mean squares of the rows, columns and residuals of a table.

    Parameters
    ----------
    table : (S, Q) array
        Scores of one cell, or paired differences of two.

    Returns
    -------
    MeanSquares
        A factor with a single level has mean square 0, and so has the residual then.
    """
    n_seeds, n_questions = table.shape
    grand, by_question, by_seed = table.mean(), table.mean(0), table.mean(1)
    residuals = table - by_question - by_seed[:, None] + grand  # (S, Q)
    return MeanSquares(
        question=n_seeds * ((by_question - grand) ** 2).sum() / max(1, n_questions - 1),
        seed=n_questions * ((by_seed - grand) ** 2).sum() / max(1, n_seeds - 1),
        residual=(residuals**2).sum() / max(1, (n_seeds - 1) * (n_questions - 1)),
    )


class Arm(NamedTuple):
    """Seeds whose variance enters a standard error: one arm if paired, else one for each cell."""

    squares: MeanSquares
    n_seeds: int


class Variances(NamedTuple):
    """Variance components of a difference.

    The squared standard error is question / Q + seed / S + residual / (Q S).
    """

    question: float  # NaN with a single question
    seed: float
    residual: float


class Difference(NamedTuple):
    """Mean of a minus mean of b, as `difference` estimates it. NaN where a value is unknown."""

    estimate: float
    se: float  # standard error over questions and seeds
    df: float  # its degrees of freedom
    low: float  # bootstrap interval of the estimate
    high: float
    rate: float  # estimate / mean of b, and its bootstrap interval
    rate_low: float
    rate_high: float
    n_questions: int
    n_seeds: int  # the smaller number of the two cells
    seeds: str  # "paired", "unpaired", or "one seed": nothing is known about other seeds
    variances: Variances

    def p(self, null: float = 0.0, side: int = 0) -> float:
        """p-value of the t-test of the hypothesis that the true difference is `null`.

        Parameters
        ----------
        null : float
            The hypothesised difference.
        side : {0, 1, -1}
            The alternative: 0 either side, 1 a larger difference, -1 a smaller one.

        Returns
        -------
        float
            NaN if nothing measures the error: a single question, or equal differences throughout.
        """
        if not self.se > 1e-12 * max(1.0, abs(self.estimate)):
            return math.nan
        t = (self.estimate - null) / self.se
        if side == 0:
            return float(2 * scipy_stats.t.sf(abs(t), self.df))
        return float(scipy_stats.t.sf(side * t, self.df))

    def p_equivalent(self, margin: float) -> float:
        """p-value of the equivalence test with limits -margin and margin.

        Two one-sided tests (Schuirmann 1987) of the hypothesis that the true difference is
        `margin` or more in either direction.
        """
        return max(self.p(-margin, side=1), self.p(margin, side=-1))

    def minimum_detectable(self) -> float:
        """True difference that this design finds with probability POWER, two-sided at ALPHA."""
        if math.isnan(self.p()):
            return math.nan
        quantiles = scipy_stats.t.ppf(1 - ALPHA / 2, self.df) + scipy_stats.t.ppf(POWER, self.df)
        return float(self.se * quantiles)


def difference(a: np.ndarray, b: np.ndarray, paired: bool, draws: int = DRAWS) -> Difference:
    """Compare the mean scores of two cells on the same questions.

    Parameters
    ----------
    a : (S_a, Q) array
    b : (S_b, Q) array
        Columns are the same questions in both. If `paired`, rows are the same seeds in both.
    paired : bool
        Whether row s of `a` and row s of `b` share a training seed.
    draws : int
        Number of bootstrap draws.

    Returns
    -------
    Difference

    Notes
    -----
    Assumes questions and seeds that are sampled independently of each other and residuals of
    equal variance (a two-way random-effects model).

    Standard error: question component + seed component - residual of the differences, which for
    paired seeds is (MS_question + MS_seed - MS_residual) / (Q S), with the degrees of freedom of
    Satterthwaite (1946). A seed component estimated below 0 counts as 0 in the standard error but
    not in the degrees of freedom: with so few seeds, it does not show that seeds do not matter.

    Interval: percentile bootstrap that resamples questions and seeds, crossed (Owen 2007). It
    counts the residual twice, and is therefore too wide rather than too narrow with few questions.
    """
    (n_a, n_questions), n_b = a.shape, b.shape[0]
    by_question = a.mean(0) - b.mean(0)  # (Q,)
    estimate = float(by_question.mean())
    tables = [a - b] if paired else [a, b]
    arms = [Arm(mean_squares(table), len(table)) for table in tables if len(table) > 1]
    se, df = crossed_standard_error(by_question, arms)

    boot_a, boot_b = bootstrap(a, draws, 0), bootstrap(b, draws, 0 if paired else 1)
    low, high = percentiles(boot_a - boot_b)
    rate_low = rate_high = math.nan
    if (boot_b > 0).all():
        rate_low, rate_high = percentiles((boot_a - boot_b) / boot_b)

    residual = sum(arm.squares.residual / arm.n_seeds for arm in arms)
    return Difference(
        estimate=estimate,
        se=se,
        df=df,
        low=low,
        high=high,
        rate=estimate / b.mean() if b.mean() > 0 else math.nan,
        rate_low=rate_low,
        rate_high=rate_high,
        n_questions=n_questions,
        n_seeds=min(n_a, n_b),
        seeds="one seed" if not arms else "paired" if paired else "unpaired",
        variances=Variances(
            question=max(0.0, by_question.var(ddof=1) - residual) if n_questions > 1 else math.nan,
            seed=sum(
                max(0.0, squares.seed - squares.residual) / n_questions for squares, _ in arms
            ),
            residual=sum(arm.squares.residual for arm in arms),
        ),
    )


def crossed_standard_error(by_question: np.ndarray, arms: list[Arm]) -> tuple[float, float]:
    """Standard error of a mean difference, and its degrees of freedom.

    Parameters
    ----------
    by_question : (Q,) array
        Differences of the two cells' means, one for each question.
    arms : list of Arm
        Cells (or the paired differences) with at least two seeds; empty with one seed, where the
        test becomes the paired t-test over questions.

    Returns
    -------
    se, df : float
        NaN with a single question. The components' degrees of freedom are combined by
        Satterthwaite (1946).
    """
    n = len(by_question)
    if n < 2:
        return math.nan, math.nan
    question_part = by_question.var(ddof=1) / n
    if not arms:
        return math.sqrt(question_part), n - 1
    seed_part = sum((arm.squares.seed - arm.squares.residual) / (n * arm.n_seeds) for arm in arms)
    parts = [(question_part, n - 1)]  # (mean square in units of the error variance, its df)
    for squares, n_seeds in arms:
        parts += [
            (squares.seed / (n * n_seeds), n_seeds - 1),
            (squares.residual / (n * n_seeds), (n - 1) * (n_seeds - 1)),
        ]
    variance = question_part + seed_part
    weight = sum(part**2 / df for part, df in parts)
    df = max(1.0, variance**2 / weight) if variance > 0 and weight > 0 else 1.0
    return math.sqrt(question_part + max(0.0, seed_part)), df


@lru_cache(maxsize=8)  # 60 MB each at 750 validation pairs
def bootstrap_weights(n: int, draws: int, stream: int) -> np.ndarray:
    """(draws, n) weights of a bootstrap: how often each of n units is drawn, divided by n.

    The same arguments give the same weights.
    """
    counts = np.random.default_rng([n, stream]).multinomial(n, np.full(n, 1 / n), draws)
    return counts / n


def bootstrap(table: np.ndarray, draws: int, stream: int = 0) -> np.ndarray:
    """Bootstrap draws of a table's mean, seeds and questions resampled independently (crossed).

    Parameters
    ----------
    table : (S, Q) array
    draws : int
    stream : int
        Random stream of the seeds. Tables with the same Q get the same draws of questions, and
        tables with the same S and `stream` the same draws of seeds, so that the draws of two
        tables can be subtracted pair by pair.

    Returns
    -------
    (draws,) array

    Notes
    -----
    Crossed bootstrap of Owen (2007). Resampled seeds show only (S - 1) / S of the seeds' variance,
    which is a third too little with three seeds; their weights are therefore spread by
    sqrt(S / (S - 1)).
    """
    n_seeds, n_questions = table.shape
    questions = bootstrap_weights(n_questions, draws, QUESTION_STREAM)  # (draws, Q)
    seeds = bootstrap_weights(n_seeds, draws, stream)  # (draws, S)
    if n_seeds > 1:
        seeds = 1 / n_seeds + (seeds - 1 / n_seeds) * math.sqrt(n_seeds / (n_seeds - 1))
    return ((questions @ table.T) * seeds).sum(1)


def percentiles(draws: np.ndarray) -> tuple[float, float]:
    """The (1 - ALPHA) percentile interval of bootstrap draws; an infinite draw stays infinite."""
    low, high = np.quantile(draws, [ALPHA / 2, 1 - ALPHA / 2], method="nearest")
    return float(low), float(high)


def sensitivity(a: np.ndarray, b: np.ndarray) -> list[dict]:
    """The usual tests of the same difference, each with what it ignores.

    Parameters
    ----------
    a, b : (S_a, Q) and (S_b, Q) arrays
        As for `difference`.

    Returns
    -------
    list of dict
        `test`, `p` (two-sided; NaN if not computed) and `ignores`. Tests over questions need two
        questions, tests over seeds two seeds in both cells.
    """
    rows = []
    by_question = a.mean(0) - b.mean(0)  # (Q,)
    if len(by_question) > 1:
        rows += question_tests(by_question)
    if min(len(a), len(b)) > 1:
        rows += seed_tests(a, b)
    return [row | {"p": float(row["p"])} for row in rows]


def question_tests(by_question: np.ndarray) -> list[dict]:
    """Tests that take (Q,) mean differences as independent observations."""
    constant = by_question.std() == 0
    flips = scipy_stats.permutation_test(
        (by_question,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=9999,
        rng=np.random.default_rng(0),
    )
    p_values = {
        "paired t on questions": (
            math.nan if constant else scipy_stats.ttest_1samp(by_question, 0).pvalue
        ),
        "Wilcoxon signed rank on questions": (
            math.nan if constant else scipy_stats.wilcoxon(by_question).pvalue
        ),
        "sign-flip permutation on questions": flips.pvalue,
    }
    ignores = "ignores that other seeds would differ"
    return [{"test": test, "p": p, "ignores": ignores} for test, p in p_values.items()]


def seed_tests(a: np.ndarray, b: np.ndarray) -> list[dict]:
    """Tests that take each seed's mean over questions as an independent observation."""
    means_a, means_b = a.mean(1), b.mean(1)
    constant = means_a.std() + means_b.std() == 0
    p = math.nan if constant else scipy_stats.ttest_ind(means_a, means_b, equal_var=False).pvalue
    ignores = "ignores that other questions would differ, and that seeds are paired"
    rows = [{"test": "Welch t on seed means", "p": p, "ignores": ignores}]
    # Of the C(S_a + S_b, S_a) ways to assign the seeds, two are as extreme as can be: with three
    # against three seeds the least p-value is 2 / 20 = 0.1.
    least = 2 / math.comb(len(a) + len(b), len(a))
    if least > ALPHA:
        design = f"{len(a)} against {len(b)} seeds"
        why = f"not computed: with {design} its p cannot be below {least:.2g}"
        rows.append({"test": "exact permutation of seeds", "p": math.nan, "ignores": why})
    return rows


class RequiredSizes(NamedTuple):
    """Sizes at which a study would decide; None where no number is large enough."""

    seeds: int | None  # with the questions of this study
    questions: int | None  # with the seeds of this study


def required_sizes(measured: Difference, gap: float, equivalent: bool = False) -> RequiredSizes:
    """Number of seeds, or of questions, at which a claim is decided with probability POWER.

    Parameters
    ----------
    measured : Difference
        The measured difference; its variance components are taken as the true ones.
    gap : float
        Distance of the true difference from the claim's limit.
    equivalent : bool
        Whether both limits of an equivalence test are `gap` away.

    Returns
    -------
    RequiredSizes

    Notes
    -----
    An approximation: the components are themselves rough with three seeds, and quantiles are
    normal. It leaves room for the 95 % interval to agree with the test.
    """
    if math.isnan(measured.p()) or not gap > 0:
        return RequiredSizes(None, None)
    power = (1 + POWER) / 2 if equivalent else POWER  # an equivalence test can fail on either side
    target = (gap / (scipy_stats.norm.ppf(1 - ALPHA / 2) + scipy_stats.norm.ppf(power))) ** 2

    def least_n(fixed: float, per_unit: float) -> int | None:
        """Least n with fixed + per_unit / n <= target."""
        if fixed == 0 and per_unit == 0:
            return 1
        return math.ceil(per_unit / (target - fixed)) if target > fixed else None

    question, seed, residual = measured.variances
    q, s = measured.n_questions, measured.n_seeds
    seeds = None
    if measured.seeds != "one seed":
        seeds = least_n(question / q, seed + residual / q)
    return RequiredSizes(seeds, questions=least_n(seed / s, question + residual / s))


def holm(p_values: list[float]) -> list[float]:
    """Adjusted p-values of Holm (1979), which hold the family-wise error rate.

    NaN stays NaN and does not count as a member of the family.
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[i] = largest
    return adjusted


def benjamini_hochberg(p_values: list[float]) -> list[float]:
    """Adjusted p-values of Benjamini and Hochberg (1995), which hold the false discovery rate.

    SciPy's `false_discovery_control`; NaN stays NaN and does not count as a member of the family.
    """
    known = [i for i, p in enumerate(p_values) if not math.isnan(p)]
    adjusted = [math.nan] * len(p_values)
    if known:
        for i, p in zip(known, scipy_stats.false_discovery_control([p_values[i] for i in known])):
            adjusted[i] = float(p)
    return adjusted


def exact_interval(count: int, total: int) -> tuple[float, float]:
    """Interval of a rate by Clopper and Pearson (1934); (0, 1) if nothing was observed.

    Assumes `total` independent trials.
    """
    if total == 0:
        return 0.0, 1.0
    interval = scipy_stats.binomtest(count, total).proportion_ci(1 - ALPHA, method="exact")
    return float(interval.low), float(interval.high)


def mcnemar(a: np.ndarray, b: np.ndarray) -> dict:
    """Exact McNemar (1947) test of two classifiers on the same pairs.

    Parameters
    ----------
    a, b : (Q,) arrays
        1 right, 0 wrong, 0.5 a tie. A pair in which either has a tie is left out and counted.

    Returns
    -------
    dict
        `only_a` and `only_b` (pairs that only one of the two ranks correctly), `ties`, and `p`,
        two-sided; 1 without a discordant pair.
    """
    tie = (a == 0.5) | (b == 0.5)
    only_a = int(((a == 1) & (b == 0))[~tie].sum())
    only_b = int(((a == 0) & (b == 1))[~tie].sum())
    p = float(scipy_stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return {"only_a": only_a, "only_b": only_b, "ties": int(tie.sum()), "p": p}
