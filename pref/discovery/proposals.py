"""What passes between the search, its proposers and the archive: a proposal, and what is known of
the earlier ones.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass
class Proposal:
    """A candidate as a proposer hands it over. `text` is the whole interface: a program in the
    restricted form (form.py), which the search reads, checks and prints again.
    """

    text: str
    by: str  # name of the proposer
    operator: str  # how it was made: "mutate beta", "crossover", "improve", ...
    parents: list[str]  # ids
    name: str  # [a-z0-9_]{1,24}
    thought: str = ""
    original: str = ""  # what a model wrote; never executed
    genome: dict | None = None  # of a proposer that breeds from it; JSON
    usd: float = 0.0
    stopped: dict | None = None  # {"at", "why"}: there is nothing to read, e.g. a reply cut off


@dataclass
class Known:
    """What is known of an earlier candidate."""

    id: str  # "p0031"
    name: str
    text: str
    by: str
    parents: list[str]
    genome: dict | None
    round: int
    size: int  # steps of the program
    gradient: dict[str, float]  # by rho, relative to DPO's
    field: np.ndarray | None = None  # fingerprint.py
    cell: str | None = None
    gain: float | None = None  # shrunk difference to DPO in accuracy, as a fraction
    se: float | None = None
    measured: str | None = None  # "proxy" or "trained"
    seeds: int = 0  # trained with
    stopped: dict | None = None
    bits: float | None = None  # over chance, higher is better; where gains tie
    usd: float = 0.0  # what the proposal cost


class View(NamedTuple):
    """What a proposer sees: the archive as of the end of the round before."""

    known: list[Known]  # in order of id
    dpo: Known
    visited: float  # nats: 90 % of the log-ratios of a DPO run lie within it
    setting: str  # three lines for a model's prompt
