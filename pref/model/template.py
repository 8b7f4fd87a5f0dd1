"""The model's chat template: how it is called, and what it does with a conversation.

Templates differ in what they show, refuse and leave out. `form_of` finds that out once per
tokenizer, by rendering short conversations of words that it then looks for.
"""

import json
import re
from collections.abc import Iterable
from datetime import datetime
from functools import lru_cache
from typing import NamedTuple

from jinja2 import Template, TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from pref.files import disk

# The day that templates print as today's: with the real one, token ids would change at midnight,
# and with them reference log-probs, answers and judgements.
TEMPLATE_DATE = datetime(2024, 7, 26)

# What a template may ask for besides the messages. Templates ignore options that they do not know.
TEMPLATE_OPTIONS = {
    # Llama 3 prints a date, by this name or by strftime_now (see `pin_date`).
    "date_string": "26 Jul 2024",
    # Qwen3 and others close an empty block of thoughts in the prompt. The response then begins with
    # the answer itself: in training the block is not scored as part of the response, an answer does
    # not spend its tokens on thoughts, and a judge's rating can follow the prompt directly.
    "enable_thinking": False,
}

# How thoughts begin and end, by the tags that templates write.
THOUGHTS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "◁think▷": "◁/think▷",
}
EMPTY = "|".join(rf"{re.escape(start)}\s*{re.escape(end)}\s*" for start, end in THOUGHTS.items())
NO_THOUGHTS = re.compile(EMPTY)
NO_THOUGHTS_AT_END = re.compile(rf"(?:{EMPTY})\Z")
THOUGHT_TAGS = re.compile("|".join(map(re.escape, [*THOUGHTS, *THOUGHTS.values()])))

# What a template raises when it cannot write a conversation: raise_exception() and undefined names,
# or Python's own errors in its expressions ('text' + none).
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError)


# ---- one call ----------------------------------------------------------------------------------


def compiled(template: str) -> Template:
    """The template as transformers compiles it, once. Raises jinja2.TemplateSyntaxError."""
    return _compile_jinja_template(template)


def pin_date(template: str, date: datetime = TEMPLATE_DATE) -> None:
    """Let strftime_now() print `date`.

    It is a global of the compiled template, which transformers keeps. An option of that name would
    not reach it: transformers passes on plain data, no functions.
    """
    if "strftime_now" in template:
        compiled(template).globals["strftime_now"] = date.strftime


def call_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict],
    generation_prompt: bool,
    tools: list[dict] | None = None,
    parts: bool = False,
    date: datetime = TEMPLATE_DATE,
) -> str:
    """`messages` as the template writes them with TEMPLATE_OPTIONS.

    generation_prompt: end with what precedes the assistant's next message. tools: schemas of the
    functions that the assistant may call. parts: give each content as a list of parts. date: of
    today, for the template. Raises one of TEMPLATE_ERRORS if the template rejects the conversation.
    """
    pin_date(tokenizer.get_chat_template(tools=tools), date)
    return tokenizer.apply_chat_template(
        [as_template_reads(message, parts) for message in messages],
        tokenize=False,
        add_generation_prompt=generation_prompt,
        tools=tools,
        **TEMPLATE_OPTIONS,
    )


def as_template_reads(message: dict, parts: bool) -> dict:
    """A message in the form that templates expect: content as text or as parts, and arguments of
    tool calls as objects. The OpenAI API has arguments as JSON text; templates that write JSON
    would write them as a quoted string.
    """
    if parts:
        message = message | {"content": [{"type": "text", "text": message["content"]}]}
    if message.get("tool_calls"):
        message = message | {"tool_calls": [with_read_arguments(c) for c in message["tool_calls"]]}
    return message


def with_read_arguments(call: dict) -> dict:
    """A tool call whose arguments are an object wherever they can be read as one."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return call | {"function": with_read_arguments(call["function"])}
    if not isinstance(call.get("arguments"), str):
        return call
    try:
        return call | {"arguments": json.loads(call["arguments"])}
    except ValueError:
        return call


# ---- what the template does ----------------------------------------------------------------------

SYSTEM, QUESTION, ANSWER = "systemword", "questionword", "answerword"  # looked for in the result


class Form(NamedTuple):
    """What a template does with conversations of any content."""

    parts: bool  # shows a content only if it is a list of parts
    shows_system: bool  # in the prompt for an answer and in the answered conversation
    opens_thoughts: bool  # the prompt for an answer ends inside thoughts, enable_thinking or not
    no_thoughts: str  # the empty block of thoughts that it writes before answers, but in no prompt
    prints_date: bool
    end: int | None  # id of the token that ends an answer


def form_of(tokenizer: PreTrainedTokenizerBase) -> Form:
    """What the tokenizer's template does; worked out once."""
    template = tokenizer.chat_template
    return _form_of(tokenizer, template if isinstance(template, str) else json.dumps(template))


@lru_cache(maxsize=64)
def _form_of(tokenizer: PreTrainedTokenizerBase, template: str) -> Form:
    system = {"role": "system", "content": SYSTEM}
    question = {"role": "user", "content": QUESTION}
    answer = {"role": "assistant", "content": ANSWER}

    def written(messages: list[dict], generation_prompt: bool, **options) -> str:
        try:
            return call_template(tokenizer, messages, generation_prompt, **options)
        except TEMPLATE_ERRORS:
            return ""

    plain, in_parts = (written([question], True, parts=parts) for parts in (False, True))
    parts = QUESTION not in plain and QUESTION in in_parts
    prompt = in_parts if parts else plain
    with_system = [
        written([system, question], True, parts=parts),
        written([system, question, answer], False, parts=parts),
    ]
    on_another_day = written([question], True, parts=parts, date=TEMPLATE_DATE.replace(year=1999))
    before, shown, after = written([question, answer], False, parts=parts).rpartition(ANSWER)
    lead = before.removeprefix(prompt)
    return Form(
        parts=parts,
        shows_system=all(SYSTEM in text for text in with_system),
        opens_thoughts=close_thoughts(prompt) != prompt,
        no_thoughts=lead if NO_THOUGHTS.fullmatch(lead) else "",
        prints_date=on_another_day != prompt,
        end=end_token(tokenizer, after if shown else ""),
    )


def end_token(tokenizer: PreTrainedTokenizerBase, tail: str) -> int | None:
    """The first token of its own kind (special, or added to the vocabulary) in `tail`, what the
    template writes after an answer.
    """
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    special = [i for i in ids if i in tokenizer.all_special_ids]
    added = [i for i in ids if i in tokenizer.added_tokens_decoder]
    added = [i for i in added if not str(tokenizer.added_tokens_decoder[i]).isspace()]
    return next(iter([*special, *added]), None)


def close_thoughts(prompt: str) -> str:
    """`prompt`, with thoughts that it opens closed again.

    Templates of models that always think end a prompt with "<think>\\n", whatever enable_thinking
    says. Here it becomes "<think>\\n\\n</think>\\n\\n", as other templates write it with
    enable_thinking off.
    """
    bare = prompt.rstrip()
    for opening, closing in THOUGHTS.items():
        if bare.endswith(opening):
            return f"{bare}\n\n{closing}\n\n"
    return prompt


def settings_of(tokenizer: PreTrainedTokenizerBase) -> dict:
    """What is done for this template beyond calling it, for the settings that args.json and
    answers.jsonl record. Empty for most templates.
    """
    form, settings = form_of(tokenizer), {}
    if form.prints_date:
        settings["template_date"] = f"{TEMPLATE_DATE:%Y-%m-%d}"
    if form.opens_thoughts or form.no_thoughts:
        settings["template_thoughts"] = "closed"
    return settings


def identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that decides how a conversation is written."""
    parts = [tokenizer.chat_template, TEMPLATE_OPTIONS]
    form = form_of(tokenizer)
    more = settings_of(tokenizer)
    more |= {"system": "merged"} if not form.shows_system else {}
    more |= {"content": "parts"} if form.parts else {}
    return disk.sha256_json([*parts, more] if more else parts)


# ---- control tokens ------------------------------------------------------------------------------


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Tokens that are written as they are wherever they occur in a text, and that mean more than
    their letters: <|im_end|>, </s>. Not <think> and <tool_call>, which answers may hold.
    """
    added = {str(t): t.special for t in tokenizer.added_tokens_decoder.values()}
    tokens = {token for token, special in added.items() if special or is_marker(token)}
    tokens |= set(map(str, tokenizer.all_special_tokens))
    end = form_of(tokenizer).end
    if end is not None:
        tokens.add(tokenizer.convert_ids_to_tokens(end))
    # A padding token may be a letter or a "!".
    tokens = {token for token in tokens if len(token) > 2 and not token.isspace()}
    return tokens - {*THOUGHTS, *THOUGHTS.values()}


def is_marker(token: str) -> bool:
    """Whether a token looks like <|im_start|> or DeepSeek's <｜User｜>."""
    return re.fullmatch(r"<[|｜].*[|｜]>", token) is not None


def any_of(texts: Iterable[str]) -> re.Pattern:
    """A pattern of any of these texts, the longest first; of nothing if there is none."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
