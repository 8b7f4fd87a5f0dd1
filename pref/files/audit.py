"""From rows to pairs, with a reason for each row that is left out and a line for each column.

    rows --read_split--> Audit: pairs, and what was not used --check_audit--> UserError, or nothing

A row becomes a pair, or several (`--rule all`), or a record in `dropped`. What looks wrong in the
file as a whole rather than in a row (templates applied twice, labels that may mean the opposite,
columns of content that nothing reads) is an error, raised before anything is written.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from pref.files import columns, console, control_tokens, disk, layouts, messages, rankings
from pref.files.columns import Choices
from pref.files.console import UserError
from pref.files.messages import Drop
from pref.files.pairs import check_pair, response_key
from pref.files.rankings import Selection
from pref.files.row_pairs import NO_SELECTION, is_label, prompt_key, to_pairs
from pref.files.sources import is_held_out
from pref.files.tables import Rows

CARRIED = "carries a chat template already"
INVERTED = "the scores say that the rejected response is better"
CONTRADICTED = "another row has the same two responses the other way round"
ECHOED = "both responses begin with the prompt"
MAX_CARRIED = 0.01  # share of rows; above it, a file is refused
MAX_INVERTED = 0.2  # share of the rows that have scores
MIN_ECHOED = 0.5  # share of pairs, from which it is how the file was written
LONG_PROMPT = 40  # characters; a response does not begin with so many by chance
EARLY_CHECK = 1000  # rows, after which a file that will be refused is not read to its end
KNOWN_COLUMNS = layouts.known_columns()


class Options(NamedTuple):
    """What the user says about the data."""

    choices: Choices = Choices({}, ())
    selection: Selection = NO_SELECTION
    strip_template: bool = False
    keep_echoes: bool = False  # responses that begin with the prompt are what a model has said


class PlacedPair(NamedTuple):
    place: str  # of the row that the pair comes from, e.g. "pairs.jsonl:217"
    pair: dict


class ReadRow(NamedTuple):
    """A row under the names of its layout."""

    row: dict
    layout: str
    used: set[str]  # columns


@dataclass
class Audit:
    """What the rows of one split have come to."""

    split: str
    source: str  # as the user names it
    label: str  # the source of pairs whose row names none
    pairs: list[PlacedPair] = field(default_factory=list)
    dropped: list[dict] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    rows: int = 0
    layouts: Counter = field(default_factory=Counter)  # rows by layout
    prompt_column: str = ""  # of the first row
    unused: dict[str, columns.Unused] = field(default_factory=dict)
    labels: Counter = field(default_factory=Counter)  # numbers that say which response is better
    scored: int = 0  # rows whose two responses have scores
    notes: dict[str, list[str]] = field(default_factory=dict)  # what happened: places

    @property
    def layout(self) -> str:
        """The layout of the first row."""
        return next(iter(self.layouts), "")

    def note(self, what: str, place: str) -> None:
        places = self.notes.setdefault(what, [])
        if places[-1:] != [place]:
            places.append(place)

    def drop(self, place: str, reason: str, row) -> None:
        self.dropped.append(drop_record(self.split, place, reason, row))

    def count(self, reason: str) -> tuple[int, str]:
        """(rows dropped for a reason that begins so, place of the first)."""
        places = [d["place"] for d in self.dropped if d["reason"].startswith(reason)]
        return len(places), places[0] if places else ""


def read_split(split: str, rows: Rows, source: str, label: str, options: Options) -> Audit:
    """The usable pairs of `rows`, and a record of every other row and of every unused column.

    source: as the user names it, for errors. label: the `source` of pairs whose row names none.
    Each row is read by the layout that its own columns have. Raises UserError if there are no rows,
    if the first one has no known layout, or if the file must not be used as it is (`check_audit`).
    """
    audit = Audit(split, source, label)
    for place, raw in console.progress(rows, f"reading {split}", "rows"):
        audit.rows += 1
        try:
            add_row(audit, place, raw, options)
        except Drop as drop:
            audit.drop(place, str(drop), raw)
        except UserError as error:
            raise UserError(f"{place}: {error}".replace(f"{place}: {place}", place)) from None
        if audit.rows == EARLY_CHECK:
            check_columns(audit)
            check_templates(audit, options)
    if not audit.rows:
        raise UserError(f"{source}: no rows in split '{split}'")
    check_audit(audit, options)
    if not options.keep_echoes:
        settle_echoes(audit)
    drop_contradictions(audit)
    return audit


def add_row(audit: Audit, place: str, raw: dict, options: Options) -> None:
    """Add the pairs of a row to `audit`. Raises Drop if it has none."""
    # 1) Under the names that layouts use.
    row, left_out = columns.apply_choices(raw, options.choices, KNOWN_COLUMNS)
    if audit.rows == 1:
        check_renames(raw, options.choices)
    read = find_layout(audit, row, place)
    audit.prompt_column = audit.prompt_column or layouts.first_of(read.used, layouts.PROMPT)
    audit.layouts[read.layout] += 1
    note_label(audit, read)

    # 2) Texts that hold messages become messages.
    readable, mention = readable_row(audit, read, place, options.strip_template)

    # 3) Pairs.
    try:
        pairs = to_pairs(readable, read.layout, audit.label, options.selection)
    except Drop as drop:
        if read.layout == audit.layout:
            raise
        raise Drop(f"{drop} (this row has layout '{read.layout}')") from None
    new = {pair["id"]: pair for pair in pairs if pair["id"] not in audit.ids}
    if read.layout != "scored":
        check_scores(audit, readable, pairs[0], options.selection)
    if not new:
        raise Drop("exact duplicate")
    audit.ids.update(new)
    audit.pairs += [PlacedPair(place, pair) for pair in new.values()]

    # 4) What of the row is in none of them.
    if any("\n\nHuman:" in pairs[0][side][0]["content"] for side in ("chosen", "rejected")):
        audit.note("rows in which a response goes on with a turn of the user's, kept", place)
    if mention:
        audit.note("rows that speak of a control token of chat templates, kept", place)
    note_unused(audit, place, readable, read, left_out, pairs[0], options.choices.ignored)


# ---- one row -------------------------------------------------------------------------------------


def find_layout(audit: Audit, row: dict, place: str) -> ReadRow:
    """The row with its layout. Raises UserError if the first row has no known layout, Drop if a
    later one has none.
    """
    # Tables fill the columns that only other rows have with None.
    filled = [column for column, value in row.items() if value is not None]
    name = layouts.find_layout(filled) or layouts.find_layout(row)
    if not name and not audit.layout:
        raise layouts.unknown_layout(list(row), place)
    if not name:
        raise Drop(f"no column '{missing_column(row, audit.layout)}'")
    used = layouts.used_columns(row, name)
    # One of these names where a row comes from, unless it holds something else, such as a text.
    labels = [column for column in ("dataset", "source") if is_label(row.get(column))]
    used = used - {"dataset", "source"} | set(labels[:1])
    return ReadRow(row, name, used)


def missing_column(row: dict, layout: str) -> str:
    """The first column of a layout that a row lacks."""
    groups = layouts.LAYOUTS[layout].columns.split()
    return next(g for g in groups if not layouts.first_of(row, g)).split("|")[0]


def check_renames(raw: dict, choices: Choices) -> None:
    """Raises UserError if --columns names a column that the first row lacks, or a name that no
    layout uses.
    """
    for target, name in choices.renames.items():
        if target not in KNOWN_COLUMNS:
            raise UserError(
                f"--columns {target}={name}: no layout has a column '{target}'; they have "
                f"{', '.join(sorted(KNOWN_COLUMNS))}"
            )
        if name not in raw and columns.take(raw, name) is None:
            raise UserError(f"--columns {target}={name}: no '{name}' among {', '.join(raw)}")


def readable_row(
    audit: Audit, read: ReadRow, place: str, strip_template: bool
) -> tuple[dict, str | None]:
    """(the row with serialised messages parsed, a control token that it only speaks of).

    Raises Drop if a text carries a chat template and `strip_template` does not ask to take it off.
    """
    row, mention = dict(read.row), None
    lists = layouts.LAYOUTS[read.layout].lists.split()
    for name in [c for c in row if c in read.used and c not in ("tools", "dataset", "source")]:
        row[name] = messages.unserialise(row[name], is_list=name in lists)
        for text in control_tokens.texts_of(row[name]):
            if token := control_tokens.find_carried(text):
                if not strip_template:
                    raise Drop(f"{CARRIED} ({token})")
                row[name] = control_tokens.strip_row(row[name])
                audit.note("rows with a chat template, which was taken off", place)
                break
            mention = mention or control_tokens.find_mention(text)
    return row, mention


def drop_record(split: str, place: str, reason: str, row) -> dict:
    """A line of dropped.jsonl. `what` is the start of the row, to recognise it by."""
    text = json.dumps(row, ensure_ascii=False, default=str)[:200]
    what = text.encode(errors="replace").decode()
    return {"split": split, "place": place, "reason": reason, "what": what}


# ---- what is counted on the way ------------------------------------------------------------------


def note_label(audit: Audit, read: ReadRow) -> None:
    """Count the numbers by which a layout says which response is better."""
    if read.layout in ("choice", "arena"):
        label = layouts.first_of(read.row, layouts.LAYOUTS[read.layout].columns.split()[-1])
    elif read.layout == "alpaca_eval":
        label = "preference"
    else:
        return
    number = rankings.as_number(read.row[label])
    if number is not None:
        audit.labels[number] += 1


def check_scores(audit: Audit, row: dict, pair: dict, selection: Selection) -> None:
    """Raises Drop if the scores beside the two responses do not say that the chosen is better."""
    texts = (pair[key][0]["content"] for key in ("chosen", "rejected"))
    scores = rankings.pair_scores(row, *texts)
    if str(row.get("status", "")).strip().lower() == "tie":  # distilabel
        raise Drop("tie")
    if not scores:
        return
    audit.scored += 1
    margin = scores.chosen - scores.rejected
    if margin < 0:
        raise Drop(f"{INVERTED} ({', '.join(dict.fromkeys(scores.columns))})")
    if margin == 0 or margin < selection.min_margin:
        raise Drop(rankings.tie_reason(selection.min_margin))


def note_unused(
    audit: Audit,
    place: str,
    row: dict,
    read: ReadRow,
    left_out: dict[str, str],
    pair: dict,
    ignored: tuple[str, ...],
) -> None:
    """Count the columns that nothing of the row's pairs was made of."""
    for name, why in left_out.items():
        columns.count_unused(audit.unused, name, why, place)
    texts = (pair[key][0]["content"] for key in ("chosen", "rejected"))
    scores = rankings.pair_scores(row, *texts)
    used = read.used | set(scores.columns if scores else ())
    for name, value in columns.unused_values(row, used):
        if name.lower() in ("split", "subset", "partition") and is_held_out(str(value)):
            audit.note(f"rows that the column {name} calls held out, used like all others", place)
        if name in ignored:
            why = columns.ASKED
        elif read.layout == "scored" and "." in name:
            why = columns.METADATA
        else:
            why = columns.judge_value(name, value, pair)
        columns.count_unused(audit.unused, name, why, place, value)


# ---- the file as a whole -------------------------------------------------------------------------


def check_audit(audit: Audit, options: Options) -> None:
    """Raises UserError if the split must not be used as it is."""
    check_templates(audit, options)
    check_columns(audit)
    count, place = audit.count(INVERTED)
    if count:
        audit.notes[f"WARNING: rows dropped, because {INVERTED}"] = [place] * count
    if count > MAX_INVERTED * audit.scored:
        reason = next(d["reason"] for d in audit.dropped if d["place"] == place)
        names = reason.partition("(")[2].rstrip(")").replace(", ", ",")
        raise UserError(
            f"{audit.source}: in {count:,} of {audit.scored:,} rows with scores {reason}, first: "
            f"{place}. If lower is better in this file: --ignore_columns {names}. "
            f"{swapped_remedy(audit.layout)}"
        )


def swapped_remedy(layout: str) -> str:
    """What to do if the scores are right, and the rejected response is the better one."""
    if layout not in ("choice", "arena", "alpaca_eval", "safe_rlhf", "helpsteer"):
        return (
            "If the responses are swapped: the same and --columns chosen=rejected,rejected=chosen"
        )
    names = [group.split("|")[0] for group in layouts.LAYOUTS[layout].columns.split()]
    first, second, label = names[-3:]
    return (
        f"If `{label}` counts the other way round: the same, and name the two responses in "
        f"exchanged places, --columns {first}=SECOND,{second}=FIRST"
    )


def check_templates(audit: Audit, options: Options) -> None:
    """Raises UserError if more than single rows carry a chat template."""
    count, place = audit.count(CARRIED)
    if count > MAX_CARRIED * audit.rows and not options.strip_template:
        reason = next(d["reason"] for d in audit.dropped if d["place"] == place)
        raise UserError(
            f"{audit.source}: {count:,} of {audit.rows:,} rows: the text {reason}, first: {place}. "
            "The model's own template would be applied on top of it. Give --strip_template to turn "
            "such texts into messages, or remove the control tokens"
        )


def check_columns(audit: Audit) -> None:
    """Raises UserError if columns of content are in no pair."""
    lost = {name: item for name, item in audit.unused.items() if item.why == columns.CONTENT}
    if lost:
        listed = "\n".join(
            f"  {name}: {columns.rows_text(item.rows)}, first {item.place}: {item.example}"
            for name, item in sorted(lost.items())
        )
        raise UserError(
            f"{audit.source}: layout '{audit.layout}' does not use columns that look like content:"
            f"\n{listed}\n{columns.remedy(lost, audit.prompt_column)}"
        )


def check_labels(audits: list[Audit]) -> None:
    """Raises UserError if numbers say which response is better and may mean the opposite: if in no
    split there is one that only the documented meaning explains, or if there are others, such as
    0.9 or -1, which belong to another meaning.
    """
    labels = sum((audit.labels for audit in audits), Counter())
    if audits[0].layout == "alpaca_eval":
        ambiguous = labels and max(labels) <= 1
        meaning, pair = "1 = output_1, 2 = output_2", ("output_1", "output_2")
    else:
        ambiguous = set(labels) == {1.0} or bool(set(labels) - {0.0, 1.0})
        meaning, pair = "0 = a, 1 = b", ("completion_a", "completion_b")
    if ambiguous:
        listed = " or ".join(f"{value:g}" for value in sorted(labels)[:4])
        raise UserError(
            f"{audits[0].source}: the label is {listed} in all {sum(labels.values()):,} rows that "
            f"have a number. It is read as {meaning}, and this file may count otherwise. Write the "
            f"labels as a and b, or say which is better: --columns chosen={pair[0]},rejected="
            f"{pair[1]}, or the other way round"
        )


def settle_echoes(audit: Audit) -> None:
    """Cut the prompt off the responses if the file repeats it there, as completions of a base model
    do. Where single pairs do, they are dropped, unless a short prompt may be repeated by chance.
    """
    echoed = [echo_length(item.pair) for item in audit.pairs]
    is_habit = sum(map(bool, echoed)) >= MIN_ECHOED * len(audit.pairs)
    pairs, audit.pairs = audit.pairs, []
    for length, item in zip(echoed, pairs):
        if length and is_habit:
            pair, problem = without_echo(item.pair, length)
            audit.note("rows whose responses repeat the prompt, where it was cut off", item.place)
            if problem:
                audit.drop(item.place, problem, item.pair)
                continue
            item = PlacedPair(item.place, pair)
        elif length > LONG_PROMPT:
            audit.drop(item.place, ECHOED, item.pair)
            continue
        audit.pairs.append(item)


def echo_length(pair: dict) -> int:
    """Characters of the prompt's last message that both responses begin with; 0 if they do not."""
    prompt = pair["prompt"][-1]["content"].strip()
    texts = [pair[key][0]["content"].lstrip() for key in ("chosen", "rejected")]
    if not prompt or not all(text.startswith(prompt) for text in texts):
        return 0
    ends = [text[len(prompt) : len(prompt) + 1] for text in texts]
    # "Hello" is not repeated in "Hello!".
    return len(prompt) if all(end.isspace() or not prompt[-1].isalnum() for end in ends) else 0


def without_echo(pair: dict, length: int) -> tuple[dict, str | None]:
    """(the pair without the first `length` characters of its responses, why it is unusable)."""
    pair = dict(pair)
    for key in ("chosen", "rejected"):
        message = pair[key][0]
        pair[key] = [{**message, "content": message["content"].lstrip()[length:].lstrip()}]
    content = {k: pair[k] for k in ("prompt", "chosen", "rejected", "tools") if k in pair}
    return {**pair, "id": disk.sha256_json(content)[:16]}, check_pair(pair)


def drop_contradictions(audit: Audit) -> None:
    """Drop pairs whose two responses another pair has the other way round: neither is better."""
    prompts = [prompt_key(item.pair["prompt"]) for item in audit.pairs]
    counts = Counter(prompts)
    keys = [
        (prompt, *answer_keys(item.pair)) if counts[prompt] > 1 else (prompt, "", "only")
        for prompt, item in zip(prompts, audit.pairs)
    ]
    directions = set(keys)
    pairs, audit.pairs = audit.pairs, []
    for (prompt, better, worse), item in zip(keys, pairs):
        if (prompt, worse, better) in directions:
            audit.drop(item.place, CONTRADICTED, item.pair["chosen"])
        else:
            audit.pairs.append(item)


def answer_keys(pair: dict) -> tuple[str, str]:
    """Hashes of the chosen and the rejected response, as a reader sees them."""
    chosen, rejected = (list(response_key(pair[key][0])) for key in ("chosen", "rejected"))
    return disk.sha256_json(chosen), disk.sha256_json(rejected)
