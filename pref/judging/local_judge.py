"""A judge on this machine, which scores without generating text.

`ask_local` computes the model's probability of each possible verdict after the judge prompt,
"[[1]]" ... "[[10]]" or "[[A]]", "[[B]]", "[[C]]", and turns these into a score or a winner. There
is nothing to parse, and every prompt that fits has a score.

torch and transformers are imported inside functions: a judge behind a server needs neither.
"""

import argparse
import functools
import json
import math
from collections.abc import Iterable

from pref.files import console, disk
from pref.files.console import UserError
from pref.judging import protocol
from pref.judging.protocol import Judge


def open_local_judge(args: argparse.Namespace) -> Judge:
    """Load a transformers model as a judge. It scores one request at a time."""
    # Imported here because they load torch, which a judge behind a server does not need.
    from pref.model import chat, weights

    model, tokenizer = load_judge(args.judge.removeprefix("hf:"), args.dtype)
    return Judge(
        name=args.judge,
        params_b=sum(parameter.numel() for parameter in model.parameters()) / 1e9,
        parameters={
            "method": "expected_rating",
            "dtype": str(model.dtype).removeprefix("torch."),
            "weights": weights.identity(weights.find_model(args.judge.removeprefix("hf:"))),
            "template": disk.sha256_json([tokenizer.chat_template, chat.TEMPLATE_OPTIONS]),
        },
        ask=functools.partial(ask_local, model, tokenizer),
        concurrency=1,
        local=True,
    )


def load_judge(path: str, dtype: str):
    """Model, in evaluation mode on the GPU if there is one, and tokenizer of a folder or hub id.

    Raises UserError if they cannot be loaded, do not fit into memory, or have no chat template that
    shows system messages.
    """
    import jinja2
    import torch
    import transformers

    from pref.model import chat, loading, weights

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files = weights.find_model(path, "--judge hf:")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--judge hf:{path}: no tokenizer that can be loaded: {console.first_line(error)}"
        ) from None
    if not tokenizer.chat_template:
        raise UserError(f"--judge hf:{path}: has no chat template; use an instruction-tuned model")
    try:
        # Some templates leave a system message out, others raise.
        messages = [{"role": "system", "content": "<<1>>"}, {"role": "user", "content": "<<2>>"}]
        shown = chat.apply_template(tokenizer, messages, generation_prompt=True)
    except jinja2.TemplateError as error:
        shown = str(error)
    if "<<1>>" not in shown:
        raise UserError(
            f"--judge hf:{path}: its chat template does not show system messages, which MT-Bench's "
            "prompts have; choose another judge"
        )
    dtype = loading.pick_dtype(dtype, device)
    return loading.load_model(files, dtype, device, option="--judge hf:").eval(), tokenizer


def encode_ratings(
    tokenizer, prompt: str, strings: Iterable[str] = protocol.RATING_STRINGS
) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt, and of each string ("[[1]]" ... "[[10]]") as its continuation.

    Prompt and string are tokenised as one text, as a transcript with the rating would be: on its
    own, a SentencePiece tokenizer would put a space before the string. If the two merge across the
    boundary (Llama-2: "]" + "[[" is one token), the ids no longer begin with the prompt's, which is
    what the model sees when it answers; such a string is tokenised on its own.

        prompt             -> p q r
        prompt + "[[7]]"   -> p q r s t     continuation: s t
        prompt + "[[7]]"   -> p q u t       merged; continuation: ids of "[[7]]" alone
    """
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    continuations = []
    for string in strings:
        ids = tokenizer(prompt + string, add_special_tokens=False)["input_ids"]
        if ids[: len(prompt_ids)] == prompt_ids:
            continuations.append(ids[len(prompt_ids) :])
        else:
            continuations.append(tokenizer(string, add_special_tokens=False)["input_ids"])
    return prompt_ids, continuations


def rating_logps(model, prompt: list[int], continuations: list[list[int]]):
    """Log-probability of each of R continuations of one prompt: summed over tokens, fp32, (R,).

    The prompt is run once. Its KV cache, repeated R times, serves all continuations as one batch,
    padded on the right, where padding does not affect a causal model's earlier positions.
    """
    import torch

    # 1) Continuations of different lengths as one rectangle: L is the longest, `real` marks tokens.
    width = max(map(len, continuations))
    padded = torch.tensor(
        [ids + [0] * (width - len(ids)) for ids in continuations], device=model.device
    )  # (R, L)
    real = torch.tensor(
        [[i < len(ids) for i in range(width)] for ids in continuations], device=model.device
    )  # (R, L)
    with torch.inference_mode():
        # 2) The prompt's last logits predict each continuation's first token.
        out = model(torch.tensor([prompt], device=model.device), use_cache=True, logits_to_keep=1)
        first = torch.log_softmax(out.logits[0, -1].float(), dim=-1)  # (V,)
        total = first[padded[:, 0]]  # (R,)
        # 3) The continuations' own logits predict the others: token i predicts token i + 1.
        if width > 1:
            cache = out.past_key_values
            cache.batch_repeat_interleave(len(continuations))
            out = model(padded[:, :-1], past_key_values=cache, use_cache=True)
            logps = torch.log_softmax(out.logits.float(), dim=-1)  # (R, L-1, V)
            logps = logps.gather(2, padded[:, 1:, None])[:, :, 0]  # (R, L-1)
            total = total + torch.where(real[:, 1:], logps, 0.0).sum(1)
    return total


def ask_local(model, tokenizer, request: dict) -> dict:
    """Make one judgement and return the reply (see `protocol.Judge`), without generating text.

    Single grading: the mean of the ratings r = 1 ... 10, weighted by the probabilities of the whole
    strings, score = sum_r r p_r / sum_r p_r with p_r = P("[[r]]" | prompt). Whole strings, because
    tokenizers split "10" differently; G-Eval (arXiv:2303.16634) weights single tokens. Pair
    grading: the most probable of [[A]], [[B]] and [[C]]. `judgement` is the JSON of the
    probabilities.
    """
    import torch

    from pref.model import chat

    is_pair = request.get("grading") == "pair"
    strings = tuple(protocol.VERDICTS) if is_pair else protocol.RATING_STRINGS
    prompt_text = chat.apply_template(tokenizer, request["messages"], generation_prompt=True)
    prompt, continuations = encode_ratings(tokenizer, prompt_text, strings)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    counts = {"prompt_tokens": len(prompt), "completion_tokens": 0}

    # 1) What cannot be scored: the prompt is too long for the model, or for the memory.
    if len(prompt) + max(map(len, continuations)) > limit:
        text = f"prompt of {len(prompt)} tokens, context of {limit}"
        return {"status": "context", "judgement": text, **counts}
    try:
        logps = rating_logps(model, prompt, continuations).double()  # (R,)
    except torch.OutOfMemoryError:
        text = f"a prompt of {len(prompt)} tokens needs more GPU memory"
        return {"status": "memory", "judgement": text, **counts}

    # 2) Probabilities relative to the R strings. They are finite exactly if their sum is.
    weights = logps.softmax(dim=0).tolist()
    if not math.isfinite(sum(weights)):
        text = "the model's log-probabilities are not finite"
        return {"status": "nonfinite", "judgement": text, **counts}

    # 3) The winner, or the score.
    probabilities = logps.exp().tolist()
    if is_pair:
        text = json.dumps(dict(zip(protocol.VERDICTS, probabilities)))
        winner = protocol.VERDICTS[strings[int(logps.argmax())]]
        return {"status": "ok", "winner": winner, "judgement": text, **counts}
    text = json.dumps(dict(zip(protocol.RATINGS, probabilities)))
    score = sum(rating * weight for rating, weight in zip(protocol.RATINGS, weights))
    score = min(max(score, 1.0), 10.0)  # rounding may overshoot the scale slightly
    return {"status": "ok", "score": score, "judgement": text, **counts}
