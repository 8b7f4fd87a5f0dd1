"""Numbers of one run: accuracy, margins, MT-Bench scores by judge, KL.

`run_metrics` collects what metrics.json holds. The other functions are also used where runs are
compared, so that a number has one definition.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from statistics import fmean
from typing import NamedTuple

import numpy as np

from pref.analysis import judge_identity, stats, variation
from pref.analysis.runs import ACCURACIES, TRAINING_NUMBERS, Margins, Run
from pref.files import disk, mt_bench

LENGTH_BINS = 5


def run_metrics(run: Run) -> dict:
    """What metrics.json of one run holds. Its MT-Bench scores are over all questions that this run
    was judged on.
    """
    training = {key: run.summary[key] for key in TRAINING_NUMBERS} if run.summary else None
    return {
        "run_id": run.run_id,
        **{key: run.args[key] for key in ("loss", "beta", "tau", "seed", "mode", "model")},
        "status": run.status,
        "accuracy": run_accuracy(run),
        "margins": run_margins(run),
        "length_bias": run.length_bias,
        "training": training,
        "mt_bench": [
            judge_identity.describe_judge(key, rows)
            | score_ratings(rows)
            | judge_reliability({run.run_id: rows}, {run.run_id: run.answers})
            for key, rows in sorted(run.judged.items(), key=lambda item: str(item[0]))
        ],
        "kl_to_base": run.kl,
    }


# ---- validation pairs ---------------------------------------------------------------------------


def ranked_right(margins: Margins | None) -> float:
    """1 if rho > 0, 0.5 for a tie, 0 otherwise; a pair with a non-finite log-probability is wrong,
    as in training.
    """
    return 0.5 * ((margins.rho > 0) + (margins.rho >= 0)) if margins else 0.0


def accuracy_values(run: Run) -> dict:
    """pair id -> 0 -> whether the pair is ranked correctly at the best evaluation, as `Values`
    hold it.
    """
    return {pair: {0: ranked_right(margins)} for pair, margins in run.best_val.items()}


def run_accuracy(run: Run) -> dict | None:
    """Validation accuracies of a run that ended; the standard error is over pairs, at the best
    evaluation.
    """
    if run.summary is None:
        return None
    hits = [ranked_right(margins) for margins in run.best_val.values()]
    accuracy = {key: run.summary[key] for key in (*ACCURACIES, "best_step")}
    return accuracy | {"n_pairs": len(hits), "se_over_pairs": stats.standard_error(hits)}


def run_margins(run: Run) -> dict | None:
    """Mean rho and delta (nats) with standard error over validation pairs, at the first and the
    best evaluation.
    """
    if not run.val:
        return None
    best = run.best_step if run.best_step in run.val else max(run.val)
    steps = {"first": min(run.val), "best": best}
    return {name: margins_at(step, run.val[step]) for name, step in steps.items()}


def margins_at(step: float, pairs: dict[str, Margins | None]) -> dict:
    finite = [margins for margins in pairs.values() if margins]
    rho, delta = [margins.rho for margins in finite], [margins.delta for margins in finite]
    return {
        "step": step,
        "n_pairs": len(finite),
        "n_nonfinite": len(pairs) - len(finite),
        "rho": {"mean": stats.mean(rho), "se": stats.standard_error(rho)},
        "delta": {"mean": stats.mean(delta), "se": stats.standard_error(delta)},
    }


def length_bias(
    pairs: dict[str, Margins | None], length_differences: dict[str, float]
) -> list[dict]:
    """Accuracy by how much longer the chosen response is, in tokens: at most LENGTH_BINS bins of
    about equal numbers of pairs, with exact intervals.

    A model that has learned length ranks those pairs correctly whose chosen response is longer.
    Pairs without a known length are left out.
    """
    hits = sorted(
        (length_differences[pair], ranked_right(margins))
        for pair, margins in pairs.items()
        if pair in length_differences
    )
    if not hits:
        return []
    lengths = [length for length, _ in hits]
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, LENGTH_BINS + 1)))
    last_bin = max(0, len(edges) - 2)
    bins = np.clip(np.searchsorted(edges, lengths, side="right") - 1, 0, last_bin)
    rows = []
    for number in sorted(set(bins.tolist())):
        in_bin = [hit for hit, own in zip(hits, bins) if own == number]
        right = [hit for _, hit in in_bin]
        (shortest, _), (longest, _) = in_bin[0], in_bin[-1]
        low, high = stats.exact_interval(round(sum(right)), len(right))
        rows.append(
            {
                "from": shortest,
                "to": longest,
                "n_pairs": len(right),
                "accuracy": fmean(right),
                "low": low,
                "high": high,
            }
        )
    return rows


# ---- MT-Bench -----------------------------------------------------------------------------------


def score_ratings(rows: list[dict]) -> dict:
    """MT-Bench scores of one run by one judge.

    Choices and repeats are first averaged within a question's turn. turn_1, turn_2 and score are
    means over those averages; score is over all turns that have a rating, as in FastChat's
    show_result.py. A row without a rating counts in n_judged and in no mean. se_over_questions is
    clustered by question, because the two turns of a question are not independent.
    """
    turns = turn_means(rows)
    turn_1, turn_2 = (
        [rating for (_, turn), rating in turns.items() if turn == which] for which in (1, 2)
    )
    failures = Counter(str(row["status"]) for row in rows if row["status"] != "ok")
    return {
        "score": stats.mean(turns.values()),
        "turn_1": stats.mean(turn_1),
        "turn_1_se": stats.standard_error(turn_1),
        "turn_2": stats.mean(turn_2),
        "turn_2_se": stats.standard_error(turn_2),
        "score_without_wrong_references": stats.mean(
            rating
            for (question, _), rating in turns.items()
            if question not in mt_bench.WRONG_REFERENCES
        ),
        "se_over_questions": clustered_error(turns),
        "n_questions": len({row["question_id"] for row in rows}),
        **count_ratings(rows),
        "failures": dict(sorted(failures.items())),
        "categories": {name: score_category(rows, name) for name in category_order(rows)},
    }


def turn_means(rows: list[dict]) -> dict[tuple[int, int], float]:
    """(question, turn) -> mean rating over choices and repeats."""
    ratings = defaultdict(list)
    for row in rows:
        if row["status"] == "ok":
            ratings[row["question_id"], row["turn"]].append(row["score"])
    return {key: fmean(scores) for key, scores in sorted(ratings.items())}


def rating_values(turns: dict[tuple[int, int], float]) -> dict:
    """Mean ratings by (question, turn), as `Values` hold them: question -> turn -> mean rating."""
    values: dict = defaultdict(dict)
    for (question, turn), rating in turns.items():
        values[question][turn] = rating
    return dict(values)


def clustered_error(turns: dict[tuple[int, int], float]) -> float | None:
    """Standard error of the mean rating, clustered by question.

    If all questions have both turns, it is the standard error of the question means.
    """
    by_question = defaultdict(list)
    for (question, _), rating in turns.items():
        by_question[question].append(rating)
    n, total = len(by_question), len(turns)
    if n < 2:
        return None
    grand = fmean(turns.values())
    squares = sum((sum(ratings) - len(ratings) * grand) ** 2 for ratings in by_question.values())
    return math.sqrt(n / (n - 1) * squares) / total


def score_category(rows: list[dict], name: str) -> dict:
    rows = [row for row in rows if row["category"] == name]
    turns = turn_means(rows)
    return {
        "score": stats.mean(turns.values()),
        "se": clustered_error(turns),
        **count_ratings(rows),
    }


def count_ratings(rows: list[dict]) -> dict:
    return {"n_scored": sum(row["status"] == "ok" for row in rows), "n_judged": len(rows)}


def category_order(rows: list[dict]) -> list[str]:
    """Categories of the rows: MT-Bench's in its order, then others by name."""
    names = {row["category"] for row in rows}
    known = [name for name in mt_bench.CATEGORIES if name in names]
    return known + sorted(names - set(mt_bench.CATEGORIES))


def run_kl(answers: dict[mt_bench.AnswerKey, dict]) -> dict | None:
    """On-policy KL(policy || base), estimated on a run's own answers.

    answers: (question, choice) -> row of answers.jsonl whose choices carry `logp`, `logp_base`
    (nats, one value per turn) and `logp_tokens`; None if none does.

    The estimate is the mean log-ratio of what the policy itself wrote (the k1 estimator), in nats
    per answer and per token, with the standard error over questions. Turns without finite
    log-probabilities are left out and counted in `n_nonfinite`.
    """
    turns = list(answered_turns(answers))
    known = [turn for turn in turns if turn.log_ratio is not None]
    if not known:
        return None
    means = list(kl_by_question(answers).values())
    se = float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None
    total, tokens = sum(turn.log_ratio for turn in known), sum(turn.tokens for turn in known)
    return {
        "kl": fmean(means),
        "kl_se": se,
        "kl_per_token": total / tokens if tokens else None,
        "n_questions": len(means),
        "n_nonfinite": len(turns) - len(known),
    }


def kl_by_question(answers: dict[mt_bench.AnswerKey, dict]) -> dict[int, float]:
    """question -> mean log-ratio of its turns and choices, in nats; see `run_kl`."""
    log_ratios: dict[int, list[float]] = defaultdict(list)
    for turn in answered_turns(answers):
        if turn.log_ratio is not None:
            log_ratios[turn.question].append(turn.log_ratio)
    return {question: fmean(of_one) for question, of_one in log_ratios.items()}


class AnsweredTurn(NamedTuple):
    """A turn of an answer that carries log-probabilities."""

    question: int
    log_ratio: float | None  # of policy and base, in nats; None if it is not finite
    tokens: int


def answered_turns(answers: dict[mt_bench.AnswerKey, dict]) -> Iterable[AnsweredTurn]:
    for (question, index), row in answers.items():
        choice = next(choice for choice in row["choices"] if choice["index"] == index)
        columns = [choice.get(key) for key in ("logp", "logp_base", "logp_tokens")]
        if not all(isinstance(column, list) for column in columns):
            continue
        for policy, base, n in zip(*columns):
            known = all(map(is_finite, (policy, base, n)))
            yield AnsweredTurn(question, policy - base if known else None, n if known else 0)


def is_finite(value) -> bool:
    return disk.is_number(value) and math.isfinite(value)


class AnswerShape(NamedTuple):
    """What a run's answers look like: a score that rises while they grow, or are cut off, may be
    a score for length.
    """

    tokens: float | None  # mean length of a turn
    cut_off: float | None  # share of turns that reached the limit


def answer_shape(answers: dict[mt_bench.AnswerKey, dict]) -> AnswerShape:
    """answers: (question, choice) -> row of answers.jsonl; None where it has no counts."""
    choices = [
        choice
        for (_, index), row in answers.items()
        for choice in row["choices"]
        if choice["index"] == index
    ]

    def values_of(key: str) -> list:
        lists = [choice[key] for choice in choices if isinstance(choice.get(key), list)]
        return [value for values in lists for value in values]

    tokens = [float(value) for value in values_of("tokens") if is_finite(value)]
    cut_off = [float(value) for value in values_of("truncated") if isinstance(value, bool)]
    return AnswerShape(stats.mean(tokens), stats.mean(cut_off))


# ---- the judge ----------------------------------------------------------------------------------


def judge_reliability(judged: dict[str, list[dict]], answers: dict[str, dict]) -> dict:
    """Retest reliability, where answers were judged several times, and the correlation of score and
    answer length in characters.

    judged: run id -> ratings. answers: run id -> (question, choice) -> answer row.
    """
    items: dict[tuple, list[float]] = defaultdict(list)  # one answer turn -> its ratings
    for run_id, rows in judged.items():
        for row in rows:
            if row["status"] == "ok":
                items[run_id, row["question_id"], row["turn"], row["choice"]].append(row["score"])
    scores, lengths, groups = [], [], []
    for (run_id, question, turn, choice), ratings in items.items():
        turns = answers.get(run_id, {}).get((question, choice), {}).get("turns")
        if turns:
            scores.append(fmean(ratings))
            lengths.append(len(turns[turn - 1]))
            groups.append((question, turn))
    length = None
    if scores:
        length = variation.length_correlation(np.array(scores), np.array(lengths), groups)
    return {"retest": variation.retest(list(items.values())), "length": length}
