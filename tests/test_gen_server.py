"""Answers through a server that answers in every way that servers do."""

import itertools
import json
from types import SimpleNamespace

import pytest
from conftest import write_jsonl
from doubles import completion

import gen_mtbench
from pref.answering import served
from pref.files.console import UserError
from pref.model import completions, server


@pytest.fixture
def asked(tmp_path, server, monkeypatch):
    """`asked(*options)` lets the server answer as the base model; `asked.rows()` reads the file."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1")
    return Asked(tmp_path, server.url)


CLIENT = SimpleNamespace(api_key="x", base_url="http://host/v1/", default_query={})


class Asked:
    def __init__(self, folder, url):
        self.folder, self.url = folder, url
        questions = [
            {"question_id": number, "turns": [f"Question {number}?", "Again?"]}
            for number in range(1, 7)
        ]
        self.questions = write_jsonl(folder / "q.jsonl", questions)

    def __call__(self, *options) -> int:
        fixed = ["--base", "--model", "m", "--temperature", "0.7", "--questions", self.questions]
        arguments = [self.folder / "r", *fixed, "--base_url", self.url, *options]
        return gen_mtbench.main([str(argument) for argument in arguments])

    def rows(self) -> dict[int, dict]:
        path = self.folder / "r" / "base" / "q" / "answers.jsonl"
        rows = map(json.loads, path.read_text("utf-8").splitlines() if path.exists() else [])
        return {row["question_id"]: row for row in rows}

    def failures(self) -> list[dict]:
        path = self.folder / "r" / "base" / "q" / "failures.jsonl"
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def changed(**fields):
    """A completion with fields of its body replaced."""
    status, body = completion("Fine.")
    return status, body | fields


def test_a_server_may_not_count(asked, server, capsys):
    usages = itertools.cycle([{}, None, "none", {"completion_tokens": None}, [3]])
    server.answer = lambda body: changed(usage=next(usages))
    assert asked() == 0
    (choice,) = asked.rows()[1]["choices"]
    assert choice["turns"] == ["Fine.", "Fine."] and choice["tokens"] == [None, None]
    assert choice["truncated"] == [False, False]


def test_texts_that_cannot_be_encoded_and_lists_of_parts(asked, server):
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "A \ud83d"}, " b"]
    server.answer = lambda body: completion(parts)
    assert asked() == 0
    assert asked.rows()[6]["choices"][0]["turns"] == ["A ? b", "A ? b"]
    assert asked() == 0 and len(server.requests) == 12


def test_what_was_sent_is_in_the_rows_and_refused_options_are_left_out(asked, server, capsys):
    """One after another, as a server names them; max_tokens under its new name."""
    refusals = {
        "chat_template_kwargs": (400, "Unrecognized request argument supplied: {}"),
        "seed": (422, "extra fields not permitted: {}"),
        "max_tokens": (400, "Use 'max_completion_tokens' instead of '{}'."),
    }

    def answer(body):
        for name, (status, text) in refusals.items():
            if name in body:
                return status, {"error": {"message": text.format(name)}}
        return completion("A")

    server.answer = answer
    assert asked() == 0
    (first, second) = asked.rows()[2]["choices"][0]["sent"]
    assert first == second == {"temperature": 0.7, "top_p": 1, "max_completion_tokens": 1024}
    shown = capsys.readouterr().out
    assert "does not accept seed: sampled answers cannot be reproduced" in shown
    server.answer, refusals = lambda body: completion("A"), {}
    (asked.folder / "r/base/q/answers.jsonl").unlink()
    assert asked() == 0
    sent = asked.rows()[2]["choices"][0]["sent"]
    assert sent[0]["chat_template_kwargs"]["enable_thinking"] is False
    assert sent[0]["seed"] != sent[1]["seed"]


def error(status, text="no"):
    return status, {"error": {"message": text}}


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (completion("", finish="content_filter"), "content filter refused it"),
        (completion(None, refusal="I cannot."), r"content filter refused it \(I cannot"),
        (completion([{"type": "refusal", "refusal": "I cannot."}]), r"refused it \(I cannot"),
        (completion("", reasoning_content="Hmm."), "thoughts alone, no answer"),
        (completion(None, "length", reasoning="Hmm"), "which --max_new_tokens cut off"),
        (completion(None, "tool_calls", tool_calls=[{"id": "1"}]), "calls tools in place"),
        ((200, {"choices": []}), "its reply has no message"),
        (completion("half", finish="abort"), "gave it up halfway"),
        ((200, ""), "its reply is empty"),
        ((200, '{"choices": [{"mess'), "breaks off"),
        ((200, 'data: {"choices": []}\n\ndata: [DONE]\n'), "streams its reply"),
        ((200, "<!DOCTYPE html><title>Sign in</title>"), "a web page .*Sign in"),
        ((200, {"error": {"code": 502, "message": "upstream"}}), "200 with an error.*upstream"),
        ((200, {"id": "x"}), "usually ends in /v1"),
        ((200, [1]), "usually ends in /v1"),
    ],
)
def test_a_reply_without_an_answer_is_called_what_it_is(reply, reason):
    body = reply[1] if isinstance(reply[1], str) else json.dumps(reply[1])
    with pytest.raises(served.Refused, match=reason):
        served.reply_of(CLIENT, body, sent={"messages": []})


def test_an_empty_answer_is_an_answer():
    reply = served.reply_of(CLIENT, json.dumps(completion("")[1]), sent={"messages": []})
    assert reply.text == "" and not reply.truncated


@pytest.mark.slow
def test_one_turn_that_fails_is_named_and_the_rest_goes_on(asked, server, capsys):
    """Question 1 is the first to be asked. Once it is answered, nothing is left of the failure."""
    ill = lambda body: body["messages"][0]["content"] == "Question 1?"  # noqa: E731
    server.answer = lambda body: error(403, "blocked") if ill(body) else completion("A")
    assert asked("--concurrency", "1") == 1
    assert sorted(asked.rows()) == [2, 3, 4, 5, 6]
    expected = {"question_id": 1, "choice": 0, "turn": 1, "reason": "HTTP 403: blocked"}
    assert asked.failures() == [expected]
    assert "base: question 1, turn 1 is not answered: HTTP 403" in capsys.readouterr().out
    before = len(server.requests)
    assert asked() == 1  # again, and nothing else
    assert all(ill(body) for body in server.requests[before:])
    server.answer = lambda body: completion("A")
    assert asked() == 0 and sorted(asked.rows()) == [1, 2, 3, 4, 5, 6]
    assert not (asked.folder / "r/base/q/failures.jsonl").exists()


@pytest.mark.slow
def test_what_every_request_meets_ends_the_work(asked, server):
    """At the start after three conversations, later after ten in a row; nothing is lost."""
    server.answer = lambda body: error(400, "maximum context length is 12")
    with pytest.raises(UserError, match="answers 400.*maximum context.*Is its context long"):
        asked()
    assert len(server.requests) == served.TRIES_AT_THE_START
    assert [row["question_id"] for row in asked.failures()] == [1, 2, 3]
    good = iter([1, 1])
    server.answer = lambda body: completion("A") if next(good, 0) else error(400)
    with pytest.raises(UserError, match="10 failures in a row"):
        asked("--num_choices", "3", "--concurrency", "1")
    assert len(server.requests) <= 3 + 2 + served.GIVE_UP_AFTER + 1  # one more was in flight


@pytest.mark.parametrize(
    ("status", "message"), [(401, "refuses the key"), (404, "no such model"), (301, "redirects")]
)
def test_what_no_request_escapes_ends_at_once(asked, server, status, message):
    server.answer = lambda body: error(status)
    with pytest.raises(UserError, match=message):
        asked()
    assert len(server.requests) == 1


def test_a_conversation_that_the_server_cuts_is_marked(asked, server, capsys):
    """ollama answers after num_ctx tokens as if nothing had happened."""
    write_jsonl(asked.questions, [{"question_id": 1, "turns": ["word " * 300]}])
    server.answer = lambda body: completion("A")  # prompt_tokens 11
    assert asked() == 0
    assert asked.rows()[1]["choices"][0]["overflow"] == [True]
    assert "in 1 turns the server has read fewer tokens" in capsys.readouterr().out


# ---- the client ----------------------------------------------------------------------------------


def test_parameters_of_the_address_stay_with_each_request(asked, server):
    """Azure's: the deployment's path, api-version behind it, the key as api-key."""
    seen = []
    handler = server.httpd.RequestHandlerClass
    original = handler.do_POST

    def do_post(self):
        seen.append((self.path, self.headers["api-key"]))
        original(self)

    handler.do_POST = do_post
    deployment, version = "/openai/deployments/d", "?api-version=2024-10-21"
    asked.url = server.url.replace("/v1", deployment) + "/chat/completions" + version
    assert asked("--num_questions", "1") == 0
    assert seen == [(f"{deployment}/chat/completions{version}", "sk-secret-1")] * 2
    shown = server.url.replace("/v1", deployment) + "/" + version
    assert asked.rows()[1]["settings"]["server"] == shown


def test_other_parameters_of_the_address_are_not_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    client = server.open_client("w", "https://me:pw@host/v1?key=abc", 1, 0)
    assert server.address(client) == "https://host/v1/"
    assert client.default_query == {"key": "abc"}


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "http://host:port/v1", "http://[::1", "https://", "http://h\n/v1"]
)
def test_what_is_no_address_is_refused(monkeypatch, url):
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    with pytest.raises(UserError, match="not an address; give one such as"):
        server.open_client("w", url + "?key=secret", 1, 0)


PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "all_proxy", "https_proxy", "http_proxy")


@pytest.fixture
def proxies(monkeypatch):
    for name in (*PROXIES, "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch.setenv


@pytest.mark.parametrize("proxy", ["socks5://u:pw@proxy:1080", "nonsense://proxy"])
def test_a_proxy_is_not_for_this_machine_and_named_where_it_cannot_be_used(asked, proxies, proxy):
    proxies("ALL_PROXY", proxy)
    assert asked("--num_questions", "1") == 0
    if proxy.startswith("nonsense"):
        with pytest.raises(UserError, match="ALL_PROXY=nonsense://proxy: this proxy cannot be"):
            server.open_client("w", "https://api.example.org/v1", 1, 0)


def test_errors_name_the_proxy_without_its_password(proxies):
    import openai

    proxies("OPENAI_API_KEY", "x")
    proxies("HTTPS_PROXY", "http://me:pw@127.0.0.1:9")
    client = server.open_client("w", "https://api.example.org/v1", 1, 0)
    with pytest.raises(openai.APIConnectionError) as caught:
        server.complete(client, {})
    text = server.explain(client, "--judge", "j", caught.value)
    assert "through the proxy http://127.0.0.1:9 (" in text and "pw" not in text


def test_counts_that_cannot_be_right_are_none():
    for value in (0, -3, True, "3", float("inf"), float("nan"), None):
        body = json.dumps(completion("A")[1] | {"usage": {"completion_tokens": value}})
        assert completions.read(str, body).completion_tokens is None
    body = json.dumps(completion("")[1] | {"usage": {"completion_tokens": 0}})
    assert completions.read(str, body).completion_tokens == 0
