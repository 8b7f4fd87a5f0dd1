"""The figure of one run: learning curves, margins before and after, accuracy by length difference.

A run's figure is redrawn only if what it shows has changed: the figures of 60 runs take a minute.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pref.analysis.runs import Run
from pref.files import disk, drawing


def without_texts(run: Run) -> Run:
    """The run without answers and judgements, which no figure needs: light enough to send to a
    drawing process.
    """
    return replace(run, benches={}, imported=None)


def draw_run(run: Run) -> None:
    """Draw a run's figure unless it is already there with the same contents, or empty."""
    if not (run.steps or run.evals or run.val):
        return
    stem = run.path / "figures" / f"{run.run_id}_learning_curve"
    title = f"{run.run_id} ({run.status})"
    shown = [title, run.steps, run.evals, run.val, run.length_bias, run.best_step]
    key = disk.sha256_json([*shown, drawing.drawing_version(__file__)])
    if not drawing.is_drawn(stem, key):
        draw_learning_curve(run, title, stem, key)


def draw_learning_curve(run: Run, title: str, stem: Path, key: str) -> None:
    """Loss, accuracy, margins and gradient norm over optimiser steps, with non-finite steps and the
    best checkpoint marked; below, the margins of the validation pairs and accuracy by length
    difference.
    """
    import matplotlib

    # Letters as outlines: embedding a font takes a quarter of the time of this figure, and there
    # is one for every run. To be put back by drawing.own_style.
    matplotlib.rcParams["pdf.fonttype"] = 3
    figure = drawing.new_figure(drawing.WIDE, 9, title)
    curves, pairs = figure.subfigures(2, 1, height_ratios=[2, 1])

    # 1) Four panels over optimiser steps.
    axes = list(curves.subplots(2, 2, sharex=True).flat)
    loss_axis, accuracy_axis, margin_axis, gradient_axis = axes
    draw_lines(loss_axis, "loss", run, {"loss": "training"}, {"eval/loss": "validation"})
    train = {"rewards/accuracies": "training (acc_ref)"}
    validation = {f"eval/acc_{name}": f"validation acc_{name}" for name in ("ref", "sum", "mean")}
    draw_lines(accuracy_axis, "accuracy", run, train, validation)
    accuracy_axis.axhline(0.5, color=drawing.GREY, linewidth=0.8, linestyle=":")
    accuracy_axis.set_ylim(-0.03, 1.03)
    train = {f"margin/{name}": f"{name}, training" for name in ("rho", "delta")}
    validation = {f"eval/margin/{name}": f"{name}, validation" for name in ("rho", "delta")}
    draw_lines(margin_axis, "margin (nats)", run, train, validation)
    draw_lines(gradient_axis, "gradient norm", run, {"grad_norm": "gradient norm"})
    draw_learning_rate(gradient_axis, run.steps)

    # 2) Marks that all four share.
    nonfinite = nonfinite_steps(run.steps)
    for axis in axes:
        mark_steps(axis, nonfinite, run.best_step)
        axis.grid(alpha=0.25)
    for axis in (margin_axis, gradient_axis):
        axis.set_xlabel("optimiser step")
    add_legend(curves, nonfinite, run.best_step)

    # 3) Three panels over validation pairs.
    rho_axis, delta_axis, length_axis = pairs.subplots(1, 3)
    draw_margins(rho_axis, "rho", run)
    draw_margins(delta_axis, "delta", run)
    draw_length_bias(length_axis, run.length_bias)
    drawing.save_figure(figure, stem, key, dpi=100, suffixes=drawing.FILES)


# ---- over optimiser steps -----------------------------------------------------------------------


class Points(NamedTuple):
    """A curve; values are NaN where a record has null, so that the line breaks there."""

    steps: list[float]
    values: list[float]


def points(rows: list[dict], key: str) -> Points:
    """The curve of `key` in records of metrics.jsonl; records without it are skipped."""
    rows = [row for row in rows if key in row]
    return Points(
        steps=[row["step"] for row in rows],
        values=[math.nan if row[key] is None else row[key] for row in rows],
    )


def draw_lines(
    axis, label: str, run: Run, train: dict[str, str], validation: dict[str, str] | None = None
) -> None:
    """Thin lines for training, markers for validation; one colour where both show the same
    quantity. train, validation: key in metrics.jsonl -> label.
    """
    alone = "." if len(run.steps) == 1 else None
    for colour, (key, name) in zip(drawing.COLOURS, train.items()):
        style = {"color": colour, "linewidth": 1, "alpha": 0.6, "marker": alone}
        axis.plot(*points(run.steps, key), label=name, **style)
    for colour, marker, (key, name) in zip(drawing.COLOURS, "osD", (validation or {}).items()):
        style = {"color": colour, "linewidth": 1.6, "marker": marker, "markersize": 4}
        axis.plot(*points(run.evals, key), label=name, **style)
    axis.set_ylabel(label)
    if any(math.isfinite(y) for line in axis.get_lines() for y in line.get_ydata()):
        # Above the panel: inside it, a legend hides data whatever the curves do.
        axis.legend(**drawing.ABOVE, ncols=2)
    else:
        write_in_middle(axis, "no finite value recorded", va="center")


def draw_learning_rate(axis, steps: list[dict]) -> None:
    """The learning rate on a second y axis; a log scale for gradient norms that differ widely."""
    twin = axis.twinx()
    twin.plot(*points(steps, "lr"), color=drawing.COLOURS[1], linewidth=1.2, linestyle="--")
    twin.spines["right"].set_visible(True)
    twin.set_ylabel("learning rate (dashed)", color=drawing.COLOURS[1])
    twin.tick_params(axis="y", colors=drawing.COLOURS[1])
    norms = [row["grad_norm"] for row in steps if row.get("grad_norm")]
    if norms and max(norms) > 50 * min(norms):
        drawing.plain_log(axis.yaxis, norms)
        axis.set_ylabel("gradient norm (log scale)")


def nonfinite_steps(steps: list[dict]) -> list[float]:
    """Optimiser steps whose loss or gradient norm was not finite."""
    return [
        row["step"]
        for row in steps
        if any(key in row and row[key] is None for key in ("loss", "grad_norm"))
    ]


def mark_steps(axis, nonfinite: list[float], best_step: float | None) -> None:
    for step in nonfinite:
        axis.axvline(step, color=drawing.RED, linewidth=1, alpha=0.5)
    if best_step is not None:
        axis.axvline(best_step, color="black", linewidth=1, linestyle=":")


def add_legend(figure, nonfinite: list[float], best_step: float | None) -> None:
    """Explain the marks of `mark_steps` below the panels."""
    from matplotlib.lines import Line2D

    marks = []
    if best_step is not None:
        label = f"best checkpoint (step {best_step:g})"
        marks.append(Line2D([], [], color="black", linestyle=":", label=label))
    if nonfinite:
        label = f"non-finite step ({len(nonfinite)})"
        marks.append(Line2D([], [], color=drawing.RED, alpha=0.5, label=label))
    if marks:
        figure.legend(handles=marks, loc="outside lower center", ncols=2, fontsize=9, frameon=False)


# ---- over validation pairs ----------------------------------------------------------------------


def draw_margins(axis, name: str, run: Run) -> None:
    """Histograms of rho or delta over validation pairs, before and after training."""
    axis.set_xlabel(f"{name} of a validation pair (nats)")
    axis.set_ylabel("pairs")
    steps = []
    if run.val:
        after = run.best_step if run.best_step in run.val else max(run.val)
        steps = list(dict.fromkeys([min(run.val), after]))  # one step if they are the same
    by_step = [
        [getattr(margins, name) for margins in run.val[step].values() if margins] for step in steps
    ]
    if not any(by_step):
        write_in_middle(axis, "no finite pair recorded")
        return
    low, high = min(map(min, filter(None, by_step))), max(map(max, filter(None, by_step)))
    edges = [low + (high - low) * k / 30 for k in range(31)] if high > low else 1
    axis.axvline(0, color="black", linewidth=0.8, linestyle=":")
    for when, step, values, colour in zip(("before", "after"), steps, by_step, drawing.COLOURS):
        label = f"{when} training (step {step:g})"
        if values and max(values) - min(values) < 1e-3 * (high - low):
            # As before training, where the policy is the reference: a bar of all pairs would leave
            # no height for the others.
            axis.axvline(values[0], color=colour, linewidth=2, label=f"{label}: all pairs")
        else:
            axis.hist(values, edges, color=colour, alpha=0.55, label=label)
    axis.legend(**drawing.ABOVE)


def draw_length_bias(axis, bins: list[dict]) -> None:
    """Accuracy by length difference; bins: of run_metrics.length_bias."""
    if not bins:
        write_in_middle(axis, "no lengths recorded")
        return
    accuracies = [row["accuracy"] for row in bins]
    below = [max(0, row["accuracy"] - row["low"]) for row in bins]
    above = [max(0, row["high"] - row["accuracy"]) for row in bins]
    label = "acc_ref; error bar: exact 95 % interval"
    style = {"fmt": "o", "color": drawing.COLOURS[0], "capsize": 3}
    axis.errorbar(range(len(bins)), accuracies, yerr=[below, above], label=label, **style)
    axis.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    axis.set_ylim(-0.03, 1.03)
    ticks = [f"{row['from']:g} to {row['to']:g}\n({row['n_pairs']})" for row in bins]
    axis.set_xticks(range(len(bins)), ticks, fontsize=8.5)
    axis.set_xlabel("chosen - rejected, tokens (pairs)")
    axis.legend(**drawing.ABOVE)


def write_in_middle(axis, text: str, va: str = "baseline") -> None:
    style = {"transform": axis.transAxes, "ha": "center", "va": va, "color": drawing.GREY}
    axis.text(0.5, 0.5, text, **style)
