"""Reading a language model's reply: a thought, a name and a program's text.

The text is not looked into here: form.py reads it. What a terminal or a file name would act upon
is removed from the thought and the name.
"""

import json
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pref.judging import reading

MOST_NAME, NO_NAME = 24, "loss"
MOST_THOUGHT = 800  # characters; 80 words are asked for
MOST_OBJECTS = 50  # beginnings of JSON objects that are tried
FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)


class Draft(NamedTuple):
    """What a reply proposes."""

    thought: str
    name: str  # [a-z0-9_]{1,24}
    code: str


class Unreadable(Exception):
    """There is no proposal in a reply. `str()` is one line."""


def read(text: str, clean: Callable[[str], str] = str) -> Draft:
    """The proposal in a reply: its last JSON object with `code`, else its last fenced block.

    Line breaks within a JSON string are taken as they are, which models write. clean: applied to
    each part, since what was escaped in the reply is not in it (see `server.clean`). Raises
    Unreadable.
    """
    answer = reading.without_thoughts(text)
    if not answer.finished_thinking:
        raise Unreadable("the reply ends within its thoughts")
    found: dict | None = None
    for value in objects(answer.text):
        if isinstance(value.get("code"), str) and value["code"].strip():
            found = value
    if found is None:
        blocks = [block for block in FENCED.findall(answer.text) if "def " in block]
        if not blocks:
            raise Unreadable(
                'the reply has neither a JSON object with "code" nor a fenced block of code'
            )
        found = {"code": blocks[-1]}
    code = found["code"]
    if fenced := FENCED.findall(code):
        code = fenced[-1]
    code = code.replace("\r\n", "\n").replace("\r", "\n")
    return Draft(
        thought=clean(clean_thought(found.get("thought"))),
        name=name_of(found.get("name"), clean),
        code=clean(textwrap.dedent(code).strip() + "\n"),
    )


def objects(text: str) -> Iterator[dict]:
    """The JSON objects in a text, outermost ones only."""
    decoder = json.JSONDecoder(strict=False)
    position = text.find("{")
    for _ in range(MOST_OBJECTS):
        if position < 0:
            return
        try:
            value, end = decoder.raw_decode(text, position)
        except ValueError:  # also a number of 5,000 digits
            end = position + 1
        except RecursionError:
            return
        else:
            yield value
        position = text.find("{", end)


def name_of(value, clean: Callable[[str], str]) -> str:
    """A name from a name, unless it is a secret in small letters."""
    name = clean_name(clean(value) if isinstance(value, str) else "")
    return name if clean(name) == name else NO_NAME


def clean_name(value) -> str:
    """A name for files and functions."""
    text = value.lower() if isinstance(value, str) else ""
    return re.sub(r"[^a-z0-9]+", "_", text).strip("_")[:MOST_NAME].strip("_") or NO_NAME


def clean_thought(value) -> str:
    """One paragraph without control characters."""
    text = value if isinstance(value, str) else ""
    words = "".join(letter if letter.isprintable() else " " for letter in text).split()
    text = " ".join(words)
    return text if len(text) <= MOST_THOUGHT else f"{text[:MOST_THOUGHT].rstrip()} ..."
