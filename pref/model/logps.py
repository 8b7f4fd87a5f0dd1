"""The model: device and ranks, loading, LoRA, FSDP2, and log-probabilities of responses.

Shared because a log-probability must mean the same in training, evaluation and the reference.
"""

from functools import partial

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pref.files.console import UserError
from pref.model import attention, lora, token_scores
from pref.model.packing import Batch

LOGITS_CHUNK = 2**24  # fp32 logits held at once, 64 MiB: 524 response tokens at a vocabulary of 32k


def sum_by_row(values: Tensor, batch: Batch) -> Tensor:
    """Per response token (the first n of N) -> (2B,) sums per row, fp32. Added in float64: the
    order, which CUDA does not fix, then leaves no trace, and equal tokens give equal sums.
    """
    zeros = values.new_zeros(len(batch.lengths), dtype=torch.float64)
    return zeros.index_add(0, batch.segments[: len(values)], values.double()).float()


class TargetLogps(torch.autograd.Function):
    """Log-probabilities of target tokens from hidden states, through a frozen output head.

    d logp / d hidden = (onehot - softmax) W needs nothing from later layers, so it is computed
    beside the log-prob, chunk by chunk, and kept as (N, H); the backward pass only scales it. The
    logits are computed once and no chunk of them outlives its turn.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, softcap, chunk_tokens, logps_of, slopes_of):
        """hidden (N, H), weight (V, H), bias (V,) or None, targets (N,) -> (N,) fp32 nats."""
        logps = hidden.new_empty(len(targets), dtype=torch.float32)
        gradients = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = F.linear(hidden[rows], weight, bias)
            logps[rows], normaliser = logps_of(logits, targets[rows], softcap)
            if gradients is not None:
                torch.mm(
                    slopes_of(logits, targets[rows], normaliser, softcap),
                    weight,
                    out=gradients[rows],
                )
        ctx.save_for_backward(gradients)
        return logps

    @staticmethod
    def backward(ctx, grad):
        (gradients,) = ctx.saved_tensors
        return (grad.unsqueeze(1) * gradients).to(gradients.dtype), *[None] * 7


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """(n, V) logits in fp32, squashed where the architecture does so (Gemma 2)."""
    logits = logits.float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def logps_of(logits: Tensor, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Log-probs of `targets` and the logarithm of the normaliser, (n,) each, fp32."""
    logits = capped(logits, softcap)
    normaliser = logits.logsumexp(-1)
    return logits.gather(1, targets.unsqueeze(1)).squeeze(1) - normaliser, normaliser


def slopes_of(logits: Tensor, targets: Tensor, normaliser: Tensor, softcap: float | None) -> Tensor:
    """d logp / d logits: onehot - softmax, (n, V) in the logits' dtype."""
    squashed = capped(logits, softcap)
    slopes = -torch.exp(squashed - normaliser.unsqueeze(1))
    slopes = slopes + (torch.arange(logits.shape[1], device=logits.device) == targets.unsqueeze(1))
    if softcap is not None:
        slopes = slopes * (1 - (squashed / softcap) ** 2)
    return slopes.to(logits.dtype)


class ResponseLogps(nn.Module):
    """A causal LM (PEFT-wrapped or plain) whose forward gives log-probabilities of response tokens.

    Only response positions reach the output head, a chunk of LOGITS_CHUNK logits at a time, so that
    no [tokens, vocabulary] tensor is ever held in fp32 beyond one chunk, forward or backward.
    """

    def __init__(self, model: PeftModel | PreTrainedModel):
        super().__init__()
        self.model = model
        self.causal = [
            model.get_base_model() if isinstance(model, PeftModel) else model
        ]  # in a list: not a submodule
        self.causal[0].set_attn_implementation("branches")  # packing.py's
        config = self.causal[0].config.get_text_config()
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.chunk_tokens = max(1, LOGITS_CHUNK // config.vocab_size)
        self.head_functions = (logps_of, slopes_of)

    @property
    def backbone(self) -> nn.Module:
        return getattr(self.causal[0], self.causal[0].base_model_prefix)

    def prepare_layers(self, compiled: bool, checkpointed: bool) -> None:
        """torch.compile and activation checkpointing, layer by layer: one graph serves all layers,
        and any number of tokens. Set on the layers' `forward`, not the modules, so that FSDP's
        hooks stay outside; and not by transformers, whose checkpointing moved from `__call__` into
        `forward` and would be compiled away.
        """
        for layer in decoder_layers(self):
            if compiled:
                # not dynamic=True: under FSDP the size of a head becomes a variable too, and its
                # code scalar
                layer.forward = torch.compile(layer.forward)
            if checkpointed:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if compiled:
            self.head_functions = tuple(torch.compile(f, dynamic=True) for f in self.head_functions)

    def hidden(self, batch: Batch) -> Tensor:
        """(N, H) last hidden state at the position that predicts each response token."""
        packed = batch.position_ids is not None
        mask = attention.block_mask(batch) if packed and batch.input_ids.is_cuda else batch.mask
        output = self.backbone(
            input_ids=batch.input_ids,
            attention_mask=mask,
            position_ids=batch.position_ids,
            use_cache=False,
        )
        return output.last_hidden_state.flatten(0, 1)[batch.positions]

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, H) -> (n, V) fp32."""
        return capped(self.causal[0].get_output_embeddings()(hidden), self.softcap)

    def chunk(
        self,
        hidden: Tensor,
        targets: Tensor,
        reference: Tensor | None,
        kl: str | None,
        score: dict | None,
    ):
        """Of `targets` (n,): log-probs; divergence `kl` from the `reference` hidden states; proper
        `score`. (n,) each, None where not asked for.
        """
        logits = self.logits(hidden)
        logps = -F.cross_entropy(logits, targets, reduction="none")
        divergence = None
        if reference is not None:
            with torch.no_grad(), lora.adapter_off(self.model):  # the head may carry an adapter too
                ref_logits = self.logits(reference)
            divergence = token_scores.token_full_kl(logits, ref_logits, kl)
        return (
            logps,
            divergence,
            None if score is None else token_scores.token_score(logits, targets, **score),
        )

    def forward(
        self,
        batch: Batch,
        kl: str | None = None,
        score: dict | None = None,
        own_forward: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Per response token, fp32: log-prob (N,); for `kl` full_* its divergence from the
        adapter-off model (N,); for `score` (arguments of losses.token_score) the score of the
        chosen responses' tokens (the first of N). own_forward: the log-probs alone, by the
        architecture's own forward on a plain batch, for comparison.
        """
        if own_forward:
            output = self.model(
                input_ids=batch.input_ids, attention_mask=batch.mask, use_cache=False
            )
            logits = output.logits.flatten(0, 1)[batch.positions].float()
            return -F.cross_entropy(logits, batch.targets, reduction="none"), None, None
        reference = None
        if kl in token_scores.FULL_KL:
            with torch.no_grad(), lora.adapter_off(self.model):
                reference = self.hidden(batch)
        hidden = self.hidden(batch)
        head = self.causal[0].get_output_embeddings()
        if (
            reference is None
            and score is None
            and type(head) is nn.Linear
            and not head.weight.requires_grad
        ):
            logps = TargetLogps.apply(
                hidden,
                head.weight,
                head.bias,
                batch.targets,
                self.softcap,
                self.chunk_tokens,
                *self.head_functions,
            )
            return logps, None, None
        chosen = batch.chosen_tokens if score is not None else 0  # scored tokens, which come first
        edges = [
            *range(0, chosen, self.chunk_tokens),
            *range(chosen, len(hidden), self.chunk_tokens),
            len(hidden),
        ]
        pieces = []
        for start, end in zip(edges, edges[1:]):
            ref = None if reference is None else reference[start:end]
            wanted = (batch.targets[start:end], ref, kl, score if start < chosen else None)
            pieces.append(checkpoint(self.chunk, hidden[start:end], *wanted, use_reentrant=False))
        columns = [[part for part in column if part is not None] for column in zip(*pieces)]
        logps, divergence, scores = (torch.cat(column) if column else None for column in columns)
        return logps, divergence, scores


@torch.no_grad()
def check_logps(policy: ResponseLogps, batch: Batch, plain: Batch, tolerance: float) -> None:
    """Raise UserError if our path to the log-probs of `batch` disagrees with the architecture's own
    forward on the same pairs as a `plain` padded batch.
    """
    with lora.dropout(policy, active=False):
        mine = policy(batch)[0]
        with torch.compiler.set_stance("force_eager"):
            theirs = policy(plain, own_forward=True)[0]
    difference = (mine - theirs).abs().mean().item()
    if not difference <= tolerance:
        raise UserError(
            f"log-probabilities differ by {difference:.3g} nats a token from the model's own forward (tolerance "
            f"{tolerance}): this architecture ({type(policy.causal[0]).__name__}) computes its logits in its own way"
        )


def decoder_layers(policy: ResponseLogps) -> nn.ModuleList:
    layers = getattr(policy.backbone, "layers", None)
    if layers is None:
        raise UserError(
            f"{type(policy.causal[0]).__name__}: it has no `layers`; decoder-only models are supported"
        )
    return layers


def trainable(policy: ResponseLogps) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}
