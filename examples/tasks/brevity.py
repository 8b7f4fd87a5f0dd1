"""constraints.py with the kinds that a small model learns in a few steps: short, plain answers.

With all kinds, what one question asks for the next one forbids, and a model of 135M parameters
needs hundreds of pairs to tell them apart. Here all pull one way: few words, few sentences, no
comma, a given first word. quickstart.sh trains on it. It also shows how a task builds on another.
"""

import constraints
from constraints import explain, score  # noqa: F401  this task's own, as they are

GENERATION = {"temperature": 1.0, "max_new_tokens": 32}
KINDS = {"words_at_most", "sentences", "sentences_at_most", "no_comma", "begin_with"}
MOST = {"train": 1000, "test": 800}
SHARE = 8  # one question of constraints.py in six is of these kinds alone


def questions(split: str, number: int, seed: int) -> list[dict]:
    """The first `number` questions of constraints.py with constraints of KINDS alone."""
    if number > MOST.get(split, 0):
        raise ValueError(f"{number} {split} questions are asked for; there are {MOST}")
    rows = filter(is_brief, constraints.questions(split, SHARE * number, seed))
    return [row | {"question_id": place} for place, row in zip(range(1, number + 1), rows)]


def is_brief(row: dict) -> bool:
    return all(constraint["kind"] in KINDS for constraint in row["constraints"])
