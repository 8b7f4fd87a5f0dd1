"""The tables of a search's report: confirmation, random control, funnel, candidates."""

import math
import re
from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean

from pref.analysis import report as pages
from pref.analysis.report import escape
from pref.discovery import estimates, figures, settings
from pref.discovery.archive import SEED
from pref.discovery.proposal_cards import formula
from pref.discovery.report_data import Candidate, Story
from pref.discovery.status import clean

MOST_CHARACTERS = 90  # of a formula or a reason in a table; the rest is in its tooltip


def points(fraction: float | None) -> float | None:
    return None if fraction is None else round(100 * fraction, 2)


def section(title: str, note: str, headers: list[str], rows: list[list], **more) -> str:
    """A table under its heading."""
    table = pages.table_html(headers, rows, escape(title), MOST_CHARACTERS, **more)
    return f'<div class="table">\n<h3>{escape(title)}</h3>\n{pages.note_html(note)}{table}</div>\n'


# ---- confirmation and control -------------------------------------------------------------------


def confirmation_html(story: Story) -> str:
    """What the confirmation measured, beside what the search had measured."""
    if not story.confirmation:
        return ""
    known, rows = story.by_id, []
    for row in story.confirmation["candidates"]:
        one = known.get(row["id"])
        gain = one.gain if one else None
        low, high = points(row["low"]), points(row["high"])
        interval = None if low is None or low != low else f"[{low:+.1f}, {high:+.1f}]"
        rows.append(
            [
                clean(one.label if one else row["name"]),
                row["word"],
                points(row["difference"]),
                interval,
                row["p_holm"],
                points(row.get("detectable")),
                points(gain.difference) if gain else None,
                points(gain.gain) if gain else None,
            ]
        )
    headers = ["loss", "verdict", "difference to DPO", "95 % interval", "p (Holm)", "detectable"]
    headers += ["measured in the search", "shrunk"]
    pairs, seeds = story.confirmation["pairs"], len(story.confirmation["seeds"])
    margin = points(story.confirmation["margin"])
    note = (
        f"Points of accuracy on {pairs} pairs and {seeds} seeds that the search never saw, against "
        f"DPO with beta {story.confirmation.get('dpo_beta', 'as tuned')}. Equivalent: within "
        f"±{margin:.1f} points. Detectable: the difference that would be found with power 0.8."
    )
    return section("Confirmation", note, headers, rows, digits=[None, None, 1, None, 3, 1, 1, 1])


def control_html(story: Story) -> str:
    """The best on the proxy beside the best of as many random proposals."""
    arms = {"this search": story.candidates, "random control": story.control}
    rows = []
    for name, candidates in arms.items():
        found = [one for one in candidates if one.entry.proxy and one.entry.by != SEED]
        found = [one for one in found if one.entry.reached_proxy]
        if not found:
            continue
        shrunk = estimates.shrink(
            {x.id: (x.entry.proxy["difference"], x.entry.proxy["se"]) for x in found}
        )
        best = max(found, key=lambda one: (one.entry.proxy["difference"], one.id))
        proposed = sum(one.entry.by != SEED for one in candidates)
        row = [name, proposed, len(found), clean(best.label)]
        row += [points(best.entry.proxy["difference"]), points(best.entry.proxy["se"])]
        rows.append([*row, points(shrunk[best.id][0])])
    if len(rows) < 2:
        return pages.none_html("There is no random control: nothing to compare the search with.")
    headers = ["", "proposals", "on the proxy", "the best there", "gain over DPO", "SE", "shrunk"]
    note = (
        "Points of accuracy on the proxy, the only measurement that both have. A search that does "
        "not beat its control has found what drawing at random finds."
    )
    digits = [None, None, None, None, 1, 1, 1]
    return section("Against random proposals", note, headers, rows, digits=digits)


# ---- funnel -------------------------------------------------------------------------------------


def funnel_html(story: Story) -> str:
    """Who came how far, with dollars, and the reasons of the rest."""
    counts = figures.funnel_counts(story)
    arms = list(counts["proposed"])
    rows = [[stage, *(by_arm[by] for by in arms)] for stage, by_arm in counts.items()]
    entries = [one.entry for one in story.candidates]
    rows.append(["dollars", *(round(sum(e.usd for e in entries if e.by == by), 4) for by in arms)])
    headers = ["passed", *map(clean, arms)]
    return section("By proposer", "", headers, rows) + reasons_html(story, arms)


def reasons_html(story: Story, arms: list[str]) -> str:
    """Why proposals ended, alike reasons together, the commonest first."""
    counts: Counter[tuple[str, str]] = Counter()
    by_arm: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for one in story.candidates:
        if one.entry.stopped:
            key = one.entry.stopped["at"], kind_of(one.entry.stopped["why"])
            counts[key] += 1
            by_arm[key][one.entry.by] += 1
    rows = [
        [clean(at), clean(why), *(by_arm[at, why][by] for by in arms)]
        for (at, why), _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]
    if not rows:
        return ""
    headers = ["stopped at", "because", *map(clean, arms)]
    return section("Reasons", "Lines, ids, names and numbers are left out.", headers, rows)


def kind_of(why: str) -> str:
    """A reason without what differs from proposal to proposal."""
    why = re.sub(r"^line \d+: ", "", why)
    why = re.sub(r"\bp\d{4,}\w*", "a candidate", why)
    why = re.sub(r"'[^']{0,80}'", "'...'", why)
    return re.sub(r"(?<![\w.])[-+]?\d[\d.,]*(e[-+]?\d+)?", "n", why)


# ---- the task -----------------------------------------------------------------------------------


def task_html(story: Story) -> str:
    """With --task: score and KL of each candidate that was trained, means over its seeds."""
    rows = []
    for one in story.candidates:
        runs = [run["task"] for run in one.entry.runs.values() if "task" in run]
        if not runs:
            continue
        gaps = [fmean(run["gaps"]) for run in runs if run["gaps"] is not None]
        row = [one.id, clean(one.entry.name), len(runs), fmean(run["score"] for run in runs)]
        row += [fmean(run["kl"] for run in runs), fmean(gaps) if gaps else None]
        rows.append([*row, len(runs) - len(gaps)])
    if not rows:
        return ""
    headers = ["id", "name", "seeds", "score", "KL, nats an answer", "over DPO at equal KL"]
    headers += ["seeds beyond DPO's KL"]
    rows.sort(key=lambda row: math.inf if row[5] is None else -row[5])
    note = (
        "What the search selected trained candidates by: the score minus that of DPO, trained with "
        "half, once and twice the learning rate, at the candidate's own KL. Nothing is "
        "extrapolated: where DPO does not reach the KL, there is no difference."
    )
    name = Path(story.settings.get("task") or "task").stem
    table = section(f"Task: {name}", note, headers, rows, digits=[None] * 3 + [3, 2, 3, None])
    return linked(table)


# ---- candidates ---------------------------------------------------------------------------------


def candidates_html(story: Story) -> str:
    """Every candidate that was measured, the best first."""
    ranked, recorded = story.ranking, settings.read(story.folder)
    others = [one for one in story.candidates if one.gain and one not in ranked]
    if not ranked + others:
        return pages.none_html("No candidate was measured.")
    headers = ["id", "name", "shrunk gain", "its SE", "gain as measured", "seeds trained", "proxy"]
    headers += ["by", "parents", "size", "copies refused", "cell", "formula"]
    rows = [candidate_row(one) for one in ranked + others]
    units = dict.fromkeys(settings.unit_of(x.gain, recorded) for x in ranked + others)
    note = (
        f"Gains over DPO, in {' or, if not trained, in '.join(units)}: on what the search selected "
        "on; the proxy's with its SE. Copies: proposals that were refused because they behave as "
        "this one."
    )
    digits = [None, None, 1, 1, 1, *[None] * 8]
    table = section("Measured candidates", note, headers, rows, digits=digits)
    return linked(table)


def linked(table: str) -> str:
    """An id that fills a cell leads to its proposal."""
    return re.sub(r">(p\d{4,9})</td>", r'><a href="#\1">\1</a></td>', table)


def candidate_row(one: Candidate) -> list:
    entry, gain, proxy = one.entry, one.gain, one.entry.proxy
    shown = f"{100 * proxy['difference']:+.1f} ±{100 * proxy['se']:.1f}" if proxy else None
    return [
        one.id,
        clean(entry.name),
        points(gain.gain),
        points(gain.gain_se),
        points(gain.difference),
        len(entry.runs),
        shown,
        clean(entry.by),
        clean(", ".join(entry.parents)) or None,
        entry.size,
        len(one.copies),
        (entry.cell or "").replace("-", "\N{NON-BREAKING HYPHEN}").replace(",", ", "),
        clean(formula(one.text)),
    ]


def all_rows(story: Story) -> list[list]:
    """table.csv: every proposal, header first. Gains are fractions."""
    headers = ["id", "name", "by", "operator", "parents", "round", "usd", "size", "cell"]
    headers += ["stopped_at", "why", "proxy_difference", "proxy_se", "seeds", "measured"]
    headers += ["difference", "se", "gain", "gain_se", "copies", "formula"]
    rows = [headers]
    for one in story.candidates:
        entry, gain, proxy = one.entry, one.gain, one.entry.proxy or {}
        stopped = entry.stopped or {}
        row = [one.id, entry.name, entry.by, entry.operator, " ".join(entry.parents)]
        row += [entry.round, entry.usd, entry.size, entry.cell, stopped.get("at")]
        row += [stopped.get("why"), proxy.get("difference"), proxy.get("se"), len(entry.runs)]
        row += (
            [gain.measured, gain.difference, gain.se, gain.gain, gain.gain_se] if gain else [""] * 5
        )
        rows.append([*row, " ".join(one.copies), formula(one.text)])
    return [[clean(x) if isinstance(x, str) else x for x in row] for row in rows]
