"""a judge on this machine"""

import argparse
import functools
import json
import math
from collections.abc import Iterable

from pref.files import disk
from pref.files.console import UserError
from pref.judging import protocol
from pref.judging.protocol import Judge


def open_local_judge(args: argparse.Namespace) -> Judge:
    """A transformers model that scores here, one request at a time, without generating or
    parsing.
    """
    # Imported here because they load torch, which a judge behind a server does not need.
    from pref.model import chat
    from pref.model.loading import fingerprint

    model, tokenizer = load_judge(args.judge.removeprefix("hf:"), args.dtype)
    return Judge(
        name=args.judge,
        params_b=sum(parameter.numel() for parameter in model.parameters()) / 1e9,
        parameters={
            "method": "expected_rating",
            "dtype": str(model.dtype).removeprefix("torch."),
            "weights": fingerprint(model),
            "template": disk.sha256_json([tokenizer.chat_template, chat.TEMPLATE_OPTIONS]),
        },
        ask=functools.partial(ask_local, model, tokenizer),
        concurrency=1,
        local=True,
    )


def load_judge(path: str, dtype: str):
    """Model and tokenizer of a local folder or hub id. Raises UserError if it cannot serve as a
    judge.
    """
    import jinja2
    import torch
    import transformers

    from pref.model import chat
    from pref.model.loading import pick_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=pick_dtype(dtype, device), trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--judge hf:{path}: not a model folder or hub id that can be loaded: {said}"
        ) from None
    if not tokenizer.chat_template:
        raise UserError(f"--judge hf:{path}: has no chat template; take an instruction-tuned model")
    try:
        messages = [{"role": "system", "content": "<<1>>"}, {"role": "user", "content": "<<2>>"}]
        shown = chat.apply_template(tokenizer, messages, generation_prompt=True)
    except jinja2.TemplateError as error:
        shown = str(error)
    if "<<1>>" not in shown:
        raise UserError(
            f"--judge hf:{path}: its chat template takes no system message, MT-Bench's prompts have one"
        )
    try:
        return model.to(device).eval(), tokenizer
    except torch.OutOfMemoryError:
        raise UserError(
            f"--judge hf:{path}: does not fit into this GPU's memory; serve it and give --base_url"
        ) from None


def encode_ratings(
    tokenizer, prompt: str, strings: Iterable[str] = protocol.RATING_STRINGS
) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt and of each string "[[1]]" ... "[[10]]" after it.

    Prompt and string are tokenised as one text, as a transcript that holds the rating would be:
    encoded alone, a SentencePiece tokenizer puts a space before it. Where the two merge across the
    boundary (Llama-2: "]" + "[[" is a token), the prompt would no longer end as the model sees it
    when it answers; there the string stands alone.
    """
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ratings = []
    for text in strings:
        whole = tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
        if whole[: len(ids)] == ids:
            ratings.append(whole[len(ids) :])
        else:
            ratings.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids, ratings


def rating_logps(model, prompt: list[int], ratings: list[list[int]]):
    """Log-probability (sum over tokens, fp32) of each of R continuations of one prompt. Returns
    (R,).

    The prompt is run once; its KV cache, repeated R times, carries all continuations as one batch.
    Padding stands on the right, where a causal model's earlier positions do not see it.
    """
    import torch

    width = max(map(len, ratings))
    padded = torch.tensor(
        [ids + [0] * (width - len(ids)) for ids in ratings], device=model.device
    )  # (R, L)
    real = torch.tensor(
        [[i < len(ids) for i in range(width)] for ids in ratings], device=model.device
    )  # (R, L)
    with torch.inference_mode():
        out = model(torch.tensor([prompt], device=model.device), use_cache=True, logits_to_keep=1)
        first = torch.log_softmax(out.logits[0, -1].float(), dim=-1)  # (V,)
        total = first[padded[:, 0]]
        if width > 1:
            cache = out.past_key_values
            cache.batch_repeat_interleave(len(ratings))
            logits = model(
                padded[:, :-1], past_key_values=cache, use_cache=True
            ).logits  # (R, L-1, V)
            logps = torch.log_softmax(logits.float(), dim=-1).gather(2, padded[:, 1:, None])[
                :, :, 0
            ]
            total = total + torch.where(real[:, 1:], logps, 0.0).sum(1)
    return total


def ask_local(model, tokenizer, request: dict) -> dict:
    """One judgement: the mean of the ratings 1 to 10, each weighted by the probability of its whole
    string.

    Score = sum_r r p_r / sum_r p_r with p_r = P("[[r]]" | prompt). The judgement's text is the JSON
    of the p_r. Of a pair, the most probable of [[A]], [[B]], [[C]]. Whole strings, because
    tokenizers split "10" differently (G-Eval, arXiv:2303.16634, weights single tokens).
    """
    import torch

    from pref.model import chat

    pair = request.get("grading") == "pair"
    strings = tuple(protocol.VERDICTS) if pair else protocol.RATING_STRINGS
    text = chat.apply_template(tokenizer, request["messages"], generation_prompt=True)
    prompt, ratings = encode_ratings(tokenizer, text, strings)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    counts = {"prompt_tokens": len(prompt), "completion_tokens": 0}
    if len(prompt) + max(map(len, ratings)) > limit:
        return {
            "status": "context",
            "judgement": f"prompt of {len(prompt)} tokens, context of {limit}",
            **counts,
        }
    try:
        logps = rating_logps(model, prompt, ratings).double()
    except torch.OutOfMemoryError:
        return {
            "status": "memory",
            "judgement": f"a prompt of {len(prompt)} tokens needs more GPU memory",
            **counts,
        }
    weights = logps.softmax(dim=0).tolist()
    score = sum(
        rating * weight for rating, weight in zip(protocol.RATINGS, weights)
    )  # of a pair: no meaning but finiteness
    if not math.isfinite(score):
        return {
            "status": "nonfinite",
            "judgement": "the model's log-probabilities are not finite",
            **counts,
        }
    if pair:
        probabilities = json.dumps(dict(zip(protocol.VERDICTS, logps.exp().tolist())))
        return {
            "status": "ok",
            "winner": protocol.VERDICTS[strings[int(logps.argmax())]],
            "judgement": probabilities,
            **counts,
        }
    probabilities = json.dumps(dict(zip(protocol.RATINGS, logps.exp().tolist())))
    return {
        "status": "ok",
        "score": min(max(score, 1.0), 10.0),
        "judgement": probabilities,
        **counts,
    }
