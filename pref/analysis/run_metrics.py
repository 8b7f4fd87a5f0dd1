"""numbers of one run"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from statistics import fmean, stdev

from pref.analysis import estimates, results_folder
from pref.files import mt_bench


def mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return fmean(values) if values else None


def sd(values: Iterable[float]) -> float | None:
    """Sample standard deviation (n - 1); None for fewer than two values."""
    values = list(values)
    return stdev(values) if len(values) > 1 else None


def standard_error(values: list[float]) -> float | None:
    return sd(values) / math.sqrt(len(values)) if len(values) > 1 else None


def run_accuracy(run: dict) -> dict | None:
    """Validation accuracies of a run that ended; the standard error is over pairs, at the best
    evaluation.
    """
    if run["summary"] is None:
        return None
    best = estimates.best_pairs(run["val"], run["summary"])
    hits = [estimates.ranked_right(pair) for pair in best.values()]
    accuracy = {key: run["summary"][key] for key in (*results_folder.ACCURACIES, "best_step")}
    return accuracy | {"n_pairs": len(hits), "se_over_pairs": standard_error(hits)}


def run_margins(run: dict) -> dict | None:
    """Mean rho and delta (nats) with standard error over validation pairs, at the first and the
    best evaluation.
    """
    if not run["val"]:
        return None
    best_step = (run["summary"] or {}).get("best_step")
    steps = {
        "first": min(run["val"]),
        "best": best_step if best_step in run["val"] else max(run["val"]),
    }
    return {name: margin_at(step, run["val"][step]) for name, step in steps.items()}


def margin_at(step: int, pairs: dict) -> dict:
    finite = [pair for pair in pairs.values() if pair]
    margin = {"step": step, "n_pairs": len(finite), "n_nonfinite": len(pairs) - len(finite)}
    for i, name in enumerate(("rho", "delta")):
        values = [pair[i] for pair in finite]
        margin[name] = {"mean": mean(values), "se": standard_error(values)}
    return margin


def score_ratings(rows: list[dict], questions: set[int] | None = None) -> dict:
    """MT-Bench scores of one run by one judge, over `questions` or all of them.

    Choices and repeats are averaged within a question's turn first. turn_1, turn_2 and score are
    then means over those: score over all turns that have a rating, as FastChat's show_result.py. A
    row without a rating counts in n_judged and in no mean. se_over_questions: clustered by
    question, since two turns of one are not independent.
    """
    rows = [row for row in rows if questions is None or row["question_id"] in questions]
    turns = turn_means(rows)
    by_turn = {
        which: [rating for (_, turn), rating in turns.items() if turn == which] for which in (1, 2)
    }
    return {
        "score": mean(turns.values()),
        "turn_1": mean(by_turn[1]),
        "turn_1_se": standard_error(by_turn[1]),
        "turn_2": mean(by_turn[2]),
        "turn_2_se": standard_error(by_turn[2]),
        "score_without_wrong_references": mean(
            rating
            for (question, _), rating in turns.items()
            if question not in mt_bench.WRONG_REFERENCES
        ),
        "se_over_questions": clustered_error(turns),
        "n_questions": len({row["question_id"] for row in rows}),
        **count_ratings(rows),
        "failures": dict(
            sorted(Counter(str(row["status"]) for row in rows if row["status"] != "ok").items())
        ),
        "categories": {name: score_category(rows, name) for name in category_order(rows)},
    }


def clustered_error(turns: dict[tuple[int, int], float]) -> float | None:
    """Standard error of the mean rating, clustered by question: of the question means where all
    have both turns.
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


def turn_means(rows: list[dict]) -> dict[tuple[int, int], float]:
    """(question, turn) -> mean rating over choices and repeats."""
    ratings = defaultdict(list)
    for row in rows:
        if row["status"] == "ok":
            ratings[row["question_id"], row["turn"]].append(row["score"])
    return {key: fmean(values) for key, values in sorted(ratings.items())}


def score_category(rows: list[dict], name: str) -> dict:
    rows = [row for row in rows if row["category"] == name]
    turns = turn_means(rows)
    return {"score": mean(turns.values()), "se": clustered_error(turns), **count_ratings(rows)}


def count_ratings(rows: list[dict]) -> dict:
    return {"n_scored": sum(row["status"] == "ok" for row in rows), "n_judged": len(rows)}


def category_order(rows: list[dict]) -> list[str]:
    found = {row["category"] for row in rows}
    return [name for name in mt_bench.CATEGORIES if name in found] + sorted(
        found - set(mt_bench.CATEGORIES)
    )


def describe_judge(key: tuple, rows: list[dict]) -> dict:
    """What a score depends on besides the answers, and whether it measures anything."""
    judge, prompts, refs = key
    params_b, smoke = estimates.judge_size(judge, rows)
    return {
        "judge": judge,
        "judge_params_b": params_b,
        "smoke_test": smoke,
        "prompts": prompts,
        "refs": refs,
        "grading": "single",
    }


def run_metrics(run: dict) -> dict:
    """What metrics.json of one run holds. Its MT-Bench scores are over all questions that this run
    was judged on.
    """
    args = run["args"]
    return {
        "run_id": run["run_id"],
        **{key: args[key] for key in ("loss", "beta", "tau", "seed", "mode", "model")},
        "status": run["status"],
        "accuracy": run_accuracy(run),
        "margins": run_margins(run),
        "length_bias": run["length_bias"],
        "training": {key: run["summary"][key] for key in results_folder.SUMMARY_KEYS[5:]}
        if run["summary"]
        else None,
        "mt_bench": [
            describe_judge(key, rows)
            | score_ratings(rows)
            | estimates.judge_rows({run["run_id"]: rows}, {run["run_id"]: run["answers"]})
            for key, rows in sorted(run["judged"].items(), key=lambda item: str(item[0]))
        ],
        "kl_to_base": run["kl"],
    }


def judge_title(judge: dict) -> str:
    parts = [f"judge {judge['judge']}"]
    parts += [f"{key} {judge[key]}" for key in ("prompts", "refs") if judge[key]]
    return ", ".join(parts)


def smoke_mark(judge: dict) -> str:
    if not judge["smoke_test"]:
        return ""
    return f"SMOKE TEST: judge of {judge['judge_params_b']:.3g}B parameters, these scores measure nothing"


def judge_suffix(judge: dict, judges: list[dict]) -> str:
    """What a judge's files carry in their names: nothing where there is one judge."""
    if len(judges) == 1:
        return ""
    same = [other for other in judges if other["judge"] == judge["judge"]]
    name = (
        judge["judge"] if len(same) == 1 else f"{judge['judge']}_{judge['prompts']}_{judge['refs']}"
    )
    return "_" + re.sub(r"[^A-Za-z0-9.-]+", "-", name)
