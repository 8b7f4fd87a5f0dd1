"""provenance.py: what does not belong together is taken out, by name, and never averaged."""

import hashlib
import json

import pytest
from studies import (
    SUMMARY,
    compared,
    data_of,
    find_gap,
    has_note,
    load,
    make_base,
    make_run,
    rating,
    row_of,
    write_curve,
    write_pairs,
)

from pref.analysis import browser_page, notes
from pref.files import mt_bench
from pref.files.console import UserError
from pref.files.disk import write_json, write_jsonl
from pref.files.judgements import write_judgements

ASKED = {81: ["Write a poem.", "Shorter."], 82: ["Write a letter.", "Longer."]}


def sha256(value) -> str:
    """SHA-256 of compact JSON, written down independently of the toolkit's own function."""
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()


def answer_all(folder, text, adapter=None, asked=ASKED, temperature=0.7):
    """answers.jsonl as gen_mtbench.py writes it."""
    rows = [
        {
            "question_id": number,
            "choices": [{"index": 0, "turns": [f"{text} {number}", f"{text} again"]}],
            "category": "writing",
            "temperature": temperature,
            "adapter_sha256": adapter,
            "question_sha256": sha256([turns, temperature]),
            "settings": {"max_new_tokens": 64},
        }
        for number, turns in asked.items()
    ]
    write_jsonl(folder / "mt_bench" / "answers.jsonl", rows)
    return folder


def judge_all(folder, text, score, **fields):
    """judgements.csv as judge.py writes it for the answers of `answer_all`."""
    rows = []
    for number in ASKED:
        turns = [f"{text} {number}", f"{text} again"]
        for turn in (1, 2):
            own = {"model_id": folder.name, "answer_sha256": sha256(turns[:turn])}
            rows.append(rating(number, turn, score, **(own | fields)))
    write_judgements(folder / "mt_bench" / "judgements.csv", rows)


def make_judged(results, run_id, score, loss="dpo", text=None, **args):
    text = text or run_id
    folder = answer_all(make_run(results, run_id, loss, summary={}, **args), text)
    judge_all(folder, text, score)
    return folder


def scores(comparison):
    return [row["score"] for judge in comparison["mt_bench"] for row in judge["cells"]]


def test_the_hashes_stay_those_of_older_files():
    """The bytes that version 1.0.0 hashed, written out."""
    turns = ["a", "\u00e4"]
    texts = {
        mt_bench.answer_sha256(1, turns): '["a"]',
        mt_bench.answer_sha256(2, turns): r'["a","\u00e4"]',
        mt_bench.answer_sha256(1, turns, ["b", "c"]): '[["a"],["b"]]',
        mt_bench.question_sha256(turns, 0.7): r'[["a","\u00e4"],0.7]',
    }
    for sha256, text in texts.items():
        assert sha256 == hashlib.sha256(text.encode()).hexdigest()


# ---- judgements and answers ---------------------------------------------------------------------


def test_what_belongs_together_is_kept(tmp_path):
    make_judged(tmp_path, "a", 4)
    make_judged(tmp_path, "b", 6, loss="td_dpo")
    comparison = compared(tmp_path, questions=ASKED)
    assert scores(comparison) == [4, 6]
    assert not has_note(comparison, "left out") and not find_gap(comparison, "scores")


def test_a_run_answered_again_after_judging_has_no_score(tmp_path):
    make_judged(tmp_path, "a", 4)
    answer_all(make_judged(tmp_path, "b", 9, loss="td_dpo"), "new")
    comparison = compared(tmp_path, questions=ASKED)
    assert scores(comparison) == [4]
    assert has_note(comparison, "of b", "4 of its 4 judgements are of answers that have been rep")
    gap = find_gap(comparison, "scores by judge gpt-5-mini")
    assert (gap["runs"], gap["next"]) == (["b"], "judge.py")
    shown = browser_page.page_judgements(load(tmp_path))
    assert {row["run_id"] for row in shown} == {"a"}
    assert sum(map(notes.is_caveat, comparison["notes"])) == 1  # stands under the answer


def test_one_new_answer_takes_the_run_out_not_the_questions_of_others(tmp_path):
    make_judged(tmp_path, "a", 4)
    folder = make_judged(tmp_path, "b", 9, loss="td_dpo")
    rows = [json.loads(line) for line in (folder / "mt_bench/answers.jsonl").open()]
    rows[0]["choices"][0]["turns"][1] = "another"  # turn 1 is as it was judged
    write_jsonl(folder / "mt_bench" / "answers.jsonl", rows)
    comparison = compared(tmp_path)
    assert scores(comparison) == [4] and comparison["mt_bench"][0]["questions"] == [81, 82]
    assert has_note(comparison, "1 of its 4 judgements", "question 81")


def test_an_answer_that_is_gone_and_answers_in_the_making(tmp_path):
    folder = make_judged(tmp_path, "a", 4)
    answer_all(folder, "a", asked={81: ASKED[81]})
    assert scores(compared(tmp_path)) == []
    (folder / "mt_bench" / "answers.jsonl").rename(folder / "mt_bench" / "answers.old.jsonl")
    comparison = compared(tmp_path)
    assert scores(comparison) == [] and has_note(comparison, "are being made again")
    (folder / "mt_bench" / "answers.old.jsonl").unlink()
    assert scores(compared(tmp_path)) == [4]  # judgements copied without answers


def test_judgements_of_another_run(tmp_path):
    folder = make_judged(tmp_path, "a", 4)
    judge_all(folder, "a", 9, model_id="b")
    comparison = compared(tmp_path)
    assert scores(comparison) == [] and has_note(comparison, "judgements.csv is of another run (b)")


def test_an_adapter_trained_again_after_its_answers(tmp_path):
    folder = make_judged(tmp_path, "a", 4)
    weights = folder / "adapter" / "adapter_model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"old")
    answer_all(folder, "a", adapter=hashlib.sha256(b"old").hexdigest())
    assert scores(compared(tmp_path)) == [4]
    weights.write_bytes(b"new")
    comparison = compared(tmp_path)
    assert scores(comparison) == [] and load(tmp_path)[0].answers == {}
    assert has_note(comparison, "answers and scores of a: its adapter was trained again")
    assert find_gap(comparison, "answers and scores")["next"] == "gen_mtbench.py, then judge.py"


def test_the_untrained_model_with_answers_of_an_adapter(tmp_path):
    answer_all(make_base(tmp_path), "base", adapter="ab" * 32)
    assert has_note(compared(tmp_path), "by an adapter, and the untrained model has none")


# ---- pairwise judgements ------------------------------------------------------------------------


def judge_pairs(folder, text, baseline_text):
    rows = []
    for number in ASKED:
        both = [[f"{t} {number}", f"{t} again"] for t in (text, baseline_text)]
        shown = {"grading": "pair", "baseline": "base", "winner": folder.name, "status": "ok"}
        for order in "12":
            own = {"model_id": folder.name, "answer_sha256": sha256(both), "order": order}
            rows.append(rating(number, 2, None, **(shown | own)))
    write_judgements(folder / "mt_bench" / "judgements.csv", rows)


def test_pairs_against_a_baseline_that_answered_again(tmp_path):
    base = answer_all(make_base(tmp_path), "base")
    folder = answer_all(make_run(tmp_path, "a", "dpo", summary={}), "a")
    judge_pairs(folder, "a", "base")
    (won,) = compared(tmp_path)["pairs"]
    assert (won["win_rate"], won["wins"]) == (1, 2)
    answer_all(base, "base, again")
    for flags in ((), ("--run_ids", '["a"]')):  # also where the baseline is not among the runs
        comparison = compared(tmp_path, *flags)
        assert comparison["pairs"] == [] and has_note(
            comparison, "pairwise", "against base", "of a"
        )
        gap = find_gap(comparison, "pairwise judgements against base")
        assert gap["next"] == "judge.py --grading pair --baseline base"


def test_a_winner_that_took_no_part_is_refused(tmp_path):
    folder = make_run(tmp_path, "a")
    row = rating(81, 1, None, grading="pair", baseline="base", order="1", status="ok")
    for winner in ("c", None):
        write_judgements(folder / "mt_bench/judgements.csv", [row | {"winner": winner}])
        with pytest.raises(UserError, match=f"winner {winner!r} is neither a, nor base, nor tie"):
            load(tmp_path)
    write_judgements(folder / "mt_bench/judgements.csv", [row | {"winner": "a", "order": "3"}])
    with pytest.raises(UserError, match="order '3', which must be 1 or 2"):
        load(tmp_path)


# ---- questions ----------------------------------------------------------------------------------


def test_a_question_edited_since_it_was_answered_is_left_out_of_all_runs(tmp_path):
    make_judged(tmp_path, "a", 4)
    make_judged(tmp_path, "b", 6, loss="td_dpo")
    edited = ASKED | {82: ["Write a novel.", "Longer."]}
    comparison = compared(tmp_path, questions=edited)
    assert comparison["mt_bench"][0]["questions"] == [81]
    assert has_note(comparison, "answers to question 82", "of all runs", "asks something else")


def test_questions_of_another_benchmark_are_not_shown_beside_the_answers(tmp_path):
    make_judged(tmp_path, "a", 4)
    other = {number: ["Other.", "Texts."] for number in ASKED}
    comparison = compared(tmp_path, questions=other)
    assert scores(comparison) == [4] and has_note(comparison, "texts of the questions", "of a:")
    assert find_gap(comparison, "texts of the questions")["next"].startswith("--mt_bench with")
    shown = browser_page.page_questions(load(tmp_path, other), data_of(other))
    assert [question["turns"] for question in shown.values()] == [None, None]
    shown = browser_page.page_questions(load(tmp_path, ASKED), data_of(ASKED))
    assert shown[81]["turns"] == ASKED[81]


@pytest.mark.parametrize("change", ["wording", "temperature"])
def test_runs_that_answered_other_questions_are_never_averaged_with_the_rest(tmp_path, change):
    make_judged(tmp_path, "a", 4)
    make_judged(tmp_path, "b", 6, seed=43)
    folder = make_judged(tmp_path, "c", 9, seed=44)
    if change == "wording":
        answer_all(folder, "c", asked=ASKED | {81: ["Write a song.", "Shorter."]})
    else:
        answer_all(folder, "c", temperature=0.0)
    for questions in (ASKED, {}):
        comparison = compared(tmp_path, questions=questions)
        row = row_of(comparison["mt_bench"][0]["cells"], "dpo β=0.1")
        assert (row["score"], row["seeds"]) == (5, [42, 43])
        assert has_note(
            comparison, "answers and scores of c", "another wording, or at another temp"
        )


def test_answers_made_in_other_ways_are_said(tmp_path):
    make_judged(tmp_path, "a", 4)
    folder = make_judged(tmp_path, "b", 6, loss="td_dpo")
    text = (folder / "mt_bench" / "answers.jsonl").read_text()
    (folder / "mt_bench" / "answers.jsonl").write_text(text.replace(": 64}", ": 1024}"))
    comparison = compared(tmp_path)
    assert has_note(comparison, "different max_new_tokens (64: a; 1024: b)")
    assert not has_note(comparison, "different batch_size")
    (folder / "mt_bench" / "answers.jsonl").write_text(
        text.replace('"category"', '"batch_size": 8, "category"')
    )
    path = tmp_path / "a" / "mt_bench" / "answers.jsonl"
    path.write_text(path.read_text().replace('"category"', '"batch_size": 32, "category"'))
    assert has_note(compared(tmp_path), "different batch_size (32: a; 8: b): in bf16")


# ---- one training -------------------------------------------------------------------------------

BEFORE = [(-9, -9, -9, -9)] * 4
AFTER = [(-8, -9, -9, -9)] * 3 + [(-10, -9, -9, -9)]  # three of four are right


def make_trained(results, **summary):
    folder = make_run(results, "a", "dpo", summary={"best_acc_ref": 0.75, **summary})
    write_pairs(folder, {0: BEFORE, 20: AFTER})
    return folder


def test_validation_pairs_of_the_run_itself(tmp_path):
    make_trained(tmp_path)
    (run,) = load(tmp_path)
    assert len(run.best_val) == 4 and run.stale == []


def test_validation_pairs_of_another_adapter(tmp_path):
    make_trained(tmp_path, best_acc_ref=0.5)
    comparison = compared(tmp_path)
    assert has_note(comparison, "val_pairs.jsonl: ranks 75.0% of the pairs", "has 50.0%")
    (run,) = load(tmp_path)
    assert (run.val, run.length_bias) == ({}, []) and find_gap(comparison, "margins")["runs"] == [
        "a"
    ]


def test_a_tie_in_float32_is_not_another_adapter(tmp_path):
    folder = make_trained(tmp_path, best_acc_ref=0.5)
    write_pairs(folder, {0: BEFORE, 20: [(-8.99999, -9, -9, -9), *AFTER[1:]]})
    assert load(tmp_path)[0].stale == []


@pytest.mark.parametrize(
    ("by_step", "why"),
    [
        ({0: BEFORE, 10: AFTER}, "no rows of the best step, 20"),
        ({0: BEFORE[:3], 20: AFTER}, "other pairs at the first step"),
        (
            {0: [(-9, -7, -9, -7)] * 4, 20: AFTER},
            "has two reference models, whose margins differ by 2 nats",
        ),
    ],
)
def test_validation_pairs_that_are_put_together(tmp_path, by_step, why):
    write_pairs(make_trained(tmp_path), by_step)
    assert has_note(compared(tmp_path), "margins", why)


@pytest.mark.parametrize(
    ("summary", "why"),
    [
        ({"best_step": 8, "best_acc_ref": 0.75}, "accuracy 0.6000 at step 8, while summary.json"),
        ({"steps": 6}, "goes on to step 8, while summary.json ends at 6"),
        ({"steps": 8, "final_acc_ref": 0.5}, "accuracy 0.6000 at step 8"),
    ],
)
def test_a_learning_curve_of_another_start(tmp_path, summary, why):
    write_curve(make_run(tmp_path, "a", "dpo", summary=summary))
    comparison = compared(tmp_path)
    assert has_note(comparison, "learning curve of a", why) and load(tmp_path)[0].steps == []
    assert find_gap(comparison, "learning curve")["runs"] == ["a"]


def test_a_summary_of_another_training_is_refused(tmp_path):
    folder = make_trained(tmp_path)
    write_curve(folder)
    write_json(folder / "summary.json", SUMMARY | {"best_acc_ref": 0.25, "steps": 4})
    with pytest.raises(UserError, match="summary.json: is of another training than the files"):
        load(tmp_path)


def test_seeds_that_differ_in_their_token_ids_are_named(tmp_path):
    for seed, key in ((42, "k1"), (43, "k2")):
        make_run(tmp_path, f"a{seed}", "dpo", seed=seed, summary={}, reference={"val": key})
    assert has_note(compared(tmp_path), "different token ids", "a42, a43", "more than their seed")
