"""Rules for a test over questions and seeds: how often each errs, what it and any rule can find.

    python bench/rules_of_tests.py               half a minute

The estimate of a difference is normal; its variance has a part A of the questions, which 80
questions measure well, and a part of the seeds, for which two or three seeds give a mean square V
that scatters as chi-square does. `chance` is what V would be if seeds did not matter. A rule turns
A, V and chance into the critical value of the estimate. Rates are integrals over V, without
simulation; A is taken as known. The ratings are those of calibration.py's normal world.

The bound: a linear programme over all rules that grow with the estimate, however odd, finds the
most that any of them finds at seed SD 0.1 and a true difference of 0.5 while it errs in at most
5 % of studies at every seed SD.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import special
from scipy import stats as scipy_stats
from scipy.optimize import linprog
from scipy.sparse import csr_matrix, eye, kron, vstack

sys.path.insert(0, str(Path(__file__).parent.parent))
from pref.analysis.stats import MeanError, quantile

QUESTIONS = 80
METHOD_VARIANCE, REST_VARIANCE = 2 * 0.8**2, 2 * 1.2**2  # of a difference of two losses
SEED_SDS = np.array([0, *np.geomspace(0.03, 8, 40)])


class Known(NamedTuple):
    """What a study has measured; variances are those of the estimate."""

    a: float
    v: np.ndarray
    chance: float
    seeds_df: int

    def excess(self) -> np.ndarray:
        return np.maximum(0.0, self.v - self.chance)

    def widened(self, df_share: float) -> np.ndarray:
        """E max(0, V - chance * Y), Y ~ chi2(df * share) / (df * share)."""
        df = self.seeds_df * df_share
        scaled = df * self.v / self.chance
        upper = self.chance * special.chdtr(df + 2, scaled)
        return self.v * special.chdtr(df, scaled) - upper


def satterthwaite(known: Known, alpha: float) -> np.ndarray:
    total = np.maximum(1e-12, known.a + known.v - known.chance)
    parts = known.a**2 / 79 + known.v**2 / known.seeds_df + known.chance**2 / (79 * known.seeds_df)
    df = np.maximum(1.0, total**2 / parts)
    return quantile(df, alpha) * np.sqrt(known.a + known.excess())


def cochran_cox(known: Known, alpha: float) -> np.ndarray:
    weights = known.a, known.excess()
    mixed = quantile(79, alpha) * weights[0] + quantile(known.seeds_df, alpha) * weights[1]
    return mixed / np.sqrt(sum(weights))


def squares(seed_variance: Callable[[Known], np.ndarray]) -> Callable:
    def rule(known: Known, alpha: float) -> np.ndarray:
        seeds = quantile(known.seeds_df, alpha) ** 2 * seed_variance(known)
        return np.sqrt(quantile(79, alpha) ** 2 * known.a + seeds)

    return rule


def banerjee(known: Known, alpha: float) -> np.ndarray:
    """Nothing subtracted from V: chance's part is taken from the questions' instead."""
    seeds = quantile(known.seeds_df, alpha) ** 2 * known.v
    return np.sqrt(quantile(79, alpha) ** 2 * (known.a - known.chance) + seeds)


def fiducial(known: Known, alpha: float) -> np.ndarray:
    """Generalised p-value: a normal test, averaged over the variances that V leaves possible."""
    logs = np.arange(-45, 5, 0.25)
    weights = np.exp(known.seeds_df / 2 * logs - np.exp(logs) / 2)
    weights /= weights.sum()
    drawn = known.v[:, None] * known.seeds_df / np.exp(logs) - known.chance
    se = np.sqrt(known.a + np.maximum(0.0, drawn))
    low, high = np.zeros(len(known.v)), np.full(len(known.v), 1e6)
    for _ in range(60):
        middle = (low + high) / 2
        too_low = (2 * special.ndtr(-middle[:, None] / se)) @ weights > alpha
        low, high = np.where(too_low, middle, low), np.where(too_low, high, middle)
    return high


def toolkit(known: Known, alpha: float) -> np.ndarray:
    return MeanError(known.a, 79, known.v, known.seeds_df, known.chance).half_width(alpha)


RULES = {
    "Satterthwaite (version 1.0.0)": satterthwaite,
    "Cochran and Cox": cochran_cox,
    "squares, V - chance above 0": squares(Known.excess),
    "squares, chance random with all df": squares(lambda known: known.widened(1)),
    "squares, chance random with half the df (the toolkit's)": toolkit,
    "squares, V x P(chance gives less than V)": squares(
        lambda known: (
            known.v * special.chdtr(known.seeds_df, known.seeds_df * known.v / known.chance)
        )
    ),
    "squares, nothing subtracted (Banerjee)": banerjee,
    "generalised p-value": fiducial,
}


def rate(rule: Callable, seeds: int, seed_sd: float, difference: float, alpha: float) -> float:
    """How often a rule finds a difference."""
    chance = REST_VARIANCE / (QUESTIONS * seeds)
    a, df = METHOD_VARIANCE / QUESTIONS + chance, seeds - 1
    true = 2 * seed_sd**2 / seeds
    logs = np.linspace(-30, 5, 701)
    weights = np.exp(df / 2 * logs - np.exp(logs) / 2)
    critical = rule(Known(a, (chance + true) * np.exp(logs) / df, chance, df), alpha)
    se = np.sqrt(a + true)
    found = special.ndtr((difference - critical) / se) + special.ndtr((-difference - critical) / se)
    return float(weights @ found / weights.sum())


def bound(seeds: int, alpha: float = 0.05, seed_sd: float = 0.1, difference: float = 0.5) -> float:
    """The largest power of any rule that errs in at most `alpha` at every seed SD."""
    chance = REST_VARIANCE / (QUESTIONS * seeds)
    a, df = METHOD_VARIANCE / QUESTIONS + chance, seeds - 1
    v_edges = np.array([0, *chance * np.geomspace(1e-3, 1e3, 90), np.inf])
    x_edges = np.array([*np.linspace(0, 1.2, 61), *np.geomspace(1.25, 30, 40), np.inf])

    def beyond(sd: float, effect: float) -> np.ndarray:
        """P(V in a cell, abs(estimate) beyond the start of a cell)."""
        true = 2 * sd**2 / seeds
        in_v = np.diff(scipy_stats.chi2.cdf(v_edges * df / (chance + true), df))
        se = np.sqrt(a + true)
        starts = x_edges[:-1]
        in_x = special.ndtr((effect - starts) / se) + special.ndtr((-effect - starts) / se)
        return np.outer(in_v, in_x).ravel()

    # A rule: for each V, the probability with which it begins to reject at each estimate.
    n_v, n_x = len(v_edges) - 1, len(x_edges) - 1
    errors = csr_matrix(np.array([beyond(sd, 0.0) for sd in np.geomspace(0.02, 3, 30)]))
    one_start = kron(eye(n_v), np.ones((1, n_x)))
    solution = linprog(
        -beyond(seed_sd, difference),
        A_ub=vstack([errors, one_start]),
        b_ub=[alpha] * 30 + [1] * n_v,
        bounds=(0, 1),
        method="highs",
    )
    return -solution.fun


def main() -> None:
    print("| seeds | rule | errs at most, 5 % test | 1.67 % test | 0.5 / 1.0 found, SD 0.1 |")
    print("|---|---|---|---|---|")
    for seeds in (3, 2):
        for name, rule in RULES.items():
            worst = [max(rate(rule, seeds, sd, 0, a) for sd in SEED_SDS) for a in (0.05, 0.05 / 3)]
            power = [rate(rule, seeds, 0.1, effect, 0.05) for effect in (0.5, 1.0)]
            errs = " | ".join(f"{value:.3f}" for value in worst)
            print(f"| {seeds} | {name} | {errs} | {power[0]:.2f} / {power[1]:.2f} |")
        print(f"| {seeds} | no rule of at most 5 % finds more than | | | {bound(seeds):.2f} / |")


if __name__ == "__main__":
    main()
