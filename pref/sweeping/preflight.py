"""what can be known before an hour is spent"""

import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import gen_mtbench
import judge
from pref import ROOT
from pref.files import mt_bench, run_folders
from pref.files.console import UserError
from pref.judging import costs, protocol, server_judge
from pref.model import server
from pref.sweeping import commands, status
from pref.sweeping.grid import Point, Study
from pref.training.plan import shapes_of

# Rules of thumb until something of the grid has been measured.
GPU_TFLOPS, CORE_TFLOPS = (
    60.0,
    0.08,
)  # what training computes a second; the second: bench/README.md, 0.17 on two cores
CALL_TOKENS = (800, 250)  # of a judgement of MT-Bench: prompt and completion
CHECKPOINTS = (
    3 * 3 + 2
)  # adapters' sizes that a running run holds: two states and the one being written, two best


class Plan(NamedTuple):
    """Of a run, as train_pref.py --dry_run says."""

    steps: int
    tokens: int
    gib: float  # a rank
    adapter_gib: float


def preflight(study: Study) -> None:
    """Print what the grid will take. Raises UserError with every problem found, each with its
    remedy.
    """
    todo = [
        p
        for p in study.points
        if "train" in study.stages and status.summary_of(study.folder(p)) is None
    ]
    print(
        f"grid {study.args.grid}: {len(study.points)} runs, {len(todo)} to train; stages {', '.join(study.stages)}; "
        f"results in {study.results}",
        flush=True,
    )
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
    if (
        not study.args.yes
        and sys.stdin.isatty()
        and input("go on? [y/N] ").strip().lower() not in ("y", "yes")
    ):
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
            raise UserError(
                f"DATA={data}: no {path.name} there; make it with prep_data.py --dataset ..."
            )
    if set(study.stages) & {"gen", "judge"}:
        mt_bench.read_questions(questions)
        gen_mtbench.check_args(gen_mtbench.parse_args(commands.stage_arguments(study, "gen")))
    check_model("MODEL", settings["MODEL"])
    study.results.mkdir(parents=True, exist_ok=True)
    if not os.access(study.results, os.W_OK):
        raise UserError(f"RESULTS={study.results}: cannot be written; give another folder")


def check_model(name: str, model: str) -> None:
    """Raise UserError for a path, rather than a hub id, without a model."""
    if not (Path(model) / "config.json").is_file() and (
        Path(model).is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model)
    ):
        raise UserError(
            f"{name}={model}: no model there (config.json); correct the folder, or give a hub id"
        )


def plan_of(study: Study, point: Point) -> Plan:
    """By train_pref.py in a process of its own: this one shall hold no GPU. It reads model and
    tokenizer, so that a hub that refuses is found here.
    """
    devices = commands.slots_of(study)[0]
    ranks = commands.ranks_of(study.settings, devices) * study.args.nodes
    command = [
        sys.executable,
        str(ROOT / "train_pref.py"),
        *point.arguments,
        "--dry_run",
        str(ranks),
    ]
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | visible)
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(
            f"train_pref.py --dry_run of {point.run_id}: {words.removeprefix('error: ')}"
        )

    def number(pattern: str) -> float:
        return float(re.search(pattern, done.stdout, re.M)[1].replace(",", ""))

    steps, tokens = int(number(r"^steps: (\d+)")), int(number(r"^tokens: ([\d,]+)"))
    return Plan(
        steps, tokens, number(r"^ +total +([\d.]+)"), number(r"^ +optimiser +([\d.]+)") * ranks / 3
    )


def check_memory(study: Study, plan: Plan, todo: list[Point]) -> str:
    slots, least = commands.slots_of(study), None
    remedy = "lower --per_device_batch or --max_length (TRAIN_ARGS)"
    if slots[0]:
        free = {device: memory_of_gpu(device) for slot in slots for device in slot}
        known = {device: gib for device, gib in free.items() if gib is not None}
        if known:
            least = min(known, key=known.get)
            if known[least] < plan.gib:
                raise UserError(
                    f"GPU {least} has {known[least]:.1f} GiB free, a run needs {plan.gib:.1f}; stop what "
                    f"runs there, leave the GPU out (CUDA_VISIBLE_DEVICES), or {remedy}"
                )
        there = (
            f"the fullest GPU has {known[least]:.1f} free"
            if known
            else "nvidia-smi does not say what is free"
        )
        return f"memory: {plan.gib:.1f} GiB a GPU, {there}; {len(slots)} runs at a time, {len(slots[0])} GPUs each"
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    need = plan.gib * commands.ranks_of(study.settings, []) * len(slots)
    if need > ram:
        raise UserError(
            f"JOBS={len(slots)} runs need {need:.1f} GiB, there are {ram:.1f}; lower JOBS, or {remedy}"
        )
    return f"memory: {len(slots)} runs at a time on the CPU, {need:.1f} of {ram:.1f} GiB"


def memory_of_gpu(device: str) -> float | None:
    """GiB that are free, or None if nvidia-smi does not know."""
    command = [
        "nvidia-smi",
        f"--id={device}",
        "--query-gpu=memory.free",
        "--format=csv,noheader,nounits",
    ]
    try:
        said = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return None
    return int(said) / 1024 if said.isdigit() else None


def check_disk(study: Study, plan: Plan, todo: list[Point]) -> str:
    need = plan.adapter_gib * (
        len(todo) + CHECKPOINTS * len(commands.slots_of(study))
    ) + 0.01 * len(todo)
    free = shutil.disk_usage(study.results).free / 2**30
    words = f"disk: {need:.1f} GiB for adapters and checkpoints, {free:.1f} free in {study.results}"
    if need > free:
        raise UserError(
            f"{words}; make room, give another RESULTS, or a smaller --lora_r (TRAIN_ARGS)"
        )
    return words


def tell_hours(study: Study, plan: Plan, todo: list[Point]) -> str:
    slots = commands.slots_of(study)
    states = [status.state_of(study, point, set()) for point in study.points]
    seconds, how = status.seconds_of_run(states), "measured in this grid"
    if seconds is None:
        weights = sum(p.numel() for p in shapes_of(study.settings["MODEL"]).parameters())
        share = (os.cpu_count() or 1) / len(slots)
        speed = GPU_TFLOPS * len(slots[0]) * study.args.nodes if slots[0] else CORE_TFLOPS * share
        seconds = 4 * weights * plan.tokens / (speed * 1e12)
        how = f"assumed: {plan.tokens:,} tokens a run at 4 x {weights / 1e9:.3g}B operations, {speed:g} TFLOP/s"
    left = status.time_left(
        [status.state_of(study, point, set()) for point in todo], len(slots), seconds
    )
    return f"hours: {status.hours_text(seconds)} a run ({how}), {status.hours_text(left)} for {len(todo)} runs; start-up not counted"


def check_judge(study: Study) -> str:
    """Raises UserError if the judge cannot be asked. One small question, unless all is judged
    already.
    """
    settings = study.settings
    given = judge.parse_args(commands.stage_arguments(study, "judge"))
    bench = protocol.read_bench(given.mt_bench, given.grading, given.refs)
    if given.judge.startswith("hf:"):
        check_model("JUDGE", given.judge.removeprefix("hf:"))
        return f"judge: {given.judge}, here, no dollars"
    count = len(
        mt_bench.pick_questions(
            bench["questions"],
            gen_mtbench.parse_args(commands.stage_arguments(study, "gen")).num_questions,
        )
    )
    whole = count * 2 * given.repeats * (2 if given.grading == "pair" else 1)
    verdicts, names = (
        status.verdicts_of(study),
        [run_folders.BASE_RUN, *(point.run_id for point in study.points)],
    )
    calls = sum(verdicts[name][1] if name in verdicts else whole for name in names)
    if not calls:
        return "judge: everything is judged"
    client = server.open_client(f"JUDGE={settings['JUDGE']}", given.base_url, 60.0, 2)
    server_judge.probe_server(
        client, given.judge, given.parameters or {"temperature": 0, "max_tokens": given.max_tokens}
    )
    words = f"judge: {given.judge} answers; about {calls:,} calls"
    prices = costs.prices_of(given)
    if prices is None:
        return f"{words}; dollars: no price known, give JUDGE_ARGS='--price_in X --price_out Y' (per million tokens)"
    usd = calls * sum(tokens * price for tokens, price in zip(CALL_TOKENS, prices)) / 1e6
    cap = f", capped at {given.max_usd}" if given.max_usd is not None else ""
    prompt, completion = CALL_TOKENS
    return f"{words}; about {usd:.2f} dollars (assumed: {prompt} + {completion} tokens a call){cap}"
