"""report.py in Chromium: it sorts, filters, links and compares, and runs nothing from its data."""

import json
import time
from pathlib import Path

import pytest
from browser import Browser, missing_browser
from report_pages import HOSTILE, example_page, hostile_page, judgement

from pref.analysis.report import write_report

pytestmark = pytest.mark.slow


def test_a_machine_without_a_browser_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert missing_browser() == "neither chromium nor google-chrome is installed"
    (tmp_path / "chromium").touch(mode=0o755)
    assert missing_browser() == "chromedriver is not installed"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if reason := missing_browser():
        pytest.skip(reason)
    driver = Browser(tmp_path_factory.mktemp("browser"))
    yield driver
    driver.close()


def open_page(browser: Browser, path: Path, page: dict, state: str = "") -> None:
    write_report(path, page)
    browser.go("about:blank")  # the same address with another state would not be reloaded
    browser.log("browser"), browser.log("performance")
    browser.go(path.as_uri() + state)
    wait_for(
        browser,
        "return !document.getElementById('browser').hidden || "
        "document.getElementById('answers-state').textContent !== 'Unpacking the answers ...'",
    )


def wait_for(browser: Browser, script: str) -> None:
    deadline = time.monotonic() + 5
    while not browser.run(script):
        assert time.monotonic() < deadline, script
        time.sleep(0.02)


def text_of(browser: Browser, selector: str) -> list[str]:
    # Well-formed, because WebDriver has no lone surrogates.
    script = "map((element) => element.textContent.toWellFormed())"
    return browser.run(f"return [...document.querySelectorAll(arguments[0])].{script}", selector)


def pick(browser: Browser, name: str, value: str) -> None:
    """Choose a value as a user does: set it, then send the event."""
    browser.run(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "if (e.value !== arguments[1]) throw new Error('not offered: ' + arguments[1]);"
        "e.dispatchEvent(new Event('change', {bubbles: true}))",
        name,
        value,
    )


def position(browser: Browser) -> str:
    return text_of(browser, "#position")[0]


def question(browser: Browser) -> str:
    return text_of(browser, "#question h3")[0]


def assert_quiet(browser: Browser) -> None:
    """Nothing on the console, no request but the file itself and data: URIs, no alert, no injected
    code.
    """
    # With an alert open, this call would raise an error.
    assert browser.run("return typeof window.hacked") == "undefined"
    assert browser.log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    requested = [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    ]
    assert any(url.endswith(".html") for url in requested)
    assert [url for url in requested if not url.startswith(("file://", "data:", "about:"))] == []
    assert len({url for url in requested if url.startswith("file://")}) == 1


def test_opens_quietly(browser, tmp_path):
    for name, page in (
        ("example", example_page(tmp_path)),
        ("empty", {}),
        ("hostile", hostile_page(tmp_path)),
    ):
        open_page(browser, tmp_path / f"{name}.html", page)
        assert_quiet(browser)
        if name == "empty":
            assert text_of(browser, "#answers-state") == ["There are no answers to read."]


def test_the_policy_blocks_what_is_not_part_of_the_page(browser, tmp_path):
    open_page(browser, tmp_path / "report.html", example_page(tmp_path))
    browser.run(
        "const script = document.createElement('script');"
        "script.textContent = 'window.hacked = 1'; document.body.append(script);"
        "const image = document.createElement('img');"
        "image.src = 'file:///nowhere.png'; document.body.append(image)"
    )
    wait_for(browser, "return true")
    assert browser.run("return typeof window.hacked") == "undefined"
    assert (
        len(
            [
                entry
                for entry in browser.log("browser")
                if "Content Security Policy" in entry["message"]
            ]
        )
        == 2
    )


def test_tables_sort_by_number_and_back_with_mouse_and_keyboard(browser, tmp_path):
    open_page(browser, tmp_path / "report.html", example_page(tmp_path))
    first = "#tables tbody td:first-child"
    header = "#tables th:nth-child(%d)"
    browser.click(header % 2 + " button")
    assert text_of(browser, first) == ["x2", "x10", "x9", "x1"]  # -0.001, 9.5, 10.25, none
    assert (
        browser.run("return document.querySelector(arguments[0]).ariaSort", header % 2)
        == "ascending"
    )
    browser.press("\ue007")  # Enter: the button has the focus
    assert text_of(browser, first) == ["x9", "x10", "x2", "x1"]  # none is last in both directions
    assert (
        browser.run("return document.querySelector(arguments[0]).ariaSort", header % 2)
        == "descending"
    )
    browser.click(header % 3 + " button")
    assert text_of(browser, first) == ["x2", "x10", "x1", "x9"]  # "-3", "7.10 ±0.2", "12 ±1", "-"
    assert browser.run("return document.querySelectorAll('#tables [aria-sort]').length") == 1
    browser.click(header % 4 + " button")
    assert text_of(browser, first) == ["x1", "x10", "x9", "x2"]  # 1, 2, 10, 100
    browser.click(header % 1 + " button")
    assert text_of(browser, first) == ["x1", "x2", "x9", "x10"]


def test_theme_follows_the_system_and_the_button(browser, tmp_path):
    colour = "return getComputedStyle(document.body).backgroundColor"
    scheme = lambda name: browser.devtools(  # noqa: E731
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}]
    )
    scheme("light")
    open_page(browser, tmp_path / "report.html", example_page(tmp_path))
    light = browser.run(colour)
    scheme("dark")
    dark = browser.run(colour)
    assert light != dark
    scheme("light")
    browser.click("#theme")
    assert browser.run(colour) == dark and text_of(browser, "#theme") == ["Light"]
    browser.click("#theme")
    assert browser.run(colour) == light and text_of(browser, "#theme") == ["Dark"]


def test_a_figure_is_enlarged_and_closed(browser, tmp_path):
    open_page(browser, tmp_path / "report.html", example_page(tmp_path))
    browser.click(".enlarge")
    assert browser.run("return document.getElementById('enlarged').open")
    assert browser.run("return document.getElementById('enlarged-image').complete")
    assert text_of(browser, "#enlarged-title") == ["A figure One line a run."]
    browser.press("\ue00c")  # Escape
    assert not browser.run("return document.getElementById('enlarged').open")


def test_answers_of_two_runs_side_by_side(browser, tmp_path):
    open_page(browser, tmp_path / "report.html", example_page(tmp_path))
    assert position(browser) == "1 of 5"
    assert text_of(browser, ".asked") == ["Ask 1.1", "Ask 1.2"]
    assert text_of(browser, ".side > .text") == [
        "base 1.1 choice 0",
        "dpo 1.1 choice 0",
        "base 1.2",
        "dpo 1.2",
    ]
    assert text_of(browser, ".turn:nth-of-type(1) .b summary") == [
        "score 8 by judge-1, repeat 1",
        "wins against base by judge-1, repeat 1, shown to the judge as assistant B",
        "score 4 by judge-2, repeat 2",
    ]
    assert text_of(browser, ".a .judgement .text") == [
        "Reasons for base 1.1",
        "Reasons for base 1.2",
    ]
    assert text_of(browser, "#question header .note") == [
        "A 5, B 8, A − B = −3 (judge-1, mean over 2 turns)"
    ]
    pick(browser, "view-b", "td_dpo")
    pick(browser, "view-choice-b", "1")
    assert text_of(browser, ".b > .text") == ["td_dpo 1.1 choice 1", "td_dpo 1.2"]
    assert "This answer has not been judged." in text_of(browser, ".b .judgement")
    pick(browser, "view-question", "3")
    assert (position(browser), question(browser)) == ("3 of 5", "Question 3, math")
    pick(browser, "view-b", "dpo")
    pick(browser, "view-question", "4")
    assert text_of(browser, "#question header .note") == [
        "A 7, B 7.5, A − B = −0.5 (judge-1, turn 1 only)"
    ]
    assert text_of(browser, ".judgement.failed summary") == [
        "no score (no rating) by judge-1, repeat 1"
    ]


def test_keys_step_through_the_questions(browser, tmp_path):
    open_page(browser, tmp_path / "report.html", example_page(tmp_path))
    browser.press("j")
    assert position(browser) == "1 of 5"  # the answers are out of sight, so the key is not for them
    browser.run("document.getElementById('answers').scrollIntoView()")
    seen = []
    for key in ("j", "\ue014", "k", "\ue012", "k", *"jjjjj"):  # \ue014 right, \ue012 left
        browser.press(key)
        seen.append(position(browser)[0])
    assert "".join(seen) == "2321123455"
    browser.run(
        "const init = {key: 'k', ctrlKey: true, bubbles: true};"
        "document.body.dispatchEvent(new KeyboardEvent('keydown', init))"
    )
    assert position(browser) == "5 of 5"  # the browser's own key
    pick(browser, "view-difference", "apart")
    browser.click("#view-apart")
    browser.press("k", "\ue012")
    assert position(browser) == "3 of 3"  # typed into the input


def test_filters(browser, tmp_path):
    open_page(browser, tmp_path / "report.html", example_page(tmp_path))

    def passing(**filters) -> list[str]:
        browser.run("document.getElementById('clear').click()")
        for name, value in filters.items():
            pick(browser, f"view-{name}", value)
        return browser.run(
            "return [...document.getElementById('view-question').options].map((o) => o.value)"
        )

    assert passing() == ["1", "2", "3", "4", "5"]
    assert passing(category="writing") == ["4", "5"]
    assert passing(difference="a") == ["2", "5"]
    assert passing(difference="b") == ["1", "4"]  # 4: over turn 1 only
    assert passing(difference="equal") == ["3"]
    assert passing(difference="apart", apart="3") == ["1", "2", "5"]
    assert passing(difference="apart", apart="3.5") == ["5"]
    assert passing(failure="unscored") == ["4"]
    assert passing(failure="empty") == ["5"]
    assert passing(failure="either") == ["4", "5"]
    assert passing(judge="judge-2", difference="a") == []
    assert position(browser) == "0 of 0"
    assert text_of(browser, "#question") == ["No question passes these filters."]
    assert passing(judge="judge-1", category="math", difference="b") == ["1"]
    assert position(browser) == "1 of 1"


def test_a_link_reopens_the_view(browser, tmp_path):
    page = example_page(tmp_path)
    open_page(browser, tmp_path / "report.html", page)
    assert browser.run("return location.hash") == ""  # nothing has been chosen yet
    for name, value in (
        ("a", "dpo"),
        ("b", "td_dpo"),
        ("choice-b", "1"),
        ("category", "math"),
        ("question", "3"),
    ):
        pick(browser, f"view-{name}", value)
    browser.click("#view-judgements")
    wait_for(browser, "return location.hash.includes('judgements=no')")
    link = browser.run("return location.hash")
    state = (
        "const named = (name) => document.getElementById('view-' + name).value;"
        "return [...['a', 'b', 'choice-b', 'category', 'question'].map(named),"
        " document.getElementById('position').textContent,"
        " document.querySelectorAll('details[open]').length]"
    )
    before = browser.run(state)
    open_page(browser, tmp_path / "report.html", page, link)
    assert browser.run(state) == before == ["dpo", "td_dpo", "1", "math", "3", "3 of 3", 0]
    assert browser.run(
        "return document.getElementById('answers').getBoundingClientRect().top < innerHeight / 2"
    )
    open_page(
        browser,
        tmp_path / "report.html",
        page,
        "#answers?a=nobody&q=<b>&apart=-1&difference=x&choice-a=99&q=7",
    )
    assert browser.run(state)[:2] == ["base", "dpo"] and position(browser) == "1 of 5"
    assert_quiet(browser)


def test_arguments_of_two_runs_side_by_side(browser, tmp_path):
    open_page(browser, tmp_path / "report.html", example_page(tmp_path))
    rows = (
        "return [...document.querySelectorAll('#diff tbody tr')]"
        ".map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
    pick(browser, "diff-b", "2")
    assert browser.run(rows) == [["loss", "base", "td_dpo"], ["versions.torch", "2.0", "2.2"]]
    assert text_of(browser, "#diff-state")[0].startswith("2 of 4 arguments differ")
    browser.click("#read-answers")
    assert text_of(browser, ".turn:nth-of-type(1) h5 span:nth-child(2)") == ["base", "td_dpo"]
    pick(browser, "diff-b", "0")
    assert text_of(browser, "#diff-state") == ["None of the 4 arguments differ."]


def test_hostile_text_is_shown_as_it_is_and_never_runs(browser, tmp_path):
    page = hostile_page(tmp_path)
    open_page(browser, tmp_path / "report.html", page)
    browser.run("document.getElementById('answers').scrollIntoView()")
    browser.press("j", "k")
    assert text_of(browser, ".side > .text")[0].startswith("base 1.1 choice 0 " + HOSTILE[0])
    assert text_of(browser, ".asked")[0].startswith("Ask 1.1 " + HOSTILE[0])
    assert (
        HOSTILE[4] in text_of(browser, ".judgement .text")[0]
        and HOSTILE[4] in text_of(browser, ".judgement summary")[0]
    )
    assert text_of(browser, "h1")[0].startswith("Three runs " + HOSTILE[0])
    diff = text_of(browser, "#diff td")
    assert any(text.startswith(HOSTILE[0]) for text in diff) and "__proto__" in diff
    assert diff[diff.index("constructor") :][:3] == [
        "constructor",
        "one",
        "–",
    ]  # and not the property of that name that every object has
    for width in (1200, 700, 400):
        browser.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth"), width
    browser.devtools("Emulation.clearDeviceMetricsOverride")
    for selector in ("#tables th button", ".enlarge", "#read-answers", "#view-judgements"):
        browser.click(selector)
        browser.press("\ue00c")
    foreign = "main img:not([src^='data:']):not(#enlarged-image)"
    assert browser.run("return document.querySelectorAll(arguments[0]).length", foreign) == 0
    assert browser.run("return document.querySelectorAll('main script, main style').length") == 0
    wait_for(browser, "return location.hash.startsWith('#answers?')")
    assert_quiet(browser)


def test_a_browser_without_decompression_is_told_so(browser, tmp_path):
    remove = browser.devtools(
        "Page.addScriptToEvaluateOnNewDocument", source="delete window.DecompressionStream"
    )
    open_page(browser, tmp_path / "report.html", example_page(tmp_path))
    browser.devtools("Page.removeScriptToEvaluateOnNewDocument", **remove)
    assert "Safari from 16.4" in text_of(browser, "#answers-state")[0]
    browser.click("#tables th:nth-child(2) button")  # the rest works
    assert text_of(browser, "#tables tbody td:first-child")[0] == "x2"


def test_arena_hards_labels_count_as_in_its_win_rate(browser, tmp_path):
    """Shown first, base wins (one row); shown second, it loses clearly (three rows): 1 / 4."""
    page = example_page(tmp_path)
    bench = {"bench": "arena_hard_v0.1", "grading": "pair", "baseline": "gpt-4-0314"}
    page["benches"].append({"name": bench["bench"], "title": "Arena-Hard v0.1", "left_out": 0})
    page["questions"][bench["bench"]] = {1: {"category": "c", "turns": ["Ask"]}}
    labels = {"base": ("A>B", "A>>B"), "dpo": ("A=B", "B>A")}
    for run, shown in labels.items():
        text = {"bench": bench["bench"], "run_id": run, "question_id": 1, "choice": 0}
        page["answers"].append(text | {"turns": [f"{run}'s answer"]})
        page["judgements"] += [
            judgement(run, 1, 1, None, label=label, order=order, **bench) | {"status": "ok"}
            for order, label in zip("12", shown)
        ]
    open_page(browser, tmp_path / "report.html", page)
    pick(browser, "view-bench", bench["bench"])
    assert text_of(browser, "#question header .note") == [
        "A 0.25, B 0.75, A − B = −0.5 (judge-1, baseline gpt-4-0314, turn 1 only)"
    ]
    assert text_of(browser, ".a summary")[1].startswith("label A>>B against gpt-4-0314")
    assert_quiet(browser)
