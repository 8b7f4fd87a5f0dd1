"""sweep.sh with a task and rounds: pairs from the models' own answers. The stages run in this
process, on the tiny model.
"""

import contextlib
import json
import os
import sys
import threading
import time
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

import gen_mtbench
import judge
import prep_data
import train_pref
from pref.files import disk
from pref.files.console import UserError, exit_code_of
from pref.sweeping import __main__ as sweeping
from pref.sweeping import commands, grid, preflight, rounds, scheduler, status, task_folder
from pref.training.run_id import run_id_from

MAINS = {
    "prep_data.py": prep_data.main,
    "gen_mtbench.py": gen_mtbench.main,
    "judge.py": judge.main,
    "train_pref.py": train_pref.main,
}
VOWELS = """
GENERATION = {"temperature": 1.0, "max_new_tokens": 8}

def questions(split, number, seed):
    first = {"train": 1, "test": 1001}[split]
    asked = range(first, first + number)
    return [{"question_id": n, "category": "any", "turns": [f"What is {n}?"]} for n in asked]

def score(question, answer):
    return sum(letter in "aeiou" for letter in answer) / (len(answer) + 1)
"""
GRID = """
LOSSES dpo
BETAS 0.1 0.5
LRS 1e-2
ROUNDS 2
TASK_ARGS --num_train 12 --num_test 4
ROUND_GEN_ARGS --num_choices 3 --temperature 1 --dtype float32
GEN_ARGS --dtype float32
STAGES train gen judge
TRAIN_ARGS --global_batch 4 --max_steps 2 --eval_steps 1 --lora_r 4 --dtype float32 --compile off
"""


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for key in [key for key in os.environ if grid.is_setting(key) or key.startswith("SLURM_")]:
        monkeypatch.delenv(key)
    monkeypatch.setattr(scheduler, "POLL_S", 0.001)
    monkeypatch.setattr(
        preflight, "plan_of", lambda study, point: preflight.Plan(2, 100, 0.1, 0.0, 0.0)
    )


class Killed(Exception):
    pass


class InProcess:
    """Takes the place of the processes that a sweep starts. The first new command after `patience`
    others is not started: the sweep is killed.
    """

    def __init__(self, monkeypatch):
        self.ran: list[tuple[str, ...]] = []
        self.patience = 1000
        double = SimpleNamespace(Popen=self.popen, run=self.run, DEVNULL=None)
        for module in (scheduler, task_folder):
            monkeypatch.setattr(module, "subprocess", double)

    def popen(self, command, stdout=None, **_options) -> SimpleNamespace:
        log = stdout or sys.stdout
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            code = self.run(command).returncode
        return SimpleNamespace(poll=lambda: code, returncode=code, pid=0)

    def run(self, command, **_options) -> SimpleNamespace:
        script, *given = command[1:]
        is_new = (script, *given) not in self.ran
        if is_new and self.patience == 0:
            raise Killed
        self.patience -= is_new
        self.ran.append((script, *given))
        return SimpleNamespace(returncode=exit_code_of(lambda: MAINS[Path(script).name](given)))


def write_grid(folder: Path, model: Path, name: str, more: str = "") -> str:
    """A grid whose task is vowels.py. Returns its path."""
    (folder / "vowels.py").write_text(VOWELS)
    settings = {
        "MODEL": model,
        "TASK": folder / "vowels.py",
        "BENCH_DATA": folder / "data",
        "RESULTS": folder / name,
    }
    path = folder / f"grid_{name}"
    path.write_text(GRID + "".join(f"{key} {value}\n" for key, value in settings.items()) + more)
    return str(path)


def study_of(path: str, *more: str) -> grid.Study:
    return grid.load_study(sweeping.parse_args([path, *more]))


def contents(results: Path) -> dict[str, object]:
    """What two studies must have in common: adapters, answers without their times, pairs."""
    found: dict[str, object] = {}
    for path in sorted(results.glob("*/**/*")):
        name = str(path.relative_to(results))
        if path.suffix == ".safetensors" and "adapter" in name or "/pairs/train" in name:
            found[name] = sha256(path.read_bytes()).hexdigest()
        if path.name == "answers.jsonl":
            rows = map(json.loads, path.read_text().splitlines())
            found[name] = [[choice["turns"] for choice in row["choices"]] for row in rows]
    return found


def stamps_of(results: Path) -> dict[tuple[str, int], float]:
    """When each question was answered."""
    paths = results.glob("*/*/answers.jsonl")
    rows = [(path.parent.parent.name, row) for path in paths for _, row in disk.read_jsonl(path)]
    return {(run, row["question_id"]): row["tstamp"] for run, row in rows}


def test_two_rounds_and_a_sweep_killed_before_every_command(tmp_path, tiny_model, monkeypatch):
    # 1) What is run, once; then nothing.
    processes = InProcess(monkeypatch)
    whole = write_grid(tmp_path, tiny_model, "whole")
    assert sweeping.main([whole, "--yes"]) == 0
    ran = [Path(script).name for script, *_ in processes.ran]
    round_of_one = ["gen_mtbench.py", "judge.py", "prep_data.py", "train_pref.py"]
    assert ran[:6] == ["prep_data.py", *round_of_one, "train_pref.py"]
    assert ran[6:12] == [*round_of_one[:2], *2 * ["prep_data.py"], *2 * ["train_pref.py"]]
    assert ran[12:] == ["gen_mtbench.py", "judge.py"]
    assert scheduler.is_reference_cached(study_of(whole))
    processes.ran.clear()
    assert sweeping.main([whole, "--yes", "--stages", "train"]) == 0 and processes.ran == []

    # 2) One of its two points alone, in a sweep that is killed before every command.
    monkeypatch.setenv("BETAS", "0.5")
    cut, code, stamps = write_grid(tmp_path, tiny_model, "cut"), None, {}
    while code is None:
        processes.patience = 1
        with contextlib.suppress(Killed):
            code = sweeping.main([cut, "--yes", "--stages", "train"])
        stamps |= {
            key: stamp for key, stamp in stamps_of(tmp_path / "cut").items() if key not in stamps
        }
    assert code == 0
    trained = [given for script, *given in processes.ran if script.endswith("train_pref.py")]
    assert len(trained) == 2
    assert stamps == stamps_of(tmp_path / "cut") and len(stamps) == 2 * 12  # answered once
    expected, found = contents(tmp_path / "whole"), contents(tmp_path / "cut")
    assert len(found) == 6 and all(expected[name] == value for name, value in found.items())

    # 3) Pairs of a round are the answers of the run that it starts from.
    run = "dpo_b0.5_s42_lr0.01_steps2_gb4_r4_float32"
    assert found["base/vowels_train/answers.jsonl"] != found[f"{run}/vowels_train/answers.jsonl"]
    args = disk.read_json(tmp_path / "cut" / f"{run}_round2" / "args.json")
    assert args["round"] == 2 and args["init_adapter"].endswith(f"{run}/adapter")
    made_of = disk.read_json(tmp_path / "cut" / run / "vowels_train/pairs/manifest.json")
    assert args["data"].endswith(f"{run}/vowels_train/pairs")
    assert made_of["from_answers"]["run"] == run
    assert (made_of["from_answers"]["generation"]["seed"], made_of["min_margin"]) == (43, None)


# ---- settings -----------------------------------------------------------------------------------


def test_a_task_is_the_benchmark_and_its_judge(tmp_path, monkeypatch):
    study = study_of(write_grid(tmp_path, tmp_path, "r"))
    assert (study.benches, study.task, study.rounds) == (["vowels"], "vowels", 2)
    assert study.of_bench("JUDGE", "vowels") == f"py:{tmp_path / 'vowels.py'}"
    assert study.settings["DATA"] == f"{tmp_path}/r/base/vowels_train/pairs"
    monkeypatch.setenv("BENCHES", "vowels mt_bench")
    monkeypatch.setenv("JUDGE", "rater")
    monkeypatch.setenv("BASE_URL", "http://here/v1")
    study = study_of(write_grid(tmp_path, tmp_path, "r", "JUDGE_ARGS --min_rating_mass 0\n"))
    asked = commands.stage_arguments(study, "judge", "mt_bench")
    assert asked[1:5] == ["--judge", "rater", "--base_url", "http://here/v1"]
    scored = commands.stage_arguments(study, "judge", "vowels")
    folder = str(tmp_path / "data/vowels")
    where = ["--bench", "vowels", "--bench_data", folder]
    assert scored[1:] == ["--judge", f"py:{tmp_path}/vowels.py", *where]
    assert commands.judge_name(study, "vowels") == "py:vowels.py"


def test_runs_of_later_rounds(tmp_path, capsys, monkeypatch):
    """They are named as train_pref.py names them, and share their point's number."""
    path = write_grid(tmp_path, tmp_path, "r", "REFERENCE base\n")
    monkeypatch.setenv("ROUNDS", "3")
    assert sweeping.main([path, "--list"]) == 0
    listed = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    first = [f"dpo_b{beta}_s42_lr0.01_steps2_gb4_r4_float32" for beta in (0.1, 0.5)]
    later = [f"{name}_refbase_round{number}" for number in (2, 3) for name in first]
    assert listed == [[str(n % 2), name] for n, name in enumerate([*first, *later])]
    study = study_of(path, "--index", "1")
    assert [point.run_id for point in study.points] == [first[1], later[1], later[3]]
    assert all(run_id_from(point.arguments) == point.run_id for point in study.points)
    (tmp_path / "r" / first[1]).mkdir(parents=True)  # a run that has just begun
    (tmp_path / "r" / first[1] / ".lock").touch()
    assert study_of(path, "--index", "1").points == study.points
    last = " ".join(study.points[2].arguments)
    assert f"--data {tmp_path}/r/{later[1]}/vowels_train/pairs " in last
    end = f"--init_adapter {tmp_path}/r/{later[1]} --reference base --round 3"
    assert last.endswith(end) and last.count("--init_adapter") == 1


def test_every_round_draws_its_answers_with_a_seed_of_its_own(tmp_path):
    study = study_of(write_grid(tmp_path, tmp_path, "r"))
    base, run = study.results / "base", study.results / "run"
    first, second = rounds.gen_command(study, 1, [base]), rounds.gen_command(study, 2, [run])
    assert first[-2:] == ["--seed", "42"] and second[-2:] == ["--seed", "43"]
    assert "--base" in first and "--base" not in second
    assert first[first.index("--quant") + 1] == "none"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("DATA data/mine", "DATA: with ROUNDS the pairs are made of the models' own answers"),
        ("JUDGE rater", "JUDGE: no other benchmark than the task is judged"),
        ("JUDGE_ARGS --repeats 2", "leave it out, or set JUDGE_ARGS_vowels"),
        ("REFERENCE first", "REFERENCE=first: must be start"),
        ("JUDGE_ARGS_consonants x", "JUDGE_ARGS_consonants is not an axis or setting"),
        ("BENCHES vowels consonants", "there is no benchmark 'consonants'"),
        (
            "TRAIN_ARGS_dpo --init_adapter sft",
            "TRAIN_ARGS_dpo: --init_adapter: with ROUNDS round 1",
        ),
        ("TRAIN_ARGS_dpo --reference=base", "TRAIN_ARGS_dpo: --reference: .* set REFERENCE"),
        ("TRAIN_ARGS_dpo --data data/mine", "TRAIN_ARGS_dpo: --data: with ROUNDS the pairs are"),
        ("TRAIN_ARGS_dpo --run_id mine", "--run_id: with ROUNDS runs are named by what was varied"),
        ("AXIS lora_r 4 8", "AXIS lora_r: TRAIN_ARGS have --lora_r too, which would take the"),
        ("PAIRS_ARGS --rule 'all", "PAIRS_ARGS=--rule 'all: No closing quotation; close what is"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        study_of(write_grid(tmp_path, tmp_path, "r", line + "\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("LOSSES dpo\nROUNDS 2\n", "ROUNDS: is for a study with a task; set TASK"),
        ("LOSSES dpo\nTASK my_task\n", "TASK=my_task: must be a Python file"),
        ("LOSSES dpo\nTASK mt_bench.py\n", "TASK=mt_bench.py: .* mt_bench is a benchmark's name"),
        ("LOSSES dpo\nTASK my_train.py\n", "TASK=my_train.py: .* ends with _train"),
        ("LOSSES dpo\nTASK a.py\nROUNDS -1\n", "ROUNDS=-1: must be a number of rounds"),
    ],
)
def test_a_wrong_task_is_named(tmp_path, text, message):
    (tmp_path / "mine").write_text(text)
    with pytest.raises(UserError, match=message):
        study_of(str(tmp_path / "mine"))


def test_a_folder_of_ones_own_is_a_benchmark(tmp_path):
    disk.write_json(tmp_path / "data/riddles/manifest.json", {"bench": "riddles"})
    more = "BENCHES vowels riddles\nJUDGE_riddles rm:models/r\nGEN_ARGS_riddles --temperature 0\n"
    study = study_of(write_grid(tmp_path, tmp_path, "r", more))
    assert commands.stage_arguments(study, "gen", "riddles")[-2:] == ["--temperature", "0"]
    assert study.of_bench("JUDGE", "riddles") == "rm:models/r"


# ---- the task's questions -----------------------------------------------------------------------


def written(study: grid.Study, **task) -> None:
    """Questions of the study's task, as prep_data.py --task leaves them."""
    sha256 = disk.sha256_file(Path(study.settings["TASK"]))
    task = {"identity": {"sha256": {"vowels.py": sha256}}, "seed": 42, **task}
    task.setdefault("numbers", {"train": 12, "test": 4})
    disk.write_json(task_folder.folder(study) / "manifest.json", {"bench": "vowels", "task": task})


def test_questions_of_another_version_are_refused(tmp_path):
    study = study_of(write_grid(tmp_path, tmp_path, "r"))
    written(study)
    task_folder.prepare(study)
    (tmp_path / "vowels.py").write_text(VOWELS + "# another\n")
    with pytest.raises(UserError, match=r"written before .*vowels.py was changed; remove"):
        task_folder.prepare(study)
    written(study, numbers={"train": 24, "test": 4})
    with pytest.raises(UserError, match="has 24 train and 4 test questions of seed 42, TASK_ARGS="):
        task_folder.prepare(study)


def test_a_study_whose_pairs_were_made_otherwise_is_refused(tmp_path):
    path = write_grid(tmp_path, tmp_path, "r")
    rounds.check_unchanged(study_of(path))
    rounds.train(runner_of(study_of(path)._replace(points=[])))
    rounds.check_unchanged(study_of(path))
    Path(path).write_text(Path(path).read_text() + "PAIRS_ARGS --min_margin 0.5\n")
    rounds.check_unchanged(study_of(path))  # no pairs yet: these arguments may have given none
    disk.write_json(tmp_path / "r/base/vowels_train/pairs/manifest.json", {})
    with pytest.raises(
        UserError, match="began with PAIRS_ARGS '', not '--min_margin 0.5'; restore"
    ):
        rounds.check_unchanged(study_of(path))
    disk.write_json(tmp_path / "r/base/args.json", {"model": "other/base"})
    with pytest.raises(UserError, match="args.json: .* began with MODEL 'other/base', not '"):
        rounds.check_unchanged(study_of(path))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--min_margn 1", "PAIRS_ARGS=--min_margn 1: prep_data.py does not take this"),
        ("--min_margin -1", "PAIRS_ARGS: --min_margin -1.0: must be above 0"),
        ("--out elsewhere", "leave out --from_answers, --judge, --questions and --out"),
    ],
)
def test_arguments_of_pairs_are_checked_before_there_are_answers(tmp_path, given, message):
    study = study_of(write_grid(tmp_path, tmp_path, "r", f"PAIRS_ARGS {given}\n"))
    with pytest.raises(UserError, match=message):
        rounds.train(runner_of(study))


def test_questions_that_are_being_written_are_none_yet(tmp_path, capsys):
    """The manifest comes last. --status must not ask for what the sweep is about to write."""
    study = study_of(write_grid(tmp_path, tmp_path, "r"))
    disk.write_jsonl(task_folder.folder(study) / "test_questions.jsonl", [{"question_id": 1}])
    assert status.print_status(study) == 1
    assert "4 runs: 4 waiting" in capsys.readouterr().out


def test_a_plan_before_there_are_pairs(tmp_path, tiny_model):
    """One pair for each of 12 questions, of the longest answers: 8 tokens, and the ends."""
    study = study_of(write_grid(tmp_path, tiny_model, "r"))
    rows = [{"question_id": n, "category": "any", "turns": [f"What is {n}?"]} for n in range(1, 13)]
    disk.write_jsonl(tmp_path / "data/vowels/train_questions.jsonl", rows)
    how = ["--temperature", "1", "--max_new_tokens", "8"]
    args = " ".join(["--num_choices", "3", *how])
    study = study._replace(settings=study.settings | {"ROUND_GEN_ARGS": args})
    text = rounds.estimate_sampling(study, study.points)
    assert "12 train questions x 3 answers of up to 8 tokens, by 3 runs: 108 answers" in text
    given = rounds.planned_arguments(study, study.points[3], tmp_path / "pairs")
    plan = tmp_path / "plan.json"
    assert train_pref.main([*given, "--dry_run", "1", "--plan_json", str(plan)]) in (0, None)
    assert disk.read_json(plan)["steps"] == 2
    few = {"ROUND_GEN_ARGS": "--num_choices 1 --temperature 1"}
    with pytest.raises(UserError, match="a pair needs two answers"):
        rounds.round_questions(study._replace(settings=study.settings | few))


def test_the_tasks_of_an_array_make_one_set_of_base_pairs(tmp_path):
    """The second one waits for the first, and finds the pairs."""
    runner = runner_of(study_of(write_grid(tmp_path, tmp_path, "r"), "--index", "1"))
    order = []

    def first():
        with disk.locked(runner.study.results, ".base_pairs.lock", "the base's pairs are made"):
            held.set()
            time.sleep(0.05)
            order.append("first")

    held, thread = threading.Event(), threading.Thread(target=first)
    thread.start()
    held.wait()
    with rounds.in_turn(runner, ".base_pairs.lock", "the base's pairs are made"):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
    assert rounds.stage_names(runner.study, 2) == {"gen": "gen_round2_1", "judge": "judge_round2_1"}


# ---- points that drop out -----------------------------------------------------------------------


def runner_of(study: grid.Study) -> scheduler.Scheduler:
    study.results.mkdir(exist_ok=True)
    return scheduler.Scheduler(study, scheduler.Stop())


def end_run(folder: Path, how: str, best_step: int | None = 1) -> None:
    summary = {"status": how, "steps": 2, "best_step": best_step, "best_acc_ref": 0.5, "wall_s": 1}
    disk.write_json(folder / "summary.json", summary)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").touch()


def test_a_run_that_diverged_has_no_next_round(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ROUNDS", "3")
    study = study_of(write_grid(tmp_path, tmp_path, "r"))
    runner, (_, _, second, other, third, last) = runner_of(study), study.points
    end_run(study.results / second.start, "diverged")
    assert rounds.with_pairs(runner, 2, [second, other]) == []
    assert rounds.with_pairs(runner, 3, [third, last]) == []
    assert runner.dropped == dict.fromkeys(
        [second.run_id, third.run_id], f"{second.start}, which it would start from, diverged"
    )
    assert runner.reasons[last.run_id].endswith("round2, which it starts from, is not trained")
    assert status.print_status(study._replace(points=[second, third], stages=["train"])) == 0
    assert "2 runs: 2 dropped" in capsys.readouterr().out
    missing = status.missing_of(study._replace(stages=["train"]), {})
    assert missing == dict.fromkeys(
        [second.start.replace("0.1", "0.5"), other.run_id, last.run_id], "not trained"
    )


@pytest.mark.parametrize(
    ("said", "is_result"),
    [
        ("error: r/run/vowels_train: no pairs left for train; dropped: 12 tie", True),
        ("error: r/run/vowels_train: all pairs left have the same prompt; two are needed", True),
        ("error: [Errno 28] No space left on device", False),
    ],
)
def test_answers_without_pairs_are_a_result_and_a_full_disk_is_none(
    tmp_path, monkeypatch, said, is_result
):
    study = study_of(write_grid(tmp_path, tmp_path, "r"))
    runner, point = runner_of(study), study.points[2]
    end_run(study.results / point.start, "finished")

    def run_command(name, *_, **__):
        if name.startswith("pairs_"):
            runner.fail(name, said)
        return 0

    monkeypatch.setattr(runner, "run_command", run_command)
    monkeypatch.setattr(rounds, "complete_runs", lambda runner, runs: runs)
    assert rounds.with_pairs(runner, 2, [point]) == []
    assert (point.run_id in runner.dropped) == is_result
    assert (point.run_id in runner.reasons) != is_result
    where = runner.dropped if is_result else runner.reasons
    assert where[point.run_id] == f"{point.start}: {said}"


def test_a_study_without_any_pairs_is_not_done(tmp_path, monkeypatch):
    """All scores of the base's answers are equal: nothing is trained, and the end says so."""
    study = study_of(write_grid(tmp_path, tmp_path, "r"))
    runner = runner_of(study)
    monkeypatch.setattr(
        rounds, "make_pairs", lambda *_: runner.fail("pairs_base", "no pairs left for train")
    )
    assert rounds.with_pairs(runner, 1, study.points[:2]) == [] and not runner.dropped
    missing = status.missing_of(study._replace(stages=["train"]), runner.reasons)
    assert missing[study.points[0].run_id].endswith("not trained: base: no pairs left for train")


def test_scores_of_a_judge_that_was_ended_give_no_pairs(tmp_path, monkeypatch):
    study = study_of(write_grid(tmp_path, tmp_path, "r"))
    runner, point, started = runner_of(study), study.points[0], []

    def run_command(name, *_, **__):
        started.append(name)
        return -9 if name.startswith("judge") else 0

    monkeypatch.setattr(runner, "run_command", run_command)
    monkeypatch.setattr(rounds, "complete_runs", lambda runner, runs: runs)
    assert rounds.with_pairs(runner, 1, [point]) == []
    assert started == ["gen_round1", "judge_round1"]
    assert runner.reasons == {point.run_id: "base: no pairs were made of its answers"}


def test_a_run_that_has_not_answered_all_is_left_out(tmp_path):
    study = study_of(write_grid(tmp_path, tmp_path, "r"))
    runner = runner_of(study)
    asked = [{"question_id": n, "category": "any", "turns": [f"What is {n}?"]} for n in (1, 2)]
    disk.write_jsonl(tmp_path / "data/vowels/train_questions.jsonl", asked)
    runs = [study.results / name for name in ("one", "two", "none")]
    for run, count in zip(runs, (2, 1)):
        choices = [{"index": n, "turns": ["yes"]} for n in range(3)]
        rows = [{"question_id": n + 1, "choices": choices} for n in range(count)]
        disk.write_jsonl(run / "vowels_train/answers.jsonl", rows)
    assert rounds.complete_runs(runner, runs) == [runs[0]]
    assert runner.reasons == {
        "two": "3 of 6 answers to the train questions are missing",
        "none": "6 of 6 answers to the train questions are missing",
    }


def test_the_grid_that_comes_along(monkeypatch):
    monkeypatch.chdir(ROOT)
    study = study_of("sentiment_rounds")
    assert study.task == "sentiment" and (ROOT / study.settings["TASK"]).is_file()
    assert {point.round for point in study.points} == {1, 2}
