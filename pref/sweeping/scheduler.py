"""what runs where and when"""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import judge
from pref.files import disk, mt_bench, run_folders
from pref.files.console import UserError
from pref.judging import store
from pref.sweeping import commands, grid, status
from pref.sweeping.grid import Point, Study
from pref.training import signals
from pref.training.signals import Heard

POLL_S = 0.1
# Of a training run (True) and of another stage: at Ctrl-C judge.py keeps what is in flight and
# gen_mtbench.py gathers.
STOPS = {True: signal.SIGTERM, False: signal.SIGINT}
# Judgements that failed because the judge was down: unlike those in a wrong form, worth another
# call.
UNREACHED = "SELECT 1 FROM judgements WHERE status IN ('connection', 'timeout', 'http_429') OR status LIKE 'http_5%' LIMIT 1"
TRIES = 2  # of a run that crashes, in one start of the grid
PR_SET_PDEATHSIG = 1


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
    """Ctrl-C, SIGTERM, SIGUSR1 and a closed terminal: the loop sees `signal` and has the jobs save.
    Ctrl-C again does not wait for them; the others may come more than once by themselves (Slurm's
    do).
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self):
        self.signal, self.times = 0, 0  # times: 1, or 2 for those who do not want to wait

    def note(self, number: int, _frame) -> None:
        self.times = 2 if self.signal and number == signal.SIGINT else max(self.times, 1)
        self.signal = self.signal or number

    @property
    def exit_code(self) -> int:
        return 130 if self.signal == signal.SIGINT else signals.EXIT_STOPPED


LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def in_the_child(parent: int, stops: int) -> None:
    """Between fork and exec: have the kernel send `stops` if the sweep is killed outright, so that
    its jobs save and leave instead of working on unseen; and Ctrl-C as usual, which a job in a
    script's background would ignore.
    """
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, stops)
        if os.getppid() != parent:
            os._exit(signals.EXIT_STOPPED)
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Scheduler:
    """Runs the points that are not done on the free slots, and then the stages. Everything is a
    process of its own.
    """

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

    def start(
        self, name: str, command: list[str], slot: list[str], point: Point | None = None
    ) -> Job:
        log = self.study.log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = commands.TORCHRUN | os.environ
        if slot:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot)
        elif (
            point and int(self.study.settings["JOBS"] or 1) > 1
        ):  # or every run would take all cores
            share = (os.cpu_count() or 1) // (
                int(self.study.settings["JOBS"]) * commands.ranks_of(self.study.settings, [])
            )
            environment.setdefault("OMP_NUM_THREADS", str(max(1, share)))
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"+ {grid.shown(command)}\n")
            file.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=environment,
                start_new_session=True,
                preexec_fn=partial(in_the_child, os.getpid(), STOPS[point is not None]),
            )
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
        waiting = deque(
            (point, 1) for point in study.points if status.summary_of(study.folder(point)) is None
        )
        free, total = commands.slots_of(study), len(waiting)
        if len(study.points) > 1 and total:
            self.say(
                "training",
                study.results.name,
                f"{total} of {len(study.points)} runs, {len(free)} at a time",
            )
        while (
            study.args.index is None
            and any(map(self.is_held, study.points))
            and not self.stop.signal
        ):
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
            if status.summary_of(self.study.folder(point)):  # by the process that held it
                waiting.remove(entry)
                return True
            leads = self.lead()
            if leads is None and not self.cached:
                return False
            waiting.remove(entry)
            slot = free.pop(0)
            try:
                job = self.start(
                    point.run_id, commands.train_command(self.study, point, slot), slot, point
                )
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
        """Whether another process works there: one of a sweep that was killed, which is about to
        save and leave, or another task of an array. Said once.
        """
        holder = disk.running(folder, lock)
        if holder and name not in self.held:
            self.held.add(name)
            self.say("held", name, f"by {holder}; waiting for it")
        return holder is not None

    def lead(self) -> ExitStack | None:
        """The lock of who computes the reference log-probs, if they are not there and nobody else
        is at it.
        """
        self.cached = self.cached or self.study.args.nodes > 1 or is_cached(self.study)
        if self.cached:
            return None
        stack = ExitStack()
        try:
            stack.enter_context(
                disk.locked(
                    self.study.results, ".reference.lock", "the reference is being computed"
                )
            )
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
        summary = status.summary_of(self.study.folder(job.point))
        if code == 0 and summary:
            best = (
                ""
                if summary["best_acc_ref"] is None
                else f", best acc_ref {summary['best_acc_ref']:.4f}"
            )
            self.say(
                summary["status"],
                job.name,
                f"{summary['steps']} steps, {status.hours_text(seconds)}{best}",
            )
            return "done"
        why = f"exit code {code}: {last_words(self.study.log(job.name))}"
        if self.stop.signal:
            self.say("stopped", job.name, f"exit code {code}")
        elif code == 2 and disk.running(self.study.folder(job.point)):
            return "again"  # another process was faster; a run that is held is not started
        elif code not in (2, 130, signals.EXIT_STOPPED) and job.attempt < TRIES:
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
        while (
            stage == "judge"
            and not self.stop.signal
            and self.is_locked(self.study.results, stage, ".judge.lock")
        ):
            time.sleep(POLL_S)
        if self.stop.signal:
            return
        self.say("start", stage)
        try:
            targets = self.fit_for_judging() if stage == "judge" else None
            command = commands.stage_command(self.study, stage, targets)
            if (
                stage == "judge"
                and store.books(self.study.results, UNREACHED)
                and "--retry_failed" not in command
            ):
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
            self.say("finished", stage, status.hours_text(time.time() - begun))

    def fit_for_judging(self) -> list[Path] | None:
        """Run folders whose answers judge.py would take, if it would refuse all because of some;
        these are noted.
        """
        if "--allow_incomplete" in self.study.settings["JUDGE_ARGS"]:
            return None
        runs = {
            run: run / "mt_bench" / "answers.jsonl"
            for run in run_folders.find_runs([self.study.results])
        }
        answers = {run: mt_bench.read_answers(path) for run, path in runs.items() if path.is_file()}
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
    lines = [
        line.strip()
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    start = max((n for n, line in enumerate(lines) if line.startswith("+ ")), default=0)
    lines = lines[start + 1 :]
    errors = [
        line
        for line in lines
        if re.search(r"^(\[rank\d+\]: )?(error|[\w.]+Error)\b|have no verdict", line)
    ]
    return (errors or lines or ["it wrote nothing"])[-1][:300]


def is_cached(study: Study) -> bool:
    """Whether some run here has said which reference it reads, and that is there."""
    cache = Path(study.settings["DATA"]) / "reference"
    for path in study.results.glob("*/args.json"):
        keys = disk.read_json(path).get("reference")
        if keys and all((cache / f"{key}.safetensors").is_file() for key in keys.values()):
            return True
    return False
