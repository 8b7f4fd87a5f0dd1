"""The archive of a search: archive.jsonl, to which events are only ever added, one a line.

    {"event": "proposed", "id": "p0031", "round": 2, "by": "evolve", "operator": "mutate beta", ...}
    {"event": "stopped", "id": "p0031", "at": "duplicate", "why": ..., "near": "p0007", ...}
    {"event": "step", "name": "round 2"}

What the search knows follows from the events alone (`State`). They are written a step at a time: a
round of proposals, or a rung of training. An event "step" ends it. A search that was killed drops
the events of a step that had not ended and takes the step again, which gives the same events, for
they depend on the steps before and on the seed. There is no time in them.

| event | fields |
|---|---|
| proposed | id, round, by, operator, parents, name, sha256 (of the text), usd, genome |
| read | id, sha256 (of loss.py), size (steps of the program), parameters |
| fingerprint | id, cell, gradient (by rho, relative to DPO's) |
| proxy | id, acc, bits, difference (to DPO), se (of the difference), seeds (number) |
| stopped | id, at, why; near and distance of a duplicate |
| ended | by, why: a proposer that proposes no more |
| rung | k, ids, seeds: what is trained next |
| trained | id, seed, run_id, status, acc_ref, correct (1, 0 or = a pair), rung |
| looked | ids, seeds, again: from here on the confirmation's pairs have been read |
| confirmed | verdict, ids |
| step | name |
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pref.discovery.proposals import Proposal
from pref.files import disk
from pref.files.console import UserError

SEED = "seed"  # the proposer of the archive's seeds
TIE = "="


@dataclass
class Entry:
    """What the events say about a candidate."""

    id: str
    round: int
    by: str
    operator: str
    parents: list[str]
    name: str
    usd: float = 0.0
    genome: dict | None = None
    sha256: str | None = None  # of loss.py
    size: int = 0
    parameters: dict[str, float] = field(default_factory=dict)
    cell: str | None = None
    gradient: dict[str, float] = field(default_factory=dict)
    proxy: dict | None = None
    runs: dict[int, dict] = field(default_factory=dict)  # `trained` events by seed
    stopped: dict | None = None

    @property
    def label(self) -> str:
        """The name of the loss: p0031_blend."""
        return f"{self.id}_{self.name}"

    @property
    def reached_proxy(self) -> bool:
        """Whether it passed everything that comes before the proxy, and the proxy itself."""
        at = self.stopped["at"] if self.stopped else "rung"
        return self.cell is not None and at.startswith("rung")


@dataclass
class State:
    """The archive as of some step."""

    entries: dict[str, Entry] = field(default_factory=dict)  # by id, in order
    steps: list[str] = field(default_factory=list)  # that have ended
    rungs: list[dict] = field(default_factory=list)
    ended: dict[str, str] = field(default_factory=dict)  # why, by proposer
    looked: list[dict] = field(default_factory=list)
    confirmed: list[dict] = field(default_factory=list)

    @property
    def dpo(self) -> Entry | None:
        """DPO is always the first candidate."""
        return next(iter(self.entries.values()), None)

    def next_number(self) -> int:
        return len(self.entries) + 1

    def note(self, event: dict) -> None:
        kind, entry = event["event"], self.entries.get(event.get("id", ""))
        if kind == "proposed":
            fields = ("id", "round", "by", "operator", "parents", "name", "usd", "genome")
            self.entries[event["id"]] = Entry(**{name: event[name] for name in fields})
        elif kind == "read":
            entry.sha256, entry.size = event["sha256"], event["size"]
            entry.parameters = event["parameters"]
        elif kind == "fingerprint":
            entry.cell, entry.gradient = event["cell"], event["gradient"]
        elif kind == "proxy":
            entry.proxy = event
        elif kind == "stopped":
            entry.stopped = entry.stopped or event
        elif kind == "trained":
            entry.runs[event["seed"]] = event
        elif kind == "rung":
            self.rungs.append(event)
        elif kind == "ended":
            self.ended[event["by"]] = event["why"]
        elif kind == "looked":
            self.looked.append(event)
        elif kind == "confirmed":
            self.confirmed.append(event)
        elif kind == "step":
            self.steps.append(event["name"])


def state_of(events: Iterable[dict]) -> State:
    state = State()
    for event in events:
        state.note(event)
    return state


class Archive:
    """archive.jsonl of a search's folder, and the files of its candidates.

    name: "archive", or "control" of the random search beside it, whose candidates' files are in
    control/ and not in proposals/.
    """

    def __init__(self, folder: Path, name: str = "archive"):
        self.folder, self.name = Path(folder), name
        self.path = self.folder / f"{name}.jsonl"
        self.events: list[dict] = []
        self._state = State()

    @classmethod
    def open(cls, folder: Path, name: str = "archive") -> "Archive":
        """The archive for writing: what follows its last ended step is dropped. Raises UserError,
        with file and line, for a line that is no event.
        """
        archive = cls(folder, name)
        kept = archive.load()
        if archive.path.is_file() and archive.path.stat().st_size > kept:
            with open(archive.path, "r+b") as file:
                file.truncate(kept)
                os.fsync(file.fileno())
        return archive

    @classmethod
    def read(cls, folder: Path, name: str = "archive") -> "Archive":
        """The archive for reading, also while a search writes to it."""
        archive = cls(folder, name)
        archive.load()
        return archive

    def load(self) -> int:
        """Read the events of ended steps. Returns the number of bytes that these take."""
        if not self.path.is_file():
            return 0
        waiting, position, kept = [], 0, 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                position += len(line)
                if not line.endswith(b"\n"):
                    break
                event = disk.parse_object(line, f"{self.path}:{number}")
                waiting.append(event)
                if event.get("event") == "step":
                    self.take(waiting, f"{self.path}:{number}")
                    waiting, kept = [], position
        return kept

    def take(self, events: list[dict], place: str) -> None:
        try:
            for event in events:
                self._state.note(event)
        except (KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"{place}: a step with an event that does not fit ({error!r}); the file was "
                "changed by hand, or by another version: restore it, or search in a new folder"
            ) from None
        self.events += events

    def append_step(self, name: str, events: list[dict]) -> None:
        """Add the events of a step, and the one that ends it, in one write that is on disk when
        this returns. Raises OSError on a full disk, with the file as it was before.
        """
        events = [*events, {"event": "step", "name": name}]
        content = "".join(line_of(event) for event in events).encode()
        self.folder.mkdir(parents=True, exist_ok=True)
        before = self.path.stat().st_size if self.path.is_file() else 0
        try:
            with open(self.path, "ab", buffering=0) as file:
                write_all(file, content)
                os.fsync(file.fileno())
        except OSError:
            if self.path.is_file():
                os.truncate(self.path, before)
            raise
        self.take([json.loads(line) for line in content.splitlines()], str(self.path))

    def append(self, event: dict) -> None:
        """Add an event that is a step of its own."""
        self.append_step(event["event"], [event])

    def state(self) -> State:
        """What follows from the events of all ended steps; not a copy."""
        return self._state

    def has(self, step: str) -> bool:
        return step in self._state.steps

    # ---- the candidates' files

    def folder_of(self, id: str) -> Path:
        return self.folder / ("proposals" if self.name == "archive" else self.name) / id

    def loss_file(self, id: str) -> Path:
        return self.folder_of(id) / "loss.py"

    def write_proposal(self, id: str, proposal: Proposal) -> None:
        """What the proposer wrote, which is never executed."""
        folder = self.folder_of(id)
        disk.write_text(folder / "original.txt", proposal.original or proposal.text)
        disk.write_text(folder / "thought.txt", proposal.thought)

    def write_program(self, id: str, text: str, selftest: dict) -> None:
        disk.write_text(self.loss_file(id), text)
        disk.write_json(self.folder_of(id) / "selftest.json", selftest)

    def text_of(self, id: str) -> str:
        """The program; "" of a candidate that could not be read."""
        path = self.loss_file(id)
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def check_program(self, id: str) -> None:
        """Raise UserError if loss.py is not what the search printed."""
        path, expected = self.loss_file(id), self._state.entries[id].sha256
        if not path.is_file() or disk.sha256_file(path) != expected:
            raise UserError(
                f"{path}: is not the file that the search wrote (sha256 {expected}); restore it, "
                "or search in a new folder"
            )

    def write_field(self, id: str, values: np.ndarray) -> None:
        """The fingerprint, (n,) float32."""
        disk.write_bytes(self.folder_of(id) / "field.f32", values.astype("<f4").tobytes())

    def field_of(self, id: str) -> np.ndarray | None:
        path = self.folder_of(id) / "field.f32"
        return np.frombuffer(path.read_bytes(), "<f4").astype(float) if path.is_file() else None

    def write_proxy(self, id: str, outcome: dict) -> None:
        disk.write_json(self.folder_of(id) / "proxy.json", outcome)

    def proxy_of(self, id: str) -> dict | None:
        path = self.folder_of(id) / "proxy.json"
        return disk.read_json(path) if path.is_file() else None


def line_of(event: dict) -> str:
    """One line of ASCII, whatever a name contains; a number that is not finite becomes null."""
    return json.dumps(disk.finite_or_null(event), allow_nan=False) + "\n"


def write_all(file, content: bytes) -> None:
    """A single write of a raw file may write a part, and says so."""
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


# ---- right and wrong, a character a pair --------------------------------------------------------


def encode(correct: Iterable[float]) -> str:
    """1, 0.5 and 0 a pair as a text: "1=0"."""
    return "".join({1.0: "1", 0.5: TIE, 0.0: "0"}[float(value)] for value in correct)


def decode(text: str) -> np.ndarray:
    """(pairs,) of 1, 0.5 and 0."""
    return np.array([{"1": 1.0, TIE: 0.5, "0": 0.0}[letter] for letter in text])
