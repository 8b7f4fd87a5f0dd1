"""kill -9 a search at random moments, start it again each time; compare with one undisturbed.

    python bench/kill_discovery.py --out OUT [--kills 10]

Two proposers, evolution and a scripted model on loopback that charges for each reply; a random
two-layer model is trained. Half of the kills hit discover.py's process alone, whose training runs
are then told to save, the others all of its processes. The last kills fall into the confirmation.
The undisturbed search trains one run at a time, the other one three.

At the end archive.jsonl, control.jsonl, the programs and confirmation.json must be equal byte for
byte (there is no time in them), no stored reply may have been asked for again, and no run may have
been trained twice.
"""

import argparse
import contextlib
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

from kill_train import ROOT, family

sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT))
from doubles import Server, completion  # noqa: E402

from pref.discovery.evolve import RandomSearch  # noqa: E402
from pref.discovery.proposals import View  # noqa: E402

MODEL = "scripted-model"
TRAIN = (
    "--global_batch 8 --per_device_batch 8 --max_steps 6 --save_steps 1 --lora_r 4 "
    "--lora_dropout 0.1 --learning_rate 2e-2 --max_length 256 --dtype float32 --compile off"
)
SEARCH = ("--max_proposals", "32", "--rung", "4,2", "--seeds_per_rung", "1,1")


def propose(body: dict) -> tuple[int, dict]:
    """A program that depends on the request alone, after a while; sometimes nonsense."""
    time.sleep(0.1)
    digest = sha256(json.dumps(body["messages"]).encode()).hexdigest()
    dice = random.Random(digest)
    if dice.random() < 0.2:
        return completion("I cannot think of a loss.")
    view = View(known=[], dpo=None, visited=1.0, setting="")
    proposal = RandomSearch().propose(view, round=1, number=0, rng=dice)
    reply = {"thought": "at random", "name": proposal.name, "code": proposal.text}
    return completion(json.dumps(reply))


def make_inputs(out: Path) -> None:
    def call(*command) -> None:
        subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)

    pairs = out / "pairs"
    rows = ROOT / "examples" / "preferences.jsonl"
    call(ROOT / "prep_data.py", "--dataset", rows, "--limit", 120, "--out", pairs)
    shape = ("--vocabulary", 600, "--layers", 2, "--hidden", 64, "--heads", 4, "--intermediate", 96)
    call(
        ROOT / "bench" / "random_llama.py", "--pairs", pairs / "train.jsonl", *shape, out / "model"
    )


def start(out: Path, folder: Path, url: str, jobs: int, *more: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "discover.py"), str(folder)]
    command += ["--model", str(out / "model"), "--data", str(out / "pairs"), *SEARCH]
    command += ["--proposer", MODEL, "evolve", "--base_url", url, "--max_usd", "5"]
    command += ["--price_in", "1", "--price_out", "1", "--train_args", TRAIN, *more]
    environment = os.environ | {
        "OPENAI_API_KEY": "sk-not-to-be-found-anywhere",
        "JOBS": str(jobs),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with open(folder.with_suffix(".log"), "a") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def kill_after(process: subprocess.Popen, seconds: float, single: bool) -> bool:
    """Kill the search, and all that it started unless `single`. False if it ended first."""
    begun = time.monotonic()
    while process.poll() is None:
        if time.monotonic() - begun > seconds:
            for pid in [process.pid] if single else family(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.02)
    return False


def replies(folder: Path) -> dict[str, float]:
    """When each stored reply came."""
    path = folder / "requests.sqlite"
    if not path.is_file():
        return {}
    with contextlib.closing(sqlite3.connect(path)) as store:
        query = "SELECT request_sha256, tstamp FROM requests WHERE status NOT IN ('sent', 'lost')"
        return dict(store.execute(query))


def content_of(folder: Path) -> dict[str, bytes]:
    paths = [*folder.glob("*.jsonl"), *folder.glob("confirmation.json")]
    paths += [*folder.glob("proposals/*/*"), *folder.glob("control/*/*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def trained_twice(folder: Path) -> list[str]:
    logs = [*folder.glob("results/logs/*.log"), *folder.glob("confirmation/logs/*.log")]
    ends = {log: re.findall(r"^finished after \d+ steps", log.read_text(), re.M) for log in logs}
    return [log.stem for log, found in ends.items() if len(found) > 1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    make_inputs(args.out)
    server, dice = Server(), random.Random(args.seed)
    server.answer = propose

    # 1) Undisturbed: the search, then its confirmation.
    whole, lasted = args.out / "whole", {}
    for more in ((), ("--confirm", "1")):
        begun = time.monotonic()
        code = start(args.out, whole, server.url, 1, *more).wait()
        lasted[more] = time.monotonic() - begun
        print(f"undisturbed {' '.join(more)}: exit code {code}, {lasted[more]:.0f} s", flush=True)
        if code:
            return 1

    # 2) Disturbed, in both.
    folder, wrong, kills = args.out / "cut", [], 0
    for more, limit in (((), args.kills - 2), (("--confirm", "1"), args.kills)):
        code = None
        while code != 0:
            process, before = start(args.out, folder, server.url, 3, *more), replies(folder)
            if kills < limit:
                wait, single = dice.uniform(0.1, 0.6) * lasted[more], kills % 2 == 0
                if kill_after(process, wait, single):
                    kills += 1
                    what = "the search" if single else "everything"
                    events = folder / "archive.jsonl"
                    lines = len(events.read_bytes().splitlines()) if events.is_file() else 0
                    print(f"kill {kills}: {what} after {wait:.0f} s; {lines} events", flush=True)
            code = process.wait()
            if (folder / "confirmation.json").is_file():  # a kill after the last of its work
                code = 0
            after = replies(folder)
            wrong += [f"{key} asked again" for key in before if after.get(key) != before[key]]
            if code not in (0, -signal.SIGKILL):
                print(f"exit code {code}: see {folder.with_suffix('.log')}", flush=True)
                return 1

    # 3) The comparison.
    one, two = content_of(whole), content_of(folder)
    different = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    wrong += [f"{name} trained twice" for name in trained_twice(folder)]
    key = b"sk-not-to-be-found-anywhere"
    files = [path for path in folder.rglob("*") if path.is_file()]
    wrong += [f"the key is in {path}" for path in files if key in path.read_bytes()]
    print(
        f"{kills} kills; {len(one)} files compared, different: {different or 'none'}; "
        f"wrong: {wrong or 'nothing'}"
    )
    return 1 if different or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
