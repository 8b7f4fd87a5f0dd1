"""Train a LoRA adapter, or all parameters of a model, on preference pairs with one of the losses in
losses.py.

    python train_pref.py --data data/dpo-mix-7k --loss dpo --beta 0.1
    torchrun --nproc_per_node 8 train_pref.py --loss td_dpo --beta 2.5 --tau 2

Reads  data/<name>/{train,val}.jsonl (prep_data.py) and a chat model (hub id or folder).
Writes results/<run_id>/{args.json, metrics.jsonl, val_pairs.jsonl, adapter/, summary.json}, with
       model/ in place of adapter/ where all parameters are trained,
and    data/<name>/reference/<key>.safetensors, reference log-probs shared by all runs on the same
       data and base model.

The same command continues a run that was stopped, from results/<run_id>/checkpoint/, and gives the
result of a run that was never stopped. Ctrl-C saves and exits with code 130, SIGTERM
and SIGUSR1 with 75; train_pref.py --status results/ shows the state of every run.

The defaults are those of the first study: Llama-2-7b-chat in 4 bit, LoRA r 64, AdamW at 1e-5, 128
pairs per step, 3 epochs.
"""

import pref.files.interrupts  # noqa: F401  isort: skip
import pref.files.allocator  # noqa: F401  isort: skip

import argparse
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from losses import SFT_TERM, PairLogps, chosen_score, k2, reduced
from pref.files import console, output
from pref.model import architecture, chat, sharding, template, token_scores
from pref.model.logps import ResponseLogps, sum_by_row, trainable
from pref.model.lora import dropout
from pref.model.packing import MicroBatch, Packing, micro_batches, share_out, to_device
from pref.model.ranks import Ranks, close_ranks, ended_by_lost_ranks, init_ranks
from pref.training import (
    arguments,
    assembly,
    checkpoint,
    cpu_memory,
    disk_room,
    gates,
    hardware,
    loss_options,
    optimisers,
    plan,
    reference,
    run_folder,
    schedule,
    settings,
    tokenising,
)
from pref.training.checkpoint import Checkpoints, Progress
from pref.training.learned_mix import LearnedMix
from pref.training.peak_memory import peak_gib
from pref.training.reference import Split, response_lengths
from pref.training.run_folder import Log
from pref.training.sharded_checkpoint import ShardedCheckpoints
from pref.training.signals import Stop, Stopped

# ---- the loss of some pairs ---------------------------------------------------------------------


class Study(NamedTuple):
    """What every step and every evaluation of a run needs."""

    args: argparse.Namespace
    parameters: dict  # of the loss
    ranks: Ranks
    stop: Stop
    policy: ResponseLogps
    packing: Packing
    optimizer: torch.optim.Optimizer
    learned: LearnedMix
    checkpoints: Checkpoints | ShardedCheckpoints
    progress: Progress

    @property
    def token_kl(self) -> str | None:
        """The token-level divergence that the loss reads from its input, if any."""
        kl = self.parameters.get("kl")
        return kl if kl in ("k3", *token_scores.FULL_KL) else None

    @property
    def token_score(self) -> dict | None:
        """Arguments of token_scores.token_score; None where score_c follows from the log-probs
        (the plain log score), or is not part of the loss.
        """
        if not arguments.uses_score(self.args.loss, self.parameters):
            return None
        terms = {key: self.parameters[key] for key in SFT_TERM if key != "sft_coef"}
        plain = ("score", "score_smoothing", "score_masked_log")
        return None if all(terms[key] == SFT_TERM[key] for key in plain) else terms

    def loss(self, inputs: PairLogps) -> tuple[Tensor, dict]:
        """Losses (B,) and terms of the run's loss with its parameters, given or learned."""
        inputs = inputs._replace(running_rho=self.progress.running_rho)
        parameters = self.parameters | self.learned.loss_parameters()
        return loss_options.bind(self.args.loss, parameters)(inputs)

    def pair_logps(self, split: Split, micro: MicroBatch) -> PairLogps:
        """Run the policy on a micro-batch of `split`. Returns what a loss may read, (B,) each. The
        host does not wait for the device.
        """
        kl, members, batch = self.token_kl, micro.members, micro.batch
        references = [split.reference.sums[members]]
        if kl == "k3":
            references.append(split.reference.of(members))
        ref_sums, *ref_tokens = to_device(references, self.ranks.device)
        logps, divergence, scores = self.policy(batch, kl, self.token_score)  # (N,) each, or None
        if kl == "k3":
            divergence = token_scores.token_k3(logps - ref_tokens[0])

        # Sums by response, (2B,): the chosen responses of all pairs come first, then the rejected.
        # With pairs 4 and 7: [chosen 4, chosen 7, rejected 4, rejected 7].
        chosen, rejected = sum_by_row(logps, batch).chunk(2)
        chosen_tokens, rejected_tokens = batch.lengths.float().chunk(2)
        ref_chosen, ref_rejected = ref_sums.unbind(1)
        inputs = PairLogps(
            chosen=chosen,
            rejected=rejected,
            ref_chosen=ref_chosen,
            ref_rejected=ref_rejected,
            chosen_tokens=chosen_tokens,
            rejected_tokens=rejected_tokens,
        )
        if kl:
            kl_chosen, kl_rejected = sum_by_row(divergence, batch).chunk(2)
            inputs = inputs._replace(kl_chosen=kl_chosen, kl_rejected=kl_rejected)
        if scores is not None:  # of the chosen responses alone
            inputs = inputs._replace(score_chosen=sum_by_row(scores, batch)[: len(members)])
        return inputs

    def metric_rows(self, inputs: PairLogps) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (B,) with their gradient, and the metrics of each pair by name, (B,) each.

        Log-probs, rewards and margins are sums over tokens, as in TRL. Rewards of a loss without
        beta are NaN. `anchor` is the loss's own where it has one, else k2; `score` is score_c.
        Neither need be part of the loss. Other terms of the loss are logged as `terms/<name>`.
        """
        losses, terms = self.loss(inputs)
        a, b = inputs.log_ratios
        rho = inputs.rho
        beta = self.parameters.get("beta", math.nan)
        anchor = terms.get("anchor")
        if anchor is None:
            anchor = k2(reduced(inputs, self.parameters.get("logp", "sum")))
        rows = {
            "loss": losses,
            "preference": terms.get("preference", losses),
            "anchor": anchor,
            "anchor_k1": a + b,
            "logps/chosen": inputs.chosen,
            "logps/rejected": inputs.rejected,
            "rewards/chosen": beta * a,
            "rewards/rejected": beta * b,
            "rewards/margins": beta * rho,
            "rewards/accuracies": ranked_right(rho),
            "margin/rho": rho,
            "margin/delta": inputs.delta,
            "score": chosen_score(inputs),
        }
        rows |= {f"terms/{key}": term for key, term in terms.items() if key not in rows}
        return losses, {name: row.detach().double() for name, row in rows.items()}


def ranked_right(margin: Tensor) -> Tensor:
    """1 where the margin is above 0, 0 where it is below, 1/2 for a tie: a policy that starts as
    its reference has rho = 0 on all pairs.
    """
    return (margin > 0).double() + 0.5 * (margin == 0).double()


# ---- one step, one evaluation -------------------------------------------------------------------


class Step(NamedTuple):
    """What one optimiser step computed, over all ranks."""

    means: dict[str, float]  # metrics, averaged over the step's pairs
    tokens: int
    grad_norm: float  # before clipping


def compute_gradients(study: Study, split: Split, members: list[int]) -> Step:
    """Clipped gradients of one optimiser step on the pairs `members`: of the sum of their losses,
    divided by their number, so that neither ranks nor micro-batches change them.
    """
    args, ranks, policy, packing = study.args, study.ranks, study.policy, study.packing
    weight = 1 / len(members)  # of a pair; gradients are then added over ranks (sharding.py)
    totals: dict[str, Tensor] = {}  # sums over this rank's pairs, fp64

    # 1) Forward and backward, micro-batch by micro-batch. A rank whose share is empty runs along
    #    with weight 0: FSDP's collectives need all ranks. Nothing in here waits for the device, so
    #    that the host is always ahead of it.
    shares = share_out(members, split.pairs, packing, ranks.rank, ranks.world)
    batches = micro_batches(shares, split.pairs, packing, ranks.device, stand_ins=members[:2])
    for number, micro in enumerate(batches, 1):
        study.stop.check()
        is_last = number == len(shares) or args.tune == "full"
        sharding.prepare_backward(policy, args.shard, is_last)
        losses, rows = study.metric_rows(study.pair_logps(split, micro))
        (losses.sum() * (weight if micro.counts else 0.0)).backward()
        for name, row in rows.items():
            value = (row if micro.counts else torch.zeros_like(row)).sum()
            totals[name] = totals.get(name, 0.0) + value
    study.learned.sum_gradient(ranks)

    # 2) Metrics and gradient norm over all ranks in one collective. The gradients are clipped on
    #    the device, so that the host waits for it only once, at the end. The tokens of all ranks
    #    are those of all pairs.
    grads = [sharding.local(p.grad) for p in trainable(policy).values() if p.grad is not None]
    totals["squared_norm"] = sum_of_squares(grads, args.tune)
    summed = ranks.sum(torch.stack(list(totals.values())))
    squared_norm = dict(zip(totals, summed))["squared_norm"]
    if args.max_grad_norm:  # 0: no clipping
        clip = (args.max_grad_norm / (squared_norm.sqrt() + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, clip.to(grads[0].dtype))

    values = dict(zip(totals, summed.tolist()))
    grad_norm = math.sqrt(values.pop("squared_norm"))
    means = {name: total / len(members) for name, total in values.items()}
    tokens = sum(packing.size(split.pairs[i]) for i in members)
    return Step(means, tokens, grad_norm)


def sum_of_squares(grads: list[Tensor], tune: str) -> Tensor:
    """The sum of the squares of all elements, fp64.

    On the CPU torch adds up a norm one element after another in fp32: of 30 million elements it is
    0.2 % too small, of 200 million 3 %. Norms of rows are exact enough, whatever the matrix.
    """
    if tune == "lora":
        norms = torch.stack(torch._foreach_norm(grads))
    else:
        norms = torch.cat([torch.linalg.vector_norm(g, dim=-1).reshape(-1) for g in grads])
    return norms.double().square().sum()


def take_step(study: Study, split: Split, steps: int) -> dict:
    """One of the run's `steps` optimiser steps. If its loss or gradient is not finite, the step is
    counted but not taken. Returns its metrics.
    """
    args, ranks, progress, learned = study.args, study.ranks, study.progress, study.learned
    begun = time.monotonic()

    # 1) Which pairs, which dropout, which learning rate: functions of the seed and the step.
    lr = schedule.learning_rate_at(progress.step, steps, args)
    schedule.seed_dropout(args.seed, progress.step + 1, ranks.rank)
    members = schedule.pairs_of_step(progress.step, len(split.pairs), args.global_batch, args.seed)
    means, tokens, grad_norm = compute_gradients(study, split, members)

    # 2) The update.
    finite = math.isfinite(means["loss"]) and math.isfinite(grad_norm)  # the same on every rank
    if finite:
        if progress.step == 0:
            gates.check_gradients(study.policy, ranks)
        optimisers.set_learning_rate(study.optimizer, lr)
        study.optimizer.step()
        learned.step()
        progress.running_rho = 0.9 * progress.running_rho + 0.1 * means["margin/rho"]
    study.optimizer.zero_grad()
    learned.zero_grad()

    # 3) What the run's later lines and its summary count.
    progress.step += 1
    progress.tokens += tokens
    progress.nonfinite += not finite
    progress.in_a_row = 0 if finite else progress.in_a_row + 1
    line = {
        **means,
        "grad_norm": grad_norm,
        "lr": lr,
        "tokens": tokens,
        "tok_per_s": tokens / (time.monotonic() - begun),
        "peak_gib": peak_gib(ranks.device),
        "nonfinite": progress.nonfinite,
    }
    return line if learned.beta_mix is None else line | {"beta_mix": learned.beta_mix}


@torch.no_grad()
def policy_sums(study: Study, split: Split) -> dict[str, Tensor]:
    """Of all pairs of `split`, the sums over tokens that depend on the policy: fields of PairLogps,
    (pairs,) each.
    """
    ranks, packing, count = study.ranks, study.packing, len(split.pairs)
    fields = ("chosen", "rejected", "kl_chosen", "kl_rejected", "score_chosen")
    # 1) This rank's share: (5, B) of each micro-batch, which stay on the device, because reading
    #    them would wait for it.
    shares = share_out(list(range(count)), split.pairs, packing, ranks.rank, ranks.world)
    batches = micro_batches(shares, split.pairs, packing, ranks.device, stand_ins=[0])
    members, parts = [], [torch.zeros(len(fields), 0, device=ranks.device)]
    with dropout(study.policy, active=False):
        for micro in ranks.progress(batches, "evaluating", total=len(shares)):
            study.stop.check()
            inputs = study.pair_logps(split, micro)
            if micro.counts:
                zeros = torch.zeros_like(inputs.chosen)  # what the loss does not read
                values = (getattr(inputs, field) for field in fields)
                parts.append(torch.stack([zeros if v is None else v for v in values]))
                members += micro.members
    sharding.reshard(study.policy)
    # 2) Every rank fills its rows; the others stay 0, so that the sum over ranks is the whole
    #    table.
    table = torch.zeros(len(fields), count)
    table[:, members] = torch.cat(parts, dim=1).cpu()
    return dict(zip(fields, ranks.sum(table.to(ranks.device)).cpu()))


@torch.no_grad()
def evaluate(study: Study, split: Split) -> tuple[dict, Tensor]:
    """Metrics over all pairs of `split`, and the policy's log-probs (pairs, 2): sums over tokens;
    chosen, rejected.
    """
    columns = policy_sums(study, split)
    chosen_tokens, rejected_tokens = response_lengths(split.pairs).float().unbind(1)
    ref_chosen, ref_rejected = split.reference.sums.unbind(1)
    inputs = PairLogps(
        chosen=columns["chosen"],
        rejected=columns["rejected"],
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
        kl_chosen=columns["kl_chosen"] if study.token_kl else None,
        kl_rejected=columns["kl_rejected"] if study.token_kl else None,
        score_chosen=columns["score_chosen"] if study.token_score else None,
    )
    _, rows = study.metric_rows(inputs)
    metrics = {f"eval/{name}": row.mean().item() for name, row in rows.items()}
    margins = {"acc_ref": inputs.rho, "acc_sum": inputs.delta, "acc_mean": inputs.mean().delta}
    accuracies = {f"eval/{k}": ranked_right(m).mean().item() for k, m in margins.items()}
    return metrics | accuracies, torch.stack([inputs.chosen, inputs.rejected], dim=1)


# ---- one run ------------------------------------------------------------------------------------


def assemble(
    args: argparse.Namespace,
    parameters: dict,
    ranks: Ranks,
    stop: Stop,
    policy: ResponseLogps,
    packing: Packing,
    folder: Path,
) -> Study:
    """Optimisers and progress, with all their state from the last checkpoint if there is one."""
    learned = LearnedMix(args, parameters, ranks.device)
    optimizer = optimisers.make(policy, args)
    trained = {name: (parameter, optimizer) for name, parameter in trainable(policy).items()}
    kept = ShardedCheckpoints if args.tune == "full" else Checkpoints
    checkpoints = kept(folder, trained | learned.trained(), ranks)
    return Study(
        args=args,
        parameters=parameters,
        ranks=ranks,
        stop=stop,
        policy=policy,
        packing=packing,
        optimizer=optimizer,
        learned=learned,
        checkpoints=checkpoints,
        progress=checkpoints.restore() or Progress(),
    )


def train(args: argparse.Namespace, ranks: Ranks, stop: Stop, command: str) -> int:
    """One run, from its arguments to its summary. Returns the exit code."""
    # 1) Everything that can be wrong without weights.
    prepared = assembly.prepare(args, ranks)
    args, parameters, record = prepared.args, prepared.parameters, prepared.record
    folder = args.results_dir / args.run_id
    if args.dry_run is None:
        run_folder.check_same_run(folder, record)
        if ranks.from_main(run_folder.is_finished(folder)):
            ranks.print(f"{folder}: finished already; remove the folder to train it again")
            return 0

    # 2) Token ids, and from them the plan, which settles the last `auto`.
    tokenizer = chat.load_tokenizer(args.model)
    record |= template.settings_of(tokenizer)
    rows, pairs, counts = tokenising.tokenise(args, tokenizer, prepared.rows, ranks)
    longest = max(pair.longest for split in pairs.values() for pair in split)
    args = settings.for_attention(args, longest, ranks)
    if args.dry_run is None:
        run_folder.check_computed_as_before(folder, architecture.read(args.model))
    args = settings.as_begun(args, folder)
    packing = settings.packing_of(args, tokenizer.pad_token_id)
    planned = plan.of_run(args, pairs["train"], packing, ranks, pairs["val"])
    args, packing = planned.args, planned.packing
    if args.dry_run is not None:
        plan.show(planned, ranks)
        disk_room.show(planned, ranks)
        return 0
    plan.check_held(planned)
    disk_room.check(planned, folder)
    if ranks.device.type == "cpu":
        cpu_memory.keep_freed_memory(int(planned.memory.total * 2**30))

    # 3) One process per run: the lock is held until the summary is written.
    with checkpoint.run_lock(folder, ranks):
        output.keep_rest_in(folder / "output.txt")
        if ranks.from_main(run_folder.is_finished(folder)):  # by the process that held the lock
            return 0

        # 4) Base model, adapter and reference. Only now is it known whether weights and token ids
        #    are those of the run that the folder holds.
        policy, base = assembly.build_policy(args, ranks)
        has_wide_logits = policy.has_wide_logits(getattr(torch, args.dtype))
        start = reference.adapter_of(record)
        record |= reference.identity(base, start, pairs, has_wide_logits)
        run_folder.check_same_run(folder, record)
        splits = assembly.load_splits(args, ranks, policy, packing, record, rows, pairs)

        # 5) Everything else, from the last checkpoint.
        study = assemble(args, parameters, ranks, stop, policy, packing, folder)
        if ranks.main:
            run_folder.check_first_rows(folder, study.progress, rows["val"])
            record |= run_folder.settled_record(planned, counts, command)
            run_folder.open_folder(folder, record, study.progress, args)
        ranks.print(run_folder.start_text(args, parameters, ranks, study.progress))

        # 6) The loop.
        if not run(study, splits["train"], splits["val"], folder):
            ranks.print(
                f"{args.run_id}: saved after step {study.progress.step}; "
                f"the same command continues:\n  {command}"
            )
            return stop.exit_code

        # 7) The weights and, last, the summary: a folder that has one is finished.
        summary = run_folder.summary_of(args, study.progress, ranks.device, study.learned.beta_mix)
        if ranks.main:
            run_folder.publish(folder, study.checkpoints.best(study.progress), summary)
    if args.compile == "on":
        ranks.print(run_folder.compiled_text())
    ranks.print(run_folder.summary_text(summary, folder))
    return 0


def run(study: Study, training: Split, validation: Split, folder: Path) -> bool:
    """Optimiser steps and evaluations from the last checkpoint on; `study.progress` moves. Returns
    False if a signal stopped the run, with everything saved.
    """
    args, ranks, progress = study.args, study.ranks, study.progress
    count = len(training.pairs)
    steps = schedule.number_of_steps(args, count)
    per_epoch = schedule.steps_per_epoch(count, args.global_batch)
    wandb = run_folder.open_wandb(folder) if args.report_to == "wandb" and ranks.main else None
    log = Log(folder / "metrics.jsonl", ranks, progress.metrics_bytes, wandb)
    begun, wall_before = time.monotonic(), progress.wall_s
    first = saved = progress.step

    def save() -> None:
        now = time.monotonic()
        progress.metrics_bytes, progress.wall_s = log.size(), wall_before + now - begun
        study.checkpoints.save(progress)
        progress.save_s += time.monotonic() - now

    study.stop.deferred = True  # from here on a signal is answered between two micro-batches
    try:
        while progress.in_a_row < args.max_nonfinite:
            # 1) An evaluation, if one is due after this step and has not been made.
            is_due = schedule.is_evaluated(progress.step, steps, count, args)
            if is_due and progress.evaluated < progress.step:
                if progress.step == 0:
                    check_first_batch(study, training)
                keep_evaluation(study, validation, folder, log, epoch=progress.step / per_epoch)
            if progress.step == steps:
                break

            # 2) A checkpoint, after the evaluation, which would otherwise be repeated.
            if progress.step % args.save_steps == 0 and progress.step > saved:
                save()
                saved = progress.step

            # 3) A step, with a line in metrics.jsonl and one on the terminal.
            line = take_step(study, training, steps)
            log.line({"step": progress.step, "epoch": progress.step / per_epoch, **line})
            left_s = (time.monotonic() - begun) / (progress.step - first) * (steps - progress.step)
            finite = progress.in_a_row == 0
            ranks.print(run_folder.step_text(progress.step, steps, line, left_s, finite))
    except Stopped:
        # 4) A signal: what the interrupted step or evaluation computed is dropped; it is repeated
        #    when the run continues.
        save()
        return False
    progress.wall_s = wall_before + time.monotonic() - begun
    return True


def check_first_batch(study: Study, training: Split) -> None:
    """The gate before training, on the pairs of the first step: their reference is in a file of its
    own.
    """
    args = study.args
    first = schedule.pairs_of_step(0, len(training.pairs), args.global_batch, args.seed)
    part = training.part(first)
    sums = policy_sums(study, part)
    logps = torch.stack([sums["chosen"], sums["rejected"]], dim=1)
    check_start(study, part, logps, "training pairs of the first step")


def check_start(study: Study, split: Split, logps: Tensor, what: str) -> float:
    """The gate on some pairs: the policy, whose log-probs are `logps` (pairs, 2), equals its
    reference; where it starts elsewhere, the reference is what it was. Returns the mean difference,
    nats per token.
    """
    dtype = getattr(torch, study.args.dtype)
    if study.args.reference_model == "start":
        return gates.check_step0(logps, split, dtype, what)
    return gates.check_reference(study.policy, split, study.packing, study.ranks, dtype, what)


def keep_evaluation(study: Study, val: Split, folder: Path, log: Log, epoch: float) -> None:
    """Evaluate, log it, and keep the adapter if it is the best by acc_ref so far; in a tie the
    earlier step stays the best.
    """
    ranks, progress = study.ranks, study.progress
    metrics, logps = evaluate(study, val)
    log.line({"step": progress.step, "epoch": epoch, **metrics})
    rows = run_folder.pair_rows(val, progress.step, logps)
    accuracy = metrics["eval/acc_ref"]
    if progress.step == 0:
        # Nothing is trained yet: the gate, and the rows that the best step is compared with.
        progress.step0_difference = check_start(study, val, logps, "validation pairs")
        if ranks.main:
            run_folder.write_pairs(folder, rows)
    else:
        shown = ("eval/loss", "eval/acc_ref", "eval/margin/rho")
        ranks.print("  " + "  ".join(f"{name} {metrics[name]:.4f}" for name in shown))
        if progress.best_acc_ref is None or accuracy > progress.best_acc_ref:
            progress.best_acc_ref, progress.best_step = accuracy, progress.step
            best = study.checkpoints.best(progress)
            progress.best_sha256 = run_folder.save_best(study.args, study.policy, rows, best, ranks)
    progress.final, progress.evaluated = metrics, progress.step


def main(argv: list[str] | None = None) -> int:
    args = arguments.parse_args(argv, __doc__)
    if args.status:
        return run_folder.print_status(args.status)
    ranks = init_ranks()
    command = run_folder.start_command(sys.argv[1:] if argv is None else argv, ranks)
    ranks = hardware.planned_ranks(args, ranks)
    with Stop(ranks) as stop, ended_by_lost_ranks(ranks):
        code = train(args, ranks, stop, command)
    # Not after an error: the other ranks may wait in a collective that this one will never join.
    close_ranks()
    return code


if __name__ == "__main__":
    console.run_main(main)
