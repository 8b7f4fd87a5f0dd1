"""A reward model's score of a conversation's last message, computed for many of them at once.

    conversation --encode--> Row, token ids --width--> rows of one width --compute--> scores

Three kinds of reward models are computed, all others are refused by name:

    decoder   a linear layer on the last token: Skywork-Reward (Qwen 3, Llama), what TRL trains
    armo      ArmoRM, see reward_armo.py
    pair      an encoder that reads question and answer: reward-model-deberta and its kin

A score must not depend on what else is scored. Rows are padded on the right, where a decoder's
earlier tokens cannot see it; an encoder gets a mask. In bf16, and in the last digits of fp32, the
result of a matrix product also changes with the shape of its operands. Hence the shape of a batch
follows from the length of its rows alone: the width is the length rounded up, the number of rows
BATCH_TOKENS / width, and copies fill a batch up. A row then has the same score in any batch.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pref.files import tensor_files
from pref.files.console import UserError
from pref.judging import reward_armo
from pref.model import architecture, chat, loading, logps, template, weights
from pref.model.weights import ModelFiles

OPTION = "--judge rm:"
# Tokens of a batch, padding included; a longer row is a batch of its own. By device: more make no
# CPU faster, and more is computed in vain where copies fill a batch up.
BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
# Encoders that are tested to read a question and an answer as transformers does.
PAIR_ENCODERS = ("bert", "deberta", "deberta-v2", "electra", "roberta", "xlm-roberta")
HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")


class Row(NamedTuple):
    """A conversation as token ids."""

    ids: list[int]
    kinds: list[int]  # of a pair: 0 for the question's tokens, 1 for the answer's; else empty


class Scorer(NamedTuple):
    """A reward model that is ready to score."""

    tokenizer: PreTrainedTokenizerBase
    encode: Callable[[list[dict]], Row]  # raises UserError if the template rejects the messages
    compute: Callable[[list[Row], int], list[float]]  # rows of one width, which is their length
    limit: int | None  # tokens of the longest conversation that it can score
    parameters: dict  # what determines a score
    params_b: float  # billions of parameters


class Place(NamedTuple):
    """Where a reward model is, and how it is to be loaded."""

    files: ModelFiles
    config: PreTrainedConfig
    dtype: torch.dtype
    device: torch.device
    name: str  # what messages to the user begin with


def load(path: str, dtype: str) -> Scorer:
    """The reward model of a folder or hub id, on the GPU if there is one.

    Raises UserError for what is no reward model, or one that cannot be computed as it was trained.
    """
    device = torch.device(device_type())
    place = Place(
        files=weights.find_model(path, OPTION, classifier=True),
        config=AutoConfig.from_pretrained(path, num_labels=1, trust_remote_code=False),
        dtype=loading.pick_dtype(dtype, device),
        device=device,
        name=f"{OPTION}{path}",
    )
    open_kind = {"decoder": open_decoder, "armo": open_armo, "pair": open_pair}
    return open_kind[kind_of(place)](place)


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# ---- which kind it is ----------------------------------------------------------------------------


def kind_of(place: Place) -> str:
    """Its kind: decoder, armo or pair. Raises UserError for what is none of them."""
    name = (place.files.config.get("architectures") or [""])[0]
    if name == reward_armo.ARCHITECTURE:
        return "armo"
    if name and not hasattr(transformers, name):
        raise UserError(
            f"{place.name}: {name} is code that comes with the model, which is never run here; "
            "give a reward model that transformers has itself, such as Skywork-Reward-V2, or ArmoRM"
        )
    check_head(place)
    if not architecture.of_config(place.config).refused:
        return "decoder"
    if place.config.model_type in PAIR_ENCODERS:
        return "pair"
    raise UserError(
        f"{place.name}: {name} ({place.config.model_type}) is no decoder, and none of the encoders "
        f"that read a question and an answer ({', '.join(PAIR_ENCODERS)}); give another reward "
        "model"
    )


def check_head(place: Place) -> None:
    """Raise UserError unless the checkpoint has a head that gives one number.

    transformers would make a head that is not there of random numbers.
    """
    files = place.files
    if not files.is_local:
        return  # its weights are not here yet; load_model sees the same, after the download
    paths = weights.weight_files(files.folder, files.config, place.name)
    if any(path.suffix != ".safetensors" for path in paths):
        return
    stored = {t.name: t.form for path in paths for t in tensor_files.tensors_of(path, place.name)}
    head = next((stored[name] for name in HEADS if name in stored), None)
    if head is None:
        name = (files.config.get("architectures") or ["it"])[0]
        raise UserError(
            f"{place.name}: its checkpoint has no score head ({HEADS[0]}): {name} is no reward "
            "model, and would score with random numbers; give the folder or hub id of a reward "
            "model"
        )
    labels = int(head.partition("[")[2].partition(",")[0])  # "F32 [2, 64]": 2 labels
    if labels != 1:
        names = ", ".join(map(str, files.config.get("id2label", {}).values()))
        raise UserError(
            f"{place.name}: its head gives {labels} numbers ({names or 'without names'}): it is "
            "another classifier; a reward model gives one (num_labels 1)"
        )


# ---- decoders ------------------------------------------------------------------------------------


def open_decoder(place: Place) -> Scorer:
    """A causal model with a linear layer, `score`, on its last token."""
    tokenizer = open_tokenizer(place)
    model = load_classifier(place)
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"{place.name}: {type(model).__name__} has no linear head named score; give another "
            "reward model"
        )
    if not head.weight.any():
        raise UserError(
            f"{place.name}: its head, score.weight, is zero throughout: it has not been trained, "
            "and would give every answer the same score"
        )
    backbone = getattr(model, model.base_model_prefix)
    return causal_scorer(place, tokenizer, backbone, partial(read_last, head), "reward", model)


def read_last(head: nn.Linear, hidden: Tensor, ids: list[int], last: int) -> Tensor:
    """The score of a row with hidden states (L, H): the head on those of its last token."""
    if type(head) is not nn.Linear:  # quantised
        return head(hidden[last]).float()
    # In fp32 for a bf16 model too: there, scores around 20 are an eighth apart.
    score = head.weight.float() @ hidden[last].float()
    return score if head.bias is None else score + head.bias.float()


def open_armo(place: Place) -> Scorer:
    """ArmoRM: a plain Llama and the head of reward_armo.py."""
    tokenizer = open_tokenizer(place)
    before = chat.encode(tokenizer, reward_armo.BEFORE_ANSWER)
    if reward_armo.find_prompt_end(encode_chat(tokenizer, EXAMPLE).ids, before) is None:
        raise UserError(
            f"{place.name}: its chat template does not write Llama 3's header before an answer, "
            "which ArmoRM's gates are read at; restore the model's own tokenizer files"
        )
    head, files = reward_armo.ArmoHead(place.files.config), place.files
    names = head.state_dict().keys()
    backbone = loading.load_model(
        files, place.dtype, place.device, option=OPTION, auto=AutoModel, elsewhere=names
    ).eval()
    # Of a hub id the weight files are here only now.
    paths = weights.weight_files(files.folder, files.config, place.name)
    reward_armo.fill(head, paths, place.name)
    head.requires_grad_(False).to(place.device)

    def read(hidden: Tensor, ids: list[int], last: int) -> Tensor:
        prompt = reward_armo.find_prompt_end(ids, before)
        return head(hidden[last].float(), hidden[prompt].float())

    return causal_scorer(place, tokenizer, backbone, read, "reward_armo", backbone, head)


def causal_scorer(
    place: Place,
    tokenizer: PreTrainedTokenizerBase,
    backbone: PreTrainedModel,
    read: Callable[[Tensor, list[int], int], Tensor],
    method: str,
    *modules: nn.Module,
) -> Scorer:
    """The scorer of a decoder whose score is read from the backbone's hidden states."""
    known = architecture.of_config(place.config)
    logps.set_attention(backbone, known.attention)
    limits = (known.made_for, known.constant, model_max_length(tokenizer))
    return Scorer(
        tokenizer=tokenizer,
        encode=partial(encode_chat, tokenizer),
        compute=partial(compute_causal, backbone, read, place.config.pad_token_id),
        limit=min((limit for limit in limits if limit), default=None),
        parameters=describe(place, method, template.identity(tokenizer)),
        params_b=size_of(*modules),
    )


@torch.inference_mode()
def compute_causal(
    backbone: PreTrainedModel,
    read: Callable[[Tensor, list[int], int], Tensor],
    pad_id: int | None,
    rows: list[Row],
    width: int,
) -> list[float]:
    """Scores of `rows`, which are at most rows_of(width). read: hidden states (L, H), token ids
    and the position of the last token -> the score.
    """
    ids = padded([row.ids for row in rows], width, padding=0).to(backbone.device)  # (R, L)
    # Causal attention needs no mask: what pads a row comes after all that is read.
    hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state  # (R, L, H)
    # Each row by itself: a product with all rows would depend on their number.
    scores = (
        read(states, row.ids, last_token(row.ids, pad_id)) for states, row in zip(hidden, rows)
    )
    return [score.item() for score in scores]


def last_token(ids: list[int], pad_id: int | None) -> int:
    """The position that a decoder's score is read at, as in transformers: the last one that does
    not hold the padding token, even if the template ends with that token.
    """
    return next((i for i in range(len(ids) - 1, -1, -1) if ids[i] != pad_id), 0)


# ---- encoders of pairs ---------------------------------------------------------------------------


def open_pair(place: Place) -> Scorer:
    """An encoder that reads [CLS] question [SEP] answer [SEP] and has one label."""
    tokenizer = chat.load_bare_tokenizer(place.files.name, place.name)
    check_pair_tokenizer(tokenizer, place)
    model = load_classifier(place)
    limit = place.config.max_position_embeddings
    if "roberta" in place.config.model_type:
        limit -= tokenizer.pad_token_id + 1  # its positions begin behind the padding token's id
    limits = (limit, model_max_length(tokenizer))
    return Scorer(
        tokenizer=tokenizer,
        encode=partial(encode_pair, tokenizer),
        compute=partial(compute_pairs, model, tokenizer.pad_token_id),
        limit=min(limit for limit in limits if limit),
        parameters=describe(place, "reward_pair", None),
        params_b=size_of(model),
    )


def check_pair_tokenizer(tokenizer: PreTrainedTokenizerBase, place: Place) -> None:
    """Raise UserError unless it marks where an answer begins, and can pad."""
    if tokenizer.chat_template:
        raise UserError(
            f"{place.name}: an encoder ({place.config.model_type}) with a chat template; encoders "
            "are scored with the pair (question, answer) alone, and this one expects something else"
        )
    apart = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Hi", "Hello")]
    if len(tokenizer("Hi", "Hello")["input_ids"]) < sum(map(len, apart)) + 2:
        raise UserError(
            f"{place.name}: its tokenizer puts no separator between a question and an answer, and "
            f"has no chat template; {chat.COMPLETE}"
        )
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"{place.name}: its tokenizer has no padding token, which an encoder is batched with; "
            "set pad_token in its tokenizer_config.json"
        )


@torch.inference_mode()
def compute_pairs(model: PreTrainedModel, pad_id: int, rows: list[Row], width: int) -> list[float]:
    """Scores of `rows`, which are at most rows_of(width), by the model's own forward."""
    inputs = {
        "input_ids": padded([row.ids for row in rows], width, pad_id),
        "attention_mask": padded([[1] * len(row.ids) for row in rows], width, 0),
    }
    if rows[0].kinds:
        inputs["token_type_ids"] = padded([row.kinds for row in rows], width, 0)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    return model(**inputs).logits[: len(rows), 0].float().tolist()


# ---- from messages to rows, from rows to batches -------------------------------------------------

EXAMPLE = [
    {"role": "user", "content": template.QUESTION},
    {"role": "assistant", "content": template.ANSWER},
]


def open_tokenizer(place: Place) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that reads chats. Raises UserError if its template leaves out what
    is to be scored.
    """
    tokenizer = chat.load_tokenizer(place.files.name, OPTION)
    text = chat.render(tokenizer, EXAMPLE, generation_prompt=False)
    if template.QUESTION not in text or template.ANSWER not in text:
        raise UserError(
            f"{place.name}: its chat template leaves out the question or the answer of a "
            "conversation; restore the model's own tokenizer files"
        )
    return tokenizer


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> Row:
    """The conversation by the model's template, with no prompt for a further answer.

    It begins with one BOS: the template's, or where the template writes none, the one that the
    tokenizer puts before any text.
    """
    ids = chat.encode(tokenizer, chat.render(tokenizer, messages, generation_prompt=False))
    first = tokenizer("")["input_ids"][:1]
    if first == [tokenizer.bos_token_id] and ids[:1] != first:
        ids = first + ids
    return Row(ids, kinds=[])


def encode_pair(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> Row:
    """The answer, and as its question all that precedes it, with empty lines in between."""
    *before, answer = (message["content"] for message in messages)
    encoded = tokenizer("\n\n".join(before), answer)
    return Row(encoded["input_ids"], encoded.get("token_type_ids", []))


def width_of(row: Row, limit: int | None) -> int:
    """The width of the batch that a row belongs to: its length rounded up to a multiple of 64, or
    from 512 tokens on by at most an eighth, but not beyond the limit.
    """
    size = len(row.ids)
    step = max(64, 2 ** math.ceil(math.log2(size)) // 8)
    width = math.ceil(size / step) * step
    return width if limit is None else max(size, min(width, limit))


def rows_of(width: int) -> int:
    """The number of rows of a batch of this width."""
    return max(1, BATCH_TOKENS[device_type()] // width)


def padded(rows: list[list[int]], width: int, padding: int) -> Tensor:
    """(R, L): `rows` padded on the right, and copies of the first up to rows_of(width)."""
    rows = rows + [rows[0]] * (rows_of(width) - len(rows))
    return torch.tensor([row + [padding] * (width - len(row)) for row in rows])


# ---- what all kinds share ------------------------------------------------------------------------


def load_classifier(place: Place) -> PreTrainedModel:
    """The model with its head, which must give one number."""
    classifier = AutoModelForSequenceClassification
    return loading.load_model(
        place.files, place.dtype, place.device, option=OPTION, auto=classifier, num_labels=1
    ).eval()


def model_max_length(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Its longest text in tokens; None if it has no limit, which is written as a huge number."""
    length = tokenizer.model_max_length
    return int(length) if length < 10**9 else None


def describe(place: Place, method: str, template_id: str | None) -> dict:
    """What determines a score. The padding token decides which token it is read at."""
    return {
        "method": method,
        "dtype": str(place.dtype).removeprefix("torch."),
        "weights": weights.identity(place.files),
        "template": template_id,
        "pad_token_id": place.config.pad_token_id,
    }


def size_of(*modules: nn.Module) -> float:
    """Billions of parameters."""
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e9
