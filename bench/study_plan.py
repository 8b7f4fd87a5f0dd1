"""The first study in hours, on cards that need not be here: its runs (grids/tddpo), one per GPU.

    python bench/study_plan.py                              8 x a100-80, and 1 x h100
    python bench/study_plan.py --fleet 4xh100 --mfu 0.3 0.5
    python bench/study_plan.py --row_tokens 576 1000

Nothing is measured. The model is Llama-2-7b-chat's configuration without weights. The pairs are as
many as dpo-mix-7k has, of drawn lengths: prompt, chosen and rejected are log-normal (SD 0.7 of the
logarithm, medians as 4 to 3 to 3, cut at half of --max_length) with --row_tokens on average for a
shared row. With the real pairs, `train_pref.py --dry_run 1 --gpu CARD` plans one run.
"""

import argparse
import random
import sys
import tempfile

import torch
from train_vs_trl import ROOT
from transformers import LlamaConfig

sys.path.insert(0, str(ROOT))

from pref.model.chat import TokenPair  # noqa: E402
from pref.model.ranks import Ranks  # noqa: E402
from pref.sweeping import grid  # noqa: E402
from pref.training import arguments, hardware, operations, plan, settings  # noqa: E402

LLAMA_2_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=4096,
    architectures=["LlamaForCausalLM"],
)
TRAIN_PAIRS, VAL_PAIRS = 6750, 750
START_MINUTES = 2  # of each run: imports, 13.5 GB of weights, quantising, tokenising, compiling


def pairs_of(count: int, row_tokens: int, longest: int, seed: int) -> list[TokenPair]:
    """Pairs whose shared rows have `row_tokens` on average."""
    rng = random.Random(seed)
    pairs = [[rng.lognormvariate(0, 0.7) * share for share in (4, 3, 3)] for _ in range(count)]
    scale = row_tokens * count / sum(map(sum, pairs))
    return [
        TokenPair(*([1] * max(8, min(longest // 2, round(scale * n))) for n in pair))
        for pair in pairs
    ]


def plan_of(model: str, card: str, row_tokens: int) -> tuple[plan.Plan, Ranks]:
    """One run of the study on one `card`."""
    options = ["--model", model, "--dry_run", "1", "--gpu", card]
    given = arguments.parse_args([*options, "--quant", "nf4", "--dtype", "bfloat16"])
    ranks = hardware.planned_ranks(given, Ranks(0, 1, torch.device("cpu")))
    packing = settings.packing_of(given, pad_id=0)
    train = pairs_of(TRAIN_PAIRS, row_tokens, given.max_length, seed=1)
    val = pairs_of(VAL_PAIRS, row_tokens, given.max_length, seed=2)
    return plan.of_run(given, train, packing, ranks, val), ranks


def row_of(planned: plan.Plan, card: str, cards: int, runs: int, mfu: float) -> str:
    """Tokens a second, hours of a run, and hours of all runs: in waves of one per card, after one
    card has computed the reference.
    """

    def hours(work: float) -> float:
        return operations.hours(work, hardware.CARDS[card], mfu, world=1)

    of_run, waves = hours(planned.work.of_run), -(-runs // cards)
    in_all = waves * (of_run + START_MINUTES / 60) + hours(planned.work.reference)
    return f"{planned.load.tokens / of_run / 3600:,.0f} | {of_run:.2f} | {in_all:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--fleet", nargs="+", default=["8xa100-80", "1xh100"], metavar="NxCARD", help="cards")
    add("--row_tokens", type=int, nargs="+", default=[576, 1000], help="mean of a pair's row")
    add("--mfu", type=float, nargs="+", default=[0.35, 0.5], help="assumed shares of the peak")
    args = parser.parse_args()

    points = grid.expand(grid.settings_of(grid.grid_path("tddpo"))[0])
    rows = []
    with tempfile.TemporaryDirectory() as model:
        LLAMA_2_7B.save_pretrained(model)
        for fleet in args.fleet:
            cards, _, card = fleet.partition("x")
            for row_tokens in args.row_tokens:
                planned, ranks = plan_of(model, card, row_tokens)
                print(f"\n{fleet}, one run on one card, rows of {row_tokens} tokens:")
                plan.show(planned, ranks)
                for mfu in args.mfu:
                    text = row_of(planned, card, int(cards), len(points), mfu)
                    rows.append(f"| {fleet} | {row_tokens:,} | {mfu:.0%} | {text}")
    waves = ", ".join(f"{-(-len(points) // int(f.partition('x')[0]))} on {f}" for f in args.fleet)
    print(
        f"\n{len(points)} runs of grids/tddpo, {TRAIN_PAIRS:,} and {VAL_PAIRS} pairs, one run per "
        f"GPU in waves ({waves}), {START_MINUTES} min of start-up each, recomputation added to the "
        "MFU; answers and judging are not counted, and nothing of this is measured\n"
    )
    print("| cards | tokens a row | MFU | tok/s a GPU | hours a run | hours in all |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
