"""Results folders of controlled studies, for tests of the analysis: answers scored by a task's
program, with known effects, KL and validation accuracy.

    python tests/task_studies.py FOLDER     # FOLDER/results, FOLDER/data: 60 runs and the base
"""

import json
import random
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]  # as a script

from studies import make_base, make_run, noise, write_curve, write_pairs  # noqa: E402

from pref.files import mt_bench  # noqa: E402
from pref.files.disk import write_json, write_jsonl  # noqa: E402
from pref.files.judgements import write_judgements  # noqa: E402

BENCH = "constraints"
PROGRAM = {
    "judge": "py:constraints.py",
    "judge_id": "c0ffee",
    "judge_settings": json.dumps(
        {"file": "constraints.py", "sha256": {"constraints.py": "ab" * 32}, "packages": {}}
    ),
}
KINDS = ("no_comma", "sentences", "words", "word", "lower_case", "question", "json", "bullets")
BETAS, TAUS, SEEDS = (0.05, 0.1, 0.3, 0.5), (0.5, 1.0, 2.0), (42, 43, 44)
# loss -> (taus, what a unit of distance gains)
LOSSES = {"dpo": ((None,), 0.12), "td_dpo": (TAUS, 0.17), "discopop": ((None,), 0.09)}
WORDS = ("a", "river", "runs", "past", "the", "old", "mill", "and", "children", "watch")
WORDS += ("boats", "drift", "under", "low", "green", "trees")


def scored(question, choice, score, text, **fields):
    """A row of judgements.csv by the task's program; score None: it failed."""
    explained = {"text": "1 of 2 met: no comma; NOT two sentences", "scores": {}}
    if score is not None:
        explained["scores"]["forgiving"] = min(1.0, score + 0.1)
    row = {"question_id": question, "turn": 1, "category": KINDS[question % len(KINDS)]}
    row |= {"choice": choice, "repeat": 0, "grading": "program", "bench": BENCH, **PROGRAM}
    row |= {"score": score, "status": "ok" if score is not None else "program_timeout"}
    row |= {"judgement": json.dumps(explained) if score is not None else "stopped after 5 s"}
    return row | {"answer_sha256": mt_bench.answer_sha256(1, [text])} | fields


def answer_row(question, texts, kl=None, cut=0.0):
    """A row of answers.jsonl. kl: nats an answer, if it was measured; it differs by question."""
    choices = []
    for index, text in enumerate(texts):
        one = {"index": index, "turns": [text], "tokens": [len(text) // 4]}
        one["truncated"] = [noise("cut", question, index, text) < 2 * cut - 1]
        if kl is not None:
            own = kl * (1 + 0.5 * noise("kl", question, index))
            one |= {"logp": [-40.0], "logp_base": [-40.0 - own], "logp_tokens": [len(text) // 4]}
        choices.append(one)
    return {"question_id": question, "category": KINDS[question % len(KINDS)], "choices": choices}


def write_task(folder, level, kl=None, *, n=100, choices=2, bench=BENCH, lose=()):
    """A run's answers and scores. level: its expected score. lose: questions that failed."""
    answers, rows = [], []
    for question in range(1, n + 1):
        texts = [words(folder.name, question, choice, kl or 0.0) for choice in range(choices)]
        answers.append(answer_row(question, texts, kl, cut=min(0.9, 0.05 * (kl or 0))))
        for choice, text in enumerate(texts):
            hard = level + 0.3 * noise("question", question)
            chance = random.Random(f"{folder.name} {question} {choice}")
            met = sum(chance.random() < hard for _ in range(2))
            score = None if question in lose else met / 2
            rows.append(scored(question, choice, score, text, bench=bench))
    write_jsonl(folder / bench / "answers.jsonl", answers)
    write_judgements(folder / bench / "judgements.csv", rows)


def words(run, question, choice, kl):
    """A text that repeats itself more, and is longer, the larger the KL."""
    few = WORDS[: max(3, round(len(WORDS) - kl))]
    count = 18 + round(2 * kl + 4 * noise("length", run, question))
    chosen = random.Random(f"{run} {question} {choice}").choices(few, k=count)
    return " ".join(chosen).capitalize() + "."


def write_task_data(data, n=100):
    """data/constraints as prep_data.py --task writes it."""
    for name in ("test", "train"):
        first = 1 if name == "test" else 10_001
        questions = [
            {"question_id": q, "category": KINDS[q % len(KINDS)], "turns": [f"Write on {q}."]}
            for q in range(first, first + n)
        ]
        write_jsonl(data / BENCH / f"{name}_questions.jsonl", questions)
    files = {"questions": "test_questions.jsonl", "train_questions": "train_questions.jsonl"}
    how = {"temperature": 1.0, "max_new_tokens": 64}
    write_json(data / BENCH / "manifest.json", {"bench": BENCH, **files, "generation": how})


def pair_margin(run_id, i):
    """Noise of a validation pair's margin, most of which all runs share."""
    return 0.8 * noise("pair", i) + 0.2 * noise("pair", run_id, i)


def distance(loss, beta, tau, run_id):
    """Nats an answer: smaller beta and larger tau go further."""
    reach = {"dpo": 1.0, "td_dpo": 0.7 + 0.2 * (tau or 0), "discopop": 0.6}[loss]
    return 1.1 * reach / beta**0.6 * (1 + 0.15 * noise("kl of run", run_id))


def make_task_study(
    folder, *, losses=LOSSES, betas=BETAS, seeds=SEEDS, n=100, choices=2, without_kl=()
):
    """FOLDER/results and FOLDER/data. The score rises with the KL, then falls (over-optimisation);
    validation accuracy follows the score, with noise. without_kl: run ids whose answers have no
    log-probabilities.
    """
    results = folder / "results"
    write_task_data(folder / "data", n)
    base = make_base(results)
    write_task(base, 0.35, 0.0, n=n, choices=choices)
    write_task(base, 0.35, n=n // 2, choices=4, bench=f"{BENCH}_train")
    for loss, (taus, gain) in losses.items():
        for beta in betas:
            for tau in taus:
                for seed in seeds:
                    run_id = f"{loss}_b{beta}" + (f"_t{tau:g}" if tau else "") + f"_s{seed}"
                    kl = distance(loss, beta, tau, run_id)
                    level = 0.35 + gain * kl**0.7 - 0.004 * kl**2 + 0.02 * noise("seed", run_id)
                    hits = [pair_margin(run_id, i) + level - 0.3 for i in range(100)]
                    summary = {"best_acc_ref": sum(hit > 0 for hit in hits) / 100}
                    run = make_run(results, run_id, loss, beta, tau, seed, summary=summary)
                    after = [(hit - 9, -9, -9, -9) for hit in hits]
                    write_pairs(run, {0: [(-9, -9, -9, -9)] * 100, 20: after})
                    write_curve(run)
                    known = None if run_id in without_kl else kl
                    write_task(run, level, known, n=n, choices=choices)


def claims():
    """Claims of the controlled study, in the form of a claims file."""
    td_dpo, dpo = {"loss": "td_dpo", "beta": "best"}, {"loss": "dpo", "beta": "best"}
    return [
        {
            "id": "gain",
            "claim": "TD-DPO scores 0.05 more than DPO, each at its best.",
            "at_least": 0.05,
        }
        | {"kind": "difference", "metric": "task", "a": td_dpo, "b": dpo},
        {"id": "flat", "claim": "TD-DPO varies less over beta.", "at_least": 0.4}
        | {"kind": "variance_reduction", "metric": "task:constraints", "a": td_dpo, "b": dpo},
        {"id": "par", "claim": "DiscoPOP is level with DPO.", "margin": 0.05}
        | {
            "kind": "equivalence",
            "metric": "task",
            "a": {"loss": "discopop", "beta": "best"},
            "b": dpo,
        },
    ]


if __name__ == "__main__":
    target = Path(sys.argv[1])
    make_task_study(target)
    write_json(target / "results" / "claims.json", claims())
    print(f"analyze.py {target / 'results'} --data {target / 'data'}")
