"""How a genome is changed: mutation and crossover. Everything random comes from the `rng` given."""

import math
import random
from itertools import zip_longest

from pref.discovery.genome import (
    BETA_RANGE,
    MAX_NODES,
    OPERATIONS,
    PROGRAM,
    Genome,
    Node,
    grow_operation,
    grow_tree,
    places,
    replaced,
    rounded,
    uses_beta,
)

SMALL = 6  # nodes of a new part of a tree


def offspring(parents: list[Genome], rng: random.Random) -> tuple[Genome | None, str]:
    """(child, how it was made) of one parent or two. None where the draw cannot be carried out, or
    gives the parent again, or more than MAX_NODES nodes.
    """
    if len(parents) == 2:
        child, operator = crossover(*parents, rng), "crossover"
    else:
        mutation = rng.choices(list(MUTATIONS), list(MUTATIONS.values()))[0]
        child, operator = mutation(*parents, rng), mutation.__name__.replace("_", " ")
    if child is None or child in parents or child.size > MAX_NODES:
        return None, operator
    return child, operator


def crossover(taker: Genome, giver: Genome, rng: random.Random) -> Genome | None:
    """`taker` with a part of `giver` in the place of a part of the same sort, and the beta of
    either.
    """
    path, old = rng.choice(list(places(taker.tree)))
    parts = [node for _, node in places(giver.tree) if node.sort == old.sort]
    if not parts:
        return None
    tree = replaced(taker.tree, path, rng.choice(parts))
    betas = [genome.beta for genome in (taker, giver) if uses_beta(genome.tree)]
    return Genome(rng.choice(betas or [taker.beta]), tree)


def vary_beta(genome: Genome, rng: random.Random) -> Genome | None:
    """beta times e^N(0, 0.7)."""
    if not uses_beta(genome.tree):
        return None
    low, high = BETA_RANGE
    beta = genome.beta * math.exp(rng.gauss(0, 0.7))
    return genome._replace(beta=rounded(min(max(beta, low), high)))


def vary_constant(genome: Genome, rng: random.Random) -> Genome | None:
    """One constant times e^N(0, 0.5), within its range."""
    constants = [
        (path, node, index)
        for path, node in places(genome.tree)
        for index in range(len(node.genes))
    ]
    if not constants:
        return None
    path, node, index = rng.choice(constants)
    genes = list(node.genes)
    genes[index] = node.ranges()[index].vary(genes[index], rng)
    return genome._replace(tree=replaced(genome.tree, path, node._replace(genes=tuple(genes))))


def swap_operation(genome: Genome, rng: random.Random) -> Genome | None:
    """An operation in the place of another with the same children."""
    choices = [(path, node) for path, node in places(genome.tree) if _alternatives(node)]
    if not choices:
        return None
    path, node = rng.choice(choices)
    name = rng.choice(_alternatives(node))
    # Constants with the same ranges mean the same, e.g. the temperature of a sigmoid.
    ranges = OPERATIONS[name].genes
    genes = tuple(
        old if new == was else new.draw(rng)
        for new, was, old in zip_longest(ranges, node.ranges()[: len(ranges)], node.genes)
        if new is not None
    )
    swapped = Node(name, genes, node.children)
    return genome._replace(tree=replaced(genome.tree, path, swapped))


def wrap(genome: Genome, rng: random.Random) -> Genome | None:
    """A part becomes the child of a new operation: mixed, weighed, anchored, added to another,
    shifted, penalised, clamped, ...
    """
    path, node = rng.choice(list(places(genome.tree)))
    wrappers = {
        name: operation
        for name, operation in OPERATIONS.items()
        if operation.sort == node.sort and operation.nests
    }
    if not wrappers:
        return None
    frequencies = [operation.frequency for operation in wrappers.values()]
    name = rng.choices(list(wrappers), frequencies)[0]
    own = [i for i, sort in enumerate(OPERATIONS[name].children) if sort == node.sort]
    wrapped = grow_operation(name, rng, node.size + SMALL, given={rng.choice(own): node})
    return genome._replace(tree=replaced(genome.tree, path, wrapped))


def hoist(genome: Genome, rng: random.Random) -> Genome | None:
    """A part takes the place of one that contains it: the loss gets simpler."""
    choices = [
        (path, inner)
        for path, outer in places(genome.tree)
        for below, inner in places(outer)
        if below and inner.sort == outer.sort
    ]
    if not choices:
        return None
    path, inner = rng.choice(choices)
    return genome._replace(tree=replaced(genome.tree, path, inner))


def regrow(genome: Genome, rng: random.Random) -> Genome | None:
    """A part is grown anew."""
    path, node = rng.choice(list(places(genome.tree)))
    return genome._replace(tree=replaced(genome.tree, path, grow_tree(node.sort, rng, SMALL)))


def _alternatives(node: Node) -> list[str]:
    """Operations of the same sort with the same children."""
    if node.op == PROGRAM:
        return []
    return [
        name
        for name, operation in OPERATIONS.items()
        if name != node.op
        and (operation.sort, operation.children) == (node.sort, OPERATIONS[node.op].children)
    ]


# With the share of each.
MUTATIONS = {
    vary_beta: 0.15,
    vary_constant: 0.25,
    swap_operation: 0.20,
    wrap: 0.15,
    hoist: 0.10,
    regrow: 0.15,
}
