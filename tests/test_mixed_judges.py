"""Several judges, benchmarks and baselines in one study: what is said of one is not said of
another, and a judge that decides by position is named.
"""

import json

import numpy as np
import pytest
from bench_studies import (
    JUDGE,
    games,
    preference,
    reward,
    shape,
    write_bench,
    write_texts,
)
from scipy.optimize import minimize
from studies import MODEL, find_gap, has_note, make_base, make_run, row_of
from test_imported import evaluate, sample
from test_measures import compared

from pref.analysis import figures, notes, paper_tables, terminal
from pref.files import mt_bench
from pref.files.console import UserError
from pref.files.disk import write_json

V01 = {"bench": "arena_hard_v0.1", "baseline": "gpt-4-0314", "category": "arena-hard-v0.1"}
OTHER = {"judge": "Llama-3-70B", "judge_id": "b1", "judge_address": "http://here/v1"}


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results"


def run_with(results, bench, rows, run_id="a", loss="dpo", seed=42):
    folder = make_run(results, run_id, loss, 0.1, None, seed, summary={"best_acc_ref": 0.6})
    write_bench(folder, bench, rows)
    return folder


def seeds_of(results, bench, rows_of):
    """dpo and td_dpo, three seeds each; rows_of: (loss, seed) -> judgements."""
    for loss in ("dpo", "td_dpo"):
        for seed in (42, 43, 44):
            run_with(results, bench, rows_of(loss, seed), f"{loss}{seed}", loss, seed)


def claim(results, metric, kind="difference", **limit):
    sides = {"a": {"loss": "td_dpo"}, "b": {"loss": "dpo"}}
    named = {"id": "x", "claim": "c", "kind": kind, "metric": metric}
    write_json(results / "claims.json", [named | sides | limit])


# ---- a judge that decides by position -----------------------------------------------------------


def test_a_judge_that_goes_by_position_is_named_and_shows_no_equivalence(results):
    """It gives every run 50.00 with an error of 0; another judge of the same answers does not."""

    for loss in ("dpo", "td_dpo"):
        rows = [game for q in range(12) for game in games(q, "A>B", "A>B", **V01, **OTHER)]
        if loss == "dpo":
            shown = {q: ("A>B", "A>B") if q < 3 else ("A>B", "B>A") for q in range(12)}
            rows += [game for q, labels in shown.items() for game in games(q, *labels, **V01)]
        run_with(results, "arena_hard_v0.1", rows, loss, loss)
    claim(results, "arena_hard", "equivalence", margin=5)
    comparison = compared(results)
    by_judge = {part["judge"]: part for part in comparison["arena_hard"]}
    first, fair = by_judge[OTHER["judge"]], by_judge[JUDGE["judge"]]
    assert {(cell["score"], cell["by_position"]) for cell in first["cells"]} == {(50.0, 100.0)}
    assert [cell["by_position"] for cell in fair["cells"]] == [25.0]  # 3 of 12 questions
    assert "100 % of the questions by position" in first["agreement_text"]
    assert fair["position_warning"] is None and "position" not in fair["agreement_text"]
    assert has_note(comparison, "Llama-3-70B", "100 % of the questions by position")
    verdict = next(row for row in comparison["claims"] if (row["judge"] or "").find("Llama") > 0)
    assert verdict["verdict"] == "undecided" and "by position" in verdict["why"]


def test_a_question_without_any_verdict_is_not_counted_as_scored(results):
    """Version 0.1 leaves out a game without a verdict alone: one game is enough, none is not."""
    rows = games(1, "A>B", "B>A", **V01) + games(2, "A>B", None, **V01)
    run_with(results, "arena_hard_v0.1", rows + games(3, None, None, **V01))
    (part,) = compared(results)["arena_hard"]
    (cell,) = part["cells"]
    assert (cell["n_scored"], cell["n_judged"], cell["by_position"]) == (2, 3, 0.0)


# ---- a run as baseline --------------------------------------------------------------------------


def test_against_a_run_style_is_controlled_at_equal_style(results):
    """The score is sigma of the run's coefficient where all differences in style are 0: on raw
    features, without standardising, that is the coefficient itself.
    """
    make_base(results)
    rng = np.random.default_rng(3)
    features, won, rows_of = [], [], {}
    for run_id in ("r0", "r1"):
        rows = []
        for q in range(40):
            run, base = rng.integers(500, 2500, 2).tolist()
            lists = int(rng.integers(0, 20))
            p = lists / (run + 1)
            density = p / (p + 1)  # of lists; the baseline has none
            wins = rng.random() < 1 / (1 + np.exp(-2 * (run - base) / (run + base)))
            place = {"bench": "arena_hard_v0.1", "baseline": "base", "category": "c"}
            label = ("A>B", "B>A") if wins else ("B>A", "A>B")
            rows += games(q, *label, **place)
            for row in rows[-2:]:
                row["shape"] = shape(run, base, lists=lists)
                features.append(
                    [run_id == "r0", run_id == "r1", (run - base) / (run + base), density]
                )
                won.append(wins)
        rows_of[run_id] = rows
    for seed, (run_id, rows) in enumerate(rows_of.items()):
        run_with(results, "arena_hard_v0.1", rows, run_id, ("dpo", "simpo")[seed], seed)
    x, y = np.array(features, float) * [1, 1, 1, 1000], np.array(won, float)
    fit = minimize(lambda w: (np.logaddexp(0, x @ w) - y * (x @ w)).sum(), np.zeros(4), tol=1e-10)
    expected = 100 / (1 + np.exp(-fit.x[:2]))
    (part,) = compared(results)["arena_hard_style"]
    found = {cell["runs"][0]: cell["score"] for cell in part["cells"]}
    assert [found["r0"], found["r1"]] == pytest.approx(expected, abs=0.01)
    assert "at equal style" in part["heading"]


# ---- one judge's faults are not another's -------------------------------------------------------


def test_comparisons_of_one_judge_that_are_stale_leave_the_others(results):
    answered, replaced, theirs = "A new answer.", "An old answer.", "The baseline's."
    rows = [
        preference(1, y, baseline="base", answer_sha256=mt_bench.answer_sha256(1, *shown), **by)
        for y, shown, by in (
            (0.9, ([answered], [theirs]), {}),
            (0.2, ([replaced], [theirs]), OTHER),
        )
    ]
    folder = run_with(results, "alpaca_eval", rows)
    write_texts(folder, "alpaca_eval", {1: answered})
    write_texts(make_base(results), "alpaca_eval", {1: theirs})
    comparison = compared(results)
    assert [part["judge"] for part in comparison["alpaca_eval"]] == [JUDGE["judge"]]
    assert has_note(comparison, "Llama-3-70B", "have been replaced since")


def test_claims_on_one_judges_scores_of_two_benchmarks_are_families_of_their_own(results):
    """Holm corrects for claims on the same scores: rewards on AlpacaEval and on another set are
    not the same, and the verdicts say which is which.
    """
    rng = np.random.default_rng(1)
    for bench in ("alpaca_eval", "mine"):
        seeds_of(
            results,
            bench,
            lambda loss, seed, bench=bench: [
                reward(q, rng.normal(loss == "td_dpo", 1), bench) for q in range(20)
            ],
        )
    claim(results, "reward", at_least=0.0)
    rows = [row for row in compared(results)["claims"] if row["id"] == "x"]
    assert len({row["judge"] for row in rows}) == 2
    assert all(row["p_holm"] == row["p"] for row in rows)


# ---- no length control without df_gamed.csv ------------------------------------------------------


def test_what_is_not_length_controlled_is_nowhere_called_so(results, capsys):
    def rows(loss, seed):
        rng = np.random.default_rng(seed)
        return [
            preference(q, rng.uniform(0.1, 0.9), (int(rng.integers(500, 2500)), 1500))
            for q in range(1, 21)
        ]

    seeds_of(results, "alpaca_eval", rows)
    claim(results, "alpaca_eval_lc", at_least=1.0)
    comparison = compared(results)
    verdict = next(row for row in comparison["claims"] if row["id"] == "x")
    assert verdict["verdict"] == "not measured" and "df_gamed.csv" in verdict["why"]
    assert verdict["estimate"] is None
    shown = [
        text
        for table in paper_tables.list_tables(comparison)
        if table.id.startswith("alpaca_eval_lc")
        for text in (table.title, *table.headers())
    ]
    assert any("lc_unregularised %" in text for text in shown)
    answers = json.dumps(comparison["answers"])
    caption = figures.figure_title(results / "comparison_alpaca_eval_lc_bars.png")
    terminal.print_tables(comparison | {"claims": []}, "td_dpo")
    for text in ("".join([*shown, caption]), answers, capsys.readouterr().out):
        assert "LC win rate" not in text and "length-controlled" not in text


# ---- what is read in a terminal -----------------------------------------------------------------


def test_many_failures_are_one_line_and_many_questions_a_few(results):
    assert notes.shortened(range(9)) == "0, 1, 2, 3, 4, 5, 6, 7, 8"
    assert notes.shortened(range(30)) == "0, 1, 2, 3, 4, 5, 6, 7 and 22 more"
    rows = [{"status": "ok"}, {"status": "parse"}, {"status": "length"}]
    few = notes.note_failures({"a": rows, "b": rows[:1]})
    assert few == ["a: 2 of 3 judgements have no score (length 1, parse 1)"]
    many = notes.note_failures({str(i): rows for i in range(20)} | {"whole": rows[:1]})
    assert many == ["20 of 21 runs: 40 of 60 judgements have no score (length 20, parse 20)"]


def test_a_gap_of_another_preference_names_its_argument(results):
    settings = json.dumps({"max_tokens": 1, "preference": "both", "neutralise": True})
    rows = [preference(1, None, prompts="own", judge_settings=settings)]
    run_with(results, "alpaca_eval", rows)
    gap = find_gap(compared(results), "judgements without a score")
    assert gap["next"].endswith("--bench alpaca_eval --preference both --neutralise --retry_failed")


def test_a_baseline_that_is_no_run_may_have_any_name(results):
    run_with(results, "alpaca_eval", [preference(1, 0.9, baseline="../a <b>/model")])
    (part,) = compared(results)["alpaca_eval"]
    assert part["baseline"] == "../a <b>/model" and round(part["cells"][0]["score"]) == 90


# ---- score against KL ---------------------------------------------------------------------------


def test_frontier_is_of_the_runs_that_have_both_a_score_and_a_kl(results):
    for seed, score, kl in ((42, 1.0, 2.0), (43, 3.0, 4.0), (44, 20.0, None)):
        folder = run_with(results, "mine", [reward(1, score, "mine")], f"d{seed}", "dpo", seed)
        write_texts(folder, "mine", {1: "An answer."}, kl)
    (part,) = compared(results)["reward"]
    (row,) = part["frontier"]
    assert (row["score"], row["kl"], row["n_seeds"]) == (2.0, 3.0, 2)
    assert part["cells"][0]["score"] == 8.0


# ---- imported tasks -----------------------------------------------------------------------------


def test_a_run_that_was_evaluated_otherwise_is_named_whatever_else_is_noted(results):
    """Two runs have the same note on their files, the third another number of examples."""
    for seed, shots in ((42, 5), (43, 5), (44, 0)):
        folder = make_run(results, f"d{seed}", "dpo", seed=seed, summary={})
        rows = [sample("gsm8k", i, exact_match=float(i < 5), bleu=7.5) for i in range(10)]
        adapter = {"pretrained": MODEL, "peft": f"results/d{seed}/adapter"}
        evaluate(folder, {"gsm8k": rows}, model_args=adapter, **{"n-shot": {"gsm8k": shots}})
    comparison = compared(results)
    assert row_of(comparison["tasks"][0]["cells"], "dpo β=0.1")["runs"] == ["d42", "d43"]
    assert has_note(comparison, "d44: gsm8k is not compared", "number of examples")
    assert sum("bleu" in note for note in comparison["notes"]) == 1


# ---- validations --------------------------------------------------------------------------------


def test_of_several_validations_that_of_the_same_grading_counts(results):
    """A judge may compare as humans do and rate otherwise."""
    run_with(results, "alpaca_eval", [preference(1, 0.9)])
    for folder, grading, as_humans, n_pairs in (
        ("p", "pair", "yes", 400),
        ("s", "single", "no", 1814),
    ):
        found = {"judge": JUDGE["judge"], "judge_address": JUDGE["judge_address"]}
        found |= {"data": "mt_bench_human", "grading": grading, "as_humans": as_humans}
        write_json(results / "judges" / folder / "validation.json", found | {"n_pairs": n_pairs})
    assert compared(results)["alpaca_eval"][0]["as_humans"] == "yes"


def test_numbers_and_texts_that_are_none_are_refused(results):
    deep = "[" * 100_000
    run_with(results, "alpaca_eval", [preference(1, 0.9, judge_settings=deep)])
    compared(results)  # what a judge was asked with is shown, whatever it is
    run_with(results, "alpaca_eval", [preference(1, 0.9, shape=deep)])
    with pytest.raises(UserError, match="shape"):
        compared(results)
    run_with(results, "alpaca_eval", [preference(1, 0.9)])
    found = {"judge": "x", "as_humans": "yes", "n_pairs": "many"}
    write_json(results / "judges" / "x" / "validation.json", found)
    with pytest.raises(UserError, match="n_pairs"):
        compared(results)
