"""The engine on tiny random models: equal to `generate`, whatever shares the batch."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from pref.answering import generation
from pref.answering.adapters import LayerWeights
from pref.answering.generation import GREEDY_BELOW, MOST_ADAPTERS, Engine, Request, Slot, pick
from pref.files.console import UserError
from pref.model import architecture


def plain_generate(model, ids: list[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy tokens by transformers' `generate`, and at each the distance between the two largest
    logits.
    """
    given = torch.tensor([ids])
    output = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = [step[0].float().topk(2).values for step in output.logits]
    return output.sequences[0, len(ids) :].tolist(), [(pair[0] - pair[1]).item() for pair in best]


def greedy(prompt: list[int], count: int, adapter: str | None = None, tag=None) -> Request:
    return Request(prompt, adapter, temperature=0.0, seed=0, max_new_tokens=count, tag=tag)


def test_follow_ups_read_the_whole_conversation(tiny_model):
    """As after a restart between the turns: turn 2 does not depend on how turn 1 came about."""
    models = [AutoModelForCausalLM.from_pretrained(tiny_model).eval() for _ in range(2)]
    engine, sizes, answers = Engine(models[0], {}, rows=1, length=128, ends=[2]), [], []
    original = engine.forward
    engine.forward = lambda flat, groups: sizes.append(len(flat.tokens)) or original(flat, groups)

    def finished(request):
        answers.append(request.tokens)
        if request.tag == 1:
            return greedy([*request.prompt, *request.tokens, 9, 10, 11], 6, tag=2)
        return None

    engine.run(iter([greedy(list(range(5, 45)), 6, tag=1)]), finished)
    assert sizes == [40, *[1] * 5, 49, *[1] * 5]
    prompt = [*range(5, 45), *answers[0], 9, 10, 11]
    assert answers[1] == plain_generate(models[1], prompt, 6)[0]


def test_sampling_follows_the_softmax():
    logits, request = torch.tensor([[0.0, 1.0, 2.0, -1.0]]), Request([1], None, 0.7, 5, 1)
    draws = torch.tensor([pick(logits.clone(), [request])[0] for _ in range(20000)])
    frequencies = torch.bincount(draws, minlength=4) / len(draws)
    assert torch.allclose(frequencies, (logits[0] / 0.7).softmax(0), atol=0.015)
    assert pick(logits.clone(), [Request([1], None, GREEDY_BELOW / 2, 5, 1)]) == [2]


def test_a_draw_does_not_depend_on_its_batch():
    logits = torch.randn(3, 1001, generator=torch.Generator().manual_seed(0))
    kinds = [(0.7, 5), (0.0, 6), (1.3, 7)]  # temperature, seed
    requests = lambda: [Request([1], None, *kind, 1) for kind in kinds]  # noqa: E731
    alone = [
        pick(row[None].clone(), [request])[0]
        for row, request in zip(logits, requests(), strict=True)
    ]
    assert pick(logits.clone(), requests()) == alone
    assert alone[1] == logits[1].argmax()


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for a GPU: a scalar that is read, a copy that blocks."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "is_nonzero"), "a scalar is read"
        target = kwargs.get("device")
        if name == "_to_copy" and target is not None and args[0].device != target:
            assert kwargs.get("non_blocking"), "a copy blocks"
        return func(*args, **kwargs)


def test_the_host_waits_once_a_token(tiny_model):
    """On the meta device, where a value cannot be read at all: a step of rows of two lengths with
    an adapter and without. Its tokens are then read in one list.
    """
    meta = torch.device("meta")
    model = architecture.on_meta(AutoConfig.from_pretrained(tiny_model), None, torch.float32)
    engine = Engine(model, {}, 4, 600, ends=[])
    engine.adapters.folders = {"mine": None}
    mlp = engine.model.model.layers[1].mlp
    base = mlp.up_proj.forward
    mlp.up_proj.forward = lambda x: engine.adapters.forward("up", base, x)
    outputs, inputs = mlp.up_proj.weight.shape
    a, b = torch.empty(2, inputs, device=meta), torch.empty(2, outputs, device=meta)
    engine.adapters.load = lambda name: {"up": LayerWeights(a, b, scaling=2.0)}
    engine.adapters.use({"mine"})
    slots = [
        Slot(greedy([5], 9, adapter), length) for adapter, length in (("mine", 8), (None, 300))
    ]
    for slot in slots:
        slot.request.tokens.append(7)
    with torch.inference_mode(), NoWaiting():
        logits = engine.decode(slots)
        assert logits.shape == (2, 600) and logits.is_meta
        assert len(engine.cache.groups) == 2
        requests = [Request([1], None, temperature, 5, 1) for temperature in (0.7, 0.0)]
        pick(torch.zeros(2, 600), requests)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_nothing_is_drawn_from_broken_logits(broken, temperature):
    """One value among many is enough; the other row of the batch is not blamed."""
    logits = torch.zeros(2, 4)
    logits[1, 3] = broken
    requests = [Request([1], name, temperature, 5, 1) for name in ("fine", "dpo")]
    with pytest.raises(UserError, match="^dpo: its logits are NaN or infinite"):
        pick(logits, requests)


def test_many_adapters_take_turns_in_memory(tiny_model, tmp_path):
    """Never more than MOST_ADAPTERS are loaded, though 20 are answered for."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    folders = {f"run{number:02}": tmp_path / f"run{number:02}" for number in range(20)}
    for folder in folders.values():
        model.save_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    engine = Engine(base, folders, rows=16, length=32, ends=[2])
    loaded, original = [], engine.adapters.use

    def use(names):
        original(names)
        loaded.append(len(engine.adapters.loaded))

    engine.adapters.use = use
    engine.run((greedy([5, 6, 7], 3, adapter=name) for name in folders), lambda request: None)
    assert max(loaded) == MOST_ADAPTERS


def test_rows_do_not_see_each_other(tiny_model, tmp_path, monkeypatch):
    """In bf16 the logits of a request are the same bits, alone or beside other prompts, lengths,
    adapters and ages, and in another row.
    """
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "mine")
    drawn: dict[str, list] = {}

    def recording(logits, requests):
        for row, request in zip(logits, requests):
            drawn.setdefault(request.tag, []).append(row.clone())
        return pick(logits, requests)

    monkeypatch.setattr(generation, "pick", recording)

    def logits_of(*others) -> torch.Tensor:
        drawn.clear()
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
        engine = Engine(model, {"mine": tmp_path / "mine"}, rows=4, length=600, ends=[])
        mine = greedy(list(range(5, 38)), 12, adapter="mine", tag="mine")
        engine.run(iter([*others, mine]), lambda request: None)
        return torch.stack(drawn["mine"])

    alone = logits_of()
    short = greedy([7, 8, 9], 3)
    long = greedy([9] * 501, 30, adapter="mine")
    assert torch.equal(alone, logits_of(short, greedy([5] * 77, 9), long, greedy([6], 20)))
