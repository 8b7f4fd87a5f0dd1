"""The tables of analyze.py: which exist, and which columns each shows of its rows.

`list_tables` makes them from the structure of aggregated_metrics.json. report.py shows them,
table_files.py writes them as files, and terminal.py prints a selection of its own. What a table is
stands in table_parts.py.
"""

from collections.abc import Iterable

from pref.analysis import distance_tables, judge_identity, measures, texts
from pref.analysis.measures import Measure
from pref.analysis.table_parts import (
    CELL_HEADER,
    Column,
    Layout,
    Table,
    by_category,
    interval_column,
    p_column,
    pivot_categories,
    rate_interval,
)

# ---- layouts: verdicts --------------------------------------------------------------------------

VERDICTS = Layout(
    "Verdicts on the claims",
    [
        Column("id", "id"),
        Column("claim", "claim"),
        Column("judge", "judge"),
        Column("verdict", "verdict"),
        Column("estimate", lambda row: texts.verdict_texts(row)["estimate"]),
        Column("95 % interval", lambda row: texts.verdict_texts(row)["interval"]),
        p_column("p", "p"),
        p_column("p (Holm)", "p_holm"),
        Column("why", "why"),
    ],
    paper=("id", "verdict", "estimate", "95 % interval", "p (Holm)"),
)

# ---- layouts: scores of cells -------------------------------------------------------------------

INTERVAL_NOTE = (
    "Interval: 95 %, over questions (or pairs) and seeds; with one seed, over questions (or pairs) "
    "only."
)


def score_columns(measure: Measure, counts: Iterable[Column] = ()) -> list:
    """A cell, its first score with interval and SD, and its other scores. counts: more columns."""
    digits = measure.digits
    first, *rest = (
        Column(header, field, measure.digits_of(field)) for field, header in measure.columns.items()
    )
    return [
        Column(CELL_HEADER, "label"),
        Column("seeds", "n_seeds", context=True),
        first,
        interval_column("95 % interval", digits),
        Column("SD over seeds", f"{first.value}_sd", digits),
        *rest,
        *counts,
        Column("diverged", "n_diverged", context=True),
    ]


def scores_of(measure: Measure) -> Layout:
    """Cells with their scores; counts of judgements are summed over the seeds."""
    counts, note = (), INTERVAL_NOTE
    if measure is measures.MT:
        counts = JUDGED
    elif measure is not measures.ACCURACY:
        counts = BENCH_JUDGED
        note += (
            f" Scored, judged: {measure.units}, summed over the seeds, of all that the benchmark "
            "has; failures: judgements without a score, by reason."
        )
    columns = score_columns(measure, counts)
    paper = (CELL_HEADER, "seeds", measure.columns[measure.value], "95 % interval", "SD over seeds")
    return Layout("mean over seeds", columns, note, paper=paper)


JUDGED = (Column("scored", "n_scored", context=True), Column("judged", "n_judged", context=True))
BENCH_JUDGED = (
    *JUDGED,
    Column("of", "n_bench", context=True),
    Column("failures", "failures", context=True),
)


# ---- layouts: comparisons of cells --------------------------------------------------------------


def difference_columns(digits: int, units: str, adjusted: str) -> list[Column]:
    """units: what the two are compared on. adjusted: the header of the adjusted p-value."""
    return [
        Column("proposed", "proposed"),  # stays in sight where the table scrolls
        Column("baseline", "baseline"),
        Column("comparison", "comparison", context=True),
        Column("difference", "estimate", digits),
        interval_column("difference, 95 % interval", digits),
        p_column("p", "p"),
        p_column(adjusted, "p_adjusted"),
        Column("detectable difference", "detectable", digits),
        Column("improvement", lambda row: texts.percent(row["improvement_rate"])),
        Column("improvement, 95 % interval", rate_interval),
        Column("seeds", "seeds_compared", context=True),
        Column(units.removeprefix("validation "), "n_units", context=True),
        Column("selected by", "selected_by", context=True),
        Column("differs in", "differs_in", context=True),
    ]


DIFFERENCE_PAPER = ("proposed", "baseline", "difference", "difference, 95 % interval")
DIFFERENCE_PAPER += ("p (Holm)", "p (BH)")  # one of the two


def headline(digits: int, units: str) -> Layout:
    note = (
        "Best cell of each loss, selected by validation accuracy where that is known: the best of "
        "a larger grid is better by chance alone (see the selection at equal budget). p: primary "
        "test, which counts the variance over questions and over seeds; it is below 0.05 exactly "
        "where the interval leaves out 0. Holm-adjusted over the losses (Benjamini-Hochberg "
        "against the untrained model). Detectable difference: the true difference that a study of "
        "this size finds with 80 % power."
    )
    if units == measures.ACCURACY.units:
        note += (
            " The best cell is selected on the same pairs it is tested on, which makes p and "
            "interval flatter the larger grid."
        )
    columns = difference_columns(digits, units, "p (Holm)")
    return Layout("headline differences", columns, note, paper=DIFFERENCE_PAPER)


def cell_by_cell(digits: int, units: str) -> Layout:
    return Layout(
        "differences cell by cell",
        difference_columns(digits, units, "p (BH)"),
        "p as in the headline table, Benjamini-Hochberg over the cells of a comparison.",
        paper=DIFFERENCE_PAPER,
    )


def with_unregularised(layout: Layout, digits: int) -> Layout:
    """A layout of differences of length-controlled win rates, with those without gamed rows."""
    note = (
        "Without gamed rows: the same difference if the effect of length is learnt from the run's "
        "own judgements. The gamed rows of AlpacaEval's definition make it larger, so that longer "
        "answers look worse: a difference between runs whose answers differ in length should be "
        "there without them too."
    )
    columns = [
        Column("without gamed rows", "without_gamed", digits),
        interval_column(
            "without gamed rows, 95 % interval",
            digits,
            "without_gamed_low",
            "without_gamed_high",
        ),
    ]
    place = [column.header for column in layout.columns].index("p")
    return layout._replace(
        columns=[*layout.columns[:place], *columns, *layout.columns[place:]],
        note=f"{layout.note} {note}",
    )


SENSITIVITY = Layout(
    "other tests of the headline differences",
    [
        Column("proposed", "proposed"),
        Column("baseline", "baseline"),
        Column("test", "test"),
        p_column("p", "p"),
        Column("ignores", "ignores"),
    ],
    "The primary test and the usual ones, each with what it ignores. Their p-values are not "
    "adjusted and are not meant as headline results.",
)
MCNEMAR = Layout(
    "Validation accuracy: exact McNemar test by seed",
    [
        Column("proposed", "proposed"),
        Column("baseline", "baseline"),
        Column("seed", "seed"),
        Column("pairs", "n_pairs"),
        Column("only proposed right", "only_a"),
        Column("only baseline right", "only_b"),
        Column("ties", "ties"),
        p_column("p", "p"),
    ],
    "Pairs that only one of the two gets right. Rows of several seeds share their pairs, so they "
    "are not independent.",
    paper=("proposed", "seed", "only proposed right", "only baseline right", "p"),
)


def selection(digits: int) -> Layout:
    return Layout(
        "best of each grid, at equal budget",
        [
            Column("loss", "loss"),
            Column("cells", "cells"),
            Column("selected", "selected"),
            Column("selected by", "selected_by", context=True),
            Column("score", "value", digits),
            Column("equal budget (cells)", "budget", context=True),
            Column("expected score", "expected_selected", digits),
            Column("expected score of the baseline", "baseline_expected_selected", digits),
            Column("expected difference", "expected_difference", digits),
            Column("expected maximum", "expected_maximum", digits),
            Column("maximum", "maximum", digits),
        ],
        "Equal budget: the number of cells in the smaller grid, the loss's or the baseline's. "
        "Expected: the mean over all ways to draw that many cells, of the score of the cell that "
        "is then selected, or of the maximum. Chance favours neither grid then.",
        paper=("loss", "cells", "selected", "score", "expected score"),
    )


SPREAD = Layout(
    "variance over beta",
    [
        Column("loss", "loss"),
        Column("τ", "tau"),
        Column("settings", "settings", context=True),
        Column("betas", lambda row: " ".join(f"{beta:g}" for beta in row["betas"]), context=True),
        Column("variance of observed means", "variance_of_means", 4),
        Column("noise variance", "of_it_noise", 4),
        Column("variance of true means", "variance", 4),
        Column("ratio", "ratio", 2),
        interval_column("ratio, 95 % interval", 2),
        Column("reduction %", "reduction_percent", 0),
        p_column("Brown-Forsythe p", "brown_forsythe_p"),
        Column("differs in", "differs_in", context=True),
    ],
    "Variance of the true means over beta: that of the observed means less the noise from seeds "
    "and questions. Ratio and reduction are relative to the baseline; they are missing where its "
    "variance is not positive. An interval up to inf: its variance cannot be told from 0.",
    paper=("loss", "τ", "variance of true means", "ratio", "ratio, 95 % interval"),
)

# ---- layouts: the judge, and everything besides the scores --------------------------------------

VARIANCE = Layout(
    "where the variance comes from",
    [
        Column("loss", "loss"),
        Column("source", "source"),
        Column("variance", "variance", 3),
        Column("share", "share", 3),
    ],
    "Of a question's score, by the method of moments; seeds within cells.",
)
JUDGE = Layout(
    "the judge itself",
    [
        Column("answers judged again", "n_items"),
        Column("ICC(1,1)", "icc", 3),
        Column("SD of one rating", "sd", 2),
        Column("share rated identically", "identical", 3),
        Column("answers with length", "length_n"),
        Column("Spearman correlation with length", "length_spearman", 3),
    ],
    "Retest: answers judged several times. Length: Spearman correlation of score and answer length "
    "within a question's turn.",
    paper=("answers judged again", "ICC(1,1)", "SD of one rating")
    + ("share rated identically", "Spearman correlation with length"),
)
TAX = Layout(
    "Alignment tax: imported tasks against the untrained model",
    [
        Column("task", "task"),
        Column(CELL_HEADER, "proposed"),
        Column("score %", "proposed_score", 2),
        Column("untrained %", "baseline_score", 2),
        Column("difference", "estimate", 2),
        interval_column("difference, 95 % interval", 2),
        p_column("p (BH)", "p_adjusted"),
        Column("detectable difference", "detectable", 2),
        Column("seeds", "seeds_compared", context=True),
        Column("questions", "n_units", context=True),
        Column("selected by", "selected_by", context=True),
    ],
    "Best cell of each loss, selected by validation accuracy where that is known. Paired by "
    "question; p: primary test, over questions and seeds, Benjamini-Hochberg over the losses.",
    paper=("task", CELL_HEADER, "difference", "difference, 95 % interval", "p (BH)"),
)
STABILITY = Layout(
    "Divergence and non-finite steps by loss and beta",
    [
        Column("loss", "loss"),
        Column("β", "beta"),
        Column("runs", "diverged_of"),
        Column("diverged", "diverged"),
        interval_column("diverged, rate", 2, "diverged_low", "diverged_high"),
        Column("runs with a non-finite step", "nonfinite_runs"),
        interval_column(
            "runs with a non-finite step, rate", 2, "nonfinite_runs_low", "nonfinite_runs_high"
        ),
        Column("non-finite steps", "nonfinite_steps"),
        Column("steps", "nonfinite_steps_of"),
        interval_column("non-finite steps, rate", 4, "nonfinite_steps_low", "nonfinite_steps_high"),
    ],
    "Rates: exact 95 % intervals (Clopper-Pearson). The steps of one run are not independent: rely "
    "on the rates of runs.",
    paper=("loss", "β", "runs", "diverged", "diverged, rate"),
)
PAIRS = Layout(
    "Win rates of pairwise judgements",
    [
        Column("judge", lambda row: row["title"].removeprefix("judge ")),
        Column(CELL_HEADER, "label"),
        Column("against", "baseline"),
        Column("win rate", "win_rate", 3),
        Column("smoke test", lambda row: "yes" if row["smoke_test"] else None, context=True),
        Column(
            "judge agrees with human votes as humans do",
            lambda row: row.get("as_humans"),
            context=True,
        ),
        interval_column("95 % interval", 3),
        Column("wins", "wins"),
        Column("ties", "ties"),
        Column("losses", "losses"),
        Column("questions", "n_questions", context=True),
        Column("seeds", "n_seeds", context=True),
    ],
    "Each question is judged in both orders; a disagreement is a tie, which counts one half.",
    paper=(CELL_HEADER, "against", "win rate", "95 % interval", "seeds"),
)


def movement(rows: list[dict]) -> Layout:
    """rows: their scores by judge become columns."""
    scores = [key for key in (rows[0] if rows else {}) if key.startswith("score, ")]
    return Layout(
        "Distance of runs from the reference, and what they gained",
        [
            Column("run", "run_id"),
            Column("KL", "kl", 3),
            Column("KL per token", "kl_per_token", 4),
            Column("anchor", "anchor", 3),
            Column("tokens per answer", "tokens", 0),
            Column("cut off", "cut_off", 3),
            Column("best acc_ref", "accuracy", 3),
            *(Column(name, name, 2) for name in scores),
        ],
        "KL: of the run's own answers to the base, in nats per answer (k1 estimator). Anchor: "
        "0.5 (a^2 + b^2), mean over the last tenth of the training steps. Tokens per answer: mean "
        "over turns. Cut off: share of turns that reached the limit of tokens.",
        paper=("run", "KL", "anchor", "best acc_ref", *scores[:1]),
    )


def frontier(measure: Measure) -> Layout:
    return Layout(
        "score against distance from the base model",
        [
            Column(CELL_HEADER, "label"),
            Column("KL", "kl", 3),
            Column("SD of KL over seeds", "kl_sd", 3),
            Column(measure.columns[measure.value], "score", measure.digits),
            Column("SD over seeds", "score_sd", measure.digits),
            Column("seeds", "n_seeds", context=True),
            Column("KL of answers to", "kl_answers", context=True),
        ],
        "KL: of a run's own answers to the base model, in nats an answer (k1 estimator), mean over "
        "seeds; 0 of the untrained model.",
        paper=(CELL_HEADER, "KL", measure.columns[measure.value], "seeds"),
    )


# ---- the list -----------------------------------------------------------------------------------


def score_table(
    measure: Measure, part: dict, kind: str, layout: Layout, rows: list[dict], comparison: dict
) -> Table:
    """A table of one part of a measure: its name, its title, and what limits its scores."""
    mark = texts.TRIAL if comparison["trial"] else ""
    suffix, judge = "", None
    if measure is not measures.ACCURACY:
        suffix = judge_identity.file_suffix(part, comparison[measure.key])
        if measure.judged:
            judge = part
            mark = mark or judge_identity.smoke_mark(part)
    sentence = part.get("agreement_text")
    notes = (mark and f"{mark}.", layout.note, sentence and f"The {sentence}.")
    return Table(
        id=f"{measure.key}_{kind}{suffix}",
        title=f"{measure.heading(part)}: {layout.title}",
        group=measure.heading(part),
        note=" ".join(filter(None, notes)) or None,
        columns=layout.columns,
        rows=rows,
        judge=judge,
        paper=layout.paper,
    )


def plain_table(id: str, layout: Layout, rows: list[dict], group: str = "") -> Table:
    note = layout.note or None
    return Table(id, layout.title, note, layout.columns, rows, paper=layout.paper, group=group)


def list_tables(comparison: dict) -> list[Table]:
    """Every table that has rows, verdicts first. comparison: aggregated_metrics.json."""
    accuracy = comparison["accuracy"]
    cells = scores_of(measures.ACCURACY)
    group = measures.ACCURACY.heading(accuracy)
    title = f"{group}: mean over seeds"
    tables = [
        plain_table("verdicts", VERDICTS, comparison["claims"]),
        plain_table("accuracy", cells._replace(title=title), accuracy["cells"], group),
        *comparison_tables(measures.ACCURACY, accuracy, comparison),
        plain_table("accuracy_mcnemar", MCNEMAR, mcnemar_rows(accuracy["improvement"]), group),
    ]
    for measure, part in measures.parts_of(comparison):
        tables += measure_tables(measure, part, comparison)
    tables += [
        plain_table("alignment_tax", TAX, tax_rows(comparison.get("tasks", []))),
        plain_table("stability", STABILITY, comparison["stability"]),
        plain_table("pairs", PAIRS, comparison["pairs"]),
        plain_table("movement", movement(comparison["movement"]), comparison["movement"]),
    ]
    return [table for table in tables if table.rows]


def measure_tables(measure: Measure, part: dict, comparison: dict) -> list[Table]:
    """The tables of what a judge or a task has measured."""

    def table(kind: str, layout: Layout, rows: list[dict]) -> Table:
        return score_table(measure, part, kind, layout, rows, comparison)

    lengths = {f"length_{key}": value for key, value in (part.get("length") or {}).items()}
    reliability = {**(part.get("retest") or {}), **lengths}
    kind = "by_turn" if measure is measures.MT else "cells"
    categories = part.get("categories") or []
    return [
        table(kind, scores_of(measure), part["cells"]),
        table(
            "by_category", by_category(measure, categories), pivot_categories(categories)
        )._replace(data=categories),
        *comparison_tables(measure, part, comparison),
        table("frontier", frontier(measure), part["frontier"]),
        table("equal_kl", distance_tables.equal_kl(measure), part.get("equal_kl", [])),
        table("rounds", distance_tables.rounds(measure), part.get("rounds", [])),
        table(
            "gold_selection",
            distance_tables.gold_selection(measure),
            part.get("gold_selection", []),
        ),
        table("variance", VARIANCE, part["variance"]),
        table("judge", JUDGE, [reliability] if reliability else []),
    ]


def comparison_tables(measure: Measure, part: dict, comparison: dict) -> list[Table]:
    """The tables that all measures have."""
    kinds = ("best of grid", "untrained model")
    best = [row for row in part["improvement"] if row["comparison"] in kinds]
    cells = [row for row in part["improvement"] if row["comparison"] not in kinds]
    tests = [test for row in best for test in row["sensitivity"]]
    digits, units = measure.digits, measure.units
    layouts = [headline(digits, units), cell_by_cell(digits, units)]
    if any("without_gamed" in row for row in part["improvement"]):
        layouts = [with_unregularised(layout, digits) for layout in layouts]

    def table(kind: str, layout: Layout, rows: list[dict]) -> Table:
        return score_table(measure, part, kind, layout, rows, comparison)

    return [
        table("headline", layouts[0], best),
        table("improvement", layouts[1], cells),
        table("sensitivity", SENSITIVITY, tests),
        table("selection", selection(digits), part["selection"]),
        table("over_beta", SPREAD, part["spread"]),
    ]


def tax_rows(tasks: list[dict]) -> list[dict]:
    return [
        {"task": part["task"], **row}
        for part in tasks
        for row in part["improvement"]
        if row["comparison"] == "untrained model"
    ]


def mcnemar_rows(improvement: list[dict]) -> list[dict]:
    """One row per pair of cells and seed."""
    return [
        {"proposed": row["proposed"], "baseline": row["baseline"], **test}
        for row in improvement
        for test in row.get("mcnemar", ())
    ]
