"""The output head as the architecture computes it: from hidden states to logits.

Most heads are one linear layer, some cap its outputs (Gemma), and `logps.TargetLogps` computes
these in one pass. Others scale hidden states or logits (Cohere, Granite, Falcon-H1) or do something
of their own. So the architecture's own code is run with its backbone taken out: `kind_of` looks at
what it does, and `own_logits` computes any head exactly.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from pref.files.console import UserError
from pref.model import architecture

# fp32 logits held at once, 64 MiB: 524 response tokens at a vocabulary of 32k. Compiled code holds
# none in fp32 on a CPU and takes twice as many, which is 1.2 times as fast (bench/README.md).
LOGITS_CHUNK = 2**24
COMPILED_CHUNK = 2 * LOGITS_CHUNK
# On CUDA a product is computed in tiles of 128 to 256 rows by as many columns. A chunk of whole
# tiles wastes none of them, and one of at least 1,024 tokens reads the head's weight (1 GB at a
# vocabulary of 128k) seldom enough that the products, not the reads, take the time.
CUDA_TILE = 256
CUDA_LEAST_TOKENS = 1024


class OnlyHidden(tuple):
    """The output of a backbone that has hidden states (1, n, H) and nothing else."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def replaced_forward(module: nn.Module, forward) -> Iterator[None]:
    """Context in which calling `module` calls `forward` instead."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def wide(linear: nn.Linear) -> AbstractContextManager:
    """Context in which a head without bias gives fp32 logits from weights in a narrower type."""
    return replaced_forward(linear, lambda x: F.linear(x.float(), linear.weight.float()))


def chunk_tokens(vocabulary: int, on_cuda: bool, compiled: bool = False) -> int:
    """How many response tokens go through the head at once."""
    tokens = max(1, LOGITS_CHUNK // vocabulary)
    if not on_cuda:
        return max(1, COMPILED_CHUNK // vocabulary) if compiled else tokens
    return max(CUDA_LEAST_TOKENS, tokens // CUDA_TILE * CUDA_TILE)


def is_attention(
    dtype: torch.dtype, device: torch.device, bias: Tensor | None, softcap: float | None
) -> bool:
    """Whether `as_attention` computes a linear head with this bias and cap: in bf16 on a CPU."""
    return (dtype, device.type, bias, softcap) == (torch.bfloat16, "cpu", None, None)


def as_attention(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of the logits z = W h: logsumexp(z), (N,) in fp32, and softmax(z) W, (N, H).

    hidden (N, H), weight (V, H). This is attention of N queries over V keys, which are the values
    too, and computed as such: with z in fp32, and in one pass over blocks of z that fit in a cache.
    A product of matrices in bf16 rounds z to bf16, where numbers from 16 to 32 are 0.125 apart:
    bench/README.md has what that does to log-probs.
    """
    if len(hidden) == 0:  # the kernel divides by it
        return hidden.new_empty(0, dtype=torch.float32), hidden
    keys = weight[None, None]
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mean, normaliser = kernel(hidden[None, None], keys, keys, 0.0, False, scale=1.0)
    return normaliser[0, 0], mean[0, 0]


def own_logits(causal: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (n, V) from hidden states (n, H), by the architecture's own code. Raises UserError if
    that has no backbone to take out.
    """
    calls = []

    def backbone(*_, **__) -> OnlyHidden:
        calls.append(1)
        return OnlyHidden([hidden.unsqueeze(0)])

    tokens = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    with replaced_forward(architecture.backbone_of(causal), backbone):
        logits = causal(input_ids=tokens, use_cache=False).logits[0]
    if not calls:
        raise UserError(
            f"{type(causal).__name__}: its forward has no separate backbone; use another model"
        )
    return logits


def kind_of(causal: PreTrainedModel) -> tuple[bool, float | None]:
    """Whether the head is one linear layer, and the cap on its outputs if it has one.

    The head's linear layer is replaced too, by one that remembers its input and gives known
    outputs, so that no weight is needed and every rank sees the same.
    """
    linear = causal.get_output_embeddings()
    if linear is None:
        return False, None
    config = causal.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    hidden = torch.linspace(-2, 3, 2 * config.hidden_size).reshape(2, -1)
    logits, inputs = torch.linspace(-50, 60, 16).reshape(1, 2, 8), []

    def known(x: Tensor) -> Tensor:
        inputs.append(x)
        return logits.clone()

    try:
        with replaced_forward(linear, known):
            outputs = own_logits(causal, hidden)
    except (RuntimeError, IndexError, TypeError):
        return False, None  # it has weights beside the linear layer
    if len(inputs) != 1 or not torch.equal(inputs[0], hidden.unsqueeze(0)):
        return False, None
    if torch.equal(outputs, logits[0]):
        return True, None
    capped = None if cap is None else cap * torch.tanh(logits[0] / cap)
    is_capped = capped is not None and outputs.shape == capped.shape
    if is_capped and torch.allclose(outputs, capped, rtol=1e-6, atol=1e-6):
        return True, cap
    return False, None
