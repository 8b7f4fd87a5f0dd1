"""estimates.py and pairwise.py: which values are compared, against numbers worked by hand."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from studies import a_cell, a_run, rating

from pref.analysis import estimates, pairwise, usual_tests, variation
from pref.analysis.runs import BenchFiles, ScoredCell


def make_cell(loss, run_ids, beta=0.1, tau=None, accuracy=None, settings=None, label=None):
    """run_ids: seed -> run id, or one run id for an untrained model."""
    if isinstance(run_ids, str):
        return a_cell([a_run(run_ids, None, None, None, None)])
    runs = [a_run(run_id, loss, beta, tau, seed, settings) for seed, run_id in run_ids.items()]
    return a_cell(runs, label, accuracy)


def flat(*values):
    """question -> turn 1 -> value"""
    return {question: {1: value} for question, value in enumerate(values)}


# ---- tables of values ---------------------------------------------------------------------------


def test_a_turn_lost_in_one_run_counts_in_none():
    values = {
        "a": {81: {1: 6.0, 2: 4.0}, 82: {1: 8.0, 2: 8.0}, 83: {1: 1.0}},
        "b": {81: {1: 7.0}, 82: {1: 5.0, 2: 6.0}, 83: {2: 9.0}},
    }
    a, b = estimates.make_tables(values, [["a"], ["b"]])
    # turn 2 of 81 counts in neither; 83 has no common turn
    assert a.tolist() == [[6, 8]] and b.tolist() == [[7, 5.5]]


# ---- two cells ----------------------------------------------------------------------------------


def test_common_seeds_are_paired():
    values = {"a1": flat(5, 6, 7), "a2": flat(6, 7, 9), "a3": flat(1, 1, 1)}
    values |= {"b1": flat(4, 6, 6), "b2": flat(6, 5, 6)}
    a, b = make_cell("x", {42: "a1", 43: "a2", 44: "a3"}), make_cell("y", {43: "b2", 42: "b1"})
    difference, table_a, table_b = estimates.compare_cells(a, b, values)
    assert (difference.seeds, difference.n_seeds) == ("paired", 2)
    assert table_a.tolist() == [[5, 6, 7], [6, 7, 9]] and table_b.tolist() == [[4, 6, 6], [6, 5, 6]]
    assert difference.estimate == pytest.approx(7 / 6)


def test_other_seeds_are_unpaired():
    values = {"a1": flat(5, 6, 7), "a2": flat(6, 7, 9), "b1": flat(4, 6, 6), "b2": flat(6, 5, 6)}
    a, b = make_cell("x", {42: "a1", 43: "a2"}), make_cell("y", {44: "b1", 45: "b2"})
    assert estimates.compare_cells(a, b, values).difference.seeds == "unpaired"


def test_a_single_seed_is_said_and_compared_with_the_same_seed():
    values = {"a1": flat(5, 6, 7), "b1": flat(4, 6, 6), "b2": flat(9, 9, 9)}
    a, b = make_cell("x", {42: "a1"}), make_cell("y", {41: "b2", 42: "b1"})
    compared = estimates.compare_cells(a, b, values)
    assert compared.difference.seeds == "one seed" and compared.table_b.tolist() == [[4, 6, 6]]
    assert compared.difference.se == pytest.approx(np.std([1, 0, 1], ddof=1) / math.sqrt(3))


def test_what_p_and_interval_cannot_promise_is_said():
    def compared(questions):
        rng = np.random.default_rng(0)
        values = {run: flat(*rng.normal(5, 1, questions)) for run in ("a1", "a2", "b1", "b2")}
        cells = [make_cell(cell, {1: f"{cell}1", 2: f"{cell}2"}) for cell in "ab"]
        return estimates.comparison_columns(estimates.compare_cells(*cells, values))

    enough = compared(questions=10)
    assert (enough["calibrated"], enough["caveat"]) == (True, None)
    assert 0 < enough["seed_share"] < 1
    assert "fewer than 10 questions" in compared(questions=9)["caveat"]
    one = make_cell("x", {1: "a"}), make_cell("y", {1: "b"})
    values = {"a": flat(5, 6, 7), "b": flat(4, 6, 6)}
    row = estimates.comparison_columns(estimates.compare_cells(*one, values))
    assert row["calibrated"] is False and "one seed" in row["caveat"]


def test_the_untrained_model_has_no_seeds_to_sample():
    values = {"a1": flat(5, 6, 7), "a2": flat(6, 7, 9), "base": flat(4, 6, 6)}
    trained, base = make_cell("x", {42: "a1", 43: "a2"}), make_cell("base", "base")
    compared = estimates.compare_cells(trained, base, values)
    assert compared.difference.seeds == "unpaired"
    assert compared.difference.estimate == pytest.approx(40 / 6 - 16 / 3)
    row = estimates.comparison_columns(compared)
    assert row["seeds_compared"] == "2 against 1, unpaired"


def test_no_common_question_is_no_comparison():
    a, b = make_cell("x", {42: "a"}), make_cell("y", {42: "b"})
    assert estimates.compare_cells(a, b, {"a": {1: {1: 5.0}}, "b": {2: {1: 5.0}}}) is None
    assert estimates.compare_cells(a, b, {"a": flat(1)}) is None
    assert set(estimates.comparison_columns(None).values()) == {None}


def test_mcnemar_is_by_seed():
    values = {"a1": flat(1, 1, 0, 1), "b1": flat(0, 0, 1, 1)}
    values |= {"a2": flat(1, 1, 1, 1), "b2": flat(0, 0, 0, 0.5)}
    a, b = make_cell("x", {42: "a1", 43: "a2"}), make_cell("y", {42: "b1", 43: "b2"})
    first, second = estimates.mcnemar_rows(a, b, values)
    keys = ("seed", "only_a", "only_b", "ties", "p")
    assert [first[key] for key in keys] == [42, 2, 1, 0, 1.0]
    assert [second[key] for key in keys] == [43, 3, 0, 1, 0.25]


# ---- a loss over its grid -----------------------------------------------------------------------


def test_selection_and_equal_budget_by_hand():
    grid = [  # loss, accuracy, score
        *[("dpo", 0.6, 5), ("dpo", 0.7, 4)],
        *[("td_dpo", 0.5, 3), ("td_dpo", 0.8, 6), ("td_dpo", 0.6, 7), ("td_dpo", 0.55, 2)],
    ]
    scored = [
        ScoredCell(
            make_cell(loss, {42: f"run{i}"}, accuracy=accuracy),
            {"label": f"run{i}", "score": score, "best_acc_ref": score},
        )
        for i, (loss, accuracy, score) in enumerate(grid)
    ]
    dpo, td = estimates.selection_rows(scored, "score", "dpo")
    keys = ("selected", "value", "expected_selected", "expected_maximum")
    assert [dpo[key] for key in keys] == ["run1", 4, 4, 5]
    assert (td["selected"], td["budget"], td["maximum"], td["cells"]) == ("run3", 2, 7, 4)
    # the six pairs of four cells: run3 wins three of them (6), run4 two (7), run5 one (2)
    assert td["expected_selected"] == pytest.approx((3 * 6 + 2 * 7 + 2) / 6)
    assert td["expected_maximum"] == pytest.approx((3 * 7 + 2 * 6 + 3) / 6)
    assert td["baseline_expected_selected"] == 4
    assert td["expected_difference"] == pytest.approx(td["expected_selected"] - 4)
    assert "expected_difference" not in dpo
    dpo, _ = estimates.selection_rows(scored, "best_acc_ref", "dpo")
    assert dpo["selected_by"] == "the score itself"


def test_spread_rows_against_the_baseline():
    values, cells = {}, []
    for loss, levels in (("dpo", (1, 5, 9)), ("td_dpo", (4, 5, 6))):
        for beta, level in zip((0.1, 0.5, 2.5), levels):
            runs = {seed: f"{loss}{beta}{seed}" for seed in (42, 43)}
            for shift, run_id in zip((-0.1, 0.1), runs.values()):
                values[run_id] = flat(level + shift, level + shift + 1, level + shift - 1)
            cells.append(make_cell(loss, runs, beta, tau=1.0 if loss == "td_dpo" else None))
    dpo, td = estimates.spread_rows(cells, values, "dpo", 500)
    # means 1, 5, 9 and 4, 5, 6: variances 16 and 1; the seeds' levels are the same at every beta
    assert (dpo["variance"], td["variance"]) == pytest.approx((16, 1))
    assert dpo["ratio"] is None
    assert td["ratio"] == pytest.approx(1 / 16) and td["high_open"] is False
    assert td["reduction_percent"] == pytest.approx(93.75)
    assert td["low"] == pytest.approx(td["high"])


def test_the_baseline_series_nearest_in_settings_is_compared():
    series = [("dpo", 1e-5, (5, 5.1)), ("dpo", 5e-5, (1, 9)), ("td_dpo", 5e-5, (4, 6))]
    values, cells = {}, []
    for loss, rate, levels in series:
        for beta, level in zip((0.1, 0.5), levels):
            runs = {seed: f"{loss}{rate}{beta}{seed}" for seed in (42, 43)}
            values |= {run_id: flat(level, level + 1, level - 1) for run_id in runs.values()}
            cells.append(make_cell(loss, runs, beta, settings={"learning_rate": rate}))
    *_, td = estimates.spread_rows(cells, values, "dpo", 300)
    assert td["ratio"] == pytest.approx(2 / 32) and td["differs_in"] is None


def test_stability_by_hand():
    runs = [
        a_run(f"s{seed}", "discopop", 2.5, None, seed, status=status, summary=summary)
        for seed, status, summary in (
            (42, "diverged", {"nonfinite_steps": 10, "steps": 20}),
            (43, "finished", {"nonfinite_steps": 2, "steps": 20}),
            (44, "finished", {"nonfinite_steps": 0, "steps": 20}),
        )
    ]
    (row,) = estimates.stability_rows([a_cell(runs)])
    assert (row["diverged"], row["diverged_of"], row["nonfinite_runs"]) == (1, 3, 2)
    assert (row["nonfinite_steps"], row["nonfinite_steps_of"]) == (12, 60)
    assert row["diverged_low"] == pytest.approx(1 - 0.975 ** (1 / 3))  # one of three


def test_variance_rows_need_two_cells_and_two_seeds():
    values = {"a1": flat(1, 2), "a2": flat(2, 3), "b1": flat(3, 5), "b2": flat(4, 5)}
    a, b = make_cell("dpo", {42: "a1", 43: "a2"}), make_cell("dpo", {42: "b1", 43: "b2"}, beta=0.5)
    rows = estimates.variance_rows([a, b], values, {"sd": 0.5})
    assert [row["source"] for row in rows][:3] == ["question", "beta and tau", "seed"]
    assert sum(row["share"] for row in rows[:6]) == pytest.approx(1) and rows[6]["variance"] == 0.25
    assert estimates.variance_rows([a], values, None) == []


# ---- pairwise judgements ------------------------------------------------------------------------


def pair(question, order, winner, **fields):
    judge = {"judge": "j", "prompts": "p", "refs": "r", "baseline": "base", "grading": "pair"}
    row = rating(question, 1, None, order=order, winner=winner, **judge)
    return row | {"status": "ok", **fields}


def cell_with_pairs(**judged):
    """run id -> its pairwise judgements; the seeds are 42, 43, ..."""
    runs = [
        a_run(run_id, seed=seed, benches={"mt_bench": BenchFiles(pairs=rows)})
        for seed, (run_id, rows) in enumerate(judged.items(), 42)
    ]
    return a_cell(runs)


def test_win_rate_by_hand():
    rows = [
        *[pair(81, "1", "run"), pair(81, "2", "run")],  # a win
        *[pair(82, "1", "run"), pair(82, "2", "base")],  # the orders disagree: a tie
        *[pair(83, "1", "base"), pair(83, "2", "base")],  # a loss
        *[pair(84, "1", "tie"), pair(84, "2", "tie")],
        *[pair(85, "1", "run"), pair(85, "2", None, status="parse")],  # one verdict: does not count
        pair(86, "1", "run"),  # was asked in one order only
    ]
    (won,) = pairwise.win_rows([cell_with_pairs(run=rows)])
    assert [won[key] for key in ("wins", "ties", "losses", "n_questions")] == [1, 2, 1, 4]
    assert won["win_rate"] == 0.5 and won["low"] <= 0.5 <= won["high"]
    assert won["baseline"] == "base" and won["smoke_test"] is False
    rows = [row | {"judge_params_b": 0.135} for row in rows]
    (won,) = pairwise.win_rows([cell_with_pairs(run=rows)])
    assert won["smoke_test"] is True


def test_win_rates_of_seeds_are_over_what_both_have():
    def turn(number, winner):
        return [pair(81, order, winner, turn=number) for order in "12"]

    cell = cell_with_pairs(r1=turn(2, "r1"), r2=turn(1, "base") + turn(2, "r2"))
    (won,) = pairwise.win_rows([cell])
    assert won["win_rate"] == 1 and won["n_seeds"] == 2
    assert (won["wins"], won["losses"]) == (2, 0)


def test_rounding_makes_no_difference_and_breaks_no_tie():
    rng = np.random.default_rng(2)
    a = rng.integers(1, 11, (3, 40)).astype(float)
    b = a[[2, 0, 1]]  # the same means, summed in another order
    b[:, ::3] = rng.integers(1, 11, (3, 14))
    in_thirds = a.sum(0) - b.sum(0)  # whole numbers: exact
    p = {row["test"]: row["p"] for row in usual_tests.sensitivity(a, b)}
    assert p["Wilcoxon signed rank on questions"] == scipy_stats.wilcoxon(in_thirds).pvalue
    moved = {row["test"]: row["p"] for row in usual_tests.sensitivity(a, a[[2, 0, 1]] + 0.7)}
    assert math.isnan(moved["paired t on questions"])
    assert math.isnan(variation.brown_forsythe([0.1 + 0.2, 0.3, 0.3], [0.3, 0.3, 0.1 + 0.2]))
