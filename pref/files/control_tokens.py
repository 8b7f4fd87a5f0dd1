"""Texts that carry a chat template already: found, told apart from mere mentions, and undone.

A text such as '<|im_start|>user\\nHi<|im_end|>' would get the model's own template around it.
`find_carried` names the control token of such a text, `find_mention` one that a text only speaks
of, and `strip_template` turns the text into the messages that it is made of:

    "<s>[INST] Hi [/INST]"  ->  [{"role": "user", "content": "Hi"}]
    "Hello!</s>"            ->  "Hello!"
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from pref.files.messages import ROLES, Drop


class Form(NamedTuple):
    """How a family of templates writes a turn: a header with the role as its group, then text."""

    name: str
    header: re.Pattern
    role_names: str = ""  # "written=meant ..." beyond messages.ROLES


FORMS = (
    Form("ChatML, Phi 4", re.compile(r"<\|im_start\|>[ \t]*(\w+)[ \t]*(?:<\|im_sep\|>|\n|\Z)")),
    Form("Llama 3", re.compile(r"<\|start_header_id\|>\s*(\w+)\s*<\|end_header_id\|>")),
    Form("Llama 4", re.compile(r"<\|header_start\|>\s*(\w+)\s*<\|header_end\|>")),
    Form("Gemma", re.compile(r"<start_of_turn>(\w+)(?:\n|\Z)")),
    Form("Phi, Zephyr", re.compile(r"<\|(system|user|assistant|tool|observation)\|>")),
    Form("DeepSeek", re.compile(r"<｜(User|Assistant)｜>")),
    Form("Granite", re.compile(r"<\|start_of_role\|>(\w+)<\|end_of_role\|>")),
    Form(
        "Command R",
        re.compile(r"<\|START_OF_TURN_TOKEN\|><\|(\w+?)_TOKEN\|>"),
    ),
)
BEGINNINGS = r"<s>|<bos>|<\|begin_of_text\|>|<\|startoftext\|>|<｜begin▁of▁sentence｜>|<BOS_TOKEN>"
BEGINNINGS += r"|\[gMASK\]\s*<sop>|<\|begin▁of▁sentence\|>"
ENDS = (
    r"</s>|<eos>|<\|im_end\|>|<\|im_sep\|>|<\|endoftext\|>|<\|eot_id\|>|<\|eom_id\|>|<\|end_of_text\|>"
    r"|<\|eot\|>|<\|end_of_turn\|>|<end_of_turn>|<\|end\|>|<\|return\|>|<\|call\|>|<｜end▁of▁sentence｜>"
    r"|<\|END_OF_TURN_TOKEN\|>|<\|end▁of▁sentence\|>|<EOS_TOKEN>|<\|end_of_sentence\|>|<\|eos\|>"
)
PADS = r"<pad>|<\|pad\|>|<\|finetune_right_pad_id\|>|\[PAD\]|<PAD>"
# Mistral's and Llama-2's, whose turn is a pair of brackets; gpt-oss's; the start of other headers.
BRACKETS = r"\[/?INST\]|<<SYS>>|<</SYS>>|\[/?SYSTEM_PROMPT\]|\[TOOL_CALLS\]|\[AVAILABLE_TOOLS\]"
OTHERS = r"<\|start\|>(?=\w+<\|)|<\|message\|>|<\|channel\|>|<\|im_start\|>|<start_of_turn>"
LINE_END = re.compile(r"\(\?:(<\\\|im_sep\\\|>\|)?\\n\|\\Z\)")
HEADERS = "|".join(LINE_END.sub("", form.header.pattern) for form in FORMS)
HEADERS = re.sub(r"\((?!\?)", "(?:", HEADERS)
TOKEN = re.compile(f"{HEADERS}|{BEGINNINGS}|{ENDS}|{PADS}|{BRACKETS}|{OTHERS}")
# What control tokens of other families look like, at the beginning or the end of a text.
UNKNOWN = (
    r"<\|[A-Za-z]\w{2,40}\|>|<｜[^｜\s]{2,40}｜>|\[\|(?:system|user|assistant|tool|endofturn)\|\]"
    r"|<\w+:(?:bos|eos)>|<extra_id_\d+>|<reserved_\d+>|<(?:beginning|end)_of_\w+>|<用户>"
)
UNKNOWN_ENDS = re.compile(rf"\A\s*({UNKNOWN})|({UNKNOWN})\s*\Z")
OPENING = re.compile(rf"\s*(?:(?:{BEGINNINGS}|<\|endoftext\|>)\s*)*(?:{HEADERS}|<\|start\|>\w+<\|)")
SPOKEN = re.compile(r"[ \t]+(?:is|are|and|or|means|in|vs)\b")
BARE_BEGINNING = re.compile(
    rf"\s*(?:{BEGINNINGS}|<\|endoftext\|>)(?![ \t]+(?:is|are|and|or|means)\b)"
)
CLOSING = re.compile(rf"(?:(?:{ENDS}|{PADS}|\[/INST\]|<</SYS>>)\s*)+\Z|(?:{HEADERS})\s*\Z")
# One turn ends and the next begins.
SEAM = re.compile(rf"(?:{ENDS})\s*(?:{HEADERS})")
# An end token right behind a word, as between two documents. Behind a header, it is an example.
GLUED = re.compile(rf"[^\s`'\"“‘(\[{{](?=<\|)(?:{ENDS})")
CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
# One of these is in every text that TOKEN or PLAIN matches; looking for them is much faster.
HINTS = (
    "<|",
    "[|",
    "<extra_id_",
    "<reserved_",
    "_of_",
    ":bos>",
    ":eos>",
    "<用户>",
    "s>",
    "S>",
    "<｜",
    "_turn>",
    "pad>",
    "PAD",
    "INST]",
    "SYS",
    "_TOKEN>",
    "[gMASK]",
)
HINTS += ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "### ", "USER:")
OPENED = re.compile(r"(?:<think>\s*(?:</think>)?)?\s*")
# What stands before a control token that a sentence speaks of: "the token is <|im_end|>".
SPEAKING = re.compile(r"(?:[A-Za-z0-9,]|['\"“‘(])[ \t]+\Z|['\"`“‘(]\Z")
# Templates without control tokens. Both ends must fit, since people write such lines too.
PLAIN = re.compile(
    r"\s*(?:Below is an instruction that describes a task.*?)?### Instruction:.*### Response:\s*\Z"
    r"|\s*### (?:Human|User):.*### Assistant:\s*\Z",
    re.DOTALL,
)
PLAIN_HEADER = re.compile(
    r"### (Instruction|Input|Response|Human|User|Assistant):|(?:\A|(?<=[\s>]))(USER|ASSISTANT):"
)
PLAIN_ROLES = {"instruction": "user", "input": "user", "response": "assistant"}


# ---- finding -------------------------------------------------------------------------------------


def texts_of(value) -> Iterator[str]:
    """Every text in a value of a row, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)


def has_hint(text: str) -> bool:
    """Whether there can be a token or a plain template in a text; most texts are done here."""
    if "<" not in text and "[" not in text:
        return "### " in text or "USER:" in text
    return any(hint in text for hint in HINTS)


def find_carried(text: str) -> str | None:
    """The control token that shows that `text` is wrapped in a chat template, or None.

    It is wrapped if it begins or ends with control tokens, or if one turn ends and another begins
    in it, outside of code.
    """
    if not has_hint(text):
        return None
    if is_plain(text):
        return text.split()[-1]
    if (found := UNKNOWN_ENDS.search(text)) and not is_spoken_of(text, found):
        return found.group().strip()
    token = TOKEN.search(text)
    if not token:
        return None
    if "[INST]" in text and "[/INST]" in text and re.match(r"\s*(<s>|<bos>)?\s*\[INST\]", text):
        return "[INST]"
    if OPENING.match(text) or re.match(r"\s*(<<SYS>>|\[SYSTEM_PROMPT\])", text):
        return token.group()
    if BARE_BEGINNING.match(text) and not is_html(text):
        return token.group()
    end = CLOSING.search(text)
    if end and not is_html(text) and not SPEAKING.search(text[: end.start()]):
        return end.group().strip()
    if end and "</s>" in end.group() and not is_html(text):  # Llama 2 writes " </s>"
        return "</s>"
    prose = CODE.sub("", text)
    if "[INST]" in prose.partition("[/INST]")[2]:
        return "[/INST]"
    seam = SEAM.search(prose)
    glued = None if re.search(f"{HEADERS}|{OTHERS}", prose) else GLUED.search(prose)
    found = seam or glued
    return TOKEN.search(found.group()).group() if found else None


def is_spoken_of(text: str, found: re.Match) -> bool:
    """Whether a token at an end of a text is part of a sentence: "it ends with <|abc|>"."""
    before, after = text[: found.start()], text[found.end() :]
    return bool(SPEAKING.search(before)) if before.strip() else bool(SPOKEN.match(after))


def is_plain(text: str) -> bool:
    """Whether a prompt is in Alpaca's or Vicuna's form, which have no control tokens."""
    if text.rstrip().endswith("ASSISTANT:"):
        return "USER:" in text
    return bool(PLAIN.match(text))


def is_html(text: str) -> bool:
    """Whether <s> and </s> strike text out, as in HTML, and no other token is there. Once around
    the whole text they are what begins and ends it.
    """
    if "<s>" not in text or "</s>" not in text or "[INST]" in text or "<|" in text:
        return False
    return text.count("<s>") > 1 or not (
        text.lstrip().startswith("<s>") and text.rstrip().endswith("</s>")
    )


def find_mention(text: str) -> str | None:
    """The first control token in a text that `find_carried` finds nothing in."""
    if not has_hint(text):
        return None
    token = None if is_html(text) else TOKEN.search(text)
    return token.group() if token else None


# ---- undoing -------------------------------------------------------------------------------------


def strip_row(value):
    """`value` with every text that carries a template replaced by its messages, or by its text if
    that is all it holds. Texts inside messages become text. Raises Drop where that is impossible.
    """
    if isinstance(value, dict):
        return {key: strip_inner(item) for key, item in value.items()}
    if isinstance(value, list):
        return [strip_row(item) for item in value]
    return strip_template(value) if isinstance(value, str) and find_carried(value) else value


def strip_inner(value):
    """`strip_row` for what is in a message, which cannot hold further messages."""
    result = strip_row(value)
    if isinstance(value, str) and not isinstance(result, str):
        if len(result) == 1:
            return result[0]["content"]
        raise Drop("a message that holds several turns of a chat template")
    return result


def strip_template(text: str) -> str | list[dict]:
    """The messages that a templated text is made of; its text alone if it has no header.

    An opened turn of the assistant at its end, the generation prompt, is left out. Raises Drop if
    control tokens remain, so that the form is not one that is known here.
    """
    if "[/INST]" in text or "[INST]" in text:
        messages = split_brackets(text)
    elif is_plain(text):
        messages = split_turns(text, PLAIN_HEADER)
    else:
        form = min(
            (f for f in FORMS if f.header.search(text)),
            key=lambda f: f.header.search(text).start(),
            default=None,
        )
        messages = split_turns(text, form.header) if form else [("", clean(text))]
    if any(find_carried(content) for _, content in messages):
        raise Drop("a chat template of no known form")
    if len(messages) > 1 and messages[-1] == ("user", ""):  # GLM ends a turn so
        messages.pop()
    if len(messages) == 1 and not messages[0][0]:
        return messages[0][1]
    if messages[0][0] == "":  # text before the first header
        messages = [("system", messages[0][1]), *messages[1:]] if messages[0][1] else messages[1:]
    # What the assistant is to go on from, thoughts that are opened or empty included.
    if len(messages) > 1 and messages[-1][0] == "assistant" and OPENED.fullmatch(messages[-1][1]):
        messages.pop()
    return [{"role": role, "content": content} for role, content in join_turns(messages)]


def join_turns(messages: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Alpaca's input belongs to its instruction: two turns of the user's are one."""
    joined: list[tuple[str, str]] = []
    for role, content in messages:
        if joined and role == "user" == joined[-1][0]:
            content = f"{joined.pop()[1]}\n\n{content}"
        joined.append((role, content))
    return joined


def split_turns(text: str, header: re.Pattern) -> list[tuple[str, str]]:
    """[(role, text)] of a text whose turns begin with `header`; ("", text) for what is before."""
    turns, end, role = [], 0, ""
    for match in header.finditer(text):
        turns.append((role, clean(text[end : match.start()])))
        role = next(group for group in match.groups() if group).lower()
        role = {"chatbot": "assistant"}.get(role, PLAIN_ROLES.get(role, ROLES.get(role, role)))
        end = match.end()
    turns.append((role, clean(text[end:])))
    return turns if turns[0][1] else turns[1:]


def split_brackets(text: str) -> list[tuple[str, str]]:
    """[(role, text)] of Llama-2's and Mistral's form: [INST] user [/INST] assistant </s>."""
    turns = []
    system = re.search(r"<<SYS>>(.*?)<</SYS>>|\[SYSTEM_PROMPT\](.*?)\[/SYSTEM_PROMPT\]", text, re.S)
    if system:
        turns.append(("system", (system[1] or system[2] or "").strip()))
        text = text.replace(system.group(), "", 1)
    before, *rest = re.split(r"\[INST\]", text)
    if clean(before):
        turns.append(("assistant" if rest else "", clean(before)))
    for part in rest:
        user, closed, answer = part.partition("[/INST]")
        turns.append(("user", user.strip()))
        if closed and clean(answer):
            turns.append(("assistant", clean(answer)))
    if not rest and "[/INST]" in text:
        raise Drop("a chat template of no known form")
    return turns


def clean(text: str) -> str:
    """`text` without the tokens that begin and end it and the space around it."""
    text = re.sub(rf"\A\s*(?:(?:{BEGINNINGS}|{PADS}|<\|endoftext\|>)\s*)+", "", text)
    return re.sub(rf"(?:(?:{ENDS}|{PADS}|{BEGINNINGS})\s*)+\Z", "", text).strip()
