"""The arguments that say who proposes, and the proposers that they name."""

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pref.discovery import model_calls
from pref.discovery.arms import Arms, Proposer
from pref.discovery.model_calls import Model
from pref.discovery.model_proposer import ModelProposer
from pref.discovery.requests import Requests
from pref.files.console import UserError
from pref.judging import call_arguments, costs
from pref.judging.arguments import json_object
from pref.judging.identity import TOKEN_LIMITS, server_address
from pref.model import server

OWN = ("evolve", "random")  # proposers that need no model
SMALL_LETTERS = "evolve and random are written in small letters"


def add_proposer_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("who proposes").add_argument
    add(
        "--proposer",
        nargs="+",
        default=["evolve"],
        metavar="NAME",
        help="evolve, random, or models of an OpenAI-compatible server (key in OPENAI_API_KEY); "
        "several share the archive, and who enters its upper half most often for the money is "
        "asked most (default evolve)",
    )
    add("--base_url", help="e.g. http://localhost:8000/v1; default OPENAI_BASE_URL, else OpenAI's")
    add("--max_usd", type=float, help="cap on the dollars of all proposals of this search")
    prices = {"type": float, "nargs": "+", "metavar": "USD"}
    each = "; one number, or one for each model of --proposer"
    add("--price_in", **prices, help=f"dollars per million prompt tokens{each}")
    add("--price_out", **prices, help=f"dollars per million completion tokens{each}")
    call_arguments.add_call_arguments(add, timeout_s=300.0)
    add(
        "--parameters",
        type=json_object,
        metavar="JSON",
        help='send exactly these parameters with each request, e.g. \'{"max_completion_tokens": '
        f"16384}}' (default: {model_calls.PARAMETERS}, without what the server refuses)",
    )


def models_of(args: argparse.Namespace) -> list[str]:
    """The proposers that are models."""
    return [name for name in args.proposer if name not in OWN]


def check_proposer_arguments(args: argparse.Namespace) -> None:
    """Raise UserError for what can be wrong before any file is read."""
    models = models_of(args)
    for name in args.proposer:
        if not name.strip() or not name.isprintable():
            raise UserError(f"--proposer {name!r}: not a name; give evolve, random, or a model")
        if name.startswith("hf:"):
            raise UserError(
                f"--proposer {name}: a local model proposes through a server: start one with it "
                "(vLLM, llama.cpp), and give its name here and its address as --base_url"
            )
        if name not in OWN and name.lower() in OWN:
            raise UserError(f"--proposer {name}: {SMALL_LETTERS}")
        if args.proposer.count(name) > 1:
            raise UserError(f"--proposer {name}: given twice")
    call_arguments.check_call_arguments(args)
    if not models:
        for name in ("base_url", "max_usd", "price_in", "price_out", "parameters", "rpm"):
            if getattr(args, name) is not None:
                raise UserError(
                    f"--{name} is for models behind a server; give one in --proposer, or leave it "
                    f"out: {' and '.join(args.proposer)} costs nothing"
                )
        return
    if args.parameters is not None:
        check_parameters(args.parameters)
    check_money(args, models)


def check_parameters(parameters: dict) -> None:
    """Raise UserError for --parameters that ask for something else than one reply."""
    for name in ("model", "messages", "stream", "n"):
        if name in parameters:
            raise UserError(f"--parameters: {name} cannot be given here")
    for name in TOKEN_LIMITS:
        value = parameters.get(name)
        if name in parameters and (type(value) is not int or value < 1):
            raise UserError(f"--parameters: {name} {value!r} must be a whole number, 1 or more")


def check_money(args: argparse.Namespace, models: list[str]) -> None:
    """Raise UserError for prices or a cap that cannot be kept."""
    if args.max_usd is not None and not 0 <= args.max_usd < math.inf:
        raise UserError(f"--max_usd {args.max_usd}: must be 0 or more")
    if (args.price_in is None) != (args.price_out is None):
        raise UserError("--price_in and --price_out: give both or neither")
    for name in ("price_in", "price_out"):
        values = getattr(args, name) or []
        if not all(0 <= value < math.inf for value in values):
            raise UserError(f"--{name}: must be 0 or more")
        if values and len(values) not in (1, len(models)):
            raise UserError(
                f"--{name}: {len(values)} prices for {len(models)} models; give one, or one for "
                f"each of {' '.join(models)}"
            )
    if args.max_usd is None:
        return
    if args.parameters is not None and not args.parameters.keys() & set(TOKEN_LIMITS):
        raise UserError(
            "--max_usd: --parameters must limit the tokens of a reply (max_tokens), or a call "
            "could cost anything"
        )
    for name, prices in prices_of(args).items():
        if prices is None:
            raise UserError(
                f"--max_usd: no price of {name} is known; give --price_in and --price_out "
                "(dollars per million tokens)"
            )


def prices_of(args: argparse.Namespace) -> dict[str, tuple[float, float] | None]:
    """Dollars per million prompt and completion tokens by model; None if they are unknown."""
    models = models_of(args)
    if args.price_in is not None:
        every = [
            values * (len(models) // len(values)) for values in (args.price_in, args.price_out)
        ]
        return dict(zip(models, zip(*every)))
    is_openai = "//api.openai.com/" in server_address(args.base_url)
    return {name: costs.PRICES.get(name) if is_openai else None for name in models}


@contextmanager
def open_arms(
    args: argparse.Namespace,
    folder: Path,
    own: Mapping[str, Proposer],
    *,
    most_proposals: int,
    refusal_of: Callable[[str], str | None] | None = None,
    coupled: bool = False,
    stop_level: Callable[[], int] = lambda: 0,
) -> Iterator[Arms]:
    """The proposers that --proposer names. Sends nothing.

    own: evolve.py's, by name. refusal_of, coupled: see ModelProposer. stop_level: see Arms.
    Raises UserError without package or key, or for a store that cannot be used.
    """
    prices = prices_of(args)
    if not prices:
        yield Arms([own[name] for name in args.proposer], most_proposals=most_proposals)
        return
    client = server.open_client(
        "a model behind a server",
        args.base_url,
        args.timeout_s,
        args.max_retries,
        most_bytes=model_calls.MOST_BYTES,
    )
    with Requests(folder / "requests.sqlite", args.max_usd, args.rpm, stop_level) as store:
        models = {
            name: ModelProposer(
                Model(name, client, args.parameters, price), store, refusal_of, coupled
            )
            for name, price in prices.items()
        }
        yield Arms(
            [models.get(name) or own[name] for name in args.proposer],
            most_proposals=most_proposals,
            cap=args.max_usd,
            concurrency=args.concurrency,
            stop_level=stop_level,
        )


def estimate(args: argparse.Namespace, messages: list[dict], proposals: int) -> str:
    """One line for --dry_run: what `proposals` of each model take, if all were asked of it."""
    prompt = sum(len(message["content"]) for message in messages) / costs.CHARS_PER_TOKEN
    lines = []
    for name, prices in prices_of(args).items():
        tokens_in, tokens_out = proposals * prompt, proposals * REPLY_TOKENS
        text = f"{name}: {proposals} proposals, {tokens_in:,.0f} prompt and {tokens_out:,.0f} "
        text += "completion tokens (guessed; a model that thinks takes several times more)"
        if prices is None:
            text += "; no price known, give --price_in and --price_out"
        else:
            text += f", {costs.dollars_text(name, prices, tokens_in, tokens_out)}"
        lines.append(text)
    return "\n".join(lines)


REPLY_TOKENS = 500  # of a proposal
