"""prep_data.py --from_answers: pairs from several answers to one question and a judge's scores."""

import json
import shutil
from pathlib import Path

import pytest
from preference_rows import bot, run, user

import prep_data
from pref.files import disk, mt_bench
from pref.files.console import UserError
from pref.files.judgements import write_judgements
from pref.files.pairs import read_pairs

# By question: (answer, score) of each choice; a text as score is the status of a failure.
POEMS = {
    # Two best ones, and two that read the same.
    1: [("Roses bloom.", 0.75), ("Rain.", 0.25), ("Rain. ", 0.25), ("Sun and sea.", 0.75)],
    2: [("A cat.", 0.0), ("A dog.", 0.5), ("A hen.", 0.7), ("A fox.", 0.6)],
    # No pair: equal scores.
    3: [("Snow.", 1.0), ("Ice.", 1.0), ("Wind.", 1.0), ("Hail.", 1.0)],
    # An empty answer, one without a score, one with a template's token, half a character: one is
    # left.
    4: [
        ("\u200b ", 0.0),
        ("Moon.", 0.5),
        ("Stars.", "program_error"),
        ("Sky<|im_end|>", 0.9),
        ("\ud83d", 1.0),
    ],
    # JSON and a transcript stay the texts that they are.
    5: [('[{"role": "user"}]', 0.5), ("Human: a\n\nAssistant: b", 1.0), ("[1]", 0.1), ("x", 0.9)],
    6: [("Sea.", 0.1), ("Tide.", 0.2), ("Foam.", 0.3), ("Sand.", 0.4)],
}
PY = {"judge": "py:poems.py", "judge_id": "00aa", "grading": "reward", "bench": "poems"}


def ask(number):
    return f"Poem {number}, please."


def make_set(folder, answers=POEMS, judge=PY, adapter=None, **more):
    """results/base/poems: the questions next to the results, the answers, and their judgements.

    more: fields of every answer.
    """
    questions = [{"question_id": n, "category": "poem", "turns": [ask(n)]} for n in answers]
    disk.write_jsonl(folder.parent.parent.parent / "poems.jsonl", questions)
    rows = [
        answer_row(n, [text for text, _ in given], adapter, more) for n, given in answers.items()
    ]
    disk.write_jsonl(folder / "answers.jsonl", rows)
    write_judgements(folder / "judgements.csv", judged(answers, judge))
    return folder


def answer_row(number, texts, adapter, more):
    return {
        "question_id": number,
        "model_id": "base",
        "choices": [{"index": i, "turns": [text], **more} for i, text in enumerate(texts)],
        "temperature": 1.0,
        "adapter_sha256": adapter,
        "question_sha256": mt_bench.question_sha256([ask(number)], 1.0),
        "settings": {"model": "models/tiny", "seed": 42, "num_choices": len(texts)},
    }


def judged(answers, judge):
    """A judgement of each answer."""
    return [
        {
            "question_id": number,
            "turn": 1,
            "choice": choice,
            "model_id": "base",
            "repeat": 0,
            "prompts": "poems",
            "status": score if isinstance(score, str) else "ok",
            "score": None if isinstance(score, str) else score,
            "answer_sha256": mt_bench.answer_sha256(1, [text]),
            **judge,
        }
        for number, given in answers.items()
        for choice, (text, score) in enumerate(given)
    ]


@pytest.fixture
def folder(tmp_path):
    return make_set(tmp_path / "results" / "base" / "poems")


def prepare(folder, *more):
    """(pairs, drop records, manifest) of the stage run in this process."""
    questions = folder.parent.parent.parent / "poems.jsonl"
    prep_data.main(["--from_answers", str(folder), "--questions", str(questions), *more])
    return written(folder / "pairs")


def written(out):
    sides = [read_pairs(out / f"{side}.jsonl") for side in ("train", "val")]
    dropped = [row for _, row in disk.read_jsonl(out / "dropped.jsonl")]
    return sides[0] + sides[1], dropped, disk.read_json(out / "manifest.json")


def said(pairs):
    """{question: {(chosen, rejected)}}, and that the prompt is the question's."""
    found = {}
    for pair in pairs:
        assert pair["prompt"] == [user(ask(pair["question_id"]))]
        texts = [pair[side][0]["content"] for side in ("chosen", "rejected")]
        assert [pair["chosen"], pair["rejected"]] == [[bot(text)] for text in texts]
        found.setdefault(pair["question_id"], set()).add(tuple(texts))
    return found


# ---- the pairs -----------------------------------------------------------------------------------

TALK = "Human: a\n\nAssistant: b"


def test_the_best_against_the_worst(folder):
    pairs, _, _ = prepare(folder)
    assert said(pairs) == {
        1: {("Roses bloom.", "Rain.")},  # the first of equal ones
        2: {("A hen.", "A cat.")},
        5: {(TALK, "[1]")},
        6: {("Sand.", "Sea.")},
    }
    scores = {pair["question_id"]: (pair["chosen_score"], pair["rejected_score"]) for pair in pairs}
    assert scores == {1: (0.75, 0.25), 2: (0.7, 0.0), 5: (1.0, 0.1), 6: (0.4, 0.1)}
    assert {pair["source"] for pair in pairs} == {"base/poems"}


def test_every_two_that_differ_enough(folder):
    pairs, _, _ = prepare(folder, "--rule", "all", "--min_margin", "0.4")
    assert said(pairs) == {
        1: {("Roses bloom.", "Rain."), ("Sun and sea.", "Rain.")},
        2: {("A hen.", "A cat."), ("A fox.", "A cat."), ("A dog.", "A cat.")},
        5: {
            (TALK, "[1]"),
            (TALK, '[{"role": "user"}]'),
            ("x", "[1]"),
            ("x", '[{"role": "user"}]'),
            ('[{"role": "user"}]', "[1]"),
        },
    }
    everything = said(prepare(folder, "--rule", "all")[0])
    # Two equal pairs of scores, and Rain once: 2; 6 each of four that differ.
    assert {number: len(found) for number, found in everything.items()} == {1: 2, 2: 6, 5: 6, 6: 6}


def test_the_least_margin_is_of_the_scores_as_they_are_written(folder):
    """0.4 - 0.1 and 0.7 - 0.6 are a little more or less than 0.3 and 0.1 in binary."""
    pairs = said(prepare(folder, "--min_margin", "0.3")[0])
    assert pairs[6] == {("Sand.", "Sea.")}
    found = said(prepare(folder, "--rule", "all", "--min_margin", "0.1")[0])
    assert len(found[2]) == 6 and len(found[6]) == 6


def test_the_best_against_one_of_the_others(folder):
    first, _, _ = prepare(folder, "--rule", "best_random", "--min_margin", "0.2")
    found = said(first)
    assert found[1] == {("Roses bloom.", "Rain.")}
    assert found[2] < {("A hen.", "A cat."), ("A hen.", "A dog.")}
    assert found[6] < {("Sand.", "Sea."), ("Sand.", "Tide.")}
    assert {number: len(pairs) for number, pairs in found.items()} == {1: 1, 2: 1, 5: 1, 6: 1}
    again, _, _ = prepare(folder, "--rule", "best_random", "--min_margin", "0.2")
    assert again == first
    drawn = [said(prepare(folder, "--rule", "best_random", "--seed", seed)[0])[6] for seed in "12"]
    assert drawn[0] != drawn[1]


def test_what_is_left_out_is_listed_and_counted(folder, capsys):
    _, dropped, manifest = prepare(folder)
    at = folder / "answers.jsonl"
    assert {(d["place"], d["reason"]) for d in dropped} == {
        (f"{at}: question 3", "tie"),
        (f"{at}: question 4", "fewer than two responses"),
        (f"{at}: question 4, choice 0", "answer: empty"),
        (f"{at}: question 4, choice 2", "answer: no score (program_error)"),
        (
            f"{at}: question 4, choice 3",
            "answer: carries a chat template already (<|im_end|>)",
        ),
        (
            f"{at}: question 4, choice 4",
            "answer: not valid Unicode (half a surrogate pair)",
        ),
    }
    assert manifest["dropped"] == 6 and sum(manifest["drops"].values()) == 6
    shown = capsys.readouterr().out
    assert "answers  25 to 6 questions: 21 usable, 20 distinct" in shown
    assert "dropped  6 of 6 questions and 25 answers" in shown
    assert f"next: python train_pref.py --data {folder / 'pairs'} --model models/tiny\n" in shown


def test_the_manifest_says_where_the_pairs_come_from(folder):
    pairs, _, manifest = prepare(folder, "--min_margin", "0.4")
    origin = manifest["from_answers"]
    assert manifest["rule"] == "best_worst" and manifest["min_margin"] == 0.4
    assert [origin[name] for name in ("run", "set", "judge", "judge_id")] == [
        *("base", "poems", "py:poems.py", "00aa"),
    ]
    assert Path(origin["results"]) == folder.parent.parent
    assert origin["adapter_sha256"] is None and origin["model"] == "models/tiny"
    assert origin["num_choices"] == 5 and origin["generation"]["temperature"] == 1.0
    assert origin["sha256"] == {
        name: disk.sha256_file(folder / name) for name in ("answers.jsonl", "judgements.csv")
    } | {"poems.jsonl": disk.sha256_file(folder.parent.parent.parent / "poems.jsonl")}
    counts = {"questions": 6, "answers": 25, "scored": 24, "usable": 21, "distinct": 20}
    counts |= {"pairs": 3, "questions_with_pairs": 3, "cut_off": 0}
    assert {name: origin[name] for name in counts} == counts and len(pairs) == 3
    # By hand: margins 0.5, 0.7, 0.9; chosen 0.75, 0.7, 1; rejected 0.25, 0, 0.1.
    scores = {"mean_margin": 0.7, "mean_chosen": 2.45 / 3, "mean_rejected": 0.35 / 3}
    assert {name: origin["scores"][name] for name in scores} == pytest.approx(scores)


def test_a_prompt_is_on_one_side_alone_and_the_same_answers_give_the_same_bytes(folder):
    more = ("--rule", "all", "--val_fraction", "0.5")
    prepare(folder, *more)
    out = folder / "pairs"
    sides = [{p["question_id"] for p in read_pairs(out / f"{s}.jsonl")} for s in ("train", "val")]
    assert not sides[0] & sides[1] and [len(side) for side in sides] == [2, 2]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    # Rows in another order, and a rerun after a kill that left no manifest.
    rows = [row for _, row in disk.read_jsonl(folder / "answers.jsonl")]
    (out / "manifest.json").unlink()
    (out / "val.jsonl").unlink()
    disk.write_jsonl(folder / "answers.jsonl", rows[::-1])
    write_judgements(folder / "judgements.csv", judged(POEMS, PY)[::-1])
    prepare(folder, *more)
    for name in ("train.jsonl", "val.jsonl", "dropped.jsonl"):
        assert (out / name).read_bytes() == before[name]


# ---- scores --------------------------------------------------------------------------------------


def test_repeats_are_averaged_and_a_failed_one_is_left_out(folder):
    answers = {1: [("a", 8), ("b", 6)], 2: [("c", 5), ("d", 3)]}
    second = {1: [("a", 2), ("b", 6)], 2: [("c", "parse"), ("d", 4)]}
    judge = {**PY, "judge": "gpt", "grading": "single"}
    make_set(folder, answers)
    rows = judged(answers, judge) + [row | {"repeat": 1} for row in judged(second, judge)]
    write_judgements(folder / "judgements.csv", rows)
    pairs, _, manifest = prepare(folder)
    assert said(pairs) == {1: {("b", "a")}, 2: {("c", "d")}}
    assert {(p["chosen_score"], p["rejected_score"]) for p in pairs} == {(6, 5), (5, 3.5)}
    assert any("fewer repeats" in note for note in manifest["notes"])


def test_scores_of_answers_that_have_been_replaced_are_left_out(folder):
    rows = judged(POEMS, PY)
    for row in rows[:3]:
        row["answer_sha256"] = mt_bench.answer_sha256(1, ["an older answer"])
    write_judgements(folder / "judgements.csv", rows)
    _, dropped, manifest = prepare(folder)
    assert manifest["drops"]["answer: no score (not judged)"] == 3
    assert "scores left out, of answers that have been replaced: 3" in manifest["notes"]
    for row in rows:
        row["answer_sha256"] = "0" * 64
    write_judgements(folder / "judgements.csv", rows)
    with pytest.raises(
        UserError, match=r"none of the 25 scores is of these answers.*--judge JUDGE"
    ):
        prepare(folder)


def test_several_judges_must_be_chosen_from(folder):
    other = PY | {"judge": "rm:models/rm", "judge_id": "00bb"}
    newer = PY | {"judge_id": "00cc", "judge_settings": '{"sha256": "1f"}'}
    opposite = {n: [(text, 0.1 * i) for i, (text, _) in enumerate(g)] for n, g in POEMS.items()}
    comparing = PY | {"judge": "gpt", "judge_id": "00dd", "grading": "pair"}
    rows = [*judged(POEMS, PY), *judged(opposite, other), *judged(POEMS, comparing)]
    write_judgements(folder / "judgements.csv", rows)
    with pytest.raises(UserError, match="scores of 2 judges") as caught:
        prepare(folder)
    for text in ("py:poems.py  judge_id 00aa", "rm:models/rm  judge_id 00bb", "25 judgements"):
        assert text in str(caught.value)
    assert said(prepare(folder, "--judge", "py:poems.py")[0])[6] == {("Sand.", "Sea.")}
    pairs, _, manifest = prepare(folder, "--judge", "rm:models/rm")
    assert said(pairs)[2] == {("A fox.", "A cat.")}
    assert manifest["from_answers"]["judge_id"] == "00bb"
    for wanted in ("gpt", "typo"):
        with pytest.raises(
            UserError, match=f"--judge {wanted}: .* no scores by that judge, but by"
        ):
            prepare(folder, "--judge", wanted)
    # The same file in two versions: by judge_id.
    write_judgements(folder / "judgements.csv", [*judged(POEMS, PY), *judged(opposite, newer)])
    with pytest.raises(UserError, match=r"scores of 2 judges[^$]*1f"):
        prepare(folder, "--judge", "py:poems.py")
    assert said(prepare(folder, "--judge", "00cc")[0])[2] == {("A fox.", "A cat.")}


def test_comparisons_are_no_scores(folder):
    write_judgements(folder / "judgements.csv", judged(POEMS, PY | {"grading": "pair"}))
    with pytest.raises(UserError, match="A comparison of two answers is no score of either"):
        prepare(folder)


def test_equal_scores_are_a_tie_however_often_an_answer_came(folder):
    """The sum of three 0.1 by 3 is above 0.1 in binary, and that of three 0.7 below 0.7."""
    answers = {n: [("a", x), ("b", x), ("b", x), ("b ", x)] for n, x in ((1, 0.1), (2, 0.7))}
    pairs, _, manifest = prepare(make_set(folder, answers | {3: POEMS[1], 4: POEMS[2]}))
    assert said(pairs).keys() == {3, 4} and manifest["drops"] == {"tie": 2}


# ---- answers -------------------------------------------------------------------------------------


def test_an_answer_that_reads_as_a_missing_value_leaves_the_others(folder):
    answers = {n: [("None", 1.0), ("b", 0.5), ("c", 0.0)] for n in (1, 2)}
    pairs, dropped, _ = prepare(make_set(folder, answers))
    assert said(pairs) == {1: {("b", "c")}, 2: {("b", "c")}}
    assert {d["reason"] for d in dropped} == {"answer: a missing value written as text"}


def test_answers_cut_off_are_kept_and_counted(folder, capsys):
    rows = [row for _, row in disk.read_jsonl(folder / "answers.jsonl")]
    rows[0]["choices"][0]["truncated"] = [True]  # the best of question 1
    rows[0]["choices"][3]["truncated"] = [True]
    rows[1]["choices"][0]["truncated"] = [True]  # the worst of question 2
    rows[1]["choices"][1]["overflow"] = [True]
    disk.write_jsonl(folder / "answers.jsonl", rows)
    _, dropped, manifest = prepare(folder)
    assert manifest["from_answers"]["cut_off"] == 3
    assert manifest["from_answers"]["cut_off_in_pairs"] == {"chosen": 1, "rejected": 1}
    assert "cut off  3 answers" in capsys.readouterr().out
    reasons = {d["place"].rpartition(": ")[2]: d["reason"] for d in dropped}
    overflow = "answer: the prompt was cut off to fit the context"
    assert reasons["question 2, choice 1"] == overflow


def test_incomplete_sets_say_so(folder):
    questions = folder.parent.parent.parent / "poems.jsonl"
    rows = [row for _, row in disk.read_jsonl(questions)]
    disk.write_jsonl(questions, [*rows, {"question_id": 7, "category": None, "turns": ["More."]}])
    answers = [row for _, row in disk.read_jsonl(folder / "answers.jsonl")]
    answers[1]["choices"].pop()
    disk.write_jsonl(folder / "answers.jsonl", answers)
    notes = prepare(folder)[2]["notes"]
    assert "questions without answers: 1 (first: 7)" in notes
    assert "questions with fewer than 5 answers: 5 (first: 1)" in notes


def test_numbers_written_as_text(folder):
    """As other programs write them."""
    rows = [row for _, row in disk.read_jsonl(folder / "answers.jsonl")]
    for row in rows:
        row["question_id"] = str(row["question_id"])
        row["choices"] = [one | {"index": str(one["index"])} for one in row["choices"]]
    disk.write_jsonl(folder / "answers.jsonl", rows)
    assert len(said(prepare(folder)[0])) == 4


def test_both_answers_may_repeat_the_prompt(folder):
    """They are the model's own: nothing is cut off what was scored."""
    answers = {n: [(f"{ask(n)} Yes.", 1.0), (f"{ask(n)} No.", 0.0)] for n in (1, 2)}
    pairs, _, _ = prepare(make_set(folder, answers))
    assert said(pairs)[1] == {(f"{ask(1)} Yes.", f"{ask(1)} No.")}


def test_an_adapters_answers(folder, capsys):
    weights = folder.parent / "adapter" / "adapter_model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    run_folder = folder.parent.rename(folder.parent.with_name("dpo_b0.1_s1"))
    folder = make_set(
        run_folder / "poems", adapter=disk.sha256_file(run_folder / "adapter" / weights.name)
    )
    _, _, manifest = prepare(folder)
    assert manifest["from_answers"]["run"] == "dpo_b0.1_s1"
    assert manifest["from_answers"]["adapter_sha256"] == disk.sha256_file(
        run_folder / "adapter" / weights.name
    )
    assert f"--model models/tiny --init_adapter {run_folder}\n" in capsys.readouterr().out
    (run_folder / "adapter" / weights.name).write_bytes(b"trained again")
    with pytest.raises(UserError, match="from an older adapter"):
        prepare(folder)


# ---- where things are ----------------------------------------------------------------------------


def test_the_questions_are_found_in_the_tasks_folder(tmp_path, monkeypatch):
    folder = make_set(tmp_path / "results" / "base" / "poems_train")
    data = tmp_path / "data" / "poems"
    data.mkdir(parents=True)
    shutil.move(tmp_path / "poems.jsonl", data / "train_questions.jsonl")
    manifest = {"bench": "poems", "questions": "test_questions.jsonl"}
    disk.write_json(data / "manifest.json", manifest | {"train_questions": "train_questions.jsonl"})
    monkeypatch.chdir(tmp_path)
    prep_data.main(["--from_answers", "results/base/poems_train"])
    assert len(said(written(folder / "pairs")[0])) == 4
    # A set that is a benchmark of its own, and one that is neither.
    shutil.move(data, tmp_path / "data" / "poems_train")
    manifest |= {"bench": "poems_train", "questions": "train_questions.jsonl"}
    disk.write_json(tmp_path / "data" / "poems_train" / "manifest.json", manifest)
    prep_data.main(["--from_answers", "results/base/poems_train"])
    shutil.rmtree(folder / "pairs")
    folder.rename(folder.with_name("rhymes"))
    with pytest.raises(UserError, match=r"data/rhymes: no such folder.*--questions FILE"):
        prep_data.main(["--from_answers", "results/base/rhymes"])


def test_other_questions_than_those_answered(folder):
    path = folder.parent.parent.parent / "poems.jsonl"
    rows = [row for _, row in disk.read_jsonl(path)]
    rows[2]["turns"] = ["Prose, please."]
    disk.write_jsonl(path, rows)
    with pytest.raises(UserError, match=r"question 3 is not the one in .*poems\.jsonl"):
        prepare(folder)
    disk.write_jsonl(path, rows[:2])
    with pytest.raises(UserError, match=r"question 3 is not the one in .*poems\.jsonl"):
        prepare(folder)


def test_other_data_are_not_overwritten(folder):
    other = folder.parent.parent.parent / "data" / "poems"
    disk.write_json(other / "manifest.json", {"bench": "poems", "questions": "q.jsonl"})
    with pytest.raises(UserError, match=r"holds other data \(poems\); give another --out"):
        prepare(folder, "--out", str(other))
    assert disk.read_json(other / "manifest.json")["bench"] == "poems"
    prepare(folder)
    second = make_set(folder.with_name("verses"))
    with pytest.raises(UserError, match=r"holds other data \(.*poems\); give another --out"):
        prepare(second, "--out", str(folder / "pairs"))
    with pytest.raises(UserError, match="has a run's own files"):
        prepare(folder, "--out", str(folder))


def test_one_answer_to_each_question(folder):
    make_set(folder, {n: given[:1] for n, given in POEMS.items()})
    with pytest.raises(UserError, match="one answer to each question.*--num_choices 4"):
        prepare(folder)


def test_answers_of_two_turns(folder):
    rows = [row for _, row in disk.read_jsonl(folder / "answers.jsonl")]
    rows[3]["choices"][1]["turns"].append("And more.")
    disk.write_jsonl(folder / "answers.jsonl", rows)
    with pytest.raises(UserError, match="question 4 has 2 turns"):
        prepare(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: shutil.rmtree(f), r"poems: no such folder; give RESULTS/RUN/SET"),
        (
            lambda f: (f / "judgements.csv").unlink(),
            "nobody has scored.*--bench poems --judge JUDGE",
        ),
        (
            lambda f: (f / "answers.jsonl").rename(f / "turns.0.jsonl"),
            "no question is answered to the end yet",
        ),
        (lambda f: write_judgements(f / "judgements.csv", []), "no scores"),
        (lambda f: (f / "answers.jsonl").write_text(""), "no answers; delete the file"),
    ],
)
def test_what_is_missing_is_named(folder, change, message):
    change(folder)
    with pytest.raises(UserError, match=message):
        prepare(folder)
    assert not (folder / "pairs").exists()


def test_a_run_instead_of_one_of_its_sets(folder):
    with pytest.raises(UserError, match=r"no such file; give one of .*base/poems"):
        prep_data.main(["--from_answers", str(folder.parent)])


def test_arguments_that_do_not_belong_together(folder):
    with pytest.raises(UserError, match="--split, --strip_template: not with --from_answers"):
        prepare(folder, "--split", "train=a", "--strip_template")
    with pytest.raises(UserError, match="--judge: only with --from_answers"):
        prep_data.main(["--dataset", str(folder / "answers.jsonl"), "--judge", "x"])
    with pytest.raises(UserError, match=r"no pairs left for train[^$]*Give a lower one, or sample"):
        prepare(folder, "--min_margin", "5")


def test_the_command(folder):
    """No traceback for a user's mistake; nothing of the toolkit but the files is needed."""
    code, out, err = run("--from_answers", folder, "--questions", "nowhere.jsonl")
    assert code == 2 and err.startswith("error: nowhere.jsonl: ") and "Traceback" not in err
    assert not out and json.loads((folder / "answers.jsonl").read_text().splitlines()[0])
