"""Have a judge rate the answers of every run to a benchmark, or compare them with a baseline's.

Reads   results/<run_id>/<bench>/answers.jsonl; questions, references and judge prompts in
        data/<bench>, where <bench> is mt_bench or the name given with --bench.
Writes  results/judgements.sqlite, as each judgement arrives, and from it
        results/<run_id>/<bench>/judgements.csv. With --validate results/judges/*/validation.json.

The judge is a model behind an OpenAI-compatible server, a local model without a server, or a reward
model, which needs no prompt:

    OPENAI_API_KEY=... python judge.py results/ --judge MODEL --base_url http://localhost:8000/v1
    python judge.py results/ --judge hf:/path/to/model
    python judge.py results/ --judge MODEL --grading pair --baseline dpo_b0.1_s42
    python judge.py results/ --judge MODEL --bench alpaca_eval
    python judge.py results/ --judge rm:/path/to/reward_model [--baseline RUN]

Or a task's own function, on the task's questions or any others (pref/files/tasks.py):

    python judge.py results/ --bench my_task --judge py:my_task.py

A local model writes nothing: its verdict is made of the probabilities of all possible ones (a score
on MT-Bench is the mean of the ratings 1 to 10 weighted by theirs), and counts only if these hold
enough of its probability (--min_rating_mass).

Estimate the cost, set a cap, or use the provider's batch endpoint, which is cheaper:

    python judge.py --judge MODEL --dry_run --runs 61
    python judge.py results/ --judge MODEL --dry_run --requests batch.jsonl
    python judge.py results/ --judge MODEL --max_usd 20
    python judge.py results/ --judge MODEL --import_results batch_output.jsonl

Measure the judge itself, against MT-Bench's human votes or on LLMBar (no runs are needed):

    python judge.py results/ --validate --judge MODEL --pairs 400
    python judge.py results/ --validate llmbar --judge MODEL

Of MT-Bench both turns are judged, with FastChat's messages and FastChat's reading of the verdict
(llm_judge/common.py), which pref/judging/README.md says more exactly. A judgement is stored under a
hash of everything that determines it. It is therefore paid for once, however often the command is
interrupted or repeated, and once for runs that gave identical answers. Judges that differ in model,
parameters, server, prompts, references or reading are kept apart.
"""

import pref.files.interrupts  # noqa: F401  isort: skip

import argparse
import functools
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from pref.files import console, disk, run_folders
from pref.files.benchmarks import TRAIN_SET
from pref.files.console import UserError
from pref.judging import (
    arguments,
    batch,
    benchmarks,
    call_arguments,
    calls,
    costs,
    items,
    judgements_csv,
    local_judge,
    plan,
    program_judge,
    reuse,
    reward_model,
    run_answers,
    server_judge,
    store,
    summary,
)
from pref.judging.benchmark import Bench
from pref.judging.judges import LOCAL, PROGRAM, SCORE, Judge, kind_of
from pref.judging.run_answers import Baselines
from pref.judging.store import Item, Result

# ---- arguments -----------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s results [run ...] --judge MODEL [--option VALUE ...]  "
        "(--help explains all of them)",
        description=__doc__,
        formatter_class=console.HelpFormatter,
        epilog="Exit code: 0 every judgement has a verdict, 1 some have none (the table says why; "
        "see --retry_failed), 2 something to correct, 130 Ctrl-C.",
    )
    parser.add_argument(
        "results", nargs="*", type=Path, help="results folder, or run folders inside one"
    )
    arguments.add_judge_arguments(parser.add_argument_group("who judges").add_argument)
    arguments.add_task_arguments(parser.add_argument_group("what is judged").add_argument)
    arguments.add_validation_arguments(
        parser.add_argument_group("whether the judge is any good").add_argument
    )
    arguments.add_own_arguments(parser)
    arguments.add_cost_arguments(parser.add_argument_group("what it may cost").add_argument)
    add = parser.add_argument_group("how calls are made").add_argument
    add("--retry_failed", action="store_true", help="also repeat requests that failed earlier")
    call_arguments.add_call_arguments(add, timeout_s=600.0)
    args = parser.parse_args(argv)
    arguments.check_args(args)
    return args


# ---- main ----------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.validate:
        return validate_judge(args)

    # 1) Questions, references, prompts and answers: checked before anything is paid for.
    bench = benchmarks.read_bench(args)
    if args.runs is not None:
        print(costs.estimate_ahead(args, bench))
        return 0
    runs = run_answers.read_runs(args.results, bench, args.allow_incomplete)
    baselines = run_answers.read_baselines(runs, bench, args.baseline)
    results_dir = next(iter(runs)).resolve().parent

    # 2) The lock and the store. Two processes at once would pay twice for the same judgements.
    with locked_store(results_dir) as db:
        return judge_runs(args, bench, runs, baselines, results_dir, db)


@contextmanager
def locked_store(results_dir: Path) -> Iterator[sqlite3.Connection]:
    """The judgements of a results folder, which no other process may add to meanwhile."""
    path = results_dir / "judgements.sqlite"
    with (
        disk.locked(results_dir, ".judge.lock", "is being judged"),
        closing(store.open_store(path)) as db,
    ):
        try:
            yield db
        except sqlite3.Error as error:
            raise store.unusable(path, error) from None


def open_judge(args: argparse.Namespace, db: sqlite3.Connection, bench: Bench) -> Judge:
    """The judge that --judge names. One behind a server is not contacted yet."""
    kind = kind_of(args.judge)
    if kind == SCORE:
        return reward_model.open_reward_judge(args)
    if kind == PROGRAM:
        return program_judge.open_program_judge(args, bench)
    if kind == LOCAL:
        return local_judge.open_local_judge(args, bench)
    return server_judge.open_server_judge(args, db, bench)


def judge_runs(
    args: argparse.Namespace,
    bench: Bench,
    runs: dict[Path, dict],
    baselines: Baselines,
    results_dir: Path,
    db: sqlite3.Connection,
) -> int:
    """Plan, announce, ask, report. Returns the exit code."""
    # 3) What is asked, which part of it is pending, and what that will cost.
    judge = open_judge(args, db, bench)
    needed = functools.partial(items.make_items, runs, bench, baselines, repeats=args.repeats)
    todo = plan.make_plan(judge, bench, needed, db, args)
    summary.announce(todo.who, judge, bench, runs, todo.items, todo.pending)
    announce_cost(todo, bench, db)
    if args.dry_run:
        write_batch(args, todo, db)
        return 0

    # 4) The paid part. Each reply is in the store before its worker makes another request; the
    #    CSV files follow every minute, and once more at the end, even if that comes early.
    store.note_judge(db, todo.who)
    store.note_items(db, todo.items)
    store.note_known(db, todo.items, judge.params_b)
    save = functools.partial(judgements_csv.write_csvs, db, runs, bench.name, baselines.answers)
    with calls.catch_interrupt() as interrupted:
        stopped_because = plan.fetch_judgements(todo, bench, save, db, args, interrupted)
        left_out = save()
        if bench.benchmark.export is not None:
            bench.benchmark.export(bench, runs, baselines, todo.who)

    # 5) The table, the cost, and what the user does next.
    results = store.find_results(db, todo.items, todo.who.reading)
    summary.print_results(todo.judge, todo.who, bench, todo.items, results)
    for run in runs:
        if not (run / bench.name).is_dir():
            print(f"run {run.resolve().name} was deleted meanwhile: it has no judgements.csv")
    total = store.spent_usd(db)
    cost_note = f"; total cost recorded there: {total:.4f} dollars" if total else ""
    print(
        f"written: {results_dir}/<run>/{bench.name}/judgements.csv, from "
        f"{results_dir / 'judgements.sqlite'}{cost_note}"
    )
    for name, count in left_out.items():
        print(
            f"not in judgements.csv: {count} comparisons with {name}, whose answers are not there "
            "any more; the store keeps them"
        )
    if stopped_because:
        raise UserError(stopped_because)
    if interrupted.is_set():
        print(
            "interrupted: run the same command again to continue; judgements made so far are kept "
            "and not asked for again"
        )
        return 130
    return print_next_step(todo.items, results, run_folders.folder_of(next(iter(runs))))


def announce_cost(todo: plan.Plan, bench: Bench, db: sqlite3.Connection) -> None:
    """Print what the pending requests will cost, of a judge that may cost something."""
    if todo.pending and not todo.judge.is_here:
        summary.announce_other_servers(todo.who, reuse.other_servers(db, todo.who))
        print(costs.estimate(db, todo.judge, bench, todo.pending))
    elif todo.judge.kind == PROGRAM:
        print("estimate: no dollars; the task runs on this machine")


def write_batch(args: argparse.Namespace, todo: plan.Plan, db: sqlite3.Connection) -> None:
    """Write the file of --requests, if it is asked for."""
    if args.requests:
        store.note_judge(db, todo.who)  # so that the batch's results are found again
        batch.write_requests(args.requests, todo.items, todo.pending)
        print(f"written: {args.requests}, {len(todo.pending)} requests")


# ---- --validate ----------------------------------------------------------------------------------


def validate_judge(args: argparse.Namespace) -> int:
    """Have the judge compare answers whose comparison is known. Returns the exit code."""
    # Imported here because it loads NumPy and SciPy, which judging does not need.
    from pref.judging import validation, validation_report

    task = validation.read_task(args)
    results_dir = args.results[0] if args.results else Path("results")
    if results_dir.exists() and not results_dir.is_dir():
        raise UserError(f"{results_dir}: is a file, expected a results folder")
    results_dir.mkdir(parents=True, exist_ok=True)
    with locked_store(results_dir) as db:
        # 1) What is asked, and what that will cost: as for the answers of runs.
        judge = open_judge(args, db, task.bench)
        needed = functools.partial(validation.make_items, task, args.repeats)
        todo = plan.make_plan(judge, task.bench, needed, db, args)
        validation.announce(task, todo)
        announce_cost(todo, task.bench, db)
        if args.dry_run:
            write_batch(args, todo, db)
            return 0

        # 2) The paid part. The judgements stay in the store: no run has a judgements.csv with them.
        store.note_judge(db, todo.who)
        with calls.catch_interrupt() as interrupted:
            stopped_because = plan.fetch_judgements(
                todo, task.bench, lambda: None, db, args, interrupted
            )

        # 3) The judge against the votes.
        results = store.find_results(db, todo.items, todo.who.reading)
        report = validation.make_report(task, todo, results, args.repeats)
        validation.print_report(report)
        summary.print_remarks(task.bench, todo.who, todo.items, results)
        validation.write_report(validation.report_path(results_dir, report), report)
        print(validation_report.sentence(report))
    if stopped_because:
        raise UserError(stopped_because)
    if interrupted.is_set():
        print("interrupted: run the same command again to continue; nothing is asked twice")
        return 130
    if report["no_verdict"]:
        print(
            "run the same command again to ask for what is not judged yet; add --retry_failed to "
            "repeat what failed as well"
        )
    return 1 if report["no_verdict"] else 0


def print_next_step(items: list[Item], results: dict[str, Result], results_dir: Path) -> int:
    """Print what has no verdict, and the next command. Returns the exit code."""
    statuses = [results.get(item.request_sha256, Result()).status for item in items]
    missing = sum(status != "ok" for status in statuses)
    if missing:
        print(
            f"{missing} of {len(statuses)} judgements have no verdict: run the same command again "
            "to ask for those not judged yet; add --retry_failed to repeat those that failed as "
            "well"
        )
    print(f"next: {next_command(items, results_dir)}")
    return 1 if missing else 0


def next_command(items: list[Item], results_dir: Path) -> str:
    """Scores of answers to a task's train questions make pairs; all others are analysed."""
    runs = sorted({item.model_id for item in items if item.bench.endswith(TRAIN_SET)})
    if not runs:
        return f"python analyze.py {results_dir}"
    answers = f"{results_dir}/{runs[0] if len(runs) == 1 else 'RUN'}/{items[0].bench}"
    return f"python prep_data.py --from_answers {answers}"


if __name__ == "__main__":
    console.run_main(main)
