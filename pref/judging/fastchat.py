"""Judgements that FastChat's gen_judgment.py has made: model_judgment/*.jsonl, imported.

    judge.py results/ --judge gpt-4 --import_fastchat model_judgment/gpt-4_single.jsonl

A row belongs to an answer if it holds exactly the prompt that would be sent for this answer:
question, answer, reference and template are then the same. The names of models do not count.
"""

import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pref.files import disk
from pref.files.console import UserError
from pref.judging import bench_mt_bench, reading, store
from pref.judging.judges import Judge
from pref.judging.run_answers import FAILED
from pref.judging.store import Item
from pref.model import server


class Judged(NamedTuple):
    """One judgement of a FastChat row: a rating, or one order of a pair."""

    judge: str
    prompt: str
    text: str


def import_judgements(path: Path, db: sqlite3.Connection, items: list[Item], judge: Judge) -> None:
    """Store the judgements in `path` that belong to `items`. What is stored already stays.

    FastChat keeps no finish_reason; its judgements are taken as complete. Raises UserError if none
    belongs here.
    """
    wanted: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        if item.repeat == 0:
            wanted[item.request["messages"][-1]["content"]].append(item)
    counts: Counter[str] = Counter()
    for number, row in disk.read_jsonl(path):
        for judged in judgements_of(row, f"{path}:{number}"):
            found = wanted.get(judged.prompt)
            if judged.judge != judge.name:
                counts[f"by another judge ({judged.judge})"] += 1
            elif not found:
                counts["of other answers, prompts or references"] += 1
            elif judged.text.strip() == FAILED:
                counts[f"without a judgement ({FAILED})"] += 1
            else:
                reply = reply_of(judged.text, found[0])
                store.save_reply(
                    db, found[0].request_sha256, found[0].request, reply, judge.params_b
                )
                counts[reply["status"]] += 1
    listed = ", ".join(f"{count} {what}" for what, count in counts.most_common())
    if not counts.keys() & set(reading.READ_STATUSES):
        raise UserError(
            f"{path}: none of its judgements belongs to these runs and this judge ({listed}); "
            "the runs' answers and the judge prompts must be those that FastChat used, and --judge "
            "the name in the file"
        )
    print(f"{path}: {listed}")


def judgements_of(row: dict, place: str) -> Iterator[Judged]:
    """The judgements in a row: one of single grading, two of a pair. Raises UserError."""
    games = (("user_prompt", "judgment"),)
    if "g1_judgment" in row:
        games = (("g1_user_prompt", "g1_judgment"), ("g2_user_prompt", "g2_judgment"))
    judge = row.get("judge")
    name = judge[0] if isinstance(judge, list) and judge else judge
    for prompt, text in games:
        if not all(isinstance(value, str) for value in (name, row.get(prompt), row.get(text))):
            raise UserError(
                f"{place}: not a judgement of FastChat's (judge, {prompt}, {text}); give a file of "
                "its model_judgment folder"
            )
        yield Judged(name, row[prompt], row[text])


def reply_of(text: str, item: Item) -> dict:
    """The reply (see `judges.Judge`) for a judgement's text."""
    verdict = bench_mt_bench.read_reply(reading.Reply(text, "stop"), item.request)
    return verdict._asdict() | {"judgement": server.writable(text), "served_model": ""}
