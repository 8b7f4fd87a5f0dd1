"""The tests that papers usually report of the same data, each with what it ignores.

They stand beside the primary test of stats.py, which ignores neither questions nor seeds. Functions
on arrays, on top of SciPy; "table" is as in stats.py: (S, Q) scores of one cell, S seeds by Q
questions.
"""

import math
import warnings

import numpy as np
from scipy import stats as scipy_stats

from pref.analysis.stats import ALPHA, without_rounding


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
    scale = max(np.abs(a).max(), np.abs(b).max())
    by_question = without_rounding(a.mean(0) - b.mean(0), scale)  # (Q,)
    if len(by_question) > 1:
        rows += question_tests(by_question)
    if min(len(a), len(b)) > 1:
        rows += seed_tests(a, b)
    return [row | {"p": float(row["p"])} for row in rows]


def question_tests(by_question: np.ndarray) -> list[dict]:
    """Tests that take (Q,) mean differences as independent observations."""
    constant = np.ptp(by_question) == 0
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
    means = without_rounding(np.concatenate([a.mean(1), b.mean(1)]))
    means_a, means_b = means[: len(a)], means[len(a) :]
    constant = np.ptp(means_a) == np.ptp(means_b) == 0
    p = math.nan
    if not constant:
        with warnings.catch_warnings():  # of one side without spread, which Welch's t allows
            warnings.simplefilter("ignore", RuntimeWarning)
            p = scipy_stats.ttest_ind(means_a, means_b, equal_var=False).pvalue
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
