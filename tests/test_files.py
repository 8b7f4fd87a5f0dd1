"""pref/files: what is read is what was written, and what cannot be read is named."""

import os
import subprocess

import pytest

from pref import ROOT
from pref.files.console import UserError, format_table, run_main
from pref.files.disk import (
    finite_or_null,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
    write_text,
)
from pref.files.judgements import (
    JUDGEMENT_COLUMNS,
    params_from_name,
    read_judgements,
    write_judgements,
)
from pref.files.pairs import check_pair
from pref.files.run_folders import check_run_id


def judgement(**values):
    row = dict.fromkeys(JUDGEMENT_COLUMNS)
    return (
        row
        | {
            "question_id": 81,
            "turn": 1,
            "choice": 0,
            "grading": "single",
            "status": "ok",
            "score": 7.5,
        }
        | values
    )


@pytest.mark.parametrize(
    "text", ["a\rb [[7]]", 'quotes " and\nlines', "<script>", "été 漢字", "x" * 200_000]
)
def test_judgements_come_back_as_they_were(tmp_path, text):
    write_judgements(
        tmp_path / "j.csv", [judgement(judgement=text), judgement(turn=2, cost_usd=0.01)]
    )
    rows = read_judgements(tmp_path / "j.csv")
    assert [row["judgement"] for row in rows] == [text, None]
    assert rows[0]["question_id"] == 81 and rows[0]["score"] == 7.5 and rows[1]["cost_usd"] == 0.01


@pytest.mark.parametrize("change", [{"score": None}, {"score": -1}, {"score": 11}])
def test_a_score_that_is_none_is_refused(tmp_path, change):
    write_judgements(tmp_path / "j.csv", [judgement(), judgement(**change)])
    with pytest.raises(UserError, match=r"j.csv:3: status ok but score"):
        read_judgements(tmp_path / "j.csv")


def test_torn_csv_is_named(tmp_path):
    write_judgements(tmp_path / "j.csv", [judgement(), judgement()])
    text = (tmp_path / "j.csv").read_text()
    (tmp_path / "j.csv").write_text(text[: len(text) - 40])
    with pytest.raises(UserError, match=r"j.csv:3: wrong number of fields"):
        read_judgements(tmp_path / "j.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', r":2: not valid JSON"),
        (b"\n[1]\n", r":2: expected a JSON object"),
        (b"\xff\n", r":1: not UTF-8"),
    ],
)
def test_bad_jsonl_is_named_with_its_line(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_jsonl(tmp_path / "x.jsonl"))


def test_missing_files_are_named(tmp_path):
    for read in (read_json, read_judgements, lambda p: list(read_jsonl(p))):
        with pytest.raises(UserError, match="no such file"):
            read(tmp_path / "missing")


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    def full(_):
        raise OSError("No space left on device")

    write_text(tmp_path / "x", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_non_finite_numbers_become_null():
    assert finite_or_null({"a": [1.0, float("nan")], "b": float("inf")}) == {
        "a": [1.0, None],
        "b": None,
    }


@pytest.mark.parametrize("run_id", ["dpo_b0.1_s42", "base", "td_dpo_b2.5_t2_s42_lr2e-05", "x+y"])
def test_good_run_ids(run_id):
    assert check_run_id(run_id) == run_id


@pytest.mark.parametrize(
    "run_id", ["", "../x", "a/b", ".hidden", "a..b", "<b>", "a b", "x" * 129, "a\n"]
)
def test_bad_run_ids(run_id):
    with pytest.raises(UserError):
        check_run_id(run_id)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("SmolLM2-135M-Instruct", 0.135),
        ("meta-llama/Llama-2-7b-chat-hf", 7),
        ("Mixtral-8x7B", 56),
        ("Qwen-1.5B", 1.5),
        ("gpt-5-mini", None),
        ("model-v2", None),
        ("Qwen-1_8B-Chat", 1.8),
        ("llama_2_7b_chat", 7),
        ("1.8b", 1.8),
        ("7b-instruct", 7),
        ("8x22B", 176),
        ("Qwen3-30B-A3B", 30),
        ("A3B", None),  # active parameters say nothing of the whole
        ("OLMoE-1B-7B-0924", 7),
        ("gemma-3-27b-it", 27),
        ("gemma-3n-E2B-it", 2),
        ("Qwen2.5-0.5B", 0.5),
        ("1.5-Pints-2K", None),
        ("phi-3.5-mini", 3.8),
        ("phi-4", None),
        ("GLM-4-9B", 9),
        ("glm-4-9b-chat-1m", 9),
        ("gemini-1.5-pro-1m", None),
        ("gpt-oss-20b", 20),
        ("qwen2:1.5b", 1.5),
        ("llama3.1:8b-instruct-q4_K_M", 8),
        ("vicuna13b-v1.5", 13),
        ("bloom-7b1", 7.1),
        ("accounts/fireworks/models/qwen2p5-1p5b-instruct", 1.5),
        ("TinyLlama-1.1B-step-50K-105b", 1.1),
        ("Llama-2-70B-GPTQ-4bit-128g", 70),
        ("hf:/models/Qwen-0.5B/snapshots/c1899de289a04d12100db370d81485cdf75e47b", 0.5),
        ("/models/70b/Qwen-7B", 7),
    ],
)
def test_size_in_a_models_name(name, billions):
    assert params_from_name(name) == billions


def test_pair_reasons():
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    pair = {"prompt": [user], "chosen": [answer], "rejected": [answer | {"content": "b"}]}
    assert check_pair(pair) is None
    assert check_pair(pair | {"rejected": [answer]}) == "chosen == rejected"
    assert check_pair(pair | {"chosen": [answer | {"content": " "}]}) == "empty chosen"
    # Written by an earlier version: read, so that its runs can be continued.
    assert check_pair(pair | {"chosen": [answer | {"content": "\u200b"}]}) is None
    two = check_pair(pair | {"prompt": [user, user]})
    assert two == "roles do not alternate: two user messages in a row"
    assert (
        check_pair(pair | {"prompt": [user, {"role": "system", "content": "s"}]})
        == "roles do not alternate: a system message after the first one"
    )
    assert check_pair(pair | {"chosen": [user]}) == "last message not the assistant's"
    assert check_pair(pair | {"prompt": "q"}) == "prompt is not a list of messages"


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("x"), 2), (PermissionError("x"), 2), (KeyboardInterrupt(), 130)]
)
def test_exit_codes(error, code, capsys):
    def fail():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_main(fail)
    assert stopped.value.code == code and capsys.readouterr().err.count("\n") == 1


def test_a_path_below_a_file_is_an_error_with_a_remedy(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: write_json(tmp_path / "file" / "results" / "x.json", {}))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and f"{tmp_path / 'file'}" in error
    assert "a part of this path is a file: give another path" in error


def test_text_tables():
    rows = [["run", "n", ""], ["dpo", "80", "-"], ["", "1", "best"]]
    assert format_table(rows) == "run  n\ndpo  80  -\n     1   best"
    table = format_table(rows, right_from=1, underline=True, indent=2)
    assert table == "  run   n\n  ---  --  ----\n  dpo  80     -\n        1  best"


def test_the_users_python_is_taken_or_refused(tmp_path):
    def find_python(python):
        command = ["bash", "-c", "set -euo pipefail; source .ci/venv.sh; find_python"]
        env = {"PATH": "/usr/bin:/bin", "PYTHON": python}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)

    good = tmp_path / "a python"
    good.write_text("#!/bin/sh\nexit 0\n")
    good.chmod(0o755)
    assert find_python(str(good)).stdout == f"{good}\n"
    refused = find_python("/no/python")
    assert refused.returncode == 1 and refused.stdout == ""
    assert "error: PYTHON=/no/python is not a Python 3.11 or later" in refused.stderr


def test_a_lone_surrogate_is_written_and_read_again(tmp_path):
    rows = [{"text": "\ud83d and ä"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert [row for _, row in read_jsonl(tmp_path / "rows.jsonl")] == rows
    write_json(tmp_path / "one.json", rows[0])
    assert read_json(tmp_path / "one.json") == rows[0]
    assert "ä" in (tmp_path / "one.json").read_text(encoding="utf-8")
