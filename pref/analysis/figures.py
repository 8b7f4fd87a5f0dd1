"""The figures of analyze.py, each as PDF and PNG.

draw_run draws one run, comparison_jobs lists what spans runs, from the structures that analyze.py
makes; draw_all draws both.

Colours are Okabe and Ito's, which colour-blind readers can tell apart, and each loss has a marker
of its own besides; every bar and cell carries its number, every error bar its name.
"""

import math
import multiprocessing
import os
import sys
import textwrap
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from tqdm import tqdm

from pref.analysis import run_figures, run_metrics
from pref.files import drawing, mt_bench

WORTH_PROCESSES = 40  # figures: a process takes seconds to import what it draws with
INTERVAL = "95 % bootstrap interval over questions and seeds"
NO_MAP = "no loss has two cells of beta x tau"


def draw_all(runs: list[dict], comparison: dict, folder: Path) -> None:
    """Every figure of the runs and of their comparison; of many, with a process a core."""
    for stale in folder.glob("comparison_*.*"):
        stale.unlink()
    jobs = [(run_figures.draw_run, {key: run[key] for key in run_figures.RUN_KEYS}) for run in runs]
    jobs += comparison_jobs(
        folder, comparison, [{key: run[key] for key in run_figures.RUN_KEYS} for run in runs]
    )
    bar = partial(tqdm, desc="figures", unit="figure", disable=not sys.stderr.isatty())
    if len(jobs) < WORTH_PROCESSES:
        for function, *arguments in bar(jobs):
            function(*arguments)
        return
    # spawned, not forked: a fork of a process with threads (those of a linear-algebra library, say)
    # can hang
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for future in bar([pool.submit(*job) for job in jobs]):
            future.result()


def comparison_jobs(folder: Path, comparison: dict, runs: list[dict]) -> list[tuple]:
    """(function, *arguments) for each figure that there are data for; what is missing is said in
    the notes.
    """
    jobs: list[tuple] = []
    if any(run["evals"] or run["steps"] for run in runs if run["args"]["loss"]):
        jobs.append((draw_curves_by_loss, folder / "comparison_learning_curves", runs))
    accuracy = comparison["accuracy"]
    if accuracy["cells"]:
        look = Look(
            "Validation accuracy",
            "validation accuracy (best acc_ref)",
            (0, 1),
            3,
            "pairs",
            "best_acc_ref",
        )
        jobs += score_jobs(folder, "accuracy", "", accuracy, look, comparison)
    for judge in comparison["mt_bench"]:
        if judge["cells"]:
            suffix = run_metrics.judge_suffix(judge, comparison["mt_bench"])
            title = (
                f"MT-Bench, {len(judge['questions'])} questions, {run_metrics.judge_title(judge)}"
            )
            title += f"\n{run_metrics.smoke_mark(judge)}" if judge["smoke_test"] else ""
            look = Look(
                title, "MT-Bench score (1-10, mean of both turns)", (0, 10), 2, "questions", "score"
            )
            jobs += score_jobs(folder, "mt_bench", suffix, judge, look, comparison)
            if judge["categories"]:
                jobs.append(
                    (draw_radar, folder / f"comparison_mt_bench_categories{suffix}", judge, title)
                )
    if panels := movement_panels(comparison["movement"]):
        jobs.append((draw_movement, folder / "comparison_movement", comparison["movement"], panels))
    if comparison["pairs"]:
        jobs.append((draw_win_matrix, folder / "comparison_win_matrix", comparison["pairs"]))
    return jobs


class Look(NamedTuple):
    title: str
    label: str
    limits: tuple[float, float]
    digits: int
    se_over: str
    metric: str


def score_jobs(
    folder: Path, name: str, suffix: str, part: dict, look: Look, comparison: dict
) -> list[tuple]:
    """Figures that accuracy and MT-Bench both have."""
    rows = part["cells"]
    untrained = [row for row in rows if row["untrained"] and row[look.metric] is not None]
    lines = [(f"untrained model ({row['label']})", row[look.metric]) for row in untrained]
    lines += baseline_line(part, rows, comparison["baseline"], look.metric)

    def stem(kind: str) -> Path:
        return folder / f"comparison_{name}_{kind}{suffix}"

    jobs: list[tuple] = [(draw_bars, stem("bars"), rows, look, lines)]
    if part["runs"]:
        jobs.append((draw_boxes, stem("boxes"), part["runs"], look))
    if heatmap_panels(rows, look.metric):
        jobs.append((draw_heatmaps, stem("heatmap"), rows, look))
    else:
        what = "accuracy" if name == "accuracy" else f"MT-Bench, {run_metrics.judge_title(part)}"
        comparison["notes"].append(f"no heat map of {what}: {NO_MAP}")
    if beta_lines(rows, look.metric):
        jobs.append((draw_beta_curves, stem("over_beta"), rows, look))
    shown = [
        row
        for row in part["improvement"]
        if row["comparison"] != "best baseline" and row["estimate"] is not None
    ]
    if shown:
        jobs.append((draw_forest, stem("differences"), shown, look))
    return jobs


def baseline_line(
    part: dict, rows: list[dict], baseline: str, metric: str
) -> list[tuple[str, float]]:
    """The baseline that improvement is measured from, or the baseline's only cell; none where that
    is not decided.
    """
    for row in part["improvement"]:
        if row["comparison"] == "best of grid":
            chosen = (
                f", best of {row['baseline_cells']} by {row['selected_by']}"
                if row["baseline_cells"] > 1
                else ""
            )
            return [(f"baseline ({row['baseline']}{chosen})", row["baseline_score"])]
    cells = [row for row in rows if row["loss"] == baseline and row[metric] is not None]
    return [(f"baseline ({row['label']})", row[metric]) for row in cells] if len(cells) == 1 else []


def draw_bars(stem: Path, rows: list[dict], look: Look, lines: list[tuple[str, float]]) -> None:
    """A bar a cell of the grid, its number beside it; the error bar is the SD over seeds, or the SE
    of one seed.
    """
    title, label, limits, digits, se_over, metric = look
    figure = drawing.new_figure(10, 2.3 + 0.3 * len(rows), title)
    axis = figure.subplots()
    losses = list(dict.fromkeys(row["loss"] for row in rows if not row["untrained"]))
    for y, row in enumerate(rows):
        colour = (
            drawing.GREY
            if row["untrained"]
            else drawing.COLOURS[losses.index(row["loss"]) % len(drawing.COLOURS)]
        )
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
        axis.axvline(
            value,
            color="black",
            linewidth=1.2,
            linestyle=style,
            label=f"{name}: {value:.{digits}f}",
        )
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)
    figure_legend(figure, [axis], ncols=1, fontsize=9)
    drawing.save_figure(figure, stem)


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


def heatmap_panels(rows: list[dict], metric: str) -> dict[tuple, list[dict]]:
    """(loss, settings) -> its cells, where there is more than one and any has a value."""
    panels: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["beta"] is not None:
            panels.setdefault((row["loss"], row["settings"]), []).append(row)
    panels = {key: cells for key, cells in panels.items() if len(cells) > 1}
    return (
        panels if any(row[metric] is not None for cells in panels.values() for row in cells) else {}
    )


def draw_heatmaps(stem: Path, rows: list[dict], look: Look) -> None:
    """beta x tau, a panel for each loss (and other settings) with more than one cell."""
    title, label, digits, metric = look.title, look.label, look.digits, look.metric
    panels = heatmap_panels(rows, metric)
    values = [row[metric] for cells in panels.values() for row in cells if row[metric] is not None]
    widths = [max(1.6, len(axis_values(cells, "tau"))) for cells in panels.values()]
    height = max(len(axis_values(cells, "beta")) for cells in panels.values())
    figure = drawing.new_figure(
        max(5.5, 1.8 + 1.25 * sum(widths)), 2.2 + max(1.9, 0.62 * height), title
    )
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    low, high = min(values), max(values)
    for axis, ((loss, settings), cells) in zip(axes, panels.items()):
        image = draw_heatmap(axis, cells, metric, digits, low, high if high > low else low + 1)
        axis.set_title(loss + (f"\n{settings}" if settings else ""), fontsize=10)
    figure.colorbar(image, ax=axes, label=label, shrink=0.9)
    figure.supxlabel("each cell: mean ± SD over seeds (n seeds); empty: not run", fontsize=8)
    drawing.save_figure(figure, stem)


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
        axis.text(
            x, y, text, ha="center", va="center", fontsize=8, color="white" if light else "black"
        )
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


def loss_style(names: Sequence, name) -> dict:
    """A colour and a marker for one of several losses, taus, ...: told apart without colour too."""
    i = names.index(name)
    return {
        "color": drawing.COLOURS[i % len(drawing.COLOURS)],
        "marker": drawing.MARKERS[i % len(drawing.MARKERS)],
    }


def figure_legend(figure, axes, ncols: int = 3, fontsize: int = 8) -> None:
    """One legend below the panels, an entry a label."""
    found = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= dict(zip(labels, handles))
    if found:
        figure.legend(
            list(found.values()),
            list(found),
            loc="outside lower center",
            ncols=ncols,
            fontsize=fontsize,
            frameon=False,
        )


def draw_curves_by_loss(stem: Path, runs: list[dict]) -> None:
    """Learning curves, a column a loss: a line a run, its colour beta, its dashes tau."""
    from matplotlib import colormaps

    runs = [run for run in runs if run["args"]["loss"] and (run["steps"] or run["evals"])]
    losses = list(dict.fromkeys(run["loss"] for run in runs))
    betas = sorted({run["args"]["beta"] for run in runs if run["args"]["beta"] is not None})
    taus = sorted({run["args"]["tau"] for run in runs if run["args"]["tau"] is not None})
    panels = [
        ("evals", "eval/acc_ref", "validation acc_ref"),
        ("steps", "margin/rho", "training margin rho (nats)"),
        ("steps", "loss", "training loss"),
        ("steps", "grad_norm", "gradient norm"),
    ]
    title = (
        "Learning curves by loss (a line a run; loss and gradient are not comparable across losses)"
    )
    figure = drawing.new_figure(1.5 + 2.9 * len(losses), 10, title)
    axes = figure.subplots(len(panels), len(losses), squeeze=False, sharex=True)
    for row in axes[:2]:  # accuracy and margin are comparable across losses
        for axis in row[1:]:
            axis.sharey(row[0])
    palette = colormaps["viridis"]
    for run in runs:
        beta, tau = run["args"]["beta"], run["args"]["tau"]
        colour = (
            palette(0.05 + 0.85 * betas.index(beta) / max(1, len(betas) - 1))
            if beta is not None
            else drawing.GREY
        )
        label = (f"β={beta:g}" if beta is not None else "no β") + (
            f" τ={tau:g}" if tau is not None else ""
        )
        dashes = ("-", "--", ":", "-.")[taus.index(tau) % 4] if tau is not None else "-"
        for axis, (part, key, _) in zip(axes[:, losses.index(run["loss"])], panels):
            marker = "." if part == "evals" else None
            axis.plot(
                *run_figures.points(run[part], key),
                color=colour,
                linestyle=dashes,
                linewidth=1,
                marker=marker,
                label=label,
            )
    for column, loss in enumerate(losses):
        axes[0, column].set_title(loss, fontsize=10)
        axes[-1, column].set_xlabel("optimiser step")
    for row, (_, _, label) in enumerate(panels):
        axes[row, 0].set_ylabel(label)
    for axis in axes[3]:
        if any(value > 0 for line in axis.get_lines() for value in line.get_ydata()):
            axis.set_yscale("log")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    figure.align_ylabels(axes[:, 0])
    figure_legend(figure, axes.flat, ncols=2 + 2 * len(losses))
    drawing.save_figure(figure, stem)


def beta_lines(rows: list[dict], metric: str) -> dict[tuple, list[dict]]:
    """(loss, tau, settings) -> its cells in order of beta, where two or more have values."""
    lines: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["beta"] is not None and row[metric] is not None:
            lines.setdefault((row["loss"], row["tau"], row["settings"]), []).append(row)
    return {
        key: sorted(cells, key=lambda row: row["beta"])
        for key, cells in lines.items()
        if len(cells) > 1
    }


def draw_beta_curves(stem: Path, rows: list[dict], look: Look) -> None:
    """Score against beta, a panel a loss, a line for each tau with its interval as a band."""
    lines = beta_lines(rows, look.metric)
    losses = list(dict.fromkeys(loss for loss, *_ in lines))
    figure = drawing.new_figure(
        1.5 + 3.2 * len(losses), 4.6, f"{look.title}\nover beta; band: {INTERVAL}"
    )
    panels = dict(zip(losses, figure.subplots(1, len(losses), sharey=True, squeeze=False)[0]))
    for (loss, tau, settings), cells in lines.items():
        axis = panels[loss]
        style = loss_style(range(len(axis.get_lines()) + 1), len(axis.get_lines()))
        label = " ".join(filter(None, ("no τ" if tau is None else f"τ={tau:g}", settings)))
        axis.plot(
            [row["beta"] for row in cells],
            [row[look.metric] for row in cells],
            label=label,
            **style,
        )
        known = [row for row in cells if row["low"] is not None]
        ends = [[row[key] for row in known] for key in ("beta", "low", "high")]
        axis.fill_between(*ends, color=style["color"], alpha=0.15, linewidth=0)
    betas = sorted({row["beta"] for cells in lines.values() for row in cells})
    for loss, axis in panels.items():
        for row in rows:
            if row["untrained"] and row[look.metric] is not None:
                axis.axhline(
                    row[look.metric], color=drawing.GREY, linestyle=":", label="untrained model"
                )
        axis.set_title(loss, fontsize=10)
        axis.set_xscale("log")
        axis.set_xticks(betas, [f"{beta:g}" for beta in betas])
        axis.minorticks_off()
        axis.set_xlabel("beta (log scale)")
        axis.grid(alpha=0.25)
    panels[losses[0]].set_ylabel(look.label)
    figure_legend(figure, panels.values(), ncols=5)
    drawing.save_figure(figure, stem)


def draw_boxes(stem: Path, runs: list[dict], look: Look) -> None:
    """Every run's value by loss: box (quartiles, median written beside it) and the runs as
    points.
    """
    losses = list(dict.fromkeys(run["loss"] for run in runs))
    groups = [[run["value"] for run in runs if run["loss"] == loss] for loss in losses]
    figure = drawing.new_figure(
        2.5 + 1.5 * len(losses),
        4.8,
        f"{look.title}\nevery run; box: quartiles over its cells and seeds",
    )
    axis = figure.subplots()
    axis.boxplot(
        groups, widths=0.5, showfliers=False, medianprops={"color": "black"}, whis=(0, 100)
    )
    for i, (loss, values) in enumerate(zip(losses, groups), 1):
        offsets = [
            i - 0.12 + 0.24 * (k % 7) / 6 for k in range(len(values))
        ]  # spread, but the same every time
        axis.plot(
            offsets, values, linestyle="", alpha=0.7, markersize=5, **loss_style(losses, loss)
        )
        middle = median(values)
        axis.annotate(f"{middle:.{look.digits}f}", (i + 0.28, middle), fontsize=8, va="center")
    axis.set_xticks(
        range(1, len(losses) + 1),
        [f"{loss}\n({len(g)} runs)" for loss, g in zip(losses, groups)],
        fontsize=9,
    )
    axis.set_xlim(0.4, len(losses) + 0.75)
    axis.set_ylabel(look.label)
    axis.grid(axis="y", alpha=0.25)
    drawing.save_figure(figure, stem)


def draw_forest(stem: Path, rows: list[dict], look: Look) -> None:
    """Differences with their intervals, the number and the adjusted p-value beside each."""
    kinds = list(dict.fromkeys(row["comparison"] for row in rows))
    figure = drawing.new_figure(
        12, 1.9 + 0.3 * len(rows), f"{look.title}\ndifferences; error bar: {INTERVAL}"
    )
    axis = figure.subplots()
    names = {
        "best of grid": "best of grid (headline, Holm)",
        "matched beta": "same beta (BH)",
        "untrained model": "best against the untrained model (BH)",
    }
    for y, row in enumerate(rows):
        style = loss_style(kinds, row["comparison"])
        errors = [[max(0, row["estimate"] - row["low"])], [max(0, row["high"] - row["estimate"])]]
        axis.errorbar(
            row["estimate"],
            y,
            xerr=errors,
            capsize=3,
            fmt=style["marker"],
            color=style["color"],
            label=names[row["comparison"]],
        )
        p = "no test" if row["p_adjusted"] is None else f"p {row['p_adjusted']:.2g}"
        one = ", one seed" if row["paired"] == "one seed" else ""
        estimate, low, high = (
            f"{row[key]:+.{look.digits}f}" for key in ("estimate", "low", "high")
        )
        text = f"{estimate} [{low}, {high}]  {p}{one}"
        axis.text(1.01, y, text, transform=axis.get_yaxis_transform(), va="center", fontsize=8)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(
        range(len(rows)), [f"{row['proposed']}  -  {row['baseline']}" for row in rows], fontsize=8
    )
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel(f"difference of {look.label}")
    axis.grid(axis="x", alpha=0.25)
    figure_legend(figure, [axis])
    drawing.save_figure(figure, stem)


def draw_radar(stem: Path, judge: dict, title: str) -> None:
    """MT-Bench by category: the selected cell of each loss and the untrained model, as a radar and
    as a table.
    """
    chosen = [row["label"] for row in judge["cells"] if row["untrained"]]
    chosen += [row["selected"] for row in judge["selection"]]
    chosen = chosen or [row["label"] for row in judge["cells"]][:6]
    scores = {
        label: {row["category"]: row for row in judge["categories"] if row["label"] == label}
        for label in chosen
    }
    names = [
        name for name in mt_bench.CATEGORIES if any(name in found for found in scores.values())
    ]
    names += sorted({name for found in scores.values() for name in found} - set(names))
    figure = drawing.new_figure(
        13, 5.2, f"{title}\nby category: the cell of each loss that validation selects"
    )
    left, right = figure.add_gridspec(1, 2, width_ratios=[1, 1.5])
    axis = figure.add_subplot(left, projection="polar")
    angles = [2 * math.pi * i / len(names) for i in range(len(names))]
    for label, found in scores.items():
        values = [
            found[name]["score"] if name in found and found[name]["score"] is not None else math.nan
            for name in names
        ]
        axis.plot(
            [*angles, angles[0]],
            [*values, values[0]],
            linewidth=1.3,
            markersize=4,
            label=label,
            **loss_style(list(scores), label),
        )
    axis.set_xticks(angles, names, fontsize=8)
    axis.tick_params(axis="x", pad=9)
    axis.set_ylim(0, 10)
    axis.tick_params(axis="y", labelsize=7)
    draw_category_table(figure.add_subplot(right), scores, names)
    figure_legend(figure, [axis], ncols=3)
    drawing.save_figure(figure, stem)


def draw_category_table(axis, scores: dict, names: list[str]) -> None:
    axis.axis("off")

    def text(row: dict | None) -> str:
        if row is None or row["score"] is None:
            return "-"
        lost = row["n_judged"] - row["n_scored"]
        return f"{row['score']:.2f}" + (f"\n(-{lost})" if lost else "")

    cells = [[text(found.get(name)) for name in names] for found in scores.values()]
    labels = [textwrap.fill(label, 26) for label in scores]
    table = axis.table(cells, rowLabels=labels, colLabels=names, loc="center", cellLoc="center")
    table.auto_set_font_size(False)
    table.set_fontsize(7.5)
    table.scale(1, 1.9)
    axis.set_title("mean over seeds; (-n): n judgements without a score", fontsize=8)


def movement_panels(rows: list[dict]) -> list[tuple[str, str]]:
    """(x, y) fields that at least two runs have both of."""
    ys = ["accuracy", *(key for key in (rows[0] if rows else {}) if key.startswith("score, "))]
    pairs = [(x, y) for x in ("kl", "anchor") for y in ys]
    return [
        (x, y)
        for x, y in pairs
        if sum(row[x] is not None and row[y] is not None for row in rows) > 1
    ]


def draw_movement(stem: Path, rows: list[dict], panels: list[tuple[str, str]]) -> None:
    """What a run got (accuracy, score) for how far it went from the reference (KL of its answers,
    anchor).
    """
    names = {
        "kl": "KL of own answers to the base (nats an answer)",
        "anchor": "anchor 0.5 (a² + b²) at the end of training",
        "accuracy": "validation accuracy (best acc_ref)",
    }
    losses = list(dict.fromkeys(row["loss"] for row in rows))
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = drawing.new_figure(
        1 + 4.2 * columns, 1.2 + 3.7 * lines, "What runs got for how far they went (a point a run)"
    )
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis, (x, y) in zip(axes.flat, panels):
        for loss in losses:
            found = [
                row
                for row in rows
                if row["loss"] == loss and row[x] is not None and row[y] is not None
            ]
            axis.plot(
                [row[x] for row in found],
                [row[y] for row in found],
                linestyle="",
                alpha=0.8,
                label=loss,
                **loss_style(losses, loss),
            )
        axis.set_xscale("symlog", linthresh=0.1)
        axis.set_xlabel(names[x], fontsize=8)
        axis.set_ylabel(textwrap.fill(names.get(y, y), 40), fontsize=8)
        axis.grid(alpha=0.25)
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    figure_legend(figure, axes.flat, ncols=len(losses))
    drawing.save_figure(figure, stem)


def draw_win_matrix(stem: Path, rows: list[dict]) -> None:
    """Win rate of each cell (row) against each baseline run (column) of each judge, with its
    interval.
    """
    labels = list(dict.fromkeys(row["label"] for row in rows))
    columns = list(dict.fromkeys((row["judge"], row["baseline"]) for row in rows))
    title = "Win rate in pairwise judgements (a tie is one half; both orders must agree)"
    if any(row["smoke_test"] for row in rows):
        title += "\nSMOKE TEST: a judge below 7B parameters, these rates measure nothing"
    figure = drawing.new_figure(
        4.5 + 2.4 * len(columns), 2.2 + 0.5 * len(labels), f"{title}\nin brackets: {INTERVAL}"
    )
    axis = figure.subplots()
    grid = [[math.nan] * len(columns) for _ in labels]
    for row in rows:
        y, x = labels.index(row["label"]), columns.index((row["judge"], row["baseline"]))
        grid[y][x] = row["win_rate"]
        counts = f"{row['wins']} / {row['ties']} / {row['losses']}"
        text = f"{row['win_rate']:.2f} [{row['low']:.2f}, {row['high']:.2f}]\n{counts}"
        colour = "black" if 0.2 < row["win_rate"] < 0.8 else "white"
        axis.text(x, y, text, ha="center", va="center", fontsize=8, color=colour)
    image = axis.imshow(grid, cmap="PuOr", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(
        range(len(columns)), [f"{baseline}\n{judge}" for judge, baseline in columns], fontsize=8
    )
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set_xlabel("baseline (wins / ties / losses)")
    figure.colorbar(image, ax=axis, label="win rate", shrink=0.9)
    drawing.save_figure(figure, stem)


FIGURE_TITLES = {
    "accuracy_bars": "Validation accuracy by cell",
    "mt_bench_bars": "MT-Bench by cell",
    "accuracy_differences": "Differences of accuracy",
    "mt_bench_differences": "Differences of MT-Bench",
    "accuracy_over_beta": "Accuracy over beta",
    "mt_bench_over_beta": "MT-Bench over beta",
    "accuracy_heatmap": "Accuracy over beta and tau",
    "mt_bench_heatmap": "MT-Bench over beta and tau",
    "mt_bench_categories": "MT-Bench by category",
    "win_matrix": "Win rates",
    "movement": "Gain against movement",
    "accuracy_boxes": "Accuracy of every run",
    "mt_bench_boxes": "MT-Bench of every run",
    "learning_curves": "Learning curves by loss",
}


def figure_order(path: Path) -> tuple:
    kind = next((kind for kind in FIGURE_TITLES if path.stem.startswith(f"comparison_{kind}")), "")
    return (list(FIGURE_TITLES).index(kind) if kind else len(FIGURE_TITLES), path.stem)


def figure_title(path: Path) -> str:
    kind = next((kind for kind in FIGURE_TITLES if path.stem.startswith(f"comparison_{kind}")), "")
    rest = path.stem.removeprefix(f"comparison_{kind}").strip("_")
    return FIGURE_TITLES.get(kind, path.stem) + (f", {rest}" if kind and rest else "")
