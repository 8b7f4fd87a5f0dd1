"""A study whose truth is known, with the stages as a user runs them: what does the report say?

    python bench/null_study.py OUT --model quickstart/SmolLM2-135M-Instruct
    python bench/null_study.py OUT --model ... --task examples/tasks/brevity.py --steps 32

Pairs come from the model's own answers to a task's train questions; three losses train on them with
as many seeds each; answers to other questions are scored by the task's program.

    dpo          seeds 1, 2, ...
    dpo_again    the same loss by another name, other seeds: that it differs must not be found
    noisy_dpo    seeds 1, 2, ...; two labels in five are wrong (null_losses.py): to be found worse

Prints the opening statement, what is said of each comparison with dpo, and the claims, which are
stated here before anything is trained. Exits with 1 if a difference is found that is not there, or
the planted one is not found. The same command continues after a kill: every stage does.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from pref.files import disk

ROOT = Path(__file__).resolve().parent.parent
LOSSES = Path(__file__).with_name("null_losses.py")
TRAIN = "--global_batch 8 --per_device_batch 8 --lora_r 16 --lora_dropout 0"
METRIC = "task"


def claim(name: str, text: str, a: str, b: str) -> dict:
    sides = {"a": {"loss": a}, "b": {"loss": b}, "at_least": 0}
    return {"id": name, "claim": text, "kind": "difference", "metric": METRIC, **sides}


CLAIMS = [
    claim("null+", "DPO by another name scores higher.", "dpo_again", "dpo"),
    claim("null-", "DPO by another name scores lower.", "dpo", "dpo_again"),
    claim(
        "planted", "DPO scores higher than on labels of which 40 % are wrong.", "dpo", "noisy_dpo"
    ),
]


def seeds_of(number: int) -> dict:
    """The seeds of each loss: DPO by another name has its own."""
    first, others = range(1, number + 1), range(number + 1, 2 * number + 1)
    return {"dpo": first, "dpo_again": others, "noisy_dpo": first}


class Stages:
    """Runs the stages in a folder and says how long each took."""

    def __init__(self, out: Path):
        self.out, self.begun = out, time.monotonic()

    def run(self, stage: str, *words) -> None:
        """A stage with its arguments; text is split at its spaces. Exits if the stage fails."""
        begun = time.monotonic()
        more = [part for word in words for part in (word.split() if type(word) is str else [word])]
        command = [sys.executable, ROOT / stage, *more]
        log = self.out / "log.txt"
        with open(log, "a", encoding="utf-8") as file:
            code = subprocess.run(command, cwd=self.out, stdout=file, stderr=file).returncode
        print(f"{time.monotonic() - begun:6.0f} s  {stage} {' '.join(map(str, more))}", flush=True)
        if code:
            sys.exit(f"{stage} ended with {code}: see {log}")


def study(args: argparse.Namespace) -> dict:
    """Everything up to aggregated_metrics.json, which is returned."""
    out, task = args.out.resolve(), args.task.resolve()
    out.mkdir(parents=True, exist_ok=True)
    stages, results = Stages(out), Path("results")
    name, judge, model = task.stem, f"py:{task}", args.model.resolve()
    answers = ["--max_new_tokens", str(args.tokens)]

    # 1) Questions, the model's own answers to those to train on, and pairs of them. Once there are
    #    pairs this is over: gen_mtbench.py would have every run answer these questions too.
    numbers = f"--num_train {args.train_questions} --num_test {args.test_questions}"
    stages.run("prep_data.py", "--task", task, numbers)
    base = [results, "--base --model", model]
    pairs = results / "base" / f"{name}_train"
    if not (out / pairs / "pairs" / "manifest.json").exists():
        stages.run("gen_mtbench.py", *base, f"--bench {name}_train --num_choices 4", *answers)
        stages.run("judge.py", results, f"--bench {name}_train --judge", judge)
        stages.run("prep_data.py", "--from_answers", pairs, "--min_margin 0.1 --val_fraction 0.2")

    # 2) The runs.
    for loss, seeds in seeds_of(args.seeds).items():
        which = ["--loss dpo"] if loss == "dpo" else ["--loss_file", f"{LOSSES}:{loss}"]
        for seed in seeds:
            steps = f"--max_steps {args.steps} --eval_steps {args.steps} --seed {seed}"
            steps += f" --learning_rate {args.learning_rate}"
            data = ["--model", model, "--data", pairs / "pairs", "--results_dir", results]
            stages.run("train_pref.py", *which, *data, TRAIN, steps)

    # 3) Answers to other questions, their scores, and what the analysis makes of them.
    stages.run("gen_mtbench.py", *base, f"--bench {name} --num_choices 2", *answers)
    stages.run("judge.py", results, f"--bench {name} --judge", judge)
    claims = out / "claims.json"
    claims.write_text(json.dumps(CLAIMS, indent=1), encoding="utf-8")
    stages.run("analyze.py", results, "--claims", claims, "--proposed noisy_dpo")
    print(f"{time.monotonic() - stages.begun:6.0f} s  in all")
    return disk.read_json(out / results / "comparison" / "aggregated_metrics.json")


def tell(comparison: dict) -> list[str]:
    """Prints what the analysis says; returns what of it is wrong."""
    (part,) = comparison[METRIC]
    print(f"\n{comparison['answer']['statement']}\n")
    for row in part["cells"]:
        print(f"{row['label']:20} {row['score']:.3f}  seeds {row['n_seeds']}")
    print()
    found = {}
    for row in part["improvement"]:
        if row["comparison"] == "best of grid":
            found[row["loss"]] = row
            print(
                f"{row['proposed']} against {row['baseline']}: {row['estimate']:+.3f} "
                f"[{row['low']:+.3f}, {row['high']:+.3f}], p {row['p']:.3f}, adjusted "
                f"{row['p_adjusted']:.3f}, {row['paired']}"
            )
    verdicts = {row["id"]: row for row in comparison["claims"]}
    for one in CLAIMS:
        row = verdicts[one["id"]]
        print(f"claim {one['id']}: {row['verdict']} ({row['why']})")
    wrong = [
        f"{name} is {verdicts[name]['verdict']}"
        for name in ("null+", "null-")
        if verdicts[name]["verdict"] == "supported"
    ]
    if found["dpo_again"]["p_adjusted"] < 0.05:
        wrong.append("dpo_again differs from dpo")
    if verdicts["planted"]["verdict"] != "supported":
        wrong.append("the planted difference is not found")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder for data and results")
    add("--model", type=Path, required=True, help="folder of a chat model")
    add("--task", type=Path, default=ROOT / "examples/tasks/sentiment.py", metavar="FILE")
    add("--steps", type=int, default=12, help="optimiser steps of 8 pairs (default: 12)")
    add("--seeds", type=int, default=4, help="of each loss (default: %(default)s)")
    add("--learning_rate", type=float, default=2e-3, metavar="LR", help="(default: %(default)s)")
    add("--tokens", type=int, default=24, help="longest answer (default: 24)")
    add("--train_questions", type=int, default=120, help="(default: 80)")
    add("--test_questions", type=int, default=96, help="(default: 64)")
    wrong = tell(study(parser.parse_args()))
    print(
        "\n" + ("; ".join(wrong) or "As it should be: the planted difference is found, no other.")
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
