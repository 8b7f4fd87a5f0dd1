"""The name of a run: what was varied."""

import argparse

from pref.files import run_folders
from pref.training import arguments, loss_options, settings, start_adapter

# What precedes a value in the run id, in this order.
RUN_ID_TAGS = arguments.RUN_ID_TAGS | {"init_adapter_sha256": "init"}


def run_id_of(args: argparse.Namespace, parameters: dict, defaults: argparse.Namespace) -> str:
    """Loss, beta, tau and seed, then every other setting that differs from its default:
    td_dpo_b2.5_t2_s42, dpo_b0.1_s42_mean_lr2e-05.

    args: as typed, with what start_adapter.with_start says of reference, round and hash.
    parameters: the loss's own, complete.
    """
    # 1) What is always part of it.
    parts = [args.loss]
    for key in ("beta", "tau"):
        if key in parameters:
            parts.append(f"{RUN_ID_TAGS[key]}{parameters[key]:g}")
    parts.append(f"s{args.seed}")

    # 2) Everything else that differs from its default, where the loss's own parameters have the
    #    loss's own defaults.
    changed = {}
    rate = arguments.LEARNING_RATES[args.tune]
    defaults = settings.replaced(defaults, learning_rate=rate)
    loss_defaults = loss_options.loss_defaults(args.loss)
    for key, value in parameters.items():
        if key not in ("beta", "tau") and value != loss_defaults[key]:
            changed[key] = value
    of_losses = arguments.loss_arguments()
    for key in RUN_ID_TAGS:
        if key not in of_losses and hasattr(defaults, key):
            if getattr(args, key) != getattr(defaults, key):
                changed[key] = getattr(args, key)

    # 3) A start adapter's hash says what its r, alpha and targets are. A later round is named as
    #    its first round is, before there is an adapter to hash.
    is_later = (args.round or 1) > 1
    if args.init_adapter and not is_later:
        for key in ("lora_r", "lora_alpha", "use_rslora", "lora_targets"):
            changed.pop(key, None)
        changed["init_adapter_sha256"] = (args.init_adapter_sha256 or "")[:8]

    # 4) In the order of the table; parameters of a loss of the user's own come after it.
    for key in [*RUN_ID_TAGS, *(key for key in parameters if key not in RUN_ID_TAGS)]:
        if key in changed:
            text = f"{RUN_ID_TAGS.get(key, key)}{value_text(changed[key])}"
            parts.append(text.replace(",", "+").replace("_", "-"))
    if args.mode == "trial":
        parts.append("trial")

    # 5) At the end, so that the ids of a point's rounds begin alike.
    if args.init_adapter and args.reference_model == "base":
        parts.append("refbase")
    if is_later:
        parts.append(f"round{args.round}")
    return "_".join(parts)


def value_text(value: object) -> str:
    """A value as it is written after its tag: nothing for a switch that is on."""
    if value is True:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def choose(args: argparse.Namespace, started: argparse.Namespace, parameters: dict) -> str:
    """--run_id, or what was varied. args: as typed. started: from start_adapter.with_start. Raises
    UserError if it cannot be the name of a folder.
    """
    of_start = ("init_adapter_sha256", "round", "reference_model")
    named = settings.replaced(args, **{key: getattr(started, key) for key in of_start})
    made = args.run_id or run_id_of(named, parameters, arguments.parse_args([]))
    return run_folders.check_run_id(made)


def run_id_from(argv: list[str]) -> str:
    """The run id that train_pref.py would choose for these arguments. The adapter of --init_adapter
    need not exist where --round or --run_id names the run. Raises UserError for arguments that
    train_pref.py would refuse.
    """
    args = arguments.parse_args(argv)
    arguments.check_args(args, world=1)
    parameters = arguments.loss_parameters(args)
    if args.init_adapter and (args.round or 1) > 1:  # whose folder may be one that has just begun
        return choose(args, settings.replaced(args, init_adapter_sha256=None), parameters)
    started = start_adapter.with_start(args)
    if start_adapter.is_missing(started) and not args.run_id and (args.round or 1) == 1:
        raise start_adapter.missing(started.init_adapter)
    return choose(args, started, parameters)
