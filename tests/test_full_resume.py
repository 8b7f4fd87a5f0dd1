"""train_pref.py --tune full, stopped, killed, short of disk and continued: the result is that of an
undisturbed run, and it is a model that transformers loads.
"""

import json
import os
import shutil
import signal

import pytest
import torch
from conftest import ROOT, run_script
from killing import TOOLS
from safetensors import safe_open
from test_architectures import config_of
from test_resume import (
    LIMITED,
    TIMES,
    assert_same,
    ctrl_c_is_heard,  # noqa: F401
    metrics_of,
    refused,
    stop_at,
)
from test_train import PACKING, val_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_pref
from pref.files import disk, run_folders
from pref.model import model_folder, weights
from pref.model.logps import ResponseLogps, sum_by_row
from pref.model.packing import make_batch
from pref.training import assembly, checkpoint, disk_room

RUN = (
    "--tune full --loss dpo --beta 0.1 --dtype float32 --learning_rate 1e-3 --global_batch 8 "
    "--epochs 2 --eval_steps 2 --save_steps 2 --tokens_per_microbatch 500 --run_id run"
)


@pytest.fixture(scope="module")
def arguments(tiny_model, pairs_folder):
    """Eight steps of 8 pairs; a tied head."""

    def build(results, *more) -> list[str]:
        folders = ["--model", tiny_model, "--data", pairs_folder, "--results_dir", results]
        return [str(a) for a in (*folders, *RUN.split(), *more)]

    return build


@pytest.fixture(scope="module")
def undisturbed(arguments, tmp_path_factory):
    results = tmp_path_factory.mktemp("undisturbed")
    assert train_pref.main(arguments(results)) == 0
    return results / "run"


@pytest.fixture(scope="module")
def stopped(arguments, tmp_path_factory):
    """A run stopped late, with two checkpoints."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        assert stop_at(patch, arguments(folder), 27) == 75
    return folder


def states(run) -> list[str]:
    return sorted(path.name for path in (run / "checkpoint").glob("step-*"))


# ---- what a run leaves --------------------------------------------------------------------------


@torch.no_grad()
def check_model(run, start, pairs_folder) -> None:
    """transformers' log-probs of the validation pairs, by the published model, are those that the
    run has written; the tokenizer is that of the model in `start`.
    """
    folder = run_folders.weights_of(run)
    weights.find_model(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.float32 and model.config.use_cache
    lines = [row for _, row in disk.read_jsonl(run / "val_pairs.jsonl")]
    best = json.loads((run / "summary.json").read_text())["best_step"]
    written, before = (
        torch.tensor([[r["policy_chosen"], r["policy_rejected"]] for r in lines if r["step"] == n])
        for n in (best, 0)
    )
    policy, pairs = ResponseLogps(model, "eager"), val_pairs(start, pairs_folder)
    batch = make_batch(pairs, PACKING._replace(padded=True, shared=False), torch.device("cpu"))
    sums = sum_by_row(policy(batch).logps, batch).view(2, -1).T
    assert torch.allclose(sums, written, atol=1e-3)
    assert (written - before).abs().max() > 0.1
    messages = [{"role": "user", "content": "Hi"}]
    ours, theirs = (AutoTokenizer.from_pretrained(f) for f in (folder, start))
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)


def test_the_model_is_the_best_one_and_loads_as_it_is(undisturbed, tiny_model, pairs_folder):
    check_model(undisturbed, tiny_model, pairs_folder)
    assert not (undisturbed / "adapter").exists()
    with safe_open(undisturbed / "model" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma", "qwen2", "mistral", "mixtral", "gpt2", "olmo2"])
def test_architectures_are_trained_saved_and_loaded(kind, tiny_model, pairs_folder, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(tiny_model, start, ignore=shutil.ignore_patterns("model*", "config.json"))
    torch.manual_seed(0)
    sizes = {"vocab_size": 600, "eos_token_id": 2, "pad_token_id": 2}
    sizes["n_positions" if kind == "gpt2" else "max_position_embeddings"] = 2048
    AutoModelForCausalLM.from_config(config_of(kind, **sizes)).float().save_pretrained(start)
    folders = ["--model", start, "--data", pairs_folder, "--results_dir", tmp_path]
    given = [*folders, *RUN.split(), "--max_steps", "2", "--learning_rate", "1e-2"]
    assert train_pref.main([str(argument) for argument in given]) == 0
    check_model(tmp_path / "run", start, pairs_folder)


@pytest.mark.slow
def test_a_frozen_part_is_in_the_model_and_not_in_checkpoints(arguments, tmp_path, monkeypatch):
    """In bf16, with FSDP on one rank. Embedding and head, which are one tensor, are frozen."""
    given = arguments(tmp_path, "--dtype", "bfloat16", "--freeze", "embed_tokens")
    assert stop_at(monkeypatch, given, 12) == 75
    (state,) = states(tmp_path / "run")
    with safe_open(
        tmp_path / "run/checkpoint" / state / "rank-00000-part-0000.safetensors", "pt"
    ) as file:
        keys = [key for key in file.keys() if "embed_tokens" in key or "lm_head" in key]  # noqa: SIM118
        assert keys == [] and file.get_tensor("value/" + NORM).dtype == torch.float32
    assert train_pref.main(given) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype="auto")
    start = AutoModelForCausalLM.from_pretrained(given[1], dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    same = {
        name: torch.equal(tensor, other)
        for (name, tensor), other in zip(model.named_parameters(), start.parameters())
    }
    assert same["model.embed_tokens.weight"] and not same["model.layers.0.mlp.up_proj.weight"]


NORM = "model.model.norm.weight"


# ---- stopped, killed, continued -----------------------------------------------------------------


def test_stopped_and_continued_the_run_is_the_same(
    undisturbed, stopped, arguments, tmp_path, capsys
):
    run = shutil.copytree(stopped / "run", tmp_path / "run")
    assert len(states(run)) == 2 and not (run / "model").exists()
    assert train_pref.main(["--status", str(tmp_path)]) == 1
    saved = int(states(run)[-1][5:])
    assert f"run: stopped, saved after step {saved} of 8; continue with" in capsys.readouterr().out
    assert train_pref.main(arguments(tmp_path)) == 0
    assert_same(run, undisturbed)


def test_killed_before_its_summary_a_run_takes_its_model_back(
    undisturbed, stopped, arguments, tmp_path, monkeypatch, capsys
):
    """The best weights, which the last checkpoint names, are in the run's folder then."""
    run = shutil.copytree(stopped / "run", tmp_path / "run")
    original, calls = disk.write_json, []

    def killed(path, value):
        if path.name == "summary.json":
            calls.append(path)
            raise KeyboardInterrupt
        original(path, value)

    given = arguments(tmp_path, "--save_steps", "1")
    with monkeypatch.context() as patch:
        patch.setattr(disk, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            train_pref.main(given)
    torch.distributed.destroy_process_group()
    assert calls and (run / "model").is_dir()
    best = checkpoint.progress_in(checkpoint.saved_states(run / "checkpoint")[-1]).best_step
    assert not (run / "checkpoint" / f"best-{best:06}" / "model").exists()
    assert train_pref.main(given) == 0
    assert "damaged" not in capsys.readouterr().out
    assert_same(run, undisturbed)


@pytest.mark.slow
def test_stopped_while_fsdp_has_gathered_weights_the_shards_are_saved(
    arguments, tmp_path, monkeypatch
):
    """In bf16 on one rank: before the first evaluation, within others, and within steps."""
    more = ("--dtype", "bfloat16", "--tokens_per_microbatch", "300")
    whole, cut = (arguments(tmp_path / name, *more) for name in ("whole", "cut"))
    assert train_pref.main(whole) == 0
    for call in (5, 31, 29, 22, 13):
        assert stop_at(monkeypatch, cut, call) == 75
    assert train_pref.main(cut) == 0
    starts = json.loads((tmp_path / "cut/run/args.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 2, 4, 5, 6]
    assert_same(tmp_path / "cut/run", tmp_path / "whole/run")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_moments_in_8_bits_are_continued(arguments, tmp_path, ranks):
    """Those of two ranks are in blocks of each one's rows."""
    script = tmp_path / "stops.py"
    script.write_text(STOPS)
    whole, cut = (
        arguments(tmp_path / name, "--optim", "adamw_8bit", "--dtype", "bfloat16")
        for name in ("whole", "cut")
    )
    assert run_script("train_pref.py", *whole, torchrun=ranks).returncode == 0
    assert run_script(script, 3, *cut, torchrun=ranks).returncode == 75
    path = (
        tmp_path / "cut/run/checkpoint/step-000003" / f"rank-0000{ranks - 1}-part-0000.safetensors"
    )
    with safe_open(path, "pt") as file:
        moment = file.get_tensor("state1/model.model.embed_tokens.weight")
    assert moment.dtype == torch.uint8 and len(moment) == 600 // ranks
    done = run_script("train_pref.py", *cut, torchrun=ranks)
    assert done.returncode == 0 and "continued after step 3" in done.stdout, done.stderr
    assert_same(tmp_path / "cut/run", tmp_path / "whole/run")


KILLED = f"""{TOOLS}
from pref.model import model_folder
from pref.training import best_model, sharded_checkpoint

moment, number = sys.argv.pop(1), int(os.environ.get("RANK", 0))
if moment == "writing a shard":
    if number == int(os.environ.get("WORLD_SIZE", 1)) - 1:
        at(sharded_checkpoint, "save_file", 2, half_a_file)
elif number == 0 and moment == "writing the best model":
    at(model_folder, "write", 1, after)
elif number == 0 and moment == "between best model and checkpoint":
    at(best_model, "sha256_of", 1, after)
elif number == 0 and moment == "before a state has its name":
    at(sharded_checkpoint, "write_progress", 2, after)
elif number == 0 and moment == "removing an old state":
    at(sharded_checkpoint, "discard", 1, die)
elif number == 0 and moment == "between model and summary":
    before_the_summary()
sys.exit(train_pref.main())
"""
MOMENTS = (
    "writing the best model",
    "between best model and checkpoint",
    "writing a shard",
    "before a state has its name",
    "removing an old state",
    "between model and summary",
)


@pytest.mark.slow
def test_killed_at_every_moment_the_run_is_the_same(undisturbed, arguments, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    for moment in MOMENTS:
        done = run_script(script, moment, *arguments(tmp_path))
        assert done.returncode == -signal.SIGKILL, (moment, done.stderr)
        assert not (tmp_path / "run" / "summary.json").exists()
    assert (tmp_path / "run" / "model").is_dir()
    assert train_pref.main(arguments(tmp_path)) == 0
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_two_ranks_killed_are_two_ranks_undisturbed(arguments, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    whole, cut = arguments(tmp_path / "whole"), arguments(tmp_path / "cut")
    assert run_script("train_pref.py", *whole, torchrun=2).returncode == 0
    for moment in ("writing a shard", "before a state has its name"):
        done = run_script(script, moment, *cut, torchrun=2)
        assert done.returncode != 0, moment
        assert not (tmp_path / "cut/run/summary.json").exists()
    done = run_script("train_pref.py", *cut, torchrun=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same(tmp_path / "cut/run", tmp_path / "whole/run")


@pytest.mark.slow
def test_begun_by_one_rank_a_run_is_continued_by_two_and_four(undisturbed, arguments, tmp_path):
    """Stopped by one rank, then by four, ended by two: what one rank computes, but for rounding."""
    script = tmp_path / "stops.py"
    script.write_text(STOPS)
    given, run = arguments(tmp_path), tmp_path / "run"
    assert run_script(script, 3, *given).returncode == 75
    assert run_script(script, 6, *given, torchrun=4).returncode == 75
    done = run_script("train_pref.py", *given, torchrun=2)
    assert done.returncode == 0, done.stderr[-2000:]
    starts = json.loads((run / "args.json").read_text())["starts"]
    assert [(start["step"], start["world_size"]) for start in starts] == [(0, 1), (3, 4), (6, 2)]
    assert_close(run, undisturbed)


def assert_close(run, expected) -> None:
    """Metrics and weights of two runs are equal but for rounding."""
    for one, two in zip(metrics_of(run), metrics_of(expected), strict=True):
        assert one.keys() == two.keys()
        for key in set(one) - TIMES:
            assert one[key] == pytest.approx(two[key], rel=1e-4, abs=1e-5), key
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(path / "model").state_dict()
        for path in (run, expected)
    )
    for name in theirs:
        assert torch.allclose(ours[name], theirs[name], atol=2e-5), name


STOPS = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train_pref
last, original = int(sys.argv.pop(1)), train_pref.take_step

def stopping(study, *more):
    line = original(study, *more)
    if study.progress.step == last and study.ranks.main:
        os.kill(os.getpid(), signal.SIGTERM)
    return line

train_pref.take_step = stopping
sys.exit(train_pref.main())
"""


# ---- the disk -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_at_the_best_model_is_one_line(undisturbed, arguments, tmp_path, monkeypatch):
    original = model_folder.write

    def full(model, folder, *more):
        original(model, folder, *more)
        os.truncate(folder / "model.safetensors", 1000)
        raise OSError(28, "No space left on device", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(model_folder, "write", full)
        refused(arguments(tmp_path), r"best-000002: not written .*No space left.*make room and run")
    assert not list((tmp_path / "run" / "checkpoint").iterdir())  # nothing half is left
    assert train_pref.main(arguments(tmp_path)) == 0
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_full_disk_on_two_ranks_leaves_the_state_before(undisturbed, arguments, tmp_path):
    """A limit on the size of files acts as a full disk: a rank's write fails half-way."""
    given, run, script = arguments(tmp_path), tmp_path / "run", tmp_path / "limited.py"
    stops, limited = tmp_path / "stops.py", LIMITED.format(bytes=500_000)
    stops.write_text(STOPS)
    script.write_text(limited)
    assert run_script(stops, 3, *given, torchrun=2).returncode == 75
    before = states(run)
    assert len(before) == 2
    done = run_script(script, *given, torchrun=2)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "step-000004: not written" in lines[0], done.stderr
    assert "File too large" in lines[0] and "Traceback" not in done.stderr
    assert states(run) == before
    assert run_script("train_pref.py", *given, torchrun=2).returncode == 0
    assert_close(run, undisturbed)


@pytest.mark.slow
def test_best_weights_do_not_pile_up_between_checkpoints(arguments, tmp_path, monkeypatch):
    """Each of three evaluations is the best so far, and the first checkpoint comes after them."""
    evaluate, write, seen = train_pref.evaluate, model_folder.write, []

    def better_each_time(study, split):
        metrics, logps = evaluate(study, split)
        return metrics | {"eval/acc_ref": study.progress.step / 10}, logps

    def counted(model, folder, *more):
        seen.append(len(list(folder.parent.parent.glob("best-*"))))
        write(model, folder, *more)

    monkeypatch.setattr(train_pref, "evaluate", better_each_time)
    monkeypatch.setattr(model_folder, "write", counted)
    given = arguments(tmp_path, "--eval_steps", "1", "--save_steps", "100", "--max_steps", "3")
    assert train_pref.main(given) == 0
    assert seen == [1, 1, 1]  # the one that is being written


def test_without_room_on_the_disk_a_run_does_not_begin(arguments, tmp_path, monkeypatch, capsys):
    assert train_pref.main(arguments(tmp_path, "--dry_run")) == 0
    out = capsys.readouterr().out
    # 12 and 4 bytes of 100,160 parameters, three times
    assert "disk: up to 0.0045 GiB while it runs: 3 checkpoints of 0.0011 and as many models" in out
    with monkeypatch.context() as patch:
        patch.setattr(assembly, "build_policy", lambda *_: pytest.fail("loaded"))
        patch.setattr(disk_room, "most_gib", lambda plan: 1e6)
        refused(
            arguments(tmp_path), "and the run takes up to 1,000,000.0 GiB.*make room, or give a"
        )
