"""Tiny random reward models for the tests: real checkpoints, with the names of published ones."""

import json
from pathlib import Path

import torch
import transformers
from conftest import example_rows
from safetensors.torch import load_file, save_file
from tiny import chatml_tokenizer
from tokenizers.processors import TemplateProcessing

WORDS = [row["chosen"][0]["content"] for row in example_rows(60)]
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim }}"
    "<|eot_id|>{% endfor %}"
)
LLAMA_3_TOKENS = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
SIZES = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 512}
DECODER = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}


def conversation(number: int, turns: int = 1, words: int = 12) -> list[dict]:
    """Messages whose answers have about `words` words."""
    texts = " ".join(WORDS[number:] + WORDS).split()
    messages = []
    for turn in range(turns):
        question, answer = texts[turn : turn + 5], texts[turn + 5 : turn + 5 + words]
        messages.append({"role": "user", "content": " ".join(question)})
        messages.append({"role": "assistant", "content": " ".join(answer)})
    return messages


def chatml(folder: Path) -> None:
    chatml_tokenizer(WORDS, SIZES["vocab_size"], ["<pad>"]).save_pretrained(folder)


def llama_3(folder: Path) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer that puts <|begin_of_text|> before any text, as its template does."""
    tokenizer = chatml_tokenizer(WORDS, SIZES["vocab_size"], [*LLAMA_3_TOKENS, "[PAD]"])
    tokenizer.chat_template = LLAMA_3
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = *LLAMA_3_TOKENS[:2], "[PAD]"
    bos = tokenizer.bos_token
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def pairs_of_texts(folder: Path) -> None:
    """A tokenizer as encoders have it: [CLS] question [SEP] answer [SEP], no chat template."""
    tokenizer = chatml_tokenizer(WORDS, SIZES["vocab_size"], ["[PAD]", "[CLS]", "[SEP]"])
    tokenizer.chat_template = None
    tokenizer.pad_token, tokenizer.cls_token, tokenizer.sep_token = "[PAD]", "[CLS]", "[SEP]"
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)


def decoder(folder: Path, kind: str = "Llama", labels: int = 1, **settings) -> Path:
    """A random reward model whose score is read from the last token. kind: Llama, Qwen3, ..."""
    chatml(folder)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **DECODER | {"num_labels": labels, "pad_token_id": 0} | settings
    )
    getattr(transformers, f"{kind}ForSequenceClassification")(config).save_pretrained(folder)
    return folder


def encoder(folder: Path, kind: str, **settings) -> Path:
    """A random encoder with one label. kind: Bert, Roberta, DebertaV2, ..."""
    pairs_of_texts(folder)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **SIZES | {"num_labels": 1, "pad_token_id": 0, "initializer_range": 0.3} | settings
    )
    getattr(transformers, f"{kind}ForSequenceClassification")(config).save_pretrained(folder)
    return folder


ARMO = {"num_objectives": 5, "gating_temperature": 10, "gating_hidden_dim": 24}
ARMO |= {"gating_n_hidden": 3}


def armo(folder: Path) -> Path:
    """A random checkpoint with ArmoRM's configuration and names of tensors."""
    llama_3(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**DECODER, pad_token_id=4)
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["score.weight"]
    hidden, inner, k = 32, ARMO["gating_hidden_dim"], ARMO["num_objectives"]
    shapes = {"regression_layer.weight": (k, hidden), "reward_transform_matrix": (k, k)}
    sizes = ((inner, hidden), (inner, inner), (inner, inner), (k, inner))
    for n, (rows, columns) in enumerate(sizes):
        shapes |= {f"gating.layers.{n}.weight": (rows, columns), f"gating.layers.{n}.bias": (rows,)}
    tensors |= {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    tensors["gating.logit_scale"] = torch.tensor([1.5])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(
        folder,
        architectures=["LlamaForRewardModelWithGating"],
        auto_map={
            "AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"
        },
        **ARMO,
    )
    return folder


def edit_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
