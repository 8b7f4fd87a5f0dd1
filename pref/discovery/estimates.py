"""What the measurements say about each candidate: its gain over DPO with an error, shrunk.

The best-looking of many candidates looks better than it is: of those that are equally good it is
the luckiest. So what the search goes by, and what a proposer is told, is not the difference that
was measured but the part of it that is to be expected again:

1. A difference to DPO is paired: same pairs, same seeds. Its standard error s is over pairs and
   seeds (stats.difference). With one seed nothing is known about others; the variance between
   seeds of the candidates that have several is then taken, if there are any.
2. The true differences are taken to be spread around 0, which is DPO, with variance tau^2. It is
   estimated by moments from the candidates that look at least as good as DPO: mean g^2 - mean s^2.
   (Over all candidates it would be the spread of the many that do harm, and hardly anything would
   be shrunk at the top. Without true differences, half of them lie above 0 and tau^2 is 0.)
3. The gain is g tau^2 / (tau^2 + s^2), with standard error s tau / sqrt(tau^2 + s^2).
4. Gains on the proxy and in training have different scales. With four or more candidates that have
   both, those on the proxy are multiplied by the slope of the one on the other, from 0 to 1.
"""

import math
from typing import NamedTuple

import numpy as np

from pref.analysis import stats
from pref.discovery import archive
from pref.discovery.archive import Entry, State

RACING = 0.2  # two-sided: an upper limit of 90 %
LEAST_FOR_SLOPE = 4
LEAST_FOR_TAU, LEAST_TAU = 10, 0.2  # below it the proxy only filters
DRAWS = 2000  # of the bootstrap interval of tau


class Gain(NamedTuple):
    """Accuracy minus DPO's, fractions."""

    difference: float  # as measured
    se: float
    gain: float  # the part of it that is to be expected again, on the scale of training
    gain_se: float
    measured: str  # "proxy" or "trained"
    seeds: int

    @property
    def rank(self) -> tuple[float, float]:
        """Higher is better. Where nothing is left after shrinking, what was measured decides."""
        return self.gain, self.difference


def gains(state: State) -> dict[str, Gain]:
    """The gain of each candidate that was measured and not found unfit, by id. DPO's is 0."""
    dpo, entries = state.dpo, list(state.entries.values())
    raw = {
        "proxy": {e.id: (e.proxy["difference"], e.proxy["se"]) for e in entries if has_proxy(e)},
        "trained": trained_differences(state),
    }
    shrunk = {kind: shrink(values) for kind, values in raw.items()}
    slope = proxy_slope(shrunk["proxy"], raw["trained"], dpo)
    found = {}
    for entry in entries:
        kind = "trained" if entry.id in raw["trained"] else "proxy"
        if entry.id not in raw[kind]:
            continue
        scale = 1.0 if kind == "trained" else slope
        gain, gain_se = (scale * value for value in shrunk[kind][entry.id])
        seeds = len(entry.runs) if kind == "trained" else entry.proxy["seeds"]
        found[entry.id] = Gain(*raw[kind][entry.id], gain, gain_se, kind, seeds)
    return found


def has_proxy(entry: Entry) -> bool:
    """Whether it has a difference on the proxy, and did not fail there."""
    return entry.proxy is not None and entry.reached_proxy


def shrink(values: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """(gain, its standard error) by id, from (difference, standard error)."""
    tau2 = spread(list(values.values()))
    found = {}
    for id, (difference, se) in values.items():
        factor = tau2 / (tau2 + se**2) if tau2 else 0.0
        found[id] = difference * factor, se * math.sqrt(factor)
    return found


def spread(values: list[tuple[float, float]]) -> float:
    """tau^2: the variance of the true differences around 0, from those that were measured as 0 or
    more. DPO itself (0, with standard error 0) says nothing about it.
    """
    above = [(difference, se) for difference, se in values if difference >= 0 and se > 0]
    if not above:
        return 0.0
    squares, errors = zip(*((difference**2, se**2) for difference, se in above))
    return max(0.0, float(np.mean(squares) - np.mean(errors)))


def proxy_slope(proxy: dict, trained: dict, dpo: Entry | None) -> float:
    """How much of a gain on the proxy is one in training: regression through 0."""
    both = [id for id in trained if id in proxy and id != dpo.id]
    if len(both) < LEAST_FOR_SLOPE:
        return 1.0
    x, y = (np.array([values[id][0] for id in both]) for values in (proxy, trained))
    return float(np.clip((x * y).sum() / (x * x).sum(), 0.0, 1.0)) if (x * x).sum() else 1.0


# ---- training -----------------------------------------------------------------------------------


def values_of(run: dict) -> np.ndarray | None:
    """What a run is compared by: (pairs,) of 1, 0.5 and 0, or with a task (questions,) gaps to
    DPO's score at equal KL. None of one that diverged, or cannot be compared.
    """
    if "task" in run:
        return None if run["task"]["gaps"] is None else np.array(run["task"]["gaps"])
    return None if run["correct"] is None else archive.decode(run["correct"])


def table(entry: Entry, seeds: list[int]) -> np.ndarray:
    """(seeds, pairs or questions)."""
    return np.stack([values_of(entry.runs[seed]) for seed in seeds])


def finished_seeds(*entries: Entry) -> list[int]:
    """The seeds with which all of `entries` can be compared."""
    finished = [
        {seed for seed, run in entry.runs.items() if values_of(run) is not None}
        for entry in entries
    ]
    return sorted(set.intersection(*finished))


def compare(a: Entry, b: Entry) -> stats.Difference | None:
    """Accuracy of a minus that of b, over the pairs and the seeds that both have; None without
    any.
    """
    seeds = finished_seeds(a, b)
    return stats.difference(table(a, seeds), table(b, seeds), paired=True) if seeds else None


def trained_differences(state: State) -> dict[str, tuple[float, float]]:
    """(difference to DPO, standard error) of each candidate that was trained, by id."""
    if state.dpo is None or not state.dpo.runs:
        return {}
    compared = {
        entry.id: compare(entry, state.dpo)
        for entry in state.entries.values()
        if entry.runs and not diverged(entry)
    }
    compared = {id: one for id, one in compared.items() if one is not None}
    several = [
        one.error.seed_variance() * one.n_seeds for one in compared.values() if one.n_seeds > 1
    ]
    others = float(np.mean(several)) if several else 0.0
    found = {}
    for id, one in compared.items():
        known = one.n_seeds > 1 or id == state.dpo.id
        found[id] = one.estimate, math.sqrt(one.se**2 + (0.0 if known else others))
    return found


def diverged(entry: Entry) -> bool:
    return any(run["correct"] is None for run in entry.runs.values())


def is_behind(entry: Entry, best: Entry) -> bool:
    """Racing: whether the upper 90 % limit of the difference to the present best is below 0."""
    compared = compare(entry, best)
    if compared is None or not compared.measurable():
        return False
    return compared.estimate + float(compared.error.half_width(RACING)) < 0


# ---- is the proxy any good? ---------------------------------------------------------------------


class Agreement(NamedTuple):
    """Kendall's tau between the proxy and training, with a 95 % interval; NaN where unknown."""

    tau: float
    low: float
    high: float
    candidates: int


def agreement(state: State) -> Agreement:
    """Over all candidates that have both; DPO, to which both are differences, is one of them."""
    points, rng = measured_twice(state), np.random.default_rng(0)
    if len(points) < 3:
        return Agreement(math.nan, math.nan, math.nan, len(points))
    draws = [kendall(points[rng.integers(len(points), size=len(points))]) for _ in range(DRAWS)]
    draws = [tau for tau in draws if not math.isnan(tau)]
    low, high = np.quantile(draws, [0.025, 0.975]) if draws else (math.nan, math.nan)
    return Agreement(kendall(points), float(low), float(high), len(points))


def measured_twice(state: State) -> np.ndarray:
    """(n, 2) differences to DPO on the proxy and in training."""
    trained = trained_differences(state)
    both = [
        (entry.proxy["difference"], trained[entry.id][0])
        for entry in state.entries.values()
        if entry.id in trained and entry.proxy is not None
    ]
    return np.array(both).reshape(-1, 2)


def kendall(points: np.ndarray) -> float:
    """Kendall's tau-b of points (n, 2); NaN where one of the two does not vary. As SciPy's, which
    takes a hundred times as long for a few points, and there are thousands of draws.
    """
    x, y = (np.sign(column[:, None] - column) for column in points.T)
    size = math.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / size) if size else math.nan


def proxy_ranks(state: State) -> bool:
    """Whether candidates are promoted by their rank on the proxy: not where training has shown that
    the rank says next to nothing.
    """
    points = measured_twice(state)
    return len(points) < LEAST_FOR_TAU or not kendall(points) < LEAST_TAU
