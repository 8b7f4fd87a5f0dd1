"""Answer MT-Bench's two-turn questions, or any others, with every trained adapter and with the
untrained model.

    python gen_mtbench.py results/ --base
    python gen_mtbench.py results/dpo_b0.1_s42 --num_questions 8 --max_new_tokens 64
    torchrun --nproc_per_node 8 gen_mtbench.py results/ --kl
    python gen_mtbench.py results/ --questions alpaca_eval.json --temperature 0.7 --export
    alpaca_eval python gen_mtbench.py results/ --base_url http://localhost:8000/v1

Reads  results/<run_id>/{args.json, adapter/} (train_pref.py), data/mt_bench/question.jsonl
(prep_data.py --mt_bench). Writes results/<run_id>/mt_bench/answers.jsonl, in FastChat's schema plus
what reproduces the answer; for --questions
       results/<run_id>/<name of that file>/answers.jsonl.

The base model is loaded once, answers of different adapters share batches, under torchrun the GPUs
share the work. Turn 2 sees the model's own answer to turn 1. Temperatures are MT-Bench's by
category. Each (question, choice, turn) has its own seed, so that an answer depends neither on the
order of work nor on a restart; every turn is on disk as soon as it is answered, and the same
command continues.
"""

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from pref.answering import served
from pref.answering.generation import Engine, Request
from pref.answering.turns import Bench, Run, Store
from pref.answering.work import (
    Item,
    Workers,
    all_items,
    conversation_of,
    from_main,
    init_workers,
    progress,
    seed_of,
    unanswered,
    unscored,
    wait_for_all,
)
from pref.files import console, disk, mt_bench, run_folders
from pref.files.console import UserError
from pref.model import chat, loading, server

# FastChat's temperature_config.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
ROWS_ON_CPU, MOST_ROWS = 32, 128
CACHE_SHARE = 0.8  # of the GPU memory that the weights leave, for keys and values


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s results [run ...] [--option VALUE ...]  (--help explains all of them)",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "results", type=Path, nargs="+", help="results folder, or run folders in it"
    )
    parser.add_argument(
        "--base", action="store_true", help="answer with the untrained model too (run `base`)"
    )
    parser.add_argument("--model", help="base model (default: the one the runs were trained on)")
    parser.add_argument(
        "--quant",
        choices=["auto", "nf4", "none"],
        default="auto",
        help="of the base; auto: as in training",
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float32"],
        default="auto",
        help="auto: bf16 where the hardware has it",
    )
    group = parser.add_argument_group("questions")
    group.add_argument(
        "--mt_bench", type=Path, default=Path("data/mt_bench"), help="folder with question.jsonl"
    )
    group.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="other questions: JSONL with question_id, turns and category, or AlpacaEval's JSON list of instructions",
    )
    group.add_argument(
        "--num_questions", type=int, help="only so many, spread over the file (default: all)"
    )
    group.add_argument(
        "--num_choices", type=int, default=1, help="answers to each question, of different seeds"
    )
    group.add_argument(
        "--temperature",
        type=float,
        help="for all questions (default: MT-Bench's, by category); 0 is greedy",
    )
    group.add_argument(
        "--max_new_tokens", type=int, default=1024, help="tokens a turn at most (MT-Bench: 1024)"
    )
    group.add_argument("--seed", type=int, default=42, help="of sampled answers")
    group = parser.add_argument_group("how")
    group.add_argument(
        "--batch_size",
        type=int,
        default=0,
        help=f"answers in flight (0: {ROWS_ON_CPU} on CPU, what fits on a GPU)",
    )
    group.add_argument(
        "--kl",
        action="store_true",
        help="afterwards, log-probabilities of each answer under its adapter and under the base, for on-policy KL",
    )
    group.add_argument(
        "--base_url",
        help="ask an OpenAI-compatible server instead, which serves each adapter under its run id",
    )
    group.add_argument(
        "--served_base",
        metavar="NAME",
        help="what that server calls the base model (default: --model)",
    )
    group.add_argument("--concurrency", type=int, default=32, help="requests at once to the server")
    group.add_argument(
        "--timeout_s", type=float, default=600, help="seconds for one answer of the server"
    )
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
        raise UserError(
            "--base_url: the server has the GPUs; start gen_mtbench.py without torchrun"
        )


def collect_runs(args: argparse.Namespace) -> tuple[list[Run], dict]:
    """Runs to answer for, and what their args.json say of the base model ('model', 'quant'). Raises
    UserError if there is nothing to answer with or the runs stand on different bases.
    """
    runs, bases = [], set()
    for folder in (
        run_folders.find_runs(args.results) if any_runs(args.results) or not args.base else []
    ):
        record = disk.read_json(folder / "args.json")
        if record.get("run_id") == run_folders.BASE_RUN:
            continue
        if (folder / "metrics.jsonl").is_file() and not (folder / "summary.json").is_file():
            print(f"{folder}: training has not finished, left out", flush=True)
            continue
        weights = folder / "adapter" / "adapter_model.safetensors"
        if not weights.is_file():
            print(f"{folder}: no adapter (unfinished or diverged), left out", flush=True)
            continue
        bases.add((record.get("model"), record.get("quant")))
        runs.append(
            Run(folder, folder.resolve().name, weights.parent, disk.sha256_file(weights), record)
        )
    if not runs and not args.base:
        raise UserError(
            f"{args.results[0]}: no adapters here; train with train_pref.py, or give --base --model MODEL"
        )
    if twice := [name for name, count in Counter(run.run_id for run in runs).items() if count > 1]:
        raise UserError(
            f"run id {twice[0]} stands in several of these folders; answer them one after the other"
        )
    if len(bases) > 1 and not args.model:
        raise UserError(
            f"these runs stand on different base models ({sorted(map(str, bases))}); answer them separately"
        )
    quants = {quant for _, quant in bases}
    if len(quants) > 1 and args.quant == "auto":
        raise UserError(
            f"these runs were trained on bases of quantisation {sorted(map(str, quants))}; give --quant"
        )
    model, quant = next(iter(bases)) if bases else (args.model, "none")
    quant = quant if args.quant == "auto" else args.quant
    if args.base:
        runs.insert(0, base_run(args, args.model or model, quant, runs))
    return runs, {"model": args.model or model, "quant": quant}


def any_runs(paths: list[Path]) -> bool:
    return any(
        (folder / "args.json").is_file() for path in paths for folder in (path, *path.glob("*"))
    )


def base_run(args: argparse.Namespace, model: str | None, quant: str, runs: list[Run]) -> Run:
    """The run `base`, beside the others: args.json and answers, no adapter."""
    if model is None:
        raise UserError("--base without any run needs --model")
    folder = (runs[0].folder.parent if runs else args.results[0]) / run_folders.BASE_RUN
    record = {
        "run_id": run_folders.BASE_RUN,
        "loss": None,
        "beta": None,
        "tau": None,
        "seed": None,
        "mode": "full",
    }
    record |= {"model": model, "quant": quant, "versions": disk.versions()}
    if (folder / "args.json").is_file():
        old = disk.read_json(folder / "args.json")
        if (old.get("model"), old.get("quant")) != (model, quant):
            raise UserError(
                f"{folder}: holds answers of base model {old.get('model')} (quant {old.get('quant')}), not of {model} "
                f"(quant {quant}); remove the folder"
            )
    elif is_main():
        disk.write_json(folder / "args.json", record)
    return Run(folder, run_folders.BASE_RUN, None, None, record)


def load_bench(args: argparse.Namespace) -> Bench:
    """Raises UserError with file and line for what is no question, or has no temperature."""
    if args.questions is None:
        name, path = "mt_bench", args.mt_bench / "question.jsonl"
        questions = mt_bench.read_questions(path)
    else:
        name, path = run_folders.check_run_id(args.questions.stem), args.questions
        questions = (
            read_instructions(path)
            if path.suffix == ".json"
            else mt_bench.read_questions(path, mt_bench=False)
        )
    for question in questions:
        given = (
            TEMPERATURES.get(question.get("category"))
            if args.temperature is None
            else args.temperature
        )
        if given is None:
            raise UserError(
                f"{path}: question {question['question_id']} is of category {question.get('category')!r}, for which "
                "MT-Bench has no temperature; give --temperature"
            )
        question["temperature"] = given
    if args.export and any(len(question["turns"]) > 1 for question in questions):
        raise UserError(
            f"--export {args.export}: {path} has questions of several turns, which it cannot hold"
        )
    return Bench(name, mt_bench.pick_questions(questions, args.num_questions))


def read_instructions(path: Path) -> list[dict]:
    """AlpacaEval's list of {instruction, dataset}: one-turn questions, numbered from 1."""
    rows = disk.read_json_value(path)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: expected a list of objects with 'instruction'")
    questions = []
    for number, row in enumerate(rows, 1):
        text = row.get("instruction") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path}: entry {number}: 'instruction' must be a non-empty string")
        questions.append(
            {
                "question_id": number,
                "category": None,
                "turns": [text],
                "dataset": row.get("dataset"),
            }
        )
    return questions


def is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


class Author:
    """Writes answers with the engine."""

    def __init__(
        self, engine: Engine, tokenizer: PreTrainedTokenizerBase, store: Store, args, room: int
    ):
        self.engine, self.tokenizer, self.store, self.args, self.room = (
            engine,
            tokenizer,
            store,
            args,
            room,
        )

    def request(self, item: Item) -> Request | None:
        """The next turn to answer, or None if there is none."""
        answers = self.store.texts(*item)
        turn = len(answers)
        if turn == len(item.question["turns"]):
            return None
        prompt = chat.prompt_ids(self.tokenizer, conversation_of(item, answers))
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
        self.store.add(
            *item, turn, text=text, tokens=len(tokens), truncated=not ended, overflow=overflow
        )
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
            bar.set_postfix_str(
                f"{request.adapter or run_folders.BASE_RUN} {tokens / (time.monotonic() - begun):.0f} tok/s"
            )
            bar.update(follow_up is None)
            return follow_up

        author.engine.run(source(), finished)


def score_all(
    author: Author, workers: Workers, items: list[Item], unscored: list[tuple[int, int]]
) -> None:
    """--kl: log-probabilities (nats) of each answered turn under its adapter and under the base,
    tokens counted.

    The answer's tokens are those that the template gives the conversation, its end token among them
    unless the answer was cut off.
    """
    store, engine, tokenizer = author.store, author.engine, author.tokenizer
    work = [(items[number], turn) for number, turn in unscored]
    with progress(len(work), "log-probabilities", workers.rank) as bar:
        for number in workers.take("scores", len(work)):
            item, turn = work[number]
            answers = store.texts(*item)
            messages = conversation_of(item, answers[:turn])
            asked = chat.prompt_ids(tokenizer, messages)
            messages.append({"role": "assistant", "content": answers[turn]})
            whole = chat.encode(
                tokenizer, chat.render(tokenizer, messages, generation_prompt=False)
            )
            split = chat.common_prefix(asked, whole)
            cut = store.turns[item.run.run_id, item.question["question_id"], item.choice, turn][
                "truncated"
            ]
            end = next(
                (i for i, token in enumerate(whole[split:], split) if token in engine.ends),
                len(whole),
            )
            answer = whole[split : end if cut else end + 1][: engine.cache.shape[1] - 1]
            kept = whole[:split][-(engine.cache.shape[1] - len(answer)) :]
            logps = [
                engine.score(kept, answer, name) if answer else 0.0
                for name in (item.run.name, None)
            ]
            store.add(*item, turn, logp=logps[0], logp_base=logps[1], logp_tokens=len(answer))
            bar.update()


def cache_length(
    tokenizer: PreTrainedTokenizerBase, bench: Bench, max_new_tokens: int, window: int
) -> int:
    """Tokens that a whole conversation may come to, within the model's context window."""
    longest = 0
    for question in bench.questions:
        messages = conversation_of(Item(None, question, 0), ["."] * (len(question["turns"]) - 1))
        longest = max(
            longest,
            len(chat.prompt_ids(tokenizer, messages)) + len(question["turns"]) * max_new_tokens,
        )
    return min(
        window, longest * 9 // 8 + 32
    )  # an answer read back may be a few tokens longer than it was written


def rows_in_flight(model, length: int, wanted: int) -> int:
    """--batch_size, or for 0 what suits the device."""
    if wanted or model.device.type != "cuda":
        return wanted or ROWS_ON_CPU
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = (
        2
        * config.num_hidden_layers
        * config.num_key_value_heads
        * head
        * length
        * model.dtype.itemsize
    )
    free = torch.cuda.mem_get_info()[0]
    return max(1, min(MOST_ROWS, int(CACHE_SHARE * free / row)))


def check_base(model, runs: list[Run], base: dict, dtype: str) -> None:
    """Raise UserError if an adapter was trained on other weights of this name."""
    weights = loading.fingerprint(model)
    for run in runs:
        record = run.record
        same_kind = record.get("dtype") == dtype and record.get("quant") == base["quant"]
        if same_kind and record.get("base_sha256", weights) != weights:
            raise UserError(
                f"{run.folder}: was trained on other weights than {base['model']} has now"
            )


def settings_of(args: argparse.Namespace, base: dict, dtype: str, client) -> dict:
    """What an answer depends on, beside question and adapter; kept in each row."""
    settings = {
        "model": base["model"],
        "quant": base["quant"],
        "dtype": dtype,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
    }
    if client is not None:
        settings |= {"quant": None, "dtype": None, "server": server.server_of(client)}
    return settings if args.num_choices == 1 else settings | {"num_choices": args.num_choices}


def export_alpaca_eval(store: Store, table: dict[str, list[dict]]) -> None:
    for run in store.runs:
        rows = []
        for row in table[run.run_id]:
            question = store.questions[row["question_id"]]
            rows.append(
                {
                    "dataset": question.get("dataset") or store.bench.name,
                    "instruction": question["turns"][0],
                    "output": row["choices"][0]["turns"][0],
                    "generator": run.run_id,
                }
            )
        text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
        disk.write_text(store.folder(run) / "model_outputs.json", text)


def print_summary(store: Store, table: dict[str, list[dict]], args: argparse.Namespace) -> bool:
    """Returns whether every question has its answers, with --kl their log-probabilities too."""
    complete = True
    print(
        f"\n{'run':<40} answers  tokens a turn       truncated  empty  overflow  KL to base, nats an answer"
    )
    for run_id, rows in table.items():
        choices = [choice for row in rows for choice in row["choices"]]
        complete = complete and len(rows) == len(store.bench.questions)
        complete = complete and (not args.kl or all("logp" in choice for choice in choices))
        if not choices:
            print(f"{run_id:<40} {0:>7}")
            continue
        lengths = [choice["tokens"] for choice in choices if "tokens" in choice]
        means = (
            " ".join(f"{mean:8.1f}" for mean in np.mean(lengths, axis=0))
            if len(set(map(len, lengths))) == 1
            else ""
        )
        counts = [
            sum(sum(choice.get(key, [])) for choice in choices) for key in ("truncated", "overflow")
        ]
        empty = sum(not turn for choice in choices for turn in choice["turns"])
        kls = [sum(c["logp"]) - sum(c["logp_base"]) for c in choices if "logp" in c]
        kl = (
            f"{np.mean(kls):9.2f} (SE {np.std(kls, ddof=1) / len(kls) ** 0.5:.2f})"
            if len(kls) > 1
            else ""
        )
        print(
            f"{run_id:<40} {len(rows):>7}  {means:<18}  {counts[0]:>9}  {empty:>5}  {counts[1]:>8}  {kl}"
        )
    results = " ".join(map(str, args.results))
    print(f"\nanswers: {args.results[0]}/<run_id>/{store.bench.name}/answers.jsonl")
    if store.bench.name == "mt_bench":
        print(
            f"next: python judge.py {results} --judge MODEL [--base_url URL], or --judge hf:FOLDER",
            flush=True,
        )
    return complete


def show_prompt(tokenizer: PreTrainedTokenizerBase, bench: Bench) -> None:
    text = chat.render(
        tokenizer,
        [{"role": "user", "content": bench.questions[0]["turns"][0]}],
        generation_prompt=True,
    )
    print("first prompt as the model sees it:\n" + json.dumps(text, ensure_ascii=False), flush=True)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_args(args)
    runs, base = collect_runs(args)
    bench = load_bench(args)
    client = (
        server.open_client("--base_url", args.base_url, args.timeout_s, max_retries=5)
        if args.base_url
        else None
    )
    workers = init_workers()
    dtype = loading.pick_dtype(args.dtype, workers.device)
    settings = settings_of(args, base, str(dtype).removeprefix("torch."), client)
    store = Store(runs, bench, settings, args.batch_size or args.concurrency, workers.rank)
    everything = all_items(store, args.num_choices)
    items = [everything[number] for number in from_main(unanswered(store, everything))]
    try:
        if client is not None:
            served.ask_server_all(args, client, base, store, items)
        if args.kl or (items and client is None):
            tokenizer = chat.load_tokenizer(base["model"])
            model = loading.load_base(base["model"], dtype, base["quant"], workers.device).eval()
            check_base(model, runs, base, str(dtype).removeprefix("torch."))
            window = model.config.get_text_config().max_position_embeddings
            if args.max_new_tokens >= window:
                raise UserError(
                    f"--max_new_tokens {args.max_new_tokens}: the model's context is {window} tokens"
                )
            length = cache_length(tokenizer, bench, args.max_new_tokens, window)
            rows = store.batch_size = rows_in_flight(model, length, args.batch_size)
            ends = chat.end_token_ids(tokenizer, model.generation_config)
            engine = Engine(
                model, {run.run_id: run.adapter for run in runs if run.adapter}, rows, length, ends
            )
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


if __name__ == "__main__":
    console.run_main(main)
