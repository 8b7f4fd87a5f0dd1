"""The provider's batch endpoint: half the price, an answer within a day.

    judge.py --dry_run --requests batch.jsonl     write_requests: the file to upload
    judge.py --import_results output.jsonl        import_results: the file that comes back

The file's format is that of OpenAI's batch API.
"""

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pref.files import disk
from pref.files.console import UserError
from pref.judging import costs, identity, server_judge, store
from pref.judging.judges import Judge
from pref.judging.store import Item
from pref.model import server


def write_requests(path: Path, items: list[Item], pending: dict[str, dict]) -> None:
    disk.write_jsonl(path, request_lines(items, pending))


def request_lines(items: list[Item], pending: dict[str, dict]) -> Iterator[dict]:
    """The pending requests as lines of a batch file, each request once, in the order of `items`."""
    seen = set()
    for item in items:
        key = item.request_sha256
        if key in pending and key not in seen:
            seen.add(key)
            yield {
                "custom_id": custom_id(item),
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {
                    "model": item.judge,
                    "messages": item.request["messages"],
                    **item.request["parameters"],
                },
            }


def custom_id(item: Item) -> str:
    """Question, turn, order of a pair, and half of the request's hash, e.g. "81-2-1-5a0c...".

    The endpoint allows 64 characters.
    """
    order = [item.order] if item.order else []
    return "-".join(map(str, [item.question_id, item.turn, *order, item.request_sha256[:32]]))


def import_results(path: Path, db: sqlite3.Connection, items: list[Item], judge: Judge) -> None:
    """Store the replies in a batch's output file.

    Raises UserError if no line of it belongs to `items`.
    """
    # A file that version 1.0.0 wrote has the keys of requests without the server.
    old = [
        item._replace(request_sha256=disk.sha256_json(identity.legacy(item.request)))
        for item in items
    ]
    asked = {custom_id(key): item for key, item in zip([*old, *items], [*items, *items])}
    statuses: Counter[str] = Counter()
    unknown = 0
    for number, row in disk.read_jsonl(path):
        if "body" in row and not {"response", "error"} & row.keys():
            raise UserError(
                f"{path}:{number}: not a result (no 'response'); give the batch's output file, not "
                "the file of requests"
            )
        key = row.get("custom_id")
        item = asked.get(key) if isinstance(key, str) else None
        if item is None:
            unknown += 1
            continue
        reply = read_row(row, item.request, judge)
        if store.has_reply(db, item.request_sha256, reply):
            statuses["imported before"] += 1
            continue
        store.save_reply(db, item.request_sha256, item.request, reply, judge.params_b)
        statuses[reply["status"]] += 1
    if not statuses:
        raise UserError(
            f"{path}: none of its {unknown} lines belongs to these runs, judge and settings; give "
            "the same options as when the requests were written, --judge_seed and --parameters "
            "included"
        )
    counts = ", ".join(f"{count} {status}" for status, count in statuses.most_common())
    ignored = f"; {unknown} lines of other requests ignored" if unknown else ""
    print(f"{path}: {counts}{ignored}")


def read_row(row: dict, request: dict, judge: Judge) -> dict:
    """The reply in one line of a batch's output file, as `Judge.ask` would return it."""
    response = row.get("response")
    status = response.get("status_code") if isinstance(response, dict) else None
    # 1) The batch did not make the request: it expired, or was cancelled.
    if status is None:
        error = json.dumps(row.get("error"))[: server_judge.MOST_ERROR_CHARS]
        return {"status": "batch_error", "judgement": error}
    # 2) The server refused it.
    body = response.get("body")
    body = body if isinstance(body, str) else json.dumps(body)
    if str(status) != "200":
        refused = str(status) == "400" and server_judge.names_moderation(body)
        reason = server.writable(body)[: server_judge.MOST_ERROR_CHARS]
        return {"status": "refused" if refused else f"http_{status}", "judgement": reason}
    # 3) A chat completion.
    reply = server_judge.read_reply(server.writable, body, request)
    full_price = judge.cost(reply.get("prompt_tokens"), reply.get("completion_tokens"))
    reply["cost_usd"] = None if full_price is None else full_price * costs.BATCH_DISCOUNT
    return reply
