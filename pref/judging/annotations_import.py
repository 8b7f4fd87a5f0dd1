"""Judgements that the package alpaca_eval has made: its annotations.json, imported.

    judge.py results/ --bench alpaca_eval --judge gpt-4-1106-preview --import_annotations FILE

An annotation belongs to an answer if the package's request for it is the one that would be sent:
instruction, both outputs, their order and the prompt are then the same.
"""

import json
import sqlite3
from collections import Counter
from pathlib import Path

from pref.files import disk, win_rates
from pref.files.console import UserError
from pref.judging import bench_alpaca_eval, store
from pref.judging.annotations import ANNOTATORS, annotator_of
from pref.judging.benchmark import Bench, preference_of
from pref.judging.judges import Judge
from pref.judging.store import Item
from pref.model import completions, server

TEXTS = ("instruction", "output_1", "output_2")


def import_annotations(
    path: Path, db: sqlite3.Connection, items: list[Item], judge: Judge, bench: Bench
) -> None:
    """Store the annotations in `path` that belong to `items`. A preference that is stored already
    stays, whatever the file says.

    Raises UserError for a file of another form, and if no annotation belongs here.
    """
    wanted = {key_of(item.request["messages"]): item for item in items if item.repeat == 0}
    template = bench.prompts[bench_alpaca_eval.NAME]["prompt_template"]
    of_model = {name for name, model in ANNOTATORS.items() if model == judge.name}
    by = {judge.name, annotator_of(judge.name, bench)} | of_model
    results = store.find_results(db, items)
    stored = {key for key, result in results.items() if result.status == "ok"}
    counts: Counter[str] = Counter()
    for number, row in enumerate(read_rows(path), 1):
        place = f"{path}: entry {number}"
        check_row(row, place)
        order = bench_alpaca_eval.order_of(row["instruction"])
        texts = [row[key] for key in TEXTS]
        item = wanted.get(key_of(bench_alpaca_eval.messages(template, *texts, order)))
        if row["annotator"] not in by:
            counts[f"by another annotator ({row['annotator']})"] += 1
        elif item is None:
            counts["of other answers, baselines or prompts"] += 1
        elif row.get("preference") is None:
            counts["without a preference"] += 1
        elif item.known is not None:
            counts["of equal outputs"] += 1
        elif item.request_sha256 in stored:
            counts["judged before"] += 1
        else:
            reply = reply_of(row, order)
            store.save_reply(db, item.request_sha256, item.request, reply, judge.params_b)
            stored.add(item.request_sha256)
            counts["ok"] += 1
    listed = ", ".join(f"{count} {what}" for what, count in counts.most_common())
    if not counts["ok"] and not counts["judged before"]:
        raise UserError(
            f"{path}: none of its annotations belongs to these runs and this judge ({listed}); the "
            "runs' answers must be those that were annotated, and --judge the annotator or its "
            f"model ({', '.join(f'{model} for {name}' for name, model in ANNOTATORS.items())})"
        )
    print(f"{path}: {listed}")


def read_rows(path: Path) -> list:
    rows = disk.read_json_value(path)
    if not isinstance(rows, list) or not rows:
        raise UserError(
            f"{path}: expected a JSON list with entries, an annotations.json of alpaca_eval"
        )
    return rows


def check_row(row, place: str) -> None:
    """Raise UserError, beginning with `place`, for a row that is no annotation."""
    disk.as_object(row, place)
    for key in (*TEXTS, "annotator"):
        if not isinstance(row.get(key), str):
            raise UserError(f"{place}: {key!r} must be text; is it an annotations.json?")
    value = row.get("preference")
    if value is not None and not (disk.is_number(value) and (value == 0 or 1 <= value <= 2)):
        raise UserError(f"{place}: 'preference' {value!r} is not from 1 to 2")
    try:
        "".join(row[key] for key in TEXTS).encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: its texts are not valid Unicode") from None


def key_of(messages: list[dict]) -> str:
    return json.dumps(messages, sort_keys=True)


def reply_of(row: dict, order: str) -> dict:
    """The reply (see `judges.Judge`) of an annotation: its preference as shown, its tokens."""
    raw = row.get("raw_completion") or row.get("preference_raw_completion")
    raw = raw if isinstance(raw, dict) else {}
    logprobs = completions.first_logprobs(raw, server.writable)
    text = raw.get("text")
    return {
        "status": "ok",
        "preference": preference_of(order, win_rates.checked(row["preference"])),
        "judgement": server.writable(text) if isinstance(text, str) else "",
        "token_logprobs": json.dumps(logprobs) if logprobs else None,
        "served_model": "",
    }
