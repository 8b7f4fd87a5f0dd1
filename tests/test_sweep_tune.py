"""Grids with TUNE: adapters and whole models in one grid, each with its own axes and arguments."""

from types import SimpleNamespace

import pytest
from test_sweep import study_of

from pref.files import disk
from pref.files.console import UserError
from pref.sweeping import commands, grid, preflight, rounds, status
from pref.sweeping.grid import Point
from pref.training.arguments import parse_args

BOTH = """
LOSSES dpo td_dpo
BETAS 0.1
TAUS 1 2
TUNE lora full
LRS_lora 1e-5 3e-5
AXIS lora_r 16 64
AXIS optim adamw adamw_8bit
TRAIN_ARGS --global_batch 8
TRAIN_ARGS_lora --lora_alpha 32
TRAIN_ARGS_full --max_steps 7
"""


def points_of(tmp_path, text: str) -> list[Point]:
    path = tmp_path / "own"
    path.write_text(text)
    return grid.expand(grid.settings_of(path)[0])


def test_each_kind_has_its_own_axes_and_arguments(tmp_path):
    """Written out: dpo (no tau) and td_dpo at two taus, times four with LoRA and two without."""
    points = points_of(tmp_path, BOTH)
    kinds = [f"lr{rate}_gb8_r{rank}" for rate in ("1e-05", "3e-05") for rank in (16, 64)]
    lora = {kind.replace("lr1e-05_", "").replace("_r64", "") + "_a32" for kind in kinds}
    full = {"steps7_gb8_full", "steps7_gb8_adamw-8bit_full"}
    starts = ("dpo_b0.1_s42", "td_dpo_b0.1_t1_s42", "td_dpo_b0.1_t2_s42")
    ids = {point.run_id for point in points}
    assert {p.run_id for p in points if p.tune == "lora"} == {
        f"{s}_{k}" for s in starts for k in lora
    }
    of_full = {frozenset(p.run_id.split("_")) for p in points if p.tune == "full"}
    assert of_full == {frozenset(f"{s}_{k}".split("_")) for s in starts for k in full}
    assert len(points) == len(ids) == 18
    for point in points:
        args = parse_args(point.arguments)
        assert args.tune == point.tune
        assert args.learning_rate == 5e-7 if args.tune == "full" else args.lora_alpha == 32


def test_a_grid_without_it_is_what_it_was(tmp_path):
    (point,) = points_of(tmp_path, "LOSSES dpo\n")
    assert "--tune" not in point.arguments and point.tune == "lora"
    (other,) = points_of(tmp_path, "LOSSES dpo\nTUNE_dpo full\n")
    assert other.run_id == "dpo_b0.1_s42_full" and other.tune == "full"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TUNE half\n", "TUNE: 'half' must be one of lora, full"),
        ("TRAIN_ARGS --tune full\n", "--tune is the axis TUNE"),
        ("AXIS tune lora full\n", "AXIS tune: this is the axis TUNE"),
        ("TUNE full\nTRAIN_ARGS --lora_r 8\n", "--lora_r 8: belongs to --tune lora"),
        ("TUNE full\nTASK examples/tasks/brevity.py\nROUNDS 2\n", "a later round starts from the"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        points_of(tmp_path, "LOSSES dpo\n" + text)


def test_the_base_of_full_runs_is_not_quantised(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(commands, "gpus", lambda: ["0"])
    text = f"LOSSES dpo\nMODEL {tiny_model}\nTUNE "
    for tune, quant in (("lora", "nf4"), ("full", "none"), ("full lora", "nf4")):
        study = study_of(tmp_path, 0)._replace(points=points_of(tmp_path, text + tune + "\n"))
        assert rounds.quant_of(study) == quant


def test_a_full_run_without_its_model_is_missing_something(tmp_path):
    study = study_of(tmp_path, 1)
    run = study.results / "run00"
    disk.write_json(run / "args.json", {"tune": "full"})
    disk.write_json(run / "summary.json", {"status": "finished", "best_step": 3})
    assert status.what_run_lacks(study, "run00", []).startswith("its model is missing; restore it")
    (run / "model").mkdir()
    (run / "model" / "model-00001-of-00002.safetensors").touch()
    assert status.what_run_lacks(study, "run00", []) is None


def test_disk_and_hours_count_each_kind(tmp_path, tiny_model, monkeypatch):
    """A model of 14 GiB, 84 GiB of checkpoint; an adapter of 0.5 GiB."""
    study = study_of(tmp_path, 3, MODEL=str(tiny_model))
    adapter, whole = (
        Point(n, f"run{n:02}", [], tune=tune) for n, tune in enumerate(("lora", "full"))
    )
    plans = {
        "lora": (preflight.Plan(10, 1_000_000, 9.0, 0.5, 1.5), [adapter, adapter]),
        "full": (preflight.Plan(10, 1_000_000, 70.0, 14.0, 84.0), [whole]),
    }
    monkeypatch.setattr(preflight, "plan_of", lambda study, point: plans[point.tune][0])
    assert preflight.plans_of(study, [adapter, whole, adapter]) == plans
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**40))
    need = 2 * 0.5 + 14 + (3 * 84 + 2 * 14) + 0.03
    assert f"disk: {need:.1f} GiB for adapters, models and checkpoints" in preflight.check_disk(
        study, plans
    )
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    with pytest.raises(UserError, match=r"fewer runs at a time \(JOBS\)"):
        preflight.check_disk(study, plans)
    hours = preflight.estimate_hours(study, plans)
    assert "at 4 (lora) or 6 (full) x" in hours and "for 3 runs" in hours
