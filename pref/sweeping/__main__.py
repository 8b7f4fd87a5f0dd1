"""A grid of training runs, then answers, judgements and analysis, unattended; sweep.sh starts it.

    JUDGE=MODEL bash sweep.sh                     the study (grids/tddpo): 60 runs on
    Llama-2-7b-chat bash sweep.sh quick --yes                     another grid: a name in grids/, or
    a file bash sweep.sh --dry_run                       print every command in order, run nothing
    bash sweep.sh --status                        the grid as a table: done, running, failed,
    waiting, time left bash sweep.sh --list                          the grid points, numbered;
    --index N runs one of them bash sweep.sh --stages gen,judge,analyze      the other stages alone
    LOSSES=dpo BETAS="0.05 0.1" SEEDS=42 JUDGE=hf:models/judge bash sweep.sh

Reads  grids/NAME: one axis or setting a line (`BETAS 0.01 0.05`), `#` comments. An environment
variable of the same
       name stands above the file's.
Writes RESULTS/<run_id>/ as the stages do, RESULTS/logs/<run_id>.log, and RESULTS/sweep.log, a line
for each event.

Axes:      LOSSES BETAS TAUS BETA_MIXES SEEDS LRS LOGP, words separated by spaces; `default` is the
loss's own value. An
           axis that a loss has no parameter for is left out for it. BETAS_dlrml stands above BETAS
           for that loss alone.
Settings:  MODEL DATA MT_BENCH RESULTS JUDGE BASE_URL STAGES; TRAIN_ARGS, GEN_ARGS, JUDGE_ARGS,
ANALYZE_ARGS are further
           arguments of a stage (TRAIN_ARGS_dlrml: for that loss in addition).
Placement: GPUS_PER_RUN (1) GPUs a run, as many runs at once as there are GPUs, or JOBS of them;
without a GPU JOBS (1)
           runs of NPROC (1) ranks. With --nodes a run is a torchrun over so many machines
           (RDZV=host:port, or Slurm's).

The same command continues after anything: Ctrl-C, SIGTERM, SIGUSR1, kill -9, a reboot. Exit codes:
0 all there, 1 something is missing (named at the end), 2 something to correct, 75 or 130 stopped by
a signal, everything saved.
"""

import argparse
import os
import re
import signal
import subprocess

from pref.files import console, disk
from pref.files.console import UserError
from pref.sweeping import commands, grid, preflight, status
from pref.sweeping.grid import Study
from pref.sweeping.scheduler import Scheduler, Stop


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sweep.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "grid",
        nargs="?",
        default=grid.DEFAULT_GRID,
        help=f"a name in grids/, or a file (default: {grid.DEFAULT_GRID})",
    )
    parser.add_argument(
        "--stages", help="train,gen,judge,analyze, or some of them (default: the setting STAGES)"
    )
    parser.add_argument(
        "--index",
        type=int,
        metavar="N",
        help="train grid point N alone; a Slurm array task's default",
    )
    parser.add_argument(
        "--nodes", type=int, default=1, help="machines that one run is spread over, by torchrun"
    )
    parser.add_argument("--yes", action="store_true", help="ask nothing before starting")
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--dry_run", action="store_true", help="print every command in order, and stop"
    )
    group.add_argument(
        "--preflight", action="store_true", help="check what can be checked, and stop"
    )
    group.add_argument(
        "--status",
        action="store_true",
        help="print the grid as a table, and stop; 1: it is not done",
    )
    group.add_argument(
        "--list", action="store_true", help="print the points' numbers and run ids, and stop"
    )
    args = parser.parse_args(argv)
    array = os.environ.get("SLURM_ARRAY_TASK_ID")
    if (
        args.index is None
        and array
        and not (args.stages or args.status or args.list or args.preflight)
    ):
        args.index = int(array)
    if args.nodes < 1:
        raise UserError(f"--nodes {args.nodes}: must be at least 1")
    if args.nodes > 1 and args.index is None and "SLURM_JOB_ID" not in os.environ:
        raise UserError(
            "--nodes: start one point on every machine: RDZV=HOST:PORT bash sweep.sh --index N --nodes ..."
        )
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
    """Back into Slurm's queue after SIGUSR1, which sweep.sh asks for ahead of the time limit, and
    after a preemption: Slurm itself requeues only what it had to kill. Not after scancel.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    said = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    if stop.signal == signal.SIGUSR1 or re.search(r"PreemptTime=\d", said):
        print(f"requeueing job {job}", flush=True)
        subprocess.run(["scontrol", "requeue", job], check=False)


def report(study: Study, scheduler: Scheduler) -> int:
    summaries = {p.run_id: status.summary_of(study.folder(p)) for p in study.points}
    diverged = [
        name for name, summary in summaries.items() if summary and summary["status"] == "diverged"
    ]
    missing = status.missing_of(study, scheduler.reasons)
    ended = sum(summary is not None for summary in summaries.values())
    if study.args.index is not None and not missing:  # an array has a line for each as it is
        return 0
    scheduler.say(
        "end",
        study.results.name,
        f"{ended} of {len(summaries)} runs have ended, {len(diverged)} of them "
        f"diverged, {len(missing)} things are missing",
    )
    for name in diverged:
        print(f"diverged, which is a result: {name}, after {summaries[name]['steps']} steps")
    if missing:
        status.print_missing(study, missing)
    return 1 if missing else 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    study = grid.load_study(args)
    if args.list:
        print("\n".join(f"{point.index}\t{point.run_id}" for point in study.points))
        return 0
    if args.status:
        return status.print_status(study)
    grid.check_judge_is_named(study)
    if args.dry_run:
        commands.print_commands(study)
        return 0
    if args.index is not None:
        return sweep(study)
    preflight.preflight(study)
    if args.preflight:
        return 0
    with disk.locked(study.results, ".sweep.lock", "is being swept"):
        return sweep(study)


if __name__ == "__main__":
    console.run_main(main)
