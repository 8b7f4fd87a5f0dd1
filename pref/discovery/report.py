"""The report of a search: one HTML file that opens from disk, its figures, and a table of all.

    FOLDER/report/report.html, FOLDER/report/figures/*.{png,svg}, FOLDER/report/table.csv

It begins with what the confirmation says, or with "not confirmed yet". Style sheet, tables and
figures are those of analyze.py's report. Names, thoughts and reasons come from models: they pass
`status.clean` and are escaped, and the page admits no script but its own.
"""

import csv
import io
from pathlib import Path

from pref.analysis import report as pages
from pref.analysis.report import escape
from pref.discovery import figures, marks, proposal_cards, report_tables, settings, status
from pref.discovery.archive import SEED, Archive
from pref.discovery.figures import Drawn
from pref.discovery.report_data import Candidate, Story, read_story
from pref.discovery.status import clean
from pref.discovery.winner import NOT_CONFIRMED, measured_with, train_command
from pref.files import disk

TEMPLATE = Path(__file__).with_name("report_template.html")
FEW_PAIRS = 400  # below it the report says how coarse its accuracies are
BADGES = {"better": "better", "worse": "worse", "undecided": "not decided"}


def write_report(folder: Path, archive: Archive) -> Path:
    """Write the report of the search in `folder` and return its path. Raises UserError for a file
    of the search that cannot be read.
    """
    folder = Path(folder)
    place = folder / "report"
    story = read_story(folder, archive)
    drawn = figures.draw_all(story, place / "figures")
    disk.write_text(place / "table.csv", csv_text(report_tables.all_rows(story)))
    page = TEMPLATE.read_text(encoding="utf-8")
    disk.write_text(place / "report.html", pages.fill(page, page_parts(story, drawn)))
    return place / "report.html"


def page_parts(story: Story, drawn: dict[str, Drawn]) -> dict[str, str]:
    """HTML for each placeholder of the template."""

    def show(*names: str) -> str:
        return figures_html(story, [drawn[name] for name in names if name in drawn])

    return {
        **pages.own_parts(TEMPLATE.with_suffix(".js")),
        "title": escape(clean(f"Search for a preference loss: {story.folder.name}")),
        "opening": pages.opening_html(opening(story)),
        "answer": report_tables.confirmation_html(story) + pages.caveats_html(caveats(story)),
        "facts": pages.facts_html(facts(story)),
        "best": best_html(story),
        "score": show("score"),
        "lineage": show("ancestry", "lineage"),
        "losses": show("curves"),
        "belief": show("agreement", "confirmation") + report_tables.control_html(story),
        "funnel": show("funnel", "cells") + report_tables.funnel_html(story),
        "table": report_tables.task_html(story) + report_tables.candidates_html(story),
        "proposals": proposal_cards.cards_html(story),
    }


# ---- the answer ---------------------------------------------------------------------------------


def opening(story: Story) -> dict:
    """The confirmation's verdict in words, or that there is none; then the best of the search."""
    best = story.ranking[0] if story.ranking else None
    if not story.confirmation:
        return {
            "sentences": [f"{NOT_CONFIRMED}.", best_text(story, best)],
            "verdict": "not confirmed",
        }
    verdict = clean(story.confirmation["verdict"]).rstrip(".")
    words = [row["word"] for row in story.confirmation["candidates"]]
    word = next((word for word in ("better", "worse", "undecided") if word in words), "equivalent")
    if not story.confirmation.get("confirmatory"):
        if not verdict.startswith("not confirmatory"):
            verdict = f"not confirmatory, the pairs were seen: {verdict}"
        return {"sentences": [f"{verdict}."], "verdict": "not confirmatory"}
    return {"sentences": [f"{verdict}."], "verdict": BADGES.get(word, word)}


def best_text(story: Story, best: Candidate | None) -> str:
    """The best of the search by shrunk gain, in a sentence."""
    if best is None:
        return "Nothing was measured: the funnel says where the proposals ended."
    gain = best.gain
    how, unit = measured_with(gain), settings.unit_of(gain, settings.read(story.folder))
    if gain.measured == "trained" and gain.difference < 0:
        return (
            "No candidate that was trained has done as well as DPO: the best, "
            f"{clean(best.label)}, is at {status.points(gain.difference)} {unit} ({how})."
        )
    return (
        f"The best is {clean(best.label)}: {status.points(gain.difference)} {unit} over "
        f"DPO as measured, {status.points(gain.gain)} ± {100 * gain.gain_se:.1f} of it to be "
        f"expected again ({how})."
    )


def caveats(story: Story) -> list[str]:
    """What the numbers are without."""
    found = []
    if not story.confirmation:
        found.append(
            "Every number below was selected on: the best of many looks better than it is. "
            f"To ask unseen pairs, once: python discover.py {clean(str(story.folder))} --confirm 3"
        )
    if story.pairs and story.pairs < FEW_PAIRS:
        found.append(
            f"The search measured accuracy on {story.pairs} validation pairs: one pair is "
            f"{100 / story.pairs:.1f} points, and differences of a few points are chance."
        )
    seeds = [one for one in story.candidates if one.gain and one.entry.by == SEED]
    seed = max(seeds, key=lambda one: one.gain.gain, default=None)
    if seed and story.ranking and seed.gain.gain > story.ranking[0].gain.gain:
        found.append(
            f"Of the losses that the search began with, {clean(seed.label)} gains more than the "
            f"best of its proposals: {marks.signed(seed.gain.gain)} points over DPO, shrunk."
        )
    trained = [one for one in story.candidates if one.gain and one.gain.measured == "trained"]
    if len(trained) < 2:
        found.append("Nothing was trained beside DPO: all gains are those of the proxy.")
    return found


def facts(story: Story) -> list[list]:
    recorded = settings.read(story.folder)
    proposed = [one for one in story.candidates if one.entry.by != SEED]
    runs = sum(len(one.entry.runs) for one in story.candidates)
    usd = status.dollars(story.folder) or 0.0
    found = []
    if recorded:
        found += [["model", clean(recorded.model)], ["pairs", clean(recorded.data)]]
        found += [["preset", recorded.preset], ["seed", recorded.seed]]
    found += [
        ["proposers", clean(", ".join(by for by in story.proposers if by != SEED))],
        ["proposals", len(proposed)],
        ["training runs, DPO's included", runs],
        ["validation pairs of the search", story.pairs],
        ["spent on proposals", f"${usd:.2f}"],
    ]
    return found


def best_html(story: Story) -> str:
    """How to train with best.py."""
    if not story.ranking:
        return ""
    best = story.ranking[0]
    command = train_command(story.folder / "best.py", best.label, settings.read(story.folder))
    path = story.folder / "final.grid"
    grid = f"JUDGE=MODEL bash sweep.sh {path}" if path.is_file() else ""
    return (
        f'<div class="proposal">\n<h4>best.py: {link_html(best)}</h4>\n'
        f'<pre class="wrap">{escape(clean(best.text))}</pre>\n'
        "<h4>to train with it; to have answers judged</h4>\n"
        f'<pre class="wrap">{escape(clean(command))}\n{escape(clean(grid))}</pre>\n</div>'
    )


def link_html(one: Candidate) -> str:
    return f'<a href="#{escape(one.id)}">{escape(clean(one.label))}</a>'


# ---- figures ------------------------------------------------------------------------------------


def figures_html(story: Story, drawn: list[Drawn]) -> str:
    if not drawn:
        return pages.none_html("There is nothing to draw yet.")
    known = story.by_id
    parts = [
        pages.figure_html({"svg": one.stem.with_suffix(".svg"), "over": spots_html(one, known)})
        for one in drawn
    ]
    return f'<div class="figures">\n{"".join(parts)}</div>\n'


def spots_html(one: Drawn, known: dict[str, Candidate]) -> str:
    """Links over a figure, a transparent circle for each place that stands for a proposal."""
    if not one.spots:
        return ""
    width, height = pages.read_svg(one.stem.with_suffix(".svg"))["size"]
    links = "".join(
        f'<a href="#{escape(spot.id)}"><circle cx="{spot.x:.1f}" cy="{spot.y:.1f}" '
        f'r="{spot.radius:g}"><title>{escape(clean(known[spot.id].label))}</title></circle></a>'
        for spot in one.spots
    )
    return f'<svg class="spots" viewBox="0 0 {width} {height}">{links}</svg>'


def csv_text(rows: list[list]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()
