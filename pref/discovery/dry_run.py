"""--dry_run: rounds, runs, hours, dollars, what can be told apart, the first prompt."""

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from pref import ROOT
from pref.discovery import (
    prompts,
    proposer_arguments,
    rungs,
    search,
    settings,
    split,
    stand_in,
    start,
    status,
)
from pref.discovery.proposals import Known, View
from pref.discovery.settings import Settings
from pref.files import console, disk
from pref.files.console import UserError
from pref.sweeping import commands, preflight
from pref.sweeping.status import hours_text
from pref.training.memory import shapes_of

# Standard deviations of a difference in accuracy to DPO, measured on the proxy with real pairs:
# between pairs, for a close relative and for another family; and of what is left in one run.
CLOSE_SD, OTHER_SD, REST_SD = 0.11, 0.25, 0.33
POWER_ERRORS = 2.8  # standard errors that are found with power 0.8
ROUND_SECONDS = 4.0  # of a round of proposals, on two cores


def run(args: argparse.Namespace, chosen: Settings) -> int:
    """Print what a search will take. Raises UserError for what would stop it at the start."""
    settings.identity(chosen)
    if chosen.is_stand_in:
        pairs, steps, batch, _ = stand_in.read(Path(chosen.features))
        what = f"no model, {chosen.features}"
    else:
        pairs = split.count(Path(chosen.data))
        steps, batch = chosen.steps(pairs.train), chosen.training().global_batch
        what = f"{Path(chosen.model).name} on {chosen.data}"
    print(
        f"{args.folder}: {what}: {pairs.train} pairs to train on, {pairs.val} to measure on; "
        f"{steps} steps of {batch} pairs"
    )
    for line in size_lines(chosen, pairs.val):
        print(line)
    if not chosen.is_stand_in:
        print(time_line(args.folder, chosen))
    if proposer_arguments.models_of(args):
        print_prompt(args, chosen, start.setting_text(chosen, pairs, steps, start.VISITED))
    print("nothing was started")
    return 0


def size_lines(chosen: Settings, pairs: int) -> list[str]:
    """pairs: that the search measures accuracy on."""
    steps = search.plan(chosen)
    rungs_text, seeds_text = settings.shown(chosen.rung), settings.shown(chosen.seeds_per_rung)
    lines = [
        f"proposals: {chosen.max_proposals} in {chosen.rounds} rounds by "
        f"{', '.join(chosen.proposer)}, after {len(chosen.seeds_from)} seeds",
        f"training: {status.runs_of(chosen, steps)} runs (candidates a rung: {rungs_text}; seeds "
        f"that it adds: {seeds_text}; dpo with each)",
    ]
    total = sum(chosen.seeds_per_rung)
    for seeds in dict.fromkeys((chosen.seeds_per_rung[0], total)):
        close, other = (100 * detectable(pairs, seeds, sd) for sd in (CLOSE_SD, OTHER_SD))
        lines.append(
            f"detectable with {pairs} pairs and {seeds} seed{'s' * (seeds > 1)}: about "
            f"{close:.0f} points for a close relative of dpo, {other:.0f} for another family "
            "(power 0.8)"
        )
    return lines


def detectable(pairs: int, seeds: int, pair_sd: float) -> float:
    """The difference in accuracy that is found with power 0.8, as a fraction."""
    return POWER_ERRORS * ((pair_sd**2 + REST_SD**2 / seeds) / pairs) ** 0.5


# ---- hours --------------------------------------------------------------------------------------


def time_line(folder: Path, chosen: Settings) -> str:
    """Hours of training, from the runs that are there, else from an assumed speed."""
    walls = status.run_seconds(folder)
    if walls:
        seconds, basis = sum(walls) / len(walls), "measured in this search"
    else:
        seconds, basis = assumed_seconds(chosen), "at an assumed speed; start-up not counted"
    devices = commands.gpus()
    at_a_time = len(devices) or jobs()
    runs = status.runs_of(chosen, search.plan(chosen))
    hours = hours_text(seconds * runs / at_a_time)
    rounds = hours_text(2 * ROUND_SECONDS * chosen.rounds)
    return (
        f"time: {hours} of training ({hours_text(seconds)} a run, {at_a_time} at a time, {basis}); "
        f"about {rounds} for the proposals and the control, without waiting for models"
    )


def jobs() -> int:
    """Runs at a time on a CPU."""
    text = os.environ.get("JOBS") or str(rungs.default_jobs())
    if not (text.isdecimal() and int(text)):
        raise UserError(f"JOBS={text}: must be a whole number above 0")
    return int(text)


def assumed_seconds(chosen: Settings) -> float:
    """A run's duration as preflight.py assumes it, of the plan that train_pref.py makes for the
    search's pairs.
    """
    with tempfile.TemporaryDirectory() as folder:
        split.write_search(Path(chosen.data), Path(folder))
        plan = Path(folder) / "plan.json"
        command = [sys.executable, str(ROOT / "train_pref.py"), "--model", chosen.model]
        command += ["--data", str(Path(folder) / "data" / "search"), "--loss", "dpo"]
        command += [*chosen.given_train_args(), "--dry_run", "1", "--plan_json", str(plan)]
        done = subprocess.run(command, capture_output=True, text=True, env=rungs.environment())
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"train_pref.py --dry_run: {last.removeprefix('error: ')}")
        tokens = disk.read_json(plan)["tokens"]
    weights = sum(p.numel() for p in shapes_of(chosen.model).parameters())
    cores = preflight.CORE_TFLOPS * console.usable_cores() / jobs()
    tflops = preflight.GPU_TFLOPS if commands.gpus() else cores
    return 4 * weights * tokens / (tflops * 1e12)


# ---- the first prompt ---------------------------------------------------------------------------


def print_prompt(args: argparse.Namespace, chosen: Settings, setting: str) -> None:
    """The first prompt in full, with seeds that were not measured yet, and its dollars."""
    known = [unmeasured(number, name) for number, name in enumerate(chosen.seeds_from, 1)]
    view = View(known=known, dpo=known[0], visited=start.VISITED, setting=setting)
    prompt = prompts.prompt(view, random.Random(f"{chosen.seed}:1:0"), chosen.coupled)
    print(proposer_arguments.estimate(args, prompt.messages, chosen.max_proposals))
    print("the first prompt, before anything is measured:")
    for message in prompt.messages:
        print(f"--- {message['role']}\n{message['content']}")
    print("---")


def unmeasured(number: int, name: str) -> Known:
    proposal = search.seed_proposal(name)
    return Known(
        id=f"p{number:04}",
        name=name,
        text=proposal.text,
        by=proposal.by,
        parents=[],
        genome=None,
        round=0,
        size=0,
        gradient={},
    )
