"""OpenAI-compatible servers: a client, and what its errors mean to the user.

Answers (gen_mtbench.py --base_url) and judgements (judge.py) use the same client. The package
openai is imported only when a server is used.
"""

import os
import re

from pref.files.console import UserError

FATAL_STATUS = (401, 403, 404)  # every later request would fail too


def open_client(what: str, base_url: str | None, timeout_s: float, max_retries: int):
    """An openai.OpenAI client, with the key from the environment variable OPENAI_API_KEY.

    The key is not an argument of the stages, so that it is in no shell history. what: the option
    that needs the client. base_url: None for OpenAI itself. Raises UserError.
    """
    try:
        import openai
    except ModuleNotFoundError:
        raise UserError(f"{what} needs the package openai; pip install openai") from None
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        raise UserError(
            "OPENAI_API_KEY is not set; export OPENAI_API_KEY=... (for a local server without keys "
            "any text will do)"
        )
    if not (key.isascii() and key.isprintable()):
        raise UserError("OPENAI_API_KEY has characters that no key has; export it again")
    http_client = openai.DefaultHttpxClient(event_hooks={"response": [stop_retries_without_credit]})
    return openai.OpenAI(
        api_key=key,
        base_url=base_url,
        timeout=timeout_s,
        max_retries=max_retries,
        http_client=http_client,
    )


def complete(client, body: dict) -> str:
    """The body of the reply to a chat completion, retried as the client is set up to.

    Not by `chat.completions.create`, which spends a third of a call's time on checking the types of
    the messages.
    """
    return client.post("/chat/completions", body=body, cast_to=str)


def stop_retries_without_credit(response) -> None:
    """Response hook: the client retries every status 429 unless this header tells it not to. An
    account without credit stays without credit.
    """
    if response.status_code == 429 and b"insufficient_quota" in response.read():
        response.headers["x-should-retry"] = "false"


def clean(client, text: str) -> str:
    """`text` that can be written to a file, without the key, should a server echo it."""
    # Shorter keys are the "x" or "EMPTY" given to a server without keys.
    if len(client.api_key) >= 6:
        text = text.replace(client.api_key, "[key]")
    return writable(text)


def writable(text: str) -> str:
    """`text` without lone surrogates, which cannot be encoded as UTF-8."""
    return text.encode("utf-8", "replace").decode()


def is_out_of_credit(error) -> bool:
    return error.status_code == 429 and "insufficient_quota" in (error.code, error.type)


def server_of(client) -> str:
    """The server's address, without a user and password if it has them."""
    return re.sub(r"//[^/@]*@", "//", str(client.base_url))


def explain(client, option: str, name: str, error) -> str:
    """A message for the user: what failed at the server and what to do. Never contains the key.

    option, name: the argument that named the model, e.g. "--judge", "gpt-5". error: an
    openai.APIError.
    """
    import openai

    server = server_of(client)
    if isinstance(error, openai.APITimeoutError):
        return (
            f"{option} {name}: {server} gave no answer within --timeout_s {client.timeout}; "
            "raise it, or try later"
        )
    if isinstance(error, openai.APIConnectionError):
        cause = clean(client, str(error.__cause__ or error))
        return (
            f"{option} {name}: no server answers at {server} ({cause}); start it, or correct "
            "--base_url"
        )
    remedies = {
        401: "it refuses the key; export OPENAI_API_KEY=... with a key of this server",
        403: f"the key may not use this model; choose another {option}, or a key of an account "
        "that has access",
        404: f"no such model there; correct {option} (curl {server}models lists them) or "
        "--base_url (ends in /v1?)",
    }
    remedy = remedies.get(error.status_code, f"correct {option} or --base_url")
    if is_out_of_credit(error):
        remedy = (
            "the account has no credit left; add some, or use another key, and run the same "
            "command again"
        )
    message = " ".join(clean(client, error.message).split())[:300]
    return (
        f"{option} {name}: {server} answers {error.status_code}: {remedy}. Its message: {message}"
    )
