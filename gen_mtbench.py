"""Answer MT-Bench's two-turn questions with every trained adapter, and with the untrained model.

    python gen_mtbench.py results/ --base
    python gen_mtbench.py results/dpo_b0.1_s42 --num_questions 8 --max_new_tokens 64

Reads  results/<run_id>/{args.json, adapter/} (train_pref.py), data/mt_bench/question.jsonl (prep_data.py --mt_bench).
Writes results/<run_id>/mt_bench/answers.jsonl, in FastChat's schema plus what reproduces the answer.

The base model is loaded once for all adapters. Turn 2 sees the model's own answer to turn 1. Temperatures are
MT-Bench's by category. Each (question, turn) has its own seed, so an answer does not depend on the order of work or
on a restart; rerun the command to continue where it stopped.
"""

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from chat import encode, end_token_ids, load_tokenizer, render
from files import (
    BASE_RUN,
    UserError,
    find_runs,
    pick_questions,
    read_json,
    read_jsonl,
    read_questions,
    run_main,
    sha256_file,
    sha256_json,
    versions,
    write_json,
    write_jsonl,
)
from modeling import load_adapter, load_base, pick_dtype

# FastChat's temperature_config. Below GREEDY_BELOW it takes the most probable token.
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
GREEDY_BELOW = 1e-4


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
    parser.add_argument("--mt_bench", type=Path, default=Path("data/mt_bench"), help="folder with question.jsonl")
    parser.add_argument("--num_questions", type=int, help="only so many, spread over the categories (default: all)")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="tokens a turn at most (MT-Bench: 1024)")
    parser.add_argument("--batch_size", type=int, default=16, help="answers generated at once")
    parser.add_argument("--seed", type=int, default=42, help="of the sampled categories")
    parser.add_argument(
        "--quant", choices=["auto", "nf4", "none"], default="auto", help="of the base; auto: as in training"
    )
    parser.add_argument(
        "--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="auto: bf16 where the hardware has it"
    )
    return parser.parse_args(argv)


# ---- which runs, on which base ------------------------------------------------------------------


class Run(NamedTuple):
    """A run to answer for. adapter None is the untrained model."""

    folder: Path
    run_id: str
    adapter: Path | None
    sha256: str | None  # of the adapter's weights


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
        runs.append(Run(folder, folder.resolve().name, weights.parent, sha256_file(weights)))
    if not runs and not args.base:
        raise UserError(f"{args.results[0]}: no adapters here; train with train_pref.py, or give --base --model MODEL")
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


def base_run(args: argparse.Namespace, model: str, quant: str, runs: list[Run]) -> Run:
    """The run `base`, beside the others: args.json and answers, no adapter."""
    folder = (runs[0].folder.parent if runs else args.results[0]) / BASE_RUN
    if (folder / "args.json").is_file():
        old = read_json(folder / "args.json")
        if (old.get("model"), old.get("quant")) != (model, quant):
            raise UserError(
                f"{folder}: holds answers of base model {old.get('model')} (quant {old.get('quant')}), not of {model} "
                f"(quant {quant}); remove the folder"
            )
    else:
        record = {"run_id": BASE_RUN, "loss": None, "beta": None, "tau": None, "seed": None, "mode": "full"}
        write_json(folder / "args.json", {**record, "model": model, "quant": quant, "versions": versions()})
    return Run(folder, BASE_RUN, None, None)


# ---- answering ----------------------------------------------------------------------------------


class RowSampler(LogitsProcessor):
    """Sampling by argmax: each row's logits divided by its temperature plus Gumbel noise from its own generator.

    Rows of different temperatures share a batch, and a row's random numbers do not depend on who shares it.
    scores: (rows, V) -> (rows, V); rows below GREEDY_BELOW stay as they are.
    """

    def __init__(self, temperatures: list[float], seeds: list[int]):
        self.temperatures = temperatures
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.float().clone()
        for row, (temperature, generator) in enumerate(zip(self.temperatures, self.generators)):
            if temperature >= GREEDY_BELOW:
                noise = torch.empty(scores.shape[1]).exponential_(generator=generator).clamp_min_(1e-30).log_().neg_()
                scores[row] = scores[row] / temperature + noise.to(scores.device)
        return scores


class Writer(NamedTuple):
    """A model ready to write answers."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: GenerationConfig
    room: int  # prompt tokens that leave space for an answer in the context window


def make_config(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, max_new_tokens: int) -> GenerationConfig:
    """Greedy over RowSampler's scores. The model's own generation config is set aside, since `generate` would fill in
    what is not given here: a repetition penalty or top-p is not MT-Bench's protocol."""
    ends = end_token_ids(tokenizer, model.generation_config)
    model.generation_config = GenerationConfig()
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )


class Answer(NamedTuple):
    text: str
    tokens: int
    truncated: bool  # stopped by max_new_tokens, not by an end token
    overflow: bool  # the conversation's start was cut to fit the context window


@torch.no_grad()
def answer_turn(
    writer: Writer, conversations: list[list[dict]], temperatures: list[float], seeds: list[int]
) -> list[Answer]:
    """The model's next message in each conversation, generated as one left-padded batch."""
    prompts = [encode(writer.tokenizer, render(writer.tokenizer, c, generation_prompt=True)) for c in conversations]
    cut = [prompt[max(0, len(prompt) - writer.room) :] for prompt in prompts]
    width = max(map(len, cut))
    ids = torch.tensor([[writer.tokenizer.pad_token_id] * (width - len(p)) + p for p in cut])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in cut])
    output = writer.model.generate(
        input_ids=ids.to(writer.model.device),
        attention_mask=mask.to(writer.model.device),
        generation_config=writer.config,
        logits_processor=LogitsProcessorList([RowSampler(temperatures, seeds)]),
    )
    answers = []
    for prompt, kept, row in zip(prompts, cut, output[:, width:].tolist()):
        ends = [i for i, token in enumerate(row) if token in writer.config.eos_token_id]
        tokens = row[: ends[0]] if ends else row
        text = writer.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        answers.append(Answer(text, len(tokens), not ends, len(kept) < len(prompt)))
    return answers


def seed_of(seed: int, question_id: int, turn: int) -> int:
    return int(np.random.SeedSequence([seed, question_id, turn]).generate_state(1)[0])


def answer_questions(writer: Writer, questions: list[dict], seed: int) -> list[list[Answer]]:
    """Both turns of a batch of questions."""
    temperatures = [TEMPERATURES[q["category"]] for q in questions]
    conversations: list[list[dict]] = [[] for _ in questions]
    turns: list[list[Answer]] = [[] for _ in questions]
    for turn in range(2):
        for conversation, question in zip(conversations, questions):
            conversation.append({"role": "user", "content": question["turns"][turn]})
        seeds = [seed_of(seed, q["question_id"], turn) for q in questions]
        for i, answer in enumerate(answer_turn(writer, conversations, temperatures, seeds)):
            conversations[i].append({"role": "assistant", "content": answer.text})
            turns[i].append(answer)
    return turns


# ---- rows on disk -------------------------------------------------------------------------------


def settings_of(args: argparse.Namespace, base: dict, dtype: torch.dtype) -> dict:
    """What an answer depends on, beside question and adapter; kept in each row."""
    return {
        "model": base["model"], "quant": base["quant"], "dtype": str(dtype).removeprefix("torch."),
        "max_new_tokens": args.max_new_tokens, "seed": args.seed,
    }  # fmt: skip


def answer_row(run: Run, question: dict, answers: list[Answer], settings: dict, batch_size: int) -> dict:
    """A line of answers.jsonl: FastChat's fields, then what reproduces the answer."""
    row = {
        "question_id": question["question_id"],
        "model_id": run.run_id,
        "choices": [{"index": 0, "turns": [answer.text for answer in answers]}],
    }
    return {
        "answer_id": sha256_json([row, run.sha256, settings])[:22],
        **row,
        "tstamp": time.time(),
        "category": question["category"],
        "temperature": TEMPERATURES[question["category"]],
        "tokens": [answer.tokens for answer in answers],
        "truncated": [answer.truncated for answer in answers],
        "overflow": [answer.overflow for answer in answers],
        "adapter_sha256": run.sha256,
        "settings": settings,
        "batch_size": batch_size,  # in bf16 a greedy answer can change with the rows beside it
    }


def kept_rows(path: Path, run: Run, settings: dict) -> list[dict]:
    """Rows of an earlier start that still hold. Raises UserError if they were made with other settings."""
    if not path.is_file():
        return []
    rows = [row for _, row in read_jsonl(path)]
    current = [row for row in rows if row.get("adapter_sha256") == run.sha256]
    if len(current) < len(rows):
        print(f"{run.run_id}: {len(rows) - len(current)} answers are of an older adapter; answering anew", flush=True)
    for row in current:
        old = row.get("settings", {})
        if different := [key for key in settings if old.get(key) != settings[key]]:
            what = ", ".join(f"{key} was {old.get(key)}, is {settings[key]}" for key in different)
            raise UserError(f"{path}: holds answers with other settings ({what}); use the same, or delete the file")
    return current


def answer_run(writer: Writer, run: Run, questions: list[dict], settings: dict, args, bar: tqdm) -> list[dict]:
    """Answer what is missing for one run; the file is replaced after each batch. Returns all its rows."""
    path = run.folder / "mt_bench" / "answers.jsonl"
    rows = kept_rows(path, run, settings)
    done = {row["question_id"] for row in rows}
    bar.update(sum(q["question_id"] in done for q in questions))
    missing = sorted((q for q in questions if q["question_id"] not in done), key=lambda q: len(q["turns"][0]))
    for start in range(0, len(missing), args.batch_size):
        batch, begun = missing[start : start + args.batch_size], time.monotonic()
        answers = answer_questions(writer, batch, args.seed)
        rows += [answer_row(run, question, turns, settings, args.batch_size) for question, turns in zip(batch, answers)]
        write_jsonl(path, sorted(rows, key=lambda row: row["question_id"]))
        tokens = sum(answer.tokens for turns in answers for answer in turns)
        bar.set_postfix_str(f"{run.run_id} {tokens / (time.monotonic() - begun):.0f} tok/s")
        bar.update(len(batch))
    return rows


def print_summary(table: dict[str, list[dict]], args: argparse.Namespace) -> None:
    print(f"\n{'run':<40} answers  tokens 1  tokens 2  truncated  empty  overflow")
    for run_id, rows in table.items():
        first, second = np.mean([row["tokens"] for row in rows], axis=0)
        truncated, overflow = (sum(sum(row[key]) for row in rows) for key in ("truncated", "overflow"))
        empty = sum(not turn for row in rows for turn in row["choices"][0]["turns"])
        print(f"{run_id:<40} {len(rows):>7}  {first:>8.1f}  {second:>8.1f}  {truncated:>9}  {empty:>5}  {overflow:>8}")
    results = " ".join(map(str, args.results))
    print(f"\nanswers: {args.results[0]}/<run_id>/mt_bench/answers.jsonl")
    print(f"next: python judge.py {results} --judge MODEL [--base_url URL], or --judge hf:FOLDER", flush=True)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.max_new_tokens < 1 or args.batch_size < 1:
        raise UserError("--max_new_tokens and --batch_size must be at least 1")
    runs, base = collect_runs(args)
    questions = pick_questions(read_questions(args.mt_bench / "question.jsonl"), args.num_questions)
    if base["model"] is None:
        raise UserError("--base without any run needs --model")
    tokenizer = load_tokenizer(base["model"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = pick_dtype(args.dtype, device)
    settings = settings_of(args, base, dtype)
    for run in runs:  # before the model is loaded: other settings are refused here
        kept_rows(run.folder / "mt_bench" / "answers.jsonl", run, settings)

    model = load_base(base["model"], dtype, base["quant"], device).eval()
    window = model.config.get_text_config().max_position_embeddings
    if args.max_new_tokens >= window:
        raise UserError(f"--max_new_tokens {args.max_new_tokens}: the model's context is {window} tokens")
    config = make_config(tokenizer, model, args.max_new_tokens)
    print("first prompt as the model sees it:\n" + json.dumps(
        render(tokenizer, [{"role": "user", "content": questions[0]["turns"][0]}], generation_prompt=True),
        ensure_ascii=False), flush=True)  # fmt: skip
    table = {}
    with tqdm(total=len(runs) * len(questions), desc="answers", unit="question", disable=None) as bar:
        for run in runs:
            tuned = model if run.adapter is None else load_adapter(model, run.adapter).eval()
            writer = Writer(tuned, tokenizer, config, window - args.max_new_tokens)
            table[run.run_id] = answer_run(writer, run, questions, settings, args, bar)
            if run.adapter is not None:
                model = tuned.unload()
    print_summary(table, args)
    return 0


if __name__ == "__main__":
    run_main(main)
