"""train_pref.py on a tiny random model: exactness, gates, files, errors."""

import json
import math
import os
import shutil

import pytest
import torch
from conftest import run_script
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train_pref
from losses import LOSSES
from pref import __version__
from pref.files import disk
from pref.files.console import UserError
from pref.files.pairs import read_pairs
from pref.model import lora
from pref.model.chat import TokenPair, load_tokenizer, tokenize_pairs
from pref.model.loading import load_base
from pref.model.logps import ResponseLogps, sum_by_row
from pref.model.lora import adapter_off, add_lora
from pref.model.packing import Packing, make_batch
from pref.model.ranks import Ranks
from pref.training import assembly, gates, plan, reference, settings
from pref.training.arguments import loss_parameters, parse_args
from pref.training.loss_options import loss_defaults
from pref.training.run_id import run_id_of
from pref.training.schedule import learning_rate_at, number_of_steps, pairs_of_step

ONE = Ranks(0, 1, torch.device("cpu"))
PACKING = Packing(pad_id=2)
SMALL_RUN = (
    "--dtype float32 --lora_r 4 --lora_dropout 0 --global_batch 8 --learning_rate 1e-3 --epochs 1"
)


def train_args(tiny_model, pairs_folder, results, *more) -> tuple:
    """Arguments of a small run: one epoch of four steps, 8 pairs each."""
    folders = ("--model", tiny_model, "--data", pairs_folder, "--results_dir", results)
    return (*folders, *SMALL_RUN.split(), *more)


def train(*args) -> int:
    """A run in this process. Returns the exit code."""
    return train_pref.main([str(arg) for arg in args])


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tiny_model, pairs_folder, tmp_path_factory):
    """A finished run of td_dpo in one process."""
    results = tmp_path_factory.mktemp("results")
    arguments = train_args(tiny_model, pairs_folder, results, "--run_id", "one")
    done = run_script("train_pref.py", *arguments)
    assert done.returncode == 0, done.stderr
    return results / "one"


# ---- what a run leaves --------------------------------------------------------------------------


METRICS = """
    step epoch loss preference anchor anchor_k1 logps/chosen logps/rejected rewards/chosen
    rewards/rejected rewards/margins rewards/accuracies margin/rho margin/delta score
    grad_norm lr tokens tok_per_s peak_gib nonfinite
"""


def test_run_writes_its_files(finished):
    record = json.loads((finished / "args.json").read_text())
    expected = {"loss": "td_dpo", "beta": 0.05, "tau": 1.0, "seed": 42}
    assert {key: record[key] for key in expected} == expected
    assert set(record["data_sha256"]) == {"train", "val"}
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["pref"] == __version__
    assert not {"dry_run", "plan_json", "status", "report_to"} & record.keys()
    lines = metrics_of(finished)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert [key for key in steps[0] if not key.startswith("terms/")] == METRICS.split()
    evaluations = [line for line in lines if "eval/acc_ref" in line]
    assert [line["step"] for line in evaluations] == [0, 4]
    accuracies = ["eval/acc_ref", "eval/acc_sum", "eval/acc_mean"]
    assert list(evaluations[0])[-3:] == accuracies
    summary = json.loads((finished / "summary.json").read_text())
    expected = {"status": "finished", "best_step": 4, "nonfinite_steps": 0}
    assert {key: summary[key] for key in expected} == expected


@pytest.mark.slow
def test_seeds_are_paired_over_losses(tiny_model, pairs_folder, tmp_path):
    """At one seed every loss gets the same LoRA matrices and the same batches; at another seed,
    others.
    """

    def start_of(loss: str, seed: int) -> tuple[torch.Tensor, list[float]]:
        run_id = f"{loss}{seed}"
        more = f"--loss {loss} --seed {seed} --run_id {run_id} --max_steps 2 --learning_rate 1e-12"
        assert train(*train_args(tiny_model, pairs_folder, tmp_path, *more.split())) == 0
        weights = load_file(tmp_path / run_id / "adapter" / "adapter_model.safetensors")
        matrices = [t.flatten() for name, t in sorted(weights.items()) if "lora_A" in name]
        steps = [line for line in metrics_of(tmp_path / run_id) if "loss" in line]
        return torch.cat(matrices), [s[key] for s in steps for key in ("tokens", "logps/chosen")]

    matrices, batches = start_of("dpo", 42)
    other_loss, its_batches = start_of("simpo", 42)
    assert torch.allclose(matrices, other_loss, atol=1e-9)
    assert batches == pytest.approx(its_batches, abs=1e-4)
    other_seed, its_batches = start_of("dpo", 43)
    assert not torch.allclose(matrices, other_seed, atol=1e-3)
    assert batches != pytest.approx(its_batches, abs=1e-4)


def test_step0_is_the_reference(finished):
    first = next(line for line in metrics_of(finished) if "eval/acc_ref" in line)
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["step0_difference"] <= gates.STEP0_TOLERANCE[torch.float32]
    assert abs(first["eval/margin/rho"]) < 1e-4


def test_val_pairs_agree_with_metrics_and_with_plain_peft(finished, tiny_model, pairs_folder):
    """The adapter on disk, loaded by plain PEFT, gives the log-probs that the run recorded."""
    rows = [json.loads(line) for line in (finished / "val_pairs.jsonl").read_text().splitlines()]
    best = [row for row in rows if row["step"] == 4]
    assert len(rows) == 16 and len(best) == 8
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = PeftModel.from_pretrained(base, finished / "adapter").eval()

    def logps_of(ids: torch.Tensor) -> torch.Tensor:
        logps = model(ids).logits[0, :-1].log_softmax(-1)  # (T - 1, V)
        return logps.gather(1, ids[0, 1:, None])[:, 0]

    for row, pair in zip(best, val_pairs(tiny_model, pairs_folder)):
        for side in ("chosen", "rejected"):
            ids = torch.tensor([pair.prompt + getattr(pair, side)])
            with torch.no_grad():
                logps = logps_of(ids)
                with model.disable_adapter():
                    refs = logps_of(ids)
            start = len(pair.prompt) - 1
            assert row[f"policy_{side}"] == pytest.approx(logps[start:].sum().item(), rel=1e-5)
            assert row[f"ref_{side}"] == pytest.approx(refs[start:].sum().item(), rel=1e-5)
            assert row[f"len_{side}"] == len(getattr(pair, side))


@pytest.mark.slow
def test_training_moves_the_margin(tiny_model, pairs_folder, tmp_path):
    more = "--loss dpo --beta 0.5 --learning_rate 1e-2 --epochs 6 --run_id long"
    assert train(*train_args(tiny_model, pairs_folder, tmp_path, *more.split())) == 0
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


@pytest.mark.slow
def test_reference_cache_is_shared_and_a_damaged_one_recomputed(
    finished, tiny_model, pairs_folder, tmp_path
):
    data = tmp_path / "data"
    shutil.copytree(pairs_folder, data)
    record = json.loads((finished / "args.json").read_text())
    files = sorted(reference.cache_files(data, record).values())
    everything = sorted((data / "reference").iterdir())
    assert len(files) == 2 and set(files) <= set(everything)
    files[0].write_bytes(files[0].read_bytes()[:-40])  # torn
    damaged = bytearray(files[1].read_bytes())
    damaged[-1] ^= 1  # one flipped bit
    files[1].write_bytes(damaged)
    dpo = ("--loss", "dpo", "--max_steps", "1")
    done = run_script("train_pref.py", *train_args(tiny_model, data, tmp_path, *dpo))
    assert done.returncode == 0, done.stderr
    assert "read from" not in done.stdout
    for file, problem in zip(files, ("cannot be read", "is damaged")):
        assert f"warning: {file}: {problem}" in done.stdout
    discopop = ("--loss", "discopop", "--seed", "7", "--max_steps", "1")
    again = run_script("train_pref.py", *train_args(tiny_model, data, tmp_path, *discopop))
    assert again.stdout.count("read from") == 2
    assert sorted((data / "reference").iterdir()) == everything
    for copy in files:
        original = load_file(pairs_folder / "reference" / copy.name)["logps"]
        assert torch.allclose(load_file(copy)["logps"], original, atol=1e-5)


@pytest.mark.slow
def test_reference_cached_with_other_batches_passes_the_gate(tiny_model, pairs_folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pairs_folder, data, ignore=shutil.ignore_patterns("reference"))
    for size in ("1", "8"):
        more = f"--dtype bfloat16 --per_device_batch {size} --max_steps 1 --run_id size{size}"
        assert train(*train_args(tiny_model, data, tmp_path / "r", *more.split())) == 0
    assert len(list((data / "reference").iterdir())) == 2


@pytest.mark.parametrize(
    ("stale", "pairs"), [("train", "training pairs of the first step"), ("val", "validation pairs")]
)
def test_a_stale_reference_is_refused_and_all_its_files_named(
    finished, tiny_model, pairs_folder, tmp_path, monkeypatch, stale, pairs
):
    read_cache = reference.read_cache

    def read(path, count):
        whole = read_cache(path, count)
        return whole - 0.01 if f"-{stale}." in path.name else whole  # nats per token

    monkeypatch.setattr(reference, "read_cache", read)
    arguments = train_args(tiny_model, pairs_folder, tmp_path, "--run_id", "wrong")
    with pytest.raises(UserError, match=f"by 0.01 nats per token on the {pairs}") as refusal:
        train(*arguments)
    record = json.loads((finished / "args.json").read_text())
    for file in reference.cache_files(pairs_folder, record).values():
        assert str(file) in str(refusal.value)


def test_a_cached_reference_that_cannot_be_read_is_reported(tmp_path, monkeypatch, capsys):
    """The file of another user: safetensors says that it does not exist."""
    path = tmp_path / "key-train.safetensors"
    assert reference.read_cache(path, 3) is None and capsys.readouterr().out == ""
    reference.write_cache(path, torch.zeros(3))
    assert torch.equal(reference.read_cache(path, 3), torch.zeros(3))

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(disk, "check_readable", refuse)
    assert reference.read_cache(path, 3) is None
    shown = capsys.readouterr().out
    assert f"warning: {path}: cannot be read: its owner has not given you the permission" in shown


def test_the_probe_is_several_short_pairs_or_one_long_one():
    lengths = (300, 20, 2000, 100, 400)  # of a prompt, which counts twice
    pairs = [TokenPair([1] * (length - 1), [1], [1]) for length in lengths]
    assert gates.probe_of(pairs) == [pairs[1], pairs[3], pairs[0]]  # 40 + 200 + 600 tokens
    assert gates.probe_of(pairs[2:3]) == [pairs[2]]


def test_files_can_be_read_by_those_whom_the_umask_allows(finished, pairs_folder):
    umask = os.umask(0)
    os.umask(umask)
    files = [path for path in finished.rglob("*") if path.is_file()]
    files += (pairs_folder / "reference").iterdir()
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


@pytest.mark.slow
def test_clipping_can_be_turned_off(tiny_model, pairs_folder, tmp_path):
    def trained(norm: str) -> dict:
        more = f"--max_grad_norm {norm} --max_steps 1 --run_id clip{norm}"
        assert train(*train_args(tiny_model, pairs_folder, tmp_path, *more.split())) == 0
        return metrics_of(tmp_path / f"clip{norm}")[1], load_file(
            tmp_path / f"clip{norm}" / "adapter" / "adapter_model.safetensors"
        )

    step, off = trained("0")
    assert step["grad_norm"] > 1  # a norm of 1 would clip it
    _, never_reached = trained("1e9")
    assert all(torch.equal(off[name], never_reached[name]) for name in off)


@pytest.mark.slow
def test_an_error_on_one_rank_alone_ends_the_run_and_is_shown(tiny_model, pairs_folder, tmp_path):
    """Only rank 0 tries to make the results folder, and fails; rank 1 waits in a collective, until
    the launcher ends it.
    """
    (tmp_path / "file").write_text("not a folder")
    arguments = train_args(tiny_model, pairs_folder, tmp_path / "file", "--run_id", "x")
    done = run_script("train_pref.py", *arguments, torchrun=2)
    assert done.returncode != 0 and "Not a directory" in done.stderr


def test_gradient_reaches_every_lora_matrix(tiny_model, pairs_folder):
    policy = tiny_policy(tiny_model)
    batch = make_batch(val_pairs(tiny_model, pairs_folder)[:3], PACKING, ONE.device)
    sums = sum_by_row(policy(batch)[0], batch)
    torch.nn.functional.softplus(sums[3:] - sums[:3]).sum().backward()
    gradients = {n: p.grad for n, p in policy.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * 2 * 7  # A and B, two layers, seven linear layers each
    for name, gradient in gradients.items():
        # B = 0 at the start, so A has no gradient yet.
        assert (gradient.abs().max() > 0) == ("lora_B" in name), name


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_gradients_survive_a_reference_pass(tiny_model, pairs_folder, quant):
    """On CPU a forward pass of a 4-bit model in eval mode zeroes later gradients, so the reference
    pass must not be one.
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
    """Logits of the response tokens (N, V) by the model's own forward pass on an ordinary padded
    batch.
    """
    batch = make_batch(pairs, PACKING._replace(padded=True, shared=False), ONE.device)
    logits = policy.model(batch.input_ids, attention_mask=batch.mask).logits
    return logits.flatten(0, 1)[batch.positions]


@pytest.mark.parametrize("kl", ["full_rev", "full_fwd", "full_sym"])
def test_vocabulary_kl_against_plain_logits(tiny_model, pairs_folder, kl):
    policy = tiny_policy(tiny_model)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    pairs = val_pairs(tiny_model, pairs_folder)[:2]
    with torch.no_grad():
        divergence = policy(make_batch(pairs, PACKING, ONE.device), kl)[1]
        logits = plain_logits(policy, pairs)
        with adapter_off(policy.model):
            refs = plain_logits(policy, pairs)
    p, q = (torch.distributions.Categorical(logits=x.double()) for x in (logits, refs))
    forward = torch.distributions.kl_divergence(q, p)
    reverse = torch.distributions.kl_divergence(p, q)
    expected = {"full_rev": reverse, "full_fwd": forward, "full_sym": (forward + reverse) / 2}[kl]
    assert divergence.max() > 1e-3
    assert torch.allclose(divergence.double(), expected, rtol=1e-3, atol=1e-6)


VARIANTS = [f"--loss {name}" for name in LOSSES]
VARIANTS += [f"--loss td_dpo --kl {kl}" for kl in ("k3", "full_sym", "none")]
VARIANTS += ["--loss sft --score brier", "--loss sft --score_smoothing 0.1", "--logp mean"]
VARIANTS += ["--loss dpo --sft_coef 0.5 --score pseudo_spherical --score_alpha 1.5"]


@pytest.mark.slow
@pytest.mark.parametrize("more", VARIANTS)
def test_every_loss_trains_five_steps(tiny_model, pairs_folder, tmp_path, more):
    more = f"--max_steps 5 --epochs 2 --per_device_batch 8 --max_length 96 {more}".split()
    assert train(*train_args(tiny_model, pairs_folder, tmp_path, *more)) == 0
    run = only_run(tmp_path)
    lines = [line for line in metrics_of(run) if "loss" in line]
    assert len(lines) == 5
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert json.loads((run / "summary.json").read_text())["nonfinite_steps"] == 0
    # Rewards are beta times a log-ratio: null for a loss without beta.
    has_beta = "beta" in loss_defaults(json.loads((run / "args.json").read_text())["loss"])
    assert {line["rewards/chosen"] is not None for line in lines} == {has_beta}


def only_run(results):
    """The folder of the one finished run in `results`."""
    (summary,) = results.glob("*/summary.json")
    return summary.parent


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
    expected = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    assert torch.allclose(logps, expected, atol=1e-5)


@pytest.mark.slow
def test_learned_beta_mix_moves_is_logged_and_is_the_same_on_two_ranks(
    tiny_model, pairs_folder, tmp_path
):
    more = ("--loss", "dlrml", "--learn_beta_mix", "--beta_mix_lr", "0.1")

    def learned_on(ranks: int) -> list[float]:
        run_id = f"ranks{ranks}"
        arguments = train_args(tiny_model, pairs_folder, tmp_path, *more, "--run_id", run_id)
        done = run_script("train_pref.py", *arguments, torchrun=ranks)
        assert done.returncode == 0, done.stderr[-2000:]
        return [line["beta_mix"] for line in metrics_of(tmp_path / run_id) if "beta_mix" in line]

    one, two = learned_on(0), learned_on(2)
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

def coupled(pairs, *, beta: float = 0.1):
    if len(pairs.rho) < 2:
        raise ValueError("needs two pairs")
    return F.softplus(-beta * (pairs.rho - pairs.rho.mean() / 2)), {}

def clash(pairs, *, seed: int = 3):
    return -pairs.rho, {}

def broken(pairs, *, beta: float = 0.1):
    return (beta * pairs.rho).exp().log(), {}
"""


def test_a_custom_loss(tiny_model, pairs_folder, tmp_path):
    file, results = tmp_path / "my_loss.py", tmp_path / "r"
    file.write_text(OWN_LOSS)
    more = ("--max_steps", "2", "--loss_file", f"{file}:my_loss", "--offset", "0.25")
    done = run_script("train_pref.py", *train_args(tiny_model, pairs_folder, results, *more))
    assert done.returncode == 0, done.stderr
    run = only_run(results)
    assert run.name.startswith("my_loss_b0.1_s42_") and run.name.endswith("offset0.25")
    record = json.loads((run / "args.json").read_text())
    assert record["offset"] == 0.25 and len(record["loss_file_sha256"]) == 64
    assert (run / "loss.py").read_text() == OWN_LOSS
    first = next(line for line in metrics_of(run) if "loss" in line)
    assert first["loss"] == pytest.approx(math.log1p(math.exp(0.25)), rel=1e-4)
    assert first["terms/half"] == pytest.approx(first["loss"] / 2)
    for spec, more, message in (
        ("coupled", ["--global_batch", "1"], "some micro-batch would hold a single pair"),
        ("broken", [], "fails its self-test: its gradient is NaN at rho 10000"),
        ("clash", [], "parameter seed is an argument of train_pref.py"),
        ("my_loss", ["--offset", "200"], "raises ValueError: offset too large"),
    ):
        with pytest.raises(UserError, match=message):
            args = parse_args(["--data", str(pairs_folder), "--loss_file", f"{file}:{spec}", *more])
            assembly.prepare(args, ONE)
    more = ["--model", str(tiny_model), "--data", str(pairs_folder), "--global_batch", "8"]
    args = parse_args(["--loss_file", f"{file}:coupled", *more])
    assert assembly.prepare(args, ONE).record["couples_batch"]
    assert settings.packing_of(args, pad_id=0).pairs == 4  # a fixed number, whatever their length


@pytest.mark.slow
def test_published_discopop_that_overflows_ends_as_diverged(tiny_model, pairs_folder, tmp_path):
    more = """
        --loss discopop --discopop_form published --beta 2000 --learning_rate 0.05
        --max_nonfinite 2 --epochs 4 --run_id bad
    """
    arguments = train_args(tiny_model, pairs_folder, tmp_path, *more.split())
    done = run_script("train_pref.py", *arguments)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "bad" / "summary.json").read_text())
    assert summary["status"] == "diverged" and summary["nonfinite_steps"] >= 2
    assert "NON-FINITE" in done.stdout
    assert "NaN" not in (tmp_path / "bad" / "metrics.jsonl").read_text()


def test_an_adapter_on_the_output_head_is_trained(tiny_model, pairs_folder, tmp_path):
    """The head belongs to FSDP's root group, which a forward pass alone leaves gathered."""
    more = ("--lora_targets", "q_proj,lm_head", "--run_id", "head", "--learning_rate", "1e-2")
    assert train(*train_args(tiny_model, pairs_folder, tmp_path, *more)) == 0
    weights = load_file(tmp_path / "head" / "adapter" / "adapter_model.safetensors")
    assert weights["base_model.model.lm_head.lora_B.weight"].abs().max() > 1e-3


def test_trial_mode_is_marked(tiny_model, pairs_folder, tmp_path):
    assert train(*train_args(tiny_model, pairs_folder, tmp_path, "--mode", "trial")) == 0
    run = only_run(tmp_path)
    assert run.name.endswith("_trial")
    assert json.loads((run / "args.json").read_text())["mode"] == "trial"
    assert json.loads((run / "summary.json").read_text())["steps"] == 2


def tiny_policy(tiny_model):
    base = load_base(str(tiny_model), torch.float32, "none", ONE.device)
    return ResponseLogps(add_lora(base, 4, 16, 0.0, "all-linear", seed=1).train())


def val_pairs(tiny_model, pairs_folder) -> list[TokenPair]:
    tokenizer = load_tokenizer(str(tiny_model))
    return tokenize_pairs(tokenizer, read_pairs(pairs_folder / "val.jsonl"), 512)


# ---- the plan -----------------------------------------------------------------------------------


def test_the_plan_as_json(tiny_model, pairs_folder, tmp_path, capsys):
    """What sweep.sh reads, and nothing else is written."""
    path = tmp_path / "plan.json"
    given = ("--global_batch", "9", "--eval_steps", "2", "--dry_run", "3", "--plan_json", path)
    assert train(*train_args(tiny_model, pairs_folder, tmp_path / "r", *given)) == 0
    written, shown = json.loads(path.read_text()), capsys.readouterr().out
    assert (written["steps"], written["evaluations"], written["ranks"]) == (4, [0, 2, 4], 3)
    assert f"tokens: {written['tokens']:,} in all steps" in shown
    assert written["total_gib"] == pytest.approx(sum(written["parts_gib"].values()))
    # Over 3 ranks: 4 bytes per parameter of the adapter; 12 / 3 of the optimiser on each rank.
    assert written["adapter_gib"] == pytest.approx(written["parts_gib"]["optimiser"])
    assert not (tmp_path / "r").exists()


def test_settled_arguments_are_copies(tiny_model, pairs_folder):
    """The Namespace that the user's arguments were read into is never written to."""
    args = parse_args(["--model", str(tiny_model), "--data", str(pairs_folder)])
    before = dict(vars(args))
    prepared = assembly.prepare(args, ONE)
    pairs = val_pairs(tiny_model, pairs_folder)
    planned = plan.of_run(settings.for_attention(prepared.args, 500, ONE), pairs, PACKING, ONE)
    assert vars(args) == before
    auto = [key for key, value in vars(planned.args).items() if value == "auto"]
    assert auto == [] and planned.args.run_id == "td_dpo_b0.05_t1_s42"


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
        ("--loss td_dpo --beta 2.5 --tau 2", "td_dpo_b2.5_t2_s42"),
        ("--loss dpo", "dpo_b0.1_s42"),
        ("--loss dpo --logp mean --learning_rate 2e-5", "dpo_b0.1_s42_mean_lr2e-05"),
        (
            "--loss td_dpo --kl full_rev --seed 7 --mode trial",
            "td_dpo_b0.05_t1_s7_full-rev_trial",
        ),
        ("--loss dlrml --beta_mix 0.5 --lora_r 16", "dlrml_b0.05_s42_mix0.5_r16"),
    ],
)
def test_run_id_says_what_was_varied(arguments, expected):
    args = parse_args(arguments.split())
    assert run_id_of(args, loss_parameters(args), parse_args([])) == expected


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tau 0", "--tau 0"),
        ("--loss dpo --tau 1", "dpo has no such parameter"),
        ("--global_batch 7", "does not divide over 2 ranks"),
        ("--data nowhere", "nowhere: no such folder"),
        ("--learning_rate nan", "--learning_rate nan"),
        ("--run_id ../out", "run id '../out'"),
        ("--loss dpo --gamma 1", "dpo has no such parameter"),
        ("--loss dpo --score brier", "--score: has no effect without --sft_coef"),
        ("--loss dpo --learn_beta_mix", "dpo has no beta_mix"),
        ("--loss aqfl --global_batch 2", "would hold a single pair"),
    ],
)
def test_bad_arguments_are_named(pairs_folder, arguments, message):
    args = parse_args(["--data", str(pairs_folder), *arguments.split()])
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        assembly.prepare(args, Ranks(0, 2, torch.device("cpu")))


def test_bad_line_of_the_data_is_named(pairs_folder, tmp_path):
    shutil.copytree(pairs_folder, tmp_path / "data")
    with open(tmp_path / "data" / "train.jsonl", "a") as file:
        file.write('{"id": "x", \n')
    args = parse_args(["--data", str(tmp_path / "data")])
    with pytest.raises(UserError, match=r"train.jsonl:31: not valid JSON"):
        assembly.prepare(args, ONE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--loss unheard_of", "invalid choice"),
        ("--tau 0", "error: --tau 0.0: must be above 0"),
        ("--model /no/model", "error: --model /no/model: no such folder, and not a hub id"),
    ],
)
def test_errors_reach_the_user_in_one_or_two_lines(pairs_folder, tmp_path, arguments, message):
    folders = ("--data", pairs_folder, "--results_dir", tmp_path)
    done = run_script("train_pref.py", *folders, *arguments.split())
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())
