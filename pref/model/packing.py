"""pairs to micro-batches"""

import heapq
import math
from typing import NamedTuple

import torch
from torch import Tensor

from pref.model.chat import TokenPair

FLEX_BLOCK = 128  # FlexAttention's block: on CUDA a sequence is padded to a multiple of it


class Packing(NamedTuple):
    """How pairs become micro-batches."""

    pad_id: int
    pairs: int = 4  # pairs a micro-batch, if `tokens` is 0
    tokens: int = 0  # budget of tokens a micro-batch; 0: a fixed number of pairs
    padded: bool = False  # every row padded to the longest
    shared: bool = True  # one row a pair, or two

    @property
    def plain(self) -> bool:
        """An ordinary padded batch, for the model's own attention."""
        return self.padded and not self.shared

    def rows(self, pair: TokenPair) -> list[tuple[list[int], ...]]:
        """A pair's rows, each a prompt followed by its branches."""
        if self.shared:
            return [(pair.prompt, pair.chosen, pair.rejected)]
        return [(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)]

    def size(self, pair: TokenPair) -> int:
        """Tokens to compute for `pair`, without padding."""
        return (1 if self.shared else 2) * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


class Batch(NamedTuple):
    """B pairs as token rows, and where their response tokens are predicted. Response tokens come
    chosen first.
    """

    input_ids: Tensor  # (1, T), or (2B, T) if plain
    position_ids: Tensor | None  # (1, T); None if plain
    # (2B, T) of 0 and 1 if plain; else the layout (1, 1, rows + 1, 4): start, prompt, branch, other
    mask: Tensor
    positions: (
        Tensor  # (N,) index into the flattened hidden states that predicts each response token
    )
    targets: Tensor  # (N,) the response tokens
    segments: Tensor  # (N,) response, 0 .. 2B-1, of each response token
    lengths: Tensor  # (2B,) response tokens
    tokens: int  # without padding
    chosen_tokens: int  # response tokens of the chosen responses; they stand first


def make_batch(pairs: list[TokenPair], packing: Packing, device: torch.device) -> Batch:
    """Lay `pairs` out as `packing` says."""
    rows = [row for pair in pairs for row in packing.rows(pair)]
    if packing.plain:  # all chosen rows, then all rejected: any order would do
        rows = rows[::2] + rows[1::2]
    longest = max(sum(map(len, row)) for row in rows)
    ids, restarts, layout, starts = [], [], [], []
    for row in rows:
        length = sum(map(len, row))
        prompt, *branches = map(len, row)
        layout.append((len(ids), prompt, *branches, *[0] * (3 - len(row))))
        starts += [
            (len(ids) + prompt - 1, len(ids) + prompt + sum(branches[:i]))
            for i in range(len(branches))
        ]
        padding = longest - length if packing.padded else 0
        ids += [token for part in row for token in part] + [packing.pad_id] * padding
        restarts += range(prompt)
        for branch in branches:
            restarts += range(prompt, prompt + branch)
        restarts += [0] * padding
    if not packing.plain:
        starts = starts[::2] + starts[1::2]
    if device.type == "cuda" and not packing.plain:
        rest = -len(ids) % FLEX_BLOCK
        ids, restarts = ids + [packing.pad_id] * rest, restarts + [0] * rest
    responses = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    positions = [
        i
        for (last, start), r in zip(starts, responses)
        for i in (last, *range(start, start + len(r) - 1))
    ]
    tensors = {
        "positions": torch.tensor(positions),
        "targets": torch.tensor([token for r in responses for token in r]),
        "segments": torch.arange(len(responses)).repeat_interleave(
            torch.tensor([len(r) for r in responses])
        ),
        "lengths": torch.tensor([len(r) for r in responses]),
        "input_ids": torch.tensor(ids).reshape(len(rows) if packing.plain else 1, -1),
        "position_ids": None if packing.plain else torch.tensor([restarts]),
        "mask": torch.tensor(
            [[[*layout, (0, 0, 0, 0)]]]
        ),  # two rows at least: torch.compile makes 1 a constant
    }
    if packing.plain:
        lengths = torch.tensor([sum(map(len, row)) for row in rows])
        tensors["mask"] = (torch.arange(longest) < lengths[:, None]).long()
    on_device = {
        name: t
        if t is None or (name == "mask" and not packing.plain)
        else t.to(device, non_blocking=True)
        for name, t in tensors.items()
    }
    tokens = sum(sum(map(len, row)) for row in rows)
    return Batch(**on_device, tokens=tokens, chosen_tokens=sum(len(p.chosen) for p in pairs))


def share_out(
    members: list[int], pairs: list[TokenPair], packing: Packing, rank: int = 0, world: int = 1
) -> list[list[int]]:
    """The micro-batches of `members` that `rank` of `world` computes. Every rank gets as many,
    because FSDP's collectives need all ranks; where there are fewer pairs than places, some are
    empty.
    """
    if packing.tokens:
        return fill_bins(members, pairs, packing, world)[rank::world]

    mine = sorted(members, key=lambda i: (-pairs[i].longest, i))[rank::world]
    count = math.ceil(math.ceil(len(members) / world) / packing.pairs)
    return [mine[i * packing.pairs : (i + 1) * packing.pairs] for i in range(count)]


def fill_bins(
    members: list[int], pairs: list[TokenPair], packing: Packing, world: int
) -> list[list[int]]:
    """As few micro-batches as hold `members` within the budget, a multiple of `world`, about
    equally full.

    Longest first, each into the emptiest: no rank waits long for another. A pair above the budget
    stands alone.
    """
    sizes = {i: packing.size(pairs[i]) for i in members}
    order = sorted(members, key=lambda i: (-sizes[i], i))
    count = world * math.ceil(sum(sizes.values()) / packing.tokens / world)
    while True:
        heap = [(0, number) for number in range(count)]
        bins: list[list[int]] = [[] for _ in range(count)]
        for i in order:
            load, number = heapq.heappop(heap)
            bins[number].append(i)
            heapq.heappush(heap, (load + sizes[i], number))
        if all(
            len(members) <= 1 or sum(sizes[i] for i in members) <= packing.tokens
            for members in bins
        ):
            return bins
        count = world * math.ceil(max(count + 1, 1.02 * count) / world)
