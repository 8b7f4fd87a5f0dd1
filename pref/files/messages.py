"""Conversations as [{role, content}], from the ways in which preference data writes them.

The readers in prep_data.py are built on `as_messages`. What it cannot read it reports as Drop.
"""

import re

# ShareGPT's names of the roles. Any other name is kept, and pairs.check_pair rejects it.
ROLES = {"human": "user", "gpt": "assistant"}


class Drop(Exception):
    """A row that is not a usable pair; the message is the reason that dropped.jsonl records."""


def as_messages(value, role: str) -> list[dict]:
    """`value` as [{role, content}]: a message list, one message, or text spoken by `role`.

    Text is parsed as an HH transcript where a whole `transcript` is expected, and where a `user`
    prompt opens with '\\n\\nHuman:'. Raises Drop for any other value.
    """
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        return [as_message(item) for item in value]
    if value is not None and not isinstance(value, str):
        raise Drop("neither text nor a list of messages")
    text = value or ""
    if role == "transcript" or (role == "user" and text.startswith("\n\nHuman:")):
        return parse_transcript(text)
    return [{"role": role, "content": text}]


def as_message(item) -> dict:
    """{role, content} of a message that may also be {from, value}."""
    if not isinstance(item, dict):
        raise Drop("neither text nor a list of messages")
    role, content = item.get("role") or item.get("from"), item.get("content", item.get("value"))
    if not isinstance(role, str) or not isinstance(content, str | None):
        raise Drop("a message without a role, or with content that is not text")
    return {"role": ROLES.get(role.lower(), role.lower()), "content": content or ""}


def parse_transcript(text: str) -> list[dict]:
    """Messages of an Anthropic HH transcript. The space around each turn is part of the format."""
    # "\n\nHuman: Hi\n\nAssistant: Hello!" -> "", "Human", " Hi", "Assistant", " Hello!"
    before, *turns = re.split(r"(?:\A|\n\n)(Human|Assistant):", text)
    if before.strip() or not turns:
        raise Drop("not a Human/Assistant transcript")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": body.strip()}
        for speaker, body in zip(turns[::2], turns[1::2])
    ]
