"""discover.py's search: rounds, rungs, the archive under kills, estimates, confirmation."""

import argparse
import hashlib
import json
import math
import shutil

import numpy as np
import pytest
from conftest import example_rows, write_jsonl
from scipy import stats as scipy_stats

import discover
from pref.discovery import (
    archive,
    confirmation,
    estimates,
    fingerprint,
    form,
    printing,
    rungs,
    search,
    settings,
    split,
    status,
    task_fitness,
)
from pref.discovery.archive import Archive, state_of
from pref.discovery.arms import Arms
from pref.discovery.evolve import Evolve
from pref.discovery.search import Search
from pref.discovery.settings import Settings
from pref.files.console import UserError
from pref.sweeping import grid
from pref.training import schedule

PAIRS = 40
TINY_ARGS = "--global_batch 8 --lora_r 4 --learning_rate 2e-2 --max_steps 3 --lora_dropout 0"


def settings_of(**changes) -> Settings:
    values = {
        "model": "M",
        "data": "D",
        "preset": "quick",
        "seed": 0,
        "max_proposals": 16,
        "rung": (3, 2),
        "seeds_per_rung": (1, 2),
        "seeds_from": ("dpo", "ipo"),
        "coupled": False,
        "proxy": "on",
        "proposer": ("evolve",),
        "parameters": None,
        "train_args": TINY_ARGS,
        "task": "",
        "task_args": "",
        "gen_args": "",
        "features": "",
    }
    return Settings(**values | changes)


# ---- a search without workers and without training ----------------------------------------------


def luck(*key) -> np.random.Generator:
    """Dice that depend on `key` alone."""
    return np.random.default_rng(list(hashlib.sha256(repr(key).encode()).digest()))


READ: dict[tuple, dict] = {}  # results of reading, which takes most of the time of these searches


class Workers:
    """In place of workers.Workers: reads in this process, and its proxy is luck."""

    sandbox = "none"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self, jobs):
        for job in jobs:
            key = job["text"], job["name"]
            READ[key] = READ.get(key) or self.read_one(job)
        return [READ[job["text"], job["name"]] for job in jobs]

    def read_one(self, job):
        result = {"id": job["id"], "stopped": None, "program": None, "selftest": {}, "field": None}
        try:
            program = form.translate(job["text"], name=job["name"])
        except form.Refusal as refusal:
            return result | {"stopped": {"at": "form", "why": str(refusal)}}
        loss = printing.load(program.text)
        named = {k: getattr(program, k) for k in ("name", "text", "sha256", "parameters", "steps")}
        return result | {
            "program": named,
            "field": fingerprint.field(loss, 10.0).tolist(),
            "cell": fingerprint.cell(loss),
            "gradient": {"0": 1.0},
        }

    def proxy(self, jobs):
        outcomes = []
        for job in jobs:
            correct = luck(job["text"]).integers(0, 2, (len(job["seeds"]), PAIRS)).astype(float)
            outcome = {"id": job["id"], "stopped": None, "correct": correct.tolist()}
            outcomes.append(outcome | {"bits": [0.1] * len(correct), "accuracy": [], "margins": []})
        return outcomes


def read_grid(path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split(maxsplit=1) for line in lines)


class Training:
    """In place of rungs.run_grid: writes the run folders of a grid, and counts the runs."""

    def __init__(self, backwards: bool = False):
        self.backwards, self.trained, self.grids = backwards, [], []

    def __call__(self, search, path):
        values = read_grid(path)
        self.grids.append(values)
        results = search.folder / values["RESULTS"].removeprefix(str(search.folder) + "/")
        betas = [float(beta) for beta in values.get("BETAS_dpo", "0.1").split()]
        runs = [
            (loss.rpartition(":")[2], int(seed), beta)
            for loss in values["LOSSES"].split()
            for seed in values["SEEDS"].split()
            for beta in (betas if loss == "dpo" else [None])
        ]
        for name, seed, beta in reversed(runs) if self.backwards else runs:
            folder = results / f"{name}_b{beta}_s{seed}"
            if not folder.exists():
                self.trained.append((results.name, name, seed, beta))
                write_run(folder, name, seed, beta)
        return True


def write_run(folder, name, seed, beta) -> None:
    margins = luck(name, seed, beta).normal(0.3, 1, PAIRS).astype(np.float32).astype(float)
    margins[0] = 0.0  # a tie
    rows = [
        {
            "id": f"pair{i}",
            "step": step,
            "policy_chosen": margin if step else 0.0,  # before training all pairs are ties
            "policy_rejected": 0.0,
            "ref_chosen": 0.0,
            "ref_rejected": 0.0,
        }
        for step in (0, 3)
        for i, margin in enumerate(margins)
    ]
    folder.mkdir(parents=True)
    write_jsonl(folder / "val_pairs.jsonl", rows)
    accuracy = float(((margins > 0) + 0.5 * (margins == 0)).mean())
    summary = {"status": "finished", "final_acc_ref": accuracy, "wall_s": 60.0, "steps": 3}
    record = {"loss": name, "seed": seed, "beta": beta, "learning_rate": 2e-2}
    (folder / "args.json").write_text(json.dumps(record))
    (folder / "summary.json").write_text(json.dumps(summary))


def make_search(folder, chosen=None, **changes) -> Search:
    chosen = chosen or settings_of()
    values = {
        "folder": folder,
        "settings": chosen,
        "archive": Archive.open(folder),
        "arms": Arms([Evolve()], most_proposals=chosen.max_proposals),
        "open_workers": Workers,
        "visited": 10.0,
        "setting": "three lines",
        "proxy_steps": 3,
        "proxy_rate": 0.3,
    }
    return Search(**values | changes)


@pytest.fixture
def training(monkeypatch) -> Training:
    double = Training()
    monkeypatch.setattr(rungs, "run_grid", double)
    return double


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The folder of a search that was never disturbed."""
    folder = tmp_path_factory.mktemp("ended")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rungs, "run_grid", Training())
        assert search.run(make_search(folder), rungs.take)
    return folder


def content_of(folder) -> dict[str, bytes]:
    names = [*folder.glob("*.jsonl"), *folder.glob("proposals/*/*"), *folder.glob("control/*/*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


# ---- the order of things ------------------------------------------------------------------------


def test_the_plan_of_the_hour_has_its_runs_in_four_instalments_and_a_control():
    hour = settings_of(max_proposals=800, rung=(12, 5, 3), seeds_per_rung=(1, 2, 3))
    assert search.instalments(hour) == [3, 3, 3, 3]
    names = [step.name for step in search.plan(hour)]
    assert names[:2] == ["round 0", "round 1"] and names.count("control") == 1
    assert names.index("rung 0.0") == names.index("round 13") + 1
    assert names[-6:] == ["round 50", "rung 0.3", "fresh 0.3", "control", "rung 1", "rung 2"]
    assert status.runs_of(hour, search.plan(hour)) == 12 + 10 + 9 + 1 + 2 + 3  # 37


def test_a_search_ends_with_its_steps_and_trains_each_run_once(ended):
    state = Archive.read(ended).state()
    chosen = settings_of()
    assert state.steps == [step.name for step in search.plan(chosen)]
    assert state.dpo.name == "dpo" and state.dpo.runs.keys() == {101, 201, 202}
    trained = [e for e in state.entries.values() if e.runs and e.id != "p0001"]
    assert 3 <= len(trained) <= 4 and sum(len(e.runs) == 3 for e in trained) >= 2
    assert len(Archive.read(ended, "control").state().entries) == 2 + 16
    # What was refused as a duplicate is one, by a computation of its own from the programs.
    copies = [e for e in state.entries.values() if e.stopped and e.stopped["at"] == "duplicate"]
    assert copies
    for entry in copies[:3]:
        texts = [
            (ended / "proposals" / id / "loss.py").read_text()
            for id in (entry.id, entry.stopped["near"])
        ]
        fields = [fingerprint.field(printing.load(text), 10.0) for text in texts]
        assert fingerprint.distance(*fields) == pytest.approx(entry.stopped["distance"], abs=1e-5)
        assert entry.stopped["distance"] < fingerprint.NEAR


class Killed(BaseException):
    pass


def test_a_search_killed_at_every_step_ends_with_the_same_archive(
    ended, tmp_path, monkeypatch, training
):
    """Killed halfway through the lines of each step, after all its work."""
    write_all = archive.write_all

    def die_halfway(file, content):
        file.write(content[: len(content) // 2])
        raise Killed

    for _ in search.plan(settings_of()):
        # 1) Killed while the events of a step are written.
        monkeypatch.setattr(archive, "write_all", die_halfway)
        with pytest.raises(Killed):
            search.run(make_search(tmp_path), rungs.take)
        # 2) The same command takes that step; a signal stops it after that.
        monkeypatch.setattr(archive, "write_all", write_all)
        one_step = make_search(tmp_path)
        before = len(one_step.state.steps)
        one_step.stop_level = lambda one=one_step, n=before: len(one.state.steps) > n
        search.run(one_step, rungs.take)
        assert len(Archive.read(tmp_path).state().steps) == before + 1
    assert content_of(tmp_path) == content_of(ended)
    assert len(set(training.trained)) == len(training.trained)


def test_the_order_in_which_runs_end_changes_nothing(ended, tmp_path, monkeypatch):
    monkeypatch.setattr(rungs, "run_grid", Training(backwards=True))
    search.run(make_search(tmp_path), rungs.take)
    assert content_of(tmp_path) == content_of(ended)


def test_a_full_disk_is_named_and_the_archive_is_as_before(tmp_path, monkeypatch):
    opened = Archive.open(tmp_path)
    opened.append_step("round 0", [])
    before, write_all = opened.path.read_bytes(), archive.write_all

    def full(file, content):
        file.write(content[:10])
        raise OSError(28, "No space left on device", str(opened.path))

    monkeypatch.setattr(archive, "write_all", full)
    with pytest.raises(OSError, match="No space left"):
        opened.append_step("round 1", [{"event": "ended", "by": "evolve", "why": "x"}])
    assert opened.path.read_bytes() == before
    monkeypatch.setattr(archive, "write_all", write_all)
    opened.append_step("round 1", [])
    assert Archive.open(tmp_path).state().steps == ["round 0", "round 1"]


def test_a_torn_line_and_a_step_without_its_end_are_dropped_and_nonsense_is_named(tmp_path):
    opened = Archive.open(tmp_path)
    opened.append_step("round 0", [])
    whole = opened.path.read_bytes()
    for tail in (b'{"event": "ended", "by": "x", "why": "y"}\n', b'{"event": "st', b"\x00\xff"):
        opened.path.write_bytes(whole + tail)
        assert Archive.read(tmp_path).state().steps == ["round 0"]
        assert Archive.open(tmp_path).path.read_bytes() == whole
    opened.path.write_bytes(whole + b"no JSON\n" + whole)
    with pytest.raises(UserError, match=r"archive\.jsonl:2: not valid JSON"):
        Archive.open(tmp_path)
    opened.path.write_bytes(b'{"event": "proxy", "id": "p9"}\n{"event": "step", "name": "x"}\n')
    with pytest.raises(UserError, match=r"archive\.jsonl:2: .*changed by hand"):
        Archive.open(tmp_path)


# ---- rungs --------------------------------------------------------------------------------------


def test_a_grid_of_candidates_is_one_that_the_scheduler_reads(ended):
    values = grid.read_grid(ended / "rungs" / "rung_0.0.grid")
    assert values["LOSSES"].startswith("dpo ") and values["SEEDS"] == "101"
    assert values["TRAIN_ARGS"].endswith("--eval_steps 0")
    id, name = values["LOSSES"].split()[1].split("/")[-2], values["LOSSES"].split()[1]
    assert name.endswith(f"proposals/{id}/loss.py:{name.rpartition(':')[2]}")
    points = grid.expand(grid.DEFAULTS | values)
    assert len(points) == 4 and all("--seed" in point.arguments for point in points)


def test_relatives_of_what_failed_in_training_are_not_trained_before_others():
    """p0002 did much worse than dpo. p0003 is the best on the proxy, and behaves like it."""
    fields = {"p0001": [0.0, 0.0], "p0002": [1.0, 0.0], "p0003": [0.8, 0.4], "p0004": [0.2, 0.4]}
    right = {"p0001": (np.arange(PAIRS) > 3) + 0.0, "p0002": (np.arange(PAIRS) < 6) + 0.0}
    events = []
    for id, gain in zip(fields, (0.0, 0.09, 0.1, 0.02)):
        by = "seed" if id == "p0001" else "evolve"
        events.append({"event": "proposed", "id": id, "round": 1, "by": by, "operator": "x"})
        events[-1] |= {"parents": [], "name": "x", "usd": 0.0, "genome": None}
        events.append({"event": "fingerprint", "id": id, "cell": id, "gradient": {}})
        events.append({"event": "proxy", "id": id, "acc": 0.6, "bits": 0.1, "seeds": 8})
        events[-1] |= {"difference": gain, "se": 0.01}
    for id, correct in right.items():
        run = {"event": "trained", "id": id, "seed": 101, "status": "finished", "rung": 0}
        events.append(run | {"correct": archive.encode(correct)})
    one = argparse.Namespace(settings=settings_of(), state=state_of(events), field_of=fields.get)
    step = search.Step("rung", 0, 0)
    assert rungs.first_choice(one, step, 1) == ["p0004"]
    assert rungs.first_choice(one, step, 2) == ["p0003", "p0004"]
    events[-1]["correct"] = archive.encode(right["p0001"])  # as good as dpo
    one.state = state_of(events)
    assert rungs.first_choice(one, step, 1) == ["p0003"]


def test_a_program_that_was_changed_is_not_trained(ended, tmp_path):
    folder = shutil.copytree(ended, tmp_path / "copy")
    one = make_search(folder)
    (folder / "proposals" / "p0002" / "loss.py").write_text("import os\n")
    with pytest.raises(UserError, match=r"p0002/loss\.py: is not the file"):
        rungs.train(one, "again", ["p0002"], [101])


def test_training_gets_no_key_and_no_setting_of_a_grid(monkeypatch):
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "LOSSES", "BETAS_dpo"):
        monkeypatch.setenv(name, "sk-secret")
    monkeypatch.setenv("JOBS", "3")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    environment = rungs.environment()
    assert "sk-secret" not in environment.values()
    assert environment["JOBS"] == "3" and environment["TOKENIZERS_PARALLELISM"] == "false"


def test_a_run_that_diverged_stops_its_candidate_and_dpo_ends_the_search():
    state = state_of([proposed("p0001"), proposed("p0002")])
    run = {"run_id": "r", "status": "diverged", "acc_ref": None, "correct": None}
    events = rungs.trained_events(state, [{"id": "p0002", "seed": 101, **run}], 0)
    assert [event["event"] for event in events] == ["trained", "stopped"]
    assert events[1]["at"] == "rung0" and "diverged" in events[1]["why"]
    with pytest.raises(UserError, match="dpo diverged"):
        rungs.trained_events(state, [{"id": "p0001", "seed": 101, **run}], 0)


def test_accuracy_is_that_of_the_file_and_another_summary_is_refused(tmp_path):
    write_run(tmp_path / "run", "dpo", 1, 0.1)
    outcome = rungs.outcome_of(tmp_path / "run")
    assert outcome["correct"][0] == archive.TIE
    assert archive.decode(outcome["correct"]).mean() == pytest.approx(outcome["acc_ref"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    summary["final_acc_ref"] += 0.1
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match=r"val_pairs\.jsonl: accuracy"):
        rungs.outcome_of(tmp_path / "run")


def test_without_evaluations_on_the_way_the_last_step_is_the_only_one():
    args = argparse.Namespace(eval_steps=0, global_batch=2)
    assert [n for n in range(9) if schedule.is_evaluated(n, 8, 4, args)] == [0, 8]
    args.eval_steps = 3
    assert [n for n in range(9) if schedule.is_evaluated(n, 8, 4, args)] == [0, 2, 3, 4, 6, 8]


# ---- estimates ----------------------------------------------------------------------------------


def proposed(id: str, **more) -> dict:
    fields = {"round": 0, "by": "seed", "operator": "seed", "parents": [], "name": id}
    return {"event": "proposed", "id": id, "usd": 0.0, "genome": None, **fields, **more}


def trained(id: str, seed: int, correct) -> dict:
    more = {"run_id": f"{id}_{seed}", "status": "finished", "acc_ref": 0.5, "rung": 0}
    text = None if correct is None else archive.encode(correct)
    return {"event": "trained", "id": id, "seed": seed, "correct": text, **more}


def test_shrinking_gives_what_is_to_be_expected_again():
    """Among many candidates with known truth, most of them harmful: those that look best are, on
    average, as good as their shrunk gain says; without true differences nothing is left.
    """
    dice = np.random.default_rng(0)
    chosen, shrunk, raw = [], [], []
    for _ in range(200):
        truth = np.concatenate([dice.normal(0, 0.02, 60), dice.normal(-0.3, 0.05, 40)])
        seen = truth + dice.normal(0, 0.02, 100)
        found = estimates.shrink({str(i): (x, 0.02) for i, x in enumerate(seen)})
        best = int(seen.argmax())
        chosen.append(truth[best])
        shrunk.append(found[str(best)][0])
        raw.append(seen[best])
    assert np.mean(raw) - np.mean(chosen) > 0.02  # the winner's curse
    assert np.mean(shrunk) == pytest.approx(np.mean(chosen), abs=0.005)
    nothing = [estimates.spread([(x, 0.02) for x in dice.normal(0, 0.02, 100)]) for _ in range(300)]
    assert math.sqrt(np.mean(nothing)) < 0.01


def test_the_gain_of_one_seed_is_the_paired_t_of_its_pairs():
    dice = np.random.default_rng(1)
    dpo, other = (dice.integers(0, 2, 50).astype(float) for _ in "ab")
    events = [proposed("p0001"), proposed("p0002")]
    events += [trained("p0001", 101, dpo), trained("p0002", 101, other)]
    gain = estimates.gains(state_of(events))["p0002"]
    expected = scipy_stats.ttest_rel(other, dpo)
    assert gain.difference == pytest.approx((other - dpo).mean())
    assert gain.difference / gain.se == pytest.approx(expected.statistic)
    assert gain.measured == "trained" and abs(gain.gain) <= abs(gain.difference)


def test_racing_leaves_out_who_is_behind_beyond_chance():
    events = [proposed(f"p000{n}") for n in (1, 2, 3)]
    good = np.array([1.0] * 30 + [0.0] * 10)
    bad = np.array([0.0] * 16 + [1.0] * 14 + [0.0] * 10)
    near = np.array([0.0] * 1 + [1.0] * 29 + [0.0] * 10)
    for id, correct in (("p0001", good), ("p0002", bad), ("p0003", near)):
        events.append(trained(id, 101, correct))
    entries = state_of(events).entries
    for id, is_behind in (("p0002", True), ("p0003", False)):
        difference = archive.decode(entries[id].runs[101]["correct"]) - good
        upper = difference.mean() + scipy_stats.t.ppf(0.9, 39) * scipy_stats.sem(difference)
        assert bool(upper < 0) is is_behind
        assert estimates.is_behind(entries[id], entries["p0001"]) is is_behind


def test_the_proxy_is_compared_with_training_and_filters_only_when_it_says_nothing():
    dice = np.random.default_rng(2)
    for slope, ranks in ((1.0, True), (-1.0, False)):
        events = [proposed("p0001"), trained("p0001", 101, np.zeros(1000))]
        for n in range(2, 14):
            rate = dice.uniform(0.2, 0.8)
            events += [
                proposed(f"p{n:04}"),
                trained(f"p{n:04}", 101, np.arange(1000) < 1000 * rate),
            ]
            more = {"acc": 0.5, "bits": 0.0, "se": 0.01, "seeds": 8}
            difference = slope * rate
            events.append({"event": "proxy", "id": f"p{n:04}", "difference": difference, **more})
        state = state_of(events)
        measured = estimates.agreement(state)
        assert measured.candidates == 12 and measured.tau == pytest.approx(slope)
        assert estimates.proxy_ranks(state) is ranks
    points = dice.integers(0, 6, (12, 2))  # with ties
    expected = scipy_stats.kendalltau(*points.T).statistic
    assert estimates.kendall(points.astype(float)) == pytest.approx(expected)
    assert math.isnan(estimates.kendall(np.array([[1.0, 2.0], [1.0, 3.0]])))


# ---- a task -------------------------------------------------------------------------------------


def result(score, kl, slope=0.0) -> task_fitness.Result:
    """Four questions around a mean score and a mean KL; where the KL is larger, so is the score."""
    spread = [-0.2, -0.1, 0.1, 0.2]
    scores = {q: score + slope * x for q, x in enumerate(spread)}
    return task_fitness.Result(scores, {q: kl + x for q, x in enumerate(spread)})


def test_a_score_is_compared_with_dpos_at_the_candidates_own_kl():
    """By hand: DPO has 0.2, 0.4 and 0.5 at 1, 2 and 4 nats; at 3 nats that is 0.45."""
    dpo = [result(0.2, 1.0), result(0.5, 4.0), result(0.4, 2.0)]
    found = task_fitness.gaps(result(0.55, 3.0), dpo)
    assert np.mean(found) == pytest.approx(0.10)
    # A question that went further than the average is expected to score more, by DPO's slope.
    assert found == pytest.approx([0.1 - 0.05 * x + 0.05 * x for x in (-0.2, -0.1, 0.1, 0.2)])
    assert task_fitness.gaps(result(0.9, 4.5), dpo) is None
    assert task_fitness.gaps(result(0.9, 0.5), dpo) is None


def test_with_a_task_gaps_decide_and_dpo_gets_three_learning_rates(tmp_path):
    more = {"run_id": "r", "status": "finished", "acc_ref": 0.5, "rung": 0, "correct": "10"}
    events = [proposed("p0001"), proposed("p0002")]
    for id, gaps in (("p0001", [0.0] * 4), ("p0002", [0.1, 0.3, 0.2, 0.2])):
        task = {"score": 0.5, "kl": 2.0, "gaps": gaps}
        events.append({"event": "trained", "id": id, "seed": 101, "task": task, **more})
    gain = estimates.gains(state_of(events))["p0002"]
    expected = scipy_stats.ttest_1samp([0.1, 0.3, 0.2, 0.2], 0)
    assert gain.difference / gain.se == pytest.approx(expected.statistic)
    chosen = settings_of(task="examples/tasks/brevity.py", gen_args="--max_new_tokens 8")
    one = make_search(tmp_path, chosen)
    rungs.write_grid(one, tmp_path / "a.grid", ["dpo", "ipo"], [101])
    values = grid.read_grid(tmp_path / "a.grid")
    settled = grid.task_settings.complete(grid.DEFAULTS | values, set(values))
    rates = [p.arguments[p.arguments.index("--learning_rate") + 1] for p in grid.expand(settled)]
    assert sorted(rates) == ["0.01", "0.02", "0.02", "0.04"]
    assert settled["JUDGE_brevity"] == "py:examples/tasks/brevity.py"
    assert settled["GEN_ARGS"] == "--kl --max_new_tokens 8"


# ---- confirmation -------------------------------------------------------------------------------


def write_pairs(folder, train: int = 60, val: int = 12):
    rows = example_rows(train + val)
    write_jsonl(folder / "train.jsonl", rows[:train])
    write_jsonl(folder / "val.jsonl", rows[train:])
    return folder


def test_words_of_a_confirmation():
    dice = np.random.default_rng(3)
    base = (dice.random((5, 400)) < 0.6).astype(float)
    better = np.maximum(base, dice.random((5, 400)) < 0.3)
    few = base[:, :30]
    cases = {"better": (better, base), "worse": (base, better), "equivalent": (base, base)}
    cases["undecided"] = (1 - few, few)
    for expected, (a, b) in cases.items():
        one = estimates.stats.difference(a, b, paired=True)
        p = one.p()
        if expected == "undecided":
            one, p = estimates.stats.difference(few[:, ::-1], few, paired=True), 0.4
        assert confirmation.word(one, p) == expected


def test_confirm_reads_the_unseen_pairs_only_then_and_once(ended, tmp_path, training):
    folder = shutil.copytree(ended, tmp_path / "search")
    data = write_pairs(tmp_path / "data")
    whole = (data / "val.jsonl").read_text()
    (data / "val.jsonl").write_text("unreadable\n")
    split.write_search(data, folder)
    chosen = settings_of(data=str(data))
    with pytest.raises(UserError, match=r"val\.jsonl"):
        confirmation.run(make_search(folder, chosen), 2, again=False)
    # The same question continues: what is compared was written down before.
    (data / "val.jsonl").write_text(whole)
    one = make_search(folder, chosen)
    assert one.state.looked and not one.state.confirmed
    with pytest.raises(UserError, match="finish it first: --confirm 2"):
        confirmation.run(make_search(folder, chosen), 3, again=False)
    assert confirmation.run(one, 2, again=False)
    result = json.loads((folder / "confirmation.json").read_text())
    assert result["confirmatory"] and result["seeds"] == [9001, 9002, 9003, 9004, 9005]
    assert len(result["candidates"]) == 2 and result["pairs"] == PAIRS
    last = training.grids[-1]
    assert last["DATA"].endswith("data/confirm") and last["RESULTS"].endswith("confirmation")
    runs = [run for run in training.trained if run[0] == "confirmation"]
    assert len(runs) == len(set(runs)) == 3 * 5
    # The numbers, from the run folders.
    beta = result["dpo_beta"]
    margins = [luck("dpo", seed, beta).normal(0.3, 1, PAIRS) for seed in result["seeds"]]
    correct = [[0.5, *(row[1:] > 0)] for row in margins]
    assert result["dpo_accuracy"] == pytest.approx(np.mean(correct))
    with pytest.raises(UserError, match="was asked before"):
        confirmation.run(make_search(folder, chosen), 2, again=False)
    assert confirmation.run(make_search(folder, chosen), 1, again=True)
    again = json.loads((folder / "confirmation.json").read_text())
    assert not again["confirmatory"] and again["verdict"].startswith("not confirmatory")
    assert not set(again["seeds"]) & set(result["seeds"])


def test_dpo_is_tuned_with_as_many_runs_as_the_winners_lineage_had():
    events = [proposed(f"p000{n}") for n in (1, 2)]
    events += [proposed("p0003", parents=["p0001", "p0002"]), proposed("p0004", parents=["p0003"])]
    events += [trained(id, seed, [1.0]) for id in ("p0001", "p0002", "p0004") for seed in (1, 2)]
    state = state_of(events)
    assert confirmation.lineage_runs(state, "p0004") == 4  # its own and p0002's
    assert [one.beta for one in confirmation.tries(4, [1, 2])] == [0.1, 0.03]
    assert [one.beta for one in confirmation.tries(1, [1])] == [0.1]


# ---- the stage ----------------------------------------------------------------------------------


def arguments(folder, *more) -> argparse.Namespace:
    return discover.parse_args([str(folder), *map(str, more)])


def test_another_value_on_a_restart_is_refused_by_name(tmp_path, tiny_model):
    data, folder = write_pairs(tmp_path / "data"), tmp_path / "search"
    given = ("--model", tiny_model, "--data", data, "--train_args", TINY_ARGS)
    chosen = settings.settle(arguments(folder, *given))
    settings.record(folder, chosen)
    assert settings.settle(arguments(folder)) == chosen  # what is not given is as recorded
    assert settings.settle(arguments(folder, *given, "--concurrency", 3)) == chosen
    others = {
        "--seed": 1,
        "--max_proposals": 0,
        "--rung": "9,2",
        "--proposer": "random",
        "--train_args": "--max_steps 9",
        "--data": tmp_path,
        "--proxy": "off",
    }
    for option, value in others.items():
        with pytest.raises(UserError, match=f"{option} .*was begun with"):
            settings.settle(arguments(folder, option, value))
    # The same names, other content.
    config = tmp_path / "model"
    shutil.copytree(tiny_model, config)
    settings.record(folder, chosen)
    with open(data / "train.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(example_rows(80)[79]) + "\n")
    with pytest.raises(UserError, match=r"train\.jsonl are not those"):
        settings.record(folder, chosen)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--rung 3,5 --seeds_per_rung 1,1", "none above the one before"),
        ("--rung 3 --seeds_per_rung 1,1", "as many numbers"),
        ("--max_proposals 0", "must be from 1"),
        ("--seeds_from dpo nothing", "not one of the losses"),
        ("--train_args=--seed=3", "the search's own"),
        ("--train_args=--beta=3", "the search's own"),
        ("--train_args=--nonsense=3", "does not understand it"),
        ("--features F --proxy off", "has no effect"),
        ("--confirm 4", "from 1 to 3"),
        ("--again", "only with --confirm"),
        ("--max_hours 0", "must be above 0"),
        ("--task nowhere.py", "no such file"),
        ("--gen_args=--kl", "is for a search with a task"),
        ("--train_args='", "close what is open"),
    ],
)
def test_what_can_be_wrong_is_said_before_anything_begins(given, message, tmp_path, tiny_model):
    data = ("--model", str(tiny_model), "--data", str(tmp_path))
    with pytest.raises(UserError, match=message):
        discover.main([str(tmp_path / "new"), *data, *given.split()])
    assert not (tmp_path / "new").exists()


def test_without_the_quickstart_the_default_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "QUICKSTART_MODEL", tmp_path / "no")
    with pytest.raises(UserError, match=r"bash quickstart\.sh.*or give --model and --data"):
        discover.main([str(tmp_path / "new")])


def test_status_and_show_say_what_is_there(ended, tmp_path, capsys):
    folder = shutil.copytree(ended, tmp_path / "search")
    (folder / "settings.json").write_text(json.dumps(settings_of()._asdict()))
    assert status.print_status(folder) == 0
    out = capsys.readouterr().out
    assert "done; " in out and "proposed" in out and "points over dpo" in out
    lines = (folder / "archive.jsonl").read_text().splitlines(keepends=True)
    (folder / "archive.jsonl").write_text("".join(lines[:-1]))
    assert status.print_status(folder) == 1
    assert "stopped before rung 1" in capsys.readouterr().out
    assert status.show(folder, "p0002_ipo") == 0
    out = capsys.readouterr().out
    assert "def p0002_ipo(pairs" in out and "proxy: accuracy" in out
    with pytest.raises(UserError, match="no such candidate"):
        status.show(folder, "p9999")
    with pytest.raises(UserError, match="no search there"):
        status.print_status(tmp_path)


def test_a_proposers_words_cannot_command_the_terminal():
    assert status.clean("a\x1b[2Jb\u202ec\td") == "a?[2Jb?c\td"
