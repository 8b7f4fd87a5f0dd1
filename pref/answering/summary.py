"""What the terminal shows when all questions are answered."""

import numpy as np

from pref.answering.turns import Store
from pref.answering.work import Sampling
from pref.files import benchmarks, console

MOST_FAILURES = 10  # shown on the terminal
# Fewest tokens that papers give an answer to AlpacaEval or Arena-Hard (SimPO: 2,048 to 4,096).
USUAL_TOKENS = 2048


def is_complete(store: Store, table: dict[str, list[dict]], kl: bool) -> bool:
    """Whether every question of every run has its answers and, if `kl`, each answer its
    log-probabilities. table: from `Store.gather`.
    """
    for rows in table.values():
        scored = all(map(is_scored, choices_of(rows)))
        if len(rows) != len(store.bench.questions) or (kl and not scored):
            return False
    return True


def print_summary(store: Store, table: dict[str, list[dict]]) -> None:
    """One line per run: counts over turns, mean length of each turn in tokens, and the mean over
    answers of log p_run - log p_base in nats, an estimate of KL(run || base).
    """
    header = ["run", "answers", "tokens per turn", "truncated", "empty", "overflow"]
    lines = [[*header, "KL to base, nats per answer"]]
    for run_id, rows in table.items():
        choices = choices_of(rows)
        if not choices:
            lines.append([run_id, "0", *[""] * 5])
            continue
        truncated, overflow = (
            sum(sum(choice.get(name, [])) for choice in choices)
            for name in ("truncated", "overflow")
        )
        empty = sum(not text for choice in choices for text in choice["turns"])
        counts = (truncated, empty, overflow)
        lines.append([run_id, f"{len(rows)}", mean_lengths(choices), *map(str, counts)])
        lines[-1].append(mean_kl(choices))
    print(f"\n{console.format_table(lines, right_from=1)}")


def print_notes(store: Store, table: dict[str, list[dict]]) -> None:
    """What an answer's reader should know, with counts over all turns."""
    choices = [choice for rows in table.values() for choice in choices_of(rows)]
    cut = sum(sum(choice.get("overflow", [])) for choice in choices)
    thoughts = sum("<think>" in text[:100] for choice in choices for text in choice["turns"])
    if cut and "server" in store.settings:
        print(
            f"note: in {cut} turns the server has read fewer tokens than the conversation has "
            "words: it cuts the start off; give it a longer context (ollama: num_ctx), delete "
            "answers.jsonl and run the command again"
        )
    if thoughts:
        print(
            f"note: {thoughts} turns begin with <think>: the judge reads thoughts as the answer; "
            "serve the model without thinking"
        )


def print_cut(store: Store, table: dict[str, list[dict]], sampling: Sampling) -> None:
    """Of a benchmark that does not fix the length of an answer: a limit below that of published
    results, and the answers that ended at it.
    """
    if not store.bench.free:
        return
    limit = sampling.max_new_tokens
    if limit < USUAL_TOKENS and store.bench.name in benchmarks.PREPARED_BY:
        print(
            f"warning: answers end at {limit} tokens, and published results of {store.bench.name} "
            f"allow {USUAL_TOKENS} or more: a judge takes a cut answer for a bad one. To compare "
            f"with those, delete these answers and give --max_new_tokens {USUAL_TOKENS}"
        )
    cut = {}
    for run_id, rows in table.items():
        ends = [turn for choice in choices_of(rows) for turn in choice.get("truncated", [])]
        if any(ends):
            cut[run_id] = f"{run_id} {sum(ends) / len(ends):.1%}"
    if cut:
        shown = ", ".join(list(cut.values())[:MOST_FAILURES])
        more = f" and {len(cut) - MOST_FAILURES} more runs" * (len(cut) > MOST_FAILURES)
        print(f"warning: answers cut off at --max_new_tokens {limit}: {shown}{more}")


def print_unlike(store: Store, table: dict[str, list[dict]]) -> None:
    """In bf16: how many questions were not computed in the same way for all runs."""
    if store.settings.get("dtype") != "bfloat16":
        return
    ways: dict[int, set] = {}
    for row in (row for rows in table.values() for row in rows):
        way = (row.get("batch_size"), row.get("device"))
        ways.setdefault(row["question_id"], set()).add(way)
    if unlike := sum(len(found) > 1 for found in ways.values()):
        examples = {way for found in ways.values() if len(found) > 1 for way in found}
        shown = ", ".join(
            sorted(f"{size} on {device or 'an older version'}" for size, device in examples)
        )
        print(
            f"note: {unlike} questions were answered with another batch size or on another device "
            f"by some runs ({shown}); in bf16 that alone changes some answers. For a comparison "
            "without it, delete answers.jsonl of these runs and run the command again"
        )


def print_failures(store: Store) -> None:
    """Which turns could not be answered, and why."""
    for failure in store.failures[:MOST_FAILURES]:
        item = failure.item
        print(
            f"{item.run.run_id}: question {item.question['question_id']}, turn {failure.turn + 1} "
            f"is not answered: {failure.reason}"
        )
    if more := len(store.failures) - MOST_FAILURES:
        if more > 0:
            print(f"... and {more} more: <run_id>/{store.bench.name}/failures.jsonl")


def is_scored(choice: dict) -> bool:
    """Whether an answer has its log-probabilities, under its run and under the base."""
    return "logp" in choice and "logp_base" in choice


def choices_of(rows: list[dict]) -> list[dict]:
    return [choice for row in rows for choice in row["choices"]]


def mean_lengths(choices: list[dict]) -> str:
    """Mean tokens of turn 1, of turn 2, ...; empty if questions differ in their number of turns, or
    the server has not counted all of them.
    """
    lengths = [choice["tokens"] for choice in choices if "tokens" in choice]
    if len(set(map(len, lengths))) != 1 or any(None in tokens for tokens in lengths):
        return ""
    return "  ".join(f"{mean:.1f}" for mean in np.mean(lengths, axis=0))


def mean_kl(choices: list[dict]) -> str:
    """Mean and standard error over answers; empty for fewer than two scored ones."""
    ratios = [sum(c["logp"]) - sum(c["logp_base"]) for c in choices if is_scored(c)]
    if len(ratios) < 2:
        return ""
    error = np.std(ratios, ddof=1) / len(ratios) ** 0.5
    return f"{np.mean(ratios):.2f} (SE {error:.2f})"
