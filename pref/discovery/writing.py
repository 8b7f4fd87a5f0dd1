"""A genome as a program in the restricted form: `write`."""

import ast
import re
from collections.abc import Iterator

from pref.discovery.genome import OPERATIONS, PROGRAM, Genome, Node, places, uses_beta
from pref.discovery.opaque import statements

NAME_LENGTH = 24
# Variables are called after the sort of what they hold.
STEMS = {"N": "margin", "U": "z", "W": "weight", "L": "loss", "A": "anchor"}
NOT_FREE = {"pairs", "beta", "a", "b", "losses", "torch", "F", "math"}


def write(genome: Genome, name: str) -> str:
    """The text of the loss `name`, equal to the genome in value and gradient."""
    writer = _Writer(name)
    losses = writer.expression(genome.tree)
    body = [*writer.lines, f"losses = {losses}"]
    if any(re.search(r"\b[ab]\b", line) for line in body):
        body.insert(0, "a, b = pairs.log_ratios")
    body.append('return losses, {"preference": losses}')
    beta = f", *, beta: float = {genome.beta!r}" if uses_beta(genome.tree) else ""
    function = f"def {name}(pairs{beta}):\n" + "".join(f"    {line}\n" for line in body)
    # Parsed and printed again: without the brackets that nothing needs.
    function = ast.unparse(ast.parse(function))
    imports = "import math\n\n" if "math." in function else ""  # in an opaque leaf
    return f"{imports}import torch\nimport torch.nn.functional as F\n\n\n{function}\n"


def operations(text: str) -> int:
    """Operations and inputs that the text names: at least as many as its program has steps."""
    steps = (ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.Attribute)
    return sum(isinstance(node, steps) for node in ast.walk(ast.parse(text)))


def describe(genome: Genome) -> str:
    """A name that says what a genome is made of, e.g. mix_sigmoid_logistic."""
    words = dict.fromkeys(node.op for _, node in _losses(genome.tree))
    name = ""
    for word in words:
        longer = f"{name}_{word}" if name else word
        if len(longer) > NAME_LENGTH:
            break
        name = longer
    return name


def _losses(tree: Node) -> Iterator[tuple[tuple[int, ...], Node]]:
    return ((path, node) for path, node in places(tree) if node.sort == "L")


class _Writer:
    """Writes a tree as assignments. What has children of its own gets a variable; the same
    expression is computed once.
    """

    def __init__(self, name: str):
        self.lines: list[str] = []
        self.variables: dict[str, str] = {}  # expression -> variable
        self.taken = {name, *NOT_FREE}

    def fresh(self, stem: str) -> str:
        """A variable that is not taken: stem, stem_2, stem_3, ..."""
        name, count = stem, 1
        while name in self.taken:
            count += 1
            name = f"{stem}_{count}"
        self.taken.add(name)
        return name

    def variable(self, expression: str, stem: str) -> str:
        if expression not in self.variables:
            self.variables[expression] = self.fresh(stem)
            self.lines.append(f"{self.variables[expression]} = {expression}")
        return self.variables[expression]

    def expression(self, node: Node) -> str:
        """The expression of a node, after the assignments that it needs."""
        if node.op == PROGRAM:
            lines, result = statements(node, self.fresh)
            self.lines += lines
            return result
        children = [self.child(child) for child in node.children]
        text = OPERATIONS[node.op].text.format(*children, g=node.genes)
        return text.removeprefix("1.0 * ").replace(" +1.0 * ", " + ")

    def child(self, node: Node) -> str:
        """The same, as short as a part of another expression should be."""
        expression = self.expression(node)
        short = (
            len(expression) <= 40
            and node.sort in "NAL"
            and not (node.sort == "L" and len(node.children) > 1)
        )
        return expression if short else self.variable(expression, STEMS[node.sort])
