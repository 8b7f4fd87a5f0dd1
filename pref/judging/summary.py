"""what is printed"""

import argparse
import json
from collections import Counter
from pathlib import Path

from pref.files import console, judgements, mt_bench
from pref.judging import store
from pref.judging.protocol import Judge
from pref.judging.store import Result


def announce(
    judge: Judge, bench: dict, runs: dict[Path, dict], items: list[dict], pending: dict
) -> None:
    sent = "" if judge.local else f", asked with {json.dumps(judge.parameters)}"
    print(f"judge {judge.name}, prompts {bench['label']}{sent}" + smoke_note(judge))
    total = len(bench["questions"])
    for run, answers in runs.items():
        answered = len({question_id for question_id, _ in answers})
        empty = sum(not turn.strip() for row in answers.values() for turn in row["turns"])
        if answered < total:
            print(
                f"run {run.resolve().name}: {answered} of {total} questions are answered; these are judged"
            )
        if empty:
            print(f"run {run.resolve().name}: {empty} empty turns, judged as they are")
    done = len({item["request_sha256"] for item in items}) - len(pending)
    print(
        f"{len(items)} judgements in {len(runs)} runs: {done} requests are already judged, {len(pending)} to ask"
    )


def smoke_note(judge: Judge) -> str:
    if judge.params_b is None or judge.params_b >= judgements.SMOKE_TEST_BELOW_B:
        return ""
    return f" ({judge.params_b:.3g}B parameters: smoke test of the path, not a measure)"


def summarise(items: list[dict], results: dict[str, Result]) -> list[str]:
    """One run's line of the table: means over the judgements that have a score, how many those are,
    what failed.
    """
    found = [(item, results.get(item["request_sha256"], Result())) for item in items]
    scores = [(item, result.score) for item, result in found if result.status == "ok"]
    right = [
        score for item, score in scores if item["question_id"] not in mt_bench.WRONG_REFERENCES
    ]
    return [
        items[0]["model_id"],
        mean_text([score for item, score in scores if item["turn"] == 1]),
        mean_text([score for item, score in scores if item["turn"] == 2]),
        mean_text([score for _, score in scores]),
        f"{len(scores)}/{len(items)}",
        f"{mean_text(right)} (n={len(right)})",
        failures_text(found),
        cost_text(found),
    ]


def summarise_pairs(items: list[dict], results: dict[str, Result]) -> list[str]:
    """One run's line: both orders together, a disagreement is a tie, as FastChat has it."""
    matches: dict[tuple, list] = {}
    for item in items:
        result = results.get(item["request_sha256"], Result())
        winner = store.winner_of(item["order"], result.winner, item["model_id"], item["baseline"])
        matches.setdefault(
            tuple(item[k] for k in ("question_id", "turn", "choice", "repeat")), []
        ).append(winner)
    decided = [winners for winners in matches.values() if None not in winners]
    both = [winners[0] if len(set(winners)) == 1 else "tie" for winners in decided]
    wins, losses = (
        sum(winner == items[0][key] for winner in both) for key in ("model_id", "baseline")
    )
    found = [(item, results.get(item["request_sha256"], Result())) for item in items]
    rate = f"{(wins + 0.5 * (len(both) - wins - losses)) / len(both):.3f}" if both else "-"
    disagreed = sum(len(set(winners)) > 1 for winners in decided)
    return [
        items[0]["model_id"],
        str(wins),
        str(len(both) - wins - losses),
        str(losses),
        rate,
        f"{len(both)}/{len(matches)}",
        str(disagreed),
        failures_text(found),
        cost_text(found),
    ]


def failures_text(found: list[tuple[dict, Result]]) -> str:
    failures = Counter(result.status for _, result in found if result.status != "ok")
    return ", ".join(f"{count} {status}" for status, count in failures.most_common()) or "-"


def cost_text(found: list[tuple[dict, Result]]) -> str:
    """Dollars of a run's judgements; those shared with another run stand in both."""
    costs = [result.cost_usd for _, result in found if result.cost_usd is not None]
    return f"{sum(costs):.4f}" if costs else "-"


def mean_text(scores: list[float]) -> str:
    return f"{sum(scores) / len(scores):.2f}" if scores else "-"


def print_table(
    judge: Judge, bench: dict, items: list[dict], results: dict, args: argparse.Namespace
) -> None:
    """Scores per run; `mean` is over the judgements of both turns, as FastChat's show_result.py has
    it.
    """
    names = dict.fromkeys(item["model_id"] for item in items)
    by_run = {name: [item for item in items if item["model_id"] == name] for name in names}
    served = sorted({r.served_model for r in results.values() if r.served_model})
    how = (
        "single-answer grading"
        if args.grading == "single"
        else f"pairwise against {args.baseline}, two orders"
    )
    print(
        f"\nMT-Bench, {how} by {judge.name}{f' (served: {served})' if served else ''}, prompts {bench['label']}, "
        f"references {bench['refs']}" + smoke_note(judge)
    )
    if args.grading == "pair":
        head = [
            "run",
            "wins",
            "ties",
            "losses",
            "win rate",
            "n",
            "orders disagree",
            "failures",
            "usd",
        ]
        rows = [summarise_pairs(mine, results) for mine in by_run.values()]
        print(console.format_table([head, *rows]))
        return
    head = ["run", "turn 1", "turn 2", "mean", "n", "no wrong refs", "failures", "usd"]
    rows = [summarise(mine, results) for mine in by_run.values()]
    print(console.format_table([head, *rows]))
    categories = list(dict.fromkeys(question["category"] for question in bench["questions"]))
    print("\nby category, both turns")
    rows = [[name, *by_category(mine, results, categories)] for name, mine in by_run.items()]
    print(console.format_table([["run", *categories], *rows]))
    print(
        f"no wrong refs: mean without the {len(mt_bench.WRONG_REFERENCES)} questions whose GPT-4 reference is known to be wrong"
    )
    if bench["label"] == "own":
        print("own prompts: these scores do not compare with MT-Bench scores published elsewhere")


def by_category(items: list[dict], results: dict[str, Result], categories: list[str]) -> list[str]:
    found = [(item["category"], results.get(item["request_sha256"], Result())) for item in items]
    return [
        mean_text([r.score for c, r in found if c == category and r.status == "ok"])
        for category in categories
    ]
