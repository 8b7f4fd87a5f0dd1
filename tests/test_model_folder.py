"""A whole model, sharded or not, as a folder that transformers loads as it is."""

import json

import pytest
import torch
from conftest import ROOT, run_script
from safetensors import safe_open
from test_architectures import config_of, random_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from pref.model import model_folder, weights
from pref.model.ranks import Ranks

ONE = Ranks(0, 1, torch.device("cpu"))


def random_model(kind: str, **more) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(kind, **more), dtype=torch.float32)
    return random_weights(model).eval()


def origin_of(folder):
    """A folder with a tokenizer's files."""
    (folder / "additional_chat_templates").mkdir(parents=True)
    for name in ("tokenizer.json", "chat_template.jinja", "additional_chat_templates/rag.jinja"):
        (folder / name).write_text(f"the text of {name}")
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')  # without do_sample
    (folder / "model.safetensors").write_text("not this one")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gemma", "qwen2", "mixtral", "gpt2"])
def test_what_is_written_is_loaded(kind, tmp_path, monkeypatch):
    """Experts that transformers has fused are written as their architecture stores them. Files are
    limited in size, and there is an index of them.
    """
    model = random_model(kind)
    model.config.use_cache = False
    monkeypatch.setattr(model_folder, "SHARD", "20KB")
    state = model_folder.gathered(model, torch.float32, ONE)
    model_folder.write(model, tmp_path / "out", origin_of(tmp_path / "in"), torch.float32, state)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    weights.find_model(str(tmp_path / "out"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert again.dtype == torch.float32
    assert again.config.use_cache is True and model.config.use_cache is False
    ids = torch.arange(3, 20)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    for path in (tmp_path / "in").rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            name = path.relative_to(tmp_path / "in")
            assert (tmp_path / "out" / name).read_bytes() == path.read_bytes()


SHARDED = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from pref.model import model_folder
from pref.model.ranks import close_ranks, init_ranks
from test_model_folder import random_model

ranks, out = init_ranks(), Path(sys.argv[1])
for kind, is_tied in (("llama", True), ("mixtral", False)):
    model = random_model(kind, tie_word_embeddings=is_tied)
    model.model.layers[0].self_attn.requires_grad_(False)
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for part in (*model.model.layers, model):
        fully_shard(part, mp_policy=bf16)
    state = model_folder.gathered(model, torch.bfloat16, ranks)
    if ranks.main:
        model_folder.write(model, out / kind, Path(sys.argv[2]), torch.bfloat16, state)
    else:
        assert state == {{}}
close_ranks()
"""


def test_shards_of_several_ranks_are_one_model(tmp_path, tiny_model):
    """In bf16, rounded from fp32 once; a tied head is stored once, and a frozen part too."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    done = run_script(script, tmp_path, tiny_model, torchrun=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Writing" not in done.stderr
    for kind, is_tied in (("llama", True), ("mixtral", False)):
        with safe_open(tmp_path / kind / "model.safetensors", "pt") as file:
            keys = list(file.keys())
            assert ("lm_head.weight" in keys) is not is_tied
            assert {file.get_slice(key).get_dtype() for key in keys} == {"BF16"}
        assert json.loads((tmp_path / kind / "config.json").read_text())["dtype"] == "bfloat16"
        model = AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype="auto")
        expected = random_model(kind, tie_word_embeddings=is_tied).bfloat16().state_dict()
        assert model.state_dict().keys() == expected.keys()
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, expected[name]), name
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / kind)
        assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_model).chat_template
