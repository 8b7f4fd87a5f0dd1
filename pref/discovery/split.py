"""Which pairs a search may see. data/<name>/train.jsonl is divided once more, by prompt, into pairs
to train on and pairs to measure with; val.jsonl is not opened before --confirm.

    split.json                         rule, hash of train.jsonl, ids of the pairs to measure with
    data/search/{train,val}.jsonl      the two sides of train.jsonl
    data/confirm/{train,val}.jsonl     all of train.jsonl, and val.jsonl: `write_confirm`
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

from pref.files import disk
from pref.files.console import UserError
from pref.files.pairs import read_pairs
from pref.files.row_pairs import prompt_key

SHARE, LEAST = 0.2, 100  # of the pairs are measured with: this share, but as many as this ...
MOST_SHARE = 0.5  # ... where this share is enough for it
MIN_PAIRS = 20  # below it a search measures nothing
FILE = "split.json"
RULE = (
    f"by prompt, in the order of SHA-256: {SHARE:.0%} of the pairs, at least {LEAST}, at most "
    f"{MOST_SHARE:.0%}"
)


class Split(NamedTuple):
    """How many pairs the search trains on and measures with."""

    train: int
    val: int


def count(data: Path) -> Split:
    """The split of `data` without writing anything. Raises UserError as `write_search` does."""
    rows = read_train(data)
    val = measured_with(rows)
    return Split(len(rows) - len(val), len(val))


def write_search(data: Path, folder: Path) -> Split:
    """Write split.json and data/search/ in the search's folder, where they are not there. Raises
    UserError if there are too few pairs, or if train.jsonl is another one than it was.
    """
    rows = read_train(data)
    sha256 = disk.sha256_file(data / "train.jsonl")
    path = folder / FILE
    if path.exists():
        record = disk.read_json(path)
        if record.get("train_sha256") != sha256:
            raise UserError(
                f"{data / 'train.jsonl'}: has changed since {path} was written; restore it, or "
                "search in a new folder"
            )
        val = set(record["val_ids"])
    else:
        val = measured_with(rows)
        ids = [row["id"] for row in rows if row["id"] in val]
        disk.write_json(path, {"rule": RULE, "train_sha256": sha256, "val_ids": ids})
    sides = {
        "train": [row for row in rows if row["id"] not in val],
        "val": [row for row in rows if row["id"] in val],
    }
    for name, side in sides.items():
        write_once(folder / "data" / "search" / f"{name}.jsonl", side)
    return Split(len(sides["train"]), len(sides["val"]))


def write_confirm(data: Path, folder: Path) -> Split:
    """Write data/confirm/ in the search's folder, where it is not there: all of train.jsonl, and
    val.jsonl without the prompts that are in train.jsonl too, which it names. The first reader of
    val.jsonl.
    """
    train, val = read_train(data), read_pairs(data / "val.jsonl")
    seen = {prompt_key(row["prompt"]) for row in train}
    unseen = [row for row in val if prompt_key(row["prompt"]) not in seen]
    if not unseen:
        raise UserError(
            f"{data / 'val.jsonl'}: all its prompts are in train.jsonl too, so that nothing can be "
            "confirmed with them; split the pairs by prompt (prep_data.py --split)"
        )
    if len(unseen) < len(val):
        print(
            f"{data / 'val.jsonl'}: {len(val) - len(unseen)} of {len(val)} pairs are left out of "
            "the confirmation: their prompts are in train.jsonl too",
            flush=True,
        )
    write_once(folder / "data" / "confirm" / "train.jsonl", train)
    write_once(folder / "data" / "confirm" / "val.jsonl", unseen)
    return Split(len(train), len(unseen))


def read_train(data: Path) -> list[dict]:
    """The pairs of train.jsonl, which must have different ids. Raises UserError."""
    path = data / "train.jsonl"
    rows = read_pairs(path)
    ids: set[str] = set()
    for number, row in enumerate(rows, 1):
        if row["id"] in ids:
            raise UserError(
                f"{path}: its pair {number} has the id {row['id']!r} of an earlier one; rerun "
                "prep_data.py to write the file again"
            )
        ids.add(row["id"])
    if len(rows) < MIN_PAIRS:
        raise UserError(
            f"{path}: {len(rows)} pairs; a search needs at least {MIN_PAIRS} to train and measure, "
            "and a few hundred to tell losses apart"
        )
    return rows


def measured_with(rows: list[dict]) -> set[str]:
    """Ids of the pairs that the search measures with. Whole prompts are taken in the order of their
    hashes, which depends neither on the order of the rows nor on a seed.
    """
    wanted = min(max(SHARE * len(rows), LEAST), MOST_SHARE * len(rows))
    by_prompt: dict[str, list[str]] = {}
    for row in rows:
        key = hashlib.sha256(f"search {prompt_key(row['prompt'])}".encode()).hexdigest()
        by_prompt.setdefault(key, []).append(row["id"])
    taken: set[str] = set()
    for key in sorted(by_prompt):
        if len(taken) >= wanted:
            break
        if len(taken) + len(by_prompt[key]) <= MOST_SHARE * len(rows):
            taken |= set(by_prompt[key])
    if not taken:
        raise UserError(
            "train.jsonl: more than half of its pairs have one prompt, so that they cannot be "
            "divided by prompt; give pairs with more prompts"
        )
    return taken


def write_once(path: Path, rows: list[dict]) -> None:
    """Write `rows`, unless the file has them: a file that is written again looks changed."""
    text = "".join(map(disk.jsonl_line, rows))
    if not path.exists() or path.read_bytes() != text.encode("utf-8", "backslashreplace"):
        disk.write_text(path, text)
