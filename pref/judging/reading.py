"""How a judge's reply becomes a score or a winner, or the reason why it has none.

The official reading is FastChat's (`protocol.read_rating`, `protocol.read_verdict`) with three
restrictions, each of which only takes verdicts away:

- thoughts are not read: a judge that reasons aloud weighs ratings there which it then rejects
- a judgement that was cut off has no rating in single brackets, and none if it was cut off within
  its thoughts
- a number in single brackets, which is often an index or a citation, counts only in a judgement
  that came to its end and has no double bracket

`Reading` says which reading was asked for. It is applied to what is stored: another reading sends
nothing and costs nothing.
"""

import re
from typing import NamedTuple

from pref.judging import protocol
from pref.model.completions import CUT_OFF

FIRST, LAST = "first", "last"  # --verdict
MIN_RATING_MASS = 0.5  # --min_rating_mass

FALLBACK, SEVERAL = "fallback", "several"  # column `reading`; "" is a plain verdict

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


class Verdict(NamedTuple):
    """What a reply's text says."""

    status: str  # "ok", or why there is no verdict
    score: float | None = None  # single grading: 1 to 10
    winner: str | None = None  # pair grading: A, B or tie
    reading: str = ""  # FALLBACK, SEVERAL or ""


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


def read_text(text: str, finish_reason: str | None, is_pair: bool, which: str = FIRST) -> Verdict:
    """The verdict in the text of a reply, which is a comparison of a pair or a rating.

    finish_reason: as the server gave it. which: FIRST or LAST.
    """
    finish = str(finish_reason or "").lower()
    answer = without_thoughts(text)
    cut_off = finish in CUT_OFF or not answer.finished_thinking

    # 1) Marks in double brackets.
    value, reading = read_marks(answer.text, is_pair, which)
    if cut_off and which == LAST:
        value = None  # the last one may not have been written
    # 2) FastChat's second try: a rating in single brackets.
    if value is None and not is_pair and finish in ENDED and "[[" not in answer.text:
        value, reading = read_single_brackets(answer.text, which), FALLBACK

    if value is not None:
        pair, single = (value, None) if is_pair else (None, value)
        return Verdict("ok", score=single, winner=pair, reading=reading)
    if cut_off:
        return Verdict("length")
    if answer.text.strip():
        return Verdict("parse")
    return Verdict("thoughts" if text.strip() else "empty")


def read_marks(text: str, is_pair: bool, which: str) -> tuple[float | str | None, str]:
    """The verdict in double brackets, None without one, and SEVERAL if the first in the text and
    the last differ.

    FIRST is FastChat's: of ratings the first; of letters A before B before C, wherever they stand.
    """
    if is_pair:
        official = protocol.read_verdict(text)
        marks = [protocol.VERDICTS[mark] for mark in re.findall(r"\[\[[ABC]\]\]", text)]
        first, last = (marks[0], marks[-1]) if marks else (None, None)
    else:
        numbers = protocol.RATING.findall(text)
        first, last = (rating_of(numbers[i]) if numbers else None for i in (0, -1))
        official = first
    return (official if which == FIRST else last), (SEVERAL if first != last else "")


def read_single_brackets(text: str, which: str) -> float | None:
    numbers = protocol.RATING_BACKUP.findall(text)
    return rating_of(numbers[0 if which == FIRST else -1]) if numbers else None


def rating_of(number: str) -> float | None:
    """A number as a rating; None if it is not from 1 to 10."""
    rating = float(number)
    return rating if 1 <= rating <= 10 else None


def read_stored(row: dict, reading: Reading) -> dict:
    """A stored reply as `reading` has it: `row` with its status, score, winner and reading.

    row: status, score, winner and reading by the official reading, judgement, finish_reason,
    rating_mass and grading ("single" or "pair").
    """
    if row["rating_mass"] is not None:  # a local judge
        if row["status"] == "ok" and not row["rating_mass"] >= reading.min_rating_mass:
            return row | {"status": "mass", "score": None, "winner": None}
        return row
    if reading.verdict == FIRST or row["status"] not in READ_STATUSES:
        return row
    is_pair = row["grading"] == "pair"
    verdict = read_text(row["judgement"] or "", row["finish_reason"], is_pair, reading.verdict)
    return row | verdict._asdict()
