"""`tune` in the analysis: a setting like others, and what follows from it is none besides it."""

import json

import pytest
from safetensors.torch import save_file
from studies import make_base, make_run
from torch import arange

from pref.analysis import claims, estimates, grouping, provenance, results_folder
from pref.files import disk, run_folders
from pref.files.console import UserError

OF_LORA = {"lora_r": 64, "lora_alpha": 16, "quant": "nf4", "base_sha256": "4bit"}
OF_FULL = {"lora_r": None, "lora_alpha": None, "quant": "none", "base_sha256": "16bit"}
OF_FULL |= {"tune": "full", "learning_rate": 5e-7}


@pytest.fixture
def cells(tmp_path):
    """dpo with an adapter (of an earlier version, and of this one), and with all parameters."""
    make_base(tmp_path)
    make_run(tmp_path, "old", loss="dpo", **OF_LORA)
    make_run(tmp_path, "new", loss="dpo", seed=43, **OF_LORA, tune="lora", optim="adamw")
    for seed in (42, 43):
        make_run(tmp_path, f"full{seed}", loss="dpo", seed=seed, **OF_FULL)
    runs, _ = results_folder.load_runs(tmp_path)
    return grouping.make_cells(runs)


def test_it_is_the_one_difference_of_the_cells(cells):
    base, lora, full = cells
    assert [len(cell.runs) for cell in cells] == [1, 2, 2] and base.untrained
    assert lora.label == "dpo β=0.1 learning_rate=1e-05 tune=lora"
    assert full.label == "dpo β=0.1 learning_rate=5e-07 tune=full"
    assert estimates.differences(lora, full) == ["learning_rate", "tune"]
    assert claims.select_cells(cells, {"loss": "dpo", "tune": "full"}) == [full]
    assert claims.select_cells(cells, {"loss": "dpo", "tune": "lora"}) == [lora]


def test_ranks_of_adapters_are_no_setting_of_full_runs(tmp_path):
    make_run(tmp_path, "r8", loss="dpo", **OF_LORA | {"lora_r": 8})
    make_run(tmp_path, "r64", loss="dpo", **OF_LORA, use_rslora=True)
    make_run(tmp_path, "full", loss="dpo", **OF_FULL | {"learning_rate": 1e-5})
    runs, _ = results_folder.load_runs(tmp_path)
    labels = {cell.label for cell in grouping.make_cells(runs)}
    assert labels == {
        "dpo β=0.1 lora_r=8 tune=lora",
        "dpo β=0.1 lora_r=64 tune=lora use_rslora=True",
        "dpo β=0.1 tune=full",
    }


def test_answers_of_a_model_that_is_no_longer_there_are_left_out(tmp_path):
    run = make_run(tmp_path, "full", loss="dpo", summary={}, **OF_FULL)
    (run / "model").mkdir()
    weights = run / "model" / "model.safetensors"
    save_file({"w": arange(4.0)}, weights)
    sha256 = run_folders.weights_sha256(run)
    row = {"question_id": 81, "adapter_sha256": sha256, "model_id": "full"}
    row |= {"choices": [{"index": 0, "turns": ["a", "b"]}]}
    disk.write_text(run / "mt_bench" / "answers.jsonl", json.dumps(row) + "\n")

    def answers():
        (loaded,), _ = results_folder.load_runs(tmp_path)
        return provenance.check_adapter(loaded)

    assert answers().answers and not answers().stale
    save_file({"w": arange(4.0) + 1}, weights)
    stale = str(answers().stale)
    assert not answers().answers and "its model was trained again, or replaced" in stale


def test_another_word_is_refused(tmp_path):
    make_run(tmp_path, "half", tune="half")
    with pytest.raises(UserError, match="tune 'half' must be lora or full"):
        results_folder.load_runs(tmp_path)
