"""losses.py against hand-worked values, identities and what TRL's own code returned."""

import json
import math
from pathlib import Path

import pytest
import torch

import losses
from losses import LOSSES, PairLogps, check_parameters, loss_defaults, token_full_kl, token_k3


def pairs_of(chosen, rejected, ref_chosen, ref_rejected, tokens=(4, 5), dtype=torch.float64, **more):
    tensor = lambda x: torch.as_tensor(x, dtype=dtype).reshape(-1)  # noqa: E731
    n = tensor(chosen).numel()
    return PairLogps(
        tensor(chosen), tensor(rejected), tensor(ref_chosen), tensor(ref_rejected),
        torch.full((n,), tokens[0], dtype=dtype), torch.full((n,), tokens[1], dtype=dtype), **more,
    )  # fmt: skip


def random_pairs(n=64, seed=0, scale=20.0):
    values = -scale * torch.rand(4, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return pairs_of(*values)


def sp(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0)


HAND = pairs_of(-10.0, -14.0, -12.0, -11.0)  # a = 2, b = -3, rho = 5, delta = 4; means: delta -2.5 + 2.8 = 0.3


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("dpo", {"beta": 0.1}, sp(-0.5)),
        ("dpo", {"beta": 0.1, "label_smoothing": 0.2}, 0.8 * sp(-0.5) + 0.2 * sp(0.5)),
        ("dpo", {"beta": 1.0, "logp": "mean"}, sp(-(2 / 4 + 3 / 5))),
        ("td_dpo", {"beta": 0.05, "tau": 2.0}, sp(-2.0) + 0.05 * 0.5 * (4 + 9)),
        ("td_dpo", {"beta": 0.05, "tau": 2.0, "margin": "ref"}, sp(-2.5) + 0.05 * 6.5),
        ("td_dpo", {"beta": 2.5, "tau": 0.5, "kl": "none"}, sp(-8.0)),
        ("td_dpo", {"beta": 2.0, "tau": 1.0, "logp": "mean"}, sp(-0.3) + 2.0 * 0.5 * (0.25 + 0.36)),
        ("dpo_kl", {"beta": 2.0}, sp(-0.3) + 2.0 * 0.5 * (0.25 + 0.36)),
        ("discopop", {"beta": 0.05}, sp(-0.25) / (1 + math.exp(5)) + math.exp(-0.25) / (1 + math.exp(-5))),
        ("dlrml", {"beta_mix": 0.2}, sp(-0.25) / (1 + math.exp(20)) + math.exp(-0.25) / (1 + math.exp(-20))),
    ],
)  # fmt: skip
def test_hand_worked_values(name, parameters, expected):
    values, terms = LOSSES[name](HAND, **parameters)
    assert values.shape == (1,)
    assert values.item() == pytest.approx(expected, rel=1e-12)
    assert "preference" in terms


def test_token_level_anchors_are_used_and_averaged():
    pairs = HAND._replace(kl_chosen=torch.tensor([2.0]).double(), kl_rejected=torch.tensor([5.0]).double())
    summed, terms = losses.td_dpo(pairs, beta=0.5, kl="k3")
    assert summed.item() == pytest.approx(sp(-4) + 0.5 * 7)
    assert terms["anchor"].item() == 7
    averaged, _ = losses.td_dpo(pairs, beta=0.5, kl="full_rev", logp="mean")
    assert averaged.item() == pytest.approx(sp(-0.3) + 0.5 * (2 / 4 + 5 / 5))


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_td_dpo_on_the_reference_margin_is_dpo(tau):
    pairs = random_pairs()
    mine, _ = losses.td_dpo(pairs, beta=7.0, tau=tau, margin="ref", kl="none")
    assert torch.allclose(mine, losses.dpo(pairs, beta=1 / tau)[0], rtol=1e-12)


def test_dpo_kl_is_td_dpo_at_tau_one_on_means():
    pairs = random_pairs()
    assert torch.equal(losses.dpo_kl(pairs, beta=0.3)[0], losses.td_dpo(pairs, beta=0.3, tau=1.0, logp="mean")[0])


@pytest.mark.parametrize("beta", [0.01, 0.05, 0.5, 2.5])
def test_dlrml_with_equal_betas_is_discopop(beta):
    pairs = random_pairs()
    mine, _ = losses.dlrml(pairs, beta=beta, beta_mix=beta)
    assert torch.allclose(mine, losses.discopop(pairs, beta=beta)[0], rtol=1e-12)


@pytest.mark.parametrize("beta", [0.01, 0.05, 0.5, 2.5])
def test_discopop_forms_agree_wherever_the_published_one_is_finite(beta):
    pairs = random_pairs(seed=3, scale=60)
    stable, published = (losses.discopop(pairs, beta=beta, discopop_form=f)[0] for f in ("stable", "published"))
    finite = published.isfinite()
    assert finite.sum() > 10
    assert torch.allclose(stable[finite], published[finite], rtol=1e-9)


def test_discopop_published_overflows_where_the_literature_says_and_stable_does_not():
    pairs = pairs_of([-90.0], [0.0], [0.0], [0.0], dtype=torch.float32)
    assert losses.discopop(pairs, beta=1.0, discopop_form="published")[0].isnan()
    assert losses.discopop(pairs, beta=1.0)[0].item() == pytest.approx(90.0)


def test_discopop_gradient_at_zero_has_the_published_wrong_sign():
    rho = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    losses.discopop(PairLogps(rho, zero, zero, zero, zero + 1, zero + 1), beta=1.0)[0].backward()
    # d/dz [(1-m) sp(-z) + m exp(-z)] at 0, m = 1/2, m' = 1/(4t) = 5: -5 ln 2 - 1/4 + 5 - 1/2
    assert rho.grad.item() == pytest.approx(5 - 5 * math.log(2) - 0.75, rel=1e-9)
    assert rho.grad.item() == pytest.approx(0.784, abs=1e-3)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("beta", [0.01, 0.05, 0.5, 2.5])
def test_finite_values_and_gradients_in_fp32_over_extreme_margins(name, beta):
    rho = torch.tensor([0, 1, -1, 50, -50, 500, -500, 1e4, -1e4], requires_grad=True)
    half, zero = rho / 2, torch.zeros(9)
    values, _ = LOSSES[name](PairLogps(half - 300, -half - 300, zero - 300, zero - 300, zero + 8, zero + 8), beta=beta)
    values.sum().backward()
    assert values.shape == (9,)
    assert values.isfinite().all()
    assert rho.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_do_not_couple_pairs(name):
    pairs = random_pairs(8)
    alone = torch.cat([LOSSES[name](PairLogps(*(t[i : i + 1] for t in pairs[:6])))[0] for i in range(8)])
    assert torch.allclose(LOSSES[name](pairs)[0], alone, rtol=1e-12)


@pytest.mark.parametrize("name", ["dpo", "td_dpo", "dpo_kl"])
def test_gradient_prefers_the_chosen_response(name):
    values = [torch.full((3,), -20.0, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    tokens = torch.full((3,), 5.0, dtype=torch.float64)
    LOSSES[name](PairLogps(*values, tokens, tokens))[0].sum().backward()
    assert (values[0].grad < 0).all() and (values[1].grad > 0).all()


def test_k3_and_full_divergences_against_torch_distributions():
    generator = torch.Generator().manual_seed(1)
    p, q = (torch.randn(6, 11, dtype=torch.float64, generator=generator) for _ in range(2))
    kl = torch.distributions.kl_divergence
    policy, reference = torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    assert torch.allclose(token_full_kl(p, q, "full_rev"), kl(policy, reference))
    assert torch.allclose(token_full_kl(p, q, "full_fwd"), kl(reference, policy))
    assert torch.allclose(token_full_kl(p, q, "full_sym"), (kl(policy, reference) + kl(reference, policy)) / 2)
    # k3 is unbiased on-policy: its expectation under p_theta is KL(p_theta || p_0)
    expectation = (policy.probs * token_k3(policy.logits - reference.logits)).sum(-1)
    assert torch.allclose(expectation, kl(policy, reference))
    assert (token_k3(torch.linspace(-5, 5, 21)) >= 0).all()


TRL = json.loads((Path(__file__).parent / "trl_losses.json").read_text())
TRL_TO_OURS = {"sigmoid": ("dpo", {}), "sigmoid_norm": ("dpo", {"logp": "mean"}), "discopop": ("discopop", {})}


@pytest.mark.parametrize("case", TRL["cases"], ids=lambda c: f"{c['loss']}-{c['beta']}")
def test_equal_to_trl(case):
    """Values that TRL 1.16's own code returned (bench/trl_losses.py), wherever they are finite."""
    name, parameters = TRL_TO_OURS[case["loss"]]
    settings = {key: value for key, value in case.items() if key not in ("loss", "values")}
    mine, _ = LOSSES[name](pairs_of(*TRL["pairs"], tokens=TRL["tokens"]), **parameters, **settings)
    finite = [i for i, value in enumerate(case["values"]) if value is not None]
    assert len(finite) >= 20
    expected = torch.tensor([case["values"][i] for i in finite], dtype=torch.float64)
    assert torch.allclose(mine[finite], expected, rtol=1e-9, atol=1e-300)


def test_defaults_come_from_the_signature():
    assert loss_defaults("td_dpo") == {"beta": 0.05, "tau": 1.0, "margin": "free", "kl": "k2", "logp": "sum"}


@pytest.mark.parametrize(
    ("name", "parameters", "named"),
    [
        ("td_dpo", {"tau": 0.0}, "--tau 0.0"),
        ("td_dpo", {"tau": float("nan")}, "--tau nan"),
        ("dpo", {"beta": -1.0}, "--beta -1.0"),
        ("dpo", {"beta": 0.0}, "no gradient"),
        ("dpo", {"label_smoothing": 0.5}, "--label_smoothing"),
        ("discopop", {"discopop_tau": 0.0}, "--discopop_tau"),
    ],
)
def test_bad_parameters_are_named(name, parameters, named):
    with pytest.raises(ValueError, match=named):
        check_parameters(name, parameters)


def test_td_dpo_may_have_no_anchor():
    check_parameters("td_dpo", {"beta": 0.0, "tau": 1.0})
