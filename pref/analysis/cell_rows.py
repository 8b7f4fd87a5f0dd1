"""Rows of tables: a cell's means over its seeds, the questions they are taken over, and how far a
run has moved.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from pref.analysis import run_metrics, stats, texts
from pref.analysis.runs import Cell, Run, Scores

COUNTS = ("n_scored", "n_judged", "n_bench")


def cell_label(loss: str, beta: float | None, tau: float | None, settings: dict) -> str:
    """The name of a cell in tables: td_dpo β=0.1 τ=2 learning_rate=1e-05."""
    parts = [loss]
    named = (("β", beta), ("τ", tau))
    parts += [f"{letter}={texts.number_text(x)}" for letter, x in named if x is not None]
    parts += [settings_text(settings)] if settings else []
    return " ".join(parts)


def settings_text(settings: dict) -> str:
    return " ".join(f"{key}={texts.setting_text(value)}" for key, value in settings.items())


def cell_columns(cell: Cell) -> dict:
    """The columns that say which cell a row is of."""
    return {
        "label": cell.label,
        "untrained": cell.untrained,
        "loss": cell.loss,
        "beta": cell.beta,
        "tau": cell.tau,
        "settings": settings_text(cell.settings) or None,
    }


def cell_row(
    cell: Cell, numbers: dict[str, dict], names: tuple[str, ...], se_name: str
) -> dict | None:
    """One row of a table of scores.

    Parameters
    ----------
    cell : Cell
    numbers : run id -> name -> number or None
    names : names of which the row has the mean, the SD (`<name>_sd`) and the count (`<name>_n`)
        over seeds; the first one decides which runs count as seeds
    se_name : a standard error within a run, kept if exactly one run counts

    Returns
    -------
    dict or None
        None if no run of the cell has numbers and none diverged. The numbers that a diverged run
        has are in the means, and a cell whose runs all diverged keeps its row: without them, the
        loss would look better than it is.
    """
    with_numbers = [run for run in cell.runs if run.run_id in numbers]
    n_diverged = sum(run.status == "diverged" for run in cell.runs)
    if not with_numbers and not n_diverged:
        return None
    counted = [run for run in with_numbers if numbers[run.run_id][names[0]] is not None]
    row = cell_columns(cell) | {
        "runs": [run.run_id for run in counted],
        "seeds": [run.seed for run in counted],
        "n_seeds": len(counted),
        "n_diverged": n_diverged,
    }
    for name in names:
        over_seeds = [numbers[run.run_id][name] for run in with_numbers]
        over_seeds = [number for number in over_seeds if number is not None]
        row |= {
            name: stats.mean(over_seeds),
            f"{name}_sd": stats.sd(over_seeds),
            f"{name}_n": len(over_seeds),
        }
    return row | {se_name: numbers[counted[0].run_id][se_name] if len(counted) == 1 else None}


def accuracy_numbers(run: Run) -> dict:
    """Numbers of one run for a row of the accuracy table."""
    margins = run_metrics.run_margins(run)
    rho = {
        f"margin_rho_{when}": margins[when]["rho"]["mean"] if margins else None
        for when in ("first", "best")
    }
    return run_metrics.run_accuracy(run) | rho


def part_row(
    cell: Cell, numbers: dict[str, dict], names: tuple[str, ...], se_name: str
) -> dict | None:
    """`cell_row`, and what was judged: counts summed over the seeds, and failures by reason.

    numbers: those of a Part.
    """
    row = cell_row(cell, numbers, names, se_name)
    if row is None:
        return None
    of_runs = [numbers[run.run_id] for run in cell.runs if run.run_id in numbers]
    counts = [name for name in COUNTS if all(name in one for one in of_runs) and of_runs]
    row |= {name: sum(one[name] for one in of_runs) for name in counts}
    if "n_bench" in counts:  # MT-Bench's failures are in the notes alone
        failures = Counter()
        for one in of_runs:
            failures.update(one["failures"])
        row["failures"] = ", ".join(f"{why} {n}" for why, n in sorted(failures.items())) or None
    return row


def category_rows(cell: Cell, run_scores: dict[str, dict]) -> list[dict]:
    """MT-Bench by category: a cell's row for each category that it was judged on."""
    by_run = [run_scores[run.run_id]["categories"] for run in cell.runs if run.run_id in run_scores]
    rows = []
    for name in dict.fromkeys(name for categories in by_run for name in categories):
        scored = [categories[name] for categories in by_run if name in categories]
        over_seeds = [one["score"] for one in scored if one["score"] is not None]
        numbers = {
            "category": name,
            "score": stats.mean(over_seeds),
            "score_sd": stats.sd(over_seeds),
            "n_seeds": len(over_seeds),
        }
        rows.append(cell_columns(cell) | numbers | sum_counts(scored))
    return rows


def sum_counts(scored: Iterable[dict]) -> dict:
    scored = list(scored)
    return {key: sum(one[key] for one in scored) for key in ("n_scored", "n_judged")}


class CommonQuestions(NamedTuple):
    """Questions on which all runs can be compared, and the others."""

    common: set[int]
    left_out: dict[int, list[str]]  # question -> runs that lack it or one of its turns


def common_questions(judged: dict[str, list[dict]]) -> CommonQuestions:
    """Questions that were judged in every run on the same turns; judged: run id -> judgements.

    A question whose judgement failed counts as judged. Otherwise 1 % of failures in each of 40 runs
    would leave few questions.
    """
    turns = {run_id: defaultdict(set) for run_id in judged}  # run id -> question -> turns
    all_turns = defaultdict(set)
    for run_id, rows in judged.items():
        for row in rows:
            turns[run_id][row["question_id"]].add(row["turn"])
            all_turns[row["question_id"]].add(row["turn"])
    lacking = {
        question: [run_id for run_id in judged if turns[run_id][question] != all_turns[question]]
        for question in sorted(all_turns)
    }
    return CommonQuestions(
        common={question for question, runs in lacking.items() if not runs},
        left_out={question: runs for question, runs in lacking.items() if runs},
    )


def run_row(run: Run) -> dict:
    """A run's status, and what its training took."""
    cost = {key: run.summary and run.summary[key] for key in ("wall_s", "tokens")}
    return {"run_id": run.run_id, "status": run.status, **cost}


def movement_rows(runs: list[Run], judges: list[Scores]) -> list[dict]:
    """How far each run moved from the reference, and what it gained: KL of its own answers where
    they carry log-probs, their length and the share that was cut off, the anchor 0.5 (a^2 + b^2)
    over the last tenth of the training steps, accuracy, and MT-Bench score by judge. What other
    measures gained is in their frontier.
    """
    rows = []
    for run in runs:
        last_tenth = run.steps[-max(1, len(run.steps) // 10) :]
        anchors = [step["anchor"] for step in last_tenth if step.get("anchor") is not None]
        row = {
            "run_id": run.run_id,
            **{key: run.args[key] for key in ("beta", "tau", "seed")},
            "loss": run.loss,
            **{key: run.kl and run.kl[key] for key in ("kl", "kl_se", "kl_per_token")},
            "anchor": stats.mean(anchors),
            **run_metrics.answer_shape(run.answers)._asdict(),
            "accuracy": run.summary and run.summary["best_acc_ref"],
        }
        for scores in judges:
            by_question = scores.values.get(run.run_id, {})
            ratings = [rating for turns in by_question.values() for rating in turns.values()]
            row[f"score, {scores.judge}"] = stats.mean(ratings)
        rows.append(row)
    return rows
