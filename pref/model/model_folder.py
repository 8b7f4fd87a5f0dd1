"""A whole model as a Hugging Face folder, which transformers, vLLM and this toolkit load as it is.

*.safetensors            the weights, at most SHARD a file, with an index if there are several
config.json              with the dtype of the weights
tokenizer*, *.jinja ...  those of the model that it came from, byte for byte: the tokenizer,
                         its chat template and generation_config.json
"""

import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from pref.files import disk
from pref.model import sharding
from pref.model.ranks import Ranks

SHARD = "5GB"
# What a tokenizer and generation are made of.
COPIED = ("tokenizer*", "*.jinja", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model")
COPIED += ("added_tokens.json", "generation_config.json", "additional_chat_templates/*")


def write(
    model: PreTrainedModel,
    folder: Path,
    origin: Path,
    dtype: torch.dtype,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write `model` to `folder`, with what else the folder `origin` of the model that it came from
    has. `model` can be trained on afterwards.

    dtype: of the weights as written. state: the tensors to write, by name, if they are not those
    that `model` holds (`gathered`); it is emptied. Raises OSError or SafetensorError, and then the
    folder is not whole.
    """
    config, used_cache = model.config, model.config.use_cache
    config.use_cache = True  # off in training only
    shows_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, state_dict=state, max_shard_size=SHARD)
        # That recorded the dtype of the parameters in memory.
        config.dtype = dtype
        config.save_pretrained(folder)
    finally:
        config.use_cache = used_cache
        if shows_bar:
            logging.enable_progress_bar()
    for path in {path for pattern in COPIED for path in origin.glob(pattern)}:
        place = folder / path.relative_to(origin)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)
    disk.as_umask_says(folder)


def gathered(model: PreTrainedModel, dtype: torch.dtype, ranks: Ranks) -> dict[str, Tensor]:
    """The tensors of a model that may be sharded, by name, on the CPU of rank 0; {} on the other
    ranks. Parameters are in `dtype`, in which the model computes, buffers as they are. Tied
    parameters are one tensor with several names. Collective.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first = {}  # the name of a parameter under which it is gathered
    for name, parameter in parameters.items():
        first.setdefault(id(parameter), name)
    once = {name: parameters[name].detach() for name in first.values()}
    buffers = {name: t for name, t in model.state_dict().items() if name not in parameters}
    found = sharding.gather(once, ranks, dtype) | sharding.gather(buffers, ranks)
    if not ranks.main:
        return {}
    return found | {name: found[first[id(parameters[name])]] for name in parameters}
