"""How exact the output head is in bf16 on a CPU, apart from all that comes before it.

    python bench/head_exactness.py --model MODEL --pairs PAIRS.jsonl [--max_length 512]

From the same bf16 hidden states of real pairs: log-probs of the response tokens and their
derivatives for the hidden states, as training computes them (the head as attention, logits in
fp32) and from logits that a product in bf16 has rounded, both against fp32.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pref.files.pairs import read_pairs  # noqa: E402
from pref.model import loading  # noqa: E402
from pref.model.chat import load_tokenizer, tokenize_pairs  # noqa: E402
from pref.model.logps import ResponseLogps, TargetLogps, logps_of, slopes_of  # noqa: E402
from pref.model.packing import Packing, make_batch  # noqa: E402

CHUNK = 256  # tokens whose logits are held at once
CERTAIN = 0.99


def rounded(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs (N,) and their derivatives (N, H) from logits in the dtype of `weight`."""
    values, slopes = [], []
    for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        logits = F.linear(h, weight)
        logps, normaliser = logps_of(logits, t, None)
        values.append(logps)
        slopes.append(slopes_of(logits, t, normaliser, None) @ weight)
    return torch.cat(values), torch.cat(slopes)


def of_training(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same as training computes them."""
    hidden = hidden.clone().requires_grad_()
    logps = TargetLogps.apply(hidden, weight, None, targets, None, CHUNK, logps_of, slopes_of)
    (slopes,) = torch.autograd.grad(logps.sum(), hidden)
    return logps.detach(), slopes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--count", type=int, default=24, help="number of pairs, from the first on")
    parser.add_argument("--max_length", type=int, default=512)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    pairs = tokenize_pairs(
        tokenizer, read_pairs(args.pairs, args.count), args.max_length, "keep_end"
    )
    base = loading.load_base(args.model, torch.bfloat16, "none", torch.device("cpu"))
    policy = ResponseLogps(base)
    if not policy.has_wide_logits(torch.bfloat16):
        raise SystemExit(f"{args.model}: its head is not computed as attention")
    weight = base.get_output_embeddings().weight.detach()

    results: dict[str, list[tuple[Tensor, Tensor]]] = {"exact": [], "training": [], "rounded": []}
    with torch.no_grad():
        for pair in pairs:
            batch = make_batch([pair], Packing(tokenizer.pad_token_id), torch.device("cpu"))
            hidden = policy.hidden(batch)
            results["exact"].append(rounded(hidden.float(), weight.float(), batch.targets))
            results["rounded"].append(rounded(hidden, weight, batch.targets))
            with torch.enable_grad():
                results["training"].append(of_training(hidden, weight, batch.targets))
    exact, right = map(torch.cat, zip(*results.pop("exact"), strict=True))
    certain = exact.exp() > CERTAIN
    share = right[certain].norm() / right.norm()
    print(
        f"{len(exact)} response tokens, {certain.float().mean():.0%} of them with p > {CERTAIN}, "
        f"which have {share:.2%} of the gradient's norm"
    )
    for name, parts in results.items():
        logps, slopes = map(torch.cat, zip(*parts, strict=True))
        off, gradient_off = logps - exact, slopes - right
        each = gradient_off.norm(dim=-1) / right.norm(dim=-1)
        print(
            f"{name}: log-probs off by {off.square().mean().sqrt():.1e} nats (root mean square), "
            f"at most {off.abs().max():.1e}; gradient by {gradient_off.norm() / right.norm():.2%} "
            f"of its norm, a certain token's by {each[certain].median():.0%} of its own (median)"
        )


if __name__ == "__main__":
    main()
