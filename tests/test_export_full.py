"""export.py on a run that trained all parameters: a model card beside the same weights, or the
weights in another dtype.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import export
from pref.files import disk
from pref.files.console import UserError
from pref.model import hub, weights


@pytest.fixture
def run(tiny_model, tmp_path):
    """A finished run of --tune full, whose model/ is in fp32."""
    folder = tmp_path / "results" / "dpo_full"
    shutil.copytree(tiny_model, folder / "model")
    record = {"run_id": "dpo_full", "loss": "dpo", "beta": 0.1, "tune": "full", "data": "data/mine"}
    record |= {"model": str(tiny_model), "learning_rate": 5e-7, "lora_r": None, "freeze": "norm"}
    disk.write_json(folder / "args.json", record)
    summary = {"status": "finished", "steps": 9, "best_step": 6, "best_acc_ref": 0.75}
    disk.write_json(folder / "summary.json", summary)
    return folder


def call(run, *more) -> int:
    return export.main([str(run), *map(str, more)])


def test_the_same_weights_with_a_card(run, capsys):
    assert call(run) == 0
    out = run / "exported"
    assert f"vllm serve {out}" in capsys.readouterr().out
    for path in (run / "model").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert (out / "model.safetensors").samefile(run / "model" / "model.safetensors")
    assert not (out / "config.json").samefile(run / "model" / "config.json")  # may be edited
    card = (out / "README.md").read_text()
    assert "all parameters trained (float32)" in card and "Merging" not in card
    assert "| tune | full |" in card and "| freeze | norm |" in card and "lora" not in card
    assert "| accuracy against the reference, best step (that of these weights) | 0.75 |" in card
    weights.find_model(str(out))
    assert call(run) == 0 and "is there already, from the same model" in capsys.readouterr().out


def test_another_dtype_is_rounded_once_and_loads(run):
    assert call(run, "--dtype", "bfloat16") == 0
    ours = load_file(run / "exported" / "model.safetensors")
    for name, tensor in load_file(run / "model" / "model.safetensors").items():
        assert torch.equal(ours[name], tensor.bfloat16())
    model = AutoModelForCausalLM.from_pretrained(run / "exported", dtype="auto")
    assert model.dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"exported: is there, and not from this model in float32"):
        call(run)


def test_what_does_not_fit_into_16_bits_is_named(run):
    path = run / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight"):
        call(run, "--dtype", "float16")
    assert not (run / "exported").exists() and not (run / "exported.partial").exists()


def test_it_is_pushed(run, monkeypatch, capsys):
    pushed = []
    monkeypatch.setattr(hub, "check_push", lambda name, private: pushed.append((name, private)))
    monkeypatch.setattr(hub, "push", lambda folder, name: pushed.append(folder) or "http://hub/x")
    assert call(run, "--push", "me/mine", "--private") == 0
    assert pushed == [("me/mine", True), run / "exported"]
    assert "pushed: http://hub/x" in capsys.readouterr().out


def test_without_its_base_the_card_names_no_licence(run, capsys):
    record = json.loads((run / "args.json").read_text())
    disk.write_json(run / "args.json", record | {"model": "/gone/base"})
    assert call(run) == 0
    assert "note: the card names no licence: --model /gone/base" in capsys.readouterr().out
    assert 'base_model: "base"' in (run / "exported" / "README.md").read_text()


def test_a_card_names_no_other_model_as_the_base(run, tiny_model, tmp_path, capsys):
    """Neither one that --model gives, nor one that has taken the base's place."""
    record = json.loads((run / "args.json").read_text())
    trained_from = weights.identity(weights.find_model(str(tiny_model)))
    disk.write_json(run / "args.json", record | {"model_sha256": trained_from})
    other = tmp_path / "an other"
    shutil.copytree(tiny_model, other)
    (other / "README.md").write_text("---\nlicense: mit\n---\n")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="--model .*other: is another model .hash"):
        call(run, "--model", other)
    assert not (run / "exported").exists()
    disk.write_json(run / "args.json", record | {"model_sha256": trained_from, "model": str(other)})
    assert call(run, "--out", tmp_path / "with a space") == 0
    shown = capsys.readouterr().out
    assert "note: the card names no licence: --model" in shown and "another model" in shown
    assert "mit" not in (tmp_path / "with a space" / "README.md").read_text()
    assert f"vllm serve '{tmp_path / 'with a space'}'" in shown


def test_what_cannot_be_exported(run, monkeypatch):
    with pytest.raises(UserError, match="--data: a run of --tune full has nothing to compare"):
        call(run, "--data", "data/mine")
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="GB free, and the model takes"):
        call(run, "--dtype", "bfloat16")
    monkeypatch.undo()
    path = run / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"dpo_full/model: model\.safetensors has"):
        call(run)
    shutil.rmtree(run / "model")
    with pytest.raises(UserError, match="its training ended without a model .it diverged before"):
        call(run)
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match="its training has not finished"):
        call(run)
