"""a preference pair and when it is none"""

from pathlib import Path

from pref.files import disk
from pref.files.console import UserError


def check_pair(row: dict) -> str | None:
    """Why `row` is no usable preference pair, or None. The reasons are prep_data.py's drop
    reasons.
    """
    for key in ("prompt", "chosen", "rejected"):
        messages = row.get(key)
        if not isinstance(messages, list) or not all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in messages
        ):
            return f"{key} is not a list of messages"
    for key in ("chosen", "rejected"):
        if [m["role"] for m in row[key]] != ["assistant"]:
            return "last message not the assistant's"
        if not row[key][0]["content"].strip():
            return f"empty {key}"
    roles = [m["role"] for m in row["prompt"] if m["role"] != "system"]
    if any(m["role"] == "system" for m in row["prompt"][1:]) or roles != ["user", "assistant"] * (
        len(roles) // 2
    ) + ["user"]:
        return "roles do not alternate"
    if not any(m["content"].strip() for m in row["prompt"] if m["role"] == "user"):
        return "empty prompt"
    if row["chosen"][0]["content"].strip() == row["rejected"][0]["content"].strip():
        return "chosen == rejected"
    return None


def read_pairs(path: Path, limit: int | None = None) -> list[dict]:
    """Pairs of one split, checked. Raises UserError with file, line and remedy for the first bad
    one.
    """
    pairs = []
    for number, row in disk.read_jsonl(path):
        if not isinstance(row.get("id"), str):
            raise UserError(f"{path}:{number}: no 'id'; rerun prep_data.py")
        if reason := check_pair(row):
            raise UserError(f"{path}:{number}: {reason}; rerun prep_data.py")
        pairs.append(row)
        if limit and len(pairs) == limit:
            break
    if not pairs:
        raise UserError(f"{path}: no pairs; rerun prep_data.py and see dropped.jsonl beside it")
    return pairs
