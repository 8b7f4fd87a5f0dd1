"""Steps of a program as Python text, and the second reader, which shares nothing with the first.

`print_program` is the only author of the files that training loads. `verify` reads such a text with
tables of its own; `load` executes what `verify` has let through.
"""

import ast
import re
import warnings
from collections import Counter
from collections.abc import Callable

from pref.discovery import form_tables as tables
from pref.discovery.form_tables import Refusal, Step

INLINE = 8  # operations in one expression; more get a name
BINARY = {
    "+": ast.Add,
    "-": ast.Sub,
    "*": ast.Mult,
    "/": ast.Div,
    "**": ast.Pow,
    "&": ast.BitAnd,
    "|": ast.BitOr,
}
UNARY = {"negative": ast.USub, "~": ast.Invert}
COMPARE = {"<": ast.Lt, ">": ast.Gt, "<=": ast.LtE, ">=": ast.GtE}
LEAVES = {"number", "parameter", "input"}


def print_program(
    steps: list[Step], result: int, names: dict[int, str], name: str, defaults: dict[str, float]
) -> tuple[str, dict[str, float]]:
    """The text of the program whose losses are step `result`, and its parameters with their
    defaults. names: the author's, of steps. defaults: of the parameters, by the author's names.

    Steps that the result does not need, and parameters without effect, are left out.
    """
    live = live_steps(steps, result)
    taken = set(tables.PRINTED_NAMES)
    parameters = {}  # the author's name -> ours
    for parameter, default in defaults.items():
        if any(steps[k].op == "parameter" and steps[k].value == parameter for k in live):
            parameters[parameter] = unique(parameter_name(parameter, default), taken)
    names = name_steps(steps, live, result, names, taken)
    printer = Printer(steps, names, parameters)
    lines = [
        *printer.preamble(live, name),
        *(
            f"{names[k]} = {ast.unparse(printer.expression(k, whole=True))}"
            for k in live
            if k in names and not is_log_ratio(steps[k])
        ),
    ]
    lines.append(f'return {names[result]}, {{"preference": {names[result]}}}')
    arguments = [f"{ours}: float = {defaults[theirs]!r}" for theirs, ours in parameters.items()]
    signature = ", ".join(["pairs", "*", *arguments] if arguments else ["pairs"])
    body = "\n".join("    " + line for line in lines)
    head = f"def {name}({signature}):\n"
    imports = [
        line
        for word, line in (
            ("math.", "import math"),
            ("torch.", "\nimport torch"),
            ("F.", "import torch.nn.functional as F"),
        )
        if re.search(rf"(?<![\w.]){re.escape(word)}", body)
    ]
    text = "".join(line + "\n" for line in imports).lstrip("\n")
    text += ("\n\n" if text else "") + f"{head}{body}\n"
    return text, {ours: defaults[theirs] for theirs, ours in parameters.items()}


def live_steps(steps: list[Step], result: int) -> list[int]:
    """Places of the steps that `result` needs, in order."""
    live, waiting = set(), [result]
    while waiting:
        place = waiting.pop()
        if place not in live:
            live.add(place)
            waiting += [*steps[place].args, *(x for _, x in steps[place].keywords)]
    return sorted(live)


def is_log_ratio(step: Step) -> bool:
    return step.op == "input" and step.value in tables.LOG_RATIOS


def unique(name: str, taken: set[str]) -> str:
    """`name`, or `name_2` and so on, that is not in `taken`; it is added there."""
    candidate, number = name[: tables.MAX_NAME], 2
    while candidate in taken:
        candidate = f"{name[: tables.MAX_NAME - 4]}_{number}"
        number += 1
    taken.add(candidate)
    return candidate


def parameter_name(name: str, default: float) -> str:
    """`name`, or one that train_pref.py has no argument of, or one without its range."""
    least, below, zero = tables.SHARED_PARAMETERS.get(name, (-float("inf"), float("inf"), True))
    fits = least <= default < below and (zero or default != 0)
    return f"loss_{name}" if name in tables.TAKEN_ARGUMENTS or not fits else name


def function_name(name: str) -> str:
    """`name`, or one that no loss of losses.py has."""
    return f"my_{name}" if name in tables.TAKEN_LOSSES | tables.PRINTED_NAMES else name


def name_steps(
    steps: list[Step], live: list[int], result: int, authors: dict[int, str], taken: set[str]
) -> dict[int, str]:
    """Names of the steps that get a line of their own: those that the author named, that are used
    twice, that would make an expression too long, and the result.
    """
    uses = Counter(x for k in live for x in (*steps[k].args, *(x for _, x in steps[k].keywords)))
    names, size, numbered = {}, {}, 0
    for place in (k for k in live if is_log_ratio(steps[k])):  # these are printed first
        mean = "mean_" if steps[place].of_mean else ""
        names[place] = unique(authors.get(place, f"{mean}{steps[place].value}"), taken)
        size[place] = 0
    for place in live:
        step = steps[place]
        if place in names:
            continue
        inside = [*step.args, *(x for _, x in step.keywords)]
        size[place] = (step.op not in LEAVES) + sum(size[x] for x in inside)
        if step.op in ("number", "parameter"):
            continue
        wanted = authors.get(place)
        if wanted is None and place == result:
            wanted = "losses"
        simple = step.op == "input" or step.op == "negative" and size[step.args[0]] == 0
        shared = uses[place] > 1 and not simple
        if wanted is None and (shared or size[place] > INLINE):
            numbered += 1
            wanted = f"t{numbered}"
        if wanted is not None:
            names[place] = unique(wanted, taken)
            size[place] = 0
    return names


class Printer:
    """Steps as expressions of Python's syntax tree."""

    def __init__(self, steps: list[Step], names: dict[int, str], parameters: dict[str, str]):
        self.steps, self.names, self.parameters = steps, names, parameters

    def preamble(self, live: list[int], name: str) -> list[str]:
        """Lines before the first step: the guard, the means, the log-ratios."""
        lines = []
        if any(self.steps[k].op in tables.NEED_TWO_PAIRS for k in live):
            lines += guard(name)
        inputs = {(s.value, s.of_mean): k for k in live if (s := self.steps[k]).op == "input"}
        if any(of_mean for _, of_mean in inputs):
            lines.append("means = pairs.mean()")
        for of_mean in (False, True):
            places = [inputs.get((ratio, of_mean)) for ratio in tables.LOG_RATIOS]
            if any(place is not None for place in places):
                a, b = ("_" if place is None else self.names[place] for place in places)
                lines.append(f"{a}, {b} = {'means' if of_mean else 'pairs'}.log_ratios")
        return lines

    def expression(self, place: int, whole: bool = False) -> ast.expr:
        """Step `place`, by its name where it has one, or `whole`."""
        if place in self.names and not whole:
            return ast.Name(self.names[place])
        step = self.steps[place]
        if step.op == "number":
            return number(step.value)
        if step.op == "parameter":
            return ast.Name(self.parameters[step.value])
        if step.op == "input":
            return dotted(f"{'means' if step.of_mean else 'pairs'}.{step.value}")
        args = [self.expression(x) for x in step.args]
        if step.op in BINARY:
            return ast.BinOp(args[0], BINARY[step.op](), args[1])
        if step.op in UNARY:
            return ast.UnaryOp(UNARY[step.op](), args[0])
        if step.op in COMPARE:
            return ast.Compare(args[0], [COMPARE[step.op]()], [args[1]])
        if step.op == "detach":
            return ast.Call(ast.Attribute(args[0], "detach"), [], [])
        if step.op == "to":
            return ast.Call(ast.Attribute(args[0], "to"), [dotted("pairs.chosen.dtype")], [])
        if step.op == "sort":
            sorted_ = ast.Call(ast.Attribute(args[0], "sort"), [], [])
            return ast.Attribute(sorted_, "values")
        if step.op == "torch.where":  # torch.where(mask, 1, 0) would be of whole numbers
            args[1:] = [
                number(self.steps[x].value, whole=False) if self.steps[x].op == "number" else arg
                for x, arg in zip(step.args[1:], args[1:])
            ]
        keywords = [ast.keyword(key, self.expression(x)) for key, x in step.keywords]
        return ast.Call(dotted(step.op), args, keywords)


def dotted(text: str) -> ast.expr:
    """`torch.exp` as a syntax tree."""
    first, *others = text.split(".")
    node: ast.expr = ast.Name(first)
    for part in others:
        node = ast.Attribute(node, part)
    return node


def number(value: float, whole: bool = True) -> ast.expr:
    """A number, without a decimal point if it is `whole`."""
    size = abs(value)
    node = ast.Constant(int(size) if whole and size.is_integer() else size)
    return ast.UnaryOp(ast.USub(), node) if value < 0 else node


def guard(name: str) -> list[str]:
    """The lines that refuse a single pair, whose variance is not a number."""
    return [
        "if len(pairs.chosen) < 2:",
        f'    raise ValueError("{name} needs at least 2 pairs per micro-batch")',
    ]


# The second reader. What follows shares no table with the translator or the printer.

IMPORTS = {"import math", "import torch", "import torch.nn.functional as F"}
CALLS = {
    "torch": "abs atan clamp erf exp expm1 log log1p logaddexp maximum mean minimum ones_like "
    "reciprocal relu sigmoid sign sort sqrt square std tanh var where zeros_like",
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


def load(text: str) -> Callable:
    """The loss of a printed text: loss(pairs, **parameters) -> (losses, terms). Raises Refusal for
    a text that `verify` refuses.
    """
    verify(text)
    builtins = {"__import__": __import__, "float": float, "len": len, "ValueError": ValueError}
    namespace: dict = {"__builtins__": builtins, "__name__": "discovered"}
    exec(compile(text, "<loss>", "exec"), namespace)
    function = next(node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef))
    return namespace[function.name]
