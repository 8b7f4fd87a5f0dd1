"""A model's files: what is refused before or while it is loaded, what is loaded right, and when two
models are the same.
"""

import json
import os
import shutil

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import metrics_of, train, train_args
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pref.files import sources, tensor_files
from pref.files.console import UserError
from pref.model import weights
from pref.model.loading import check_backward, load_base

CPU = torch.device("cpu")
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 542\n"


def load(folder, quant="none"):
    return load_base(str(folder), torch.float32, quant, CPU)


@pytest.fixture
def copy(tiny_model, tmp_path):
    """A copy of the tiny model that a test may spoil."""
    return shutil.copytree(tiny_model, tmp_path / "copy")


def edit_config(folder, **values) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, change) -> None:
    """change: takes the dict of tensors, and may change it or return another one."""
    tensors = load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut(path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def into_shards(folder, index: dict[str, str]) -> None:
    """Distribute the tensors over files. index: the file of each tensor whose name has a key."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    place = {name: next(f for key, f in index.items() if key in name) for name in tensors}
    for file in set(place.values()):
        part = {name: tensor for name, tensor in tensors.items() if place[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    text = json.dumps({"weight_map": place})
    (folder / "model.safetensors.index.json").write_text(text)


# ---- refused before anything is loaded ----------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text(LFS), "config.json is a Git LFS pointer"),
        (lambda f: (f / "model.safetensors").write_text(LFS), "is a Git LFS pointer.*git lfs pull"),
        (lambda f: (f / "tokenizer.json").write_text(LFS), "tokenizer.json is a Git LFS pointer"),
        (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
        (lambda f: cut(f / "model.safetensors"), r"instead of [\d,]+: an incomplete download"),
        (lambda f: os.truncate(f / "model.safetensors", 30), "not a complete safetensors file"),
        (lambda f: os.truncate(f / "model.safetensors", 0), "not a complete safetensors file"),
        (
            lambda f: (
                into_shards(f, {"norm": "a.safetensors", "": "b.safetensors"})
                or (f / "b.safetensors").unlink()
            ),
            r"1 of the 2 weight files .* missing \(b.safetensors\)",
        ),
        (
            lambda f: (f / "adapter_config.json").write_text(
                '{"base_model_name_or_path": "some/base"}'
            ),
            r"holds a LoRA adapter.*its base as --model \(some/base\).*--init_adapter",
        ),
        (
            lambda f: shutil.move(f / "config.json", f / "x.gguf"),
            "GGUF file, which cannot be trained",
        ),
        (lambda f: edit_config(f, model_type="new"), "does not know the model type 'new'"),
        (
            lambda f: edit_config(f, model_type="new", auto_map={"AutoConfig": "code.Config"}),
            "needs code that comes with the model",
        ),
        (lambda f: edit_config(f, model_type=None), "has no model_type"),
        (
            lambda f: edit_config(f, model_type="clip", architectures=["CLIPModel"]),
            r"CLIPModel \(clip\) is not a language model",
        ),
        (lambda f: edit_config(f, num_attention_heads=7), "makes no model .*attention heads"),
        (lambda f: edit_config(f, hidden_size="wide"), "makes no model .*hidden_size"),
        (lambda f: edit_config(f, quantization_config="fp8"), "makes no model"),
        (
            lambda f: edit_config(f, quantization_config={"quant_method": "nvx"}),
            r"quantised by a method that transformers .* does not know \(nvx\)",
        ),
    ],
)
def test_what_cannot_be_a_model_is_refused_by_name(copy, spoil, message):
    spoil(copy)
    with pytest.raises(UserError, match=message) as refusal:
        weights.find_model(str(copy))
    assert str(refusal.value).startswith(f"--model {copy}: ")


@pytest.mark.parametrize("name", ["/no/model", "./model", "a/b/c", "model.gguf", ""])
def test_what_is_neither_a_folder_nor_a_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="no such folder|is a GGUF file|has no config.json"):
        weights.find_model(name)


def test_a_hub_that_is_out_of_reach_is_asked_once(monkeypatch):
    """Without the switch, transformers retries each of its files for 25 s."""
    asked = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "hub_answers", lambda: asked.append(1))
    weights.hub_is_reached.cache_clear()
    for _ in range(2):
        with pytest.raises(UserError, match="cannot reach the hub, and has no copy"):
            weights.find_model("someone/mistyped")
    weights.hub_is_reached.cache_clear()
    assert asked == [1] and huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_plan_needs_no_weights(copy):
    (copy / "model.safetensors").unlink()
    assert weights.find_model(str(copy), needs_weights=False).config["model_type"] == "llama"


# ---- loaded completely or not at all ------------------------------------------------------------


def renamed(tensors):
    return {name.replace("mlp.up_proj", "mlp.w3"): value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight") is None,
            "lacks model.layers.1.mlp.up_proj.weight, which would be random numbers",
        ),
        (renamed, r"lacks model.layers.0.mlp.up_proj.weight, .*holds model.layers.0.mlp.w3.weight"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(63)}),
            "another shape of model.norm.weight",
        ),
        (lambda t: t.update({"v_head.weight": torch.ones(3)}), "holds v_head.weight, which"),
        (
            lambda t: t["model.layers.0.mlp.up_proj.weight"].view(-1)[7:8].fill_(torch.nan) is None,
            "NaN or infinite: model.layers.0.mlp.up_proj.weight",
        ),
        (
            lambda t: t["model.embed_tokens.weight"][99, 3:4].fill_(-torch.inf) is None,
            "NaN or infinite: model.embed_tokens.weight",
        ),
    ],
    ids=["missing", "renamed", "shape", "left over", "nan", "inf"],
)
def test_a_checkpoint_that_is_not_the_models_is_refused(copy, change, message):
    edit_tensors(copy, change)
    with pytest.raises(UserError, match=message):
        load(copy)


def test_a_head_that_is_not_in_the_checkpoint(copy):
    edit_config(copy, tie_word_embeddings=False)
    with pytest.raises(UserError, match="lacks lm_head.weight.*set tie_word_embeddings"):
        load(copy)


def test_a_stored_head_that_is_not_the_embedding_it_is_said_to_be(copy):
    edit_tensors(copy, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 2}))
    with pytest.raises(UserError, match="says that .* share their weights, but the checkpoint has"):
        load(copy)
    edit_tensors(copy, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 1}))
    load(copy)


def test_buffers_of_older_versions_do_no_harm(copy):
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    edit_tensors(copy, lambda tensors: tensors.update(old))
    load(copy)


def test_the_adapter_names_its_base_by_a_path_that_works_everywhere(tiny_model, monkeypatch):
    monkeypatch.chdir(tiny_model.parent)
    assert load("model").name_or_path == str(tiny_model)


# ---- quantised checkpoints ----------------------------------------------------------------------

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}


def to_fp8(tensors: dict, scales: bool = True) -> tuple[dict, dict]:
    """Linear weights in 8 bits with a scale per block of 32 x 32, as the checkpoint stores them,
    and the numbers that they stand for.
    """
    stored, meant = {}, {}
    for name, weight in tensors.items():
        stored[name] = meant[name] = weight
        if "_proj" not in name:
            continue
        rows, columns = weight.shape
        blocks = weight.reshape(rows // 32, 32, columns // 32, 32)
        scale = blocks.abs().amax(dim=(1, 3)) / 400 * torch.rand(rows // 32, columns // 32).add(1)
        eight_bits = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        stored[name] = eight_bits.reshape(rows, columns)
        meant[name] = (eight_bits.float() * scale[:, None, :, None]).reshape(rows, columns)
        if scales:
            stored[name + "_scale_inv"] = scale
    return stored, meant


def test_fp8_weights_are_what_their_scales_make_of_them(copy, tmp_path):
    stored, meant = to_fp8(load_file(copy / "model.safetensors"))
    edit_config(copy, quantization_config=FP8)
    edit_tensors(copy, lambda _: stored)
    loaded = load(copy).state_dict()
    for name, weight in meant.items():
        assert torch.equal(loaded[name], weight), name

    edit_tensors(copy, lambda tensors: to_fp8(meant, scales=False)[0])
    with pytest.raises(UserError, match="no scales for its 8-bit weights of model.layers.0"):
        load(copy)
    edit_config(copy, quantization_config=None)
    edit_tensors(copy, lambda _: stored)
    with pytest.raises(UserError, match="weight_scale_inv, ... 14 in all, which Llama"):
        load(copy)


def test_a_4_bit_checkpoint_is_trained_as_it_is(tiny_model, pairs_folder, tmp_path, capsys):
    folder = tmp_path / "4bit"
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantised = AutoModelForCausalLM.from_pretrained(
        tiny_model, quantization_config=four_bits, dtype=torch.float32
    )
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    quantised.save_pretrained(folder)
    ids = torch.arange(40)[None]
    expected = quantised.train()(ids).logits
    assert torch.allclose(load(folder).train()(ids).logits, expected, atol=1e-5)

    given = train_args(folder, pairs_folder, tmp_path / "r", "--run_id", "x", "--max_steps", "2")
    assert train(*given) == 0
    assert "the model's weights are quantised (bitsandbytes_4bit)" in capsys.readouterr().out
    record = json.loads((tmp_path / "r" / "x" / "args.json").read_text())
    assert record["quant"] == "none"
    assert all(line["grad_norm"] > 0 for line in metrics_of(tmp_path / "r" / "x") if "loss" in line)
    with pytest.raises(UserError, match=r"quantised already \(bitsandbytes_4bit\)"):
        train(*given, "--quant", "nf4")


class NoBackward(nn.Linear):
    def forward(self, x):
        return super().forward(x.detach()) + 0 * self.bias.requires_grad_()


class WrongBackward(nn.Linear):
    def forward(self, x):
        wrong = x @ self.weight.roll(1, 0).t()
        return wrong + (super().forward(x) - wrong).detach()


@pytest.mark.parametrize("kind", [NoBackward, WrongBackward])
def test_layers_without_a_right_backward_are_refused(tiny_model, kind):
    model = load(tiny_model)
    check_backward(model, "--model x")
    model.model.layers[1].mlp.up_proj = kind(64, 96)
    with pytest.raises(UserError, match=rf"{kind.__name__}, first model.layers.1.mlp.up_proj"):
        check_backward(model, "--model x")


# ---- which model it is --------------------------------------------------------------------------


def one_number(tensors: dict) -> None:
    """Change one number of one token, which a sample of the rows misses."""
    tensors["model.embed_tokens.weight"][541, 3] *= 2


def identity(folder) -> str:
    return weights.identity(weights.find_model(str(folder)))


def test_the_same_model_elsewhere(tiny_model, copy):
    """Moved, in several files, saved by another version, with another end token for generation."""
    into_shards(copy, {"layers.1": "b.safetensors", "": "a.safetensors"})
    edit_config(copy, transformers_version="4.1", dtype="bfloat16", eos_token_id=[2, 7])
    assert identity(copy) == identity(tiny_model)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: edit_config(f, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        lambda f: edit_config(f, sliding_window=64),
        lambda f: edit_config(f, rms_norm_eps=1e-5),
        lambda f: edit_tensors(f, one_number),
        # The same numbers under each other's names.
        lambda f: edit_tensors(
            f,
            lambda t: t.update(
                {
                    "model.layers.0.input_layernorm.weight": t["model.norm.weight"] * 2,
                    "model.norm.weight": t["model.layers.0.input_layernorm.weight"],
                }
            ),
        ),
    ],
    ids=["rope", "window", "norm", "one number", "names"],
)
def test_another_model(tiny_model, copy, change):
    change(copy)
    assert identity(copy) != identity(tiny_model)


def test_a_file_is_hashed_once_until_it_changes(tiny_model, copy, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tensor_files, "HASH_CACHED_FROM", 0)
    hashed, digests = [], tensor_files.tensor_digests
    monkeypatch.setattr(tensor_files, "tensor_digests", lambda p: hashed.append(p) or digests(p))
    path = copy / "model.safetensors"
    assert identity(copy) == identity(copy)
    assert len(hashed) == 2  # changed a moment ago: it may change again within the clock's tick
    monkeypatch.setattr(tensor_files, "SETTLED_S", -1)
    before = identity(copy)
    assert identity(copy) == before and len(hashed) == 3

    # In place, with the same size and the old time of modification.
    stat = path.stat()
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert identity(copy) != before
    (tmp_path / "cache" / "pref" / "weights.json").write_text("damaged")
    assert identity(copy) != before and len(hashed) == 5
