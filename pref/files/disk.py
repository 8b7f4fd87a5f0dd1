"""Reading and writing files so that no reader ever sees a part of one.

Every file that a stage leaves for the next one goes through here:

- writing: `write_text`, `write_bytes`, `write_json`, `write_jsonl` replace a file in one step
- reading: `read_jsonl`, `read_json` name the file and line of what they cannot read
- hashes: `sha256_file`, `sha256_json`
- locks: `locked` keeps two processes off the same work, `lock_holder` names the process at work
- versions: `versions` records the software that a number depends on
"""

import fcntl
import hashlib
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TextIO

from pref import ROOT, __version__
from pref.files.console import UserError

# Packages whose version can change a number.
PACKAGES = ["torch", "transformers", "peft", "bitsandbytes", "datasets", "numpy", "scipy", "openai"]

# It can only be read by setting it, which is not safe once there are threads.
UMASK = os.umask(0)
os.umask(UMASK)

# ---- writing -------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write `text` in one step (see `write_bytes`). Line ends stay as given.

    A lone surrogate, which UTF-8 has no bytes for, is written as \\ud800: in JSON that is its
    escape, so that it is read as it was.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to a temporary file, flush it to disk and rename it to `path`.

    A reader, or a crash, finds the old file or the new one, never a part.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def as_umask_says(path: Path) -> None:
    """Give a file, or all files of a folder, the permissions of an ordinary new file. Libraries
    that write through a private temporary file leave 0600, which a group cannot read.
    """
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            file.chmod(0o666 & ~UMASK)


def write_json(path: Path, value: dict) -> None:
    """Write `value` as indented JSON; non-finite numbers become null (see `finite_or_null`)."""
    text = json.dumps(finite_or_null(value), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write one JSON object per line; non-finite numbers become null."""
    write_text(path, "".join(jsonl_line(row) for row in rows))


def jsonl_line(row: dict) -> str:
    """`row` as one line of JSON, with its newline."""
    return json.dumps(finite_or_null(row), ensure_ascii=False, allow_nan=False) + "\n"


def finite_or_null(value):
    """`value` with every NaN and infinity replaced by None, at any depth: JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return value


# ---- reading -------------------------------------------------------------------------------------


def read_jsonl(path: Path, skip_torn_end: bool = False) -> Iterator[tuple[int, dict]]:
    """Yield (line number from 1, object) of a JSON Lines file; blank lines are skipped.

    skip_torn_end: skip the last line too if it has no newline, as a writer that was killed leaves
    it. Raises UserError, with file and line, for a missing file, invalid UTF-8, invalid JSON or a
    line that is not an object.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip() and not (skip_torn_end and not line.endswith(b"\n")):
                    yield number, parse_object(line, f"{path}:{number}")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, expected a JSONL file") from None


def parse_object(line: bytes, place: str) -> dict:
    """The JSON object in `line`. Raises UserError, beginning with `place`, if there is none."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not valid JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; 100,000 brackets
        raise UserError(f"{place}: not usable JSON: {error}") from None
    return as_object(value, place)


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises UserError if it is missing, invalid or not an object."""
    return as_object(read_json_value(path), str(path))


def read_json_value(path: Path):
    """The JSON value in `path`, of any type. Raises UserError if it is missing or invalid."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def as_object(value, place: str) -> dict:
    """`value` if it is a JSON object. Raises UserError, beginning with `place`, if it is not."""
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected a JSON object, found {type(value).__name__}")
    return value


def is_number(value) -> bool:
    """Whether a JSON value is a number. True and false, which Python counts as such, are not; nor
    is a whole number that no float can hold.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) <= sys.float_info.max


def check_readable(path: Path) -> None:
    """Raise the OSError that says why a file cannot be read. safetensors reports every reason, a
    permission too, as a file that does not exist.
    """
    with open(path, "rb"):
        pass


def nearest(path: Path) -> Path:
    """`path` if it is there, or else the nearest folder above it that is."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


# ---- hashes --------------------------------------------------------------------------------------


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value) -> str:
    """Hex SHA-256 of a JSON value, independent of key order and spacing."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# ---- locks ---------------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path, name: str, activity: str) -> Iterator[None]:
    """Hold the lock file `name` in `folder` while the block runs.

    The operating system holds the lock and releases it when the process ends, however it ends. The
    text in the file only says which process that is. On a file system without locks a warning is
    printed and the block runs unprotected.

    activity: completes "FOLDER: ... by process N", e.g. "is being trained". Raises UserError if
    another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: {activity} by {read_holder(file)}; wait for it, or stop it first"
            ) from None
        except OSError as error:  # some cluster file systems are mounted without locks
            print(
                f"warning: {folder}: no locks on this file system ({error.strerror}); "
                "make sure that only one process works on this folder at a time"
            )
        file.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}")
        file.flush()
        yield


def lock_holder(folder: Path, name: str = ".lock") -> str | None:
    """The process that holds the lock `name` of `folder` ("process 7 on HOST since ..."), or None.

    The default is the lock of a training run.
    """
    try:
        with open(folder / name, encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return read_holder(file)
            except OSError:  # no locks on this file system: nobody can be named
                pass
    except FileNotFoundError:
        pass
    return None


def read_holder(file: TextIO) -> str:
    """What the holder of a lock has written into its file."""
    file.seek(0)
    return file.read().strip() or "another process"


# ---- versions ------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of this toolkit, of Python and of each installed package in PACKAGES, and this
    checkout's git commit.

    The commit ends in "+" if tracked files have uncommitted changes, and is left out where git or
    its repository is missing.
    """
    installed = {"pref": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    git = ["git", "-C", str(ROOT)]
    options = {"capture_output": True, "text": True}
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], **options)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], **options)
    except FileNotFoundError:  # git is not installed
        return installed
    if commit.returncode == 0:
        installed["git"] = commit.stdout.strip() + ("+" if changes.stdout.strip() else "")
    return installed
