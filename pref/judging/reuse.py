"""Judgements that are there already and serve for what is asked now. Nothing is paid for twice."""

import json
import sqlite3

from pref.files import disk
from pref.judging import identity, reading
from pref.judging.identity import Identity
from pref.judging.store import Item


def adopt(db: sqlite3.Connection, items: list[Item], server: str) -> int:
    """Give judgements by version 1.0.0, which kept no address, to the server that now asks for
    them: they get the keys under which `items` look for them. Returns how many.

    All in one transaction. A judgement that came to its end is found under any limit of tokens.
    """
    wanted = {identity.limitless_hash(identity.legacy(item.request)) for item in items}
    rows = db.execute(
        "SELECT request_sha256, request, limitless_sha256 FROM judgements "
        "WHERE limitless_sha256 IS NOT NULL AND json_extract(request, '$.server') IS NULL"
    ).fetchall()
    found = [(key, json.loads(request)) for key, request, limitless in rows if limitless in wanted]
    adopted = 0
    db.execute("BEGIN IMMEDIATE")
    for old_key, request in found:
        request = request | {"server": server}
        key = disk.sha256_json(request)
        text = json.dumps(request, ensure_ascii=False)
        limitless = identity.limitless_hash(request)
        adopted += db.execute(
            "UPDATE OR IGNORE judgements SET request_sha256 = ?, request = ?, limitless_sha256 = ? "
            "WHERE request_sha256 = ?",
            (key, text, limitless, old_key),
        ).rowcount
        db.execute("UPDATE asked SET request_sha256 = ? WHERE request_sha256 = ?", (key, old_key))
    db.execute("COMMIT")
    return adopted


def point_to_stored(db: sqlite3.Connection, items: list[Item]) -> list[Item]:
    """`items`, those that are not judged yet pointed to a judgement that serves as well.

    That is one under a lower limit of tokens which came to its end with a verdict, so that a higher
    limit would have changed nothing; or, in a dry run, which adopts nothing, one by version 1.0.0.
    """
    rows = db.execute(
        "SELECT request_sha256, limitless_sha256, status, finish_reason, "
        "COALESCE(json_extract(request, '$.parameters.max_completion_tokens'), "
        "json_extract(request, '$.parameters.max_tokens')) FROM judgements"
    ).fetchall()
    known = {key for key, *_ in rows}
    ended: dict[str, list[tuple[int, str]]] = {}  # limitless hash -> limit and key
    for key, limitless, status, finish, limit in rows:
        if limitless and status == "ok" and finish in reading.ENDED and isinstance(limit, int):
            ended.setdefault(limitless, []).append((limit, key))

    def stored_key(item: Item) -> str:
        if item.request_sha256 in known:
            return item.request_sha256
        if (old := disk.sha256_json(identity.legacy(item.request))) in known:
            return old
        parameters = item.request["parameters"]
        limits = [parameters[name] for name in identity.TOKEN_LIMITS if name in parameters]
        for request in (item.request, identity.legacy(item.request)):
            for limit, key in sorted(ended.get(identity.limitless_hash(request), ()), reverse=True):
                if limits and limit <= max(limits):
                    return key
        return item.request_sha256

    return [item._replace(request_sha256=stored_key(item)) for item in items]


def other_servers(db: sqlite3.Connection, who: Identity) -> list[str]:
    """Other servers under which this judge has verdicts."""
    query = """
        SELECT DISTINCT json_extract(request, '$.server') FROM judgements
        WHERE judge = ? AND status = 'ok'"""
    servers = {server for (server,) in db.execute(query, (who.judge,))}
    return sorted(servers - {None, who.server})
