"""How often analyze.py's statistics err, on simulated studies whose truth is known.

    python bench/calibration.py                  about five minutes on one core
    python bench/calibration.py --studies 500

A study: 80 questions, 3 seeds, four losses (a baseline and three others). The mean rating (both turns) of question q in
the run of loss m with seed s is

    level[m] + question[q] + method_by_question[m, q] + common_seed[s] + seed[m, s] + rest[m, s, q]

all normal, SDs: question 1.8, method by question 0.8, seed common to all losses 0.1, seed 0.08 or 0.15, rest 1.2.
Cross-beta variance: each loss at four betas whose true means have a stated SD, with the same terms for each cell.
Monte-Carlo error of a rate near 0.05 over 2,000 studies: 0.005.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import stats

QUESTIONS, SEEDS = 80, 3
SDS = {"question": 1.8, "method_by_question": 0.8, "common_seed": 0.1, "rest": 1.2}
BETA_PATTERN = np.array([-0.6, 0.2, 0.6, -0.2])  # true means over four betas, before scaling


def simulate(rng: np.random.Generator, levels: np.ndarray, seed_sd: float) -> np.ndarray:
    """(M, S, Q) ratings of M cells with the given true means."""
    m, draw = len(levels), rng.normal
    return (
        np.asarray(levels)[:, None, None]
        + draw(0, SDS["question"], QUESTIONS)
        + draw(0, SDS["method_by_question"], (m, 1, QUESTIONS))
        + draw(0, SDS["common_seed"], (SEEDS, 1))
        + draw(0, seed_sd, (m, SEEDS, 1))
        + draw(0, SDS["rest"], (m, SEEDS, QUESTIONS))
    )


def calibrate_differences(
    studies: int, seed_sd: float, effect: float = 0.0, draws: int = 2000, seed: int = 0, sensitivity: int = 0
) -> dict:
    """Rates over simulated studies in which every loss is `effect` above the baseline; of the usual tests over the
    first `sensitivity` studies."""
    rng = np.random.default_rng(seed)
    levels = np.array([5.0, *[5.0 + effect] * 3])
    reject, cover, family, detectable, other = [], [], [], [], {}
    for study in range(studies):
        baseline, *losses = simulate(rng, levels, seed_sd)
        found = [stats.difference(loss, baseline, paired=True, draws=draws) for loss in losses]
        p_values = [one.p() for one in found]
        reject.append(p_values[0] < stats.ALPHA)
        cover.append(found[0].low <= effect <= found[0].high)
        family.append(min(stats.holm(p_values)) < stats.ALPHA)
        detectable.append(found[0].minimum_detectable())
        for row in stats.sensitivity(losses[0], baseline) if study < sensitivity else ():
            other.setdefault(row["test"], []).append(row["p"] < stats.ALPHA)
    return {
        "primary": np.mean(reject),
        "coverage": np.mean(cover),
        "holm": np.mean(family),
        "detectable": np.median(detectable),
        "sensitivity": {name: np.mean(found) for name, found in other.items() if not name.startswith("exact")},
    }


def calibrate_ratio(studies: int, seed_sd: float, sd_a: float, sd_b: float, draws: int = 2000, seed: int = 0) -> dict:
    """Coverage of the variance ratio's interval, and how often there is a ratio; true SDs over the four betas."""
    rng = np.random.default_rng(seed)
    unit = BETA_PATTERN / BETA_PATTERN.std(ddof=1)
    cover, open_end = [], []
    for _ in range(studies):
        cells = simulate(rng, np.concatenate([5 + sd_a * unit, 5 + sd_b * unit]), seed_sd)
        found = stats.variance_ratio(*(stats.beta_spread(list(half), draws) for half in (cells[:4], cells[4:])))
        if found["ratio"] is not None:
            cover.append(found["low"] <= (sd_a / sd_b) ** 2 <= found["high"])
            open_end.append(np.isinf(found["high"]))
    return {"defined": len(cover) / studies, "coverage": np.mean(cover), "open": np.mean(open_end)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000, help="simulated studies a row (default: 2000)")
    args = parser.parse_args()
    print("| seed SD | no difference: primary | Holm, 3 losses | interval covers | power at 0.25 / 0.5 / 1.0 | "
          "detectable (median) |")  # fmt: skip
    print("|---|---|---|---|---|---|")
    sensitivity = {}
    for seed_sd in (0.08, 0.15):
        null = calibrate_differences(args.studies, seed_sd, sensitivity=args.studies)
        effects = [calibrate_differences(args.studies // 4, seed_sd, effect, seed=1) for effect in (0.25, 0.5, 1.0)]
        powers = " / ".join(f"{found['primary']:.2f}" for found in effects)
        covers = " / ".join(f"{found['coverage']:.3f}" for found in (null, *effects))
        row = [f"{seed_sd}", f"{null['primary']:.3f}", f"{null['holm']:.3f}", covers, powers]
        print(f"| {' | '.join(row)} | {null['detectable']:.2f} |", flush=True)
        sensitivity[seed_sd] = null["sensitivity"]
    print("\n| no difference, a test errs in | seed SD 0.08 | 0.15 |\n|---|---|---|")
    for name in sensitivity[0.08]:
        print(f"| {name} | {sensitivity[0.08][name]:.3f} | {sensitivity[0.15][name]:.3f} |", flush=True)
    print("\n| seed SD | true SD over betas, a / b | ratio | defined | interval covers | upper end open |")
    print("|---|---|---|---|---|---|")
    for seed_sd in (0.08, 0.15):
        for sd_a, sd_b in ((0.6, 0.8), (0.3, 0.4), (0.4, 0.4), (0.15, 0.3), (0.2, 0.2), (0.1, 0.1)):
            found = calibrate_ratio(args.studies // 4, seed_sd, sd_a, sd_b)
            row = [f"{sd_a} / {sd_b}", f"{(sd_a / sd_b) ** 2:.2f}", *(f"{found[key]:.3f}" for key in found)]
            print(f"| {seed_sd} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
