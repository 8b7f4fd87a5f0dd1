"""sweep.sh: a grid that names several benchmarks."""

import json
from argparse import Namespace

import bench_files
import pytest
from doubles import completion
from test_alpaca_eval_judge import weighted

import prep_data
from pref.files.console import UserError
from pref.judging import store
from pref.sweeping import commands, grid, preflight, status
from pref.sweeping.grid import Point, Study


@pytest.fixture
def study(tmp_path, tiny_model, server, monkeypatch) -> Study:
    """Two runs, MT-Bench and AlpacaEval, a judge for each."""
    source = bench_files.alpaca_eval(tmp_path / "source")
    data, results = tmp_path / "data", tmp_path / "results"
    made = ["--alpaca_eval", str(source), "--allow_modified", "--out", str(data / "alpaca_eval")]
    assert prep_data.main(made) in (0, None)
    assert prep_data.main(["--mt_bench", "nvidia", "--out", str(data / "mt_bench")]) in (0, None)
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    results.mkdir()
    settings = {
        "MODEL": str(tiny_model),
        "BENCHES": "mt_bench alpaca_eval",
        "MT_BENCH": str(data / "mt_bench"),
        "BENCH_DATA": str(data),
        "RESULTS": str(results),
        "JUDGE": "rater-70b",
        "JUDGE_alpaca_eval": "chooser-70b",
        "BASE_URL": server.url,
        "JUDGE_ARGS": "--price_in 1 --price_out 4",
        "GEN_ARGS_alpaca_eval": "--max_new_tokens 64",
    }
    points = [Point(n, f"run{n:02}", []) for n in range(2)]
    args = Namespace(grid="quick", nodes=1, index=None, stages=None, yes=True)
    return Study(args, grid.DEFAULTS | settings, {}, points, ["gen", "judge", "analyze"])


def test_stages_are_repeated_for_each_benchmark(study, tmp_path):
    named = [commands.stage_name(*stage) for stage in commands.later_stages(study)]
    assert named == ["gen", "gen_alpaca_eval", "judge", "judge_alpaca_eval", "analyze"]
    results, data = study.settings["RESULTS"], str(tmp_path / "data/alpaca_eval")
    where = ["--bench", "alpaca_eval", "--bench_data", data]
    assert commands.stage_arguments(study, "judge", "alpaca_eval") == [
        *(results, "--judge", "chooser-70b", "--base_url", study.settings["BASE_URL"], *where),
        *("--price_in", "1", "--price_out", "4"),
    ]
    gen = commands.stage_arguments(study, "gen", "alpaca_eval")
    assert gen[-6:] == [*where, "--max_new_tokens", "64"]
    assert "64" not in commands.stage_arguments(study, "gen", "mt_bench")
    analyze = commands.stage_arguments(study, "analyze")
    assert analyze[-4:-2] == ["--data", str(tmp_path / "data")]
    assert analyze[-2:] == ["--alpaca_eval", data]


def test_preflight_speaks_of_each_judge(study, server, capsys):
    server.answer = lambda body: weighted({"m": -0.2, "M": -2.0})
    preflight.preflight(study)
    out = capsys.readouterr().out
    # Three runs: 160 ratings each; of four instructions one preference each
    assert "judge of MT-Bench: rater-70b answers; about 480 calls; about" in out
    assert "judge of AlpacaEval 2: chooser-70b answers; about 12 calls; about 0.0" in out
    assert "+ 1 tokens per call" in out


def test_preflight_stops_at_a_judge_without_log_probabilities(study, server):
    server.answer = lambda body: completion("OK")
    with pytest.raises(UserError, match="--preference"):
        preflight.preflight(study)


def test_what_is_missing_is_named_by_benchmark(study):
    turns = {"mt_bench": ["one", "two"], "alpaca_eval": ["one"]}
    for bench in study.benches:
        for name in ("base", "run00"):
            folder = study.results / name / bench
            folder.mkdir(parents=True)
            answers = [
                {
                    "question_id": one["question_id"],
                    "choices": [{"index": 0, "turns": turns[bench]}],
                }
                for one in status.questions_of(study, bench)
            ]
            if (bench, name) == ("alpaca_eval", "run00"):
                answers = answers[1:]
            lines = "".join(json.dumps(row) + "\n" for row in answers)
            (folder / "answers.jsonl").write_text(lines)
            done = {"status": "finished", "best_step": 1}
            (study.results / name / "summary.json").write_text(json.dumps(done))
            weights = study.results / name / "adapter/adapter_model.safetensors"
            weights.parent.mkdir(exist_ok=True)
            weights.touch()
    answered = study._replace(stages=["gen"])
    assert status.missing_of(answered, {}) == {"run00": "alpaca_eval: 1 of 4 answers are missing"}
    judged = study._replace(stages=["judge"], points=[])
    db = store.open_store(study.results / "judgements.sqlite")
    item = store.Item(**dict.fromkeys(store.Item._fields, ""))
    item = item._replace(model_id="base", judge="rater-70b", bench="mt_bench", request_sha256="r")
    store.note_items(db, [item])
    store.save_reply(db, "r", {"judge": "rater-70b"}, {"status": "ok"}, 70.0)
    db.close()
    assert status.missing_of(judged, {}) == {"base": "alpaca_eval: not judged"}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("", "names no benchmark; these are known: mt_bench, alpaca_eval"),
        ("mt_bench alpaca", "there is no benchmark 'alpaca'"),
        ("mt_bench mt_bench", "mt_bench is given twice"),
    ],
)
def test_benchmarks_that_are_not_known(names, said):
    with pytest.raises(UserError, match=said):
        grid.check_benches(names.split(), grid.DEFAULTS)


def test_a_setting_for_one_benchmark(tmp_path, monkeypatch):
    file = tmp_path / "grid"
    file.write_text("LOSSES dpo\nJUDGE_ARGS a\nJUDGE_ARGS_alpaca_eval b\nJUDGE_arena_hard_v0.1 c\n")
    settings, _ = grid.settings_of(file)
    assert settings["JUDGE_ARGS_alpaca_eval"] == "b"
    monkeypatch.setenv("JUDGE", "d")  # for all: the file's JUDGE_arena_hard_v0.1 goes
    settings, _ = grid.settings_of(file)
    assert settings["JUDGE_ARGS"] == "a" and "JUDGE_arena_hard_v0.1" not in settings
    file.write_text("JUDGE_ARGS_nowhere b\n")
    with pytest.raises(UserError, match="JUDGE_ARGS_nowhere is not an axis or setting"):
        grid.settings_of(file)
