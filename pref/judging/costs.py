"""What judging costs: prices, the estimate before it, and the cap during it.

`prices_of` finds a judge's prices, `estimate` turns pending requests into tokens and dollars (and
`estimate_ahead` runs that do not exist yet), and `Budget` keeps the total within --max_usd while
requests are made.
"""

import argparse
import itertools
import json
import sqlite3
from typing import NamedTuple

from pref.judging import items, judges, store
from pref.judging.benchmark import Bench
from pref.judging.identity import TOKEN_LIMITS, server_address
from pref.judging.judges import Judge

# US dollars per million prompt and completion tokens as OpenAI published them in August 2025.
# Looked up by exact name, because a longer one (gpt-5-pro) can be another model at ten times the
# price. --price_in and --price_out take precedence.
PRICES_OF = "August 2025"
PRICES = {
    "gpt-5-nano": (0.05, 0.40),
    "gpt-5-mini": (0.25, 2.00),
    "gpt-5": (1.25, 10.00),
    "gpt-4.1-nano": (0.10, 0.40),
    "gpt-4.1-mini": (0.40, 1.60),
    "gpt-4.1": (2.00, 8.00),
    "gpt-4o-mini": (0.15, 0.60),
    "gpt-4o": (2.50, 10.00),
    "gpt-4-turbo": (10.00, 30.00),
    "gpt-4": (30.00, 60.00),
}
BATCH_DISCOUNT = 0.5  # a batch endpoint charges this share of the price

# The estimate's rules of thumb, until this judge has made ENOUGH_TO_LEARN judgements
CHARS_PER_TOKEN = 4.0
ANSWER_CHARS = 1200  # per turn
ENOUGH_TO_LEARN = 20

TOKENS_PER_MESSAGE = 16  # upper bound on what a chat template adds to a message
MOST_TOKENS = 2048  # of a judgement whose request has no limit


def prices_of(args: argparse.Namespace) -> tuple[float, float] | None:
    """Dollars per million prompt and completion tokens, or None if they are unknown.

    --price_in and --price_out, else the table above if the server is OpenAI's: other providers set
    their own prices for models of the same name.
    """
    if args.price_in is not None and args.price_out is not None:
        return args.price_in, args.price_out
    address = server_address(args.base_url)
    return PRICES.get(args.judge) if "//api.openai.com/" in address else None


class Budget:
    """Keeps the total cost recorded for a results folder within --max_usd.

    A call *reserves* the most it can cost, with every try that the client may make, before it is
    made; when its reply is there, the reservation is replaced by the actual cost. A call is allowed
    only if everything spent and reserved, together with its own reservation, stays within the cap.
    Not thread-safe: the caller holds a lock. All amounts are in dollars.

    cap: --max_usd, None for no limit. spent: total cost recorded so far. tries: at most, per call.
    """

    def __init__(self, judge: Judge, cap: float | None, spent: float, tries: int = 1):
        self.judge, self.cap, self.tries = judge, cap, tries
        self.spent, self.reserved = spent, 0.0
        self.longest = 0  # completion tokens; some servers count thoughts beyond the limit

    def most(self, request: dict) -> float:
        """Upper bound on the cost of one try.

        A token is at least one byte of the prompt, and the judgement is no longer than the request
        allows, or than the longest so far.
        """
        if self.judge.prices is None:
            return 0.0
        prompt_tokens = sum(
            len(message["content"].encode()) + TOKENS_PER_MESSAGE for message in request["messages"]
        )
        parameters = request["parameters"]
        limits = [parameters.get(key) or 0 for key in TOKEN_LIMITS]
        return self.judge.cost(prompt_tokens, max(max(limits) or MOST_TOKENS, self.longest))

    def reserve(self, request: dict) -> float | None:
        """Reserve the most that a request can cost, in dollars; None if the cap does not allow it.

        Call before the request is made.
        """
        most = self.tries * self.most(request)
        if self.cap is not None and self.spent + self.reserved + most > self.cap:
            return None
        self.reserved += most
        return most

    def settle(self, reserved: float, cost: float | None) -> None:
        """Call after the request was made: replace its reservation by its cost."""
        self.reserved -= reserved
        self.spent += cost or 0.0

    def cost(self, request: dict, reply: dict) -> float | None:
        """The cost to record for a reply; None if the judge has no price.

        From the token counts, if the reply has them. Without them, a request that the server
        refused (HTTP 4xx) or never got costs nothing, and any other is recorded at the most it can
        have cost: after a timeout each try, for the server may have completed all of them.
        """
        if self.judge.prices is None:
            return None
        counted = self.judge.cost(reply.get("prompt_tokens"), reply.get("completion_tokens"))
        if counted is not None:
            self.longest = max(self.longest, reply["completion_tokens"])
            return counted
        if 400 <= reply.get("http_status", 0) < 500 or reply.get("unsent"):
            return 0.0
        return self.most(request) * (self.tries if reply["status"] == "timeout" else 1)


def estimate(db: sqlite3.Connection, judge: Judge, bench: Bench, pending: dict[str, dict]) -> str:
    """One line: calls, tokens and dollars for the requests in `pending`.

    From the lengths of this judge's judgements of the benchmark so far, or from rules of thumb if
    it has made fewer than ENOUGH_TO_LEARN.
    """
    lengths = store.learned_lengths(db, judge.name, bench.name)
    if lengths.judgements >= ENOUGH_TO_LEARN:
        tokens_per_char = lengths.prompt_tokens / lengths.request_chars
        completion_per_call = lengths.completion_tokens / lengths.judgements
        source = f"from {lengths.judgements} judgements by it"
    else:
        tokens_per_char, completion_per_call = 1 / CHARS_PER_TOKEN, completion_guess(bench)
        source = "guessed"
    chars = sum(len(json.dumps(request, ensure_ascii=False)) for request in pending.values())
    prompt, completion = chars * tokens_per_char, len(pending) * completion_per_call
    text = (
        f"estimate: {len(pending)} calls, {prompt:,.0f} prompt and {completion:,.0f} completion "
        f"tokens ({source})"
    )
    if judge.prices is None:
        return (
            f"{text}; no price known, give --price_in and --price_out (dollars per million tokens)"
        )
    return f"{text}, {dollars_text(judge.name, judge.prices, prompt, completion)}"


def completion_guess(bench: Bench) -> int:
    """Tokens of a judgement, before there is one."""
    return min(bench.benchmark.completion_tokens, bench.parameters.get("max_tokens", MOST_TOKENS))


def dollars_text(
    name: str | None, prices: tuple[float, float], prompt: float, completion: float
) -> str:
    """What so many tokens cost, and by which prices."""
    source = "as given"
    if prices == PRICES.get(name):
        source = f"OpenAI's prices of {PRICES_OF}"
    price_in, price_out = prices
    usd = (prompt * price_in + completion * price_out) / 1e6
    return f"{usd:.2f} dollars at {price_in:g} and {price_out:g} per million ({source})"


class Ahead(NamedTuple):
    """What judging one run takes."""

    calls: int
    prompt_tokens: float
    completion_tokens: float


def ahead_of_run(bench: Bench, repeats: int) -> Ahead:
    """What judging one run will take, before there is an answer.

    The judge prompts are those that will be sent, around answers of ANSWER_CHARS characters.
    """
    # The two answers differ: nobody is asked about equal ones.
    answer, other = ([letter * ANSWER_CHARS] * len(bench.turns) for letter in "xy")
    asked = [
        ask.messages
        for question, turn in itertools.product(bench.questions, bench.turns)
        for ask in items.asks_of(bench, question, turn, answer, other)
    ]
    chars = sum(len(message["content"]) for messages in asked for message in messages)
    times = repeats * bench.samples
    calls = times * len(asked)
    return Ahead(calls, times * chars / CHARS_PER_TOKEN, calls * completion_guess(bench))


def estimate_ahead(args: argparse.Namespace, bench: Bench) -> str:
    """What judging --runs runs will take, before there is an answer: as text."""
    calls, prompt, completion = (args.runs * number for number in ahead_of_run(bench, args.repeats))
    if judges.kind_of(args.judge) == judges.PROGRAM:
        return (
            f"estimate for {args.runs} runs: {calls:,} scores, times the choices of each answer; "
            f"no dollars, {args.judge} runs on this machine"
        )
    text = (
        f"estimate for {args.runs} runs, each with one answer to {len(bench.questions)} questions "
        f"(the untrained model, base, counts as a run): {calls:,} calls, {prompt:,.0f} prompt and "
        f"{completion:,.0f} completion tokens; assumed: answers of {ANSWER_CHARS:,} characters, "
        f"judgements of {completion_guess(bench)} tokens (a judge that thinks takes several times "
        "more)"
    )
    if judges.kind_of(args.judge) != judges.SERVER:
        return f"{text}; no dollars, {args.judge} runs on this machine and generates nothing"
    prices = prices_of(args)
    if prices is None:
        return (
            f"{text}; no price known, give --price_in and --price_out (dollars per million tokens)"
        )
    return f"{text}; {dollars_text(args.judge, prices, prompt, completion)}"
