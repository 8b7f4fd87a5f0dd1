"""The restricted form: text of a loss -> steps -> our own text of the same loss. Nothing of the
original is executed.

    translate(text)     1) size and letters, then Python's parser
                        2) the function, its parameters, statements and expressions, as typed steps
                           (form_reader.py, form_steps.py)
                        3) printed again (printing.py), verified, and read again: the same text

What may be written stands in form_tables.py. `x += y` means x = x + y: no tensor of the caller's
can change. Raises Refusal for everything else; its message names line, fact and remedy.
"""

import ast
import hashlib
import re
import warnings
from pathlib import Path

from pref.discovery import form_tables as tables
from pref.discovery import printing, second_reader
from pref.discovery.form_reader import Reader, find_function
from pref.discovery.form_tables import Program, Refusal
from pref.files.console import UserError

NOT_REPEATED = "a fault of discover.py: its printed text does not read back as itself"


def translate(text: str, *, name: str | None = None, coupled: bool = False) -> Program:
    """The program of a text in the form. name: what the printed function is called (default: as in
    the text). coupled: allow statistics of the batch. Raises Refusal; ValueError for a `name` that
    is none.
    """
    if name is not None and not second_reader.PLAIN_NAME.fullmatch(name):
        raise ValueError(f"name {name!r}: a letter, then letters, digits and _; at most 40")
    try:
        program, printed = read_and_print(text, name, coupled)
    except RecursionError:
        raise Refusal("size", "expressions too deep; name parts of them") from None
    # Our own text obeys the same limits, and reads back as itself.
    try:
        second_reader.verify(printed)
        again = read_and_print(printed, None, coupled)[1]
    except Refusal as refusal:
        if refusal.kind == "size":
            raise Refusal("size", f"too long when printed ({refusal}); use fewer steps") from None
        raise Refusal("form", f"{NOT_REPEATED}: {refusal}") from None
    if again != printed:
        raise Refusal("form", NOT_REPEATED)
    return program


def read_and_print(text: str, name: str | None, coupled: bool) -> tuple[Program, str]:
    tree = parse(text)
    function = find_function(tree)
    reader = Reader(function, coupled)
    result = reader.read()
    printed_name = printing.function_name(name or function.name)
    steps = reader.steps.steps
    printed, parameters = printing.print_program(
        steps, result, reader.names, printed_name, reader.defaults
    )
    live = [steps[k] for k in printing.live_steps(steps, result)]
    size = sum(step.op not in printing.LEAVES for step in live)
    if size > tables.MAX_STEPS:
        raise Refusal("size", f"{size} operations; at most {tables.MAX_STEPS}")
    program = Program(
        name=printed_name,
        text=printed,
        sha256=hashlib.sha256(printed.encode()).hexdigest(),
        parameters=parameters,
        steps=size,
        coupled=any(
            step.op in (*tables.STATISTICS.values(), "sort") or step.value == tables.RUNNING
            for step in live
        ),
    )
    return program, printed


def parse(text: str) -> ast.Module:
    """Python's syntax tree of `text`, within the limits. Raises Refusal."""
    # 1) Size, before anything is done with the text.
    if len(text) > tables.MAX_CHARACTERS:
        raise Refusal("size", f"{len(text):,} characters; at most {tables.MAX_CHARACTERS:,}")
    # 2) Letters. Outside comments and docstrings a question mark is no Python, so that names and
    # operators that only look like ASCII are refused, and a comment may have its Greek.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    plain = re.sub(r"[^ -~\n\t]", "?", text)
    if (depth := deepest(plain)) > tables.MAX_BRACKETS:
        raise Refusal("size", f"brackets {depth} deep; at most {tables.MAX_BRACKETS}")
    # 3) The parser, which never executes anything.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(plain)
    except SyntaxError as error:
        lines = text.split("\n")
        line = lines[error.lineno - 1] if error.lineno and error.lineno <= len(lines) else ""
        if strange := re.search(r"[^ -~\t]", line):
            message = f"{ascii(strange.group())} is not ASCII; write names and operators in ASCII"
        else:
            message = f"no Python: {(error.msg or '')[:80]}"
        raise Refusal("syntax", message, error.lineno) from None
    except (ValueError, OverflowError, RecursionError, MemoryError):
        raise Refusal("syntax", "no Python that can be parsed; write shorter lines") from None
    # 4) The size of the tree.
    nodes, depth = measure(tree)
    if nodes > tables.MAX_NODES:
        raise Refusal("size", f"{nodes:,} syntax nodes; at most {tables.MAX_NODES}")
    if depth > tables.MAX_DEPTH:
        raise Refusal("size", f"expressions {depth} deep; at most {tables.MAX_DEPTH}: name parts")
    return tree


def deepest(text: str) -> int:
    """How many brackets are open at most."""
    depth = most = 0
    for letter in text:
        if letter in "([{":
            depth += 1
            most = max(most, depth)
        elif letter in ")]}":
            depth -= 1
    return most


def measure(tree: ast.AST) -> tuple[int, int]:
    """Number of nodes, operators and contexts aside, and the depth of a syntax tree."""
    nodes, depth, level = 0, 0, [tree]
    while level:
        nodes, depth = nodes + len(level), depth + 1
        level = [
            child
            for node in level
            for child in ast.iter_child_nodes(node)
            if not isinstance(
                child, (ast.expr_context, ast.operator, ast.unaryop, ast.cmpop, ast.boolop)
            )
        ]
    return nodes, depth


def check_file(path: Path | str) -> str:
    """What the form makes of a file: our text of it. Raises UserError, with the line."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(4 * tables.MAX_CHARACTERS + 4)
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name a .py file") from None
    except UnicodeDecodeError:
        if len(data) <= 4 * tables.MAX_CHARACTERS:
            raise UserError(f"{path}: not UTF-8 text; save it as UTF-8") from None
        text = data.decode("utf-8", "replace")
    try:
        return translate(text, coupled=True).text
    except Refusal as refusal:
        raise UserError(f"{path}: {refusal}") from None
