"""Every proposal as a card of the report: its text, its parents, what changed, why it stopped."""

import ast
import difflib
import re

from pref.analysis import report as pages
from pref.analysis.report import escape
from pref.discovery.marks import signed
from pref.discovery.report_data import Candidate, Story
from pref.discovery.status import clean

MOST_CHARACTERS = 6000  # of an original text
PREFIXES = re.compile(r"\b(torch|F|math|pairs)\.")


def cards_html(story: Story) -> str:
    """All proposals, folded; a link to one opens it."""
    if not story.candidates:
        return pages.none_html("There are no proposals.")
    children: dict[str, list[str]] = {}
    for one in story.candidates:
        for parent in one.entry.parents:
            children.setdefault(parent, []).append(one.id)
    known = story.by_id
    cards = "".join(card_html(one, known, children.get(one.id, [])) for one in story.candidates)
    summary = f"all {len(story.candidates)}: text, difference to the parents, fate"
    return f"<details><summary>{summary}</summary>\n{cards}</details>"


def card_html(one: Candidate, known: dict[str, Candidate], children: list[str]) -> str:
    entry = one.entry
    title = f"{clean(one.label)} · {clean(entry.by)}, {clean(entry.operator)} · {fate(one)}"
    lines = [pages.note_html(clean(one.thought.strip()))]
    for name, ids in (("parents", entry.parents), ("children", children), ("copies", one.copies)):
        if ids:
            lines.append(f"<p>{name}: {', '.join(link_html(id, known) for id in ids)}</p>\n")
    if entry.stopped:
        at, why = entry.stopped["at"], entry.stopped["why"]
        lines.append(f"<p>stopped at {escape(clean(at))}: {escape(clean(why))}</p>\n")
    lines.append(programs_html(one, known))
    return (
        f"<details><summary>{escape(title)}</summary>\n"
        f'<div class="proposal" id="{escape(one.id)}">\n{"".join(lines)}</div></details>\n'
    )


def fate(one: Candidate) -> str:
    """What became of it, in a few words."""
    if one.gain:
        return f"{signed(one.gain.gain)} ± {100 * one.gain.gain_se:.1f} points, shrunk"
    return f"stopped at {clean(one.entry.stopped['at'])}" if one.entry.stopped else "not measured"


def link_html(id: str, known: dict[str, Candidate]) -> str:
    if id not in known:
        return escape(clean(id))
    return f'<a href="#{escape(id)}">{escape(clean(known[id].label))}</a>'


def programs_html(one: Candidate, known: dict[str, Candidate]) -> str:
    """The printed text beside its difference to the parents, or what was proposed."""
    if not one.text:
        text = clean(one.original)[:MOST_CHARACTERS]
        if not text.strip():
            return ""
        return f'<h4>as proposed, never executed</h4>\n<pre class="wrap">{escape(text)}</pre>\n'
    parts = [f"<div><h4>loss.py</h4>\n<pre>{escape(clean(one.text))}</pre></div>\n"]
    for id in one.entry.parents:
        if id in known and known[id].text:
            heading = f"<h4>against {link_html(id, known)}</h4>"
            parts.append(f"<div>{heading}\n<pre>{diff_html(known[id], one)}</pre></div>\n")
    return f'<div class="programs">\n{"".join(parts)}</div>\n'


def diff_html(parent: Candidate, child: Candidate) -> str:
    """Lines that differ: new ones bold, old ones pale. The name differs anyway."""
    before, after = (
        clean(one.text).replace(one.label, "loss").splitlines() for one in (parent, child)
    )
    lines = []
    for line in list(difflib.unified_diff(before, after, lineterm="", n=0))[2:]:
        if line.startswith("@@"):
            continue
        tag = "b" if line.startswith("+") else "del"
        lines.append(f"<{tag}>{escape(line)}</{tag}>")
    return "\n".join(lines) or "the same text"


def formula(text: str) -> str:
    """A printed program in one line, without the modules' names; "" if it is no program."""
    try:
        body = ast.parse(text).body[-1].body
    except (SyntaxError, ValueError, RecursionError, IndexError, AttributeError):
        return ""
    steps = [ast.unparse(node) for node in body if isinstance(node, ast.Assign)]
    return PREFIXES.sub("", "; ".join(steps))
