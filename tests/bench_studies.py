"""Results folders with every benchmark, for tests of the analysis: judgements as judge.py writes
them, of answers whose quality and length are known.
"""

import json
import math

from studies import (
    make_base,
    make_run,
    noise,
    rating,
    write_curve,
    write_pairs,
)

from pref.files import mt_bench
from pref.files.disk import write_json, write_jsonl
from pref.files.judgements import write_judgements

GPT4, O3 = "gpt4_1106_preview", "o3-mini-2025-01-31"
JUDGE = {
    "judge": "gpt-4.1-2025-04-14",
    "judge_id": "a1",
    "judge_address": "https://api.openai.com/v1",
    "judge_settings": json.dumps({"max_tokens": 1, "temperature": 1}),
}
RM = {"judge": "rm:Skywork-Reward-V2-Qwen3-8B", "judge_id": "r1", "judge_address": None}


# ---- rows of judgements.csv ---------------------------------------------------------------------


def shape(run, baseline, **counts):
    """The column `shape`, of two answers with these numbers of characters."""
    other = {"headers": 0, "lists": 0, "bold": 0}
    sides = {"run": {"chars": run} | other | counts, "baseline": {"chars": baseline} | other}
    return json.dumps(sides)


def preference(question, y, chars=(1000, 1500), **fields):
    """AlpacaEval: y from 0 (baseline) to 1 (run); None: no verdict. chars: of run and baseline."""
    row = {"question_id": question, "turn": 1, "category": None, "choice": 0, "repeat": 0}
    row |= {
        "grading": "pair",
        "order": "12"[question % 2],
        "baseline": GPT4,
        "bench": "alpaca_eval",
    }
    row |= {"prompts": "alpaca_eval", "refs": "original", **JUDGE}
    row |= {"preference": None if y is None else 1 + y, "shape": shape(*chars)}
    return row | {"status": "no_token" if y is None else "ok"} | fields


def games(question, first, second, chars=(1000, 1500), **fields):
    """Arena-Hard's two games: labels as the judge wrote them, of the answers as they were shown."""
    row = {"question_id": question, "turn": 1, "category": "hard_prompt", "choice": 0, "repeat": 0}
    row |= {"grading": "pair", "baseline": O3, "bench": "arena_hard_v2.0"}
    row |= {"prompts": "arena_hard_v2.0", "refs": "original", **JUDGE, "shape": shape(*chars)}
    return [
        row | {"order": order, "label": label, "status": "ok" if label else "parse"} | fields
        for order, label in (("1", first), ("2", second))
    ]


def reward(question, score, bench="alpaca_eval", **fields):
    row = {"question_id": question, "turn": 1, "category": None, "choice": 0, "repeat": 0}
    row |= {"grading": "reward", "bench": bench, "prompts": bench, "refs": "original", **RM}
    return row | {"score": score, "status": "ok" if score is not None else "context"} | fields


def write_bench(folder, bench, rows):
    write_judgements(folder / bench / "judgements.csv", rows)


def write_texts(folder, bench, texts, kl=None, **fields):
    """answers.jsonl: question -> text, one turn each. kl: nats an answer, if it was measured."""
    rows = []
    for question, text in texts.items():
        choice = {"index": 0, "turns": [text], "tokens": [len(text) // 4], "truncated": [False]}
        if kl is not None:
            choice |= {"logp": [-9.0], "logp_base": [-9.0 - kl], "logp_tokens": [len(text) // 4]}
        rows.append({"question_id": question, "choices": [choice], "category": None} | fields)
    write_jsonl(folder / bench / "answers.jsonl", rows)


# ---- a whole study ------------------------------------------------------------------------------

LOSSES = (("dpo", None, 0.0), ("simpo", None, 0.35), ("td_dpo", 1.0, 0.8))  # loss, tau, quality
BETAS, SEEDS = (0.05, 0.5), (42, 43, 44)


def sigma(x):
    return 1 / (1 + math.exp(-x))


def label_of(x):
    """A label from the run's side for a quality between -inf and inf."""
    levels = ((-1.2, "B>>A"), (-0.3, "B>A"), (0.3, "A=B"), (1.2, "A>B"))
    return next((label for limit, label in levels if x < limit), "A>>B")


MIRRORED = {"A>>B": "B>>A", "A>B": "B>A", "A=B": "A=B", "B>A": "A>B", "B>>A": "A>>B"}


def write_benches(folder, run_id, quality, kl, n=80):
    """All benchmarks of one run: answers that are longer where the KL is larger."""
    questions = range(1, n + 1)
    length = {q: int(1200 + 250 * kl + 300 * noise("length", run_id, q)) for q in questions}
    texts = {q: (f"Answer {q} of {run_id}. " * 200)[: length[q]] for q in questions}
    z = {q: quality - 0.6 + 1.5 * noise("q", q) + noise(run_id, q) for q in questions}
    for bench in ("alpaca_eval", "arena_hard_v2.0", "arena_hard_v0.1"):
        write_texts(folder, bench, texts, kl)
    prefer = [
        preference(
            q,
            None if q == 7 and run_id.endswith("s43") else sigma(z[q] + (length[q] - 1500) / 800),
            (length[q], 1500),
            answer_sha256=mt_bench.answer_sha256(1, [texts[q]], [official(q)]),
        )
        for q in questions
    ]
    rewards = [reward(q, 3 * z[q] + kl) for q in questions]
    write_bench(folder, "alpaca_eval", prefer + rewards)
    category = {q: "hard_prompt" if q % 3 else "creative_writing" for q in questions}
    opponent = {"hard_prompt": O3, "creative_writing": "gemini-2.0-flash-001"}
    rows = []
    for q in questions:
        first, second = label_of(z[q] + 0.2), MIRRORED[label_of(z[q] - 0.2)]
        place = {"category": category[q], "baseline": opponent[category[q]]}
        rows += games(q, first, second, (length[q], 1500), **place)
    write_bench(folder, "arena_hard_v2.0", rows)
    old = {"category": "arena-hard-v0.1", "baseline": "gpt-4-0314", "bench": "arena_hard_v0.1"}
    rows = [
        row
        for q in questions
        for row in games(q, label_of(z[q] + 1), MIRRORED[label_of(z[q] + 0.8)], **old)
    ]
    write_bench(folder, "arena_hard_v0.1", rows)


def official(question):
    return f"The baseline's answer {question}. " * 40


def make_bench_study(results, n=80, seeds=SEEDS):
    """Three losses at two betas with all measures, KL, the untrained model, and a validation."""
    make_base(results, ratings=ratings(-1.0, "base", n))
    write_benches(results / "base", "base", -1.0, 0.0, n)
    for loss, tau, effect in LOSSES:
        for beta in BETAS:
            for seed in seeds:
                run_id = f"{loss}_b{beta}_s{seed}"
                quality = effect + 0.2 * noise("seed", run_id) - 0.1 * math.log10(beta)
                hits = [noise("pair", run_id, i) + 0.2 + quality / 4 for i in range(100)]
                summary = {"best_acc_ref": sum(hit > 0 for hit in hits) / 100}
                made = {"summary": summary, "ratings": ratings(quality, run_id, n)}
                folder = make_run(results, run_id, loss, beta, tau, seed, **made)
                write_pairs(
                    folder, {0: [(-9, -9, -9, -9)] * 100, 20: [(h - 9, -9, -9, -9) for h in hits]}
                )
                write_curve(folder)
                kl = 0.4 / beta**0.6 * (1 + 0.15 * noise("kl", run_id))
                write_benches(folder, run_id, quality, kl, n)


def ratings(level, run_id, n):
    def score(q, turn):
        return min(10.0, max(1.0, 6 + 2 * noise(q) + level + noise(run_id, q, turn)))

    names = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem")
    return [
        rating(q, turn, score(q, turn), category=(*names, "humanities")[(q - 81) // 10 % 8])
        for q in range(81, 81 + min(n, 80))
        for turn in (1, 2)
    ]


def write_validation(results, as_humans="yes", warnings=(), judge=JUDGE, **fields):
    """results/judges/<judge>/validation.json, as judge.py --validate writes it."""
    interval = {"estimate": 0.66, "low": 0.63, "high": 0.69, "n": 3355}
    found = {"judge": judge["judge"], "judge_address": judge["judge_address"]}
    found |= {"judge_settings": None, "judge_id": "v1", "data": "mt_bench_human", "n_pairs": 1814}
    found |= {"agreement": interval, "agreement_no_ties": interval, "kappa": interval}
    found |= {"as_humans": as_humans, "warnings": list(warnings)}
    write_json(results / "judges" / "slug" / "validation.json", found | fields)


def write_alpaca_data(folder, n=80, gamed=True):
    """data/alpaca_eval: instructions, the baseline's answers and, with `gamed`, df_gamed.csv."""
    folder.mkdir(parents=True)
    questions = [{"instruction": f"Ask {q}?", "dataset": "koala"} for q in range(1, n + 1)]
    (folder / "questions.json").write_text(json.dumps(questions))
    rows = [
        {"question_id": q, "model_id": GPT4, "choices": [{"index": 0, "turns": [official(q)]}]}
        for q in range(1, n + 1)
    ]
    write_jsonl(folder / "baseline" / "answers.jsonl", rows)
    if gamed:
        lines = ["preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline,model"]
        for model, sign in (("verbose", -1), ("concise", 1)):
            for i in range(n):
                delta = sign * (1 + noise(model, i) / 2)
                y = sigma(-1.5 * math.tanh(delta) + noise("y", model, i))
                lines.append(f"{y},{i},{delta},{noise('d', i)},False,{GPT4}_{model}")
        (folder / "df_gamed.csv").write_text("\n".join(lines) + "\n")
