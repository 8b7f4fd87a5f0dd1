"""answer.py: what the report opens with, worked by hand; it decides no more than it may."""

import pytest
from studies import (
    compared,
    flat_ratings,
    has_note,
    make_base,
    make_run,
    make_study,
    rating,
    write_pairs,
)

from pref.analysis import answer, figures, measures, notes, paper_tables, scores, terminal
from pref.analysis.report import answers_html


def difference(proposed, estimate, low, high, p, comparison="best of grid", **fields):
    row = {"comparison": comparison, "loss": proposed.split()[0], "proposed": proposed}
    row |= {"baseline": "dpo β=0.5", "estimate": estimate, "low": low, "high": high}
    row |= {"p_adjusted": p, "paired": "paired", "seeds_compared": "3 paired", "n_units": 80}
    row |= {"detectable": 0.5, "selected_by": "validation accuracy", "differs_in": None}
    row |= {"se": 0.2, "proposed_cells": 2, "baseline_cells": 4}
    row |= {"proposed_score": 5.0 + estimate, "baseline_score": 5.0}
    return row | fields


def answer_of(*rows, smoke=False, trial=False, cells=None, movement=None):
    nothing = {"cells": [], "improvement": []}
    labels = {row[side] for row in rows for side in ("proposed", "baseline")}
    judge = {"title": "judge big, prompts mt_bench", "smoke_test": smoke, "judge_params_b": 0.1}
    cells = cells or [
        {
            "label": label,
            "loss": label.split()[0],
            "score": 6.0,
            "untrained": False,
            "runs": [label],
        }
        for label in labels
    ]
    movement = movement or [
        {"run_id": cell["label"], "kl": None, "tokens": None, "cut_off": None} for cell in cells
    ]
    judge |= {"cells": cells, "improvement": list(rows)}
    comparison = {"trial": trial, "mt_bench": [judge], "accuracy": nothing, "baseline": "dpo"}
    comparison |= {"movement": movement, "diverged": ["td_dpo-2"]}
    for cell in cells:
        cell.setdefault("n_diverged", 0)
    (found,) = answer.find_answers(comparison)
    assert found["score"] == "MT-Bench by big, prompts mt_bench"
    return found


def test_who_won_and_by_how_much():
    won = difference("td_dpo β=0.1 τ=1", 0.98, 0.7, 1.26, 0.001)
    open_one = difference("simpo β=2", 0.3, -0.1, 0.75, 0.2)
    lost = difference("ipo β=0.1", -0.9, -1.2, -0.6, 0.002)
    found = answer_of(lost, open_one, won)
    assert found["lead"].startswith(
        "td_dpo β=0.1 τ=1 is better than dpo β=0.5: +0.98 MT-Bench points, 95 % interval "
        "[+0.70, +1.26]."
    )
    # simpo's interval reaches into the winner's
    assert found["lead"].endswith("Whether it is the best of all is not decided against simpo β=2.")
    assert [row["verdict"] for row in found["rows"]] == ["better", "not decided", "worse"]
    assert found["rows"][0]["text"].startswith("td_dpo β=0.1 τ=1 against dpo β=0.5: +0.98")
    assert "p 0.0010 (Holm)" in found["rows"][0]["detail"]
    assert (
        "best of 2 against best of 4, selected by validation accuracy"
        in (found["rows"][0]["detail"])
    )
    assert found["rows"][1]["detail"].endswith("finds a difference of 0.50 in four cases of five")
    close = answer_of(difference("a", 0.6, -0.1, 1.3, 0.09), difference("b", 0.1, -1, 1.2, 0.9))
    assert close["lead"] == "Not decided: whether a and b differ from dpo β=0.5."
    assert close["rows"][0]["detail"].endswith("decides such a difference four times in five")


@pytest.mark.parametrize(
    "fields",
    [
        {"p_adjusted": 0.06},
        {"low": -0.01},  # test and interval must agree
        {"paired": "one seed"},
        {"p_adjusted": None},
        {"low": None, "high": None},
        {"caveat": "fewer than 10 questions"},
    ],
)
def test_what_is_not_decided(fields):
    found = answer_of(difference("td_dpo", 0.5, 0.1, 0.9, 0.01) | fields)
    assert found["lead"] == "Not decided: whether td_dpo differs from dpo β=0.5."
    assert found["rows"][0]["verdict"] == "not decided"


def test_an_interval_without_0_that_does_not_decide_says_why():
    found = answer_of(difference("td_dpo", 0.5, 0.1, 0.9, 0.2))
    assert found["rows"][0]["verdict"] == "not decided"
    assert "by chance: p is adjusted; it was close" in found["rows"][0]["detail"]


def test_one_seed_says_what_to_do():
    row = difference("td_dpo", 0.5, 0.1, 0.9, 0.01, paired="one seed", seeds_compared="one seed")
    assert "train three" in answer_of(row)["rows"][0]["detail"]


def test_a_loss_that_lost_runs_is_not_shown_to_be_better():
    def cells(n_diverged, runs):
        cell = {"label": "td_dpo", "loss": "td_dpo", "score": 6.0, "untrained": False}
        other = {"label": "dpo β=0.5", "loss": "dpo", "score": 5.0, "untrained": False, "runs": []}
        return [cell | {"runs": runs, "n_diverged": n_diverged}, other]

    nothing = {"kl": None, "tokens": None, "cut_off": None}
    movement = [{"run_id": f"td_dpo-{i}", **nothing} for i in (1, 2)]
    better = difference("td_dpo", 0.5, 0.1, 0.9, 0.01)
    found = answer_of(better, cells=cells(1, ["td_dpo-1"]), movement=movement)
    assert found["rows"][0]["verdict"] == "not decided"
    assert "1 run of td_dpo diverged and left no score" in found["rows"][0]["detail"]
    worse = difference("td_dpo", -0.5, -0.9, -0.1, 0.01)  # is not changed by it
    found = answer_of(worse, cells=cells(1, ["td_dpo-1"]), movement=movement)
    assert found["rows"][0]["verdict"] == "worse"
    # A diverged run that has a score counts in the mean.
    both = cells(1, ["td_dpo-1", "td_dpo-2"])
    assert answer_of(better, cells=both, movement=movement)["rows"][0]["verdict"] == "better"


def a_cell_row(label, score, n_diverged=0):
    cell = {"label": label, "loss": label.split()[0], "score": score, "untrained": False}
    return cell | {"runs": [], "n_diverged": n_diverged}


def test_a_loss_without_a_score_is_not_passed_over():
    cells = [a_cell_row("ipo", 6.0), a_cell_row("dpo β=0.5", 5.0), a_cell_row("td_dpo", None, 3)]
    found = answer_of(difference("ipo", 0.5, 0.1, 0.9, 0.01), cells=cells)
    assert found["lead"].endswith("Not measured: td_dpo (3 runs diverged).")
    alone = answer_of(cells=cells[1:])
    assert "Only dpo was measured" in alone["lead"] and "3 runs diverged" in alone["lead"]
    many = [a_cell_row(f"td_dpo β={i}", None, 1) for i in range(9)]
    assert answer_of(cells=cells[1:2] + many)["lead"].endswith("β=4 (1 run diverged) and 4 more.")


def test_judged_on_other_questions_is_not_called_unjudged():
    part = {"cells": [a_cell_row("dpo", None)], "questions_left_out": [81, 82]}
    comparison = {"baseline": "dpo", "accuracy": {"cells": []}}
    lead = scores.without_comparison(scores.Score(measures.MT, part, ""), comparison)
    assert lead.startswith("Nothing is compared: no question was judged in all runs (2 questions")


def test_a_baseline_without_a_score_is_not_called_absent():
    lead = answer_of(cells=[a_cell_row("ipo", 6.0), a_cell_row("dpo", None, 2)])["lead"]
    assert "no run of the baseline dpo is measured" in lead and "dpo (2 runs diverged)" in lead


def test_nothing_measured_has_an_answer():
    runs = [{"run_id": name, "status": "diverged"} for name in ("a", "b")]
    nothing = {"cells": [], "improvement": []}
    comparison = {"trial": False, "mt_bench": [], "accuracy": nothing, "runs": runs}
    (found,) = answer.find_answers(comparison | {"diverged": ["a", "b"]})
    assert found["lead"].startswith("2 of 2 runs diverged. No run has a score")


@pytest.mark.parametrize(
    ("cells", "selected_by", "verdict"),
    [
        (
            (12, 1),
            "validation accuracy",
            "not decided",
        ),  # chance alone gives 1.63 x 0.2 / 1.41 = 0.23
        ((12, 1), "the score itself", "not decided"),
        ((12, 12), "the score itself", "better"),
        ((1, 12), "the score itself", "better"),
    ],
)
def test_the_best_of_more_cells_must_win_by_more_than_chance(cells, selected_by, verdict):
    fields = dict(zip(("proposed_cells", "baseline_cells"), cells), selected_by=selected_by)
    found = answer_of(difference("td_dpo", 0.6, 0.2, 1.0, 0.01, **fields))["rows"][0]
    assert found["verdict"] == verdict
    said = "chance alone may have put the difference up to 0.23 too"
    assert (said in found["detail"]) == (cells[0] != cells[1])


def test_a_baseline_that_beats_all():
    rows = [difference(name, -0.5, -0.9, -0.1, 0.01) for name in ("a", "b", "c")]
    assert answer_of(*rows)["lead"] == "dpo β=0.5 is better than a, b and c."


def test_what_a_gain_was_bought_with():
    movement = [
        {"run_id": "td_dpo", "kl": 9.5, "tokens": 900.0, "cut_off": 0.25},
        {"run_id": "dpo β=0.5", "kl": 1.5, "tokens": 300.0, "cut_off": 0.0},
    ]
    found = answer_of(difference("td_dpo", 0.5, 0.1, 0.9, 0.01), movement=movement)
    assert "KL to the base 9.50 against 1.50 nats an answer" in found["rows"][0]["detail"]
    lengths = "answers of 900 against 300 tokens, 25.0% against 0.0% of them cut off"
    assert lengths in found["rows"][0]["detail"]


def test_a_small_judge_and_trial_runs_measure_nothing():
    row = difference("td_dpo", 0.5, 0.1, 0.9, 0.01)
    for marks, word in (({"smoke": True}, "SMOKE TEST"), ({"trial": True}, "TRIAL RUNS")):
        found = answer_of(row, **marks)
        assert found["lead"].startswith(word)
        assert [one["verdict"] for one in found["rows"]] == ["not measured"]


@pytest.mark.parametrize(
    ("losses", "text"),
    [
        (["dpo"], "Only dpo was measured"),
        (["ipo", "simpo"], "there is no run of the baseline dpo"),
        (["dpo", "simpo"], "share no question that was rated in all runs"),
    ],
)
def test_nothing_to_compare_says_why(losses, text):
    cells = [
        {"label": f"{loss} β=1", "loss": loss, "score": 5.0 + i, "untrained": False, "runs": []}
        for i, loss in enumerate(losses)
    ]
    found = answer_of(cells=cells)
    assert text in found["lead"] and found["rows"] == []
    assert f"the highest is {losses[-1]} β=1 with {4 + len(losses):.2f}" in found["lead"]


def test_the_answer_of_a_study(tmp_path):
    make_study(tmp_path)
    comparison = compared(tmp_path)
    by_judge, accuracy = comparison["answers"]
    assert by_judge["lead"].startswith("td_dpo β=")
    texts = [row["text"] for row in by_judge["rows"]]
    assert texts[-1].startswith("dpo β=") and "against base" in texts[-1]
    headline = comparison["mt_bench"][0]["improvement"][0]
    assert any(f"{headline['estimate']:+.2f} MT-Bench points" in text for text in texts)
    assert accuracy["score"].startswith("validation accuracy")
    shown, folded = notes.fold_claims(comparison["claims"])
    assert "4" in {row["id"] for row in shown} and "5a" in {row["id"] for row in folded}
    printed = terminal.verdict_table(comparison["claims"])
    assert "dLRML" not in printed and "more claims are of other studies: no run of" in printed
    rows = comparison["mt_bench"][0]["improvement"]
    text = terminal.improvement_table("Scores", measures.MT, {"improvement": rows}, "td_dpo")
    assert "; 12 questions, seeds: 3 paired" in text and "units" not in text
    page = answers_html(comparison["answers"])
    assert "td_dpo β=" in page and page.count('class="badge') == len(texts) + len(accuracy["rows"])


def test_no_score_at_all_is_no_answer():
    assert "Nothing was measured yet" in answers_html([])
    assert answers_html([{"lead": "<b>"}]).count("&lt;b&gt;") == 1


# ---- trial runs ---------------------------------------------------------------------------------


def test_trial_runs_alone_work_and_are_marked_everywhere(tmp_path):
    make_base(tmp_path, ratings=flat_ratings(4))
    for run_id, loss, score in (("a", "dpo", 5), ("b", "td_dpo", 6)):
        contents = {"summary": {"best_acc_ref": 1.0}, "ratings": flat_ratings(score)}
        folder = make_run(tmp_path, run_id, loss, mode="trial", **contents)
        write_pairs(folder, {0: [(-9, -9, -9, -9)] * 3, 20: [(-8, -9, -9, -9)] * 3})
    comparison = compared(tmp_path)
    assert [run["run_id"] for run in comparison["runs"]] == ["base", "a", "b"]
    assert has_note(comparison, "TRIAL RUNS") and comparison["trial"] is True
    assert {row["verdict"] for row in comparison["claims"]} == {"not measured"}
    assert all(one["lead"].startswith("TRIAL RUNS") for one in comparison["answers"])
    marked = [t for t in paper_tables.list_tables(comparison) if (t.note or "")[:5] == "TRIAL"]
    assert {"accuracy_headline", "mt_bench_by_turn"} <= {table.id for table in marked}
    looks = [
        job.args[2]
        for job in figures.comparison_jobs(tmp_path, comparison, [])
        if job.func.__name__ == "draw_bars"
    ]
    assert len(looks) == 2 and all("TRIAL RUNS" in " ".join(look.notes) for look in looks)


# ---- one comparison, one p-value ----------------------------------------------------------------


def test_best_cells_at_the_same_beta_are_drawn_once(tmp_path):
    for seed in (42, 43):
        for run_id, loss, score in (("a", "dpo", 4), ("b", "td_dpo", 6)):
            rows = [rating(q, 1, score + (q * seed % 3) / 2) for q in range(81, 87)]
            make_run(tmp_path, f"{run_id}{seed}", loss, seed=seed, summary={}, ratings=rows)
    comparison = compared(tmp_path)
    kinds = [row["comparison"] for row in comparison["mt_bench"][0]["improvement"]]
    assert kinds == ["best of grid", "matched beta", "best baseline"]
    (drawn,) = [
        job.args[1]
        for job in figures.comparison_jobs(tmp_path, comparison, [])
        if job.func.__name__ == "draw_differences"
    ]
    assert [row["comparison"] for row in drawn] == ["best of grid"]


def test_seeds_that_both_cells_have_are_told_from_all(tmp_path):
    for loss, seeds in (("dpo", (1, 2)), ("td_dpo", (1, 2, 5))):
        for seed in seeds:
            ratings = [rating(q, 1, 4 + (q % 3) + (seed == 5) * 3) for q in range(81, 93)]
            options = {"note": {"kind": loss}}  # an argument that is an object is a setting
            make_run(tmp_path, f"{loss}_{seed}", loss, seed=seed, ratings=ratings, **options)
    make_run(tmp_path, "td_2", "td_dpo", seed=1, note={"kind": "b"}, ratings=flat_ratings(5))
    found = compared(tmp_path, "--run_ids", "dpo_1", "dpo_2", "td_dpo_1", "td_dpo_2", "td_dpo_5")
    row = found["mt_bench"][0]["improvement"][0]
    assert row["seeds_compared"] == "2 paired, of 3 and 2" and row["difference"] == 0
    assert "seeds compared: 2 paired, of 3 and 2" in terminal.show_improvement(row, 2)
    labels = {cell["label"] for cell in compared(tmp_path)["mt_bench"][0]["cells"]}
    assert 'td_dpo β=0.1 note={"kind": "b"}' in labels and len(labels) == 3
