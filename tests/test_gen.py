"""gen_mtbench.py on a tiny random model: answers equal PEFT's own, depend on seeds only, survive
kills; errors name place, fact and remedy.
"""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import run_script, start_script, write_jsonl
from doubles import completion, load_fastchat
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_generation import plain_generate
from transformers import AutoModelForCausalLM

import gen_mtbench
import train_pref
from pref.answering.turns import Store
from pref.files import mt_bench
from pref.files.console import UserError
from pref.files.mt_bench import CATEGORIES, read_answers
from pref.model.chat import load_tokenizer, prompt_ids


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Sixteen two-turn questions, two per category."""
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
        arguments = split("--dtype float32 --lora_r 4 --global_batch 8 --learning_rate 0.05")
        arguments += ["--model", tiny_model, "--data", pairs_folder, "--results_dir", folder]
        arguments += split("--max_steps 3 --run_id", loss, "--loss", loss)
        train_pref.main([str(argument) for argument in arguments])
    return folder


def split(*arguments: str | Path) -> list[str]:
    """Command-line arguments: strings are split at spaces, paths are not."""
    return [
        word
        for argument in arguments
        for word in (argument.split() if isinstance(argument, str) else [str(argument)])
    ]


def arguments_of(results, bench, *more) -> list[str]:
    return split(results, "--mt_bench", bench, "--max_new_tokens 12 --dtype float32", *more)


def answer(results, bench, *more) -> int:
    return gen_mtbench.main(arguments_of(results, bench, *more))


def copy_run(results, run, target):
    """A trained run without answers, as target/<run>. Returns target."""
    shutil.copytree(results / run, target / run, ignore=shutil.ignore_patterns("mt_bench"))
    return target


def answers_path(results, run, bench="mt_bench"):
    return results / run / bench / "answers.jsonl"


def rows_of(results, run, bench="mt_bench") -> list[dict]:
    lines = answers_path(results, run, bench).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def turns_of(results, run) -> dict[int, list[str]]:
    rows = read_answers(answers_path(results, run))
    return {question: row["turns"] for (question, _), row in rows.items()}


def questions_in(bench) -> list[dict]:
    return [json.loads(line) for line in (bench / "question.jsonl").read_text().splitlines()]


def test_answers_of_every_run_and_of_the_base(results, bench, tiny_model):
    assert answer(results, bench, "--base") == 0
    answers = {run: turns_of(results, run) for run in ("base", "dpo", "td_dpo")}
    assert all(sorted(turns) == list(range(81, 97)) for turns in answers.values())
    assert answers["dpo"] != answers["base"] != answers["td_dpo"] != answers["dpo"]
    row = rows_of(results, "dpo")[0]
    assert {"question_id", "answer_id", "model_id", "choices", "tstamp"} <= row.keys()  # FastChat's
    assert row["model_id"] == "dpo"
    assert row["settings"]["max_new_tokens"] == 12
    assert len(row["adapter_sha256"]) == 64


@pytest.mark.slow
@pytest.mark.parametrize("run", ["dpo", "td_dpo"])
def test_greedy_answers_equal_one_by_one_peft_generate(results, bench, tiny_model, tmp_path, run):
    """Sixteen questions, both turns, two adapters and the base in one batch. A difference is
    allowed where the two largest logits are closer than 1e-4.
    """
    for name in ("dpo", "td_dpo"):
        copy_run(results, name, tmp_path)
    answer(tmp_path, bench, "--base --temperature 0 --batch_size 7")
    tokenizer = load_tokenizer(str(tiny_model))
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = PeftModel.from_pretrained(base, tmp_path / run / "adapter").eval()
    answers, compared = turns_of(tmp_path, run), 0
    for question in questions_in(bench):
        conversation = []
        for turn in range(2):
            conversation.append({"role": "user", "content": question["turns"][turn]})
            tokens, distances = plain_generate(model, prompt_ids(tokenizer, conversation), 12)
            text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            written = answers[question["question_id"]][turn]
            if min(distances) > 1e-4:
                assert written == text
                compared += 1
            conversation.append({"role": "assistant", "content": written})
    assert compared >= 30


def test_sampled_answers_do_not_depend_on_the_batch_or_on_a_restart(results, bench):
    answer(results, bench)
    path = answers_path(results, "dpo")
    before = turns_of(results, "dpo")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]))  # as a kill after the first rows would leave it
    answer(results, bench, "--batch_size 3")
    assert turns_of(results, "dpo") == before
    path.unlink()
    answer(results / "dpo", bench, "--seed 7")
    other = turns_of(results, "dpo")
    path.unlink()
    rows = [json.loads(line) for line in lines]
    sampled = {row["question_id"] for row in rows if row["temperature"] > 0}
    assert all(other[q] == before[q] for q in before if q not in sampled)
    assert any(other[q] != before[q] for q in sampled)


def test_the_generation_config_of_the_model_is_ignored(results, bench, tiny_model, tmp_path):
    """A repetition penalty in the model folder is not part of MT-Bench's protocol."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "generation_config.json").write_text(
        '{"repetition_penalty": 5.0, "no_repeat_ngram_size": 1}'
    )
    answer(tmp_path / "r", bench, "--base --model", model)
    answer(results, bench, "--base")
    assert turns_of(tmp_path / "r", "base") == turns_of(results, "base")


def test_unfinished_runs_are_left_out(results, bench, tmp_path, capsys):
    for name in ("dpo", "td_dpo"):
        copy_run(results, name, tmp_path)
    (tmp_path / "dpo" / "summary.json").unlink()
    shutil.copytree(tmp_path / "td_dpo", tmp_path / "lost")
    shutil.rmtree(tmp_path / "lost" / "adapter")
    answer(tmp_path, bench)
    out = capsys.readouterr().out
    assert "dpo: training has not finished" in out
    assert "lost: no adapter (removed since, or the run diverged); left out" in out
    assert not (tmp_path / "dpo" / "mt_bench").exists()
    assert (tmp_path / "td_dpo" / "mt_bench").exists()


def test_adapters_that_do_not_fit_are_refused_before_anything_is_answered(
    results, bench, tmp_path, tiny_model
):
    def adapter(name):
        run = copy_run(results, "dpo", tmp_path / name) / "dpo"
        return run / "adapter" / "adapter_model.safetensors"

    path = adapter("layers")
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if "layers.1" not in name}, path)
    message = r"does not fit this base model \(no weights for model.layers.1"
    with pytest.raises(UserError, match=message):
        answer(tmp_path / "layers", bench)
    path = adapter("shapes")
    halved = {name: value[:, :32].contiguous() for name, value in weights.items() if "_A" in name}
    save_file(weights | halved, path)
    with pytest.raises(UserError, match="adapter's shape.*give --model"):
        answer(tmp_path / "shapes", bench)
    for key in ("base_sha256", "model_sha256"):
        record = adapter(key).parent.parent / "args.json"
        record.write_text(json.dumps(json.loads(record.read_text()) | {key: "0" * 64}))
        with pytest.raises(UserError, match="trained on other weights"):
            answer(tmp_path / key, bench)
    assert not list(tmp_path.glob("*/*/mt_bench/*"))


def test_a_retrained_adapter_is_answered_anew(results, bench, capsys):
    answer(results, bench)
    path = answers_path(results, "td_dpo")
    path.write_text(path.read_text().replace('"adapter_sha256": "', '"adapter_sha256": "old'))
    answer(results, bench)
    assert "32 answered turns are from an older adapter" in capsys.readouterr().out
    assert len(turns_of(results, "td_dpo")) == 16
    assert "old" not in path.read_text().split("adapter_sha256")[1][:8]


def test_other_settings_are_refused(results, bench):
    answer(results, bench)
    with pytest.raises(UserError, match="max_new_tokens was 12, is 9"):
        answer(results, bench, "--max_new_tokens 9")


def test_context_overflow_is_marked(results, bench, tmp_path):
    long = {"question_id": 1, "category": "math", "turns": ["word " * 2500, "again"]}
    write_jsonl(tmp_path / "question.jsonl", [long])
    run = results.parent / "overflow" / "dpo"
    run.parent.mkdir()
    run.symlink_to(results / "dpo")
    answer(results, bench)
    path = answers_path(run.parent, "dpo")
    path.rename(tmp_path / "aside")
    answer(run.parent, tmp_path)
    (row,) = rows_of(run.parent, "dpo")
    (tmp_path / "aside").rename(path)
    (choice,) = row["choices"]
    assert choice["overflow"] == [True, True] and all(choice["turns"])


def test_num_questions_spread_over_the_categories(bench):
    questions = mt_bench.pick_questions(mt_bench.read_questions(bench / "question.jsonl"), 8)
    assert [q["question_id"] for q in questions] == list(range(81, 97, 2))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter/adapter_config.json", None, "no adapter there"),
        ("adapter/adapter_config.json", "{", "adapter_config.json cannot be read"),
        ("adapter/adapter_model.safetensors", "torn", "cannot be read"),
        ("adapter/adapter_model.safetensors", "", "cannot be read"),
        ("args.json", "{", "not valid JSON"),
    ],
)
def test_broken_adapters_are_named(results, bench, tmp_path, file, content, message):
    path = copy_run(results, "dpo", tmp_path) / "dpo" / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        answer(tmp_path, bench)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_adapters_that_are_not_finite_are_named_before_anything_is_answered(
    results, bench, tmp_path, value
):
    copy_run(results, "dpo", tmp_path)
    path = copy_run(results, "td_dpo", tmp_path) / "td_dpo/adapter/adapter_model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "layers.1.mlp" in name and "lora_B" in name)
    weights[name][0, 0] = value
    save_file(weights, path)
    with pytest.raises(UserError, match=r"td_dpo/adapter: has NaN or infinite weights \(model.lay"):
        answer(tmp_path, bench)
    assert not list(tmp_path.glob("*/mt_bench/*"))


def test_results_without_adapters(tmp_path, bench):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text("{}")
    with pytest.raises(UserError, match="no trained runs here"):
        answer(tmp_path, bench)
    (tmp_path / "run" / "args.json").unlink()
    with pytest.raises(UserError, match="no runs here"):
        answer(tmp_path, bench)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category": "cooking"}, "unknown category 'cooking'"),
        ({"turns": ["a"]}, "two non-empty strings"),
        ({"question_id": "x"}, "whole number"),
    ],
)
def test_bad_questions_are_named_with_their_line(results, tmp_path, change, message):
    good = {"question_id": 80, "category": "math", "turns": ["a", "b"]}
    write_jsonl(tmp_path / "question.jsonl", [good, good | {"question_id": 81} | change])
    with pytest.raises(UserError, match=rf"question.jsonl:2: .*{message}"):
        answer(results, tmp_path)


# ---- other questions ----------------------------------------------------------------------------


def test_alpaca_evals_instructions_and_its_outputs(results, tmp_path):
    copy_run(results, "dpo", tmp_path / "r")
    path = tmp_path / "alpaca_eval.json"
    entry = {"output": "x", "generator": "text_davinci_003", "dataset": "koala"}
    instructions = [{"instruction": f"Say {i}."} | entry for i in range(5)]
    path.write_text(json.dumps(instructions))
    with pytest.raises(UserError, match="give --temperature"):
        answer(tmp_path / "r", tmp_path, "--questions", path)
    more = ("--questions", path, "--temperature 0.7 --export alpaca_eval")
    answer(tmp_path / "r", tmp_path, *more)
    rows = rows_of(tmp_path / "r", "dpo", "alpaca_eval")
    outputs = json.loads((tmp_path / "r/dpo/alpaca_eval/model_outputs.json").read_text())
    assert outputs == [
        {
            "dataset": "koala",
            "instruction": asked["instruction"],
            "output": row["choices"][0]["turns"][0],
            "generator": "dpo",
        }
        for asked, row in zip(instructions, rows, strict=True)
    ]
    assert len(outputs) == 5


@pytest.mark.parametrize("name", ["q.json", "q.jsonl"])
def test_forms_of_a_file_of_questions(tmp_path, name):
    """One list or a line each, with a byte order mark, whatever the file is called."""
    rows = [{"question_id": 7, "turns": ["a"]}, {"question_id": 9, "turns": ["b", "c"]}]
    path = tmp_path / name
    for text in (json.dumps(rows, indent=1), "\n\n".join(map(json.dumps, rows))):
        path.write_text("\ufeff" + text, encoding="utf-8")
        assert mt_bench.read_questions(path, mt_bench=False) == rows
    path.write_text(json.dumps([{"instruction": "a"}, {"instruction": "b", "dataset": "koala"}]))
    questions = mt_bench.read_questions(path, mt_bench=False)
    assert [question["question_id"] for question in questions] == [1, 2]
    assert questions[1]["turns"] == ["b"] and questions[1]["dataset"] == "koala"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"turns": ["a"]}, {"turns": ["b"]}], "other.jsonl:2: question_id 1 appears"),
        ([{"turns": []}], "other.jsonl:1: 'turns' must be"),
        ([{"turns": ["a"], "question_id": "1"}], "other.jsonl:1: 'question_id' must be"),
        ([{"turns": ["a"], "question_id": True}], "other.jsonl:1: 'question_id' must be"),
        ([{"turns": "a"}], "other.jsonl:1: 'turns' must be"),
        ([{"turns": None, "instruction": "a"}], "other.jsonl:1: 'turns' must be"),
        ([{"turns": ["a \ud83d"]}], "other.jsonl:1: a turn is not valid Unicode"),
        ([{"turns": ["a"], "category": "cooking"}], "category 'cooking'"),
        ([], "no questions"),
    ],
)
def test_bad_lines_of_other_questions_are_named(results, tmp_path, rows, message):
    path = write_jsonl(tmp_path / "other.jsonl", [{"question_id": 1} | row for row in rows])
    with pytest.raises(UserError, match=message):
        answer(results, tmp_path, "--questions", path)


def test_questions_of_three_turns(results, tmp_path):
    copy_run(results, "dpo", tmp_path / "r")
    question = {"question_id": 3, "category": "math", "turns": ["One.", "Two.", "Three."]}
    path = write_jsonl(tmp_path / "other.jsonl", [question])
    answer(tmp_path / "r", tmp_path, "--questions", path)
    (row,) = rows_of(tmp_path / "r", "dpo", "other")
    assert len(row["choices"][0]["turns"]) == 3 and row["temperature"] == 0


# FastChat's regular expressions are not raw strings.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_choices_have_different_seeds_and_load_in_fastchat(results, bench, tmp_path, monkeypatch):
    copy_run(results, "dpo", tmp_path)
    answer(tmp_path, bench, "--num_choices 2 --temperature 1")
    (tmp_path / "answers").mkdir()
    shutil.copyfile(answers_path(tmp_path, "dpo"), tmp_path / "answers" / "dpo.jsonl")
    loaded = load_fastchat(monkeypatch).load_model_answers(str(tmp_path / "answers"))["dpo"]
    assert sorted(loaded) == list(range(81, 97))
    for row in loaded.values():
        assert [choice["index"] for choice in row["choices"]] == [0, 1]
    assert any(row["choices"][0]["turns"] != row["choices"][1]["turns"] for row in loaded.values())
    with pytest.raises(UserError, match="num_choices was 2, is None"):
        answer(tmp_path, bench, "--temperature 1")


def plain_logp(model, ids: list[int], prompt: int) -> float:
    """Sum of the log-probabilities of ids[prompt:], by a plain forward pass."""
    given = torch.tensor([ids])
    with torch.no_grad():
        logps = model(given).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, given[0, 1:, None])[prompt - 1 :].sum().item()


def test_log_probabilities_of_the_answers(results, bench, tiny_model, tmp_path):
    """They equal plain PEFT on the whole conversation; computing them later keeps the answers."""
    copy_run(results, "dpo", tmp_path)
    answer(tmp_path, bench, "--num_questions 4")
    before = turns_of(tmp_path, "dpo")
    answer(tmp_path, bench, "--num_questions 4 --kl --base")
    assert turns_of(tmp_path, "dpo") == before
    tokenizer = load_tokenizer(str(tiny_model))
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = PeftModel.from_pretrained(base, tmp_path / "dpo" / "adapter").eval()
    questions = {question["question_id"]: question for question in questions_in(bench)}
    for row in rows_of(tmp_path, "dpo"):
        (choice,), conversation = row["choices"], []
        asked = questions[row["question_id"]]["turns"]
        for turn, text in enumerate(choice["turns"]):
            conversation.append({"role": "user", "content": asked[turn]})
            prompt = prompt_ids(tokenizer, conversation)
            ids = [*prompt, *tokenizer(text, add_special_tokens=False)["input_ids"]]
            ids += [] if choice["truncated"][turn] else [tokenizer.eos_token_id]
            conversation.append({"role": "assistant", "content": text})
            expected = plain_logp(model, ids, len(prompt))
            with model.disable_adapter():
                expected_base = plain_logp(model, ids, len(prompt))
            assert choice["logp_tokens"][turn] == len(ids) - len(prompt)
            assert choice["logp"][turn] == pytest.approx(expected, rel=1e-4)
            assert choice["logp_base"][turn] == pytest.approx(expected_base, rel=1e-4)
    for row in rows_of(tmp_path, "base"):
        (choice,) = row["choices"]
        assert choice["logp"] == choice["logp_base"]


# ---- killed, shared, served ---------------------------------------------------------------------


@pytest.mark.slow
def test_after_a_kill_nothing_is_lost_or_doubled(results, bench, tmp_path):
    for name in ("dpo", "td_dpo"):
        copy_run(results, name, tmp_path / "r")

    # 1) Kill it after a few turns, and leave half a line as a kill can.
    arguments = arguments_of(tmp_path / "r", bench, "--batch_size 3")
    process = start_script("gen_mtbench.py", arguments, tmp_path / "output")
    turns = tmp_path / "r" / "dpo" / "mt_bench" / "turns.0.jsonl"
    until = time.monotonic() + 60
    while (not turns.exists() or turns.read_bytes().count(b"\n") < 5) and time.monotonic() < until:
        time.sleep(0.001)
    process.kill()
    process.join()
    with open(turns, "ab") as file:
        file.write(b'{"question_id": 81, "cho')
    answered = sum(
        path.read_bytes().count(b"\n") for path in (tmp_path / "r").glob("*/mt_bench/turns*")
    )
    assert turns.read_bytes().count(b"\n") >= 5
    assert not answers_path(tmp_path / "r", "dpo").exists()

    # 2) The same command answers what is missing, and nothing else.
    added, original = [], Store.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Store, "add", lambda store, *a, **k: added.append(a) or original(store, *a, **k)
        )
        answer(tmp_path / "r", bench)
    assert len(added) == 2 * 16 * 2 - answered
    assert not turns.exists()
    answer(results, bench)
    for run in ("dpo", "td_dpo"):
        assert turns_of(tmp_path / "r", run) == turns_of(results, run)


@pytest.mark.slow
def test_two_processes_share_the_work(results, bench, tmp_path):
    for name in ("dpo", "td_dpo"):
        copy_run(results, name, tmp_path)
    arguments = arguments_of(tmp_path, bench, "--batch_size 4 --kl")
    done = run_script("gen_mtbench.py", *arguments, torchrun=2)
    assert done.returncode == 0, done.stderr[-2000:]
    answer(results, bench)
    for run in ("dpo", "td_dpo"):
        assert turns_of(tmp_path, run) == turns_of(results, run)
        assert all("logp" in choice for row in rows_of(tmp_path, run) for choice in row["choices"])
        assert os.listdir(tmp_path / run / "mt_bench") == ["answers.jsonl"]


@pytest.mark.slow
def test_answers_through_a_server(results, bench, tmp_path, server, monkeypatch):
    """The same files as from the engine; an answered request is not sent again."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    copy_run(results, "dpo", tmp_path)
    through = ("--base_url", server.url, "--num_questions 8")
    with_base = (*through, "--base --served_base base-7b")

    # 1) Every turn is one request, under the run's name, with the first answer in turn 2's prompt.
    server.answer = lambda body: completion(
        f"{body['model']}: {body['messages'][-1]['content']}", finish="length"
    )
    answer(tmp_path, bench, *with_base)
    assert len(server.requests) == 2 * 8 * 2
    first = next(body for body in server.requests if body["model"] == "dpo")
    assert first["max_tokens"] == 12 and {"temperature", "seed", "messages"} <= first.keys()
    turns = turns_of(tmp_path, "dpo")
    assert turns[81] == ["dpo: Explain thing 0.", "dpo: Shorter."] and len(turns) == 8
    assert turns_of(tmp_path, "base")[81][0].startswith("base-7b: ")
    row = rows_of(tmp_path, "dpo")[0]
    assert row["choices"][0]["truncated"] == [True, True]
    assert row["settings"]["server"].startswith("http://127.0.0.1")
    answer(tmp_path, bench, *with_base)
    assert len(server.requests) == 2 * 8 * 2

    # 2) A server without seeds.
    answers_path(tmp_path, "dpo").unlink()
    server.answer = lambda body: (
        (422, {"error": {"message": "Unexpected: seed"}}) if "seed" in body else completion("A")
    )
    answer(tmp_path, bench, *through, "--concurrency 1")
    assert turns_of(tmp_path, "dpo")[81] == ["A", "A"] and "seed" not in server.requests[-1]

    # 3) A server without the model: its list tells, or its first reply. And no mixing with the
    # engine's answers.
    server.models = ["other"]
    with pytest.raises(UserError, match="does not serve dpo"):
        answer(tmp_path, bench, "--base_url", server.url)
    server.models = []
    server.answer = lambda body: (404, {"error": {"message": "no such model"}})
    with pytest.raises(UserError, match="it has no such model; correct the name"):
        answer(tmp_path, bench, "--base_url", server.url)
    with pytest.raises(UserError, match="dtype was None"):
        answer(tmp_path, bench)
