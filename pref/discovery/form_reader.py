"""The restricted form's reader: Python's syntax tree of a text -> typed steps.

An allow-list: every kind of node that is read is named here, and everything else is refused, with
its line and a remedy. Names are looked up among those that the text itself has bound.
"""

import ast
import re
from typing import NamedTuple

from pref.discovery import form_tables as tables
from pref.discovery import printing
from pref.discovery.form_steps import Steps
from pref.discovery.form_tables import Refusal

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
MODULES = ("torch", "F", "math", "torch.nn.functional")
CONSTANTS = {"math.pi": 3.141592653589793, "math.e": 2.718281828459045}
IMPORTS = {
    "import torch",
    "import math",
    "import torch.nn.functional as F",
    "from torch.nn import functional as F",
    # for annotations, which are dropped
    "from torch import Tensor",
    "from losses import PairLogps",
}
SIGNS = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.Pow: "**",
    ast.BitAnd: "&",
    ast.BitOr: "|",
    ast.Invert: "~",
    ast.Lt: "<",
    ast.Gt: ">",
    ast.LtE: "<=",
    ast.GtE: ">=",
}
REMEDIES = {  # by the class of a syntax node that the form does not have
    ast.If: "no if statement; use torch.where(mask, x, y)",
    ast.IfExp: "no if expression; use torch.where(mask, x, y)",
    ast.For: "no loop; write the steps out",
    ast.While: "no loop; write the steps out",
    ast.Lambda: "no lambda; write the expression where it is used",
    ast.FunctionDef: "no function inside the function; write its expression where it is used",
    ast.ClassDef: "no class; write one function",
    ast.Subscript: "no subscript; a, b = pairs.log_ratios takes the two log-ratios",
    ast.JoinedStr: "no text",
    ast.NamedExpr: "no :=; assign in a line of its own",
    ast.BoolOp: "no and/or of tensors; use (x > 0) & (y > 0)",
    ast.Expr: "a line without effect; assign its value to a name",
    ast.With: "no with; detach() stops a gradient",
    ast.Try: "no try; clamp what could overflow",
    ast.Raise: "no raise; the form has no errors of its own",
    ast.Assert: "no assert; leave it out",
    ast.List: "no lists; a tensor holds one value a pair",
    ast.Tuple: "no tuples; assign to names, one by one",
    ast.Dict: 'no dict, except in the return: return losses, {"preference": losses}',
    ast.Starred: "no *; write the arguments out",
    ast.Import: "imports: import torch, import torch.nn.functional as F, import math",
    ast.ImportFrom: "imports: import torch, import torch.nn.functional as F, import math",
}


class Pairs(NamedTuple):
    """`pairs`, or `pairs.mean()`."""

    of_mean: bool


class LogRatios(NamedTuple):
    """pairs.log_ratios, two tensors."""

    of_mean: bool


class Sorted(NamedTuple):
    """x.sort(), of which .values is a tensor."""

    place: int


Value = int | Pairs | LogRatios | Sorted  # an int is the place of a step


def is_text(node: ast.stmt) -> bool:
    """Whether a statement is a docstring."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def remedy(node: ast.AST) -> str:
    return REMEDIES.get(type(node), f"{type(node).__name__} is not in the form")


def check_import(node: ast.Import | ast.ImportFrom) -> None:
    single = [ast.unparse(ast.Import([alias])) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        single = [f"from {'.' * node.level}{node.module or ''} {line}" for line in single]
    if unknown := [line for line in single if line not in IMPORTS]:
        raise Refusal("form", f"{unknown[0][:80]}: {remedy(node)}", node.lineno)


def find_function(tree: ast.Module) -> ast.FunctionDef:
    """The one function of a text. Raises Refusal."""
    functions = []
    for k, node in enumerate(tree.body):
        if isinstance(node, ast.FunctionDef):
            functions.append(node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            check_import(node)
        elif not (k == 0 and is_text(node)):
            raise Refusal(
                "form",
                "outside the function only imports; numbers go into it, or are its parameters",
                node.lineno,
            )
    if len(functions) != 1:
        line = functions[1].lineno if functions else None
        raise Refusal(
            "form",
            f"{len(functions)} functions; write one: def name(pairs, *, beta: float = 0.1, ...)",
            line,
        )
    return functions[0]


def check_name(name: str, line: int) -> str:
    """`name`, which the text binds. Raises Refusal for one that the form does not have."""
    if not NAME.fullmatch(name):
        raise Refusal("form", f"name {name[:50]}: a letter, then letters, digits and _", line)
    if len(name) > tables.MAX_NAME:
        raise Refusal(
            "size", f"name {name[:50]}: {len(name)} letters; at most {tables.MAX_NAME}", line
        )
    if name in ("torch", "F", "math"):
        raise Refusal("form", f"{name} is a module here; give yours another name", line)
    return name


def check_annotation(node: ast.expr | None) -> None:
    """Annotations are dropped; they are names all the same, and nothing else."""
    if node is None or isinstance(node, ast.Name):
        return
    if isinstance(node, ast.Constant) and node.value is None:
        return
    inside: list[ast.expr] = []
    if isinstance(node, ast.Attribute) and NAME.fullmatch(node.attr):
        inside = [node.value]
    elif isinstance(node, ast.Subscript):
        inside = [node.value, node.slice]
    elif isinstance(node, ast.Tuple):
        inside = node.elts
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        inside = [node.left, node.right]
    else:
        raise Refusal("form", "annotations are names, such as float or Tensor", node.lineno)
    for part in inside:
        check_annotation(part)


class Reader:
    """Reads one function, statement by statement, into steps."""

    def __init__(self, function: ast.FunctionDef, coupled: bool):
        self.function = function
        self.steps = Steps(coupled)
        self.values: dict[str, Value] = {}  # of the names that are known here
        self.names: dict[int, str] = {}  # the author's, of steps
        self.defaults: dict[str, float] = {}  # of the parameters

    def refuse(self, node: ast.AST, message: str, kind: str = "form") -> None:
        raise Refusal(kind, message, getattr(node, "lineno", self.function.lineno))

    def read(self) -> int:
        """The place of the losses."""
        self.read_signature()
        body = self.function.body
        if is_text(body[0]):
            body = body[1:]
        if not body or not isinstance(body[-1], ast.Return):
            self.refuse(self.function, "the last line must be: return losses")
        for node in body[:-1]:
            self.read_statement(node)
        return self.read_return(body[-1])

    # The signature

    def read_signature(self) -> None:
        function, arguments = self.function, self.function.args
        check_name(function.name, function.lineno)
        if function.decorator_list:
            self.refuse(function.decorator_list[0], "no decorators")
        check_annotation(function.returns)
        positional = [*arguments.posonlyargs, *arguments.args]
        if arguments.vararg or arguments.kwarg or not positional:
            self.refuse(function, "write def name(pairs, *, beta: float = 0.1, ...)")
        first, *others = positional
        check_annotation(first.annotation)
        defaults = [*arguments.defaults, *arguments.kw_defaults]
        parameters = [*others, *arguments.kwonlyargs]
        if len(defaults) != len(parameters) or None in defaults:
            self.refuse(
                function,
                "write def name(pairs, *, beta: float = 0.1, ...): `pairs` has no default, every "
                "parameter has a number",
            )
        if len(parameters) > tables.MAX_PARAMETERS:
            self.refuse(
                function,
                f"{len(parameters)} parameters; at most {tables.MAX_PARAMETERS}",
                "size",
            )
        self.values[check_name(first.arg, first.lineno)] = Pairs(of_mean=False)
        for parameter, default in zip(parameters, defaults):
            self.read_parameter(parameter, default)

    def read_parameter(self, parameter: ast.arg, default: ast.expr) -> None:
        name = check_name(parameter.arg, parameter.lineno)
        check_annotation(parameter.annotation)
        if name in self.values:
            self.refuse(parameter, f"two parameters are called {name}", "syntax")
        self.steps.line = default.lineno
        place = self.step(default) if is_number(default) else None
        if place is None:
            self.refuse(default, f"the default of {name} must be a number, such as 0.1")
        self.defaults[name] = self.steps.facts[place].value
        self.values[name] = self.steps.parameter(name, self.defaults[name])

    # Statements

    def read_statement(self, node: ast.stmt) -> None:
        self.steps.line = node.lineno
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self.assign(target, node.value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            check_annotation(node.annotation)
            self.assign(node.target, node.value)
        elif isinstance(node, ast.AugAssign):
            self.check_target(node.target)
            old = self.step(ast.copy_location(ast.Name(node.target.id), node.target))
            self.bind(node.target, self.combine(node, old, self.step(node.value)))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            check_import(node)
        elif isinstance(node, ast.Return):
            self.refuse(node, "one return, in the last line; use torch.where(mask, x, y)")
        elif not self.is_guard(node):
            self.refuse(node, remedy(node))

    def is_guard(self, node: ast.stmt) -> bool:
        """The lines that our own text begins with where it has a variance in it."""
        if not isinstance(node, ast.If) or node is not self.function.body[0]:
            return False
        return ast.unparse(node) == ast.unparse(
            ast.parse("\n".join(printing.guard(self.function.name)))
        )

    def check_target(self, target: ast.expr) -> None:
        if not isinstance(target, ast.Name):
            self.refuse(target, "assign to plain names; inputs cannot be changed")
        if target.id != "_":
            check_name(target.id, target.lineno)

    def bind(self, target: ast.expr, value: Value) -> None:
        self.check_target(target)
        if target.id == "_":
            return
        self.values[target.id] = value
        if isinstance(value, int) and self.steps.steps[value].op not in ("number", "parameter"):
            self.names.setdefault(value, target.id)

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        if not isinstance(target, ast.Tuple):
            return self.bind(target, self.value(value))
        if isinstance(value, ast.Tuple):
            parts: list[Value] = [self.value(part) for part in value.elts]
        else:
            both = self.value(value)
            if not isinstance(both, LogRatios):
                self.refuse(target, "only pairs.log_ratios gives two values: a, b")
            parts = [self.steps.input(name, both.of_mean) for name in tables.LOG_RATIOS]
        if len(parts) != len(target.elts):
            self.refuse(target, f"{len(parts)} values for {len(target.elts)} names")
        for name, part in zip(target.elts, parts):
            self.bind(name, part)
        return None

    def read_return(self, node: ast.Return) -> int:
        """The place of the losses, which must be one value a pair with a gradient."""
        self.steps.line = node.lineno
        losses = node.value
        if isinstance(losses, ast.Tuple):
            if len(losses.elts) != 2 or not isinstance(losses.elts[1], ast.Dict):
                self.refuse(node, 'return losses, or losses, {"preference": losses}')
            losses, terms = losses.elts
            self.read_terms(terms)
        if losses is None:
            self.refuse(node, "return losses: one value a pair")
        place = self.step(losses)
        kind = self.steps.kind(place)
        if kind == "stat":
            self.refuse(node, "returns one value a batch: return one loss per pair", "type")
        if kind != "tensor":
            self.refuse(node, f"returns {self.steps.name(place)}: return one loss per pair", "type")
        if not self.steps.facts[place].gradient:
            self.refuse(
                node,
                "no gradient reaches the policy: the losses must depend on pairs.chosen or "
                "pairs.rejected, and not by detach, sign or comparisons alone",
                "type",
            )
        return place

    def read_terms(self, terms: ast.Dict) -> None:
        """Terms must be in the form, but are not kept: what is logged is the loss."""
        for key, value in zip(terms.keys, terms.values):
            if not (isinstance(key, ast.Constant) and isinstance(key.value, str)):
                self.refuse(terms, 'terms are written {"name": tensor}')
            self.step(value)

    # Expressions

    def step(self, node: ast.expr) -> int:
        """The place of an expression's value, a number, tensor or mask."""
        value = self.value(node)
        if isinstance(value, Pairs):
            self.refuse(node, "pairs is no tensor; take one of it, such as pairs.chosen", "type")
        if isinstance(value, LogRatios):
            self.refuse(node, "pairs.log_ratios is two tensors; write a, b = pairs.log_ratios")
        if isinstance(value, Sorted):
            self.refuse(node, "sort gives values and places; write x.sort().values")
        return value

    def value(self, node: ast.expr) -> Value:
        self.steps.line = getattr(node, "lineno", self.steps.line)
        if isinstance(node, ast.Constant):
            return self.constant(node)
        if isinstance(node, ast.Name):
            return self.name(node)
        if isinstance(node, ast.BinOp):
            return self.combine(node, self.step(node.left), self.step(node.right))
        if isinstance(node, ast.UnaryOp):
            return self.unary(node)
        if isinstance(node, ast.Compare):
            return self.compare(node)
        if isinstance(node, ast.Attribute):
            return self.attribute(node)
        if isinstance(node, ast.Call):
            return self.call(node)
        return self.refuse(node, remedy(node))

    def constant(self, node: ast.Constant) -> int:
        if type(node.value) not in (int, float):
            self.refuse(node, f"a {type(node.value).__name__} is not in the form; numbers are")
        return self.steps.number(node.value)

    def name(self, node: ast.Name) -> Value:
        if node.id not in self.values:
            what = "is a module" if node.id in MODULES else "is not known here"
            self.refuse(
                node, f"{node.id[:50]} {what}; known are {', '.join(self.values) or 'no names'}"
            )
        return self.values[node.id]

    def combine(self, node: ast.BinOp | ast.AugAssign, left: int, right: int) -> int:
        self.steps.line = node.lineno
        sign = SIGNS.get(type(node.op))
        if sign is None:
            self.refuse(node, f"operator {type(node.op).__name__}: the form has + - * / ** & |")
        if sign in "&|":
            return self.steps.logic(sign, left, right)
        return self.steps.combine(sign, left, right)

    def unary(self, node: ast.UnaryOp) -> int:
        place = self.step(node.operand)
        if isinstance(node.op, ast.Not):
            self.refuse(node, "no 'not' of tensors; use ~(x > 0)")
        if isinstance(node.op, ast.Invert):
            return self.steps.logic("~", place)
        return self.steps.negative(place) if isinstance(node.op, ast.USub) else place

    def compare(self, node: ast.Compare) -> int:
        if len(node.ops) > 1:
            self.refuse(node, "no chain of comparisons; use (0 < x) & (x < 1)")
        sign = SIGNS.get(type(node.ops[0]))
        if sign is None:
            self.refuse(node, "comparisons are < > <= >=")
        return self.steps.compare(sign, self.step(node.left), self.step(node.comparators[0]))

    def attribute(self, node: ast.Attribute) -> Value:
        text = path_of(node)
        if text in CONSTANTS and "math" not in self.values:
            return self.steps.number(CONSTANTS[text])
        owner = self.owner(node)
        if isinstance(owner, Pairs):
            if node.attr == "log_ratios":
                return LogRatios(owner.of_mean)
            if node.attr in (*tables.FIELDS, *tables.MARGINS, tables.RUNNING):
                return self.steps.input(node.attr, owner.of_mean)
            fields = ", ".join((*tables.FIELDS, *tables.MARGINS, "log_ratios"))
            self.refuse(node, f"pairs has no {node.attr[:50]} in the form; it has {fields}")
        if isinstance(owner, Sorted) and node.attr == "values":
            return self.steps.sort_values(owner.place)
        return self.refuse(node, f"attribute .{node.attr[:50]} is not in the form")

    def owner(self, node: ast.Attribute) -> Value:
        """The value whose attribute is read."""
        if (text := path_of(node)) and text.rpartition(".")[0] in MODULES:
            self.refuse(node, f"{text[:80]} is not a value of the form")
        return self.value(node.value)

    def call(self, node: ast.Call) -> Value:
        function, args, owner = node.func, node.args, None
        text = path_of(function)
        if isinstance(function, ast.Attribute) and text.rpartition(".")[0] in MODULES:
            name = function.attr
        elif isinstance(function, ast.Attribute):
            owner, name = self.value(function.value), function.attr
        elif text == "abs" and text not in self.values:
            name = text
        else:
            what = text[:50] or "a value"
            return self.refuse(node, f"{what} cannot be called; functions are torch.exp, F.relu")
        if isinstance(owner, (Pairs, LogRatios, Sorted)):
            return self.call_of_pairs(node, owner, name)
        if name == "to" and owner is not None:
            return self.to_dtype(node, owner)
        keywords = {}
        for keyword in node.keywords:
            if keyword.arg is None or keyword.arg in keywords:
                self.refuse(node, "write every keyword out, once")
            keywords[keyword.arg] = self.step(keyword.value)
        places = [self.step(arg) for arg in args]
        if owner is not None:
            places.insert(0, owner)
        self.steps.line = node.lineno
        if name == "sort" and len(places) == 1 and not keywords:
            self.steps.need_coupled("sort")
            return Sorted(places[0])
        return self.steps.call(name[:50], places, keywords)

    def to_dtype(self, node: ast.Call, owner: int) -> int:
        """x.to(y.dtype): a mask as 1.0 and 0.0; everything else has that dtype already."""
        dtype = node.args[0] if len(node.args) == 1 and not node.keywords else None
        if not (isinstance(dtype, ast.Attribute) and dtype.attr == "dtype"):
            self.refuse(node, "to: write mask.to(x.dtype), or multiply by the mask")
        self.step(dtype.value)
        return self.steps.as_value(owner)

    def call_of_pairs(self, node: ast.Call, owner: Value, name: str) -> Pairs:
        if isinstance(owner, Pairs) and name == "mean" and not node.args and not node.keywords:
            if owner.of_mean:
                self.refuse(node, "pairs.mean() of pairs.mean(): take it once")
            return Pairs(of_mean=True)
        return self.refuse(node, f"{name[:50]}() is not in the form here; pairs has pairs.mean()")


def is_number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def path_of(node: ast.expr) -> str:
    """`torch.nn.functional.relu` of an expression that is a path of plain names, else ''."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""
