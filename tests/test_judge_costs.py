"""judge.py and money: costs recorded, the cap, prices, dry runs and batches."""

import json
import random
import threading
from collections import Counter

import pytest
from doubles import completion
from judge_workplace import ANSWERS, KEY, PRICED, make_run, options, rows_of, run_judge, write_lines

import judge
from pref.files.console import UserError
from pref.judging import costs, server_judge

pytest_plugins = ("judge_fixtures",)


def test_costs_are_recorded(workplace, server, capsys):
    assert run_judge(workplace, server, *PRICED) == 0
    assert [row["cost_usd"] for row in rows_of(workplace)] == [pytest.approx(0.011 + 0.006)] * 6
    out = capsys.readouterr().out
    assert (
        "estimate: 6 calls" in out and f"total cost recorded there: {6 * 0.017:.4f} dollars" in out
    )


def test_the_cost_of_a_failure_is_added_to_the_retry(workplace, server):
    server.answer = lambda body: completion("No rating.")
    run_judge(workplace, server, *PRICED)
    server.answer = lambda body: completion("[[7]]")
    run_judge(workplace, server, *PRICED, "--retry_failed")
    assert [row["cost_usd"] for row in rows_of(workplace)] == [pytest.approx(2 * 0.017)] * 6


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(20))
def test_the_cap_is_never_passed(workplace, server, trial):
    """Random answers and token counts, 32 calls in flight. What counts is the server's bill."""
    dice = random.Random(trial)
    for number in range(6):
        make_run(
            workplace,
            f"run{number}",
            {q: [f"{number} {text} x" for text in turns] for q, turns in ANSWERS.items()},
        )
    billed, lock = [], threading.Lock()

    def answer(body):
        prompt, used = (
            sum(len(m["content"]) for m in body["messages"]) // 3,
            dice.randint(1, body["max_tokens"]),
        )
        if body["messages"] != server_judge.PROBE:
            with lock:
                billed.append((prompt * 1 + used * 10) / 1e6)
        status, reply = completion("[[7]]")
        return status, reply | {"usage": {"prompt_tokens": prompt, "completion_tokens": used}}

    server.answer = answer
    cap = dice.uniform(0.001, 0.4)
    more = options(
        price_in=1, price_out=10, max_usd=cap, concurrency=32, max_tokens=2048, max_retries=0
    )
    try:
        run_judge(workplace, server, *more)
    except UserError as error:
        assert "could pass the cap" in str(error)
    assert sum(billed) <= cap
    spent = sum(billed)
    try:
        run_judge(workplace, server, *more)  # the same cap again buys nothing beyond it
    except UserError as error:
        assert "could pass the cap" in str(error)
    assert spent <= sum(billed) <= cap


def test_a_reply_without_counts_is_recorded_at_the_most_it_can_have_cost(workplace, server):
    status, reply = completion("[[7]]")
    server.answer = lambda body: (status, {k: v for k, v in reply.items() if k != "usage"})
    more = options(price_in=1, price_out=10, max_retries=0, max_usd=0.05, concurrency=1)
    with pytest.raises(UserError, match="could pass the cap; 4 requests are left"):
        run_judge(workplace, server, *more)
    assert (
        all(0.02 < row["cost_usd"] < 0.03 for row in rows_of(workplace))
        and len(rows_of(workplace)) == 2
    )
    with pytest.raises(UserError, match="could pass the cap; 4 requests are left"):
        run_judge(workplace, server, *more)  # what the lost replies may have cost is remembered


def test_a_cap_needs_calls_of_limited_length(workplace, server):
    with pytest.raises(UserError, match="must limit the tokens of a call"):
        run_judge(
            workplace, server, *PRICED, "--max_usd", "1", "--parameters", '{"temperature": 0}'
        )


def test_prices_need_the_exact_name_and_openais_server(monkeypatch):
    def prices(*more):
        return costs.prices_of(judge.parse_args(["results", *more]))

    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert prices("--judge", "gpt-4o") == (2.5, 10)
    assert prices("--judge", "gpt-5-pro") is None and prices("--judge", "gpt-4o-2024-05-13") is None
    assert prices("--judge", "gpt-4o", "--base_url", "http://localhost:8000/v1") is None
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1")
    assert prices("--judge", "gpt-4o") is None


def test_a_dry_run_records_nothing(workplace, server):
    run_judge(workplace, server)
    assert run_judge(workplace, server, "--dry_run", "--max_tokens", "1024") == 0
    assert run_judge(workplace, server, model="other-8b") == 0
    assert Counter(row["judge"] for row in rows_of(workplace)) == {"big-70b": 6, "other-8b": 6}


def test_parameters_of_an_experiment_are_not_inherited(workplace, server, capsys):
    run_judge(
        workplace, server, "--parameters", '{"temperature": 1, "top_p": 0.5, "max_tokens": 100}'
    )
    assert {body["temperature"] for body in server.requests} == {1}
    assert run_judge(workplace, server) == 0
    assert {(body["temperature"], body["max_tokens"]) for body in server.requests[-6:]} == {
        (0, 2048)
    }
    assert 'asked with {"temperature": 0, "max_tokens": 2048}' in capsys.readouterr().out


def test_a_cap_needs_a_price(workplace, server):
    with pytest.raises(UserError, match="no price of big-70b is known"):
        run_judge(workplace, server, "--max_usd", "1")


def test_dry_run_asks_nothing_and_a_batch_comes_back(workplace, server, capsys, monkeypatch):
    batch = workplace / "batch.jsonl"
    monkeypatch.delenv("OPENAI_API_KEY")
    assert run_judge(workplace, server, *PRICED, "--dry_run", "--requests", str(batch)) == 0
    assert server.requests == [] and "estimate: 6 calls" in capsys.readouterr().out
    lines = [json.loads(line) for line in batch.read_text().splitlines()]
    assert [line["custom_id"].split("-")[:2] for line in lines] == [
        [q, t] for q in ("81", "111", "121") for t in "12"
    ]
    assert all((line["method"], line["url"]) == ("POST", "/v1/chat/completions") for line in lines)
    assert all(len(line["custom_id"]) <= 64 for line in lines)

    output = workplace / "output.jsonl"
    bodies = [completion(f"[[{number}]]")[1] for number in range(1, 7)]
    results = [
        {
            "id": "b",
            "custom_id": line["custom_id"],
            "error": None,
            "response": {"status_code": 200, "body": body},
        }
        for line, body in zip(lines, bodies)
    ]
    results[3] |= {"response": {"status_code": 400, "body": {"error": {"message": "too long"}}}}
    results[4] |= {"response": None, "error": {"code": "batch_expired"}}
    write_lines(output, [*results[::-1], {"custom_id": "strange"}])
    assert run_judge(workplace, server, *PRICED, "--import_results", str(output)) == 1
    assert (
        "4 ok, 1 batch_error, 1 http_400; 1 lines of other requests ignored"
        in capsys.readouterr().out
    )
    rows = rows_of(workplace)
    assert [row["score"] for row in rows] == [1, 2, 3, None, None, 6]
    assert rows[0]["cost_usd"] == pytest.approx(0.017 / 2)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert run_judge(workplace, server, "--retry_failed") == 0
    sent = {json.dumps(body["messages"]) for body in server.paid(server_judge.PROBE)}
    assert sent == {json.dumps(lines[i]["body"]["messages"]) for i in (3, 4)}
    with pytest.raises(UserError, match="none of its 1 lines belongs"):
        write_lines(output, [{"custom_id": "strange"}])
        run_judge(workplace, server, "--import_results", str(output))


def test_the_batch_of_pairs_names_the_order(pairs, server):
    batch = pairs / "batch.jsonl"
    more = ("--grading", "pair", "--baseline", "base", "--dry_run", "--requests", str(batch))
    assert run_judge(pairs, server, *more) == 0
    ids = [json.loads(line)["custom_id"].split("-")[:3] for line in batch.read_text().splitlines()]
    assert ids == [[q, t, o] for q in ("81", "111", "121") for t in "12" for o in "12"]
