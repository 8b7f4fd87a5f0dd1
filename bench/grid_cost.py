"""What a grid of runs costs against the same runs on their own, each of which computes the
reference log-probs again.

    python bench/grid_cost.py --model MODEL --data data/NAME [--train_args "--max_steps 3 ..."]

The same runs twice, in turn: on one data folder, whose reference/ the first run fills, and each on
a copy without it.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "train_pref.py"
POINTS = (
    "--loss dpo --beta 0.1",
    "--loss dpo --beta 0.5",
    "--loss td_dpo --beta 0.5",
    "--loss discopop --beta 0.5",
)


def train(point: str, data: Path, results: Path, args: argparse.Namespace) -> float:
    """Seconds of one run, start-up included."""
    command = [
        sys.executable,
        SCRIPT,
        "--model",
        args.model,
        "--data",
        data,
        "--results_dir",
        results,
        *shlex.split(f"{point} {args.train_args}"),
    ]
    begun = time.monotonic()
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=len(POINTS))
    parser.add_argument(
        "--train_args",
        default="--epochs 1 --global_batch 8 --max_length 512 --lora_r 16 --compile off",
    )
    args = parser.parse_args()
    grid, single = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        no_reference = shutil.ignore_patterns("reference")
        shutil.copytree(args.data, folder / "shared", ignore=no_reference)
        for number, point in enumerate(POINTS[: args.runs]):
            own = shutil.copytree(args.data, folder / f"own{number}", ignore=no_reference)
            grid.append(train(point, folder / "shared", folder / "grid", args))
            single.append(train(point, own, folder / "single", args))
            print(f"{point}: in the grid {grid[-1]:.1f} s, alone {single[-1]:.1f} s", flush=True)
    print(
        f"{len(grid)} runs: grid {sum(grid):.0f} s, alone {sum(single):.0f} s, ratio "
        f"{sum(grid) / sum(single):.2f}"
    )


if __name__ == "__main__":
    main()
