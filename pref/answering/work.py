"""What is asked of whom, in units of work, and how processes share the units.

    runs x questions x choices -> Items; the turns of an Item -> Keys, under which answers are kept

An `Item` is one conversation: all turns of one choice of one question, answered by one run. A
process takes whole items, because turn 2 needs the answer to turn 1.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist


class Run(NamedTuple):
    """A run to answer for."""

    folder: Path
    run_id: str
    adapter: Path | None  # folder of the adapter, if it has one
    sha256: str | None  # of the trained weights; None: the untrained model
    record: dict  # content of args.json
    model: Path | None = None  # folder of the model, if all parameters were trained

    @property
    def adapter_name(self) -> str | None:
        """The engine's name for the adapter; None for a model without one."""
        return None if self.adapter is None else self.run_id

    @property
    def is_trained(self) -> bool:
        return self.adapter is not None or self.model is not None


class Loaded(NamedTuple):
    """What is in memory at one time: a model, and the runs that it answers for."""

    model: str  # hub id or folder
    quant: str  # "nf4" or "none"
    runs: list[Run]  # whose answers it writes
    full: Run | None = None  # the run whose model it is; None: the base, with its adapters
    base_of: tuple[str, ...] = ()  # ids of the runs whose base it is

    @property
    def name(self) -> str:
        """Different for all that one call loads."""
        return f"{self.model} {self.quant}"


class Base(NamedTuple):
    """The base model under every adapter."""

    model: str | None  # hub id or folder; None: not known
    quant: str | None  # "nf4" or "none"


def loads_of(runs: list[Run], base: Base) -> list[Loaded]:
    """What is loaded one after the other: each run with a model of its own, then the base, for
    itself and all adapters. --kl asks it about the others' answers too; where the adapters were
    trained on the base in 4 bits, the others were not, and it is loaded for them by itself.
    """
    full = [run for run in runs if run.model is not None]
    others = [run for run in runs if run.model is None]
    of_full, of_others = (tuple(run.run_id for run in part) for part in (full, others))
    loads = [Loaded(str(run.model), "none", [run], full=run) for run in full]
    if base.quant != "none":
        loads.append(Loaded(base.model, "none", [], base_of=of_full))
        of_full = ()
    return [*loads, Loaded(base.model, base.quant, others, base_of=of_others + of_full)]


def may_be_same_model(old: str | None, new: str | None) -> bool:
    """Whether two values of --model can mean the same weights: they are equal, lead to the same
    folder, or `old` has moved to `new` and kept its last name. Of a folder that has moved the
    weights are compared once they are loaded (`local.check_base`).
    """
    if old == new or old is None or new is None:
        return old == new
    if not Path(new).is_dir():
        return False
    if Path(old).exists():
        return Path(old).resolve() == Path(new).resolve()
    return Path(old).name == Path(new).resolve().name


class Bench(NamedTuple):
    """A set of questions. `name` is also the folder of the answers in each run folder; a question
    is a dict with question_id, category, turns and temperature.
    """

    name: str
    questions: list[dict]
    max_new_tokens: int = 1024  # of an answer, where the user gives no other; MT-Bench's
    folder: Path | None = None  # of a benchmark's data; None: a file of one's own
    free: bool = False  # a published benchmark that does not fix how its questions are answered


class Sampling(NamedTuple):
    """How answers are drawn, besides each question's temperature."""

    seed: int
    max_new_tokens: int  # per turn


class Item(NamedTuple):
    """One conversation: all turns of one choice of one question of one run."""

    run: Run
    question: dict
    choice: int


class Key(NamedTuple):
    """Identifies one answered turn."""

    run_id: str
    question_id: int
    choice: int
    turn: int

    @classmethod
    def of(cls, item: Item, turn: int) -> "Key":
        return cls(
            run_id=item.run.run_id,
            question_id=item.question["question_id"],
            choice=item.choice,
            turn=turn,
        )


def all_items(runs: list[Run], bench: Bench, num_choices: int) -> list[Item]:
    """Run after run, so that few adapters are in flight at a time; short questions first."""
    questions = sorted(bench.questions, key=lambda question: sum(map(len, question["turns"])))
    return [
        Item(run, question, choice)
        for run in runs
        for question in questions
        for choice in range(num_choices)
    ]


def seed_of(seed: int, item: Item, turn: int) -> int:
    """The seed of one turn: it depends neither on the run nor on the order of the work.

    Choice 0 adds nothing to the entropy, so its seed is the same with and without more choices.
    """
    entropy = [seed, item.question["question_id"], turn]
    if item.choice:
        entropy.append(item.choice)
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def conversation(question: dict, answers: list[str]) -> list[dict]:
    """Chat messages up to the turn that comes after `answers`.

    With turns [q1, q2] and answers [a1]: user q1, assistant a1, user q2.
    """
    asked = question["turns"][: len(answers) + 1]
    messages = []
    for text, answer in itertools.zip_longest(asked, answers):
        messages.append({"role": "user", "content": text})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    return messages


class Workers(NamedTuple):
    """The processes that share the work, as seen from one of them."""

    rank: int
    size: int  # number of processes
    device: torch.device
    take: Callable[[str, int], Iterator[int]]  # (kind of work, n): see `init_workers`

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, total: int) -> int:
        """About how much of `total` one process does; for its progress line."""
        return math.ceil(total / self.size)


def init_workers() -> Workers:
    """Join the other processes of torchrun, or be the only one.

    `take(kind, n)` yields numbers below n, each of them in one process only. Under torchrun they
    come from a counter in torchrun's key-value store: a process takes the next number when it has
    room, so that all finish at about the same time. The processes exchange nothing else while they
    work.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return Workers(rank=0, size=1, device=device, take=lambda _, count: iter(range(count)))
    dist.init_process_group("gloo", timeout=timedelta(days=1))
    counter = dist.distributed_c10d._get_default_store()

    def take(kind: str, count: int) -> Iterator[int]:
        while (number := counter.add(kind, 1) - 1) < count:
            yield number

    return Workers(rank=dist.get_rank(), size=dist.get_world_size(), device=device, take=take)


def from_main(value: object) -> object:
    """Rank 0's value, on every rank: all ranks must number the same list of work."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, 0)
    return values[0]


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()
