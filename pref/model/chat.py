"""Chat template and tokenisation: how messages become token ids.

Training, answering and judging all render through `apply_template`, with the same options.

    messages --apply_template--> text --encode--> token ids --tokenize_pair--> TokenPair
                                                                --truncate--> TokenPair

A conversation goes through the model's own template as a whole and is tokenised in one piece. Its
prompt ends where the conversation's token ids stop agreeing with those of the prompt. No special
token is added outside the template: there is never a second BOS, and EOS is where the template
puts it.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pref.files.console import UserError, first_line

# What a template may ask for besides the messages. Templates ignore options that they do not know.
TEMPLATE_OPTIONS = {
    # Llama 3 writes today's date. A fixed one keeps prompts the same from day to day.
    "date_string": "26 Jul 2024",
    # Qwen3 and others close an empty block of thoughts in the prompt. The response then begins with
    # the answer itself: in training the block is not scored as part of the response, an answer does
    # not spend its tokens on thoughts, and a judge's rating can follow the prompt directly.
    "enable_thinking": False,
}

# A prompt rendered for generation may lose its last token or two to the response's first one
# (`[/INST] ` + `Hello`). A template that loses more writes a conversation differently from its
# prompt, so there is no place to split it.
MAX_MERGED_TOKENS = 2
MAX_MISALIGNED = 0.01  # share of pairs


class TokenPair(NamedTuple):
    """Token ids of a preference pair: the shared prompt and two responses, each of at least one
    token.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    merged: int = 0  # tokens at the prompt's end that became part of the response
    cut_prompt: int = 0  # tokens removed by `truncate`
    cut_response: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of both sequences, the prompt counted twice."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or folder, with a chat template and a padding token.

    Raises UserError if there is no tokenizer or it has no template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        where = "" if Path(model).is_dir() else "no such folder here; as a hub id: "
        raise UserError(
            f"--model {model}: no tokenizer there ({where}{first_line(error)})"
        ) from None
    if tokenizer.chat_template is None:
        raise UserError(
            f"--model {model}: its tokenizer has no chat template; use a chat (instruct) model or "
            "set chat_template in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], generation_prompt: bool
) -> str:
    """The conversation as text, by the model's template and TEMPLATE_OPTIONS.

    generation_prompt: end with what precedes the assistant's next message. Raises
    jinja2.TemplateError if the template rejects the conversation.
    """
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation_prompt, **TEMPLATE_OPTIONS
    )


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], generation_prompt: bool
) -> str:
    """`apply_template` for any conversation.

    If the template rejects a system message (Gemma, older Mistral), its text is put before the
    first user message. Raises UserError if the template still rejects the conversation.
    """
    try:
        return apply_template(tokenizer, messages, generation_prompt)
    except TemplateError as error:
        if messages[0]["role"] != "system":
            raise UserError(
                f"the model's chat template rejects a conversation: {first_line(error)}"
            ) from None
    system, user, *others = messages
    merged = {"role": "user", "content": f"{system['content']}\n\n{user['content']}"}
    return render(tokenizer, [merged, *others], generation_prompt)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of rendered text. The template has already written every special token."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> list[int]:
    """Token ids of a conversation that the model is to answer."""
    return encode(tokenizer, render(tokenizer, messages, generation_prompt=True))


def common_prefix(*sequences: list[int]) -> int:
    """Length of the longest prefix that all sequences share."""
    length = min(map(len, sequences))
    for i in range(length):
        if any(s[i] != sequences[0][i] for s in sequences[1:]):
            return i
    return length


def tokenize_pair(tokenizer: PreTrainedTokenizerBase, pair: dict) -> TokenPair:
    """Token ids of a pair (a row of prep_data.py), not truncated.

    The split is at the longest prefix that the prompt shares with both conversations. Where the end
    of the template and the response merge into one token, that token belongs to the response:

        prompt    <s> [INST] Hi [/INST] _             "_" is the template's last space
        chosen    <s> [INST] Hi [/INST] _Hello </s>   one token "_Hello"
        rejected  <s> [INST] Hi [/INST] _Go away </s>
                                       ^ split, merged = 1

    Raises UserError if the prompt or a response would be empty.
    """
    prompt = prompt_ids(tokenizer, pair["prompt"])
    chosen, rejected = (
        encode(
            tokenizer, render(tokenizer, [*pair["prompt"], *pair[side]], generation_prompt=False)
        )
        for side in ("chosen", "rejected")
    )
    split = min(common_prefix(prompt, chosen), common_prefix(prompt, rejected))
    if split == 0 or split in (len(chosen), len(rejected)):
        raise UserError(
            f"pair {pair['id']}: the model's chat template leaves no prompt or no response to "
            "compare"
        )
    return TokenPair(prompt[:split], chosen[split:], rejected[split:], merged=len(prompt) - split)


def truncate(pair: TokenPair, max_length: int, keep: str, bos_id: int | None) -> TokenPair:
    """`pair` with the prompt and the longer response within `max_length` tokens together.

    keep 'keep_end': cut the start of the prompt, except a leading BOS, down to a quarter of
    max_length; cut the ends of the responses only if that is not enough. With max_length 40:

        prompt 40, chosen 20  ->  the last 20 of the prompt, all 20 of the response
        prompt 40, chosen 35  ->  the last 10 of the prompt, the first 30 of the response

    keep 'keep_start': as TRL does, keep the first max_length tokens, so that the ends of the
    responses are cut. TRL drops a pair whose prompt alone fills max_length. Here such a prompt
    keeps its start, as many tokens as 'keep_end' would keep.

    No response is ever emptied.
    """
    excess = pair.longest - max_length
    if excess <= 0:
        return pair

    # 1) How many tokens of the prompt remain, and which.
    size = len(pair.prompt)
    remaining = max(size - excess, min(size, max(max_length // 4, 1)))
    if keep == "keep_start":
        remaining = size if size < max_length else remaining
        prompt = pair.prompt[:remaining]
    elif pair.prompt[0] == bos_id and remaining > 1:
        prompt = [bos_id, *pair.prompt[size - remaining + 1 :]]
    else:
        prompt = pair.prompt[size - remaining :]

    # 2) The responses get the rest.
    room = max_length - remaining
    return pair._replace(
        prompt=prompt,
        chosen=pair.chosen[:room],
        rejected=pair.rejected[:room],
        cut_prompt=size - remaining,
        cut_response=sum(max(0, len(r) - room) for r in (pair.chosen, pair.rejected)),
    )


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    max_length: int,
    keep: str = "keep_end",
    progress: Callable[[list[dict]], Iterable[dict]] = iter,
) -> list[TokenPair]:
    """Token ids of all pairs, truncated. progress: wraps `rows` to show how far the loop has come.

    Raises UserError for a template whose conversations do not begin with its prompts: a split there
    would be wrong.
    """
    bos_id = tokenizer.bos_token_id
    pairs = [
        truncate(tokenize_pair(tokenizer, row), max_length, keep, bos_id) for row in progress(rows)
    ]
    misaligned = sum(pair.merged > MAX_MERGED_TOKENS for pair in pairs)
    if misaligned > MAX_MISALIGNED * len(pairs):
        raise UserError(
            f"in {misaligned} of {len(pairs)} pairs the conversation does not begin with the "
            "prompt as the model's chat template renders it for generation; such a template cannot "
            "be split into prompt and response; use another model or another template"
        )
    return pairs


def end_token_ids(tokenizer: PreTrainedTokenizerBase, generation_config=None) -> list[int]:
    """Ids that end an answer: EOS, those of the model's generation config, and the special token
    that the template writes after an answer.
    """
    configured = getattr(generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id}
    ids.update(configured if isinstance(configured, list) else [configured])
    # Render an answer and take the first special token that follows the prompt.
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    conversation = encode(tokenizer, render(tokenizer, [question, answer], generation_prompt=False))
    tail = conversation[common_prefix(conversation, prompt_ids(tokenizer, [question])) :]
    ids.update([i for i in tail if i in tokenizer.all_special_ids][:1])
    return sorted(i for i in ids if i is not None)
