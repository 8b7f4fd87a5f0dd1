"""Variation of scores: over beta, between cells of a grid, by source, and of a judge.

Functions on arrays, on top of SciPy; "table" is as in stats.py: (S, Q) scores of one cell, S seeds
by Q questions.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from scipy import special
from scipy import stats as scipy_stats

from pref.analysis import stats


class BetaSpread(NamedTuple):
    """How much the score of a loss moves with beta, as `beta_spread` estimates it."""

    raw: float  # sample variance of the observed means over beta
    noise: float  # the part of it that questions and seeds contribute
    variance: float  # raw - noise: the estimate of the true means' variance; may be negative
    draws: np.ndarray  # (draws,) of the confidence distribution of the true variance; none negative
    error: stats.MeanError  # of one beta's mean around its true one
    n_betas: int


def beta_spread(
    tables: list[np.ndarray], same_seeds: bool, draws: int = stats.DRAWS, stream: int = 0
) -> BetaSpread:
    """Variance of a loss's true mean scores over B betas.

    Parameters
    ----------
    tables : list of B arrays (S_b, Q)
        One table for each beta, on the same questions.
    same_seeds : bool
        Whether the rows of all tables are the same seeds in the same order.
    draws : int
        Number of draws of the confidence distribution.
    stream : int
        Random stream; two losses that are compared need different ones.

    Returns
    -------
    BetaSpread

    Notes
    -----
    Noise: the variance that the B means have around the true ones, from the interaction of
    questions and beta, from the seeds, and from the residual. Whatever all betas share cancels:
    the questions' difficulty and, if `same_seeds`, the level of a seed. The noise is taken to be
    alike at all betas.
    """
    n_betas, n_questions = len(tables), tables[0].shape[1]
    means = np.array([table.mean() for table in tables])  # (B,)

    # Questions: the interaction left after taking out each beta's and each question's mean.
    crossed = np.array([table.mean(0) for table in tables])  # (B, Q)
    crossed = crossed - crossed.mean(0) - crossed.mean(1, keepdims=True) + crossed.mean()
    questions_df = (n_betas - 1) * max(1, n_questions - 1)

    # Seeds: where they are the same at every beta, only their deviation from the mean over betas.
    own, df_share = tables, 1.0
    if same_seeds:
        common = np.mean(tables, axis=0)  # (S, Q)
        own = [(table - common) * math.sqrt(n_betas / (n_betas - 1)) for table in tables]
        df_share = (n_betas - 1) / n_betas
    own = [table for table in own if len(table) > 1]
    of_sum, n_own = stats.seed_error(own), max(1, len(own))
    error = stats.MeanError(
        questions=float((crossed**2).sum()) / (questions_df * n_questions),
        questions_df=questions_df,
        seeds=of_sum.variance / n_own,
        seeds_df=df_share * sum(len(table) - 1 for table in own),
        chance=of_sum.chance / n_own,
    )
    raw = float(means.var(ddof=1))
    noise = error.questions + max(0.0, error.seeds - error.chance)
    return BetaSpread(
        raw=raw,
        noise=noise,
        variance=raw - noise,
        draws=confidence_draws(raw, error, n_betas, draws, stream),
        error=error,
        n_betas=n_betas,
    )


def confidence_draws(
    raw: float, error: stats.MeanError, n_betas: int, draws: int, stream: int
) -> np.ndarray:
    """Draws of the confidence distribution of the true variance over B betas.

    If the noise were known, raw * (B - 1) / noise would follow the noncentral chi-square
    distribution with B - 1 degrees of freedom whose noncentrality is the true variance * (B - 1) /
    noise. Its confidence distribution gives a draw: the noncentrality at which what was observed,
    or less, has a probability u that is drawn evenly from 0 to 1 (0 if that is so for none). The
    noise is not known: each draw has its own, from the distribution that its mean squares leave it
    (a generalised pivotal quantity, Weerahandi 1993).
    """
    rng = np.random.default_rng([n_betas, stream])
    question_chi, seed_chi = rng.chisquare(error.questions_df, draws), np.ones(draws)
    probability = rng.random(draws)
    seeds = np.zeros(draws)
    if error.seeds_df:
        seed_chi = rng.chisquare(error.seeds_df, draws)
        seeds = np.maximum(0.0, error.seeds * error.seeds_df / seed_chi - error.chance)
    noise = error.questions * error.questions_df / question_chi + seeds
    if not (noise > 0).all():  # equal deviations everywhere: nothing is noise
        return np.full(draws, raw)
    observed = raw * (n_betas - 1) / noise
    return noncentrality(observed, n_betas - 1, probability) * noise / (n_betas - 1)


def noncentrality(x: np.ndarray, df: int, probability: np.ndarray) -> np.ndarray:
    """Noncentrality at which a noncentral chi-square variable is at most `x` with this probability;
    0 where even the central one is so with a smaller one. Elementwise.
    """
    found = np.zeros_like(x)
    large = x > 1000  # SciPy's inversion becomes slow, then fails; the root is normal, SD 1
    normal = np.sqrt(x[large]) - special.ndtri(probability[large])
    found[large] = np.maximum(0.0, normal**2 - (df - 1))
    exact = ~large & (special.chdtr(df, x) > probability)
    found[exact] = special.chndtrinc(x[exact], df, probability[exact])
    return found


def with_less_noise(spread: BetaSpread, factor: float, draws: int, stream: int) -> BetaSpread:
    """What a study with `factor` times the seeds and the questions would show of the same true
    variance.
    """
    error = spread.error._replace(
        questions=spread.error.questions / factor,
        seeds=spread.error.seeds / factor,
        seeds_df=spread.error.seeds_df * factor,
        chance=spread.error.chance / factor,
    )
    noise, variance = spread.noise / factor, max(0.0, spread.variance)
    raw = variance + noise
    return spread._replace(
        raw=raw,
        noise=noise,
        variance=variance,
        draws=confidence_draws(raw, error, spread.n_betas, draws, stream),
        error=error,
    )


def variance_ratio(a: BetaSpread, b: BetaSpread) -> dict:
    """Variance over beta of one loss divided by that of another.

    Returns
    -------
    dict
        `ratio` and its 95 % interval `low`, `high`. The ratio is 0 where a's variance is estimated
        as 0 or below: that a loss is flat is a finding. It is None where b's is: a ratio to nothing
        is undefined, though it may have a lower limit. An infinite `high` says that b's variance is
        not distinguishable from 0, so that the data give no upper limit.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = a.draws / b.draws  # 0 / 0: any ratio
    interval = [
        float(np.quantile(np.nan_to_num(ratios, nan=unknown, posinf=math.inf), tail, method=method))
        for unknown, tail, method in (
            (0.0, stats.ALPHA / 2, "lower"),
            (math.inf, 1 - stats.ALPHA / 2, "higher"),
        )
    ]
    if b.variance <= 0:
        return {"ratio": None, "low": interval[0], "high": math.inf}
    ratio = max(0.0, a.variance) / b.variance
    return {"ratio": ratio, "low": min(interval[0], ratio), "high": max(interval[1], ratio)}


def brown_forsythe(a: list[float], b: list[float]) -> float:
    """p-value of the test of Brown and Forsythe (1974) that two losses' means over beta are
    equally spread (Levene's test about the median). NaN below three betas.
    """
    a, b = np.split(stats.without_rounding(np.array([*a, *b])), [len(a)])
    if min(len(a), len(b)) < 3 or np.ptp(a) == np.ptp(b) == 0:
        return math.nan
    return float(scipy_stats.levene(a, b, center="median").pvalue)


def expected_best(selected_by: list[float], scores: list[float], budget: int) -> float:
    """Expected score of the best of `budget` cells drawn at random from a grid, without repeats.

    Parameters
    ----------
    selected_by : list of n floats
        What the best cell is selected by, such as validation accuracy.
    scores : list of n floats
        What is reported of the selected cell. With `scores` as its own selector, the result is
        the expected maximum.
    budget : int
        Number of cells drawn, k <= n.

    Notes
    -----
    Dodge et al. (2019) with the finite grid itself: the cell with rank r (r cells rank below it)
    is the best of k with probability C(r, k - 1) / C(n, k). With k = 2 of n = 3 cells ranked
    1 < 2 < 3, these are 0, 1/3 and 2/3.
    """
    order = sorted(range(len(scores)), key=lambda i: (selected_by[i], i))
    total = math.comb(len(scores), budget)
    return sum(math.comb(rank, budget - 1) / total * scores[i] for rank, i in enumerate(order))


@functools.cache
def expected_normal_maximum(n: int) -> float:
    """Expected maximum of n independent standard normal variables: 0, 0.56, 0.85, 1.03, ..."""
    nodes, weights = np.polynomial.legendre.leggauss(400)
    return float(weights @ special.ndtri(((1 + nodes) / 2) ** (1 / n)) / 2)


def chance_gain(se: float, n_a: int, n_b: int) -> float:
    """How far the best of `n_a` cells exceeds the best of `n_b`, on average, if all are truly equal
    and what selects is the very score; negative if `n_b` is the larger. se: of the difference.
    """
    return (expected_normal_maximum(n_a) - expected_normal_maximum(n_b)) * se / math.sqrt(2)


def variance_parts(cube: np.ndarray) -> dict[str, float]:
    """Variance components of the scores of one loss, by the method of moments.

    Parameters
    ----------
    cube : (C, S, Q) array
        C cells by S seeds by Q questions, at least two of each; every cell has the same seeds in
        the same order.

    Returns
    -------
    dict
        Component by source, in this order: question (its difficulty), beta and tau (the cell),
        seed (what a seed's level shares over cells), the interactions of both with the cell, and
        the residual, which includes the judge. Estimates below 0 are reported as 0.
    """
    n_cells, n_seeds, n_questions = cube.shape
    grand = cube.mean()
    cell, seed, question = cube.mean((1, 2)), cube.mean((0, 2)), cube.mean((0, 1))  # (C,) (S,) (Q,)
    by_run, by_cell_question = cube.mean(2), cube.mean(1)  # (C, S), (C, Q)
    cell_seed = by_run - cell[:, None] - seed + grand  # (C, S)
    cell_question = by_cell_question - cell[:, None] - question + grand  # (C, Q)
    rest = cube - by_cell_question[:, None] - by_run[:, :, None] + cell[:, None, None]  # (C, S, Q)

    ms_cell = n_seeds * n_questions * ((cell - grand) ** 2).sum() / (n_cells - 1)
    ms_seed = n_cells * n_questions * ((seed - grand) ** 2).sum() / (n_seeds - 1)
    ms_question = n_cells * n_seeds * ((question - grand) ** 2).sum() / (n_questions - 1)
    ms_cell_seed = n_questions * (cell_seed**2).sum() / ((n_cells - 1) * (n_seeds - 1))
    ms_cell_question = n_seeds * (cell_question**2).sum() / ((n_cells - 1) * (n_questions - 1))
    ms_rest = (rest**2).sum() / (n_cells * (n_seeds - 1) * (n_questions - 1))

    n_per_cell = n_seeds * n_questions
    parts = {
        "question": (ms_question - ms_cell_question) / (n_cells * n_seeds),
        "beta and tau": (ms_cell - ms_cell_question - ms_cell_seed + ms_rest) / n_per_cell,
        "seed": (ms_seed - ms_cell_seed) / (n_cells * n_questions),
        "seed x beta and tau": (ms_cell_seed - ms_rest) / n_questions,
        "question x beta and tau": (ms_cell_question - ms_rest) / n_seeds,
        "residual": ms_rest,
    }
    return {name: max(0.0, float(value)) for name, value in parts.items()}


def retest(ratings: list[list[float]]) -> dict | None:
    """Reliability of a judge that rated the same answers several times.

    Parameters
    ----------
    ratings : list of lists
        The ratings of each item; items with a single rating are left out.

    Returns
    -------
    dict or None
        `n_items`; `icc`, the intraclass correlation ICC(1,1) of Shrout and Fleiss (1979), None if
        all ratings are equal; `sd` of one rating around its item's mean; `identical`, the share of
        items that got the same rating each time. None with fewer than two items.
    """
    ratings = [item for item in ratings if len(item) > 1]
    if len(ratings) < 2:
        return None
    within_df = sum(len(item) - 1 for item in ratings)
    within = sum(((np.array(item) - np.mean(item)) ** 2).sum() for item in ratings) / within_df
    n_total, n_items = sum(map(len, ratings)), len(ratings)
    grand = sum(map(sum, ratings)) / n_total
    between = sum(len(item) * (np.mean(item) - grand) ** 2 for item in ratings) / (n_items - 1)
    # Effective number of ratings per item: equal to it where all items have the same number.
    k = (n_total - sum(len(item) ** 2 for item in ratings) / n_total) / (n_items - 1)
    total = between + (k - 1) * within
    return {
        "n_items": n_items,
        "icc": float((between - within) / total) if total > 0 else None,
        "sd": math.sqrt(within),
        "identical": sum(len(set(item)) == 1 for item in ratings) / n_items,
    }


def length_correlation(scores: np.ndarray, lengths: np.ndarray, groups: list) -> dict | None:
    """Spearman correlation of score and answer length within groups.

    Do longer answers to the same question score higher?

    Parameters
    ----------
    scores, lengths : (n,) arrays
        Both are centred on their group's mean before they are ranked.
    groups : list of n hashable values
        The group of each answer, such as (question, turn).

    Returns
    -------
    dict or None
        `n` and `spearman`; None below three answers or without variation.
    """
    rows_of: dict = {}
    for i, group in enumerate(groups):
        rows_of.setdefault(group, []).append(i)
    centred = [np.array(values, dtype=float) for values in (scores, lengths)]
    for rows in rows_of.values():
        for values in centred:
            values[rows] -= values[rows].mean()
    centred = [
        stats.without_rounding(values, np.abs(given).max(initial=0.0))
        for values, given in zip(centred, (scores, lengths))
    ]
    if len(scores) < 3 or any(values.std() == 0 for values in centred):
        return None
    return {"n": len(scores), "spearman": float(scipy_stats.spearmanr(*centred).statistic)}
