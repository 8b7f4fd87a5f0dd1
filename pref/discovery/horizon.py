"""How far training moves the policy: in a run, and on the proxy, which is to move as far.

At the start every margin is 0, and there losses with one slope are one loss: what tells them apart
is how their gradient changes over the margins that training visits. A pilot, DPO at its default
beta, says how far that is.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from losses import dpo
from pref.discovery import proxy
from pref.discovery.features import Features
from pref.files import disk

BETA = 0.1  # of the pilot, losses.py's default
LEAST_Z = 0.5  # sigma(-z) is then 0.38 instead of 0.5: a change that a run can see
PILOT_SEEDS = (0, 1)
MATCHES, RATES = 10, (1e-3, 30.0)  # tries to match a rate; between which rates


class Pilot(NamedTuple):
    """What a DPO run does to the log-ratios of pairs that it was not trained on."""

    visited: float  # nats: 90 % of the log-ratios a and b lie within it
    median_z: float  # median of |beta rho|
    note: str | None  # what the user should know, in a line


def pilot(features: Features, *, steps: int, batch: int, learning_rate: float) -> Pilot:
    """DPO on the proxy."""
    outcomes = [
        proxy.train(dpo, features, steps=steps, batch=batch, learning_rate=learning_rate, seed=seed)
        for seed in PILOT_SEEDS
    ]
    visited = float(np.mean([outcome.visited for outcome in outcomes]))
    median_z = BETA * float(np.median(np.abs([outcome.margins for outcome in outcomes])))
    return Pilot(visited, median_z, note(median_z, steps))


def of_run(folder: Path, steps: int) -> Pilot:
    """The same of a finished run of train_pref.py with DPO, from its val_pairs.jsonl. steps: that
    it took. Raises UserError if the file cannot be read.
    """
    lines = [row for _, row in disk.read_jsonl(folder / "val_pairs.jsonl")]
    last = max(row["step"] for row in lines)
    rows = [row for row in lines if row["step"] == last]
    a, b = (
        np.array([row[f"policy_{side}"] - row[f"ref_{side}"] for row in rows])
        for side in ("chosen", "rejected")
    )
    visited = float(np.quantile(np.abs(np.concatenate([a, b])), proxy.VISITED))
    median_z = BETA * float(np.median(np.abs(a - b)))
    return Pilot(visited, median_z, note(median_z, steps))


def match_rate(features: Features, run: Pilot, *, steps: int, batch: int) -> float:
    """The proxy's learning rate with which DPO's margins are as large as in the run: their median,
    since margins are what the shape of a loss acts on. They grow about as the rate.
    """
    rate = 0.3
    for _ in range(MATCHES):
        found = pilot(features, steps=steps, batch=batch, learning_rate=rate)
        if not found.median_z > 0 or not run.median_z > 0:
            break  # no margins to match
        rate = min(max(rate * run.median_z / found.median_z, RATES[0]), RATES[1])
        if abs(found.median_z / run.median_z - 1) < 0.02:
            break
    return float(f"{rate:.3g}")


def note(median_z: float, steps: int) -> str | None:
    """A line if the horizon is too short to tell losses apart, with the steps that would do: the
    log-ratios grow about as the steps.
    """
    if median_z >= LEAST_Z:
        return None
    enough = f" to about {round(steps * LEAST_Z / median_z):,} steps" if median_z > 0 else ""
    return (
        f"after {steps} steps of dpo half of the pairs have |z| below {median_z:.2f}: at this "
        "horizon losses with one slope at 0 cannot be told apart: raise --epochs or --max_steps"
        f"{enough}, or --learning_rate"
    )
