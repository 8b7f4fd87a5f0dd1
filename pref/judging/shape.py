"""The shape of an answer: its length and its markdown, which judges are known to reward.

Kept with each comparison, so that length control and style control need the judgements alone. The
patterns are arena-hard-auto's (utils/add_markdown_info.py), except that a ``` block may hold
backticks, and ends with the text where nothing closes it.
"""

import functools
import re

CODE_BLOCK = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)  # to the end if nothing closes it
MARKS = {
    "headers": (r"^#{1,6}\s",),
    "lists": (r"^\s*\d+\.\s", r"^\s*[-*+]\s"),
    "bold": (r"\*\*[^*\n]+\*\*", r"__[^_\n]+__"),
}
PATTERNS = {
    name: [re.compile(pattern, re.MULTILINE) for pattern in patterns]
    for name, patterns in MARKS.items()
}


@functools.cache
def shape(text: str) -> dict[str, int]:
    """Characters, and the headers, list items and bold passages outside blocks of code."""
    prose = CODE_BLOCK.sub("", text)
    counts = {
        name: sum(len(pattern.findall(prose)) for pattern in patterns)
        for name, patterns in PATTERNS.items()
    }
    return {"chars": len(text), **counts}
