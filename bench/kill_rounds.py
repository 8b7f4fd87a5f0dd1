"""kill -9 a sweep with rounds at random moments, within and between rounds, start it again each
time; compare with one undisturbed.

    python bench/kill_rounds.py --out OUT [--kills 12]

Two losses, three rounds, two runs at a time, a random two-layer model, and a task that counts
vowels. By turns a kill hits sweep.sh's process alone, one process that it has started, and all of
them at once. At the end adapters, metrics, summaries, answers, pairs, judgements and tables must be
equal (times aside), and nothing done twice: each run is finished once, and what had been answered
or judged at a kill keeps its time stamp.
"""

import argparse
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from kill_sweep import ROOT, finished_runs, make_inputs, untimed
from kill_train import content_of, family

sys.path.insert(0, str(ROOT))
from pref.judging.store import read_rows  # noqa: E402

TASK = '''"""The share of vowels."""

GENERATION = {"temperature": 1.0, "max_new_tokens": 24}
FIRST = {"train": 1, "test": 5001}


def questions(split, number, seed):
    asked = range(FIRST[split], FIRST[split] + number)
    return [{"question_id": n, "category": "any", "turns": [f"What is {n}?"]} for n in asked]


def score(question, answer):
    return sum(letter in "aeiou" for letter in answer) / (len(answer) + 1)
'''
GRID = """
LOSSES          dpo td_dpo
BETAS           0.1
TAUS            2
LRS             1e-2
ROUNDS          3
REFERENCE       start
TASK_ARGS       --num_train 48 --num_test 24
ROUND_GEN_ARGS  --num_choices 4 --temperature 1 --dtype float32
GEN_ARGS        --dtype float32
TRAIN_ARGS      --global_batch 8 --per_device_batch 4 --max_steps 10 --eval_steps 5 --save_steps 1 \
--lora_r 4 --dtype float32 --compile off
"""
WAYS = ("the sweep", "one process of it", "all of its processes")


def start(out: Path, results: Path) -> subprocess.Popen:
    environment = os.environ | {
        "MODEL": str(out / "model"),
        "TASK": str(out / "vowels.py"),
        "BENCH_DATA": str(out / "data"),
        "RESULTS": str(results),
        "JOBS": "2",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
    }
    command = ["bash", str(ROOT / "sweep.sh"), str(out / "grid"), "--yes"]
    with open(results.with_suffix(".log"), "a") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def kill(sweep: subprocess.Popen, way: str, dice: random.Random) -> str | None:
    """Kill what `way` says. Returns what was at work; None if the sweep has ended."""
    children = {}
    for pid in family(sweep.pid)[1:]:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        scripts = [Path(word).name for word in command if word.endswith(".py")]
        if scripts and "--dry_run" not in command:
            children[pid] = scripts[0]
    if sweep.poll() is not None:
        return None
    at_work = ", ".join(children.values()) or "between two commands"
    pids = {WAYS[0]: [sweep.pid], WAYS[2]: [sweep.pid, *children]}
    for pid in pids.get(way) or ([dice.choice(list(children))] if children else []):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return at_work


def stamps_of(results: Path) -> dict:
    """Time stamps of all that has been answered and judged."""
    found = {}
    for path in results.glob("*/*/answers.jsonl"):
        rows = map(json.loads, path.read_text().splitlines())
        found |= {
            (str(path.relative_to(results)), row["question_id"]): row["tstamp"] for row in rows
        }
    return found | dict(read_rows(results, "SELECT request_sha256, tstamp FROM judgements"))


def all_of(results: Path) -> dict:
    """What two sweeps must have in common, by name."""
    found: dict = {"rounds.json": (results / "rounds.json").read_text()}
    for run in sorted(path.parent for path in results.glob("*/summary.json")):
        found |= {f"{run.name}/{name}": value for name, value in content_of(run).items()}
    for path in sorted(results.glob("*/*/answers.jsonl")):
        rows = map(json.loads, path.read_text().splitlines())
        found[str(path.relative_to(results))] = [row["choices"] for row in rows]
    for path in sorted(results.glob("*/*/judgements.csv")):
        with open(path, newline="") as file:
            found[str(path.relative_to(results))] = [untimed(row) for row in csv.DictReader(file)]
    for path in sorted(
        [*results.glob("*/*/pairs/*.jsonl"), *results.glob("comparison/tables/*.csv")]
    ):
        found[str(path.relative_to(results))] = path.read_text().replace(str(results), "")
    return found


def done_twice(results: Path, before: dict) -> list[str]:
    after = stamps_of(results)
    wrong = [f"{key} was done again" for key, stamp in before.items() if after.get(key) != stamp]
    for log in (results / "logs").glob("*_s42*.log"):
        ends = len(re.findall(r"^(finished|diverged) after \d+ steps", log.read_text(), re.M))
        wrong += [f"{log.stem} ended {ends} times"] * (ends > 1)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    make_inputs(args.out)
    (args.out / "vowels.py").write_text(TASK)
    (args.out / "grid").write_text(GRID)
    dice, begun = random.Random(args.seed), time.monotonic()
    code = start(args.out, args.out / "whole").wait()
    seconds = time.monotonic() - begun
    expected = all_of(args.out / "whole")
    print(
        f"undisturbed: exit code {code}, {seconds:.0f} s, {finished_runs(args.out / 'whole')} runs"
    )

    same, kills, number = code == 0, 0, 0
    while kills < args.kills:  # a sweep that has ended makes room for another
        results, before, code = args.out / f"cut{number}", {}, None
        number += 1
        while code != 0:
            sweep, way = start(args.out, results), WAYS[kills % 3]
            # Every start gets a little further, for less than a round.
            with_patience = dice.uniform(0.08, 0.3) * seconds if kills < args.kills else None
            try:
                code = sweep.wait(with_patience)
                print(f"  exit code {code}", flush=True)
                continue
            except subprocess.TimeoutExpired:
                at_work = kill(sweep, way, dice)
            if at_work is None:
                continue
            kills += 1
            code = sweep.wait() if way != WAYS[1] else None
            time.sleep(0.2)  # or a process that is killed may still look alive
            before = stamps_of(results) | before if results.is_dir() else before
            print(
                f"kill {kills}: {way}; at work: {at_work}; {finished_runs(results)} runs had ended"
            )
            if way == WAYS[1]:  # the sweep goes on without it
                code = sweep.wait()
                print(f"  exit code {code}", flush=True)
        found = all_of(results)
        names = sorted(expected.keys() | found.keys())
        different = [name for name in names if expected.get(name) != found.get(name)]
        twice = done_twice(results, before)
        print(
            f"{results.name} ended: {len(found)} things compared, different: "
            f"{different or 'none'}; done twice: {twice or 'nothing'}",
            flush=True,
        )
        same = same and not different and not twice
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
