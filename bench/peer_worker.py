"""DPO with LoRA in Unsloth, ms-swift or LLaMA-Factory, for train_vs_peers.py. Runs in the peer's
own interpreter and imports nothing of this repository.

    PYTHON -P bench/peer_worker.py unsloth|unsloth_compile|swift|llamafactory FOLDER

FOLDER: work.json, the pairs in the peer's format and LoRA's first values, as train_vs_peers.py
writes them. Leaves result.json there.
"""

import importlib.metadata
import json
import resource
import sys
import time
from pathlib import Path

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# transformers' options, which every peer passes on.
TRAINER = {
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,  # as the default, a NaN would be logged as the last good loss
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


def watch_training(first_lora: Path) -> dict[str, list]:
    """Have every Trainer of this process note the seconds, loss and tokens of each step, and begin
    with the LoRA values of a safetensors file. Returns the lists that will be filled.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import TrainerCallback
    from transformers.trainer_callback import CallbackHandler

    seen: dict[str, list] = {"seconds": [], "losses": [], "tokens": []}

    def count_tokens(_module, args, kwargs) -> None:
        if not torch.is_grad_enabled():  # the reference's pass
            return
        mask = kwargs.get("attention_mask")
        ids = kwargs.get("input_ids", args[0] if args else None)
        seen["tokens"][-1] += int(mask.sum()) if mask is not None else ids.numel()

    class Watch(TrainerCallback):
        def on_train_begin(self, _args, _state, _control, model=None, **_):
            values = load_file(first_lora)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if "lora_A.default" in name:  # TRL adds an adapter "ref" to Unsloth's model
                        p.copy_(values.pop(name))
            assert not values, f"LoRA layers that this peer lacks: {sorted(values)}"
            decoder = model.get_base_model().model
            decoder.register_forward_pre_hook(count_tokens, with_kwargs=True)

        def on_step_begin(self, *_, **__):
            seen["tokens"].append(0)
            self.begun = time.perf_counter()

        def on_step_end(self, *_, **__):
            seen["seconds"].append(time.perf_counter() - self.begun)

        def on_log(self, _args, _state, _control, logs=None, **_):
            if "loss" in logs:
                seen["losses"].append(float(logs["loss"]))

    as_it_is = CallbackHandler.__init__

    def with_watch(self, callbacks, *rest) -> None:
        as_it_is(self, [*callbacks, Watch()], *rest)

    CallbackHandler.__init__ = with_watch  # every Trainer's: the peers offer no place of their own
    return seen


def train_unsloth(work: dict, folder: Path) -> None:
    """TRL's DPOTrainer on Unsloth's model and with its defaults for CPUs."""
    import torch
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        work["model"],
        max_seq_length=work["max_length"],
        dtype=getattr(torch, work["dtype"]),
        load_in_4bit=False,
        use_gradient_checkpointing=False,
    )
    model = FastLanguageModel.get_peft_model(
        model, r=work["lora_r"], lora_alpha=16, lora_dropout=0.0, use_gradient_checkpointing=False
    )
    config = DPOConfig(
        **TRAINER,
        output_dir=str(folder / "output"),
        per_device_train_batch_size=work["batch"],
        learning_rate=work["learning_rate"],
        beta=work["beta"],
        max_length=work["max_length"],
        bf16=work["dtype"] == "bfloat16",
        train_sampling_strategy="sequential",
    )
    rows = load_dataset("json", data_files=str(folder / "unsloth.jsonl"), split="train")
    DPOTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer).train()


def train_swift(work: dict, folder: Path) -> None:
    """`swift rlhf --rlhf_type dpo`."""
    from swift.pipelines import rlhf_main

    options = TRAINER | {
        "rlhf_type": "dpo",
        "model": work["model"],
        "model_type": "llama",
        "template": "chatml",
        "system": SYSTEM,
        "dataset": folder / "swift.jsonl",
        "dataset_shuffle": False,
        "train_dataloader_shuffle": False,
        "split_dataset_ratio": 0,
        "output_dir": folder / "output",
        "torch_dtype": work["dtype"],
        "bf16": work["dtype"] == "bfloat16",
        "tuner_type": "lora",
        "target_modules": "all-linear",
        "lora_rank": work["lora_r"],
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "warmup_ratio": 0,
        "beta": work["beta"],
        "max_length": work["max_length"],
        "per_device_train_batch_size": work["batch"],
        "gradient_accumulation_steps": 1,
        "learning_rate": work["learning_rate"],
    }
    rlhf_main([part for key, value in options.items() for part in (f"--{key}", str(value))])


def train_llamafactory(work: dict, folder: Path) -> None:
    """`llamafactory-cli train` with stage dpo."""
    from llamafactory.train.tuner import run_exp

    columns = {"messages": "prompt", "chosen": "chosen", "rejected": "rejected"}
    tags = {"role_tag": "role", "content_tag": "content"}
    tags |= {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
    dataset = {"file_name": "llamafactory.jsonl", "formatting": "sharegpt", "ranking": True}
    about = {"pairs": dataset | {"columns": columns, "tags": tags}}
    (folder / "dataset_info.json").write_text(json.dumps(about), encoding="utf-8")
    options = TRAINER | {
        "stage": "dpo",
        "do_train": True,
        "model_name_or_path": work["model"],
        "template": "smollm2",
        "default_system": SYSTEM,
        "dataset_dir": str(folder),
        "dataset": "pairs",
        "disable_shuffling": True,
        "disable_gradient_checkpointing": True,
        "preprocessing_num_workers": 1,
        "overwrite_cache": True,
        "output_dir": str(folder / "output"),
        "bf16": work["dtype"] == "bfloat16",
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": work["lora_r"],
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "pref_beta": work["beta"],
        "cutoff_len": 2 * work["max_length"],  # it shares the length out before it needs to
        "per_device_train_batch_size": work["batch"],
        "gradient_accumulation_steps": 1,
        "learning_rate": work["learning_rate"],
    }
    run_exp(options)


def train_peer(name: str, folder: Path) -> None:
    """Train and write result.json: seconds, loss and tokens per step, peak resident GiB, versions
    of packages.
    """
    work = json.loads((folder / "work.json").read_text(encoding="utf-8"))
    if name.startswith("unsloth"):
        import unsloth  # noqa: F401  before transformers and TRL, which it patches
    seen = watch_training(folder / "first_lora.safetensors")
    peer = name.removesuffix("_compile")
    {"unsloth": train_unsloth, "swift": train_swift, "llamafactory": train_llamafactory}[peer](
        work, folder
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of KiB: Linux
    packages = ("unsloth", "ms-swift", "llamafactory", "trl", "transformers", "peft", "torch")
    found = importlib.metadata.packages_distributions().values()
    installed = {name.replace("_", "-") for names in found for name in names}
    versions = {name: importlib.metadata.version(name) for name in packages if name in installed}
    result = seen | {"peak_gib": peak, "versions": versions}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    train_peer(sys.argv[1], Path(sys.argv[2]))
