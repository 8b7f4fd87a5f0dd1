"""Preference data as strangers write it: nothing is read the wrong way round without a word."""

import gzip
import time

import pytest
from preference_rows import audit_row, bot, lists, prepare, prepare_rows, user, write_rows

from pref.files.console import UserError
from pref.files.control_tokens import find_carried, strip_template
from pref.files.layouts import unknown_layout
from pref.files.messages import Drop, as_messages, parse_transcript
from pref.files.rankings import as_number, is_rank
from pref.files.tables import read_splits


def contents(pair):
    return pair["chosen"][0]["content"], pair["rejected"][0]["content"]


# ---- which response is better --------------------------------------------------------------------

RANKED = {"prompt": "q", "responses": ["mid", "best", "worst"]}


@pytest.mark.parametrize(
    "more",
    [
        {"scores": [3, 5, 1], "ranks": [2, 1, 3]},  # ranks beside scores do not reverse these
        {"scores": None, "ratings": [3, 5, 1]},  # a table's empty column
        {"scores": ["3,5", "10,0", "1,25"]},
        {"ranks": [2, 1, 3]},
    ],
)
def test_the_scores_that_a_row_has(more):
    (pair,) = audit_row(RANKED | more, "best_worst")
    assert contents(pair) == ("best", "worst")


def test_a_list_of_numbers_called_ranking_is_refused(tmp_path):
    rows = [RANKED | {"prompt": f"q{i}", "ranking": [2, 0, 1]} for i in range(4)]
    with pytest.raises(UserError, match=r"source\.jsonl:1: a list `ranking` may hold .*ranks=rank"):
        prepare_rows(tmp_path, rows, "--rule", "best_worst")
    more = ("--rule", "best_worst", "--columns", "ranks=ranking")
    train = prepare_rows(tmp_path, rows, *more)[0]
    assert {contents(pair) for pair in train} == {("best", "mid")}


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("chosen_rank", True),
        ("chosenRank", True),
        ("ranking_chosen", True),
        ("chosen_reranker_score", False),
        ("rank_score", False),
        ("score_rank", True),
    ],
)
def test_lower_is_better_of_ranks_alone(name, is_one):
    assert is_rank(name) is is_one


@pytest.mark.parametrize(
    ("text", "number"),
    [("8,5", 8.5), ("-1,0", -1), ("1,250", None), ("1,5,2", None), ("8.5", 8.5), ("x", None)],
)
def test_decimal_commas(text, number):
    assert as_number(text) == number


@pytest.mark.parametrize(
    "names",
    [
        ("score_chosen", "score_rejected"),
        ("chosen_quality", "rejected_quality"),
        ("win_rate_chosen", "win_rate_rejected"),
    ],
)
def test_scores_with_decimal_commas_and_other_names_are_compared(tmp_path, names):
    head = f"prompt;chosen;rejected;{names[0]};{names[1]}\n"
    text = head + "".join(f"q{i};G;B;1,5;{i},5\n" for i in range(3))
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(UserError, match=f"in 1 of 3 rows with scores .*{names[0]}"):
        prepare(tmp_path / "x.csv", tmp_path / "out")


SHP = [
    {"history": f"How old is planet {i}?", "human_ref_A": "Old.", "human_ref_B": "Quite old."}
    | {"labels": 1 - i % 2, "score_A": (9, 2)[i % 2], "score_B": (3, 8)[i % 2]}
    for i in range(6)
]


def test_scores_of_a_and_b_show_that_a_label_counts_the_other_way_round(tmp_path):
    """In SHP, 1 means A."""
    names = "prompt=history,choice=labels,completion_{}=human_ref_A,completion_{}=human_ref_B"
    message = r"6 of 6 rows with scores .*\(score_B, score_A\).* `choice` counts the other way"
    with pytest.raises(UserError, match=message):
        prepare_rows(tmp_path, SHP, "--columns", names.format("a", "b"))
    ignored = ("--ignore_columns", "score_A,score_B")
    train, val, _, _ = prepare_rows(tmp_path, SHP, "--columns", names.format("b", "a"), *ignored)
    expected = {f"How old is planet {i}?": ("Old.", "Quite old.")[i % 2] for i in range(6)}
    found = {pair["prompt"][0]["content"]: contents(pair)[0] for pair in train + val}
    assert found == expected


def test_scores_of_two_conversations_are_compared(tmp_path):
    rows = [
        {f"conversation_{side}": [user(f"q{i}"), bot(side)] for side in "ab"}
        | {"winner": "model_a", "score_a": 1, "score_b": 9}
        for i in range(4)
    ]
    with pytest.raises(UserError, match=r"4 of 4 rows with scores .*\(score_a, score_b\)"):
        prepare_rows(tmp_path, rows)


@pytest.mark.parametrize("labels", [[-1, 1], [0.9, 0.1], [0, 0.5, 1]])
def test_numbers_of_another_meaning_refuse_the_file(tmp_path, labels):
    rows = [
        {"prompt": f"q{i}", "response_a": "x", "response_b": "y"}
        | {"preference": labels[i % len(labels)]}
        for i in range(6)
    ]
    with pytest.raises(UserError, match="this file may count otherwise"):
        prepare_rows(tmp_path, rows)


def test_an_empty_cell_does_not_fall_back_to_the_column_that_it_replaces(tmp_path):
    rows = [
        {"prompt": f"q{i}", "response_0": "x", "response_1": "y", "better_response_id": 0}
        | {"safer_response_id": None if i == 1 else 1}
        for i in range(4)
    ]
    more = ("--columns", "better_response_id=safer_response_id")
    train, val, dropped, _ = prepare_rows(tmp_path, rows, *more)
    assert {contents(pair) for pair in train + val} == {("y", "x")}
    assert [d["reason"] for d in dropped] == ["better_response_id is not 0 or 1"]


def test_responses_that_nothing_reads_are_content(tmp_path):
    rows = [
        {"prompt": f"q{i}", "chosen": "response_1", "rejected": "response_0"}
        | {"response_0": "No.", "response_1": "Yes."}
        for i in range(4)
    ]
    with pytest.raises(UserError, match="response_0: 4 rows"):
        prepare_rows(tmp_path, rows)


# ---- shapes --------------------------------------------------------------------------------------


def test_geminis_and_coheres_messages():
    parts = {"role": "model", "parts": [{"text": "Hi."}]}
    assert as_messages(parts, "user") == [bot("Hi.")]
    assert as_messages([{"role": "User", "message": "Hi."}], "user") == [user("Hi.")]
    row = {"contents": [{"role": "user", "parts": [{"text": "q"}]}]} | {
        "completions": [
            {"score": score, "completion": {"role": "model", "parts": [{"text": text}]}}
            for score, text in ((0.0, "B"), (1.0, "G"))
        ]
    }
    (pair,) = audit_row(row, "best_worst")
    assert pair["prompt"] == [user("q")] and contents(pair) == ("G", "B")


def test_a_message_whose_text_is_under_no_known_key_is_not_empty():
    with pytest.raises(Drop, match=r"without content \(its keys: role, utterance\)"):
        as_messages([{"role": "user", "utterance": "Hi."}], "user")


@pytest.mark.parametrize("answer", ['{"content": "x"}', '[{"value": 3}]', '{"text": ["role"]}'])
def test_an_answer_in_json_is_a_text(answer):
    (pair,) = audit_row({"prompt": "q", "chosen": answer, "rejected": "b"})
    assert contents(pair) == (answer, "b")


def test_texts_that_numpy_prints_are_not_joined():
    texts = {"prompt": "['Hi.'\n 'And?']", "response_a": "['a' 'b']", "response_b": "['c' 'd']"}
    with pytest.raises(Drop, match="not lists of the same number"):
        audit_row(texts | {"winner_model_a": 1, "winner_model_b": 0})
    commas = {name: text.replace("' '", "', '") for name, text in texts.items()}
    commas |= {"prompt": """['Say "a" "b".', 'And?']""", "winner_model_a": 1, "winner_model_b": 0}
    with pytest.raises(Drop, match="different prompts"):  # read, as two turns each
        audit_row(commas)


def test_a_response_that_goes_on_with_the_user_is_named_so():
    turns = [bot("a"), user("more"), bot("c")]
    with pytest.raises(Drop, match="a response of several messages"):
        audit_row({"prompt": [user("q")], "chosen": turns, "rejected": [bot("b")]})


def test_an_empty_last_message_is_an_empty_prompt():
    with pytest.raises(Drop, match="empty prompt"):
        audit_row({"prompt": [user("q"), bot("a"), user(" ")], "chosen": "a", "rejected": "b"})


def test_a_column_that_calls_rows_held_out_is_named(tmp_path):
    rows = [lists(f"q{i}", "a", "b", split=("train", "test")[i % 2]) for i in range(4)]
    notes = prepare_rows(tmp_path, rows)[3]["notes"]
    place = tmp_path / "source.jsonl"
    assert notes == [
        f"rows that the column split calls held out, used like all others: 2 (first: {place}:2)"
    ]


@pytest.mark.parametrize(
    ("columns", "is_said"),
    [
        ("prompt response helpfulness correctness", True),  # HelpSteer2, a response a row
        ("messages", True),
        ("instruction input output", True),
        ("question answer_0 answer_1 score_0 score_1", False),
        ("prompt accepted rejected", False),
    ],
)
def test_one_response_in_a_row_is_said(columns, is_said):
    assert ("one response only" in str(unknown_layout(columns.split(), "x:1"))) is is_said


def test_columns_reach_into_lists(tmp_path):
    rows = [
        {"info": {"post": f"q{i}"}, "summaries": [{"text": "x"}, {"text": "y"}], "choice": i % 2}
        for i in range(4)
    ]
    names = "prompt=info.post,completion_a=summaries.0.text,completion_b=summaries.1.text"
    train, val, _, _ = prepare_rows(tmp_path, rows, "--columns", names)
    found = {pair["prompt"][0]["content"]: contents(pair) for pair in train + val}
    assert found == {f"q{i}": (("y", "x") if i % 2 else ("x", "y")) for i in range(4)}


# ---- templates -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "<|prompter|>Hi<|endoftext|><|assistant|>",
        "<|im_user|>user<|im_middle|>Hi<|im_end|><|im_assistant|>assistant<|im_middle|>",
        "<extra_id_0>System\nBe kind.\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n",
        "<reserved_106>Hi<reserved_107>",
        "[|user|]Hi\n[|assistant|]",
        "<seed:bos>user\nHi<seed:eos><seed:bos>assistant\n",
        "<｜hy_User｜>Hi<｜hy_Assistant｜>",
        "<beginning_of_sentence>user name=u\nHi<end_of_sentence>\n",
        "<|startoftext|><|bom|><|user|> Hi<|eom|><|bom|><|assistant|>",
        "GPT4 Correct User: Hi<|end_of_turn|>GPT4 Correct Assistant:",
        "Hello!<|assistant_end|>",
    ],
)
def test_forms_of_other_families_are_refused_and_not_half_undone(text):
    assert find_carried(text)
    with pytest.raises(Drop, match="no known form"):
        strip_template(text)


@pytest.mark.parametrize(
    "text",
    [
        "<|vision_start|> is what?",
        "It ends with the token <|vision_end|>",
        "Arrays: let a = [|foo|]",
        "[|1; 2|] is an array. Sum it.",
        "if a <| b then c |> d",
        "`<|abc|>`",
    ],
)
def test_what_only_looks_like_a_token(text):
    assert find_carried(text) is None


def test_phi_4_and_glm_are_undone():
    phi = "<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>"
    assert strip_template(phi) == [user("Hi")]
    assert strip_template("[gMASK]<sop><|user|>\nHi<|assistant|>\nYes.<|user|>") == [
        user("Hi"),
        bot("Yes."),
    ]
    assert find_carried("Yes.<|user|>") and strip_template("Yes.<|user|>") == "Yes."


def test_long_texts_take_no_long_time():
    start = time.perf_counter()
    gap = "\n" * 20_000
    assert len(parse_transcript(f"\n\nHuman: a{gap}b\n\nAssistant: c")) == 2
    assert find_carried("x [/INST] y " * 20_000) is None
    assert strip_template(f"a{gap}b</s>") == f"a{gap}b"
    assert time.perf_counter() - start < 3  # 15 s and more, when the time grew with the square


# ---- files ---------------------------------------------------------------------------------------

ROW = b'{"prompt": "q", "chosen": "a", "rejected": "b"}'


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "x.jsonl",
            gzip.compress(ROW, mtime=0),
            "a gzip file, which the name does not say; add .gz",
        ),
        ("x.json", b"PAR1....", "a Parquet file, which the name does not say; rename it"),
        ("x.csv", b"PK\3\4....", "a ZIP archive or an Excel file"),
        ("x.csv", ROW, "JSON, which the name does not say; rename it"),
        ("x.csv", "prompt,chosen".encode("utf-16-le"), "UTF-16 text; save it as UTF-8"),
        ("x.jsonl", ROW.decode().encode("utf-16-le"), "UTF-16 text; save it as UTF-8"),
        ("x.xlsx", b"PK", r"not a \.json.*; save the sheet as CSV"),
        ("x.pkl", b"\x80", r"pickles run code"),
        ("x.jsonl.zst", b"\x28\xb5\x2f\xfd", "unzstd"),
        ("x.jsonl", b'{"x": ' + b"[" * 10**5, "x.jsonl:1: .*brackets within brackets"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        list(read_splits(tmp_path / name)["train"])


@pytest.mark.parametrize(
    ("name", "data", "places"),
    [
        ("x.csv", b"sep=;\r\nprompt;chosen;rejected\r\nq;a;b\r\n", ["x.csv:3"]),
        ("x.csv", b"\xef\xbb\xbfsep=,\nprompt,chosen,rejected\nq,a,b\n", ["x.csv:3"]),
        ("x.csv", b"prompt,chosen,rejected,,\nq,a,b,,\n", ["x.csv:2"]),
        ("x.jsonl", ROW + ROW, ["x.jsonl:1", "x.jsonl:1"]),
    ],
)
def test_what_spreadsheets_and_scripts_add(tmp_path, name, data, places):
    (tmp_path / name).write_bytes(data)
    found = list(read_splits(tmp_path / name)["train"])
    assert [place for place, _ in found] == [str(tmp_path / place) for place in places]
    for _, row in found:
        assert (row["prompt"], row["chosen"], row["rejected"]) == ("q", "a", "b")


def test_a_date_that_python_cannot_hold(tmp_path):
    import pyarrow
    import pyarrow.parquet

    late = pyarrow.array([9 * 10**17], type=pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": ["q"], "day": late}), tmp_path / "x.parquet"
    )
    with pytest.raises(UserError, match=r"x\.parquet\[0\] or below: a value that cannot be read"):
        list(read_splits(tmp_path / "x.parquet")["train"])


def test_a_file_that_is_held_out_by_its_name_is_not_trained_on(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    write_rows(folder / "part.jsonl", [lists(f"q{i}", "a", "b") for i in range(3)])
    write_rows(folder / "my-heldout.jsonl", [lists("z", "a", "b")])
    with pytest.raises(UserError, match="--split train=part,val=my-heldout"):
        prepare(folder, tmp_path / "out")
    train, val, _, _ = prepare(folder, tmp_path / "out", "--split", "train=part,val=my-heldout")
    assert len(train) == 3 and [pair["prompt"] for pair in val] == [[user("z")]]


def test_a_prompt_that_looks_the_same_is_not_on_both_sides(tmp_path):
    train = ["caf\u00e9 or tea?", "x?", "y?"]
    rows = {"train": train, "test": ["cafe\u0301 or tea?", "x?\u200b"]}
    folder = tmp_path / "mine"
    folder.mkdir()
    for split, prompts in rows.items():
        write_rows(folder / f"{split}.jsonl", [lists(text, "a", "b") for text in prompts])
    train, val, dropped, _ = prepare(folder, tmp_path / "out")
    assert [pair["prompt"][0]["content"] for pair in train] == ["y?"] and len(val) == 2
    assert [d["reason"] for d in dropped] == ["prompt also in validation"] * 2
