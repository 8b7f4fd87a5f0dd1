"""A Llama of random weights, with a tokenizer trained on the pairs: for speed tests without a hub.

    python bench/random_llama.py --pairs PAIRS.jsonl DIR      Llama-2-7B's shape, 13.5 GB in bf16
    python bench/random_llama.py --pairs PAIRS.jsonl --layers 2 --hidden 64 --heads 4 \\
        --intermediate 128 DIR
    python bench/random_llama.py ... --initializer_range 0.3 DIR     some tokens are likely
    python bench/random_llama.py ... --quant nf4 DIR     in 4 bit: 3.9 GB, read sooner
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from tiny import chatml_tokenizer  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, help="where to write the model; must not exist")
    add("--pairs", type=Path, required=True, help="train.jsonl of prep_data.py")
    add("--vocabulary", type=int, default=32000, help="tokens")
    add("--hidden", type=int, default=4096, help="size of the hidden states")
    add("--intermediate", type=int, default=11008, help="size of the MLP")
    add("--layers", type=int, default=32)
    add("--heads", type=int, default=32)
    range_help = "SD of the weights; a larger one makes some tokens likely (default: 0.02)"
    add("--quant", choices=["none", "nf4"], default="none", help="of the layers' linear weights")
    add("--initializer_range", type=float, default=0.02, metavar="SD", help=range_help)
    return parser.parse_args()


def texts_of(pairs: Path) -> list[str]:
    """All messages of a file of pairs."""
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    return [
        message["content"]
        for row in rows
        for key in ("prompt", "chosen", "rejected")
        for message in row[key]
    ]


def save_nf4(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the checkpoint that bitsandbytes and transformers would write, without a second copy of
    the model in memory: NF4 with double quantisation, the output head in bf16.
    """
    from bitsandbytes.functional import quantize_4bit

    head, tensors = model.get_output_embeddings(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            weight = module.weight.detach()
            packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            tensors[f"{name}.weight"] = packed.cpu()
            for key, value in state.as_dict(packed=True).items():
                tensors[f"{name}.weight.{key}"] = value.cpu()
    for name, value in model.state_dict().items():
        tensors.setdefault(name, value.detach().cpu().contiguous())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ).to_dict()
    model.config.save_pretrained(folder)


@torch.no_grad()
def main() -> None:
    args = parse_args()
    # Written under another name first: a folder called args.folder is complete.
    temporary = args.folder.with_name(f"{args.folder.name}.tmp")
    tokenizer = chatml_tokenizer(texts_of(args.pairs), args.vocabulary)
    tokenizer.save_pretrained(temporary)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        initializer_range=args.initializer_range,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
    if args.quant == "nf4":
        save_nf4(model, temporary)
    else:
        model.save_pretrained(temporary)
    temporary.rename(args.folder)
    print(f"{args.folder}: {len(tokenizer)} tokens, {args.layers} layers of {args.hidden}")


if __name__ == "__main__":
    main()
