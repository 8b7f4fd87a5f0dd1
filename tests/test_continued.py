"""A stopped run whose files, model or starting adapter are no longer what they were: it is refused
by name, and nothing of it is thrown away.
"""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import train_args

import train_pref
from pref.files import disk
from pref.files.console import UserError
from pref.model.architecture import Architecture
from pref.training import arguments, checkpoint, reference, run_folder, start_adapter

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start(tiny_model, pairs_folder):
    """Starts the run in a results folder, with these arguments more."""

    def main(results, *more) -> int:
        steps = ["--run_id", "run", "--max_steps", "3", "--eval_steps", "1", "--save_steps", "1"]
        try:
            given = train_args(tiny_model, pairs_folder, results, *steps, *more)
            return train_pref.main([str(argument) for argument in given])
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()

    return main


@pytest.fixture(scope="module")
def stopped(start, tmp_path_factory):
    """A results folder with a run that was stopped after its second step."""
    results, take_step = tmp_path_factory.mktemp("stopped"), train_pref.take_step

    def stopping(study, *more):
        line = take_step(study, *more)
        if study.progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return line

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_pref, "take_step", stopping)
        assert start(results) == 75
    return results


@pytest.fixture
def copy(stopped, tmp_path):
    shutil.copytree(stopped / "run", tmp_path / "run")
    return tmp_path / "run"


def newest(run):
    return max((run / "checkpoint").glob("step-*.safetensors"))


def rewrite(path, text, tensors) -> None:
    """A whole checkpoint with other content."""
    metadata = {"progress": text, "sha256": checkpoint.digest(tensors, text)}
    save_file(tensors, path, metadata=metadata)


def of_a_later_version(run) -> None:
    path = newest(run)
    text = json.dumps(checkpoint.asdict(checkpoint.progress_in(path)) | {"moon_phase": 0.5})
    rewrite(path, text, load_file(path))


def with_other_parameters(run) -> None:
    path = newest(run)
    text = json.dumps(checkpoint.asdict(checkpoint.progress_in(path)))
    tensors = {key: t for key, t in load_file(path).items() if "q_proj" not in key}
    rewrite(path, text, tensors)


def with_another_rank(run) -> None:
    path = newest(run)
    text = json.dumps(checkpoint.asdict(checkpoint.progress_in(path)))
    tensors = load_file(path)
    key = next(key for key in tensors if key.startswith("value/") and "lora_A" in key)
    rewrite(path, text, tensors | {key: tensors[key][:1].clone()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "args.json").unlink(), "a checkpoint and no args.json, which says"),
        (lambda run: (run / "val_pairs.jsonl").unlink(), "holds 0 of the 8 lines of step 0"),
        (lambda run: (run / "val_pairs.jsonl").write_text(""), "holds 0 of the 8 lines of step 0"),
        (of_a_later_version, "another version of this toolkit; continue the run with that"),
        (with_other_parameters, "other parameters than this run trains"),
        (with_another_rank, "other parameters than this run trains"),
    ],
)
def test_a_run_that_lacks_something_is_refused_and_kept(copy, start, change, message):
    change(copy)
    before = {path: path.read_bytes() for path in (copy / "checkpoint").rglob("*.safetensors")}
    assert len(before) == 3  # two checkpoints and the best adapter
    with pytest.raises(UserError, match=message):
        start(copy.parent)
    assert {path: path.read_bytes() for path in before} == before


def test_the_stopped_run_itself_is_continued(copy, start):
    assert start(copy.parent) == 0
    steps = [row["step"] for _, row in disk.read_jsonl(copy / "val_pairs.jsonl")]
    assert sorted(set(steps)) != [0] and steps.count(0) == 8 and len(steps) == 16


# ---- what version 1.0.0 computed in another way --------------------------------------------------

PLAIN_SDPA = Architecture("kept", unpacked="keeps a state", attention="sdpa")
PLAIN_EAGER = Architecture("sinks", unpacked="has sinks", attention="eager")
NOISY = Architecture("phi", noise=("attention_dropout 0.1", "resid_pdrop 0.1"))


@pytest.mark.parametrize(
    ("model", "packing", "message"),
    [
        (Architecture("llama"), "on", None),
        (Architecture("granite", noise=("attention_dropout 0.1",)), "on", None),
        (PLAIN_SDPA, "off", None),
        (PLAIN_SDPA, "on", "kept keeps a state, which version 1.0.0 left out"),
        (PLAIN_EAGER, "off", "sinks has sinks, which version 1.0.0 left out"),
        (NOISY, "on", "the base model's own resid_pdrop 0.1 was on, is off"),
    ],
)
def test_a_run_of_version_1_0_0_is_not_continued_with_another_policy(
    tmp_path, model, packing, message
):
    record = {"packing": packing}
    disk.write_json(tmp_path / "args.json", record)
    run_folder.check_computed_as_before(tmp_path, model)  # no checkpoint: it starts over
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "step-000001.safetensors").touch()
    if message is None:
        run_folder.check_computed_as_before(tmp_path, model)
        return
    with pytest.raises(UserError, match=message):
        run_folder.check_computed_as_before(tmp_path, model)
    disk.write_json(tmp_path / "args.json", record | {"model_sha256": "ab"})  # of a later version
    run_folder.check_computed_as_before(tmp_path, model)


# ---- the adapter that a run starts from ----------------------------------------------------------


def test_a_reference_is_of_the_adapter_as_it_is_scaled(tmp_path, stopped, start):
    """The same weights under another alpha are another reference."""
    adapter = max((stopped / "run" / "checkpoint").glob("best-*")) / "adapter"
    path = shutil.copytree(adapter, tmp_path / "adapter") / "adapter_config.json"
    config = json.loads(path.read_text())

    def files(*more, **changes) -> dict:
        path.write_text(json.dumps(config | changes))
        args = arguments.parse_args(["--init_adapter", str(path.parent), *more])
        record = vars(start_adapter.with_start(args))
        keys = reference.identity(
            reference.BaseHashes("model", "loaded"), reference.adapter_of(record), {"val": []}
        )
        return reference.cache_files(tmp_path, record | keys)["val"]

    assert files() == files(lora_dropout=0.3)
    variants = [{}, {"lora_alpha": 2 * config["lora_alpha"]}, {"use_rslora": True}]
    of_start = {files(**changes) for changes in variants}
    assert len(of_start) == 3
    # The bare base is one more, whichever adapter the policy starts from.
    of_base = {files("--reference", "base", **changes) for changes in variants}
    assert len(of_base) == 1 and not of_base & of_start
