"""Time and memory of analyze.py on a simulated study of full size: 60 runs x 160 judgements,
10,000 draws.

    python bench/analysis_load.py OUT     writes OUT/results (about 90 MB), analyses it twice

The runs are those of the study's grid with 159 steps, 750 validation pairs, 160 answers of 1,500
characters and as many judgements of 900. Scores come from bench/calibration.py's model, with
made-up effects: they mean nothing.
"""

import argparse
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from pref.files.disk import write_json, write_jsonl
from pref.files.judgements import write_judgements
from pref.files.mt_bench import CATEGORIES

MODEL, QUESTIONS = "meta-llama/Llama-2-7b-chat-hf", range(81, 161)
BETAS, TAUS, SEEDS = (0.01, 0.05, 0.5, 2.5), (0.5, 1.0, 2.0), (42, 43, 44)
WORDS = (
    "judge",
    "reads",
    "every",
    "answer",
    "twice",
    "and",
    "notes",
    "what",
    "is",
    "wrong",
    "before",
    "a",
    "number",
)


def grid() -> list[tuple]:
    cells = [("dpo", beta, None) for beta in BETAS] + [("discopop", beta, None) for beta in BETAS]
    return cells + [("td_dpo", beta, tau) for beta in BETAS for tau in TAUS]


def text(rng: random.Random, length: int) -> str:
    words = rng.choices(WORDS, k=length // 5)
    return " ".join(words)[:length]


def write_run(results: Path, cell: tuple, seed: int, level: float, difficulty: np.ndarray) -> None:
    loss, beta, tau = cell
    name = f"{loss}_b{beta:g}" + (f"_t{tau:g}" if tau else "") + f"_s{seed}"
    folder, rng, noise = (
        results / name,
        random.Random(name),
        np.random.default_rng(list(name.encode())),
    )
    write_json(
        folder / "args.json",
        {
            "run_id": name,
            "loss": loss,
            "beta": beta,
            "tau": tau,
            "seed": seed,
            "mode": "full",
            "model": MODEL,
            "data_sha256": {"train": "0", "val": "1"},
            "learning_rate": 1e-5,
        },
    )
    accuracy = 0.6 + 0.02 * level
    rows = [
        {
            "step": step,
            "loss": 0.69 - step / 400,
            "rewards/accuracies": accuracy,
            "margin/rho": step / 50,
            "margin/delta": step / 60,
            "grad_norm": 1.0,
            "lr": 1e-5,
            "anchor": step / 30,
        }
        for step in range(1, 160)
    ]
    for step in range(20, 160, 20):
        rows.append(
            {
                "step": step,
                "eval/loss": 0.6,
                "eval/acc_ref": accuracy,
                "eval/margin/rho": step / 50,
                "eval/acc_sum": 0.5,
                "eval/acc_mean": 0.5,
                "eval/margin/delta": 0.1,
            }
        )
    write_jsonl(folder / "metrics.jsonl", rows)
    pairs = []
    for step in (0, 140):
        rho = np.zeros(750) if step == 0 else noise.normal(1.0 + level / 5, 4, 750)
        pairs += [
            {
                "id": f"p{i}",
                "step": step,
                "policy_chosen": -100 + r,
                "policy_rejected": -100.0,
                "ref_chosen": -100.0,
                "ref_rejected": -100.0,
                "len_chosen": i % 97,
                "len_rejected": i % 61,
            }
            for i, r in enumerate(rho)
        ]
    write_jsonl(folder / "val_pairs.jsonl", pairs)
    right = float(np.mean([row["policy_chosen"] > -100 for row in pairs[750:]]))
    write_json(
        folder / "summary.json",
        {
            "status": "finished",
            "steps": 159,
            "best_step": 140,
            "best_acc_ref": right,
            "final_acc_ref": right,
            "final_acc_sum": 0.5,
            "final_acc_mean": 0.5,
            "nonfinite_steps": 0,
            "wall_s": 900.0,
            "tokens": 1,
            "peak_gib": 20.0,
        },
    )
    answers, judged = [], []
    quality = level + difficulty + noise.normal(0, 0.1) + noise.normal(0, 1.2, len(QUESTIONS))
    for question, wanted in zip(QUESTIONS, quality):
        category = CATEGORIES[(question - 81) // 10]
        turns = [text(rng, 1500), text(rng, 1500)]
        choice = {
            "index": 0,
            "turns": turns,
            "logp": [-300.0, -280.0],
            "logp_base": [-310.0 - level, -284.0],
            "logp_tokens": [300, 300],
        }
        answers.append(
            {
                "question_id": question,
                "answer_id": f"{name}-{question}",
                "model_id": name,
                "tstamp": 1.0,
                "choices": [choice],
                "category": category,
            }
        )
        for turn in (1, 2):
            score = float(np.clip(round(wanted + noise.normal(0, 0.8)), 1, 10))
            judged.append(
                {
                    "question_id": question,
                    "turn": turn,
                    "category": category,
                    "model_id": name,
                    "choice": 0,
                    "grading": "single",
                    "judge": "gpt-5-mini",
                    "prompts": "mt_bench",
                    "repeat": 0,
                    "refs": "original",
                    "score": score,
                    "status": "ok",
                    "judgement": text(rng, 900) + f" [[{score:g}]]",
                }
            )
    write_jsonl(folder / "mt_bench" / "answers.jsonl", answers)
    write_judgements(folder / "mt_bench" / "judgements.csv", judged)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    difficulty = np.random.default_rng(0).normal(6, 1.8, len(QUESTIONS))
    effects = dict(zip(grid(), np.random.default_rng(1).normal(0, 0.4, 20)))
    for cell in grid():
        for seed in SEEDS:
            write_run(out / "results", cell, seed, effects[cell], difficulty)
    for which in ("first", "again"):
        started = time.time()
        subprocess.run(
            [sys.executable, "analyze.py", out / "results"], check=True, stdout=subprocess.DEVNULL
        )
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        report = (out / "results" / "comparison" / "report.html").stat().st_size / 2**20
        print(
            f"{which}: {time.time() - started:.1f} s, largest process {peak:.2f} GiB, report.html "
            f"{report:.1f} MiB"
        )


if __name__ == "__main__":
    main()
