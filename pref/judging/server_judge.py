"""A judge behind an OpenAI-compatible server.

`open_server_judge` describes it without sending anything, so that a dry run needs neither a key nor
a server. `probe_server` asks one short question to find out which parameters the server
accepts; `ask_server` makes one judgement; `read_reply` interprets what the server returned.

The package openai is imported inside functions: only calls to a server need it.
"""

import argparse
import functools
import json
import sqlite3
import sys
import time
from collections.abc import Callable

from pref.files import judgements
from pref.files.console import UserError
from pref.judging import costs, protocol, store
from pref.judging.protocol import Judge
from pref.model import server

PROBE = [{"role": "user", "content": "Reply with the single word OK."}]
TOKEN_LIMITS = ("max_tokens", "max_completion_tokens")  # the same limit by its old and new name
MOST_ERROR_CHARS = 2000  # of an error that is stored in place of a judgement


def open_server_judge(args: argparse.Namespace, db: sqlite3.Connection) -> Judge:
    """A judge behind a server. Sends nothing yet."""
    client = None
    if not (args.dry_run or args.import_results):  # neither sends anything: no key is needed
        client = server.open_client(
            "a judge behind a server", args.base_url, args.timeout_s, args.max_retries
        )
    probe = functools.partial(probe_server, client, args.judge)
    return Judge(
        name=args.judge,
        params_b=judgements.params_from_name(args.judge),
        parameters=first_parameters(db, args),
        ask=functools.partial(ask_server, client),
        concurrency=args.concurrency,
        probe=probe if args.parameters is None else None,  # --parameters are sent as they are
        prices=costs.prices_of(args),
    )


def first_parameters(db: sqlite3.Connection, args: argparse.Namespace) -> dict:
    """Parameters to try first: --parameters, or the protocol's in the form this judge accepts.

    The form is that of the judge's last successful request. A rerun therefore arrives at the same
    request hashes, and finds its judgements without contacting the server. Example: after
    {"max_completion_tokens": 512} was accepted, --max_tokens 2048 gives
    {"max_completion_tokens": 2048}. Parameters of an experiment (--parameters with other keys or
    another temperature) are not taken over.
    """
    if args.parameters is not None:
        parameters = dict(args.parameters)
    else:
        parameters = {"temperature": protocol.TEMPERATURE, "max_tokens": args.max_tokens}
        accepted = store.last_accepted_parameters(db, args.judge)
        if accepted is not None:
            accepted.pop("seed", None)  # this run's --judge_seed is added below
            if (
                accepted.keys() <= {"temperature", *TOKEN_LIMITS}
                and accepted.get("temperature", 0) == protocol.TEMPERATURE
            ):
                parameters = {
                    key: args.max_tokens if key in TOKEN_LIMITS else value
                    for key, value in accepted.items()
                }
    return parameters if args.judge_seed is None else parameters | {"seed": args.judge_seed}


# ---- one judgement -------------------------------------------------------------------------------


def ask_server(client, request: dict) -> dict:
    """Make one judgement and return the reply (see `protocol.Judge`).

    The client itself retries HTTP 408, 409, 429, 5xx and lost connections; a failure that remains
    is returned as the reply's status. Raises UserError for failures that no later request would
    escape: `server.FATAL_STATUS`, and no credit left.
    """
    import openai

    body = {"model": request["judge"], "messages": request["messages"], **request["parameters"]}
    try:
        text = server.complete(client, body)
    except openai.APITimeoutError:
        return {"status": "timeout"}
    except openai.APIConnectionError as error:
        cause = server.clean(client, str(error.__cause__ or error))
        return {"status": "connection", "judgement": cause}
    except openai.APIStatusError as error:
        if error.status_code in server.FATAL_STATUS or server.is_out_of_credit(error):
            raise UserError(server.explain(client, "--judge", request["judge"], error)) from None
        message = server.clean(client, error.message)[:MOST_ERROR_CHARS]
        return {"status": f"http_{error.status_code}", "judgement": message}
    return read_reply(functools.partial(server.clean, client), text, request)


def read_reply(clean: Callable[[str], str], text: str, request: dict) -> dict:
    """The reply (see `protocol.Judge`) in the body of a server's response to `request`.

    clean: applied to every text that is kept; it removes the key, should the server echo it.
    """
    # 1) The fields of a chat completion, or a body that is not one.
    try:
        body = json.loads(text)
        choice = body["choices"][0]
        message, usage = choice["message"], body.get("usage") or {}
        content, refusal = message.get("content"), message.get("refusal")
        prompt_tokens = usage.get("prompt_tokens")
        completion_tokens = usage.get("completion_tokens")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return {"status": "not_openai", "judgement": clean(text)[:MOST_ERROR_CHARS]}
    content = content if isinstance(content, str) else ""

    # 2) The score or winner, or why there is none. A judgement that was cut off counts if it has
    # one; a refused one never does.
    is_pair = request.get("grading") == "pair"
    verdict = protocol.read_verdict(content) if is_pair else protocol.read_rating(content)
    finish_reason = choice.get("finish_reason")
    if refusal or finish_reason == "content_filter":
        status = "refused"
    elif verdict is not None:
        status = "ok"
    elif finish_reason == "length":
        status = "length"
    else:
        status = "parse" if content.strip() else "empty"
    return {
        "status": status,
        "score": verdict if status == "ok" and not is_pair else None,
        "winner": verdict if status == "ok" and is_pair else None,
        "judgement": clean(content or str(refusal or "")),
        "served_model": clean(str(body.get("model") or "")),
        "system_fingerprint": clean(str(body.get("system_fingerprint") or "")),
        "prompt_tokens": prompt_tokens if isinstance(prompt_tokens, int) else None,
        "completion_tokens": completion_tokens if isinstance(completion_tokens, int) else None,
    }


# ---- before the first ----------------------------------------------------------------------------


def probe_server(client, name: str, parameters: dict) -> dict:
    """Ask one short question and return the parameters that the server accepts.

    Newer models refuse `temperature`, or want `max_completion_tokens` in place of `max_tokens`.
    Refused parameters are dropped or renamed until the server answers. The probe is not a judgement
    and is not recorded. Raises UserError if the judge does not answer.
    """
    import openai

    warn_of_shutdown(client, name)
    print(f"asking {name} one short question first", file=sys.stderr)
    # Few retries, so that a wrong address is reported soon.
    quick = client.with_options(max_retries=min(2, client.max_retries))
    text = None
    while text is None:
        try:
            text = server.complete(quick, {"model": name, "messages": PROBE, **parameters})
        except (openai.APIConnectionError, openai.APIStatusError) as error:
            adapted = adapt_parameters(parameters, error)
            if adapted is None:
                raise UserError(server.explain(client, "--judge", name, error)) from None
            parameters = adapted
            print(
                f"{name} refuses these parameters; trying {json.dumps(parameters)} (recorded with "
                "each judgement)",
                file=sys.stderr,
            )
    reply = read_reply(functools.partial(server.clean, client), text, request={})
    if reply["status"] == "not_openai":
        raise UserError(f"--judge {name}: {server.explain_other_api(client)}")
    return parameters


def adapt_parameters(parameters: dict, error) -> dict | None:
    """`parameters` without the one that the server's error names, or with it renamed.

    None if the error is not about a parameter that can be dropped or renamed.
    """
    if getattr(error, "status_code", None) not in (400, 422):
        return None
    complaint = f"{error.param} {error.message}"
    for key in ("temperature", "seed"):
        if key in parameters and key in complaint:
            return {name: value for name, value in parameters.items() if name != key}
    if "max_tokens" in parameters and "max_tokens" in complaint:
        renamed = {"max_tokens": "max_completion_tokens"}
        return {renamed.get(key, key): value for key, value in parameters.items()}
    return None


def warn_of_shutdown(client, name: str) -> None:
    """Print a warning if the server's list of models has a shutdown date for this one."""
    import openai

    try:
        models = client.with_options(max_retries=0, timeout=30).models.list().data or []
    except (openai.OpenAIError, ValueError, AttributeError):
        return  # not every server has such a list; if this one is unreachable, the probe says so
    for model in models:
        date = getattr(model, "shutdown_date", None)
        if getattr(model, "id", None) != name or not date:
            continue
        if isinstance(date, int | float):
            date = time.strftime("%Y-%m-%d", time.gmtime(date))
        print(
            f"warning: {name} will be shut down on {server.clean(client, str(date))}; what is "
            "judged after that needs another judge, whose scores are not comparable with these",
            file=sys.stderr,
        )
