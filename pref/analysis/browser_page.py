"""What the report's browser of answers shows, by benchmark: questions, answers, judgements.

A baseline that is no run of the study (AlpacaEval's, Arena-Hard's) is listed as one, so that its
answers can be read beside a run's. Where all texts together would make the file too large for a
browser, questions at equal distances are kept, the same ones in all runs.
"""

from collections.abc import Iterable

from pref.analysis import bench_data, parts, provenance, task_sources
from pref.analysis.bench_data import AllData
from pref.analysis.runs import MT_BENCH, Run

JUDGEMENT_FIELDS = (
    *("question_id", "turn", "choice", "repeat", "judge", "grading", "score", "winner"),
    *("baseline", "order", "status", "judgement", "preference", "label"),
)
MOST_CHARACTERS = 40_000_000  # of a benchmark's answers and judgements, before compression


def browser_parts(runs: list[Run], data: AllData) -> dict:
    """`benches`, `questions`, `answers` and `judgements` of the page."""
    page: dict = {"benches": [], "questions": {}, "answers": [], "judgements": []}
    for bench in provenance.bench_names(runs):
        questions = page_questions(runs, data, bench)
        shown = choose_questions(runs, bench, list(questions))
        left_out = len(questions) - len(shown)
        page["benches"].append(
            {"name": bench, "title": parts.bench_title(bench), "left_out": left_out}
        )
        page["questions"][bench] = {q: text for q, text in questions.items() if q in shown}
        rows = [*page_answers(runs, bench), *baseline_answers(runs, data, bench)]
        page["answers"] += [row for row in rows if row["question_id"] in shown]
        judged = page_judgements(runs, bench)
        page["judgements"] += [row for row in judged if row["question_id"] in shown]
    return page


def choose_questions(runs: list[Run], bench: str, questions: list[int]) -> set[int]:
    """The questions whose texts are shown: all of MT-Bench, and of others as many as fit."""
    size = 0
    for run in runs if bench != MT_BENCH else ():
        files = run.bench(bench)
        size += sum(len(text) for row in files.answers.values() for text in row["turns"])
        size += sum(len(row["judgement"] or "") for row in files.judgements())
    every = -(-size // MOST_CHARACTERS) or 1
    return set(questions[::every])


def page_questions(runs: list[Run], data: AllData, bench: str = MT_BENCH) -> dict[int, dict]:
    """question -> category and texts of its turns; None for texts that the question's file does not
    have, or has in another wording than was answered.
    """
    questions = bench_data.of(data, bench).questions
    other = provenance.edited_questions(runs, bench, questions)
    turns_of = {number: turns for number, turns in questions.items() if number not in other}
    categories: dict[int, str | None] = {}
    for run in runs:
        for (question, _), row in run.bench(bench).answers.items():
            categories[question] = row.get("category")
    for run in runs:
        for row in run.bench(bench).judgements():
            if bench != MT_BENCH or row["grading"] == "single":
                categories[row["question_id"]] = row["category"]
    return {
        question: {"category": category, "turns": turns_of.get(question)}
        for question, category in sorted(categories.items())
    }


def page_answers(runs: list[Run], bench: str = MT_BENCH) -> list[dict]:
    return [row for run in runs for row in answer_rows(run.run_id, bench, run.bench(bench).answers)]


def answer_rows(name: str, bench: str, answers: dict) -> Iterable[dict]:
    for (question, choice), row in answers.items():
        yield {
            "bench": bench,
            "run_id": name,
            "question_id": question,
            "choice": choice,
            "turns": row["turns"],
        }


def baseline_answers(runs: list[Run], data: AllData, bench: str) -> list[dict]:
    """Answers of the baselines that runs were compared with and that are no runs themselves."""
    named = {row["baseline"] for run in runs for row in run.bench(bench).judgements()}
    known = bench_data.of(data, bench).baselines
    others = sorted((named - {run.run_id for run in runs}) & set(known))
    return [row for name in others for row in answer_rows(name, bench, known[name])]


def page_judgements(runs: list[Run], bench: str = MT_BENCH) -> list[dict]:
    """The page's judgements, run by run: ratings of each judge, then comparisons and rewards."""
    rows = []
    for run in runs:
        for row in run.bench(bench).judgements():
            fields = {key: row[key] for key in JUDGEMENT_FIELDS}
            if row["grading"] == task_sources.PROGRAM:
                fields["judgement"] = task_sources.explanation(row)
            judge = row["title"].removeprefix("judge ")
            rows.append({"bench": bench, "run_id": run.run_id, **fields, "judge": judge})
    return rows
