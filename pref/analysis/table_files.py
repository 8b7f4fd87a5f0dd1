"""Tables as files: CSV to compute with, Markdown and LaTeX to paste.

A CSV has every field of every row at full precision, under the names of aggregated_metrics.json,
also where the table that is shown is a pivot of these rows: by category.
Markdown has the columns of the table's layout in paper_tables.py, rounded. LaTeX has those of
them that a paper prints, five or fewer where there are many.
"""

import csv
import io
import re
from pathlib import Path

from pref.analysis import texts
from pref.analysis.table_parts import Column, Table
from pref.files import disk

RECORDS = ("sensitivity", "mcnemar")  # lists of records, which have tables of their own
# In each row of a table of scores: who judged and, besides MT-Bench, what was compared.
JUDGE_FIELDS = ("judge", "prompts", "refs", "smoke_test")
PLACE_FIELDS = ("bench", "category", "baseline", "as_humans")


def write_tables(folder: Path, tables: list[Table]) -> None:
    """Write each table as <id>.csv, .md and .tex, and delete all others: a table of runs or judges
    that no longer exist would pass for a current one.
    """
    writers = {"csv": csv_text, "md": markdown_text, "tex": latex_text}
    for suffix, text_of in writers.items():
        for table in tables:
            disk.write_text(folder / f"{table.id}.{suffix}", text_of(table))
        for old in folder.glob(f"*.{suffix}"):
            if old.stem not in {table.id for table in tables}:
                old.unlink()


# ---- CSV ----------------------------------------------------------------------------------------


def csv_text(table: Table) -> str:
    """All fields of all rows that are not records themselves; list items are joined by spaces."""
    judge = {key: table.judge[key] for key in JUDGE_FIELDS} if table.judge else {}
    if table.judge and "bench" in table.judge:
        # A table of differences has a column "baseline" of its own: the cell's.
        judge |= {f"judged_{key}": table.judge[key] for key in PLACE_FIELDS}
    data = table.rows if table.data is None else table.data
    nested = {key for row in data for key, value in row.items() if is_nested(value)}
    nested |= set(RECORDS)
    rows = [
        judge | {key: csv_value(value) for key, value in row.items() if key not in nested}
        for row in data
    ]
    fields = dict.fromkeys(key for row in rows for key in row)  # in order of first appearance
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def csv_value(value):
    return " ".join(map(str, value)) if isinstance(value, list) else value


def is_nested(value) -> bool:
    """Whether a value is a record or a list of records, which a cell of a CSV cannot hold."""
    values = value if isinstance(value, list) else [value]
    return any(isinstance(one, dict) for one in values)


# ---- Markdown -----------------------------------------------------------------------------------


def text_lines(table: Table, columns: list[Column]) -> list[list[str]]:
    """The cells of each row as text, each number with its column's digits."""
    return [
        [
            "" if (value := column.of(row)) is None else texts.show(value, column.digits)
            for column in columns
        ]
        for row in table.rows
    ]


def markdown_text(table: Table) -> str:
    def line(cells: list[str]) -> str:
        return f"| {' | '.join(map(markdown_escape, cells))} |"

    rule = f"|{'---|' * len(table.columns)}"
    lines = [line(table.headers()), rule, *map(line, text_lines(table, table.columns))]
    note = f"\n{table.note}\n" if table.note else ""
    return f"**{markdown_escape(table.title)}**\n{note}\n" + "\n".join(lines) + "\n"


def markdown_escape(text: str) -> str:
    return re.sub(r"([|\\`*_<>\[\]])", r"\\\1", " ".join(text.split()))


# ---- LaTeX --------------------------------------------------------------------------------------

LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "β": r"$\beta$",
    "τ": r"$\tau$",
    "±": r"$\pm$",
    "<": r"$<$",
    ">": r"$>$",
}


def latex_text(table: Table) -> str:
    r"""A table environment for \usepackage{booktabs}: numbers to the right, text to the left."""
    columns = table.paper_columns()
    lines = text_lines(table, columns)
    alignment = "".join("r" if is_numeric(column) else "l" for column in zip(*lines))
    caption = latex_escape(table.title + (f". {table.note}" if table.note else ""))
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\label{{tab:{table.id}}}",
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            latex_line([column.header for column in columns]),
            r"\midrule",
            *map(latex_line, lines),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def is_numeric(column: tuple[str, ...]) -> bool:
    """Whether all texts of a column are numbers, intervals, percentages or empty."""
    return all(re.fullmatch(r"[-+<\d.,\[\] %einf]*", text) for text in column)


def latex_line(cells: list[str]) -> str:
    # A row that begins with a bracket would be read as an argument of the \\ before it: hence {}.
    start = "{}" if any(cell.startswith("[") for cell in cells[:1]) else ""
    return start + " & ".join(map(latex_escape, cells)) + r" \\"


def latex_escape(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in " ".join(text.split()))
