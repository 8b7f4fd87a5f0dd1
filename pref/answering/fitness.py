"""Whether the engine computes what a model computes, decided before anything is answered.

The engine replaces a model's attention by its own and sends many conversations through the model
as one sequence without padding. That is right for a model in which

1. nothing but attention carries information from one position to another (no convolution, no
   linear attention, no state space),
2. every layer calls transformers' attention interface once, and sees the keys that causality and
   the window it names leave visible, with no further term (sinks, biases),
3. rotary factors do not depend on the longest position of a pass,
4. the logits are a linear head's, scaled or capped as `Engine.head` does.

`structure` reads 1 to 3 from the model itself: its config, its modules, and what its layers ask of
an attention function that only takes notes. No tolerance is involved, so that bf16 hides nothing.
`compare` then runs a few prompts both ways. A model that fails is answered by `plain.PlainEngine`.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from pref.answering import cache
from pref.answering.adapters import Adapters
from pref.answering.generation import Engine, Request, Slot
from pref.answering.plain import PlainEngine
from pref.model import architecture

NOTES = "answers_notes"  # name of the attention function that takes notes
# What layers pass to any attention function and what the engine uses or may leave out. Dropout is
# off, and positions are applied before attention.
KNOWN_NUMBERS = frozenset(("scaling", "sliding_window", "softcap", "dropout"))
KNOWN_TENSORS = frozenset(("position_ids", "cache_position", "text_position_ids"))
TOLERANCE = 1e-3  # of the norm of the logits, in fp32
LOW_PRECISION_TOLERANCE = 0.1


class Note(NamedTuple):
    """One call of the attention function."""

    layer: int
    problem: str | None  # what the engine would not do


# ---- what the model is ---------------------------------------------------------------------------


def structure(model: PreTrainedModel, prompt: list[int], length: int) -> str | None:
    """Why the engine cannot answer for `model`, or None.

    length: most tokens of a conversation. prompt: token ids, longer than the model's window where
    conversations are (see `probes`).
    """
    config = model.config.get_text_config()
    for module in model.modules():
        if isinstance(module, nn.Conv1d):
            return "it has convolutions over positions"
    limit = architecture.constant_rope(config)
    if limit is not None and length > limit:
        return f"its rotary embedding changes beyond {limit} tokens"
    if backbone_of(model) is None:
        return "its layers are not in one backbone"

    # What the layers ask for.
    own = model.config._attn_implementation
    model.set_attn_implementation(NOTES)
    notes: list[Note] = []
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.attention_notes = notes
    try:
        own_logits(model, prompt)
    except PASS_ERRORS as error:
        return f"its forward fails with another attention function ({type(error).__name__})"
    finally:
        model.set_attn_implementation(own)
        for module in model.modules():
            vars(module).pop("attention_notes", None)
    for note in notes:
        if note.problem:
            return f"layer {note.layer}: {note.problem}"
    layers = config.num_hidden_layers
    if sorted(note.layer for note in notes) != list(range(layers)):
        return f"its {layers} layers call transformers' attention {len(notes)} times, not once each"
    return None


# Of a forward pass that was written for other inputs. Nothing else catches them this broadly.
PASS_ERRORS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def backbone_of(model: PreTrainedModel) -> nn.Module | None:
    return getattr(model, model.base_model_prefix, None)


def take_note(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **options,
) -> tuple[Tensor, None]:
    """An attention function that computes nothing and writes down what it is asked for."""
    problem = None
    window = options.get("sliding_window")
    for name, option in options.items():
        is_number = isinstance(option, int | float) and not isinstance(option, bool)
        if (is_number and name not in KNOWN_NUMBERS) or (
            isinstance(option, Tensor) and name not in KNOWN_TENSORS
        ):
            problem = f"its attention uses {name}"
    if problem is None and not sees_as_expected(module, attention_mask, query.shape[2], window):
        problem = "its attention mask is not causal attention with the window that it names"
    module.attention_notes.append(Note(module.layer_idx, problem))
    return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


def sees_as_expected(
    module: nn.Module, mask: Tensor | None, length: int, window: int | None
) -> bool:
    """Whether a layer's own mask, for a single sequence, is the one that the engine would use."""
    if mask is None:  # transformers leaves out a mask that is plain causal
        return getattr(module, "is_causal", True) and (window is None or window >= length)
    if not isinstance(mask, Tensor):
        return False
    expected = cache.visible(torch.arange(length, device=mask.device), length, window)
    if mask.dtype != torch.bool:  # added to the scores
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        if (mask.masked_fill(hidden, 0) != 0).any():
            return False
        mask = ~hidden
    return mask.shape[-2:] == expected.shape and bool((mask == expected).all())


AttentionInterface.register(NOTES, take_note)
AttentionMaskInterface.register(NOTES, sdpa_mask)


# ---- what it computes ----------------------------------------------------------------------------


def probes(model: PreTrainedModel, prompt: list[int], length: int) -> list[list[int]]:
    """Three prompts of different lengths made of the tokens of `prompt`. The last one is longer
    than the smallest window of the model's attention, if conversations of `length` tokens are.
    """
    config = model.config.get_text_config()
    windows = [
        value
        for name, value in config.to_dict().items()
        if ("window" in name or name in ("attention_chunk_size", "local_attention"))
        and isinstance(value, int)
        and value > 0
    ]
    longest = min(length - 2, max(40, min(windows, default=0) + 8))
    return [
        (prompt * (size // len(prompt) + 1))[:size]
        for size in (min(5, longest), min(23, longest), longest)
    ]


@torch.inference_mode()
def own_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """(V,) logits of the token after `ids`, in fp32, by the model's own forward."""
    output = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    return output.logits[0, -1].float()


def distance(logits: Tensor, expected: Tensor) -> float:
    """Relative distance of two vectors of logits, (V,) both, up to a constant."""
    logits, expected = (values.double() - values.double().mean() for values in (logits, expected))
    return ((logits - expected).norm() / expected.norm().clamp_min(1e-12)).item()


def expected_logits(engine: Engine, prompts: list[list[int]], adapter: str | None) -> list[Tensor]:
    """Logits after each prompt, by the model's own forward with `adapter`. The engine's attention
    must not be installed.
    """
    engine.adapters.use({adapter})
    engine.adapters.begin([adapter])
    return [own_logits(engine.model, prompt) for prompt in prompts]


@torch.inference_mode()
def compare(
    engine: Engine, prompts: list[list[int]], adapter: str | None, expected: list[Tensor]
) -> str | None:
    """How the engine's logits differ from `expected`, or None. Each prompt is read but for its last
    token, which all prompts then decode together.

    In fp32 no prompt may differ. In bf16 and 4 bits, where a router may take another expert for one
    of them, not all may.
    """
    engine.adapters.use({adapter})
    slots = []
    for row, prompt in enumerate(prompts[: engine.rows]):
        request = Request(prompt[:-1], adapter, temperature=0, seed=0, max_new_tokens=1)
        slots.append(Slot(request))
        engine.prefill(row, slots[row])
        request.tokens.append(prompt[-1])
    found = [distance(logits, other) for logits, other in zip(engine.decode(slots), expected)]
    if engine.model.dtype == torch.float32:
        worst, tolerance = max(found), TOLERANCE
    else:
        worst, tolerance = min(found), LOW_PRECISION_TOLERANCE
    if worst <= tolerance:  # not so for NaN
        return None
    return f"its logits differ by {worst:.2g} of their norm"


# ---- the choice ----------------------------------------------------------------------------------


def make_engine(
    model: PreTrainedModel,
    folders: dict[str, Path],
    rows: int,
    length: int,
    ends: list[int],
    prompt: list[int],
) -> Engine | PlainEngine:
    """The engine if it computes what `model` computes, else `PlainEngine`, with a line to the user.

    prompt: token ids of a question, to try both with. The other arguments are those of `Engine`.
    """
    own = model.config._attn_implementation
    prompts = probes(model, prompt, length)
    reason = structure(model, prompts[-1], length)
    engine = None
    if reason is None:
        engine = Engine(model, folders, rows, length, ends)
        cache.uninstall(model, own)
        adapters = [None, *list(folders)[:1]]
        try:
            expected = {name: expected_logits(engine, prompts, name) for name in adapters}
            cache.install(model, engine.cache)
            differences = (compare(engine, prompts, name, expected[name]) for name in adapters)
            reason = next((text for text in differences if text), None)
        except PASS_ERRORS as error:
            reason = f"the engine's passes fail ({type(error).__name__})"
    if reason is None:
        return engine
    if engine is not None:
        cache.uninstall(model, own)
    print(
        f"note: {model.config.model_type} answers through transformers' generate, one conversation "
        f"at a time, which is slower ({reason}); a server (--base_url) is faster",
        flush=True,
    )
    return PlainEngine(model, engine.adapters if engine else Adapters(model, folders), length, ends)
