"""train_pref.py stopped, killed, refused and continued: the result is that of an undisturbed
run.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, run_script
from killing import TOOLS
from safetensors.torch import load_file, save_file
from test_train import metrics_of, train, train_args, val_pairs

import train_pref
from pref.files import disk, run_folders
from pref.files.console import UserError
from pref.model import logps
from pref.model.loading import load_base
from pref.model.logps import ResponseLogps
from pref.model.lora import adapter_off, add_lora
from pref.model.packing import Packing, make_batch
from pref.training import assembly, checkpoint, signals, tokenising

TIMES = {"tok_per_s", "peak_gib", "wall_s", "save_s"}  # what two equal runs may differ in


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """A script's background job ignores Ctrl-C, and tests started there would too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def arguments(tiny_model, pairs_folder):
    """Eight steps of three micro-batches and 8 pairs; the fourth and the last have 6 pairs."""
    steps = "--run_id run --epochs 2 --eval_steps 2 --save_steps 2"
    steps += " --tokens_per_microbatch 500 --lora_dropout 0.1"

    def build(results, *more) -> list[str]:
        given = train_args(tiny_model, pairs_folder, results, *steps.split(), *more)
        return [str(a) for a in given]

    return build


@pytest.fixture(scope="module")
def undisturbed(arguments, tmp_path_factory):
    results = tmp_path_factory.mktemp("undisturbed")
    assert train_pref.main(arguments(results)) == 0
    return results / "run"


def untimed(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in TIMES}


def content_of(run) -> dict:
    """Everything that must be equal: the bytes of weights and validation pairs, and metrics and
    summary without times.
    """
    paths = [*run_folders.weights_of(run).iterdir(), run / "val_pairs.jsonl"]
    return {path.name: path.read_bytes() for path in paths} | {
        "metrics": [untimed(line) for line in metrics_of(run)],
        "summary": untimed(json.loads((run / "summary.json").read_text())),
    }


def assert_same(run, expected) -> None:
    one, two = content_of(run), content_of(expected)
    assert one.keys() == two.keys()
    for key in one:
        assert one[key] == two[key], key
    assert not (run / "checkpoint").exists()


def signal_at(
    monkeypatch, call: int, number: int, module=train_pref.Study, function: str = "pair_logps"
) -> None:
    """Send this process a signal in the given call of `module`'s `function`."""
    original, calls = getattr(module, function), iter(range(1, 10**6))

    def sending(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, function, sending)


def stop_at(monkeypatch, given, call: int, number: int = signal.SIGTERM) -> int:
    with monkeypatch.context() as patch:
        signal_at(patch, call, number)
        return train_pref.main(given)


@pytest.fixture(scope="module")
def stopped(arguments, tmp_path_factory):
    """A run stopped after a few steps."""
    return stopped_at(15, arguments, tmp_path_factory.mktemp("stopped"))


@pytest.fixture(scope="module")
def stopped_late(arguments, tmp_path_factory):
    """A run stopped when it has two checkpoints."""
    return stopped_at(27, arguments, tmp_path_factory.mktemp("stopped_late"))


def stopped_at(call: int, arguments, folder):
    with pytest.MonkeyPatch.context() as patch:
        assert stop_at(patch, arguments(folder), call) == 75
    return folder


# ---- stopped by a signal ------------------------------------------------------------------------

# In train_pref.py, pair_logps is called four times for the first step's pairs and for each
# evaluation, and three or four times per step.
MOMENTS = {
    "first step's pairs": 1,
    "first step": 8,
    "middle of a step": 14,
    "an evaluation": 17,
    "late": 28,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "number", "code"),
    [
        ("first step's pairs", signal.SIGTERM, 75),
        ("first step", signal.SIGINT, 130),
        ("middle of a step", signal.SIGUSR1, 75),
        ("an evaluation", signal.SIGTERM, 75),
        ("late", signal.SIGUSR1, 75),
    ],
)
def test_a_signal_saves_and_the_same_command_continues(
    undisturbed, arguments, tmp_path, monkeypatch, capsys, moment, number, code
):
    given = arguments(tmp_path)
    assert stop_at(monkeypatch, given, MOMENTS[moment], number) == code
    assert "the same command continues" in capsys.readouterr().out
    run = tmp_path / "run"
    assert list((run / "checkpoint").glob("step-*.safetensors"))
    assert not (run / "summary.json").exists()
    assert not (run / "adapter").exists()  # nothing that a later stage could take for a result
    assert train_pref.main(given) == 0
    assert_same(run, undisturbed)
    steps = [start["step"] for start in json.loads((run / "args.json").read_text())["starts"]]
    assert len(steps) == 2 or moment == "first step's pairs"


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [("--loss", "beta_dpo", "--per_device_batch", "3"), ("--loss", "dlrml", "--learn_beta_mix")],
    ids=" ".join,
)
def test_what_a_loss_learns_is_saved_too(arguments, tmp_path, monkeypatch, loss):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train_pref.main(arguments(whole, *loss)) == 0
    assert stop_at(monkeypatch, arguments(cut, *loss), 15) == 75
    assert train_pref.main(arguments(cut, *loss)) == 0
    assert_same(cut / "run", whole / "run")


def test_before_the_first_step_a_signal_ends_the_process_at_once(
    arguments, tmp_path, monkeypatch, capfd
):
    signal_at(monkeypatch, 1, signal.SIGTERM, tokenising, "tokenise")
    with pytest.raises(SystemExit) as stopped:
        train_pref.main(arguments(tmp_path))
    assert stopped.value.code == 75 and "nothing to save" in capfd.readouterr().err


@pytest.mark.slow
def test_handlers_are_put_back_and_what_is_ignored_stays_ignored(arguments, tmp_path, monkeypatch):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    before = [signal.getsignal(number) for number in signals.Stop.SIGNALS]
    assert stop_at(monkeypatch, arguments(tmp_path, "--max_steps", "2"), 4, signal.SIGINT) == 0
    assert [signal.getsignal(number) for number in signals.Stop.SIGNALS] == before


# ---- killed -------------------------------------------------------------------------------------

KILLED = f"""{TOOLS}
from pref.training import checkpoint, run_folder

def half_a_line(original, row):
    with open(sys.argv[sys.argv.index("--results_dir") + 1] + "/run/metrics.jsonl", "a") as file:
        file.write(original(row)[:50])
    die()

moment = sys.argv.pop(1)
if moment == "writing a checkpoint":
    at(checkpoint, "save_file", 2, half_a_file)
elif moment == "writing a line of metrics":
    at(disk, "jsonl_line", 3, half_a_line)
elif moment == "between best adapter and checkpoint":
    at(run_folder, "save_best", 1, after)
elif moment == "between adapter and summary":
    before_the_summary()
sys.exit(train_pref.main())
"""


@pytest.mark.slow
def test_killed_four_times_the_run_is_the_same(undisturbed, arguments, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    for moment in (
        "between best adapter and checkpoint",
        "writing a checkpoint",
        "writing a line of metrics",
        "between adapter and summary",
    ):
        done = run_script(script, moment, *arguments(tmp_path))
        assert done.returncode == -signal.SIGKILL, (moment, done.stderr)
        assert not (tmp_path / "run" / "summary.json").exists()
    assert (tmp_path / "run" / "adapter").is_dir()
    assert train_pref.main(arguments(tmp_path)) == 0
    assert_same(tmp_path / "run", undisturbed)


# ---- ranks --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_stop_together_and_continue(undisturbed, arguments, tmp_path, monkeypatch):
    """Begun by one process, continued by two that torchrun stops with its own SIGTERM, then by two
    again.
    """
    run, given = tmp_path / "run", arguments(tmp_path, "--lora_dropout", "0", "--epochs", "6")
    assert stop_at(monkeypatch, given, 15) == 75
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    launcher.append(str(ROOT / "train_pref.py"))
    lines = len(metrics_of(run))
    process = subprocess.Popen(
        [sys.executable, *launcher, *given], stdout=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 120
    while len(complete_lines(run)) < lines + 3 and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert "the same command continues:\n  torchrun --nproc_per_node 2" in output
    done = run_script("train_pref.py", *given, torchrun=2)
    assert done.returncode == 0, done.stderr
    starts = json.loads((run / "args.json").read_text())["starts"]
    assert [start["world_size"] for start in starts] == [1, 2, 2]
    assert 2 <= starts[1]["step"] < starts[2]["step"] < 24
    whole = tmp_path / "whole"
    assert train_pref.main(arguments(whole, "--lora_dropout", "0", "--epochs", "6")) == 0
    for one, two in zip(metrics_of(run), metrics_of(whole / "run"), strict=True):
        assert one.keys() == two.keys() and one["step"] == two["step"]
        if "loss" in one:
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-4, abs=1e-5)
    weights, expected = (
        load_file(folder / "adapter" / "adapter_model.safetensors")
        for folder in (run, whole / "run")
    )
    assert all(torch.allclose(weights[name], expected[name], atol=1e-4) for name in weights)


def complete_lines(run) -> list[str]:
    return (run / "metrics.jsonl").read_text().split("\n")[:-1]


FAULTY = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train_pref
original, fault = train_pref.Study.loss, float(sys.argv.pop(1))

def loss(study, inputs):
    values, terms = original(study, inputs)
    if os.environ["RANK"] == "1" and study.progress.step == 1 and values.requires_grad:
        values.register_hook(lambda gradient: gradient * fault)
    return values, terms

train_pref.Study.loss = loss
sys.exit(train_pref.main())
"""


@pytest.mark.slow
def test_an_infinite_gradient_on_one_rank_stops_the_step_on_all(arguments, tmp_path):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    done = run_script(script, "inf", *arguments(tmp_path, "--max_steps", "3"), torchrun=2)
    assert done.returncode == 0, done.stderr[-2000:]
    steps = [line for line in metrics_of(tmp_path / "run") if "lr" in line]
    assert [line["nonfinite"] for line in steps] == [0, 1, 1] and steps[1]["grad_norm"] is None
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"


def test_a_step_with_a_nan_is_not_taken(arguments, tmp_path, monkeypatch):
    original, seen = train_pref.Study.loss, {}

    def loss(study, inputs):
        values, terms = original(study, inputs)
        step = study.progress.step
        seen.setdefault(
            step, {n: p.detach().clone() for n, p in logps.trainable(study.policy).items()}
        )
        return values * (float("nan") if step == 2 and values.requires_grad else 1.0), terms

    monkeypatch.setattr(train_pref.Study, "loss", loss)
    assert train_pref.main(arguments(tmp_path, "--max_steps", "4")) == 0
    steps = [line for line in metrics_of(tmp_path / "run") if "lr" in line]
    assert [line["nonfinite"] for line in steps] == [0, 0, 1, 1] and steps[2]["loss"] is None
    moved = [any(not torch.equal(seen[k][n], seen[k + 1][n]) for n in seen[k]) for k in range(3)]
    assert moved == [True, True, False]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["nonfinite_steps"] == 1


# ---- disks and damage ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: os.truncate(path, path.stat().st_size - 1000), "damaged"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x55"),
            "damaged (its checksum is wrong)",
        ),
        (lambda path: path.write_bytes(b""), "damaged"),
        (
            lambda path: shutil.rmtree(path.parent / "best-000004"),
            "damaged (best-000004 is missing)",
        ),
        (
            lambda path: spoil(path.parent / "best-000004"),
            "damaged (the adapter in best-000004 is not the one that was saved",
        ),
    ],
    ids=["truncated", "one byte", "empty", "best adapter lost", "best adapter damaged"],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    undisturbed, stopped_late, arguments, tmp_path, capsys, damage, message
):
    given, checkpoints = arguments(tmp_path), tmp_path / "run" / "checkpoint"
    shutil.copytree(stopped_late / "run", tmp_path / "run")
    older, newest = sorted(checkpoints.glob("step-*.safetensors"))
    if "best" in message:
        shutil.copytree(
            checkpoints / "best-000002", checkpoints / "best-000004", dirs_exist_ok=True
        )
        rewrite(newest, best_step=4)
    damage(newest)
    capsys.readouterr()
    assert train_pref.main(given) == 0
    out = capsys.readouterr().out
    assert f"{newest.name}: {message}" in out
    assert f"continued after step {int(older.stem[5:])}" in out
    assert_same(tmp_path / "run", undisturbed)


def spoil(best) -> None:
    weights = best / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")


def rewrite(path, **changes) -> None:
    """A whole checkpoint with other progress."""
    tensors, progress = load_file(path), checkpoint.progress_in(path)
    weights = path.parent / "best-000004" / "adapter" / "adapter_model.safetensors"
    changes["best_sha256"] = disk.sha256_file(weights)
    text = json.dumps(checkpoint.asdict(progress) | changes)
    save_file(
        tensors, path, metadata={"progress": text, "sha256": checkpoint.digest(tensors, text)}
    )


@pytest.mark.slow
def test_without_a_whole_checkpoint_the_run_starts_over(
    undisturbed, stopped_late, arguments, tmp_path, capsys
):
    given = arguments(tmp_path)
    shutil.copytree(stopped_late / "run", tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoint").glob("step-*"):
        path.write_bytes(b"nothing")
    assert train_pref.main(given) == 0
    assert "starting over" in capsys.readouterr().out
    assert_same(tmp_path / "run", undisturbed)


LIMITED = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import train_pref
from pref.files.console import run_main
resource.setrlimit(resource.RLIMIT_FSIZE, ({{bytes}}, {{bytes}}))
run_main(train_pref.main)
"""


@pytest.mark.slow
def test_a_full_disk_is_an_error_and_the_checkpoint_before_stays(
    undisturbed, stopped, arguments, tmp_path
):
    """A limit on the size of files acts as a full disk: the write fails half-way."""
    given, checkpoints = arguments(tmp_path), tmp_path / "run" / "checkpoint"
    shutil.copytree(stopped / "run", tmp_path / "run")
    (saved,) = checkpoints.glob("step-*.safetensors")
    before = saved.read_bytes()
    script = tmp_path / "limited.py"
    script.write_text(LIMITED.format(bytes=len(before) // 2))
    done = run_script(script, *given)
    assert done.returncode == 2, done.stderr
    assert (
        "not written" in done.stderr
        and "File too large" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert list(checkpoints.glob("step-*")) == [saved] and saved.read_bytes() == before
    assert train_pref.main(given) == 0
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.skipif(
    not os.path.isdir("/sys/kernel"), reason="needs a folder that even root cannot write to"
)
def test_results_that_cannot_be_written_are_reported_before_the_model_is_loaded(
    arguments, monkeypatch
):
    monkeypatch.setattr(assembly, "build_policy", lambda *_: pytest.fail("loaded"))
    with pytest.raises(OSError, match="/sys/kernel"):
        train_pref.main(arguments("/sys/kernel/results"))


# ---- another run, another process ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--learning_rate", "2e-3"), "learning_rate was 0.001, is 0.002"),
        (("--beta", "0.5", "--seed", "1"), "seed was 42, is 1, beta was 0.05, is 0.5"),
        (("--global_batch", "4"), "global_batch was 8, is 4"),
        (("--epochs", "3"), "epochs was 2.0, is 3.0"),
    ],
)
def test_other_arguments_are_refused_by_name(stopped, arguments, more, message):
    with pytest.raises(UserError, match=message):
        train_pref.main(arguments(stopped, *more))
    assert list((stopped / "run" / "checkpoint").glob("step-*"))


def test_other_data_model_and_template_are_refused_by_name(
    stopped, arguments, tiny_model, pairs_folder, tmp_path
):
    data, model = tmp_path / "data", tmp_path / "elsewhere" / tiny_model.name
    shutil.copytree(pairs_folder, data)
    lines = (data / "train.jsonl").read_text().splitlines(keepends=True)
    (data / "train.jsonl").write_text("".join(lines[1:]))
    refused(arguments(stopped, "--data", data), "the pairs in --data have changed")
    shutil.copytree(tiny_model, model)
    template = model / "chat_template.jinja"
    original = template.read_text()
    template.write_text(original.replace("'\n' + m['content']", "'\n ' + m['content']"))
    refused(arguments(stopped, "--model", model), "another tokenizer or chat template")
    template.write_text(original)
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][541, 3] += 0.5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    refused(arguments(stopped, "--model", model), "weights or configuration have changed")


def refused(given, message) -> None:
    with pytest.raises(UserError, match=message):
        train_pref.main(given)
    torch.distributed.destroy_process_group()  # the next call in the same test makes its own


def test_coupling_losses_are_not_continued_with_other_micro_batches(
    arguments, tmp_path, monkeypatch
):
    given = arguments(tmp_path, "--loss", "aot", "--per_device_batch", "4")
    assert stop_at(monkeypatch, given, 10) == 75
    refused([*given, "--per_device_batch", "2"], "per_device_batch was 4, is 2")


@pytest.mark.slow
def test_a_run_of_version_1_0_0_from_a_model_that_was_moved_is_continued(
    undisturbed, stopped, arguments, tiny_model, tmp_path
):
    """Its record has only a sample of the weights; a difference in these is still noticed."""
    run, model = shutil.copytree(stopped / "run", tmp_path / "run"), tmp_path / "moved"
    shutil.copytree(tiny_model, model)
    record = json.loads((run / "args.json").read_text())
    del record["model_sha256"]
    (run / "args.json").write_text(json.dumps(record | {"base_sha256": "0" * 64}))
    refused(arguments(tmp_path, "--model", model), "base model's weights, as loaded, have changed")
    (run / "args.json").write_text(json.dumps(record))
    assert train_pref.main(arguments(tmp_path, "--model", model)) == 0
    one, two = content_of(run), content_of(undisturbed)
    assert json.loads(one.pop("adapter_config.json"))["base_model_name_or_path"] == str(model)
    two.pop("adapter_config.json")
    one.pop("README.md"), two.pop("README.md")  # PEFT's, which names the base too
    assert one == two


@pytest.mark.slow
def test_what_may_change_may_change(undisturbed, stopped, arguments, pairs_folder, tmp_path):
    shutil.copytree(stopped / "run", tmp_path / "run")
    shutil.copytree(pairs_folder, tmp_path / "data")
    assert (
        train_pref.main(arguments(tmp_path, "--save_steps", "3", "--data", tmp_path / "data")) == 0
    )
    assert_same(tmp_path / "run", undisturbed)


def test_the_second_process_on_a_run_is_refused(arguments, tmp_path):
    """The lock is the kernel's: the file that a killed process leaves behind locks nothing."""
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as file:
        file.write("process 7 on elsewhere")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(arguments(tmp_path), "is being trained by process 7 on elsewhere")
        assert disk.lock_holder(tmp_path / "run") == "process 7 on elsewhere"
    assert disk.lock_holder(tmp_path / "run") is None
    assert train_pref.main(arguments(tmp_path, "--max_steps", "1")) == 0


def test_status_of_a_run_that_diverged_at_once(undisturbed, tmp_path, capsys):
    shutil.copytree(undisturbed, tmp_path / "run")
    summary = json.loads((undisturbed / "summary.json").read_text())
    summary |= {"status": "diverged", "best_acc_ref": None, "best_step": None}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    assert train_pref.main(["--status", str(tmp_path)]) == 0
    assert "diverged after 8 steps; no adapter" in capsys.readouterr().out


def test_status_shows_how_to_continue(undisturbed, stopped, tmp_path, capsys):
    shutil.copytree(undisturbed, tmp_path / "whole")
    shutil.copytree(stopped / "run", tmp_path / "half")
    assert train_pref.main(["--status", str(tmp_path / "whole")]) == 0
    assert "whole: finished after 8 steps; best acc_ref" in capsys.readouterr().out
    assert train_pref.main(["--status", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    newest = max((tmp_path / "half" / "checkpoint").glob("step-*"))
    saved = checkpoint.progress_in(newest).step
    assert f"half: stopped, saved after step {saved} of 8; continue with\n    python" in output
    assert "1 of 2 runs have ended" in output


# ---- training from an adapter -------------------------------------------------------------------


@pytest.fixture(scope="module")
def sft(tiny_model, own_pairs, tmp_path_factory):
    """The adapter of a short SFT run, different from the base."""
    results = tmp_path_factory.mktemp("sft")
    more = "--loss sft --learning_rate 2e-2 --run_id sft --lora_r 8 --lora_alpha 8"
    assert train(*train_args(tiny_model, own_pairs, results, *more.split())) == 0
    return results / "sft" / "adapter"


def from_adapter(tiny_model, own_pairs, results, adapter, *more) -> list[str]:
    more = ("--run_id", "run", "--init_adapter", adapter, *more)
    given = [str(a) for a in train_args(tiny_model, own_pairs, results, *more)]
    place = given.index("--lora_r")  # the adapter brings its own
    return [*given[:place], *given[place + 2 :]]


def test_the_reference_has_no_dropout(tiny_model, pairs_folder, sft):
    """A live reference runs inside a training step, where the policy's dropout is on."""
    base = load_base(str(tiny_model), torch.float32, "none", torch.device("cpu"))
    policy = ResponseLogps(add_lora(base, 0, 0, 0.5, "", 1, sft).train())
    pairs = val_pairs(tiny_model, pairs_folder)[:2]
    batch = make_batch(pairs, Packing(2), torch.device("cpu"))
    with torch.no_grad():
        assert not torch.equal(policy(batch)[0], policy(batch)[0])
        with adapter_off(policy):
            assert torch.equal(policy(batch)[0], policy(batch)[0])


@pytest.mark.slow
def test_the_reference_of_an_adapter_is_cached_for_itself(
    tiny_model, own_pairs, tmp_path, sft, capsys
):
    """One file for the base, another for the adapter; loss and seed share it."""
    data = tmp_path / "data"
    shutil.copytree(own_pairs, data, ignore=shutil.ignore_patterns("reference"))
    for number, more in enumerate(((), ("--loss", "dpo", "--seed", "3"))):
        given = from_adapter(
            tiny_model, data, tmp_path / str(number), sft, "--max_steps", "1", *more
        )
        assert train_pref.main(given) == 0
        assert capsys.readouterr().out.count("read from") == 2 * number
    assert train(*train_args(tiny_model, data, tmp_path, "--max_steps", "1")) == 0
    assert "read from" not in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupted_run_from_an_adapter_continues(
    tiny_model, own_pairs, tmp_path, sft, monkeypatch
):
    whole, cut = (
        from_adapter(tiny_model, own_pairs, tmp_path / name, sft) for name in ("whole", "cut")
    )
    assert train_pref.main(whole) == 0
    assert stop_at(monkeypatch, cut, 5) == 75
    assert train_pref.main(cut) == 0
    assert_same(tmp_path / "cut" / "run", tmp_path / "whole" / "run")


def test_adapters_that_do_not_fit_are_refused(tiny_model, own_pairs, tmp_path, sft):
    def given(adapter, *more):
        return from_adapter(tiny_model, own_pairs, tmp_path, adapter, *more)

    refused(given(tmp_path), "no adapter there")
    refused(given(sft, "--lora_r", "16"), "--lora_r 16: the adapter in --init_adapter has 8")
    other = tmp_path / "other"
    shutil.copytree(sft, other)
    config = json.loads((sft / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    refused(given(other), "plain LoRA adapters only, this one has use_dora")
    (other / "adapter_config.json").write_text(json.dumps(config | {"r": 4}))
    refused(given(other), "does not fit this model")
