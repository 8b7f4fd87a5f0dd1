"""What draws a judge away from the better answer: its position, its length, its family.

As in validation_stats.py, whose rows and intervals these are.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import special

from pref.judging.human_votes import MIRRORED, OUTCOMES, TIE, A, B, majority
from pref.judging.validation_stats import (
    AT,
    UNKNOWN,
    Estimate,
    Judged,
    Resampler,
    as_floats,
    finite,
    ratio,
    vote_counts,
)


def flips(rows: list[Judged]) -> dict:
    """Share of pairs whose two orders disagree; of these, the shares in which the judge chose what
    was shown first both times, or second both times. In the others one order was a tie.
    """
    rows = [row for row in rows if row.flipped is not None]
    known = [row for row in rows if row.flipped and row.orders]
    return {
        **share_of(rows, lambda row: row.flipped)._asdict(),
        "to_first": share_of(known, lambda row: row.orders == (A, B)),
        "to_second": share_of(known, lambda row: row.orders == (B, A)),
    }


def share_of(rows: list[Judged], is_so: Callable[[Judged], bool]) -> Estimate:
    """Share of rows for which something is so."""
    if not rows:
        return UNKNOWN
    resampler = Resampler([row.pair.question_id for row in rows])
    return resampler.share(as_floats(map(is_so, rows)), np.ones(len(rows)))


def longer_chosen(rows: list[Judged]) -> dict[str, Estimate]:
    """Share of decided pairs in which the longer answer won; equal lengths are left out.

    `humans`: by the majority of the votes. `judge`: by the verdict. `judge_against_humans`: by the
    verdict, of the pairs that both decided, differently.
    """
    names = ("humans", "judge", "judge_against_humans")
    chosen: dict[str, list[tuple[int, bool]]] = {name: [] for name in names}
    for row in rows:
        longer = A if row.lengths[0] > row.lengths[1] else B
        humans = majority(vote.outcome for vote in row.votes) if row.votes else TIE
        judge = row.verdict or TIE
        against = judge if humans == MIRRORED[judge] else TIE
        for name, outcome in zip(names, (humans, judge, against)):
            if outcome != TIE and row.lengths[0] != row.lengths[1]:
                chosen[name].append((row.pair.question_id, outcome == longer))
    found = {}
    for name, of in chosen.items():
        found[name] = UNKNOWN
        if of:
            hits = as_floats(is_longer for _, is_longer in of)
            found[name] = Resampler([q for q, _ in of]).share(hits, np.ones(len(of)))
    return found


def length_given_votes(rows: list[Judged]) -> Estimate:
    """How much longer answers draw the judge beyond what the votes say: the coefficient of
    log(length of a / length of b) in a logistic model of "the judge takes a".

    The other term is the share of the votes that a has, a tie counting half, less one half. There
    is no constant: which answer is a is a matter of the alphabet, and without a constant the
    coefficient is the same if a and b change places. Over pairs that the judge decided. None where
    the two terms tell the judge's choices without error, so that no finite coefficient fits best.
    """
    rows = [row for row in rows if row.verdict in (A, B) and row.votes]
    if not rows:
        return UNKNOWN
    counts = vote_counts(rows)
    share = (counts[:, AT] + 0.5 * counts[:, OUTCOMES.index(TIE)]) / counts.sum(1)
    lengths = np.array([[max(1, length) for length in row.lengths] for row in rows], dtype=float)
    x = np.stack([share - 0.5, np.log(lengths[:, 0] / lengths[:, 1])], axis=1)  # (P, 2)
    y = as_floats(row.verdict == A for row in rows)
    resampler = Resampler([row.pair.question_id for row in rows])
    fitted = fit_logit(x, y, np.ones((1, len(rows))))[:, 1]
    drawn = np.concatenate(
        [fit_logit(x, y, times[:, resampler.index])[:, 1] for times in np.split(resampler.times, 8)]
    )
    low, high = resampler.interval(drawn) if np.isfinite(fitted[0]) else (None, None)
    return Estimate(finite(float(fitted[0])), low, high, len(rows))


def fit_logit(x: np.ndarray, y: np.ndarray, weights: np.ndarray, steps: int = 25) -> np.ndarray:
    """Weighted logistic regressions by Newton's method, all at once.

    Parameters
    ----------
    x : (P, 2) array
    y : (P,) array of 0 and 1
    weights : (D, P) array
        One regression for each row.

    Returns
    -------
    (D, 2) array
        Coefficients; NaN for a regression that has no finite maximum.
    """
    coefficients = np.zeros((len(weights), x.shape[1]))  # (D, 2)
    products = (x[:, :, None] * x[:, None, :]).reshape(len(x), -1)  # (P, 4)
    with np.errstate(all="ignore"):
        for _ in range(steps):
            p = special.expit(coefficients @ x.T)  # (D, P)
            gradient = (weights * (y - p)) @ x  # (D, 2)
            hessian = ((weights * p * (1 - p)) @ products).reshape(-1, 2, 2)
            determinant = hessian[:, 0, 0] * hessian[:, 1, 1] - hessian[:, 0, 1] ** 2
            step = np.stack(
                [
                    hessian[:, 1, 1] * gradient[:, 0] - hessian[:, 0, 1] * gradient[:, 1],
                    hessian[:, 0, 0] * gradient[:, 1] - hessian[:, 0, 1] * gradient[:, 0],
                ],
                axis=1,
            )
            step /= determinant[:, None]
            coefficients += step
            if not (np.abs(step) > 1e-10).any():
                break
    # Where no maximum is finite, each step adds to the coefficients without an end.
    done = np.abs(step).max(1) < 1e-6
    return np.where(done[:, None], coefficients, np.nan)


# The company's names for its models, where they do not begin with the family's.
FAMILY_OF = {"chatgpt": "gpt", "davinci": "gpt", "o": "gpt", "codellama": "llama"}


def families(model: str) -> frozenset[str]:
    """The words in a model's name, one of which is its family's.

    Of a path the last part: "hf:models/Meta-Llama-3-8B" -> meta, llama, b
    """
    words = re.findall(r"[a-z]+", re.split(r"[/:]", model.lower().rstrip("/"))[-1])
    return frozenset(FAMILY_OF.get(word, word) for word in words)


def family_of(model: str) -> str:
    """The family of an answer's model: the first word of its name, "gpt-3.5-turbo" -> gpt."""
    words = re.findall(r"[a-z]+", model.lower())
    return FAMILY_OF.get(words[0], words[0]) if words else model


class OwnWin(NamedTuple):
    """A pair of which one answer is by a model of the judge's family."""

    question_id: int
    model: str
    judge: float  # 1 if the judge chose that answer, 0.5 for a tie
    humans: float  # mean of the votes


def own_family(rows: list[Judged], judge: str) -> dict | None:
    """Win share of answers by the judge's own family, in its verdicts less in the votes.

    Over pairs with a verdict, votes, and one answer of that family; a tie is half a win. None if no
    model of the judge's family is there.
    """
    words, wins = families(judge), []
    for row in rows:
        models = {A: row.pair.model_a, B: row.pair.model_b}
        own = [side for side, model in models.items() if family_of(model) in words]
        if row.verdict is None or not row.votes or len(own) != 1:
            continue
        side = own[0]
        votes = [win(vote.outcome, side) for vote in row.votes]
        mean_vote = sum(votes) / len(votes)
        wins.append(OwnWin(row.pair.question_id, models[side], win(row.verdict, side), mean_vote))
    if not wins:
        return None
    resampler = Resampler([one.question_id for one in wins])
    judge_wins = as_floats(one.judge for one in wins)
    human_wins = as_floats(one.humans for one in wins)
    ones = np.ones(len(wins))
    difference = np.stack([judge_wins - human_wins, ones], axis=1)
    return {
        "models": sorted({one.model for one in wins}),
        "judge": resampler.share(judge_wins, ones),
        "humans": resampler.share(human_wins, ones),
        "difference": resampler.estimate(difference, ratio, len(wins)),
    }


def win(outcome: str, side: str) -> float:
    return 0.5 if outcome == TIE else float(outcome == side)
