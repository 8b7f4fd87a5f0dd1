"""Answers on disk, one line per turn while the work runs and one row per question at the end.

    Store.add    -> results/<run_id>/<bench>/turns.<rank>.jsonl   appended after every turn
    Store.gather -> results/<run_id>/<bench>/answers.jsonl        FastChat's schema; turns.* removed

`Store.load` reads both, so a restart after a kill continues with the first missing turn.
"""

import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pref.answering.work import Bench, Item, Key, Loaded, Run, may_be_same_model
from pref.files import disk, mt_bench
from pref.files.console import UserError

# Of one turn. In a row of answers.jsonl each choice has `turns` for the texts, and a list with one
# value per turn for each of the others.
TURN_FIELDS = (
    "text",
    "tokens",
    "truncated",
    "overflow",
    "sent",
    "logp",
    "logp_base",
    "logp_tokens",
)
LISTS = TURN_FIELDS[1:]
# How a turn was computed: answers decoded together, and where.
ORIGIN = ("batch_size", "device")
# What a benchmark says of a question and its answers keep, where it does.
ABOUT_QUESTION = ("uid", "dataset", "subcategory", "cluster")


class Failure(NamedTuple):
    """A turn that could not be answered, and why."""

    item: Item
    turn: int
    reason: str


def changed_settings(old: dict | None, new: dict) -> list[str]:
    """In words, what differs between the settings of two answers."""
    old = old or {}
    return [
        f"{name} was {old.get(name)}, is {new.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
        and not (name == "model" and may_be_same_model(old.get(name), new.get(name)))
    ]


class Store:
    """The turns answered so far, in memory and on disk.

    settings: what an answer depends on besides question and adapter; written to each line, and
    answers with other settings are refused. batch_size, device: written to each row of
    answers.jsonl, because in bf16 an answer can change with them; the engine's are set once the
    model is loaded. rank: of this process, which writes turns.<rank>.jsonl only.
    """

    def __init__(
        self, runs: list[Run], bench: Bench, settings: dict, batch_size: int, rank: int = 0
    ):
        self.runs, self.bench, self.settings = runs, bench, settings
        self.batch_size, self.device, self.rank = batch_size, None, rank
        self.questions = {question["question_id"]: question for question in bench.questions}
        self.lock = threading.Lock()
        self.turns: dict[Key, dict] = {}
        self.stamps: dict[Key, float] = {}  # seconds since the epoch
        self.origins: dict[Key, dict] = {}  # fields of ORIGIN
        self.failures: list[Failure] = []  # of this start
        self.load(report=rank == 0)

    def folder(self, run: Run) -> Path:
        return run.folder / self.bench.name

    # ---- what is answered, what is missing -------------------------------------------------------

    def texts(self, item: Item) -> list[str]:
        """The answers so far, turn by turn, up to the first missing one."""
        keys = (Key.of(item, turn) for turn in range(len(item.question["turns"])))
        answers = (self.turns.get(key, {}).get("text") for key in keys)
        return list(itertools.takewhile(lambda text: text is not None, answers))

    def unanswered(self, items: list[Item]) -> list[int]:
        """Positions in `items` of those that lack a turn."""
        return [
            number
            for number, item in enumerate(items)
            if len(self.texts(item)) < len(item.question["turns"])
        ]

    def unscored(self, items: list[Item], loaded: Loaded) -> list[tuple[int, int]]:
        """(position in `items`, turn) of each answered turn that lacks log-probabilities under the
        model that is loaded: of the run whose model it is, or of those whose base it is.
        """
        field, ids = "logp_base", loaded.base_of
        if loaded.full is not None:
            field, ids = "logp", (loaded.full.run_id,)
        return [
            (number, turn)
            for number, item in enumerate(items)
            if item.run.run_id in ids
            for turn in range(len(self.texts(item)))
            if field not in self.turns[Key.of(item, turn)]
        ]

    def settings_of(self, run: Run) -> dict:
        """The settings of a run's answers: a model of its own is not quantised."""
        is_full = run.model is not None and self.settings.get("quant") is not None
        return self.settings | {"quant": "none"} if is_full else self.settings

    # ---- one line per turn -----------------------------------------------------------------------

    def add(self, item: Item, turn: int, **fields) -> None:
        """Append `fields` (of TURN_FIELDS) of one turn to the disk. Several threads may call it."""
        line = {
            "question_id": item.question["question_id"],
            "choice": item.choice,
            "turn": turn,
            "batch_size": self.batch_size,
            "device": self.device,
            **fields,
            "tstamp": time.time(),
            "adapter_sha256": item.run.sha256,
            "settings": self.settings_of(item.run),
            "question_sha256": mt_bench.question_sha256(
                item.question["turns"], item.question["temperature"]
            ),
        }
        key = Key.of(item, turn)
        with self.lock:
            path = self.folder(item.run) / f"turns.{self.rank}.jsonl"
            append_line(path, disk.jsonl_line(line))
            self.turns[key] = self.turns.get(key, {}) | fields

    def fail(self, failure: Failure) -> None:
        """Note a turn that could not be answered. Several threads may call it."""
        with self.lock:
            self.failures.append(failure)

    def load(self, report: bool = False) -> None:
        """Read all turns from disk, those of other ranks too. report: print how many turns of older
        weights are ignored.

        Raises UserError for answers with other settings or to other questions.
        """
        self.turns.clear()
        for run in self.runs:
            stale = 0
            files = sorted(self.folder(run).glob("turns.*.jsonl"))
            for path in (self.folder(run) / "answers.jsonl", *files):
                for line in read_turns(path):
                    if line.get("adapter_sha256") != run.sha256:
                        stale += "text" in line  # not a line with log-probabilities only
                        continue
                    self.check(run, path, line)
                    self.remember(run, line)
            if stale and report:
                kind = "adapter" if run.model is None else "model"
                print(
                    f"{run.run_id}: {stale} answered turns are from an older {kind}; "
                    "answering them again",
                    flush=True,
                )

    def remember(self, run: Run, line: dict) -> None:
        key = Key(
            run_id=run.run_id,
            question_id=line["question_id"],
            choice=line["choice"],
            turn=line["turn"],
        )
        fields = {name: line[name] for name in TURN_FIELDS if name in line}
        self.turns[key] = self.turns.get(key, {}) | fields
        self.stamps.setdefault(key, line["tstamp"])
        self.origins.setdefault(key, {name: line.get(name) for name in ORIGIN})

    def check(self, run: Run, path: Path, line: dict) -> None:
        """Raise UserError unless `line` answers today's question with today's settings."""
        changes = changed_settings(line.get("settings"), self.settings_of(run))
        if changes:
            raise UserError(
                f"{path}: holds answers with other settings ({', '.join(changes)}); "
                "use the same settings, or delete the file"
            )
        question = self.questions.get(line["question_id"])
        if question is None:  # not asked this time
            return
        expected = mt_bench.question_sha256(question["turns"], question["temperature"])
        if line.get("question_sha256", expected) != expected:
            raise UserError(
                f"{path}: question {line['question_id']} has changed since it was answered; "
                "delete the file, or restore the old questions"
            )

    # ---- one row per question --------------------------------------------------------------------

    def gather(self) -> dict[str, list[dict]]:
        """Write each run's answers.jsonl from its complete conversations. Returns the rows of this
        bench's questions by run id.
        """
        self.load()
        table = {}
        for run in self.runs:
            # 1) The rows: rebuilt for questions that are asked now; a row of another question
            # (--num_questions was larger) stays as it is.
            path = self.folder(run) / "answers.jsonl"
            old = {row["question_id"]: row for row in read_rows(path)}
            answered = {key.question_id for key in self.turns if key.run_id == run.run_id}
            rows = []
            for number in sorted(answered):
                row = old.get(number)
                if number in self.questions:
                    row = self.row(run, self.questions[number])
                if row is not None:
                    rows.append(row)
            table[run.run_id] = [row for row in rows if row["question_id"] in self.questions]

            # 2) To disk, if anything is new. Rows that are all from an older adapter are renamed,
            # so that nobody takes them for this adapter's.
            if rows and rows != list(old.values()):
                disk.write_jsonl(path, rows)
            elif old and not rows:
                path.rename(path.with_name("answers.old.jsonl"))

            self.write_failures(run)

            # 3) The turns go once every conversation that was begun has its row.
            if len(rows) == len(answered):
                for file in self.folder(run).glob("turns.*.jsonl"):
                    file.unlink()
        return table

    def write_failures(self, run: Run) -> None:
        """failures.jsonl: what this start could not answer; no file if there is nothing."""
        path = self.folder(run) / "failures.jsonl"
        rows = [
            {
                "question_id": failure.item.question["question_id"],
                "choice": failure.item.choice,
                "turn": failure.turn + 1,
                "reason": failure.reason,
            }
            for failure in self.failures
            if failure.item.run == run
        ]
        if rows:
            disk.write_jsonl(path, rows)
        else:
            path.unlink(missing_ok=True)

    def row(self, run: Run, question: dict) -> dict | None:
        """A row of answers.jsonl: FastChat's fields, then what reproduces the answer. None while
        turns are missing.
        """
        choices, stamps = [], []
        for choice in range(self.settings.get("num_choices", 1)):
            item = Item(run, question, choice)
            keys = [Key.of(item, turn) for turn in range(len(question["turns"]))]
            turns = [self.turns.get(key, {}) for key in keys]
            if any("text" not in turn for turn in turns):
                return None
            lists = {
                name: [turn[name] for turn in turns]
                for name in LISTS
                if all(name in turn for turn in turns)
            }
            choices.append({"index": choice, "turns": [turn["text"] for turn in turns], **lists})
            stamps += [self.stamps[key] for key in keys]
        number, texts = question["question_id"], [choice["turns"] for choice in choices]
        settings = self.settings_of(run)
        identity = [number, run.run_id, texts, run.sha256, settings]
        return {
            "question_id": number,
            "answer_id": disk.sha256_json(identity)[:22],
            "model_id": run.run_id,
            "choices": choices,
            "tstamp": max(stamps),
            "category": question.get("category"),
            **{key: question[key] for key in ABOUT_QUESTION if question.get(key) is not None},
            "temperature": question["temperature"],
            "adapter_sha256": run.sha256,
            "question_sha256": mt_bench.question_sha256(question["turns"], question["temperature"]),
            "settings": settings,
            **self.origins[Key.of(Item(run, question, 0), 0)],
        }


def read_rows(path: Path) -> list[dict]:
    """The rows of answers.jsonl; none if there is no such file."""
    return [row for _, row in disk.read_jsonl(path)] if path.is_file() else []


def read_turns(path: Path) -> Iterator[dict]:
    """One dict per turn, from answers.jsonl or from a turns.<rank>.jsonl. A torn last line of the
    latter is skipped. Raises UserError for a file of another form.
    """
    if not path.is_file():
        return
    if path.name != "answers.jsonl":
        content = path.read_bytes()
        lines = content[: content.rfind(b"\n") + 1].splitlines()
        try:
            yield from (json.loads(line) for line in lines)
        except ValueError:
            raise UserError(
                f"{path}: not valid JSON; delete the file, and its turns are answered again"
            ) from None
        return
    for number, row in disk.read_jsonl(path):
        try:
            for choice in row["choices"]:
                for turn, text in enumerate(choice["turns"]):
                    fields = {name: choice[name][turn] for name in LISTS if name in choice}
                    yield {**row, "choice": choice["index"], "turn": turn, "text": text, **fields}
        except (KeyError, TypeError, IndexError):
            raise UserError(
                f"{path}:{number}: not an answer row; delete the file and run the command again"
            ) from None


def append_line(path: Path, line: str) -> None:
    """Append one line, behind the last complete one: a kill may have left half a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode())
