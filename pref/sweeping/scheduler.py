"""The scheduler: which run starts where and when, and what happens when it ends.

Every run and every later stage is a process of its own, with a log file of its own. The scheduler
starts them, waits for them, and passes on the signals that it receives:

    waiting runs --launch_next--> jobs on slots --handle_exit--> done, failed, or waiting again

The state lives in the run folders. A scheduler that is killed and started again reads it from
there.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pref.files import console, disk, mt_bench, run_folders
from pref.files.console import UserError
from pref.judging import judges, run_answers, store
from pref.judging.benchmarks import BENCHMARKS
from pref.sweeping import commands, grid, status
from pref.sweeping.grid import Point, Study
from pref.training import reference, signals
from pref.training.signals import SignalHandler

POLL_S = 0.1
MAX_ATTEMPTS = 2  # of a run that crashes, within one start of the grid


# ---- processes ----------------------------------------------------------------------------------


class Waiting(NamedTuple):
    """A run that is still to be started."""

    point: Point
    attempt: int = 1


@dataclass
class Job:
    """A process that the scheduler started."""

    name: str  # the run's id, or the stage's
    point: Point | None  # None: a stage after training
    slot: list[str]  # GPUs
    process: subprocess.Popen
    started: float  # time.time()
    attempt: int = 1
    reference_lock: ExitStack | None = None  # while it computes the reference for all

    @property
    def stop_signal(self) -> signal.Signals:
        return stop_signal_of(self.point)


def stop_signal_of(point: Point | None) -> signal.Signals:
    """The signal that makes a job save and exit. At Ctrl-C judge.py keeps the replies in flight
    and gen_mtbench.py gathers its answers.
    """
    return signal.SIGINT if point is None else signal.SIGTERM


class Stop(SignalHandler):
    """Notes SIGINT, SIGTERM, SIGUSR1 and SIGHUP. The scheduler polls `signal` and has its jobs
    save.

    A second Ctrl-C means: do not wait for them. The other signals may arrive more than once
    without anyone's impatience (Slurm repeats its own), so they never mean that.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self):
        self.signal = 0  # the first one
        self.level = 0  # 1: save and stop; 2: kill

    def note(self, number: int, _frame) -> None:
        impatient = self.signal and number == signal.SIGINT
        self.level = 2 if impatient else max(self.level, 1)
        self.signal = self.signal or number

    @property
    def exit_code(self) -> int:
        return 130 if self.signal == signal.SIGINT else signals.EXIT_STOPPED


# Linux alone can signal a process when its parent dies. Elsewhere the jobs of a scheduler that is
# killed outright continue, and the next start waits for them by their locks.
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1


def prepare_child(parent: int, stop_signal: int) -> None:
    """Runs in the child between fork and exec. If the scheduler is killed outright, the kernel
    sends the child `stop_signal`, so that it saves and exits instead of working on unseen.
    """
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, stop_signal)
        if os.getppid() != parent:  # the scheduler died before prctl took effect
            os._exit(signals.EXIT_STOPPED)
    # A background job of a script inherits an ignored SIGINT; the scheduler needs it to work.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# ---- the scheduler ------------------------------------------------------------------------------


class Scheduler:
    """Runs the points that are not done on the free slots, then the later stages."""

    def __init__(self, study: Study, stop: Stop):
        self.study, self.stop = study, stop
        self.jobs: list[Job] = []
        self.forwarded = 0  # the stop level that the jobs have been told
        self.reasons: dict[str, str] = {}  # why something failed, by run id or stage
        self.dropped: dict[str, str] = {}  # why a run takes no part in its round, by run id
        self.reported_held: set[str] = set()  # runs whose other process was mentioned
        self.reference_cached = False  # the reference's log-probs are on disk

    def log(self, event: str, name: str, details: str = "") -> None:
        """Print a line and append it to sweep.log. A full disk must not end the grid."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {event:<8} {name}  {details}".rstrip()
        print(line, flush=True)
        try:
            with open(self.study.results / "sweep.log", "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            print(f"warning: {self.study.results / 'sweep.log'}: {error}", file=sys.stderr)

    def start(
        self, name: str, command: list[str], slot: list[str], point: Point | None = None
    ) -> Job:
        """Start a process that writes to its own log. Raises OSError if the log cannot be
        written.
        """
        log = self.study.log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"+ {grid.display(command)}\n")
            file.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=self.environment_of(
                    slot, is_one_of_jobs=point is not None or "--nproc_per_node" in command
                ),
                start_new_session=True,  # Ctrl-C reaches the scheduler alone, which forwards it
                preexec_fn=partial(prepare_child, os.getpid(), stop_signal_of(point)),
            )
        job = Job(name, point, slot, process, started=time.time())
        self.jobs.append(job)
        return job

    def environment_of(self, slot: list[str], is_one_of_jobs: bool) -> dict[str, str]:
        environment = commands.TORCHRUN_ENVIRONMENT | os.environ
        settings = self.study.settings
        jobs = int(settings["JOBS"] or 1)
        if slot:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot)
        elif is_one_of_jobs and jobs > 1:  # otherwise each process would use all cores
            threads = console.usable_cores() // (jobs * commands.ranks_of(settings, []))
            environment.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
        return environment

    def forward_signals(self) -> None:
        """Tell the jobs to save and stop at the first signal; kill them at the second Ctrl-C."""
        if not self.jobs or self.forwarded >= self.stop.level:
            return
        self.forwarded = self.stop.level
        kill = self.forwarded == 2
        details = "killed" if kill else "saving and stopping; Ctrl-C again kills them"
        self.log("stopping", ", ".join(job.name for job in self.jobs), details)
        for job in self.jobs:
            with suppress(ProcessLookupError):
                if kill:
                    os.killpg(job.process.pid, signal.SIGKILL)
                else:
                    job.process.send_signal(job.stop_signal)

    def wait_for(self, job: Job) -> int:
        """Wait for a job, forwarding signals. Returns its exit code."""
        while job.process.poll() is None:
            self.forward_signals()
            time.sleep(POLL_S)
        self.jobs.remove(job)
        return job.process.returncode

    # ---- training

    def train(self, points: list[Point] | None = None) -> None:
        """Train those of `points` (None: all of the study's) that have no summary yet, as many at a
        time as there are slots.
        """
        study = self.study
        points = study.points if points is None else points
        todo = [p for p in points if status.summary_of(study.folder(p)) is None]
        waiting, free = deque(map(Waiting, todo)), commands.slots_of(study)
        if len(points) > 1 and todo:
            count = f"{len(todo)} of {len(points)} runs, {len(free)} at a time"
            self.log("training", study.results.name, count)

        # 1) Runs of an earlier scheduler that was killed may still be saving, on the GPUs that
        #    would be given out here. An array task (--index) has a GPU of its own.
        while study.args.index is None and any(map(self.is_held, points)):
            if self.stop.signal:
                break
            time.sleep(POLL_S)

        while self.jobs or (waiting and not self.stop.signal):
            self.forward_signals()

            # 2) Collect the jobs that have exited; a crashed run goes back to the front.
            for job in [job for job in self.jobs if job.process.poll() is not None]:
                self.jobs.remove(job)
                free.append(job.slot)
                if job.reference_lock:
                    job.reference_lock.close()
                if self.handle_exit(job):
                    waiting.appendleft(Waiting(job.point, job.attempt + 1))

            # 3) The first run computes the reference; once that is on disk, all may start.
            self.note_cached_reference()

            # 4) Fill the free slots.
            while free and waiting and not self.stop.signal and self.launch_next(waiting, free):
                pass
            time.sleep(POLL_S)

    def launch_next(self, waiting: deque[Waiting], free: list[list[str]]) -> bool:
        """Start the first waiting run that may start now. Returns False if there is none."""
        for entry in list(waiting):
            if self.is_held(entry.point):
                continue
            if status.summary_of(self.study.folder(entry.point)):
                waiting.remove(entry)  # the process that held it has finished it
                return True
            # In later rounds every run has pairs, and so reference log-probs, of its own.
            shares_reference = entry.point.round == 1
            reference_lock = self.lock_reference() if shares_reference else None
            if shares_reference and reference_lock is None and not self.reference_cached:
                return False  # another process computes the reference: all wait for it
            waiting.remove(entry)
            self.launch(entry, free, reference_lock)
            return True
        return False

    def launch(
        self, entry: Waiting, free: list[list[str]], reference_lock: ExitStack | None
    ) -> None:
        run_id, slot = entry.point.run_id, free.pop(0)
        command = commands.train_command(self.study, entry.point, slot)
        try:
            job = self.start(run_id, command, slot, entry.point)
        except OSError as error:  # a full disk; there may be room again for another run
            free.append(slot)
            if reference_lock:
                reference_lock.close()
            self.fail(run_id, str(error))
            return
        job.attempt, job.reference_lock = entry.attempt, reference_lock
        details = [f"on GPU {','.join(slot)}"] if slot else []
        if entry.attempt > 1:
            details.append(f"attempt {entry.attempt}")
        if reference_lock:
            details.append("computes the reference log-probs, the other runs wait for them")
        self.log("start", run_id, "; ".join(details))

    def is_held(self, point: Point) -> bool:
        """Whether another process trains the run. With --nodes the other machines do, as they
        should.
        """
        return self.study.args.nodes == 1 and self.is_locked(self.study.folder(point), point.run_id)

    def is_locked(self, folder: Path, name: str, lock: str = ".lock") -> bool:
        """Whether another process holds the lock of `folder`: a run whose scheduler was killed and
        that is still saving, or another task of an array. Logged once per name.
        """
        holder = disk.lock_holder(folder, lock)
        if holder and name not in self.reported_held:
            self.reported_held.add(name)
            self.log("held", name, f"by {holder}; waiting for it")
        return holder is not None

    # The reference log-probs are the same for all runs of a grid. One run computes them, holding
    # results/.reference.lock; schedulers on other machines see the lock and wait as well.

    def lock_reference(self) -> ExitStack | None:
        """The lock under which a run computes the reference. None if the log-probs are on disk
        already (see `reference_cached`), or if another process holds the lock.
        """
        if not self.reference_cached:
            self.reference_cached = self.study.args.nodes > 1 or is_reference_cached(self.study)
        if self.reference_cached:
            return None
        stack, activity = ExitStack(), "the reference is being computed"
        try:
            stack.enter_context(disk.locked(self.study.results, ".reference.lock", activity))
        except UserError:
            return None
        return stack

    def note_cached_reference(self) -> None:
        """Release the lock once the reference is there: a run then writes its args.json."""
        for job in self.jobs:
            record = self.study.folder(job.point) / "args.json"
            if job.reference_lock and record.is_file() and record.stat().st_mtime >= job.started:
                self.reference_cached = True
                job.reference_lock.close()
                job.reference_lock = None

    def handle_exit(self, job: Job) -> bool:
        """Log how a run ended. Returns True if it is to be started again."""
        code, seconds = job.process.returncode, time.time() - job.started
        folder, why = self.study.folder(job.point), f"exit code {job.process.returncode}"
        summary = status.summary_of(folder)
        if code == 0 and summary:
            details = f"{summary['steps']} steps, {status.hours_text(seconds)}"
            if summary["best_acc_ref"] is not None:
                details += f", best acc_ref {summary['best_acc_ref']:.4f}"
            self.log(summary["status"], job.name, details)
            return False
        if self.stop.signal:
            self.log("stopped", job.name, why)
            return False
        if code == 2 and disk.lock_holder(folder):
            return True  # another process took its lock first; is_held then waits for that one
        why = f"{why}: {last_error(self.study.log(job.name))}"
        is_crash = code not in (2, 130, signals.EXIT_STOPPED)  # not a user's mistake or a signal
        if is_crash and job.attempt < MAX_ATTEMPTS:
            self.log("crashed", job.name, f"{why}; once more, from its last checkpoint")
            return True
        self.fail(job.name, why)
        return False

    def fail(self, name: str, why: str) -> None:
        self.reasons[name] = why
        self.log("failed", name, why)

    def drop(self, name: str, why: str) -> None:
        """A run that cannot be, because of what an earlier round has come to."""
        self.dropped[name] = why
        self.log(status.DROPPED, name, why)

    # ---- the later stages

    def run_stage(self, stage: str, bench: str | None) -> None:
        """Answers or judgements of a benchmark, or the analysis."""
        name = commands.stage_name(stage, bench)
        if stage == "judge":
            self.wait_for_judge(name)
        if not self.stop.signal:
            with self.noting(name):
                self.run_command(name, self.command_of(stage, bench))

    def wait_for_judge(self, name: str) -> None:
        """A judge of an earlier start may still be saving its replies."""
        while not self.stop.signal and self.is_locked(self.study.results, name, ".judge.lock"):
            time.sleep(POLL_S)

    @contextmanager
    def noting(self, name: str) -> Iterator[None]:
        """An error within is the reason why the stage `name` failed."""
        try:
            yield
        except (UserError, OSError) as error:
            self.fail(name, str(error))

    def run_command(self, name: str, command: list[str], shown: bool = True) -> int | None:
        """Run a command whose log is `name`, and log how it ended. Returns its exit code; None
        after a signal. shown: print what it printed, when it has ended.
        """
        # 1) Run it. The log may hold the output of earlier starts.
        self.log("start", name)
        log, started = self.study.log(name), time.time()
        earlier_bytes = log.stat().st_size if log.exists() else 0
        code = self.wait_for(self.start(name, command, []))

        # 2) Show what it printed, without the command line and without progress bars.
        if shown:
            with open(log, "rb") as file:
                file.seek(earlier_bytes)
                text = file.read().decode("utf-8", "replace")
            lines = [line for line in text.split("\n")[1:] if "\r" not in line]
            print("\n".join(lines).rstrip(), flush=True)

        if self.stop.signal:
            self.log("stopped", name, f"exit code {code}")
            return None
        if code:
            self.fail(name, f"exit code {code}: {last_error(log)}")
        else:
            self.log("finished", name, status.hours_text(time.time() - started))
        return code

    def command_of(self, stage: str, bench: str | None) -> list[str]:
        if stage != "judge":
            return commands.stage_command(self.study, stage, bench)
        runs = None
        if "--allow_incomplete" not in self.study.of_bench("JUDGE_ARGS", bench):
            runs = self.judgeable_runs(bench)
        return self.retrying(commands.stage_command(self.study, stage, bench, runs))

    def retrying(self, judge_command: list[str]) -> list[str]:
        """Ask again what never reached the judge."""
        if store.has_unreached(self.study.results) and "--retry_failed" not in judge_command:
            return [*judge_command, "--retry_failed"]
        return judge_command

    def judgeable_runs(self, bench: str) -> list[Path] | None:
        """The runs whose answers judge.py accepts, if there are others that would make it refuse
        all; None if there are none. The reasons are noted.
        """
        runs = run_folders.find_runs([self.study.results])
        answered = [run for run in runs if (run / bench / "answers.jsonl").is_file()]
        accepted = self.accepted_runs(answered, bench)
        return None if accepted == answered else accepted

    def accepted_runs(self, runs: list[Path], bench: str) -> list[Path]:
        """Those of `runs` whose answers to `bench` judge.py accepts. The reasons against the others
        are noted.
        """
        answers = {run: mt_bench.read_answers(run / bench / "answers.jsonl", None) for run in runs}
        all_keys = set().union(*answers.values())
        turns = BENCHMARKS[bench].turns if bench in BENCHMARKS else 1  # of a task
        # A task's function has a score for an empty answer too.
        judge = self.study.of_bench("JUDGE", bench)
        empty_counts = judges.kind_of(judge) != judges.PROGRAM
        accepted = []
        for run, of_run in answers.items():
            try:
                run_answers.check_adapter(run, of_run, bench)
                run_answers.check_complete({run: of_run}, bench, turns, empty_counts)
            except UserError as error:
                self.reasons[run.resolve().name] = str(error)
                continue
            if not all_keys - of_run.keys():
                accepted.append(run)
        return accepted


def last_error(log: Path) -> str:
    """The last error that the newest process in a log reported, or its last line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    start = max((n for n, line in enumerate(lines) if line.startswith("+ ")), default=0)
    lines = lines[start + 1 :]  # each process begins with its command, "+ python ..."
    pattern = r"^(\[rank\d+\]: )?(error|[\w.]+Error)\b|have no verdict"
    errors = [line for line in lines if re.search(pattern, line)]
    return (errors or lines or ["it printed nothing"])[-1][:300]


def is_reference_cached(study: Study) -> bool:
    """Whether a run of this study has recorded its reference, and the files are there."""
    data = Path(study.settings["DATA"])
    for path in study.results.glob("*/args.json"):
        record = disk.read_json(path)
        if record.get("reference") and record.get("model_sha256"):
            if all(file.is_file() for file in reference.cache_files(data, record).values()):
                return True
    return False
