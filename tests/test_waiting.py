"""Within a micro-batch the host never waits for the device, so that the device never waits for the
host. Shown on the meta device; what cannot be seen there is how long anything takes.
"""

import threading

import pytest
import torch
from test_train import tiny_policy, train_args, val_pairs
from waiting import NoWaitingFunctions, NoWaitingOperators, Waits

import train_pref
from losses import LOSSES, PairLogps
from pref.model import flex, packing, trained
from pref.model.chat import TokenPair
from pref.model.loading import load_base
from pref.model.logps import ResponseLogps
from pref.model.packing import Packing, make_batch, micro_batches
from pref.model.ranks import Ranks
from pref.training import arguments, loss_options, memory, reference
from pref.training.checkpoint import Progress
from pref.training.learned_mix import LearnedMix
from pref.training.reference import Reference, Split
from pref.training.signals import Stop

META, CPU = torch.device("meta"), torch.device("cpu")


class OneOnMeta(Ranks):
    """A single rank. Where metrics are exchanged, at the end of a step, the host may wait; what it
    then reads are ones.
    """

    def sum(self, tensor):
        return torch.ones(tensor.shape, dtype=tensor.dtype) if tensor.ndim else tensor


ONE_ON_META = OneOnMeta(0, 1, META)


def study_of(model, pairs_folder, ranks: Ranks, packing: Packing, *more) -> train_pref.Study:
    """What a step needs, with a random adapter or with all parameters in fp32."""
    given = train_args(model, pairs_folder, "none", "--max_grad_norm", "0", *more)
    args = arguments.parse_args([str(argument) for argument in given])
    parameters = arguments.loss_parameters(args)
    if args.tune == "full":
        model = load_base(args.model, torch.float32, "none", ranks.device)
        trained.train_all(model, None, torch.float32)
        policy = ResponseLogps(model)
    elif ranks.device == META:
        policy = ResponseLogps(memory.with_lora(memory.shapes_of(args.model, torch.float32), args))
    else:
        policy = tiny_policy(model)
    return train_pref.Study(
        args=args,
        parameters=parameters,
        ranks=ranks,
        stop=Stop(ranks),
        policy=policy,
        packing=packing,
        optimizer=None,
        learned=LearnedMix(args, parameters, ranks.device),
        checkpoints=None,
        progress=Progress(),
    )


def split_of(model, pairs_folder, repeated: int = 1) -> Split:
    """The eight validation pairs, several times over, with a made-up reference."""
    pairs = val_pairs(model, pairs_folder) * repeated
    count = int(reference.response_starts(pairs)[-1])
    return Split([], pairs, Reference(pairs, torch.zeros(count)))


RUNS = [
    "--loss dpo --beta 0.1",
    "--loss td_dpo --kl k3 --lora_dropout 0.1",
    "--loss td_dpo --kl full_sym",
    "--loss cpo --score brier",
    "--loss dlrml --learn_beta_mix",
    "--loss dpo --tune full",
    "--loss cpo --score brier --tune full",
]


@pytest.mark.parametrize("run", RUNS)
def test_no_micro_batch_waits_for_the_device(tiny_model, pairs_folder, run):
    """Forward and backward, with what a loss may ask for."""
    study = study_of(tiny_model, pairs_folder, ONE_ON_META, Packing(2, tokens=600), *run.split())
    split = split_of(tiny_model, pairs_folder)
    assert len(packing.share_out(list(range(8)), split.pairs, study.packing)) > 1
    with NoWaitingOperators(), NoWaitingFunctions():
        step = train_pref.compute_gradients(study, split, list(range(8)))
    assert step.tokens == sum(study.packing.size(pair) for pair in split.pairs)
    assert all(p.grad is not None for n, p in study.policy.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("what", ["evaluation", "reference"])
def test_a_pass_over_a_split_reads_only_at_its_end(tiny_model, pairs_folder, what):
    study = study_of(tiny_model, pairs_folder, ONE_ON_META, Packing(2, tokens=600))
    split, forwards = split_of(tiny_model, pairs_folder), []
    study.policy.register_forward_hook(lambda *_: forwards.append(1))
    with pytest.raises(NotImplementedError, match="no data"), NoWaitingOperators():
        if what == "evaluation":
            train_pref.policy_sums(study, split)
        else:
            reference.compute(study.policy, split.pairs, study.packing, ONE_ON_META, what)
    assert len(forwards) == len(packing.share_out(list(range(8)), split.pairs, study.packing))


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_waits_for_the_device(name):
    values = torch.zeros(8, device=META, requires_grad=True)
    inputs = PairLogps(*[values] * 6, kl_chosen=values, kl_rejected=values, score_chosen=values)
    loss = loss_options.bind(name, {})
    with NoWaitingOperators(), NoWaitingFunctions():
        loss(inputs._replace(running_rho=0.3))[0].sum().backward()


def test_the_mask_is_made_without_waiting():
    pairs = [TokenPair([1] * 60, [1] * 50, [1] * 30), TokenPair([1] * 40, [1] * 70, [1] * 6)]
    with NoWaitingOperators(), NoWaitingFunctions():
        batch = make_batch(pairs, Packing(0), META)
        assert flex.block_mask(batch).shape[-1] == 256
    assert all(type(number) is int for row in batch.layout for number in row)


def test_what_is_copied_together_is_what_was_there():
    tensors = [
        torch.arange(7),
        torch.tensor([[0.1, -2.0], [3e38, 5.0]])[:, 1:],
        torch.zeros(0),
        torch.tensor(2.5, dtype=torch.float64),
        torch.arange(300, dtype=torch.int32).reshape(3, 100).T,
        torch.tensor([True, False]),
    ]
    for got, expected in zip(packing.taken_apart(packing.in_one(tensors, False), tensors), tensors):
        assert torch.equal(got, expected) and got.dtype == expected.dtype
        assert got.storage_offset() * got.itemsize % packing.COPY_ALIGNMENT == 0


@pytest.mark.parametrize("device", [META, CPU], ids=str)
def test_the_next_micro_batch_is_laid_out_meanwhile(monkeypatch, device):
    """In a thread where a device computes; in turn where the CPU does."""
    pairs = [TokenPair([1], [2] * size, [3]) for size in (5, 6, 7, 8)]
    begun = [threading.Event() for _ in pairs]
    original, threads = packing.lay_out, []

    def lay_out(members, *more):
        threads.append(threading.current_thread())
        begun[len(members[0].chosen) - 5].set()
        return original(members, *more)

    monkeypatch.setattr(packing, "lay_out", lay_out)
    shares = [[0], [1], [], [2]]
    sizes = []
    for number, micro in enumerate(micro_batches(shares, pairs, Packing(0), device, [3])):
        sizes.append((micro.members, micro.counts, micro.batch.response_lengths[0]))
        if device is META and number == 0:
            assert begun[1].wait(timeout=10)  # before it is asked for
        assert begun[1].is_set() or number == 0
        assert not begun[2].is_set() or number >= 2
    assert sizes == [([0], True, 5), ([1], True, 6), ([3], False, 8), ([2], True, 7)]
    assert (threading.main_thread() in threads) == (device is CPU)


WAITING = {
    "a value": lambda x: x.sum().item(),
    "a copy from the host": lambda x: torch.ones(3).to(META),
    "a copy from memory that is not pinned": lambda x: torch.ones(3).to(META, non_blocking=True),
    "a copy to the host": lambda x: torch.empty(8).copy_(x, non_blocking=True),
    "a tensor of values": lambda x: torch.tensor([1.0], device=META),
    "another tensor of values": lambda x: x.new_tensor([1.0]),
    "a scalar": lambda x: torch.tensor(1.0).to(META),
    "an index on the host": lambda x: x[[0, 2]],
    "a row on the host": lambda x: x + torch.ones(8),
}


@pytest.mark.parametrize("what", WAITING)
def test_what_waits_is_found(what):
    x = torch.zeros(8, device=META)
    with pytest.raises(Waits), NoWaitingOperators(), NoWaitingFunctions():
        WAITING[what](x)
