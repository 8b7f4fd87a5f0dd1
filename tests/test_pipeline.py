"""The stages talk through files: raw pairs in, table of judged results out, on a tiny random
model.
"""

import csv
import json

import pytest
from conftest import ROOT, run_script
from studies import coarse_figures

import analyze
import gen_mtbench
import judge
import prep_data
import train_pref
from pref.analysis import results_folder
from pref.training.arguments import loss_arguments

pytestmark = pytest.mark.slow


def call(stage, *args) -> int:
    return stage.main([str(arg) for arg in args]) or 0


SMALL_RUN = (
    "--dtype float32 --lora_r 4 --global_batch 12 --epochs 1 --learning_rate 0.02 --max_length 256"
)


def answer(results, bench) -> int:
    short = ("--num_questions", 8, "--max_new_tokens", 6, "--dtype", "float32")
    return call(gen_mtbench, results, "--base", "--mt_bench", bench, *short)


def rate(results, bench, model) -> int:
    tolerant = ("--dtype", "float32", "--allow_incomplete", "--min_rating_mass", 0)
    return call(judge, results, "--judge", f"hf:{model}", "--mt_bench", bench, *tolerant)


@pytest.fixture(scope="module")
def study(tiny_model, tmp_path_factory):
    """A study of two losses with every stage run once, in a folder whose name has a space."""
    folder = tmp_path_factory.mktemp("a study")
    pairs, bench, results = (
        folder / "data" / "preferences",
        folder / "data" / "mt_bench",
        folder / "results",
    )
    examples = ROOT / "examples" / "preferences.jsonl"
    assert call(prep_data, "--dataset", examples, "--limit", 24, "--out", pairs) == 0
    assert call(prep_data, "--mt_bench", "nvidia", "--out", bench) == 0
    for loss in ("dpo", "td_dpo"):
        folders = ("--model", tiny_model, "--data", pairs, "--results_dir", results)
        assert call(train_pref, *folders, "--loss", loss, *SMALL_RUN.split()) == 0
    assert answer(results, bench) == 0
    code = rate(results, bench, tiny_model)
    with coarse_figures():
        assert call(analyze, results) == 0
    return results, code


def test_every_run_is_judged_and_stands_in_the_table(study):
    results, _ = study
    runs = ["base", "dpo_b0.1_s42_ep1_gb12_lr0.02", "td_dpo_b0.05_t1_s42_ep1_gb12_lr0.02"]
    found = sorted(path.parent.name for path in results.glob("*/args.json"))
    assert [name.split("_s42")[0] for name in found] == [name.split("_s42")[0] for name in runs]
    for run in found:
        with open(results / run / "mt_bench" / "judgements.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 16
        assert {row["status"] for row in rows} <= {"ok", "context"} and {
            row["prompts"] for row in rows
        } == {"mt_bench"}
        assert all(1 <= float(row["score"]) <= 10 for row in rows if row["status"] == "ok")
        assert json.loads((results / run / "metrics.json").read_text())
    comparison = results / "comparison"
    assert json.loads((comparison / "aggregated_metrics.json").read_text())
    assert list((comparison / "tables").glob("*.csv")) and list(
        (comparison / "figures").glob("comparison_*.pdf")
    )


def test_runs_of_one_study_differ_in_their_loss_alone(study):
    """Whatever train_pref.py comes to write into args.json must not make another cell of every
    run.
    """
    results, _ = study
    records = [
        json.loads((run / "args.json").read_text()) for run in sorted(results.glob("*dpo_b*"))
    ]
    one, two = (
        {key: r[key] for key in r if results_folder.is_setting(key, r[key], r)} for r in records
    )
    different = {key for key in one.keys() & two.keys() if one[key] != two[key]}
    assert different <= loss_arguments().keys()


def test_a_tiny_judge_is_marked_as_smoke_test(study):
    results, _ = study
    text = "".join(
        path.read_text() for path in (results / "comparison" / "tables").glob("*mt_bench*.csv")
    )
    assert "smoke" in text


def test_rerunning_every_stage_does_nothing_twice(study, tiny_model, capsys):
    results, code = study
    before = {p: p.read_bytes() for p in results.glob("*/mt_bench/*")}
    bench = results.parent / "data" / "mt_bench"
    answer(results, bench)
    assert rate(results, bench, tiny_model) == code
    assert {p: p.read_bytes() for p in results.glob("*/mt_bench/*")} == before


# ---- errors a user meets, as a user meets them --------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "arguments", "said"),
    [
        ("prep_data.py", ["--dataset", "missing.jsonl"], "missing.jsonl"),
        ("train_pref.py", ["--data", "missing"], "missing: no such folder"),
        ("gen_mtbench.py", ["missing"], "missing"),
        ("judge.py", ["missing"], "--judge"),
        ("analyze.py", ["missing"], "missing: no such folder"),
    ],
)
def test_missing_input_is_one_clear_error(tmp_path, stage, arguments, said):
    done = run_script(stage, *arguments, OPENAI_API_KEY="x")
    assert done.returncode == 2
    lines = [x for x in done.stderr.splitlines() if not x.startswith("note: other work")]
    assert lines[0].startswith("error: ") and said in done.stderr
    assert "Traceback" not in done.stderr
