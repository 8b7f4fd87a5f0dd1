"""What judge.py prints: the announcement before it asks, and the table of results after."""

import functools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from pref.files import console, judgements, mt_bench, tasks, win_rates
from pref.judging.benchmark import (
    PAIR,
    PROGRAM,
    SCORE_GRADINGS,
    SINGLE,
    Bench,
    preference_of,
    winner_of,
)
from pref.judging.identity import Identity
from pref.judging.judges import SCORE, Judge
from pref.judging.reading import FALLBACK, FIRST, LAST, SEVERAL, Reading
from pref.judging.run_answers import FAILED
from pref.judging.store import Item, Result

# See cut_prompts. The first in characters per token, the others in characters and tokens.
MOST_CHARS_PER_TOKEN, LONG_PROMPT, LEAST_CONTEXT = 8, 4000, 512

# What to do about a status, where the status alone does not tell.
REMEDIES = {
    "no_token": "neither m nor M is what the judge would answer; a model that reasons first needs "
    "--max_tokens, and a --preference that reads letters",
    "no_logprobs": "no log-probabilities in the reply; see --preference",
    "length": "cut off; a higher --max_tokens asks only these again",
    "thoughts": "thoughts without an answer; does the server's --reasoning-parser fit the model?",
    "too_long": "the conversation, or the baseline's, is longer than the reward model reads; it is "
    "never cut, and another try changes nothing",
    "program_error": "the task's function raised, or ended its process; the column judgement says "
    "where. A corrected file is another judge, and scores all answers anew",
    "program_range": "the task's function gave something else than a number from 0 to 1",
    "program_timeout": f"one score may take {tasks.SECONDS:g} s",
    "program_memory": f"the task's process may have {tasks.MEMORY_MIB} MiB of address space",
    "program_output": "the task's function printed or returned too much",
    "mass": "the verdicts have less of the judge's probability than --min_rating_mass; it would "
    "have answered something else",
}


class Outcome(NamedTuple):
    """An item and what its request has brought."""

    item: Item
    result: Result


def announce(
    who: Identity,
    judge: Judge,
    bench: Bench,
    runs: dict[Path, dict],
    items: list[Item],
    pending: dict[str, dict],
) -> None:
    """Print who judges, what is judged and how much of it is still to be asked.

    runs: answers by run folder. pending: requests by hash.
    """
    print(f"{judge_line(who, judge, bench)}{smoke_note(judge)}")
    announce_incomplete(runs, total=len(bench.questions))
    for run, answers in runs.items():
        name = run.resolve().name
        turns = [turn for row in answers.values() for turn in row["turns"]]
        empty = sum(not turn.strip() for turn in turns)
        failed = sum(turn.strip() == FAILED for turn in turns)
        if empty:
            print(f"run {name}: {empty} empty turns, judged as they are")
        if failed:
            print(f"run {name}: {failed} turns are {FAILED}, a failed answer: they are not judged")
    known = {item.request_sha256 for item in items if item.known is not None}
    if known:
        equal = {
            (item.model_id, item.question_id, item.choice, item.turn)
            for item in items
            if item.known is not None
        }
        print(f"answers that equal the baseline's: {len(equal)}; half a win each, not asked about")
    if bench.benchmark.notes is not None and bench.grading not in SCORE_GRADINGS:
        print("".join(f"{note}\n" for note in bench.benchmark.notes(bench, items)), end="")
    done = len({item.request_sha256 for item in items}) - len(pending) - len(known)
    print(
        f"{len(items)} judgements of {len(runs)} runs: {done} requests already made, "
        f"{len(pending)} to make"
    )


def judge_line(who: Identity, judge: Judge, bench: Bench) -> str:
    """Who judges, and how it is asked."""
    where = f" at {who.server}" if who.server else ""
    asked_with = "" if judge.is_here else f", asked with {json.dumps(who.parameters)}"
    return (
        f"judge {who.judge}{where} (judge_id {who.id}){prompts_note(bench)}{asked_with}"
        f"{reading_note(who)}"
    )


def announce_incomplete(runs: dict[Path, dict], total: int) -> None:
    """Say which runs have answers to a part of the `total` questions: a line for each count."""
    names: dict[int, list[str]] = defaultdict(list)
    for run, answers in runs.items():
        names[len({question_id for question_id, _ in answers})].append(run.resolve().name)
    for answered, some in names.items():
        if answered < total and len(some) == 1:
            print(f"run {some[0]} has answers to {answered} of {total} questions; these are judged")
        elif answered < total:
            print(
                f"{len(some)} runs have answers to {answered} of {total} questions each; these are "
                "judged"
            )


def announce_other_servers(who: Identity, servers: list[str]) -> None:
    """Say that this judge's verdicts at other addresses are not taken over, and how they would."""
    if servers:
        print(
            f"{who.judge} has verdicts at {', '.join(servers)}, which are another judge's; if the "
            f"server has only moved, --server_name {servers[-1]} takes them over"
        )


def prompts_note(bench: Bench) -> str:
    """Whose prompts the judge is asked with; a score judge is asked with none."""
    return "" if bench.grading in SCORE_GRADINGS else f", prompts {bench.label}"


def reading_note(who: Identity) -> str:
    """A remark on a reading, or a way of asking, that is not the official one, else ""."""
    official = Reading()
    own = "".join(
        f", {name}" if value is True else f", {name} {value}" for name, value in who.options.items()
    )
    notes = [
        f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}"
        for name, value in who.reading._asdict().items()
        if value != getattr(official, name)
    ]
    return f"{own}, read with {' '.join(notes)}" if notes else own


def smoke_note(judge: Judge) -> str:
    """A remark on a judge that is too small for its scores to mean anything, else "".

    A reward model is trained to score, and need not be large.
    """
    small = judge.params_b is not None and judge.params_b < judgements.SMOKE_TEST_BELOW_B
    if not small or judge.kind == SCORE:
        return ""
    return f" ({judge.params_b:.3g}B parameters: a smoke test of the pipeline, not a measurement)"


def print_results(
    judge: Judge,
    who: Identity,
    bench: Bench,
    items: list[Item],
    results: dict[str, Result],
) -> None:
    """Print one line per run, and with single grading the means by category as well.

    results: by request hash.
    """
    by_run: dict[str, list[Outcome]] = defaultdict(list)
    for item in items:
        by_run[item.model_id].append(Outcome(item, results.get(item.request_sha256, Result())))

    served = sorted({result.served_model for result in results.values() if result.served_model})
    served_note = f" (served: {', '.join(served)})" if served else ""
    references = f", references {bench.refs}" if bench.references else ""
    print(
        f"\n{bench.title}, {how_text(bench, items)} by {judge.name}{served_note}"
        f"{prompts_note(bench)}{references}{reading_note(who)}{smoke_note(judge)}"
    )
    summarise = pick_summary(bench, results)
    print_table([summarise(outcomes) for outcomes in by_run.values()])
    if summarise is summarise_single:
        print_categories(bench, by_run)
    print_remarks(bench, who, items, results)


def pick_summary(bench: Bench, results: dict[str, Result]) -> Callable:
    """What makes a run's line of the table."""
    if bench.grading in SCORE_GRADINGS:
        return summarise_scores
    if bench.benchmark.summarise is not None:
        return functools.partial(with_costs, bench.benchmark.summarise)
    if bench.grading == SINGLE:
        return summarise_single
    has_preferences = any(result.preference is not None for result in results.values())
    if has_preferences:
        return functools.partial(summarise_preferences, n_questions=len(bench.questions))
    return summarise_pairs


def with_costs(summarise: Callable, outcomes: list[Outcome]) -> dict[str, str]:
    """One run's line: a benchmark's own columns between those that every table has."""
    return {
        "run": outcomes[0].item.model_id,
        **summarise(outcomes),
        "failures": failures_text(outcomes),
        "usd": cost_text(outcomes),
    }


def how_text(bench: Bench, items: list[Item]) -> str:
    """What was asked, in words."""
    baselines = ", ".join(dict.fromkeys(item.baseline for item in items if item.baseline))
    if bench.grading == SINGLE:
        return "single-answer grading"
    asked = {(item.question_id, item.order) for item in items}
    in_both = len(asked) > len({item.question_id for item in items})
    orders = " in both orders" if in_both else ""
    if bench.grading == PAIR:
        return f"comparison with {baselines}{orders}"
    return f"scores, compared with {baselines}," if baselines else "scores"


def print_categories(bench: Bench, by_run: dict[str, list[Outcome]]) -> None:
    """Print the means by category of MT-Bench's ratings."""
    print("\nby category, both turns")
    categories = list(dict.fromkeys(question["category"] for question in bench.questions))
    print_table([category_means(outcomes, categories) for outcomes in by_run.values()])
    print(
        f"no wrong refs: mean without the {len(mt_bench.WRONG_REFERENCES)} questions whose GPT-4 "
        "reference is known to be wrong"
    )
    if bench.label == "own":
        print("own prompts: these scores are not comparable with published MT-Bench scores")


def print_remarks(
    bench: Bench, who: Identity, items: list[Item], results: dict[str, Result]
) -> None:
    """Print what a reader of the table must know of how its verdicts came about."""
    judged = {item.request_sha256: item for item in items if item.request_sha256 in results}
    outcomes = [Outcome(item, results[key]) for key, item in judged.items()]
    counts = Counter(o.result.reading for o in outcomes if o.result.status == "ok")
    for kind, remark in bench.benchmark.remarks.items():
        if n := counts.pop(kind, 0):
            print(f"{n} of {len(outcomes)} judgements {remark}")
    if n := counts[FALLBACK]:
        print(
            f"{n} of {len(outcomes)} ratings are a number in single brackets, [7], which FastChat "
            "reads where a judgement has no [[7]]; it may be an index or a citation"
        )
    if n := counts[SEVERAL]:
        other = LAST if who.reading.verdict == FIRST else FIRST
        print(
            f"{n} of {len(outcomes)} judgements have several verdicts, and the first and the last "
            f"differ; the {who.reading.verdict} one counts (--verdict {other} reads the other, at "
            "no cost)"
        )
    statuses = Counter(o.result.status for o in outcomes)
    for status, remedy in REMEDIES.items():
        if statuses[status]:
            print(f"{statuses[status]} {status}: {remedy}")
    if n := cut_prompts(outcomes):
        print(
            f"{n} of {len(outcomes)} prompts have too few tokens for their length: the server "
            "seems to cut them off without a word, so that the judge saw a part (ollama: raise "
            "num_ctx), and these verdicts are of little worth"
        )


def cut_prompts(outcomes: list[Outcome]) -> int:
    """How many prompts the server seems to have cut off before the judge saw them.

    A token of text is some four characters. One of more than MOST_CHARS_PER_TOKEN is none of text;
    and prompts of very different lengths that all have the highest count were cut to it.
    """
    sizes = [
        (sum(len(message["content"]) for message in item.request["messages"]), result.prompt_tokens)
        for item, result in outcomes
        if result.prompt_tokens
    ]
    most = max((tokens for _, tokens in sizes), default=0)
    at_most = [chars for chars, tokens in sizes if tokens == most]
    same = most >= LEAST_CONTEXT and max(at_most) > 1.2 * min(at_most)
    return sum(
        (chars >= LONG_PROMPT and chars > MOST_CHARS_PER_TOKEN * tokens)
        or (same and tokens == most)
        for chars, tokens in sizes
    )


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
        winner = winner_of(item.order, result.winner, item.model_id, item.baseline)
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


def summarise_preferences(outcomes: list[Outcome], n_questions: int) -> dict[str, str]:
    """One run's line by column name: the mean preference for the run, from 0 to 1, as a win rate.
    n_questions: of the benchmark, whether the run has answered them or not.

    Of several judgements of one question (orders, samples) the mean counts, see win_rates.py.
    """
    preferences = win_rates.by_question(
        {
            "question_id": item.question_id,
            "turn": item.turn,
            "choice": item.choice,
            "repeat": item.repeat,
            "order": item.order,
            "status": result.status,
            "reading": result.reading,
            "preference": preference_of(item.order, result.preference),
        }
        for item, result in outcomes
    )
    found = win_rates.win_rate(preferences.values())
    return {
        "run": outcomes[0].item.model_id,
        "win rate": "-" if found.win_rate is None else f"{found.win_rate:.2f} %",
        "s.e.": "-" if found.standard_error is None else f"{found.standard_error:.2f}",
        "wins": str(found.n_wins),
        "ties": str(found.n_draws),
        "losses": str(found.n - found.n_wins - found.n_draws),
        "n": f"{found.n}/{n_questions}",
        "failures": failures_text(outcomes),
        "usd": cost_text(outcomes),
    }


def summarise_scores(outcomes: list[Outcome]) -> dict[str, str]:
    """One run's line by column name: the mean of a score judge's scores, and the win rate."""
    scored = [outcome for outcome in outcomes if outcome.result.status == "ok"]
    scores = [outcome.result.score for outcome in scored]
    line = {
        "run": outcomes[0].item.model_id,
        "mean score": f"{sum(scores) / len(scores):.4f}" if scores else "-",
        "n": f"{len(scored)}/{len(outcomes)}",
    }
    if outcomes[0].item.grading == PROGRAM:
        return line | {"failures": failures_text(outcomes)}
    preferences = [o.result.preference for o in scored if o.result.preference is not None]
    mean = sum(preferences) / len(preferences) - 1 if preferences else None
    line["win rate"] = "-" if mean is None else f"{100 * mean:.2f} %"
    return line | {"failures": failures_text(outcomes)}


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
    paid = [o.result for o in outcomes if o.item.known is None]
    costs = [result.cost_usd for result in paid if result.cost_usd is not None]
    return f"{sum(costs):.4f}" if costs else "-"
