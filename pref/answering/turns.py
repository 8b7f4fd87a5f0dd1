"""answers on disk, turn by turn"""

import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pref.files import disk
from pref.files.console import UserError


class Run(NamedTuple):
    """A run to answer for. adapter None is the untrained model."""

    folder: Path
    run_id: str
    adapter: Path | None
    sha256: str | None  # of the adapter's weights
    record: dict  # its args.json

    @property
    def name(self) -> str | None:
        """What the engine calls its adapter."""
        return None if self.adapter is None else self.run_id


class Bench(NamedTuple):
    """What is asked: questions with question_id, category, turns and temperature, and the folder of
    the answers.
    """

    name: str
    questions: list[dict]


def question_sha256(question: dict) -> str:
    return disk.sha256_json([question["turns"], question["temperature"]])


Key = tuple[str, int, int, int]  # run id, question id, choice, turn
TURN_FIELDS = ("text", "tokens", "truncated", "overflow", "logp", "logp_base", "logp_tokens")


class Store:
    """Turns answered so far. Each is appended to results/<run>/<bench>/turns.<rank>.jsonl as it
    comes; `gather` makes answers.jsonl of them.
    """

    def __init__(
        self, runs: list[Run], bench: Bench, settings: dict, batch_size: int, rank: int = 0
    ):
        self.runs, self.bench, self.settings, self.batch_size, self.rank = (
            runs,
            bench,
            settings,
            batch_size,
            rank,
        )
        self.questions = {q["question_id"]: q for q in bench.questions}
        self.lock = threading.Lock()
        self.turns: dict[Key, dict] = {}
        self.stamps: dict[Key, float] = {}
        self.load(say=rank == 0)

    def folder(self, run: Run) -> Path:
        return run.folder / self.bench.name

    def load(self, say: bool = False) -> None:
        """Read what stands on disk. Raises UserError for answers with other settings or to other
        questions.
        """
        self.turns.clear()
        for run in self.runs:
            stale = 0
            for path in (
                self.folder(run) / "answers.jsonl",
                *sorted(self.folder(run).glob("turns.*.jsonl")),
            ):
                for line in read_turns(path):
                    if line.get("adapter_sha256") != run.sha256:
                        stale += "text" in line
                        continue
                    self.check(path, line)
                    key = (run.run_id, line["question_id"], line["choice"], line["turn"])
                    self.turns[key] = self.turns.get(key, {}) | {
                        k: line[k] for k in TURN_FIELDS if k in line
                    }
                    self.stamps.setdefault(key, line["tstamp"])
            if stale and say:
                print(
                    f"{run.run_id}: {stale} answered turns are of an older adapter; answering anew",
                    flush=True,
                )

    def check(self, path: Path, line: dict) -> None:
        old = line.get("settings") or {}
        if different := [
            key for key in old.keys() | self.settings if old.get(key) != self.settings.get(key)
        ]:
            what = ", ".join(
                f"{key} was {old.get(key)}, is {self.settings.get(key)}"
                for key in sorted(different)
            )
            raise UserError(
                f"{path}: holds answers with other settings ({what}); use the same, or delete the file"
            )
        question = self.questions.get(line["question_id"])
        if question and line.get("question_sha256", question_sha256(question)) != question_sha256(
            question
        ):
            raise UserError(
                f"{path}: question {line['question_id']} was another when it was answered; delete the file, or go back "
                "to the old questions"
            )

    def add(self, run: Run, question: dict, choice: int, turn: int, **fields) -> None:
        key = (run.run_id, question["question_id"], choice, turn)
        line = {
            "question_id": question["question_id"],
            "choice": choice,
            "turn": turn,
            **fields,
            "tstamp": time.time(),
            "adapter_sha256": run.sha256,
            "settings": self.settings,
            "question_sha256": question_sha256(question),
        }
        with self.lock:
            path = self.folder(run) / f"turns.{self.rank}.jsonl"
            append_line(path, disk.jsonl_line(line))
            self.turns[key] = self.turns.get(key, {}) | fields

    def texts(self, run: Run, question: dict, choice: int) -> list[str]:
        """The answers so far, turn by turn."""
        keys = (
            (run.run_id, question["question_id"], choice, turn)
            for turn in range(len(question["turns"]))
        )
        found = (self.turns.get(key, {}).get("text") for key in keys)
        return list(itertools.takewhile(lambda text: text is not None, found))

    def gather(self) -> dict[str, list[dict]]:
        """Write each run's answers.jsonl from all that is complete. Returns the rows by run id."""
        self.load()
        table = {}
        for run in self.runs:
            asked = {key[1] for key in self.turns if key[0] == run.run_id}
            old = {row["question_id"]: row for row in read_rows(self.folder(run) / "answers.jsonl")}
            rows = []
            for number in sorted(asked):
                row = old.get(number)  # of a question that is not asked now: it stays
                if number in self.questions:
                    row = self.row(run, self.questions[number], row)
                rows += [row] if row else []
            table[run.run_id] = [row for row in rows if row["question_id"] in self.questions]
            if rows and rows != list(old.values()):
                disk.write_jsonl(self.folder(run) / "answers.jsonl", rows)
            elif old and not rows:  # all of an older adapter: nobody shall take them for this one's
                (self.folder(run) / "answers.jsonl").rename(self.folder(run) / "answers.old.jsonl")
            if len(rows) == len(asked):
                for path in self.folder(run).glob("turns.*.jsonl"):
                    path.unlink()
        return table

    def row(self, run: Run, question: dict, old: dict | None) -> dict | None:
        """A line of answers.jsonl: FastChat's fields, then what reproduces the answer. None while
        turns are missing.
        """
        choices, keys = [], []
        for choice in range(self.settings.get("num_choices", 1)):
            mine = [
                (run.run_id, question["question_id"], choice, turn)
                for turn in range(len(question["turns"]))
            ]
            if any("text" not in self.turns.get(key, {}) for key in mine):
                return None
            turns = [self.turns[key] for key in mine]
            lists = {
                f: [t[f] for t in turns] for f in TURN_FIELDS[1:] if all(f in t for t in turns)
            }
            choices.append({"index": choice, "turns": [turn["text"] for turn in turns], **lists})
            keys += mine
        texts = [choice["turns"] for choice in choices]
        return {
            "question_id": question["question_id"],
            "answer_id": disk.sha256_json(
                [question["question_id"], run.run_id, texts, run.sha256, self.settings]
            )[:22],
            "model_id": run.run_id,
            "choices": choices,
            "tstamp": max(self.stamps[key] for key in keys),
            "category": question.get("category"),
            "temperature": question["temperature"],
            "adapter_sha256": run.sha256,
            "question_sha256": question_sha256(question),
            "settings": self.settings,
            # in bf16 an answer can change with the rows beside it
            "batch_size": old["batch_size"] if old else self.batch_size,
        }


def read_rows(path: Path) -> list[dict]:
    return [row for _, row in disk.read_jsonl(path)] if path.is_file() else []


def read_turns(path: Path) -> Iterator[dict]:
    """Turns in answers.jsonl or in a file of turns, whose last line may be torn. Raises UserError
    for another form.
    """
    if not path.is_file():
        return
    if path.name != "answers.jsonl":
        text = path.read_bytes()
        lines = text[: text.rfind(b"\n") + 1].splitlines()
        try:
            yield from (json.loads(line) for line in lines)
        except ValueError:
            raise UserError(
                f"{path}: not valid JSON; delete the file, what it holds is answered again"
            ) from None
        return
    for number, row in disk.read_jsonl(path):
        try:
            for choice in row["choices"]:
                for turn, text in enumerate(choice["turns"]):
                    lists = {key: choice[key][turn] for key in TURN_FIELDS[1:] if key in choice}
                    yield {**row, "choice": choice["index"], "turn": turn, "text": text, **lists}
        except (KeyError, TypeError, IndexError):
            raise UserError(
                f"{path}:{number}: not an answer row; delete the file and run the command again"
            ) from None


def append_line(path: Path, line: str) -> None:
    """Append one line, behind the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":  # torn by a kill
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode())
