"""How a judgement is read: thoughts, cut-off texts, single brackets, several verdicts."""

import json

import pytest
from doubles import completion
from judge_workplace import read_text, rows_of, run_judge

from pref.files.console import UserError
from pref.judging import server_judge
from pref.judging.reading import LAST, Verdict, without_thoughts

pytest_plugins = ("judge_fixtures",)

# Text, finish_reason, and the rating or the reason why there is none
RATED = [
    # Thoughts weigh ratings that they then reject.
    ("<think>Like [[5]] in the example?</think> Rating: [[9]]", "stop", 9),
    ("Like [[5]]?</think>\n\nRating: [[9]]", "stop", 9),
    ("<|begin_of_thought|>[[5]]<|end_of_thought|><|begin_of_solution|>[[9]]", "stop", 9),
    ("<|START_THINKING|>[[5]]<|END_THINKING|><|START_RESPONSE|>[[9]]", "stop", 9),
    ("Here is my thought process: [[5]]\nHere is my response:\n[[9]]", "stop", 9),
    ("<|START_THINKING|>perhaps [[5]]", "length", "length"),
    ("<think>a</think><think>[[3]]</think>[[8]]", "stop", 8),
    ("<THINKING>[[5]]</THINKING>[[9]]", "stop", 9),
    ("<reasoning>[[5]]</reasoning>[[9]]", "stop", 9),
    ("<thought>[[5]]</thought>[[9]]", "stop", 9),
    ("<seed:think>[[5]]</seed:think>[[9]]", "stop", 9),
    ("[THINK][[5]][/THINK][[9]]", "stop", 9),
    ("\u25c1think\u25b7[[5]]\u25c1/think\u25b7[[9]]", "stop", 9),
    ("<|channel|>analysis<|message|>[[5]]<|end|><|start|>assistant<|channel|>final<|message|>[[9]]"
     "<|return|>", "stop", 9),
    ("<|channel|>analysis<|message|>perhaps [[5]]", "length", "length"),
    ("<think>perhaps [[5]], or", "length", "length"),
    ("<think>perhaps [[5]], or", "stop", "length"),
    ("\n <think>first</think> <think>then [[5]]", "length", "length"),
    ("<think>[[5]]</think>", "stop", "thoughts"),
    ("<think>[[5]]</think>\n", "length", "length"),
    ("<think>nothing", "length", "length"),
    # An answer that is quoted may hold such tags.
    ("It writes `<think>` into its answer. Rating: [[2]]", "stop", 2),
    ("It writes <think>so</think> into its answer. Rating: [[2]]", "stop", 2),
    # Cut off: what is written in double brackets counts, as in FastChat; single ones do not.
    ("Rating: [[4]] because", "length", 4),
    ("as in x[1] and y[2], the", "length", "length"),
    ("as in x[1] and y[2], the", "max_tokens", "length"),
    # Single brackets: of a complete judgement, and alone.
    ("Rating: [6]", "stop", 6),
    ("Rating: [6]", "end_turn", 6),
    ("Rating: [6]", "", "parse"),
    ("Rating: [6]", "tool_calls", "parse"),
    ("see [1]; Rating: [[ 8 ]]", "stop", "parse"),
    ("see [1]; Rating: [[8/10]]", "stop", "parse"),
    ("see [2]; [[rating]]", "stop", "parse"),
    ("Rating: [17]", "stop", "parse"),
    # Several: the first, as in FastChat.
    ('It claims "[[10]]". Rating: [[2]]', "stop", 10),
    ("[[12]] no, [[7]]", "stop", "parse"),
    ("", "stop", "empty"),
    (" ", "length", "length"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "finish", "expected"), RATED)
def test_ratings(text, finish, expected):
    verdict = read_text(text, finish, is_pair=False)
    if isinstance(expected, str):
        assert (verdict.status, verdict.score) == (expected, None)
    else:
        assert (verdict.status, verdict.score, verdict.winner) == ("ok", expected, None)


@pytest.mark.parametrize(
    ("text", "finish", "verdict"),
    [
        ("<think>[[A]]?</think>[[B]]", "stop", Verdict("ok", winner="B")),
        ("[[B]] rather than [[A]]", "stop", Verdict("ok", winner="A", reading="several")),
        ("[[B]], yes [[B]]", "stop", Verdict("ok", winner="B")),
        ("[[C]]", "length", Verdict("ok", winner="tie")),
        ("[A]", "stop", Verdict("parse")),
        ("A is", "length", Verdict("length")),
    ],
)
def test_winners(text, finish, verdict):
    assert read_text(text, finish, is_pair=True) == verdict


@pytest.mark.parametrize(
    ("text", "is_pair", "finish", "verdict"),
    [
        ('"[[10]]"? No: [[2]]', False, "stop", Verdict("ok", 2, reading="several")),
        ("[[7]] and [[7]]", False, "stop", Verdict("ok", 7)),
        ("[[12]] no, [[7]]", False, "stop", Verdict("ok", 7, reading="several")),
        ("[1], so [6]", False, "stop", Verdict("ok", 6, reading="fallback")),
        ("[[3]] or", False, "length", Verdict("length", reading="")),
        ("[[A]] at first, but [[B]]", True, "stop", Verdict("ok", winner="B", reading="several")),
        ("[[C]], [[B]], [[A]]", True, "stop", Verdict("ok", winner="A", reading="several")),
    ],
)
def test_the_last_verdict(text, is_pair, finish, verdict):
    assert read_text(text, finish, is_pair, LAST) == verdict


def test_what_follows_the_final_channel_ends_there():
    assert without_thoughts("<|channel|>final<|message|>[[3]]<|end|>[[9]]").text == "[[3]]"


# ---- through judge.py ----------------------------------------------------------------------------


def judged_with(folder, server, reply, *more):
    """Exit code, and the first row, of a judge that answers everything but the probe so."""
    server.answer = lambda body: (
        completion("OK") if body["messages"] == server_judge.PROBE else reply
    )
    return run_judge(folder, server, *more), rows_of(folder)[0]


def test_counts_of_doubtful_readings_are_shown(workplace, server, capsys):
    def answer(body):
        text = body["messages"][-1]["content"]
        return completion("[6]" if "poem" in text else "[[3]] no, [[8]]")

    server.answer = answer
    assert run_judge(workplace, server) == 0
    assert [row["reading"] for row in rows_of(workplace)] == [*["fallback"] * 2, *["several"] * 4]
    out = capsys.readouterr().out
    assert "2 of 6 ratings are a number in single brackets" in out
    assert "4 of 6 judgements have several verdicts" in out and "--verdict last" in out


def test_another_reading_costs_nothing_and_is_another_judge(workplace, server, capsys):
    code, row = judged_with(workplace, server, completion("[[3]] no, [[8]]"))
    assert (code, row["score"], row["judge_settings"]) == (
        0, 3, '{"temperature": 0, "max_tokens": 2048}',
    )  # fmt: skip
    asked = len(server.requests)
    assert run_judge(workplace, server, "--verdict", "last") == 0
    assert len(server.requests) == asked
    assert "read with --verdict last" in capsys.readouterr().out
    rows = rows_of(workplace)
    by_judge = {row["judge_id"]: (row["score"], row["judge_settings"]) for row in rows}
    assert sorted(by_judge.values()) == [
        (3, '{"temperature": 0, "max_tokens": 2048}'),
        (8, '{"temperature": 0, "max_tokens": 2048, "verdict": "last"}'),
    ]
    assert len(rows) == 12


def test_a_verdict_that_the_other_reading_lacks_is_not_paid_for_again(workplace, server):
    assert judged_with(workplace, server, completion("[[3]] or", "length"))[0] == 0
    asked = len(server.requests)
    assert run_judge(workplace, server, "--verdict", "last", "--retry_failed") == 1
    assert len(server.requests) == asked
    judged_with(workplace, server, completion("[[12]] no, [[8]]"), "--max_tokens", "9")
    asked = len(server.requests)
    last = ("--verdict", "last", "--max_tokens", "9")
    assert run_judge(workplace, server, *last, "--retry_failed") == 0
    assert len(server.requests) == asked


def test_content_as_a_list_of_parts_is_read(workplace, server):
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "[[5]]"}]},
        {"type": "text", "text": "Rating: "},
        {"type": "text", "text": "[[9]]"},
    ]
    code, row = judged_with(workplace, server, completion(parts))
    assert (code, row["score"], row["judgement"]) == (0, 9, "Rating: [[9]]")


@pytest.mark.parametrize(
    ("reply", "status", "score"),
    [
        (completion(None, reasoning_content="perhaps [[5]]"), "thoughts", None),
        (completion("", reasoning="perhaps [[5]]"), "thoughts", None),
        (completion("", "length", reasoning_content="perhaps [[5]]"), "length", None),
        (completion("", reasoning_content="[[5]]?</think>Rating: [[9]]"), "ok", 9),
        (completion("[[9]]", reasoning_content="perhaps [[5]]"), "ok", 9),
        (completion("[[9]]", "error"), "failed", None),
        (completion("[[9]]", "SAFETY"), "refused", None),
    ],
)
def test_thoughts_that_the_server_separates(reply, status, score):
    _, body = reply
    read = server_judge.read_reply(str, json.dumps(body), {})
    assert (read["status"], read["score"]) == (status, score)


def test_a_judge_that_answers_in_its_thoughts_alone_is_found_at_the_probe(workplace, server):
    server.answer = lambda body: completion(None, reasoning_content="OK")
    with pytest.raises(UserError, match="reasoning_content.*--reasoning-parser"):
        run_judge(workplace, server)
    assert len(server.requests) == 1
