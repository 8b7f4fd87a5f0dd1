"""Pairwise judgements: from verdicts in both orders to win rates of cells."""

from collections import defaultdict
from typing import NamedTuple

from pref.analysis import estimates, judge_identity, judge_validation, stats
from pref.analysis.runs import Cell, Values


class PairKey(NamedTuple):
    """What makes pairwise judgements comparable."""

    judge: str
    prompts: str | None
    refs: str | None
    baseline: str  # run id of the model that answers are compared with
    judge_id: str | None
    title: str  # of the judge


class Place(NamedTuple):
    """Which answer of a run to a question was compared, and in which repeat."""

    turn: int
    choice: int
    repeat: int


def pair_outcomes(rows: list[dict]) -> dict[PairKey, dict[int, dict[Place, float]]]:
    """judge and baseline -> question -> place -> 1 if the run wins, 0 if the baseline wins, 0.5 for
    a tie.

    A pair is asked in both orders. If the verdicts disagree, it is a tie; without both verdicts, it
    does not count.
    """
    winners: dict[tuple, dict[str, str | None]] = defaultdict(dict)  # ... -> order -> winner
    for row in rows:
        judge = judge_identity.key_of(row)
        key = PairKey(
            judge=judge.judge,
            prompts=judge.prompts,
            refs=judge.refs,
            baseline=row["baseline"],
            judge_id=judge.judge_id,
            title=row.get("title") or judge_identity.plain_title(judge),
        )
        place = Place(row["turn"], row["choice"], row["repeat"])
        winner = row["winner"] if row["status"] == "ok" else None
        winners[key, row["question_id"], place][row["order"]] = winner
    outcomes: dict[PairKey, dict] = defaultdict(lambda: defaultdict(dict))
    for (key, question, place), by_order in winners.items():
        if len(by_order) == 2 and None not in by_order.values():
            first, second = by_order.values()
            tie = first != second or first == "tie"
            outcomes[key][question][place] = 0.5 if tie else float(first != key.baseline)
    return {key: dict(by_question) for key, by_question in outcomes.items()}


def win_rows(cells: list[Cell]) -> list[dict]:
    """Win rate of each cell against each baseline run it was judged against (a tie is one half),
    with the 95 % interval over questions and seeds.
    """
    rows = []
    for cell in cells:
        by_judge: dict[PairKey, Values] = defaultdict(dict)
        for run in cell.runs:
            for key, outcomes in pair_outcomes(run.judged_pairs).items():
                by_judge[key][run.run_id] = outcomes
        for key, values in sorted(by_judge.items(), key=str):
            (table,) = estimates.make_tables(values, [list(values)])
            if not table.size:
                continue
            low, high = map(estimates.finite, stats.proportion_interval(table))
            parts = estimates.shared_parts(list(values.values()))
            outcomes = [
                run[question][place]
                for run in values.values()
                for question, places in parts.items()
                for place in places
            ]
            judgements = [row for run in cell.runs for row in run.judged_pairs]
            _, too_small = judge_identity.judge_size(key.judge, judgements)
            found = next((row.get("validation") for row in judgements if is_by(row, key)), None)
            facts = judge_validation.judge_facts(key.judge, found, too_small)
            rows.append(
                {
                    "judge": key.judge,
                    "prompts": key.prompts,
                    "refs": key.refs,
                    "label": cell.label,
                    "loss": cell.loss,
                    "baseline": key.baseline,
                    "win_rate": float(table.mean()),
                    "low": low,
                    "high": high,
                    "wins": outcomes.count(1),
                    "ties": outcomes.count(0.5),
                    "losses": outcomes.count(0),
                    "n_questions": table.shape[1],
                    "n_seeds": len(values),
                    "smoke_test": facts["smoke_test"],
                    "judge_id": key.judge_id,
                    "title": key.title,
                    "as_humans": facts["as_humans"],
                    "agreement_text": facts["agreement_text"],
                }
            )
    return rows


def is_by(row: dict, key: PairKey) -> bool:
    judge = judge_identity.key_of(row)
    return (judge.judge, judge.judge_id) == (key.judge, key.judge_id)
