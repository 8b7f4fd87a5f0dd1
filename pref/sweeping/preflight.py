"""What can be checked before hours or dollars are spent, and what a grid will take.

Everything here is quick: it reads files, asks the judge one small question, and lets one
`train_pref.py --dry_run` work out steps, tokens and memory.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import gen_mtbench
import judge
from pref import ROOT
from pref.files import console, disk, run_folders
from pref.files.console import UserError
from pref.judging import benchmarks, costs, judges, server_judge
from pref.model import server
from pref.sweeping import commands, grid, rounds, status
from pref.sweeping.grid import Point, Study
from pref.training.memory import shapes_of

# Assumed training speeds, until a run of the grid has been measured. Per core: half of the
# 0.17 TFLOP/s (0.083 of 2.07) that bench/README.md has for two cores.
GPU_TFLOPS, CORE_TFLOPS = 60.0, 0.08
# What runs leave on the disk.
LEFT = {"lora": "adapters", "full": "models"}
# Operations per parameter and token: 2 forward, 2 backward, and 2 for the gradients of parameters.
OPERATIONS = {"lora": 4, "full": 6}


class Plan(NamedTuple):
    """What train_pref.py --dry_run says about a run."""

    steps: int
    tokens: int
    gib: float  # memory per rank
    adapter_gib: float  # on the disk, of what it leaves: an adapter, or a model
    checkpoint_gib: float  # of one checkpoint, optimiser included

    @property
    def working_gib(self) -> float:
        """Disk space of a run in progress: three checkpoints (two and the one being written), and
        the best weights twice.
        """
        return 3 * self.checkpoint_gib + 2 * self.adapter_gib


Plans = dict[str, tuple[Plan, list[Point]]]  # by what is trained, "lora" or "full"


def preflight(study: Study) -> None:
    """Print what the grid will take, and ask whether to start if a person is there to answer.

    Raises UserError with every problem found, each with its remedy.
    """
    todo = []
    if "train" in study.stages:
        todo = [p for p in study.points if status.summary_of(study.folder(p)) is None]
    rounds_text = f" in {study.rounds} rounds" if study.rounds else ""
    print(
        f"grid {study.args.grid}: {len(study.points)} runs{rounds_text}, {len(todo)} to train; "
        f"stages {', '.join(study.stages)}; results in {study.results}",
        flush=True,
    )
    for name, values in grid.drawn_axes(study.settings).items():
        print(f"{name} drawn: {' '.join(values)}", flush=True)
    problems: list[str] = []

    # 1) Files: data, questions, models.
    with collecting(problems):
        check_files(study)

    # 2) Training: memory, disk space, hours. The dry run needs the files of step 1.
    if todo and not problems:
        with collecting(problems):
            if study.rounds:
                rounds.check_pairs_args(study)
                rounds.check_unchanged(study)
                print(rounds.estimate_sampling(study, todo), flush=True)
            plans = plans_of(study, todo)
            largest = max((plan for plan, _ in plans.values()), key=lambda plan: plan.gib)
            with collecting(problems):
                print(check_memory(study, largest), flush=True)
            for check in (check_disk, estimate_hours):
                with collecting(problems):
                    print(check(study, plans), flush=True)

    # 3) The judge: does it answer, and what will it cost?
    for bench in study.benches if "judge" in study.stages else []:
        with collecting(problems):
            print(check_judge(study, bench), flush=True)

    if problems:
        raise UserError("nothing was started:\n  " + "\n  ".join(problems))
    if not study.args.yes and sys.stdin.isatty():
        if input("start? [y/N] ").strip().lower() not in ("y", "yes"):
            raise UserError("nothing was started; --yes starts without asking")


@contextmanager
def collecting(problems: list[str]) -> Iterator[None]:
    """Add a UserError's message to `problems` and carry on, so that all are reported at once."""
    try:
        yield
    except UserError as error:
        problems.append(str(error))


# ---- files --------------------------------------------------------------------------------------


def check_files(study: Study) -> None:
    settings = study.settings
    data = Path(settings["DATA"])
    needs_data = "train" in study.stages and not study.rounds
    for path in [data / "train.jsonl", data / "val.jsonl"] if needs_data else []:
        if not path.is_file():
            raise UserError(
                f"DATA={data}: no {path.name} there; make it with prep_data.py --dataset ..."
            )
    for bench in study.benches if set(study.stages) & {"gen", "judge"} else []:
        args = gen_mtbench.parse_args(commands.stage_arguments(study, "gen", bench))
        gen_mtbench.check_args(args)
        gen_mtbench.load_bench(args)
    check_model("MODEL", settings["MODEL"])
    study.results.mkdir(parents=True, exist_ok=True)
    if not os.access(study.results, os.W_OK):
        raise UserError(f"RESULTS={study.results}: cannot be written; give another folder")


def check_model(name: str, model: str) -> None:
    """Raise UserError for a folder without a model, or a text that cannot be a hub id."""
    if (Path(model) / "config.json").is_file():
        return
    if Path(model).is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        raise UserError(
            f"{name}={model}: no model there (config.json); correct the folder, or give a hub id"
        )


# ---- training -----------------------------------------------------------------------------------


def plans_of(study: Study, todo: list[Point]) -> Plans:
    """A plan for the first run of each kind, and the runs that it stands for."""
    kinds: dict[str, list[Point]] = {}
    for point in todo:
        kinds.setdefault(point.tune, []).append(point)
    return {tune: (plan_of(study, points[0]), points) for tune, points in kinds.items()}


def plan_of(study: Study, point: Point) -> Plan:
    """The plan of one run, made by train_pref.py in a process of its own, so that this process
    holds no GPU. It reads the model's configuration and tokenizer, so a hub that refuses access
    is noticed here.
    """
    devices = commands.slots_of(study)[0]
    ranks = commands.ranks_of(study.settings, devices) * study.args.nodes
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        given = rounds.planned_arguments(study, point, Path(folder) / "pairs")
        command = [sys.executable, str(ROOT / "train_pref.py"), *given]
        command += ["--dry_run", str(ranks), "--plan_json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | visible)
        if done.returncode:
            last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
            message = last_line.removeprefix("error: ")
            raise UserError(f"train_pref.py --dry_run of {point.run_id}: {message}")
        plan = disk.read_json(path)
    keys = ("steps", "tokens", "total_gib", "adapter_gib", "checkpoint_gib")
    return Plan(*(plan[key] for key in keys))


def check_memory(study: Study, plan: Plan) -> str:
    """Raises UserError if runs as large as that of `plan` do not fit into the memory that is
    free.
    """
    slots = commands.slots_of(study)
    remedy = "lower --per_device_batch or --max_length (TRAIN_ARGS)"
    if not slots[0]:
        total_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        need_gib = plan.gib * commands.ranks_of(study.settings, []) * len(slots)
        if need_gib > total_gib:
            raise UserError(
                f"JOBS={len(slots)} runs need {need_gib:.1f} GiB of memory, this machine has "
                f"{total_gib:.1f}; lower JOBS, or {remedy}"
            )
        return (
            f"memory: {len(slots)} runs at a time on the CPU, {need_gib:.1f} of {total_gib:.1f} GiB"
        )
    free_gib = {device: free_gib_of(device) for slot in slots for device in slot}
    known = {device: gib for device, gib in free_gib.items() if gib is not None}
    available = "nvidia-smi does not report the free memory"
    if known:
        fullest = min(known, key=known.get)
        if known[fullest] < plan.gib:
            raise UserError(
                f"GPU {fullest} has {known[fullest]:.1f} GiB free, a run needs {plan.gib:.1f}; "
                f"stop what runs there, exclude the GPU (CUDA_VISIBLE_DEVICES), or {remedy}"
            )
        available = f"the fullest GPU has {known[fullest]:.1f} free"
    return (
        f"memory: {plan.gib:.1f} GiB per GPU, {available}; "
        f"{len(slots)} runs at a time, {len(slots[0])} GPUs each"
    )


def free_gib_of(device: str) -> float | None:
    """Free memory of a GPU, or None if nvidia-smi does not report it."""
    query = ["--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    command = ["nvidia-smi", f"--id={device}", *query]
    try:
        mib = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return None
    return int(mib) / 1024 if mib.isdigit() else None


def check_disk(study: Study, plans: Plans) -> str:
    """Raises UserError if what runs leave, and the checkpoints of those in progress, would not fit
    on the disk.
    """
    count = sum(len(points) for _, points in plans.values())
    at_a_time, logs_gib = len(commands.slots_of(study)), 0.01 * count
    left = sum(plan.adapter_gib * len(points) for plan, points in plans.values())
    need = left + at_a_time * max(plan.working_gib for plan, _ in plans.values()) + logs_gib
    free = shutil.disk_usage(study.results).free / 2**30
    what = ", ".join(name for tune, name in LEFT.items() if tune in plans)
    text = f"disk: {need:.1f} GiB for {what} and checkpoints, {free:.1f} free in {study.results}"
    if need > free:
        smaller = "fewer runs at a time (JOBS)" if "full" in plans else "a smaller --lora_r"
        raise UserError(
            f"{text}; free some space, give another RESULTS, or {smaller}"
            + " (TRAIN_ARGS)" * ("full" not in plans)
        )
    return text


def estimate_hours(study: Study, plans: Plans) -> str:
    """Hours per run and for all, measured in this grid if it has begun, else from an assumed
    speed.
    """
    slots = commands.slots_of(study)
    states = {p.run_id: status.state_of(study, p, {}) for p in study.points}
    todo = [point for _, points in plans.values() for point in points]
    seconds, basis = status.seconds_per_run(list(states.values())), "measured in this grid"
    if seconds is None:
        weights = sum(p.numel() for p in shapes_of(study.settings["MODEL"]).parameters())
        if slots[0]:
            tflops = GPU_TFLOPS * len(slots[0]) * study.args.nodes
        else:
            tflops = CORE_TFLOPS * console.usable_cores() / len(slots)
        operations = {
            tune: OPERATIONS[tune] * weights * plan.tokens for tune, (plan, _) in plans.items()
        }
        total = sum(operations[tune] * len(points) for tune, (_, points) in plans.items())
        seconds = total / len(todo) / (tflops * 1e12)
        plan, _ = next(iter(plans.values()))
        factors = " or ".join(f"{OPERATIONS[tune]} ({tune})" for tune in plans)
        factors = factors if len(plans) > 1 else f"{OPERATIONS[next(iter(plans))]}"
        basis = (
            f"assumed: {plan.tokens:,} tokens per run at {factors} x {weights / 1e9:.3g}B "
            f"operations, {tflops:g} TFLOP/s"
        )
    waiting = [states[point.run_id] for point in todo]
    left = status.hours_text(status.time_left(waiting, len(slots), seconds))
    each = status.hours_text(seconds)
    return f"hours: {each} per run ({basis}), {left} for {len(todo)} runs; start-up not counted"


# ---- the judge ----------------------------------------------------------------------------------


def check_judge(study: Study, name: str) -> str:
    """Ask the judge of the benchmark `name` one small question, unless everything is judged
    already.

    Raises UserError if the judge cannot be asked.
    """
    args = judge.parse_args(commands.stage_arguments(study, "judge", name))
    bench = benchmarks.read_bench(args)
    text = f"judge of {bench.title}: {args.judge}"
    if judges.kind_of(args.judge) == judges.PROGRAM:
        return f"{text}, no dollars"
    if judges.kind_of(args.judge) != judges.SERVER:
        check_model("JUDGE", judges.path_of(args.judge))
        return f"{text}, on this machine, no dollars"

    # 1) How many calls are left? A run that was not judged yet needs all of them.
    asked = {question["question_id"] for question in status.questions_of(study, name)}
    questions = [one for one in bench.questions if one["question_id"] in asked]
    of_run = costs.ahead_of_run(bench._replace(questions=questions), args.repeats)
    verdicts = status.verdicts_of(study, name)
    names = [run_folders.BASE_RUN, *(point.run_id for point in study.points)]
    calls = sum(verdicts[n].without if n in verdicts else of_run.calls for n in names)
    if not calls:
        return f"{text}; everything is judged"

    # 2) Does the judge answer, with these parameters?
    client = server.open_client(f"JUDGE={args.judge}", args.base_url, 60.0, 2)
    server_judge.probe_server(client, args.judge, bench, args.parameters or bench.parameters)

    # 3) What will they cost?
    text = f"{text} answers; about {calls:,} calls"
    prices = costs.prices_of(args)
    if prices is None:
        return (
            f"{text}; dollars: no price known, give JUDGE_ARGS='--price_in X --price_out Y' "
            "(per million tokens)"
        )
    each = (of_run.prompt_tokens / of_run.calls, of_run.completion_tokens / of_run.calls)
    usd = calls * (each[0] * prices[0] + each[1] * prices[1]) / 1e6
    cap = f", capped at {args.max_usd}" if args.max_usd is not None else ""
    assumed = f"{each[0]:.0f} + {each[1]:.0f} tokens per call"
    return f"{text}; about {usd:.2f} dollars (assumed: {assumed}){cap}"
