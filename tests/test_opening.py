"""opening.py, scores.py, decisions.py, brief.py: the statement that a study opens with, worked by
hand; what it may not say; and that it fits on a terminal.
"""

import numpy as np
import pytest
from studies import compared, make_base, make_grid, make_run, rating

from pref.analysis import (
    answer,
    brief,
    decisions,
    notes,
    opening,
    power,
    report_page,
    scores,
    stats,
)
from pref.analysis.estimates import Comparison
from pref.files.disk import write_json

TRAINED = {"wall_s": 720.0, "tokens": 1_250_000}
KL = {"dpo β=0.1": 12.0, "td_dpo β=0.5 τ=1": 8.5, "base": 0.0}


def cell(label, score, n_diverged=0):
    untrained = label == "base"
    runs = [] if n_diverged and score is None else [f"{label} run"]
    row = {"label": label, "loss": label.split()[0], "score": score, "untrained": untrained}
    return row | {"runs": runs, "n_diverged": n_diverged, "best_acc_ref": score}


def difference(a, b, low, high, **fields):
    """A row of "improvement": a and b are (label, score)."""
    estimate = a[1] - b[1]
    kind = "untrained model" if b[0] == "base" else "best of grid"
    row = {"comparison": kind, "loss": a[0].split()[0], "estimate": estimate, "low": low}
    row |= {"high": high, "proposed": a[0], "proposed_score": a[1], "baseline": b[0]}
    row |= {"baseline_score": b[1], "n_units": 300, "paired": "paired", "detectable": 0.06}
    row |= {"seeds_compared": "3 paired" if kind == "best of grid" else "3 against 1, unpaired"}
    row |= {"p_adjusted": 0.001 if low * high > 0 else 0.4, "selected_by": None, "se": 0.02}
    row |= {"proposed_cells": 1, "baseline_cells": 1, "differs_in": None}
    return row | fields


DPO, TD, BASE = ("dpo β=0.1", 0.55), ("td_dpo β=0.5 τ=1", 0.56), ("base", 0.41)
RAISED = difference(DPO, BASE, 0.10, 0.18)
OPEN = difference(TD, DPO, -0.03, 0.05)
SIZES = {"seeds_to_decide": 9, "units_to_decide": 900, "seeds_now": 3}


def part_of(*rows, cells=None, **facts):
    """The scores of a task's program on the cells of these rows."""
    sides = {row[side]: row[f"{side}_score"] for row in rows for side in ("proposed", "baseline")}
    cells = cells or [cell(label, score) for label, score in sides.items()]
    of_answers = {"kl_answers": "constraints"}
    frontier = [{"label": one["label"], "kl": KL.get(one["label"])} | of_answers for one in cells]
    facts = {"bench": "constraints", "grading": "program", "judge": "py:constraints.py"} | facts
    facts = {"title": f"judge {facts['judge']}", "category": None, "as_humans": None} | facts
    return facts | {"cells": cells, "improvement": list(rows), "frontier": frontier}


def study(*parts, accuracy=None, claims=(), key="reward", diverged=(), **fields):
    nothing = {"cells": [], "improvement": []}
    runs = [
        {"run_id": run_id, "status": "finished", **TRAINED}
        for part in parts
        for one in part["cells"]
        for run_id in one["runs"]
    ]
    comparison = {"trial": False, key: list(parts), "accuracy": accuracy or nothing}
    comparison |= {"baseline": "dpo", "movement": [], "runs": runs, "claims": list(claims)}
    return comparison | {"diverged": list(diverged)} | fields


def open_study(*parts, **fields):
    return opening.find_opening(study(*parts, **fields)).row()


# ---- the statement ------------------------------------------------------------------------------


def test_the_best_setting_against_the_untrained_model():
    found = open_study(part_of(RAISED, OPEN | SIZES))
    assert found == {
        "statement": "dpo β=0.1 raises constraints from 0.410 to 0.550: +0.140 [+0.100, +0.180] "
        "over 300 questions and 3 seeds, at 12.0 nats of KL. Between losses nothing is decided: "
        "td_dpo β=0.5 τ=1 against dpo β=0.1 is +0.010 [-0.030, +0.050]; 6 more seeds (9 in all) "
        "or 3 times the questions (900) would decide it, if the difference is as measured. A run "
        "trained for 12 minutes on 1.25 million tokens.",
        "verdict": "decided",
        "metric": "reward",
        "estimate": pytest.approx(0.14),
        "low": 0.10,
        "high": 0.18,
        "a": "dpo β=0.1",
        "b": "base",
    }


def test_what_is_decided_between_losses_comes_before_what_is_not():
    lost = difference(("noisy_dpo β=0.1", 0.40), DPO, -0.20, -0.10)
    statement = open_study(part_of(RAISED, OPEN | SIZES, lost))["statement"]
    between = statement.split("nats of KL. ")[1]
    assert between.startswith(
        "dpo β=0.1 is better than noisy_dpo β=0.1. Not decided: td_dpo β=0.5 τ=1 against dpo β=0.1 "
        "is +0.010 [-0.030, +0.050]; 6 more seeds"
    )
    assert "nothing is decided" not in statement


def test_the_answer_of_a_score_does_not_contradict_its_badge():
    (one,) = answer.find_answers(study(part_of(RAISED, OPEN | SIZES)))
    assert one["finding"]["verdict"] == "decided"
    assert one["lead"].startswith("dpo β=0.1 raises constraints from 0.410 to 0.550: +0.140 [")
    assert one["lead"].endswith(" Not decided: whether td_dpo β=0.5 τ=1 differs from dpo β=0.1.")
    assert one["finding"]["text"] == "+0.140 [+0.100, +0.180] dpo β=0.1 against base"
    row = one["rows"][0]
    assert row["verdict"] == "not decided" and "6 more seeds (9 in all) or 3 times" in row["detail"]
    assert row["detail"].endswith("finds a difference of 0.060 in four cases of five")


def test_a_loss_that_won():
    row = difference(("td_dpo β=0.5 τ=1", 0.70), DPO, 0.10, 0.20)
    better = difference(("td_dpo β=0.5 τ=1", 0.70), BASE, 0.24, 0.34)
    found = open_study(part_of(row, RAISED, better, judge_usd=3.2))
    assert found["statement"] == (
        "td_dpo β=0.5 τ=1 is better than dpo β=0.1 on constraints: 0.700 against 0.550, +0.150 "
        "[+0.100, +0.200] over 300 questions and 3 seeds, at 8.50 against 12.0 nats of KL. Against "
        "the untrained model it is +0.290 [+0.240, +0.340]. A run trained for 12 minutes on 1.25 "
        "million tokens; judging all runs cost 3.20 dollars."
    )
    assert (found["verdict"], found["a"], found["b"]) == ("decided", row["proposed"], "dpo β=0.1")


def test_a_baseline_that_beats_all_is_the_winner():
    rows = [
        difference(("td_dpo β=0.5 τ=1", 0.45), DPO, -0.16, -0.04),
        difference(("ipo β=1", 0.30), DPO, -0.32, -0.18, seeds_compared="2 against 3, unpaired"),
    ]
    found = open_study(part_of(*rows))
    assert found["statement"].startswith(
        "dpo β=0.1 is better than td_dpo β=0.5 τ=1 on constraints: 0.550 against 0.450, +0.100 "
        "[+0.040, +0.160] over 300 questions and 3 seeds, at 12.0 against 8.50 nats of KL. A run"
    )
    assert (found["a"], found["estimate"]) == ("dpo β=0.1", pytest.approx(0.10))
    assert opening.turned(rows[1])["seeds_compared"] == "3 against 2"
    # One of them may be as good: what is decided is that training helped.
    mixed = open_study(part_of(OPEN | SIZES, rows[1], RAISED))
    assert mixed["statement"].startswith("dpo β=0.1 raises constraints")
    assert "dpo β=0.1 is better than ipo β=1." in mixed["statement"]


def test_training_that_harms():
    rows = [difference((name, 0.3), BASE, -0.2, -0.05) for name in ("dpo β=0.1", "ipo β=1")]
    found = open_study(part_of(*rows))
    assert found["statement"].startswith("dpo β=0.1 lowers constraints from 0.410 to 0.300: -0.110")
    assert found["verdict"] == "decided" and found["high"] == -0.05
    one_open = difference(("ipo β=1", 0.40), BASE, -0.05, 0.03)
    assert open_study(part_of(rows[0], one_open))["verdict"] == "undecided"


def test_nothing_is_decided_says_what_would():
    found = open_study(part_of(OPEN | SIZES, difference(("ipo β=1", 0.5), DPO, -0.2, 0.1)))
    assert found["statement"].startswith(
        "Whether td_dpo β=0.5 τ=1 is better than dpo β=0.1 on constraints is not decided: 0.560 "
        "against 0.550, +0.010 [-0.030, +0.050] over 300 questions and 3 seeds, at 8.50 against "
        "12.0 nats of KL; 6 more seeds (9 in all) or 3 times the questions (900) would decide it, "
        "if the difference is as measured. Nor is it for ipo β=1. A run trained"
    )
    assert (found["verdict"], found["a"], found["low"]) == ("undecided", TD[0], -0.03)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (SIZES | {"units_to_decide": None}, "6 more seeds (9 in all) would decide it, if the"),
        (SIZES | {"seeds_to_decide": 4, "units_to_decide": 390}, "1 more seed (4 in all) or 1.3 "),
        (SIZES | {"seeds_to_decide": None, "units_to_decide": 600}, "twice the questions (600) w"),
        (SIZES | {"seeds_to_decide": None, "units_to_decide": 900_000}, "no feasible number of s"),
        (SIZES | {"seeds_to_decide": 3}, "it was close: a study of this size"),
        (
            {"low": 0.001, "p_adjusted": 0.08} | SIZES,
            "p is adjusted; 6 more seeds (9 in all) or 3 ",
        ),
        (
            {"low": 0.001, "p_adjusted": 0.02, "selected_by": "x", "proposed_cells": 12} | SIZES,
            "more cells; 6 more s",
        ),
        ({"paired": "one seed"}, "over 300 questions, at 8.50 against 12.0 nats of KL; one seed: "),
        ({"caveat": "fewer than 10 pairs"}, "fewer than 10 pairs; take at least 10 questions."),
        ({"p_adjusted": None}, "nothing measures the error"),
    ],
)
def test_by_how_much_more_it_would_be_decided(fields, said):
    statement = open_study(part_of(OPEN | fields))["statement"]
    assert said in statement and statement.count("one seed") < 2


def test_runs_that_diverged_are_not_passed_over():
    cells = [cell(*DPO), cell(*TD), cell(*BASE), cell("ipo β=1", None, n_diverged=3)]
    found = open_study(part_of(RAISED, OPEN, cells=cells), diverged=["ipo1", "ipo2", "ipo3"])
    assert "Not measured: ipo β=1 (3 runs diverged)." in found["statement"]
    lost = [cell(*DPO), cell(*TD, n_diverged=1), cell(*BASE)]
    won = difference(TD, DPO, 0.002, 0.05)
    found = open_study(part_of(won, cells=lost), diverged=["other"])
    assert found["verdict"] == "undecided"
    assert "; 1 run of td_dpo β=0.5 τ=1 diverged and left no score." in found["statement"]


def test_a_difference_on_fewer_questions_than_the_scores_says_so():
    row = difference(TD, DPO, 0.01, 0.05, estimate=0.03, n_units=290)
    assert (
        "0.560 against 0.550 in all; +0.030 [+0.010, +0.050] over 290 questions and 3 seeds "
        in (open_study(part_of(row))["statement"])
    )
    assert "3 seeds that both have, at" in open_study(part_of(row))["statement"]


def test_a_kl_that_was_not_measured_is_named():
    part = part_of(RAISED) | {"frontier": []}
    said = "KL was not measured on these answers (gen_mtbench.py --kl)."
    assert said in open_study(part)["statement"]


def test_the_kl_of_answers_to_another_benchmark_is_not_that_of_the_score():
    part = part_of(RAISED)
    assert "nats of KL" in open_study(part)["statement"]
    of_mt_bench = [row | {"kl_answers": "mt_bench"} for row in part["frontier"]]
    statement = open_study(part | {"frontier": of_mt_bench})["statement"]
    assert "nats of KL" not in statement
    assert "KL was not measured on these answers" in statement


# ---- which score --------------------------------------------------------------------------------


def test_scores_stand_in_the_order_of_trust():
    llm = {"grading": "single", "bench": "other"}
    parts = [
        part_of(RAISED, judge="unvalidated", **llm),
        part_of(RAISED, judge="tiny", smoke_test=True, judge_params_b=0.1, **llm),
        part_of(cells=[cell(*BASE)], bench="base alone"),
        part_of(RAISED, judge="validated", as_humans="yes", **llm),
        part_of(RAISED),
    ]
    tasks = [{"task": "gsm8k", "title": None, "cells": [cell(*DPO)], "improvement": []}]
    accuracy = {"cells": [cell("dpo β=0.1", 0.7)], "improvement": []}
    found = scores.list_scores(study(*parts, tasks=tasks, accuracy=accuracy))
    names = [one.name for one in found]
    assert names[:2] == ["Reward by validated", "constraints"]
    assert names[2:4] == ["Reward by unvalidated", "Imported task (%)"]
    assert names[4:] == ["base alone", "Reward by tiny", "validation accuracy"]
    assert [one.metric for one in found][2:4] == ["reward", "task:gsm8k"]


def accuracy_of(*rows):
    return {"cells": [cell(*DPO), cell(*TD)], "improvement": list(rows)}


def test_a_judge_that_is_too_small_measures_nothing():
    facts = {"grading": "single", "judge": "tiny", "smoke_test": True, "judge_params_b": 0.135}
    found = open_study(part_of(RAISED, **facts), accuracy=accuracy_of(OPEN | SIZES))
    assert found["statement"].startswith("Reward by tiny is not measured (SMOKE TEST: judge of 0.1")
    assert found["statement"].endswith("Validation accuracy says nothing about answers.")
    assert "on validation accuracy is not decided: 0.560 against 0.550" in found["statement"]
    nothing = dict.fromkeys(("estimate", "low", "high", "a", "b"))
    assert found | nothing == found and found["verdict"] == "not measured"
    assert found["metric"] == "reward"


def test_trial_runs_measure_nothing():
    found = open_study(part_of(RAISED), accuracy=accuracy_of(OPEN), trial=True)
    assert found["statement"].startswith("Nothing is measured. TRIAL RUNS: ")
    assert (found["verdict"], found["a"]) == ("not measured", None)


def test_nothing_measured_at_all():
    runs = [{"run_id": name, "status": "diverged"} for name in ("a", "b")]
    found = open_study(runs=runs, diverged=["a", "b"])
    assert found["statement"].startswith("2 of 2 runs diverged. No run has a score")
    assert (found["verdict"], found["metric"]) == ("not measured", None)


def test_without_a_baseline_the_untrained_model_is_left():
    rows = [difference((name, 0.5), BASE, 0.05, 0.13) for name in ("ipo β=1", "simpo β=2")]
    statement = open_study(part_of(*rows))["statement"]
    assert statement.startswith("ipo β=1 raises constraints") and "--baseline" in statement
    alone = open_study(part_of(cells=[cell("ipo β=1", 0.5)]))
    why = "constraints: No loss is compared: there is no run of the baseline dpo (the highest is"
    assert alone["statement"].startswith(why)
    assert alone["verdict"] == "not measured"


def test_one_run_decides_nothing(tmp_path):
    ratings = [rating(q, 1, 5 + q % 3) for q in range(81, 101)]
    make_run(tmp_path, "dpo", "dpo", summary={}, ratings=ratings)
    found = compared(tmp_path)["answer"]
    why = "MT-Bench by gpt-5-mini: Only dpo was measured, so that no losses are compared"
    assert found["statement"].startswith(why)
    assert found["verdict"] == "not measured"
    make_base(
        tmp_path, ratings=[row | {"score": row["score"] - q % 2} for q, row in enumerate(ratings)]
    )
    found = compared(tmp_path)["answer"]
    assert (found["verdict"], found["a"], found["b"]) == ("undecided", "dpo β=0.1", "base")
    assert (
        "is better than the untrained model on MT-Bench by gpt-5-mini is not decided"
        in (found["statement"])
    )
    assert "train three" in found["statement"]


# ---- claims -------------------------------------------------------------------------------------


def claim_on(verdict, **fields):
    row = {"id": "mine", "kind": "difference", "metric": "reward", "verdict": verdict}
    row |= {"judge": "judge py:constraints.py, on constraints", "a": TD[0], "b": DPO[0]}
    return row | fields


def test_a_claim_on_the_same_cells_gives_its_verdict():
    won = difference(("td_dpo β=0.5 τ=1", 0.70), DPO, 0.10, 0.20)
    for verdict in ("supported", "contradicted"):
        found = open_study(part_of(won), claims=[claim_on("undecided"), claim_on(verdict)])
        assert found["verdict"] == verdict
        assert f"nats of KL; claim mine is {verdict}. A run" in found["statement"]
    for_task = [claim_on("supported", metric="task:constraints")]
    assert open_study(part_of(won), claims=for_task)["verdict"] == "supported"
    level = claim_on("supported", kind="equivalence", a=DPO[0], b=TD[0])
    assert open_study(part_of(OPEN), claims=[level])["verdict"] == "supported"


@pytest.mark.parametrize(
    "fields",
    [
        {"b": "dpo β=0.5"},
        {"judge": "judge py:constraints.py, on other"},
        {"metric": "mt_bench"},
        {"metric": "task:other"},
        {"kind": "variance_reduction"},
        {"verdict": "not measured"},
    ],
)
def test_a_claim_on_anything_else_does_not(fields):
    won = difference(("td_dpo β=0.5 τ=1", 0.70), DPO, 0.10, 0.20)
    assert open_study(part_of(won), claims=[claim_on("supported") | fields])["verdict"] == "decided"


def test_claims_of_other_studies_are_folded(tmp_path):
    for seed in (1, 2):
        for loss in ("dpo", "td_dpo"):
            ratings = [rating(q, 1, 5 + (q * seed + len(loss)) % 4) for q in range(81, 93)]
            fields = {"summary": {}, "ratings": ratings, "model": "/models/Llama-2-7b-chat-hf"}
            make_run(tmp_path, f"{loss}{seed}", loss, seed=seed, **fields)
    claim = {"claim": "c", "kind": "difference", "at_least": 0, "metric": "mt_bench"}
    claim |= {"a": {"loss": "td_dpo"}, "b": {"loss": "dpo"}}
    others = {
        "here": {},
        "other_folder": {"model": "meta-llama/llama-2-7b-chat-hf"},
        "misspelt": {"a": {"loss": "td_dpo", "lora_q": 3}},
        "other_model": {"model": "other/model"},
        "other_loss": {"a": {"loss": "kto"}},
        "other_beta": {"b": {"loss": "dpo", "beta": 9, "lora_q": 3}},
        "other_score": {"metric": "alpaca_eval"},
    }
    write_json(tmp_path / "claims.json", [claim | {"id": key} | one for key, one in others.items()])
    shown, folded = notes.fold_claims(compared(tmp_path)["claims"])
    assert {row["id"] for row in shown} & set(others) == {"here", "other_folder", "misspelt"}
    assert {"other_model", "other_loss", "other_beta", "other_score", "5a"} <= {
        row["id"] for row in folded
    }
    assert notes.folded_text(folded[:1], True).startswith(
        "1 more claim is of other studies: no run"
    )


# ---- from runs ----------------------------------------------------------------------------------


def test_the_same_loss_under_two_names_is_not_decided(tmp_path):
    rng = np.random.default_rng(7)
    question, scores_of = rng.normal(6, 1, 60), {}
    for loss in ("dpo", "dpo_again"):
        for seed in (1, 2, 3):
            values = question + rng.normal(0, 0.1) + rng.normal(0, 0.5, 60)
            scores_of[loss, seed] = values
            ratings = [rating(81 + q, 1, float(value)) for q, value in enumerate(values)]
            summary = {"wall_s": 10.0 * seed, "tokens": 300}
            make_run(tmp_path, f"{loss}_{seed}", loss, seed=seed, summary=summary, ratings=ratings)
    comparison = compared(tmp_path)
    found = comparison["answer"]
    assert found["verdict"] == "undecided" and found["low"] < 0 < found["high"]
    assert "A run trained for 20 seconds on 300 tokens" in found["statement"]


def test_what_would_decide_is_the_power_of_the_very_test():
    rng = np.random.default_rng(8)
    question = rng.normal(0, 1, 60)
    a, b = (
        question + rng.normal(0, 0.02, (3, 1)) + rng.normal(level, 0.5, (3, 60))
        for level in (0.06, 0.0)
    )
    of_seeds = stats.difference(a, b, True)
    test = {"p_adjusted": 0.3, "low": of_seeds.low, "high": of_seeds.high, "se": of_seeds.se}
    row = test | {"selected_by": None, "paired": "paired", "proposed": "a", "baseline": "b"}
    assert decisions.is_open(row)
    found = decisions.sizes_to_decide(row, Comparison(of_seeds, a, b), 1)
    seeds, questions = power.required_sizes(of_seeds, abs(of_seeds.estimate))
    assert list(found.values()) == [seeds, questions, 3] and seeds > 3 and questions > 60
    shown = {"estimate": of_seeds.estimate, "detectable": 0.2, "n_units": 60} | found
    assert decisions.would_decide(shown, "questions").startswith(
        "7 more seeds (10 in all) or 7.1 times the questions (425) would decide it"
    )
    decided = 0
    for _ in range(200):  # so many seeds do decide it in four studies of five
        ours, theirs = (
            question + rng.normal(level, 0.5, (seeds, 60)) for level in (of_seeds.estimate, 0.0)
        )
        decided += stats.difference(ours, theirs, True).low > 0
    assert 0.7 < decided / 200 < 0.9
    # Of two comparisons, and as the best of twelve cells against one, it takes more.
    of_two = decisions.sizes_to_decide(row, Comparison(of_seeds, a, b), 2)
    cells = {"selected_by": "the score itself", "proposed_cells": 12, "baseline_cells": 1}
    of_best = decisions.sizes_to_decide(row | cells, Comparison(of_seeds, a, b), 1)
    assert seeds < of_two["seeds_to_decide"] < of_best["seeds_to_decide"] < 3 * seeds
    swapped = cells | {"proposed_cells": 1, "baseline_cells": 12}
    assert decisions.sizes_to_decide(row | swapped, Comparison(of_seeds, a, b), 1) == found
    # Compared with one untrained model, the seeds are those of the trained cell.
    one = stats.difference(a, b[:1], False)
    assert decisions.sizes_to_decide(row, Comparison(one, a, b[:1]), 1)["seeds_now"] == 3
    assert not decisions.is_open(row | {"paired": "one seed"})
    assert not decisions.is_open(row | {"p_adjusted": 0.01, "low": 0.1})


def test_what_judging_cost_is_summed(tmp_path):
    for loss, price in (("dpo", 0.5), ("td_dpo", 0.25)):
        ratings = [
            rating(q, 1, 5 + q % 2, cost_usd=price if q < 90 else None) for q in range(81, 93)
        ]
        make_run(tmp_path, loss, loss, summary={}, ratings=ratings)
    comparison = compared(tmp_path)
    assert comparison["mt_bench"][0]["judge_usd"] == pytest.approx(9 * 0.75)
    assert "judging all runs cost 6.75 dollars" in comparison["answer"]["statement"]


# ---- on the terminal and in the report ----------------------------------------------------------


def test_25_lines_hold_any_study(tmp_path):
    make_grid(tmp_path)
    comparison = compared(tmp_path)
    huge = {key: comparison[key] * 40 for key in ("answers", "claims", "notes", "missing")}
    huge["notes"] = huge["notes"] + ["left out: what is old " * 9]
    long = comparison["answer"] | {"statement": "a setting with a very long name, " * 60}
    few = {"answers": comparison["answers"][:1], "claims": [], "notes": [], "missing": []}
    for study_of, printed in (
        (comparison, 1),
        (comparison | huge | {"answer": long}, 2),
        (comparison | few, 1),
    ):
        lines = brief.lines(study_of, tmp_path / "comparison", printed)
        assert len(lines) + printed <= brief.MOST_LINES
        assert all(len(line) <= brief.WIDTH for line in lines if str(tmp_path) not in line)
        assert lines[1].startswith(study_of["answer"]["verdict"].upper())
    lines = brief.lines(comparison | huge, tmp_path, 1)
    assert len(lines) == 24 and any("note: left out: what is old" in line for line in lines)
    counted = [line for line in lines if line.startswith("  ... and ")]
    assert {line.split()[4] for line in counted} == {"scores", "claims", "notes", "missing"}
    n_scores = sum(line.startswith(("  decided", "  undecided")) for line in lines)
    listed = [line for line in lines if "validation accuracy:" in line or "MT-Bench:" in line]
    (others,) = [int(line.split()[2]) for line in counted if "scores" in line]
    assert others + len(listed) == 40 * len(comparison["answers"]) and n_scores

    # The report opens with the same statement.
    page = report_page.make_page([], comparison, [], tmp_path, {})
    assert " ".join(page["opening"]["sentences"]) == comparison["answer"]["statement"]
    assert page["answer"][0]["verdict"] == comparison["answer"]["verdict"]
