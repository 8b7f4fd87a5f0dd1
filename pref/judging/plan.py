"""What is asked of which judge, which part of it is still to be asked, and asking for it."""

import argparse
import dataclasses
import sqlite3
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

from pref.judging import (
    annotations_import,
    arguments,
    batch,
    calls,
    costs,
    fastchat,
    identity,
    reuse,
    server_judge,
    store,
)
from pref.judging.benchmark import Bench
from pref.judging.identity import Identity
from pref.judging.judges import LOCAL, SERVER, Judge
from pref.judging.reading import Reading
from pref.judging.store import Item


class Plan(NamedTuple):
    """What is asked of which judge."""

    judge: Judge  # with the parameters that it accepts
    who: Identity
    items: list[Item]
    pending: dict[str, dict]  # requests still to be made, by hash


def make_plan(
    judge: Judge,
    bench: Bench,
    items_for: Callable[[Identity], list[Item]],
    db: sqlite3.Connection,
    args: argparse.Namespace,
) -> Plan:
    """Find the requests to make, after a probe of the server where something is to be sent.

    items_for: every judgement that is needed of a judge. The probe settles the judge's parameters.
    They are part of every request, so the plan is made again if the probe changes them.
    """
    plan = plan_with(judge, bench, items_for, db, args)
    sends = not (args.dry_run or arguments.imported(args)) or args.requests
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
            plan = plan_with(judge, bench, items_for, db, args)
    return plan


def plan_with(
    judge: Judge,
    bench: Bench,
    items_for: Callable[[Identity], list[Item]],
    db: sqlite3.Connection,
    args: argparse.Namespace,
) -> Plan:
    """The plan for a judge whose parameters are as they are."""
    # 1) Every judgement that is needed.
    who = identity.identify(judge, bench, reading_of(judge, args))
    items = items_for(who)
    # 2) Those that are in the store under an older key, or serve as well.
    if not (args.dry_run or judge.is_here) and (adopted := reuse.adopt(db, items, who.server)):
        print(
            f"{adopted} judgements by {who.judge} were made by version 1.0.0, which recorded no "
            f"address: they are taken as made at {who.server}, and not asked for again",
            file=sys.stderr,
        )
    items = reuse.point_to_stored(db, items)
    # 3) What remains.
    return Plan(judge, who, items, store.find_pending(db, items, args.retry_failed, who.reading))


def reading_of(judge: Judge, args: argparse.Namespace) -> Reading:
    """How the judge's replies are read."""
    if judge.kind == LOCAL:
        return Reading(min_rating_mass=args.min_rating_mass)
    return Reading(verdict=args.verdict) if judge.kind == SERVER else Reading()


def fetch_judgements(
    plan: Plan,
    bench: Bench,
    save: Callable[[], None],
    db: sqlite3.Connection,
    args: argparse.Namespace,
    interrupted: threading.Event,
) -> str | None:
    """Make the pending requests, or store a batch's results.

    save: writes what is in the store to the users' files; called now and then. Returns None, or the
    reason for stopping early as a message to the user.
    """
    if args.import_results:
        batch.import_results(args.import_results, db, plan.items, plan.judge)
        return None
    if args.import_fastchat:
        fastchat.import_judgements(args.import_fastchat, db, plan.items, plan.judge)
        return None
    if args.import_annotations:
        path = args.import_annotations
        annotations_import.import_annotations(path, db, plan.items, plan.judge, bench)
        return None
    if not plan.pending:
        return None
    if plan.judge.prepare is not None:
        plan.judge.prepare(list(plan.pending.values()))
    tries = 1 + args.max_retries
    return calls.judge_pending(
        plan.judge,
        plan.pending,
        db=db,
        save=save,
        interrupted=interrupted,
        budget=costs.Budget(plan.judge, args.max_usd, spent=store.spent_usd(db), tries=tries),
        rpm=args.rpm,
    )
