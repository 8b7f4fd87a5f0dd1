"""Gradient field, distance, cell, range test: what the search takes two losses to be."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from losses import LOSSES, PairLogps, discopop, dlrml, dpo, hinge, ipo, robust, td_dpo
from pref.discovery import fingerprint

SCALE = 10.0


def between(a, b, scale: float = SCALE) -> float:
    return fingerprint.distance(fingerprint.field(a, scale), fingerprint.field(b, scale))


def of_margin(function, beta: float = 0.1):
    """A loss that is `function` of z."""
    return lambda pairs: (function(beta * pairs.rho), {})


# Written in another way, or times a factor: AdamW with clipping does not see the difference.
SAME = {
    "three times dpo": (dpo, lambda pairs: (3 * dpo(pairs)[0], {})),
    "a hundredth, and a constant": (dpo, lambda pairs: (0.01 * dpo(pairs)[0] + 7, {})),
    "log1p(exp(-z))": (dpo, of_margin(lambda z: torch.log1p(torch.exp(-z)))),
    "-log sigma(z)": (dpo, of_margin(lambda z: -torch.log(torch.sigmoid(z)))),
    "dlrml at beta_mix = beta": (discopop, partial(dlrml, beta_mix=0.05)),
    "td_dpo against the reference": (
        partial(dpo, beta=0.5),
        partial(td_dpo, margin="ref", kl="none", tau=2.0),
    ),
    "ipo times beta": (ipo, lambda pairs: (0.1 * ipo(pairs)[0], {})),
    "tiny": (dpo, lambda pairs: (1e-200 * dpo(pairs)[0], {})),
    "huge": (dpo, lambda pairs: (1e200 * dpo(pairs)[0], {})),
}


@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize("scale", [2.0, SCALE])
def test_the_same_loss_in_other_words_is_at_distance_0(kind, scale):
    assert between(*SAME[kind], scale) < 1e-6


def test_different_losses_are_further_apart_than_a_duplicate():
    assert between(dpo, partial(dpo, beta=0.11)) < fingerprint.NEAR
    for other in (partial(dpo, beta=0.2), robust, hinge, ipo, td_dpo, discopop):
        assert between(dpo, other) > fingerprint.NEAR
    assert between(dpo, hinge) < between(dpo, td_dpo) < between(dpo, discopop)


def test_what_training_does_not_visit_does_not_tell_losses_apart():
    far = of_margin(lambda z: torch.where(z > 2.5, 0 * z, torch.nn.functional.softplus(-z)))
    near = of_margin(lambda z: torch.where(z.abs() < 0.05, 0 * z, torch.nn.functional.softplus(-z)))
    assert between(dpo, far, scale=1.0) < 1e-3 < between(dpo, far, scale=30.0)
    assert between(dpo, near, scale=1.0) > 0.1


def test_a_scale_below_the_grid_is_the_smallest_that_it_has():
    assert np.array_equal(fingerprint.field(dpo, 0.0), fingerprint.field(dpo, 0.3))
    assert np.isfinite(fingerprint.field(td_dpo, 0.0)).all()


def test_the_field_of_dpo_by_hand():
    """Its gradient is -+ beta sigma(-beta (a - b)), whatever reference and length."""
    points = [(a, b) for a in fingerprint.RATIOS for b in fingerprint.RATIOS]
    points *= len(fingerprint.SETTINGS)
    weight = np.array([math.exp(-(abs(a) + abs(b)) / (2 * SCALE)) for a, b in points])
    weight /= weight.sum()
    slope = np.array([-0.1 / (1 + math.exp(0.1 * (a - b))) for a, b in points])
    size = math.sqrt(2 * (weight * slope**2).sum())
    expected = np.sqrt(weight) * np.arcsinh(slope / size)
    got = fingerprint.field(dpo, SCALE)
    assert got.dtype == np.float64 and got.shape == (1210,)
    assert np.allclose(got, np.concatenate([expected, -expected]), atol=1e-12)


def test_a_loss_without_gradient_has_a_field_of_zeros():
    constant = lambda pairs: (pairs.ref_chosen, {})  # noqa: E731
    assert not fingerprint.field(constant, SCALE).any()
    with pytest.raises(ValueError, match="not finite"):
        fingerprint.field(of_margin(lambda z: z.abs().sqrt()), SCALE)


BAD = {
    "root": (lambda z: torch.nn.functional.softplus(-z) + z.abs().sqrt(), "every run starts"),
    "steep": (lambda z: torch.exp(-500 * z), "d loss / d chosen is not finite"),
    "large": (lambda z: torch.exp(-6 * z), "is above 1e+06 at a = "),
    "upside down": (torch.nn.functional.softplus, "pushes 100% of the badly ranked pairs"),
    "wrong but near 0": (lambda z: torch.relu(3 + z), "of the badly ranked pairs"),
    "float32 alone": (
        lambda z: torch.nn.functional.softplus(-z) + 1e-300 * torch.exp(-100 * z),
        "not finite in float32",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_the_range_test_says_why_a_loss_cannot_be_trained_with(kind):
    function, message = BAD[kind]
    assert message in fingerprint.range_problem(of_margin(function))


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_passes_the_range_test(name):
    assert fingerprint.range_problem(LOSSES[name]) is None


def test_the_share_of_badly_ranked_pairs_is_counted(monkeypatch):
    """Of the 55 points with a < b, at each of the five settings, some have |rho| < 2.85."""
    points = [(a, b) for a in fingerprint.RATIOS for b in fingerprint.RATIOS if a < b]
    share = sum(b - a < 2.85 for a, b in points) / len(points)
    monkeypatch.setattr(fingerprint, "MOST_WRONG", share - 0.01)
    loss = lambda pairs: (torch.where(pairs.rho.abs() < 2.85, pairs.rho, -pairs.rho), {})  # noqa: E731
    assert f"pushes {share:.0%} of" in fingerprint.range_problem(loss)
    monkeypatch.setattr(fingerprint, "MOST_WRONG", share + 0.01)
    assert fingerprint.range_problem(loss) is None


CELLS = {
    "dpo": "constant-tail,keeps-pushing,free",
    "hinge": "constant-tail,stops,free",
    "ipo_near": "pulls-harder,pulls-back,free",
    "apo_down": "lets-go,keeps-pushing,held",
    "exponential": "pulls-harder,keeps-pushing,free",
    "sppo_hard": "constant-tail,keeps-pushing,held",
    "td_dpo": "constant-tail,pulls-back,held",
}
OTHERS = {
    "ipo_near": partial(ipo, beta=0.1, logp="sum"),  # target margin of 5 nats
    "exponential": of_margin(lambda z: torch.exp(-z)),
}


@pytest.mark.parametrize("name", CELLS)
def test_cells(name):
    assert fingerprint.cell(OTHERS.get(name) or LOSSES[name]) == CELLS[name]


def test_a_profile_is_relative_to_dpo():
    assert set(fingerprint.profile(dpo, SCALE).values()) == {1.0}
    assert fingerprint.profile(lambda pairs: (5 * dpo(pairs)[0], {}), 3.0)["-10"] == 1.0
    flipped = fingerprint.profile(of_margin(torch.nn.functional.softplus), SCALE)
    assert list(flipped) == ["-10", "-3", "0", "3", "10"] and max(flipped.values()) < 0
    # hinge is -1 on the left of its target, dpo falls: at equal size it pulls less there.
    steps = fingerprint.profile(hinge, SCALE)
    assert steps["-10"] < steps["0"] < steps["10"]


def test_the_grid_has_log_probabilities_and_the_reference():
    pairs: PairLogps = fingerprint.grid()
    a, b = pairs.log_ratios
    assert pairs.chosen.max() < 0 and pairs.rejected.max() < 0
    assert ((a == 0) & (b == 0)).sum() == len(fingerprint.SETTINGS)
