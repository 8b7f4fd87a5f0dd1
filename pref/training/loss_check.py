"""Self-test and plots of a loss; called by `python losses.py` and by train_pref.py for a
--loss_file.
"""

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import losses
from losses import COUPLES_BATCH, LOSSES, NO_REFERENCE, SFT_TERM, PairLogps
from pref.files import console, drawing
from pref.files.console import UserError
from pref.training import loss_options

MARGINS = (0.0, 1.0, -1.0, 50.0, -50.0, 500.0, -500.0, 1e4, -1e4)  # rho and delta, nats
BETAS = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0)
SIZES = (1, 2, 10)
FLOAT32_MAX = torch.finfo(torch.float32).max
FLOAT32_TOLERANCE = 1e-4  # relative, of float32 against float64
STUDY_LOSSES = {
    "dpo": ("dpo", {}),
    "td_dpo tau 0.5": ("td_dpo", {"tau": 0.5}),
    "td_dpo tau 1": ("td_dpo", {"tau": 1.0}),
    "td_dpo tau 2": ("td_dpo", {"tau": 2.0}),
    "discopop": ("discopop", {}),
    "dlrml": ("dlrml", {}),
}
STUDY_BETAS = (0.01, 0.05, 0.5, 2.5)


class Report(NamedTuple):
    """notes: what a user should know. failures: what must be mended before the loss is trained
    with.
    """

    notes: list[str]
    failures: list[str]


def pairs_at(rho: Tensor, tokens: float = 100.0) -> PairLogps:
    """Pairs (B,) with margin `rho` (= delta, nats), half of it on each response, around a reference
    of -2e4 nats.
    """
    base, count = torch.full_like(rho, -2e4), torch.full_like(rho, tokens)
    return PairLogps(base + rho / 2, base - rho / 2, base, base, count, count)


def random_pairs(
    size: int, dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 60.0
) -> PairLogps:
    generator = torch.Generator().manual_seed(seed)
    values = -scale * torch.rand(4, size, dtype=torch.float64, generator=generator)
    lengths = torch.randint(5, 40, (2, size), generator=generator)
    return PairLogps(
        *(v.to(dtype) for v in values), *(n.to(dtype) for n in lengths), *token_sums(size, dtype)
    )


def token_sums(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Token-level sums for the losses that read them: divergences and a score."""
    return (
        torch.ones(size, dtype=dtype),
        torch.full((size,), 2.0, dtype=dtype),
        torch.full((size,), 30.0, dtype=dtype),
    )


def value_and_gradient(loss: Callable, rho: Tensor, parameters: dict) -> tuple[Tensor, Tensor]:
    """Loss and d loss / d rho of each margin on its own, (B,) each."""
    rho = rho.detach().requires_grad_()
    values = loss(pairs_at(rho), **parameters)[0]
    (gradient,) = torch.autograd.grad(values.sum(), rho)
    return values.detach(), gradient


def check_shapes(loss: Callable, notes: list[str], failures: list[str]) -> None:
    for size in SIZES:
        try:
            result = loss(random_pairs(size))
        except ValueError as error:
            if size > 1:
                raise
            notes.append(f"refuses a single pair: {error}")
            continue
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
            failures.append(
                "must return (losses, terms): a (B,) tensor, one loss per pair, and a dict of (B,) tensors"
            )
            return
        for name, value in {"the loss": result[0], **result[1]}.items():
            if not isinstance(value, Tensor) or value.shape != (size,):
                found = (
                    f"has shape {tuple(value.shape)}"
                    if isinstance(value, Tensor)
                    else f"is a {type(value).__name__}"
                )
                failures.append(
                    f"{name} {found} for {size} pairs: return one value per pair, shape ({size},)"
                )
        if failures:
            return


def check_finite(loss: Callable, notes: list[str], failures: list[str]) -> None:
    """Finite value and gradient in float32 over MARGINS and BETAS, wherever float64 says that they
    fit float32.
    """
    for parameters in (
        [{"beta": beta} for beta in BETAS] if "beta" in loss_options.own_defaults(loss) else [{}]
    ):
        too_large = []
        for margin in MARGINS:
            if not fits_float32(loss, margin, parameters):
                too_large.append(margin)
                continue
            pair = torch.tensor(
                [margin, margin]
            )  # two, for losses that need the batch's statistics
            small = value_and_gradient(loss, pair, parameters)
            large = value_and_gradient(loss, pair.double(), parameters)
            if not all(x.isfinite().all() for x in small):
                failures.append(
                    f"not finite in float32 at rho {margin:g}, {parameters}, where its value fits"
                )
            elif not all(
                torch.allclose(s.double(), x, rtol=1e-3, atol=1e-6) for s, x in zip(small, large)
            ):
                failures.append(
                    f"float32 is off at rho {margin:g}, {parameters}: {small[0][0]:g}, not {large[0][0]:g}"
                )
        notes += [
            f"{', '.join(f'{k} {v:g}: ' for k, v in parameters.items())}leaves float32 beyond rho {edge:.4g}"
            for side in (-1, 1)
            if (worst := [m for m in too_large if m * side > 0])
            for edge in [
                overflow_edge(lambda m, p=parameters: fits_float32(loss, m, p), max(worst, key=abs))
            ]
        ]
    if "discopop_form" in loss_options.own_defaults(loss):
        notes.append(published_overflow(loss))


def fits_float32(loss: Callable, margin: float, parameters: dict) -> bool:
    """Whether value and gradient at `margin`, computed in float64, are numbers that float32 has."""
    both = value_and_gradient(loss, torch.tensor([margin, margin], dtype=torch.float64), parameters)
    return all(bool((x.abs() < FLOAT32_MAX).all()) for x in both)


def overflow_edge(fits: Callable[[float], bool], outside: float) -> float:
    """The margin between 0, which fits, and `outside`, which does not, where `fits` changes; to
    four digits.
    """
    inside = 0.0
    while abs(outside - inside) > 1e-4 * abs(outside):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if fits(middle) else (inside, middle)
    return inside


def published_overflow(loss: Callable) -> str:
    """Where the published form of DiscoPOP stops being a number in float32, at beta 1 (there rho is
    z).
    """
    published = {"beta": 1.0, "discopop_form": "published"}

    def finite(margin: float) -> bool:
        return bool(
            value_and_gradient(loss, torch.tensor([margin, margin]), published)[0].isfinite().all()
        )

    edge = overflow_edge(finite, -1e4)
    beyond = value_and_gradient(loss, torch.tensor([edge - 1, edge - 1]), published)[0][0].item()
    return f"discopop_form published is {beyond} in float32 beyond z {edge:.4g}"


def check_precision(loss: Callable, notes: list[str], failures: list[str]) -> None:
    small, large = (loss(random_pairs(64, dtype))[0] for dtype in (torch.float32, torch.float64))
    scale = large.abs().clamp(min=1e-3)
    worst = ((small.double() - large).abs() / scale).max().item()
    if not worst < FLOAT32_TOLERANCE:
        failures.append(f"float32 differs from float64 by {worst:.1e} (relative) on ordinary pairs")


def check_sign(loss: Callable, notes: list[str], failures: list[str]) -> None:
    """Sign of the gradient at rho = 0. A wrong one is a note: DiscoPOP is published with it."""
    gradient = value_and_gradient(loss, torch.zeros(2, dtype=torch.float64), {})[1][0].item()
    sides = [
        value_and_gradient(loss, torch.full((2,), s, dtype=torch.float64), {})[1].abs().max()
        for s in (-1.0, 1.0)
    ]
    if gradient > 1e-9:
        notes.append(f"WARNING: its gradient at rho = 0 points the wrong way ({gradient:+.3g})")
    elif abs(gradient) < 1e-12:
        notes.append("has no gradient at rho = 0")
        if max(sides) < 1e-12 and not couples(loss):
            failures.append("has no gradient at rho -1, 0 and 1: nothing would be trained")


def couples(loss: Callable) -> bool:
    """Whether a pair's loss changes when only other pairs of the batch do, or when the batch is
    permuted. At two scales, since a statistic of the batch may have saturated at one.
    """
    order = torch.arange(9, -1, -1)
    for scale in (60.0, 0.5):
        pairs, others = random_pairs(10, scale=scale), random_pairs(10, seed=1, scale=scale)
        columns = list(zip(pairs[:9], others[:9]))
        replaced = PairLogps(*(torch.cat([mine[:1], other[1:]]) for mine, other in columns))
        permuted = PairLogps(*(mine[order] for mine, _ in columns))
        values = loss(pairs)[0]
        if not torch.allclose(loss(replaced)[0][0], values[0], rtol=1e-9):
            return True
        if not torch.allclose(loss(permuted)[0], values[order], rtol=1e-9):
            return True
    return False


def check_coupling(name: str, loss: Callable, notes: list[str], failures: list[str]) -> None:
    found = couples(loss)
    if found:
        notes.append("couples the pairs of a micro-batch: results depend on --per_device_batch")
    if found != (name in COUPLES_BATCH) and name not in loss_options.FROM_FILES:
        failures.append(
            f"{'couples' if found else 'does not couple'} the batch, COUPLES_BATCH says otherwise"
        )


def try_parameters(loss: Callable[[PairLogps], tuple], size: int = 4) -> str | None:
    """What is wrong with a loss whose parameters are bound, on a few ordinary pairs; None if
    nothing is.
    """
    try:
        values = loss(random_pairs(size, torch.float32))[0]
    except (
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        IndexError,
        ZeroDivisionError,
    ) as error:
        return f"raises {type(error).__name__}: {first_line(error)}"
    return None if values.isfinite().all() else "is not finite on ordinary pairs"


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else ""


def check(name: str) -> Report:
    """Self-test of loss `name`. A loss that raises is a failure, not a traceback of ours."""
    loss, notes, failures = LOSSES[name], [], []
    try:
        check_shapes(loss, notes, failures)
        if failures:
            return Report(notes, failures)
        check_finite(loss, notes, failures)
        check_precision(loss, notes, failures)
        check_sign(loss, notes, failures)
        check_coupling(name, loss, notes, failures)
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        failures.append(f"raises {type(error).__name__}: {first_line(error)}")
    return Report(notes, failures)


def curve(loss: Callable, rho: Tensor, parameters: dict) -> tuple[Tensor, Tensor]:
    """Value and gradient of a pair at each margin. Each pair is doubled into a batch of its own."""
    both = [value_and_gradient(loss, margin.repeat(2), parameters) for margin in rho]
    return torch.stack([v[0] for v, _ in both]), torch.stack([g.sum() for _, g in both]) / 2


def draw_curves(axes, rho: Tensor, curves: dict[str, tuple[Tensor, Tensor]]) -> None:
    for colour, (label, (values, gradients)) in zip(drawing.COLOURS * 2, curves.items()):
        for axis, line in zip(axes, (values, gradients)):
            axis.plot(rho, line, label=label, color=colour, linewidth=1.6)
    for axis, words in zip(axes, ("loss", "d loss / d rho")):
        axis.set_xlabel("margin rho = delta (nats)")
        axis.set_ylabel(words)
        axis.grid(alpha=0.3)
        axis.axvline(0, color="#777777", linewidth=0.8)


def plot_check(name: str, path: Path) -> None:
    """Loss and gradient over the margin for a few betas."""
    loss, rho = LOSSES[name], torch.linspace(-20, 20, 161, dtype=torch.float64)
    betas = (0.01, 0.1, 0.5, 2.5) if "beta" in loss_options.own_defaults(loss) else (None,)
    figure = drawing.new_figure(10, 3.6, f"{name}: loss and gradient of one pair")
    axes = figure.subplots(1, 2, squeeze=False)
    curves = {f"beta {b}" if b else name: curve(loss, rho, {"beta": b} if b else {}) for b in betas}
    draw_curves(axes[0], rho, curves)
    for axis in axes[0]:
        axis.set_yscale("symlog", linthresh=1)
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def plot_study(path: Path) -> None:
    """Loss and gradient of the first study's losses, a row per beta."""
    rho = torch.linspace(-10, 10, 161, dtype=torch.float64)
    figure = drawing.new_figure(10, 11, "")
    axes = figure.subplots(len(STUDY_BETAS), 2)
    for row, beta in zip(axes, STUDY_BETAS):
        curves = {
            label: curve(LOSSES[n], rho, {"beta": beta, **more})
            for label, (n, more) in STUDY_LOSSES.items()
        }
        draw_curves(row, rho, curves)
        row[0].set_yscale("symlog", linthresh=1)
        row[1].set_yscale("symlog", linthresh=0.1)
        row[0].set_title(f"beta {beta}", loc="left", fontweight="bold")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def run_check(spec: str, plot: Path | None) -> int:
    try:
        name = loss_options.load_loss_file(spec) if spec not in LOSSES else spec
    except ValueError as error:
        known = "" if ".py" in spec else f", or name one of {', '.join(LOSSES)}"
        raise UserError(f"--check {error}{known}") from None
    report = check(name)
    for line in report.notes:
        print(f"{name}: {line}")
    for line in report.failures:
        print(f"{name}: FAILS: {line}")
    if not report.failures:
        plot = plot or Path(f"check_{name}.png")
        plot_check(name, plot)
        print(f"{name}: passes the self-test; loss and gradient over the margin: {plot}")
    return 1 if report.failures else 0


def print_table() -> None:
    """Name, formula, parameters with defaults, whether a reference is needed, whether the batch is
    coupled.
    """
    for name, loss in LOSSES.items():
        own = ", ".join(f"{key} {value}" for key, value in loss_options.own_defaults(loss).items())
        notes = ["no reference" if name in NO_REFERENCE else "reference"]
        notes += ["couples the micro-batch"] if name in COUPLES_BATCH else []
        print(f"{name:<13}{inspect.getdoc(loss).splitlines()[0]}")
        print(f"{'':<15}{own or 'no parameters of its own'}; {', '.join(notes)}")
    term = ", ".join(f"{key} {value}" for key, value in SFT_TERM.items())
    print(
        f"\nevery loss    + sft_coef * score_c, where it has no such term of its own\n{'':<13}  {term}"
    )


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
        help="self-test of a loss, or of FILE.py:NAME; exit code 1 if it fails",
    )
    group.add_argument(
        "--figure", type=Path, metavar="PNG", help="plot the study's losses and gradients"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="where --check draws (default: check_<name>.png)"
    )
    args = parser.parse_args()
    if args.check:
        return run_check(args.check, args.plot)
    if args.figure:
        plot_study(args.figure)
        print(f"{args.figure}: written")
        return 0
    print_table()
    return 0


if __name__ == "__main__":
    console.run_main(main)
