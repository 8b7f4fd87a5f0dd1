"""What a task's scores depend on: its file, the modules and data files beside it, its packages.

Read from the source, without running it. The task's path is no part of it.
"""

import ast
import sys
import warnings
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from pref.files import disk
from pref.files.console import UserError


def identify(path: Path, data: Iterable[str] = ()) -> dict:
    """{"file": its name, "sha256": {file, relative to its folder: hash}, "packages": {distribution:
    version}} of the task in `path`. data: files beside it that it reads when it is imported.

    Modules that are imported within functions count too. A package that is not installed has the
    version None. Raises UserError for a file that is no Python.
    """
    files, names = sources_of(path)
    return {
        "file": path.name,
        "sha256": hashes(path.parent, files | {*data}),
        "packages": dict(sorted(map(version_of, names))),
    }


def hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of those of the files that are there."""
    return {
        name: disk.sha256_file(folder / name) for name in sorted(names) if (folder / name).is_file()
    }


def sources_of(path: Path) -> tuple[set[str], set[str]]:
    """A task's file and the modules beside it that it imports, relative to its folder; and the
    modules that come with neither it nor Python. Raises UserError for a file that is no Python.
    """
    folder, beside, names = path.parent, {path}, set()
    waiting = [path]
    while waiting:
        file = waiting.pop()
        for name in imported_names(parse(file, must_be_valid=file == path)):
            found = modules_beside(folder, name)
            if not found and name not in sys.stdlib_module_names:
                names.add(name)
            waiting += found - beside
            beside |= found
    return {str(file.relative_to(folder)) for file in beside}, names


def parse(path: Path, must_be_valid: bool) -> ast.Module:
    """A file's syntax tree. Raises UserError for one that is no Python. A package beside the task
    may have such files, which its import then reports; their tree is empty.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(path.read_bytes(), filename=str(path))
    except SyntaxError as error:
        place, fact = f"{path}:{error.lineno}", error.msg
    except (ValueError, RecursionError, MemoryError) as error:  # a NUL character, deep nesting
        place, fact = str(path), str(error) or type(error).__name__
    if must_be_valid:
        raise UserError(f"{place}: not valid Python: {fact}")
    return ast.Module([], [])


def imported_names(tree: ast.Module) -> Iterator[str]:
    """First parts of the names of the modules that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.partition(".")[0]


def modules_beside(folder: Path, name: str) -> set[Path]:
    """The file or files of the module or package `name` in `folder`."""
    if (folder / name).is_dir():
        return {*(folder / name).rglob("*.py")}
    file = folder / f"{name}.py"
    return {file} if file.is_file() else set()


def version_of(module: str) -> tuple[str, str | None]:
    """The distribution that a module belongs to, and its version."""
    try:
        return module, metadata.version(module)
    except metadata.PackageNotFoundError:
        pass
    for name in metadata.packages_distributions().get(module, ()):
        return name, metadata.version(name)
    return module, None
