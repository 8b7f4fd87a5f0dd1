"""the provider's batch endpoint"""

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pref.files import disk
from pref.files.console import UserError
from pref.judging import costs, server_judge, store
from pref.judging.protocol import Judge
from pref.model import server


def batch_lines(items: list[dict], pending: dict[str, dict]) -> Iterator[dict]:
    """The requests as an OpenAI batch file has them. custom_id: question, turn, order of a pair,
    hash.
    """
    seen = set()
    for item in items:
        key = item["request_sha256"]
        if key in pending and key not in seen:
            seen.add(key)
            body = {
                "model": item["judge"],
                "messages": item["request"]["messages"],
                **item["request"]["parameters"],
            }
            yield {
                "custom_id": custom_id(item),
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": body,
            }


def custom_id(item: dict) -> str:
    parts = (
        item["question_id"],
        item["turn"],
        *([item["order"]] if item["order"] else []),
        item["request_sha256"][:32],
    )
    return "-".join(map(str, parts))


def import_results(path: Path, db: sqlite3.Connection, items: list[dict], judge: Judge) -> None:
    """Take a batch's output file into the store. Raises UserError for a file of another form."""
    waiting, taken, strange = {custom_id(item): item for item in items}, Counter(), 0
    for _, row in disk.read_jsonl(path):
        item = waiting.get(row.get("custom_id"))
        if item is None:
            strange += 1
            continue
        response = row.get("response") or {}
        if row.get("error") or not isinstance(response, dict) or "status_code" not in response:
            reply = {"status": "batch_error", "judgement": json.dumps(row.get("error"))[:2000]}
        elif response["status_code"] != 200:
            reply = {
                "status": f"http_{response['status_code']}",
                "judgement": json.dumps(response.get("body"))[:2000],
            }
        else:
            reply = server_judge.read_reply(
                server.writable, json.dumps(response.get("body")), item["request"]
            )
            full = judge.cost(reply.get("prompt_tokens"), reply.get("completion_tokens"))
            reply["cost_usd"] = None if full is None else full * costs.BATCH_DISCOUNT
        store.save_reply(db, item["request_sha256"], item["request"], reply, judge.params_b)
        taken[reply["status"]] += 1
    if not taken:
        raise UserError(
            f"{path}: none of its {strange} lines belongs to these runs, judge and settings"
        )
    words = ", ".join(f"{count} {status}" for status, count in taken.most_common())
    print(
        f"{path}: {words}" + (f"; {strange} lines of other requests passed over" if strange else "")
    )
