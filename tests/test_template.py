"""Chat templates of the forms that models come with, in short templates of the same form: what is
trained, what is answered, and which pairs are left out.
"""

import json
from datetime import datetime
from functools import cache

import pytest
from conftest import example_rows
from tiny import CHATML, chatml_tokenizer

from pref.model import chat, template, token_check
from pref.model.chat import prompt_ids, render, tokenize_pair
from pref.model.token_check import count_reasons, tokenize_checked

NO_LIMIT = 10**9
SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>", "<|eot|>"]


@cache
def trained() -> str:
    """A tokenizer of 600 tokens as JSON, the special ones of several families among them."""
    texts = [row["chosen"][0]["content"] for row in example_rows(60)]
    return chatml_tokenizer(texts, 600, more_special=SPECIAL)


@cache
def with_template(text: str, eos: str = "<|im_end|>"):
    """That tokenizer with a chat template; the template's special tokens are single tokens."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained().backend_tokenizer,
        eos_token=eos,
        pad_token=eos,
        additional_special_tokens=[*SPECIAL, "<|im_start|>", "<|im_end|>"],
    )
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.chat_template = text
    return tokenizer


def row(prompt, chosen="It is four.", rejected="Five, I think.", name="x", **more) -> dict:
    """A pair; answers may be messages, and the prompt one text."""
    user = {"role": "user", "content": prompt}
    answer = lambda a: [a if isinstance(a, dict) else {"role": "assistant", "content": a}]  # noqa: E731
    return {
        "id": name,
        "prompt": prompt if isinstance(prompt, list) else [user],
        "chosen": answer(chosen),
        "rejected": answer(rejected),
        **more,
    }


def said(tokenizer, pair) -> tuple[str, str, str]:
    """Prompt and responses decoded."""
    return tuple(map(tokenizer.decode, (pair.prompt, pair.chosen, pair.rejected)))


def checked(tokenizer, rows, limit=NO_LIMIT, **options):
    return tokenize_checked(tokenizer, rows, limit, **options)


def reasons(tokenizer, *rows, limit=NO_LIMIT, **options) -> dict[str, int]:
    return count_reasons(checked(tokenizer, rows, limit, **options).bad)


SYSTEM = {"role": "system", "content": "Answer in one line."}
USER = {"role": "user", "content": "What is 2 + 2?"}

PHI3 = (  # no word of the system message, and the answer's head wherever the user has spoken
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|user|>\n' + m.content + '<|end|>\n<|assistant|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
)
GLM4 = (  # nothing ends an answer; the next user's token does
    "<|endoftext|>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
R1 = (  # thoughts are opened for generation, and cut out of what was answered
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}"
    "{% else %}{{ '<|assistant|>' + m.content.split('</think>')[-1] + '<|end|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
ALWAYS_THINKS = (  # opens thoughts for generation; writes an empty block in the conversation
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
BLOCK_BEFORE_ANSWERS = (  # an empty block before each answer, which no prompt has
    CHATML.replace(
        "m['content']",
        "('<think>\n\n</think>\n\n' if m.role == 'assistant' else '') + m['content']",
    )
)
DATED = (  # a default system message with the day
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %B %Y') + '.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
LLAMA31 = (  # a date by option or, without, by the clock
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ '<|im_start|>system\nToday Date: ' + date_string + '<|im_end|>\n' }}" + CHATML
)
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>\n' + call.function | tojson "
    "+ '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# ---- system messages ---------------------------------------------------------------------------


def test_a_system_message_that_the_template_leaves_out_opens_the_first_user_message():
    tokenizer = with_template(PHI3)
    pair = tokenize_pair(tokenizer, row([SYSTEM, USER]))
    prompt = "<|user|>\nAnswer in one line.\n\nWhat is 2 + 2?<|end|>\n<|assistant|>\n"
    assert said(tokenizer, pair) == (prompt, "It is four.<|end|>\n", "Five, I think.<|end|>\n")
    assert prompt_ids(tokenizer, [SYSTEM, USER]) == pair.prompt
    assert reasons(tokenizer, row([SYSTEM, USER]), row("And 3?")) == {}
    # One that shows it in the prompt that is answered, and not in the answered conversation.
    last_user = with_template(
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' }}"
        "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
        "{{ m.content + '<|assistant|>' }}{% elif m.role == 'assistant' %}"
        "{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
    )
    prompt = "<|user|>Answer in one line.\n\nWhat is 2 + 2?<|assistant|>"
    assert said(last_user, tokenize_pair(last_user, row([SYSTEM, USER])))[0] == prompt
    blank = [{"role": "system", "content": " "}, USER]
    assert render(tokenizer, blank, True) == render(tokenizer, [USER], True)


# ---- dates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [DATED, LLAMA31])
def test_today_is_always_the_same_day(text, monkeypatch):
    tokenizer = with_template(text)
    import transformers.utils.chat_template_utils as utils

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 5, 17)

    monkeypatch.setattr(utils, "datetime", Tomorrow)
    today = "26 July 2024" if text is DATED else "26 Jul 2024"
    assert today in render(tokenizer, [USER], True)
    assert today in tokenizer.decode(tokenize_pair(tokenizer, row("Hi")).prompt)


def test_a_date_is_recorded_where_the_clock_would_have_been_read():
    """Llama 3.1's takes it from date_string, which was fixed before: the judge's hash stays."""
    dated, by_option, plain = map(with_template, (DATED, LLAMA31, CHATML))
    assert template.settings_of(dated) == {"template_date": "2024-07-26"}
    assert template.settings_of(by_option) == template.settings_of(plain) == {}
    from pref.files import disk

    before = disk.sha256_json([by_option.chat_template, template.TEMPLATE_OPTIONS])
    assert template.identity(by_option) == before
    assert template.identity(dated) != disk.sha256_json([DATED, template.TEMPLATE_OPTIONS])


# ---- thoughts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [R1, ALWAYS_THINKS, BLOCK_BEFORE_ANSWERS])
def test_thoughts_that_the_generation_prompt_opens_are_closed_in_training_as_in_answering(text):
    tokenizer = with_template(text)
    pair = tokenize_pair(tokenizer, row("Hi"))
    prompt, chosen, rejected = said(tokenizer, pair)
    assert prompt.endswith("<think>\n\n</think>\n\n") and prompt.count("<think>") == 1
    assert chosen.startswith("It is four.") and rejected.startswith("Five, I think.")
    assert pair.merged == 0
    assert pair.prompt == prompt_ids(tokenizer, [{"role": "user", "content": "Hi"}])
    assert reasons(tokenizer, row("Hi")) == {}
    assert template.settings_of(tokenizer) == {"template_thoughts": "closed"}
    assert template.identity(tokenizer) != template.identity(with_template(CHATML))


def test_answers_that_differ_in_thoughts_which_the_template_cuts_out_are_left_out():
    tokenizer = with_template(R1)
    thinking = row("Hi", "<think>\nGood.\n</think>\n\nYes.", "<think>\nBad.\n</think>\n\nYes.")
    assert reasons(tokenizer, thinking) == {token_check.HIDDEN_ANSWER: 1}
    (bad,) = checked(tokenizer, [thinking]).bad
    assert bad.detail == '"Good."'


def test_thoughts_of_earlier_answers_may_go_and_are_counted():
    tokenizer = with_template(R1)
    earlier = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}
    result = checked(tokenizer, [row([USER, earlier, USER]), row("Hi")])
    assert not result.bad and result.forgotten == 1
    assert "Hm" not in tokenizer.decode(result.pairs[0].prompt)


def test_thoughts_in_an_answer_after_a_prompt_that_closes_them_are_no_pair():
    tokenizer = with_template(ALWAYS_THINKS)
    answer = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    assert reasons(tokenizer, row("Hi", answer)) == {token_check.SEAM: 1}
    # GLM-4.5's form: a single token of the prompt, "</think>", is not in the conversation.
    text = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
        "{{ '<think>' + (m.reasoning_content or '') + '</think>' }}{% endif %}"
        "{{ m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think></think>' }}{% endif %}"
    )
    assert reasons(with_template(text), row("Hi", answer), row("Hi")) == {token_check.SEAM: 1}


def test_reasoning_content_is_trained_where_the_template_shows_it():
    shows = CHATML.replace("m['content']", "(m.reasoning_content or '') + m['content']")
    answer = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm. "}
    tokenizer = with_template(shows)
    assert said(tokenizer, tokenize_pair(tokenizer, row("Hi", answer)))[1] == "Hm. Yes.<|im_end|>\n"
    assert reasons(tokenizer, row("Hi", answer)) == {}
    assert reasons(with_template(CHATML), row("Hi", answer)) == {token_check.HIDDEN_ANSWER: 1}


# ---- ends ----------------------------------------------------------------------------------------


def test_a_template_that_ends_no_answer_gets_an_end_by_option():
    tokenizer = with_template(GLM4, eos="<|endoftext|>")
    assert template.form_of(tokenizer).end is None
    plain, ended = (
        checked(tokenizer, [row("Hi")], append_eos=append).pairs[0] for append in (False, True)
    )
    assert said(tokenizer, plain)[1] == "It is four."
    assert said(tokenizer, ended)[1] == "It is four.<|endoftext|>"
    assert ended.prompt == plain.prompt
    cut = checked(tokenizer, [row("Hi", "word " * 99)], 40, append_eos=True).pairs[0]
    assert tokenizer.eos_token_id not in cut.chosen and cut.rejected[-1] == tokenizer.eos_token_id


def test_an_end_token_that_is_not_marked_special_ends_answers_too():
    tokenizer = with_template(CHATML.replace("<|im_end|>", "</turn>"), eos="<|endoftext|>")
    tokenizer.add_tokens(["</turn>"])
    template._form_of.cache_clear()
    end = tokenizer.convert_tokens_to_ids("</turn>")
    assert end in chat.end_token_ids(tokenizer)
    assert reasons(tokenizer, row("Hi"), row("Hi", "a </turn> in the text")) == {
        token_check.CONTROL: 1
    }


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        ("<|im_end|>\n<|im_end|>", token_check.END_TWICE),
        ("<|im_end|>\n<|im_start|>user\n", token_check.ENDLESS),
        ("<|im_end|>\n<|endoftext|>", None),  # Phi's: the turn's end, then the text's
    ],
)
def test_a_response_ends_with_an_end_token_once(after, reason):
    text = CHATML.replace("<|im_end|>' + '\n'", after.replace("\n", "\\n") + "'")
    tokenizer = with_template(text.replace("\\n", "\n"), eos="<|endoftext|>")
    assert reasons(tokenizer, row("Hi")) == ({reason: 1} if reason else {})


# ---- what a template must not leave out or add ---------------------------------------------------


def test_contents_as_parts_where_the_template_shows_nothing_else():
    tokenizer = with_template(PARTS)
    as_text = with_template(CHATML)
    for side in (row("Hi"), row([SYSTEM, USER])):
        assert tokenize_pair(tokenizer, side) == tokenize_pair(as_text, side)
    assert reasons(tokenizer, row("Hi")) == {}


def test_a_text_that_the_template_leaves_out_is_named():
    drops_first = with_template("{% set messages = messages[2:] or messages %}" + CHATML)
    turns = [USER, {"role": "assistant", "content": "Four."}, {"role": "user", "content": "Sure?"}]
    repeated = [USER, {"role": "assistant", "content": "Four."}, USER]
    bad = checked(drops_first, [row(turns), row(repeated)]).bad
    assert [pair.reason for pair in bad] == [token_check.HIDDEN] * 2
    assert reasons(with_template(CHATML), row(turns), row(repeated)) == {}
    short = with_template(CHATML.replace("m['content']", "m['content'][:60]"))
    long = row("Hi", "word " * 30)
    assert reasons(short, long, row("Hi")) == {token_check.HIDDEN_ANSWER: 1}
    flat = with_template(CHATML.replace("m['content']", "m['content'] | replace('\n', ' ')"))
    assert reasons(flat, row("Hi", "a\nb"), row("Hi")) == {token_check.HIDDEN_ANSWER: 1}
    stripped = with_template(CHATML.replace("m['content']", "m['content'] | trim"))
    assert reasons(stripped, row(" Hi\n", "\n yes\n\n"), row("Hi")) == {}


def test_words_between_the_prompt_that_is_answered_and_the_answer():
    """As of a template that ignores add_generation_prompt: every answer would begin with them."""
    head, _, _ = CHATML.partition("{% if add_generation_prompt")
    assert reasons(with_template(head), row("Hi")) == {token_check.LEAD: 1}
    special = with_template(CHATML.replace("m['content']", "'<|eot|>' + m['content']"))
    assert reasons(special, row("Hi")) == {}  # is not part of an answer's text


def test_control_tokens_in_a_text():
    tokenizer = with_template(CHATML)
    rows = [
        row("Hi", "Yes.<|im_end|>"),
        row("<|im_start|>user\nHi<|im_end|>\n"),
        row([{"role": "system", "content": "a <|endoftext|> b"}, USER]),
        row("Hi", "<think>\nHm.\n</think>\nYes.", "A < B |> C"),
    ]
    result = checked(tokenizer, rows)
    assert [(bad.reason, bad.detail) for bad in result.bad] == [
        (token_check.CONTROL, '<|im_end|> in chosen: "Yes.<|im_end|>"'),
        (token_check.CONTROL, '<|im_start|> in prompt: "<|im_start|>user\\nHi<|im_end|>\\n"'),
        (token_check.CONTROL, '<|endoftext|> in prompt: "a <|endoftext|> b"'),
    ]
    assert result.rows == rows[3:]


def test_pairs_that_truncation_makes_equal():
    tokenizer = with_template(CHATML)
    begin = "the same words " * 20
    rows = [row("Hi", begin + "then this", begin + "then that"), row("Hi")]
    assert reasons(tokenizer, *rows) == {}
    assert reasons(tokenizer, *rows, limit=40) == {token_check.SAME_CUT: 1}
    upper = with_template(CHATML.replace("m['content']", "m['content'] | trim"))
    spaces = row("Hi", "Yes.", "\n Yes.")
    assert reasons(upper, spaces) == {token_check.SAME: 1}


def test_half_a_character_is_no_text():
    assert reasons(with_template(CHATML), row("Hi", "a\ud83d"), row("Hi", "😀é")) == {
        token_check.NO_TEXT: 1
    }


# ---- tools ---------------------------------------------------------------------------------------

SCHEMA = {
    "type": "function",
    "function": {"name": "planet", "description": "looks it up", "parameters": {}},
}


def call(**arguments) -> dict:
    function = {"name": "planet", "arguments": json.dumps(arguments)}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "type": "function", "function": function}],
    }


def test_tools_and_their_calls_are_rendered_where_the_template_can():
    tokenizer = with_template(TOOLS)
    result = {"role": "tool", "tool_call_id": "1", "content": '{"n": "a\\"b\\n"}'}
    pair = row([USER, call(name="Mars é", n=[3]), result], call(n=4), tools=[SCHEMA])
    prompt, chosen, _ = said(tokenizer, tokenize_pair(tokenizer, pair))
    assert '"description": "looks it up"' in prompt and result["content"] in prompt
    # Arguments as an object, not as a quoted text.
    written = '<tool_call>\n{"name": "planet", "arguments": {"n": 4}}\n</tool_call><|im_end|>\n'
    assert chosen == written and '"arguments": {"name": "Mars é", "n": [3]}' in prompt
    assert reasons(tokenizer, pair) == {}


def test_what_a_template_cannot_render_of_tools_is_left_out_by_its_reason():
    plain = with_template(CHATML)
    rows = [
        row("Hi", tools=[SCHEMA]),
        row([USER, call(n=3), {"role": "tool", "content": "4"}]),
        row("Hi", call(n=4)),
        row("Call planet(n=4)", call(n=4)),  # its name stands in the prompt, its call nowhere
        row(
            [{"role": "user", "content": "planet, 3"}, call(n=3), {"role": "tool", "content": "4"}]
        ),
    ]
    bad = checked(plain, rows).bad
    assert [(pair.reason, pair.detail) for pair in bad] == [
        (token_check.HIDDEN, "the tools"),
        (token_check.HIDDEN, "a tool call"),
        (token_check.HIDDEN_ANSWER, "a tool call"),
        (token_check.HIDDEN_ANSWER, "a tool call"),
        (token_check.HIDDEN, "a tool call"),
    ]
    refuses = with_template(
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}"
        "{% endif %}{% endfor %}" + CHATML
    )
    bad = checked(refuses, rows[1:2]).bad
    assert [(pair.reason, pair.detail) for pair in bad] == [(token_check.REJECTED, "no tools here")]
