"""a file, a folder, the hub"""

import argparse
import csv
import gzip
import http.client
import json
import os
import re
import shutil
import ssl
import tempfile
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path

from pref.files import disk
from pref.files.console import UserError, first_line

PINNED_REVISIONS = {"argilla/dpo-mix-7k": "f8869fc91bde5c71a104667292addcbbfd15985d"}
TRAIN_SPLITS = (
    "train_prefs",
    "train",
)  # first found; UltraFeedback also has train_sft and train_gen
VAL_SPLITS = ("test_prefs", "validation", "val", "valid", "dev", "test", "eval")


def open_source(args: argparse.Namespace) -> tuple[dict[str, Iterator], str | None]:
    """Return ({train split: rows, maybe validation split: rows}, revision). Raises UserError if it
    is not there.
    """
    path, revision = Path(args.dataset).expanduser(), None
    if path.is_file():
        return {"train": read_rows(path)}, None
    if path.is_dir():
        loaded = open_folder(path, args.config)
    elif is_hub_id(args.dataset):
        loaded, revision = open_hub(
            args.dataset, args.revision or PINNED_REVISIONS.get(args.dataset), args.config
        )
    else:
        raise UserError(f"{args.dataset}: no such file or folder, and no hub id (owner/name)")
    splits = pick_splits(list(loaded), args.dataset)
    return {split: dataset_rows(args.dataset, split, loaded[split]) for split in splits}, revision


def is_hub_id(source: str) -> bool:
    """Whether `source` can be a hub id, rather than a path that is not there."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source)) and not file_ending(source)


def pick_splits(names: list[str], source: str) -> list[str]:
    """[train] or [train, validation] among the source's splits; a lone split is train, whatever its
    name.
    """
    if len(names) == 1:
        return names
    train = next((name for name in TRAIN_SPLITS if name in names), None)
    val = next((name for name in VAL_SPLITS if name in names), None)
    if not train:
        raise UserError(
            f"{source}: no split named {' or '.join(TRAIN_SPLITS)} among {', '.join(names)}; give one file"
        )
    return [train, val] if val else [train]


def file_ending(name: str) -> str:
    """'.csv' of 'x.csv' and '.csv.gz' of 'x.csv.gz'; '' if it is none that this program reads."""
    found = re.search(r"\.(jsonl|json|parquet|csv)(\.gz)?$", name, re.IGNORECASE)
    return found.group().lower() if found else ""


def read_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield (place, row) of a .json, .jsonl, .parquet or .csv file, plain or .gz. Raises UserError
    with the place.
    """
    ending = file_ending(path.name)
    if not ending:
        raise UserError(f"{path}: not a .json, .jsonl, .parquet or .csv file (each may be .gz)")
    if not ending.endswith(".gz"):
        yield from {
            ".json": json_rows,
            ".jsonl": jsonl_rows,
            ".csv": csv_rows,
            ".parquet": parquet_rows,
        }[ending](path)
        return
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / path.name[:-3]
        unpack(path, plain)
        try:
            for place, row in read_rows(plain):
                yield place.replace(str(plain), str(path), 1), row
        except UserError as error:
            raise UserError(str(error).replace(str(plain), str(path), 1)) from None


def unpack(path: Path, plain: Path) -> None:
    try:
        with gzip.open(path, "rb") as packed, open(plain, "wb") as file:
            shutil.copyfileobj(packed, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file: {error}") from None


def jsonl_rows(path: Path) -> Iterator[tuple[str, dict]]:
    return ((f"{path}:{number}", row) for number, row in disk.read_jsonl(path))


def json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Rows of a JSON list; anything else is read as JSON Lines, which many .json files are."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if not text.lstrip().startswith("["):
            yield from jsonl_rows(path)
            return
        rows = json.loads(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})"
        ) from None
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}[{index}]: expected a JSON object, found {type(row).__name__}")
        yield f"{path}[{index}]", row


def csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses answers above 128 KiB
    read = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            read = (
                reader.line_num if reader.fieldnames else 0
            )  # asking for the names reads the header
            for row in reader:
                line = csv_line(reader.line_num, row)
                if None in row:
                    raise UserError(f"{path}:{line}: more fields than the header has columns")
                read = reader.line_num
                yield f"{path}:{line}", row
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except csv.Error as error:
        raise UserError(
            f"{path}:{read + 1}: the row that starts here is not valid CSV: {error}"
        ) from None


def csv_line(last_line: int, row: dict) -> int:
    """The line a CSV row starts on, given the one it ends on: quoted fields hold line breaks."""
    return last_line - sum(value.count("\n") for value in row.values() if isinstance(value, str))


def parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet

    index = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                yield f"{path}[{index}]", row
                index += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file: {first_line(error)}") from None


def dataset_rows(source: str, split: str, dataset) -> Iterator[tuple[str, dict]]:
    """Yield (`split[index]`, row) of a `datasets` split, index from 0 as in `dataset[index]`."""
    try:
        for index, row in enumerate(dataset):
            yield f"{split}[{index}]", row
    except load_errors() as error:
        raise UserError(f"{source}, split '{split}': cannot be read: {first_line(error)}") from None


def open_folder(path: Path, config: str | None) -> dict:
    """{split: rows} of a folder. Streamed: no second copy in the cache, and no stale one."""
    datasets = import_datasets()
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(str(path.resolve()), config, streaming=True)
    except load_errors() as error:
        raise UserError(
            f"{path}: `datasets` cannot read this folder: {first_line(error)}"
        ) from None
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def open_hub(name: str, revision: str | None, config: str | None) -> tuple[dict, str | None]:
    """({split: rows}, commit) of a hub dataset, from the local cache where the hub cannot be
    reached.

    Raises UserError if it is neither there nor cached, is gated, or the cache holds another commit
    than `revision`.
    """
    if not hub_answers():
        os.environ["HF_HUB_OFFLINE"] = (
            "1"  # read at import: straight to the cache, without 25 s of retries
        )
    datasets = import_datasets()
    try:
        loaded = datasets.load_dataset(name, config, revision=revision)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"{name}: {first_line(error)}\nCheck the spelling (no such file or folder here either); for a gated or "
            "private one accept its terms on the hub and run `hf auth login`."
        ) from None
    except ConnectionError as error:
        raise UserError(
            f"{name}: {first_line(error)}; no such file or folder here either\n"
            "Check the network and HF_HUB_OFFLINE, or give --dataset a folder or file copied from elsewhere."
        ) from None
    except load_errors() as error:
        raise UserError(f"{name}: `datasets` cannot load it: {first_line(error)}") from None
    commit = cached_commit(loaded)
    # `datasets` falls back to whatever is cached after any failure, a mistyped revision included
    if commit and re.fullmatch(r"[0-9a-f]{40}", revision or "") and commit != revision:
        raise UserError(
            f"{name}: revision {revision} could not be loaded; the cache holds {commit}. Check --revision."
        )
    return loaded, commit or revision


def import_datasets():
    import datasets

    datasets.logging.set_verbosity(
        datasets.logging.CRITICAL
    )  # what it logs as errors is raised as well
    return datasets


def load_errors() -> tuple[type[Exception], ...]:
    """What `datasets` raises for unreadable data: its own, pyarrow's (ValueError), I/O, and scripts
    (RuntimeError).
    """
    import datasets

    return (datasets.exceptions.DatasetsError, ValueError, OSError, RuntimeError)


def hub_answers(timeout_s: float = 10) -> bool:
    """Whether anything answers at the hub's address; not asked when HF_HUB_OFFLINE is set."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    url = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        urllib.request.urlopen(
            urllib.request.Request(url, method="HEAD"), timeout=timeout_s
        ).close()
    # it answered; or HF_ENDPOINT is odd, and `datasets` will say so
    except (urllib.error.HTTPError, http.client.HTTPException, ValueError):
        return True
    except OSError as error:  # certificates: the hub client brings its own, this call does not
        return isinstance(getattr(error, "reason", None), ssl.SSLError)
    return True


def cached_commit(loaded: dict) -> str | None:
    """The hub commit that `loaded` came from: `datasets` names the cache folder after it."""
    files = [file["filename"] for dataset in loaded.values() for file in dataset.cache_files]
    found = re.search(r"[/\\]([0-9a-f]{40})[/\\]", files[0]) if files else None
    return found.group(1) if found else None
