"""judge.py with a local judge: scores from log-probabilities."""

import json
import math
import shutil
from pathlib import Path

import pytest
from judge_workplace import (
    ANSWERS,
    QUESTIONS,
    arguments,
    make_run,
    our_messages,
    rows_of,
)
from safetensors.torch import load_file, save_file

import judge
from pref.files.console import UserError
from pref.judging import local_judge
from pref.model import weights

pytest_plugins = ("judge_fixtures",)


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A random Llama of some thousand parameters whose tokenizer splits "10" in two."""
    import tokenizers
    import torch
    import transformers

    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(
        ["Rating: [[5]] or [[7]] of the answer", "the question and the answer"] * 50, trainer
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.5,
    )
    folder = tmp_path_factory.mktemp("tiny")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def naive_score(model, tokenizer, messages: list[dict]) -> tuple[float, list[float]]:
    """Score and probabilities from ten full sequences, one forward pass each."""
    import torch

    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    probabilities = []
    for rating in range(1, 11):
        string = tokenizer(f"[[{rating}]]", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            probs = model(torch.tensor([prompt + string])).logits[0].double().softmax(-1)
        steps = [probs[len(prompt) + i - 1, token].item() for i, token in enumerate(string)]
        probabilities.append(math.prod(steps))
    return sum(r * p for r, p in enumerate(probabilities, 1)) / sum(probabilities), probabilities


def test_the_local_score_equals_the_naive_one(tiny):
    model, tokenizer = local_judge.load_judge(str(tiny), "float32")
    for question in QUESTIONS:
        messages = our_messages(question, 2)
        reply = local_judge.ask_local(model, tokenizer, {"messages": messages})
        score, probabilities = naive_score(model, tokenizer, messages)
        assert reply["status"] == "ok"
        assert reply["score"] == pytest.approx(score, rel=1e-5)
        given = json.loads(reply["judgement"])
        assert list(given) == [str(rating) for rating in range(1, 11)]
        assert list(given.values()) == pytest.approx(probabilities, rel=1e-4)


def test_rating_strings_have_different_lengths(tiny):
    _, tokenizer = local_judge.load_judge(str(tiny), "float32")
    ids, ratings = local_judge.encode_ratings(tokenizer, "<|assistant|>\n")
    assert len(set(map(len, ratings))) > 1, "or padding is not tested"
    assert tokenizer.decode(ids + ratings[9]) == "<|assistant|>\n[[10]]"


def test_a_string_that_merges_with_the_prompt_is_encoded_alone(tiny):
    _, tokenizer = local_judge.load_judge(str(tiny), "float32")
    prompt = "of the ["  # "[[" is one token after it was trained, so the boundary falls inside it
    ids, ratings = local_judge.encode_ratings(tokenizer, prompt)
    assert ids == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert ratings[0] == tokenizer("[[1]]", add_special_tokens=False)["input_ids"]


def test_local_judge_end_to_end(workplace, tiny, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    command = [*arguments(workplace, None, model=f"hf:{tiny}"), "--allow_incomplete"]
    assert judge.main([*command, "--dtype", "float32"]) == 0
    rows = rows_of(workplace)
    assert all(row["status"] == "ok" and 1 < row["score"] < 10 for row in rows)
    assert len({row["score"] for row in rows}) == 6
    assert 0 < rows[0]["judge_params_b"] < 0.001
    assert "smoke test" in capsys.readouterr().out

    asked = []
    monkeypatch.setattr(local_judge, "ask_local", lambda *args: asked.append(1))
    assert judge.main([*command, "--dtype", "float32"]) == 0
    assert not asked
    assert rows_of(workplace) == rows


def test_a_prompt_beyond_the_context_has_no_score(workplace, tiny):
    make_run(workplace, "base", {**ANSWERS, 81: ["word " * 600, "x"]})
    command = [*arguments(workplace, None, model=f"hf:{tiny}"), "--allow_incomplete"]
    assert judge.main(command) == 1
    rows = {(row["question_id"], row["turn"]): row for row in rows_of(workplace)}
    assert (rows[81, 1]["status"], rows[81, 1]["score"]) == ("context", None)
    assert rows[111, 1]["status"] == "ok"


def test_other_weights_at_the_same_path_are_another_judge(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "judge")
    before = weights.identity(weights.find_model(str(tiny)))
    assert weights.identity(weights.find_model(str(folder))) == before
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][5] += 0.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert weights.identity(weights.find_model(str(folder))) != before


def test_a_path_without_a_model(workplace, tmp_path):
    with pytest.raises(UserError, match="--judge hf:"):
        local_judge.load_judge(str(tmp_path), "float32")
