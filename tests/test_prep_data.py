"""prep_data.py: every layout, every reason to drop a row, the split, and what must be refused."""

import inspect
import json
import random
import string
import subprocess
import sys
from pathlib import Path

import pytest
from preference_rows import (
    TEXT_ROWS,
    bot,
    lists,
    make_folder,
    prepare,
    prepare_rows,
    rows_of,
    run,
    talk,
    user,
    write_rows,
)

import prep_data
from pref.files import disk
from pref.files.console import UserError
from pref.files.disk import sha256_file
from pref.files.pairs import check_pair

ROOT = Path(__file__).resolve().parent.parent

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


# ---- the stage -----------------------------------------------------------------------------------


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
        with pytest.raises(UserError, match="would overwrite its own source"):
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
