"""What the report shows, read from a search's folder: every proposal with its fate and its numbers.

    settings.json, split.json, archive.jsonl, control.jsonl, confirmation.json
    proposals/<id>/{loss.py, original.txt, thought.txt}, results/<run_id>/val_pairs.jsonl

Names, thoughts and original texts come from a model. They are text here and nothing else.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pref.discovery import estimates, winner
from pref.discovery.archive import SEED, Archive, Entry, State
from pref.discovery.estimates import Gain
from pref.files import disk


@dataclass
class Candidate:
    """A proposal as the report shows it."""

    entry: Entry
    gain: Gain | None  # None: never measured, or unfit
    rung: int | None = None  # the last that it was in
    text: str = ""  # loss.py
    original: str = ""
    thought: str = ""
    copies: list[str] = field(default_factory=list)  # ids of its duplicates, which were refused

    @property
    def id(self) -> str:
        return self.entry.id

    @property
    def number(self) -> int:
        """The place in the order of proposals."""
        return int("".join(filter(str.isdigit, self.id)) or 0)

    @property
    def label(self) -> str:
        return self.entry.label


class Story(NamedTuple):
    """A search as the report tells it."""

    folder: Path
    settings: dict
    state: State
    candidates: list[Candidate]  # in order of id
    control: list[Candidate]
    confirmation: dict | None
    pairs: int | None  # that the search measured accuracy on
    margins: np.ndarray  # (n,) nats: rho of these pairs at the last step of DPO's runs

    @property
    def dpo(self) -> Candidate | None:
        return self.candidates[0] if self.candidates else None

    @property
    def by_id(self) -> dict[str, Candidate]:
        return {one.id: one for one in self.candidates}

    @property
    def proposers(self) -> list[str]:
        return list(dict.fromkeys(one.entry.by for one in self.candidates))

    @property
    def ranking(self) -> list[Candidate]:
        """Proposals, the best first: the one of best.py, then by shrunk gain, those still in the
        race before all others. Seeds are left out: nobody has discovered them.
        """
        first = [winner.best_of(self.state, self.confirmation), *winner.ranking(self.state)]
        ids = list(dict.fromkeys(filter(None, first)))
        rest = [one for one in self.candidates if one.gain and one.entry.by != SEED]
        rest.sort(key=lambda one: (one.gain.measured != "trained", -one.gain.gain, one.id))
        return [self.by_id[id] for id in dict.fromkeys([*ids, *(one.id for one in rest)])]


def read_story(folder: Path, archive: Archive) -> Story:
    """The story of the search in `folder`. Raises UserError for a file that cannot be read."""
    candidates = read_candidates(archive)
    return Story(
        folder=folder,
        settings=optional_json(folder / "settings.json") or {},
        state=archive.state(),
        candidates=candidates,
        control=read_candidates(Archive.read(folder, "control")),
        confirmation=optional_json(folder / "confirmation.json"),
        pairs=count_pairs(folder),
        margins=visited_margins(folder),
    )


def read_candidates(archive: Archive) -> list[Candidate]:
    """Every proposal of an archive with its texts and its numbers, in order of id."""
    state = archive.state()
    gains = estimates.gains(state)
    found = {id: Candidate(entry, gains.get(id)) for id, entry in state.entries.items()}
    for id, one in found.items():
        one.text, one.original, one.thought = (
            read_text(archive.folder_of(id) / name)
            for name in ("loss.py", "original.txt", "thought.txt")
        )
        near = (one.entry.stopped or {}).get("near")
        if near in found:
            found[near].copies.append(id)
    for event in state.rungs:
        for id in event["ids"]:
            found[id].rung = event["k"]
    return list(found.values())


# ---- files ---------------------------------------------------------------------------------------


def optional_json(path: Path) -> dict | None:
    return disk.read_json(path) if path.is_file() else None


def read_text(path: Path) -> str:
    """A text file of whatever bytes; "" if there is none."""
    return path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""


def count_pairs(folder: Path) -> int | None:
    """How many pairs the search measures accuracy on."""
    path = folder / "data" / "search" / "val.jsonl"
    if path.is_file():
        with open(path, "rb") as file:
            return sum(1 for line in file if line.strip())
    split = optional_json(folder / "split.json") or {}
    return len(split["val"]) if isinstance(split.get("val"), list) else None


def visited_margins(folder: Path) -> np.ndarray:
    """Margins rho (nats) of the search's validation pairs at the last step of each DPO run."""
    margins = []
    for path in sorted(folder.glob("results/*/val_pairs.jsonl")):
        if (optional_json(path.with_name("args.json")) or {}).get("loss") != "dpo":
            continue
        rows = [row for _, row in disk.read_jsonl(path, True)]
        last = max((row["step"] for row in rows), default=0)
        margins += [margin_of(row) for row in rows if row["step"] == last > 0]
    return np.asarray(margins, np.float64)


def margin_of(row: dict) -> float:
    chosen = row["policy_chosen"] - row["ref_chosen"]
    return chosen - (row["policy_rejected"] - row["ref_rejected"])
