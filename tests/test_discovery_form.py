"""The restricted form: what it accepts means what it meant, and nothing else gets through."""

import ast
import inspect
import math
import random
import subprocess
import sys
import time

import discovery_attacks
import pytest
import torch
from conftest import ROOT, run_script

from losses import COUPLES_BATCH, LOSSES, PairLogps
from pref.discovery import form, form_tables, printing, second_reader
from pref.discovery.form_tables import Refusal
from pref.discovery.seeds import COUPLED, DEFAULT, SEEDS
from pref.files.console import UserError
from pref.training import arguments, loss_options

HEAD = "import math\nimport torch\nimport torch.nn.functional as F\n"


def pairs_at(scale, n=9, dtype=torch.float64):
    """Pairs whose log-ratios reach `scale` nats; at 0 the policy is its reference."""
    draw = torch.Generator().manual_seed(3)
    ref = -60 * torch.rand(2, n, dtype=torch.float64, generator=draw) - 1
    moved = scale * (2 * torch.rand(2, n, dtype=torch.float64, generator=draw) - 1)
    tokens = torch.randint(5, 40, (2, n), generator=draw)
    return PairLogps(*(ref + moved).to(dtype), *ref.to(dtype), *tokens.to(dtype), running_rho=0.3)


def value_and_gradient(loss, pairs, **parameters):
    """(3, B): losses, and the gradient to chosen and to rejected of their weighted sum."""
    leaves = {name: getattr(pairs, name).clone().requires_grad_() for name in pairs._fields[:2]}
    losses, terms = loss(pairs._replace(**leaves), **parameters)
    assert losses.shape == pairs.chosen.shape and terms["preference"].shape == losses.shape
    weights = torch.linspace(0.5, 1.5, len(losses), dtype=losses.dtype)
    gradients = torch.autograd.grad(
        (weights * losses).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return torch.stack([losses.detach(), *gradients])


def executed(text):
    """The function of a text that a test wrote, as Python understands it."""
    space = {}
    exec(HEAD + text, space)
    function = next(f for f in space.values() if inspect.isfunction(f))

    def loss(pairs, **parameters):
        result = function(pairs, **parameters)
        losses = result[0] if isinstance(result, tuple) else result
        return losses, {"preference": losses}

    return loss


def function_of(*lines, signature="pairs, *, beta: float = 0.1"):
    return f"def loss({signature}):\n" + "".join(f"    {line}\n" for line in lines)


# T1: the seeds


@pytest.mark.parametrize("name", SEEDS)
def test_seeds_equal_the_losses(name):
    program = form.translate(SEEDS[name], coupled=name in COUPLED)
    loss = printing.load(program.text)
    own = loss_options.own_defaults(LOSSES[name])
    assert program.coupled == (name in COUPLES_BATCH)
    numbers = {key: value for key, value in own.items() if isinstance(value, float)}
    assert program.parameters == numbers
    for factor in (1, 0.5, 3):
        parameters = {key: factor * value for key, value in numbers.items()}
        if numbers.get("label_smoothing") == 0:
            parameters["label_smoothing"] = 0.1 * (factor - 1)  # of which it is 0 once
            parameters["label_smoothing"] = abs(parameters["label_smoothing"])
        for scale in (0.0, 0.5, 20.0):
            pairs = pairs_at(scale)
            torch.testing.assert_close(
                value_and_gradient(loss, pairs, **parameters),
                value_and_gradient(LOSSES[name], pairs, **parameters),
                rtol=1e-10,
                atol=1e-12,
            )


def test_every_loss_has_a_seed():
    assert SEEDS.keys() == LOSSES.keys()
    assert set(COUPLED) == COUPLES_BATCH
    assert set(DEFAULT) <= SEEDS.keys() - set(COUPLED)


# T2: nothing gets out


def test_attacks_are_refused(tmp_path):
    marker = tmp_path / "marker"
    texts = discovery_attacks.attacks(str(marker))
    assert len(texts) > 200
    for name, text in texts.items():
        begun = time.process_time()
        with pytest.raises(Refusal) as refusal:
            form.translate(text, coupled=True)  # which accepts more
        message = str(refusal.value)
        assert "\n" not in message and len(message) < 600, name
        assert form.NOT_REPEATED not in message, name
        if name != "resources: squares":  # long, and harmless
            with pytest.raises(Refusal):
                second_reader.verify(text)
        assert time.process_time() - begun < 1, name
    assert not marker.exists()


@pytest.mark.slow
def test_attacks_are_none_of_straw(tmp_path):
    """Executed, as in the original search, most of those with a marker leave it."""
    script = """
import contextlib, io, os, pathlib, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch, discovery_attacks, losses
from test_discovery_form import pairs_at
left = 0
for k, text in enumerate(discovery_attacks.ATTACKS.values()):
    marker = pathlib.Path({folder!r}) / str(k)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(BaseException):
        space = {{}}
        exec(text.replace("MARKER", str(marker)), space)
        space["loss"](pairs_at(1.0))
    left += marker.exists()
print("left", left, flush=True)
os._exit(0)
"""
    values = {"root": str(ROOT), "tests": str(ROOT / "tests"), "folder": str(tmp_path)}
    executes = tmp_path / "executes.py"
    executes.write_text(script.format(**values))
    done = run_script(executes)
    assert int(done.stdout.split()[-1]) > 60, done.stderr[-2000:]


def test_augmented_assignment_leaves_the_inputs_alone():
    text = function_of(
        "x = pairs.ref_chosen",
        "x += pairs.chosen",
        "y = pairs.chosen",
        "y *= beta",
        "a, b = pairs.log_ratios",
        "a -= b",
        "return F.softplus(-a) + x * y",
    )
    pairs = pairs_at(2.0)
    before = [x.clone() for x in pairs[:6]]
    losses, _ = printing.load(form.translate(text).text)(pairs)
    assert all(torch.equal(x, y) for x, y in zip(pairs[:6], before))
    a, b = pairs.log_ratios
    x, y = pairs.ref_chosen + pairs.chosen, 0.1 * pairs.chosen
    torch.testing.assert_close(losses, torch.log1p(torch.exp(-(a - b))) + x * y)


def test_the_second_reader_refuses_what_the_printer_does_not_print():
    printed = form.translate(SEEDS["dpo"]).text
    second_reader.verify(printed)
    body = "    z = beta * pairs.rho\n"
    assert body in printed
    for line in (
        "z = torch.os",
        "z = torch.save(pairs.rho)",
        "z = pairs.kl_chosen",
        "z = beta * pairs.rho.data",
        "z = pairs.rho.to(torch.float16)",
        "z = pairs.rho.__class__",
        "z = beta.__class__",
        "z = torch.exp(pairs.rho, out=pairs.rho)",
        "z = torch.exp(*pairs)",
        "z = 9 ** 9 * pairs.rho",
        "z = beta * pairs.rho * 1e300",
        "z = 5",
        "z = unknown * pairs.rho",
        "z = beta * pairs.rho if beta else pairs.rho",
        "z = beta % pairs.rho",
        "z = 0 < pairs.rho < 1",
        "z = [pairs.rho]",
        "z = beta * pairs.rho; import os",
        "z += beta * pairs.rho",
        "torch.exp = beta * pairs.rho",
        "torch = beta * pairs.rho",
        "z: float = beta * pairs.rho",
        "a, b = pairs",
        "__z = beta * pairs.rho",
        "z = 'text'",
        "if len(pairs.chosen) < 3:\n        raise ValueError('x')",
    ):
        with pytest.raises(Refusal):
            second_reader.verify(printed.replace(body, f"    {line}\n"))
    for old, new in (
        ("import torch.nn.functional as F", "import os as F"),
        ("def ", "@torch.compile\ndef "),
        ("beta: float", "beta: print()"),
        ("= 0.1", "= print()"),
        ("pairs, *", "pairs=1, *"),
        ("pairs, *", "pairs, *x"),
        ('{"preference": losses}', '{"preference": print()}'),
        ("return losses,", "return print(),"),
        ("\n\n\ndef", "\nprint()\ndef"),
    ):
        assert old in printed
        with pytest.raises(Refusal):
            second_reader.verify(printed.replace(old, new))
    for text in ("", "x", "pass", "def f(): pass", "def f(pairs):\n    return (), {}"):
        with pytest.raises(Refusal):
            second_reader.verify(text)


# What is accepted, and what it means

HONEST = {
    "no star, no annotation": function_of(
        "z = beta * pairs.rho", "return F.softplus(-z)", signature="pairs, beta=0.1"
    ),
    "other name for pairs": function_of(
        "pairs = beta * batch.rho", "return F.softplus(-pairs)", signature="batch, *, beta=0.1"
    ),
    "annotations": "from torch import Tensor\nfrom losses import PairLogps\n"
    "def loss(pairs: PairLogps, *, beta: float = 0.1) -> tuple[Tensor, dict[None, Tensor]]:\n"
    "    z: Tensor = beta * pairs.rho\n"
    "    return -F.logsigmoid(z), {'margin': z, 'other': z.detach()}\n",
    "docstring with Greek": 'def loss(pairs, *, beta=0.1):\n    """Large \u03c1."""\n'
    "    return torch.sigmoid(-beta * pairs.rho)  # \u03c3(\u2212z)\n",
    "import inside": function_of("import math", "return math.pi * F.softplus(-beta * pairs.rho)"),
    "long path": "import torch.nn.functional\n"[:0]
    + function_of("return torch.nn.functional.softplus(-beta * pairs.rho)"),
    "methods": function_of(
        "z = (beta * pairs.rho).clamp(-3, 3)",
        "return z.sigmoid().neg().exp() + z.square() * z.abs().sqrt() + z.pow(2) + z.tanh()",
    ),
    "where": function_of(
        "z = beta * pairs.rho",
        "return torch.where((z > 0) & ~(z > 1) | (pairs.delta < 0), F.softplus(-z), 2 - z)",
    ),
    "where of numbers": function_of(
        "return torch.where(pairs.rho > 0, 1, 0.5) * F.softplus(-beta * pairs.rho)"
    ),
    "mask as a number": function_of(
        "m = pairs.rho < 0",
        "return (1 + beta * m) * F.softplus(-pairs.rho) + m.to(pairs.rho.dtype) * pairs.delta "
        "+ m.float() * pairs.rho.square()",
    ),
    "maximum of a number": function_of(
        "z = beta * pairs.rho",
        "return torch.maximum(1 - z, torch.tensor(0.0)) + torch.maximum(z, pairs.delta)",
    ),
    "logaddexp": function_of(
        "z = beta * pairs.rho", "return torch.logaddexp(torch.zeros_like(z), -z)"
    ),
    "means": function_of(
        "pairs = pairs.mean()",
        "a, _ = pairs.log_ratios",
        "return F.softplus(-beta * pairs.rho) + a.square() / pairs.chosen_tokens",
    ),
    "both": function_of(
        "a, b = pairs.log_ratios",
        "c, d = pairs.mean().log_ratios",
        "return a.square() + b * c + torch.exp(d) + pairs.mean().chosen * pairs.chosen",
    ),
    "arithmetic on parameters": function_of(
        "scale = math.log1p(beta) + math.sqrt(2.0) / abs(tau) ** 0.5",
        "return F.elu(-scale * pairs.rho, alpha=beta) + F.leaky_relu(pairs.delta, 0.2 * tau)",
        signature="pairs, *, beta: float = 0.1, tau: float = 2",
    ),
    "reassigned": function_of(
        "x = pairs.rho", "x = x * beta", "x = x + x", "x, y = x * x, x", "return x + y"
    ),
    "same name as ours": function_of(
        "t1 = beta * pairs.rho",
        "means, losses = torch.exp(-t1), torch.exp(t1)",
        "len = means * means + t1",
        "return (losses + len) * (losses + len)",
    ),
    "deep": function_of(
        "return F.softplus(1 + 2 * F.softplus(1 + 2 * F.softplus(1 + 2 * F.softplus("
        "1 + 2 * F.softplus(1 + 2 * F.softplus(1 + 2 * F.softplus(-beta * pairs.rho)))))))"
    ),
    "every function of a tensor": function_of(
        "x = pairs.rho / 30",
        "y = torch.exp(x) + torch.expm1(x) + torch.log(2 + x) + torch.log1p(x.abs() + 1)",
        "y += torch.erf(x) + torch.atan(x) + F.silu(x) + F.softsign(x) + torch.relu(x)",
        "y += torch.reciprocal(3 + x) + torch.sign(x) * x + torch.minimum(x, pairs.delta)",
        "return y + torch.ones_like(x) + torch.max(x, y) + torch.min(x, y)",
    ),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_texts_keep_their_meaning(name):
    program = form.translate(HONEST[name])
    for scale in (0.5, 20.0):
        torch.testing.assert_close(
            value_and_gradient(printing.load(program.text), pairs_at(scale)),
            value_and_gradient(executed(HONEST[name]), pairs_at(scale)),
            rtol=1e-7,
            atol=1e-9,
        )
    assert form.translate(program.text).text == program.text


def test_doubling_sixty_times_is_sixty_steps():
    text = function_of("x = beta * pairs.rho", *["x = x + x"] * 60, "return x / 1000000")
    assert form.translate(text).steps == 62


def test_dead_steps_and_idle_parameters_are_left_out():
    text = function_of(
        "dead = torch.exp(gamma * pairs.delta)",
        "z = beta * pairs.rho",
        "return F.softplus(-z), {'dead': dead}",
        signature="pairs, *, beta: float = 0.1, gamma: float = 1.0",
    )
    program = form.translate(text)
    assert program.parameters == {"beta": 0.1}
    assert program.steps == 3
    assert program.text == (
        "import torch.nn.functional as F\n\n\n"
        "def loss(pairs, *, beta: float = 0.1):\n"
        "    z = beta * pairs.rho\n"
        "    losses = F.softplus(-z)\n"
        '    return losses, {"preference": losses}\n'
    )


def test_equal_steps_are_one_step():
    text = function_of(
        "x = torch.sigmoid(beta * pairs.rho)",
        "return F.sigmoid(beta * pairs.rho) * x + (beta * pairs.rho).sigmoid() * (3 - 1)",
    )
    program = form.translate(text)
    assert program.steps == 5
    assert program.text.count("sigmoid") == 1


# T4: what is printed is a file for train_pref.py


def test_printed_texts_are_loss_files(tmp_path, monkeypatch):
    """They load, have arguments that train_pref.py can have, and equal the original."""
    monkeypatch.setattr(loss_options, "FROM_FILES", set())
    originals = {f"p0001_{name}": (SEEDS[name], LOSSES[name]) for name in SEEDS}
    originals |= {f"p0002_{k}": (text, executed(text)) for k, text in enumerate(HONEST.values())}
    for name, (original, loss) in originals.items():
        program = form.translate(original, name=name, coupled=True)
        assert program.name == name and program.text.endswith("}\n")
        second_reader.verify(program.text)
        path = tmp_path / f"{name}.py"
        path.write_text(program.text, encoding="utf-8")
        try:
            assert arguments.load_own_loss(["--loss_file", f"{path}:{name}"]) == name
            assert loss_options.own_defaults(LOSSES[name]) == program.parameters
            loss_options.check_parameters(name, loss_options.loss_defaults(name))
            torch.testing.assert_close(
                value_and_gradient(LOSSES[name], pairs_at(1.0)),
                value_and_gradient(loss, pairs_at(1.0)),
                rtol=1e-7,
                atol=1e-9,
            )
        finally:
            LOSSES.pop(name, None)


def test_arguments_of_train_pref_are_renamed(tmp_path):
    names = {"seed": 1.5, "margin": 2.0, "kl": 0.5, "beta": -1.0, "label_smoothing": 0.7, "tau": 1}
    signature = "pairs, *, " + ", ".join(f"{name}={value}" for name, value in names.items())
    total = " + ".join(names)
    text = f"def dpo({signature}):\n    return ({total}) * pairs.rho\n"
    program = form.translate(text)
    assert program.name == "my_dpo"
    assert program.parameters == {
        "loss_seed": 1.5,
        "loss_margin": 2.0,
        "loss_kl": 0.5,
        "loss_beta": -1.0,
        "loss_label_smoothing": 0.7,
        "tau": 1.0,
    }
    path = tmp_path / "loss.py"
    path.write_text(program.text, encoding="utf-8")
    try:
        assert arguments.load_own_loss(["--loss_file", f"{path}:my_dpo"]) == "my_dpo"
        losses, _ = LOSSES["my_dpo"](pairs_at(1.0))
    finally:
        LOSSES.pop("my_dpo", None)
    torch.testing.assert_close(losses, 4.7 * pairs_at(1.0).rho)


def test_the_tables_know_train_pref_py():
    declared = {"help", *arguments.DEFAULTS, *(a.flag for a in arguments.ARGUMENTS if a.flag)}
    floats = {a.name: a for a in loss_options.PARAMETERS if a.values is float}
    of_score = {name for name in floats if name.startswith("score")}
    assert declared - floats.keys() | of_score == form_tables.TAKEN_ARGUMENTS
    assert LOSSES.keys() == form_tables.TAKEN_LOSSES
    for name, argument in floats.items():
        if name in of_score:
            continue
        for value in (-1.0, 0.0, 0.25, 0.5, 1.0, 3.0):
            allowed = argument.range.allows(value) and not (name == "beta" and value == 0)
            assert (printing.parameter_name(name, value) == name) == allowed, (name, value)


def test_needs_two_pairs_is_said_as_the_trainer_expects():
    program = form.translate(SEEDS["dbaql"], coupled=True)
    with pytest.raises(ValueError, match="at least 2 pairs"):
        printing.load(program.text)(pairs_at(1.0, n=1))
    assert form.translate(program.text, coupled=True).text == program.text


# Refusals: kind, line, remedy

REFUSED = {
    "mean": ("return F.softplus(-z).mean()", "type", "one loss per pair, never a mean"),
    "torch.mean": ("return torch.mean(F.softplus(-z))", "type", "never a mean"),
    "sum inside": ("return F.softplus(-z) / z.sum()", "type", "never a mean"),
    "max of one": ("return z - torch.max(z)", "type", "never a mean"),
    "sort": ("return z.sort().values", "type", "other pairs of the batch"),
    "running_rho": ("return z - pairs.running_rho", "type", "other pairs of the batch"),
    "no gradient": ("return pairs.ref_chosen", "type", "no gradient reaches the policy"),
    "detached": ("return F.softplus(-z.detach())", "type", "no gradient reaches the policy"),
    "sign alone": ("return torch.sign(z)", "type", "no gradient reaches the policy"),
    "a mask": ("return z > 0", "type", "returns a mask"),
    "a number": ("return beta", "type", "returns a number"),
    "nothing": ("return", "form", "one value a pair"),
    "the pairs": ("return pairs", "type", "pairs.chosen"),
    "the log-ratios": ("return pairs.log_ratios", "form", "a, b = pairs.log_ratios"),
    "power of a tensor": ("return z ** z", "type", "torch.exp(y * torch.log(x))"),
    "number to a tensor": ("return 2 ** z", "type", "torch.exp(y * torch.log(x))"),
    "high power": ("return z ** 9", "type", "at most 8"),
    "large number": ("return 1e9 * z", "form", "1e-09 to 1e+06"),
    "folded number": ("return 1e6 * 1e6 * z", "form", "1e-09 to 1e+06"),
    "small number": ("return 1e-12 * z", "form", "1e-09 to 1e+06"),
    "division by 0": ("return z / (beta - 0.1)", "type", "division by zero"),
    "log of a negative": ("return math.log(-beta) * z", "type", "no finite number"),
    "root of a negative": ("return (-beta) ** 0.5 * z", "type", "no finite number"),
    "overflow": ("return math.exp(10000 * beta) * z", "type", "no finite number"),
    "sigmoid of a number": ("return torch.sigmoid(beta) * z", "type", "takes a tensor"),
    "if expression": ("return z if beta > 0 else -z", "form", "torch.where"),
    "chain": ("return torch.where(0 < z < 1, z, -z)", "form", "(0 < x) & (x < 1)"),
    "and": ("return torch.where(z > 0 and z < 1, z, -z)", "form", "(x > 0) & (y > 0)"),
    "not": ("return torch.where(not z > 0, z, -z)", "form", "~(x > 0)"),
    "where of a tensor": ("return torch.where(z, z, -z)", "type", "a mask first"),
    "and of tensors": ("return z & z", "type", "takes masks"),
    "equality": ("return torch.where(z == 0, z, -z)", "form", "< > <= >="),
    "comparison of numbers": ("return torch.where(beta > 0, z, -z)", "type", "no 'if'"),
    "clamp of tensors": ("return z.clamp(min=pairs.delta)", "type", "torch.maximum"),
    "clamp without bounds": ("return z.clamp()", "form", "min= or max="),
    "clamp twice": ("return z.clamp(0, min=1)", "form", "twice"),
    "no arguments": ("return torch.exp()", "form", "1 argument"),
    "too many": ("return torch.exp(z, z)", "form", "1 argument"),
    "no such function": ("return torch.cos(z)", "form", "it has abs"),
    "no such input": ("return pairs.length * z", "form", "it has chosen"),
    "no such name": ("return y", "form", "known are pairs, beta"),
    "softplus with beta": ("return F.softplus(-z, beta=2)", "form", "no keywords"),
    "modulo": ("return z % 2", "form", "+ - * / **"),
    "mean of the mean": ("return pairs.mean().mean().rho", "form", "once"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_kind_line_and_remedy(name):
    line, kind, remedy = REFUSED[name]
    with pytest.raises(Refusal) as refusal:
        form.translate(function_of("z = beta * pairs.rho", line))
    assert refusal.value.kind == kind
    assert refusal.value.line == 3
    assert str(refusal.value).startswith("line 3: ") and remedy in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_function_itself_can_be_refused():
    for text, kind, remedy in (
        ("", "form", "0 functions"),
        ("x = 1", "form", "outside the function only imports"),
        ("def loss(pairs:\n", "syntax", "no Python"),
        ("def loss():\n    return 1\n", "form", "def name(pairs"),
        ("def loss(pairs, beta):\n    return beta * pairs.rho\n", "form", "has a number"),
        (function_of("return pairs.rho", signature="pairs, *, x=True"), "form", "a number"),
        (function_of("return pairs.rho", signature="pairs, *, x=1e9"), "form", "1e+06"),
        (function_of("return pairs.rho", signature="pairs, *, x=1, x=2"), "syntax", "two par"),
        (function_of("x = pairs.rho"), "form", "last line"),
        (function_of('"""Only a docstring."""'), "form", "last line"),
        (function_of("return pairs.rho", "return pairs.rho"), "form", "one return"),
        (function_of(f"{'x' * 41} = 1", "return pairs.rho"), "size", "at most 40"),
        (function_of("__x = 1", "return pairs.rho"), "form", "a letter, then"),
        (
            function_of(
                "return pairs.rho",
                signature="pairs, *, " + ", ".join(f"x{k}=1" for k in range(7)),
            ),
            "size",
            "at most 6",
        ),
        (function_of("x = pairs.rho", *["x = torch.exp(x)"] * 97, "return x"), "size", "96"),
        (
            function_of(
                f"{'x' * 37}00 = pairs.rho",
                *[f"{'x' * 37}{k + 1:02} = {'x' * 37}{k:02}.exp()" for k in range(62)],
                f"return {'x' * 37}62",
            ),
            "size",
            "too long when printed",
        ),
    ):
        with pytest.raises(Refusal) as refusal:
            form.translate(text)
        assert refusal.value.kind == kind and remedy in str(refusal.value), str(refusal.value)


def test_the_name_that_is_asked_for():
    assert form.translate(SEEDS["dpo"], name="p0031__x").name == "p0031__x"
    for name in ("", "1x", "a b", "__x", "x" * 41, "x\n"):
        with pytest.raises(ValueError, match="letter"):
            form.translate(SEEDS["dpo"], name=name)


def test_statistics_of_the_batch_need_coupled():
    for name in COUPLED:
        with pytest.raises(Refusal, match="batch"):
            form.translate(SEEDS[name])
    stat = function_of("return (beta * pairs.rho).mean()")
    with pytest.raises(Refusal, match="one value a batch"):
        form.translate(stat, coupled=True)
    odd = function_of("return pairs.rho / pairs.running_rho")
    with pytest.raises(Refusal, match="running_rho"):
        form.translate(odd, coupled=True)


def test_check_file(tmp_path):
    path = tmp_path / "my_loss.py"
    path.write_text(HEAD + HONEST["methods"], encoding="utf-8")
    assert form.check_file(path) == form.translate(HONEST["methods"]).text
    path.write_bytes(b"\xef\xbb\xbf" + SEEDS["aot"].replace("\n", "\r\n").encode())
    assert "sort" in form.check_file(path)  # a byte order mark, other line ends, a statistic
    path.write_text(function_of("return pairs.rho.mean()"), encoding="utf-8")
    for file, content, message in (
        (path, None, "my_loss.py: line 2: "),
        (tmp_path / "none.py", None, "no such file"),
        (tmp_path, None, "is a folder"),
        (path, b"\xff\xfe\x00", "not UTF-8"),
        (path, "\u03b2".encode() * 9_000_000, "at most 6,000"),
    ):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            form.check_file(file)


def test_the_description_names_every_function():
    text = form_tables.describe()
    assert all(f"{name}" in text for name in form_tables.FUNCTIONS)
    assert "sort()" not in text and "sort()" in form_tables.describe(coupled=True)


def test_translation_needs_no_torch():
    code = (
        "import sys; from pref.discovery import form, seeds; "
        "form.translate(seeds.SEEDS['dpo']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr


# T3: fuzz

PIECES = """\
pairs rho delta chosen . ( ) + - * / ** < > & ~ 1 0.5 beta z a b torch F math .exp() log
sigmoid .mean() .detach() where clamp min= max= , = x return losses x= x+= _ __class__ lambda: if
[0] 's' { } import 1e9 1e-12 True None : @ torch.where( torch.maximum( F.elu( alpha= .log_ratios
.to(pairs.rho.dtype) .sort().values # \u03c1 \x00 \ud800 \uff11 pairs.mean() (z<0) ;"""
PIECES = PIECES.split()
PIECES += ["\n    ", "\n", "\t", "    x = ", "\n    a, b = pairs.log_ratios\n", " "]


def mutated(text, texts, rng):
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3, 5])):
        i = rng.randrange(len(text) + 1)
        j = min(len(text), i + rng.choice([0, 0, 1, 1, 2, 5, 20]))
        kind = rng.random()
        if kind < 0.5:
            text = text[:i] + rng.choice(PIECES) + text[j:]
        elif kind < 0.65:
            text = text[:i] + text[j:]
        elif kind < 0.8:
            other = rng.choice(texts)
            k = rng.randrange(len(other))
            text = text[:i] + other[k : k + rng.choice([5, 20, 80])] + text[j:]
        else:
            lines = text.split("\n")
            a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
            lines[a], lines[b] = lines[b], lines[a]
            text = "\n".join(lines)
    return text


def fuzz(seed, seconds, meaning):
    """Mutate the seeds; what is accepted is translated again, and, where `meaning`, compared with
    what Python makes of the text. Returns how many texts were tried, accepted and compared.
    """
    rng, texts = random.Random(seed), list(SEEDS.values())
    tried = accepted = compared = 0
    end = time.process_time() + seconds
    while time.process_time() < end:
        text = mutated(rng.choice(texts), texts, rng)
        tried += 1
        try:
            program = form.translate(text, coupled=rng.random() < 0.5)
        except Refusal as refusal:
            assert form.NOT_REPEATED not in str(refusal), text
            continue
        accepted += 1
        texts = [*texts[:31], *texts[31:][-200:], text]
        assert form.translate(program.text, coupled=True).text == program.text
        if meaning:
            compared += means_the_same(text, program)
    return tried, accepted, compared


class Unaliased(ast.NodeTransformer):
    """x += y as x = x + y, as the form has it: in place, y = x would change with x."""

    def visit_AugAssign(self, node):
        old = ast.Name(node.target.id, ast.Load())
        new = ast.Assign([node.target], ast.BinOp(old, node.op, node.value))
        return ast.fix_missing_locations(ast.copy_location(new, node))


def means_the_same(text, program):
    """Compare a text with its translation in value and gradient; 0 where Python refuses the text,
    as it does when torch has no such function.
    """
    loss = printing.load(program.text)
    pairs = pairs_at(1.0)
    try:
        plain = text.encode("ascii", "replace").decode()
        text = ast.unparse(Unaliased().visit(ast.parse(plain)))
        expected = value_and_gradient(executed(text), pairs)
    except (AttributeError, TypeError, RuntimeError, NameError, ValueError, AssertionError):
        return 0
    except (SyntaxError, OverflowError, ZeroDivisionError):
        return 0
    torch.testing.assert_close(
        value_and_gradient(loss, pairs), expected, rtol=1e-6, atol=1e-8, equal_nan=True, msg=text
    )
    return 1


def test_fuzz():
    tried, accepted, _ = fuzz(seed=1, seconds=0.4, meaning=False)
    assert tried > 50 and accepted > 5


@pytest.mark.slow
def test_fuzz_long():
    tried, accepted, compared = fuzz(seed=time.time_ns(), seconds=2, meaning=True)
    assert tried > 100 and accepted > 10 and compared > 0.3 * accepted


def test_softplus_by_hand():
    """One pair: a = 2, b = -3, beta 0.1: sp(-0.5)."""
    pair = PairLogps(*(torch.tensor([x]) for x in (-10.0, -14.0, -12.0, -11.0, 4.0, 5.0)))
    losses, _ = printing.load(form.translate(SEEDS["dpo"]).text)(pair)
    assert losses.item() == pytest.approx(math.log1p(math.exp(-0.5)), rel=1e-6)
