"""judge.py and what providers answer: refusals, credit, limits, counts of tokens, batch files."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
from doubles import completion
from judge_workplace import (
    ANSWERS,
    PRICED,
    QUESTIONS,
    make_run,
    options,
    refusal,
    rows_of,
    run_judge,
    write_lines,
)

import judge
from pref.files.console import UserError
from pref.judging import calls, costs, server_judge
from pref.judging.judges import Judge
from pref.model import server as servers

pytest_plugins = ("judge_fixtures",)
ONE_BY_ONE = ("--concurrency", "1", "--max_retries", "0")


def is_probe(body) -> bool:
    return body["messages"] == server_judge.PROBE


def poem_gets(reply):
    """An answer of the server: OK to the probe, `reply` to question 81, a rating to the others."""

    def answer(body):
        if is_probe(body):
            return completion("OK")
        return reply if "poem" in body["messages"][-1]["content"] else completion("[[7]]")

    return answer


# ---- one question that a provider refuses --------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        (403, "<html>Access denied by the firewall</html>"),
        refusal(400, "The response was filtered", code="content_filter"),
    ],
)
def test_a_question_that_is_refused_is_one_failure(workplace, server, capsys, reply):
    server.answer = poem_gets(reply)
    assert run_judge(workplace, server, *ONE_BY_ONE, *PRICED) == 1
    rows = rows_of(workplace)
    assert Counter(row["status"] for row in rows) == {"ok": 4, "refused": 2}
    assert {row["cost_usd"] for row in rows if row["status"] == "refused"} == {0}
    asked = len(server.requests)
    assert run_judge(workplace, server) == 1
    assert len(server.requests) == asked, "a refusal is kept like any other failure"


def test_refusals_of_everything_end_the_loop(workplace, server, monkeypatch):
    monkeypatch.setattr(calls, "GIVE_UP_AFTER", 3)
    server.answer = lambda body: completion("OK") if is_probe(body) else refusal(403, "no access")
    with pytest.raises(UserError, match=r"takes no more \(3 calls in a row .*: 3 refused\)"):
        run_judge(workplace, server, *ONE_BY_ONE)


# ---- credit and limits ---------------------------------------------------------------------------


def after_two(reply):
    """Two judgements, then `reply` to everything."""
    paid = []

    def answer(body):
        if is_probe(body):
            return completion("OK")
        paid.append(body)
        return completion("[[7]]") if len(paid) <= 2 else reply

    return answer, paid


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (refusal(402, "Insufficient Balance"), "no credit left"),
        (refusal(429, "Rate limit exceeded: free-models-per-day"), "a limit for the day"),
    ],
)
def test_out_of_credit_or_at_the_limit_of_the_day_stops(workplace, server, reply, message):
    server.answer, paid = after_two(reply)
    with pytest.raises(UserError, match=message):
        run_judge(workplace, server, "--concurrency", "1")
    assert len(paid) == 3, "no retry, and nothing further is sent"
    assert [row["status"] for row in rows_of(workplace)] == ["ok", "ok"]
    server.answer = lambda body: completion("[[7]]")
    assert run_judge(workplace, server) == 0, "what was not judged is asked without --retry_failed"


@pytest.mark.parametrize(
    ("text", "of_the_day"),
    [
        ("Rate limit reached for gpt-4 on requests per day (RPD): Limit 200, Used 200", True),
        ("{'quotaId': 'GenerateRequestsPerDayPerProjectPerModel-FreeTier'}", True),
        ("Rate limit of 150 per 86400s exceeded for UserByModelByDay", True),
        ("You have reached your daily limit", True),
        ("tokens per month exceeded", True),
        ("Rate limit reached for gpt-4 on tokens per min (TPM): Limit 10000, Used 9500", False),
        ("Too many requests, please wait 20 seconds", False),
        ("Rate limit of 15 per 60s exceeded for UserByModelByMinute", False),
        ("request_id 20260525-rpdx", False),
    ],
)
def test_limits_of_the_day(text, of_the_day):
    assert bool(servers.LIMIT_OF_THE_DAY.search(text)) is of_the_day


@pytest.mark.parametrize(
    ("status", "message", "moderated"),
    [
        (403, "Your input was flagged", True),
        (451, "unavailable for legal reasons", True),
        (400, "ResponsibleAIPolicyViolation", True),
        (400, "context too long", False),
        (500, "content_filter is down", False),
    ],
)
def test_what_counts_as_a_moderation(status, message, moderated):
    error = SimpleNamespace(status_code=status, message=message, code=None, type=None)
    assert server_judge.is_moderation(error) is moderated


@pytest.mark.slow
def test_a_rate_limit_that_does_not_end_stops_the_loop(workplace, server, monkeypatch):
    monkeypatch.setattr(calls, "GIVE_UP_AFTER", 3)
    server.answer, paid = after_two(refusal(429, "slow down"))
    with pytest.raises(UserError, match=r"3 http_429\).*--retry_failed"):
        run_judge(workplace, server, *ONE_BY_ONE)
    assert len(paid) == 5


# ---- counts of tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": 100, "completion_tokens": 30, "total_tokens": 130}, (100, 30)),
        ({"prompt_tokens": 100, "completion_tokens": 30, "total_tokens": 930}, (100, 830)),
        ({"prompt_tokens": 100, "completion_tokens": 30}, (100, 30)),
        ({"prompt_tokens": 100, "completion_tokens": 30, "total_tokens": 5}, (100, 30)),
        ({"prompt_tokens": 100.0, "completion_tokens": 30.0}, (100, 30)),
        ({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, (None, None)),
        ({"prompt_tokens": -1, "completion_tokens": -1}, (None, None)),
        ({"prompt_tokens": 100, "completion_tokens": 0}, (100, None)),
        ({"prompt_tokens": 9, "completion_tokens": 30,
          "completion_tokens_details": {"reasoning_tokens": 700}}, (9, 730)),
        ({"prompt_tokens": 9, "completion_tokens": 730,
          "completion_tokens_details": {"reasoning_tokens": 700}}, (9, 730)),
        ({"prompt_tokens": 100}, (100, None)),
        ({"prompt_tokens": True, "completion_tokens": "30"}, (None, None)),
        ({"prompt_tokens": 10**30, "completion_tokens": 30}, (None, 30)),
        ({}, (None, None)),
        (None, (None, None)),
        ([], (None, None)),
        ("none", (None, None)),
    ],
)  # fmt: skip
def test_counts_that_cannot_be_right_are_no_counts(usage, tokens):
    _, body = completion("[[7]]")
    reply = server_judge.read_reply(str, json.dumps(body | {"usage": usage}), request={})
    assert (reply["prompt_tokens"], reply["completion_tokens"]) == tokens


@pytest.mark.parametrize("count", [0, -9, None])
def test_a_cap_acts_whatever_the_server_counts(workplace, server, count):
    status, reply = completion("[[7]]")
    usage = {"prompt_tokens": count, "completion_tokens": count}
    server.answer = lambda body: (status, reply | {"usage": usage})
    more = options(price_in=1, price_out=10, max_retries=0, max_usd=0.05, concurrency=1)
    with pytest.raises(UserError, match="could pass the cap; 4 requests are left"):
        run_judge(workplace, server, *more)
    assert all(0.02 < row["cost_usd"] < 0.03 for row in rows_of(workplace))


def test_thoughts_beyond_completion_tokens_are_booked(workplace, server):
    usage = {"prompt_tokens": 1000, "completion_tokens": 10, "total_tokens": 2000}
    status, reply = completion("[[7]]")
    server.answer = lambda body: (status, reply | {"usage": usage})
    assert run_judge(workplace, server, *options(price_in=1, price_out=10)) == 0
    assert {row["cost_usd"] for row in rows_of(workplace)} == {(1000 * 1 + 1000 * 10) / 1e6}


def test_a_reservation_learns_how_long_judgements_are():
    """A server may count thoughts beyond the limit that was sent."""
    the_judge = Judge("x", None, {}, None, 1, prices=(0.0, 1.0))
    budget = costs.Budget(the_judge, cap=1.0, spent=0.0)
    request = {"messages": [], "parameters": {"max_tokens": 100}}
    reserved = budget.reserve(request)
    assert reserved == pytest.approx(100 / 1e6)
    cost = budget.cost(request, {"prompt_tokens": 1, "completion_tokens": 5000})
    budget.settle(reserved, cost)
    assert (budget.reserved, budget.spent) == (0, pytest.approx(5000 / 1e6))
    assert budget.most(request) == pytest.approx(5000 / 1e6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('{"max_tokens": -1}', "max_tokens -1 must be a whole number, 1 or more"),
        ('{"max_tokens": "2048"}', "max_tokens '2048' must be"),
        ('{"max_completion_tokens": null}', "max_completion_tokens None must be"),
        ('{"max_tokens": 9, "seed": "a"}', "seed 'a' must be"),
        ('{"max_tokens": 9, "model": "other"}', "model cannot be given here"),
        ('{"max_tokens": 9, "stream": true}', "stream cannot be given here"),
    ],
)
def test_parameters_that_defeat_the_cap_or_the_identity(workplace, server, given, message):
    with pytest.raises(UserError, match=message):
        run_judge(workplace, server, *PRICED, "--max_usd", "1", "--parameters", given)
    assert server.requests == []


# ---- what the probe finds ------------------------------------------------------------------------


def test_a_judge_that_refuses_the_system_role_is_found_at_the_probe(workplace, server):
    server.answer = lambda body: (
        refusal(400, "System role not supported")
        if body["messages"][0]["role"] == "system"
        else completion("OK")
    )
    with pytest.raises(UserError, match="refuses system messages"):
        run_judge(workplace, server)
    assert len(server.requests) == 2
    prompts = workplace / "mt/judge_prompts.jsonl"
    rows = [json.loads(line) | {"system_prompt": ""} for line in prompts.read_text().splitlines()]
    write_lines(prompts, rows)
    server.answer = lambda body: (
        completion("[[7]]") if body["messages"][0]["role"] == "user" else refusal(400, "no system")
    )
    assert run_judge(workplace, server) == 0, "prompts of one's own without system messages"


def refuses_old_parameters(body):
    """OpenAI's reasoning models."""
    for name in ("temperature", "max_tokens"):
        if name in body:
            return refusal(400, f"Unsupported parameter: '{name}'", param=name)
    return completion("[[7]]")


def batch_bodies(folder, server, *more, model="big-70b"):
    path = folder / "batch.jsonl"
    assert run_judge(folder, server, "--dry_run", "--requests", str(path), *more, model=model) == 0
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_batch_file_has_the_parameters_that_the_judge_accepts(workplace, server):
    server.answer = refuses_old_parameters
    lines = batch_bodies(workplace, server)
    assert all(body["messages"][-1:] == server_judge.PROBE[-1:] for body in server.requests)
    expected = {"model", "messages", "max_completion_tokens"}
    assert all(line["body"].keys() == expected for line in lines)
    results = [
        {"custom_id": line["custom_id"], "response": {"status_code": 200, "body": reply}}
        for line in lines
        for _, reply in [completion("[[5]]")]
    ]
    write_lines(workplace / "output.jsonl", results)
    asked = len(server.requests)
    assert run_judge(workplace, server, "--import_results", str(workplace / "output.jsonl")) == 0
    assert [row["score"] for row in rows_of(workplace)] == [5] * 6
    assert len(server.requests) == asked


def test_a_batch_file_without_a_key(workplace, server, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY")
    (line, *_) = batch_bodies(workplace, server, model="gpt-5-mini")
    assert line["body"].keys() == {"model", "messages", "max_completion_tokens"}
    (line, *_) = batch_bodies(workplace, server)
    assert line["body"].keys() == {"model", "messages", "temperature", "max_tokens"}
    assert server.requests == []
    assert "is not asked which parameters it accepts" in capsys.readouterr().err
    monkeypatch.setenv("OPENAI_API_KEY", "any-key")  # on a node without a network
    server.httpd.server_close()
    assert len(batch_bodies(workplace, server, "--max_retries", "0")) == 6
    assert "the batch file's parameters are not tried" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("gpt-5", True), ("gpt-5-mini-2025-08-07", True), ("o3", True), ("o4-mini", True),
        ("openai/o1-preview", True), ("gpt-5-chat-latest", False), ("gpt-4o", False),
        ("o3de-7b", False), ("big-70b", False),
    ],
)  # fmt: skip
def test_names_of_reasoning_models(name, reasons):
    assert bool(server_judge.REASONING.match(name)) is reasons


def test_batch_results_of_version_1_0_0_are_stored(workplace, server):
    """Their custom_ids have the hash of a request without the server."""
    from pref.files.disk import sha256_json

    lines = batch_bodies(workplace, server)
    results = []
    for line in lines:
        body = dict(line["body"])
        parameters = {name: body[name] for name in ("temperature", "max_tokens")}
        request = {"judge": body["model"], "messages": body["messages"], "repeat": 0}
        key = sha256_json(request | {"parameters": parameters})
        old_id = "-".join([*line["custom_id"].split("-")[:2], key[:32]])
        response = {"status_code": 200, "body": completion("[[5]]")[1]}
        results.append({"custom_id": old_id, "response": response})
    write_lines(workplace / "output.jsonl", results)
    assert run_judge(workplace, server, "--import_results", str(workplace / "output.jsonl")) == 0
    assert [row["score"] for row in rows_of(workplace)] == [5] * 6


# ---- an estimate before anything exists, a server that cuts prompts ------------------------------


def test_an_estimate_before_any_answer_exists(workplace, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    where = ["--mt_bench", str(workplace / "mt"), "--dry_run", "--runs"]
    assert judge.main([*where, "60", "--judge", "gpt-4o"]) == 0
    out = capsys.readouterr().out
    assert f"estimate for 60 runs, each with one answer to {len(QUESTIONS)} questions" in out
    assert f"{60 * len(QUESTIONS) * 2} calls" in out and "dollars at 2.5 and 10" in out
    assert judge.main([*where, "60"]) == 0
    assert "no price known" in capsys.readouterr().out
    with pytest.raises(UserError, match="--runs N: only with --dry_run"):
        judge.parse_args(["--runs", "3", "--judge", "x"])
    with pytest.raises(UserError, match="no results folder is given"):
        judge.parse_args(["--judge", "x"])


def test_a_server_that_cuts_prompts_is_noticed(workplace, server, capsys):
    make_run(workplace, "long", {q: ["word " * 4000, "more " * 500] for q in ANSWERS})

    def answer(body):
        chars = sum(len(message["content"]) for message in body["messages"])
        status, reply = completion("[[7]]")
        usage = {"prompt_tokens": min(chars // 4, 2048), "completion_tokens": 9}
        return status, reply | {"usage": usage}

    server.answer = answer
    assert run_judge(workplace, server) == 0
    assert "6 of 12 prompts have too few tokens for their length" in capsys.readouterr().out
    server.answer = lambda body: completion("[[7]]")
    assert run_judge(workplace, server, model="other-8b") == 0
