"""Scores by a task's program in the analysis: numbers of a run, score at equal KL, selection
against the truth, rounds. Numbers are worked by hand, or by a computation that shares no code.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats as scipy_stats
from studies import a_cell, a_run, compared, find_gap, has_note, load, make_base, make_run, row_of
from task_studies import PROGRAM, answer_row, make_task_study, scored, write_task

from pref.analysis import (
    browser_page,
    cell_rows,
    equal_kl,
    gold_selection,
    grouping,
    measures,
    results_folder,
    task_sources,
)
from pref.analysis.runs import BenchFiles, ScoredCell
from pref.files.console import UserError
from pref.files.disk import write_json, write_jsonl
from pref.files.judgements import write_judgements
from pref.files.mt_bench import AnswerKey


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results"


def run_with(results, rows, run_id="a", loss="dpo", bench="constraints", texts=None, **args):
    """A run with these rows of judgements.csv and, by question, the texts of its choices."""
    folder = make_run(results, run_id, loss, summary={"best_acc_ref": 0.6}, **args)
    write_judgements(folder / bench / "judgements.csv", rows)
    if texts:
        answers = [answer_row(question, of_one) for question, of_one in texts.items()]
        write_jsonl(folder / bench / "answers.jsonl", answers)
    return folder


# ---- the numbers of a run -----------------------------------------------------------------------


def test_choices_are_averaged_within_a_question_and_failures_counted(results):
    texts = {q: ["a fine day", "it rains."] for q in (1, 2, 3, 9)}
    given = {1: (1.0, 0.0), 2: (0.5, None), 3: (0.0, 0.2), 9: (None, None)}
    rows = [
        scored(q, choice, score, texts[q][choice])
        for q, scores in given.items()
        for choice, score in enumerate(scores)
    ]
    folder = run_with(results, rows, texts=texts)
    cut = [row | {"choices": [c | {"truncated": [c["index"] == 1]} for c in row["choices"]]}
           for row in (answer_row(q, t) for q, t in texts.items())]  # fmt: skip
    write_jsonl(folder / "constraints" / "answers.jsonl", cut)
    (part,) = compared(results)["task"]
    (row,) = part["cells"]
    means = [0.5, 0.5, 0.1]
    assert row["score"] == pytest.approx(sum(means) / 3)
    assert row["se_over_questions"] == pytest.approx(np.std(means, ddof=1) / math.sqrt(3))
    assert row["reading: forgiving"] == pytest.approx((0.55 + 0.6 + 0.2) / 3)
    assert (row["n_scored"], row["n_judged"], row["failures"]) == (3, 4, "program_timeout 3")
    assert (row["length"], row["cut_off"], row["distinct_2"]) == (9.5, 0.5, None)
    assert part["title"] == "judge py:constraints.py" and part["agreement_text"] is None
    categories = {one["category"]: one for one in part["categories"]}
    assert categories["sentences"]["n_judged"] == 2  # questions 1 and 9
    assert (categories["sentences"]["score"], categories["words"]["score"]) == (0.5, 0.5)
    columns = measures.TASK_SCORE.of_part(part).columns
    assert list(columns.values())[:3] == ["score", "forgiving", "characters per answer"]


def test_the_report_shows_the_checkers_words_of_every_choice(results):
    texts = {1: ["one", "two"]}
    rows = [scored(1, 0, 0.5, "one"), scored(1, 1, None, "two")]
    rows.append(scored(1, 0, 1.0, "one", judge="py:other.py", judgement=None))
    run_with(results, rows, texts=texts)
    shown = browser_page.page_judgements(load(results), "constraints")
    assert [(row["choice"], row["score"], row["judgement"]) for row in shown] == [
        (0, 0.5, "1 of 2 met: no comma; NOT two sentences\nforgiving: 0.6"),
        (1, None, "stopped after 5 s"),
        (0, 1.0, None),
    ]
    assert {row["judge"] for row in shown} == {"py:constraints.py", "py:other.py"}


def test_a_program_is_no_judge_whose_size_or_agreement_matters(results):
    rows = [scored(q, 0, 0.5, "text", judge="py:sentiment_135m.py") for q in (1, 2)]
    run_with(results, rows, bench="constraints")
    comparison = compared(results)
    (part,) = comparison["task"]
    assert part["smoke_test"] is False and part["judge_params_b"] is None
    assert not has_note(comparison, "size is not known")


def test_versions_of_a_task_file_are_never_averaged(results):
    other = json.loads(PROGRAM["judge_settings"]) | {"sha256": {"constraints.py": "cd" * 32}}
    rows = [scored(1, 0, 1.0, "text"), scored(2, 0, 1.0, "text")]
    fields = {"judge_id": "other", "judge_settings": json.dumps(other)}
    rows += [row | fields | {"score": 0.0} for row in rows]
    run_with(results, rows)
    parts = compared(results)["task"]
    assert [part["cells"][0]["score"] for part in parts] == [1.0, 0.0]
    assert parts[0]["title"] == "judge py:constraints.py, sha256 of constraints.py abababab"


def test_train_questions_are_not_compared(results):
    write_task(make_run(results, "a", "dpo", summary={}), 0.5, n=4)
    write_task(make_base(results), 0.5, n=4)
    write_task(results / "base", 0.5, n=4, bench="constraints_train")
    comparison = compared(results)
    assert [part["bench"] for part in comparison["task"]] == ["constraints"]
    assert has_note(comparison, "not compared", "constraints_train")
    assert find_gap(comparison, "constraints_train") is None


@pytest.mark.parametrize("score", [1.5, -0.1, math.nan])
def test_a_score_that_is_none_is_refused(results, score):
    run_with(results, [scored(1, 0, score, "text")])
    with pytest.raises(UserError, match="not from 0 to 1"):
        compared(results)


def test_distinct_2_is_of_blocks_of_one_size(monkeypatch):
    monkeypatch.setattr(task_sources, "BLOCK", 4)

    def distinct(*texts):
        rows = (answer_row(q, [text]) for q, text in enumerate(texts))
        answers = {AnswerKey(row["question_id"], 0): row["choices"][0] for row in rows}
        return task_sources.distinct_pairs(answers)

    assert distinct("one two three four five") == 1.0
    assert distinct("The dog, the dog. The") == 0.5  # "the dog", "dog the"
    # Pairs do not reach from one answer to the next, and a second block of one pair is left out.
    assert distinct("a b c", "a b c d") == 0.5
    assert distinct("a b c d") is None
    # An answer twice as long, of new words, is no more repetitive.
    assert distinct("a b c d e f g h i") == 1.0


def test_answers_that_were_made_otherwise_and_a_broken_model_are_noted(results):
    for run_id, tokens in (("a", 64), ("b", 128)):
        folder = make_run(results, run_id, "dpo", seed=ord(run_id), summary={})
        rows = [answer_row(q, ["text"], 1.0) | {"settings": {"max": tokens}} for q in (1, 2)]
        if run_id == "b":
            rows[0]["choices"][0]["logp"] = [None]
        write_jsonl(folder / "constraints" / "answers.jsonl", rows)
    comparison = compared(results)
    assert has_note(comparison, "answers of constraints were made with different max (64: a; 128:")
    assert has_note(comparison, "b: 1 turns of constraints have no finite log-probability")


def test_claims_are_on_all_tasks_or_on_one(results):
    sides = {"a": {"loss": "td_dpo"}, "b": {"loss": "dpo"}, "kind": "difference", "at_least": 0.05}
    wanted = ("task", "task:constraints", "task:gsm8k")
    claims = [{"id": one, "claim": one, "metric": one} | sides for one in wanted]
    for loss, level in (("dpo", 0.2), ("td_dpo", 0.9)):
        for seed in (42, 43, 44):
            folder = make_run(results, f"{loss}{seed}", loss, seed=seed, summary={})
            for bench in ("constraints", "sentiment"):
                write_task(folder, level, n=20, bench=bench)
    write_json(results / "claims.json", claims)
    rows = [row for row in compared(results)["claims"] if row["id"] in wanted]
    found = [(row["id"], row["judge"] and row["judge"].split()[-1], row["unit"]) for row in rows]
    assert found == [
        ("task", "constraints", "of score"),
        ("task", "sentiment", "of score"),
        ("task:constraints", "constraints", "of score"),
        ("task:gsm8k", None, "points"),
    ]
    assert rows[0]["verdict"] == "supported"
    # Claims on the same scores are adjusted together, whatever they call them.
    assert rows[0]["p_holm"] == pytest.approx(2 * rows[0]["p"])
    assert rows[1]["p_holm"] == rows[1]["p"]


# ---- score at equal KL --------------------------------------------------------------------------


def measured_run(loss, beta, seed, scores, kls, tau=None):
    """A run whose question q has scores[q] and is kls[q] nats away, and its values."""
    run_id = f"{loss}_b{beta}_t{tau}_s{seed}"
    answers = {}
    for q, kl in enumerate(kls):
        choice = {"index": 0, "turns": ["x"], "logp_tokens": [1]}
        choice |= {"logp": [-9.0], "logp_base": [-9.0 - float(kl)]}
        answers[AnswerKey(q, 0)] = {"turns": ["x"], "choices": [choice]}
    files = BenchFiles(answers=answers, kl={"kl": float(np.mean(kls))})
    run = a_run(run_id, loss, beta, tau, seed, benches={"t": files})
    return run, {run_id: {q: {0: float(score)} for q, score in enumerate(scores)}}


def equal_rows(runs):
    """equal_kl.rows of runs as `measured_run` gives them, against dpo."""
    values = {key: value for _, own in runs for key, value in own.items()}
    groups = {}
    for run, _ in runs:
        groups.setdefault((run.loss, run.beta, run.tau), []).append(run)
    cells = [a_cell(group, f"{loss} {beta}") for (loss, beta, _), group in groups.items()]
    return equal_kl.rows(cells, "t", values, "dpo")


def line(loss, beta, kl, slope, seed=1, level=0.0):
    """Ten questions on the line level + slope * KL, all as far away."""
    return measured_run(loss, beta, seed, [level + slope * kl] * 10, [kl] * 10)


def test_scores_are_interpolated_within_the_common_range():
    runs = [line("dpo", 0.5, 1.0, 0.1), line("dpo", 0.1, 9.0, 0.1)]
    # The other loss bends at KL 6, and its betas are not in the order of its KL.
    runs += [line("x", 0.5, 6.0, 0.2), line("x", 0.1, 4.0, 0.2), line("x", 0.3, 16.0, 0, level=2.2)]
    rows = equal_rows(runs)
    # common range 4 to 9, in the root 2 to 3: 2.25^2, 2.5^2, 2.75^2, to three digits
    assert [row["kl"] for row in rows] == [5.06, 6.25, 7.56]
    assert [row["baseline_score"] for row in rows] == pytest.approx([0.506, 0.625, 0.756])
    bent = [1.012, 1.2 + 0.025 * 1, 1.2 + 0.156 * 1]
    assert [row["score"] for row in rows] == pytest.approx(bent)
    assert [row["estimate"] for row in rows] == pytest.approx([0.506, 0.6, 0.6])


def test_the_interval_at_equal_kl_is_that_of_the_weighted_means():
    """Against NumPy: three seeds, two betas, 30 questions, whose KL is uncertain too."""
    rng = np.random.default_rng(0)
    runs, scores, kls = [], {}, {}
    for loss, gain in (("dpo", 0.0), ("x", 0.1)):
        for seed in (1, 2, 3):
            for beta, kl in ((0.5, 2.0), (0.1, 6.0)):
                key = loss, seed, beta
                kls[key] = kl * rng.uniform(0.5, 1.5, 30)
                scores[key] = 0.05 * kls[key] + gain + rng.normal(0, 0.2, 30) + 0.02 * seed
                runs.append(measured_run(loss, beta, seed, scores[key], kls[key]))
    row = equal_rows(runs)[1]

    def curve(loss, seed):
        """Values of the questions at row["kl"]: the line through two points, linearised."""
        (x0, x1), (y0, y1) = ([of[loss, seed, beta] for beta in (0.5, 0.1)] for of in (kls, scores))
        slope = (y1.mean() - y0.mean()) / (x1.mean() - x0.mean())
        w = (row["kl"] - x0.mean()) / (x1.mean() - x0.mean())
        moved = (1 - w) * (x0 - x0.mean()) + w * (x1 - x1.mean())
        return (1 - w) * y0 + w * y1 - slope * moved

    d = np.array([curve("x", seed) - curve("dpo", seed) for seed in (1, 2, 3)])  # (S, Q)
    n_seeds, n = d.shape
    rest = d - d.mean(0) - d.mean(1, keepdims=True) + d.mean()
    of_seeds = d.mean(1).var(ddof=1) / n_seeds
    chance = (rest**2).sum() / ((n_seeds - 1) * (n - 1)) / d.size
    df = (n_seeds - 1) / 2
    y = scipy_stats.chi2(df)
    excess = y.expect(lambda y: np.maximum(0, of_seeds - chance * y / df), limit=200)
    t = [scipy_stats.t.ppf(0.975, size - 1) for size in (n, n_seeds)]
    half = math.sqrt(t[0] ** 2 * d.mean(0).var(ddof=1) / n + t[1] ** 2 * excess)
    assert (row["paired"], row["n_units"]) == ("paired", 30)
    assert row["estimate"] == pytest.approx(d.mean())
    assert row["score"] - row["baseline_score"] == pytest.approx(row["estimate"])
    assert [row["low"], row["high"]] == pytest.approx([d.mean() - half, d.mean() + half], rel=1e-3)


def test_an_uncertain_kl_widens_the_interval():
    """A score that is a function of the KL alone has no error once the KL is taken into account."""
    kls = {beta: kl * np.linspace(0.5, 1.5, 20) for beta, kl in ((0.5, 2.0), (0.1, 6.0))}
    noise = np.random.default_rng(1).normal(0, 0.1, (2, 20))
    runs = [measured_run("dpo", beta, 1, 0.1 * kl, kl) for beta, kl in kls.items()]
    runs += [measured_run("x", b, 1, 0.1 * kl + n, kl) for (b, kl), n in zip(kls.items(), noise)]
    row = equal_rows(runs)[1]
    w = (row["kl"] - 2) / 4
    slope = 0.1 + (noise[1].mean() - noise[0].mean()) / 4
    mixed = (
        (1 - w) * noise[0]
        + w * noise[1]
        - (slope - 0.1) * ((1 - w) * (kls[0.5] - 2) + w * (kls[0.1] - 6))
    )
    half = scipy_stats.t.ppf(0.975, 19) * mixed.std(ddof=1) / math.sqrt(20)
    assert row["high"] - row["low"] == pytest.approx(2 * half)


@pytest.mark.parametrize(
    ("others", "why"),
    [
        ([line("x", 0.5, 10.0, 0.1), line("x", 0.1, 12.0, 0.1)], "no common range of KL: x 10.00"),
        ([line("x", 0.5, 2.0, 0.1), line("x", 0.1, 2.0, 0.1)], "x: no KL that all of its seeds"),
        ([line("x", 0.5, 2.0, 0.1), line("x", 0.1, 3.0, 0.1),
          line("x", 0.5, 5.0, 0.1, seed=2), line("x", 0.1, 6.0, 0.1, seed=2)], "x: no KL that"),
    ],
)  # fmt: skip
def test_curves_that_do_not_overlap_are_said(others, why):
    (row,) = equal_rows([line("dpo", 0.5, 1.0, 0.1), line("dpo", 0.1, 9.0, 0.1), *others])
    assert why in row["why"] and row["estimate"] is None and row["p_adjusted"] is None


def test_each_tau_is_a_curve_and_runs_without_kl_are_named(tmp_path):
    losses = {"dpo": ((None,), 0.12), "td_dpo": ((0.5, 2.0), 0.3)}
    make_task_study(
        tmp_path, losses=losses, betas=(0.1, 0.5), seeds=(1, 2), n=12, without_kl=("dpo_b0.1_s1",)
    )
    comparison = compared(tmp_path / "results")
    (part,) = comparison["task"]
    assert has_note(comparison, "KL of dpo_b0.1_s1 is not known", "gen_mtbench.py --kl")
    assert part["frontier_without"] == ["dpo_b0.1_s1"]
    assert len(part["frontier_runs"]) == 12 and row_of(part["frontier"], "base")["kl"] == 0
    # seed 1 of dpo has a single run left, which spans no range
    assert {row["curve"] for row in part["equal_kl"]} == {"td_dpo τ=0.5", "td_dpo τ=2"}
    assert {row["paired"] for row in part["equal_kl"]} == {"one seed"}
    assert equal_kl.common_distances(-0.1, 0.3) == pytest.approx([0, 0.1, 0.2])


def test_a_single_beta_is_a_curve_over_its_learning_rates():
    runs, values = [], {}
    for loss, gain in (("dpo", 0.0), ("x", 0.2)):
        for rate, kl in ((1e-5, 1.0), (3e-5, 4.0)):
            run, own = line(loss, 0.1, kl, 0.1, level=gain)
            run = replace(run, run_id=f"{run.run_id}{rate}", settings={"learning_rate": rate})
            runs.append(run)
            values[run.run_id] = next(iter(own.values()))
    cells = [a_cell([run], run.run_id) for run in runs]
    rows = equal_kl.rows(cells, "t", values, "dpo")
    assert [row["kl"] for row in rows] == [1.56, 2.25, 3.06]  # 1.25^2, 1.5^2, 1.75^2
    assert {row["curve"] for row in rows} == {"x β=0.1 over learning_rate"}
    assert [row["estimate"] for row in rows] == pytest.approx([0.2] * 3)


# ---- what selection selects ---------------------------------------------------------------------


def grid(scores, accuracies, loss="dpo"):
    """Cells with (S, Q) tables of scores; returns scored cells and values."""
    found, values = [], {}
    for i, (table, accuracy) in enumerate(zip(scores, accuracies)):
        runs = [a_run(f"{loss}{i}_s{seed}", loss, 0.1 + i, seed=seed) for seed in range(len(table))]
        for run, row in zip(runs, table):
            values[run.run_id] = {q: {0: float(score)} for q, score in enumerate(row)}
        cell = a_cell(runs, f"{loss}{i}", accuracy)
        row = cell_rows.cell_columns(cell) | {"score": float(np.mean(table))}
        found.append(ScoredCell(cell, row))
    return found, values


def test_selection_costs_what_the_best_cell_would_give():
    rng = np.random.default_rng(0)
    level = np.array([0.2, 0.5, 0.8, 0.6])
    tables = level[:, None, None] + rng.normal(0, 0.05, (4, 3, 60))
    cells, values = grid(tables, [0.5, 0.7, 0.6, 0.55])
    (row,) = gold_selection.find(cells, "score", values)["gold_selection"]
    assert (row["by_accuracy"], row["by_score"], row["rank_of_selected"]) == ("dpo1", "dpo2", 3)
    # The best is so clear that both halves find it: then the cost is the plain difference.
    assert row["cost"] == pytest.approx(tables[2].mean() - tables[1].mean())
    assert row["cost"] == pytest.approx(row["apparent_cost"])
    assert row["low"] < 0.3 < row["high"] and row["low"] > 0.25
    assert row["spearman"] == pytest.approx(scipy_stats.spearmanr([5, 7, 6, 5.5], level)[0])
    half = 1.959964 * math.sqrt(1 + row["spearman"] ** 2 / 2)  # Bonett and Wright, n - 3 = 1
    ends = [math.tanh(math.atanh(row["spearman"]) + sign * half) for sign in (-1, 1)]
    assert [row["spearman_low"], row["spearman_high"]] == pytest.approx(ends)


def test_the_best_of_equal_cells_costs_nothing_on_average():
    """Twelve equal cells: the largest score is 0.05 above the selected one by chance alone."""
    rng = np.random.default_rng(0)
    costs, apparent = [], []
    for _ in range(40):
        tables = rng.normal(0.5, 0.3, (12, 3, 40)) + rng.normal(0, 0.03, (12, 3, 1))
        cells, values = grid(tables, rng.uniform(0, 1, 12))
        (row,) = gold_selection.find(cells, "score", values)["gold_selection"]
        costs.append(row["cost"])
        apparent.append(row["apparent_cost"])
    assert np.mean(apparent) > 0.04
    assert abs(np.mean(costs)) < 3 * np.std(costs) / math.sqrt(40)


def test_all_losses_together_have_a_row_and_cells_without_accuracy_none():
    a, values_a = grid(np.ones((2, 1, 5)), [0.5, 0.6])
    b, values_b = grid(np.zeros((3, 1, 5)), [0.7, 0.8, None], "x")
    found = gold_selection.find([*a, *b], "score", values_a | values_b)
    rows = found["gold_selection"]
    assert [point["label"] for point in found["gold_points"]] == ["dpo0", "dpo1", "x0", "x1"]
    assert [(row["loss"], row["cells"], row["by_accuracy"]) for row in rows] == [
        ("dpo", 2, "dpo1"),
        ("x", 2, "x1"),
        ("all losses", 4, "x1"),
    ]
    assert rows[2]["cost"] == 1.0 and rows[0]["spearman"] is None


# ---- rounds and drawn axes ----------------------------------------------------------------------


def make_rounds(results, n=12):
    """dpo at two betas, two rounds, two seeds. Round 2 has data of its own for each run, and its
    accuracies would select the other beta."""
    write_task(make_base(results), 0.2, 0.0, n=n)
    for beta, accuracy in ((0.1, 0.7), (0.5, 0.6)):
        for seed in (1, 2):
            first = f"dpo_b{beta}_s{seed}"
            run = make_run(
                results, first, "dpo", beta, None, seed,
                summary={"best_acc_ref": accuracy}, lora_targets="all-linear",
            )  # fmt: skip
            write_task(run, 0.4, 1.0, n=n)
            own = {"lora_targets": "down_proj,up_proj"}  # as the adapter names them
            own |= {"data_sha256": {"train": first, "val": first}, "round": 2}
            own |= {"init_adapter": f"elsewhere/{first}/adapter", "init_adapter_sha256": first}
            run = make_run(
                results, f"{first}_round2", "dpo", beta, None, seed,
                summary={"best_acc_ref": 1 - accuracy}, **own,
            )  # fmt: skip
            write_task(run, 0.4 + 1.2 * (0.6 - beta) / 2, 3.0, n=n)


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    """The results folder of `make_rounds`, and what the analysis makes of it."""
    results = tmp_path_factory.mktemp("rounds")
    make_rounds(results)
    return results, compared(results)


def test_rounds_are_cells_that_round_1_selects(rounds):
    _, comparison = rounds
    (part,) = comparison["task"]
    labels = [row["label"] for row in part["cells"]]
    assert labels[1:] == [f"dpo β={b} round={r}" for b in (0.1, 0.5) for r in (1, 2)]
    assert all(row["n_seeds"] == 2 for row in part["cells"][1:])
    best = next(row for row in part["improvement"] if row["comparison"] == "untrained model")
    assert best["proposed"] == "dpo β=0.1 round=2"
    assert best["selected_by"] == "validation accuracy of round 1"
    (selected,) = part["selection"]
    assert selected["selected"] == "dpo β=0.1 round=2"
    # accuracies of round 2 are shown, and compared with nothing
    (chosen,) = comparison["accuracy"]["selection"]
    assert (chosen["cells"], chosen["selected"]) == (2, "dpo β=0.1 round=1")
    assert len(comparison["accuracy"]["cells"]) == 4
    assert has_note(comparison, "pairs of its own") and not has_note(comparison, "token ids")


def test_the_score_is_followed_from_round_to_round(rounds):
    (part,) = rounds[1]["task"]
    score = {row["label"]: row["score"] for row in part["cells"]}
    rows = {(row["chain"], row["round"]): row for row in part["rounds"]}
    assert list(rows) == [(f"dpo β={b}", r) for b in (0.1, 0.5) for r in (1, 2)]
    first, second = rows["dpo β=0.1", 1], rows["dpo β=0.1", 2]
    assert first["gain"] == pytest.approx(score["dpo β=0.1 round=1"] - score["base"])
    assert second["gain"] == pytest.approx(second["score"] - first["score"])
    assert (second["over"], second["seeds_compared"]) == ("dpo β=0.1 round=1", "2 paired")
    assert (first["kl"], second["kl"]) == (
        pytest.approx(1, abs=0.2), pytest.approx(3, abs=0.6))  # fmt: skip
    assert second["gain_low"] < second["gain"] < second["gain_high"]


def test_a_later_round_needs_its_first_for_a_selection(rounds):
    runs, _ = results_folder.load_runs(rounds[0])
    cells = grouping.make_cells([run for run in runs if run.round == 2])
    assert [cell.accuracy for cell in cells] == [None, None]


def test_other_data_in_the_first_round_are_still_refused(results):
    own = {"data_sha256": {"train": "own", "val": "own"}, "round": 2}
    make_run(results, "dpo_a", "dpo", 0.1, summary={})
    make_run(results, "dpo_a_round2", "dpo", 0.1, summary={}, **own)
    assert len(results_folder.load_runs(results)[0]) == 2
    make_run(results, "dpo_other", "dpo", 0.9, summary={}, data_sha256={"train": "x", "val": "x"})
    with pytest.raises(UserError, match="different model or data"):
        compared(results)


def test_every_drawn_learning_rate_is_a_cell(results):
    """LRS loguniform 5e-6 5e-5 x 3: as many tries for each loss."""
    rates = (5.72e-06, 1.35e-05, 4.1e-05)
    for loss in ("dpo", "simpo"):
        for i, rate in enumerate(rates):
            folder = make_run(
                results, f"{loss}_lr{rate}", loss, learning_rate=rate,
                summary={"best_acc_ref": 0.5 + i / 10},
            )  # fmt: skip
            write_task(folder, 0.3 + i / 10, n=12)
    (part,) = compared(results)["task"]
    labels = [row["label"] for row in part["cells"]]
    assert labels[:2] == ["dpo β=0.1 learning_rate=1.35e-05", "dpo β=0.1 learning_rate=4.1e-05"]
    dpo, simpo = part["selection"]
    assert (dpo["cells"], dpo["budget"], simpo["budget"]) == (3, 3, 3)
    assert dpo["selected"] == "dpo β=0.1 learning_rate=4.1e-05"
    paired = [row for row in part["improvement"] if row["comparison"] == "matched beta"]
    assert len(paired) == 3 and all(row["differs_in"] is None for row in paired)
