"""What an OpenAI-compatible server's reply to a chat request says.

Servers differ in what they leave out, add and fail to say; `read` takes every form that has been
met, and `other_reply` names a reply that is no chat completion for what it is.
"""

import json
import math
from collections.abc import Callable
from typing import NamedTuple

from pref.files import disk
from pref.model import server

CUT_OFF = frozenset(("length", "max_tokens", "max_output_tokens", "model_length"))
FILTERED = frozenset(
    ("content_filter", "safety", "recitation", "prohibited_content", "blocklist", "refusal")
)
LEAST_LOGP = -1000.0  # a value below it stands for "unknown"
FAILED = frozenset(("error", "abort", "insufficient_system_resource"))


class Completion(NamedTuple):
    """The fields of a chat completion. Texts can be written to a file as they are."""

    text: str  # without what is marked as thoughts
    thoughts: str  # that the server keeps apart from the text
    refusal: str
    finish_reason: str  # in lower case; "" if there is none
    prompt_tokens: int | None  # None: not counted, or no count that can be right
    completion_tokens: int | None
    calls_tools: bool
    usage: dict  # the server's own counts, as they are
    model: str  # that the server says it ran
    fingerprint: str  # the server's mark of its version
    logprobs: dict[str, float] | None = None  # of the first token's alternatives; None: not given

    @property
    def cut_off(self) -> bool:
        return self.finish_reason in CUT_OFF

    @property
    def problem(self) -> str | None:
        """Why the text is not the model's answer, or None. An empty answer is an answer."""
        if self.refusal or self.finish_reason in FILTERED:
            reason = self.refusal or f"finish_reason {self.finish_reason}"
            return f"a content filter refused it ({reason[:200]})"
        if self.finish_reason in FAILED:
            return f"the server gave it up halfway (finish_reason {self.finish_reason})"
        if not self.text.strip() and self.calls_tools:
            return "the reply calls tools in place of an answer; serve the model without tools"
        if not self.text.strip() and self.thoughts.strip():
            ended = ", which --max_new_tokens cut off" if self.cut_off else ""
            return (
                f"the reply holds thoughts alone{ended}, no answer; serve the model without "
                "thinking, or without a parser of thoughts"
            )
        return None


def read(clean: Callable[[str], str], body: str) -> Completion | None:
    """The completion in the body of a reply; None if there is none.

    clean: applied to each text; it removes the key, should the server echo it (`server.clean`).
    """
    try:
        reply = json.loads(body.removeprefix("\ufeff"))  # a byte order mark
        choice = reply["choices"][0]
        message = choice["message"]
        usage = reply.get("usage")
        thoughts = message.get("reasoning_content") or message.get("reasoning")
        content = message.get("content")
        texts = (text_of(content), text_of(thoughts), message.get("refusal") or refusal_in(content))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None
    text, thoughts, refusal = (clean(str(value)) for value in texts)
    usage = usage if isinstance(usage, dict) else {}
    return Completion(
        text=text,
        thoughts=thoughts,
        refusal=refusal,
        finish_reason=clean(str(choice.get("finish_reason") or ""))[:40].lower(),
        prompt_tokens=count(usage.get("prompt_tokens"), least=1),
        completion_tokens=count(usage.get("completion_tokens"), least=1 if text else 0),
        calls_tools=bool(message.get("tool_calls") or message.get("function_call")),
        usage=usage,
        model=clean(str(reply.get("model") or "")),
        fingerprint=clean(str(reply.get("system_fingerprint") or "")),
        logprobs=first_logprobs(choice, clean),
    )


def first_logprobs(choice: dict, clean: Callable[[str], str]) -> dict[str, float] | None:
    """Log-probabilities of the first token's alternatives; None if the server gives none.

    vLLM writes -9999.0 for a token whose probability it does not know: left out. A value that is no
    logarithm (null, NaN, infinity) means that none of them can be trusted: with its token left out,
    the other letter would win.
    """
    try:
        alternatives = choice["logprobs"]["content"][0]["top_logprobs"]
        pairs = [(clean(str(one["token"])), one["logprob"]) for one in alternatives]
    except (KeyError, IndexError, TypeError):
        return None
    found: dict[str, float] = {}
    for token, value in pairs:
        if not disk.is_number(value) or math.isnan(value) or value == math.inf:
            return None
        if value >= LEAST_LOGP:
            found[token] = max(value, found.get(token, value))  # two tokens may have one text
    return found or None


def text_of(content) -> str:
    """A message's text: as it is, or joined from a list of parts, without those that think."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else ""
    parts = [part if isinstance(part, dict) else {"text": part} for part in content]
    texts = [
        part.get("text") for part in parts if part.get("type") not in ("thinking", "reasoning")
    ]
    return "".join(text for text in texts if isinstance(text, str))


def refusal_in(content) -> str:
    """A refusal among the parts of a message."""
    parts = content if isinstance(content, list) else []
    refusals = (part.get("refusal") for part in parts if isinstance(part, dict))
    return next((text for text in refusals if text), "")


def count(value, least: int) -> int | None:
    """A number of tokens; None for a value that is no count, or below `least`."""
    if not disk.is_number(value) or not math.isfinite(value):
        return None
    return int(value) if value >= least else None


def other_reply(client, body: str) -> str:
    """A message for the user: the server's reply is no chat completion, but what it is."""
    place, start = server.address(client), body.lstrip()[:300]
    shown = " ".join(server.clean(client, start).split())[:120]
    if not start:
        return f"{place}: its reply is empty; look at the server's log and at proxies before it"
    if start.startswith(("data:", "event:", ": ")):
        return (
            f"{place}: it streams its reply (server-sent events) though it is not asked to; switch "
            "streaming off at the server or the proxy before it"
        )
    if start.startswith("<"):
        return (
            f"{place}: its reply is a web page ({shown}), not that of an OpenAI-compatible server; "
            "correct --base_url, which usually ends in /v1, or sign in where the page asks for it"
        )
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):
        return (
            f"{place}: its reply breaks off or is not JSON ({shown}); look at the server's log, "
            "then run the same command again"
        )
    if isinstance(reply, dict) and reply.get("error"):
        error = server.clean(client, json.dumps(reply["error"], ensure_ascii=False))
        return f"{place}: it answers 200 with an error: {error[:300]}"
    if isinstance(reply, dict) and "choices" in reply:
        return f"{place}: its reply has no message ({shown}); look at the server's log"
    return f"{server.explain_other_api(client)}; it says: {shown}"
