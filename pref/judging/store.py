"""judgements.sqlite"""

import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from pref.files import disk, judgements, mt_bench
from pref.files.console import UserError
from pref.judging import protocol


def books(results: Path, query: str, *values: str) -> list[tuple]:
    """Rows of a query to the judgements, none if there are no judgements."""
    path = results / "judgements.sqlite"
    if not path.is_file():
        return []
    try:
        with closing(sqlite3.connect(path)) as db:
            return db.execute(query, values).fetchall()
    except sqlite3.Error as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


SCHEMA_VERSION = 1
# `judgements`: what a request brought. `asked`: which run's answer made which request; NULL would
# not be unique in a primary key, so that a field without meaning for single grading is ''.
SCHEMA = """
CREATE TABLE IF NOT EXISTS judgements (
    request_sha256 TEXT PRIMARY KEY, judge TEXT NOT NULL, judge_params_b REAL, request TEXT NOT NULL,
    status TEXT NOT NULL, score REAL, winner TEXT, judgement TEXT, served_model TEXT, system_fingerprint TEXT,
    prompt_tokens INTEGER, completion_tokens INTEGER, cost_usd REAL, tries INTEGER NOT NULL, tstamp REAL NOT NULL);
CREATE TABLE IF NOT EXISTS asked (
    model_id TEXT, question_id INTEGER, turn INTEGER, choice INTEGER, category TEXT, grading TEXT, "order" TEXT,
    baseline TEXT, judge TEXT, prompts TEXT, repeat INTEGER, refs TEXT, answer_sha256 TEXT, request_sha256 TEXT,
    PRIMARY KEY (model_id, question_id, turn, choice, grading, "order", baseline, judge, prompts, repeat, refs));
"""
REPLY_COLUMNS = (
    "status",
    "score",
    "winner",
    "judgement",
    "served_model",
    "system_fingerprint",
    "prompt_tokens",
    "completion_tokens",
    "cost_usd",
)
ASKED_COLUMNS = (
    "model_id",
    "question_id",
    "turn",
    "choice",
    "category",
    "grading",
    "order",
    "baseline",
    "judge",
    "prompts",
    "repeat",
    "refs",
    "answer_sha256",
    "request_sha256",
)


def answer_sha256(turn: int, *answers: list[str]) -> str:
    """Of what is judged: turn 2 is judged in the light of turn 1, a pair with both its answers."""
    return disk.sha256_json(
        answers[0][:turn] if len(answers) == 1 else [answer[:turn] for answer in answers]
    )


def open_store(path: Path) -> sqlite3.Connection:
    """The judgements of a results folder, made if new. Every statement commits by itself
    (isolation_level None).

    Raises UserError if the file is no judgement store or another version's.
    """
    try:
        db = sqlite3.connect(
            path, timeout=60, isolation_level=None, check_same_thread=False
        )  # Calls.lock guards it
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, SCHEMA_VERSION):
            raise UserError(
                f"{path}: written by another version (schema {version}); move it away to judge anew"
            )
        db.execute("PRAGMA journal_mode = WAL")
        # A commit is safe from kill -9 as soon as it returns; against a power cut SYNC_EVERY_S
        # syncs it. A sync of each would take longer than the calls do.
        db.execute("PRAGMA synchronous = NORMAL")
        db.executescript(SCHEMA)
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    except sqlite3.Error as error:
        raise UserError(
            f"{path}: cannot be used as judgement store: {error}; move it away or free it"
        ) from None
    return db


def note_items(db: sqlite3.Connection, items: list[dict]) -> None:
    """Write down which run asks for which judgement; a unit's newest request takes the place of an
    older one.
    """
    names = ", ".join(f'"{column}"' for column in ASKED_COLUMNS)
    marks = ", ".join("?" * len(ASKED_COLUMNS))
    rows = [tuple(item[column] for column in ASKED_COLUMNS) for item in items]
    db.execute("BEGIN IMMEDIATE")
    db.executemany(f"INSERT OR REPLACE INTO asked ({names}) VALUES ({marks})", rows)
    db.execute("COMMIT")


class Result(NamedTuple):
    """What a request brought."""

    status: str = "not judged"
    score: float | None = None
    winner: str | None = None  # of a pair: A, B or tie
    cost_usd: float | None = None
    served_model: str | None = None


def find_results(db: sqlite3.Connection, items: list[dict]) -> dict[str, Result]:
    """Result of each item's request that was answered or has failed, by request hash."""
    keys = {item["request_sha256"] for item in items}
    rows = db.execute(f"SELECT request_sha256, {', '.join(Result._fields)} FROM judgements")
    return {key: Result(*rest) for key, *rest in rows if key in keys}


def find_pending(db: sqlite3.Connection, items: list[dict], retry_failed: bool) -> dict[str, dict]:
    """Requests still to be made by hash, each once, in the order of `items`: new ones, and if asked
    for failed ones.
    """
    results = find_results(db, items)
    done = {key for key, result in results.items() if result.status == "ok" or not retry_failed}
    return {
        item["request_sha256"]: item["request"]
        for item in items
        if item["request_sha256"] not in done
    }


def spent_usd(db: sqlite3.Connection) -> float:
    """All that stands in this results folder's books."""
    return db.execute("SELECT COALESCE(SUM(cost_usd), 0) FROM judgements").fetchone()[0]


def save_reply(
    db: sqlite3.Connection, key: str, request: dict, reply: dict, params_b: float | None
) -> None:
    """Keep a reply. A failure is replaced by the next try, whose cost is added to its own; a valid
    judgement by nothing.
    """
    row = {
        "request_sha256": key,
        "judge": request["judge"],
        "judge_params_b": params_b,
        "request": json.dumps(request, ensure_ascii=False),
        "tries": 1,
        "tstamp": time.time(),
        **{
            column: reply.get(column) for column in REPLY_COLUMNS
        },  # nothing of an earlier failure stays
    }
    kept = ("request_sha256", "tries", "cost_usd")
    updates = ", ".join(f"{column} = excluded.{column}" for column in row if column not in kept)
    paid = "CASE WHEN cost_usd IS NULL THEN excluded.cost_usd ELSE cost_usd + COALESCE(excluded.cost_usd, 0) END"
    db.execute(
        f"INSERT INTO judgements ({', '.join(row)}) VALUES ({', '.join('?' * len(row))}) ON CONFLICT (request_sha256) "
        f"DO UPDATE SET {updates}, tries = tries + 1, cost_usd = {paid} WHERE status != 'ok'",
        tuple(row.values()),
    )


def write_csvs(db: sqlite3.Connection, runs: dict[Path, dict]) -> None:
    """Write each run's judgements.csv: what any judge has said of the answers that the run has
    now.
    """
    columns = ", ".join(
        f'{"asked" if c in ASKED_COLUMNS else "judgements"}."{c}"'
        for c in judgements.JUDGEMENT_COLUMNS
    )
    query = (
        f"SELECT {columns} FROM asked JOIN judgements USING (request_sha256) WHERE model_id = ? "
        'ORDER BY asked.judge, prompts, grading, baseline, refs, question_id, turn, choice, "order", repeat'
    )
    others = {run.resolve().name: answers for run, answers in runs.items()}
    for run, answers in runs.items():
        rows = [
            dict(zip(judgements.JUDGEMENT_COLUMNS, row))
            for row in db.execute(query, (run.resolve().name,))
        ]
        for name in {row["baseline"] for row in rows} - others.keys() - {""}:
            path = run.resolve().parent / name / "mt_bench" / "answers.jsonl"
            others[name] = mt_bench.read_answers(path) if path.is_file() else {}
        fresh = [row for row in rows if is_fresh(row, answers, others)]
        for row in fresh:
            row["winner"] = winner_of(row["order"], row["winner"], row["model_id"], row["baseline"])
        judgements.write_judgements(run / "mt_bench" / "judgements.csv", fresh)


def is_fresh(row: dict, answers: dict, others: dict[str, dict]) -> bool:
    """Whether the judgement is of the answers that the run, and the baseline of a pair, have
    now.
    """
    key = (row["question_id"], row["choice"])
    sides = [answers] if row["grading"] == "single" else [answers, others[row["baseline"]]]
    if any(key not in side for side in sides):
        return False
    return row["answer_sha256"] == answer_sha256(
        row["turn"], *(side[key]["turns"] for side in sides)
    )


def winner_of(order: str, verdict: str | None, run: str, baseline: str) -> str | None:
    """Who won one order of a pair: the run's name, the baseline's, or 'tie'."""
    if verdict in (None, "tie"):
        return verdict
    return run if (verdict == "A") == (order == protocol.ORDERS[0]) else baseline
