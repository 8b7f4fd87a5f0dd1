"""Arena-Hard's win rate and its style-controlled rate, each with an interval over questions.

A question is judged in two games: the run's answer is shown as A in one, as B in the other. Labels
here are from the run's side: "A>>B" means that the run's answer is much better, wherever it was
shown (`as_game` turns them). A slight win, a slight loss and a tie (half a win) count as one row, a
strong win or loss as three.

    win rate         mean of the rows; with one baseline, version 0.1's Bradley-Terry fit is that
    style control    sigma of the run's coefficient in a logistic regression on all runs' rows, with
                     the differences in length and markdown as further columns

What is sampled are questions: a question's two games and the copies of a strong win are not
independent. Each score therefore comes with a value per question (`ArenaScore.values`), whose mean
is the score and whose standard deviation over the root of their number is its standard error. They
are pseudo-values of a ratio, or the influence of a question on a fit: every statistic for means of
questions applies to them, paired differences between runs too.

A judge that goes by position alone gives every run 50 with a standard error of 0: look at
`ArenaScore.disagree` beside the score.

All functions take games against one baseline. Version 2.0 has two, by category: each is a score of
its own, since a win against another opponent is another quantity. A run as baseline is one for all
questions.
"""

import json
from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import NamedTuple

import numpy as np
from scipy import special

from pref.analysis import stats
from pref.files.verdict_labels import LABELS, from_run_side

LENGTH, MARKDOWN = ("chars",), ("headers", "lists", "bold")  # keys of the column `shape`
STYLE = LENGTH + MARKDOWN

MEAN, EQUAL = "mean", "equal"  # the style at which runs are compared, see style_control
# Why there are no style-controlled scores.
NO_VERDICT = "no verdicts"
NO_SHAPE = "judgements without the shape of their answers; rerun judge.py to write it"
NOT_IDENTIFIED = "the answers of each run have a style of their own: runs and style are the same"
SEPARATED = "too few verdicts: style alone, or style and run, tell every win from every loss"

MAX_STEPS = 25  # of Newton's method, which needs about six; without an optimum it does not end
TOLERANCE = 1e-9  # of its last step
NULL = 1e-12  # eigenvalues of the Hessian below this share of the largest are 0


class Game(NamedTuple):
    """One judgement of an answer against the baseline's."""

    question: Hashable
    order: str  # which side the run's answer was shown on: "1" or "2"
    label: str | None  # from the run's side, a key of LABELS; None without a verdict
    run_shape: dict[str, int] | None = None  # by the keys in STYLE
    baseline_shape: dict[str, int] | None = None


class ArenaScore(NamedTuple):
    """A score in percent, and its standard error over questions."""

    score: float
    se: float | None  # None of a single question
    values: dict[Hashable, float]  # by question, in percent: their mean is the score
    n_rows: int  # a strong win counts three times
    left_out: int  # questions that were judged and do not count
    disagree: int  # questions whose two games were won by different answers: by position
    n_pairs: int  # questions with a verdict in both games

    @property
    def by_position(self) -> float | None:
        """Percent of the questions with two verdicts that were decided by position."""
        return 100 * self.disagree / self.n_pairs if self.n_pairs else None


class StyleControl(NamedTuple):
    """Style-controlled scores of all runs, from one fit."""

    scores: dict[str, ArenaScore]  # by run
    coefficients: dict[str, float]  # by feature, of the standardised difference run - baseline
    reason: str = ""  # why there are no scores, else ""


def as_game(row: dict) -> Game:
    """A row of judgements.csv (`judgements.read_judgements`) as a game."""
    label = row["label"] if row["status"] == "ok" else None
    shape = json.loads(row["shape"]) if row["shape"] else {}
    return Game(
        question=row["question_id"],
        order=row["order"],
        label=from_run_side(label, row["order"]) if label else None,
        run_shape=shape.get("run"),
        baseline_shape=shape.get("baseline"),
    )


# ---- win rate ------------------------------------------------------------------------------------


def win_rate(games: Iterable[Game], both_games: bool = True) -> ArenaScore | None:
    """Mean of the rows of one run's games; None if no game counts.

    both_games: a question counts only if each of its games has a verdict, as in version 2.0; False:
    a game without a verdict is left out alone, as in version 0.1.

    The value of question i, with s its summed score and c its rows, of n questions and score r, is
    r + n (s_i - r c_i) / sum c: the ratio's linearisation, which a jackknife approaches.
    """
    games = list(games)
    counted = counted_games(games, both_games)
    if not counted:
        return None
    questions = list(dict.fromkeys(game.question for game in counted))
    place = {question: i for i, question in enumerate(questions)}
    index = np.array([place[game.question] for game in counted])  # (G,)
    score, rows = np.array([LABELS[game.label] for game in counted]).T  # (G,) each
    total = np.bincount(index, score * rows)  # (Q,)
    count = np.bincount(index, rows)  # (Q,)
    rate = total.sum() / count.sum()
    values = rate + len(questions) * (total - rate * count) / count.sum()
    return as_score(rate, dict(zip(questions, values)), games, counted)


def counted_games(games: list[Game], both_games: bool) -> list[Game]:
    """The games that count, see win_rate. Raises KeyError for a label that is not in LABELS."""
    if unknown := {game.label for game in games} - LABELS.keys() - {None}:
        raise KeyError(f"not a label from the run's side: {sorted(unknown)}")
    orders, failed = defaultdict(set), set()
    for game in games:
        orders[game.question].add(game.order)
        if game.label is None:
            failed.add(game.question)
    judged = [game for game in games if game.label is not None]
    if not both_games:
        return judged
    return [g for g in judged if g.question not in failed and len(orders[g.question]) == 2]


def as_score(
    rate: float, values: dict[Hashable, float], games: list[Game], counted: list[Game]
) -> ArenaScore:
    """The share `rate`, and the share of each question, as an ArenaScore in percent."""
    percent = {question: 100 * float(value) for question, value in values.items()}
    outcomes, orders = defaultdict(set), defaultdict(set)
    for game in counted:
        outcomes[game.question].add(LABELS[game.label].score)
        orders[game.question].add(game.order)
    return ArenaScore(
        score=100 * float(rate),
        se=stats.standard_error(list(percent.values())),
        values=percent,
        n_rows=sum(LABELS[game.label].rows for game in counted),
        left_out=len({game.question for game in games}) - len(outcomes),
        disagree=sum({0.0, 1.0} <= scores for scores in outcomes.values()),
        n_pairs=sum(len(shown) == 2 for shown in orders.values()),
    )


# ---- style control -------------------------------------------------------------------------------


class Rows(NamedTuple):
    """The games that count, of all runs, as arrays of G games."""

    questions: list[Hashable]  # (Q,)
    question: np.ndarray  # (G,) index into questions
    run: np.ndarray  # (G,) index of the run
    y: np.ndarray  # (G,) 0, 0.5 or 1
    weight: np.ndarray  # (G,) 1 or 3
    style: np.ndarray  # (G, F) standardised differences
    no_difference: np.ndarray  # (F,) where a difference of 0 lies on the standardised scale


class Fit(NamedTuple):
    """A logistic regression at its optimum."""

    w: np.ndarray  # (K,) coefficients
    inverse: np.ndarray  # (K, K) of the Hessian; a pseudo-inverse where columns coincide
    gradients: np.ndarray  # (G, K) of each game's loss; their sum is 0


def style_control(
    games_by_run: dict[str, Iterable[Game]],
    both_games: bool = True,
    features: tuple[str, ...] = STYLE,
    at: str = MEAN,
) -> StyleControl:
    """Scores of all runs with the style of their answers held constant.

    games_by_run: the games of each run, all against one baseline. both_games: see win_rate.
    features: STYLE, or LENGTH or MARKDOWN alone. at: the difference in style between run and
    baseline at which scores are given. MEAN is arena-hard-auto's, the mean over all rows of the
    fit: it depends on which runs are in it, and a single run is compared at its own style. EQUAL is
    no difference at all, as in a length-controlled win rate: what remains of a run that wins by its
    style alone is 50. Differences between runs are the same in log-odds.

    A run that wins (or loses) every game has no finite coefficient: it scores 100 (or 0) and is no
    part of the fit. The values of a run are those of all questions in the fit, because each has an
    influence on the style's coefficients.
    """
    runs = {name: list(games) for name, games in games_by_run.items()}
    counted = {name: counted_games(games, both_games) for name, games in runs.items()}
    names = [name for name, games in counted.items() if games]
    # 1) What cannot be fitted, with its reason.
    if not names:
        return StyleControl({}, {}, NO_VERDICT)
    if any(None in (g.run_shape, g.baseline_shape) for games in counted.values() for g in games):
        return StyleControl({}, {}, NO_SHAPE)
    # 2) Runs without a finite coefficient: all of their rows are 1, or all are 0.
    rows = as_rows([counted[name] for name in names], features)
    only = {i: set(rows.y[rows.run == i]) for i in range(len(names))}
    free = [i for i, outcomes in only.items() if outcomes not in ({0.0}, {1.0})]
    # 3) One fit of all others.
    fit, reason = fit_runs(rows, free)
    if reason:
        return StyleControl({}, {}, reason)
    # 4) Each run's score, with a value for each question.
    gradients = sum_by_question(rows, fit.gradients)  # (Q, K)
    scores = {}
    for i, name in enumerate(names):
        if i in free:
            rate, values = controlled(rows, fit, gradients, free.index(i), at)
        else:
            (rate,) = only[i]
            values = np.full(len(rows.questions), rate)
        by_question = dict(zip(rows.questions, values))
        scores[name] = as_score(rate, by_question, runs[name], counted[name])
    return StyleControl(scores, dict(zip(features, fit.w[len(free) :].tolist())))


def as_rows(games: list[list[Game]], features: tuple[str, ...]) -> Rows:
    """The games of R runs as arrays. Features are standardised over all rows, with n - 1; one that
    is the same in all rows becomes 0.
    """
    flat = [game for of_run in games for game in of_run]
    questions = list(dict.fromkeys(game.question for game in flat))
    place = {question: i for i, question in enumerate(questions)}
    y, weight = np.array([LABELS[game.label] for game in flat]).T
    style = np.array([differences(g.run_shape, g.baseline_shape, features) for g in flat])  # (G, F)
    mean = weight @ style / weight.sum()
    variance = weight @ (style - mean) ** 2 / max(1.0, weight.sum() - 1)
    varies = np.ptp(style, axis=0) > 0
    scale = np.where(varies, np.sqrt(variance), np.inf)
    return Rows(
        questions=questions,
        question=np.array([place[game.question] for game in flat]),
        run=np.repeat(np.arange(len(games)), [len(of_run) for of_run in games]),
        y=y,
        weight=weight,
        style=(style - mean) / scale,
        no_difference=-mean / scale,
    )


def differences(run: dict, baseline: dict, features: tuple[str, ...]) -> list[float]:
    """The features of one game, run minus baseline: length relative to both lengths, and of each
    kind of markdown its density, relative to both and 1.
    """

    def density(shape: dict, name: str) -> float:
        return shape[name] / (shape["chars"] + 1)

    both = run["chars"] + baseline["chars"]
    length = (run["chars"] - baseline["chars"]) / both if both else 0.0
    pairs = {name: (density(run, name), density(baseline, name)) for name in MARKDOWN}
    markdown = {name: (a - b) / (a + b + 1) for name, (a, b) in pairs.items()}
    return [{"chars": length, **markdown}[name] for name in features]


def fit_runs(rows: Rows, free: list[int]) -> tuple[Fit | None, str]:
    """The fit of the runs in `free`: their coefficients, then those of the style; and "", or the
    reason why there is none.
    """
    taken = np.isin(rows.run, free)  # (G,)
    dummies = rows.run[:, None] == np.array(free, dtype=int)  # (G, R)
    design = np.hstack([dummies, rows.style * taken[:, None]])  # (G, K), K = R + F
    if not free:
        nothing = np.zeros(design.shape[1])
        return Fit(nothing, np.diag(nothing), np.zeros_like(design)), ""
    rank = np.linalg.matrix_rank
    if rank(design) < len(free) + rank(design[:, len(free) :]):
        return None, NOT_IDENTIFIED
    fit = fit_logistic(design, rows.y, rows.weight * taken)
    return fit, "" if fit else SEPARATED


def fit_logistic(design: np.ndarray, y: np.ndarray, weight: np.ndarray) -> Fit | None:
    """argmin over w of sum_i weight_i (softplus(x_i w) - y_i x_i w), by Newton's method; None if
    there is no minimum.

    design: (G, K) with rows x_i; y, weight: (G,).
    """

    def loss(w: np.ndarray) -> float:
        logits = design @ w
        return float(weight @ (np.logaddexp(0, logits) - y * logits))

    w = np.zeros(design.shape[1])
    for _ in range(MAX_STEPS):
        p = special.expit(design @ w)
        gradients = (weight * (p - y))[:, None] * design  # (G, K)
        hessian = (design.T * (weight * p * (1 - p))) @ design
        inverse = np.linalg.pinv(hessian, rcond=NULL, hermitian=True)
        step = inverse @ gradients.sum(0)
        if np.abs(step).max() < TOLERANCE:
            return Fit(w, inverse, gradients)
        # Far from the minimum a full step may overshoot: it is halved until the loss falls.
        while loss(w - step) > loss(w) and np.abs(step).max() > TOLERANCE:
            step = step / 2
        w = w - step
    return None


def sum_by_question(rows: Rows, values: np.ndarray) -> np.ndarray:
    """(G, K) values of games, summed over each question's: (Q, K)."""
    n = len(rows.questions)
    return np.stack([np.bincount(rows.question, column, n) for column in values.T], axis=1)


def controlled(
    rows: Rows, fit: Fit, gradients: np.ndarray, run: int, at: str
) -> tuple[float, np.ndarray]:
    """The score of the fit's `run`-th run, and the value of each question, (Q,), as shares.

    With v the point (the run's column 1, the style's columns s) and g_i row i of `gradients`, that
    of question i of n: score = sigma(v w), and value_i = score - n score' (g_i - mean g) inverse v.
    At MEAN, s = 0 is itself estimated: question i moves the mean of the features as well.
    """
    n, n_style = len(rows.questions), rows.style.shape[1]
    n_runs = len(fit.w) - n_style
    s = np.zeros(n_style) if at == MEAN else rows.no_difference
    point = np.concatenate([np.arange(n_runs) == run, s])  # (K,)
    rate = float(special.expit(point @ fit.w))
    slope = rate * (1 - rate)
    influence = -(gradients - gradients.mean(0)) @ (fit.inverse @ point)  # (Q,)
    if at == MEAN:
        moved = rows.weight * (rows.style @ fit.w[n_runs:]) / rows.weight.sum()  # (G,), sum 0
        influence += np.bincount(rows.question, moved, minlength=n)
    return rate, rate + n * slope * influence
