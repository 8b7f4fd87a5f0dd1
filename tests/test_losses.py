"""losses.py against hand-worked values, identities, and values that TRL's own code returned."""

import json
import math
import statistics
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import losses
from losses import LOSSES, PairLogps
from pref.files.console import UserError
from pref.model import token_scores
from pref.model.token_scores import token_full_kl, token_k3
from pref.training import loss_check, loss_command, loss_options
from pref.training.loss_options import check_parameters, loss_defaults


def pairs_of(
    chosen, rejected, ref_chosen, ref_rejected, tokens=(4, 5), dtype=torch.float64, **more
):
    """PairLogps of numbers or lists. tokens: length of the chosen and of the rejected responses."""
    tensor = lambda x: torch.as_tensor(x, dtype=dtype).reshape(-1)  # noqa: E731
    count = tensor(chosen).numel()
    return PairLogps(
        chosen=tensor(chosen),
        rejected=tensor(rejected),
        ref_chosen=tensor(ref_chosen),
        ref_rejected=tensor(ref_rejected),
        chosen_tokens=torch.full((count,), tokens[0], dtype=dtype),
        rejected_tokens=torch.full((count,), tokens[1], dtype=dtype),
        **more,
    )


def random_pairs(n=64, seed=0, scale=20.0):
    values = -scale * torch.rand(
        4, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return pairs_of(*values)


def sp(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0)


# a = 2, b = -3, rho = 5, delta = 4; of means, delta = -2.5 + 2.8 = 0.3
HAND = pairs_of(-10.0, -14.0, -12.0, -11.0)


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
        (
            "discopop",
            {"beta": 0.05},
            sp(-0.25) / (1 + math.exp(5)) + math.exp(-0.25) / (1 + math.exp(-5)),
        ),
        (
            "dlrml",
            {"beta_mix": 0.2},
            sp(-0.25) / (1 + math.exp(20)) + math.exp(-0.25) / (1 + math.exp(-20)),
        ),
    ],
)
def test_hand_worked_values(name, parameters, expected):
    values, terms = LOSSES[name](HAND, **parameters)
    assert values.shape == (1,)
    assert values.item() == pytest.approx(expected, rel=1e-12)
    assert "preference" in terms


def test_token_level_anchors_are_used_and_averaged():
    pairs = HAND._replace(
        kl_chosen=torch.tensor([2.0]).double(), kl_rejected=torch.tensor([5.0]).double()
    )
    summed, terms = losses.td_dpo(pairs, beta=0.5, kl="k3")
    assert summed.item() == pytest.approx(sp(-4) + 0.5 * 7)
    assert terms["anchor"].item() == 7
    averaged, _ = losses.td_dpo(pairs, beta=0.5, kl="full_rev", logp="mean")
    assert averaged.item() == pytest.approx(sp(-0.3) + 0.5 * (2 / 4 + 5 / 5))


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_td_dpo_on_the_reference_margin_is_dpo(tau):
    pairs = random_pairs()
    ours, _ = losses.td_dpo(pairs, beta=7.0, tau=tau, margin="ref", kl="none")
    assert torch.allclose(ours, losses.dpo(pairs, beta=1 / tau)[0], rtol=1e-12)


def test_dpo_kl_is_td_dpo_at_tau_one_on_means():
    pairs = random_pairs()
    assert torch.equal(
        losses.dpo_kl(pairs, beta=0.3)[0], losses.td_dpo(pairs, beta=0.3, tau=1.0, logp="mean")[0]
    )


@pytest.mark.parametrize("beta", [0.01, 0.05, 0.5, 2.5])
def test_dlrml_with_equal_betas_is_discopop(beta):
    pairs = random_pairs()
    ours, _ = losses.dlrml(pairs, beta=beta, beta_mix=beta)
    assert torch.allclose(ours, losses.discopop(pairs, beta=beta)[0], rtol=1e-12)


@pytest.mark.parametrize("beta", [0.01, 0.05, 0.5, 2.5])
def test_discopop_forms_agree_wherever_the_published_one_is_finite(beta):
    pairs = random_pairs(seed=3, scale=60)
    stable, published = (
        losses.discopop(pairs, beta=beta, discopop_form=f)[0] for f in ("stable", "published")
    )
    finite = published.isfinite()
    assert finite.sum() > 10
    assert torch.allclose(stable[finite], published[finite], rtol=1e-9)


def test_discopop_published_overflows_where_the_literature_says_and_stable_does_not():
    pairs = pairs_of([-90.0], [0.0], [0.0], [0.0], dtype=torch.float32)
    assert losses.discopop(pairs, beta=1.0, discopop_form="published")[0].isnan()
    assert losses.discopop(pairs, beta=1.0)[0].item() == pytest.approx(90.0)


def test_discopop_gradient_at_zero_has_the_published_wrong_sign():
    rho = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    losses.discopop(pairs_of(rho, 0.0, 0.0, 0.0), beta=1.0)[0].backward()
    # d/dz [(1-m) sp(-z) + m exp(-z)] at 0, m = 1/2, m' = 1/(4t) = 5: -5 ln 2 - 1/4 + 5 - 1/2
    assert rho.grad.item() == pytest.approx(5 - 5 * math.log(2) - 0.75, rel=1e-9)
    assert rho.grad.item() == pytest.approx(0.784, abs=1e-3)


@pytest.mark.parametrize("name", ["dpo", "td_dpo", "dpo_kl"])
def test_gradient_prefers_the_chosen_response(name):
    chosen, rejected = torch.full((2, 3), -20.0, dtype=torch.float64).requires_grad_()
    chosen.retain_grad()
    rejected.retain_grad()
    LOSSES[name](pairs_of(chosen, rejected, [-20.0] * 3, [-20.0] * 3))[0].sum().backward()
    assert (chosen.grad < 0).all() and (rejected.grad > 0).all()


def test_k3_and_full_divergences_against_torch_distributions():
    generator = torch.Generator().manual_seed(1)
    p, q = (torch.randn(6, 11, dtype=torch.float64, generator=generator) for _ in range(2))
    kl = torch.distributions.kl_divergence
    policy, reference = (
        torch.distributions.Categorical(logits=p),
        torch.distributions.Categorical(logits=q),
    )
    assert torch.allclose(token_full_kl(p, q, "full_rev"), kl(policy, reference))
    assert torch.allclose(token_full_kl(p, q, "full_fwd"), kl(reference, policy))
    assert torch.allclose(
        token_full_kl(p, q, "full_sym"), (kl(policy, reference) + kl(reference, policy)) / 2
    )
    # k3 is unbiased on-policy: its expectation under p_theta is KL(p_theta || p_0)
    expectation = (policy.probs * token_k3(policy.logits - reference.logits)).sum(-1)
    assert torch.allclose(expectation, kl(policy, reference))
    assert (token_k3(torch.linspace(-5, 5, 21)) >= 0).all()


TRL = json.loads((Path(__file__).parent / "trl_losses.json").read_text())
TRL_TO_OURS = {"sigmoid": ("dpo", {}), "sigmoid_norm": ("dpo", {"logp": "mean"})}


@pytest.mark.parametrize(
    "case", TRL["cases"], ids=lambda c: f"{c['loss']}-{c['beta']}-{c.get('label_smoothing', 0)}"
)
def test_equal_to_trl(case):
    """Values that TRL 1.16's own code returned (bench/trl_losses.py), wherever they are finite."""
    name, parameters = TRL_TO_OURS.get(case["loss"], (case["loss"], {}))
    settings = {key: value for key, value in case.items() if key not in ("loss", "values")}
    ours, _ = LOSSES[name](pairs_of(*TRL["pairs"], tokens=TRL["tokens"]), **parameters, **settings)
    if len(case["values"]) == 1:  # couples the batch: TRL's mean over it
        assert ours.mean().item() == pytest.approx(case["values"][0], rel=1e-9)
        return
    finite = [i for i, value in enumerate(case["values"]) if value is not None]
    assert len(finite) >= 20
    expected = torch.tensor([case["values"][i] for i in finite], dtype=torch.float64)
    assert torch.allclose(ours[finite], expected, rtol=1e-6, atol=1e-15)


def test_every_type_that_trl_has_too_is_compared():
    compared = {TRL_TO_OURS.get(case["loss"], (case["loss"], {}))[0] for case in TRL["cases"]}
    named = "dpo discopop hinge ipo bco_pair nca_pair apo_zero apo_down sppo_hard aot aot_unpaired"
    assert compared == {*named.split(), "robust", "exo_pair"}


# ---- every loss against scalar arithmetic written out by hand, with its gradient ----------------


def sigma(x):
    return 1 / (1 + math.exp(-x))


def exo(z):
    return sigma(z) * (math.log(sigma(z)) - math.log(0.999)) + sigma(-z) * (
        math.log(sigma(-z)) - math.log(1e-3)
    )


C, R = 4, 5  # response lengths of the pairs below
MEAN = statistics.fmean


def by_hand(name, pairs):
    """Losses of `pairs`, a list of (lp_c, lp_r, ref_c, ref_r), at the loss's defaults, with the
    math module alone.
    """
    lc, lr, rc, rr = zip(*pairs)
    a, b = [x - y for x, y in zip(lc, rc)], [x - y for x, y in zip(lr, rr)]
    rho, delta = [x - y for x, y in zip(a, b)], [x - y for x, y in zip(lc, lr)]
    nll = [-x / C for x in lc]
    mean_rho = [x / C - y / R for x, y in zip(a, b)]
    mean_c, mean_r = [x / C for x in lc], [x / R for x in lr]
    each = lambda f, *columns: [f(*row) for row in zip(*columns)]  # noqa: E731
    log_odds = lambda p, q: (p - q) - (math.log(1 - math.exp(p)) - math.log(1 - math.exp(q)))  # noqa: E731
    if name in ("dbaql", "aql", "aqfl", "padll", "cell", "pfl"):
        z = [0.05 * x for x in rho]
        u = [x / 0.05 for x in z]
        if name == "dbaql":
            c = sigma(statistics.variance(u))
            return each(lambda z: c * sp(-z / 0.9) + (1 - c) * math.exp(-0.9 * z), z)
        if name == "aql":
            q = 0.5 + 0.01 * (sigma(MEAN(u)) - 0.5)
            weights = [sigma(q - x) for x in u]
        elif name == "aqfl":
            q = statistics.stdev(u) * MEAN([sigma(-x) for x in u])
            q += 0.05 * (sigma(MEAN(u)) - q)
            weights = [sigma(0.1 * abs(x - q)) for x in u]
        elif name == "padll":
            return each(lambda z, r: 0.9 * (1 - 0.5 * (r < 0)) * sp(-z), z, rho)
        elif name == "cell":
            return each(lambda z: 0.5 * math.exp(-z) + 0.5 * sp(-z), z)
        else:
            return each(lambda z, d: sp(-z) / 2 if d > 0 else 2 * max(0, 1 - z), z, delta)
        return each(lambda z, w: w * sp(-z) + (1 - w) * max(0, 1 - z), z, weights)
    if name == "kto_pair":
        kl_c, kl_r = KTO_MEANS or (max(0, MEAN(a)), max(0, MEAN(b)))
        return each(lambda a, b: (sigma(-0.1 * (a - kl_r)) + sigma(-0.1 * (kl_c - b))) / 2, a, b)
    if name == "beta_dpo":
        beta = max(1e-3, 0.1 * (1 + 0.6 * (BETA_MEAN if BETA_MEAN is not None else MEAN(rho))))
        return each(lambda r: sp(-beta * r), rho)
    if name in ("aot", "aot_unpaired"):
        better, worse = (delta, each(lambda x, y: x - y, rc, rr)) if name == "aot" else (a, b)
        return each(lambda x, y: sp(-0.01 * (x - y)), sorted(better), sorted(worse))
    written_out = {
        "td_dpo": lambda: each(lambda d, a, b: sp(-d) + 0.05 * 0.5 * (a * a + b * b), delta, a, b),
        "dpo": lambda: each(lambda r: sp(-0.1 * r), rho),
        "dpo_kl": lambda: each(
            lambda p, q, a, b: sp(q - p) + 0.025 * ((a / C) ** 2 + (b / R) ** 2),
            mean_c,
            mean_r,
            a,
            b,
        ),
        "robust": lambda: each(lambda r: (0.9 * sp(-0.1 * r) - 0.1 * sp(0.1 * r)) / 0.8, rho),
        "discopop": lambda: each(
            lambda r: sigma(-r) * sp(-0.05 * r) + sigma(r) * math.exp(-0.05 * r), rho
        ),
        "dlrml": lambda: each(
            lambda r: sigma(-4 * r) * sp(-0.05 * r) + sigma(4 * r) * math.exp(-0.05 * r), rho
        ),
        "ipo": lambda: each(lambda r: (r - 5) ** 2, mean_rho),
        "hinge": lambda: each(lambda r: max(0, 1 - 0.05 * r), rho),
        "slic": lambda: each(lambda d, n: max(0, 1 - d) + 0.1 * n, delta, nll),
        "simpo": lambda: each(lambda p, q: sp(1 - 2 * (p - q)), mean_c, mean_r),
        "orpo": lambda: each(lambda n, p, q: n + 0.1 * sp(-log_odds(p, q)), nll, mean_c, mean_r),
        "cpo": lambda: each(lambda d, n: sp(-0.1 * d) + n, delta, nll),
        "exo_pair": lambda: each(lambda r: exo(0.1 * r), rho),
        "nca_pair": lambda: each(
            lambda a, b: sp(-0.01 * a) + 0.5 * sp(0.01 * a) + 0.5 * sp(0.01 * b), a, b
        ),
        "bco_pair": lambda: each(lambda a, b: sp(-0.1 * a) + sp(0.1 * b), a, b),
        "sppo_hard": lambda: each(lambda a, b: (a - 500) ** 2 + (b + 500) ** 2, a, b),
        "apo_zero": lambda: each(lambda a, b: 1 - sigma(0.1 * a) + sigma(0.1 * b), a, b),
        "apo_down": lambda: each(lambda a, r: sigma(0.1 * a) + 1 - sigma(0.1 * r), a, rho),
        "rpo": lambda: each(lambda r, n: sp(-0.1 * r) + n, rho, nll),
        "dpop": lambda: each(lambda r, a: sp(-0.1 * (r - 50 * max(0, -a))), rho, a),
        "sft": lambda: nll,
    }
    assert name in written_out, f"write {name} out here, without losses.py and without torch"
    return written_out[name]()


FOUR = [
    (-10.0, -14.0, -12.0, -11.0),
    (-9.0, -8.5, -8.7, -9.5),
    (-3.0, -6.0, -3.5, -6.9),
    (-20.0, -12.0, -19.0, -13.5),
]
KTO_MEANS = BETA_MEAN = None  # frozen while differences are taken: those means carry no gradient


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_of_every_loss_by_hand(name, monkeypatch):
    leaves = torch.tensor(list(zip(*FOUR)), dtype=torch.float64, requires_grad=True)
    values, terms = LOSSES[name](pairs_of(*leaves))
    assert values.tolist() == pytest.approx(by_hand(name, FOUR), rel=1e-9)
    assert all(term.shape == (4,) for term in terms.values())
    values.sum().backward()
    a, b = [p[0] - p[2] for p in FOUR], [p[1] - p[3] for p in FOUR]
    monkeypatch.setattr(sys.modules[__name__], "KTO_MEANS", (max(0, MEAN(a)), max(0, MEAN(b))))
    monkeypatch.setattr(sys.modules[__name__], "BETA_MEAN", MEAN([x - y for x, y in zip(a, b)]))
    for row in range(4):
        for side in range(2):
            step = 1e-5
            shifted = [[list(p) for p in FOUR] for _ in range(2)]
            shifted[0][row][side] += step
            shifted[1][row][side] -= step
            slope = (sum(by_hand(name, shifted[0])) - sum(by_hand(name, shifted[1]))) / (2 * step)
            assert leaves.grad[side, row].item() == pytest.approx(slope, rel=1e-5, abs=1e-8), (
                row,
                side,
            )


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_passes_its_self_test(name):
    report = loss_check.check(name)
    assert report.failures == []


def test_self_test_says_where_exponential_branches_and_the_published_form_leave_fp32():
    notes = {
        name: " ".join(loss_check.check(name).notes)
        for name in ("cell", "dbaql", "discopop", "dpo")
    }
    assert "beta 1: leaves float32 beyond rho -89.4" in notes["cell"]
    assert "leaves float32" in notes["dbaql"] and "leaves float32" not in notes["dpo"]
    assert "published is nan in float32 beyond z -88.7" in notes["discopop"]
    assert "points the wrong way" in notes["discopop"]


BAD_LOSSES = {
    "wrong_shape": (
        "return pairs.rho.mean(), {}",
        "has shape () for 1 pairs: return one value per pair",
    ),
    "no_dict": ("return -beta * pairs.rho", "must return (losses, terms)"),
    "a_number": ("return -beta * pairs.rho, {'b': beta}", "b is a float"),
    "overflows": (
        "return torch.exp(pairs.rho) / torch.exp(pairs.rho) - pairs.rho, {}",
        "its value is NaN at rho 10000",
    ),
    "nan_at_0": (
        "return (pairs.rho ** 2).sqrt() - beta * pairs.rho, {}",
        "its gradient is NaN at rho 0, {'beta': 0.1}, where every run starts",
    ),
    "inf_at_0": (
        "return pairs.rho.clamp(min=0) ** 0.5 - beta * pairs.rho, {}",
        "its gradient is infinite in float32 at rho 0",
    ),
    "nan_around_0": (
        "return -beta * pairs.rho / ((pairs.rho > 0.01) | (pairs.rho <= 0)), {}",
        "at rho 1e-06",
    ),
    "nan_at_the_reference": (
        "return -beta * pairs.rho + ((pairs.chosen - pairs.ref_chosen) ** 2).sqrt(), {}",
        "where every run starts",
    ),
    "nan_far_away": (
        "return -beta * pairs.rho + 0 * (2 * pairs.rho).exp(), {}",
        "its value is NaN at rho 500",
    ),
    "nan_at_the_last_margin": (
        "return -beta * pairs.rho + 0 * (0.1 * pairs.rho).exp(), {}",
        "its value is NaN at rho 10000, {'beta': 0.1}",
    ),
    "root_of_the_margin": (
        "return torch.nn.functional.softplus(-beta * pairs.rho) + pairs.rho.abs().sqrt(), {}",
        "where every run starts",
    ),
    "nan_everywhere": ("return pairs.chosen.log(), {}", "NaN or infinite on ordinary log-prob"),
    "nan_for_one_pair": (
        "return (pairs.rho - pairs.rho.mean()) / pairs.rho.std() - beta * pairs.rho, {}",
        "not finite for 1 pair(s); a loss that needs more pairs",
    ),
    "no_gradient": ("return torch.relu(pairs.rho.detach()) + 0 * pairs.rho, {}", "no gradient"),
    "raises": ("return pairs.nothing, {}", "raises AttributeError"),
    "no_such_name": ("return missing * pairs.rho, {}", "name 'missing' is not defined"),
    "overflows_in_python": ("return 1e200 ** (20 * beta) * pairs.rho, {}", "raises OverflowError"),
    "imprecise": ("return (pairs.rho + 1e6) - 1e6, {}", "float32"),
}


@pytest.mark.parametrize("kind", BAD_LOSSES)
def test_self_test_finds_what_is_wrong(tmp_path, kind):
    body, message = BAD_LOSSES[kind]
    (tmp_path / "mine.py").write_text(
        f"import torch\n\ndef {kind}(pairs, *, beta: float = 0.1):\n    {body}\n"
    )
    loss_options.load_loss_file(f"{tmp_path}/mine.py:{kind}")
    try:
        assert any(message in failure for failure in loss_check.check(kind).failures)
    finally:
        del LOSSES[kind]
        loss_options.FROM_FILES.discard(kind)


def test_a_value_that_happens_to_be_almost_0_is_precise_enough():
    """A hinge just before its kink: float32 rounds 1 - z, whatever is left of it."""

    def hinge_without_reference(pairs, *, beta=0.05):
        return torch.relu(1 - beta * pairs.delta), {}

    failures = []
    loss_check.check_precision(hinge_without_reference, [], failures)
    assert failures == []
    loss_check.check_precision(lambda pairs: ((pairs.rho + 1e6) - 1e6, {}), [], failures)
    assert len(failures) == 1


def test_the_search_for_the_edge_of_float32_ends_near_0():
    tried = []
    edge = loss_check.overflow_edge(lambda margin: tried.append(margin), outside=-1e4)
    assert edge == 0 and len(tried) < 40


@pytest.mark.parametrize("parameter", ["seed: float = 1.0", "margin: float = 1.0", "kl: int = 1"])
def test_check_refuses_a_parameter_that_train_pref_would_refuse(tmp_path, parameter):
    file = tmp_path / "mine.py"
    file.write_text(f"def mine(pairs, *, {parameter}):\n    return -pairs.rho, {{}}\n")
    name = parameter.partition(":")[0]
    with pytest.raises(UserError, match=f"parameter {name} .*rename it"):
        loss_command.run_check(f"{file}:mine", tmp_path / "plot.png")
    assert "mine" not in LOSSES and "mine" not in loss_options.FROM_FILES


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine.py", "write it as"),
        ("none.py:f", "no such file"),
        ("bad.py:f", "SyntaxError"),
        ("ok.py:g", "no function"),
        ("ok.py:plain", "write plain as def"),
        ("ok.py:clash", "means something else"),
        ("ok.py:dpo", "give yours another name"),
        ("ok.py:odd", "needs a number or text"),
    ],
)
def test_loss_files_that_cannot_be_used_are_named(tmp_path, spec, message):
    (tmp_path / "bad.py").write_text("def f(:")
    (tmp_path / "ok.py").write_text(
        "def dpo(pairs): pass\ndef odd(pairs, *, x=None): pass\n"
        "def plain(pairs, beta=0.1): pass\ndef clash(pairs, *, margin=1.0): pass\n"
    )
    with pytest.raises(ValueError, match=message):
        loss_options.load_loss_file(f"{tmp_path}/{spec}")


# ---- identities ---------------------------------------------------------------------------------


def test_rpo_without_sft_is_dpo():
    pairs = random_pairs()
    assert torch.equal(losses.rpo(pairs, sft_coef=0.0)[0], losses.dpo(pairs)[0])


def test_td_dpo_on_the_free_margin_without_anchor_is_cpo_without_its_sft_term():
    pairs = random_pairs()
    cpo, _ = losses.cpo(pairs, beta=0.5, sft_coef=0.0)
    assert torch.allclose(losses.td_dpo(pairs, tau=2.0, kl="none")[0], cpo, rtol=1e-12)


def test_dlrml_without_mixing_is_cell():
    pairs = random_pairs()
    ours, _ = losses.dlrml(pairs, beta=0.3, beta_mix=0.0)
    assert torch.allclose(ours, losses.cell(pairs, beta=0.3)[0], rtol=1e-12)


@pytest.mark.parametrize("beta_mix", [0.05, 0.2, 0.5])
def test_dlrml_gradient_at_zero(beta_mix):
    """beta_mix (1 - ln 2) / (4 t) - 0.75 beta, as pref/training/LOSSES.md derives it."""
    beta, t = 0.05, 0.05
    rho = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    pairs = pairs_of(rho, 0.0, 0.0, 0.0)
    losses.dlrml(pairs, beta=beta, beta_mix=beta_mix, discopop_tau=t)[0].backward()
    expected = beta_mix * (1 - math.log(2)) / (4 * t) - 0.75 * beta
    assert rho.grad.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("beta", "tau"), [(0.05, 1.0), (2.5, 0.5), (2.5, 2.0)])
def test_td_dpo_moves_each_response_by_at_most_one_over_beta_tau(beta, tau):
    """Where the preference term is saturated, its optimum is a = -b = 1 / (beta tau)."""
    a = torch.linspace(0, 1.5 / (beta * tau), 1501, dtype=torch.float64)
    ref_chosen = torch.full_like(a, -500.0)  # far below the rejected response: saturated
    pairs = pairs_of(ref_chosen + a, -100.0 - a, ref_chosen, torch.full_like(a, -100.0))
    values, _ = losses.td_dpo(pairs, beta=beta, tau=tau)
    assert a[values.argmin()].item() == pytest.approx(1 / (beta * tau), rel=1e-3)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_simpo_without_gamma_is_td_dpo_on_means_without_anchor(beta):
    pairs = random_pairs()
    ours, _ = losses.simpo(pairs, beta=beta, gamma=0.0)
    assert torch.allclose(
        ours, losses.td_dpo(pairs, tau=1 / beta, kl="none", logp="mean")[0], rtol=1e-12
    )


def test_sft_term_is_added_to_any_loss():
    pairs = random_pairs()
    parameters = {**loss_defaults("dpo"), "sft_coef": 0.3}
    ours, terms = loss_options.bind("dpo", parameters)(pairs)
    assert torch.allclose(ours, losses.dpo(pairs)[0] - 0.3 * pairs.chosen / 4)
    assert torch.allclose(terms["score"], -pairs.chosen / 4)
    scored = pairs._replace(score_chosen=torch.full((64,), 8.0, dtype=torch.float64))
    assert torch.allclose(
        loss_options.bind("dpo", parameters)(scored)[0], losses.dpo(pairs)[0] + 0.3 * 2.0
    )


def test_beta_dpo_follows_the_batch():
    pairs = random_pairs()
    _, terms = losses.beta_dpo(pairs._replace(running_rho=pairs.rho.mean().item()), beta=0.2)
    assert torch.allclose(terms["beta"], torch.tensor(0.2).double())
    assert losses.beta_dpo(pairs._replace(running_rho=1e6), beta=0.2)[1]["beta"][0] == 1e-3


# ---- proper scoring rules -----------------------------------------------------------------------

RULES = [(rule, 2.0) for rule in ("log", "brier", "spherical")]
RULES += [(rule, alpha) for rule in ("alpha_power", "pseudo_spherical") for alpha in (1.3, 3.0)]


@pytest.mark.parametrize(("rule", "alpha"), RULES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_scores_against_probabilities_written_out(rule, alpha, smoothing):
    logits = torch.randn(7, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    targets = torch.tensor([0, 3, 12, 5, 5, 1, 8])
    p = logits.softmax(-1)
    label = (1 - smoothing) * torch.nn.functional.one_hot(targets, 13).double() + smoothing / 13
    per_outcome = {
        "log": -p.log(),
        "brier": -2 * p + p.square().sum(-1, keepdim=True),
        "spherical": -p / p.norm(dim=-1, keepdim=True),
        "alpha_power": -alpha * p ** (alpha - 1) + (alpha - 1) * (p**alpha).sum(-1, keepdim=True),
        "pseudo_spherical": -(p ** (alpha - 1))
        / (p**alpha).sum(-1, keepdim=True) ** ((alpha - 1) / alpha),
    }[rule]
    ours = token_scores.token_score(logits, targets, rule, alpha, smoothing)
    assert torch.allclose(ours, (label * per_outcome).sum(-1), rtol=1e-10)


@pytest.mark.parametrize(("rule", "alpha"), RULES)
def test_honest_forecasts_win(rule, alpha):
    """The expected score is best for the true distribution, against 10,000 random forecasts."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(6, dtype=torch.float64, generator=generator)
    forecasts = (
        truth
        + torch.randn(10_000, 6, dtype=torch.float64, generator=generator)
        * torch.logspace(-2, 1, 10_000)[:, None]
    )

    def expected(logits):
        scores = [
            token_scores.token_score(logits, torch.full((len(logits),), y), rule, alpha)
            for y in range(6)
        ]
        return (truth.softmax(-1) * torch.stack(scores, -1)).sum(-1)

    assert (expected(forecasts) > expected(truth[None])).all()


def test_alpha_two_is_brier_and_spherical():
    logits, targets = torch.randn(9, 40).double(), torch.arange(9)
    score = token_scores.token_score
    assert torch.equal(score(logits, targets, "alpha_power", 2.0), score(logits, targets, "brier"))
    assert torch.equal(
        score(logits, targets, "pseudo_spherical", 2.0), score(logits, targets, "spherical")
    )


def test_masked_log_term_keeps_a_gradient_where_brier_has_none():
    logits = torch.zeros(1, 5, dtype=torch.float64)
    logits[0, 0] = 60.0
    leaf = logits.clone().requires_grad_()
    token_scores.token_score(leaf, torch.tensor([3]), "brier").sum().backward()
    masked = logits.clone().requires_grad_()
    value = token_scores.token_score(masked, torch.tensor([3]), "brier", score_masked_log=0.1)
    value.sum().backward()
    assert leaf.grad[0, 3].abs() < 1e-20 and masked.grad[0, 3] < -0.01
    # By hand: log p is about -60 for four of five tokens, below log(0.1 / 5), and -0.1 times the
    # mean of these logs is 0.1 * 4 * 60 / 5.
    without = token_scores.token_score(logits, torch.tensor([3]), "brier")
    assert value.item() - without.item() == pytest.approx(4.8)


def test_scores_are_finite_over_extreme_logits_in_fp32():
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [-80.0, 80.0, 0.0]])
    for rule, alpha in RULES:
        for targets in ([0, 1, 2], [1, 2, 0]):
            leaf = logits.clone().requires_grad_()
            value = token_scores.token_score(leaf, torch.tensor(targets), rule, alpha, 0.1, 0.1)
            value.sum().backward()
            assert value.isfinite().all() and leaf.grad.isfinite().all(), (rule, alpha)


def test_defaults_come_from_the_signature():
    own = {"beta": 0.05, "tau": 1.0, "margin": "free", "kl": "k2", "logp": "sum"}
    assert loss_options.own_defaults(losses.td_dpo) == own
    assert loss_defaults("td_dpo") == {**losses.SFT_TERM, **own}
    assert "sft_coef" not in loss_defaults("sft") and loss_defaults("cpo")["sft_coef"] == 1.0


def test_every_loss_names_its_source_and_where_it_fails():
    for name, loss in LOSSES.items():
        assert "Fails:" in loss.__doc__ and "Source:" in loss.__doc__, name


def test_losses_without_a_paper_are_described_in_the_repository():
    described = [name for name, loss in LOSSES.items() if "training/LOSSES.md" in loss.__doc__]
    assert described == ["td_dpo", "dpo_kl", "dlrml"]
    text = (ROOT / "pref" / "training" / "LOSSES.md").read_text(encoding="utf-8")
    assert all(f"## {name}" in text for name in described)


def test_the_list_of_losses_prints_whole_formulas(capsys):
    loss_command.print_table()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(" " * 15) for line in lines) == len(LOSSES) + 1
    (aql,) = (line for line in lines if line.startswith("aql "))
    assert aql.endswith("w = sigma(q - u), q = 0.5 + 0.01 (sigma(mean u) - 0.5), u = z / 0.05")


@pytest.mark.parametrize(
    ("name", "parameters", "named"),
    [
        ("td_dpo", {"tau": 0.0}, "--tau 0.0"),
        ("td_dpo", {"tau": float("nan")}, "--tau nan"),
        ("dpo", {"beta": -1.0}, "--beta -1.0"),
        ("dpo", {"beta": 0.0}, "no gradient"),
        ("dpo", {"label_smoothing": 0.5}, "--label_smoothing"),
        ("discopop", {"discopop_tau": 0.0}, "--discopop_tau"),
        ("exo_pair", {"label_smoothing": 0.0}, "--label_smoothing"),
        ("sft", {"score_alpha": 1.0}, "--score_alpha"),
        ("dpop", {"dpop_lambda": math.inf}, "--dpop_lambda"),
    ],
)
def test_bad_parameters_are_named(name, parameters, named):
    with pytest.raises(ValueError, match=named):
        check_parameters(name, parameters)


def test_td_dpo_may_have_no_anchor():
    check_parameters("td_dpo", {"beta": 0.0, "tau": 1.0})
