"""What the restricted form consists of: its limits, its operations, its programs and its refusals.

A program is a list of `Step`s. Everything that a printed program can do stands in the tables below;
what does not stand here cannot be said.
"""

from typing import Literal, NamedTuple

# The limits of a text and of what it comes to.
MAX_CHARACTERS = 6000
MAX_BRACKETS = 30  # one inside the other
MAX_NODES = 800  # of the syntax tree
MAX_DEPTH = 150  # of the syntax tree: 1 + 1 + 1 ... nests without brackets
MAX_STEPS = 96
MAX_PARAMETERS = 6
MAX_NAME = 40
MAX_MESSAGE = 400
SMALLEST, LARGEST = 1e-9, 1e6  # size of a number other than 0
LARGEST_POWER = 8

Kind = Literal["number", "stat", "tensor", "mask"]
# number: a Python float, the same for all pairs. stat: one value a batch. tensor: one value a pair,
# (B,). mask: true or false for each pair, (B,).


class Refusal(Exception):
    """A text outside the form. `str()` is one line: place, fact, remedy."""

    def __init__(
        self, kind: Literal["syntax", "form", "type", "size"], message: str, line: int | None = None
    ):
        message = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]} ..."
        super().__init__(message if line is None else f"line {line}: {message}")
        self.kind, self.line = kind, line


class Step(NamedTuple):
    """One step of a program. `args` and the values of `keywords` are places in the list of steps,
    all before this one.
    """

    op: str  # "number", "parameter", "input", a sign of SIGNS, or the text of a call: "torch.exp"
    args: tuple[int, ...] = ()
    keywords: tuple[tuple[str, int], ...] = ()
    value: float | str | None = None  # of a number; the name of a parameter or of an input
    of_mean: bool = False  # an input of pairs.mean()


class Program(NamedTuple):
    """A text in the form, printed by us."""

    name: str
    text: str  # a file for train_pref.py --loss_file; ends in a newline
    sha256: str  # of `text`
    parameters: dict[str, float]  # with an effect, by their names in `text`, and their defaults
    steps: int  # operations that the result needs
    coupled: bool  # the loss of a pair depends on other pairs


FIELDS = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_tokens", "rejected_tokens")
MARGINS = ("rho", "delta")
LOG_RATIOS = ("a", "b")  # of pairs.log_ratios
POLICY = {"chosen", "rejected", *MARGINS, *LOG_RATIOS}  # inputs that carry a gradient
RUNNING = "running_rho"  # of earlier steps; a number whose value is not known in advance

# Text of the call for tensors, and for numbers, which torch's functions do not take.
FUNCTIONS: dict[str, tuple[str, str | None]] = {
    "exp": ("torch.exp", "math.exp"),
    "expm1": ("torch.expm1", "math.expm1"),
    "log": ("torch.log", "math.log"),
    "log1p": ("torch.log1p", "math.log1p"),
    "sqrt": ("torch.sqrt", "math.sqrt"),
    "tanh": ("torch.tanh", "math.tanh"),
    "erf": ("torch.erf", "math.erf"),
    "atan": ("torch.atan", "math.atan"),
    "abs": ("torch.abs", "math.fabs"),
    "fabs": ("torch.abs", "math.fabs"),
    "sigmoid": ("torch.sigmoid", None),
    "relu": ("torch.relu", None),
    "square": ("torch.square", None),
    "sign": ("torch.sign", None),
    "reciprocal": ("torch.reciprocal", None),
    "logsigmoid": ("F.logsigmoid", None),
    "softplus": ("F.softplus", None),
    "silu": ("F.silu", None),
    "softsign": ("F.softsign", None),
    "elu": ("F.elu", None),
    "leaky_relu": ("F.leaky_relu", None),
    "zeros_like": ("torch.zeros_like", None),
    "ones_like": ("torch.ones_like", None),
}
KEYWORDS = {"elu": "alpha", "leaky_relu": "negative_slope"}  # and clamp's min and max
OF_TWO = {
    "maximum": "torch.maximum",
    "minimum": "torch.minimum",
    "max": "torch.maximum",
    "min": "torch.minimum",
    "logaddexp": "torch.logaddexp",
}
STATISTICS = {"mean": "torch.mean", "var": "torch.var", "std": "torch.std"}  # with `coupled`
NEED_TWO_PAIRS = {"torch.var", "torch.std"}
NO_GRADIENT = {"torch.sign", "torch.zeros_like", "torch.ones_like", "detach"}
# Functions that make one value of a batch; those of STATISTICS exist with `coupled`.
REDUCING = {"sum", "median", "prod", "norm", "amax", "amin", "logsumexp", "argmax", "argmin"}
REDUCING |= {"nanmean", "nansum", "quantile", "aminmax", "std_mean", "var_mean", "all", "any"}
REDUCING |= {"softmax", "log_softmax", "cumsum", "cumprod", *STATISTICS}

SIGNS = ("+", "-", "*", "/", "**", "<", ">", "<=", ">=", "&", "|", "~", "negative")
COMPARISONS = {"<", ">", "<=", ">="}


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Names that a printed program uses itself.
PRINTED_NAMES = {"torch", "F", "math", "pairs", "means", "float", "len", "ValueError", "_"}
# Names that losses.py has; train_pref.py --loss_file refuses a second loss of the same name.
TAKEN_LOSSES = words(
    """td_dpo dpo dpo_kl robust discopop dlrml ipo hinge slic simpo orpo cpo exo_pair nca_pair
    bco_pair sppo_hard aot aot_unpaired apo_zero apo_down kto_pair rpo dpop beta_dpo dbaql aql aqfl
    padll cell pfl sft"""
)
# Arguments of train_pref.py, which a parameter of a loss cannot be called.
TAKEN_ARGUMENTS = words(
    """append_eos beta_mix_lr checkpointing compile data discopop_form dry_run dtype epochs
    eval_steps freeze global_batch gpu gpu_gib help init_adapter kl learn_beta_mix learning_rate
    logp lora_alpha lora_dropout lora_r lora_targets loraplus_lr_ratio loss loss_file margin
    max_bad_pairs max_grad_norm max_length max_nonfinite max_steps mfu mode model optim packing
    per_device_batch plan_json prefix_sharing quant reference
    reference_model report_to results_dir round run_id save_steps score score_alpha
    score_masked_log score_smoothing seed shard status tokens_per_microbatch truncation
    tune use_rslora warmup_ratio weight_decay"""
)
# Parameters that losses of losses.py have too, and the values that train_pref.py allows them: from
# the first up to but not including the second, 0 itself only where the third says so.
SHARED_PARAMETERS: dict[str, tuple[float, float, bool]] = {
    "beta": (0.0, float("inf"), False),
    "tau": (0.0, float("inf"), False),
    "beta_mix": (0.0, float("inf"), True),
    "discopop_tau": (0.0, float("inf"), False),
    "label_smoothing": (0.0, 0.5, True),
    "orpo_lambda": (0.0, float("inf"), True),
    "dpop_lambda": (0.0, float("inf"), True),
    "sft_coef": (0.0, float("inf"), True),
}


def describe(coupled: bool = False) -> str:
    """The form in plain text, for a model that is to write in it."""
    functions = sorted({name for name in FUNCTIONS if name != "fabs"} - KEYWORDS.keys())
    lines = [
        "One function: def name(pairs, *, beta: float = 0.1, ...), with at most "
        f"{MAX_PARAMETERS} numeric parameters. Imports: torch, torch.nn.functional as F, math.",
        "Statements: assignments to plain names (also x += y, and a, b = pairs.log_ratios), then "
        'one `return losses` or `return losses, {"preference": losses}`.',
        "No if, loop, lambda, comprehension, subscript, helper function, class or text; "
        "torch.where instead of if.",
        f"Inputs, one value a pair: {', '.join(f'pairs.{x}' for x in (*FIELDS, *MARGINS))}, "
        "pairs.log_ratios (a of the chosen, b of the rejected response); the same of "
        "pairs.mean(), averaged over each response's tokens.",
        f"Numbers: 0, or {SMALLEST:g} to {LARGEST:g} in size.",
        "Operators: + - * / < > <= >= & | ~, and ** with a number or parameter of at most "
        f"{LARGEST_POWER} as exponent.",
        f"Functions of tensors (torch.x, F.x or x.name()): {', '.join(functions)}, "
        "elu(x, alpha=), leaky_relu(x, negative_slope=), clamp(x, min=, max=), maximum(x, y), "
        "minimum(x, y), logaddexp(x, y), where(mask, x, y), detach().",
        "Functions of parameters: math.exp, expm1, log, log1p, sqrt, tanh, erf, atan, fabs.",
    ]
    if coupled:
        lines.append(
            "Statistics of the batch: mean, var, std, x.sort().values, and pairs.running_rho."
        )
    else:
        lines.append("No statistic of the batch: no mean, sum, var, std, sort.")
    lines.append(f"At most {MAX_CHARACTERS:,} ASCII characters and {MAX_STEPS} operations.")
    return "\n".join(lines)
