"""kill -9 gen_mtbench.py at random moments, start it again each time, and compare with answers that
nothing disturbed.

    python bench/kill_generate.py --model MODEL --mt_bench DIR [--kills 5]

fp32 and the embedded model: answers must be equal, every question of every run must be there once.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from generate import make_adapters
from kill_train import ROOT, run_until


def answers_of(results: Path) -> dict:
    found = {}
    for path in sorted(results.glob("*/mt_bench/answers.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        keys = [(path.parent.parent.name, row["question_id"]) for row in rows]
        assert len(keys) == len(set(keys)), f"{path}: a question appears twice"
        found |= {key: row["choices"] for key, row in zip(keys, rows)}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--mt_bench", required=True)
    parser.add_argument("--adapters", type=int, default=3)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dice = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        whole, cut, log = (Path(temporary) / name for name in ("whole", "cut", "log"))
        make_adapters(args.model, args.adapters, 16, whole)

        def command(results: Path) -> list[str]:
            return [
                sys.executable,
                str(ROOT / "gen_mtbench.py"),
                str(results),
                "--mt_bench",
                args.mt_bench,
                "--dtype",
                "float32",
                "--num_questions",
                str(args.questions),
                "--max_new_tokens",
                str(args.max_new_tokens),
                "--batch_size",
                "8",
            ]

        begun = time.monotonic()
        outcome = run_until(command(whole), log)
        seconds = time.monotonic() - begun
        print(f"undisturbed: {outcome}, {seconds:.0f} s", flush=True)
        one, kills, ended, same = answers_of(whole), 0, 0, True
        while kills < args.kills or outcome.startswith(
            "killed"
        ):  # what has ended makes room for another start
            results = cut / str(ended)
            if not results.exists():
                shutil.copytree(whole, results, ignore=shutil.ignore_patterns("mt_bench"))
            outcome = run_until(
                command(results),
                log,
                seconds=dice.uniform(0, seconds) if kills < args.kills else None,
            )
            if outcome.startswith("killed"):
                kills += 1
                turns = sum(
                    path.read_bytes().count(b"\n")
                    for path in results.glob("*/mt_bench/turns.*.jsonl")
                )
                print(f"kill {kills}: {outcome}; {turns} turns on disk", flush=True)
            else:
                ended += 1
                two = answers_of(results)
                print(
                    f"ended: {outcome}; {len(two)} of {len(one)} questions answered once each; "
                    f"equal: {one == two}"
                )
                same = same and one == two and len(one) == args.adapters * args.questions
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
