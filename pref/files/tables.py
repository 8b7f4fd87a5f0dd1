"""Rows of one data file: JSON in its many shapes, CSV and TSV, Parquet; plain or .gz.

Every row comes as (place, row); the place, e.g. "pairs.jsonl:217", is what errors and dropped.jsonl
name. JSON Lines, CSV and Parquet are streamed.
"""

import codecs
import csv
import gzip
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from pref.files import console, disk
from pref.files.console import UserError

Rows = Iterator[tuple[str, dict]]  # (place, row)

SEPARATORS = ",;\t|"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# Keys under which a JSON file holds its rows as splits.
SPLIT_KEYS = re.compile(
    r"(train|training|test|val|valid|validation|dev|eval)(_\w+)?", re.IGNORECASE
)


def file_ending(name: str) -> str:
    """'.csv' for 'x.csv', '.csv.gz' for 'x.csv.gz', '' for an ending that is not read here."""
    match = re.search(r"\.(jsonl|ndjson|json|parquet|csv|tsv)(\.gz)?$", name, re.IGNORECASE)
    return match.group().lower() if match else ""


def read_splits(path: Path) -> dict[str, Rows]:
    """{split: rows} of a file. Only a JSON object such as {"train": [...], "test": [...]} has more
    than the split "train". Raises UserError with the place of what cannot be read.
    """
    ending = file_ending(path.name)
    if not ending:
        endings = ".json, .jsonl, .parquet, .csv or .tsv"
        advice = OTHER_ENDINGS.get(path.suffix.lower(), "")
        raise UserError(f"{path}: not a {endings} file (each may be .gz){advice and '; '}{advice}")
    check_head(path)
    if ending.endswith(".gz"):
        return unpacked_splits(path)
    if ending in (".json", ".jsonl", ".ndjson"):
        return json_splits(path)
    reader = parquet_rows if ending == ".parquet" else csv_rows
    return {"train": reader(path)}


class Kind(NamedTuple):
    """A kind of file that is known by its first bytes."""

    name: str
    ending: str  # that such a file must have; one that is not read here: any
    remedy: str


MAGIC = {
    b"\x1f\x8b": Kind("a gzip file", ".gz", "add .gz to it"),
    b"PAR1": Kind("a Parquet file", ".parquet", "rename it to .parquet"),
    b"PK\3\4": Kind(
        "a ZIP archive or an Excel file", ".zip", "unpack it, or save the sheet as CSV (UTF-8)"
    ),
    b"\x28\xb5\x2f\xfd": Kind("a Zstandard file", ".zst", "unpack it with `unzstd`"),
}
OTHER_ENDINGS = {
    ".zip": "unpack it first",
    ".zst": "unpack it with `unzstd` first",
    ".xz": "unpack it with `unxz` first",
    ".bz2": "unpack it with `bunzip2` first",
    ".tar": "unpack it first, and give --dataset the folder",
    ".tgz": "unpack it first, and give --dataset the folder",
    ".xlsx": "save the sheet as CSV (UTF-8)",
    ".xls": "save the sheet as CSV (UTF-8)",
    ".ods": "save the sheet as CSV (UTF-8)",
    ".arrow": "give --dataset the folder that `save_to_disk` has written, or save it as Parquet",
    ".feather": "save it as Parquet",
    ".pkl": "pickles run code when they are read; save it as Parquet or JSON",
    ".txt": "if it holds one of these, rename it",
    ".jsonlines": "rename it to .jsonl",
}


def check_head(path: Path) -> None:
    """Raises UserError for what often lies in the place of a data file."""
    with open(path, "rb") as file:
        head = file.read(200)
    if head.startswith(LFS_POINTER):
        raise UserError(
            f"{path}: a Git LFS pointer, not the data itself; run `git lfs pull` where it was "
            "cloned, or download it again (`hf download`)"
        )
    if re.match(rb"\s*<(!doctype html|html)", head, re.IGNORECASE):
        raise UserError(f"{path}: a web page, not data; download the file itself (its raw form)")
    ending = file_ending(path.name)
    if kind := next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None):
        if kind.ending and not ending.endswith(kind.ending):
            raise UserError(f"{path}: {kind.name}, which the name does not say; {kind.remedy}")
        return
    if not ending.endswith((".parquet", ".gz")) and head.count(b"\0") > len(head) / 4:
        raise UserError(f"{path}: UTF-16 text; save it as UTF-8")
    if ending in (".csv", ".tsv") and re.match(rb'\s*\[?\s*\{\s*"', head):
        raise UserError(f"{path}: JSON, which the name does not say; rename it to .json or .jsonl")


def unpacked_splits(path: Path) -> dict[str, Rows]:
    """`read_splits` of a .gz file. Places and errors name it, not the unpacked copy."""
    folder = tempfile.TemporaryDirectory()
    plain = Path(folder.name) / path.name[:-3]
    try:
        with gzip.open(path, "rb") as packed, open(plain, "wb") as file:
            shutil.copyfileobj(packed, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a complete gzip file: {error}") from None

    def renamed(text: str) -> str:
        return text.replace(str(plain), str(path), 1)

    def rows(split: Rows) -> Rows:
        try:
            for place, row in split:
                yield renamed(place), row
        except UserError as error:
            raise UserError(renamed(str(error))) from None
        finally:
            folder.cleanup()  # also keeps the folder until the rows are read

    try:
        return {name: rows(split) for name, split in read_splits(plain).items()}
    except UserError as error:
        raise UserError(renamed(str(error))) from None


def not_utf8(path: Path, error: UnicodeDecodeError) -> UserError:
    return UserError(
        f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8 "
        "(`iconv -f latin1 -t utf8`, or the encoding that it has)"
    )


# ---- JSON ----------------------------------------------------------------------------------------


def json_splits(path: Path) -> dict[str, Rows]:
    """{split: rows} of JSON Lines, which are streamed, or of any other JSON that holds rows:

    a list of objects; objects one after the other over several lines; an object with a list of rows
    under one key (`data`), with splits, or with columns, as pandas writes them
    """
    if is_json_lines(path):
        return {"train": jsonl_rows(path)}
    values = list(json_values(path))
    if len(values) != 1:
        return {"train": iter(values)}
    ((place, value),) = values
    if isinstance(value, dict):
        return object_splits(path, place, value)
    if not isinstance(value, list):
        disk.as_object(value, place)
    return {"train": listed_rows(str(path), value)}


def is_json_lines(path: Path) -> bool:
    """Whether the first line is a JSON object and there is another line, or nothing at all.

    A first line that is neither JSON nor the start of a longer object is a broken JSON Lines file,
    whose reader names the line.
    """
    with open(path, "rb") as file:
        lines = (line.removeprefix(codecs.BOM_UTF8).strip() for line in file)
        lines = (line for line in lines if line)
        first, second = next(lines, b""), next(lines, b"")
    if not first or first.startswith(b"["):  # the list may be huge: it is parsed once, elsewhere
        return not first
    try:
        value = json.loads(first)
    except RecursionError:
        return True
    except ValueError as error:
        if not second:  # several objects on one line, or a broken one
            return "Extra data" not in str(error)
        # Pretty-printed: an object or a list goes on below.
        return not first.startswith(b"{") or complete_enough(first, second)
    return isinstance(value, dict) and bool(second)


def complete_enough(first: bytes, second: bytes) -> bool:
    """Whether two lines are rather objects of their own than parts of one."""
    return len(first) > 1 and first[:1] == second[:1] == b"{" and first[-1:] not in b"{[,"


def jsonl_rows(path: Path) -> Rows:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                place = f"{path}:{number}"
                yield place, disk.as_object(parse(line, place), place)


def parse(line: bytes, place: str):
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=as_dict)
    except UnicodeDecodeError as error:
        raise not_utf8(place, error) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not valid JSON: {error.msg} (column {error.colno})") from None
    except ValueError as error:  # as_dict
        raise UserError(f"{place}: {error}") from None
    except RecursionError:
        raise UserError(f"{place}: not readable: brackets within brackets without end") from None


def as_dict(pairs: list[tuple]) -> dict:
    """A JSON object. Of two equal keys Python would keep the second without a word."""
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"two values under the key '{twice}'")
    return result


def json_values(path: Path) -> Iterator[tuple[str, object]]:
    """(place, value) of the JSON values that follow one another in a file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
    decoder, end, line, seen = json.JSONDecoder(object_pairs_hook=as_dict), 0, 1, 0
    while True:
        # Some files have a comma between the objects.
        start = re.compile(r"[\s,]*" if end else r"\s*").match(text, end).end()
        if start == len(text):
            return
        line, seen = line + text.count("\n", seen, start), start
        place = f"{path}:{line}"
        try:
            value, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            where = f"{path}:{error.lineno}"
            raise UserError(
                f"{where}: not valid JSON: {error.msg} (column {error.colno})"
            ) from None
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
        except RecursionError:
            message = "not readable: brackets within brackets without end"
            raise UserError(f"{place}: {message}") from None
        if start or end < len(text.rstrip()):
            disk.as_object(value, place)
        yield place, value


def listed_rows(place: str, rows: list) -> Rows:
    for index, row in enumerate(rows):
        yield f"{place}[{index}]", disk.as_object(row, f"{place}[{index}]")


def object_splits(path: Path, place: str, value: dict) -> dict[str, Rows]:
    """{split: rows} of a file that is one JSON object."""
    lists = {key: item for key, item in value.items() if is_rows(item)}
    if lists and not any(has_role(item) for items in lists.values() for item in items):
        if len(lists) > 1 or SPLIT_KEYS.fullmatch(next(iter(lists))):
            return {key: listed_rows(f"{path}:{key}", rows) for key, rows in lists.items()}
        ((key, rows),) = lists.items()  # "data", beside a version
        return {"train": listed_rows(f"{path}:{key}", rows)}
    inner = [item for item in value.values() if isinstance(item, dict)]
    if len(inner) == 1 and any(map(is_rows, inner[0].values())) and not has_messages(inner[0]):
        return object_splits(path, place, inner[0])  # {"data": {"train": [...]}}
    if isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):
        rows = [dict(zip(value["columns"], row)) for row in value["data"]]  # pandas, "split"
        return {"train": listed_rows(f"{path}:data", rows)}
    return {"train": column_rows(path, value) or iter([(place, value)])}


def is_rows(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def has_messages(item: dict) -> bool:
    """Whether an object has a list of messages, so that it is part of a row."""
    return any(is_rows(value) and any(map(has_role, value)) for value in item.values())


def has_role(item: dict) -> bool:
    """Whether an object is a message rather than a row."""
    return "role" in item or "from" in item


def column_rows(path: Path, value: dict) -> Rows | None:
    """Rows of {column: {index: value}} or {column: [values]}, as pandas writes tables; of
    {index: row}; None for any other object.
    """
    items = list(value.values())
    if items and all(isinstance(item, dict) and item for item in items):
        if all(key.isdigit() for key in value):
            return ((f"{path}[{key}]", row) for key, row in value.items())
        keys = list(items[0])
        if all(list(item) == keys for item in items) and all(key.isdigit() for key in keys):
            rows = ({name: column[key] for name, column in value.items()} for key in keys)
            return ((f"{path}[{key}]", row) for key, row in zip(keys, rows))
    lists = items and all(isinstance(item, list) and len(item) == len(items[0]) for item in items)
    if lists and not any(is_rows(item) for item in items):
        rows = (dict(zip(value, cells)) for cells in zip(*items))
        return ((f"{path}[{index}]", row) for index, row in enumerate(rows))
    return None


# ---- CSV and TSV ---------------------------------------------------------------------------------


def csv_rows(path: Path) -> Rows:
    csv.field_size_limit(2**31 - 1)  # the default refuses fields above 128 KiB
    last_line = 0  # on which the row before ends
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            start = find_start(file)
            reader = csv.DictReader(file, strict=True, delimiter=start.separator)
            if reader.fieldnames:  # asking for the names reads the header
                reader.fieldnames = name_nameless(reader.fieldnames)
                check_header(path, reader.fieldnames)
                last_line = start.lines + reader.line_num
            for row in reader:
                place = f"{path}:{csv_line(start.lines + reader.line_num, row)}"
                if None in row:
                    raise UserError(f"{place}: more fields than the header has columns")
                last_line = start.lines + reader.line_num
                yield place, row
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
    except csv.Error as error:
        raise UserError(
            f"{path}:{last_line + 1}: the row that starts here is not valid CSV: {error}"
        ) from None


class Start(NamedTuple):
    """Where the header of a CSV file begins, and what separates its columns."""

    separator: str
    lines: int  # before the header


def find_start(file: TextIO) -> Start:
    """The character that separates most columns in the header, at which `file` is left.

    Spreadsheets write semicolons where the comma is the decimal point, and Excel knows them by a
    line `sep=;` before the header.
    """
    header = file.readline()
    if told := re.fullmatch(r'"?sep=(.)"?\s*', header, re.IGNORECASE):
        return Start(told[1], lines=1)
    file.seek(0)
    counts = {char: len(next(csv.reader([header], delimiter=char), [])) for char in SEPARATORS}
    return Start(max(counts, key=counts.get), lines=0)


def name_nameless(names: list[str]) -> list[str]:
    """Columns without a name, which spreadsheets leave at the right, told apart by their number."""
    if names.count("") < 2:
        return names
    return [name or f"(column {number})" for number, name in enumerate(names, 1)]


def check_header(path: Path, names: list[str]) -> None:
    """Raises UserError for two columns of one name, of which the second would win."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path}:1: two columns named '{twice[0]}'; rename or remove one")


def csv_line(last_line: int, row: dict) -> int:
    """The line that a CSV row starts on, from the line that it ends on: quoted fields may contain
    line breaks.
    """
    return last_line - sum(value.count("\n") for value in row.values() if isinstance(value, str))


# ---- Parquet -------------------------------------------------------------------------------------


def parquet_rows(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    index = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        check_header(path, file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                yield f"{path}[{index}]", row
                index += 1
    except (pyarrow.ArrowException, OSError) as error:
        reason = console.first_line(error)
        raise UserError(f"{path}: not a readable parquet file: {reason}") from None
    except (OverflowError, ValueError) as error:  # a date after the year 9999, for instance
        reason = console.first_line(error)
        raise UserError(
            f"{path}[{index}] or below: a value that cannot be read ({reason}); write the file "
            "again without that column"
        ) from None
