"""The statistics of analyze.py: small functions on arrays, each with its assumptions, on top of
SciPy.

A "table" is scores (S, Q) of one cell of the grid: S seeds (training runs) by Q questions.
MT-Bench: a value is a question's mean rating over the turns that all compared runs have. Accuracy:
Q validation pairs, values 0, 0.5 or 1.

Two things are sampled in such a study, questions and seeds, and both count as error: a rating of
another turn, run or question of the same seed is no independent observation. bench/calibration.py
simulates how often these procedures err.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import stats as scipy_stats

ALPHA = 0.05
POWER = 0.8
DRAWS = 10_000
QUESTIONS = 2**32 - 1  # the stream of draws that questions have, far from the seeds'


class MeanSquares(NamedTuple):
    """Two-way layout without replication, seeds x questions; `residual` is their interaction with
    the noise.
    """

    question: float
    seed: float
    residual: float


def mean_squares(table: np.ndarray) -> MeanSquares:
    """Mean squares of (S, Q) scores; those of a factor with one level are 0."""
    n_seeds, n_questions = table.shape
    mean, by_question, by_seed = table.mean(), table.mean(0), table.mean(1)
    residuals = table - by_question - by_seed[:, None] + mean
    return MeanSquares(
        question=n_seeds * ((by_question - mean) ** 2).sum() / max(1, n_questions - 1),
        seed=n_questions * ((by_seed - mean) ** 2).sum() / max(1, n_seeds - 1),
        residual=(residuals**2).sum() / max(1, (n_seeds - 1) * (n_questions - 1)),
    )


class Difference(NamedTuple):
    """Mean of a minus mean of b. `se`, `df`: over questions and seeds (see `difference`); NaN where
    unknown.

    variances: one question's, one seed's and one rating's part of the variance; the squared
    standard error is question / Q + seed / S + residual / (Q S).
    """

    estimate: float
    se: float
    df: float
    low: float
    high: float
    rate: float
    rate_low: float
    rate_high: float
    n_questions: int
    n_seeds: int
    seeds: str  # paired, unpaired, or "one seed": then nothing is known about other seeds
    variances: tuple[float, float, float]

    def p(self, null: float = 0.0, side: int = 0) -> float:
        """p-value of "the difference is `null`"; side 1: against a larger one, -1: a smaller one,
        0: either.
        """
        if not self.se > 1e-12 * max(
            1.0, abs(self.estimate)
        ):  # all differences are equal: no error to test against
            return math.nan
        t = (self.estimate - null) / self.se
        return float(
            2 * scipy_stats.t.sf(abs(t), self.df)
            if side == 0
            else scipy_stats.t.sf(side * t, self.df)
        )

    def p_equivalent(self, margin: float) -> float:
        """Two one-sided tests (Schuirmann 1987): p-value against "the difference is `margin` or
        more either way".
        """
        return max(self.p(-margin, side=1), self.p(margin, side=-1))

    def minimum_detectable(self) -> float:
        """The true difference that this design finds with probability POWER at ALPHA, two-sided."""
        if math.isnan(self.p()):
            return math.nan
        return float(
            self.se
            * (scipy_stats.t.ppf(1 - ALPHA / 2, self.df) + scipy_stats.t.ppf(POWER, self.df))
        )


def difference(a: np.ndarray, b: np.ndarray, paired: bool, draws: int = DRAWS) -> Difference:
    """Compare two cells on the same questions: a (S_a, Q), b (S_b, Q), rows in the same order of
    seeds if `paired`.

    Standard error: question component + seed component - residual of the differences, which for
    paired seeds is (MS_question + MS_seed - MS_residual) / (Q S): a two-way random-effects model;
    degrees of freedom by Satterthwaite (1946). A seed component estimated below 0 counts as 0, but
    not in the degrees of freedom: with so few seeds that is no proof that seeds do not matter.
    Interval: percentile bootstrap that resamples questions and seeds, crossed (Owen 2007), which
    counts the residual twice and so errs to the wide side with few questions.
    """
    (n_a, n_questions), n_b = a.shape, b.shape[0]
    by_question = a.mean(0) - b.mean(0)
    estimate = float(by_question.mean())
    arms = [a - b] if paired else [a, b]
    squares = [(mean_squares(arm), arm.shape[0]) for arm in arms if arm.shape[0] > 1]
    boot_a, boot_b = bootstrap(a, draws, 0), bootstrap(b, draws, 0 if paired else 1)
    low, high = percentiles(boot_a - boot_b)
    rate = (boot_a - boot_b) / boot_b if (boot_b > 0).all() else None
    rate_low, rate_high = percentiles(rate) if rate is not None else (math.nan, math.nan)
    se, df = standard_error(by_question, squares)
    residual = sum(square.residual / n for square, n in squares)
    return Difference(
        estimate,
        se,
        df,
        low,
        high,
        estimate / b.mean() if b.mean() > 0 else math.nan,
        rate_low,
        rate_high,
        n_questions,
        min(n_a, n_b),
        "one seed" if not squares else "paired" if paired else "unpaired",
        variances=(
            max(0.0, by_question.var(ddof=1) - residual) if n_questions > 1 else math.nan,
            sum(max(0.0, square.seed - square.residual) / n_questions for square, _ in squares),
            sum(square.residual for square, _ in squares),
        ),
    )


def standard_error(
    by_question: np.ndarray, squares: list[tuple[MeanSquares, int]]
) -> tuple[float, float]:
    """(standard error, degrees of freedom) of the mean of (Q,) differences and the seeds' mean
    squares.
    """
    n = len(by_question)
    if n < 2:
        return math.nan, math.nan
    questions = by_question.var(ddof=1) / n
    if not squares:
        return math.sqrt(questions), n - 1
    seeds = sum((square.seed - square.residual) / (n * s) for square, s in squares)
    parts = [(questions, n - 1)]
    for square, s in squares:
        parts += [(square.seed / (n * s), s - 1), (square.residual / (n * s), (n - 1) * (s - 1))]
    known = sum(part**2 / df for part, df in parts)
    df = max(1.0, (questions + seeds) ** 2 / known) if questions + seeds > 0 and known > 0 else 1.0
    return math.sqrt(questions + max(0.0, seeds)), df


@lru_cache(maxsize=8)  # 60 MB each at 750 validation pairs
def resampled(n: int, draws: int, stream: int) -> np.ndarray:
    """(draws, n) weights of a bootstrap: how often each of n units is drawn, divided by n. Same for
    same arguments.
    """
    counts = np.random.default_rng([n, stream]).multinomial(n, np.full(n, 1 / n), draws)
    return counts / n


def bootstrap(table: np.ndarray, draws: int, stream: int = 0) -> np.ndarray:
    """(draws,) means of (S, Q) scores, seeds and questions resampled independently (crossed).

    Questions are drawn alike for every table with the same Q, seeds for every table with the same S
    and `stream`: so differences of two tables are paired. Resampled seeds have only (S-1)/S of the
    seeds' variance, a third too little with three: their weights are spread by the root of S/(S-1).
    """
    n_seeds, n_questions = table.shape
    questions, seeds = resampled(n_questions, draws, QUESTIONS), resampled(n_seeds, draws, stream)
    if n_seeds > 1:
        seeds = 1 / n_seeds + (seeds - 1 / n_seeds) * math.sqrt(n_seeds / (n_seeds - 1))
    return ((questions @ table.T) * seeds).sum(1)


def percentiles(draws: np.ndarray) -> tuple[float, float]:
    """The (1 - ALPHA) percentile interval; an infinite draw stays infinite."""
    low, high = np.quantile(draws, [ALPHA / 2, 1 - ALPHA / 2], method="nearest")
    return float(low), float(high)


def sensitivity(a: np.ndarray, b: np.ndarray) -> list[dict]:
    """Usual tests of the same difference (two-sided p), each with what it takes for granted. Not to
    be headlined.
    """
    by_question = a.mean(0) - b.mean(0)
    n_seeds = min(len(a), len(b))
    rows = []
    if len(by_question) > 1:
        constant = by_question.std() == 0
        t = math.nan if constant else scipy_stats.ttest_1samp(by_question, 0).pvalue
        wilcoxon = math.nan if constant else scipy_stats.wilcoxon(by_question).pvalue
        flips = scipy_stats.permutation_test(
            (by_question,),
            np.mean,
            permutation_type="samples",
            vectorized=True,
            n_resamples=9999,
            rng=np.random.default_rng(0),
        ).pvalue
        ignores = "ignores that other seeds would differ"
        rows += [
            {"test": "paired t on questions", "p": t, "ignores": ignores},
            {"test": "Wilcoxon signed rank on questions", "p": wilcoxon, "ignores": ignores},
            {"test": "sign-flip permutation on questions", "p": flips, "ignores": ignores},
        ]
    if n_seeds > 1:
        means = a.mean(1), b.mean(1)
        p = (
            math.nan
            if means[0].std() + means[1].std() == 0
            else scipy_stats.ttest_ind(*means, equal_var=False).pvalue
        )
        ignores = "ignores that other questions would differ, and that seeds are paired"
        rows.append({"test": "Welch t on seed means", "p": p, "ignores": ignores})
        least = 2 / math.comb(len(a) + len(b), len(a))
        if least > ALPHA:
            why = f"not computed: with {len(a)} against {len(b)} seeds its p cannot be below {least:.2g}"
            rows.append({"test": "exact permutation of seeds", "p": math.nan, "ignores": why})
    return [row | {"p": float(row["p"])} for row in rows]


def needed(
    found: Difference, gap: float, equivalent: bool = False
) -> tuple[int | None, int | None]:
    """(seeds at these questions, questions at these seeds) at which a true value `gap` away from a
    limit is found with POWER, roughly; None: no number is enough. `equivalent`: both limits of an
    equivalence test are `gap` away.

    From the variances that `found` estimates, which are themselves rough with three seeds; normal
    quantiles, and room for the 95 % interval to agree with the test.
    """
    if math.isnan(found.p()) or not gap > 0:
        return None, None
    question, seed, residual = found.variances
    power = (1 + POWER) / 2 if equivalent else POWER  # an equivalence test can fail on either side
    target = (gap / (scipy_stats.norm.ppf(1 - ALPHA / 2) + scipy_stats.norm.ppf(power))) ** 2

    def least(fixed: float, per_unit: float) -> int | None:  # fixed + per_unit / n <= target
        if fixed == 0 and per_unit == 0:
            return 1
        return math.ceil(per_unit / (target - fixed)) if target > fixed else None

    q, s = found.n_questions, found.n_seeds
    seeds = least(question / q, seed + residual / q) if found.seeds != "one seed" else None
    return seeds, least(seed / s, question + residual / s)


def holm(p_values: list[float]) -> list[float]:
    """Holm's (1979) adjusted p-values: the family-wise error rate is held. NaN stays NaN and counts
    in no family.
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[i] = largest
    return adjusted


def benjamini_hochberg(p_values: list[float]) -> list[float]:
    """False-discovery-rate adjusted p-values (SciPy's); NaN stays NaN."""
    known = [i for i, p in enumerate(p_values) if not math.isnan(p)]
    adjusted = [math.nan] * len(p_values)
    if known:
        for i, p in zip(known, scipy_stats.false_discovery_control([p_values[i] for i in known])):
            adjusted[i] = float(p)
    return adjusted


def exact_interval(count: int, total: int) -> tuple[float, float]:
    """Clopper and Pearson's interval of a rate; (0, 1) for nothing observed."""
    if total == 0:
        return 0.0, 1.0
    found = scipy_stats.binomtest(count, total).proportion_ci(1 - ALPHA, method="exact")
    return float(found.low), float(found.high)


def mcnemar(a: np.ndarray, b: np.ndarray) -> dict:
    """Exact McNemar test of (Q,) right or wrong (1, 0) on the same pairs. A tie (0.5) is left out,
    and counted.
    """
    tie = (a == 0.5) | (b == 0.5)
    only_a, only_b = (int(((a == x) & (b == 1 - x))[~tie].sum()) for x in (1, 0))
    p = float(scipy_stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return {"only_a": only_a, "only_b": only_b, "ties": int(tie.sum()), "p": p}


class BetaSpread(NamedTuple):
    """How much the score of a loss moves with beta. `variance` is `raw` less what seeds and
    questions put there.
    """

    raw: float
    noise: float
    variance: float
    draws: np.ndarray  # (draws,) of `variance`


def beta_spread(
    tables: list[np.ndarray], same_seeds: bool, draws: int = DRAWS, stream: int = 0
) -> BetaSpread:
    """Variance of the true means over B betas, from their (S, Q) tables, one a beta.

    raw: sample variance of the B means. noise: the variance that such means have around the true
    ones, from the questions' interaction with beta, the seeds and the rest; what all betas have in
    common drops out, the questions' difficulty and, if `same_seeds` (rows in the same order of
    seeds), a seed's level. Bootstrap: questions alike for all betas, seeds too if they are the
    same; the draws are centred on `raw` (resampling adds the noise a second time) and less `noise`.
    """
    n_betas, n_questions = len(tables), tables[0].shape[1]
    means = np.array([table.mean() for table in tables])
    crossed = np.array([table.mean(0) for table in tables])  # (B, Q)
    crossed = crossed - crossed.mean(0) - crossed.mean(1, keepdims=True) + crossed.mean()
    noise = (crossed**2).sum() / ((n_betas - 1) * max(1, n_questions - 1) * n_questions)
    own = tables
    if same_seeds:
        common = np.mean(tables, axis=0)
        own = [(table - common) * math.sqrt(n_betas / (n_betas - 1)) for table in tables]
    squares = [(mean_squares(table), len(table)) for table in own if len(table) > 1]
    noise += max(
        0.0,
        sum((square.seed - square.residual) / (n_questions * n) for square, n in squares) / n_betas,
    )
    streams = [stream if same_seeds else stream + beta for beta in range(n_betas)]
    boot = np.stack([bootstrap(table, draws, one) for table, one in zip(tables, streams)])
    raw, spread = float(means.var(ddof=1)), boot.var(axis=0, ddof=1)
    return BetaSpread(raw, float(noise), raw - float(noise), spread - spread.mean() + raw - noise)


def variance_ratio(a: BetaSpread, b: BetaSpread) -> dict:
    """a's variance over beta divided by b's, with its bootstrap interval; undefined (None) unless
    both are positive.

    A draw in which b's variance is not positive makes the ratio infinite: an infinite upper end
    says that the data give none.
    """
    if a.variance <= 0 or b.variance <= 0:
        return {"ratio": None, "low": None, "high": None}
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(b.draws > 0, np.maximum(a.draws, 0) / b.draws, np.inf)
    low, high = percentiles(ratios)
    return {"ratio": a.variance / b.variance, "low": low, "high": high}


def brown_forsythe(a: list[float], b: list[float]) -> float:
    """p-value of equal spread of two losses' beta means (Levene's test about the median); NaN below
    3 betas.
    """
    if min(len(a), len(b)) < 3 or np.ptp(a) == np.ptp(b) == 0:
        return math.nan
    return float(scipy_stats.levene(a, b, center="median").pvalue)


def expected_best(selected_by: list[float], scores: list[float], budget: int) -> float:
    """Expected score of the cell with the highest `selected_by` among `budget` cells drawn at
    random, no cell twice.

    Dodge et al. (2019) with the finite grid itself: cell i is the best of k of n with probability
    C(r_i, k-1) / C(n, k) where r_i cells rank below it. With `scores` as its own selector it is the
    expected maximum.
    """
    order = sorted(range(len(scores)), key=lambda i: (selected_by[i], i))
    total = math.comb(len(scores), budget)
    return sum(math.comb(rank, budget - 1) / total * scores[i] for rank, i in enumerate(order))


def variance_parts(cube: np.ndarray) -> dict[str, float]:
    """Variance components of (C cells, S seeds, Q questions) scores by the method of moments; every
    cell has the same seeds, in the same order.

    question: difficulty; beta and tau: the cell; seed: what a seed's level has in common over
    cells; the two crossed with the cell; residual: the rest, and the judge. Estimates below 0 are
    reported as 0. Needs two of each.
    """
    n_cells, n_seeds, n_questions = cube.shape
    mean, cell, seed, question = (
        cube.mean(),
        cube.mean((1, 2)),
        cube.mean((0, 2)),
        cube.mean((0, 1)),
    )
    run, both = cube.mean(2), cube.mean(1)  # (C, S), (C, Q)
    cell_seed = run - cell[:, None] - seed + mean
    cell_question = both - cell[:, None] - question + mean
    rest = cube - both[:, None] - run[:, :, None] + cell[:, None, None]
    ms_cell = n_seeds * n_questions * ((cell - mean) ** 2).sum() / (n_cells - 1)
    ms_seed = n_cells * n_questions * ((seed - mean) ** 2).sum() / (n_seeds - 1)
    ms_question = n_cells * n_seeds * ((question - mean) ** 2).sum() / (n_questions - 1)
    ms_cell_seed = n_questions * (cell_seed**2).sum() / ((n_cells - 1) * (n_seeds - 1))
    ms_cell_question = n_seeds * (cell_question**2).sum() / ((n_cells - 1) * (n_questions - 1))
    ms_rest = (rest**2).sum() / (n_cells * (n_seeds - 1) * (n_questions - 1))
    parts = {
        "question": (ms_question - ms_cell_question) / (n_cells * n_seeds),
        "beta and tau": (ms_cell - ms_cell_question - ms_cell_seed + ms_rest)
        / (n_seeds * n_questions),
        "seed": (ms_seed - ms_cell_seed) / (n_cells * n_questions),
        "seed x beta and tau": (ms_cell_seed - ms_rest) / n_questions,
        "question x beta and tau": (ms_cell_question - ms_rest) / n_seeds,
        "residual": ms_rest,
    }
    return {name: max(0.0, float(value)) for name, value in parts.items()}


def retest(ratings: list[list[float]]) -> dict | None:
    """Reliability of a judge that rated each of n items k >= 2 times: ICC(1,1) (Shrout and Fleiss
    1979), the SD of one rating around its item's mean, and how many items got the same rating each
    time. None without repeats.
    """
    ratings = [item for item in ratings if len(item) > 1]
    if len(ratings) < 2:
        return None
    within_df = sum(len(item) - 1 for item in ratings)
    within = sum(((np.array(item) - np.mean(item)) ** 2).sum() for item in ratings) / within_df
    n_total, n_items = sum(map(len, ratings)), len(ratings)
    grand = sum(map(sum, ratings)) / n_total
    between = sum(len(item) * (np.mean(item) - grand) ** 2 for item in ratings) / (n_items - 1)
    k = (n_total - sum(len(item) ** 2 for item in ratings) / n_total) / (n_items - 1)
    total = between + (k - 1) * within
    return {
        "n_items": n_items,
        "icc": float((between - within) / total) if total > 0 else None,
        "sd": math.sqrt(within),
        "identical": sum(len(set(item)) == 1 for item in ratings) / n_items,
    }


def length_correlation(scores: np.ndarray, lengths: np.ndarray, groups: list) -> dict | None:
    """Spearman correlation of score and answer length within groups (a question's turn): do longer
    answers of the same question score higher? (n,) each; both are centred on their group. None
    without variation.
    """
    by_group: dict = {}
    for i, group in enumerate(groups):
        by_group.setdefault(group, []).append(i)
    centred = [np.array(values, dtype=float) for values in (scores, lengths)]
    for rows in by_group.values():
        for values in centred:
            values[rows] -= values[rows].mean()
    if len(scores) < 3 or any(values.std() == 0 for values in centred):
        return None
    return {"n": len(scores), "spearman": float(scipy_stats.spearmanr(*centred).statistic)}
