"""results_folder.py: what is read of a run, and the errors of files that cannot be read."""

import math

import pytest
from studies import (
    SUMMARY,
    compared,
    flat_ratings,
    has_note,
    load,
    make_base,
    make_run,
    rating,
    spoil,
    write_pairs,
)

from pref.analysis import results_folder
from pref.files.console import UserError
from pref.files.disk import write_json, write_jsonl
from pref.files.judgements import read_judgements


def test_resumed_run_counts_a_step_once(tmp_path):
    records = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}, {"step": 2, "loss": 3.0}]
    write_jsonl(tmp_path / "metrics.jsonl", records)
    steps, evals = results_folder.read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in steps] == [(1, 5.0), (2, 3.0)] and evals == []


def test_a_run_is_read_into_fields(tmp_path):
    folder = make_run(
        tmp_path, "a", beta=0.5, tau=2, seed=43, summary={"best_acc_ref": 1}, layers=["q", "v"]
    )
    write_pairs(folder, {0: [(-8, -9, -8, -9)], 20: [(-7, -9, -8, -9)]})
    make_base(tmp_path)
    base, run = load(tmp_path)
    assert (base.loss, base.untrained, base.status, base.best_val) == (
        "base",
        True,
        "untrained",
        {},
    )
    assert (run.beta, run.tau, run.seed, run.best_step) == (0.5, 2, 43, 20)
    assert run.settings == {"learning_rate": 1e-5, "layers": '["q", "v"]'}
    assert run.best_val["p0"] == (1, 2)  # rho, delta


def test_a_line_that_is_being_written_does_not_count_yet(tmp_path):
    folder = make_run(tmp_path, "a")
    spoil(folder, "metrics.jsonl", '{"step": 1, "loss": NaN}\n{"step": 2, "lo')
    (run,) = load(tmp_path)
    assert run.status == "unfinished" and run.steps == [{"step": 1, "loss": None}]
    write_json(folder / "summary.json", SUMMARY)  # an ended run writes nothing any more
    with pytest.raises(UserError, match="metrics.jsonl:2: not valid JSON"):
        load(tmp_path)


def test_trial_runs_alone_are_analysed(tmp_path):
    make_run(tmp_path, "quick", mode="trial", summary={})
    assert [run.run_id for run in load(tmp_path)] == ["quick"]


def test_an_option_of_a_later_version_that_is_off_makes_no_other_cell():
    """Runs of before it have no such key."""
    is_setting = results_folder.is_setting
    assert not is_setting("append_eos", False, {}) and is_setting("append_eos", True, {})
    counted = {"dropped_pairs": {"a reason": 3}, "template_date": "2024-07-26"}
    assert not any(is_setting(key, value, {}) for key, value in counted.items())


# ---- what is refused ----------------------------------------------------------------------------


def test_empty_results_folder(tmp_path):
    with pytest.raises(UserError, match="no runs here"):
        load(tmp_path)


def test_other_model_or_data_is_refused_with_the_groups(tmp_path):
    make_base(tmp_path)
    make_run(tmp_path, "a", "dpo")
    make_run(tmp_path, "b", "dpo", data_sha256={"train": "zz", "val": "b2"})
    make_run(tmp_path, "c", "dpo", model="mistral")
    with pytest.raises(UserError) as error:
        load(tmp_path)
    for part in ("3 groups", '["a", "base"]', '["c"]'):
        assert part in str(error.value)
    chosen = compared(tmp_path, "--run_ids", '["a", "base"]')
    assert [run["run_id"] for run in chosen["runs"]] == ["base", "a"]


def test_a_model_is_known_by_its_files_not_by_their_place(tmp_path):
    """Base and old runs, which have no hash, belong to the model at their path."""
    make_base(tmp_path, model="here")
    make_run(tmp_path, "old", "dpo", model="here")
    make_run(tmp_path, "a", "dpo", model="here", model_sha256="1" * 64)
    make_run(tmp_path, "moved", "dpo", model="there", model_sha256="1" * 64)
    assert len(load(tmp_path)) == 4
    make_run(tmp_path, "replaced", "dpo", model="there", model_sha256="2" * 64)
    with pytest.raises(UserError, match=r'2 groups(.|\n)*\["replaced"\]'):
        load(tmp_path)


def test_duplicate_judgement_is_refused(tmp_path):
    make_run(tmp_path, "a", ratings=[rating(81, 1, 6), rating(81, 1, 7)])
    message = "judgements.csv: question 81, turn 1, choice 0, repeat 0 is judged twice"
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_judgement_of_turn_3_is_refused(tmp_path):
    make_run(tmp_path, "a", ratings=[rating(81, 3, 6)])
    with pytest.raises(UserError, match="turn 1 or 2"):
        load(tmp_path)


def test_nan_and_out_of_range_scores_are_refused(tmp_path):
    for score in (math.nan, 11.0, math.inf):
        make_run(tmp_path, "a", ratings=[rating(81, 1, None, status="ok") | {"score": score}])
        with pytest.raises(UserError, match="is not a rating from 1 to 10"):
            load(tmp_path)


def test_a_pair_that_appears_twice_is_refused(tmp_path):
    folder = make_run(tmp_path, "a")
    write_pairs(folder, {0: [(-1, -1, -1, -1)]})
    path = folder / "val_pairs.jsonl"
    path.write_text(path.read_text() * 2)
    with pytest.raises(UserError, match="val_pairs.jsonl:2: pair p0 appears twice at step 0"):
        load(tmp_path)


TORN_METRICS = '{"step": 1, "loss": 1}\n{"step": 2, "lo\n'
PAIR_WITHOUT_STEP = (
    '{"id": "p", "step": null, "policy_chosen": 1, "policy_rejected": 1, "ref_chosen": 1, '
    '"ref_rejected": 1}'
)
LIST_FOR_A_HASH = (
    '{"question_id": 81, "choices": [{"index": 0, "turns": ["a", "b"]}], "adapter_sha256": ["x"]}\n'
)
BAD_ACCURACY = '{"status": "finished", "best_acc_ref": "high"}'
PERCENT = '{"status": "finished", "best_acc_ref": 61.5}'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", TORN_METRICS, r"metrics.jsonl:2: not valid JSON"),
        ("metrics.jsonl", '{"step": 1, "loss": "x"}\n', r":1: 'loss' must be a number or null"),
        ("metrics.jsonl", '{"loss": 1}\n', r"metrics.jsonl:1: no 'step'"),
        ("val_pairs.jsonl", '\n{"id": "p", "step": 0}\n', r"val_pairs.jsonl:2: no policy_chosen"),
        ("val_pairs.jsonl", PAIR_WITHOUT_STEP, r"val_pairs.jsonl:1: no 'step'"),
        ("summary.json", "{}", r"summary.json: no 'status'"),
        ("summary.json", BAD_ACCURACY, r"summary.json: 'best_acc_ref' must be"),
        ("summary.json", PERCENT, r"summary.json: 'best_acc_ref' 61.5 is no share of pairs"),
        ("summary.json", '{"status": "finished", "steps": 1.5}', r"'steps' 1.5 is no number of st"),
        ("summary.json", '{"status": "finished", "steps": -1}', r"'steps' -1 is no number of st"),
        ("summary.json", f'{{"status": "a", "steps": 1{"0" * 400}}}', r"'steps' must be a number"),
        ("summary.json", f'{{"status": "a", "steps": 1{"0" * 5000}}}', r"summary.json: not valid"),
        ("summary.json", "[" * 100_000, r"summary.json: not valid JSON"),
        ("metrics.jsonl", "[" * 100_000 + "\n", r"metrics.jsonl:1: not usable JSON"),
        ("args.json", '{"model": "m", "mode": "full"}', r"args.json: 'loss' must be text"),
        ("args.json", '{"loss": "dpo", "model": "m", "mode": "full", "beta": NaN}', "'beta' must"),
        ("mt_bench/answers.jsonl", LIST_FOR_A_HASH, r"'adapter_sha256' must be text"),
        ("summary.json", "[]", r"summary.json: expected a JSON object, found list"),
        ("args.json", '{"loss": "dpo", "model": "m", "mode": "quick"}', r"args.json: mode 'quick'"),
        ("args.json", '{"loss": "dpo", "mode": "full"}', r"args.json: 'model' must be text"),
        ("mt_bench/judgements.csv", "a,b\n1,2\n", r"judgements.csv: missing columns"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path, name, text, message):
    spoil(make_run(tmp_path, "a"), name, text)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


# ---- --skip_bad ---------------------------------------------------------------------------------

LEAVING_ARGS = '{"run_id": "../out", "loss": "dpo", "model": "m", "mode": "full"}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", TORN_METRICS, "metrics.jsonl:2: not valid JSON"),
        ("mt_bench/judgements.csv", "question_id,turn\n81,1\n", "judgements.csv: missing columns"),
        ("mt_bench/judgements.csv", b"question_id\xff\n", "judgements.csv: not a UTF-8 CSV file"),
        ("mt_bench/answers.jsonl", b'{"question_id": 81, "choices": "\xe9"}', ":1: not UTF-8"),
        ("mt_bench/answers.jsonl", '{"question_id": 81}', "answers.jsonl:1: not an answer row"),
        ("args.json", LEAVING_ARGS, "run id '../out'"),
        ("summary.json", "", "summary.json: not valid JSON"),
    ],
)
def test_bad_files_are_named_and_the_rest_is_analysed_with_skip_bad(
    tmp_path, name, content, message
):
    make_run(tmp_path, "good", summary={}, ratings=flat_ratings(6))
    spoil(make_run(tmp_path, "bad", seed=43), name, content)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value) and "--skip_bad" in str(error.value)
    comparison = compared(tmp_path, "--skip_bad")
    assert [run["run_id"] for run in comparison["runs"]] == ["good"]
    assert has_note(comparison, "left out, cannot be read", message)


def test_several_bad_runs_are_all_named(tmp_path):
    for name in ("a", "b"):
        spoil(make_run(tmp_path, name), "summary.json", "{")
    with pytest.raises(UserError, match="a/summary.json.*\n.*b/summary.json"):
        load(tmp_path)
    with pytest.raises(UserError, match="summary.json"):
        compared(tmp_path, "--skip_bad")  # nothing is left


def test_a_folder_whose_name_is_no_run_id(tmp_path):
    make_run(tmp_path, "good", summary={})
    make_run(tmp_path, "bad name", seed=43)
    with pytest.raises(UserError, match="run id 'bad name'"):
        load(tmp_path)
    assert len(compared(tmp_path, "--skip_bad")["runs"]) == 1
    with pytest.raises(UserError, match="run id '../good'"):
        compared(tmp_path, "--run_ids", '["../good"]')


def test_chosen_runs_and_the_folder_itself(tmp_path):
    make_run(tmp_path, "a")
    with pytest.raises(UserError, match="--run_ids: no x in .*; there are a"):
        compared(tmp_path, "--run_ids", '["x", "a"]')
    with pytest.raises(UserError, match="is one run"):
        load(tmp_path / "a")


def test_judgements_that_a_spreadsheet_saved_again(tmp_path):
    path = make_run(tmp_path, "a", ratings=flat_ratings(5)) / "mt_bench" / "judgements.csv"
    before = read_judgements(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark
    assert read_judgements(path) == before
