"""Results folders, runs and cells for tests of the analysis."""

import contextlib
import random
from pathlib import Path
from unittest import mock

import matplotlib

import analyze
from pref.analysis import results_folder
from pref.analysis.bench_data import BenchData
from pref.analysis.parts import Sources
from pref.analysis.runs import Cell, Run
from pref.files import drawing
from pref.files.disk import write_json, write_jsonl
from pref.files.judgements import write_judgements

MODEL, DATA = "meta-llama/Llama-2-7b-chat-hf", {"train": "a1", "val": "b2"}
SUMMARY = {"status": "finished", "steps": 40, "nonfinite_steps": 0, "best_step": 20}
SUMMARY |= {"best_acc_ref": 0.6, "final_acc_ref": 0.5, "final_acc_sum": 0.4, "final_acc_mean": 0.3}
SUMMARY |= {"wall_s": 9.0, "tokens": 100, "peak_gib": 1.5}
DRAWS = ("--draws", "300")  # where the number of draws does not matter


# ---- figures -------------------------------------------------------------------------------------


@contextlib.contextmanager
def coarse_figures():
    """Figures are written at a low resolution, and their fonts as outlines: rendering PNG files and
    embedding fonts is most of an analysis' time. test_display.py looks at the files as they are.
    """
    save_figure = drawing.save_figure

    def save_coarsely(figure, stem, key=None, dpi=None, suffixes=drawing.PAGE_FILES):
        matplotlib.rcParams["pdf.fonttype"] = 3  # within drawing.own_style, which puts it back
        save_figure(figure, stem, key, dpi=40, suffixes=suffixes)

    with mock.patch.object(drawing, "save_figure", save_coarsely):
        yield


# ---- run folders --------------------------------------------------------------------------------


def make_run(
    results,
    run_id,
    loss="td_dpo",
    beta=0.1,
    tau=None,
    seed=42,
    *,
    summary=None,
    ratings=None,
    **args,
):
    """A run folder with args.json and, if given, summary.json and judgements.csv."""
    folder = results / run_id
    shared = {"mode": "full", "model": MODEL, "data_sha256": DATA, "learning_rate": 1e-5}
    shared |= {"versions": {"torch": "2"}}
    own = {"run_id": run_id, "loss": loss, "beta": beta, "tau": tau, "seed": seed}
    write_json(folder / "args.json", shared | own | args)
    if summary is not None:
        write_json(folder / "summary.json", SUMMARY | summary)
    if ratings is not None:
        write_judgements(folder / "mt_bench" / "judgements.csv", ratings)
    return folder


def make_base(results, **kw):
    return make_run(results, "base", None, None, None, None, data_sha256=None, **kw)


def rating(question, turn, score, **fields):
    """A row of judgements.csv; score None is a judgement that failed."""
    row = {"question_id": question, "turn": turn, "category": "writing", "choice": 0, "repeat": 0}
    row |= {"grading": "single", "judge": "gpt-5-mini", "prompts": "fastchat", "refs": "original"}
    row |= {"score": score, "status": "ok" if score is not None else "parse"}
    return row | fields


def flat_ratings(score, **fields):
    """Two questions, both turns, one score."""
    return [rating(question, turn, score, **fields) for question in (81, 82) for turn in (1, 2)]


def write_pairs(folder, by_step):
    """val_pairs.jsonl from step -> [(policy_chosen, policy_rejected, ref_chosen, ref_rejected)]."""
    lengths = {"len_chosen": 5, "len_rejected": 5}
    rows = [
        {"id": f"p{i}", "step": step, **dict(zip(results_folder.VAL_KEYS, logps)), **lengths}
        for step, pairs in by_step.items()
        for i, logps in enumerate(pairs)
    ]
    write_jsonl(folder / "val_pairs.jsonl", rows)


def write_curve(folder, steps=8, bad=()):
    """metrics.jsonl with an evaluation every four steps; `bad` steps are not finite."""
    keys = ("loss", "rewards/accuracies", "margin/rho", "margin/delta", "grad_norm")
    evals = ("loss", "acc_ref", "acc_sum", "acc_mean", "margin/rho", "margin/delta")
    rows = []
    for step in range(1, steps + 1):
        head = {"step": step, "epoch": step / 4}
        values = dict.fromkeys(keys, None if step in bad else 1 / step)
        nonfinite = sum(s <= step for s in bad)
        rows.append({**head, **values, "lr": 1e-5, "nonfinite": nonfinite})
        if step % 4 == 0:
            rows.append(head | {f"eval/{key}": 0.6 for key in evals})
    write_jsonl(folder / "metrics.jsonl", rows)


def spoil(folder, name, content):
    """Write text or bytes that cannot be read over a file of a run."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


# ---- studies ------------------------------------------------------------------------------------


def make_grid(results):
    """dpo at two betas, td_dpo at one beta and two tau, one to three seeds; base."""
    make_base(results, ratings=flat_ratings(4))
    cells = {  # seed, score, accuracy
        ("dpo", 0.1, None): [(42, 4, 0.60), (43, 6, 0.62)],
        ("dpo", 0.5, None): [(42, 5, 0.70)],
        ("td_dpo", 0.1, 1): [(42, 6, 0.64), (43, 7, 0.66), (44, 8, 0.68)],
        ("td_dpo", 0.1, 2): [(42, 5, 0.50)],
    }
    for (loss, beta, tau), seeds in cells.items():
        for seed, score, accuracy in seeds:
            name = f"{loss}_b{beta}_t{tau}_s{seed}"
            contents = {"summary": {"best_acc_ref": accuracy}, "ratings": flat_ratings(score)}
            make_run(results, name, loss, beta, tau, seed, **contents)


EFFECTS = (("dpo", None, 0.0), ("td_dpo", 1.0, 1.0), ("discopop", None, -0.5))  # loss, tau, effect


def noise(*key):
    """A reproducible number between -1 and 1 for a question, seed, ..."""
    return random.Random(str(key)).uniform(-1, 1)


def make_study(results, seeds=(42, 43, 44)):
    """Losses at two betas with a true effect, all parts of a run, and the untrained model."""

    def ratings(level, run):
        def score(question, turn):
            return 5 + noise(question) + level + noise(run, question, turn) / 2

        return [
            rating(
                question, turn, score(question, turn), category=("math", "writing")[question % 2]
            )
            for question in range(81, 93)
            for turn in (1, 2)
        ]

    make_base(results, ratings=ratings(-1.0, "base"))
    for loss, tau, effect in EFFECTS:
        for beta in (0.1, 0.5):
            for seed in seeds:
                run_id = f"{loss}_b{beta}_s{seed}"
                hits = [noise("pair", run_id, i) + 0.3 + effect / 2 for i in range(40)]
                accuracy = sum(hit > 0 for hit in hits) / 40
                contents = {
                    "summary": {"best_acc_ref": accuracy},
                    "ratings": ratings(effect, run_id),
                }
                folder = make_run(results, run_id, loss, beta, tau, seed, **contents)
                after = [(hit - 9, -9, -9, -9) for hit in hits]
                write_pairs(folder, {0: [(-9, -9, -9, -9)] * 40, 20: after})
                write_curve(folder)
                write_answers(folder, effect)


def write_answers(folder, effect):
    """answers.jsonl in which the run's KL to the base is 1.5 nats per answer if `effect` is 1."""
    choice = {"index": 0, "turns": ["x" * 5, "y" * 6], "logp_tokens": [2, 3]}
    choice |= {"logp": [-3, -2], "logp_base": [-4 - effect, -3]}
    rows = [
        {"question_id": question, "choices": [choice], "category": "math"}
        for question in range(81, 93)
    ]
    write_jsonl(folder / "mt_bench" / "answers.jsonl", rows)


# ---- what the analysis makes of a folder --------------------------------------------------------


def data_of(questions):
    """MT-Bench's data folder, with these questions."""
    return {"mt_bench": BenchData(questions=questions or {})}


def load(results, questions=None):
    """The runs of a results folder, without the notes."""
    runs, _ = results_folder.load_runs(results, data=data_of(questions))
    return runs


def compared(results, *flags, questions=None):
    """aggregated_metrics.json without drawing anything."""
    args = analyze.parse_args([str(results), *DRAWS, *flags])
    data = data_of(questions)
    runs, notes = results_folder.load_runs(args.results_dir, args.run_ids, args.skip_bad, data)
    return analyze.compare(runs, args, notes, Sources(data))


def row_of(rows, label):
    return next(row for row in rows if row["label"] == label)


def has_note(comparison, *parts):
    """Whether one note has all of these parts."""
    return any(all(part in note for part in parts) for note in comparison["notes"])


def find_gap(comparison, what):
    """The entry of `missing` whose `what` has this text, or None."""
    return next((gap for gap in comparison["missing"] if what in gap["what"]), None)


# ---- runs and cells without a folder ------------------------------------------------------------


def a_run(run_id, loss="dpo", beta=0.1, tau=None, seed=42, settings=None, **fields):
    """A Run with the fields that a test needs."""
    args = {"loss": loss, "beta": beta, "tau": tau, "seed": seed, **(settings or {})}
    fields = {"status": "finished", "path": Path(run_id), **fields}
    return Run(run_id=run_id, loss=loss or run_id, args=args, settings=settings or {}, **fields)


def a_cell(runs, label=None, accuracy=None):
    first = runs[0]
    return Cell(
        loss=first.loss,
        beta=first.beta,
        tau=first.tau,
        settings=first.settings,
        runs=runs,
        label=label or first.loss,
        accuracy=accuracy,
    )
