"""How often analyze.py's statistics err, on simulated studies whose truth is known.

    python bench/calibration.py                  about ten minutes on one core
    python bench/calibration.py --studies 500

A study: 80 questions, 3 seeds, four losses (a baseline and three others). The mean rating (both
turns) of question q in the run of loss m with seed s is

    level[m] + question[q] + method_by_question[m, q] + common_seed[s] + seed[m, s] + rest[m, s, q]

all normal, SDs: question 1.8, method by question 0.8, seed common to all losses 0.1, seed 0.08 or
0.15, rest 1.2. Then the same with two seeds; and validation accuracy: 750 pairs, right if pair[q] +
method_by_pair[m, q] + seed[m, s] + rest[m, s, q] is above 0, with SDs 1, 0.3, 0.05 (1.7 points of
accuracy) and 0.5. Cross-beta variance: each loss at four betas whose true means have a stated SD,
with the same terms for each cell. Monte-Carlo error of a rate near 0.05 over 2,000 studies: 0.005.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from pref.analysis import stats, variation

QUESTIONS, SEEDS, PAIRS = 80, 3, 750
SDS = {"question": 1.8, "method_by_question": 0.8, "common_seed": 0.1, "rest": 1.2}
BETA_PATTERN = np.array([-0.6, 0.2, 0.6, -0.2])  # true means over four betas, before scaling


def simulate(
    rng, levels, seed_sd: float, seeds: int = SEEDS, common_sd: float = SDS["common_seed"]
) -> np.ndarray:
    """(M, S, Q) ratings of M cells with the given true means."""
    m, draw = len(levels), rng.normal
    return (
        np.asarray(levels)[:, None, None]
        + draw(0, SDS["question"], QUESTIONS)
        + draw(0, SDS["method_by_question"], (m, 1, QUESTIONS))
        + draw(0, common_sd, (seeds, 1))
        + draw(0, seed_sd, (m, seeds, 1))
        + draw(0, SDS["rest"], (m, seeds, QUESTIONS))
    )


def simulate_accuracy(rng, levels, seed_sd: float, seeds: int) -> np.ndarray:
    """(M, S, 750) right or wrong of M cells with equal chances; `levels` only says how many."""
    m, draw = len(levels), rng.normal
    latent = draw(0.3, 1, PAIRS) + draw(0, 0.3, (m, 1, PAIRS)) + draw(0, seed_sd, (m, seeds, 1))
    return (latent + draw(0, 0.5, (m, seeds, PAIRS)) > 0).astype(float)


def calibrate_differences(
    studies: int,
    seed_sd: float,
    effect: float = 0.0,
    draws: int = 2000,
    seed: int = 0,
    sensitivity: int = 0,
    seeds: int = SEEDS,
    generate=simulate,
) -> dict:
    """Rates over simulated studies in which every loss is `effect` above the baseline; of the usual
    tests over the first `sensitivity` studies. above: how often the whole interval lies above the
    truth (nominally 0.025).
    """
    rng = np.random.default_rng(seed)
    levels = np.array([5.0, *[5.0 + effect] * 3])
    reject, cover, above, family, detectable, other = [], [], [], [], [], {}
    for study in range(studies):
        baseline, *losses = generate(rng, levels, seed_sd, seeds)
        differences = [
            stats.difference(loss, baseline, paired=True, draws=draws) for loss in losses
        ]
        first, p_values = differences[0], [one.p() for one in differences]
        reject.append(p_values[0] < stats.ALPHA)
        above.append(first.low > effect)
        cover.append(first.low <= effect <= first.high)
        family.append(min(stats.holm(p_values)) < stats.ALPHA)
        detectable.append(first.minimum_detectable())
        for row in stats.sensitivity(losses[0], baseline) if study < sensitivity else ():
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


def calibrate_ratio(
    studies: int,
    seed_sd: float,
    sd_a: float,
    sd_b: float,
    draws: int = 2000,
    seed: int = 0,
    common_sd: float = 0.1,
) -> dict:
    """Coverage of the variance ratio's interval, and how often there is a ratio; true SDs over the
    four betas.
    """
    rng = np.random.default_rng(seed)
    unit = BETA_PATTERN / BETA_PATTERN.std(ddof=1)
    cover, open_end = [], []
    for _ in range(studies):
        cells = simulate(
            rng, np.concatenate([5 + sd_a * unit, 5 + sd_b * unit]), seed_sd, common_sd=common_sd
        )
        spread_a, spread_b = (
            variation.beta_spread(list(half), True, draws) for half in (cells[:4], cells[4:])
        )
        ratio = variation.variance_ratio(spread_a, spread_b)
        if ratio["ratio"] is not None:
            cover.append(ratio["low"] <= (sd_a / sd_b) ** 2 <= ratio["high"])
            open_end.append(np.isinf(ratio["high"]))
    return {"defined": len(cover) / studies, "coverage": np.mean(cover), "open": np.mean(open_end)}


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def print_header(*cells: str) -> None:
    print_row(*cells)
    print("|" + "---|" * len(cells))


def print_differences(studies: int) -> dict[float, dict[str, float]]:
    """Errors and power of the primary test; returns seed SD -> usual test -> its error rate."""
    print_header(
        *("seed SD", "no difference: primary", "Holm, 3 losses", "interval covers"),
        *("power at 0.25 / 0.5 / 1.0", "detectable (median)"),
    )
    usual_tests = {}
    for seed_sd in (0.08, 0.15):
        null = calibrate_differences(studies, seed_sd, sensitivity=studies)
        effects = [
            calibrate_differences(studies // 4, seed_sd, effect, seed=1)
            for effect in (0.25, 0.5, 1.0)
        ]
        print_row(
            f"{seed_sd}",
            f"{null['primary']:.3f}",
            f"{null['holm']:.3f}",
            " / ".join(f"{rates['coverage']:.3f}" for rates in (null, *effects)),
            " / ".join(f"{rates['primary']:.2f}" for rates in effects),
            f"{null['detectable']:.2f}",
        )
        usual_tests[seed_sd] = null["sensitivity"]
    return usual_tests


def print_designs(studies: int) -> None:
    """Errors with two seeds, and of validation accuracy."""
    print_header(
        *("other designs, no difference", "primary", "Holm, 3 losses"),
        *("interval covers", "wholly above"),
    )
    designs = {
        f"MT-Bench, 2 seeds, seed SD {sd}": {"seed_sd": sd, "seeds": 2} for sd in (0.08, 0.15)
    }
    accuracy = {"seed_sd": 0.05, "generate": simulate_accuracy}
    designs |= {f"accuracy, {n} seeds": accuracy | {"seeds": n} for n in (3, 2)}
    for name, design in designs.items():
        rates = calibrate_differences(studies // 2, **design)
        print_row(name, *(f"{rates[key]:.3f}" for key in ("primary", "holm", "coverage", "above")))


def print_ratios(studies: int) -> None:
    """The ratio of two variances over beta."""
    print_header(
        *("seed SD", "true SD over betas, a / b", "ratio"),
        *("defined", "interval covers", "upper end open"),
    )
    pairs = ((0.6, 0.8), (0.3, 0.4), (0.4, 0.4), (0.15, 0.3), (0.2, 0.2), (0.1, 0.1))
    for seed_sd in (0.08, 0.15):
        for sd_a, sd_b in pairs:
            rates = calibrate_ratio(studies // 4, seed_sd, sd_a, sd_b)
            ratio = f"{(sd_a / sd_b) ** 2:.2f}"
            shown = [f"{rate:.3f}" for rate in rates.values()]
            print_row(f"{seed_sd}", f"{sd_a} / {sd_b}", ratio, *shown)
    rates = calibrate_ratio(studies // 4, 0.15, 0.3, 0.4, common_sd=0.5)
    shown = [f"{rate:.3f}" for rate in rates.values()]
    print_row("0.15", "0.3 / 0.4, seeds' common SD 0.5", "0.56", *shown)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--studies", type=int, default=2000, help="simulated studies per row (default: 2000)"
    )
    studies = parser.parse_args().studies
    usual_tests = print_differences(studies)
    print()
    print_header("no difference, a test errs in", "seed SD 0.08", "0.15")
    for name in usual_tests[0.08]:
        print_row(name, *(f"{usual_tests[seed_sd][name]:.3f}" for seed_sd in (0.08, 0.15)))
    print()
    print_designs(studies)
    print()
    print_ratios(studies)


if __name__ == "__main__":
    main()
