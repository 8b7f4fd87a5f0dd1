"""Texts that carry a chat template already: found, told apart from mentions, and undone."""

import pytest
from preference_rows import bot, prepare_rows, user

from pref.files.console import UserError
from pref.files.control_tokens import find_carried, find_mention, strip_template
from pref.files.messages import Drop

SYSTEM = {"role": "system", "content": "Be brief."}
PROMPT = [SYSTEM, user("How are you?"), bot("Well."), user("And now?")]
# The prompt above as each family of templates writes it.
WRITTEN = {
    "ChatML": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow are you?<|im_end|>\n"
    "<|im_start|>assistant\nWell.<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "Llama 2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHow are you? [/INST] Well. </s>"
    "<s>[INST] And now? [/INST]",
    "Mistral": "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]How are you?[/INST]Well.</s>"
    "[INST]And now?[/INST]",
    "Llama 3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHow are you?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nWell.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd now?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "Gemma": "<bos><start_of_turn>system\nBe brief.<end_of_turn>\n<start_of_turn>user\n"
    "How are you?<end_of_turn>\n<start_of_turn>model\nWell.<end_of_turn>\n"
    "<start_of_turn>user\nAnd now?<end_of_turn>\n<start_of_turn>model\n",
    "Zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nHow are you?</s>\n<|assistant|>\nWell.</s>\n"
    "<|user|>\nAnd now?</s>\n<|assistant|>\n",
    "Phi": "<|system|>\nBe brief.<|end|>\n<|user|>\nHow are you?<|end|>\n"
    "<|assistant|>\nWell.<|end|>\n<|user|>\nAnd now?<|end|>\n<|assistant|>\n",
    "DeepSeek": "<｜begin▁of▁sentence｜>Be brief.<｜User｜>How are you?<｜Assistant｜>Well."
    "<｜end▁of▁sentence｜><｜User｜>And now?<｜Assistant｜>",
    "Granite": "<|start_of_role|>system<|end_of_role|>Be brief.<|end_of_text|>\n"
    "<|start_of_role|>user<|end_of_role|>How are you?<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>Well.<|end_of_text|>\n"
    "<|start_of_role|>user<|end_of_role|>And now?<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>",
    "Vicuna": "Be brief. USER: How are you? ASSISTANT: Well.</s>USER: And now? ASSISTANT:",
}


@pytest.mark.parametrize("family", WRITTEN)
def test_a_templated_prompt_is_found_and_taken_apart(family):
    assert find_carried(WRITTEN[family])
    assert strip_template(WRITTEN[family]) == PROMPT


def test_alpacas_form():
    text = (
        "Below is an instruction that describes a task. Write a response.\n\n"
        "### Instruction:\nTranslate.\n\n### Input:\nBerg\n\n### Response:\n"
    )
    assert find_carried(text)
    assert strip_template(text)[1:] == [user("Translate.\n\nBerg")]


@pytest.mark.parametrize(
    "end",
    [
        "</s>",
        " </s>",
        "<|im_end|>\n",
        "<|endoftext|>",
        "<eos>",
        "<|eot_id|>",
        "<end_of_turn>\n<eos>",
    ]
    + ["<|end|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<|return|>", "</s><pad><pad>"],
)
def test_an_end_token_after_a_response(end):
    assert find_carried(f"It is high.{end}")
    assert strip_template(f"It is high.{end}") == "It is high."


def test_a_beginning_and_an_end_around_a_response():
    assert find_carried("<s> It is high.</s>")
    assert strip_template("<s> It is high.</s>") == "It is high."
    assert not find_carried("<s>It is high.</s> It is <s>very</s> high.")


@pytest.mark.parametrize(
    "text",
    [
        "One text.<|endoftext|>Another text.",
        "It is high.<|im_end|>\n<|im_start|>user\nHow high?",
        "It is high.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHow high?",
    ],
)
def test_a_seam_in_the_middle(text):
    assert find_carried(text)


def test_thoughts_that_the_prompt_opens_are_left_out():
    for thoughts in ("<think>\n", "<think>\n\n</think>\n\n"):
        assert strip_template(WRITTEN["ChatML"] + thoughts) == PROMPT


MENTIONS = [
    "A message looks like <|im_start|>user Hello<|im_end|> and so on.",
    "Use `<|im_end|>` to end a turn.",
    "The token that ends a turn is <|im_end|>",
    "ChatML:\n```\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n```\nIs that clear?",
    "<|endoftext|> is the token that ends a document.",
    "What do [INST] and [/INST] mean?",
]


@pytest.mark.parametrize("text", MENTIONS)
def test_a_mention_is_no_template(text):
    assert find_carried(text) is None and find_mention(text)


@pytest.mark.parametrize(
    "text", ["<s>old</s> new", "a < b and c |> d", "### Instruction: see below", "List[INST]", ""]
)
def test_neither(text):
    assert find_carried(text) is None and not find_mention(text.replace("[INST]", ""))


def test_a_form_that_is_not_known_is_not_guessed():
    text = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
    assert find_carried(text)
    with pytest.raises(Drop, match="a chat template of no known form"):
        strip_template(text)


def rows(count, prompt="Ask {}?", end=""):
    return [
        {"prompt": prompt.format(i), "chosen": f"Good {i}.{end}", "rejected": f"Bad {i}.{end}"}
        for i in range(count)
    ]


def test_templated_rows_are_refused_or_taken_apart(tmp_path):
    prompt = "<|im_start|>user\nAsk {}?<|im_end|>\n<|im_start|>assistant\n"
    templated = rows(6, prompt, "<|im_end|>")
    with pytest.raises(
        UserError,
        match=r"6 of 6 rows: the text carries a chat template .*source\.jsonl:1\..*--strip",
    ):
        prepare_rows(tmp_path, templated)
    assert not (tmp_path / "out").exists()
    train, val, dropped, manifest = prepare_rows(tmp_path, templated, "--strip_template")
    plain = prepare_rows(tmp_path, rows(6))
    assert (train, val) == plain[:2] and not dropped
    assert "rows with a chat template, which was taken off: 6" in manifest["notes"][0]


def test_a_single_templated_row_is_dropped_and_mentions_are_counted(tmp_path):
    good = rows(200)
    good[3]["chosen"] += " A turn ends with `<|im_end|>`."
    _, _, dropped, manifest = prepare_rows(tmp_path, good + rows(1, "One?", "</s>"))
    assert [d["reason"] for d in dropped] == ["carries a chat template already (</s>)"]
    assert manifest["notes"] == [
        "rows that speak of a control token of chat templates, kept: 1 "
        f"(first: {tmp_path / 'source.jsonl'}:4)"
    ]


def test_end_tokens_inside_messages(tmp_path):
    listed = [
        {
            "prompt": [user(f"Ask {i}?")],
            "chosen": [bot(f"Good {i}.</s>")],
            "rejected": [bot(f"Bad {i}.</s>")],
        }
        for i in range(4)
    ]
    train, _, _, _ = prepare_rows(tmp_path, listed, "--strip_template")
    assert train == prepare_rows(tmp_path, rows(4))[0]


def test_a_templated_system_column(tmp_path):
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    train = prepare_rows(
        tmp_path, [row | {"system": system} for row in rows(4)], "--strip_template"
    )
    assert train[0][0]["prompt"][0] == SYSTEM
