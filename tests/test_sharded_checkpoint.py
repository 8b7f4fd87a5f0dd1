"""Checkpoints of whole models: written by some ranks, read by others, killed, damaged, on a full
disk. A toy model with parameters that no number of ranks divides evenly.
"""

import json
import math
import os
import shutil

import pytest
import torch
from conftest import ROOT, run_script
from safetensors import safe_open
from safetensors.torch import load_file
from sharded_toy import content, step, toy

from pref.files.console import UserError
from pref.model.ranks import Ranks
from pref.training import checkpoint, sharded_checkpoint
from pref.training.checkpoint import Progress
from pref.training.sharded_checkpoint import ShardedCheckpoints

ONE = Ranks(0, 1, torch.device("cpu"))
SAVES = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from safetensors.torch import save_file
from pref.model.ranks import close_ranks, init_ranks
from pref.training.checkpoint import Progress
from sharded_toy import content, step, toy

ranks, run = init_ranks(), Path(sys.argv[1])
checkpoints = toy(run, ranks)
progress = checkpoints.restore() or Progress()
while progress.step < 5:
    step(checkpoints, progress.step)
    progress.step += 1
    if progress.step == 3 and sys.argv[2:] == ["save"]:
        checkpoints.save(progress)
found = content(checkpoints)
if ranks.main:
    save_file(found, run / f"on_{{ranks.world}}.safetensors")
close_ranks()
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def trained(run, steps: int, saved=()) -> ShardedCheckpoints:
    """A toy after so many steps on one rank, with checkpoints after those of `saved`."""
    checkpoints = toy(run, ONE)
    for number in range(steps):
        step(checkpoints, number)
        if number + 1 in saved:
            checkpoints.save(Progress(step=number + 1, tokens=10 * number))
    return checkpoints


def assert_equal(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    for key in one:
        assert one[key].dtype == two[key].dtype and torch.equal(one[key], two[key]), key


# ---- ranks --------------------------------------------------------------------------------------


def test_another_number_of_ranks_continues_exactly(run, tmp_path):
    """Values and moments are the same to the bit on four ranks, two, and one without FSDP."""
    script = tmp_path / "saves.py"
    script.write_text(SAVES)
    done = run_script(script, run, "save", torchrun=4)
    assert done.returncode == 0, done.stderr[-2000:]
    state = run / "checkpoint" / "step-000003"
    assert {path.name for path in state.iterdir()} == {
        "progress.json",
        *(f"rank-0000{rank}-part-0000.safetensors" for rank in range(4)),
    }
    assert keys_in(state, 3) == {f"{kind}/{name}" for kind in KINDS for name in ("seven", "large")}
    assert run_script(script, run, torchrun=2).returncode == 0
    checkpoints = toy(run, ONE)
    assert checkpoints.restore().step == 3
    for number in (3, 4):
        step(checkpoints, number)
    expected = content(trained(run, 5))
    assert_equal(content(checkpoints), expected)
    for world in (4, 2):
        assert_equal(load_file(run / f"on_{world}.safetensors"), expected)


KINDS = ("value", "exp_avg", "exp_avg_sq")


def keys_in(state, rank: int, part: int = 0) -> set[str]:
    with safe_open(state / f"rank-{rank:05}-part-{part:04}.safetensors", "pt") as file:
        return set(file.keys())


def test_files_have_a_limited_size_and_hold_no_pickle(run, monkeypatch):
    monkeypatch.setattr(sharded_checkpoint, "PART_BYTES", 2000)
    checkpoints = trained(run, 2, saved=[2])
    state = run / "checkpoint" / "step-000002"
    parts = sorted(state.glob("*.safetensors"))
    # "large" is above the limit: its value and moments are alone, and so is what is between them.
    assert [len(keys_in(state, 0, part)) for part in range(len(parts))] == [12, 1, 1, 1, 1]
    assert {path.suffix for path in state.iterdir()} == {".json", ".safetensors"}
    again = toy(run, ONE)
    assert again.restore() == Progress(step=2, tokens=10)
    assert_equal(content(again), content(checkpoints))


# ---- what is kept -------------------------------------------------------------------------------


def states(run) -> list[str]:
    return sorted(path.name for path in (run / "checkpoint").iterdir())


def test_two_states_are_kept_and_the_best_weights_that_they_name(run):
    checkpoints = toy(run, ONE)
    for number in range(1, 5):
        (run / "checkpoint" / f"best-{number:06}").mkdir(parents=True)
        checkpoints.save(Progress(step=number, best_step=number - number % 2 or None))
    assert states(run) == ["best-000002", "best-000004", "step-000003", "step-000004"]


def test_a_second_save_after_the_same_step_only_counts_on(run):
    """A run that was stopped, continued, evaluated and stopped before its next step."""
    checkpoints = trained(run, 2, saved=[2])
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    checkpoints.save(Progress(step=2, evaluated=2, best_acc_ref=math.nan))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before
    again = toy(run, ONE)
    progress = again.restore()
    assert progress.evaluated == 2 and math.isnan(progress.best_acc_ref)
    assert_equal(content(again), content(checkpoints))


def test_a_state_that_was_removed_is_written_again(run):
    """As that of a run that was stopped before its first evaluation, which starts over."""
    trained(run, 2, saved=[2])
    again = toy(run, ONE)
    again.restore()
    shutil.rmtree(run / "checkpoint")
    again.save(Progress(step=2))
    assert toy(run, ONE).restore().step == 2


def test_without_a_state_there_is_nothing_to_continue(run):
    assert toy(run, ONE).restore() is None


# ---- killed, damaged, full ----------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["save_file", "sync", "write_progress", "prune_best", "discard"])
def test_a_kill_while_saving_leaves_a_state(run, monkeypatch, moment):
    """At any moment; the run then goes on as if it had never been killed."""
    checkpoints = trained(run, 3, saved=[1, 2])

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(sharded_checkpoint, moment, killed)
        with pytest.raises(Killed):
            checkpoints.save(Progress(step=3))
    again = toy(run, ONE)
    progress = again.restore()
    assert progress.step == (3 if moment in ("prune_best", "discard") else 2)
    for number in range(progress.step, 4):
        step(again, number)
        again.save(Progress(step=number + 1))
    assert states(run) == ["step-000003", "step-000004"]
    assert_equal(content(again), content(trained(run, 4)))


def part_of(state):
    return next(state.glob("*.safetensors"))


def change_byte(path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: change_byte(part_of(state)), "the checksum of rank-00000-part-0000"),
        (lambda state: part_of(state).unlink(), "rank-00000-part-0000.safetensors is missing"),
        (lambda state: (state / "progress.json").unlink(), "progress.json is missing"),
        (lambda state: os.truncate(state / "progress.json", 9), "progress.json cannot be read"),
        (
            lambda state: (state / "progress.json").write_text(
                (state / "progress.json").read_text().replace('"tokens": 10', '"tokens": 11')
            ),
            "the checksum of progress.json is wrong",
        ),
    ],
)
def test_a_damaged_state_is_named_and_the_one_before_is_used(run, capsys, damage, message):
    trained(run, 2, saved=[1, 2])
    newest = run / "checkpoint" / "step-000002"
    damage(newest)
    again = toy(run, ONE)
    assert again.restore().step == 1
    assert f"{newest}: damaged ({message}" in capsys.readouterr().out
    assert states(run) == ["step-000001", "step-000002.damaged"]
    step(again, 1)
    again.save(Progress(step=2))
    assert states(run) == ["step-000001", "step-000002"]
    assert_equal(content(again), content(trained(run, 2)))


def test_a_full_disk_is_one_line_and_leaves_the_state_before(run, monkeypatch):
    checkpoints = trained(run, 2, saved=[1])
    expected = content(checkpoints)

    def full(tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(sharded_checkpoint, "save_file", full)
        with pytest.raises(UserError, match="step-000002: not written .*No space.*make room"):
            checkpoints.save(Progress(step=2))
    assert states(run) == ["step-000001"]  # what was half written takes no room
    checkpoints.save(Progress(step=2))
    again = toy(run, ONE)
    assert again.restore().step == 2
    assert_equal(content(again), expected)


def test_what_is_whole_but_of_another_run_is_refused_and_kept(run):
    trained(run, 1, saved=[1])
    again = toy(run, ONE)
    del again.trained["five"]
    with pytest.raises(UserError, match="holds other parameters than this run trains"):
        again.restore()
    path = run / "checkpoint" / "step-000001" / "progress.json"
    record = json.loads(path.read_text())
    record["progress"]["moon_phase"] = 0.5
    del record["sha256"]
    record["sha256"] = sharded_checkpoint.disk.sha256_json(record)
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="written by another version"):
        toy(run, ONE).restore()
    assert states(run) == ["step-000001"]
    shutil.rmtree(run / "checkpoint")
    checkpoints = toy(run, ONE)
    (run / "metrics.jsonl").write_text("{}\n")
    checkpoints.save(Progress(step=0, metrics_bytes=3))
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="metrics.jsonl: shorter than when step-000000 was saved"):
        toy(run, ONE).restore()


def test_progress_is_read_of_both_kinds_of_state(run):
    trained(run, 1, saved=[1])
    (path,) = checkpoint.saved_states(run / "checkpoint")
    assert checkpoint.progress_in(path) == Progress(step=1)
    (path / "progress.json").write_text("{")
    assert checkpoint.progress_in(path) is None
