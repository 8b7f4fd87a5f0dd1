"""Have a judge model rate the MT-Bench answers of every run, or compare them with a baseline run's.

Reads   results/<run_id>/mt_bench/answers.jsonl; questions, references and judge prompts in
        data/mt_bench.
Writes  results/judgements.sqlite, as each judgement arrives, and from it
        results/<run_id>/mt_bench/judgements.csv.

The judge is a model behind an OpenAI-compatible server, or a local model without a server:

    OPENAI_API_KEY=... python judge.py results/ --judge MODEL --base_url http://localhost:8000/v1
    python judge.py results/ --judge hf:/path/to/model
    python judge.py results/ --judge MODEL --grading pair --baseline dpo_b0.1_s42

A local model writes nothing: its score is the mean of the ratings 1 to 10, weighted by their
probabilities, and counts only if these ratings hold enough of its probability (--min_rating_mass).

Estimate the cost, set a cap, or use the provider's batch endpoint, which is cheaper:

    python judge.py --judge MODEL --dry_run --runs 61
    python judge.py results/ --judge MODEL --dry_run --requests batch.jsonl
    python judge.py results/ --judge MODEL --max_usd 20
    python judge.py results/ --judge MODEL --import_results batch_output.jsonl

Both turns are judged, with FastChat's messages and FastChat's reading of the verdict
(llm_judge/common.py), which pref/judging/README.md says more exactly. A judgement is stored under a
hash of everything that determines it. It is therefore paid for once, however often the command is
interrupted or repeated, and once for runs that gave identical answers. Judges that differ in model,
parameters, server, prompts, references or reading are kept apart.
"""

import pref.files.interrupts  # noqa: F401  isort: skip

import argparse
import dataclasses
import functools
import itertools
import sqlite3
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from pref.files import console, disk, mt_bench
from pref.files.console import UserError
from pref.judging import (
    arguments,
    batch,
    calls,
    costs,
    fastchat,
    identity,
    local_judge,
    protocol,
    reuse,
    run_answers,
    server_judge,
    store,
    summary,
)
from pref.judging.identity import Identity
from pref.judging.protocol import Bench, Judge
from pref.judging.reading import Reading
from pref.judging.store import Item, Result

# ---- what is asked -------------------------------------------------------------------------------


class Unit(NamedTuple):
    """A turn of one run's answer, to be judged once (or, as a pair, once in each order)."""

    model_id: str
    question: dict
    choice: int
    turn: int  # 1 or 2
    repeat: int


def make_items(
    runs: dict[Path, dict], bench: Bench, who: Identity, args: argparse.Namespace
) -> list[Item]:
    """All judgements by `who` that the answers in `runs` need. A failed answer needs none.

    Ordered by repeat, then by question over all runs, so that an interrupted evaluation has judged
    every run on the same questions.
    """
    answers_of = {run.resolve().name: answers for run, answers in runs.items()}
    baseline = {}
    if args.grading == "pair":
        baseline = run_answers.read_baseline(runs, args.baseline, bench)
        answers_of.pop(args.baseline, None)  # it is not compared with itself
    items = []
    for repeat, question, (model_id, answers) in itertools.product(
        range(args.repeats), bench.questions, answers_of.items()
    ):
        keys = [key for key in answers if key[0] == question["question_id"]]
        for key, turn in itertools.product(keys, (1, 2)):
            answer, choice = answers[key]["turns"], key[1]
            unit = Unit(model_id, question, choice=choice, turn=turn, repeat=repeat)
            if run_answers.has_failed(answer, turn):
                continue
            if args.grading == "single":
                items.append(single_item(unit, answer, bench, who))
            elif key in baseline and not run_answers.has_failed(baseline[key]["turns"], turn):
                other = baseline[key]["turns"]
                items += pair_items(unit, answer, other, args.baseline, bench, who)
    return items


def single_item(unit: Unit, answer: list[str], bench: Bench, who: Identity) -> Item:
    """A rating of one answer (its two turns)."""
    messages = protocol.single_messages(
        prompts=bench.prompts,
        question=unit.question,
        answer=answer,
        turn=unit.turn,
        reference=bench.references.get(unit.question["question_id"], []),
    )
    answer_sha256 = mt_bench.answer_sha256(unit.turn, answer)
    return make_item(unit, messages, answer_sha256, bench, who, grading="single")


def pair_items(
    unit: Unit, answer: list[str], other: list[str], baseline: str, bench: Bench, who: Identity
) -> list[Item]:
    """A comparison of an answer with the `other` of the run `baseline`, once in each order."""
    answer_sha256 = mt_bench.answer_sha256(unit.turn, answer, other)
    items = []
    for order in protocol.ORDERS:
        messages = protocol.pair_messages(
            prompts=bench.prompts,
            question=unit.question,
            answer_a=answer if order == protocol.RUN_IS_A else other,
            answer_b=other if order == protocol.RUN_IS_A else answer,
            turn=unit.turn,
            reference=bench.references.get(unit.question["question_id"], []),
        )
        pair = {"grading": "pair", "order": order, "baseline": baseline}
        items.append(make_item(unit, messages, answer_sha256, bench, who, **pair))
    return items


def make_item(
    unit: Unit,
    messages: list[dict],
    answer_sha256: str,
    bench: Bench,
    who: Identity,
    grading: str,
    order: str = "",
    baseline: str = "",
) -> Item:
    """The item of a unit, with the request that answers it."""
    request = who.request(messages, unit.repeat, grading)
    return Item(
        model_id=unit.model_id,
        question_id=unit.question["question_id"],
        turn=unit.turn,
        choice=unit.choice,
        category=unit.question["category"],
        grading=grading,
        order=order,
        baseline=baseline,
        judge=who.judge,
        prompts=bench.label,
        repeat=unit.repeat,
        refs=bench.refs,
        answer_sha256=answer_sha256,
        request_sha256=disk.sha256_json(request),
        request=request,
        judge_id=who.id,
    )


# ---- what is pending, and asking for it ----------------------------------------------------------


class Plan(NamedTuple):
    """What is asked of which judge."""

    judge: Judge  # with the parameters that it accepts
    who: Identity
    items: list[Item]
    pending: dict[str, dict]  # requests still to be made, by hash


def make_plan(
    judge: Judge,
    runs: dict[Path, dict],
    bench: Bench,
    db: sqlite3.Connection,
    args: argparse.Namespace,
) -> Plan:
    """Find the requests to make, after a probe of the server where something is to be sent.

    The probe settles the judge's parameters. They are part of every request, so the plan is made
    again if the probe changes them.
    """
    plan = plan_with(judge, runs, bench, db, args)
    sends = not (args.dry_run or args.import_results or args.import_fastchat) or args.requests
    affordable = args.max_usd is None or store.spent_usd(db) < args.max_usd
    if judge.probe and plan.pending and sends and affordable:
        try:
            accepted = judge.probe(judge.parameters)
        except server_judge.Unreached as error:
            if not args.requests:
                raise
            print(f"{error}; the batch file's parameters are not tried", file=sys.stderr)
            accepted = judge.parameters
        if accepted != judge.parameters:
            judge = dataclasses.replace(judge, parameters=accepted)
            plan = plan_with(judge, runs, bench, db, args)
    return plan


def plan_with(
    judge: Judge,
    runs: dict[Path, dict],
    bench: Bench,
    db: sqlite3.Connection,
    args: argparse.Namespace,
) -> Plan:
    """The plan for a judge whose parameters are as they are."""
    # 1) Every judgement that the answers need.
    how = Reading(verdict=args.verdict)
    if judge.local:
        how = Reading(min_rating_mass=args.min_rating_mass)
    who = identity.identify(judge, bench, how)
    items = make_items(runs, bench, who, args)
    # 2) Those that are in the store under an older key, or serve as well.
    if not (args.dry_run or judge.local) and (adopted := reuse.adopt(db, items, who.server)):
        print(
            f"{adopted} judgements by {who.judge} were made by version 1.0.0, which recorded no "
            f"address: they are taken as made at {who.server}, and not asked for again",
            file=sys.stderr,
        )
    items = reuse.point_to_stored(db, items)
    # 3) What remains.
    return Plan(judge, who, items, store.find_pending(db, items, args.retry_failed, how))


def fetch_judgements(
    plan: Plan,
    runs: dict[Path, dict],
    db: sqlite3.Connection,
    args: argparse.Namespace,
    interrupted: threading.Event,
) -> str | None:
    """Make the pending requests, or store a batch's results.

    Returns None, or the reason for stopping early as a message to the user.
    """
    if args.import_results:
        batch.import_results(args.import_results, db, plan.items, plan.judge)
        return None
    if args.import_fastchat:
        fastchat.import_judgements(args.import_fastchat, db, plan.items, plan.judge)
        return None
    if not plan.pending:
        return None
    tries = 1 + args.max_retries
    return calls.judge_pending(
        plan.judge,
        plan.pending,
        db=db,
        save=functools.partial(store.write_csvs, db, runs),
        interrupted=interrupted,
        budget=costs.Budget(plan.judge, args.max_usd, spent=store.spent_usd(db), tries=tries),
        rpm=args.rpm,
    )


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
    arguments.add_cost_arguments(parser.add_argument_group("what it may cost").add_argument)
    arguments.add_call_arguments(parser.add_argument_group("how calls are made").add_argument)
    args = parser.parse_args(argv)
    arguments.check_args(args)
    return args


# ---- main ----------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    # 1) Questions, references, prompts and answers: checked before anything is paid for.
    bench = protocol.read_bench(args.mt_bench, args.grading, args.refs)
    if args.runs is not None:
        print(costs.estimate_ahead(args, bench))
        return 0
    runs = run_answers.read_runs(args.results, bench, args.allow_incomplete)
    results_dir = next(iter(runs)).resolve().parent

    # 2) The lock and the store. Two processes at once would pay twice for the same judgements.
    path = results_dir / "judgements.sqlite"
    with (
        disk.locked(results_dir, ".judge.lock", "is being judged"),
        closing(store.open_store(path)) as db,
    ):
        try:
            return judge_runs(args, bench, runs, results_dir, db)
        except sqlite3.Error as error:
            raise store.unusable(path, error) from None


def judge_runs(
    args: argparse.Namespace,
    bench: Bench,
    runs: dict[Path, dict],
    results_dir: Path,
    db: sqlite3.Connection,
) -> int:
    """Plan, announce, ask, report. Returns the exit code."""
    # 3) What is asked, which part of it is pending, and what that will cost.
    if args.judge.startswith("hf:"):
        judge = local_judge.open_local_judge(args, bench)
    else:
        judge = server_judge.open_server_judge(args, db, bench)
    plan = make_plan(judge, runs, bench, db, args)
    summary.announce(plan.who, judge, bench, runs, plan.items, plan.pending)
    if plan.pending and not judge.local:
        summary.announce_other_servers(plan.who, reuse.other_servers(db, plan.who))
        print(costs.estimate(db, plan.judge, plan.pending))
    if args.dry_run:
        if args.requests:
            store.note_judge(db, plan.who)  # so that the batch's results are found again
            batch.write_requests(args.requests, plan.items, plan.pending)
            print(f"written: {args.requests}, {len(plan.pending)} requests")
        return 0

    # 4) The paid part. Each reply is in the store before its worker makes another request; the
    #    CSV files follow every minute, and once more at the end, even if that comes early.
    store.note_judge(db, plan.who)
    store.note_items(db, plan.items)
    with calls.catch_interrupt() as interrupted:
        stopped_because = fetch_judgements(plan, runs, db, args, interrupted)
        store.write_csvs(db, runs)

    # 5) The table, the cost, and what the user does next.
    results = store.find_results(db, plan.items, plan.who.reading)
    summary.print_results(plan.judge, plan.who, bench, plan.items, results, args.baseline)
    for run in runs:
        if not (run / "mt_bench").is_dir():
            print(f"run {run.resolve().name} was deleted meanwhile: it has no judgements.csv")
    total = store.spent_usd(db)
    cost_note = f"; total cost recorded there: {total:.4f} dollars" if total else ""
    print(
        f"written: {results_dir}/<run>/mt_bench/judgements.csv, from "
        f"{results_dir / 'judgements.sqlite'}{cost_note}"
    )
    if stopped_because:
        raise UserError(stopped_because)
    if interrupted.is_set():
        print(
            "interrupted: run the same command again to continue; judgements made so far are kept "
            "and not asked for again"
        )
        return 130
    return print_next_step(plan.items, results, args.results)


def print_next_step(items: list[Item], results: dict[str, Result], paths: list[Path]) -> int:
    """Print what has no verdict, and the next command. Returns the exit code."""
    statuses = [results.get(item.request_sha256, Result()).status for item in items]
    missing = sum(status != "ok" for status in statuses)
    if missing:
        print(
            f"{missing} of {len(statuses)} judgements have no verdict: run the same command again "
            "to "
            "ask for those not judged yet; add --retry_failed to repeat those that failed as well"
        )
    print(f"next: python analyze.py {' '.join(map(str, paths))}")
    return 1 if missing else 0


if __name__ == "__main__":
    console.run_main(main)
