"""kill -9 a sweep with rounds at random moments, within and between rounds, start it again each
time; compare with one undisturbed.

    python bench/kill_rounds.py --out OUT [--kills 30]

Two losses, three rounds, two runs at a time, a random two-layer model, and a task that counts
vowels. By turns a kill hits the sweep's process alone, one process that it has started, and all of
them at once. At the end adapters, metrics, summaries, answers, pairs and judgements must be equal
(times aside), and nothing done twice: each run is finished once, and what had been answered or
judged at a kill keeps its time stamp.

Every process is real, but forked from this one, which has loaded torch already: a start then takes
a fraction of a second, so that most kills hit work and not imports.
"""

import argparse
import csv
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from kill_sweep import ROOT, finished_runs, make_inputs, untimed
from kill_train import content_of, family

sys.path.insert(0, str(ROOT))
import gen_mtbench  # noqa: E402
import judge  # noqa: E402
import prep_data  # noqa: E402
import train_pref  # noqa: E402
from pref.files.console import exit_code_of  # noqa: E402
from pref.judging.store import read_rows  # noqa: E402
from pref.sweeping import __main__ as sweeping  # noqa: E402
from pref.sweeping import preflight, scheduler, task_folder  # noqa: E402

MAINS = {
    "prep_data.py": prep_data.main,
    "gen_mtbench.py": gen_mtbench.main,
    "judge.py": judge.main,
    "train_pref.py": train_pref.main,
}
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
MODEL           {out}/model
TASK            {out}/vowels.py
BENCH_DATA      {out}/data
RESULTS         {results}
LOSSES          dpo td_dpo
BETAS           0.1
TAUS            2
LRS             1e-2
ROUNDS          3
STAGES          train gen judge
JOBS            2
TASK_ARGS       --num_train 48 --num_test 24
ROUND_GEN_ARGS  --num_choices 4 --temperature 1 --dtype float32
GEN_ARGS        --dtype float32
TRAIN_ARGS      --global_batch 8 --per_device_batch 4 --max_steps 10 --eval_steps 5 --save_steps 1 \
--lora_r 4 --dtype float32 --compile off
"""
WAYS = ("the sweep", "one process of it", "all of its processes")


# ---- processes ----------------------------------------------------------------------------------


def fork(work: Callable[[], int], log: Path | int) -> int:
    """Run `work` in a process that is forked from this one and writes to `log`, a path or a
    descriptor, and shares no other file with this one. Returns its id.
    """
    sys.stdout.flush()
    if child := os.fork():
        return child
    code = 70  # an error of this script
    try:
        target = (
            log if isinstance(log, int) else os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        )
        for stream in (1, 2):
            os.dup2(target, stream)
        os.closerange(3, 1024)  # locks among them
        for number in scheduler.Stop.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        code = work()
    finally:
        sys.stdout.flush()
        os._exit(code)


class Forked:
    """In the place of subprocess.Popen: the stage in `command`, in a forked process."""

    def __init__(self, command, stdout=None, preexec_fn=None, **_options):
        script, *given = command[1:]

        def work() -> int:
            os.setsid()
            preexec_fn()
            return exit_code_of(lambda: MAINS[Path(script).name](given))

        self.pid, self.returncode = fork(work, stdout.fileno()), None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, ended = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(ended) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def start(out: Path, results: Path) -> int:
    """Start a sweep. Returns its process id."""
    (out / "grid").write_text(GRID.format(out=out, results=results))

    def work() -> int:
        scheduler.subprocess = SimpleNamespace(Popen=Forked, DEVNULL=None)
        # Its task's questions are made by a process of their own.
        task_folder.subprocess = SimpleNamespace(run=run, DEVNULL=None)
        preflight.plan_of = lambda study, point: preflight.Plan(10, 10_000, 0.1, 0.0)
        return exit_code_of(lambda: sweeping.main([str(out / "grid"), "--yes"]))

    return fork(work, results.with_suffix(".log"))


def run(command: list[str], **_options) -> SimpleNamespace:
    process = Forked(command, stdout=sys.stdout, preexec_fn=lambda: None)
    while process.poll() is None:
        time.sleep(0.02)
    return SimpleNamespace(returncode=process.returncode)


def has_ended(pid: int, seconds: float | None) -> int | None:
    """The exit code of a child; None if it still runs after `seconds`."""
    until = time.monotonic() + (seconds or 1e9)
    while time.monotonic() < until:
        ended, code = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(code)
        time.sleep(0.005)
    return None


def kill(sweep: int, way: str, dice: random.Random) -> bool:
    """Kill what `way` says. Returns False if there is no such process."""
    children = family(sweep)[1:]
    pids = {WAYS[0]: [sweep], WAYS[1]: children and [dice.choice(children)]}
    for pid in pids.get(way, [sweep, *children]):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
    return bool(children) or way != WAYS[1]


# ---- what must be equal -------------------------------------------------------------------------


def stamps_of(results: Path) -> dict:
    """Time stamps of all that has been answered and judged."""
    found = {}
    for path in results.glob("*/*/answers.jsonl"):
        name = str(path.relative_to(results))
        rows = map(json.loads, path.read_text().splitlines())
        found |= {(name, row["question_id"]): row["tstamp"] for row in rows}
    return found | dict(read_rows(results, "SELECT request_sha256, tstamp FROM judgements"))


def all_of(results: Path) -> dict:
    """What two sweeps must have in common, by name."""
    found: dict = {"rounds.json": (results / "rounds.json").read_text()}
    for run_folder in sorted(path.parent for path in results.glob("*/summary.json")):
        content = content_of(run_folder)
        found |= {f"{run_folder.name}/{name}": value for name, value in content.items()}
    for path in sorted(results.glob("*/*/answers.jsonl")):
        rows = map(json.loads, path.read_text().splitlines())
        found[str(path.relative_to(results))] = [row["choices"] for row in rows]
    for path in sorted(results.glob("*/*/judgements.csv")):
        with open(path, newline="") as file:
            found[str(path.relative_to(results))] = [untimed(row) for row in csv.DictReader(file)]
    for path in sorted(results.glob("*/*/pairs/*.jsonl")):
        found[str(path.relative_to(results))] = path.read_text().replace(str(results), "")
    return found


def done_twice(results: Path, before: dict) -> list[str]:
    after = stamps_of(results)
    wrong = [f"{key} was done again" for key, stamp in before.items() if after.get(key) != stamp]
    for log in (results / "logs").glob("*_s42*.log"):
        ends = len(re.findall(r"^(finished|diverged) after \d+ steps", log.read_text(), re.M))
        wrong += [f"{log.stem} ended {ends} times"] * (ends > 1)
    return wrong


def last_event(results: Path) -> str:
    log = results / "sweep.log"
    return log.read_text().splitlines()[-1][21:] if log.is_file() else "nothing yet"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="instead of a random one that is made here")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    if args.model:
        (args.out / "model").symlink_to(args.model.resolve())
    else:
        make_inputs(args.out)
    (args.out / "vowels.py").write_text(TASK)
    begun = time.monotonic()
    code = has_ended(start(args.out, args.out / "whole"), None)
    seconds = time.monotonic() - begun
    runs = finished_runs(args.out / "whole")
    print(f"undisturbed: exit code {code}, {seconds:.0f} s, {runs} runs", flush=True)
    expected, dice = all_of(args.out / "whole"), random.Random(args.seed)

    same, kills, number = code == 0, 0, 0
    while kills < args.kills:  # a sweep that has ended makes room for another
        results, before, code = args.out / f"cut{number}", {}, None
        number += 1
        while code != 0:
            sweep, way = start(args.out, results), WAYS[kills % 3]
            patience = dice.uniform(0.02, 0.2) * seconds if kills < args.kills else None
            code = has_ended(sweep, patience)
            if code is None and kill(sweep, way, dice):
                kills += 1
                print(f"kill {kills}: {way}; {last_event(results)}", flush=True)
            if code is None:
                code = has_ended(sweep, None)  # without one of its processes it goes on
            time.sleep(0.3)  # what is left of it saves
            before = stamps_of(results) | before
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
