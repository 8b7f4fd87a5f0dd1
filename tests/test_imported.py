"""Import of lm-evaluation-harness results. The files are made here in the form that lm_eval 0.4.13
writes (tried with its own, of a tiny model with and without an adapter).
"""

import hashlib
import json
from pathlib import Path

import pytest

from pref.analysis import imported, lm_eval_files
from pref.analysis.lm_eval_files import Metric
from pref.files.console import UserError

BASE, DPO = (
    {"model": "models/Qwen2.5-7B", "loss": None},
    {"model": "models/Qwen2.5-7B", "loss": "dpo"},
)
RUN = "dpo_b0.1_s42"
TIME = "2026-11-20T10-00-00.000001"


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sample(task: str, number: int, used: str = "none", template: str = "", **metrics) -> dict:
    text = f"{task} {number}"
    return {
        "doc_id": number,
        "doc": {"question": text},
        "filter": used,
        "metrics": list(metrics),
        "doc_hash": sha(text),
        "prompt_hash": sha(template + text),
        **metrics,
    }


def mean(values) -> float:
    return sum(values) / len(values)


def evaluate(run: Path, tasks: dict, time: str = TIME, model_args=None, **changes) -> Path:
    """Write the files of one evaluation. tasks: name -> samples. changes: keys of the results."""
    folder = run / "lm_eval" / "some__model"
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, rows in tasks.items():
        results[name] = {"alias": name, "sample_len": len(rows)}
        for row in rows:
            for metric in row["metrics"]:
                values = [r[metric] for r in rows if r["filter"] == row["filter"]]
                plain = all(isinstance(value, bool | int | float) for value in values)
                results[name][f"{metric},{row['filter']}"] = mean(values) if plain else 0.25
                results[name][f"{metric}_stderr,{row['filter']}"] = "N/A"
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"samples_{name}_{time}.jsonl").write_text(lines)
    numbers = {name: len({row["doc_id"] for row in rows}) for name, rows in tasks.items()}
    adapter = {"peft": f"results/{run.name}/adapter"} if run.name != "base" else {}
    content = {
        "results": results,
        "group_subtasks": {},
        "versions": dict.fromkeys(tasks, 3.0),
        "n-shot": dict.fromkeys(tasks, 5),
        "n-samples": {name: {"original": n, "effective": n} for name, n in numbers.items()},
        "config": {
            "model": "hf",
            "model_args": model_args or {"pretrained": "Qwen2.5-7B"} | adapter,
        },
        "chat_template_sha": "c0ffee",
    } | changes
    path = folder / f"results_{time}.json"
    path.write_text(json.dumps(content))
    return path


def gsm8k(right: list[bool], **options) -> list[dict]:
    rows = [
        sample("gsm8k", i, "strict-match", exact_match=float(r), **options)
        for i, r in enumerate(right)
    ]
    return rows + [
        sample("gsm8k", i, "flexible-extract", exact_match=1.0, **options)
        for i in range(len(right))
    ]


def ifeval(right: list[bool]) -> list[dict]:
    return [
        sample(
            *("ifeval", i),
            inst_level_strict_acc=[r, True],
            prompt_level_loose_acc=True,
            prompt_level_strict_acc=r,
        )
        for i, r in enumerate(right)
    ]


def test_values_by_question_of_base_and_adapter(tmp_path):
    base, run = tmp_path / "base", tmp_path / RUN
    evaluate(base, {"gsm8k": gsm8k([True, False, True]), "ifeval": ifeval([True, True, False])})
    evaluate(
        *(run, {"gsm8k": gsm8k([False, False, True]), "ifeval": ifeval([True, False, False])}),
        model_args=f"pretrained=/m/Qwen2.5-7B,peft=/elsewhere/results/{RUN}/adapter,dtype=bfloat16",
    )
    found = {
        "base": lm_eval_files.read_run(base, "base", BASE),
        RUN: lm_eval_files.read_run(run, RUN, DPO),
    }
    tasks, notes = imported.compare(found)
    math, following = tasks
    assert math.title == "gsm8k (exact_match, strict-match, 5-shot)" and math.partial == ""
    assert math.values == {
        "base": {0: {0: 100}, 1: {0: 0}, 2: {0: 100}},
        RUN: {0: {0: 0}, 1: {0: 0}, 2: {0: 100}},
    }
    assert math.others["exact_match, flexible-extract"][RUN] == {i: {0: 100} for i in range(3)}
    assert following.title == "ifeval (prompt_level_strict_acc, 5-shot)"
    assert [row[0] for row in following.values[RUN].values()] == [100, 0, 0]
    assert list(following.others) == ["prompt_level_loose_acc"]
    assert notes == ["ifeval: left out: inst_level_strict_acc (values that are no numbers)"]
    nothing = lm_eval_files.read_run(tmp_path / "none", "none", DPO)
    assert (
        nothing.tasks == {}
        and nothing.notes == []
        and imported.compare({"none": nothing}) == ([], [])
    )


def test_which_metric_counts_and_which_cannot(tmp_path):
    rows = [
        sample("arc", i, acc=float(i), acc_norm=1.0 - i, brier=0.3, perplexity=7.0, f1=0.5)
        for i in (0, 1)
    ]
    better = {"arc": {"acc": True, "brier": False}}
    path = evaluate(tmp_path / RUN, {"arc": rows}, higher_is_better=better)
    content = json.loads(path.read_text())
    content["results"]["arc"]["f1,none"] = 0.7  # of the whole corpus, not a mean
    path.write_text(json.dumps(content))
    found = lm_eval_files.read_run(tmp_path / RUN, RUN, DPO)
    assert list(found.tasks["arc"].values) == [Metric("acc_norm", "none"), Metric("acc", "none")]
    (note,) = found.notes
    assert "brier (less is better), perplexity (values that are not from 0 to 1)" in note
    assert "f1 (lm_eval's 0.7 is not the mean of its values)" in note


def test_the_newest_evaluation_counts(tmp_path):
    run = tmp_path / RUN
    evaluate(run, {"gsm8k": gsm8k([True, True]), "ifeval": ifeval([True])}, "2026-11-21T08-00-00.5")
    evaluate(run, {"gsm8k": gsm8k([False, False])}, "2026-11-22T08-00-00.000001")
    evaluate(run, {"gsm8k": gsm8k([True, False])}, "2026-11-19T08-00-00.000001")
    found = lm_eval_files.read_run(run, RUN, DPO)
    assert found.tasks["gsm8k"].values[Metric("exact_match", "strict-match")] == {0: 0, 1: 0}
    assert set(found.tasks) == {"gsm8k", "ifeval"}
    assert (
        f"{RUN}: gsm8k: of several evaluations results_2026-11-22T08-00-00.000001.json counts"
        in (found.notes)
    )
    (run / "lm_eval" / "some__model" / "samples_gsm8k_2026-11-22T08-00-00.000001.jsonl").unlink()
    found = lm_eval_files.read_run(run, RUN, DPO)
    assert "gsm8k" not in found.tasks and "evaluate again with --log_samples" in found.notes[-1]


def test_questions_that_all_runs_have_are_compared(tmp_path):
    base, run = tmp_path / "base", tmp_path / RUN
    evaluate(base, {"gsm8k": gsm8k([True] * 4)})
    samples = {"gsm8k": {"original": 4, "effective": 2}}
    evaluate(run, {"gsm8k": gsm8k([True, False])}, **{"n-samples": samples})
    found = {
        "base": lm_eval_files.read_run(base, "base", BASE),
        RUN: lm_eval_files.read_run(run, RUN, DPO),
    }
    ((task,), notes) = imported.compare(found)
    assert task.partial == "2 of 4 questions (--limit)" and notes == []
    assert len(task.values["base"]) == 4 and len(task.values[RUN]) == 2


def test_runs_that_were_asked_otherwise_are_left_out(tmp_path):
    runs = {name: {"gsm8k": gsm8k([True, False])} for name in ("a", "b", "c", "d")}
    runs["c"] = {"gsm8k": gsm8k([True, False], template="Think first. ")}
    changes = {"d": {"n-shot": {"gsm8k": 0}, "chat_template_sha": None}}
    found = {}
    for name, tasks in runs.items():
        evaluate(tmp_path / name, tasks, **changes.get(name, {}))
        found[name] = lm_eval_files.read_run(tmp_path / name, name, DPO)
    ((task,), notes) = imported.compare(found)
    assert set(task.values) == {"a", "b"}
    other_settings, other_prompts = notes
    assert other_settings == (
        "d: gsm8k is not compared (number of examples in the prompt none instead of 5; "
        "chat template none instead of c0ffee); evaluate it like the other runs"
    )
    assert "c: gsm8k is not compared (2 of 2 questions were other ones or asked" in other_prompts


def test_a_group_is_one_task_of_all_its_questions(tmp_path):
    tasks = {
        "mmlu_law": [sample("law", i, acc=1.0) for i in range(3)],
        "mmlu_art": [sample("art", 0, acc=0.0)],
        "solo": [sample("solo", 0, acc=1.0)],
    }
    path = evaluate(tmp_path / RUN, tasks)
    content = json.loads(path.read_text())
    content["group_subtasks"] = {
        "mmlu": ["mmlu_social", "mmlu_art"],
        "mmlu_social": ["mmlu_law"],
        "solo": [],
    }
    content["results"]["mmlu"] = {"alias": "mmlu", "acc,none": 0.75}
    content["results"]["mmlu_social"] = {"alias": "social", "acc,none": 1.0}
    path.write_text(json.dumps(content))
    found = lm_eval_files.read_run(tmp_path / RUN, RUN, DPO)
    assert set(found.tasks) == {"mmlu", "solo"} and found.notes == []
    assert found.tasks["mmlu"].values[Metric("acc", "none")] == {
        **{("mmlu_law", i): 100 for i in range(3)},
        ("mmlu_art", 0): 0,
    }
    assert found.tasks["mmlu"].n_questions == 4
    content["results"]["mmlu"]["acc,none"] = 0.5  # the mean over tasks
    path.write_text(json.dumps(content))
    (note,) = lm_eval_files.read_run(tmp_path / RUN, RUN, DPO).notes
    assert (
        "75.00 is the mean over questions, which counts; lm_eval's 50.00 is one over tasks" in note
    )
    # A task that was evaluated again later is no part of the group.
    evaluate(tmp_path / RUN, {"mmlu_art": tasks["mmlu_art"]}, "2026-11-23T00-00-00")
    found = lm_eval_files.read_run(tmp_path / RUN, RUN, DPO)
    assert set(found.tasks) == {"mmlu_law", "mmlu_art", "solo"}


@pytest.mark.parametrize(
    ("args", "run_id", "model_args", "message"),
    [
        (BASE, "base", "pretrained=Qwen2.5-7B,peft=results/x/adapter", "untrained model"),
        (DPO, RUN, "pretrained=Qwen2.5-7B", "is of the untrained model"),
        (
            DPO,
            RUN,
            {"pretrained": "Qwen2.5-7B", "peft": "results/simpo_s1/adapter"},
            "another adapter",
        ),
    ],
)
def test_results_of_another_model_are_refused(tmp_path, args, run_id, model_args, message):
    path = evaluate(tmp_path / run_id, {"gsm8k": gsm8k([True])}, model_args=model_args)
    with pytest.raises(UserError, match=message) as error:
        lm_eval_files.read_run(tmp_path / run_id, run_id, args)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("args", "run_id", "model_args", "certain"),
    [
        (DPO, RUN, f"pretrained=/merged/{RUN}", True),
        (DPO, RUN, f"model={RUN},base_url=http://localhost:8000/v1/completions", True),
        (DPO, RUN, "pretrained=/scratch/merged", False),
        (BASE, "base", "pretrained=/elsewhere/Qwen2.5-7B", True),
        (BASE, "base", "pretrained=another-model", False),
    ],
)
def test_whether_results_name_their_run(tmp_path, args, run_id, model_args, certain):
    evaluate(tmp_path / run_id, {"gsm8k": gsm8k([True])}, model_args=model_args)
    notes = lm_eval_files.read_run(tmp_path / run_id, run_id, args).notes
    assert (notes == []) == certain
    assert certain or "does not say that it is of this run" in notes[0]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("results", "{", "not valid JSON"),
        ("results", "[]", "expected a JSON object"),
        ("results", "{}", "no 'results'"),
        ("results", '{"results": {"gsm8k": 3}, "config": {}}', "'gsm8k' are no object"),
        ("samples", "{", ":1: not valid JSON"),
        ("samples", '{"filter": "none"}\n', ":1: no doc_id"),
        ("samples", '{"doc_id": 0}\n', ":1: does not say to which of the filters strict-match"),
        ("samples", '{"doc_id": 0, "filter": ["none"]}\n', ":1: does not say to which"),
        ("samples", '{"doc_id": 0, "filter": "a"}\n' * 2, ":2: doc_id 0 appears twice"),
        ("samples", "", "has 0 questions, but results_2026"),
    ],
)
def test_bad_files_are_named(tmp_path, file, content, message):
    path = evaluate(tmp_path / RUN, {"gsm8k": gsm8k([True, False])})
    if file == "samples":
        path = path.with_name(f"samples_gsm8k_{TIME}.jsonl")
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        lm_eval_files.read_run(tmp_path / RUN, RUN, DPO)
    assert str(error.value).startswith(str(path))
