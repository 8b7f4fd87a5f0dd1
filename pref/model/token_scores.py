"""divergences and scoring rules per token"""

import torch
import torch.nn.functional as F
from torch import Tensor

FULL_KL = ("full_rev", "full_fwd", "full_sym")  # need the reference's logits, so it is run live


def token_k3(log_ratio: Tensor) -> Tensor:
    """exp(-r) - 1 + r per token, r = log p_theta - log p_0 of that token: Schulman's k3. Any shape,
    >= 0.
    """
    return torch.expm1(-log_ratio) + log_ratio


def token_full_kl(logits: Tensor, ref_logits: Tensor, kl: str) -> Tensor:
    """Divergence over the vocabulary at each token. logits, ref_logits: (N, V) fp32 -> (N,), nats,
    >= 0.

    full_rev = KL(p_theta || p_0), full_fwd = KL(p_0 || p_theta), full_sym = half their sum.
    """
    log_p, log_q = F.log_softmax(logits, -1), F.log_softmax(ref_logits, -1)
    difference = log_p - log_q
    weight = {
        "full_rev": lambda: log_p.exp(),
        "full_fwd": lambda: -log_q.exp(),
        "full_sym": lambda: 0.5 * (log_p.exp() - log_q.exp()),
    }[kl]()
    return (weight * difference).sum(-1)


SCORES = ("log", "brier", "spherical", "alpha_power", "pseudo_spherical")


def token_score(
    logits: Tensor,
    targets: Tensor,
    score: str = "log",
    score_alpha: float = 2.0,
    score_smoothing: float = 0.0,
    score_masked_log: float = 0.0,
) -> Tensor:
    """Proper score of each token's forecast, as a loss. logits (N, V) fp32, targets (N,) -> (N,).

    With ly = log p(y), l_k = log sum_v p_v^k, A = (1 - eps) p(y)^(alpha-1) + eps/V sum_v
    p_v^(alpha-1):
      log               -(1 - eps) ly - eps mean_v log p_v
      alpha_power       -[alpha A - (alpha - 1) sum_v p_v^alpha]         brier is alpha 2
      pseudo_spherical  -A exp(-(alpha - 1) / alpha * l_alpha)           spherical is alpha 2
    eps = score_smoothing in [0, 1): the score against the label smoothed over the vocabulary.
    score_masked_log = m adds - m mean_v(log p_v [log p_v < log(m / V)]), which keeps a gradient
    where the others have lost it. Source: Shao et al. 2024, "Language Generation with Strictly
    Proper Scoring Rules" (arXiv:2405.18906). Fails: a rule other than log has a vanishing gradient
    where p(y) is near 0.
    """
    lse = torch.logsumexp(logits, -1)
    log_y = logits.gather(1, targets[:, None])[:, 0] - lse
    eps, vocabulary = score_smoothing, logits.shape[1]
    if score == "log":
        value = -(1 - eps) * log_y
        if eps:
            value = value - eps * (logits.mean(-1) - lse)
    elif score in SCORES:
        alpha = 2.0 if score in ("brier", "spherical") else score_alpha
        weight = (1 - eps) * torch.exp((alpha - 1) * log_y)
        if eps:
            weight = weight + eps / vocabulary * torch.exp(log_power_sum(logits, lse, alpha - 1))
        power = log_power_sum(logits, lse, alpha)
        if score in ("brier", "alpha_power"):
            value = (alpha - 1) * torch.exp(power) - alpha * weight
        else:
            value = -weight * torch.exp(-(alpha - 1) / alpha * power)
    else:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, not {score!r}")
    if score_masked_log:
        log_p = logits - lse[:, None]
        low = log_p < torch.log(torch.tensor(score_masked_log / vocabulary))
        value = value - score_masked_log * (log_p * low).mean(-1)
    return value


def log_power_sum(logits: Tensor, lse: Tensor, power: float) -> Tensor:
    """log sum_v p_v^power (N,), without leaving log space."""
    return torch.logsumexp(power * logits, -1) - power * lse
