"""Files that others publish: found, checked against their known SHA-256, written to a data folder.

The modules *_download.py list the `Published` files of a benchmark and turn them into what the
other stages read. A file comes from its address or from a local folder. Those that were downloaded
are in the data folder as soon as they are complete, so that the same command goes on after an
interruption and needs no network once it has them all.
"""

import gzip
import hashlib
import http.client
import json
import os
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

from pref.files import console, disk
from pref.files.console import UserError

DOWNLOAD = "download"  # in place of a folder: from the addresses
TIMEOUT_S = 20


class Published(NamedTuple):
    """A file as its authors publish it."""

    name: str  # path in the data folder
    url: str
    sha256: str | None  # of the content, not packed; None: not known
    local: tuple[str, ...] = ()  # paths below a local folder, besides `name` and its last part
    without: str = ""  # what follows if it cannot be had; "": the benchmark needs it


class Fetched(NamedTuple):
    """The content of such a file, and where it was found."""

    source: str  # address, path or package
    content: bytes
    official: bool | None  # whether it has the known SHA-256; None: none is known

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def text(self) -> str:
        """Raises UserError if the content is not UTF-8."""
        try:
            return self.content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.source}: not UTF-8 ({error.reason} at byte {error.start})"
            ) from None


def read_json(file: Fetched):
    """The JSON value in a file. Raises UserError."""
    try:
        return json.loads(file.text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file.source}: not valid JSON: {error}") from None


class Missing(Exception):
    """A file that cannot be had; the message says why."""


# ---- fetching ------------------------------------------------------------------------------------


def fetch(
    files: list[Published],
    where: str,
    out: Path,
    option: str,
    allow_modified: bool,
    offline: str = "",
) -> dict[str, Fetched]:
    """The content of `files` by name. A file that can be done without may be missing from the
    result, which is said on the terminal.

    where: DOWNLOAD, or a local folder. out: the data folder; a file that is there already, with its
    known SHA-256, is not fetched again. option: that of prep_data.py, for messages. offline: what
    else helps where there is no network. Raises UserError for a file that is needed and cannot be
    had, and for one with another SHA-256 than the known one unless `allow_modified`.
    """
    folder = None if where == DOWNLOAD else check_folder(where, option)
    found, modified = {}, []
    for file in files:
        try:
            fetched = from_folder(file, folder, out) if folder else from_web(file, out)
        except Missing as missing:
            if not file.without:
                help_text = remedy(files, folder, option) + offline
                raise UserError(f"{missing}{help_text}") from None
            print(f"{file.name}: left out ({missing}). {file.without}")
            continue
        found[file.name] = fetched
        if fetched.official is False:
            modified.append(f"{fetched.source}: sha256 {fetched.sha256}, official {file.sha256}")
        elif not folder:
            keep(out / file.name, fetched)
    if modified and not allow_modified:
        raise UserError(
            "\n".join(["not the official files:", *modified])
            + "\nGet them again, or give --allow_modified if they are meant to differ: the folder, "
            'and every score made with it, is then labelled "own".'
        )
    return found


def check_folder(where: str, option: str) -> Path:
    folder = Path(where).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder ({option} takes a folder with the published files; without "
            "one it downloads them)"
        )
    return folder


def from_folder(file: Published, folder: Path, out: Path) -> Fetched:
    """The file in `folder`, plain or as .gz, else the official one in the data folder `out`.
    Raises Missing.
    """
    for name in (file.name, Path(file.name).name, *file.local):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                content = unpack(path) if path.suffix == ".gz" else path.read_bytes()
                return judged(str(path), content, file)
    if present := in_data_folder(file, out):
        return present
    raise Missing(f"{folder}: no {Path(file.name).name} in it")


def unpack(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:  # BadGzipFile is an OSError
        raise UserError(f"{path}: damaged ({console.first_line(error)}); copy it again") from None


def from_web(file: Published, out: Path) -> Fetched:
    """The official file in the data folder `out`, else from its address. Raises Missing."""
    if present := in_data_folder(file, out):
        return present
    url = with_endpoint(file.url)
    if url != file.url or "huggingface.co" in url:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise Missing(f"{url}: HF_HUB_OFFLINE is set")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            return judged(url, response.read(), file)
    except (OSError, http.client.HTTPException, ValueError) as error:
        # An interrupted transfer is an HTTPException, an HF_ENDPOINT without https:// a ValueError.
        raise Missing(f"{url}: {console.first_line(error)}") from None


def with_endpoint(url: str) -> str:
    """A hub address on the mirror that HF_ENDPOINT names, if any."""
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    return url.replace("https://huggingface.co", endpoint, 1) if endpoint else url


def in_data_folder(file: Published, out: Path) -> Fetched | None:
    """The file as an earlier call has left it, if it has its known SHA-256; where none is known,
    the one that the folder's manifest records.
    """
    path, known = out / file.name, file.sha256 or recorded_sha256(file.name, out)
    if known and path.is_file() and disk.sha256_file(path) == known:
        return Fetched(file.url, path.read_bytes(), official=True if file.sha256 else None)
    return None


def recorded_sha256(name: str, folder: Path) -> str | None:
    """The SHA-256 of a file that the manifest of a data folder records."""
    try:
        return disk.read_json(folder / "manifest.json")["files"][name]["sha256"]
    except (UserError, KeyError, TypeError):  # no folder yet, or a manifest of another form
        return None


def judged(source: str, content: bytes, file: Published) -> Fetched:
    same = hashlib.sha256(content).hexdigest() == file.sha256
    return Fetched(source, content, official=same if file.sha256 else None)


def keep(path: Path, file: Fetched) -> None:
    """Write a file unless it is there."""
    if not path.is_file() or path.read_bytes() != file.content:
        disk.write_bytes(path, file.content)


def remedy(files: list[Published], folder: Path | None, option: str) -> str:
    """What to do about a file that cannot be had: all of them, and where each is published."""
    if folder:
        return f"\n{option} DIR needs these files, plain or as .gz:{listed(files)}"
    return (
        "\nWhat was fetched is kept: run the same command again when the network is there. On a "
        "machine without one, copy these files into a folder DIR and give "
        f"{option} DIR:{listed(files)}"
    )


def listed(files: list[Published]) -> str:
    """A line for each: its name and its address."""
    return "".join(f"\n  {Path(file.name).name:<30} {file.url}" for file in files)


# ---- the data folder -----------------------------------------------------------------------------


class Contents(NamedTuple):
    """What a benchmark's data folder gets."""

    bench: str
    fetched: dict[str, Fetched]  # by path in the folder
    made: dict[str, str]  # text of the files made from them, by path
    licence: str
    about: dict  # further entries of the manifest


def write_folder(out: Path, contents: Contents) -> dict:
    """Write all files, and manifest.json last: a folder that has one is complete. Returns the
    manifest.
    """
    # 1) While the folder is written it has no manifest.
    (out / "manifest.json").unlink(missing_ok=True)
    for name, file in contents.fetched.items():
        keep(out / name, file)
    for name, text in contents.made.items():
        disk.write_text(out / name, text)

    # 2) "own" as soon as one file is not the official one.
    own = any(file.official is False for file in contents.fetched.values())
    entries = {
        name: {"source": file.source, "sha256": file.sha256, "official": file.official}
        for name, file in contents.fetched.items()
    }
    entries |= {
        name: {
            "source": "made from the published files",
            "sha256": disk.sha256_file(out / name),
            "official": not own,
        }
        for name in contents.made
    }
    manifest = {
        "bench": contents.bench,
        "label": "own" if own else contents.bench,
        "licence": contents.licence,
        **contents.about,
        "files": entries,
    }
    disk.write_json(out / "manifest.json", manifest)
    print_folder(out, manifest)
    return manifest


def print_folder(out: Path, manifest: dict) -> None:
    says = {True: "official", False: "NOT official", None: "no SHA-256 known to compare with"}
    for name, entry in manifest["files"].items():
        print(f"{out / name}: {says[entry['official']]}, {entry['source']}")
    print(f"licence of these data: {manifest['licence']}")
    if manifest["label"] == "own":
        print(
            "With files that are not the official ones, scores compare your runs with each other, "
            'not with published scores; they are labelled "own".'
        )
