"""Steps of a program as Python text, and such a text as a function.

`print_program` is the only author of the files that training loads. `load` executes what the second
reader (second_reader.py) has let through.
"""

import ast
import re
from collections import Counter
from collections.abc import Callable
from itertools import count

from pref.discovery import form_tables as tables
from pref.discovery.form_tables import Step
from pref.discovery.second_reader import verify

INLINE = 8  # operations in one expression; more get a name
WIDTH = 96 - 4  # of a line; longer ones are broken up
SHORT = 16  # parts of this length are not worth a line
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
    printer.shorten(live, taken)
    lines = [
        *printer.preamble(live, name),
        *(printer.line(k) for k in live if k in names and not is_log_ratio(steps[k])),
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


def temporary(taken: set[str]) -> str:
    """A name for a part of an expression: t1, t2, ..."""
    return next(name for k in count(1) if (name := f"t{k}") not in taken)


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
    names, size = {}, {}
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
            wanted = temporary(taken)
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

    def line(self, place: int) -> str:
        return f"{self.names[place]} = {ast.unparse(self.expression(place, whole=True))}"

    def shorten(self, live: list[int], taken: set[str]) -> None:
        """Give names to parts of lines that are too long; these parts are lines further up."""
        for place in reversed(live):
            if place in self.names and not is_log_ratio(self.steps[place]):
                while len(self.line(place)) > WIDTH and (part := self.longest_part(place)):
                    self.names[part] = unique(temporary(taken), taken)

    def longest_part(self, place: int) -> int | None:
        """Of the parts that a line is made of, the one with the longest expression."""
        step = self.steps[place]
        lengths = {
            x: len(ast.unparse(self.expression(x)))
            for x in (*step.args, *(x for _, x in step.keywords))
            if x not in self.names and self.steps[x].op not in LEAVES
        }
        part = max(lengths, key=lengths.get, default=None)
        return None if part is None or lengths[part] < SHORT else part

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
