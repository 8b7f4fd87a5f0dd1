"""run_metrics.py: every number of one run against one worked by hand."""

import math

import numpy as np
import pytest
from studies import a_run, load, make_run, rating, write_pairs

from pref.analysis import judge_identity, run_metrics
from pref.analysis.runs import JudgeKey, Margins

# ---- MT-Bench -----------------------------------------------------------------------------------


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
    scores = run_metrics.score_ratings(rows)
    # turn means: (81,1) 6, (81,2) 4, (101,1) 8, (104,1) 2, (104,2) 2
    assert scores["score"] == pytest.approx(22 / 5)
    assert scores["turn_1"] == pytest.approx(16 / 3)
    assert scores["turn_2"] == pytest.approx(3)
    assert scores["score_without_wrong_references"] == pytest.approx(6)  # without 104
    # clusters' deviations from 4.4: 10 - 8.8, 8 - 4.4, 4 - 8.8; their squares 37.44, times 3 / 2,
    # over 5 turns
    assert scores["se_over_questions"] == pytest.approx(math.sqrt(56.16) / 5)
    assert scores["turn_1_se"] == pytest.approx(math.sqrt(28 / 3 / 3))  # 6, 8, 2
    assert (scores["n_questions"], scores["n_scored"], scores["n_judged"]) == (3, 6, 7)
    assert scores["failures"] == {"parse": 1}
    assert scores["categories"]["writing"] == {"score": 5, "se": None, "n_scored": 3, "n_judged": 3}
    # 101: 8 - 4; 104: 4 - 8; squares 32, times 2, over 3 turns
    expected = {"score": 4, "se": pytest.approx(8 / 3), "n_scored": 3, "n_judged": 4}
    assert scores["categories"]["reasoning"] == expected


def test_repeats_are_averaged_within_a_question_turn():
    rows = [rating(81, 1, 2, repeat=0), rating(81, 1, 4, repeat=1), rating(82, 1, 9)]
    assert run_metrics.score_ratings(rows)["score"] == 6  # (3 + 9) / 2, not 15 / 3


def test_a_run_without_any_rating_has_no_score():
    scores = run_metrics.score_ratings([rating(81, 1, None)])
    assert scores["score"] is None and scores["se_over_questions"] is None
    assert (scores["n_scored"], scores["n_judged"]) == (0, 1)


def test_kl_of_own_answers_by_hand():
    def answer(policy, base, tokens):
        return {"choices": [{"index": 0, "logp": policy, "logp_base": base, "logp_tokens": tokens}]}

    answers = {
        (81, 0): answer([-10.0, -8.0], [-12.0, -9.0], [4, 2]),
        (82, 0): answer([-6.0, None], [-6.5, -1.0], [4, 1]),
    }
    kl = run_metrics.run_kl(answers)
    assert kl["kl"] == pytest.approx((1.5 + 0.5) / 2)
    assert kl["kl_per_token"] == pytest.approx(3.5 / 10)
    assert kl["kl_se"] == pytest.approx(np.std([1.5, 0.5], ddof=1) / math.sqrt(2))
    assert kl["n_nonfinite"] == 1
    assert run_metrics.run_kl({(81, 0): {"choices": [{"index": 0, "turns": ["a", "b"]}]}}) is None


def test_the_shape_of_answers_by_hand():
    choice = {"index": 0, "tokens": [10, 30], "truncated": [False, True]}
    answers = {(81, 0): {"choices": [choice]}, (82, 0): {"choices": [{"index": 0}]}}
    assert run_metrics.answer_shape(answers) == (20, 0.5)
    assert run_metrics.answer_shape({}) == (None, None)


# ---- validation pairs ---------------------------------------------------------------------------


def test_run_metrics_by_hand(tmp_path):
    folder = make_run(tmp_path, "a", summary={"best_acc_ref": 0.375}, ratings=[rating(81, 1, 6)])
    # at step 20: rho = 3, -1, 0, and one pair that is not finite; delta = 2, -3, 1
    after = [(-9, -11, -10, -9), (-12, -9, -11, -9), (-8, -9, -8, -9), (None, -9, -8, -9)]
    write_pairs(folder, {0: [2 * logps[2:] for logps in after], 20: after})
    metrics = run_metrics.run_metrics(load(tmp_path)[0])
    first, best = metrics["margins"]["first"], metrics["margins"]["best"]
    assert first["rho"] == {"mean": 0, "se": 0} and first["n_pairs"] == 4
    assert (best["step"], best["n_pairs"], best["n_nonfinite"]) == (20, 3, 1)
    assert best["rho"]["mean"] == pytest.approx(2 / 3)
    # deviations 7/3, -5/3, -2/3: sum of squares 78/9, variance 13/3, SE sqrt(13)/3
    assert best["rho"]["se"] == pytest.approx(math.sqrt(13) / 3)
    assert best["delta"]["mean"] == pytest.approx(0)
    accuracy = metrics["accuracy"]
    assert accuracy["best_acc_ref"] == 0.375 and accuracy["final_acc_mean"] == 0.3
    # hits 1, 0, one half for the tie and 0 for the pair that is not finite: squares about 3/8 sum
    # to 11/16
    assert accuracy["n_pairs"] == 4
    assert accuracy["se_over_pairs"] == pytest.approx(math.sqrt(11 / 16 / 3 / 4))
    assert metrics["training"]["steps"] == 40 and metrics["training"]["peak_gib"] == 1.5
    assert metrics["status"] == "finished" and metrics["mt_bench"][0]["score"] == 6


def test_accuracy_values_count_a_tie_half_and_a_nonfinite_pair_as_wrong():
    pairs = {"p": Margins(2.0, 1), "q": Margins(0.0, 1), "r": Margins(-1.0, 1), "s": None}
    run = a_run("a", summary={"best_step": 8}, val={8: pairs})
    expected = {"p": {0: 1.0}, "q": {0: 0.5}, "r": {0: 0.0}, "s": {0: 0.0}}
    assert run_metrics.accuracy_values(run) == expected
    assert run_metrics.accuracy_values(a_run("b")) == {}


def test_length_bias_by_hand():
    pairs = {f"p{i}": Margins(1.0 if i >= 5 else -1.0, 0) for i in range(10)}
    bins = run_metrics.length_bias(pairs, {f"p{i}": 10 * i for i in range(10)})
    edges = [(0, 10), (20, 30), (40, 50), (60, 70), (80, 90)]
    assert [(row["from"], row["to"], row["n_pairs"]) for row in bins] == [(*e, 2) for e in edges]
    assert [row["accuracy"] for row in bins] == [0, 0, 0.5, 1, 1]
    assert run_metrics.length_bias({"p": Margins(1.0, 0)}, {"p": 3})[0]["n_pairs"] == 1
    assert run_metrics.length_bias({}, {}) == []
    assert run_metrics.length_bias({"p": Margins(1.0, 0)}, {}) == []  # its lengths are not known


# ---- judges -------------------------------------------------------------------------------------


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
def test_a_judge_below_7b_is_a_smoke_test(judge, params_b, smoke):
    row = rating(81, 1, 5, judge=judge, judge_params_b=params_b)
    described = judge_identity.describe_judge(JudgeKey(judge, "fastchat", None), [row])
    assert described["smoke_test"] is smoke


def test_retest_and_length_from_rows():
    judged = {
        "a": [rating(81, 1, 4), rating(81, 1, 6, repeat=1)]
        + [rating(82, 1, 7), rating(82, 1, 7, repeat=1)],
        "b": [rating(81, 1, 9), rating(81, 1, 9, repeat=1)],
    }
    lengths = {"a": {(81, 0): 10, (82, 0): 5}, "b": {(81, 0): 40}}
    answers = {
        run: {key: {"turns": ["x" * length]} for key, length in by_question.items()}
        for run, by_question in lengths.items()
    }
    reliability = run_metrics.judge_reliability(judged, answers)
    retest = reliability["retest"]
    assert retest["n_items"] == 3 and retest["identical"] == pytest.approx(2 / 3)
    assert retest["sd"] == pytest.approx(math.sqrt(2 / 3))
    # of question 81 the longer answer scores higher
    assert reliability["length"] == {"n": 3, "spearman": pytest.approx(1)}
