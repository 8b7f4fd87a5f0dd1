"""Rows of preference data, and prep_data.py run on them."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import prep_data
from pref.files.audit import Audit, Options, add_row
from pref.files.disk import read_json
from pref.files.pairs import read_pairs
from pref.files.rankings import Selection

PREP = Path(__file__).resolve().parent.parent / "prep_data.py"


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def talk(prompt, answer):
    return [user(prompt), bot(answer)]


def lists(prompt, chosen, rejected, **more):
    """A row as argilla/dpo-mix-7k has it."""
    return {"chosen": talk(prompt, chosen), "rejected": talk(prompt, rejected), **more}


def rows_of(count, start=0):
    return [
        lists(f"Question {i}?", f"Good answer {i}.", f"Bad answer {i}.")
        for i in range(start, start + count)
    ]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepare(source, out, *more):
    """Run the stage in this process; return train pairs, val pairs, drop records, manifest."""
    prep_data.main(["--dataset", str(source), "--out", str(out), *more])
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    return (
        read_pairs(out / "train.jsonl"),
        read_pairs(out / "val.jsonl"),
        dropped,
        read_json(out / "manifest.json"),
    )


def prepare_rows(tmp_path, rows, *more):
    return prepare(write_rows(tmp_path / "source.jsonl", rows), tmp_path / "out", *more)


def run(*args, **environment):
    """The stage as a user runs it. Returns (exit code, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, str(PREP), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )
    return done.returncode, done.stdout, done.stderr


TEXT_ROWS = [
    {"prompt": f'Say {i},\n"now"', "chosen": f"good – {i}", "rejected": f"bad\n{i}"}
    for i in range(12)
]


def as_parquet(rows):
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def make_folder(path):
    """A folder laid out as argilla/dpo-mix-7k on the hub; row 5 of train has a prompt of test, row
    6 is empty.
    """
    train = [
        dict(row, dataset="koala", chosen_rating=5.0, rejected_rating=2.0) for row in rows_of(7)
    ]
    test = [
        dict(row, dataset="koala", chosen_rating=5.0, rejected_rating=2.0)
        for row in rows_of(3, start=100)
    ]
    train[5].update(lists("Question 100?", "leaks", "too"))
    train[6].update(lists("Question 6?", "", "empty"))
    (path / "data").mkdir(parents=True)
    (path / "data" / "train-00000-of-00001.parquet").write_bytes(as_parquet(train))
    (path / "data" / "test-00000-of-00001.parquet").write_bytes(as_parquet(test))
    return path


def audit_row(row, rule=None, min_margin=0, **more):
    """What a single row comes to: its pairs. Raises Drop with the reason if it has none."""
    audit = Audit("train", "mine.jsonl", "mine")
    audit.rows = 1
    options = Options(selection=Selection(rule, min_margin, seed=1), **more)
    add_row(audit, "here", row, options)
    return [item.pair for item in audit.pairs]
