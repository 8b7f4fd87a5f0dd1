"""rsLoRA and LoRA+: what PEFT computes, in every step; recorded, resumed and refused."""

import argparse
import json
import math
import shutil

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from test_resume import assert_same, stop_at
from test_train import ONE, PACKING, train_args, val_pairs

import export
import train_pref
from pref.files import disk
from pref.files.console import UserError
from pref.model import lora
from pref.model.loading import load_base
from pref.model.logps import ResponseLogps, trainable
from pref.model.packing import make_batch
from pref.training import assembly, optimisers, run_folder, schedule
from pref.training.arguments import parse_args

BOTH = "--use_rslora --loraplus_lr_ratio 16 --loss dpo --lora_alpha 12 --max_steps 2 --save_steps 1"


@pytest.fixture(scope="module")
def policy(tiny_model):
    """A policy with rsLoRA, r 4 and alpha 12, whose matrices B are not zero."""
    base = load_base(str(tiny_model), torch.float32, "none", torch.device("cpu"))
    adapted = lora.add_lora(base, 4, 12, 0.0, "all-linear", seed=0, rslora=True)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return ResponseLogps(adapted, "branches")


@pytest.fixture(scope="module")
def arguments(tiny_model, own_pairs):
    """Two steps with both options, in a folder of results."""

    def build(results, *more: str) -> list[str]:
        given = train_args(tiny_model, own_pairs, results, *BOTH.split(), *more)
        return [str(one) for one in given]

    return build


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    assert train_pref.main(arguments(results)) == 0
    (run,) = results.iterdir()
    return run


def optimisation(**more) -> argparse.Namespace:
    given = {"tune": "lora", "learning_rate": 3e-4, "weight_decay": 0.02, "warmup_ratio": 0.25}
    return argparse.Namespace(**given, **more)


# ---- LoRA+ ---------------------------------------------------------------------------------------


def groups_of(optimizer) -> dict[frozenset, tuple]:
    """Learning rate and weight decay of each set of parameters that has any."""
    return {
        frozenset(map(id, group["params"])): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        if group["params"]
    }


def test_learning_rates_are_those_of_peft_at_every_step_of_the_schedule(policy):
    args, steps = optimisation(loraplus_lr_ratio=16.0), 8
    ours = optimisers.make(policy, args)
    theirs = create_loraplus_optimizer(
        policy.model,
        torch.optim.AdamW,
        lr=args.learning_rate,
        loraplus_lr_ratio=16.0,
        loraplus_weight_decay=args.weight_decay,
    )
    assert len(groups_of(theirs)) == 2 and groups_of(ours) == groups_of(theirs)

    shares = [schedule.learning_rate_at(step, steps, args) / 3e-4 for step in range(steps)]
    assert min(shares) < 0.6 and max(shares) > 0.9
    scheduler = torch.optim.lr_scheduler.LambdaLR(theirs, lambda step: shares[min(step, steps - 1)])
    for step in range(steps):
        optimisers.set_learning_rate(ours, schedule.learning_rate_at(step, steps, args))
        expected = groups_of(theirs)
        for members, (rate, decay) in groups_of(ours).items():
            assert (rate, decay) == (pytest.approx(expected[members][0], rel=1e-12), 0.02)
        theirs.step()
        scheduler.step()


def test_without_it_there_is_one_group_with_the_schedules_rate(policy):
    """Byte for byte the optimiser of before: the order of its parameters too."""
    optimizer = optimisers.make(policy, optimisation(loraplus_lr_ratio=1.0))
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in trainable(policy).values()]
    optimisers.set_learning_rate(optimizer, 1.2345e-5)
    assert group["lr"] == 1.2345e-5


# ---- rsLoRA --------------------------------------------------------------------------------------


def test_updates_are_scaled_by_alpha_over_the_root_of_r_as_peft_scales_them(
    policy, tiny_model, own_pairs
):
    scalings = {m.scaling["default"] for m in policy.modules() if isinstance(m, lora.LoraLayer)}
    assert scalings == {12 / math.sqrt(4)}
    assert lora.is_ours(policy)
    batch = make_batch(val_pairs(tiny_model, own_pairs)[:2], PACKING, torch.device("cpu"))
    with torch.no_grad():
        ours = policy(batch).logps
        with lora.forward_of_peft(policy):
            theirs = policy(batch).logps
        with lora.adapter_off(policy):
            base = policy(batch).logps
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert (ours - base).abs().mean() > 0.1


# ---- a run ---------------------------------------------------------------------------------------


def test_a_run_is_named_by_them_and_its_adapter_says_how_it_is_scaled(finished):
    assert (
        finished.name == "dpo_b0.1_s42_lr0.001_loraplus16_ep1_steps2_gb8_r4_a12_rslora_do0_float32"
    )
    record = json.loads((finished / "args.json").read_text())
    assert (record["use_rslora"], record["loraplus_lr_ratio"]) == (True, 16.0)
    config = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["lora_alpha"], config["r"]) == (True, 12, 4)


def test_what_is_not_used_is_not_recorded_and_a_run_with_it_is_another(
    tiny_model, own_pairs, tmp_path
):
    given = list(map(str, train_args(tiny_model, own_pairs, tmp_path, "--run_id", "run")))

    def record(*more: str) -> dict:
        return assembly.prepare(parse_args([*given, *more]), ONE).record

    plain, other = record(), record("--use_rslora", "--loraplus_lr_ratio", "4")
    assert other.keys() - plain.keys() == {"use_rslora", "loraplus_lr_ratio"}
    for old, new, change in (
        (plain, other, "loraplus_lr_ratio was 1.0, is 4.0"),
        (other, plain, "use_rslora was True, is False"),
    ):
        disk.write_json(tmp_path / "args.json", old)
        run_folder.check_same_run(tmp_path, old)
        with pytest.raises(UserError, match=change):
            run_folder.check_same_run(tmp_path, new)


@pytest.mark.slow
def test_a_stopped_run_continues_to_the_same_bytes(arguments, finished, tmp_path, monkeypatch):
    """Each group's rate is set again, and the moments of both groups are there."""
    assert stop_at(monkeypatch, arguments(tmp_path), call=4) == 75
    (run,) = tmp_path.iterdir()
    assert (run / "checkpoint").is_dir()
    assert train_pref.main(arguments(tmp_path)) == 0
    assert_same(run, finished)


def test_its_adapter_can_be_a_start_and_be_merged(arguments, finished, tmp_path, capsys):
    """The gate of step 0 compares the start with what PEFT computes; export.py the merged model
    with base and adapter.
    """
    given = arguments(tmp_path, "--max_steps", "1", "--run_id", "next")
    for name in ("--lora_r", "--lora_alpha"):
        del given[given.index(name) : given.index(name) + 2]
    given.remove("--use_rslora")  # the adapter says it
    assert train_pref.main([*given, "--init_adapter", str(finished)]) == 0
    record = json.loads((tmp_path / "next" / "args.json").read_text())
    assert (record["use_rslora"], record["lora_r"], record["lora_alpha"]) == (True, 4, 12)

    run = shutil.copytree(finished, tmp_path / "merging")
    assert export.main([str(run), "--dtype", "float32", "--num_pairs", "4"]) == 0
    comparison = json.loads((run / "merged" / "export.json").read_text())["comparison"]
    assert comparison["merging"] < 1e-5 < comparison["adapter"]
    assert "| use_rslora | True |" in (run / "merged" / "README.md").read_text()

    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    config["use_rslora"] = False
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="--use_rslora True: the adapter .* has False; leave it"):
        train_pref.main([*given, "--run_id", "third", "--use_rslora", "--init_adapter", str(run)])
