"""Preference losses: pure functions of per-pair log-probabilities.

    python losses.py                                   table of all losses
    python losses.py --check dpo                       self-test of a loss, with a plot
    python losses.py --check my_loss.py:my_loss        the same for a loss of your own
    python losses.py --figure losses.png               loss and gradient of the study's losses over
    the margin

Notation, per pair: policy log-probabilities lp_c, lp_r of the chosen and rejected response given
the prompt, ref_c, ref_r the same under the frozen reference; in nats, summed over response tokens
or averaged (`logp`).

    a = lp_c - ref_c      b = lp_r - ref_r      rho = a - b      delta = lp_c - lp_r      z = beta *
    rho sp(x) = softplus(x) = -log sigmoid(-x)      sigma = sigmoid      score_c = mean token score
    of the chosen response (its negative log-likelihood, unless --score says otherwise)

A loss takes a `PairLogps` and its own parameters by keyword, and returns `(losses, terms)`: a (B,)
tensor of per-pair losses and a dict of (B,) tensors worth logging. It never reduces over the batch:
the training loop divides by the number of pairs in the whole optimiser step, so that neither ranks
nor accumulation change a run. The first line of a docstring is the formula that `python losses.py`
prints.

To add a loss: one function, one line in LOSSES, one test. Its keyword defaults become the command
line's arguments.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Terms = dict[str, Tensor]
KL_CHOICES = ("k2", "k3", "full_rev", "full_fwd", "full_sym", "none")


class PairLogps(NamedTuple):
    """What a loss may read, for B pairs. All tensors fp32 (B,); log-probabilities in nats, summed
    over tokens.
    """

    chosen: Tensor  # policy, sum over the chosen response's tokens
    rejected: Tensor
    ref_chosen: Tensor  # the same under the frozen reference
    ref_rejected: Tensor
    chosen_tokens: Tensor  # number of response tokens, >= 1
    rejected_tokens: Tensor
    # Sum over response tokens of the token-level divergence that `--kl k3|full_*` names; None for
    # the others.
    kl_chosen: Tensor | None = None
    kl_rejected: Tensor | None = None
    # Sum over the chosen response's tokens of the proper score that `--score` names; None for
    # 'log'.
    score_chosen: Tensor | None = None
    # Moving average of the mean rho of earlier optimiser steps (nats); what beta_dpo compares its
    # batch with.
    running_rho: float = 0.0

    def mean(self) -> "PairLogps":
        """The same pairs with every sum over tokens replaced by the mean over that response's
        tokens.
        """
        c, r = self.chosen_tokens, self.rejected_tokens
        return self._replace(
            chosen=self.chosen / c,
            rejected=self.rejected / r,
            ref_chosen=self.ref_chosen / c,
            ref_rejected=self.ref_rejected / r,
            kl_chosen=None if self.kl_chosen is None else self.kl_chosen / c,
            kl_rejected=None if self.kl_rejected is None else self.kl_rejected / r,
        )

    @property
    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """(a, b), the policy's log-ratio to the reference on the chosen and on the rejected
        response.
        """
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected

    @property
    def rho(self) -> Tensor:
        a, b = self.log_ratios
        return a - b

    @property
    def delta(self) -> Tensor:
        return self.chosen - self.rejected


def chosen_score(pairs: PairLogps) -> Tensor:
    """score_c (B,), nats for the log score: the token mean of the chosen response's proper score.
    Takes sums.
    """
    total = -pairs.chosen if pairs.score_chosen is None else pairs.score_chosen
    return total / pairs.chosen_tokens


def reduced(pairs: PairLogps, logp: str) -> PairLogps:
    """`pairs` with summed ('sum') or token-averaged ('mean') log-probabilities."""
    if logp not in ("sum", "mean"):
        raise ValueError(f"logp must be 'sum' or 'mean', not {logp!r}")
    return pairs.mean() if logp == "mean" else pairs


def k2(pairs: PairLogps) -> Tensor:
    """0.5 a^2 + 0.5 b^2 (B,): Schulman's k2 estimator on the two responses, an anchor to the
    reference.

    Off-policy (the responses are the data's, not the policy's), so not an estimate of KL(p_theta ||
    p_0). Source: http://joschu.net/blog/kl-approx.html
    """
    a, b = pairs.log_ratios
    return 0.5 * (a.square() + b.square())


def dpo(
    pairs: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0, logp: str = "sum"
) -> tuple[Tensor, Terms]:
    """(1 - eps) sp(-z) + eps sp(z)

    beta (1/nats) > 0; 0 <= eps = label_smoothing < 0.5. logp 'mean' is TRL's sigmoid_norm.
    Source: Rafailov et al. 2023, eq. 7; eps: Mitchell's conservative DPO, TRL's former `sigmoid`.
    Fails: saturates (gradient to 0) on pairs whose |z| is large, long pairs first.
    """
    z = beta * reduced(pairs, logp).rho
    losses = (1 - label_smoothing) * F.softplus(-z) + label_smoothing * F.softplus(z)
    return losses, {"preference": losses}


def td_dpo(
    pairs: PairLogps,
    *,
    beta: float = 0.05,
    tau: float = 1.0,
    margin: str = "free",
    kl: str = "k2",
    logp: str = "sum",
) -> tuple[Tensor, Terms]:
    """sp(-m / tau) + beta * anchor, m = delta or rho, anchor = 0.5 (a^2 + b^2) or a divergence

    Temperature-decoupled DPO. m: delta for margin 'free' (as published), rho for 'ref'. tau (nats)
    > 0 scales the margin alone. anchor: kl 'k2' = 0.5 (a^2 + b^2); 'k3' and 'full_*' = the
    token-level sums in `pairs.kl_*`, chosen + rejected; 'none' = 0. beta >= 0 weighs it. Identity:
    margin 'ref', kl 'none' equals dpo with beta = 1 / tau. Source: the project's METHODS; the
    proposal writes the anchor as beta * KL and codes it as k2. Fails: a large beta stalls training
    near the reference, and a larger tau does not help.
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
        assert pairs.kl_chosen is not None and pairs.kl_rejected is not None, (
            f"kl {kl} needs token-level sums"
        )
        anchor = pairs.kl_chosen + pairs.kl_rejected
    return preference + beta * anchor, {"preference": preference, "anchor": anchor}


def dpo_kl(pairs: PairLogps, *, beta: float = 0.05, logp: str = "mean") -> tuple[Tensor, Terms]:
    """sp(-delta) + beta * 0.5 (a^2 + b^2)

    td_dpo at tau 1 on mean log-probabilities. Not DPO: kept because the proposal's generated code
    called it `dpo_loss` and compared against it. Source: the project's METHODS. Fails: mean
    log-probs make the anchor small; what it lacks against DPO is the reference in the margin.
    """
    return td_dpo(pairs, beta=beta, tau=1.0, logp=logp)


def _log_ratio_modulated(z: Tensor, mix: Tensor, form: str) -> tuple[Tensor, Terms]:
    """(1 - m) sp(-z) + m exp(-z), m = sigmoid(mix). All (B,).

    form 'stable' writes m exp(-z) as exp(log sigmoid(mix) - z): the same function, without the
    published form's inf * 0 = NaN below z of about -88.7 in fp32.
    """
    if form == "published":
        modulation = torch.sigmoid(mix)
        losses = -F.logsigmoid(z) * (1 - modulation) + torch.exp(-z) * modulation
    elif form == "stable":
        losses = torch.sigmoid(-mix) * F.softplus(-z) + torch.exp(F.logsigmoid(mix) - z)
    else:
        raise ValueError(f"discopop_form must be 'stable' or 'published', not {form!r}")
    return losses, {"preference": losses}


def discopop(
    pairs: PairLogps,
    *,
    beta: float = 0.05,
    discopop_tau: float = 0.05,
    discopop_form: str = "stable",
    logp: str = "sum",
) -> tuple[Tensor, Terms]:
    """(1 - m) sp(-z) + m exp(-z), m = sigma(z / discopop_tau)

    DiscoPOP, also called LRML (log-ratio modulated loss).

    Source: Lu et al. 2024, "Discovering Preference Optimization Algorithms with and for LLMs".
    Fails: its gradient at rho = 0 points the wrong way (+0.784 beta), as published; discopop_form
    'published' overflows to NaN below z of about -88.7 (fp32), kept for the instability study.
    """
    z = beta * reduced(pairs, logp).rho
    return _log_ratio_modulated(z, z / discopop_tau, discopop_form)


def dlrml(
    pairs: PairLogps,
    *,
    beta: float = 0.05,
    beta_mix: float = 0.20,
    discopop_tau: float = 0.05,
    logp: str = "sum",
) -> tuple[Tensor, Terms]:
    """(1 - m) sp(-z) + m exp(-z), m = sigma(beta_mix rho / discopop_tau)

    Decoupled LRML: the mix has a beta of its own. beta is the method's beta_kl. beta_mix = beta is
    discopop. Source: the project's METHODS. Fails: the slope for rho -> -inf is bounded only if
    beta_mix / (t * beta) >= 1.
    """
    rho = reduced(pairs, logp).rho
    return _log_ratio_modulated(beta * rho, beta_mix * rho / discopop_tau, "stable")


def robust(pairs: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.1, logp: str = "sum"):
    """[(1 - eps) sp(-z) - eps sp(z)] / (1 - 2 eps)

    Unbiased for labels flipped with probability eps = label_smoothing, 0 <= eps < 0.5.
    Source: Chowdhury et al. 2024 (arXiv:2403.00409); TRL `robust`.
    Fails: unbounded below, as z -> +inf it falls like -eps z / (1 - 2 eps).
    """
    z = beta * reduced(pairs, logp).rho
    losses = ((1 - label_smoothing) * F.softplus(-z) - label_smoothing * F.softplus(z)) / (
        1 - 2 * label_smoothing
    )
    return losses, {"preference": losses}


def ipo(pairs: PairLogps, *, beta: float = 0.1, logp: str = "mean"):
    """(rho - 1 / (2 beta))^2

    On mean log-probs as in TRL, on sums (logp 'sum') as in the paper. 1 / (2 beta) is the margin
    aimed at, in nats. Source: Azar et al. 2023 (arXiv:2310.12036), eq. 17; TRL `ipo`. Fails: the
    quadratic pulls back a pair that is ranked right by more than the margin aimed at.
    """
    losses = (reduced(pairs, logp).rho - 1 / (2 * beta)).square()
    return losses, {"preference": losses}


def hinge(pairs: PairLogps, *, beta: float = 0.05, logp: str = "sum"):
    """relu(1 - z)

    Source: Zhao et al. 2023 (arXiv:2305.10425) in its reference form, Liu et al. 2023
    (arXiv:2309.06657); TRL `hinge`. Fails: no gradient beyond z = 1.
    """
    losses = torch.relu(1 - beta * reduced(pairs, logp).rho)
    return losses, {"preference": losses}


def slic(pairs: PairLogps, *, slic_delta: float = 1.0, sft_coef: float = 0.1, logp: str = "sum"):
    """relu(slic_delta - delta) + sft_coef * score_c

    slic_delta: margin aimed at (nats). Needs no reference.
    Source: Zhao et al. 2023 (arXiv:2305.10425), eq. 1 with the regulariser on the chosen response.
    Fails: delta of summed log-probs mixes quality with length.
    """
    preference = torch.relu(slic_delta - reduced(pairs, logp).delta)
    return preference + sft_coef * chosen_score(pairs), {
        "preference": preference,
        "score": chosen_score(pairs),
    }


def simpo(pairs: PairLogps, *, beta: float = 2.0, gamma: float = 1.0, logp: str = "mean"):
    """sp(-(beta delta - gamma))

    gamma: margin aimed at, in units of beta * nats. Needs no reference.
    Source: Meng et al. 2024 (arXiv:2405.14734), eq. 6, on mean log-probs.
    Fails: nothing holds the policy to its start; a large learning rate degenerates the text.
    """
    losses = F.softplus(gamma - beta * reduced(pairs, logp).delta)
    return losses, {"preference": losses}


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends.

    Source: Maechler 2012, "Accurately computing log(1 - exp(-|a|))".
    """
    near = x > -0.6931471805599453
    # Each branch is fed only values it is right for, so that neither sends a NaN back through
    # `where`.
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )


def orpo(pairs: PairLogps, *, orpo_lambda: float = 0.1, logp: str = "mean"):
    """score_c + orpo_lambda * sp(-log_odds), log_odds = delta - (log1mexp(lp_c) - log1mexp(lp_r))

    On mean log-probs, clamped to at most -1e-6. Needs no reference.
    Source: Hong et al. 2024 (arXiv:2403.07691), eq. 6 and 7.
    Fails: a response of probability near 1 a token makes the odds explode; hence the clamp.
    """
    means = reduced(pairs, logp)
    chosen, rejected = means.chosen.clamp(max=-1e-6), means.rejected.clamp(max=-1e-6)
    preference = F.softplus(-((chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))))
    return chosen_score(pairs) + orpo_lambda * preference, {
        "preference": preference,
        "score": chosen_score(pairs),
    }


def cpo(pairs: PairLogps, *, beta: float = 0.1, sft_coef: float = 1.0, logp: str = "sum"):
    """sp(-beta delta) + sft_coef * score_c

    Needs no reference. score_c is the token mean of this pair.
    Source: Xu et al. 2024 (arXiv:2401.08417), eq. 5; TRL `cpo`.
    Fails: delta of summed log-probs mixes quality with length.
    """
    preference = F.softplus(-beta * reduced(pairs, logp).delta)
    return preference + sft_coef * chosen_score(pairs), {
        "preference": preference,
        "score": chosen_score(pairs),
    }


def exo_pair(
    pairs: PairLogps, *, beta: float = 0.1, label_smoothing: float = 1e-3, logp: str = "sum"
):
    """sigma(z) [log sigma(z) - log(1 - eps)] + sigma(-z) [log sigma(-z) - log eps]

    The reverse KL between the policy's preference and the label's; eps = label_smoothing > 0.
    Source: Ji et al. 2024 (arXiv:2402.00856), eq. 16; TRL `exo_pair`.
    Fails: eps = 0 is illegal; bounded, so a pair ranked clearly wrong has almost no gradient.
    """
    z = beta * reduced(pairs, logp).rho
    eps = torch.tensor(label_smoothing, dtype=z.dtype, device=z.device)
    right = torch.sigmoid(z) * (F.logsigmoid(z) - torch.log1p(-eps))
    losses = right + torch.sigmoid(-z) * (F.logsigmoid(-z) - torch.log(eps))
    return losses, {"preference": losses}


def nca_pair(pairs: PairLogps, *, beta: float = 0.01, logp: str = "sum"):
    """sp(-beta a) + 0.5 sp(beta a) + 0.5 sp(beta b)

    Source: Chen et al. 2024 (arXiv:2402.05369), for two responses; TRL `nca_pair`.
    Fails: a is pulled to 1.1 / beta at most: sp(beta a) resists raising the chosen response
    further.
    """
    a, b = (beta * x for x in reduced(pairs, logp).log_ratios)
    losses = F.softplus(-a) + 0.5 * F.softplus(a) + 0.5 * F.softplus(b)
    return losses, {"preference": losses}


def bco_pair(pairs: PairLogps, *, beta: float = 0.1, logp: str = "sum"):
    """sp(-beta a) + sp(beta b)

    Without the paper's running reward shift, as in TRL.
    Source: Jung et al. 2024 (arXiv:2404.04656); TRL `bco_pair`.
    Fails: each response is judged on its own; a shift common to both is not cancelled.
    """
    a, b = (beta * x for x in reduced(pairs, logp).log_ratios)
    losses = F.softplus(-a) + F.softplus(b)
    return losses, {"preference": losses}


def sppo_hard(pairs: PairLogps, *, beta: float = 0.001, logp: str = "sum"):
    """(a - 0.5 / beta)^2 + (b + 0.5 / beta)^2

    Source: Wu et al. 2024 (arXiv:2405.00675), eq. 4.7 with win probability 1; TRL `sppo_hard`.
    Fails: at beta 0.001 it aims at log-ratios of +-500 nats, and its loss is of the order of 5e5.
    """
    a, b = reduced(pairs, logp).log_ratios
    losses = (a - 0.5 / beta).square() + (b + 0.5 / beta).square()
    return losses, {"preference": losses}


def _sorted_margin(
    better: Tensor, worse: Tensor, beta: float, label_smoothing: float
) -> tuple[Tensor, Terms]:
    z = beta * (better.sort().values - worse.sort().values)
    losses = (1 - label_smoothing) * F.softplus(-z) + label_smoothing * F.softplus(z)
    return losses, {"preference": losses}


def aot(pairs: PairLogps, *, beta: float = 0.01, label_smoothing: float = 0.0, logp: str = "sum"):
    """dpo on beta * [sort(delta) - sort(delta_ref)]

    The quantiles of the policy's margins against those of the reference's; row i is quantile i, not
    pair i. Source: Melnyk et al. 2024 (arXiv:2406.05882), paired; TRL `aot`. Fails: couples the
    batch; with one pair it is dpo.
    """
    pairs = reduced(pairs, logp)
    return _sorted_margin(pairs.delta, pairs.ref_chosen - pairs.ref_rejected, beta, label_smoothing)


def aot_unpaired(
    pairs: PairLogps, *, beta: float = 0.01, label_smoothing: float = 0.0, logp: str = "sum"
):
    """dpo on beta * [sort(a) - sort(b)]

    Source: Melnyk et al. 2024 (arXiv:2406.05882), unpaired; TRL `aot_unpaired`.
    Fails: couples the batch; with one pair it is dpo.
    """
    return _sorted_margin(*reduced(pairs, logp).log_ratios, beta, label_smoothing)


def apo_zero(pairs: PairLogps, *, beta: float = 0.1, logp: str = "sum"):
    """1 - sigma(beta a) + sigma(beta b)

    For chosen responses better than the model's own.
    Source: D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 7; TRL `apo_zero`.
    Fails: saturates on both sides.
    """
    a, b = (beta * x for x in reduced(pairs, logp).log_ratios)
    losses = torch.sigmoid(-a) + torch.sigmoid(b)
    return losses, {"preference": losses}


def apo_down(pairs: PairLogps, *, beta: float = 0.1, logp: str = "sum"):
    """sigma(beta a) + 1 - sigma(z)

    For chosen responses worse than the model's own: both are pushed down, the rejected one further.
    Source: D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 8; TRL `apo_down`.
    Fails: saturates on both sides.
    """
    pairs = reduced(pairs, logp)
    losses = torch.sigmoid(beta * pairs.log_ratios[0]) + torch.sigmoid(-beta * pairs.rho)
    return losses, {"preference": losses}


def kto_pair(pairs: PairLogps, *, beta: float = 0.1, logp: str = "sum"):
    """[1 - sigma(beta (a - KL_r)) + 1 - sigma(beta (KL_c - b))] / 2, KL_c = mean a, KL_r = mean b,
    each >= 0

    The means are over the batch and carry no gradient.
    Source: Ethayarajh et al. 2024 (arXiv:2402.01306) on pairs, as in TRL's former `kto_pair` and
    the DiscoPOP repository, which lets gradients through the means; KTO's text and its own code do
    not. Fails: couples the batch; saturates.
    """
    a, b = reduced(pairs, logp).log_ratios
    kl_c, kl_r = (x.detach().mean().clamp(min=0) for x in (a, b))
    losses = (torch.sigmoid(-beta * (a - kl_r)) + torch.sigmoid(-beta * (kl_c - b))) / 2
    return losses, {"preference": losses}


def rpo(
    pairs: PairLogps,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    sft_coef: float = 1.0,
    logp: str = "sum",
):
    """dpo + sft_coef * score_c

    Source: Pang et al. 2024 (arXiv:2404.19733), eq. 1; TRL's `rpo_alpha`.
    Fails: as dpo.
    """
    preference, _ = dpo(pairs, beta=beta, label_smoothing=label_smoothing, logp=logp)
    return preference + sft_coef * chosen_score(pairs), {
        "preference": preference,
        "score": chosen_score(pairs),
    }


def dpop(pairs: PairLogps, *, beta: float = 0.1, dpop_lambda: float = 50.0, logp: str = "sum"):
    """sp(-beta (rho - dpop_lambda relu(-a)))

    Punishes a chosen response that becomes less likely than under the reference.
    Source: Pal et al. 2024 (arXiv:2402.13228), eq. 3.
    Fails: at lambda 50 one nat lost on the chosen response outweighs 50 of margin.
    """
    pairs = reduced(pairs, logp)
    losses = F.softplus(-beta * (pairs.rho - dpop_lambda * torch.relu(-pairs.log_ratios[0])))
    return losses, {"preference": losses}


def beta_dpo(pairs: PairLogps, *, beta: float = 0.1, beta_dpo_alpha: float = 0.6):
    """dpo with beta' = max(beta (1 + beta_dpo_alpha (mean rho - M)), 1e-3), M = moving average of
    mean rho

    M (momentum 0.9 over optimiser steps, from 0) is `pairs.running_rho`; beta' carries no gradient.
    Source: Wu et al. 2024 (arXiv:2407.08639), batch-level beta. Its filter of 20 % of the pairs is
    left out. Fails: couples the batch; a batch far below the average falls to the floor of 1e-3.
    """
    rho = pairs.rho
    scale = 1 + beta_dpo_alpha * (rho.detach().mean() - pairs.running_rho)
    beta_now = (beta * scale).clamp(min=1e-3)
    losses = F.softplus(-beta_now * rho)
    return losses, {"preference": losses, "beta": beta_now.expand_as(losses)}


def _scaled(pairs: PairLogps, beta: float, logp: str, name: str) -> tuple[Tensor, Tensor]:
    """(z, u): u = z / 0.05, the scale at which the discovered losses take their statistics. Refuses
    one pair.
    """
    z = beta * reduced(pairs, logp).rho
    if name and len(z) < 2:
        raise ValueError(
            f"{name} needs at least 2 pairs a micro-batch: it is made of the batch's statistics"
        )
    return z, z / 0.05


def dbaql(pairs: PairLogps, *, beta: float = 0.05, logp: str = "sum"):
    """c sp(-z / 0.9) + (1 - c) exp(-0.9 z), c = sigma(var u), u = z / 0.05

    Source: Lu et al. 2024 (arXiv:2406.08414), appendix E.1, and its repository (statistics on u).
    Fails: couples the batch, undefined for one pair; exp(-0.9 z) leaves fp32 below z of about -98.
    """
    z, u = _scaled(pairs, beta, logp, "dbaql")
    c, rest = torch.sigmoid(u.var()), torch.sigmoid(-u.var())
    losses = c * F.softplus(-z / 0.9) + rest * torch.exp(-0.9 * z)
    return losses, {"preference": losses}


def _logistic_and_hinge(z: Tensor, weight: Tensor) -> tuple[Tensor, Terms]:
    losses = weight * F.softplus(-z) + (1 - weight) * torch.relu(1 - z)
    return losses, {"preference": losses}


def aql(pairs: PairLogps, *, beta: float = 0.05, logp: str = "sum"):
    """w sp(-z) + (1 - w) relu(1 - z), w = sigma(q - u), q = 0.5 + 0.01 (sigma(mean u) - 0.5), u = z
    / 0.05

    Source: Lu et al. 2024 (arXiv:2406.08414), appendix E, and its repository.
    Fails: couples the batch; refused for one pair, as its authors' statistics are the batch's.
    """
    z, u = _scaled(pairs, beta, logp, "aql")
    q = 0.5 + 0.01 * (torch.sigmoid(u.mean()) - 0.5)
    return _logistic_and_hinge(z, torch.sigmoid(q - u))


def aqfl(pairs: PairLogps, *, beta: float = 0.05, logp: str = "sum"):
    """w sp(-z) + (1 - w) relu(1 - z), w = sigma(0.1 |u - q|), q = 0.95 std(u) mean sigma(-u) + 0.05
    sigma(mean u)

    Source: Lu et al. 2024 (arXiv:2406.08414), appendix E, and its repository.
    Fails: couples the batch, undefined for one pair.
    """
    z, u = _scaled(pairs, beta, logp, "aqfl")
    q = u.std() * torch.sigmoid(-u).mean()
    q = q + 0.05 * (torch.sigmoid(u.mean()) - q)
    return _logistic_and_hinge(z, torch.sigmoid(0.1 * (u - q).abs()))


def padll(pairs: PairLogps, *, beta: float = 0.05, logp: str = "sum"):
    """0.9 (1 - 0.5 [rho < 0]) sp(-z)

    Source: Lu et al. 2024 (arXiv:2406.08414), appendix E, and its repository.
    Fails: jumps at rho = 0, and pairs that are ranked wrong weigh half.
    """
    rho = reduced(pairs, logp).rho
    losses = 0.9 * (1 - 0.5 * (rho < 0).to(rho.dtype)) * F.softplus(-beta * rho)
    return losses, {"preference": losses}


def cell(pairs: PairLogps, *, beta: float = 0.05, logp: str = "sum"):
    """0.5 exp(-z) + 0.5 sp(-z)

    Source: Lu et al. 2024 (arXiv:2406.08414), appendix E, and its repository.
    Fails: exp(-z) leaves fp32 below z of about -88.7.
    """
    z = beta * reduced(pairs, logp).rho
    losses = 0.5 * torch.exp(-z) + 0.5 * F.softplus(-z)
    return losses, {"preference": losses}


def pfl(pairs: PairLogps, *, beta: float = 0.05, logp: str = "sum"):
    """sp(-z) / 2 where delta > 0, else 2 relu(1 - z)

    Source: Lu et al. 2024 (arXiv:2406.08414), appendix E, and its repository.
    Fails: jumps where the policy alone changes its mind (delta = 0), which the reference does not
    see.
    """
    pairs = reduced(pairs, logp)
    z = beta * pairs.rho
    losses = torch.where(pairs.delta > 0, F.softplus(-z) / 2, 2 * torch.relu(1 - z))
    return losses, {"preference": losses}


def sft(pairs: PairLogps):
    """score_c

    Supervised fine-tuning on the chosen response with a proper scoring rule (--score); the rejected
    one is ignored. Source: Shao et al. 2024 (arXiv:2405.18906) for scores other than log. Fails:
    rules other than log hardly train a model that is far off (its token probabilities are near 0).
    """
    score = chosen_score(pairs)
    return score, {"preference": score, "score": score}


LOSSES = {
    "td_dpo": td_dpo,
    "dpo": dpo,
    "dpo_kl": dpo_kl,
    "robust": robust,
    "discopop": discopop,
    "dlrml": dlrml,
    "ipo": ipo,
    "hinge": hinge,
    "slic": slic,
    "simpo": simpo,
    "orpo": orpo,
    "cpo": cpo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "kto_pair": kto_pair,
    "rpo": rpo,
    "dpop": dpop,
    "beta_dpo": beta_dpo,
    "dbaql": dbaql,
    "aql": aql,
    "aqfl": aqfl,
    "padll": padll,
    "cell": cell,
    "pfl": pfl,
    "sft": sft,
}
NO_REFERENCE = ("slic", "simpo", "orpo", "cpo", "sft")  # td_dpo with margin free and kl none, too
COUPLES_BATCH = (
    "aot",
    "aot_unpaired",
    "kto_pair",
    "beta_dpo",
    "dbaql",
    "aql",
    "aqfl",
)  # over the micro-batch
NEEDS_TWO_PAIRS = ("dbaql", "aql", "aqfl")
# An SFT term on the chosen response that any loss can have; slic, rpo and cpo have sft_coef of
# their own.
SFT_TERM = {
    "sft_coef": 0.0,
    "score": "log",
    "score_alpha": 2.0,
    "score_smoothing": 0.0,
    "score_masked_log": 0.0,
}
# What the command line says of a parameter: its help, and its choices where it is a word.
PARAMETER_HELP = {
    "beta": "weight of the reference; for dlrml this is beta_kl",
    "tau": "temperature of the margin, nats",
    "margin": "margin without or against the reference",
    "kl": "anchor to the reference",
    "logp": "log-probs summed or averaged over response tokens",
    "label_smoothing": "share of pairs assumed mislabelled",
    "discopop_tau": "temperature t of the mixing",
    "discopop_form": "published: overflows, for the instability study",
    "beta_mix": "beta of the mixing",
    "gamma": "margin aimed at, in units of beta * nats",
    "slic_delta": "margin aimed at, nats",
    "orpo_lambda": "weight of the odds ratio",
    "dpop_lambda": "weight of the penalty on a chosen response that becomes less likely",
    "beta_dpo_alpha": "how strongly beta follows the batch",
    "sft_coef": "weight of score_c, an SFT term on the chosen response",
    "score": "proper scoring rule of score_c",
    "score_alpha": "power of alpha_power and pseudo_spherical, above 1",
    "score_smoothing": "label smoothing of the score over the vocabulary",
    "score_masked_log": "weight and threshold of the masked log term (0.1 in its paper; 0: none)",
}


if __name__ == "__main__":
    import runpy  # the table, the self-test and the plots are not part of the equations

    runpy.run_module("pref.training.loss_check", run_name="__main__")
