"""The toolkit on one GPU, within ten minutes: is it right, how fast is it, does it keep the goals.

    bash bench/gpu.sh [--wheels DIR] [--pairs PAIRS.jsonl] [--out DIR] [--minutes 9.5]
    bash bench/gpu.sh --device cpu          the same parts at toy sizes: a rehearsal of the script

The model is a Llama of random weights in Llama-2-7B's shape, in NF4; without --pairs the pairs are
made-up words in lengths as of real ones (about 1,000 tokens as a shared row). Parts, in turn, each
a process with a limit in time: gpu_correct.py, gpu_train.py, gpu_generate.py. A part that fails, or
takes too long, keeps the rows that it has printed; the rest goes on.

Prints a table of all rows, the goals, and one JSON object as the last line; OUT has each part's log
and rows.jsonl. Exit code: 0 all goals hold, 1 one does not or was not measured, 2 it could not
begin. Goals:

- every check of gpu_correct.py holds;
- at least 3 times TRL's pairs/s, and 2 times TRL's with precomputed references, best against best;
- at most half of TRL's memory, both with as many pairs a micro-batch and recomputing;
- MFU of 45 % on an H100 or H200, 55 % on an A100, in NF4 at 4,096 tokens a micro-batch.

A rehearsal asks for the first, and that every row is there.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from kill_train import family

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
NEEDED = ("torch", "transformers", "bitsandbytes", "peft", "accelerate", "safetensors", "tqdm")
FOR_TRL = ("trl", "datasets")
MFU_GOALS = {"H100": 0.45, "H200": 0.45, "A100": 0.55}
MINUTES = 9.5  # the parts' limits are for this many in all, and grow with --minutes
RESERVE_S = 5  # for the table


class Sizes(NamedTuple):
    """How large everything is: arguments of each script."""

    shape: str = ""  # of random_llama.py
    pairs: str = "--pairs 160"  # of random_pairs.py
    correct: str = ""  # of gpu_correct.py
    train: str = ""
    generate: str = ""


FULL = Sizes()
TOY = Sizes(
    shape="--vocabulary 400 --layers 2 --hidden 64 --heads 4 --intermediate 128",
    pairs="--pairs 12 --median 8 --longest 20",
    correct="--hidden 64 --no_compile",
    train="--max_length 256 --global_batch 4 --tokens 256 --steps 1 --lora_r 4 --trl 2:on 2:off"
    " --no_compile",
    generate="--rows 2 4 --prompt 8 --new_tokens 4 --lora_r 4",
)


class Part(NamedTuple):
    """A process whose output has rows."""

    name: str
    command: list[str]
    seconds: float  # at most


class Goal(NamedTuple):
    """What should hold, and what was found; None: not measured."""

    what: str
    value: float | None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def holds(self) -> bool:
        if self.value is None:
            return False
        if self.at_least is not None:
            return self.value >= self.at_least
        return self.value <= self.at_most


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, help="train.jsonl of prep_data.py")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything")
    parser.add_argument("--wheels", help="read by gpu.sh, which installs them")
    return parser.parse_args()


# ---- parts --------------------------------------------------------------------------------------


def run_part(part: Part, out: Path, environment: dict) -> list[dict]:
    """The rows of a part, until it ends or its time is over. The reason of a failure is a row."""
    seconds = part.seconds
    if seconds <= 0:
        return [{"row": part.name, "failed": "no time was left for it"}]
    rows, log = [], out / f"{part.name}.log"
    with open(log, "w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            part.command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        late = threading.Timer(seconds, kill, [process.pid])
        begun = time.monotonic()
        late.start()
        for line in process.stdout:
            errors.write(line)
            if row := read_row(line):
                rows.append(row)
                print(f"  {text_of(row)}", flush=True)
        code = process.wait()
        was_late = time.monotonic() - begun >= seconds
        late.cancel()
    if code:
        reason = f"not done within {seconds:.0f} s" if was_late else f"exit code {code}: see {log}"
        rows.append({"row": part.name, "failed": reason})
        print(f"  {text_of(rows[-1])}", flush=True)
    return rows


def kill(pid: int) -> None:
    """Kill a part and what it has started, also in sessions of their own."""
    for one in family(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def read_row(line: str) -> dict | None:
    """A row that a part has printed, or None for any other line."""
    if not line.startswith("{"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "row" in row else None


def make_inputs(args: argparse.Namespace, sizes: Sizes, folder: Path) -> tuple[Path, list[Part]]:
    """The pairs, and the parts that make what is not there yet."""
    pairs, parts, python = args.pairs, [], [sys.executable]
    if pairs is None:
        pairs = folder / "pairs" / "train.jsonl"
        command = [*python, BENCH / "random_pairs.py", pairs.parent, *sizes.pairs.split()]
        parts.append(Part("pairs", command, 30))
    command = [*python, BENCH / "random_llama.py", folder / "model", "--pairs", pairs]
    command += ["--quant", "nf4", *sizes.shape.split()]
    return pairs, [*parts, Part("model", command, 120)]


def measuring(sizes: Sizes, model: Path, pairs: Path) -> list[Part]:
    """The parts that measure. The last one, training, fills the time that the others leave."""

    def part(name: str, seconds: float, *arguments) -> Part:
        own = getattr(sizes, name).split()
        return Part(name, [sys.executable, BENCH / f"gpu_{name}.py", *arguments, *own], seconds)

    return [
        part("correct", 130),
        part("generate", 80, "--model", model),
        part("train", 3600, "--model", model, "--pairs", pairs),
    ]


# ---- what came of it ----------------------------------------------------------------------------


def goals_of(rows: list[dict], card: str | None) -> list[Goal]:
    """The goals, from the rows of all parts. card: None for a rehearsal, without speed."""
    checks = [row for row in rows if "holds" in row or row.get("part") == "correct"]
    failing = sum(not row.get("holds", "failed" not in row) for row in checks)
    right = Goal("checks that do not hold", failing if checks else None, at_most=0)
    if card is None:
        missing = sum("failed" in row for row in rows)
        return [right, Goal("rows that failed", missing if rows else None, at_most=0)]
    by_name = {row["row"]: row for row in rows}

    def value(row: str | None, key: str) -> float | None:
        return by_name.get(row, {}).get(key)

    best = by_name.get("TRL, best", {}).get("like")
    trl_lean = next((row for row in rows if is_lean(row)), {})
    ours = value("ours, best", "pairs_per_s")
    lean = value("ours, as lean as TRL", "peak_gib")
    precomputed = value(f"{best}, references precomputed", "pairs_per_s")
    mfu_goal = next((goal for name, goal in MFU_GOALS.items() if name in card), 0.45)
    return [
        right,
        Goal("times TRL", ratio(ours, value(best, "pairs_per_s")), at_least=3),
        Goal("times TRL with precomputed references", ratio(ours, precomputed), at_least=2),
        Goal("of TRL's memory", ratio(lean, trl_lean.get("peak_gib")), at_most=0.5),
        Goal("MFU", value("ours, best", "mfu"), at_least=mfu_goal),
    ]


def is_lean(row: dict) -> bool:
    """TRL's leanest row: the first that recomputes."""
    return row["row"].startswith("TRL, ") and row["row"].endswith("recomputed")


def ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None


def text_of(row: dict) -> str:
    """A row as a line of the table."""
    if "failed" in row:
        return f"{row['row']:<52} FAILED: {row['failed']}"
    if "holds" in row:
        verdict = "holds" if row["holds"] else "DOES NOT HOLD"
        return f"{row['row']:<52} {row['value']:.2g} (at most {row['tolerance']:g}): {verdict}"
    formats = {
        "pairs_per_s": "{:.2f} pairs/s",
        "mfu": "MFU {:.1%}",
        "tokens_per_s": "{:.0f} tokens/s",
        "step_ms": "{:.1f} ms a step",
        "bandwidth_share": "{:.0%} of the bandwidth",
        "ratio": "{:.2f} times",
        "peak_gib": "{:.1f} GiB",
        "like": "{}",
        "took_s": "({:.0f} s)",
    }
    shown = [form.format(row[key]) for key, form in formats.items() if row.get(key) is not None]
    return f"{row['row']:<52} {'  '.join(shown)}"


def report(rows: list[dict], goals: list[Goal], about: dict) -> int:
    """Print everything. Returns the exit code."""
    print(f"\n{about['card']}, torch {about['torch']}, {about['seconds']:.0f} s")
    for row in rows:
        print(text_of(row))
    print("\ngoals")
    for goal in goals:
        limit = f"at least {goal.at_least:g}" if goal.at_least is not None else ""
        limit = limit or f"at most {goal.at_most:g}"
        found = "not measured" if goal.value is None else f"{goal.value:.3g}"
        print(f"{goal.what:<52} {found} ({limit}): {'holds' if goal.holds else 'DOES NOT HOLD'}")
    goals_json = [{**goal._asdict(), "holds": goal.holds} for goal in goals]
    print(json.dumps({**about, "goals": goals_json, "rows": rows}), flush=True)
    return 0 if all(goal.holds for goal in goals) else 1


def check_packages() -> None:
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(
            f"error: cannot be imported: {', '.join(missing)}; carry their wheels", file=sys.stderr
        )
        sys.exit(2)
    if missing := [name for name in FOR_TRL if importlib.util.find_spec(name) is None]:
        print(f"warning: {', '.join(missing)} cannot be imported: TRL's rows will fail")


def ask_torch(environment: dict) -> tuple[str | None, str]:
    """The card's name, if there is one, and torch's version; by a process of its own, because one
    that has looked holds memory of the card until it ends.
    """
    code = (
        "import torch; c = torch.cuda; print(torch.__version__); "
        "print(c.get_device_name() if c.is_available() else '')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    version, card = done.stdout.splitlines()[-2:]
    return card or None, version


def main() -> int:
    args = parse_args()
    begun = float(os.environ.get("BEGUN", time.time()))  # of gpu.sh, wheels included
    end = time.monotonic() + 60 * args.minutes - (time.time() - begun) - RESERVE_S
    check_packages()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if args.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    card, torch_version = ask_torch(environment)
    if card is None and args.device != "cpu":
        print("error: torch sees no GPU; --device cpu rehearses the script", file=sys.stderr)
        return 2
    sizes = TOY if card is None else FULL
    args.out.mkdir(parents=True, exist_ok=True)
    folder = args.out / "inputs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

    rows: list[dict] = []
    pairs, making = make_inputs(args, sizes, folder)
    for part in [*making, *measuring(sizes, folder / "model", pairs)]:
        print(f"{part.name}, {end - time.monotonic():.0f} s left", flush=True)
        seconds = min(part.seconds * args.minutes / MINUTES, max(0.0, end - time.monotonic()))
        command = [str(word) for word in part.command]
        if part.name in ("correct", "train"):  # these give up rows before they are ended
            command += ["--seconds", f"{0.95 * seconds:.0f}"]
        found = run_part(Part(part.name, command, seconds), args.out, environment)
        rows += [{"part": part.name, **row} for row in found]
    shutil.rmtree(folder, ignore_errors=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (args.out / "rows.jsonl").write_text(text, encoding="utf-8")
    about = {
        "card": card or "cpu (a rehearsal)",
        "torch": torch_version,
        "seconds": time.time() - begun,
    }
    return report(rows, goals_of(rows, card), about)


if __name__ == "__main__":
    sys.exit(main())
