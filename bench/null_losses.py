"""Losses of a study whose truth is known: bench/null_study.py.

--loss_file bench/null_losses.py:dpo_again    DPO under another name: no difference is true
--loss_file bench/null_losses.py:noisy_dpo    DPO on labels of which two in five are wrong
"""

import torch

from losses import PairLogps, dpo


def dpo_again(pairs: PairLogps, *, beta=0.1):
    """sp(-z)"""
    return dpo(pairs, beta=beta)


def noisy_dpo(pairs: PairLogps, *, beta=0.1, wrong=0.4):
    """sp(-z), for a share `wrong` of the pairs sp(z)

    Which pairs these are is drawn by a hash of their reference log-probabilities: the same in every
    epoch and in runs with any seed, and no pair of the data changes.
    """
    labels = torch.where(draw(pairs) < wrong, -1.0, 1.0)
    losses = torch.nn.functional.softplus(-beta * labels * pairs.rho)
    return losses, {"preference": losses}


def draw(pairs: PairLogps) -> torch.Tensor:
    """(B,) numbers from 0 to 1, as good as uniform: digits of the reference log-probabilities."""
    digits = 1009.0 * pairs.ref_chosen.double() + 1013.0 * pairs.ref_rejected.double()
    return digits.frac().abs()
