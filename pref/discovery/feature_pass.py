"""Features of pairs, from one pass of the reference model over them: what proxy.py trains on.

A map h -> h + M h of the hidden states before the output head changes a response's log-probability,
to first order, by the inner product of M with

    d log p(y) / d M = sum over tokens t of  g_t h_t'        g_t = d log p(y_t) / d h_t    (H, H)

Both factors are in hand where log-probs are computed, so that no backward pass through the layers
is needed. M is confined to P' theta Q with fixed random P and Q (RANK, H), and the derivative for
theta is kept:

    phi = sum over t of  (P g_t) (Q h_t)'                    (RANK, RANK), flattened

The log-probs of the same pass are those of the reference, and are written to its cache too: runs on
these pairs find them there.
"""

import argparse
import gc
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pref.discovery import features
from pref.discovery.features import Part
from pref.files import console, disk
from pref.files.console import UserError
from pref.model import chat, loading, weights
from pref.model.chat import TokenPair
from pref.model.logps import ResponseLogps, check_logps
from pref.model.packing import Batch, Packing, make_batch, share_out
from pref.model.ranks import Ranks, pick_device
from pref.training import arguments, assembly, gates, reference, settings, tokenising
from pref.training.reference import BaseHashes
from pref.training.signals import Stopped

RANK = 32
PROJECTION = f"rank {RANK}, seed 0"  # part of the key: other features for another one


class Projections(NamedTuple):
    """P for the slopes of log-probs and Q for the hidden states, (RANK, H) each."""

    p: Tensor
    q: Tensor

    @classmethod
    def of_width(cls, hidden: int) -> "Projections":
        draw = torch.Generator().manual_seed(0)
        return cls(*(torch.randn(RANK, hidden, generator=draw) / hidden**0.5 for _ in "pq"))


class Prepared(NamedTuple):
    """What the pass needs: settings and pairs of the runs that the proxy stands for."""

    args: argparse.Namespace  # of train_pref.py, each `auto` resolved
    record: dict  # what their args.json would hold
    pairs: dict[str, list[TokenPair]]
    packing: Packing
    ranks: Ranks
    key: str  # hash of the weights, of how they are loaded and of the token ids


def compute(
    model: str,
    data: Path,
    train_args: list[str],
    folder: Path,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Path:
    """The features file, in `folder`, of the pairs in data/{train,val}.jsonl, as train_pref.py
    --model model --data data *train_args would see them. One that is there is not computed again.

    is_stopped: whether a signal has asked to stop, looked at between batches; what was computed is
    then lost. Raises Stopped, and UserError for arguments, pairs or a model that cannot be trained
    on, before any weight is loaded where that can be.
    """
    prepared = prepare(model, data, train_args)
    path = folder / f"{prepared.key}.safetensors"
    if path.exists():
        try:
            features.Features.load(path)
            return path
        except UserError as error:
            print(f"warning: {error}", flush=True)
    parts = run(prepared, is_stopped)
    metadata = {"key": prepared.key, "model": prepared.args.model, "projection": PROJECTION}
    metadata["data"] = disk.sha256_json(prepared.record["data_sha256"])
    features.write(path, parts, metadata)
    return path


def prepare(model: str, data: Path, train_args: list[str]) -> Prepared:
    """Everything up to the weights, as train_pref.py does it."""
    args = arguments.parse_args(["--model", model, "--data", str(data), "--loss", "dpo"])
    args = arguments.build_parser().parse_args(train_args, args)
    if args.init_adapter is not None:
        raise UserError(
            "--init_adapter: a search starts from the base model; leave it out, or give the model "
            "with the adapter merged into it"
        )
    ranks = Ranks(0, 1, pick_device(0))
    prepared = assembly.prepare(args, ranks)
    tokenizer = chat.load_tokenizer(prepared.args.model)
    _, pairs, _ = tokenising.tokenise(prepared.args, tokenizer, prepared.rows, ranks)
    longest = max(pair.longest for split in pairs.values() for pair in split)
    args = settings.for_attention(prepared.args, longest, ranks)
    identity = weights.identity(weights.find_model(args.model))
    tokens = {part: reference.reference_key(identity, pairs[part]) for part in pairs}
    key = disk.sha256_json([tokens, args.quant, args.dtype, PROJECTION])[:24]
    packing = settings.packing_of(args, tokenizer.pad_token_id)
    return Prepared(args, prepared.record, pairs, packing, ranks, key)


def run(prepared: Prepared, is_stopped: Callable[[], bool]) -> dict[str, Part]:
    """Load the model, make the pass over all pairs, and leave the memory as it was."""
    args, pairs, ranks = prepared.args, prepared.pairs, prepared.ranks
    base = loading.load_base(args.model, getattr(torch, args.dtype), args.quant, ranks.device)
    hashes = BaseHashes(weights.identity(weights.find_model(args.model)), loading.fingerprint(base))
    policy = ResponseLogps(base, settings.attention_of(args))
    has_wide_logits = policy.has_wide_logits(getattr(torch, args.dtype))
    record = prepared.record | reference.identity(hashes, None, pairs, has_wide_logits)
    caches = reference.cache_files(args.data, record)
    check_computed_right(policy, prepared)
    parts = {}
    for name in pairs:
        parts[name], tokens = part_of(policy, prepared, name, is_stopped)
        if not caches[name].exists():
            reference.write_cache(caches[name], tokens)
    del base, policy
    gc.collect()
    if ranks.device.type == "cuda":  # the runs to come need the memory
        torch.cuda.empty_cache()
    return parts


def check_computed_right(policy: ResponseLogps, prepared: Prepared) -> None:
    """Compare our log-probs of the shortest pairs with the architecture's own, as a run does."""
    probe, device = gates.probe_of(prepared.pairs["val"]), prepared.ranks.device
    plain = prepared.packing._replace(padded=True, shared=False)
    check_logps(
        policy, make_batch(probe, prepared.packing, device), make_batch(probe, plain, device)
    )


def part_of(
    policy: ResponseLogps, prepared: Prepared, name: str, is_stopped: Callable[[], bool]
) -> tuple[Part, Tensor]:
    """The pass over the pairs of the part `name`: their features, and the log-probs of all their
    response tokens as the reference's cache has them.
    """
    pairs, packing, device = prepared.pairs[name], prepared.packing, prepared.ranks.device
    starts = reference.response_starts(pairs)
    tokens = torch.zeros(starts[-1])
    phi = torch.zeros(2 * len(pairs), RANK * RANK)
    projections = None
    with console.Progress(f"features, {name}", "pairs", len(pairs)) as bar:
        for members in share_out(list(range(len(pairs))), pairs, packing):
            if is_stopped():
                raise Stopped
            batch = make_batch([pairs[i] for i in members], packing, device)
            logps, slopes, hidden = logps_and_slopes(policy, batch)
            if projections is None:
                projections = Projections.of_width(hidden.shape[1])
            rows = reference.batch_rows(members)
            phi[rows] = project(slopes, hidden, batch.lengths, projections).cpu()
            for row, piece in zip(rows, logps.cpu().split(batch.response_lengths)):
                tokens[starts[row] : starts[row + 1]] = piece
            bar.update(len(members))
    if not (tokens.isfinite().all() and phi.isfinite().all()):
        raise UserError(
            f"the base model gives non-finite log-probabilities on the {name} pairs; check its "
            "weights and --dtype"
        )
    sums = reference.Reference(pairs, tokens).sums
    lengths = torch.from_numpy(np.diff(starts)).float().reshape(-1, 2)
    return Part(*sums.unbind(1), *lengths.unbind(1), phi[0::2], phi[1::2]), tokens


def logps_and_slopes(policy: ResponseLogps, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Of the batch's response tokens: log-probs (N,), their derivatives g for the hidden states
    before the output head (N, H), and these hidden states (N, H).
    """
    with torch.no_grad():
        hidden = policy.hidden(batch)
    hidden.requires_grad_()
    logps = policy.from_hidden(hidden, batch).logps
    (slopes,) = torch.autograd.grad(logps.sum(), hidden)
    return logps.detach(), slopes, hidden.detach()


def project(slopes: Tensor, hidden: Tensor, lengths: Tensor, projections: Projections) -> Tensor:
    """phi (responses, RANK * RANK) of responses of `lengths` tokens, fp32.

    slopes, hidden: (N, H), response after response.
    """
    p, q = (matrix.to(slopes.device) for matrix in projections)
    left, right = slopes.float() @ p.T, hidden.float() @ q.T  # (N, RANK)
    sizes = lengths.tolist()
    products = [a.T @ b for a, b in zip(left.split(sizes), right.split(sizes))]
    return torch.stack(products).flatten(1)
