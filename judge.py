"""Have a judge model rate the MT-Bench answers of every run, or compare them with a baseline run's.

Reads   results/<run_id>/mt_bench/answers.jsonl; questions, references and judge prompts in
        data/mt_bench.
Writes  results/judgements.sqlite, as each judgement arrives, and from it
        results/<run_id>/mt_bench/judgements.csv.

The judge is a model behind an OpenAI-compatible server, or a local model without a server:

    OPENAI_API_KEY=... python judge.py results/ --judge MODEL --base_url http://localhost:8000/v1
    python judge.py results/ --judge hf:/path/to/model
    python judge.py results/ --judge MODEL --grading pair --baseline dpo_b0.1_s42

Estimate the cost, set a cap, or use the provider's batch endpoint, which is cheaper:

    python judge.py results/ --judge MODEL --dry_run --requests batch.jsonl
    python judge.py results/ --judge MODEL --max_usd 20
    python judge.py results/ --judge MODEL --import_results batch_output.jsonl

Both turns are judged, with FastChat's messages and FastChat's reading of the verdict
(llm_judge/common.py). A judgement is stored under a hash of everything that determines it. It is
therefore paid for once, however often the command is interrupted or repeated, and once for runs
that gave identical answers. pref/judging/README.md describes protocol, cost and files.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import re
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from pref.files import console, disk
from pref.files.console import UserError
from pref.judging import (
    batch,
    calls,
    costs,
    local_judge,
    protocol,
    run_answers,
    server_judge,
    store,
    summary,
)
from pref.judging.protocol import Bench, Judge
from pref.judging.store import Item, Result

NO_JUDGE = """--judge is missing, and there is no default: hosted models come and go. Give either
  --judge MODEL [--base_url URL]   a model of an OpenAI-compatible server (key in OPENAI_API_KEY)
  --judge hf:PATH                  a local folder or hub id, scored here without a server
OpenAI's shutdown dates: gpt-4 family 2026-10-23, GPT-4o and GPT-4.1 2027-01-14. Choose a judge
that will still be there when your last run is judged."""


# ---- what is asked -------------------------------------------------------------------------------


class Unit(NamedTuple):
    """A turn of one run's answer, to be judged once (or, as a pair, once in each order)."""

    model_id: str
    question: dict
    choice: int
    turn: int  # 1 or 2
    repeat: int


def make_items(
    runs: dict[Path, dict], bench: Bench, judge: Judge, args: argparse.Namespace
) -> list[Item]:
    """All judgements that the answers in `runs` need.

    Ordered by repeat, then by question over all runs, so that an interrupted evaluation has judged
    every run on the same questions.
    """
    answers_of = {run.resolve().name: answers for run, answers in runs.items()}
    baseline = {}
    if args.grading == "pair":
        baseline = run_answers.read_baseline(runs, args.baseline)
        answers_of.pop(args.baseline, None)  # it is not compared with itself
    items = []
    for repeat, question, (model_id, answers) in itertools.product(
        range(args.repeats), bench.questions, answers_of.items()
    ):
        keys = [key for key in answers if key[0] == question["question_id"]]
        for key, turn in itertools.product(keys, (1, 2)):
            answer, choice = answers[key]["turns"], key[1]
            unit = Unit(model_id, question, choice=choice, turn=turn, repeat=repeat)
            if args.grading == "single":
                items.append(single_item(unit, answer, bench, judge))
            elif key in baseline:
                other = baseline[key]["turns"]
                items += pair_items(unit, answer, other, args.baseline, bench, judge)
    return items


def single_item(unit: Unit, answer: list[str], bench: Bench, judge: Judge) -> Item:
    """A rating of one answer (its two turns)."""
    messages = protocol.single_messages(
        prompts=bench.prompts,
        question=unit.question,
        answer=answer,
        turn=unit.turn,
        reference=bench.references.get(unit.question["question_id"], []),
    )
    answer_sha256 = store.answer_sha256(unit.turn, answer)
    return make_item(unit, messages, answer_sha256, bench, judge, grading="single")


def pair_items(
    unit: Unit, answer: list[str], other: list[str], baseline: str, bench: Bench, judge: Judge
) -> list[Item]:
    """A comparison of an answer with the `other` of the run `baseline`, once in each order."""
    answer_sha256 = store.answer_sha256(unit.turn, answer, other)
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
        items.append(make_item(unit, messages, answer_sha256, bench, judge, **pair))
    return items


def make_item(
    unit: Unit,
    messages: list[dict],
    answer_sha256: str,
    bench: Bench,
    judge: Judge,
    grading: str,
    order: str = "",
    baseline: str = "",
) -> Item:
    """The item of a unit, with the request that answers it."""
    request = make_request(messages, judge, unit.repeat, grading)
    return Item(
        model_id=unit.model_id,
        question_id=unit.question["question_id"],
        turn=unit.turn,
        choice=unit.choice,
        category=unit.question["category"],
        grading=grading,
        order=order,
        baseline=baseline,
        judge=judge.name,
        prompts=bench.label,
        repeat=unit.repeat,
        refs=bench.refs,
        answer_sha256=answer_sha256,
        request_sha256=disk.sha256_json(request),
        request=request,
    )


def make_request(messages: list[dict], judge: Judge, repeat: int, grading: str) -> dict:
    """Everything that determines a judgement. Its hash is the key in the store.

    A change here changes the hashes: everything judged so far would be paid for again.
    """
    parameters = judge.parameters
    if "seed" in parameters:  # repeats with the same seed would bring the same judgement
        parameters = parameters | {"seed": parameters["seed"] + repeat}
    request = {
        "judge": judge.name,
        "messages": messages,
        "parameters": parameters,
        "repeat": repeat,
    }
    return request | {"grading": "pair"} if grading == "pair" else request


# ---- what is pending, and asking for it ----------------------------------------------------------


class Plan(NamedTuple):
    """What is asked of which judge."""

    judge: Judge  # with the parameters that it accepts
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

    The probe settles the judge's parameters. They are part of every request, so the items are
    rebuilt if the probe changes them.
    """
    items = make_items(runs, bench, judge, args)
    pending = store.find_pending(db, items, args.retry_failed)
    sends = pending and not (args.dry_run or args.import_results)
    affordable = args.max_usd is None or store.spent_usd(db) < args.max_usd
    if judge.probe and sends and affordable:
        accepted = judge.probe(judge.parameters)
        if accepted != judge.parameters:
            judge = dataclasses.replace(judge, parameters=accepted)
            items = make_items(runs, bench, judge, args)
            pending = store.find_pending(db, items, args.retry_failed)
    return Plan(judge, items, pending)


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
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit code: 0 every judgement has a verdict, 1 some have none (the table says why; "
        "see --retry_failed), 2 something to correct, 130 Ctrl-C.",
    )
    parser.add_argument(
        "results", nargs="+", type=Path, help="results folder, or run folders inside one"
    )
    add_judge_arguments(parser.add_argument_group("who judges").add_argument)
    add_task_arguments(parser.add_argument_group("what is judged").add_argument)
    add_cost_arguments(parser.add_argument_group("what it may cost").add_argument)
    add_call_arguments(parser.add_argument_group("how calls are made").add_argument)
    args = parser.parse_args(argv)
    check_args(args)
    return args


def add_judge_arguments(add: Callable) -> None:
    add("--judge", help="model of an OpenAI-compatible server, or hf:PATH (folder or hub id)")
    add("--base_url", help="e.g. http://localhost:8000/v1; default OPENAI_BASE_URL, else OpenAI's")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of an hf: judge; auto: bfloat16 where that is fast (default auto)",
    )


def add_task_arguments(add: Callable) -> None:
    add(
        "--grading",
        choices=("single", "pair"),
        default="single",
        help="rate each answer, or compare it with --baseline's in both orders (default single)",
    )
    add("--baseline", metavar="RUN", help="run id that --grading pair compares with")
    add(
        "--refs",
        default="original",
        metavar="original|corrected:FILE",
        help="reference answers: GPT-4's as published, or with those in FILE replacing them",
    )
    add("--repeats", type=int, default=1, help="judgements per answer (default 1)")
    add("--judge_seed", type=int, help="seed to send; the number of the repeat is added to it")
    add(
        "--allow_incomplete",
        action="store_true",
        help="also judge runs that lack answers other runs have, or have many empty answers",
    )
    add(
        "--mt_bench",
        type=Path,
        default=Path("data/mt_bench"),
        help="folder of questions, references and judge prompts (default data/mt_bench)",
    )
    add(
        "--max_tokens",
        type=int,
        default=protocol.MAX_TOKENS,
        help=f"most tokens of a judgement; default {protocol.MAX_TOKENS}, which is MT-Bench's: "
        "another value is another protocol",
    )
    add(
        "--parameters",
        type=json_object,
        metavar="JSON",
        help="send exactly these parameters instead of probing which ones the server accepts, "
        "e.g. '{\"max_completion_tokens\": 2048}'",
    )


def add_cost_arguments(add: Callable) -> None:
    add("--dry_run", action="store_true", help="print the estimate and stop; send nothing")
    add(
        "--requests",
        type=Path,
        metavar="FILE",
        help="with --dry_run: write the requests to FILE, for OpenAI's batch endpoint",
    )
    add(
        "--import_results",
        type=Path,
        metavar="FILE",
        help="store the results in FILE, the batch endpoint's output; send nothing",
    )
    add("--max_usd", type=float, help="cap on the dollars of all judgements in the results folder")
    add("--price_in", type=float, help="dollars per million prompt tokens")
    add("--price_out", type=float, help="dollars per million completion tokens")


def add_call_arguments(add: Callable) -> None:
    add("--retry_failed", action="store_true", help="also repeat requests that failed earlier")
    add("--rpm", type=float, help="calls per minute at most (default: no limit)")
    add("--concurrency", type=int, default=8, help="calls in flight at a time (default 8)")
    add("--timeout_s", type=float, default=600.0, help="seconds to wait for a reply (default 600)")
    add(
        "--max_retries",
        type=int,
        default=5,
        help="tries after the first, with growing pauses, after HTTP 408, 409, 429, 5xx, a timeout "
        "or a lost connection (default 5)",
    )


def json_object(text: str) -> dict:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object, e.g. '{\"max_tokens\": 2048}'")
    return value


def check_args(args: argparse.Namespace) -> None:
    """Raise UserError for what can be wrong before any file is read."""
    if not (args.judge or "").removeprefix("hf:").strip():
        raise UserError(NO_JUDGE)
    is_local = args.judge.startswith("hf:")
    if is_local and args.base_url:
        raise UserError("--base_url is for a judge behind a server; --judge hf:PATH is loaded here")
    if is_local and (args.requests or args.import_results or args.judge_seed is not None):
        raise UserError(
            "--requests, --import_results and --judge_seed are for a judge behind a server"
        )
    if args.base_url and not re.match(r"https?://[^/]", args.base_url):
        raise UserError(f"--base_url {args.base_url}: must begin with http:// or https://")
    if (args.grading == "pair") != (args.baseline is not None):
        raise UserError("--grading pair needs --baseline RUN, and --baseline needs --grading pair")
    if args.refs != "original" and not re.fullmatch(r"corrected:.+", args.refs):
        raise UserError(f"--refs {args.refs}: must be original or corrected:FILE")
    if args.requests and not args.dry_run:
        raise UserError("--requests: only with --dry_run")
    for name, least in {"concurrency": 1, "max_tokens": 1, "repeats": 1, "max_retries": 0}.items():
        if (value := getattr(args, name)) < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    if not args.timeout_s > 0:
        raise UserError(f"--timeout_s {args.timeout_s}: must be above 0")
    if args.rpm is not None and not 0 < args.rpm < math.inf:
        raise UserError(f"--rpm {args.rpm}: must be above 0")
    check_money(args)


def check_money(args: argparse.Namespace) -> None:
    """Raise UserError for prices or a cap that cannot be kept."""
    for name in ("price_in", "price_out", "max_usd"):
        if (value := getattr(args, name)) is not None and not 0 <= value < math.inf:
            raise UserError(f"--{name} {value}: must be 0 or more")
    if (args.price_in is None) != (args.price_out is None):
        raise UserError("--price_in and --price_out: give both or neither")
    if args.max_usd is None:
        return
    # The cap counts a call in flight at the most it can cost: one answer of limited length.
    if args.parameters is not None and (
        not args.parameters.keys() & set(server_judge.TOKEN_LIMITS) or "n" in args.parameters
    ):
        raise UserError(
            "--max_usd: --parameters must limit the tokens of a call (max_tokens) and ask for one "
            "answer (no n)"
        )
    if costs.prices_of(args) is None:
        raise UserError(
            f"--max_usd: no price of {args.judge} is known; give --price_in and --price_out "
            "(dollars per million tokens)"
        )


# ---- main ----------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    # 1) Questions, references, prompts and answers: checked before anything is paid for.
    bench = protocol.read_bench(args.mt_bench, args.grading, args.refs)
    runs = run_answers.read_runs(args.results, bench, args.allow_incomplete)
    results_dir = next(iter(runs)).resolve().parent

    # 2) The lock and the store. Two processes at once would pay twice for the same judgements.
    with (
        disk.locked(results_dir, ".judge.lock", "is being judged"),
        closing(store.open_store(results_dir / "judgements.sqlite")) as db,
    ):
        return judge_runs(args, bench, runs, results_dir, db)


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
        judge = local_judge.open_local_judge(args)
    else:
        judge = server_judge.open_server_judge(args, db)
    plan = make_plan(judge, runs, bench, db, args)
    summary.announce(plan.judge, bench, runs, plan.items, plan.pending)
    if plan.pending and not judge.local:
        print(costs.estimate(db, plan.judge, plan.pending))
    if args.dry_run:
        if args.requests:
            batch.write_requests(args.requests, plan.items, plan.pending)
            print(f"written: {args.requests}, {len(plan.pending)} requests")
        return 0

    # 4) The paid part. Each reply is in the store before its worker makes another request; the
    #    CSV files follow every minute, and once more at the end, even if that comes early.
    store.note_items(db, plan.items)
    with calls.catch_interrupt() as interrupted:
        stopped_because = fetch_judgements(plan, runs, db, args, interrupted)
        store.write_csvs(db, runs)

    # 5) The table, the cost, and what the user does next.
    results = store.find_results(db, plan.items)
    summary.print_results(plan.judge, bench, plan.items, results, args.baseline)
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
