"""Let a judge model rate every run's MT-Bench answers from 1 to 10, or compare them with a
baseline's, both turns.

Reads   results/<run_id>/mt_bench/answers.jsonl, and questions, references and judge prompts in
data/mt_bench. Writes  results/judgements.sqlite as each judgement arrives; from it
results/<run_id>/mt_bench/judgements.csv.

Through any OpenAI-compatible server, or with a local model and no server:

    OPENAI_API_KEY=... python judge.py results/ --judge MODEL --base_url http://localhost:8000/v1
    python judge.py results/ --judge hf:/path/to/model
    python judge.py results/ --judge MODEL --grading pair --baseline dpo_b0.1_s42

What it will cost, a cap, and the provider's batch endpoint, which is cheaper:

    python judge.py results/ --judge MODEL --dry_run --requests batch.jsonl
    python judge.py results/ --judge MODEL --max_usd 20
    python judge.py results/ --judge MODEL --import_results batch_output.jsonl

The messages and the reading of the verdict are FastChat's (llm_judge/common.py). A judgement is
kept under the hash of all that determines it: it is paid for once, whatever is interrupted, rerun,
or answered twice alike.
"""

import argparse
import functools
import itertools
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

from pref.files import console, disk, mt_bench, run_folders
from pref.files.console import UserError
from pref.judging import batch, calls, costs, local_judge, protocol, server_judge, store, summary
from pref.judging.costs import Budget
from pref.judging.protocol import Judge
from pref.judging.store import Result

MOST_EMPTY = 0.1  # share of a run's answers that may have an empty turn
NO_JUDGE = """--judge is missing, and there is no default because hosted judges are withdrawn. Give one of
  --judge MODEL [--base_url URL]   a model of an OpenAI-compatible server (key in OPENAI_API_KEY)
  --judge hf:PATH                  a local folder or hub id, scored here without a server
OpenAI's gpt-4 family left its API on 2026-10-23, and GPT-4o and GPT-4.1 leave on 2027-01-14: choose a judge that
will still be there when your last run is judged."""


def read_runs(paths: list[Path], bench: dict, allow_incomplete: bool) -> dict[Path, dict]:
    """Answers of every run under `paths` that has some. Raises UserError for answers that cannot be
    judged.
    """
    runs = {}
    for run in run_folders.find_runs(paths):
        path = run / "mt_bench" / "answers.jsonl"
        if not path.is_file():
            print(
                f"no answers for run {run.resolve().name}; run python gen_mtbench.py {run}",
                file=sys.stderr,
            )
            continue
        runs[run] = mt_bench.read_answers(path)
        check_answers(path, runs[run], bench)
        check_adapter(run, runs[run])
    if not runs:
        raise UserError(
            "no run here has answers (mt_bench/answers.jsonl); run gen_mtbench.py first"
        )
    if not allow_incomplete:
        check_complete(runs)
    if len(parents := {run.resolve().parent for run in runs}) > 1:
        raise UserError(
            f"runs of {len(parents)} results folders ({', '.join(map(str, sorted(parents)))}): each has its own "
            "judgements.sqlite; judge one folder at a time"
        )
    return runs


def check_adapter(run: Path, answers: dict) -> None:
    """Raise UserError for answers of an adapter that the run no longer has."""
    weights = run / "adapter" / "adapter_model.safetensors"
    made_by = {row["adapter_sha256"] for row in answers.values() if row.get("adapter_sha256")}
    if made_by and weights.is_file() and made_by != {disk.sha256_file(weights)}:
        raise UserError(
            f"run {run.resolve().name}: its answers are of an older adapter; answer anew: python gen_mtbench.py {run}"
        )


def check_complete(runs: dict[Path, dict]) -> None:
    """Raise UserError if a run lacks a question that another has answered, or has many empty
    answers: scores of different questions do not compare, and a run that often says nothing is
    broken more likely than judged.
    """
    every = set().union(*runs.values())
    for run, answers in runs.items():
        name = run.resolve().name
        if missing := sorted(every - answers.keys()):
            raise UserError(
                f"run {name}: {len(missing)} of {len(every)} answers are missing that other runs have (question "
                f"{missing[0][0]} first); run gen_mtbench.py again, or judge what is there with --allow_incomplete"
            )
        empty = [
            key[0] for key, row in answers.items() if not all(turn.strip() for turn in row["turns"])
        ]
        if len(empty) > MOST_EMPTY * len(answers):
            raise UserError(
                f"run {name}: {len(empty)} of {len(answers)} answers have an empty turn (question {empty[0]} first); "
                "judge them as they are with --allow_incomplete"
            )


def check_answers(path: Path, answers: dict, bench: dict) -> None:
    known = {question["question_id"] for question in bench["questions"]}
    choices: dict[int, set[int]] = {}
    for (question_id, choice), row in answers.items():
        if question_id not in known:
            raise UserError(
                f"{path}: question_id {question_id} is not in {bench['folder'] / 'question.jsonl'}; "
                "give the --mt_bench folder that was answered"
            )
        choices.setdefault(question_id, set()).add(choice)
        try:
            "".join(row["turns"]).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{path}: the answer to question {question_id} is not valid Unicode"
            ) from None
    if not choices:
        raise UserError(f"{path}: no answers; delete the file and rerun gen_mtbench.py")
    every = set.union(*choices.values())
    for question_id, found in choices.items():
        if found != every:
            raise UserError(
                f"{path}: question {question_id} has choices {sorted(found)}, others {sorted(every)}; "
                "rerun gen_mtbench.py to complete them"
            )


def make_items(
    runs: dict[Path, dict], bench: dict, judge: Judge, args: argparse.Namespace
) -> list[dict]:
    """One item per run, question, choice, turn, order and repeat: the row's fields that are known
    beforehand, and its request.

    Interleaved by question over the runs, so that an interrupted evaluation has judged all runs on
    the same questions.
    """
    items = []
    baseline = answers_of_baseline(runs, args.baseline) if args.grading == "pair" else {}
    named = [
        (name, answers)
        for run, answers in runs.items()
        if (name := run.resolve().name) != args.baseline
    ]
    for repeat, question, (name, answers) in itertools.product(
        range(args.repeats), bench["questions"], named
    ):
        mine = {
            choice: row["turns"]
            for (key, choice), row in answers.items()
            if key == question["question_id"]
        }
        for (choice, turns), turn in itertools.product(mine.items(), (1, 2)):
            place = {"model_id": name, "choice": choice, "turn": turn, "repeat": repeat}
            if args.grading == "single":
                items.append(single_item(place, question, turns, bench, judge))
            elif other := baseline.get((question["question_id"], choice)):
                place["baseline"] = args.baseline
                items += pair_items(place, question, turns, other["turns"], bench, judge)
    return items


def answers_of_baseline(runs: dict[Path, dict], name: str) -> dict:
    """Raises UserError if the run `name` has no answers."""
    found = {run.resolve().name: answers for run, answers in runs.items()}
    path = (
        next(iter(runs)).resolve().parent
        / run_folders.check_run_id(name)
        / "mt_bench"
        / "answers.jsonl"
    )
    if name not in found and not path.is_file():
        raise UserError(
            f"--baseline {name}: no answers at {path}; answered runs: {', '.join(sorted(found))}"
        )
    answers = found[name] if name in found else mt_bench.read_answers(path)
    if missing := sorted(set().union(*runs.values()) - answers.keys()):
        print(
            f"--baseline {name}: has not answered {len(missing)} of the questions (question {missing[0][0]} first); "
            "these are not compared",
            file=sys.stderr,
        )
    return answers


def single_item(place: dict, question: dict, answer: list[str], bench: dict, judge: Judge) -> dict:
    reference = bench["references"].get(question["question_id"], [])
    messages = protocol.judge_messages(bench["prompts"], question, answer, place["turn"], reference)
    shown = store.answer_sha256(place["turn"], answer)
    return make_item(
        {"grading": "single", "order": "", "baseline": "", **place},
        question,
        messages,
        shown,
        bench,
        judge,
    )


def pair_items(
    place: dict, question: dict, answer: list[str], other: list[str], bench: dict, judge: Judge
) -> list[dict]:
    """Both orders."""
    items, reference = [], bench["references"].get(question["question_id"], [])
    shown = store.answer_sha256(place["turn"], answer, other)
    for order in protocol.ORDERS:
        shown_ab = (answer, other) if order == "1" else (other, answer)
        messages = protocol.pair_messages(
            bench["prompts"], question, *shown_ab, place["turn"], reference
        )
        items.append(
            make_item(
                {"grading": "pair", "order": order, **place},
                question,
                messages,
                shown,
                bench,
                judge,
            )
        )
    return items


def make_item(
    place: dict, question: dict, messages: list[dict], shown: str, bench: dict, judge: Judge
) -> dict:
    request = {
        "judge": judge.name,
        "messages": messages,
        "parameters": judge.parameters,
        "repeat": place["repeat"],
    }
    if "seed" in judge.parameters:  # a repeat with the same seed would tell nothing
        request["parameters"] = judge.parameters | {
            "seed": judge.parameters["seed"] + place["repeat"]
        }
    if place["grading"] == "pair":
        request["grading"] = "pair"
    return {
        **place,
        "question_id": question["question_id"],
        "category": question["category"],
        "judge": judge.name,
        "prompts": bench["label"],
        "refs": bench["refs"],
        "answer_sha256": shown,
        "request_sha256": disk.sha256_json(request),
        "request": request,
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s results [run ...] --judge MODEL [--option VALUE ...]  (--help explains all of them)",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit code: 0 every answer has a verdict, 1 some have none (the table says why; --retry_failed), "
        "2 something to correct, 130 Ctrl-C.",
    )
    parser.add_argument(
        "results", nargs="+", type=Path, help="results folder, or run folders inside one"
    )
    # who judges
    parser.add_argument(
        "--judge",
        help="model of an OpenAI-compatible server, or hf:PATH (folder or hub id); no default",
    )
    parser.add_argument(
        "--base_url",
        help="the server, e.g. http://localhost:8000/v1; default OPENAI_BASE_URL or OpenAI",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of an hf: judge; auto: bfloat16 where it is fast (default auto)",
    )
    # what is judged
    parser.add_argument(
        "--grading",
        choices=("single", "pair"),
        default="single",
        help="rate each answer, or compare it with --baseline's, in both orders",
    )
    parser.add_argument(
        "--baseline", metavar="RUN", help="run id that --grading pair compares with"
    )
    parser.add_argument(
        "--refs",
        default="original",
        metavar="original|corrected:FILE",
        help="reference answers: GPT-4's as published, or with FILE's put over them",
    )
    parser.add_argument(
        "--repeats", type=int, default=1, help="judgements of every answer, for retest reliability"
    )
    parser.add_argument(
        "--judge_seed", type=int, help="seed sent to the server (plus the number of the repeat)"
    )
    parser.add_argument(
        "--allow_incomplete",
        action="store_true",
        help="judge runs that lack questions others have answered, or often say nothing",
    )
    parser.add_argument(
        "--mt_bench",
        type=Path,
        default=Path("data/mt_bench"),
        help="folder of questions, references and judge prompts (default data/mt_bench)",
    )
    parser.add_argument(
        "--max_tokens",
        type=int,
        default=protocol.MAX_TOKENS,
        help=f"of a judgement; other than MT-Bench's {protocol.MAX_TOKENS} is another protocol",
    )
    parser.add_argument(
        "--parameters",
        type=json_object,
        metavar="JSON",
        help="what is sent beside the messages, instead of what a first call finds out, e.g. "
        "'{\"max_completion_tokens\": 2048}'",
    )
    # what it may cost
    parser.add_argument("--dry_run", action="store_true", help="print the estimate and stop")
    parser.add_argument(
        "--requests",
        type=Path,
        metavar="FILE",
        help="with --dry_run: write the requests as a file for OpenAI's batch endpoint",
    )
    parser.add_argument(
        "--import_results",
        type=Path,
        metavar="FILE",
        help="take that batch's output file, and stop",
    )
    parser.add_argument(
        "--max_usd",
        type=float,
        help="stop before the dollars of all judgements in this results folder pass this",
    )
    parser.add_argument("--price_in", type=float, help="dollars per million prompt tokens")
    parser.add_argument("--price_out", type=float, help="dollars per million completion tokens")
    # how calls are made
    parser.add_argument(
        "--retry_failed", action="store_true", help="ask again where an earlier try gave no verdict"
    )
    parser.add_argument(
        "--rpm", type=float, help="calls a minute at most (default: as fast as the server lets)"
    )
    parser.add_argument(
        "--concurrency", type=int, default=8, help="calls in flight at a time (default 8)"
    )
    parser.add_argument(
        "--timeout_s",
        type=float,
        default=600.0,
        help="seconds to wait for one answer (default 600)",
    )
    parser.add_argument(
        "--max_retries",
        type=int,
        default=5,
        help="tries after the first, with growing pauses, at 408, 409, 429, 5xx, timeouts and lost "
        "connections (default 5)",
    )
    args = parser.parse_args(argv)
    check_args(args)
    return args


def json_object(text: str) -> dict:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def check_args(args: argparse.Namespace) -> None:
    if not (args.judge or "").removeprefix("hf:").strip():
        raise UserError(NO_JUDGE)
    if args.judge.startswith("hf:") and args.base_url:
        raise UserError(
            "--base_url goes with a judge behind a server; --judge hf:PATH is loaded here"
        )
    if args.base_url and not re.match(r"https?://[^/]", args.base_url):
        raise UserError(f"--base_url {args.base_url}: must begin with http:// or https://")
    if args.concurrency < 1:
        raise UserError(f"--concurrency {args.concurrency}: must be at least 1")
    if args.max_tokens < 1:
        raise UserError(f"--max_tokens {args.max_tokens}: must be at least 1")
    if not args.timeout_s > 0:
        raise UserError(f"--timeout_s {args.timeout_s}: must be above 0")
    if args.max_retries < 0:
        raise UserError(f"--max_retries {args.max_retries}: must be 0 or more")
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: must be at least 1")
    if (args.grading == "pair") != (args.baseline is not None):
        raise UserError("--grading pair and --baseline RUN belong together")
    if args.refs != "original" and not re.fullmatch(r"corrected:.+", args.refs):
        raise UserError(f"--refs {args.refs}: must be original or corrected:FILE")
    if (args.price_in is None) != (args.price_out is None):
        raise UserError("--price_in and --price_out belong together")
    for key in ("price_in", "price_out", "max_usd", "rpm"):
        if getattr(args, key) is not None and not 0 <= getattr(args, key) < math.inf:
            raise UserError(f"--{key} {getattr(args, key)}: must be 0 or more")
    if args.rpm == 0:
        raise UserError("--rpm 0: must be above 0")
    sent = args.parameters or {"max_tokens": 1}
    if args.max_usd is not None and (
        not sent.keys() & {"max_tokens", "max_completion_tokens"} or "n" in sent
    ):
        raise UserError(
            "--max_usd: --parameters must limit the tokens of a call (max_tokens) and ask for one answer"
        )
    if args.max_usd is not None and costs.prices_of(args) is None:
        raise UserError(
            f"--max_usd: no price of {args.judge} is known; give --price_in and --price_out"
        )
    if args.requests and not args.dry_run:
        raise UserError("--requests: goes with --dry_run")
    if args.judge.startswith("hf:") and (
        args.requests or args.import_results or args.judge_seed is not None
    ):
        raise UserError(
            "--requests, --import_results and --judge_seed go with a judge behind a server"
        )


def plan(
    judge: Judge, runs: dict, bench: dict, db, args: argparse.Namespace
) -> tuple[list[dict], dict[str, dict]]:
    """All items and the requests still to be made, after a probe if there are any: it settles the
    parameters.
    """
    items = make_items(runs, bench, judge, args)
    pending = store.find_pending(db, items, args.retry_failed)
    sends = not args.dry_run and not args.import_results
    if (
        pending
        and judge.probe
        and sends
        and (args.max_usd is None or store.spent_usd(db) < args.max_usd)
    ):
        accepted = judge.probe(judge.parameters)
        if accepted != judge.parameters:
            judge.parameters = accepted
            items = make_items(runs, bench, judge, args)
            pending = store.find_pending(db, items, args.retry_failed)
    return items, pending


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    bench = protocol.read_bench(args.mt_bench, args.grading, args.refs)
    runs = read_runs(args.results, bench, args.allow_incomplete)
    results_dir = next(iter(runs)).resolve().parent
    with disk.locked(
        results_dir, ".judge.lock", "is being judged"
    ):  # two would pay for the same judgements
        return judge_all(args, bench, runs, results_dir)


def judge_all(
    args: argparse.Namespace, bench: dict, runs: dict[Path, dict], results_dir: Path
) -> int:
    db = store.open_store(results_dir / "judgements.sqlite")
    judge = (
        local_judge.open_local_judge(args)
        if args.judge.startswith("hf:")
        else server_judge.open_server_judge(args, db)
    )
    items, pending = plan(judge, runs, bench, db, args)
    summary.announce(judge, bench, runs, items, pending)
    if pending and not judge.local:
        print(costs.estimate(db, judge, pending))
    if args.dry_run:
        if args.requests:
            disk.write_jsonl(args.requests, batch.batch_lines(items, pending))
            print(f"written: {args.requests}, {len(pending)} requests")
        return 0
    store.note_items(db, items)

    fatal, save = None, functools.partial(store.write_csvs, db, runs)
    with calls.catch_interrupt() as interrupted:
        if args.import_results:
            batch.import_results(args.import_results, db, items, judge)
        elif pending:
            budget = Budget(judge, args.max_usd, store.spent_usd(db), args.max_retries + 1)
            fatal = calls.judge_pending(judge, pending, db, save, interrupted, budget, args.rpm)
        save()
    results, total = store.find_results(db, items), store.spent_usd(db)
    db.close()

    summary.print_table(judge, bench, items, results, args)
    print(
        f"written: {results_dir}/<run>/mt_bench/judgements.csv, from {results_dir / 'judgements.sqlite'}"
        + (f"; {total:.4f} dollars in all" if total else "")
    )
    if fatal:
        raise UserError(fatal)
    if interrupted.is_set():
        print(
            "interrupted: run the same command again to continue; what is judged is not asked again"
        )
        return 130
    missing = Counter(results.get(item["request_sha256"], Result()).status for item in items)
    if len(items) - missing["ok"]:
        print(
            f"{len(items) - missing['ok']} of {len(items)} have no verdict: the same command asks for those not "
            "judged, with --retry_failed for those that failed too"
        )
    print(f"next: python analyze.py {' '.join(map(str, args.results))}")
    return 0 if missing["ok"] == len(items) else 1


if __name__ == "__main__":
    console.run_main(main)
