"""A search without a model: on a features file with a part `confirm`, handed in with --features.

Where pairs are made up, no model can be trained on them. The proxy then stands in for it: rungs
"train" it with the rungs' seeds and look at the part `val`, the confirmation with its own seeds and
the part `confirm`, which nothing has looked at before. Everything else of a search is as it is with
a model. Such a file may say how it is to be trained on, in its metadata: `steps`, `batch`,
`learning_rate`.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from pref.discovery import archive, form, seeds
from pref.discovery.features import Features
from pref.discovery.search import Search, working
from pref.discovery.split import Split
from pref.files.console import UserError

DEFAULTS = {"steps": 20, "batch": 16, "learning_rate": 0.3}


class World(NamedTuple):
    """What a features file says of itself."""

    pairs: Split
    steps: int
    batch: int
    learning_rate: float  # in the unit of Features


def read(path: Path) -> World:
    """Raises UserError for a file that cannot be used."""
    found = Features.load(path)
    numbers = {}
    for name, default in DEFAULTS.items():
        text = found.metadata.get(name, str(default))
        try:
            numbers[name] = type(default)(text)
        except ValueError:
            numbers[name] = 0
        if not 0 < numbers[name] < 10**6:
            raise UserError(f"{path}: its metadata have {name} {text!r}; must be a number above 0")
    return World(Split(found.train.pairs, found.val.pairs), **numbers)


def train(
    search: Search, texts: dict[str, str], training_seeds: list[int], part: str = "val"
) -> list[dict]:
    """Id, seed, run_id, status, acc_ref and correct of the proxy trained with each program and
    seed, as rungs.outcome_of gives them of a run.
    """
    jobs = [
        {
            "id": id,
            "text": text,
            "seeds": training_seeds,
            "steps": search.proxy_steps,
            "learning_rate": search.proxy_rate,
            "part": part,
        }
        for id, text in texts.items()
    ]
    with working(search) as workers:
        results = workers.proxy(jobs)
    found = []
    for result in results:
        rows = result.get("correct") or [None] * len(training_seeds)
        for seed, row in zip(training_seeds, rows):
            one = {"id": result["id"], "seed": seed, "run_id": f"proxy_{result['id']}_s{seed}"}
            if row is None:  # its worker ended
                found.append(one | {"status": "diverged", "acc_ref": None, "correct": None})
                continue
            accuracy, correct = float(np.mean(row)), archive.encode(row)
            found.append(one | {"status": "finished", "acc_ref": accuracy, "correct": correct})
    return found


def tables(
    search: Search, texts: dict[str, str], training_seeds: list[int], part: str
) -> dict[str, np.ndarray]:
    """(seeds, pairs) of 1, 0.5 and 0 by id; a program that could not be trained is right half of
    the time.
    """
    runs = train(search, texts, training_seeds, part)
    known = [archive.decode(run["correct"]) for run in runs if run["correct"] is not None]
    chance = np.full(len(known[0]) if known else 1, 0.5)
    rows: dict[str, list[np.ndarray]] = {id: [] for id in texts}
    for run in runs:
        correct = run["correct"]
        rows[run["id"]].append(chance if correct is None else archive.decode(correct))
    return {id: np.stack(of_id) for id, of_id in rows.items()}


def dpo_text(beta: float) -> str:
    """DPO with another beta, as a program."""
    default = "beta: float = 0.1"
    assert default in seeds.SEEDS["dpo"]
    return form.translate(seeds.SEEDS["dpo"].replace(default, f"beta: float = {beta!r}")).text
