"""Log-probabilities of response tokens: what training, evaluation and the reference all compare.

`ResponseLogps` wraps a causal language model. Its forward takes a packed `Batch` through two parts:

    backbone   (1, T) token ids -> (N, H) hidden states that predict the N response tokens
    head       (N, H) -> (N,) log-probs, a chunk of tokens at a time

With vocabularies of 32k to 256k the logits, not the layers, would dominate memory. So prompts never
reach the head, and no (N, V) tensor is ever held. There are two heads: `TargetLogps`, for
log-probs alone, and `ResponseLogps.chunk`, which gives divergences and scores from the logits too.
"""

from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pref.files.console import UserError, first_line
from pref.model import architecture, flex, head, lora, token_scores
from pref.model.packing import Batch

# Mean |ours - own forward| per response token (nats) that needs no measurement to be explained.
OWN_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def sum_by_row(values: Tensor, batch: Batch) -> Tensor:
    """Sums per response: values of the first n of N response tokens -> (2B,), fp32.

    Added in float64, because CUDA does not fix the order of the additions: the wider sum hides it,
    and equal tokens give equal sums.
    """
    zeros = values.new_zeros(len(batch.lengths), dtype=torch.float64)
    return zeros.index_add(0, batch.segments[: len(values)], values.double()).float()


class TargetLogps(torch.autograd.Function):
    """Log-probabilities of target tokens from hidden states, through the output head.

    For a token with hidden state h (H,), logits z = W h and target y:

        log p(y)     = z_y - logsumexp(z)
        d log p / dz = onehot(y) - softmax(z)         (V,), the slopes
        d log p / dh = (d log p / dz) W               (H,)
        d log p / dW = (d log p / dz)^T h             (V, H)

    With a frozen weight, the third line needs nothing from later layers. So the forward pass
    computes it along with the first, from the same chunk of logits, and saves it: (N, H) instead of
    logits (N, V). Backward only multiplies each row by the incoming gradient. The head runs once,
    where recomputing the logits in backward would run it twice.

    A trained weight's gradient is a sum over tokens, each times its incoming gradient, which is
    known only when the losses of the whole micro-batch are. So the forward pass saves the hidden
    states, and the backward pass computes each chunk's logits again, and both gradients from the
    same slopes. The weight's is summed over the chunks in fp32.

    In bf16 on a CPU the first and the third line come from `head.as_attention`.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, softcap, chunk_tokens, logps_of, slopes_of):
        """hidden (N, H), weight (V, H), bias (V,) or None, targets (N,) -> (N,) fp32, nats.

        logps_of, slopes_of: the functions below, or compiled versions of them.
        """
        is_trained = any(ctx.needs_input_grad[1:3])
        gradients = None
        if head.is_attention(weight.dtype, weight.device, bias, softcap):
            logps, gradients = logps_by_attention(hidden, weight, targets)
        else:
            logps = hidden.new_empty(len(targets), dtype=torch.float32)
            if ctx.needs_input_grad[0] and not is_trained:
                gradients = torch.empty_like(hidden)
            for start in range(0, len(targets), chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                logits = F.linear(hidden[rows], weight, bias)  # (n, V)
                logps[rows], normaliser = logps_of(logits, targets[rows], softcap)
                if gradients is not None:
                    slopes = slopes_of(logits, targets[rows], normaliser, softcap)  # (n, V)
                    torch.mm(slopes, weight, out=gradients[rows])
        ctx.softcap, ctx.chunk_tokens = softcap, chunk_tokens
        ctx.logps_of, ctx.slopes_of = logps_of, slopes_of
        ctx.save_for_backward(gradients, *((hidden, weight, bias, targets) if is_trained else ()))
        return logps

    @staticmethod
    def backward(ctx, grad):
        """grad (N,) -> the gradients for `hidden` (N, H), weight and bias; None for the five other
        arguments.
        """
        gradients, *inputs = ctx.saved_tensors
        hidden_grad = weight_grad = bias_grad = None
        if inputs:
            hidden_grad, weight_grad, bias_grad = head_gradients(
                ctx, inputs, grad, gradients is None
            )
        if gradients is not None and ctx.needs_input_grad[0]:
            hidden_grad = (grad.unsqueeze(1) * gradients).to(gradients.dtype)
        return hidden_grad, weight_grad, bias_grad, *[None] * 5


def logps_by_attention(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of `targets`, (N,) fp32, and d log p / dh (N, H), by the head as attention: with
    the target's logit z_y = W_y h,

        log p(y) = z_y - logsumexp(z)          d log p / dh = W_y - softmax(z) W

    The difference on the right is rounded as its terms are. A token of p(y) > 0.99 has a gradient
    of 0.2 % of the others' norm, and only that loses its direction (bench/README.md).
    """
    normaliser, mean = head.as_attention(hidden, weight)
    of_targets = weight[targets]
    logits = (hidden.float() * of_targets.float()).sum(-1)
    # The two are rounded differently: without a limit log p could be 3e-5.
    return (logits - normaliser).clamp_(max=0), of_targets - mean


def head_gradients(
    ctx, inputs: list[Tensor], grad: Tensor, is_hidden_missing: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias of TargetLogps, as far as they are needed, a
    chunk of tokens at a time; of hidden states only if the forward pass has not saved them.

    inputs: hidden, weight, bias, targets. grad: (N,), of the log-probs.
    """
    hidden, weight, bias, targets = inputs
    of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
    hidden_grad = torch.empty_like(hidden) if of_hidden and is_hidden_missing else None
    weight_grad = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
    bias_grad = torch.zeros_like(bias, dtype=torch.float32) if of_bias else None
    for start in range(0, len(targets), ctx.chunk_tokens):
        rows = slice(start, start + ctx.chunk_tokens)
        logits = F.linear(hidden[rows], weight, bias)  # (n, V)
        # Of these logits, rounded as they are: then the slopes of a token add up to 0.
        _, normaliser = ctx.logps_of(logits, targets[rows], ctx.softcap)
        slopes = ctx.slopes_of(logits, targets[rows], normaliser, ctx.softcap, grad[rows])
        if hidden_grad is not None:
            torch.mm(slopes, weight, out=hidden_grad[rows])
        if of_weight:
            weight_grad += slopes.t() @ hidden[rows]  # (V, H)
        if of_bias:
            bias_grad += slopes.sum(0, dtype=torch.float32)
    return (
        hidden_grad,
        weight_grad.to(weight.dtype) if of_weight else None,
        bias_grad.to(bias.dtype) if of_bias else None,
    )


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """(n, V) logits in fp32, squashed to (-softcap, softcap) where the model does so (Gemma 2)."""
    logits = logits.float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def logps_of(logits: Tensor, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Log-probs of `targets`, and the logarithm of the softmax normaliser; (n,) each, fp32."""
    logits = capped(logits, softcap)
    normaliser = logits.logsumexp(-1)
    return logits.gather(1, targets.unsqueeze(1)).squeeze(1) - normaliser, normaliser


def slopes_of(
    logits: Tensor,
    targets: Tensor,
    normaliser: Tensor,
    softcap: float | None,
    factors: Tensor | None = None,
) -> Tensor:
    """d log p(target) / d logits = onehot - softmax, (n, V) in the dtype of the logits; each row
    times its factor, if `factors` (n,) are given.
    """
    squashed = capped(logits, softcap)
    slopes = -torch.exp(squashed - normaliser.unsqueeze(1))
    slopes = slopes + (torch.arange(logits.shape[1], device=logits.device) == targets.unsqueeze(1))
    if softcap is not None:
        slopes = slopes * (1 - (squashed / softcap) ** 2)  # d c tanh(z/c) / dz = 1 - tanh(z/c)^2
    if factors is not None:
        slopes = slopes * factors.unsqueeze(1)
    return slopes.to(logits.dtype)


class TokenValues(NamedTuple):
    """Per response token, fp32."""

    logps: Tensor  # (N,) nats
    divergence: Tensor | None = None  # (N,) from the reference over the whole vocabulary, nats
    score: Tensor | None = None  # (chosen tokens,) proper score, as a loss


def set_attention(causal: PreTrainedModel, name: str) -> None:
    """Let `causal` use the attention that transformers knows as `name`, if it has a choice."""
    if causal.config._attn_implementation != name and causal._can_set_attn_implementation():
        causal.set_attn_implementation(name)


class ResponseLogps(nn.Module):
    """A causal LM (PEFT-wrapped or plain) whose forward gives log-probs of response tokens.

    Only response positions reach the output head, some (`head.chunk_tokens`) at a time, in forward
    and backward.
    """

    def __init__(self, model: PeftModel | PreTrainedModel, attention: str = "branches"):
        """attention: transformers' name of the attention; 'branches' (attention.py) takes packed
        batches, others take plain ones only.
        """
        super().__init__()
        self.model = model
        causal = model.get_base_model() if isinstance(model, PeftModel) else model
        set_attention(causal, attention)
        lora.only_adapter_trains(model)
        self.causal = [causal]  # in a list, because it is part of `model` already
        self.is_plain_head, self.softcap = head.kind_of(causal)
        self.chunk_tokens = head.chunk_tokens(self.vocabulary, on_cuda=False)
        self.head_functions = (logps_of, slopes_of)

    @property
    def vocabulary(self) -> int:
        return self.causal[0].config.get_text_config().vocab_size

    @property
    def backbone(self) -> nn.Module:
        return architecture.backbone_of(self.causal[0])

    def prepare_layers(
        self,
        compiled: bool,
        checkpointed: bool,
        first: int | None = None,
        on_cuda: bool = False,
    ) -> None:
        """Apply torch.compile and activation checkpointing, layer by layer.

        first: checkpoint only the first so many layers. The others' activations are free by the
        time that these are recomputed. on_cuda: where the policy will run, which may not be where
        it was loaded.

        One compiled graph then serves all layers and any number of tokens. Both are set on the
        layers' `forward`, not on the modules, so that FSDP's hooks stay outside of the graph.
        transformers' own checkpointing is not used: it moved from `__call__` into `forward`, where
        it would be compiled away.
        """
        for number, layer in enumerate(decoder_layers(self)):
            if compiled:
                # Not dynamic=True: under FSDP the size of a head would become a variable too, and
                # the code for it scalar.
                layer.forward = torch.compile(layer.forward)
            if checkpointed and (first is None or number < first):
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if on_cuda:
            self.prepare_for_cuda(compiled)
        elif compiled:
            self.chunk_tokens = head.chunk_tokens(self.vocabulary, on_cuda=False, compiled=True)
            self.head_functions = tuple(torch.compile(f, dynamic=True) for f in self.head_functions)

    def prepare_for_cuda(self, compiled: bool) -> None:
        """What `prepare_layers` does for a GPU alone."""
        flex.forbid_fallback()
        self.chunk_tokens = head.chunk_tokens(self.vocabulary, on_cuda=True)
        # Uncompiled, the head takes twelve passes over its logits in fp32, as much time as for its
        # products. FlexAttention is compiled anyway, so that this needs nothing more. Not with
        # dynamic=True: the vocabulary's size would become a variable too, and its rows unaligned.
        if compiled or self.causal[0].config._attn_implementation == "branches":
            self.head_functions = tuple(torch.compile(f) for f in self.head_functions)

    def hidden(self, batch: Batch) -> Tensor:
        """(N, H) last hidden states, each at the position that predicts a response token."""
        packed = batch.position_ids is not None
        mask = flex.block_mask(batch) if packed and batch.input_ids.is_cuda else batch.mask
        # A plain batch leaves positions to the architecture; not every one takes them.
        positions = {"position_ids": batch.position_ids} if packed else {}
        output = self.backbone(
            input_ids=batch.input_ids, attention_mask=mask, use_cache=False, **positions
        )
        return output.last_hidden_state.flatten(0, 1)[batch.positions]  # (1, T, H) -> (N, H)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, H) -> (n, V) fp32."""
        if not self.is_plain_head:
            return head.own_logits(self.causal[0], hidden).float()
        return capped(self.causal[0].get_output_embeddings()(hidden), self.softcap)

    def chunk(
        self,
        hidden: Tensor,
        targets: Tensor,
        reference: Tensor | None,
        kl: str | None,
        score: dict | None,
    ) -> TokenValues:
        """Values of n response tokens whose logits (n, V) fit in memory.

        hidden (n, H), targets (n,). reference: hidden states (n, H) of the reference, from which
        the divergence `kl` is computed. score: arguments of token_scores.token_score.
        """
        logits = self.logits(hidden)
        logps = -F.cross_entropy(logits, targets, reduction="none")
        divergence = scores = None
        if reference is not None:
            with torch.no_grad(), lora.adapter_off(self.model):  # the head may carry an adapter too
                ref_logits = self.logits(reference)
            divergence = token_scores.token_full_kl(logits, ref_logits, kl)
        if score is not None:
            scores = token_scores.token_score(logits, targets, **score)
        return TokenValues(logps, divergence, scores)

    def forward(
        self,
        batch: Batch,
        kl: str | None = None,
        score: dict | None = None,
        own_attention: str | None = None,
    ) -> TokenValues:
        """Log-probs (N,) of the batch's response tokens, and what else is asked for.

        kl: for one of token_scores.FULL_KL also each token's divergence from the model without its
        adapter. score: also the proper score of the chosen responses' tokens, with these arguments
        of token_scores.token_score. own_attention: log-probs by the architecture's own forward
        with this attention of its own, on a plain batch, for comparison.
        """
        if own_attention:
            return TokenValues(self.own_logps(batch, own_attention))
        reference = None
        if kl in token_scores.FULL_KL:
            with torch.no_grad(), lora.adapter_off(self.model):
                reference = self.hidden(batch)
        return self.from_hidden(self.hidden(batch), batch, reference, kl, score)

    def from_hidden(
        self,
        hidden: Tensor,
        batch: Batch,
        reference: Tensor | None = None,
        kl: str | None = None,
        score: dict | None = None,
    ) -> TokenValues:
        """What `forward` gives, from the hidden states (N, H) of the batch's response tokens; of
        the reference too, where a divergence is asked for.
        """
        linear = self.causal[0].get_output_embeddings()
        is_plain = type(linear) is nn.Linear and self.is_plain_head
        asks_more = reference is not None or score is not None
        if not is_plain or (asks_more and not self.has_wide_logits(linear.weight.dtype)):
            return self.values_in_chunks(hidden, batch, reference, kl, score)
        logps = TargetLogps.apply(
            hidden.to(linear.weight.dtype),  # Mamba's are in fp32, and it does so itself
            linear.weight,
            linear.bias,
            batch.targets,
            self.softcap,
            self.chunk_tokens,
            *self.head_functions,
        )
        if not asks_more:
            return TokenValues(logps)
        # A chunk's log-probs are of rounded logits, those of the cached reference are not.
        return self.values_in_chunks(hidden, batch, reference, kl, score)._replace(logps=logps)

    def has_wide_logits(self, dtype: torch.dtype) -> bool:
        """Whether log-probs in `dtype` are of fp32 logits, although it is not fp32."""
        linear = self.causal[0].get_output_embeddings()
        if type(linear) is not nn.Linear or not self.is_plain_head:
            return False
        return head.is_attention(dtype, linear.weight.device, linear.bias, self.softcap)

    def own_logps(self, batch: Batch, attention: str) -> Tensor:
        """(N,) log-probs of a plain batch, by the architecture's own forward and `attention`. Its
        head gives fp32 logits where ours does.
        """
        causal = self.causal[0]
        linear = causal.get_output_embeddings()
        is_wide = type(linear) is nn.Linear and self.has_wide_logits(linear.weight.dtype)
        ours = causal.config._attn_implementation
        set_attention(causal, attention)
        try:
            with head.wide(linear) if is_wide else nullcontext():
                output = causal(
                    input_ids=batch.input_ids, attention_mask=batch.mask, use_cache=False
                )
        finally:
            set_attention(causal, ours)
        logits = output.logits.flatten(0, 1)[batch.positions].float()
        return -F.cross_entropy(logits, batch.targets, reduction="none")

    def values_in_chunks(
        self,
        hidden: Tensor,
        batch: Batch,
        reference: Tensor | None,
        kl: str | None,
        score: dict | None,
    ) -> TokenValues:
        """`chunk` over all response tokens. Each chunk is checkpointed: its logits are computed
        again in backward.
        """
        # Scored tokens, those of chosen responses, come first: no chunk has both kinds.
        scored = batch.chosen_tokens if score is not None else 0
        size, count = self.chunk_tokens, len(hidden)
        edges = [*range(0, scored, size), *range(scored, count, size), count]
        chunks: list[TokenValues] = []
        for start, end in zip(edges, edges[1:]):
            part = slice(start, end)
            chunks.append(
                checkpoint(
                    self.chunk,
                    hidden[part],
                    batch.targets[part],
                    None if reference is None else reference[part],
                    kl,
                    score if start < scored else None,
                    use_reentrant=False,
                )
            )
        joined = {}
        for name in TokenValues._fields:
            values = [getattr(one, name) for one in chunks if getattr(one, name) is not None]
            joined[name] = torch.cat(values) if values else None
        return TokenValues(**joined)


def eager() -> torch.compiler.set_stance:
    """Context in which nothing is compiled."""
    return torch.compiler.set_stance("force_eager")


def logps_as_trained(policy: ResponseLogps, batch: Batch) -> Tensor:
    """(N,) log-probs for a comparison. Raises UserError if their code cannot be compiled."""
    # Compiling for a few short pairs takes longer than it is worth. But on CUDA, FlexAttention is
    # other code where it is not compiled, and what is compared should be what training runs.
    with nullcontext() if batch.input_ids.is_cuda else eager():
        try:
            return policy(batch).logps
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UserError(
                "FlexAttention, the head or the layers cannot be compiled on this machine "
                f"({first_line(error)}); install Triton and a C compiler, or add --compile off "
                "--packing off --prefix_sharing off"
            ) from None


@torch.no_grad()
def check_logps(
    policy: ResponseLogps,
    batch: Batch,
    plain: Batch,
    has_adapter: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Compare our log-probs of `batch` with the architecture's own forward and unmodified attention
    on the same pairs as a `plain` batch.

    How far two right computations are apart is measured, not assumed: the architecture's own
    forward is run with each of its attentions, which differ by rounding alone. has_adapter: the
    adapter has been trained before; then it is PEFT's own code that computes it there. dtype: of
    the computation, where the weights are in another one.

    Raises UserError if ours differ by more than that, or cannot be compiled.
    """
    causal, name = policy.causal[0], type(policy.causal[0]).__name__
    with lora.dropout(policy, active=False):
        ours = logps_as_trained(policy, batch)
    of_peft = lora.forward_of_peft(policy) if has_adapter else nullcontext()
    with lora.dropout(policy, active=False), eager(), of_peft:
        expected = policy(plain, own_attention="eager").logps
        rounding = 0.0
        # Where packed attention or sdpa was decided upon, its own sdpa is right too.
        has_sdpa = getattr(causal, "_supports_sdpa", False)
        if causal.config._attn_implementation != "eager" and has_sdpa:
            other = policy(plain, own_attention="sdpa").logps
            rounding = (other - expected).abs().mean().item()
    own = f"{name} and PEFT" if has_adapter else name
    difference = (ours - expected).abs().mean().item()
    tolerance = OWN_TOLERANCE[dtype or next(causal.parameters()).dtype] + 2 * rounding
    if not expected.isfinite().all():
        raise UserError(
            f"{name} gives non-finite log-probabilities in its own forward; check its weights and "
            "--dtype"
        )
    if not difference <= tolerance:
        remedy = "add --packing off --prefix_sharing off"
        if batch.input_ids.is_cuda:
            remedy = f"add --compile off; if that does not help, {remedy}"
        if batch.position_ids is None:
            remedy = "it computes something that this engine does not know; use another model"
        raise UserError(
            f"log-probabilities differ by {difference:.3g} nats per token from the own forward of "
            f"{own}, where rounding explains {tolerance:.2g}: {remedy}"
        )


def decoder_layers(policy: ResponseLogps) -> nn.ModuleList:
    """The model's decoder layers. Raises UserError if it has none."""
    layers = architecture.find_layers(policy.causal[0])
    if layers is None:
        raise UserError(
            f"{type(policy.causal[0]).__name__}: it has no list of layers; only decoder-only "
            "models are supported"
        )
    return layers


def trainable(policy: ResponseLogps) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}
