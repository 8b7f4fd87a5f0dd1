"""Rungs: the best candidates are trained with train_pref.py, by the same scheduler as any grid.

    candidates, seeds -> rungs/<name>.grid -> python -m pref.sweeping -> results/<run_id>/
                      -> val_pairs.jsonl -> `trained` events

Successive halving with racing: rung 0 trains many candidates with one seed, each later rung fewer
of them with more seeds, and DPO is trained with every seed. Who is behind the best beyond chance
goes no further, whatever its rank.
"""

import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from pref import ROOT
from pref.discovery import archive, estimates, fingerprint, stand_in, task_fitness
from pref.discovery.archive import Entry, State
from pref.discovery.search import Search, Step, instalments
from pref.files import console, disk
from pref.files.console import UserError
from pref.sweeping import grid, scheduler

APART = 0.1  # distance in behaviour between candidates that are trained
MOST_OF_A_CELL = 3
AT_RANDOM = 2  # of rung 0's candidates, where it has this many times three
POLL_S = 0.2
SECRETS = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS)($|_)", re.IGNORECASE)


def seeds_of(settings, rung: int) -> list[int]:
    """The training seeds of a rung: others for each."""
    return [100 * (rung + 1) + n for n in range(1, settings.seeds_per_rung[rung] + 1)]


# ---- steps --------------------------------------------------------------------------------------


def take(search: Search, step: Step) -> bool:
    """Take a step "rung" or "fresh". Returns False if a signal stopped it."""
    if step.kind == "fresh":
        return take_fresh(search, step)
    if step.number == 0:
        count = instalments(search.settings)[step.part]
        return train_step(search, step, first_choice(search, step, count), [])
    ids, left = promoted(search.state, search.settings, step.number)
    events = [stopped_event(id, step.number - 1, why) for id, why in left.items()]
    return train_step(search, step, ids, events)


def take_fresh(search: Search, step: Step) -> bool:
    """A candidate that is the best of all trained ones with the seeds of rung 0 alone is trained
    with those of rung 1, before its rank is bred from.
    """
    ranked = [id for id in ranking(search.state) if id != search.state.dpo.id]
    fresh = set(seeds_of(search.settings, 1))
    ids = [id for id in ranked[:1] if not fresh & search.state.entries[id].runs.keys()]
    if not ids:
        search.archive.append_step(step.name, [])
        return True
    return train_step(search, step, ids, [], rung=1)


def train_step(
    search: Search, step: Step, ids: list[str], events: list[dict], rung: int | None = None
) -> bool:
    """Train the candidates `ids`, and DPO, with the seeds of a rung; add the events of that, which
    follow `events`.
    """
    rung = step.number if rung is None else rung
    seeds = seeds_of(search.settings, rung)
    if ids:
        search.log(
            f"{step.name}: training {', '.join(search.state.entries[id].label for id in ids)} and "
            f"dpo, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        )
        results = train(search, step.name.replace(" ", "_"), ids, seeds)
        if results is None:
            return False
        events = [*events, {"event": "rung", "k": rung, "ids": ids, "seeds": seeds}]
        events += trained_events(search.state, results, rung)
    search.archive.append_step(step.name, events)
    for line in rung_lines(search.state, ids):
        search.log(line)
    return True


def pilot(search: Search) -> Path | None:
    """The folder of a DPO run on the search's pairs with the first seed of rung 0, which will find
    it trained. None if a signal stopped it. Raises UserError if it diverged.
    """
    seed = seeds_of(search.settings, 0)[0]
    results, rate = search.folder / "results", search.settings.training().learning_rate
    runs = index_of_runs(results, rate=rate)
    if ("dpo", seed) not in runs:
        search.log(f"pilot: training dpo, seed {seed}")
        path = search.folder / "rungs" / "pilot.grid"
        write_grid(search, path, ["dpo"], [seed])
        if not run_grid(search, path):
            return None
        runs = index_of_runs(results, rate=rate)
    run = run_of(runs, "dpo", seed, results)
    if outcome_of(run)["status"] != "finished":
        raise UserError("dpo diverged in training; lower --learning_rate (--train_args)")
    return run


def trained_events(state: State, results: list[dict], rung: int) -> list[dict]:
    """A `trained` event of each run that the archive does not have, and a `stopped` one of each
    candidate that diverged.
    """
    events = []
    for result in results:
        if result["seed"] not in state.entries[result["id"]].runs:
            events.append({"event": "trained", **result, "rung": rung})
    for id in dict.fromkeys(r["id"] for r in results if r["correct"] is None):
        if id == state.dpo.id:
            raise UserError("dpo diverged in training; lower --learning_rate (--train_args)")
        events.append(stopped_event(id, rung, "diverged in training"))
    for id in dict.fromkeys(r["id"] for r in results if not r.get("task", {"gaps": 1})["gaps"]):
        why = "its KL on the task is one that dpo, trained with three learning rates, has not"
        events.append(stopped_event(id, rung, why))
    return events


def stopped_event(id: str, rung: int, why: str) -> dict:
    return {"event": "stopped", "id": id, "at": f"rung{rung}", "why": why}


def rung_lines(state: State, ids: list[str]) -> list[str]:
    """What training said, a line a candidate."""
    gains = estimates.gains(state)
    lines = []
    for id in ids:
        label = state.entries[id].label
        if id not in gains:
            lines.append(f"  {label}: {state.entries[id].stopped['why']}")
            continue
        gain = gains[id]
        lines.append(
            f"  {label}: {100 * gain.difference:+.1f} ± {100 * gain.se:.1f} points over dpo, "
            f"shrunk {100 * gain.gain:+.1f} ({gain.seeds} seed{'s' * (gain.seeds > 1)})"
        )
    return lines


# ---- who is trained -----------------------------------------------------------------------------


def first_choice(search: Search, step: Step, count: int) -> list[str]:
    """Candidates for an instalment of rung 0: the best by proxy, apart in behaviour from all that
    are trained, at most three of a cell; and the instalment's share of those that are drawn from
    all that reached the proxy, so that the proxy can be compared with training.

    What training has found of a candidate's nearest relative comes before the proxy. On real pairs
    the proxy has put losses first that push the rejected response alone, hundreds of nats down: to
    first order that ranks pairs well, and a real model then loses both responses (bench/README.md).
    """
    settings, state = search.settings, search.state
    dice = random.Random(f"{settings.seed}:{step.name}")
    trained = [entry.id for entry in state.entries.values() if entry.runs] or [state.dpo.id]
    waiting = [
        entry.id
        for entry in state.entries.values()
        if entry.reached_proxy
        and not entry.stopped
        and entry.id not in trained
        and entry.by != archive.SEED  # known losses need no discovery
    ]
    drawn = dice.sample(waiting, min(len(waiting), at_random(settings, step.part)))
    by_proxy = settings.proxy == "on" and estimates.proxy_ranks(state)
    gains = estimates.gains(state) if by_proxy else {}
    order = [id for id in waiting if id not in drawn]
    dice.shuffle(order)  # decides between equals; without the proxy, all
    if by_proxy:
        order.sort(key=lambda id: gains[id].rank, reverse=True)
        behind = {id for id in trained if estimates.is_behind(state.entries[id], state.dpo)}
        order.sort(key=lambda id: nearest(search, id, trained) in behind)  # keeps equals in order
    chosen = apart(search, order, [*trained, *drawn], count - len(drawn))
    return sorted([*chosen, *drawn])


def at_random(settings, part: int) -> int:
    """How many of an instalment are drawn: in all AT_RANDOM, the first ones of them first."""
    if settings.rung[0] < 3 * AT_RANDOM or settings.proxy != "on":
        return 0
    parts = len(instalments(settings))
    return AT_RANDOM // parts + (part < AT_RANDOM % parts)


def apart(search: Search, order: list[str], taken: list[str], count: int) -> list[str]:
    """The first `count` of `order` that are apart from each other and from `taken`; if there are
    too few, the first of the others too.
    """
    entries, chosen = search.state.entries, []
    for id in order:
        others = [*taken, *chosen]
        same_cell = sum(entries[other].cell == entries[id].cell for other in chosen)
        if len(chosen) < count and same_cell < MOST_OF_A_CELL and is_apart(search, id, others):
            chosen.append(id)
    rest = [id for id in order if id not in chosen]
    return [*chosen, *rest[: count - len(chosen)]]


def is_apart(search: Search, id: str, others: Iterable[str]) -> bool:
    own = search.field_of(id)
    fields = (search.field_of(other) for other in others)
    return all(fingerprint.distance(own, other) >= APART for other in fields if other is not None)


def nearest(search: Search, id: str, others: list[str]) -> str | None:
    """Which of `others` behaves most like `id`; None if that is not known of any."""
    fields = {other: search.field_of(other) for other in others}
    known = {other: field for other, field in fields.items() if field is not None}
    own = search.field_of(id)
    return min(known, key=lambda o: (fingerprint.distance(own, known[o]), o), default=None)


def ranking(state: State) -> list[str]:
    """Trained candidates that are still in the race, the best first; DPO is one of them."""
    gains = estimates.gains(state)
    in_race = [
        entry.id
        for entry in state.entries.values()
        if entry.id in gains and gains[entry.id].measured == "trained" and not entry.stopped
    ]
    return sorted(in_race, key=lambda id: gains[id].rank, reverse=True)


def promoted(state: State, settings, rung: int) -> tuple[list[str], dict[str, str]]:
    """Who goes on to `rung`, and why the others of the race do not, by id."""
    ranked = [id for id in ranking(state) if id != state.dpo.id]
    left: dict[str, str] = {}
    if ranked:
        best = state.entries[ranked[0]]
        for id in ranked[1:]:
            if estimates.is_behind(state.entries[id], best):
                left[id] = f"behind {best.label} beyond chance (90 %)"
    ids = [id for id in ranked if id not in left]
    for id in ids[settings.rung[rung] :]:
        left[id] = f"not among the best {settings.rung[rung]} of rung {rung - 1}"
    return sorted(ids[: settings.rung[rung]]), left


# ---- training -----------------------------------------------------------------------------------


def train(search: Search, name: str, ids: list[str], seeds: list[int]) -> list[dict] | None:
    """Train candidates and DPO on the search's pairs. Returns id, seed, run_id, status, acc_ref and
    correct of each run, in order; None if a signal stopped it. Raises UserError if a run is
    missing.
    """
    entries = search.state.entries
    for id in ids:
        search.archive.check_program(id)
    if search.settings.is_stand_in:
        texts = {id: search.archive.text_of(id) for id in [search.state.dpo.id, *ids]}
        return stand_in.train(search, texts, seeds)
    losses = {id: loss_spec(search, entries[id]) for id in [search.state.dpo.id, *ids]}
    path = search.folder / "rungs" / f"{name}.grid"
    write_grid(search, path, list(losses.values()), seeds)
    if not run_grid(search, path):
        return None
    results = search.folder / "results"
    runs = index_of_runs(results, rate=search.settings.training().learning_rate)
    found = []
    for id, loss in losses.items():
        for seed in seeds:
            run = run_of(runs, grid.loss_name(loss), seed, results)
            outcome = outcome_of(run)
            if search.settings.task and outcome["correct"] is not None:
                own = None if id == search.state.dpo.id else run
                outcome["task"] = task_outcome(search, own, seed)
            found.append({"id": id, "seed": seed, **outcome})
    return found


def run_of(runs: dict, loss: str, seed: int, results: Path) -> Path:
    if (loss, seed) not in runs:
        raise UserError(
            f"{results}: no finished run of {loss} with seed {seed}; the same command trains it "
            "again"
        )
    return runs[loss, seed]


def task_outcome(search: Search, run: Path | None, seed: int) -> dict:
    """Score, KL and gaps to DPO's curve. run: None for DPO itself."""
    results, rate = search.folder / "results", search.settings.training().learning_rate
    curve = [
        run_of(index_of_runs(results, rate=rate * factor), "dpo", seed, results)
        for factor in task_fitness.RATES
    ]
    return task_fitness.fitness(run, curve, Path(search.settings.task).stem)


def loss_spec(search: Search, entry: Entry) -> str:
    """The loss as a grid names it. DPO is the one of losses.py."""
    if entry.id == search.state.dpo.id:
        return "dpo"
    return f"{search.archive.loss_file(entry.id)}:{entry.label}"


def write_grid(
    search: Search,
    path: Path,
    losses: list[str],
    seeds: list[int],
    data: str = "data/search",
    results: str = "results",
    betas: Iterable[float] = (),
) -> None:
    """A grid file. data, results: in the search's folder. betas: of dpo."""
    folder, settings = search.folder, search.settings
    lines = {
        "MODEL": settings.model,
        "DATA": folder / data,
        "RESULTS": folder / results,
        "LOSSES": " ".join(losses),
        "SEEDS": " ".join(map(str, seeds)),
        **({"BETAS_dpo": " ".join(f"{beta:g}" for beta in betas)} if betas else {}),
        "STAGES": "train",
        "JOBS": default_jobs(),
        "TRAIN_ARGS": shlex.join(settings.given_train_args()),
    }
    if settings.task and data == "data/search" and not betas:
        lines |= task_fitness.grid_lines(settings, folder)
    disk.write_text(path, "".join(f"{name:<10} {value}\n" for name, value in lines.items()))


def default_jobs() -> int:
    """Runs at a time on a CPU, where JOBS does not say it: a run of a small model gains little from
    a second core.
    """
    return min(4, console.usable_cores())


def run_grid(search: Search, path: Path) -> bool:
    """Run a grid in a process of its own. Returns False if a signal stopped it. Raises UserError if
    it ended without all runs.
    """
    if search.rung_only:
        check_submitted(path, has_task=bool(search.settings.task))
        return True
    wait_for_earlier(search)
    log = path.with_suffix(".log")
    command = [sys.executable, "-m", "pref.sweeping", str(path), "--yes"]
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment(),
            start_new_session=True,
            preexec_fn=partial(scheduler.prepare_child, os.getpid(), signal.SIGTERM),
        )
    told = 0
    while process.poll() is None:
        told = tell(process, search, told)
        time.sleep(POLL_S)
    if search.is_stopped():
        return False
    if process.returncode:
        raise UserError(
            f"{path}: exit code {process.returncode}: {scheduler.last_error(log)} (log: {log}); "
            "correct it, then run the same command again: what is trained is kept"
        )
    return True


class TrainingIsNext(Exception):
    """With --rung_only: what has to be trained elsewhere, and the command for it."""


def check_submitted(path: Path, has_task: bool) -> None:
    """Raise TrainingIsNext unless all runs of a grid are there."""
    command = [sys.executable, "-m", "pref.sweeping", str(path)]
    done = subprocess.run(
        [*command, "--list"], env=environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"{path}: {done.stderr.strip().removeprefix('error: ')}")
    results = Path(grid.read_grid(path)["RESULTS"])
    points = [line.split("\t") for line in done.stdout.splitlines() if not line.startswith("#")]
    left = [index for index, run_id in points if not (results / run_id / "summary.json").is_file()]
    if left:
        lines = [f"  sbatch --array={','.join(left)} sweep.sh {path}"]
        if has_task:
            lines.append(f"  sbatch --dependency=... sweep.sh {path} --stages gen,judge")
        raise TrainingIsNext(
            f"training is next, {len(left)} of {len(points)} runs; then the same command again:\n"
            + "\n".join(lines)
        )


def tell(process: subprocess.Popen, search: Search, told: int) -> int:
    """Pass a signal on: save and stop; at a second Ctrl-C, kill. Returns what it has been told."""
    level = search.stop_level()
    while told < level:
        process.send_signal(signal.SIGTERM if told == 0 else signal.SIGINT)
        told += 1
    return told


def wait_for_earlier(search: Search) -> None:
    """Runs of a search that was killed may still be saving."""
    said = False
    while not search.is_stopped():
        holders = [
            disk.lock_holder(path.parent, path.name) for path in search.folder.glob("*/.sweep.lock")
        ]
        if not any(holders):
            return
        if not said:
            search.log(f"waiting for {next(filter(None, holders))}, which still trains")
            said = True
        time.sleep(POLL_S)


def environment() -> dict[str, str]:
    """This process's environment, without keys and without settings of grids, but for those that
    say how many runs there are at a time.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not SECRETS.search(name)
        and (name in grid.PLACEMENT_DEFAULTS or not grid.is_setting(name))
    }
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(paths)}


# ---- what was trained ---------------------------------------------------------------------------


def index_of_runs(
    results: Path, beta: float = 0.1, rate: float | None = None
) -> dict[tuple[str, int], Path]:
    """Folders of finished runs by loss and seed. beta, rate (None: any): of dpo, which may have
    been trained with others too.
    """
    found = {}
    for path in sorted(results.glob("*/summary.json")):
        record = disk.read_json(path.parent / "args.json")
        if record["loss"] == "dpo" and record["beta"] != beta:
            continue
        if record["loss"] == "dpo" and rate and not math.isclose(record["learning_rate"], rate):
            continue
        found[record["loss"], record["seed"]] = path.parent
    return found


def outcome_of(run: Path) -> dict:
    """run_id, status, acc_ref and correct of a run. A run that diverged has no accuracy."""
    summary = disk.read_json(run / "summary.json")
    found = {"run_id": run.name, "status": summary["status"], "acc_ref": None, "correct": None}
    if summary["status"] != "finished":
        return found
    correct = correct_pairs(run / "val_pairs.jsonl")
    accuracy = float(correct.mean())
    if abs(accuracy - summary["final_acc_ref"]) > 1e-6:
        raise UserError(
            f"{run}/val_pairs.jsonl: accuracy {accuracy:.4f}, summary.json says "
            f"{summary['final_acc_ref']:.4f}; remove {run} to have it trained again"
        )
    return found | {"acc_ref": summary["final_acc_ref"], "correct": archive.encode(correct)}


def correct_pairs(path: Path) -> np.ndarray:
    """(pairs,) of 1, 0.5 for a tie, and 0, in the order of val.jsonl. Margins are computed in
    float32, as train_pref.py does, so that a tie stays one.
    """
    rows = [row for _, row in disk.read_jsonl(path)]
    last = max(row["step"] for row in rows)  # the file has the pairs before training too
    rows = [row for row in rows if row["step"] == last]
    names = ("policy_chosen", "ref_chosen", "policy_rejected", "ref_rejected")
    table = np.array([[row[name] for name in names] for row in rows], dtype=np.float32)
    margin = (table[:, 0] - table[:, 1]) - (table[:, 2] - table[:, 3])
    return (margin > 0) + 0.5 * (margin == 0)
