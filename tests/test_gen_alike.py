"""What is the same gets the same answers, whatever else a call does; what moved is still found."""

import json
import shutil

import pytest
import torch
from conftest import write_jsonl
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import gen_mtbench
from pref.answering import local
from pref.files.console import UserError
from pref.model import loading

QUESTIONS = 6


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    turns = [[f"Explain thing {i}." + " Why?" * (5 * i), "Shorter."] for i in range(QUESTIONS)]
    rows = [{"question_id": i, "category": "math", "turns": turns[i]} for i in range(QUESTIONS)]
    rows[1]["category"] = rows[4]["category"] = "writing"  # sampled
    return write_jsonl(tmp_path_factory.mktemp("questions") / "q.jsonl", rows)


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """Two runs with random adapters: a, b."""
    folder = tmp_path_factory.mktemp("alike")
    base = loading.load_base(str(tiny_model), torch.float32, "none", torch.device("cpu"))
    weights = loading.fingerprint(base)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
        model.save_pretrained(folder / name / "adapter")
        record = {"run_id": name, "model": str(tiny_model), "quant": "none", "dtype": "float32"}
        record["base_sha256"] = weights
        (folder / name / "args.json").write_text(json.dumps(record))
    return folder


def copy(trained, run, results, name=None):
    shutil.copytree(trained / run, results / (name or run))
    return results


def answer(questions, *arguments) -> int:
    fixed = ["--questions", questions, "--max_new_tokens", "6"]
    return gen_mtbench.main([str(argument) for argument in (*arguments, *fixed)])


def rows_of(results, run) -> dict[int, dict]:
    lines = (results / run / "q" / "answers.jsonl").read_text().splitlines()
    return {row["question_id"]: row for row in map(json.loads, lines)}


def turns_of(results, run) -> dict[int, list[str]]:
    return {number: row["choices"][0]["turns"] for number, row in rows_of(results, run).items()}


@pytest.mark.slow
def test_in_bf16_an_answer_depends_on_nothing_else_in_the_batch(
    trained, questions, tmp_path, capsys
):
    """Not on other runs, on the number of questions, nor on what was answered before. Where it can
    depend on something, on the batch size, a note says that two runs differ in it.
    """
    more = ("--dtype", "bfloat16", "--batch_size", "3")
    together, alone = tmp_path / "together", tmp_path / "alone"
    copy(trained, "a", copy(trained, "b", together))
    answer(questions, together, *more)
    copy(trained, "a", alone)
    answer(questions, alone, "--num_questions", "3", *more)
    answer(questions, alone, *more)
    assert turns_of(alone, "a") == turns_of(together, "a") != turns_of(together, "b")
    row = rows_of(alone, "a")[0]
    assert row["batch_size"] == 3 and row["device"] == "cpu"
    assert "batch size" not in capsys.readouterr().out

    answer(questions, copy(trained, "b", alone), *more[:2], "--batch_size", "2")
    note = f"note: {QUESTIONS} questions were answered with another batch size"
    assert note in capsys.readouterr().out


def test_runs_with_the_same_adapter_have_the_same_answers(
    trained, questions, tmp_path, capsys, monkeypatch
):
    """Answered once in a call; later, by whatever means, a copy is taken. Another alpha makes
    another adapter of the same weights.
    """
    for name in ("first", "second", "later", "stronger"):
        copy(trained, "a", tmp_path, name)
    path = tmp_path / "stronger/adapter/adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"lora_alpha": 10 * config["lora_alpha"]}))
    count, original = [], local.Author.finished
    monkeypatch.setattr(
        local.Author,
        "finished",
        lambda author, request: count.append(1) or original(author, request),
    )
    both = (tmp_path / "first", tmp_path / "second")
    assert answer(questions, *both, "--dtype", "float32") == 0
    assert len(count) == 2 * QUESTIONS
    assert "second: 6 conversations are those of first" in capsys.readouterr().out
    assert answer(questions, tmp_path / "later", "--dtype", "float32", "--batch_size", "5") == 0
    assert len(count) == 2 * QUESTIONS
    assert answer(questions, tmp_path / "stronger", "--dtype", "float32") == 0
    assert len(count) == 4 * QUESTIONS
    first = turns_of(tmp_path, "first")
    assert first == turns_of(tmp_path, "second") == turns_of(tmp_path, "later")
    assert first != turns_of(tmp_path, "stronger")
    row = rows_of(tmp_path, "later")[3]
    assert row["model_id"] == "later" and row["batch_size"] == 6  # of the run that answered


def test_runs_and_model_may_move(trained, questions, tiny_model, tmp_path, capsys):
    """The whole study, to a folder of another depth: the answers stay, the model is found where
    --model says, and is compared with what the runs were trained on.
    """
    old, new = tmp_path / "old", tmp_path / "new/place"
    results = copy(trained, "a", old / "results")
    shutil.copytree(tiny_model, old / "model")
    record = results / "a/args.json"
    fields = json.loads(record.read_text()) | {"model": str(old / "model")}
    record.write_text(json.dumps(fields))
    assert answer(questions, results, "--base", "--num_questions", "2", "--dtype", "float32") == 0
    before = turns_of(results, "a")
    new.parent.mkdir()
    old.rename(new)
    moved = (new / "results", "--base", "--dtype", "float32", "--model", new / "model")
    assert answer(questions, *moved, "--num_questions", "2") == 0
    assert turns_of(new / "results", "a") == before
    copy(trained, "a", new / "results", "twin")
    assert answer(questions, new / "results/twin", *moved[2:], "--num_questions", "2") == 0
    assert "twin: 2 conversations are those of a" in capsys.readouterr().out
    assert turns_of(new / "results", "twin") == before
    shutil.rmtree(new / "results/twin")
    assert answer(questions, *moved, "--num_questions", "4") == 0
    assert len(turns_of(new / "results", "a")) >= 4

    shutil.copytree(new / "model", tmp_path / "other/model")
    shutil.rmtree(new / "model")
    path = tmp_path / "other/model/model.safetensors"
    save_file({name: 2 * value for name, value in load_file(path).items()}, path, {"format": "pt"})
    more = ("--dtype", "float32", "--model", tmp_path / "other/model")
    with pytest.raises(UserError, match="trained on other weights"):
        answer(questions, new / "results", *more)
    shutil.rmtree(new / "results/a")
    with pytest.raises(UserError, match="base: holds answers of other weights"):
        answer(questions, new / "results", "--base", *more)
