"""judgements.sqlite: what was asked of a judge and what came back. Its tables are in schema.py.

One store per results folder. A *request* is everything that determines a judgement (judge, server,
messages, parameters, number of the repeat) and is identified by the SHA-256 of its JSON. An `Item`
is the need of one run's answer for one judgement; items of different runs with identical answers
share a request, which is then paid for once. Hence the tables `judgements`, one row per request
with its reply, and `asked`, one row per item. A third one, `judges`, holds each judge's identity.

    judge.py   find_pending -> note_judge, note_items -> save_reply, once per reply -> find_results
    sweep.sh   judgement_counts, read_totals, has_unreached: read-only, by results folder

Functions that take `db` work on the connection that `schema.open_store` returns.
"""

import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from pref.files.console import UserError
from pref.judging import benchmarks, identity, reading
from pref.judging.benchmarks import DEFAULT
from pref.judging.identity import Identity
from pref.judging.reading import Reading, Reply, Verdict
from pref.judging.schema import open_store, unusable  # noqa: F401  the store's way in


class Item(NamedTuple):
    """A judgement that a run's answer needs: a row of `asked`, and its request."""

    model_id: str
    question_id: int
    turn: int
    choice: int
    category: str | None
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
    judge_id: str = ""
    bench: str = DEFAULT
    known: Verdict | None = None  # the verdict, where nobody needs to be asked for it


ASKED_COLUMNS = tuple(name for name in Item._fields if name not in ("request", "known"))
# Columns of `asked` that do not tell which judgement is needed, see note_items.
NOT_THE_NEED = ("category", "answer_sha256", "request_sha256", "judge_id")
REPLY_COLUMNS = (
    *("status", "score", "winner", "judgement", "served_model", "system_fingerprint"),
    *("prompt_tokens", "completion_tokens", "cost_usd"),
    *("finish_reason", "reading", "rating_mass", "preference", "label", "token_logprobs"),
)
# What read_stored wants to know of a reply.
STORED_COLUMNS = (
    *("judgement", "finish_reason", "rating_mass", "token_logprobs"),
    *Verdict._fields,
)


# Of a request in `judgements`; MT-Bench's do not name their benchmark.
BENCH_OF_REQUEST = f"COALESCE(json_extract(request, '$.bench'), '{DEFAULT}')"


class Result(NamedTuple):
    """What a request has brought so far: columns of `judgements`."""

    status: str = "not judged"
    score: float | None = None
    winner: str | None = None  # of a pair: A, B or tie
    cost_usd: float | None = None
    served_model: str | None = None
    reading: str = ""  # see reading.py
    rating_mass: float | None = None  # local judge: probability of all verdicts together
    prompt_tokens: int | None = None
    preference: float | None = None  # of a pair: from 1 (the answer shown first) to 2
    label: str | None = None  # of a pair: the verdict in the judge's letters


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


# ---- writing -------------------------------------------------------------------------------------


def sync(db: sqlite3.Connection) -> None:
    """Sync what was committed to disk, so that it survives a power cut."""
    db.execute("PRAGMA wal_checkpoint(PASSIVE)")


def note_judge(db: sqlite3.Connection, who: Identity) -> None:
    """Record a judge's identity, before the first item that names it."""
    row = {
        "judge_id": who.id,
        "limitless_id": who.limitless_id,
        "judge": who.judge,
        "server": who.server,
        "parameters": json.dumps(who.parameters),
        "settings": json.dumps(who.settings),
        **who.reading._asdict(),
    }
    db.execute(
        f"INSERT OR REPLACE INTO judges ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})",
        tuple(row.values()),
    )


def note_items(db: sqlite3.Connection, items: list[Item]) -> None:
    """Record which answers need which requests, in one transaction.

    An item replaces the row of the same need: its request may have changed, because the answer is
    new, or its judge only in the limit of tokens. Rows of version 1.0.0, which kept no judge's
    identity, are replaced too, as that version would have done.
    """
    columns = ", ".join(f'"{column}"' for column in ASKED_COLUMNS)
    placeholders = ", ".join("?" * len(ASKED_COLUMNS))
    rows = [tuple(getattr(item, column) for column in ASKED_COLUMNS) for item in items]
    need = [column for column in ASKED_COLUMNS if column not in NOT_THE_NEED]
    same_need = " AND ".join(f'"{column}" = :{column}' for column in need)
    replaced = f"""
        DELETE FROM asked WHERE {same_need} AND judge_id != :judge_id
        AND (judge_id = '' OR judge_id IN (SELECT judge_id FROM judges WHERE limitless_id =
            (SELECT limitless_id FROM judges WHERE judge_id = :judge_id)))"""
    needs = [item._asdict() | {"request": None} for item in items]
    db.execute("BEGIN IMMEDIATE")
    db.executemany(replaced, needs)
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
        "limitless_sha256": identity.limitless_hash(request) if "parameters" in request else None,
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


def note_known(db: sqlite3.Connection, items: list[Item], params_b: float | None) -> None:
    """Store the verdicts for which nobody is asked."""
    for item in items:
        if item.known is not None:
            reply = item.known._asdict() | {"cost_usd": 0.0}
            save_reply(db, item.request_sha256, item.request, reply, params_b)


def known_requests(db: sqlite3.Connection) -> set[str]:
    """Hashes of the requests that were answered or have failed."""
    return {key for (key,) in db.execute("SELECT request_sha256 FROM judgements")}


def has_reply(db: sqlite3.Connection, key: str, reply: dict) -> bool:
    """Whether this very reply is stored: a file that is imported again costs nothing again."""
    columns = ("status", "judgement", "served_model", "prompt_tokens", "completion_tokens")
    row = db.execute(
        f"SELECT {', '.join(columns)} FROM judgements WHERE request_sha256 = ?", (key,)
    ).fetchone()
    return row == tuple(reply.get(column) for column in columns)


# ---- questions that judge.py asks ----------------------------------------------------------------


def find_results(
    db: sqlite3.Connection,
    items: list[Item],
    how: Reading = Reading(),  # noqa: B008  immutable
) -> dict[str, Result]:
    """Result by request hash, of the items' requests that were answered or have failed.

    how: the reading that turns replies into verdicts.
    """
    requests = {item.request_sha256: item.request for item in items}
    columns = list(dict.fromkeys((*STORED_COLUMNS, *Result._fields)))
    results = {}
    for key, *values in db.execute(f"SELECT request_sha256, {', '.join(columns)} FROM judgements"):
        if key in requests:
            row = read_stored(dict(zip(columns, values)), requests[key], how)
            results[key] = Result(**{name: row[name] for name in Result._fields})
    return results


def read_stored(row: dict, request: dict, how: Reading) -> dict:
    """The stored reply to `request` as `how` has it: `row` with its status and verdict.

    row: STORED_COLUMNS of `judgements`, which hold the verdict by the official reading. request:
    its messages are not looked at.
    """
    if row["rating_mass"] is not None:  # a local judge
        if row["status"] == "ok" and not row["rating_mass"] >= how.min_rating_mass:
            return row | Verdict("mass")._asdict()
        return row
    if how.verdict == reading.FIRST or row["status"] not in reading.READ_STATUSES:
        return row
    logprobs = json.loads(row["token_logprobs"]) if row["token_logprobs"] else None
    reply = Reply(row["judgement"] or "", row["finish_reason"], logprobs)
    verdict = benchmarks.read_reply(reply, request, how.verdict)
    return row | verdict._asdict()


def find_pending(
    db: sqlite3.Connection,
    items: list[Item],
    retry_failed: bool,
    how: Reading = Reading(),  # noqa: B008  immutable
) -> dict[str, dict]:
    """Requests still to be made by hash, each once, in the order of `items`.

    These are the requests that were never made and, with `retry_failed`, those that failed. What
    has a verdict by the official reading is never asked again, even if it has none by `how`.
    """
    official = Reading(min_rating_mass=0.0)
    done = {
        key
        for one in (official, how)
        for key, result in find_results(db, items, one).items()
        if result.status == "ok" or not retry_failed
    }
    done |= {item.request_sha256 for item in items if item.known is not None}
    return {item.request_sha256: item.request for item in items if item.request_sha256 not in done}


def spent_usd(db: sqlite3.Connection) -> float:
    """Total cost recorded for this results folder, in dollars: of all judges, failures included."""
    return db.execute("SELECT COALESCE(SUM(cost_usd), 0) FROM judgements").fetchone()[0]


def learned_lengths(db: sqlite3.Connection, judge: str, bench: str) -> Lengths:
    """How long this judge's requests and judgements of a benchmark have been, for an estimate of
    the next.
    """
    query = f"""
        SELECT COUNT(*), COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(completion_tokens), 0),
               COALESCE(SUM(LENGTH(request)), 0)
        FROM judgements WHERE judge = ? AND {BENCH_OF_REQUEST} = ?
        AND prompt_tokens > 0 AND completion_tokens > 0"""
    return Lengths(*db.execute(query, (judge, bench)).fetchone())


class Accepted(NamedTuple):
    """Parameters that a judge has accepted."""

    parameters: dict
    bench: str  # whose requests had them; "" if they were only recorded (a batch file was written)


def accepted_parameters(db: sqlite3.Connection, judge: str, server: str) -> list[Accepted]:
    """What this judge has accepted: the parameters of its successful requests to this server, then
    those that were recorded for it, each newest first. Requests of version 1.0.0, which kept no
    address, count for any server, and come last.
    """
    asked = f"""
        SELECT json_extract(request, '$.parameters') AS parameters, {BENCH_OF_REQUEST} AS bench
        FROM judgements WHERE judge = ? AND {{server}} AND status = 'ok' GROUP BY parameters, bench
        ORDER BY MAX(tstamp) DESC"""
    queries = (
        asked.format(server="json_extract(request, '$.server') = ?"),
        "SELECT parameters, '' FROM judges WHERE judge = ? AND server = ? ORDER BY rowid DESC",
        asked.format(server="json_extract(request, '$.server') IS NULL AND ? != ''"),
    )
    rows = [row for query in queries for row in db.execute(query, (judge, server))]
    return [Accepted(json.loads(parameters), bench) for parameters, bench in rows]


# ---- questions that a sweep asks, by results folder ----------------------------------------------


def judgement_counts(results: Path, judge: str, bench: str = DEFAULT) -> dict[str, Verdicts]:
    """Judgements of a benchmark by `judge`, or by every judge if that is "", by run id.

    Of judges of one name (other parameters, another server) the one that was asked last counts, for
    each way of grading, and what nobody has asked since version 1.0.0. A run is missing from the
    result if nothing was ever asked about it.
    """
    query = """
        WITH latest AS (
            SELECT judge_id, MAX(asked.rowid) FROM asked
            WHERE (judge = ?1 OR ?1 = '') AND {is_bench} GROUP BY judge, grading, prompts, refs)
        SELECT model_id, COUNT(*),
            SUM(COALESCE(status, '') != 'ok'
                OR COALESCE(rating_mass < COALESCE(min_rating_mass, ?2), FALSE))
        FROM asked LEFT JOIN judgements USING (request_sha256) LEFT JOIN judges USING (judge_id)
        WHERE (asked.judge = ?1 OR ?1 = '') AND {is_bench}
        AND (asked.judge_id = '' OR asked.judge_id IN (SELECT judge_id FROM latest))
        GROUP BY model_id"""
    values: list = [judge, reading.MIN_RATING_MASS, bench]
    schema = schema_of(results)
    if schema < 3 and bench != DEFAULT:  # it knew MT-Bench alone
        return {}
    query = query.format(is_bench="bench = ?3" if schema >= 3 else "?3 = ?3")
    if schema == 1:  # it kept one judge of a name
        query = """
            SELECT model_id, COUNT(*), SUM(COALESCE(status, '') != 'ok')
            FROM asked LEFT JOIN judgements USING (request_sha256)
            WHERE asked.judge = ?1 OR ?1 = '' GROUP BY model_id"""
        values = [judge]
    return {run: Verdicts(*counts) for run, *counts in read_rows(results, query, *values)}


def schema_of(results: Path) -> int:
    """The version of the folder's store; 0 without one."""
    rows = read_rows(results, "PRAGMA user_version")
    return rows[0][0] if rows else 0


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


def read_rows(results: Path, query: str, *values: str | float) -> list[tuple]:
    """Rows of a query to a results folder's store; none if it has no store. Raises UserError."""
    path = results / "judgements.sqlite"
    if not path.is_file():
        return []
    try:
        with closing(sqlite3.connect(path)) as db:
            return db.execute(query, values).fetchall()
    except sqlite3.Error as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
