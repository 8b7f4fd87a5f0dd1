"""A grid of training runs, then answers, judgements and analysis, unattended; sweep.sh starts it.

    JUDGE=MODEL bash sweep.sh                     the study (grids/tddpo): 60 runs on Llama-2-7b-chat
    bash sweep.sh quick --yes                     another grid: a name in grids/, or a file
    bash sweep.sh --dry_run                       print every command in order, run nothing
    bash sweep.sh --status                        the grid as a table: done, running, failed, waiting, time left
    bash sweep.sh --list                          the grid points, numbered; --index N runs one of them
    bash sweep.sh --stages gen,judge,analyze      the other stages alone
    LOSSES=dpo BETAS="0.05 0.1" SEEDS=42 JUDGE=hf:models/judge bash sweep.sh

Reads  grids/NAME: one axis or setting a line (`BETAS 0.01 0.05`), `#` comments. An environment variable of the same
       name stands above the file's.
Writes RESULTS/<run_id>/ as the stages do, RESULTS/logs/<run_id>.log, and RESULTS/sweep.log, a line for each event.

Axes:      LOSSES BETAS TAUS BETA_MIXES SEEDS LRS LOGP, words separated by spaces; `default` is the loss's own value. An
           axis that a loss has no parameter for is left out for it. BETAS_dlrml stands above BETAS for that loss alone.
Settings:  MODEL DATA MT_BENCH RESULTS JUDGE BASE_URL STAGES; TRAIN_ARGS, GEN_ARGS, JUDGE_ARGS, ANALYZE_ARGS are further
           arguments of a stage (TRAIN_ARGS_dlrml: for that loss in addition).
Placement: GPUS_PER_RUN (1) GPUs a run, as many runs at once as there are GPUs, or JOBS of them; without a GPU JOBS (1)
           runs of NPROC (1) ranks. With --nodes a run is a torchrun over so many machines (RDZV=host:port, or Slurm's).

The same command continues after anything: Ctrl-C, SIGTERM, SIGUSR1, kill -9, a reboot. Exit codes: 0 all there, 1
something is missing (named at the end), 2 something to correct, 75 or 130 stopped by a signal, everything saved.
"""

import argparse
import ctypes
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter, deque
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import gen_mtbench
import judge
import train_pref
from checkpoint import EXIT_STOPPED, Heard, progress_in, running
from files import (
    BASE_RUN,
    UserError,
    find_runs,
    locked,
    pick_questions,
    read_answers,
    read_json,
    read_questions,
    run_main,
)
from losses import loss_defaults
from plan import shapes_of
from server import open_client

HERE = Path(__file__).resolve().parent
DEFAULT_GRID = "tddpo"
STAGES = ("train", "gen", "judge", "analyze")
AXES = {  # by name in a grid file: the argument of train_pref.py. The first ones vary most slowly.
    "SEEDS": "seed", "LRS": "learning_rate", "LOGP": "logp", "LOSSES": "loss", "BETAS": "beta", "TAUS": "tau",
    "BETA_MIXES": "beta_mix",
}  # fmt: skip
OF_EVERY_LOSS = ("seed", "learning_rate", "loss")
DEFAULTS = {
    "SEEDS": "42", "LRS": "default", "LOGP": "default", "LOSSES": "", "BETAS": "default", "TAUS": "default",
    "BETA_MIXES": "default", "MODEL": "meta-llama/Llama-2-7b-chat-hf", "DATA": "data/dpo-mix-7k",
    "MT_BENCH": "data/mt_bench", "RESULTS": "results", "JUDGE": "", "BASE_URL": "", "STAGES": " ".join(STAGES),
    "TRAIN_ARGS": "", "GEN_ARGS": "", "JUDGE_ARGS": "", "ANALYZE_ARGS": "", "GPUS_PER_RUN": "", "NPROC": "", "JOBS": "",
}  # fmt: skip
PER_LOSS = (*AXES, "TRAIN_ARGS")  # NAME_loss is for that loss alone
POLL_S = 0.1
# Of a training run (True) and of another stage: at Ctrl-C judge.py keeps what is in flight and gen_mtbench.py gathers.
STOPS = {True: signal.SIGTERM, False: signal.SIGINT}
# Judgements that failed because the judge was down: unlike those in a wrong form, worth another call.
UNREACHED = (
    "SELECT 1 FROM judgements WHERE status IN ('connection', 'timeout', 'http_429') OR status LIKE 'http_5%' LIMIT 1"
)
TRIES = 2  # of a run that crashes, in one start of the grid
PR_SET_PDEATHSIG = 1
# What torchrun passes on to its ranks, and how long it waits for them: by default not SIGUSR1, and thirty seconds, less
# than a large micro-batch and a checkpoint may take.
TORCHRUN = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "PET_SHUTDOWN_TIMEOUT": "300"}
# Rules of thumb until something of the grid has been measured.
GPU_TFLOPS, CORE_TFLOPS = 60.0, 0.08  # what training computes a second; the second: bench/README.md, 0.17 on two cores
CALL_TOKENS = (800, 250)  # of a judgement of MT-Bench: prompt and completion
CHECKPOINTS = 3 * 3 + 2  # adapters' sizes that a running run holds: two states and the one being written, two best


# ---- the grid -----------------------------------------------------------------------------------


class Point(NamedTuple):
    """A run of the grid. arguments: of train_pref.py."""

    index: int
    run_id: str
    arguments: list[str]


def grid_path(name: str) -> Path:
    path = HERE / "grids" / name if re.fullmatch(r"[\w-]+", name) else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in (HERE / "grids").iterdir()))
        raise UserError(f"{path}: no such grid; there are {known}, or give a file")
    return path


def is_setting(key: str) -> bool:
    return key in DEFAULTS or any(key.startswith(f"{name}_") for name in PER_LOSS)


def read_grid(path: Path) -> dict[str, str]:
    """The lines `NAME value ...` of a grid file. Raises UserError with file and line for another line."""
    settings = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        key, _, value = line.partition("#")[0].strip().partition(" ")
        if key and not is_setting(key):
            raise UserError(f"{path}:{number}: {key} is no axis or setting; there are {', '.join(DEFAULTS)}")
        if key in settings:
            raise UserError(f"{path}:{number}: {key} stands there twice; put its values on one line")
        if key:
            settings[key] = value.strip()
    return settings


def settings_of(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """All settings, and those of them that the environment gave."""
    given = {key: value for key, value in os.environ.items() if is_setting(key) and value}
    in_file = read_grid(path)
    for name in PER_LOSS:  # BETAS in the environment is meant for every loss
        if name in given:
            in_file = {key: value for key, value in in_file.items() if not key.startswith(f"{name}_")}
    return DEFAULTS | in_file | given, given


def values_of(settings: dict[str, str], axis: str, loss: str) -> list[str]:
    parameter = AXES[axis]
    if parameter not in OF_EVERY_LOSS and parameter not in loss_defaults(loss):
        return ["default"]
    return settings.get(f"{axis}_{loss}", settings[axis]).split() or ["default"]


def expand(settings: dict[str, str]) -> list[Point]:
    """Every combination of the axes, once. Raises UserError for what train_pref.py would refuse."""
    losses = settings["LOSSES"].split()
    if not losses:
        raise UserError("LOSSES: the grid names no loss; `python losses.py` lists them")
    slow = list(AXES)[:3]
    rows = []
    for loss in losses:
        check_loss_name(loss, settings)
        lists = [[loss] if axis == "LOSSES" else values_of(settings, axis, loss) for axis in AXES]
        ranks = [{value: n for n, value in enumerate(lists[k])} for k in range(len(slow))]
        for values in itertools.product(*lists):
            rows.append(([ranks[k][values[k]] for k in range(len(slow))], values))
    rows.sort(key=lambda row: row[0])
    points: dict[str, Point] = {}
    for _, values in rows:
        arguments = arguments_of(settings, dict(zip(AXES.values(), values)))
        run_id = train_pref.run_id_from(arguments)
        points.setdefault(run_id, Point(len(points), run_id, arguments))
    return list(points.values())


def check_loss_name(loss: str, settings: dict[str, str]) -> None:
    train_pref.load_own_loss(more_arguments(settings, loss))
    if loss not in train_pref.LOSSES:
        raise UserError(f"LOSSES: there is no loss {loss!r}; `python losses.py` lists them")


def more_arguments(settings: dict[str, str], loss: str) -> list[str]:
    return [word for key in ("TRAIN_ARGS", f"TRAIN_ARGS_{loss}") for word in shlex.split(settings.get(key, ""))]


def arguments_of(settings: dict[str, str], values: dict[str, str]) -> list[str]:
    """train_pref.py's arguments for one combination."""
    arguments = ["--model", settings["MODEL"], "--data", settings["DATA"], "--results_dir", settings["RESULTS"]]
    for key in ("loss", "beta", "tau", "beta_mix", "seed", "learning_rate", "logp"):
        if values[key] != "default":
            arguments += [f"--{key}", values[key]]
    return arguments + more_arguments(settings, values["loss"])


# ---- the study: a grid with its stages ----------------------------------------------------------


class Study(NamedTuple):
    """What this start is to do. given: the settings that came from the environment."""

    args: argparse.Namespace
    settings: dict[str, str]
    given: dict[str, str]
    points: list[Point]
    stages: list[str]

    @property
    def results(self) -> Path:
        return Path(self.settings["RESULTS"])

    def folder(self, point: Point) -> Path:
        return self.results / point.run_id

    def log(self, name: str) -> Path:
        return self.results / "logs" / f"{name}.log"

    def again(self) -> str:
        """The command that continues, with what the environment gave it. A password in an address stays out of it."""
        given = [f'{key}="${key}"' if "@" in value else f"{key}={shlex.quote(value)}"
                 for key, value in self.given.items()]  # fmt: skip
        args = self.args
        words = [args.grid] * (args.grid != DEFAULT_GRID)
        words += [f"--stages {','.join(self.stages)}"] * bool(args.stages)
        words += [f"--index {args.index}"] * (args.index is not None) + [f"--nodes {args.nodes}"] * (args.nodes > 1)
        return " ".join([*given, "bash", shlex.quote(os.path.relpath(HERE / "sweep.sh")), *words])


def shown(words: list[str]) -> str:
    """A command line without a password that stands in an address."""
    return re.sub(r"//[^/@\s]*@", "//", shlex.join(words))


def load_study(args: argparse.Namespace) -> Study:
    settings, given = settings_of(grid_path(args.grid))
    stages = re.split(r"[\s,]+", (args.stages or settings["STAGES"]).strip())
    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise UserError(f"stage {unknown[0]!r}: there are {', '.join(STAGES)}")
    for key in ("GPUS_PER_RUN", "NPROC", "JOBS"):
        if settings[key] and not re.fullmatch(r"[1-9]\d*", settings[key]):
            raise UserError(f"{key}={settings[key]}: must be a whole number above 0")
    points = expand(settings)
    study = Study(args, settings, given, points, [stage for stage in STAGES if stage in stages])
    if args.index is not None:
        if not 0 <= args.index < len(points):
            raise UserError(f"--index {args.index}: the grid has points 0 to {len(points) - 1} (--list)")
        return study._replace(points=[points[args.index]], stages=["train"])
    return study


def check_judge_is_named(study: Study) -> None:
    if "judge" in study.stages and not study.settings["JUDGE"]:
        raise UserError(
            "JUDGE is not set; JUDGE=MODEL (with BASE_URL for a server of your own), JUDGE=hf:FOLDER for a local "
            "model, or leave the stage out: --stages train,gen,analyze"
        )


def gpus() -> list[str]:
    """GPUs that runs may use, as CUDA_VISIBLE_DEVICES names them. Counting makes no context on any of them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(n) for n in range(torch.cuda.device_count())]
    return names[: torch.cuda.device_count()]


def ranks_of(settings: dict[str, str], devices: list[str]) -> int:
    """Ranks of a run on one machine."""
    return int((settings["GPUS_PER_RUN"] if devices else "") or settings["NPROC"] or 1)


def slots_of(study: Study) -> list[list[str]]:
    """Places for a run each: the GPUs that it gets, none on a machine without. Raises UserError for too few."""
    settings, devices = study.settings, gpus()
    ranks = ranks_of(settings, devices)
    if devices and ranks > len(devices):
        raise UserError(f"GPUS_PER_RUN={ranks}: this machine shows {len(devices)} GPUs; lower it, or use --nodes")
    if study.args.nodes > 1:
        return [devices[:ranks]]
    if not devices:
        return [[] for _ in range(int(settings["JOBS"] or 1))]
    slots = [devices[n : n + ranks] for n in range(0, len(devices) - ranks + 1, ranks)]
    return slots[: int(settings["JOBS"] or len(slots))]


# ---- commands -----------------------------------------------------------------------------------


def launcher(study: Study, ranks: int, name: str) -> list[str]:
    """What comes before the script's name."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    nodes = study.args.nodes
    if nodes > 1:
        meeting = ["--rdzv_backend", "c10d", "--rdzv_id", name, "--rdzv_endpoint", meeting_point()]
        return [*srun(nodes), *torchrun, "--nnodes", str(nodes), *meeting]
    return [*torchrun, "--standalone"] if ranks > 1 else [sys.executable]


def srun(nodes: int) -> list[str]:
    """One agent on each machine of a Slurm job, beside the step that this is."""
    if "SLURM_JOB_ID" not in os.environ:
        return []
    return ["srun", "--overlap", "--nodes", str(nodes), "--ntasks", str(nodes), "--ntasks-per-node", "1"]


def meeting_point() -> str:
    """host:port where the machines of a run find each other: RDZV, or the first machine of the Slurm job."""
    if given := os.environ.get("RDZV"):
        return given
    if "SLURM_JOB_NODELIST" not in os.environ:
        raise UserError("--nodes: RDZV=HOST:PORT is not set; HOST is one of the machines, the same on all of them")
    command = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    return f"{first}:{20000 + int(os.environ['SLURM_JOB_ID']) % 10000}"


def train_command(study: Study, point: Point, devices: list[str]) -> list[str]:
    start = launcher(study, ranks_of(study.settings, devices), point.run_id)
    return [*start, str(HERE / "train_pref.py"), *point.arguments]


def stage_command(study: Study, stage: str, targets: list[Path] | None = None) -> list[str]:
    """Command of a stage after training. targets: run folders instead of the whole results folder."""
    settings, devices = study.settings, gpus()
    start = [sys.executable]
    arguments = [str(path) for path in targets or [study.results]]
    if stage == "gen":
        if len(devices) > 1 and "--base_url" not in settings["GEN_ARGS"]:
            start = launcher(study._replace(args=argparse.Namespace(nodes=1)), len(devices), "gen")
        arguments += ["--base", "--model", settings["MODEL"]]
    if stage == "judge":
        arguments += ["--judge", settings["JUDGE"]]
        arguments += ["--base_url", settings["BASE_URL"]] if settings["BASE_URL"] else []
    script = HERE / {"gen": "gen_mtbench.py"}.get(stage, f"{stage}.py")
    arguments += ["--mt_bench", settings["MT_BENCH"], *shlex.split(settings[f"{stage.upper()}_ARGS"])]
    return [*start, str(script), *arguments]


def print_commands(study: Study) -> None:
    devices = slots_of(study)[0]
    for point in study.points if "train" in study.stages else ():
        print(f"+ {shown(train_command(study, point, devices))}")
    for stage in study.stages[study.stages.count("train") :]:
        print(f"+ {shown(stage_command(study, stage))}")


# ---- where the grid stands ----------------------------------------------------------------------


class State(NamedTuple):
    """Of a run. word: finished, diverged, running, failed, stopped or waiting."""

    word: str
    step: int = 0
    steps: int | None = None
    acc_ref: float | None = None
    seconds: float | None = None  # that the whole run takes, as far as it can be told


def summary_of(folder: Path) -> dict | None:
    return read_json(folder / "summary.json") if (folder / "summary.json").is_file() else None


def state_of(study: Study, point: Point, failed: set[str]) -> State:
    folder = study.folder(point)
    if summary := summary_of(folder):
        return State(summary["status"], summary["steps"], summary["steps"], summary["best_acc_ref"], summary["wall_s"])
    planned = read_json(folder / "args.json").get("planned_steps") if (folder / "args.json").is_file() else None
    steps = steps_of(folder / "metrics.jsonl")
    trained = sum(line["tokens"] / line["tok_per_s"] for line in steps)
    rest = (len(steps), planned, None, trained / len(steps) * planned if steps and planned else None)
    if running(folder):
        return State("running", *rest)
    saved = [p.step for path in (folder / "checkpoint").glob("step-*.safetensors") if (p := progress_in(path))]
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
    shares = [1 - state.step / state.steps if state.steps else 1 for state in states if not is_ended(state)]
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
    judge.print_rows(rows)
    counts = Counter(state.word for state in states)
    print(f"\n{len(states)} runs: " + ", ".join(f"{count} {word}" for word, count in counts.most_common()))
    if (seconds := seconds_of_run(states)) and not all(map(is_ended, states)):
        slots = len(slots_of(study))
        print(f"training: about {hours_text(time_left(states, slots, seconds))} left, {slots} at a time, "
              f"{hours_text(seconds)} a run (measured)")  # fmt: skip
    for count, usd in books(study.results, "SELECT COUNT(*), COALESCE(SUM(cost_usd), 0) FROM judgements"):
        print(f"judged so far: {count} requests, {usd:.4f} dollars")
    missing = missing_of(study, {})
    if not missing:
        return 0
    print_missing(study, missing)
    return 1


# ---- what is missing ----------------------------------------------------------------------------


def missing_of(study: Study, reasons: dict[str, str]) -> dict[str, str]:
    """What each run lacks of the study's stages. reasons: why, as far as this start has seen it, by run or stage."""
    asked = questions_of(study) if set(study.stages) & {"gen", "judge"} else []
    verdicts = verdicts_of(study) if "judge" in study.stages else {}
    names = [point.run_id for point in study.points] + ([BASE_RUN] if asked else [])
    found = {name: lacking(study, name, asked, verdicts) for name in names}
    missing = {
        name: f"{words}: {reasons[name]}" if name in reasons else words for name, words in found.items() if words
    }
    return missing | {name: words for name, words in reasons.items() if name not in found}


def lacking(study: Study, name: str, asked: list[dict], verdicts: dict[str, tuple[int, int]]) -> str | None:
    """What a run lacks, or None. verdicts: judgements asked for and without a verdict, by run."""
    folder, summary = study.results / name, summary_of(study.results / name)
    if name != BASE_RUN:
        if summary is None:
            return "not trained" if "train" in study.stages else None
        if summary["best_step"] is None:
            return None  # it diverged before it was ever evaluated: there is nothing to answer with
        if not (folder / "adapter" / "adapter_model.safetensors").is_file():
            return f"its adapter is missing; put it back, or remove {folder} to train it again"
    path = folder / "mt_bench" / "answers.jsonl"
    there = {key[0] for key in read_answers(path)} if path.is_file() else set()
    if count := sum(question["question_id"] not in there for question in asked):
        return f"{count} of {len(asked)} answers are missing"
    if "judge" not in study.stages:
        return None
    count, without = verdicts.get(name, (0, 0))
    return None if count and not without else f"{without} of {count} judgements are missing" if count else "not judged"


def verdicts_of(study: Study) -> dict[str, tuple[int, int]]:
    """By run: judgements that this judge was to make, and how many of them have no verdict."""
    query = (
        "SELECT model_id, COUNT(*), SUM(COALESCE(status, '') != 'ok') FROM asked LEFT JOIN judgements USING "
        "(request_sha256) WHERE asked.judge = ?1 OR ?1 = '' GROUP BY model_id"
    )
    return {name: (count, without) for name, count, without in books(study.results, query, study.settings["JUDGE"])}


def books(results: Path, query: str, *values: str) -> list[tuple]:
    """Rows of a query to the judgements, none if there are no judgements."""
    path = results / "judgements.sqlite"
    if not path.is_file():
        return []
    try:
        with closing(sqlite3.connect(path)) as store:
            return store.execute(query, values).fetchall()
    except sqlite3.Error as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def questions_of(study: Study) -> list[dict]:
    given = gen_mtbench.parse_args(stage_arguments(study, "gen"))
    path = Path(study.settings["MT_BENCH"]) / "question.jsonl"
    return pick_questions(read_questions(path), given.num_questions) if path.is_file() else []


def print_missing(study: Study, missing: dict[str, str]) -> None:
    print("missing:")
    for name, words in missing.items():
        log = study.log(name)
        known = log.is_file() and (name in STAGES or words.startswith("not trained"))
        print(f"  {name}: {words}" + (f" (log: {log})" if known else ""))
    print(f"the command that continues:\n  {study.again()}", flush=True)


# ---- processes ----------------------------------------------------------------------------------


@dataclass
class Job:
    """A process of ours. name: the run's id, or the stage's. point None: a stage after training."""

    name: str
    point: Point | None
    slot: list[str]
    process: subprocess.Popen
    begun: float
    attempt: int = 1
    leads: ExitStack | None = None  # holds the lock of the reference's computation


class Stop(Heard):
    """Ctrl-C, SIGTERM, SIGUSR1 and a closed terminal: the loop sees `signal` and has the jobs save. Ctrl-C again does
    not wait for them; the others may come more than once by themselves (Slurm's do)."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self):
        self.signal, self.times = 0, 0  # times: 1, or 2 for those who do not want to wait

    def note(self, number: int, _frame) -> None:
        self.times = 2 if self.signal and number == signal.SIGINT else max(self.times, 1)
        self.signal = self.signal or number

    @property
    def exit_code(self) -> int:
        return 130 if self.signal == signal.SIGINT else EXIT_STOPPED


LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def in_the_child(parent: int, stops: int) -> None:
    """Between fork and exec: have the kernel send `stops` if the sweep is killed outright, so that its jobs save and
    leave instead of working on unseen; and Ctrl-C as usual, which a job in a script's background would ignore."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, stops)
        if os.getppid() != parent:
            os._exit(EXIT_STOPPED)
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Scheduler:
    """Runs the points that are not done on the free slots, and then the stages. Everything is a process of its own."""

    def __init__(self, study: Study, stop: Stop):
        self.study, self.stop = study, stop
        self.jobs: list[Job] = []
        self.told = 0  # signals that the jobs have got
        self.reasons: dict[str, str] = {}  # what failed, and why
        self.held: set[str] = set()  # runs that another process trains, as was said
        self.cached = False  # the reference's log-probs are on the disk

    def say(self, word: str, name: str, words: str = "") -> None:
        """A line on the screen and in sweep.log. A disk that is full must not end the grid."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {word:<8} {name}  {words}".rstrip()
        print(line, flush=True)
        try:
            with open(self.study.results / "sweep.log", "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            print(f"warning: {self.study.results / 'sweep.log'}: {error}", file=sys.stderr)

    def start(self, name: str, command: list[str], slot: list[str], point: Point | None = None) -> Job:
        log = self.study.log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = TORCHRUN | os.environ
        if slot:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot)
        elif point and int(self.study.settings["JOBS"] or 1) > 1:  # or every run would take all cores
            share = (os.cpu_count() or 1) // (int(self.study.settings["JOBS"]) * ranks_of(self.study.settings, []))
            environment.setdefault("OMP_NUM_THREADS", str(max(1, share)))
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"+ {shown(command)}\n")
            file.flush()
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True,
                preexec_fn=partial(in_the_child, os.getpid(), STOPS[point is not None]),
            )  # fmt: skip
        job = Job(name, point, slot, process, time.time())
        self.jobs.append(job)
        return job

    def pass_on(self) -> None:
        """Have the jobs stop, once for the first signal; kill them at the second."""
        if self.jobs and self.told < self.stop.times:
            self.told = self.stop.times
            word = "saving and stopping; Ctrl-C again kills them" if self.told == 1 else "killed"
            self.say("stopping", ", ".join(job.name for job in self.jobs), word)
            for job in self.jobs:
                with suppress(ProcessLookupError):
                    if self.told == 1:
                        job.process.send_signal(STOPS[job.point is not None])
                    else:
                        os.killpg(job.process.pid, signal.SIGKILL)

    def wait_for(self, job: Job) -> int:
        while job.process.poll() is None:
            self.pass_on()
            time.sleep(POLL_S)
        self.jobs.remove(job)
        return job.process.returncode

    # ---- training

    def train(self) -> None:
        """All points, as many at a time as there are slots."""
        study = self.study
        waiting = deque((point, 1) for point in study.points if summary_of(study.folder(point)) is None)
        free, total = slots_of(study), len(waiting)
        if len(study.points) > 1 and total:
            self.say("training", study.results.name, f"{total} of {len(study.points)} runs, {len(free)} at a time")
        while study.args.index is None and any(map(self.is_held, study.points)) and not self.stop.signal:
            time.sleep(POLL_S)  # who trains it may be on the GPU that would be given to another
        while self.jobs or (waiting and not self.stop.signal):
            self.pass_on()
            for job in [job for job in self.jobs if job.process.poll() is not None]:
                self.jobs.remove(job)
                free.append(job.slot)
                if job.leads:
                    job.leads.close()
                if self.ended(job) == "again":
                    waiting.appendleft((job.point, job.attempt + 1))
            self.release_others()
            while free and waiting and not self.stop.signal and self.launch_next(waiting, free):
                pass
            time.sleep(POLL_S)

    def launch_next(self, waiting: deque, free: list) -> bool:
        """Start the first waiting run that may be started. False if none may now."""
        for entry in list(waiting):
            point, attempt = entry
            if self.is_held(point):
                continue
            if summary_of(self.study.folder(point)):  # by the process that held it
                waiting.remove(entry)
                return True
            leads = self.lead()
            if leads is None and not self.cached:
                return False
            waiting.remove(entry)
            slot = free.pop(0)
            try:
                job = self.start(point.run_id, train_command(self.study, point, slot), slot, point)
            except OSError as error:  # a full disk: another run may find room later
                free.append(slot)
                self.fail(point.run_id, str(error))
                return True
            job.attempt, job.leads = attempt, leads
            words = [f"on GPU {','.join(slot)}"] * bool(slot) + [f"try {attempt}"] * (attempt > 1)
            words += ["computes the reference, the others wait for it"] * bool(leads)
            self.say("start", point.run_id, "; ".join(words))
            return True
        return False

    def is_held(self, point: Point) -> bool:
        """Whether another process trains the run; with --nodes that is the other machine's own."""
        return self.study.args.nodes == 1 and self.is_locked(self.study.folder(point), point.run_id)

    def is_locked(self, folder: Path, name: str, lock: str = ".lock") -> bool:
        """Whether another process works there: one of a sweep that was killed, which is about to save and leave, or
        another task of an array. Said once."""
        holder = running(folder, lock)
        if holder and name not in self.held:
            self.held.add(name)
            self.say("held", name, f"by {holder}; waiting for it")
        return holder is not None

    def lead(self) -> ExitStack | None:
        """The lock of who computes the reference log-probs, if they are not there and nobody else is at it."""
        self.cached = self.cached or self.study.args.nodes > 1 or is_cached(self.study)
        if self.cached:
            return None
        stack = ExitStack()
        try:
            stack.enter_context(locked(self.study.results, ".reference.lock", "the reference is being computed"))
        except UserError:
            return None
        return stack

    def release_others(self) -> None:
        """A run writes args.json as soon as its reference is there."""
        for job in self.jobs:
            record = self.study.folder(job.point) / "args.json"
            if job.leads and record.is_file() and record.stat().st_mtime >= job.begun:
                self.cached = True
                job.leads.close()
                job.leads = None

    def ended(self, job: Job) -> str:
        """Note how a run ended. Returns "again" if it is to be started once more."""
        code, seconds = job.process.returncode, time.time() - job.begun
        summary = summary_of(self.study.folder(job.point))
        if code == 0 and summary:
            best = "" if summary["best_acc_ref"] is None else f", best acc_ref {summary['best_acc_ref']:.4f}"
            self.say(summary["status"], job.name, f"{summary['steps']} steps, {hours_text(seconds)}{best}")
            return "done"
        why = f"exit code {code}: {last_words(self.study.log(job.name))}"
        if self.stop.signal:
            self.say("stopped", job.name, f"exit code {code}")
        elif code == 2 and running(self.study.folder(job.point)):
            return "again"  # another process was faster; a run that is held is not started
        elif code not in (2, 130, EXIT_STOPPED) and job.attempt < TRIES:
            self.say("crashed", job.name, f"{why}; once more, from its last checkpoint")
            return "again"
        else:
            self.fail(job.name, why)
        return "done"

    def fail(self, name: str, why: str) -> None:
        self.reasons[name] = why
        self.say("failed", name, why)

    # ---- the other stages

    def run_stage(self, stage: str) -> None:
        """Answers, judgements or analysis; what it writes on its log is shown when it has ended."""
        log, begun = self.study.log(stage), time.time()
        written = log.stat().st_size if log.exists() else 0
        while stage == "judge" and not self.stop.signal and self.is_locked(self.study.results, stage, ".judge.lock"):
            time.sleep(POLL_S)
        if self.stop.signal:
            return
        self.say("start", stage)
        try:
            targets = self.fit_for_judging() if stage == "judge" else None
            command = stage_command(self.study, stage, targets)
            if stage == "judge" and books(self.study.results, UNREACHED) and "--retry_failed" not in command:
                command.append("--retry_failed")
            code = self.wait_for(self.start(stage, command, []))
        except (UserError, OSError) as error:
            self.fail(stage, str(error))
            return
        with open(log, "rb") as file:
            file.seek(written)
            text = file.read().decode("utf-8", "replace")
        lines = [line for line in text.split("\n")[1:] if "\r" not in line]  # progress bars have it
        print("\n".join(lines).rstrip(), flush=True)
        if self.stop.signal:
            self.say("stopped", stage, f"exit code {code}")
        elif code:
            self.fail(stage, f"exit code {code}: {last_words(log)}")
        else:
            self.say("finished", stage, hours_text(time.time() - begun))

    def fit_for_judging(self) -> list[Path] | None:
        """Run folders whose answers judge.py would take, if it would refuse all because of some; these are noted."""
        if "--allow_incomplete" in self.study.settings["JUDGE_ARGS"]:
            return None
        runs = {run: run / "mt_bench" / "answers.jsonl" for run in find_runs([self.study.results])}
        answers = {run: read_answers(path) for run, path in runs.items() if path.is_file()}
        every, unfit = set().union(*answers.values()), set()
        for run, mine in answers.items():
            try:
                judge.check_adapter(run, mine)
                judge.check_complete({run: mine})
            except UserError as error:
                unfit.add(run)
                self.reasons[run.resolve().name] = str(error)
            if every - mine.keys():
                unfit.add(run)
        return [run for run in answers if run not in unfit] if unfit else None


def last_words(log: Path) -> str:
    """The last error in a log, or its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    start = max((n for n, line in enumerate(lines) if line.startswith("+ ")), default=0)
    lines = lines[start + 1 :]
    errors = [line for line in lines if re.search(r"^(\[rank\d+\]: )?(error|[\w.]+Error)\b|have no verdict", line)]
    return (errors or lines or ["it wrote nothing"])[-1][:300]


def is_cached(study: Study) -> bool:
    """Whether some run here has said which reference it reads, and that is there."""
    cache = Path(study.settings["DATA"]) / "reference"
    for path in study.results.glob("*/args.json"):
        keys = read_json(path).get("reference")
        if keys and all((cache / f"{key}.safetensors").is_file() for key in keys.values()):
            return True
    return False


# ---- preflight: what can be known before an hour is spent ---------------------------------------


class Plan(NamedTuple):
    """Of a run, as train_pref.py --dry_run says."""

    steps: int
    tokens: int
    gib: float  # a rank
    adapter_gib: float


def preflight(study: Study) -> None:
    """Print what the grid will take. Raises UserError with every problem found, each with its remedy."""
    todo = [p for p in study.points if "train" in study.stages and summary_of(study.folder(p)) is None]
    print(f"grid {study.args.grid}: {len(study.points)} runs, {len(todo)} to train; stages {', '.join(study.stages)}; "
          f"results in {study.results}", flush=True)  # fmt: skip
    problems: list[str] = []
    with noting(problems):
        check_files(study)
    if todo and not problems:
        with noting(problems):
            plan = plan_of(study, todo[0])
            for check in (check_memory, check_disk, tell_hours):
                with noting(problems):
                    print(check(study, plan, todo), flush=True)
    if "judge" in study.stages:
        with noting(problems):
            print(check_judge(study), flush=True)
    if problems:
        raise UserError("nothing was started:\n  " + "\n  ".join(problems))
    if not study.args.yes and sys.stdin.isatty() and input("go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("not started; --yes starts without asking")


@contextmanager
def noting(problems: list[str]):
    try:
        yield
    except UserError as error:
        problems.append(str(error))


def check_files(study: Study) -> None:
    settings = study.settings
    data, questions = Path(settings["DATA"]), Path(settings["MT_BENCH"]) / "question.jsonl"
    for path in [data / "train.jsonl", data / "val.jsonl"] if "train" in study.stages else []:
        if not path.is_file():
            raise UserError(f"DATA={data}: no {path.name} there; make it with prep_data.py --dataset ...")
    if set(study.stages) & {"gen", "judge"}:
        read_questions(questions)
        gen_mtbench.check_args(gen_mtbench.parse_args(stage_arguments(study, "gen")))
    check_model("MODEL", settings["MODEL"])
    study.results.mkdir(parents=True, exist_ok=True)
    if not os.access(study.results, os.W_OK):
        raise UserError(f"RESULTS={study.results}: cannot be written; give another folder")


def check_model(name: str, model: str) -> None:
    """Raise UserError for a path, rather than a hub id, without a model."""
    if not (Path(model) / "config.json").is_file() and (
        Path(model).is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model)
    ):
        raise UserError(f"{name}={model}: no model there (config.json); correct the folder, or give a hub id")


def stage_arguments(study: Study, stage: str) -> list[str]:
    command = stage_command(study, stage)
    return command[next(n for n, word in enumerate(command) if word.endswith(".py")) + 1 :]


def plan_of(study: Study, point: Point) -> Plan:
    """By train_pref.py in a process of its own: this one shall hold no GPU. It reads model and tokenizer, so that a hub
    that refuses is found here."""
    devices = slots_of(study)[0]
    ranks = ranks_of(study.settings, devices) * study.args.nodes
    command = [sys.executable, str(HERE / "train_pref.py"), *point.arguments, "--dry_run", str(ranks)]
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | visible)
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"train_pref.py --dry_run of {point.run_id}: {words.removeprefix('error: ')}")

    def number(pattern: str) -> float:
        return float(re.search(pattern, done.stdout, re.M)[1].replace(",", ""))

    steps, tokens = int(number(r"^steps: (\d+)")), int(number(r"^tokens: ([\d,]+)"))
    return Plan(steps, tokens, number(r"^ +total +([\d.]+)"), number(r"^ +optimiser +([\d.]+)") * ranks / 3)


def check_memory(study: Study, plan: Plan, todo: list[Point]) -> str:
    slots, least = slots_of(study), None
    remedy = "lower --per_device_batch or --max_length (TRAIN_ARGS)"
    if slots[0]:
        free = {device: memory_of_gpu(device) for slot in slots for device in slot}
        known = {device: gib for device, gib in free.items() if gib is not None}
        if known:
            least = min(known, key=known.get)
            if known[least] < plan.gib:
                raise UserError(f"GPU {least} has {known[least]:.1f} GiB free, a run needs {plan.gib:.1f}; stop what "
                                f"runs there, leave the GPU out (CUDA_VISIBLE_DEVICES), or {remedy}")  # fmt: skip
        there = f"the fullest GPU has {known[least]:.1f} free" if known else "nvidia-smi does not say what is free"
        return f"memory: {plan.gib:.1f} GiB a GPU, {there}; {len(slots)} runs at a time, {len(slots[0])} GPUs each"
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    need = plan.gib * ranks_of(study.settings, []) * len(slots)
    if need > ram:
        raise UserError(f"JOBS={len(slots)} runs need {need:.1f} GiB, there are {ram:.1f}; lower JOBS, or {remedy}")
    return f"memory: {len(slots)} runs at a time on the CPU, {need:.1f} of {ram:.1f} GiB"


def memory_of_gpu(device: str) -> float | None:
    """GiB that are free, or None if nvidia-smi does not know."""
    command = ["nvidia-smi", f"--id={device}", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return None
    return int(said) / 1024 if said.isdigit() else None


def check_disk(study: Study, plan: Plan, todo: list[Point]) -> str:
    need = plan.adapter_gib * (len(todo) + CHECKPOINTS * len(slots_of(study))) + 0.01 * len(todo)
    free = shutil.disk_usage(study.results).free / 2**30
    words = f"disk: {need:.1f} GiB for adapters and checkpoints, {free:.1f} free in {study.results}"
    if need > free:
        raise UserError(f"{words}; make room, give another RESULTS, or a smaller --lora_r (TRAIN_ARGS)")
    return words


def tell_hours(study: Study, plan: Plan, todo: list[Point]) -> str:
    slots = slots_of(study)
    states = [state_of(study, point, set()) for point in study.points]
    seconds, how = seconds_of_run(states), "measured in this grid"
    if seconds is None:
        weights = sum(p.numel() for p in shapes_of(study.settings["MODEL"]).parameters())
        share = (os.cpu_count() or 1) / len(slots)
        speed = GPU_TFLOPS * len(slots[0]) * study.args.nodes if slots[0] else CORE_TFLOPS * share
        seconds = 4 * weights * plan.tokens / (speed * 1e12)
        how = f"assumed: {plan.tokens:,} tokens a run at 4 x {weights / 1e9:.3g}B operations, {speed:g} TFLOP/s"
    left = time_left([state_of(study, point, set()) for point in todo], len(slots), seconds)
    return f"hours: {hours_text(seconds)} a run ({how}), {hours_text(left)} for {len(todo)} runs; start-up not counted"


def check_judge(study: Study) -> str:
    """Raises UserError if the judge cannot be asked. One small question, unless all is judged already."""
    settings = study.settings
    given = judge.parse_args(stage_arguments(study, "judge"))
    bench = judge.read_bench(given.mt_bench, given.grading, given.refs)
    if given.judge.startswith("hf:"):
        check_model("JUDGE", given.judge.removeprefix("hf:"))
        return f"judge: {given.judge}, here, no dollars"
    count = len(pick_questions(bench["questions"], gen_mtbench.parse_args(stage_arguments(study, "gen")).num_questions))
    whole = count * 2 * given.repeats * (2 if given.grading == "pair" else 1)
    verdicts, names = verdicts_of(study), [BASE_RUN, *(point.run_id for point in study.points)]
    calls = sum(verdicts[name][1] if name in verdicts else whole for name in names)
    if not calls:
        return "judge: everything is judged"
    client = open_client(f"JUDGE={settings['JUDGE']}", given.base_url, 60.0, 2)
    judge.probe_server(client, given.judge, given.parameters or {"temperature": 0, "max_tokens": given.max_tokens})
    words = f"judge: {given.judge} answers; about {calls:,} calls"
    prices = judge.prices_of(given)
    if prices is None:
        return f"{words}; dollars: no price known, give JUDGE_ARGS='--price_in X --price_out Y' (per million tokens)"
    usd = calls * sum(tokens * price for tokens, price in zip(CALL_TOKENS, prices)) / 1e6
    cap = f", capped at {given.max_usd}" if given.max_usd is not None else ""
    prompt, completion = CALL_TOKENS
    return f"{words}; about {usd:.2f} dollars (assumed: {prompt} + {completion} tokens a call){cap}"


# ---- the command --------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sweep.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "grid", nargs="?", default=DEFAULT_GRID, help=f"a name in grids/, or a file (default: {DEFAULT_GRID})"
    )
    parser.add_argument("--stages", help="train,gen,judge,analyze, or some of them (default: the setting STAGES)")
    parser.add_argument("--index", type=int, metavar="N", help="train grid point N alone; a Slurm array task's default")
    parser.add_argument("--nodes", type=int, default=1, help="machines that one run is spread over, by torchrun")
    parser.add_argument("--yes", action="store_true", help="ask nothing before starting")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--dry_run", action="store_true", help="print every command in order, and stop")
    group.add_argument("--preflight", action="store_true", help="check what can be checked, and stop")
    group.add_argument("--status", action="store_true", help="print the grid as a table, and stop; 1: it is not done")
    group.add_argument("--list", action="store_true", help="print the points' numbers and run ids, and stop")
    args = parser.parse_args(argv)
    array = os.environ.get("SLURM_ARRAY_TASK_ID")
    if args.index is None and array and not (args.stages or args.status or args.list or args.preflight):
        args.index = int(array)
    if args.nodes < 1:
        raise UserError(f"--nodes {args.nodes}: must be at least 1")
    if args.nodes > 1 and args.index is None and "SLURM_JOB_ID" not in os.environ:
        raise UserError("--nodes: start one point on every machine: RDZV=HOST:PORT bash sweep.sh --index N --nodes ...")
    return args


def sweep(study: Study) -> int:
    """Every stage, then what is missing. Returns the exit code."""
    study.results.mkdir(parents=True, exist_ok=True)
    with Stop() as stop:
        scheduler = Scheduler(study, stop)
        if "train" in study.stages:
            scheduler.train()
        for stage in study.stages[study.stages.count("train") :]:
            if not stop.signal:
                scheduler.run_stage(stage)
        if stop.signal:
            print(f"stopped; the command that continues:\n  {study.again()}", flush=True)
            requeue(stop)
            return stop.exit_code
        return report(study, scheduler)


def requeue(stop: Stop) -> None:
    """Back into Slurm's queue after SIGUSR1, which sweep.sh asks for ahead of the time limit, and after a preemption:
    Slurm itself requeues only what it had to kill. Not after scancel."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    said = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    if stop.signal == signal.SIGUSR1 or re.search(r"PreemptTime=\d", said):
        print(f"requeueing job {job}", flush=True)
        subprocess.run(["scontrol", "requeue", job], check=False)


def report(study: Study, scheduler: Scheduler) -> int:
    summaries = {p.run_id: summary_of(study.folder(p)) for p in study.points}
    diverged = [name for name, summary in summaries.items() if summary and summary["status"] == "diverged"]
    missing = missing_of(study, scheduler.reasons)
    ended = sum(summary is not None for summary in summaries.values())
    if study.args.index is not None and not missing:  # an array has a line for each as it is
        return 0
    scheduler.say("end", study.results.name, f"{ended} of {len(summaries)} runs have ended, {len(diverged)} of them "
                  f"diverged, {len(missing)} things are missing")  # fmt: skip
    for name in diverged:
        print(f"diverged, which is a result: {name}, after {summaries[name]['steps']} steps")
    if missing:
        print_missing(study, missing)
    return 1 if missing else 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    study = load_study(args)
    if args.list:
        print("\n".join(f"{point.index}\t{point.run_id}" for point in study.points))
        return 0
    if args.status:
        return print_status(study)
    check_judge_is_named(study)
    if args.dry_run:
        print_commands(study)
        return 0
    if args.index is not None:
        return sweep(study)
    preflight(study)
    if args.preflight:
        return 0
    with locked(study.results, ".sweep.lock", "is being swept"):
        return sweep(study)


if __name__ == "__main__":
    run_main(main)
