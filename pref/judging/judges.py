"""What a judge is to judge.py, whoever it is.

server   MODEL     text of a model behind an OpenAI-compatible server: server_judge.py
local    hf:PATH   probabilities of the possible verdicts, on this machine: local_judge.py
score    rm:PATH   a score of each answer, which no prompt asks for: `score_judge`
program  py:FILE   the same from a function of the user's: program_judge.py
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pref.files import disk, win_rates

SERVER, LOCAL, SCORE, PROGRAM = "server", "local", "score", "program"
KIND_OF_PREFIX = {"hf": LOCAL, "rm": SCORE, "py": PROGRAM}
SCORE_KINDS = (SCORE, PROGRAM)  # these see the answers alone, and no prompt


@dataclass(frozen=True)
class Judge:
    """A judge, local or behind a server.

    `ask` maps a request (see identity.Identity.request) to a reply: a dict with `status` and, where
    they are known, the other fields of `reading.Verdict`, `judgement` (the judge's text),
    `finish_reason`, `token_logprobs`, `rating_mass`, `served_model`, `system_fingerprint`,
    `prompt_tokens` and `completion_tokens`. The status is "ok" if the reply has a verdict, else the
    reason why it has none (README.md lists them). `ask` raises UserError for an error that would
    stop every later request as well.
    """

    name: str  # --judge, as given
    params_b: float | None  # billions of parameters; None if unknown
    parameters: dict  # everything besides the messages that determines a judgement
    ask: Callable[[dict], dict]
    concurrency: int  # requests in flight at a time
    probe: Callable[[dict], dict] | None = None  # parameters -> parameters that the server accepts
    server: str = ""  # address or name, see identity.py; "" for a judge on this machine
    prices: tuple[float, float] | None = None  # dollars per million prompt, completion tokens
    kind: str = SERVER
    # Called once with all pending requests, before the first is asked: for work in batches.
    prepare: Callable[[list[dict]], None] | None = None

    @property
    def is_here(self) -> bool:
        """Whether it runs on this machine and costs no money."""
        return self.kind != SERVER

    def cost(self, prompt_tokens: float | None, completion_tokens: float | None) -> float | None:
        """Dollars, or None if the prices or a count are unknown."""
        if self.prices is None or prompt_tokens is None or completion_tokens is None:
            return None
        price_in, price_out = self.prices
        return (prompt_tokens * price_in + completion_tokens * price_out) / 1e6


def kind_of(name: str | None) -> str:
    """The kind of the judge that --judge names."""
    prefix, colon, _ = (name or "").partition(":")
    return KIND_OF_PREFIX.get(prefix, SERVER) if colon else SERVER


def path_of(name: str) -> str:
    """The path in --judge hf:PATH."""
    return name.partition(":")[2]


def recorded_name(judge: str) -> str:
    """The name of --judge in the store and in judgements.csv: a program's without its folders."""
    return f"py:{Path(path_of(judge)).name}" if kind_of(judge) == PROGRAM else judge


# ---- score judges --------------------------------------------------------------------------------


class NoScore(Exception):
    """One conversation has no score. status: as in README.md's table; text: what is the matter."""

    def __init__(self, status: str, text: str):
        super().__init__(text)
        self.status, self.text = status, text


def score_judge(
    name: str,
    params_b: float | None,
    parameters: dict,
    score: Callable[[list[dict]], float],
    prepare: Callable[[list[dict]], None] | None = None,
) -> Judge:
    """A judge that gives each conversation a number, the higher the better.

    score: of a conversation, whose last message is the answer; may raise NoScore. parameters:
    everything that determines a score. prepare: see `Judge`.
    """
    scores: dict[str, float] = {}  # a baseline is compared with many runs

    def score_once(messages: list[dict]) -> float:
        key = disk.sha256_json(messages)
        if key not in scores:
            scores[key] = float(score(messages))
        return scores[key]

    ask = functools.partial(ask_for_scores, score_once)
    return Judge(name, params_b, parameters, ask, concurrency=1, kind=SCORE, prepare=prepare)


def ask_for_scores(score: Callable[[list[dict]], float], request: dict) -> dict:
    """The reply of a score judge: the run's score and, with a baseline, the preference
    1 + sigmoid(score of the run - score of the baseline), as in the Bradley-Terry model that reward
    models are trained with.
    """
    try:
        own = score(request["messages"])
        other = score(request["baseline_messages"]) if "baseline_messages" in request else None
    except NoScore as error:
        return {"status": error.status, "judgement": error.text}
    if not all(map(math.isfinite, (own, own if other is None else other))):
        return {"status": "nonfinite", "judgement": f"scores {own}, {other}"}
    preference = None if other is None else win_rates.of_log_odds(own - other)
    text = "" if other is None else f"baseline: {other!r}"
    return {"status": "ok", "score": own, "preference": preference, "judgement": text}
