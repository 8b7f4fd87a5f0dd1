"""Divergences from the reference and proper scoring rules, per response token."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Divergences over the whole vocabulary. They need the reference's logits, which are not cached, so
# the reference runs in every step.
FULL_KL = ("full_rev", "full_fwd", "full_sym")
SCORES = ("log", "brier", "spherical", "alpha_power", "pseudo_spherical")


def token_k3(log_ratio: Tensor) -> Tensor:
    """exp(-r) - 1 + r >= 0 with r = `log_ratio` = log p_theta - log p_0 of a token, any shape.

    Source: Schulman's k3, http://joschu.net/blog/kl-approx.html
    """
    return torch.expm1(-log_ratio) + log_ratio


def token_full_kl(logits: Tensor, ref_logits: Tensor, kl: str) -> Tensor:
    """Divergence over the vocabulary at each token, >= 0, nats. logits, ref_logits: (N, V) fp32;
    returns (N,).

    full_rev = KL(p_theta || p_0), full_fwd = KL(p_0 || p_theta), full_sym = half their sum.
    """
    log_p, log_q = F.log_softmax(logits, -1), F.log_softmax(ref_logits, -1)  # (N, V)
    # All three are sum_v weight_v (log p_v - log q_v).
    if kl == "full_rev":
        weight = log_p.exp()
    elif kl == "full_fwd":
        weight = -log_q.exp()
    elif kl == "full_sym":
        weight = 0.5 * (log_p.exp() - log_q.exp())
    else:
        raise ValueError(f"kl must be one of {', '.join(FULL_KL)}, not {kl!r}")
    return (weight * (log_p - log_q)).sum(-1)


def token_score(
    logits: Tensor,
    targets: Tensor,
    score: str = "log",
    score_alpha: float = 2.0,
    score_smoothing: float = 0.0,
    score_masked_log: float = 0.0,
) -> Tensor:
    """Proper score of the forecast for each token, as a loss. logits: (N, V) fp32, targets: (N,);
    returns (N,).

    Notation: y the target, eps = score_smoothing, alpha = score_alpha > 1, and
    l_k = log sum_v p_v^k. With A = (1 - eps) p_y^(alpha-1) + eps/V sum_v p_v^(alpha-1),

      log                -(1 - eps) log p_y - eps mean_v log p_v
      alpha_power        (alpha - 1) exp(l_alpha) - alpha A
      pseudo_spherical   -A exp(-(alpha - 1) / alpha * l_alpha)
      brier, spherical   alpha_power and pseudo_spherical at alpha = 2

    eps in [0, 1) scores against the label smoothed over the vocabulary. score_masked_log = m adds
    -m mean_v(log p_v [log p_v < log(m / V)]), which keeps a gradient where the other rules have
    lost it.
    Source: Shao et al. 2024, "Language Generation with Strictly Proper Scoring Rules"
    (arXiv:2405.18906).
    Fails: the gradient of rules other than log vanishes where p_y is near 0.
    """
    lse = torch.logsumexp(logits, -1)  # (N,)
    log_y = logits.gather(1, targets[:, None])[:, 0] - lse
    eps, vocabulary = score_smoothing, logits.shape[1]
    if score == "log":
        value = -(1 - eps) * log_y
        if eps:
            value = value - eps * (logits.mean(-1) - lse)
    elif score in SCORES:
        alpha = 2.0 if score in ("brier", "spherical") else score_alpha
        weight = (1 - eps) * torch.exp((alpha - 1) * log_y)  # A
        if eps:
            weight = weight + eps / vocabulary * torch.exp(log_power_sum(logits, lse, alpha - 1))
        l_alpha = log_power_sum(logits, lse, alpha)
        if score in ("brier", "alpha_power"):
            value = (alpha - 1) * torch.exp(l_alpha) - alpha * weight
        else:
            value = -weight * torch.exp(-(alpha - 1) / alpha * l_alpha)
    else:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, not {score!r}")
    if score_masked_log:
        log_p = logits - lse[:, None]  # (N, V)
        low = log_p < torch.log(torch.tensor(score_masked_log / vocabulary))
        value = value - score_masked_log * (log_p * low).mean(-1)
    return value


def log_power_sum(logits: Tensor, lse: Tensor, power: float) -> Tensor:
    """log sum_v p_v^power (N,), in log space. lse: (N,), the logsumexp of logits (N, V)."""
    return torch.logsumexp(power * logits, -1) - power * lse
