"""All parameters of a model, or all but those of some modules: what `--tune full` trains.

Trained parameters are held in fp32, whatever the dtype of the computation. In bf16, whose numbers
are 0.4 to 0.8 % apart, AdamW's steps at a learning rate of 5e-7 would round to nothing. FSDP2 casts
them layer by layer for each pass (sharding.py).
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from pref.files.console import UserError
from pref.model import architecture


def train_all(base: PreTrainedModel, freeze: str | None, dtype: torch.dtype) -> None:
    """Let all parameters of `base` be trained, in fp32. Those that --freeze names are not, and are
    in `dtype`, that of the computation.

    Raises UserError if a name matches nothing, or nothing is left to be trained.
    """
    frozen = frozen_ids(base, freeze)
    for parameter in base.parameters():
        is_frozen = id(parameter) in frozen
        parameter.requires_grad_(not is_frozen)
        parameter.data = parameter.data.to(dtype if is_frozen else torch.float32)
    if not any(parameter.requires_grad for parameter in base.parameters()):
        raise UserError(f"--freeze {freeze}: leaves no parameter to train; name fewer modules")


def frozen_ids(base: PreTrainedModel, freeze: str | None) -> set[int]:
    """ids of the parameters that `freeze` names: a name with commas each, of one or more parts of a
    module's name that follow one another ("embed_tokens", "layers.0", "mlp.down_proj").

    A tensor that two modules share, such as a tied head's, is frozen under either name.
    """
    named = [(f".{name}.", id(p)) for name, p in base.named_parameters(remove_duplicate=False)]
    frozen = set()
    for part in freeze.split(",") if freeze else []:
        found = {number for name, number in named if part and f".{part}." in name}
        if not found:
            raise UserError(
                f"--freeze {part}: no parameter of the model has this in its name; its modules "
                f"are {', '.join(module_names(base))}"
            )
        frozen |= found
    return frozen


def module_names(base: PreTrainedModel) -> list[str]:
    """Names that --freeze takes: of the backbone's parts, the head, and one layer's parts."""
    layers = architecture.find_layers(base)
    parts = [name for name, part in architecture.backbone_of(base).named_children() if has(part)]
    first = [name for name, part in layers[0].named_children() if has(part)] if layers else []
    head = base.get_output_embeddings()
    heads = [name.rpartition(".")[2] for name, module in base.named_modules() if module is head]
    return list(dict.fromkeys([*parts, *heads, *first]))


def has(module: nn.Module) -> bool:
    """Whether a module has parameters."""
    return any(True for _ in module.parameters())
