"""The command lines of a grid: of each run, and of each stage after training."""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from pref import ROOT
from pref.files.console import UserError
from pref.judging import judges
from pref.sweeping.grid import Point, Study

SCRIPTS = {
    "prep": "prep_data.py",
    "train": "train_pref.py",
    "gen": "gen_mtbench.py",
    "judge": "judge.py",
    "analyze": "analyze.py",
}
# torchrun does not forward SIGUSR1 by default, and it kills its ranks 30 seconds after a signal,
# less than a large micro-batch and a checkpoint may take.
TORCHRUN_ENVIRONMENT = {
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    "PET_SHUTDOWN_TIMEOUT": "300",
}


# ---- where runs can be placed -------------------------------------------------------------------


def gpus() -> list[str]:
    """The GPUs that runs may use, named as in CUDA_VISIBLE_DEVICES. Counting them creates no CUDA
    context.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(n) for n in range(torch.cuda.device_count())]
    return names[: torch.cuda.device_count()]


def ranks_of(settings: dict[str, str], devices: list[str]) -> int:
    """The number of ranks of a run on one machine."""
    return int((settings["GPUS_PER_RUN"] if devices else "") or settings["NPROC"] or 1)


def slots_of(study: Study) -> list[list[str]]:
    """Places for one run each: a list of GPUs, empty on a machine without any. With GPUs 4 to 9
    and GPUS_PER_RUN=2 the slots are [4, 5], [6, 7], [8, 9].

    Raises UserError if there are fewer GPUs than one run needs.
    """
    settings, devices = study.settings, gpus()
    ranks = ranks_of(settings, devices)
    if devices and ranks > len(devices):
        raise UserError(
            f"GPUS_PER_RUN={ranks}: this machine has {len(devices)} GPUs; lower it, or spread a "
            "run over several machines (--nodes)"
        )
    if study.args.nodes > 1:
        return [devices[:ranks]]
    if not devices:
        return [[] for _ in range(int(settings["JOBS"] or 1))]
    slots = [devices[n : n + ranks] for n in range(0, len(devices) - ranks + 1, ranks)]
    return slots[: int(settings["JOBS"] or len(slots))]


# ---- commands -----------------------------------------------------------------------------------


def launcher(study: Study, ranks: int, name: str) -> list[str]:
    """What precedes the script in a command: python or torchrun. name: identifies the rendezvous
    of several machines.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    nodes = study.args.nodes
    if nodes == 1:
        return [*torchrun, "--standalone"] if ranks > 1 else [sys.executable]
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_id", name, "--rdzv_endpoint", rdzv_endpoint()]
    return [*srun(nodes), *torchrun, "--nnodes", str(nodes), *rendezvous]


def srun(nodes: int) -> list[str]:
    """Within a Slurm job: starts one torchrun on each of its machines, alongside this job step."""
    if "SLURM_JOB_ID" not in os.environ:
        return []
    return f"srun --overlap --nodes {nodes} --ntasks {nodes} --ntasks-per-node 1".split()


def rdzv_endpoint() -> str:
    """host:port where the machines of a run meet: RDZV, or the first machine of the Slurm job."""
    if given := os.environ.get("RDZV"):
        return given
    if "SLURM_JOB_NODELIST" not in os.environ:
        raise UserError(
            "--nodes: RDZV is not set; set RDZV=HOST:PORT, HOST being one of the machines, to the "
            "same value on all of them"
        )
    command = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    hosts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return f"{hosts[0]}:{20000 + int(os.environ['SLURM_JOB_ID']) % 10000}"


def train_command(study: Study, point: Point, devices: list[str]) -> list[str]:
    start = launcher(study, ranks_of(study.settings, devices), point.run_id)
    return [*start, str(ROOT / SCRIPTS["train"]), *point.arguments]


def stage_command(
    study: Study, stage: str, bench: str | None = None, runs: list[Path] | None = None
) -> list[str]:
    """The command of a stage after training. bench: whose questions are answered or judged. runs:
    run folders, instead of all results.
    """
    return stage_process(study, stage, stage_arguments(study, stage, bench, runs))


def stage_process(study: Study, stage: str, given: list[str]) -> list[str]:
    """What starts a stage with the arguments `given`: answers are made on all GPUs, or on a CPU by
    JOBS processes, which share its cores better than one process does.
    """
    start, ranks = [sys.executable], len(gpus()) or int(study.settings["JOBS"] or 1)
    by_server = any(argument.partition("=")[0] == "--base_url" for argument in given)
    if stage == "gen" and not by_server and ranks > 1:
        one_machine = study._replace(args=argparse.Namespace(nodes=1))
        start = launcher(one_machine, ranks, "gen")
    return [*start, str(ROOT / SCRIPTS[stage]), *given]


def stage_arguments(
    study: Study, stage: str, bench: str | None = None, runs: list[Path] | None = None
) -> list[str]:
    """The arguments of a stage after training, as `stage_command` has them."""
    settings = study.settings
    arguments = [str(path) for path in runs or [study.results]]
    if stage == "gen":
        arguments += ["--base", "--model", settings["MODEL"]]
    if stage == "judge":
        arguments += judge_of(study, bench)
    if bench in (None, "mt_bench"):
        arguments += ["--mt_bench", settings["MT_BENCH"]]
    else:
        arguments += ["--bench", bench, "--bench_data", str(bench_folder(study, bench))]
    if stage == "analyze" and study.benches != ["mt_bench"]:
        arguments += ["--data", settings["BENCH_DATA"]]
        arguments += ["--alpaca_eval", str(bench_folder(study, "alpaca_eval"))]
    return [*arguments, *shlex.split(study.of_bench(f"{stage.upper()}_ARGS", bench))]


def judge_of(study: Study, bench: str | None) -> list[str]:
    """The arguments that name the judge of a benchmark."""
    named, address = study.of_bench("JUDGE", bench), study.of_bench("BASE_URL", bench)
    return ["--judge", named, *(["--base_url", address] if address else [])]


def judge_name(study: Study, bench: str) -> str:
    """The judge of a benchmark as judgements name it."""
    return judges.recorded_name(study.of_bench("JUDGE", bench))


def bench_folder(study: Study, bench: str) -> Path:
    """The folder of a benchmark's questions."""
    if bench == "mt_bench":
        return Path(study.settings["MT_BENCH"])
    return Path(study.settings["BENCH_DATA"]) / bench


def later_stages(study: Study) -> list[tuple[str, str | None]]:
    """The stages after training, answers and judgements once for each benchmark."""
    stages = [stage for stage in study.stages if stage != "train"]
    benches = {"gen": study.benches, "judge": study.benches, "analyze": [None]}
    return [(stage, bench) for stage in stages for bench in benches[stage]]


def stage_name(stage: str, bench: str | None) -> str:
    """What a stage is called in logs and messages: gen, or gen_alpaca_eval."""
    return stage if bench in (None, "mt_bench") else f"{stage}_{bench}"
