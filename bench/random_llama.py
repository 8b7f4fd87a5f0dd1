"""A Llama of random weights and a tokenizer trained on the pairs themselves: what a speed test
needs without a hub.

python bench/random_llama.py --pairs PAIRS.jsonl DIR            # Llama-2-7B's shape, 13.5 GB in
bf16 python bench/random_llama.py --pairs PAIRS.jsonl --layers 2 --hidden 64 --heads 4
--intermediate 128 DIR
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=Path, required=True, help="train.jsonl of prep_data.py")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=32)
    args = parser.parse_args()

    temporary = args.folder.with_name(
        f"{args.folder.name}.tmp"
    )  # what stands under its own name is complete
    rows = [json.loads(line) for line in args.pairs.read_text(encoding="utf-8").splitlines()]
    texts = [
        message["content"]
        for row in rows
        for key in ("prompt", "chosen", "rejected")
        for message in row[key]
    ]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=args.vocabulary,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=special[1],
        pad_token=special[1],
        additional_special_tokens=special[:1],
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(temporary)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        LlamaForCausalLM(config).save_pretrained(temporary)
    temporary.rename(args.folder)
    print(f"{args.folder}: {len(tokenizer)} tokens, {args.layers} layers of {args.hidden}")


if __name__ == "__main__":
    main()
