"""Where a grid stands: which runs are done, running or waiting, and what is still missing."""

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import gen_mtbench
from pref.files import console, disk, mt_bench, run_folders
from pref.judging import store
from pref.sweeping import commands
from pref.sweeping.grid import Point, Study
from pref.training import checkpoint

DROPPED = "dropped"  # a run of a later round that cannot be; see rounds.py


class State(NamedTuple):
    """The state of a run."""

    name: str  # finished, diverged, dropped, running, failed, stopped or waiting
    step: int = 0  # done so far
    steps: int | None = None  # planned
    acc_ref: float | None = None
    seconds: float | None = None  # duration of the whole run, measured or extrapolated

    @property
    def has_ended(self) -> bool:
        return self.name in ("finished", "diverged", DROPPED)


# ---- one run ------------------------------------------------------------------------------------


def summary_of(folder: Path) -> dict | None:
    """The content of summary.json, which a run writes last; None before."""
    path = folder / "summary.json"
    return disk.read_json(path) if path.is_file() else None


def state_of(study: Study, point: Point, last: dict[str, "Event"]) -> State:
    """last: from `last_events`."""
    folder = study.folder(point)
    if summary := summary_of(folder):
        return State(
            name=summary["status"],
            step=summary["steps"],
            steps=summary["steps"],
            acc_ref=summary["best_acc_ref"],
            seconds=summary["wall_s"],
        )
    record = folder / "args.json"
    planned = disk.read_json(record).get("planned_steps") if record.is_file() else None
    lines = step_lines(folder / "metrics.jsonl")
    trained_s = sum(line["tokens"] / line["tok_per_s"] for line in lines)
    seconds = trained_s / len(lines) * planned if lines and planned else None
    if disk.lock_holder(folder):
        return State("running", step=len(lines), steps=planned, seconds=seconds)
    saved = [
        progress.step
        for path in checkpoint.saved_states(folder / "checkpoint")
        if (progress := checkpoint.progress_in(path))
    ]
    event = last[point.run_id].event if point.run_id in last else ""
    name = event if event in ("failed", DROPPED) else "stopped" if saved else "waiting"
    return State(name, step=max(saved, default=0), steps=planned, seconds=seconds)


def step_lines(path: Path) -> list[dict]:
    """The optimiser steps in metrics.jsonl, without a last line that is still being written."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return [line for line in lines if "tok_per_s" in line]


class Event(NamedTuple):
    """A line of sweep.log."""

    event: str
    details: str


def last_events(study: Study) -> dict[str, Event]:
    """The last event in sweep.log of each run and stage."""
    log, last = study.results / "sweep.log", {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        # "2026-11-21 10:00:00  failed   dpo_b0.1_s42  exit code 1: ..."
        _date, _time, event, name, details, *_ = [*line.split(maxsplit=4), "", "", "", ""]
        last[name] = Event(event, details)
    return last


def dropped_runs(study: Study) -> dict[str, str]:
    """Why runs of later rounds take no part in them, by run id."""
    last, ids = last_events(study), [point.run_id for point in study.points]
    return {
        name: last[name].details for name in ids if name in last and last[name].event == DROPPED
    }


# ---- time ---------------------------------------------------------------------------------------


def seconds_per_run(states: list[State]) -> float | None:
    """The mean over the runs that have a measured duration."""
    measured = [state.seconds for state in states if state.seconds]
    return sum(measured) / len(measured) if measured else None


def hours_text(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def time_left(states: list[State], slots: int, seconds: float) -> float:
    """Seconds until training is done, with `slots` runs at a time that take `seconds` each."""
    remaining = [
        1 - state.step / state.steps if state.steps else 1
        for state in states
        if not state.has_ended
    ]
    return seconds * max(sum(remaining) / slots, max(remaining, default=0))


# ---- --status -----------------------------------------------------------------------------------


def print_status(study: Study) -> int:
    """Print the grid as a table, and what is missing. Returns 1 if anything is, else 0."""
    last = last_events(study)
    states = [state_of(study, point, last) for point in study.points]
    rows = [["", "run", "state", "step", "acc_ref"], *map(row_of, study.points, states)]
    print(console.format_table(rows))
    counts = Counter(state.name for state in states).most_common()
    print(f"\n{len(states)} runs: " + ", ".join(f"{count} {name}" for name, count in counts))
    seconds = seconds_per_run(states)
    if seconds and not all(state.has_ended for state in states):
        slots = len(commands.slots_of(study))
        left = hours_text(time_left(states, slots, seconds))
        each = hours_text(seconds)
        print(f"training: about {left} left, {slots} at a time, {each} per run (measured)")
    if totals := store.read_totals(study.results):
        print(f"judged so far: {totals.requests} requests, {totals.cost_usd:.4f} dollars")
    missing = missing_of(study, {})
    if not missing:
        return 0
    print_missing(study, missing)
    return 1


def row_of(point: Point, state: State) -> list[str]:
    step = f"{state.step}/{state.steps or '?'}" if state.step or state.steps else "-"
    accuracy = "-" if state.acc_ref is None else f"{state.acc_ref:.4f}"
    return [str(point.index), point.run_id, state.name, step, accuracy]


# ---- what is missing ----------------------------------------------------------------------------


def missing_of(study: Study, reasons: dict[str, str]) -> dict[str, str]:
    """What each run still lacks of the study's stages, by run id; stages that failed, by name.

    reasons: why something failed in this start, by run id or stage.
    """
    benches = []
    if set(study.stages) & {"gen", "judge"}:
        benches = [bench_state(study, bench) for bench in study.benches]
    dropped = dropped_runs(study)
    names = [point.run_id for point in study.points if point.run_id not in dropped]
    names += [run_folders.BASE_RUN] if any(bench.questions for bench in benches) else []
    missing = {}
    for name in names:
        if lacks := what_run_lacks(study, name, benches):
            missing[name] = f"{lacks}: {reasons[name]}" if name in reasons else lacks
    return missing | {name: why for name, why in reasons.items() if name not in names}


class BenchState(NamedTuple):
    """What the study's runs are asked, and how far the judge is."""

    name: str
    questions: list[dict]
    verdicts: dict[str, store.Verdicts]  # by run; of this study's judge


def bench_state(study: Study, bench: str) -> BenchState:
    verdicts = verdicts_of(study, bench) if "judge" in study.stages else {}
    return BenchState(bench, questions_of(study, bench), verdicts)


def what_run_lacks(study: Study, name: str, benches: list[BenchState]) -> str | None:
    """The first thing that a run lacks, in the order of the stages; None if it is complete."""
    folder, summary = study.results / name, summary_of(study.results / name)

    # 1) Training, which the untrained model does not need.
    if name != run_folders.BASE_RUN:
        if summary is None:
            return "not trained" if "train" in study.stages else None
        if summary["best_step"] is None:
            return None  # it diverged before its first evaluation: there is no adapter to answer
        if not run_folders.has_weights(folder):
            missing = run_folders.weights_name(folder)
            return f"its {missing} is missing; restore it, or remove {folder} to train it again"

    # 2) Answers and verdicts, of one benchmark after another.
    for bench in benches:
        if lacks := what_answers_lack(study, folder, bench):
            return lacks if len(benches) == 1 else f"{bench.name}: {lacks}"
    return None


def what_answers_lack(study: Study, run: Path, bench: BenchState) -> str | None:
    """What a run lacks of one benchmark: answers to all questions, then a verdict on each."""
    path = run / bench.name / "answers.jsonl"
    answered = {key[0] for key in mt_bench.read_answers(path, None)} if path.is_file() else set()
    if count := sum(question["question_id"] not in answered for question in bench.questions):
        return f"{count} of {len(bench.questions)} answers are missing"
    if "judge" not in study.stages:
        return None
    verdicts = bench.verdicts.get(run.name, store.Verdicts(asked=0, without=0))
    if not verdicts.asked:
        return "not judged"
    if verdicts.without:
        return f"{verdicts.without} of {verdicts.asked} judgements are missing"
    return None


def verdicts_of(study: Study, bench: str) -> dict[str, store.Verdicts]:
    """By run: the judgements that this study's judge of a benchmark was asked for."""
    return store.judgement_counts(study.results, commands.judge_name(study, bench), bench)


def questions_of(study: Study, bench: str) -> list[dict]:
    """The questions that the study's runs answer; none if they are not there yet."""
    folder = commands.bench_folder(study, bench)
    if not folder.is_dir() or (bench == study.task and not (folder / "manifest.json").is_file()):
        return []  # of a task the sweep writes them, the manifest last
    args = gen_mtbench.parse_args(commands.stage_arguments(study, "gen", bench))
    return gen_mtbench.load_bench(args).questions


def print_missing(study: Study, missing: dict[str, str]) -> None:
    stages = {commands.stage_name(*stage) for stage in commands.later_stages(study)}
    print("missing:")
    for name, lacks in missing.items():
        log = study.log(name)
        explains = log.is_file() and (name in stages or lacks.startswith("not trained"))
        print(f"  {name}: {lacks}" + (f" (log: {log})" if explains else ""))
    print(f"continue with:\n  {study.resume_command()}", flush=True)
