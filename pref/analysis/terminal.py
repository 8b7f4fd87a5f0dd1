"""What analyze.py --verbose prints: scores by cell, the improvement of the proposed loss, verdicts.

All of it is in the report too, in more detail. Rows are those of aggregated_metrics.json.
"""

from collections import defaultdict

from pref.analysis import answer, judge_identity, measures, notes, table_parts, texts
from pref.analysis.measures import Measure
from pref.files import console


def print_tables(comparison: dict, proposed: str) -> None:
    """Print what there are data for, with a blank line around each table.

    comparison: aggregated_metrics.json. proposed: the loss whose improvement is shown.
    """
    accuracy = comparison["accuracy"]
    tables = [f"*** {texts.TRIAL} ***"] if comparison["trial"] else []
    tables += [accuracy_table(accuracy["cells"])] if accuracy["cells"] else []
    title = "Improvement of best_acc_ref"
    tables.append(improvement_table(title, measures.ACCURACY, accuracy, proposed))
    for measure, part in measures.parts_of(comparison):
        if part["cells"]:
            tables.append(score_table(measure, part))
        if part.get("categories"):
            tables.append(category_table(measure, part))
        title = score_title(measure, part, "improvement")
        tables.append(improvement_table(title, measure, part, proposed))
    tables.append(verdict_table(comparison["claims"]))
    lines = [comparison["answer"]["statement"], *answer.text_lines(comparison["answers"])]
    tables.append("\n".join(["Answer", *(f"  {line}" for line in lines)]))
    print("".join(f"\n{table}\n" for table in tables if table), end="")


def format_table(title: str, headers: list[str], rows: list[list[str]]) -> str:
    table = console.format_table([headers, *rows], right_from=1, underline=True, indent=2)
    return f"{title}\n{table}"


# ---- scores by cell -----------------------------------------------------------------------------


def accuracy_table(rows: list[dict]) -> str:
    names = measures.ACCURACY.columns
    headers = [table_parts.CELL_HEADER, "seeds", *names.values(), "diverged"]
    lines = [
        [
            row["label"],
            str(row["n_seeds"]),
            *(show_mean(row, name, 3) for name in names),
            show_diverged(row),
        ]
        for row in rows
    ]
    title = "Validation accuracy and margin rho (nats): mean ±SD over seeds"
    return format_table(title, headers, lines)


def score_table(measure: Measure, part: dict) -> str:
    names = measure.columns
    counts = [name for name in ("n_scored", "n_judged", "n_bench") if name in part["cells"][0]]
    fields = ("scored", "judged", "of")
    headers = [table_parts.CELL_HEADER, "seeds", *names.values()]
    headers += ["/".join(fields[: len(counts)]), "diverged"]
    if failed := any(row.get("failures") for row in part["cells"]):
        headers.append("failures")
    lines = [
        [
            row["label"],
            str(row["n_seeds"]),
            *(show_mean(row, name, measure.digits_of(name)) for name in names),
            "/".join(str(row.get(name, "-")) for name in counts),
            show_diverged(row),
            *([row.get("failures") or ""] if failed else []),
        ]
        for row in part["cells"]
    ]
    what = "by turn, mean ±SD over seeds" if measure is measures.MT else "mean ±SD over seeds"
    return format_table(score_title(measure, part, what), headers, lines)


def category_table(measure: Measure, part: dict) -> str:
    """A row per cell, a column per category."""
    names = table_parts.order_categories(part["categories"])
    text_of: dict[str, dict[str, str]] = defaultdict(dict)  # label -> category -> text
    for row in part["categories"]:
        unscored = row["n_judged"] - row["n_scored"]
        text = texts.show(row["score"], measure.digits) + (f" (-{unscored})" if unscored else "")
        text_of[row["label"]][row["category"]] = text
    lines = [[label, *(cells.get(name, "-") for name in names)] for label, cells in text_of.items()]
    what = "by category, mean over seeds; (-n): n judgements without a score"
    title = score_title(measure, part, what)
    return format_table(title, [table_parts.CELL_HEADER, *names], lines)


def score_title(measure: Measure, part: dict, what: str) -> str:
    """What is measured, by whom, and how well the judge agrees with human votes."""
    mark = judge_identity.smoke_mark(part) if measure.judged else ""
    lines = [f"*** {mark} ***"] if mark else []
    if measure is measures.MT:
        score = f"MT-Bench score (1-10, {len(part['questions'])} questions), {part['title']}"
    else:
        score = measure.heading(part)
    lines += [part["agreement_text"]] if part.get("agreement_text") else []
    lines.append(f"{score}: {what}")
    return "\n".join(lines)


def show_mean(row: dict, name: str, digits: int) -> str:
    """Mean ±SD, and the number of seeds where it is not that of the row."""
    mean, sd, n = row[name], row[f"{name}_sd"], row[f"{name}_n"]
    spread = f" ±{sd:.{digits}f}" if sd is not None else ""
    seeds = f" (n={n})" if mean is not None and n != row["n_seeds"] else ""
    return texts.show(mean, digits) + spread + seeds


def show_diverged(row: dict) -> str:
    return str(row["n_diverged"]) if row["n_diverged"] else ""


# ---- improvement --------------------------------------------------------------------------------


def improvement_table(title: str, measure: Measure, part: dict, proposed: str) -> str | None:
    """Each cell of the proposed loss against the baseline, at its own beta and at the baseline's
    best; below, best cell against best cell with the primary test. None without a comparison.

    part: of the measure, in aggregated_metrics.json.
    """
    digits, units = measure.digits, measure.units
    rows = [row for row in part["improvement"] if row["loss"] == proposed]
    of_kind = {
        kind: [row for row in rows if row["comparison"] == kind]
        for kind in ("best baseline", "matched beta", "best of grid")
    }
    lines = []
    for row in of_kind["best baseline"]:
        same_beta = [other for other in of_kind["matched beta"] if is_same_cell(row, other)]
        matched = "; ".join(show_improvement(other, digits) for other in same_beta) or "-"
        score = f"{texts.show(row['proposed_score'], digits)} (n={row['proposed_n_seeds']})"
        lines.append([row["proposed"], score, matched, show_improvement(row, digits)])
    if not lines:
        return None
    headers = [
        table_parts.CELL_HEADER,
        "proposed",
        "against the baseline at the same beta",
        "against the best baseline",
    ]
    table = format_table(f"{title}: (proposed - baseline) / baseline", headers, lines)
    best, *_ = of_kind["best of grid"]
    last = (
        f"  best of {best['proposed_cells']} proposed cells against best of "
        f"{best['baseline_cells']} baseline cells (selected by {best['selected_by']}): "
        f"{best['proposed']} {show_improvement(best, digits)}"
    )
    return f"{table}\n{last}\n{show_test(best, digits, units)}"


def is_same_cell(row: dict, other: dict) -> bool:
    return row["proposed"] == other["proposed"]


def show_improvement(row: dict, digits: int) -> str:
    """Difference, rate, and in brackets what it was compared with."""
    rate = "-" if row["improvement_rate"] is None else texts.percent(row["improvement_rate"])
    score = f"{row['baseline']}: {texts.show(row['baseline_score'], digits)}"
    differs = f", differs in {row['differs_in']}" if row["differs_in"] else ""
    baseline = f"{score}, n={row['baseline_n_seeds']}{differs}"
    # Of cells with different seeds, the difference is that of the seeds that both have.
    of_means = row["proposed_score"] - row["baseline_score"]
    if abs(row["difference"] - of_means) >= 0.5 * 10**-digits:
        baseline += f"; seeds compared: {row['seeds_compared']}"
    return f"{row['difference']:+.{digits}f} {rate} ({baseline})"


def show_test(row: dict, digits: int, units: str) -> str:
    """Interval, p-values and power of the primary test."""
    if row["p"] is None:
        return "  no test: fewer than two questions or pairs in common, or all differences equal"
    low, high = (f"{row[key]:+.{digits}f}" for key in ("low", "high"))
    seeds = f"seeds: {row['seeds_compared']}"
    if row["paired"] == "one seed":
        seeds = "one seed, so the variation over seeds is unknown"
    elif row["caveat"]:
        seeds += f"; {row['caveat']}"
    return (
        f"  95 % interval [{low}, {high}], p {texts.p_text(row['p'])} "
        f"(primary test; Holm {texts.p_text(row['p_adjusted'])}), "
        f"detectable {texts.show(row['detectable'], digits)}; "
        f"{texts.count_text(row['n_units'], units)}, {seeds}"
    )


# ---- verdicts -----------------------------------------------------------------------------------


def verdict_table(rows: list[dict]) -> str:
    shown, folded = notes.fold_claims(rows)
    lines = ["Claims"]
    for row in map(texts.verdict_texts, shown):
        judge = f" ({row['judge']})" if row["judge"] else ""
        lines.append(f"  {row['id']}  {row['verdict'].upper()}: {row['claim']}{judge}")
        numbers = " ".join(filter(None, (row["estimate"], row["interval"])))
        lines += [f"      {text}" for text in (numbers, row["why"]) if text]
    if folded:
        lines.append(f"  {notes.folded_text(folded, bool(shown))}")
    return "\n".join(lines)
