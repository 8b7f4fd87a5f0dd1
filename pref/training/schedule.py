"""What each optimiser step does: which pairs, which learning rate, which dropout, whether an
evaluation follows. All of it is a function of the arguments, the seed and the step alone, so that
losses share their batches and a run can be continued anywhere.
"""

import argparse
import math

import numpy as np
import torch

TRIAL_STEPS, TRIAL_VAL_PAIRS = 2, 8
# Without --eval_steps: at most every so many steps, the share of a run's work that evaluation stays
# below, and how many evaluations after the start there are even if it does not.
EVALUATION_STEPS, EVALUATION_SHARE, EVALUATIONS = 20, 0.1, 3


def pair_limits(args: argparse.Namespace) -> dict[str, int | None]:
    """How many pairs of each split are read; None: all of them."""
    if args.mode == "trial":
        return {"train": TRIAL_STEPS * args.global_batch, "val": TRIAL_VAL_PAIRS}
    return {"train": None, "val": None}


def steps_per_epoch(pairs: int, global_batch: int) -> int:
    return math.ceil(pairs / global_batch)


def number_of_steps(args: argparse.Namespace, pairs: int) -> int:
    steps = math.ceil(args.epochs * steps_per_epoch(pairs, args.global_batch))
    return min(steps, TRIAL_STEPS if args.mode == "trial" else args.max_steps or steps)


def pairs_of_step(step: int, pairs: int, global_batch: int, seed: int) -> list[int]:
    """Indices of the pairs of optimiser step `step` (from 0). Each epoch has its own order; its
    last step takes what is left.

    10 pairs in batches of 4: steps 0, 1, 2 take 4, 4 and 2 pairs of the first epoch's order, steps
    3, 4, 5 the same of the second's.
    """
    epoch, within = divmod(step, steps_per_epoch(pairs, global_batch))
    order = np.random.default_rng([seed, epoch]).permutation(pairs)
    return order[within * global_batch : (within + 1) * global_batch].tolist()


def is_evaluated(step: int, steps: int, pairs: int, args: argparse.Namespace) -> bool:
    """Whether an evaluation follows optimiser step `step` (from 1): every eval_steps, at the end of
    each epoch, and after the last step. With eval_steps 0 only then, and before the first.
    `args` must be settled.
    """
    if step in (0, steps) or not args.eval_steps:
        return step in (0, steps)
    every = (args.eval_steps, steps_per_epoch(pairs, args.global_batch))
    return any(step % number == 0 for number in every)


def eval_interval(args: argparse.Namespace, steps: int, pairs: int, ratio: float) -> int:
    """--eval_steps, or without it the shortest interval that keeps evaluation below
    EVALUATION_SHARE of the run: at least EVALUATION_STEPS, and at most a third of the steps, so
    that there is a best one to choose. A function of pairs and arguments, whatever the device.

    ratio: tokens of the validation pairs over those of all steps. A token takes half as long in an
    evaluation: a forward pass, where training also has a backward pass through frozen weights.

    The first study: 159 steps in 3 epochs, 6,750 and 750 pairs. Every 20 steps would be 11
    evaluations and 17 % of the run. It gets an interval of 53: 0, 53, 106, 159, and 7 %.
    """
    if args.eval_steps is not None:
        return args.eval_steps
    epoch = steps_per_epoch(pairs, args.global_batch)
    most = max(EVALUATION_STEPS, math.ceil(steps / EVALUATIONS))
    for every in range(EVALUATION_STEPS, most):
        # Multiples of the interval or of an epoch, the start, and the last step if it is neither.
        count = steps // every + steps // epoch - steps // math.lcm(every, epoch)
        count += 1 + (steps % every > 0 and steps % epoch > 0)
        work = count * ratio / 2
        if work / (1 + work) < EVALUATION_SHARE:
            return every
    return most


def warmup_steps(steps: int, args: argparse.Namespace) -> int:
    return math.ceil(args.warmup_ratio * steps)


def learning_rate_at(step: int, steps: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then cosine to 0. `step` counts from 0; its learning rate is never 0."""
    warmup = warmup_steps(steps, args)
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    angle = math.pi * (step - warmup) / max(1, steps - warmup)  # 0 to pi
    return args.learning_rate * 0.5 * (1 + math.cos(angle))


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make dropout a function of seed, step and rank, so that any step can be repeated."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))
