"""Make a small reward model, and measure how fast `judge.py --judge rm:` scores with it.

    python bench/reward_model.py --model quickstart/SmolLM2-135M-Instruct \\
        --data quickstart/data/preferences --out quickstart/reward-model
    python judge.py quickstart/results --judge rm:quickstart/reward-model

The model stays as it is and gets a score head: a logistic regression on the difference between its
hidden states after the better and after the worse response (Bradley-Terry). That takes one pass
over the pairs, and makes a real checkpoint of a sequence classifier. It is a demonstration, no
reward model to rely on: its accuracy on the validation pairs is printed, beside that of the rule
"the longer response is better". Prints one JSON object.
"""

import argparse
import json
import math
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from pref.files import console, disk
from pref.judging import reward_scorer
from pref.judging.reward_scorer import Row, encode_chat, padded, rows_of, width_of
from pref.model import chat, loading

RIDGES = [10.0**k for k in range(-1, 5)]  # penalties on the head's weights that are tried
HELD_OUT = 10  # every tenth training pair chooses among them


def read_pairs(path: Path, most: int | None) -> list[dict]:
    rows = [row for _, row in disk.read_jsonl(path)]
    return rows if most is None else rows[:: max(1, len(rows) // most)][:most]


@torch.inference_mode()
def hidden_states(backbone, rows: list[Row]) -> Tensor:
    """(N, H) of the last token of each row, fp32."""
    by_width: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        by_width.setdefault(width_of(row, None), []).append(number)
    found: dict[int, Tensor] = {}
    with console.Progress("reading", "rows", total=len(rows)) as bar:
        for width, numbers in by_width.items():
            size = rows_of(width)
            for batch in (numbers[i : i + size] for i in range(0, len(numbers), size)):
                ids = padded([rows[n].ids for n in batch], width, padding=0)
                states = backbone(input_ids=ids, use_cache=False).last_hidden_state
                for n, row_states in zip(batch, states):
                    found[n] = row_states[len(rows[n].ids) - 1].float()
                    bar.update()
    return torch.stack([found[n] for n in range(len(rows))])


def fit(differences: Tensor, ridge: float) -> Tensor:
    """w (H,) that minimises the sum of softplus(-d w), plus ridge |w|^2 / 2, by Newton's method."""
    w = differences.new_zeros(differences.shape[1])
    for _ in range(25):
        p = torch.sigmoid(-(differences @ w))  # of the wrong order
        gradient = ridge * w - differences.T @ p
        hessian = (differences.T * (p * (1 - p))) @ differences
        step = torch.linalg.solve(hessian + ridge * torch.eye(len(w), dtype=w.dtype), gradient)
        w = w - step
        if step.norm() < 1e-8 * (1 + w.norm()):
            break
    return w


def accuracy(differences: Tensor, w: Tensor) -> float:
    return (differences @ w > 0).double().mean().item()


def make_head(train: Tensor) -> Tensor:
    """The weights (H,) of the head, from differences (N, H) of training pairs."""
    scale = train.std(0) + 1e-6
    train = train / scale
    chosen_by = torch.arange(len(train)) % HELD_OUT == 0
    scores = {r: accuracy(train[chosen_by], fit(train[~chosen_by], r)) for r in RIDGES}
    return fit(train, max(scores, key=scores.get)) / scale


def measure_speed(out: Path, conversations: list[list[dict]], dtype: str) -> dict:
    """Answers per second of CPU time, which other programs on the machine do not change: in
    batches, and one by one by transformers' own forward.
    """
    scorer = reward_scorer.load(str(out), dtype)
    rows = [scorer.encode(messages) for messages in conversations]
    by_width: dict[int, list[Row]] = {}
    for row in rows:
        by_width.setdefault(width_of(row, scorer.limit), []).append(row)
    scorer.compute(rows[:1], width_of(rows[0], scorer.limit))  # warm
    before, start = peak_gib(), time.process_time()
    for width, same in by_width.items():
        for i in range(0, len(same), rows_of(width)):
            scorer.compute(same[i : i + rows_of(width)], width)
    batched, after = len(rows) / (time.process_time() - start), peak_gib()
    own = AutoModelForSequenceClassification.from_pretrained(
        out, dtype=getattr(torch, scorer.parameters["dtype"])
    ).eval()
    start = time.process_time()
    with torch.inference_mode():
        for row in rows:
            own(input_ids=torch.tensor([row.ids]))
    alone = len(rows) / (time.process_time() - start)
    return {
        "dtype": scorer.parameters["dtype"],
        "answers": len(rows),
        "tokens": sum(len(row.ids) for row in rows),
        "answers_per_cpu_s": round(batched, 2),
        "one_by_one_per_cpu_s": round(alone, 2),
        "ratio": round(batched / alone, 2),
        "peak_gib_loaded": before,
        "peak_gib_scored": after,
    }


def peak_gib() -> float:
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a chat model")
    parser.add_argument("--data", required=True, type=Path, help="folder of prep_data.py")
    parser.add_argument("--out", required=True, type=Path, help="folder of the reward model")
    parser.add_argument("--pairs", type=int, help="training pairs to use (default: all)")
    parser.add_argument("--max_length", type=int, default=512, help="longer pairs are left out")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    device = torch.device("cpu")
    tokenizer = chat.load_tokenizer(args.model)
    dtype = loading.pick_dtype(args.dtype, device)
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=1, dtype=dtype
    ).eval()

    # 1) Hidden states after both responses of each pair.
    differences, lengths = {}, {}
    for name, most in {"train": args.pairs, "val": None}.items():
        pairs = read_pairs(args.data / f"{name}.jsonl", most)
        sides = [
            [encode_chat(tokenizer, [*pair["prompt"], *pair[side]]) for pair in pairs]
            for side in ("chosen", "rejected")
        ]
        kept = [pair for pair in zip(*sides) if max(len(r.ids) for r in pair) <= args.max_length]
        states = hidden_states(model.model, [row for pair in kept for row in pair]).double()
        differences[name] = states[0::2] - states[1::2]
        lengths[name] = [len(chosen.ids) - len(rejected.ids) for chosen, rejected in kept]

    # 2) The head, and how often it is right on pairs that it has not seen.
    head = make_head(differences["train"])
    with torch.no_grad():
        model.score.weight.copy_(head[None].to(dtype))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    n, right = len(differences["val"]), accuracy(differences["val"], head)
    longer = [(d > 0) + 0.5 * (d == 0) for d in lengths["val"]]
    result = {
        "train_pairs": len(differences["train"]),
        "val_pairs": n,
        "val_accuracy": round(right, 3),
        "standard_error": round(math.sqrt(right * (1 - right) / n), 3),
        "longer_is_better": round(sum(longer) / n, 3),
    }

    # 3) Speed on the better responses of validation.
    some = [[*p["prompt"], *p["chosen"]] for p in read_pairs(args.data / "val.jsonl", 128)]
    print(json.dumps(result | {"speed": measure_speed(args.out, some, args.dtype)}))
    return 0


if __name__ == "__main__":
    console.run_main(main)
