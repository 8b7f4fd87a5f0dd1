"""prep_data.py: every layout, every reason to drop a row, the split, and what must be refused."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from preference_rows import (
    TEXT_ROWS,
    lists,
    make_folder,
    prepare,
    prepare_rows,
    rows_of,
    run,
    talk,
    write_rows,
)

import prep_data
from pref.files import disk
from pref.files.console import UserError
from pref.files.disk import sha256_file

ROOT = Path(__file__).resolve().parent.parent

# ---- drops ---------------------------------------------------------------------------------------


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


def test_the_next_command_names_the_model(tmp_path, monkeypatch, capsys):
    """quickstart.sh's model where it is there, so that the command works as it is printed."""
    monkeypatch.setattr(prep_data, "QUICKSTART_MODEL", tmp_path / "model")
    prepare_rows(tmp_path, rows_of(4))
    train = f"next: python train_pref.py --data {tmp_path / 'out'} --model"
    assert f"{train} MODEL    (MODEL: folder or hub id" in capsys.readouterr().out
    (tmp_path / "model").mkdir()
    prepare(write_rows(tmp_path / "source.jsonl", rows_of(4)), tmp_path / "again")
    assert f"--model {tmp_path / 'model'}\n" in capsys.readouterr().out


def test_a_later_row_without_a_prompt(tmp_path):
    rows = [*TEXT_ROWS, {"chosen": "a", "rejected": "b"}]
    reason = "not a Human/Assistant transcript (this row has layout 'conversations')"
    assert [d["reason"] for d in prepare_rows(tmp_path, rows)[2]] == [reason]


def test_no_pairs_left_is_an_error_that_counts_the_reasons(tmp_path):
    with pytest.raises(
        UserError,
        match=r"no pairs left for train; dropped: 2 chosen == rejected, 1 empty chosen "
        r"\(first: .*source\.jsonl:1: ",
    ):
        prepare_rows(tmp_path, [lists("q", "a", "a"), lists("q", "", "a"), lists("r", "b", "b")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_empty_file(tmp_path, text):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(UserError, match="no rows in split 'train'"):
        prepare(tmp_path / "x.jsonl", tmp_path / "out")


# ---- what is wrong with the file as a whole ------------------------------------------------------


def texts(count, **more):
    return [
        {"prompt": f"Ask {i}?", "chosen": f"Good {i}.", "rejected": f"Bad {i}.", **more}
        for i in range(count)
    ]


def test_the_same_pair_both_ways_round_is_dropped(tmp_path):
    rows = [*texts(5), {"prompt": "Ask 0? ", "chosen": "Bad 0.", "rejected": "Good 0.\u200b"}]
    train, val, dropped, _ = prepare_rows(tmp_path, rows)
    assert {d["place"].rpartition(":")[2] for d in dropped} == {"1", "6"}
    assert {d["reason"] for d in dropped} == {
        "another row has the same two responses the other way round"
    }
    assert len(train) + len(val) == 4


def scored(count, chosen, rejected):
    return texts(count, score_chosen=chosen, score_rejected=rejected)


def test_scores_that_contradict_the_labels(tmp_path, capsys):
    rows = [*scored(16, 5, 2), *texts(18)[16:]]
    rows[3]["score_chosen"], rows[5]["score_rejected"] = 1, 5
    _, _, dropped, manifest = prepare_rows(tmp_path, rows)
    inverted = "the scores say that the rejected response is better"
    assert {(d["place"].rpartition(":")[2], d["reason"].partition(" (")[0]) for d in dropped} == {
        ("4", inverted),
        ("6", "tie"),
    }
    warning = f"WARNING: rows dropped, because {inverted}: 1 (first: {tmp_path / 'source.jsonl'}:4)"
    assert manifest["notes"] == [warning] and warning in capsys.readouterr().out
    # Where many rows say so, lower is better in this file, or the columns are swapped.
    for row in rows[:4]:
        row["score_chosen"] = 1
    with pytest.raises(UserError, match="in 4 of 16 rows with scores .*chosen=rejected,rejected="):
        prepare_rows(tmp_path, rows)
    assert len(prepare_rows(tmp_path, rows, "--ignore_columns", "score_chosen")[2]) == 0
    rows = [*scored(8, 5, 4), *scored(12, 5, 1)[8:]]
    _, _, dropped, manifest = prepare_rows(tmp_path, rows, "--min_margin", "2")
    assert manifest["drops"] == {"tie, or scores less than 2 apart": 8}
    assert manifest["notes"] == ["WARNING: 8 of 12 rows were dropped"]


CHOICES = [{"prompt": f"q{i}", "completion_a": f"x{i}", "completion_b": "y"} for i in range(4)]
EVALS = [{"instruction": f"q{i}", "output_1": f"x{i}", "output_2": "y"} for i in range(4)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row | {"choice": 1} for row in CHOICES], "the label is 1 in all 4 rows .*completion_a"),
        ([row | {"choice": "1"} for row in CHOICES], "the label is 1 in all 4 rows"),
        ([row | {"preference": 1} for row in EVALS], "the label is 1 in all 4 rows .*output_1"),
        # 0 is a tie in AlpacaEval's old files; here it seems to be a response.
        (
            [row | {"preference": i % 2} for i, row in enumerate(EVALS)],
            "the label is 0 or 1 in all 4 rows",
        ),
    ],
)
def test_numbers_that_may_mean_the_opposite_are_refused(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        prepare_rows(tmp_path, rows)
    first, second = list(rows[0])[1:3]
    renamed = prepare_rows(tmp_path, rows, "--columns", f"chosen={second},rejected={first}")
    assert {p["chosen"][0]["content"] for p in renamed[0]} == {"y"}


def test_a_split_of_ones_is_explained_by_the_other_split(tmp_path):
    rows = [row | {"choice": i % 2} for i, row in enumerate(CHOICES)]
    (tmp_path / "d").mkdir()
    write_rows(tmp_path / "d" / "train.jsonl", rows)
    write_rows(tmp_path / "d" / "test.jsonl", [rows[1] | {"prompt": "other"}])
    _, val, _, _ = prepare(tmp_path / "d", tmp_path / "out")
    assert val[0]["chosen"][0]["content"] == "y"


def test_a_prompt_that_the_responses_repeat_is_cut_off(tmp_path):
    plain = texts(6)
    echoed = [
        row | {key: f"{row['prompt']}\n{row[key]}" for key in ("chosen", "rejected")}
        for row in plain
    ]
    train, val, _, manifest = prepare_rows(tmp_path, echoed)
    assert (train, val) == prepare_rows(tmp_path, plain)[:2]
    assert "rows whose responses repeat the prompt, where it was cut off: 6" in manifest["notes"][0]
    # A single such row is not a habit; a short prompt may come back by chance.
    story = "Write a very long and detailed story about the sea."
    rows = [*plain, {"prompt": story, "chosen": f"{story}\nIt", "rejected": f"{story} So"}]
    rows.append({"prompt": "Hello", "chosen": "Hello there", "rejected": "Hello yourself"})
    _, _, dropped, _ = prepare_rows(tmp_path, rows)
    assert [d["reason"] for d in dropped] == ["both responses begin with the prompt"]


def test_a_response_that_goes_on_with_the_users_turn_is_counted(tmp_path):
    rows = texts(4)
    rows[2]["rejected"] += "\n\nHuman: And now?\n\nAssistant: Now this."
    notes = prepare_rows(tmp_path, rows)[3]["notes"]
    what = "rows in which a response goes on with a turn of the user's, kept"
    assert notes == [f"{what}: 1 (first: {tmp_path / 'source.jsonl'}:3)"]


def test_rows_of_two_layouts_in_one_file(tmp_path, capsys):
    train, val, dropped, manifest = prepare_rows(tmp_path, [*rows_of(3), *texts(3)])
    assert len(train) + len(val) == 6 and not dropped
    assert manifest["layouts"] == {"conversations": 3, "prompt": 3}
    assert "layouts 'conversations' (3), 'prompt' (3)" in capsys.readouterr().out


def test_an_error_for_every_row_has_the_remedy(tmp_path):
    greeting = {"role": "assistant", "content": "Hello."}
    rows = [lists(f"q{i}", "a", "b") for i in range(2)]
    rows = [{side: [greeting, *messages] for side, messages in row.items()} for row in rows]
    with pytest.raises(UserError, match=r"2 roles do not alternate: it begins with the assistant"):
        prepare_rows(tmp_path, rows)
    rows = [{"chosen": "yes", "rejected": "no"}] * 2
    with pytest.raises(UserError, match=r"If a column has the prompts: --columns prompt=NAME"):
        prepare_rows(tmp_path, rows)


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"prompt": "q", "completion": "a", "label": True}, "unpaired data"),
        ({"prompt": "q", "completion": "a"}, "one response only"),
        ({"ask": "q", "good": "a", "bad": "b"}, "--columns prompt=NAME,chosen=NAME,rejected=NAME"),
    ],
)
def test_an_unknown_layout_is_told_apart(tmp_path, row, hint):
    with pytest.raises(UserError, match=hint):
        prepare_rows(tmp_path, [row])


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
        ("/hub/datasets--me--mix/snapshots/" + "0a" * 20, "mix"),
        ("/hub/datasets--me--mix/snapshots/" + "0a" * 20 + "/train.jsonl", "train"),
    ],
)
def test_source_name(source, name):
    assert prep_data.source_name(source) == name


def test_a_link_in_the_hubs_cache_keeps_its_name(tmp_path, monkeypatch):
    blob = write_rows(tmp_path / ("a1" * 32), rows_of(4))
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "mix.jsonl").symlink_to(blob)
    monkeypatch.chdir(tmp_path)
    prep_data.main(["--dataset", "snapshots/mix.jsonl"])
    assert (tmp_path / "data" / "mix" / "manifest.json").exists()


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
    heavy = "{'datasets', 'pyarrow', 'torch', 'transformers', 'pandas', 'mtbench_evaluator'}"
    program = (
        f"import sys, prep_data; prep_data.describe(); print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
