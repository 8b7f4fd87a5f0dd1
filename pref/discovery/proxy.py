"""A training run in milliseconds: the policy to first order, on features of real pairs.

A LoRA adapter changes a response's log-probability, and to first order the change is a product of
the response's derivative phi with the adapter's parameters. So the proxy's policy has

    chosen = ref_chosen + phi_chosen . theta        rejected = ref_rejected + phi_rejected . theta

and theta, which starts at 0, is trained as train_pref.py trains an adapter: the same batches for a
seed, AdamW, clipping, warm-up and cosine. Log-probs, lengths and wrong labels are those of the real
pairs. What it cannot see: whatever comes only with large moves of the policy, and dropout.
"""

import argparse
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from losses import PairLogps
from pref.discovery.features import Features, Part
from pref.training import schedule

Loss = Callable[[PairLogps], tuple[Tensor, dict[str, Tensor]]]
# AdamW as train_pref.py has it: torch's betas and eps, the default --weight_decay, --max_grad_norm
# and --warmup_ratio.
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
WEIGHT_DECAY, MAX_GRAD_NORM, WARMUP_RATIO = 0.01, 1.0, 0.1
VISITED = 0.9  # quantile of the log-ratios' sizes


class Outcome(NamedTuple):
    """What a trained proxy does on n pairs that it was not trained on."""

    accuracy: float  # share of pairs with rho > 0; a tie counts half
    bits: float  # see `bits_over_chance`
    correct: np.ndarray  # (n,) 1, 0.5 or 0 a pair; its mean is `accuracy`
    margins: np.ndarray  # (n,) rho, nats
    visited: float  # nats: 90 % of the log-ratios a and b of these pairs lie within it
    nonfinite: int  # steps whose loss or gradient was not finite, and that were not taken


def train(
    loss: Loss,
    features: Features,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    part: str = "val",
) -> Outcome:
    """Train the linear policy by `loss` and look at it on the pairs of `part`.

    loss: as a function of the pairs alone, one value a pair. steps, batch: optimiser steps, and
    pairs in each. learning_rate: peak, in the unit of `Features`. The result is a function of the
    arguments: the same on every call.
    """
    training = features.train
    rates = argparse.Namespace(learning_rate=learning_rate, warmup_ratio=WARMUP_RATIO)
    theta = torch.zeros(training.phi_chosen.shape[1])
    first, second = torch.zeros_like(theta), torch.zeros_like(theta)  # AdamW's moments
    taken = nonfinite = 0
    running_rho = 0.0

    for step in range(steps):
        # 1) Which pairs, which learning rate: as in train_pref.py.
        members = schedule.pairs_of_step(step, training.pairs, batch, seed)
        rate = schedule.learning_rate_at(step, steps, rates)

        # 2) The clipped gradient of the batch's mean loss; a step without one is not taken.
        value, rho, gradient = gradient_of(loss, training, members, theta, running_rho)
        norm = gradient.norm().item()
        if not (math.isfinite(value) and math.isfinite(norm)):
            nonfinite += 1
            continue
        gradient = gradient * min(1.0, MAX_GRAD_NORM / (norm + 1e-6))

        # 3) AdamW, written out: torch.optim imports torch._dynamo at its first step, which takes
        #    seconds, and opens files, which a confined process cannot.
        taken += 1
        first = BETA1 * first + (1 - BETA1) * gradient
        second = BETA2 * second + (1 - BETA2) * gradient.square()
        size = (second / (1 - BETA2**taken)).sqrt() + EPS
        theta = theta * (1 - rate * WEIGHT_DECAY) - rate / (1 - BETA1**taken) * first / size
        running_rho = 0.9 * running_rho + 0.1 * rho

    return outcome(features.parts[part], theta, nonfinite)


def gradient_of(
    loss: Loss, part: Part, members: list[int], theta: Tensor, running_rho: float
) -> tuple[float, float, Tensor]:
    """Mean loss and mean rho of the pairs `members`, and the gradient for theta (D,)."""
    rows = Part(*(tensor[members] for tensor in part))
    theta = theta.detach().requires_grad_()
    pairs = pair_logps(rows, theta, running_rho)
    losses, _ = loss(pairs)
    value = losses.sum() / len(members)
    (gradient,) = torch.autograd.grad(value, theta)
    return value.item(), pairs.rho.mean().item(), gradient


def pair_logps(part: Part, theta: Tensor, running_rho: float = 0.0) -> PairLogps:
    """What a loss may read of the pairs of `part` under the policy theta."""
    return PairLogps(
        chosen=part.ref_chosen + part.phi_chosen @ theta,
        rejected=part.ref_rejected + part.phi_rejected @ theta,
        ref_chosen=part.ref_chosen,
        ref_rejected=part.ref_rejected,
        chosen_tokens=part.chosen_tokens,
        rejected_tokens=part.rejected_tokens,
        running_rho=running_rho,
    )


def outcome(part: Part, theta: Tensor, nonfinite: int) -> Outcome:
    """The policy theta on the pairs of `part`. Log-ratios are taken as phi . theta: as differences
    of log-probs of hundreds of nats they would be rounded, and ties would be decided by that.
    """
    a, b = (part.phi_chosen @ theta).numpy(), (part.phi_rejected @ theta).numpy()
    rho = (a - b).astype(np.float64)
    correct = (rho > 0) + 0.5 * (rho == 0)
    return Outcome(
        accuracy=float(correct.mean()),
        bits=bits_over_chance(rho),
        correct=correct,
        margins=rho,
        visited=float(np.quantile(np.abs(np.concatenate([a, b])), VISITED)),
        nonfinite=nonfinite,
    )


def bits_over_chance(rho: np.ndarray) -> float:
    """1 - min over s >= 0 of the mean log-loss log2(1 + exp(-s rho)): what the margins say about
    the labels at the temperature that suits them best, since the scale of rho is the loss's own
    business. 0 if they say nothing, or the opposite; 1 if they are all right.
    """
    size = np.abs(rho).mean()
    if size == 0 or rho.mean() <= 0:
        return 0.0  # the log-loss is convex in s, and does not fall at s = 0
    if rho.min() > 0:
        return 1.0
    rho = rho / size

    def slope(s: float) -> float:  # minus the derivative, in nats
        return float((rho / (1 + np.exp(np.minimum(s * rho, 500.0)))).mean())

    low, high = 0.0, 1.0
    while slope(high) > 0 and high < 1e6:
        low, high = high, 2 * high
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return float(1 - np.logaddexp(0, -low * rho).mean() / math.log(2))


def stop_reason(outcomes: list[Outcome]) -> str | None:
    """Why a candidate with these outcomes, one a seed on the same pairs, goes no further; None if
    it does: steps that were not finite, or an accuracy more than 3 standard errors below chance.
    """
    if any(outcome.nonfinite for outcome in outcomes):
        steps = sum(outcome.nonfinite for outcome in outcomes)
        return f"its loss or gradient is not finite in {steps} steps of the proxy"
    by_pair = np.mean([outcome.correct for outcome in outcomes], axis=0)
    accuracy, pairs = float(by_pair.mean()), len(by_pair)
    se = 0.5 / math.sqrt(pairs)
    if accuracy < 0.5 - 3 * se:
        return (
            f"learns the wrong way: accuracy {accuracy:.3f} on {pairs} pairs, below 0.5 - 3 x "
            f"{se:.3f}"
        )
    return None
