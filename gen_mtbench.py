"""Answer MT-Bench's two-turn questions, or any others, with every trained adapter and with the untrained model.

    python gen_mtbench.py results/ --base
    python gen_mtbench.py results/dpo_b0.1_s42 --num_questions 8 --max_new_tokens 64
    torchrun --nproc_per_node 8 gen_mtbench.py results/ --kl
    python gen_mtbench.py results/ --questions alpaca_eval.json --temperature 0.7 --export alpaca_eval
    python gen_mtbench.py results/ --base_url http://localhost:8000/v1

Reads  results/<run_id>/{args.json, adapter/} (train_pref.py), data/mt_bench/question.jsonl (prep_data.py --mt_bench).
Writes results/<run_id>/mt_bench/answers.jsonl, in FastChat's schema plus what reproduces the answer; for --questions
       results/<run_id>/<name of that file>/answers.jsonl.

The base model is loaded once, answers of different adapters share batches, under torchrun the GPUs share the work.
Turn 2 sees the model's own answer to turn 1. Temperatures are MT-Bench's by category. Each (question, choice, turn) has
its own seed, so that an answer depends neither on the order of work nor on a restart; every turn is on disk as soon as
it is answered, and the same command continues.
"""

import argparse
import itertools
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from chat import common_prefix, encode, end_token_ids, load_tokenizer, prompt_ids, render
from files import (
    BASE_RUN,
    UserError,
    check_run_id,
    find_runs,
    jsonl_line,
    pick_questions,
    read_json,
    read_json_value,
    read_jsonl,
    read_questions,
    run_main,
    sha256_file,
    sha256_json,
    versions,
    write_json,
    write_jsonl,
    write_text,
)
from generation import Engine, Request
from modeling import fingerprint, load_base, pick_dtype
from server import clean, explain, open_client, server_of

# FastChat's temperature_config.
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
ROWS_ON_CPU, MOST_ROWS = 32, 128
CACHE_SHARE = 0.8  # of the GPU memory that the weights leave, for keys and values


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s results [run ...] [--option VALUE ...]  (--help explains all of them)",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("results", type=Path, nargs="+", help="results folder, or run folders in it")
    parser.add_argument("--base", action="store_true", help="answer with the untrained model too (run `base`)")
    parser.add_argument("--model", help="base model (default: the one the runs were trained on)")
    parser.add_argument(
        "--quant", choices=["auto", "nf4", "none"], default="auto", help="of the base; auto: as in training"
    )
    parser.add_argument(
        "--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="auto: bf16 where the hardware has it"
    )
    group = parser.add_argument_group("questions")
    group.add_argument("--mt_bench", type=Path, default=Path("data/mt_bench"), help="folder with question.jsonl")
    group.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="other questions: JSONL with question_id, turns and category, or AlpacaEval's JSON list of instructions",
    )
    group.add_argument("--num_questions", type=int, help="only so many, spread over the file (default: all)")
    group.add_argument("--num_choices", type=int, default=1, help="answers to each question, of different seeds")
    group.add_argument(
        "--temperature", type=float, help="for all questions (default: MT-Bench's, by category); 0 is greedy"
    )
    group.add_argument("--max_new_tokens", type=int, default=1024, help="tokens a turn at most (MT-Bench: 1024)")
    group.add_argument("--seed", type=int, default=42, help="of sampled answers")
    group = parser.add_argument_group("how")
    group.add_argument(
        "--batch_size", type=int, default=0, help=f"answers in flight (0: {ROWS_ON_CPU} on CPU, what fits on a GPU)"
    )
    group.add_argument(
        "--kl",
        action="store_true",
        help="afterwards, log-probabilities of each answer under its adapter and under the base, for on-policy KL",
    )
    group.add_argument(
        "--base_url", help="ask an OpenAI-compatible server instead, which serves each adapter under its run id"
    )
    group.add_argument("--served_base", metavar="NAME", help="what that server calls the base model (default: --model)")
    group.add_argument("--concurrency", type=int, default=32, help="requests at once to the server")
    group.add_argument("--timeout_s", type=float, default=600, help="seconds for one answer of the server")
    group.add_argument(
        "--export",
        choices=["alpaca_eval"],
        help="write model_outputs.json beside answers.jsonl, as alpaca_eval reads it",
    )
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    for key in ("max_new_tokens", "num_choices", "concurrency", "timeout_s"):
        if getattr(args, key) < 1:
            raise UserError(f"--{key} {getattr(args, key)}: must be at least 1")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: must be 0 or more")
    if args.batch_size < 0:
        raise UserError(f"--batch_size {args.batch_size}: must be at least 1")
    if args.temperature is not None and not 0 <= args.temperature < 10:
        raise UserError(f"--temperature {args.temperature}: must be 0 (greedy) or more")
    if args.base_url and "RANK" in os.environ:
        raise UserError("--base_url: the server has the GPUs; start gen_mtbench.py without torchrun")


# ---- which runs, on which base ------------------------------------------------------------------


class Run(NamedTuple):
    """A run to answer for. adapter None is the untrained model."""

    folder: Path
    run_id: str
    adapter: Path | None
    sha256: str | None  # of the adapter's weights
    record: dict  # its args.json

    @property
    def name(self) -> str | None:
        """What the engine calls its adapter."""
        return None if self.adapter is None else self.run_id


def collect_runs(args: argparse.Namespace) -> tuple[list[Run], dict]:
    """Runs to answer for, and what their args.json say of the base model ('model', 'quant'). Raises UserError if
    there is nothing to answer with or the runs stand on different bases."""
    runs, bases = [], set()
    for folder in find_runs(args.results) if any_runs(args.results) or not args.base else []:
        record = read_json(folder / "args.json")
        if record.get("run_id") == BASE_RUN:
            continue
        if (folder / "metrics.jsonl").is_file() and not (folder / "summary.json").is_file():
            print(f"{folder}: training has not finished, left out", flush=True)
            continue
        weights = folder / "adapter" / "adapter_model.safetensors"
        if not weights.is_file():
            print(f"{folder}: no adapter (unfinished or diverged), left out", flush=True)
            continue
        bases.add((record.get("model"), record.get("quant")))
        runs.append(Run(folder, folder.resolve().name, weights.parent, sha256_file(weights), record))
    if not runs and not args.base:
        raise UserError(f"{args.results[0]}: no adapters here; train with train_pref.py, or give --base --model MODEL")
    if twice := [name for name, count in Counter(run.run_id for run in runs).items() if count > 1]:
        raise UserError(f"run id {twice[0]} stands in several of these folders; answer them one after the other")
    if len(bases) > 1 and not args.model:
        raise UserError(
            f"these runs stand on different base models ({sorted(map(str, bases))}); answer them separately"
        )
    quants = {quant for _, quant in bases}
    if len(quants) > 1 and args.quant == "auto":
        raise UserError(f"these runs were trained on bases of quantisation {sorted(map(str, quants))}; give --quant")
    model, quant = next(iter(bases)) if bases else (args.model, "none")
    quant = quant if args.quant == "auto" else args.quant
    if args.base:
        runs.insert(0, base_run(args, args.model or model, quant, runs))
    return runs, {"model": args.model or model, "quant": quant}


def any_runs(paths: list[Path]) -> bool:
    return any((folder / "args.json").is_file() for path in paths for folder in (path, *path.glob("*")))


def base_run(args: argparse.Namespace, model: str | None, quant: str, runs: list[Run]) -> Run:
    """The run `base`, beside the others: args.json and answers, no adapter."""
    if model is None:
        raise UserError("--base without any run needs --model")
    folder = (runs[0].folder.parent if runs else args.results[0]) / BASE_RUN
    record = {"run_id": BASE_RUN, "loss": None, "beta": None, "tau": None, "seed": None, "mode": "full"}
    record |= {"model": model, "quant": quant, "versions": versions()}
    if (folder / "args.json").is_file():
        old = read_json(folder / "args.json")
        if (old.get("model"), old.get("quant")) != (model, quant):
            raise UserError(
                f"{folder}: holds answers of base model {old.get('model')} (quant {old.get('quant')}), not of {model} "
                f"(quant {quant}); remove the folder"
            )
    elif is_main():
        write_json(folder / "args.json", record)
    return Run(folder, BASE_RUN, None, None, record)


# ---- questions ----------------------------------------------------------------------------------


class Bench(NamedTuple):
    """What is asked: questions with question_id, category, turns and temperature, and the folder of the answers."""

    name: str
    questions: list[dict]


def load_bench(args: argparse.Namespace) -> Bench:
    """Raises UserError with file and line for what is no question, or has no temperature."""
    if args.questions is None:
        name, path = "mt_bench", args.mt_bench / "question.jsonl"
        questions = read_questions(path)
    else:
        name, path = check_run_id(args.questions.stem), args.questions
        questions = read_instructions(path) if path.suffix == ".json" else read_questions(path, mt_bench=False)
    for question in questions:
        given = TEMPERATURES.get(question.get("category")) if args.temperature is None else args.temperature
        if given is None:
            raise UserError(
                f"{path}: question {question['question_id']} is of category {question.get('category')!r}, for which "
                "MT-Bench has no temperature; give --temperature"
            )
        question["temperature"] = given
    if args.export and any(len(question["turns"]) > 1 for question in questions):
        raise UserError(f"--export {args.export}: {path} has questions of several turns, which it cannot hold")
    return Bench(name, pick_questions(questions, args.num_questions))


def read_instructions(path: Path) -> list[dict]:
    """AlpacaEval's list of {instruction, dataset}: one-turn questions, numbered from 1."""
    rows = read_json_value(path)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: expected a list of objects with 'instruction'")
    questions = []
    for number, row in enumerate(rows, 1):
        text = row.get("instruction") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path}: entry {number}: 'instruction' must be a non-empty string")
        questions.append({"question_id": number, "category": None, "turns": [text], "dataset": row.get("dataset")})
    return questions


def question_sha256(question: dict) -> str:
    return sha256_json([question["turns"], question["temperature"]])


def seed_of(seed: int, question_id: int, turn: int, choice: int) -> int:
    return int(np.random.SeedSequence([seed, question_id, turn, *([choice] if choice else [])]).generate_state(1)[0])


# ---- turns on disk ------------------------------------------------------------------------------

Key = tuple[str, int, int, int]  # run id, question id, choice, turn
TURN_FIELDS = ("text", "tokens", "truncated", "overflow", "logp", "logp_base", "logp_tokens")


class Store:
    """Turns answered so far. Each is appended to results/<run>/<bench>/turns.<rank>.jsonl as it comes; `gather` makes
    answers.jsonl of them."""

    def __init__(self, runs: list[Run], bench: Bench, settings: dict, batch_size: int, rank: int = 0):
        self.runs, self.bench, self.settings, self.batch_size, self.rank = runs, bench, settings, batch_size, rank
        self.questions = {q["question_id"]: q for q in bench.questions}
        self.lock = threading.Lock()
        self.turns: dict[Key, dict] = {}
        self.stamps: dict[Key, float] = {}
        self.load(say=rank == 0)

    def folder(self, run: Run) -> Path:
        return run.folder / self.bench.name

    def load(self, say: bool = False) -> None:
        """Read what stands on disk. Raises UserError for answers with other settings or to other questions."""
        self.turns.clear()
        for run in self.runs:
            stale = 0
            for path in (self.folder(run) / "answers.jsonl", *sorted(self.folder(run).glob("turns.*.jsonl"))):
                for line in read_turns(path):
                    if line.get("adapter_sha256") != run.sha256:
                        stale += "text" in line
                        continue
                    self.check(path, line)
                    key = (run.run_id, line["question_id"], line["choice"], line["turn"])
                    self.turns[key] = self.turns.get(key, {}) | {k: line[k] for k in TURN_FIELDS if k in line}
                    self.stamps.setdefault(key, line["tstamp"])
            if stale and say:
                print(f"{run.run_id}: {stale} answered turns are of an older adapter; answering anew", flush=True)

    def check(self, path: Path, line: dict) -> None:
        old = line.get("settings") or {}
        if different := [key for key in old.keys() | self.settings if old.get(key) != self.settings.get(key)]:
            what = ", ".join(f"{key} was {old.get(key)}, is {self.settings.get(key)}" for key in sorted(different))
            raise UserError(f"{path}: holds answers with other settings ({what}); use the same, or delete the file")
        question = self.questions.get(line["question_id"])
        if question and line.get("question_sha256", question_sha256(question)) != question_sha256(question):
            raise UserError(
                f"{path}: question {line['question_id']} was another when it was answered; delete the file, or go back "
                "to the old questions"
            )

    def add(self, run: Run, question: dict, choice: int, turn: int, **fields) -> None:
        key = (run.run_id, question["question_id"], choice, turn)
        line = {"question_id": question["question_id"], "choice": choice, "turn": turn, **fields, "tstamp": time.time(),
                "adapter_sha256": run.sha256, "settings": self.settings,
                "question_sha256": question_sha256(question)}  # fmt: skip
        with self.lock:
            path = self.folder(run) / f"turns.{self.rank}.jsonl"
            append_line(path, jsonl_line(line))
            self.turns[key] = self.turns.get(key, {}) | fields

    def texts(self, run: Run, question: dict, choice: int) -> list[str]:
        """The answers so far, turn by turn."""
        keys = ((run.run_id, question["question_id"], choice, turn) for turn in range(len(question["turns"])))
        found = (self.turns.get(key, {}).get("text") for key in keys)
        return list(itertools.takewhile(lambda text: text is not None, found))

    def gather(self) -> dict[str, list[dict]]:
        """Write each run's answers.jsonl from all that is complete. Returns the rows by run id."""
        self.load()
        table = {}
        for run in self.runs:
            asked = {key[1] for key in self.turns if key[0] == run.run_id}
            old = {row["question_id"]: row for row in read_rows(self.folder(run) / "answers.jsonl")}
            rows = []
            for number in sorted(asked):
                row = old.get(number)  # of a question that is not asked now: it stays
                if number in self.questions:
                    row = self.row(run, self.questions[number], row)
                rows += [row] if row else []
            table[run.run_id] = [row for row in rows if row["question_id"] in self.questions]
            if rows and rows != list(old.values()):
                write_jsonl(self.folder(run) / "answers.jsonl", rows)
            elif old and not rows:  # all of an older adapter: nobody shall take them for this one's
                (self.folder(run) / "answers.jsonl").rename(self.folder(run) / "answers.old.jsonl")
            if len(rows) == len(asked):
                for path in self.folder(run).glob("turns.*.jsonl"):
                    path.unlink()
        return table

    def row(self, run: Run, question: dict, old: dict | None) -> dict | None:
        """A line of answers.jsonl: FastChat's fields, then what reproduces the answer. None while turns are missing."""
        choices, keys = [], []
        for choice in range(self.settings.get("num_choices", 1)):
            mine = [(run.run_id, question["question_id"], choice, turn) for turn in range(len(question["turns"]))]
            if any("text" not in self.turns.get(key, {}) for key in mine):
                return None
            turns = [self.turns[key] for key in mine]
            lists = {f: [t[f] for t in turns] for f in TURN_FIELDS[1:] if all(f in t for t in turns)}
            choices.append({"index": choice, "turns": [turn["text"] for turn in turns], **lists})
            keys += mine
        texts = [choice["turns"] for choice in choices]
        return {
            "question_id": question["question_id"],
            "answer_id": sha256_json([question["question_id"], run.run_id, texts, run.sha256, self.settings])[:22],
            "model_id": run.run_id,
            "choices": choices,
            "tstamp": max(self.stamps[key] for key in keys),
            "category": question.get("category"),
            "temperature": question["temperature"],
            "adapter_sha256": run.sha256,
            "question_sha256": question_sha256(question),
            "settings": self.settings,
            # in bf16 an answer can change with the rows beside it
            "batch_size": old["batch_size"] if old else self.batch_size,
        }


def read_rows(path: Path) -> list[dict]:
    return [row for _, row in read_jsonl(path)] if path.is_file() else []


def read_turns(path: Path) -> Iterator[dict]:
    """Turns in answers.jsonl or in a file of turns, whose last line may be torn. Raises UserError for another form."""
    if not path.is_file():
        return
    if path.name != "answers.jsonl":
        text = path.read_bytes()
        lines = text[: text.rfind(b"\n") + 1].splitlines()
        try:
            yield from (json.loads(line) for line in lines)
        except ValueError:
            raise UserError(f"{path}: not valid JSON; delete the file, what it holds is answered again") from None
        return
    for number, row in read_jsonl(path):
        try:
            for choice in row["choices"]:
                for turn, text in enumerate(choice["turns"]):
                    lists = {key: choice[key][turn] for key in TURN_FIELDS[1:] if key in choice}
                    yield {**row, "choice": choice["index"], "turn": turn, "text": text, **lists}
        except (KeyError, TypeError, IndexError):
            raise UserError(f"{path}:{number}: not an answer row; delete the file and run the command again") from None


def append_line(path: Path, line: str) -> None:
    """Append one line, behind the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":  # torn by a kill
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode())


# ---- answering ----------------------------------------------------------------------------------


class Item(NamedTuple):
    """Unit of work: all turns of one choice of one question of one run."""

    run: Run
    question: dict
    choice: int


def all_items(store: Store, num_choices: int) -> list[Item]:
    """Run after run, so that few adapters are in flight; short questions first."""
    questions = sorted(store.bench.questions, key=lambda q: sum(map(len, q["turns"])))
    return [Item(run, q, choice) for run in store.runs for q in questions for choice in range(num_choices)]


def unanswered(store: Store, items: list[Item]) -> list[int]:
    """Numbers of the items of which a turn is missing."""
    return [n for n, item in enumerate(items) if len(store.texts(*item)) < len(item.question["turns"])]


def unscored(store: Store, items: list[Item]) -> list[tuple[int, int]]:
    """(number of the item, turn) of each answer without log-probabilities."""
    return [
        (number, turn)
        for number, item in enumerate(items)
        for turn in range(len(store.texts(*item)))
        if "logp" not in store.turns[item.run.run_id, item.question["question_id"], item.choice, turn]
    ]


class Workers(NamedTuple):
    """The processes that share the work. take(what, count) yields numbers below count, each to one process."""

    rank: int
    device: torch.device
    take: Callable[[str, int], Iterator[int]]


def is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def init_workers() -> Workers:
    """Under torchrun, a counter in its store hands out the work, so that all finish together; no more is shared."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else None
    if device:
        torch.cuda.set_device(device)
    device = device or torch.device("cpu")
    if "RANK" not in os.environ:
        return Workers(0, device, lambda _, count: iter(range(count)))
    dist.init_process_group("gloo", timeout=timedelta(days=1))
    counter = dist.distributed_c10d._get_default_store()

    def take(what: str, count: int) -> Iterator[int]:
        while (number := counter.add(what, 1) - 1) < count:
            yield number

    return Workers(dist.get_rank(), device, take)


def conversation_of(item: Item, answers: list[str]) -> list[dict]:
    """Messages up to the question that follows `answers`."""
    messages = []
    for question, answer in itertools.zip_longest(item.question["turns"][: len(answers) + 1], answers):
        messages.append({"role": "user", "content": question})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    return messages


class Author:
    """Writes answers with the engine."""

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase, store: Store, args, room: int):
        self.engine, self.tokenizer, self.store, self.args, self.room = engine, tokenizer, store, args, room

    def request(self, item: Item) -> Request | None:
        """The next turn to answer, or None if there is none."""
        answers = self.store.texts(*item)
        turn = len(answers)
        if turn == len(item.question["turns"]):
            return None
        prompt = prompt_ids(self.tokenizer, conversation_of(item, answers))
        number = item.question["question_id"]
        return Request(
            prompt[max(0, len(prompt) - self.room) :],
            item.run.name,
            item.question["temperature"],
            seed_of(self.args.seed, number, turn, item.choice),
            self.args.max_new_tokens,
            tag=(item, turn, len(prompt) > self.room),
        )

    def finished(self, request: Request) -> Request | None:
        """Keep an answered turn; returns the next one of its conversation."""
        item, turn, overflow = request.tag
        ended = request.tokens[-1] in self.engine.ends
        tokens = request.tokens[:-1] if ended else request.tokens
        text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        self.store.add(*item, turn, text=text, tokens=len(tokens), truncated=not ended, overflow=overflow)
        return self.request(item)


def answer_all(author: Author, items: list[Item], workers: Workers) -> None:
    begun, tokens = time.monotonic(), 0
    with progress(len(items), "answers", workers.rank) as bar:

        def source() -> Iterator[Request]:
            for number in workers.take("answers", len(items)):
                yield author.request(items[number])

        def finished(request: Request) -> Request | None:
            nonlocal tokens
            tokens += len(request.tokens)
            follow_up = author.finished(request)
            bar.set_postfix_str(f"{request.adapter or BASE_RUN} {tokens / (time.monotonic() - begun):.0f} tok/s")
            bar.update(follow_up is None)
            return follow_up

        author.engine.run(source(), finished)


def progress(total: int, what: str, rank: int) -> tqdm:
    """A bar with rate and time left; under torchrun that of rank 0, which counts its own share."""
    return tqdm(total=total, desc=what, unit="question", disable=None if rank == 0 else True, dynamic_ncols=True)


def score_all(author: Author, workers: Workers, items: list[Item], unscored: list[tuple[int, int]]) -> None:
    """--kl: log-probabilities (nats) of each answered turn under its adapter and under the base, tokens counted.

    The answer's tokens are those that the template gives the conversation, its end token among them unless the answer
    was cut off.
    """
    store, engine, tokenizer = author.store, author.engine, author.tokenizer
    work = [(items[number], turn) for number, turn in unscored]
    with progress(len(work), "log-probabilities", workers.rank) as bar:
        for number in workers.take("scores", len(work)):
            item, turn = work[number]
            answers = store.texts(*item)
            messages = conversation_of(item, answers[:turn])
            asked = prompt_ids(tokenizer, messages)
            messages.append({"role": "assistant", "content": answers[turn]})
            whole = encode(tokenizer, render(tokenizer, messages, generation_prompt=False))
            split = common_prefix(asked, whole)
            cut = store.turns[item.run.run_id, item.question["question_id"], item.choice, turn]["truncated"]
            end = next((i for i, token in enumerate(whole[split:], split) if token in engine.ends), len(whole))
            answer = whole[split : end if cut else end + 1][: engine.cache.shape[1] - 1]
            kept = whole[:split][-(engine.cache.shape[1] - len(answer)) :]
            logps = [engine.score(kept, answer, name) if answer else 0.0 for name in (item.run.name, None)]
            store.add(*item, turn, logp=logps[0], logp_base=logps[1], logp_tokens=len(answer))
            bar.update()


def cache_length(tokenizer: PreTrainedTokenizerBase, bench: Bench, max_new_tokens: int, window: int) -> int:
    """Tokens that a whole conversation may come to, within the model's context window."""
    longest = 0
    for question in bench.questions:
        messages = conversation_of(Item(None, question, 0), ["."] * (len(question["turns"]) - 1))
        longest = max(longest, len(prompt_ids(tokenizer, messages)) + len(question["turns"]) * max_new_tokens)
    return min(window, longest * 9 // 8 + 32)  # an answer read back may be a few tokens longer than it was written


def rows_in_flight(model, length: int, wanted: int) -> int:
    """--batch_size, or for 0 what suits the device."""
    if wanted or model.device.type != "cuda":
        return wanted or ROWS_ON_CPU
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * head * length * model.dtype.itemsize
    free = torch.cuda.mem_get_info()[0]
    return max(1, min(MOST_ROWS, int(CACHE_SHARE * free / row)))


def check_base(model, runs: list[Run], base: dict, dtype: str) -> None:
    """Raise UserError if an adapter was trained on other weights of this name."""
    weights = fingerprint(model)
    for run in runs:
        record = run.record
        same_kind = record.get("dtype") == dtype and record.get("quant") == base["quant"]
        if same_kind and record.get("base_sha256", weights) != weights:
            raise UserError(f"{run.folder}: was trained on other weights than {base['model']} has now")


# ---- answers from a server ----------------------------------------------------------------------


def ask_server_all(args: argparse.Namespace, client, base: dict, store: Store, items: list[Item]) -> None:
    """Answer `items` through an OpenAI-compatible server. Raises UserError for what no later request will cure."""
    names = {run.run_id: run.run_id if run.adapter else args.served_base or base["model"] for run in store.runs}
    check_served(client, set(names.values()))
    begun, tokens, stop, refused = time.monotonic(), Counter(), threading.Event(), set()

    def answer(item: Item) -> None:
        while not stop.is_set() and (turn := len(answers := store.texts(*item))) < len(item.question["turns"]):
            name = names[item.run.run_id]
            choice, used = ask_server(
                client,
                refused,
                model=name,
                messages=conversation_of(item, answers),
                temperature=item.question["temperature"],
                max_tokens=args.max_new_tokens,
                seed=seed_of(args.seed, item.question["question_id"], turn, item.choice) % 2**31,
            )
            text, cut = (choice.message.content or "").strip(), choice.finish_reason == "length"
            store.add(*item, turn, text=text, tokens=used, truncated=cut, overflow=False)
            tokens["all"] += used
            bar.set_postfix_str(f"{tokens['all'] / (time.monotonic() - begun):.0f} tok/s")
        bar.update(not stop.is_set())

    with progress(len(items), "answers", 0) as bar, ThreadPoolExecutor(args.concurrency) as pool:
        futures = [pool.submit(answer, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:  # what is in flight is kept, what waits is not sent
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def ask_server(client, refused: set[str], **request) -> tuple:
    """One answer: the reply's choice and its number of tokens. The client has retried what is worth retrying. A `seed`
    that the server does not take is left out from then on (`refused`), and that is said."""
    import openai

    try:
        reply = client.chat.completions.create(**{k: value for k, value in request.items() if k not in refused})
        return reply.choices[0], reply.usage.completion_tokens if reply.usage else 0
    except openai.APIStatusError as error:
        if error.status_code in (400, 422) and "seed" in error.message and "seed" in request.keys() - refused:
            print(f"{server_of(client)} takes no seed: sampled answers will differ in another start", flush=True)
            refused.add("seed")
            return ask_server(client, refused, **request)
        hint = "; is its context long enough for the conversation and --max_new_tokens?"
        too_long = hint if error.status_code == 400 else ""
        raise UserError(explain(client, "model", request["model"], error) + too_long) from None
    except openai.APIConnectionError as error:
        raise UserError(explain(client, "model", request["model"], error)) from None
    except (AttributeError, IndexError, TypeError):
        raise UserError(f"{server_of(client)} is no OpenAI-compatible server; does --base_url lack its /v1?") from None


def check_served(client, names: set[str]) -> None:
    """Raise UserError if the server does not list a model that will be asked for."""
    import openai

    try:
        served = {model.id for model in client.with_options(max_retries=1).models.list().data or []}
    except openai.APIConnectionError as error:
        raise UserError(explain(client, "--base_url", str(client.base_url), error)) from None
    except (openai.APIStatusError, AttributeError):
        return  # no list there; the first answer will say what is wrong
    if served and (missing := sorted(names - served)):
        raise UserError(
            f"{server_of(client)} does not serve {missing[0]} ({len(missing)} of {len(names)} are missing); it serves "
            f"{clean(client, ', '.join(sorted(served)[:5]))}. Adapters go by their run ids (vLLM: --lora-modules "
            "RUN_ID=results/RUN_ID/adapter ...), the base by --served_base"
        )


# ---- the command --------------------------------------------------------------------------------


def settings_of(args: argparse.Namespace, base: dict, dtype: str, client) -> dict:
    """What an answer depends on, beside question and adapter; kept in each row."""
    settings = {"model": base["model"], "quant": base["quant"], "dtype": dtype, "max_new_tokens": args.max_new_tokens,
                "seed": args.seed}  # fmt: skip
    if client is not None:
        settings |= {"quant": None, "dtype": None, "server": server_of(client)}
    return settings if args.num_choices == 1 else settings | {"num_choices": args.num_choices}


def export_alpaca_eval(store: Store, table: dict[str, list[dict]]) -> None:
    for run in store.runs:
        rows = []
        for row in table[run.run_id]:
            question = store.questions[row["question_id"]]
            rows.append({"dataset": question.get("dataset") or store.bench.name, "instruction": question["turns"][0],
                         "output": row["choices"][0]["turns"][0], "generator": run.run_id})  # fmt: skip
        text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
        write_text(store.folder(run) / "model_outputs.json", text)


def print_summary(store: Store, table: dict[str, list[dict]], args: argparse.Namespace) -> bool:
    """Returns whether every question has its answers, with --kl their log-probabilities too."""
    complete = True
    print(f"\n{'run':<40} answers  tokens a turn       truncated  empty  overflow  KL to base, nats an answer")
    for run_id, rows in table.items():
        choices = [choice for row in rows for choice in row["choices"]]
        complete = complete and len(rows) == len(store.bench.questions)
        complete = complete and (not args.kl or all("logp" in choice for choice in choices))
        if not choices:
            print(f"{run_id:<40} {0:>7}")
            continue
        lengths = [choice["tokens"] for choice in choices if "tokens" in choice]
        means = (
            " ".join(f"{mean:8.1f}" for mean in np.mean(lengths, axis=0)) if len(set(map(len, lengths))) == 1 else ""
        )
        counts = [sum(sum(choice.get(key, [])) for choice in choices) for key in ("truncated", "overflow")]
        empty = sum(not turn for choice in choices for turn in choice["turns"])
        kls = [sum(c["logp"]) - sum(c["logp_base"]) for c in choices if "logp" in c]
        kl = f"{np.mean(kls):9.2f} (SE {np.std(kls, ddof=1) / len(kls) ** 0.5:.2f})" if len(kls) > 1 else ""
        print(f"{run_id:<40} {len(rows):>7}  {means:<18}  {counts[0]:>9}  {empty:>5}  {counts[1]:>8}  {kl}")
    results = " ".join(map(str, args.results))
    print(f"\nanswers: {args.results[0]}/<run_id>/{store.bench.name}/answers.jsonl")
    if store.bench.name == "mt_bench":
        print(f"next: python judge.py {results} --judge MODEL [--base_url URL], or --judge hf:FOLDER", flush=True)
    return complete


def show_prompt(tokenizer: PreTrainedTokenizerBase, bench: Bench) -> None:
    text = render(tokenizer, [{"role": "user", "content": bench.questions[0]["turns"][0]}], generation_prompt=True)
    print("first prompt as the model sees it:\n" + json.dumps(text, ensure_ascii=False), flush=True)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_args(args)
    runs, base = collect_runs(args)
    bench = load_bench(args)
    client = open_client("--base_url", args.base_url, args.timeout_s, max_retries=5) if args.base_url else None
    workers = init_workers()
    dtype = pick_dtype(args.dtype, workers.device)
    settings = settings_of(args, base, str(dtype).removeprefix("torch."), client)
    store = Store(runs, bench, settings, args.batch_size or args.concurrency, workers.rank)
    everything = all_items(store, args.num_choices)
    items = [everything[number] for number in from_main(unanswered(store, everything))]
    try:
        if client is not None:
            ask_server_all(args, client, base, store, items)
        if args.kl or (items and client is None):
            tokenizer = load_tokenizer(base["model"])
            model = load_base(base["model"], dtype, base["quant"], workers.device).eval()
            check_base(model, runs, base, str(dtype).removeprefix("torch."))
            window = model.config.get_text_config().max_position_embeddings
            if args.max_new_tokens >= window:
                raise UserError(f"--max_new_tokens {args.max_new_tokens}: the model's context is {window} tokens")
            length = cache_length(tokenizer, bench, args.max_new_tokens, window)
            rows = store.batch_size = rows_in_flight(model, length, args.batch_size)
            ends = end_token_ids(tokenizer, model.generation_config)
            engine = Engine(model, {run.run_id: run.adapter for run in runs if run.adapter}, rows, length, ends)
            author = Author(engine, tokenizer, store, args, length - args.max_new_tokens)
            if workers.rank == 0:
                show_prompt(tokenizer, bench)
            if client is None:
                answer_all(author, items, workers)
            if args.kl:
                wait_for_all()
                store.load()
                score_all(author, workers, everything, from_main(unscored(store, everything)))
        wait_for_all()
    finally:
        table = store.gather() if workers.rank == 0 else {}
    if workers.rank != 0:
        return 0
    if args.export:
        export_alpaca_eval(store, table)
    return 0 if print_summary(store, table, args) else 1


def from_main(value: object) -> object:
    """Rank 0's value on every rank: they number the same work."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, 0)
    return values[0]


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    run_main(main)
