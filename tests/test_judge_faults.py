"""judge.py where answers, server or store are not what they seem: nothing is asked that need not
be, and each message names the cause.
"""

import json
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest
from doubles import completion
from judge_workplace import (
    ANSWERS,
    OTHER,
    PRICED,
    QUESTIONS,
    make_run,
    options,
    read_text,
    refusal,
    rows_of,
    run_judge,
    write_lines,
)

import judge
from pref.answering import served
from pref.files import mt_bench
from pref.files.console import UserError
from pref.judging import calls, costs, identity, judges, server_judge, store, summary
from pref.model import completions
from pref.model import server as servers

pytest_plugins = ("judge_fixtures",)


# ---- questions and answers -----------------------------------------------------------------------


def stamp(run) -> None:
    """Give a run's answers the hash of their question, as gen_mtbench.py does."""
    turns = {question["question_id"]: question["turns"] for question in QUESTIONS}
    path = run / "mt_bench/answers.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        sha256 = mt_bench.question_sha256(turns[row["question_id"]], 0.7)
        row |= {"temperature": 0.7, "question_sha256": sha256}
    write_lines(path, rows)


def edit_question(folder) -> None:
    edited = QUESTIONS[0] | {"turns": ["Write {a} poem!", QUESTIONS[0]["turns"][1]]}
    write_lines(folder / "mt/question.jsonl", [edited, *QUESTIONS[1:]])


def test_a_question_that_was_edited_after_its_answer_is_refused(workplace, server):
    stamp(workplace / "results/base")
    assert run_judge(workplace, server) == 0
    asked = len(server.requests)
    edit_question(workplace)
    with pytest.raises(UserError, match="base.*question 81 is not the one that was answered"):
        run_judge(workplace, server)
    assert len(server.requests) == asked


def test_a_baseline_beside_the_judged_runs_is_checked_like_them(pairs, server):
    stamp(pairs / "results/base")
    edit_question(pairs)
    folder = ["--mt_bench", str(pairs / "mt"), "--allow_incomplete"]
    pair = ["--judge", "j", "--base_url", server.url, "--grading", "pair", "--baseline", "base"]
    with pytest.raises(UserError, match="base/mt_bench.*question 81 is not the one"):
        judge.main([str(pairs / "results/dpo"), *folder, *pair])
    assert not server.requests


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choices": [{"index": 0, "turns": "ab"}]}, "two turns of text"),
        ({"choices": [{"index": 0, "turns": {"0": "a", "1": "b"}}]}, "two turns of text"),
        ({"choices": [{"index": -1, "turns": ["a", "b"]}]}, "not an answer row"),
        ({"question_id": 81.7}, "not an answer row"),
        ({"question_id": True}, "not an answer row"),
        ({"adapter_sha256": ["a"]}, "'adapter_sha256' must be text"),
        ({"question_sha256": 5}, "'question_sha256' must be text"),
    ],
)
def test_rows_that_are_no_answers(tmp_path, changes, message):
    path = tmp_path / "answers.jsonl"
    row = {"question_id": 81, "choices": [{"index": 0, "turns": ["a", "b"]}]}
    write_lines(path, [row | {"question_id": "80"}, row])
    assert list(mt_bench.read_answers(path)) == [(80, 0), (81, 0)]
    write_lines(path, [row | changes])
    with pytest.raises(UserError, match=f"answers.jsonl:1: .*{message}"):
        mt_bench.read_answers(path)


def test_one_line_for_runs_with_as_many_answers(capsys):
    def answers(*numbers):
        return {(number, 0): {} for number in numbers}

    names = [Path(name) for name in "abcd"]
    some = [answers(81, 82), answers(81, 83), answers(81), answers(81, 82, 83)]
    summary.announce_incomplete(dict(zip(names, some)), total=3)
    assert capsys.readouterr().out == (
        "2 runs have answers to 2 of 3 questions each; these are judged\n"
        "run c has answers to 1 of 3 questions; these are judged\n"
    )


# ---- money ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (400, {"message": "Your credit balance is too low to access the API"}, True),
        (400, {"message": "Budget has been exceeded! Current cost: 12.3"}, True),
        (400, {"type": "budget_exceeded", "code": "400", "message": "no"}, True),
        (400, {"code": "Arrearage", "message": "Access denied"}, True),
        (403, "Your team has either used all available credits or reached its limit", True),
        (403, {"message": "Key limit exceeded (total limit)", "code": 403}, True),
        (412, {"message": "Account suspended, due to the monthly spending limit"}, True),
        (429, {"type": "exceeded_current_quota_error", "message": "no"}, True),
        (429, {"code": "insufficient_quota", "message": "no"}, True),
        (402, None, True),
        # not about money, or a quotation of what was asked
        (429, {"message": "You exceeded your current quota: requests per minute"}, False),
        (403, {"message": "flagged", "metadata": {"flagged_input": "out of credits"}}, False),
        (400, {"message": "maximum context length is 12 tokens"}, False),
        (500, {"message": "spending limit service is down"}, False),
    ],
)  # fmt: skip
def test_words_of_an_account_without_credit(status, body, expected):
    error = SimpleNamespace(status_code=status, body=body)
    assert servers.is_out_of_credit(error) is expected


def test_an_account_without_credit_ends_the_loop_whatever_the_status(workplace, server):
    reply = refusal(400, "Your credit balance is too low to access the API.")
    paid = []

    def answer(body):
        if body["messages"] == server_judge.PROBE:
            return completion("OK")
        paid.append(body)
        return completion("[[7]]") if len(paid) == 1 else reply

    server.answer = answer
    with pytest.raises(UserError, match="no credit left"):
        run_judge(workplace, server, "--concurrency", "1")
    assert len(paid) == 2 and len(rows_of(workplace)) == 1
    server.answer = lambda body: completion("[[7]]")
    assert run_judge(workplace, server) == 0, "what was not judged is asked without --retry_failed"


def test_a_judge_that_writes_no_verdicts_is_not_asked_everything(workplace, server, monkeypatch):
    monkeypatch.setattr(calls, "NO_VERDICT_AFTER", 3)
    server.answer = lambda body: completion("8 out of 10")
    with pytest.raises(UserError, match=r"none of the first 3 replies has a verdict \(3 parse\)"):
        run_judge(workplace, server, "--concurrency", "1")
    assert len(server.paid(server_judge.PROBE)) == 3
    server.answer = lambda body: completion("[[8]]")
    assert run_judge(workplace, server) == 1, "the same command goes on"
    assert sum(row["status"] == "ok" for row in rows_of(workplace)) == 3
    server.answer = lambda body: completion("8 out of 10")
    assert run_judge(workplace, server, "--retry_failed") == 1, "what has failed is no sign"


def test_a_timeout_is_booked_for_each_try_and_what_was_never_sent_is_not():
    judged_by = judges.Judge(
        name="j", params_b=None, parameters={}, ask=None, concurrency=1, prices=(0, 1e6)
    )
    budget = costs.Budget(judged_by, cap=None, spent=0, tries=6)
    request = {"messages": [], "parameters": {"max_tokens": 10}}
    assert budget.cost(request, {"status": "timeout"}) == 6 * 10
    assert budget.cost(request, {"status": "connection"}) == 10
    assert budget.cost(request, {"status": "connection", "unsent": True}) == 0
    assert budget.cost(request, {"status": "timeout", "unsent": True}) == 0


def batch_of(folder, server, change, *more):
    """Write the requests of a batch, and its output as `change` makes it of each result's line."""
    requests, output = folder / "requests.jsonl", folder / "output.jsonl"
    server.answer = lambda body: completion("OK")
    assert run_judge(folder, server, "--dry_run", "--requests", str(requests), *more) == 0
    ids = [json.loads(line)["custom_id"] for line in requests.read_text().splitlines()]
    write_lines(output, [change({"custom_id": custom_id}) for custom_id in ids])
    return lambda path=output: run_judge(folder, server, "--import_results", str(path), *more)


RATED = completion("[[7]]")[1]
FILTERED = {"error": {"code": "content_filter", "message": "no"}}


def test_lines_of_a_batch_in_other_spellings(workplace, server):
    lines = [
        {"response": {"status_code": "200", "body": RATED}},
        {"response": {"status_code": 200, "body": json.dumps(RATED)}},
        {"response": {"status_code": 200, "body": RATED}, "error": {"code": None}},
        {"response": {"status_code": 400, "body": FILTERED}, "error": None},
        {"response": {"status_code": 500, "body": None}, "error": None},
        {"response": None, "error": {"code": "batch_expired"}},
    ]
    rest = iter(lines)
    batch_of(workplace, server, lambda line: line | next(rest))()
    statuses = [row["status"] for row in rows_of(workplace)]
    assert statuses == ["ok", "ok", "ok", "refused", "http_500", "batch_error"]


def test_a_batch_is_booked_once(workplace, server, capsys):
    """Not again with each import; and the file of requests is no output."""
    unread = {"response": {"status_code": 200, "body": completion("no rating")[1]}}
    again = batch_of(workplace, server, lambda line: line | unread, *PRICED)
    assert again() == 1
    costs_before = [row["cost_usd"] for row in rows_of(workplace)]
    assert again() == 1 and "6 imported before" in capsys.readouterr().out
    assert [row["cost_usd"] for row in rows_of(workplace)] == costs_before
    with pytest.raises(UserError, match="requests.jsonl:1: not a result.*the file of requests"):
        again(workplace / "requests.jsonl")


@pytest.mark.parametrize(
    ("thoughts", "end"),
    [
        ("analysisWe see [[5]].", "assistantfinal"),
        ("<|inner_prefix|>perhaps [[5]]", "<|inner_suffix|>"),
        ("<|channel>thought\nperhaps [[5]]", "<channel|>"),
    ],
)
def test_more_spellings_of_thoughts(thoughts, end):
    assert read_text(f"{thoughts}{end}Rating: [[9]]", "stop", is_pair=False).score == 9
    assert read_text(thoughts, "stop", is_pair=False).status == "length"
    plain = read_text("analysis: fine. Rating: [[8]]", "stop", is_pair=False)
    assert (plain.score, plain.reading) == (8, "")


# ---- servers and the store -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelling",
    ["HTTP://Host:80/v1", "http://host/v1/", "http://host//v1", "http://u:p@host/v1/chat/completions"],
)  # fmt: skip
def test_spellings_of_one_address(monkeypatch, spelling):
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    assert identity.server_address(spelling) == "http://host/v1"
    assert identity.server_address("https://host:8443/v1") == "https://host:8443/v1"


def test_a_byte_order_mark_and_a_reply_that_breaks_off(workplace, server):
    body = "\ufeff" + json.dumps(completion("[[7]]")[1])
    assert completions.read(str, body).text == "[[7]]"
    server.answer = lambda body: (0, None)  # the connection is closed
    with pytest.raises(UserError, match="breaks off its reply"):
        run_judge(workplace, server, *options(max_retries=0))


def test_a_refusal_without_a_message_is_read_from_its_body(workplace, server):
    """As FastAPI writes it, Mistral's servers for example."""
    detail = [{"loc": ["body", "temperature"], "msg": "extra fields not permitted"}]
    server.answer = lambda body: (
        (422, {"detail": detail}) if "temperature" in body else completion("[[7]]")
    )
    assert run_judge(workplace, server) == 0
    assert "temperature" not in server.requests[-1]


def test_a_limit_that_is_too_large_is_not_renamed(workplace, server):
    """vLLM names both spellings of the limit."""
    message = (
        "'max_tokens' or 'max_completion_tokens' is too large: 2048. This model's maximum context "
        "length is 1024 tokens"
    )
    server.answer = lambda body: refusal(400, message, param="max_tokens")
    with pytest.raises(UserError, match="maximum context length is 1024"):
        run_judge(workplace, server)
    assert len(server.requests) == 1
    error = SimpleNamespace(status_code=400, param=None, message=message, body=None)
    assert served.refused_option(error, {"max_tokens": 2048}) is None


def test_what_no_connection_takes(workplace, server):
    for option, value in {"timeout_s": "inf", "server_name": " "}.items():
        with pytest.raises(UserError, match=f"--{option}"):
            run_judge(workplace, server, *options(**{option: value}))
    assert not server.requests


def test_a_locked_store_is_a_message(workplace, server, monkeypatch):
    assert run_judge(workplace, server) == 0
    make_run(workplace, "dpo", OTHER)
    original = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: original(*a, **k | {"timeout": 0.05}))
    other = original(workplace / "results/judgements.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(UserError, match="database is locked; if another program has it open"):
        run_judge(workplace, server)
    other.close()


def test_a_judgement_that_ended_is_kept_under_a_higher_limit(workplace, server):
    """However the server spells that it ended."""
    server.answer = lambda body: completion("[[7]]", finish="STOP")
    assert run_judge(workplace, server) == 0
    asked = len(server.requests)
    assert run_judge(workplace, server, *options(max_tokens=4096)) == 0
    assert len(server.requests) == asked
    assert len(ANSWERS) * 2 == len(store.read_rows(workplace / "results", "SELECT * FROM asked"))
