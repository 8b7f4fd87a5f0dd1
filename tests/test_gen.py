"""gen_mtbench.py on a tiny random model: equal to plain PEFT generation, seeded, resumable, errors."""

import json
import shutil

import pytest
import torch
from conftest import write_jsonl
from peft import PeftModel
from transformers import AutoModelForCausalLM

import gen_mtbench
import train_pref
from chat import load_tokenizer, prompt_ids
from files import CATEGORIES, UserError, read_answers
from gen_mtbench import RowSampler


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Sixteen two-turn questions, two a category."""
    folder = tmp_path_factory.mktemp("bench")
    rows = [
        {
            "question_id": 81 + i,
            "category": CATEGORIES[i % 8],
            "turns": [f"Explain thing {i}." + " Why?" * i, "Shorter."],
        }
        for i in range(16)
    ]
    write_jsonl(folder / "question.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def results(tiny_model, pairs_folder, tmp_path_factory):
    """Two runs whose adapters have moved away from the base."""
    folder = tmp_path_factory.mktemp("gen") / "results"
    for loss in ("dpo", "td_dpo"):
        arguments = ("--model", tiny_model, "--data", pairs_folder, "--results_dir", folder, "--dtype", "float32",
                     "--lora_r", "4", "--global_batch", "8", "--learning_rate", "0.05", "--max_steps", "3",
                     "--run_id", loss, "--loss", loss)  # fmt: skip
        train_pref.main([str(a) for a in arguments])
    return folder


def answer(results, bench, *more):
    arguments = (results, "--mt_bench", bench, "--max_new_tokens", "12", "--dtype", "float32", *more)
    return gen_mtbench.main([str(a) for a in arguments])


def turns_of(results, run):
    rows = read_answers(results / run / "mt_bench" / "answers.jsonl")
    return {question: row["turns"] for (question, _), row in rows.items()}


def test_answers_of_every_run_and_of_the_base(results, bench, tiny_model):
    assert answer(results, bench, "--base") == 0
    answers = {run: turns_of(results, run) for run in ("base", "dpo", "td_dpo")}
    assert all(sorted(turns) == list(range(81, 97)) for turns in answers.values())
    assert answers["dpo"] != answers["base"] != answers["td_dpo"] != answers["dpo"]
    row = json.loads((results / "dpo" / "mt_bench" / "answers.jsonl").read_text().splitlines()[0])
    assert {"question_id", "answer_id", "model_id", "choices", "tstamp"} <= row.keys()  # what FastChat reads
    assert row["model_id"] == "dpo" and row["settings"]["max_new_tokens"] == 12 and len(row["adapter_sha256"]) == 64


def test_greedy_answers_equal_one_by_one_peft_generate(results, bench, tiny_model):
    answer(results, bench, "--base")
    tokenizer = load_tokenizer(str(tiny_model))
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), results / "dpo" / "adapter"
    ).eval()
    questions = [json.loads(line) for line in (bench / "question.jsonl").read_text().splitlines()]
    greedy = [q for q in questions if gen_mtbench.TEMPERATURES[q["category"]] < gen_mtbench.GREEDY_BELOW]
    assert len(greedy) == 8
    for question in greedy:
        conversation = []
        for turn in range(2):
            conversation.append({"role": "user", "content": question["turns"][turn]})
            ids = torch.tensor([prompt_ids(tokenizer, conversation)])
            output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
            text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
            assert turns_of(results, "dpo")[question["question_id"]][turn] == text
            conversation.append({"role": "assistant", "content": text})


def test_sampled_answers_do_not_depend_on_the_batch_or_on_a_restart(results, bench):
    answer(results, bench)
    path = results / "dpo" / "mt_bench" / "answers.jsonl"
    before = turns_of(results, "dpo")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]))  # as a kill after the first rows would leave it
    answer(results, bench, "--batch_size", "3")
    assert turns_of(results, "dpo") == before
    path.unlink()
    answer(results / "dpo", bench, "--seed", "7")
    other = turns_of(results, "dpo")
    path.unlink()
    rows = [json.loads(line) for line in lines]
    sampled = {row["question_id"] for row in rows if row["temperature"] > 0}
    assert all(other[q] == before[q] for q in before if q not in sampled)
    assert any(other[q] != before[q] for q in sampled)


def test_the_models_own_generation_config_is_set_aside(results, bench, tiny_model, tmp_path):
    """A repetition penalty in the model folder is not MT-Bench's protocol."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "generation_config.json").write_text('{"repetition_penalty": 5.0, "no_repeat_ngram_size": 1}')
    answer(tmp_path / "r", bench, "--base", "--model", model)
    answer(results, bench, "--base")
    assert turns_of(tmp_path / "r", "base") == turns_of(results, "base")


def test_unfinished_runs_are_left_out(results, bench, tmp_path, capsys):
    for name in ("dpo", "td_dpo"):
        shutil.copytree(results / name, tmp_path / name, ignore=shutil.ignore_patterns("mt_bench"))
    (tmp_path / "dpo" / "summary.json").unlink()
    answer(tmp_path, bench)
    assert "dpo: training has not finished" in capsys.readouterr().out
    assert not (tmp_path / "dpo" / "mt_bench").exists() and (tmp_path / "td_dpo" / "mt_bench").exists()


def test_adapter_with_missing_layers_is_refused(results, bench, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(results / "dpo", tmp_path / "dpo", ignore=shutil.ignore_patterns("mt_bench"))
    weights = load_file(tmp_path / "dpo" / "adapter" / "adapter_model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.1" not in name}
    save_file(kept, tmp_path / "dpo" / "adapter" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="does not load on this base model"):
        answer(tmp_path, bench)


def test_sampler_follows_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    sampler = RowSampler([0.7], [5])
    draws = torch.stack([sampler(None, logits).argmax() for _ in range(20000)])
    frequencies = torch.bincount(draws, minlength=4) / len(draws)
    assert torch.allclose(frequencies, (logits[0] / 0.7).softmax(0), atol=0.015)
    assert torch.equal(RowSampler([0.0], [5])(None, logits), logits)


def test_a_retrained_adapter_is_answered_anew(results, bench, capsys):
    answer(results, bench)
    path = results / "td_dpo" / "mt_bench" / "answers.jsonl"
    path.write_text("".join(line.replace('"adapter_sha256": "', '"adapter_sha256": "old') for line in
                            path.read_text().splitlines(keepends=True)))  # fmt: skip
    answer(results, bench)
    assert "older adapter" in capsys.readouterr().out
    assert len(turns_of(results, "td_dpo")) == 16 and "old" not in path.read_text().split("adapter_sha256")[1][:8]


def test_other_settings_are_refused(results, bench):
    answer(results, bench)
    with pytest.raises(UserError, match="max_new_tokens was 12, is 9"):
        answer(results, bench, "--max_new_tokens", "9")


def test_context_overflow_is_marked(results, bench, tmp_path):
    long = {"question_id": 1, "category": "math", "turns": ["word " * 2500, "again"]}
    write_jsonl(tmp_path / "question.jsonl", [long])
    run = results.parent / "overflow" / "dpo"
    run.parent.mkdir()
    run.symlink_to(results / "dpo")
    answer(results, bench)
    (run / "mt_bench" / "answers.jsonl").rename(tmp_path / "kept")
    answer(run.parent, tmp_path)
    row = json.loads((run / "mt_bench" / "answers.jsonl").read_text())
    (tmp_path / "kept").rename(run / "mt_bench" / "answers.jsonl")
    assert row["overflow"] == [True, True] and all(row["choices"][0]["turns"])


def test_num_questions_spread_over_the_categories(bench):
    questions = gen_mtbench.pick_questions(gen_mtbench.read_questions(bench / "question.jsonl"), 8)
    assert [q["question_id"] for q in questions] == list(range(81, 97, 2))


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda run: (run / "adapter" / "adapter_config.json").unlink(), "no adapter"),
        (lambda run: (run / "adapter" / "adapter_model.safetensors").write_bytes(b"torn"), "does not load"),
        (lambda run: (run / "args.json").write_text("{"), "not valid JSON"),
    ],
)
def test_broken_adapters_are_named(results, bench, tmp_path, break_it, said):
    run = tmp_path / "results" / "broken"
    shutil.copytree(results / "dpo", run, ignore=shutil.ignore_patterns("mt_bench"))
    break_it(run)
    with pytest.raises(UserError, match=said):
        answer(run.parent, bench)


def test_results_without_adapters(tmp_path, bench):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text("{}")
    with pytest.raises(UserError, match="no adapters here"):
        answer(tmp_path, bench)
    (tmp_path / "run" / "args.json").unlink()
    with pytest.raises(UserError, match="no runs here"):
        answer(tmp_path, bench)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question_id": 81, "category": "cooking", "turns": ["a", "b"]}, "unknown category 'cooking'"),
        ({"question_id": 81, "category": "math", "turns": ["a"]}, "two non-empty strings"),
        ({"question_id": "x", "category": "math", "turns": ["a", "b"]}, "whole number"),
    ],
)
def test_bad_questions_are_named_with_their_line(results, tmp_path, row, said):
    good = {"question_id": 80, "category": "math", "turns": ["a", "b"]}
    write_jsonl(tmp_path / "question.jsonl", [good, row])
    with pytest.raises(UserError, match=rf"question.jsonl:2: .*{said}"):
        answer(results, tmp_path)
