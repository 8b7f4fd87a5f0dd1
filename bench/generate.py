"""gen_mtbench.py's engine against `generate`: tokens per second, many adapters over one base model.

    python bench/generate.py --model MODEL --mt_bench DIR [--adapters 8] [--questions 16]
    [--max_new_tokens 64]

MODEL: a chat model's folder; DIR: folder with MT-Bench's question.jsonl. Random LoRA adapters are
made there and then. Contestants, in turn, `--rounds` times: (a) PEFT's `generate` one question at a
time, as FastChat does, on `--sample` questions of one adapter; (b) `generate` with left-padded
batches, adapter after adapter, at each of `--batch_sizes`; and the engine with all questions of all
adapters. Both turns each; rates count generated tokens. (a) and (b) decode greedily, which is the
cheaper. Prints a table and one JSON object as the last line.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GenerationConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gen_mtbench  # noqa: E402
from pref.answering import local, turns, work  # noqa: E402
from pref.answering.generation import Engine  # noqa: E402
from pref.files import mt_bench  # noqa: E402
from pref.files.disk import sha256_file, write_json  # noqa: E402
from pref.model.chat import end_token_ids, load_tokenizer, prompt_ids  # noqa: E402
from pref.model.loading import load_base, pick_dtype  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--mt_bench", type=Path, required=True)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--lora_r", type=int, default=16)
    parser.add_argument("--sample", type=int, default=4, help="questions of contestant (a)")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 16])
    parser.add_argument(
        "--batch_adapters", type=int, default=2, help="adapters that contestant (b) answers for"
    )
    parser.add_argument(
        "--rows", type=int, default=local.ROWS_ON_CPU, help="the engine's --batch_size"
    )
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--quant", default="none", choices=["none", "nf4"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--engine_only", action="store_true", help="leave `generate` out: for the engine's memory"
    )
    return parser.parse_args()


def make_adapters(model: str, count: int, r: int, folder: Path) -> list[Path]:
    base = load_base(model, torch.float32, "none", torch.device("cpu"))
    tuned = get_peft_model(
        base, LoraConfig(r=r, lora_alpha=r, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    paths = [folder / f"adapter{number}" / "adapter" for number in range(count)]
    for number, path in enumerate(paths):
        torch.manual_seed(number)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=1e-3)
        tuned.save_pretrained(path)
        write_json(
            path.parent / "args.json", {"run_id": path.parent.name, "model": model, "quant": "none"}
        )
    return paths


def left_padded(tokenizer, conversations: list[list[dict]]) -> dict:
    prompts = [prompt_ids(tokenizer, conversation) for conversation in conversations]
    width = max(map(len, prompts))
    ids = [[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return {
        "input_ids": torch.tensor(ids, device=DEVICE),
        "attention_mask": torch.tensor(mask, device=DEVICE),
    }


@torch.inference_mode()
def with_generate(model, tokenizer, questions: list[dict], batch: int, max_new_tokens: int) -> int:
    """Both turns of `questions` through model.generate. Returns the number of tokens generated."""
    ends = end_token_ids(tokenizer, model.generation_config)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    count = 0
    for start in range(0, len(questions), batch):
        asked = questions[start : start + batch]
        conversations = [[] for _ in asked]
        for turn in range(2):
            for conversation, question in zip(conversations, asked):
                conversation.append({"role": "user", "content": question["turns"][turn]})
            given = left_padded(tokenizer, conversations)
            output = model.generate(**given, generation_config=config)[
                :, given["input_ids"].shape[1] :
            ].tolist()
            for conversation, row in zip(conversations, output):
                end = next((i for i, token in enumerate(row) if token in ends), len(row))
                count += min(end + 1, len(row))
                text = tokenizer.decode(row[:end], skip_special_tokens=True).strip()
                conversation.append({"role": "assistant", "content": text})
    return count


def with_engine(
    model, tokenizer, questions: list[dict], adapters: list[Path], folder: Path, args
) -> int:
    """Everything as gen_mtbench.py does it, files included. Returns the number of tokens
    generated.
    """
    bench = work.Bench("mt_bench", questions)
    runs = [
        work.Run(
            folder / p.parent.name,
            p.parent.name,
            p,
            sha256_file(p / "adapter_model.safetensors"),
            {},
        )
        for p in adapters
    ]
    store = turns.Store(runs, bench, {}, args.rows)
    length = local.cache_length(tokenizer, bench, args.max_new_tokens, 2048)
    ends = end_token_ids(tokenizer, model.generation_config)
    engine = Engine(model, {run.run_id: run.adapter for run in runs}, args.rows, length, ends)
    sampling, loaded = work.Sampling(42, args.max_new_tokens), work.Loaded("base", "none", runs)
    author = local.Author(engine, tokenizer, store, sampling, loaded)
    items, counted = work.all_items(runs, bench, 1), 0

    def count(request):
        nonlocal counted
        counted += len(request.tokens)
        return author.finished(request)

    engine.run((author.request(item) for item in items), count)
    store.gather()
    return counted


def main() -> None:
    args = parse_args()
    tokenizer, dtype = load_tokenizer(args.model), pick_dtype(args.dtype, DEVICE)
    bench = gen_mtbench.load_bench(gen_mtbench.parse_args([".", "--mt_bench", str(args.mt_bench)]))
    questions = mt_bench.pick_questions(bench.questions, args.questions)
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        adapters = make_adapters(args.model, args.adapters, args.lora_r, Path(temporary))

        def timed(name: str, work, *given) -> None:
            begun = time.monotonic()
            tokens = work(*given)
            seconds = time.monotonic() - begun
            rates.setdefault(name, []).append(tokens / seconds)
            print(
                f"{name:<24} {tokens:>6} tokens in {seconds:6.1f} s, {tokens / seconds:6.1f} "
                "tokens/s",
                flush=True,
            )

        for number in range(args.rounds):
            for batch in () if args.engine_only else (1, *args.batch_sizes):
                sample = (
                    questions[:: max(1, len(questions) // args.sample)][: args.sample]
                    if batch == 1
                    else questions
                )
                for adapter in adapters[: 1 if batch == 1 else args.batch_adapters]:
                    base = load_base(args.model, dtype, args.quant, DEVICE)
                    base.config.use_cache = True
                    model = (
                        PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False)
                        .to(dtype)
                        .eval()
                    )
                    timed(
                        f"generate, batch {batch}",
                        with_generate,
                        model,
                        tokenizer,
                        sample,
                        batch,
                        args.max_new_tokens,
                    )
            model = load_base(args.model, dtype, args.quant, DEVICE).eval()
            folder = Path(temporary) / f"round{number}"
            timed("engine", with_engine, model, tokenizer, questions, adapters, folder, args)
    best = {name: max(values) for name, values in rates.items()}
    print("\n| contestant | tokens/s, rounds |\n|---|---|")
    for name, values in rates.items():
        print(f"| {name} | {', '.join(f'{value:.1f}' for value in values)} |")
    result = {
        "tokens_per_s": best,
        "rows": args.rows,
        "adapters": args.adapters,
        "dtype": str(dtype),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    if DEVICE.type == "cuda":
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if not args.engine_only:
        batched = max(
            (name for name in best if name not in ("engine", "generate, batch 1")), key=best.get
        )
        result |= {
            "batched": batched,
            "ratio_one_by_one": best["engine"] / best["generate, batch 1"],
            "ratio_batched": best["engine"] / best[batched],
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
