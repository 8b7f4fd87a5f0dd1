"""The check of every pair after tokenising: do its tokens say what its messages say?

A chat template may leave out a text, write an answer after another prompt than the one that is
answered, or end it with nothing; truncation may cut off all that distinguishes two answers. None of
this is an error of the template, and none of it shows in a loss. So each pair's tokens are decoded
and compared with its texts.

    rows --chat.render_pair--> texts --chat.encode_pairs--> token ids --PairCheck--> pairs, BadPairs

A bad pair is left out and counted by its reason. What share of them is too many is decided by the
caller (training/assembly.py).
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from pref.files.console import UserError
from pref.model import chat, template
from pref.model.chat import PairIds, PairTexts, TokenPair
from pref.model.template import THOUGHT_TAGS

# A prompt rendered for generation may lose its last token or two to the response's first one
# (`[/INST] ` + `Hello`). A template that loses more writes a conversation differently from its
# prompt.
MAX_MERGED_TOKENS = 2
MIN_KNOWN = 0.9  # share of a text's characters that the tokenizer must have tokens for

REJECTED = "the chat template rejects the conversation"
CONTROL = "a text holds a control token"
NO_TEXT = "a text holds half a character"
EMPTY = "the chat template leaves no prompt or no response"
SEAM = "the conversation does not begin with the prompt that is answered"
HIDDEN = "the chat template leaves a text of the prompt out"
HIDDEN_ANSWER = "the chat template leaves out (a part of) an answer"
LEAD = "the chat template writes words before the answer that the prompt lacks"
ENDLESS = "a response does not end with an end token"
END_TWICE = "a response holds an end token twice"
SAME = "chosen and rejected become the same tokens"
SAME_CUT = "chosen and rejected become the same tokens when they are truncated"

# What a user can do about each.
REMEDIES = {
    REJECTED: "correct these rows, or use a model whose template takes such conversations",
    CONTROL: "remove it from the texts (prep_data.py takes whole chat templates off)",
    NO_TEXT: "correct these rows: a UTF-16 surrogate stands alone",
    EMPTY: "use another model or another template",
    SEAM: "thoughts in answers must go (answers are trained and given without), or use another "
    "template: its prompt for generation must be the beginning of the conversation",
    HIDDEN: "use a model whose template shows it, or remove it from the data",
    HIDDEN_ANSWER: "use a model whose template shows it, or remove it from the data",
    LEAD: "correct the template: with add_generation_prompt it must write all that precedes an "
    "answer",
    ENDLESS: "correct the template: an end token must follow each answer",
    END_TWICE: "correct the template: one end token must follow each answer",
    SAME: "use another model or another template, or correct the data",
    SAME_CUT: "raise --max_length",
}


LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class BadPair(NamedTuple):
    """A pair that cannot be trained on."""

    id: str
    reason: str  # a key of REMEDIES
    detail: str  # what exactly: the text that is missing, the token that is doubled
    ids: PairIds | None  # None if the template rejects the pair


class Checked(NamedTuple):
    """The pairs of a split that can be trained on, and the others."""

    rows: list[dict]
    pairs: list[TokenPair]
    bad: list[BadPair]
    forgotten: int  # pairs whose prompt holds thoughts that the template leaves out, as it should


class Bad(Exception):
    """Raised by a check: reason, detail."""


class Part(NamedTuple):
    """A text of a message that its tokens must say."""

    text: str
    is_json: bool = False  # of a tool or for one: templates may write it as JSON, in their own way


def tokenize_checked(
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    max_length: int,
    keep: str = "keep_end",
    append_eos: bool = False,
    progress: Callable[[list[dict]], Iterable[dict]] = iter,
) -> Checked:
    """Token ids of all pairs that pass the check, truncated, with their rows. append_eos: end each
    response with EOS. progress: wraps `rows` to show how far the loop has come.
    """
    check = PairCheck(tokenizer, append_eos)
    checked = Checked([], [], [], 0)
    forgotten = 0
    for batch in batches(progress(rows), chat.BATCH):
        texts: list[PairTexts] = []
        rendered: list[dict] = []
        for row in batch:
            try:
                texts.append(check.render(row))
                rendered.append(row)
            except Bad as bad:
                checked.bad.append(BadPair(row["id"], *bad.args, None))
        encoded = chat.encode_pairs(tokenizer, texts, append_eos)
        whole = list(map(chat.split_pair, encoded))
        decoded = check.decode(encoded, whole)
        for row, text, ids, pair, said in zip(rendered, texts, encoded, whole, decoded):
            try:
                check.check(row, text, ids, pair, said)
                cut = chat.truncate(pair, max_length, keep, tokenizer.bos_token_id)
                if cut.chosen == cut.rejected:
                    raise Bad(SAME_CUT, f"{max_length} tokens of prompt + response")
            except Bad as bad:
                checked.bad.append(BadPair(row["id"], *bad.args, ids))
                continue
            checked.rows.append(row)
            checked.pairs.append(cut)
            forgotten += has_forgotten_thoughts(row, text)
    return checked._replace(forgotten=forgotten)


def batches(rows: Iterable[dict], size: int) -> Iterator[list[dict]]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


# ---- the check -----------------------------------------------------------------------------------


class PairCheck:
    """The checks of one tokenizer. Every method that checks raises Bad(reason, detail)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, append_eos: bool):
        self.tokenizer = tokenizer
        # Added tokens too, such as <think>, but for those of white space, which Gemma has.
        self.special = set(tokenizer.all_special_ids) | {
            number
            for number, token in tokenizer.added_tokens_decoder.items()
            if str(token).strip(" \n\t\r▁")
        }
        self.control = template.any_of(template.control_tokens(tokenizer))
        self.ends = set(chat.end_token_ids(tokenizer))
        self.is_ended = append_eos or template.form_of(tokenizer).end is not None

    def render(self, row: dict) -> PairTexts:
        """The pair as text."""
        for side in ("prompt", "chosen", "rejected"):
            for text in (text for message in row[side] for text in texts_of(message)):
                if found := self.control.search(text):
                    raise Bad(CONTROL, f"{found.group()} in {side}: {around(text, found)}")
                if not text.isascii() and (found := LONE_SURROGATE.search(text)):
                    raise Bad(NO_TEXT, f"{found.group()!a} in {side}")
        try:
            return chat.render_pair(self.tokenizer, row)
        except UserError as error:
            raise Bad(REJECTED, str(error).rpartition("rejects a conversation: ")[2]) from None

    def decode(self, encoded: list[PairIds], pairs: list[TokenPair]) -> list[PairTexts]:
        """What the tokens of prompts and responses say, special tokens included."""
        ids = [
            part
            for whole, pair in zip(encoded, pairs)
            for part in (whole.prompt, pair.chosen, pair.rejected)
        ]
        decode = self.tokenizer.batch_decode
        texts = iter(decode(ids, clean_up_tokenization_spaces=False) if ids else [])
        return [PairTexts(prompt, next(texts), next(texts)) for prompt in texts]

    def check(
        self, row: dict, text: PairTexts, ids: PairIds, pair: TokenPair, said: PairTexts
    ) -> None:
        """A pair before truncation. text: as the template writes it. ids: of `text`. said: what
        prompt and responses say, decoded.
        """
        # 1) Prompt and responses are two parts of one conversation.
        if not all((pair.prompt, pair.chosen, pair.rejected)):
            raise Bad(EMPTY, "")
        lost = ids.prompt[len(pair.prompt) :]
        if len(lost) > MAX_MERGED_TOKENS or self.special.intersection(lost):
            raise Bad(SEAM, f"{len(lost)} tokens of the prompt are not in it")

        # 2) The prompt says what its messages say.
        self.check_tools(row, text)
        self.check_prompt(row["prompt"], text.prompt, said.prompt)

        # 3) The responses say what the answers say, from the beginning to the end token.
        for side in ("chosen", "rejected"):
            answer, response = row[side][0], getattr(said, side)
            self.check_answer(answer, getattr(text, side), response, self.tokenizer.decode(lost))
            self.check_end(answer, getattr(pair, side))
        if pair.chosen == pair.rejected:
            raise Bad(SAME, "")

    def says(self, rendered: str, decoded: str, part: Part) -> bool:
        """Whether a text is part of what the template wrote and of what the tokens say. A tokenizer
        may normalise: then the tokens must say what the text's own tokens say.
        """
        text = part.text
        if text in decoded or (part.is_json and json_free(text) in json_free(decoded)):
            return True
        if text not in rendered:
            return False
        ids = chat.encode(self.tokenizer, text)
        own = squeezed(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        unknown = len(squeezed(self.tokenizer.unk_token or ""))
        known = len(own) - unknown * ids.count(self.tokenizer.unk_token_id)
        return known >= MIN_KNOWN * len(squeezed(text)) and own in squeezed(decoded)

    def check_prompt(self, messages: list[dict], rendered: str, decoded: str) -> None:
        """The prompt says each message, in their order; the system message stands anywhere."""
        end = 0  # of what was found so far
        for message in messages:
            start = 0 if message["role"] == "system" else end
            for part in parts_of(message, is_answer=False):
                found = decoded.find(part.text, start)
                if found >= 0:
                    end = max(end, found + len(part.text))
                elif part.text in decoded or not self.says(rendered, decoded, part):
                    raise Bad(HIDDEN, f"{message['role']}: {shortened(part.text)}")

    def check_tools(self, row: dict, text: PairTexts) -> None:
        """Without the tools, or without the calls of tools, the template would write another text.
        Their names alone prove nothing: the user may have written them.
        """
        if row.get("tools"):
            bare = self.written(row | {"tools": None})
            names = [tool.get("function", tool).get("name", "") for tool in row["tools"]]
            if (bare and bare.prompt == text.prompt) or any(n not in text.prompt for n in names):
                raise Bad(HIDDEN, "the tools")
        for side, reason in (
            ("prompt", HIDDEN),
            ("chosen", HIDDEN_ANSWER),
            ("rejected", HIDDEN_ANSWER),
        ):
            if any(message.get("tool_calls") for message in row[side]):
                bare = self.written(row | {side: list(map(without_calls, row[side]))})
                if bare and getattr(bare, side) == getattr(text, side):
                    raise Bad(reason, "a tool call")

    def written(self, row: dict) -> PairTexts | None:
        """The pair as text; None if the template rejects it."""
        try:
            return chat.render_pair(self.tokenizer, row)
        except UserError:
            return None

    def check_answer(self, answer: dict, rendered: str, response: str, merged: str) -> None:
        """The response says all of the answer, and nothing before it but thoughts' tags and special
        tokens: the words that introduce an answer must be in the prompt that is answered. merged:
        the end of the prompt, if it is part of the response's first token.
        """
        parts = parts_of(answer, is_answer=True)
        for part in parts:
            if not self.says(rendered, response, part):
                raise Bad(HIDDEN_ANSWER, shortened(part.text))
        if answer["content"].strip():
            lead = response[: max(0, min(response.find(part.text) for part in parts))]
            lead = THOUGHT_TAGS.sub("", self.control.sub("", lead.removeprefix(merged))).strip()
            if lead:
                raise Bad(LEAD, shortened(lead))

    def check_end(self, answer: dict, response: list[int]) -> None:
        """The response ends with an end token. Different ones may follow one another, with white
        space between them; a call of tools may end with another special token.
        """
        if not self.is_ended:
            return
        ends = [i for i in response if i in self.ends]
        if not ends:
            if not (answer.get("tool_calls") and self.special.intersection(response)):
                raise Bad(ENDLESS, "")
            return
        if len(ends) > len(set(ends)):
            raise Bad(END_TWICE, self.tokenizer.decode(ends))
        tail = response[response.index(ends[0]) :]
        others = [i for i in tail if i not in self.ends]
        if others and self.tokenizer.decode(others).strip():
            raise Bad(ENDLESS, f"{shortened(self.tokenizer.decode(tail))} follows the answer")


# ---- what messages say ---------------------------------------------------------------------------


def texts_of(message: dict) -> Iterator[str]:
    """All texts of a message in which a control token could stand."""
    yield message["content"]
    if message.get("reasoning_content"):
        yield message["reasoning_content"]
    for call in message.get("tool_calls") or ():
        yield from leaves(call)


def parts_of(message: dict, is_answer: bool) -> list[Part]:
    """The texts that a template must show of a message, without white space around them. Of the
    assistant's earlier messages not their thoughts, which most templates leave out, as the model
    expects it.
    """
    parts = [Part(message["content"], is_json=message["role"] == "tool")]
    if message["role"] == "assistant":
        content = THOUGHT_TAGS.split(message["content"])
        thoughts = [message.get("reasoning_content") or "", *content[:-1]]
        parts = [Part(text) for text in (*(thoughts if is_answer else ()), content[-1])]
        for call in message.get("tool_calls") or ():
            call = template.with_read_arguments(call)
            function = call.get("function", call) if isinstance(call, dict) else {"name": call}
            texts = leaves([function.get("name"), function.get("arguments")])
            parts += [Part(text, is_json=True) for text in texts]
    parts = [part._replace(text=part.text.strip()) for part in parts]
    return [part for part in parts if part.text]


def leaves(value: object) -> Iterator[str]:
    """The texts and numbers in nested lists and dictionaries, as JSON writes them."""
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list):
        for item in value:
            yield from leaves(item)
    elif value is not None:
        yield value if isinstance(value, str) else json.dumps(value)


def without_calls(message: dict) -> dict:
    return {key: value for key, value in message.items() if key != "tool_calls"}


def has_forgotten_thoughts(row: dict, text: PairTexts) -> bool:
    """Whether an earlier answer's thoughts are not in the prompt."""
    for message in row["prompt"]:
        if message["role"] == "assistant":
            *thoughts, _ = THOUGHT_TAGS.split(message["content"])
            thoughts.append(message.get("reasoning_content") or "")
            if any(part.strip() and part.strip() not in text.prompt for part in thoughts):
                return True
    return False


def squeezed(text: str) -> str:
    """A text without what tokenizers normalise: white space, case, forms of one letter."""
    return re.sub(r"\s+", "", unicodedata.normalize("NFKC", text).casefold())


def json_free(text: str) -> str:
    """The letters and digits of a text in which JSON may be written in any way."""
    return re.sub(r"\W+", "", re.sub(r'\\+[nrt"\\/]', " ", text))


def around(text: str, found: re.Match, length: int = 40) -> str:
    """What was found, with the text around it."""
    start, end = max(0, found.start() - length), found.end() + length
    return json.dumps(
        f"{'...' if start else ''}{text[start:end]}{'...' if end < len(text) else ''}",
        ensure_ascii=False,
    )


def shortened(text: str, length: int = 60) -> str:
    text = text if len(text) <= length else f"{text[:length]}..."
    return json.dumps(text, ensure_ascii=False)


# ---- for the terminal ----------------------------------------------------------------------------


def count_reasons(bad: list[BadPair]) -> dict[str, int]:
    """How many pairs there are of each reason, the most frequent first."""
    reasons = [pair.reason for pair in bad]
    return {r: reasons.count(r) for r in sorted(set(reasons), key=reasons.count, reverse=True)}


def example_text(tokenizer: PreTrainedTokenizerBase, bad: BadPair) -> str:
    """A bad pair for a reader: what is wrong, and its text decoded, with the tokens one by one
    where prompt and response meet.
    """
    detail = f" ({bad.detail})" if bad.detail else ""
    lines = [f"pair {bad.id}: {bad.reason}{detail}"]
    if bad.ids is not None:
        pair = chat.split_pair(bad.ids)
        prompt = pair.prompt + bad.ids.prompt[len(pair.prompt) :]
        lines.append(f"  prompt    {seam_text(tokenizer, prompt, at_end=True)}")
        lines.append(f"  chosen    {seam_text(tokenizer, pair.chosen, at_end=False)}")
        lines.append(f"  rejected  {seam_text(tokenizer, pair.rejected, at_end=False)}")
    return "\n".join(lines)


def seam_text(tokenizer: PreTrainedTokenizerBase, ids: list[int], at_end: bool) -> str:
    """Token ids as text, those at one end of it one by one: "...text" | "to" | "ken"."""
    near, far = (ids[-8:], ids[:-8]) if at_end else (ids[:8], ids[8:])
    tokens = [json.dumps(tokenizer.decode([i]), ensure_ascii=False) for i in near]
    text = tokenizer.decode(far)
    if len(text) > 200:
        text = "..." + text[-200:] if at_end else text[:100] + "..." + text[-100:]
    rest = [json.dumps(text, ensure_ascii=False)] if far else []
    return " | ".join([*rest, *tokens] if at_end else [*tokens, *rest])
