"""A task for models of random weights: the share of an answer's words that begin with a to m.

Even a model that knows no language can raise it, so that a study with the real stages takes minutes
(bench/null_study.py --task bench/null_task.py).
"""

import re

GENERATION = {"temperature": 1.0, "max_new_tokens": 24}
FIRST = {"train": 0, "test": 100_000}


def questions(split: str, number: int, seed: int) -> list[dict]:
    """`number` prompts that differ in a number; those of the two splits are different ones."""
    start = FIRST[split]
    return [
        {"question_id": i, "category": "word", "turns": [f"Say something about number {i}."]}
        for i in range(start + 1, start + number + 1)
    ]


def score(question: dict, answer: str) -> float:
    words = re.findall(r"[a-z]+", answer.lower())
    return sum(word[0] <= "m" for word in words) / len(words) if words else 0.0
