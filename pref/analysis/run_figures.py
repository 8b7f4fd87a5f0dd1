"""pref/analysis/run_figures.py"""

import math
from pathlib import Path

from pref.files import disk, drawing

RUN_KEYS = (
    "run_id",
    "path",
    "args",
    "loss",
    "status",
    "summary",
    "steps",
    "evals",
    "val",
    "length_bias",
)


def draw_run(run: dict) -> None:
    """Learning curves, margins before and after, accuracy by length difference: one figure, drawn
    if it has changed.
    """
    if not (run["steps"] or run["evals"] or run["val"]):
        return
    best_step, title = (run["summary"] or {}).get("best_step"), f"{run['run_id']} ({run['status']})"
    stem = run["path"] / "figures" / f"{run['run_id']}_learning_curve"
    shown = [title, run["steps"], run["evals"], run["val"], run["length_bias"], best_step]
    key = disk.sha256_json([*shown, drawing.drawing_version(__file__)])
    if not drawing.is_drawn(stem, key):
        draw_learning_curve(stem, *shown, key)


def draw_margins(axes, val: dict, best_step: int | None) -> None:
    """Histograms of rho and delta over validation pairs before and after training."""
    steps = dict.fromkeys([min(val), best_step if best_step in val else max(val)]) if val else ()
    for axis, i, name in ((axes[0], 0, "rho"), (axes[1], 1, "delta")):
        axis.set_xlabel(f"{name} of a validation pair (nats)")
        axis.set_ylabel("pairs")
        found = [[pair[i] for pair in val[step].values() if pair] for step in steps]
        if not any(found):
            axis.text(
                0.5,
                0.5,
                "no finite pair recorded",
                transform=axis.transAxes,
                ha="center",
                color=drawing.GREY,
            )
            continue
        low, high = min(map(min, filter(None, found))), max(map(max, filter(None, found)))
        edges = [low + (high - low) * k / 30 for k in range(31)] if high > low else 1
        for values, step, colour, label in zip(found, steps, drawing.COLOURS, ("before", "after")):
            axis.hist(
                values, edges, color=colour, alpha=0.55, label=f"{label} training (step {step:g})"
            )
        axis.axvline(0, color="black", linewidth=0.8, linestyle=":")
        axis.legend(**drawing.ABOVE)


def draw_length_bias(axis, bias: list[dict]) -> None:
    if not bias:
        axis.text(
            0.5,
            0.5,
            "no lengths recorded",
            transform=axis.transAxes,
            ha="center",
            color=drawing.GREY,
        )
        return
    errors = [
        [max(0, row["accuracy"] - row["low"]) for row in bias],
        [max(0, row["high"] - row["accuracy"]) for row in bias],
    ]
    accuracies = [row["accuracy"] for row in bias]
    axis.errorbar(
        range(len(bias)),
        accuracies,
        yerr=errors,
        fmt="o",
        color=drawing.COLOURS[0],
        capsize=3,
        label="acc_ref; error bar: exact 95 % interval",
    )
    axis.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    axis.set_ylim(-0.03, 1.03)
    axis.set_xticks(
        range(len(bias)),
        [f"{row['from']:g} to {row['to']:g}\n({row['n_pairs']})" for row in bias],
        fontsize=7,
    )
    axis.set_xlabel("chosen - rejected, tokens (pairs)")
    axis.legend(**drawing.ABOVE)


def draw_learning_curve(
    stem: Path,
    title: str,
    steps: list[dict],
    evals: list[dict],
    val: dict,
    bias: list[dict],
    best_step: int | None,
    key: str,
) -> None:
    """Loss, accuracy, margin, gradient norm and learning rate over optimiser steps, non-finite
    steps marked; below, the validation pairs' margins before and after, and accuracy by length
    difference.
    """
    figure = drawing.new_figure(13, 10.5, title, weight="normal")
    curves, pairs = figure.subfigures(2, 1, height_ratios=[2, 1])
    axes = curves.subplots(2, 2, sharex=True).flat
    draw_lines(axes[0], "loss", steps, [("loss", "training")], evals, [("eval/loss", "validation")])
    accuracies = [(f"eval/acc_{name}", f"validation acc_{name}") for name in ("ref", "sum", "mean")]
    draw_lines(
        axes[1],
        "accuracy",
        steps,
        [("rewards/accuracies", "training (acc_ref)")],
        evals,
        accuracies,
    )
    axes[1].axhline(0.5, color=drawing.GREY, linewidth=0.8, linestyle=":")
    axes[1].set_ylim(-0.03, 1.03)
    margins = [("margin/rho", "rho"), ("margin/delta", "delta")]
    train = [(key, f"{name}, training") for key, name in margins]
    draw_lines(
        axes[2],
        "margin (nats)",
        steps,
        train,
        evals,
        [(f"eval/{k}", f"{name}, validation") for k, name in margins],
    )
    draw_lines(axes[3], "gradient norm", steps, [("grad_norm", "gradient norm")], [], [])
    draw_learning_rate(axes[3], steps)
    bad = [
        row["step"]
        for row in steps
        if any(key in row and row[key] is None for key in ("loss", "grad_norm"))
    ]
    for axis in axes:
        mark_steps(axis, bad, best_step)
        axis.grid(alpha=0.25)
    for axis in (axes[2], axes[3]):
        axis.set_xlabel("optimiser step")
    add_legend(curves, axes, bad, best_step)
    below = pairs.subplots(1, 3)
    draw_margins(below, val, best_step)
    draw_length_bias(below[2], bias)
    drawing.save_figure(figure, stem, key, dpi=100)


def draw_lines(
    axis, label: str, steps: list[dict], train: list, evals: list[dict], validation: list
) -> None:
    """Thin lines for training, markers for validation; one colour where both show the same
    quantity.
    """
    for i, (key, name) in enumerate(train):
        style = {"linewidth": 1, "alpha": 0.6, "marker": "." if len(steps) == 1 else None}
        axis.plot(*points(steps, key), color=drawing.COLOURS[i], label=name, **style)
    for i, (key, name) in enumerate(validation):
        axis.plot(
            *points(evals, key),
            color=drawing.COLOURS[i],
            label=name,
            linewidth=1.6,
            marker="osD"[i],
            markersize=4,
        )
    axis.set_ylabel(label)
    if any(math.isfinite(y) for line in axis.get_lines() for y in line.get_ydata()):
        # Above the panel: inside it, a legend hides data whatever the curves do.
        axis.legend(**drawing.ABOVE, ncols=2)
    else:
        axis.text(
            0.5,
            0.5,
            "no finite value recorded",
            transform=axis.transAxes,
            ha="center",
            va="center",
            color=drawing.GREY,
        )


def points(rows: list[dict], key: str) -> tuple[list[float], list[float]]:
    """(steps, values), NaN where a value is null: the line breaks there instead of bridging it."""
    found = [row for row in rows if key in row]
    return [row["step"] for row in found], [
        math.nan if row[key] is None else row[key] for row in found
    ]


def draw_learning_rate(axis, steps: list[dict]) -> None:
    twin = axis.twinx()
    twin.plot(*points(steps, "lr"), color=drawing.COLOURS[1], linewidth=1.2, linestyle="--")
    twin.set_ylabel("learning rate (dashed)", color=drawing.COLOURS[1])
    twin.tick_params(axis="y", colors=drawing.COLOURS[1])
    norms = [row["grad_norm"] for row in steps if row.get("grad_norm")]
    if norms and max(norms) > 50 * min(norms):
        axis.set_yscale("log")
        axis.set_ylabel("gradient norm (log scale)")


def mark_steps(axis, bad: list[int], best_step: int | None) -> None:
    for step in bad:
        axis.axvline(step, color=drawing.RED, linewidth=1, alpha=0.5)
    if best_step is not None:
        axis.axvline(best_step, color="black", linewidth=1, linestyle=":")


def add_legend(figure, axes, bad: list[int], best_step: int | None) -> None:
    from matplotlib.lines import Line2D

    marks = []
    if best_step is not None:
        marks.append(
            Line2D(
                [], [], color="black", linestyle=":", label=f"best checkpoint (step {best_step:g})"
            )
        )
    if bad:
        marks.append(
            Line2D([], [], color=drawing.RED, alpha=0.5, label=f"non-finite step ({len(bad)})")
        )
    if marks:
        figure.legend(handles=marks, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
