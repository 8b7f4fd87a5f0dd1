"""Training from the adapter of a finished run (--init_adapter), round after round: the policy and
its reference are what PEFT computes, and what cannot be a start is refused.
"""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_resume import assert_same, stop_at
from test_train import ONE, metrics_of, train, train_args, val_pairs
from transformers import AutoModelForCausalLM

import train_pref
from pref.files.console import UserError
from pref.model import lora
from pref.training import reference, start_adapter
from pref.training.arguments import parse_args
from pref.training.run_id import run_id_from

# DPO at beta 0.1, its loss apart from a divergence whose reference runs in every step.
LIVE = ["--loss", "td_dpo", "--margin", "ref", "--tau", "10", "--kl", "full_rev", "--beta", "0.1"]


@pytest.fixture(scope="module")
def results(tiny_model, own_pairs, tmp_path_factory):
    """Three runs: `first`, and second rounds named by their references, `start` and `base`."""
    folder = tmp_path_factory.mktemp("results")
    more = "--loss dpo --learning_rate 2e-2 --lora_r 8 --max_steps 2 --run_id first"
    assert train(*train_args(tiny_model, own_pairs, folder, *more.split())) == 0
    for name, more in (("start", ("--max_steps", "1")), ("base", ())):
        assert train_pref.main(second(tiny_model, own_pairs, folder, name, *LIVE, *more)) == 0
    return folder


def second(tiny_model, own_pairs, results, name, *more, init=None) -> list[str]:
    """Arguments of a second round that starts from the run `first`, with its own r."""
    given = ["--run_id", name, "--reference", name, "--init_adapter", init or results / "first"]
    args = [str(a) for a in train_args(tiny_model, own_pairs, results, *given, *more)]
    place = args.index("--lora_r")
    return [*args[:place], *args[place + 2 :]]


def record_of(run) -> dict:
    return json.loads((run / "args.json").read_text())


def rows_at(run, step: int) -> list[dict]:
    rows = map(json.loads, (run / "val_pairs.jsonl").read_text().splitlines())
    return [row for row in rows if row["step"] == step]


@pytest.fixture(scope="module")
def plain(tiny_model, own_pairs, results):
    """In double precision, without code of ours: log-probabilities over the vocabulary (tokens, V)
    of each validation pair's responses, by the base and by PEFT with the adapters of two runs.
    """
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64).eval()
    pairs = val_pairs(tiny_model, own_pairs)

    @torch.no_grad()
    def vocabulary(model) -> list[dict]:
        table = []
        for pair in pairs:
            row = {}
            for side in ("chosen", "rejected"):
                ids = torch.tensor([pair.prompt + getattr(pair, side)])
                logps = model(ids).logits[0, len(pair.prompt) - 1 : -1].log_softmax(-1)
                row[side] = logps, ids[0, len(pair.prompt) :]
            table.append(row)
        return table

    tables = {"base": vocabulary(base)}
    for run in ("first", "start"):
        adapted = PeftModel.from_pretrained(base, results / run / "adapter").double().eval()
        tables[run] = vocabulary(adapted)
        base = adapted.unload()
    return tables


def sums(table, side: str) -> torch.Tensor:
    """Log-probs (pairs,) of the responses."""
    logps = [row[side][0].gather(1, row[side][1][:, None]).sum() for row in table]
    return torch.stack(logps)


@pytest.mark.parametrize(("name", "expected"), [("start", "first"), ("base", "base")])
def test_policy_and_reference_are_what_peft_computes(results, plain, name, expected):
    compare(rows_at(results / name, 0), plain, policy="first", ref=expected)
    # The two are apart, or nothing above would tell them from each other.
    moved = (sums(plain["first"], "chosen") - sums(plain["base"], "chosen")).abs()
    assert moved.mean() > 0.5


def compare(rows: list[dict], plain: dict, **models: str) -> None:
    """Log-probs of val_pairs.jsonl with PEFT's, to a millionth of a nat per token."""
    for side in ("chosen", "rejected"):
        tokens = torch.tensor([row[f"len_{side}"] for row in rows])
        for kind, model in models.items():
            ours = torch.tensor([row[f"{kind}_{side}"] for row in rows], dtype=torch.double)
            assert ((ours - sums(plain[model], side)).abs() / tokens).max() < 1e-6, (kind, side)


def test_a_round_begins_at_its_reference_and_moves_on(results, plain):
    first = metrics_of(results / "start")[0]
    assert first["step"] == 0 and first["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(first["eval/margin/rho"]) < 1e-4 and abs(first["eval/anchor"]) < 1e-6
    compare(rows_at(results / "start", 1), plain, policy="start", ref="first")
    moved = (sums(plain["first"], "chosen") - sums(plain["start"], "chosen")).abs()
    assert moved.min() > 1e-2
    record = record_of(results / "start")
    assert (record["round"], record["reference_model"], record["lora_r"]) == (2, "start", 8)
    assert record_of(results / "first")["round"] == 1


def test_the_base_is_the_reference_of_all_rounds(results, plain):
    """Loss and divergence of step 0, from PEFT's log-probabilities."""
    first = metrics_of(results / "base")[0]
    by_model = {
        model: sums(table, "chosen") - sums(table, "rejected") for model, table in plain.items()
    }
    rho = by_model["first"] - by_model["base"]
    assert first["eval/margin/rho"] == pytest.approx(rho.mean().item(), abs=1e-4)
    expected = -F.logsigmoid(0.1 * rho).mean().item()
    assert first["eval/preference"] == pytest.approx(expected, abs=1e-6)
    divergence = sum(
        (policy[side][0].exp() * (policy[side][0] - base[side][0])).sum()
        for policy, base in zip(plain["first"], plain["base"])
        for side in ("chosen", "rejected")
    )
    divergence = divergence.item() / len(rho)
    assert divergence > 0.1 and first["eval/anchor"] == pytest.approx(divergence, rel=1e-4)
    assert first["eval/loss"] == pytest.approx(expected + 0.1 * divergence, rel=1e-4)
    # Its log-probs are those of the first round, whose reference is the base too.
    keys = [record_of(results / run)["reference"] for run in ("first", "base", "start")]
    assert keys[0] == keys[1] != keys[2]
    summary = json.loads((results / "base" / "summary.json").read_text())
    assert summary["best_step"] == 4 and summary["step0_difference"] < 1e-4


def test_an_interrupted_round_continues(tiny_model, own_pairs, results, tmp_path, monkeypatch):
    """The adapter is found by its content: here it is a copy, behind a link."""
    copy = shutil.copytree(results / "first" / "adapter", tmp_path / "a copy" / "of it")
    link = tmp_path / "link"
    link.symlink_to(copy, target_is_directory=True)
    more = (*LIVE, "--round", "2")
    given = second(tiny_model, own_pairs, tmp_path, "base", *more, init=link)
    assert stop_at(monkeypatch, given, 5) == 75
    # What is there is not continued from another adapter, nor without one.
    (path,) = copy.glob("*.safetensors")
    weights, whole = load_file(path), path.read_bytes()
    save_file({name: 2 * value for name, value in weights.items()}, path)
    refused(given, "holds another run .the adapter in --init_adapter has changed")
    path.write_bytes(whole)
    link.unlink()
    refused(given, "--init_adapter .*link: no such folder; give a finished run")
    given = second(tiny_model, own_pairs, tmp_path, "base", *more, init=copy)
    assert train_pref.main(given) == 0
    assert_same(tmp_path / "base", results / "base")
    # A finished run does not miss it.
    shutil.rmtree(copy)
    assert train_pref.main(given) == 0
    refused([*given[:-2], "--round", "3"], "holds another run .round was 2, is 3")


def refused(given, message) -> None:
    with pytest.raises(UserError, match=message):
        train_pref.main(given)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # the next call in the same test makes its own


# ---- gates --------------------------------------------------------------------------------------


def test_a_stale_reference_is_noticed_where_the_policy_does_not_start_from_it(
    tiny_model, own_pairs, results, tmp_path
):
    stale = shutil.copytree(own_pairs, tmp_path / "data")
    for path in (stale / "reference").iterdir():
        with safe_open(path, framework="pt") as file:
            tokens = file.get_tensor("logps") + 0.01
        metadata = {"sha256": reference.sha256_tensor(tokens)}
        save_file({"logps": tokens}, path, metadata=metadata)
    given = second(tiny_model, stale, tmp_path, "base", init=results / "first")
    refused(given, "base model differs from its reference by 0.01 nats per token")


def test_an_adapter_that_is_computed_otherwise_than_by_peft_is_noticed(
    tiny_model, own_pairs, results, tmp_path, monkeypatch
):
    monkeypatch.setattr(lora, "lora_forward", lambda layer, x: layer.base_layer(x))
    given = second(tiny_model, own_pairs, tmp_path, "base", init=results / "first")
    refused(given, "differ by .* from the own forward of LlamaForCausalLM and PEFT")


# ---- what cannot be a start ---------------------------------------------------------------------


def test_starts_that_cannot_be_are_refused(tiny_model, own_pairs, results, tmp_path):
    def given(*more, init=None):
        return second(
            tiny_model, own_pairs, tmp_path, "start", *more, init=init or results / "first"
        )

    refused(
        train_args_of_round_2(tiny_model, own_pairs, tmp_path), "--round 2: a later round starts"
    )
    refused(given("--lora_alpha", "3"), "--lora_alpha 3: the adapter in --init_adapter has 16")
    refused(given("--round", "0"), "--round 0: must be above 0")
    run = shutil.copytree(results / "first", tmp_path / "first")
    record = record_of(run)
    (run / "args.json").write_text(json.dumps(record | {"round": "two"}))
    refused(given(init=run), "args.json: 'round' must be a number, found 'two'")
    (run / "args.json").write_text(json.dumps(record | {"mode": "trial"}))
    refused(given(init=run / "adapter"), "is a trial run, .* train it in full, or add --mode trial")
    (run / "args.json").write_text(json.dumps(record | {"model_sha256": "ab" * 32}))
    refused(given(init=run), "another base model .*hash abababab. than --model .*give the base")
    del record["model_sha256"]  # as version 1.0.0 wrote it
    (run / "args.json").write_text(json.dumps(record | {"base_sha256": "cd" * 32}))
    refused(given(init=run), "another base model .*hash cdcdcdcd")
    shutil.rmtree(run / "adapter")
    refused(given(init=run), "first: its training ended without an adapter")
    (run / "summary.json").unlink()
    refused(given(init=run), "first: its training has not finished, and an adapter is only")


def test_pairs_of_another_models_answers_are_named(results, tmp_path, capsys):
    sha256 = record_of(results / "start")["init_adapter_sha256"]
    args = parse_args(["--data", str(tmp_path), "--init_adapter", str(results / "first")])
    args = start_adapter.with_start(args)
    for adapter, warned in ((sha256, False), (None, True), ("ab" * 32, True)):
        made_of = {"run": "other", "adapter_sha256": adapter}
        (tmp_path / "manifest.json").write_text(json.dumps({"from_answers": made_of}))
        start_adapter.check_pairs(args, ONE)
        assert ("its pairs are answers of other" in capsys.readouterr().out) is warned


def test_a_start_that_diverged_is_named(results, tmp_path, capsys):
    run = shutil.copytree(results / "first", tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    for how in ("finished", "diverged"):
        (run / "summary.json").write_text(json.dumps(summary | {"status": how}))
        start_adapter.warn_of_divergence(parse_args(["--init_adapter", str(run)]), ONE)
        assert ("diverged; training starts from the best" in capsys.readouterr().out) is (
            how == "diverged"
        )


def train_args_of_round_2(tiny_model, own_pairs, results) -> list[str]:
    return [str(a) for a in train_args(tiny_model, own_pairs, results, "--round", "2")]


def test_a_round_is_planned_before_its_start_is_there(tiny_model, own_pairs, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    more = ("--init_adapter", "results/x", "--round", "2", "--dry_run", "--plan_json", plan)
    assert train(*train_args(tiny_model, own_pairs, tmp_path, *more)) == 0
    assert "results/x: does not exist yet; planned with r 4 on all" in capsys.readouterr().out
    assert json.loads(plan.read_text())["steps"] == 4


# ---- names --------------------------------------------------------------------------------------


def test_names_of_rounds(results, tmp_path):
    """A later round has its name before its start exists; other names are as they were."""
    point = ["--loss", "dpo", "--lora_r", "8", "--mode", "trial"]
    assert run_id_from(point) == "dpo_b0.1_s42_r8_trial"
    later = [*point, "--init_adapter", "results/none", "--round", "3"]
    assert run_id_from(later) == "dpo_b0.1_s42_r8_trial_round3"
    assert run_id_from([*later, "--reference", "base"]) == "dpo_b0.1_s42_r8_trial_refbase_round3"
    with pytest.raises(UserError, match="results/none: no such folder"):
        run_id_from(later[:-2])
    # Without a start adapter the base is the reference in any case.
    assert run_id_from(["--loss", "dpo", "--reference", "base"]) == "dpo_b0.1_s42"

    first = results / "first"
    sha256 = record_of(results / "start")["init_adapter_sha256"]
    from_folder = ["--loss", "dpo", "--init_adapter", str(first / "adapter")]
    assert run_id_from(from_folder) == f"dpo_b0.1_s42_init{sha256[:8]}"
    from_run = ["--loss", "dpo", "--init_adapter", str(first)]
    assert run_id_from(from_run) == "dpo_b0.1_s42_round2"
    # Modules may be named in any order.
    names = record_of(results / "start")["lora_targets"].split(",")
    assert run_id_from([*from_folder, "--lora_targets", ",".join(names[::-1])])

    copy = shutil.copytree(first, tmp_path / "copy")
    for changes, tag in (({"round": 4}, "round5"), ({"loss": "sft"}, f"init{sha256[:8]}")):
        (copy / "args.json").write_text(json.dumps(record_of(first) | changes))
        argv = ["--loss", "dpo", "--init_adapter", str(copy)]
        assert run_id_from(argv) == f"dpo_b0.1_s42_{tag}"
