"""report.py: one file that opens alone, shows what it was given, and runs nothing that it was
given.
"""

import base64
import copy
import gzip
import hashlib
import json
import re
import struct
import time
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import Browser, missing_browser

from pref.analysis.report import decimals, escape, fill, shown, write_report
from pref.files.console import UserError

HOSTILE = (
    "<script>window.hacked = 1; alert(1)</script>",
    "</script><script>window.hacked = 1</script>",
    "javascript:alert(1)",
    "{{constructor.constructor('alert(1)')()}}",
    '"><img src=x onerror=alert(1)>',
    "{{data}} {{title}} {{script_hash}} \\1 \\g<1> & &lt;b&gt;",
    "' onmouseover='window.hacked=1' <!-- <style>*{display:none}</style> ]]> \ud800 \u2028",
)
EVERYTHING = " ".join(HOSTILE)
VOID = {"meta", "link", "img", "input", "br"}


def tiny_png(width: int = 3, height: int = 2) -> bytes:
    """A white PNG."""
    rows = b"".join(b"\0" + b"\xff" * width for _ in range(height))
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def judgement(run: str, question: int, turn: int, score: float | None, **others) -> dict:
    row = {
        "run_id": run,
        "question_id": question,
        "turn": turn,
        "choice": 0,
        "repeat": 0,
        "judge": "judge-1",
        "grading": "single",
        "score": score,
        "winner": None,
        "baseline": None,
        "order": None,
        "status": "ok" if score is not None else "no rating",
        "judgement": f"Words on {run} {question}.{turn}",
    }
    return row | others


def example_page(folder: Path) -> dict:
    """Three runs, five questions. Scores of judge-1, A = base, B = dpo: question 1: 5 and 8, 2: 8
    and 5, 3: 6 and 6, 4: turn 2 of dpo has no score and the others are 7 and 7.5, 5: dpo's first
    answer is empty and 9 and 1.
    """
    (folder / "figure.png").write_bytes(tiny_png())
    runs = ["base", "dpo", "td_dpo"]
    scores = {1: (5, 8), 2: (8, 5), 3: (6, 6), 4: (7, 7.5), 5: (9, 1)}
    judged = [
        judgement(run, q, turn, None if (run, q, turn) == ("dpo", 4, 2) else float(value))
        for q, both in scores.items()
        for run, value in zip(runs, both)
        for turn in (1, 2)
    ]
    pair = {"grading": "pair", "baseline": "base", "status": "ok", "judgement": "B is nicer."}
    judged.append(judgement("dpo", 1, 1, None, winner="dpo", order="2", **pair))
    judged.append(judgement("dpo", 1, 1, 4.0, judge="judge-2", repeat=1))
    answers = [
        {
            "run_id": run,
            "question_id": q,
            "choice": choice,
            "turns": [f"{run} {q}.1 choice {choice}", f"{run} {q}.2"],
        }
        for run in runs
        for q in scores
        for choice in ((0, 1) if run == "td_dpo" else (0,))
    ]
    next(row for row in answers if (row["run_id"], row["question_id"]) == ("dpo", 5))["turns"][
        0
    ] = "  "
    verdict = {
        "judge": None,
        "estimate": "+0.4",
        "interval": "0.1 to 0.7",
        "test": "p = 0.01",
        "why": "Because.",
    }
    return {
        "title": "Three runs",
        "facts": [["model", "tiny"], ["runs", 3], ["share", 0.25]],
        "verdicts": [
            {"id": name, "claim": f"Claim {name}", "verdict": word, **verdict}
            for name, word in zip(
                "abcd", ("supported", "contradicted", "undecided", "not measured")
            )
        ],
        "notes": ["a note"],
        "missing": ["something"],
        "tables": [
            {
                "id": "t",
                "title": "Numbers",
                "note": "A note.",
                "headers": ["cell", "value", "mixed", "count"],
                "rows": [
                    ["x10", 9.5, "7.10 ±0.2", 2],
                    ["x9", 10.25, "-", 10],
                    ["x1", None, "12 ±1", 1],
                    ["x2", -0.001, "-3", 100],
                ],
            },
        ],
        "figures": [{"title": "A figure", "png": folder / "figure.png", "alt": "white"}],
        "runs": [
            {
                "run_id": run,
                "status": "finished",
                "numbers": {"score": 6.5 + i, "acc": None},
                "arguments": {
                    "loss": run,
                    "lr": 5e-7,
                    "layers": ["q", "v"],
                    "versions": {"torch": f"2.{i}"},
                },
            }
            for i, run in enumerate(runs)
        ],
        "questions": {
            q: {"category": "math" if q < 4 else "writing", "turns": [f"Ask {q}.1", f"Ask {q}.2"]}
            for q in scores
        },
        "answers": answers,
        "judgements": judged,
    }


def hostile_page(folder: Path) -> dict:
    """The example with hostile text in every field that holds text; the names of its fields
    stay.
    """
    page = example_page(folder)

    def spoil(value):
        if isinstance(value, dict):
            return {key: spoil(item) for key, item in value.items()}
        if isinstance(value, list):
            return [spoil(item) for item in value]
        return f"{value} {EVERYTHING}" if isinstance(value, str) else value

    spoiled = spoil(page)
    for row in spoiled["judgements"]:
        row["grading"] = row["grading"].split()[0]
    spoiled["runs"][0]["arguments"] |= {
        EVERYTHING: EVERYTHING,
        "__proto__": EVERYTHING,
        "constructor": "one",
    }
    spoiled["runs"][0]["numbers"] |= {EVERYTHING: 1.0}
    return spoiled


class Reader(HTMLParser):
    """All elements of a page with their attributes; fails where a tag is not closed or closes
    another.
    """

    def __init__(self, text: str):
        super().__init__()
        self.open_tags, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open_tags == [], f"never closed: {self.open_tags}"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {attrs}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags and self.open_tags.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        self.texts.append((self.open_tags[-1] if self.open_tags else "", data))

    def content(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def written(folder: Path, page: dict) -> str:
    write_report(folder / "report.html", page)
    return (folder / "report.html").read_text(encoding="utf-8")


def packed(text: str) -> dict:
    data = re.search(r'id="data">([^<]*)<', text)[1]
    return json.loads(gzip.decompress(base64.b64decode(data, validate=True)))


# ---- without a browser --------------------------------------------------------------------------


@pytest.mark.parametrize("make_page", [example_page, hostile_page, lambda folder: {}])
def test_the_file_is_whole_and_asks_for_nothing(tmp_path, make_page):
    text = written(tmp_path, make_page(tmp_path))
    reader = Reader(text)
    assert text.startswith("<!DOCTYPE html>")
    ids = [attrs["id"] for _, attrs in reader.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in reader.elements:
        assert "style" not in attrs and not any(name.startswith("on") for name in attrs), (
            tag,
            attrs,
        )
        for name in ("src", "href", "srcset", "action", "data"):
            assert (attrs.get(name) or "#").startswith(("#", "data:")), (tag, attrs)
    assert {tag for tag, _ in reader.elements}.isdisjoint(
        {"iframe", "object", "embed", "base", "form"}
    )


@pytest.mark.parametrize("make_page", [example_page, hostile_page])
def test_policy_allows_the_template_s_script_and_style_alone(tmp_path, make_page):
    reader = Reader(written(tmp_path, make_page(tmp_path)))
    (policy,) = [attrs["content"] for tag, attrs in reader.elements if attrs.get("http-equiv")]
    hashes = {
        tag: base64.b64encode(hashlib.sha256(reader.content(tag)[0].encode()).digest()).decode()
        for tag in ("style", "script")
    }
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes['style']}'; "
        f"script-src 'sha256-{hashes['script']}'; base-uri 'none'; form-action 'none'"
    )
    scripts = [attrs for tag, attrs in reader.elements if tag == "script"]
    assert scripts == [{}, {"type": "application/octet-stream;base64", "id": "data"}]
    assert sum(tag == "style" for tag, _ in reader.elements) == 1


def test_the_script_never_makes_html_or_code_of_text():
    template = (
        Path(__file__).parent.parent / "pref" / "analysis" / "report_template.html"
    ).read_text(encoding="utf-8")
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        ".style.",
        "DOMParser",
        "createContextualFragment",
        "srcdoc",
        'setTimeout("',
        "http:",
        "https:",
    ):
        assert word not in template, word


def test_hostile_text_is_escaped_and_whole(tmp_path):
    page = hostile_page(tmp_path)
    text = written(tmp_path, page)
    for part in HOSTILE:
        if escape(part) != part:
            assert part not in text
    everything = EVERYTHING.replace("\ud800", "?")
    shown_texts = "".join(data for _, data in Reader(text).texts)
    for part in (
        "Three runs",
        "tiny",
        "Claim a",
        "+0.4",
        "Because.",
        "a note",
        "something",
        "Numbers",
        "A figure",
    ):
        assert f"{part} {everything}" in shown_texts, part
    data = packed(text)
    assert data["answers"][0] == page["answers"][0]  # the lone surrogate too
    assert data["judgements"] == page["judgements"]
    assert data["runs"][0]["arguments"][EVERYTHING] == EVERYTHING


def test_a_placeholder_in_the_data_stays_text():
    assert fill("{{a}} {{b}}", {"a": "{{b}}", "b": r"\1"}) == r"{{b}} \1"


def test_same_page_same_bytes(tmp_path, monkeypatch):
    page = example_page(tmp_path)
    first = written(tmp_path, copy.deepcopy(page))
    page["questions"] = dict(
        reversed(page["questions"].items())
    )  # the order of a dict means nothing
    monkeypatch.setattr(time, "time", lambda: 2e9)  # gzip's header has a place for it
    assert written(tmp_path, page) == first


def test_an_empty_page_says_what_there_is_none_of(tmp_path):
    text = written(tmp_path, {})
    for sentence in (
        "There are no verdicts",
        "There are no notes",
        "Nothing is missing",
        "There are no figures",
        "There are no tables",
        "There are no runs",
        "No facts",
    ):
        assert sentence in text
    empty = {key: type(value)() for key, value in example_page(tmp_path).items()}
    assert written(tmp_path, empty) == text
    assert packed(text) == {"runs": [], "questions": {}, "answers": [], "judgements": []}


def test_rows_without_most_of_their_keys_are_laid_out(tmp_path):
    page = {
        "verdicts": [{"claim": None}, {"verdict": "odd"}],
        "runs": [{"run_id": "a"}, {}],
        "answers": [{"run_id": "a"}],
        "tables": [{"headers": ["a"], "rows": []}, {"headers": [], "rows": [[1], [1, None, 2.0]]}],
    }
    text = written(tmp_path, page)
    Reader(text)
    assert "not measured" in text and "odd" in text and "This table has no rows." in text


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        ([0.05, 0.1, 2.5], ["0.05", "0.10", "2.50"]),
        ([6.123456, 7.0], ["6.123", "7.000"]),
        ([0.612345, 0.5], ["0.6123", "0.5000"]),
        ([1.0, 2.0, None], ["1", "2", "–"]),
        ([5e-7, 1e-6], ["5e-07", "1e-06"]),
        ([12345.678, 0.5], ["12346", "0.5"]),
        ([float("nan"), float("inf"), 3, True, "x"], ["–", "–", "3", "yes", "x"]),
        ([1e12, 0.0], ["1e+12", "0"]),
        ([-0.0012, 17.25], ["-0.0012", "17.25"]),
    ],
)
def test_digits_of_a_column(column, texts):
    assert [shown(value, decimals(column)) for value in column] == texts


def test_numbers_travel_whole_for_sorting(tmp_path):
    text = written(tmp_path, example_page(tmp_path))
    assert '<td class="number" data-value="-0.001">-0.001</td>' in text


def test_figures_are_inside_and_a_missing_one_is_named(tmp_path):
    page = example_page(tmp_path)
    (image,) = [
        attrs
        for tag, attrs in Reader(written(tmp_path, page)).elements
        if tag == "img" and "src" in attrs
    ]
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == tiny_png()
    assert (image["width"], image["height"], image["alt"]) == ("3", "2", "white")
    (tmp_path / "figure.png").write_text("<svg>")
    with pytest.raises(UserError, match="figure.png: not a PNG"):
        write_report(tmp_path / "report.html", page)
    (tmp_path / "figure.png").unlink()
    with pytest.raises(UserError, match="figure.png: no such figure"):
        write_report(tmp_path / "report.html", page)


def test_arguments_that_differ_are_columns_and_the_others_are_listed_once(tmp_path):
    text = written(tmp_path, example_page(tmp_path))
    table = text[text.index('<section id="runs">') : text.index('id="diff"')]
    assert "versions.torch</button>" in table and "loss</button>" in table
    assert "lr</button>" not in table and "<dt>lr</dt><dd>5e-07</dd>" in table
    assert "2 arguments are alike" in table


def test_a_large_study_is_written_in_seconds(tmp_path):
    words = base64.b64encode(bytes(range(256)) * 30).decode()
    runs = [f"run{i}" for i in range(60)]
    text = lambda i, n: words[i % 997 : i % 997 + n] + str(i)  # noqa: E731
    page = {
        "answers": [
            {
                "run_id": r,
                "question_id": q,
                "choice": 0,
                "turns": [text(q, 1500), text(q * 7, 1500)],
            }
            for r in runs
            for q in range(80)
        ],
        "judgements": [
            judgement(r, q, t, 5.0, judgement=text(q * 13 + t, 1000))
            for r in runs
            for q in range(80)
            for t in (1, 2)
        ],
    }
    start = time.monotonic()
    write_report(tmp_path / "report.html", page)
    assert time.monotonic() - start < 10


def test_a_machine_without_a_browser_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert missing_browser() == "neither chromium nor google-chrome is installed"
    (tmp_path / "chromium").touch(mode=0o755)
    assert missing_browser() == "chromedriver is not installed"


# ---- with a browser -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if reason := missing_browser():
        pytest.skip(reason)
    driver = Browser(tmp_path_factory.mktemp("browser"))
    yield driver
    driver.close()


def open_page(browser: Browser, path: Path, page: dict, state: str = "") -> None:
    write_report(path, page)
    browser.go("about:blank")  # the same address with another state would not load anew
    browser.log("browser"), browser.log("performance")
    browser.go(path.as_uri() + state)
    wait_for(
        browser,
        "return document.getElementById('answers-state').textContent !== 'The texts are being unpacked.'"
        " || !document.getElementById('browser').hidden",
    )


def wait_for(browser: Browser, script: str) -> None:
    deadline = time.monotonic() + 5
    while not browser.run(script):
        assert time.monotonic() < deadline, script
        time.sleep(0.02)


def text_of(browser: Browser, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent.toWellFormed())"
    return browser.run(script, selector)  # well-formed: WebDriver has no lone surrogates


def pick(browser: Browser, name: str, value: str) -> None:
    """As a user picks: the value, then the event."""
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
    """Nothing on the console, nothing asked of the network but the file and data: URIs, no alert,
    no injected code.
    """
    assert (
        browser.run("return typeof window.hacked") == "undefined"
    )  # an open alert is an error of this call
    assert browser.log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    asked = [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    ]
    assert any(url.endswith(".html") for url in asked)
    assert [url for url in asked if not url.startswith(("file://", "data:", "about:"))] == []
    assert len({url for url in asked if url.startswith("file://")}) == 1


def test_opens_in_silence(browser, tmp_path):
    for name, page in (
        ("example", example_page(tmp_path)),
        ("empty", {}),
        ("hostile", hostile_page(tmp_path)),
    ):
        open_page(browser, tmp_path / f"{name}.html", page)
        assert_quiet(browser)
        if name == "empty":
            assert text_of(browser, "#answers-state") == ["There are no answers to read."]


def test_the_policy_stops_what_the_page_did_not_bring(browser, tmp_path):
    open_page(browser, tmp_path / "report.html", example_page(tmp_path))
    browser.run(
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; document.body.append(s);"
        "const i = document.createElement('img'); i.src = 'file:///nowhere.png'; document.body.append(i)"
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
    assert browser.run(
        "return document.getElementById('enlarged').open && document.getElementById('enlarged-image').complete"
    )
    assert text_of(browser, "#enlarged-title") == ["A figure"]
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
    assert text_of(browser, ".a .judgement .text") == ["Words on base 1.1", "Words on base 1.2"]
    assert text_of(browser, "#question header .note") == [
        "A 5, B 8, A − B = −3 (judge-1, mean over 2 turns)"
    ]
    pick(browser, "view-b", "td_dpo")
    pick(browser, "view-choice-b", "1")
    assert text_of(browser, ".b > .text") == ["td_dpo 1.1 choice 1", "td_dpo 1.2"]
    assert "Nobody has judged it." in text_of(browser, ".b .judgement")
    pick(browser, "view-question", "3")
    assert (position(browser), question(browser)) == ("3 of 5", "Question 3, math")
    pick(browser, "view-b", "dpo")
    pick(browser, "view-question", "4")
    assert text_of(browser, "#question header .note") == [
        "A 7, B 7.5, A − B = −0.5 (judge-1, turn 1 alone)"
    ]
    assert text_of(browser, ".judgement.failed summary") == [
        "no score (no rating) by judge-1, repeat 1"
    ]


def test_keys_step_through_the_questions(browser, tmp_path):
    open_page(browser, tmp_path / "report.html", example_page(tmp_path))
    browser.press("j")
    assert position(browser) == "1 of 5"  # out of sight: not meant
    browser.run("document.getElementById('answers').scrollIntoView()")
    seen = []
    for key in ("j", "\ue014", "k", "\ue012", "k", *"jjjjj"):  # \ue014 right, \ue012 left
        browser.press(key)
        seen.append(position(browser)[0])
    assert "".join(seen) == "2321123455"
    browser.run(
        "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'k', ctrlKey: true, bubbles: true}))"
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
    assert passing(difference="b") == ["1", "4"]  # 4: over turn 1 alone
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
    assert browser.run("return location.hash") == ""  # nothing was chosen yet
    for name, value in (
        ("a", "dpo"),
        ("b", "td_dpo"),
        ("choice-b", "1"),
        ("category", "math"),
        ("question", "3"),
    ):
        pick(browser, f"view-{name}", value)
    browser.click("#view-words")
    wait_for(browser, "return location.hash.includes('words=no')")
    link = browser.run("return location.hash")
    state = (
        "const named = (name) => document.getElementById('view-' + name).value;"
        "return [...['a', 'b', 'choice-b', 'category', 'question'].map(named),"
        " document.getElementById('position').textContent, document.querySelectorAll('details[open]').length]"
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
    rows = "return [...document.querySelectorAll('#diff tbody tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    pick(browser, "diff-b", "2")
    assert browser.run(rows) == [["loss", "base", "td_dpo"], ["versions.torch", "2.0", "2.2"]]
    assert text_of(browser, "#diff-state")[0].startswith("2 of 4 arguments differ")
    browser.click("#read-answers")
    assert text_of(browser, ".turn:nth-of-type(1) h5 span:nth-child(2)") == ["base", "td_dpo"]
    pick(browser, "diff-b", "0")
    assert text_of(browser, "#diff-state") == ["None of their 4 arguments differ."]


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
    ]  # not what every object has by that name
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
    for selector in ("#tables th button", ".enlarge", "#read-answers", "#view-words"):
        browser.click(selector)
        browser.press("\ue00c")
    assert (
        browser.run(
            "return document.querySelectorAll('main img:not([src^=\"data:\"]):not(#enlarged-image)').length"
        )
        == 0
    )
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
