"""What the report shows: the `page` that report.py lays out, from runs, comparison and tables."""

from collections import Counter
from pathlib import Path

from pref.analysis import (
    browser_page,
    figures,
    judge_identity,
    measures,
    notes,
    opening,
    paper_tables,
    run_metrics,
    texts,
)
from pref.analysis.bench_data import AllData
from pref.analysis.runs import ACCURACIES, Run

RUN_NUMBERS = (*ACCURACIES, "best_step", "nonfinite_steps", "wall_s", "peak_gib")


def make_page(
    runs: list[Run],
    comparison: dict,
    tables: list[paper_tables.Table],
    folder: Path,
    data: AllData,
) -> dict:
    """The `page` of report.write_report.

    folder: results/comparison, with the figures. data: by benchmark; may be empty.
    """
    shown, folded = notes.fold_claims(comparison["claims"])
    paths = sorted((folder / "figures").glob("comparison_*.svg"), key=figures.figure_order)
    return {
        "title": "Preference-optimisation study",
        "facts": page_facts(runs, comparison),
        "opening": opening.find_opening(comparison)._asdict(),
        "answer": [one | {"verdict": one["finding"]["verdict"]} for one in comparison["answers"]],
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
            {"title": figures.figure_title(path), "svg": path, "alt": figures.figure_title(path)}
            for path in paths
        ],
        "runs": [page_run(run, comparison) for run in runs],
        **browser_page.browser_parts(runs, data),
    }


def page_facts(runs: list[Run], comparison: dict) -> list[list]:
    """[label, value] pairs for the head of the report."""
    statuses = Counter(run.status for run in runs)
    judges, agreement = {}, {}  # in order of appearance
    for measure, part in measures.parts_of(comparison):
        if measure.judged:
            name = part["title"] if measure is measures.MT else f"judge {part['judge']}"
            judges[f"{name} {judge_identity.smoke_mark(part)}".strip()] = part["judge"]
            if part["as_humans"]:  # of a program there is nothing to agree with
                agreement.setdefault(part["as_humans"], {})[part["judge"]] = None
    named = list(judges.values())
    judges = [
        name for name, judge in judges.items() if name != f"judge {judge}" or named.count(judge) < 2
    ]
    return [
        ["model", comparison["model"]],
        ["runs", ", ".join(f"{n} {status}" for status, n in sorted(statuses.items()))],
        ["judges", "; ".join(judges) or "none"],
        *(
            [["agree with human votes as often as humans do", as_humans(agreement)]]
            if agreement
            else []
        ),
        ["baseline", comparison["baseline"]],
        ["intervals", "95 %, over questions and seeds; with one seed, over questions alone"],
    ]


def as_humans(agreement: dict[str, dict[str, None]]) -> str:
    """verdict -> judges, as text: "yes: gpt-4.1; not measured: gpt-5-mini, rm:Skywork"."""
    return "; ".join(f"{verdict}: {', '.join(judges)}" for verdict, judges in agreement.items())


def page_run(run: Run, comparison: dict) -> dict:
    """One run with its arguments and numbers. MT-Bench scores are over all questions that it was
    judged on, others over those that are compared.
    """
    numbers = {key: (run.summary or {}).get(key) for key in RUN_NUMBERS}
    for key, rows in run.judged.items():
        judge = judge_identity.describe_judge(key, rows)
        mark = " (smoke test)" if judge["smoke_test"] else ""
        score = run_metrics.score_ratings(rows)["score"]
        numbers[f"score, {judge['title']}{mark}"] = score
    for measure, part in measures.parts_of(comparison):
        if measure is not measures.MT:
            mark = " (smoke test)" if part.get("smoke_test") else ""
            of_run = {row["run_id"]: row["value"] for row in part["runs"]}
            suffix = judge_identity.file_suffix(part, comparison[measure.key]).replace("_", " ")
            numbers[measure.short + suffix + mark] = of_run.get(run.run_id)
    return {
        "run_id": run.run_id,
        "status": run.status,
        "arguments": run.args,
        "numbers": numbers,
    }
