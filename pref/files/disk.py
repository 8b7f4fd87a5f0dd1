"""The files between the stages: reading, checking, and writing them so that they are never torn.

Shared by every stage, because a row that two stages understand differently is a wrong number:
pairs (`data/<name>/*.jsonl`), run directories (`results/<run_id>/`), the MT-Bench files,
answers (FastChat's schema) and judgement rows. Formats are described in README.md, "Files".
"""

import fcntl
import hashlib
import json
import logging
import math
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from pref import ROOT
from pref.files.console import UserError


def running(run: Path, lock: str = ".lock") -> str | None:
    """Who trains `run` now, or None. lock: of other work than training."""
    try:
        with open(run / lock, encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return lock_holder(file)
            except OSError:
                pass
    except FileNotFoundError:
        pass
    return None


# What libraries say about themselves, not about the user's work: bitsandbytes on CPU misses a
# kernel package that this toolkit does not use; PEFT 0.21 calls an attribute that transformers has
# renamed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings(
    "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
)


@contextmanager
def locked(folder: Path, name: str, what: str) -> Iterator[None]:
    """Hold the lock file `name` in `folder`. The lock is the kernel's and dies with its process,
    however that dies; the file only says whose it is. Raises UserError, saying `what` is being
    done, if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: {what} by {lock_holder(file)}; wait for it, or stop it first"
            ) from None
        except OSError as error:  # some cluster file systems are mounted without locks
            print(
                f"warning: {folder}: no locks on this file system ({error.strerror}); never start this twice at a time"
            )
        file.truncate(0)
        file.write(
            f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        )
        file.flush()
        yield


def lock_holder(file) -> str:
    file.seek(0)
    return file.read().strip() or "another process"


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield (line number from 1, object) of a JSONL file; blank lines are passed over.

    Raises UserError with file and line for a missing file, bad UTF-8, bad JSON or a line that is no
    object.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start})"
                    ) from None
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{path}:{number}: not valid JSON: {error.msg} (column {error.colno})"
                    ) from None
                if not isinstance(row, dict):
                    raise UserError(
                        f"{path}:{number}: expected a JSON object, found {type(row).__name__}"
                    )
                yield number, row
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, expected a JSONL file") from None


def read_json_value(path: Path):
    """The JSON value in `path`, of any kind. Raises UserError if the file is missing or torn."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises UserError if it is missing, torn or no object."""
    value = read_json_value(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_text(path: Path, text: str) -> None:
    """Write beside, flush to disk, rename: a reader sees the old file or the new one, never a
    part.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: dict) -> None:
    """Write `value` as indented JSON. NaN and inf become null: JSON has neither, and readers choke
    on them.
    """
    write_text(
        path,
        json.dumps(finite_or_null(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    )


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    write_text(path, "".join(jsonl_line(row) for row in rows))


def jsonl_line(row: dict) -> str:
    return json.dumps(finite_or_null(row), ensure_ascii=False, allow_nan=False) + "\n"


def finite_or_null(value):
    """`value` with every non-finite float replaced by None, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return value


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value) -> str:
    """Hash of a JSON value that does not depend on key order or spacing."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def versions() -> dict[str, str]:
    """Versions of what can change a number, and the git commit of this toolkit ('+' = uncommitted
    changes).
    """
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in (
        "torch",
        "transformers",
        "peft",
        "bitsandbytes",
        "datasets",
        "numpy",
        "scipy",
        "openai",
    ):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
        )
    except FileNotFoundError:  # no git on this machine
        return found
    if commit.returncode == 0:
        found["git"] = commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")
    return found
