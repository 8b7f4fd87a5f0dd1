"""The arguments of judge.py: their declaration, and what can be wrong with them."""

import argparse
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from pref.files import tasks
from pref.files.benchmarks import name_of
from pref.files.console import UserError
from pref.judging import bench_folder, benchmarks, call_arguments, costs, human_votes, judges
from pref.judging.identity import TOKEN_LIMITS
from pref.judging.judges import LOCAL, PROGRAM, SCORE, SCORE_KINDS, SERVER
from pref.judging.reading import FIRST, MIN_RATING_MASS

IMPORTS = ("import_results", "import_fastchat", "import_annotations")

NO_JUDGE = """--judge is missing, and there is no default: hosted models come and go. Give either
  --judge MODEL [--base_url URL]   a model of an OpenAI-compatible server (key in OPENAI_API_KEY)
  --judge hf:PATH                  a local folder or hub id, scored here without a server
  --judge rm:PATH                  a reward model, local folder or hub id, run here
  --judge py:FILE                  a task's Python file, whose function scores each answer
OpenAI's shutdown dates: gpt-4 family 2026-10-23, GPT-4o and GPT-4.1 2027-01-14. Choose a judge
that will still be there when your last run is judged."""


def add_judge_arguments(add: Callable) -> None:
    add(
        "--judge",
        help="model of an OpenAI-compatible server, hf:PATH (folder or hub id), rm:PATH (a "
        "reward model, which scores each answer), or py:FILE (a task, whose function scores it)",
    )
    add("--base_url", help="e.g. http://localhost:8000/v1; default OPENAI_BASE_URL, else OpenAI's")
    add(
        "--server_name",
        metavar="NAME",
        help="recorded in place of the server's address, for servers whose node or port changes; "
        "judgements under another name or address are another judge's "
        "(default: the address)",
    )
    add(
        "--min_rating_mass",
        type=float,
        default=MIN_RATING_MASS,
        metavar="SHARE",
        help="of an hf: judge, which weighs the possible verdicts (of MT-Bench the ratings 1 to "
        "10) by their probability after the judge prompt and the beginning of an answer ('Rating: "
        "[['): least probability of all of them together, else there is no score (default "
        f"{MIN_RATING_MASS})",
    )
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of an hf: or rm: judge; auto: bfloat16 where that is fast (default auto)",
    )


def add_task_arguments(add: Callable) -> None:
    add(
        "--bench",
        type=bench_of,
        default=benchmarks.DEFAULT,
        metavar="NAME|FILE",
        help=f"benchmark whose answers, results/<run>/NAME/answers.jsonl, are judged: "
        f"{', '.join(benchmarks.BENCHMARKS)} (default {benchmarks.DEFAULT}); with py:FILE and "
        "rm:PATH also a task, its set NAME_train, or a file of questions",
    )
    add(
        "--bench_data",
        type=Path,
        metavar="DIR",
        help="folder of its questions, references and judge prompts (default data/NAME)",
    )
    add(
        "--baseline",
        metavar="RUN",
        help="run id that the answers are compared with, or a model whose answers are in the "
        "benchmark's folder baseline/ (default: the benchmark's own baseline, if it has one)",
    )
    add("--repeats", type=int, default=1, help="judgements per answer (default 1)")
    add("--judge_seed", type=int, help="seed to send; the number of the repeat is added to it")
    add(
        "--allow_incomplete",
        action="store_true",
        help="also judge runs that lack answers other runs have, or have many empty answers",
    )
    add(
        "--max_tokens",
        type=int,
        help="most tokens of a judgement (default: the benchmark's, of MT-Bench 2048); another "
        "value is another protocol",
    )
    add(
        "--parameters",
        type=json_object,
        metavar="JSON",
        help="send exactly these parameters instead of probing which ones the server accepts, "
        "e.g. '{\"max_completion_tokens\": 2048}'",
    )


def bench_of(text: str) -> str:
    """The name of a benchmark as it may be spelled, or a file of questions."""
    return text if bench_folder.is_file(text) else name_of(text)


def add_validation_arguments(add: Callable) -> None:
    add(
        "--validate",
        nargs="?",
        const=human_votes.HUMAN,
        metavar="DATA",
        help="measure the judge instead: against MT-Bench's human votes (mt_bench_human, the "
        "default DATA), or on the pairs of LLMBar (llmbar), of which one answer is right; the data "
        "are in data/DATA or in --bench_data, and the result in results/judges/",
    )
    add(
        "--pairs",
        type=int,
        metavar="N",
        help="validate on a sample of N pairs of answers, stratified by category, turn and outcome "
        "(default: all, 1814 or 419); a smaller sample is a part of a larger one",
    )


def add_own_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that only some benchmarks have, a group for each set of them."""
    benches_of: dict[str, list[str]] = defaultdict(list)
    for benchmark in benchmarks.BENCHMARKS.values():
        for name in benchmark.arguments:
            benches_of[name].append(benchmark.name)
    groups: dict[str, Callable] = {}
    for name, names in benches_of.items():
        title = f"of --bench {' and '.join(names)}"
        if title not in groups:
            groups[title] = parser.add_argument_group(title).add_argument
        groups[title](f"--{name}", **benchmarks.BENCHMARKS[names[0]].arguments[name])


def add_cost_arguments(add: Callable) -> None:
    add("--dry_run", action="store_true", help="print the estimate and stop; judge nothing")
    add(
        "--runs",
        type=int,
        metavar="N",
        help="with --dry_run: estimate for N runs that need not exist yet; no results folder",
    )
    add(
        "--requests",
        type=Path,
        metavar="FILE",
        help="with --dry_run: write the requests to FILE, for OpenAI's batch endpoint; if a key is "
        "set, the judge is asked one short question, to learn which parameters it accepts",
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


def json_object(text: str) -> dict:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object, e.g. '{\"max_tokens\": 2048}'")
    return value


def check_args(args: argparse.Namespace) -> None:
    """Raise UserError for what can be wrong before any file is read."""
    if args.runs is not None:
        check_runs(args)
    elif not (args.judge or "").strip():
        raise UserError(NO_JUDGE)
    elif not args.results and not args.validate:
        raise UserError("no results folder is given; python judge.py results/ --judge MODEL")
    check_judge(args)
    if args.validate is not None:
        check_validation(args)
    elif args.pairs is not None:
        raise UserError("--pairs N: only with --validate")
    else:
        bench_folder.resolve(args)
        check_bench(args)
    if args.requests and not args.dry_run:
        raise UserError("--requests: only with --dry_run")
    if len(files := imported(args)) > 1:
        raise UserError(f"{' and '.join(f'--{name}' for name in files)}: give one of them")
    call_arguments.check_least(args, max_tokens=1, repeats=1)
    call_arguments.check_call_arguments(args)
    if args.parameters is not None:
        check_parameters(args.parameters)
    check_money(args)


def imported(args: argparse.Namespace) -> list[str]:
    """The arguments that name a file of judgements which others have made."""
    return [name for name in IMPORTS if getattr(args, name) is not None]


def check_bench(args: argparse.Namespace) -> None:
    """Raise UserError for arguments of another benchmark, or that do not fit together."""
    chosen = benchmarks.BENCHMARKS.get(args.bench)
    gives_scores = judges.kind_of(args.judge) in SCORE_KINDS
    if chosen is None and not gives_scores:
        raise UserError(
            f"--bench {args.bench}: judge.py has no prompts for it; it knows "
            f"{', '.join(benchmarks.BENCHMARKS)}, and CONTRIBUTING.md says how to add one. Judges "
            "that need no prompt, py:FILE and rm:PATH, score the answers to any questions"
        )
    own = chosen.arguments if chosen else {}
    check_own_arguments(args, args.bench, own)
    if args.bench_data and args.mt_bench:
        raise UserError("--bench_data and --mt_bench are the same folder: give one of them")
    if gives_scores:
        check_score_judge(args, own)
    elif chosen.check is not None:
        chosen.check(args)


def check_own_arguments(args: argparse.Namespace, bench: str, own: dict[str, dict]) -> None:
    """Raise UserError for an argument that only other benchmarks have."""
    for other in benchmarks.BENCHMARKS.values():
        for name in other.arguments.keys() - own.keys():
            if getattr(args, name) != other.arguments[name].get("default"):
                raise UserError(f"--{name} is for --bench {other.name}; {bench} does not have it")


def check_validation(args: argparse.Namespace) -> None:
    """Raise UserError for arguments that --validate does not have, or has otherwise."""
    if args.validate not in human_votes.DATA:
        raise UserError(
            f"--validate {args.validate}: must be {' or '.join(human_votes.DATA)}, or nothing; put "
            "the results folder first: python judge.py results/ --validate --judge MODEL"
        )
    if args.bench != benchmarks.DEFAULT or args.baseline is not None or args.runs is not None:
        raise UserError("--validate judges answers of its own: without --bench, --baseline, --runs")
    if len(args.results) > 1 or any((path / "args.json").is_file() for path in args.results):
        raise UserError("--validate: give one results folder, not runs; it validates a judge")
    if args.pairs is not None and args.pairs < 1:
        raise UserError(f"--pairs {args.pairs}: must be at least 1")
    own = benchmarks.BENCHMARKS[benchmarks.DEFAULT].arguments
    check_own_arguments(args, benchmarks.DEFAULT, own)
    if judges.kind_of(args.judge) == PROGRAM:
        raise UserError(
            f"--validate compares a judge's opinions with people's; {args.judge} has none, it "
            "measures what its task asks for. python prep_data.py --task FILE --check checks it"
        )
    if judges.kind_of(args.judge) == SCORE:
        check_score_judge(args, own)


def check_score_judge(args: argparse.Namespace, own: dict[str, dict]) -> None:
    """Raise UserError for arguments that say how a judge is asked: a score judge is not asked."""
    for name, declared in own.items():
        if name != "mt_bench" and getattr(args, name) != declared.get("default"):
            raise UserError(
                f"--{name} says how a judge is asked, or its reply is read; {args.judge} is given "
                "the answers alone, and its score is a number"
            )
    if args.repeats != 1:
        raise UserError(f"--repeats {args.repeats}: {args.judge} gives the same score again")
    if args.baseline is not None and judges.kind_of(args.judge) == PROGRAM:
        raise UserError(
            f"--baseline {args.baseline}: {args.judge} scores each answer by itself; analyze.py "
            "compares the runs' scores"
        )
    if args.min_rating_mass != MIN_RATING_MASS:
        raise UserError(f"--min_rating_mass is for hf:PATH; {args.judge} gives no ratings")


def check_runs(args: argparse.Namespace) -> None:
    """Raise UserError for --runs together with what it cannot serve."""
    if not args.dry_run:
        raise UserError(
            "--runs N: only with --dry_run; it is for an estimate before the runs exist"
        )
    if args.runs < 1:
        raise UserError(f"--runs {args.runs}: must be at least 1")
    if args.results or args.requests:
        raise UserError("--runs N estimates without answers: give no results folder, no --requests")


def check_judge(args: argparse.Namespace) -> None:
    """Raise UserError for arguments that the kind of judge does not have."""
    kind = judges.kind_of(args.judge)
    form = {LOCAL: "hf:PATH", SCORE: "rm:PATH", PROGRAM: "py:FILE"}.get(kind)
    if kind != SERVER and not judges.path_of(args.judge).strip():
        raise UserError(NO_JUDGE)
    if kind == PROGRAM:
        tasks.path_of(args.judge)
    if kind != SERVER and args.base_url:
        raise UserError(f"--base_url is for a judge behind a server; --judge {form} is loaded here")
    without = {"verdict": FIRST} | dict.fromkeys(
        ("max_tokens", "requests", *IMPORTS, "judge_seed") + ("server_name", "parameters")
    )
    why = (
        "it is asked for the probabilities of its verdicts" if kind == LOCAL else "it gives scores"
    )
    for name, default in without.items():
        if kind != SERVER and getattr(args, name) != default:
            raise UserError(
                f"--{name} is for a judge behind a server: {form} writes no text, {why}"
            )
    if not 0 <= args.min_rating_mass <= 1:
        raise UserError(f"--min_rating_mass {args.min_rating_mass}: must be from 0 to 1")
    if args.server_name and not (args.server_name.isprintable() and args.server_name.strip()):
        raise UserError(f"--server_name {args.server_name!r}: must be a name on one line")
    if args.base_url and not re.match(r"\s*https?://[^/]", args.base_url, re.IGNORECASE):
        raise UserError(f"--base_url {args.base_url}: must begin with http:// or https://")


def check_parameters(parameters: dict) -> None:
    """Raise UserError for --parameters that would ask for something else than one judgement."""
    for name in ("model", "messages", "stream"):
        if name in parameters:
            raise UserError(f"--parameters: {name} cannot be given here (the model is --judge)")
    for name in (*TOKEN_LIMITS, "seed"):
        value, least = parameters.get(name), 0 if name == "seed" else 1
        if name in parameters and (type(value) is not int or value < least):
            raise UserError(
                f"--parameters: {name} {value!r} must be a whole number, {least} or more"
            )


def check_money(args: argparse.Namespace) -> None:
    """Raise UserError for prices or a cap that cannot be kept."""
    for name in ("price_in", "price_out", "max_usd"):
        if (value := getattr(args, name)) is not None and not 0 <= value < math.inf:
            raise UserError(f"--{name} {value}: must be 0 or more")
    if (args.price_in is None) != (args.price_out is None):
        raise UserError("--price_in and --price_out: give both or neither")
    if args.max_usd is None:
        return
    if judges.kind_of(args.judge) in SCORE_KINDS:
        raise UserError(f"--max_usd: {args.judge} is run here, and costs nothing; leave it out")
    # The cap counts a call in flight at the most it can cost: one answer of limited length.
    if args.parameters is not None and (
        not args.parameters.keys() & set(TOKEN_LIMITS) or "n" in args.parameters
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
