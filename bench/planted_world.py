"""Worlds where it is known which loss is better, for discover.py: made up, no model.

    python bench/planted_world.py OUT.safetensors                     a fifth of the labels wrong
    python bench/planted_world.py OUT.safetensors --null              no loss better than another
    python bench/planted_world.py FOLDER --searches 20 --null         and 20 whole searches on it

A pair of the planted world is better in one direction of theta by a random amount, among noise in
all directions. A fifth of the training pairs are wrong: chosen and rejected are exchanged, and both
responses are five times as long. phi, a sum over tokens, grows with a power of the length. So the
wrong pairs are a fifth of the pairs and more than a third of DPO's gradient; a loss that does not
follow long pairs, or not those that it ranks badly, learns what is right. Labels of the pairs that
are measured with are right.

In the null world a part of the pairs differs in one direction only, the same for all, and every
loss that raises the chosen response gets all of them right. The others are noise orthogonal to it,
the same for chosen and rejected: on them every policy is right half of the time. So any two losses
with the same sign have the same expected accuracy, and "better" is a false positive.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from pref.discovery import features  # noqa: E402
from pref.discovery.features import Part  # noqa: E402

WIDTH = 512
SIZES = {"train": 320, "val": 400, "confirm": 2000}
WRONG, LONGER = 0.2, 5
SIGNAL, POWER = 2.4, 0.66  # in SDs of the noise along the direction; of the length
EASY = 0.3  # of the null world's pairs
HORIZON = {"steps": "20", "batch": "16", "learning_rate": "3"}


def planted(pairs: int, direction: Tensor, draw: torch.Generator, wrong: float) -> Part:
    """Pairs of the planted world; a share `wrong` of them exchanged and long."""
    is_wrong = torch.randperm(pairs, generator=draw) < round(wrong * pairs)
    tokens = torch.randint(20, 61, (pairs,), generator=draw).float()
    tokens = torch.where(is_wrong, LONGER * tokens, tokens)
    better_by = SIGNAL * torch.randn(pairs, generator=draw).abs()
    noise = torch.randn(2, pairs, WIDTH, generator=draw) / 2**0.5
    size = (tokens / 40).pow(POWER)[:, None]
    better = size * (noise[0] + 0.5 * better_by[:, None] * direction)
    worse = size * (noise[1] - 0.5 * better_by[:, None] * direction)
    exchanged = is_wrong[:, None]
    return part_of(
        tokens, torch.where(exchanged, worse, better), torch.where(exchanged, better, worse), draw
    )


def null(pairs: int, direction: Tensor, draw: torch.Generator) -> Part:
    """Pairs of the null world."""
    is_easy = (torch.randperm(pairs, generator=draw) < round(EASY * pairs))[:, None]
    tokens = torch.randint(20, 301, (pairs,), generator=draw).float()
    noise = torch.randn(2, pairs, WIDTH, generator=draw)
    noise -= (noise @ direction)[..., None] * direction
    size = (tokens / 40).sqrt()[:, None]
    better_by = 8 * torch.rand(pairs, 1, generator=draw) * direction
    chosen, rejected = (
        torch.where(is_easy, sign * better_by, size * n) for sign, n in zip((1, -1), noise)
    )
    return part_of(tokens, chosen, rejected, draw)


def part_of(tokens: Tensor, chosen: Tensor, rejected: Tensor, draw: torch.Generator) -> Part:
    """With reference log-probs of 2 nats a token, which say nothing about the labels."""
    refs = -2 * tokens + 5 * torch.randn(2, len(tokens), generator=draw)
    return Part(refs[0], refs[1], tokens, tokens.clone(), chosen, rejected)


def write(path: Path, seed: int, is_null: bool) -> None:
    """A features file with pairs to train on, to measure with and to confirm with."""
    draw = torch.Generator().manual_seed(seed)
    direction = torch.randn(WIDTH, generator=draw)
    direction /= direction.norm()
    parts = {}
    for name, pairs in SIZES.items():
        if is_null:
            parts[name] = null(pairs, direction, draw)
        else:
            parts[name] = planted(pairs, direction, draw, WRONG if name == "train" else 0.0)
    world = "null world" if is_null else "planted world"
    features.write(path, parts, {"model": f"{world}, seed {seed}", **HORIZON})


def search(folder: Path, number: int, args: argparse.Namespace) -> dict:
    """One whole search on a world of its own, confirmed. Returns confirmation.json."""
    file = folder / f"world{number}.safetensors"
    write(file, args.seed + number, args.null)
    found = folder / f"search{number}"
    command = [sys.executable, str(ROOT / "discover.py"), str(found), "--features", str(file)]
    given = ["--seed", str(number), "--preset", args.preset]
    if args.max_proposals:
        given += ["--max_proposals", str(args.max_proposals)]
    for more in (given, ["--confirm", "1"]):
        with open(folder / f"search{number}.log", "a", encoding="utf-8") as log:
            subprocess.run([*command, *more], check=True, stdout=log, stderr=log)
    return json.loads((found / "confirmation.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="features file, or folder of the searches")
    parser.add_argument("--null", action="store_true", help="the world without differences")
    parser.add_argument("--seed", type=int, default=0, help="of the (first) world")
    parser.add_argument("--searches", type=int, default=0, help="whole searches, a world each")
    parser.add_argument("--preset", default="quick", help="of the searches")
    parser.add_argument("--max_proposals", type=int, help="of the searches")
    args = parser.parse_args()
    if not args.searches:
        write(args.out, args.seed, args.null)
        print(f"wrote {args.out}")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    words = []
    for number in range(args.searches):
        found = search(args.out, number, args)
        words.append(found["candidates"][0]["word"])
        print(f"search {number}: {found['verdict']}", flush=True)
    counts = {word: words.count(word) for word in sorted(set(words))}
    print(f"{args.searches} searches: {', '.join(f'{n} {word}' for word, n in counts.items())}")


if __name__ == "__main__":
    main()
