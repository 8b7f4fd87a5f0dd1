"""Layouts: a row of each, every reason to drop a row, and what --help shows."""

import inspect
import json
import string

import pytest
from preference_rows import audit_row, bot, lists, prepare, prepare_rows, talk, user, write_rows

import prep_data
from pref.files.audit import INVERTED
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
    "a system column that is a message": (
        {"system": [SYSTEM], "question": ASK, "chosen": "8,611 m.", "rejected": "High."},
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
    "Arena, the winner by name": (
        {
            "question": ASK,
            "response_a": "High.",
            "response_b": "8,611 m.",
            "winner": "gpt-x",
            "model_a": "llm-y",
            "model_b": "gpt-x",
        },
        [user(ASK)],
    ),
    "Arena": (
        {
            "conversation_a": talk(ASK, "High."),
            "conversation_b": talk(ASK, "8,611 m."),
            "winner": "model_b",
        },
        [user(ASK)],
    ),
    "Arena's votes": (
        {
            "prompt": json.dumps(["Hi.", ASK]),
            "response_a": json.dumps(["Hello!", "High."]),
            "response_b": json.dumps(["Hello!", "8,611 m."]),
            "winner_model_a": 0,
            "winner_model_b": 1,
        },
        None,  # the branches differ only in the last turn
    ),
    "OpenAI": (
        {
            "input": {"messages": [SYSTEM, user(ASK)], "tools": []},
            "preferred_output": [bot("8,611 m.")],
            "non_preferred_output": [bot("High.")],
        },
        [SYSTEM, user(ASK)],
    ),
    "axolotl": (
        {"messages": [user(ASK)], "chosen": bot("8,611 m."), "rejected": bot("High.")},
        [user(ASK)],
    ),
    "messages that end with the chosen response": (
        {"messages": talk(ASK, "8,611 m."), "chosen": "8,611 m.", "rejected": "High."},
        [user(ASK)],
    ),
    "ms-swift": (
        {"messages": [SYSTEM, *talk(ASK, "8,611 m.")], "rejected_response": "High."},
        [SYSTEM, user(ASK)],
    ),
    "ms-swift, messages": (
        {"messages": talk(ASK, "8,611 m."), "rejected_messages": talk(ASK, "High.")},
        [user(ASK)],
    ),
    "ms-swift, query": (
        {
            "query": ASK,
            "response": "8,611 m.",
            "rejected_response": "High.",
            "history": [["Hi.", "Hello!"]],
        },
        HH_PROMPT,
    ),
    "distilabel: input is the prompt": (
        {"system": "Be brief.", "input": ASK, "chosen": "8,611 m.", "rejected": "High."},
        [SYSTEM, user(ASK)],
    ),
    "argilla, NeMo": (
        {"prompt": ASK, "chosen_response": "8,611 m.", "rejected_response": "High."},
        [user(ASK)],
    ),
    "Stack Exchange": (
        {"question": ASK, "response_j": "8,611 m.", "response_k": "High."},
        [user(ASK)],
    ),
    "PKU-SafeRLHF": (
        {"prompt": ASK, "response_0": "High.", "response_1": "8,611 m.", "better_response_id": 1},
        [user(ASK)],
    ),
    "HelpSteer3": (
        {"context": HH_PROMPT, "response1": "8,611 m.", "response2": "High."}
        | {"overall_preference": -1},
        HH_PROMPT,
    ),
    "HelpSteer2": (
        {"prompt": ASK, "response_1": "High.", "response_2": "8,611 m."}
        | {"preference_strength": 3},
        [user(ASK)],
    ),
    "other names of the roles": (
        {
            "prompt": [
                {"role": "developer", "content": "Be brief."},
                {"from": "human", "value": ASK},
            ],
            "chosen": [{"role": "model", "content": "8,611 m."}],
            "rejected": [{"role": "Bot", "content": "High."}],
        },
        [SYSTEM, user(ASK)],
    ),
    "lists of one text, objects with a text": (
        {"prompt": [ASK], "chosen": {"text": "8,611 m."}, "rejected": ["High."]},
        [user(ASK)],
    ),
    "missing values as text": (
        {"instruction": ASK, "input": "nan", "system": "None", "tools": "nan", "history": "[]"}
        | {"chosen": "8,611 m.", "rejected": "High."},
        [user(ASK)],
    ),
    "text parts": (
        {
            "prompt": [user([{"type": "text", "text": ASK, "image": None}])],
            "chosen": [
                {"role": "assistant", "content": [{"type": "output_text", "text": "8,611 m."}]}
            ],
            "rejected": [bot("High.")],
        },
        [user(ASK)],
    ),
    "history, system_prompt": (
        {
            "system_prompt": "Be brief.",
            "instruction": ASK,
            "history": [["Hi.", "Hello!"]],
            "chosen": "8,611 m.",
            "rejected": "High.",
        },
        [SYSTEM, *HH_PROMPT],
    ),
    "HH without its leading lines": (
        {"prompt": HH.strip(), "chosen": "8,611 m.", "rejected": "High."},
        HH_PROMPT,
    ),
    "HH with single line ends": (
        {
            "chosen": f"Human: {ASK}\nAssistant: 8,611 m.",
            "rejected": f"Human: {ASK}\nAssistant: High.",
        },
        [user(ASK)],
    ),
    "HH with Windows' line ends": (
        {
            "chosen": (HH + "8,611 m.").replace("\n", "\r\n"),
            "rejected": (HH + "High.").replace("\n", "\r\n"),
        },
        HH_PROMPT,
    ),
    "HH, prompt apart and repeated": (
        {"prompt": HH, "chosen": HH + "8,611 m.", "rejected": HH + "High."},
        HH_PROMPT,
    ),
    "the conversation as text beside it": (
        {
            "prompt": f"user: Hi.\nassistant: Hello!\nuser: {ASK}",
            "chosen": [*HH_PROMPT, bot("8,611 m.")],
            "rejected": [*HH_PROMPT, bot("High.")],
        },
        HH_PROMPT,
    ),
    "lists as JSON text": (
        {
            "prompt": ASK,
            "chosen": json.dumps(talk(ASK, "8,611 m.")),
            "rejected": json.dumps(talk(ASK, "High.")),
        },
        [user(ASK)],
    ),
    "lists as Python writes them": (
        {"chosen": str(talk(ASK, "8,611 m.")), "rejected": str(talk(ASK, "High."))},
        [user(ASK)],
    ),
    "lists as NumPy prints them": (
        {
            "chosen": "[" + "\n ".join(map(str, talk(ASK, "8,611 m."))) + "]",
            "rejected": "[" + "\n ".join(map(str, talk(ASK, "High."))) + "]",
        },
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
    assert pair["prompt"] == (prompt or HH_PROMPT)
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
AB = {"chosen": "a", "rejected": "b"}
NONE = {"rejected": "None"}
VOTES = {"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1}
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
    ("preference is not a number", {**EVAL, "preference": float("nan")}),
    ("preference is not a number", {**EVAL, "preference": "first"}),
    ("preference is not a number", {**EVAL, "preference": 10**400}),
    ("tie", {**CHOICE, "choice": "tie (bothbad)"}),
    # The first or, counted from 0, the second one?
    ("choice is not one of a, b, 0, 1, tie", {**CHOICE, "choice": "output_1"}),
    ("tie", {"prompt": "q", "response1": "a", "response2": "b", "overall_preference": 0}),
    ("tie", {"prompt": "q", "response_a": "a", "response_b": "b"} | VOTES),
    (
        "tie",
        {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 3, "score_rejected": 3},
    ),
    ("tie", {"prompt": "q", "margin": 0.0} | AB),
    (f"{INVERTED} (margin)", {"prompt": "q", "margin": -1} | AB),
    (f"{INVERTED} (scores)", {"prompt": "q", "scores": {"chosen": 1, "rejected": 2}} | AB),
    (
        f"{INVERTED} (chosen_rank, rejected_rank)",
        {"prompt": "q", "chosen_rank": 3, "rejected_rank": 2} | AB,
    ),
    (
        f"{INVERTED} (chosen.score)",
        {
            "prompt": "q",
            "chosen": {"text": "a", "score": 1},
            "rejected": {"text": "b", "score": 2},
        },
    ),
    ("rejected is a missing value written as text", {"prompt": "q", "chosen": "a"} | NONE),
    (
        "a response of several messages: only single ones can be trained",
        {"prompt": "q", "chosen": [bot("a"), bot("b")], "rejected": "c"},
    ),
    ("tie", {"prompt": "q", "chosen": "a", "rejected": "b", "status": "tie"}),
    (
        "tie",
        {
            "prompt": "q",
            "chosen": "a",
            "rejected": "b",
            "generations": ["b", "a"],
            "rating": [5, 5],
        },
    ),
    (
        "the scores say that the rejected response is better (chosen-rating, rejected-rating)",
        {
            "prompt": "q",
            "chosen": "a",
            "rejected": "b",
            "chosen-rating": "1",
            "rejected-rating": "2",
        },
    ),
    (
        "overall_preference is not between -3 and 3",
        {"prompt": "q", "response1": "a", "response2": "b", "overall_preference": 5},
    ),
    ("empty chosen", lists("q", "\u200b\ufeff", "b")),
    ("chosen == rejected", lists("q", "a\u200b", "a")),
    ("chosen == rejected", lists("q", "e\u0301", "\u00e9")),
    ("a NUL character in a text", lists("q", "a\0a", "b")),
    ("unknown role 'critic'", {"prompt": [{"role": "critic", "content": "q"}]} | AB),
    ("roles do not alternate: no user message", {"prompt": [SYSTEM]} | AB),
    ("roles do not alternate: the prompt ends with the assistant", {"prompt": talk("q", "x")} | AB),
    (
        "the prompt column has a system message that the conversation lacks",
        {"prompt": [SYSTEM, user("q")], **lists("q", "a", "b")},
    ),
    ("the prompt column differs from the conversation", {"prompt": "p", **lists("q", "a", "b")}),
    # The conversation lacks what comes before the question.
    (
        "the prompt column differs from the conversation",
        {"prompt": "It is made of stone.\n\nOf what?", **lists("Of what?", "Stone.", "Sand.")},
    ),
    (
        "the system column differs from the conversation's system message",
        {
            "system": "Be long.",
            "chosen": [SYSTEM, *talk("q", "a")],
            "rejected": [SYSTEM, *talk("q", "b")],
        },
    ),
    ("has images: only text can be trained", {"prompt": "q", "images": ["a.png"]} | AB),
    (
        "has a placeholder of a picture or sound: only text can be trained",
        {"prompt": "<image>\nWhat is this?"} | AB,
    ),
    (
        "has a part of type 'image_url': only text can be trained",
        {"prompt": [{"role": "user", "content": [{"type": "image_url"}]}]} | AB,
    ),
    (
        "has a part of type 'input_audio': only text can be trained",
        {"prompt": "q", "chosen": [{"role": "assistant", "content": [{"type": "input_audio"}]}]}
        | {"rejected": "b"},
    ),
    (
        "a list of messages as text that cannot be parsed (cut off?)",
        {"prompt": "q", "chosen": json.dumps(talk("q", "a"))[:-5], "rejected": "b"},
    ),
    ("instruction and input are not both text", {"instruction": "q", "input": ["x"]} | AB),
    ("history is not a list of [question, answer]", {"prompt": "q", "history": [["x"]]} | AB),
    ("tools are not a list of schemas", {"prompt": "q", "tools": "a calculator"} | AB),
    (
        "a tool call without a name, or whose arguments are not an object",
        {"prompt": "q", "chosen": [bot("") | {"tool_calls": [{"name": "f", "arguments": "3"}]}]}
        | {"rejected": "b"},
    ),
    (
        "roles do not alternate: tool calls, and then the user instead of a tool",
        {"prompt": [user("q"), bot("") | {"tool_calls": [{"name": "f"}]}, user("r")]} | AB,
    ),
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


# ---- tools and thoughts --------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "height", "arguments": {"of": "K2"}}}
AS_TEXT = {"name": "height", "arguments": '{"of": "K2"}'}
SCHEMA = {"type": "function", "function": {"name": "height", "parameters": {"type": "object"}}}


def tool(text):
    return {"role": "tool", "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {
            "prompt": [
                user("q"),
                bot(None) | {"tool_calls": [CALL]},
                {"role": "tool", "content": "9"},
            ],
            "tools": [SCHEMA],
        },
        {
            "prompt": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "height", "arguments": {"of": "K2"}}'},
                {"from": "observation", "value": "9"},
            ],
            "tools": json.dumps([SCHEMA["function"]]),
        },
        {
            "prompt": [
                user("q"),
                # OpenAI's arguments are text; a table has every key in every row.
                bot("")
                | {
                    "tool_calls": [
                        CALL | {"function": {"name": "height", "arguments": '{"of": "K2"}'}}
                    ]
                },
                {"role": "function", "content": "9"},
            ],
            "tools": [SCHEMA | {"function": SCHEMA["function"] | {"strict": None}}],
        },
    ],
)
def test_tools_and_calls_are_kept_as_templates_take_them(row):
    (pair,) = audit_row(row | {"chosen": "a", "rejected": "b"})
    assert pair["prompt"] == [
        user("q"),
        bot("") | {"tool_calls": [CALL]},
        tool("9"),
    ]
    assert pair["tools"] == [SCHEMA]


def test_a_response_may_be_a_call_and_the_tools_are_part_of_the_id():
    row = {"prompt": "q", "chosen": [bot(None) | {"tool_calls": [CALL]}], "rejected": "b"}
    (pair,) = audit_row(row)
    assert pair["chosen"] == [bot("") | {"tool_calls": [CALL]}] and "tools" not in pair
    (other,) = audit_row(row | {"tools": [SCHEMA]})
    assert other["id"] != pair["id"]
    openai = {
        "input": {"messages": [user("q")], "tools": [SCHEMA]},
        "preferred_output": row["chosen"],
        "non_preferred_output": [bot("b")],
    }
    assert audit_row(openai)[0]["id"] == other["id"]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_before_the_answer_are_kept(key):
    chosen, rejected = bot("9") | {key: "Count."}, bot("9") | {key: "Guess."}
    (pair,) = audit_row({"prompt": "q", "chosen": [chosen], "rejected": [rejected]})
    assert pair["chosen"] == [bot("9") | {"reasoning_content": "Count."}]
    assert pair["rejected"] == [bot("9") | {"reasoning_content": "Guess."}]
