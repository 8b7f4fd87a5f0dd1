"""The two sides of preference data: pairs to train on and pairs to validate with, without a common
prompt.
"""

import hashlib
import re
from collections import Counter
from typing import NamedTuple

from pref.files.audit import Audit, PlacedPair, drop_record
from pref.files.console import UserError
from pref.files.row_pairs import prompt_key

# In messages, for whoever has to tell these from other mistakes: there is nothing to train on.
NO_PAIRS, ONE_PROMPT = "no pairs left", "all pairs left have the same prompt"
# What to do if every row is dropped for a reason that this pattern is found in.
REMEDIES = {
    "begins with the assistant": (
        "Many chat templates refuse such conversations, so that no two models would be trained on "
        "the same. Put a user message before the greeting, or remove it."
    ),
    "prompt column": (
        "If the conversations are right, leave that column out by its name: --ignore_columns prompt"
    ),
    "only text can be trained": (
        "If the text makes sense without it, leave such a column out with --ignore_columns."
    ),
    "not a Human/Assistant transcript": (
        "Without a prompt column, chosen and rejected must be whole conversations. If a column has "
        "the prompts: --columns prompt=NAME"
    ),
    "prompt also in validation": (
        "The two splits have the same prompts. To divide one of them by prompt: --split train=NAME"
    ),
    "different prompts": "A pair is two responses to one prompt.",
    "^tie": "If scores beside the responses say so and mean something else: --ignore_columns NAME",
    "a system message after": (
        "Chat templates take one system message, at the beginning. Join several into one, or make "
        "a later one part of the user's next message."
    ),
    "prompt ends with the assistant": (
        "Put what the assistant has begun at the start of both responses instead."
    ),
    "unknown role": "Rename the role to user, assistant, system or tool.",
}


class Sides(NamedTuple):
    train: list[PlacedPair]
    val: list[PlacedPair]
    rule: str  # how they were split, for the manifest


class Draw(NamedTuple):
    """How the prompts of a source without a validation split are divided."""

    val_fraction: float
    seed: int


def make_sides(
    source: str,
    splits: dict[str, Audit],
    dropped: list[dict],
    draw: Draw,
    remedies: dict[str, str] = REMEDIES,
) -> Sides:
    """The source's own two splits if it has them, otherwise its one split divided by prompt.

    dropped: gets a record of each pair whose prompt is on both sides. Raises UserError, with one of
    `remedies`, if a side is empty.
    """
    if len(splits) == 1:
        ((name, split),) = splits.items()
        check_not_empty(source, dropped, remedies, **{name: split.pairs})
        source = f"{source} (dropped: {reasons_text(dropped)})"
        train, val = split_by_prompt(split.pairs, draw, source)
        rule = f"by prompt: val_fraction {draw.val_fraction}, seed {draw.seed}"
        return Sides(train, val, rule)
    train_name, val_name = splits
    val = splits[val_name].pairs
    train = drop_seen_prompts(train_name, splits[train_name].pairs, val, dropped)
    check_not_empty(source, dropped, remedies, train=train, validation=val)
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
    pairs: list[PlacedPair], draw: Draw, source: str
) -> tuple[list[PlacedPair], list[PlacedPair]]:
    """(train, validation): a share `draw.val_fraction` of the *prompts*, with all their pairs, is
    held out for validation, at least one and never all.

    The draw depends on the prompts and the seed, not on the order of the rows. Raises UserError if
    there are fewer than two prompts.
    """
    keys = [prompt_key(item.pair["prompt"]) for item in pairs]
    # Sorting by a hash of seed and prompt is a shuffle that the order of the rows cannot influence.
    prompts = sorted(
        set(keys), key=lambda key: hashlib.sha256(f"{draw.seed} {key}".encode()).digest()
    )
    if len(prompts) < 2:
        raise UserError(
            f"{source}: {ONE_PROMPT}; two are needed, one to train on and one for validation"
        )
    val_count = min(max(1, round(draw.val_fraction * len(prompts))), len(prompts) - 1)
    val_keys = set(prompts[:val_count])
    train = [item for key, item in zip(keys, pairs) if key not in val_keys]
    val = [item for key, item in zip(keys, pairs) if key in val_keys]
    return train, val


def check_not_empty(
    source: str, dropped: list[dict], remedies: dict[str, str], **sides: list
) -> None:
    """Raises UserError, with the reasons counted and a remedy for the most frequent one, if one of
    `sides` has no pairs.
    """
    empty = [name for name, pairs in sides.items() if not pairs]
    if not empty:
        return
    text = f"{source}: {NO_PAIRS} for {empty[0]}; dropped: {reasons_text(dropped)}"
    if dropped:
        most = next(iter(count_reasons(dropped)))
        example = next(record for record in dropped if record["reason"] == most)
        text += f" (first: {example['place']}: {example['what'][:100]})"
        text += next(
            (f"\n{fix}" for pattern, fix in remedies.items() if re.search(pattern, most)), ""
        )
    raise UserError(f"{text}\nNothing was written.")


def reasons_text(dropped: list[dict]) -> str:
    """'2 tie, 1 empty chosen'."""
    reasons = count_reasons(dropped).items()
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons) or "nothing"


def count_reasons(dropped: list[dict]) -> dict[str, int]:
    """Rows dropped for each reason, most frequent first."""
    return dict(Counter(record["reason"] for record in dropped).most_common())
