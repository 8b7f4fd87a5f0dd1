"""A judge behind an OpenAI-compatible server.

`open_server_judge` describes it without sending anything, so that a dry run needs neither a key nor
a server. `probe_server` asks one short question to find out which parameters the server
accepts; `ask_server` makes one judgement; `read_reply` interprets what the server returned.

The package openai is imported inside functions: only calls to a server need it.
"""

import argparse
import functools
import json
import os
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable

from pref.files import disk, judgements
from pref.files.console import UserError
from pref.judging import arguments, benchmarks, costs, reading, store
from pref.judging.benchmark import Bench
from pref.judging.identity import TOKEN_LIMITS, server_address
from pref.judging.judges import Judge
from pref.model import completions, server

# The system message is there because MT-Bench's prompts have one, which some judges refuse.
PROBE = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Reply with the single word OK."},
]
MOST_ERROR_CHARS = 2000  # of an error that is stored in place of a judgement
MOST_TOKENS = 10**9  # a count above this is a mistake of the server's

# Statuses that a later request would meet too. 403 is not among them: once the probe was answered,
# it is a moderation's or a firewall's answer to one question.
FATAL_STATUS = (401, 402, 404)
# What a judge may refuse, and is then asked without.
MAY_GO = ("temperature", "top_p", "seed")
NEWER_NAMES = {"max_tokens": "max_completion_tokens"}
# Names of models that refuse `temperature` and `max_tokens` (OpenAI's reasoning models), for a
# batch file that is written without asking the server.
REASONING = re.compile(r"(?:.*/)?(?:o\d|gpt-5(?!.*chat))(?:[-.].*)?$")


def open_server_judge(args: argparse.Namespace, db: sqlite3.Connection, bench: Bench) -> Judge:
    """A judge behind a server. Sends nothing yet."""
    address = args.server_name or server_address(args.base_url)
    client = None
    if not (args.dry_run or arguments.imported(args)):  # these send nothing
        client = server.open_client(
            "a judge behind a server", args.base_url, args.timeout_s, args.max_retries
        )
    elif args.requests and args.parameters is None:
        client = client_for_a_batch(args)
    probe = None
    if client is not None and args.parameters is None:  # --parameters are sent as they are
        probe = functools.partial(probe_server, client, args.judge, bench)
    return Judge(
        name=args.judge,
        params_b=judgements.params_from_name(args.judge),
        parameters=first_parameters(db, args, address, bench, is_asked=client is not None),
        ask=functools.partial(ask_server, client),
        concurrency=args.concurrency,
        probe=probe,
        server=address,
        prices=costs.prices_of(args),
    )


def client_for_a_batch(args: argparse.Namespace):
    """A client to learn which parameters the judge accepts, or None where no key is set."""
    if os.environ.get("OPENAI_API_KEY", "").strip():
        return server.open_client("--requests", args.base_url, args.timeout_s, args.max_retries)
    print(
        "OPENAI_API_KEY is not set, so the judge is not asked which parameters it accepts: look at "
        "those in the batch file before you upload it",
        file=sys.stderr,
    )
    return None


def first_parameters(
    db: sqlite3.Connection, args: argparse.Namespace, address: str, bench: Bench, is_asked: bool
) -> dict:
    """Parameters to try first: --parameters, or the benchmark's in the form this judge accepts.

    The form is that of the judge's last successful request to this server. A rerun therefore
    arrives at the same request hashes, and finds its judgements without contacting the server.
    Example: after {"max_completion_tokens": 512} was accepted, --max_tokens 2048 gives
    {"max_completion_tokens": 2048}. Parameters of an experiment (--parameters with other keys or
    another temperature) are not taken over. is_asked: the probe will find out what is refused.
    """
    if args.parameters is not None:
        parameters = dict(args.parameters)
    else:
        parameters = bench.parameters
        if not is_asked and REASONING.match(args.judge):
            parameters = {
                NEWER_NAMES.get(k, k): v for k, v in parameters.items() if k not in MAY_GO
            }
        form = form_of(bench, store.accepted_parameters(db, args.judge, address))
        parameters = parameters if form is None else form
    return parameters if args.judge_seed is None else parameters | {"seed": args.judge_seed}


def form_of(bench: Bench, accepted: list[store.Accepted]) -> dict | None:
    """The benchmark's parameters in the form that a judge accepts; None if that is not known."""
    # 1) As the benchmark's last successful request had them.
    own = [one.parameters for one in accepted if one.bench == bench.name]
    if own and (form := in_form_of(own[0], bench.parameters, may_lack=MAY_GO)) is not None:
        return form
    # 2) As in any other. What the judge is known to accept was not refused, but not asked for.
    known = set().union(*(one.parameters for one in accepted))
    refused = [name for name in MAY_GO if name not in known]
    forms = (in_form_of(one.parameters, bench.parameters, refused) for one in accepted)
    return next((form for form in forms if form is not None), None)


def in_form_of(accepted: dict, parameters: dict, may_lack: Iterable[str]) -> dict | None:
    """`parameters`, named as in `accepted` and without what is missing there; None if `accepted`
    are parameters of something else.
    """
    limit = next((parameters[name] for name in TOKEN_LIMITS if name in parameters), None)
    values = {k: v for k, v in accepted.items() if k not in (*TOKEN_LIMITS, "seed")}
    lacking = parameters.keys() - values.keys() - {*TOKEN_LIMITS}
    if not values.items() <= parameters.items() or not lacking <= {*may_lack}:
        return None
    return {k: limit if k in TOKEN_LIMITS else v for k, v in accepted.items() if k != "seed"}


# ---- one judgement -------------------------------------------------------------------------------


def ask_server(client, request: dict) -> dict:
    """Make one judgement and return the reply (see `judges.Judge`).

    The client itself retries HTTP 408, 409, 429, 5xx and lost connections; a failure that remains
    is returned as the reply's status. Raises UserError for failures that no later request would
    escape: FATAL_STATUS, no credit left, a limit for the day reached.
    """
    import openai

    body = {"model": request["judge"], "messages": request["messages"], **request["parameters"]}
    try:
        text = server.complete(client, body)
    except (openai.APIConnectionError, openai.APIStatusError) as error:
        return failed_call(client, "--judge", request["judge"], error)
    return read_reply(functools.partial(server.clean, client), text, request)


def failed_call(client, option: str, name: str, error) -> dict:
    """The reply (see `judges.Judge`) in place of one that did not come. option, name: as for
    `server.explain`. Raises UserError for what no later request would escape.
    """
    import openai

    if isinstance(error, openai.APITimeoutError):
        return {"status": "timeout", "unsent": server.is_unsent(error)}
    if isinstance(error, openai.APIConnectionError):
        cause = server.clean(client, str(error.__cause__ or error))
        return {"status": "connection", "judgement": cause, "unsent": server.is_unsent(error)}
    code = error.status_code
    if code in FATAL_STATUS or server.is_out_of_credit(error) or server.is_limit_of_the_day(error):
        raise UserError(server.explain(client, option, name, error)) from None
    message = server.clean(client, server.message_of(error))[:MOST_ERROR_CHARS]
    status = "refused" if is_moderation(error) else f"http_{code}"
    return {"status": status, "judgement": message, "http_status": code}


def is_moderation(error) -> bool:
    """Whether an `openai.APIStatusError` declines what this one request says."""
    if error.status_code in (403, 451):
        return True
    complaint = f"{error.code} {error.type} {error.message}"
    return error.status_code == 400 and names_moderation(complaint)


def names_moderation(complaint: str) -> bool:
    """Whether the text of an error names a moderation, as providers spell it."""
    marks = ("content_filter", "content_policy", "responsibleai", "moderation")
    return any(mark in complaint.lower() for mark in marks)


def count_tokens(usage: dict, has_text: bool) -> tuple[int | None, int | None]:
    """Prompt and completion tokens; None where the server's count cannot be right.

    Some servers count thoughts, which they charge for, in total_tokens or in the details alone.
    """
    prompt, completion, total = (
        int(count) if disk.is_number(count) and 0 <= count <= MOST_TOKENS else None
        for count in (usage.get(f"{name}_tokens") for name in ("prompt", "completion", "total"))
    )
    if completion is not None:
        details = usage.get("completion_tokens_details")
        thoughts = details.get("reasoning_tokens") if isinstance(details, dict) else None
        if disk.is_number(thoughts) and completion < thoughts <= MOST_TOKENS:
            completion += int(thoughts)  # they cannot be among the completion's
        if prompt and total:
            completion = max(completion, total - prompt)
    return prompt or None, None if has_text and not completion else completion


def read_reply(clean: Callable[[str], str], text: str, request: dict) -> dict:
    """The reply (see `judges.Judge`) in the body of a server's response to `request`.

    clean: applied to every text that is kept; it removes the key, should the server echo it.
    """
    # 1) The fields of a chat completion, or a body that is not one.
    completion = completions.read(clean, text)
    if completion is None:
        return {"status": "not_openai", "judgement": clean(text)[:MOST_ERROR_CHARS]}

    # 2) The score or winner, or why there is none. A refused judgement has none, nor has one that
    #    failed halfway. Thoughts alone are stored as such, and hold no verdict.
    finish, content = completion.finish_reason, completion.text
    if not content.strip() and completion.thoughts.strip():
        content = f"<think>{completion.thoughts}"  # an answer may follow a closing tag in there
    reply = reading.Reply(content, finish, completion.logprobs)
    verdict = benchmarks.read_reply(reply, request)
    if completion.refusal or finish in completions.FILTERED:
        verdict = reading.Verdict("refused")
    elif finish in completions.FAILED:
        verdict = reading.Verdict("failed")
    elif verdict.status == "length" and finish in reading.ENDED and not completion.text.strip():
        verdict = reading.Verdict("thoughts")
    prompt_tokens, completion_tokens = count_tokens(completion.usage, has_text=bool(content))
    return {
        **verdict._asdict(),
        "judgement": content or completion.refusal,
        "finish_reason": finish,
        "token_logprobs": json.dumps(reply.logprobs) if reply.logprobs else None,
        "served_model": completion.model,
        "system_fingerprint": completion.fingerprint,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
    }


# ---- before the first ----------------------------------------------------------------------------


class Unreached(UserError):
    """No server answers."""


def probe_server(client, name: str, bench: Bench, parameters: dict) -> dict:
    """Ask one short question and return the parameters that the server accepts.

    Newer models refuse `temperature`, or want `max_completion_tokens` in place of `max_tokens`.
    Refused parameters are dropped or renamed until the server answers. The probe is not a judgement
    and is not recorded. Raises UserError if the judge does not answer, refuses the system messages
    that the prompts have, answers in its thoughts alone, or not as the benchmark needs it.
    """
    import openai

    with_system = any(prompt["system_prompt"] for prompt in bench.prompts.values())

    warn_of_shutdown(client, name)
    print(f"asking {name} one short question first", file=sys.stderr)
    # Few retries, so that a wrong address is reported soon.
    quick = client.with_options(max_retries=min(2, client.max_retries))
    messages = PROBE if with_system else PROBE[1:]
    text = None
    while text is None:
        try:
            text = server.complete(quick, {"model": name, "messages": messages, **parameters})
        except (openai.APIConnectionError, openai.APIStatusError) as error:
            adapted = adapt_parameters(parameters, error)
            if adapted is None:
                if "logprobs" in parameters and "logprobs" in str(error):
                    check_probe(name, bench, logprobs=None)
                if isinstance(error, openai.APIConnectionError):
                    raise Unreached(server.explain(client, "--judge", name, error)) from None
                if with_system and refuses_system(quick, name, parameters, error):
                    raise UserError(f"--judge {name}: {REFUSES_SYSTEM}") from None
                raise UserError(server.explain(client, "--judge", name, error)) from None
            parameters = adapted
            print(
                f"{name} refuses these parameters; trying {json.dumps(parameters)} (recorded with "
                "each judgement)",
                file=sys.stderr,
            )
    reply = read_reply(functools.partial(server.clean, client), text, request={})
    if reply["status"] == "not_openai":
        raise UserError(f"--judge {name}: {completions.other_reply(client, text)}")
    if reply["status"] == "thoughts":
        raise UserError(f"--judge {name}: {THOUGHTS_ALONE}")
    check_probe(name, bench, json.loads(reply["token_logprobs"] or "null"))
    return parameters


def check_probe(name: str, bench: Bench, logprobs: dict | None) -> None:
    """Raise UserError if the judge does not reply as the benchmark needs it."""
    check = bench.benchmark.check_probe
    if check is not None and (complaint := check(bench, logprobs)):
        raise UserError(f"--judge {name}: {complaint}")


REFUSES_SYSTEM = (
    "refuses system messages, which the judge prompts have (its chat template or its server allows "
    "none); choose another judge, serve it with a template that has them, or judge with prompts of "
    'your own whose "system_prompt" is empty'
)
THOUGHTS_ALONE = (
    "its answer arrives as thoughts (reasoning_content) alone; if it does not think, start the "
    "server without --reasoning-parser, and if it does, with the parser that fits this model"
)


def refuses_system(client, name: str, parameters: dict, error) -> bool:
    """Whether `error`, the answer to the probe, is about its system message: the same question
    without one is answered.
    """
    import openai

    if not re.search(r"system|role|template|alternat|instruction", str(error), re.IGNORECASE):
        return False
    try:
        server.complete(client, {"model": name, "messages": PROBE[1:], **parameters})
    except (openai.APIConnectionError, openai.APIStatusError):
        return False
    return True


def adapt_parameters(parameters: dict, error) -> dict | None:
    """`parameters` without the one that the server's error names, or with it renamed.

    None if the error is not about a parameter that can be dropped or renamed.
    """
    if getattr(error, "status_code", None) not in (400, 422):
        return None
    complaint = f"{error.param} {server.message_of(error)}"
    for key in MAY_GO:
        if key in parameters and key in complaint:
            return {name: value for name, value in parameters.items() if name != key}
    too_long = server.TOO_LONG.search(complaint)
    if "max_tokens" in parameters and "max_tokens" in complaint and not too_long:
        return {NEWER_NAMES.get(key, key): value for key, value in parameters.items()}
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
