"""How a judge's reply becomes a verdict, or the reason why it has none.

Which marks a verdict has is the benchmark's matter; here is what holds for every text:

- thoughts are not read: a judge that reasons aloud weighs verdicts there which it then rejects
- a judgement that was cut off within its thoughts has no verdict
- a mark that is often something else (MT-Bench: a number in single brackets, which may be an index
  or a citation) counts only in a judgement that came to its end

`Reading` says which reading was asked for. It is applied to what is stored: another reading sends
nothing and costs nothing.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from pref.model.completions import CUT_OFF

FIRST, LAST = "first", "last"  # --verdict
MIN_RATING_MASS = 0.5  # --min_rating_mass

# Column `reading`; "" is a plain verdict.
FALLBACK, SEVERAL = "fallback", "several"

# A finish_reason, in lower case, of an answer that came to its end. OpenAI's is "stop"; the others
# are those of servers that translate another API.
ENDED = frozenset(("stop", "eos", "eos_token", "end_turn", "stop_sequence"))

# Statuses of replies that have a text to read. `thoughts`: the reply has nothing else.
READ_STATUSES = ("ok", "parse", "length", "empty", "thoughts")

# What opens and closes thoughts, in the spellings that open-weights models print.
TAG = r"(?:seed:)?(?:think|thinking|thought|thoughts|reason|reasoning|reflection)"
PAIRS = {  # closing is not opening with a slash: Sky-T1, Cohere, Apertus, Gemma 4, Granite
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|start_thinking|>": "<|END_THINKING|>",
    "<|inner_prefix|>": "<|inner_suffix|>",
    "<|channel>thought": "<channel|>",
    "here is my thought process:": "Here is my response:",
}
OPENS = rf"<{TAG}>|\[THINK\]|◁think▷|{'|'.join(map(re.escape, PAIRS))}"
CLOSES = rf"</{TAG}>|\[/THINK\]|◁/think▷|{'|'.join(map(re.escape, PAIRS.values()))}"
OPENS_THOUGHT, CLOSES_THOUGHT = (re.compile(p, re.IGNORECASE) for p in (OPENS, CLOSES))
# gpt-oss: <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...
CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)[^<]*<\|message\|>")
# The same from a server that leaves special tokens out: analysisWe see ...assistantfinalRating: ...
BARE_ANALYSIS, BARE_FINAL = re.compile(r"\s*analysis(?=[A-Z])"), "assistantfinal"
CHANNEL_END = re.compile(r"<\|(?:end|return|start)\|>")


class Reading(NamedTuple):
    """How stored replies are read."""

    verdict: str = FIRST  # of several verdicts in one text; FIRST is FastChat's
    min_rating_mass: float = MIN_RATING_MASS  # local judge: least probability of all verdicts


class Reply(NamedTuple):
    """What a judge wrote."""

    text: str
    finish_reason: str | None = None  # as the server gave it
    logprobs: dict[str, float] | None = None  # of the first token's alternatives; None: not given


class Verdict(NamedTuple):
    """What a reply says of the answers as they were shown to the judge."""

    status: str  # "ok", or why there is no verdict
    score: float | None = None  # of a single answer
    winner: str | None = None  # of a pair: A (shown first), B or tie
    reading: str = ""  # FALLBACK, SEVERAL, win_rates.EQUAL or ""
    preference: float | None = None  # of a pair: from 1 (A) to 2 (B)
    label: str | None = None  # of a pair: a verdict in the judge's own letters, such as A>>B


class Answer(NamedTuple):
    """A reply's text without its thoughts."""

    text: str
    finished_thinking: bool


def without_thoughts(text: str) -> Answer:
    """The part of a reply that answers.

    <think>perhaps [[5]]</think>Rating: [[9]]    -> "Rating: [[9]]"
    perhaps [[5]]</think>Rating: [[9]]           -> the same; the chat template wrote <think>
    <think>perhaps [[5]]                         -> "", not finished
    """
    # 1) Channels: only the final one answers.
    if channels := list(CHANNEL.finditer(text)):
        last = channels[-1]
        if last[1].lower() != "final":
            return Answer("", finished_thinking=False)
        return Answer(CHANNEL_END.split(text[last.end() :])[0], finished_thinking=True)
    if BARE_ANALYSIS.match(text):
        _, final, answer = text.rpartition(BARE_FINAL)
        return Answer(answer if final else "", finished_thinking=bool(final))
    # 2) Tags: what follows the last closing one. An opening one counts only where a reply, or what
    #    is left of it, begins: elsewhere it is quoted from the answer that is judged.
    closed = list(CLOSES_THOUGHT.finditer(text))
    rest = text[closed[-1].end() :] if closed else text
    if OPENS_THOUGHT.match(rest.lstrip()):
        return Answer("", finished_thinking=False)
    return Answer(rest, finished_thinking=True)


def open_thought(prompt: str) -> str | None:
    """The closing tag of a thought that a rendered prompt leaves open, as in "...<think>\\n"."""
    opened = list(OPENS_THOUGHT.finditer(prompt))
    if not opened or prompt[opened[-1].end() :].strip():
        return None  # something follows: an answer's text, or the closing tag
    mark = opened[-1][0]
    return PAIRS.get(mark.lower(), f"{mark[0]}/{mark[1:]}")


def read_text(
    reply: Reply,
    find: Callable[[str], Verdict | None],
    fallback: Callable[[str], Verdict | None] | None = None,
    needs_end: bool = False,
) -> Verdict:
    """The verdict in the text of a reply.

    find: the verdict in a text without thoughts, None if there is none. fallback: the same by marks
    that count only in a reply that came to its end. needs_end: no verdict counts in another one.
    """
    finish = str(reply.finish_reason or "").lower()
    answer = without_thoughts(reply.text)
    cut_off = finish in CUT_OFF or not answer.finished_thinking

    verdict = None if cut_off and needs_end else find(answer.text)
    if verdict is None and fallback is not None and finish in ENDED:
        verdict = fallback(answer.text)
    if verdict is not None:
        return verdict
    if cut_off:
        return Verdict("length")
    if answer.text.strip():
        return Verdict("parse")
    return Verdict("thoughts" if reply.text.strip() else "empty")
