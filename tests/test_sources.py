"""sources.py: files of every format, folders and hub datasets, and what cannot be read."""

import csv
import gzip
import io
import json
from pathlib import Path

import pytest
from preference_rows import (
    TEXT_ROWS,
    as_parquet,
    lists,
    make_folder,
    prepare,
    rows_of,
    run,
    user,
    write_rows,
)

from pref.files import sources
from pref.files.console import UserError
from pref.files.disk import read_json, sha256_file
from pref.files.tables import read_splits

# ---- which splits --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train", "test"], [["train"], ["test"]]),
        (["test", "train", "validation"], [["train"], ["validation"]]),
        (["train", "dev"], [["train"], ["dev"]]),
        (["train", "valid"], [["train"], ["valid"]]),
        (["train", "eval"], [["train"], ["eval"]]),
        (
            ["train_sft", "test_sft", "train_gen", "test_gen", "train_prefs", "test_prefs"],
            [["train_prefs"], ["test_prefs"]],
        ),
        (["train", "validation_prefs"], [["train"], ["validation_prefs"]]),
        (["train", "extra"], [["train"]]),
        (["eval"], [["eval"]]),
    ],
)
def test_pick_splits(names, expected):
    assert sources.pick_splits(names, "x") == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["left", "right"], "no split named train_prefs or train among left, right; .*train=left"),
        (["train_1", "test_1"], "--split train=train_1,val=test_1"),
        (["train", "test_hard"], "no validation split among train, test_hard; .*val=test_hard"),
    ],
)
def test_pick_splits_that_must_be_said(names, message):
    with pytest.raises(UserError, match=message):
        sources.pick_splits(names, "x")


# ---- a file --------------------------------------------------------------------------------------


def as_csv(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


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


FEW = [{"prompt": f"q{i}", "chosen": f"é {i}", "rejected": f"b {i}"} for i in range(4)]
COLUMNS = {name: [row[name] for row in FEW] for name in FEW[0]}
# Other ways in which the same rows come: the file's ending, and its text.
SHAPES = {
    "a list in .jsonl": ("jsonl", json.dumps(FEW, indent=1)),
    "a list on one line": ("jsonl", json.dumps(FEW)),
    "pretty-printed objects": ("jsonl", "\n".join(json.dumps(row, indent=2) for row in FEW)),
    "objects with commas": ("json", ",\n".join(json.dumps(row, indent=2) for row in FEW)),
    "JSON Lines in .ndjson": ("ndjson", "\n".join(map(json.dumps, FEW))),
    "a byte-order mark": ("jsonl", "\ufeff" + "\n".join(map(json.dumps, FEW))),
    "a byte-order mark before a list": ("json", "\ufeff" + json.dumps(FEW)),
    "under data": ("json", json.dumps({"version": "1.0", "data": FEW}, indent=1)),
    "columns of lists": ("json", json.dumps(COLUMNS)),
    "columns of objects": (
        "json",
        json.dumps({name: dict(enumerate(cells)) for name, cells in COLUMNS.items()}),
    ),
    "rows by index": ("json", json.dumps(dict(enumerate(FEW)))),
    "columns and data": (
        "json",
        json.dumps({"columns": list(COLUMNS), "data": [list(row.values()) for row in FEW]}),
    ),
    "semicolons": ("csv", as_csv(FEW).decode().replace(",", ";")),
    "semicolons and a byte-order mark": ("csv", "\ufeff" + as_csv(FEW).decode().replace(",", ";")),
    "tabs in .csv": ("csv", as_csv(FEW).decode().replace(",", "\t")),
    "tabs": ("tsv", as_csv(FEW).decode().replace(",", "\t")),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_a_table(tmp_path, name):
    ending, text = SHAPES[name]
    path = tmp_path / f"x.{ending}"
    path.write_text(text, encoding="utf-8")
    assert read_rows(path) == [(place, row) for (place, _), row in zip(read_rows(path), FEW)]
    assert len(read_rows(path)) == 4


def test_a_single_row_is_no_table(tmp_path):
    row = {"chosen": [user("q"), user("r")], "rejected": [user("q"), user("r")]}
    path = tmp_path / "one.json"
    path.write_text(json.dumps(row, indent=1))
    assert [found for _, found in read_rows(path)] == [row]


def test_splits_in_one_file(tmp_path):
    path = tmp_path / "both.json"
    path.write_text(json.dumps({"train": FEW[:3], "test": FEW[3:]}))
    train, val, _, manifest = prepare(path, tmp_path / "out")
    assert (len(train), len(val)) == (3, 1) and manifest["rows"] == {"train": 3, "test": 1}
    path.write_text(json.dumps({"data": {"train": FEW[:3], "test": FEW[3:]}}))
    assert prepare(path, tmp_path / "out")[:2] == (train, val)
    path.write_text(json.dumps({"part_1": FEW[:1], "part_2": FEW[1:3], "rest": FEW[3:]}))
    with pytest.raises(UserError, match="no split named .* among part_1, part_2, rest"):
        prepare(path, tmp_path / "out")
    split = "train=part_1+part_2,val=rest"
    train, val, _, manifest = prepare(path, tmp_path / "out", "--split", split)
    assert (len(train), len(val)) == (3, 1)
    train, val, _, manifest = prepare(path, tmp_path / "out", "--split", "train=part_2")
    assert len(train) + len(val) == 2
    assert manifest["not_read"] == ["split 'part_1'", "split 'rest'"]


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
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
    "dup.csv": (
        b"prompt,chosen,rejected,chosen\nq,a,b,c\n",
        r"dup\.csv:1: two columns named 'chosen'",
    ),
    "dup.jsonl": (
        b'{"chosen": "a", "chosen": "b"}\n{}',
        r"dup\.jsonl:1: two values under .*'chosen'",
    ),
    "dup.json": (b'[{"a": 1},\n{"b": 1, "b": 2}]', r"dup\.json:1: two values under the key 'b'"),
    "lfs.parquet": (LFS, r"lfs\.parquet: a Git LFS pointer, not the data itself; run `git lfs"),
    "lfs.jsonl": (LFS, r"lfs\.jsonl: a Git LFS pointer"),
    "page.json": (b"<!DOCTYPE html><html>", r"page\.json: a web page, not data"),
    "utf16.csv": ("prompt,chosen".encode("utf-16"), r"utf16\.csv: UTF-16 text; save it as UTF-8"),
    "latin.csv": (b"prompt,chosen\nq\xe9,a\n", r"latin\.csv: not UTF-8 .*save it as UTF-8"),
    "number.json": (b"3", r"number\.json:1: expected a JSON object, found int"),
    "x.txt": (b"text", r"x\.txt: not a \.json, \.jsonl, \.parquet, \.csv or \.tsv file"),
}


def read_rows(path):
    return [row for rows in read_splits(path).values() for row in rows]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_with_the_line(tmp_path, name):
    data, message = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        list(read_rows(tmp_path / name))
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


def prompts_of(pairs):
    return {json.dumps(pair["prompt"]) for pair in pairs}


def test_folder_keeps_its_own_split(tmp_path):
    train, val, dropped, manifest = prepare(make_folder(tmp_path / "dpo-mix.7k"), tmp_path / "out")
    assert [p["prompt"] for p in train] == [[user(f"Question {i}?")] for i in range(5)]
    assert [p["prompt"] for p in val] == [[user(f"Question {i}?")] for i in range(100, 103)]
    assert {p["source"] for p in train} == {"koala"}
    file = tmp_path / "dpo-mix.7k" / "data" / "train-00000-of-00001.parquet"
    assert {(d["place"], d["reason"]) for d in dropped} == {
        (f"{file}[6]", "empty chosen"),
        (f"{file}[5]", "prompt also in validation"),
    }
    assert manifest["split_rule"] == "the source's own: train, test" and manifest["rows"] == {
        "train": 7,
        "test": 3,
    }
    assert not prompts_of(train) & prompts_of(val)


def test_the_files_of_a_folder_are_read_each_by_itself(tmp_path):
    """Text in one and messages in the other; a column that only one has; LFS pointers by name."""
    folder = tmp_path / "two"
    folder.mkdir()
    write_rows(folder / "train-0.jsonl", FEW)
    more = [lists(f"r{i}", "a", "b", note="x") | {"prompt": f"r{i}"} for i in range(4)]
    write_rows(folder / "train-1.jsonl", more)
    write_rows(folder / "test.jsonl", [lists("s", "a", "b", note="x")])
    (folder / "extra.csv").write_text("a\n1\n")
    train, val, _, manifest = prepare(folder, tmp_path / "out")
    assert [p["prompt"][0]["content"] for p in train] == [f"{c}{i}" for c in "qr" for i in range(4)]
    assert len(val) == 1 and manifest["not_read"] == ["file 'extra.csv'"]
    assert manifest["ignored_columns"] == {"note": {"rows": 5, "why": "metadata"}}
    (folder / "train-1.jsonl").write_bytes(LFS)
    with pytest.raises(UserError, match=r"two.train-1\.jsonl: a Git LFS pointer"):
        prepare(folder, tmp_path / "out")


def test_a_column_that_is_null_in_the_first_pretty_printed_rows(tmp_path):
    folder = tmp_path / "late"
    folder.mkdir()
    rows = [{**row, "system": None if i < 3 else "Be brief."} for i, row in enumerate(FEW)]
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row, indent=2) for row in rows))
    train, val, _, _ = prepare(folder, tmp_path / "out")
    roles = {p["prompt"][-1]["content"]: p["prompt"][0]["role"] for p in train + val}
    assert roles == {"q0": "user", "q1": "user", "q2": "user", "q3": "system"}


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


def test_a_folder_with_several_configurations(tmp_path):
    configs = "".join(
        f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("easy", "hard")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    write_rows(tmp_path / "easy.jsonl", FEW)
    write_rows(tmp_path / "hard.jsonl", [])
    message = r"it has the configurations \['easy', 'hard'\]; choose one with --config"
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, tmp_path / "out")
    _, _, _, manifest = prepare(tmp_path, tmp_path / "out", "--config", "easy")
    assert manifest["rows"] == {"train": 4} and manifest["not_read"] == ["file 'hard.jsonl'"]


def test_folder_that_datasets_cannot_read(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="nothing: `datasets` cannot read this folder"):
        prepare(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "bad").mkdir()
    write_rows(tmp_path / "bad" / "train.jsonl", [*TEXT_ROWS[:1], 3])
    with pytest.raises(UserError, match=r"bad.train\.jsonl:2: expected a JSON object"):
        prepare(tmp_path / "bad", tmp_path / "out")


# ---- the hub -------------------------------------------------------------------------------------


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


@pytest.mark.slow
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
