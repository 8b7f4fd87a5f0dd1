"""kill -9 a training run at random moments, continue it each time, and compare it with one that
nothing disturbed.

    python bench/kill_train.py --model MODEL --data data/NAME --out OUT
    python bench/kill_train.py ... --train_args "--tune full --loss dpo --global_batch 8 ..."

On one rank and on two (`--ranks`), `--kills` times each: half of the moments are random in time,
the others while a checkpoint is being written. Weights and validation pairs must be equal to the
byte, metrics and summary but for wall times and memory. Then what saving costs, from the
undisturbed run: seconds per save against seconds per step.
"""

import argparse
import contextlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMES = {"tok_per_s", "peak_gib", "wall_s", "save_s"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the runs")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--train_args",
        default="--loss td_dpo --global_batch 8 --max_steps 6 --save_steps 1 --eval_steps 2 "
        "--max_length 128 "
        "--lora_r 16 --learning_rate 5e-4 --compile off",
    )
    return parser.parse_args()


def command_of(args: argparse.Namespace, ranks: int, results: Path) -> list[str]:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        if ranks > 1
        else []
    )
    return [
        sys.executable,
        *launcher,
        str(ROOT / "train_pref.py"),
        "--model",
        args.model,
        "--data",
        args.data,
        "--results_dir",
        str(results),
        "--run_id",
        "run",
        *shlex.split(args.train_args),
    ]


def family(pid: int) -> list[int]:
    """`pid` and its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:  # it has ended meanwhile
            continue
        parents[int(stat.parent.name)] = int(text.rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def kill(process: subprocess.Popen) -> None:
    for pid in family(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def run_until(
    command: list[str],
    log: Path,
    seconds: float | None = None,
    saving: Path | None = None,
    which: int = 1,
) -> str:
    """Start `command` and kill it after `seconds`, or while it writes its `which`-th checkpoint
    into `saving`.
    """
    seen = set()
    with open(log, "a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        begun = time.monotonic()
        while process.poll() is None:
            if seconds is not None and time.monotonic() - begun > seconds:
                kill(process)
                return f"killed after {seconds:.1f} s"
            if saving is not None:
                seen.update(path.stem for path in saving.glob("step-*.tmp"))
                if len(seen) == which:
                    kill(process)
                    left = sorted(path.name for path in saving.glob("*.tmp"))
                    return f"killed while saving {max(seen)} (left {', '.join(left) or 'nothing'})"
            time.sleep(0.001)
    return f"exit code {process.returncode}"


def content_of(run: Path) -> dict:
    weights = next(run / name for name in ("adapter", "model") if (run / name).is_dir())
    found = {path.name: path.read_bytes() for path in [*weights.iterdir(), run / "val_pairs.jsonl"]}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found["metrics.jsonl"] = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    summary = json.loads((run / "summary.json").read_text())
    return found | {"summary.json": {k: v for k, v in summary.items() if k not in TIMES}}


def where(run: Path) -> str:
    found = (run / "checkpoint").glob("step-*")
    saved = sorted(path for path in found if path.suffix in ("", ".safetensors"))
    return f"newest checkpoint {saved[-1].stem}" if saved else "no checkpoint"


def differences(one: Path, two: Path) -> list[str]:
    mine, theirs = content_of(one), content_of(two)
    return sorted(
        name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)
    )


def main() -> int:
    args, same = parse_args(), True
    args.out.mkdir(parents=True)
    dice = random.Random(args.seed)
    for ranks in args.ranks:
        whole, name = args.out / f"whole{ranks}", f"{ranks} rank(s)"
        kills, ended, outcome = 0, 0, ""
        begun = time.monotonic()
        print(
            f"{name}, undisturbed: "
            f"{run_until(command_of(args, ranks, whole), args.out / 'whole.log')}",
            end="",
        )
        seconds = time.monotonic() - begun
        print(f", {seconds:.0f} s", flush=True)
        while (
            kills < args.kills or outcome != "exit code 0"
        ):  # a run that has ended makes room for another
            cut = args.out / f"cut{ranks}_{ended}"
            moment = {"seconds": dice.uniform(0, seconds)}
            if kills % 2:
                moment = {"saving": cut / "run" / "checkpoint", "which": dice.randint(1, 3)}
            outcome = run_until(
                command_of(args, ranks, cut),
                args.out / "cut.log",
                **(moment if kills < args.kills else {}),
            )
            if outcome.startswith("killed"):
                kills += 1
                print(f"{name}, kill {kills}: {outcome}; {where(cut / 'run')}", flush=True)
            elif outcome == "exit code 0":
                ended += 1
                different = differences(whole / "run", cut / "run")
                print(
                    f"{name}, ended: {', '.join(sorted(content_of(cut / 'run')))}: "
                    f"{different or 'all equal'}",
                    flush=True,
                )
                same = same and not different
            else:
                print(f"{name}: {outcome}, see {args.out / 'cut.log'}")
                return 1
        summary = json.loads((whole / "run" / "summary.json").read_text())
        steps = [
            json.loads(line) for line in (whole / "run" / "metrics.jsonl").read_text().splitlines()
        ]
        step = (
            sum(line["tokens"] / line["tok_per_s"] for line in steps if "lr" in line)
            / summary["steps"]
        )
        print(
            f"{name}: {summary['save_s'] / summary['steps']:.2f} s per save, {step:.1f} s per step"
        )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
