"""Which columns of a row are used, under which name, and what becomes of the others.

A column that the layout does not use is one of four things, and the manifest says which:

    metadata      ids, scores, model names, dates: named once, and not used
    repeated      its text is in the pair already: nothing is lost
    pool          a list of responses that chosen or rejected was taken from
    content       text, messages or images that would be lost: an error that names the remedy
"""

import datetime
import decimal
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from pref.files.control_tokens import texts_of
from pref.files.messages import KNOWN_KEYS, ROLE_KEYS, Drop, unserialise
from pref.files.rankings import RESPONSE_KEYS, SCORE_KEYS, words

METADATA, REPEATED, POOL, CONTENT = "metadata", "repeated", "pool", "content"
ASKED, REPLACED = "--ignore_columns", "replaced by --columns"


# The last word of a name says what it is: `prompt_id` is an id, `source_text` a text.
METADATA_WORDS = words(
    """
    id ids uuid guid uid idx index key keys hash sha md source sources dataset datasets
    origin corpus url urls uri link links model models generator score scores rating ratings reward
    rewards rank ranks elo date time timestamp tstamp created updated at lang language languages
    locale category categories domain domains topic topics tag tags type types kind subset split
    license version status label labels length lengths tokens num count turn turns toxicity safe
    safety severity level difficulty quality annotator annotators principle strength margin weight
    seed temperature params config author filename file path subreddit country winner confidence
    agreement group flagged moderation embedding logprob logprobs logp logps criterion criteria
    method keywords order user username nature natured step sha probability prob
    """
)
# Made when the preference was annotated; never part of a conversation, however long it is.
ANNOTATION_WORDS = words(
    """
    metadata meta rationale rationales critique critiques feedback annotation annotations
    preference preferences judgement judgment judgements judgments justification moderation
    embedding embeddings logprobs url urls links tags statement elaboration
    """
)
ANNOTATION_ANYWHERE = {"labelling", "labeling", "annotator", "annotators", "annotation", "judge"}
# Content however short it is.
CONTENT_WORDS = words(
    """
    context contexts document documents passage passages paragraph history system persona
    instruction instructions prompt prompts question questions query input inputs message messages
    conversation conversations dialogue dialog text texts story article body example examples
    knowledge background hint hints image images video videos audio audios tool tools function
    functions demonstration demonstrations fewshot shots response responses completion completions
    """
)
SKIPPED_WORDS = {"chosen", "rejected", "a", "b", "j", "k"}
# UltraFeedback's, from TruthfulQA; the annotator's text in AlpacaEval; distilabel's record of how
# the responses were made.
OTHER_METADATA = {"correct_answers", "incorrect_answers", "raw_completion"}
OTHER_METADATA |= {"generation_prompt", "raw_generation_responses"}
PLAIN_TYPES = datetime.date | datetime.time | datetime.timedelta | decimal.Decimal
LONG_TEXT = 120  # characters, above which a text is content under most names
MAX_SHORT_WORDS = 3  # a text of unknown name with more words is content


class Choices(NamedTuple):
    """--columns and --ignore_columns."""

    renames: dict[str, str]  # {name that a layout uses: name in the source}
    ignored: tuple[str, ...]


@dataclass
class Unused:
    """A column of which something was not used."""

    why: str
    rows: int = 0
    place: str = ""  # of the first of these rows
    example: str = ""
    is_text: bool = False


# ---- names ---------------------------------------------------------------------------------------


def apply_choices(row: dict, choices: Choices, known: set[str]) -> tuple[dict, dict[str, str]]:
    """(row under the names that layouts use, {column that was left out: why}).

    A source 'a.b' is the key b of the object in column a, and 'a.0' the first item of the list in
    it. Names that differ from a known one in case or surrounding space alone are read as it.
    """
    values = {target: take(row, path) for target, path in choices.renames.items()}
    left_out = {name: ASKED for name in choices.ignored if name in row and filled(row[name])}
    row = {name: value for name, value in row.items() if name not in choices.ignored}
    row = {usual_name(name, row, known): value for name, value in row.items()}
    if not choices.renames:
        return row, left_out
    row = {name: value for name, value in row.items() if name not in choices.renames.values()}
    for target, value in values.items():
        if target in row:
            left_out[target] = REPLACED
        # A row whose column is empty must not fall back to the one that it replaces.
        row[target] = value
    return row, left_out


def usual_name(name: str, row: dict, known: set[str]) -> str:
    """'Prompt ' -> 'prompt', if layouts know that name and no other column of the row has it."""
    if name in known:
        return name
    plain = name.strip().lower().replace(" ", "_")
    alike = [other for other in row if other.strip().lower().replace(" ", "_") == plain]
    return plain if plain in known and alike == [name] else name


def take(row: dict, path: str):
    """The value of a column, or of a key inside it; None if there is none."""
    if path in row:
        return row[path]
    value = row
    for part in path.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return value


def filled(value) -> bool:
    """Whether there is anything in a value."""
    if isinstance(value, str):
        return bool(value.strip()) and value.strip().lower() not in (
            "none",
            "null",
            "nan",
            "[]",
            "{}",
        )
    if isinstance(value, dict):
        return any(filled(item) for item in value.values())
    if isinstance(value, list):
        return any(filled(item) for item in value)
    return value is not None and value == value  # not NaN


@lru_cache
def noun(name: str) -> str:
    """The last word of a column's name that says what is in it: 'response_0_sha256' -> 'sha'."""
    parts = [word for word in words(name) if not word.isdigit() and word not in SKIPPED_WORDS]
    return parts[-1] if parts else ""


# ---- what an unused column is --------------------------------------------------------------------


@lru_cache
def kind_by_name(name: str) -> str | None:
    """What a column is by its name alone, whatever is in it; None if that is open."""
    if name in OTHER_METADATA:
        return METADATA
    parts = words(name)
    if ANNOTATION_ANYWHERE & set(parts) or noun(name) in ANNOTATION_WORDS:
        return METADATA
    if parts and parts[0] in ("is", "has", "num", "n", "in"):
        return METADATA
    return None


def kind_of(name: str, value) -> str:
    """METADATA or CONTENT, by the column's name and this value in it."""
    if kind := kind_by_name(name):
        return kind
    head = noun(name)
    if isinstance(value, bool | int | float):
        return METADATA
    if has_messages(value):
        return CONTENT
    texts = [text for text in texts_of(value) if filled(text)]
    if has_binary(value):
        return CONTENT
    if head in CONTENT_WORDS:
        return CONTENT if texts else METADATA
    long = [text for text in texts if len(text) > LONG_TEXT or "\n" in text.strip()]
    if head in METADATA_WORDS:
        return CONTENT if any(not is_address(text) for text in long) else METADATA
    return CONTENT if any(is_prose(text) for text in texts) else METADATA


def is_prose(text: str) -> bool:
    """Whether a text of unknown purpose is more than a name, a number, a date or an address."""
    if is_address(text):
        return False
    # Chinese, Japanese and Thai do not separate words by spaces.
    return len(text.split()) > MAX_SHORT_WORDS or (not text.isascii() and len(text) > 12)


def is_address(text: str) -> bool:
    address = r"\s*(?:[a-z]+://\S+|[\w./+=-]+|[\d\s:.,TZ+-]+)\s*"
    return bool(re.fullmatch(address, text, re.ASCII))


def has_messages(value) -> bool:
    items = value if isinstance(value, list) else [value]
    return any(isinstance(item, dict) and ("role" in item or "from" in item) for item in items)


def has_binary(value) -> bool:
    """Whether a value holds an image, a sound or anything else that JSON could not hold."""
    if isinstance(value, dict | list):
        return any(map(has_binary, value.values() if isinstance(value, dict) else value))
    return value is not None and not isinstance(value, str | int | float | PLAIN_TYPES)


# ---- what of a row was not used ------------------------------------------------------------------


def unused_values(row: dict, used: set[str]) -> Iterator[tuple[str, object]]:
    """(name, value) of the columns that are not used, and of keys inside used ones that are not."""
    for name, value in row.items():
        if name not in used:
            if filled(value):
                yield name, value
        elif name != "tools":
            yield from unused_inside(name, value)


def unused_inside(name: str, value) -> Iterator[tuple[str, object]]:
    """`unused_values` of a column that is used: keys of its messages or of its responses."""
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        yield from unused_keys(value, {"messages", "tools"}, name)
        value = value["messages"]
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict) and has_messages(item):
            yield from unused_keys(item, KNOWN_KEYS, "message")
        elif isinstance(item, dict):
            yield from unused_keys(item, {*RESPONSE_KEYS, *SCORE_KEYS}, name)


def unused_keys(item: dict, known: set[str], name: str) -> Iterator[tuple[str, object]]:
    for key, value in item.items():
        is_tool_name = key == "name" and str(item.get("role")).lower() in ("tool", "function")
        if key not in known and filled(value) and not is_tool_name:
            yield f"{name}.{key}", value


def judge_value(name: str, value, pair: dict) -> str:
    """What an unused value is, beside the pair that was made of its row."""
    kind = kind_of(name, value)
    if kind != CONTENT or has_binary(value):
        return kind
    chosen, rejected = (squeezed(pair[key][0]["content"]) for key in ("chosen", "rejected"))
    if isinstance(value, list):
        items = {squeezed(item) for item in value if isinstance(item, str)}
        if {chosen, rejected} & items:
            return POOL
    asked = [squeezed(message["content"]) for message in pair["prompt"]]
    answered = (chosen, rejected, *asked)
    texts = [squeezed(text) for text in content_texts(value)]
    # A context that the answer quotes is not repeated: the prompt lacks it.
    told = "".join(asked)
    known = all(text in answered or (len(text) > 3 and text in told) for text in texts)
    return REPEATED if known else CONTENT


def content_texts(value) -> Iterator[str]:
    """The texts of a value without the names of roles and of types of content parts."""
    with suppress(Drop):
        value = unserialise(value)
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in (*ROLE_KEYS, "type")}
        for item in kept.values():
            yield from content_texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from content_texts(item)
    elif isinstance(value, str):
        yield value


def squeezed(text: str) -> str:
    """`text` without its white space, in which repetitions of a text often differ."""
    return "".join(text.split())


def count_unused(unused: dict[str, Unused], name: str, why: str, place: str, value="") -> None:
    """Note that the row at `place` had something in the column `name` that was not used.

    Content in one row outweighs what the column is in the others.
    """
    item = unused.setdefault(name, Unused(why))
    if why == CONTENT and item.why != CONTENT:
        unused[name] = item = Unused(CONTENT, item.rows)
        item.place = ""
    item.rows += 1
    if not item.place and why == item.why:
        item.place = place
        item.example = " ".join(str(value).split())[:60]
        item.is_text = isinstance(value, str)


def rows_text(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def remedy(lost: dict[str, Unused], prompt: str) -> str:
    """What to do about columns of content that are not used. prompt: the column that is."""
    names = sorted(lost)
    lines = [f"To leave them out on purpose: --ignore_columns {','.join(names)}"]
    name = next((name for name in names if "." not in name), "")
    if name and {"system", "persona"} & set(words(name)):
        lines.append(f"To make it the system message: --columns system={name}")
    elif name and noun(name) in ("tool", "tools", "function", "functions"):
        lines.append(f"If these are schemas of tools: --columns tools={name}")
    elif name and prompt and lost[name].is_text:
        lines.append(f"To put it below the prompt: --columns instruction={prompt},input={name}")
        lines.append(f"To use it instead of the prompt: --columns prompt={name}")
    return "\n".join(lines)
