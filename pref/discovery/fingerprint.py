"""What a loss does, as numbers: its gradient over a grid of log-ratios.

Two losses with the same gradient train alike, however they are written. AdamW with gradient
clipping does not see a constant factor either. So losses are compared by `field`, the gradient up
to scale:

1. d loss / d chosen and d loss / d rejected at 11 x 11 log-ratios a, b, at five settings of the
   reference and of the lengths, in float64;
2. every point weighs exp(-(|a| + |b|) / (2 scale)), where scale is about how far training moves the
   log-ratios (nats): what it does not visit does not tell two losses apart;
3. divided by the weighted RMS of the whole, then asinh: a tail that grows without bound must not
   drown the rest.

`distance` is the weighted RMS of the difference of two fields, and below NEAR two losses are the
same for the search. `range_problem` says from the same grid why a loss cannot be trained with.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from losses import PairLogps, dpo

Loss = Callable[[PairLogps], tuple]

RATIOS = (0.0, 0.3, -0.3, 1.0, -1.0, 3.0, -3.0, 10.0, -10.0, 30.0, -30.0)  # a and b, nats
SETTINGS = (  # (ref_chosen, ref_rejected) in nats, (chosen_tokens, rejected_tokens)
    ((-100.0, -100.0), (80.0, 80.0)),
    ((-95.0, -105.0), (80.0, 80.0)),  # the reference ranks the pair right
    ((-105.0, -95.0), (80.0, 80.0)),  # and wrong
    ((-200.0, -100.0), (160.0, 80.0)),  # the chosen response is the longer one
    ((-100.0, -200.0), (80.0, 160.0)),
)
LEAST_SCALE = 0.3  # nats: the grid's smallest step; within less it tells nothing apart
TENSORS = PairLogps._fields[:6]  # of the fields, those that every loss has
NEAR = 0.03  # distance; beta 0.1 and 0.11 of dpo are 0.02 apart, 0.1 and 0.2 are 0.13
MOST_GRADIENT = 1e6
MOST_WRONG = 0.5  # share of the badly ranked pairs of the grid; 0.22 for discopop
PROFILE = (-10.0, -3.0, 0.0, 3.0, 10.0)  # margins at which a loss is compared with dpo, nats

# Cells: the names of the three parts, in order.
LEFT = ("lets-go", "constant-tail", "pulls-harder")  # what a pair that is ranked badly gets
RIGHT = ("stops", "pulls-back", "keeps-pushing")  # and one that is ranked well
SHIFT = ("free", "held")  # whether both responses may become likelier together
FAR, COMMON = 20.0, 5.0  # nats
NOTHING = 0.01  # of the gradient at margin 0


class Gradients(NamedTuple):
    """d loss / d chosen and d loss / d rejected of each pair, (n,) each."""

    chosen: Tensor
    rejected: Tensor

    @property
    def margin(self) -> Tensor:
        """d loss / d rho, where half of a margin comes from each response."""
        return (self.chosen - self.rejected) / 2


def pairs_at(a: Tensor, b: Tensor, references: tuple, tokens: tuple) -> PairLogps:
    """Pairs with log-ratios `a` and `b` (n,), nats, at one of SETTINGS."""
    ref_chosen, ref_rejected = (torch.full_like(a, value) for value in references)
    chosen_tokens, rejected_tokens = (torch.full_like(a, value) for value in tokens)
    return PairLogps(
        chosen=ref_chosen + a,
        rejected=ref_rejected + b,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
    )


@functools.cache
def grid() -> PairLogps:
    """All points, (605,): the settings one after the other, in each of them a before b."""
    ratios = torch.tensor(RATIOS, dtype=torch.float64)
    a, b = ratios.repeat_interleave(len(ratios)), ratios.repeat(len(ratios))
    parts = [pairs_at(a, b, *setting) for setting in SETTINGS]
    return PairLogps(**{n: torch.cat([getattr(part, n) for part in parts]) for n in TENSORS})


def gradients(loss: Loss, pairs: PairLogps) -> Gradients:
    """The gradient of the summed loss, all pairs as one batch."""
    chosen, rejected = (x.clone().requires_grad_() for x in (pairs.chosen, pairs.rejected))
    values = loss(pairs._replace(chosen=chosen, rejected=rejected))[0]
    if not values.requires_grad:
        return Gradients(torch.zeros_like(chosen), torch.zeros_like(rejected))
    found = torch.autograd.grad(
        values.sum(), (chosen, rejected), allow_unused=True, materialize_grads=True
    )
    return Gradients(*found)


def weights(pairs: PairLogps, scale: float) -> Tensor:
    """How much each point counts, (n,), in sum 1."""
    a, b = pairs.log_ratios
    weight = torch.exp(-(a.abs() + b.abs()) / (2 * max(scale, LEAST_SCALE)))
    return weight / weight.sum()


def rms(found: Gradients, weight: Tensor) -> Tensor:
    """The weighted RMS of a gradient, ()."""
    both = torch.stack(found)
    largest = both.abs().max()  # before squaring, or small and large ones leave float64
    if largest == 0 or not largest.isfinite():
        return largest
    return largest * (weight * (both / largest).square()).sum().sqrt()


def field(loss: Loss, scale: float) -> np.ndarray:
    """The gradient field of a loss, (1210,) float64: see the module's text. A loss without any
    gradient has a field of zeros.

    scale: nats; at least LEAST_SCALE is used. Raises ValueError if a gradient is not finite;
    range_problem says where.
    """
    pairs = grid()
    found, weight = gradients(loss, pairs), weights(pairs, scale)
    size = rms(found, weight)
    if not size.isfinite():
        raise ValueError("its gradient is not finite on the grid of log-ratios")
    if size == 0:
        size = torch.ones(())
    parts = [weight.sqrt() * torch.asinh(part / size) for part in found]
    return torch.cat(parts).numpy()


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """How differently two losses pull, from their fields: 0 for the same gradient up to scale."""
    return float(np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b, np.float64)))


def range_problem(loss: Loss) -> str | None:
    """Why a loss cannot be trained with, from its gradient on the grid: not finite (in float32,
    which training uses, or in float64), enormous, or against the label for most of the pairs that
    are ranked badly. None if nothing is.
    """
    pairs = grid()
    found = gradients(loss, pairs)
    single = gradients(loss, pairs._replace(**{n: getattr(pairs, n).float() for n in TENSORS}))
    for name, exact, rounded in zip(Gradients._fields, found, single):
        for precision, values in (("", exact), (" in float32", rounded)):
            if not values.isfinite().all():
                place = where(pairs, ~values.isfinite())
                return f"d loss / d {name} is not finite{precision} {place}"
        if exact.abs().max() > MOST_GRADIENT:
            place = where(pairs, exact.abs() > MOST_GRADIENT)
            return f"d loss / d {name} is above {MOST_GRADIENT:g} {place}"
    badly = pairs.rho < -1e-6  # not what rounding makes of 0
    wrong = (found.margin > 0) & badly
    share = (wrong.sum() / badly.sum()).item()
    if share > MOST_WRONG:
        return (
            f"pushes {share:.0%} of the badly ranked pairs (rho < 0) the wrong way; lowering the "
            "loss must raise the chosen response against the rejected one"
        )
    return None


def where(pairs: PairLogps, bad: Tensor) -> str:
    """The point nearest to the reference of those that are `bad`, (n,) bool."""
    a, b = pairs.log_ratios
    far = (a.abs() + b.abs()).masked_fill(~bad, torch.inf)
    first = int(far.argmin())
    point = f"at a = {a[first]:g}, b = {b[first]:g} nats"
    return point + (", where every run starts" if far[first] == 0 else "")


def gradients_at(loss: Loss, a: Sequence[float], b: Sequence[float]) -> Gradients:
    """At log-ratios a and b, nats, in the first of SETTINGS."""
    a, b = (torch.tensor(values, dtype=torch.float64) for values in (a, b))
    return gradients(loss, pairs_at(a, b, *SETTINGS[0]))


def profile(loss: Loss, scale: float) -> dict[str, float]:
    """The gradient in rho at the margins of PROFILE, relative to dpo's (beta 0.1) when both are
    scaled to the same size of field: 1 pulls as dpo does, 0 not at all, below 0 the wrong way.
    """
    relative = scaled_slopes(loss, scale) / dpo_slopes(scale)
    return {f"{margin:g}": round(x, 3) for margin, x in zip(PROFILE, relative.tolist())}


def scaled_slopes(loss: Loss, scale: float) -> Tensor:
    """d loss / d rho at the margins of PROFILE, divided by the size of the whole field, (5,)."""
    half = [margin / 2 for margin in PROFILE]
    slopes = gradients_at(loss, half, [-x for x in half]).margin
    pairs = grid()
    return slopes / (rms(gradients(loss, pairs), weights(pairs, scale)).item() or 1.0)


@functools.cache
def dpo_slopes(scale: float) -> Tensor:
    return scaled_slopes(dpo, scale)


def cell(loss: Loss) -> str:
    """Which of the 18 kinds of loss it is, e.g. "constant-tail,keeps-pushing,free": how it treats a
    pair far on the wrong side, one far on the right side, and a shift that both responses share.
    """
    # rho = 0, -FAR, FAR, then a = b = COMMON.
    found = gradients_at(loss, (0, -FAR / 2, FAR / 2, COMMON), (0, FAR / 2, -FAR / 2, COMMON))
    start, badly, well, _ = found.margin.tolist()
    unit = abs(start) or max(abs(badly), abs(well)) or 1.0
    tail = abs(badly) / unit
    left = LEFT[(tail >= 0.3) + (tail > 3)]
    right = RIGHT[0] if abs(well) < NOTHING * unit else RIGHT[1 if well > 0 else 2]
    common = (found.chosen + found.rejected)[3].item()
    return ",".join((left, right, SHIFT[common > NOTHING * unit]))
