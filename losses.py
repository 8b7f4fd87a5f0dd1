"""Preference losses: pure functions of per-pair log-probabilities.

    python losses.py                               list all losses
    python losses.py --check dpo                   self-test a loss and plot it
    python losses.py --check my_loss.py:my_loss    the same for your own loss
    python losses.py --figure losses.png           plot the study's losses and their gradients

Notation, for one pair of responses to one prompt. Log-probabilities are in nats, summed over the
tokens of a response, or averaged over them where `logp` is 'mean'.

    lp_c, lp_r     log-probability of the chosen and of the rejected response under the policy
    ref_c, ref_r   the same under the frozen reference
    a, b           log-ratios: a = lp_c - ref_c, b = lp_r - ref_r
    rho            margin against the reference: a - b
    delta          margin without the reference: lp_c - lp_r
    z              beta * rho
    sp, sigma      softplus and sigmoid: sp(x) = log(1 + exp(x)) = -log sigma(-x)
    score_c        mean token score of the chosen response: its negative log-likelihood, unless
                   --score names another scoring rule

A loss takes a `PairLogps` for B pairs and its parameters by keyword, and returns `(losses, terms)`:
a (B,) tensor with one loss per pair, and a dict of (B,) tensors worth logging. It never reduces
over the batch. The training loop divides by the number of pairs in the whole optimiser step, so
that neither the number of ranks nor gradient accumulation changes the result. The first paragraph
of a loss's docstring is the formula that `python losses.py` prints.

To add a loss: one function, its name in LOSSES, one test. Its keyword parameters become
command-line arguments of train_pref.py, of the type of their default.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Terms = dict[str, Tensor]
KL_CHOICES = ("k2", "k3", "full_rev", "full_fwd", "full_sym", "none")


class PairLogps(NamedTuple):
    """The input of every loss, for B pairs: fp32 tensors (B,), log-probabilities in nats, summed
    over the tokens of each response.
    """

    chosen: Tensor  # log-probability under the policy
    rejected: Tensor
    ref_chosen: Tensor  # log-probability under the frozen reference
    ref_rejected: Tensor
    chosen_tokens: Tensor  # number of response tokens, >= 1
    rejected_tokens: Tensor
    # The token-level divergence that `--kl k3` or `--kl full_*` names, summed over the response;
    # None for other values of --kl.
    kl_chosen: Tensor | None = None
    kl_rejected: Tensor | None = None
    # The scoring rule that `--score` names, summed over the chosen response; None for 'log'.
    score_chosen: Tensor | None = None
    # Moving average over earlier optimiser steps of the batch mean of rho (nats), for beta_dpo.
    running_rho: float = 0.0

    def mean(self) -> "PairLogps":
        """The same pairs with log-probabilities and divergences averaged over each response's
        tokens instead of summed.
        """
        chosen_tokens, rejected_tokens = self.chosen_tokens, self.rejected_tokens
        return self._replace(
            chosen=self.chosen / chosen_tokens,
            rejected=self.rejected / rejected_tokens,
            ref_chosen=self.ref_chosen / chosen_tokens,
            ref_rejected=self.ref_rejected / rejected_tokens,
            kl_chosen=None if self.kl_chosen is None else self.kl_chosen / chosen_tokens,
            kl_rejected=None if self.kl_rejected is None else self.kl_rejected / rejected_tokens,
        )

    @property
    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """(a, b): log p_policy - log p_reference of the chosen and of the rejected response."""
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected

    @property
    def rho(self) -> Tensor:
        """Margin against the reference, a - b."""
        a, b = self.log_ratios
        return a - b

    @property
    def delta(self) -> Tensor:
        """Margin without the reference, lp_c - lp_r."""
        return self.chosen - self.rejected


def chosen_score(pairs: PairLogps) -> Tensor:
    """score_c (B,), nats for the log score: the mean over the chosen response's tokens of its
    proper score. `pairs` must hold sums, not `pairs.mean()`.
    """
    total = -pairs.chosen if pairs.score_chosen is None else pairs.score_chosen
    return total / pairs.chosen_tokens


def reduced(pairs: PairLogps, logp: str) -> PairLogps:
    """`pairs` with log-probabilities summed ('sum') or averaged over tokens ('mean')."""
    if logp not in ("sum", "mean"):
        raise ValueError(f"logp must be 'sum' or 'mean', not {logp!r}")
    return pairs.mean() if logp == "mean" else pairs


def k2(pairs: PairLogps) -> Tensor:
    """0.5 a^2 + 0.5 b^2 (B,), an anchor to the reference: Schulman's k2 on the two responses.

    Not an estimate of KL(p_theta || p_0), because the policy did not sample the responses.
    Source: http://joschu.net/blog/kl-approx.html
    """
    a, b = pairs.log_ratios
    return 0.5 * (a.square() + b.square())


def _preference(losses: Tensor) -> tuple[Tensor, Terms]:
    """What a loss of a single term returns."""
    return losses, {"preference": losses}


def _with_score(preference: Tensor, weight: float, pairs: PairLogps) -> tuple[Tensor, Terms]:
    """preference + weight * score_c. `pairs` must hold sums."""
    score = chosen_score(pairs)
    return preference + weight * score, {"preference": preference, "score": score}


def _smoothed_logistic(z: Tensor, eps: float) -> Tensor:
    """(1 - eps) sp(-z) + eps sp(z)"""
    return (1 - eps) * F.softplus(-z) + eps * F.softplus(z)


def dpo(pairs: PairLogps, *, beta=0.1, label_smoothing=0.0, logp="sum"):
    """(1 - eps) sp(-z) + eps sp(z)

    beta (1/nats) > 0; 0 <= eps = label_smoothing < 0.5. With logp 'mean' it is TRL's sigmoid_norm.
    Source: Rafailov et al. 2023 (arXiv:2305.18290), eq. 7; eps: Mitchell's conservative DPO.
    Fails: the gradient vanishes on pairs with a large |z|, which are the long ones first.
    """
    return _preference(_smoothed_logistic(beta * reduced(pairs, logp).rho, label_smoothing))


def td_dpo(pairs: PairLogps, *, beta=0.05, tau=1.0, margin="free", kl="k2", logp="sum"):
    """sp(-m / tau) + beta * anchor, m = delta or rho, anchor = 0.5 (a^2 + b^2) or a divergence

    Temperature-decoupled DPO: tau (nats) > 0 scales the margin, beta >= 0 weights the anchor.
    margin 'free': m = delta; 'ref': m = rho. kl 'k2': 0.5 (a^2 + b^2); 'none': 0; 'k3', 'full_*':
    `pairs.kl_chosen + pairs.kl_rejected`. Margin 'ref' with kl 'none' is dpo at beta = 1 / tau.
    Source: pref/training/LOSSES.md.
    Fails: a large beta stalls training near the reference, and a larger tau makes it worse.
    """
    if margin not in ("free", "ref"):
        raise ValueError(f"margin must be 'free' or 'ref', not {margin!r}")
    if kl not in KL_CHOICES:
        raise ValueError(f"kl must be one of {', '.join(KL_CHOICES)}, not {kl!r}")
    pairs = reduced(pairs, logp)
    preference = F.softplus(-(pairs.delta if margin == "free" else pairs.rho) / tau)
    if kl == "none":
        return preference, {"preference": preference}
    if kl == "k2":
        anchor = k2(pairs)
    else:
        assert pairs.kl_chosen is not None, f"kl {kl!r} needs kl_chosen and kl_rejected"
        anchor = pairs.kl_chosen + pairs.kl_rejected
    return preference + beta * anchor, {"preference": preference, "anchor": anchor}


def dpo_kl(pairs: PairLogps, *, beta=0.05, logp="mean"):
    """sp(-delta) + beta * 0.5 (a^2 + b^2)

    td_dpo at tau 1 on mean log-probabilities. Not DPO: the margin has no reference.
    Source: pref/training/LOSSES.md.
    Fails: the anchor is small on mean log-probabilities, and every pair has nearly the same weight.
    """
    return td_dpo(pairs, beta=beta, tau=1.0, logp=logp)


def _log_ratio_modulated(z: Tensor, mix: Tensor, form: str) -> tuple[Tensor, Terms]:
    """(1 - m) sp(-z) + m exp(-z), m = sigma(mix). z and mix: (B,).

    The published form overflows in fp32 below z of about -88.7: exp(-z) is inf, m is 0, and their
    product NaN. The form 'stable' is the same function with m exp(-z) = exp(log sigma(mix) - z).
    """
    if form == "published":
        modulation = torch.sigmoid(mix)
        losses = -F.logsigmoid(z) * (1 - modulation) + torch.exp(-z) * modulation
    elif form == "stable":
        losses = torch.sigmoid(-mix) * F.softplus(-z) + torch.exp(F.logsigmoid(mix) - z)
    else:
        raise ValueError(f"discopop_form must be 'stable' or 'published', not {form!r}")
    return losses, {"preference": losses}


def discopop(pairs: PairLogps, *, beta=0.05, discopop_tau=0.05, discopop_form="stable", logp="sum"):
    """(1 - m) sp(-z) + m exp(-z), m = sigma(z / discopop_tau)

    DiscoPOP, or LRML (log-ratio modulated loss). discopop_form 'published' is the authors'
    arithmetic, for the instability study.
    Source: Lu et al. 2024 (arXiv:2406.08414).
    Fails: the gradient at rho = 0 has the wrong sign (+0.784 beta), as published; 'published' is
    NaN in fp32 below z of about -88.7.
    """
    z = beta * reduced(pairs, logp).rho
    return _log_ratio_modulated(z, z / discopop_tau, discopop_form)


def dlrml(pairs: PairLogps, *, beta=0.05, beta_mix=0.20, discopop_tau=0.05, logp="sum"):
    """(1 - m) sp(-z) + m exp(-z), m = sigma(beta_mix rho / discopop_tau)

    Decoupled LRML: discopop with a separate beta_mix in the mixing weight; `beta` is beta_kl.
    Source: pref/training/LOSSES.md.
    Fails: slope unbounded for rho -> -inf if beta_mix < discopop_tau * beta; gradient at rho = 0 of
    the wrong sign if beta_mix > 9.78 discopop_tau * beta.
    """
    rho = reduced(pairs, logp).rho
    return _log_ratio_modulated(beta * rho, beta_mix * rho / discopop_tau, "stable")


def robust(pairs: PairLogps, *, beta=0.1, label_smoothing=0.1, logp="sum"):
    """[(1 - eps) sp(-z) - eps sp(z)] / (1 - 2 eps)

    Unbiased when labels are flipped with probability eps = label_smoothing, 0 <= eps < 0.5.
    Source: Chowdhury et al. 2024 (arXiv:2403.00409); TRL `robust`.
    Fails: unbounded below: as z -> +inf it falls like -eps z / (1 - 2 eps).
    """
    z, eps = beta * reduced(pairs, logp).rho, label_smoothing
    return _preference(((1 - eps) * F.softplus(-z) - eps * F.softplus(z)) / (1 - 2 * eps))


def ipo(pairs: PairLogps, *, beta=0.1, logp="mean"):
    """(rho - 1 / (2 beta))^2

    1 / (2 beta) is the target margin, nats. On means as in TRL; the paper's is logp 'sum'.
    Source: Azar et al. 2023 (arXiv:2310.12036), eq. 17; TRL `ipo`.
    Fails: the square also pulls back a pair that is ranked right by more than the target margin.
    """
    return _preference((reduced(pairs, logp).rho - 1 / (2 * beta)).square())


def hinge(pairs: PairLogps, *, beta=0.05, logp="sum"):
    """relu(1 - z)

    Source: Zhao et al. 2023 (arXiv:2305.10425), on rho as in arXiv:2309.06657; TRL `hinge`.
    Fails: no gradient beyond z = 1.
    """
    return _preference(torch.relu(1 - beta * reduced(pairs, logp).rho))


def slic(pairs: PairLogps, *, slic_delta=1.0, sft_coef=0.1, logp="sum"):
    """relu(slic_delta - delta) + sft_coef * score_c

    slic_delta: target margin (nats). Needs no reference.
    Source: Zhao et al. 2023 (arXiv:2305.10425), eq. 1, with the regulariser on the chosen response.
    Fails: delta of summed log-probabilities depends on length as well as quality.
    """
    preference = torch.relu(slic_delta - reduced(pairs, logp).delta)
    return _with_score(preference, sft_coef, pairs)


def simpo(pairs: PairLogps, *, beta=2.0, gamma=1.0, logp="mean"):
    """sp(-(beta delta - gamma))

    gamma: target margin, in units of beta * nats. On mean log-probabilities. Needs no reference.
    Source: Meng et al. 2024 (arXiv:2405.14734), eq. 6.
    Fails: nothing holds the policy near its start; a large learning rate degenerates the text.
    """
    return _preference(F.softplus(gamma - beta * reduced(pairs, logp).delta))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, accurate near 0 and for large -x.

    Source: Maechler 2012, "Accurately computing log(1 - exp(-|a|))".
    """
    near = x > -0.6931471805599453  # -log 2
    # Autograd runs through both branches of `where`. Each gets only arguments it is accurate for,
    # so that the branch not taken sends back a zero gradient instead of NaN.
    if_near, if_far = torch.where(near, x, -1.0), torch.where(near, -1.0, x)
    return torch.where(near, torch.log(-torch.expm1(if_near)), torch.log1p(-torch.exp(if_far)))


def orpo(pairs: PairLogps, *, orpo_lambda=0.1, logp="mean"):
    """score_c + orpo_lambda * sp(-log_odds), log_odds = delta - (log1mexp(lp_c) - log1mexp(lp_r))

    On mean log-probabilities, clamped to at most -1e-6. Needs no reference.
    Source: Hong et al. 2024 (arXiv:2403.07691), eq. 6 and 7.
    Fails: the odds explode as the probability per token approaches 1, hence the clamp.
    """
    means, score = reduced(pairs, logp), chosen_score(pairs)
    chosen, rejected = means.chosen.clamp(max=-1e-6), means.rejected.clamp(max=-1e-6)
    preference = F.softplus(-((chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))))
    return score + orpo_lambda * preference, {"preference": preference, "score": score}


def cpo(pairs: PairLogps, *, beta=0.1, sft_coef=1.0, logp="sum"):
    """sp(-beta delta) + sft_coef * score_c

    score_c is averaged over this pair's tokens. Needs no reference.
    Source: Xu et al. 2024 (arXiv:2401.08417), eq. 5; TRL `cpo`.
    Fails: delta of summed log-probabilities depends on length as well as quality.
    """
    return _with_score(F.softplus(-beta * reduced(pairs, logp).delta), sft_coef, pairs)


def exo_pair(pairs: PairLogps, *, beta=0.1, label_smoothing=1e-3, logp="sum"):
    """sigma(z) [log sigma(z) - log(1 - eps)] + sigma(-z) [log sigma(-z) - log eps]

    The reverse KL from the policy's preference to the smoothed label; eps = label_smoothing > 0.
    Source: Ji et al. 2024 (arXiv:2402.00856), eq. 16; TRL `exo_pair`.
    Fails: undefined at eps = 0; bounded, so a pair ranked clearly wrong has almost no gradient.
    """
    z = beta * reduced(pairs, logp).rho
    eps = torch.full((), label_smoothing, dtype=z.dtype, device=z.device)
    right = torch.sigmoid(z) * (F.logsigmoid(z) - torch.log1p(-eps))
    return _preference(right + torch.sigmoid(-z) * (F.logsigmoid(-z) - torch.log(eps)))


def nca_pair(pairs: PairLogps, *, beta=0.01, logp="sum"):
    """sp(-beta a) + 0.5 sp(beta a) + 0.5 sp(beta b)

    Source: Chen et al. 2024 (arXiv:2402.05369), for two responses; TRL `nca_pair`.
    Fails: sp(beta a) resists raising the chosen response: the optimum of a is log(2) / beta.
    """
    a, b = (beta * ratio for ratio in reduced(pairs, logp).log_ratios)
    return _preference(F.softplus(-a) + 0.5 * F.softplus(a) + 0.5 * F.softplus(b))


def bco_pair(pairs: PairLogps, *, beta=0.1, logp="sum"):
    """sp(-beta a) + sp(beta b)

    Without the paper's moving reward shift, as in TRL.
    Source: Jung et al. 2024 (arXiv:2404.04656); TRL `bco_pair`.
    Fails: each response is judged alone, so a shift common to both does not cancel.
    """
    a, b = (beta * ratio for ratio in reduced(pairs, logp).log_ratios)
    return _preference(F.softplus(-a) + F.softplus(b))


def sppo_hard(pairs: PairLogps, *, beta=0.001, logp="sum"):
    """(a - 0.5 / beta)^2 + (b + 0.5 / beta)^2

    Source: Wu et al. 2024 (arXiv:2405.00675), eq. 4.7 with win probability 1; TRL `sppo_hard`.
    Fails: at beta 0.001 the targets are log-ratios of +-500 nats, and the loss is about 5e5.
    """
    a, b = reduced(pairs, logp).log_ratios
    return _preference((a - 0.5 / beta).square() + (b + 0.5 / beta).square())


def aot(pairs: PairLogps, *, beta=0.01, label_smoothing=0.0, logp="sum"):
    """dpo on beta * [sort(delta) - sort(delta_ref)]

    Quantiles of the policy's margins against the reference's: entry i is quantile i, not pair i.
    Source: Melnyk et al. 2024 (arXiv:2406.05882), paired; TRL `aot`.
    Fails: couples the batch; with one pair it is dpo.
    """
    pairs = reduced(pairs, logp)
    ref_delta = pairs.ref_chosen - pairs.ref_rejected
    z = beta * (pairs.delta.sort().values - ref_delta.sort().values)
    return _preference(_smoothed_logistic(z, label_smoothing))


def aot_unpaired(pairs: PairLogps, *, beta=0.01, label_smoothing=0.0, logp="sum"):
    """dpo on beta * [sort(a) - sort(b)]

    Source: Melnyk et al. 2024 (arXiv:2406.05882), unpaired; TRL `aot_unpaired`.
    Fails: couples the batch; with one pair it is dpo.
    """
    a, b = reduced(pairs, logp).log_ratios
    z = beta * (a.sort().values - b.sort().values)
    return _preference(_smoothed_logistic(z, label_smoothing))


def apo_zero(pairs: PairLogps, *, beta=0.1, logp="sum"):
    """1 - sigma(beta a) + sigma(beta b)

    For chosen responses that are better than the model's own.
    Source: D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 7; TRL `apo_zero`.
    Fails: saturates on both sides.
    """
    a, b = (beta * ratio for ratio in reduced(pairs, logp).log_ratios)
    return _preference(torch.sigmoid(-a) + torch.sigmoid(b))


def apo_down(pairs: PairLogps, *, beta=0.1, logp="sum"):
    """sigma(beta a) + 1 - sigma(z)

    For chosen responses worse than the model's own: pushes both down, the rejected one further.
    Source: D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 8; TRL `apo_down`.
    Fails: saturates on both sides.
    """
    pairs = reduced(pairs, logp)
    a, _ = pairs.log_ratios
    return _preference(torch.sigmoid(beta * a) + torch.sigmoid(-beta * pairs.rho))


def kto_pair(pairs: PairLogps, *, beta=0.1, logp="sum"):
    """[1 - sigma(beta (a - KL_r)) + 1 - sigma(beta (KL_c - b))] / 2,
    KL_c = mean a, KL_r = mean b, each >= 0

    The means are over the batch and carry no gradient.
    Source: Ethayarajh et al. 2024 (arXiv:2402.01306) on pairs, as in TRL's former `kto_pair`. The
    DiscoPOP repository lets gradients through the means; KTO's text and code do not.
    Fails: couples the batch; saturates.
    """
    a, b = reduced(pairs, logp).log_ratios
    kl_c, kl_r = (ratio.detach().mean().clamp(min=0) for ratio in (a, b))
    return _preference((torch.sigmoid(-beta * (a - kl_r)) + torch.sigmoid(-beta * (kl_c - b))) / 2)


def rpo(pairs: PairLogps, *, beta=0.1, label_smoothing=0.0, sft_coef=1.0, logp="sum"):
    """dpo + sft_coef * score_c

    Source: Pang et al. 2024 (arXiv:2404.19733), eq. 1; TRL's `rpo_alpha`.
    Fails: where dpo does.
    """
    preference, _ = dpo(pairs, beta=beta, label_smoothing=label_smoothing, logp=logp)
    return _with_score(preference, sft_coef, pairs)


def dpop(pairs: PairLogps, *, beta=0.1, dpop_lambda=50.0, logp="sum"):
    """sp(-beta (rho - dpop_lambda relu(-a)))

    Penalises a chosen response that becomes less likely than under the reference.
    Source: Pal et al. 2024 (arXiv:2402.13228), eq. 3.
    Fails: at dpop_lambda 50, one nat lost on the chosen response outweighs 50 nats of margin.
    """
    pairs = reduced(pairs, logp)
    a, _ = pairs.log_ratios
    return _preference(F.softplus(-beta * (pairs.rho - dpop_lambda * torch.relu(-a))))


def beta_dpo(pairs: PairLogps, *, beta=0.1, beta_dpo_alpha=0.6):
    """dpo with beta' = max(beta (1 + beta_dpo_alpha (mean rho - M)), 1e-3),
    M = moving average of mean rho

    M is `pairs.running_rho`: momentum 0.9 over optimiser steps, from 0. beta' carries no gradient.
    Source: Wu et al. 2024 (arXiv:2407.08639), batch-level beta, without filtering 20 % of pairs.
    Fails: couples the batch; a batch far below the average falls to the floor of 1e-3.
    """
    rho = pairs.rho
    scale = 1 + beta_dpo_alpha * (rho.detach().mean() - pairs.running_rho)
    beta_now = (beta * scale).clamp(min=1e-3)
    losses = F.softplus(-beta_now * rho)
    return losses, {"preference": losses, "beta": beta_now.expand_as(losses)}


def _scaled_margin(pairs: PairLogps, beta: float, logp: str, name: str) -> tuple[Tensor, Tensor]:
    """(z, u), u = z / 0.05, on which the discovered losses take their batch statistics. Raises
    ValueError for a single pair.
    """
    z = beta * reduced(pairs, logp).rho
    if len(z) < 2:
        raise ValueError(
            f"{name} needs at least 2 pairs per micro-batch, for the batch's statistics"
        )
    return z, z / 0.05


def dbaql(pairs: PairLogps, *, beta=0.05, logp="sum"):
    """c sp(-z / 0.9) + (1 - c) exp(-0.9 z), c = sigma(var u), u = z / 0.05

    Source: Lu et al. 2024 (arXiv:2406.08414), appendix E.1, and its repository (statistics on u).
    Fails: couples the batch, undefined for one pair; exp(-0.9 z) leaves fp32 below z of about -98.
    """
    z, u = _scaled_margin(pairs, beta, logp, "dbaql")
    c, rest = torch.sigmoid(u.var()), torch.sigmoid(-u.var())
    return _preference(c * F.softplus(-z / 0.9) + rest * torch.exp(-0.9 * z))


def _logistic_and_hinge(z: Tensor, weight: Tensor) -> tuple[Tensor, Terms]:
    """weight * sp(-z) + (1 - weight) * relu(1 - z)"""
    return _preference(weight * F.softplus(-z) + (1 - weight) * torch.relu(1 - z))


def aql(pairs: PairLogps, *, beta=0.05, logp="sum"):
    """w sp(-z) + (1 - w) relu(1 - z), w = sigma(q - u),
    q = 0.5 + 0.01 (sigma(mean u) - 0.5), u = z / 0.05

    Source: Lu et al. 2024 (arXiv:2406.08414), appendix E, and its repository.
    Fails: couples the batch; refused for one pair, because its statistics are the batch's.
    """
    z, u = _scaled_margin(pairs, beta, logp, "aql")
    q = 0.5 + 0.01 * (torch.sigmoid(u.mean()) - 0.5)
    return _logistic_and_hinge(z, torch.sigmoid(q - u))


def aqfl(pairs: PairLogps, *, beta=0.05, logp="sum"):
    """w sp(-z) + (1 - w) relu(1 - z), w = sigma(0.1 |u - q|),
    q = 0.95 std(u) mean sigma(-u) + 0.05 sigma(mean u)

    u = z / 0.05.
    Source: Lu et al. 2024 (arXiv:2406.08414), appendix E, and its repository.
    Fails: couples the batch, undefined for one pair.
    """
    z, u = _scaled_margin(pairs, beta, logp, "aqfl")
    q = u.std() * torch.sigmoid(-u).mean()
    q = q + 0.05 * (torch.sigmoid(u.mean()) - q)
    return _logistic_and_hinge(z, torch.sigmoid(0.1 * (u - q).abs()))


def padll(pairs: PairLogps, *, beta=0.05, logp="sum"):
    """0.9 (1 - 0.5 [rho < 0]) sp(-z)

    Source: Lu et al. 2024 (arXiv:2406.08414), appendix E, and its repository.
    Fails: jumps at rho = 0, and pairs that are ranked wrong count half.
    """
    rho = reduced(pairs, logp).rho
    return _preference(0.9 * (1 - 0.5 * (rho < 0).to(rho.dtype)) * F.softplus(-beta * rho))


def cell(pairs: PairLogps, *, beta=0.05, logp="sum"):
    """0.5 exp(-z) + 0.5 sp(-z)

    Source: Lu et al. 2024 (arXiv:2406.08414), appendix E, and its repository.
    Fails: exp(-z) leaves fp32 below z of about -88.7.
    """
    z = beta * reduced(pairs, logp).rho
    return _preference(0.5 * torch.exp(-z) + 0.5 * F.softplus(-z))


def pfl(pairs: PairLogps, *, beta=0.05, logp="sum"):
    """sp(-z) / 2 where delta > 0, else 2 relu(1 - z)

    Source: Lu et al. 2024 (arXiv:2406.08414), appendix E, and its repository.
    Fails: jumps where the policy's own ranking flips (delta = 0), which z does not show.
    """
    pairs = reduced(pairs, logp)
    z = beta * pairs.rho
    return _preference(torch.where(pairs.delta > 0, F.softplus(-z) / 2, 2 * torch.relu(1 - z)))


def sft(pairs: PairLogps):
    """score_c

    Supervised fine-tuning on the chosen response, with the proper scoring rule of --score.
    Source: Shao et al. 2024 (arXiv:2405.18906) for scoring rules other than log.
    Fails: rules other than log hardly train a model whose token probabilities are near 0.
    """
    score = chosen_score(pairs)
    return score, {"preference": score, "score": score}


# In the order of `python losses.py`.
LOSSES: dict[str, Callable[..., tuple[Tensor, Terms]]] = {
    loss.__name__: loss
    for family in (
        (td_dpo, dpo, dpo_kl, robust, discopop, dlrml, ipo, hinge),
        (slic, simpo, orpo, cpo),  # need no reference
        (exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down, kto_pair),
        (rpo, dpop, beta_dpo),  # dpo with one addition
        (dbaql, aql, aqfl, padll, cell, pfl),  # discovered together with discopop
        (sft,),
    )
    for loss in family
}
# td_dpo with margin 'free' and kl 'none' needs no reference either.
NO_REFERENCE = ("slic", "simpo", "orpo", "cpo", "sft")
# A pair's loss depends on the other pairs of its micro-batch.
COUPLES_BATCH = {"aot", "aot_unpaired", "kto_pair", "beta_dpo", "dbaql", "aql", "aqfl"}
NEEDS_TWO_PAIRS = {"dbaql", "aql", "aqfl"}
# Parameters and defaults of the SFT term, sft_coef * score_c, that can be added to any loss. slic,
# cpo and rpo define sft_coef themselves.
SFT_TERM = {
    "sft_coef": 0.0,
    "score": "log",
    "score_alpha": 2.0,
    "score_smoothing": 0.0,
    "score_masked_log": 0.0,
}


if __name__ == "__main__":
    import runpy  # the list, the self-test and the plots live apart from the equations

    runpy.run_module("pref.training.loss_command", run_name="__main__")
