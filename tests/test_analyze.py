"""analyze.py: every published number against one worked by hand, what is kept apart, and what is
said.
"""

import csv
import json
import math
import random

import pytest

import analyze
from pref.analysis import (
    figures,
    paper_tables,
    results_folder,
    run_figures,
    run_metrics,
    table_files,
    terminal,
)
from pref.files import drawing
from pref.files.console import UserError
from pref.files.disk import write_json, write_jsonl
from pref.files.judgements import read_judgements, write_judgements

MODEL, DATA = "meta-llama/Llama-2-7b-chat-hf", {"train": "a1", "val": "b2"}
ACCURACY = {
    "best_acc_ref": 0.6,
    "best_step": 20,
    "final_acc_ref": 0.5,
    "final_acc_sum": 0.4,
    "final_acc_mean": 0.3,
}


def make_run(
    results,
    run_id,
    loss="td_dpo",
    beta=0.1,
    tau=None,
    seed=42,
    *,
    summary=None,
    ratings=None,
    **args,
):
    """A run folder with args.json and, if given, summary.json and judgements.csv."""
    folder = results / run_id
    shared = {
        "mode": "full",
        "model": MODEL,
        "data_sha256": DATA,
        "learning_rate": 1e-5,
        "versions": {"torch": "2"},
    }
    write_json(
        folder / "args.json",
        {**shared, "run_id": run_id, "loss": loss, "beta": beta, "tau": tau, "seed": seed, **args},
    )
    if summary is not None:
        defaults = {
            "status": "finished",
            "steps": 40,
            "nonfinite_steps": 0,
            "wall_s": 9.0,
            "tokens": 100,
            "peak_gib": 1.5,
        }
        write_json(folder / "summary.json", {**defaults, **ACCURACY, **summary})
    if ratings is not None:
        write_judgements(folder / "mt_bench" / "judgements.csv", ratings)
    return folder


def make_base(results, **kw):
    return make_run(results, "base", None, None, None, None, data_sha256=None, **kw)


def rating(question, turn, score, **fields):
    """A row of judgements.csv; score None is a judgement that failed."""
    status = "ok" if score is not None else "parse"
    row = {
        "question_id": question,
        "turn": turn,
        "category": "writing",
        "choice": 0,
        "grading": "single",
        "repeat": 0,
    }
    row |= {
        "judge": "gpt-5-mini",
        "prompts": "fastchat",
        "refs": "original",
        "score": score,
        "status": status,
    }
    return row | fields


def flat_ratings(score, **fields):
    """Two questions, both turns, one score."""
    return [rating(question, turn, score, **fields) for question in (81, 82) for turn in (1, 2)]


def write_pairs(folder, by_step):
    """val_pairs.jsonl from step -> [(policy_chosen, policy_rejected, ref_chosen, ref_rejected)]."""
    keys = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    rows = [
        {"id": f"p{i}", "step": step, **dict(zip(keys, logps)), "len_chosen": 5, "len_rejected": 5}
        for step, pairs in by_step.items()
        for i, logps in enumerate(pairs)
    ]
    write_jsonl(folder / "val_pairs.jsonl", rows)


def write_curve(folder, steps=8, bad=()):
    keys = ("loss", "rewards/accuracies", "margin/rho", "margin/delta", "grad_norm")
    rows = []
    for step in range(1, steps + 1):
        values = dict.fromkeys(keys, None if step in bad else 1 / step)
        rows.append(
            {
                "step": step,
                "epoch": step / 4,
                **values,
                "lr": 1e-5,
                "nonfinite": sum(s <= step for s in bad),
            }
        )
        if step % 4 == 0:
            evals = ("loss", "acc_ref", "acc_sum", "acc_mean", "margin/rho", "margin/delta")
            rows.append({"step": step, "epoch": step / 4, **{f"eval/{key}": 0.6 for key in evals}})
    write_jsonl(folder / "metrics.jsonl", rows)


def compared(results, *flags):
    """aggregated_metrics.json without drawing anything, and the notes."""
    args, notes = analyze.parse_args([str(results), "--draws", "300", *flags]), []
    runs = results_folder.load_runs(args.results_dir, args.run_ids, notes, args.skip_bad)
    return analyze.compare(runs, args, notes)


def noise(*key):
    """A reproducible rating between -1 and 1 for a question and seed."""
    return random.Random(str(key)).uniform(-1, 1)


def row_of(rows, label):
    return next(row for row in rows if row["label"] == label)


def noted(comparison, *words):
    return any(all(word in note for word in words) for note in comparison["notes"])


def said_missing(comparison, what):
    return next((gap for gap in comparison["missing"] if what in gap["what"]), None)


# ---- numbers of one run -------------------------------------------------------------------------


def test_mt_bench_scores_by_hand():
    rows = [
        rating(81, 1, 5, choice=0),
        rating(81, 1, 7, choice=1),
        rating(81, 2, 4),
        rating(101, 1, 8, category="reasoning"),
        rating(101, 2, None, category="reasoning"),
        rating(104, 1, 2, category="reasoning"),
        rating(104, 2, 2, category="reasoning"),
    ]
    found = run_metrics.score_ratings(rows)
    # turn means: (81,1) 6, (81,2) 4, (101,1) 8, (104,1) 2, (104,2) 2
    assert found["score"] == pytest.approx(22 / 5)
    assert found["turn_1"] == pytest.approx(16 / 3)
    assert found["turn_2"] == pytest.approx(3)
    assert found["score_without_wrong_references"] == pytest.approx(6)  # without 104
    # clusters' deviations from 4.4: 10 - 8.8, 8 - 4.4, 4 - 8.8; their squares 37.44, times 3 / 2,
    # over 5 turns
    assert found["se_over_questions"] == pytest.approx(math.sqrt(56.16) / 5)
    assert found["turn_1_se"] == pytest.approx(math.sqrt(28 / 3 / 3))  # 6, 8, 2
    assert (found["n_questions"], found["n_scored"], found["n_judged"]) == (3, 6, 7)
    assert found["failures"] == {"parse": 1}
    assert found["categories"]["writing"] == {"score": 5, "se": None, "n_scored": 3, "n_judged": 3}
    # 101: 8 - 4; 104: 4 - 8; squares 32, times 2, over 3 turns
    expected = {"score": 4, "se": pytest.approx(8 / 3), "n_scored": 3, "n_judged": 4}
    assert found["categories"]["reasoning"] == expected


def test_repeats_are_averaged_within_a_question_turn():
    rows = [rating(81, 1, 2, repeat=0), rating(81, 1, 4, repeat=1), rating(82, 1, 9)]
    assert run_metrics.score_ratings(rows)["score"] == 6  # (3 + 9) / 2, not 15 / 3


def test_a_run_without_any_rating_has_no_score():
    found = run_metrics.score_ratings([rating(81, 1, None)])
    assert found["score"] is None and found["se_over_questions"] is None
    assert (found["n_scored"], found["n_judged"]) == (0, 1)


def test_run_metrics_by_hand(tmp_path):
    folder = make_run(tmp_path, "a", summary={}, ratings=[rating(81, 1, 6)])
    # at step 20: rho = 3, -1, 0, and one pair that is not finite; delta = 2, -3, 1
    write_pairs(
        folder,
        {
            0: [(-10, -12, -10, -12)] * 4,
            20: [(-9, -11, -10, -9), (-12, -9, -11, -9), (-8, -9, -8, -9), (None, -9, -8, -9)],
        },
    )
    found = run_metrics.run_metrics(results_folder.load_runs(tmp_path, None, [])[0])
    assert (
        found["margins"]["first"]["rho"] == {"mean": 0, "se": 0}
        and found["margins"]["first"]["n_pairs"] == 4
    )
    best = found["margins"]["best"]
    assert (best["step"], best["n_pairs"], best["n_nonfinite"]) == (20, 3, 1)
    assert best["rho"]["mean"] == pytest.approx(2 / 3)
    # deviations 7/3, -5/3, -2/3: sum of squares 78/9, variance 13/3, SE sqrt(13)/3
    assert best["rho"]["se"] == pytest.approx(math.sqrt(13) / 3)
    assert best["delta"]["mean"] == pytest.approx(0)
    assert found["accuracy"]["best_acc_ref"] == 0.6 and found["accuracy"]["final_acc_mean"] == 0.3
    # hits 1, 0, one half for the tie and 0 for the pair that is not finite: squares about 3/8 sum
    # to 11/16
    assert found["accuracy"]["n_pairs"] == 4
    assert found["accuracy"]["se_over_pairs"] == pytest.approx(math.sqrt(11 / 16 / 3 / 4))
    assert found["training"]["steps"] == 40 and found["training"]["peak_gib"] == 1.5
    assert found["status"] == "finished" and found["mt_bench"][0]["score"] == 6


def test_resumed_run_counts_a_step_once(tmp_path):
    write_jsonl(
        tmp_path / "metrics.jsonl",
        [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}, {"step": 2, "loss": 3.0}],
    )
    steps, evals = results_folder.read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in steps] == [(1, 5.0), (2, 3.0)] and evals == []


# ---- the grid -----------------------------------------------------------------------------------


def make_grid(results):
    """dpo at two betas, td_dpo at one beta and two tau, two or three seeds; base."""
    make_base(results, ratings=flat_ratings(4))
    cells = {
        ("dpo", 0.1, None): [(42, 4, 0.60), (43, 6, 0.62)],
        ("dpo", 0.5, None): [(42, 5, 0.70)],
        ("td_dpo", 0.1, 1): [(42, 6, 0.64), (43, 7, 0.66), (44, 8, 0.68)],
        ("td_dpo", 0.1, 2): [(42, 5, 0.50)],
    }
    for (loss, beta, tau), seeds in cells.items():
        for seed, score, accuracy in seeds:
            name = f"{loss}_b{beta}_t{tau}_s{seed}"
            make_run(
                results,
                name,
                loss,
                beta,
                tau,
                seed,
                summary={"best_acc_ref": accuracy},
                ratings=flat_ratings(score),
            )


def test_means_over_seeds_by_hand(tmp_path):
    make_grid(tmp_path)
    comparison = compared(tmp_path)
    judge = comparison["mt_bench"][0]
    labels = ["base", "dpo β=0.1", "dpo β=0.5", "td_dpo β=0.1 τ=1", "td_dpo β=0.1 τ=2"]
    assert [row["label"] for row in judge["cells"]] == labels
    row = row_of(judge["cells"], "td_dpo β=0.1 τ=1")
    assert (row["score"], row["score_sd"], row["n_seeds"], row["seeds"]) == (7, 1, 3, [42, 43, 44])
    assert (row["n_scored"], row["n_judged"], row["se_over_questions"]) == (12, 12, None)
    row = row_of(judge["cells"], "dpo β=0.1")
    assert row["turn_1"] == 5 and row["turn_1_sd"] == pytest.approx(math.sqrt(2))
    single = row_of(judge["cells"], "dpo β=0.5")
    assert (single["score"], single["score_sd"], single["se_over_questions"]) == (5, None, 0)
    category = row_of(judge["categories"], "td_dpo β=0.1 τ=1")
    assert (category["category"], category["score"], category["score_sd"]) == ("writing", 7, 1)
    accuracy = row_of(comparison["accuracy"]["cells"], "td_dpo β=0.1 τ=1")
    assert accuracy["best_acc_ref"] == pytest.approx(0.66) and accuracy[
        "best_acc_ref_sd"
    ] == pytest.approx(0.02)
    assert accuracy["final_acc_ref"] == 0.5 and accuracy["final_acc_sum"] == pytest.approx(0.4)
    assert noted(comparison, "unbalanced", "dpo β=0.1 has no seed 44")


def test_improvement_by_hand(tmp_path):
    make_grid(tmp_path)
    rows = compared(tmp_path)["mt_bench"][0]["improvement"]
    found = {
        (row["comparison"], row["tau"]): (
            row["baseline"],
            row["difference"],
            row["improvement_rate"],
        )
        for row in rows
    }
    # on the seeds that both have: (6 + 7) / 2 against 5; the cell's own mean over three seeds is 7
    assert found["matched beta", 1] == ("dpo β=0.1", 1.5, pytest.approx(0.3))
    assert found["matched beta", 2] == ("dpo β=0.1", 1, 0.25)  # seed 42 alone: 5 against 4
    # the best dpo by validation accuracy is beta 0.5 (0.70), score 5
    assert found["best baseline", 1] == ("dpo β=0.5", 1, pytest.approx(0.2))  # seed 42 alone
    assert found["best baseline", 2] == ("dpo β=0.5", 0, 0)
    best = next(row for row in rows if row["comparison"] == "best of grid")
    assert (best["proposed"], best["baseline"]) == ("td_dpo β=0.1 τ=1", "dpo β=0.5")
    assert (best["selected_by"], best["proposed_cells"], best["baseline_cells"]) == (
        "validation accuracy",
        2,
        2,
    )


def test_improvement_without_accuracy_is_selected_by_the_score_and_says_so(tmp_path):
    for beta, score in ((0.1, 4), (0.5, 8)):
        make_run(tmp_path, f"dpo_b{beta}", "dpo", beta, ratings=flat_ratings(score))
    make_run(tmp_path, "td", "td_dpo", 0.1, 1, ratings=flat_ratings(6))
    rows = compared(tmp_path)["mt_bench"][0]["improvement"]
    assert {row["comparison"]: row["improvement_rate"] for row in rows} == {
        "matched beta": 0.5,
        "best baseline": -0.25,
        "best of grid": -0.25,
    }
    assert rows[-1]["selected_by"] == "the score itself"


def test_another_setting_is_another_cell_not_a_seed(tmp_path):
    make_run(tmp_path, "a", "dpo", 0.1, None, 42, summary={}, ratings=flat_ratings(4))
    make_run(
        tmp_path, "b", "dpo", 0.1, None, 43, summary={}, ratings=flat_ratings(8), learning_rate=2e-5
    )
    make_run(
        tmp_path, "c", "td_dpo", 0.1, 1, 42, summary={}, ratings=flat_ratings(6), learning_rate=2e-5
    )
    judge = compared(tmp_path)["mt_bench"][0]
    assert row_of(judge["cells"], "dpo β=0.1 learning_rate=1e-05")["score"] == 4
    matched = [row for row in judge["improvement"] if row["comparison"] == "matched beta"]
    assert [(row["baseline_score"], row["differs_in"]) for row in matched] == [(8, None)]


def test_how_a_run_was_computed_is_no_setting(tmp_path):
    how = {
        "planned_gib": 3.1,
        "command": "a",
        "starts": [1],
        "compile": "on",
        "packing": "on",
        "save_steps": 20,
    }
    make_run(tmp_path, "a", "dpo", 0.1, None, 42, summary={}, ratings=flat_ratings(4), **how)
    how = {
        "planned_gib": 2.9,
        "command": "b",
        "starts": [1, 2],
        "compile": "off",
        "packing": "off",
        "save_steps": 5,
    }
    make_run(tmp_path, "b", "dpo", 0.1, None, 43, summary={}, ratings=flat_ratings(8), **how)
    (cell,) = compared(tmp_path)["mt_bench"][0]["cells"]
    assert cell["seeds"] == [42, 43] and cell["score"] == 6


def test_matched_beta_names_what_else_differs(tmp_path):
    make_run(tmp_path, "a", "dpo", 0.1, None, 42, ratings=flat_ratings(4))
    make_run(tmp_path, "c", "td_dpo", 0.1, 1, 42, ratings=flat_ratings(6), learning_rate=2e-5)
    rows = compared(tmp_path)["mt_bench"][0]["improvement"]
    assert rows[0]["differs_in"] == "learning_rate 2e-05 / 1e-05"


def test_the_same_cell_and_seed_twice_is_refused(tmp_path):
    make_run(tmp_path, "a", per_device_batch=4)
    make_run(tmp_path, "b", per_device_batch=8)
    with pytest.raises(UserError, match="a and b have the same loss.*--run_ids"):
        compared(tmp_path)


# ---- what is kept apart -------------------------------------------------------------------------


def test_trial_runs_are_left_out_by_name(tmp_path):
    make_run(tmp_path, "a", summary={})
    make_run(tmp_path, "quick", seed=43, mode="trial", summary={"best_acc_ref": 1.0})
    comparison = compared(tmp_path)
    assert noted(comparison, "trial", "quick") and [
        run["run_id"] for run in comparison["runs"]
    ] == ["a"]
    assert comparison["accuracy"]["cells"][0]["best_acc_ref"] == 0.6


def test_only_trial_runs_is_an_error(tmp_path):
    make_run(tmp_path, "quick", mode="trial")
    with pytest.raises(UserError, match="only trial runs.*quick.*--mode full"):
        compared(tmp_path)


def test_judges_are_never_mixed(tmp_path):
    small = {"judge": "HuggingFaceTB/SmolLM2-135M-Instruct", "judge_params_b": 0.135}
    make_run(tmp_path, "a", "dpo", ratings=flat_ratings(8) + flat_ratings(2, **small))
    make_run(tmp_path, "b", "td_dpo", tau=1, ratings=flat_ratings(6))
    comparison = compared(tmp_path)
    by_judge = {judge["judge"]: judge for judge in comparison["mt_bench"]}
    assert [row["score"] for row in by_judge["gpt-5-mini"]["cells"]] == [8, 6]
    assert [row["score"] for row in by_judge[small["judge"]]["cells"]] == [2]
    assert (
        by_judge[small["judge"]]["smoke_test"] is True
        and by_judge["gpt-5-mini"]["smoke_test"] is False
    )
    assert noted(comparison, "SMOKE TEST", "0.135B") and noted(comparison, "2 judges")
    assert said_missing(comparison, "SmolLM2")["runs"] == ["b"]


@pytest.mark.parametrize("field", ["prompts", "refs"])
def test_other_prompts_or_references_are_another_judge(tmp_path, field):
    make_run(tmp_path, "a", ratings=flat_ratings(8) + flat_ratings(2, **{field: "own"}))
    comparison = compared(tmp_path)
    assert sorted(judge["cells"][0]["score"] for judge in comparison["mt_bench"]) == [2, 8]
    suffixes = {
        run_metrics.judge_suffix(judge, comparison["mt_bench"]) for judge in comparison["mt_bench"]
    }
    assert len(suffixes) == 2 and "" not in suffixes


def test_pairwise_rows_are_not_scores(tmp_path):
    pair = rating(
        81, 1, None, grading="pair", status="ok", winner="model", order="ab", baseline="base"
    )
    make_run(tmp_path, "a", ratings=[rating(81, 1, 6), pair])
    row = compared(tmp_path)["mt_bench"][0]["cells"][0]
    assert (row["score"], row["n_judged"]) == (6, 1)


@pytest.mark.parametrize(
    ("judge", "params_b", "smoke"),
    [
        ("x", 6.9, True),
        ("x", 7.0, False),
        ("SmolLM2-135M", None, True),
        ("Qwen2-72B", None, False),
        ("gpt-5", None, False),
    ],
)
def test_smoke_test_below_7b(judge, params_b, smoke):
    row = rating(81, 1, 5, judge=judge, judge_params_b=params_b)
    assert run_metrics.describe_judge((judge, "fastchat", None), [row])["smoke_test"] is smoke


def test_unequal_questions_are_compared_on_the_common_ones(tmp_path):
    make_run(
        tmp_path,
        "a",
        "dpo",
        ratings=[rating(81, 1, 2), rating(82, 1, 10), rating(83, 1, 10), rating(83, 2, 10)],
    )
    make_run(tmp_path, "b", "td_dpo", tau=1, ratings=[rating(81, 1, 4), rating(83, 1, 4)])
    comparison = compared(tmp_path)
    judge = comparison["mt_bench"][0]
    assert judge["questions"] == [81] and judge["questions_left_out"] == [82, 83]
    assert [row["score"] for row in judge["cells"]] == [2, 4]
    assert noted(comparison, "1 of 3 questions", "left out 82, 83", "partly judged in b")


def test_a_failed_judgement_is_counted_and_drops_no_question(tmp_path):
    make_run(tmp_path, "a", "dpo", ratings=[rating(81, 1, None), rating(82, 1, 6)])
    make_run(tmp_path, "b", "td_dpo", tau=1, ratings=[rating(81, 1, 4), rating(82, 1, 8)])
    comparison = compared(tmp_path)
    rows = comparison["mt_bench"][0]["cells"]
    assert [(row["score"], row["n_scored"], row["n_judged"]) for row in rows] == [
        (6, 1, 2),
        (6, 2, 2),
    ]
    assert noted(comparison, "a: 1 of 2 judgements have no score (parse 1)")


def test_no_common_question_is_no_comparison(tmp_path):
    make_run(tmp_path, "a", "dpo", ratings=[rating(81, 1, 2)])
    make_run(tmp_path, "b", "td_dpo", tau=1, ratings=[rating(82, 1, 4)])
    comparison = compared(tmp_path)
    assert comparison["mt_bench"][0]["improvement"] == [] and noted(
        comparison, "compared on the 0 of 2 questions"
    )


def test_other_model_or_data_is_refused_with_the_groups(tmp_path):
    make_base(tmp_path)
    make_run(tmp_path, "a", "dpo")
    make_run(tmp_path, "b", "dpo", data_sha256={"train": "zz", "val": "b2"})
    make_run(tmp_path, "c", "dpo", model="mistral")
    with pytest.raises(UserError) as error:
        compared(tmp_path)
    assert (
        "3 groups" in str(error.value)
        and '["a", "base"]' in str(error.value)
        and '["c"]' in str(error.value)
    )
    assert [run["run_id"] for run in compared(tmp_path, "--run_ids", '["a", "base"]')["runs"]] == [
        "base",
        "a",
    ]


# ---- what did not go well, and what is missing --------------------------------------------------


def test_diverged_run_is_counted_and_named(tmp_path):
    make_run(tmp_path, "a", "discopop", 0.5, summary={"best_acc_ref": 0.7}, ratings=flat_ratings(6))
    bad = {"status": "diverged", "nonfinite_steps": 10, "best_acc_ref": 0.5, "final_acc_ref": None}
    make_run(tmp_path, "b", "discopop", 0.5, seed=43, summary=bad)
    comparison = compared(tmp_path)
    row = comparison["accuracy"]["cells"][0]
    assert (row["best_acc_ref"], row["n_seeds"], row["n_diverged"]) == (pytest.approx(0.6), 2, 1)
    assert (row["final_acc_ref"], row["final_acc_ref_n"]) == (0.5, 1)
    assert terminal.show_mean(row, "final_acc_ref", 3) == "0.500 (n=1)"
    assert comparison["diverged"] == ["b"] and noted(
        comparison, "diverged: b (10 non-finite steps)"
    )
    assert comparison["mt_bench"][0]["cells"][0]["n_diverged"] == 1


def test_a_cell_that_only_diverged_keeps_its_row(tmp_path):
    nothing = dict.fromkeys(
        ("best_acc_ref", "best_step", "final_acc_ref", "final_acc_sum", "final_acc_mean")
    )
    make_run(tmp_path, "a", "discopop", 2.5, summary={"status": "diverged", **nothing})
    make_run(tmp_path, "b", "discopop", 0.5, summary={}, ratings=flat_ratings(6))
    comparison = compared(tmp_path)
    for rows, name in (
        (comparison["accuracy"]["cells"], "best_acc_ref"),
        (comparison["mt_bench"][0]["cells"], "score"),
    ):
        row = row_of(rows, "discopop β=2.5")
        assert (row[name], row["n_seeds"], row["n_diverged"]) == (None, 0, 1)
    assert said_missing(comparison, "MT-Bench") is None  # it has no adapter that could be judged


def test_unfinished_run_is_named_and_left_out(tmp_path):
    make_run(tmp_path, "a", summary={}, ratings=flat_ratings(6))
    write_curve(make_run(tmp_path, "b", seed=43, ratings=flat_ratings(1)))
    comparison = compared(tmp_path)
    assert noted(comparison, "unfinished", "b (no summary.json)")
    assert (
        comparison["accuracy"]["cells"][0]["n_seeds"]
        == comparison["mt_bench"][0]["cells"][0]["n_seeds"]
        == 1
    )
    assert said_missing(comparison, "unfinished")["runs"] == ["b"]


def test_what_is_missing_is_said(tmp_path):
    make_run(tmp_path, "a", summary={})
    comparison = compared(tmp_path)
    assert comparison["mt_bench"] == []
    assert said_missing(comparison, "MT-Bench")["next"] == "gen_mtbench.py, then judge.py"
    for what in ("learning curve", "margins", "untrained model", "no run of dpo"):
        assert said_missing(comparison, what), what


def test_base_alone(tmp_path):
    make_base(tmp_path, ratings=flat_ratings(5))
    comparison = compared(tmp_path)
    assert [(row["label"], row["score"]) for row in comparison["mt_bench"][0]["cells"]] == [
        ("base", 5)
    ]
    assert not any(comparison["accuracy"].values())


# ---- errors -------------------------------------------------------------------------------------


def test_empty_results_folder(tmp_path):
    with pytest.raises(UserError, match="no runs here"):
        compared(tmp_path)


def test_duplicate_judgement_is_refused(tmp_path):
    make_run(tmp_path, "a", ratings=[rating(81, 1, 6), rating(81, 1, 7)])
    with pytest.raises(
        UserError, match="judgements.csv: question 81, turn 1, choice 0, repeat 0 is judged twice"
    ):
        compared(tmp_path)


def test_judgement_of_turn_3_is_refused(tmp_path):
    make_run(tmp_path, "a", ratings=[rating(81, 3, 6)])
    with pytest.raises(UserError, match="turn 1 or 2"):
        compared(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "metrics.jsonl",
            '{"step": 1, "loss": 1}\n{"step": 2, "lo',
            r"metrics.jsonl:2: not valid JSON",
        ),
        (
            "metrics.jsonl",
            '{"step": 1, "loss": "x"}\n',
            r"metrics.jsonl:1: 'loss' must be a number or null",
        ),
        ("metrics.jsonl", '{"loss": 1}\n', r"metrics.jsonl:1: no 'step'"),
        ("val_pairs.jsonl", '\n{"id": "p", "step": 0}\n', r"val_pairs.jsonl:2: no policy_chosen"),
        (
            "val_pairs.jsonl",
            '{"id": "p", "step": null, "policy_chosen": 1, "policy_rejected": 1, "ref_chosen": 1, "ref_rejected": 1}',
            r"val_pairs.jsonl:1: no 'step'",
        ),
        ("summary.json", "{}", r"summary.json: no 'status'"),
        (
            "summary.json",
            '{"status": "finished", "best_acc_ref": "high"}',
            r"summary.json: 'best_acc_ref' must be",
        ),
        ("args.json", '{"loss": "dpo", "model": "m", "mode": "quick"}', r"args.json: mode 'quick'"),
        ("args.json", '{"loss": "dpo", "mode": "full"}', r"args.json: 'model' must be text"),
        ("mt_bench/judgements.csv", "a,b\n1,2\n", r"judgements.csv: missing columns"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path, name, text, message):
    folder = make_run(tmp_path, "a")
    (folder / "mt_bench").mkdir()
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        compared(tmp_path)
    assert "\n" not in str(error.value)


def test_a_pair_that_stands_twice_is_refused(tmp_path):
    folder = make_run(tmp_path, "a")
    write_pairs(folder, {0: [(-1, -1, -1, -1)]})
    path = folder / "val_pairs.jsonl"
    path.write_text(path.read_text() * 2)
    with pytest.raises(UserError, match="val_pairs.jsonl:2: pair p0 stands twice at step 0"):
        compared(tmp_path)


@pytest.mark.parametrize("flag", ["a,b", "[]", '"a"', "[1]"])
def test_run_ids_that_are_no_list(tmp_path, flag):
    with pytest.raises(UserError, match="expected a JSON list"):
        analyze.parse_args([str(tmp_path), "--run_ids", flag])


def test_mistakes_in_the_arguments(tmp_path):
    make_run(tmp_path, "a")
    with pytest.raises(UserError, match="--run_ids: no x in .*; there are a"):
        compared(tmp_path, "--run_ids", '["x", "a"]')
    with pytest.raises(UserError, match="is one run"):
        compared(tmp_path / "a")
    with pytest.raises(UserError, match="name two losses"):
        compared(tmp_path, "--baseline", "td_dpo")


def test_an_error_leaves_nothing_half_written(tmp_path):
    make_run(tmp_path, "a", summary={})
    make_run(tmp_path, "b", seed=43, ratings=[rating(81, 1, 6)] * 2)
    with pytest.raises(UserError):
        analyze.main([str(tmp_path), "--draws", "300"])
    assert not (tmp_path / "a" / "metrics.json").exists() and not (tmp_path / "comparison").exists()


def spoil(folder, name, text):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "metrics.jsonl",
            '{"step": 1, "loss": 1}\n{"step": 2, "lo',
            "metrics.jsonl:2: not valid JSON",
        ),
        ("mt_bench/judgements.csv", "question_id,turn\n81,1\n", "judgements.csv: missing columns"),
        ("mt_bench/judgements.csv", b"question_id\xff\n", "judgements.csv: not a UTF-8 CSV file"),
        (
            "mt_bench/answers.jsonl",
            b'{"question_id": 81, "choices": "\xe9"}',
            "answers.jsonl:1: not UTF-8",
        ),
        ("mt_bench/answers.jsonl", '{"question_id": 81}', "answers.jsonl:1: not an answer row"),
        (
            "args.json",
            '{"run_id": "../out", "loss": "dpo", "model": "m", "mode": "full"}',
            "run id '../out'",
        ),
        ("summary.json", "", "summary.json: not valid JSON"),
    ],
)
def test_bad_files_are_named_and_the_rest_is_analysed_with_skip_bad(tmp_path, name, text, message):
    make_run(tmp_path, "good", summary={}, ratings=flat_ratings(6))
    spoil(make_run(tmp_path, "bad", seed=43), name, text)
    with pytest.raises(UserError, match=message) as error:
        compared(tmp_path)
    assert "\n" not in str(error.value) and "--skip_bad" in str(error.value)
    comparison = compared(tmp_path, "--skip_bad")
    assert [run["run_id"] for run in comparison["runs"]] == ["good"]
    assert noted(comparison, "left out, cannot be read", message)


def test_nan_and_out_of_range_scores_are_refused(tmp_path):
    for score in (math.nan, 11.0, math.inf):
        make_run(tmp_path, "a", ratings=[rating(81, 1, None, status="ok") | {"score": score}])
        with pytest.raises(UserError, match="is not a rating from 1 to 10"):
            compared(tmp_path)


def test_several_bad_runs_are_all_named(tmp_path):
    for name in ("a", "b"):
        spoil(make_run(tmp_path, name), "summary.json", "{")
    with pytest.raises(UserError, match="a/summary.json.*\n.*b/summary.json"):
        compared(tmp_path)
    with pytest.raises(UserError, match="summary.json"):
        compared(tmp_path, "--skip_bad")  # nothing is left


def test_a_folder_whose_name_is_no_run_id(tmp_path):
    make_run(tmp_path, "good", summary={})
    make_run(tmp_path, "bad name", seed=43)
    with pytest.raises(UserError, match="run id 'bad name'"):
        compared(tmp_path)
    assert len(compared(tmp_path, "--skip_bad")["runs"]) == 1
    with pytest.raises(UserError, match=r"no ../good in"):
        compared(tmp_path, "--run_ids", '["../good"]')


# ---- comparison ---------------------------------------------------------------------------------


EFFECTS = (("dpo", None, 0.0), ("td_dpo", 1.0, 1.0), ("discopop", None, -0.5))


def make_study(results, seeds=(42, 43, 44)):
    """Losses at two betas with a true effect, all parts of a run, and the untrained model."""

    def ratings(level, run):
        return [
            rating(
                q,
                turn,
                5 + noise(q) + level + noise(run, q, turn) / 2,
                category=("math", "writing")[q % 2],
            )
            for q in range(81, 93)
            for turn in (1, 2)
        ]

    make_base(results, ratings=ratings(-1.0, "base"))
    for loss, tau, effect in EFFECTS:
        for beta in (0.1, 0.5):
            for seed in seeds:
                run_id = f"{loss}_b{beta}_s{seed}"
                hits = [noise("pair", run_id, i) + 0.3 + effect / 2 for i in range(40)]
                accuracy = sum(hit > 0 for hit in hits) / 40
                folder = make_run(
                    results,
                    run_id,
                    loss,
                    beta,
                    tau,
                    seed,
                    ratings=ratings(effect, run_id),
                    summary={"best_acc_ref": accuracy},
                )
                write_pairs(
                    folder,
                    {0: [(-9, -9, -9, -9)] * 40, 20: [(hit - 9, -9, -9, -9) for hit in hits]},
                )
                write_curve(folder)
                choice = {
                    "index": 0,
                    "turns": ["x" * 5, "y" * 6],
                    "logp": [-3, -2],
                    "logp_base": [-4 - effect, -3],
                    "logp_tokens": [2, 3],
                }
                rows = [
                    {"question_id": q, "choices": [choice], "category": "math"}
                    for q in range(81, 93)
                ]
                write_jsonl(folder / "mt_bench" / "answers.jsonl", rows)


def test_every_loss_is_compared_with_the_baseline_and_the_untrained_model(tmp_path):
    make_study(tmp_path)
    comparison = compared(tmp_path)
    rows = comparison["mt_bench"][0]["improvement"]
    counts = {kind: sum(row["comparison"] == kind for row in rows) for kind in analyze.COMPARISONS}
    assert counts == {
        "best of grid": 2,
        "matched beta": 4,
        "best baseline": 4,
        "untrained model": 3,
    }
    headline = {row["loss"]: row for row in rows if row["comparison"] == "best of grid"}
    td = headline["td_dpo"]
    assert td["low"] < td["estimate"] < td["high"] and td["estimate"] == pytest.approx(1.0, abs=0.3)
    assert (td["seeds_compared"], td["n_units"]) == ("3 paired", 12)
    assert (
        td["p_adjusted"] == pytest.approx(min(1, 2 * td["p"]), rel=1e-9)
        or td["p"] > headline["discopop"]["p"]
    )
    assert td["rate_low"] < td["improvement_rate"] < td["rate_high"]
    assert [row["test"] for row in td["sensitivity"]][0] == "primary: questions and seeds"
    cell = row_of(comparison["mt_bench"][0]["cells"], td["proposed"])
    assert cell["low"] < cell["score"] < cell["high"]
    accuracy = comparison["accuracy"]["improvement"][0]
    assert [row["seed"] for row in accuracy["mcnemar"]] == [42, 43, 44]
    assert [row["loss"] for row in comparison["stability"]][:2] == ["discopop", "discopop"]
    movement = next(row for row in comparison["movement"] if row["run_id"] == "td_dpo_b0.1_s42")
    assert movement["kl"] == pytest.approx((2 + 1) / 2) and movement["anchor"] is None
    length = comparison["mt_bench"][0]["length"]
    assert length is None  # all answers of a question's turn are equally long


def test_the_same_numbers_in_any_order_of_runs(tmp_path):
    make_study(tmp_path, seeds=(42, 43))
    ids = [run["run_id"] for run in compared(tmp_path)["runs"]]
    turned = compared(tmp_path, "--run_ids", json.dumps(ids[::-1]))
    assert json.dumps(turned, default=str) == json.dumps(compared(tmp_path), default=str)


def test_a_coupling_loss_depends_on_the_micro_batch(tmp_path):
    make_run(
        tmp_path, "a", "aot", 0.1, None, 42, summary={}, couples_batch=True, per_device_batch=4
    )
    make_run(
        tmp_path, "b", "aot", 0.1, None, 43, summary={}, couples_batch=True, per_device_batch=8
    )
    labels = [row["label"] for row in compared(tmp_path)["accuracy"]["cells"]]
    assert labels == ["aot β=0.1 per_device_batch=4", "aot β=0.1 per_device_batch=8"]


def test_an_interval_is_that_of_the_mean_beside_it(tmp_path):
    make_study(tmp_path)
    (tmp_path / "dpo_b0.1_s43" / "val_pairs.jsonl").unlink()
    rows = compared(tmp_path)["accuracy"]["cells"]
    assert row_of(rows, "dpo β=0.1")["low"] is None and row_of(rows, "dpo β=0.5")["low"] is not None


def test_nonfinite_validation_pairs_are_wrong_and_said(tmp_path):
    make_study(tmp_path, seeds=(42, 43))
    folder = tmp_path / "td_dpo_b0.1_s42"
    write_pairs(
        folder,
        {0: [(-9, -9, -9, -9)] * 40, 20: [(None, -9, -9, -9)] * 30 + [(-8, -9, -9, -9)] * 10},
    )
    comparison = compared(tmp_path)
    assert noted(comparison, "td_dpo_b0.1_s42: 30 validation pairs", "counted as wrong")
    row = next(
        row
        for row in comparison["accuracy"]["improvement"]
        if row["proposed"] == "td_dpo β=0.1 τ=1"
    )
    assert row["n_units"] == 40


def test_two_settings_of_one_judge_stand_apart_in_the_report(tmp_path):
    make_run(tmp_path, "a", ratings=flat_ratings(8) + flat_ratings(2, prompts="own"))
    (run,) = results_folder.load_runs(tmp_path, None, [])
    scores = {
        key: value
        for key, value in analyze.report_run(run)["numbers"].items()
        if key.startswith("score")
    }
    assert sorted(scores.values()) == [2, 8]


def test_no_common_question_still_gives_a_report(tmp_path):
    make_run(tmp_path, "a", "dpo", ratings=[rating(81, 1, 2)])
    make_run(tmp_path, "b", "td_dpo", tau=1, ratings=[rating(82, 1, 4)])
    analyze.main([str(tmp_path), "--draws", "300"])
    assert (tmp_path / "comparison" / "report.html").is_file()


def test_a_judge_that_never_gave_a_rating_still_gives_a_report(tmp_path):
    make_base(tmp_path, ratings=flat_ratings(None))
    make_run(tmp_path, "a", "dpo", ratings=flat_ratings(None))
    analyze.main([str(tmp_path), "--draws", "300"])
    assert (tmp_path / "comparison" / "report.html").is_file()


def test_claims_are_judged_on_every_judge(tmp_path):
    make_study(tmp_path, seeds=(42, 43))
    claim = {
        "id": "q",
        "claim": "<b>More</b>",
        "kind": "difference",
        "metric": "mt_bench",
        "at_least": 0.2,
        "a": {"loss": "td_dpo", "beta": 0.1},
        "b": {"loss": "dpo", "beta": 0.1},
    }
    (tmp_path / "claims.json").write_text(
        json.dumps([claim, claim | {"id": "r", "metric": "acc_ref"}])
    )
    found = {row["id"]: row for row in compared(tmp_path)["claims"]}
    assert found["q"]["verdict"] == "supported" and found["q"]["judge"].startswith(
        "judge gpt-5-mini"
    )
    assert found["r"]["judge"] is None and found["r"]["n_units"] == 40
    assert (
        found["1"]["verdict"] == "not measured"
        and found["1"]["why"] == "No such runs: td_dpo beta 0.01 tau 0.5."
    )


# ---- files, tables, figures ---------------------------------------------------------------------


def test_report_tables_and_figures_of_a_study(tmp_path, capsys):
    make_study(tmp_path, seeds=(42, 43))
    name = "td_dpo_b0.1_s42"
    pair = [
        rating(q, 1, None, grading="pair", status="ok", winner=name, order=order, baseline="base")
        for q in (81, 82)
        for order in ("1", "2")
    ]
    own = tmp_path / name / "mt_bench" / "judgements.csv"
    write_judgements(own, read_judgements(own) + pair)
    analyze.main([str(tmp_path), "--draws", "300"])
    folder = tmp_path / "comparison"
    report = (folder / "report.html").read_text()
    for text in (
        "SUPPORTED",
        "not measured",
        "td_dpo_b0.1_s42",
        "Win rates",
        "data:image/png;base64,",
    ):
        assert text.lower() in report.lower(), text
    stems = {path.stem for path in (folder / "tables").iterdir()}
    assert {
        "verdicts",
        "mt_bench_headline",
        "accuracy_mcnemar",
        "pairs",
        "stability",
        "movement",
    } <= stems
    for stem in stems:
        lines = [
            line
            for line in (folder / "tables" / f"{stem}.md").read_text().splitlines()
            if line[:1] == "|"
        ]
        assert len(lines) > 2 and len({line.replace(r"\|", "").count("|") for line in lines}) == 1
        latex = (folder / "tables" / f"{stem}.tex").read_text()
        body = latex.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
        columns = len(latex.split(r"\begin{tabular}{")[1].split("}")[0])
        assert body and all(line.replace(r"\&", "").count("&") == columns - 1 for line in body), (
            stem
        )
    drawn = {path.stem for path in (folder / "figures").iterdir()}
    assert {
        "comparison_win_matrix",
        "comparison_movement",
        "comparison_mt_bench_over_beta",
    } <= drawn
    assert (tmp_path / name / "figures" / f"{name}_learning_curve.pdf").stat().st_size > 5000
    metrics = json.loads((tmp_path / name / "metrics.json").read_text())
    assert (
        metrics["kl_to_base"]["kl"] == pytest.approx(1.5)
        and metrics["length_bias"][0]["n_pairs"] == 40
    )
    assert "Claims" in capsys.readouterr().out


def test_markdown_and_latex_escape_what_they_show():
    columns = [paper_tables.Column("a_b", "text"), paper_tables.Column("β", "number", 2)]
    table = paper_tables.Table(
        "t", "50% of a_b & c", None, columns, [{"text": "x|y_{z}\n# $<script>", "number": 0.5}]
    )
    assert (
        table_files.markdown_text(table).splitlines()[-1] == r"| x\|y\_{z} # $\<script\> | 0.50 |"
    )
    latex = table_files.latex_text(table)
    assert r"x|y\_\{z\} \# \$$<$script$>$ & 0.50 \\" in latex and r"50\% of a\_b \& c" in latex
    assert r"\begin{tabular}{lr}" in latex and r"a\_b & $\beta$" in latex


def test_a_drawn_figure_is_not_drawn_again_until_its_numbers_change(tmp_path):
    folder = make_run(tmp_path, "a", summary={"best_step": 4})
    write_curve(folder)
    png = folder / "figures" / "a_learning_curve.png"
    run_figures.draw_run(results_folder.load_runs(tmp_path, None, [])[0])
    before = png.stat().st_mtime_ns
    run_figures.draw_run(results_folder.load_runs(tmp_path, None, [])[0])
    assert png.stat().st_mtime_ns == before
    png.write_bytes(png.read_bytes()[:200])  # torn
    run_figures.draw_run(results_folder.load_runs(tmp_path, None, [])[0])
    assert png.stat().st_size > 5000
    write_curve(folder, steps=12)
    before = png.read_bytes()
    run_figures.draw_run(results_folder.load_runs(tmp_path, None, [])[0])
    assert png.read_bytes() != before


def snapshot(results):
    return {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}


def test_everything_is_written_and_the_same_twice(tmp_path, capsys):
    small = {"judge": "SmolLM2-135M", "judge_params_b": 0.135}
    make_base(tmp_path, ratings=flat_ratings(4, **small))
    folder = make_run(tmp_path, "dpo_s42", "dpo", 0.1, summary={}, ratings=flat_ratings(5, **small))
    write_curve(folder, bad=(3,))
    make_run(tmp_path, "td_s42", "td_dpo", 0.1, 1, summary={}, ratings=flat_ratings(6, **small))
    make_run(tmp_path, "td2_s42", "td_dpo", 0.1, 2, summary={}, ratings=flat_ratings(7, **small))
    assert analyze.main([str(tmp_path), "--draws", "300"]) is None
    comparison = tmp_path / "comparison"
    both = ("bars", "boxes", "heatmap", "over_beta", "differences")
    names = [
        f"{part}_{kind}"
        for part in ("accuracy", "mt_bench")
        for kind in both
        if kind != "over_beta"
    ]
    names += ["mt_bench_categories", "learning_curves"]
    names.remove("accuracy_differences")  # these runs have no validation pairs
    expected = {f"comparison_{name}.{suffix}" for name in names for suffix in ("pdf", "png")}
    assert {path.name for path in (comparison / "figures").iterdir()} == expected
    drawn = [*(comparison / "figures").iterdir(), *(folder / "figures").iterdir()]
    assert len(drawn) == len(expected) + 2 and all(path.stat().st_size > 5000 for path in drawn)
    assert json.loads((folder / "metrics.json").read_text())["mt_bench"][0]["smoke_test"] is True
    assert (
        json.loads((comparison / "aggregated_metrics.json").read_text())["mt_bench"][0][
            "smoke_test"
        ]
        is True
    )
    with open(comparison / "tables" / "mt_bench_by_turn.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["label"], row["score"], row["smoke_test"], row["judge"]) for row in rows][:2] == [
        ("base", "4.0", "True", "SmolLM2-135M"),
        ("dpo β=0.1", "5.0", "True", "SmolLM2-135M"),
    ]
    printed = capsys.readouterr().out
    assert printed.count("*** SMOKE TEST") == 3  # by turn, by category, improvement
    assert "+1.00 +20.0% (dpo β=0.1: 5.00, n=1)" in printed and "aggregated_metrics.json" in printed
    before = snapshot(tmp_path)
    analyze.main([str(tmp_path), "--draws", "300"])
    assert snapshot(tmp_path) == before


def test_tables_of_judges_that_are_gone_do_not_stay(tmp_path):
    folder = make_run(tmp_path, "a", ratings=flat_ratings(6) + flat_ratings(5, judge="other"))
    analyze.main([str(tmp_path), "--draws", "300"])
    assert (tmp_path / "comparison" / "tables" / "mt_bench_by_turn_other.csv").exists()
    write_judgements(folder / "mt_bench" / "judgements.csv", flat_ratings(6))
    analyze.main([str(tmp_path), "--draws", "300"])
    tables = {path.name for path in (tmp_path / "comparison" / "tables").iterdir()}
    assert "mt_bench_by_turn.csv" in tables and not any("other" in name for name in tables)


def draw_comparison(folder, comparison):
    for draw in figures.comparison_jobs(folder, comparison, []):
        draw()


@pytest.fixture
def drawn(monkeypatch):
    """Figures by name, not written."""
    found = {}
    monkeypatch.setattr(
        drawing, "save_figure", lambda figure, stem, *_, **__: found.update({stem.name: figure})
    )
    return found


def test_learning_curve_marks_nonfinite_steps_and_the_best(tmp_path, drawn):
    write_curve(make_run(tmp_path, "a", summary={"best_step": 4}), bad=(3, 6))
    run_figures.draw_run(results_folder.load_runs(tmp_path, None, [])[0])
    figure = drawn["a_learning_curve"]
    loss = figure.axes[0]
    marks = [
        line.get_xdata()[0]
        for line in loss.get_lines()
        if len(line.get_xdata()) == 2 and line.get_label()[0] == "_"
    ]
    assert sorted(marks) == [3, 4, 6]  # and not 7 or 8, though `nonfinite` counts on
    assert math.isnan(loss.get_lines()[0].get_ydata()[2])
    labels = [text.get_text() for text in figure.subfigs[0].legends[0].get_texts()]
    assert labels == ["best checkpoint (step 4)", "non-finite step (2)"]


def test_bars_say_what_the_error_bar_is(tmp_path, drawn):
    make_grid(tmp_path)
    draw_comparison(tmp_path, compared(tmp_path))
    bars = drawn["comparison_mt_bench_bars"]
    assert [text.get_text() for text in bars.legends[0].get_texts()] == [
        "untrained model (base): 4.00",
        "baseline (dpo β=0.5, best of 2 by validation accuracy): 5.00",
        "error bar, thin: SE over questions (one seed)",
        "error bar: SD over seeds",
    ]
    assert "7.00 ± 1.00  n=3" in [text.get_text() for text in bars.axes[0].texts]
    assert [label.get_text() for label in bars.axes[0].get_yticklabels()][0] == "base"
    cells = [
        text.get_text() for axis in drawn["comparison_mt_bench_heatmap"].axes for text in axis.texts
    ]
    assert "7.00 ± 1.00\n(n=3)" in cells and "5.00\n(n=1)" in cells


def test_smoke_test_stands_in_figure_titles(tmp_path, drawn):
    make_run(tmp_path, "a", ratings=flat_ratings(6, judge="SmolLM2-135M"))
    comparison = compared(tmp_path)
    draw_comparison(tmp_path, comparison)
    assert "SMOKE TEST" in drawn["comparison_mt_bench_bars"].get_suptitle()
    assert noted(comparison, "no heat map of MT-Bench", "no loss has two cells")


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        analyze.parse_args(["--help"])
    text = capsys.readouterr().out
    assert "python analyze.py results/" in text and "--baseline" in text
