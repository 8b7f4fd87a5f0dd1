"""Genomes of the evolution: losses as trees of typed operations.

A genome is a tree and one `beta` (1/nats) that the whole tree shares. The five sorts:

    N   nats: a log-ratio, or a difference of them; on means per token it is multiplied by 50, so
        that one beta serves sums and means
    U   a number without a unit: beta * N, shifted or squashed
    W   a weight from 0 to 1
    L   a loss, one value a pair; the root of every genome
    A   an anchor to the reference or to the chosen response

Only U enters a loss's curve (sigmoid, softplus, exp, the square), so that its argument never has a
unit. Nothing divides by a variable or takes a root, and the argument of exp ends at 20: every tree
is finite, with its gradient, wherever the log-ratios are.

A leaf of the operation `program` is a whole loss that somebody else wrote (opaque.py); of it only
the constants can vary.
"""

import math
import random
from collections.abc import Iterator
from typing import NamedTuple

from pref.files.console import UserError

MAX_NODES = 24
PROGRAM = "program"
BETA_RANGE = (1e-3, 10.0)  # 1/nats
NEW_BETA_RANGE = (0.01, 1.0)  # of a loss grown at random
TYPICAL_SIZES = (4, 16)  # nodes of a loss grown at random
# Each level of nesting makes an operation that contains its own sort rarer by this factor.
NESTING = 0.6


class Gene(NamedTuple):
    """The range of a constant: least <= value <= most, or least <= -value <= negative. Without
    `negative`, a constant keeps its sign.
    """

    least: float
    most: float
    negative: float = 0.0
    usual: float | None = None  # what most new genes are

    def draw(self, rng: random.Random) -> float:
        """A new value, uniform in its logarithm."""
        if self.usual is not None and rng.random() < 0.7:
            return self.usual
        if self.negative and rng.random() < 0.3:
            return rounded(-_log_uniform(rng, self.least, self.negative))
        return rounded(_log_uniform(rng, self.least, self.most))

    def vary(self, value: float, rng: random.Random) -> float:
        """`value` times e^N(0, 0.5), within the range; one in ten changes its sign if it may."""
        value *= math.exp(rng.gauss(0, 0.5))
        if self.negative and rng.random() < 0.1:
            value = -value
        limit = self.negative or self.most if value < 0 else self.most
        return rounded(math.copysign(min(max(abs(value), self.least), limit), value))


class Operation(NamedTuple):
    """A production. In `text`, {0}, {1} are the children and {g[0]}, {g[1]} the genes."""

    sort: str
    children: str  # their sorts, a letter each
    text: str
    frequency: float  # in trees grown at random, relative to others of the sort
    genes: tuple[Gene, ...] = ()

    @property
    def nests(self) -> bool:
        """Whether it contains its own sort, and can therefore be wrapped around it."""
        return self.sort in self.children


_TEMPERATURE = Gene(0.03, 5)  # of sigmoid(U / t)
_POWER = Gene(0.3, 3)

OPERATIONS: dict[str, Operation] = {
    # N, nats. pairs.rho = a - b; a and b are the two log-ratios.
    "rho": Operation("N", "", "pairs.rho", 4),
    "delta": Operation("N", "", "pairs.delta", 3),
    "chosen": Operation("N", "", "a", 1),
    "rejected": Operation("N", "", "-b", 1),
    "mean_rho": Operation("N", "", "50.0 * pairs.mean().rho", 2),
    "mean_delta": Operation("N", "", "50.0 * pairs.mean().delta", 2),
    "less": Operation("N", "N", "({0}) - {g[0]}", 1, (Gene(0.3, 30),)),
    "penalised": Operation("N", "N", "({0}) - {g[0]} * F.relu(-a)", 1, (Gene(0.1, 50),)),
    "clamped": Operation(
        "N", "N", "torch.clamp({0}, min=-{g[0]}, max={g[0]})", 0.5, (Gene(1, 100),)
    ),
    # U, a number
    "scaled": Operation("U", "N", "{g[0]} * beta * ({0})", 6, (Gene(0.2, 5, usual=1.0),)),
    "shifted": Operation("U", "U", "({0}) {g[0]:+}", 1.5, (Gene(0.03, 3, negative=3),)),
    "squashed": Operation("U", "U", "{g[0]} * torch.tanh(({0}) / {g[0]})", 1, (Gene(0.3, 10),)),
    # W, 0 to 1. A power of a sigmoid is computed from its logarithm: its derivative stays finite
    # where the sigmoid itself is 0.
    "rising": Operation("W", "U", "torch.sigmoid(({0}) / {g[0]})", 2, (_TEMPERATURE,)),
    "falling": Operation("W", "U", "torch.sigmoid(-({0}) / {g[0]})", 2, (_TEMPERATURE,)),
    "rising_power": Operation(
        "W", "U", "torch.exp({g[1]} * F.logsigmoid(({0}) / {g[0]}))", 1, (_TEMPERATURE, _POWER)
    ),
    "falling_power": Operation(
        "W", "U", "torch.exp({g[1]} * F.logsigmoid(-({0}) / {g[0]}))", 1, (_TEMPERATURE, _POWER)
    ),
    "detached": Operation("W", "W", "({0}).detach()", 1),
    "share": Operation(
        "W", "", "pairs.chosen_tokens / (pairs.chosen_tokens + pairs.rejected_tokens)", 0.5
    ),
    # L, a loss. `_up` is the same curve the wrong way round, of use only within a sum or a mixture.
    "logistic": Operation("L", "U", "F.softplus(-({0}))", 4),
    "exponential": Operation("L", "U", "torch.exp(torch.clamp(-({0}), max=20.0))", 1),
    "hinge": Operation("L", "U", "F.relu(1.0 - ({0}))", 2),
    "hinge_square": Operation("L", "U", "torch.square(F.relu(1.0 - ({0})))", 1),
    "square": Operation("L", "U", "torch.square(1.0 - ({0}))", 1.5),
    "sigmoid": Operation("L", "U", "torch.sigmoid(-({0}))", 1.5),
    "logistic_up": Operation("L", "U", "F.softplus({0})", 0.5),
    "sigmoid_up": Operation("L", "U", "torch.sigmoid({0})", 0.5),
    "score": Operation("L", "", "-pairs.mean().chosen", 0.2),
    "mix": Operation("L", "WLL", "({0}) * ({1}) + (1.0 - ({0})) * ({2})", 3),
    "weighed": Operation("L", "WL", "2.0 * ({0}) * ({1})", 2),
    "plus": Operation("L", "LL", "({0}) {g[0]:+} * ({1})", 4, (Gene(0.02, 2, negative=0.5),)),
    "where": Operation("L", "ULL", "torch.where(({0}) >= 0.0, {1}, {2})", 2),
    "anchored": Operation("L", "LA", "({0}) {g[0]:+} * ({1})", 4, (Gene(1e-4, 1),)),
    # A, an anchor
    "squares": Operation("A", "", "0.5 * (torch.square(a) + torch.square(b))", 2),
    "common_square": Operation("A", "", "torch.square(a + b)", 1),
    "chosen_lost": Operation("A", "", "F.relu(-a)", 1),
    "rejected_gained": Operation("A", "", "F.relu(b)", 1),
    "chosen_score": Operation("A", "", "-pairs.mean().chosen", 1),
}
# Nodes that a child of each sort is given at least. With 1 for W and L, a tree that has few nodes
# left would always end in `share` and `score`.
FEWEST = {"N": 1, "U": 2, "W": 3, "L": 3, "A": 1}


class Node(NamedTuple):
    op: str
    genes: tuple[float, ...] = ()
    children: tuple["Node", ...] = ()
    text: str = ""  # of a `program` (opaque.py)

    @property
    def sort(self) -> str:
        return "L" if self.op == PROGRAM else OPERATIONS[self.op].sort

    @property
    def size(self) -> int:
        """Nodes of the tree; a program is one."""
        return 1 + sum(child.size for child in self.children)

    def ranges(self) -> tuple[Gene, ...]:
        """The range of each gene."""
        if self.op == PROGRAM:
            return (Gene(1e-6, 1e5),) * len(self.genes)
        return OPERATIONS[self.op].genes


class Genome(NamedTuple):
    beta: float  # 1/nats
    tree: Node

    @property
    def size(self) -> int:
        return self.tree.size

    def to_json(self) -> dict:
        """{"beta", "tree"}; a node is [operation, genes, children], of a program also its text."""
        return {"beta": self.beta, "tree": _node_to_json(self.tree)}


def from_json(data: dict) -> Genome:
    """The genome that `to_json` returned. Raises UserError for anything that is not one."""
    try:
        genome = Genome(float(data["beta"]), _node_from_json(data["tree"], "L"))
        assert math.isfinite(genome.beta), genome.beta
    except (AssertionError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"a genome in the archive cannot be read ({error!r}); restore archive.jsonl, or start a"
            " new search in another folder"
        ) from None
    return genome


def rounded(value: float) -> float:
    """Three significant digits: what is bred should be readable."""
    return float(f"{value:.3g}")


def _log_uniform(rng: random.Random, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _node_to_json(node: Node) -> list:
    data = [node.op, list(node.genes), [_node_to_json(child) for child in node.children]]
    return [*data, node.text] if node.op == PROGRAM else data


def _node_from_json(data: list, sort: str) -> Node:
    op, genes, children, *text = data
    kinds = "" if op == PROGRAM else OPERATIONS[op].children
    assert len(children) == len(kinds), f"{op}: {len(children)} children"
    node = Node(
        op,
        tuple(float(gene) for gene in genes),
        tuple(_node_from_json(child, kind) for child, kind in zip(children, kinds)),
        *text,
    )
    assert node.sort == sort, f"{op}: not of sort {sort}"
    assert len(node.genes) == len(node.ranges()), f"{op}: {len(genes)} constants"
    assert all(map(math.isfinite, node.genes)), f"{op}: {genes}"
    return node


# Trees

Path = tuple[int, ...]  # which child to take at each level; () is the root


def places(tree: Node, path: Path = ()) -> Iterator[tuple[Path, Node]]:
    """Every node with its path, parents before children."""
    yield path, tree
    for index, child in enumerate(tree.children):
        yield from places(child, (*path, index))


def replaced(tree: Node, path: Path, new: Node) -> Node:
    """`tree` with `new` in the place of the node at `path`."""
    if not path:
        return new
    children = list(tree.children)
    children[path[0]] = replaced(children[path[0]], path[1:], new)
    return tree._replace(children=tuple(children))


def uses_beta(tree: Node) -> bool:
    return any(node.op == "scaled" for _, node in places(tree))


# Growing


def grow(rng: random.Random) -> Genome:
    """A random loss."""
    budget = rng.randint(*TYPICAL_SIZES)
    tree = grow_tree("L", rng, budget)
    while tree.size < budget // 2:  # most trees are tiny; a search needs others too
        tree = grow_tree("L", rng, budget)
    return Genome(rounded(_log_uniform(rng, *NEW_BETA_RANGE)), tree)


def grow_tree(sort: str, rng: random.Random, budget: int, depth: int = 0) -> Node:
    """A random tree of `sort` with at most `budget` nodes, at least FEWEST[sort]."""
    names, frequencies = [], []
    for name, operation in OPERATIONS.items():
        fewest = 1 + sum(FEWEST[child] for child in operation.children)
        if operation.sort == sort and fewest <= budget:
            names.append(name)
            frequencies.append(operation.frequency * (NESTING**depth if operation.nests else 1))
    return grow_operation(rng.choices(names, frequencies)[0], rng, budget, depth)


def grow_operation(
    name: str, rng: random.Random, budget: int, depth: int = 0, given: dict[int, Node] | None = None
) -> Node:
    """A node of the operation `name`; children that are not `given` by their position are grown.
    It has at most `budget` nodes, unless the smallest children already take more.
    """
    operation, given = OPERATIONS[name], given or {}
    fewest = [
        given[index].size if index in given else FEWEST[sort]
        for index, sort in enumerate(operation.children)
    ]
    spare = budget - 1 - sum(fewest)
    children = []
    for index, sort in enumerate(operation.children):
        if index in given:
            children.append(given[index])
            continue
        child = grow_tree(sort, rng, fewest[index] + max(spare, 0), depth + 1)
        spare -= child.size - fewest[index]
        children.append(child)
    genes = tuple(gene.draw(rng) for gene in operation.genes)
    return Node(name, genes, tuple(children))
