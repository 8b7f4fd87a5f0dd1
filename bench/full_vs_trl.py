"""All parameters trained: losses, gradients and weights of a few steps beside TRL's DPOTrainer, in
one process, on the same pairs in the same order. Needs TRL, which the toolkit does not.

    python bench/full_vs_trl.py --model DIR --pairs data/NAME/train.jsonl
    python bench/full_vs_trl.py --model DIR --pairs ... --dtype bfloat16 --max_length 512

In fp32 they are the same numbers. In bf16 TRL keeps weights in the dtype that it is given; --dtype
bfloat16 gives it fp32 weights and autocast, whose products are rounded as ours are and whose sums
and norms are not.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import train_pref  # noqa: E402  isort: skip  (sets the allocator's variables)
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from train_vs_trl import choose_pairs  # noqa: E402

BETA, SEED = 0.1, 42


class Steps(NamedTuple):
    """What a program computed: a loss and a gradient (before clipping) for each step, and the
    weights after the last one; tensors by the parameter's name.
    """

    losses: list[float]
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder of a chat model")
    add("--pairs", type=Path, required=True, help="train.jsonl of prep_data.py")
    add("--steps", type=int, default=2)
    add("--batch", type=int, default=4, help="pairs per step")
    add("--max_length", type=int, default=512, help="tokens of prompt + response")
    add("--learning_rate", type=float, default=1e-4)
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    args.global_batch, args.warmup = args.batch, 0
    return args


def of_trl(args: argparse.Namespace, folder: Path) -> Steps:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    done = Steps([], [], {})

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *_, model=None, **__):
            grads = {name: p.grad.clone() for name, p in model.named_parameters()}
            done.gradients.append(grads)

        def on_log(self, _args, _state, _control, logs=None, **__):
            if "loss" in logs:
                done.losses.append(logs["loss"])

    rows = [json.loads(line) for line in (folder / "in_order.jsonl").read_text().splitlines()]
    columns = ("prompt", "chosen", "rejected")
    config = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=args.batch,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        max_grad_norm=0.0,
        beta=BETA,
        max_length=args.max_length,
        truncation_mode="keep_start",
        bf16=args.dtype == "bfloat16",
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=SEED,
        use_cpu=True,
        disable_dropout=True,
        dataloader_pin_memory=False,
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list([{key: row[key] for key in columns} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        callbacks=[Keep()],
    )
    trainer.train()
    done.weights.update({name: p.detach() for name, p in trainer.model.named_parameters()})
    return done


def of_ours(args: argparse.Namespace, folder: Path) -> Steps:
    from pref.files.pairs import read_pairs
    from pref.model import sharding
    from pref.model.chat import load_tokenizer, tokenize_pairs
    from pref.model.logps import trainable
    from pref.model.packing import Packing
    from pref.model.ranks import init_ranks
    from pref.training import arguments, assembly, optimisers, reference, schedule, settings
    from pref.training.checkpoint import Progress
    from pref.training.learned_mix import LearnedMix
    from pref.training.signals import Stop

    given = f"--model {args.model} --tune full --loss dpo --beta {BETA} --seed {SEED} --quant none "
    given += f"--dtype {args.dtype} --compile off --checkpointing off --max_grad_norm 0 "
    given += f"--global_batch {args.batch} --learning_rate {args.learning_rate} --warmup_ratio 0"
    run = settings.for_tuning(arguments.parse_args(given.split()))
    parameters, ranks = arguments.loss_parameters(run), init_ranks()
    tokenizer = load_tokenizer(args.model)
    rows = read_pairs(folder / "train.jsonl")
    pairs = tokenize_pairs(tokenizer, rows, args.max_length, "keep_start")
    packing = Packing(tokenizer.pad_token_id, tokens=args.batch * args.max_length)
    policy, _ = assembly.build_policy(run, ranks)
    tokens = reference.compute(policy, pairs, packing, ranks, "pairs")
    sharding.reshard(policy)
    split = reference.Split(rows, pairs, reference.Reference(pairs, tokens))
    study = train_pref.Study(
        args=run,
        parameters=parameters,
        ranks=ranks,
        stop=Stop(ranks),
        policy=policy,
        packing=packing,
        optimizer=optimisers.make(policy, run),
        learned=LearnedMix(run, parameters, ranks.device),
        checkpoints=None,
        progress=Progress(),
    )
    done = Steps([], [], {})
    original = study.optimizer.step

    def keep_and_step() -> None:
        named = trainable(policy).items()
        grads = {n.removeprefix("model."): sharding.whole(p.grad).clone() for n, p in named}
        done.gradients.append(grads)
        original()

    study.optimizer.step = keep_and_step
    assert schedule.number_of_steps(run, len(pairs)) >= args.steps
    for _ in range(args.steps):
        done.losses.append(train_pref.take_step(study, split, args.steps)["loss"])
    for name, parameter in trainable(policy).items():
        done.weights[name.removeprefix("model.")] = sharding.whole(parameter.detach())
    return done


def relative(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str, float]:
    """The norm of the difference over the norm, of all tensors together; and the tensor for which
    it is the largest share of its own norm.
    """
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    squares = {n: ((ours[n] - theirs[n]).square().sum(), theirs[n].square().sum()) for n in ours}
    apart, whole = (sum(pair[i].double() for pair in squares.values()) for i in (0, 1))
    shares = {n: (a / b).sqrt().item() for n, (a, b) in squares.items()}
    worst = max(shares, key=shares.get)
    return (apart / whole).sqrt().item(), worst, shares[worst]


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        choose_pairs(args, folder)
        ours, theirs = of_ours(args, folder), of_trl(args, folder)
    for number, (a, b) in enumerate(zip(ours.losses, theirs.losses, strict=True)):
        whole, name, worst = relative(ours.gradients[number], theirs.gradients[number])
        print(
            f"step {number + 1}: loss {a:.8f}, TRL {b:.8f}, apart {abs(a - b):.1e}; gradient apart "
            f"{whole:.1e} of its norm, at most {worst:.1e} ({name})"
        )
    apart = {name: (ours.weights[name] - theirs.weights[name]).abs().max() for name in ours.weights}
    moved = max(apart, key=apart.get)
    print(f"weights after {args.steps} steps: at most {apart[moved]:.1e} apart ({moved})")


if __name__ == "__main__":
    main()
