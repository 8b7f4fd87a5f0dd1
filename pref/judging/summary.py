"""What judge.py prints: the announcement before it asks, and the table of results after."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pref.files import console, judgements, mt_bench
from pref.judging import protocol
from pref.judging.protocol import Bench, Judge
from pref.judging.store import Item, Result


class Outcome(NamedTuple):
    """An item and what its request has brought."""

    item: Item
    result: Result


def announce(
    judge: Judge,
    bench: Bench,
    runs: dict[Path, dict],
    items: list[Item],
    pending: dict[str, dict],
) -> None:
    """Print who judges, what is judged and how much of it is still to be asked.

    runs: answers by run folder. pending: requests by hash.
    """
    asked_with = "" if judge.local else f", asked with {json.dumps(judge.parameters)}"
    print(f"judge {judge.name}, prompts {bench.label}{asked_with}{smoke_note(judge)}")
    total = len(bench.questions)
    for run, answers in runs.items():
        name = run.resolve().name
        answered = len({question_id for question_id, _ in answers})
        empty = sum(not turn.strip() for row in answers.values() for turn in row["turns"])
        if answered < total:
            print(f"run {name}: has answers to {answered} of {total} questions; these are judged")
        if empty:
            print(f"run {name}: {empty} empty turns, judged as they are")
    done = len({item.request_sha256 for item in items}) - len(pending)
    print(
        f"{len(items)} judgements of {len(runs)} runs: {done} requests already made, "
        f"{len(pending)} to make"
    )


def smoke_note(judge: Judge) -> str:
    """A remark on a judge that is too small for its scores to mean anything, else ""."""
    if judge.params_b is None or judge.params_b >= judgements.SMOKE_TEST_BELOW_B:
        return ""
    return f" ({judge.params_b:.3g}B parameters: a smoke test of the pipeline, not a measurement)"


def print_results(
    judge: Judge,
    bench: Bench,
    items: list[Item],
    results: dict[str, Result],
    baseline: str | None,
) -> None:
    """Print one line per run, and with single grading the means by category as well.

    results: by request hash. baseline: run id that --grading pair compares with, else None.
    """
    by_run: dict[str, list[Outcome]] = defaultdict(list)
    for item in items:
        by_run[item.model_id].append(Outcome(item, results.get(item.request_sha256, Result())))

    served = sorted({result.served_model for result in results.values() if result.served_model})
    served_note = f" (served: {', '.join(served)})" if served else ""
    how = "single-answer grading"
    if baseline is not None:
        how = f"comparison with {baseline} in both orders"
    print(
        f"\nMT-Bench, {how} by {judge.name}{served_note}, prompts {bench.label}, "
        f"references {bench.refs}{smoke_note(judge)}"
    )
    if baseline is not None:
        print_table([summarise_pairs(outcomes) for outcomes in by_run.values()])
        return
    print_table([summarise_single(outcomes) for outcomes in by_run.values()])
    print("\nby category, both turns")
    categories = list(dict.fromkeys(question["category"] for question in bench.questions))
    print_table([category_means(outcomes, categories) for outcomes in by_run.values()])
    print(
        f"no wrong refs: mean without the {len(mt_bench.WRONG_REFERENCES)} questions whose GPT-4 "
        "reference is known to be wrong"
    )
    if bench.label == "own":
        print("own prompts: these scores are not comparable with published MT-Bench scores")


def print_table(rows: list[dict[str, str]]) -> None:
    """Print rows that all have the same keys, below a line with these keys."""
    if rows:
        print(console.format_table([list(rows[0]), *(list(row.values()) for row in rows)]))


def summarise_single(outcomes: list[Outcome]) -> dict[str, str]:
    """One run's line by column name: means over the judgements that have a score.

    `mean` is over the judgements of both turns, as in FastChat's show_result.py.
    """
    scored = [outcome for outcome in outcomes if outcome.result.status == "ok"]
    right = [o for o in scored if o.item.question_id not in mt_bench.WRONG_REFERENCES]
    return {
        "run": outcomes[0].item.model_id,
        "turn 1": mean_score(o for o in scored if o.item.turn == 1),
        "turn 2": mean_score(o for o in scored if o.item.turn == 2),
        "mean": mean_score(scored),
        "n": f"{len(scored)}/{len(outcomes)}",
        "no wrong refs": f"{mean_score(right)} (n={len(right)})",
        "failures": failures_text(outcomes),
        "usd": cost_text(outcomes),
    }


def summarise_pairs(outcomes: list[Outcome]) -> dict[str, str]:
    """One run's line by column name, over comparisons in which both orders have a verdict.

    As in FastChat, a comparison whose two orders disagree is a tie; a tie is half a win.
    """
    # 1) The winners of both orders, by comparison.
    winners_of: dict[tuple, list[str | None]] = defaultdict(list)
    for item, result in outcomes:
        comparison = (item.question_id, item.turn, item.choice, item.repeat)
        winner = protocol.winner_of(item.order, result.winner, item.model_id, item.baseline)
        winners_of[comparison].append(winner)
    # 2) One winner per comparison: ["dpo", "dpo"] -> "dpo", ["dpo", "base"] -> "tie".
    decided = [winners for winners in winners_of.values() if None not in winners]
    winners = [orders[0] if len(set(orders)) == 1 else "tie" for orders in decided]
    run, baseline = outcomes[0].item.model_id, outcomes[0].item.baseline
    wins, losses = winners.count(run), winners.count(baseline)
    ties = len(winners) - wins - losses
    return {
        "run": run,
        "wins": str(wins),
        "ties": str(ties),
        "losses": str(losses),
        "win rate": f"{(wins + 0.5 * ties) / len(winners):.3f}" if winners else "-",
        "n": f"{len(decided)}/{len(winners_of)}",
        "orders disagree": str(sum(len(set(orders)) > 1 for orders in decided)),
        "failures": failures_text(outcomes),
        "usd": cost_text(outcomes),
    }


def category_means(outcomes: list[Outcome], categories: list[str]) -> dict[str, str]:
    """One run's line of the table by category."""
    scored = [outcome for outcome in outcomes if outcome.result.status == "ok"]
    means = {name: mean_score(o for o in scored if o.item.category == name) for name in categories}
    return {"run": outcomes[0].item.model_id, **means}


def mean_score(outcomes: Iterable[Outcome]) -> str:
    scores = [outcome.result.score for outcome in outcomes]
    return f"{sum(scores) / len(scores):.2f}" if scores else "-"


def failures_text(outcomes: list[Outcome]) -> str:
    """How many have no verdict, by reason: "2 parse, 1 not judged"."""
    failures = Counter(o.result.status for o in outcomes if o.result.status != "ok")
    return ", ".join(f"{count} {status}" for status, count in failures.most_common()) or "-"


def cost_text(outcomes: list[Outcome]) -> str:
    """Dollars of a run's judgements. One shared with another run is counted in both."""
    costs = [o.result.cost_usd for o in outcomes if o.result.cost_usd is not None]
    return f"{sum(costs):.4f}" if costs else "-"
