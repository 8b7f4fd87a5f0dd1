"""Columns: which are used, under which name, and that none of content is lost without a word."""

import pytest
from preference_rows import bot, lists, prepare_rows, user

from pref.files.columns import CONTENT, METADATA, kind_of
from pref.files.console import UserError


def rows(count=4, **more):
    return [
        {"prompt": f"Ask {i}?", "chosen": f"Good {i}.", "rejected": f"Bad {i}."}
        | {key: value.format(i) if isinstance(value, str) else value for key, value in more.items()}
        for i in range(count)
    ]


def ignored(manifest):
    return {name: item["why"] for name, item in manifest["ignored_columns"].items()}


LONG = "a text that is longer than what a label would be, and has many words in it " * 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt_id", "f0-11"),
        ("url", "https://example.org/a?b=c d"),
        ("chosen_model", "gpt-x"),
        ("created_at", "2024-05-01 10:00:00"),
        ("score", 0.5),
        ("tags", ["maths", "school"]),
        ("language", "English"),
        ("metadata", {"about": LONG}),
        ("rationale", LONG),
        ("annotator_notes", LONG),
        ("is_safe", True),
        ("response_0_sha256", "ab" * 32),
        ("response_0_harm_category", {"weapons": False}),
        ("note", "x"),
        ("topic", "the history of the Alps"),
    ],
)
def test_metadata(name, value):
    assert kind_of(name, value) == METADATA


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("context", "It is made of stone."),
        ("documents", ["Stone.", "Sand."]),
        ("persona", "a pirate"),
        ("source_text", "Stone"),
        ("source", LONG),
        ("hint", "Count."),
        ("turns", [user("q"), bot("a")]),
        ("extra", "a text of unknown purpose"),
        ("blob", {"bytes": b"\x89PNG"}),
        ("picture", object()),
        ("beschreibung", "一段没有空格的很长的中文说明文字"),
    ],
)
def test_content(name, value):
    assert kind_of(name, value) == CONTENT


def test_content_that_nothing_uses_is_an_error_with_the_remedy(tmp_path):
    source = rows(context="Planet {} is made of stone.")
    with pytest.raises(UserError) as error:
        prepare_rows(tmp_path, source)
    text = str(error.value)
    assert f"context: 4 rows, first {tmp_path / 'source.jsonl'}:1: Planet 0 is made" in text
    assert "--ignore_columns context" in text
    remedy = "instruction=prompt,input=context"
    assert f"--columns {remedy}" in text and not (tmp_path / "out").exists()

    train, _, _, manifest = prepare_rows(tmp_path, source, "--columns", remedy)
    assert train[0]["prompt"] == [user("Ask 0?\n\nPlanet 0 is made of stone.")]
    assert manifest["columns"] == {"instruction": "prompt", "input": "context"}
    train, _, _, manifest = prepare_rows(tmp_path, source, "--ignore_columns", "context")
    assert manifest["ignored_columns"] == {"context": {"rows": 4, "why": "--ignore_columns"}}
    notes = prepare_rows(tmp_path, source, "--ignore_columns", "context,contxt")[3]["notes"]
    assert notes == ["--ignore_columns contxt: no pair's row has it"]


def test_one_row_with_content_is_enough(tmp_path):
    source = rows(6)
    source[4]["context"] = "Planet 4 is made of stone."
    with pytest.raises(UserError, match=r"context: 1 row, first .*source\.jsonl:5"):
        prepare_rows(tmp_path, source)


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"question": "What else do you see there?"}, "question"),  # beside `prompt`
        ({"system": "Be brief.", "system_prompt": "Be a pirate."}, "system_prompt"),
        ({"input": "And this."}, "input"),  # beside a prompt that is not an instruction
    ],
)
def test_a_second_column_of_one_kind_is_not_lost(tmp_path, more, name):
    with pytest.raises(UserError, match=f"content:\n  {name}: 4 rows"):
        prepare_rows(tmp_path, rows(**more))


def test_keys_inside_messages_are_not_lost(tmp_path):
    source = [
        {"prompt": [user(f"q{i}") | {"weight": 1, "aside": "Say it in a friendly way."}]}
        | {"chosen": "a", "rejected": "b"}
        for i in range(4)
    ]
    with pytest.raises(UserError, match=r"message\.aside: 4 rows"):
        prepare_rows(tmp_path, source)
    manifest = prepare_rows(tmp_path, source, "--ignore_columns", "message.aside")[3]
    assert ignored(manifest) == {"message.weight": "metadata", "message.aside": "--ignore_columns"}


def test_what_repeats_the_pair_is_named_and_not_missed(tmp_path, capsys):
    source = [
        lists(
            f"Ask {i}?",
            f"Good {i}.",
            f"Bad {i}.",
            messages=[user(f"Ask {i}?"), bot(f"Good {i}.")],
            all_generated_responses=[
                f"Bad {i}.",
                "Quite another answer that nobody took.",
                f"Good {i}.",
            ],
            prompt_id=str(i),
        )
        | {"prompt": f"Ask {i}?"}
        for i in range(4)
    ]
    manifest = prepare_rows(tmp_path, source)[3]
    why = {"messages": "repeated", "all_generated_responses": "pool", "prompt_id": "metadata"}
    assert ignored(manifest) == why
    shown = capsys.readouterr().out
    assert "columns  not used, metadata: prompt_id (4 rows)\n" in shown
    assert "not used, repeat what the pairs have: messages (4 rows)\n" in shown


def test_one_short_text_names_where_a_row_comes_from(tmp_path):
    train, _, _, manifest = prepare_rows(tmp_path, rows(dataset="koala", source="web"))
    assert {p["source"] for p in train} == {"koala"} and ignored(manifest) == {"source": "metadata"}
    train, _, _, manifest = prepare_rows(tmp_path, rows(source=["a", "b"]))
    assert {p["source"] for p in train} == {"source"}  # the file's name
    assert ignored(manifest) == {"source": "metadata"}
    with pytest.raises(UserError, match="source: 4 rows"):
        prepare_rows(tmp_path, rows(source=LONG))


def test_a_context_that_the_answer_quotes_is_not_repeated(tmp_path):
    source = rows(context="Good {}.")
    source = [row | {"chosen": f"It says: {row['context']}"} for row in source]
    with pytest.raises(UserError, match="context: 4 rows"):
        prepare_rows(tmp_path, source)


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ("prompt=ask,chosen=good,rejected=bad", {"ask": "Ask?", "good": "G", "bad": "B"}),
        (
            "prompt=x.ask,chosen=x.good,rejected=x.bad",
            {"x": {"ask": "Ask?", "good": "G", "bad": "B"}},
        ),
        ("chosen=rejected,rejected=chosen", {"prompt": "Ask?", "chosen": "B", "rejected": "G"}),
        ("prompt=question", {"prompt": "p", "question": "Ask?", "chosen": "G", "rejected": "B"}),
        ("", {"Prompt": "Ask?", " chosen": "G", "REJECTED": "B"}),
    ],
)
def test_columns_by_another_name(tmp_path, columns, row):
    second = {k: v | {"ask": "Else?"} if isinstance(v, dict) else v for k, v in row.items()}
    second = {k: "Else?" if v == "Ask?" else v for k, v in second.items()}
    train, val, _, manifest = prepare_rows(tmp_path, [row, second], "--columns", columns)
    assert {p["prompt"][0]["content"] for p in train + val} == {"Ask?", "Else?"}
    assert all((p["chosen"], p["rejected"]) == ([bot("G")], [bot("B")]) for p in train + val)
    if columns == "prompt=question":
        assert ignored(manifest) == {"prompt": "replaced by --columns"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--columns", "prompt=asks"], "no 'asks' among prompt, chosen, rejected"),
        (["--columns", "promt=prompt"], "no layout has a column 'promt'"),
        (["--columns", "prompt"], "expected NAME=NAME"),
        (["--rule", "all"], "--rule is for rows with several scored responses"),
        (["--min_margin", "1"], "no row has scores"),
        (["--min_margin", "-1"], "must be above 0"),
        (["--split", "val=test"], "expected train=NAME"),
        (["--split", "train=train,val=train"], "a split is named twice"),
        (["--split", "train=left"], "has no split 'left'; it has train"),
    ],
)
def test_arguments_that_cannot_work(tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        prepare_rows(tmp_path, rows(), *more)


def test_two_columns_of_nearly_one_name_are_kept_apart(tmp_path):
    texts = [("Of what is it made?", "How high is it?"), ("And how old is it?", "How far is it?")]
    answers = {"chosen": "G", "rejected": "B"}
    source = [{"PROMPT": first, "Prompt": second, **answers} for first, second in texts]
    with pytest.raises(UserError, match="not a Human/Assistant transcript"):
        prepare_rows(tmp_path, source)
    more = ("--columns", "prompt=Prompt", "--ignore_columns", "PROMPT")
    train, val, _, _ = prepare_rows(tmp_path, source, *more)
    asked = {pair["prompt"][0]["content"] for pair in train + val}
    assert asked == {"How high is it?", "How far is it?"}


def test_a_column_without_a_name_is_no_system_message(tmp_path):
    """pandas writes the index of a table so."""
    train = prepare_rows(tmp_path, [{"": str(i), **row} for i, row in enumerate(rows())])[0]
    assert [m["role"] for m in train[0]["prompt"]] == ["user"]
