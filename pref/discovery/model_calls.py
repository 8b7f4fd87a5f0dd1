"""One try of a request to a model behind a server: what it costs, and what came back.

A reply that has no end, or is larger than any reply, ends by itself (`server.open_client`). The key
is removed from everything that is kept, should the server echo it.
"""

import functools
import json
import sys
from typing import NamedTuple

from pref.files.console import UserError
from pref.judging import costs, server_judge
from pref.model import completions, server

MOST_BYTES = 4 * 2**20  # of a server's reply
MOST_CHARS = 100_000  # of a text that is kept; a program has 6,000 at most
PARAMETERS = {"temperature": 1.0, "max_tokens": 4096}  # unless --parameters says otherwise
# Failures that say nothing about the request: asked again when the search is started again.
PASSING = ("sent", "lost", "stopped", "connection", "http_408", "http_409", "http_429")
MOST_WAIT_S = 60  # that a server's Retry-After is heeded


class Reply(NamedTuple):
    """What a request brought."""

    status: str  # "ok", or why there is no text to read
    text: str
    cost_usd: float
    finish_reason: str = ""

    @property
    def why(self) -> str:
        """Why there is no text to read, in words."""
        words = {
            "length": "its reply was cut off at the limit of tokens; --parameters can raise it",
            "refused": "a content filter refused it",
            "failed": "the server gave it up halfway",
            "thoughts": "its reply holds thoughts alone",
            "tools": "its reply calls tools in place of an answer",
            "empty": "its reply is empty",
            "endless": "its reply had no end within --timeout_s and "
            f"{MOST_BYTES / 2**20:.0f} MiB, or broke off",
            "timeout": "no reply within --timeout_s",
            "connection": "the connection was lost",
        }
        if self.status in words:
            return words[self.status]
        what = self.status.replace("http_", "the server answers ").replace("_", " ")
        return f"{what} ({' '.join(self.text.split())[:200]})"


class Model:
    """A model behind a server: who it is, what is sent to it and what it costs.

    parameters: sent with each request; `exactly`: as they are, else in the form that the server
    accepts. prices: dollars per million prompt and completion tokens, None if unknown.
    """

    def __init__(
        self,
        name: str,
        client,
        parameters: dict | None = None,
        prices: tuple[float, float] | None = None,
    ):
        self.name, self.prices = name, prices
        self.client = client.with_options(max_retries=0)  # `Requests.ask` tries again itself
        self.exactly = parameters is not None
        self.parameters = dict(PARAMETERS if parameters is None else parameters)
        self.sent_parameters = dict(self.parameters)
        self.tries = 1 + client.max_retries
        # Its rules alone: what a try costs at most, and what a reply has cost.
        self.bill = costs.Budget(self, cap=None, spent=0.0)
        self.lost_in_a_row = 0

    def cost(self, prompt_tokens: float | None, completion_tokens: float | None) -> float | None:
        """Dollars, or None if the prices or a count are unknown."""
        if self.prices is None or prompt_tokens is None or completion_tokens is None:
            return None
        price_in, price_out = self.prices
        return (prompt_tokens * price_in + completion_tokens * price_out) / 1e6

    def request(self, messages: list[dict], sample: str) -> dict:
        """Everything that tells one request from another."""
        return {
            "model": self.name,
            "messages": messages,
            "parameters": self.parameters,
            "sample": sample,
        }

    def most(self, request: dict) -> float:
        """Upper bound on the dollars of one try."""
        return self.bill.most(request)


def is_passing(status: str) -> bool:
    """Whether a status says nothing about the request, which is asked again at the next start."""
    return status in PASSING or status.startswith("http_5")


def call(model: Model, request: dict) -> dict:
    """Send a request. Returns columns of the table, and what `costs.Budget.cost` looks at.

    Parameters that the server refuses are dropped or renamed, unless they are to be sent exactly.
    Raises UserError for what each later request would meet.
    """
    import openai

    while True:
        sent = model.sent_parameters
        body = {"model": model.name, "messages": request["messages"], **sent}
        try:
            text = server.complete(model.client, body)
        except (openai.APIConnectionError, openai.APIStatusError) as error:
            adapted = None if model.exactly else server_judge.adapt_parameters(sent, error)
            if adapted is None:
                return failed(model, error)
            if model.sent_parameters == sent:  # else another thread has done it
                model.sent_parameters = adapted
                print(
                    f"{model.name} refuses these parameters; trying {json.dumps(adapted)}",
                    file=sys.stderr,
                )
            continue
        return read(model, text) | {"sent_parameters": json.dumps(sent)}


def failed(model: Model, error) -> dict:
    """What is kept of a call without a reply. Raises UserError."""
    answer = server_judge.failed_call(model.client, "--proposer", model.name, error)
    # Unlike a judge, a proposer is not asked about texts that a firewall may stop at.
    if answer.get("http_status") == 403 and not server_judge.names_moderation(str(error)):
        raise UserError(server.explain(model.client, "--proposer", model.name, error)) from None
    if answer["status"] == "timeout" and answer["unsent"]:
        answer["status"] = "connection"
    return {"reply": answer.pop("judgement", ""), "wait_s": asked_wait_s(error)} | answer


def asked_wait_s(error) -> float | None:
    """The seconds that a server asks to wait, if it does and they are few."""
    headers = error.response.headers if hasattr(error, "response") else {}
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            seconds = float(headers[name]) / unit
        except (KeyError, ValueError):
            continue
        if 0 <= seconds <= MOST_WAIT_S:
            return seconds
    return None


def read(model: Model, body: str) -> dict:
    """What is kept of a server's reply, without the key should it be echoed."""
    completion = completions.read(functools.partial(server.clean, model.client), body)
    if completion is None:
        if len(body) >= MOST_BYTES or is_torn(body):
            return {"status": "endless", "reply": ""}
        return {"status": "not_openai", "reply": completions.other_reply(model.client, body)}
    text = completion.text
    prompt, tokens = server_judge.count_tokens(
        completion.usage, has_text=bool(text or completion.thoughts)
    )
    return {
        "status": status_of(completion),
        "reply": (text or completion.refusal)[:MOST_CHARS],
        "finish_reason": completion.finish_reason,
        "served_model": completion.model[:200],
        "system_fingerprint": completion.fingerprint[:200],
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
    }


def is_torn(body: str) -> bool:
    """Whether a body begins like a reply, or with nothing but blanks, and has no end."""
    text = body.strip()
    return not text or (text.startswith("{") and not text.endswith("}"))


def status_of(completion: completions.Completion) -> str:
    """ "ok" if the text is the model's whole answer, else why it is not."""
    if completion.cut_off:
        return "length"
    if completion.refusal or completion.finish_reason in completions.FILTERED:
        return "refused"
    if completion.finish_reason in completions.FAILED:
        return "failed"
    if completion.text.strip():
        return "ok" if len(completion.text) <= MOST_CHARS else "endless"
    if completion.thoughts.strip():
        return "thoughts"
    return "tools" if completion.calls_tools else "empty"
