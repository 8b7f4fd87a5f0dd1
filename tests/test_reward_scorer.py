"""reward_scorer.py: scores equal to transformers' own forward, one conversation at a time; what is
no reward model is refused by name.
"""

import json
import shutil

import pytest
import reward_models
import torch
import transformers
from reward_models import conversation, edit_config
from safetensors.torch import load_file, save_file

from pref.files.console import UserError
from pref.judging import reward_scorer
from pref.judging.reward_scorer import rows_of, width_of

pytestmark = pytest.mark.slow

CONVERSATIONS = [
    *(conversation(number, words=4 + 5 * number) for number in range(8)),
    conversation(20, turns=2, words=30),
    conversation(21, words=80),
]


def scores_of(scorer, conversations: list[list[dict]]) -> list[float]:
    """In batches, as few as their widths allow."""
    rows = [scorer.encode(messages) for messages in conversations]
    scores = {}
    for width in {width_of(row, scorer.limit) for row in rows}:
        same = [n for n, row in enumerate(rows) if width_of(row, scorer.limit) == width]
        assert len(same) <= rows_of(width)
        scores |= dict(zip(same, scorer.compute([rows[n] for n in same], width)))
    return [scores[n] for n in range(len(rows))]


def own_forward(folder, conversations: list[list[dict]]) -> list[float]:
    """transformers alone: each conversation by itself, with no padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()
    scores = []
    for messages in conversations:
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            scores.append(model(ids).logits.item())
    return scores


# Windows and caps that these conversations reach.
KINDS = {
    "Llama": {},
    "Qwen3": {},
    "Gemma2": {"sliding_window": 16, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 8},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    """Folders of tiny reward models by kind."""
    root = tmp_path_factory.mktemp("reward")
    made = {kind: reward_models.decoder(root / kind, kind, **more) for kind, more in KINDS.items()}
    return made | {"armo": reward_models.armo(root / "armo")}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_transformers_one_by_one(folders, kind):
    scorer = reward_scorer.load(str(folders[kind]), "float32")
    scores = scores_of(scorer, CONVERSATIONS)
    expected = own_forward(folders[kind], CONVERSATIONS)
    assert scores == pytest.approx(expected, abs=1e-5)
    assert max(scores) - min(scores) > 0.5, "or equality says little"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_score_does_not_depend_on_its_batch(folders, dtype):
    """Not even in its last digit: a run that is interrupted and continued has the same scores."""
    scorer = reward_scorer.load(str(folders["Llama"]), dtype)
    together = scores_of(scorer, CONVERSATIONS)
    alone = [score for one in CONVERSATIONS for score in scores_of(scorer, [one])]
    reversed_order = scores_of(scorer, CONVERSATIONS[::-1])[::-1]
    assert together == alone == reversed_order


def test_widths_are_few_and_batches_full(monkeypatch):
    monkeypatch.setattr(reward_scorer, "device_type", lambda: "cpu")

    def row(size):
        return reward_scorer.Row([1] * size, [])

    sizes = [1, 64, 65, 512, 513, 1000, 4097, 9000]
    assert [width_of(row(size), None) for size in sizes] == [
        *(64, 64, 128, 512, 640, 1024, 5120, 10240)
    ]
    assert width_of(row(500), 500) == 500, "positions end at the limit"
    assert [rows_of(width) for width in (64, 320, 1024, 5120)] == [16, 3, 1, 1]


# ---- the text ------------------------------------------------------------------------------------


def test_a_conversation_begins_with_one_bos(folders, tmp_path):
    folder = shutil.copytree(folders["armo"], tmp_path / "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = conversation(3, turns=2)
    by_template = tokenizer.apply_chat_template(messages, return_dict=False)
    assert tokenizer("x")["input_ids"][0] == by_template[0] == tokenizer.bos_token_id
    assert reward_scorer.encode_chat(tokenizer, messages).ids == by_template
    assert by_template.count(tokenizer.bos_token_id) == 1
    tokenizer.chat_template = tokenizer.chat_template.removeprefix("{{ bos_token }}")
    assert reward_scorer.encode_chat(tokenizer, messages).ids == by_template


def test_the_text_has_no_prompt_for_another_answer(folders):
    scorer = reward_scorer.load(str(folders["Qwen3"]), "float32")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = scorer.tokenizer.decode(scorer.encode(messages).ids)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"


def test_the_score_is_read_before_a_padding_token_that_ends_the_text(folders, tmp_path):
    """As transformers does, where padding and end of a turn are one token."""
    folder = shutil.copytree(folders["Llama"], tmp_path / "pad")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    template = tokenizer.chat_template.replace("'<|im_end|>' + '\n'", "'<|im_end|>'")
    assert template != tokenizer.chat_template
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    scores = []
    for pad in (tokenizer.convert_tokens_to_ids("<|im_end|>"), 0, None):
        edit_config(folder, pad_token_id=pad)
        scorer = reward_scorer.load(str(folder), "float32")
        scores.append(scores_of(scorer, CONVERSATIONS))
        assert scores[-1] == pytest.approx(own_forward(folder, CONVERSATIONS), abs=1e-5)
        assert scorer.parameters["pad_token_id"] == pad, "another judge"
    assert scores[0] != scores[1] == scores[2]


# ---- encoders ------------------------------------------------------------------------------------

ENCODERS = {
    "Bert": {},
    "Roberta": {"pad_token_id": 0},
    "DebertaV2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
    | {"position_biased_input": False, "position_buckets": 16, "share_att_key": True},
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_pair_encoder_reads_question_and_answer(tmp_path, kind):
    folder = reward_models.encoder(tmp_path / kind, kind, **ENCODERS[kind])
    scorer = reward_scorer.load(str(folder), "float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    expected = []
    for messages in CONVERSATIONS:
        *before, answer = (message["content"] for message in messages)
        with torch.no_grad():
            inputs = tokenizer("\n\n".join(before), answer, return_tensors="pt")
            expected.append(model(**inputs).logits.item())
    assert scores_of(scorer, CONVERSATIONS) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.05
    assert scorer.limit == (511 if kind == "Roberta" else 512)


# ---- ArmoRM --------------------------------------------------------------------------------------


def armo_by_hand(folder, messages: list[dict]) -> float:
    """The head written out, on the hidden states of a plain Llama."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.LlamaModel.from_pretrained(folder, attn_implementation="eager").eval()
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    end, header = (
        tokenizer.convert_tokens_to_ids(f"<|{n}|>") for n in ("eot_id", "start_header_id")
    )
    headers = [i for i, token in enumerate(ids) if token == header]
    assert ids[headers[-1] - 1] == end
    with torch.no_grad():
        hidden = model(torch.tensor([ids])).last_hidden_state[0].double()
    stored = {name: t.double() for name, t in load_file(folder / "model.safetensors").items()}
    gate = hidden[headers[-1] - 1]
    for n in range(4):
        gate = stored[f"gating.layers.{n}.weight"] @ gate + stored[f"gating.layers.{n}.bias"]
        gate = gate.clamp(min=0) if n < 3 else gate
    gate = torch.exp(gate / 10) / torch.exp(gate / 10).sum() * stored["gating.logit_scale"]
    rewards = stored["regression_layer.weight"] @ hidden[-1]
    adjusted = [sum(rewards * stored["reward_transform_matrix"][:, k]) for k in range(5)]
    return float(sum(gate[k] * adjusted[k] for k in range(5)))


def test_armorm_is_its_head_on_a_plain_llama(folders):
    scorer = reward_scorer.load(str(folders["armo"]), "float32")
    some = CONVERSATIONS[:3] + CONVERSATIONS[-2:]
    expected = [armo_by_hand(folders["armo"], messages) for messages in some]
    assert scores_of(scorer, some) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.5
    assert scorer.parameters["method"] == "reward_armo"


# ---- what is refused -----------------------------------------------------------------------------


def base_model(folder):
    """A language model, given by mistake."""
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def head_of(labels: int):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors["score.weight"] = torch.randn(labels, 32)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        edit_config(folder, id2label={"0": "NEGATIVE", "1": "POSITIVE"})

    return change


def zero_head(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["score.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def no_template(folder):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("chat_template", None)
    path.write_text(json.dumps(settings))


def drops_answers(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ messages[0]['content'] }}<|im_end|>"
    tokenizer.save_pretrained(folder)


REFUSED = [
    (base_model, r"no score head \(score.weight\): LlamaForCausalLM is no reward model"),
    (head_of(2), r"gives 2 numbers \(NEGATIVE, POSITIVE\): it is another classifier"),
    (zero_head, "score.weight, is zero throughout: it has not been trained"),
    (no_template, "its tokenizer has no chat template"),
    (drops_answers, "leaves out the question or the answer"),
    (
        lambda folder: edit_config(folder, architectures=["LlamaForRewardModelWithValue"]),
        "LlamaForRewardModelWithValue is code that comes with the model, which is never run here",
    ),
    (
        lambda folder: edit_config(folder, model_type="whisper", architectures=None),
        "is of a kind that transformers has no sequence classifier for|makes no model",
    ),
    (
        lambda folder: (folder / "adapter_config.json").write_text(
            '{"base_model_name_or_path": "org/base"}'
        ),
        r"holds a LoRA adapter .*; merge it into its base \(org/base\)",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), REFUSED)
def test_what_is_no_reward_model_is_refused_by_name(folders, tmp_path, spoil, message):
    folder = shutil.copytree(folders["Llama"], tmp_path / "model")
    spoil(folder)
    with pytest.raises(UserError, match=message) as refusal:
        reward_scorer.load(str(folder), "float32")
    assert str(refusal.value).startswith(f"--judge rm:{folder}: ")


def test_a_head_that_is_not_armorms_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["armo"], tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    tensors["gating.layers.1.weight"] = torch.randn(3, 3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="not those of ArmoRM's head"):
        reward_scorer.load(str(folder), "float32")
    tensors["gating.layers.1.running_mean"] = torch.zeros(3)  # a kin of ArmoRM with normalisation
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"gating.layers.1.running_mean, which LlamaModel does not"):
        reward_scorer.load(str(folder), "float32")
    with pytest.raises(UserError, match="does not write Llama 3's header"):
        reward_models.chatml(folder)
        reward_scorer.load(str(folder), "float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tokenizer: setattr(tokenizer, "chat_template", "x"), "with a chat template"),
        (
            lambda tokenizer: setattr(tokenizer._tokenizer, "post_processor", None),
            "puts no separator between a question and an answer",
        ),
    ],
)
def test_an_encoder_that_is_no_pair_encoder_is_refused(tmp_path, change, message):
    folder = reward_models.encoder(tmp_path / "bert", "Bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=message):
        reward_scorer.load(str(folder), "float32")
