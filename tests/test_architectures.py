"""Log-probs of tiny random models of many architectures, against a computation that shares no code
with the engine: one sequence at a time, the architecture's own forward, plain PEFT.
"""

from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from conftest import ROOT
from peft import PeftModel
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from pref.files.console import UserError
from pref.model import architecture, attention, lora, trained
from pref.model.chat import TokenPair
from pref.model.logps import ResponseLogps, check_logps, sum_by_row
from pref.model.packing import Packing, make_batch

VOCABULARY, LONGEST = 64, 22
# Sizes by the names that configurations give them; each gets those that it knows.
SIZES = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "max_seq_len": 128,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "q_lora_rank"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_heads", "mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "first_k_dense_replace"), 1),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("ssm_state_size", "state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("kv_lora_rank", "mamba_head_dim", "mamba_d_head"), 16),
}


def config_of(kind: str, **more):
    """A tiny configuration of this model type."""
    default = AutoConfig.for_model(kind)
    aliases = set(getattr(default, "attribute_map", {}))
    known = set(default.to_dict()) - aliases
    return AutoConfig.for_model(kind, **({k: v for k, v in SIZES.items() if k in known} | more))


def random_weights(model: nn.Module) -> nn.Module:
    """Weights large enough for every part to matter; norms stay as they are."""
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and "A_log" not in name
        if is_matrix or "sink" in name or name.endswith("bias"):
            parameter.data.normal_(0, 0.2)
    return model


def pairs() -> list[TokenPair]:
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()

    return [TokenPair(tokens(p), tokens(a), tokens(b)) for p, a, b in ((7, 9, 5), (4, 3, 11))]


PAIRS = pairs()


def plain_sums(model: nn.Module) -> Tensor:
    """Log-probs of each response, chosen first; (2B,). One sequence at a time, no padding."""
    sums = []
    for side in ("chosen", "rejected"):
        for pair in PAIRS:
            response = getattr(pair, side)
            ids = torch.tensor([pair.prompt + response])
            logits = model(input_ids=ids, use_cache=False).logits[0, -len(response) - 1 : -1]
            each = logits.double().log_softmax(-1)[range(len(response)), response]
            sums.append(each.sum())
    return torch.stack(sums)


def engine_sums(policy: ResponseLogps, packed: bool) -> Tensor:
    packing = Packing(0, tokens=99) if packed else Packing(0, padded=True, shared=False)
    batch = make_batch(PAIRS, packing, torch.device("cpu"))
    return sum_by_row(policy(batch).logps, batch)


MLA = {
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
WINDOW = {"sliding_window": 8}
OWN = "an attention of their own"
# How each is computed and why, as the table in pref/model/README.md has it. A name may have a
# variant after "+", with other settings.
FAMILIES = {
    ("packed", "softmax attention, and nothing else, between tokens"): """
        llama mistral ministral qwen2 qwen3 gemma gemma3_text phi phi3 stablelm starcoder2 cohere
        cohere2 olmo olmo2 olmo3 granite glm glm4 nemotron smollm3 exaone4 ernie4_5 helium
        hunyuan_v1_dense seed_oss arcee apertus minicpm3 persimmon gpt_neox gpt2 gpt_bigcode opt
        biogpt diffllama mixtral+jitter qwen2_moe qwen3_moe olmoe granitemoe phimoe+jitter dots1
        glm4_moe deepseek_v2 deepseek_v3 llama4_text""",
    ("plain", "attention sinks, a cap on attention's logits"): """
        gpt_oss granite_swa mimo_v2_flash gemma2 vaultgemma""",
    ("plain", "a window or chunk shorter than the longest pair"): """
        mistral+window gemma3_text+window llama4_text+window phi3+window""",
    ("plain", "a state beside attention: linear attention, convolution, state space"): """
        mamba mamba2 jamba bamba falcon_h1 granitemoehybrid nemotron_h qwen3_next lfm2 minimax
        recurrent_gemma rwkv falcon_mamba""",
    ("plain", "ALiBi or a mask of its own"): "bloom mpt doge",
    ("plain", "code that takes no other attention or no positions"): """
        falcon gptj gpt_neo codegen xglm openai-gpt""",
    ("refused", "encoders, encoder-decoders, images or sound beside text"): "bert bart t5 llava",
    ("refused", "several lists of layers"): "hrm_text",
}
MORE = {
    "mixtral+jitter": {"router_jitter_noise": 0.3},
    "phimoe+jitter": {"router_jitter_noise": 0.1, "input_jitter_noise": 0.3},
    "opt": {"dropout": 0.3, "layerdrop": 0.5},
    "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "dots1": {"n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "minicpm3"), MLA),
    **dict.fromkeys(("mistral+window", "gemma3_text+window", "phi3+window"), WINDOW),
    "gemma3_text+window": WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},
    "llama4_text": {"intermediate_size_mlp": 48},
    "llama4_text+window": {"attention_chunk_size": 8, "intermediate_size_mlp": 48},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 64},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "bamba": {"attn_layer_indices": [1]},
    "lfm2": {"full_attn_idxs": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
}
CASES = [(name, path, why) for (path, why), names in FAMILIES.items() for name in names.split()]
# What a reason says, where the table's words are more general.
SAYS = {
    "gpt_oss": "s_aux",
    "gemma2": "softcap",
    "mistral+window": "window of 8",
    "llama4_text+window": "window of 8",
    "lfm2": "(conv)",
    "jamba": "(linear_attention)",
    "rwkv": "a state from token to token",
    "falcon": OWN,
    "bloom": "does not take a packed row",
    "bert": "attends to later tokens",
    "t5": "not a causal language model",
    "llava": "not a causal language model",
}


class Model(NamedTuple):
    """An architecture with random weights, and its adapter on disk."""

    policy: ResponseLogps
    own: nn.Module  # the same weights in a model of its own, with its eager attention
    adapter: Path
    packed: bool


def random_models(config) -> tuple[nn.Module, nn.Module]:
    """The architecture twice with the same weights, the second with its eager attention."""
    torch.manual_seed(0)
    base, own = (
        AutoModelForCausalLM.from_config(deepcopy(config), dtype=torch.float32, **more)
        for more in ({}, {"attn_implementation": "eager"})
    )
    own.load_state_dict(random_weights(base).state_dict())
    return base, own.eval()


def make(config, folder: Path) -> Model:
    facts = architecture.of_config(config)
    packed = not facts.plain(LONGEST)
    base, own = random_models(config)
    adapted = lora.add_lora(base.requires_grad_(False), 4, 8, 0.3, "all-linear", seed=1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    adapted.save_pretrained(folder)
    policy = ResponseLogps(adapted, "branches" if packed else facts.attention)
    return Model(policy, own, folder, packed)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "path", "why"), CASES, ids=[name for name, *_ in CASES])
def test_log_probs_are_the_architectures_own(name, path, why, tmp_path):
    """With the adapter, loaded by plain PEFT, and without; and every gradient is finite."""
    kind = name.split("+")[0]
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} lacks {kind}")
    config = config_of(kind, **MORE.get(name, {}))
    facts = architecture.of_config(config)
    reason = facts.refusal(LONGEST) or facts.plain(LONGEST)
    decided = "refused" if facts.refusal(LONGEST) else "plain" if reason else "packed"
    assert (decided, SAYS.get(name, "") in reason) == (path, True), reason
    if path == "refused":
        return

    model = make(config, tmp_path)
    with lora.dropout(model.policy, active=False):
        with_adapter = engine_sums(model.policy, model.packed)
        with_adapter.sum().backward()
    with torch.no_grad():
        expected = plain_sums(model.own)
        with lora.adapter_off(model.policy):
            without = engine_sums(model.policy, model.packed)
        loaded = plain_sums(PeftModel.from_pretrained(model.own, model.adapter).eval())
    assert torch.allclose(without.double(), expected, rtol=0, atol=1e-4)
    assert torch.allclose(with_adapter.detach().double(), loaded, rtol=0, atol=1e-4)
    assert (loaded - expected).abs().min() > 1e-3  # the adapter matters
    gradients = [p.grad for p in model.policy.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


# Parameters that no gradient reaches, in the architecture's own code neither: softmax does not see
# what is the same for all keys, and Doge's mask chooses among more keys than there are here.
IDLE = dict.fromkeys(("opt", "biogpt", "xglm"), ("k_proj.bias",)) | {"doge": ("dt_proj.weight",)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, path, _ in CASES if path != "refused"])
def test_all_parameters_gradients_are_the_architectures_own(name):
    """Where all are trained: of every parameter, with the head's in chunks, and tied weights. A
    step that AdamW takes on them lowers the loss.
    """
    kind = name.split("+")[0]
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} lacks {kind}")
    # Of one expert the weight is 1, whatever the router says.
    has_experts = hasattr(AutoConfig.for_model(kind), "num_experts_per_tok")
    experts = {"num_experts_per_tok": 2} if has_experts else {}
    config = config_of(kind, **MORE.get(name, {}), **experts)
    facts = architecture.of_config(config)
    packed = not facts.plain(LONGEST)
    base, own = random_models(config)
    trained.train_all(base, None, torch.float32)
    policy = ResponseLogps(base, "branches" if packed else facts.attention)
    policy.chunk_tokens = 5
    weights = torch.tensor([1.0, 2.0, -1.0, -0.5])
    (engine_sums(policy, packed) * weights).sum().backward()
    (plain_sums(own) * weights).sum().backward()
    expected = {n: p.grad for n, p in own.named_parameters()}
    largest = max(grad.norm() for grad in expected.values() if grad is not None)
    idle = set()
    for parameter_name, parameter in base.named_parameters():
        ours, right = parameter.grad, expected[parameter_name]
        if right is None or right.norm() < 1e-7 * largest:
            idle.add(parameter_name)
            assert ours is None or ours.norm() < 1e-6 * largest, parameter_name
        else:
            limit = 1e-4 * right.norm() + 1e-6 * largest
            assert (ours - right).norm() <= limit, parameter_name
    known = IDLE.get(kind, ())
    assert {n for n in idle if not any(part in n for part in known)} == set(), kind
    assert all(any(part in n for n in idle) for part in known), kind
    before = engine_sums(policy, packed).detach()
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-5)
    optimizer.step()
    with torch.no_grad():
        assert ((engine_sums(policy, packed) - before) * weights).sum() < 0


# ---- what is refused, and what is said ----------------------------------------------------------


def of(kind: str, **settings) -> architecture.Architecture:
    return architecture.of_config(config_of(kind, **settings))


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 20,
    "rope_theta": 1e4,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


def test_rotary_frequencies_that_depend_on_the_batch_are_refused():
    for model in (
        of("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=20),
        of("llama", rope_parameters=DYNAMIC, max_position_embeddings=20),
    ):
        assert "--max_length 20 or less" in model.refusal(21)
        assert (model.refusal(20), model.plain(20)) == ("", "")
    linear = of("llama", rope_parameters=DYNAMIC | {"rope_type": "linear"})
    assert linear.refusal(10**6) == ""


def test_lengths_beyond_what_a_model_was_made_for():
    learned, rotary = of("gpt2", n_positions=20), of("llama", max_position_embeddings=20)
    assert "gpt2's 20 positions" in learned.refusal(21) and learned.refusal(20) == ""
    assert rotary.refusal(21) == "" and "the 20 that llama was made for" in rotary.warning(21)
    assert rotary.warning(20) == of("mamba").warning(10**6) == ""


def test_training_noise_of_the_base_is_named():
    assert of("gpt2", **MORE["gpt2"]).noise == (
        "resid_pdrop 0.3",
        "embd_pdrop 0.3",
        "attn_pdrop 0.3",
    )
    assert "input_jitter_noise 0.3" in of("phimoe", **MORE["phimoe+jitter"]).noise
    assert of("llama").noise == ()


def test_only_the_adapters_dropout_stays_on(tmp_path):
    policy = make(config_of("gpt2", **MORE["gpt2"]), tmp_path).policy
    training = {name for name, module in policy.named_modules() if module.training}
    on = {name for name in training if name.endswith("lora_dropout.default")}
    assert len(on) == 8 and not any(
        type(m) is nn.Dropout for n, m in policy.named_modules() if n in training - on
    )
    first, second = (engine_sums(policy, packed=True) for _ in range(2))
    assert not torch.equal(first, second)  # the adapter's own


class FourBit(nn.Linear):
    """Stands for bitsandbytes' layer, which repacks its weights in eval mode on the CPU."""


def test_quantised_layers_stay_in_train_mode():
    model = nn.Sequential(FourBit(2, 2), nn.Linear(2, 2), nn.Dropout())
    lora.only_adapter_trains(model)
    assert [module.training for module in model] == [True, False, False]


def adapted(kind: str, targets: str, **settings):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config_of(kind, **settings))
    return lora.add_lora(base, 4, 8, 0.0, targets, seed=1)


@pytest.mark.parametrize(
    ("kind", "targets", "settings", "message"),
    [
        ("llama", "embed_tokens", {}, "not a linear layer"),
        ("llama", "wq", {}, "not found"),
        ("mixtral", "q_proj,w1", {}, "w1: PEFT takes this name for the model's experts"),
        ("laguna", "all-linear", {}, "would not load an adapter on .*shared_experts"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(kind, targets, settings, message):
    with pytest.raises(UserError, match=message):
        lora.check_loads_back(adapted(kind, targets, **settings))


def test_an_adapter_on_a_tied_head_comes_with_a_warning():
    tied, untied = (adapted("llama", "lm_head", tie_word_embeddings=tie) for tie in (True, False))
    assert "merging" in lora.tied_head_warning(tied) and lora.tied_head_warning(untied) == ""


def test_all_linear_leaves_out_what_is_none():
    """Fused experts, routers, and layers of Mamba whose weights are read directly."""
    expected = {
        "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj"},
        "phimoe": {"q_proj", "k_proj", "v_proj", "o_proj"},
        "mamba": {"in_proj", "x_proj"},
    }
    for kind, names in expected.items():
        layers = [n for n, m in adapted(kind, "all-linear").named_modules() if hasattr(m, "lora_A")]
        assert {name.rpartition(".")[2] for name in layers} == names


def test_the_start_check_sees_sinks_that_packed_attention_drops(tmp_path, monkeypatch):
    """If the decision were wrong, the attention function would refuse; and if that did not, the
    comparison with the architecture's own eager attention would.
    """
    model = make(config_of("gpt_oss"), tmp_path)
    policy = ResponseLogps(model.policy.model, "branches")
    plain = make_batch(PAIRS, Packing(0, padded=True, shared=False), torch.device("cpu"))
    packed = make_batch(PAIRS, Packing(0, tokens=99), torch.device("cpu"))
    with pytest.raises(UserError, match="more than packed attention uses .s_aux."):
        check_logps(policy, packed, plain)
    monkeypatch.setattr(attention, "unused", lambda arguments: ())
    with pytest.raises(UserError, match="own forward of GptOss.*--packing off --prefix_sharing"):
        check_logps(policy, packed, plain)
    check_logps(ResponseLogps(policy.model, "eager"), plain, plain)


def table() -> list[str]:
    """The table of pref/model/README.md."""
    rows = ["| computed | because of | tested with |", "| --- | --- | --- |"]
    for (path, why), names in FAMILIES.items():
        kinds = dict.fromkeys(name.split("+")[0] for name in names.split())
        rows.append(f"| {path} | {why} | {', '.join(kinds)} |")
    return rows


def test_readme_says_how_architectures_are_computed():
    text = (ROOT / "pref" / "model" / "README.md").read_text(encoding="utf-8")
    assert "\n".join(table()) in text
    assert len({name.split("+")[0] for name, path, _ in CASES if path != "refused"}) >= 60
