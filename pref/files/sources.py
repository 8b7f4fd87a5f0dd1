"""Rows of preference data from a file, a folder or the hub, each with the place it came from.

`open_source` finds out which of the three a name means and returns the rows of one or two splits.
Every row comes as (place, row); the place, e.g. "pairs.jsonl:217" or "train[5]", is what errors and
dropped.jsonl name. Rows are streamed where the format allows it.
"""

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
from typing import NamedTuple

from pref.files import console, disk
from pref.files.console import UserError

PINNED_REVISIONS = {"argilla/dpo-mix-7k": "f8869fc91bde5c71a104667292addcbbfd15985d"}
# The first of these that a source has. UltraFeedback's own preference splits are *_prefs; it also
# has train_sft and train_gen.
TRAIN_SPLITS = ("train_prefs", "train")
VAL_SPLITS = ("test_prefs", "validation", "val", "valid", "dev", "test", "eval")

Rows = Iterator[tuple[str, dict]]  # (place, row)


class Source(NamedTuple):
    splits: dict[str, Rows]  # the training split, then the validation split if there is one
    revision: str | None  # hub commit


def open_source(name: str, revision: str | None = None, config: str | None = None) -> Source:
    """The rows of the file, folder or hub dataset `name`.

    revision, config: of a hub dataset (config: also of a folder). Raises UserError if there is no
    such source or it has no training split.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return Source({"train": read_rows(path)}, None)
    if path.is_dir():
        loaded, commit = open_folder(path, config), None
    elif is_hub_id(name):
        loaded, commit = open_hub(name, revision or PINNED_REVISIONS.get(name), config)
    else:
        raise UserError(f"{name}: no such file or folder, and not a hub id (owner/name)")
    splits = pick_splits(list(loaded), name)
    return Source({split: dataset_rows(name, split, loaded[split]) for split in splits}, commit)


def is_hub_id(name: str) -> bool:
    """Whether `name` can be a hub id rather than the path of a missing file."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)) and not file_ending(name)


def pick_splits(names: list[str], source: str) -> list[str]:
    """[train] or [train, validation] from the names of a source's splits.

    A single split is the training split, whatever its name. Raises UserError if there are several
    and none is a training split.
    """
    if len(names) == 1:
        return names
    train = next((name for name in TRAIN_SPLITS if name in names), None)
    val = next((name for name in VAL_SPLITS if name in names), None)
    if not train:
        raise UserError(
            f"{source}: no split named {' or '.join(TRAIN_SPLITS)} among {', '.join(names)}; "
            "save the split to train on as a file, and give that"
        )
    return [train, val] if val else [train]


# ---- a file --------------------------------------------------------------------------------------


def file_ending(name: str) -> str:
    """'.csv' for 'x.csv', '.csv.gz' for 'x.csv.gz', '' for an ending that is not read here."""
    match = re.search(r"\.(jsonl|json|parquet|csv)(\.gz)?$", name, re.IGNORECASE)
    return match.group().lower() if match else ""


def read_rows(path: Path) -> Rows:
    """Rows of a .json, .jsonl, .parquet or .csv file, plain or .gz. Raises UserError with the
    place of what cannot be read.
    """
    readers = {
        ".json": json_rows,
        ".jsonl": jsonl_rows,
        ".csv": csv_rows,
        ".parquet": parquet_rows,
    }
    ending = file_ending(path.name)
    if not ending:
        raise UserError(f"{path}: not a .json, .jsonl, .parquet or .csv file (each may be .gz)")
    if not ending.endswith(".gz"):
        yield from readers[ending](path)
        return
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / path.name[:-3]
        unpack(path, plain)
        # Places and errors name the file that the user gave, not the unpacked copy.
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
        raise UserError(f"{path}: not a complete gzip file: {error}") from None


def jsonl_rows(path: Path) -> Rows:
    return ((f"{path}:{number}", row) for number, row in disk.read_jsonl(path))


def json_rows(path: Path) -> Rows:
    """Rows of a JSON list; any other content is read as JSON Lines, which many .json files are."""
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
        place = f"{path}[{index}]"
        yield place, disk.as_object(row, place)


def csv_rows(path: Path) -> Rows:
    csv.field_size_limit(2**31 - 1)  # the default refuses fields above 128 KiB
    last_line = 0  # on which the row before ends
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if reader.fieldnames:  # asking for the names reads the header
                last_line = reader.line_num
            for row in reader:
                place = f"{path}:{csv_line(reader.line_num, row)}"
                if None in row:
                    raise UserError(f"{place}: more fields than the header has columns")
                last_line = reader.line_num
                yield place, row
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except csv.Error as error:
        raise UserError(
            f"{path}:{last_line + 1}: the row that starts here is not valid CSV: {error}"
        ) from None


def csv_line(last_line: int, row: dict) -> int:
    """The line that a CSV row starts on, from the line that it ends on: quoted fields may contain
    line breaks.
    """
    return last_line - sum(value.count("\n") for value in row.values() if isinstance(value, str))


def parquet_rows(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    index = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                yield f"{path}[{index}]", row
                index += 1
    except (pyarrow.ArrowException, OSError) as error:
        reason = console.first_line(error)
        raise UserError(f"{path}: not a readable parquet file: {reason}") from None


# ---- a folder or the hub, through `datasets` -----------------------------------------------------


def dataset_rows(source: str, split: str, dataset) -> Rows:
    """Rows of one split; the place is `split[index]`, with the index of `dataset[index]`."""
    try:
        for index, row in enumerate(dataset):
            yield f"{split}[{index}]", row
    except load_errors() as error:
        reason = console.first_line(error)
        raise UserError(f"{source}, split '{split}': cannot be read: {reason}") from None


def open_folder(path: Path, config: str | None) -> dict:
    """{split: dataset} of a folder. Streamed, so that nothing is copied to the cache, and no
    copy of an earlier state of the folder is read from it.
    """
    datasets = import_datasets()
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(str(path.resolve()), config, streaming=True)
    except load_errors() as error:
        reason = console.first_line(error)
        raise UserError(f"{path}: `datasets` cannot read this folder: {reason}") from None
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def open_hub(name: str, revision: str | None, config: str | None) -> tuple[dict, str | None]:
    """({split: dataset}, commit) of a hub dataset; from the local cache if the hub is out of reach.

    Raises UserError if the dataset is in neither, is gated, or the cache holds another commit than
    `revision`.
    """
    if not hub_answers():
        # `datasets` reads this when it is imported, and then goes straight to the cache instead of
        # retrying for 25 s.
        os.environ["HF_HUB_OFFLINE"] = "1"
    datasets = import_datasets()
    try:
        loaded = datasets.load_dataset(name, config, revision=revision)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"{name}: {console.first_line(error)}; no such file or folder here either\n"
            "Check the spelling. If the dataset is gated or private, accept its terms on the hub "
            "and run `hf auth login`."
        ) from None
    except ConnectionError as error:
        raise UserError(
            f"{name}: {console.first_line(error)}; no such file or folder here either\n"
            "Check the spelling, the network and HF_HUB_OFFLINE, or copy the dataset here and give "
            "--dataset its file or folder."
        ) from None
    except load_errors() as error:
        reason = console.first_line(error)
        raise UserError(f"{name}: `datasets` cannot load it: {reason}") from None
    commit = cached_commit(loaded)
    # After any failure, a mistyped revision included, `datasets` takes what is in the cache.
    if commit and re.fullmatch(r"[0-9a-f]{40}", revision or "") and commit != revision:
        raise UserError(
            f"{name}: revision {revision} cannot be loaded; the cache holds {commit}. "
            "Check --revision and the network."
        )
    return loaded, commit or revision


def import_datasets():
    import datasets

    # What it logs as an error it also raises.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def load_errors() -> tuple[type[Exception], ...]:
    """What `datasets` raises for data that it cannot read: its own errors, pyarrow's (ValueError),
    I/O errors, and RuntimeError for datasets that need a script.
    """
    import datasets

    return (datasets.exceptions.DatasetsError, ValueError, OSError, RuntimeError)


def hub_answers(timeout_s: float = 10) -> bool:
    """Whether a server answers at the hub's address. False without asking if HF_HUB_OFFLINE is
    set.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    url = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        request = urllib.request.Request(url, method="HEAD")
        urllib.request.urlopen(request, timeout=timeout_s).close()
    except (urllib.error.HTTPError, http.client.HTTPException):  # an answer, if an unhappy one
        return True
    except ValueError:  # HF_ENDPOINT is not a URL: `datasets` will say so
        return True
    except OSError as error:
        # A certificate that this call does not know: the hub's client brings its own.
        return isinstance(getattr(error, "reason", None), ssl.SSLError)
    return True


def cached_commit(loaded: dict) -> str | None:
    """The hub commit of a loaded dataset, after which `datasets` names its cache folder."""
    files = [file["filename"] for dataset in loaded.values() for file in dataset.cache_files]
    match = re.search(r"[/\\]([0-9a-f]{40})[/\\]", files[0]) if files else None
    return match.group(1) if match else None
