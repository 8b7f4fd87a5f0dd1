"""Pairs of made-up words, with lengths as of real conversations: for speed tests without data.

    python bench/random_pairs.py DIR [--pairs 200] [--median 280] [--longest 1000]

Writes train.jsonl as prep_data.py does. Lengths are log-normal: at a median of 280 tokens a pair
has about 350 of prompt and 2 x 320 of responses (with the tokenizer that random_llama.py trains on
them), so that a shared row of it is about 1,000 tokens.
"""

import argparse
import json
import math
import random
from pathlib import Path

SYLLABLES = [a + b for a in "bdfgklmnprstv" for b in "aeiou"]
WORDS_PER_TOKEN = 0.95  # a made-up word is one token nearly always
SPREAD = {"prompt": 0.7, "response": 0.5}  # SD of the logarithm of a length


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--median", type=int, default=280, help="tokens of a text")
    parser.add_argument("--longest", type=int, default=1000, help="tokens of a text")
    return parser.parse_args()


def make_pairs(count: int, median: int, longest: int, seed: int = 0) -> list[dict]:
    """`count` pairs in prep_data.py's format."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(2000)]

    def message(role: str, kind: str) -> list[dict]:
        tokens = min(longest, max(4, median * math.exp(draw.gauss(0, SPREAD[kind]))))
        text = " ".join(draw.choices(words, k=max(3, int(WORDS_PER_TOKEN * tokens))))
        return [{"role": role, "content": text}]

    return [
        {
            "id": f"pair{number}",
            "prompt": message("user", "prompt"),
            "chosen": message("assistant", "response"),
            "rejected": message("assistant", "response"),
            "source": "random",
        }
        for number in range(count)
    ]


def main() -> None:
    args = parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = make_pairs(args.pairs, args.median, args.longest)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (args.folder / "train.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
