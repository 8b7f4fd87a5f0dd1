"""Reference log-probabilities: computed once per base model and tokenised pairs, kept next to
the data, shared by all runs.

`data/<name>/reference/<key>-{train,val}.safetensors` hold one fp32 log-prob (nats) per response
token. The key is a hash of all base weights, of the way they were loaded (quantisation, dtype), of
whether logits are in fp32 all the same, and of the token ids of both splits, and of nothing else:
runs of every loss, beta, tau, seed and LoRA setting read the same files.
"""

import contextlib
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
from pref.files.console import UserError, first_line
from pref.model import lora
from pref.model.chat import TokenPair
from pref.model.logps import ResponseLogps
from pref.model.packing import Packing, micro_batches, share_out
from pref.model.ranks import Ranks

# ---- what a step reads --------------------------------------------------------------------------


class Reference:
    """Reference log-probs of a list of pairs.

    tokens: (all response tokens,) fp32 CPU, pair after pair, chosen before rejected.
    sums: (pairs, 2) the same summed over each response's tokens; chosen, rejected.
    files: all files of the cache that it belongs to.
    """

    def __init__(self, pairs: list[TokenPair], tokens: Tensor, files: tuple[Path, ...] = ()):
        self.files = files
        self.starts = response_starts(pairs)
        assert len(tokens) == self.starts[-1], (len(tokens), self.starts[-1])
        self.tokens = tokens
        pieces = tokens.split(np.diff(self.starts).tolist())
        self.sums = torch.stack([piece.double().sum() for piece in pieces]).float().reshape(-1, 2)

    def of(self, members: list[int]) -> Tensor:
        """Log-probs of the pairs `members` (N,), in the order of a batch's response tokens."""
        return torch.cat(
            [self.tokens[self.starts[row] : self.starts[row + 1]] for row in batch_rows(members)]
        )


class Split(NamedTuple):
    """The pairs of train or val, in one order: rows as read, token ids, reference log-probs."""

    rows: list[dict]
    pairs: list[TokenPair]
    reference: Reference

    def part(self, members: list[int]) -> "Split":
        """The pairs `members` alone."""
        pairs = [self.pairs[i] for i in members]
        starts, tokens = self.reference.starts, self.reference.tokens
        pieces = [tokens[starts[2 * i] : starts[2 * i + 2]] for i in members]
        reference = Reference(pairs, torch.cat(pieces), self.reference.files)
        return Split([self.rows[i] for i in members], pairs, reference)


def response_starts(pairs: list[TokenPair]) -> np.ndarray:
    """Where each response starts among all response tokens, and where the last one ends:
    (2 * pairs + 1,).

    Two pairs with responses of 3 and 2, then 4 and 1 tokens: [0, 3, 5, 9, 10].
    """
    counts = [n for pair in pairs for n in (len(pair.chosen), len(pair.rejected))]
    return np.concatenate([[0], np.cumsum(counts)])


def batch_rows(members: list[int]) -> list[int]:
    """The responses of the pairs `members` in a batch's order (all chosen, then all rejected),
    numbered as in `response_starts`. Pairs 4 and 7: [8, 14, 9, 15].
    """
    return [2 * i for i in members] + [2 * i + 1 for i in members]


def response_lengths(pairs: list[TokenPair]) -> Tensor:
    """Response tokens of each pair: (pairs, 2); chosen, rejected."""
    return torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in pairs])


# ---- which file ---------------------------------------------------------------------------------


class BaseHashes(NamedTuple):
    """Which base model it is, in two ways."""

    model: str  # weights.identity: of all weights and the configuration, on disk
    loaded: str  # loading.fingerprint: of a sample as loaded, so of quantisation and dtype too


def reference_key(weights: str, pairs: list[TokenPair]) -> str:
    """Hash of the model that is the reference, `weights`, and of token ids."""
    return disk.sha256_json([weights, [[p.prompt, p.chosen, p.rejected] for p in pairs]])[:24]


def identity(
    base: BaseHashes,
    adapter: str | None,
    pairs: dict[str, list[TokenPair]],
    has_wide_logits: bool = False,
) -> dict:
    """What args.json records of base model and token ids, so that a run is only continued with the
    same ones. `base_sha256` and `reference` are as version 1.0.0 wrote them, whose runs have no
    `model_sha256`.

    adapter: hash of the adapter that is part of the reference, or None (`adapter_of`).
    has_wide_logits: as in ResponseLogps. A reference with other logits is another one.
    """
    model = base.loaded if adapter is None else disk.sha256_json([base.loaded, adapter])
    keys = {split: reference_key(model, pairs[split]) for split in pairs}
    logits = {"logits": "float32"} if has_wide_logits else {}
    return {"model_sha256": base.model, "base_sha256": base.loaded, "reference": keys} | logits


def adapter_of(record: dict) -> str | None:
    """The hash of --init_adapter if it is part of the reference (--reference start), else None."""
    is_part = record.get("reference_model", "start") == "start"
    return record.get("init_adapter_sha256") if is_part else None


def cache_files(data: Path, record: dict) -> dict[str, Path]:
    """The cache's files by split. record: from `identity`. All share one key, so that none of them
    can outlive a change of the other's pairs.
    """
    parts = [record["model_sha256"], record["reference"]]
    if adapter_of(record):  # the hash of its weights, which these two scale
        parts.append([record["lora_r"], record["lora_alpha"]])
    if record.get("logits"):
        parts.append(record["logits"])
    key = disk.sha256_json(parts)[:24]
    return {
        split: data / "reference" / f"{key}-{split}.safetensors" for split in record["reference"]
    }


# ---- the cache ----------------------------------------------------------------------------------


def sha256_tensor(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def read_cache(path: Path, count: int) -> Tensor | None:
    """The `count` cached log-probs, or None if there are none. A file that is there but cannot be
    used is never passed over in silence: another pass over all pairs costs hours on a large model.
    """
    try:
        disk.check_readable(path)
        with safe_open(path, framework="pt") as file:
            tokens, expected = file.get_tensor("logps"), (file.metadata() or {}).get("sha256")
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        problem = f"cannot be read ({first_line(error)})"
        if isinstance(error, PermissionError):
            problem = "cannot be read: its owner has not given you the permission (chmod a+r)"
    else:
        if tokens.shape == (count,) and expected == sha256_tensor(tokens):
            return tokens
        problem = "is damaged"
    print(f"warning: {path}: {problem}; the reference is computed again", flush=True)
    return None


def write_cache(path: Path, tokens: Tensor) -> None:
    """Write a temporary file, then rename it. A data folder that cannot be written costs time, not
    the run: a warning is printed.
    """
    temporary = path.with_name(f".{path.stem}.{time.time_ns()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"logps": tokens}, temporary, metadata={"sha256": sha256_tensor(tokens)})
        disk.as_umask_says(temporary)
        temporary.rename(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):  # half a file would fill the disk further
            temporary.unlink(missing_ok=True)
        print(
            f"warning: {path} not written ({error}); the next run will compute the reference again",
            flush=True,
        )


@torch.no_grad()
def compute(
    policy: ResponseLogps, pairs: list[TokenPair], packing: Packing, ranks: Ranks, what: str
) -> Tensor:
    """Per-token log-probs (all response tokens,) of `pairs` under the reference (`policy` with
    `lora.adapter_off`), computed by all ranks together. what: names the pairs in the progress bar.
    """
    shares = share_out(list(range(len(pairs))), pairs, packing, ranks.rank, ranks.world)
    batches = micro_batches(shares, pairs, packing, ranks.device, stand_ins=[0])
    rows, lengths = [], []
    # Read at the end, because reading waits for the device.
    computed = [torch.zeros(0, device=ranks.device)]
    with lora.adapter_off(policy), lora.dropout(policy, active=False):
        progress = ranks.progress(batches, f"reference log-probs, {what}", total=len(shares))
        for micro in progress:
            logps = policy(micro.batch)[0]
            if micro.counts:
                rows += batch_rows(micro.members)
                lengths += micro.batch.response_lengths
                computed.append(logps)

    starts = response_starts(pairs)
    tokens = torch.zeros(starts[-1])
    for row, piece in zip(rows, torch.cat(computed).cpu().split(lengths)):
        tokens[starts[row] : starts[row + 1]] = piece
    return ranks.sum(tokens.to(ranks.device)).cpu()  # each rank has zeros outside its share


def reference_logps(
    policy: ResponseLogps,
    pairs: list[TokenPair],
    packing: Packing,
    files: dict[str, Path],
    ranks: Ranks,
    what: str,
) -> Reference:
    """Reference log-probs of `pairs`, which are those of the split `what`, read from the cache's
    file, else computed and written there. Raises UserError if the base model gives non-finite
    log-probs.
    """
    path, names = files[what], tuple(files.values())
    cached = read_cache(path, int(response_starts(pairs)[-1]))
    readers = int(ranks.sum(torch.tensor(float(cached is not None), device=ranks.device)))
    if readers == ranks.world:  # of use only if every rank sees the file
        ranks.print(f"reference log-probs, {what}: read from {path}")
        return Reference(pairs, cached, names)
    if readers:
        ranks.print(
            f"warning: {path}: only {readers} of {ranks.world} ranks can read it; the reference is "
            "computed again"
        )
    tokens = compute(policy, pairs, packing, ranks, what)
    if not tokens.isfinite().all():
        raise UserError(
            f"the base model gives non-finite log-probabilities on the {what} pairs; "
            "check its weights and --dtype"
        )
    if ranks.main:
        write_cache(path, tokens)
    return Reference(pairs, tokens, names)
