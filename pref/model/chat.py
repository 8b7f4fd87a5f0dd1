"""Chat template and tokenisation: how messages become token ids, for training, answering and
judging alike.

The whole conversation goes through the model's own template and is tokenised in one piece; the
prompt's end is where its ids and the conversation's stop agreeing. No special token is added
outside the template, so there is never a second BOS, and EOS stands where the template puts it.
"""

from typing import NamedTuple

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pref.files.console import UserError

# A prompt rendered for generation may lose its last token or two to the response's first (`[/INST]
# ` + `Hello`). Losing more means that the template writes a conversation otherwise than its prompt:
# no place to split it.
MAX_MERGED_TOKENS = 2
MAX_MISALIGNED = 0.01  # share of pairs


class TokenPair(NamedTuple):
    """Token ids of one preference pair: a shared prompt and two responses, each of at least one
    token.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    merged: int = 0  # tokens at the prompt's end that became part of the response
    cut_prompt: int = 0  # tokens cut to keep within max_length
    cut_response: int = 0

    @property
    def tokens(self) -> int:
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Tokenizer of a hub id or folder, with a chat template and a padding token. Raises
    UserError.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {model}: no tokenizer there ({first_line(error)})") from None
    if tokenizer.chat_template is None:
        raise UserError(
            f"--model {model}: its tokenizer has no chat template; use a chat (instruct) model or set "
            "chat_template in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], generation_prompt: bool
) -> str:
    """The conversation as text, through the model's template.

    A template that refuses a system message (Gemma, older Mistral) gets it at the head of the first
    user message. Raises UserError if the template refuses the conversation all the same.
    """
    try:
        # A template that writes today's date (Llama 3) gets a fixed one: another day would be
        # another prompt.
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            date_string="26 Jul 2024",
        )
    except TemplateError as error:
        if messages[0]["role"] != "system":
            raise UserError(
                f"the model's chat template refuses a conversation: {first_line(error)}"
            ) from None
    first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return render(tokenizer, [first, *messages[2:]], generation_prompt)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of rendered text; the template has already written every special token."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> list[int]:
    """Token ids of a conversation that the model is to answer."""
    return encode(tokenizer, render(tokenizer, messages, generation_prompt=True))


def common_prefix(*sequences: list[int]) -> int:
    length = min(map(len, sequences))
    for i in range(length):
        if any(s[i] != sequences[0][i] for s in sequences[1:]):
            return i
    return length


def tokenize_pair(tokenizer: PreTrainedTokenizerBase, pair: dict) -> TokenPair:
    """Token ids of a pair row, split at the longest prefix that the prompt shares with both
    conversations.

    Where the template's end and the response merge into one token (SentencePiece after `[/INST] `),
    that token belongs to the response. Raises UserError if a response comes out empty.
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
            f"pair {pair['id']}: the model's chat template leaves no prompt or no response to compare"
        )
    return TokenPair(prompt[:split], chosen[split:], rejected[split:], merged=len(prompt) - split)


def truncate(pair: TokenPair, max_length: int, keep: str, bos_id: int | None) -> TokenPair:
    """`pair` with prompt + longer response within `max_length` tokens.

    'keep_end' cuts the prompt first, keeping its end and a leading BOS, to no less than a quarter
    of max_length; only then are the responses' ends cut. 'keep_start' is TRL's: the first
    max_length tokens, so that the responses' ends are cut; a prompt that alone fills max_length
    (TRL drops the pair) keeps its start, of the length that 'keep_end' would leave. No response is
    ever emptied.
    """
    over = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) - max_length
    if over <= 0:
        return pair
    kept = max(len(pair.prompt) - over, min(len(pair.prompt), max(max_length // 4, 1)))
    if keep == "keep_start":
        kept = len(pair.prompt) if len(pair.prompt) < max_length else kept
        prompt = pair.prompt[:kept]
    elif pair.prompt[0] == bos_id and kept > 1:
        prompt = [bos_id, *pair.prompt[len(pair.prompt) - kept + 1 :]]
    else:
        prompt = pair.prompt[len(pair.prompt) - kept :]
    room = max_length - kept
    cut_response = sum(max(0, len(r) - room) for r in (pair.chosen, pair.rejected))
    return pair._replace(
        prompt=prompt,
        chosen=pair.chosen[:room],
        rejected=pair.rejected[:room],
        cut_prompt=len(pair.prompt) - kept,
        cut_response=cut_response,
    )


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    max_length: int,
    keep: str = "keep_end",
    progress=iter,
) -> list[TokenPair]:
    """Token ids of all pairs, truncated. `progress` wraps the iterable (tqdm).

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
            f"in {misaligned} of {len(pairs)} pairs the conversation does not begin with the prompt as the model's "
            "chat template renders it for generation; such a template cannot be split into prompt and response"
        )
    return pairs


def end_token_ids(tokenizer: PreTrainedTokenizerBase, generation_config=None) -> list[int]:
    """Ids that end an answer: EOS, the model's own list, and the special token the template puts
    after an answer.
    """
    ids = {tokenizer.eos_token_id}
    configured = getattr(generation_config, "eos_token_id", None)
    ids.update(configured if isinstance(configured, list) else [configured])
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    conversation = encode(tokenizer, render(tokenizer, [user, answer], generation_prompt=False))
    tail = conversation[common_prefix(conversation, prompt_ids(tokenizer, [user])) :]
    ids.update([i for i in tail if i in tokenizer.all_special_ids][:1])
    return sorted(i for i in ids if i is not None)
