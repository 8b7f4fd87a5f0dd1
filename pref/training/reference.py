"""Reference log-probabilities: computed once per base model and tokenised pairs, kept beside the
data, shared by runs.

`data/<name>/reference/<key>.safetensors` holds one fp32 log-prob (nats) per response token. The key
is a hash of the base weights as loaded (so of quantisation and dtype too) and of the token ids, and
of nothing else: every loss, beta, tau, seed and LoRA setting reads the same file.
"""

import hashlib
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pref.files import disk
from pref.files.console import UserError
from pref.model import lora
from pref.model.chat import TokenPair
from pref.model.logps import ResponseLogps
from pref.model.packing import Packing, make_batch, share_out
from pref.model.ranks import Ranks


class Reference:
    """Per-token reference log-probs of a list of pairs, with their sums.

    tokens: (all response tokens,) fp32 CPU, pair after pair, chosen then rejected. sums: (pairs, 2)
    chosen, rejected.
    """

    def __init__(self, pairs: list[TokenPair], tokens: Tensor):
        self.starts = response_starts(pairs)
        assert len(tokens) == self.starts[-1], (len(tokens), self.starts[-1])
        self.tokens = tokens
        pieces = tokens.split(np.diff(self.starts).tolist())
        self.sums = torch.stack([piece.double().sum() for piece in pieces]).float().reshape(-1, 2)

    def of(self, members: list[int]) -> Tensor:
        """Reference log-probs in the order of a batch's response tokens: all chosen, then all
        rejected.
        """
        return torch.cat(
            [self.tokens[self.starts[row] : self.starts[row + 1]] for row in batch_rows(members)]
        )


def response_starts(pairs: list[TokenPair]) -> np.ndarray:
    """(2 * pairs + 1,) where each response starts among all response tokens."""
    counts = [n for pair in pairs for n in (len(pair.chosen), len(pair.rejected))]
    return np.concatenate([[0], np.cumsum(counts)])


def batch_rows(members: list[int]) -> list[int]:
    """Responses of pairs `members` in a batch's order, numbered as in `response_starts`."""
    return [2 * i for i in members] + [2 * i + 1 for i in members]


def reference_key(weights: str, pairs: list[TokenPair]) -> str:
    return disk.sha256_json([weights, [[p.prompt, p.chosen, p.rejected] for p in pairs]])[:24]


def sha256_tensor(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def read_cache(path: Path, count: int) -> Tensor | None:
    """The cached log-probs, or None if the file is missing, torn or not what its header says."""
    try:
        with safe_open(path, framework="pt") as file:
            tokens, stated = file.get_tensor("logps"), (file.metadata() or {}).get("sha256")
    except (FileNotFoundError, SafetensorError):
        return None
    return tokens if tokens.shape == (count,) and stated == sha256_tensor(tokens) else None


def write_cache(path: Path, tokens: Tensor) -> None:
    """Write beside, then rename. A data folder that cannot be written costs time, not the run: said
    and passed over.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}.{time.time_ns()}.tmp")
        save_file({"logps": tokens}, temporary, metadata={"sha256": sha256_tensor(tokens)})
        temporary.rename(path)
    except (OSError, SafetensorError) as error:
        print(
            f"warning: {path} not written ({error}); the next run computes the reference again",
            flush=True,
        )


@torch.no_grad()
def compute(
    policy: ResponseLogps, pairs: list[TokenPair], packing: Packing, ranks: Ranks, what: str
) -> Tensor:
    """Per-token log-probs (all response tokens,) of `pairs` with the adapter off, computed by all
    ranks together.
    """
    starts = response_starts(pairs)
    tokens = torch.zeros(starts[-1])
    batches = share_out(list(range(len(pairs))), pairs, packing, ranks.rank, ranks.world)
    with lora.adapter_off(policy), lora.dropout(policy, active=False):
        for members in ranks.progress(batches, f"reference log-probs, {what}"):
            batch = make_batch([pairs[i] for i in members or [0]], packing, ranks.device)
            logps = policy(batch)[0].cpu()
            if members:
                for row, piece in zip(batch_rows(members), logps.split(batch.lengths.tolist())):
                    tokens[starts[row] : starts[row + 1]] = piece
    return ranks.sum(tokens.to(ranks.device)).cpu()


def reference_logps(
    policy: ResponseLogps,
    pairs: list[TokenPair],
    packing: Packing,
    weights: str,
    folder: Path,
    ranks: Ranks,
    what: str,
) -> Reference:
    """Reference log-probs of `pairs` from the cache in `folder`, else computed and cached.

    weights: modeling.fingerprint of the base. Raises UserError if the base gives non-finite
    log-probs.
    """
    path = folder / f"{reference_key(weights, pairs)}.safetensors"
    cached = read_cache(path, int(response_starts(pairs)[-1]))
    if (
        ranks.sum(torch.tensor(float(cached is not None), device=ranks.device)).item()
        == ranks.world
    ):
        ranks.print(f"reference log-probs, {what}: read from {path}")
        return Reference(pairs, cached)
    tokens = compute(policy, pairs, packing, ranks, what)
    if not tokens.isfinite().all():
        raise UserError(
            f"the base model gives non-finite log-probabilities on the {what} pairs; check its weights and --dtype"
        )
    if ranks.main:
        write_cache(path, tokens)
    return Reference(pairs, tokens)


class Split(NamedTuple):
    """Pairs of train or val: rows as read, token ids, reference log-probs; all in one order."""

    rows: list[dict]
    pairs: list[TokenPair]
    reference: Reference


def response_lengths(pairs: list[TokenPair]) -> Tensor:
    """(pairs, 2) response tokens, chosen and rejected."""
    return torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in pairs])
