"""what is done, running, missing"""

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import gen_mtbench
from pref.files import console, disk, mt_bench, run_folders
from pref.judging import store
from pref.sweeping import commands, grid
from pref.sweeping.grid import Point, Study
from pref.training import checkpoint


class State(NamedTuple):
    """Of a run. word: finished, diverged, running, failed, stopped or waiting."""

    word: str
    step: int = 0
    steps: int | None = None
    acc_ref: float | None = None
    seconds: float | None = None  # that the whole run takes, as far as it can be told


def summary_of(folder: Path) -> dict | None:
    return disk.read_json(folder / "summary.json") if (folder / "summary.json").is_file() else None


def state_of(study: Study, point: Point, failed: set[str]) -> State:
    folder = study.folder(point)
    if summary := summary_of(folder):
        return State(
            summary["status"],
            summary["steps"],
            summary["steps"],
            summary["best_acc_ref"],
            summary["wall_s"],
        )
    planned = (
        disk.read_json(folder / "args.json").get("planned_steps")
        if (folder / "args.json").is_file()
        else None
    )
    steps = steps_of(folder / "metrics.jsonl")
    trained = sum(line["tokens"] / line["tok_per_s"] for line in steps)
    rest = (
        len(steps),
        planned,
        None,
        trained / len(steps) * planned if steps and planned else None,
    )
    if disk.running(folder):
        return State("running", *rest)
    saved = [
        p.step
        for path in (folder / "checkpoint").glob("step-*.safetensors")
        if (p := checkpoint.progress_in(path))
    ]
    word = "failed" if point.run_id in failed else "stopped" if saved else "waiting"
    return State(word, max(saved, default=0), *rest[1:])


def steps_of(path: Path) -> list[dict]:
    """Lines of the steps; not the last one, should it be in writing."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return [line for line in lines if "tok_per_s" in line]


def failed_runs(study: Study) -> set[str]:
    """Runs whose newest line in sweep.log says that they failed."""
    log, newest = study.results / "sweep.log", {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        _, _, word, name = [*line.split(maxsplit=4), "", "", "", ""][:4]
        newest[name] = word
    return {name for name, word in newest.items() if word == "failed"}


def seconds_of_run(states: list[State]) -> float | None:
    """Mean over the runs of which something was measured."""
    measured = [state.seconds for state in states if state.seconds]
    return sum(measured) / len(measured) if measured else None


def hours_text(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def time_left(states: list[State], slots: int, seconds: float) -> float:
    """Seconds until training is done, with `slots` runs at a time and `seconds` for a whole one."""
    shares = [
        1 - state.step / state.steps if state.steps else 1
        for state in states
        if not is_ended(state)
    ]
    return seconds * max(sum(shares) / slots, max(shares, default=0))


def is_ended(state: State) -> bool:
    return state.word in ("finished", "diverged")


def print_status(study: Study) -> int:
    failed = failed_runs(study)
    states = [state_of(study, point, failed) for point in study.points]
    rows = [["", "run", "state", "step", "acc_ref"]]
    for point, state in zip(study.points, states):
        step = f"{state.step}/{state.steps or '?'}" if state.step or state.steps else "-"
        accuracy = "-" if state.acc_ref is None else f"{state.acc_ref:.4f}"
        rows.append([str(point.index), point.run_id, state.word, step, accuracy])
    console.print_rows(rows)
    counts = Counter(state.word for state in states)
    print(
        f"\n{len(states)} runs: "
        + ", ".join(f"{count} {word}" for word, count in counts.most_common())
    )
    if (seconds := seconds_of_run(states)) and not all(map(is_ended, states)):
        slots = len(commands.slots_of(study))
        print(
            f"training: about {hours_text(time_left(states, slots, seconds))} left, {slots} at a time, "
            f"{hours_text(seconds)} a run (measured)"
        )
    for count, usd in store.books(
        study.results, "SELECT COUNT(*), COALESCE(SUM(cost_usd), 0) FROM judgements"
    ):
        print(f"judged so far: {count} requests, {usd:.4f} dollars")
    missing = missing_of(study, {})
    if not missing:
        return 0
    print_missing(study, missing)
    return 1


def missing_of(study: Study, reasons: dict[str, str]) -> dict[str, str]:
    """What each run lacks of the study's stages. reasons: why, as far as this start has seen it, by
    run or stage.
    """
    asked = questions_of(study) if set(study.stages) & {"gen", "judge"} else []
    verdicts = verdicts_of(study) if "judge" in study.stages else {}
    names = [point.run_id for point in study.points] + ([run_folders.BASE_RUN] if asked else [])
    found = {name: lacking(study, name, asked, verdicts) for name in names}
    missing = {
        name: f"{words}: {reasons[name]}" if name in reasons else words
        for name, words in found.items()
        if words
    }
    return missing | {name: words for name, words in reasons.items() if name not in found}


def lacking(
    study: Study, name: str, asked: list[dict], verdicts: dict[str, tuple[int, int]]
) -> str | None:
    """What a run lacks, or None. verdicts: judgements asked for and without a verdict, by run."""
    folder, summary = study.results / name, summary_of(study.results / name)
    if name != run_folders.BASE_RUN:
        if summary is None:
            return "not trained" if "train" in study.stages else None
        if summary["best_step"] is None:
            return None  # it diverged before it was ever evaluated: there is nothing to answer with
        if not (folder / "adapter" / "adapter_model.safetensors").is_file():
            return f"its adapter is missing; put it back, or remove {folder} to train it again"
    path = folder / "mt_bench" / "answers.jsonl"
    there = {key[0] for key in mt_bench.read_answers(path)} if path.is_file() else set()
    if count := sum(question["question_id"] not in there for question in asked):
        return f"{count} of {len(asked)} answers are missing"
    if "judge" not in study.stages:
        return None
    count, without = verdicts.get(name, (0, 0))
    return (
        None
        if count and not without
        else f"{without} of {count} judgements are missing"
        if count
        else "not judged"
    )


def verdicts_of(study: Study) -> dict[str, tuple[int, int]]:
    """By run: judgements that this judge was to make, and how many of them have no verdict."""
    query = (
        "SELECT model_id, COUNT(*), SUM(COALESCE(status, '') != 'ok') FROM asked LEFT JOIN judgements USING "
        "(request_sha256) WHERE asked.judge = ?1 OR ?1 = '' GROUP BY model_id"
    )
    return {
        name: (count, without)
        for name, count, without in store.books(study.results, query, study.settings["JUDGE"])
    }


def questions_of(study: Study) -> list[dict]:
    given = gen_mtbench.parse_args(commands.stage_arguments(study, "gen"))
    path = Path(study.settings["MT_BENCH"]) / "question.jsonl"
    return (
        mt_bench.pick_questions(mt_bench.read_questions(path), given.num_questions)
        if path.is_file()
        else []
    )


def print_missing(study: Study, missing: dict[str, str]) -> None:
    print("missing:")
    for name, words in missing.items():
        log = study.log(name)
        known = log.is_file() and (name in grid.STAGES or words.startswith("not trained"))
        print(f"  {name}: {words}" + (f" (log: {log})" if known else ""))
    print(f"the command that continues:\n  {study.again()}", flush=True)
