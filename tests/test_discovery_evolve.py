"""Genomes, what is bred from them, and the two proposers that need no model."""

import random
import re

import pytest
import torch

import losses
from pref.discovery import breeding
from pref.discovery.genome import (
    MAX_NODES,
    OPERATIONS,
    grow,
    places,
)
from pref.discovery.known_genomes import KNOWN_GENOMES
from pref.discovery.writing import write

# losses.py's value over the genome's.
FACTORS = {"ipo": 25, "robust": 0.9 / 0.8, "sppo_hard": 250_000, "padll": 0.9, "cell": 0.5}
LOG_RATIOS = (0, 0.3, 1, 3, 10, 30, 100, 300)


def grid(dtype):
    """Pairs at all combinations of log-ratios, for references and lengths near and far apart."""
    sides = torch.tensor([s * x for x in LOG_RATIOS for s in (1, -1)][1:], dtype=dtype)
    a, b = (side.flatten() for side in torch.meshgrid(sides, sides, indexing="ij"))
    parts = []
    for ref_chosen, ref_rejected, tokens in ((-40, -41, (20, 20)), (-300, -9, (150, 3))):
        parts.append(
            losses.PairLogps(
                chosen=(ref_chosen + a),
                rejected=(ref_rejected + b),
                ref_chosen=torch.full_like(a, ref_chosen),
                ref_rejected=torch.full_like(a, ref_rejected),
                chosen_tokens=torch.full_like(a, tokens[0]),
                rejected_tokens=torch.full_like(a, tokens[1]),
            )
        )
    columns = (torch.cat(column) for column in zip(*(part[:6] for part in parts)))
    return losses.PairLogps(*columns)


def value_and_gradient(loss, pairs):
    """(3, B): value, d/d chosen, d/d rejected."""
    chosen = pairs.chosen.clone().requires_grad_()
    rejected = pairs.rejected.clone().requires_grad_()
    values, _ = loss(pairs._replace(chosen=chosen, rejected=rejected))
    assert values.shape == chosen.shape
    gradients = torch.autograd.grad(
        values.sum(), (chosen, rejected), allow_unused=True, materialize_grads=True
    )
    return torch.stack([values.detach(), *gradients])


def executed(text):
    """The function of a text of our own."""
    space = {}
    exec(text, space)
    name = re.search(r"^def (\w+)", text, re.MULTILINE)[1]
    return space[name]


def of_genome(genome, pairs):
    return value_and_gradient(executed(write(genome, "loss_of_genome")), pairs)


@pytest.mark.parametrize("name", KNOWN_GENOMES)
def test_known_genomes_equal_losses(name):
    pairs = grid(torch.float64)
    # The two that are equal but for: delta = 0 exactly; and the genome's exp, which ends at 20.
    kept = {"pfl": pairs.delta != 0, "cell": pairs.rho > -400}.get(name, pairs.rho < torch.inf)
    pairs = losses.PairLogps(*(column[kept] for column in pairs[:6]))
    ours = FACTORS.get(name, 1) * of_genome(KNOWN_GENOMES[name], pairs)
    theirs = value_and_gradient(losses.LOSSES[name], pairs)
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def bred(count):
    """Genomes grown, mutated and crossed, for some generations."""
    rng = random.Random(20)
    pool = list(KNOWN_GENOMES.values())
    while len(pool) < count:
        if rng.random() < 0.2:
            pool.append(grow(rng))
            continue
        child, _ = breeding.offspring(rng.choices(pool, k=rng.choice((1, 2))), rng)
        if child is not None:
            pool.append(child)
    return pool


BRED = bred(560)


def test_whatever_is_bred_is_finite_everywhere_and_small():
    """In fp32, as in training."""
    pairs = grid(torch.float32)
    assert max(genome.size for genome in BRED) <= MAX_NODES
    assert sum(genome.size > 12 for genome in BRED) > 20  # and not all of them are trivial
    used = {node.op for genome in BRED for _, node in places(genome.tree)}
    assert used == OPERATIONS.keys()
    for genome in BRED:
        assert of_genome(genome, pairs).isfinite().all(), write(genome, "loss")
