"""Train a LoRA adapter on preference pairs with one of the losses in losses.py.

    python train_pref.py --data data/dpo-mix-7k --loss dpo --beta 0.1
    torchrun --nproc_per_node 8 train_pref.py --loss td_dpo --beta 2.5 --tau 2

Reads  data/<name>/{train,val}.jsonl (prep_data.py) and a chat model (hub id or folder).
Writes results/<run_id>/{args.json, metrics.jsonl, val_pairs.jsonl, adapter/, summary.json}
and    data/<name>/reference/<key>.safetensors, the reference log-probs that every run on this data
and base shares.

The same command continues a run that was stopped, from results/<run_id>/checkpoint/, with the
result of one that was not. SIGTERM and SIGUSR1 save and leave with exit code 75; train_pref.py
--status results/ says where runs stand.

The defaults are the first study's: Llama-2-7b-chat in 4 bit, LoRA r 64, AdamW at 1e-5, 128 pairs a
step, 3 epochs.
"""

import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from losses import COUPLES_BATCH, SFT_TERM, PairLogps, chosen_score, k2, reduced
from pref.files import console, disk, run_folders
from pref.files.console import UserError
from pref.files.pairs import read_pairs
from pref.model import attention, chat, loading, sharding, token_scores
from pref.model.chat import TokenPair
from pref.model.logps import ResponseLogps, check_logps, sum_by_row, trainable
from pref.model.lora import add_lora, dropout
from pref.model.packing import Batch, Packing, make_batch, share_out
from pref.model.ranks import Ranks, close_ranks, init_ranks
from pref.training import arguments, checkpoint, loss_options, plan, run_folder, run_id, schedule
from pref.training.checkpoint import Checkpoints, Progress
from pref.training.plan import Memory
from pref.training.reference import Split, reference_key, reference_logps, response_lengths
from pref.training.run_folder import Log
from pref.training.signals import Stop, Stopped

# Mean |policy - reference| per response token (nats) at step 0, where the adapter is the identity.
# Not zero, because a pair meets other padding in the two passes, and matmuls round differently
# then. The mean, because in bf16 a single short response can be off by 0.1; a stale reference or
# other weights move all of them.
STEP0_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
METRICS = (
    "loss",
    "preference",
    "anchor",
    "anchor_k1",
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "margin/rho",
    "margin/delta",
    "score",
)


class LearnedMix:
    """dlrml's beta_mix where it is learned, with its own optimiser."""

    def __init__(self, args: argparse.Namespace, parameters: dict, device: torch.device):
        self.log_beta_mix = (
            None  # its logarithm is what is trained, so that beta_mix stays positive
        )
        self.optimizer = None
        if args.learn_beta_mix:
            start = torch.tensor(math.log(parameters["beta_mix"]), device=device)
            self.log_beta_mix = torch.nn.Parameter(start)
            self.optimizer = torch.optim.AdamW(
                [self.log_beta_mix], lr=args.beta_mix_lr, weight_decay=0.0
            )

    @property
    def beta_mix(self) -> float | None:
        return None if self.log_beta_mix is None else self.log_beta_mix.exp().item()

    def take_step(self) -> None:
        if self.optimizer:
            self.optimizer.step()

    def zero_grad(self) -> None:
        if self.optimizer:
            self.optimizer.zero_grad()


class Study(NamedTuple):
    """What every step and evaluation of a run needs."""

    args: argparse.Namespace
    ranks: Ranks
    policy: ResponseLogps
    packing: Packing
    parameters: dict
    learned: LearnedMix
    progress: Progress
    stop: Stop

    @property
    def token_kl(self) -> str | None:
        """The token-level estimator that the loss reads from its input, if any."""
        kl = self.parameters.get("kl")
        return kl if kl in ("k3", *token_scores.FULL_KL) else None

    @property
    def token_score(self) -> dict | None:
        """Arguments of losses.token_score, or None where score_c follows from the log-probs or is
        not in the loss.
        """
        terms = {key: self.parameters[key] for key in SFT_TERM if key != "sft_coef"}
        plain = all(
            terms[key] == SFT_TERM[key] for key in ("score", "score_smoothing", "score_masked_log")
        )
        return None if plain or not arguments.uses_score(self.args.loss, self.parameters) else terms

    def loss(self, inputs: PairLogps) -> tuple[Tensor, dict]:
        """Losses (B,) and terms of the run's loss with its parameters, the learned one among
        them.
        """
        mix = (
            {}
            if self.learned.log_beta_mix is None
            else {"beta_mix": self.learned.log_beta_mix.exp()}
        )
        inputs = inputs._replace(running_rho=self.progress.running_rho)
        return loss_options.bind(self.args.loss, self.parameters | mix)(inputs)

    def pair_logps(self, split: Split, members: list[int]) -> tuple[PairLogps, Batch]:
        """Forward pairs `members` of `split`: what a loss may read, (len(members),) each."""
        kl = self.token_kl
        batch = make_batch([split.pairs[i] for i in members], self.packing, self.ranks.device)
        logps, divergence, scores = self.policy(batch, kl, self.token_score)
        if kl == "k3":
            divergence = token_scores.token_k3(logps - split.reference.of(members).to(logps.device))
        sums = sum_by_row(logps, batch).chunk(2)
        refs = split.reference.sums[members].to(logps.device).unbind(1)
        kls = sum_by_row(divergence, batch).chunk(2) if kl else (None, None)
        score = None if scores is None else sum_by_row(scores, batch)[: len(members)]
        return PairLogps(*sums, *refs, *batch.lengths.float().chunk(2), *kls, score), batch

    def metric_rows(self, inputs: PairLogps) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (B,), and by name METRICS of each pair and `terms/*`, whatever else the loss logs;
        (B,) each.

        Log-probs, rewards and margins are sums over tokens, as in TRL (rewards of a loss without
        beta are NaN); `anchor` is the loss's own where it has one, else k2, and `score` is score_c:
        neither need be in the loss.
        """
        values, terms = self.loss(inputs)
        (a, b), rho, beta = inputs.log_ratios, inputs.rho, self.parameters.get("beta", math.nan)
        anchor = (
            terms["anchor"]
            if "anchor" in terms
            else k2(reduced(inputs, self.parameters.get("logp", "sum")))
        )
        rows = (
            values,
            terms.get("preference", values),
            anchor,
            a + b,
            inputs.chosen,
            inputs.rejected,
            beta * a,
            beta * b,
            beta * rho,
            ranked_right(rho),
            rho,
            inputs.delta,
            chosen_score(inputs),
        )
        named = dict(zip(METRICS, rows))
        named |= {f"terms/{key}": term for key, term in terms.items() if key not in METRICS}
        return values, {name: row.detach().double() for name, row in named.items()}


def ranked_right(margin: Tensor) -> Tensor:
    """1 where the margin is above 0, 1/2 for a tie (every LoRA starts with rho = 0 on all pairs),
    else 0.
    """
    return (margin > 0).double() + 0.5 * (margin == 0).double()


def train_step(study: Study, split: Split, members: list[int]) -> tuple[dict, int, float]:
    """Gradients of one optimiser step: the loss summed over its pairs, divided by their number, so
    that ranks and micro-batches do not change it. Returns METRICS' means over the step's pairs,
    tokens, and the gradient norm.
    """
    args, ranks, policy = study.args, study.ranks, study.policy
    weight = ranks.world / len(members)  # times world: FSDP averages gradients over ranks
    totals = 0.0
    micro_batches = share_out(members, split.pairs, study.packing, ranks.rank, ranks.world)
    for number, micro in enumerate(micro_batches, 1):
        study.stop.check()
        policy.set_requires_gradient_sync(number == len(micro_batches))
        inputs, batch = study.pair_logps(
            split, micro or members[:2]
        )  # an empty share runs along with weight 0
        values, rows = study.metric_rows(inputs)
        (values.sum() * (weight if micro else 0.0)).backward()
        sums = torch.stack(
            [*(row.sum() for row in rows.values()), values.new_tensor(float(batch.tokens)).double()]
        )
        totals = totals + (sums if micro else torch.zeros_like(sums))
    if study.learned.log_beta_mix is not None:
        study.learned.log_beta_mix.grad = ranks.sum(study.learned.log_beta_mix.grad) / ranks.world
    # Metrics and gradient norm: one collective, one wait of the host for the device.
    grads = [sharding.local(p.grad) for p in trainable(policy).values() if p.grad is not None]
    square = torch.stack(torch._foreach_norm(grads)).double().square().sum()
    reduced = ranks.sum(torch.cat([totals, square[None]]))
    clip = (args.max_grad_norm / (reduced[-1].sqrt() + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, clip.to(grads[0].dtype))
    *sums, tokens, square = reduced.tolist()
    return (
        {name: total / len(members) for name, total in zip(rows, sums)},
        int(tokens),
        math.sqrt(square),
    )


@torch.no_grad()
def evaluate(study: Study, split: Split) -> tuple[dict, Tensor]:
    """Metrics over all pairs of `split`, and (pairs, 2) the policy's log-probs (sums; chosen,
    rejected).
    """
    ranks = study.ranks
    table = torch.zeros(len(split.pairs), 5, device=ranks.device)
    batches = share_out(
        list(range(len(split.pairs))), split.pairs, study.packing, ranks.rank, ranks.world
    )
    with dropout(study.policy, active=False):
        for members in ranks.progress(batches, "evaluating"):
            study.stop.check()
            inputs, _ = study.pair_logps(split, members or [0])
            if members:
                columns = (
                    inputs.chosen,
                    inputs.rejected,
                    inputs.kl_chosen,
                    inputs.kl_rejected,
                    inputs.score_chosen,
                )
                for column, values in enumerate(columns):
                    if values is not None:
                        table[members, column] = values
    study.policy.reshard()
    table = ranks.sum(table).cpu()
    counts = response_lengths(split.pairs).float().unbind(1)
    kls = table[:, 2:4].unbind(1) if study.token_kl else (None, None)
    score = table[:, 4] if study.token_score else None
    inputs = PairLogps(
        table[:, 0], table[:, 1], *split.reference.sums.unbind(1), *counts, *kls, score
    )
    rows = study.metric_rows(inputs)[1]
    accuracies = {"acc_ref": inputs.rho, "acc_sum": inputs.delta, "acc_mean": inputs.mean().delta}
    metrics = {f"eval/{name}": row.mean().item() for name, row in rows.items()}
    return metrics | {
        f"eval/{k}": ranked_right(m).mean().item() for k, m in accuracies.items()
    }, table[:, :2]


def check_step0(logps: Tensor, split: Split, dtype: torch.dtype) -> float:
    """Mean |policy - reference| per token before training (nats). Raises UserError above
    STEP0_TOLERANCE.
    """
    difference = (
        ((logps - split.reference.sums).abs() / response_lengths(split.pairs)).mean().item()
    )
    if not difference <= STEP0_TOLERANCE[dtype]:
        raise UserError(
            f"before training the policy differs from its reference by {difference:.3g} nats a token (tolerance "
            f"{STEP0_TOLERANCE[dtype]} in {dtype}): a stale file in the data folder's reference/ (delete it), or "
            "weights that change between two forwards"
        )
    return difference


def check_gradients(policy: ResponseLogps, ranks: Ranks) -> None:
    """Raise UserError if some LoRA matrix B got no gradient in the first step: it would never be
    trained.
    """
    grads = {name: p.grad for name, p in trainable(policy).items() if "lora_B" in name}
    sums = [0.0 if g is None else sharding.local(g).abs().sum().item() for g in grads.values()]
    totals = ranks.sum(torch.tensor(sums, device=ranks.device)).tolist()
    if dead := [name for name, total in zip(grads, totals) if total == 0]:
        raise UserError(
            f"{len(dead)} of {len(grads)} LoRA matrices B got a zero gradient in the first step ({dead[0]} first): the "
            "loss is saturated on every pair (try a smaller beta or a larger tau), or 4-bit weights were repacked"
        )


def prepare(args: argparse.Namespace, ranks: Ranks) -> tuple[dict, dict[str, list[dict]], dict]:
    """Check all that can be checked without weights. Returns the loss's parameters, rows by split,
    and what args.json will say. Raises UserError.
    """
    arguments.check_args(args, ranks.world)
    arguments.take_init_adapter(args)
    parameters = arguments.loss_parameters(args)
    own_loss = arguments.check_own_loss(args, parameters)
    if not args.data.is_dir():
        raise UserError(
            f"--data {args.data}: no such folder; make it with prep_data.py --dataset ..."
        )
    trial = args.mode == "trial"
    limits = {"train": schedule.TRIAL_STEPS * args.global_batch, "val": schedule.TRIAL_VAL_PAIRS}
    rows = {
        split: read_pairs(args.data / f"{split}.jsonl", limits[split] if trial else None)
        for split in limits
    }
    arguments.check_micro_batches(
        args, {split: len(r) for split, r in rows.items()}, ranks.world, ranks.main
    )
    args.run_id = run_folders.check_run_id(
        args.run_id or run_id.run_id_of(args, parameters, arguments.parse_args([]))
    )
    if args.quant == "auto":
        args.quant = "nf4" if ranks.device.type == "cuda" and args.shard == "adapters" else "none"
    args.dtype = str(loading.pick_dtype(args.dtype, ranks.device)).removeprefix("torch.")
    given = {key: value for key, value in vars(args).items() if key not in arguments.NOT_RECORDED}
    record = {
        **{key: str(value) if isinstance(value, Path) else value for key, value in given.items()},
        **parameters,
        **own_loss,
        "data_sha256": {split: disk.sha256_file(args.data / f"{split}.jsonl") for split in limits},
        "world_size": ranks.world,
        "couples_batch": args.loss in COUPLES_BATCH,
        "versions": disk.versions(),
    }
    return parameters, rows, record


def packing_of(args: argparse.Namespace, pad_id: int, longest: int, ranks: Ranks) -> Packing:
    """How pairs become micro-batches: by a budget of tokens, or by number where the loss reads a
    micro-batch's own statistics or packing is off. An ordinary padded batch for attention that
    packing does not know.
    """
    if "on" in (args.packing, args.prefix_sharing) and (
        reason := attention.needs_own_attention(args.model, longest)
    ):
        ranks.print(f"--packing off --prefix_sharing off: {reason}")
        args.packing = args.prefix_sharing = "off"
    by_number = args.packing == "off" or args.loss in COUPLES_BATCH
    budget = (
        0 if by_number else args.tokens_per_microbatch or args.per_device_batch * args.max_length
    )
    return Packing(
        pad_id, args.per_device_batch, budget, args.packing == "off", args.prefix_sharing == "on"
    )


def tokenise(
    args, tokenizer, rows: dict[str, list[dict]], ranks: Ranks
) -> tuple[dict[str, list[TokenPair]], dict]:
    """Token ids by split, and counts of what was cut: said here and kept in args.json, truncation
    is never silent.
    """
    bar = partial(ranks.progress, what="tokenising", unit="pair")
    pairs = {
        split: chat.tokenize_pairs(tokenizer, r, args.max_length, args.truncation, bar)
        for split, r in rows.items()
    }
    both = [pair for split in pairs.values() for pair in split]
    counts = {
        "truncated_prompts": sum(p.cut_prompt > 0 for p in both),
        "truncated_responses": sum(p.cut_response > 0 for p in both),
        "merged_boundaries": sum(p.merged > 0 for p in both),
    }
    words = ", ".join(f"{key.replace('_', ' ')} {count}" for key, count in counts.items())
    per_pair = sum(p.tokens for p in both) / len(both)
    ranks.print(
        f"{len(pairs['train'])} train and {len(pairs['val'])} val pairs, {per_pair:.0f} tokens each; {words}"
    )
    return pairs, counts


def build_policy(args: argparse.Namespace, ranks: Ranks) -> tuple[ResponseLogps, str]:
    """The base model with its adapter, sharded over ranks, and the fingerprint of the base's
    weights.
    """
    dtype, device = getattr(torch, args.dtype), ranks.device
    if (
        args.shard == "full" and ranks.world > 1
    ):  # rank 0 loads into RAM; the others get their shards from it
        device = torch.device("cpu" if ranks.main else "meta")
    base = loading.load_base(args.model, dtype, args.quant, device)
    weights = ranks.from_main(loading.fingerprint(base) if ranks.main else None)
    lora = (
        args.lora_r,
        args.lora_alpha,
        args.lora_dropout,
        args.lora_targets,
        args.seed,
        args.init_adapter,
    )
    policy = ResponseLogps(add_lora(base, *lora).train())
    policy.prepare_layers(args.compile == "on", args.checkpointing == "on")
    sharding.shard(policy, args.shard, dtype, ranks)
    return policy, weights


def plan_run(
    args: argparse.Namespace, pairs: list[TokenPair], packing: Packing, ranks: Ranks
) -> Memory:
    """Settle what is left to `auto`, and say what the run will need."""
    steps = schedule.number_of_steps(args, len(pairs))
    members = [
        schedule.pairs_of_step(step, len(pairs), args.global_batch, args.seed)
        for step in range(steps)
    ]
    load = plan.load_of(pairs, members, packing, ranks.world, ranks.device.type == "cuda")
    memory = plan.decide(args, load, ranks)
    if args.dry_run is not None:
        how = f"{ranks.device.type}, {args.dtype}, " + ", ".join(
            f"{key} {getattr(args, key)}" for key in ("quant", "shard", "checkpointing", "compile")
        )
        evaluations = [
            0,
            *(
                step
                for step in range(1, steps + 1)
                if schedule.is_evaluated(step, steps, len(pairs), args)
            ),
        ]
        plan.describe(
            load,
            memory,
            steps,
            schedule.warmup_steps(steps, args),
            evaluations,
            ranks.world,
            how,
            ranks.print,
        )
    return memory


def train(args: argparse.Namespace, ranks: Ranks, stop: Stop, command: str) -> int:
    """One run, from its arguments to its summary. Returns the exit code."""
    parameters, rows, record = prepare(args, ranks)
    folder = args.results_dir / args.run_id
    if args.dry_run is None:
        run_folder.check_same_run(folder, record)
        if ranks.from_main(run_folder.is_finished(folder)):
            ranks.print(f"{folder}: finished already; remove the folder to train it again")
            return 0
    tokenizer = chat.load_tokenizer(args.model)
    pairs, counts = tokenise(args, tokenizer, rows, ranks)
    longest = max(pair.longest for split in pairs.values() for pair in split)
    packing = packing_of(args, tokenizer.pad_token_id, longest, ranks)
    run_folder.keep_settled(args, folder)
    memory = plan_run(args, pairs["train"], packing, ranks)
    if args.dry_run is not None:
        return 0
    with checkpoint.run_lock(folder, ranks):
        if ranks.from_main(
            run_folder.is_finished(folder)
        ):  # by the process that held the lock until now
            return 0
        policy, weights = build_policy(args, ranks)
        reference = (
            weights
            if args.init_adapter is None
            else disk.sha256_json([weights, args.init_adapter_sha256])
        )
        keys = {name: reference_key(reference, pairs[name]) for name in pairs}
        record |= {"base_sha256": weights, "reference": keys}
        run_folder.check_same_run(folder, record)
        record |= (
            counts
            | {key: getattr(args, key) for key in run_folder.SETTLED}
            | {
                "planned_steps": schedule.number_of_steps(args, len(pairs["train"])),
                "planned_gib": memory.total,
                "command": command,
            }
        )
        splits = load_splits(args, ranks, policy, packing, reference, rows, pairs)
        learned = LearnedMix(args, parameters, ranks.device)
        optimizer = torch.optim.AdamW(
            trainable(policy).values(), lr=args.learning_rate, weight_decay=args.weight_decay
        )
        trained = {name: (parameter, optimizer) for name, parameter in trainable(policy).items()}
        if learned.optimizer:
            trained["log_beta_mix"] = (learned.log_beta_mix, learned.optimizer)
        checkpoints = Checkpoints(folder, trained, ranks)
        progress = checkpoints.restore() or Progress()
        if ranks.main:
            run_folder.open_folder(folder, record, progress, args)
        study = Study(args, ranks, policy, packing, parameters, learned, progress, stop)
        ranks.print(
            f"run {args.run_id}: {args.loss} {parameters}, {ranks.world} rank(s) on {ranks.device.type}, "
            f"{args.dtype}, quant {args.quant}"
            + (f"; going on after step {progress.step}" if progress.step else "")
        )
        if not run(study, optimizer, checkpoints, splits["train"], splits["val"], folder):
            ranks.print(
                f"{args.run_id}: saved after step {progress.step}; the same command continues:\n  {command}"
            )
            return stop.exit_code
        summary = summarise(study)
        if ranks.main:
            run_folder.publish(
                folder, checkpoint.best_folder(checkpoints.folder, progress.best_step), summary
            )
    ranks.print(
        f"{summary['status']} after {summary['steps']} steps and {summary['wall_s']:.0f} s: acc_ref "
        f"{summary['best_acc_ref']} at step {summary['best_step']} (best), {summary['final_acc_ref']} (final)\n"
        f"results: {folder}\nnext: python gen_mtbench.py {args.results_dir}"
    )
    return 0


def load_splits(
    args: argparse.Namespace,
    ranks: Ranks,
    policy: ResponseLogps,
    packing: Packing,
    reference: str,
    rows: dict[str, list[dict]],
    pairs: dict[str, list[TokenPair]],
) -> dict[str, Split]:
    """Pairs with the log-probs of the reference of that hash, after a look whether log-probs can be
    trusted here.
    """
    probe = min(pairs["val"], key=lambda pair: pair.tokens)
    plain = packing._replace(padded=True, shared=False)
    tolerance = STEP0_TOLERANCE[getattr(torch, args.dtype)]
    check_logps(
        policy, *(make_batch([probe], way, ranks.device) for way in (packing, plain)), tolerance
    )
    cache = args.data / "reference"
    references = {
        n: reference_logps(policy, p, packing, reference, cache, ranks, n) for n, p in pairs.items()
    }
    # A forward without a backward leaves the root's parameters whole: not those that are trained
    policy.reshard()
    return {name: Split(rows[name], pairs[name], references[name]) for name in pairs}


def run(
    study: Study,
    optimizer: torch.optim.Optimizer,
    checkpoints: Checkpoints,
    split: Split,
    val: Split,
    folder: Path,
) -> bool:
    """Optimiser steps and evaluations from the last checkpoint on; `study.progress` moves. False if
    a signal stopped it, with everything saved.
    """
    args, ranks, progress = study.args, study.ranks, study.progress
    steps, per_epoch = (
        schedule.number_of_steps(args, len(split.pairs)),
        schedule.steps_per_epoch(len(split.pairs), args.global_batch),
    )
    wandb = run_folder.open_wandb(folder) if args.report_to == "wandb" and ranks.main else None
    log = Log(folder / "metrics.jsonl", ranks, progress.metrics_bytes, wandb)
    first, begun, before = progress.step, time.monotonic(), progress.wall_s
    saved = progress.step

    def save() -> None:
        now = time.monotonic()
        progress.metrics_bytes, progress.wall_s = log.size(), before + now - begun
        checkpoints.save(progress)
        progress.save_s += time.monotonic() - now

    study.stop.deferred = True
    try:
        while progress.in_a_row < args.max_nonfinite:
            epoch = progress.step / per_epoch
            if progress.evaluated < progress.step and schedule.is_evaluated(
                progress.step, steps, len(split.pairs), args
            ):
                keep_evaluation(study, val, folder, checkpoints, log, epoch)
            if progress.step == steps:
                break
            if progress.step % args.save_steps == 0 and progress.step > saved:
                save()
                saved = progress.step
            line = take_step(study, optimizer, split, steps)
            log.line({"step": progress.step, "epoch": progress.step / per_epoch, **line})
            left = (time.monotonic() - begun) / (progress.step - first) * (steps - progress.step)
            ranks.print(
                run_folder.step_text(
                    progress.step, line, steps, left, finite=progress.in_a_row == 0
                )
            )
    except Stopped:
        save()
        return False
    progress.wall_s = before + time.monotonic() - begun
    return True


def take_step(study: Study, optimizer: torch.optim.Optimizer, split: Split, steps: int) -> dict:
    """One optimiser step, or, if its loss or gradient is not finite, none, which is counted.
    Returns the metrics.
    """
    args, ranks, progress, learned = study.args, study.ranks, study.progress, study.learned
    begun, lr = time.monotonic(), schedule.learning_rate_at(progress.step, steps, args)
    schedule.seed_dropout(args.seed, progress.step + 1, ranks.rank)
    members = schedule.pairs_of_step(progress.step, len(split.pairs), args.global_batch, args.seed)
    means, tokens, grad_norm = train_step(study, split, members)
    finite = math.isfinite(means["loss"]) and math.isfinite(grad_norm)  # the same on every rank
    if finite:
        if progress.step == 0:
            check_gradients(study.policy, ranks)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        learned.take_step()
        progress.running_rho = 0.9 * progress.running_rho + 0.1 * means["margin/rho"]
    optimizer.zero_grad()
    learned.zero_grad()
    progress.step += 1
    progress.tokens += tokens
    progress.nonfinite += not finite
    progress.in_a_row = 0 if finite else progress.in_a_row + 1
    rate = tokens / (time.monotonic() - begun)
    line = {
        **means,
        "grad_norm": grad_norm,
        "lr": lr,
        "tokens": tokens,
        "tok_per_s": rate,
        "peak_gib": run_folder.peak_gib(ranks.device),
        "nonfinite": progress.nonfinite,
    }
    return line if learned.beta_mix is None else line | {"beta_mix": learned.beta_mix}


def keep_evaluation(
    study: Study, val: Split, folder: Path, checkpoints: Checkpoints, log: Log, epoch: float
) -> None:
    """Evaluate, log it, and keep the adapter if it is the best by acc_ref so far; a tie keeps the
    earlier step.
    """
    args, ranks, progress = study.args, study.ranks, study.progress
    final, logps = evaluate(study, val)
    log.line({"step": progress.step, "epoch": epoch, **final})
    rows, accuracy = run_folder.pair_rows(val, progress.step, logps), final["eval/acc_ref"]
    if progress.step == 0:
        progress.step0_difference = check_step0(logps, val, getattr(torch, args.dtype))
        if ranks.main:
            with checkpoint.saving(folder):
                disk.write_jsonl(folder / "val_pairs.jsonl", rows)
    else:
        ranks.print(
            "  "
            + "  ".join(
                f"{k} {final[k]:.4f}" for k in ("eval/loss", "eval/acc_ref", "eval/margin/rho")
            )
        )
        if progress.best_acc_ref is None or accuracy > progress.best_acc_ref:
            progress.best_acc_ref, progress.best_step = accuracy, progress.step
            best = checkpoint.best_folder(checkpoints.folder, progress.step)
            run_folder.save_best(study.policy, rows, best, ranks)
            if ranks.main:
                progress.best_sha256 = disk.sha256_file(
                    best / "adapter" / "adapter_model.safetensors"
                )
    progress.final, progress.evaluated = final, progress.step


def summarise(study: Study) -> dict:
    """summary.json's content."""
    progress, diverged = study.progress, study.progress.in_a_row >= study.args.max_nonfinite
    return {
        "status": "diverged" if diverged else "finished",
        "steps": progress.step,
        "best_acc_ref": progress.best_acc_ref,
        "best_step": progress.best_step,
        **{
            f"final_{key}": progress.final[f"eval/{key}"]
            for key in ("acc_ref", "acc_sum", "acc_mean")
        },
        "nonfinite_steps": progress.nonfinite,
        "step0_difference": progress.step0_difference,
        "wall_s": progress.wall_s,
        "save_s": progress.save_s,
        "tokens": progress.tokens,
        "peak_gib": run_folder.peak_gib(study.ranks.device),
        "beta_mix": study.learned.beta_mix,
    }


def main(argv: list[str] | None = None) -> int:
    args = arguments.parse_args(argv)
    if args.status:
        return run_folder.print_status(args.status)
    ranks = init_ranks()
    command = run_folder.start_command(sys.argv[1:] if argv is None else argv, ranks)
    if args.dry_run:
        ranks = ranks._replace(world=args.dry_run)
    with Stop(ranks) as stop:
        code = train(args, ranks, stop, command)
    # Not after an error: the other ranks may stand in a collective that this one will never join
    close_ranks()
    return code


if __name__ == "__main__":
    console.run_main(main)
