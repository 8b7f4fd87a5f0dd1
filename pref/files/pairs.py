"""A preference pair as train.jsonl and val.jsonl hold it, and what makes one unusable.

    {"id": hash of the content, "prompt": [message, ...], "chosen": [message],
     "rejected": [message], "source": name}

A message is {"role", "content"}; messages.py lists what else it may have. The prompt may start with
a system message and ends with the user's or a tool's; `chosen` and `rejected` are one message of
the assistant's each. `tools`, a list of schemas, is there where the row has some.
"""

import re
import unicodedata
from pathlib import Path

from pref.files import disk
from pref.files.console import UserError

# Characters without a shape: zero-width spaces and joiners, byte-order marks, soft hyphens ...
INVISIBLE = re.compile(
    "[\u00ad\u115f\u1160\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2800\u3164\ufeff]"
)
ROLES = ("system", "user", "assistant", "tool")
# Who may follow whom. An assistant's message with tool calls is "calls".
FOLLOWS = {
    "start": ("user",),
    "user": ("assistant", "calls"),
    "assistant": ("user",),
    "calls": ("tool",),
    "tool": ("tool", "assistant", "calls", "user"),
}


def check_pair(row: dict) -> str | None:
    """Why `row` is not a usable pair, or None if it is. prep_data.py drops rows for these reasons,
    and its counts show them.
    """
    for key in ("prompt", "chosen", "rejected"):
        if not is_message_list(row.get(key)):
            return f"{key} is not a list of messages"
        if unknown := [m["role"] for m in row[key] if m["role"] not in ROLES]:
            return f"unknown role '{unknown[0]}'"
    for key in ("chosen", "rejected"):
        if [message["role"] for message in row[key]] != ["assistant"]:
            return "last message not the assistant's"
        if not row[key][0]["content"].strip() and not row[key][0].get("tool_calls"):
            return f"empty {key}"
    if problem := role_problem(row["prompt"]):
        return f"roles do not alternate: {problem}"
    if not any(m["content"].strip() for m in row["prompt"] if m["role"] == "user"):
        return "empty prompt"
    if said(row["chosen"][0]) == said(row["rejected"][0]):
        return "chosen == rejected"
    return None


def said(message: dict) -> tuple:
    """All that a response says, without the space around it."""
    texts = (message["content"], message.get("reasoning_content", ""))
    return *(text.strip() for text in texts), message.get("tool_calls")


def check_visible(pair: dict) -> str | None:
    """Why no reader would see a usable pair in one that `check_pair` accepts, or None. Not asked of
    files that prep_data.py has written already, so that runs on them can be continued.
    """
    for key in ("chosen", "rejected"):
        if not visible(pair[key][0]["content"]) and not pair[key][0].get("tool_calls"):
            return f"empty {key}"
    asked = [message for message in pair["prompt"] if message["role"] == "user"]
    if not visible(asked[-1]["content"]):  # what the responses would answer
        return "empty prompt"
    if response_key(pair["chosen"][0]) == response_key(pair["rejected"][0]):
        return "chosen == rejected"
    messages = [*pair["prompt"], *pair["chosen"], *pair["rejected"]]
    if any("\0" in message["content"] for message in messages):
        return "a NUL character in a text"
    return None


def visible(text: str) -> str:
    """`text` as a reader sees it: without invisible characters and the space around it, composed
    (NFC).
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", INVISIBLE.sub("", text))
    return text.strip().strip("\0").strip()


def response_key(message: dict) -> tuple:
    """What tells two responses apart for a reader."""
    calls = disk.sha256_json(message["tool_calls"]) if message.get("tool_calls") else ""
    return visible(message["content"]), visible(message.get("reasoning_content", "")), calls


def is_message_list(value) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in value
    )


def role_problem(prompt: list[dict]) -> str | None:
    """Why the prompt's roles are not [system,] user, assistant, ..., user, or None if they are.

    An assistant's message with tool calls is followed by the tools' results.
    """
    roles = [message["role"] for message in prompt]
    if unknown := next(
        (r for r in roles if r not in ("system", "user", "assistant", "tool")), None
    ):
        return f"unknown role '{unknown}'"
    if roles[:1] == ["system"]:
        prompt, roles = prompt[1:], roles[1:]
    if not roles:
        return "no user message"
    if "system" in roles:
        return "a system message after the first one"
    before = "start"
    for message, role in zip(prompt, roles):
        kind = "calls" if role == "assistant" and message.get("tool_calls") else role
        if kind not in FOLLOWS[before]:
            return describe_step(before, role)
        before = kind
    if before not in ("user", "tool"):
        return "the prompt ends with the assistant"
    return None


def describe_step(before: str, role: str) -> str:
    if before == "start":
        return f"it begins with the {role}"
    if before == "calls":
        return f"tool calls, and then the {role} instead of a tool"
    if before == role:
        return f"two {role} messages in a row"
    return f"the {role} after the {before}"


def read_pairs(path: Path, limit: int | None = None) -> list[dict]:
    """The pairs of one split, checked; the first `limit` of them.

    Raises UserError with file, line and remedy for the first row that is not a usable pair.
    """
    pairs = []
    for number, row in disk.read_jsonl(path):
        if not isinstance(row.get("id"), str):
            raise UserError(f"{path}:{number}: no 'id'; rerun prep_data.py to write the file again")
        if reason := check_pair(row):
            raise UserError(
                f"{path}:{number}: {reason}; rerun prep_data.py to write the file again"
            )
        pairs.append(row)
        if limit and len(pairs) == limit:
            break
    if not pairs:
        raise UserError(
            f"{path}: no pairs; dropped.jsonl next to it lists the rows that were left out, "
            "with reasons; correct the source and rerun prep_data.py"
        )
    return pairs
