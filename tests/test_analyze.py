"""analyze.py: means and differences worked by hand, what is kept apart, and what is noted."""

import json
import math

import pytest
from studies import (
    DRAWS,
    SUMMARY,
    compared,
    find_gap,
    flat_ratings,
    has_note,
    load,
    make_base,
    make_grid,
    make_run,
    make_study,
    rating,
    row_of,
    write_curve,
    write_pairs,
)

import analyze
from pref.analysis import arguments, judge_identity, notes, report_page, terminal
from pref.files.console import UserError
from pref.files.disk import write_json

# ---- the grid -----------------------------------------------------------------------------------


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
    assert accuracy["best_acc_ref"] == pytest.approx(0.66)
    assert accuracy["best_acc_ref_sd"] == pytest.approx(0.02)
    assert accuracy["final_acc_ref"] == 0.5 and accuracy["final_acc_sum"] == pytest.approx(0.4)
    assert has_note(comparison, "unbalanced", "dpo β=0.1 has no seed 44")


def test_improvement_by_hand(tmp_path):
    make_grid(tmp_path)
    rows = compared(tmp_path)["mt_bench"][0]["improvement"]
    by_kind = {(row["comparison"], row["tau"]): row for row in rows}

    def numbers(comparison, tau):
        row = by_kind[comparison, tau]
        return row["baseline"], row["difference"], row["improvement_rate"]

    # on the seeds that both have: (6 + 7) / 2 against 5; the cell's own mean over three seeds is 7
    assert numbers("matched beta", 1) == ("dpo β=0.1", 1.5, pytest.approx(0.3))
    assert numbers("matched beta", 2) == ("dpo β=0.1", 1, 0.25)  # seed 42 alone: 5 against 4
    # the best dpo by validation accuracy is beta 0.5 (0.70), score 5
    assert numbers("best baseline", 1) == ("dpo β=0.5", 1, pytest.approx(0.2))  # seed 42 alone
    assert numbers("best baseline", 2) == ("dpo β=0.5", 0, 0)
    best = next(row for row in rows if row["comparison"] == "best of grid")
    assert (best["proposed"], best["baseline"]) == ("td_dpo β=0.1 τ=1", "dpo β=0.5")
    assert best["selected_by"] == "validation accuracy"
    assert (best["proposed_cells"], best["baseline_cells"]) == (2, 2)


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
    other = {"summary": {}, "learning_rate": 2e-5}
    make_run(tmp_path, "a", "dpo", 0.1, None, 42, summary={}, ratings=flat_ratings(4))
    make_run(tmp_path, "b", "dpo", 0.1, None, 43, ratings=flat_ratings(8), **other)
    make_run(tmp_path, "c", "td_dpo", 0.1, 1, 42, ratings=flat_ratings(6), **other)
    judge = compared(tmp_path)["mt_bench"][0]
    assert row_of(judge["cells"], "dpo β=0.1 learning_rate=1e-05")["score"] == 4
    matched = [row for row in judge["improvement"] if row["comparison"] == "matched beta"]
    assert [(row["baseline_score"], row["differs_in"]) for row in matched] == [(8, None)]


def test_how_a_run_was_computed_is_no_setting(tmp_path):
    how = {"planned_gib": 3.1, "command": "a", "starts": [1]}
    how |= {"compile": "on", "packing": "on", "save_steps": 20}
    make_run(tmp_path, "a", "dpo", 0.1, None, 42, summary={}, ratings=flat_ratings(4), **how)
    how = {"planned_gib": 2.9, "command": "b", "starts": [1, 2]}
    how |= {"compile": "off", "packing": "off", "save_steps": 5}
    make_run(tmp_path, "b", "dpo", 0.1, None, 43, summary={}, ratings=flat_ratings(8), **how)
    (cell,) = compared(tmp_path)["mt_bench"][0]["cells"]
    assert cell["seeds"] == [42, 43] and cell["score"] == 6


def test_labels_tell_all_cells_apart(tmp_path):
    # 0.1 and 0.1000001 look alike in six digits; the hash of an adapter is long.
    make_run(tmp_path, "a", "dpo", 0.1, summary={}, init_adapter_sha256="ab" * 32)
    make_run(tmp_path, "b", "dpo", 0.1000001, summary={}, init_adapter_sha256="ab" * 32)
    make_run(tmp_path, "c", "dpo", 0.5, summary={}, init_adapter_sha256=None)
    # An option whose text is that of another: "none" and None.
    make_run(tmp_path, "d", "ipo", 0.1, summary={}, option="none")
    make_run(tmp_path, "e", "ipo", 0.1, summary={}, option=None)
    labels = [row["label"] for row in compared(tmp_path)["accuracy"]["cells"]]
    assert labels == [
        "dpo β=0.1 init_adapter_sha256=abababab",
        "dpo β=0.1000001 init_adapter_sha256=abababab",
        "dpo β=0.5 init_adapter_sha256=none",
        "ipo β=0.1 option=none (d)",
        "ipo β=0.1 option=none (e)",
    ]


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
    assert has_note(comparison, "trial", "quick") and [
        run["run_id"] for run in comparison["runs"]
    ] == ["a"]
    assert comparison["accuracy"]["cells"][0]["best_acc_ref"] == 0.6


def test_judges_are_never_mixed(tmp_path):
    small = {"judge": "HuggingFaceTB/SmolLM2-135M-Instruct", "judge_params_b": 0.135}
    make_run(tmp_path, "a", "dpo", ratings=flat_ratings(8) + flat_ratings(2, **small))
    make_run(tmp_path, "b", "td_dpo", tau=1, ratings=flat_ratings(6))
    comparison = compared(tmp_path)
    by_judge = {judge["judge"]: judge for judge in comparison["mt_bench"]}
    assert [row["score"] for row in by_judge["gpt-5-mini"]["cells"]] == [8, 6]
    assert [row["score"] for row in by_judge[small["judge"]]["cells"]] == [2]
    assert by_judge[small["judge"]]["smoke_test"] is True
    assert by_judge["gpt-5-mini"]["smoke_test"] is False
    assert has_note(comparison, "SMOKE TEST", "0.135B") and has_note(comparison, "2 judges")
    assert find_gap(comparison, "SmolLM2")["runs"] == ["b"]


@pytest.mark.parametrize("field", ["prompts", "refs"])
def test_other_prompts_or_references_are_another_judge(tmp_path, field):
    make_run(tmp_path, "a", ratings=flat_ratings(8) + flat_ratings(2, **{field: "own"}))
    comparison = compared(tmp_path)
    assert sorted(judge["cells"][0]["score"] for judge in comparison["mt_bench"]) == [2, 8]
    suffixes = {
        judge_identity.file_suffix(judge, comparison["mt_bench"])
        for judge in comparison["mt_bench"]
    }
    assert len(suffixes) == 2 and "" not in suffixes


def test_pairwise_rows_are_not_scores(tmp_path):
    pair = rating(81, 1, None, grading="pair", status="ok", winner="a", order="1", baseline="base")
    make_run(tmp_path, "a", ratings=[rating(81, 1, 6), pair])
    row = compared(tmp_path)["mt_bench"][0]["cells"][0]
    assert (row["score"], row["n_judged"]) == (6, 1)


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
    assert has_note(comparison, "1 of 3 questions", "left out 82, 83", "partly judged in b")
    assert sum(map(notes.is_caveat, comparison["notes"])) == 1
    gap = find_gap(comparison, "on all questions (2 left out)")
    assert (gap["runs"], gap["next"]) == (["b"], "gen_mtbench.py, then judge.py --judge gpt-5-mini")


def test_a_failed_judgement_is_counted_and_drops_no_question(tmp_path):
    make_run(tmp_path, "a", "dpo", ratings=[rating(81, 1, None), rating(82, 1, 6)])
    make_run(tmp_path, "b", "td_dpo", tau=1, ratings=[rating(81, 1, 4), rating(82, 1, 8)])
    comparison = compared(tmp_path)
    rows = comparison["mt_bench"][0]["cells"]
    assert [(row["score"], row["n_scored"], row["n_judged"]) for row in rows] == [
        (6, 1, 2),
        (6, 2, 2),
    ]
    assert has_note(comparison, "a: 1 of 2 judgements have no score (parse 1)")
    gap = find_gap(comparison, "judgements without a score")
    assert (gap["runs"], gap["next"]) == (["a"], "judge.py --judge gpt-5-mini --retry_failed")


def test_no_common_question_is_no_comparison(tmp_path):
    make_run(tmp_path, "a", "dpo", ratings=[rating(81, 1, 2)])
    make_run(tmp_path, "b", "td_dpo", tau=1, ratings=[rating(82, 1, 4)])
    comparison = compared(tmp_path)
    assert comparison["mt_bench"][0]["improvement"] == [] and has_note(
        comparison, "compared on the 0 of 2 questions"
    )


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
    assert comparison["diverged"] == ["b"] and has_note(
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
    assert find_gap(comparison, "MT-Bench") is None  # it has no adapter that could be judged


def test_unfinished_run_is_named_and_left_out(tmp_path):
    make_run(tmp_path, "a", summary={}, ratings=flat_ratings(6))
    write_curve(make_run(tmp_path, "b", seed=43, ratings=flat_ratings(1)))
    comparison = compared(tmp_path)
    assert has_note(comparison, "unfinished", "b (no summary.json)")
    assert (
        comparison["accuracy"]["cells"][0]["n_seeds"]
        == comparison["mt_bench"][0]["cells"][0]["n_seeds"]
        == 1
    )
    assert find_gap(comparison, "unfinished")["runs"] == ["b"]


def test_runs_without_the_kl_that_others_have_are_named(tmp_path):
    make_study(tmp_path, seeds=(42,))
    path = tmp_path / "dpo_b0.1_s42" / "mt_bench" / "answers.jsonl"
    path.write_text(path.read_text().replace('"logp"', '"other"'))
    gap = find_gap(compared(tmp_path), "KL")
    assert (gap["runs"], gap["next"]) == (["dpo_b0.1_s42"], "gen_mtbench.py --kl")


def test_what_is_missing_is_said(tmp_path):
    make_run(tmp_path, "a", summary={})
    comparison = compared(tmp_path)
    assert comparison["mt_bench"] == []
    assert find_gap(comparison, "MT-Bench")["next"] == "gen_mtbench.py, then judge.py"
    for what in ("learning curve", "margins", "untrained model", "no run of dpo"):
        assert find_gap(comparison, what), what


def test_base_alone(tmp_path):
    make_base(tmp_path, ratings=flat_ratings(5))
    comparison = compared(tmp_path)
    (row,) = comparison["mt_bench"][0]["cells"]
    assert (row["label"], row["score"]) == ("base", 5)
    assert not any(comparison["accuracy"].values())


# ---- comparison ---------------------------------------------------------------------------------


def test_every_loss_is_compared_with_the_baseline_and_the_untrained_model(tmp_path):
    make_study(tmp_path)
    comparison = compared(tmp_path)
    rows = comparison["mt_bench"][0]["improvement"]
    kinds = ("best of grid", "matched beta", "best baseline", "untrained model")
    counts = {kind: sum(row["comparison"] == kind for row in rows) for kind in kinds}
    assert list(counts.values()) == [2, 4, 4, 3]
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


@pytest.mark.slow
def test_the_same_numbers_in_any_order_of_runs(tmp_path):
    make_study(tmp_path, seeds=(42, 43))
    ids = [run["run_id"] for run in compared(tmp_path)["runs"]]
    turned = compared(tmp_path, "--run_ids", json.dumps(ids[::-1]))
    assert json.dumps(turned, default=str) == json.dumps(compared(tmp_path), default=str)


def test_a_coupling_loss_depends_on_the_micro_batch(tmp_path):
    for name, seed, batch in (("a", 42, 4), ("b", 43, 8)):
        args = {"couples_batch": True, "per_device_batch": batch}
        make_run(tmp_path, name, "aot", 0.1, None, seed, summary={}, **args)
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
    write_json(folder / "summary.json", SUMMARY | {"best_acc_ref": 0.25})
    comparison = compared(tmp_path)
    assert has_note(comparison, "td_dpo_b0.1_s42: 30 validation pairs", "counted as wrong")
    row = next(
        row
        for row in comparison["accuracy"]["improvement"]
        if row["proposed"] == "td_dpo β=0.1 τ=1"
    )
    assert row["n_units"] == 40


def test_two_settings_of_one_judge_stand_apart_in_the_report(tmp_path):
    make_run(tmp_path, "a", ratings=flat_ratings(8) + flat_ratings(2, prompts="own"))
    (run,) = load(tmp_path)
    numbers = report_page.page_run(run, {})["numbers"]
    assert sorted(value for key, value in numbers.items() if key.startswith("score")) == [2, 8]


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


# ---- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["a,b", "[]", '"a"', "[1]", "[a]", "../x"])
def test_run_ids_that_are_none(tmp_path, flag):
    with pytest.raises(UserError, match="expected run ids, such as|run id .*: use letters"):
        analyze.parse_args([str(tmp_path), "--run_ids", flag])


@pytest.mark.parametrize("words", [["a", "b"], ['["a", "b"]'], ['["a",', '"b"]']])
def test_run_ids_as_words_or_as_a_list(tmp_path, words):
    assert analyze.parse_args([str(tmp_path), "--run_ids", *words]).run_ids == ["a", "b"]


def test_another_folder_for_a_subset_but_not_one_with_other_files(tmp_path):
    def folder(out):
        return arguments.output_folder(analyze.parse_args([str(tmp_path), "--out", str(out)]))

    assert arguments.output_folder(analyze.parse_args([str(tmp_path)])) == tmp_path / "comparison"
    assert folder(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "own" / "tables").mkdir(parents=True)
    (tmp_path / "own" / "tables" / "mine.csv").write_text("kept")
    with pytest.raises(UserError, match="own: holds other files than those of a comparison"):
        folder(tmp_path / "own")
    (tmp_path / "own" / "aggregated_metrics.json").write_text("{}")
    assert folder(tmp_path / "own") == tmp_path / "own"
    with pytest.raises(UserError, match="is a file"):
        folder(tmp_path / "own" / "tables" / "mine.csv")


def test_a_subset_says_that_it_replaces_the_whole(tmp_path):
    write_json(tmp_path / "aggregated_metrics.json", {"runs": [{}, {}, {}]})
    assert "comparison of 3 runs is replaced; --out DIR" in notes.note_replaced(tmp_path, 2)
    assert notes.note_replaced(tmp_path, 3) is None
    assert notes.note_replaced(tmp_path / "new", 1) is None


def test_mistakes_in_the_arguments(tmp_path):
    with pytest.raises(UserError, match="name two losses"):
        analyze.parse_args([str(tmp_path), "--baseline", "td_dpo"])
    with pytest.raises(UserError, match="--draws 100: a 95 % interval needs at least 200"):
        analyze.parse_args([str(tmp_path), "--draws", "100"])


def test_an_error_leaves_nothing_half_written(tmp_path):
    make_run(tmp_path, "a", summary={})
    make_run(tmp_path, "b", seed=43, ratings=[rating(81, 1, 6)] * 2)
    with pytest.raises(UserError):
        analyze.main([str(tmp_path), *DRAWS])
    assert not (tmp_path / "a" / "metrics.json").exists() and not (tmp_path / "comparison").exists()


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        analyze.parse_args(["--help"])
    text = capsys.readouterr().out
    for part in ("python analyze.py results/", "--baseline", "results/claims.json", "report.html"):
        assert part in text, part
