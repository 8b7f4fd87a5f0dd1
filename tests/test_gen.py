"""gen_mtbench.py on a tiny random model: equal to plain PEFT generation, seeded, resumable,
errors.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, run_script, write_jsonl
from doubles import completion, load_fastchat
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import gen_mtbench
import train_pref
from pref.answering.generation import GREEDY_BELOW, Engine, Request
from pref.answering.turns import Store
from pref.files import mt_bench
from pref.files.console import UserError
from pref.files.mt_bench import CATEGORIES, read_answers
from pref.model.chat import load_tokenizer, prompt_ids


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
        arguments = (
            "--model",
            tiny_model,
            "--data",
            pairs_folder,
            "--results_dir",
            folder,
            "--dtype",
            "float32",
            "--lora_r",
            "4",
            "--global_batch",
            "8",
            "--learning_rate",
            "0.05",
            "--max_steps",
            "3",
            "--run_id",
            loss,
            "--loss",
            loss,
        )
        train_pref.main([str(a) for a in arguments])
    return folder


def answer(results, bench, *more):
    arguments = (
        results,
        "--mt_bench",
        bench,
        "--max_new_tokens",
        "12",
        "--dtype",
        "float32",
        *more,
    )
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
    assert {
        "question_id",
        "answer_id",
        "model_id",
        "choices",
        "tstamp",
    } <= row.keys()  # what FastChat reads
    assert (
        row["model_id"] == "dpo"
        and row["settings"]["max_new_tokens"] == 12
        and len(row["adapter_sha256"]) == 64
    )


def plain_generate(model, ids: list[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy tokens by transformers' `generate`, and at each the distance of the two best
    logits.
    """
    given = torch.tensor([ids])
    output = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = [step[0].float().topk(2).values for step in output.logits]
    return output.sequences[0, len(ids) :].tolist(), [(pair[0] - pair[1]).item() for pair in best]


@pytest.mark.parametrize("run", ["dpo", "td_dpo"])
def test_greedy_answers_equal_one_by_one_peft_generate(results, bench, tiny_model, tmp_path, run):
    """Sixteen questions, both turns, two adapters and the base in one batch. A difference is
    allowed where the two best logits are closer than 1e-4.
    """
    for name in ("dpo", "td_dpo"):
        shutil.copytree(results / name, tmp_path / name, ignore=shutil.ignore_patterns("mt_bench"))
    answer(tmp_path, bench, "--base", "--temperature", "0", "--batch_size", "7")
    tokenizer = load_tokenizer(str(tiny_model))
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = PeftModel.from_pretrained(base, tmp_path / run / "adapter").eval()
    questions = [json.loads(line) for line in (bench / "question.jsonl").read_text().splitlines()]
    answers, compared = turns_of(tmp_path, run), 0
    for question in questions:
        conversation = []
        for turn in range(2):
            conversation.append({"role": "user", "content": question["turns"][turn]})
            tokens, distances = plain_generate(model, prompt_ids(tokenizer, conversation), 12)
            text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            mine = answers[question["question_id"]][turn]
            if min(distances) > 1e-4:
                assert mine == text
                compared += 1
            conversation.append({"role": "assistant", "content": mine})
    assert compared >= 30


@pytest.mark.parametrize("kind", ["gemma2", "mistral"])
def test_soft_caps_and_sliding_windows(tiny_model, kind):
    """Architectures whose attention is not plain, prompts longer than the window, rows that leave
    and join.
    """
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 600,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "pad_token_id": 2,
        "eos_token_id": 2,
    }
    if kind == "gemma2":
        model = Gemma2ForCausalLM(
            Gemma2Config(
                **sizes, sliding_window=8, attn_logit_softcapping=1.0, final_logit_softcapping=2.0
            )
        )
    else:
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=8))
    prompts = [torch.randint(3, 600, (length,)).tolist() for length in (5, 30, 17, 40)]
    expected = [plain_generate(model.eval(), prompt, 10)[0] for prompt in prompts]
    engine, found = Engine(model, {}, rows=2, length=64, ends=[2]), {}
    requests = (
        Request(prompt, None, 0.0, 0, 10, tag=number) for number, prompt in enumerate(prompts)
    )
    engine.run(requests, lambda request: found.update({request.tag: request.tokens}))
    assert [found[number] for number in range(4)] == expected


def test_follow_ups_keep_their_keys_and_values(tiny_model):
    """Turn 2 begins with turn 1: only what is new goes through the model, and the answer is that of
    a fresh row.
    """
    models = [AutoModelForCausalLM.from_pretrained(tiny_model).eval() for _ in range(2)]
    engine, passed, found = Engine(models[0], {}, rows=1, length=128, ends=[2]), [], []
    original = engine.forward
    engine.forward = lambda tokens, *more: passed.append(len(tokens)) or original(tokens, *more)

    def finished(request):
        found.append(request.tokens)
        if request.tag == 1:
            return Request([*request.prompt, *request.tokens, 9, 10, 11], None, 0.0, 0, 6, tag=2)
        return None

    engine.run(iter([Request(list(range(5, 45)), None, 0.0, 0, 6, tag=1)]), finished)
    assert passed == [40, *[1] * 5, 4, *[1] * 5]  # the last token of turn 1 and three new ones
    whole = [*range(5, 45), *found[0], 9, 10, 11]
    assert found[1] == plain_generate(models[1], whole, 6)[0]


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
    (model / "generation_config.json").write_text(
        '{"repetition_penalty": 5.0, "no_repeat_ngram_size": 1}'
    )
    answer(tmp_path / "r", bench, "--base", "--model", model)
    answer(results, bench, "--base")
    assert turns_of(tmp_path / "r", "base") == turns_of(results, "base")


def test_unfinished_runs_are_left_out(results, bench, tmp_path, capsys):
    for name in ("dpo", "td_dpo"):
        shutil.copytree(results / name, tmp_path / name, ignore=shutil.ignore_patterns("mt_bench"))
    (tmp_path / "dpo" / "summary.json").unlink()
    answer(tmp_path, bench)
    assert "dpo: training has not finished" in capsys.readouterr().out
    assert (
        not (tmp_path / "dpo" / "mt_bench").exists() and (tmp_path / "td_dpo" / "mt_bench").exists()
    )


def test_adapters_that_do_not_fit_are_refused_before_anything_is_answered(
    results, bench, tmp_path, tiny_model
):
    def adapter(name):
        shutil.copytree(
            results / "dpo", tmp_path / name / "dpo", ignore=shutil.ignore_patterns("mt_bench")
        )
        return tmp_path / name / "dpo" / "adapter" / "adapter_model.safetensors"

    path = adapter("layers")
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if "layers.1" not in name}, path)
    with pytest.raises(
        UserError, match=r"does not fit this base model \(nothing for model.layers.1"
    ):
        answer(tmp_path / "layers", bench)
    path = adapter("shapes")
    save_file(
        {
            name: value[:, :32].contiguous() if "lora_A" in name else value
            for name, value in weights.items()
        },
        path,
    )
    with pytest.raises(UserError, match="it was trained on another"):
        answer(tmp_path / "shapes", bench)
    adapter("weights")
    record = json.loads((tmp_path / "weights" / "dpo" / "args.json").read_text())
    (tmp_path / "weights" / "dpo" / "args.json").write_text(
        json.dumps(record | {"base_sha256": "0" * 64})
    )
    with pytest.raises(UserError, match="trained on other weights"):
        answer(tmp_path / "weights", bench)
    assert not list(tmp_path.glob("*/*/mt_bench/*"))


def test_sampling_follows_the_softmax(tiny_model):
    engine = Engine(AutoModelForCausalLM.from_pretrained(tiny_model), {}, rows=1, length=8, ends=[])
    logits, request = torch.tensor([[0.0, 1.0, 2.0, -1.0]]), Request([1], None, 0.7, 5, 1)
    draws = torch.tensor([engine.pick(logits.clone(), [request])[0] for _ in range(20000)])
    frequencies = torch.bincount(draws, minlength=4) / len(draws)
    assert torch.allclose(frequencies, (logits[0] / 0.7).softmax(0), atol=0.015)
    assert engine.pick(logits.clone(), [Request([1], None, GREEDY_BELOW / 2, 5, 1)]) == [2]
    with pytest.raises(UserError, match="no numbers"):
        engine.pick(logits * float("nan"), [Request([1], "dpo", 0.0, 5, 1)])


def test_a_retrained_adapter_is_answered_anew(results, bench, capsys):
    answer(results, bench)
    path = results / "td_dpo" / "mt_bench" / "answers.jsonl"
    path.write_text(
        "".join(
            line.replace('"adapter_sha256": "', '"adapter_sha256": "old')
            for line in path.read_text().splitlines(keepends=True)
        )
    )
    answer(results, bench)
    assert "older adapter" in capsys.readouterr().out
    assert (
        len(turns_of(results, "td_dpo")) == 16
        and "old" not in path.read_text().split("adapter_sha256")[1][:8]
    )


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
    (choice,) = row["choices"]
    assert choice["overflow"] == [True, True] and all(choice["turns"])


def test_num_questions_spread_over_the_categories(bench):
    questions = mt_bench.pick_questions(mt_bench.read_questions(bench / "question.jsonl"), 8)
    assert [q["question_id"] for q in questions] == list(range(81, 97, 2))


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda run: (run / "adapter" / "adapter_config.json").unlink(), "no adapter there"),
        (
            lambda run: (run / "adapter" / "adapter_config.json").write_text("{"),
            "adapter_config.json cannot be read",
        ),
        (
            lambda run: (run / "adapter" / "adapter_model.safetensors").write_bytes(b"torn"),
            "cannot be read",
        ),
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
        (
            {"question_id": 81, "category": "cooking", "turns": ["a", "b"]},
            "unknown category 'cooking'",
        ),
        ({"question_id": 81, "category": "math", "turns": ["a"]}, "two non-empty strings"),
        ({"question_id": "x", "category": "math", "turns": ["a", "b"]}, "whole number"),
    ],
)
def test_bad_questions_are_named_with_their_line(results, tmp_path, row, said):
    good = {"question_id": 80, "category": "math", "turns": ["a", "b"]}
    write_jsonl(tmp_path / "question.jsonl", [good, row])
    with pytest.raises(UserError, match=rf"question.jsonl:2: .*{said}"):
        answer(results, tmp_path)


# ---- other questions ----------------------------------------------------------------------------


def test_alpaca_evals_instructions_and_its_outputs(results, tmp_path):
    shutil.copytree(
        results / "dpo", tmp_path / "r" / "dpo", ignore=shutil.ignore_patterns("mt_bench")
    )
    file = tmp_path / "alpaca_eval.json"
    rows = [
        {
            "instruction": f"Say {i}.",
            "output": "x",
            "generator": "text_davinci_003",
            "dataset": "koala",
        }
        for i in range(5)
    ]
    file.write_text(json.dumps(rows))
    with pytest.raises(UserError, match="give --temperature"):
        answer(tmp_path / "r", tmp_path, "--questions", file)
    answer(
        tmp_path / "r",
        tmp_path,
        "--questions",
        file,
        "--temperature",
        "0.7",
        "--export",
        "alpaca_eval",
    )
    folder = tmp_path / "r" / "dpo" / "alpaca_eval"
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    outputs = json.loads((folder / "model_outputs.json").read_text())
    assert [row.keys() for row in outputs] == [
        {"dataset": 0, "instruction": 0, "output": 0, "generator": 0}.keys()
    ] * 5
    assert [row["instruction"] for row in outputs] == [row["instruction"] for row in rows]
    assert [row["output"] for row in outputs] == [row["choices"][0]["turns"][0] for row in answers]
    assert {(row["generator"], row["dataset"]) for row in outputs} == {("dpo", "koala")}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            [{"question_id": 1, "turns": ["a"]}, {"question_id": 1, "turns": ["b"]}],
            "mine.jsonl:2: question_id 1 appears",
        ),
        ([{"question_id": 1, "turns": []}], "mine.jsonl:1: 'turns' must be"),
        ([{"question_id": "1", "turns": ["a"]}], "mine.jsonl:1: 'question_id' must be"),
        ([{"question_id": 1, "turns": ["a"], "category": "cooking"}], "category 'cooking'"),
        ([], "no questions"),
    ],
)
def test_bad_lines_of_other_questions_are_named(results, tmp_path, lines, said):
    path = write_jsonl(tmp_path / "mine.jsonl", lines)
    with pytest.raises(UserError, match=said):
        answer(results, tmp_path, "--questions", path)


def test_questions_of_three_turns(results, tmp_path):
    shutil.copytree(
        results / "dpo", tmp_path / "r" / "dpo", ignore=shutil.ignore_patterns("mt_bench")
    )
    path = write_jsonl(
        tmp_path / "mine.jsonl",
        [{"question_id": 3, "category": "math", "turns": ["One.", "Two.", "Three."]}],
    )
    answer(tmp_path / "r", tmp_path, "--questions", path)
    row = json.loads((tmp_path / "r" / "dpo" / "mine" / "answers.jsonl").read_text())
    assert len(row["choices"][0]["turns"]) == 3 and row["temperature"] == 0


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # FastChat's regular expressions are not raw strings
def test_choices_have_seeds_of_their_own_and_load_in_fastchat(
    results, bench, tmp_path, monkeypatch
):
    shutil.copytree(results / "dpo", tmp_path / "dpo", ignore=shutil.ignore_patterns("mt_bench"))
    answer(tmp_path, bench, "--num_choices", "2", "--temperature", "1")
    (tmp_path / "answers").mkdir()
    shutil.copyfile(
        tmp_path / "dpo" / "mt_bench" / "answers.jsonl", tmp_path / "answers" / "dpo.jsonl"
    )
    loaded = load_fastchat(monkeypatch).load_model_answers(str(tmp_path / "answers"))["dpo"]
    assert sorted(loaded) == list(range(81, 97))
    for row in loaded.values():
        assert [choice["index"] for choice in row["choices"]] == [0, 1]
    assert any(row["choices"][0]["turns"] != row["choices"][1]["turns"] for row in loaded.values())
    with pytest.raises(UserError, match="num_choices was 2, is None"):
        answer(tmp_path, bench, "--temperature", "1")


def test_log_probabilities_of_the_answers(results, bench, tiny_model, tmp_path):
    """Against plain PEFT on the whole conversation; asked for afterwards, the answers stay."""
    shutil.copytree(results / "dpo", tmp_path / "dpo", ignore=shutil.ignore_patterns("mt_bench"))
    answer(tmp_path, bench, "--num_questions", "4")
    before = turns_of(tmp_path, "dpo")
    answer(tmp_path, bench, "--num_questions", "4", "--kl", "--base")
    assert turns_of(tmp_path, "dpo") == before
    tokenizer = load_tokenizer(str(tiny_model))
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "dpo" / "adapter"
    ).eval()
    questions = {
        q["question_id"]: q
        for q in map(json.loads, (bench / "question.jsonl").read_text().splitlines())
    }
    for line in (tmp_path / "dpo" / "mt_bench" / "answers.jsonl").read_text().splitlines():
        row = json.loads(line)
        (choice,), conversation = row["choices"], []
        for turn, text in enumerate(choice["turns"]):
            conversation.append(
                {"role": "user", "content": questions[row["question_id"]]["turns"][turn]}
            )
            prompt = prompt_ids(tokenizer, conversation)
            ids = [*prompt, *tokenizer(text, add_special_tokens=False)["input_ids"]]
            ids += [] if choice["truncated"][turn] else [tokenizer.eos_token_id]
            conversation.append({"role": "assistant", "content": text})
            given = torch.tensor([ids])
            with torch.no_grad():
                tuned = (
                    model(given)
                    .logits[0, :-1]
                    .log_softmax(-1)
                    .gather(1, given[0, 1:, None])[len(prompt) - 1 :]
                    .sum()
                )
                with model.disable_adapter():
                    base = (
                        model(given)
                        .logits[0, :-1]
                        .log_softmax(-1)
                        .gather(1, given[0, 1:, None])[len(prompt) - 1 :]
                        .sum()
                    )
            assert choice["logp_tokens"][turn] == len(ids) - len(prompt)
            assert choice["logp"][turn] == pytest.approx(tuned.item(), rel=1e-4)
            assert choice["logp_base"][turn] == pytest.approx(base.item(), rel=1e-4)
    for line in (tmp_path / "base" / "mt_bench" / "answers.jsonl").read_text().splitlines():
        (choice,) = json.loads(line)["choices"]
        assert choice["logp"] == choice["logp_base"]


# ---- killed, shared, served ---------------------------------------------------------------------


def test_killed_in_the_middle_nothing_is_lost_or_doubled(results, bench, tmp_path):
    for name in ("dpo", "td_dpo"):
        shutil.copytree(
            results / name, tmp_path / "r" / name, ignore=shutil.ignore_patterns("mt_bench")
        )
    script = str(ROOT / "gen_mtbench.py")
    command = [
        sys.executable,
        script,
        tmp_path / "r",
        "--mt_bench",
        bench,
        "--max_new_tokens",
        "12",
        "--dtype",
        "float32",
        "--batch_size",
        "3",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    turns = tmp_path / "r" / "dpo" / "mt_bench" / "turns.0.jsonl"
    until = time.monotonic() + 60
    while (not turns.exists() or turns.read_bytes().count(b"\n") < 5) and time.monotonic() < until:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(turns, "ab") as file:
        file.write(b'{"question_id": 81, "cho')  # torn
    answered = turns.read_bytes().count(b"\n")
    assert answered >= 5 and not (tmp_path / "r" / "dpo" / "mt_bench" / "answers.jsonl").exists()
    added, original = [], Store.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Store, "add", lambda store, *a, **k: added.append(a) or original(store, *a, **k)
        )
        answer(tmp_path / "r", bench)
    assert len(added) == 2 * 16 * 2 - answered - sum(
        path.read_bytes().count(b"\n")
        for path in (tmp_path / "r" / "td_dpo").glob("mt_bench/turns*")
    )
    assert not turns.exists()
    answer(results, bench)
    for run in ("dpo", "td_dpo"):
        assert turns_of(tmp_path / "r", run) == turns_of(results, run)


def test_two_processes_share_the_work(results, bench, tmp_path):
    for name in ("dpo", "td_dpo"):
        shutil.copytree(results / name, tmp_path / name, ignore=shutil.ignore_patterns("mt_bench"))
    arguments = (
        tmp_path,
        "--mt_bench",
        bench,
        "--max_new_tokens",
        "12",
        "--dtype",
        "float32",
        "--batch_size",
        "4",
        "--kl",
    )
    done = run_script("gen_mtbench.py", *arguments, torchrun=2)
    assert done.returncode == 0, done.stderr[-2000:]
    answer(results, bench)
    for run in ("dpo", "td_dpo"):
        assert turns_of(tmp_path, run) == turns_of(results, run)
        rows = [
            json.loads(line)
            for line in (tmp_path / run / "mt_bench" / "answers.jsonl").read_text().splitlines()
        ]
        assert all("logp" in choice for row in rows for choice in row["choices"])
        assert os.listdir(tmp_path / run / "mt_bench") == ["answers.jsonl"]


def test_many_adapters_take_turns_in_memory(tiny_model, bench, tmp_path):
    """Never more than MOST_ADAPTERS are loaded, though 20 are answered for."""
    from pref.answering import generation

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(r=2, target_modules=["q_proj"])
    )
    folders = {f"run{number:02}": tmp_path / f"run{number:02}" for number in range(20)}
    for folder in folders.values():
        model.save_pretrained(folder)
    engine = Engine(
        AutoModelForCausalLM.from_pretrained(tiny_model), folders, rows=16, length=32, ends=[2]
    )
    most, original = [], engine.adapters.use

    def use(names):
        original(names)
        most.append(len(engine.adapters.loaded))

    engine.adapters.use = use
    engine.run((Request([5, 6, 7], name, 0.0, 0, 3) for name in folders), lambda request: None)
    assert max(most) == generation.MOST_ADAPTERS


def test_answers_through_a_server(results, bench, tmp_path, server, monkeypatch):
    """The same files; a request that fails is not lost, one that is answered is not sent again."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    shutil.copytree(results / "dpo", tmp_path / "dpo", ignore=shutil.ignore_patterns("mt_bench"))
    server.answer = lambda body: completion(
        f"{body['model']}: {body['messages'][-1]['content']}", finish="length"
    )
    answer(
        tmp_path,
        bench,
        "--base_url",
        server.url,
        "--base",
        "--served_base",
        "base-7b",
        "--num_questions",
        "8",
    )
    assert len(server.requests) == 2 * 8 * 2
    first = next(body for body in server.requests if body["model"] == "dpo")
    assert first["max_tokens"] == 12 and {"temperature", "seed", "messages"} <= first.keys()
    turns = turns_of(tmp_path, "dpo")
    assert turns[81] == ["dpo: Explain thing 0.", "dpo: Shorter."] and len(turns) == 8
    assert turns_of(tmp_path, "base")[81][0].startswith("base-7b: ")
    row = json.loads((tmp_path / "dpo" / "mt_bench" / "answers.jsonl").read_text().splitlines()[0])
    assert row["choices"][0]["truncated"] == [True, True] and row["settings"]["server"].startswith(
        "http://127.0.0.1"
    )
    answer(
        tmp_path,
        bench,
        "--base_url",
        server.url,
        "--base",
        "--served_base",
        "base-7b",
        "--num_questions",
        "8",
    )
    assert len(server.requests) == 2 * 8 * 2
    (tmp_path / "dpo" / "mt_bench" / "answers.jsonl").unlink()
    server.answer = lambda body: (
        (422, {"error": {"message": "Unexpected: seed"}}) if "seed" in body else completion("A")
    )
    answer(tmp_path, bench, "--base_url", server.url, "--num_questions", "8", "--concurrency", "1")
    assert turns_of(tmp_path, "dpo")[81] == ["A", "A"] and "seed" not in server.requests[-1]
    server.models = ["other"]
    with pytest.raises(UserError, match="does not serve dpo"):
        answer(tmp_path, bench, "--base_url", server.url)
    server.models = []
    server.answer = lambda body: (404, {"error": {"message": "no such model"}})
    with pytest.raises(UserError, match="no such model there"):
        answer(tmp_path, bench, "--base_url", server.url)
    with pytest.raises(UserError, match="dtype was None"):
        answer(tmp_path, bench)
