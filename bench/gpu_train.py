"""Training on one GPU: train_pref.py against TRL, each at its best setting, and technique by
technique. A part of bench/gpu.sh; prints rows (gpu_rows.py).

    python bench/gpu_train.py --model DIR --pairs PAIRS.jsonl [--seconds 380]

Rows, in the order of their weight, each a process of its own:

1. train_pref.py at its best: `--tokens`, compiled, nothing recomputed; and with every `auto`.
2. TRL at each of `--trl` (pairs per micro-batch, and whether it recomputes); Liger's kernels too
   where they are installed. The fastest is TRL's best; then the same with precomputed references.
3. train_pref.py with as many pairs a micro-batch as TRL's leanest row and with recomputation, as
   there: for the memory.
4. The ladder: from all logits of a padded batch to 1.

A step has `--global_batch` pairs. mfu: model FLOPs (4 per parameter and token for LoRA: forward and
the gradient of the input; recomputation, LoRA and attention not counted) over the card's bf16 peak.
A row that is not there by `--seconds` is a failed one.
"""

import argparse
import importlib.util
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import train_vs_trl
from gpu_rows import attempt, card, emit, peaks_of

START_S = 20  # a row that has less than this left is not begun


class Setting(NamedTuple):
    """A row: who computes it, and how."""

    row: str
    contestant: str  # of train_vs_trl.CONTESTANTS
    batch: int = 4  # pairs per micro-batch
    tokens: int = 0  # per micro-batch; 0: by `batch`
    checkpointing: str = "on"
    compile: str = "off"
    liger: bool = False


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=380)
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--global_batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=4096, help="per micro-batch, at our best")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of train_pref.py")
    parser.add_argument("--trl_steps", type=int, default=1, help="timed steps of TRL")
    parser.add_argument("--lora_r", type=int, default=64)
    parser.add_argument("--no_compile", action="store_true", help="for a rehearsal")
    parser.add_argument("--trl", nargs="+", default=["4:on", "8:on", "2:off"], metavar="PAIRS:on")
    return parser.parse_args()


def trl_settings(args: argparse.Namespace) -> list[Setting]:
    rows = []
    for spec in args.trl:
        batch, _, checkpointing = spec.partition(":")
        how = "recomputed" if checkpointing == "on" else "kept"
        row = f"TRL, {batch} pairs, {how}"
        rows.append(Setting(row, "trl", int(batch), checkpointing=checkpointing))
    if importlib.util.find_spec("liger_kernel"):
        rows.append(rows[0]._replace(row=f"{rows[0].row}, Liger", liger=True))
    return rows


def ladder(args: argparse.Namespace) -> list[Setting]:
    few = min(2, args.global_batch)  # all logits of more do not fit
    return [
        Setting("all logits of a padded batch", "full_logits", batch=few),
        Setting("+ response logits alone", "train_pref_plain", batch=few),
        Setting("+ packing", "packed_eager", tokens=args.tokens),
        Setting("+ prefix sharing", "shared_eager", tokens=args.tokens),
        Setting("+ nothing recomputed", "shared_eager", tokens=args.tokens, checkpointing="off"),
    ]


class Bench:
    """Runs settings on the same pairs, within the time that there is."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder, self.end = args, folder, time.monotonic() + args.seconds
        self.warmup = 1
        given = self.arguments(Setting("", "train_pref"), args.steps)
        self.counts = train_vs_trl.choose_pairs(given, folder)
        _, body, head = train_vs_trl.gemm_rate(given)
        self.flops_a_pair = 4 * (body * self.counts["shared"] + head * self.counts["responses"])
        self.peaks = peaks_of(card())

    def arguments(self, setting: Setting, steps: int) -> argparse.Namespace:
        """Of train_vs_trl.py."""
        return argparse.Namespace(
            model=self.args.model,
            pairs=self.args.pairs,
            max_length=self.args.max_length,
            steps=steps,
            warmup=self.warmup,
            rounds=1,
            batch=min(setting.batch, self.args.global_batch),
            global_batch=self.args.global_batch,
            tokens_per_microbatch=setting.tokens,
            dtype="bfloat16",
            quant="none",  # the checkpoint itself is in NF4
            checkpointing=setting.checkpointing,
            compile="off" if self.args.no_compile else setting.compile,
            liger=setting.liger,
            tune="lora",
            lora_r=self.args.lora_r,
            learning_rate=1e-4,
        )

    def run(self, setting: Setting) -> dict:
        """The row of a setting."""
        return attempt(setting.row, lambda: self.measure(setting))

    def measure(self, setting: Setting) -> dict:
        left = self.end - time.monotonic()
        if left < START_S:
            raise TimeoutError("no time was left for it")
        is_trl = setting.contestant.startswith("trl")
        args = self.arguments(setting, self.args.trl_steps if is_trl else self.args.steps)
        run = train_vs_trl.run_trl if is_trl else train_vs_trl.run_ours
        result = run(args, setting.contestant, self.folder, left)
        timed = result["seconds"][self.warmup :]
        rate = args.global_batch * len(timed) / sum(timed)
        flops = rate * self.flops_a_pair
        return {
            "pairs_per_s": rate,
            "mfu": flops / self.peaks[0] if self.peaks else None,
            "peak_gib": result["peak_gib"],
            "planned_gib": result.get("planned_gib"),
            "settings": result.get("settings"),
            "losses": result["losses"],
        }


def fastest(rows: list[tuple[Setting, dict]]) -> Setting | None:
    done = [(row["pairs_per_s"], number) for number, (_, row) in enumerate(rows) if "mfu" in row]
    return rows[max(done)[1]][0] if done else None


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        emit("pairs", **{key: round(value, 1) for key, value in bench.counts.items()})
        best = Setting("ours, best", "train_pref", tokens=args.tokens, checkpointing="off")
        bench.run(best._replace(compile="on"))
        trl = trl_settings(args)
        rows = [(setting, bench.run(setting)) for setting in trl]
        if (winner := fastest(rows)) is not None:
            emit("TRL, best", like=winner.row)
            row = f"{winner.row}, references precomputed"
            bench.run(winner._replace(row=row, contestant="trl_precomputed"))
        lean = next((one for one in trl if one.checkpointing == "on"), trl[0])
        bench.run(Setting("ours, as lean as TRL", "train_pref", lean.batch, compile="on"))
        bench.run(Setting("ours, every auto", "train_pref", checkpointing="auto", compile="auto"))
        for setting in ladder(args):
            bench.run(setting)


if __name__ == "__main__":
    main()
