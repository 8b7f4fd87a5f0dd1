"""How often the whole analysis finds a difference between losses that do not differ.

    python bench/null_simulation.py                      about ten minutes on one core
    python bench/null_simulation.py --studies 50

A study: one loss under several names, each with three seeds, at one beta or at four; the untrained
model; 100 held-out questions, two answers to each, whose score is the share of two constraints met.
analyze.py's own `compare` judges it: the best cell of each name by validation accuracy against
dpo's best, Holm's correction, what chance gives the best of more cells, the opening statement, and
two claims, that the second name gains or loses more than nothing. What bench/calibration.py says of
the tests, this says of what a user reads.

The chance that an answer meets a constraint is

    sigmoid(level[name, beta] + question[q] + name_by_question[name, q] + seed[name, beta, s])

with SDs 1.2, 0.3 and the stated one. In "curve" the level depends on beta (0, 0.3, 0.15, -0.3 over
the four), so that names which select another beta by validation accuracy do differ: the statement
about the two cells is then true, and one about losses is not. Validation accuracy is a share of 60
pairs, higher where the level is, and noisy. "planted" lowers the second name's level such that its
score is lower by about what is stated.

Columns: how often the opening statement finds that one name is better; any sentence of the answers
does; a claim is supported. Monte-Carlo error of a rate near 0.05 over 200 studies: 0.015.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import special

sys.path.insert(0, str(Path(__file__).parent.parent))
import analyze
from pref.analysis.parts import Sources
from pref.analysis.runs import BenchFiles, Margins, Run

BENCH = "constraints"
QUESTIONS, CHOICES, CONSTRAINTS, PAIRS = 100, 2, 2, 60
QUESTION_SD, NAME_BY_QUESTION_SD = 1.2, 0.3
BETAS = (0.05, 0.1, 0.3, 0.5)
CURVE = (0.0, 0.3, 0.15, -0.3)  # level over the four betas
GAIN = 0.6  # of training, over the untrained model
POINT = 0.19  # of score, for a level of 1 near a score of 0.5 in this world
NAMES = ("dpo", "again", "third")
JUDGE = {
    "grading": "program",
    "judge": f"py:{BENCH}.py",
    "judge_id": "c0ffee",
    "judge_settings": "{}",
    "prompts": BENCH,
    "refs": "original",
}
CLAIMS = [
    {
        "id": name,
        "claim": f"The second name {name}.",
        "kind": "difference",
        "metric": "task",
        "a": {"loss": one, "beta": "best"},
        "b": {"loss": other, "beta": "best"},
        "at_least": 0,
    }
    for name, one, other in (("gains", "again", "dpo"), ("loses", "dpo", "again"))
]


class Design(NamedTuple):
    names: int = 2
    betas: int = 1
    seed_sd: float = 0.1
    curve: bool = False
    own_seeds: bool = True  # each name has seeds of its own; else all have the same numbers
    planted: float = 0.0  # points of score by which the second name is lower


# ---- a study -------------------------------------------------------------------------------------


def simulate(rng, design: Design) -> list[Run]:
    """The runs of a study, with scores and validation pairs."""
    question = rng.normal(0, QUESTION_SD, QUESTIONS)
    runs = [make_run("base", None, None, None, scores(rng, question), None)]
    for number, name in enumerate(NAMES[: design.names]):
        by_question = question + rng.normal(0, NAME_BY_QUESTION_SD, QUESTIONS)
        lowered = design.planted / POINT if number == 1 else 0.0
        for beta, shift in list(zip(BETAS, CURVE))[: design.betas]:
            for s in range(3):
                seed = 42 + s + (3 * number if design.own_seeds else 0)
                level = GAIN - lowered + (shift if design.curve else 0.0)
                level += rng.normal(0, design.seed_sd)
                hits = rng.normal(0.3 + 0.3 * level, 1, PAIRS)
                given = scores(rng, by_question + level)
                runs.append(make_run(name, beta, seed, f"{name}_b{beta}_s{seed}", given, hits))
    return runs


def scores(rng, latent: np.ndarray) -> np.ndarray:
    """(Q, choices) shares of constraints met."""
    chance = special.expit(latent)[:, None]
    return rng.binomial(CONSTRAINTS, chance, (len(latent), CHOICES)) / CONSTRAINTS


def make_run(loss, beta, seed, run_id, given: np.ndarray, hits: np.ndarray | None) -> Run:
    """A run as results_folder.py reads it from disk. Without a seed it is the untrained model."""
    rows = [
        {"question_id": q, "choice": choice, "score": float(score), **FIELDS}
        for q, by_choice in enumerate(given, 1)
        for choice, score in enumerate(by_choice)
    ]
    trained = seed is not None
    args = {"loss": loss if trained else None, "beta": beta, "tau": None, "seed": seed}
    args |= {"mode": "full", "model": "simulated", "data_sha256": {"train": "a1"}}
    run_id = run_id or loss
    val, summary = {}, None
    if trained:
        val = {20.0: {f"p{i}": Margins(hit, hit) for i, hit in enumerate(hits)}}
        accuracy = float((hits > 0).mean())
        names = ("best_acc_ref", "final_acc_ref", "final_acc_sum", "final_acc_mean")
        summary = dict.fromkeys(analyze.results_folder.SUMMARY_KEYS) | dict.fromkeys(
            names, accuracy
        )
        summary |= {"best_step": 20.0, "steps": 20, "nonfinite_steps": 0}
    return Run(
        run_id=run_id,
        path=Path(run_id),
        loss=loss,
        args=args,
        settings={"learning_rate": 1e-5},
        status="finished" if trained else "untrained",
        summary=summary,
        val=val,
        benches={BENCH: BenchFiles(rewards=rows)},
    )


FIELDS = dict.fromkeys(analyze.results_folder.judgements.JUDGEMENT_COLUMNS)
FIELDS |= {"turn": 1, "repeat": 0, "category": "made up", "status": "ok", "bench": BENCH, **JUDGE}
for varying in ("question_id", "choice", "score"):
    del FIELDS[varying]


# ---- what the analysis says of it ----------------------------------------------------------------


class Found(NamedTuple):
    opening: bool  # the statement says that one name is better
    answers: bool  # the answers by score do, of task or validation accuracy
    claim: bool  # one of CLAIMS is supported
    right: bool  # the opening says that the second name is worse


def judge(runs: list[Run], args: argparse.Namespace) -> Found:
    comparison = analyze.compare(runs, args, [], Sources({}))
    opening = comparison["answer"]
    cells = {
        cell["label"]: cell["loss"] for (part,) in [comparison["task"]] for cell in part["cells"]
    }
    sides = [cells.get(opening[side]) for side in ("a", "b")]
    between = opening["verdict"] not in ("undecided", "not measured") and "base" not in sides
    verdicts = [
        row["verdict"]
        for found in comparison["answers"]
        for row in found["rows"]
        if "base" not in row["text"]
    ]
    claims = {row["id"]: row["verdict"] for row in comparison["claims"]}
    return Found(
        opening=between,
        answers=bool({"better", "worse"} & set(verdicts)),
        claim="supported" in [claims[claim["id"]] for claim in CLAIMS],
        right=between and sides[1] == "again",
    )


def rates(studies: int, design: Design, args: argparse.Namespace) -> Found:
    """Shares of the studies."""
    numbers = [int(1000 * value) for value in design]
    rng = np.random.default_rng([1, *numbers])
    found = [judge(simulate(rng, design), args) for _ in range(studies)]
    return Found(*np.mean(found, axis=0))


DESIGNS = [
    *(Design(seed_sd=sd) for sd in (0.05, 0.2, 0.5)),
    *(Design(names=3, betas=4, seed_sd=sd) for sd in (0.05, 0.2, 0.5)),
    *(Design(names=3, betas=4, seed_sd=sd, own_seeds=False) for sd in (0.05, 0.2)),
    *(Design(names=3, betas=4, seed_sd=sd, curve=True) for sd in (0.05, 0.2)),
    *(Design(seed_sd=sd, planted=size) for size in (0.05, 0.1) for sd in (0.05, 0.2)),
    *(Design(names=3, betas=4, seed_sd=0.05, planted=size) for size in (0.05, 0.1)),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", type=int, default=200, help="per row (default: 200)")
    studies = parser.parse_args().studies
    columns = ("names", "betas", "seed SD", "world", "planted", "opening", "answers", "claim")
    print(f"| {' | '.join([*columns, 'second is worse'])} |")
    print("|" + "---|" * (len(columns) + 1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "claims.json"
        path.write_text(json.dumps(CLAIMS), encoding="utf-8")
        args = analyze.parse_args([folder, "--claims", str(path), "--draws", "200"])
        for design in DESIGNS:
            found = rates(studies, design, args)
            seeds = "own seeds" if design.own_seeds else "same seeds"
            world = f"{'curve' if design.curve else 'flat'}, {seeds}"
            cells = [design.names, design.betas, design.seed_sd, world, design.planted or ""]
            shown = [f"{rate:.3f}" for rate in found]
            print(f"| {' | '.join(map(str, [*cells, *shown]))} |", flush=True)


if __name__ == "__main__":
    main()
