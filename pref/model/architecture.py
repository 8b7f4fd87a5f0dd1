"""How an architecture is computed: packed, plain, or not at all. Decided from what it is, before
any weight is read.

    packed    both responses of a pair share one row, rows follow one another (packing.py). Right
              only where tokens meet in attention alone, and attention is the softmax of scaled
              products under the mask that it is given (attention.py).
    plain     one padded row per response, with the architecture's own attention and positions.
              Right for every causal model; about half as fast.
    refused   not a causal language model, or one whose log-probs would depend on the other pairs
              of a micro-batch.

The architecture itself is asked. `read` builds it on the meta device (shapes without values), runs
it once on a packed row, and records what reaches the attention function: layers that never call it
keep a state of another kind (convolution, recurrence), a mask that arrives changed was needed for
something (ALiBi, a dynamic mask), and an argument beside the usual ones (attention sinks, a cap on
the logits, a bias) is something that packed attention would drop. What no forward pass shows is
read from the configuration: windows, rotary positions, the length that the model is made for.
"""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import sdpa_mask

from pref.files.console import UserError, first_line
from pref.model import attention

# Layers whose tokens meet in attention alone. (What transformers calls a layer's MLP is local.)
ATTENTION_LAYERS = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "moe",
    "mlp",
    "sparse",
    "dense",
}
WINDOWS = ("sliding_window", "attention_chunk_size")
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
# What the code of an architecture may raise when it is given a packed row.
REJECTIONS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
)


class Architecture(NamedTuple):
    """What decides how a model is computed."""

    name: str  # the configuration's model_type
    refused: str = ""  # why it cannot be trained at all
    unpacked: str = ""  # why it cannot be packed, whatever the length
    attention: str = "sdpa"  # transformers' name of the attention that its plain path uses
    window: int | None = None  # tokens that the narrowest attention sees
    constant: int | None = None  # up to this length, rotary frequencies do not depend on the batch
    made_for: int | None = None  # tokens of the longest sequence it was made for
    extends: bool = True  # whether it can be computed beyond that
    noise: tuple[str, ...] = ()  # dropout and jitter of its configuration that act in training

    def refusal(self, longest: int) -> str:
        """Why sequences of up to `longest` tokens cannot be computed, or ''."""
        if self.refused:
            return f"{self.name}: {self.refused}"
        if self.constant is not None and longest > self.constant:
            return (
                f"a sequence of {longest} tokens is longer than the {self.constant} from which on "
                f"{self.name}'s rotary frequencies depend on the longest sequence of a batch, so "
                f"that a pair's log-probabilities would depend on its neighbours; give "
                f"--max_length {self.constant} or less"
            )
        if not self.extends and self.made_for is not None and longest > self.made_for:
            return (
                f"a sequence of {longest} tokens is longer than {self.name}'s {self.made_for} "
                f"positions; give --max_length {self.made_for} or less"
            )
        return ""

    def plain(self, longest: int) -> str:
        """Why sequences of up to `longest` tokens take the plain path, or ''."""
        if self.unpacked:
            return f"{self.name} {self.unpacked}"
        if self.window is not None and longest > self.window:
            return (
                f"a sequence of {longest} tokens is longer than {self.name}'s attention window of "
                f"{self.window}"
            )
        return ""

    def warning(self, longest: int) -> str:
        """What the user should know about sequences of up to `longest` tokens, or ''."""
        if self.made_for is not None and longest > self.made_for:
            return (
                f"a sequence of {longest} tokens is longer than the {self.made_for} that "
                f"{self.name} was made for (max_position_embeddings): its log-probabilities there "
                "mean little"
            )
        return ""


# By configuration: both are asked for several times in a run.
_known: dict[str, Architecture] = {}
_idle: dict[str, set[str]] = {}


class Call(NamedTuple):
    """One call of the attention function in the recorded pass."""

    module: nn.Module
    mask_is_ours: bool
    is_causal: bool
    unused: tuple[str, ...]  # arguments that packed attention does not use
    window: int | None


def read(model: str) -> Architecture:
    """What the model of a hub id or folder is. Raises UserError if its configuration cannot be
    read.
    """
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--model {model}: its configuration cannot be read ({first_line(error)}); give a "
            "folder, or a hub id that this machine can reach"
        ) from None
    key = config.to_json_string(use_diff=False)
    if key not in _known:
        _known[key] = of_config(config)
    return _known[key]


def of_config(config: PreTrainedConfig) -> Architecture:
    """What the architecture with this configuration is."""
    # 1) Is it a causal language model?
    encodes = getattr(config, "is_encoder_decoder", False)
    if encodes or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return Architecture(
            name=config.model_type,
            refused="is not a causal language model (a vision, encoder or encoder-decoder model); "
            "give a decoder-only text model",
        )
    text = config.get_text_config()
    known = Architecture(
        name=text.model_type,
        window=window_of(text),
        constant=constant_rope(text),
        made_for=first_number(text, POSITIONS),
        extends=bool(getattr(text, "rope_parameters", None)),
        noise=tuple(noise_of(text.to_dict())),
    )
    try:
        model, chooses = on_meta(config, "record"), True
    except KeyError:  # a table of its own: it cannot be given another attention
        model, chooses = on_meta(config, None), False
    if modalities := other_inputs(model):
        return known._replace(refused=f"takes {modalities} beside text; give a text-only model")
    layers = find_layers(model)
    if layers is None:
        return known._replace(refused="has no list of layers; give a decoder-only text model")

    # 2) What reaches its attention.
    calls, rejected = recorded(model) if chooses else ([], False)
    if any(not call.is_causal for call in calls):
        return known._replace(
            refused="attends to later tokens too (an encoder); give a causal language model"
        )
    unused = sorted({name for call in calls for name in call.unused})
    own = "sdpa" if getattr(model, "_supports_sdpa", False) and not unused else "eager"
    reason = unpacked(model, text, layers, calls, rejected, unused)
    windows = [window for window in (known.window, *(c.window for c in calls)) if window]
    return known._replace(unpacked=reason, attention=own, window=min(windows) if windows else None)


def unpacked(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    layers: nn.ModuleList,
    calls: list[Call],
    rejected: bool,
    unused: list[str],
) -> str:
    """Why the architecture cannot be packed, to be read after its name, or ''."""
    kinds = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if kinds:
        return f"has layers beyond attention over the whole row ({', '.join(sorted(kinds))})"
    if getattr(model, "_is_stateful", False):
        return "has layers that carry a state from token to token"
    if any(isinstance(module, nn.Conv1d) for module in layers.modules()):
        return "has convolutions over the sequence"
    if unused:
        return f"gives its attention more than packed attention uses ({', '.join(unused)})"
    if rejected:
        return "does not take a packed row"
    callers = {call.module for call in calls}
    if not all(callers & set(layer.modules()) for layer in layers):
        return "has layers with an attention of their own"
    if not all(call.mask_is_ours for call in calls):
        return "changes the mask on the way to its attention"
    return ""


# ---- from the configuration ---------------------------------------------------------------------


def first_number(config: PreTrainedConfig, names: tuple[str, ...]) -> int | None:
    """The first of these settings that is a positive number."""
    values = (getattr(config, name, None) for name in names)
    return next((int(value) for value in values if isinstance(value, int) and value > 0), None)


def window_of(config: PreTrainedConfig) -> int | None:
    """Tokens that the narrowest attention sees, as far as the configuration says."""
    if not getattr(config, "use_sliding_window", True):
        return None
    kinds = getattr(config, "layer_types", None)
    if kinds and not any("sliding" in kind or "chunked" in kind for kind in kinds):
        return None
    windows = [first_number(config, (name,)) for name in WINDOWS]
    return min((window for window in windows if window), default=None)


def constant_rope(config: PreTrainedConfig) -> int | None:
    """The length up to which rotary frequencies are the same for every batch; None: always.

    'longrope' has two sets of frequencies, and 'dynamic' (NTK) computes them anew; both choose by
    the longest sequence in the batch, once one is longer than the original context. The other
    kinds ('default', 'linear', 'yarn', 'llama3') are fixed.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer = [p for p in parameters.values() if isinstance(p, dict)]
    limits = []
    for one in by_layer or [parameters]:
        kind = one.get("rope_type", "default")
        if kind == "longrope" or "dynamic" in kind:
            limits.append(
                one.get("original_max_position_embeddings")
                or first_number(config, ("original_max_position_embeddings", *POSITIONS))
            )
    return min(limits) if limits else None


def noise_of(settings: dict) -> Iterator[str]:
    """Dropout and jitter in a configuration, as 'name value'. They act in training alone."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from noise_of(value)
        elif not isinstance(value, float) or value <= 0 or "classif" in name or "summary" in name:
            continue  # not a rate, or of a head that a causal language model does not have
        elif "drop" in name or "jitter" in name:
            yield f"{name} {value:g}"


# ---- from the architecture itself ---------------------------------------------------------------


def on_meta(
    config: PreTrainedConfig, implementation: str | None, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """The model on the meta device, frozen, with rotary frequencies that never look at the batch.

    implementation: transformers' name of its attention; None: the model's default.
    """
    config = copy.deepcopy(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=implementation, dtype=dtype
        )
    for module in model.modules():
        if isinstance(getattr(module, "rope_type", None), str):
            module.rope_type = "default"
        elif isinstance(getattr(module, "rope_type", None), dict):
            module.rope_type = dict.fromkeys(module.rope_type, "default")
    return model.requires_grad_(False).eval()


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The model without its output head: what its own forward calls."""
    candidates = (
        model.get_decoder(),
        getattr(model, model.base_model_prefix, None),
        getattr(model, "model", None),
    )
    return next(part for part in candidates if part is not None and part is not model)


def find_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """The decoder layers: the outermost list of as many modules as the configuration has layers."""
    config = model.config.get_text_config()
    count = first_number(config, ("num_hidden_layers", "num_layers", "n_layer", "n_layers"))
    for _, module in backbone_of(model).named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    return None


def other_inputs(model: PreTrainedModel) -> str:
    """What a model takes beside text ('pixel_values', 'input_features'), or ''."""
    parts = {m.main_input_name for m in model.modules() if isinstance(m, PreTrainedModel)}
    return ", ".join(sorted(parts - {"input_ids", "inputs_embeds"}))


def idle_linears(config: PreTrainedConfig) -> set[str]:
    """Last names of linear layers that a forward pass never calls: Mamba reads the weights of
    `dt_proj` directly, so that an adapter on it would do nothing. Empty if it cannot be told.
    """
    key = config.to_json_string(use_diff=False)
    if key not in _idle:
        _idle[key] = find_idle_linears(on_meta(config, None))
    return _idle[key]


def find_idle_linears(model: PreTrainedModel) -> set[str]:
    """`idle_linears` of a model on the meta device."""
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    names = {module: name.rpartition(".")[2] for name, module in linears}
    called: set[str] = set()
    for module in names:
        module.register_forward_hook(lambda module, *_: called.add(names[module]))
    tokens = torch.zeros(1, 8, dtype=torch.long, device="meta")
    try:
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    except REJECTIONS:
        return set()
    return set(names.values()) - called


# What `record` saw: the module, the mask, and the other arguments of each call.
_seen: list[tuple[nn.Module, object, dict]] = []


def record(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """An attention function that computes nothing and remembers what it was given."""
    _seen.append((module, attention_mask, kwargs))
    shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    return query.new_empty(shape), None


AttentionInterface.register("record", record)
AttentionMaskInterface.register("record", sdpa_mask)


def recorded(model: PreTrainedModel) -> tuple[list[Call], bool]:
    """The calls of the attention function while `model` (on the meta device, with the attention
    "record") computes a packed row, and whether its code broke off.
    """
    tokens = torch.zeros(1, 8, dtype=torch.long, device="meta")
    layout = torch.empty(1, 1, 2, 4, dtype=torch.long, device="meta")
    _seen.clear()
    rejected = False
    try:
        backbone_of(model)(
            input_ids=tokens, attention_mask=layout, position_ids=tokens, use_cache=False
        )
    except REJECTIONS:
        rejected = True
    calls = [
        Call(
            module=module,
            mask_is_ours=mask is layout,
            is_causal=bool(arguments.get("is_causal", getattr(module, "is_causal", True))),
            unused=attention.unused(arguments),
            window=arguments.get("sliding_window"),
        )
        for module, mask, arguments in _seen
    ]
    _seen.clear()
    return calls, rejected
