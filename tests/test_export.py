"""export.py: the merged model is base + adapter, whole or not there at all."""

import json
import shutil
from http.server import BaseHTTPRequestHandler

import huggingface_hub.constants
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_gen import split
from transformers import AutoModelForCausalLM, AutoTokenizer

import export
import train_pref
from pref.files import model_card
from pref.files.console import UserError
from pref.model import hub, merge, weights

RUN = "dpo_run"


@pytest.fixture(scope="module")
def results(tiny_model, pairs_folder, tmp_path_factory):
    """A run whose adapter has moved away from the base."""
    folder = tmp_path_factory.mktemp("export") / "results"
    arguments = split("--dtype float32 --lora_r 4 --lora_alpha 12 --global_batch 8")
    arguments += ["--model", str(tiny_model), "--data", str(pairs_folder)]
    arguments += split("--learning_rate 0.05 --max_steps 3 --run_id", RUN, "--results_dir", folder)
    train_pref.main(arguments)
    return folder


@pytest.fixture
def run(results, tmp_path):
    """The run in a folder of its own."""
    return shutil.copytree(results / RUN, tmp_path / RUN)


def call(run, *more) -> int:
    return export.main([str(run), *map(str, more)])


def change(run, **values) -> None:
    record = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(record | values))


@torch.no_grad()
def test_the_merged_model_is_base_and_adapter(run, tiny_model, capsys):
    """Its logits are those of PEFT, its greedy answers too; what stands beside the weights is the
    base's, byte for byte.
    """
    assert call(run, "--dtype", "float32") == 0
    out = run / "merged"
    assert f"vllm serve {out}" in capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, run / "adapter").eval()
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    assert model.dtype == torch.float32 and not hasattr(model, "peft_config")
    ids = torch.arange(40)[None] % 500 + 20
    expected = adapted(ids).logits
    assert torch.allclose(model(ids).logits, expected, atol=1e-4)
    with adapted.disable_adapter():
        assert (adapted(ids).logits - expected).abs().max() > 0.1
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("Write a list", return_tensors="pt")
    greedy = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(**prompt, **greedy), adapted.generate(**prompt, **greedy))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (tiny_model / name).is_file():
            assert (out / name).read_bytes() == (tiny_model / name).read_bytes()
    weights.find_model(str(out))


def test_weights_are_summed_in_fp32_and_rounded_once(run, tiny_model):
    call(run)
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    ours = load_file(run / "merged/model.safetensors")
    base = load_file(tiny_model / "model.safetensors")
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    scaling = config["lora_alpha"] / config["r"]
    expected = base[f"{name}.weight"].bfloat16().double() + scaling * b @ a
    found = ours[f"{name}.weight"]
    assert found.dtype == torch.bfloat16
    assert (found != expected.bfloat16()).double().mean() < 0.001  # fp32 lies on an edge at times
    assert torch.equal(ours["model.norm.weight"], base["model.norm.weight"].bfloat16())
    record = json.loads((run / "merged/export.json").read_text())
    assert record["dtype"] == "bfloat16"
    assert 0 < record["comparison"]["merging"] < 0.2 * record["comparison"]["adapter"]


def test_a_second_start_has_nothing_to_do(run, capsys, monkeypatch):
    call(run)
    monkeypatch.setattr(export, "merge_and_write", None)
    assert call(run) == 0
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"merged: is there, and not from this adapter in float32"):
        call(run, "--dtype", "float32")


def test_what_was_killed_is_begun_again_and_what_fails_leaves_nothing(run, monkeypatch):
    left = run / "merged.partial"
    left.mkdir()
    (left / "model.safetensors").write_text("torn")
    monkeypatch.setattr(export.model_card, "text", lambda *_: (_ for _ in ()).throw(OSError(28)))
    with pytest.raises(OSError):
        call(run)
    assert not left.exists() and not (run / "merged").exists()
    monkeypatch.undo()
    assert call(run) == 0 and (run / "merged/export.json").is_file() and not left.exists()


def test_a_wrong_sum_is_not_written(run, monkeypatch):
    """With half of the scaling forgotten the log-probs are not those of base + adapter."""

    def wrong(model, place):
        for module in model.modules():
            if isinstance(module, merge.LoraLayer):
                module.scaling["default"] *= 0.2
        return merged(model, place)

    merged = merge.merged
    monkeypatch.setattr(export.merge, "merged", wrong)
    with pytest.raises(UserError, match="differ from those of base . adapter by .* not written"):
        call(run)
    assert not (run / "merged").exists()


def test_an_adapter_that_drowns_in_rounding_is_named(capsys, results, tmp_path):
    run = export.Run(results / RUN, {}, {})
    wanted = export.Wanted(tmp_path, "bfloat16", {})
    export.print_comparison(merge.Comparison(0.01, 0.02, 50), run, wanted)
    assert "warning: rounding to bfloat16 changes 50% as much" in capsys.readouterr().out
    export.print_comparison(merge.Comparison(0.001, 0.02, 50), run, wanted)
    assert "warning" not in capsys.readouterr().out
    run = run._replace(record={"quant": "nf4"})
    export.print_comparison(merge.Comparison(0.001, 0.02, 50), run, wanted)
    assert "in 4 bits, and is merged into it in 16" in capsys.readouterr().out


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda run: (run / "args.json").unlink(), "no run there"),
        (lambda run: (run / "summary.json").unlink(), "has not finished; continue it first"),
        (lambda run: shutil.rmtree(run / "adapter"), "ended without an adapter"),
        (lambda run: change(run, model="nowhere/at-all"), "with --model"),
        (lambda run: change(run, model_sha256="0" * 64), "is another model .* has changed"),
        (lambda run: change(run, data="nowhere"), "val.jsonl: no such file; give .* --data"),
        (
            lambda run: (run / "adapter/adapter_model.safetensors").write_text("torn"),
            "cannot be read",
        ),
    ],
)
def test_what_cannot_be_exported_is_named(run, break_it, message):
    break_it(run)
    with pytest.raises(UserError, match=message):
        call(run)
    assert not (run / "merged").exists()


def test_a_full_disk_is_named_before_anything_is_written(run, monkeypatch):
    usage = shutil.disk_usage(run)._replace(free=1000)
    monkeypatch.setattr(export.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(export.merge, "merged", None)
    with pytest.raises(UserError, match="0.0 GB free, and the model takes"):
        call(run)


def test_sums_beyond_the_range_of_a_dtype_are_named(run):
    path = run / "adapter/adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = torch.full_like(tensors[name], 1e6)
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"not finite|NaN or infinite"):
        call(run, "--dtype", "float16")


@pytest.mark.parametrize(
    "words, message",
    [(["--num_pairs", "0"], "at least one pair"), (["--private"], "is for --push")],
)
def test_arguments_that_cannot_be_meant(run, words, message):
    with pytest.raises(UserError, match=message):
        call(run, *words)


# ---- the card, and the hub ----------------------------------------------------------------------


def test_the_card_has_the_licence_of_the_base_and_no_path(tmp_path):
    header = "---\nlicense: apache-2.0\nlanguage: en\n---\n# A model\n"
    (tmp_path / "README.md").write_text(header)
    record = {"run_id": "r", "loss": "td_dpo", "beta": 2.5, "data": "/home/me/data/mix"}
    record |= {"init_adapter": "/home/me/results/a/adapter", "lora_targets": "a|b"}
    compared = {"merging": 0.01, "adapter": 0.5, "tokens": 1234}
    more = {"dtype": "bfloat16", "comparison": compared, "versions": {"pref": "1"}}
    summary = {"best_acc_ref": 0.71234, "final_acc_ref": None}
    text = model_card.text(record, summary, "/home/me/base-7b", tmp_path, more)
    assert 'license: "apache-2.0"' in text and 'base_model: "base-7b"' in text
    assert "/home/me" not in text and "| beta | 2.5 |" in text and "a\\|b" in text
    assert "0.7123" in text and "1,234 response tokens by 0.01" in text
    assert "does not name one" in model_card.text(record, {}, "b", tmp_path / "none", more)


@pytest.fixture
def stand_in(server, monkeypatch):
    """A hub on loopback. Its answers are set as `.answers[path] = (status, JSON)`."""
    answers = {}

    def reply(self: BaseHTTPRequestHandler) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, value = answers.get(self.path, (404, {"error": "not found"}))
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    handler = server.httpd.RequestHandlerClass
    monkeypatch.setattr(handler, "do_GET", reply, raising=False)
    monkeypatch.setattr(handler, "do_POST", reply)
    address = f"http://127.0.0.1:{server.httpd.server_port}"
    api = hub.HfApi
    monkeypatch.setattr(hub, "HfApi", lambda: api(endpoint=address, token="hf_secret"))
    return answers


def test_a_push_that_is_not_allowed_is_named_before_anything_is_merged(run, stand_in, monkeypatch):
    monkeypatch.setattr(export, "merge_and_write", None)
    for status, message in ((401, "login is not valid"), (403, "may not write there")):
        stand_in["/api/repos/create"] = (status, {"error": "no"})
        with pytest.raises(UserError, match=f"--push me/x: .*{message}") as caught:
            call(run, "--push", "me/x")
        assert "hf_secret" not in str(caught.value)
    stand_in["/api/repos/create"] = (200, {"url": "http://127.0.0.1/you/x"})
    stand_in["/api/whoami-v2"] = (200, {"name": "me", "orgs": [{"name": "lab"}]})
    with pytest.raises(UserError, match="me is neither you nor a member of it"):
        call(run, "--push", "you/x")
    stand_in["/api/repos/create"] = (200, {"url": "http://127.0.0.1/lab/x"})
    hub.check_push("lab/x", private=False)


def test_a_hub_out_of_reach_and_a_name_that_is_none(run, monkeypatch):
    api = hub.HfApi
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HfApi", lambda: api(endpoint="http://127.0.0.1:9", token="hf_x"))
    with pytest.raises(UserError, match="--push me/x: the hub cannot be reached"):
        call(run, "--push", "me/x")
    with pytest.raises(UserError, match="--push a/b/c: .*give USER/NAME"):
        call(run, "--push", "a/b/c")
