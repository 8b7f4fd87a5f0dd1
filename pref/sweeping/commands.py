"""the commands of a point and of a stage"""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from pref import ROOT
from pref.files.console import UserError
from pref.sweeping import grid
from pref.sweeping.grid import Point, Study

# What torchrun passes on to its ranks, and how long it waits for them: by default not SIGUSR1, and
# thirty seconds, less than a large micro-batch and a checkpoint may take.
TORCHRUN = {
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    "PET_SHUTDOWN_TIMEOUT": "300",
}


def gpus() -> list[str]:
    """GPUs that runs may use, as CUDA_VISIBLE_DEVICES names them. Counting makes no context on any
    of them.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(n) for n in range(torch.cuda.device_count())]
    return names[: torch.cuda.device_count()]


def ranks_of(settings: dict[str, str], devices: list[str]) -> int:
    """Ranks of a run on one machine."""
    return int((settings["GPUS_PER_RUN"] if devices else "") or settings["NPROC"] or 1)


def slots_of(study: Study) -> list[list[str]]:
    """Places for a run each: the GPUs that it gets, none on a machine without. Raises UserError for
    too few.
    """
    settings, devices = study.settings, gpus()
    ranks = ranks_of(settings, devices)
    if devices and ranks > len(devices):
        raise UserError(
            f"GPUS_PER_RUN={ranks}: this machine shows {len(devices)} GPUs; lower it, or use --nodes"
        )
    if study.args.nodes > 1:
        return [devices[:ranks]]
    if not devices:
        return [[] for _ in range(int(settings["JOBS"] or 1))]
    slots = [devices[n : n + ranks] for n in range(0, len(devices) - ranks + 1, ranks)]
    return slots[: int(settings["JOBS"] or len(slots))]


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
    return [
        "srun",
        "--overlap",
        "--nodes",
        str(nodes),
        "--ntasks",
        str(nodes),
        "--ntasks-per-node",
        "1",
    ]


def meeting_point() -> str:
    """host:port where the machines of a run find each other: RDZV, or the first machine of the
    Slurm job.
    """
    if given := os.environ.get("RDZV"):
        return given
    if "SLURM_JOB_NODELIST" not in os.environ:
        raise UserError(
            "--nodes: RDZV=HOST:PORT is not set; HOST is one of the machines, the same on all of them"
        )
    command = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    return f"{first}:{20000 + int(os.environ['SLURM_JOB_ID']) % 10000}"


def train_command(study: Study, point: Point, devices: list[str]) -> list[str]:
    start = launcher(study, ranks_of(study.settings, devices), point.run_id)
    return [*start, str(ROOT / "train_pref.py"), *point.arguments]


def stage_command(study: Study, stage: str, targets: list[Path] | None = None) -> list[str]:
    """Command of a stage after training. targets: run folders instead of the whole results
    folder.
    """
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
    script = ROOT / {"gen": "gen_mtbench.py"}.get(stage, f"{stage}.py")
    arguments += [
        "--mt_bench",
        settings["MT_BENCH"],
        *shlex.split(settings[f"{stage.upper()}_ARGS"]),
    ]
    return [*start, str(script), *arguments]


def print_commands(study: Study) -> None:
    devices = slots_of(study)[0]
    for point in study.points if "train" in study.stages else ():
        print(f"+ {grid.shown(train_command(study, point, devices))}")
    for stage in study.stages[study.stages.count("train") :]:
        print(f"+ {grid.shown(stage_command(study, stage))}")


def stage_arguments(study: Study, stage: str) -> list[str]:
    command = stage_command(study, stage)
    return command[next(n for n, word in enumerate(command) if word.endswith(".py")) + 1 :]
