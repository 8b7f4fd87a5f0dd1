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
        found = [stats.difference(loss, baseline, paired=True, draws=draws) for loss in losses]
        p_values = [one.p() for one in found]
        reject.append(p_values[0] < stats.ALPHA)
        above.append(found[0].low > effect)
        cover.append(found[0].low <= effect <= found[0].high)
        family.append(min(stats.holm(p_values)) < stats.ALPHA)
        detectable.append(found[0].minimum_detectable())
        for row in stats.sensitivity(losses[0], baseline) if study < sensitivity else ():
            other.setdefault(row["test"], []).append(row["p"] < stats.ALPHA)
    return {
        "primary": np.mean(reject),
        "coverage": np.mean(cover),
        "above": np.mean(above),
        "holm": np.mean(family),
        "detectable": np.median(detectable),
        "sensitivity": {
            name: np.mean(found) for name, found in other.items() if not name.startswith("exact")
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--studies", type=int, default=2000, help="simulated studies a row (default: 2000)"
    )
    args = parser.parse_args()
    print(
        "| seed SD | no difference: primary | Holm, 3 losses | interval covers | power at 0.25 / 0.5 / 1.0 | "
        "detectable (median) |"
    )
    print("|---|---|---|---|---|---|")
    sensitivity = {}
    for seed_sd in (0.08, 0.15):
        null = calibrate_differences(args.studies, seed_sd, sensitivity=args.studies)
        effects = [
            calibrate_differences(args.studies // 4, seed_sd, effect, seed=1)
            for effect in (0.25, 0.5, 1.0)
        ]
        powers = " / ".join(f"{found['primary']:.2f}" for found in effects)
        covers = " / ".join(f"{found['coverage']:.3f}" for found in (null, *effects))
        row = [f"{seed_sd}", f"{null['primary']:.3f}", f"{null['holm']:.3f}", covers, powers]
        print(f"| {' | '.join(row)} | {null['detectable']:.2f} |", flush=True)
        sensitivity[seed_sd] = null["sensitivity"]
    print("\n| no difference, a test errs in | seed SD 0.08 | 0.15 |\n|---|---|---|")
    for name in sensitivity[0.08]:
        print(
            f"| {name} | {sensitivity[0.08][name]:.3f} | {sensitivity[0.15][name]:.3f} |",
            flush=True,
        )
    print(
        "\n| other designs, no difference | primary | Holm, 3 losses | interval covers | wholly above |"
    )
    print("|---|---|---|---|---|")
    designs = [
        (f"MT-Bench, 2 seeds, seed SD {sd}", {"seed_sd": sd, "seeds": 2}) for sd in (0.08, 0.15)
    ]
    designs += [
        (f"accuracy, {n} seeds", {"seed_sd": 0.05, "seeds": n, "generate": simulate_accuracy})
        for n in (3, 2)
    ]
    for name, design in designs:
        found = calibrate_differences(args.studies // 2, **design)
        row = [f"{found[key]:.3f}" for key in ("primary", "holm", "coverage", "above")]
        print(f"| {name} | {' | '.join(row)} |", flush=True)
    print(
        "\n| seed SD | true SD over betas, a / b | ratio | defined | interval covers | upper end open |"
    )
    print("|---|---|---|---|---|---|")
    for seed_sd in (0.08, 0.15):
        for sd_a, sd_b in ((0.6, 0.8), (0.3, 0.4), (0.4, 0.4), (0.15, 0.3), (0.2, 0.2), (0.1, 0.1)):
            found = calibrate_ratio(args.studies // 4, seed_sd, sd_a, sd_b)
            row = [
                f"{sd_a} / {sd_b}",
                f"{(sd_a / sd_b) ** 2:.2f}",
                *(f"{found[key]:.3f}" for key in found),
            ]
            print(f"| {seed_sd} | {' | '.join(row)} |", flush=True)
    found = calibrate_ratio(args.studies // 4, 0.15, 0.3, 0.4, common_sd=0.5)
    row = ["0.3 / 0.4, seeds' common SD 0.5", "0.56", *(f"{found[key]:.3f}" for key in found)]
    print(f"| 0.15 | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
