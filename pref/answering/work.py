"""units of work and the GPUs that share them"""

import itertools
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from pref.answering.turns import Run, Store


def seed_of(seed: int, question_id: int, turn: int, choice: int) -> int:
    return int(
        np.random.SeedSequence(
            [seed, question_id, turn, *([choice] if choice else [])]
        ).generate_state(1)[0]
    )


class Item(NamedTuple):
    """Unit of work: all turns of one choice of one question of one run."""

    run: Run
    question: dict
    choice: int


def all_items(store: Store, num_choices: int) -> list[Item]:
    """Run after run, so that few adapters are in flight; short questions first."""
    questions = sorted(store.bench.questions, key=lambda q: sum(map(len, q["turns"])))
    return [
        Item(run, q, choice)
        for run in store.runs
        for q in questions
        for choice in range(num_choices)
    ]


def unanswered(store: Store, items: list[Item]) -> list[int]:
    """Numbers of the items of which a turn is missing."""
    return [
        n for n, item in enumerate(items) if len(store.texts(*item)) < len(item.question["turns"])
    ]


def unscored(store: Store, items: list[Item]) -> list[tuple[int, int]]:
    """(number of the item, turn) of each answer without log-probabilities."""
    return [
        (number, turn)
        for number, item in enumerate(items)
        for turn in range(len(store.texts(*item)))
        if "logp"
        not in store.turns[item.run.run_id, item.question["question_id"], item.choice, turn]
    ]


class Workers(NamedTuple):
    """The processes that share the work. take(what, count) yields numbers below count, each to one
    process.
    """

    rank: int
    device: torch.device
    take: Callable[[str, int], Iterator[int]]


def init_workers() -> Workers:
    """Under torchrun, a counter in its store hands out the work, so that all finish together; no
    more is shared.
    """
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if torch.cuda.is_available()
        else None
    )
    if device:
        torch.cuda.set_device(device)
    device = device or torch.device("cpu")
    if "RANK" not in os.environ:
        return Workers(0, device, lambda _, count: iter(range(count)))
    dist.init_process_group("gloo", timeout=timedelta(days=1))
    counter = dist.distributed_c10d._get_default_store()

    def take(what: str, count: int) -> Iterator[int]:
        while (number := counter.add(what, 1) - 1) < count:
            yield number

    return Workers(dist.get_rank(), device, take)


def conversation_of(item: Item, answers: list[str]) -> list[dict]:
    """Messages up to the question that follows `answers`."""
    messages = []
    for question, answer in itertools.zip_longest(
        item.question["turns"][: len(answers) + 1], answers
    ):
        messages.append({"role": "user", "content": question})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    return messages


def progress(total: int, what: str, rank: int) -> tqdm:
    """A bar with rate and time left; under torchrun that of rank 0, which counts its own share."""
    return tqdm(
        total=total,
        desc=what,
        unit="question",
        disable=None if rank == 0 else True,
        dynamic_ncols=True,
    )


def from_main(value: object) -> object:
    """Rank 0's value on every rank: they number the same work."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, 0)
    return values[0]


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()
