"""AlpacaEval's win rate: the mean of preferences, with its standard error.

A preference is a number from 1 (the baseline wins) to 2 (the run wins). `by_question` takes them
from the rows of judgements.csv, `win_rate` summarises them as the package alpaca_eval does.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from statistics import fmean, stdev
from typing import NamedTuple

DRAW = 1.5


class WinRate(NamedTuple):
    """Of n questions that have a preference, in percent."""

    n: int
    n_wins: int
    n_draws: int
    win_rate: float | None = None  # None without a question
    standard_error: float | None = None  # over questions; None below two
    discrete: float | None = None  # a preference above 1.5 counts as a win, 1.5 as half of one


def win_rate(preferences: Iterable[float]) -> WinRate:
    """The win rate of preferences, one a question.

    Old files of the package write a draw as 0. Raises ValueError for a number that is no
    preference. Source: alpaca_eval 0.6.6, metrics/winrate.py.
    """
    y = [checked(value) - 1 for value in preferences]
    wins, draws = sum(value > 0.5 for value in y), sum(value == 0.5 for value in y)
    counts = WinRate(n=len(y), n_wins=wins, n_draws=draws)
    if not y:
        return counts
    return counts._replace(
        win_rate=100 * fmean(y),
        standard_error=100 * stdev(y) / math.sqrt(len(y)) if len(y) > 1 else None,
        discrete=100 * (wins + draws / 2) / len(y),
    )


def checked(value: float) -> float:
    """A preference, with the old mark of a draw replaced."""
    value = DRAW if value == 0 else value
    if not 1 <= value <= 2:  # NaN too
        raise ValueError(f"preference {value} is not from 1 to 2")
    return value


def by_question(rows: Iterable[dict]) -> dict[int, float]:
    """question_id -> preference, from one run's rows of one judge in judgements.csv.

    Choices and repeats are averaged, and so are the orders of a question that was asked in both
    (--preference both): there the mean over the answers shown first and second is without position
    bias only if either has a verdict, so an answer that lacks one of them is left out. Rows without
    a verdict are needed to see that.
    """
    # 1) Preferences of each answer by order, and the orders in which it was asked.
    found: dict[tuple, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        orders = found[row["question_id"], row["choice"]]
        given = orders[row["order"]]
        if row["status"] == "ok" and row["preference"] is not None:
            given.append(checked(row["preference"]))
    # 2) The mean of each answer, then of each question.
    of_question: dict[int, list[float]] = defaultdict(list)
    for (question_id, _), orders in found.items():
        if all(orders.values()):
            of_question[question_id].append(fmean(map(fmean, orders.values())))
    return {question_id: fmean(values) for question_id, values in of_question.items()}
