"""prices, estimate, cap"""

import argparse
import json
import os
import re
import sqlite3

from pref.judging import protocol
from pref.judging.protocol import Judge

# US dollars per million prompt and completion tokens as OpenAI published them in August 2025, by
# the model's exact name: a longer one may be another model at ten times the price. --price_in and
# --price_out stand above it.
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
BATCH_DISCOUNT = 0.5  # what a batch endpoint charges of the price
CHARS_A_TOKEN, COMPLETION_TOKENS = 4.0, 250  # guesses until this judge has answered
ENOUGH_TO_LEARN = 20  # judgements that replace the guesses


def prices_of(args: argparse.Namespace) -> tuple[float, float] | None:
    """Dollars per million prompt and completion tokens: --price_in and --price_out, or the
    table's.
    """
    if args.price_in is not None and args.price_out is not None:
        return args.price_in, args.price_out
    server = args.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    return (
        PRICES.get(args.judge) if "//api.openai.com/" in server else None
    )  # another provider has its own prices


class Budget:
    """--max_usd: no call is made that could carry the results folder's total past the cap, those in
    flight counted at the most they can cost with every try that the client may make.
    """

    def __init__(self, judge: Judge, cap: float | None, spent: float, tries: int = 1):
        self.judge, self.cap, self.spent, self.tries, self.reserved = judge, cap, spent, tries, 0.0

    def most(self, request: dict) -> float:
        """An upper bound: a token is at least a byte, and the answer no longer than allowed."""
        if self.judge.prices is None:
            return 0.0
        prompt = sum(len(message["content"].encode()) + 16 for message in request["messages"])
        limits = [request["parameters"].get(key) for key in ("max_tokens", "max_completion_tokens")]
        return self.judge.cost(prompt, max(limit or 0 for limit in limits) or protocol.MAX_TOKENS)

    def allows(self, request: dict) -> bool:
        return (
            self.cap is None
            or self.spent + self.reserved + self.tries * self.most(request) <= self.cap
        )

    def begin(self, request: dict) -> None:
        self.reserved += self.tries * self.most(request)

    def cost(self, request: dict, reply: dict) -> float | None:
        """What the reply is booked at: by its counts; at the most it can have cost where it has
        none or got lost on the way; nothing where the server refused it. None without a price.
        """
        if self.judge.prices is None:
            return None
        refused = re.fullmatch(r"http_4\d\d", reply["status"])
        counted = self.judge.cost(reply.get("prompt_tokens"), reply.get("completion_tokens"))
        return counted if counted is not None else 0.0 if refused else self.most(request)

    def end(self, request: dict, cost: float | None) -> None:
        self.reserved -= self.tries * self.most(request)
        self.spent += cost or 0.0


def estimate(db: sqlite3.Connection, judge: Judge, pending: dict[str, dict]) -> str:
    """Calls, tokens and dollars of `pending`, from what this judge has needed so far, else from
    rules of thumb.
    """
    count, prompts, completions, length = db.execute(
        "SELECT COUNT(*), SUM(prompt_tokens), SUM(completion_tokens), SUM(LENGTH(request)) FROM judgements "
        "WHERE judge = ? AND prompt_tokens > 0 AND completion_tokens > 0",
        (judge.name,),
    ).fetchone()
    learned = count >= ENOUGH_TO_LEARN
    rate = prompts / length if learned else 1 / CHARS_A_TOKEN
    prompt = (
        sum(len(json.dumps(request, ensure_ascii=False)) for request in pending.values()) * rate
    )
    completion = len(pending) * (completions / count if learned else COMPLETION_TOKENS)
    source = f"from {count} judgements of it" if learned else "guessed"
    text = f"estimate: {len(pending)} calls, {prompt:,.0f} prompt and {completion:,.0f} completion tokens ({source})"
    if judge.prices is None:
        return (
            f"{text}; no price known, give --price_in and --price_out (dollars per million tokens)"
        )
    return (
        f"{text}, {judge.cost(prompt, completion):.2f} dollars at {judge.prices[0]:g} and {judge.prices[1]:g} per "
        f"million (known prices: {PRICES_OF})"
    )
