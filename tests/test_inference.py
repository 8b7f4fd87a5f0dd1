"""inference.py: which values are compared, on runs whose numbers are worked by hand."""

import math

import numpy as np
import pytest

from pref.analysis import estimates


def make_cell(loss, runs, beta=0.1, tau=None, accuracy=None):
    """runs: seed -> run id, or one run id for an untrained model."""
    runs = runs if isinstance(runs, dict) else {None: runs}
    return {
        "loss": loss,
        "beta": beta,
        "tau": tau,
        "settings": {},
        "label": loss,
        "accuracy": accuracy,
        "runs": [
            {
                "run_id": run_id,
                "pairs": [],
                "settings": {},
                "args": {"seed": seed, "loss": None if seed is None else loss},
            }
            for seed, run_id in runs.items()
        ],
    }


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
    assert a.tolist() == [[6, 8]] and b.tolist() == [
        [7, 5.5]
    ]  # turn 2 of 81 in neither; 83 has no common turn


def test_accuracy_values_count_a_tie_half_and_a_nonfinite_pair_as_wrong():
    run = {
        "summary": {"best_step": 8},
        "val": {8: {"p": (2.0, 1), "q": (0.0, 1), "r": (-1.0, 1), "s": None}},
    }
    assert estimates.accuracy_values(run) == {
        "p": {0: 1.0},
        "q": {0: 0.5},
        "r": {0: 0.0},
        "s": {0: 0.0},
    }
    assert estimates.accuracy_values({"summary": None, "val": {}}) == {}


# ---- two cells ----------------------------------------------------------------------------------


def test_common_seeds_are_paired():
    values = {
        "a1": flat(5, 6, 7),
        "a2": flat(6, 7, 9),
        "a3": flat(1, 1, 1),
        "b1": flat(4, 6, 6),
        "b2": flat(6, 5, 6),
    }
    a, b = make_cell("x", {42: "a1", 43: "a2", 44: "a3"}), make_cell("y", {43: "b2", 42: "b1"})
    found, table_a, table_b = estimates.compare_cells(a, b, values, 300)
    assert (found.seeds, found.n_seeds) == ("paired", 2)
    assert table_a.tolist() == [[5, 6, 7], [6, 7, 9]] and table_b.tolist() == [[4, 6, 6], [6, 5, 6]]
    assert found.estimate == pytest.approx(7 / 6)


def test_other_seeds_are_unpaired():
    values = {"a1": flat(5, 6, 7), "a2": flat(6, 7, 9), "b1": flat(4, 6, 6), "b2": flat(6, 5, 6)}
    a, b = make_cell("x", {42: "a1", 43: "a2"}), make_cell("y", {44: "b1", 45: "b2"})
    assert estimates.compare_cells(a, b, values, 300)[0].seeds == "unpaired"


def test_a_single_seed_is_said_and_compared_with_the_same_seed():
    values = {"a1": flat(5, 6, 7), "b1": flat(4, 6, 6), "b2": flat(9, 9, 9)}
    a, b = make_cell("x", {42: "a1"}), make_cell("y", {41: "b2", 42: "b1"})
    found, _, table_b = estimates.compare_cells(a, b, values, 300)
    assert found.seeds == "one seed" and table_b.tolist() == [[4, 6, 6]]
    assert found.se == pytest.approx(np.std([1, 0, 1], ddof=1) / math.sqrt(3))


def test_the_untrained_model_has_no_seeds_to_sample():
    values = {"a1": flat(5, 6, 7), "a2": flat(6, 7, 9), "base": flat(4, 6, 6)}
    found, *_ = estimates.compare_cells(
        make_cell("x", {42: "a1", 43: "a2"}), make_cell("base", "base"), values, 300
    )
    assert found.seeds == "unpaired" and found.estimate == pytest.approx(40 / 6 - 16 / 3)
    row = estimates.comparison_columns(
        estimates.compare_cells(
            make_cell("x", {42: "a1", 43: "a2"}), make_cell("base", "base"), values, 300
        )
    )
    assert row["seeds_compared"] == "2 against 1, unpaired"


def test_no_common_question_is_no_comparison():
    a, b = make_cell("x", {42: "a"}), make_cell("y", {42: "b"})
    assert estimates.compare_cells(a, b, {"a": {1: {1: 5.0}}, "b": {2: {1: 5.0}}}, 300) is None
    assert estimates.compare_cells(a, b, {"a": flat(1)}, 300) is None
    assert set(estimates.comparison_columns(None).values()) == {None}


def test_mcnemar_is_by_seed():
    values = {
        "a1": flat(1, 1, 0, 1),
        "b1": flat(0, 0, 1, 1),
        "a2": flat(1, 1, 1, 1),
        "b2": flat(0, 0, 0, 0.5),
    }
    a, b = make_cell("x", {42: "a1", 43: "a2"}), make_cell("y", {42: "b1", 43: "b2"})
    rows = estimates.mcnemar_rows(a, b, values)
    assert [(r["seed"], r["only_a"], r["only_b"], r["ties"]) for r in rows] == [
        (42, 2, 1, 0),
        (43, 3, 0, 1),
    ]
    assert [row["p"] for row in rows] == [1.0, 0.25]


# ---- a loss over its grid -----------------------------------------------------------------------


def test_selection_and_equal_budget_by_hand():
    cells = [make_cell("dpo", {42: f"d{i}"}, accuracy=acc) for i, acc in enumerate((0.6, 0.7))]
    cells += [
        make_cell("td_dpo", {42: f"t{i}"}, accuracy=acc)
        for i, acc in enumerate((0.5, 0.8, 0.6, 0.55))
    ]
    rows = [
        {"label": cell["runs"][0]["run_id"], "score": score}
        for cell, score in zip(cells, (5, 4, 3, 6, 7, 2))
    ]
    dpo, td = estimates.selection_rows(cells, rows, "score", "dpo")
    assert (dpo["selected"], dpo["value"], dpo["expected_selected"], dpo["expected_maximum"]) == (
        "d1",
        4,
        4,
        5,
    )
    assert (td["selected"], td["budget"], td["maximum"], td["cells"]) == ("t1", 2, 7, 4)
    # the six pairs of four cells: t1 wins three of them (6), t2 two (7), t3 one (2)
    assert td["expected_selected"] == pytest.approx((3 * 6 + 2 * 7 + 2) / 6)
    assert td["expected_maximum"] == pytest.approx((3 * 7 + 2 * 6 + 3) / 6)
    assert td["baseline_expected_selected"] == 4
    rows = [row | {"best_acc_ref": row["score"]} for row in rows]
    assert (
        estimates.selection_rows(cells, rows, "best_acc_ref", "dpo")[0]["selected_by"]
        == "the score itself"
    )


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
    assert (
        dpo["ratio"] is None and td["ratio"] == pytest.approx(1 / 16) and td["high_open"] is False
    )
    assert td["reduction_percent"] == pytest.approx(93.75) and td["low"] == pytest.approx(
        td["high"]
    )


def test_stability_by_hand():
    cell = make_cell("discopop", {42: "a", 43: "b", 44: "c"}, beta=2.5)
    for run, status, bad in zip(cell["runs"], ("diverged", "finished", "finished"), (10, 2, 0)):
        run |= {"status": status, "summary": {"nonfinite_steps": bad, "steps": 20}}
    (row,) = estimates.stability_rows([cell])
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


# ---- judge, KL, length --------------------------------------------------------------------------


def row(question, score, repeat=0, turn=1, **fields):
    return {
        "question_id": question,
        "turn": turn,
        "choice": 0,
        "repeat": repeat,
        "score": score,
        "status": "ok",
        **fields,
    }


def test_retest_and_length_from_rows():
    judged = {
        "a": [row(81, 4), row(81, 6, 1), row(82, 7), row(82, 7, 1)],
        "b": [row(81, 9), row(81, 9, 1)],
    }
    turns = {"a": {(81, 0): "x" * 10, (82, 0): "x" * 5}, "b": {(81, 0): "x" * 40}}
    answers = {
        run: {key: {"turns": [text]} for key, text in found.items()} for run, found in turns.items()
    }
    found = estimates.judge_rows(judged, answers)
    assert found["retest"]["n_items"] == 3 and found["retest"]["identical"] == pytest.approx(2 / 3)
    assert found["retest"]["sd"] == pytest.approx(math.sqrt(2 / 3))
    assert found["length"] == {
        "n": 3,
        "spearman": pytest.approx(1),
    }  # of question 81 the longer answer scores higher


def test_kl_of_own_answers_by_hand():
    def answer(policy, base, tokens):
        return {"choices": [{"index": 0, "logp": policy, "logp_base": base, "logp_tokens": tokens}]}

    answers = {
        (81, 0): answer([-10.0, -8.0], [-12.0, -9.0], [4, 2]),
        (82, 0): answer([-6.0, None], [-6.5, -1.0], [4, 1]),
    }
    found = estimates.run_kl(answers)
    assert found["kl"] == pytest.approx((1.5 + 0.5) / 2) and found["kl_per_token"] == pytest.approx(
        3.5 / 10
    )
    assert found["kl_se"] == pytest.approx(np.std([1.5, 0.5], ddof=1) / math.sqrt(2))
    assert estimates.run_kl({(81, 0): {"choices": [{"index": 0, "turns": ["a", "b"]}]}}) is None


def test_length_bias_by_hand():
    pairs = {f"p{i}": (1.0 if i >= 5 else -1.0, 0) for i in range(10)}
    rows = estimates.length_bias(pairs, {f"p{i}": 10 * i for i in range(10)})
    assert [(r["from"], r["to"], r["n_pairs"]) for r in rows] == [
        (0, 10, 2),
        (20, 30, 2),
        (40, 50, 2),
        (60, 70, 2),
        (80, 90, 2),
    ]
    assert [r["accuracy"] for r in rows] == [0, 0, 0.5, 1, 1]
    assert (
        estimates.length_bias({"p": (1.0, 0)}, {"p": 3})[0]["n_pairs"] == 1
        and estimates.length_bias({}, {}) == []
    )


# ---- pairs --------------------------------------------------------------------------------------


def pair(question, order, winner, status="ok"):
    judge = {"judge": "j", "prompts": "p", "refs": "r", "baseline": "base"}
    return judge | row(question, None, order=order, winner=winner, status=status)


def test_win_rate_by_hand():
    cell = make_cell("dpo", {42: "run"})
    cell["runs"][0]["pairs"] = [
        pair(81, "1", "run"),
        pair(81, "2", "run"),  # a win
        pair(82, "1", "run"),
        pair(82, "2", "base"),  # the orders disagree: a tie
        pair(83, "1", "base"),
        pair(83, "2", "base"),  # a loss
        pair(84, "1", "tie"),
        pair(84, "2", "tie"),
        pair(85, "1", "run"),
        pair(85, "2", None, "parse"),  # half of it has no verdict: counts nowhere
        pair(86, "1", "run"),  # half of it was never asked
    ]
    (found,) = estimates.win_rows([cell], 300)
    counts = [found[key] for key in ("wins", "ties", "losses", "n_questions")]
    assert counts == [1, 2, 1, 4]
    assert (
        found["win_rate"] == 0.5
        and found["low"] <= 0.5 <= found["high"]
        and found["baseline"] == "base"
    )
    assert found["smoke_test"] is False
    for row in cell["runs"][0]["pairs"]:
        row["judge_params_b"] = 0.135
    assert estimates.win_rows([cell], 300)[0]["smoke_test"] is True


def test_win_rates_of_seeds_are_over_what_both_have():
    cell = make_cell("dpo", {42: "r1", 43: "r2"})

    def turn(run, number, winner):
        return [
            pair(81, order, winner and run) | {"turn": number, "winner": winner} for order in "12"
        ]

    cell["runs"][0]["pairs"] = turn("r1", 2, "r1")
    cell["runs"][1]["pairs"] = turn("r2", 1, "base") + turn("r2", 2, "r2")
    (found,) = estimates.win_rows([cell], 300)
    assert found["win_rate"] == 1 and (found["wins"], found["losses"], found["n_seeds"]) == (
        2,
        0,
        2,
    )


def test_the_baseline_series_nearest_in_settings_is_compared():
    values, cells = {}, []
    for loss, rate, levels in (
        ("dpo", 1e-5, (5, 5.1)),
        ("dpo", 5e-5, (1, 9)),
        ("td_dpo", 5e-5, (4, 6)),
    ):
        for beta, level in zip((0.1, 0.5), levels):
            runs = {seed: f"{loss}{rate}{beta}{seed}" for seed in (42, 43)}
            values |= {run_id: flat(level, level + 1, level - 1) for run_id in runs.values()}
            cell = make_cell(loss, runs, beta)
            cell["settings"] = {"learning_rate": rate}
            for run in cell["runs"]:
                run["settings"] = {"learning_rate": rate}
            cells.append(cell)
    *_, td = estimates.spread_rows(cells, values, "dpo", 300)
    assert td["ratio"] == pytest.approx(2 / 32) and td["differs_in"] is None
