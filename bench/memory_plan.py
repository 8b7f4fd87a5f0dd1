"""What --dry_run plans against what a run then takes, over the settings that change memory.

    python bench/memory_plan.py --model DIR --data data/NAME [--steps 3]

Each row is a run of its own (train_pref.py, dpo, LoRA r 16, 8 pairs per step); the last column is
planned / measured.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from train_vs_trl import ROOT, run

from pref.files.disk import read_json

SETTINGS = (
    "--max_length 512 --compile off",
    "--max_length 512 --compile on",
    "--max_length 1024 --compile off",
    "--max_length 1024 --compile on",
    "--max_length 1024 --compile off --checkpointing on",
    "--max_length 1024 --compile on --checkpointing on",
    "--max_length 512 --compile off --packing off --prefix_sharing off",
    "--max_length 512 --compile off --dtype float32 --per_device_batch 2",
    "--max_length 512 --compile off --shard adapters @2",
    "--max_length 512 --compile off --shard full @2",
)


def measure(setting: str, args: argparse.Namespace, folder: Path) -> tuple[float, float]:
    """(planned, measured) GiB of rank 0."""
    options, _, ranks = setting.partition("@")
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks] if ranks else []
    )
    command = [
        sys.executable,
        *launch,
        ROOT / "train_pref.py",
        *options.split(),
        "--model",
        args.model,
        "--data",
        args.data,
        "--results_dir",
        folder,
        "--run_id",
        "x",
        "--loss",
        "dpo",
        "--lora_r",
        "16",
        "--global_batch",
        "8",
        "--max_steps",
        str(args.steps),
        "--eval_steps",
        "1000",
    ]
    run([str(part) for part in command])
    return read_json(folder / "x" / "args.json")["planned_gib"], read_json(
        folder / "x" / "summary.json"
    )["peak_gib"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    print("| setting | planned GiB | measured GiB | ratio |\n|---|---|---|---|")
    for setting in SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            planned, measured = measure(setting, args, Path(folder))
        options = setting.replace("@2", "(2 ranks)")
        print(
            f"| `{options}` | {planned:.2f} | {measured:.2f} | {planned / measured:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
