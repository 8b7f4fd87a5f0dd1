"""A grid of training runs, then answers, judgements and analysis, unattended. Run by sweep.sh.

    JUDGE=MODEL bash sweep.sh                   the study (grids/tddpo): 60 runs of Llama-2-7b-chat
    bash sweep.sh quick --yes                   another grid: a name in grids/, or a file
    bash sweep.sh --dry_run                     print every command in order, run nothing
    bash sweep.sh --status                      table of runs, time left, dollars, what is missing
    bash sweep.sh --list                        number and run id of each grid point
    bash sweep.sh --index 7                     train point 7 only
    bash sweep.sh --stages gen,judge,analyze    run only these stages
    LOSSES=dpo BETAS="0.05 0.1" SEEDS=42 JUDGE=hf:models/judge bash sweep.sh

Reads   grids/NAME: one axis or setting per line (`BETAS 0.01 0.05`), comments after `#`. An
        environment variable of the same name overrides the file.
Writes  RESULTS/<run_id>/ as the stages do, RESULTS/logs/ (a log per run and stage), and
        RESULTS/sweep.log (a line per event).

Axes       LOSSES BETAS TAUS BETA_MIXES SEEDS LRS LOGP: values separated by spaces; `default` is
           the loss's own default. A loss without the parameter ignores the axis. BETAS_dlrml
           overrides BETAS for that loss. In LOSSES, FILE.py:NAME is a loss of your own. The line
           `AXIS lora_r 16 64` makes an axis of any other argument of train_pref.py, the
           parameters of your own losses included; its environment variable is AXIS_lora_r.
Tune       TUNE lora full: adapters, all parameters, or both in one grid. Axes of LoRA alone do not
           multiply full runs. LRS_full and TRAIN_ARGS_full are for full runs, LRS_lora and
           TRAIN_ARGS_lora for the others.
Drawn      LRS loguniform 5e-6 5e-5 x 6: six values drawn instead of listed (or uniform), the same
           ones for every loss. They depend on DRAW_SEED (default 42) and the axis' name; a larger
           number adds values. Two drawn axes are combined like listed ones. --list shows them.
Settings   MODEL DATA MT_BENCH RESULTS JUDGE BASE_URL STAGES. TRAIN_ARGS, GEN_ARGS, JUDGE_ARGS and
           ANALYZE_ARGS hold further arguments of a stage; TRAIN_ARGS_dlrml is added for that loss.
Benchmarks BENCHES mt_bench alpaca_eval: what is answered and judged, with the files that
           prep_data.py wrote to MT_BENCH and to BENCH_DATA/alpaca_eval; a folder of your own in
           BENCH_DATA too. GEN_ARGS, JUDGE_ARGS, JUDGE and BASE_URL can be set for one:
           JUDGE_ARGS_alpaca_eval replaces JUDGE_ARGS there.
Task       TASK examples/tasks/sentiment.py: questions that a program scores. It is the benchmark
           unless BENCHES names others, and its own judge. Its questions are written to
           BENCH_DATA/sentiment if they are missing, with TASK_ARGS for prep_data.py --task.
Rounds     ROUNDS 2 (needs TASK, takes the place of DATA): the pairs of round 1 are made of the
           base's answers to the task's train questions; every later round answers, scores, makes
           pairs and trains on from where the last one ended. The run of round 2 of a point is
           <run_id>_round2. REFERENCE start (default; the policy at the start of a round) or base;
           ROUND_GEN_ARGS for gen_mtbench.py (default --num_choices 4 --temperature 1), PAIRS_ARGS
           for prep_data.py --from_answers. All of this belongs to the stage train.
Placement  GPUS_PER_RUN (default 1): GPUs per run. As many runs at a time as there are GPUs for, or
           JOBS of them. Without a GPU: JOBS (default 1) runs of NPROC (default 1) ranks. --nodes N
           spreads a run over N machines (RDZV=host:port, or Slurm's).

The same command continues after Ctrl-C, SIGTERM, SIGUSR1, kill -9 or a reboot. Exit codes: 0 all
done; 1 something is missing and is named at the end; 2 something has to be corrected; 75 or 130
stopped by a signal, with everything saved.
"""

import argparse
import os
import re
import signal
import subprocess

from pref.files import console, disk
from pref.files.console import UserError
from pref.sweeping import commands, grid, preflight, rounds, status, task_folder
from pref.sweeping.grid import Study
from pref.sweeping.scheduler import Scheduler, Stop


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sweep.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    name = f"a name in grids/, or a file (default: {grid.DEFAULT_GRID})"
    add("grid", nargs="?", default=grid.DEFAULT_GRID, help=name)
    add("--stages", help="train,gen,judge,analyze, or some of them (default: STAGES)")
    add("--index", type=int, metavar="N", help="train point N only; a Slurm array sets it")
    add("--nodes", type=int, default=1, help="machines that one run is spread over by torchrun")
    add("--yes", action="store_true", help="start without asking")
    look = parser.add_mutually_exclusive_group()
    add = look.add_argument
    add("--dry_run", action="store_true", help="print every command in order, and exit")
    add("--preflight", action="store_true", help="check everything that can be checked, and exit")
    add("--status", action="store_true", help="print the grid's state, and exit; 1 if not done")
    add("--list", action="store_true", help="print the points' numbers and run ids, and exit")
    return settle(parser.parse_args(argv))


def settle(args: argparse.Namespace) -> argparse.Namespace:
    """Take the grid point from Slurm's array, and check what does not fit together."""
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    trains_one_point = not (args.stages or args.status or args.list or args.preflight)
    if args.index is None and task and trains_one_point:
        args.index = int(task)
    if args.nodes < 1:
        raise UserError(f"--nodes {args.nodes}: must be at least 1")
    if args.nodes > 1 and args.index is None and "SLURM_JOB_ID" not in os.environ:
        raise UserError(
            "--nodes: without Slurm, start one point at a time on every machine: "
            "RDZV=HOST:PORT bash sweep.sh --index N --nodes ..."
        )
    return args


def sweep(study: Study) -> int:
    """Run every stage, then report what is missing. Returns the exit code."""
    study.results.mkdir(parents=True, exist_ok=True)
    with Stop() as stop:
        scheduler = Scheduler(study, stop)
        if "train" in study.stages:
            if study.rounds:
                rounds.train(scheduler)
            else:
                scheduler.train()
        for stage, bench in commands.later_stages(study):
            if not stop.signal:
                scheduler.run_stage(stage, bench)
        if stop.signal:
            print(f"stopped; continue with:\n  {study.resume_command()}", flush=True)
            requeue(stop)
            return stop.exit_code
        return report(study, scheduler)


def requeue(stop: Stop) -> None:
    """Put a Slurm job back into the queue after SIGUSR1, which sweep.sh requests ahead of the time
    limit, and after a preemption; not after scancel. Slurm itself requeues only jobs that it had
    to kill.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    show = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True)
    if stop.signal == signal.SIGUSR1 or re.search(r"PreemptTime=\d", show.stdout):
        print(f"requeueing job {job}", flush=True)
        subprocess.run(["scontrol", "requeue", job], check=False)


def report(study: Study, scheduler: Scheduler) -> int:
    """Print how the grid ended. Returns 1 if something is missing, else 0."""
    summaries = {p.run_id: status.summary_of(study.folder(p)) for p in study.points}
    ended = {name: summary for name, summary in summaries.items() if summary is not None}
    diverged = [name for name, summary in ended.items() if summary["status"] == "diverged"]
    missing = status.missing_of(study, scheduler.reasons)
    if study.args.index is not None and not missing:
        return 0  # an array task has logged its one run already
    counts = (
        f"{len(ended)} of {len(summaries)} runs have ended, {len(diverged)} of them diverged; "
        f"missing: {len(missing)}"
    )
    scheduler.log("end", study.results.name, counts)
    for name in diverged:
        print(f"diverged, which is a result: {name}, after {summaries[name]['steps']} steps")
    for name, why in status.dropped_runs(study).items():
        print(f"dropped from its round, which is a result: {name}: {why}")
    if missing:
        status.print_missing(study, missing)
    return 1 if missing else 0


def list_points(study: Study) -> None:
    """Print the values of drawn axes, then the number and run id of each run."""
    for name, values in grid.drawn_axes(study.settings).items():
        print(f"# {name} drawn: {' '.join(values)}")
    for point in study.points:
        print(f"{point.index}\t{point.run_id}")


def print_commands(study: Study) -> None:
    """Every command of the study, in order."""
    todo, devices = [], commands.slots_of(study)[0]
    if task_folder.is_missing(study):
        todo.append(task_folder.prepare_command(study))
    if "train" in study.stages:
        for number in range(1, max(point.round for point in study.points) + 1):
            points = [point for point in study.points if point.round == number]
            todo += rounds.commands_of_round(study, number) if study.rounds else []
            todo += [commands.train_command(study, point, devices) for point in points]
    todo += [commands.stage_command(study, *stage) for stage in commands.later_stages(study)]
    for command in todo:
        print(f"+ {grid.display(command)}")


def main(argv: list[str] | None = None) -> int:
    # 1) The grid and its points. Any mistake in them is found here.
    args = parse_args(argv)
    study = grid.load_study(args)

    # 2) Options that only look.
    if args.list:
        list_points(study)
        return 0
    if args.status:
        return status.print_status(study)
    grid.check_judge_is_named(study)
    if args.dry_run:
        print_commands(study)
        return 0

    # 3) The task's questions, which the checks and all stages need.
    task_folder.prepare(study)

    # 4) One point: a task of an array, next to others. It takes no lock on the whole grid, and
    #    the checks were made once, by --preflight.
    if args.index is not None:
        return sweep(study)

    # 5) The grid: checks first, then one scheduler at a time per results folder.
    preflight.preflight(study)
    if args.preflight:
        return 0
    with disk.locked(study.results, ".sweep.lock", "is being swept"):
        return sweep(study)


if __name__ == "__main__":
    console.run_main(main)
