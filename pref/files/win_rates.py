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
EQUAL = "equal"  # column `reading` of two answers that are the same text


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


def preference_of(row: dict) -> float | None:
    """The preference in a row of judgements.csv; None without a verdict.

    A verdict that names a winner alone counts as 1, 1.5 (a tie) or 2.
    """
    if row["status"] != "ok":
        return None
    if row["preference"] is not None:
        return checked(row["preference"])
    if row.get("winner") is None:
        return None
    return {"tie": DRAW, row["baseline"]: 1.0}.get(row["winner"], 2.0)


def of_log_odds(x: float) -> float:
    """The preference for an answer whose log-odds of winning are x: 1 + sigmoid(x)."""
    return 1 + (1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x)))


def by_question(rows: Iterable[dict]) -> dict[int, float]:
    """question_id -> preference, from one run's rows of one judge in judgements.csv.

    The mean over turns, choices and repeats. Where answers were shown in both orders (--preference
    both), one without a verdict in either order does not count: what is left would favour a
    position. Two equal answers need no second order: nobody was asked about them.
    """
    # 1) Preferences of each answer and repeat, by order.
    judged: dict[tuple, dict[str, float | None]] = defaultdict(dict)
    equal = set()
    for row in rows:
        one = (row["question_id"], row["turn"], row["choice"], row["repeat"])
        judged[one][row["order"]] = preference_of(row)
        if row["reading"] == EQUAL:
            equal.add(one)
    n_orders = max(map(len, judged.values()), default=0)
    # 2) The mean of each over its orders, then of each question.
    of_question: dict[int, list[float]] = defaultdict(list)
    for one, orders in judged.items():
        is_complete = len(orders) == n_orders or one in equal
        if is_complete and None not in orders.values():
            question_id, *_ = one
            of_question[question_id].append(fmean(orders.values()))
    return {question_id: fmean(values) for question_id, values in sorted(of_question.items())}
