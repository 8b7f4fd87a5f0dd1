"""Opaque leaves: a whole program as one node of a tree, of which only the constants can vary.

So evolution tunes the numbers of a loss that a model wrote, and mixes it with others. The program's
text is one that the search has accepted and printed itself (printing.py). It is parsed here, and
never executed.

A leaf's text has a `name = expression` a line and the loss itself on the last line. Its constants
are called gene_0, gene_1, ... there: the parameters, and numbers in the text other than the
STRUCTURAL ones.
"""

import ast
from collections.abc import Callable

from pref.discovery.genome import PROGRAM, Node

# A formula's skeleton rather than its tuning: 1 - sigmoid(z), 0.5 * (a^2 + b^2).
STRUCTURAL = (0.0, 0.5, 1.0, 2.0)
GENE = "gene_"


class Unreadable(Exception):
    """The program has a form that cannot be a leaf."""


def opaque(text: str) -> Node:
    """The leaf for a program's text. Raises Unreadable."""
    function = _function(text)
    genes: list[float] = []
    names = {}  # of the text -> expression that takes its place
    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults):
        names[argument.arg] = _gene(genes, _number(default))
    translation = _Constants(genes, names)
    lines = []
    for statement in function.body[:-1]:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # the docstring
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            continue
        if not isinstance(statement, ast.Assign):
            raise Unreadable(f"line {statement.lineno}: not an assignment")
        if any(name.id in names for name in _assigned(statement)):
            raise Unreadable(f"line {statement.lineno}: assigns to a parameter")
        lines.append(ast.unparse(translation.visit(statement)))
    lines.append(ast.unparse(translation.visit(_returned(function))))
    return Node(PROGRAM, tuple(genes), (), "\n".join(lines))


def statements(node: Node, fresh: Callable[[str], str]) -> tuple[list[str], str]:
    """(assignments, expression) of an opaque leaf, with its constants filled in and each variable
    called what `fresh` makes of its name.
    """
    body = ast.parse(node.text).body
    names = {f"{GENE}{i}": _constant(gene) for i, gene in enumerate(node.genes)}
    for statement in body[:-1]:
        for target in _assigned(statement):
            if target.id not in names:
                names[target.id] = ast.Name(fresh(target.id))
    renaming = _Names(names)
    lines = [ast.unparse(renaming.visit(statement)) for statement in body]
    return lines[:-1], lines[-1]


def _assigned(statement: ast.stmt) -> list[ast.Name]:
    names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
    return [name for name in names if isinstance(name.ctx, ast.Store)]


def _function(text: str) -> ast.FunctionDef:
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError) as error:
        raise Unreadable(str(error)) from None
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    if len(functions) != 1:
        raise Unreadable(f"{len(functions)} functions")
    return functions[0]


def _returned(function: ast.FunctionDef) -> ast.expr:
    """The loss: what is returned, or the first of what is returned."""
    last = function.body[-1]
    if not isinstance(last, ast.Return) or last.value is None:
        raise Unreadable("the last statement returns nothing")
    return last.value.elts[0] if isinstance(last.value, ast.Tuple) else last.value


def _number(default: ast.expr | None) -> float:
    try:
        return float(ast.literal_eval(default))
    except (ValueError, TypeError):
        raise Unreadable("a parameter without a number as its default") from None


def _gene(genes: list[float], value: float) -> ast.expr:
    """A name for a new constant; a parameter that is 0 is switched off, and stays so."""
    if value == 0:
        return ast.Constant(0.0)
    genes.append(value)
    return ast.Name(f"{GENE}{len(genes) - 1}")


def _constant(value: float) -> ast.expr:
    """-0.3 as an operation on 0.3, so that its power is printed with brackets."""
    if value < 0:
        return ast.UnaryOp(ast.USub(), ast.Constant(-value))
    return ast.Constant(value)


class _Names(ast.NodeTransformer):
    def __init__(self, names: dict[str, ast.expr]):
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.names.get(node.id, node)


class _Constants(_Names):
    """Turns the constants of an expression into genes."""

    def __init__(self, genes: list[float], names: dict[str, ast.expr]):
        super().__init__(names)
        self.genes = genes

    def visit_Name(self, node: ast.Name) -> ast.expr:
        # A variable of the author's that is called like a gene.
        if node.id not in self.names and node.id.startswith(GENE):
            return ast.Name(f"x_{node.id}", node.ctx)
        return super().visit_Name(node)

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if not isinstance(node.value, (int, float)) or abs(node.value) in STRUCTURAL:
            return node
        return _gene(self.genes, float(node.value))

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        if isinstance(node.op, ast.Pow):  # the form limits exponents: they stay
            node.left = self.visit(node.left)
            if not isinstance(node.right, ast.Constant):
                node.right = self.visit(node.right)
            return node
        return self.generic_visit(node)
