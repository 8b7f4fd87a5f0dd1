"""dlrml's mixing weight `beta_mix` as a trained parameter."""

import argparse
import math

import torch
from torch import Tensor

from pref.model.ranks import Ranks


class LearnedMix:
    """beta_mix with its own optimiser; without --learn_beta_mix, nothing: every method is then a
    no-op.

    Its logarithm is trained, so that beta_mix stays positive.
    """

    def __init__(self, args: argparse.Namespace, parameters: dict, device: torch.device):
        self.log_beta_mix = self.optimizer = None
        if args.learn_beta_mix:
            start = torch.tensor(math.log(parameters["beta_mix"]), device=device)
            self.log_beta_mix = torch.nn.Parameter(start)
            self.optimizer = torch.optim.AdamW(
                [self.log_beta_mix], lr=args.beta_mix_lr, weight_decay=0.0
            )

    @property
    def beta_mix(self) -> float | None:
        return None if self.log_beta_mix is None else self.log_beta_mix.exp().item()

    def loss_parameters(self) -> dict[str, Tensor]:
        """What replaces the loss's own parameters, with its gradient."""
        return {} if self.log_beta_mix is None else {"beta_mix": self.log_beta_mix.exp()}

    def trained(self) -> dict[str, tuple[torch.nn.Parameter, torch.optim.Optimizer]]:
        """Parameters by name, each with its optimiser, as checkpoint.Checkpoints takes them."""
        return (
            {} if self.optimizer is None else {"log_beta_mix": (self.log_beta_mix, self.optimizer)}
        )

    def sum_gradient(self, ranks: Ranks) -> None:
        """Add the gradient over ranks, as sharding.py does for the adapter."""
        if self.log_beta_mix is not None:
            self.log_beta_mix.grad = ranks.sum(self.log_beta_mix.grad)

    def step(self) -> None:
        if self.optimizer:
            self.optimizer.step()

    def zero_grad(self) -> None:
        if self.optimizer:
            self.optimizer.zero_grad()
