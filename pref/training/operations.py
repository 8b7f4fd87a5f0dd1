"""The operations of a run, counted from shapes and token ids, and the hours that they take."""

from collections.abc import Sequence
from typing import NamedTuple

from pref.model.chat import TokenPair
from pref.model.packing import Packing
from pref.training.hardware import Card
from pref.training.memory import Sizes


class Sums(NamedTuple):
    """What the operations on some pairs depend on, added over the pairs."""

    tokens: int  # that pass through the layers, without padding
    keys: int  # that these tokens attend to
    responses: int  # tokens that reach the output head


class Work(NamedTuple):
    """Floating-point operations of a run, over all ranks."""

    training: float
    recomputed: float  # forward passes of checkpointed layers, a second time
    evaluation: float
    reference: float  # log-probs of all pairs, once for all runs on the same pairs and model

    @property
    def of_run(self) -> float:
        """What every run does: the reference is computed once for all of them."""
        return self.training + self.recomputed + self.evaluation

    @property
    def evaluation_share(self) -> float:
        return self.evaluation / self.of_run


def sums_of(pairs: Sequence[TokenPair], packing: Packing) -> Sums:
    """Of a row [prompt | chosen | rejected], or of two rows: each token attends to those before it
    in its row and to itself, but not to the other response.
    """
    tokens = keys = responses = 0
    for pair in pairs:
        p, branches = len(pair.prompt), (len(pair.chosen), len(pair.rejected))
        prompts = 1 if packing.shared else 2
        tokens += prompts * p + sum(branches)
        keys += prompts * p * (p + 1) // 2 + sum(p * n + n * (n + 1) // 2 for n in branches)
        responses += sum(branches)
    return Sums(tokens, keys, responses)


def forward(sizes: Sizes, sums: Sums, head: bool = True) -> tuple[float, float, float]:
    """Operations of a forward pass: of the frozen weights, of the adapter, and of attention; two
    for each weight and token, four for each pair of query and key and element of a head's output.
    """
    frozen = 2 * sizes.used * sums.tokens
    frozen += 2 * sizes.hidden * sizes.vocabulary * sums.responses if head else 0
    adapter = 0 if sizes.is_full else 2 * sizes.trainable * sums.tokens
    return frozen, adapter, 4 * sizes.layers * sizes.attention * sums.keys


def work_of(
    sizes: Sizes, training: Sums, evaluation: Sums, reference: Sums, checkpointed: int
) -> Work:
    """Operations of a run. A frozen weight has a forward pass and the gradient of its input, the
    adapter also its own gradient, and attention twice its forward pass for the gradient. Where all
    parameters are trained, all have their own gradient.

    training, evaluation: over all steps and evaluations. checkpointed: how many layers are.
    """
    frozen, adapter, attention = forward(sizes, training)
    passes = 2
    if sizes.is_full:
        # The gradient of each weight too, and the trained head's logits are computed twice.
        passes = 3
        frozen += 2 * sizes.head * training.responses / passes
    again = sum(forward(sizes, training, head=False)) * checkpointed / sizes.layers
    return Work(
        training=passes * frozen + 3 * adapter + 3 * attention,
        recomputed=again,
        evaluation=sum(forward(sizes, evaluation)),
        reference=sum(forward(sizes, reference)),
    )


def hours(operations: float, card: Card, mfu: float, world: int) -> float:
    return operations / (card.tflops * 1e12 * mfu * world) / 3600
