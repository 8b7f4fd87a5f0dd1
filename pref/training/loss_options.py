"""a loss by name: parameters, ranges, a file of one's own"""

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from losses import KL_CHOICES, LOSSES, SFT_TERM, PairLogps, Terms, chosen_score
from pref.model import token_scores

PARAMETER_CHOICES = {
    "margin": ("free", "ref"),
    "kl": KL_CHOICES,
    "logp": ("sum", "mean"),
    "discopop_form": ("stable", "published"),
    "score": token_scores.SCORES,
}


def own_defaults(loss: Callable) -> dict:
    """The parameters of a loss function and their defaults, read off its signature."""
    parameters = inspect.signature(loss).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def loss_defaults(name: str) -> dict:
    """Parameters of loss `name` and their defaults: its own, then those of the SFT term."""
    defaults = {**SFT_TERM, **own_defaults(LOSSES[name])}
    if name == "sft":  # the score is the loss
        del defaults["sft_coef"]
    return defaults


def bind(name: str, parameters: dict) -> Callable[[PairLogps], tuple[Tensor, Terms]]:
    """Loss `name` with its parameters, and with the SFT term where the loss itself has none."""
    own = own_defaults(LOSSES[name])
    mine = {key: parameters[key] for key in own if key in parameters}
    coefficient = 0.0 if "sft_coef" in own else parameters.get("sft_coef", 0.0)

    def loss(pairs: PairLogps) -> tuple[Tensor, Terms]:
        losses, terms = LOSSES[name](pairs, **mine)
        if not coefficient:
            return losses, terms
        score = chosen_score(pairs)
        return losses + coefficient * score, {**terms, "score": score}

    return loss


def check_parameters(name: str, parameters: dict) -> None:
    """Raise ValueError, naming the parameter, if `parameters` are outside what loss `name` is
    defined for.
    """

    def need(key: str, right: Callable, words: str) -> None:
        if key in parameters and not right(parameters[key]):
            raise ValueError(f"--{key} {parameters[key]}: must be {words}")

    finite = float("inf")
    for key in ("tau", "discopop_tau"):
        need(key, lambda x: 0 < x < finite, "above 0 (the margin is divided by it)")
    for key in ("beta", "beta_mix", "orpo_lambda", "dpop_lambda", "sft_coef", "score_masked_log"):
        need(key, lambda x: 0 <= x < finite, "a finite number, 0 or above")
    for key in ("gamma", "slic_delta", "beta_dpo_alpha"):
        need(key, lambda x: -finite < x < finite, "a finite number")
    need("label_smoothing", lambda x: 0 <= x < 0.5, "in [0, 0.5)")
    need("score_smoothing", lambda x: 0 <= x < 1, "in [0, 1)")
    need("score_alpha", lambda x: 1 < x < finite, "above 1 (at 1 the score is constant)")
    if name == "exo_pair":
        need("label_smoothing", lambda x: x > 0, "above 0 (its logarithm is taken)")
    if name not in ("td_dpo", "dpo_kl") and parameters.get("beta") == 0:
        raise ValueError(f"--beta 0: {name} has no gradient at beta 0")


FROM_FILES: set[str] = set()  # losses that --loss_file added


def load_loss_file(spec: str) -> str:
    """Add the loss of 'FILE.py:NAME' to LOSSES and return its name. Runs the file: it is the user's
    own code.

    Raises ValueError if the file or function is not there, cannot be a loss, or has a built-in
    loss's name.
    """
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise ValueError(f"{spec}: write it as FILE.py:FUNCTION")
    if name in LOSSES and name not in FROM_FILES:
        raise ValueError(f"{spec}: {name} is a loss of losses.py; give yours another name")
    loader = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(loader)
    try:
        loader.loader.exec_module(module)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (SyntaxError, ImportError, NameError) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from None
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
    """Raise ValueError for a parameter that cannot be an argument, or that another loss means
    otherwise.
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
