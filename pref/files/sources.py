"""Rows of preference data from a file, a folder or the hub, each with the place it came from.

`open_source` finds out which of the three a name means and returns the rows of one or two splits.
Every row comes as (place, row); the place, e.g. "pairs.jsonl:217" or "train[5]", is what errors and
dropped.jsonl name. Rows are streamed where the format allows it (tables.py reads the files).
"""

import http.client
import os
import re
import ssl
import urllib.request
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from pref.files import console
from pref.files.console import UserError
from pref.files.tables import Rows, file_ending, read_splits

PINNED_REVISIONS = {"argilla/dpo-mix-7k": "f8869fc91bde5c71a104667292addcbbfd15985d"}
# The first of these that a source has. UltraFeedback's own preference splits are *_prefs; it also
# has train_sft and train_gen.
TRAIN_SPLITS = ("train_prefs", "train")
VAL_NAMES = ("validation", "val", "valid", "dev", "test", "eval")
VAL_SPLITS = ("test_prefs", *(f"{name}_prefs" for name in VAL_NAMES if name != "test"), *VAL_NAMES)
# A split of another name that is rather held out than trained on.
HELD_OUT = re.compile(r"(^|_)(test|val|valid|validation|dev|eval|heldout|held_out)(_|\d|$)")


class Source(NamedTuple):
    splits: dict[str, Rows]  # the training split, then the validation split if there is one
    revision: str | None  # hub commit
    unused: list[str]  # names of the splits and files that are not read


class SplitNames(NamedTuple):
    """--split: names of the source's splits; several are read one after the other."""

    train: list[str]
    val: list[str]


def open_source(
    name: str,
    revision: str | None = None,
    config: str | None = None,
    wanted: SplitNames | None = None,
) -> Source:
    """The rows of the file, folder or hub dataset `name`.

    revision, config: of a hub dataset (config: also of a folder). wanted: its splits to read,
    where their names do not say it. Raises UserError if there is no such source or it has no
    training split.
    """
    path, commit, unused = Path(name).expanduser(), None, []
    if path.is_file():
        parts = read_splits(path)
    elif path.is_dir():
        parts, unused = open_folder(path, config)
    elif is_hub_id(name):
        loaded, commit = open_hub(name, revision or PINNED_REVISIONS.get(name), config)
        parts = {split: dataset_rows(name, split, rows) for split, rows in loaded.items()}
    else:
        raise UserError(f"{name}: no such file or folder, and not a hub id (owner/name)")
    chosen = named_splits(list(parts), wanted, name) if wanted else pick_splits(list(parts), name)
    names = [split for group in chosen for split in group]
    unused += [f"split '{split}'" for split in parts if split not in names]
    return Source(
        {"+".join(group): chain.from_iterable(parts[split] for split in group) for group in chosen},
        commit,
        unused,
    )


def is_hub_id(name: str) -> bool:
    """Whether `name` can be a hub id rather than the path of a missing file."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)) and not file_ending(name)


def pick_splits(names: list[str], source: str) -> list[list[str]]:
    """[[train]] or [[train], [validation]] from the names of a source's splits.

    A single split is the training split, whatever its name. Raises UserError if there are several
    and none is a training split, or if one of unusual name may be meant for validation.
    """
    if len(names) == 1:
        return [names]
    train = next((name for name in TRAIN_SPLITS if name in names), None)
    val = next((name for name in VAL_SPLITS if name in names), None)
    others = [name for name in names if name != train]
    if not train or (not val and any(is_held_out(name) for name in others)):
        train_like = [name for name in names if not is_held_out(name)] or names
        val_like = [name for name in names if is_held_out(name)]
        example = f"train={train or train_like[0]}" + (f",val={val_like[0]}" if val_like else "")
        problem = (
            f"no split named {' or '.join(TRAIN_SPLITS)}" if not train else "no validation split"
        )
        raise UserError(
            f"{source}: {problem} among {', '.join(names)}; say which to read, e.g. "
            f"--split {example} (several: train=A+B)"
        )
    return [[train], [val]] if val else [[train]]


def named_splits(names: list[str], wanted: SplitNames, source: str) -> list[list[str]]:
    """The splits asked for. Raises UserError if the source lacks one."""
    groups = [group for group in wanted if group]
    if len({*wanted.train, *wanted.val}) < len(wanted.train) + len(wanted.val):
        raise UserError("--split: a split is named twice")
    for name in chain.from_iterable(groups):
        if name not in names:
            raise UserError(f"--split: {source} has no split '{name}'; it has {', '.join(names)}")
    return groups


# ---- a folder or the hub, through `datasets` -----------------------------------------------------


def dataset_rows(source: str, split: str, dataset) -> Rows:
    """Rows of one split; the place is `split[index]`, with the index of `dataset[index]`."""
    try:
        for index, row in enumerate(dataset):
            yield f"{split}[{index}]", row
    except load_errors() as error:
        reason = console.first_line(error)
        raise UserError(f"{source}, split '{split}': cannot be read: {reason}") from None
    except ImportError as error:  # pictures need Pillow
        raise UserError(
            f"{source}, split '{split}': {console.first_line(error)}. A column of images or sound "
            "cannot be trained on; remove it from the source"
        ) from None


def open_folder(path: Path, config: str | None) -> tuple[dict[str, Rows], list[str]]:
    """({split: rows}, data files that belong to no split) of a folder.

    `datasets` says which file belongs to which split, by its name or by the folder's README; the
    files are read here, each by itself, so that two need not have the same columns. Nothing is
    copied to the cache, and no copy of an earlier state of the folder is read from it.
    """
    datasets = import_datasets()
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            loaded = datasets.load_from_disk(str(path))
            loaded = loaded if isinstance(loaded, dict) else {"train": loaded}
            return {name: dataset_rows(str(path), name, rows) for name, rows in loaded.items()}, []
        builder = datasets.load_dataset_builder(str(path.resolve()), config)
        files = {
            name: [path / os.path.relpath(file, path.resolve()) for file in found]
            for name, found in split_files(builder)
        }
        if all(file_ending(file.name) and file.is_file() for fs in files.values() for file in fs):
            unused = unread_files(path, files)
            files = apart(files)
            return {name: folder_rows(found) for name, found in files.items()}, unused
        loaded = datasets.load_dataset(str(path.resolve()), config, streaming=True)
    except load_errors() as error:
        raise UserError(f"{path}: `datasets` cannot read this folder: {reason_of(error)}") from None
    return {name: dataset_rows(str(path), name, rows) for name, rows in loaded.items()}, []


def split_files(builder) -> list[tuple[str, list[str]]]:
    """[(split, files)] as `datasets` resolves them."""
    return [(str(name), list(files)) for name, files in (builder.config.data_files or {}).items()]


def apart(files: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """Each file as a split of its own, if some of those that `datasets` reads as one are held out
    by their names (my_heldout.jsonl): then the user must say which is which.
    """
    if len(files) != 1:
        return files
    (found,) = files.values()
    names = {file.name.removesuffix(file_ending(file.name)): file for file in found}
    held_out = [name for name in names if is_held_out(name)]
    if not 0 < len(held_out) < len(found) or len(names) < len(found):
        return files
    return {name: [file] for name, file in names.items()}


def is_held_out(name: str) -> bool:
    return bool(HELD_OUT.search(re.sub(r"[^a-z0-9]+", "_", name.lower())))


def folder_rows(files: list[Path]) -> Rows:
    """The rows of the files of one split, one file after the other."""
    for file in files:
        splits = read_splits(file)
        if len(splits) > 1:
            raise UserError(f"{file}: holds several splits; give this file to --dataset by itself")
        yield from next(iter(splits.values()))


def unread_files(path: Path, files: dict[str, list[Path]]) -> list[str]:
    """Data files of a folder that belong to none of its splits."""
    read = {file for found in files.values() for file in found}
    found = (file for file in sorted(path.rglob("*")) if file_ending(file.name))
    hidden = ("dataset_infos.json", "dataset_dict.json", "state.json")
    return [
        f"file '{file.relative_to(path)}'"
        for file in found
        if file not in read and file.name not in hidden and not file.name.startswith(".")
    ]


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
        raise UserError(f"{name}: `datasets` cannot load it: {reason_of(error)}") from None
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


def reason_of(error: Exception) -> str:
    """The first line of an error; which configurations there are, if one must be chosen."""
    names = re.search(r"available configs: (\[.*?\])", str(error))
    if names:
        return f"it has the configurations {names[1]}; choose one with --config"
    return console.first_line(error)


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
