"""Whatever the architecture, an answer is the one that transformers' own `generate` gives: from the
engine where it can, from `generate` itself where it cannot. Tiny random models, conversations
longer than every window.
"""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from pref.answering import fitness
from pref.answering.generation import Engine, Request, TurnTokens
from pref.answering.plain import PlainEngine

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
LATENT = {  # DeepSeek's attention: values are narrower than keys
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}

# name: (model type, config)
BY_ENGINE = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 8,
            "sliding_window": 8,
            "attn_logit_softcapping": 1.0,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3": ("gemma3_text", {"head_dim": 8, **SLIDING}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "phi3": ("phi3", {"sliding_window": 8}),
    "mixtral": ("mixtral", EXPERTS),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 8, **EXPERTS}),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {"logits_scaling": 8.0}),
    "cohere2": ("cohere2", {"logit_scale": 0.0625, **SLIDING}),
    "smollm3": ("smollm3", {}),
    "deepseek_v3": ("deepseek_v3", EXPERTS | LATENT),
}
BY_GENERATE = {
    "attention sinks": ("gpt_oss", {"head_dim": 8, "sliding_window": 8, **EXPERTS}),
    "attention in chunks": (
        "llama4_text",
        {
            **EXPERTS,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 8,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
            "interleave_moe_layer_step": 2,
        },
    ),
    "a window in the mask alone": ("phimoe", {"sliding_window": 8, **EXPERTS}),
    "two attentions a layer": ("diffllama", {}),
    "attention of its own": ("falcon", {"multi_query": False, "alibi": True}),
    "biases for distance": ("bloom", {"n_layer": 2, "n_head": 4}),
    "state space": ("mamba", {"state_size": 8}),
    "state space beside attention": (
        "jamba",
        {
            **EXPERTS,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_dt_rank": 4,
        },
    ),
    "both in one layer": ("falcon_h1", {**MAMBA, "mamba_d_ssm": 32, "mamba_d_head": 8}),
    "convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "rotary factors that grow": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
            "max_position_embeddings": 32,
        },
    ),
}


def tiny(model_type: str, config: dict):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**SIZES, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # zeros by default
            if name.endswith("bias") or "sinks" in name:
                parameter.normal_()
    return model.eval()


def by_generate(model, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=-1
    )
    return output[0, len(prompt) :].tolist()


def check(model, kind: type) -> None:
    """Greedy answers, and the logits that sampled ones are drawn from."""
    prompts = [torch.randint(3, 128, (size,)).tolist() for size in (5, 40)]
    expected = [by_generate(model, prompt) for prompt in prompts]
    logits = fitness.own_logits(model, prompts[1])
    engine = fitness.make_engine(model, {}, rows=2, length=64, ends=[], prompt=prompts[0])
    assert type(engine) is kind
    requests = [Request(prompt, None, 0.0, 0, 5) for prompt in prompts]
    engine.run(iter(requests), lambda request: None)
    assert [request.tokens for request in requests] == expected
    token = expected[1][0]
    turns = [TurnTokens(prompt, answer) for prompt, answer in zip(prompts, expected)]
    turns.append(TurnTokens(prompts[1], [token]))
    scores = [score for turn in turns for score in engine.score([turn], None)]
    assert scores[2] == pytest.approx(logits.log_softmax(-1)[token].item(), abs=1e-4)
    together = engine.score(turns[:2], None)  # in one pass, where the engine can
    assert together == pytest.approx(scores[:2], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_ENGINE)
def test_the_engine_answers_as_generate(name):
    check(tiny(*BY_ENGINE[name]), Engine)


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_GENERATE)
def test_what_the_engine_cannot_do_is_left_to_generate(name, capsys):
    check(tiny(*BY_GENERATE[name]), PlainEngine)
    assert "one conversation at a time" in capsys.readouterr().out


def test_sampled_answers_of_generate_are_the_engines():
    """Same seeds, same draws; and a repetition penalty of the model's own stays out of it."""
    answers = []
    for kind in (Engine, PlainEngine):
        model = tiny(*BY_ENGINE["llama"])
        model.generation_config.repetition_penalty = 9.0
        engine = Engine(model, {}, rows=2, length=64, ends=[7])
        if kind is PlainEngine:
            fitness.cache.uninstall(model, "sdpa")
            engine = PlainEngine(model, engine.adapters, 64, ends=[7])
        requests = [Request([5, 6, 8 + seed], None, 1.5, seed, 12) for seed in range(3)]
        engine.run(iter(requests), lambda request: None)
        answers.append([request.tokens for request in requests])
    assert answers[0] == answers[1]
