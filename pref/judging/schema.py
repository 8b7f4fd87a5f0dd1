"""judgements.sqlite: its tables, opening it, and bringing an older one up to date.

Version 1.0.0 of the toolkit wrote schema 1, version 1.1.0 schema 2. `open_store` brings such a file
to schema 3 in one transaction: a kill in between leaves the old schema. Nothing that was paid for
is lost or changed; texts of schema 1 are read again, because the reading has become stricter
(reading.py). What was judged before schema 3 belongs to MT-Bench.
"""

import json
import sqlite3
import sys
from pathlib import Path

from pref.files.console import UserError
from pref.judging import bench_mt_bench, identity, reading

SCHEMA_VERSION = 3  # PRAGMA user_version

JUDGEMENTS = """
CREATE TABLE IF NOT EXISTS judgements (
    request_sha256 TEXT PRIMARY KEY,  -- SHA-256 of the request's JSON with sorted keys
    judge TEXT NOT NULL,              -- --judge, as given
    judge_params_b REAL,              -- billions of parameters, NULL if unknown
    request TEXT NOT NULL,            -- JSON, see identity.Identity.request
    status TEXT NOT NULL,             -- "ok", or why there is no score and no winner
    score REAL,                       -- of a single answer, by the official reading
    winner TEXT,                      -- of a pair: "A", "B" or "tie", as shown to the judge
    judgement TEXT,                   -- the judge's text, or the text of the error
    served_model TEXT,                -- the model that the server says it ran
    system_fingerprint TEXT,          -- the server's own version mark
    prompt_tokens INTEGER,
    completion_tokens INTEGER,        -- thoughts included
    cost_usd REAL,                    -- of all tries together; NULL without a price
    tries INTEGER NOT NULL,           -- 1, plus one for each retry after a failure
    tstamp REAL NOT NULL              -- when the last try was stored, Unix time in seconds
)"""
# What later schemas added, so that every way to the newest one ends in the same tables.
NEW_COLUMNS = {
    2: {
        "finish_reason": "TEXT",  # as the server gave it; NULL if it gave none
        "reading": "TEXT",  # "", "fallback", "several" or "equal", see reading.py
        "rating_mass": "REAL",  # local judge: probability of all verdicts together
        "limitless_sha256": "TEXT",  # see identity.limitless_hash
    },
    3: {
        "preference": "REAL",  # of a pair, as shown: from 1 (the first answer) to 2
        "label": "TEXT",  # of a pair, as shown: a verdict in the judge's letters, such as A>>B
        "token_logprobs": "TEXT",  # JSON: log-probabilities of the first token's alternatives
    },
}
# Columns without a meaning for single grading are '', not NULL: a primary key does not treat two
# NULLs as equal. judge_id is '' for what version 1.0.0 asked and nobody has asked since.
ASKED = """
CREATE TABLE IF NOT EXISTS asked (
    model_id TEXT,        -- run id of the answer
    question_id INTEGER,
    turn INTEGER,         -- from 1
    choice INTEGER,       -- number of the answer, if a run has several per question
    category TEXT,        -- of the question
    grading TEXT,         -- "single", "pair" or "reward"
    "order" TEXT,         -- of a pair: "1" shows the run's answer as A, "2" as B
    baseline TEXT,        -- whose the other answer is: a run's id, or an outside model's name
    judge TEXT,
    prompts TEXT,         -- the benchmark's name, or "own" for prompts that are not its own
    repeat INTEGER,       -- 0, 1, ... with --repeats
    refs TEXT,            -- "original" or "corrected:HASH"
    answer_sha256 TEXT,   -- of the answers shown, see mt_bench.answer_sha256
    request_sha256 TEXT,  -- the request that judges them: a key of `judgements`
    judge_id TEXT DEFAULT '',         -- a key of `judges`
    bench TEXT DEFAULT 'mt_bench',    -- the benchmark's name
    PRIMARY KEY (model_id, question_id, turn, choice, grading, "order", baseline, judge, prompts,
                 repeat, refs, judge_id, bench)
)"""
JUDGES = """
CREATE TABLE IF NOT EXISTS judges (
    judge_id TEXT PRIMARY KEY,     -- identity.Identity.id
    limitless_id TEXT NOT NULL,    -- identity.Identity.limitless_id
    judge TEXT NOT NULL,
    server TEXT NOT NULL,          -- address or name; '' for a local judge
    parameters TEXT NOT NULL,      -- JSON
    settings TEXT NOT NULL,        -- JSON: parameters, and a reading that is not the official one
    verdict TEXT NOT NULL,         -- how its replies are read, see reading.Reading
    min_rating_mass REAL NOT NULL
)"""


def open_store(path: Path) -> sqlite3.Connection:
    """Open the judgements of a results folder; create them if there are none.

    Every statement is a transaction of its own (isolation_level None), except in functions that say
    otherwise. The connection may be used by several threads, one at a time: `calls.Calls.lock` sees
    to that. Raises UserError if the file is no judgement store, is locked, or has a newer schema.
    """
    try:
        db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise UserError(
                f"{path}: written by another version of this toolkit (schema {version}, expected "
                f"{SCHEMA_VERSION}); judge with that version, or move the file away: everything "
                "is then asked, and paid for, again"
            )
        db.execute("PRAGMA journal_mode = WAL")
        # A commit survives kill -9 as soon as it returns. It survives a power cut once it is synced
        # to disk, which `store.sync` does every few seconds: to sync each commit would take longer
        # than the calls do.
        db.execute("PRAGMA synchronous = NORMAL")
        if version < SCHEMA_VERSION:
            bring_up_to_date(db, path, version)
    except sqlite3.Error as error:
        raise unusable(path, error) from None
    return db


def unusable(path: Path, error: sqlite3.Error) -> UserError:
    """What an error of SQLite means to the user."""
    return UserError(
        f"{path}: cannot be used as a judgement store: {error}; if another program has it open, "
        "close that program; if the disk is full, free some space; if the file is damaged, move "
        "it away: everything is then asked, and paid for, again"
    )


def bring_up_to_date(db: sqlite3.Connection, path: Path, version: int) -> None:
    """Create the tables, or change those of an older version, in one transaction."""
    db.execute("BEGIN IMMEDIATE")
    try:
        # 1) Judgements, with the new columns.
        db.execute(JUDGEMENTS)
        for since, columns in NEW_COLUMNS.items():
            for name, kind in columns.items() if version < since else ():
                db.execute(f"ALTER TABLE judgements ADD COLUMN {name} {kind}")
        # 2) What was asked: SQLite cannot change a primary key, hence a new table.
        old = ", ".join(f'"{name}"' for _, name, *_ in db.execute("PRAGMA table_info(asked)"))
        if old:
            db.execute("ALTER TABLE asked RENAME TO old_asked")
        db.execute(ASKED)
        if old:
            db.execute(f"INSERT INTO asked ({old}) SELECT {old} FROM old_asked")
            db.execute("DROP TABLE old_asked")
        db.execute(JUDGES)
        # 3) The replies of schema 1, read by today's rules.
        changed = sum(read_again(db, key) for (key,) in all_keys(db)) if version < 2 else 0
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        db.execute("COMMIT")
    except BaseException:
        db.execute("ROLLBACK")
        raise
    if changed:
        print(
            f"{path}: {changed} judgements by version 1.0.0 are read differently now: verdicts in "
            "a judge's thoughts, or in single brackets of a judgement that was cut off or has "
            "double ones, no longer count",
            file=sys.stderr,
        )


def all_keys(db: sqlite3.Connection) -> list[tuple[str]]:
    return db.execute("SELECT request_sha256 FROM judgements").fetchall()


def read_again(db: sqlite3.Connection, key: str) -> bool:
    """Fill the new columns of a reply that schema 1 stored. Whether its verdict has changed."""
    columns = ("request", "status", "score", "winner", "judgement", "completion_tokens")
    query = f"SELECT {', '.join(columns)} FROM judgements WHERE request_sha256 = ?"
    old = dict(zip(columns, db.execute(query, (key,)).fetchone()))
    request = json.loads(old["request"])
    parameters = request.get("parameters", {})
    new = {"limitless_sha256": None, "finish_reason": None, "reading": "", "rating_mass": None}
    new |= {name: old[name] for name in ("status", "score", "winner")}
    if "method" in parameters:  # a local judge: its text is the JSON of the probabilities
        if old["status"] == "ok":
            new["rating_mass"] = sum(json.loads(old["judgement"]).values())
    elif parameters:
        new["limitless_sha256"] = identity.limitless_hash(request)
        if old["status"] in reading.READ_STATUSES:
            # Schema 1 did not keep the finish_reason; the count of tokens tells it.
            new["finish_reason"] = finish_reason(old, parameters)
            finish = new["finish_reason"] or "stop"
            reply = reading.Reply(old["judgement"] or "", finish)
            new |= bench_mt_bench.read_reply(reply, request)._asdict()
    assignments = ", ".join(f"{name} = ?" for name in new)
    db.execute(
        f"UPDATE judgements SET {assignments} WHERE request_sha256 = ?", (*new.values(), key)
    )
    return any(new[name] != old[name] for name in ("score", "winner"))


def finish_reason(old: dict, parameters: dict) -> str | None:
    """Why a judgement of schema 1 ended: "stop", "length", or None if that is not known."""
    given = [parameters.get(name) for name in identity.TOKEN_LIMITS]
    limit = max((value for value in given if isinstance(value, int)), default=0)
    if old["status"] == "length":
        return "length"
    if limit <= 0 or old["completion_tokens"] is None:
        return None
    return "length" if old["completion_tokens"] >= limit else "stop"
