"""judge.py with a server: what is asked and stored, and what survives a fault."""

import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from doubles import HANG_UP, completion
from judge_workplace import (
    ANSWERS,
    KEY,
    arguments,
    make_run,
    options,
    refusal,
    rows_of,
    run_judge,
    write_answers,
)

import judge
from pref.files.console import UserError
from pref.files.judgements import read_judgements
from pref.judging import calls, server_judge, store

pytest_plugins = ("judge_fixtures",)


# ---- judgements, one per turn --------------------------------------------------------------------


def test_judges_every_turn_once(workplace, server, capsys):
    assert run_judge(workplace, server) == 0
    rows = rows_of(workplace)
    assert [(row["question_id"], row["turn"]) for row in rows] == [
        (q, t) for q in (81, 111, 121) for t in (1, 2)
    ]
    assert {
        key: rows[0][key] for key in ("score", "status", "model_id", "category", "grading", "judge")
    } == {
        "score": 7,
        "status": "ok",
        "model_id": "base",
        "category": "writing",
        "grading": "single",
        "judge": "big-70b",
    }
    assert {
        key: rows[0][key]
        for key in ("order", "baseline", "winner", "cost_usd", "choice", "repeat", "refs")
    } == {
        "order": None,
        "baseline": None,
        "winner": None,
        "cost_usd": None,
        "choice": 0,
        "repeat": 0,
        "refs": "original",
    }
    assert (rows[0]["served_model"], rows[0]["system_fingerprint"]) == ("served-7b", "fp_1")
    assert (rows[0]["prompt_tokens"], rows[0]["completion_tokens"]) == (11, 3)
    assert (rows[0]["judge_params_b"], rows[0]["prompts"]) == (70, "own")
    assert all(
        set(body) == {"model", "messages", "temperature", "max_tokens"} for body in server.requests
    )
    assert (len(server.paid(server_judge.PROBE)), len(server.requests)) == (6, 7)
    out = capsys.readouterr().out
    assert "1 empty turns" in out
    assert "smoke test" not in out

    assert run_judge(workplace, server) == 0
    assert len(server.requests) == 7, "a rerun asks nothing, not even the probe"
    assert rows_of(workplace) == rows


def test_identical_answers_are_judged_once(workplace, server):
    make_run(workplace, "td_dpo", {**ANSWERS, 81: ["Other.", "Red."]})
    one_at_a_time = ("--concurrency", "1")  # so that they arrive in order
    assert run_judge(workplace, server, *one_at_a_time) == 0
    assert len(server.paid(server_judge.PROBE)) == 6 + 2
    assert len(rows_of(workplace, "td_dpo")) == 6
    order = [body["messages"][-1]["content"] for body in server.paid(server_judge.PROBE)]
    last_poem = max(index for index, text in enumerate(order) if "poem" in text)
    assert last_poem < 4, "question 81 of both runs comes before the last questions"


def test_a_single_run_uses_the_store_of_its_results_folder(workplace, server):
    make_run(workplace, "td_dpo", ANSWERS)
    one_run = arguments(workplace, server, results="results/td_dpo")
    assert judge.main([*one_run, "--allow_incomplete"]) == 0
    assert not (workplace / "results/base/mt_bench/judgements.csv").exists()
    assert run_judge(workplace, server) == 0
    assert len(server.paid(server_judge.PROBE)) == 6


def test_judges_are_kept_apart_and_stale_judgements_are_dropped(workplace, server):
    run_judge(workplace, server)
    run_judge(workplace, server, model="other-8b")
    assert Counter(row["judge"] for row in rows_of(workplace)) == {"big-70b": 6, "other-8b": 6}
    make_run(workplace, "base", {**ANSWERS, 81: [ANSWERS[81][0], "New."]})
    before = len(server.paid(server_judge.PROBE))
    run_judge(workplace, server)
    assert len(server.paid(server_judge.PROBE)) == before + 1, (
        "only turn 2 of question 81 is another request"
    )
    assert Counter(row["judge"] for row in rows_of(workplace)) == {"big-70b": 6, "other-8b": 5}


# ---- faults --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reply", "status"),
    [
        (completion("I like it."), "parse"),
        (completion("Rating: [[12]]"), "parse"),
        (completion(" \n"), "empty"),
        (completion(None), "empty"),
        (completion("It is long", finish="length"), "length"),
        (completion("", finish="content_filter"), "refused"),
        (completion("[[5]]", finish="content_filter"), "refused"),
        (completion(None, refusal="I cannot."), "refused"),
        (refusal(400, "context too long"), "http_400"),
        (refusal(500, "oops"), "http_500"),
        ((200, {"error": {"message": "provider down"}, "choices": None}), "not_openai"),
        ((200, {"choices": []}), "not_openai"),
        ((200, "<html>hello</html>"), "not_openai"),
        (
            (200, '{"choices": [{"message": {"content": "[[7]]"'),
            "not_openai",
        ),  # cut off, and served as text/html
        (refusal(503, "overloaded"), "http_503"),
        ((HANG_UP, None), "connection"),
        (completion("so long " * 1_300_000), "parse"),  # 10 MB
        (completion("bad \ud800 unicode"), "parse"),
    ],
)
def test_failures_are_kept_with_a_reason_and_retried(workplace, server, capsys, reply, status):
    server.answer = lambda body: (
        completion("[[7]]") if "poem" not in body["messages"][-1]["content"] else reply
    )
    assert run_judge(workplace, server, "--max_retries", "0") == 1
    rows = {(row["question_id"], row["turn"]): row for row in rows_of(workplace)}
    assert (rows[81, 1]["status"], rows[81, 1]["score"]) == (status, None)
    assert f"2 {status}" in capsys.readouterr().out
    assert (rows[111, 1]["status"], rows[111, 1]["score"]) == ("ok", 7)

    server.answer = lambda body: completion("Rating: [[8]]")
    before = len(server.paid(server_judge.PROBE))
    assert run_judge(workplace, server) == 1
    assert len(server.paid(server_judge.PROBE)) == before, (
        "failures are repeated only with --retry_failed"
    )
    assert run_judge(workplace, server, "--retry_failed") == 0
    assert len(server.paid(server_judge.PROBE)) == before + 2, "only the two that failed"
    assert sorted(row["score"] for row in rows_of(workplace)) == [7, 7, 7, 7, 8, 8]


def test_nothing_of_an_earlier_failure_stays(workplace, server):
    server.answer = lambda body: completion("No rating.")
    run_judge(workplace, server)
    server.answer = lambda body: (
        completion("OK") if body["messages"] == server_judge.PROBE else refusal(500, "oops")
    )
    assert run_judge(workplace, server, "--max_retries", "0", "--retry_failed") == 1
    for row in rows_of(workplace):
        assert (row["status"], row["served_model"], row["prompt_tokens"]) == (
            "http_500",
            None,
            None,
        )
        assert "oops" in row["judgement"]


def test_the_csv_is_written_during_the_run_too(workplace, server, monkeypatch):
    monkeypatch.setattr(calls, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(calls, "LOOK_EVERY_S", 0.01)
    path = workplace / "results/base/mt_bench/judgements.csv"

    def answer(body):
        if len(server.requests) == 5:  # the fourth paid call waits until the second's row is there
            until = time.monotonic() + 30
            while (
                not path.exists() or len(read_judgements(path)) < 2
            ) and time.monotonic() < until:
                time.sleep(0.01)
            seen.append(len(read_judgements(path)))
        return completion("[[7]]")

    seen, server.answer = [], answer
    assert run_judge(workplace, server, "--concurrency", "1") == 0
    assert seen[0] in (2, 3)


def test_a_truncated_judgement_with_a_rating_counts(workplace, server):
    server.answer = lambda body: completion("[[4]] because", finish="length")
    assert run_judge(workplace, server) == 0


@pytest.mark.slow
@pytest.mark.parametrize("retry_after", [True, False])
def test_rate_limit_is_waited_out(workplace, server, retry_after):
    seen, server.retry_after = Counter(), retry_after

    def answer(body):
        seen[str(body)] += 1
        return refusal(429, "slow down") if seen[str(body)] == 1 else completion("[[7]]")

    server.answer = answer
    assert run_judge(workplace, server) == 0
    assert set(seen.values()) == {2}


def test_no_credit_stops_the_run_at_once(workplace, server):
    paid = []

    def answer(body):
        if body["messages"] == server_judge.PROBE:
            return completion("OK")
        paid.append(body)
        if len(paid) > 2:
            return refusal(
                429, "You exceeded your quota", code="insufficient_quota", type="insufficient_quota"
            )
        return completion("[[7]]")

    server.answer = answer
    with pytest.raises(UserError, match="no credit left"):
        run_judge(workplace, server, "--concurrency", "1")
    assert len(paid) == 3, "no retry, no further request"
    assert [row["status"] for row in rows_of(workplace)] == ["ok", "ok"], (
        "what was paid for is kept"
    )


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (refusal(404, "The model does not exist"), "no such model"),
        (refusal(401, f"Incorrect API key provided: {KEY}"), "refuses the key"),
        (refusal(403, "not for you"), "may not use this model"),
        (refusal(400, "max_model_len is 1024"), "max_model_len is 1024"),
        ((200, "<html>a web page</html>"), "/v1"),
    ],
)
def test_the_probe_names_the_remedy_before_anything_is_paid_for(workplace, server, reply, message):
    server.answer = lambda body: reply
    with pytest.raises(UserError, match=message) as error:
        run_judge(workplace, server, "--max_retries", "0")
    assert "--judge" in str(error.value)
    assert KEY not in str(error.value)
    assert server.paid(server_judge.PROBE) == []


def test_a_key_that_is_revoked_meanwhile_stops_the_run(workplace, server):
    server.answer = lambda body: (
        completion("OK") if body["messages"] == server_judge.PROBE else refusal(401, "revoked")
    )
    with pytest.raises(UserError, match="refuses the key"):
        run_judge(workplace, server, "--concurrency", "1")
    assert len(server.paid(server_judge.PROBE)) == 1


def test_server_down(workplace, server):
    server.httpd.server_close()
    with pytest.raises(UserError, match="no server answers.*start it"):
        run_judge(workplace, server, "--max_retries", "0")


def test_timeout(workplace, server):
    release = threading.Event()
    server.answer = lambda body: (
        completion("OK") if body["messages"] == server_judge.PROBE else (release.wait(5), None)
    )
    try:
        assert run_judge(workplace, server, "--max_retries", "0", "--timeout_s", "0.2") == 1
    finally:
        release.set()
    assert {row["status"] for row in rows_of(workplace)} == {"timeout"}


def test_a_server_that_disappears_meanwhile_stops_the_run(workplace, server, monkeypatch):
    monkeypatch.setattr(calls, "GIVE_UP_AFTER", 2)
    asked = []
    monkeypatch.setattr(
        server_judge,
        "ask_server",
        lambda client, request: asked.append(1) or {"status": "connection"},
    )
    with pytest.raises(
        UserError, match="server is gone.*--retry_failed, which repeats these calls too"
    ):
        run_judge(workplace, server, "--concurrency", "1")
    assert len(asked) == 2


def test_refused_parameters_are_learned_once(workplace, server, capsys):
    def answer(body):
        if "temperature" in body:
            return refusal(400, "Unsupported value: 'temperature'", param="temperature")
        if "max_tokens" in body:
            return refusal(
                400,
                "'max_tokens' is not supported. Use 'max_completion_tokens'.",
                param="max_tokens",
            )
        return completion("[[7]]")

    server.answer = answer
    assert run_judge(workplace, server) == 0
    assert len(server.requests) == 3 + 6
    assert server.requests[-1]["max_completion_tokens"] == 2048
    assert "refuses these parameters" in capsys.readouterr().err
    assert run_judge(workplace, server) == 0
    assert len(server.requests) == 3 + 6, "the store remembers what the judge accepts"


def test_the_key_is_written_to_no_file(workplace, server, capsys):
    def answer(body):
        if body["messages"] == server_judge.PROBE:
            return completion("OK")
        return (
            completion(f"your key {KEY}") if "poem" in str(body) else refusal(400, f"bad key {KEY}")
        )

    server.answer = answer
    assert run_judge(workplace, server) == 1
    assert any("[key]" in row["judgement"] for row in rows_of(workplace))
    for path in workplace.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    assert KEY not in "".join(capsys.readouterr())


def test_awkward_judgements_survive_the_csv(workplace, server):
    text = 'a "quoted", judgement\r\nwith\nlines, \x00, \u00e9 \U0001f600 and [[7]]\n'
    server.answer = lambda body: completion(text)
    assert run_judge(workplace, server) == 0
    assert {row["judgement"] for row in rows_of(workplace)} == {text}


def test_small_judge_is_called_a_smoke_test(workplace, server, capsys):
    run_judge(workplace, server, model="SmolLM2-135M-Instruct")
    assert capsys.readouterr().out.count("a smoke test of the pipeline, not a measurement") == 2


def test_scores_without_wrong_references(workplace, server, capsys):
    server.answer = lambda body: completion("[[9]]" if "poem" in str(body) else "[[3]]")
    run_judge(workplace, server)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("base "))
    assert line.split() == [
        "base",
        "5.00",
        "5.00",
        "5.00",
        "6/6",
        "6.00",
        "(n=4)",
        "-",
        "-",
    ]  # question 111 has a wrong reference


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 9])
def test_interrupted_and_continued(workplace, server, signals):
    """Ctrl-C keeps the calls in flight and exits 130; kill -9 keeps the replies that had arrived.
    The next start continues after either.
    """
    code = "import judge; from pref.files.console import run_main; run_main(judge.main)"
    given = [*arguments(workplace, server), "--concurrency", "1", "--allow_incomplete"]
    command = [sys.executable, "-c", code, *given]
    process = subprocess.Popen(
        command, cwd=Path(judge.__file__).parent, stdout=subprocess.PIPE, text=True
    )

    def answer(body):
        if len(server.paid(server_judge.PROBE)) == 3:  # the third paid call is in flight
            process.send_signal(2 if signals == 1 else 9)
        return completion("[[7]]")

    server.answer = answer
    out, _ = process.communicate(timeout=60)
    kept = 3 if signals == 1 else 2
    if signals == 1:
        assert process.returncode == 130
        assert "run the same command again" in out
        assert len(rows_of(workplace)) == 3
    assert len(server.paid(server_judge.PROBE)) == 3
    server.answer = lambda body: completion("[[7]]")
    assert run_judge(workplace, server) == 0
    assert len(server.paid(server_judge.PROBE)) == 3 + (6 - kept)


# ---- pairs, repeats, other references ------------------------------------------------------------


def test_pairs_are_judged_in_both_orders(pairs, server, capsys):
    """A judge that always prefers what is shown first: every comparison is a tie."""
    server.answer = lambda body: completion("[[A]]")
    assert run_judge(pairs, server, "--grading", "pair", "--baseline", "base") == 0
    rows = rows_of(pairs, "dpo")
    assert (
        len(rows) == 12
        and not (pairs / "results/base/mt_bench/judgements.csv").read_text().splitlines()[1:]
    )
    assert {(r["order"], r["winner"], r["baseline"], r["grading"], r["score"]) for r in rows} == {
        ("1", "dpo", "base", "pair", None),
        ("2", "base", "base", "pair", None),
    }
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("dpo "))
    assert line.split() == ["dpo", "0", "6", "0", "0.500", "6/6", "6", "-", "-"]

    server.answer = lambda body: completion("[[7]]")  # single grading beside it
    assert run_judge(pairs, server) == 0
    assert Counter(row["grading"] for row in rows_of(pairs, "dpo")) == {"single": 6, "pair": 12}
    make_run(pairs, "base", {**ANSWERS, 81: ["New.", "Newer."]})
    assert run_judge(pairs, server) == 0
    assert Counter(row["grading"] for row in rows_of(pairs, "dpo")) == {"single": 6, "pair": 8}, (
        "81's are stale"
    )


def test_a_better_answer_wins_in_both_orders(pairs, server, capsys):
    def answer(body):
        text = body["messages"][-1]["content"]
        if body["messages"] == server_judge.PROBE:
            return completion("OK")
        b = text[text.rindex("The Start of Assistant B") :]
        return completion("[[B]]" if "(other)" in b else "[[A]]")

    server.answer = answer
    assert run_judge(pairs, server, "--grading", "pair", "--baseline", "base") == 0
    first = [row for row in rows_of(pairs, "dpo") if row["turn"] == 1]
    assert {row["winner"] for row in first} == {"dpo"}


def test_repeats_are_separate_judgements(workplace, server):
    assert run_judge(workplace, server, "--repeats", "3", "--judge_seed", "5") == 0
    assert len(server.paid(server_judge.PROBE)) == 18
    assert Counter(body["seed"] for body in server.paid(server_judge.PROBE)) == {5: 6, 6: 6, 7: 6}
    assert Counter(row["repeat"] for row in rows_of(workplace)) == {0: 6, 1: 6, 2: 6}
    assert run_judge(workplace, server, "--repeats", "4", "--judge_seed", "5") == 0
    assert len(server.paid(server_judge.PROBE)) == 24


def test_corrected_references_are_other_judgements(workplace, server):
    run_judge(workplace, server)
    write_answers(workplace / "right.jsonl", {111: ["5", "9"]})
    assert run_judge(workplace, server, "--refs", f"corrected:{workplace / 'right.jsonl'}") == 0
    assert len(server.paid(server_judge.PROBE)) == 6 + 2, (
        "the other questions' requests are the same"
    )
    refs = Counter((row["refs"].split(":")[0], row["question_id"]) for row in rows_of(workplace))
    assert refs["corrected", 111] == refs["original", 111] == 2
    # FastChat's improved references are in the data folder, and are another file.
    with pytest.raises(UserError, match="--refs corrected: no .*gpt-4-0125-preview.jsonl; run"):
        run_judge(workplace, server, "--refs", "corrected")
    write_answers(workplace / "mt/reference_answer/gpt-4-0125-preview.jsonl", {111: ["6", "10"]})
    assert run_judge(workplace, server, "--refs", "corrected") == 0
    assert len(server.paid(server_judge.PROBE)) == 6 + 2 + 2
    write_answers(workplace / "wrong.jsonl", {999: ["5", "9"]})
    with pytest.raises(UserError, match="question 999 is not in the question file"):
        run_judge(workplace, server, "--refs", f"corrected:{workplace / 'wrong.jsonl'}")


# ---- the loop ------------------------------------------------------------------------------------


def test_a_store_that_cannot_be_written_stops_the_run(workplace, server, monkeypatch):
    """Workers that wait for budget meanwhile stop too."""

    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(store, "save_reply", full)
    more = options(price_in=1, price_out=10, max_retries=0, max_usd=0.03, concurrency=4)
    with pytest.raises(UserError, match="cannot be written.*disk is full"):
        run_judge(workplace, server, *more)


def test_a_shutdown_date_is_warned_of(workplace, server, capsys):
    server.models = [
        {
            "id": "big-70b",
            "object": "model",
            "created": 1,
            "owned_by": "x",
            "shutdown_date": "2027-01-14",
        }
    ]
    run_judge(workplace, server)
    assert "will be shut down on 2027-01-14" in capsys.readouterr().err


@pytest.mark.slow
def test_calls_per_minute(workplace, server):
    begun = time.monotonic()
    assert run_judge(workplace, server, "--rpm", "600") == 0
    # Six calls begin a tenth of a second apart. A slow machine may take longer.
    assert time.monotonic() - begun >= 5 * 0.1
