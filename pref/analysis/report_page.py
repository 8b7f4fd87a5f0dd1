"""What the report shows: the `page` that report.py lays out, from runs, comparison and tables."""

from collections import Counter
from pathlib import Path

from pref.analysis import (
    figures,
    judge_identity,
    notes,
    paper_tables,
    provenance,
    run_metrics,
    texts,
)
from pref.analysis.runs import ACCURACIES, Run

RUN_NUMBERS = (*ACCURACIES, "best_step", "nonfinite_steps", "wall_s", "peak_gib")
JUDGEMENT_FIELDS = (
    *("question_id", "turn", "choice", "repeat", "judge", "grading", "score", "winner"),
    *("baseline", "order", "status", "judgement"),
)


def make_page(
    runs: list[Run],
    comparison: dict,
    tables: list[paper_tables.Table],
    folder: Path,
    questions: dict[int, list[str]],
) -> dict:
    """The `page` of report.write_report.

    folder: results/comparison, with the figures. questions: question -> its turns; may be empty.
    """
    shown, folded = notes.fold_claims(comparison["claims"])
    paths = sorted((folder / "figures").glob("comparison_*.png"), key=figures.figure_order)
    return {
        "title": "Preference-optimisation study",
        "facts": page_facts(runs, comparison),
        "answer": comparison["answer"],
        "caveats": [note for note in comparison["notes"] if notes.is_caveat(note)],
        "verdicts": [texts.verdict_texts(row) for row in shown],
        "folded": {
            "title": notes.folded_text(folded, bool(shown)),
            "verdicts": [texts.verdict_texts(row) for row in folded],
        },
        "notes": comparison["notes"],
        "missing": [notes.missing_text(gap) for gap in comparison["missing"]],
        "tables": [table.page() for table in tables if table.id != "verdicts"],
        "figures": [
            {"title": figures.figure_title(path), "png": path, "alt": figures.figure_title(path)}
            for path in paths
        ],
        "runs": [page_run(run) for run in runs],
        "questions": page_questions(runs, questions),
        "answers": page_answers(runs),
        "judgements": page_judgements(runs),
    }


def page_facts(runs: list[Run], comparison: dict) -> list[list]:
    """[label, value] pairs for the head of the report."""
    statuses = Counter(run.status for run in runs)
    judges = [
        f"{judge['title']} {judge_identity.smoke_mark(judge)}".strip()
        for judge in comparison["mt_bench"]
    ]
    return [
        ["model", comparison["model"]],
        ["runs", ", ".join(f"{n} {status}" for status, n in sorted(statuses.items()))],
        ["judges", "; ".join(judges) or "none"],
        ["baseline", comparison["baseline"]],
        ["intervals", "95 %, over questions and seeds; with one seed, over questions alone"],
    ]


def page_run(run: Run) -> dict:
    """One run with its arguments and numbers; scores are over all questions it was judged on."""
    numbers = {key: (run.summary or {}).get(key) for key in RUN_NUMBERS}
    for key, rows in run.judged.items():
        judge = judge_identity.describe_judge(key, rows)
        mark = " (smoke test)" if judge["smoke_test"] else ""
        score = run_metrics.score_ratings(rows)["score"]
        numbers[f"score, {judge['title']}{mark}"] = score
    return {
        "run_id": run.run_id,
        "status": run.status,
        "arguments": run.args,
        "numbers": numbers,
    }


def page_questions(runs: list[Run], questions: dict[int, list[str]]) -> dict[int, dict]:
    """question -> category and texts of its turns; None for texts that question.jsonl does not
    have, or has in another wording than was answered.
    """
    other = provenance.edited_questions(runs, questions)
    turns_of = {number: turns for number, turns in questions.items() if number not in other}
    categories = {
        question: row.get("category") for run in runs for (question, _), row in run.answers.items()
    }
    for run in runs:
        for rows in run.judged.values():
            categories |= {row["question_id"]: row["category"] for row in rows}
    return {
        question: {"category": category, "turns": turns_of.get(question)}
        for question, category in sorted(categories.items())
    }


def page_answers(runs: list[Run]) -> list[dict]:
    return [
        {
            "run_id": run.run_id,
            "question_id": question,
            "choice": choice,
            "turns": row["turns"],
        }
        for run in runs
        for (question, choice), row in run.answers.items()
    ]


def page_judgements(runs: list[Run]) -> list[dict]:
    """The page's judgements: of each run, the single-answer ones judge by judge, then the pairwise
    ones.
    """
    rows = []
    for run in runs:
        single = [row for rows in run.judged.values() for row in rows]
        for row in [*single, *run.judged_pairs]:
            fields = {key: row[key] for key in JUDGEMENT_FIELDS}
            judge = row["title"].removeprefix("judge ")
            rows.append({"run_id": run.run_id, **fields, "judge": judge})
    return rows
