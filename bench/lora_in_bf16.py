"""What a small update of a LoRA adapter does to margins in bf16, and what it should do.

    python bench/lora_in_bf16.py --model MODEL --pairs PAIRS.jsonl [--count 4] [--max_length 512]

B starts at zero and takes one step of the sign of its gradient, as AdamW's first step is. The sum
of the pairs' margins (nats) then moves by a known amount in fp32. In bf16 it is measured as
training computes it, eager and compiled, and with base and LoRA in one product,
[x | x A^T] [W | B]^T, whose sum is rounded once.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pref.files.pairs import read_pairs  # noqa: E402
from pref.model import loading, lora  # noqa: E402
from pref.model.chat import load_tokenizer, tokenize_pairs  # noqa: E402
from pref.model.logps import ResponseLogps, sum_by_row  # noqa: E402
from pref.model.packing import Packing, make_batch  # noqa: E402

STEPS = (1e-5, 1e-4, 1e-3)
CPU = torch.device("cpu")


def one_product(layer, x: Tensor) -> Tensor:
    """`lora.lora_forward` of a layer without bias or dropout."""
    rows, base = x.flatten(0, -2), layer.get_base_layer().weight
    a, b = (getattr(layer, f"lora_{side}")["default"].weight.to(x.dtype) for side in "AB")
    low = F.linear(rows, a) * layer.scaling["default"]
    output = F.linear(torch.cat([rows, low], 1), torch.cat([base, b], 1))
    return output.unflatten(0, x.shape[:-1])


def policy_of(model: str, dtype: torch.dtype, forward: Callable, compiled: bool) -> ResponseLogps:
    base, ours = loading.load_base(model, dtype, "none", CPU), lora.lora_forward
    lora.lora_forward = forward
    try:
        policy = ResponseLogps(lora.add_lora(base, 16, 16, 0.0, "all-linear", 1))
    finally:
        lora.lora_forward = ours
    if compiled:
        policy.prepare_layers(compiled=True, checkpointed=False)
    return policy


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--count", type=int, default=4, help="number of pairs, from the first on")
    parser.add_argument("--max_length", type=int, default=512)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    rows = read_pairs(args.pairs, args.count)
    pairs = tokenize_pairs(tokenizer, rows, args.max_length, "keep_end")
    batch = make_batch(pairs, Packing(tokenizer.pad_token_id), CPU)

    def margins(policy: ResponseLogps) -> Tensor:
        chosen, rejected = sum_by_row(policy(batch).logps, batch).chunk(2)
        return (chosen - rejected).sum()

    def matrices(policy: ResponseLogps) -> list[Tensor]:
        return [p for name, p in policy.named_parameters() if "lora_B" in name]

    exact = policy_of(args.model, torch.float32, lora.lora_forward, compiled=False)
    gradients = torch.autograd.grad(margins(exact), matrices(exact))
    variants = {
        "fp32": exact,
        "bf16, eager": policy_of(args.model, torch.bfloat16, lora.lora_forward, False),
        "bf16, compiled": policy_of(args.model, torch.bfloat16, lora.lora_forward, True),
        "bf16, one product, eager": policy_of(args.model, torch.bfloat16, one_product, False),
        "bf16, one product, compiled": policy_of(args.model, torch.bfloat16, one_product, True),
    }
    for name, policy in variants.items():
        before, moved = margins(policy).item(), []
        for step in STEPS:
            for matrix, gradient in zip(matrices(policy), gradients, strict=True):
                matrix.data.copy_(step * gradient.sign())
            moved.append(f"{margins(policy).item() - before:+.2f}")
        print(f"{name}: margins move by {', '.join(moved)} nats at steps of {STEPS}", flush=True)


if __name__ == "__main__":
    main()
