"""Layouts: a row of each, every reason to drop a row, and what --help shows."""

import inspect
import json
import string

import pytest
from preference_rows import audit_row, bot, lists, prepare, prepare_rows, talk, user, write_rows

import prep_data
from pref.files.console import UserError
from pref.files.layouts import LAYOUTS, columns_text, find_layout
from pref.files.messages import Drop
from pref.files.pairs import check_pair

# ---- layouts -------------------------------------------------------------------------------------

HH = "\n\nHuman: Hi.\n\nAssistant: Hello!\n\nHuman: How high is K2?\n\nAssistant: "
HH_PROMPT = [user("Hi."), bot("Hello!"), user("How high is K2?")]
SYSTEM = {"role": "system", "content": "Be brief."}
ASK = "How high is K2?"

LAYOUT_ROWS = {
    "message lists": (
        {
            "chosen": [SYSTEM, *talk(ASK, "8,611 m.")],
            "rejected": [SYSTEM, *talk(ASK, "High.")],
            "dataset": "ultra",
        },
        [SYSTEM, user(ASK)],
    ),
    "UltraFeedback": (
        {"prompt": ASK, "prompt_id": "f0", "score_chosen": 8.0, **lists(ASK, "8,611 m.", "High.")},
        [user(ASK)],
    ),
    "TRL, text": ({"prompt": ASK, "chosen": "8,611 m.", "rejected": "High."}, [user(ASK)]),
    "TRL, messages": (
        {"prompt": [SYSTEM, user(ASK)], "chosen": [bot("8,611 m.")], "rejected": [bot("High.")]},
        [SYSTEM, user(ASK)],
    ),
    "TRL, text with a system column": (
        {"system": "Be brief.", "question": ASK, "chosen": "8,611 m.", "rejected": "High."},
        [SYSTEM, user(ASK)],
    ),
    "empty system column": (
        {"system": "", "question": ASK, "chosen": "8,611 m.", "rejected": "High."},
        [user(ASK)],
    ),
    "HH": ({"chosen": HH + "8,611 m.", "rejected": HH + "High."}, HH_PROMPT),
    "HH, prompt apart": ({"prompt": HH, "chosen": "8,611 m.", "rejected": "High."}, HH_PROMPT),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": ASK},
            ],
            "chosen": {"from": "gpt", "value": "8,611 m."},
            "rejected": {"from": "gpt", "value": "High."},
        },
        [SYSTEM, user(ASK)],
    ),
    "Alpaca": (
        {
            "instruction": "Translate.",
            "input": "Der Berg",
            "chosen": "8,611 m.",
            "rejected": "High.",
        },
        [user("Translate.\n\nDer Berg")],
    ),
    "Alpaca, no input": (
        {"instruction": ASK, "input": "", "chosen": "8,611 m.", "rejected": "High."},
        [user(ASK)],
    ),
    "choice a": (
        {"prompt": ASK, "completion_a": "8,611 m.", "completion_b": "High.", "choice": "A"},
        [user(ASK)],
    ),
    "choice b": (
        {"instruction": ASK, "completion_a": "High.", "completion_b": "8,611 m.", "choice": "b"},
        [user(ASK)],
    ),
    "choice 0": (
        {"prompt": ASK, "completion_a": "8,611 m.", "completion_b": "High.", "choice": 0},
        [user(ASK)],
    ),
    "choice 1": (
        {"prompt": ASK, "completion_a": "High.", "completion_b": "8,611 m.", "choice": 1.0},
        [user(ASK)],
    ),
    "AlpacaEval 1": (
        {"instruction": ASK, "output_1": "8,611 m.", "output_2": "High.", "preference": 1},
        [user(ASK)],
    ),
    "AlpacaEval 2": (
        {"instruction": ASK, "output_1": "High.", "output_2": "8,611 m.", "preference": 2},
        [user(ASK)],
    ),
    "AlpacaEval 1.2": (
        {"instruction": ASK, "output_1": "8,611 m.", "output_2": "High.", "preference": 1.2},
        [user(ASK)],
    ),
}


@pytest.mark.parametrize("name", LAYOUT_ROWS)
def test_layout(name):
    row, prompt = LAYOUT_ROWS[name]
    (pair,) = audit_row(row)
    assert pair["prompt"] == prompt
    assert pair["chosen"] == [bot("8,611 m.")]
    assert pair["rejected"] == [bot("High.")]
    assert pair["source"] == row.get("dataset", "mine")
    assert list(pair) == ["id", "prompt", "chosen", "rejected", "source"]
    assert check_pair(pair) is None


def test_id_is_the_content_and_only_the_content():
    rows = [
        lists("q", "a", "b"),
        lists("q", "a", "b", dataset="other"),
        lists("q", "b", "a"),
    ]
    ids = [audit_row(row)[0]["id"] for row in rows]
    assert ids[0] == ids[1] != ids[2]
    assert len(ids[0]) == 16 and not set(ids[0]) - set(string.hexdigits)


def test_unknown_layout_lists_columns_and_layouts(tmp_path):
    source = write_rows(tmp_path / "odd.jsonl", [{"better": "a", "worse": "b"}])
    with pytest.raises(
        UserError, match=r"odd\.jsonl:1: unknown layout with columns better, worse"
    ) as error:
        prepare(source, tmp_path / "out")
    for name in LAYOUTS:
        assert f"\n  {name}: " in str(error.value)
    assert not (tmp_path / "out").exists()


def test_choice_2_is_refused_because_1_would_be_read_the_wrong_way_round(tmp_path):
    row = {"prompt": "q", "completion_a": "x", "completion_b": "y"}
    with pytest.raises(UserError, match=r"source\.jsonl:2: choice is 2"):
        prepare_rows(tmp_path, [{**row, "choice": 1}, {**row, "choice": 2}])


# ---- drops ---------------------------------------------------------------------------------------

CHOICE = {"prompt": "Which one?", "completion_a": "x", "completion_b": "y"}
EVAL = {"instruction": "Which one?", "output_1": "x", "output_2": "y"}
BAD_ROWS = [
    ("empty chosen", lists("q", " \n", "b")),
    ("empty rejected", lists("q", "a", "")),
    ("empty rejected", {"prompt": "q", "chosen": "a", "rejected": None}),
    ("empty prompt", {"prompt": " ", "chosen": "a", "rejected": "b"}),
    ("chosen == rejected", lists("q", "a", "a \n")),
    (
        "roles do not alternate: two user messages in a row",
        {"chosen": [user("q"), *talk("q", "a")], "rejected": [user("q"), *talk("q", "b")]},
    ),
    (
        "roles do not alternate: it begins with the assistant",
        {"chosen": [bot("hi"), *talk("q", "a")], "rejected": [bot("hi"), *talk("q", "b")]},
    ),
    (
        "roles do not alternate: a system message after the first one",
        {"chosen": [*talk("q", "a"), SYSTEM, *talk("r", "b")], "rejected": talk("q", "b")},
    ),
    (
        "last message not the assistant's",
        {"chosen": [*talk("q", "a"), user("r")], "rejected": talk("q", "b")},
    ),
    ("last message not the assistant's", {"chosen": talk("q", "a"), "rejected": []}),
    (
        "different prompts in the two branches",
        {"chosen": talk("q", "a"), "rejected": talk("r", "b")},
    ),
    (
        "different prompts in the two branches",
        {"chosen": talk("q", "a"), "rejected": talk("q", "a") + talk("r", "b")},
    ),
    ("not a Human/Assistant transcript", {"chosen": "yes", "rejected": "no"}),
    ("neither text nor a list of messages", {"prompt": "q", "chosen": 3, "rejected": "b"}),
    ("neither text nor a list of messages", {"chosen": ["q", "a"], "rejected": ["q", "b"]}),
    (
        "a message without a role",
        {"chosen": [user("q"), {"content": "a"}], "rejected": talk("q", "b")},
    ),
    ("tie", {**CHOICE, "choice": "tie"}),
    ("choice is not one of a, b, 0, 1, tie", {**CHOICE, "choice": "both"}),
    ("choice is not one of a, b, 0, 1, tie", {**CHOICE, "choice": None}),
    ("tie", {**EVAL, "preference": 1.5}),
    ("tie", {**EVAL, "preference": 0}),
    ("preference is not between 1 and 2", {**EVAL, "preference": 2.5}),
    ("preference is not between 1 and 2", {**EVAL, "preference": float("nan")}),
    ("preference is not a number", {**EVAL, "preference": "first"}),
    ("not valid Unicode (half a surrogate pair)", lists("q", "a \ud83d", "b")),
]


@pytest.mark.parametrize(("reason", "row"), BAD_ROWS, ids=[reason for reason, _ in BAD_ROWS])
def test_drop_reason(reason, row):
    with pytest.raises(Drop) as drop:
        audit_row(row)
    assert str(drop.value) == reason


@pytest.mark.parametrize("name", LAYOUTS)
def test_help_shows_each_layout_with_a_row_that_it_reads(name):
    shown = prep_data.describe()
    layout = LAYOUTS[name]
    assert f"{name}: {columns_text(layout)}\n" in shown
    about, example = inspect.getdoc(layout.read).split("\n\n")
    for line in [*about.splitlines(), *example.splitlines()]:
        assert f"      {line}\n" in shown
    row = json.loads(example)
    assert find_layout(row) == name
    (pair,) = audit_row(row, rule="best_worst" if name == "scored" else None)
    assert pair["prompt"] == [user("Hi")]
    assert pair["chosen"] == [bot("Hello!")] and pair["rejected"] == [bot("No.")]
