"""The losses of losses.py in the restricted form, from which a search may start.

Equal to losses.py in value and gradient. Parameters that are text there have their default here:
`logp` (the ..._mean and _sum of a loss are two texts), td_dpo's margin 'free' with kl 'k2', the
stable form of discopop. Not in the form: token-level divergences (kl 'k3' and 'full_*') and scores
other than log, which the trainer computes only where an argument asks for them.
"""

HEAD = """\
import math

import torch
import torch.nn.functional as F


"""

LOSSES = {
    "td_dpo": """
def td_dpo(pairs, *, beta: float = 0.05, tau: float = 1.0):
    a, b = pairs.log_ratios
    preference = F.softplus(-pairs.delta / tau)
    anchor = 0.5 * (a.square() + b.square())
    return preference + beta * anchor
""",
    "dpo": """
def dpo(pairs, *, beta: float = 0.1, label_smoothing: float = 0.0):
    z = beta * pairs.rho
    return (1 - label_smoothing) * F.softplus(-z) + label_smoothing * F.softplus(z)
""",
    "dpo_kl": """
def dpo_kl(pairs, *, beta: float = 0.05):
    means = pairs.mean()
    a, b = means.log_ratios
    return F.softplus(-means.delta) + beta * (0.5 * (a.square() + b.square()))
""",
    "robust": """
def robust(pairs, *, beta: float = 0.1, label_smoothing: float = 0.1):
    z = beta * pairs.rho
    right = (1 - label_smoothing) * F.softplus(-z)
    return (right - label_smoothing * F.softplus(z)) / (1 - 2 * label_smoothing)
""",
    "discopop": """
def discopop(pairs, *, beta: float = 0.05, discopop_tau: float = 0.05):
    z = beta * pairs.rho
    mix = z / discopop_tau
    logistic = torch.sigmoid(-mix) * F.softplus(-z)
    exponential = torch.exp(F.logsigmoid(mix) - z)
    return logistic + exponential
""",
    "dlrml": """
def dlrml(pairs, *, beta: float = 0.05, beta_mix: float = 0.2, discopop_tau: float = 0.05):
    z = beta * pairs.rho
    mix = beta_mix * pairs.rho / discopop_tau
    logistic = torch.sigmoid(-mix) * F.softplus(-z)
    exponential = torch.exp(F.logsigmoid(mix) - z)
    return logistic + exponential
""",
    "ipo": """
def ipo(pairs, *, beta: float = 0.1):
    return (pairs.mean().rho - 1 / (2 * beta)).square()
""",
    "hinge": """
def hinge(pairs, *, beta: float = 0.05):
    return torch.relu(1 - beta * pairs.rho)
""",
    "slic": """
def slic(pairs, *, slic_delta: float = 1.0, sft_coef: float = 0.1):
    score = -pairs.chosen / pairs.chosen_tokens
    return torch.relu(slic_delta - pairs.delta) + sft_coef * score
""",
    "simpo": """
def simpo(pairs, *, beta: float = 2.0, gamma: float = 1.0):
    return F.softplus(gamma - beta * pairs.mean().delta)
""",
    # log1mexp(x) = log(1 - exp(x)), by the formula that is accurate on each side of -log 2
    "orpo": """
def orpo(pairs, *, orpo_lambda: float = 0.1):
    means = pairs.mean()
    chosen = means.chosen.clamp(max=-1e-6)
    rejected = means.rejected.clamp(max=-1e-6)
    chosen_near = chosen > -0.6931471805599453
    rejected_near = rejected > -0.6931471805599453
    chosen_if_near = torch.log(-torch.expm1(torch.where(chosen_near, chosen, -1.0)))
    chosen_if_far = torch.log1p(-torch.exp(torch.where(chosen_near, -1.0, chosen)))
    rejected_if_near = torch.log(-torch.expm1(torch.where(rejected_near, rejected, -1.0)))
    rejected_if_far = torch.log1p(-torch.exp(torch.where(rejected_near, -1.0, rejected)))
    chosen_rest = torch.where(chosen_near, chosen_if_near, chosen_if_far)
    rejected_rest = torch.where(rejected_near, rejected_if_near, rejected_if_far)
    log_odds = (chosen - rejected) - (chosen_rest - rejected_rest)
    score = -pairs.chosen / pairs.chosen_tokens
    return score + orpo_lambda * F.softplus(-log_odds)
""",
    "cpo": """
def cpo(pairs, *, beta: float = 0.1, sft_coef: float = 1.0):
    score = -pairs.chosen / pairs.chosen_tokens
    return F.softplus(-beta * pairs.delta) + sft_coef * score
""",
    "exo_pair": """
def exo_pair(pairs, *, beta: float = 0.1, label_smoothing: float = 0.001):
    z = beta * pairs.rho
    right = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-label_smoothing))
    wrong = torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(label_smoothing))
    return right + wrong
""",
    "nca_pair": """
def nca_pair(pairs, *, beta: float = 0.01):
    a, b = pairs.log_ratios
    return F.softplus(-beta * a) + 0.5 * F.softplus(beta * a) + 0.5 * F.softplus(beta * b)
""",
    "bco_pair": """
def bco_pair(pairs, *, beta: float = 0.1):
    a, b = pairs.log_ratios
    return F.softplus(-beta * a) + F.softplus(beta * b)
""",
    "sppo_hard": """
def sppo_hard(pairs, *, beta: float = 0.001):
    a, b = pairs.log_ratios
    return (a - 0.5 / beta).square() + (b + 0.5 / beta).square()
""",
    "aot": """
def aot(pairs, *, beta: float = 0.01, label_smoothing: float = 0.0):
    ref_delta = pairs.ref_chosen - pairs.ref_rejected
    z = beta * (pairs.delta.sort().values - ref_delta.sort().values)
    return (1 - label_smoothing) * F.softplus(-z) + label_smoothing * F.softplus(z)
""",
    "aot_unpaired": """
def aot_unpaired(pairs, *, beta: float = 0.01, label_smoothing: float = 0.0):
    a, b = pairs.log_ratios
    z = beta * (a.sort().values - b.sort().values)
    return (1 - label_smoothing) * F.softplus(-z) + label_smoothing * F.softplus(z)
""",
    "apo_zero": """
def apo_zero(pairs, *, beta: float = 0.1):
    a, b = pairs.log_ratios
    return torch.sigmoid(-beta * a) + torch.sigmoid(beta * b)
""",
    "apo_down": """
def apo_down(pairs, *, beta: float = 0.1):
    a, _ = pairs.log_ratios
    return torch.sigmoid(beta * a) + torch.sigmoid(-beta * pairs.rho)
""",
    "kto_pair": """
def kto_pair(pairs, *, beta: float = 0.1):
    a, b = pairs.log_ratios
    kl_c = a.detach().mean().clamp(min=0)
    kl_r = b.detach().mean().clamp(min=0)
    return (torch.sigmoid(-beta * (a - kl_r)) + torch.sigmoid(-beta * (kl_c - b))) / 2
""",
    "rpo": """
def rpo(pairs, *, beta: float = 0.1, label_smoothing: float = 0.0, sft_coef: float = 1.0):
    z = beta * pairs.rho
    preference = (1 - label_smoothing) * F.softplus(-z) + label_smoothing * F.softplus(z)
    score = -pairs.chosen / pairs.chosen_tokens
    return preference + sft_coef * score
""",
    "dpop": """
def dpop(pairs, *, beta: float = 0.1, dpop_lambda: float = 50.0):
    a, _ = pairs.log_ratios
    return F.softplus(-beta * (pairs.rho - dpop_lambda * torch.relu(-a)))
""",
    "beta_dpo": """
def beta_dpo(pairs, *, beta: float = 0.1, beta_dpo_alpha: float = 0.6):
    rho = pairs.rho
    scale = 1 + beta_dpo_alpha * (rho.detach().mean() - pairs.running_rho)
    beta_now = (beta * scale).clamp(min=1e-3)
    return F.softplus(-beta_now * rho)
""",
    "dbaql": """
def dbaql(pairs, *, beta: float = 0.05):
    z = beta * pairs.rho
    spread = (z / 0.05).var()
    logistic = torch.sigmoid(spread) * F.softplus(-z / 0.9)
    return logistic + torch.sigmoid(-spread) * torch.exp(-0.9 * z)
""",
    "aql": """
def aql(pairs, *, beta: float = 0.05):
    z = beta * pairs.rho
    u = z / 0.05
    q = 0.5 + 0.01 * (torch.sigmoid(u.mean()) - 0.5)
    weight = torch.sigmoid(q - u)
    return weight * F.softplus(-z) + (1 - weight) * torch.relu(1 - z)
""",
    "aqfl": """
def aqfl(pairs, *, beta: float = 0.05):
    z = beta * pairs.rho
    u = z / 0.05
    q = u.std() * torch.sigmoid(-u).mean()
    q = q + 0.05 * (torch.sigmoid(u.mean()) - q)
    weight = torch.sigmoid(0.1 * (u - q).abs())
    return weight * F.softplus(-z) + (1 - weight) * torch.relu(1 - z)
""",
    "padll": """
def padll(pairs, *, beta: float = 0.05):
    rho = pairs.rho
    return 0.9 * (1 - 0.5 * (rho < 0)) * F.softplus(-beta * rho)
""",
    "cell": """
def cell(pairs, *, beta: float = 0.05):
    z = beta * pairs.rho
    return 0.5 * torch.exp(-z) + 0.5 * F.softplus(-z)
""",
    "pfl": """
def pfl(pairs, *, beta: float = 0.05):
    z = beta * pairs.rho
    return torch.where(pairs.delta > 0, F.softplus(-z) / 2, 2 * torch.relu(1 - z))
""",
    "sft": """
def sft(pairs):
    return -pairs.chosen / pairs.chosen_tokens
""",
}
SEEDS: dict[str, str] = {name: HEAD + text.lstrip("\n") for name, text in LOSSES.items()}
# The losses that the paper's search began with, less kto_pair, and the project's own.
DEFAULT = ("dpo", "hinge", "ipo", "td_dpo", "discopop")
# A pair's loss depends on the other pairs of its micro-batch: outside the search by default.
COUPLED = ("aot", "aot_unpaired", "kto_pair", "beta_dpo", "dbaql", "aql", "aqfl")
