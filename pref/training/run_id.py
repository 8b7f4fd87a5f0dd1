"""what was varied, as a name"""

import argparse

from pref.files import run_folders
from pref.training import arguments, loss_options

# What precedes a value in the run id when it differs from its default; beta, tau and seed are always
# in the run id.
RUN_ID_TAGS = arguments.RUN_ID_TAGS | {"init_adapter_sha256": "init"}


def run_id_of(args: argparse.Namespace, parameters: dict, defaults: argparse.Namespace) -> str:
    """td_dpo_b2.5_t2_s42, then every other parameter that differs from its default (_mean,
    _lr2e-05).
    """
    parts = [args.loss]
    parts += [
        f"{RUN_ID_TAGS[key]}{parameters[key]:g}" for key in ("beta", "tau") if key in parameters
    ]
    parts.append(f"s{args.seed}")
    values = {
        key: (value, loss_options.loss_defaults(args.loss)[key])
        for key, value in parameters.items()
    }
    other = [
        key
        for key in RUN_ID_TAGS
        if key not in arguments.loss_arguments() and hasattr(defaults, key)
    ]
    values |= {key: (getattr(args, key), getattr(defaults, key)) for key in other}
    if args.init_adapter:  # its hash says what its r, alpha and targets are
        values |= dict.fromkeys(("lora_r", "lora_alpha", "lora_targets"), (None, None))
        values["init_adapter_sha256"] = (args.init_adapter_sha256[:8], None)
    for key in [*RUN_ID_TAGS, *(key for key in parameters if key not in RUN_ID_TAGS)]:
        value, default = values.get(key, (None, None))
        if value != default and key not in ("beta", "tau"):
            text = "" if value is True else f"{value:g}" if isinstance(value, float) else str(value)
            parts.append(f"{RUN_ID_TAGS.get(key, key)}{text}".replace(",", "+").replace("_", "-"))
    return "_".join([*parts, *(["trial"] if args.mode == "trial" else [])])


def run_id_from(argv: list[str]) -> str:
    """The run id that a start with these arguments would have. Raises UserError for arguments of no
    run.
    """
    args = arguments.parse_args(argv)
    arguments.check_args(args, world=1)
    arguments.take_init_adapter(args)
    return run_folders.check_run_id(
        args.run_id or run_id_of(args, arguments.loss_parameters(args), arguments.parse_args([]))
    )
