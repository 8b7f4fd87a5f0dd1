"""The optimiser of a run: AdamW, on the adapter or on all parameters, or with moments in 8 bits.

- `--tune lora`: AdamW on the adapter's matrices, all of them with `--weight_decay`; with
  `--loraplus_lr_ratio` those called B have a learning rate of their own.
- `--tune full`: AdamW on all trained parameters. Norms and biases (one dimension) do not decay.
- `--optim adamw_8bit`: the same with the moments of bitsandbytes, 8 bits each, scaled in blocks of
  256. The blocks are of a rank's own shards, so that another number of ranks rounds differently.

Parameters that share settings are a group, a dict of torch.optim with a key of our own, `lr_ratio`:
its learning rate over that of the schedule.
"""

import argparse
from collections.abc import Mapping

import torch
from torch import nn

from pref.files.console import UserError, first_line
from pref.model import sharding
from pref.model.logps import ResponseLogps, trainable

BLOCK = 256  # moments that share a scale
TRIED = 4096  # elements of a tensor from which on bitsandbytes keeps its moments in 8 bits


def make(policy: ResponseLogps, args: argparse.Namespace) -> "torch.optim.Optimizer | AdamW8bit":
    """The optimiser of the policy's trained parameters, which must be sharded already."""
    parameters = trainable(policy)
    settings = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if args.tune == "lora":
        return torch.optim.AdamW(adapter_groups(args, parameters), **settings)
    groups = decay_groups(list(parameters.values()))
    if args.optim == "adamw_8bit":
        return AdamW8bit(groups, **settings)
    # On a CPU one pass over memory instead of ten. On CUDA not foreach, the default, which holds
    # the root of all second moments at once.
    on_cpu = all(p.device.type == "cpu" for p in parameters.values())
    return torch.optim.AdamW(groups, **settings, **{"fused" if on_cpu else "foreach": on_cpu})


def set_learning_rate(optimizer: "torch.optim.Optimizer | AdamW8bit", lr: float) -> None:
    """Give every group its share of `lr`, the schedule's learning rate at this step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]


def adapter_groups(args: argparse.Namespace, parameters: dict[str, nn.Parameter]) -> list[dict]:
    """Groups of an adapter's matrices by name; `lr` and `lr_ratio` in each.

    LoRA+ (Hayou et al. 2024, https://arxiv.org/abs/2402.12354) trains the matrices B, which start
    at zero, with a larger learning rate than A. As in PEFT's create_loraplus_optimizer, the
    ratio multiplies B's rate. AdamW subtracts learning rate * weight decay * weight: of B, too,
    that is `lr_ratio` times as much.
    """
    ratio = args.loraplus_lr_ratio
    if ratio == 1:
        by_ratio = {1.0: list(parameters.values())}
    else:
        by_ratio = {1.0: [], ratio: []}
        for name, parameter in parameters.items():
            by_ratio[ratio if ".lora_B." in name else 1.0].append(parameter)
    return [
        {"params": members, "lr": args.learning_rate * ratio, "lr_ratio": ratio}
        for ratio, members in by_ratio.items()
    ]


def decay_groups(parameters: list[nn.Parameter]) -> list[dict]:
    """Groups of parameters with and without weight decay."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "lr_ratio": 1.0},
        {"params": [p for p in parameters if p.ndim < 2], "lr_ratio": 1.0, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class AdamW8bit:
    """bitsandbytes' AdamW8bit on this rank's shards; used as torch's optimisers are.

    bitsandbytes takes plain tensors. So it is given this rank's part of each parameter, which
    shares its memory, and before each step the same part of its gradient.
    """

    def __init__(self, groups: list[dict], lr: float, weight_decay: float):
        from bitsandbytes.optim import AdamW8bit as OfShards  # takes seconds

        # A rank may have no part of a small parameter.
        self.shards: dict[nn.Parameter, nn.Parameter] = {
            p: nn.Parameter(shard)
            for group in groups
            for p in group["params"]
            if (shard := sharding.local(p.detach())).numel()
        }
        of_shards = [
            group | {"params": [self.shards[p] for p in group["params"] if p in self.shards]}
            for group in groups
        ]
        self.parameters = [p for group in groups for p in group["params"]]
        self.of_shards = OfShards(of_shards, lr=lr, weight_decay=weight_decay)

    @property
    def param_groups(self) -> list[dict]:
        return self.of_shards.param_groups

    @property
    def state(self) -> Mapping[nn.Parameter, dict]:
        """The state of each parameter's shard, {} for an empty one: `step`, and `state1` and
        `state2`, in 8 bits with `absmax1` and `absmax2` (a number for BLOCK of them), or in fp32
        for less than TRIED elements.
        """
        states = self.of_shards.state
        return {p: states[self.shards[p]] if p in self.shards else {} for p in self.parameters}

    @torch.no_grad()
    def step(self) -> None:
        for parameter, shard in self.shards.items():
            grad = parameter.grad
            shard.grad = None if grad is None else sharding.local(grad)
        self.of_shards.step()

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        for shard in self.shards.values():
            shard.grad = None


def check_8bit(device: torch.device) -> None:
    """Raise UserError if bitsandbytes cannot take a step with 8-bit moments on `device`."""
    parameter = nn.Parameter(torch.zeros(TRIED, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        optimiser = AdamW8bit([{"params": [parameter]}], lr=0.5, weight_decay=0.0)
        optimiser.step()
        moved = parameter.detach().cpu()
    except (ImportError, NotImplementedError, RuntimeError, AttributeError, OSError) as error:
        raise UserError(
            f"--optim adamw_8bit: bitsandbytes cannot do this on {device.type} "
            f"({first_line(error)}); install the version that requirements.txt names, or leave it "
            "out"
        ) from None
    # The first step of Adam is the learning rate against the sign of the gradient.
    if not torch.allclose(moved, torch.tensor(-0.5), rtol=1e-3):
        raise UserError(
            f"--optim adamw_8bit: on {device.type} bitsandbytes takes a wrong first step "
            f"({moved[0]:g} instead of -0.5); install the version that requirements.txt names, or "
            "leave it out"
        )
