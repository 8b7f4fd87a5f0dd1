"""How often analyze.py's statistics err, on simulated studies whose truth is known.

    python bench/calibration.py                  about ten minutes on one core
    python bench/calibration.py --studies 200

A study: 80 questions, 2 or 3 seeds, four losses (a baseline and three others). Two worlds:

normal   The mean rating (both turns) of question q in the run of loss m with seed s is

             level[m] + question[q] + method_by_question[m, q] + common_seed[s] + seed[m, s]
             + rest[m, s, q]

         all normal, SDs: question 1.8, method by question 0.8, seed common to all losses 0.1, seed
         0.08 to 1.0, rest 1.2.
rough    The same sum for each of two turns (rest 1.7 a turn), rounded to 1, 2, ..., 10 and
         averaged. The level is 7.5, so that one mean in ten is a full ten. The seeds of the
         losses differ: their SDs are 0.7 (baseline), 1.4, 1.0 and 0.7 times the stated one. Their
         effects are skewed (a seed may be far below the others: minus an exponential variable) or
         heavy-tailed (Student's t with 3 degrees of freedom). Levels are chosen such that the true
         means of the rounded, capped ratings differ by exactly the stated effect.

Validation accuracy: 750 pairs, right if pair[q] + method_by_pair[m, q] + seed[m, s] + rest[m, s, q]
is above 0, with SDs 1, 0.3, 0.05 or 0.3 (1.7 or 9 points of accuracy) and 0.5.

Cross-beta variance: each loss at four betas whose true means have a stated SD, with the terms of
the normal world for each cell.

A detectable difference is checked as it is used: the median of what the studies print is taken as
the true difference, and studies that find it are counted. Monte-Carlo error of a rate near 0.05
over 2,000 studies: 0.005; near 0.80: 0.009.
"""

import argparse
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import special
from scipy.optimize import brentq

sys.path.insert(0, str(Path(__file__).parent.parent))
from pref.analysis import power, stats, usual_tests, variation

QUESTIONS, SEEDS, PAIRS = 80, 3, 750
SDS = {"question": 1.8, "method_by_question": 0.8, "common_seed": 0.1, "rest": 1.2}
SEED_SDS = (0.08, 0.15, 0.3, 0.5, 1.0)
BETA_PATTERN = np.array([-0.6, 0.2, 0.6, -0.2])  # true means over four betas, before scaling
ROUGH_LEVEL = 7.5
ROUGH_SEED_SDS = (0.7, 1.4, 1.0, 0.7)  # of the baseline and three losses, times the stated one


# ---- worlds: effects of three losses over a baseline -> (4, S, Q) scores ------------------------


class Sizes(NamedTuple):
    seeds: int = SEEDS
    questions: int = QUESTIONS


USUAL = Sizes()


def random_stream(seed: int, seed_sd: float, sizes: Sizes) -> np.random.Generator:
    """Each row of a table has random numbers of its own: chance deviations are not shared."""
    return np.random.default_rng([seed, *sizes, round(1000 * seed_sd)])


def normal_world(rng, effect: float, seed_sd: float, sizes: Sizes) -> np.ndarray:
    return simulate(rng, [5.0, *[5.0 + effect] * 3], seed_sd, sizes)


def simulate(
    rng, levels, seed_sd: float, sizes: Sizes = USUAL, common_sd: float = SDS["common_seed"]
) -> np.ndarray:
    """(M, S, Q) ratings of M cells with the given true means."""
    m, (seeds, questions), draw = len(levels), sizes, rng.normal
    return (
        np.asarray(levels)[:, None, None]
        + draw(0, SDS["question"], questions)
        + draw(0, SDS["method_by_question"], (m, 1, questions))
        + draw(0, common_sd, (seeds, 1))
        + draw(0, seed_sd, (m, seeds, 1))
        + draw(0, SDS["rest"], (m, seeds, questions))
    )


def skewed(rng, shape) -> np.ndarray:
    """Mean 0, SD 1: most seeds a little above the mean, a few far below."""
    return 1 - rng.exponential(size=shape)


def heavy_tailed(rng, shape) -> np.ndarray:
    """Mean 0, SD 1: Student's t with 3 degrees of freedom, scaled."""
    return rng.standard_t(3, size=shape) / np.sqrt(3)


def rough_world(seed_effects: Callable) -> Callable:
    """World of rounded, capped ratings with these seed effects."""

    def generate(rng, effect: float, seed_sd: float, sizes: Sizes) -> np.ndarray:
        seeds, questions = sizes
        levels = rough_levels(seed_effects, effect, seed_sd)
        own_sds = seed_sd * np.array(ROUGH_SEED_SDS)[:, None, None]
        mean = (
            np.array(levels)[:, None, None]
            + rng.normal(0, SDS["question"], questions)
            + rng.normal(0, SDS["method_by_question"], (4, 1, questions))
            + rng.normal(0, SDS["common_seed"], (seeds, 1))
            + own_sds * seed_effects(rng, (4, seeds, 1))
        )
        turns = mean + rng.normal(0, SDS["rest"] * np.sqrt(2), (2, *mean.shape))
        return np.clip(np.rint(turns), 1, 10).mean(0)

    return generate


@lru_cache(maxsize=64)
def rough_levels(seed_effects: Callable, effect: float, seed_sd: float) -> list[float]:
    """Latent levels of four losses whose expected ratings are the baseline's, and `effect` more."""
    effects = seed_effects(np.random.default_rng(0), 20_000)
    sd = np.sqrt(
        SDS["question"] ** 2
        + SDS["method_by_question"] ** 2
        + SDS["common_seed"] ** 2
        + 2 * SDS["rest"] ** 2
    )

    def expected(level: float, own_sd: float) -> float:
        """Of a normal variable rounded to 1, ..., 10: 1 + the sum of P(above 1.5), ..., P(9.5)."""
        latent = level + own_sd * (effects - effects.mean())
        cuts = np.arange(1.5, 10)[:, None]
        return 1 + special.ndtr((latent - cuts) / sd).mean(1).sum()

    own_sds = seed_sd * np.array(ROUGH_SEED_SDS)
    goal = expected(ROUGH_LEVEL, own_sds[0]) + effect

    def excess(level: float, own_sd: float) -> float:
        return expected(level, own_sd) - goal

    return [
        ROUGH_LEVEL,
        *(brentq(excess, -20, 60, args=(own_sd,), xtol=1e-6) for own_sd in own_sds[1:]),
    ]


def accuracy_world(rng, effect: float, seed_sd: float, sizes: Sizes) -> np.ndarray:
    """(4, S, 750) right or wrong of four losses with equal chances."""
    assert effect == 0
    draw, seeds = rng.normal, sizes.seeds
    latent = draw(0.3, 1, PAIRS) + draw(0, 0.3, (4, 1, PAIRS)) + draw(0, seed_sd, (4, seeds, 1))
    return (latent + draw(0, 0.5, (4, seeds, PAIRS)) > 0).astype(float)


WORLDS = {
    "normal": normal_world,
    "rough, skewed": rough_world(skewed),
    "rough, heavy-tailed": rough_world(heavy_tailed),
}


# ---- differences --------------------------------------------------------------------------------


def calibrate_differences(
    studies: int,
    seed_sd: float,
    effect: float = 0.0,
    seed: int = 0,
    sensitivity: int = 0,
    sizes: Sizes = USUAL,
    generate=normal_world,
    paired: bool = True,
) -> dict:
    """Rates over simulated studies in which every loss is `effect` above the baseline; of the usual
    tests over the first `sensitivity` studies. above: how often the whole interval lies above the
    truth (nominally 0.025).
    """
    rng = random_stream(seed, seed_sd, sizes)
    reject, cover, above, family, detectable, other = [], [], [], [], [], {}
    for study in range(studies):
        baseline, *losses = generate(rng, effect, seed_sd, sizes)
        differences = [stats.difference(loss, baseline, paired) for loss in losses]
        first, p_values = differences[0], [one.p() for one in differences]
        reject.append(p_values[0] < stats.ALPHA)
        above.append(first.low > effect)
        cover.append(first.low <= effect <= first.high)
        family.append(min(stats.holm(p_values)) < stats.ALPHA)
        detectable.append(power.minimum_detectable(first))
        for row in usual_tests.sensitivity(losses[0], baseline) if study < sensitivity else ():
            other.setdefault(row["test"], []).append(row["p"] < stats.ALPHA)
    return {
        "primary": np.mean(reject),
        "coverage": np.mean(cover),
        "above": np.mean(above),
        "holm": np.mean(family),
        "detectable": np.median(detectable),
        "sensitivity": {
            name: np.mean(errs) for name, errs in other.items() if not name.startswith("exact")
        },
    }


def found(studies: int, effect: float, **design) -> float:
    """How often a true difference of the first loss is found."""
    rng = random_stream(1, design["seed_sd"], design["sizes"])
    generate = design.get("generate", normal_world)
    hits = []
    for _ in range(studies):
        baseline, loss, *_ = generate(rng, effect, design["seed_sd"], design["sizes"])
        hits.append(stats.difference(loss, baseline, paired=True).p() < stats.ALPHA)
    return float(np.mean(hits))


def calibrate_sizes(studies: int, seed_sd: float, gap: float) -> dict:
    """Power of studies with as many seeds, or questions, as studies of the usual size ask for (the
    median) to find a difference of `gap`. A size that more than half call not enough has no power.
    """
    rng = np.random.default_rng(2)
    asked = []
    for _ in range(studies):
        baseline, loss, *_ = normal_world(rng, gap, seed_sd, Sizes())
        measured = stats.difference(loss, baseline, paired=True)
        asked.append([n or np.inf for n in power.required_sizes(measured, gap)])
    seeds, questions = np.median(asked, axis=0)
    result = {"seeds": seeds, "seeds_power": None, "questions": questions, "questions_power": None}
    for key, sizes in (("seeds", (seeds, QUESTIONS)), ("questions", (SEEDS, questions))):
        if max(sizes) < 3000:
            design = {"seed_sd": seed_sd, "sizes": Sizes(*map(int, sizes))}
            result[f"{key}_power"] = found(studies, gap, **design)
    return result


# ---- variance over beta -------------------------------------------------------------------------


def calibrate_ratio(
    studies: int,
    seed_sd: float,
    sd_a: float,
    sd_b: float,
    draws: int = 1000,
    seed: int = 0,
    common_sd: float = 0.1,
    seeds: int = SEEDS,
    claimed: float = 0.2,
) -> dict:
    """Coverage of the variance ratio's interval, how often there is a ratio, and how often it shows
    a reduction by `claimed` or the contrary; true SDs over the four betas.
    """
    rng = np.random.default_rng(seed)
    unit = BETA_PATTERN / BETA_PATTERN.std(ddof=1)
    rows = []
    for _ in range(studies):
        levels = np.concatenate([5 + sd_a * unit, 5 + sd_b * unit])
        cells = simulate(rng, levels, seed_sd, Sizes(seeds), common_sd)
        spread_a, spread_b = (
            variation.beta_spread(list(half), True, draws, stream)
            for stream, half in enumerate((cells[:4], cells[4:]))
        )
        ratio = variation.variance_ratio(spread_a, spread_b)
        low, high = ratio["low"], ratio["high"]
        rows.append(
            {
                "defined": ratio["ratio"] is not None,
                "coverage": low <= (sd_a / sd_b) ** 2 <= high,
                "open": np.isinf(high),
                "supported": high <= 1 - claimed,
                "contradicted": low > 1 - claimed,
            }
        )
    return {key: np.mean([row[key] for row in rows]) for key in rows[0]}


# ---- the best of a grid -------------------------------------------------------------------------


def calibrate_selection(studies: int, seed_sd: float, correlation: float) -> dict:
    """Mean error of a comparison of the best of 12 cells with the best of 4, where all cells are
    truly equal: of the difference of the two selected cells, and of the expected difference at
    equal budget. The limit is what a verdict says that chance may add.

    correlation: of what cells are selected by with the score, over equal cells; with validation
    accuracy it is that of two measures of one seed's luck.
    """
    rng = np.random.default_rng(3)
    rows = []
    for _ in range(studies):
        cells = simulate(rng, [5.0] * 16, seed_sd)
        scores = cells.mean((1, 2))
        luck = (scores - scores.mean()) / scores.std()
        selector = correlation * luck + np.sqrt(1 - correlation**2) * rng.normal(size=16)
        a, b = slice(0, 12), slice(12, 16)
        best_a, best_b = selector[a].argmax(), 12 + selector[b].argmax()
        compared = stats.difference(cells[best_a], cells[best_b], paired=True)
        at_budget = [
            variation.expected_best(list(selector[grid]), list(scores[grid]), 4) for grid in (a, b)
        ]
        gain = variation.expected_normal_maximum(12) - variation.expected_normal_maximum(4)
        rows.append(
            {
                "selected": compared.estimate,
                "equal budget": at_budget[0] - at_budget[1],
                "limit": gain * compared.se / np.sqrt(2),
            }
        )
    return {key: np.mean([row[key] for row in rows]) for key in rows[0]}


# ---- tables -------------------------------------------------------------------------------------


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def print_header(*cells: str) -> None:
    print_row(*cells)
    print("|" + "---|" * len(cells))


def print_differences(studies: int) -> None:
    """Errors and power of the primary test over the range of seed SDs, in all worlds."""
    print_header(
        *("seeds", "world", "seed SD", "no difference: primary", "Holm, 3 losses"),
        *("interval covers", "0.5 / 1.0 is found", "detectable (median)", "and is found"),
    )
    for seeds in (3, 2):
        for name, generate in WORLDS.items():
            for seed_sd in SEED_SDS:
                design = {"seed_sd": seed_sd, "sizes": Sizes(seeds), "generate": generate}
                null = calibrate_differences(studies, **design)
                detectable = null["detectable"]
                # A rough world has no room for a difference beyond its ceiling.
                reachable = name == "normal" or detectable < 1.5
                powers = [found(studies, effect, **design) for effect in (0.5, 1.0)]
                detected = found(studies, detectable, **design) if reachable else None
                print_row(
                    *(f"{seeds}", name, f"{seed_sd}"),
                    *(f"{null[key]:.3f}" for key in ("primary", "holm", "coverage")),
                    " / ".join(f"{rate:.2f}" for rate in powers),
                    f"{detectable:.2f}",
                    "" if detected is None else f"{detected:.3f}",
                )


def print_usual_tests(studies: int) -> None:
    """How often the usual tests find a difference where there is none."""
    rates = {
        sd: calibrate_differences(studies, sd, sensitivity=studies)["sensitivity"]
        for sd in (0.08, 0.15, 0.5)
    }
    print_header("no difference, a test errs in", *(f"seed SD {sd}" for sd in rates))
    for name in rates[0.08]:
        print_row(name, *(f"{by_name[name]:.3f}" for by_name in rates.values()))


def print_designs(studies: int) -> None:
    """Errors of other designs: accuracy, few questions, seeds that are not paired."""
    print_header(
        *("other designs, no difference", "primary", "Holm, 3 losses"),
        *("interval covers", "wholly above"),
    )
    designs = {
        f"accuracy, {n} seeds, seed SD {sd}": {
            "seed_sd": sd,
            "generate": accuracy_world,
            "sizes": Sizes(n),
        }
        for n in (3, 2)
        for sd in (0.05, 0.3)
    }
    for sd in (0.08, 0.5):
        designs |= {
            f"{n} unpaired seeds, seed SD {sd}": {
                "seed_sd": sd,
                "sizes": Sizes(n),
                "paired": False,
            }
            for n in (3, 2)
        }
        designs[f"5 seeds, seed SD {sd}"] = {"seed_sd": sd, "sizes": Sizes(5)}
        designs[f"10 questions, 3 seeds, seed SD {sd}"] = {
            "seed_sd": sd,
            "sizes": Sizes(3, 10),
            "generate": WORLDS["rough, skewed"],
        }
    for name, design in designs.items():
        rates = calibrate_differences(studies, **design)
        print_row(name, *(f"{rates[key]:.3f}" for key in ("primary", "holm", "coverage", "above")))


def print_sizes(studies: int) -> None:
    """Whether studies of the size that is asked for find the difference."""
    print_header(
        *("seed SD", "true difference", "seeds asked for (median)", "find it"),
        *("questions asked for (median)", "find it"),
    )
    for seed_sd, gap in ((0.08, 0.4), (0.15, 0.4), (0.3, 0.6), (0.5, 0.8), (1.0, 1.2)):
        row = calibrate_sizes(studies // 2, seed_sd, gap)
        shown = []
        for key in ("seeds", "questions"):
            rate = row[f"{key}_power"]
            size = "none" if np.isinf(row[key]) else f"{row[key]:.0f}"
            shown += [size, "" if rate is None else f"{rate:.3f}"]
        print_row(f"{seed_sd}", f"{gap}", *shown)


def print_ratios(studies: int) -> None:
    """The ratio of two variances over beta; a claim is that the first is at least 20 % smaller."""
    print_header(
        *("seeds", "seed SD", "true SD over betas, a / b", "ratio", "defined"),
        *("interval covers", "upper end open", "claim supported", "contradicted"),
    )
    pairs = ((0, 0.8), (0.2, 0.8), (0.4, 0.8), (0.6, 0.8), (0.8, 0.8), (1.2, 0.8))
    pairs += ((0, 0.3), (0.15, 0.3), (0.3, 0.3), (0.1, 0.1))
    for seeds, seed_sd in ((3, 0.08), (3, 0.3), (3, 1.0), (2, 0.3)):
        for sd_a, sd_b in pairs:
            rates = calibrate_ratio(studies // 4, seed_sd, sd_a, sd_b, seeds=seeds)
            ratio = f"{(sd_a / sd_b) ** 2:.2f}"
            shown = [f"{rate:.3f}" for rate in rates.values()]
            print_row(f"{seeds}", f"{seed_sd}", f"{sd_a} / {sd_b}", ratio, *shown)
    rates = calibrate_ratio(studies // 4, 0.15, 0.3, 0.4, common_sd=0.5)
    shown = [f"{rate:.3f}" for rate in rates.values()]
    print_row("3", "0.15", "0.3 / 0.4, seeds' common SD 0.5", "0.56", *shown)


def print_selection(studies: int) -> None:
    """What the larger grid gains by chance alone."""
    print_header(
        *("seed SD", "correlation of selector and score", "best of 12 against best of 4: error"),
        *("at equal budget", "limit that verdicts state"),
    )
    for seed_sd in (0.08, 0.3):
        for correlation in (0, 0.5, 0.9):
            rates = calibrate_selection(studies // 2, seed_sd, correlation)
            shown = [f"{rate:+.3f}" for rate in rates.values()]
            print_row(f"{seed_sd}", f"{correlation}", *shown)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--studies", type=int, default=2000, help="simulated studies per row (default: 2000)"
    )
    studies = parser.parse_args().studies
    tables = (print_differences, print_designs, print_sizes, print_ratios, print_selection)
    for table in tables:
        table(studies)
        print()
    print_usual_tests(studies // 8)  # slow: permutations


if __name__ == "__main__":
    main()
