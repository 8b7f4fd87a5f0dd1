"""What a study of a given size finds: the detectable difference, and the sizes that would decide.

Both use the power of the very test in stats.py, not of a textbook's: with two or three seeds, the
half-width of an interval varies so much between studies that power is an average over what the
study might have measured.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import special
from scipy.optimize import brentq
from scipy.stats import binom

from pref.analysis.stats import ALPHA, Difference, MeanError

POWER = 0.8
LARGEST = 1_000_000  # seeds or questions: more are not asked for


class Design(NamedTuple):
    """A study with known truth: the variance of its estimate, and how well each part is measured.

    Variances are those of the estimate, as in `MeanError`.
    """

    questions: float
    questions_df: float
    seeds: float  # true variance that the seeds contribute, without `chance`
    seeds_df: float
    chance: float


def true_design(measured: Difference) -> Design:
    """The design of a study, from its own estimates of the variances.

    Notes
    -----
    Estimates are unbiased in the median: half of the studies of a design overestimate the variance,
    half underestimate it. What is computed from the design, such as the detectable difference, is
    then right in the median too. An estimate unbiased in the mean is not: with three seeds, it is
    below the true variance in 63 % of studies.
    """
    error = measured.error
    seeds = 0.0
    if error.seeds_df:
        seeds = error.seeds * error.seeds_df / special.chdtri(error.seeds_df, 0.5)
    questions = error.questions * error.questions_df / special.chdtri(error.questions_df, 0.5)
    return Design(
        questions=max(questions, error.chance),  # it contains chance's part
        questions_df=error.questions_df,
        seeds=max(0.0, seeds - error.chance),
        seeds_df=error.seeds_df,
        chance=error.chance,
    )


@lru_cache(maxsize=64)
def chi2_nodes(df: float, n: int) -> tuple[np.ndarray, np.ndarray]:
    """n values of chi2(df) / df and their weights: expectations become weighted sums."""
    if df == 0:
        return np.zeros(1), np.ones(1)
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return special.chdtri(df, (1 - nodes) / 2) / df, weights / 2


class Power:
    """How often the 1 - alpha interval of a study decides, given the study's true design.

    gain: standard errors by which an estimate must be clear of a value besides (the best of more
    cells, see variation.chance_gain).
    """

    def __init__(self, design: Design, alpha: float = ALPHA, gain: float = 0.0) -> None:
        question_nodes, question_weights = chi2_nodes(design.questions_df, 9)
        seed_nodes, seed_weights = chi2_nodes(design.seeds_df, 60)
        measured = MeanError(
            questions=design.questions * question_nodes[:, None],
            questions_df=design.questions_df,
            seeds=(design.seeds + design.chance) * seed_nodes,
            seeds_df=design.seeds_df,
            chance=design.chance,
        )
        self.weights = question_weights[:, None] * seed_weights
        self.se = math.sqrt(design.questions + design.seeds)
        self.half_widths = measured.half_width(alpha) + gain * self.se  # (question, seed nodes)

    def finds(self, gap: float) -> float:
        """Probability that the interval leaves out a value at distance `gap` from the truth."""
        found = special.ndtr((gap - self.half_widths) / self.se)
        found += special.ndtr((-gap - self.half_widths) / self.se)
        return float((self.weights * found).sum())

    def finds_equal(self, margin: float) -> float:
        """Probability that the interval lies between -margin and margin, if the truth is 0."""
        inside = 2 * special.ndtr((margin - self.half_widths) / self.se) - 1
        return float((self.weights * np.maximum(0.0, inside)).sum())


def minimum_detectable(measured: Difference) -> float:
    """True difference that a study of this design finds with probability POWER, two-sided at 5 %;
    NaN if nothing measures the error.

    Rougher for cells with different seeds, whose variances are taken as one: found in 70 to 88 %
    of simulated studies rather than 78 to 82.
    """
    if not measured.measurable():
        return math.nan
    power = Power(true_design(measured))
    high = measured.se
    while power.finds(high) < POWER:
        high *= 2
    return float(brentq(lambda gap: power.finds(gap) - POWER, 0.0, high, rtol=1e-6))


class RequiredSizes(NamedTuple):
    """Sizes at which a study would decide; None where no number is large enough."""

    seeds: int | None  # with the questions of this study
    questions: int | None  # with the seeds of this study


def required_sizes(
    measured: Difference,
    gap: float,
    equivalent: bool = False,
    alpha: float = ALPHA,
    gain: float = 0.0,
) -> RequiredSizes:
    """Number of seeds, or of questions, at which a claim is decided with probability POWER.

    Parameters
    ----------
    measured : Difference
        The measured difference; its variance components are taken as the true ones.
    gap : float
        Distance of the true difference from the claim's limit.
    equivalent : bool
        Whether both limits of an equivalence test are `gap` away.
    alpha : float
        Level of the interval that decides; below 5 % where there are several comparisons.
    gain : float
        Standard errors by which the estimate must exceed 0 besides (`Power`).

    Returns
    -------
    RequiredSizes
        At least two seeds, since one says nothing about others.

    Notes
    -----
    As rough as the estimates of the components are, above all that of so few seeds.
    """
    if not measured.measurable() or not gap > 0:
        return RequiredSizes(None, None)
    now = true_design(measured)
    n_seeds, n_questions = measured.n_seeds, measured.n_questions
    if n_seeds == 1 and now.seeds_df:  # an untrained model has one run: the other's seeds count
        n_seeds = round(now.seeds_df) + 1
    residual = measured.residual  # of one score
    question = max(0.0, now.questions * n_questions - residual / n_seeds)

    def decides(seeds: int, questions: int) -> bool:
        chance = residual / (seeds * questions)
        scale = (seeds - 1) / (n_seeds - 1) if n_seeds > 1 else 1.0
        design = Design(
            questions=question / questions + chance,
            questions_df=questions - 1,
            seeds=now.seeds * n_seeds / seeds,
            seeds_df=now.seeds_df * scale,
            chance=chance,
        )
        power = Power(design, alpha, gain)
        return (power.finds_equal(gap) if equivalent else power.finds(gap)) >= POWER

    seeds = None
    if measured.seeds != "one seed":
        seeds = least(lambda n: decides(n, n_questions))
    return RequiredSizes(seeds, questions=least(lambda n: decides(n_seeds, n)))


def least(enough) -> int | None:
    """Least n of at least 2 for which enough(n) holds, if it holds for all larger n too; None if
    it does not hold for LARGEST.
    """
    high = 2
    while not enough(high):
        if high >= LARGEST:
            return None
        high = min(2 * high, LARGEST)
    low = high // 2  # not enough, or 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def required_runs(limit: float, rate: float, most: int = 20_000) -> int | None:
    """Number of runs from which on the exact one-sided binomial test of a rate of `limit` finds the
    true `rate`, above or below it, with probability POWER; None if that is more than `most`.

    The test's power is a saw-tooth over the number of runs: a count is a whole number.
    """
    n = np.arange(1, most + 1)
    # Events become the rarer outcome's count: "at least k of n" is "at most n - k" of the others.
    limit, rate = (limit, rate) if rate < limit else (1 - limit, 1 - rate)
    count = binom.ppf(ALPHA, n, limit)  # the least count whose probability or less reaches ALPHA
    count -= binom.cdf(count, n, limit) >= ALPHA  # the largest that rejects; -1 if none does
    too_few = np.flatnonzero(binom.cdf(count, n, rate) < POWER)
    enough = int(too_few[-1]) + 2 if len(too_few) else 1
    return enough if enough <= most else None
