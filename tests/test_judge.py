"""judge.py: what is sent (FastChat's messages), what is read, what is paid for, and what survives a
fault.
"""

import json
import math
import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from doubles import HANG_UP, Server, completion, load_fastchat

import judge
import prep_data
from pref.files.console import UserError
from pref.files.disk import locked, sha256_json
from pref.files.judgements import read_judgements
from pref.judging import calls, costs, local_judge, protocol, server_judge, store

KEY = "sk-test-0123456789"
PROMPTS = [
    {
        "name": "single-v1",
        "system_prompt": "You are a fair judge.",
        "prompt_template": "Rate it like this: [[5]].\n\n"
        "[Q]\n{question}\n\n[A]\n{answer}\n[End] {{literal}}",
    },
    {
        "name": "single-math-v1",
        "system_prompt": "",
        "prompt_template": "[Q]\n{question}\n[Ref]\n{ref_answer_1}\n[A]\n{answer}",
    },
    {
        "name": "single-v1-multi-turn",
        "system_prompt": "Judge the second answer.",
        "prompt_template": "<1>\n{question_1}\n{answer_1}\n<2>\n{question_2}\n{answer_2}",
    },
    {
        "name": "single-math-v1-multi-turn",
        "system_prompt": "Judge the second answer by the reference.",
        "prompt_template": "{question_1}|{ref_answer_1}|{question_2}|{ref_answer_2}\n"
        "{answer_1}|{answer_2}",
    },
]
PROMPTS = [{**prompt, "type": "single", "output_format": "[[rating]]"} for prompt in PROMPTS]
QUESTIONS = [
    {
        "question_id": 81,
        "category": "writing",
        "turns": ["Write {a} poem.", "Shorten it: {answer}"],
    },
    {"question_id": 111, "category": "math", "turns": ["What is 2 + 2?", "And {0} times two?"]},
    {"question_id": 121, "category": "coding", "turns": ["Print {x!r}.", "Now in C: %s"]},
]
REFERENCES = {111: ["4 {", "8 }"], 121: ["print({x!r})", 'printf("%s");']}
ANSWERS = {
    81: ["Roses {are} red.\r\n[[9]]", "Red. \u00e9\u4e2d\U0001f600"],
    111: ["It is {4}.", "{{8}}"],
    121: ["print(f'{x!r}')\n", "  "],
}


# ---- what is sent -------------------------------------------------------------------------------


def our_messages(question: dict, turn: int) -> list[dict]:
    prompts = {prompt["name"]: prompt for prompt in PROMPTS}
    question_id = question["question_id"]
    return protocol.single_messages(
        prompts, question, ANSWERS[question_id], turn, REFERENCES.get(question_id, [])
    )


@pytest.mark.parametrize(
    ("index", "turn", "sha256"),
    # Of the messages that FastChat 0.2.36's own run_judge_single sends
    # (test_messages_by_fastchats_own_code)
    [
        (0, 1, "fb46821e0bb6f1ca84b851f5464a71ac2043624089cb246dfe7399b20c60fc05"),
        (0, 2, "098f82ca94248f984282db4da84d451f1e6efd8470e74943a46d33a07948d543"),
        (1, 1, "a47bb5d7b3b5057d5627689b7425b231fbb53f23e50858dc0658eaec4b3271b8"),
        (1, 2, "7a53b4b326f377c3f64e857efdcc44068803ffd2825d5458d6c5dccff91521f9"),
        (2, 1, "1c8a0b26a7240a13c0711778354184df0a182a4cfed869e55ed919d7401c8b08"),
        (2, 2, "1ae8206d60fcd828d4ba2dd28b867d5a5fe2eb8a956fd75eaa55a133b84dc197"),
    ],
)
def test_messages_are_fastchats(index, turn, sha256):
    assert sha256_json(our_messages(QUESTIONS[index], turn)) == sha256


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # FastChat's regular expressions are not raw strings
def test_messages_by_fastchats_own_code(monkeypatch):
    fastchat = load_fastchat(monkeypatch)
    sent = []
    fastchat.chat_completion_openai = lambda model, conv, **kwargs: (
        sent.append((conv.to_openai_api_messages(), kwargs)) or "[[7]]"
    )
    prompts = {prompt["name"]: prompt for prompt in PROMPTS}
    for question in QUESTIONS:
        question_id, math_like = (
            question["question_id"],
            question["category"] in fastchat.NEED_REF_CATS,
        )
        reference = {"choices": [{"turns": REFERENCES[question_id]}]} if math_like else None
        for turn in (1, 2):
            name = ("single-math-v1" if math_like else "single-v1") + (
                "-multi-turn" if turn == 2 else ""
            )
            fastchat.run_judge_single(
                question,
                {"choices": [{"turns": ANSWERS[question_id]}]},
                fastchat.Judge("the-judge", prompts[name], multi_turn=turn == 2),
                reference,
                multi_turn=turn == 2,
            )
            messages, parameters = sent.pop()
            assert messages == our_messages(question, turn)
            assert parameters == {
                "temperature": protocol.TEMPERATURE,
                "max_tokens": protocol.MAX_TOKENS,
            }
    for text in [text for text, _ in RATINGS]:
        fastchat.chat_completion_openai = lambda *args, text=text, **kwargs: text
        theirs = fastchat.run_judge_single(
            QUESTIONS[0],
            {"choices": [{"turns": ANSWERS[81]}]},
            fastchat.Judge("the-judge", prompts["single-v1"]),
            None,
        )[0]
        assert protocol.read_rating(text) == (theirs if 1 <= theirs <= 10 else None), text


# ---- what is read -------------------------------------------------------------------------------

RATINGS = [
    ("Good. Rating: [[7]]", 7),
    ("[[7.5]] and more", 7.5),
    ("[[8.]]", 8),
    ("first [[3]], later [[9]]", 3),
    ("one bracket [6]", 6),
    ("[2] comes first, but [[4]] counts", 4),
    ("[[10]]", 10),
    ("[[1]]", 1),
    ("[[[5]]]", 5),
    ("Rating: [[7/10]]", None),
    ("Rating: [[ 7 ]]", None),
    ("Rating: [[-3]]", None),
    ("Rating: [[0]]", None),
    ("Rating: [[11]]", None),
    ("[[0]] then [5]", None),  # the double bracket is what counts, as in FastChat
    ("[[99999999999999999999]]", None),
    ("Rating: 7", None),
    ("[[rating]]", None),
    ("[[8", None),
    ("[[7,8]]", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "rating"), RATINGS)
def test_rating(text, rating):
    assert protocol.read_rating(text) == rating


def test_huge_rating_is_none():
    assert protocol.read_rating(f"[[{'9' * 400}]]") is None  # inf as a float


# ---- a server double: faults and counting -------------------------------------------------------


def refusal(status: int, message: str, **fields) -> tuple[int, dict]:
    return status, {"error": {"message": message, **fields}}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Questions, references, prompts, and the run `base` with an answer to each question."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    write_lines(tmp_path / "mt/question.jsonl", QUESTIONS)
    write_lines(tmp_path / "mt/judge_prompts.jsonl", PROMPTS)
    write_answers(tmp_path / "mt/reference_answer/gpt-4.jsonl", REFERENCES)
    make_run(tmp_path, "base", ANSWERS)
    return tmp_path


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_answers(path: Path, answers: dict[int, list[str]]) -> None:
    write_lines(
        path,
        [
            {"question_id": q, "choices": [{"index": 0, "turns": turns}]}
            for q, turns in answers.items()
        ],
    )


def make_run(folder: Path, name: str, answers: dict[int, list[str]]) -> Path:
    run = folder / "results" / name
    write_answers(run / "mt_bench/answers.jsonl", answers)
    (run / "args.json").write_text("{}")
    return run


def run_judge(folder: Path, server: Server, *more: str, model: str = "big-70b") -> int:
    arguments = [
        str(folder / "results"),
        "--mt_bench",
        str(folder / "mt"),
        "--judge",
        model,
        "--base_url",
        server.url,
    ]
    return judge.main([*arguments, "--allow_incomplete", *more])  # one of the answers is empty


def rows_of(folder: Path, name: str = "base") -> list[dict]:
    return read_judgements(folder / "results" / name / "mt_bench/judgements.csv")


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


def test_key_is_the_hash_of_the_stored_request(workplace, server):
    run_judge(workplace, server)
    with sqlite3.connect(workplace / "results/judgements.sqlite") as store:
        stored = store.execute("SELECT request_sha256, request FROM judgements").fetchall()
    assert all(key == sha256_json(json.loads(request)) for key, request in stored)
    assert {row["request_sha256"] for row in rows_of(workplace)} == {key for key, _ in stored}


def test_identical_answers_are_judged_once(workplace, server):
    make_run(workplace, "td_dpo", {**ANSWERS, 81: ["Other.", "Red."]})
    assert (
        run_judge(workplace, server, "--concurrency", "1") == 0
    )  # one at a time: the order of arrival is looked at
    assert len(server.paid(server_judge.PROBE)) == 6 + 2
    assert len(rows_of(workplace, "td_dpo")) == 6
    order = [body["messages"][-1]["content"] for body in server.paid(server_judge.PROBE)]
    last_poem = max(index for index, text in enumerate(order) if "poem" in text)
    assert last_poem < 4, "question 81 of both runs comes before the last questions"


def test_one_run_folder_uses_its_results_folders_store(workplace, server):
    make_run(workplace, "td_dpo", ANSWERS)
    arguments = [
        "--mt_bench",
        str(workplace / "mt"),
        "--judge",
        "big-70b",
        "--base_url",
        server.url,
        "--allow_incomplete",
    ]
    assert judge.main([str(workplace / "results/td_dpo"), *arguments]) == 0
    assert not (workplace / "results/base/mt_bench/judgements.csv").exists()
    assert run_judge(workplace, server) == 0
    assert len(server.paid(server_judge.PROBE)) == 6


def test_two_judges_stand_side_by_side_and_stale_answers_go(workplace, server):
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
        ),  # torn, and called text/html
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
        "what failed is not paid for again unasked"
    )
    assert run_judge(workplace, server, "--retry_failed") == 0
    assert len(server.paid(server_judge.PROBE)) == before + 2, "the two failed ones alone"
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


@pytest.mark.parametrize("retry_after", [True, False])
def test_rate_limit_is_waited_out(workplace, server, retry_after):
    seen, server.retry_after = Counter(), retry_after

    def answer(body):
        seen[str(body)] += 1
        return refusal(429, "slow down") if seen[str(body)] == 1 else completion("[[7]]")

    server.answer = answer
    assert run_judge(workplace, server) == 0
    assert set(seen.values()) == {2}


def test_no_credit_stops_at_once(workplace, server):
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
def test_probe_names_the_remedy_before_anything_is_paid(workplace, server, reply, message):
    server.answer = lambda body: reply
    with pytest.raises(UserError, match=message) as error:
        run_judge(workplace, server, "--max_retries", "0")
    assert "--judge" in str(error.value)
    assert KEY not in str(error.value)
    assert server.paid(server_judge.PROBE) == []


def test_a_key_withdrawn_halfway_stops_the_run(workplace, server):
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


def test_server_gone_halfway_is_noticed(workplace, server, monkeypatch):
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


def test_the_key_stands_in_no_file(workplace, server, capsys):
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
    ]  # 111 is a wrong one


@pytest.mark.parametrize("signals", [1, 9])
def test_interrupted_and_continued(workplace, server, signals):
    """Ctrl-C keeps what is in flight and exits 130; kill -9 keeps what had come back. Both go on
    where they stopped.
    """
    code = "import judge; from pref.files.console import run_main; run_main(judge.main)"
    command = [
        sys.executable,
        "-c",
        code,
        str(workplace / "results"),
        "--mt_bench",
        str(workplace / "mt"),
        "--judge",
        "big-70b",
        "--base_url",
        server.url,
        "--concurrency",
        "1",
        "--allow_incomplete",
    ]
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


# ---- pairs, repeats, other references -----------------------------------------------------------

OTHER = {q: [f"{text} (other)" for text in turns] for q, turns in ANSWERS.items()}


def own_prompts() -> dict:
    lines = (
        (Path(judge.__file__).parent / "examples" / "judge_prompts.jsonl").read_text().splitlines()
    )
    return {row["name"]: row for row in map(json.loads, lines)}


@pytest.fixture
def pairs(workplace):
    """A second run, and prompts for pairs."""
    write_lines(workplace / "mt/judge_prompts.jsonl", list(own_prompts().values()))
    make_run(workplace, "dpo", OTHER)
    return workplace


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pairs_by_fastchats_own_code(monkeypatch):
    """Messages of both orders and turns, parameters, and who wins."""
    fastchat, sent, prompts = load_fastchat(monkeypatch), [], own_prompts()
    answers = [
        {"choices": [{"turns": side}]}
        for side in (ANSWERS[111], ['{0} [[9]] \u4f60\t"q"', "\u0434\u0430\n"])
    ]
    texts = iter(["so [[A]]", "[[B]]", "[[C]] tie", "[[B]] or [[A]]", "[A]", "none"] * 4)
    said = []

    def complete(model, conv, **kwargs):
        sent.append((conv.to_openai_api_messages(), kwargs))
        said.append(next(texts))
        return said[-1]

    fastchat.chat_completion_openai = complete
    for question in QUESTIONS:
        math_like = question["category"] in fastchat.NEED_REF_CATS
        reference = (
            {"choices": [{"turns": REFERENCES[question["question_id"]]}]} if math_like else None
        )
        for turn in (1, 2):
            name = ("pair-math-v1" if math_like else "pair-v2") + (
                "-multi-turn" if turn == 2 else ""
            )
            match = fastchat.MatchPair(
                question,
                "run",
                "base",
                *answers,
                fastchat.Judge("the-judge", prompts[name], multi_turn=turn == 2),
                reference,
                turn == 2,
            )
            theirs = fastchat.play_a_match_pair(match, None)
            for order, key in zip(protocol.ORDERS, ("g1_winner", "g2_winner")):
                messages, parameters = sent.pop(0)
                sides = [answer["choices"][0]["turns"] for answer in answers]
                sides = sides if order == "1" else sides[::-1]
                refs = REFERENCES.get(question["question_id"], [])
                assert messages == protocol.pair_messages(prompts, question, *sides, turn, refs)
                assert parameters == {
                    "temperature": protocol.TEMPERATURE,
                    "max_tokens": protocol.MAX_TOKENS,
                }
                verdict = protocol.read_verdict(said.pop(0))
                winner = protocol.winner_of(order, verdict, "model_1", "model_2")
                assert winner == (None if theirs[key] == "error" else theirs[key])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_all_eighty_questions_by_fastchats_own_code(monkeypatch, tmp_path):
    """MT-Bench's own questions and references, every turn, single and pair, answers with all that
    could go wrong. With the toolkit's judge prompts, or those in the folder that the environment's
    MT_BENCH names.
    """
    folder = Path(os.environ.get("MT_BENCH", tmp_path))
    if folder == tmp_path:
        assert prep_data.main(["--mt_bench", "flexeval", "--out", str(tmp_path)]) in (0, None)
    fastchat, sent = load_fastchat(monkeypatch), []
    fastchat.chat_completion_openai = lambda model, conv, **_: (
        sent.append(conv.to_openai_api_messages()) or "[[C]]"
    )
    awkward = [
        "{x} {{y}} {0} [[9]] \"q\" 's'\t\u4f60\u597d \u0430\r\n",
        "%s {question} \\n [[A]] \U0001f600 </s>\n",
    ]
    sides = [awkward, [text[::-1] for text in awkward]]
    answers = [{"choices": [{"turns": side}]} for side in sides]
    benches = {
        grading: protocol.read_bench(folder, grading, "original") for grading in ("single", "pair")
    }
    questions = benches["single"].questions
    assert len(questions) == 80
    for question in questions:
        math_like = question["category"] in fastchat.NEED_REF_CATS
        turns = benches["single"].references.get(question["question_id"], [])
        reference = {"choices": [{"turns": turns}]} if math_like else None
        for turn in (1, 2):
            for grading, kind in (("single", "single"), ("pair", "pair")):
                prompts = benches[grading].prompts
                name = (
                    f"{kind}-math-v1"
                    if math_like
                    else {"single": "single-v1", "pair": "pair-v2"}[kind]
                )
                theirs = fastchat.Judge(
                    "the-judge", prompts[name + ("-multi-turn" if turn == 2 else "")]
                )
                if grading == "single":
                    fastchat.run_judge_single(
                        question, answers[0], theirs, reference, multi_turn=turn == 2
                    )
                    mine = protocol.single_messages(prompts, question, sides[0], turn, turns)
                else:
                    fastchat.run_judge_pair(
                        question, *answers, theirs, reference, multi_turn=turn == 2
                    )
                    mine = protocol.pair_messages(prompts, question, *sides, turn, turns)
                assert mine == sent.pop(), (question["question_id"], turn, grading)


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
        b = text[text.index("## B") :] if "## B" in text else text[text.rindex("B") :]
        return completion("[[B]]" if "(other)" in b else "[[A]]")

    server.answer = answer
    assert run_judge(pairs, server, "--grading", "pair", "--baseline", "base") == 0
    first = [row for row in rows_of(pairs, "dpo") if row["turn"] == 1]
    assert {row["winner"] for row in first} == {"dpo"}


def test_repeats_are_judgements_of_their_own(workplace, server):
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
    write_answers(workplace / "wrong.jsonl", {999: ["5", "9"]})
    with pytest.raises(UserError, match="question 999 is not in the question file"):
        run_judge(workplace, server, "--refs", f"corrected:{workplace / 'wrong.jsonl'}")


# ---- what a judgement is stored under -----------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parameters", "sha256"),
    [
        (
            ["--grading", "single"],
            {},
            "c0db947c81c88f1d3f5633565e2216fb833f69afa7acd5c4db9e9edd46815ea6",
        ),
        (
            ["--grading", "single", "--repeats", "2"],
            {"seed": 5},
            "7bd3aba97d96efec44052cda4b5a5339e195eef25c1be334edaccba0e7f2cdf4",
        ),
        (
            ["--grading", "pair", "--baseline", "base"],
            {},
            "d5699a772df7168d181b5fa3a57ea282098f42a0870c671c0f054bc26a9c0ab1",
        ),
    ],
)
def test_request_hashes_do_not_change(options, parameters, sha256):
    """Else everything that was judged before would be paid for again. The expected values are those
    of commit a8c848b.
    """
    bench = protocol.Bench(
        folder=Path("unused"),
        questions=QUESTIONS,
        references=REFERENCES,
        refs="original",
        prompts=own_prompts() | {prompt["name"]: prompt for prompt in PROMPTS},
        label="own",
    )
    answers = {"base": ANSWERS, "dpo": OTHER}
    runs = {
        Path("results") / name: {(q, 0): {"turns": turns} for q, turns in of_run.items()}
        for name, of_run in answers.items()
    }
    the_judge = protocol.Judge(
        name="big-70b",
        params_b=70.0,
        parameters={"temperature": 0, "max_tokens": 2048, **parameters},
        ask=None,
        concurrency=1,
    )
    args = judge.parse_args(["results", "--judge", the_judge.name, *options])
    items = judge.make_items(runs, bench, the_judge, args)
    assert sha256_json([item.request_sha256 for item in items]) == sha256


def test_the_schema_does_not_change_within_its_version():
    expected = "c0327ef4cb1f721c5f05c1c73a993edef5080b354cff0bbaa094096a31ae94a0"
    assert store.SCHEMA_VERSION == 1 and sha256_json(store.SCHEMA) == expected


def test_a_judge_behind_a_server_needs_no_torch():
    code = "import judge, sys; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], cwd=Path(judge.__file__).parent, check=True)


# ---- money --------------------------------------------------------------------------------------

PRICED = ("--price_in", "1000", "--price_out", "2000")


def test_costs_are_booked(workplace, server, capsys):
    assert run_judge(workplace, server, *PRICED) == 0
    assert [row["cost_usd"] for row in rows_of(workplace)] == [pytest.approx(0.011 + 0.006)] * 6
    out = capsys.readouterr().out
    assert (
        "estimate: 6 calls" in out and f"total cost recorded there: {6 * 0.017:.4f} dollars" in out
    )


def test_a_failures_cost_is_kept(workplace, server):
    server.answer = lambda body: completion("No rating.")
    run_judge(workplace, server, *PRICED)
    server.answer = lambda body: completion("[[7]]")
    run_judge(workplace, server, *PRICED, "--retry_failed")
    assert [row["cost_usd"] for row in rows_of(workplace)] == [pytest.approx(2 * 0.017)] * 6


@pytest.mark.parametrize("trial", range(20))
def test_the_cap_is_never_passed(workplace, server, trial):
    """Random answers, random token counts, 32 calls in flight; what the server bills is what
    counts.
    """
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
    more = (
        "--price_in",
        "1",
        "--price_out",
        "10",
        "--max_usd",
        str(cap),
        "--concurrency",
        "32",
        "--max_tokens",
        "2048",
        "--max_retries",
        "0",
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


def test_a_reply_without_counts_is_booked_at_the_most_it_can_have_cost(workplace, server):
    status, reply = completion("[[7]]")
    server.answer = lambda body: (status, {k: v for k, v in reply.items() if k != "usage"})
    more = (
        "--price_in",
        "1",
        "--price_out",
        "10",
        "--max_retries",
        "0",
        "--max_usd",
        "0.05",
        "--concurrency",
        "1",
    )
    with pytest.raises(UserError, match="could pass the cap; 4 requests are left"):
        run_judge(workplace, server, *more)
    assert (
        all(0.02 < row["cost_usd"] < 0.03 for row in rows_of(workplace))
        and len(rows_of(workplace)) == 2
    )
    with pytest.raises(UserError, match="could pass the cap; 4 requests are left"):
        run_judge(workplace, server, *more)  # what is lost is remembered


def test_a_cap_wants_calls_of_limited_length(workplace, server):
    with pytest.raises(UserError, match="must limit the tokens of a call"):
        run_judge(
            workplace, server, *PRICED, "--max_usd", "1", "--parameters", '{"temperature": 0}'
        )


def test_prices_are_of_exact_names_and_of_openai_alone(monkeypatch):
    def prices(*more):
        return costs.prices_of(judge.parse_args(["results", *more]))

    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert prices("--judge", "gpt-4o") == (2.5, 10)
    assert prices("--judge", "gpt-5-pro") is None and prices("--judge", "gpt-4o-2024-05-13") is None
    assert prices("--judge", "gpt-4o", "--base_url", "http://localhost:8000/v1") is None
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1")
    assert prices("--judge", "gpt-4o") is None


def test_a_dry_run_leaves_the_books_alone(workplace, server):
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


def test_two_judges_at_a_time_are_refused(workplace, server):
    held = locked(workplace / "results", ".judge.lock", "is being judged")
    with held, pytest.raises(UserError, match="is being judged by process"):
        run_judge(workplace, server)
    assert server.requests == []


def test_a_store_that_cannot_be_written_stops_the_run(workplace, server, monkeypatch):
    """With workers waiting for budget meanwhile: nobody waits for ever."""

    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(store, "save_reply", full)
    more = (
        "--price_in",
        "1",
        "--price_out",
        "10",
        "--max_retries",
        "0",
        "--max_usd",
        "0.03",
        "--concurrency",
        "4",
    )
    with pytest.raises(UserError, match="cannot be written.*disk is full"):
        run_judge(workplace, server, *more)


def test_answers_of_an_older_adapter_are_refused(workplace, server):
    run = make_run(workplace, "dpo", OTHER)
    path = run / "mt_bench/answers.jsonl"
    rows = [
        json.loads(line) | {"adapter_sha256": "0" * 64} for line in path.read_text().splitlines()
    ]
    write_lines(path, rows)
    (run / "adapter").mkdir()
    (run / "adapter/adapter_model.safetensors").write_bytes(b"retrained")
    with pytest.raises(UserError, match="run dpo: its answers are from an older adapter"):
        run_judge(workplace, server)


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


def test_a_pairs_batch_names_the_order(pairs, server):
    batch = pairs / "batch.jsonl"
    more = ("--grading", "pair", "--baseline", "base", "--dry_run", "--requests", str(batch))
    assert run_judge(pairs, server, *more) == 0
    ids = [json.loads(line)["custom_id"].split("-")[:3] for line in batch.read_text().splitlines()]
    assert ids == [[q, t, o] for q in ("81", "111", "121") for t in "12" for o in "12"]


def test_the_models_end_is_warned_of(workplace, server, capsys):
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


def test_calls_a_minute(workplace, server):
    begun = time.monotonic()
    assert run_judge(workplace, server, "--rpm", "600") == 0
    assert (
        time.monotonic() - begun >= 5 * 0.1
    )  # six calls, a tenth of a second apart: a floor, no ceiling


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (
            {81: ["a", "b"], 111: ["a", "b"]},
            "run dpo: 1 of 3 answers are missing that other runs have",
        ),
        (
            {81: ["a", "b"], 111: ["a", ""], 121: ["a", "b"]},
            "run dpo: 1 of 3 answers have an empty turn",
        ),
    ],
)
def test_incomplete_answers_are_refused_before_anything_is_paid(workplace, server, answers, said):
    make_run(workplace, "base", {q: ["a", "b"] for q in ANSWERS})
    make_run(workplace, "dpo", answers)
    arguments = [
        str(workplace / "results"),
        "--mt_bench",
        str(workplace / "mt"),
        "--judge",
        "m",
        "--base_url",
        server.url,
    ]
    with pytest.raises(UserError, match=said):
        judge.main(arguments)
    assert server.requests == []


# ---- a user's mistakes --------------------------------------------------------------------------


def test_no_judge_names_both_forms(workplace):
    with pytest.raises(UserError) as error:
        judge.main([str(workplace / "results")])
    for part in ("--judge", "hf:PATH", "--base_url", "2026-10-23", "2027-01-14"):
        assert part in str(error.value)


def test_no_key(workplace, server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match=r"export OPENAI_API_KEY=.*any text will do"):
        run_judge(workplace, server)


def test_unknown_question(workplace, server):
    make_run(workplace, "base", {**ANSWERS, 999: ["a", "b"]})
    with pytest.raises(UserError, match=r"answers.jsonl: question_id 999 is not in"):
        run_judge(workplace, server)
    assert server.requests == []


def test_runs_without_answers_are_named_and_passed_over(workplace, server, capsys):
    (make_run(workplace, "dpo", {}) / "mt_bench/answers.jsonl").unlink()
    assert run_judge(workplace, server) == 0
    assert "no answers for run dpo; run python gen_mtbench.py" in capsys.readouterr().err
    (workplace / "results/base/mt_bench/answers.jsonl").unlink()
    with pytest.raises(UserError, match="run gen_mtbench.py first"):
        run_judge(workplace, server)


def test_missing_reference(workplace, server):
    write_answers(workplace / "mt/reference_answer/gpt-4.jsonl", {111: ["4", "8"]})
    with pytest.raises(UserError, match="no reference for question 121"):
        run_judge(workplace, server)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_template": "{question}"}, "exactly the fields {answer}, {question}"),
        ({"prompt_template": "{question} {answer"}, "literal braces"),
        ({"output_format": "[[A]]"}, "output_format"),
        ({"name": "else"}, "no prompt named single-v1"),
        ({"system_prompt": None}, "must be text"),
    ],
)
def test_bad_prompts(workplace, server, change, message):
    write_lines(workplace / "mt/judge_prompts.jsonl", [{**PROMPTS[0], **change}, *PROMPTS[1:]])
    with pytest.raises(UserError) as error:
        run_judge(workplace, server)
    assert message in str(error.value)
    assert "judge_prompts.jsonl" in str(error.value)


def test_manifest_may_not_call_other_prompts_mt_benchs(workplace, server):
    (workplace / "mt/manifest.json").write_text('{"prompts": "mt_bench"}')
    with pytest.raises(UserError, match="not MT-Bench's prompts"):
        run_judge(workplace, server)
    (workplace / "mt/manifest.json").write_text('{"prompts": "own"}')
    assert run_judge(workplace, server) == 0


def test_a_file_that_is_no_store(workplace, server):
    (workplace / "results/judgements.sqlite").write_text("not a database, " * 100)
    with pytest.raises(UserError, match="move it away"):
        run_judge(workplace, server)


# ---- a local judge ------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A random Llama of some thousand parameters whose tokenizer splits "10" in two."""
    import tokenizers
    import torch
    import transformers

    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(
        ["Rating: [[5]] or [[7]] of the answer", "the question and the answer"] * 50, trainer
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.5,
    )
    folder = tmp_path_factory.mktemp("tiny")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def naive_score(model, tokenizer, messages: list[dict]) -> tuple[float, list[float]]:
    """Ten whole sequences, a full forward each; probabilities multiplied token by token."""
    import torch

    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    probabilities = []
    for rating in range(1, 11):
        string = tokenizer(f"[[{rating}]]", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            probs = model(torch.tensor([prompt + string])).logits[0].double().softmax(-1)
        steps = [probs[len(prompt) + i - 1, token].item() for i, token in enumerate(string)]
        probabilities.append(math.prod(steps))
    return sum(r * p for r, p in enumerate(probabilities, 1)) / sum(probabilities), probabilities


def test_local_score_equals_the_naive_one(tiny):
    model, tokenizer = local_judge.load_judge(str(tiny), "float32")
    for question in QUESTIONS:
        messages = our_messages(question, 2)
        reply = local_judge.ask_local(model, tokenizer, {"messages": messages})
        score, probabilities = naive_score(model, tokenizer, messages)
        assert reply["status"] == "ok"
        assert reply["score"] == pytest.approx(score, rel=1e-5)
        said = json.loads(reply["judgement"])
        assert list(said) == [str(rating) for rating in range(1, 11)]
        assert list(said.values()) == pytest.approx(probabilities, rel=1e-4)


def test_rating_strings_have_different_lengths(tiny):
    _, tokenizer = local_judge.load_judge(str(tiny), "float32")
    ids, ratings = local_judge.encode_ratings(tokenizer, "<|assistant|>\n")
    assert len(set(map(len, ratings))) > 1, "or padding is not tested"
    assert tokenizer.decode(ids + ratings[9]) == "<|assistant|>\n[[10]]"


def test_a_string_that_merges_with_the_prompt_is_encoded_alone(tiny):
    _, tokenizer = local_judge.load_judge(str(tiny), "float32")
    prompt = "of the ["  # "[[" is one token after it was trained, so the boundary falls inside it
    ids, ratings = local_judge.encode_ratings(tokenizer, prompt)
    assert ids == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert ratings[0] == tokenizer("[[1]]", add_special_tokens=False)["input_ids"]


def test_local_judge_end_to_end(workplace, tiny, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    command = [
        str(workplace / "results"),
        "--mt_bench",
        str(workplace / "mt"),
        "--judge",
        f"hf:{tiny}",
        "--allow_incomplete",
    ]
    assert judge.main([*command, "--dtype", "float32"]) == 0
    rows = rows_of(workplace)
    assert all(row["status"] == "ok" and 1 < row["score"] < 10 for row in rows)
    assert len({row["score"] for row in rows}) == 6
    assert 0 < rows[0]["judge_params_b"] < 0.001
    assert "smoke test" in capsys.readouterr().out

    asked = []
    monkeypatch.setattr(local_judge, "ask_local", lambda *args: asked.append(1))
    assert judge.main([*command, "--dtype", "float32"]) == 0
    assert not asked
    assert rows_of(workplace) == rows


def test_a_prompt_beyond_the_context_has_no_score(workplace, tiny):
    make_run(workplace, "base", {**ANSWERS, 81: ["word " * 600, "x"]})
    command = [
        str(workplace / "results"),
        "--mt_bench",
        str(workplace / "mt"),
        "--judge",
        f"hf:{tiny}",
        "--allow_incomplete",
    ]
    assert judge.main(command) == 1
    rows = {(row["question_id"], row["turn"]): row for row in rows_of(workplace)}
    assert (rows[81, 1]["status"], rows[81, 1]["score"]) == ("context", None)
    assert rows[111, 1]["status"] == "ok"


def test_other_weights_at_the_same_path_are_another_judge(tiny):
    import torch

    from pref.model.loading import fingerprint

    model, _ = local_judge.load_judge(str(tiny), "float32")
    before = fingerprint(model)
    assert fingerprint(local_judge.load_judge(str(tiny), "float32")[0]) == before
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    assert fingerprint(model) != before


def test_a_path_that_is_no_model(workplace, tmp_path):
    with pytest.raises(UserError, match="--judge hf:"):
        local_judge.load_judge(str(tmp_path), "float32")
