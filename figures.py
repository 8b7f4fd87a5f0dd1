"""The figures of analyze.py: learning curves, bar charts and beta x tau heat maps, each as PDF and PNG.

draw_run draws one run, draw_comparison all that spans runs, from the structures that analyze.py makes.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; every bar and cell carries its number.
"""

import io
import math
import os
import re
import textwrap
from pathlib import Path

from files import UserError

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
GREY, RED = "#777777", "#D55E00"
NO_MAP = "no loss has two cells of beta x tau"


def new_figure(width: float, height: float, title: str):
    """A matplotlib Figure (inches). Not through pyplot: no display, no global state; imported where it is needed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is missing; install it: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    lines = [part for line in title.split("\n") for part in textwrap.wrap(line, int(width * 11))]
    figure.suptitle("\n".join(lines), fontsize=11, fontweight="bold")
    return figure


def save_figure(figure, stem: Path) -> None:
    """Write `stem`.pdf and .png, the same bytes for the same numbers, beside and renamed as files.write_text does."""
    from matplotlib import rc_context

    stem.parent.mkdir(parents=True, exist_ok=True)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, not again for each format
    for suffix in (".pdf", ".png"):
        buffer = io.BytesIO()
        metadata = {"CreationDate": None} if suffix == ".pdf" else None
        with rc_context({"pdf.fonttype": 42}):  # TrueType: text in the PDF stays text
            figure.savefig(buffer, format=suffix[1:], dpi=150, metadata=metadata)
        temporary = stem.with_name(f".{stem.name}{suffix}.{os.getpid()}.tmp")
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, stem.with_name(stem.name + suffix))


# ---- what a judge's figures, tables and files are called ----------------------------------------


def judge_title(judge: dict) -> str:
    parts = [f"judge {judge['judge']}"]
    parts += [f"{key} {judge[key]}" for key in ("prompts", "refs") if judge[key]]
    return ", ".join(parts)


def smoke_mark(judge: dict) -> str:
    if not judge["smoke_test"]:
        return ""
    return f"SMOKE TEST: judge of {judge['judge_params_b']:.3g}B parameters, these scores measure nothing"


def judge_suffix(judge: dict, judges: list[dict]) -> str:
    """What a judge's files carry in their names: nothing where there is one judge."""
    if len(judges) == 1:
        return ""
    same = [other for other in judges if other["judge"] == judge["judge"]]
    name = judge["judge"] if len(same) == 1 else f"{judge['judge']}_{judge['prompts']}_{judge['refs']}"
    return "_" + re.sub(r"[^A-Za-z0-9.-]+", "-", name)


# ---- one run ------------------------------------------------------------------------------------


def draw_run(run: dict) -> None:
    if run["steps"] or run["evals"]:
        stem = run["path"] / "figures" / f"{run['run_id']}_learning_curve"
        best_step = (run["summary"] or {}).get("best_step")
        title = f"{run['run_id']} ({run['status']})"
        draw_learning_curve(stem, title, run["steps"], run["evals"], best_step)


def draw_learning_curve(stem: Path, title: str, steps: list[dict], evals: list[dict], best_step: int | None) -> None:
    """Loss, accuracy, margin, gradient norm and learning rate over optimiser steps; non-finite steps are marked."""
    figure = new_figure(11, 7, title)
    axes = figure.subplots(2, 2, sharex=True).flat
    draw_lines(axes[0], "loss", steps, [("loss", "training")], evals, [("eval/loss", "validation")])
    accuracies = [(f"eval/acc_{name}", f"validation acc_{name}") for name in ("ref", "sum", "mean")]
    draw_lines(axes[1], "accuracy", steps, [("rewards/accuracies", "training (acc_ref)")], evals, accuracies)
    axes[1].axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
    axes[1].set_ylim(-0.03, 1.03)
    margins = [("margin/rho", "rho"), ("margin/delta", "delta")]
    train = [(key, f"{name}, training") for key, name in margins]
    draw_lines(
        axes[2], "margin (nats)", steps, train, evals, [(f"eval/{k}", f"{name}, validation") for k, name in margins]
    )
    draw_lines(axes[3], "gradient norm", steps, [("grad_norm", "gradient norm")], [], [])
    draw_learning_rate(axes[3], steps)
    bad = [row["step"] for row in steps if any(key in row and row[key] is None for key in ("loss", "grad_norm"))]
    for axis in axes:
        mark_steps(axis, bad, best_step)
        axis.grid(alpha=0.25)
    for axis in (axes[2], axes[3]):
        axis.set_xlabel("optimiser step")
    add_legend(figure, axes, bad, best_step)
    save_figure(figure, stem)


def draw_lines(axis, label: str, steps: list[dict], train: list, evals: list[dict], validation: list) -> None:
    """Thin lines for training, markers for validation; one colour where both show the same quantity."""
    for i, (key, name) in enumerate(train):
        style = {"linewidth": 1, "alpha": 0.6, "marker": "." if len(steps) == 1 else None}
        axis.plot(*points(steps, key), color=COLOURS[i], label=name, **style)
    for i, (key, name) in enumerate(validation):
        axis.plot(*points(evals, key), color=COLOURS[i], label=name, linewidth=1.6, marker="osD"[i], markersize=4)
    axis.set_ylabel(label)
    if any(math.isfinite(y) for line in axis.get_lines() for y in line.get_ydata()):
        # Above the panel: inside it, a legend hides data whatever the curves do.
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8, frameon=False, borderaxespad=0.2)
    else:
        axis.text(0.5, 0.5, "no finite value recorded", transform=axis.transAxes, ha="center", va="center", color=GREY)


def points(rows: list[dict], key: str) -> tuple[list[float], list[float]]:
    """(steps, values), NaN where a value is null: the line breaks there instead of bridging it."""
    found = [row for row in rows if key in row]
    return [row["step"] for row in found], [math.nan if row[key] is None else row[key] for row in found]


def draw_learning_rate(axis, steps: list[dict]) -> None:
    twin = axis.twinx()
    twin.plot(*points(steps, "lr"), color=COLOURS[1], linewidth=1.2, linestyle="--")
    twin.set_ylabel("learning rate (dashed)", color=COLOURS[1])
    twin.tick_params(axis="y", colors=COLOURS[1])
    norms = [row["grad_norm"] for row in steps if row.get("grad_norm")]
    if norms and max(norms) > 50 * min(norms):
        axis.set_yscale("log")
        axis.set_ylabel("gradient norm (log scale)")


def mark_steps(axis, bad: list[int], best_step: int | None) -> None:
    for step in bad:
        axis.axvline(step, color=RED, linewidth=1, alpha=0.5)
    if best_step is not None:
        axis.axvline(best_step, color="black", linewidth=1, linestyle=":")


def add_legend(figure, axes, bad: list[int], best_step: int | None) -> None:
    from matplotlib.lines import Line2D

    marks = []
    if best_step is not None:
        marks.append(Line2D([], [], color="black", linestyle=":", label=f"best checkpoint (step {best_step:g})"))
    if bad:
        marks.append(Line2D([], [], color=RED, alpha=0.5, label=f"non-finite step ({len(bad)})"))
    if marks:
        figure.legend(handles=marks, loc="outside lower center", ncols=2, fontsize=9, frameon=False)


# ---- many runs ----------------------------------------------------------------------------------


def draw_comparison(folder: Path, comparison: dict) -> None:
    for stale in folder.glob("comparison_*.*"):
        stale.unlink()
    rows, baseline = comparison["accuracy"]["cells"], comparison["baseline"]
    label = "validation accuracy (best acc_ref)"
    if rows:
        look = {"title": "Validation accuracy", "label": label, "limits": (0, 1), "digits": 3, "se_over": "pairs"}
        line = baseline_line(comparison["accuracy"], rows, baseline, "best_acc_ref")
        draw_bars(folder / "comparison_accuracy_bars", rows, "best_acc_ref", lines=line, **look)
        stem = folder / "comparison_accuracy_heatmap"
        if not draw_heatmaps(stem, rows, "best_acc_ref", "Validation accuracy", label, 3):
            comparison["notes"].append(f"no heat map of accuracy: {NO_MAP}")
    for judge in comparison["mt_bench"]:
        suffix = judge_suffix(judge, comparison["mt_bench"])
        if judge["cells"] and not draw_judge(folder, judge, suffix, baseline):
            comparison["notes"].append(f"no heat map of MT-Bench, {judge_title(judge)}: {NO_MAP}")


def draw_judge(folder: Path, judge: dict, suffix: str, baseline: str) -> bool:
    """Bars and heat map of one judge's scores; False if there is nothing to map."""
    rows = judge["cells"]
    title = f"MT-Bench, {len(judge['questions'])} questions, {judge_title(judge)}"
    title += f"\n{smoke_mark(judge)}" if judge["smoke_test"] else ""
    label = "MT-Bench score (1-10, mean of both turns)"
    lines = [(f"untrained model ({row['label']})", row["score"]) for row in rows if row["untrained"]]
    lines += baseline_line(judge, rows, baseline, "score")
    look = {"title": title, "label": label, "limits": (0, 10), "digits": 2, "se_over": "questions"}
    draw_bars(folder / f"comparison_mt_bench_bars{suffix}", rows, "score", lines=lines, **look)
    return draw_heatmaps(folder / f"comparison_mt_bench_heatmap{suffix}", rows, "score", title, label, 2)


def baseline_line(part: dict, rows: list[dict], baseline: str, metric: str) -> list[tuple[str, float]]:
    """The baseline that improvement is measured from, or the baseline's only cell; none where that is not decided."""
    for row in part["improvement"]:
        if row["comparison"] == "best of grid":
            chosen = f", best of {row['baseline_cells']} by {row['selected_by']}" if row["baseline_cells"] > 1 else ""
            return [(f"baseline ({row['baseline']}{chosen})", row["baseline_score"])]
    cells = [row for row in rows if row["loss"] == baseline and row[metric] is not None]
    return [(f"baseline ({row['label']})", row[metric]) for row in cells] if len(cells) == 1 else []


def draw_bars(
    stem: Path, rows: list[dict], metric: str, *, title: str, label: str, limits: tuple, digits: int, se_over: str,
    lines: list[tuple[str, float]],
) -> None:  # fmt: skip
    """A bar a cell of the grid, its number beside it; the error bar is the SD over seeds, or the SE of one seed."""
    figure = new_figure(10, 2.3 + 0.3 * len(rows), title)
    axis = figure.subplots()
    losses = list(dict.fromkeys(row["loss"] for row in rows if not row["untrained"]))
    for y, row in enumerate(rows):
        colour = GREY if row["untrained"] else COLOURS[losses.index(row["loss"]) % len(COLOURS)]
        axis.barh(y, row[metric] or 0, height=0.7, color=colour, alpha=0.85)
        error, style = error_bar(row, metric, se_over)
        if error is not None:
            axis.errorbar(row[metric], y, xerr=error, color="black", capsize=3, fmt="none", **style)
        number = bar_text(row, metric, error, digits)
        axis.text(1.01, y, number, transform=axis.get_yaxis_transform(), va="center", fontsize=9)
    axis.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=9)
    axis.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    axis.set_xlim(*limits)
    axis.set_xlabel(label)
    for (name, value), style in zip(lines, ("--", ":", "-.")):
        axis.axvline(value, color="black", linewidth=1.2, linestyle=style, label=f"{name}: {value:.{digits}f}")
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)
    add_bar_legend(figure, axis)
    save_figure(figure, stem)


def error_bar(row: dict, metric: str, se_over: str) -> tuple[float | None, dict]:
    if row["n_seeds"] > 1:
        return row[f"{metric}_sd"], {"label": "error bar: SD over seeds", "elinewidth": 1.6}
    se = row[f"se_over_{se_over}"]
    return se, {"label": f"error bar, thin: SE over {se_over} (one seed)", "elinewidth": 0.7}


def bar_text(row: dict, metric: str, error: float | None, digits: int) -> str:
    if row[metric] is None:
        return f"none: {row['n_diverged']} diverged" if row["n_diverged"] else "none"
    spread = f" ± {error:.{digits}f}" if error is not None else ""
    seeds = "" if row["untrained"] else f"  n={row['n_seeds']}"
    lost = f", {row['n_diverged']} diverged" if row["n_diverged"] else ""
    return f"{row[metric]:.{digits}f}{spread}{seeds}{lost}"


def add_bar_legend(figure, axis) -> None:
    handles, labels = axis.get_legend_handles_labels()
    once = dict(zip(labels, handles))  # one entry a label, not one a bar
    if once:
        figure.legend(list(once.values()), list(once), loc="outside lower center", fontsize=9, frameon=False)


def draw_heatmaps(stem: Path, rows: list[dict], metric: str, title: str, label: str, digits: int) -> bool:
    """beta x tau, a panel for each loss (and other settings) with more than one cell; False if there is none."""
    panels: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["beta"] is not None:
            panels.setdefault((row["loss"], row["settings"]), []).append(row)
    panels = {key: cells for key, cells in panels.items() if len(cells) > 1}
    values = [row[metric] for cells in panels.values() for row in cells if row[metric] is not None]
    if not values:
        return False
    widths = [max(1.6, len(axis_values(cells, "tau"))) for cells in panels.values()]
    height = max(len(axis_values(cells, "beta")) for cells in panels.values())
    figure = new_figure(max(5.5, 1.8 + 1.25 * sum(widths)), 2.2 + max(1.9, 0.62 * height), title)
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    low, high = min(values), max(values)
    for axis, ((loss, settings), cells) in zip(axes, panels.items()):
        image = draw_heatmap(axis, cells, metric, digits, low, high if high > low else low + 1)
        axis.set_title(loss + (f"\n{settings}" if settings else ""), fontsize=10)
    figure.colorbar(image, ax=axes, label=label, shrink=0.9)
    figure.supxlabel("each cell: mean ± SD over seeds (n seeds); empty: not run", fontsize=8)
    save_figure(figure, stem)
    return True


def axis_values(cells: list[dict], name: str) -> list:
    return sorted({row[name] for row in cells}, key=lambda value: (value is not None, value or 0))


def draw_heatmap(axis, cells: list[dict], metric: str, digits: int, low: float, high: float):
    betas, taus = axis_values(cells, "beta"), axis_values(cells, "tau")
    grid = [[math.nan] * len(taus) for _ in betas]
    for row in cells:
        x, y = taus.index(row["tau"]), betas.index(row["beta"])
        grid[y][x] = math.nan if row[metric] is None else row[metric]
        light = row[metric] is not None and (row[metric] - low) / (high - low) < 0.5
        text = cell_text(row, metric, digits)
        axis.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if light else "black")
    axis.set_xticks(range(len(taus)), ["no tau" if tau is None else f"{tau:g}" for tau in taus])
    axis.set_yticks(range(len(betas)), [f"{beta:g}" for beta in betas])
    for i in range(1, len(betas)):
        axis.axhline(i - 0.5, color="white", linewidth=1.5)
    for i in range(1, len(taus)):
        axis.axvline(i - 0.5, color="white", linewidth=1.5)
    axis.set_xlabel("tau" if taus != [None] else "")
    axis.set_ylabel("beta")
    return axis.imshow(grid, cmap="cividis", vmin=low, vmax=high, aspect="auto")


def cell_text(row: dict, metric: str, digits: int) -> str:
    lost = f"{row['n_diverged']} diverged" if row["n_diverged"] else ""
    if row[metric] is None:
        return lost or "none"
    spread = f" ± {row[f'{metric}_sd']:.{digits}f}" if row[f"{metric}_sd"] is not None else ""
    return f"{row[metric]:.{digits}f}{spread}\n(n={row['n_seeds']}{lost and ', ' + lost})"
