"""The files of a model: where they are, whether they can be used, and which model they are.

    find_model      a hub id or folder -> its folder and configuration, or why it cannot be loaded
    check_files     whole weight files, none of them a Git LFS pointer
    identity        a hash of all weights and of the configuration, wherever the files are

Nothing here loads weights: that is loading.py.
"""

import functools
import os
from pathlib import Path
from typing import NamedTuple

import huggingface_hub.constants
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import cached_file

from pref.files import disk, sources, tensor_files
from pref.files.console import UserError, first_line

# Weight files in the order in which transformers looks for them; an index names its parts.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
WEIGHT_FILES += ("pytorch_model.bin", "pytorch_model.bin.index.json")
LFS_POINTER = b"version https://git-lfs"
# Keys of a configuration that change no log-probability: how and from where it was saved or is
# loaded, and what generation alone reads.
NOT_THE_MODEL = {
    *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"),
    *("_attn_implementation", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("do_sample", "max_length", "temperature", "top_k", "top_p", "repetition_penalty"),
}


class ModelFiles(NamedTuple):
    """A model that `find_model` has found."""

    name: str  # an absolute folder, or a hub id
    folder: Path  # of the configuration: the folder itself, or the hub cache's snapshot
    config: dict

    @property
    def is_local(self) -> bool:
        return self.name == str(self.folder)

    @property
    def quantisation(self) -> str | None:
        """The method by which the checkpoint itself is quantised ("fp8", "gptq", ...), or None."""
        parts = (self.config, self.config.get("text_config"))
        of_parts = [part.get("quantization_config") for part in parts if isinstance(part, dict)]
        own = next((value for value in of_parts if isinstance(value, dict)), None)
        if own is None:
            return None
        if own.get("load_in_4bit") or own.get("load_in_8bit"):
            return f"bitsandbytes_{'4' if own.get('load_in_4bit') else '8'}bit"
        return str(own.get("quant_method") or "unnamed")


# ---- where a model is, and whether it is one ----------------------------------------------------


def find_model(
    model: str, option: str = "--model ", needs_weights: bool = True, classifier: bool = False
) -> ModelFiles:
    """The files of a hub id or folder. Of a hub id only the configuration is fetched.

    needs_weights: False for a plan, which a configuration is enough for. classifier: a sequence
    classifier is needed (a reward model), no language model. Raises UserError, beginning with
    `option` and naming the remedy, if it cannot be a model of this kind that transformers loads
    without code of the model's own.
    """
    place = f"{option}{model}"
    folder = Path(model)
    if folder.is_dir():
        folder = Path(os.path.abspath(folder))
        files = ModelFiles(str(folder), folder, read_config(folder, place))
        if needs_weights:
            check_files(files.folder, files.config, place)
    elif folder.exists():
        raise UserError(f"{place}: {about_file(folder)}")
    else:
        folder = hub_folder(model, place)
        files = ModelFiles(model, folder, read_config(folder, place))
    check_architecture(files.folder, files.config, place, classifier)
    check_quantisation(files.quantisation, place)
    return files


def about_file(path: Path) -> str:
    """Why a file is no model, and what to give instead."""
    if path.suffix == ".gguf":
        return (
            "is a GGUF file, which cannot be trained; give the model it was made from (its hub id "
            "or folder), or write it out as a folder: examples/embedded_model.py shows how"
        )
    return f"is a file; give the folder that it is in ({path.parent})"


def hub_folder(model: str, place: str) -> Path:
    """The folder in the hub's cache that has the configuration of a hub id, downloaded if the hub
    can be reached.
    """
    if not sources.is_hub_id(model):
        raise UserError(f"{place}: no such folder, and not a hub id (owner/name)")
    if not hub_is_reached():
        # Libraries then go straight to the cache, instead of retrying for 25 s.
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    reason = "this machine cannot reach the hub, and has no copy" if offline else "no config.json"
    found = []
    for name in ("config.json", "adapter_config.json"):
        try:
            found.append(cached_file(model, name, _raise_exceptions_for_missing_entries=False))
        except (OSError, ValueError) as error:
            reason = reason if offline else first_line(error)
    for path in filter(None, found):
        return Path(path).parent
    raise UserError(
        f"{place}: no such folder here, and not to be had as a hub id ({reason}); check the "
        "spelling and the network, or give a folder (gated models need `hf auth login`)"
    )


@functools.cache
def hub_is_reached() -> bool:
    return sources.hub_answers()


def read_config(folder: Path, place: str) -> dict:
    """The configuration of the model in `folder`. Raises UserError for an adapter, or if there is
    no configuration that can be read.
    """
    path, adapter = folder / "config.json", folder / "adapter_config.json"
    if adapter.is_file():
        # transformers would load the base that the adapter names, whatever else the folder holds.
        base = disk.read_json(adapter).get("base_model_name_or_path")
        remedy = f"merge it into its base ({base}), and give the folder of the merged model"
        if place.startswith("--model "):
            remedy = f"give its base as --model ({base}), and to train on from the adapter, its "
            remedy += "folder as --init_adapter"
        raise UserError(f"{place}: holds a LoRA adapter (adapter_config.json); {remedy}")
    if not path.is_file():
        if any(folder.glob("*.gguf")):
            raise UserError(f"{place}: {about_file(next(folder.glob('*.gguf')))}")
        if (folder / "adapter").is_dir() and (folder / "args.json").is_file():
            raise UserError(
                f"{place}: is the folder of a run; give its base as --model, and to train on from "
                f"its adapter, --init_adapter {folder / 'adapter'}"
            )
        raise UserError(f"{place}: has no config.json, so it is not a model's folder")
    check_no_pointer(path, place)
    return disk.read_json(path)


def check_architecture(folder: Path, config: dict, place: str, classifier: bool = False) -> None:
    """Raise UserError for a model that transformers does not know or cannot make as a causal
    language model, or as a sequence classifier.
    """
    kind, version = config.get("model_type"), transformers.__version__
    known, needed = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "a causal language model"
    is_not = "not a language model that generates text from text"
    if classifier:
        known, needed = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, "a reward model"
        is_not = "of a kind that transformers has no sequence classifier for"
    if kind in known:
        check_values(folder, place)
        return
    if kind in transformers.CONFIG_MAPPING:
        name = (config.get("architectures") or [kind])[0]
        raise UserError(f"{place}: {name} ({kind}) is {is_not}; give {needed}")
    if config.get("auto_map"):
        raise UserError(
            f"{place}: needs code that comes with the model (auto_map in its config.json), which "
            "is never run here; give a model that transformers has itself"
        )
    if kind is None:
        raise UserError(f"{place}: its config.json has no model_type; not a transformers model")
    raise UserError(
        f"{place}: transformers {version} does not know the model type {kind!r}; install a version "
        "that does, or give another model"
    )


def check_values(folder: Path, place: str) -> None:
    """Raise UserError for a configuration whose values make no model."""
    try:
        transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{place}: its config.json makes no model ({reason})") from None


def check_quantisation(method: str | None, place: str) -> None:
    """Raise UserError for a quantised checkpoint that transformers would load as if it were not."""
    if method is not None and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise UserError(
            f"{place}: its weights are quantised by a method that transformers "
            f"{transformers.__version__} does not know ({method}); give the model's release that "
            "is not quantised, with --quant nf4 to save memory"
        )


# ---- whether its files are whole ----------------------------------------------------------------


def weight_files(folder: Path, config: dict, place: str) -> list[Path]:
    """The files that transformers would load. Raises UserError if there are none, or one that the
    index names is missing.
    """
    names = (config.get("transformers_weights"),) if config.get("transformers_weights") else ()
    for name in (*names, *WEIGHT_FILES):
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".index.json"):
            return [path]
        check_no_pointer(path, place)
        parts = sorted(set(disk.read_json(path).get("weight_map", {}).values()))
        if missing := [part for part in parts if not (folder / part).is_file()]:
            raise UserError(
                f"{place}: {len(missing)} of the {len(parts)} weight files that {name} names are "
                f"missing ({missing[0]}); download the model again"
            )
        return [folder / part for part in parts]
    raise UserError(
        f"{place}: has no weights ({WEIGHT_FILES[0]}, or another of {', '.join(WEIGHT_FILES[1:])})"
    )


def check_files(folder: Path, config: dict, place: str) -> None:
    """Raise UserError for weight files that are missing, incomplete or Git LFS pointers."""
    for path in weight_files(folder, config, place):
        check_no_pointer(path, place)
        if path.suffix == ".safetensors":
            tensor_files.tensors_of(path, place)
        elif path.stat().st_size == 0:
            raise UserError(f"{place}: {path.name} is empty; download the model again")
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        if (folder / name).is_file():
            check_no_pointer(folder / name, place)


def check_no_pointer(path: Path, place: str) -> None:
    with open(path, "rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise UserError(
            f"{place}: {path.name} is a Git LFS pointer, not the file itself; run `git lfs pull` "
            "in the folder it was cloned to, or download the model again"
        )


# ---- which model it is --------------------------------------------------------------------------


def identity(files: ModelFiles) -> str:
    """sha256 over all weights and the configuration of a model: the same wherever the files are,
    and however many of them there are; another one if any weight, or anything in the configuration
    that a log-probability depends on, differs.

    A file's part is computed once and kept in the user's cache folder (14 GB take about 10 s).
    """
    paths = weight_files(files.folder, files.config, files.name)
    return disk.sha256_json([without(files.config, NOT_THE_MODEL), tensor_files.digest_of(paths)])


def without(value, keys: set[str]):
    """A JSON value without these keys, at any depth."""
    if isinstance(value, dict):
        return {key: without(item, keys) for key, item in value.items() if key not in keys}
    return [without(item, keys) for item in value] if isinstance(value, list) else value
