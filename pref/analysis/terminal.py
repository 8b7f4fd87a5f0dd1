"""pref/analysis/terminal.py"""

from collections import defaultdict

from pref.analysis import paper_tables, run_metrics
from pref.files import console, mt_bench


def show_mean(row: dict, name: str, digits: int) -> str:
    """mean ±SD, and the number of seeds where it is not the row's."""
    sd_text = f" ±{row[f'{name}_sd']:.{digits}f}" if row[f"{name}_sd"] is not None else ""
    n_text = (
        f" (n={row[f'{name}_n']})"
        if row[name] is not None and row[f"{name}_n"] != row["n_seeds"]
        else ""
    )
    return paper_tables.show(row[name], digits) + sd_text + n_text


def format_table(title: str, headers: list[str], rows: list[list[str]]) -> str:
    table = console.format_table([headers, *rows], right_from=1, underline=True, indent=2)
    return f"{title}\n{table}"


def accuracy_table(rows: list[dict]) -> str:
    headers = [paper_tables.CELL_HEADER, "seeds", *paper_tables.ACCURACY_NAMES.values(), "diverged"]
    lines = [
        [
            row["label"],
            str(row["n_seeds"]),
            *(show_mean(row, name, 3) for name in paper_tables.ACCURACY_NAMES),
            diverged(row),
        ]
        for row in rows
    ]
    return format_table(
        "Validation accuracy and margin rho (nats): mean ±SD over seeds", headers, lines
    )


def diverged(row: dict) -> str:
    return str(row["n_diverged"]) if row["n_diverged"] else ""


def score_table(judge: dict) -> str:
    headers = [
        paper_tables.CELL_HEADER,
        "seeds",
        *paper_tables.SCORE_NAMES.values(),
        "scored/judged",
        "diverged",
    ]
    lines = [
        [
            row["label"],
            str(row["n_seeds"]),
            *(show_mean(row, name, 2) for name in paper_tables.SCORE_NAMES),
            f"{row['n_scored']}/{row['n_judged']}",
            diverged(row),
        ]
        for row in judge["cells"]
    ]
    return format_table(score_title(judge, "by turn, mean ±SD over seeds"), headers, lines)


def score_title(judge: dict, what: str) -> str:
    mark = f"*** {run_metrics.smoke_mark(judge)} ***\n" if judge["smoke_test"] else ""
    return f"{mark}MT-Bench score (1-10, {len(judge['questions'])} questions), {run_metrics.judge_title(judge)}: {what}"


def category_table(judge: dict) -> str:
    names = list(dict.fromkeys(row["category"] for row in judge["categories"]))
    names.sort(
        key=lambda name: (
            mt_bench.CATEGORIES.index(name)
            if name in mt_bench.CATEGORIES
            else len(mt_bench.CATEGORIES)
        )
    )
    by_label = defaultdict(dict)
    for row in judge["categories"]:
        lost = row["n_judged"] - row["n_scored"]
        by_label[row["label"]][row["category"]] = paper_tables.show(row["score"], 2) + (
            f" (-{lost})" if lost else ""
        )
    lines = [
        [label, *(scores.get(name, "-") for name in names)] for label, scores in by_label.items()
    ]
    title = score_title(judge, "by category, mean over seeds; (-n): n judgements without a score")
    return format_table(title, [paper_tables.CELL_HEADER, *names], lines)


def improvement_table(title: str, rows: list[dict], proposed: str, digits: int) -> str | None:
    """The proposed loss against the baseline: each cell at its own beta and against the best, then
    best against it.
    """
    ours = [row for row in rows if row["loss"] == proposed]
    by_kind = {
        kind: [row for row in ours if row["comparison"] == kind]
        for kind in {row["comparison"] for row in rows}
    }
    lines = []
    for row in by_kind.get("best baseline", ()):
        same_beta = [
            other
            for other in by_kind.get("matched beta", ())
            if other["proposed"] == row["proposed"]
        ]
        score = f"{paper_tables.show(row['proposed_score'], digits)} (n={row['proposed_n_seeds']})"
        matched = "; ".join(show_improvement(other, digits) for other in same_beta) or "-"
        lines.append([row["proposed"], score, matched, show_improvement(row, digits)])
    if not lines:
        return None
    headers = [
        paper_tables.CELL_HEADER,
        "proposed",
        "against the baseline at the same beta",
        "against the best baseline",
    ]
    best = by_kind["best of grid"][0]
    last = (
        f"  best of {best['proposed_cells']} proposed cells against best of {best['baseline_cells']} baseline cells "
        f"(selected by {best['selected_by']}): {best['proposed']} {show_improvement(best, digits)}"
    )
    return (
        format_table(f"{title}: (proposed - baseline) / baseline", headers, lines)
        + f"\n{last}\n{show_test(best, digits)}"
    )


def show_improvement(row: dict, digits: int) -> str:
    rate = "-" if row["improvement_rate"] is None else f"{row['improvement_rate']:+.1%}"
    differs = f", differs in {row['differs_in']}" if row["differs_in"] else ""
    baseline = f"{row['baseline']}: {paper_tables.show(row['baseline_score'], digits)}, n={row['baseline_n_seeds']}{differs}"
    return f"{row['difference']:+.{digits}f} {rate} ({baseline})"


def show_test(row: dict, digits: int) -> str:
    if row["p"] is None:
        return "  no test: fewer than two questions or pairs in common, or all differences equal"
    one = row["paired"] == "one seed"
    seeds = "one seed, so nothing is known of others" if one else f"seeds: {row['seeds_compared']}"
    low, high = (f"{row[key]:+.{digits}f}" for key in ("low", "high"))
    return (
        f"  95 % interval [{low}, {high}], p {paper_tables.p_text(row['p'])} (primary test; Holm "
        f"{paper_tables.p_text(row['p_adjusted'])}), detectable {paper_tables.show(row['detectable'], digits)}; {row['n_units']} units, {seeds}"
    )


def verdict_table(rows: list[dict]) -> str:
    lines = []
    for row in map(paper_tables.verdict_texts, rows):
        found = f"{row['estimate']} {row['interval']}" if row["estimate"] else ""
        lines += [
            f"  {row['id']}  {row['verdict'].upper()}: {row['claim']}"
            + (f" ({row['judge']})" if row["judge"] else "")
        ]
        lines += [f"      {text}" for text in (found, row["why"]) if text]
    return "\n".join(["Claims", *lines])


def print_tables(comparison: dict, proposed: str) -> None:
    accuracy = comparison["accuracy"]
    tables = [accuracy_table(accuracy["cells"])] if accuracy["cells"] else []
    tables.append(
        improvement_table("Improvement of best_acc_ref", accuracy["improvement"], proposed, 3)
    )
    for judge in comparison["mt_bench"]:
        if judge["cells"]:
            tables += [score_table(judge), category_table(judge)]
        tables.append(
            improvement_table(score_title(judge, "improvement"), judge["improvement"], proposed, 2)
        )
    tables.append(verdict_table(comparison["claims"]))
    print("".join(f"\n{table}\n" for table in tables if table), end="")
