"""sweep.sh and pref/sweeping: grid files, the scheduler with shell commands in place of training
runs, and its messages.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_script
from safetensors.torch import load_file
from test_train import metrics_of, train_args

import train_pref
from pref.files.console import UserError
from pref.files.disk import locked
from pref.judging import store
from pref.model.ranks import init_ranks
from pref.sweeping import __main__ as sweeping
from pref.sweeping import commands, grid, preflight, status
from pref.sweeping import scheduler as scheduler_module
from pref.sweeping.grid import Point, Study, expand, settings_of
from pref.sweeping.scheduler import Scheduler, Stop
from pref.sweeping.status import State
from pref.training import arguments, assembly
from pref.training.arguments import parse_args
from pref.training.run_id import run_id_of
from pref.training.schedule import pairs_of_step


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """Neither the user's settings nor a job that the tests may run in."""
    for key in [key for key in os.environ if grid.is_setting(key) or key.startswith("SLURM_")]:
        monkeypatch.delenv(key)
    monkeypatch.setattr(scheduler_module, "POLL_S", 0.01)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored, where tests run in the background
    yield
    signal.signal(signal.SIGINT, before)


def points_of(name: str) -> list[Point]:
    return expand(settings_of(grid.grid_path(name))[0])


OWN_LOSS = """
import torch.nn.functional as F

def clipped(pairs, *, beta: float = 0.1, clip: float = 1.0):
    losses = F.softplus(-beta * pairs.rho).clamp(max=clip)
    return losses, {"preference": losses}
"""


# ---- grids --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("tddpo", 60),
        ("dlrml", 33),
        ("instability", 30),
        ("losses", 31),
        ("quick", 9),
        ("controlled", 87),
        ("sentiment_rounds", 1),
        ("discopop_paper", 10),
    ],
)
def test_every_grid_is_made_of_runs_that_train_pref_takes(name, count):
    points = [point for point in points_of(name) if point.round == 1]  # each round has as many
    assert [point.index for point in points] == list(range(count))
    for point in points[:: max(1, count // 6)]:
        args = parse_args(point.arguments)
        assert run_id_of(args, arguments.loss_parameters(args), parse_args([])) == point.run_id


def test_the_study_is_the_one_of_the_methods():
    ids = [point.run_id for point in points_of("tddpo")]
    assert ids[0] == "dpo_b0.01_s42" and len(set(ids)) == 60
    assert (
        sum(name.startswith("td_dpo_") for name in ids) == 36
        and sum(name.endswith("_s43") for name in ids) == 20
    )
    assert all(name.endswith("_s42") for name in ids[:20])  # a whole seed before the next one


def test_the_instability_grid_takes_the_published_form():
    ids = [point.run_id for point in points_of("instability")]
    assert (
        sum("_published" in name for name in ids)
        == 15
        == sum(name.startswith("discopop_") for name in ids)
    )


def test_the_environment_stands_above_the_file(monkeypatch):
    monkeypatch.setenv("LOSSES", "dpo dlrml")
    monkeypatch.setenv("SEEDS", "7")
    assert [p.run_id.split("_s7")[0] for p in points_of("dlrml")] == ["dpo_b0.05"] + [
        f"dlrml_b{beta}" for beta in ("0.01", "0.05", "0.5") for _ in range(3)
    ]
    monkeypatch.setenv("BETAS", "0.3")  # for every loss, also those that have a line of their own
    assert {p.run_id.split("_")[1] for p in points_of("dlrml")} == {"b0.3"}


def test_an_axis_is_left_out_where_a_loss_has_no_such_parameter(tmp_path):
    (tmp_path / "mine").write_text(
        "LOSSES orpo dpo td_dpo # three\n\nBETAS 0.1 0.2\nTAUS 1 2\nLOGP sum mean\n"
    )
    ids = [point.run_id for point in points_of(str(tmp_path / "mine"))]
    assert sum(name.startswith("orpo") for name in ids) == 2  # logp alone
    assert (
        sum(name.startswith("dpo") for name in ids) == 4
        and sum(name.startswith("td_dpo") for name in ids) == 8
    )


def test_a_loss_of_your_own_and_any_argument_can_be_axes(tmp_path, monkeypatch):
    """The loss is named by its file in LOSSES, and its parameter by AXIS; dpo has no clip."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_loss.py").write_text(OWN_LOSS)
    (tmp_path / "mygrid").write_text(
        "LOSSES my_loss.py:clipped dpo\nBETAS 0.1\nBETAS_clipped 0.2 0.3\nAXIS clip 0.1 0.5\n"
        "AXIS\tlora_r 16 32 # any argument that makes another run\n"
    )
    expected = [f"dpo_b0.1_s42_r{r}" for r in (16, 32)]
    expected += [
        f"clipped_b{beta}_s42_r{r}_clip{clip}"
        for beta in (0.2, 0.3)
        for clip in (0.1, 0.5)
        for r in (16, 32)
    ]
    points = points_of("mygrid")  # the file here, as there is no grids/mygrid
    assert sorted(point.run_id for point in points) == sorted(expected)
    own = next(point for point in points if point.run_id == "clipped_b0.2_s42_r16_clip0.1")
    rest = "--loss_file my_loss.py:clipped --beta 0.2 --seed 42 --clip 0.1 --lora_r 16"
    assert " ".join(own.arguments[6:]) == rest
    monkeypatch.setenv("AXIS_clip", "0.7")
    assert {p.run_id[-7:] for p in points_of("mygrid") if "clipped" in p.run_id} == {"clip0.7"}


def test_a_name_that_is_a_grid_and_a_file_here_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick").write_text("LOSSES dpo\n")
    with pytest.raises(UserError, match="write ./quick for the file"):
        grid.grid_path("quick")
    assert len(points_of("./quick")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("LOSSES dpo\nBETA 0.1\n", r"mine:2: BETA is not an axis or setting"),
        ("LOSSES dpo\nSEEDS 1\nSEEDS 2\n", r"mine:3: SEEDS is given twice"),
        ("SEEDS 1\n", "LOSSES: the grid names no loss"),
        ("LOSSES ddpo\n", "there is no loss 'ddpo'"),
        ("LOSSES td_dpo\nTAUS 0\n", "--tau 0"),
        ("LOSSES dpo\nLRS -1\n", "--learning_rate -1"),
        ("LOSSES dpo\nAXIS\n", "mine:2: AXIS is not an axis"),
        ("LOSSES dpo\nAXIS clip\n", "AXIS clip: has no values"),
        ("LOSSES dpo\nAXIS clip 1\n", "AXIS clip: neither a parameter of a loss in LOSSES"),
        ("LOSSES dpo\nAXIS gamma 1\n", "AXIS gamma: neither a parameter of a loss in LOSSES"),
        ("LOSSES dpo\nAXIS beta 1\n", "AXIS beta: this is the axis BETAS"),
        ("LOSSES dpo\nAXIS status x\n", "AXIS status: neither"),
        ("LOSSES dpo\nAXIS lora_r 16\nAXIS lora_r 64\n", "mine:3: AXIS_lora_r is given twice"),
        ("LOSSES gone.py:clipped\n", "--loss_file gone.py: no such file"),
    ],
)
def test_a_wrong_grid_is_named(tmp_path, text, message):
    (tmp_path / "mine").write_text(text)
    with pytest.raises(UserError, match=message):
        points_of(str(tmp_path / "mine"))


def test_seeds_are_paired(tiny_model, pairs_folder):
    """At one seed every loss starts from the same LoRA matrices and sees the same batches."""
    starts, ranks = {}, init_ranks()
    for point in points_of("quick")[:3] + points_of("quick")[:1]:
        args = parse_args(
            [*point.arguments, "--model", str(tiny_model), "--dtype", "float32", "--quant", "none"]
        )
        args.seed += args.loss == "dpo" and point.run_id in starts
        args.compile = args.checkpointing = "off"
        policy, _ = assembly.build_policy(args, ranks)
        lora = torch.cat(
            [p.detach().flatten() for n, p in policy.named_parameters() if "lora_A" in n]
        )
        starts.setdefault(point.run_id, []).append(
            (args.seed, lora, pairs_of_step(1, 30, args.global_batch, args.seed))
        )
    (first, other), *rest = starts.values()
    for ((seed, lora, batch),) in rest:
        assert seed == first[0] and torch.equal(lora, first[1]) and batch == first[2]
    assert not torch.equal(other[1], first[1]) and other[2] != first[2]


# ---- the scheduler ------------------------------------------------------------------------------

SUMMARY = '{"status": "finished", "steps": 1, "best_step": 1, "best_acc_ref": 0.5, "wall_s": 1}'
FINISH = f"echo '{SUMMARY}' > \"$1/summary.json\""


def study_of(tmp_path, count: int, **settings) -> Study:
    results = tmp_path / "a study" / "results"
    points = [Point(n, f"run{n:02}", []) for n in range(count)]
    args = Namespace(grid="quick", nodes=1, index=None, stages=None, yes=True)
    results.mkdir(parents=True, exist_ok=True)
    return Study(args, grid.DEFAULTS | {"RESULTS": str(results), **settings}, {}, points, ["train"])


def schedule(monkeypatch, study: Study, script, cached: bool = True) -> tuple[Scheduler, Stop]:
    """Train the study with `script(point)`, run by bash, in the place of train_pref.py; $1 is the
    run's folder.
    """

    def command(study, point, devices):
        folder = study.folder(point)
        folder.mkdir(exist_ok=True)
        return ["bash", "-c", script(point), "run", str(folder)]

    monkeypatch.setattr(commands, "train_command", command)
    with Stop() as stop:
        scheduler = Scheduler(study, stop)
        scheduler.reference_cached = cached
        scheduler.train()
    return scheduler, stop


def events(study: Study) -> list[tuple[str, str]]:
    lines = (study.results / "sweep.log").read_text().splitlines()
    return [tuple(line.split(maxsplit=4)[2:4]) for line in lines]


def failed_runs(study: Study) -> set[str]:
    last = status.last_events(study)
    return {name for name, event in last.items() if event.event == "failed"}


@pytest.mark.slow
def test_no_gpu_is_idle_while_runs_wait_and_none_has_two(tmp_path, monkeypatch):
    """Four simulated GPUs, sixty commands of uneven length."""
    monkeypatch.setattr(commands, "gpus", lambda: ["0", "1", "2", "3"])
    log, study = tmp_path / "log", study_of(tmp_path, 60)

    def script(point):
        seconds = 0.05 + 0.01 * (point.index * 37 % 41)
        note = f'echo "$CUDA_VISIBLE_DEVICES $EPOCHREALTIME {point.index}" >> {log}'
        return f"{note}; sleep {seconds}; {note}; {FINISH}"

    schedule(monkeypatch, study, script)
    spans: dict[str, list] = {}
    begun: dict[str, float] = {}
    for line in log.read_text().splitlines():
        gpu, moment, index = line.split()
        if index in begun:
            spans.setdefault(gpu, []).append((begun[index], float(moment)))
        begun[index] = float(moment)
    assert sorted(spans) == ["0", "1", "2", "3"] and sum(map(len, spans.values())) == 60
    gaps = []
    for mine in spans.values():
        mine.sort()
        gaps += [after[0] - before[1] for before, after in zip(mine, mine[1:])]
    assert min(gaps) > 0  # never two at a time
    running = started = 0
    words = [word for word, _ in events(study)][1:]
    for word, following in zip(words, words[1:]):
        running += 1 if word == "start" else -1
        started += word == "start"
        if started < 60 and word == "start" and following == "finished":
            assert running == 4  # as long as one waits, an end is met with a start


def test_gpus_in_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "gpus", lambda: ["4", "5", "6", "7", "9"])
    assert commands.slots_of(study_of(tmp_path, 1, GPUS_PER_RUN="2")) == [["4", "5"], ["6", "7"]]
    assert commands.slots_of(study_of(tmp_path, 1, JOBS="3")) == [["4"], ["5"], ["6"]]
    with pytest.raises(UserError, match="GPUS_PER_RUN=8: this machine has 5 GPUs"):
        commands.slots_of(study_of(tmp_path, 1, GPUS_PER_RUN="8"))
    study = study_of(tmp_path, 1, GPUS_PER_RUN="2")
    assert "--nproc_per_node 2" in shlex.join(
        commands.train_command(study, study.points[0], ["4", "5"])
    )
    monkeypatch.setattr(commands, "gpus", list)
    assert commands.slots_of(study_of(tmp_path, 1, JOBS="2")) == [[], []]
    on_cpu = study_of(tmp_path, 1, JOBS="2")
    assert "--nproc_per_node 2" in shlex.join(commands.stage_command(on_cpu, "gen", "mt_bench"))
    assert "--nproc_per_node" not in commands.stage_command(on_cpu, "judge", "mt_bench")
    for served in ("--base_url http://here/v1", "--base_url=http://here/v1"):
        on_cpu.settings["GEN_ARGS"] = served
        assert "--nproc_per_node" not in commands.stage_command(on_cpu, "gen", "mt_bench")


def test_a_crash_is_retried_once_a_mistake_is_not_and_the_rest_goes_on(tmp_path, monkeypatch):
    study = study_of(tmp_path, 4, JOBS="2")
    scripts = [
        f'if [ -e "$1/tried" ]; then {FINISH}; else touch "$1/tried"; kill -9 $$; fi',
        "echo RuntimeError: out of luck >&2; exit 1",
        "echo 'error: disk full; make room' >&2; exit 2",
        f"{FINISH.replace('finished', 'diverged')}",
    ]
    scheduler, _ = schedule(monkeypatch, study, lambda point: scripts[point.index])
    assert scheduler.reasons == {
        "run01": "exit code 1: RuntimeError: out of luck",
        "run02": "exit code 2: error: disk full; make room",
    }
    said = events(study)
    assert said.count(("crashed", "run00")) == 1 and ("finished", "run00") in said
    assert said.count(("start", "run01")) == 2 and said.count(("start", "run02")) == 1
    assert ("diverged", "run03") in said and failed_runs(study) == {"run01", "run02"}


def test_the_end_says_what_is_missing_and_how_to_go_on(tmp_path, monkeypatch, capsys):
    study = study_of(tmp_path, 3)
    study = study._replace(given={"SEEDS": "1 2", "BASE_URL": "http://me:secret@host/v1"})
    scripts = [
        FINISH,
        "echo error: no room; exit 2",
        FINISH.replace("finished", "diverged").replace(": 1,", ": null,"),
    ]
    scheduler, _ = schedule(monkeypatch, study, lambda point: scripts[point.index])
    assert sweeping.report(study, scheduler) == 1
    out = capsys.readouterr().out
    assert (
        f"run00: its adapter is missing; restore it, or remove {study.results / 'run00'} to train "
        "it again" in out
    )
    assert "run01: not trained: exit code 2: error: no room (log: " in out
    assert (
        "diverged, which is a result: run02" in out
        and "run02: " not in out.partition("missing:")[2]
    )
    assert (
        "SEEDS='1 2' BASE_URL=\"$BASE_URL\" bash " in out
        and "sweep.sh quick" in out
        and "secret" not in out
    )


@pytest.mark.slow
def test_the_reference_is_computed_by_one_and_the_others_wait(tmp_path, monkeypatch):
    """args.json is written as soon as it is there."""
    study, log = study_of(tmp_path, 3, JOBS="3"), tmp_path / "log"
    compute = f"echo start >> {log}; sleep 0.5; echo cached >> {log}"
    script = f'{compute}; echo "{{}}" > "$1/args.json"; sleep 0.4; {FINISH}'
    schedule(monkeypatch, study, lambda point: script, cached=False)
    assert log.read_text().split()[:4] == ["start", "cached", "start", "start"]


def test_two_tasks_of_an_array_compute_one_reference(tmp_path, monkeypatch):
    study = study_of(tmp_path, 1)
    scheduler = Scheduler(study, Stop())
    with locked(study.results, ".reference.lock", "x"):
        assert scheduler.lock_reference() is None and not scheduler.reference_cached
    lock = scheduler.lock_reference()
    assert lock is not None
    lock.close()


@pytest.mark.slow
def test_a_run_that_another_process_trains_is_waited_for(tmp_path, monkeypatch):
    study = study_of(tmp_path, 2)
    holder = f"""import sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from pref.files.disk import locked
with locked(Path({str(study.folder(study.points[0]))!r}), ".lock", "x"):
    print("held", flush=True); time.sleep(1)"""
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        schedule(monkeypatch, study, lambda point: FINISH)
    said = events(study)
    assert [word for word, _ in said] == [
        "training",
        "held",
        "start",
        "finished",
        "start",
        "finished",
    ]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_a_signal_has_every_run_save(tmp_path, monkeypatch, number, code):
    study = study_of(tmp_path, 5, JOBS="2")
    trap = 'trap "touch \\"$1/saved\\"; exit 75" TERM; touch "$1/up"; '
    both_up = f'until [ -e "{study.results}/run00/up" ]; do sleep 0.02; done; '
    both_up += f"kill -{int(number)} {os.getpid()}; "

    def script(point):
        return trap + both_up * point.index + "while true; do sleep 0.02; done"

    _, stop = schedule(monkeypatch, study, script)
    assert stop.exit_code == code
    assert sorted(path.parent.name for path in study.results.glob("*/saved")) == ["run00", "run01"]
    assert [name for word, name in events(study) if word == "start"] == [
        "run00",
        "run01",
    ]  # no further one


def test_only_ctrl_c_again_does_not_wait():
    with Stop() as stop:
        for number, level in (
            (signal.SIGTERM, 1),
            (signal.SIGTERM, 1),
            (signal.SIGUSR1, 1),
            (signal.SIGINT, 2),
        ):
            os.kill(os.getpid(), number)
            assert (stop.signal, stop.level) == (signal.SIGTERM, level)


def test_runs_of_a_sweep_that_is_killed_save_and_leave(tmp_path):
    """The kernel tells them: nothing of the sweep is left that could."""
    script = 'trap "touch saved; exit 75" TERM; touch up; while true; do sleep 0.02; done'
    sweep = os.fork()
    if sweep == 0:
        before = partial(scheduler_module.prepare_child, os.getpid(), signal.SIGTERM)
        subprocess.Popen(
            ["bash", "-c", script], cwd=tmp_path, start_new_session=True, preexec_fn=before
        )
        time.sleep(60)
    wait_for(tmp_path / "up")
    os.kill(sweep, signal.SIGKILL)
    os.waitpid(sweep, 0)
    wait_for(tmp_path / "saved")


def wait_for(path) -> None:
    until = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < until, path
        time.sleep(0.02)


def test_a_log_that_cannot_be_written_ends_no_grid(tmp_path, monkeypatch):
    study = study_of(tmp_path, 2)
    study.log("run00").mkdir(parents=True)  # as a full disk would, open() raises OSError
    scheduler, _ = schedule(monkeypatch, study, lambda point: FINISH)
    assert "Is a directory" in scheduler.reasons["run00"] and ("finished", "run01") in events(study)


# ---- where it stands ----------------------------------------------------------------------------


def test_status_table(tmp_path, capsys):
    study = study_of(tmp_path, 4)
    for name in ("run00", "run01"):
        (study.results / name).mkdir()
    (study.results / "run00" / "summary.json").write_text(
        SUMMARY.replace('"wall_s": 1', '"wall_s": 7200')
    )
    (study.results / "run00" / "adapter").mkdir()
    (study.results / "run00" / "adapter" / "adapter_model.safetensors").touch()
    (study.results / "run01" / "args.json").write_text('{"planned_steps": 8}')
    line = '{"step": 1, "tokens": 90, "tok_per_s": 0.1}\n'
    (study.results / "run01" / "metrics.jsonl").write_text(2 * line + '{"step": 3, "tok')
    Scheduler(study, Stop()).fail("run02", "exit code 2: error: no room")
    assert status.print_status(study) == 1
    out = capsys.readouterr().out
    assert (
        "run00  finished  1/1   0.5000" in out
        and "run02  failed" in out
        and "run03  waiting" in out
    )
    assert "4 runs: 2 waiting, 1 finished, 1 failed" in out
    assert "about 6 h 00 min left, 1 at a time, 2 h 00 min per run (measured)" in out


def test_time_left_is_no_less_than_the_longest_run():
    states = [State("waiting"), State("running", 3, 4), State("finished", 4, 4)]
    assert status.time_left(states, 1, 100) == 125 and status.time_left(states, 8, 100) == 100


def test_missing_judgements_are_counted(tmp_path):
    study = study_of(tmp_path, 1, JUDGE="j")._replace(stages=["judge"])
    db = store.open_store(study.results / "judgements.sqlite")
    item = store.Item(**dict.fromkeys(store.Item._fields, ""))
    item = item._replace(model_id="run00", judge="j", bench="mt_bench")
    store.note_items(
        db, [item._replace(turn=turn, request_sha256=f"r{turn}") for turn in (1, 2, 3)]
    )
    for key, outcome in (("r1", "ok"), ("r2", "parse")):
        store.save_reply(db, key, {"judge": "j"}, {"status": outcome}, 7.0)
    db.close()
    assert status.verdicts_of(study, "mt_bench") == {"run00": store.Verdicts(asked=3, without=2)}
    assert not store.has_unreached(study.results)
    db = store.open_store(study.results / "judgements.sqlite")
    store.save_reply(db, "r3", {"judge": "j"}, {"status": "connection"}, 7.0)
    db.close()
    assert store.has_unreached(study.results)


def test_answers_that_judge_would_refuse_are_left_out(tmp_path):
    study = study_of(tmp_path, 3)
    for number, name in enumerate(("base", "run00", "run01", "run02")):
        folder = study.results / name / "mt_bench"
        folder.mkdir(parents=True)
        (folder.parent / "args.json").write_text("{}")
        rows = [
            {
                "question_id": q,
                "choices": [{"index": 0, "turns": ["a", "" if number == 2 else "b"]}],
            }
            for q in (1, 2)
        ]
        (folder / "answers.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows[: 1 + (number != 3)])
        )
    scheduler = Scheduler(study, Stop())
    assert [path.name for path in scheduler.judgeable_runs("mt_bench")] == ["base", "run00"]
    assert "2 of 2 answers have an empty turn" in scheduler.reasons["run01"]


# ---- preflight ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mt_bench(tmp_path_factory) -> str:
    """The folder that prep_data.py --mt_bench makes."""
    folder = tmp_path_factory.mktemp("prepared") / "mt_bench"
    done = run_script("prep_data.py", "--mt_bench", "nvidia", "--out", folder)
    assert done.returncode == 0, done.stderr
    return str(folder)


@pytest.fixture
def ready(tmp_path, monkeypatch, tiny_model, pairs_folder, mt_bench, server):
    """A study with data, model and a judge; its plan without the wait for train_pref.py
    --dry_run.
    """
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    monkeypatch.setattr(
        preflight, "plan_of", lambda study, point: preflight.Plan(159, 12_000_000, 2.5, 0.6, 1.8)
    )
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    settings = {
        "MODEL": str(tiny_model),
        "DATA": str(pairs_folder),
        "MT_BENCH": mt_bench,
        "JUDGE": "j",
    }
    study = study_of(
        tmp_path, 4, BASE_URL=server.url, JUDGE_ARGS="--price_in 1 --price_out 4", **settings
    )
    return study._replace(stages=list(grid.STAGES))


def test_preflight_says_what_it_will_take(ready, capsys, server):
    preflight.preflight(ready)
    out = capsys.readouterr().out
    assert "4 runs, 4 to train" in out and "memory: 1 runs at a time on the CPU, 2.5 of" in out
    assert "disk: 9.0 GiB for adapters and checkpoints" in out
    assert "per run (assumed: 12,000,000 tokens per run at 4 x" in out
    # 850 tokens are about what MT-Bench's judge prompts with answers of 1,200 characters have.
    assert "judge of MT-Bench: j answers; about 800 calls; about 1.48 dollars" in out
    assert "(assumed: 847 + 250 tokens per call)" in out
    assert len(server.requests) == 1 and "secret-key" not in out


def test_preflight_names_every_problem_with_its_remedy(ready, monkeypatch, server):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    monkeypatch.setattr(
        preflight, "plan_of", lambda study, point: preflight.Plan(159, 12_000_000, 1e4, 0.6, 1.8)
    )
    server.answer = lambda body: (401, {"error": {"message": "no"}})
    with pytest.raises(UserError) as caught:
        preflight.preflight(ready)
    said = str(caught.value)
    assert "nothing was started" in said and "lower JOBS, or lower --per_device_batch" in said
    assert "1.0 free" in said and "free some space" in said
    assert "it refuses the key; export OPENAI_API_KEY" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"DATA": "nowhere"}, "DATA=nowhere: no train.jsonl there; make it with prep_data.py"),
        ({"MODEL": "/no/model"}, "MODEL=/no/model: no model there"),
        ({"MT_BENCH": "nowhere"}, "run python prep_data.py --mt_bench"),
        ({"JUDGE": "hf:/no/judge", "BASE_URL": ""}, "JUDGE=/no/judge: no model there"),
        ({"BASE_URL": "http://127.0.0.1:9/v1"}, "no server answers"),
        ({"JUDGE_ARGS": "--repeats 0"}, "--repeats 0: must be at least 1"),
        ({"GEN_ARGS": "--max_new_tokens 0"}, "--max_new_tokens 0: must be at least 1"),
    ],
)
def test_preflight_finds(ready, change, said):
    with pytest.raises(UserError, match=said):
        preflight.preflight(ready._replace(settings=ready.settings | change))


def test_preflight_wants_a_key(ready, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        preflight.preflight(ready)


def test_a_gpu_that_is_in_use_is_named(ready, monkeypatch):
    monkeypatch.setattr(commands, "gpus", lambda: ["0", "1"])
    monkeypatch.setattr(preflight, "free_gib_of", {"0": 70.0, "1": 1.5}.get)
    plan = preflight.Plan(159, 12_000_000, 12.5, 0.6, 1.8)
    with pytest.raises(
        UserError, match="GPU 1 has 1.5 GiB free, a run needs 12.5; stop what runs there"
    ):
        preflight.check_memory(ready, plan)


def test_it_asks_before_it_starts_unless_told_not_to(ready, monkeypatch):
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr("builtins.input", lambda text: "n")
    preflight.preflight(ready)  # --yes
    with pytest.raises(UserError, match="--yes starts without asking"):
        preflight.preflight(
            ready._replace(args=Namespace(grid="quick", nodes=1, index=None, yes=False))
        )


# ---- the command --------------------------------------------------------------------------------


def sweep(*args, cwd=ROOT, **environment) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHON": sys.executable, **environment}
    command = ["bash", str(ROOT / "sweep.sh"), *args]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, timeout=240)


@pytest.mark.slow
def test_dry_run_prints_every_command_in_order_from_any_folder(tmp_path):
    (tmp_path / "else where").mkdir()
    done = sweep(
        "--dry_run", cwd=tmp_path / "else where", JUDGE="j", MODEL="a folder/model", LOGP="sum mean"
    )
    commands = [shlex.split(line)[1:] for line in done.stdout.splitlines()]
    assert [os.path.basename(c[1]) for c in commands[120:]] == [
        "gen_mtbench.py",
        "judge.py",
        "analyze.py",
    ]
    trained = [parse_args(command[2:]) for command in commands[:120]]
    assert {args.model for args in trained} == {"a folder/model"}
    ids = {run_id_of(args, arguments.loss_parameters(args), parse_args([])) for args in trained}
    assert len(ids) == 120


def test_sweep_sh_finds_the_environment_beside_it(tmp_path):
    """Without PYTHON it takes .venv beside the script, not whatever `python` is on the PATH."""
    shutil.copy(ROOT / "sweep.sh", tmp_path / "sweep.sh")
    (tmp_path / "train_pref.py").touch()
    interpreter = tmp_path / ".venv" / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text('#!/bin/sh\necho "$0 $*"\n')
    interpreter.chmod(0o755)
    env = {key: value for key, value in os.environ.items() if key != "PYTHON"}
    command = ["bash", str(tmp_path / "sweep.sh"), "quick", "--list"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout.splitlines()[-1] == f"{interpreter} -m pref.sweeping quick --list"


def test_the_commands_that_only_look(capsys, monkeypatch):
    assert sweeping.main(["quick", "--list"]) == 0
    listed = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [int(number) for number, _ in listed] == list(range(9))
    monkeypatch.setattr(sweeping.task_folder, "prepare", lambda study: None)
    monkeypatch.setattr(sweeping, "sweep", lambda study: [p.run_id for p in study.points])
    assert sweeping.main(["quick", "--index", "3"]) == [listed[3][1]]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    assert sweeping.main(["quick"]) == [listed[4][1]]
    assert sweeping.parse_args(["quick", "--stages", "gen,judge"]).index is None
    with pytest.raises(UserError, match="--index 9: the grid has points 0 to 8"):
        sweeping.main(["quick", "--index", "9"])
    with pytest.raises(UserError, match="JUDGE is not set"):
        sweeping.main(["tddpo", "--stages", "judge", "--dry_run"])
    with pytest.raises(UserError, match="no such grid; use one of controlled, discopop_paper"):
        sweeping.main(["nothing", "--list"])


def test_nodes_meet_by_slurms_first_machine_or_by_rdzv(tmp_path, monkeypatch):
    study = study_of(tmp_path, 1)
    study.args.nodes = 2
    with pytest.raises(UserError, match="RDZV is not set; set RDZV=HOST:PORT"):
        commands.train_command(study, study.points[0], [])
    monkeypatch.setenv("RDZV", "node1:29500")
    command = shlex.join(commands.train_command(study, study.points[0], []))
    assert "--nnodes 2 --rdzv_backend c10d --rdzv_id run00 --rdzv_endpoint node1:29500" in command
    assert not command.startswith("srun")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert commands.train_command(study, study.points[0], [])[:4] == [
        "srun",
        "--overlap",
        "--nodes",
        "2",
    ]


@pytest.mark.slow
def test_two_agents_are_one_agent_with_two_ranks(tmp_path, tiny_model, pairs_folder, monkeypatch):
    """Two machines that meet at an address of loopback: the commands that sweep.sh starts on
    them.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RDZV", f"127.0.0.1:{free.getsockname()[1]}")
    small = ("--max_steps", "2", "--run_id", "run")
    study = study_of(tmp_path, 1, NPROC="1")
    study.args.nodes = 2
    args = train_args(tiny_model, pairs_folder, tmp_path / "two", *small)
    command = commands.train_command(study, Point(0, "run", list(map(str, args))), [])
    environment = os.environ | commands.TORCHRUN_ENVIRONMENT
    agents = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [agent.wait(timeout=240) for agent in agents] == [0, 0]
    args = train_args(tiny_model, pairs_folder, tmp_path / "one", *small)
    assert run_script("train_pref.py", *args, torchrun=2).returncode == 0
    one, two = (
        load_file(tmp_path / name / "run" / "adapter" / "adapter_model.safetensors")
        for name in ("one", "two")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert json.loads((tmp_path / "two" / "run" / "args.json").read_text())["world_size"] == 2


# ---- wandb --------------------------------------------------------------------------------------


def test_wandb_gets_the_rows_of_metrics(tmp_path, tiny_model, pairs_folder, monkeypatch):
    rows, given = [], {}
    double = SimpleNamespace(
        log=lambda values, step: rows.append(json.loads(json.dumps(values)) | {"step": step})
    )
    module = SimpleNamespace(
        init=lambda **kwargs: given.update(kwargs) or double, Error=RuntimeError, __spec__=object()
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    args = train_args(
        tiny_model,
        pairs_folder,
        tmp_path,
        "--max_steps",
        "2",
        "--run_id",
        "run",
        "--report_to",
        "wandb",
    )
    assert train_pref.main([str(a) for a in args]) == 0
    assert rows == metrics_of(tmp_path / "run") and len(rows) == 4
    assert (given["name"], given["resume"]) == ("run", "allow")
    assert "report_to" not in json.loads((tmp_path / "run" / "args.json").read_text())


def test_wandb_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        arguments.check_args(parse_args(["--report_to", "wandb"]), world=1)
