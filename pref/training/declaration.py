"""How an argument of train_pref.py is declared: once, with every fact that other modules need.

The tables of `Argument` are in arguments.py and, for the parameters of losses, in loss_options.py.
The command line, the checks of values, the run id, and what makes two starts the same run are all
derived from them.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# What another value of an argument changes.
AFFECTS = {
    "result": "the numbers: with another value it is another run",
    "coupled": "the numbers of losses that couple the pairs of a micro-batch; of others the speed",
    "place": "where files are; a run may be continued with another value",
    "speed": "time and memory; a run may be continued with another value",
    "kernel": "speed and rounding; args.json records what it was settled to, for continued runs",
    "session": "this start of the program alone; not recorded in args.json",
}


METAVARS = {int: "N", float: "X", Path: "DIR"}  # how --help writes a value


class Range(NamedTuple):
    """The values that an argument may have."""

    allows: Callable[[float], bool]
    text: str  # completes "must be ..."


ABOVE_0 = Range(lambda x: 0 < x < math.inf, "above 0")
AT_LEAST_0 = Range(lambda x: 0 <= x < math.inf, "a finite number, 0 or above")
FINITE = Range(math.isfinite, "a finite number")
BELOW_1 = Range(lambda x: 0 <= x < 1, "in [0, 1)")


class Argument(NamedTuple):
    """One command-line argument of train_pref.py. A row of a table reads

    Argument("max_grad_norm", float, 1.0, range=ABOVE_0, tag="clip").describe("norm that ...")
    """

    name: str  # without the dashes
    values: type | tuple[str, ...]  # a type (bool: a switch), or the texts to choose from
    default: object = None
    range: Range | None = None
    # What precedes the value in the run id where it is not the default; None: never in the run id.
    tag: str | None = None
    affects: str = "result"  # a key of AFFECTS
    options: dict | None = None  # further keywords of argparse's add_argument
    help: str = ""
    flag: str = ""  # on the command line, where it is not the name, which args.json has
    # Whether args.json has it where it is the default. Not for an option that few runs use and
    # earlier versions did not have: their records say the same.
    always_recorded: bool = True

    def describe(self, help: str) -> "Argument":
        """The same argument with its help text, which names the unit."""
        return self._replace(help=help)

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        """Declare the argument to argparse."""
        if self.values is bool:
            kind = {"action": "store_true"}
        elif isinstance(self.values, tuple):
            kind = {"choices": self.values}
        else:
            kind = {"type": self.values}
            kind |= {"metavar": metavar} if (metavar := METAVARS.get(self.values)) else {}
        text = self.help
        if kind.get("action") != "store_true" and self.default is not None:
            text += " (default %(default)s)"
        options = {"default": self.default, "help": text, **kind, **(self.options or {})}
        group.add_argument(f"--{self.flag or self.name}", dest=self.name, **options)

    def check(self, value: float) -> None:
        """Raise ValueError if `value` is outside the argument's range."""
        if self.range and value is not None and not self.range.allows(value):
            raise ValueError(f"--{self.name} {value}: must be {self.range.text}")
