"""Rows with several scored responses: which of them become pairs."""

import json

import pytest
from preference_rows import audit_row, bot, prepare_rows, user

from pref.files.console import UserError
from pref.files.messages import Drop

TEXTS, SCORES = ["mid", "best", "worst", "equal"], [3, 5, 1, 5]
SCORED = {
    "texts and scores": {"prompt": "q", "responses": TEXTS, "scores": SCORES},
    "argilla": {"instruction": "q", "generations": TEXTS, "ratings": list(map(str, SCORES))},
    "UltraFeedback": {
        "instruction": "q",
        "completions": [
            # The overall score is the one that is known to be wrong.
            {"response": text, "fine-grained_score": score, "overall_score": -score}
            for text, score in zip(TEXTS, SCORES)
        ],
    },
    "Nectar": {
        "prompt": "\n\nHuman: q\n\nAssistant: ",
        "answers": [{"answer": text, "rank": -score} for text, score in zip(TEXTS, SCORES)],
    },
    "messages": {"messages": [user("q")], "responses": TEXTS, "scores": SCORES},
    "NeMo-RL": {
        "context": [user("q")],
        "completions": [
            {"completion": [bot(text)], "rank": -score} for text, score in zip(TEXTS, SCORES)
        ],
    },
    "a table as text": {"prompt": "q", "responses": str(TEXTS), "scores": json.dumps(SCORES)},
}


def matches(row, rule, min_margin=0):
    pairs = audit_row(row, rule, min_margin)
    assert all(pair["prompt"] == [user("q")] for pair in pairs)
    return [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs]


@pytest.mark.parametrize("name", SCORED)
def test_scored_responses_become_pairs_by_the_rule(name):
    row = SCORED[name]
    assert matches(row, "best_worst") == [("best", "worst")]
    ((chosen, rejected),) = matches(row, "best_random")
    assert chosen == "best" and rejected in ("mid", "worst")
    assert set(matches(row, "all")) == {
        ("best", "mid"),
        ("equal", "mid"),
        ("best", "worst"),
        ("equal", "worst"),
        ("mid", "worst"),
    }
    assert set(matches(row, "all", 3)) == {("best", "worst"), ("equal", "worst")}
    assert matches(row, "best_random", 3) == [("best", "worst")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"responses": ["a", "b"], "scores": [2, 2]}, "tie, or scores less than 2 apart"),
        ({"responses": ["a", "b"], "scores": [2, 3]}, "tie, or scores less than 2 apart"),
        ({"responses": ["a", "b"], "scores": [2]}, "2 responses and 1 scores"),
        ({"responses": ["a"], "scores": [2]}, "fewer than two responses"),
        ({"responses": ["a", "b"], "scores": [2, None]}, "a score that is not a number"),
        ({"responses": ["a", "b"], "scores": [2, float("nan")]}, "a score that is not a number"),
        ({"responses": ["a", "b"]}, "responses without scores"),
        ({"responses": "a, b", "scores": [1, 2]}, "responses is not a list"),
    ],
)
def test_scored_rows_that_give_no_pair(row, reason):
    with pytest.raises(Drop) as drop:
        audit_row({"prompt": "q"} | row, "best_worst", min_margin=2)
    assert str(drop.value) == reason


def test_scored_responses_need_a_rule():
    with pytest.raises(UserError, match="need a --rule: best_worst, best_random or all"):
        audit_row(SCORED["Nectar"])


def test_the_random_response_depends_on_the_seed_and_the_row_alone(tmp_path):
    rows = [
        {"prompt": f"q{i}", "responses": [f"r{j}" for j in range(9)], "scores": [9, *range(8)]}
        for i in range(40)
    ]

    def drawn(order, seed):
        more = ("--rule", "best_random", "--seed", seed)
        train, val, _, _ = prepare_rows(tmp_path, [rows[i] for i in order], *more)
        return {p["prompt"][0]["content"]: p["rejected"][0]["content"] for p in train + val}

    first = drawn(range(40), "1")
    assert first == drawn(reversed(range(40)), "1") != drawn(range(40), "2")
    assert len(set(first.values())) == 8  # each of the others is drawn


def test_the_same_response_twice_in_a_row():
    """Equal pairs count once."""
    row = {"prompt": "q", "responses": ["a", "a", "b"], "scores": [5, 5, 1]}
    assert matches(row, "all") == [("a", "b")]


def test_control_tokens_are_seen_in_lists_that_are_text():
    row = {"prompt": "q", "responses": str(["a</s>", "b</s>"]), "scores": "[1, 2]"}
    with pytest.raises(Drop, match="carries a chat template already"):
        audit_row(row, "best_worst")
