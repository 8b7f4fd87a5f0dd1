"""Lay out a comparison as one HTML file that needs nothing else: no network, server or library.

    from pref.analysis.report import write_report
    write_report(Path("results/comparison/report.html"), {"title": "Four losses", "runs": [...]})

Reads   report_template.{html,css,js}, report_page.js and the figures' SVG files; all else comes
        from analyze.py
Writes  the report

Nothing is computed here, and nothing in a page is trusted: answers and judgements are what models
wrote, and run ids are names of folders.
  - All text in the HTML is escaped.
  - Answers and judgements travel as base64 of gzip of JSON. The script unpacks them and inserts
    them as text nodes, never as HTML.
  - The content security policy admits the template's script and style, by hash, and no others.

The same page gives the same bytes.
"""

import base64
import gzip
import hashlib
import html
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from pref.files import disk
from pref.files.console import UserError

TEMPLATE = Path(__file__).with_name("report_template.html")
PAGE_SCRIPT = Path(__file__).with_name("report_page.js")
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
NO_VALUE = "–"
NUMBERS = re.compile(r"-|(?=.*\d)[-+<\d.,\[\] %±einf]*")  # of a column that is aligned to the right


class Badge(NamedTuple):
    style: str  # a class of the style sheet
    sign: str


# Sign and word say the same as the colour.
BADGES = {
    "supported": Badge("supported", "✓"),
    "contradicted": Badge("contradicted", "✗"),
    "undecided": Badge("undecided", "≈"),
    "not measured": Badge("unmeasured", "○"),
    # Of the answer.
    "decided": Badge("supported", "✓"),
    "better": Badge("supported", "✓"),
    "worse": Badge("contradicted", "✗"),
    "not decided": Badge("undecided", "≈"),
}
UNKNOWN_VERDICT = Badge("unmeasured", "?")
FIRST_FOLDED = 10_001  # folded claims are numbered from here, behind all others
VERDICT_NUMBERS = ("estimate", "interval", "test", "judge")
ANSWER_FIELDS = ("bench", "run_id", "question_id", "choice", "turns")
JUDGEMENT_FIELDS = (
    *("bench", "run_id", "question_id", "turn", "choice", "repeat", "judge", "grading", "score"),
    *("winner", "baseline", "order", "status", "judgement", "preference", "label"),
)
# In the table of runs, longer arguments are cut; where two runs are compared, they are complete.
MAX_CELL_CHARACTERS = 40
SHORT_TEXT = 26  # characters: texts of a column that stay in one line
WIDE_FIGURE = 700  # pixels: wider figures take both columns of the page
UNQUOTED = " !$()*+,-./:;=?@_"  # characters that mean nothing in an address within an attribute


def write_report(path: Path, page: dict) -> None:
    """Write `page` to `path` as one HTML file. Any part may be empty or missing; its section then
    says so.

    page:
      title       str
      facts       [[label, value]]
      opening     {sentences, verdict}: [str], the first one large; verdict is decided, undecided,
                  not measured, supported or contradicted
      answer      [{score, verdict, lead, judge, rows [{verdict, text, detail}]}], all str (judge:
                  or None); verdict of a score as in opening, that of a row is better, worse, not
                  decided or not measured
      verdicts    [{id, claim, judge, verdict, estimate, interval, test, why}], all str or None;
                  verdict is supported, contradicted, undecided or not measured
      caveats     [str], what the answer is without; also among the notes
      folded      {title, verdicts}: claims that are shown only if asked for
      notes       [str]
      missing     [str]
      tables      [{id, title, note, headers, rows, digits, group, kind}]; a cell is str, int,
                  float or None; the last three may be missing: digits of each column's floats,
                  what consecutive tables have in common, and the title without that
      figures     [{title, svg (a path), alt}]
      runs        [{run_id, status, arguments {name: JSON value}, numbers {name: float or None}}]
      benches     [{name, title, left_out}]; left_out: questions that are not shown
      questions   {bench: {question id: {category, turns}}}; turns is None if the text is not
                  available
      answers     [{bench, run_id, question_id, choice, turns}]
      judgements  [{bench, run_id, question_id, turn, choice, repeat, judge, grading, score, winner,
                  baseline, order, status, judgement, preference, label}], as in judgements.csv

    Raises UserError if a figure is missing or not an SVG.
    """
    parts = {
        **own_parts(TEMPLATE.with_suffix(".js")),
        "title": escape(page.get("title") or "Comparison of runs"),
        "opening": opening_html(page.get("opening") or {}),
        "facts": facts_html(page.get("facts") or []),
        "answer": answers_html(page.get("answer") or []) + caveats_html(page.get("caveats") or []),
        "verdicts": verdicts_html(page.get("verdicts") or []),
        "folded": folded_html(page.get("folded") or {}),
        "notes": list_html(page.get("notes") or [], "There are no notes."),
        "missing": list_html(page.get("missing") or [], "Nothing is missing."),
        "figures": figures_html(page.get("figures") or []),
        "tables": tables_html(page.get("tables") or []),
        "runs": runs_html(page.get("runs") or []),
        "data": pack_texts(page),
    }
    disk.write_text(path, fill(TEMPLATE.read_text(encoding="utf-8"), parts))


def own_parts(script: Path) -> dict[str, str]:
    """The style and the script of a page, with their hashes for its policy. script: of this report,
    behind what every report's page does.
    """
    style = TEMPLATE.with_suffix(".css").read_text(encoding="utf-8")
    scripts = [path.read_text(encoding="utf-8") for path in (PAGE_SCRIPT, script)]
    text = "\n".join(scripts)
    return {
        "style": style,
        "style_hash": policy_hash(style),
        "script": text,
        "script_hash": policy_hash(text),
    }


def fill(template: str, parts: dict[str, str]) -> str:
    """Replace the placeholders of `template` in one pass: text in a part that looks like a
    placeholder stays as it is.
    """
    return PLACEHOLDER.sub(lambda match: parts[match[1]], template)


def policy_hash(content: str) -> str:
    """base64 of the sha256 of an inline style or script, for the content security policy."""
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def escape(value) -> str:
    """`value` as text in HTML, also in attributes. UTF-8 has no bytes for a lone surrogate, which
    becomes '?'.
    """
    return html.escape(str(value).encode("utf-8", "replace").decode())


def anchor(kind: str, name: str, number: int) -> str:
    """An id to link to, such as verdict-1-tau_helps. The number tells apart names that differ only
    in characters that an id cannot have.
    """
    return f"{kind}-{number}-{re.sub(r'[^A-Za-z0-9_]+', '-', str(name))}"


def definitions_html(pairs: Iterable[tuple], style: str) -> str:
    """A <dl> of (term, text) pairs."""
    items = (f"<div><dt>{escape(term)}</dt><dd>{escape(text)}</dd></div>\n" for term, text in pairs)
    return f'<dl class="{style}">\n{"".join(items)}</dl>'


def none_html(sentence: str) -> str:
    return f'<p class="none">{sentence}</p>'


def note_html(note: str | None) -> str:
    return f'<p class="note">{escape(note)}</p>\n' if note else ""


# ---- the answer ---------------------------------------------------------------------------------


def opening_html(opening: dict) -> str:
    """The statement that the report opens with, its first sentence large."""
    if not opening:
        return ""
    first, *rest = opening.get("sentences") or [""]
    badge = badge_html(verdict_of(opening))
    more = f"<p>{escape(' '.join(rest))}</p>\n" if rest else ""
    return f'<div class="opening">\n{badge}\n<p class="won">{escape(first)}</p>\n{more}</div>'


def answers_html(answers: list[dict]) -> str:
    """For each score its answer in one sentence; behind it a card per comparison."""
    if not answers:
        return none_html("Nothing was measured yet: see what is missing below.")
    return "\n".join(map(answer_html, answers))


def caveats_html(caveats: list[str]) -> str:
    return f'\n<div class="caveats">{list_html(caveats, "")}</div>' if caveats else ""


def answer_html(answer: dict) -> str:
    rows = answer.get("rows") or []
    cards = ""
    if rows:
        summary = f"{len(rows)} comparison{'s' if len(rows) > 1 else ''}: what each rests on"
        cards = (
            f'<details><summary>{summary}</summary>\n<div class="verdicts">\n'
            f"{''.join(map(comparison_html, rows))}</div></details>"
        )
    badge = badge_html(answer["verdict"]) if answer.get("verdict") else ""
    return (
        f'<div class="answer">\n<h3>{badge} {escape(answer.get("score") or "")}</h3>\n'
        f'<p class="lead">{escape(answer.get("lead") or "")}</p>\n'
        f"{note_html(answer.get('judge'))}{cards}\n</div>"
    )


def comparison_html(row: dict) -> str:
    verdict = verdict_of(row)
    style = BADGES.get(verdict, UNKNOWN_VERDICT).style
    return (
        f'<article class="verdict {style}">\n<p class="mark">{badge_html(verdict)}</p>\n'
        f"<div>\n<p>{escape(row.get('text') or '')}</p>\n"
        f'<p class="why">{escape(row.get("detail") or "")}</p>\n</div>\n</article>\n'
    )


# ---- facts, notes, verdicts ---------------------------------------------------------------------


def facts_html(facts: list) -> str:
    if not facts:
        return none_html("No facts about this comparison were given.")
    pairs = ((label, format_value(value, column_digits([value]))) for label, value in facts)
    return definitions_html(pairs, "facts")


def list_html(items: list[str], if_empty: str) -> str:
    if not items:
        return none_html(if_empty)
    return "<ul>\n" + "".join(f"<li>{escape(item)}</li>\n" for item in items) + "</ul>"


def verdicts_html(rows: list[dict]) -> str:
    """How many claims got which verdict, then a card per claim."""
    if not rows:
        return none_html("There are no verdicts: no claim was tested.")
    return f'{tally_html(rows)}\n<div class="verdicts">\n{cards_html(rows, 1)}</div>'


def tally_html(rows: list[dict]) -> str:
    counts = Counter(map(verdict_of, rows))
    unknown = sorted(verdict for verdict in counts if verdict not in BADGES)
    tally = "".join(
        f"<li>{badge_html(verdict)} {counts[verdict]}</li>"
        for verdict in [*BADGES, *unknown]
        if verdict in counts
    )
    return f'<ul class="tally">{tally}</ul>'


def cards_html(rows: list[dict], first: int) -> str:
    """A card per claim; `first`: the number of the first, which makes its link unique."""
    return "".join(verdict_html(row, number) for number, row in enumerate(rows, first))


def folded_html(folded: dict) -> str:
    """Claims behind a title that opens them."""
    rows = folded.get("verdicts") or []
    if not rows:
        return ""
    summary = f"<summary>{escape(folded.get('title') or 'More claims')}</summary>"
    cards = cards_html(rows, FIRST_FOLDED)
    return f'<details>{summary}\n<div class="verdicts">\n{cards}</div>\n</details>'


def verdict_of(row: dict) -> str:
    return row.get("verdict") or "not measured"


def badge_html(verdict: str) -> str:
    style, sign = BADGES.get(verdict, UNKNOWN_VERDICT)
    sign = f'<span aria-hidden="true">{sign}</span>'
    return f'<span class="badge {style}">{sign} {escape(verdict)}</span>'


def verdict_html(row: dict, number: int) -> str:
    verdict = verdict_of(row)
    style = BADGES.get(verdict, UNKNOWN_VERDICT).style
    name = row.get("id") or str(number)
    link = anchor("verdict", name, number)
    numbers = [(key, row[key]) for key in VERDICT_NUMBERS if row.get(key) is not None]
    why = f'<p class="why">{escape(row["why"])}</p>\n' if row.get("why") else ""
    return (
        f'<article class="verdict {style}" id="{link}">\n'
        f'<p class="mark">{badge_html(verdict)}<a href="#{link}">{escape(name)}</a></p>\n'
        f'<div>\n<h3 class="claim">{escape(row.get("claim") or "A claim without a text")}</h3>\n'
        + (f"{definitions_html(numbers, 'numbers')}\n" if numbers else "")
        + f"{why}</div>\n</article>\n"
    )


# ---- figures ------------------------------------------------------------------------------------


def figures_html(figures: list[dict]) -> str:
    if not figures:
        return none_html("There are no figures.")
    return '<div class="figures">\n' + "".join(map(figure_html, figures)) + "</div>"


def figure_html(figure: dict) -> str:
    """A figure as a button that enlarges it; its caption has the notes of the file's description.

    The figure is an image of its own, not a part of the page: nothing in it can run. `over` is HTML
    that lies over it.
    """
    svg = read_svg(Path(figure["svg"]))
    width, height = (round(float(size) * 4 / 3) for size in svg["size"])  # points to pixels
    title = escape(figure.get("title") or svg["title"])
    notes = escape(" ".join(f"{note.rstrip('.')}." for note in svg["notes"].splitlines() if note))
    alt = escape(figure.get("alt") or figure.get("title") or "")
    alt = f"{alt}. {notes}".strip()
    source = f"data:image/svg+xml,{quote(svg['text'], safe=UNQUOTED)}"
    image = f'<img src="{source}" width="{width}" height="{height}" alt="{alt}">'
    wide = ' class="wide"' if width > WIDE_FIGURE else ""
    return (
        f'<figure{wide}>\n<div class="drawing" tabindex="0" role="region" aria-label="{title}">'
        f'<button type="button" class="enlarge" title="Enlarge">{image}</button>'
        f"{figure.get('over', '')}</div>\n"
        f"<figcaption><b>{title}</b> {notes}</figcaption>\n</figure>\n"
    )


def read_svg(path: Path) -> dict:
    """The text of an SVG file of drawing.py, its size in points, its title and its notes."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such figure; rerun analyze.py") from None
    except UnicodeDecodeError:
        text = ""
    size = re.match(r'<svg [^>]*width="([\d.]+)pt" height="([\d.]+)pt"', text)
    if not size:
        raise UserError(f"{path}: not an SVG file of analyze.py; delete it and rerun analyze.py")
    found = {
        name: re.search(f"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
        for name, tag in (("title", "title"), ("notes", "desc"))
    }
    own = {name: html.unescape(match[1]) if match else "" for name, match in found.items()}
    return {"text": text, "size": size.groups(), **own}


# ---- tables -------------------------------------------------------------------------------------


def tables_html(tables: list[dict]) -> str:
    """The tables under the headings of their groups, below a list of links if there are more than
    two. A table without a group stands alone.
    """
    if not tables:
        return none_html("There are no tables.")
    links, sections, group = "", "", None
    for number, table in enumerate(tables, 1):
        link = anchor("table", table.get("id") or "", number)
        title = escape(table.get("title") or table.get("id") or "Table")
        headers, rows = table.get("headers") or [], table.get("rows") or []
        content = table_html(headers, rows, title, digits=table.get("digits"))
        own = escape(table.get("group") or "")
        kind = escape(table.get("kind") or "") if own else title
        if not own or own != group:
            links += f"{'</li>' if links else ''}\n<li>{f'<b>{own}</b> ' if own else ''}"
            sections += f'<h3 class="group">{own}</h3>\n' if own else ""
        group = own
        links += f'<a href="#{link}">{kind}</a> '
        heading = f"<h4>{kind}</h4>" if own else f"<h3>{title}</h3>"
        sections += (
            f'<section class="table" id="{link}">\n{heading}\n'
            f"{note_html(table.get('note'))}{content}</section>\n"
        )
    contents = f'<ul class="contents">{links}</li>\n</ul>\n' if len(tables) > 2 else ""
    return contents + sections


def table_html(
    headers: list[str],
    rows: list[list],
    title: str,
    max_characters: int | None = None,
    digits: list[int | None] | None = None,
) -> str:
    """A table in a box that scrolls, with headers that are buttons to sort by.

    title: already escaped. max_characters: longer texts are cut and shown in full as a tooltip.
    digits: of each column's floats, after the decimal point; None: as many as it needs.
    """
    if not rows:
        return none_html("This table has no rows.") + "\n"
    n_columns = max(map(len, [headers, *rows]))
    headers = [*headers, *[""] * (n_columns - len(headers))]
    rows = [[*row, *[None] * (n_columns - len(row))] for row in rows]
    digits = [*(digits or []), *[None] * n_columns]
    head, columns = "", []
    for name, column, n_digits in zip(headers, zip(*rows), digits):
        style = column_style(column)
        # Headers break between words, longer words anywhere.
        broken = ' class="broken"' if max(map(len, name.split()), default=0) > SHORT_TEXT else ""
        button = f'<button type="button"{broken}>{escape(name)}</button>'
        head += f'<th scope="col"{style}>{button}</th>'
        columns.append(column_cells(column, style, max_characters, n_digits))
    body = "".join(f"<tr>{''.join(cells)}</tr>\n" for cells in zip(*columns))
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title}">\n'
        f'<table class="sortable">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table>\n</div>\n"
    )


def column_style(column: Iterable) -> str:
    """Numbers are aligned to the right; short texts, such as names of cells, stay in one line."""
    if is_number_column(column):
        return ' class="number"'
    return ' class="short"' if max(len(str(value)) for value in column) <= SHORT_TEXT else ""


def column_cells(
    column: Iterable, style: str, max_characters: int | None, digits: int | None
) -> list[str]:
    """The <td> elements of a column. Those of numbers also carry the full value, which the script
    sorts by.
    """
    column = list(column)
    digits = column_digits(column) if digits is None else digits
    cells = []
    for value in column:
        text = escape(format_value(value, digits))
        if disk.is_number(value) and math.isfinite(value):
            cells.append(f'<td{style} data-value="{float(value)!r}">{text}</td>')
        elif max_characters and len(str(value)) > max_characters:
            start = escape(str(value)[:max_characters])
            cells.append(f'<td class="cut" title="{text}">{start}…</td>')
        else:
            cells.append(f"<td{style}>{text}</td>")
    return cells


def is_number_column(column: Iterable) -> bool:
    """Whether all values are numbers, or texts such as [0.12, 0.34], +3.1%, < 0.0001 and "-"."""
    values = [value for value in column if value is not None]
    return bool(values) and all(
        disk.is_number(value) or (isinstance(value, str) and bool(NUMBERS.fullmatch(value)))
        for value in values
    )


def column_digits(column: list) -> int:
    """Digits after the decimal point for all floats of a column: as many as give its largest number
    four significant digits, at most 4, and no more than any of them needs.

    E.g. 2 for 0.05, 0.1 and 2.5.
    """
    floats = [abs(value) for value in column if isinstance(value, float) and math.isfinite(value)]
    if not any(floats):
        return 0
    digits = min(4, max(0, 3 - math.floor(math.log10(max(floats)))))
    return max(len(f"{value:.{digits}f}".rstrip("0").partition(".")[2]) for value in floats)


def format_value(value, digits: int) -> str:
    """`value` as text: a float with `digits` after the decimal point, or with two significant
    digits where that would be too few.
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NO_VALUE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    if value and (abs(value) < 10 ** (1 - digits) or abs(value) >= 1e9):
        return f"{value:.2g}" if abs(value) < 1 else f"{value:.4g}"
    return f"{value:.{digits}f}"


# ---- runs and their arguments -------------------------------------------------------------------


def runs_html(runs: list[dict]) -> str:
    """A table of all runs with their numbers; behind titles that open them, the arguments in which
    the runs differ and those that are the same in all of them.
    """
    if not runs:
        return none_html("There are no runs.")
    arguments = [flatten(run.get("arguments") or {}) for run in runs]
    differing, common = split_arguments(arguments)
    numbers = list(dict.fromkeys(key for run in runs for key in run.get("numbers") or {}))
    rows = [
        [
            run.get("run_id"),
            run.get("status"),
            *((run.get("numbers") or {}).get(key) for key in numbers),
        ]
        for run in runs
    ]
    table = table_html(["run", "status", *numbers], rows, "Runs", MAX_CELL_CHARACTERS)
    return table + differing_html(runs, arguments, differing) + common_html(common)


def differing_html(runs: list[dict], arguments: list[dict], differing: list[str]) -> str:
    if not differing:
        return ""
    rows = [
        [run.get("run_id"), *(as_cell(flat.get(key)) for key in differing)]
        for run, flat in zip(runs, arguments)
    ]
    title = "Arguments that differ between runs"
    table = table_html(["run", *differing], rows, title, MAX_CELL_CHARACTERS)
    summary = f"<summary>{len(differing)} arguments differ between runs</summary>"
    return f"<details>{summary}\n{table}</details>\n"


def flatten(arguments: dict, prefix: str = "") -> dict:
    """Arguments without nesting: {"versions": {"torch": "2"}} becomes {"versions.torch": "2"}."""
    flat = {}
    for key, value in arguments.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def split_arguments(arguments: list[dict]) -> tuple[list[str], dict[str, str]]:
    """(names of the arguments whose values differ, {name: value} of the others). Runs that lack an
    argument are not considered.
    """
    values: dict[str, set[str]] = {}
    for flat in arguments:
        for name, value in flat.items():
            values.setdefault(name, set()).add(as_text(value))
    differing = [name for name, texts in values.items() if len(texts) > 1]
    common = {name: min(texts) for name, texts in values.items() if len(texts) == 1}
    return differing, common


def as_cell(value):
    return as_text(value) if isinstance(value, list | bool) else value


def as_text(value) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(disk.finite_or_null(value), ensure_ascii=False)


def common_html(common: dict[str, str]) -> str:
    if not common:
        return ""
    summary = f"{len(common)} arguments are the same in all runs that have them"
    arguments = definitions_html(common.items(), "arguments")
    return f"<details><summary>{summary}</summary>\n{arguments}\n</details>"


# ---- what the script shows ----------------------------------------------------------------------


def pack_texts(page: dict) -> str:
    """Arguments, questions, answers and judgements as base64 of gzip of JSON, whose characters mean
    nothing in HTML.
    """
    questions = page.get("questions") or {}
    runs = [
        {"run_id": run.get("run_id"), "arguments": argument_texts(run.get("arguments") or {})}
        for run in page.get("runs") or []
    ]
    data = {
        "runs": runs,
        "benches": page.get("benches") or [],
        "questions": {
            bench: {str(question): value for question, value in sorted(of_bench.items())}
            for bench, of_bench in questions.items()
        },
        "answers": pick_fields(page.get("answers") or [], ANSWER_FIELDS),
        "judgements": pick_fields(page.get("judgements") or [], JUDGEMENT_FIELDS),
    }
    text = json.dumps(disk.finite_or_null(data), separators=(",", ":"), allow_nan=False)
    # Without a time stamp, which gzip would write into its header.
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()


def argument_texts(arguments: dict) -> dict[str, str]:
    return {name: as_text(value) for name, value in flatten(arguments).items()}


def pick_fields(rows: Iterable[dict], fields: tuple[str, ...]) -> list[dict]:
    return [{field: row.get(field) for field in fields} for row in rows]
