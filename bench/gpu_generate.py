"""The engine's rate of tokens on one GPU, against PEFT's `generate` and against what memory allows.
A part of bench/gpu.sh; prints rows (gpu_rows.py).

    python bench/gpu_generate.py --model DIR [--rows 32 128] [--new_tokens 64]

All rows have prompts of `--prompt` tokens, one adapter, greedy decoding and no end token, so that
both compute the same number of tokens. A step reads every stored weight once, and the keys and
values of every row: the time for that at the card's bandwidth is `bound_ms`, and `bandwidth_share`
is it over the engine's time for a step, the median. tokens_per_s counts prompts' time too.
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from gpu_rows import attempt, card, emit, peaks_of
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from pref.answering import cache
from pref.answering.generation import Engine, Request
from pref.model.loading import load_base, pick_dtype

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--lora_r", type=int, default=64)
    return parser.parse_args()


def make_adapter(model: PreTrainedModel, r: int, folder: Path) -> None:
    """Write a random adapter on every linear layer but the head."""
    head, tensors = model.get_output_embeddings(), {}
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            key = f"base_model.model.{name}.lora_"
            a = torch.randn(r, module.in_features, generator=generator) / module.in_features**0.5
            b = torch.randn(module.out_features, r, generator=generator) * 1e-3
            tensors |= {f"{key}A.weight": a.bfloat16(), f"{key}B.weight": b.bfloat16()}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    LoraConfig(
        r=r, lora_alpha=r, target_modules="all-linear", task_type="CAUSAL_LM"
    ).save_pretrained(folder)


def prompts(rows: int, length: int, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, vocabulary, (rows, length), generator=generator).tolist()


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def with_peft(model: PeftModel, rows: int, args: argparse.Namespace) -> dict:
    """`generate` on all rows at once."""
    ids = torch.tensor(prompts(rows, args.prompt, model.config.vocab_size), device=DEVICE)
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}
    few = ids[:, :8]
    model.generate(
        input_ids=few, attention_mask=torch.ones_like(few), max_new_tokens=2, **greedy
    )  # what a first call alone does: kernels are loaded
    wait()
    begun = time.perf_counter()
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=args.new_tokens,
        **greedy,
    )
    wait()
    seconds = time.perf_counter() - begun
    return {"tokens_per_s": (output.numel() - ids.numel()) / seconds}


def with_engine(model: PreTrainedModel, folder: Path, rows: int, args: argparse.Namespace) -> dict:
    """The engine on all rows at once."""
    for module in model.modules():  # as an engine before this one left them
        if isinstance(vars(module).get("forward"), partial):
            del module.forward
    length, tokens, begins = args.prompt + args.new_tokens, 0, []
    engine = Engine(model, {"adapter": folder}, rows, length, ends=[])
    engine.adapters.use({"adapter"})  # what the run would load first

    def finished(request: Request) -> None:
        nonlocal tokens
        tokens += len(request.tokens)

    decode = engine.decode

    def timed(slots):
        begins.append(time.perf_counter())
        return decode(slots)

    engine.decode = timed
    asked = prompts(rows, args.prompt, model.config.vocab_size)
    begun = time.perf_counter()
    engine.run((Request(p, "adapter", 0.0, 0, args.new_tokens) for p in asked), finished)
    wait()
    seconds = time.perf_counter() - begun
    step = statistics.median(b - a for a, b in zip(begins, begins[1:]))
    values = {"tokens_per_s": tokens / seconds, "step_ms": 1e3 * step}
    if DEVICE.type == "cuda":
        values["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if peaks := peaks_of(card()):
        bound = bytes_of_step(model, engine, rows, length) / peaks[1]
        values |= {"bound_ms": 1e3 * bound, "bandwidth_share": bound / step}
    return values


def bytes_of_step(model: PreTrainedModel, engine: Engine, rows: int, length: int) -> int:
    """What one token more of every row reads: the weights as stored (of the embedding a few rows),
    the adapter, and the keys and values so far, half way.
    """
    embedding = model.get_input_embeddings().weight
    weights = sum(p.nbytes for p in model.parameters() if p is not embedding)
    adapter = sum(s.a.nbytes + s.b.nbytes for s in engine.adapters.stacks.values())
    read = cache.rounded_up(length)
    stored = sum(
        buffer[:rows, :, :read].nbytes for pair in engine.cache.layers.values() for buffer in pair
    )
    return weights + adapter + stored


def main() -> None:
    args = parse_args()
    dtype = pick_dtype("auto", DEVICE)
    with tempfile.TemporaryDirectory() as temporary:
        folder, models = Path(temporary) / "adapter", []

        def load() -> dict:
            base = load_base(args.model, dtype, "none", DEVICE).eval()
            base.config.use_cache = True
            make_adapter(base, args.lora_r, folder)
            models.append(base)
            return {}

        if "failed" in attempt("model and adapter loaded", load):
            return
        base = models[0]
        rates: dict[tuple[str, int], float] = {}

        def measured(name: str, rows: int, work) -> None:
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            row = attempt(f"{name}, {rows} rows", work)
            rates[name, rows] = row.get("tokens_per_s", 0.0)

        tuned = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)
        for rows in args.rows:
            measured("PEFT's generate", rows, lambda n=rows: with_peft(tuned, n, args))
        base = tuned.unload()
        base.config.use_cache = False
        for rows in args.rows:
            measured("engine", rows, lambda n=rows: with_engine(base, folder, n, args))
        best = {
            name: max(rate for (who, _), rate in rates.items() if who == name)
            for name in ("engine", "PEFT's generate")
        }
        if all(best.values()):
            emit(
                "engine over PEFT, each at its best", ratio=best["engine"] / best["PEFT's generate"]
            )


if __name__ == "__main__":
    main()
