"""Files of weights: what a .safetensors file holds, and a hash of it that is computed once.

tensors_of    the tensors of a file, from its header
file_digest   a hash of a file's content, kept in the user's cache folder
digest_of     one of several files, however the tensors are distributed over them
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pref.files import disk
from pref.files.console import UserError

HASH_CACHED_FROM = 2**26  # bytes: below this, hashing takes less than a tenth of a second
SETTLED_S = 10  # a file that changed within these seconds may change again with the same time


class StoredTensor(NamedTuple):
    """A tensor in a .safetensors file."""

    name: str
    form: str  # dtype and shape
    start: int  # of its bytes in the file
    end: int


def tensors_of(path: Path, place: str) -> list[StoredTensor]:
    """What a .safetensors file holds, from its header. Raises UserError if it is incomplete.

    The file: eight bytes with the header's length, the header (JSON), the tensors' bytes.
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 0 < length <= size - 8 else None
        header.pop("__metadata__", None)
        tensors = []
        for name, entry in header.items():
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            tensors.append(StoredTensor(name, f"{entry['dtype']} {entry['shape']}", start, end))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{place}: {path.name} is not a complete safetensors file; download the model again"
        ) from None
    expected = max((tensor.end for tensor in tensors), default=8 + length)
    if size != expected:
        raise UserError(
            f"{place}: {path.name} has {size:,} bytes instead of {expected:,}: an incomplete "
            "download or copy; download the model again"
        )
    return tensors


def digest_of(paths: Iterable[Path]) -> str:
    """64 hex digits for the weights in these files."""
    # Added, so that neither the order of the tensors nor their distribution over files matters.
    return f"{sum(int(file_digest(path), 16) for path in paths) % 2**256:064x}"


def file_digest(path: Path) -> str:
    """64 hex digits for the content of a weight file: of a .safetensors file the sum of its
    tensors' hashes, of another one the hash of its bytes.
    """
    path = path.resolve()
    now, state = time.time(), state_of(path)
    known = read_digests().get(str(path), {})
    if known.get("state") == state:
        return known["digest"]
    if path.suffix == ".safetensors":
        total = sum(int(digest, 16) for digest in tensor_digests(path))
        digest = f"{total % 2**256:064x}"
    else:
        digest = disk.sha256_file(path)
    if path.stat().st_size >= HASH_CACHED_FROM and settled(path, now):
        keep_digest(path, {"state": state, "digest": digest})
    return digest


def tensor_digests(path: Path) -> list[str]:
    """sha256 of name, dtype, shape and bytes of each tensor, by several threads."""
    content = np.memmap(path, dtype=np.uint8, mode="r")

    def digest(tensor: StoredTensor) -> str:
        sha256 = hashlib.sha256(f"{tensor.name} {tensor.form}".encode())
        sha256.update(content[tensor.start : tensor.end])  # without Python's lock
        return sha256.hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(digest, tensors_of(path, str(path))))


def state_of(path: Path) -> list[int]:
    """What changes when a file does. Other tools can set the time of the last modification, but
    not that of the last change.
    """
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def settled(path: Path, now: float) -> bool:
    """Whether the file's last change is old enough that a later one has another time."""
    return now - path.stat().st_ctime > SETTLED_S


def digests_path() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "pref" / "weights.json"


def read_digests() -> dict:
    try:
        return disk.read_json(digests_path())
    except (UserError, OSError):  # none yet, or damaged: everything is computed again
        return {}


def keep_digest(path: Path, entry: dict) -> None:
    known = {name: entry for name, entry in read_digests().items() if os.path.exists(name)}
    with contextlib.suppress(OSError):  # a home that cannot be written costs seconds
        disk.write_json(digests_path(), known | {str(path): entry})
