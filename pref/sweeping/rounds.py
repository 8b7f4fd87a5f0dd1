"""Rounds: the pairs of a study are made of its models' own answers.

    round 1     the base answers the task's train questions -> scores -> pairs -> every point
    round n     each run of the round before answers them -> scores -> pairs of its own -> the
                point's next run, which starts from that run's adapter

All runs of a round answer in one batch and are scored together. What is on disk is not made again:
answers, scores, pairs, runs. A point whose run diverged, or whose answers give no pairs, drops out
of the rounds that follow.
"""

import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import gen_mtbench
import prep_data
from pref.answering import work
from pref.files import disk, mt_bench, run_folders, sides
from pref.files.console import UserError
from pref.judging import store
from pref.model import weights
from pref.sweeping import commands, scheduler, status, task_folder, task_settings
from pref.sweeping.grid import Point, Study
from pref.sweeping.scheduler import Scheduler
from pref.training import arguments

NOTED = "rounds.json"  # in the results folder: what the rounds' pairs are made with


def train(runner: Scheduler) -> None:
    """Run the rounds, one after another."""
    check_pairs_args(runner.study)
    check_unchanged(runner.study)
    disk.write_json(runner.study.results / NOTED, settings_now(runner.study))
    for number in range(1, runner.study.rounds + 1):
        points = [point for point in runner.study.points if point.round == number]
        ready = with_pairs(runner, number, points)
        if runner.stop.signal:
            return
        runner.train(ready)


def with_pairs(runner: Scheduler, number: int, points: list[Point]) -> list[Point]:
    """Make the pairs of a round. Returns the points that can be trained; why the others cannot is
    noted.
    """
    todo = [point for point in points if status.summary_of(runner.study.folder(point)) is None]
    todo = [point for point in todo if can_start(runner, point)]
    starts = dict.fromkeys(runner.study.results / point.start for point in todo)

    # The base's pairs are every point's: of several tasks of an array, one makes them.
    with in_turn(runner, ".base_pairs.lock" if number == 1 else None, "the base's pairs are made"):
        missing = [run for run in starts if not has_pairs(runner.study, run)]
        if missing and not runner.stop.signal:
            make_pairs(runner, number, missing)
    if runner.stop.signal:
        return []
    return [point for point in todo if check_pairs(runner, point)]


def can_start(runner: Scheduler, point: Point) -> bool:
    """Whether there is an adapter to start from. If not, the reason is noted."""
    if point.round == 1:
        return True
    folder = runner.study.results / point.start
    summary = status.summary_of(folder)
    if point.start in runner.dropped:
        runner.drop(point.run_id, runner.dropped[point.start])
    elif summary is None:
        runner.reasons[point.run_id] = f"{point.start}, which it starts from, is not trained"
    elif summary["status"] == "diverged" or summary["best_step"] is None:
        runner.drop(point.run_id, f"{point.start}, which it would start from, diverged")
    elif not run_folders.has_weights(folder):
        runner.reasons[point.run_id] = f"the adapter of {point.start} is missing"
    else:
        return True
    return False


def check_pairs(runner: Scheduler, point: Point) -> bool:
    """Whether a point has pairs to train on. If not, the reason is noted."""
    if has_pairs(runner.study, runner.study.results / point.start):
        return True
    whys = (runner.reasons.get(name) for name in (pairs_name(point.start), point.start))
    why = next(filter(None, whys), "no pairs were made of its answers")
    # A later round without pairs is a result, like a run that diverged. Without any in the first
    # one there is no study.
    if point.round > 1 and (sides.NO_PAIRS in why or sides.ONE_PROMPT in why):
        runner.reasons.pop(pairs_name(point.start), None)
        runner.drop(point.run_id, f"{point.start}: {why}")
    else:
        runner.reasons[point.run_id] = f"{point.start}: {why}"
    return False


# ---- making pairs -------------------------------------------------------------------------------


def make_pairs(runner: Scheduler, number: int, runs: list[Path]) -> None:
    """Have `runs` answer the train questions, score the answers, and make pairs of them.

    A run whose answers are not complete gets no pairs, and does not keep the others from theirs.
    """
    study, stage = runner.study, stage_names(runner.study, number)

    # 1) Answers, of all runs together.
    with runner.noting(stage["gen"]):
        runner.run_command(stage["gen"], gen_command(study, number, runs))

    # 2) Scores. A judge that was ended early has left answers without any.
    scored: list[Path] = []
    with in_turn(runner, ".scoring.lock", "answers are scored"), runner.noting(stage["judge"]):
        runner.wait_for_judge(stage["judge"])
        complete = [] if runner.stop.signal else complete_runs(runner, runs)
        if complete:
            command = runner.retrying(judge_command(study, complete))
            code = runner.run_command(stage["judge"], command)
            if code == 0 or (code == 1 and not store.has_unreached(study.results)):
                scored = complete

    # 3) Pairs, of each run.
    for run in scored:
        name = pairs_name(run.name)
        if not runner.stop.signal:
            with runner.noting(name):
                runner.run_command(name, pairs_command(study, run), shown=False)


def complete_runs(runner: Scheduler, runs: list[Path]) -> list[Path]:
    """Those of `runs` that have answered all train questions. What the others lack is noted."""
    name = task_settings.train_set(runner.study.settings)
    asked = round_questions(runner.study)
    needed = {(q["question_id"], n) for q in asked.questions for n in range(asked.choices)}
    complete = []
    for run in runs:
        path = run / name / "answers.jsonl"
        answers = mt_bench.read_answers(path, None) if path.is_file() else {}
        if missing := needed - answers.keys():
            text = f"{len(missing)} of {len(needed)} answers to the train questions are missing"
            runner.reasons.setdefault(run.name, text)
        else:
            complete.append(run)
    return runner.accepted_runs(complete, name)


def has_pairs(study: Study, run: Path) -> bool:
    """Whether there are pairs of a run's answers as they are now. The manifest is written last."""
    folder = task_settings.pairs_folder(study.settings, run.name)
    answers = folder.parent / "answers.jsonl"
    if not (folder / "manifest.json").is_file() or not answers.is_file():
        return False
    made_of = disk.read_json(folder / "manifest.json").get("from_answers") or {}
    return made_of.get("sha256", {}).get(answers.name) == disk.sha256_file(answers)


def settings_now(study: Study) -> dict:
    """What the pairs of the rounds depend on, besides the models."""
    names = ("ROUND_GEN_ARGS", "PAIRS_ARGS", f"JUDGE_ARGS_{study.task}")
    return {name: study.settings[name] for name in names} | {"TASK": task_folder.hashes(study)}


def check_unchanged(study: Study) -> None:
    """Raise UserError if this study's pairs were made otherwise when it began: its rounds could
    not be compared.
    """
    # 1) The base model, by its name: weights are compared where they are loaded.
    path = study.results / run_folders.BASE_RUN / "args.json"
    base = disk.read_json(path).get("model") if path.is_file() else None
    if not work.may_be_same_model(base or study.settings["MODEL"], study.settings["MODEL"]):
        raise UserError(
            f"{path}: this study's rounds began with MODEL {base!r}, not "
            f"{study.settings['MODEL']!r}; restore it, or give another RESULTS"
        )

    # 2) Settings. Those of pairs may still change where none could be made.
    path = study.results / NOTED
    begun = disk.read_json(path) if path.is_file() else {}
    pairs = task_settings.pairs_folder(study.settings, "*").relative_to(study.results)
    if not any(study.results.glob(f"{pairs}/manifest.json")):
        begun.pop("PAIRS_ARGS", None)
    for name, value in settings_now(study).items():
        if name in begun and begun[name] != value:
            was = "another file" if name == "TASK" else f"{begun.get(name)!r}, not {value!r}"
            raise UserError(
                f"{path}: this study's rounds began with {name} {was}; restore it, or give another "
                "RESULTS"
            )


@contextmanager
def in_turn(runner: Scheduler, lock: str | None, activity: str) -> Iterator[None]:
    """Hold a lock of the results folder, after other tasks of an array have released it. lock:
    None for no lock. After a signal the block runs without it; it must look for that.
    """
    with ExitStack() as stack:
        while lock and not runner.stop.signal:
            try:
                stack.enter_context(disk.locked(runner.study.results, lock, activity))
                break
            except UserError:
                runner.is_locked(runner.study.results, activity, lock)
                time.sleep(scheduler.POLL_S)
        yield


# ---- commands -----------------------------------------------------------------------------------


def stage_names(study: Study, number: int) -> dict[str, str]:
    """What a round's stages are called in logs and messages: by task of an array, if it is one."""
    of_index = "" if study.args.index is None else f"_{study.args.index}"
    return {stage: f"{stage}_round{number}{of_index}" for stage in ("gen", "judge")}


def pairs_name(run_id: str) -> str:
    return f"pairs_{run_id}"


def gen_command(study: Study, number: int, runs: list[Path]) -> list[str]:
    """The command by which `runs`, which round `number` starts from, answer the train questions.

    Each round draws its answers with a seed of its own: an adapter that has hardly moved would
    otherwise repeat the answers that it was trained on.
    """
    given = [*map(str, runs), "--questions", str(task_folder.train_questions(study))]
    if number == 1:  # before there is a run that says how the base is loaded
        given += ["--base", "--model", study.settings["MODEL"]]
        given += ["--quant", quant_of(study)]
    given += shlex.split(study.settings["ROUND_GEN_ARGS"])
    seed = gen_mtbench.parse_args(given).seed + number - 1
    return commands.stage_process(study, "gen", [*given, "--seed", str(seed)])


def quant_of(study: Study) -> str:
    """The quantisation of the base model under the study's adapters; where all runs train all
    parameters, there is none.
    """
    points = [point for point in study.points if point.tune == "lora"]
    if not points:
        return "none"
    args = arguments.parse_args(points[0].arguments)
    if args.quant != "auto":
        return args.quant
    if not commands.gpus() or args.shard == "full":
        return "none"
    is_quantised = weights.find_model(args.model, needs_weights=False).quantisation
    return "none" if is_quantised else "nf4"


def judge_command(study: Study, runs: list[Path]) -> list[str]:
    """The command that scores answers to the train questions."""
    given = [*map(str, runs), *commands.judge_of(study, study.task)]
    given += ["--bench", str(task_folder.train_questions(study))]
    given += shlex.split(study.of_bench("JUDGE_ARGS", study.task))
    return commands.stage_process(study, "judge", given)


def pairs_command(study: Study, run: Path) -> list[str]:
    """The command that makes pairs of a run's answers."""
    given = ["--from_answers", str(run / task_settings.train_set(study.settings))]
    given += ["--judge", commands.judge_name(study, study.task)]
    given += ["--questions", str(task_folder.train_questions(study))]
    given += shlex.split(study.settings["PAIRS_ARGS"])
    return commands.stage_process(study, "prep", given)


def commands_of_round(study: Study, number: int) -> Iterator[list[str]]:
    """Every command of a round before its runs are trained, in order."""
    points = [point for point in study.points if point.round == number]
    runs = list(dict.fromkeys(study.results / point.start for point in points))
    yield gen_command(study, number, runs)
    yield judge_command(study, runs)
    for run in runs:
        yield pairs_command(study, run)


# ---- before there are pairs ---------------------------------------------------------------------


def check_pairs_args(study: Study) -> None:
    """Raise UserError for PAIRS_ARGS that prep_data.py would refuse after all answers are there,
    and for those that the rounds say themselves.
    """
    folder, text = "RUN/SET", study.settings["PAIRS_ARGS"]
    try:
        args = prep_data.parse_args(["--from_answers", folder, *shlex.split(text)])
    except SystemExit:  # it has said why
        raise UserError(f"PAIRS_ARGS={text}: prep_data.py does not take this, see above") from None
    if args.from_answers != folder or args.out or args.judge or args.questions:
        raise UserError(
            f"PAIRS_ARGS={text}: leave out --from_answers, --judge, --questions and --out, which "
            "the rounds say themselves"
        )
    try:
        prep_data.check_pair_args(args, Path(folder))
    except UserError as error:
        raise UserError(f"PAIRS_ARGS: {error}") from None


class RoundQuestions(NamedTuple):
    """What a run is asked after a round."""

    questions: list[dict]
    choices: int  # answers to each
    max_new_tokens: int


def round_questions(study: Study) -> RoundQuestions:
    """Raises UserError for questions that cannot be asked, and for one answer to each."""
    given = ["results", "--questions", str(task_folder.train_questions(study))]
    args = gen_mtbench.parse_args(given + shlex.split(study.settings["ROUND_GEN_ARGS"]))
    gen_mtbench.check_args(args)
    if args.num_choices < 2:
        raise UserError("ROUND_GEN_ARGS: a pair needs two answers; give --num_choices 2 or more")
    bench = gen_mtbench.load_bench(args)
    length = args.max_new_tokens or bench.max_new_tokens
    return RoundQuestions(bench.questions, args.num_choices, length)


def estimate_sampling(study: Study, todo: list[Point]) -> str:
    """How much is answered for the rounds of `todo`."""
    asked, runs = round_questions(study), {point.start for point in todo}
    answers = len(runs) * len(asked.questions) * asked.choices
    return (
        f"rounds: {len(asked.questions)} train questions x {asked.choices} answers of up to "
        f"{asked.max_new_tokens} tokens, by {len(runs)} runs: {answers:,} answers, at most "
        f"{answers * asked.max_new_tokens / 1e6:.3g} million tokens, not in the hours below"
    )


def planned_arguments(study: Study, point: Point, folder: Path) -> list[str]:
    """The arguments of train_pref.py whose plan is that of `point`. Pairs that are still to be made
    are written to `folder`: one for each question, of the longest answers.
    """
    first = next(p for p in study.points if (p.index, p.round) == (point.index, 1))
    if not study.rounds or has_pairs(study, study.results / first.start):
        return first.arguments
    asked = round_questions(study)
    answer = " word" * asked.max_new_tokens
    rows = [
        {
            "id": str(question["question_id"]),
            "prompt": [{"role": "user", "content": question["turns"][0]}],
            "chosen": [{"role": "assistant", "content": f"{answer} one"}],
            "rejected": [{"role": "assistant", "content": f"{answer} two"}],
            "source": study.task,
        }
        for question in asked.questions
    ]
    disk.write_jsonl(folder / "val.jsonl", rows[:1])
    disk.write_jsonl(folder / "train.jsonl", rows[1:])
    return [*first.arguments, "--data", str(folder)]
