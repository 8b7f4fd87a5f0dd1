"""train_pref.py on a tiny random model: exactness, gates, files, errors."""

import json
import math
import shutil

import pytest
import torch
from conftest import run_script
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train_pref
from losses import LOSSES
from pref.files.console import UserError
from pref.files.pairs import read_pairs
from pref.model import lora
from pref.model.chat import TokenPair, load_tokenizer, tokenize_pairs
from pref.model.loading import load_base
from pref.model.logps import ResponseLogps, sum_by_row
from pref.model.lora import adapter_off, add_lora
from pref.model.packing import Packing, make_batch
from pref.model.ranks import Ranks
from pref.training import assembly, gates
from pref.training.arguments import loss_parameters, parse_args
from pref.training.loss_options import loss_defaults
from pref.training.run_id import run_id_of
from pref.training.schedule import learning_rate_at, number_of_steps, pairs_of_step

ONE = Ranks(0, 1, torch.device("cpu"))
PACKING = Packing(pad_id=2)


def train_args(tiny_model, pairs_folder, results, *more):
    return (
        "--model",
        tiny_model,
        "--data",
        pairs_folder,
        "--results_dir",
        results,
        "--dtype",
        "float32",
        "--lora_r",
        "4",
        "--lora_dropout",
        "0",
        "--global_batch",
        "8",
        "--learning_rate",
        "1e-3",
        "--epochs",
        "1",
        *more,
    )


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tiny_model, pairs_folder, tmp_path_factory):
    """A finished run of td_dpo in one process."""
    results = tmp_path_factory.mktemp("results")
    done = run_script(
        "train_pref.py", *train_args(tiny_model, pairs_folder, results, "--run_id", "one")
    )
    assert done.returncode == 0, done.stderr
    return results / "one"


# ---- what a run leaves --------------------------------------------------------------------------


def test_run_writes_its_files(finished):
    record = json.loads((finished / "args.json").read_text())
    assert (record["loss"], record["beta"], record["tau"], record["seed"]) == (
        "td_dpo",
        0.05,
        1.0,
        42,
    )
    assert set(record["data_sha256"]) == {"train", "val"}
    assert record["versions"]["torch"] == torch.__version__
    lines = metrics_of(finished)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert {
        "loss",
        "preference",
        "anchor",
        "logps/chosen",
        "rewards/margins",
        "rewards/accuracies",
        "margin/rho",
        "grad_norm",
        "lr",
        "tokens",
        "tok_per_s",
        "peak_gib",
        "nonfinite",
    } <= steps[0].keys()
    evaluations = [line["step"] for line in lines if "eval/acc_ref" in line]
    assert evaluations == [0, 4]
    summary = json.loads((finished / "summary.json").read_text())
    assert (
        summary["status"] == "finished"
        and summary["best_step"] == 4
        and summary["nonfinite_steps"] == 0
    )


def test_seeds_are_paired_over_losses(tiny_model, pairs_folder, tmp_path):
    """The same LoRA matrices and the same batches at one seed, whatever the loss; other ones at
    another seed.
    """
    found = {}
    for loss, seed in (("dpo", 42), ("simpo", 42), ("dpo", 43)):
        more = (
            "--loss",
            loss,
            "--seed",
            seed,
            "--run_id",
            f"{loss}{seed}",
            "--max_steps",
            "2",
            "--learning_rate",
            "1e-12",
        )
        assert not train_pref.main(
            [str(word) for word in train_args(tiny_model, pairs_folder, tmp_path, *more)]
        )
        run = tmp_path / f"{loss}{seed}"
        weights = load_file(run / "adapter" / "adapter_model.safetensors")
        steps = [line for line in metrics_of(run) if "loss" in line]
        matrices = torch.cat(
            [tensor.flatten() for name, tensor in sorted(weights.items()) if "lora_A" in name]
        )
        found[loss, seed] = (
            matrices,
            [line[key] for line in steps for key in ("tokens", "logps/chosen")],
        )
    dpo, simpo, other = found.values()
    assert torch.allclose(dpo[0], simpo[0], atol=1e-9) and dpo[1] == pytest.approx(
        simpo[1], abs=1e-4
    )
    assert not torch.allclose(dpo[0], other[0], atol=1e-3) and dpo[1] != pytest.approx(
        other[1], abs=1e-4
    )


def test_step0_is_the_reference(finished):
    first = next(line for line in metrics_of(finished) if "eval/acc_ref" in line)
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["step0_difference"] <= gates.STEP0_TOLERANCE[torch.float32]
    assert abs(first["eval/margin/rho"]) < 1e-4


def test_val_pairs_agree_with_metrics_and_with_plain_peft(finished, tiny_model, pairs_folder):
    """The adapter on disk, loaded by plain PEFT, gives the log-probs that the run wrote down."""
    rows = [json.loads(line) for line in (finished / "val_pairs.jsonl").read_text().splitlines()]
    best = [row for row in rows if row["step"] == 4]
    assert len(rows) == 16 and len(best) == 8
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), finished / "adapter"
    ).eval()
    pairs = tokenize_pairs(
        load_tokenizer(str(tiny_model)), read_pairs(pairs_folder / "val.jsonl"), 512
    )
    for row, pair in zip(best, pairs):
        for side in ("chosen", "rejected"):
            ids = torch.tensor([pair.prompt + getattr(pair, side)])
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                with model.disable_adapter():
                    refs = (
                        model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                    )
            start = len(pair.prompt) - 1
            assert row[f"policy_{side}"] == pytest.approx(logps[start:].sum().item(), rel=1e-5)
            assert row[f"ref_{side}"] == pytest.approx(refs[start:].sum().item(), rel=1e-5)
            assert row[f"len_{side}"] == len(getattr(pair, side))


def test_training_moves_the_margin(tiny_model, pairs_folder, tmp_path):
    more = (
        "--loss",
        "dpo",
        "--beta",
        "0.5",
        "--learning_rate",
        "1e-2",
        "--epochs",
        "6",
        "--run_id",
        "long",
    )
    assert (
        train_pref.main([str(a) for a in train_args(tiny_model, pairs_folder, tmp_path, *more)])
        == 0
    )
    steps = [line for line in metrics_of(tmp_path / "long") if "loss" in line]
    assert len(steps) == 24
    assert steps[-1]["loss"] < 0.5 < steps[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert steps[-1]["margin/rho"] > 1 and steps[-1]["rewards/accuracies"] > 0.9


def test_finished_run_is_not_trained_again_and_other_arguments_are_refused(
    finished, tiny_model, pairs_folder
):
    arguments = train_args(tiny_model, pairs_folder, finished.parent, "--run_id", "one")
    before = (finished / "summary.json").stat().st_mtime_ns
    again = run_script("train_pref.py", *arguments)
    assert again.returncode == 0 and "finished already" in again.stdout
    assert (finished / "summary.json").stat().st_mtime_ns == before
    other = run_script("train_pref.py", *arguments, "--beta", "0.5")
    assert other.returncode == 2 and "beta was 0.05, is 0.5" in other.stderr


# ---- equivalences -------------------------------------------------------------------------------


def test_reference_cache_is_shared_and_a_damaged_one_recomputed(
    finished, tiny_model, pairs_folder, tmp_path
):
    data = tmp_path / "data"
    shutil.copytree(pairs_folder, data)
    files = sorted((data / "reference").glob("*.safetensors"))
    assert len(files) == 2
    files[0].write_bytes(files[0].read_bytes()[:-40])  # torn
    damaged = bytearray(files[1].read_bytes())
    damaged[-1] ^= 1  # one flipped bit
    files[1].write_bytes(damaged)
    done = run_script(
        "train_pref.py",
        *train_args(tiny_model, data, tmp_path, "--loss", "dpo", "--max_steps", "1"),
    )
    assert done.returncode == 0, done.stderr
    assert "read from" not in done.stdout
    again = run_script(
        "train_pref.py",
        *train_args(
            tiny_model, data, tmp_path, "--loss", "discopop", "--seed", "7", "--max_steps", "1"
        ),
    )
    assert again.stdout.count("read from") == 2
    assert sorted((data / "reference").glob("*.safetensors")) == files
    for copy in files:
        original = load_file(pairs_folder / "reference" / copy.name)["logps"]
        assert torch.allclose(load_file(copy)["logps"], original, atol=1e-5)


def test_reference_cached_with_other_batches_passes_the_gate(tiny_model, pairs_folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pairs_folder, data, ignore=shutil.ignore_patterns("reference"))
    for size in ("1", "8"):
        more = (
            "--dtype",
            "bfloat16",
            "--per_device_batch",
            size,
            "--max_steps",
            "1",
            "--run_id",
            f"size{size}",
        )
        assert (
            train_pref.main([str(a) for a in train_args(tiny_model, data, tmp_path / "r", *more)])
            == 0
        )
    assert len(list((data / "reference").iterdir())) == 2


def test_wrong_reference_is_refused(tiny_model, pairs_folder, tmp_path, monkeypatch):
    from pref.training import reference

    monkeypatch.setattr(reference, "read_cache", lambda path, count: torch.full((count,), -5.0))
    arguments = train_args(tiny_model, pairs_folder, tmp_path, "--run_id", "wrong")
    with pytest.raises(UserError, match="differs from its reference by"):
        train_pref.main([str(a) for a in arguments])
    torch.distributed.destroy_process_group()


def test_an_error_on_one_rank_alone_ends_the_run_and_is_said(tiny_model, pairs_folder, tmp_path):
    """Rank 0 alone meets the results folder that cannot be made; rank 1 is left in a collective."""
    (tmp_path / "file").write_text("not a folder")
    arguments = train_args(tiny_model, pairs_folder, tmp_path / "file", "--run_id", "x")
    done = run_script("train_pref.py", *arguments, torchrun=2, launcher=True)
    assert done.returncode != 0 and "Not a directory" in done.stderr


def test_gradient_reaches_every_lora_matrix(tiny_model, pairs_folder):
    policy = tiny_policy(tiny_model)
    batch = make_batch(val_pairs(tiny_model, pairs_folder)[:3], PACKING, ONE.device)
    sums = sum_by_row(policy(batch)[0], batch)
    torch.nn.functional.softplus(sums[3:] - sums[:3]).sum().backward()
    gradients = {n: p.grad for n, p in policy.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * 2 * 7  # A and B, two layers, seven linear layers each
    for name, gradient in gradients.items():
        assert (gradient.abs().max() > 0) == ("lora_B" in name), (
            name
        )  # B = 0 at the start, so A has none yet


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_gradients_survive_a_reference_pass(tiny_model, pairs_folder, quant):
    """On CPU an eval forward of a 4-bit model zeroes later gradients: our reference pass must not
    be one.
    """
    base = load_base(str(tiny_model), torch.float32, quant, ONE.device)
    policy = ResponseLogps(add_lora(base, 4, 16, 0.0, "all-linear", seed=1).train())
    batch = make_batch(val_pairs(tiny_model, pairs_folder)[:2], PACKING, ONE.device)
    with torch.no_grad(), lora.dropout(policy, active=False):
        before = policy(batch)[0]
    logps = policy(batch)[0]
    assert torch.allclose(logps, before, atol=1e-5)
    logps.sum().backward()
    gradients = [p.grad.abs().max().item() for n, p in policy.named_parameters() if "lora_B" in n]
    assert min(gradients) > 0


def plain_logits(policy: ResponseLogps, pairs: list[TokenPair]) -> torch.Tensor:
    """(N, V) logits of the response tokens by the model's own forward on an ordinary padded
    batch.
    """
    batch = make_batch(pairs, PACKING._replace(padded=True, shared=False), ONE.device)
    return policy.model(batch.input_ids, attention_mask=batch.mask).logits.flatten(0, 1)[
        batch.positions
    ]


@pytest.mark.parametrize("kl", ["full_rev", "full_fwd", "full_sym"])
def test_vocabulary_kl_against_plain_logits(tiny_model, pairs_folder, kl):
    policy = tiny_policy(tiny_model)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    pairs = val_pairs(tiny_model, pairs_folder)[:2]
    with torch.no_grad():
        mine = policy(make_batch(pairs, PACKING, ONE.device), kl)[1]
        logits = plain_logits(policy, pairs)
        with adapter_off(policy.model):
            refs = plain_logits(policy, pairs)
    p, q = (torch.distributions.Categorical(logits=x.double()) for x in (logits, refs))
    forward, reverse = (
        torch.distributions.kl_divergence(q, p),
        torch.distributions.kl_divergence(p, q),
    )
    expected = {"full_rev": reverse, "full_fwd": forward, "full_sym": (forward + reverse) / 2}[kl]
    assert mine.max() > 1e-3
    assert torch.allclose(mine.double(), expected, rtol=1e-3, atol=1e-6)


VARIANTS = [("--loss", name) for name in LOSSES]
VARIANTS += [("--loss", "td_dpo", "--kl", kl) for kl in ("k3", "full_sym", "none")]
VARIANTS += [
    ("--loss", "sft", "--score", "brier"),
    ("--loss", "sft", "--score_smoothing", "0.1"),
    ("--logp", "mean"),
]
VARIANTS += [
    ("--loss", "dpo", "--sft_coef", "0.5", "--score", "pseudo_spherical", "--score_alpha", "1.5")
]


@pytest.mark.parametrize("more", VARIANTS, ids=" ".join)
def test_every_loss_trains_five_steps(tiny_model, pairs_folder, tmp_path, more):
    arguments = train_args(
        tiny_model, pairs_folder, tmp_path, "--max_steps", "5", "--epochs", "2", *more
    )
    assert train_pref.main([str(a) for a in arguments]) == 0
    (run,) = (path.parent for path in tmp_path.glob("*/summary.json"))
    lines = [line for line in metrics_of(run) if "loss" in line]
    assert len(lines) == 5 and all(
        math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines
    )
    assert json.loads((run / "summary.json").read_text())["nonfinite_steps"] == 0
    rewards = {line["rewards/chosen"] is None for line in lines}
    assert rewards == {
        "beta" not in loss_defaults(json.loads((run / "args.json").read_text())["loss"])
    }


def test_score_of_a_batch_against_plain_logits(tiny_model, pairs_folder):
    policy = tiny_policy(tiny_model)
    pairs = val_pairs(tiny_model, pairs_folder)[:3]
    batch = make_batch(pairs, PACKING, ONE.device)
    policy.chunk_tokens = 7  # several chunks, one of them the boundary between chosen and rejected
    with torch.no_grad():
        logps, _, scores = policy(batch, None, {"score": "brier"})
        logits = plain_logits(policy, pairs)
    chosen = sum(len(pair.chosen) for pair in pairs)
    p = logits[:chosen].softmax(-1)
    expected = p.square().sum(-1) - 2 * p.gather(1, batch.targets[:chosen, None])[:, 0]
    assert scores.shape == (chosen,) and torch.allclose(scores, expected, atol=1e-5)
    assert torch.allclose(
        logps, logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0], atol=1e-5
    )


def test_learned_beta_mix_moves_is_logged_and_is_the_same_on_two_ranks(
    tiny_model, pairs_folder, tmp_path
):
    more = ("--loss", "dlrml", "--learn_beta_mix", "--beta_mix_lr", "0.1")
    ids = []
    for ranks in (0, 2):
        run_id = f"ranks{ranks}"
        arguments = train_args(tiny_model, pairs_folder, tmp_path, *more, "--run_id", run_id)
        done = run_script("train_pref.py", *arguments, torchrun=ranks)
        assert done.returncode == 0, done.stderr[-2000:]
        ids.append(
            [line["beta_mix"] for line in metrics_of(tmp_path / run_id) if "beta_mix" in line]
        )
    one, two = ids
    assert len(one) == 4 and one[-1] > 0 and abs(one[-1] - 0.2) > 1e-3
    assert two == pytest.approx(one, rel=1e-4)
    assert json.loads((tmp_path / "ranks0" / "summary.json").read_text())["beta_mix"] == one[-1]


OWN_LOSS = """
import torch.nn.functional as F

def my_loss(pairs, *, beta: float = 0.1, offset: float = 0.5):
    \"\"\"sp(offset - z)\"\"\"
    losses = F.softplus(offset - beta * pairs.rho)
    if offset > 100:
        raise ValueError("offset too large")
    return losses, {"preference": losses, "half": losses / 2}

def clash(pairs, *, seed: int = 3):
    return -pairs.rho, {}

def broken(pairs, *, beta: float = 0.1):
    return (beta * pairs.rho).exp().log(), {}
"""


def test_a_loss_of_ones_own(tiny_model, pairs_folder, tmp_path):
    file = tmp_path / "my_loss.py"
    file.write_text(OWN_LOSS)
    arguments = train_args(
        tiny_model, pairs_folder, tmp_path / "r", "--max_steps", "2", "--loss_file"
    )
    done = run_script("train_pref.py", *arguments, f"{file}:my_loss", "--offset", "0.25")
    assert done.returncode == 0, done.stderr
    (run,) = (path.parent for path in (tmp_path / "r").glob("*/summary.json"))
    assert run.name.startswith("my_loss_b0.1_s42_") and run.name.endswith("offset0.25")
    record = json.loads((run / "args.json").read_text())
    assert record["offset"] == 0.25 and len(record["loss_file_sha256"]) == 64
    assert (run / "loss.py").read_text() == OWN_LOSS
    first = next(line for line in metrics_of(run) if "loss" in line)
    assert first["loss"] == pytest.approx(math.log1p(math.exp(0.25)), rel=1e-4)
    assert first["terms/half"] == pytest.approx(first["loss"] / 2)
    for spec, more, said in (
        ("broken", [], "fails its self-test: not finite in float32"),
        ("clash", [], "parameter seed is an argument of train_pref.py"),
        ("my_loss", ["--offset", "200"], "raises ValueError: offset too large"),
    ):
        with pytest.raises(UserError, match=said):
            args = parse_args(["--data", str(pairs_folder), "--loss_file", f"{file}:{spec}", *more])
            assembly.prepare(args, ONE)


def test_published_discopop_that_overflows_ends_as_diverged(tiny_model, pairs_folder, tmp_path):
    more = (
        "--loss",
        "discopop",
        "--discopop_form",
        "published",
        "--beta",
        "2000",
        "--learning_rate",
        "0.05",
        "--max_nonfinite",
        "2",
        "--epochs",
        "4",
        "--run_id",
        "bad",
    )
    done = run_script("train_pref.py", *train_args(tiny_model, pairs_folder, tmp_path, *more))
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "bad" / "summary.json").read_text())
    assert summary["status"] == "diverged" and summary["nonfinite_steps"] >= 2
    assert (
        "NON-FINITE" in done.stdout
        and "NaN" not in (tmp_path / "bad" / "metrics.jsonl").read_text()
    )


def test_an_adapter_on_the_output_head_is_trained(tiny_model, pairs_folder, tmp_path):
    """FSDP's root group, which a forward pass alone leaves gathered."""
    more = ("--lora_targets", "q_proj,lm_head", "--run_id", "head", "--learning_rate", "1e-2")
    assert (
        train_pref.main([str(a) for a in train_args(tiny_model, pairs_folder, tmp_path, *more)])
        == 0
    )
    weights = load_file(tmp_path / "head" / "adapter" / "adapter_model.safetensors")
    assert weights["base_model.model.lm_head.lora_B.weight"].abs().max() > 1e-3


def test_trial_mode_is_marked(tiny_model, pairs_folder, tmp_path):
    assert (
        train_pref.main(
            [str(a) for a in train_args(tiny_model, pairs_folder, tmp_path, "--mode", "trial")]
        )
        == 0
    )
    (run,) = (path.parent for path in tmp_path.glob("*/summary.json"))
    assert (
        run.name.endswith("_trial")
        and json.loads((run / "args.json").read_text())["mode"] == "trial"
    )
    assert json.loads((run / "summary.json").read_text())["steps"] == 2


def tiny_policy(tiny_model):
    base = load_base(str(tiny_model), torch.float32, "none", ONE.device)
    return ResponseLogps(add_lora(base, 4, 16, 0.0, "all-linear", seed=1).train())


def val_pairs(tiny_model, pairs_folder) -> list[TokenPair]:
    return tokenize_pairs(
        load_tokenizer(str(tiny_model)), read_pairs(pairs_folder / "val.jsonl"), 512
    )


# ---- the plan -----------------------------------------------------------------------------------


def test_the_studys_numbers():
    args = parse_args([])
    assert number_of_steps(args, 6750) == 159
    assert len(pairs_of_step(52, 6750, 128, 42)) == 94
    epoch = [i for step in range(53, 106) for i in pairs_of_step(step, 6750, 128, 42)]
    assert sorted(epoch) == list(range(6750))
    assert pairs_of_step(0, 6750, 128, 42) != pairs_of_step(53, 6750, 128, 42)
    assert pairs_of_step(0, 6750, 128, 42) != pairs_of_step(0, 6750, 128, 43)


def test_learning_rate_warms_up_and_decays_to_zero():
    args = parse_args(["--learning_rate", "1"])
    rates = [learning_rate_at(step, 100, args) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1 and rates == sorted(rates[:11]) + sorted(rates[11:], reverse=True)
    assert rates[55] == pytest.approx(0.5) and rates[99] < 1e-3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--loss", "td_dpo", "--beta", "2.5", "--tau", "2"], "td_dpo_b2.5_t2_s42"),
        (["--loss", "dpo"], "dpo_b0.1_s42"),
        (
            ["--loss", "dpo", "--logp", "mean", "--learning_rate", "2e-5"],
            "dpo_b0.1_s42_mean_lr2e-05",
        ),
        (
            ["--loss", "td_dpo", "--kl", "full_rev", "--seed", "7", "--mode", "trial"],
            "td_dpo_b0.05_t1_s7_full-rev_trial",
        ),
        (["--loss", "dlrml", "--beta_mix", "0.5", "--lora_r", "16"], "dlrml_b0.05_s42_mix0.5_r16"),
    ],
)
def test_run_id_says_what_was_varied(arguments, expected):
    args = parse_args(arguments)
    assert run_id_of(args, loss_parameters(args), parse_args([])) == expected


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tau", "0"], "--tau 0"),
        (["--loss", "dpo", "--tau", "1"], "dpo has no such parameter"),
        (["--global_batch", "7"], "does not divide over 2 ranks"),
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--learning_rate", "nan"], "--learning_rate nan"),
        (["--run_id", "../out"], "run id '../out'"),
        (["--loss", "dpo", "--gamma", "1"], "dpo has no such parameter"),
        (["--loss", "dpo", "--score", "brier"], "--score: has no effect without --sft_coef"),
        (["--loss", "dpo", "--learn_beta_mix"], "dpo has no beta_mix"),
        (["--loss", "aqfl", "--global_batch", "2"], "would hold a single pair"),
    ],
)
def test_bad_arguments_are_named(pairs_folder, arguments, said):
    args = parse_args(["--data", str(pairs_folder), *arguments])
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        assembly.prepare(args, Ranks(0, 2, torch.device("cpu")))


def test_bad_line_of_the_data_is_named(pairs_folder, tmp_path):
    shutil.copytree(pairs_folder, tmp_path / "data")
    with open(tmp_path / "data" / "train.jsonl", "a") as file:
        file.write('{"id": "x", \n')
    args = parse_args(["--data", str(tmp_path / "data")])
    with pytest.raises(UserError, match=r"train.jsonl:31: not valid JSON"):
        assembly.prepare(args, ONE)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--loss", "unheard_of"), "invalid choice"),
        (("--tau", "0"), "error: --tau 0.0: must be above 0"),
        (
            ("--model", "/nonexistent/model"),
            "error: --model /nonexistent/model: no tokenizer there",
        ),
    ],
)
def test_errors_reach_the_user_in_one_or_two_lines(pairs_folder, tmp_path, arguments, said):
    done = run_script(
        "train_pref.py", "--data", pairs_folder, "--results_dir", tmp_path, *arguments
    )
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())
