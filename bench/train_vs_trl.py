"""train_pref.py against TRL's DPOTrainer: pairs per second and peak memory, same model, pairs, LoRA
and micro-batch.

    pip install --no-deps trl==1.16.0 accelerate==1.15.0     # in addition to requirements.txt
    python bench/train_vs_trl.py --model MODEL --pairs PAIRS.jsonl --max_length 512

MODEL: a chat model's folder (`python examples/embedded_model.py DIR` makes one); PAIRS.jsonl:
prep_data.py's format. Contestants run in turn, each in a process of its own, `--rounds` times over,
so that a machine's slow minute meets all of them: TRL, TRL with precomputed reference log-probs,
train_pref.py with its defaults, and with --prefix_sharing off --packing off --compile off. A step
has `--global_batch` pairs, by default one micro-batch of `--batch`; the first `--warmup` steps
(where compiling happens) are not timed, and the rate is pairs over the sum of the other steps'
times. A step's time ends when the device has finished it. The reference
pass of TRL with precomputed references and of train_pref.py lies before the first step and is not
in the rate: a study's runs share it. `--only full_logits train_pref_plain packed_eager shared_eager
train_pref` climbs from all logits of a padded batch to the defaults, technique by technique. Prints
a table, every contestant's losses, and one JSON object as the last line.

gemm_share: model FLOPs per second (4 x body parameters x computed tokens, 4 x head parameters x
response tokens; the embedding is not a product) over this machine's measured rate of the model's
own largest layer in the same dtype.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PACKED, PLAIN = ("--prefix_sharing", "off"), ("--packing", "off", "--prefix_sharing", "off")
EAGER = ("--compile", "off")
CONTESTANTS = {
    "trl": (),
    "trl_precomputed": (),
    "train_pref": (),
    "train_pref_plain": (*PLAIN, *EAGER),
    "full_logits": (*PLAIN, *EAGER),
    "packed_eager": (*PACKED, *EAGER),
    "shared_eager": EAGER,
}
DEFAULT = ("trl", "trl_precomputed", "train_pref", "train_pref_plain")
LORA = ("--lora_alpha", 16, "--lora_dropout", 0)
BETA, SEED = 0.1, 42


class Failed(SystemExit):
    """A contestant ended with an error: its message has the end of what it printed."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a chat model")
    parser.add_argument("--pairs", type=Path, required=True, help="train.jsonl of prep_data.py")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of prompt + response")
    parser.add_argument("--steps", type=int, default=8, help="timed steps per round")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them, not timed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4, help="pairs per micro-batch")
    parser.add_argument("--global_batch", type=int, default=0, help="pairs per step; 0: as --batch")
    parser.add_argument(
        "--tokens_per_microbatch",
        type=int,
        default=0,
        help="train_pref's budget; 0: as many as --batch pairs may have",
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--quant", choices=["none", "nf4"], default="none")
    parser.add_argument(
        "--checkpointing",
        choices=["on", "off", "auto"],
        default="off",
        help="for all contestants; auto, by train_pref's plan, is off for TRL",
    )
    parser.add_argument(
        "--compile",
        choices=["on", "off", "auto"],
        default="on",
        help="train_pref's; auto is on for long runs",
    )
    parser.add_argument("--liger", action="store_true", help="TRL with Liger's kernels (GPU)")
    parser.add_argument("--tune", choices=["lora", "full"], default="lora")
    parser.add_argument("--lora_r", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), default=DEFAULT)
    parser.add_argument("--worker", choices=["trl", "trl_precomputed"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.global_batch = args.global_batch or args.batch
    if args.global_batch % args.batch:
        parser.error(f"--global_batch {args.global_batch}: no multiple of --batch {args.batch}")
    return args


# ---- the same pairs, cut the same way -----------------------------------------------------------


def choose_pairs(args: argparse.Namespace, folder: Path) -> dict:
    """Write train.jsonl and val.jsonl: the first pairs that both tools truncate alike. Returns
    counts per step.
    """
    from pref.files.disk import write_jsonl
    from pref.files.pairs import read_pairs
    from pref.model.chat import load_tokenizer, tokenize_pair, truncate
    from pref.training.schedule import pairs_of_step

    tokenizer = load_tokenizer(args.model)
    wanted, kept, tokens, dropped = (args.steps + args.warmup) * args.global_batch, [], [], 0
    for row in read_pairs(args.pairs):
        pair = truncate(
            tokenize_pair(tokenizer, row), args.max_length, "keep_start", tokenizer.bos_token_id
        )
        if pair.cut_prompt:  # TRL cuts the response's end alone
            dropped += 1
            continue
        kept.append(row)
        tokens.append(pair)
        if len(kept) == wanted:
            break
    assert len(kept) == wanted, f"{args.pairs}: {len(kept)} pairs, {wanted} needed"
    write_jsonl(folder / "train.jsonl", kept)
    write_jsonl(folder / "val.jsonl", kept[: args.batch])
    order = [
        pairs_of_step(step, wanted, args.global_batch, SEED)
        for step in range(args.steps + args.warmup)
    ]
    write_jsonl(folder / "in_order.jsonl", [kept[i] for step in order for i in step])
    timed = [tokens[i] for step in order[args.warmup :] for i in step]
    return {
        "dropped": dropped,
        "shared": sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in timed) / len(timed),
        "unpadded": sum(p.tokens for p in timed) / len(timed),
        "responses": sum(len(p.chosen) + len(p.rejected) for p in timed) / len(timed),
    }


# ---- contestants --------------------------------------------------------------------------------


def trl_worker(args: argparse.Namespace) -> None:
    """TRL's DPOTrainer over in_order.jsonl. Prints one JSON line: seconds per step, losses, peak
    memory.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from pref.model.loading import load_base
    from pref.model.lora import add_lora
    from pref.training.peak_memory import peak_gib

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)
    seconds, losses = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.begun = time.perf_counter()

        def on_step_end(self, *_, **__):
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.begun)

        def on_log(self, _args, _state, _control, logs=None, **__):
            if "loss" in logs:
                losses.append(logs["loss"])

    first, adapter = {}, None
    if args.tune == "lora":
        base = load_base(args.model, dtype, args.quant, device)
        ours = add_lora(base, args.lora_r, 16, 0.0, "all-linear", SEED)
        lora_a = ((name, p) for name, p in ours.named_parameters() if "lora_A" in name)
        first = {name: p.detach().clone() for name, p in lora_a}
        del ours
        base = load_base(args.model, dtype, args.quant, device)
        adapter = LoraConfig(
            r=args.lora_r,
            lora_alpha=16,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    else:  # fp32 weights, and bf16 by autocast
        base = load_base(args.model, torch.float32, "none", device).requires_grad_(True)
    rows = [
        json.loads(line)
        for line in (args.folder / "in_order.jsonl").read_text(encoding="utf-8").splitlines()
    ][: (args.warmup + args.steps) * args.global_batch]
    columns = ("prompt", "chosen", "rejected")
    config = DPOConfig(
        output_dir=str(args.folder / args.worker),
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=args.global_batch // args.batch,
        max_steps=args.warmup + args.steps,
        use_liger_kernel=args.liger,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        max_grad_norm=1.0,
        beta=BETA,
        max_length=args.max_length,
        truncation_mode="keep_start",
        bf16=dtype == torch.bfloat16,
        gradient_checkpointing=args.checkpointing == "on",
        precompute_ref_log_probs=args.worker == "trl_precomputed",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=SEED,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=False,
    )
    trainer = DPOTrainer(
        model=base,
        args=config,
        train_dataset=Dataset.from_list([{key: row[key] for key in columns} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=adapter,
        callbacks=[Clock()],
    )
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if name in first:
                p.copy_(first[name])
    trainer.train()
    print(json.dumps({"seconds": seconds, "losses": losses, "peak_gib": peak_gib(device)}))


def run_trl(
    args: argparse.Namespace, name: str, folder: Path, seconds: float | None = None
) -> dict:
    given = [
        f"--{key}={value}"
        for key, value in vars(args).items()
        if key not in ("only", "worker", "folder", "liger")
    ]
    given += ["--liger"] if args.liger else []
    command = [sys.executable, __file__, *given, "--worker", name, "--folder", str(folder)]
    return json.loads(run(command, seconds).splitlines()[-1])


def run_ours(
    args: argparse.Namespace, name: str, folder: Path, seconds: float | None = None
) -> dict:
    budget = args.tokens_per_microbatch
    command = [
        sys.executable,
        ROOT / "bench" / "timed_train.py",
        *(["--own_forward"] if name == "full_logits" else []),
        "--model",
        args.model,
        "--data",
        folder,
        "--results_dir",
        folder,
        "--run_id",
        name,
        "--loss",
        "dpo",
        "--beta",
        BETA,
        "--seed",
        SEED,
        "--learning_rate",
        args.learning_rate,
        "--epochs",
        1,
        "--max_steps",
        args.warmup + args.steps,
        "--global_batch",
        args.global_batch,
        "--per_device_batch",
        args.batch,
        "--max_length",
        args.max_length,
        "--truncation",
        "keep_start",
        "--tune",
        args.tune,
        *(LORA if args.tune == "lora" else []),
        *(["--lora_r", args.lora_r] if args.tune == "lora" else []),
        "--warmup_ratio",
        0,
        "--dtype",
        args.dtype,
        "--quant",
        args.quant,
        "--checkpointing",
        args.checkpointing,
        "--eval_steps",
        10**6,
        "--compile",
        args.compile,
        *(["--tokens_per_microbatch", budget] if budget else []),
        *CONTESTANTS[name],
    ]
    shutil.rmtree(folder / name, ignore_errors=True)
    run([str(part) for part in command], seconds)
    lines = [
        json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [line for line in lines if "loss" in line]
    record = json.loads((folder / name / "args.json").read_text())
    settled = ("checkpointing", "compile", "tokens_per_microbatch")
    return {
        "seconds": [line["tokens"] / line["tok_per_s"] for line in steps],
        "losses": [line["loss"] for line in steps],
        "peak_gib": steps[-1]["peak_gib"],
        "planned_gib": record.get("planned_gib"),
        "settings": {key: record[key] for key in settled if key in record},
    }


def run(command: list[str], seconds: float | None = None) -> str:
    """What `command` prints. Raises Failed if it ends with an error, or not within `seconds`."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        start_new_session=True,  # so that its own children end with it
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise Failed(f"not done within {seconds:.0f} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise Failed(
            f"{' '.join(command)}: exit code "
            f"{process.returncode}\n{output[-2000:]}\n{errors[-4000:]}"
        )
    return output


# ---- the limit ----------------------------------------------------------------------------------


def gemm_rate(args: argparse.Namespace, tokens: int = 2048) -> tuple[float, float, float]:
    """FLOP/s of the model's MLP product on `tokens` rows; parameters of the body and of the output
    head.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(args.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings().weight.numel()
    body = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)) - head
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = {"dtype": getattr(torch, args.dtype), "device": device}
    x = torch.randn(tokens, config.hidden_size, **kind)
    weight = torch.randn(config.intermediate_size, config.hidden_size, **kind)
    best = float("inf")
    for _ in range(50):
        begun = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return 2 * tokens * weight.numel() / best, body, head


def main() -> None:
    args = parse_args()
    if args.worker:
        trl_worker(args)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        counts = choose_pairs(args, folder)
        print(
            f"{(args.steps + args.warmup) * args.global_batch} pairs at {args.max_length} tokens "
            f"({counts['dropped']} "
            "skipped: long prompts, which the tools cut differently); a pair is "
            f"{counts['shared']:.0f} tokens "
            f"as one row, {counts['unpadded']:.0f} as two",
            flush=True,
        )
        results: dict[str, list[dict]] = {name: [] for name in args.only}
        for number in range(args.rounds):
            for name in args.only:
                begun = time.perf_counter()
                results[name].append(
                    (run_trl if name.startswith("trl") else run_ours)(args, name, folder)
                )
                spent = sum(results[name][-1]["seconds"][args.warmup :])
                print(
                    f"round {number + 1}: {name:<17} {args.steps * args.global_batch / spent:.3f} "
                    "pairs/s, "
                    f"{results[name][-1]['peak_gib']:.2f} GiB, process "
                    f"{time.perf_counter() - begun:.0f} s",
                    flush=True,
                )
    report(args, results, counts)


def report(args: argparse.Namespace, results: dict[str, list[dict]], counts: dict) -> None:
    rates, peaks = {}, {}
    for name, rounds in results.items():
        timed = [second for one in rounds for second in one["seconds"][args.warmup :]]
        rates[name] = args.global_batch * len(timed) / sum(timed)
        peaks[name] = max(one["peak_gib"] for one in rounds)
        print(
            f"{name:<17} {rates[name]:7.3f} pairs/s  {peaks[name]:6.2f} GiB  losses "
            + " ".join(f"{loss:.4f}" for loss in rounds[0]["losses"])
        )
    rate, body, head = gemm_rate(args)
    last = {
        "max_length": args.max_length,
        "dtype": args.dtype,
        "pairs_per_s": rates,
        "peak_gib": peaks,
    }
    if "train_pref" in rates:
        flops = 4 * (body * counts["shared"] + head * counts["responses"])
        if args.tune == "full":
            flops = 6 * body * counts["shared"] + 8 * head * counts["responses"]
        last["gemm_share"] = rates["train_pref"] * flops / rate
        last["gemm_tflops"] = rate / 1e12
    if {"trl", "train_pref"} <= rates.keys():
        ours, theirs = results["train_pref"][0]["losses"], results["trl"][0]["losses"]
        last["ratio_pairs_per_s"] = rates["train_pref"] / rates["trl"]
        last["ratio_peak_memory"] = peaks["train_pref"] / peaks["trl"]
        last["max_loss_difference"] = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    if {"trl_precomputed", "train_pref"} <= rates.keys():
        last["ratio_precomputed"] = rates["train_pref"] / rates["trl_precomputed"]
    print(json.dumps(last))


if __name__ == "__main__":
    main()
