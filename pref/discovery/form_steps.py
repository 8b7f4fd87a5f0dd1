"""Steps of a program and their types: every step is built here, once, and refused here.

Equal steps are one step, so that sixty lines of x = x + x stay sixty steps; arithmetic on numbers
is done at once; what a number is at the parameters' defaults is known, so that 1 / beta at beta 0
is refused before anything runs.
"""

import math
import operator
from typing import NamedTuple, NoReturn

from pref.discovery import form_tables as tables
from pref.discovery.form_tables import Kind, Refusal, Step

ARITHMETIC = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "**": operator.pow,
}
RANK = {"number": 0, "stat": 1, "tensor": 2}
NAMES = {"number": "a number", "stat": "one value a batch", "tensor": "a tensor", "mask": "a mask"}


class Fact(NamedTuple):
    """What is known of a step before it runs."""

    kind: Kind
    gradient: bool = False  # it depends on the policy, and the gradient passes
    value: float | None = None  # of a number, at the parameters' defaults; None: not known


class Steps:
    """The steps of a program under construction. Methods return the place of a step; `line` is
    where the text has come to, for refusals.
    """

    def __init__(self, coupled: bool):
        self.coupled = coupled  # statistics of the batch are allowed
        self.steps: list[Step] = []
        self.facts: list[Fact] = []
        self.places: dict[Step, int] = {}
        self.line: int | None = None

    def refuse(self, message: str, kind: str = "type") -> NoReturn:
        raise Refusal(kind, message, self.line)

    def add(self, step: Step, fact: Fact) -> int:
        """The place of `step`, which is new or known already."""
        if step not in self.places:
            self.places[step] = len(self.steps)
            self.steps.append(step)
            self.facts.append(fact)
        return self.places[step]

    def kind(self, place: int) -> Kind:
        return self.facts[place].kind

    # Leaves

    def number(self, value: float) -> int:
        """A constant. Refused outside the sizes of the form."""
        if not (value == 0 or tables.SMALLEST <= abs(value) <= tables.LARGEST):
            self.refuse(
                f"the number {shown(value)}: must be 0, or {tables.SMALLEST:g} to "
                f"{tables.LARGEST:g} in size",
                "form",
            )
        value = float(value) + 0.0  # no -0.0
        return self.add(Step("number", value=value), Fact("number", value=value))

    def parameter(self, name: str, default: float) -> int:
        return self.add(Step("parameter", value=name), Fact("number", value=default))

    def input(self, name: str, of_mean: bool) -> int:
        """One of the fields, margins and log-ratios of `pairs` or of `pairs.mean()`."""
        if name == tables.RUNNING:
            self.need_coupled(f"pairs.{name}")
            return self.add(Step("input", value=name), Fact("number"))
        of_mean = of_mean and not name.endswith("_tokens")  # pairs.mean() leaves these as they are
        fact = Fact("tensor", gradient=name in tables.POLICY)
        return self.add(Step("input", value=name, of_mean=of_mean), fact)

    def need_coupled(self, what: str) -> None:
        if not self.coupled:
            self.refuse(
                f"{what} depends on other pairs of the batch, which this search leaves out; use "
                "each pair's own values"
            )

    # Signs

    def combine(self, sign: str, left: int, right: int) -> int:
        """left + right, or another sign of arithmetic."""
        left, right = self.as_value(left), self.as_value(right)
        facts = [self.facts[left], self.facts[right]]
        if sign == "**":
            self.check_power(left, right)
        if sign == "/":
            self.check_divisor(right)
        kind = max((fact.kind for fact in facts), key=RANK.get)
        value = None
        if kind == "number" and None not in (facts[0].value, facts[1].value):
            value = self.compute(ARITHMETIC[sign], facts[0].value, facts[1].value)
            if self.steps[left].op == self.steps[right].op == "number":
                return self.number(value)
        gradient = any(fact.gradient for fact in facts)
        return self.add(Step(sign, (left, right)), Fact(kind, gradient, value))

    def check_power(self, base: int, exponent: int) -> None:
        fact = self.facts[exponent]
        if fact.kind != "number" or fact.value is None:
            self.refuse(
                "an exponent must be a number or a parameter; write torch.exp(y * torch.log(x)) "
                "for x ** y"
            )
        if abs(fact.value) > tables.LARGEST_POWER:
            self.refuse(f"exponent {fact.value:g}: must be at most {tables.LARGEST_POWER}")
        if self.kind(base) == "number" and self.facts[base].value is None:
            self.refuse("no power of running_rho; it may be added, subtracted and multiplied")

    def check_divisor(self, divisor: int) -> None:
        fact = self.facts[divisor]
        if fact.kind != "number":
            return
        if fact.value is None:
            self.refuse("division by running_rho, which is 0 at the start; multiply by it")
        if fact.value == 0:
            self.refuse("division by zero at the parameters' defaults; change the default")

    def compute(self, function, *values: float) -> float:
        """`function` of numbers at the parameters' defaults; refused if it is none."""
        try:
            value = function(*values)
        except (ArithmeticError, ValueError):
            value = math.nan
        if isinstance(value, complex) or not math.isfinite(value):
            self.refuse(
                f"arithmetic on {', '.join(f'{x:g}' for x in values)} gives no finite number at "
                "the parameters' defaults; change the default or the formula"
            )
        return float(value)

    def negative(self, x: int) -> int:
        x = self.as_value(x)
        fact = self.facts[x]
        if self.steps[x].op == "number":
            return self.number(-fact.value)
        value = None if fact.value is None else -fact.value
        return self.add(Step("negative", (x,)), fact._replace(value=value))

    def compare(self, sign: str, left: int, right: int) -> int:
        left, right = self.as_value(left), self.as_value(right)
        if "tensor" not in (self.kind(left), self.kind(right)):
            self.refuse(f"{sign} compares one value a pair; of two numbers the form has no 'if'")
        return self.add(Step(sign, (left, right)), Fact("mask"))

    def logic(self, sign: str, *masks: int) -> int:
        """mask & mask, mask | mask, ~mask."""
        for place in masks:
            if self.kind(place) != "mask":
                self.refuse(f"{sign} takes masks, such as (rho > 0); this is {self.name(place)}")
        return self.add(Step(sign, masks), Fact("mask"))

    def as_value(self, place: int) -> int:
        """A mask as 1.0 and 0.0; everything else as it is."""
        if self.kind(place) != "mask":
            return place
        return self.add(Step("to", (place,)), Fact("tensor"))

    def name(self, place: int) -> str:
        return NAMES[self.kind(place)]

    # Functions

    def call(self, name: str, args: list[int], keywords: dict[str, int]) -> int:
        """Function `name` of the form. Raises Refusal if there is none, or not of these."""
        if name in ("max", "min") and len(args) == 1 or name in tables.REDUCING:
            return self.statistic(name, args, keywords)
        special = SPECIAL.get(name)
        if special is None and name not in tables.FUNCTIONS and name not in tables.OF_TWO:
            self.refuse(self.no_such_function(name), "form")
        accepted = special.keywords if special else ()
        if name in tables.KEYWORDS:
            accepted = (tables.KEYWORDS[name],)
        if unknown := sorted(keywords.keys() - set(accepted)):
            remedy = f"it takes {', '.join(f'{x}=' for x in accepted) or 'no keywords'}"
            self.refuse(f"{name} has no {unknown[0]}= in the form; {remedy}", "form")
        if special:
            least, most = special.least, special.most
        elif name in tables.OF_TWO:
            least, most = 2, 2
        else:
            least, most = 1, 1 + (name in tables.KEYWORDS)
        if not least <= len(args) <= most:
            count = f"{least}" if least == most else f"{least} to {most}"
            self.refuse(f"{name} takes {count} argument(s), not {len(args)}", "form")
        if special:
            return special.method(self, args, keywords)
        if name in tables.OF_TWO:
            return self.of_two(name, *args)
        return self.of_one(name, args, keywords)

    def no_such_function(self, name: str) -> str:
        if name == "sort":
            return "sort: write x.sort().values"
        if name.endswith("_"):
            return f"{name} writes into its input; write y = {name.rstrip('_')}(x)"
        known = sorted({*tables.FUNCTIONS, *tables.OF_TWO, *SPECIAL} - {"tensor", "float", "fabs"})
        return f"{name} is not in the form; it has {', '.join(known)}"

    def of_one(self, name: str, args: list[int], keywords: dict[str, int]) -> int:
        """A function of one tensor, or of one number."""
        x, *more = args
        x = self.as_value(x)
        fact, (of_tensors, of_numbers) = self.facts[x], tables.FUNCTIONS[name]
        if fact.kind == "number":
            return self.of_number(name, of_numbers, x)
        if more:
            keywords = {**keywords, tables.KEYWORDS[name]: more[0]}
        for key, place in keywords.items():
            self.need_number(f"{name}({key}=)", place)
        if of_tensors in tables.NO_GRADIENT:
            fact = fact._replace(gradient=False)
        return self.add(Step(of_tensors, (x,), tuple(sorted(keywords.items()))), fact)

    def of_number(self, name: str, printed: str | None, x: int) -> int:
        fact = self.facts[x]
        if printed is None:
            self.refuse(
                f"{name} takes a tensor; of a number write it with + - * / ** and math.exp, "
                "math.log, math.tanh"
            )
        if fact.value is None:
            self.refuse(f"no {name} of running_rho; it may be added, subtracted and multiplied")
        value = self.compute(getattr(math, printed.removeprefix("math.")), fact.value)
        if self.steps[x].op == "number":
            return self.number(value)
        return self.add(Step(printed, (x,)), Fact("number", value=value))

    def need_number(self, what: str, place: int) -> None:
        if self.kind(place) != "number":
            self.refuse(f"{what} takes a number or a parameter, not {self.name(place)}")

    def of_two(self, name: str, left: int, right: int) -> int:
        """The larger or smaller of two, or logaddexp. Against a number it is a clamp."""
        left, right = self.as_value(left), self.as_value(right)
        kinds = {self.kind(left), self.kind(right)}
        if kinds == {"number"} or "number" in kinds and name == "logaddexp":
            self.refuse(f"{name} takes two tensors; c * torch.ones_like(x) makes one of a number")
        if "number" in kinds:
            x, bound = (right, left) if self.kind(left) == "number" else (left, right)
            return self.clamped(x, {"min" if name.startswith("max") else "max": bound})
        facts = [self.facts[left], self.facts[right]]
        kind = max((fact.kind for fact in facts), key=RANK.get)
        gradient = any(fact.gradient for fact in facts)
        return self.add(Step(tables.OF_TWO[name], (left, right)), Fact(kind, gradient))

    def clamp(self, args: list[int], keywords: dict[str, int]) -> int:
        x, *bounds = args
        for key, bound in zip(("min", "max"), bounds):
            if key in keywords:
                self.refuse(f"clamp has {key} twice; give it once", "form")
            keywords = {**keywords, key: bound}
        if not keywords:
            self.refuse("clamp needs min= or max=", "form")
        return self.clamped(self.as_value(x), keywords)

    def clamped(self, x: int, bounds: dict[str, int]) -> int:
        if self.kind(x) == "number":
            self.refuse("clamp takes a tensor, not a number; choose the default instead")
        for key, place in bounds.items():
            if self.kind(place) != "number":
                self.refuse(f"clamp({key}=) takes a number; use torch.maximum or torch.minimum")
        keywords = tuple((key, bounds[key]) for key in ("min", "max") if key in bounds)
        return self.add(Step("torch.clamp", (x,), keywords), self.facts[x])

    def where(self, args: list[int], _: dict[str, int]) -> int:
        mask, *branches = args
        if self.kind(mask) != "mask":
            self.refuse(f"where takes a mask first, such as rho > 0, not {self.name(mask)}")
        branches = [self.as_value(place) for place in branches]
        gradient = any(self.facts[place].gradient for place in branches)
        return self.add(Step("torch.where", (mask, *branches)), Fact("tensor", gradient))

    def power(self, args: list[int], _: dict[str, int]) -> int:
        return self.combine("**", *args)

    def negated(self, args: list[int], _: dict[str, int]) -> int:
        return self.negative(*args)

    def detach(self, args: list[int], _: dict[str, int]) -> int:
        x = self.as_value(*args)
        if self.kind(x) == "number" or not self.facts[x].gradient:
            return x
        return self.add(Step("detach", (x,)), self.facts[x]._replace(gradient=False))

    def tensor(self, args: list[int], _: dict[str, int]) -> int:
        """torch.tensor(0.5) is that number."""
        self.need_number("torch.tensor", *args)
        return args[0]

    def as_float(self, args: list[int], _: dict[str, int]) -> int:
        return self.as_value(*args)

    # Statistics of the batch

    def statistic(self, name: str, args: list[int], keywords: dict[str, int]) -> int:
        if not (self.coupled and name in tables.STATISTICS):
            also = "; the form has mean, var and std" if self.coupled else ""
            self.refuse(
                f"{name} reduces over the batch: return one loss per pair, never a mean{also}"
            )
        if len(args) != 1 or keywords or self.kind(args[0]) != "tensor":
            self.refuse(f"{name} takes one tensor and nothing else: x.{name}()")
        fact = Fact("stat", self.facts[args[0]].gradient)
        return self.add(Step(tables.STATISTICS[name], (args[0],)), fact)

    def sort_values(self, x: int) -> int:
        """x.sort().values"""
        self.need_coupled("sort")
        if self.kind(x) != "tensor":
            self.refuse(f"sort takes a tensor, not {self.name(x)}")
        return self.add(Step("sort", (x,)), Fact("tensor", self.facts[x].gradient))


class Special(NamedTuple):
    """A function with a method of its own."""

    method: object
    least: int  # arguments
    most: int
    keywords: tuple[str, ...] = ()


SPECIAL = {
    "clamp": Special(Steps.clamp, 1, 3, ("min", "max")),
    "where": Special(Steps.where, 3, 3),
    "pow": Special(Steps.power, 2, 2),
    "neg": Special(Steps.negated, 1, 1),
    "detach": Special(Steps.detach, 1, 1),
    "tensor": Special(Steps.tensor, 1, 1),
    "float": Special(Steps.as_float, 1, 1),
}


def shown(value: float) -> str:
    """A number for a message, however long its digits are."""
    try:
        return f"{float(value):g}"
    except OverflowError:
        return "with more digits than a float has"
