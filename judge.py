"""Let a judge model rate every run's MT-Bench answers from 1 to 10: single-answer grading of both turns.

Reads   results/<run_id>/mt_bench/answers.jsonl, and questions, references and judge prompts in data/mt_bench.
Writes  results/judgements.sqlite as each judgement arrives; from it results/<run_id>/mt_bench/judgements.csv.

Through any OpenAI-compatible server, or with a local model and no server:

    OPENAI_API_KEY=... python judge.py results/ --judge MODEL --base_url http://localhost:8000/v1
    python judge.py results/ --judge hf:/path/to/model

The messages and the reading of the rating are FastChat's (llm_judge/common.py). A judgement is kept under the
hash of all that determines it: it is paid for once, whatever is interrupted, rerun, or answered twice alike.
"""

import argparse
import functools
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
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from files import (
    JUDGEMENT_COLUMNS,
    MT_BENCH_FILES,
    SMOKE_TEST_BELOW_B,
    WRONG_REFERENCES,
    UserError,
    find_runs,
    params_from_name,
    read_answers,
    read_json,
    read_jsonl,
    read_questions,
    run_main,
    sha256_file,
    sha256_json,
    write_judgements,
)
from server import FATAL_STATUS, clean, explain, is_out_of_credit, open_client, server_of

NEEDS_REFERENCE = frozenset(("math", "reasoning", "coding"))  # FastChat's NEED_REF_CATS
PROMPT_FIELDS = {  # the judge prompts that are used, and what each must have a place for
    "single-v1": {"question", "answer"},
    "single-math-v1": {"question", "answer", "ref_answer_1"},
    "single-v1-multi-turn": {"question_1", "answer_1", "question_2", "answer_2"},
    "single-math-v1-multi-turn": {"question_1", "answer_1", "ref_answer_1", "question_2", "answer_2", "ref_answer_2"},
}
RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
RATING_BACKUP = re.compile(r"\[(\d+\.?\d*)\]")
RATINGS = tuple(range(1, 11))
TEMPERATURE, MAX_TOKENS = 0, 2048  # FastChat's
PROBE = [{"role": "user", "content": "Reply with the single word OK."}]
GIVE_UP_AFTER = 10  # calls in a row without a connection: the server is gone
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


# ---- the benchmark ------------------------------------------------------------------------------


def read_bench(folder: Path) -> dict:
    """`questions`, `references` by question, `prompts` by name, `label` ("mt_bench" or "own"). All checked.

    Raises UserError with file, line and remedy for whatever would spoil a judgement.
    """
    if not folder.is_dir():
        raise UserError(f"--mt_bench {folder}: no such folder; run python prep_data.py --mt_bench")
    questions = read_questions(folder / "question.jsonl")
    return {
        "folder": folder,
        "questions": questions,
        "references": read_references(folder / "reference_answer/gpt-4.jsonl", questions),
        "prompts": read_prompts(folder / "judge_prompts.jsonl"),
        "label": label_prompts(folder),
    }


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


def read_prompts(path: Path) -> dict[str, dict]:
    """The judge prompts of PROMPT_FIELDS by name. Raises UserError if one is missing or lacks a field."""
    prompts = {}
    for number, row in read_jsonl(path):
        if row.get("name") in PROMPT_FIELDS:
            check_prompt(f"{path}:{number}", row)
            prompts[row["name"]] = row
    if missing := sorted(PROMPT_FIELDS.keys() - prompts.keys()):
        raise UserError(f"{path}: no prompt named {', '.join(missing)}; run python prep_data.py --mt_bench again")
    return prompts


def check_prompt(place: str, row: dict) -> None:
    if not all(isinstance(row.get(key), str) for key in ("system_prompt", "prompt_template")):
        raise UserError(f"{place}: 'system_prompt' and 'prompt_template' must be text")
    if row.get("output_format") != "[[rating]]":
        raise UserError(f"{place}: 'output_format' of {row['name']} must be \"[[rating]]\"")
    try:
        fields = {field for _, field, _, _ in string.Formatter().parse(row["prompt_template"]) if field is not None}
    except ValueError as error:
        raise UserError(f"{place}: prompt_template: {error}; write literal braces as {{{{ and }}}}") from None
    if fields != PROMPT_FIELDS[row["name"]]:
        wanted = ", ".join(f"{{{field}}}" for field in sorted(PROMPT_FIELDS[row["name"]]))
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


def read_runs(paths: list[Path], bench: dict) -> dict[Path, dict]:
    """Answers of every run under `paths` that has some. Raises UserError for answers that cannot be judged."""
    runs = {}
    for run in find_runs(paths):
        path = run / "mt_bench" / "answers.jsonl"
        if not path.is_file():
            print(f"no answers for run {run.resolve().name}; run python gen_mtbench.py {run}", file=sys.stderr)
            continue
        runs[run] = read_answers(path)
        check_answers(path, runs[run], bench)
    if not runs:
        raise UserError("no run here has answers (mt_bench/answers.jsonl); run gen_mtbench.py first")
    if len(parents := {run.resolve().parent for run in runs}) > 1:
        raise UserError(
            f"runs of {len(parents)} results folders ({', '.join(map(str, sorted(parents)))}): each has its own "
            "judgements.sqlite; judge one folder at a time"
        )
    return runs


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

    Turn 2 shows both turns. Texts are put in with str.format, so that braces in an answer stay as they are. As in
    FastChat's `to_openai_api_messages`, an empty system prompt sends no system message.
    """
    name = "single-math-v1" if question["category"] in NEEDS_REFERENCE else "single-v1"
    if turn == 1:
        fields = {"question": question["turns"][0], "answer": answer[0]}
    else:
        name += "-multi-turn"
        fields = {f"question_{i}": text for i, text in enumerate(question["turns"], 1)}
        fields |= {f"answer_{i}": text for i, text in enumerate(answer, 1)}
    if question["category"] in NEEDS_REFERENCE:
        fields |= {f"ref_answer_{i}": text for i, text in enumerate(reference[:turn], 1)}
    messages = [{"role": "user", "content": prompts[name]["prompt_template"].format(**fields)}]
    if prompts[name]["system_prompt"]:
        messages.insert(0, {"role": "system", "content": prompts[name]["system_prompt"]})
    return messages


def make_items(runs: dict[Path, dict], bench: dict, judge: Judge) -> list[dict]:
    """One item per run, question, choice and turn: the row's fields that are known beforehand, and its request.

    Interleaved by question over the runs, so that an interrupted evaluation has judged all runs on the same questions.
    """
    items = []
    for question in bench["questions"]:
        for run, answers in runs.items():
            for (question_id, choice), row in answers.items():
                if question_id == question["question_id"]:
                    for turn in (1, 2):
                        place = {"model_id": run.resolve().name, "choice": choice, "turn": turn}
                        items.append({**place, **make_item(question, row["turns"], turn, bench, judge)})
    return items


def make_item(question: dict, answer: list[str], turn: int, bench: dict, judge: Judge) -> dict:
    reference = bench["references"].get(question["question_id"], [])
    request = {
        "judge": judge.name,
        "messages": judge_messages(bench["prompts"], question, answer, turn, reference),
        "parameters": judge.parameters,
        "repeat": 0,
    }
    return {
        "question_id": question["question_id"],
        "category": question["category"],
        "grading": "single",
        "order": "",
        "baseline": "",
        "judge": judge.name,
        "prompts": bench["label"],
        "repeat": 0,
        "refs": "original",
        "answer_sha256": sha256_json(answer[:turn]),  # turn 2 is judged in the light of turn 1
        "request_sha256": sha256_json(request),
        "request": request,
    }


# ---- the store ----------------------------------------------------------------------------------


def open_store(path: Path) -> sqlite3.Connection:
    """The judgements of a results folder, made if new. Every statement commits by itself (isolation_level None).

    Raises UserError if the file is no judgement store or another version's.
    """
    try:
        store = sqlite3.connect(path, timeout=60, isolation_level=None)
        version = store.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, SCHEMA_VERSION):
            raise UserError(f"{path}: written by another version (schema {version}); move it away to judge anew")
        store.execute("PRAGMA journal_mode = WAL")
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


def find_results(store: sqlite3.Connection, items: list[dict]) -> dict[str, tuple[str, float | None]]:
    """(status, score) of each item's request that was answered or has failed, by request hash."""
    keys = {item["request_sha256"] for item in items}
    rows = store.execute("SELECT request_sha256, status, score FROM judgements")
    return {key: (status, score) for key, status, score in rows if key in keys}


def find_pending(store: sqlite3.Connection, items: list[dict]) -> dict[str, dict]:
    """Requests without a valid judgement by hash, each once, in the order of `items`: new ones and failed ones."""
    results = find_results(store, items)
    return {
        item["request_sha256"]: item["request"]
        for item in items
        if results.get(item["request_sha256"], ("", None))[0] != "ok"
    }


def save_reply(store: sqlite3.Connection, key: str, request: dict, reply: dict, params_b: float | None) -> None:
    """Keep a reply. A failure is replaced by the next try, a valid judgement by nothing."""
    row = {
        "request_sha256": key,
        "judge": request["judge"],
        "judge_params_b": params_b,
        "request": json.dumps(request, ensure_ascii=False),
        "tries": 1,
        "tstamp": time.time(),
        **{column: reply.get(column) for column in REPLY_COLUMNS},  # nothing of an earlier failure stays
    }
    updates = ", ".join(f"{column} = excluded.{column}" for column in row if column not in ("request_sha256", "tries"))
    store.execute(
        f"INSERT INTO judgements ({', '.join(row)}) VALUES ({', '.join('?' * len(row))}) "
        f"ON CONFLICT (request_sha256) DO UPDATE SET {updates}, tries = tries + 1 WHERE status != 'ok'",
        tuple(row.values()),
    )


def first_parameters(store: sqlite3.Connection, name: str, max_tokens: int) -> dict:
    """The parameters that this judge last accepted, so that a rerun finds its judgements without asking it."""
    row = store.execute(
        "SELECT request FROM judgements WHERE judge = ? AND status = 'ok' ORDER BY tstamp DESC LIMIT 1", (name,)
    ).fetchone()
    parameters = json.loads(row[0])["parameters"] if row else {"temperature": TEMPERATURE, "max_tokens": max_tokens}
    limits = ("max_tokens", "max_completion_tokens")
    return {key: max_tokens if key in limits else value for key, value in parameters.items()}


def write_csvs(store: sqlite3.Connection, runs: Iterable[Path], items: list[dict]) -> None:
    """Write each run's judgements.csv: what any judge has said of the answers that the run has now."""
    current = {tuple(item[c] for c in ("model_id", "question_id", "turn", "choice", "answer_sha256")) for item in items}
    columns = ", ".join(f'{"asked" if c in ASKED_COLUMNS else "judgements"}."{c}"' for c in JUDGEMENT_COLUMNS)
    query = (
        f"SELECT {columns} FROM asked JOIN judgements USING (request_sha256) WHERE model_id = ? "
        "ORDER BY asked.judge, prompts, question_id, turn, choice, repeat"
    )
    for run in runs:
        name = run.resolve().name
        rows = [dict(zip(JUDGEMENT_COLUMNS, row)) for row in store.execute(query, (name,))]
        fresh = [r for r in rows if (name, r["question_id"], r["turn"], r["choice"], r["answer_sha256"]) in current]
        write_judgements(run / "mt_bench" / "judgements.csv", fresh)


# ---- a judge behind a server --------------------------------------------------------------------


def read_rating(text: str) -> float | None:
    """The rating as FastChat finds it: the first [[x]], else the first [x]; None if there is none from 1 to 10."""
    match = RATING.search(text) or RATING_BACKUP.search(text)
    rating = float(match[1]) if match else 0.0
    return rating if 1 <= rating <= 10 else None


def open_server_judge(args: argparse.Namespace, store: sqlite3.Connection) -> Judge:
    """A judge behind an OpenAI-compatible server. Nothing is sent yet."""
    client = open_client("a judge behind a server", args.base_url, args.timeout_s, args.max_retries)
    return Judge(
        name=args.judge,
        params_b=params_from_name(args.judge),
        parameters=first_parameters(store, args.judge, args.max_tokens),
        ask=functools.partial(ask_server, client),
        concurrency=args.concurrency,
        probe=functools.partial(probe_server, client, args.judge),
    )


def ask_server(client, request: dict) -> dict:
    """One judgement. The client retries 408, 409, 429, 5xx and lost connections; then the failure is the reply.

    Raises UserError for what no later request will cure (FATAL_STATUS, no credit).
    """
    import openai

    try:
        raw = client.chat.completions.with_raw_response.create(
            model=request["judge"], messages=request["messages"], **request["parameters"]
        )
    except openai.APITimeoutError:
        return {"status": "timeout"}
    except openai.APIConnectionError as error:
        return {"status": "connection", "judgement": clean(client, str(error.__cause__ or error))}
    except openai.APIStatusError as error:
        if error.status_code in FATAL_STATUS or is_out_of_credit(error):
            raise UserError(explain(client, "--judge", request["judge"], error)) from None
        return {"status": f"http_{error.status_code}", "judgement": clean(client, error.message)[:2000]}
    return read_reply(client, raw.http_response.text)


def read_reply(client, text: str) -> dict:
    """The reply in a server's answer: `ok` with a score, or the reason there is none."""
    try:
        body = json.loads(text)
        choice = body["choices"][0]
        message, usage = choice["message"], body.get("usage") or {}
        content, refusal = message.get("content"), message.get("refusal")
        counts = {key: usage.get(key) for key in ("prompt_tokens", "completion_tokens")}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return {"status": "not_openai", "judgement": clean(client, text)[:2000]}
    content = content if isinstance(content, str) else ""
    rating = read_rating(content)
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
        "score": rating if status == "ok" else None,
        "judgement": clean(client, content or str(refusal or "")),
        "served_model": clean(client, str(body.get("model") or "")),
        "system_fingerprint": clean(client, str(body.get("system_fingerprint") or "")),
        **{key: count if isinstance(count, int) else None for key, count in counts.items()},
    }


def probe_server(client, name: str, parameters: dict) -> dict:
    """Ask one small question before the paid ones; returns the parameters that the server accepts.

    Newer models refuse `temperature`, and `max_tokens` in favour of `max_completion_tokens`. What is refused is
    left out or renamed, once. Raises UserError if the judge does not answer.
    """
    import openai

    print(f"asking {name} for a first answer", file=sys.stderr)
    quick = client.with_options(max_retries=min(2, client.max_retries))  # a wrong address should show soon
    while True:
        try:
            raw = quick.chat.completions.with_raw_response.create(model=name, messages=PROBE, **parameters)
            break
        except (openai.APIConnectionError, openai.APIStatusError) as error:
            adapted = adapt_parameters(parameters, error)
            if adapted is None:
                raise UserError(explain(client, "--judge", name, error)) from None
            parameters = adapted
            print(f"{name} refuses that; asking with {json.dumps(parameters)} (noted in the key)", file=sys.stderr)
    if read_reply(client, raw.http_response.text)["status"] == "not_openai":
        raise UserError(
            f"--judge {name}: {server_of(client)} is no OpenAI-compatible server; does --base_url lack its /v1?"
        )
    return parameters


def adapt_parameters(parameters: dict, error) -> dict | None:
    """`parameters` without the one that this refusal names, or None if it names none that can be spared."""
    if getattr(error, "status_code", None) not in (400, 422):
        return None
    named = f"{error.param} {error.message}"
    if "temperature" in parameters and "temperature" in named:
        return {key: value for key, value in parameters.items() if key != "temperature"}
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


def encode_ratings(tokenizer, prompt: str) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt and of each string "[[1]]" ... "[[10]]" after it.

    Prompt and string are tokenised as one text, as a transcript that holds the rating would be: encoded alone, a
    SentencePiece tokenizer puts a space before it. Where the two merge across the boundary (Llama-2: "]" + "[["
    is a token), the prompt would no longer end as the model sees it when it answers; there the string stands alone.
    """
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ratings = []
    for rating in RATINGS:
        text = f"[[{rating}]]"
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
    Whole strings, because tokenizers split "10" differently (G-Eval, arXiv:2303.16634, weights single tokens).
    """
    import torch

    prompt, ratings = encode_ratings(tokenizer, render(tokenizer, request["messages"]))
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    counts = {"prompt_tokens": len(prompt), "completion_tokens": 0}
    if len(prompt) + max(map(len, ratings)) > limit:
        return {"status": "context", "judgement": f"prompt of {len(prompt)} tokens, context of {limit}", **counts}
    try:
        logps = rating_logps(model, prompt, ratings).double()
    except torch.OutOfMemoryError:
        return {"status": "memory", "judgement": f"a prompt of {len(prompt)} tokens needs more GPU memory", **counts}
    weights = logps.softmax(dim=0).tolist()
    score = sum(rating * weight for rating, weight in zip(RATINGS, weights))
    if not math.isfinite(score):
        return {"status": "nonfinite", "judgement": "the model's log-probabilities are not finite", **counts}
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


def judge_pending(
    judge: Judge, pending: dict[str, dict], store: sqlite3.Connection, save: Callable, interrupted: threading.Event
) -> str | None:
    """Ask for all `pending` and keep each reply as it comes. Returns why it stopped early, or None.

    Workers only ask; this thread alone touches the store.
    """
    queue, running, fatal, lost, saved_at = iter(pending.items()), {}, None, 0, time.monotonic()
    failures: Counter[str] = Counter()
    with ThreadPoolExecutor(judge.concurrency) as pool, tqdm(total=len(pending), unit="judgement", disable=None) as bar:
        while True:
            while len(running) < judge.concurrency and not fatal and not interrupted.is_set():
                if (entry := next(queue, None)) is None:
                    break
                running[pool.submit(judge.ask, entry[1])] = entry
            if not running:
                return fatal
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                key, request = running.pop(future)
                try:
                    reply = future.result()
                except UserError as error:
                    fatal = str(error)
                    continue
                save_reply(store, key, request, reply, judge.params_b)
                lost = lost + 1 if reply["status"] == "connection" else 0
                failures.update([reply["status"]] if reply["status"] != "ok" else [])
                bar.update()
                bar.set_postfix(failures)
            if lost >= GIVE_UP_AFTER:
                fatal = f"--judge {judge.name}: the server is gone ({lost} calls without a connection); start it again"
            if time.monotonic() - saved_at > SAVE_EVERY_S:
                save()
                saved_at = time.monotonic()


def announce(judge: Judge, bench: dict, runs: dict[Path, dict], items: list[dict], pending: dict) -> None:
    print(f"judge {judge.name}, prompts {bench['label']}" + smoke_note(judge))
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


def summarise(items: list[dict], results: dict[str, tuple[str, float | None]]) -> list[str]:
    """One run's line of the table: means over the judgements that have a score, how many those are, what failed."""
    found = [(item, *results.get(item["request_sha256"], ("not judged", None))) for item in items]
    scores = [(item, score) for item, status, score in found if status == "ok"]
    right = [score for item, score in scores if item["question_id"] not in WRONG_REFERENCES]
    failures = Counter(status for _, status, _ in found if status != "ok")
    return [
        items[0]["model_id"],
        mean_text([score for item, score in scores if item["turn"] == 1]),
        mean_text([score for item, score in scores if item["turn"] == 2]),
        mean_text([score for _, score in scores]),
        f"{len(scores)}/{len(items)}",
        f"{mean_text(right)} (n={len(right)})",
        ", ".join(f"{count} {status}" for status, count in failures.most_common()) or "-",
    ]


def mean_text(scores: list[float]) -> str:
    return f"{sum(scores) / len(scores):.2f}" if scores else "-"


def print_table(judge: Judge, bench: dict, items: list[dict], results: dict) -> None:
    """Scores per run; `mean` is over the judgements of both turns, as FastChat's show_result.py has it."""
    rows = [["run", "turn 1", "turn 2", "mean", "n", "no wrong refs", "failures"]]
    for name in dict.fromkeys(item["model_id"] for item in items):
        rows.append(summarise([item for item in items if item["model_id"] == name], results))
    widths = [max(map(len, column)) for column in zip(*rows)]
    print(f"\nMT-Bench, single-answer grading by {judge.name}, prompts {bench['label']}" + smoke_note(judge))
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print(
        f"no wrong refs: mean without the {len(WRONG_REFERENCES)} questions whose GPT-4 reference is known to be wrong"
    )
    if bench["label"] == "own":
        print("own prompts: these scores do not compare with MT-Bench scores published elsewhere")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s results [run ...] --judge MODEL [--option VALUE ...]  (--help explains all of them)",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit code: 0 every answer has a score, 1 some have none (the table says why; run again to retry), "
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
    parser.add_argument("--mt_bench", type=Path, default=Path("data/mt_bench"),
                        help="folder of questions, references and judge prompts (default data/mt_bench)")  # fmt: skip
    parser.add_argument("--max_tokens", type=int, default=MAX_TOKENS,
                        help=f"of a judgement; other than MT-Bench's {MAX_TOKENS} is another protocol")  # fmt: skip
    # how calls are made
    parser.add_argument("--concurrency", type=int, default=8, help="calls in flight at a time (default 8)")
    parser.add_argument("--timeout_s", type=float, default=600.0, help="seconds to wait for one answer (default 600)")
    parser.add_argument("--max_retries", type=int, default=5,
                        help="tries after the first, with growing pauses, at 408, 409, 429, 5xx, timeouts and lost "
                        "connections (default 5)")  # fmt: skip
    args = parser.parse_args(argv)
    check_args(args)
    return args


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


def plan(judge: Judge, runs: dict, bench: dict, store: sqlite3.Connection) -> tuple[list[dict], dict[str, dict]]:
    """All items and the requests still to be made, after a probe if there are any: it settles the parameters."""
    items = make_items(runs, bench, judge)
    pending = find_pending(store, items)
    if pending and judge.probe:
        accepted = judge.probe(judge.parameters)
        if accepted != judge.parameters:
            judge.parameters = accepted
            items = make_items(runs, bench, judge)
            pending = find_pending(store, items)
    return items, pending


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    bench = read_bench(args.mt_bench)
    runs = read_runs(args.results, bench)
    results_dir = next(iter(runs)).resolve().parent
    store = open_store(results_dir / "judgements.sqlite")
    judge = open_local_judge(args) if args.judge.startswith("hf:") else open_server_judge(args, store)
    items, pending = plan(judge, runs, bench, store)
    note_items(store, items)
    announce(judge, bench, runs, items, pending)

    save = functools.partial(write_csvs, store, runs, items)
    with catch_interrupt() as interrupted:
        fatal = judge_pending(judge, pending, store, save, interrupted) if pending else None
        save()
    results = find_results(store, items)
    store.close()

    print_table(judge, bench, items, results)
    print(f"written: {results_dir}/<run>/mt_bench/judgements.csv, from {results_dir / 'judgements.sqlite'}")
    if fatal:
        raise UserError(fatal)
    if interrupted.is_set():
        print("interrupted: run the same command again to continue; what is judged is not asked again")
        return 130
    missing = sum(results.get(item["request_sha256"], ("", None))[0] != "ok" for item in items)
    if missing:
        print(f"{missing} of {len(items)} have no score: run the same command again, it asks for these alone")
    print(f"next: python analyze.py {' '.join(map(str, args.results))}")
    return 1 if missing else 0


if __name__ == "__main__":
    run_main(main)
