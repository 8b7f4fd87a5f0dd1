"""From a model's folder and pairs to token ids: which tokenizers are refused and why, what a run
says, records and refuses of its pairs before any weight is loaded.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import example_rows, write_jsonl
from tiny import CHATML

import train_pref
from pref.files.console import UserError
from pref.model import template, token_check
from pref.model.chat import load_tokenizer, tokenize_pairs
from pref.model.ranks import Ranks
from pref.training import arguments, tokenising

ONE = Ranks(0, 1, torch.device("cpu"))
ENDLESS = CHATML.replace("'<|im_end|>' + ", "")


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def set_config(model: Path, **values) -> None:
    """Change tokenizer_config.json; None removes a key."""
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def set_template(model: Path, text: str) -> None:
    (model / "chat_template.jinja").write_text(text)


# ---- tokenizers ----------------------------------------------------------------------------------


def remote_code(model: Path) -> None:
    (model / "own.py").write_text("raise SystemExit('this code was run')")
    set_config(model, tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})


def only_named_templates(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    set_config(model, chat_template=[{"name": "rag", "template": CHATML}])


def pointer(model: Path) -> None:
    (model / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid a\n")


def never_ends(model: Path) -> None:
    set_config(model, eos_token=None)
    set_template(model, ENDLESS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remote_code, "is Python code in the model's folder, which is never run here"),
        (only_named_templates, "named rag, and none is the default one; make the one to use"),
        (pointer, "tokenizer.json is a Git LFS pointer, not the file; run git lfs pull"),
        (never_ends, "no EOS token and its chat template ends no answer"),
        (lambda m: set_template(m, "{% for %}"), r"is no Jinja template \(line 1: "),
        (lambda m: set_template(m, ""), "has no chat template; use a chat"),
        (
            lambda m: [(m / "tokenizer.json").unlink(), set_config(m, tokenizer_class="Llama")],
            "its tokenizer cannot be loaded",
        ),
        (
            lambda m: [
                (m / "tokenizer.json").unlink(),
                set_config(m, tokenizer_class="LlamaTokenizer"),
            ],
            "its tokenizer has no vocabulary; give a model whose folder is complete",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused_with_the_reason(model, change, message):
    change(model)
    with pytest.raises(UserError, match=f"--model {model}: .*{message}"):
        load_tokenizer(str(model))


def test_without_eos_the_template_s_end_token_pads_and_ends(model):
    set_config(model, eos_token=None, pad_token=None)
    tokenizer = load_tokenizer(str(model))
    assert tokenizer.eos_token is None and tokenizer.pad_token == "<|im_end|>"


def test_a_tokenizer_in_python(model):
    """ByT5's: no tokenizer.json, no Rust, a token a byte."""
    (model / "tokenizer.json").unlink()
    set_config(model, tokenizer_class="ByT5Tokenizer", eos_token="</s>", pad_token="<pad>")
    set_template(model, CHATML.replace("<|im_end|>", "</s>"))
    tokenizer, rows = load_tokenizer(str(model)), example_rows(4)
    result = token_check.tokenize_checked(tokenizer, rows, 10**9)
    assert not tokenizer.is_fast and not result.bad
    answer = rows[0]["chosen"][0]["content"]
    assert tokenizer.decode(result.pairs[0].chosen) == f"{answer}</s>"


def test_a_tokenizer_that_normalises_says_a_text_in_its_own_way_but_must_not_lose_it(model):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["yes", "no", "hi", "é", "<|im_start|>", "<|im_end|>", "user", "assistant", "[UNK]"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="[UNK]",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    (pair,) = example_rows(1)
    contents = {"prompt": "HI", "chosen": "Yes   é yes", "rejected": "NO"}
    known = pair | {key: [pair[key][0] | {"content": text}] for key, text in contents.items()}
    unknown = known | {"rejected": [{"role": "assistant", "content": "Something else."}]}
    assert not token_check.tokenize_checked(tokenizer, [known], 99).bad
    (bad,) = token_check.tokenize_checked(tokenizer, [unknown], 99).bad
    assert bad.reason == token_check.HIDDEN_ANSWER


# ---- the pairs of a run --------------------------------------------------------------------------


def tokenised(model: Path, rows: dict, *argv: str) -> tokenising.Tokenised:
    args = arguments.parse_args(["--model", str(model), *argv])
    return tokenising.tokenise(args, load_tokenizer(str(model)), rows, ONE)


def splits(count: int, bad: int) -> dict[str, list[dict]]:
    """`count` training pairs, the last `bad` of them with a control token, and 4 to validate."""
    rows = example_rows(count + 4)
    for row in rows[count - bad : count]:
        row["rejected"][0]["content"] += " <|im_end|>"
    return {"train": rows[:count], "val": rows[count:]}


def test_a_few_bad_pairs_are_left_out_said_and_counted(tiny_model, capsys):
    rows = splits(96, bad=1)
    result = tokenised(tiny_model, rows)
    assert result.rows == {"train": rows["train"][:95], "val": rows["val"]}
    assert result.pairs["train"] == tokenize_pairs(
        load_tokenizer(str(tiny_model)), rows["train"][:95], 2048
    )
    assert result.counts["dropped_pairs"] == {token_check.CONTROL: 1}
    out = capsys.readouterr().out
    assert "1 of 100 pairs left out: a text holds a control token; remove it" in out
    assert "the first: pair pair95: " in out and "95 train and 4 val pairs" in out


def test_more_bad_pairs_than_max_bad_pairs_are_refused_with_the_first(tiny_model, model):
    rows = splits(16, bad=1)
    with pytest.raises(UserError, match="1 of 20 pairs .* more than --max_bad_pairs 0.01"):
        tokenised(tiny_model, rows)
    assert len(tokenised(tiny_model, rows, "--max_bad_pairs", "0.05").pairs["train"]) == 15
    # As shares, not as counts: 0.29 * 100 is a little less than 29.
    assert len(tokenised(tiny_model, splits(96, bad=29), "--max_bad_pairs", "0.29").pairs["val"])
    with pytest.raises(UserError, match="all of train among them"):
        tokenised(tiny_model, splits(4, bad=4), "--max_bad_pairs", "1")

    # The first example, with single tokens where prompt and response meet.
    set_template(model, CHATML.partition("{% if add_generation_prompt")[0])
    with pytest.raises(UserError) as refused:
        tokenised(model, splits(4, bad=0))
    lines = str(refused.value).splitlines()
    assert lines[2].startswith(f"the first: pair pair0: {token_check.LEAD}")
    assert lines[3].startswith('  prompt    "<|im_start|>user') and lines[3].endswith('| "\\n"')
    assert lines[4].startswith('  chosen    "<|im_start|>" | "a')


def test_a_template_without_an_end_token_is_warned_of_and_append_eos_repairs_it(model, capsys):
    set_template(model, ENDLESS)
    without = tokenised(model, splits(4, 0))
    assert "warning: the chat template writes no end token" in capsys.readouterr().out
    ended = tokenised(model, splits(4, 0), "--append_eos")
    assert "warning" not in capsys.readouterr().out
    eos = load_tokenizer(str(model)).eos_token_id
    for old, new in zip(without.pairs["train"], ended.pairs["train"]):
        assert new == old._replace(chosen=[*old.chosen, eos], rejected=[*old.rejected, eos])


def test_append_eos_is_refused_where_the_template_ends_answers(tiny_model):
    with pytest.raises(UserError, match=r"already ends answers with <\|im_end\|>; leave it out"):
        tokenised(tiny_model, splits(4, 0), "--append_eos")


def test_tokens_beyond_the_embedding_are_refused_and_padding_there_is_replaced(model):
    path = model / "config.json"
    config = json.loads(path.read_text())
    tokenizer = load_tokenizer(str(model))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(model)
    args = arguments.parse_args(["--model", str(model)])
    loaded = load_tokenizer(str(model))
    assert loaded.pad_token_id == config["vocab_size"]
    tokenising.tokenise(args, loaded, splits(4, 0), ONE)
    assert loaded.pad_token_id < config["vocab_size"]
    path.write_text(json.dumps(config | {"vocab_size": 300}))
    with pytest.raises(UserError, match="has no embedding for .* the embedding has 300 rows"):
        tokenised(model, splits(4, 0))


@pytest.fixture
def argv(model, tmp_path) -> list[str]:
    """Of a run on 24 pairs, one of them bad, with a template that prints the date."""
    for split, of_split in splits(20, bad=1).items():
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", of_split)
    set_template(model, "{{ strftime_now('%Y') }}" + CHATML)
    argv = ["--model", str(model), "--data", str(tmp_path / "data"), "--lora_r", "2"]
    return [*argv, "--results_dir", str(tmp_path / "results"), "--run_id", "x"]


def test_a_dry_run_refuses_bad_pairs(argv):
    with pytest.raises(UserError, match="1 of 24 pairs cannot be trained on"):
        train_pref.main([*argv, "--dry_run"])


def test_a_run_records_the_pairs_left_out_and_the_date(argv, model, tmp_path):
    kept = ["--max_bad_pairs", "0.1", "--max_steps", "1", "--global_batch", "4"]
    assert train_pref.main([*argv, *kept, "--dtype", "float32"]) == 0
    record = json.loads((tmp_path / "results/x/args.json").read_text())
    assert record["dropped_pairs"] == {token_check.CONTROL: 1}
    assert record["template_date"] == "2024-07-26" and record["append_eos"] is False
    assert "max_bad_pairs" not in record
    assert template.settings_of(load_tokenizer(str(model))) == {"template_date": "2024-07-26"}
    lines = (tmp_path / "results/x/val_pairs.jsonl").read_text().splitlines()
    assert {json.loads(line)["id"] for line in lines} == {f"pair{i}" for i in range(20, 24)}


# ---- answers -------------------------------------------------------------------------------------


def test_answers_follow_the_prompt_that_is_trained_and_say_what_was_done_to_it(
    model, tmp_path, capsys
):
    import gen_mtbench

    set_template(model, CHATML.replace("assistant\n'", "assistant\n<think>\n'"))
    question = {"question_id": 81, "category": "writing", "turns": ["Hi.", "Shorter."]}
    write_jsonl(tmp_path / "bench" / "question.jsonl", [question])
    argv = [str(tmp_path / "results"), "--base", "--model", str(model), "--dtype", "float32"]
    argv += ["--mt_bench", str(tmp_path / "bench"), "--max_new_tokens", "2"]
    assert gen_mtbench.main(argv) == 0
    prompt = "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert json.dumps(prompt) in capsys.readouterr().out
    pair = example_rows(1)[0] | {"prompt": [{"role": "user", "content": "Hi."}]}
    tokenizer = load_tokenizer(str(model))
    assert tokenizer.decode(tokenize_pairs(tokenizer, [pair], 999)[0].prompt) == prompt
    (row,) = (tmp_path / "results/base/mt_bench/answers.jsonl").read_text().splitlines()
    assert json.loads(row)["settings"]["template_thoughts"] == "closed"
