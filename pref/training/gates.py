"""Checks of the first evaluation and the first step. A run that fails one would spend its hours on
a wrong number, so it ends at once.
"""

import torch
from torch import Tensor

from pref.files.console import UserError
from pref.model import lora, sharding
from pref.model.chat import TokenPair
from pref.model.logps import ResponseLogps, trainable
from pref.model.packing import Packing, make_batch
from pref.model.ranks import Ranks
from pref.training.reference import Split, response_lengths

# Mean |policy - reference| per response token (nats) at step 0, where the adapter is the identity.
# It is not zero: the two passes put a pair into different micro-batches, and matrix products then
# round differently. The mean is taken because in bf16 a single short response can be off by 0.1,
# while a stale reference or other weights move all responses.
STEP0_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# Two exact ways to compute a log-prob in bf16 differ by rounding. What is tolerated is this many
# times what the model's own forward differs from itself by, when a pair is alone or beside others.
TIMES_ROUNDING = 3
PROBE_PAIRS = 4  # the mean over one short pair may be twice the mean over many


@torch.no_grad()
def forward_tolerance(
    policy: ResponseLogps,
    probe: list[TokenPair],
    packing: Packing,
    dtype: torch.dtype,
    ranks: Ranks,
) -> float:
    """How far our log-probs of the pairs `probe` may be from the architecture's own forward: mean
    over tokens, nats. In fp32 a constant; in bf16 at least that, and more where rounding is more.
    """
    if dtype == torch.float32:
        return STEP0_TOLERANCE[dtype]

    def own_logps(pairs: list[TokenPair]) -> tuple[Tensor, ...]:  # by response
        batch = make_batch(pairs, packing._replace(padded=True, shared=False), ranks.device)
        return policy(batch, own_forward=True).logps.split(batch.lengths.tolist())

    with lora.dropout(policy, active=False), torch.compiler.set_stance("force_eager"):
        together = own_logps(probe)
        alone = [own_logps([pair]) for pair in probe]
    # Responses in a batch's order: all chosen, then all rejected.
    separately = [chosen for chosen, _ in alone] + [rejected for _, rejected in alone]
    rounding = (torch.cat(together) - torch.cat(separately)).abs().mean().item()
    return max(STEP0_TOLERANCE[dtype], TIMES_ROUNDING * rounding)


def check_step0(logps: Tensor, split: Split, dtype: torch.dtype, what: str) -> float:
    """Mean |policy - reference| per response token before training (nats). Raises UserError if it
    is above STEP0_TOLERANCE.

    logps: (pairs, 2) the policy's log-probs, summed over tokens; chosen, rejected. what: names the
    pairs.
    """
    per_token = (logps - split.reference.sums).abs() / response_lengths(split.pairs)  # (pairs, 2)
    difference = per_token.mean().item()
    if not difference <= STEP0_TOLERANCE[dtype]:  # NaN fails too
        raise UserError(
            f"before training, the policy differs from its reference by {difference:.3g} nats per "
            f"token on the {what} (tolerance {STEP0_TOLERANCE[dtype]} in {dtype}): either the "
            f"cached reference is stale (delete {' and '.join(map(str, split.reference.files))}), "
            "or the weights change between two forward passes"
        )
    return difference


def check_gradients(policy: ResponseLogps, ranks: Ranks) -> None:
    """Raise UserError if a LoRA matrix B got no gradient in the first step: it would never be
    trained. (A gets none yet, because B is zero.)
    """
    grads = {name: p.grad for name, p in trainable(policy).items() if "lora_B" in name}
    sums = [0.0 if g is None else sharding.local(g).abs().sum().item() for g in grads.values()]
    totals = ranks.sum(torch.tensor(sums, device=ranks.device)).tolist()
    if dead := [name for name, total in zip(grads, totals) if total == 0]:
        raise UserError(
            f"{len(dead)} of {len(grads)} LoRA matrices B got a zero gradient in the first step "
            f"(the first is {dead[0]}): either the loss is saturated on every pair (try a smaller "
            "beta or a larger tau), or 4-bit weights were repacked by a forward pass in eval mode "
            "(see `dropout` in pref/model/lora.py)"
        )
