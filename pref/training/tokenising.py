"""The pairs of a run as token ids: checked, counted, and what is left out said."""

import argparse
from functools import partial
from typing import NamedTuple

from transformers import AutoConfig

from pref.files.console import UserError
from pref.model import template, token_check
from pref.model.chat import TokenPair
from pref.model.ranks import Ranks
from pref.model.token_check import Checked
from pref.training import arguments


class Tokenised(NamedTuple):
    """The pairs of a run, by split, and what args.json records of how they were tokenised."""

    rows: dict[str, list[dict]]  # those of `pairs`
    pairs: dict[str, list[TokenPair]]
    counts: dict


def tokenise(
    args: argparse.Namespace, tokenizer, rows: dict[str, list[dict]], ranks: Ranks
) -> Tokenised:
    """Token ids by split, of the pairs that can be trained on. What is left out or cut is printed
    and counted: neither is ever silent.

    Raises UserError if more than --max_bad_pairs must be left out, all of a split, or if the model
    has no embedding for a token.
    """
    check_end(args, tokenizer, ranks)

    # 1) Token ids, checked pair by pair.
    bar = partial(ranks.progress, what="tokenising", unit="pairs")
    checked = {
        split: token_check.tokenize_checked(
            tokenizer, r, args.max_length, args.truncation, args.append_eos, bar
        )
        for split, r in rows.items()
    }
    dropped = report_bad_pairs(args, tokenizer, checked, ranks)
    rows = {split: of_split.rows for split, of_split in checked.items()}
    pairs = {split: of_split.pairs for split, of_split in checked.items()}
    check_vocabulary(args.model, tokenizer, pairs)
    if dropped:
        left = {split: len(of_split) for split, of_split in pairs.items()}
        arguments.check_micro_batches(args, left, ranks.world, main=False)

    # 2) What was cut.
    both = [pair for split in pairs.values() for pair in split]
    counts = {
        "truncated_prompts": sum(p.cut_prompt > 0 for p in both),
        "truncated_responses": sum(p.cut_response > 0 for p in both),
        "merged_boundaries": sum(p.merged > 0 for p in both),
        "dropped_pairs": dropped,
    }
    ranks.print(
        f"{len(pairs['train'])} train and {len(pairs['val'])} val pairs, "
        f"{sum(p.tokens for p in both) / len(both):.0f} tokens each"
        + cut_text(counts, args.max_length)
    )
    return Tokenised(rows, pairs, counts)


def check_end(args: argparse.Namespace, tokenizer, ranks: Ranks) -> None:
    """Warn if nothing will end the responses. Raises UserError for an --append_eos that cannot be,
    or that would end them twice.
    """
    end = template.form_of(tokenizer).end
    if args.append_eos and end is not None:
        token = tokenizer.convert_ids_to_tokens(end)
        raise UserError(
            f"--append_eos: the chat template already ends answers with {token}; leave it out"
        )
    if end is None and not args.append_eos:
        ranks.print(
            "warning: the chat template writes no end token after an answer, so that answers do "
            f"not learn to end; --append_eos adds {tokenizer.eos_token}"
        )


def cut_text(counts: dict, max_length: int) -> str:
    """What was cut, in words; nothing if nothing was."""
    texts = {
        "truncated_prompts": "prompts of {} pairs are cut",
        "truncated_responses": "responses of {} pairs are cut",
        "merged_boundaries": "in {} pairs the end of the prompt and the beginning of an answer are "
        "one token, which counts as the answer's",
    }
    parts = [text.format(counts[key]) for key, text in texts.items() if counts[key]]
    limit = f"; --max_length {max_length}" if any(counts[k] for k in list(texts)[:2]) else ""
    return "".join(f"; {part}" for part in parts) + limit


def report_bad_pairs(
    args: argparse.Namespace, tokenizer, checked: dict[str, Checked], ranks: Ranks
) -> dict[str, int]:
    """Print what was left out, a line for each reason, and return the counts by reason. Raises
    UserError, with the first example decoded, if it is more than --max_bad_pairs or all of a split.
    """
    bad = [pair for split in checked.values() for pair in split.bad]
    total = len(bad) + sum(len(split.pairs) for split in checked.values())
    counts = token_check.count_reasons(bad)
    lines = [
        f"{count} of {total} pairs left out: {reason}; {token_check.REMEDIES[reason]}"
        for reason, count in counts.items()
    ]
    empty = [split for split, of_split in checked.items() if not of_split.pairs]
    if len(bad) / total > args.max_bad_pairs or empty:
        raise UserError(
            f"{args.data}: {len(bad)} of {total} pairs cannot be trained on with the tokenizer and "
            f"chat template of {args.model}, "
            + (
                f"all of {empty[0]} among them"
                if empty
                else f"more than --max_bad_pairs {args.max_bad_pairs:g}; correct what the lines "
                "below say, or raise it to train without them"
            )
            + "\n".join(["", *lines, "the first: " + token_check.example_text(tokenizer, bad[0])])
        )
    for line in lines:
        ranks.print(line)
    if bad:
        ranks.print("the first: " + token_check.example_text(tokenizer, bad[0]))
    if forgotten := sum(split.forgotten for split in checked.values()):
        ranks.print(
            f"in {forgotten} pairs the chat template leaves thoughts of earlier answers out, in "
            "training as in answering"
        )
    return counts


def check_vocabulary(model: str, tokenizer, pairs: dict[str, list[TokenPair]]) -> None:
    """Raise UserError if the model has no embedding for a token of the pairs. Padding beyond the
    embedding becomes another token: it is masked wherever it is used.
    """
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return  # refused where the model is loaded
    size = getattr(config.get_text_config(), "vocab_size", None)
    if size is None:
        return
    highest = max(
        max(map(max, (pair.prompt, pair.chosen, pair.rejected)))
        for split in pairs.values()
        for pair in split
    )
    if highest >= size:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise UserError(
            f"--model {model}: its tokenizer has tokens that the model has no embedding for "
            f"({token!r} is number {highest}, the embedding has {size:,} rows); give the model "
            "that this tokenizer belongs to"
        )
    if tokenizer.pad_token_id >= size:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pairs["train"][0].prompt[0])
