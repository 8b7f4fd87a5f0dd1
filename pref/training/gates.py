"""Checks of the first evaluation and the first step. A run that fails one would spend its hours on
a wrong number, so it ends at once.
"""

import itertools
import math

import torch
from peft import PeftModel
from torch import Tensor, nn

from pref.files.console import UserError, first_line
from pref.model import lora, sharding
from pref.model.chat import TokenPair
from pref.model.logps import ResponseLogps, trainable
from pref.model.packing import Batch, Packing
from pref.model.ranks import Ranks
from pref.training import reference
from pref.training.reference import Split, response_lengths

# Mean |policy - reference| per response token (nats) at step 0, where the policy is the reference.
# It is not zero: the two passes put a pair into different micro-batches, and matrix products then
# round differently. The mean is taken because in bf16 a single short response can be off by 0.1,
# while a stale reference or other weights move all responses.
STEP0_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
PROBE_TOKENS = 1024
# How far compiled layers may be from eager ones, which round differently: in log-probs, mean
# |difference| per response token (nats); in the gradient, the norm of the difference over its own.
COMPILED_TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.1, 0.2)}
CUT_TOKENS = 64


def probe_of(pairs: list[TokenPair]) -> list[TokenPair]:
    """The shortest of `pairs`, up to PROBE_TOKENS, for the model's own forward, which holds logits
    of all their tokens. In bf16 the mean over one short pair may be twice the mean over several.
    """
    by_length = sorted(pairs, key=lambda pair: pair.tokens)
    ends = list(itertools.accumulate(pair.tokens for pair in by_length))
    return by_length[: max(1, sum(end <= PROBE_TOKENS for end in ends))]


def check_step0(logps: Tensor, split: Split, dtype: torch.dtype, what: str) -> float:
    """Mean |policy - reference| per response token before training (nats). Raises UserError if it
    is above STEP0_TOLERANCE.

    logps: (pairs, 2) the policy's log-probs, summed over tokens; chosen, rejected. what: names the
    pairs.
    """
    return check_difference(logps, split, dtype, what, "policy")


def check_reference(
    policy: ResponseLogps,
    split: Split,
    packing: Packing,
    ranks: Ranks,
    dtype: torch.dtype,
    what: str,
) -> float:
    """The same of the reference, computed anew, where the policy does not start from it
    (--reference base): it must still be what the cache has. That the policy is its base with the
    start adapter was compared with PEFT (`check_logps`).
    """
    tokens = reference.compute(policy, split.pairs, packing, ranks, f"{what} again")
    sharding.reshard(policy)
    now = reference.Reference(split.pairs, tokens).sums
    return check_difference(now, split, dtype, what, "base model")


def check_difference(
    logps: Tensor, split: Split, dtype: torch.dtype, what: str, whose: str
) -> float:
    """Mean |logps - reference| per response token (nats). Raises UserError if it is above
    STEP0_TOLERANCE.
    """
    per_token = (logps - split.reference.sums).abs() / response_lengths(split.pairs)  # (pairs, 2)
    difference = per_token.mean().item()
    if not difference <= STEP0_TOLERANCE[dtype]:  # NaN fails too
        raise UserError(
            f"before training, the {whose} differs from its reference by {difference:.3g} nats per "
            f"token on the {what} (tolerance {STEP0_TOLERANCE[dtype]} in {dtype}): either the "
            f"cached reference is stale (delete {' and '.join(map(str, split.reference.files))}), "
            "or the weights change between two forward passes"
        )
    return difference


def cut(pairs: list[TokenPair]) -> list[TokenPair]:
    """The first two of `pairs`, with at most CUT_TOKENS of each part: eager attention on CUDA holds
    scores of all pairs of tokens, in every layer.
    """
    return [
        TokenPair(pair.prompt[-CUT_TOKENS:], pair.chosen[:CUT_TOKENS], pair.rejected[:CUT_TOKENS])
        for pair in pairs[:2]
    ]


def check_compiled(policy: ResponseLogps, batch: Batch, dtype: torch.dtype, ranks: Ranks) -> None:
    """Compare the compiled layers with the eager ones on `batch`: log-probs, and the gradient of
    their sum. Collective. Raises UserError if they differ by more than rounding, or
    cannot be compiled.
    """
    with lora.dropout(policy, active=False):
        with torch.compiler.set_stance("force_eager"):
            expected = logps_and_gradients(policy, batch)
        try:
            ours = logps_and_gradients(policy, batch)
        except (torch._dynamo.exc.TorchDynamoException, NotImplementedError) as error:
            raise UserError(
                f"the layers cannot be compiled on this machine ({first_line(error)}); give "
                "--compile off"
            ) from None
    # Squares of the gradient, over all ranks: each has its part.
    squares = [
        torch.stack([(a.double() - b.double()).square().sum(), b.double().square().sum()])
        for a, b in zip(ours[1:], expected[1:])
    ]
    summed = ranks.sum(torch.stack(squares).sum(0)).tolist()
    difference = (ours[0] - expected[0]).abs().mean().item()
    gradient = math.sqrt(summed[0] / max(summed[1], 1e-30))
    most, most_gradient = COMPILED_TOLERANCE[dtype]
    if not (difference <= most and gradient <= most_gradient):  # NaN fails too
        raise UserError(
            f"compiled layers differ from eager ones by {difference:.3g} nats per token (tolerance "
            f"{most}) and {gradient:.1%} of the gradient (tolerance {most_gradient:.1%}); give "
            "--compile off, and report the versions of torch and triton"
        )


def logps_and_gradients(policy: ResponseLogps, batch: Batch) -> list[Tensor]:
    """Log-probs (N,) of a batch, then this rank's part of the gradient of their sum for every
    parameter that has one.
    """
    logps = policy(batch).logps
    logps.sum().backward()
    parameters = list(trainable(policy).values())
    grads = [sharding.local(p.grad) for p in parameters if p.grad is not None]
    for parameter in parameters:
        parameter.grad = None
    return [logps.detach(), *grads]


def check_gradients(policy: ResponseLogps, ranks: Ranks) -> None:
    """Raise UserError if something that should be trained got no gradient in the first step: it
    would never be trained. Of an adapter that is a matrix B (A gets none yet, because B is zero).
    """
    parameters = trainable(policy)
    if not isinstance(policy.model, PeftModel):
        check_full_gradients(parameters, ranks)
        return
    matrices = {name: p for name, p in parameters.items() if "lora_B" in name}
    grads = gradient_sums(matrices, ranks)
    if dead := [name for name, total in grads.items() if total == 0]:
        raise UserError(
            f"{len(dead)} of {len(grads)} LoRA matrices B got a zero gradient in the first step "
            f"(the first is {dead[0]}): either the loss is saturated on every pair (try a smaller "
            "beta or a larger tau), or this architecture sends no gradient to these layers (leave "
            "them out of --lora_targets), or 4-bit weights were repacked by a forward pass in eval "
            "mode (see `only_adapter_trains` in pref/model/lora.py)"
        )


def gradient_sums(parameters: dict[str, nn.Parameter], ranks: Ranks) -> dict[str, float]:
    """Sum of the absolute values of each parameter's gradient, over all ranks."""
    grads = [p.grad for p in parameters.values()]
    sums = [0.0 if g is None else sharding.local(g).abs().sum().item() for g in grads]
    totals = ranks.sum(torch.tensor(sums, device=ranks.device))
    return dict(zip(parameters, totals.tolist()))


def check_full_gradients(parameters: dict[str, nn.Parameter], ranks: Ranks) -> None:
    """The same where all parameters are trained: every matrix that took part in the first step must
    have a gradient. Those that did not, such as experts that no token went to, are named.
    """
    sums = gradient_sums(parameters, ranks)
    unused = [name for name, p in parameters.items() if p.grad is None]
    dead = [name for name, p in parameters.items() if sums[name] == 0 and p.ndim > 1]
    if dead := [name for name in dead if name not in unused]:
        raise UserError(
            f"{len(dead)} of {len(sums)} parameters got a zero gradient in the first step (the "
            f"first is {dead[0].removeprefix('model.')}): either the loss is saturated on every "
            "pair (try a smaller beta or a larger tau), or this architecture sends them no "
            "gradient (leave them out with --freeze)"
        )
    if unused:
        ranks.print(
            f"note: {len(unused)} of {len(sums)} parameters had no part in the first step (the "
            f"first is {unused[0].removeprefix('model.')}): without a gradient they stay as they "
            "are"
        )
