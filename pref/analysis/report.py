"""Lay a comparison out as one HTML file that needs nothing else: no network, no server, no library.

Reads   the figures' PNG files and report_template.html; everything else is handed over by
analyze.py Writes  results/comparison/report.html

    from pref.analysis.report import write_report
    write_report(Path("results/comparison/report.html"), {"title": "Four losses", "verdicts": [...],
    "runs": [...]})

Nothing is computed here, only laid out. And nothing in a page is trusted: answers and judgements
are what models wrote, run ids are folder names. What stands in the HTML is escaped; the texts
travel as gzip in base64, which the script of the template unpacks and shows as text, never as HTML;
and the page's content security policy lets no other script run. The same page gives the same bytes.
"""

import base64
import gzip
import hashlib
import html
import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from pref.files import disk
from pref.files.console import UserError

TEMPLATE = Path(__file__).with_name("report_template.html")
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
NONE = "–"  # shown where there is no value
VERDICTS = {  # verdict: (style class, sign): the sign and the word say it without the colour
    "supported": ("supported", "✓"),
    "contradicted": ("contradicted", "✗"),
    "undecided": ("undecided", "≈"),
    "not measured": ("unmeasured", "○"),
}
VERDICT_NUMBERS = ("estimate", "interval", "test", "judge")
ANSWER_KEYS = ("run_id", "question_id", "choice", "turns")
JUDGEMENT_KEYS = (
    "run_id",
    "question_id",
    "turn",
    "choice",
    "repeat",
    "judge",
    "grading",
    "score",
    "winner",
    "baseline",
    "order",
    "status",
    "judgement",
)
# Characters; a longer argument is cut in the table of runs, and whole where two runs are compared
LONG_CELL = 40


def write_report(path: Path, page: dict) -> None:
    """Write `page` to `path` as one HTML file. Any part may be empty or missing; its section then
    says so.

    page: title, str
          facts, [[label, value]]
          verdicts, [{id, claim, judge, verdict, estimate, interval, test, why}], all str or None;
          verdict is supported,
            contradicted, undecided or not measured
          notes and missing, [str]
          tables, [{id, title, note, headers, rows}]; a cell is str, int, float or None
          figures, [{title, png (path), alt}]
          runs, [{run_id, status, arguments {name: JSON value}, numbers {name: float or None}}]
          questions, {question id: {category, turns}}; turns None: the text is not at hand
          answers, [{run_id, question_id, choice, turns}]
          judgements, [{run_id, question_id, turn, choice, repeat, judge, grading, score, winner,
          baseline, order,
            status, judgement}], as in judgements.csv
    Raises UserError for a figure that is missing or no PNG.
    """
    template = TEMPLATE.read_text(encoding="utf-8")
    parts = {
        "style_hash": inline_hash(template, "style"),
        "script_hash": inline_hash(template, "script"),
        "title": escape(page.get("title") or "Comparison of runs"),
        "facts": facts_html(page.get("facts") or []),
        "verdicts": verdicts_html(page.get("verdicts") or []),
        "notes": list_html(page.get("notes") or [], "There are no notes."),
        "missing": list_html(page.get("missing") or [], "Nothing is missing."),
        "figures": figures_html(page.get("figures") or []),
        "tables": tables_html(page.get("tables") or []),
        "runs": runs_html(page.get("runs") or []),
        "data": pack(page),
    }
    disk.write_text(path, fill(template, parts))


def fill(template: str, parts: dict[str, str]) -> str:
    """`template` with its placeholders replaced in one pass: what looks like a placeholder in a
    part stays as it is.
    """
    return PLACEHOLDER.sub(lambda match: parts[match[1]], template)


def inline_hash(template: str, tag: str) -> str:
    """base64 of the sha256 of the template's one inline <style> or <script>, as a content security
    policy wants it.
    """
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
    assert not PLACEHOLDER.search(content), f"a placeholder in <{tag}> would change its hash"
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def escape(value) -> str:
    """`value` as text in HTML, in attributes too. A lone surrogate, which UTF-8 has no bytes for,
    becomes '?'.
    """
    return html.escape(str(value).encode("utf-8", "replace").decode())


def anchor(kind: str, name: str, number: int) -> str:
    """An id to link to, such as verdict-1-tau_helps: the number keeps apart what differs in signs
    alone.
    """
    return f"{kind}-{number}-{re.sub(r'[^A-Za-z0-9_]+', '-', str(name))}"


def facts_html(facts: list) -> str:
    if not facts:
        return '<p class="none">No facts about this comparison were handed over.</p>'
    pairs = (
        f"<div><dt>{escape(label)}</dt><dd>{escape(shown(value, decimals([value])))}</dd></div>\n"
        for label, value in facts
    )
    return f'<dl class="facts">\n{"".join(pairs)}</dl>'


def list_html(items: list[str], none: str) -> str:
    if not items:
        return f'<p class="none">{none}</p>'
    return "<ul>\n" + "".join(f"<li>{escape(item)}</li>\n" for item in items) + "</ul>"


def verdicts_html(verdicts: list[dict]) -> str:
    if not verdicts:
        return '<p class="none">There are no verdicts: no claim was put to a test.</p>'
    counts = Counter(verdict_word(row) for row in verdicts)
    tally = "".join(
        f"<li>{badge(word)} {counts.pop(word)}</li>" for word in [*VERDICTS] if word in counts
    )
    tally += "".join(f"<li>{badge(word)} {count}</li>" for word, count in sorted(counts.items()))
    cards = "".join(verdict_html(row, number) for number, row in enumerate(verdicts, 1))
    return f'<ul class="tally">{tally}</ul>\n<div class="verdicts">\n{cards}</div>'


def verdict_word(row: dict) -> str:
    return row.get("verdict") or "not measured"


def badge(word: str) -> str:
    style, sign = VERDICTS.get(word, ("unmeasured", "?"))
    return (
        f'<span class="badge {style}"><span aria-hidden="true">{sign}</span> {escape(word)}</span>'
    )


def verdict_html(row: dict, number: int) -> str:
    style, _ = VERDICTS.get(verdict_word(row), ("unmeasured", ""))
    name = row.get("id") or str(number)
    link = anchor("verdict", name, number)
    numbers = "".join(
        f"<div><dt>{key}</dt><dd>{escape(row[key])}</dd></div>"
        for key in VERDICT_NUMBERS
        if row.get(key) is not None
    )
    why = f'<p class="why">{escape(row["why"])}</p>\n' if row.get("why") else ""
    return (
        f'<article class="verdict {style}" id="{link}">\n'
        f'<p class="mark">{badge(verdict_word(row))}<a href="#{link}">{escape(name)}</a></p>\n'
        f'<div>\n<h3 class="claim">{escape(row.get("claim") or "A claim without words")}</h3>\n'
        + (f'<dl class="numbers">{numbers}</dl>\n' if numbers else "")
        + f"{why}</div>\n</article>\n"
    )


def figures_html(figures: list[dict]) -> str:
    if not figures:
        return '<p class="none">There are no figures.</p>'
    return '<div class="figures">\n' + "".join(map(figure_html, figures)) + "</div>"


def figure_html(figure: dict) -> str:
    data = read_png(Path(figure["png"]))
    width, height = struct.unpack(
        ">II", data[16:24]
    )  # the browser keeps the place before it has decoded the image
    title, alt = (
        escape(figure.get("title") or ""),
        escape(figure.get("alt") or figure.get("title") or ""),
    )
    image = f'<img src="data:image/png;base64,{base64.b64encode(data).decode()}" width="{width}" height="{height}"'
    return (
        f'<figure>\n<button type="button" class="enlarge" title="Enlarge">{image} alt="{alt}"></button>\n'
        f"<figcaption>{title}</figcaption>\n</figure>\n"
    )


def read_png(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such figure; rerun analyze.py") from None
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or len(data) < 24:
        raise UserError(f"{path}: not a PNG file; delete it and rerun analyze.py")
    return data


def tables_html(tables: list[dict]) -> str:
    if not tables:
        return '<p class="none">There are no tables.</p>'
    links = [
        anchor("table", table.get("id") or "", number) for number, table in enumerate(tables, 1)
    ]
    titles = [escape(table.get("title") or table.get("id") or "Table") for table in tables]
    contents = "".join(
        f'<li><a href="#{link}">{title}</a></li>\n' for link, title in zip(links, titles)
    )
    listing = f'<ul class="contents">\n{contents}</ul>\n' if len(tables) > 2 else ""
    return listing + "".join(
        f'<section class="table" id="{link}">\n<h3>{title}</h3>\n{note_html(table.get("note"))}'
        f"{table_html(table.get('headers') or [], table.get('rows') or [], title)}</section>\n"
        for link, title, table in zip(links, titles, tables)
    )


def note_html(note: str | None) -> str:
    return f'<p class="note">{escape(note)}</p>\n' if note else ""


def table_html(headers: list[str], rows: list[list], title: str, cut: int | None = None) -> str:
    """A table in a box that scrolls; its headers become buttons that sort. cut: characters of a
    cell's text shown.
    """
    if not rows:
        return '<p class="none">This table has no rows.</p>\n'
    columns = [
        [row[i] if i < len(row) else None for row in rows]
        for i in range(max(map(len, [headers, *rows])))
    ]
    names = [*headers, *[""] * (len(columns) - len(headers))]
    styles = [' class="number"' if is_number_column(column) else "" for column in columns]
    head = "".join(
        f'<th scope="col"{style}><button type="button">{escape(name)}</button></th>'
        for name, style in zip(names, styles)
    )
    cells = [column_html(column, style, cut) for column, style in zip(columns, styles)]
    body = "".join(f"<tr>{''.join(row)}</tr>\n" for row in zip(*cells))
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title}">\n<table class="sortable">\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n"
    )


def is_number_column(column: list) -> bool:
    given = [value for value in column if value is not None]
    return bool(given) and all(map(disk.is_number, given))


def decimals(column: list) -> int:
    """Digits after the point for all of a column: four significant ones in its largest number, and
    no more than any of its numbers has.
    """
    numbers = [abs(value) for value in column if isinstance(value, float) and math.isfinite(value)]
    if not any(numbers):
        return 0
    wanted = min(4, max(0, 3 - math.floor(math.log10(max(numbers)))))
    return max(len(f"{value:.{wanted}f}".rstrip("0").partition(".")[2]) for value in numbers)


def shown(value, digits: int) -> str:
    """`value` as text: a float with `digits` after the point, or with two significant ones where
    that is too few.
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    if value and (abs(value) < 10 ** (1 - digits) or abs(value) >= 1e9):
        return f"{value:.2g}" if abs(value) < 1 else f"{value:.4g}"
    return f"{value:.{digits}f}"


def column_html(column: list, style: str, cut: int | None) -> list[str]:
    """The cells of a column. A number's full value travels beside what is shown: the script sorts
    by it.
    """
    digits = decimals(column)
    cells = []
    for value in column:
        text = escape(shown(value, digits))
        if disk.is_number(value) and math.isfinite(value):
            cells.append(f'<td{style} data-value="{float(value)!r}">{text}</td>')
        elif cut and len(str(value)) > cut:
            cells.append(f'<td class="cut" title="{text}">{escape(str(value)[:cut])}…</td>')
        else:
            cells.append(f"<td{style}>{text}</td>")
    return cells


def runs_html(runs: list[dict]) -> str:
    """All runs with their numbers and the arguments in which they differ; then those that are
    alike.
    """
    if not runs:
        return '<p class="none">There are no runs.</p>'
    arguments = [flatten(run.get("arguments") or {}) for run in runs]
    numbers = list(dict.fromkeys(key for run in runs for key in run.get("numbers") or {}))
    differing, alike = split_arguments(arguments)
    headers = ["run", "status", *numbers, *differing]
    rows = [
        [
            run.get("run_id"),
            run.get("status"),
            *((run.get("numbers") or {}).get(key) for key in numbers),
            *(as_cell(flat.get(key)) for key in differing),
        ]
        for run, flat in zip(runs, arguments)
    ]
    note = "The arguments that differ between runs stand after the numbers." if differing else ""
    return note_html(note) + table_html(headers, rows, "Runs", LONG_CELL) + alike_html(alike)


def flatten(arguments: dict, prefix: str = "") -> dict:
    """Arguments with those in objects under names of their own: {"versions": {"torch": ..}} has
    versions.torch.
    """
    flat = {}
    for key, value in arguments.items():
        flat |= (
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


def split_arguments(arguments: list[dict]) -> tuple[list[str], dict]:
    """(names of the arguments whose values differ, {name: value} of the others); a run without it
    does not count.
    """
    names = dict.fromkeys(key for flat in arguments for key in flat)
    values = {name: {as_text(flat[name]) for flat in arguments if name in flat} for name in names}
    return [name for name in names if len(values[name]) > 1], {
        name: min(values[name]) for name in names if len(values[name]) == 1
    }


def as_cell(value):
    return as_text(value) if isinstance(value, list | bool) else value


def as_text(value) -> str:
    return (
        value
        if isinstance(value, str)
        else json.dumps(disk.finite_or_null(value), ensure_ascii=False)
    )


def alike_html(alike: dict[str, str]) -> str:
    if not alike:
        return ""
    pairs = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>\n"
        for name, value in alike.items()
    )
    return (
        f"<details><summary>{len(alike)} arguments are alike in all runs that have them</summary>\n"
        + (f'<dl class="arguments">\n{pairs}</dl>\n</details>')
    )


def pack(page: dict) -> str:
    """What the script shows, as base64 of gzip of JSON: no character of it means anything in
    HTML.
    """
    runs = [
        {"run_id": run.get("run_id"), "arguments": texts_of(run.get("arguments") or {})}
        for run in page.get("runs") or []
    ]
    data = {
        "runs": runs,
        "questions": {
            str(key): value for key, value in sorted((page.get("questions") or {}).items())
        },
        "answers": pick(page.get("answers") or [], ANSWER_KEYS),
        "judgements": pick(page.get("judgements") or [], JUDGEMENT_KEYS),
    }
    text = json.dumps(disk.finite_or_null(data), separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()


def texts_of(arguments: dict) -> dict[str, str]:
    return {name: as_text(value) for name, value in flatten(arguments).items()}


def pick(rows: Iterable[dict], keys: tuple[str, ...]) -> list[dict]:
    return [{key: row.get(key) for key in keys} for row in rows]
