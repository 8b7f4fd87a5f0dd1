"""What is found out about a candidate before it is trained with: the work of a worker.

`read_candidate` and `try_on_features` are functions of their arguments alone, so that a candidate's
result does not depend on the worker, on the order or on what came before. Both return JSON. A
candidate that goes no further has `stopped`: {"at": the stage, "why": one line}; what was found out
up to there is beside it.
"""

import math
from collections.abc import Callable

from losses import PairLogps
from pref.discovery import fingerprint, form, printing, proxy, seeds
from pref.discovery.features import Features
from pref.discovery.workers import RESULTS
from pref.files.console import first_line
from pref.training import loss_check

DIGITS = 5  # of a field: far below what NEAR tells apart
# For the warm-up: texts that are refused, and one that the self-test stops.
BROKEN = ("def f(", "def f(pairs):\n    return pairs.rho.mean()\n")
NOT_FINITE = "def f(pairs):\n    return torch.log(pairs.rho)\n"


def read_candidate(job: dict, scale: float) -> dict:
    """Form, self-test and range of a candidate.

    job: {"id", "text", "name", "coupled"}. scale: nats that training visits (fingerprint.py).
    Returns {"id", "stopped", "program", "selftest", "field", "cell", "gradient"}, None for what
    was not found out. A field is there wherever it is finite, also of a candidate that is stopped.
    """
    result = {"id": job["id"], "stopped": None, **dict.fromkeys(RESULTS["read"])}
    # 1) Form: the text becomes a program of ours.
    try:
        program = form.translate(
            job["text"], name=job.get("name"), coupled=bool(job.get("coupled"))
        )
        loss = printing.load(program.text)
    except form.Refusal as refusal:
        return result | {"stopped": stop("form", str(refusal), kind=refusal.kind)}
    result["program"] = {
        name: getattr(program, name) for name in ("name", "text", "sha256", "parameters", "steps")
    }
    # 2) Self-test: shapes, precision, and finite where real steps are.
    report = loss_check.check_function(loss)
    result["selftest"] = report._asdict()
    result["field"] = rounded_field(loss, scale)
    if report.failures:
        return result | {"stopped": stop("selftest", "; ".join(report.failures))}
    # 3) Range: the gradient on the whole grid.
    if problem := fingerprint.range_problem(loss):
        return result | {"stopped": stop("range", problem)}
    return result | {
        "cell": fingerprint.cell(loss),
        "gradient": fingerprint.profile(loss, scale),
    }


def stop(at: str, why: str, **more: str) -> dict:
    return {"at": at, "why": " ".join(why.split()), **more}


def rounded_field(loss: Callable[[PairLogps], tuple], scale: float) -> list[float] | None:
    """The gradient field, or None where it is not finite."""
    try:
        values = fingerprint.field(loss, scale).tolist()
    except loss_check.RAISED:
        return None
    return [round(value, DIGITS) for value in values]


def try_on_features(job: dict, features: Features, batch: int) -> dict:
    """Train the proxy's policy with a candidate's text, once for each seed.

    job: {"id", "text" (printed by us), "seeds", "steps", "learning_rate"}. batch: pairs in a step.
    Returns {"id", "stopped", "accuracy", "bits", "correct", "margins"}, the last four with one
    entry a seed: of `correct` the validation pairs', of `margins` the nats within which 90 % of
    their log-ratios lie.
    """
    result = {"id": job["id"], "stopped": None, **dict.fromkeys(RESULTS["proxy"])}
    try:
        loss = printing.load(job["text"])
    except form.Refusal as refusal:
        return result | {"stopped": stop("form", str(refusal), kind=refusal.kind)}
    outcomes = [
        proxy.train(
            loss,
            features,
            steps=job["steps"],
            batch=batch,
            learning_rate=job["learning_rate"],
            seed=seed,
            part=job.get("part", "val"),
        )
        for seed in job["seeds"]
    ]
    if why := proxy.stop_reason(outcomes):
        result["stopped"] = stop("proxy", why)
    return result | {
        "accuracy": [outcome.accuracy for outcome in outcomes],
        "bits": [finite(outcome.bits) for outcome in outcomes],
        "correct": [outcome.correct.tolist() for outcome in outcomes],
        "margins": [finite(outcome.visited) for outcome in outcomes],
    }


def finite(value: float) -> float | None:
    """A number that JSON has; None for one that it has not."""
    return value if math.isfinite(value) else None


def answer(do: str, job: dict, features: Features | None, scale: float, batch: int) -> dict:
    """The result of a job, do: "read" or "proxy". An exception in a stage stops the candidate."""
    try:
        if do == "read":
            return read_candidate(job, scale)
        return try_on_features(job, features, batch)
    except Exception as error:
        why = f"raises {type(error).__name__}: {first_line(error)}"
        nothing = dict.fromkeys(RESULTS[do])
        return {"id": job["id"], **nothing, "stopped": stop("worker", why)}


def warm_up(features: Features | None, scale: float, batch: int) -> None:
    """Do everything once: what Python and torch import on first use cannot be imported later."""
    for text in (*(seeds.SEEDS[name] for name in seeds.DEFAULT), *BROKEN, NOT_FINITE):
        read = read_candidate({"id": "", "text": text, "name": "warm_up"}, scale)
        if features is not None and read["stopped"] is None:
            job = {"id": "", "text": read["program"]["text"], "seeds": [0, 1]}
            try_on_features(job | {"steps": 2, "learning_rate": 0.1}, features, batch)
