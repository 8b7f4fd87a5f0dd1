"""A judge on this machine, which scores without generating text.

The judge's answer is begun for it, of MT-Bench up to the double bracket ("Rating: [["), and
`ask_local` computes the probability of each possible continuation: "1]" ... "10]", or "A]", "B]",
"C]". What they are, and which verdict they make, is the benchmark's matter (`benchmark.Choices`).
There is nothing to parse, and the judge explains nothing first.

The probability of all continuations together is the judgement's *mass*. A model that understands
what is asked puts nearly all of its probability there. A small mass means that it would have
written something else, so that the score is made of leftovers: below --min_rating_mass it does not
count.

torch and transformers are imported inside functions: a judge behind a server needs neither.
"""

import argparse
import functools
import json
import math
from collections.abc import Callable, Iterable

from pref.files.console import UserError
from pref.judging import judges, reading
from pref.judging.benchmark import Bench, Choices
from pref.judging.judges import Judge

# Others come from an answer that holds AlpacaEval's control tokens.
USUAL_ROLES = (["user"], ["system", "user"])
GIVE_UP_AFTER = 8  # judgements below --min_rating_mass, if no other came before


def open_local_judge(args: argparse.Namespace, bench: Bench) -> Judge:
    """Load a transformers model as a judge. It scores one request at a time.

    Raises UserError if the benchmark needs a judge that writes text, or the model cannot be used.
    """
    if bench.benchmark.choices is None:
        raise UserError(
            f"--judge {args.judge}: {bench.title} needs a judge that writes; serve the model "
            "behind an OpenAI-compatible server and give --base_url"
        )
    choices = bench.benchmark.choices(bench)
    # Imported here because they load torch, which a judge behind a server does not need.
    from pref.model import template, weights

    model, tokenizer = load_judge(judges.path_of(args.judge), args.dtype)
    ask = functools.partial(ask_local, model, tokenizer, choices)
    return Judge(
        name=args.judge,
        params_b=sum(parameter.numel() for parameter in model.parameters()) / 1e9,
        parameters={
            "method": "rating_after_prefix",  # of version 1.0.0: expected_rating, without a prefix
            "prefix": choices.prefix,
            "dtype": str(model.dtype).removeprefix("torch."),
            "weights": weights.identity(weights.find_model(judges.path_of(args.judge))),
            "template": template.identity(tokenizer),
        },
        ask=refuse_without_mass(ask, args.judge, args.min_rating_mass),
        concurrency=1,
        kind=judges.LOCAL,
    )


def refuse_without_mass(ask: Callable, name: str, least: float) -> Callable[[dict], dict]:
    """`ask`, which raises UserError if none of the first judgements has a mass of `least`."""
    masses: list[float] = []

    def watched(request: dict) -> dict:
        reply = ask(request)
        if reply["status"] == "ok" and len(masses) < GIVE_UP_AFTER:
            masses.append(reply["rating_mass"])
            if len(masses) == GIVE_UP_AFTER and max(masses) < least:
                raise UserError(
                    f"--judge {name}: the verdicts that are asked for have between "
                    f"{min(masses):.2g} and {max(masses):.2g} of its probability, less than "
                    f"--min_rating_mass {least:g}: it would have answered something else, and its "
                    "scores say nothing; choose a judge that follows the prompt (or, to try the "
                    "pipeline only, --min_rating_mass 0)"
                )
        return reply

    return watched


def load_judge(path: str, dtype: str):
    """Model, in evaluation mode on the GPU if there is one, and tokenizer of a folder or hub id.

    Raises UserError if they cannot be loaded, do not fit into memory, or have no chat template
    that can be used.
    """
    import torch

    from pref.model import chat, loading, weights

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files = weights.find_model(path, "--judge hf:")
    tokenizer = chat.load_tokenizer(path, "--judge hf:")
    dtype = loading.pick_dtype(dtype, device)
    return loading.load_model(files, dtype, device, option="--judge hf:").eval(), tokenizer


def answer_start(prompt: str) -> str:
    """What stands between a rendered prompt and the judge's answer: the end of a thought that the
    template has opened, or the name of gpt-oss' channel for answers.
    """
    if prompt.endswith("<|start|>assistant"):
        return "<|channel|>final<|message|>"
    closing = reading.open_thought(prompt)
    return "" if closing is None else f"\n{closing}\n\n"


def encode_verdicts(tokenizer, prompt: str, choices: Choices) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt, and of each of the texts ("1" ... "10") as its continuation.

    Prompt, verdict and brackets are tokenised as one text, as a transcript would be: on its own, a
    SentencePiece tokenizer would put a space before the verdict. The closing brackets are left out
    again, see `ids_from`. Where a verdict merges with the end of the prompt, the split is before
    the merged token, for all verdicts alike:

        prompt "... [["   -> p q r
        "... [[7]]"       -> p q r s t    continuation: s, as t is a closing bracket
    """
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    closing, whole = ids_from(tokenizer, choices.closing), []
    for text in choices.texts:
        ids = tokenizer(f"{prompt}{text}{choices.closing}", add_special_tokens=False)["input_ids"]
        while choices.closing and ids[-1] in closing:
            ids = ids[:-1]
        whole.append(ids)
    split = min(shared_prefix(prompt_ids, ids) for ids in whole)
    return prompt_ids[:split], [ids[split:] for ids in whole]


def shared_prefix(first: list[int], second: list[int]) -> int:
    """Length of the longest prefix that two sequences share, at most all but one of `second`."""
    length = min(len(first), len(second) - 1)
    return next((i for i in range(length) if first[i] != second[i]), length)


def ids_from(tokenizer, closing: str) -> frozenset[int]:
    """Ids of all tokens that begin as `closing`, "]]", does: "]", "]]", "]]." and so on.

    A verdict is complete with any of them: which one follows is punctuation. All tokens if
    `closing` is "": then anything may follow.
    """
    first = closing[:1]
    return frozenset(i for token, i in tokenizer.get_vocab().items() if token.startswith(first))


def verdict_logps(model, prompt: list[int], continuations: list[list[int]], closing: Iterable[int]):
    """Log-probability of each of R continuations of one prompt, followed by any token in `closing`:
    summed over tokens, fp32, (R,).

    The prompt is run once. Its KV cache, repeated R times, serves all continuations as one batch,
    padded on the right, where padding does not affect a causal model's earlier positions.
    """
    import torch

    # 1) Continuations of different lengths as one rectangle: L is the longest, `real` marks tokens.
    width, device = max(map(len, continuations)), model.device
    padded = torch.tensor(
        [ids + [0] * (width - len(ids)) for ids in continuations], device=device
    )  # (R, L)
    lengths = torch.tensor([len(ids) for ids in continuations], device=device)  # (R,)
    real = torch.arange(width, device=device) < lengths[:, None]  # (R, L)
    ends = torch.tensor(sorted(closing), device=device)
    with torch.inference_mode():
        # 2) The prompt's last logits predict each continuation's first token.
        out = model(torch.tensor([prompt], device=device), use_cache=True, logits_to_keep=1)
        first = torch.log_softmax(out.logits[0, -1].float(), dim=-1)  # (V,)
        # 3) The continuations' own logits predict what follows: token i predicts token i + 1, and
        #    the last one the closing bracket.
        cache = out.past_key_values
        cache.batch_repeat_interleave(len(continuations))
        out = model(padded, past_key_values=cache, use_cache=True)
        logps = torch.log_softmax(out.logits.float(), dim=-1)  # (R, L, V)
        tokens = logps[:, :-1].gather(2, padded[:, 1:, None])[:, :, 0]  # (R, L-1)
        closed = logps[:, :, ends].logsumexp(-1).gather(1, lengths[:, None] - 1)[:, 0]  # (R,)
        return first[padded[:, 0]] + torch.where(real[:, 1:], tokens, 0.0).sum(1) + closed


def ask_local(model, tokenizer, choices: Choices, request: dict) -> dict:
    """Make one judgement and return the reply (see `judges.Judge`), without generating text.

    The verdict is made of the probabilities p of the whole texts in `choices`, not of their first
    tokens, because tokenizers split "10" differently; G-Eval (arXiv:2303.16634) weights single
    tokens. `rating_mass` is the sum of p, `judgement` the JSON of p by text.
    """
    import torch

    from pref.model import chat

    try:
        prompt_text = chat.render(tokenizer, request["messages"], generation_prompt=True)
    except UserError as error:
        if [message["role"] for message in request["messages"]] in USUAL_ROLES:
            raise  # the template takes no prompt at all
        return {"status": "template", "judgement": str(error)}
    prompt_text += answer_start(prompt_text) + choices.prefix
    prompt, continuations = encode_verdicts(tokenizer, prompt_text, choices)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    counts = {"prompt_tokens": len(prompt), "completion_tokens": 0}

    # 1) What cannot be scored: the prompt is too long for the model, or for the memory.
    if len(prompt) + max(map(len, continuations)) + 1 > limit:
        text = f"prompt of {len(prompt)} tokens, context of {limit}"
        return {"status": "context", "judgement": text, **counts}
    try:
        logps = verdict_logps(model, prompt, continuations, ids_from(tokenizer, choices.closing))
        logps = logps.double()  # (R,)
    except torch.OutOfMemoryError:
        text = f"a prompt of {len(prompt)} tokens needs more GPU memory"
        return {"status": "memory", "judgement": text, **counts}

    # 2) Probabilities relative to the R texts. They are finite exactly if their sum is.
    weights = logps.softmax(dim=0).tolist()
    if not math.isfinite(sum(weights)):
        text = "the model's log-probabilities are not finite"
        return {"status": "nonfinite", "judgement": text, **counts}

    # 3) The verdict that they make.
    probabilities = logps.exp().tolist()
    return {
        **choices.read(weights)._asdict(),
        "judgement": json.dumps(dict(zip(choices.texts, probabilities))),
        "rating_mass": min(sum(probabilities), 1.0),
        **counts,
    }
