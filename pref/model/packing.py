"""Micro-batches: which pairs go together, and how their tokens are laid out.

A pair is one row `[prompt | chosen | rejected]` (`Packing.shared`): the prompt is computed once and
both responses continue it. Rows follow one another in a single sequence without padding, as many as
fit a budget of tokens. Two pairs, with made-up token ids:

    A: prompt 11 12, chosen 21 22, rejected 31        B: prompt 13, chosen 23, rejected 32 33

                row A             | row B
    index       0   1   2   3   4 |  5   6   7   8
    input_ids  11  12  21  22  31 | 13  23  32  33
    position    0   1   2   3   2 |  0   1   1   2    the rejected response restarts after the
    part        p   p   c   c   r |  p   c   r   r    prompt, as if the chosen one were not there

A token attends to the tokens up to itself within its row that are of the prompt or of its own
response: 31 sees 11 12 31; 33 sees 13 32 33. `layout` has the row lengths, from which attention.py
derives this: (start 0, prompt 2, first 2, second 1), (start 5, prompt 1, first 1, second 2).

Only response tokens are scored. `Batch` lists them response by response, all chosen ones first:

    targets     21  22 | 23 | 31 | 32  33
    positions    1   2 |  5 |  1 |  5   7    index of the token before it, which predicts it: both
    segments     0   0 |  1 |  2 |  3   3    responses are predicted from the prompt's last token
    lengths      2       1    1    2

Two options lead from here to an ordinary padded batch, with which the others are compared:
`padded` fills every row up to the longest; without `shared` a pair is two rows, `[prompt | chosen]`
and `[prompt | rejected]`; both together (`plain`) give a (2B, T) batch for the model's own
attention.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from pref.model.chat import TokenPair

# FlexAttention's block. On CUDA a sequence is padded to a multiple of it: the kernels then need no
# checks at its end, and in a last block that is not full their backward pass can give NaN (pytorch
# issue 153799).
FLEX_BLOCK = 128
COPY_ALIGNMENT = 256  # bytes, at whose multiples tensors start in `to_device`

Item, Made = TypeVar("Item"), TypeVar("Made")


class Packing(NamedTuple):
    """How pairs become micro-batches."""

    pad_id: int
    pairs: int = 4  # pairs per micro-batch, if `tokens` is 0
    tokens: int = 0  # budget of tokens per micro-batch; 0: a fixed number of pairs
    padded: bool = False  # every row is padded to the longest
    shared: bool = True  # one row per pair, with both responses; else two

    @property
    def plain(self) -> bool:
        """An ordinary padded batch, for the model's own attention."""
        return self.padded and not self.shared

    def rows(self, pair: TokenPair) -> list[tuple[list[int], ...]]:
        """A pair's rows, each a prompt followed by its one or two responses."""
        if self.shared:
            return [(pair.prompt, pair.chosen, pair.rejected)]
        return [(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)]

    def size(self, pair: TokenPair) -> int:
        """Tokens to compute for `pair`, without padding."""
        return (1 if self.shared else 2) * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


class RowLayout(NamedTuple):
    """Where a row starts in the sequence, and the lengths of its parts."""

    start: int
    prompt: int
    first: int
    second: int = 0  # 0: a row with one response


class Batch(NamedTuple):
    """B pairs as rows of tokens, and their N response tokens, those of chosen responses first."""

    input_ids: Tensor  # (1, T), or (2B, T) if plain
    position_ids: Tensor | None  # (1, T); None if plain
    # Plain: (2B, T) of 0 and 1. Else the layout as the CPU's attention operator takes it,
    # (1, 1, rows + 1, 4); None on CUDA.
    mask: Tensor | None
    # (3, T), int32; None if plain. A token sees those from the first of its three numbers up to
    # itself, except for those from the second up to, not including, the third.
    spans: Tensor | None
    positions: Tensor  # (N,) index into the flattened hidden states that predicts each token
    targets: Tensor  # (N,) the response tokens
    segments: Tensor  # (N,) which response each token belongs to, 0 .. 2B-1
    lengths: Tensor  # (2B,) tokens of each response
    # What the host reads is not in tensors: reading one waits for all that is queued on its device,
    # and FSDP moves every tensor of a module's input there.
    layout: tuple[RowLayout, ...]  # its rows; () if plain
    response_lengths: tuple[int, ...]  # `lengths`
    tokens: int  # without padding
    chosen_tokens: int  # how many of the N belong to chosen responses

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`. The host does not wait for the copy."""
        on_device = {
            name: value
            for name, value in self._asdict().items()
            if isinstance(value, Tensor) and (name != "mask" or not self.layout)
        }
        moved = to_device(list(on_device.values()), device)
        batch = self._replace(**dict(zip(on_device, moved)))
        return batch._replace(mask=None) if self.layout and device.type == "cuda" else batch


class Response(NamedTuple):
    """A response in the sequence: its tokens, and the index before and of its first one."""

    tokens: list[int]
    prompt_end: int  # the prompt's last token
    start: int

    @property
    def positions(self) -> list[int]:
        """Index of the token that predicts each token of the response."""
        return [self.prompt_end, *range(self.start, self.start + len(self.tokens) - 1)]


def layout_rows(layout: Tensor) -> list[RowLayout]:
    """The rows that a batch's layout describes (`Batch.mask`, unless plain)."""
    # The last one is a row of zeros: torch.compile takes a size of 1 for a constant.
    return [RowLayout(*row) for row in layout[0, 0, :-1].tolist()]


def to_device(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """CPU `tensors` on `device`, in one copy that the host does not wait for.

    From ordinary memory it would wait: CUDA first finishes all that is queued on the device. So the
    tensors are put together in pinned memory, and what is returned are views of their copy.
    """
    if device.type == "cpu":
        return tensors
    # The allocator of pinned memory gives the buffer to nobody else before the copy has been made.
    buffer = in_one(tensors, pinned=device.type == "cuda")
    return taken_apart(buffer.to(device, non_blocking=True), tensors)


def in_one(tensors: list[Tensor], pinned: bool) -> Tensor:
    """The bytes of CPU `tensors` in one tensor. pinned: in memory that a GPU can read by itself."""
    places = places_of(tensors)
    buffer = torch.empty(places[-1].stop, dtype=torch.uint8, pin_memory=pinned)
    for tensor, place in zip(tensors, places):
        buffer[place] = tensor.contiguous().view(-1).view(torch.uint8)
    return buffer


def taken_apart(buffer: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Views of `buffer`, which holds the bytes of `tensors` (`in_one`), with their shapes."""
    places = places_of(tensors)
    return [buffer[place].view(t.dtype).view(t.shape) for t, place in zip(tensors, places)]


def places_of(tensors: list[Tensor]) -> list[slice]:
    """The bytes of each of `tensors` in one buffer."""
    sizes = [-(-tensor.nbytes // COPY_ALIGNMENT) * COPY_ALIGNMENT for tensor in tensors]
    starts = [0, *itertools.accumulate(sizes)]
    return [slice(start, start + tensor.nbytes) for start, tensor in zip(starts, tensors)]


def visible_spans(rows: list[RowLayout], length: int) -> Tensor:
    """What the tokens of a sequence of `length` tokens see: `Batch.spans`, on the CPU.

    A second response does not see the first: that is its hole. Padding sees itself, so that its
    softmax is not over nothing.
    """
    spans = torch.arange(length, dtype=torch.int32).repeat(3, 1)
    _, hole_start, hole_end = spans
    for row in rows:
        first_start = row.start + row.prompt
        second_start = first_start + row.first
        end = second_start + row.second
        spans[:, row.start : end] = row.start  # an empty hole
        hole_start[second_start:end] = first_start
        hole_end[second_start:end] = second_start
    return spans


def make_batch(pairs: list[TokenPair], packing: Packing, device: torch.device) -> Batch:
    """Lay `pairs` out on `device` as `packing` says. The module's docstring has an example."""
    return lay_out(pairs, packing, FLEX_BLOCK if device.type == "cuda" else 1).to(device)


def lay_out(pairs: list[TokenPair], packing: Packing, multiple: int) -> Batch:
    """The batch of `pairs` on the CPU. multiple: to which a packed sequence is padded."""
    # 1) Rows. In a plain batch all chosen rows come first.
    rows = [row for pair in pairs for row in packing.rows(pair)]
    if packing.plain:
        rows = rows[::2] + rows[1::2]
    row_lengths = [sum(map(len, row)) for row in rows]
    width = max(row_lengths)

    # 2) One row after another: its tokens, their positions, and where its responses are.
    ids, position_ids = [], []
    layout: list[RowLayout] = []
    responses: list[Response] = []
    for (prompt, *branches), length in zip(rows, row_lengths):
        layout.append(RowLayout(len(ids), len(prompt), *map(len, branches)))
        ids += prompt
        position_ids += range(len(prompt))
        prompt_end = len(ids) - 1
        for branch in branches:
            responses.append(Response(branch, prompt_end, start=len(ids)))
            ids += branch
            position_ids += range(len(prompt), len(prompt) + len(branch))
        padding = width - length if packing.padded else 0
        ids += [packing.pad_id] * padding
        position_ids += [0] * padding
    if not packing.plain:
        padding = -len(ids) % multiple
        ids += [packing.pad_id] * padding
        position_ids += [0] * padding

    # 3) Responses alternate, chosen and rejected, unless plain: chosen first.
    if not packing.plain:
        responses = responses[::2] + responses[1::2]
    response_lengths = tuple(len(response.tokens) for response in responses)

    # 4) Tensors.
    if packing.plain:
        mask = (torch.arange(width) < torch.tensor(row_lengths)[:, None]).long()  # (2B, T)
    else:
        mask = torch.tensor([[[*layout, RowLayout(0, 0, 0, 0)]]])
    lengths = torch.tensor(response_lengths)
    return Batch(
        input_ids=torch.tensor(ids).reshape(len(rows) if packing.plain else 1, -1),
        position_ids=None if packing.plain else torch.tensor([position_ids]),
        mask=mask,
        spans=None if packing.plain else visible_spans(layout, len(ids)),
        positions=torch.tensor([i for response in responses for i in response.positions]),
        targets=torch.tensor([token for response in responses for token in response.tokens]),
        segments=torch.arange(len(responses)).repeat_interleave(lengths),
        lengths=lengths,
        layout=() if packing.plain else tuple(layout),
        response_lengths=response_lengths,
        tokens=sum(row_lengths),
        chosen_tokens=sum(len(pair.chosen) for pair in pairs),
    )


class MicroBatch(NamedTuple):
    """Some pairs of a step or of a pass over a split, on the device."""

    members: list[int]  # the pairs in the batch
    counts: bool  # False: stand-ins of a rank that has no pairs left; their values are dropped
    batch: Batch


def micro_batches(
    shares: list[list[int]],
    pairs: list[TokenPair],
    packing: Packing,
    device: torch.device,
    stand_ins: list[int],
) -> Iterator[MicroBatch]:
    """The batches of `shares`, this rank's part from `share_out`. The next one is laid out in a
    thread while the device computes.

    stand_ins: the pairs of a share without any. FSDP's collectives need all ranks, so that such a
    rank runs along.
    """

    def laid_out(share: list[int]) -> Batch:
        multiple = FLEX_BLOCK if device.type == "cuda" else 1
        return lay_out([pairs[i] for i in share or stand_ins], packing, multiple)

    batches = map(laid_out, shares) if device.type == "cpu" else made_ahead(laid_out, shares)
    for share, batch in zip(shares, batches):
        yield MicroBatch(share or stand_ins, bool(share), batch.to(device))


def made_ahead(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """`make(item)` of each item. A thread makes the next one while the caller uses this one."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming: list[Future[Made]] = []
        for item in items:
            coming.append(thread.submit(make, item))
            if len(coming) == 2:
                yield coming.pop(0).result()
        if coming:
            yield coming.pop().result()


def share_out(
    members: list[int], pairs: list[TokenPair], packing: Packing, rank: int = 0, world: int = 1
) -> list[list[int]]:
    """The micro-batches of pairs `members` that `rank` of `world` computes, as lists of pairs.

    Every rank gets the same number of them, because FSDP's collectives need all ranks. Where there
    are too few pairs for that, some are empty.
    """
    if packing.tokens:
        return fill_bins(members, pairs, packing, world)[rank::world]

    # Dealt out by length, so that the pairs of a micro-batch are of similar length.
    share = sorted(members, key=lambda i: (-pairs[i].longest, i))[rank::world]
    count = math.ceil(math.ceil(len(members) / world) / packing.pairs)
    return [share[i * packing.pairs : (i + 1) * packing.pairs] for i in range(count)]


def fill_bins(
    members: list[int], pairs: list[TokenPair], packing: Packing, world: int
) -> list[list[int]]:
    """Distribute `members` over about as few micro-batches as the budget allows, a multiple of
    `world`.

    Each pair, longest first, goes to the micro-batch with the fewest tokens, so that all are about
    equally full and no rank waits long for another. Sizes 6 5 4 3 2 with a budget of 11 give
    [6 3 2] and [5 4]. A pair above the budget is a micro-batch of its own.
    """
    sizes = {i: packing.size(pairs[i]) for i in members}
    order = sorted(members, key=lambda i: (-sizes[i], i))
    count = world * math.ceil(sum(sizes.values()) / packing.tokens / world)
    # Where most pairs are above the budget: an empty micro-batch would cost as much as another.
    count = min(count, world * math.ceil(len(members) / world))
    while True:
        heap = [(0, number) for number in range(count)]  # (tokens, number of the bin)
        bins: list[list[int]] = [[] for _ in range(count)]
        for i in order:
            load, number = heapq.heappop(heap)
            bins[number].append(i)
            heapq.heappush(heap, (load + sizes[i], number))
        if all(len(b) <= 1 or sum(sizes[i] for i in b) <= packing.tokens for b in bins):
            return bins
        # Some are too full: try again with 2 % more of them, or one more per rank.
        count = world * math.ceil(max(count + 1, 1.02 * count) / world)
