"""The report of a search: what it says first, what it shows, and that nothing in it can run."""

import csv
import html
import json
import re

import numpy as np
import pytest
import torch
from discovery_archives import write_archive
from report_pages import EVERYTHING, HOSTILE
from scipy import stats as scipy_stats
from test_report import Reader

from losses import LOSSES
from pref.analysis.report import escape, own_parts
from pref.discovery import (
    curves,
    estimates,
    figures,
    marks,
    proposal_cards,
    report,
    report_data,
    report_tables,
    status,
    winner,
)
from pref.discovery.archive import Archive
from pref.discovery.report_data import read_story
from pref.files import drawing
from pref.sweeping import grid
from pref.training import loss_check, loss_options

CONTROLS = "\x00\x1b[31m\x07\u202e"


@pytest.fixture(scope="module")
def fast_disk():
    """Nothing here tests that files survive a power cut, or looks at a PNG."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda file: None)
        patch.setattr(marks, "FILES", ("svg",))
        yield


@pytest.fixture(scope="module")
def search(tmp_path_factory, fast_disk):
    """A search of 40 proposals with a confirmation, and hostile text wherever a model has a say."""
    hostile = f"{EVERYTHING} {CONTROLS}"
    return write_archive(tmp_path_factory.mktemp("search") / "first", 40, hostile=hostile)


@pytest.fixture(scope="module")
def story(search):
    return read_story(search, Archive.read(search))


@pytest.fixture(scope="module")
def page(search) -> str:
    return report.write_report(search, Archive.read(search)).read_text(encoding="utf-8")


def text_of(page: str) -> str:
    return " ".join(text for tag, text in Reader(page).texts if tag not in ("style", "script"))


# ---- the page -----------------------------------------------------------------------------------


def test_it_opens_with_the_verdict_of_the_confirmation(search, page):
    verdict = json.loads((search / "confirmation.json").read_text())["verdict"]
    first = re.search(r'<p class="won">(.*?)</p>', page)[1]
    assert first == f"{escape(verdict)}."
    assert winner.NOT_CONFIRMED not in page


def test_without_a_confirmation_it_says_so_first(tmp_path, fast_disk, monkeypatch):
    monkeypatch.setattr(figures, "draw_all", lambda story, folder: {})
    folder = write_archive(tmp_path / "first", 20, confirmed=False, trained=0)
    page = report.write_report(folder, Archive.read(folder)).read_text(encoding="utf-8")
    first = re.search(r'<p class="won">(.*?)</p>', page)[1]
    assert first == "not confirmed yet: the numbers below were selected on."
    assert "all gains are those of the proxy" in page and "--confirm 3" in page


def test_where_nothing_came_up_to_dpo_the_report_and_the_terminal_say_so(story):
    lost = estimates.Gain(-0.088, 0.035, -0.0, 0.0, "trained", 6)
    best = report_data.Candidate(story.candidates[3].entry, lost)
    assert report.best_text(story, best) == (
        f"No candidate that was trained has done as well as DPO: the best, {best.label}, is at "
        "-8.8 points of accuracy (6 training seeds)."
    )
    assert status.points(-0.0) == status.points(-0.0004) == "+0.0"


def test_a_second_confirmation_is_never_called_better(search, story):
    again = story.confirmation | {"confirmatory": False}
    opening = report.opening(story._replace(confirmation=again))
    assert opening["verdict"] == "not confirmatory"
    assert opening["sentences"][0].startswith("not confirmatory, the pairs were seen: ")


def test_it_needs_nothing_else_and_runs_nothing_of_a_proposer(page):
    reader = Reader(page)
    ids = [attrs["id"] for _, attrs in reader.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in reader.elements:
        assert "style" not in attrs and not any(name.startswith("on") for name in attrs), attrs
        for name in ("src", "href", "srcset", "action", "data"):
            assert (attrs.get(name) or "#").startswith(("#", "data:")), attrs
    forbidden = {"iframe", "object", "embed", "base", "form"}
    assert {tag for tag, _ in reader.elements}.isdisjoint(forbidden)
    for part in HOSTILE:
        if escape(part) != part:
            assert part not in page
    assert not set("\x00\x1b\x07\u202e") & set(page)
    # All of it is there to be read: the thought, the reason, the original text.
    assert text_of(page).count(HOSTILE[0]) >= 3


def test_its_policy_admits_its_own_style_and_script_alone(page):
    (script,) = Reader(page).content("script")
    parts = own_parts(report.TEMPLATE.with_suffix(".js"))
    assert script == parts["script"]
    assert f"script-src 'sha256-{parts['script_hash']}'" in page
    assert f"style-src 'sha256-{parts['style_hash']}'; script-src" in page


def test_its_script_and_template_make_no_html_of_text():
    for suffix in (".html", ".js"):
        template = report.TEMPLATE.with_suffix(suffix).read_text(encoding="utf-8")
        for forbidden in ("innerHTML", "outerHTML", "eval(", "http:", "https:", "url("):
            assert forbidden not in template


def test_every_link_leads_to_a_place_of_the_page(page):
    reader = Reader(page)
    ids = {attrs["id"] for _, attrs in reader.elements if "id" in attrs}
    links = [attrs["href"] for tag, attrs in reader.elements if tag == "a"]
    assert {link.removeprefix("#") for link in links} <= ids
    assert {"p0001", "p0040", "score", "belief"} <= ids


# ---- figures ------------------------------------------------------------------------------------


def test_every_figure_is_there_and_its_spots_lie_on_it(search, story, page):
    names = {path.stem for path in (search / "report" / "figures").glob("*.svg")}
    assert names == {
        *("score", "ancestry", "lineage", "curves", "funnel", "cells", "agreement", "confirmation")
    }
    boxes = re.findall(r'<svg class="spots" viewBox="0 0 ([\d.]+) ([\d.]+)">(.*?)</svg>', page)
    assert len(boxes) == 6
    for width, height, links in boxes:
        places = re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', links)
        assert places
        assert all(0 <= float(x) <= float(width) for x, _ in places)
        assert all(0 <= float(y) <= float(height) for _, y in places)


def test_a_spot_lies_on_the_mark_of_its_proposal(story, tmp_path):
    """The marks of the SVG itself are the independent source: each measured proposal has a circle
    of the plot at its spot.
    """
    with drawing.own_style():
        drawn = figures.draw_score(story, marks.palette_of(story), tmp_path / "score")
    svg = (tmp_path / "score.svg").read_text()
    top = float(re.search(r'viewBox="0 ([\d.]+)', svg)[1])
    used = re.findall(r'<use xlink:href="#m\w+" x="([\d.]+)" y="([\d.]+)"', svg)
    uses = np.array([[float(x), float(y) - top] for x, y in used])
    for spot in drawn.spots:
        assert np.abs(uses - [spot.x, spot.y]).sum(1).min() < 0.2, spot


def test_the_curves_of_dpo_are_its_own():
    rho = torch.linspace(-10, 10, 41, dtype=torch.float64)
    curve = loss_check.curve(LOSSES["dpo"], rho, {"beta": 0.1})
    values, gradients = curves.at_one_scale(curve, rho, 3.0)
    own = -0.1 / (1 + np.exp(0.1 * rho.numpy()))
    size = np.sqrt(np.mean(own[np.abs(rho.numpy()) <= 3] ** 2))
    np.testing.assert_allclose(gradients.numpy(), own / size, rtol=1e-9)
    assert values[20] == 0 and abs(values[0].item()) < 100


def test_the_text_of_the_agreement_is_scipys_tau(story):
    both = [
        one
        for one in story.candidates
        if one.gain and one.gain.measured == "trained" and one.entry.proxy
    ]
    proxy = [one.entry.proxy["difference"] for one in both]
    tau = scipy_stats.kendalltau(proxy, [one.gain.difference for one in both]).statistic
    assert f"Kendall's tau {tau:.2f}, " in figures.agreement_text(story)
    assert f"over {len(both)} losses" in figures.agreement_text(story)


def test_a_search_without_anything_measured_has_a_report(tmp_path, fast_disk):
    archive = Archive.open(tmp_path)
    given = {"by": "seed", "operator": "seed", "parents": [], "name": "dpo", "sha256": "0" * 64}
    event = {"event": "proposed", "id": "p0001", "round": 0, "usd": 0.0, "genome": None, **given}
    archive.append_step("round 0", [event])
    path = report.write_report(tmp_path, archive)
    assert "Nothing was measured" in path.read_text(encoding="utf-8")
    winner.write(tmp_path, archive)
    assert not (tmp_path / "best.py").exists()


# ---- numbers ------------------------------------------------------------------------------------


def test_the_funnel_counts_what_the_events_say(story):
    counts = figures.funnel_counts(story)
    entries = [one.entry for one in story.candidates if one.entry.by != "seed"]
    assert sum(counts["proposed"].values()) == len(entries) == 35
    passed = [e for e in entries if e.stopped is None or e.stopped["at"].startswith("rung")]
    assert sum(counts["proxy passed"].values()) == len(passed)
    duplicates = [e for e in entries if e.stopped and e.stopped["at"] == "duplicate"]
    lost = sum(counts["range passed"].values()) - sum(counts["new"].values())
    assert lost == len(duplicates) > 0


def test_reasons_are_counted_without_what_differs():
    assert report_tables.kind_of("line 4: it reduces over the batch") == "it reduces over the batch"
    near = report_tables.kind_of("behaves as p0031_blend (distance 0.012)")
    assert near == report_tables.kind_of("behaves as p0007 (distance 1e-3)")
    assert report_tables.kind_of("'os' is no name") == report_tables.kind_of("'sys' is no name")


def test_the_table_has_every_proposal(search, story, page):
    with open(search / "report" / "table.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [one.id for one in story.candidates]
    one = story.ranking[0]
    row = next(row for row in rows if row["id"] == one.id)
    assert float(row["gain"]) == one.gain.gain and row["measured"] == "trained"
    copied = next(one for one in story.candidates if one.copies)
    assert copied.copies[0] in next(row for row in rows if row["id"] == copied.id)["copies"]


def test_a_formula_is_the_program_in_one_line():
    text = "import torch\n\n\ndef f(pairs, *, beta: float = 0.1):\n    z = beta * pairs.rho\n"
    text += "    losses = torch.relu(1.0 - z)\n    return (losses, {'preference': losses})\n"
    assert proposal_cards.formula(text) == "z = beta * rho; losses = relu(1.0 - z)"
    assert proposal_cards.formula("no program (") == ""


def test_margins_are_those_of_the_last_step_of_dpos_runs(story):
    assert len(story.margins) == 115
    assert 0.5 < np.mean(story.margins) < 2.3  # moved by 0.8 + 0.6; 0 at step 0


# ---- what is left to go on with -----------------------------------------------------------------


def test_best_is_a_loss_file_of_what_was_confirmed(search):
    winner.write(search, Archive.read(search))
    rows = json.loads((search / "confirmation.json").read_text())["candidates"]
    best = max((r for r in rows if r["word"] == "better"), key=lambda r: r["difference"])
    name = f"{best['id']}_{best['name']}"
    assert loss_options.load_loss_file(f"{search / 'best.py'}:{name}") == name
    text = (search / "best.py").read_text()
    assert "# Confirmation: better, " in text and f"best.py:{name}" in text


def test_before_a_confirmation_final_grid_leaves_its_pairs_alone(tmp_path, fast_disk, monkeypatch):
    folder = write_archive(tmp_path / "first", 20, confirmed=False, trained=3)
    winner.write(folder, Archive.read(folder))
    assert "none yet; what is above was selected on" in (folder / "best.py").read_text()
    settings = grid.read_grid(folder / "final.grid")
    assert settings["DATA"] == str(folder / "data" / "search")
    assert settings["LOSSES"].split()[0] == "dpo" and len(settings["LOSSES"].split()) == 2


def test_final_grid_has_the_runs_of_the_confirmation(search):
    winner.write(search, Archive.read(search))
    settings = grid.read_grid(search / "final.grid")
    assert settings["RESULTS"] == str(search / "confirmation")
    assert settings["SEEDS"] == "201 202 203 204 205" and settings["BETAS_dpo"] == "0.2"


def test_with_a_task_gains_are_of_its_score_and_final_grid_asks_it(
    tmp_path, fast_disk, monkeypatch
):
    monkeypatch.setattr(report.figures, "draw_all", lambda *a: {})
    folder = write_archive(tmp_path / "first", 20, confirmed=False, trained=3)
    recorded = json.loads((folder / "settings.json").read_text())
    recorded |= {"task": "examples/tasks/brevity.py", "task_args": "--num_test 8"}
    (folder / "settings.json").write_text(json.dumps(recorded))
    events = [json.loads(line) for line in (folder / "archive.jsonl").read_text().splitlines()]
    trained = [event for event in events if event["event"] == "trained"]
    for event in trained:
        gaps = [0.0, 0.0] if event["id"] == "p0001" else [0.25, 0.35]
        event["task"] = {"score": 0.625, "kl": 3.25, "gaps": gaps}
    trained[-1]["task"]["gaps"] = None
    text = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "archive.jsonl").write_text(text)
    archive = Archive.read(folder)
    page = report.write_report(folder, archive).read_text()
    assert "points of brevity's score at equal KL over DPO as measured" in html.unescape(page)
    table = page.split("Task: brevity</h3>")[1].split("</table>")[0]
    assert ">0.625<" in table and ">3.25<" in table and ">0.300<" in table
    winner.write(folder, archive)
    values = grid.read_grid(folder / "final.grid")
    assert values["TASK"] == "examples/tasks/brevity.py"
    assert values["TASK_ARGS"] == "--seed 7001 --num_test 8" and values["GEN_ARGS"] == "--kl"
    assert "brevity's score at equal KL over dpo" in (folder / "best.py").read_text()
    asked = {"candidates": [], "seeds": [201], "dpo_beta": 0.2}
    (folder / "confirmation.json").write_text(json.dumps(asked))
    winner.write(folder, archive)
    values = grid.read_grid(folder / "final.grid")
    assert values["TASK_ARGS"] == "--seed 7002 --num_test 8"
    assert values["BENCH_DATA"] == str(folder / "fresh_task")


def test_best_is_not_written_from_a_file_that_was_changed(search):
    archive = Archive.read(search)
    id = winner.best_of(archive.state(), winner.read_confirmation(search))
    path = archive.loss_file(id)
    text = path.read_text()
    try:
        path.write_text(text + "\nimport os\n")
        with pytest.raises(Exception, match="is not the file that the search wrote"):
            winner.write(search, archive)
    finally:
        path.write_text(text)
