"""a judge behind a server"""

import argparse
import functools
import json
import sqlite3
import sys
import time
from collections.abc import Callable

from pref.files import judgements
from pref.files.console import UserError
from pref.judging import costs, protocol
from pref.judging.protocol import Judge
from pref.model import server

PROBE = [{"role": "user", "content": "Reply with the single word OK."}]


def first_parameters(db: sqlite3.Connection, args: argparse.Namespace) -> dict:
    """--parameters, or what this judge last accepted, so that a rerun finds its judgements without
    asking it.
    """
    if args.parameters is not None:
        parameters = dict(args.parameters)
    else:
        row = db.execute(
            "SELECT request FROM judgements WHERE judge = ? AND status = 'ok' ORDER BY tstamp DESC LIMIT 1",
            (args.judge,),
        ).fetchone()
        parameters = {"temperature": protocol.TEMPERATURE, "max_tokens": args.max_tokens}
        accepted = (
            {k: v for k, v in json.loads(row[0])["parameters"].items() if k != "seed"}
            if row
            else {}
        )
        limits = ("max_tokens", "max_completion_tokens")
        if (
            row
            and accepted.keys() <= {"temperature", *limits}
            and accepted.get("temperature", 0) == protocol.TEMPERATURE
        ):
            parameters = {
                k: args.max_tokens if k in limits else value for k, value in accepted.items()
            }
    return parameters if args.judge_seed is None else parameters | {"seed": args.judge_seed}


def open_server_judge(args: argparse.Namespace, db: sqlite3.Connection) -> Judge:
    """A judge behind an OpenAI-compatible server. Nothing is sent yet."""
    sends = not (args.dry_run or args.import_results)  # or no key is needed
    client = (
        server.open_client(
            "a judge behind a server", args.base_url, args.timeout_s, args.max_retries
        )
        if sends
        else None
    )
    return Judge(
        name=args.judge,
        params_b=judgements.params_from_name(args.judge),
        parameters=first_parameters(db, args),
        ask=functools.partial(ask_server, client),
        concurrency=args.concurrency,
        probe=functools.partial(probe_server, client, args.judge)
        if args.parameters is None
        else None,
        prices=costs.prices_of(args),
    )


def ask_server(client, request: dict) -> dict:
    """One judgement. The client retries 408, 409, 429, 5xx and lost connections; then the failure
    is the reply.

    Raises UserError for what no later request will cure (FATAL_STATUS, no credit).
    """
    import openai

    try:
        text = server.complete(
            client,
            {"model": request["judge"], "messages": request["messages"], **request["parameters"]},
        )
    except openai.APITimeoutError:
        return {"status": "timeout"}
    except openai.APIConnectionError as error:
        return {
            "status": "connection",
            "judgement": server.clean(client, str(error.__cause__ or error)),
        }
    except openai.APIStatusError as error:
        if error.status_code in server.FATAL_STATUS or server.is_out_of_credit(error):
            raise UserError(server.explain(client, "--judge", request["judge"], error)) from None
        return {
            "status": f"http_{error.status_code}",
            "judgement": server.clean(client, error.message)[:2000],
        }
    return read_reply(functools.partial(server.clean, client), text, request)


def read_reply(clean: Callable[[str], str], text: str, request: dict) -> dict:
    """The reply in a server's answer: `ok` with a score or a winner, or the reason there is
    none.
    """
    try:
        body = json.loads(text)
        choice = body["choices"][0]
        message, usage = choice["message"], body.get("usage") or {}
        content, refusal = message.get("content"), message.get("refusal")
        counts = {key: usage.get(key) for key in ("prompt_tokens", "completion_tokens")}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return {"status": "not_openai", "judgement": clean(text)[:2000]}
    content = content if isinstance(content, str) else ""
    pair = request.get("grading") == "pair"
    rating = protocol.read_verdict(content) if pair else protocol.read_rating(content)
    if refusal or choice.get("finish_reason") == "content_filter":
        status = "refused"
    elif rating is not None:
        status = "ok"
    elif choice.get("finish_reason") == "length":
        status = "length"
    else:
        status = "parse" if content.strip() else "empty"
    return {
        "status": status,
        "score": rating if status == "ok" and not pair else None,
        "winner": rating if status == "ok" and pair else None,
        "judgement": clean(content or str(refusal or "")),
        "served_model": clean(str(body.get("model") or "")),
        "system_fingerprint": clean(str(body.get("system_fingerprint") or "")),
        **{key: count if isinstance(count, int) else None for key, count in counts.items()},
    }


def probe_server(client, name: str, parameters: dict) -> dict:
    """Ask one small question before the paid ones; returns the parameters that the server accepts.

    Newer models refuse `temperature`, and `max_tokens` in favour of `max_completion_tokens`. What
    is refused is left out or renamed, once. Raises UserError if the judge does not answer.
    """
    import openai

    warn_of_shutdown(client, name)
    print(f"asking {name} for a first answer", file=sys.stderr)
    quick = client.with_options(
        max_retries=min(2, client.max_retries)
    )  # a wrong address should show soon
    while True:
        try:
            text = server.complete(quick, {"model": name, "messages": PROBE, **parameters})
            break
        except (openai.APIConnectionError, openai.APIStatusError) as error:
            adapted = adapt_parameters(parameters, error)
            if adapted is None:
                raise UserError(server.explain(client, "--judge", name, error)) from None
            parameters = adapted
            print(
                f"{name} refuses that; asking with {json.dumps(parameters)} (noted in the key)",
                file=sys.stderr,
            )
    if read_reply(functools.partial(server.clean, client), text, {})["status"] == "not_openai":
        raise UserError(
            f"--judge {name}: {server.address(client)} is no OpenAI-compatible server; does --base_url lack its /v1?"
        )
    return parameters


def warn_of_shutdown(client, name: str) -> None:
    """Say when the provider will withdraw the model, if its list of models knows."""
    import openai

    try:
        listed = client.with_options(max_retries=0, timeout=30).models.list().data or []
    except (openai.OpenAIError, ValueError, AttributeError):
        return  # not every server has such a list; the probe will say what is wrong
    for model in listed:
        if getattr(model, "id", None) == name and (date := getattr(model, "shutdown_date", None)):
            when = (
                time.strftime("%Y-%m-%d", time.gmtime(date))
                if isinstance(date, int | float)
                else str(date)
            )
            print(
                f"warning: {name} will be shut down on {server.clean(client, when)}; judgements made after it are another "
                "judge's",
                file=sys.stderr,
            )


def adapt_parameters(parameters: dict, error) -> dict | None:
    """`parameters` without the one that this refusal names, or None if it names none that can be
    spared.
    """
    if getattr(error, "status_code", None) not in (400, 422):
        return None
    named = f"{error.param} {error.message}"
    for key in ("temperature", "seed"):
        if key in parameters and key in named:
            return {name: value for name, value in parameters.items() if name != key}
    if "max_tokens" in parameters and "max_tokens" in named:
        renamed = {"max_tokens": "max_completion_tokens"}
        return {renamed.get(key, key): value for key, value in parameters.items()}
    return None
