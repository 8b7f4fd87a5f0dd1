"""Means and differences of cells of the grid: tests, intervals, multiplicity.

Functions on arrays, on top of SciPy. A "table" is the scores of one cell: shape (S, Q), with S
seeds (training runs) and Q questions. For MT-Bench, an entry is a question's mean rating over the
turns that all compared runs have. For validation accuracy, the "questions" are validation pairs
and an entry is 0, 0.5 (a tie) or 1.

Such a study samples two things, questions and seeds, and both contribute to the error: ratings of
another turn, or of another question in the same run, are not independent observations. There are
many questions but two or three seeds, so the two parts are known very unequally well. One rule
answers for both, in tests and intervals alike:

1. The error of a mean has a part from the questions and a part from the seeds (`MeanError`).
2. The interval's half-width is the root of the two parts' squared half-widths, each with its own
   t quantile: t(Q - 1) of the questions, t(S - 1) of the seeds.
3. A p-value is the level at which the interval would just reach the hypothesis. Test and interval
   therefore always agree.

bench/calibration.py simulates how often this errs. What a study of a given size can find is in
power.py, statistics of variation (over beta, between sources, of a judge) in variation.py.
"""

import math
from collections.abc import Iterable
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
from scipy import special
from scipy import stats as scipy_stats
from scipy.optimize import brentq

ALPHA = 0.05
DRAWS = 10_000  # of the confidence distribution of a variance, unless told otherwise
LEAST_P = 1e-100  # smaller p-values are given as this one


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


def without_rounding(values: np.ndarray, scale: float | None = None) -> np.ndarray:
    """The values without what floating-point sums add to them: means of the same ratings in another
    order differ by 1e-16, and a tie, or a difference of 0, is none then to a test on ranks.

    scale: magnitude of the numbers that the values were computed from (default: the largest value).
    """
    values = np.asarray(values, dtype=float)
    if scale is None:
        scale = np.abs(values).max(initial=0.0)
    if not 0 < scale < math.inf:
        return values
    return np.round(values, min(300, 11 - math.ceil(math.log10(scale))))


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


class MeanError(NamedTuple):
    """What is known about the error of a mean over questions and seeds, in two parts.

    Each field is a float or an array, and the methods work elementwise. Variances are those of the
    mean: divided by the numbers of questions and seeds.
    """

    questions: float  # variance from the questions and the residual; NaN with a single question
    questions_df: float  # Q - 1
    seeds: float  # mean square of the seeds: their variance, and `chance`; 0 with a single seed
    seeds_df: float  # S - 1; 0 with a single seed
    chance: float  # what `seeds` would be, on average, if seeds did not matter

    def seed_variance(self) -> float:
        """Variance of the mean that is due to its seeds.

        The mean square of the seeds exceeds `chance` by this variance, on average. With two or
        three seeds it scatters so widely that it is often below `chance` although seeds matter.
        What chance contributed is therefore taken out as a random amount: the expectation of
        max(0, seeds - chance * Y), Y ~ chi2(df / 2) / (df / 2). Half of the degrees of freedom are
        twice the variance: both the observed mean square and chance's part of it scatter. The
        result is above 0 wherever seeds > 0, and about seeds - chance where that is large.
        bench/README.md compares this with other rules.
        """
        df = np.maximum(self.seeds_df / 2, 1e-300)
        scaled = df * self.seeds / np.maximum(self.chance, 1e-300)
        return self.seeds * special.chdtr(df, scaled) - self.chance * special.chdtr(df + 2, scaled)

    def half_width(self, alpha: float = ALPHA) -> float:
        """Half-width of the 1 - alpha interval: t(Q-1) and t(S-1) half-widths, squared and added.

        The sum is that of Banerjee (1960), who showed that it covers at least 1 - alpha if both
        variances are estimated without bias.
        """
        squared = quantile(self.questions_df, alpha) ** 2 * self.questions
        if np.all(self.seeds_df == 0):
            return np.sqrt(squared)
        return np.sqrt(squared + quantile(self.seeds_df, alpha) ** 2 * self.seed_variance())

    def p(self, distance: float) -> float:
        """Two-sided p-value: the alpha at which the half-width is `distance`."""
        if self.seeds_df == 0:
            t = abs(distance) / math.sqrt(self.questions)
            return max(LEAST_P, float(2 * special.stdtr(self.questions_df, -t)))

        def excess(log_alpha: float) -> float:
            return self.half_width(math.exp(log_alpha)) - abs(distance)

        least = math.log(LEAST_P)
        if excess(least) <= 0:
            return LEAST_P
        return 1.0 if excess(0.0) >= 0 else math.exp(brentq(excess, least, 0.0, xtol=1e-10))


def quantile(df: float, alpha: float) -> float:
    """Two-sided critical value of Student's t."""
    return -special.stdtrit(df, alpha / 2)


def mean_error(by_question: np.ndarray, tables: list[np.ndarray]) -> MeanError:
    """Error of the mean of `by_question`.

    Parameters
    ----------
    by_question : (Q,) array
        The mean (or the difference of two means), one for each question.
    tables : list of (S, Q) arrays
        Tables whose seeds were sampled independently of each other's, and whose means are added or
        subtracted: one of paired differences, or one for each cell.
    """
    n = len(by_question)
    seeds = seed_error(tables)
    return MeanError(
        questions=float(by_question.var(ddof=1)) / n if n > 1 else math.nan,
        questions_df=n - 1,
        seeds=seeds.variance,
        seeds_df=seeds.df,
        chance=seeds.chance,
    )


class SeedError(NamedTuple):
    """The part of the seeds in the variance of a sum of means, as `MeanError` has it."""

    variance: float
    df: float
    chance: float


def seed_error(tables: list[np.ndarray]) -> SeedError:
    """Part of the seeds in the variance of the sum of the means of (S, Q) tables.

    Seeds of two tables are independent of each other. A table with a single seed adds nothing: its
    seed's part is not known. Mean squares are added, with the degrees of freedom of Satterthwaite
    (1946), as in Welch's test; of tables with unequal numbers of seeds, each counts as if it had
    the smallest number. (With their own numbers, Welch's test of two seeds against five errs in up
    to 10 % of studies.)
    """
    tables = [table for table in tables if len(table) > 1]
    variance = chance = squared = 0.0
    for table in tables:
        squares = mean_squares(table)
        part = float(squares.seed) / table.size
        variance += part
        chance += float(squares.residual) / table.size
        squared += part**2
    least_df = min((len(table) - 1 for table in tables), default=0)
    return SeedError(variance, least_df * (variance**2 / squared if squared else 1.0), chance)


def mean_interval(table: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of an (S, Q) table over questions and seeds; of a single seed, over
    questions alone. NaN with a single question, or with scores that are equal throughout: nothing
    measures the error then.
    """
    mean, half_width = float(table.mean()), float(mean_error(table.mean(0), [table]).half_width())
    if not half_width > 1e-12 * max(1.0, abs(mean)):
        return math.nan, math.nan
    return mean - half_width, mean + half_width


def proportion_interval(table: np.ndarray) -> tuple[float, float]:
    """`mean_interval` of scores from 0 to 1, such as wins or right answers: it stays within these
    limits, and has some width even where all scores are 0 or all are 1.

    Notes
    -----
    Korn and Graubard (1998): the interval of Clopper and Pearson (1934) for a sample of such a size
    that it would be as wide as `mean_interval`. Where all scores are the same, that is the number
    of questions: seeds answer the same ones.
    """
    rate, n_questions = float(table.mean()), table.shape[1]
    if n_questions < 2:
        return math.nan, math.nan
    half_width = float(mean_error(table.mean(0), [table]).half_width())
    size = n_questions
    if half_width > 0:
        size = rate * (1 - rate) * (scipy_stats.norm.ppf(1 - ALPHA / 2) / half_width) ** 2
    hits, misses = rate * size, (1 - rate) * size
    low = special.betaincinv(hits, misses + 1, ALPHA / 2) if hits > 0 else 0.0
    high = special.betaincinv(hits + 1, misses, 1 - ALPHA / 2) if misses > 0 else 1.0
    return float(low), float(high)


class Difference(NamedTuple):
    """Mean of a minus mean of b, as `difference` estimates it. NaN where a value is unknown."""

    estimate: float
    error: MeanError
    n_questions: int
    n_seeds: int  # the smaller number of the two cells
    seeds: str  # "paired", "unpaired", or "one seed": nothing is known about other seeds
    residual: float  # variance of one score around what its question and its seed explain

    @property
    def se(self) -> float:
        """Standard error over questions and seeds."""
        return math.sqrt(self.error.questions + self.error.seed_variance())

    @property
    def df(self) -> float:
        """Degrees of freedom with which Student's t and `se` give the interval."""
        error = self.error
        if not self.measurable():
            return math.nan
        if error.seed_variance() == 0:
            return error.questions_df
        return float(special.stdtridf(1 - ALPHA / 2, error.half_width() / self.se))

    @property
    def seed_share(self) -> float:
        """Share of the seeds in the squared standard error; NaN with one seed."""
        if self.seeds == "one seed" or not self.measurable():
            return math.nan
        return float(self.error.seed_variance() / self.se**2)

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval; NaN unless `measurable`."""
        return self.estimate - self.half_width

    @property
    def high(self) -> float:
        return self.estimate + self.half_width

    @property
    def half_width(self) -> float:
        return float(self.error.half_width()) if self.measurable() else math.nan

    def measurable(self) -> bool:
        """Whether anything measures the error: not so with a single question, or with differences
        that are equal throughout.
        """
        return self.se > 1e-12 * max(1.0, abs(self.estimate))

    def p(self, null: float = 0.0, side: int = 0) -> float:
        """p-value of the hypothesis that the true difference is `null`.

        Parameters
        ----------
        null : float
            The hypothesised difference.
        side : {0, 1, -1}
            The alternative: 0 either side, 1 a larger difference, -1 a smaller one.

        Returns
        -------
        float
            NaN unless `measurable`.
        """
        if not self.measurable():
            return math.nan
        p = self.error.p(self.estimate - null)
        if side == 0:
            return p
        return p / 2 if side * (self.estimate - null) > 0 else 1 - p / 2

    def p_equivalent(self, margin: float) -> float:
        """p-value of the equivalence test with limits -margin and margin.

        Two one-sided tests (Schuirmann 1987) of the hypothesis that the true difference is
        `margin` or more in either direction.
        """
        return max(self.p(-margin, side=1), self.p(margin, side=-1))


def difference(a: np.ndarray, b: np.ndarray, paired: bool) -> Difference:
    """Compare the mean scores of two cells on the same questions.

    Parameters
    ----------
    a : (S_a, Q) array
    b : (S_b, Q) array
        Columns are the same questions in both. If `paired`, rows are the same seeds in both.
    paired : bool
        Whether row s of `a` and row s of `b` share a training seed.

    Returns
    -------
    Difference

    Notes
    -----
    Assumes questions and seeds that are sampled independently of each other and residuals of
    equal variance (a two-way random-effects model).
    """
    by_question = a.mean(0) - b.mean(0)  # (Q,)
    tables = [a - b] if paired else [a, b]
    several = [table for table in tables if len(table) > 1]
    return Difference(
        estimate=float(by_question.mean()),
        error=mean_error(by_question, tables),
        n_questions=len(by_question),
        n_seeds=min(len(a), len(b)),
        seeds="one seed" if not several else "paired" if paired else "unpaired",
        residual=float(sum(mean_squares(table).residual for table in several)),
    )


class Rate(NamedTuple):
    """A difference in units of b's mean, and its 95 % interval. NaN where b's mean is not positive
    or nothing measures the error, infinite where the data give no limit."""

    rate: float
    low: float
    high: float


def improvement_rate(a: np.ndarray, b: np.ndarray, paired: bool) -> Rate:
    """(mean of a - mean of b) / mean of b. Arguments as for `difference`.

    Notes
    -----
    Interval by Fieller's (1954) theorem: the rates r at which the mean of a - (1 + r) b is not
    distinguished from 0.
    """
    if not b.mean() > 0:
        return Rate(math.nan, math.nan, math.nan)
    rate = float(a.mean() / b.mean() - 1)

    def excess(r: float) -> float:
        """Distance of the mean of a - (1 + r) b from 0, beyond what its interval reaches."""
        compared = difference(a, (1 + r) * b, paired)
        return abs(compared.estimate) - float(compared.error.half_width())

    scale = max(1.0, abs(rate))

    def reach(side: int) -> float:
        """How far the interval reaches to one side."""
        step = 1e-3 * scale
        while not excess(rate + side * step) > 0:
            step *= 2
            if step > 1e3 * scale:
                return math.inf
        tolerance = 1e-9 * scale
        return float(brentq(lambda size: excess(rate + side * size), 0.0, step, xtol=tolerance))

    if math.isnan(excess(rate)):  # a single question
        return Rate(rate, math.nan, math.nan)
    if excess(rate) >= -1e-12:
        return Rate(rate, math.nan, math.nan)
    return Rate(rate, rate - reach(-1), rate + reach(1))


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
