"""The pairs of one row, once its texts that hold messages have been parsed (audit.py)."""

import json
import re

from pref.files import columns, disk, layouts, messages, rankings
from pref.files.messages import Drop
from pref.files.pairs import check_pair, check_visible, visible
from pref.files.rankings import Selection

NO_SELECTION = Selection(rule=None, min_margin=0, seed=0)
# Where a picture was, in the data of models that take some.
PLACEHOLDER = re.compile(r"\A\s*<(image|video|audio)>|<(image|video|audio)>\s*\Z")
MISSING = ("nan", "NaN", "None", "null", "NULL", "<NA>")  # how tables write that nothing is there


def to_pairs(
    row: dict, layout: str, source: str, selection: Selection = NO_SELECTION
) -> list[dict]:
    """The row as pairs (format: pref/files/README.md), one except with --rule all. Raises Drop with
    the reason if it has no usable one.
    """
    if media := next((key for key in messages.MEDIA if columns.filled(row.get(key))), None):
        raise Drop(f"has {media}: only text can be trained")
    # 1) Two conversations, or several.
    try:
        found = layouts.LAYOUTS[layout].read(row)
    except KeyError as error:  # JSON rows need not have all columns of the first one
        raise Drop(f"no column {error}") from None
    if isinstance(found, rankings.Candidates):
        matches = rankings.select(found, selection)
        found = [layouts.answer_with(found.prompt, m.chosen, m.rejected) for m in matches]
    else:
        found = [found]

    # 2) Those that are usable.
    pairs, reasons = [], []
    for branches in found:
        try:
            pairs.append(to_pair(row, branches, source))
        except Drop as drop:
            reasons.append(drop)
    if not pairs:
        raise reasons[0]
    return pairs


def to_pair(row: dict, branches: layouts.Branches, source: str) -> dict:
    """The pair of two conversations. Raises Drop with the reason if it is not a usable one."""
    # 1) The row's system message, and its tools.
    system = system_text(row)
    chosen, rejected = (with_system(b, system) for b in (branches.chosen, branches.rejected))
    tools = branches.tools or row.get("tools")
    tools = messages.read_tools(tools) if columns.filled(tools) else []

    # 2) One prompt and two last messages.
    pair = {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
    if reason := check_pair(pair) or check_visible(pair):
        raise Drop(reason)
    if any(PLACEHOLDER.search(m["content"]) for m in pair["prompt"]):
        raise Drop("has a placeholder of a picture or sound: only text can be trained")
    for side in ("chosen", "rejected"):
        if pair[side][0]["content"].strip() in MISSING:
            raise Drop(f"{side} is a missing value written as text")
    if list(map(message_key, chosen[:-1])) != list(map(message_key, rejected[:-1])):
        raise Drop("different prompts in the two branches")
    if tools:
        pair["tools"] = tools

    # 3) An id made from the content alone, and the name of where it comes from.
    labels = (row.get(name) for name in ("dataset", "source"))
    label = next((text for text in labels if is_label(text)), source)
    pair = {"id": disk.sha256_json(pair)[:16], **pair, "source": label}
    try:
        json.dumps(pair, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Drop("not valid Unicode (half a surrogate pair)") from None
    return pair


def is_label(text) -> bool:
    """Whether the value of a `dataset` or `source` column names where a row comes from."""
    named = isinstance(text, str) and bool(text.strip())
    return named and columns.kind_of("source", text) == columns.METADATA


def system_text(row: dict) -> str:
    """The text of the row's system column, which may also be a message; "" without one."""
    name = layouts.first_of(row, "|".join(layouts.SYSTEM_COLUMNS))
    if not name or not columns.filled(row[name]):
        return ""
    return "\n\n".join(m["content"] for m in messages.as_messages(row[name], "system"))


def with_system(conversation: list[dict], system: str) -> list[dict]:
    """`conversation` with the text `system` first; empty system messages are removed. Raises Drop
    if it has another system message already.
    """
    conversation = [m for m in conversation if m["role"] != "system" or m["content"].strip()]
    if not system:
        return conversation
    if [m["role"] for m in conversation[:1]] != ["system"]:
        return [{"role": "system", "content": system}, *conversation]
    if columns.squeezed(conversation[0]["content"]) != columns.squeezed(system):
        raise Drop("the system column differs from the conversation's system message")
    return conversation


def prompt_key(prompt: list[dict]) -> str:
    """The same hash for prompts that look the same; the space around a message, characters without
    a shape and the form in which accents are written make no difference.
    """
    return disk.sha256_json([message_key(message) for message in prompt])


def message_key(message: dict) -> list:
    calls = [message["tool_calls"]] if message.get("tool_calls") else []
    return [message["role"], visible(message["content"]), *calls]
