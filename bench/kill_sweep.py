"""kill -9 a sweep, and single runs of it, at random moments, start it again each time; compare with
one undisturbed.

    python bench/kill_sweep.py --out OUT [--kills 10]

The grid `quick`, two runs at a time, on a random two-layer model with a judge on loopback that
counts what it is asked. Half of the kills hit sweep.sh's process alone, the others one training
run. At the end adapters, validation pairs, metrics, summaries (wall times aside), answers,
judgements and tables must be equal, and nothing done twice: each run is finished once, what had
been answered or judged at a kill keeps its time stamp, the judge was asked once per row.
"""

import argparse
import csv
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

from kill_generate import answers_of
from kill_train import ROOT, content_of, family

sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT))
from doubles import Server, completion  # noqa: E402

from pref.judging.server_judge import PROBE  # noqa: E402

TIMES = re.compile(r"wall|tok_per_s|peak|save_s|tstamp|results_dir|path", re.I)
TRAIN = (
    "--global_batch 8 --per_device_batch 4 --max_steps 10 --eval_steps 5 --save_steps 1 --lora_r "
    "4 --lora_dropout 0.1 "
    "--max_length 256 --dtype float32 --compile off"
)


def rate(body: dict) -> tuple[int, dict]:
    """A rating that depends on the request alone, after a while."""
    time.sleep(0.05)
    digest = sha256(json.dumps(body["messages"]).encode()).digest()
    return completion(f"Rating: [[{digest[0] % 10 + 1}]]")


def make_inputs(out: Path) -> None:
    def call(*command) -> None:
        subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)

    pairs = out / "pairs"
    call(
        ROOT / "prep_data.py",
        "--dataset",
        ROOT / "examples" / "preferences.jsonl",
        "--limit",
        64,
        "--out",
        pairs,
    )
    call(ROOT / "prep_data.py", "--mt_bench", "nvidia", "--out", out / "mt_bench")
    shape = ("--vocabulary", 600, "--layers", 2, "--hidden", 64, "--heads", 4, "--intermediate", 96)
    call(
        ROOT / "bench" / "random_llama.py", "--pairs", pairs / "train.jsonl", *shape, out / "model"
    )


def environment(out: Path, results: Path, url: str) -> dict:
    return os.environ | {
        "MODEL": str(out / "model"),
        "DATA": str(out / "pairs"),
        "MT_BENCH": str(out / "mt_bench"),
        "RESULTS": str(results),
        "JUDGE": "counting-judge-7b",
        "BASE_URL": url,
        "OPENAI_API_KEY": "x",
        "JOBS": "2",
        "LRS": "2e-2",
        "TRAIN_ARGS": TRAIN,
        "GEN_ARGS": "--num_questions 16 --max_new_tokens 24 --dtype float32",
        "JUDGE_ARGS": "--concurrency 4",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
    }


def start(out: Path, results: Path, url: str) -> subprocess.Popen:
    command = ["bash", str(ROOT / "sweep.sh"), "quick", "--yes"]
    with open(results.with_suffix(".log"), "a") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=file, env=environment(out, results, url)
        )


def processes(sweep: subprocess.Popen, script: str = "train_pref.py") -> list[int]:
    """Processes of a sweep that run `script`, as long as they can be killed."""
    found = []
    for pid in family(sweep.pid)[1:]:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if script.encode() in command and b"--dry_run" not in command:
            found.append(pid)
    return found


def disturb(
    sweep: subprocess.Popen, seconds: float, single: bool, dice: random.Random, stage: str | None
) -> str | None:
    """Wait `seconds`, counted from the start of `stage` if one is given, then kill the sweep or one
    of its runs. None if it ended first.
    """
    begun = time.monotonic()
    while sweep.poll() is None:
        if stage and not processes(sweep, stage):
            begun = time.monotonic()
        runs = processes(sweep) if single else [sweep.pid]
        if time.monotonic() - begun > seconds and runs:
            os.kill(dice.choice(runs), signal.SIGKILL)
            return f"{'one run' if single else 'the sweep'} after {time.monotonic() - begun:.0f} s"
        time.sleep(0.02)
    return None


def stamps_of(results: Path) -> dict:
    """Time stamps of everything that has been answered and judged."""
    found = {}
    for path in results.glob("*/mt_bench/answers.jsonl"):
        rows = map(json.loads, path.read_text().splitlines())
        found |= {(path.parent.parent.name, row["question_id"]): row["tstamp"] for row in rows}
    if (results / "judgements.sqlite").is_file():
        with sqlite3.connect(results / "judgements.sqlite") as store:
            found |= dict(store.execute("SELECT request_sha256, tstamp FROM judgements"))
    return found


def finished_runs(results: Path) -> int:
    return len(list(results.glob("*/summary.json")))


def judged(results: Path) -> int:
    with sqlite3.connect(results / "judgements.sqlite") as store:
        return store.execute("SELECT COUNT(*) FROM judgements").fetchone()[0]


def untimed(value):
    if isinstance(value, dict):
        return {key: untimed(item) for key, item in value.items() if not TIMES.search(key)}
    return [untimed(item) for item in value] if isinstance(value, list) else value


def all_of(results: Path) -> dict:
    """What two sweeps must have in common, by name."""
    found = {"answers": answers_of(results)}
    for run in sorted(path.parent for path in results.glob("*/summary.json")):
        found |= {f"{run.name}/{name}": value for name, value in content_of(run).items()}
    for path in sorted(results.glob("*/mt_bench/judgements.csv")):
        with open(path, newline="") as file:
            found[f"{path.parent.parent.name}/judgements"] = [
                untimed(row) for row in csv.DictReader(file)
            ]
    for path in sorted(results.glob("*/metrics.json")):
        found[f"{path.parent.name}/metrics.json"] = untimed(json.loads(path.read_text()))
    for path in sorted((results / "comparison" / "tables").glob("*.csv")):
        found[f"tables/{path.name}"] = path.read_text()
    return found


def done_twice(results: Path, before: dict, asked: int) -> list[str]:
    wrong, after = [], stamps_of(results)
    wrong += [f"{key} was done again" for key, stamp in before.items() if after.get(key) != stamp]
    for log in (results / "logs").glob("*_s42*.log"):
        text = log.read_text()
        if (ends := len(re.findall(r"^(finished|diverged) after \d+ steps", text, re.M))) > 1:
            wrong.append(f"{log.stem} ended {ends} times")
    if asked != judged(results):
        wrong.append(f"the judge was asked {asked} times for {judged(results)} rows")
    return wrong


def steps_made(results: Path) -> tuple[int, int]:
    """Steps over all starts, and those that a whole study has."""
    logs = (log.read_text() for log in (results / "logs").glob("*_s42*.log"))
    made = sum(len(re.findall(r"^step \d+/", text, re.M)) for text in logs)
    return made, sum(
        json.loads(path.read_text())["steps"] for path in results.glob("*/summary.json")
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--moments",
        type=float,
        nargs=2,
        default=[0.04, 0.35],
        metavar=("FROM", "TO"),
        help="seconds to a kill, as shares of what the undisturbed sweep takes",
    )
    parser.add_argument(
        "--stage", metavar="SCRIPT", help="kill the sweep alone, and while this script runs"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    make_inputs(args.out)
    server, dice = Server(), random.Random(args.seed)
    server.answer = rate
    begun = time.monotonic()
    code = start(args.out, args.out / "whole", server.url).wait()
    seconds = time.monotonic() - begun
    print(f"undisturbed: exit code {code}, {seconds:.0f} s", flush=True)
    expected, kills, number, same = all_of(args.out / "whole"), 0, 0, code == 0
    while kills < args.kills:  # a sweep that has ended makes room for another
        results, asked, before = args.out / f"cut{number}", len(server.paid(PROBE)), {}
        code, number = None, number + 1
        while code != 0:
            sweep = start(args.out, results, server.url)
            while kills < args.kills and sweep.poll() is None:
                single, wait = (
                    kills % 2 == 1 and not args.stage,
                    dice.uniform(*args.moments) * seconds,
                )
                outcome = disturb(sweep, wait, single, dice, args.stage)
                if outcome:
                    kills += 1
                    before |= stamps_of(results)
                    print(
                        f"kill {kills}: {outcome}; {finished_runs(results)} runs had ended, "
                        f"{len(before)} answers and "
                        f"judgements were there",
                        flush=True,
                    )
                    time.sleep(0.2)  # or a process that is killed may still look alive
            code = sweep.wait()
            print(f"  exit code {code}", flush=True)
        found = all_of(results)
        different = sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        )
        twice = done_twice(results, before, len(server.paid(PROBE)) - asked)
        made, needed = steps_made(results)
        print(
            f"{results.name} ended: {len(found)} things compared, different: "
            f"{different or 'none'}; done twice: "
            f"{twice or 'nothing'}; {made} steps made where {needed} are needed",
            flush=True,
        )
        same = same and not different and not twice
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
