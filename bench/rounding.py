"""How far bf16 log-probs move with the size of the micro-batch, although weights and pairs are the
same.

    python bench/rounding.py --model MODEL --pairs PAIRS.jsonl [--max_length 1024] [--dtype float32]

Two comparisons of equal models, per response token and per pair (rho = difference of the responses'
sums, nats): policy against a reference computed in other micro-batches, as a run reads it from the
cache; and policy against a reference computed live on the same micro-batch, after an update of the
adapter by 1e-6.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pref.files.pairs import read_pairs  # noqa: E402
from pref.model import logps  # noqa: E402
from pref.model.chat import load_tokenizer, tokenize_pairs  # noqa: E402
from pref.model.logps import sum_by_row  # noqa: E402
from pref.model.lora import adapter_off  # noqa: E402
from pref.model.packing import Packing, make_batch, share_out  # noqa: E402
from pref.model.ranks import close_ranks, init_ranks  # noqa: E402
from pref.model.sharding import local  # noqa: E402
from pref.training import arguments, assembly, schedule  # noqa: E402
from pref.training.reference import Reference, compute  # noqa: E402

SEED, STEP_PAIRS = 42, 8


def describe(name: str, batches: list, differences: list[torch.Tensor]) -> None:
    tokens = torch.cat(differences).abs()
    sums = [
        sum_by_row(difference, batch).chunk(2) for batch, difference in zip(batches, differences)
    ]
    rho = torch.cat([chosen - rejected for chosen, rejected in sums])
    print(
        f"{name}: {tokens.mean():.2g} nats per token on average, largest {tokens.max():.2g}; rho "
        f"of {len(rho)} pairs "
        f"from {rho.min():+.2g} to {rho.max():+.2g}, root mean square "
        f"{rho.square().mean().sqrt():.2g}"
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--count", type=int, default=24, help="number of pairs, from the first on")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()
    tokenizer, ranks = load_tokenizer(given.model), init_ranks()
    pairs = tokenize_pairs(
        tokenizer, read_pairs(given.pairs, given.count), given.max_length, "keep_end"
    )
    args = arguments.parse_args(
        [
            "--model",
            given.model,
            "--lora_r",
            "16",
            "--lora_dropout",
            "0",
            "--compile",
            "off",
            "--checkpointing",
            "off",
            "--quant",
            "none",
            "--dtype",
            given.dtype,
        ]
    )
    policy, _ = assembly.build_policy(args, ranks)
    packing = Packing(tokenizer.pad_token_id, 4, 4 * given.max_length)
    reference = Reference(pairs, compute(policy, pairs, packing, ranks, "all pairs"))
    steps = range(0, len(pairs) - STEP_PAIRS + 1, STEP_PAIRS)
    members = [
        schedule.pairs_of_step(number, len(pairs), STEP_PAIRS, SEED) for number in range(len(steps))
    ]
    micros = [micro for step in members for micro in share_out(step, pairs, packing)]
    batches = [make_batch([pairs[i] for i in micro], packing, ranks.device) for micro in micros]
    print(
        f"{len(pairs)} pairs in {len(batches)} micro-batches of "
        f"{', '.join(str(b.tokens) for b in batches)} tokens"
    )
    policies = [policy(batch)[0] for batch in batches]
    describe(
        "reference from other micro-batches",
        batches,
        [p - reference.of(m) for p, m in zip(policies, micros)],
    )
    with adapter_off(policy):
        live = [policy(batch)[0] for batch in batches]
    describe(
        "reference from the same micro-batch", batches, [p - q for p, q in zip(policies, live)]
    )
    torch.manual_seed(1)
    for name, parameter in logps.trainable(policy).items():
        if "lora_B" in name:
            local(parameter.data).normal_(0, 1e-6)
    moved = [policy(batch)[0] for batch in batches]
    describe("the same, after an update of 1e-6", batches, [p - q for p, q in zip(moved, live)])
    close_ranks()


if __name__ == "__main__":
    main()
