"""A preference pair as train.jsonl and val.jsonl hold it, and what makes one unusable.

    {"id": hash of the content, "prompt": [message, ...], "chosen": [message],
     "rejected": [message], "source": name}

A message is {"role", "content"}. The prompt may start with a system message and ends with the
user's; `chosen` and `rejected` are one message of the assistant's each.
"""

from pathlib import Path

from pref.files import disk
from pref.files.console import UserError


def check_pair(row: dict) -> str | None:
    """Why `row` is not a usable pair, or None if it is. prep_data.py drops rows for these reasons,
    and its counts show them.
    """
    for key in ("prompt", "chosen", "rejected"):
        if not is_message_list(row.get(key)):
            return f"{key} is not a list of messages"
    for key in ("chosen", "rejected"):
        if [message["role"] for message in row[key]] != ["assistant"]:
            return "last message not the assistant's"
        if not row[key][0]["content"].strip():
            return f"empty {key}"
    if not roles_alternate([message["role"] for message in row["prompt"]]):
        return "roles do not alternate"
    if not any(m["content"].strip() for m in row["prompt"] if m["role"] == "user"):
        return "empty prompt"
    if row["chosen"][0]["content"].strip() == row["rejected"][0]["content"].strip():
        return "chosen == rejected"
    return None


def is_message_list(value) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in value
    )


def roles_alternate(roles: list[str]) -> bool:
    """Whether a prompt's roles are [system,] user, assistant, user, ..., user."""
    if roles[:1] == ["system"]:
        roles = roles[1:]
    exchanges = len(roles) // 2  # user and assistant, before the last message
    return roles == ["user", "assistant"] * exchanges + ["user"]


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
