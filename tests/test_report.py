"""report.py without a browser: one complete file that asks for nothing, with all text escaped."""

import base64
import copy
import gzip
import hashlib
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from report_pages import EVERYTHING, HOSTILE, example_page, hostile_page, judgement, tiny_svg

from pref.analysis.report import (
    PAGE_SCRIPT,
    TEMPLATE,
    column_digits,
    escape,
    fill,
    format_value,
    write_report,
)
from pref.files.console import UserError

VOID = {"meta", "link", "img", "input", "br"}  # elements without an end tag


class Reader(HTMLParser):
    """The elements of a page with their attributes; fails if tags do not close in order."""

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


def write_page(folder: Path, page: dict) -> str:
    write_report(folder / "report.html", page)
    return (folder / "report.html").read_text(encoding="utf-8")


def unpack_data(text: str) -> dict:
    data = re.search(r'id="data">([^<]*)<', text)[1]
    return json.loads(gzip.decompress(base64.b64decode(data, validate=True)))


@pytest.mark.parametrize("make_page", [example_page, hostile_page, lambda folder: {}])
def test_the_file_is_complete_and_requests_nothing(tmp_path, make_page):
    text = write_page(tmp_path, make_page(tmp_path))
    reader = Reader(text)
    assert text.startswith("<!DOCTYPE html>")
    ids = [attrs["id"] for _, attrs in reader.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in reader.elements:
        element = tag, attrs
        assert "style" not in attrs and not any(name.startswith("on") for name in attrs), element
        for name in ("src", "href", "srcset", "action", "data"):
            assert (attrs.get(name) or "#").startswith(("#", "data:")), element
    forbidden = {"iframe", "object", "embed", "base", "form"}
    assert {tag for tag, _ in reader.elements}.isdisjoint(forbidden)


@pytest.mark.parametrize("make_page", [example_page, hostile_page])
def test_policy_admits_only_the_script_and_style_of_the_template(tmp_path, make_page):
    reader = Reader(write_page(tmp_path, make_page(tmp_path)))
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


@pytest.mark.parametrize(
    "path", [PAGE_SCRIPT, *(TEMPLATE.with_suffix(suffix) for suffix in (".html", ".css", ".js"))]
)
def test_the_template_never_makes_html_or_code_of_text(path):
    template = path.read_text(encoding="utf-8")
    for forbidden in (
        *("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("),
        *("new Function", ".style.", "DOMParser", "createContextualFragment", "srcdoc"),
        *('setTimeout("', "http:", "https:", "url(", "@import"),
    ):
        assert forbidden not in template, forbidden


def test_hostile_text_is_escaped_and_complete(tmp_path):
    page = hostile_page(tmp_path)
    text = write_page(tmp_path, page)
    for part in HOSTILE:
        if escape(part) != part:
            assert part not in text
    everything = EVERYTHING.replace("\ud800", "?")
    visible = "".join(data for _, data in Reader(text).texts)
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
        "Score by judge-1",
        "dpo is better.",
        "A run took a minute.",
        "dpo is better than base.",
        "dpo against base",
        "3 seeds",
        "1 more claim",
        "left out: old scores",
        "Claim e",
    ):
        assert f"{part} {everything}" in visible, part
    data = unpack_data(text)
    assert data["answers"][0] == page["answers"][0]  # the lone surrogate too
    assert data["judgements"] == page["judgements"]
    assert data["runs"][0]["arguments"][EVERYTHING] == EVERYTHING


def test_a_placeholder_in_the_data_stays_text():
    assert fill("{{a}} {{b}}", {"a": "{{b}}", "b": r"\1"}) == r"{{b}} \1"


def test_same_page_same_bytes(tmp_path, monkeypatch):
    page = example_page(tmp_path)
    first = write_page(tmp_path, copy.deepcopy(page))
    of_bench = page["questions"]["mt_bench"]
    page["questions"]["mt_bench"] = dict(reversed(of_bench.items()))  # the order has no meaning
    monkeypatch.setattr(time, "time", lambda: 2e9)  # gzip would write it into its header
    assert write_page(tmp_path, page) == first


def test_an_empty_page_says_what_it_lacks(tmp_path):
    text = write_page(tmp_path, {})
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
    assert write_page(tmp_path, empty) == text
    assert unpack_data(text) == {
        "runs": [],
        "benches": [],
        "questions": {},
        "answers": [],
        "judgements": [],
    }


def test_the_answer_comes_first_and_claims_of_others_are_folded(tmp_path):
    text = write_page(tmp_path, example_page(tmp_path))
    parts = ("dpo is better.", "A run took", "is better than base.", "left out", "Claim a")
    places = [text.index(part) for part in (*parts, "<summary>1 more claim", "Claim e")]
    assert places == sorted(places)
    assert '<span aria-hidden="true">✓</span> better' in text
    assert "<details>" not in write_page(tmp_path, {}).split('id="notes"')[0]


def test_rows_without_most_of_their_keys_are_laid_out(tmp_path):
    page = {
        "verdicts": [{"claim": None}, {"verdict": "odd"}],
        "runs": [{"run_id": "a"}, {}],
        "answers": [{"run_id": "a"}],
        "tables": [{"headers": ["a"], "rows": []}, {"headers": [], "rows": [[1], [1, None, 2.0]]}],
    }
    text = write_page(tmp_path, page)
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
    assert [format_value(value, column_digits(column)) for value in column] == texts


def test_sorting_uses_the_full_value_of_a_number(tmp_path):
    text = write_page(tmp_path, example_page(tmp_path))
    assert '<td class="number" data-value="-0.001">-0.001</td>' in text


def test_figures_are_embedded_and_a_missing_one_is_named(tmp_path):
    page = example_page(tmp_path)
    text = write_page(tmp_path, page)
    (image,) = [attrs for tag, attrs in Reader(text).elements if tag == "img" and "src" in attrs]
    kind, _, content = image["src"].partition(",")
    assert kind == "data:image/svg+xml" and unquote(content) == tiny_svg()
    assert not set(content) & set("#<>\"'&\n")  # what ends an attribute or an address
    assert (image["width"], image["height"]) == ("534", "288")  # of 400.5 x 216 points
    assert image["alt"] == "white. One line a run."
    assert "<figcaption><b>A figure</b> One line a run.</figcaption>" in text
    assert '<figure class="wide">' not in text
    (tmp_path / "figure.svg").write_text(tiny_svg("judge <script>, 1 % & more\nSMOKE", 842))
    text = write_page(tmp_path, page)
    assert "</b> judge &lt;script&gt;, 1 % &amp; more. SMOKE.</figcaption>" in text
    assert '<figure class="wide">' in text  # both columns
    (tmp_path / "figure.svg").write_text("<svg>")
    with pytest.raises(UserError, match="figure.svg: not an SVG file of analyze.py"):
        write_report(tmp_path / "report.html", page)
    (tmp_path / "figure.svg").unlink()
    with pytest.raises(UserError, match="figure.svg: no such figure"):
        write_report(tmp_path / "report.html", page)


def test_tables_of_a_group_stand_under_one_heading(tmp_path):
    tables = [
        {"id": f"t{i}", "title": f"Score by J: {kind}", "group": "Score by J", "kind": kind}
        for i, kind in enumerate(("means", "differences"))
    ]
    for table in tables:
        table |= {"headers": ["cell", "score", "interval"], "digits": [None, 2, None]}
        table["rows"] = [["dpo β=0.1", 5.0, "[4.10, 5.90]"], ["dpo β=0.5", 6.5, None]]
    text = write_page(tmp_path, {"tables": [*tables, {"id": "u", "title": "Alone"}]})
    own = text[text.index('<section id="tables">') : text.index('<section id="runs">')]
    assert own.count('<h3 class="group">Score by J</h3>') == 1
    assert own.count("<b>Score by J</b>") == 1  # in the list of links
    assert "<h4>means</h4>" in own and "<h4>differences</h4>" in own and "<h3>Alone</h3>" in own
    # Digits of the column, numbers and intervals to the right, names in one line.
    assert '<td class="number" data-value="5.0">5.00</td>' in own
    assert '<td class="number">[4.10, 5.90]</td>' in own
    assert '<td class="short">dpo β=0.1</td>' in own
    assert own.count('<div class="scroll"') == own.count("<table") == 2  # none without a box


def test_differing_arguments_are_columns_and_the_others_are_listed_once(tmp_path):
    text = write_page(tmp_path, example_page(tmp_path))
    table = text[text.index('<section id="runs">') : text.index('id="diff"')]
    assert "versions.torch</button>" in table and "loss</button>" in table
    assert "lr</button>" not in table and "<dt>lr</dt><dd>5e-07</dd>" in table
    assert "2 arguments are the same" in table


def test_a_large_study_is_written_in_seconds(tmp_path):
    source = base64.b64encode(bytes(range(256)) * 30).decode()
    runs = [f"run{i}" for i in range(60)]
    text = lambda i, n: source[i % 997 : i % 997 + n] + str(i)  # noqa: E731
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
