"""The self-test and the plots of losses.

train_pref.py runs the self-test, `check`, on a loss from --loss_file before it loads any weight;
loss_command.py on request.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from losses import COUPLES_BATCH, LOSSES, PairLogps
from pref.files import drawing
from pref.files.console import first_line
from pref.training import loss_options

MARGINS = (0.0, 1.0, -1.0, 50.0, -50.0, 500.0, -500.0, 1e4, -1e4)  # rho and delta, nats
NEAR_0 = (
    1e-6,
    -1e-6,
    1e-3,
    -1e-3,
)  # in float64 alone: beside log-probs, float32 has no such digits
# At margins up to the first of these a loss must be finite, up to the second it must not be NaN.
DEFAULTS_REACH, OTHERS_REACH = (50.0, math.inf), (1.0, 50.0)  # at its defaults, at other betas
BETAS = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0)
SIZES = (1, 2, 10)  # pairs in a batch
FLOAT32_MAX = torch.finfo(torch.float32).max
# What rounding in float32 moves a margin by, nats: at log-probs of -2e4 nats over 100 tokens (see
# pairs_at) a mean over tokens is off by up to 8e-6 nats, the margin of four of them by 3e-3.
ROUNDING = 4e-3
FLOAT32_TOLERANCE = 1e-4  # relative, of float32 against float64
SMALLEST_EDGE = 1e-3  # nats; below it, where exactly a loss leaves float32 tells nobody anything
# What a loss of the user's may raise on inputs that it was not written for.
RAISED = (TypeError, ValueError, AttributeError, RuntimeError, LookupError, ArithmeticError)
RAISED += (NameError, AssertionError)
# The curves of --figure: label, loss, parameters besides beta.
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
    """The result of a self-test."""

    notes: list[str]  # worth knowing before training with the loss
    failures: list[str]  # to be fixed before training with the loss
    couples: bool = False  # the pairs of a batch
    needs_two: bool = False  # pairs in a batch


def pairs_at(rho: Tensor, tokens: float = 100.0) -> PairLogps:
    """Pairs with margins rho = delta = `rho` (B,), nats, half of it on each response, around
    log-probabilities of -2e4 nats under the reference.
    """
    base, count = torch.full_like(rho, -2e4), torch.full_like(rho, tokens)
    return PairLogps(
        chosen=base + rho / 2,
        rejected=base - rho / 2,
        ref_chosen=base,
        ref_rejected=base,
        chosen_tokens=count,
        rejected_tokens=count,
    )


def random_pairs(
    size: int, dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 60.0
) -> PairLogps:
    """Ordinary pairs: log-probabilities from -scale to 0 nats, 5 to 39 tokens, and constants as
    token-level sums. The same values in every dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    values = -scale * torch.rand(4, size, dtype=torch.float64, generator=generator)
    lengths = torch.randint(5, 40, (2, size), generator=generator)
    chosen, rejected, ref_chosen, ref_rejected = values.to(dtype)
    chosen_tokens, rejected_tokens = lengths.to(dtype)
    return PairLogps(
        chosen=chosen,
        rejected=rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
        kl_chosen=torch.ones(size, dtype=dtype),
        kl_rejected=torch.full((size,), 2.0, dtype=dtype),
        score_chosen=torch.full((size,), 30.0, dtype=dtype),
    )


def map_tensors(function: Callable[..., Tensor], *pairs: PairLogps) -> PairLogps:
    """PairLogps whose tensors are `function` of the corresponding tensors of `pairs`."""
    first = pairs[0]
    return first._replace(
        **{
            name: function(*(getattr(p, name) for p in pairs))
            for name, value in first._asdict().items()
            if isinstance(value, Tensor)
        }
    )


def value_and_gradient(loss: Callable, rho: Tensor, parameters: dict) -> tuple[Tensor, Tensor]:
    """The loss and d loss / d rho at each margin of `rho` (B,), (B,) each."""
    rho = rho.detach().requires_grad_()
    values = loss(pairs_at(rho), **parameters)[0]
    (gradient,) = torch.autograd.grad(values.sum(), rho)
    return values.detach(), gradient


def refuses_one_pair(loss: Callable) -> str | None:
    """What a loss says to a single pair that it refuses with a ValueError; None if it takes it."""
    try:
        loss(random_pairs(1))
    except ValueError as error:
        return str(error)
    return None


def check_shapes(loss: Callable, notes: list[str], failures: list[str]) -> None:
    """One finite loss per pair and terms of the same shape, for batches of several sizes."""
    for size in SIZES:
        if size == 1 and (reason := refuses_one_pair(loss)) is not None:
            notes.append(f"refuses a single pair: {reason}")
            continue
        result = loss(random_pairs(size))
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
            failures.append(
                "must return (losses, terms): a (B,) tensor with one loss per pair, and a dict of "
                "(B,) tensors"
            )
            return
        losses, terms = result
        for name, value in {"the loss": losses, **terms}.items():
            if isinstance(value, Tensor) and value.shape == (size,):
                continue
            actual = f"is a {type(value).__name__}"
            if isinstance(value, Tensor):
                actual = f"has shape {tuple(value.shape)}"
            failures.append(
                f"{name} {actual} for {size} pairs: return one value per pair, shape ({size},)"
            )
        if not failures and not losses.isfinite().all():
            failures.append(f"not finite for {size} pair(s){hint_at_two_pairs(loss, size)}")
        if failures:
            return


def hint_at_two_pairs(loss: Callable, size: int) -> str:
    """For a loss that is not finite for `size` pairs: whether that is because it is one."""
    both = map_tensors(lambda x, y: torch.cat([x, y]), random_pairs(1), random_pairs(1, seed=1))
    if size > 1 or not loss(both)[0].isfinite().all():
        return ": its value is NaN or infinite on ordinary log-probabilities"
    return "; a loss that needs more pairs raises ValueError"


def check_finite(loss: Callable, notes: list[str], failures: list[str]) -> None:
    """Value and gradient in float32, over MARGINS and BETAS: right wherever the value computed in
    float64 fits float32. Where it does not, a note names the margin from which on; at margins that
    real steps have it is a failure.
    """
    settings, default = [{}], loss_options.own_defaults(loss).get("beta")
    if default is not None:
        settings = [{"beta": beta} for beta in dict.fromkeys((default, *BETAS))]
    for parameters in settings:
        reach = DEFAULTS_REACH if parameters.get("beta") == default else OTHERS_REACH
        problems = [misfit(loss, margin, parameters, reach) for margin in (*MARGINS, *NEAR_0)]
        if any(problems):
            failures += filter(None, problems)
            return
        outside = []
        for margin in MARGINS:
            if not fits_float32(loss, margin, parameters):
                outside.append(margin)
                continue
            rho = two_pairs_at(margin)
            single = value_and_gradient(loss, rho, parameters)
            double = value_and_gradient(loss, rho.double(), parameters)
            if not all(x.isfinite().all() for x in single):
                failures.append(
                    f"not finite in float32 at rho {margin:g}, {parameters}, where its value fits"
                )
            elif not is_right(loss, rho, single, double, parameters):
                failures.append(
                    f"float32 is off at rho {margin:g}, {parameters}: {single[0][0]:g} instead of "
                    f"{double[0][0]:g}"
                )
        label = "".join(f"{key} {value:g}: " for key, value in parameters.items())
        fits = partial(fits_float32, loss, parameters=parameters)
        for side in (-1, 1):
            beyond = [margin for margin in outside if margin * side > 0]
            if beyond:
                edge = overflow_edge(fits, outside=max(beyond, key=abs))
                notes.append(f"{label}leaves float32 beyond rho {edge:.4g}")
    if "discopop_form" in loss_options.own_defaults(loss):
        notes.append(published_overflow(loss))


def is_right(
    loss: Callable,
    rho: Tensor,
    single: tuple[Tensor, Tensor],
    double: tuple[Tensor, Tensor],
    parameters: dict,
) -> bool:
    """Whether value and gradient in float32 are those in float64, at the margin rho or at one that
    float32 cannot tell from it.
    """
    if all(torch.allclose(x.double(), y, rtol=1e-3, atol=1e-6) for x, y in zip(single, double)):
        return True
    near = [value_and_gradient(loss, rho.double() + x, parameters) for x in (-ROUNDING, ROUNDING)]
    for x, y, *others in zip(single, double, *near):
        slack = torch.stack([(other - y).abs() for other in others]).amax(0)
        if not ((x.double() - y).abs() <= 1e-6 + 1e-3 * y.abs() + slack).all():
            return False
    return True


def misfit(
    loss: Callable, margin: float, parameters: dict, reach: tuple[float, float]
) -> str | None:
    """What is wrong with value and gradient at `margin`, computed in float64: beyond float32's
    range, or NaN, at margins up to `reach`; None if nothing is.
    """
    finite_to, a_number_to = reach
    values = value_and_gradient(loss, two_pairs_at(margin, torch.float64), parameters)
    for name, x in zip(("value", "gradient"), values):
        if abs(margin) <= a_number_to and x.isnan().any():
            kind = "NaN"
        elif abs(margin) <= finite_to and not (x.abs() < FLOAT32_MAX).all():
            kind = "infinite in float32"
        else:
            continue
        where = ", where every run starts" if margin == 0 else ""
        return f"its {name} is {kind} at rho {margin:g}, {parameters}{where}"
    return None


def two_pairs_at(margin: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A margin twice, (2,): two pairs, for losses that need the batch's statistics."""
    return torch.full((2,), margin, dtype=dtype)


def fits_float32(loss: Callable, margin: float, parameters: dict) -> bool:
    """Whether value and gradient at `margin`, computed in float64, are within float32's range."""
    both = value_and_gradient(loss, two_pairs_at(margin, torch.float64), parameters)
    return all(bool((x.abs() < FLOAT32_MAX).all()) for x in both)


def overflow_edge(fits: Callable[[float], bool], outside: float) -> float:
    """The margin where `fits` turns false, to four digits, by bisection between 0, where it is
    true, and `outside`, where it is false. Ends at SMALLEST_EDGE: between floats a loss may be
    anything.
    """
    inside = 0.0
    while abs(outside - inside) > max(1e-4 * abs(outside), SMALLEST_EDGE):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if fits(middle) else (inside, middle)
    return inside


def published_overflow(loss: Callable) -> str:
    """Where the published form of DiscoPOP overflows float32, at beta 1, at which rho is z."""
    published = {"beta": 1.0, "discopop_form": "published"}

    def value_at(margin: float) -> Tensor:
        return value_and_gradient(loss, two_pairs_at(margin), published)[0]

    edge = overflow_edge(lambda margin: bool(value_at(margin).isfinite().all()), outside=-1e4)
    beyond = value_at(edge - 1)[0].item()
    return f"discopop_form published is {beyond} in float32 beyond z {edge:.4g}"


def check_precision(loss: Callable, notes: list[str], failures: list[str]) -> None:
    """float32 against float64 on ordinary pairs."""
    single, double = (loss(random_pairs(64, dtype))[0] for dtype in (torch.float32, torch.float64))
    # A pair whose loss happens to be almost 0, as just before the kink of a hinge, is compared with
    # what the others lose.
    size = double.abs()
    scale = size.clamp(min=max(1e-3, 0.01 * size.mean().item()))
    worst = ((single.double() - double).abs() / scale).max().item()
    if not worst < FLOAT32_TOLERANCE:
        failures.append(f"float32 differs from float64 by {worst:.1e} (relative) on ordinary pairs")


def check_start(loss: Callable, notes: list[str], failures: list[str]) -> None:
    """The gradient of ordinary pairs, and of pairs on which the policy is still its reference."""
    ordinary = random_pairs(10, torch.float32)
    start = ordinary._replace(ref_chosen=ordinary.chosen, ref_rejected=ordinary.rejected)
    for where, pairs in {"on ordinary pairs": ordinary, "where every run starts": start}.items():
        names = ("chosen", "rejected", "score_chosen")
        leaves = {name: getattr(pairs, name).clone().requires_grad_() for name in names}
        total = loss(pairs._replace(**leaves))[0].sum()
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        bad = [
            name
            for name, gradient in zip(leaves, gradients)
            if gradient is not None and not gradient.isfinite().all()
        ]
        if bad:
            failures.append(f"d loss / d {bad[0]} is not finite {where}")


def check_sign(loss: Callable, notes: list[str], failures: list[str]) -> None:
    """The gradient at rho = 0. A wrong sign is a note, since DiscoPOP is published with one."""

    def gradients_at(margin: float) -> Tensor:
        return value_and_gradient(loss, two_pairs_at(margin, torch.float64), {})[1]

    gradient = gradients_at(0.0)[0].item()
    if gradient > 1e-9:
        notes.append(f"WARNING: its gradient at rho = 0 points the wrong way ({gradient:+.3g})")
    elif abs(gradient) < 1e-12:
        notes.append("has no gradient at rho = 0")
        steepest = max(gradients_at(margin).abs().max() for margin in (-1.0, 1.0))
        if steepest < 1e-12 and not couples(loss):
            failures.append("has no gradient at rho -1, 0 and 1: it would train nothing")


def couples(loss: Callable) -> bool:
    """Whether a pair's loss depends on the other pairs of the batch, or on their order. Tried at
    two scales, because a statistic of the batch may saturate at one of them.
    """
    backwards = torch.arange(9, -1, -1)
    for scale in (60.0, 0.5):
        pairs, others = random_pairs(10, scale=scale), random_pairs(10, seed=1, scale=scale)
        values = loss(pairs)[0]
        replaced = map_tensors(lambda x, y: torch.cat([x[:1], y[1:]]), pairs, others)
        if not torch.allclose(loss(replaced)[0][0], values[0], rtol=1e-9):
            return True
        permuted = map_tensors(lambda x: x[backwards], pairs)
        if not torch.allclose(loss(permuted)[0], values[backwards], rtol=1e-9):
            return True
    return False


def check_coupling(
    loss: Callable, declared: bool | None, notes: list[str], failures: list[str]
) -> None:
    """Whether the batch is coupled, as COUPLES_BATCH states for the losses of losses.py."""
    is_coupled = couples(loss)
    if is_coupled:
        notes.append("couples the pairs of a micro-batch: results depend on --per_device_batch")
    if declared is not None and is_coupled != declared:
        failures.append(
            f"{'couples' if is_coupled else 'does not couple'} the batch, COUPLES_BATCH says "
            "otherwise"
        )


def try_parameters(loss: Callable[[PairLogps], tuple], size: int = 4) -> str | None:
    """What goes wrong when a loss with bound parameters meets ordinary pairs; None if nothing."""
    try:
        values = loss(random_pairs(size, torch.float32))[0]
    except RAISED as error:
        return f"raises {type(error).__name__}: {first_line(error)}"
    return None if values.isfinite().all() else "is not finite on ordinary pairs"


def check(name: str) -> Report:
    """Self-test loss `name` at its default parameters."""
    declared = None if name in loss_options.FROM_FILES else name in COUPLES_BATCH
    return check_function(LOSSES[name], declared)


def check_function(loss: Callable, declared: bool | None = None) -> Report:
    """Self-test a loss at its default parameters. An exception that it raises is reported as a
    failure. declared: whether it is said to couple the batch; None where nothing is.
    """
    notes, failures = [], []
    try:
        check_shapes(loss, notes, failures)
        if not failures:  # the other checks rely on the shapes
            check_finite(loss, notes, failures)
            check_precision(loss, notes, failures)
            check_start(loss, notes, failures)
            check_sign(loss, notes, failures)
            check_coupling(loss, declared, notes, failures)
    except RAISED as error:
        failures.append(f"raises {type(error).__name__}: {first_line(error)}")
    if failures:
        return Report(notes, failures)
    return Report(notes, failures, couples(loss), refuses_one_pair(loss) is not None)


def curve(loss: Callable, rho: Tensor, parameters: dict) -> tuple[Tensor, Tensor]:
    """The loss and its gradient at each margin of `rho`, (len(rho),) each. Every margin is a batch
    of its own, of two equal pairs.
    """
    points = [value_and_gradient(loss, margin.repeat(2), parameters) for margin in rho]
    values = torch.stack([value[0] for value, _ in points])
    # Where the batch is coupled, a pair's gradient includes its effect on the other one.
    gradients = torch.stack([gradient.sum() for _, gradient in points]) / 2
    return values, gradients


def draw_curves(axes, rho: Tensor, curves: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Draw losses on the first of two axes and gradients on the second."""
    loss_axis, gradient_axis = axes
    for colour, (label, (values, gradients)) in zip(drawing.COLOURS * 2, curves.items()):
        style = {"label": label, "color": colour, "linewidth": 1.6}
        loss_axis.plot(rho, values, **style)
        gradient_axis.plot(rho, gradients, **style)
    loss_axis.set_ylabel("loss")
    gradient_axis.set_ylabel("d loss / d rho")
    for axis in axes:
        axis.set_xlabel("margin rho = delta (nats)")
        axis.grid(alpha=0.3)
        axis.axvline(0, color=drawing.GREY, linewidth=0.8, zorder=0)


def scale_values(axis, linear: float) -> None:
    """A scale that is linear up to about `linear` and logarithmic far above, without a kink where
    the one becomes the other; with plain numbers at powers of ten.
    """
    curves = [line for line in axis.get_lines() if not line.get_label().startswith("_")]
    values = [float(y) for line in curves for y in line.get_ydata()]
    values = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = (math.asinh(end / linear) for end in (min(values), max(values)))
    room = 0.05 * (high - low) or 1.0
    axis.set_yscale("asinh", linear_width=linear)
    powers = [linear * 10**k for k in range(9)]
    axis.set_yticks([*(-power for power in powers[::-1]), 0, *powers])
    axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axis.minorticks_off()
    axis.set_ylim(linear * math.sinh(low - room), linear * math.sinh(high + room))


@drawing.own_style()
def plot_check(name: str, path: Path) -> None:
    """Plot a loss and its gradient over the margin, for a few betas."""
    loss, rho = LOSSES[name], torch.linspace(-20, 20, 161, dtype=torch.float64)
    if "beta" in loss_options.own_defaults(loss):
        curves = {f"β={beta:g}": curve(loss, rho, {"beta": beta}) for beta in STUDY_BETAS}
    else:
        curves = {name: curve(loss, rho, {})}
    figure = drawing.new_figure(drawing.WIDE, 3.6, f"{name}: loss and gradient of one pair")
    axes = figure.subplots(1, 2)
    draw_curves(axes, rho, curves)
    for axis in axes:
        scale_values(axis, 1)
    labels = axes[0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)


@drawing.own_style()
def plot_study(path: Path) -> None:
    """Plot the losses of the first study and their gradients, one row per beta."""
    rho = torch.linspace(-10, 10, 161, dtype=torch.float64)
    figure = drawing.new_figure(drawing.WIDE, 11, "The losses of the first study")
    rows = figure.subplots(len(STUDY_BETAS), 2)
    for axes, beta in zip(rows, STUDY_BETAS):
        curves = {
            label: curve(LOSSES[name], rho, {"beta": beta, **parameters})
            for label, (name, parameters) in STUDY_LOSSES.items()
        }
        draw_curves(axes, rho, curves)
        loss_axis, gradient_axis = axes
        scale_values(loss_axis, 1)
        scale_values(gradient_axis, 0.1)
        loss_axis.set_title(f"β={beta:g}", loc="left")
    labels = rows[0][0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=110)
