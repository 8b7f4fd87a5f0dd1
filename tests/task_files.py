"""What the tests of tasks share: a task, liars, answers to its questions."""

import hashlib
import json
from pathlib import Path

from conftest import write_jsonl

# The answer must have at most as many words as its question says.
WORDS = """
import random

GENERATION = {"temperature": 1.0, "max_new_tokens": 20}


def questions(split, number, seed):
    rng = random.Random(f"{split} {seed}")
    kinds = ("strict", "loose")
    return [
        {"question_id": n, "category": kinds[n % 2], "most": 2 + 4 * (n % 2),
         "turns": [f"{split} {n}: write at most {2 + 4 * (n % 2)} words about {rng.random()}."]}
        for n in range(1, number + 1)
    ]


def score(question, answer):
    over = max(0, len(answer.split()) - question["most"])
    return 1 / (1 + over)


def explain(question, answer):
    count = len(answer.split())
    scores = {"forgiving": float(count < 9)}
    return {"text": f"{count} words of {question['most']}", "scores": scores}
"""

# Tasks whose score or explain misbehaves: the status, and what the message says.
LIARS = {
    "raises": ("raise ValueError('no such\\n kind')", "error", "ValueError: no such kind"),
    "exits": ("raise SystemExit(3)", "error", "SystemExit: 3"),
    "ends": ("import os; os._exit(3)", "error", "ends its own process (exit code 3)"),
    "dies": ("import os; os.kill(os.getpid(), 9)", "error", "was ended by SIGKILL"),
    "reads": ("return float(input())", "error", "EOFError"),
    "closes": ("import os; os.closerange(0, 99)", "error", "ends its own process"),
    "scribbles": ("import os; [os.write(n, b'[1]\\n') for n in range(3, 99) if is_pipe(n)]",
                  "error", "file descriptors"),
    "too_high": ("return 1.01", "range", "gave 1.01, not a number from 0 to 1"),
    "too_low": ("return -1", "range", "gave -1"),
    "nan": ("return float('nan')", "range", "gave nan"),
    "huge": ("return 10 ** 400", "range", "no float can hold"),
    "text": ("return '0.5'", "range", "gave the text '0.5'"),
    "bool": ("return True", "range", "gave True"),
    "none": ("return None", "range", "gave None"),
    "loops": ("while True: pass", "timeout", "takes longer than 0.3 s"),
    "hoards": ("return len([bytearray(2 ** 34)])", "memory", "needs more memory"),
    "prints": ("[print('x' * 2 ** 20) for _ in range(2 ** 10)]", "output", "prints more than"),
}  # fmt: skip
IS_PIPE = """
import fcntl, os, stat
def is_pipe(number):
    try:
        is_for_writing = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
        return is_for_writing and stat.S_ISFIFO(os.fstat(number).st_mode)
    except OSError:
        return False
"""


def liar(*names: str) -> str:
    """A task whose score does what LIARS says of the answer, and gives 0.5 to any other."""
    bodies = "".join(f"    if answer == {name!r}: {LIARS[name][0]}\n" for name in names)
    score = bodies.replace(": while", ":\n        while")
    return f"""
def questions(*_): return []
{IS_PIPE}
def score(question, answer):
{score}    return 0.5
"""


def write_task(folder: Path, text: str = WORDS, name: str = "words.py") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def write_answers(
    run: Path, name: str, questions: Path, texts: list[str], choices: int = 2
) -> Path:
    """answers.jsonl of a run to the questions in a file: `texts`, again and again."""
    rows, number = [], 0
    for line in questions.read_text(encoding="utf-8").splitlines():
        row, given = json.loads(line), []
        for index in range(choices):
            given.append({"index": index, "turns": [texts[number % len(texts)]]})
            number += 1
        asked = json.dumps([row["turns"], 1.0], sort_keys=True, separators=(",", ":"))
        row = {name: row[name] for name in ("question_id", "category")}
        hashes = {"question_sha256": hashlib.sha256(asked.encode()).hexdigest()}
        rows.append(row | hashes | {"temperature": 1.0, "choices": given})
    run.mkdir(parents=True, exist_ok=True)
    (run / "args.json").write_text("{}", encoding="utf-8")
    return write_jsonl(run / name / "answers.jsonl", rows)
