"""What a table is: columns with a header and a value of the row, a layout of them, and rows.

A `Layout` is what a table looks like: title, note, and columns with a header, the field of the row
(or a function of the row), and the digits shown. A `Table` is a layout with rows. Columns of
context (how many seeds, selected by what) take no room in the report where all rows agree: there
its note says it once.

Scores by category are a pivot, a row per cell and a column per category; the CSV file has the rows
behind it.
"""

from collections.abc import Callable
from typing import NamedTuple

from pref.analysis import texts
from pref.analysis.measures import Measure
from pref.files import mt_bench

CELL_HEADER = "loss β τ"


class Column(NamedTuple):
    header: str
    value: str | Callable[[dict], object]  # a field of the row, or a function of the row
    digits: int | None = None  # of a float, after the decimal point
    context: bool = False  # how a row was made: where all rows agree, the page says it in the note

    def of(self, row: dict) -> object:
        """The row's value in this column, rounded."""
        value = row.get(self.value) if isinstance(self.value, str) else self.value(row)
        if isinstance(value, float) and self.digits is not None:
            return round(value, self.digits)
        return value


class Layout(NamedTuple):
    title: str
    columns: list[Column]
    note: str = ""
    paper: tuple[str, ...] = ()  # headers of the columns that a paper prints; empty: all


class Table(NamedTuple):
    id: str  # the name of its files
    title: str
    note: str | None
    columns: list[Column]
    rows: list[dict]
    judge: dict | None = None  # whose scores these are, for each row of the CSV
    paper: tuple[str, ...] = ()  # headers of the columns that a paper prints; empty: all
    group: str = ""  # what the tables of one part of a measure have in common: begins the title
    data: list[dict] | None = None  # rows of the CSV, where those that are shown are a pivot

    def paper_columns(self) -> list[Column]:
        return [one for one in self.columns if not self.paper or one.header in self.paper]

    def headers(self) -> list[str]:
        return [column.header for column in self.columns]

    def values(self, row: dict) -> list:
        return [column.of(row) for column in self.columns]

    def page(self) -> dict:
        """The table as `report.write_report` takes it: without columns that say nothing, or the
        same in every row, which the note says instead.
        """
        columns = {column: [column.of(row) for row in self.rows] for column in self.columns}
        shared = {
            column: values[0]
            for column, values in columns.items()
            if column.context and len(values) > 1 and len(set(map(str, values))) == 1
        }
        shown = [column for column in self.columns if column not in shared]
        shown = [column for column in shown if any(value is not None for value in columns[column])]
        same = [
            f"{c.header}: {texts.show(v, c.digits)}" for c, v in shared.items() if v is not None
        ]
        note = f"In all rows: {'; '.join(same)}." if same else None
        return {
            "id": self.id,
            "title": self.title,
            "group": self.group,
            "kind": self.title.removeprefix(f"{self.group}: "),
            "note": " ".join(filter(None, (self.note, note))) or None,
            "headers": [column.header for column in shown],
            "rows": [[column.of(row) for column in shown] for row in self.rows],
            "digits": [column.digits for column in shown],
        }


# ---- kinds of columns ----------------------------------------------------------------------------


def p_column(header: str, key: str) -> Column:
    return Column(header, lambda row: texts.p_text(row.get(key)))


def interval_column(header: str, digits: int, low: str = "low", high: str = "high") -> Column:
    """An interval such as [0.12, 0.34]; low, high: the fields with its ends."""

    def text(row: dict) -> str | None:
        if row.get(low) is None:
            return None
        return f"[{row[low]:.{digits}f}, {texts.show(row.get(high), digits)}]"

    return Column(header, text)


def rate_interval(row: dict) -> str | None:
    if row["rate_low"] is None:
        return None
    return f"[{texts.percent(row['rate_low'])}, {texts.percent(row['rate_high'])}]"


# ---- a pivot by category ------------------------------------------------------------------------


def by_category(measure: Measure, rows: list[dict]) -> Layout:
    """A row per cell and a column per category. rows: of a part's "categories"."""
    categories = order_categories(rows)
    columns = [Column(name, category_score(name), measure.digits) for name in categories]
    unscored = sum(row["n_judged"] - row["n_scored"] for row in rows)
    note = "Mean over seeds. SD over seeds and numbers of judgements: in the CSV file."
    if unscored:
        note += f" {unscored} judgements have no score: they are left out."
    return Layout("by category", [Column(CELL_HEADER, "label"), *columns], note)


def category_score(name: str) -> Callable[[dict], float | None]:
    return lambda row: row["by_category"].get(name)


def order_categories(rows: list[dict]) -> list[str]:
    """MT-Bench's categories in its order, then all others by name."""
    names = {row["category"] for row in rows}
    known = [name for name in mt_bench.CATEGORIES if name in names]
    return known + sorted(names - set(known))


def pivot_categories(rows: list[dict]) -> list[dict]:
    """One row per cell, in order of first appearance: {label, by_category {category: score}}."""
    pivot: dict[str, dict] = {}
    for row in rows:
        cell = pivot.setdefault(row["label"], {"label": row["label"], "by_category": {}})
        cell["by_category"][row["category"]] = row["score"]
    return list(pivot.values())
