"""The declarations of train_pref.py's arguments, and what is derived from them."""

import pytest

from losses import LOSSES
from pref.analysis import results_folder
from pref.files.console import UserError
from pref.training import arguments, loss_options, run_folder, run_id
from pref.training.arguments import ARGUMENTS, DEFAULTS, names_affecting
from pref.training.declaration import AFFECTS, Argument

# In results_folder.NOT_SETTINGS although they change the result: an analysis has its own place for
# each of them.
OWN_PLACE = {"loss", "beta", "tau", "seed", "mode", "model"}


def test_every_argument_is_declared_once_and_explained():
    names = [argument.name for argument in ARGUMENTS]
    assert len(names) == len(set(names))
    assert {argument.affects for argument in ARGUMENTS} <= AFFECTS.keys()
    assert all(argument.help for argument in ARGUMENTS)
    in_parser = {action.dest: action for action in arguments.build_parser()._actions}
    assert in_parser.keys() == {"help", *names}, "an undeclared parameter of a loss in losses.py?"


def test_parameters_are_declared_with_the_type_of_their_defaults():
    declared = {argument.name: argument for argument in loss_options.PARAMETERS}
    for loss in LOSSES:
        for name, default in loss_options.loss_defaults(loss).items():
            assert name in declared, f"{loss}: declare {name} in loss_options.PARAMETERS"
            values = declared[name].values
            if isinstance(values, tuple):
                assert default in values, (loss, name)
            else:
                assert type(default) is values, (loss, name)
    of_losses = {name for loss in LOSSES for name in loss_options.loss_defaults(loss)}
    assert declared.keys() - of_losses == {"learn_beta_mix"}


def test_the_analysis_groups_runs_by_every_argument_that_changes_a_result():
    """pref/analysis must not import pref/training, so its list is compared with the declarations
    here. An argument in neither place would split the seeds of a cell, or merge two cells.
    """
    recorded = DEFAULTS.keys() - names_affecting("session")
    changes_nothing = {*names_affecting("place", "speed", "kernel", "coupled")}
    assert results_folder.NOT_SETTINGS & DEFAULTS.keys() == changes_nothing | OWN_PLACE
    for name in recorded - OWN_PLACE:
        for coupled in (False, True):
            expected = name not in changes_nothing or (coupled and name == "per_device_batch")
            args = {"couples_batch": coupled}
            assert results_folder.is_setting(name, "value", args) is expected, (name, coupled)


def test_what_makes_another_run():
    """Written out: a run continued with another value cannot be told apart later."""
    session = {"dry_run", "plan_json", "gpu", "gpu_gib", "mfu"}
    session |= {"report_to", "status", "max_bad_pairs"}
    assert set(names_affecting("session")) == session
    assert {
        *("model", "results_dir", "run_id", "data", "loss_file", "init_adapter"),
        *("save_steps", "shard", "tokens_per_microbatch", "versions", "logits"),
        *("checkpointing", "compile", "prefix_sharing", "packing"),
    } == run_folder.NOT_THE_RUN
    assert {"per_device_batch", "world_size"} == run_folder.NOT_THE_RUN_UNLESS_COUPLED


def test_order_of_the_tags_in_a_run_id():
    """A run id names a folder: tags and their order must not change between versions."""
    argv = "--loss dlrml --learn_beta_mix --beta_mix 0.3 --discopop_tau 0.1 --logp mean"
    argv += " --beta_mix_lr 0.01 --learning_rate 2e-5 --epochs 1 --max_steps 7 --global_batch 64"
    argv += " --warmup_ratio 0.2 --lora_r 8 --lora_targets q_proj,v_proj --dtype float32 --seed 3"
    assert run_id.run_id_from(argv.split()) == (
        "dlrml_b0.05_s3_mix0.3_learn_t0.1_mean_lr2e-05_mlr0.01_ep1_steps7_gb64_wu0.2_r8_"
        "q-proj+v-proj_float32"
    )
    argv = "--loss cpo --sft_coef 0.5 --score alpha_power --score_alpha 3 --score_smoothing 0.1"
    argv += " --score_masked_log 0.2 --max_length 512 --truncation keep_start --weight_decay 0.1"
    argv += " --max_grad_norm 3 --lora_alpha 4 --lora_dropout 0 --quant nf4 --mode trial"
    assert run_id.run_id_from(argv.split()) == (
        "cpo_b0.1_s42_sft0.5_alpha-power_sa3_ss0.1_sm0.2_len512_keep-start_wd0.1_clip3_a4_do0_"
        "nf4_trial"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--learning_rate 0", "--learning_rate 0.0: must be above 0"),
        ("--epochs inf", "--epochs inf: must be above 0"),
        ("--weight_decay 1", r"--weight_decay 1.0: must be in \[0, 1\)"),
        ("--lora_dropout nan", r"--lora_dropout nan: must be in \[0, 1\)"),
        ("--seed -1", "--seed -1: must be 0 or more"),
        ("--max_steps -1", "--max_steps -1: must be 0 .epochs decide. or more"),
        ("--max_length 15", "--max_length 15: must be at least 16 tokens"),
        ("--seed 4294967296", "--seed 4294967296: must be 0 or more, below 4294967296"),
        ("--beta_mix_lr nan", "--beta_mix_lr nan: must be above 0, at most 1"),
        ("--learning_rate 10", "--learning_rate 10.0: must be above 0, at most 1"),
        ("--tokens_per_microbatch -1", "--tokens_per_microbatch -1: must be 0 .*or at least 16"),
        ("--max_grad_norm inf", "--max_grad_norm inf: must be a finite number, 0 .no clipping."),
        ("--max_grad_norm -1", "--max_grad_norm -1.0: must be a finite number, 0 .no clipping."),
        ("--epochs 1e9", "--epochs 1000000000.0: must be above 0, at most 1000"),
        ("--lora_r 100000", "--lora_r 100000: must be 1 to 8192"),
        ("--dry_run -3", "--dry_run -3: must be a number of ranks"),
        ("--warmup_ratio 1.5", "--warmup_ratio 1.5: must be in"),
    ],
)
def test_values_out_of_range_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        arguments.check_args(arguments.parse_args(given.split()), world=1)
    assert Argument("x", float).check(float("nan")) is None  # no range, no check


def test_every_number_has_a_range():
    for argument in (*arguments.RUN, *arguments.OPTIMISATION, *arguments.MODEL):
        if argument.values in (int, float):
            assert argument.range is not None, argument.name
            for value in (float("nan"), -float("inf"), -1):
                assert not argument.range.allows(value), (argument.name, value)
            if argument.values is float:
                assert not argument.range.allows(float("inf")), argument.name


def test_values_at_the_edge_of_their_range_pass():
    argv = "--weight_decay 0 --warmup_ratio 0 --lora_dropout 0 --seed 0 --max_steps 0"
    arguments.check_args(arguments.parse_args([*argv.split(), "--max_length", "16"]), world=1)


def test_help_says_the_default_of_every_loss():
    parameters = arguments.loss_arguments()
    assert parameters["gamma"].help == (
        "simpo: target margin, in units of beta * nats (default 1.0)"
    )
    beta = parameters["beta"].help
    assert beta.startswith("most losses: ") and beta.endswith("; simpo 2.0; sppo_hard 0.001)")
    for name, parameter in parameters.items():
        for loss in arguments.LOSSES:
            default = loss_options.loss_defaults(loss).get(name)
            assert default is None or str(default) in parameter.help, (name, loss)
