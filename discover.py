"""Search for a preference loss, and say whether what was found is better than DPO.

    python discover.py discovery/first                          on quickstart's model and pairs
    python discover.py discovery/mine --model M --data data/my_pairs --preset hour
    OPENAI_API_KEY=... python discover.py discovery/llm --proposer MODEL --max_usd 5
    python discover.py discovery/both --proposer MODEL evolve   two proposers, one archive

Look, before, during and after (nothing is started):

    python discover.py discovery/first --dry_run                rounds, runs, hours, dollars
    python discover.py discovery/first --status                 how far it is, the best so far
    python discover.py discovery/first --show p0031             a candidate: text, parents, scores
    python discover.py --check my_loss.py                       what the restricted form makes of it

Ask once, at the end, and then use it:

    python discover.py discovery/first --confirm 3              on pairs and seeds never seen before
    python train_pref.py --loss_file discovery/first/best.py:NAME ...
    JUDGE=MODEL bash sweep.sh discovery/first/final.grid --stages train,gen,judge,analyze

Reads   a chat model and data/<name>/train.jsonl, of which a fifth of the prompts are the search's
        validation pairs. val.jsonl is read by --confirm alone.
Writes  FOLDER/archive.jsonl (an event a line), proposals/, results/ (training runs), report/,
        best.py, final.grid, confirmation.json.

A candidate is a program in a restricted form. Text that a model wrote is translated and printed
again, never executed. Then, each step cheaper than the next: it is tested, compared in behaviour
with everything before it, tried on a proxy of training (10 ms on the real pairs), and the best are
trained, with more seeds the better they are. What the search reports has been selected on; whether
it holds is for --confirm to say: on unseen pairs, with new seeds, against a DPO tuned with as many
runs.

The same command continues a search that was stopped or killed, and ends with the same archive. A
search's settings cannot change; JOBS (training runs at a time on a CPU), GPUS_PER_RUN, --max_usd,
--max_hours and how models are called can.
"""

import pref.files.interrupts  # noqa: F401  isort: skip

import argparse
import time
from pathlib import Path

from pref.discovery import (
    confirmation,
    dry_run,
    proposer_arguments,
    rungs,
    search,
    settings,
    start,
    status,
)
from pref.discovery.form import check_file
from pref.discovery.search import OutOfTime, Search
from pref.discovery.settings import Settings
from pref.files import console, disk
from pref.files.console import UserError
from pref.sweeping.scheduler import Stop
from pref.training.signals import Stopped

# ---- arguments ----------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s FOLDER [--option VALUE ...]  (--help explains all of them)",
        description=__doc__,
        formatter_class=console.HelpFormatter,
        allow_abbrev=False,
        epilog="Exit code: 0 done, 1 something is missing and named, 2 something to correct, 75 or "
        "130 stopped by a signal, with everything saved.",
    )
    parser.add_argument("folder", nargs="?", type=Path, help="of the search, new or begun")
    add_search_arguments(parser.add_argument_group("what is searched on what").add_argument)
    add_size_arguments(parser.add_argument_group("how much").add_argument)
    proposer_arguments.add_proposer_arguments(parser)
    add_looks(parser.add_argument_group("look, or ask").add_argument)
    parser.set_defaults(proposer=None)  # as recorded, or evolve
    args = parser.parse_args(argv)
    if args.folder is None and args.check is None:
        parser.error("a folder is missing: python discover.py discovery/first")
    return args


def add_search_arguments(add) -> None:
    add("--model", help="chat model: folder or hub id (default: the quickstart's)")
    add("--data", help="folder written by prep_data.py (default: the quickstart's pairs)")
    add(
        "--train_args",
        metavar="TEXT",
        help="arguments of train_pref.py for every run, in place of the preset's: "
        "'--global_batch 8 --max_steps 20 --learning_rate 1e-3'",
    )
    add(
        "--task",
        metavar="FILE",
        help="a task's Python file: what is trained also answers its questions, and is judged by "
        "its score at equal KL (examples/tasks/)",
    )
    add("--task_args", metavar="TEXT", help="of prep_data.py --task: '--num_test 80'")
    add("--gen_args", metavar="TEXT", help="of gen_mtbench.py: '--max_new_tokens 64'")
    add(
        "--seeds_from",
        nargs="+",
        metavar="LOSS",
        help="losses that the archive begins with, or all (default: dpo hinge ipo td_dpo discopop)",
    )
    add(
        "--coupled",
        action="store_true",
        help="allow means over the batch: such a loss depends on --per_device_batch",
    )
    add(
        "--proxy",
        choices=("on", "filter", "off"),
        help="on: it ranks; filter: it only stops what does not learn, and chance promotes; off "
        "(default on)",
    )
    add("--features", metavar="FILE", help="a features file of your own for the proxy")


def add_size_arguments(add) -> None:
    add(
        "--preset",
        choices=tuple(settings.PRESETS),
        help="quick: 96 proposals, 4 training runs, minutes; hour: 800 and 37 runs; study: 2,400 "
        "and 50 runs, for GPUs (default: quick on the quickstart's pairs, else hour)",
    )
    add("--max_proposals", type=int, metavar="N", help="(default: the preset's)")
    add("--rung", type=numbers, metavar="N,N,..", help="candidates that are trained, rung by rung")
    add("--seeds_per_rung", type=numbers, metavar="N,N,..", help="seeds that each rung adds")
    add("--seed", type=int, help="of everything random in the search (default 0)")
    add("--max_hours", type=float, help="begin no further step after this time, in this start")


def add_looks(add) -> None:
    add("--dry_run", action="store_true", help="what it will take, and the first prompt")
    add("--status", action="store_true", help="how far it is; exit code 1 unless done")
    add("--show", metavar="ID", help="everything that is known of a candidate")
    add(
        "--confirm",
        type=int,
        metavar="K",
        help="the best K (up to 3) and a tuned DPO on unseen pairs and seeds; once",
    )
    add("--again", action="store_true", help="with --confirm: once more, which confirms nothing")
    add("--check", metavar="FILE", help="print what the restricted form makes of a file")
    add(
        "--rung_only",
        action="store_true",
        help="for a cluster: stop where training is next, and print the command that submits it",
    )


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


# ---- the stage ----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    # 1) What only looks.
    args = parse_args(argv)
    if args.check is not None:
        print(check_file(args.check), end="")
        return 0
    if args.status:
        return status.print_status(args.folder)
    if args.show is not None:
        return status.show(args.folder, args.show)

    # 2) What can be wrong before anything takes time.
    if args.confirm is not None:
        confirmation.check_count(args.confirm)
    elif args.again:
        raise UserError("--again: only with --confirm")
    if args.max_hours is not None and not args.max_hours > 0:
        raise UserError(f"--max_hours {args.max_hours:g}: must be above 0")
    chosen = settings.settle(args)
    args.proposer, args.parameters = list(chosen.proposer), chosen.parameters
    proposer_arguments.check_proposer_arguments(args)
    if args.dry_run:
        return dry_run.run(args, chosen)

    # 3) One process at a time searches in a folder.
    with Stop() as stop, disk.locked(args.folder, ".lock", "is being searched"):
        try:
            return work(args, chosen, stop)
        except Stopped:  # in the pass that computes the features, or a model's first question
            print("stopped: the same command begins this step again", flush=True)
            return stop.exit_code


def work(args: argparse.Namespace, chosen: Settings, stop: Stop) -> int:
    """Search, confirm if asked to, report. Returns the exit code."""
    begun = time.monotonic()
    with start.opened(args, chosen, stop) as one:
        try:
            done = start.look_ahead(one) and search.run(one, rungs.take)
            if done and args.confirm is not None:
                done = confirmation.run(one, args.confirm, args.again)
        except OutOfTime:
            print(f"--max_hours {args.max_hours:g} have passed; the same command continues")
            return 1
        except rungs.TrainingIsNext as training:
            print(training, flush=True)
            return 1
        if not done:
            print("stopped, with everything saved: the same command continues", flush=True)
            return stop.exit_code
        finish(one)
    print(f"done in {(time.monotonic() - begun) / 60:.1f} min", flush=True)
    return 0


def finish(one: Search) -> None:
    """The report, and the best loss ready to train with."""
    from pref.discovery import report, winner  # with what draws, which takes seconds to import

    winner.write(one.folder, one.archive)
    path = report.write_report(one.folder, one.archive)
    print()
    for line in status.best_lines(one.state):
        print(line)
    if one.state.confirmed:
        print(f"confirmed: {one.state.confirmed[-1]['verdict']}")
    else:
        print(f"selected on, not confirmed; ask once: python discover.py {one.folder} --confirm 3")
    print(f"report: {path}")


if __name__ == "__main__":
    console.run_main(main)
