"""judgements.sqlite: what was asked of a judge and what came back. All SQL of the toolkit is here.

One store per results folder. A *request* is everything that determines a judgement (judge,
messages, parameters, number of the repeat) and is identified by the SHA-256 of its JSON. An `Item`
is the need of one run's answer for one judgement; items of different runs with identical answers
share a request, which is then paid for once. Hence two tables: `judgements`, one row per request
with its reply, and `asked`, one row per item.

    judge.py   note_items -> find_pending -> save_reply, once per reply -> find_results, write_csvs
    sweep.sh   judgement_counts, read_totals, has_unreached: read-only, by results folder

Functions that take `db` work on the connection that `open_store` returns.
"""

import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from pref.files import disk, judgements, mt_bench
from pref.files.console import UserError
from pref.judging import protocol

SCHEMA_VERSION = 1  # PRAGMA user_version
# SQLite keeps the text of a CREATE TABLE in the file. These strings therefore join to the text that
# this version has always written, white space included.
SCHEMA = (
    "\nCREATE TABLE IF NOT EXISTS judgements (\n    "
    "request_sha256 TEXT PRIMARY KEY, "  # SHA-256 of the request's JSON with sorted keys
    "judge TEXT NOT NULL, "  # --judge, as given
    "judge_params_b REAL, "  # billions of parameters, NULL if unknown
    "request TEXT NOT NULL,\n    "  # JSON: judge, messages, parameters, repeat; of a pair grading
    "status TEXT NOT NULL, "  # "ok", or why there is no score and no winner
    "score REAL, "  # single grading: 1 to 10
    "winner TEXT, "  # pair grading: "A", "B" or "tie", as shown to the judge
    "judgement TEXT, "  # the judge's text, or the text of the error
    "served_model TEXT, "  # the model that the server says it ran
    "system_fingerprint TEXT,\n    "  # the server's own version mark
    "prompt_tokens INTEGER, "
    "completion_tokens INTEGER, "
    "cost_usd REAL, "  # of all tries together; NULL without a price
    "tries INTEGER NOT NULL, "  # 1, plus one for each retry after a failure
    "tstamp REAL NOT NULL);\n"  # when the last try was stored, Unix time in seconds
    # Columns without a meaning for single grading are '', not NULL: a primary key does not treat
    # two NULLs as equal.
    "CREATE TABLE IF NOT EXISTS asked (\n    "
    "model_id TEXT, "  # run id of the answer
    "question_id INTEGER, "
    "turn INTEGER, "  # 1 or 2
    "choice INTEGER, "  # number of the answer, if a run has several per question
    "category TEXT, "  # of the question
    "grading TEXT, "  # "single" or "pair"
    '"order" TEXT,\n    '  # of a pair: "1" shows the run's answer as A, "2" as B
    "baseline TEXT, "  # of a pair: run id of the other answer
    "judge TEXT, "
    "prompts TEXT, "  # "mt_bench" or "own", see protocol.label_prompts
    "repeat INTEGER, "  # 0, 1, ... with --repeats
    "refs TEXT, "  # "original" or "corrected:HASH"
    "answer_sha256 TEXT, "  # of the answers shown, see answer_sha256
    "request_sha256 TEXT,\n    "  # the request that judges them: a key of `judgements`
    'PRIMARY KEY (model_id, question_id, turn, choice, grading, "order", baseline, judge, prompts, '
    "repeat, refs));\n"
)


class Item(NamedTuple):
    """A judgement that a run's answer needs: a row of `asked`, and its request."""

    model_id: str
    question_id: int
    turn: int
    choice: int
    category: str
    grading: str
    order: str
    baseline: str
    judge: str
    prompts: str
    repeat: int
    refs: str
    answer_sha256: str
    request_sha256: str
    request: dict


ASKED_COLUMNS = tuple(name for name in Item._fields if name != "request")
REPLY_COLUMNS = (
    *("status", "score", "winner", "judgement", "served_model", "system_fingerprint"),
    *("prompt_tokens", "completion_tokens", "cost_usd"),
)


class Result(NamedTuple):
    """What a request has brought so far: columns of `judgements`."""

    status: str = "not judged"
    score: float | None = None
    winner: str | None = None  # of a pair: A, B or tie
    cost_usd: float | None = None
    served_model: str | None = None


class Totals(NamedTuple):
    """All requests of a results folder that were answered or have failed."""

    requests: int
    cost_usd: float


class Verdicts(NamedTuple):
    """A run's judgements."""

    asked: int  # how many its answers need
    without: int  # how many of these have no verdict


class Lengths(NamedTuple):
    """Sums over one judge's judgements whose tokens its server has counted."""

    judgements: int
    prompt_tokens: int
    completion_tokens: int
    request_chars: int


def answer_sha256(turn: int, *answers: list[str]) -> str:
    """Hash of the text that is judged at `turn`: one answer's turns up to it, or those of a pair.

    Turn 2 is judged together with turn 1, hence its hash covers both.
    """
    shown = [answer[:turn] for answer in answers]
    return disk.sha256_json(shown[0] if len(shown) == 1 else shown)


# ---- opening and writing -------------------------------------------------------------------------


def open_store(path: Path) -> sqlite3.Connection:
    """Open the judgements of a results folder; create them if there are none.

    Every statement is a transaction of its own (isolation_level None), except in `note_items`. The
    connection may be used by several threads, one at a time: `calls.Calls.lock` sees to that.
    Raises UserError if the file is not a judgement store, is locked, or has another schema version.
    """
    try:
        db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, SCHEMA_VERSION):
            raise UserError(
                f"{path}: written by another version of this toolkit (schema {version}, expected "
                f"{SCHEMA_VERSION}); judge with that version, or move the file away: everything "
                "is then asked, and paid for, again"
            )
        db.execute("PRAGMA journal_mode = WAL")
        # A commit survives kill -9 as soon as it returns. It survives a power cut once it is synced
        # to disk, which `sync` does every few seconds: to sync each commit would take longer than
        # the calls do.
        db.execute("PRAGMA synchronous = NORMAL")
        db.executescript(SCHEMA)
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    except sqlite3.Error as error:
        raise UserError(
            f"{path}: cannot be used as a judgement store: {error}; if another program has it "
            "open, close that program; if it is damaged, move it away: everything is then asked, "
            "and paid for, again"
        ) from None
    return db


def sync(db: sqlite3.Connection) -> None:
    """Sync what was committed to disk, so that it survives a power cut."""
    db.execute("PRAGMA wal_checkpoint(PASSIVE)")


def note_items(db: sqlite3.Connection, items: list[Item]) -> None:
    """Record which answers need which requests, in one transaction.

    An item whose request has changed, for example because the answer is new, replaces the old row.
    """
    columns = ", ".join(f'"{column}"' for column in ASKED_COLUMNS)
    placeholders = ", ".join("?" * len(ASKED_COLUMNS))
    rows = [tuple(getattr(item, column) for column in ASKED_COLUMNS) for item in items]
    db.execute("BEGIN IMMEDIATE")
    db.executemany(f"INSERT OR REPLACE INTO asked ({columns}) VALUES ({placeholders})", rows)
    db.execute("COMMIT")


def save_reply(
    db: sqlite3.Connection, key: str, request: dict, reply: dict, params_b: float | None
) -> None:
    """Store the reply to `request` under its hash `key`.

    If an earlier try of this request failed, its row is replaced: no column of the old reply
    survives, except that the costs are summed and the tries counted. A row with status "ok" is
    never changed.
    """
    row = {
        "request_sha256": key,
        "judge": request["judge"],
        "judge_params_b": params_b,
        "request": json.dumps(request, ensure_ascii=False),
        "tries": 1,
        "tstamp": time.time(),
        **{column: reply.get(column) for column in REPLY_COLUMNS},
    }
    replaced = [column for column in row if column not in ("request_sha256", "tries", "cost_usd")]
    updates = ", ".join(f"{column} = excluded.{column}" for column in replaced)
    total_cost = (  # NULL only if both costs are unknown
        "CASE WHEN cost_usd IS NULL THEN excluded.cost_usd "
        "ELSE cost_usd + COALESCE(excluded.cost_usd, 0) END"
    )
    db.execute(
        f"INSERT INTO judgements ({', '.join(row)}) VALUES ({', '.join('?' * len(row))}) "
        f"ON CONFLICT (request_sha256) DO UPDATE SET {updates}, tries = tries + 1, "
        f"cost_usd = {total_cost} WHERE status != 'ok'",
        tuple(row.values()),
    )


# ---- questions that judge.py asks ----------------------------------------------------------------


def find_results(db: sqlite3.Connection, items: list[Item]) -> dict[str, Result]:
    """Result by request hash, of the items' requests that were answered or have failed."""
    keys = {item.request_sha256 for item in items}
    rows = db.execute(f"SELECT request_sha256, {', '.join(Result._fields)} FROM judgements")
    return {key: Result(*columns) for key, *columns in rows if key in keys}


def find_pending(db: sqlite3.Connection, items: list[Item], retry_failed: bool) -> dict[str, dict]:
    """Requests still to be made by hash, each once, in the order of `items`.

    These are the requests that were never made and, with `retry_failed`, those that failed.
    """
    results = find_results(db, items)
    done = {key for key, result in results.items() if result.status == "ok" or not retry_failed}
    return {item.request_sha256: item.request for item in items if item.request_sha256 not in done}


def spent_usd(db: sqlite3.Connection) -> float:
    """Total cost recorded for this results folder, in dollars: of all judges, failures included."""
    return db.execute("SELECT COALESCE(SUM(cost_usd), 0) FROM judgements").fetchone()[0]


def learned_lengths(db: sqlite3.Connection, judge: str) -> Lengths:
    """How long this judge's requests and judgements have been, for an estimate of the next."""
    query = """
        SELECT COUNT(*), COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(completion_tokens), 0),
               COALESCE(SUM(LENGTH(request)), 0)
        FROM judgements WHERE judge = ? AND prompt_tokens > 0 AND completion_tokens > 0"""
    return Lengths(*db.execute(query, (judge,)).fetchone())


def last_accepted_parameters(db: sqlite3.Connection, judge: str) -> dict | None:
    """Parameters of this judge's newest successful request, or None without one."""
    query = """
        SELECT request FROM judgements WHERE judge = ? AND status = 'ok'
        ORDER BY tstamp DESC LIMIT 1"""
    row = db.execute(query, (judge,)).fetchone()
    return json.loads(row[0])["parameters"] if row else None


# ---- judgements.csv ------------------------------------------------------------------------------


def write_csvs(db: sqlite3.Connection, runs: dict[Path, dict]) -> None:
    """Write each run's judgements.csv: every judge's judgements of the answers it has now.

    runs: answers by run folder, as `mt_bench.read_answers` returns them.
    """
    query = csv_query()
    # Answers by run id; a baseline that is not among `runs` is read when a row first names it.
    answers_of = {run.resolve().name: answers for run, answers in runs.items()}
    for run, answers in runs.items():
        # 1) Everything that was ever asked about this run.
        rows = [
            dict(zip(judgements.JUDGEMENT_COLUMNS, row))
            for row in db.execute(query, (run.resolve().name,))
        ]
        for name in {row["baseline"] for row in rows} - answers_of.keys() - {""}:
            path = run.resolve().parent / name / "mt_bench" / "answers.jsonl"
            answers_of[name] = mt_bench.read_answers(path) if path.is_file() else {}
        # 2) Without judgements of answers that have since been replaced.
        current = [row for row in rows if is_current(row, answers, answers_of)]
        # 3) With the winner's run id in place of A and B.
        for row in current:
            row["winner"] = protocol.winner_of(
                row["order"], row["winner"], run=row["model_id"], baseline=row["baseline"]
            )
        judgements.write_judgements(run / "mt_bench" / "judgements.csv", current)


def csv_query() -> str:
    """The query for one run's rows of judgements.csv, in the order of JUDGEMENT_COLUMNS."""
    columns = ", ".join(
        f'{"asked" if column in ASKED_COLUMNS else "judgements"}."{column}"'
        for column in judgements.JUDGEMENT_COLUMNS[: -len(judgements.NEW_COLUMNS)]
    )
    return f"""
        SELECT {columns} FROM asked JOIN judgements USING (request_sha256) WHERE model_id = ?
        ORDER BY asked.judge, prompts, grading, baseline, refs, question_id, turn, choice, "order",
                 repeat"""


def is_current(row: dict, answers: dict, answers_of: dict[str, dict]) -> bool:
    """Whether a judgement is of the answers that the run, and a pair's baseline, have now."""
    key = (row["question_id"], row["choice"])
    sides = [answers] if row["grading"] == "single" else [answers, answers_of[row["baseline"]]]
    if any(key not in side for side in sides):
        return False
    turns = [side[key]["turns"] for side in sides]
    return row["answer_sha256"] == answer_sha256(row["turn"], *turns)


# ---- questions that a sweep asks, by results folder ----------------------------------------------


def judgement_counts(results: Path, judge: str) -> dict[str, Verdicts]:
    """Judgements of `judge`, or of every judge if that is "", by run id.

    A run is missing from the result if nothing was ever asked about it.
    """
    query = """
        SELECT model_id, COUNT(*), SUM(COALESCE(status, '') != 'ok')
        FROM asked LEFT JOIN judgements USING (request_sha256)
        WHERE asked.judge = ?1 OR ?1 = '' GROUP BY model_id"""
    return {run: Verdicts(*counts) for run, *counts in read_rows(results, query, judge)}


def read_totals(results: Path) -> Totals | None:
    """Number and total cost of the folder's requests; None if nothing has been judged there."""
    rows = read_rows(results, "SELECT COUNT(*), COALESCE(SUM(cost_usd), 0) FROM judgements")
    return Totals(*rows[0]) if rows else None


def has_unreached(results: Path) -> bool:
    """Whether requests failed because the server was not reached or not able to answer.

    Such failures say nothing about the request; --retry_failed is likely to succeed.
    """
    query = """
        SELECT 1 FROM judgements
        WHERE status IN ('connection', 'timeout', 'http_429') OR status LIKE 'http_5%' LIMIT 1"""
    return bool(read_rows(results, query))


def read_rows(results: Path, query: str, *values: str) -> list[tuple]:
    """Rows of a query to a results folder's store; none if it has no store. Raises UserError."""
    path = results / "judgements.sqlite"
    if not path.is_file():
        return []
    try:
        with closing(sqlite3.connect(path)) as db:
            return db.execute(query, values).fetchall()
    except sqlite3.Error as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
