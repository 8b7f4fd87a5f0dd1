"""The arguments of judge.py: their declaration, and what can be wrong with them."""

import argparse
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

from pref.files.console import UserError
from pref.judging import costs, protocol
from pref.judging.identity import TOKEN_LIMITS
from pref.judging.reading import FIRST, LAST, MIN_RATING_MASS

NO_JUDGE = """--judge is missing, and there is no default: hosted models come and go. Give either
  --judge MODEL [--base_url URL]   a model of an OpenAI-compatible server (key in OPENAI_API_KEY)
  --judge hf:PATH                  a local folder or hub id, scored here without a server
OpenAI's shutdown dates: gpt-4 family 2026-10-23, GPT-4o and GPT-4.1 2027-01-14. Choose a judge
that will still be there when your last run is judged."""


def add_judge_arguments(add: Callable) -> None:
    add("--judge", help="model of an OpenAI-compatible server, or hf:PATH (folder or hub id)")
    add("--base_url", help="e.g. http://localhost:8000/v1; default OPENAI_BASE_URL, else OpenAI's")
    add(
        "--server_name",
        metavar="NAME",
        help="recorded in place of the server's address, for servers whose node or port changes; "
        "judgements under another name or address are another judge's "
        "(default: the address)",
    )
    add(
        "--min_rating_mass",
        type=float,
        default=MIN_RATING_MASS,
        metavar="SHARE",
        help="of an hf: judge, whose score is the mean of the ratings 1 to 10 weighted by their "
        "probability after the judge prompt and the beginning of an answer ('Rating: [['): least "
        f"probability of all ten together, else there is no score (default {MIN_RATING_MASS})",
    )
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of an hf: judge; auto: bfloat16 where that is fast (default auto)",
    )


def add_task_arguments(add: Callable) -> None:
    add(
        "--grading",
        choices=("single", "pair"),
        default="single",
        help="rate each answer, or compare it with --baseline's in both orders (default single)",
    )
    add("--baseline", metavar="RUN", help="run id that --grading pair compares with")
    add(
        "--refs",
        default="original",
        metavar="original|corrected:FILE",
        help="reference answers: GPT-4's as published, or with those in FILE replacing them",
    )
    add(
        "--verdict",
        choices=(FIRST, LAST),
        default=FIRST,
        help="which of several verdicts in one judgement counts: the first, as in FastChat, or the "
        "last, a reading of its own that is labelled as such; what is judged already is read again "
        f"at no cost (default {FIRST})",
    )
    add("--repeats", type=int, default=1, help="judgements per answer (default 1)")
    add("--judge_seed", type=int, help="seed to send; the number of the repeat is added to it")
    add(
        "--allow_incomplete",
        action="store_true",
        help="also judge runs that lack answers other runs have, or have many empty answers",
    )
    add(
        "--mt_bench",
        type=Path,
        default=Path("data/mt_bench"),
        help="folder of questions, references and judge prompts (default data/mt_bench)",
    )
    add(
        "--max_tokens",
        type=int,
        default=protocol.MAX_TOKENS,
        help=f"most tokens of a judgement; default {protocol.MAX_TOKENS}, which is MT-Bench's: "
        "another value is another protocol",
    )
    add(
        "--parameters",
        type=json_object,
        metavar="JSON",
        help="send exactly these parameters instead of probing which ones the server accepts, "
        "e.g. '{\"max_completion_tokens\": 2048}'",
    )


def add_cost_arguments(add: Callable) -> None:
    add("--dry_run", action="store_true", help="print the estimate and stop; judge nothing")
    add(
        "--runs",
        type=int,
        metavar="N",
        help="with --dry_run: estimate for N runs that need not exist yet; no results folder",
    )
    add(
        "--requests",
        type=Path,
        metavar="FILE",
        help="with --dry_run: write the requests to FILE, for OpenAI's batch endpoint; if a key is "
        "set, the judge is asked one short question, to learn which parameters it accepts",
    )
    add(
        "--import_results",
        type=Path,
        metavar="FILE",
        help="store the results in FILE, the batch endpoint's output; send nothing",
    )
    add(
        "--import_fastchat",
        type=Path,
        metavar="FILE",
        help="store the judgements of FastChat's model_judgment/*.jsonl that belong to these "
        "answers, prompts and --judge; send nothing",
    )
    add("--max_usd", type=float, help="cap on the dollars of all judgements in the results folder")
    add("--price_in", type=float, help="dollars per million prompt tokens")
    add("--price_out", type=float, help="dollars per million completion tokens")


def add_call_arguments(add: Callable) -> None:
    add("--retry_failed", action="store_true", help="also repeat requests that failed earlier")
    add("--rpm", type=float, help="calls per minute at most (default: no limit)")
    add("--concurrency", type=int, default=8, help="calls in flight at a time (default 8)")
    add("--timeout_s", type=float, default=600.0, help="seconds to wait for a reply (default 600)")
    add(
        "--max_retries",
        type=int,
        default=5,
        help="tries after the first, with growing pauses, after HTTP 408, 409, 429, 5xx, a timeout "
        "or a lost connection (default 5)",
    )


def json_object(text: str) -> dict:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object, e.g. '{\"max_tokens\": 2048}'")
    return value


def check_args(args: argparse.Namespace) -> None:
    """Raise UserError for what can be wrong before any file is read."""
    if args.runs is not None:
        check_runs(args)
    elif not (args.judge or "").removeprefix("hf:").strip():
        raise UserError(NO_JUDGE)
    elif not args.results:
        raise UserError("no results folder is given; python judge.py results/ --judge MODEL")
    check_judge(args)
    if (args.grading == "pair") != (args.baseline is not None):
        raise UserError("--grading pair needs --baseline RUN, and --baseline needs --grading pair")
    if args.refs != "original" and not re.fullmatch(r"corrected:.+", args.refs):
        raise UserError(f"--refs {args.refs}: must be original or corrected:FILE")
    if args.requests and not args.dry_run:
        raise UserError("--requests: only with --dry_run")
    if args.import_results and args.import_fastchat:
        raise UserError("--import_results and --import_fastchat: give one of them")
    for name, least in {"concurrency": 1, "max_tokens": 1, "repeats": 1, "max_retries": 0}.items():
        if (value := getattr(args, name)) < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    if not args.timeout_s > 0:
        raise UserError(f"--timeout_s {args.timeout_s}: must be above 0")
    if args.rpm is not None and not 0 < args.rpm < math.inf:
        raise UserError(f"--rpm {args.rpm}: must be above 0")
    if args.parameters is not None:
        check_parameters(args.parameters)
    check_money(args)


def check_runs(args: argparse.Namespace) -> None:
    """Raise UserError for --runs together with what it cannot serve."""
    if not args.dry_run:
        raise UserError(
            "--runs N: only with --dry_run; it is for an estimate before the runs exist"
        )
    if args.runs < 1:
        raise UserError(f"--runs {args.runs}: must be at least 1")
    if args.results or args.requests:
        raise UserError("--runs N estimates without answers: give no results folder, no --requests")


def check_judge(args: argparse.Namespace) -> None:
    """Raise UserError for arguments that the kind of judge does not have."""
    is_local = (args.judge or "").startswith("hf:")
    if is_local and args.base_url:
        raise UserError("--base_url is for a judge behind a server; --judge hf:PATH is loaded here")
    without = {"verdict": FIRST, "max_tokens": protocol.MAX_TOKENS} | dict.fromkeys(
        ("requests", "import_results", "import_fastchat", "judge_seed", "server_name", "parameters")
    )
    for name, default in without.items():
        if is_local and getattr(args, name) != default:
            raise UserError(
                f"--{name} is for a judge behind a server: hf:PATH writes no text, it is asked for "
                "the probabilities of its verdicts"
            )
    if not 0 <= args.min_rating_mass <= 1:
        raise UserError(f"--min_rating_mass {args.min_rating_mass}: must be from 0 to 1")
    if args.server_name and not (args.server_name.isprintable() and args.server_name.strip()):
        raise UserError(f"--server_name {args.server_name!r}: must be a name on one line")
    if args.base_url and not re.match(r"\s*https?://[^/]", args.base_url, re.IGNORECASE):
        raise UserError(f"--base_url {args.base_url}: must begin with http:// or https://")


def check_parameters(parameters: dict) -> None:
    """Raise UserError for --parameters that would ask for something else than one judgement."""
    for name in ("model", "messages", "stream"):
        if name in parameters:
            raise UserError(f"--parameters: {name} cannot be given here (the model is --judge)")
    for name in (*TOKEN_LIMITS, "seed"):
        value, least = parameters.get(name), 0 if name == "seed" else 1
        if name in parameters and (type(value) is not int or value < least):
            raise UserError(
                f"--parameters: {name} {value!r} must be a whole number, {least} or more"
            )


def check_money(args: argparse.Namespace) -> None:
    """Raise UserError for prices or a cap that cannot be kept."""
    for name in ("price_in", "price_out", "max_usd"):
        if (value := getattr(args, name)) is not None and not 0 <= value < math.inf:
            raise UserError(f"--{name} {value}: must be 0 or more")
    if (args.price_in is None) != (args.price_out is None):
        raise UserError("--price_in and --price_out: give both or neither")
    if args.max_usd is None:
        return
    # The cap counts a call in flight at the most it can cost: one answer of limited length.
    if args.parameters is not None and (
        not args.parameters.keys() & set(TOKEN_LIMITS) or "n" in args.parameters
    ):
        raise UserError(
            "--max_usd: --parameters must limit the tokens of a call (max_tokens) and ask for one "
            "answer (no n)"
        )
    if costs.prices_of(args) is None:
        raise UserError(
            f"--max_usd: no price of {args.judge} is known; give --price_in and --price_out "
            "(dollars per million tokens)"
        )
