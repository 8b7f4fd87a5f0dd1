"""gen_mtbench.py --bench: whose questions are asked, how, and where the answers go."""

import shutil
from pathlib import Path

import pytest
from bench_files import alpaca_eval, arena_hard, outputs, write_json, write_lines
from doubles import completion

import gen_mtbench
import prep_data
from pref.files import benchmarks, disk
from pref.files.console import UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """data/alpaca_eval and data/arena_hard_v0.1 below a folder."""
    folder = tmp_path_factory.mktemp("benches")
    alpaca = alpaca_eval(folder / "a")
    arena = arena_hard(folder / "b", "v0.1", "gpt-4-0314")
    for arguments, name in (
        (["--alpaca_eval", alpaca], "alpaca_eval"),
        (["--arena_hard", "v0.1", arena], "arena_hard_v0.1"),
    ):
        words = [*arguments, "--out", folder / "data" / name, "--allow_modified"]
        prep_data.main([str(word) for word in words])
    return folder


@pytest.fixture
def study(prepared, tmp_path, server, monkeypatch):
    """A folder with data/, as a user has it; `asked(...)` answers there through a server."""
    shutil.copytree(prepared / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1")
    server.answer = lambda body: completion("Well.")
    return Study(server)


class Study:
    def __init__(self, server):
        self.server = server

    def asked(self, *options) -> int:
        fixed = ["results", "--base", "--model", "m", "--base_url", self.server.url]
        return gen_mtbench.main([*fixed, *map(str, options)])


def rows_of(path) -> list[dict]:
    return [row for _, row in disk.read_jsonl(path)]


def test_a_benchmark_is_answered_as_its_manifest_says(study, capsys):
    assert study.asked("--bench", "alpaca_eval", "--export", "alpaca_eval") == 0
    sent = {(body["temperature"], body["max_tokens"]) for body in study.server.requests}
    assert sent == {(0.7, 2048)}
    said = capsys.readouterr().out
    assert "alpaca_eval: 4 questions, temperature 0.7, up to 2048 tokens. The benchmark fix" in said
    assert "next: python judge.py results --bench alpaca_eval --judge MODEL" in said
    assert "warning" not in said
    rows = rows_of("results/base/alpaca_eval/answers.jsonl")
    assert [row["question_id"] for row in rows] == [1, 2, 3, 4]
    assert [row["dataset"] for row in rows] == [row["dataset"] for row in outputs()]
    assert rows[0]["temperature"] == 0.7 and rows[0]["settings"]["max_new_tokens"] == 2048
    exported = disk.read_json_value("results/base/alpaca_eval/model_outputs.json")
    assert [row["instruction"] for row in exported] == [row["instruction"] for row in outputs()]
    assert {row["generator"] for row in exported} == {"base"}
    # The questions' file leads to the same folder, and nothing is asked again.
    count = len(study.server.requests)
    assert study.asked("--questions", "data/alpaca_eval/questions.json") == 0
    assert len(study.server.requests) == count


def test_the_folder_of_the_untrained_model_is_no_results_folder(study, capsys):
    assert study.asked("--bench", "alpaca_eval") == 0
    count = len(study.server.requests)
    url = ["--bench", "alpaca_eval", "--base_url", study.server.url, "--model", "m"]
    with pytest.raises(UserError, match="results/base: the untrained model answers with --base"):
        gen_mtbench.main(["results/base", *url])
    assert gen_mtbench.main(["results/base", "--base", *url]) == 0
    assert len(study.server.requests) == count and not Path("results/base/base").exists()
    assert "answers: results/<run_id>/alpaca_eval/answers.jsonl" in capsys.readouterr().out


def test_what_the_benchmark_leaves_open_can_be_chosen(study, capsys):
    more = ("--temperature", "0.9", "--max_new_tokens", "100", "--num_questions", "2")
    study.server.answer = lambda body: completion("Well", "length")
    assert study.asked("--bench", "ARENA-HARD-v0.1", *more) == 0
    rows = rows_of("results/base/arena_hard_v0.1/answers.jsonl")
    assert [(row["uid"], row["cluster"], row["temperature"]) for row in rows] == [
        ("u0", "Sums", 0.9),
        ("u1", "Sums", 0.9),
    ]
    said = capsys.readouterr().out
    assert "warning: answers end at 100 tokens, and published results of arena_hard_v0.1" in said
    assert "warning: answers cut off at --max_new_tokens 100: base 100.0%" in said
    with pytest.raises(UserError, match="max_new_tokens was 100, is 4096"):
        study.asked("--bench", "arena_hard_v0.1")


def test_a_benchmark_of_ones_own_needs_a_manifest_alone(study, tmp_path, capsys):
    write_lines(tmp_path / "mine/q.jsonl", [{"question_id": 5, "turns": ["One?", "Two?"]}])
    write_json(tmp_path / "mine/manifest.json", {"bench": "mine", "questions": "q.jsonl"})
    with pytest.raises(UserError, match="defines no temperature; give --temperature"):
        study.asked("--bench", "mine", "--bench_data", "mine")
    assert study.asked("--bench", "mine", "--bench_data", "mine", "--temperature", "0") == 0
    (row,) = rows_of("results/base/mine/answers.jsonl")
    assert row["choices"][0]["turns"] == ["Well.", "Well."]
    assert row["settings"]["max_new_tokens"] == 1024
    assert "judge.py results --bench mine --bench_data mine --judge" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bench", "arena_hard_v2.0"), r"no such folder.*prep_data.py --arena_hard v2.0"),
        (("--bench", "llmbar"), "its answers are given, no run answers it"),
        (("--bench", "mt_bench_human"), "judge.py results/ --validate"),
        (("--bench", "arena_hard_v0.1", "--bench_data", "data/alpaca_eval"), "of benchmark alpaca"),
        (("--bench", "alpaca_eval", "--mt_bench", "x"), "--mt_bench x: the data folder of mt_b"),
        (("--bench", "alpaca_eval", "--questions", "q"), "--questions: the file takes the place"),
        (("--bench", "../x"), "run id"),
        (("--questions", "a b.jsonl"), "--questions a b.jsonl: run id .a b.: use letters"),
    ],
)
def test_questions_that_cannot_be_asked(study, options, message):
    with pytest.raises(UserError, match=message):
        study.asked(*options)
    assert not study.server.requests


def test_the_engine_answers_a_benchmark(prepared, tiny_model, tmp_path):
    """The same through the model in this process."""
    data = prepared / "data/arena_hard_v0.1"
    words = [tmp_path, "--base", "--model", tiny_model, "--bench", "arena_hard_v0.1"]
    words += ["--bench_data", data, "--max_new_tokens", 4, "--dtype", "float32"]
    assert gen_mtbench.main([str(word) for word in words]) == 0
    questions = benchmarks.read_questions(benchmarks.open_folder("arena_hard_v0.1", data))
    rows = rows_of(tmp_path / "base/arena_hard_v0.1/answers.jsonl")
    assert [row["uid"] for row in rows] == [question["uid"] for question in questions]
    assert all(0 < tokens <= 4 for row in rows for tokens in row["choices"][0]["tokens"])
