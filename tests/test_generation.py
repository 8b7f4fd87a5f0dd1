"""The engine on tiny random models: equal to `generate`, whatever shares the batch."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from pref.answering.generation import GREEDY_BELOW, MOST_ADAPTERS, Engine, Request
from pref.files.console import UserError


def plain_generate(model, ids: list[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy tokens by transformers' `generate`, and at each the distance between the two largest
    logits.
    """
    given = torch.tensor([ids])
    output = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = [step[0].float().topk(2).values for step in output.logits]
    return output.sequences[0, len(ids) :].tolist(), [(pair[0] - pair[1]).item() for pair in best]


def greedy(prompt: list[int], count: int, adapter: str | None = None, tag=None) -> Request:
    return Request(prompt, adapter, temperature=0.0, seed=0, max_new_tokens=count, tag=tag)


@pytest.mark.parametrize("kind", ["gemma2", "mistral"])
def test_soft_caps_and_sliding_windows(tiny_model, kind):
    """Other kinds of attention, prompts longer than the window, rows that leave and join."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 600,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "pad_token_id": 2,
        "eos_token_id": 2,
    }
    if kind == "gemma2":
        model = Gemma2ForCausalLM(
            Gemma2Config(
                **sizes, sliding_window=8, attn_logit_softcapping=1.0, final_logit_softcapping=2.0
            )
        )
    else:
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=8))
    prompts = [torch.randint(3, 600, (length,)).tolist() for length in (5, 30, 17, 40)]
    expected = [plain_generate(model.eval(), prompt, 10)[0] for prompt in prompts]
    engine, answers = Engine(model, {}, rows=2, length=64, ends=[2]), {}
    requests = (greedy(prompt, 10, tag=number) for number, prompt in enumerate(prompts))
    engine.run(requests, lambda request: answers.update({request.tag: request.tokens}))
    assert [answers[number] for number in range(4)] == expected


def test_follow_ups_keep_their_keys_and_values(tiny_model):
    """Turn 2 begins with turn 1: only the new tokens go through the model, and the answer equals
    that of a fresh row.
    """
    models = [AutoModelForCausalLM.from_pretrained(tiny_model).eval() for _ in range(2)]
    engine, sizes, answers = Engine(models[0], {}, rows=1, length=128, ends=[2]), [], []
    original = engine.forward
    engine.forward = lambda flat: sizes.append(len(flat.tokens)) or original(flat)

    def finished(request):
        answers.append(request.tokens)
        if request.tag == 1:
            return greedy([*request.prompt, *request.tokens, 9, 10, 11], 6, tag=2)
        return None

    engine.run(iter([greedy(list(range(5, 45)), 6, tag=1)]), finished)
    assert sizes == [40, *[1] * 5, 4, *[1] * 5]  # 4: the last token of turn 1 and three new ones
    prompt = [*range(5, 45), *answers[0], 9, 10, 11]
    assert answers[1] == plain_generate(models[1], prompt, 6)[0]


def test_sampling_follows_the_softmax(tiny_model):
    engine = Engine(AutoModelForCausalLM.from_pretrained(tiny_model), {}, rows=1, length=8, ends=[])
    logits, request = torch.tensor([[0.0, 1.0, 2.0, -1.0]]), Request([1], None, 0.7, 5, 1)
    draws = torch.tensor([engine.pick(logits.clone(), [request])[0] for _ in range(20000)])
    frequencies = torch.bincount(draws, minlength=4) / len(draws)
    assert torch.allclose(frequencies, (logits[0] / 0.7).softmax(0), atol=0.015)
    assert engine.pick(logits.clone(), [Request([1], None, GREEDY_BELOW / 2, 5, 1)]) == [2]
    with pytest.raises(UserError, match="dpo: its logits are NaN"):
        engine.pick(logits * float("nan"), [Request([1], "dpo", 0.0, 5, 1)])


def test_many_adapters_take_turns_in_memory(tiny_model, tmp_path):
    """Never more than MOST_ADAPTERS are loaded, though 20 are answered for."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    folders = {f"run{number:02}": tmp_path / f"run{number:02}" for number in range(20)}
    for folder in folders.values():
        model.save_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    engine = Engine(base, folders, rows=16, length=32, ends=[2])
    loaded, original = [], engine.adapters.use

    def use(names):
        original(names)
        loaded.append(len(engine.adapters.loaded))

    engine.adapters.use = use
    engine.run((greedy([5, 6, 7], 3, adapter=name) for name in folders), lambda request: None)
    assert max(loaded) == MOST_ADAPTERS
