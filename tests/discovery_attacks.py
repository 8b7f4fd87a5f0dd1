"""Texts that try to get out of the restricted form, for the tests of the form and of the worker.

`ATTACKS` maps a name to a text. Where an attack leaves a trace, it is a file at the path MARKER,
which stands in the text as the word MARKER; `attacks(path)` fills it in. `TAMPERING` and
`RESOURCES` leave no file: they change the caller's tensors or torch itself, or never end. Every
text is to be refused.
"""

import ast

WRITE = "__import__('os').system('touch MARKER')"


def whole(*lines: str, head: str = "", signature: str = "pairs, *, beta: float = 0.1") -> str:
    """A loss with `lines` in it. An expression is assigned, so that it is not refused for being a
    line without effect.
    """
    body = "".join(f"    {'x = ' * is_expression(line)}{line}\n" for line in lines)
    return (
        f"import torch\nimport torch.nn.functional as F\n{head}\n"
        f"def loss({signature}):\n    z = beta * pairs.rho\n{body}"
        '    losses = F.softplus(-z)\n    return losses, {"preference": losses}\n'
    )


def is_expression(line: str) -> bool:
    try:
        ast.parse(line, mode="eval")
    except (SyntaxError, ValueError, UnicodeError):
        return False
    return not line.startswith((" ", "#"))


def returning(expression: str) -> str:
    return f"import torch\ndef loss(pairs, *, beta: float = 0.1):\n    return {expression}\n"


# Through builtins and modules.
ATTACKS = {
    "import os": whole("import os", "os.system('touch MARKER')"),
    "import os above": whole("os.system('touch MARKER')", head="import os\n"),
    "import os as torch": whole("torch.system('touch MARKER')", head="import os as torch\n"),
    "import os as F": whole("F.system('touch MARKER')", head="import os as F\n"),
    "import os as math": whole("math.system('touch MARKER')", head="import os as math\n"),
    "from os import system": whole("exp('touch MARKER')", head="from os import system as exp\n"),
    "from os import *": whole("system('touch MARKER')", head="from os import *\n"),
    "from torch import os": whole("os.system('touch MARKER')", head="from torch import os\n"),
    "torch.sys in an import": whole(
        "os.system('touch MARKER')", head="from torch.serialization import os\n"
    ),
    "import torch, os": whole("os.system('touch MARKER')", head="import torch, os\n"),
    "relative import": whole(head="from . import x\n") + "# MARKER",
    "from losses import LOSSES": whole("LOSSES.clear()", head="from losses import LOSSES\n"),
    "at import time": f"import torch\n{WRITE}\n" + whole(),
    "after the function": whole() + f"\n{WRITE}\n",
    "in a main guard": whole() + f"\nif True:\n    {WRITE}\n",
    "assignment at import time": f"x = {WRITE}\n" + whole(),
    "__import__": whole(WRITE),
    "__import__ assigned": whole(f"x = {WRITE}"),
    "eval": whole('eval("' + WRITE.replace('"', "'") + '")'),
    "exec": whole('exec("' + WRITE + '")'),
    "compile": whole('exec(compile("' + WRITE + '", "x", "exec"))'),
    "open": whole("open('MARKER', 'w').close()"),
    "print to a file": whole("print('x', file=open('MARKER', 'w'))"),
    "breakpoint": whole("breakpoint(commands=['!open(\"MARKER\", \"w\")', 'c'])"),
    "getattr": whole("getattr(torch, 'o' + 's').system('touch MARKER')"),
    "vars": whole("vars(torch)['os'].system('touch MARKER')"),
    "globals": whole("globals()['torch'].os.system('touch MARKER')"),
    "builtins by name": whole("__builtins__['open']('MARKER', 'w')"),
    "torch.os": whole("torch.os.system('touch MARKER')"),
    "torch.os without a text": whole("torch.os.mkdir(torch.os.curdir + torch.os.sep)") + "# MARKER",
    "torch.sys.modules": whole("torch.sys.modules['os'].system('touch MARKER')"),
    "torch.__builtins__": whole("torch.__builtins__['open']('MARKER', 'w')"),
    "torch.__loader__": whole("torch.__loader__.set_data('MARKER', b'x')"),
    "math.__loader__": whole(
        "math.__loader__.load_module('os').system('touch MARKER')", head="import math\n"
    ),
    "torch.importlib": whole("torch.importlib.import_module('os').system('touch MARKER')"),
    "torch.save": whole("torch.save(z, 'MARKER')"),
    "torch.save in the return": returning("torch.save(pairs.rho, 'MARKER')"),
    "torch.load": whole("torch.load('MARKER', weights_only=False)"),
    "torch.hub": whole("torch.hub.download_url_to_file('file:///etc/hostname', 'MARKER')"),
    "torch.from_file": whole("torch.from_file('MARKER', shared=True, size=10)"),
    "torch.jit.save": whole("torch.jit.save(torch.jit.script(torch.nn.Identity()), 'MARKER')"),
    "torch.package": whole("torch.package.PackageExporter('MARKER').close()"),
    "torch.distributed": whole("torch.distributed.FileStore('MARKER', 1).set('a', 'b')"),
    "torch.UntypedStorage": whole("torch.UntypedStorage.from_file('MARKER', True, 8)"),
    "torch.utils.cpp_extension": whole(
        "torch.utils.cpp_extension.subprocess.run(['touch', 'MARKER'])"
    ),
    "torch.profiler": whole("torch.profiler.profile().export_chrome_trace('MARKER')"),
    "torch.multiprocessing": whole(
        "torch.multiprocessing.Process(target=torch.save, args=(z, 'MARKER')).start()"
    ),
    "torch.nn.functional.torch": whole("torch.nn.functional.torch.os.system('touch MARKER')"),
    "F.torch": whole("F.torch.os.system('touch MARKER')"),
    "F.importlib": whole("F.importlib.import_module('os').system('touch MARKER')"),
    "F.os": whole("F._VF.os.system('touch MARKER')"),
    "torch.compile": whole("torch.compile(torch.os.system, backend='eager')('touch MARKER')"),
    "torch.library": whole("torch.library.Library('x', 'DEF').define('f() -> ()')") + "# MARKER",
    # Through objects.
    "numpy().tofile": whole("z.detach().numpy().tofile('MARKER')"),
    "numpy().dump": whole("z.detach().numpy().dump('MARKER')"),
    "untyped_storage": whole("z.untyped_storage()._write_file('MARKER', False, True, 4)"),
    "subclasses": whole(
        "c = ().__class__.__base__.__subclasses__()[-1]",
        "c.__init__.__globals__['os'].system('touch MARKER')",
    ),
    "class of a tensor": whole("z.__class__.__mro__[-1].__subclasses__()", "open('MARKER', 'w')"),
    "globals of a function": whole(
        "pairs.mean.__func__.__globals__['__builtins__']['open']('MARKER', 'w')"
    ),
    "globals of this function": whole("loss.__globals__['torch'].os.system('touch MARKER')"),
    "frame": whole(
        "(g.gi_frame.f_builtins['open']('MARKER', 'w') for g in [])", "open('MARKER', 'w')"
    ),
    "format field": whole(
        "'{0.__class__.__init__.__globals__}'.format(pairs)", "open('MARKER', 'w')"
    ),
    "f-string": whole("f\"{open('MARKER', 'w')}\""),
    "f-string in a term": returning("pairs.rho, {f\"{open('MARKER', 'w')}\": pairs.rho}"),
    "percent format": whole("'%s' % open('MARKER', 'w')"),
    "deepcopy through copy": whole("torch.copy.deepcopy(z)", "open('MARKER', 'w')"),
    "__reduce_ex__": whole("z.__reduce_ex__(2)[0].__globals__['os'].system('touch MARKER')"),
    "dunder attribute of pairs": whole(
        "pairs.__class__.__new__.__globals__['_sys'].modules['os'].system('touch MARKER')"
    ),
    "register_hook": whole("pairs.chosen.register_hook(print)", "open('MARKER', 'w')"),
    "map_": whole("z.detach().map_(z.detach(), lambda x, y: open('MARKER', 'w') and x)"),
    "apply_": whole("z.detach().apply_(lambda x: open('MARKER', 'w') and x)"),
    # Through the syntax.
    "default argument": whole(signature=f"pairs, *, beta: float = 0.1, x={WRITE}"),
    "default of a positional-only argument": whole(
        signature=f"pairs, x={WRITE}, /, *, beta: float = 0.1"
    ),
    "default of pairs": whole(signature=f"pairs={WRITE}, *, beta: float = 0.1"),
    "annotation": whole(signature=f"pairs, *, beta: {WRITE} = 0.1"),
    "annotation of pairs": whole(signature=f"pairs: {WRITE}, *, beta: float = 0.1"),
    "annotation in a subscript": whole(signature=f"pairs: list[{WRITE}], *, beta: float = 0.1"),
    "annotation of what is returned": returning("pairs.rho").replace("):", f") -> {WRITE}:"),
    "annotation of a variable": whole(f"x: {WRITE} = 1"),
    "annotation without a value": whole(f"x: {WRITE}"),
    "*args": whole(signature="pairs, *args, beta: float = 0.1") + "# MARKER",
    "**kwargs": whole(signature="pairs, *, beta: float = 0.1, **kwargs") + "# MARKER",
    "decorator": whole(head=f"@({WRITE} or (lambda f: f))"),
    "decorator by name": whole(head="import atexit\n@atexit.register"),
    "class body": whole("class A:", f"    {WRITE}"),
    "class above": f"class A:\n    x = {WRITE}\n" + whole(),
    "metaclass": whole("class A(metaclass=lambda *x: open('MARKER', 'w')): pass"),
    "__del__": whole("class A:", f"    def __del__(self): {WRITE}", "A()"),
    "lambda": whole(f"(lambda: {WRITE})()"),
    "function inside": whole("def f():", f"    {WRITE}", "f()"),
    "async": whole(f"async def f(): {WRITE}").replace("def loss", "async def loss"),
    "second function": whole() + f"\ndef exp(x={WRITE}):\n    return x\n",
    "walrus": whole(f"x = (y := {WRITE})"),
    "comprehension": whole(f"x = [{WRITE} for _ in (1,)]"),
    "generator": whole(f"x = sum({WRITE} for _ in (1,))"),
    "if": whole(f"if {WRITE}: pass"),
    "if like the guard": whole(
        f"if len(pairs.chosen) < {WRITE}:",
        "    raise ValueError('loss needs at least 2 pairs per micro-batch')",
    ),
    "if expression": whole(f"x = 1 if {WRITE} else 2"),
    "while": whole(f"while {WRITE}: pass"),
    "for target": whole(f"for torch.x in [{WRITE}]: pass"),
    "with": whole("with open('MARKER', 'w'): pass"),
    "try": whole("try:", "    1 / 0", "except ZeroDivisionError:", f"    {WRITE}"),
    "raise": whole(f"raise ValueError({WRITE})"),
    "assert": whole(f"assert {WRITE} == 0"),
    "match": whole("match z:", f"    case _ if {WRITE}: pass"),
    "global": whole("global torch", f"torch = {WRITE}"),
    "del": whole(f"del z.x[{WRITE}]"),
    "yield": whole(f"yield {WRITE}"),
    "await": whole(f"await {WRITE}"),
    "starred": whole(f"x = torch.exp(*[{WRITE}])"),
    "double starred": whole(f"x = torch.exp(**{{'input': {WRITE}}})"),
    "keyword": whole(f"x = torch.clamp(z, min={WRITE})"),
    "unknown keyword": whole(f"x = torch.exp(z, x={WRITE})"),
    "subscript": whole(f"x = z[{WRITE}]"),
    "compare": whole(f"x = z < {WRITE}"),
    "boolean": whole(f"x = z and {WRITE}"),
    "dead code": returning("pairs.rho") + f"    {WRITE}\n",
    "dead step": whole(f"unused = torch.exp({WRITE})"),
    "term": returning(f'pairs.rho, {{"x": {WRITE}}}'),
    "key of a term": returning(f"pairs.rho, {{{WRITE}: pairs.rho}}"),
    "unpacked terms": returning(f"pairs.rho, {{**{WRITE}}}"),
    "semicolon": whole(f"x = 1; {WRITE}"),
    "line continuation": whole("x = torch\\", "    .os.system('touch MARKER')"),
    "carriage return in a comment": whole("# a comment\r    " + WRITE),
    "line without effect": whole(f"x = 1; {WRITE}; pairs.chosen"),
    "form feed in a comment": whole("# a comment\x0c\n    " + WRITE),
    "shadowed module": whole("torch = pairs", "torch.os.system('touch MARKER')"),
    "shadowed function": whole("abs = torch.os", "abs.system('touch MARKER')"),
    "parameter called torch": whole(signature="pairs, *, beta: float = 0.1, torch: float = 1.0")
    + "# MARKER",
    "module as a value": whole("x = torch", "x.os.system('touch MARKER')"),
    "function as a value": whole("x = torch.save", "x(z, 'MARKER')"),
    "pairs called": whole(f"x = pairs({WRITE})"),
    "string": whole("x = 'MARKER'"),
    "bytes": whole("x = b'MARKER'"),
    # Letters that Python reads as others (NFKC), or that look like others.
    "fullwidth torch.save": whole("torch.\uff53ave(z, 'MARKER')"),
    "fullwidth os": whole("torch.\uff4fs.system('touch MARKER')"),
    "mathematical eval": whole('\U0001d41e\U0001d42f\U0001d41a\U0001d425("' + WRITE + '")'),
    "ordinal exec": whole("ex\u1d49c('pass')", f"{WRITE}"),
    "cyrillic name": whole("\u043ess = torch.os", "\u043ess.system('touch MARKER')"),
    "fullwidth low lines": whole("\uff3f\uff3fimport\uff3f\uff3f('os').system('touch MARKER')"),
    "line separator": whole("x = 1\u2028    " + WRITE),
    "surrogate": whole("x = \ud800", "open('MARKER', 'w')"),
    "null": whole("x = 1\x00", "open('MARKER', 'w')"),
    "byte order mark": "\ufeff" + whole("open('MARKER', 'w')"),
    "right-to-left": whole("x = \u202e1", "open('MARKER', 'w')"),
}

# On what the caller holds, or on torch.
TAMPERING = {
    "in-place method": whole("pairs.ref_chosen.zero_()"),
    "in-place function": whole("x = torch.exp_(pairs.chosen)"),
    "in-place relu": whole("x = F.relu(pairs.ref_chosen, inplace=True)"),
    "in-place elu": whole("x = F.elu(pairs.ref_chosen, alpha=1.0, inplace=True)"),
    "out=": whole("x = torch.exp(z, out=pairs.ref_chosen)"),
    "data": whole("pairs.chosen.data[0] = 1"),
    "data, augmented": whole("pairs.chosen.data += 1"),
    "element": whole("pairs.ref_chosen[0] = 1"),
    "slice, augmented": whole("pairs.ref_chosen[:] += 1"),
    "attribute": whole("pairs.chosen = pairs.rejected"),
    "attribute, augmented": whole("pairs.ref_chosen += 1"),
    "attribute in a tuple": whole("pairs.chosen, x = pairs.log_ratios"),
    "starred target": whole("*x, y = pairs.log_ratios"),
    "attribute of torch": whole("torch.exp = torch.log"),
    "fill": whole("x = torch.fill_(pairs.ref_chosen, 0)"),
    "copy_": whole("pairs.ref_chosen.copy_(pairs.chosen)"),
    "requires_grad_": whole("pairs.ref_chosen.requires_grad_()"),
    "backward": whole("z.sum().backward()"),
    "grad": whole("x = pairs.chosen.grad"),
    "manual_seed": whole("torch.manual_seed(0)"),
    "default dtype": whole("torch.set_default_dtype(torch.float64)"),
    "threads": whole("torch.set_num_threads(1)"),
    "grad mode": whole("torch.set_grad_enabled(False)"),
    "no_grad": whole("with torch.no_grad(): pass"),
    "running_rho": whole("pairs.running_rho = 5"),
    "_replace": whole("x = pairs._replace(chosen=z)"),
    "token-level sums": whole("x = pairs.kl_chosen"),
}

# That take memory or time. None may take the reader more than a moment.
RESOURCES = {
    "while True": whole("while True: pass"),
    "for": whole("for i in range(10**12): z = z + 1"),
    "power tower": whole("x = 9 ** 9 ** 9 ** 9"),
    "factorial": whole("x = math.factorial(10 ** 9)", head="import math"),
    "shift": whole("x = 1 << 10 ** 10"),
    "long number": whole("x = " + "9" * 5000),
    "long hexadecimal number": whole("x = 0x" + "f" * 5000),
    "number beyond a float": whole("x = 1e999"),
    "long text": whole("x = 'a' * 10 ** 10"),
    "big tensor": whole("x = torch.zeros(10 ** 12)"),
    "repeat": whole("x = z.repeat(10 ** 9)"),
    "outer": whole("x = torch.outer(z, z)"),
    "sleep": whole("time.sleep(1000)", head="import time"),
    "recursion": whole("x = loss(pairs)"),
    "brackets": returning("(" * 2900 + "pairs.rho" + ")" * 2900),
    "curly brackets": returning("{" * 3000),
    "open brackets": returning("f(" * 1400),
    "square brackets": returning("pairs.rho" + "[0]" * 1900),
    "calls": returning("pairs.rho" + ".exp()" * 950),
    "attributes": returning("pairs" + ".mean" * 1100),
    "signs": returning("-" * 5900 + "pairs.rho"),
    "nots": returning("not " * 1400 + "pairs.rho"),
    "powers": returning("pairs.rho" + "**1" * 1900),
    "sum": returning("pairs.rho" + "+1" * 2900),
    "comparisons": returning("pairs.rho" + "<1" * 2900),
    "if expressions": returning("1 if 1 else " * 480 + "1"),
    "lambdas": returning("lambda: " * 730 + "1"),
    "indentation": "def loss(pairs):\n" + "".join(" " * n + "if 1:\n" for n in range(1, 100)),
    "assignments": whole(*["x = 1"] * 500),
    "names": whole("x = " + "=".join("abcdefghij"[n % 10] for n in range(2000)) + "=1"),
    "squares": whole("x = z", *["x = x * x + x"] * 100, "z = x"),
    "ten megabytes": whole() + "# " + "a" * 10_000_000,
    "ten megabytes of brackets": "(" * 10_000_000,
    "ten megabytes of lines": "\n" * 10_000_000,
}


def attacks(marker: str) -> dict[str, str]:
    """All texts, with `marker` as the path of the file that those of ATTACKS leave."""
    return {
        name: text.replace("MARKER", marker)
        for name, text in {
            **ATTACKS,
            **{f"tampering: {name}": text for name, text in TAMPERING.items()},
            **{f"resources: {name}": text for name, text in RESOURCES.items()},
        }.items()
    }
