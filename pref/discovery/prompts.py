"""What a language model is told: the form, generated from the form's own tables, and what the
search knows, with its noise.

Each request stands alone. No conversation grows with the search, so that every proposal costs about
the same, and its request depends on the archive and the seed alone.
"""

import itertools
import random
from collections import Counter
from typing import NamedTuple

from pref.discovery import fingerprint, form_tables
from pref.discovery.proposals import Known, View

BEST, DIFFERENT, REFUSALS, REPEATED = 4, 3, 3, 5  # how many of each are shown
MOST_WHY = 300  # characters of a refusal
MOST_TEXT = 3000  # characters of a program that is shown without being asked about

SYSTEM = """\
You invent loss functions for training a language model on preference pairs. For each pair the \
loss sees log-probabilities (nats, summed over the response's tokens) of the chosen and the \
rejected response under the policy and under a frozen reference, and the numbers of tokens; it \
returns one value a pair, and AdamW lowers the mean. What you write is translated, not executed: \
only the form below exists.

{form}

a = chosen - ref_chosen and b = rejected - ref_rejected are the log-ratios, rho = a - b is the \
margin against the reference, delta = chosen - rejected the one without it.

DPO in this form:

{example}
Scale does not matter (AdamW, clipped gradients); the shape of the gradient does. At the start \
every log-ratio is exactly 0: the gradient there must be finite and should raise the chosen \
response against the rejected one. Margins reach about {visited:.2g} nats in this setting. A \
program that differs from an earlier one in scale or spelling alone is refused before training."""

REPLY = """\
Reply with one JSON object and nothing else: {"thought": the idea in at most 80 words, "name": a \
short name of small letters and _, "code": the program as one string}."""

REPAIR = """\
The program is refused: {why}

Correct it, and keep the idea. """

# What the parts of a cell's name mean (fingerprint.py).
CELL_WORDS = {
    "lets-go": "gives pairs that are ranked badly (rho = -20) much less gradient than at rho = 0",
    "constant-tail": "gives pairs that are ranked badly (rho = -20) about the gradient of rho = 0",
    "pulls-harder": "gives pairs that are ranked badly (rho = -20) much more gradient than at "
    "rho = 0",
    "stops": "has no gradient left for pairs that are ranked well (rho = 20)",
    "pulls-back": "lowers the margin of pairs that are ranked well (rho = 20)",
    "keeps-pushing": "still raises the margin of pairs that are ranked well (rho = 20)",
    "free": "does not mind both responses becoming likelier together (a = b = 5)",
    "held": "holds both responses near the reference (a gradient against a = b = 5)",
}


class Task(NamedTuple):
    """What is asked for."""

    operator: str
    text: str
    parents: list[str]  # ids


class Prompt(NamedTuple):
    """A request's messages, and what they ask for."""

    messages: list[dict]
    task: Task


def prompt(view: View, rng: random.Random, coupled: bool = False) -> Prompt:
    """The messages for one proposal. rng: draws the task. coupled: a loss may look at the batch."""
    best = best_of(view)
    shown = [*best, *different_from(best, view)]
    task = draw_task(view, best, shown, rng)
    parts = [
        f"Setting\n{view.setting.strip()}",
        "Gains are differences to DPO in validation accuracy, in points, shrunk towards 0 by their "
        "noise; +- is one standard error.",
    ]
    parts += ["The best so far", *map(describe, best)] if best else []
    parts += ["Others, as different as there are", *map(describe, shown[len(best) :])] * (
        len(shown) > len(best)
    )
    parts += [text for text in (refusals(view), repeats(view)) if text]
    parts += [f"Task\n{task.text}", REPLY]
    messages = [
        {"role": "system", "content": system_prompt(view, coupled)},
        {"role": "user", "content": "\n\n".join(parts)},
    ]
    return Prompt(messages, task)


def system_prompt(view: View, coupled: bool) -> str:
    return SYSTEM.format(
        form=form_tables.describe(coupled), example=view.dpo.text, visited=float(view.visited)
    )


def repair(messages: list[dict], code: str, why: str) -> list[dict]:
    """The messages that ask once more, with the words of the refusal."""
    code = clipped(code, form_tables.MAX_CHARACTERS)
    return [
        *messages,
        {"role": "assistant", "content": code},
        {"role": "user", "content": REPAIR.format(why=clipped(why, MOST_WHY)) + REPLY},
    ]


def clipped(text: str, most_bytes: int) -> str:
    """The start of a text. In bytes, since what a request can cost is counted in them."""
    return text.encode()[:most_bytes].decode(errors="ignore")


# ---- what is shown -------------------------------------------------------------------------------


def measured(view: View) -> list[Known]:
    """Candidates with a gain, the best first."""
    known = [one for one in view.known if one.gain is not None and one.text]
    return sorted(known, key=lambda one: (-one.gain, one.size, one.id))


def best_of(view: View) -> list[Known]:
    return [one for one in measured(view) if len(one.text) <= MOST_TEXT][:BEST]


def different_from(best: list[Known], view: View) -> list[Known]:
    """Of the other measured ones those that are farthest, by behaviour, from all that are shown."""
    chosen = [one for one in best if one.field is not None]
    left = [one for one in measured(view) if one.field is not None and one not in best]
    left = [one for one in left if len(one.text) <= MOST_TEXT]
    found: list[Known] = []
    while left and chosen and len(found) < DIFFERENT:
        nearest = [min(fingerprint.distance(one.field, c.field) for c in chosen) for one in left]
        farthest = left.pop(nearest.index(max(nearest)))
        chosen.append(farthest)
        found.append(farthest)
    return found


def describe(one: Known) -> str:
    """A candidate's name, numbers and text."""
    facts = [gain_text(one)]
    if one.gradient:
        points = sorted(one.gradient.items(), key=lambda item: float(item[0]))
        values = ", ".join(f"{value:.2g} at {float(rho):g}" for rho, value in points)
        facts.append(f"gradient by rho, relative to DPO's: {values}")
    if one.cell:
        facts.append(one.cell.replace(",", ", "))
    return f"{one.id} {one.name}: {'; '.join(facts)}\n{one.text.rstrip()}"


def gain_text(one: Known) -> str:
    if one.gain is None:
        return "not measured"
    noise = "" if one.se is None else f" +- {100 * one.se:.1f}"
    how = one.measured or "proxy"
    if how == "trained":
        how = f"trained, {one.seeds} seed{'s' * (one.seeds != 1)}"
    return f"gain {100 * one.gain:+.1f} points{noise} ({how})"


def refusals(view: View) -> str:
    """The last programs that could not be used, with reasons."""
    at = ("form", "selftest", "range")
    stopped = [one for one in view.known if one.stopped and one.stopped["at"] in at][-REFUSALS:]
    lines = [f"- {one.name}: {' '.join(one.stopped['why'].split())[:MOST_WHY]}" for one in stopped]
    return "\n".join(["Refused lately", *lines]) if lines else ""


def repeats(view: View) -> str:
    """What was proposed again under another name, the most frequent first."""
    names = {one.id: one.name for one in view.known}
    near = Counter(
        one.stopped.get("near")
        for one in view.known
        if one.stopped and one.stopped["at"] == "duplicate"
    )
    texts = [
        f"{names[id]} ({count} time{'s' * (count != 1)})"
        for id, count in near.most_common(REPEATED)
        if id in names
    ]
    return f"Proposed again in other words, and refused: {', '.join(texts)}" if texts else ""


# ---- what is asked for ---------------------------------------------------------------------------


def draw_task(view: View, best: list[Known], shown: list[Known], rng: random.Random) -> Task:
    """One of four tasks; what a task needs and the archive lacks makes it another one."""
    operator = rng.choices(("improve", "combine", "fill a cell", "simplify"), (4, 3, 2, 1))[0]
    empty = empty_cells(view)
    if operator == "combine" and len(shown) > 1:
        p = best[rng.randrange(len(best))]
        q = rng.choice([one for one in shown if one is not p])
        text = f"Combine {p.id} {p.name} and {q.id} {q.name}: one loss with what is good in each."
        return Task(operator, text, [p.id, q.id])
    if operator == "fill a cell" and empty:
        cell = rng.choice(empty)
        words = "; ".join(CELL_WORDS.get(part, part) for part in cell.split(","))
        return Task(operator, f"Write a loss of a kind that nobody has tried: it {words}.", [])
    if operator == "simplify" and best and best[0].size > 3:
        p = best[0]
        text = f"Simplify {p.id} {p.name}: fewer operations and constants, without losing its gain."
        return Task(operator, text, [p.id])
    p = best[rng.randrange(len(best))] if best else view.dpo
    text = f"Improve {p.id} {p.name}: another shape of its gradient that would train better."
    return Task("improve", text, [p.id])


def empty_cells(view: View) -> list[str]:
    """Kinds of behaviour that no candidate has."""
    parts = (fingerprint.LEFT, fingerprint.RIGHT, fingerprint.SHIFT)
    cells = [",".join(names) for names in itertools.product(*parts)]
    taken = {one.cell for one in view.known}
    return [cell for cell in cells if cell not in taken]
