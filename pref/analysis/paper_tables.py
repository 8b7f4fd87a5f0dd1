"""The tables of analyze.py: printed, and as CSV (full precision), Markdown and LaTeX (as they would
stand in a paper).

list_tables makes them all from aggregated_metrics.json's structure; a Table knows which fields it
shows and how.
"""

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pref.analysis import run_metrics
from pref.files import disk

CELL_HEADER = "loss β τ"
ACCURACY_NAMES = {
    "best_acc_ref": "best acc_ref",
    "final_acc_ref": "final acc_ref",
    "final_acc_sum": "final acc_sum",
    "final_acc_mean": "final acc_mean",
    "margin_rho_first": "rho, first",
    "margin_rho_best": "rho, best",
}
SCORE_NAMES = {
    "score": "score",
    "turn_1": "turn 1",
    "turn_2": "turn 2",
    "score_without_wrong_references": "without wrong refs",
}


class Column(NamedTuple):
    header: str
    value: str | Callable[[dict], object]  # a field of the row, or what to make of the row
    digits: int | None = None

    def of(self, row: dict) -> object:
        value = row.get(self.value) if isinstance(self.value, str) else self.value(row)
        return (
            round(value, self.digits)
            if isinstance(value, float) and self.digits is not None
            else value
        )


class Table(NamedTuple):
    id: str  # its file's name
    title: str
    note: str | None
    columns: list[Column]
    rows: list[dict]
    judge: dict | None = None  # whose scores these are: said in every line of the CSV

    def page(self) -> dict:
        """As report.py takes it."""
        rows = [[column.of(row) for column in self.columns] for row in self.rows]
        headers = [column.header for column in self.columns]
        return {
            "id": self.id,
            "title": self.title,
            "note": self.note,
            "headers": headers,
            "rows": rows,
        }


def show(value, digits: int | None = None) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:g}" if digits is None else f"{value:.{digits}f}"
    return str(value)


def interval(low: str, high: str, digits: int) -> Callable[[dict], str | None]:
    return lambda row: (
        None if row.get(low) is None else f"[{row[low]:.{digits}f}, {show(row.get(high), digits)}]"
    )


def p_text(value: float | None) -> str | None:
    if value is None:
        return None
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def p_column(header: str, key: str) -> Column:
    return Column(header, lambda row: p_text(row.get(key)))


def list_tables(comparison: dict) -> list[Table]:
    """Every table that has rows, verdicts first."""
    accuracy = comparison["accuracy"]
    found = [
        Table("verdicts", "Verdicts on the claims", None, VERDICT_COLUMNS, comparison["claims"]),
        Table(
            "accuracy",
            "Validation accuracy: mean over seeds",
            BOOTSTRAP_NOTE,
            ACCURACY_COLUMNS,
            accuracy["cells"],
        ),
        *score_tables(accuracy, "accuracy", "Validation accuracy", 3, None),
        Table(
            "accuracy_mcnemar",
            "Accuracy on the same pairs, exact McNemar test by seed",
            MCNEMAR_NOTE,
            MCNEMAR_COLUMNS,
            mcnemar(accuracy["improvement"]),
        ),
    ]
    for judge in comparison["mt_bench"]:
        suffix = run_metrics.judge_suffix(judge, comparison["mt_bench"])
        found += mt_bench_tables(judge, suffix)
    found += [
        Table(
            "stability",
            "Divergence and non-finite steps by loss and beta",
            STABILITY_NOTE,
            STABILITY_COLUMNS,
            comparison["stability"],
        ),
        Table(
            "pairs",
            "Win rates of pairwise judgements",
            PAIRS_NOTE,
            PAIR_COLUMNS,
            comparison["pairs"],
        ),
        Table(
            "movement",
            "How far runs went from the reference, and what for",
            MOVEMENT_NOTE,
            movement_columns(comparison["movement"]),
            comparison["movement"],
        ),
    ]
    return [table for table in found if table.rows]


def mt_bench_tables(judge: dict, suffix: str) -> list[Table]:
    title = f"MT-Bench, {run_metrics.judge_title(judge)}"
    mark = run_metrics.smoke_mark(judge) or None
    note = " ".join(part for part in (mark and f"{mark}.", BOOTSTRAP_NOTE) if part)
    tables = [
        Table(
            f"mt_bench_by_turn{suffix}",
            f"{title}: mean over seeds",
            note,
            SCORE_COLUMNS,
            judge["cells"],
            judge,
        ),
        Table(
            f"mt_bench_by_category{suffix}",
            f"{title}: by category",
            mark,
            CATEGORY_COLUMNS,
            judge["categories"],
            judge,
        ),
        *score_tables(judge, "mt_bench", title, 2, judge, suffix),
        Table(
            f"mt_bench_variance{suffix}",
            f"{title}: where the variance comes from",
            VARIANCE_NOTE,
            VARIANCE_COLUMNS,
            judge["variance"],
            judge,
        ),
    ]
    if judge["retest"] or judge["length"]:
        row = {
            **(judge["retest"] or {}),
            **{f"length_{k}": v for k, v in (judge["length"] or {}).items()},
        }
        tables.append(
            Table(
                f"mt_bench_judge{suffix}",
                f"{title}: the judge itself",
                JUDGE_NOTE,
                JUDGE_COLUMNS,
                [row],
                judge,
            )
        )
    return tables


def score_tables(
    part: dict, name: str, title: str, digits: int, judge: dict | None, suffix: str = ""
) -> list[Table]:
    """Tables that accuracy and MT-Bench both have."""
    mark = f"{run_metrics.smoke_mark(judge)}. " if judge and judge["smoke_test"] else ""
    rows = part["improvement"]
    same_pairs = SAME_PAIRS_NOTE if name == "accuracy" else ""
    headline = [row for row in rows if row["comparison"] in ("best of grid", "untrained model")]
    cells = [row for row in rows if row not in headline]
    sensitivity = [line for row in headline for line in row["sensitivity"]]
    return [
        Table(
            f"{name}_headline{suffix}",
            f"{title}: headline differences",
            mark + HEADLINE_NOTE + same_pairs,
            difference_columns(digits, "p (Holm)"),
            headline,
            judge,
        ),
        Table(
            f"{name}_improvement{suffix}",
            f"{title}: differences cell by cell",
            mark + CELLS_NOTE,
            difference_columns(digits, "p (BH)"),
            cells,
            judge,
        ),
        Table(
            f"{name}_sensitivity{suffix}",
            f"{title}: other tests of the headline differences",
            mark + SENSITIVITY_NOTE,
            SENSITIVITY_COLUMNS,
            sensitivity,
            judge,
        ),
        Table(
            f"{name}_selection{suffix}",
            f"{title}: best of each grid, at equal budget",
            mark + SELECTION_NOTE,
            selection_columns(digits),
            part["selection"],
            judge,
        ),
        Table(
            f"{name}_over_beta{suffix}",
            f"{title}: variance over beta",
            mark + SPREAD_NOTE,
            SPREAD_COLUMNS,
            part["spread"],
            judge,
        ),
    ]


BOOTSTRAP_NOTE = "Interval: 95 % bootstrap over questions (or pairs) and seeds; with one seed over questions alone."
HEADLINE_NOTE = (
    "Best cell of each loss, chosen on validation accuracy. p: primary test, question and seed variance, "
    "Satterthwaite; Holm over the losses (Benjamini-Hochberg against the untrained model). Detectable: the true "
    "difference found with 80 % power. The interval counts the residual twice, so it may cover 0 where p is below 0.05."
)
SAME_PAIRS_NOTE = " Here the best cell is chosen on the very pairs it is tested on: p and interval flatter the larger grid."
CELLS_NOTE = "p as in the headline table, Benjamini-Hochberg over the cells of a comparison."
SENSITIVITY_NOTE = "Beside the primary test: each usual test with what it ignores. Not adjusted; not to be headlined."
SELECTION_NOTE = (
    "Expected: the mean over all ways to draw as many cells as the smaller grid has (the loss's or the baseline's), of "
    "the cell that is then selected, or of the maximum."
)
SPREAD_NOTE = (
    "Variance of the true means over beta: that of the observed means less what seeds and questions put there. Ratio "
    "and reduction against the baseline; none where a corrected variance is not positive."
)
MCNEMAR_NOTE = "Pairs that only one of the two gets right. Several seeds are several rows: their pairs are the same pairs."
STABILITY_NOTE = "Exact 95 % intervals (Clopper-Pearson). Steps of one run are not independent: trust the runs' rates."
PAIRS_NOTE = "Both orders; where they disagree it is a tie, which counts one half."
MOVEMENT_NOTE = (
    "KL: of the run's own answers to the base, nats an answer (k1). Anchor: 0.5 (a^2 + b^2), mean over the last tenth "
    "of the training steps."
)
VARIANCE_NOTE = "Of a question's score, by the method of moments; seeds within cells."
JUDGE_NOTE = (
    "Retest: answers judged several times. Length: Spearman correlation within a question's turn."
)
VERDICT_COLUMNS = [
    Column("claim", "id"),
    Column("sentence", "claim"),
    Column("judge", "judge"),
    Column("verdict", "verdict"),
    Column("estimate", lambda row: verdict_texts(row)["estimate"]),
    Column("95 % interval", lambda row: verdict_texts(row)["interval"]),
    p_column("p", "p"),
    p_column("p (Holm)", "p_holm"),
    Column("why", "why"),
]
CATEGORY_COLUMNS = [
    Column(CELL_HEADER, "label"),
    Column("category", "category"),
    Column("score", "score", 2),
    Column("SD over seeds", "score_sd", 2),
    Column("seeds", "n_seeds"),
    Column("scored", "n_scored"),
    Column("judged", "n_judged"),
]
SENSITIVITY_COLUMNS = [
    Column("proposed", "proposed"),
    Column("baseline", "baseline"),
    Column("test", "test"),
    p_column("p", "p"),
    Column("ignores", "ignores"),
]
SPREAD_COLUMNS = [
    Column("loss", "loss"),
    Column("τ", "tau"),
    Column("settings", "settings"),
    Column("betas", lambda row: " ".join(f"{beta:g}" for beta in row["betas"])),
    Column("variance of means", "variance_of_means", 4),
    Column("of it noise", "of_it_noise", 4),
    Column("variance", "variance", 4),
    Column("ratio", "ratio", 2),
    Column("95 % interval", interval("low", "high", 2)),
    Column("reduction %", "reduction_percent", 0),
    p_column("Brown-Forsythe p", "brown_forsythe_p"),
    Column("differs in", "differs_in"),
]
MCNEMAR_COLUMNS = [
    Column("proposed", "proposed"),
    Column("baseline", "baseline"),
    Column("seed", "seed"),
    Column("pairs", "n_pairs"),
    Column("only proposed right", "only_a"),
    Column("only baseline right", "only_b"),
    Column("ties", "ties"),
    p_column("p", "p"),
]
STABILITY_COLUMNS = [
    Column("loss", "loss"),
    Column("β", "beta"),
    Column("runs", "diverged_of"),
    Column("diverged", "diverged"),
    Column("rate", interval("diverged_low", "diverged_high", 2)),
    Column("with a non-finite step", "nonfinite_runs"),
    Column("rate ", interval("nonfinite_runs_low", "nonfinite_runs_high", 2)),
    Column("non-finite steps", "nonfinite_steps"),
    Column("of steps", "nonfinite_steps_of"),
    Column("rate  ", interval("nonfinite_steps_low", "nonfinite_steps_high", 4)),
]
PAIR_COLUMNS = [
    Column("judge", "judge"),
    Column(CELL_HEADER, "label"),
    Column("against", "baseline"),
    Column("win rate", "win_rate", 3),
    Column("smoke test", lambda row: "yes" if row["smoke_test"] else None),
    Column("95 % interval", interval("low", "high", 3)),
    Column("wins", "wins"),
    Column("ties", "ties"),
    Column("losses", "losses"),
    Column("questions", "n_questions"),
    Column("seeds", "n_seeds"),
]
VARIANCE_COLUMNS = [
    Column("loss", "loss"),
    Column("source", "source"),
    Column("variance", "variance", 3),
    Column("share", "share", 3),
]
JUDGE_COLUMNS = [
    Column("items judged again", "n_items"),
    Column("ICC(1,1)", "icc", 3),
    Column("SD of one rating", "sd", 2),
    Column("identical", "identical", 3),
    Column("length: answers", "length_n"),
    Column("Spearman", "length_spearman", 3),
]


def columns_of(names: dict[str, str], digits: int, *after: Column) -> list[Column]:
    """A cell, its first number with interval and SD, the other numbers."""
    (first, *rest), sd = (
        ([Column(header, name, digits) for name, header in names.items()]),
        f"{next(iter(names))}_sd",
    )
    return [
        Column(CELL_HEADER, "label"),
        Column("seeds", "n_seeds"),
        first,
        Column("95 % interval", interval("low", "high", digits)),
        Column("SD over seeds", sd, digits),
        *rest,
        *after,
        Column("diverged", "n_diverged"),
    ]


ACCURACY_COLUMNS = columns_of(ACCURACY_NAMES, 3)
SCORE_COLUMNS = columns_of(
    SCORE_NAMES, 2, Column("scored", "n_scored"), Column("judged", "n_judged")
)


def difference_columns(digits: int, adjusted: str) -> list[Column]:
    return [
        Column("comparison", "comparison"),
        Column("proposed", "proposed"),
        Column("baseline", "baseline"),
        Column("difference", "estimate", digits),
        Column("95 % interval", interval("low", "high", digits)),
        p_column("p", "p"),
        p_column(adjusted, "p_adjusted"),
        Column("detectable", "detectable", digits),
        Column("improvement", lambda row: percent(row["improvement_rate"])),
        Column("its interval", rate_interval),
        Column("seeds", "seeds_compared"),
        Column("units", "n_units"),
        Column("selected by", "selected_by"),
        Column("differs in", "differs_in"),
    ]


def percent(value: float | None) -> str | None:
    return None if value is None else f"{value:+.1%}"


def rate_interval(row: dict) -> str | None:
    return (
        None
        if row["rate_low"] is None
        else f"[{percent(row['rate_low'])}, {percent(row['rate_high'])}]"
    )


def selection_columns(digits: int) -> list[Column]:
    return [
        Column("loss", "loss"),
        Column("cells", "cells"),
        Column("selected", "selected"),
        Column("by", "selected_by"),
        Column("its value", "value", digits),
        Column("equal budget (cells)", "budget"),
        Column("expected, selected", "expected_selected", digits),
        Column("baseline, same budget", "baseline_expected_selected", digits),
        Column("expected maximum", "expected_maximum", digits),
        Column("maximum", "maximum", digits),
    ]


def movement_columns(rows: list[dict]) -> list[Column]:
    scores = [key for key in (rows[0] if rows else {}) if key.startswith("score, ")]
    return [
        Column("run", "run_id"),
        Column("KL", "kl", 3),
        Column("KL a token", "kl_per_token", 4),
        Column("anchor", "anchor", 3),
        Column("best acc_ref", "accuracy", 3),
        *(Column(name, name, 2) for name in scores),
    ]


def mcnemar(improvement: list[dict]) -> list[dict]:
    heads = ("proposed", "baseline")
    return [
        {key: row[key] for key in heads} | line
        for row in improvement
        for line in row.get("mcnemar", ())
    ]


def change_text(reduction: float) -> str:
    return "none" if reduction == float("-inf") else f"{-100 * reduction:+.0f} %"


def verdict_texts(row: dict) -> dict:
    """A verdict as a person reads it; all text or None."""
    unit = {"mt_bench": " MT-Bench", "acc_ref": " of pairs", None: " of runs"}.get(
        row["metric"], ""
    )
    number, ends = (
        "{:.2f}".format if row["metric"] is None else "{:+.3f}".format,
        [row["low"], row["high"]],
    )
    if (
        row["kind"] == "variance_reduction"
    ):  # shown as what the variance does: a reduction of 0.4 is -40 %
        unit, number, ends = " variance over beta", change_text, ends[::-1]
    test = row["test"] and f"{row['test']}: p {p_text(row['p']) or 'none'}"
    if test and row["p_holm"] is not None:
        test += f", Holm {p_text(row['p_holm'])}"
    compared = " against ".join(filter(None, (row["a"], row["b"])))
    return {
        "id": row["id"],
        "claim": row["claim"],
        "verdict": row["verdict"],
        "judge": (row["judge"] or "").removeprefix("judge ") or None,
        "estimate": None
        if row["estimate"] is None
        else f"{number(row['estimate'])}{unit} ({compared})",
        "interval": None if row["low"] is None else f"[{', '.join(map(number, ends))}]",
        "test": test,
        "why": row["why"] or None,
    }


def write_tables(folder: Path, tables: list[Table]) -> None:
    for stale in [path for suffix in ("csv", "md", "tex") for path in folder.glob(f"*.{suffix}")]:
        stale.unlink()  # a table of runs or judges that are gone would pass for a current one
    for table in tables:
        disk.write_text(folder / f"{table.id}.csv", csv_text(table))
        disk.write_text(folder / f"{table.id}.md", markdown_text(table))
        disk.write_text(folder / f"{table.id}.tex", latex_text(table))


def csv_text(table: Table) -> str:
    """Rows with all their fields, full precision; each line of scores says whose they are and if a
    smoke test.
    """
    shared = (
        {key: table.judge[key] for key in ("judge", "prompts", "refs", "smoke_test")}
        if table.judge
        else {}
    )
    rows = [
        {key: value for key, value in row.items() if not is_nested(value)} for row in table.rows
    ]
    fields = dict.fromkeys(key for row in rows for key in shared | row)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(fields), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {
                key: " ".join(map(str, v)) if isinstance(v, list) else v
                for key, v in (shared | row).items()
            }
        )
    return buffer.getvalue()


def is_nested(value) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(one, dict) for one in value)
    )


def text_cells(table: Table) -> list[list[str]]:
    """Numbers with the column's digits; what a paper shows."""
    return [
        [
            "" if value is None else show(value, column.digits)
            for column, value in zip(table.columns, line)
        ]
        for line in table.page()["rows"]
    ]


def markdown_escape(text: str) -> str:
    return re.sub(r"([|\\`*_<>\[\]])", r"\\\1", " ".join(text.split()))


def markdown_text(table: Table) -> str:
    def line(cells: list[str]) -> str:
        return f"| {' | '.join(map(markdown_escape, cells))} |"

    headers = [column.header.strip() for column in table.columns]
    rule = f"|{'---|' * len(headers)}"
    body = [line(headers), rule, *map(line, text_cells(table))]
    note = f"\n{table.note}\n" if table.note else ""
    return f"**{markdown_escape(table.title)}**\n{note}\n" + "\n".join(body) + "\n"


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


def latex_escape(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in " ".join(text.split()))


def latex_text(table: Table) -> str:
    r"""A table environment for \usepackage{booktabs}; numbers to the right, words to the left."""
    lines = text_cells(table)
    numeric = [
        all(re.fullmatch(r"[-+<\d.,\[\] %einf]*", line[i]) for line in lines)
        for i in range(len(table.columns))
    ]
    # {}: a row that begins with a bracket would be read as an argument of the row's end before it
    rows = [
        "{}" * line[0].startswith("[") + " & ".join(map(latex_escape, line)) + r" \\"
        for line in lines
    ]
    caption = latex_escape(table.title + (f". {table.note}" if table.note else ""))
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\label{{tab:{table.id}}}",
            rf"\begin{{tabular}}{{{''.join('r' if right else 'l' for right in numeric)}}}",
            r"\toprule",
            " & ".join(latex_escape(column.header) for column in table.columns) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )
