"""The proxy of discover.py: features of pairs, training on them, the split, the horizon."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, example_rows, run_script, write_jsonl
from doubles import load_module
from safetensors.torch import load_file, save_file
from scipy import optimize

from losses import dpo, simpo
from pref.discovery import feature_pass, features, horizon, proxy, split, stages, stand_in
from pref.discovery.features import Features, Part
from pref.files.console import UserError
from pref.model import chat, loading, token_check
from pref.model.logps import ResponseLogps
from pref.model.packing import Packing, make_batch

# ---- phi ----------------------------------------------------------------------------------------


def moved_logp(model, prompt, response, change) -> float:
    """log p(response | prompt) with hidden states h + change h before the head, in float64 and by
    the model's own forward.
    """
    hidden = model.model(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
    logits = (hidden + hidden @ change.T) @ model.lm_head.weight.T
    logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return logps[range(len(response)), response].sum().item()


@torch.no_grad()
def test_phi_is_the_derivative_of_the_log_prob(tiny_model):
    """By central differences along random directions of theta, in float64."""
    cpu = torch.device("cpu")
    tokenizer = chat.load_tokenizer(str(tiny_model))
    checked = token_check.tokenize_checked(tokenizer, example_rows(3), 256, "keep_end", False)
    pairs = checked.pairs
    model = loading.load_base(str(tiny_model), torch.float64, "none", cpu)
    p, q = projections = feature_pass.Projections.of_width(64)

    packing = Packing(tokenizer.pad_token_id, tokens=4096)
    with torch.enable_grad():
        batch = make_batch(pairs, packing, cpu)
        values = feature_pass.logps_and_slopes(ResponseLogps(model), batch)
    logps, slopes, hidden = values
    phi = feature_pass.project(slopes, hidden, batch.lengths, projections)

    model.set_attn_implementation("eager")
    responses = [(x.prompt, x.chosen) for x in pairs] + [(x.prompt, x.rejected) for x in pairs]
    draw = torch.Generator().manual_seed(1)
    for row, (prompt, response) in enumerate(responses):
        assert logps.split(batch.lengths.tolist())[row].sum().item() == pytest.approx(
            moved_logp(model, prompt, response, torch.zeros(64, 64, dtype=torch.double)), rel=1e-5
        )
        theta = torch.randn(32, 32, generator=draw)
        change = (p.T @ theta @ q).double()
        up, down = (moved_logp(model, prompt, response, s * 1e-4 * change) for s in (1, -1))
        assert (phi[row] @ theta.flatten()).item() == pytest.approx((up - down) / 2e-4, rel=1e-3)


def test_features_are_computed_once_and_leave_the_reference(
    own_pairs, tiny_model, tmp_path, capsys
):
    args = [str(tiny_model), own_pairs, ["--max_length", "256", "--dtype", "float32"], tmp_path]
    path = feature_pass.compute(*args)
    found = Features.load(path)
    assert {name: part.pairs for name, part in found.parts.items()} == {"train": 30, "val": 8}
    assert found.train.phi_chosen.shape == (30, 1024)
    length = (found.train.phi_chosen - found.train.phi_rejected).square().sum(1).mean().sqrt()
    assert length.item() == pytest.approx(1)

    # The log-probs are those of the reference, whose cache was written too.
    tokens = load_file(next((own_pairs / "reference").glob("*-val.safetensors")))["logps"]
    total = found.val.ref_chosen.sum() + found.val.ref_rejected.sum()
    assert total.item() == pytest.approx(tokens.double().sum().item(), rel=1e-5)

    # A second call loads no model. A damaged file is named, and computed again.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_pass, "run", lambda *_: pytest.fail("computed again"))
        assert feature_pass.compute(*args) == path
        path.write_bytes(path.read_bytes()[:-9])
        patch.setattr(feature_pass, "run", lambda *_: found.parts)
        assert feature_pass.compute(*args) == path
    assert f"warning: {path}: cannot be read" in capsys.readouterr().out
    assert torch.equal(Features.load(path).val.phi_chosen, found.val.phi_chosen)


@pytest.mark.slow
def test_a_run_reads_the_reference_that_the_features_left(own_pairs, tiny_model, tmp_path):
    train_args = ["--max_length", "256", "--lora_r", "4", "--global_batch", "8"]
    feature_pass.compute(str(tiny_model), own_pairs, train_args, tmp_path)
    run = ["--model", tiny_model, "--data", own_pairs, "--results_dir", tmp_path, "--loss", "dpo"]
    done = run_script("train_pref.py", *run, *train_args, "--max_steps", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": read from ") == 2


def test_an_adapter_to_start_from_is_refused(own_pairs, tiny_model, tmp_path):
    with pytest.raises(UserError, match="--init_adapter: a search starts from the base model"):
        feature_pass.compute(str(tiny_model), own_pairs, ["--init_adapter", "x"], tmp_path)


# ---- the file -----------------------------------------------------------------------------------


def some_part(pairs: int, seed: int, width: int = 8) -> Part:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 60, (2, pairs), generator=draw).float()
    refs = -2 * tokens - torch.rand(2, pairs, generator=draw)
    return Part(*refs, *tokens, *torch.randn(2, pairs, width, generator=draw))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "features.safetensors"
    features.write(path, {"train": some_part(40, 0), "val": some_part(25, 1)}, {"model": "none"})
    return path


def changed(path, **tensors) -> None:
    """Write the file again with other tensors, without a checksum; None removes one."""
    all_tensors = load_file(path) | tensors
    save_file({name: x for name, x in all_tensors.items() if x is not None}, path)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"val_phi_chosen": None}, "has no tensor val_phi_chosen"),
        ({"val_ref_chosen": torch.full((25,), math.nan)}, "val_ref_chosen has values that are NaN"),
        ({"val_ref_chosen": torch.zeros(24)}, r"shape \(25,\), expected \(24,\)"),
        ({"train_phi_rejected": torch.zeros(40, 7)}, r"shape \(40, 7\), expected \(40, 8\)"),
        ({"val_chosen_tokens": torch.zeros(25)}, "val has a response of less than one token"),
        ({"confirm_ref_chosen": torch.zeros(2)}, "has no tensor confirm_ref_rejected"),
        ({"train_phi_chosen": torch.ones(40, 8), "train_phi_rejected": torch.ones(40, 8)}, "equal"),
        ({f"val_{x}": torch.ones(25, 9) for x in ("phi_chosen", "phi_rejected")}, "different wid"),
    ],
)
def test_features_that_cannot_be_used_are_refused(file, tensors, message):
    changed(file, **tensors)
    with pytest.raises(UserError, match=message):
        Features.load(file)


def test_a_damaged_file_is_refused(file, tmp_path):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        Features.load(file)
    file.write_bytes(b"not this")
    with pytest.raises(UserError, match="cannot be read"):
        Features.load(file)
    with pytest.raises(UserError, match="no such file"):
        Features.load(tmp_path / "other.safetensors")


# ---- training -----------------------------------------------------------------------------------


def trained_by_torch(part: Part, val: Part, steps: int, batch: int, rate: float, seed: int):
    """rho after DPO at beta 0.1, by torch's AdamW and clipping, with the schedule written out."""
    theta = torch.nn.Parameter(torch.zeros(part.phi_chosen.shape[1]))
    optimizer = torch.optim.AdamW([theta], lr=rate, weight_decay=0.01)
    warmup = math.ceil(0.1 * steps)
    difference = part.phi_chosen - part.phi_rejected
    for step in range(steps):
        epoch, within = divmod(step, math.ceil(part.pairs / batch))
        order = np.random.default_rng([seed, epoch]).permutation(part.pairs)
        members = order[within * batch : (within + 1) * batch]
        angle = math.pi * (step - warmup) / (steps - warmup)
        factor = (step + 1) / warmup if step < warmup else 0.5 + 0.5 * math.cos(angle)
        optimizer.param_groups[0]["lr"] = rate * factor
        optimizer.zero_grad()
        F.softplus(-0.1 * (difference[members] @ theta)).mean().backward()
        torch.nn.utils.clip_grad_norm_([theta], 1.0)
        optimizer.step()
    return ((val.phi_chosen - val.phi_rejected) @ theta).detach().numpy()


def test_the_proxy_is_trained_as_a_run_is(file):
    found = Features.load(file)
    given = {"steps": 13, "batch": 12, "seed": 5}  # a ragged batch, more than two epochs
    one = proxy.train(dpo, found, learning_rate=0.3, **given)
    expected = trained_by_torch(found.train, found.val, rate=0.3, **given)
    assert one.margins == pytest.approx(expected, abs=1e-5)
    assert one.accuracy == (expected > 0).mean() == one.correct.mean()
    assert one.nonfinite == 0
    again = proxy.train(dpo, found, learning_rate=0.3, **given)
    assert again.margins.tobytes() == one.margins.tobytes()
    assert proxy.train(dpo, found, steps=13, batch=12, learning_rate=0.3, seed=6) != one


def test_steps_that_are_not_finite_are_counted_and_not_taken(file):
    def broken(pairs):
        losses, terms = dpo(pairs)
        return losses / (pairs.rho.detach() * 0), terms

    one = proxy.train(broken, Features.load(file), steps=3, batch=8, learning_rate=0.1, seed=0)
    assert one.nonfinite == 3
    assert one.correct.tolist() == [0.5] * 25  # theta is still 0: all ties
    assert one.bits == 0
    assert "not finite in 3 steps" in proxy.stop_reason([one])


def test_a_loss_that_learns_the_wrong_way_is_stopped():
    right = np.array([1.0] * 40 + [0.0] * 60)
    one = proxy.Outcome(0.4, 0.0, right, right, 1.0, 0)
    assert proxy.stop_reason([one]) is None  # 0.5 - 3 x 0.05 = 0.35
    other = one._replace(correct=1 - np.array([1.0] * 80 + [0.0] * 20))
    assert "accuracy 0.200 on 100 pairs" in proxy.stop_reason([other, other])


def test_bits_are_the_log_loss_at_the_best_temperature():
    rho = np.random.default_rng(0).normal(3.0, 9.0, 300)
    loss = lambda s: np.logaddexp(0, -s * rho).mean() / math.log(2)  # noqa: E731
    best = optimize.minimize_scalar(loss, bounds=(0, 10), method="bounded", options={"xatol": 1e-9})
    assert proxy.bits_over_chance(rho) == pytest.approx(1 - best.fun, abs=1e-7)
    assert proxy.bits_over_chance(1e4 * rho) == pytest.approx(proxy.bits_over_chance(rho), abs=1e-9)
    assert proxy.bits_over_chance(-rho) == 0
    assert proxy.bits_over_chance(np.zeros(3)) == 0
    assert proxy.bits_over_chance(np.array([0.1, 2.0])) == 1


# ---- the split ----------------------------------------------------------------------------------


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompts_of(path) -> set[str]:
    return {json.dumps(row["prompt"]) for row in rows_of(path)}


def test_the_search_never_opens_val_jsonl(tmp_path):
    data, folder = tmp_path / "data", tmp_path / "search"
    rows = example_rows(40)
    rows[7]["prompt"] = rows[3]["prompt"]
    write_jsonl(data / "train.jsonl", rows)  # there is no val.jsonl at all
    found = split.write_search(data, folder)
    assert found == split.count(data) == (20, 20)
    sides = [folder / "data" / "search" / f"{name}.jsonl" for name in ("train", "val")]
    assert not prompts_of(sides[0]) & prompts_of(sides[1])
    by_id = {row["id"]: row for path in sides for row in rows_of(path)}
    assert by_id == {row["id"]: row for row in rows}

    # The order of the rows makes no difference, and a second start leaves the files alone.
    times = [path.stat().st_mtime_ns for path in sides]
    split.write_search(data, folder)
    assert [path.stat().st_mtime_ns for path in sides] == times
    write_jsonl(data / "train.jsonl", rows[::-1])
    split.write_search(data, tmp_path / "other")
    ids = [
        json.loads((f / "split.json").read_text())["val_ids"] for f in (folder, tmp_path / "other")
    ]
    assert ids[0] == ids[1][::-1]
    with pytest.raises(UserError, match="has changed since"):
        split.write_search(data, folder)


def test_a_fifth_of_many_pairs_is_measured_with():
    rows = [{"id": f"{i}", "prompt": [{"role": "user", "content": f"{i}"}]} for i in range(1000)]
    assert len(split.measured_with(rows)) == 200
    assert len(split.measured_with(rows[:300])) == 100
    assert len(split.measured_with(rows[:60])) == 30


def test_prompts_that_are_in_train_confirm_nothing(tmp_path, capsys):
    data, rows = tmp_path / "data", example_rows(30)
    write_jsonl(data / "train.jsonl", rows[:25])
    write_jsonl(data / "val.jsonl", [*rows[25:], rows[0] | {"id": "again"}])
    assert split.write_confirm(data, tmp_path) == (25, 5)
    assert "1 of 6 pairs are left out of the confirmation" in capsys.readouterr().out
    confirm = tmp_path / "data" / "confirm"
    assert rows_of(confirm / "train.jsonl") == rows[:25]
    assert rows_of(confirm / "val.jsonl") == rows[25:]
    write_jsonl(data / "val.jsonl", [rows[0]])
    with pytest.raises(UserError, match="all its prompts are in train.jsonl too"):
        split.write_confirm(data, tmp_path)


def test_pairs_that_cannot_be_divided_are_refused(tmp_path):
    rows = example_rows(25)
    write_jsonl(tmp_path / "train.jsonl", rows[:10])
    with pytest.raises(UserError, match="10 pairs; a search needs at least 20"):
        split.count(tmp_path)
    write_jsonl(tmp_path / "train.jsonl", [*rows[:20], rows[3]])
    with pytest.raises(UserError, match="its pair 21 has the id 'pair3' of an earlier one"):
        split.count(tmp_path)
    write_jsonl(tmp_path / "train.jsonl", [row | {"prompt": rows[0]["prompt"]} for row in rows])
    with pytest.raises(UserError, match="more than half of its pairs have one prompt"):
        split.count(tmp_path)


# ---- the horizon --------------------------------------------------------------------------------


def test_a_short_horizon_is_said_with_the_steps_that_would_do(file):
    short = horizon.pilot(Features.load(file), steps=4, batch=8, learning_rate=0.01)
    assert 0 < short.median_z < 0.1
    steps = round(4 * 0.5 / short.median_z)
    assert f"--max_steps to about {steps:,} steps" in short.note
    assert horizon.pilot(Features.load(file), steps=40, batch=8, learning_rate=3.0).note is None


def test_the_proxy_moves_as_far_as_a_run(file):
    found = Features.load(file)
    for median_z in (0.05, 0.8):
        run = horizon.Pilot(visited=1.0, median_z=median_z, note=None)
        rate = horizon.match_rate(found, run, steps=12, batch=8)
        matched = horizon.pilot(found, steps=12, batch=8, learning_rate=rate)
        assert matched.median_z == pytest.approx(median_z, rel=0.05)


def test_what_a_run_visited_is_read_from_its_pairs(tmp_path):
    rows = [
        {"id": f"{i}", "step": step, "policy_chosen": -50.0 + step * i, "ref_chosen": -50.0}
        | {"policy_rejected": -60.0 - step * i, "ref_rejected": -60.0}
        for step in (0, 2)
        for i in range(11)
    ]
    write_jsonl(tmp_path / "val_pairs.jsonl", rows)
    found = horizon.of_run(tmp_path, steps=2)
    assert found.visited == pytest.approx(np.quantile(np.repeat(2.0 * np.arange(11), 2), 0.9))
    assert found.median_z == pytest.approx(0.1 * 20)  # rho = 4 i, its median 20
    assert found.note is None


def test_simpo_reads_the_tokens_of_the_features(file):
    """Doubling a response's tokens halves its mean log-prob: the loss must see them."""
    found = Features.load(file)
    longer = found.train._replace(chosen_tokens=2 * found.train.chosen_tokens)
    parts = found.parts | {"train": longer}
    given = {"steps": 2, "batch": 8, "learning_rate": 0.1, "seed": 0}
    one, other = (proxy.train(simpo, f, **given) for f in (found, found._replace(parts=parts)))
    assert not np.allclose(one.margins, other.margins)


# ---- worlds that are made up --------------------------------------------------------------------


@pytest.fixture(scope="module")
def worlds():
    """bench/planted_world.py as a module."""
    return load_module("planted_world", ROOT / "bench" / "planted_world.py")


def robust(pairs):
    """By the square of the length: long pairs hardly count."""
    losses = F.softplus(-200 * pairs.rho / pairs.chosen_tokens**2)
    return losses, {"preference": losses}


def test_in_the_planted_world_a_loss_that_mistrusts_long_pairs_wins(worlds, tmp_path):
    path = tmp_path / "world.safetensors"
    worlds.write(path, seed=0, is_null=False)
    world, found = stand_in.read(path), Features.load(path)
    assert world == ((320, 400), 20, 16, 3.0)
    is_long = found.train.chosen_tokens > 60
    assert is_long.float().mean().item() == pytest.approx(0.2, abs=0.001)
    given = {"steps": 20, "batch": 16, "learning_rate": 0.3, "part": "confirm"}
    accuracies = [
        np.mean([proxy.train(loss, found, seed=seed, **given).accuracy for seed in (7, 8)])
        for loss in (dpo, robust)
    ]
    assert accuracies[0] < 0.66
    assert accuracies[1] > 0.77


def test_in_the_null_world_the_sign_is_all_that_counts(worlds, tmp_path):
    path = tmp_path / "world.safetensors"
    worlds.write(path, seed=0, is_null=True)
    found = Features.load(path)
    part = found.parts["confirm"]
    difference = part.phi_chosen - part.phi_rejected
    common = (part.phi_chosen + part.phi_rejected).norm(dim=1)
    is_easy = (common < 1e-5).numpy()  # chosen and rejected are opposite
    assert is_easy.mean() == pytest.approx(0.3, abs=0.001)
    # One direction for all easy pairs, and nothing of it in the others.
    direction = difference[is_easy][0] / difference[is_easy][0].norm()
    along = (difference @ direction) / difference.norm(dim=1)
    assert along[is_easy].min() > 0.9999
    assert along[~is_easy].abs().max() < 1e-4
    for loss in (dpo, simpo, robust):
        one = proxy.train(
            loss, found, steps=20, batch=16, learning_rate=0.3, seed=1, part="confirm"
        )
        assert one.correct[is_easy].min() == 1
        assert one.correct[~is_easy].mean() == pytest.approx(0.5, abs=0.05)  # 1,400 pairs: 3.7 SE


class InThisProcess:
    """Workers without processes."""

    def __init__(self, found: Features):
        self.found = found

    def proxy(self, jobs):
        return [stages.try_on_features(job, self.found, batch=16) for job in jobs]


def test_the_proxy_stands_in_for_training_runs(worlds, tmp_path):
    path = tmp_path / "world.safetensors"
    worlds.write(path, seed=0, is_null=False)
    found = Features.load(path)
    search = SimpleNamespace(workers=InThisProcess(found), proxy_steps=3, proxy_rate=0.3)
    texts = {"p0001": stand_in.dpo_text(0.1), "p0002": stand_in.dpo_text(5.0)}
    runs = stand_in.train(search, texts, [101, 102])
    assert [(run["id"], run["seed"], run["status"]) for run in runs] == [
        (id, seed, "finished") for id in texts for seed in (101, 102)
    ]
    given = {"steps": 3, "batch": 16, "learning_rate": 0.3, "seed": 102}
    assert runs[1]["acc_ref"] == proxy.train(dpo, found, **given).accuracy
    tables = stand_in.tables(search, texts, [9001, 9002], "confirm")
    assert {id: table.shape for id, table in tables.items()} == dict.fromkeys(texts, (2, 2000))
    expected = proxy.train(dpo, found, **given | {"seed": 9002, "part": "confirm"})
    assert tables["p0001"][1].tolist() == expected.correct.tolist()
    assert not np.array_equal(tables["p0001"], tables["p0002"])


def test_metadata_that_cannot_be_are_refused(tmp_path):
    parts = {name: some_part(30, n) for n, name in enumerate(("train", "val", "confirm"))}
    features.write(tmp_path / "x.safetensors", parts, {"steps": "many"})
    with pytest.raises(UserError, match="its metadata have steps 'many'; must be a number above 0"):
        stand_in.read(tmp_path / "x.safetensors")
    assert features.is_world(tmp_path / "x.safetensors")


@pytest.mark.slow
def test_a_whole_search_without_a_model(worlds, tmp_path):
    worlds.write(tmp_path / "world.safetensors", seed=0, is_null=False)
    command = ["discover.py", tmp_path / "search", "--features", tmp_path / "world.safetensors"]
    command += ["--max_proposals", 16]
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    archive = (tmp_path / "search" / "archive.jsonl").read_bytes()
    assert b'"event": "trained"' in archive
    confirmed = run_script(*command, "--confirm", 1)
    assert confirmed.returncode == 0, confirmed.stderr
    found = json.loads((tmp_path / "search" / "confirmation.json").read_text())
    assert found["pairs"] == 2000
    assert found["candidates"][0]["word"] == "better"
    assert (tmp_path / "search" / "archive.jsonl").read_bytes().startswith(archive)
