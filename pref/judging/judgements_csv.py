"""judgements.csv of each run and benchmark, written from the store."""

import json
import sqlite3
from collections import Counter
from pathlib import Path

from pref.files import judgements, mt_bench
from pref.judging import benchmarks
from pref.judging.benchmark import SINGLE, preference_of, winner_of
from pref.judging.reading import Reading
from pref.judging.shape import shape
from pref.judging.store import ASKED_COLUMNS, STORED_COLUMNS, read_stored

# Made here, from the answers.
MADE = ("shape",)
# Columns of the query beyond those of the file.
MORE_COLUMNS = ("finish_reason", "verdict", "min_rating_mass")
COLUMNS = [*(c for c in judgements.JUDGEMENT_COLUMNS if c not in MADE), *MORE_COLUMNS]
assert {*STORED_COLUMNS} <= {*COLUMNS}


def write_csvs(
    db: sqlite3.Connection,
    runs: dict[Path, dict],
    bench: str = benchmarks.DEFAULT,
    baselines: dict[str, dict] | None = None,
) -> Counter[str]:
    """Write each run's judgements.csv: every judge's judgements of the answers it has now.

    runs: answers by run folder, as `mt_bench.read_answers` returns them; baselines: those of other
    models, by name. Returns how many comparisons are left out because the baseline's answers are
    not there any more, by baseline.
    """
    left_out: Counter[str] = Counter()
    query, turns = csv_query(), benchmarks.turns_of(bench)
    # Answers by name; a baseline that is not known yet is read when a row first names it.
    answers_of = dict(baselines or {}) | {run.resolve().name: a for run, a in runs.items()}
    for run, answers in runs.items():
        # A run that was deleted meanwhile does not come back as a folder.
        if not (run / bench).is_dir():
            continue
        # 1) Everything that was ever asked about this run, as its judge is read.
        found = db.execute(query, (run.resolve().name, bench))
        rows = [read_row(dict(zip(COLUMNS, values))) for values in found]
        for name in {row["baseline"] for row in rows} - answers_of.keys() - {""}:
            path = run.resolve().parent / name / bench / "answers.jsonl"
            answers_of[name] = mt_bench.read_answers(path, turns) if path.is_file() else {}
        # 2) Without judgements of answers that have since been replaced.
        current = [row for row in rows if is_current(row, answers, answers_of)]
        left_out.update(row["baseline"] for row in rows if answers_of.get(row["baseline"]) == {})
        # 3) From the run's side, in place of A and B.
        for row in current:
            row["winner"] = winner_of(
                row["order"], row["winner"], run=row["model_id"], baseline=row["baseline"]
            )
            row["preference"] = preference_of(row["order"], row["preference"])
            row["shape"] = shape_of(row, answers, answers_of)
        judgements.write_judgements(run / bench / "judgements.csv", current)
    return left_out


def csv_query() -> str:
    """The query for one run's rows of a benchmark, in the order of COLUMNS."""
    sources = dict.fromkeys(ASKED_COLUMNS, "asked") | {
        "judge_id": "NULLIF(asked.judge_id, '')",
        "judge_address": "NULLIF(judges.server, '')",
        "judge_settings": "COALESCE(judges.settings, json_extract(request, '$.parameters'))",
        "verdict": "judges.verdict",
        "min_rating_mass": "judges.min_rating_mass",
    }
    columns = []
    for column in COLUMNS:
        source = sources.get(column, "judgements")
        columns.append(f'{source}."{column}"' if source.isalpha() else source)
    return f"""
        SELECT {", ".join(columns)} FROM asked JOIN judgements USING (request_sha256)
        LEFT JOIN judges ON judges.judge_id = asked.judge_id WHERE model_id = ? AND bench = ?
        ORDER BY asked.judge, asked.judge_id, prompts, grading, baseline, refs, question_id, turn,
                 choice, "order", repeat"""


def read_row(row: dict) -> dict:
    """A row of csv_query, read as its judge's identity says; by default the official reading."""
    how = Reading()
    if row["verdict"] is not None:
        how = Reading(row["verdict"], row["min_rating_mass"])
    request = {name: row[name] for name in ("bench", "grading")}
    request["parameters"] = json.loads(row["judge_settings"] or "{}")
    return read_stored(row, request, how)


def is_current(row: dict, answers: dict, answers_of: dict[str, dict]) -> bool:
    """Whether a judgement is of the answers that the run, and its baseline, have now."""
    key = (row["question_id"], row["choice"])
    sides = [answers, answers_of[row["baseline"]]] if row["baseline"] else [answers]
    if any(key not in side for side in sides):
        return False
    turns = [side[key]["turns"] for side in sides]
    return row["answer_sha256"] == mt_bench.answer_sha256(row["turn"], *turns)


def shape_of(row: dict, answers: dict, answers_of: dict[str, dict]) -> str | None:
    """The shapes of the answer that was judged and the baseline's, as JSON; None for a rating."""
    if row["grading"] == SINGLE:
        return None
    key, turn = (row["question_id"], row["choice"]), row["turn"]
    shapes = {"run": shape(answers[key]["turns"][turn - 1])}
    if row["baseline"]:
        shapes["baseline"] = shape(answers_of[row["baseline"]][key]["turns"][turn - 1])
    return json.dumps(shapes)
