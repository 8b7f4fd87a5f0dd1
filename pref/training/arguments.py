"""Every argument of train_pref.py: the tables that declare them, the parser, and the checks.

To add an argument, add a row to a table. What other modules need to know about it (its tag in the
run id, whether another value makes another run, ...) is part of the row: see declaration.py. The
parameters of losses are declared in loss_options.py.
"""

import argparse
import importlib.util
import math
from pathlib import Path

from losses import COUPLES_BATCH, LOSSES, NEEDS_TWO_PAIRS
from pref.files import disk
from pref.files.console import UserError
from pref.model.token_scores import FULL_KL
from pref.training import hardware, loss_check, loss_options, schedule
from pref.training.declaration import ABOVE_0, BELOW_1, Argument, Range
from pref.training.schedule import TRIAL_STEPS

SEEDS = Range(lambda x: 0 <= x < 2**32, f"0 or more, below {2**32} (NumPy's limit)")
RANKS = Range(lambda x: x >= 0, "a number of ranks, or 0 for this launch's")
RATES = Range(lambda x: 0 < x <= 1, "above 0, at most 1")
EPOCHS = Range(lambda x: 0 < x <= 1000, "above 0, at most 1000")
NORMS = Range(lambda x: 0 <= x < math.inf, "a finite number, 0 (no clipping) or above")
LORA_RANKS = Range(lambda x: 1 <= x <= 8192, "1 to 8192")
BUDGETS = Range(lambda x: x == 0 or x >= 16, "0 (from --per_device_batch), or at least 16 tokens")
SHARE = Range(lambda x: 0 <= x <= 1, "a share from 0 to 1")
STEPS = Range(lambda x: x >= 0, "0 (epochs decide) or more")
LENGTHS = Range(lambda x: x >= 16, "at least 16 tokens")
AUTO = ("auto", "on", "off")
# Peak learning rates without --learning_rate, by --tune: that of the first study, and that of the
# papers that train all parameters.
LEARNING_RATES = {"lora": 1e-5, "full": 5e-7}
OF_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_targets")
LORA_OPTIONS = ("use_rslora", "loraplus_lr_ratio")  # recorded only where they are used
OF_FULL = ("freeze", "optim")


def layers_to_recompute(text: str) -> str:
    """A value of --checkpointing. Raises what argparse expects for another text."""
    if text in AUTO or text.isdecimal() and int(text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r}: must be auto, on, off or a number of layers")


# A row: name, type or choices, default, facts about it, and the help text with the unit. Rows are
# in the order of --help, and tags appear in the run id in this order.
RUN = (
    # Which model it is is told by the hash of its files, not by where they are.
    Argument("model", str, "meta-llama/Llama-2-7b-chat-hf", affects="place").describe(
        "chat model: hub id or folder"
    ),
    Argument("data", Path, Path("data/dpo-mix-7k"), affects="place").describe(
        "folder written by prep_data.py"
    ),
    Argument("results_dir", Path, Path("results"), affects="place").describe("folder of all runs"),
    Argument("run_id", str, affects="place").describe(
        "name of the run's folder (default: loss, beta, tau, seed and what else is not a default)"
    ),
    Argument("mode", ("full", "trial"), "full").describe(
        f"trial: {TRIAL_STEPS} steps to test a set-up; its numbers measure nothing"
    ),
    Argument(
        "dry_run",
        int,
        range=RANKS,
        affects="session",
        options={"nargs": "?", "const": 0, "metavar": "RANKS"},
    ).describe(
        "print steps, tokens and memory for RANKS ranks (default: this launch's), then stop"
    ),
    Argument("plan_json", Path, affects="session", options={"metavar": "FILE"}).describe(
        "with --dry_run: write the plan to this file as JSON"
    ),
    Argument("gpu", tuple(hardware.CARDS), affects="session", options={"metavar": "CARD"}).describe(
        "with --dry_run: plan for this card, which need not be here: " + ", ".join(hardware.CARDS)
    ),
    Argument("gpu_gib", float, range=ABOVE_0, affects="session").describe(
        "with --dry_run: plan for cards with this memory, GiB"
    ),
    Argument("mfu", float, range=RATES, affects="session").describe(
        "with --dry_run: share of the card's dense bf16 peak that training reaches, for the hours "
        f"(default {hardware.MFU:g}; recomputation is added)"
    ),
    Argument("seed", int, 42, range=SEEDS).describe("LoRA initialisation, order of pairs, dropout"),
    Argument("save_steps", int, 20, range=ABOVE_0, affects="speed").describe(
        "optimiser steps between checkpoints"
    ),
    Argument("report_to", ("none", "wandb"), "none", affects="session").describe(
        "also send metrics.jsonl to Weights & Biases (WANDB_MODE=offline keeps it here)"
    ),
    Argument("status", Path, affects="session").describe(
        "print the state of the run or runs in DIR and how to continue them, then stop; exit "
        "code 1 unless all have ended"
    ),
)
LOSS = (
    Argument("loss", tuple(LOSSES), "td_dpo", options={"metavar": "NAME"}).describe(
        ", ".join(LOSSES)
    ),
    Argument("loss_file", str, affects="place", options={"metavar": "FILE.py:NAME"}).describe(
        "your own loss, instead of --loss"
    ),
    *loss_options.PARAMETERS,
)
OPTIMISATION = (
    Argument("learning_rate", float, range=RATES, tag="lr").describe(
        "peak learning rate, reached after the warm-up (default "
        + ", ".join(f"{rate:g} with --tune {tune}" for tune, rate in LEARNING_RATES.items())
        + ")"
    ),
    Argument(
        "loraplus_lr_ratio", float, 1.0, range=ABOVE_0, tag="loraplus", always_recorded=False
    ).describe(
        "LoRA+: learning rate of the LoRA matrices B over that of A, which has --learning_rate"
    ),
    Argument("beta_mix_lr", float, 1e-3, range=RATES, tag="mlr").describe(
        "with --learn_beta_mix: learning rate of log beta_mix"
    ),
    Argument("epochs", float, 3, range=EPOCHS, tag="ep").describe(
        "passes over the training pairs; may be a fraction"
    ),
    Argument("max_steps", int, 0, range=STEPS, tag="steps").describe(
        "stop after this many optimiser steps (0: epochs decide)"
    ),
    Argument("global_batch", int, 128, range=ABOVE_0, tag="gb").describe(
        "pairs per optimiser step, over all ranks"
    ),
    Argument("per_device_batch", int, 4, range=ABOVE_0, affects="coupled").describe(
        "pairs per micro-batch, with --packing off and for losses that couple these pairs"
    ),
    Argument("max_length", int, 2048, range=LENGTHS, tag="len").describe(
        "tokens of prompt + response"
    ),
    Argument("truncation", ("keep_end", "keep_start"), "keep_end", tag="").describe(
        "keep_end: cut a long prompt at its start, then responses at their end; keep_start: "
        "keep the first tokens, as TRL does"
    ),
    Argument("append_eos", bool, False, tag="eos").describe(
        "end each response with EOS, for a chat template that ends none"
    ),
    Argument("max_bad_pairs", float, 0.01, range=SHARE, affects="session").describe(
        "share of pairs that may be left out because their tokens do not say what their texts say"
    ),
    Argument("weight_decay", float, 0.01, range=BELOW_1, tag="wd").describe(
        "weight decay of AdamW; with --tune full not on norms and biases"
    ),
    Argument("optim", ("adamw", "adamw_8bit"), "adamw", tag="").describe(
        "adamw_8bit, with --tune full: moments in 8 bits (bitsandbytes), a quarter of their memory"
    ),
    Argument("warmup_ratio", float, 0.1, range=BELOW_1, tag="wu").describe(
        "share of the steps in which the learning rate rises from 0; then cosine to 0"
    ),
    Argument("max_grad_norm", float, 1.0, range=NORMS, tag="clip").describe(
        "L2 norm that the gradient of a step is clipped to (0: no clipping)"
    ),
    Argument("eval_steps", int, range=STEPS).describe(
        "optimiser steps between evaluations; each epoch also ends with one (0: only after the "
        "last step, whose adapter is then kept, not the best one's; default: at least "
        f"{schedule.EVALUATION_STEPS}, more where evaluation would take "
        f"{schedule.EVALUATION_SHARE:.0%}% of the run)"
    ),
    Argument("max_nonfinite", int, 10, range=ABOVE_0).describe(
        "consecutive non-finite steps that end the run"
    ),
)
MODEL = (
    Argument("tune", ("lora", "full"), "lora", tag="").describe(
        "what is trained: a LoRA adapter, or all parameters of the model"
    ),
    Argument("freeze", str, tag="fz").describe(
        "with --tune full: module names with commas whose parameters stay as they are "
        "(embed_tokens,layers.0)"
    ),
    Argument("init_adapter", Path, affects="place").describe(
        "finished run (results/RUN) or folder of a LoRA adapter to start from; it sets r, alpha "
        "and targets"
    ),
    # In args.json `reference` has always been the keys of the reference's log-probs.
    Argument("reference_model", ("start", "base"), "start", flag="reference").describe(
        "with --init_adapter, the reference of the loss: the policy as this training starts, or "
        "the base model"
    ),
    Argument("round", int, None, range=ABOVE_0).describe(
        "with --init_adapter, which round of training on the model's own answers this is; above 1 "
        "the run is named by it (default: one more than that of the run it starts from; 1 from "
        "SFT, or from an adapter's folder)"
    ),
    Argument("lora_r", int, 64, range=LORA_RANKS, tag="r").describe("rank r of the LoRA matrices"),
    Argument("lora_alpha", int, 16, range=ABOVE_0, tag="a").describe(
        "LoRA updates are scaled by alpha / r"
    ),
    Argument("use_rslora", bool, False, tag="rslora", always_recorded=False).describe(
        "rank-stabilised LoRA: scale the updates by alpha / sqrt(r)"
    ),
    Argument("lora_dropout", float, 0.05, range=BELOW_1, tag="do").describe(
        "dropout on the input of the LoRA matrices"
    ),
    Argument("lora_targets", str, "all-linear", tag="").describe(
        "all-linear, or module names with commas"
    ),
    Argument("quant", ("auto", "nf4", "none"), "auto", tag="").describe(
        "base weights; auto: nf4 on CUDA"
    ),
    Argument("dtype", ("auto", "bfloat16", "float32"), "auto", tag="").describe(
        "compute dtype; auto: bfloat16 where the hardware has it"
    ),
    Argument("shard", ("adapters", "full"), "adapters", affects="speed").describe(
        "what FSDP2 shards over ranks: the adapters alone, or the frozen base too; with --tune "
        "full always all of it"
    ),
    Argument(
        "checkpointing",
        layers_to_recompute,
        "auto",
        affects="kernel",
        options={"metavar": "{auto,on,off,LAYERS}"},
    ).describe(
        "recompute activations, of all layers or of the first LAYERS: slower, much less memory; "
        "auto: if the plan would fill the device, on CUDA of as many layers as needed"
    ),
    Argument("tokens_per_microbatch", int, 0, range=BUDGETS, affects="kernel").describe(
        "tokens per micro-batch that pairs are packed up to (0: per_device_batch * max_length; on "
        "CUDA less where that saves recomputing, on a CPU up to twice as many, but not over 4,096)"
    ),
    Argument("prefix_sharing", ("on", "off"), "on", affects="kernel").describe(
        "compute the prompt once per pair, or once per response"
    ),
    Argument("packing", ("on", "off"), "on", affects="kernel").describe(
        "lay rows end to end, or pad them to the longest"
    ),
    Argument("compile", AUTO, "auto", affects="kernel").describe(
        "torch.compile the layers; auto: long runs, if there is a compiler (C++; on CUDA C, and "
        "Triton)"
    ),
)
ARGUMENTS = (*RUN, *LOSS, *OPTIMISATION, *MODEL)
DEFAULTS = {argument.name: argument.default for argument in ARGUMENTS}
RUN_ID_TAGS = {argument.name: argument.tag for argument in ARGUMENTS if argument.tag is not None}


def names_affecting(*what: str) -> tuple[str, ...]:
    """Names of the arguments that affect one of `what`, keys of declaration.AFFECTS."""
    return tuple(argument.name for argument in ARGUMENTS if argument.affects in what)


NOT_RECORDED = names_affecting("session")  # left out of args.json
# What an args.json says that does not have these keys.
UNLESS_RECORDED = {a.name: a.default for a in ARGUMENTS if not a.always_recorded}


def loss_arguments() -> dict[str, Argument]:
    """The parameters of all losses by name, those of a --loss_file included. The help text begins
    with the losses that have the parameter.
    """
    arguments = {argument.name: argument for argument in loss_options.PARAMETERS}
    defaults: dict[str, dict[str, object]] = {name: {} for name in arguments}  # by loss
    for loss in LOSSES:
        for name, default in loss_options.loss_defaults(loss).items():
            arguments.setdefault(name, Argument(name, type(default)))
            defaults.setdefault(name, {})[loss] = default
    return {
        name: argument._replace(help=loss_help(argument.help, by_loss))
        for name, argument in arguments.items()
        if (by_loss := defaults[name])
    }


def loss_help(text: str, defaults: dict[str, object]) -> str:
    """`text` with the losses that have the parameter, and the default of each: the most frequent
    one first, then the others with their losses.

    weight of the reference, {"dpo": 0.1, "ipo": 0.1, "simpo": 2.0}
        -> "dpo, ipo, simpo: weight of the reference (default 0.1; simpo 2.0)"
    """
    losses_of: dict[object, list[str]] = {}
    for loss, default in defaults.items():
        losses_of.setdefault(default, []).append(loss)
    usual, *others = sorted(losses_of, key=lambda default: -len(losses_of[default]))
    exceptions = [f"{', '.join(losses_of[default])} {default}" for default in others]
    losses = ", ".join(defaults) if len(defaults) < 6 else "most losses"
    values = "; ".join([str(usual), *exceptions]).replace("%", "%%")  # argparse formats the text
    return f"{losses}: {text} (default {values})"


def parse_args(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """The arguments of train_pref.py, with those of the loss in --loss_file if there is one."""
    own = load_own_loss(argv)
    args = build_parser(own or DEFAULTS["loss"], description).parse_args(argv)
    if args.learning_rate is None:
        args.learning_rate = LEARNING_RATES[args.tune]
    return args


def build_parser(
    default_loss: str = DEFAULTS["loss"], description: str | None = None
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--option VALUE ...]  (--help explains all of them)",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # --loss_file adds a choice to --loss, and parameters after the declared ones.
    loss_group = {argument.name: argument for argument in LOSS} | loss_arguments()
    loss_group["loss"] = loss_group["loss"]._replace(
        values=tuple(LOSSES), default=default_loss, help=", ".join(LOSSES)
    )
    groups = {
        "what is trained on what": RUN,
        "loss (`python losses.py` lists them; a parameter that the loss does not have is an "
        "error)": loss_group.values(),
        "optimisation": OPTIMISATION,
        "model and memory": MODEL,
    }
    for title, arguments in groups.items():
        group = parser.add_argument_group(title)
        for argument in arguments:
            argument.add_to(group)
    return parser


def load_own_loss(argv: list[str] | None) -> str | None:
    """Load the loss of --loss_file and return its name; None without --loss_file.

    The option is parsed ahead of all others, because the loss's parameters become options too.
    Raises UserError for a loss that cannot be used, or a parameter with the name of an argument.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--loss_file")
    spec = parser.parse_known_args(argv)[0].loss_file
    if spec is None:
        return None
    try:
        return load_loss(spec)
    except ValueError as error:
        raise UserError(f"--loss_file {error}") from None


def load_loss(spec: str) -> str:
    """Add the function of 'FILE.py:NAME' to LOSSES and return its name. Raises ValueError for one
    that train_pref.py could not use.
    """
    taken = {"help", *DEFAULTS, *(a.flag for a in ARGUMENTS)} - loss_arguments().keys()
    name = loss_options.load_loss_file(spec)
    if clash := sorted(taken & loss_options.own_defaults(LOSSES[name]).keys()):
        del LOSSES[name]
        loss_options.FROM_FILES.discard(name)
        raise ValueError(f"{spec}: parameter {clash[0]} is an argument of train_pref.py; rename it")
    return name


def loss_parameters(args: argparse.Namespace) -> dict:
    """The parameters of the chosen loss: its defaults, and over them what the command line gives.

    Raises UserError for a parameter that the loss does not have, that is out of its range, or that
    has no effect.
    """
    defaults = loss_options.loss_defaults(args.loss)
    given = {name: getattr(args, name) for name in loss_arguments()}
    given = {name: value for name, value in given.items() if value is not None}
    if foreign := sorted(given.keys() - defaults.keys()):
        raise UserError(
            f"--{foreign[0]}: {args.loss} has no such parameter; it has {', '.join(defaults)}"
        )
    parameters = {**defaults, **given}
    try:
        loss_options.check_parameters(args.loss, parameters)
    except ValueError as error:
        raise UserError(str(error)) from None
    for name, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} {value}: must be a finite number")
    if not uses_score(args.loss, parameters):
        if unused := [name for name in given if name.startswith("score")]:
            raise UserError(
                f"--{unused[0]}: has no effect without --sft_coef; the loss has no score in it"
            )
    if args.tune == "full" and parameters.get("kl") in FULL_KL:
        raise UserError(
            f"--kl {parameters['kl']}: needs the reference's logits in every step, and with --tune "
            "full no second model is held, only the reference's log-probs; give --kl k3 or --tune "
            "lora"
        )
    if args.learn_beta_mix and args.loss != "dlrml":
        raise UserError(f"--learn_beta_mix: {args.loss} has no beta_mix; it belongs to dlrml")
    return parameters


def uses_score(loss: str, parameters: dict) -> bool:
    """Whether score_c is a term of the loss."""
    return loss in ("sft", "orpo") or bool(parameters.get("sft_coef"))


def check_own_loss(args: argparse.Namespace, parameters: dict) -> dict:
    """Self-test the loss of --loss_file, with its defaults and with `parameters`. Returns what
    args.json records about it, which is nothing for a loss in losses.py. Raises UserError.
    """
    if args.loss not in loss_options.FROM_FILES:
        return {}
    report = loss_check.check(args.loss)
    failures = list(report.failures)
    if not failures:
        loss = loss_options.bind(args.loss, parameters)
        if problem := loss_check.try_parameters(loss):
            failures = [f"with {parameters} it {problem}"]
    if failures:
        raise UserError(f"--loss_file {args.loss_file}: fails its self-test: {'; '.join(failures)}")
    for note in report.notes:
        print(f"{args.loss}: {note}", flush=True)
    # From here on it is treated as a loss of losses.py with these properties is.
    if report.couples:
        COUPLES_BATCH.add(args.loss)
    if report.needs_two:
        NEEDS_TWO_PAIRS.add(args.loss)
    return {"loss_file_sha256": disk.sha256_file(Path(args.loss_file.rpartition(":")[0]))}


def check_micro_batches(
    args: argparse.Namespace, pairs: dict[str, int], world: int, main: bool
) -> None:
    """For a loss that couples the pairs of a micro-batch, print what the result depends on. `pairs`
    is the number of pairs in each split. Raises UserError if the loss needs two pairs and some
    micro-batch would hold one.
    """
    if args.loss not in COUPLES_BATCH:
        return
    if main:
        print(
            f"{args.loss} couples the pairs of a micro-batch: the result depends on "
            f"--per_device_batch {args.per_device_batch} and on the number of ranks ({world})",
            flush=True,
        )
    if args.loss in NEEDS_TWO_PAIRS:
        # Step -> its share of each rank -> the size of the share's last micro-batch. An example: 30
        # pairs, global batch 12, 2 ranks, 4 pairs per micro-batch. Steps have 12, 12 and 6 pairs,
        # ranks get 6 or 3 of them, in micro-batches of 4 + 2 or 3. A share of 5 would be 4 + 1.
        last_step = pairs["train"] % args.global_batch or args.global_batch
        shares = {
            math.ceil((step - rank) / world)
            for step in (args.global_batch, last_step)
            for rank in range(world)
        }
        sizes = {
            share % args.per_device_batch or args.per_device_batch for share in shares if share > 0
        }
        if 1 in sizes or pairs["val"] < 2:
            raise UserError(
                f"--loss {args.loss}: some micro-batch would hold a single pair ({pairs['train']} "
                f"pairs, {world} rank(s), --global_batch {args.global_batch}, --per_device_batch "
                f"{args.per_device_batch}); change one"
            )


def check_args(args: argparse.Namespace, world: int) -> None:
    """Raise UserError for values that no run of `world` ranks can have, before anything is loaded.
    The loss's parameters are checked by `loss_parameters`.
    """
    for argument in (*RUN, *OPTIMISATION, *MODEL):
        try:
            argument.check(getattr(args, argument.name))
        except ValueError as error:
            raise UserError(str(error)) from None
    if args.global_batch % world:
        near = max(world, args.global_batch // world * world)
        raise UserError(
            f"--global_batch {args.global_batch} does not divide over {world} ranks; use {near} or "
            "another multiple"
        )
    if args.plan_json and args.dry_run is None:
        raise UserError("--plan_json: only with --dry_run")
    hardware.check(args)
    check_tuning(args)
    if args.report_to == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError("--report_to wandb needs the package wandb; pip install wandb")
    if args.shard == "full" and args.quant == "nf4":
        raise UserError(
            "--shard full with --quant nf4: sharded 4-bit weights are not verified; use --shard "
            "adapters"
        )


def check_tuning(args: argparse.Namespace) -> None:
    """Raise UserError for arguments that do not go with --tune."""
    foreign = OF_FULL if args.tune == "lora" else (*OF_LORA, *LORA_OPTIONS)
    if given := [name for name in foreign if getattr(args, name) != DEFAULTS[name]]:
        other = "full" if args.tune == "lora" else "lora"
        raise UserError(
            f"--{given[0]} {getattr(args, given[0])}: belongs to --tune {other}; leave it out"
        )
    if args.tune == "lora":
        return
    if args.init_adapter:
        raise UserError(
            f"--init_adapter {args.init_adapter}: --tune full starts from the weights of --model; "
            "merge the adapter into its base first (export.py), and give what that writes as "
            "--model"
        )
    if args.quant == "nf4":
        raise UserError(
            "--quant nf4: weights in 4 bits cannot be trained, only adapters on them; leave it "
            "out, or give --tune lora"
        )
    names = args.freeze.split(",") if args.freeze is not None else []
    if len(set(names)) < len(names) or any(name != name.strip() or not name for name in names):
        raise UserError(
            f"--freeze {args.freeze!r}: must be different names with commas and no spaces, such as "
            "embed_tokens,layers.0; leave it out to train everything"
        )
