"""How well a judge's verdicts agree with human votes.

The functions take a row for each pair of answers (`Judged`) and return estimates with intervals.
Votes on one question are not independent of each other. Intervals therefore resample the questions:
each of DRAWS resamples draws as many questions as there are, with replacement, and takes all of a
question's pairs with it; the 95 % interval lies between the quantiles of the results.

A number is a function of sums over pairs, so that all resamples are one product of two matrices:
how often each question is drawn, and the sums by question. Only NumPy and SciPy; no file is read
here. What draws a judge away from the better answer (position, length, family) is in
validation_biases.py.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy import special

from pref.judging.human_votes import OUTCOMES, TIE, A, B, Pair, Vote, majority

DRAWS = 4000
SEED = 20230609
LEVEL = 0.95
MARGIN = 0.05  # of agreement: a judge this close to the humans agrees as often as they do
ALPHA = 0.05  # of the equivalence test
MOST_UNDEFINED = 0.1  # share of resamples in which a number may be undefined (0 / 0)
AT, BT = OUTCOMES.index(A), OUTCOMES.index(B)


class Judged(NamedTuple):
    """A pair of answers, the votes on it and what the judge said of it."""

    pair: Pair
    category: str
    votes: list[Vote]
    lengths: tuple[int, int]  # characters of answers a and b, all turns that were judged
    verdict: str | None  # A, TIE or B; None without a verdict
    flipped: bool | None = None  # whether the verdicts in the two orders differ; None: one order
    orders: tuple[str, str] | None = None  # the verdicts with a shown first, and with b shown first
    repeats: tuple[str | None, ...] = ()  # the verdicts of all repeats, the first one included


class Estimate(NamedTuple):
    """A number, its 95 % interval and how many observations it has. None where it is undefined."""

    estimate: float | None
    low: float | None
    high: float | None
    n: int


UNKNOWN = Estimate(None, None, None, 0)

# ---- resampling ----------------------------------------------------------------------------------


class Resampler:
    """Draws questions. parts: (P, K) arrays, one row per pair, which are summed over pairs."""

    def __init__(self, questions: list[int]):
        """questions: question_id of each of P pairs."""
        self.ids, self.index = np.unique(np.asarray(questions, dtype=int), return_inverse=True)
        n = len(self.ids)
        generator = np.random.default_rng(SEED)
        # How often each question is drawn: (DRAWS, Q)
        self.times = generator.multinomial(n, [1 / n] * n, size=DRAWS).astype(float)

    def sums(self, parts: np.ndarray) -> np.ndarray:
        """Sums by question: (P, K) -> (Q, K)."""
        sums = np.zeros((len(self.ids), parts.shape[1]))
        np.add.at(sums, self.index, parts)
        return sums

    def estimate(
        self, parts: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], n: float
    ) -> Estimate:
        """`statistic` of the sums of `parts`: it maps (..., K) to (...), NaN where undefined."""
        sums = self.sums(parts)
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(statistic(sums.sum(0)))
            drawn = statistic(self.times @ sums)
        return Estimate(finite(value), *self.interval(drawn), int(round(n)))

    def share(self, hits: np.ndarray, of: np.ndarray) -> Estimate:
        """Sum of `hits` over sum of `of`, (P,) each.

        A share of 0 or 1 has no spread to resample. Its interval is Clopper and Pearson's, with the
        number of questions as the number of observations.
        """
        found = self.estimate(np.stack([hits, of], axis=1), ratio, of.sum())
        asked = int((self.sums(of[:, None])[:, 0] > 0).sum())
        if found.estimate not in (0.0, 1.0) or asked < 2:
            return found
        reach = float(special.betaincinv(asked, 1, (1 - LEVEL) / 2))
        low, high = (reach, 1.0) if found.estimate else (0.0, 1 - reach)
        return found._replace(low=low, high=high)

    def interval(self, drawn: np.ndarray) -> tuple[float | None, float | None]:
        """The middle 95 % of resampled values; None where they do not vary, or are undefined."""
        defined = drawn[np.isfinite(drawn)]
        if len(self.ids) < 2 or len(defined) < (1 - MOST_UNDEFINED) * len(drawn):
            return None, None
        low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return (float(low), float(high)) if high > low else (None, None)


def ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def kappa(sums: np.ndarray) -> np.ndarray:
    """Cohen's kappa of tables of counts, (..., K * K), rows the one rater, columns the other.

    NaN where both raters always give the same verdict, so that chance alone would agree.
    """
    size = math.isqrt(sums.shape[-1])
    table = sums.reshape(*sums.shape[:-1], size, size)
    table = table / table.sum((-2, -1), keepdims=True)
    observed = np.trace(table, axis1=-2, axis2=-1)
    expected = (table.sum(-1) * table.sum(-2)).sum(-1)
    return np.where(expected < 1 - 1e-12, (observed - expected) / (1 - expected), np.nan)


def as_floats(values: Iterable) -> np.ndarray:
    return np.array([float(value) for value in values])


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---- agreement -----------------------------------------------------------------------------------


def vote_counts(rows: list[Judged]) -> np.ndarray:
    """Votes for a, for a tie and for b: (P, 3)."""
    counts = [[sum(v.outcome == o for v in row.votes) for o in OUTCOMES] for row in rows]
    return np.array(counts, dtype=float).reshape(len(rows), 3)


def majority_counts(rows: list[Judged]) -> np.ndarray:
    """`vote_counts`, with one vote per pair: that of the majority, a tie where there is none."""
    counts = np.zeros((len(rows), 3))
    for row, count in zip(rows, counts):
        if row.votes:
            count[OUTCOMES.index(majority(vote.outcome for vote in row.votes))] = 1
    return counts


def verdict_table(rows: list[Judged], counts: np.ndarray) -> np.ndarray:
    """For each pair, how often a vote (row) meets a verdict (column): (P, 9)."""
    table = np.zeros((len(rows), 3, 3))
    for row, votes, cell in zip(rows, counts, table):
        if row.verdict is not None:
            cell[:, OUTCOMES.index(row.verdict)] = votes
    return table.reshape(len(rows), 9)


def agreement(rows: list[Judged], counts: np.ndarray) -> dict[str, Estimate]:
    """Share of (verdict, vote) that are equal, and kappa: of all, and of those both decided."""
    if not rows:
        return dict.fromkeys(("agreement", "agreement_no_ties", "kappa", "kappa_no_ties"), UNKNOWN)
    resampler = Resampler([row.pair.question_id for row in rows])
    table = verdict_table(rows, counts)
    decided = table.reshape(-1, 3, 3)[:, [AT, BT]][:, :, [AT, BT]].reshape(-1, 4)
    found = {}
    for name, cells, size in (("", table, 3), ("_no_ties", decided, 2)):
        equal = cells[:, :: size + 1].sum(1)  # the diagonal
        found[f"agreement{name}"] = resampler.share(equal, cells.sum(1))
        found[f"kappa{name}"] = resampler.estimate(cells, kappa, cells.sum())
    return found


def ceiling(rows: list[Judged]) -> dict:
    """The judge against a human vote, and that vote against another human vote.

    On pairs with a verdict and two or more votes. Each vote counts once: with 1 or 0 for the judge,
    and with the share of the pair's other votes that are equal to it. The difference is tested by
    two one-sided t tests on the questions' means (Schuirmann 1987), with limits of +-MARGIN; its
    interval is the 90 % one, which belongs to that test.
    """
    rows = [row for row in rows if row.verdict is not None and len(row.votes) > 1]
    if not rows:
        return {"judge": UNKNOWN, "humans": UNKNOWN, "n_pairs": 0, "difference": equivalence([])}
    counts = vote_counts(rows)
    votes = counts.sum(1)
    judge = np.array([count[OUTCOMES.index(row.verdict)] for row, count in zip(rows, counts)])
    humans = (counts * (counts - 1)).sum(1) / (votes - 1)
    resampler = Resampler([row.pair.question_id for row in rows])
    by_question = resampler.sums(np.stack([judge - humans, votes], axis=1))
    return {
        "judge": resampler.share(judge, votes),
        "humans": resampler.share(humans, votes),
        "n_pairs": len(rows),
        "difference": equivalence(ratio(by_question)),
    }


def equivalence(values: np.ndarray | list[float]) -> dict:
    """Mean of independent values, its 90 % interval, and the p-value of |mean| < MARGIN.

    None for fewer than two values, or values that are all equal: nothing measures the error then.
    """
    values = np.asarray(values, dtype=float)
    n = len(values)
    found = {"estimate": float(values.mean()) if n else None, "low": None, "high": None}
    found |= {"p_equivalent": None, "margin": MARGIN, "n_questions": n}
    if n < 2 or (error := float(values.std(ddof=1)) / math.sqrt(n)) < 1e-12:
        return found
    mean = found["estimate"]
    reach = float(special.stdtrit(n - 1, 1 - ALPHA)) * error
    below = special.stdtr(n - 1, -(mean + MARGIN) / error)  # of a mean of -MARGIN or less
    above = special.stdtr(n - 1, (mean - MARGIN) / error)
    return found | {
        "low": mean - reach,
        "high": mean + reach,
        "p_equivalent": float(max(below, above)),
    }


def paper_table(rows: list[Judged]) -> dict[str, list[int]]:
    """[equal, all] by the rules of the paper's table 5: FastChat's compute_agreement.py.

    Votes of experts alone. Judge against human: each (verdict, vote). Human against human: each
    two votes on one pair. `no_ties` leaves out those in which one of the two is a tie.
    """
    counts: Counter[tuple[str, bool]] = Counter()
    for row in rows:
        votes = [vote.outcome for vote in row.votes if vote.by_expert]
        two = [(f"human_turn_{row.pair.turn}", *both) for both in combinations(votes, 2)]
        if row.verdict is not None:
            two += [(f"judge_turn_{row.pair.turn}", row.verdict, vote) for vote in votes]
        for name, first, second in two:
            counts[name, first == second] += 1
            counts[f"{name}_no_ties", first == second] += TIE not in (first, second)
    names = sorted({name for name, _ in counts})
    return {name: [counts[name, True], counts[name, True] + counts[name, False]] for name in names}


def retest(rows: list[Judged]) -> Estimate:
    """Share of pairs of repeats that gave the same verdict."""
    parts = []
    for row in rows:
        given = [verdict for verdict in row.repeats if verdict is not None]
        two = list(combinations(given, 2))
        parts.append((sum(first == second for first, second in two), len(two)))
    if not sum(of for _, of in parts):
        return UNKNOWN
    equal, of = np.array(parts, dtype=float).T
    return Resampler([row.pair.question_id for row in rows]).share(equal, of)


def share_of_ties(rows: list[Judged]) -> dict[str, Estimate]:
    """Share of ties among the verdicts, and among the votes on pairs with a verdict."""
    rows = [row for row in rows if row.verdict is not None]
    if not rows:
        return {"judge": UNKNOWN, "humans": UNKNOWN}
    resampler = Resampler([row.pair.question_id for row in rows])
    counts = vote_counts(rows)
    tied = as_floats(row.verdict == TIE for row in rows)
    return {
        "judge": resampler.share(tied, np.ones(len(rows))),
        "humans": resampler.share(counts[:, OUTCOMES.index(TIE)], counts.sum(1)),
    }


def by_group(rows: list[Judged], group: Callable[[Judged], str]) -> dict[str, dict[str, Estimate]]:
    """`agreement` with the votes, by group."""
    return {name: agreement(part, vote_counts(part)) for name, part in grouped(rows, group).items()}


def grouped(rows: list[Judged], group: Callable[[Judged], str]) -> dict[str, list[Judged]]:
    """Rows by group, in alphabetical order."""
    parts: dict[str, list[Judged]] = {}
    for row in rows:
        parts.setdefault(group(row), []).append(row)
    return dict(sorted(parts.items()))


# ---- pairs of which one answer is right ----------------------------------------------------------


def accuracy(rows: list[Judged]) -> dict[str, Estimate]:
    """How often the judge names the right answer of pairs that have one; chance is 0.5.

    `accuracy`: mean over the orders in which it was asked; a tie is half right. `right_both`: share
    of pairs with the right answer in both orders; unknown where there was one order.
    """
    rows = [row for row in rows if row.verdict is not None]
    if not rows:
        return {"accuracy": UNKNOWN, "right_both": UNKNOWN}
    resampler = Resampler([row.pair.question_id for row in rows])
    right, both = [], []
    for row in rows:
        orders = row.orders or (row.verdict,)
        label = row.votes[0].outcome
        right.append(sum(0.5 if given == TIE else given == label for given in orders) / len(orders))
        both.append(all(given == label for given in orders))
    ones = np.ones(len(rows))
    has_orders = any(row.orders for row in rows)
    return {
        "accuracy": resampler.share(as_floats(right), ones),
        "right_both": resampler.share(as_floats(both), ones) if has_orders else UNKNOWN,
    }
