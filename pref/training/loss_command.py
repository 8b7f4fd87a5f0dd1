"""What `python losses.py` does: the list of losses, the self-test of one, plots."""

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path

import losses
from losses import COUPLES_BATCH, LOSSES, NO_REFERENCE, SFT_TERM
from pref.files import console
from pref.files.console import UserError
from pref.training import arguments, loss_check, loss_options


def run_check(spec: str, plot: Path | None) -> int:
    """Self-test the loss NAME or FILE.py:NAME, print the result, and plot the loss if it passes.
    Returns the exit code.
    """
    try:
        name = spec if spec in LOSSES else arguments.load_loss(spec)
    except ValueError as error:
        hint = "" if ".py" in spec else f", or name one of {', '.join(LOSSES)}"
        raise UserError(f"--check {error}{hint}") from None
    report = loss_check.check(name)
    for line in report.notes:
        print(f"{name}: {line}")
    for line in report.failures:
        print(f"{name}: FAILS: {line}")
    if report.failures:
        return 1
    plot = plot or Path(f"check_{name}.png")
    loss_check.plot_check(name, plot)
    print(
        f"{name}: passes the self-test: shapes, finite values and gradients at and near margin 0 "
        f"and up to {loss_check.DEFAULTS_REACH[0]:g} nats, no NaN up to "
        f"{max(loss_check.MARGINS):g}, float32 as float64; at betas {loss_check.BETAS[0]:g} to "
        f"{loss_check.BETAS[-1]:g} no NaN up to {loss_check.OTHERS_REACH[1]:g} nats"
    )
    print(f"loss and gradient over the margin: {plot}")
    return 0


def formula(loss: Callable) -> str:
    """The first paragraph of a loss's docstring, on one line."""
    return " ".join((inspect.getdoc(loss) or "").partition("\n\n")[0].split())


def print_table() -> None:
    """For each loss its name and formula, and below them its parameters and their defaults, whether
    it needs a reference, and whether it couples the pairs of a micro-batch.
    """
    for name, loss in LOSSES.items():
        own = ", ".join(f"{key} {value}" for key, value in loss_options.own_defaults(loss).items())
        notes = ["no reference" if name in NO_REFERENCE else "reference"]
        notes += ["couples the micro-batch"] if name in COUPLES_BATCH else []
        print(f"{name:<13}{formula(loss)}")
        print(f"{'':<15}{own or 'no parameters of its own'}; {', '.join(notes)}")
    sft_term = ", ".join(f"{key} {value}" for key, value in SFT_TERM.items())
    print("\nevery loss    + sft_coef * score_c, where it has no such term of its own")
    print(f"{'':<15}{sft_term}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=losses.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="losses.py",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--check",
        metavar="NAME",
        help="self-test a loss, or FILE.py:NAME; exit code 1 if it fails",
    )
    group.add_argument(
        "--figure", type=Path, metavar="PNG", help="plot the study's losses and their gradients"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="PNG",
        help="where --check writes its plot (default: check_<name>.png)",
    )
    args = parser.parse_args()
    if args.check:
        return run_check(args.check, args.plot)
    if args.figure:
        loss_check.plot_study(args.figure)
        print(f"{args.figure}: written")
        return 0
    print_table()
    return 0


if __name__ == "__main__":
    console.run_main(main)
