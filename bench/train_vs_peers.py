"""train_pref.py against TRL, Unsloth's CPU backend, ms-swift and LLaMA-Factory: pairs per second
and peak memory of DPO with LoRA on the same pairs, on a CPU.

    python bench/train_vs_peers.py --model MODEL --pairs PAIRS.jsonl --unsloth PYTHON \\
      --swift PYTHON --llamafactory PYTHON

Each PYTHON is the interpreter of an environment in which one peer is installed; a peer that is not
named is left out, and one that does not run is a row with its error. This script's own interpreter
needs what bench/train_vs_trl.py needs: ours and TRL's rows are that script's contestants.

The work is the same, and that it is the same is checked, not assumed:

 1. Pairs that nobody has to cut at --max_length (the tools cut in different ways), in one order, a
    micro-batch of --batch pairs to a step; no activation checkpointing; the references by a second
    forward pass in every step, which is how the peers do it (ours caches them before step 1).
 2. LoRA r --lora_r on all linear layers with our initial values; AdamW, cosine, beta 0.1.
 3. Checked for each: the loss of step 1 is ln 2 and, of the peers, the decoder has seen in each
    step as many tokens, padding aside, as our tokenizer counts. In float32 the losses of all steps
    are ours too (--dtype float32 fails where they are not); in bfloat16 their distance to ours is
    printed.

The chat template is SmolLM2's: MODEL is the embedded model (`examples/embedded_model.py`). The
first --warmup steps are not timed. Processes run in turn. Prints one table and a line of JSON;
exit code 1 if a check failed or a named peer did not run.
"""

import argparse
import json
import math
import multiprocessing
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import train_vs_trl

PEERS = ("unsloth", "unsloth_compile", "swift", "llamafactory")
# Distance of step 1's loss from ln 2. Some log four decimals. In bfloat16 a cached reference is off
# by rounding, 1.2 nats a pair (bench/rounding.py): 0.03 in the loss of 4 pairs at beta 0.1.
STEP_1_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.15}
LOSS_TOLERANCE = 5e-4  # float32, every step


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the embedded model")
    parser.add_argument("--pairs", type=Path, required=True, help="train.jsonl of prep_data.py")
    parser.add_argument("--unsloth", metavar="PYTHON")
    parser.add_argument("--unsloth_compile", metavar="PYTHON", help="with UNSLOTH_CPU_COMPILE=1")
    parser.add_argument("--swift", metavar="PYTHON", help="interpreter that has ms-swift")
    parser.add_argument("--llamafactory", metavar="PYTHON")
    parser.add_argument("--max_length", type=int, default=512, help="longer pairs are left out")
    parser.add_argument("--steps", type=int, default=2, help="timed steps per round")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them, not timed")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4, help="pairs per step and micro-batch")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--lora_r", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--seconds", type=int, default=600, help="limit of one process")
    return parser.parse_args()


# ---- here: the pairs, the runs, the table --------------------------------------------------------


def options_of_trl_bench(args: argparse.Namespace, pairs: Path) -> argparse.Namespace:
    """train_vs_trl.py's own options for the same work."""
    same = ("model", "max_length", "steps", "warmup", "batch", "dtype", "lora_r", "learning_rate")
    given = [f"--{key}={getattr(args, key)}" for key in same]
    with mock.patch.object(sys, "argv", ["train_vs_trl.py", *given, f"--pairs={pairs}"]):
        return train_vs_trl.parse_args()


def prepare(args: argparse.Namespace, folder: Path) -> dict:
    """Write the pairs for each contestant, the peers' model, the LoRA values to begin with and
    work.json. Returns train_vs_trl's counts of a timed pair's tokens, and "of_steps": the tokens of
    each step. Loads the model: run it in a process of its own, since a child's peak memory begins
    at its parent's.
    """
    import torch
    from safetensors.torch import save_file

    from pref.files.disk import read_jsonl, write_jsonl
    from pref.files.pairs import read_pairs
    from pref.model.chat import load_tokenizer, tokenize_pair
    from pref.model.loading import load_base
    from pref.model.lora import add_lora

    tokenizer = load_tokenizer(args.model)
    uncut = folder / "uncut.jsonl"
    fits = lambda row: tokenize_pair(tokenizer, row).longest <= args.max_length  # noqa: E731
    write_jsonl(uncut, [row for row in read_pairs(args.pairs) if fits(row)])
    counts = train_vs_trl.choose_pairs(options_of_trl_bench(args, uncut), folder)

    formats, tokens = {"unsloth": [], "swift": [], "llamafactory": []}, []
    for _line, row in read_jsonl(folder / "in_order.jsonl"):
        tokens.append(tokenize_pair(tokenizer, row).tokens)
        prompt, chosen, rejected = (row[key] for key in ("prompt", "chosen", "rejected"))
        formats["unsloth"].append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        formats["swift"].append(
            {"messages": prompt + chosen, "rejected_response": rejected[0]["content"]}
        )
        formats["llamafactory"].append(
            {"prompt": prompt, "chosen": chosen[0], "rejected": rejected[0]}
        )
    counts["of_steps"] = [
        sum(tokens[i : i + args.batch]) for i in range(0, len(tokens), args.batch)
    ]
    for name, rows in formats.items():
        write_jsonl(folder / f"{name}.jsonl", rows)

    # In --dtype on disk: LLaMA-Factory 0.9.5 trains in the checkpoint's, whatever it is asked for.
    shutil.copytree(args.model, folder / "model", ignore=shutil.ignore_patterns("*.safetensors*"))
    model = load_base(args.model, getattr(torch, args.dtype), "none", torch.device("cpu"))
    model.save_pretrained(folder / "model")
    model = add_lora(model, args.lora_r, 16, 0.0, "all-linear", train_vs_trl.SEED)
    first = {n: p.detach().contiguous() for n, p in model.named_parameters() if "lora_A" in n}
    save_file(first, folder / "first_lora.safetensors")
    keys = ("max_length", "dtype", "lora_r", "batch", "learning_rate")
    work = {key: getattr(args, key) for key in keys}
    work |= {"beta": train_vs_trl.BETA, "model": str(folder / "model")}
    (folder / "work.json").write_text(json.dumps(work), encoding="utf-8")
    return counts


def run_peer(args: argparse.Namespace, name: str, folder: Path) -> dict:
    """One peer's result.json. Raises train_vs_trl.Failed."""
    (folder / "result.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "output", ignore_errors=True)
    settings = [f"HF_HOME={folder}/hf", f"MODELSCOPE_CACHE={folder}/modelscope"]  # no stale rows
    if name == "unsloth_compile":
        settings.append("UNSLOTH_CPU_COMPILE=1")
    here = ["env", f"--chdir={folder}", *settings]  # peers write caches where they are started
    worker = Path(__file__).resolve().with_name("peer_worker.py")
    command = [*here, getattr(args, name), "-P", str(worker), name, str(folder)]
    train_vs_trl.run(command, args.seconds)
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def problems(args: argparse.Namespace, name: str, result: dict, ours: dict, counts: dict) -> list:
    """What shows that `result` is not of the same work, as sentences; none if it is."""
    found = []
    losses = result["losses"]
    apart = difference(losses, ours["losses"])
    if not all(math.isfinite(loss) for loss in losses):
        found.append(f"{name}: a loss is not finite: {losses}")
    elif not abs(losses[0] - math.log(2)) < STEP_1_TOLERANCE[args.dtype]:
        found.append(f"{name}: the loss of step 1 is {losses[0]:.4f}, not ln 2")
    elif args.dtype == "float32" and not apart < LOSS_TOLERANCE:
        found.append(f"{name}: losses differ from ours by {apart:.4f}")
    tokens = result.get("tokens", counts["of_steps"])  # the peers' alone
    if tokens != counts["of_steps"]:
        found.append(f"{name}: {tokens} tokens in the steps, not {counts['of_steps']}")
    return found


def difference(losses: list[float], others: list[float]) -> float:
    """The largest over the steps; NaN if there is one."""
    apart = [abs(a - b) for a, b in zip(losses, others, strict=True)]
    return math.nan if any(map(math.isnan, apart)) else max(apart)


def complete(args: argparse.Namespace, result: dict) -> dict:
    """`result` if it has every step, else an error."""
    wanted = args.steps + args.warmup
    if len(result["seconds"]) == len(result["losses"]) == wanted:
        return result
    seen = f"{len(result['seconds'])} steps and {len(result['losses'])} losses"
    return {"error": f"{seen} were seen, not {wanted}"}


def run_all(args: argparse.Namespace, folder: Path) -> dict[str, list[dict]]:
    """Results of every contestant, a list over rounds. A failed one's last has "error"."""
    theirs = options_of_trl_bench(args, folder / "uncut.jsonl")
    runners = {
        "train_pref": lambda: train_vs_trl.run_ours(theirs, "train_pref", folder, args.seconds),
        "trl": lambda: train_vs_trl.run_trl(theirs, "trl", folder, args.seconds),
    }
    for name in PEERS:
        if getattr(args, name):
            runners[name] = lambda name=name: run_peer(args, name, folder)
    results: dict[str, list[dict]] = {name: [] for name in runners}
    for number in range(args.rounds):
        for name, runner in runners.items():
            if results[name] and "error" in results[name][-1]:
                continue
            begun = time.perf_counter()
            try:
                result = complete(args, runner())
            except train_vs_trl.Failed as error:
                result = {"error": str(error)}
            results[name].append(result)
            outcome = " ".join(f"{second:.1f}" for second in result.get("seconds", []))
            print(
                f"round {number + 1}: {name}: seconds of steps: {outcome or 'none'}; process "
                f"{time.perf_counter() - begun:.0f} s",
                flush=True,
            )
    return results


def report(args: argparse.Namespace, results: dict[str, list[dict]], counts: dict) -> bool:
    """Print the table, the errors, what is not the same work and a line of JSON. True if all is
    well.
    """
    ours = results["train_pref"][0]
    if "error" in ours:
        sys.exit(f"train_pref.py did not run: {ours['error']}")
    rows, bad = {}, []
    for name, rounds in results.items():
        if "error" in rounds[-1]:
            bad.append(f"{name} did not run: {rounds[-1]['error']}")
            continue
        for one in rounds:
            bad += problems(args, name, one, ours, counts)
        seconds = [second for one in rounds for second in one["seconds"][args.warmup :]]
        rows[name] = {
            "pairs_per_s": args.batch * len(seconds) / sum(seconds),
            "peak_gib": max(one["peak_gib"] for one in rounds),
            "loss_difference": difference(rounds[0]["losses"], ours["losses"]),
            "versions": rounds[0].get("versions", {}),
        }
    own = rows["train_pref"]
    print("\n| contestant | pairs/s | ours / it | peak GiB | ours / it | loss differs by |")
    print("|---|---|---|---|---|---|")
    for name in results:
        if name not in rows:
            print(f"| {name} | did not run | | | | |")
            continue
        row = rows[name]
        row["ratio_pairs_per_s"] = own["pairs_per_s"] / row["pairs_per_s"]
        row["ratio_peak_memory"] = own["peak_gib"] / row["peak_gib"]
        print(
            f"| {name} | {row['pairs_per_s']:.3f} | {row['ratio_pairs_per_s']:.2f} | "
            f"{row['peak_gib']:.2f} | {row['ratio_peak_memory']:.2f} | "
            f"{row['loss_difference']:.4f} |"
        )
    print(*(["", *bad] if bad else []), sep="\n")
    work = {key: getattr(args, key) for key in ("max_length", "dtype", "batch", "steps", "warmup")}
    print(json.dumps(work | {"tokens_per_pair": counts["unpadded"], "contestants": rows}))
    return not bad


def main() -> None:
    args = parse_args()
    args.model = str(Path(args.model).resolve())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as one_process:
            counts = one_process.submit(prepare, args, folder).result()
        print(
            f"{(args.steps + args.warmup) * args.batch} pairs, no sequence above {args.max_length} "
            f"tokens; a pair is {counts['shared']:.0f} tokens as one row, "
            f"{counts['unpadded']:.0f} as two",
            flush=True,
        )
        well = report(args, run_all(args, folder), counts)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
