"""Several ranks: what they exchange, and how they end when one of them does not come. That they
compute what one rank computes is in test_engine.py.
"""

import os
import signal
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from processes import run_ranks
from test_waiting import split_of, study_of
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import train_pref
from pref.files.console import UserError
from pref.model import sharding
from pref.model.loading import load_base
from pref.model.logps import trainable
from pref.model.packing import Packing
from pref.model.ranks import Ranks, pick_device

CPU = torch.device("cpu")
LAYERS, MICRO_BATCHES = 2, 3


class Collectives(TorchDispatchMode):
    """Counts what goes to other ranks."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "c10d":
            self.counts[operator.name().partition("::")[2].partition(".")[0]] += 1
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def eight_ranks(monkeypatch) -> Ranks:
    """This process as the first of eight ranks that do not exist: collectives are counted, and
    leave their outputs as they are.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    monkeypatch.setattr(sharding, "check_gradient_sum", lambda *_: None)
    return Ranks(0, 8, CPU)


def test_an_adapter_is_gathered_and_reduced_once_a_step(tiny_model, pairs_folder, eight_ranks):
    """However many micro-batches there are; and once in an evaluation, after which it is sharded
    again, so that what is saved are not the copies in the compute dtype.
    """
    study = study_of(tiny_model, pairs_folder, eight_ranks, Packing(2, tokens=1))
    sharding.shard(study.policy, "adapters", torch.float32, eight_ranks)
    split = split_of(tiny_model, pairs_folder, repeated=MICRO_BATCHES)
    members = list(range(8 * MICRO_BATCHES))
    exchanged = {
        "_allgather_base_": LAYERS,
        "allreduce_": MICRO_BATCHES + 1,  # did any rank get a signal?; at the end the metrics
    }
    for _ in range(2):
        with Collectives() as step:
            train_pref.compute_gradients(study, split, members)
        assert step.counts == exchanged | {"_reduce_scatter_base_": LAYERS}
        study.policy.zero_grad()
        with Collectives() as evaluation:
            train_pref.policy_sums(study, split)
        assert evaluation.counts == exchanged
        assert all(isinstance(p, DTensor) for p in trainable(study.policy).values())


def test_all_parameters_are_gathered_and_reduced_in_every_micro_batch(
    tiny_model, pairs_folder, eight_ranks
):
    """No rank ever holds a whole gradient: after a micro-batch each has its shards alone."""
    packing, more = Packing(2, tokens=1), ("--tune", "full", "--shard", "full")
    study = study_of(tiny_model, pairs_folder, eight_ranks, packing, *more)
    sharding.shard(study.policy, "full", torch.bfloat16, eight_ranks)
    split = split_of(tiny_model, pairs_folder, repeated=MICRO_BATCHES)
    with Collectives() as step:
        train_pref.compute_gradients(study, split, list(range(8 * MICRO_BATCHES)))
    assert step.counts == {
        "_allgather_base_": MICRO_BATCHES * (1 + 2 * LAYERS),  # the root once, a layer twice
        "_reduce_scatter_base_": MICRO_BATCHES * (1 + LAYERS),
        "allreduce_": MICRO_BATCHES + 1,
    }
    for parameter in trainable(study.policy).values():
        assert isinstance(parameter.grad, DTensor) and parameter.grad.dtype == torch.float32


def test_a_single_rank_shards_nothing(tiny_model, pairs_folder):
    study = study_of(tiny_model, pairs_folder, Ranks(0, 1, CPU), Packing(2, tokens=600))
    for mode in ("adapters", "full"):
        sharding.shard(study.policy, mode, torch.float32, study.ranks)
    assert not any(isinstance(module, FSDPModule) for module in study.policy.modules())


def test_ranks_that_get_their_weights_from_another_hold_none(tiny_model):
    """With --shard full only rank 0 has the weights in memory."""
    base = load_base(str(tiny_model), torch.float32, "none", torch.device("meta"))
    assert all(tensor.is_meta for tensor in (*base.parameters(), *base.buffers()))


def test_a_rank_without_a_gpu_is_told_how_many_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match="local rank 4 has no GPU: this machine shows 4; use"):
        pick_device(4)


# Three ranks that tell each other something a hundred times; what happens in between is the test's.
TALK = f"""
import datetime, os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch
from pref.model import ranks as module

module.TIMEOUT = datetime.timedelta(seconds=TIMEOUT_S)
ranks = module.init_ranks()
with module.ended_by_lost_ranks(ranks):
    for number in range(100):
        if (number, ranks.rank) == (50, 1):
            HAPPENS
        assert ranks.largest(number * ranks.rank) == 2 * number
        assert ranks.sum(torch.tensor(float(ranks.rank))) == 3
module.close_ranks()
"""
LOST = "error (rank {}): another rank has ended, or has not come within 0:00:{:02} h"


def without_note(errors: str) -> str:
    """Without what is said where other work keeps the machine busy."""
    return "".join(line for line in errors.splitlines(True) if not line.startswith("note: other"))


def talk(tmp_path, happens: str, timeout_s: int, within_s: float = 60) -> tuple[list, str]:
    script = tmp_path / "talk.py"
    script.write_text(TALK.replace("TIMEOUT_S", str(timeout_s)).replace("HAPPENS", happens))
    return run_ranks(script, dict(os.environ), ranks=3, within_s=within_s)


@pytest.mark.slow
def test_ranks_end_when_one_dies(tmp_path):
    """At once, and without help from torchrun, which would end them too."""
    codes, errors = talk(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", timeout_s=50)
    assert codes == [2, -signal.SIGKILL, 2]
    assert all(LOST.format(rank, 50) in errors for rank in (0, 2))
    assert "Traceback" not in errors


@pytest.mark.slow
def test_ranks_end_when_one_hangs(tmp_path):
    """The rank that says nothing is the one that hangs."""
    codes, errors = talk(tmp_path, "time.sleep(600)", timeout_s=3, within_s=15)
    assert codes == [2, None, 2]
    assert all(LOST.format(rank, 3) in errors for rank in (0, 2))
    assert "rank 1" not in errors and "Traceback" not in errors


@pytest.mark.slow
def test_ranks_wait_for_a_slow_one(tmp_path):
    codes, errors = talk(tmp_path, "time.sleep(3)", timeout_s=50)
    assert (codes, without_note(errors)) == ([0, 0, 0], "")


@pytest.mark.slow
def test_another_error_is_not_taken_for_a_lost_rank(tmp_path):
    codes, errors = talk(tmp_path, "raise RuntimeError('my own')", timeout_s=50)
    assert codes == [2, 1, 2] and "RuntimeError: my own" in errors
    assert "rank 1" not in errors
