"""Losses as train_pref.py uses them: their parameters and ranges, a loss with its parameters bound,
and losses from the user's own file.
"""

import importlib.util
import inspect
import math
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from losses import KL_CHOICES, LOSSES, SFT_TERM, PairLogps, Terms, chosen_score
from pref.model import token_scores
from pref.training.declaration import AT_LEAST_0, BELOW_1, FINITE, Argument, Range

DIVISOR = Range(lambda x: 0 < x < math.inf, "above 0 (the margin is divided by it)")
BELOW_HALF = Range(lambda x: 0 <= x < 0.5, "in [0, 0.5)")
ABOVE_1 = Range(lambda x: 1 < x < math.inf, "above 1 (at 1 the score is constant)")


# Parameters of the losses in losses.py; one that is not given takes the default in the signature of
# its loss. Tags appear in the run id in this order.
PARAMETERS = (
    Argument("beta", float, range=AT_LEAST_0, tag="b").describe(
        "weight of the reference; for dlrml this is beta_kl"
    ),
    Argument("tau", float, range=DIVISOR, tag="t").describe("temperature of the margin, nats"),
    Argument("beta_mix", float, range=AT_LEAST_0, tag="mix").describe("beta of the mixing weight"),
    Argument("learn_beta_mix", bool, False, tag="learn").describe(
        "dlrml: train beta_mix, starting at --beta_mix"
    ),
    Argument("discopop_tau", float, range=DIVISOR, tag="t").describe(
        "temperature of the mixing weight"
    ),
    Argument("discopop_form", ("stable", "published"), tag="").describe(
        "published: overflows, for the instability study"
    ),
    Argument("label_smoothing", float, range=BELOW_HALF, tag="ls").describe(
        "fraction of pairs assumed to be mislabelled"
    ),
    Argument("margin", ("free", "ref"), tag="m").describe(
        "margin without or against the reference"
    ),
    Argument("kl", KL_CHOICES, tag="").describe("anchor to the reference"),
    Argument("gamma", float, range=FINITE, tag="g").describe(
        "target margin, in units of beta * nats"
    ),
    Argument("slic_delta", float, range=FINITE, tag="d").describe("target margin, nats"),
    Argument("orpo_lambda", float, range=AT_LEAST_0, tag="l").describe("weight of the odds ratio"),
    Argument("dpop_lambda", float, range=AT_LEAST_0, tag="l").describe(
        "weight of the penalty on a chosen response that becomes less likely"
    ),
    Argument("beta_dpo_alpha", float, range=FINITE, tag="al").describe(
        "how strongly beta follows the batch"
    ),
    Argument("logp", ("sum", "mean"), tag="").describe(
        "log-probabilities summed or averaged over response tokens"
    ),
    Argument("sft_coef", float, range=AT_LEAST_0, tag="sft").describe(
        "weight of score_c, an SFT term on the chosen response"
    ),
    Argument("score", token_scores.SCORES, tag="").describe("proper scoring rule of score_c"),
    Argument("score_alpha", float, range=ABOVE_1, tag="sa").describe(
        "power of alpha_power and pseudo_spherical, above 1"
    ),
    Argument("score_smoothing", float, range=BELOW_1, tag="ss").describe(
        "label smoothing of the score over the vocabulary"
    ),
    Argument("score_masked_log", float, range=AT_LEAST_0, tag="sm").describe(
        "weight and threshold of the masked log term (0.1 in its paper; 0: none)"
    ),
)


def own_defaults(loss: Callable) -> dict:
    """The keyword parameters of a loss function and their defaults, read from its signature."""
    parameters = inspect.signature(loss).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def loss_defaults(name: str) -> dict:
    """All parameters of loss `name` and their defaults: those of the SFT term, then its own."""
    defaults = {**SFT_TERM, **own_defaults(LOSSES[name])}
    if name == "sft":  # its score is the whole loss
        del defaults["sft_coef"]
    return defaults


def bind(name: str, parameters: dict) -> Callable[[PairLogps], tuple[Tensor, Terms]]:
    """Loss `name` as a function of the pairs alone, plus the SFT term if `parameters` ask for it.

    rpo, cpo and slic have a `sft_coef` in their signature and add the term themselves; for the
    others it is added here.
    """
    own = own_defaults(LOSSES[name])
    own_parameters = {key: parameters[key] for key in own if key in parameters}
    coefficient = 0.0 if "sft_coef" in own else parameters.get("sft_coef", 0.0)

    def loss(pairs: PairLogps) -> tuple[Tensor, Terms]:
        losses, terms = LOSSES[name](pairs, **own_parameters)
        if not coefficient:
            return losses, terms
        score = chosen_score(pairs)
        return losses + coefficient * score, {**terms, "score": score}

    return loss


def check_parameters(name: str, parameters: dict) -> None:
    """Raise ValueError, naming the parameter, if loss `name` is not defined for `parameters`."""
    for argument in PARAMETERS:
        if argument.name in parameters:
            argument.check(parameters[argument.name])
    if name == "exo_pair" and parameters.get("label_smoothing") == 0:
        raise ValueError("--label_smoothing 0.0: must be above 0 (its logarithm is taken)")
    if name not in ("td_dpo", "dpo_kl") and parameters.get("beta") == 0:
        raise ValueError(f"--beta 0: {name} has no gradient at beta 0")


FROM_FILES: set[str] = set()  # names of the losses that load_loss_file added to LOSSES


def load_loss_file(spec: str) -> str:
    """Add the function of 'FILE.py:NAME' to LOSSES and return its name. Executes the file.

    Raises ValueError if the file or the function does not exist, if its signature is not that of a
    loss, or if a loss in losses.py already has the name.
    """
    # 1) The name, before anything is executed.
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise ValueError(f"{spec}: write it as FILE.py:FUNCTION")
    if name in LOSSES and name not in FROM_FILES:
        raise ValueError(f"{spec}: {name} is a loss in losses.py; give yours another name")
    # 2) The file, as a module of its own. What else its code raises is shown with its traceback.
    loader = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(loader)
    try:
        loader.loader.exec_module(module)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (SyntaxError, ImportError, NameError) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from None
    # 3) The function: pairs first, everything else by keyword.
    loss = getattr(module, name, None)
    if not inspect.isfunction(loss):
        raise ValueError(f"{path}: has no function {name}")
    first, *others = inspect.signature(loss).parameters.values() or [None]
    if first is None or any(p.kind is not p.KEYWORD_ONLY for p in others):
        raise ValueError(f"{path}: write {name} as def {name}(pairs, *, beta: float = 0.1, ...)")
    check_own_parameters(path, name, loss)
    LOSSES[name] = loss
    FROM_FILES.add(name)
    return name


def check_own_parameters(path: str, name: str, loss: Callable) -> None:
    """Raise ValueError for a parameter of `loss` that cannot be a command-line argument, or whose
    type differs from that of another loss's parameter of the same name.
    """
    known = {
        key: default
        for other in LOSSES
        if other != name
        for key, default in loss_defaults(other).items()
    }
    for key, default in own_defaults(loss).items():
        if type(default) not in (float, int, str):
            raise ValueError(
                f"{path}: parameter {key} of {name} needs a number or text as its default"
            )
        if key in known and type(default) is not type(known[key]):
            raise ValueError(
                f"{path}: parameter {key} of {name} means something else in other losses; rename it"
            )
