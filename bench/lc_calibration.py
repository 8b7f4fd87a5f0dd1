"""How often a difference of length-controlled win rates errs, on simulated studies.

    python bench/lc_calibration.py                                     40 minutes on one core
    python bench/lc_calibration.py --studies 100
    python bench/lc_calibration.py --annotations annotations.csv --gamed df_gamed.csv

A study: two methods, 2 or 3 seeds of each, 805 or 200 instructions, every run compared with the
baseline of AlpacaEval. Each run gets its length-controlled win rate (length_control.fit); the
difference of the methods is stats.difference of the influences, as analyze.py has it.

The preference for answer q of seed s of method m has the expectation

    sigmoid(w1 t + w2 d + w3),  w3 = level[m] + seed[m, s],  t = tanh(delta / sd(delta))

so the length-controlled rates of two methods are equal if their levels are, however long their
answers are. Around it the preference follows a beta distribution whose variance is 0.63 of that of
a coin, with most values near 0 or 1 (published annotations: 0.56 to 0.72, without one of nine). Two
runs judge an instruction alike beyond that: ranks correlate 0.7 between seeds of a method and 0.4
between methods (published: 0.33 to 0.44 between three models of one recipe). Lengths are log-normal
(SD 1 for the baseline, 0.5 for the ratio). "longer": the answers of method b are 1.6 times as long.

The gamed baselines follow the same length effect w1 in the world "same effect". In "other effect"
theirs is twice as strong, as in the published annotations of good models (-0.9 against -1.8).

--annotations takes lengths, difficulties and gamed rows from AlpacaEval's files: instructions are
drawn with replacement, and the two methods have the lengths of the two models given with --models,
and the weights of the first. The preferences are simulated as before.

Columns: how often a difference is found where levels are equal; how often the 95 % interval covers
the true difference (0); mean of the estimates in points; the ratio of the estimates' standard
deviation to the mean standard error; the rate and the mean of `lc_unregularised`, which leaves the
gamed rows out; how often a true difference of 4 and 8 points is found. Monte Carlo error of a rate
near 0.05 over 400 studies: 0.011.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import special

sys.path.insert(0, str(Path(__file__).parent.parent))
import lc_parity

from pref.analysis import length_control, stats
from pref.files import alpaca_eval
from pref.files.alpaca_eval import Gamed

SEED_SDS = (0.5, 1.0, 2.0, 4.0)  # of a run's length-controlled rate, in points
WEIGHTS = (-0.95, 0.7, 0.2)  # length, difficulty, level: a run near 53
BETA = 0.59  # of the beta distribution: variance p (1 - p) / (1 + BETA)
COMMON, METHOD = 0.4, 0.3  # shares of the variance of ranks: of the instruction, of its method
LONGER = 1.6


class Instructions(NamedTuple):
    """What a world knows of its instructions."""

    difficulty: np.ndarray  # (n,)
    len_baseline: np.ndarray  # (n,)
    len_runs: tuple[np.ndarray, np.ndarray] | None  # of methods a and b; None: drawn for each run
    gamed: Gamed


class Design(NamedTuple):
    questions: int = 805
    seeds: int = 3
    seed_sd: float = 1.0
    ratio: float = 1.0  # length of b's answers to a's
    effect: float = 0.0  # true difference of b and a in points


# ---- worlds --------------------------------------------------------------------------------------


def draw_preferences(rng, rate: np.ndarray, rank: np.ndarray | None = None) -> np.ndarray:
    """Beta-distributed preferences with expectation `rate`; rank: their standard normal ranks."""
    rank = rng.normal(size=rate.shape) if rank is None else rank
    return special.betaincinv(BETA * rate, BETA * (1 - rate), special.ndtr(rank))


def made_up_instructions(gamed_effect: float, n: int, rng) -> Instructions:
    """n instructions, and the gamed baselines' rows on them, whose length effect is given."""
    difficulty = rng.normal(0, 1.4, n)
    len_baseline = np.rint(np.exp(rng.normal(7.4, 0.7, n)))
    parts = []
    for ratio in (1.5, 0.4):  # verbose, concise
        delta = len_baseline - len_baseline * ratio * np.exp(rng.normal(0, 0.3, n))
        t = np.tanh(delta / delta.std(ddof=1))
        rate = special.expit(gamed_effect * t + WEIGHTS[1] * difficulty)
        parts.append(Gamed(draw_preferences(rng, rate), t, difficulty))
    return Instructions(
        difficulty, len_baseline, None, Gamed(*(np.concatenate(part) for part in zip(*parts)))
    )


def published_instructions(path: Path, gamed_path: Path, models: list[str]) -> tuple:
    """(Instructions, weights) from annotations of two models; the weights are the first one's."""
    gamed = alpaca_eval.read_gamed(gamed_path)
    annotated = lc_parity.read_annotations(path)
    a, b = (annotated[model] for model in models)
    shared = sorted(set(a) & set(b))
    lengths = np.array([[a[i].len_baseline, a[i].len_model, b[i].len_model] for i in shared]).T
    difficulty = np.array([gamed.difficulty[i] for i in shared])
    fitted = length_control.fit([a[i].y for i in shared], *lengths[:2], difficulty)
    instructions = Instructions(difficulty, lengths[0], (lengths[1], lengths[2]), gamed.rows)
    return instructions, tuple(fitted.weights)


def simulate(rng, design: Design, instructions: Instructions, weights: tuple) -> np.ndarray:
    """(2, 2, S, Q) influences in one study: with and without gamed rows; of methods a and b."""
    n, w1, w2, level = design.questions, *weights
    there = len(instructions.difficulty)
    drawn = np.sort(rng.choice(there, n, replace=instructions.len_runs is not None))
    difficulty, len_baseline = instructions.difficulty[drawn], instructions.len_baseline[drawn]
    at = special.expit(w2 * instructions.difficulty + level)
    per_point = 0.01 / (at * (1 - at)).mean()  # change of the level that makes a point
    common = rng.normal(0, np.sqrt(COMMON), n)
    tables = []
    for method in (0, 1):
        own = rng.normal(0, np.sqrt(METHOD), n)
        log_ratio = np.log(design.ratio) * method + rng.normal(0, 0.35, n)
        rows = []
        for _ in range(design.seeds):
            w3 = level + per_point * (method * design.effect + rng.normal(0, design.seed_sd))
            ratio = np.exp(log_ratio + rng.normal(0, 0.35, n))
            len_run = np.rint(len_baseline * ratio)
            if instructions.len_runs:
                len_run = np.rint(instructions.len_runs[method][drawn] * design.ratio**method)
            delta = len_baseline - len_run
            rate = special.expit(w1 * np.tanh(delta / delta.std(ddof=1)) + w2 * difficulty + w3)
            rank = common + own + rng.normal(0, np.sqrt(1 - COMMON - METHOD), n)
            y = draw_preferences(rng, rate, rank)
            run = (y, len_baseline, len_run, difficulty)
            fits = (length_control.fit(*run, gamed) for gamed in (instructions.gamed, None))
            rows.append([fitted.influence for fitted in fits])
        tables.append(np.array(rows))  # (S, 2, Q)
    return np.moveaxis(np.array(tables), 2, 0)


# ---- tables --------------------------------------------------------------------------------------


def compare(studies: int, design: Design, world) -> dict:
    """Rates over simulated studies. world: a function of a generator -> (Instructions, weights)."""
    parts = (*design[:2], round(10 * design.seed_sd), round(10 * design.ratio), design.effect)
    rng = np.random.default_rng([int(part) for part in parts])
    found, cover, estimates, errors, alone = [], [], [], [], []
    for _ in range(studies):
        tables = simulate(rng, design, *world(rng))
        difference, unregularised = (stats.difference(b, a, paired=True) for a, b in tables)
        found.append(difference.p() < stats.ALPHA)
        cover.append(difference.low <= design.effect <= difference.high)
        estimates.append(difference.estimate)
        errors.append(difference.se)
        alone.append(unregularised)
    return {
        "found": np.mean(found),
        "covered": np.mean(cover),
        "mean": np.mean(estimates),
        "sd_to_se": np.std(estimates, ddof=1) / np.sqrt(np.mean(np.square(errors))),
        "found_alone": np.mean([one.p() < stats.ALPHA for one in alone]),
        "mean_alone": np.mean([one.estimate for one in alone]),
    }


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def print_table(studies: int, name: str, world, designs: list[Design], powers: bool) -> None:
    for design in designs:
        null = compare(studies, design, world)
        found = ["", ""]
        if powers and design.ratio == 1:
            found = [
                f"{compare(studies // 2, design._replace(effect=effect), world)['found']:.2f}"
                for effect in (4, 8)
            ]
        print_row(
            *(name, f"{design.questions}", f"{design.seeds}", f"{design.seed_sd}"),
            *("equal" if design.ratio == 1 else f"b {design.ratio} times", f"{null['found']:.3f}"),
            *(f"{null['covered']:.3f}", f"{null['mean']:+.2f}", f"{null['sd_to_se']:.2f}"),
            *(f"{null['found_alone']:.3f}", f"{null['mean_alone']:+.2f}", *found),
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--studies", type=int, default=400, help="simulated studies per row (default: 400)")
    add("--seed_sds", type=float, nargs="+", default=SEED_SDS, help="(default: %(default)s)")
    add("--annotations", type=Path, metavar="FILE", help="as bench/lc_parity.py takes them")
    add("--gamed", type=Path, metavar="FILE", help="AlpacaEval's df_gamed.csv")
    add("--models", nargs=2, metavar="NAME", help="two models in the annotations: a and b")
    args = parser.parse_args()
    if args.annotations and not (args.gamed and args.models):
        parser.error("--annotations needs --gamed and --models")
    return args


def main() -> None:
    args = parse_args()
    columns = ("world", "instructions", "seeds", "seed SD", "lengths", "no difference: found")
    columns += ("interval covers", "mean", "SD / SE", "without gamed rows: found", "mean")
    columns += ("4 points are found", "8 points")
    print_row(*columns)
    print("|" + "---|" * len(columns))
    if args.annotations:
        world = published_instructions(args.annotations, args.gamed, args.models)
        designs = [
            Design(questions, seeds, sd)
            for questions in (805, 200)
            for seeds in (3, 2)
            for sd in args.seed_sds
        ]
        print_table(args.studies, "published", lambda rng: world, designs, powers=False)
        return
    for name, gamed_effect in (("same effect", WEIGHTS[0]), ("other effect", 2 * WEIGHTS[0])):

        def world(rng, effect=gamed_effect):
            return made_up_instructions(effect, 805, rng), WEIGHTS

        designs = [
            Design(questions, seeds, sd, ratio)
            for questions in (805, 200)
            for seeds in (3, 2)
            for ratio in (1.0, LONGER)
            for sd in args.seed_sds
        ]
        if gamed_effect != WEIGHTS[0]:
            designs = [design for design in designs if design.seeds == 3 and design.ratio != 1]
        print_table(args.studies, name, world, designs, powers=name == "same effect")


if __name__ == "__main__":
    main()
