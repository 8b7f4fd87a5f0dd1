"""gen_mtbench.py with runs whose parameters were all trained, beside an adapter and the base."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from conftest import run_script, write_jsonl
from doubles import completion
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_gen import plain_logp, rows_of, split, turns_of
from test_generation import plain_generate
from transformers import AutoModelForCausalLM

import gen_mtbench
from pref.answering import served, work
from pref.answering.turns import Store
from pref.files import disk, run_folders
from pref.files.console import UserError
from pref.judging import run_answers
from pref.model import loading, lora, weights
from pref.model.chat import load_tokenizer, prompt_ids

ASKED = [["Explain tides.", "Shorter."], ["Write a list of colours.", "And more?"]]


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    rows = [
        {"question_id": 81 + i, "category": "writing", "turns": turns}
        for i, turns in enumerate(ASKED)
    ]
    return write_jsonl(tmp_path_factory.mktemp("bench") / "question.jsonl", rows).parent


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory) -> Path:
    """Two runs away from the base, without training: an adapter and a whole model."""
    results = tmp_path_factory.mktemp("made")
    sha256 = weights.identity(weights.find_model(str(tiny_model)))
    record = {"model": str(tiny_model), "model_sha256": sha256, "quant": "none", "loss": "dpo"}
    disk.write_json(results / "lora" / "args.json", record | {"run_id": "lora"})
    disk.write_json(results / "full" / "args.json", record | {"run_id": "full", "tune": "full"})

    torch.manual_seed(3)
    base = loading.load_base(str(tiny_model), torch.float32, "none", torch.device("cpu"))
    adapted = lora.add_lora(base, 4, 16, 0.0, "all-linear", seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(results / "lora" / "adapter")

    model = shutil.copytree(tiny_model, results / "full" / "model")
    tensors = load_file(model / "model.safetensors")
    moved = {name: t + 0.05 * torch.randn_like(t) for name, t in tensors.items()}
    save_file(moved, model / "model.safetensors", metadata={"format": "pt"})
    return results


@pytest.fixture
def results(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "results")


def answer(results: Path, bench: Path, *more: str) -> int:
    given = "--max_new_tokens 10 --dtype float32 --temperature 0"
    return gen_mtbench.main(split(results, "--mt_bench", bench, given, *more))


def loads(monkeypatch, fails: str = "") -> list[str]:
    """Names of the models that are loaded from now on; each must find the one before it gone.
    fails: part of the name of one that cannot be loaded.
    """
    original, names, before = loading.load_base, [], []

    def load(model, dtype, quant, device, **more):
        gc.collect()
        assert not any(reference() for reference in before), "two models in memory"
        names.append(Path(model).parent.name)  # of a run's model/ the run
        if fails and fails in model:
            raise UserError("killed")
        loaded = original(model, dtype, quant, device, **more)
        before.append(weakref.ref(loaded))
        return loaded

    monkeypatch.setattr(loading, "load_base", load)
    return names


def expected_turn(model, tokenizer, question: list[str], answers: list[str], turn: int) -> str:
    """Greedy, by transformers alone, after the answers that were given."""
    conversation = []
    for asked, answered in zip(question[: turn + 1], [*answers[:turn], None]):
        conversation.append({"role": "user", "content": asked})
        if answered is not None:
            conversation.append({"role": "assistant", "content": answered})
    tokens, distances = plain_generate(model, prompt_ids(tokenizer, conversation), 10)
    assert min(distances) > 1e-5
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_each_answers_as_its_own_model_does_and_kl_is_to_the_base(
    results, bench, tiny_model, monkeypatch, capsys
):
    names = loads(monkeypatch)
    assert answer(results, bench, "--base --kl") == 0
    assert names == ["full", tiny_model.parent.name]  # the base once, for itself and the adapter
    monkeypatch.undo()

    base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    models = {"base": base, "full": AutoModelForCausalLM.from_pretrained(results / "full/model")}
    again = AutoModelForCausalLM.from_pretrained(tiny_model)
    models["lora"] = PeftModel.from_pretrained(again, results / "lora/adapter").eval()
    tokenizer = load_tokenizer(str(tiny_model))
    texts = {name: turns_of(results, name) for name in models}
    assert texts["full"] != texts["base"] != texts["lora"] != texts["full"]
    for name, model in models.items():
        for number, question in enumerate(ASKED):
            given = texts[name][81 + number]
            for turn in range(2):
                assert given[turn] == expected_turn(model, tokenizer, question, given, turn), name
        for row in rows_of(results, name):
            (choice,) = row["choices"]
            prompt = prompt_ids(tokenizer, [{"role": "user", "content": question_of(row)}])
            ids = [*prompt, *tokenizer(choice["turns"][0], add_special_tokens=False)["input_ids"]]
            ids += [] if choice["truncated"][0] else [tokenizer.eos_token_id]
            for key, one in (("logp", model), ("logp_base", base)):
                expected = plain_logp(one, ids, len(prompt))
                assert choice[key][0] == pytest.approx(expected, rel=1e-4), (name, key)
    row = rows_of(results, "full")[0]
    assert row["adapter_sha256"] == run_folders.weights_sha256(results / "full")
    assert row["settings"]["quant"] == "none"
    assert "first prompt as the model sees it" in capsys.readouterr().out


def question_of(row: dict) -> str:
    return ASKED[row["question_id"] - 81][0]


def test_what_was_killed_between_two_models_loads_only_what_is_missing(
    results, bench, tiny_model, monkeypatch
):
    with monkeypatch.context() as patch:
        loads(patch, fails=str(tiny_model))
        with pytest.raises(UserError, match="killed"):
            answer(results, bench, "--kl")
    (choice,) = rows_of(results, "full")[0]["choices"]
    assert "logp" in choice and "logp_base" not in choice
    before = turns_of(results, "full")
    with monkeypatch.context() as patch:
        names = loads(patch)
        assert answer(results, bench, "--kl") == 0
    assert names == [tiny_model.parent.name]
    assert turns_of(results, "full") == before
    assert all("logp_base" in row["choices"][0] for row in rows_of(results, "full"))
    with monkeypatch.context() as patch:
        names = loads(patch)
        assert answer(results, bench, "--kl") == 0
    assert names == []


@pytest.mark.slow
def test_equal_models_share_their_answers_and_a_new_one_does_not(
    results, bench, monkeypatch, capsys
):
    shutil.copytree(results / "full", results / "twin")
    shutil.rmtree(results / "lora")
    names = loads(monkeypatch)
    assert answer(results, bench) == 0
    assert names == ["full"] and turns_of(results, "twin") == turns_of(results, "full")
    assert "conversations are those of full, whose model is the same" in capsys.readouterr().out

    # Trained again: its old answers are nobody's.
    path = results / "full" / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] *= -1.0
    save_file(tensors, path, metadata={"format": "pt"})
    answers = run_answers.mt_bench.read_answers(results / "full/mt_bench/answers.jsonl", None)
    with pytest.raises(UserError, match="answers are from an older model; answer again"):
        run_answers.check_adapter(results / "full", answers)
    assert answer(results, bench) == 0
    assert "full: 4 answered turns are from an older model" in capsys.readouterr().out
    assert turns_of(results, "twin") != turns_of(results, "full")


def test_adapters_on_a_base_in_4_bits_have_another_base_than_whole_models():
    record = {"quant": "nf4"}
    adapter = work.Run(Path("r/a"), "a", Path("r/a/adapter"), "1", record)
    whole = work.Run(Path("r/f"), "f", None, "2", {}, model=Path("r/f/model"))
    loaded = work.loads_of([adapter, whole], work.Base("base", "nf4"))
    assert [(one.model, one.quant, one.base_of) for one in loaded] == [
        ("r/f/model", "none", ()),
        ("base", "none", ("f",)),
        ("base", "nf4", ("a",)),
    ]
    assert len({one.name for one in loaded}) == 3
    bench = work.Bench("b", [])
    store = Store([adapter, whole], bench, {"quant": "nf4"}, batch_size=1)
    assert store.settings_of(whole)["quant"] == "none"
    assert store.settings_of(adapter)["quant"] == "nf4"
    assert served.Conversations(None, store, None, "base").names == {"a": "a", "f": "f"}


def test_a_model_that_is_not_whole_is_named(results, bench):
    path = results / "full" / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"full/model.*model\.safetensors"):
        answer(results, bench)
    path.unlink()
    shutil.rmtree(results / "lora")
    with pytest.raises(UserError, match="no trained runs here"):
        answer(results, bench)
    (results / "full" / "args.json").write_text(json.dumps({"tune": "half"}))
    with pytest.raises(UserError, match="tune is 'half'"):
        answer(results, bench)


@pytest.mark.slow
def test_two_processes_give_the_same_answers(results, bench):
    """Each takes models one after the other; --kl waits for the other's answers to each of them."""
    alone = shutil.copytree(results, results.parent / "alone")
    assert answer(alone, bench, "--base --kl") == 0
    given = "--max_new_tokens 10 --dtype float32 --temperature 0 --base --kl"
    done = run_script("gen_mtbench.py", results, "--mt_bench", bench, *given.split(), torchrun=2)
    assert done.returncode == 0, done.stderr
    for name in ("base", "lora", "full"):
        assert turns_of(results, name) == turns_of(alone, name)
        for ours, theirs in zip(rows_of(results, name), rows_of(alone, name), strict=True):
            for key in ("logp", "logp_base"):
                expected = theirs["choices"][0][key]
                assert ours["choices"][0][key] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_a_server_has_it_under_its_run_id_and_the_engine_scores_its_answers(
    results, bench, server, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    shutil.rmtree(results / "lora")
    server.answer = lambda body: completion(f"as {body['model']}")
    names = loads(monkeypatch)
    assert answer(results / "full", bench, "--base_url", server.url, "--kl") == 0
    assert {body["model"] for body in server.requests} == {"full"}
    assert turns_of(results, "full")[81] == ["as full", "as full"]
    assert len(names) == 2 and names[0] == "full"
    row = rows_of(results, "full")[0]
    assert row["settings"]["quant"] is None
    assert {"logp", "logp_base"} <= row["choices"][0].keys()
