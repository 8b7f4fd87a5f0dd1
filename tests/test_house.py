"""The structure of the repository: imports run one way, files are short, nothing needs Linux."""

import argparse
import ast
import importlib
import re

import pytest
from conftest import ROOT, run_script

# What a stage or a room of pref/ may import. A room may always import itself.
STAGES = ("prep_data", "train_pref", "gen_mtbench", "judge", "analyze")
MAY_IMPORT = {
    "losses": (),
    "files": (),
    "model": ("files",),
    "training": ("files", "model", "losses"),
    "answering": ("files", "model"),
    "judging": ("files", "model"),
    "analysis": ("files",),
    "prep_data": ("files",),
    "train_pref": ("files", "model", "training", "losses"),
    "gen_mtbench": ("files", "model", "answering"),
    "judge": ("files", "model", "judging"),
    "analyze": ("files", "analysis"),
    "export": ("files", "model"),
    "sweeping": ("files", "model", "training", "answering", "judging", "losses", *STAGES),
    "discovery": ("files", "model", "training", "analysis", "sweeping", "losses", "judging"),
    "discover": (
        *("files", "model", "training", "analysis", "sweeping", "losses", "judging"),
        "discovery",
    ),
}
# A user may keep scripts of their own at the top; these are not looked at.
SCRIPTS = [ROOT / f"{name}.py" for name in (*STAGES, "losses", "export")]
SOURCES = sorted([*SCRIPTS, *ROOT.glob("pref/**/*.py")])
MAX_LINES = 600
COMMANDS = (*STAGES, "losses", "export", "pref/sweeping/__main__")


def name_of(path) -> str:
    """The dotted name under which a file of the toolkit is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in SOURCES}


def imports_of(path) -> set[str]:
    """Modules of the toolkit that a file imports, also inside functions."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= members & MODULES.keys() or {node.module}
    return imported & MODULES.keys()


def room_of(module: str) -> str:
    """`pref.model.chat` -> model; `train_pref` -> train_pref."""
    return module.split(".")[1] if module.startswith("pref.") else module


GRAPH = {module: imports_of(path) for module, path in MODULES.items()}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"pref"}))
def test_imports_run_one_way(module):
    room = room_of(module)
    allowed = {room, "pref", *MAY_IMPORT[room]}
    assert {room_of(other) for other in GRAPH[module]} <= allowed


def test_there_is_no_circle_of_imports():
    left = {module: set(others) - {module} for module, others in GRAPH.items()}
    while leaves := {module for module, others in left.items() if not others}:
        left = {m: others - leaves for m, others in left.items() if m not in leaves}
    assert not left, "these modules import each other"


def test_no_file_is_a_hall():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in SOURCES
    }
    assert {name: count for name, count in lengths.items() if count > MAX_LINES} == {}


def test_every_room_has_a_readme_that_names_its_files():
    for room in sorted(path.parent for path in ROOT.glob("pref/*/*.py")):
        text = (room / "README.md").read_text(encoding="utf-8")
        assert [path.name for path in room.glob("*.py") if path.name not in text] == []


# Removes what only Linux has, then imports every module, or runs the `--help` of a command. What a
# Mac lacks beyond this cannot be seen from a Linux machine.
ELSEWHERE = """
import builtins, ctypes, os, pathlib, runpy, sys
# The real libraries first: they may use what Linux has.
import torch, transformers, peft, matplotlib.pyplot, datasets, openai, scipy.stats

sys.platform = {platform!r}
for name in ("sched_getaffinity", "sched_setaffinity"):
    vars(os).pop(name, None)

def refuse(*_, **__):
    raise OSError("no C library by this name here")

ctypes.CDLL = refuse
original = builtins.open

def guarded(file, *args, **kwargs):
    assert not str(file).startswith(("/proc", "/sys")), f"{{file}} exists on Linux alone"
    return original(file, *args, **kwargs)

builtins.open = guarded
sys.path.insert(0, {root!r})
"""
IMPORTS = """
import importlib
for module in {modules!r}:
    importlib.import_module(module)
print("imported", len({modules!r}))
"""
HELP = """
for command in {commands!r}:
    sys.argv = [command + ".py", "--help"]
    try:
        runpy.run_path({root!r} + "/" + command + ".py", run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, command
"""


@pytest.mark.slow
def test_modules_and_help_need_no_linux(tmp_path):
    script = tmp_path / "elsewhere.py"
    values = {
        "platform": "darwin",
        "root": str(ROOT),
        "modules": [m for m in MODULES if not m.endswith("__main__")],
        "commands": COMMANDS,
    }
    script.write_text((ELSEWHERE + IMPORTS + HELP).format(**values))
    done = run_script(script)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("usage:") == len(COMMANDS)


def test_the_table_of_cases_names_tests_that_exist():
    """tests/CASES.md: every case has a test, by its file and the name of the function."""
    text = (ROOT / "tests" / "CASES.md").read_text(encoding="utf-8")
    cases = [line for line in text.splitlines() if line.startswith("| ")]
    cases = [line for line in cases if not line.startswith(("| case |", "|---"))]
    assert len(cases) > 150
    for line in cases:
        references = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", line.rpartition(" | ")[2])
        assert references, line
        for file, function in references:
            source = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert not function or f"def {function}(" in source, f"{file}::{function}"


@pytest.mark.parametrize("stage", ["prep_data", "gen_mtbench", "judge", "analyze"])
def test_help_says_every_default(stage, monkeypatch):
    """Of each option with a default other than "none" or "off". train_pref.py's options are in
    test_arguments.py.
    """
    parsers = []
    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(
        argparse.ArgumentParser,
        "parse_args",
        lambda parser, argv=None: parsers.append(parser) or parse(parser, argv),
    )
    with pytest.raises(SystemExit):
        importlib.import_module(stage).parse_args(["--help"])
    formatter = parsers[0].formatter_class("x", width=1000)
    for action in parsers[0]._actions:
        unset = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        if action.option_strings and not unset:
            assert "default" in formatter._get_help_string(action), action.option_strings
