"""Let a judge model rate every run's MT-Bench answers from 1 to 10, or compare them with a baseline's, both turns.

Reads   results/<run_id>/mt_bench/answers.jsonl, and questions, references and judge prompts in data/mt_bench.
Writes  results/judgements.sqlite as each judgement arrives; from it results/<run_id>/mt_bench/judgements.csv.

Through any OpenAI-compatible server, or with a local model and no server:

    OPENAI_API_KEY=... python judge.py results/ --judge MODEL --base_url http://localhost:8000/v1
    python judge.py results/ --judge hf:/path/to/model
    python judge.py results/ --judge MODEL --grading pair --baseline dpo_b0.1_s42

What it will cost, a cap, and the provider's batch endpoint, which is cheaper:

    python judge.py results/ --judge MODEL --dry_run --requests batch.jsonl
    python judge.py results/ --judge MODEL --max_usd 20
    python judge.py results/ --judge MODEL --import_results batch_output.jsonl

The messages and the reading of the verdict are FastChat's (llm_judge/common.py). A judgement is kept under the
hash of all that determines it: it is paid for once, whatever is interrupted, rerun, or answered twice alike.
"""

import argparse
import functools
import itertools
import json
import math
import os
import re
import signal
import sqlite3
import string
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from files import (
    JUDGEMENT_COLUMNS,
    MT_BENCH_FILES,
    SMOKE_TEST_BELOW_B,
    WRONG_REFERENCES,
    UserError,
    check_run_id,
    find_runs,
    locked,
    params_from_name,
    read_answers,
    read_json,
    read_jsonl,
    read_questions,
    run_main,
    sha256_file,
    sha256_json,
    write_jsonl,
    write_judgements,
)
from server import FATAL_STATUS, clean, complete, explain, is_out_of_credit, open_client, server_of, writable

NEEDS_REFERENCE = frozenset(("math", "reasoning", "coding"))  # FastChat's NEED_REF_CATS
QUESTIONS, REFERENCES = {"question_1", "question_2"}, {"ref_answer_1", "ref_answer_2"}
PAIR_ANSWERS = {"answer_a_1", "answer_a_2", "answer_b_1", "answer_b_2"}
PROMPT_FIELDS = {  # by grading: the judge prompts that are used, and what each must have a place for
    "single": {
        "single-v1": {"question", "answer"},
        "single-math-v1": {"question", "answer", "ref_answer_1"},
        "single-v1-multi-turn": {*QUESTIONS, "answer_1", "answer_2"},
        "single-math-v1-multi-turn": {*QUESTIONS, *REFERENCES, "answer_1", "answer_2"},
    },
    "pair": {
        "pair-v2": {"question", "answer_a", "answer_b"},
        "pair-math-v1": {"question", "answer_a", "answer_b", "ref_answer_1"},
        "pair-v2-multi-turn": {*QUESTIONS, *PAIR_ANSWERS},
        "pair-math-v1-multi-turn": {*QUESTIONS, *REFERENCES, *PAIR_ANSWERS},
    },
}
OUTPUT_FORMATS = {"single": "[[rating]]", "pair": "[[A]]"}
VERDICTS = {"[[A]]": "A", "[[B]]": "B", "[[C]]": "tie"}  # looked for in this order, as FastChat does
ORDERS = ("1", "2")  # of a pair: the run's answer is shown as A, or as B
RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
RATING_BACKUP = re.compile(r"\[(\d+\.?\d*)\]")
RATINGS = tuple(range(1, 11))
RATING_STRINGS = tuple(f"[[{rating}]]" for rating in RATINGS)
TEMPERATURE, MAX_TOKENS = 0, 2048  # FastChat's
# US dollars per million prompt and completion tokens as OpenAI published them in August 2025, by the model's exact
# name: a longer one may be another model at ten times the price. --price_in and --price_out stand above it.
PRICES_OF = "August 2025"
PRICES = {
    "gpt-5-nano": (0.05, 0.40), "gpt-5-mini": (0.25, 2.00), "gpt-5": (1.25, 10.00), "gpt-4.1-nano": (0.10, 0.40),
    "gpt-4.1-mini": (0.40, 1.60), "gpt-4.1": (2.00, 8.00), "gpt-4o-mini": (0.15, 0.60), "gpt-4o": (2.50, 10.00),
    "gpt-4-turbo": (10.00, 30.00), "gpt-4": (30.00, 60.00),
}  # fmt: skip
BATCH_DISCOUNT = 0.5  # what a batch endpoint charges of the price
CHARS_A_TOKEN, COMPLETION_TOKENS = 4.0, 250  # guesses until this judge has answered
ENOUGH_TO_LEARN = 20  # judgements that replace the guesses
PROBE = [{"role": "user", "content": "Reply with the single word OK."}]
MOST_EMPTY = 0.1  # share of a run's answers that may have an empty turn
GIVE_UP_AFTER = 10  # calls in a row without a connection: the server is gone
LOOK_EVERY_S = 0.5  # how often the waiting main thread looks up
SYNC_EVERY_S = 5.0  # how often the store is synced to the disk
SAVE_EVERY_S = 60.0  # how often judgements.csv is written during a run
# Fixed, or a rerun on another day or with another default would be another prompt: Llama-3's template writes
# today's date, Qwen3's leaves room for thinking, after which no rating can stand directly.
TEMPLATE_OPTIONS = {"date_string": "26 Jul 2024", "enable_thinking": False}

SCHEMA_VERSION = 1
# `judgements`: what a request brought. `asked`: which run's answer made which request; NULL would not be unique in a
# primary key, so that a field without meaning for single grading is ''.
SCHEMA = """
CREATE TABLE IF NOT EXISTS judgements (
    request_sha256 TEXT PRIMARY KEY, judge TEXT NOT NULL, judge_params_b REAL, request TEXT NOT NULL,
    status TEXT NOT NULL, score REAL, winner TEXT, judgement TEXT, served_model TEXT, system_fingerprint TEXT,
    prompt_tokens INTEGER, completion_tokens INTEGER, cost_usd REAL, tries INTEGER NOT NULL, tstamp REAL NOT NULL);
CREATE TABLE IF NOT EXISTS asked (
    model_id TEXT, question_id INTEGER, turn INTEGER, choice INTEGER, category TEXT, grading TEXT, "order" TEXT,
    baseline TEXT, judge TEXT, prompts TEXT, repeat INTEGER, refs TEXT, answer_sha256 TEXT, request_sha256 TEXT,
    PRIMARY KEY (model_id, question_id, turn, choice, grading, "order", baseline, judge, prompts, repeat, refs));
"""
REPLY_COLUMNS = (
    "status", "score", "winner", "judgement", "served_model", "system_fingerprint", "prompt_tokens",
    "completion_tokens", "cost_usd",
)  # fmt: skip
ASKED_COLUMNS = (
    "model_id", "question_id", "turn", "choice", "category", "grading", "order", "baseline", "judge", "prompts",
    "repeat", "refs", "answer_sha256", "request_sha256",
)  # fmt: skip
NO_JUDGE = """--judge is missing, and there is no default because hosted judges are withdrawn. Give one of
  --judge MODEL [--base_url URL]   a model of an OpenAI-compatible server (key in OPENAI_API_KEY)
  --judge hf:PATH                  a local folder or hub id, scored here without a server
OpenAI's gpt-4 family left its API on 2026-10-23, and GPT-4o and GPT-4.1 leave on 2027-01-14: choose a judge that
will still be there when your last run is judged."""


@dataclass
class Judge:
    """A judge: `ask` maps a request (`messages`, `parameters`) to a reply, a dict with at least `status`."""

    name: str  # as given with --judge
    params_b: float | None  # billions of parameters, None if unknown
    parameters: dict  # all that is sent beside the messages, or that determines a local score
    ask: Callable[[dict], dict]
    concurrency: int
    probe: Callable[[dict], dict] | None = None  # parameters -> parameters that the server accepts
    prices: tuple[float, float] | None = None  # dollars per million prompt and completion tokens; None: unknown
    local: bool = False

    def cost(self, prompt_tokens: int | None, completion_tokens: int | None) -> float | None:
        """Dollars, or None without a price or a count."""
        if self.prices is None or prompt_tokens is None or completion_tokens is None:
            return None
        return (prompt_tokens * self.prices[0] + completion_tokens * self.prices[1]) / 1e6


# ---- the benchmark ------------------------------------------------------------------------------


def read_bench(folder: Path, grading: str, refs: str) -> dict:
    """`questions`, `references` by question, `prompts` by name, `label` ("mt_bench" or "own"), `refs`. All checked.

    Raises UserError with file, line and remedy for whatever would spoil a judgement.
    """
    if not folder.is_dir():
        raise UserError(f"--mt_bench {folder}: no such folder; run python prep_data.py --mt_bench")
    questions = read_questions(folder / "question.jsonl")
    references = read_references(folder / "reference_answer/gpt-4.jsonl", questions)
    if refs != "original":
        refs = correct_references(references, Path(refs.removeprefix("corrected:")), questions)
    return {
        "folder": folder,
        "questions": questions,
        "references": references,
        "refs": refs,
        "prompts": read_prompts(folder / "judge_prompts.jsonl", grading),
        "label": label_prompts(folder),
    }


def correct_references(references: dict[int, list[str]], path: Path, questions: list[dict]) -> str:
    """Put the reference answers in `path` (FastChat's form, any number of questions) over the others. Returns the name
    under which their judgements stand. Raises UserError for one that belongs to no question."""
    known = {question["question_id"] for question in questions}
    for (question_id, choice), row in read_answers(path).items():
        if question_id not in known:
            raise UserError(f"--refs corrected:{path}: question {question_id} is not in the question file")
        if choice == 0:
            references[question_id] = row["turns"]
    return f"corrected:{sha256_file(path)[:12]}"


def read_references(path: Path, questions: list[dict]) -> dict[int, list[str]]:
    """The two reference turns by question id. Raises UserError if a question that needs them has none."""
    references = {key[0]: row["turns"] for key, row in read_answers(path).items() if key[1] == 0}
    for question in questions:
        turns = references.get(question["question_id"], [])
        if question["category"] in NEEDS_REFERENCE and not (turns and all(turn.strip() for turn in turns)):
            raise UserError(
                f"{path}: no reference for question {question['question_id']} ({question['category']}); "
                "run python prep_data.py --mt_bench again"
            )
    return references


def read_prompts(path: Path, grading: str) -> dict[str, dict]:
    """The judge prompts of PROMPT_FIELDS by name. Raises UserError if one is missing or lacks a field."""
    prompts, wanted = {}, PROMPT_FIELDS[grading]
    for number, row in read_jsonl(path):
        if row.get("name") in wanted:
            check_prompt(f"{path}:{number}", row, grading)
            prompts[row["name"]] = row
    if missing := sorted(wanted.keys() - prompts.keys()):
        raise UserError(f"{path}: no prompt named {', '.join(missing)}; run python prep_data.py --mt_bench again")
    return prompts


def check_prompt(place: str, row: dict, grading: str) -> None:
    if not all(isinstance(row.get(key), str) for key in ("system_prompt", "prompt_template")):
        raise UserError(f"{place}: 'system_prompt' and 'prompt_template' must be text")
    if row.get("output_format") != OUTPUT_FORMATS[grading]:
        raise UserError(f"{place}: 'output_format' of {row['name']} must be \"{OUTPUT_FORMATS[grading]}\"")
    try:
        fields = {field for _, field, _, _ in string.Formatter().parse(row["prompt_template"]) if field is not None}
    except ValueError as error:
        raise UserError(f"{place}: prompt_template: {error}; write literal braces as {{{{ and }}}}") from None
    if fields != PROMPT_FIELDS[grading][row["name"]]:
        wanted = ", ".join(f"{{{field}}}" for field in sorted(PROMPT_FIELDS[grading][row["name"]]))
        raise UserError(f"{place}: prompt_template of {row['name']} must hold exactly the fields {wanted}")


def label_prompts(folder: Path) -> str:
    """ "mt_bench" if the judge is asked with MT-Bench's own files, else "own": such scores compare with nothing else.

    Raises UserError if manifest.json says "mt_bench" of prompts that are not.
    """
    differing = [name for name, sha256 in MT_BENCH_FILES.items() if sha256_file(folder / name) != sha256]
    if not (folder / "manifest.json").is_file():
        return "own" if differing else "mt_bench"
    label = read_json(folder / "manifest.json").get("prompts")
    if label not in ("mt_bench", "own"):
        raise UserError(f'{folder / "manifest.json"}: \'prompts\' must be "mt_bench" or "own"; rerun prep_data.py')
    if label == "mt_bench" and "judge_prompts.jsonl" in differing:
        raise UserError(
            f"{folder / 'judge_prompts.jsonl'}: not MT-Bench's prompts, though manifest.json says so; "
            'run python prep_data.py --mt_bench again, or write "prompts": "own" there'
        )
    return label


# ---- answers and requests -----------------------------------------------------------------------


def read_runs(paths: list[Path], bench: dict, allow_incomplete: bool) -> dict[Path, dict]:
    """Answers of every run under `paths` that has some. Raises UserError for answers that cannot be judged."""
    runs = {}
    for run in find_runs(paths):
        path = run / "mt_bench" / "answers.jsonl"
        if not path.is_file():
            print(f"no answers for run {run.resolve().name}; run python gen_mtbench.py {run}", file=sys.stderr)
            continue
        runs[run] = read_answers(path)
        check_answers(path, runs[run], bench)
        check_adapter(run, runs[run])
    if not runs:
        raise UserError("no run here has answers (mt_bench/answers.jsonl); run gen_mtbench.py first")
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
    if made_by and weights.is_file() and made_by != {sha256_file(weights)}:
        raise UserError(
            f"run {run.resolve().name}: its answers are of an older adapter; answer anew: python gen_mtbench.py {run}"
        )


def check_complete(runs: dict[Path, dict]) -> None:
    """Raise UserError if a run lacks a question that another has answered, or has many empty answers: scores of
    different questions do not compare, and a run that often says nothing is broken more likely than judged."""
    every = set().union(*runs.values())
    for run, answers in runs.items():
        name = run.resolve().name
        if missing := sorted(every - answers.keys()):
            raise UserError(
                f"run {name}: {len(missing)} of {len(every)} answers are missing that other runs have (question "
                f"{missing[0][0]} first); run gen_mtbench.py again, or judge what is there with --allow_incomplete"
            )
        empty = [key[0] for key, row in answers.items() if not all(turn.strip() for turn in row["turns"])]
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
            raise UserError(f"{path}: the answer to question {question_id} is not valid Unicode") from None
    if not choices:
        raise UserError(f"{path}: no answers; delete the file and rerun gen_mtbench.py")
    every = set.union(*choices.values())
    for question_id, found in choices.items():
        if found != every:
            raise UserError(
                f"{path}: question {question_id} has choices {sorted(found)}, others {sorted(every)}; "
                "rerun gen_mtbench.py to complete them"
            )


def judge_messages(prompts: dict, question: dict, answer: list[str], turn: int, reference: list[str]) -> list[dict]:
    """What FastChat sends to judge `turn` (1 or 2) of a two-turn `answer`: `run_judge_single`, byte for byte.

    Turn 2 shows both turns. Texts are put in with str.format, so that braces in an answer stay as they are.
    """
    if turn == 1:
        fields = {"question": question["turns"][0], "answer": answer[0]}
    else:
        fields = {f"question_{i}": text for i, text in enumerate(question["turns"], 1)}
        fields |= {f"answer_{i}": text for i, text in enumerate(answer, 1)}
    return fill(prompts, "single-math-v1" if question["category"] in NEEDS_REFERENCE else "single-v1", fields, question,
                turn, reference)  # fmt: skip


def pair_messages(
    prompts: dict, question: dict, answer_a: list[str], answer_b: list[str], turn: int, reference: list[str]
) -> list[dict]:
    """What FastChat sends to compare `turn` of two answers: `run_judge_pair`, byte for byte."""
    if turn == 1:
        fields = {"question": question["turns"][0], "answer_a": answer_a[0], "answer_b": answer_b[0]}
    else:
        fields = {f"question_{i}": text for i, text in enumerate(question["turns"], 1)}
        fields |= {f"answer_a_{i}": text for i, text in enumerate(answer_a, 1)}
        fields |= {f"answer_b_{i}": text for i, text in enumerate(answer_b, 1)}
    return fill(prompts, "pair-math-v1" if question["category"] in NEEDS_REFERENCE else "pair-v2", fields, question,
                turn, reference)  # fmt: skip


def fill(prompts: dict, name: str, fields: dict, question: dict, turn: int, reference: list[str]) -> list[dict]:
    """Messages of the prompt `name`, or of its form for turn 2. As in FastChat's `to_openai_api_messages`, an empty
    system prompt sends no system message."""
    if question["category"] in NEEDS_REFERENCE:
        fields |= {f"ref_answer_{i}": text for i, text in enumerate(reference[:turn], 1)}
    prompt = prompts[name if turn == 1 else f"{name}-multi-turn"]
    messages = [{"role": "user", "content": prompt["prompt_template"].format(**fields)}]
    if prompt["system_prompt"]:
        messages.insert(0, {"role": "system", "content": prompt["system_prompt"]})
    return messages


def make_items(runs: dict[Path, dict], bench: dict, judge: Judge, args: argparse.Namespace) -> list[dict]:
    """One item per run, question, choice, turn, order and repeat: the row's fields that are known beforehand, and its
    request.

    Interleaved by question over the runs, so that an interrupted evaluation has judged all runs on the same questions.
    """
    items = []
    baseline = answers_of_baseline(runs, args.baseline) if args.grading == "pair" else {}
    named = [(name, answers) for run, answers in runs.items() if (name := run.resolve().name) != args.baseline]
    for repeat, question, (name, answers) in itertools.product(range(args.repeats), bench["questions"], named):
        mine = {choice: row["turns"] for (key, choice), row in answers.items() if key == question["question_id"]}
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
    path = next(iter(runs)).resolve().parent / check_run_id(name) / "mt_bench" / "answers.jsonl"
    if name not in found and not path.is_file():
        raise UserError(f"--baseline {name}: no answers at {path}; answered runs: {', '.join(sorted(found))}")
    answers = found[name] if name in found else read_answers(path)
    if missing := sorted(set().union(*runs.values()) - answers.keys()):
        print(f"--baseline {name}: has not answered {len(missing)} of the questions (question {missing[0][0]} first); "
              "these are not compared", file=sys.stderr)  # fmt: skip
    return answers


def single_item(place: dict, question: dict, answer: list[str], bench: dict, judge: Judge) -> dict:
    reference = bench["references"].get(question["question_id"], [])
    messages = judge_messages(bench["prompts"], question, answer, place["turn"], reference)
    shown = answer_sha256(place["turn"], answer)
    return make_item(
        {"grading": "single", "order": "", "baseline": "", **place}, question, messages, shown, bench, judge
    )


def pair_items(
    place: dict, question: dict, answer: list[str], other: list[str], bench: dict, judge: Judge
) -> list[dict]:
    """Both orders."""
    items, reference = [], bench["references"].get(question["question_id"], [])
    shown = answer_sha256(place["turn"], answer, other)
    for order in ORDERS:
        shown_ab = (answer, other) if order == "1" else (other, answer)
        messages = pair_messages(bench["prompts"], question, *shown_ab, place["turn"], reference)
        items.append(make_item({"grading": "pair", "order": order, **place}, question, messages, shown, bench, judge))
    return items


def answer_sha256(turn: int, *answers: list[str]) -> str:
    """Of what is judged: turn 2 is judged in the light of turn 1, a pair with both its answers."""
    return sha256_json(answers[0][:turn] if len(answers) == 1 else [answer[:turn] for answer in answers])


def make_item(place: dict, question: dict, messages: list[dict], shown: str, bench: dict, judge: Judge) -> dict:
    request = {
        "judge": judge.name,
        "messages": messages,
        "parameters": judge.parameters,
        "repeat": place["repeat"],
    }
    if "seed" in judge.parameters:  # a repeat with the same seed would tell nothing
        request["parameters"] = judge.parameters | {"seed": judge.parameters["seed"] + place["repeat"]}
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
        "request_sha256": sha256_json(request),
        "request": request,
    }


# ---- the store ----------------------------------------------------------------------------------


def open_store(path: Path) -> sqlite3.Connection:
    """The judgements of a results folder, made if new. Every statement commits by itself (isolation_level None).

    Raises UserError if the file is no judgement store or another version's.
    """
    try:
        store = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)  # Calls.lock guards it
        version = store.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, SCHEMA_VERSION):
            raise UserError(f"{path}: written by another version (schema {version}); move it away to judge anew")
        store.execute("PRAGMA journal_mode = WAL")
        # A commit is safe from kill -9 as soon as it returns; against a power cut SYNC_EVERY_S syncs it. A sync of each
        # would take longer than the calls do.
        store.execute("PRAGMA synchronous = NORMAL")
        store.executescript(SCHEMA)
        store.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    except sqlite3.Error as error:
        raise UserError(f"{path}: cannot be used as judgement store: {error}; move it away or free it") from None
    return store


def note_items(store: sqlite3.Connection, items: list[dict]) -> None:
    """Write down which run asks for which judgement; a unit's newest request takes the place of an older one."""
    names = ", ".join(f'"{column}"' for column in ASKED_COLUMNS)
    marks = ", ".join("?" * len(ASKED_COLUMNS))
    rows = [tuple(item[column] for column in ASKED_COLUMNS) for item in items]
    store.execute("BEGIN IMMEDIATE")
    store.executemany(f"INSERT OR REPLACE INTO asked ({names}) VALUES ({marks})", rows)
    store.execute("COMMIT")


class Result(NamedTuple):
    """What a request brought."""

    status: str = "not judged"
    score: float | None = None
    winner: str | None = None  # of a pair: A, B or tie
    cost_usd: float | None = None
    served_model: str | None = None


def find_results(store: sqlite3.Connection, items: list[dict]) -> dict[str, Result]:
    """Result of each item's request that was answered or has failed, by request hash."""
    keys = {item["request_sha256"] for item in items}
    rows = store.execute(f"SELECT request_sha256, {', '.join(Result._fields)} FROM judgements")
    return {key: Result(*rest) for key, *rest in rows if key in keys}


def find_pending(store: sqlite3.Connection, items: list[dict], retry_failed: bool) -> dict[str, dict]:
    """Requests still to be made by hash, each once, in the order of `items`: new ones, and if asked for failed ones."""
    results = find_results(store, items)
    done = {key for key, result in results.items() if result.status == "ok" or not retry_failed}
    return {item["request_sha256"]: item["request"] for item in items if item["request_sha256"] not in done}


def spent_usd(store: sqlite3.Connection) -> float:
    """All that stands in this results folder's books."""
    return store.execute("SELECT COALESCE(SUM(cost_usd), 0) FROM judgements").fetchone()[0]


def save_reply(store: sqlite3.Connection, key: str, request: dict, reply: dict, params_b: float | None) -> None:
    """Keep a reply. A failure is replaced by the next try, whose cost is added to its own; a valid judgement by
    nothing."""
    row = {
        "request_sha256": key,
        "judge": request["judge"],
        "judge_params_b": params_b,
        "request": json.dumps(request, ensure_ascii=False),
        "tries": 1,
        "tstamp": time.time(),
        **{column: reply.get(column) for column in REPLY_COLUMNS},  # nothing of an earlier failure stays
    }
    kept = ("request_sha256", "tries", "cost_usd")
    updates = ", ".join(f"{column} = excluded.{column}" for column in row if column not in kept)
    paid = "CASE WHEN cost_usd IS NULL THEN excluded.cost_usd ELSE cost_usd + COALESCE(excluded.cost_usd, 0) END"
    store.execute(
        f"INSERT INTO judgements ({', '.join(row)}) VALUES ({', '.join('?' * len(row))}) ON CONFLICT (request_sha256) "
        f"DO UPDATE SET {updates}, tries = tries + 1, cost_usd = {paid} WHERE status != 'ok'",
        tuple(row.values()),
    )


def first_parameters(store: sqlite3.Connection, args: argparse.Namespace) -> dict:
    """--parameters, or what this judge last accepted, so that a rerun finds its judgements without asking it."""
    if args.parameters is not None:
        parameters = dict(args.parameters)
    else:
        row = store.execute(
            "SELECT request FROM judgements WHERE judge = ? AND status = 'ok' ORDER BY tstamp DESC LIMIT 1",
            (args.judge,),
        ).fetchone()
        parameters = {"temperature": TEMPERATURE, "max_tokens": args.max_tokens}
        accepted = {k: v for k, v in json.loads(row[0])["parameters"].items() if k != "seed"} if row else {}
        limits = ("max_tokens", "max_completion_tokens")
        if row and accepted.keys() <= {"temperature", *limits} and accepted.get("temperature", 0) == TEMPERATURE:
            parameters = {k: args.max_tokens if k in limits else value for k, value in accepted.items()}
    return parameters if args.judge_seed is None else parameters | {"seed": args.judge_seed}


def write_csvs(store: sqlite3.Connection, runs: dict[Path, dict]) -> None:
    """Write each run's judgements.csv: what any judge has said of the answers that the run has now."""
    columns = ", ".join(f'{"asked" if c in ASKED_COLUMNS else "judgements"}."{c}"' for c in JUDGEMENT_COLUMNS)
    query = (
        f"SELECT {columns} FROM asked JOIN judgements USING (request_sha256) WHERE model_id = ? "
        'ORDER BY asked.judge, prompts, grading, baseline, refs, question_id, turn, choice, "order", repeat'
    )
    others = {run.resolve().name: answers for run, answers in runs.items()}
    for run, answers in runs.items():
        rows = [dict(zip(JUDGEMENT_COLUMNS, row)) for row in store.execute(query, (run.resolve().name,))]
        for name in {row["baseline"] for row in rows} - others.keys() - {""}:
            path = run.resolve().parent / name / "mt_bench" / "answers.jsonl"
            others[name] = read_answers(path) if path.is_file() else {}
        fresh = [row for row in rows if is_fresh(row, answers, others)]
        for row in fresh:
            row["winner"] = winner_of(row["order"], row["winner"], row["model_id"], row["baseline"])
        write_judgements(run / "mt_bench" / "judgements.csv", fresh)


def is_fresh(row: dict, answers: dict, others: dict[str, dict]) -> bool:
    """Whether the judgement is of the answers that the run, and the baseline of a pair, have now."""
    key = (row["question_id"], row["choice"])
    sides = [answers] if row["grading"] == "single" else [answers, others[row["baseline"]]]
    if any(key not in side for side in sides):
        return False
    return row["answer_sha256"] == answer_sha256(row["turn"], *(side[key]["turns"] for side in sides))


def winner_of(order: str, verdict: str | None, run: str, baseline: str) -> str | None:
    """Who won one order of a pair: the run's name, the baseline's, or 'tie'."""
    if verdict in (None, "tie"):
        return verdict
    return run if (verdict == "A") == (order == ORDERS[0]) else baseline


# ---- a judge behind a server --------------------------------------------------------------------


def read_rating(text: str) -> float | None:
    """The rating as FastChat finds it: the first [[x]], else the first [x]; None if there is none from 1 to 10."""
    match = RATING.search(text) or RATING_BACKUP.search(text)
    rating = float(match[1]) if match else 0.0
    return rating if 1 <= rating <= 10 else None


def read_verdict(text: str) -> str | None:
    """'A', 'B' or 'tie' as FastChat finds it, else None."""
    return next((verdict for mark, verdict in VERDICTS.items() if mark in text), None)


def open_server_judge(args: argparse.Namespace, store: sqlite3.Connection) -> Judge:
    """A judge behind an OpenAI-compatible server. Nothing is sent yet."""
    sends = not (args.dry_run or args.import_results)  # or no key is needed
    client = open_client("a judge behind a server", args.base_url, args.timeout_s, args.max_retries) if sends else None
    return Judge(
        name=args.judge,
        params_b=params_from_name(args.judge),
        parameters=first_parameters(store, args),
        ask=functools.partial(ask_server, client),
        concurrency=args.concurrency,
        probe=functools.partial(probe_server, client, args.judge) if args.parameters is None else None,
        prices=prices_of(args),
    )


def prices_of(args: argparse.Namespace) -> tuple[float, float] | None:
    """Dollars per million prompt and completion tokens: --price_in and --price_out, or the table's."""
    if args.price_in is not None and args.price_out is not None:
        return args.price_in, args.price_out
    server = args.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    return PRICES.get(args.judge) if "//api.openai.com/" in server else None  # another provider has its own prices


def ask_server(client, request: dict) -> dict:
    """One judgement. The client retries 408, 409, 429, 5xx and lost connections; then the failure is the reply.

    Raises UserError for what no later request will cure (FATAL_STATUS, no credit).
    """
    import openai

    try:
        text = complete(client, {"model": request["judge"], "messages": request["messages"], **request["parameters"]})
    except openai.APITimeoutError:
        return {"status": "timeout"}
    except openai.APIConnectionError as error:
        return {"status": "connection", "judgement": clean(client, str(error.__cause__ or error))}
    except openai.APIStatusError as error:
        if error.status_code in FATAL_STATUS or is_out_of_credit(error):
            raise UserError(explain(client, "--judge", request["judge"], error)) from None
        return {"status": f"http_{error.status_code}", "judgement": clean(client, error.message)[:2000]}
    return read_reply(functools.partial(clean, client), text, request)


def read_reply(clean: Callable[[str], str], text: str, request: dict) -> dict:
    """The reply in a server's answer: `ok` with a score or a winner, or the reason there is none."""
    try:
        body = json.loads(text)
        choice = body["choices"][0]
        message, usage = choice["message"], body.get("usage") or {}
        content, refusal = message.get("content"), message.get("refusal")
        counts = {key: usage.get(key) for key in ("prompt_tokens", "completion_tokens")}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return {"status": "not_openai", "judgement": clean(text)[:2000]}
    content = content if isinstance(content, str) else ""
    pair = request.get("grading") == "pair"
    rating = read_verdict(content) if pair else read_rating(content)
    if refusal or choice.get("finish_reason") == "content_filter":
        status = "refused"
    elif rating is not None:
        status = "ok"
    elif choice.get("finish_reason") == "length":
        status = "length"
    else:
        status = "parse" if content.strip() else "empty"
    return {
        "status": status,
        "score": rating if status == "ok" and not pair else None,
        "winner": rating if status == "ok" and pair else None,
        "judgement": clean(content or str(refusal or "")),
        "served_model": clean(str(body.get("model") or "")),
        "system_fingerprint": clean(str(body.get("system_fingerprint") or "")),
        **{key: count if isinstance(count, int) else None for key, count in counts.items()},
    }


def probe_server(client, name: str, parameters: dict) -> dict:
    """Ask one small question before the paid ones; returns the parameters that the server accepts.

    Newer models refuse `temperature`, and `max_tokens` in favour of `max_completion_tokens`. What is refused is
    left out or renamed, once. Raises UserError if the judge does not answer.
    """
    import openai

    warn_of_shutdown(client, name)
    print(f"asking {name} for a first answer", file=sys.stderr)
    quick = client.with_options(max_retries=min(2, client.max_retries))  # a wrong address should show soon
    while True:
        try:
            text = complete(quick, {"model": name, "messages": PROBE, **parameters})
            break
        except (openai.APIConnectionError, openai.APIStatusError) as error:
            adapted = adapt_parameters(parameters, error)
            if adapted is None:
                raise UserError(explain(client, "--judge", name, error)) from None
            parameters = adapted
            print(f"{name} refuses that; asking with {json.dumps(parameters)} (noted in the key)", file=sys.stderr)
    if read_reply(functools.partial(clean, client), text, {})["status"] == "not_openai":
        raise UserError(
            f"--judge {name}: {server_of(client)} is no OpenAI-compatible server; does --base_url lack its /v1?"
        )
    return parameters


def warn_of_shutdown(client, name: str) -> None:
    """Say when the provider will withdraw the model, if its list of models knows."""
    import openai

    try:
        listed = client.with_options(max_retries=0, timeout=30).models.list().data or []
    except (openai.OpenAIError, ValueError, AttributeError):
        return  # not every server has such a list; the probe will say what is wrong
    for model in listed:
        if getattr(model, "id", None) == name and (date := getattr(model, "shutdown_date", None)):
            when = time.strftime("%Y-%m-%d", time.gmtime(date)) if isinstance(date, int | float) else str(date)
            print(f"warning: {name} will be shut down on {clean(client, when)}; judgements made after it are another "
                  "judge's", file=sys.stderr)  # fmt: skip


def adapt_parameters(parameters: dict, error) -> dict | None:
    """`parameters` without the one that this refusal names, or None if it names none that can be spared."""
    if getattr(error, "status_code", None) not in (400, 422):
        return None
    named = f"{error.param} {error.message}"
    for key in ("temperature", "seed"):
        if key in parameters and key in named:
            return {name: value for name, value in parameters.items() if name != key}
    if "max_tokens" in parameters and "max_tokens" in named:
        renamed = {"max_tokens": "max_completion_tokens"}
        return {renamed.get(key, key): value for key, value in parameters.items()}
    return None


# ---- a local judge ------------------------------------------------------------------------------


def open_local_judge(args: argparse.Namespace) -> Judge:
    """A transformers model that scores here, one request at a time, without generating or parsing."""
    from modeling import fingerprint  # with torch and PEFT behind it: a judge behind a server needs neither

    model, tokenizer = load_judge(args.judge.removeprefix("hf:"), args.dtype)
    return Judge(
        name=args.judge,
        params_b=sum(parameter.numel() for parameter in model.parameters()) / 1e9,
        parameters={
            "method": "expected_rating",
            "dtype": str(model.dtype).removeprefix("torch."),
            "weights": fingerprint(model),
            "template": sha256_json([tokenizer.chat_template, TEMPLATE_OPTIONS]),
        },
        ask=functools.partial(ask_local, model, tokenizer),
        concurrency=1,
        local=True,
    )


def load_judge(path: str, dtype: str):
    """Model and tokenizer of a local folder or hub id. Raises UserError if it cannot serve as a judge."""
    import jinja2
    import torch
    import transformers

    from modeling import pick_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=pick_dtype(dtype, device), trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--judge hf:{path}: not a model folder or hub id that can be loaded: {said}") from None
    if not tokenizer.chat_template:
        raise UserError(f"--judge hf:{path}: has no chat template; take an instruction-tuned model")
    try:
        shown = render(tokenizer, [{"role": "system", "content": "<<1>>"}, {"role": "user", "content": "<<2>>"}])
    except jinja2.TemplateError as error:
        shown = str(error)
    if "<<1>>" not in shown:
        raise UserError(f"--judge hf:{path}: its chat template takes no system message, MT-Bench's prompts have one")
    try:
        return model.to(device).eval(), tokenizer
    except torch.OutOfMemoryError:
        raise UserError(
            f"--judge hf:{path}: does not fit into this GPU's memory; serve it and give --base_url"
        ) from None


def render(tokenizer, messages: list[dict]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **TEMPLATE_OPTIONS)


def encode_ratings(
    tokenizer, prompt: str, strings: Iterable[str] = RATING_STRINGS
) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt and of each string "[[1]]" ... "[[10]]" after it.

    Prompt and string are tokenised as one text, as a transcript that holds the rating would be: encoded alone, a
    SentencePiece tokenizer puts a space before it. Where the two merge across the boundary (Llama-2: "]" + "[["
    is a token), the prompt would no longer end as the model sees it when it answers; there the string stands alone.
    """
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ratings = []
    for text in strings:
        whole = tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
        if whole[: len(ids)] == ids:
            ratings.append(whole[len(ids) :])
        else:
            ratings.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids, ratings


def rating_logps(model, prompt: list[int], ratings: list[list[int]]):
    """Log-probability (sum over tokens, fp32) of each of R continuations of one prompt. Returns (R,).

    The prompt is run once; its KV cache, repeated R times, carries all continuations as one batch. Padding stands
    on the right, where a causal model's earlier positions do not see it.
    """
    import torch

    width = max(map(len, ratings))
    padded = torch.tensor([ids + [0] * (width - len(ids)) for ids in ratings], device=model.device)  # (R, L)
    real = torch.tensor([[i < len(ids) for i in range(width)] for ids in ratings], device=model.device)  # (R, L)
    with torch.inference_mode():
        out = model(torch.tensor([prompt], device=model.device), use_cache=True, logits_to_keep=1)
        first = torch.log_softmax(out.logits[0, -1].float(), dim=-1)  # (V,)
        total = first[padded[:, 0]]
        if width > 1:
            cache = out.past_key_values
            cache.batch_repeat_interleave(len(ratings))
            logits = model(padded[:, :-1], past_key_values=cache, use_cache=True).logits  # (R, L-1, V)
            logps = torch.log_softmax(logits.float(), dim=-1).gather(2, padded[:, 1:, None])[:, :, 0]
            total = total + torch.where(real[:, 1:], logps, 0.0).sum(1)
    return total


def ask_local(model, tokenizer, request: dict) -> dict:
    """One judgement: the mean of the ratings 1 to 10, each weighted by the probability of its whole string.

    Score = sum_r r p_r / sum_r p_r with p_r = P("[[r]]" | prompt). The judgement's text is the JSON of the p_r.
    Of a pair, the most probable of [[A]], [[B]], [[C]].
    Whole strings, because tokenizers split "10" differently (G-Eval, arXiv:2303.16634, weights single tokens).
    """
    import torch

    pair = request.get("grading") == "pair"
    strings = tuple(VERDICTS) if pair else RATING_STRINGS
    prompt, ratings = encode_ratings(tokenizer, render(tokenizer, request["messages"]), strings)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    counts = {"prompt_tokens": len(prompt), "completion_tokens": 0}
    if len(prompt) + max(map(len, ratings)) > limit:
        return {"status": "context", "judgement": f"prompt of {len(prompt)} tokens, context of {limit}", **counts}
    try:
        logps = rating_logps(model, prompt, ratings).double()
    except torch.OutOfMemoryError:
        return {"status": "memory", "judgement": f"a prompt of {len(prompt)} tokens needs more GPU memory", **counts}
    weights = logps.softmax(dim=0).tolist()
    score = sum(rating * weight for rating, weight in zip(RATINGS, weights))  # of a pair: no meaning but finiteness
    if not math.isfinite(score):
        return {"status": "nonfinite", "judgement": "the model's log-probabilities are not finite", **counts}
    if pair:
        probabilities = json.dumps(dict(zip(VERDICTS, logps.exp().tolist())))
        return {"status": "ok", "winner": VERDICTS[strings[int(logps.argmax())]], "judgement": probabilities, **counts}
    probabilities = json.dumps(dict(zip(RATINGS, logps.exp().tolist())))
    return {"status": "ok", "score": min(max(score, 1.0), 10.0), "judgement": probabilities, **counts}


# ---- the run ------------------------------------------------------------------------------------


@contextmanager
def catch_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that paid calls in flight are kept. A second one ends the program."""
    interrupted = threading.Event()

    def handle(signum, frame):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        interrupted.set()
        os.write(2, b"\nstopping: waiting for what is in flight; Ctrl-C again to drop it\n")  # print may be mid-line

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


class Budget:
    """--max_usd: no call is made that could carry the results folder's total past the cap, those in flight counted at
    the most they can cost with every try that the client may make."""

    def __init__(self, judge: Judge, cap: float | None, spent: float, tries: int = 1):
        self.judge, self.cap, self.spent, self.tries, self.reserved = judge, cap, spent, tries, 0.0

    def most(self, request: dict) -> float:
        """An upper bound: a token is at least a byte, and the answer no longer than allowed."""
        if self.judge.prices is None:
            return 0.0
        prompt = sum(len(message["content"].encode()) + 16 for message in request["messages"])
        limits = [request["parameters"].get(key) for key in ("max_tokens", "max_completion_tokens")]
        return self.judge.cost(prompt, max(limit or 0 for limit in limits) or MAX_TOKENS)

    def allows(self, request: dict) -> bool:
        return self.cap is None or self.spent + self.reserved + self.tries * self.most(request) <= self.cap

    def begin(self, request: dict) -> None:
        self.reserved += self.tries * self.most(request)

    def cost(self, request: dict, reply: dict) -> float | None:
        """What the reply is booked at: by its counts; at the most it can have cost where it has none or got lost on the
        way; nothing where the server refused it. None without a price."""
        if self.judge.prices is None:
            return None
        refused = re.fullmatch(r"http_4\d\d", reply["status"])
        counted = self.judge.cost(reply.get("prompt_tokens"), reply.get("completion_tokens"))
        return counted if counted is not None else 0.0 if refused else self.most(request)

    def end(self, request: dict, cost: float | None) -> None:
        self.reserved -= self.tries * self.most(request)
        self.spent += cost or 0.0


class Calls:
    """The requests still to be made, and the workers that take one, ask, keep the reply, and take the next.

    One lock guards queue, budget and store. A reply is in the store before its worker asks again, so that a kill can
    cost no more than the calls then in flight.
    """

    def __init__(
        self, judge: Judge, pending: dict[str, dict], store: sqlite3.Connection, interrupted: threading.Event,
        budget: Budget, rpm: float | None, bar: tqdm,
    ):  # fmt: skip
        self.judge, self.store, self.interrupted, self.budget, self.bar = judge, store, interrupted, budget, bar
        self.queue, self.lock = list(pending.items())[::-1], threading.Condition()
        self.pause, self.next_call = 60 / rpm if rpm else 0.0, 0.0
        self.in_flight, self.lost, self.failures, self.fatal = 0, 0, Counter(), None

    def work(self) -> None:
        while entry := self.take():
            try:
                reply = self.judge.ask(entry[1])
            except UserError as error:
                reply, self.fatal = None, str(error)
            except BaseException as error:
                self.stop(f"unexpected {type(error).__name__}")
                raise
            self.keep(*entry, reply)

    def stop(self, why: str) -> None:
        """No further call; whoever waits is woken."""
        with self.lock:
            self.fatal = self.fatal or why
            self.lock.notify_all()

    def take(self) -> tuple[str, dict] | None:
        """The next request, when rate and budget allow it; None if there is nothing more to do."""
        with self.lock:
            while self.queue and not self.fatal and not self.interrupted.is_set():
                key, request = self.queue[-1]
                now = time.monotonic()
                if now < self.next_call:
                    self.lock.wait(self.next_call - now)
                elif self.budget.allows(request):
                    self.queue.pop()
                    self.budget.begin(request)
                    self.in_flight += 1
                    self.next_call = max(now, self.next_call) + self.pause
                    return key, request
                elif self.in_flight:
                    self.lock.wait(LOOK_EVERY_S)  # for one that may have cost less than it could
                else:
                    self.fatal = (f"--max_usd {self.budget.cap}: {self.budget.spent:.4f} dollars spent, and the next "
                                  f"call could pass the cap; {len(self.queue)} requests wait, raise it")  # fmt: skip
            self.lock.notify_all()
            return None

    def keep(self, key: str, request: dict, reply: dict | None) -> None:
        """Book a reply; None is one that the server refused for good."""
        cost = None if reply is None else self.budget.cost(request, reply)
        with self.lock:
            self.in_flight -= 1
            self.budget.end(request, cost)
            if reply is not None:
                try:
                    save_reply(self.store, key, request, reply | {"cost_usd": cost}, self.judge.params_b)
                except sqlite3.Error as error:
                    self.fatal = f"judgements.sqlite cannot be written ({error}); make room and run the command again"
                self.failures.update([reply["status"]] if reply["status"] != "ok" else [])
                self.lost = self.lost + 1 if reply["status"] == "connection" else 0
                if self.lost >= GIVE_UP_AFTER:
                    self.fatal = (f"--judge {self.judge.name}: the server is gone ({self.lost} calls without a "
                                  "connection); start it again")  # fmt: skip
                self.bar.update()
                spent = {"usd": f"{self.budget.spent:.2f}"} if self.judge.prices else {}
                self.bar.set_postfix(spent | self.failures, refresh=False)
            self.lock.notify_all()


def judge_pending(
    judge: Judge,
    pending: dict[str, dict],
    store: sqlite3.Connection,
    save: Callable,
    interrupted: threading.Event,
    budget: Budget,
    rpm: float | None = None,
) -> str | None:
    """Ask for all `pending` and keep each reply as it comes. Returns why it stopped early, or None."""
    saved_at = synced_at = time.monotonic()
    with ThreadPoolExecutor(judge.concurrency) as pool, tqdm(total=len(pending), unit="judgement", disable=None) as bar:
        calls = Calls(judge, pending, store, interrupted, budget, rpm, bar)
        workers = [pool.submit(calls.work) for _ in range(min(judge.concurrency, len(pending)))]
        try:
            while wait(workers, timeout=LOOK_EVERY_S).not_done:
                with calls.lock:
                    if time.monotonic() - synced_at > SYNC_EVERY_S:
                        store.execute("PRAGMA wal_checkpoint(PASSIVE)")
                        synced_at = time.monotonic()
                    if time.monotonic() - saved_at > SAVE_EVERY_S:
                        save()
                        saved_at = time.monotonic()
        except BaseException as error:  # or the workers would go on asking until all is paid
            calls.stop(f"unexpected {type(error).__name__}")
            raise
        for worker in workers:
            worker.result()
    return calls.fatal


# ---- what it will cost, and the batch endpoint --------------------------------------------------


def estimate(store: sqlite3.Connection, judge: Judge, pending: dict[str, dict]) -> str:
    """Calls, tokens and dollars of `pending`, from what this judge has needed so far, else from rules of thumb."""
    count, prompts, completions, length = store.execute(
        "SELECT COUNT(*), SUM(prompt_tokens), SUM(completion_tokens), SUM(LENGTH(request)) FROM judgements "
        "WHERE judge = ? AND prompt_tokens > 0 AND completion_tokens > 0", (judge.name,),
    ).fetchone()  # fmt: skip
    learned = count >= ENOUGH_TO_LEARN
    rate = prompts / length if learned else 1 / CHARS_A_TOKEN
    prompt = sum(len(json.dumps(request, ensure_ascii=False)) for request in pending.values()) * rate
    completion = len(pending) * (completions / count if learned else COMPLETION_TOKENS)
    source = f"from {count} judgements of it" if learned else "guessed"
    text = f"estimate: {len(pending)} calls, {prompt:,.0f} prompt and {completion:,.0f} completion tokens ({source})"
    if judge.prices is None:
        return f"{text}; no price known, give --price_in and --price_out (dollars per million tokens)"
    return (f"{text}, {judge.cost(prompt, completion):.2f} dollars at {judge.prices[0]:g} and {judge.prices[1]:g} per "
            f"million (known prices: {PRICES_OF})")  # fmt: skip


def batch_lines(items: list[dict], pending: dict[str, dict]) -> Iterator[dict]:
    """The requests as an OpenAI batch file has them. custom_id: question, turn, order of a pair, hash."""
    seen = set()
    for item in items:
        key = item["request_sha256"]
        if key in pending and key not in seen:
            seen.add(key)
            body = {"model": item["judge"], "messages": item["request"]["messages"], **item["request"]["parameters"]}
            yield {"custom_id": custom_id(item), "method": "POST", "url": "/v1/chat/completions", "body": body}


def custom_id(item: dict) -> str:
    parts = (
        item["question_id"],
        item["turn"],
        *([item["order"]] if item["order"] else []),
        item["request_sha256"][:32],
    )
    return "-".join(map(str, parts))


def import_results(path: Path, store: sqlite3.Connection, items: list[dict], judge: Judge) -> None:
    """Take a batch's output file into the store. Raises UserError for a file of another form."""
    waiting, taken, strange = {custom_id(item): item for item in items}, Counter(), 0
    for _, row in read_jsonl(path):
        item = waiting.get(row.get("custom_id"))
        if item is None:
            strange += 1
            continue
        response = row.get("response") or {}
        if row.get("error") or not isinstance(response, dict) or "status_code" not in response:
            reply = {"status": "batch_error", "judgement": json.dumps(row.get("error"))[:2000]}
        elif response["status_code"] != 200:
            reply = {"status": f"http_{response['status_code']}", "judgement": json.dumps(response.get("body"))[:2000]}
        else:
            reply = read_reply(writable, json.dumps(response.get("body")), item["request"])
            full = judge.cost(reply.get("prompt_tokens"), reply.get("completion_tokens"))
            reply["cost_usd"] = None if full is None else full * BATCH_DISCOUNT
        save_reply(store, item["request_sha256"], item["request"], reply, judge.params_b)
        taken[reply["status"]] += 1
    if not taken:
        raise UserError(f"{path}: none of its {strange} lines belongs to these runs, judge and settings")
    words = ", ".join(f"{count} {status}" for status, count in taken.most_common())
    print(f"{path}: {words}" + (f"; {strange} lines of other requests passed over" if strange else ""))


def announce(judge: Judge, bench: dict, runs: dict[Path, dict], items: list[dict], pending: dict) -> None:
    sent = "" if judge.local else f", asked with {json.dumps(judge.parameters)}"
    print(f"judge {judge.name}, prompts {bench['label']}{sent}" + smoke_note(judge))
    total = len(bench["questions"])
    for run, answers in runs.items():
        answered = len({question_id for question_id, _ in answers})
        empty = sum(not turn.strip() for row in answers.values() for turn in row["turns"])
        if answered < total:
            print(f"run {run.resolve().name}: {answered} of {total} questions are answered; these are judged")
        if empty:
            print(f"run {run.resolve().name}: {empty} empty turns, judged as they are")
    done = len({item["request_sha256"] for item in items}) - len(pending)
    print(f"{len(items)} judgements in {len(runs)} runs: {done} requests are already judged, {len(pending)} to ask")


def smoke_note(judge: Judge) -> str:
    if judge.params_b is None or judge.params_b >= SMOKE_TEST_BELOW_B:
        return ""
    return f" ({judge.params_b:.3g}B parameters: smoke test of the path, not a measure)"


def summarise(items: list[dict], results: dict[str, Result]) -> list[str]:
    """One run's line of the table: means over the judgements that have a score, how many those are, what failed."""
    found = [(item, results.get(item["request_sha256"], Result())) for item in items]
    scores = [(item, result.score) for item, result in found if result.status == "ok"]
    right = [score for item, score in scores if item["question_id"] not in WRONG_REFERENCES]
    return [
        items[0]["model_id"],
        mean_text([score for item, score in scores if item["turn"] == 1]),
        mean_text([score for item, score in scores if item["turn"] == 2]),
        mean_text([score for _, score in scores]),
        f"{len(scores)}/{len(items)}",
        f"{mean_text(right)} (n={len(right)})",
        failures_text(found),
        cost_text(found),
    ]


def summarise_pairs(items: list[dict], results: dict[str, Result]) -> list[str]:
    """One run's line: both orders together, a disagreement is a tie, as FastChat has it."""
    matches: dict[tuple, list] = {}
    for item in items:
        result = results.get(item["request_sha256"], Result())
        winner = winner_of(item["order"], result.winner, item["model_id"], item["baseline"])
        matches.setdefault(tuple(item[k] for k in ("question_id", "turn", "choice", "repeat")), []).append(winner)
    decided = [winners for winners in matches.values() if None not in winners]
    both = [winners[0] if len(set(winners)) == 1 else "tie" for winners in decided]
    wins, losses = (sum(winner == items[0][key] for winner in both) for key in ("model_id", "baseline"))
    found = [(item, results.get(item["request_sha256"], Result())) for item in items]
    rate = f"{(wins + 0.5 * (len(both) - wins - losses)) / len(both):.3f}" if both else "-"
    disagreed = sum(len(set(winners)) > 1 for winners in decided)
    return [items[0]["model_id"], str(wins), str(len(both) - wins - losses), str(losses), rate,
            f"{len(both)}/{len(matches)}", str(disagreed), failures_text(found), cost_text(found)]  # fmt: skip


def failures_text(found: list[tuple[dict, Result]]) -> str:
    failures = Counter(result.status for _, result in found if result.status != "ok")
    return ", ".join(f"{count} {status}" for status, count in failures.most_common()) or "-"


def cost_text(found: list[tuple[dict, Result]]) -> str:
    """Dollars of a run's judgements; those shared with another run stand in both."""
    costs = [result.cost_usd for _, result in found if result.cost_usd is not None]
    return f"{sum(costs):.4f}" if costs else "-"


def mean_text(scores: list[float]) -> str:
    return f"{sum(scores) / len(scores):.2f}" if scores else "-"


def print_rows(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def print_table(judge: Judge, bench: dict, items: list[dict], results: dict, args: argparse.Namespace) -> None:
    """Scores per run; `mean` is over the judgements of both turns, as FastChat's show_result.py has it."""
    names = dict.fromkeys(item["model_id"] for item in items)
    by_run = {name: [item for item in items if item["model_id"] == name] for name in names}
    served = sorted({r.served_model for r in results.values() if r.served_model})
    how = "single-answer grading" if args.grading == "single" else f"pairwise against {args.baseline}, two orders"
    print(f"\nMT-Bench, {how} by {judge.name}{f' (served: {served})' if served else ''}, prompts {bench['label']}, "
          f"references {bench['refs']}" + smoke_note(judge))  # fmt: skip
    if args.grading == "pair":
        head = ["run", "wins", "ties", "losses", "win rate", "n", "orders disagree", "failures", "usd"]
        print_rows([head, *(summarise_pairs(mine, results) for mine in by_run.values())])
        return
    head = ["run", "turn 1", "turn 2", "mean", "n", "no wrong refs", "failures", "usd"]
    print_rows([head, *(summarise(mine, results) for mine in by_run.values())])
    categories = list(dict.fromkeys(question["category"] for question in bench["questions"]))
    print("\nby category, both turns")
    print_rows(
        [["run", *categories], *([name, *by_category(mine, results, categories)] for name, mine in by_run.items())]
    )
    print(
        f"no wrong refs: mean without the {len(WRONG_REFERENCES)} questions whose GPT-4 reference is known to be wrong"
    )
    if bench["label"] == "own":
        print("own prompts: these scores do not compare with MT-Bench scores published elsewhere")


def by_category(items: list[dict], results: dict[str, Result], categories: list[str]) -> list[str]:
    found = [(item["category"], results.get(item["request_sha256"], Result())) for item in items]
    return [mean_text([r.score for c, r in found if c == category and r.status == "ok"]) for category in categories]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s results [run ...] --judge MODEL [--option VALUE ...]  (--help explains all of them)",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit code: 0 every answer has a verdict, 1 some have none (the table says why; --retry_failed), "
        "2 something to correct, 130 Ctrl-C.",
    )  # fmt: skip
    parser.add_argument("results", nargs="+", type=Path, help="results folder, or run folders inside one")
    # who judges
    parser.add_argument(
        "--judge", help="model of an OpenAI-compatible server, or hf:PATH (folder or hub id); no default"
    )
    parser.add_argument(
        "--base_url", help="the server, e.g. http://localhost:8000/v1; default OPENAI_BASE_URL or OpenAI"
    )
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                        help="of an hf: judge; auto: bfloat16 where it is fast (default auto)")  # fmt: skip
    # what is judged
    parser.add_argument("--grading", choices=("single", "pair"), default="single",
                        help="rate each answer, or compare it with --baseline's, in both orders")  # fmt: skip
    parser.add_argument("--baseline", metavar="RUN", help="run id that --grading pair compares with")
    parser.add_argument("--refs", default="original", metavar="original|corrected:FILE",
                        help="reference answers: GPT-4's as published, or with FILE's put over them")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=1, help="judgements of every answer, for retest reliability")
    parser.add_argument("--judge_seed", type=int, help="seed sent to the server (plus the number of the repeat)")
    parser.add_argument("--allow_incomplete", action="store_true",
                        help="judge runs that lack questions others have answered, or often say nothing")  # fmt: skip
    parser.add_argument("--mt_bench", type=Path, default=Path("data/mt_bench"),
                        help="folder of questions, references and judge prompts (default data/mt_bench)")  # fmt: skip
    parser.add_argument("--max_tokens", type=int, default=MAX_TOKENS,
                        help=f"of a judgement; other than MT-Bench's {MAX_TOKENS} is another protocol")  # fmt: skip
    parser.add_argument("--parameters", type=json_object, metavar="JSON",
                        help="what is sent beside the messages, instead of what a first call finds out, e.g. "
                        '\'{"max_completion_tokens": 2048}\'')  # fmt: skip
    # what it may cost
    parser.add_argument("--dry_run", action="store_true", help="print the estimate and stop")
    parser.add_argument("--requests", type=Path, metavar="FILE",
                        help="with --dry_run: write the requests as a file for OpenAI's batch endpoint")  # fmt: skip
    parser.add_argument("--import_results", type=Path, metavar="FILE", help="take that batch's output file, and stop")
    parser.add_argument("--max_usd", type=float,
                        help="stop before the dollars of all judgements in this results folder pass this")  # fmt: skip
    parser.add_argument("--price_in", type=float, help="dollars per million prompt tokens")
    parser.add_argument("--price_out", type=float, help="dollars per million completion tokens")
    # how calls are made
    parser.add_argument("--retry_failed", action="store_true", help="ask again where an earlier try gave no verdict")
    parser.add_argument("--rpm", type=float, help="calls a minute at most (default: as fast as the server lets)")
    parser.add_argument("--concurrency", type=int, default=8, help="calls in flight at a time (default 8)")
    parser.add_argument("--timeout_s", type=float, default=600.0, help="seconds to wait for one answer (default 600)")
    parser.add_argument("--max_retries", type=int, default=5,
                        help="tries after the first, with growing pauses, at 408, 409, 429, 5xx, timeouts and lost "
                        "connections (default 5)")  # fmt: skip
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
        raise UserError("--base_url goes with a judge behind a server; --judge hf:PATH is loaded here")
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
    if args.max_usd is not None and (not sent.keys() & {"max_tokens", "max_completion_tokens"} or "n" in sent):
        raise UserError("--max_usd: --parameters must limit the tokens of a call (max_tokens) and ask for one answer")
    if args.max_usd is not None and prices_of(args) is None:
        raise UserError(f"--max_usd: no price of {args.judge} is known; give --price_in and --price_out")
    if args.requests and not args.dry_run:
        raise UserError("--requests: goes with --dry_run")
    if args.judge.startswith("hf:") and (args.requests or args.import_results or args.judge_seed is not None):
        raise UserError("--requests, --import_results and --judge_seed go with a judge behind a server")


def plan(judge: Judge, runs: dict, bench: dict, store, args: argparse.Namespace) -> tuple[list[dict], dict[str, dict]]:
    """All items and the requests still to be made, after a probe if there are any: it settles the parameters."""
    items = make_items(runs, bench, judge, args)
    pending = find_pending(store, items, args.retry_failed)
    sends = not args.dry_run and not args.import_results
    if pending and judge.probe and sends and (args.max_usd is None or spent_usd(store) < args.max_usd):
        accepted = judge.probe(judge.parameters)
        if accepted != judge.parameters:
            judge.parameters = accepted
            items = make_items(runs, bench, judge, args)
            pending = find_pending(store, items, args.retry_failed)
    return items, pending


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    bench = read_bench(args.mt_bench, args.grading, args.refs)
    runs = read_runs(args.results, bench, args.allow_incomplete)
    results_dir = next(iter(runs)).resolve().parent
    with locked(results_dir, ".judge.lock", "is being judged"):  # two would pay for the same judgements
        return judge_all(args, bench, runs, results_dir)


def judge_all(args: argparse.Namespace, bench: dict, runs: dict[Path, dict], results_dir: Path) -> int:
    store = open_store(results_dir / "judgements.sqlite")
    judge = open_local_judge(args) if args.judge.startswith("hf:") else open_server_judge(args, store)
    items, pending = plan(judge, runs, bench, store, args)
    announce(judge, bench, runs, items, pending)
    if pending and not judge.local:
        print(estimate(store, judge, pending))
    if args.dry_run:
        if args.requests:
            write_jsonl(args.requests, batch_lines(items, pending))
            print(f"written: {args.requests}, {len(pending)} requests")
        return 0
    note_items(store, items)

    fatal, save = None, functools.partial(write_csvs, store, runs)
    with catch_interrupt() as interrupted:
        if args.import_results:
            import_results(args.import_results, store, items, judge)
        elif pending:
            budget = Budget(judge, args.max_usd, spent_usd(store), args.max_retries + 1)
            fatal = judge_pending(judge, pending, store, save, interrupted, budget, args.rpm)
        save()
    results, total = find_results(store, items), spent_usd(store)
    store.close()

    print_table(judge, bench, items, results, args)
    print(f"written: {results_dir}/<run>/mt_bench/judgements.csv, from {results_dir / 'judgements.sqlite'}"
          + (f"; {total:.4f} dollars in all" if total else ""))  # fmt: skip
    if fatal:
        raise UserError(fatal)
    if interrupted.is_set():
        print("interrupted: run the same command again to continue; what is judged is not asked again")
        return 130
    missing = Counter(results.get(item["request_sha256"], Result()).status for item in items)
    if len(items) - missing["ok"]:
        print(f"{len(items) - missing['ok']} of {len(items)} have no verdict: the same command asks for those not "
              "judged, with --retry_failed for those that failed too")  # fmt: skip
    print(f"next: python analyze.py {' '.join(map(str, args.results))}")
    return 0 if missing["ok"] == len(items) else 1


if __name__ == "__main__":
    run_main(main)
