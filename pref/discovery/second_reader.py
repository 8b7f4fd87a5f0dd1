"""The second reader: every printed text is read again before anything executes it.

Written apart from the translator (form.py) and the printer (printing.py): it shares no table with
them, so that a mistake there does not let a text through here.
"""

import ast
import re
import warnings

from pref.discovery.form_tables import Refusal

IMPORTS = {"import math", "import torch", "import torch.nn.functional as F"}
CALLS = {
    "torch": "abs atan clamp erf exp expm1 log log1p logaddexp maximum mean minimum ones_like "
    "reciprocal relu sigmoid sign sqrt square std tanh var where zeros_like",
    "F": "elu leaky_relu logsigmoid silu softplus softsign",
    "math": "atan erf exp expm1 fabs log log1p sqrt tanh",
}
CALLS = {f"{module}.{name}" for module, names in CALLS.items() for name in names.split()}
READS = {
    f"{pairs}.{name}"
    for pairs in ("pairs", "means")
    for name in ("chosen", "rejected", "ref_chosen", "ref_rejected", "rho", "delta", "log_ratios")
} | {"pairs.chosen_tokens", "pairs.rejected_tokens", "pairs.running_rho"}
METHODS = {("detach", ""), ("to", "pairs.chosen.dtype")}
PLAIN_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}")
OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.BitAnd, ast.BitOr)
OPERATORS += (ast.USub, ast.Invert, ast.Lt, ast.Gt, ast.LtE, ast.GtE)


def verify(text: str) -> None:
    """Read a printed text again, by rules written apart from the translator's. Raises Refusal."""
    if len(text) > 20_000 or not re.fullmatch(r"[ -~\n]*", text):
        raise Refusal("size", "not a text that discover.py prints")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verify_module(ast.parse(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise Refusal("syntax", "not a text that discover.py prints") from None


def verify_module(tree: ast.Module) -> None:
    *imports, function = tree.body
    for statement in imports:
        need(ast.unparse(statement) in IMPORTS, statement)
    need(isinstance(function, ast.FunctionDef), function)
    arguments = function.args
    need(not function.decorator_list and function.returns is None, function)
    need(arguments.vararg is None and arguments.kwarg is None, function)
    need(not arguments.posonlyargs and not arguments.defaults, function)
    need([(x.arg, x.annotation) for x in arguments.args] == [("pairs", None)], function)
    known = set()
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults):
        need(ast.unparse(argument.annotation or argument) == "float", function)
        need(is_number(default), function)
        known.add(plain_name(ast.Name(argument.arg), function))
    *statements, last = function.body
    need(bool(statements), function)
    for statement in statements:
        verify_statement(statement, function.name, known)
    need(isinstance(last, ast.Return) and isinstance(last.value, ast.Tuple), last)
    need(len(last.value.elts) == 2, last)
    losses = last.value.elts[0]
    need(isinstance(losses, ast.Name) and losses.id in known, last)
    need(ast.unparse(last) == f"return ({losses.id}, {{'preference': {losses.id}}})", last)
    plain_name(ast.Name(function.name), function)


def need(holds: bool, node: ast.AST) -> None:
    if not holds:
        line = getattr(node, "lineno", None)
        raise Refusal("form", f"{type(node).__name__} that discover.py does not print", line)


def plain_name(node: ast.expr, place: ast.AST) -> str:
    """The name that is bound here; none that the text uses otherwise."""
    need(isinstance(node, ast.Name) and bool(PLAIN_NAME.fullmatch(node.id)), place)
    need(
        node.id not in {"torch", "F", "math", "pairs", "means", "len", "float", "ValueError"}, place
    )
    return node.id


def is_number(node: ast.expr | None) -> bool:
    """Whether a node is a number of moderate size. Arithmetic on two of them was done before."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return (
        isinstance(node, ast.Constant)
        and type(node.value) in (int, float)
        and abs(node.value) <= 1_000_000
    )


def verify_statement(node: ast.stmt, name: str, known: set[str]) -> None:
    if isinstance(node, ast.If):
        message = f"{name} needs at least 2 pairs per micro-batch"
        expected = f"if len(pairs.chosen) < 2:\n    raise ValueError({message!r})"
        need(ast.unparse(node) == expected, node)
        return
    need(isinstance(node, ast.Assign) and len(node.targets) == 1, node)
    target, value = node.targets[0], ast.unparse(node.value)
    if value.endswith(".log_ratios"):
        need(value in READS and isinstance(target, ast.Tuple) and len(target.elts) == 2, node)
        for part in target.elts:
            if not (isinstance(part, ast.Name) and part.id == "_"):
                known.add(plain_name(part, node))
    elif value == "pairs.mean()":
        need(ast.unparse(target) == "means", node)
    else:
        need(not is_number(node.value), node)
        verify_expression(node.value, known)
        known.add(plain_name(target, node))


def verify_expression(node: ast.AST, known: set[str]) -> None:
    inside: list[ast.AST] = []
    if isinstance(node, ast.Name):
        need(node.id in known, node)
    elif isinstance(node, ast.Constant):
        need(is_number(node), node)
    elif isinstance(node, ast.BinOp):
        need(not (is_number(node.left) and is_number(node.right)), node)
        inside = [node.op, node.left, node.right]
    elif isinstance(node, ast.UnaryOp):
        inside = [node.op, node.operand]
        need(is_number(node) or not is_number(node.operand), node)
    elif isinstance(node, ast.Compare):
        inside = [*node.ops, node.left, *node.comparators]
        need(len(node.ops) == 1, node)
    elif isinstance(node, ast.Attribute) and node.attr == "values":
        call = node.value
        need(isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute), node)
        need(call.func.attr == "sort" and not call.args and not call.keywords, node)
        inside = [call.func.value]
    elif isinstance(node, ast.Attribute):
        need(ast.unparse(node) in READS and node.attr != "log_ratios", node)
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
        inside = [*node.args, *(keyword.value for keyword in node.keywords)]
        names = {keyword.arg for keyword in node.keywords}
        need(names <= {"min", "max", "alpha", "negative_slope"}, node)
    elif isinstance(node, ast.Call):
        need(isinstance(node.func, ast.Attribute) and not node.keywords, node)
        arguments = ", ".join(ast.unparse(argument) for argument in node.args)
        need((node.func.attr, arguments) in METHODS, node)
        inside = [node.func.value]
    else:
        need(isinstance(node, OPERATORS), node)
    for part in inside:
        verify_expression(part, known)
