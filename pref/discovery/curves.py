"""The best losses beside DPO: loss and gradient over the margin, and which margins training saw."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from losses import LOSSES
from pref.discovery import printing
from pref.discovery.form_tables import Refusal
from pref.discovery.marks import Drawn, Palette, save, shown_name
from pref.discovery.report_data import Candidate, Story
from pref.files import drawing
from pref.training import loss_check

MOST = 3  # candidates
DPO_BETAS = (0.05, 0.1, 0.5)
GREYS = ("#aaaaaa", "#666666", "#222222")
REACH = (5.0, 20.0)  # nats: the axis goes at least, and at most, so far on either side
FAR = 1.5  # times DPO's own range: how far the axis goes beyond it
VISITED = 3.0  # nats, where no margins are known

Curve = tuple[Tensor, Tensor]  # loss and d loss / d rho at each margin


def draw_losses(story: Story, palette: Palette, stem: Path) -> Drawn | None:
    """Loss and gradient of the three best and of DPO; below, the margins of DPO's runs."""
    best = {one.label: one for one in story.ranking[:MOST] if one.text}
    if not best:
        return None
    reach = reach_of(story.margins)
    rho = torch.linspace(-reach, reach, 161, dtype=torch.float64)
    visited = float(np.quantile(np.abs(story.margins), 0.9)) if len(story.margins) else VISITED
    curves = {
        f"dpo β={beta:g}": loss_check.curve(LOSSES["dpo"], rho, {"beta": beta})
        for beta in DPO_BETAS
    }
    own = {shown_name(name, 30): curve_of(one, rho) for name, one in best.items()}
    own = {name: curve for name, curve in own.items() if curve}
    if not own:
        return None
    scaled = {name: at_one_scale(curve, rho, visited) for name, curve in {**own, **curves}.items()}
    title = "Loss and gradient of the best"
    figure = drawing.new_figure(drawing.WIDE, 4.6, title, notes(story, visited))
    rows = figure.subplots(2, 2, height_ratios=[4, 1], sharex=True)
    loss_check.draw_curves(rows[0], rho, scaled)
    for axis in rows[0]:
        mute_dpo(axis)
        limit(axis)
        axis.set_xlabel("")
    rows[0][0].set_ylabel("loss (scaled)")
    rows[0][1].set_ylabel("d loss / d rho (scaled)")
    for axis in rows[1]:
        draw_margins(axis, story.margins, reach)
    labels = rows[0][0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside lower center", ncols=6, frameon=False)
    return save(figure, stem, [])


def notes(story: Story, visited: float) -> list[str]:
    where = f"±{visited:.1f} nats, which holds 90 % of them" if len(story.margins) else "±3 nats"
    return [
        f"Divided by the RMS of the gradient within {where}: AdamW does not see a loss's scale. "
        "Losses are 0 at margin 0.",
        "Below: margins of the search's validation pairs after DPO's runs. Beyond them, the curves "
        "were not tried.",
    ]


def curve_of(one: Candidate, rho: Tensor) -> Curve | None:
    """The curve of a printed program; None where its text is not one, or cannot be computed."""
    try:
        values, gradients = loss_check.curve(printing.load(one.text), rho, {})
    except (Refusal, *loss_check.RAISED):
        return None
    return (values, gradients) if gradients.isfinite().any() else None


def at_one_scale(curve: Curve, rho: Tensor, visited: float) -> Curve:
    """A curve divided by the RMS of its gradient where training was; loss 0 at margin 0."""
    values, gradients = curve
    seen = gradients[(rho.abs() <= max(visited, 0.5)) & gradients.isfinite()]
    size = seen.square().mean().sqrt() if len(seen) else torch.zeros(())
    size = size if size.isfinite() and size > 0 else torch.ones(())
    return (values - values[len(values) // 2]) / size, gradients / size


def reach_of(margins: np.ndarray) -> float:
    """How far the axis goes, nats: twice as far as nearly all margins."""
    far = 2 * float(np.quantile(np.abs(margins), 0.99)) if len(margins) else 10.0
    return min(max(far, REACH[0]), REACH[1])


def mute_dpo(axis) -> None:
    """DPO in greys and behind; a candidate keeps its colour."""
    dpo = [line for line in axis.get_lines() if is_dpo(line)]
    for line, grey in zip(dpo, GREYS):
        line.set(color=grey, linestyle="--", linewidth=1.2, zorder=1)


def is_dpo(line) -> bool:
    return line.get_label().startswith("dpo β")


def limit(axis) -> None:
    """An axis that a curve which grows without bound leaves, rather than flatten the others."""
    lines = [line for line in axis.get_lines() if not line.get_label().startswith("_")]
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in lines])
    values = values[np.isfinite(values)]
    dpo = [np.asarray(line.get_ydata(), float) for line in lines if is_dpo(line)]
    least, most = np.min(dpo), np.max(dpo)
    reach = FAR * (most - least)
    low, high = max(values.min(), least - reach), min(values.max(), most + reach)
    room = 0.08 * (high - low) or 1.0
    axis.set_ylim(low - room, high + room)


def draw_margins(axis, margins: np.ndarray, reach: float) -> None:
    axis.set_xlabel("margin rho = delta (nats)")
    axis.set_xlim(-reach, reach)
    if len(margins):
        bins = np.linspace(-reach, reach, 61)
        axis.hist(margins, bins=bins, color=drawing.COLOURS[4])
        axis.axvline(0, color=drawing.GREY, linewidth=0.8)
    else:
        style = {"ha": "center", "va": "center", "transform": axis.transAxes, "fontsize": 9}
        axis.text(0.5, 0.5, "no run of DPO has left its margins", **style)
    axis.set_yticks([])
    axis.set_ylabel("pairs", rotation=0, ha="right", va="center")
