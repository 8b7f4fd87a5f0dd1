"""Chat template and tokenisation: how messages become token ids.

Training, answering and judging all render through `render`, with the same options (template.py).

    messages --render--> text --encode--> token ids --split_pair, truncate--> TokenPair

A conversation goes through the model's own template as a whole and is tokenised in one piece. Its
prompt ends where the conversation's token ids stop agreeing with those of the prompt. No special
token is added outside the template: there is never a second BOS, and EOS is where the template
puts it. Whether a pair then says what its messages say is checked in token_check.py.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from jinja2 import TemplateSyntaxError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pref.files.console import UserError, first_line
from pref.model import template
from pref.model.template import (
    NO_THOUGHTS,
    NO_THOUGHTS_AT_END,
    TEMPLATE_ERRORS,
    THOUGHTS,
    close_thoughts,
    form_of,
)
from pref.model.weights import LFS_POINTER

BATCH = 256  # pairs that are tokenised in one call


class PairTexts(NamedTuple):
    """A pair as the template writes it: the prompt that is answered, and both conversations."""

    prompt: str
    chosen: str
    rejected: str


class PairIds(NamedTuple):
    """Token ids of PairTexts."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


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


# ---- the tokenizer ------------------------------------------------------------------------------


def load_tokenizer(model: str, argument: str = "--model ") -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or folder, with a chat template and a padding token.

    argument: what the model was given with, for messages. Raises UserError if there is no
    tokenizer, its code would have to be run from the model's folder, it has no template that can
    be used, or nothing that could end an answer.
    """
    place = f"{argument}{model}"
    tokenizer = load_bare_tokenizer(model, place)
    check_template(tokenizer, Path(model), place)
    end = form_of(tokenizer).end
    if tokenizer.eos_token_id is None and end is None:
        raise UserError(
            f"{place}: its tokenizer has no EOS token and its chat template ends no answer, so "
            "that answers could never end; set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:  # masked wherever it is used, so that any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(end)
    return tokenizer


def load_bare_tokenizer(model: str, place: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or folder, which may have no chat template. Raises UserError,
    beginning with `place`, if there is none that can be used.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{place}: {why_no_tokenizer(Path(model), error)}") from None
    plain = tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()
    if not plain - set(tokenizer.all_special_tokens):
        raise UserError(f"{place}: its tokenizer has no vocabulary; {COMPLETE}")
    return tokenizer


COMPLETE = "give a model whose folder is complete, tokenizer.json included"


def why_no_tokenizer(folder: Path, error: Exception) -> str:
    """What is wrong and what to do, after an error of AutoTokenizer.from_pretrained."""
    if "trust_remote_code" in str(error):
        return (
            "its tokenizer is Python code in the model's folder, which is never run here; use a "
            "version of the model that transformers supports itself"
        )
    for file in [*folder.glob("tokenizer*.json"), *folder.glob("*.model")]:
        with open(file, "rb") as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                return f"{file.name} is a Git LFS pointer, not the file; run git lfs pull there"
    if folder.is_file():
        return "is a file; give the model's folder"
    where = "" if folder.is_dir() else "no such folder here; as a hub id: "
    if isinstance(error, OSError):
        return f"no tokenizer there ({where}{first_line(error)})"
    return (
        f"its tokenizer cannot be loaded ({where}{type(error).__name__}: {first_line(error)}); "
        f"{COMPLETE} (a tokenizer.model alone needs the package sentencepiece)"
    )


def check_template(tokenizer: PreTrainedTokenizerBase, folder: Path, place: str) -> None:
    """Raise UserError unless the tokenizer has one chat template that can be read."""
    named = tokenizer.chat_template or {f.stem: "" for f in folder.glob("chat_templates/*.jinja")}
    if not named:
        raise UserError(
            f"{place}: its tokenizer has no chat template; use a chat (instruct) model or "
            "set chat_template in its tokenizer_config.json"
        )
    if isinstance(named, dict) and "default" not in named:
        raise UserError(
            f"{place}: its chat templates are named {', '.join(sorted(named))}, and none is the "
            "default one; make the one to use chat_template.jinja in its folder"
        )
    for text in named.values() if isinstance(named, dict) else [named]:
        try:
            template.pin_date(text)
            template.compiled(text)
        except TemplateSyntaxError as error:
            raise UserError(
                f"{place}: its chat template is no Jinja template (line {error.lineno}: "
                f"{first_line(error)}); correct it"
            ) from None


# ---- from messages to text ----------------------------------------------------------------------


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict],
    generation_prompt: bool,
    tools: list[dict] | None = None,
) -> str:
    """The conversation as text, by the model's template and TEMPLATE_OPTIONS.

    generation_prompt: end with what precedes the assistant's next message. tools: schemas of
    functions. Raises one of TEMPLATE_ERRORS if the template rejects the conversation.
    """
    parts = form_of(tokenizer).parts
    return template.call_template(tokenizer, messages, generation_prompt, tools, parts)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict],
    generation_prompt: bool,
    tools: list[dict] | None = None,
) -> str:
    """`apply_template` for any conversation.

    If the template rejects a system message (Gemma, older Mistral) or leaves it out (Phi-3-mini),
    its text is put before the first user message. A prompt for generation ends with a closed, empty
    block of thoughts if the template opens thoughts there, or writes such a block before answers
    alone. Raises UserError if the template rejects the conversation.
    """
    has_system = messages[0]["role"] == "system"
    if has_system and not form_of(tokenizer).shows_system:
        return render(tokenizer, without_system(messages), generation_prompt, tools)
    try:
        text = apply_template(tokenizer, messages, generation_prompt, tools)
    except TEMPLATE_ERRORS as error:
        if has_system:
            return render(tokenizer, without_system(messages), generation_prompt, tools)
        raise UserError(
            f"the model's chat template rejects a conversation: {first_line(error)}"
        ) from None
    return close_thoughts(text) + form_of(tokenizer).no_thoughts if generation_prompt else text


def without_system(messages: list[dict]) -> list[dict]:
    """The conversation with its system message at the head of the first user message."""
    system, *others = messages
    for number, message in enumerate(others):
        if message["role"] == "user":
            texts = [m["content"] for m in (system, message) if m["content"].strip()]
            others[number] = message | {"content": "\n\n".join(texts)}
            break
    return others


def render_answered(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    messages: list[dict],
    tools: list[dict] | None = None,
) -> str:
    """The conversation `messages`, whose last message answers `prompt` (from `render`).

    Where the template writes an empty block of thoughts at the prompt's end and not in the
    conversation, the conversation gets it too: the answer is trained where it will be given.

        prompt                 <|User|>Hi<|Assistant|><think>\n\n</think>\n\n
        by the template        <|User|>Hi<|Assistant|>Hello!<|end|>
        here                   <|User|>Hi<|Assistant|><think>\n\n</think>\n\nHello!<|end|>
    """
    text = render(tokenizer, messages, generation_prompt=False, tools=tools)
    if text.startswith(prompt) or not (thoughts := NO_THOUGHTS_AT_END.search(prompt)):
        return text
    if not text.startswith(prompt[: thoughts.start()]):
        return text
    answer = text[thoughts.start() :]
    answer = answer[match.end() :] if (match := NO_THOUGHTS.match(answer)) else answer
    return text if answer.lstrip().startswith(tuple(THOUGHTS)) else prompt + answer


def render_pair(tokenizer: PreTrainedTokenizerBase, pair: dict) -> PairTexts:
    """A pair (a row of prep_data.py) as text. Raises UserError if the template rejects it."""
    tools = pair.get("tools")
    prompt = render(tokenizer, pair["prompt"], generation_prompt=True, tools=tools)
    chosen, rejected = (
        render_answered(tokenizer, prompt, [*pair["prompt"], *pair[side]], tools)
        for side in ("chosen", "rejected")
    )
    return PairTexts(prompt, chosen, rejected)


# ---- from text to token ids ---------------------------------------------------------------------


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of rendered text. The template has already written every special token."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, texts: list[PairTexts], append_eos: bool = False
) -> list[PairIds]:
    """Token ids of pairs, in one call. append_eos: end both conversations with EOS."""
    if not texts:
        return []
    ids = tokenizer([text for pair in texts for text in pair], add_special_tokens=False)
    ids = iter(ids["input_ids"])
    end = [tokenizer.eos_token_id] if append_eos else []
    return [PairIds(prompt, next(ids) + end, next(ids) + end) for prompt in ids]


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


def split_pair(ids: PairIds) -> TokenPair:
    """The prompt and both responses, not truncated.

    The split is at the longest prefix that the prompt shares with both conversations. Where the end
    of the template and the response merge into one token, that token belongs to the response:

        prompt    <s> [INST] Hi [/INST] _             "_" is the template's last space
        chosen    <s> [INST] Hi [/INST] _Hello </s>   one token "_Hello"
        rejected  <s> [INST] Hi [/INST] _Go away </s>
                                       ^ split, merged = 1

    Prompt or response are empty if the conversations share nothing with the prompt or end with it.
    """
    prompt, chosen, rejected = ids
    split = min(common_prefix(prompt, chosen), common_prefix(prompt, rejected))
    return TokenPair(prompt[:split], chosen[split:], rejected[split:], merged=len(prompt) - split)


def tokenize_pair(
    tokenizer: PreTrainedTokenizerBase, pair: dict, append_eos: bool = False
) -> TokenPair:
    """Token ids of a pair (a row of prep_data.py), not truncated and not checked.

    Raises UserError if the prompt or a response would be empty.
    """
    (ids,) = encode_pairs(tokenizer, [render_pair(tokenizer, pair)], append_eos)
    tokens = split_pair(ids)
    if not all((tokens.prompt, tokens.chosen, tokens.rejected)):
        raise UserError(
            f"pair {pair['id']}: the model's chat template leaves no prompt or no response to "
            "compare"
        )
    return tokens


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
    """Token ids of all pairs, truncated and not checked: see token_check.tokenize_checked.
    progress: wraps `rows` to show how far the loop has come.
    """
    bos_id = tokenizer.bos_token_id
    return [
        truncate(tokenize_pair(tokenizer, row), max_length, keep, bos_id) for row in progress(rows)
    ]


def end_token_ids(tokenizer: PreTrainedTokenizerBase, generation_config=None) -> list[int]:
    """Ids that end an answer: EOS, those of the model's generation config, and the token that the
    template writes after an answer.
    """
    configured = getattr(generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, form_of(tokenizer).end}
    ids.update(configured if isinstance(configured, list) else [configured])
    return sorted(i for i in ids if i is not None)
