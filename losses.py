"""Preference losses: pure functions of per-pair log-probabilities.

Notation, per pair: policy log-probabilities lp_c, lp_r of the chosen and rejected response given the prompt,
ref_c, ref_r the same under the frozen reference; in nats, summed over response tokens or averaged (`logp`).

    a = lp_c - ref_c      b = lp_r - ref_r      rho = a - b      delta = lp_c - lp_r      z = beta * rho
    sp(x) = softplus(x) = -log sigmoid(-x)

A loss takes a `PairLogps` and its own parameters by keyword, and returns `(losses, terms)`: a (B,) tensor of
per-pair losses and a dict of (B,) tensors worth logging. It never reduces over the batch: the training loop
divides by the number of pairs in the whole optimiser step, so that neither ranks nor accumulation change a run.

To add a loss: one function, one line in LOSSES, one test. Its keyword defaults are the command line's defaults.
"""

import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Terms = dict[str, Tensor]

KL_CHOICES = ("k2", "k3", "full_rev", "full_fwd", "full_sym", "none")
FULL_KL = ("full_rev", "full_fwd", "full_sym")  # need the reference's logits, so it is run live


class PairLogps(NamedTuple):
    """What a loss may read, for B pairs. All tensors fp32 (B,); log-probabilities in nats, summed over tokens."""

    chosen: Tensor  # policy, sum over the chosen response's tokens
    rejected: Tensor
    ref_chosen: Tensor  # the same under the frozen reference
    ref_rejected: Tensor
    chosen_tokens: Tensor  # number of response tokens, >= 1
    rejected_tokens: Tensor
    # Sum over response tokens of the token-level divergence that `--kl k3|full_*` names; None for the others.
    kl_chosen: Tensor | None = None
    kl_rejected: Tensor | None = None

    def mean(self) -> "PairLogps":
        """The same pairs with every sum over tokens replaced by the mean over that response's tokens."""
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
        """(a, b), the policy's log-ratio to the reference on the chosen and on the rejected response."""
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected

    @property
    def rho(self) -> Tensor:
        a, b = self.log_ratios
        return a - b

    @property
    def delta(self) -> Tensor:
        return self.chosen - self.rejected


def reduced(pairs: PairLogps, logp: str) -> PairLogps:
    """`pairs` with summed ('sum') or token-averaged ('mean') log-probabilities."""
    if logp not in ("sum", "mean"):
        raise ValueError(f"logp must be 'sum' or 'mean', not {logp!r}")
    return pairs.mean() if logp == "mean" else pairs


def k2(pairs: PairLogps) -> Tensor:
    """0.5 a^2 + 0.5 b^2 (B,): Schulman's k2 estimator on the two responses, an anchor to the reference.

    Off-policy (the responses are the data's, not the policy's), so not an estimate of KL(p_theta || p_0).
    Source: http://joschu.net/blog/kl-approx.html
    """
    a, b = pairs.log_ratios
    return 0.5 * (a.square() + b.square())


def token_k3(log_ratio: Tensor) -> Tensor:
    """exp(-r) - 1 + r per token, r = log p_theta - log p_0 of that token: Schulman's k3. Any shape, >= 0."""
    return torch.expm1(-log_ratio) + log_ratio


def token_full_kl(logits: Tensor, ref_logits: Tensor, kl: str) -> Tensor:
    """Divergence over the vocabulary at each token. logits, ref_logits: (N, V) fp32 -> (N,), nats, >= 0.

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


def dpo(
    pairs: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0, logp: str = "sum"
) -> tuple[Tensor, Terms]:
    """(1 - eps) sp(-z) + eps sp(z), z = beta * rho, eps = label_smoothing.

    beta (1/nats) > 0; 0 <= eps < 0.5. logp 'mean' is TRL's sigmoid_norm.
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
    """Temperature-decoupled DPO: sp(-m / tau) + beta * anchor.

    m: delta for margin 'free' (as published), rho for 'ref'. tau (nats) > 0 scales the margin alone.
    anchor: kl 'k2' = 0.5 (a^2 + b^2); 'k3' and 'full_*' = the token-level sums in `pairs.kl_*`, chosen + rejected;
    'none' = 0. beta >= 0 weighs it.
    Identity: margin 'ref', kl 'none' equals dpo with beta = 1 / tau.
    Source: the project's METHODS; the proposal writes the anchor as beta * KL and codes it as k2.
    Fails: a large beta stalls training near the reference, and a larger tau does not help.
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
        assert pairs.kl_chosen is not None and pairs.kl_rejected is not None, f"kl {kl} needs token-level sums"
        anchor = pairs.kl_chosen + pairs.kl_rejected
    return preference + beta * anchor, {"preference": preference, "anchor": anchor}


def dpo_kl(pairs: PairLogps, *, beta: float = 0.05, logp: str = "mean") -> tuple[Tensor, Terms]:
    """sp(-delta) + beta * 0.5 (a^2 + b^2): td_dpo at tau 1 on mean log-probabilities.

    Not DPO: kept because the proposal's generated code called it `dpo_loss` and compared against it.
    """
    return td_dpo(pairs, beta=beta, tau=1.0, logp=logp)


def _log_ratio_modulated(z: Tensor, mix: Tensor, form: str) -> tuple[Tensor, Terms]:
    """(1 - m) sp(-z) + m exp(-z), m = sigmoid(mix). All (B,).

    form 'stable' writes m exp(-z) as exp(log sigmoid(mix) - z): the same function, without the published
    form's inf * 0 = NaN below z of about -88.7 in fp32.
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
    """DiscoPOP, also LRML: (1 - m) sp(-z) + m exp(-z), m = sigmoid(z / t), t = discopop_tau.

    Source: Lu et al. 2024, "Discovering Preference Optimization Algorithms with and for LLMs".
    Fails: its gradient at rho = 0 points the wrong way (+0.784 beta), as published; discopop_form 'published'
    overflows to NaN below z of about -88.7 (fp32), kept for the instability study.
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
    """Decoupled LRML: discopop with z = beta * rho in the losses and m = sigmoid(beta_mix * rho / t) as the mix.

    beta is the method's beta_kl. Identity: beta_mix = beta equals discopop.
    Source: the project's METHODS.
    Fails: the slope for rho -> -inf is bounded only if beta_mix / (t * beta) >= 1.
    """
    rho = reduced(pairs, logp).rho
    return _log_ratio_modulated(beta * rho, beta_mix * rho / discopop_tau, "stable")


LOSSES = {"dpo": dpo, "td_dpo": td_dpo, "dpo_kl": dpo_kl, "discopop": discopop, "dlrml": dlrml}


def loss_defaults(name: str) -> dict:
    """The loss's own parameters and their defaults, read off its signature."""
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_parameters(name: str, parameters: dict) -> None:
    """Raise ValueError, naming the parameter, if `parameters` are outside what loss `name` is defined for."""
    for key in ("tau", "discopop_tau"):
        if key in parameters and not parameters[key] > 0:
            raise ValueError(f"--{key} {parameters[key]}: must be above 0 (the margin is divided by it)")
    for key in ("beta", "beta_mix"):
        if key in parameters and not 0 <= parameters[key] < float("inf"):
            raise ValueError(f"--{key} {parameters[key]}: must be a finite number, 0 or above")
    if name != "td_dpo" and parameters.get("beta") == 0:
        raise ValueError(f"--beta 0: {name} has no gradient at beta 0")
    if not 0 <= parameters.get("label_smoothing", 0) < 0.5:
        raise ValueError(f"--label_smoothing {parameters['label_smoothing']}: must be in [0, 0.5)")
