"""The length-controlled win rate of AlpacaEval 2, with a standard error over instructions.

A judge prefers longer answers. AlpacaEval's length-controlled win rate asks how often a run would
win if its answers were as long as the baseline's: a logistic regression of the judge's preference
on the difference in length and on the difficulty of the instruction, evaluated at no difference.

Source: Dubois, Galambosi, Liang and Hashimoto (2024), "Length-Controlled AlpacaEval", and the
`length_controlled_v1` of the package alpaca_eval 0.6.6. In symbols, for the run's rows i = 1...n:

    t_i = tanh(delta_i / sd(delta)),  delta_i = characters of the baseline's answer less the run's
    d_i = difficulty of the instruction, a number that comes with the benchmark
    x_i = (t_i, d_i, 1)

and two baselines that were told to be verbose or concise ("gamed") add rows x = (t, d, 0), which
hold the first two weights where they are for answers of equal quality. With y_i the preference
(0 baseline, 1 run) and s_i the weight of a row (1, and 0.1 for each row of a gamed baseline):

    w  = argmin |w|_1 + C sum s_i [softplus(x_i w) - y_i x_i w]
    LC = 100 mean sigma(w_2 d_i + w_3)

C is the best of ten in a five-fold cross-validation. Three things differ from the package:

- Difficulty is that of the row's own instruction. The package looks it up by position, so that one
  missing answer gives every later row the difficulty of another instruction.
- Which rows form a fold is the same on every computer. In the package it depends on how NumPy sorts
  equal numbers, hence on the CPU: C, and LC by up to 0.15 points. Here it is NumPy's generic order.
- The standard error is one. The package gives the spread of the predictions, which is 2 to 6 times
  smaller than how LC varies when other instructions are drawn (see `influences`).

The influence of each instruction on LC is a table of values like any other: means, differences and
intervals over instructions and seeds are those of stats.py.
"""

from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np

from pref.files import alpaca_eval
from pref.files.alpaca_eval import Gamed, GamedFile
from pref.files.alpaca_eval_download import BASELINE
from pref.files.console import UserError

PENALTIES = np.logspace(-4, 4, 10)  # the values of C that are tried
FOLDS = 5
GAMED_WEIGHT = 0.2 / 2  # of a row of one of the two gamed baselines
FIXED_C = 21.54434690031882  # where there is no cross-validation; one of PENALTIES
LEAST_P = 1e-15  # predictions are clipped to this in the score of a fold
TOLERANCE = 1e-8  # of a weight, relative to 1 or to its size; the last step squares it

OFFICIAL = "length controlled"
UNREGULARISED = "lc_unregularised"
OWN = "length controlled, own"


class CannotControl(UserError):
    """There is no length-controlled win rate of these rows; the message says why."""


class LengthControl(NamedTuple):
    """A length-controlled win rate. All but C, weights and counts are in percent."""

    lc: float
    se: float  # standard error over instructions; NaN for a single one
    influence: np.ndarray  # (n,) of each row; their mean is lc, their spread gives se
    C: float
    weights: np.ndarray  # of t, d, 1; without difficulty of t, 1
    n: int  # rows that lc is a mean over
    n_judged: int  # of these, with a preference
    label: str  # OFFICIAL, UNREGULARISED or OWN


def fit(
    y: Sequence[float],
    len_baseline: Sequence[float],
    len_run: Sequence[float],
    difficulty: Sequence[float] | None = None,
    gamed: Gamed | None = None,
) -> LengthControl:
    """The length-controlled win rate against gpt4_1106_preview.

    Parameters
    ----------
    y : (n,) array
        Preference for the run's answer, 0 to 1; NaN where there is none. Such a row is predicted,
        but not learnt from. Rows are in the order of AlpacaEval's list of instructions: which
        rows form a fold of the cross-validation depends on it.
    len_baseline, len_run : (n,) arrays
        Characters of the two answers. A row without a preference may lack them (NaN).
    difficulty : (n,) array
        Of each row's instruction.
    gamed : Gamed
        The rows of the gamed baselines. Without them the result is `lc_unregularised`: the run's
        rows alone, with a fixed C, and without difficulty if that is missing too. It is another
        number, and must not be reported as LC.

    Raises
    ------
    CannotControl
        If a number is missing or lengths do not differ.
    """
    y, delta = check_rows(y, len_baseline, len_run)
    if difficulty is None:
        if gamed is not None:
            raise CannotControl("gamed rows, but no difficulty of the run's instructions")
        return fit_alone(y, delta, [], UNREGULARISED)
    difficulty = np.asarray(difficulty, dtype=float)
    if len(difficulty) != len(y) or not np.isfinite(difficulty).all():
        raise CannotControl("an instruction without a difficulty (or one that is not finite)")
    if gamed is None:
        return fit_alone(y, delta, [difficulty], UNREGULARISED)
    if is_baseline(y, delta):
        return tie(y, n_weights=3, label=OFFICIAL)

    ones, zeros = np.ones_like(y), np.zeros_like(gamed.t)
    rows = Rows(np.column_stack([length_feature(delta), difficulty, ones]), y, ones)
    others = Rows(
        np.column_stack([gamed.t, gamed.difficulty, zeros]), gamed.y, zeros + GAMED_WEIGHT
    )
    fitted = others.judged().followed_by(rows.judged())
    return controlled(rows, fitted, choose_penalty(fitted), OFFICIAL)


def fit_own(
    y: Sequence[float], len_baseline: Sequence[float], len_run: Sequence[float]
) -> LengthControl:
    """A length-controlled win rate against any other baseline: x = (t, 1), the run's rows alone.

    Difficulty and gamed rows belong to gpt4_1106_preview and are left out. C is fixed, at a value
    that hardly penalises: a cross-validated one would set most rates near 50 to exactly 50.
    Arguments and errors as for `fit`.
    """
    y, delta = check_rows(y, len_baseline, len_run)
    return fit_alone(y, delta, [], OWN)


def fit_alone(
    y: np.ndarray, delta: np.ndarray, features: list[np.ndarray], label: str
) -> LengthControl:
    """Fit the run's rows alone, on length and `features` and with a fixed C."""
    if is_baseline(y, delta):
        return tie(y, n_weights=2 + len(features), label=label)
    ones = np.ones_like(y)
    rows = Rows(np.column_stack([length_feature(delta), *features, ones]), y, ones)
    return controlled(rows, rows.judged(), FIXED_C, label)


# ---- by question -------------------------------------------------------------------------------


class Compared(NamedTuple):
    """The judgement of one question, against the baseline."""

    y: float | None  # preference for the run, 0 to 1; None: there is none
    len_baseline: float | None  # characters; None only where y is None
    len_run: float | None


class QuestionControl(NamedTuple):
    """A length-controlled win rate, and the values of which it is the mean."""

    result: LengthControl
    values: dict[int, dict[int, float]]  # question -> 0 -> its influence, in percent


def control(
    rows: dict[int, Compared],
    baseline: str,
    gamed: GamedFile | None = None,
    regularise: bool = True,
) -> QuestionControl:
    """The length-controlled win rate of a run's judgements, by question_id and in any order.

    Parameters
    ----------
    rows : dict
        Of each question that the run was to be judged on, also if there is no preference.
    baseline : str
        Model or run that the run was compared with. For gpt4_1106_preview the result is that of
        `fit`, for any other that of `fit_own`.
    gamed : GamedFile or None
        df_gamed.csv; None where it is missing.
    regularise : bool
        False leaves the gamed rows out (`lc_unregularised`, with difficulty). They pull the effect
        of length towards that on the gamed baselines, which is stronger than on most good models:
        of two equally good runs the one with longer answers gets the lower LC, by 2 points at 1.6
        times the length (bench/lc_calibration.py). A difference between runs whose answers differ
        in length should be there without the gamed rows too.

    Raises CannotControl.
    """
    questions = sorted(rows)
    columns = [[rows[question][i] for question in questions] for i in range(3)]
    if baseline != BASELINE:
        result = fit_own(*columns)
    elif gamed is None:
        result = fit(*columns)
    else:
        by_question = {alpaca_eval.question_id(i): d for i, d in gamed.difficulty.items()}
        if unknown := [question for question in questions if question not in by_question]:
            raise CannotControl(
                f"{gamed.path} has no difficulty of {len(unknown)} questions, such as "
                f"{unknown[0]}: are these AlpacaEval's instructions?"
            )
        difficulty = [by_question[question] for question in questions]
        result = fit(*columns, difficulty, gamed.rows if regularise else None)
    values = {question: {0: float(value)} for question, value in zip(questions, result.influence)}
    return QuestionControl(result, values)


# ---- rows ----------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Rows of the regression."""

    x: np.ndarray  # (n, k)
    y: np.ndarray  # (n,); NaN without a preference
    weight: np.ndarray  # (n,)

    def __getitem__(self, chosen) -> "Rows":
        return Rows(self.x[chosen], self.y[chosen], self.weight[chosen])

    def judged(self) -> "Rows":
        return self[~np.isnan(self.y)]

    def followed_by(self, others: "Rows") -> "Rows":
        return Rows(*(np.concatenate(pair) for pair in zip(self, others)))


def check_rows(
    y: Sequence[float], len_baseline: Sequence[float], len_run: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """(y, difference in length) as arrays. Raises CannotControl if these are no rows to fit."""
    parts = (y, len_baseline, len_run)
    y, len_baseline, len_run = (np.asarray(part, dtype=float) for part in parts)
    if not len(y) == len(len_baseline) == len(len_run):
        raise CannotControl(
            f"{len(y)} preferences, {len(len_baseline)} lengths of the baseline's answers and "
            f"{len(len_run)} of the run's"
        )
    judged = y[~np.isnan(y)]
    if len(judged) < 2:
        raise CannotControl(f"{len(judged)} answers with a preference; at least two are needed")
    check_preferences(judged)
    delta = len_baseline - len_run
    if not np.isfinite(delta[~np.isnan(y)]).all():
        raise CannotControl("an answer without a length (or one that is not finite)")
    return y, delta


def check_preferences(y: np.ndarray) -> None:
    """Raise CannotControl for a preference outside of 0 to 1."""
    if not ((y >= 0) & (y <= 1)).all():
        wrong = y[~((y >= 0) & (y <= 1))][0]
        raise CannotControl(f"a preference of {wrong:g}, which is not from 0 (baseline) to 1 (run)")


def length_feature(delta: np.ndarray) -> np.ndarray:
    """tanh of the difference in length, in units of its standard deviation over all rows; 0 where
    it is not known.
    """
    known = delta[~np.isnan(delta)]
    sd = known.std(ddof=1)
    if not sd > 0:
        raise CannotControl(
            "all answers differ from the baseline's by the same number of characters: the effect "
            "of length cannot be told"
        )
    return np.nan_to_num(np.tanh(delta / sd))


def is_baseline(y: np.ndarray, delta: np.ndarray) -> bool:
    """Whether the run is the baseline itself: each answer as long as the baseline's, and a tie."""
    return bool((delta[~np.isnan(delta)] == 0).all() and (y[~np.isnan(y)] == 0.5).all())


def tie(y: np.ndarray, n_weights: int, label: str) -> LengthControl:
    """Of the baseline against itself: 50, by construction."""
    return LengthControl(
        lc=50.0,
        se=0.0,
        influence=np.full(len(y), 50.0),
        C=FIXED_C,
        weights=np.zeros(n_weights),
        n=len(y),
        n_judged=int((~np.isnan(y)).sum()),
        label=label,
    )


# ---- the fit -------------------------------------------------------------------------------------


def controlled(rows: Rows, fitted: Rows, C: float, label: str) -> LengthControl:
    """Fit the rows `fitted`, and evaluate the run's `rows` at equal lengths."""
    weights = minimise(fitted, C, np.zeros(rows.x.shape[1]))
    influence = influences(rows, fitted, C, weights)
    return LengthControl(
        lc=100 * float(at_equal_length(rows.x, weights).mean()),
        se=100 * standard_error(influence),
        influence=100 * influence,
        C=C,
        weights=weights,
        n=len(rows.y),
        n_judged=len(rows.judged().y),
        label=label,
    )


def at_equal_length(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(n,) predicted preferences if the answers of rows x were as long as the baseline's: t = 0."""
    return sigmoid(x[:, 1:] @ weights[1:])


def choose_penalty(rows: Rows) -> float:
    """The C with the best score in cross-validation; of equal scores the smaller C.

    The score of a fold is the mean over its rows of the weighted log-likelihood.
    """
    folds = fold_of_row(len(rows.y))
    scores = np.zeros((FOLDS, len(PENALTIES)))
    for fold in range(FOLDS):
        learnt, tested = rows[folds != fold], rows[folds == fold]
        weights = np.zeros(rows.x.shape[1])
        for i, C in enumerate(PENALTIES):
            weights = minimise(learnt, C, weights)
            p = np.clip(sigmoid(tested.x @ weights), LEAST_P, 1 - LEAST_P)
            likelihood = tested.y * np.log(p) + (1 - tested.y) * np.log(1 - p)
            scores[fold, i] = (tested.weight * likelihood).mean()
    return float(PENALTIES[scores.mean(0).argmax()])


def fold_of_row(n: int) -> np.ndarray:
    """(n,) the fold of each row, as scikit-learn's GroupKFold deals them if each is a group.

    It sorts the groups by their size, and all sizes are equal: the order is what the sort makes of
    ties. Of objects NumPy sorts them with the same code on every CPU.
    """
    order = np.argsort(np.full(n, 2, dtype=object))[::-1]
    folds = np.empty(n, dtype=int)
    folds[order] = np.arange(n) % FOLDS
    return folds


def influences(rows: Rows, fitted: Rows, C: float, weights: np.ndarray) -> np.ndarray:
    """(n,) pseudo-values of LC, from 0 to 1 apart from their noise: what each row contributes.

    A row counts twice: it is predicted, and it has moved the weights. To first order the weights
    move by -H^-1 g if a row with gradient g is added, with H the Hessian of the loss at its
    minimum. The penalty's own part is left out; C is held fixed. The mean is LC, and the standard
    deviation over sqrt(n) agrees with what refits over resampled instructions give.
    """
    p = sigmoid(fitted.x @ weights)
    curvature = C * fitted.weight * p * (1 - p)
    hessian = (fitted.x.T * curvature) @ fitted.x  # (k, k)

    predicted = at_equal_length(rows.x, weights)  # (n,)
    slope = (predicted * (1 - predicted))[:, None] * rows.x
    slope[:, 0] = 0.0  # of the prediction, by the weights
    judged = ~np.isnan(rows.y)
    residual = sigmoid(rows.x @ weights) - np.where(judged, rows.y, 0.0)
    gradient = C * residual[:, None] * rows.x  # (n, k)
    gradient -= gradient[judged].mean(0)
    gradient[~judged] = 0.0
    return predicted - len(predicted) * gradient @ (np.linalg.pinv(hessian) @ slope.mean(0))


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean; NaN of fewer than two values."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def cross_entropy(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(n,) softplus(z) - y z, as a sum of terms that are not negative: nothing cancels."""
    return np.log1p(np.exp(-np.abs(z))) + y * np.maximum(-z, 0) + (1 - y) * np.maximum(z, 0)


def sigmoid(z: np.ndarray) -> np.ndarray:
    tail = np.exp(-np.abs(z))  # never overflows
    return np.where(z < 0, tail, 1.0) / (1 + tail)


# ---- the solver ----------------------------------------------------------------------------------


def minimise(rows: Rows, C: float, start: np.ndarray) -> np.ndarray:
    """(k,) weights w with the least |w|_1 + C sum s [softplus(x w) - y x w].

    Proximal Newton steps (Lee, Sun and Saunders 2014): each minimises the penalty plus the loss's
    second-order expansion, and is halved until the objective falls enough. The minimum is finite
    even if the rows are separable, because the penalty grows in every direction.
    """

    def value(w: np.ndarray) -> float:
        return float(np.abs(w).sum() + C * (rows.weight @ cross_entropy(rows.x @ w, rows.y)))

    w, current = start, value(start)
    for _ in range(200):
        p = sigmoid(rows.x @ w)
        gradient = C * ((rows.weight * (p - rows.y)) @ rows.x)
        hessian = C * (rows.x.T * (rows.weight * p * (1 - p))) @ rows.x
        step = quadratic_minimum(w, gradient, hessian) - w
        if np.abs(step).max() <= TOLERANCE * max(1.0, np.abs(w).max()):
            return w + step
        # What the expansion without its quadratic term says that a full step gains.
        expected = gradient @ step + np.abs(w + step).sum() - np.abs(w).sum()
        size, rounding = 1.0, 1e-13 * abs(current)
        while (reached := value(w + size * step)) > current + 1e-4 * size * expected + rounding:
            size /= 2
        w, current = w + size * step, reached
    raise ArithmeticError(f"no minimum after 200 steps, at {w}")


def quadratic_minimum(w: np.ndarray, gradient: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """(k,) the v with the least |v|_1 + gradient (v - w) + (v - w) hessian (v - w) / 2.

    With the sign of each weight given, this is a linear system. All 3^k choices of signs are
    solved; of the solutions that have the signs they were solved for, the best is the minimum.
    """
    k = len(w)
    hessian = hessian.copy()
    # A direction without curvature gets a little: a step is then long, but finite.
    hessian.flat[:: k + 1] += 1e-10 * hessian.flat[:: k + 1] + 1e-12
    linear = hessian @ w - gradient  # (k,)
    signs, unused = sign_choices(k)
    systems = np.where(unused[:, :, None] | unused[:, None, :], np.eye(k), hessian)
    v = np.linalg.solve(systems, np.where(unused, 0.0, linear - signs)[:, :, None])[:, :, 0]
    values = np.abs(v).sum(1) + ((v @ hessian / 2 - linear) * v).sum(1)
    values[~((v * signs > 0) | unused).all(1)] = np.inf
    return v[values.argmin()]


@cache
def sign_choices(k: int) -> tuple[np.ndarray, np.ndarray]:
    """(3^k, k) every choice of a sign, -1, 0 or 1, for each of k weights; and where it is 0."""
    signs = np.array(list(product((0, 1, -1), repeat=k)), dtype=float)
    return signs, signs == 0
