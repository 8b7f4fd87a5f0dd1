"""What belongs together: judgements to answers, answers to the adapter, and all of it to one run.

Files are written by different stages at different times. An adapter is trained again, answers are
made again, a question is edited, a file is copied from another run: then old numbers stand beside
new ones, and nothing in either shows it. `keep_what_belongs` compares the hashes that the stages
left, takes out what does not belong to the rest, and keeps a `Stale` for it in the run: what was
taken out, why, and which command supplies it.

    val_pairs.jsonl, metrics.jsonl    must show the accuracy that summary.json has
    <bench>/answers.jsonl             must be of the adapter in the folder, and in all runs of the
                                      same questions
    <bench>/judgements.csv            must be of the answers that the run, and the baseline of a
                                      comparison, have now

What cannot be checked, because a file is not there or was written without a hash, is kept.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from pref.analysis import bench_data, judge_identity, run_metrics, stats
from pref.analysis.bench_data import AllData, BenchData
from pref.analysis.runs import MT_BENCH, BenchFiles, JudgeKey, Run, Stale
from pref.files import console, mt_bench, run_folders
from pref.files.console import UserError

# A margin this near to 0 (nats) may have another sign in the float32 of the training.
NEAR_TIE = 5e-3
# Mean change of the reference's margins (nats) that is no rounding: a run that was continued may
# have computed its reference again.
OTHER_REFERENCE = 0.5
SAME = 1e-6  # accuracies are equal if they differ by less: a pair counts more


def keep_what_belongs(runs: list[Run], data: AllData) -> list[Run]:
    """The runs without answers and judgements that do not belong to the rest, which `Run.stale`
    names. `check_training` has seen to the other files.

    data: by benchmark, with the questions as they are asked now; may be empty.
    """
    runs = [check_adapter(run) for run in console.progress(runs, "checking", "runs")]
    for bench in bench_names(runs):
        of_bench = bench_data.of(data, bench)
        runs = check_questions(runs, bench, of_bench.questions)
        answers_of = {run.run_id: run.bench(bench).answers for run in runs}
        runs = [check_judgements(run, bench, answers_of, of_bench) for run in runs]
    return runs


def bench_names(runs: list[Run]) -> list[str]:
    """The benchmarks of which any run has files, MT-Bench first."""
    names = {name for run in runs for name in run.benches}
    return sorted(names, key=lambda name: (name != MT_BENCH, name))


def of_bench(bench: str) -> str:
    """What a message adds where it is not about MT-Bench."""
    return "" if bench == MT_BENCH else f" of {bench}"


def judge_command(bench: str) -> str:
    return "judge.py" if bench == MT_BENCH else f"judge.py --bench {bench}"


def gen_command(bench: str) -> str:
    return "gen_mtbench.py" if bench == MT_BENCH else f"gen_mtbench.py --bench {bench}"


def without_answers(run: Run, bench: str, why: str, then: str = ", then ") -> Run:
    """The run without its answers to a benchmark, and what was made from them."""
    what = f"answers and scores{of_bench(bench)}"
    again = f"{gen_command(bench)}{then}{judge_command(bench)}"
    return run.with_bench(bench, BenchFiles(), Stale(what, why, again))


# ---- training: summary.json, val_pairs.jsonl, metrics.jsonl --------------------------------------


def check_training(run: Run) -> Run:
    """Take out validation pairs and curves that are not of the training that summary.json is of.

    Raises UserError if neither is: then the summary is the odd one.
    """
    if run.summary is None:
        return run
    pairs, curve = why_other_pairs(run), why_other_curve(run)
    if pairs and curve:
        raise UserError(
            f"{run.path / 'summary.json'}: is of another training than the files beside it "
            f"({pairs}; {curve}); put the right file back, or remove the folder and train again"
        )
    again = "put the right file back, or remove the folder and run train_pref.py again"
    if pairs:
        stale = Stale("margins and their errors", f"val_pairs.jsonl: {pairs}", again)
        run = replace(run, val={}, length_bias=[], stale=[*run.stale, stale])
    if curve:
        stale = Stale("learning curve", f"metrics.jsonl: {curve}", again)
        run = replace(run, steps=[], evals=[], stale=[*run.stale, stale])
    return run


def why_other_pairs(run: Run) -> str | None:
    """Why the validation pairs are of another training than the summary; None if they are not."""
    accuracy = run.summary["best_acc_ref"]
    if not run.val or run.best_step is None or accuracy is None:
        return None
    if run.best_step not in run.val:
        return f"has no rows of the best step, {run.best_step:g}"
    pairs = run.best_val
    right = sum(map(run_metrics.ranked_right, pairs.values())) / len(pairs)
    near_ties = sum(abs(margins.rho) < NEAR_TIE for margins in pairs.values() if margins)
    if abs(right - accuracy) > near_ties / len(pairs) + SAME:
        return (
            f"ranks {right:.1%} of the pairs correctly at step {run.best_step:g}, while "
            f"summary.json has {accuracy:.1%}"
        )
    first = run.val[min(run.val)]
    if first.keys() != pairs.keys():
        return "has other pairs at the first step than at the best"
    # delta - rho is the reference's part of a margin, which training does not change.
    moved = [
        abs((margins.delta - margins.rho) - (first[pair].delta - first[pair].rho))
        for pair, margins in pairs.items()
        if margins and first[pair]
    ]
    if moved and stats.mean(moved) > OTHER_REFERENCE:
        return f"has two reference models, whose margins differ by {stats.mean(moved):.3g} nats"
    return None


def why_other_curve(run: Run) -> str | None:
    """Why the learning curve is of another training than the summary; None if it is not."""
    summary = run.summary
    accuracy_at = {row["step"]: row.get("eval/acc_ref") for row in run.evals}
    for when, step in (("best", summary["best_step"]), ("final", summary["steps"])):
        expected, found = summary[f"{when}_acc_ref"], accuracy_at.get(step)
        if None not in (expected, found) and abs(expected - found) > SAME:
            return (
                f"has accuracy {found:.4f} at step {step:g}, while summary.json has {expected:.4f}"
            )
    last = max((row["step"] for row in run.steps), default=0)
    if summary["steps"] is not None and last > summary["steps"]:
        return f"goes on to step {last:g}, while summary.json ends at {summary['steps']:g}"
    return None


# ---- answers: of this adapter, of the same questions --------------------------------------------


def check_adapter(run: Run) -> Run:
    """Take out answers that are not by the weights in the folder."""
    kind = run_folders.WEIGHTS.get(run_folders.tune_of(run.args), "weights")
    in_folder = None  # hash of the weights, once it is needed
    for bench, files in run.benches.items():
        answered_by = {row.get("adapter_sha256") for row in files.answers.values()} - {None}
        if not answered_by:
            continue
        if run.untrained:
            why = "its answers are by an adapter, and the untrained model has none"
        elif run.status == "unfinished":
            why = f"it is being trained again, and its answers are by the {kind} of before"
        else:
            if in_folder is None:
                in_folder = run_folders.weights_sha256(run.path)
            if in_folder is None or answered_by == {in_folder}:
                continue
            why = f"its {kind} was trained again, or replaced, after its answers were made"
        run = without_answers(run, bench, why)
    return run


def check_questions(runs: list[Run], bench: str, questions: dict[int, list[str]]) -> list[Run]:
    """Take out answers to a question in another wording, or at another temperature, than in the
    other runs; and, in all runs, the questions that were edited since.
    """
    # 1) The version of each question: that of question.jsonl if a run answered it, else that which
    #    most runs answered.
    counts: dict[int, Counter] = defaultdict(Counter)
    current = set()
    for run in runs:
        for question, asked, is_current in asked_questions(run, bench, questions):
            counts[question][asked] += 1
            if is_current:
                current.add((question, asked))
    version = {
        question: max(versions, key=lambda one: ((question, one) in current, versions[one]))
        for question, versions in counts.items()
    }

    # 2) Runs that answered another version of any question.
    kept = []
    for run in runs:
        asked_now = asked_questions(run, bench, questions)
        other = {q for q, asked, _ in asked_now if asked != version[q]}
        if other:
            why = (
                "it answered questions in another wording, or at another temperature, than other "
                f"runs ({shorten(other)})"
            )
            run = without_answers(run, bench, why, then=", ")
        kept.append(run)

    # 3) Questions whose version is not the current one. If none is, the file has other questions
    #    altogether, and the report only has to leave its texts out.
    edited = edited_questions(kept, bench, questions)
    if edited == {question for question in version if question in questions}:
        return [without_texts(run, bench, edited) for run in kept]
    return [without_questions(run, bench, edited) for run in kept]


def asked_questions(
    run: Run, bench: str, questions: dict[int, list[str]]
) -> Iterable[tuple[int, str, bool]]:
    """(question, hash of what was asked, whether the question's file still asks the same), of each
    of the run's answers that has that hash.
    """
    for (question, _), row in run.bench(bench).answers.items():
        if asked := row.get("question_sha256"):
            turns, temperature = questions.get(question), row.get("temperature")
            yield question, asked, mt_bench.question_sha256(turns, temperature) == asked


def edited_questions(runs: list[Run], bench: str, questions: dict[int, list[str]]) -> set[int]:
    """Questions that their file has in another wording than was answered."""
    return {
        question
        for run in runs
        for question, _, is_current in asked_questions(run, bench, questions)
        if question in questions and not is_current
    }


def folder_flag(bench: str) -> str:
    """The argument of analyze.py that names the folder of a benchmark's questions."""
    return f"--{bench}" if bench in (MT_BENCH, "alpaca_eval") else "--data"


def without_texts(run: Run, bench: str, edited: set[int]) -> Run:
    """The run with a note that its answers are shown without the texts of the questions."""
    if not any(key.question_id in edited for key in run.bench(bench).answers):
        return run
    stale = Stale(
        f"texts of the questions{of_bench(bench)} beside the answers",
        "question.jsonl has other questions than were answered",
        f"{folder_flag(bench)} with the folder of the questions that were answered",
    )
    return replace(run, stale=[*run.stale, stale])


def without_questions(run: Run, bench: str, edited: set[int]) -> Run:
    """The run without its answers to `edited` questions, and what was made from them."""

    def kept(rows: list[dict]) -> list[dict]:
        return [row for row in rows if row["question_id"] not in edited]

    files = run.bench(bench)
    answers = {key: row for key, row in files.answers.items() if key.question_id not in edited}
    if len(answers) == len(files.answers):
        return run
    stale = Stale(
        f"answers to {shorten(edited)}{of_bench(bench)}, and their scores,",
        "question.jsonl asks something else now than was answered",
        f"the old question.jsonl with {folder_flag(bench)}, or {gen_command(bench)} and "
        f"{judge_command(bench)} for the new one",
    )
    judged = {key: kept(rows) for key, rows in files.judged.items()}
    left = BenchFiles(
        answers=answers,
        judged={key: rows for key, rows in judged.items() if rows},
        pairs=kept(files.pairs),
        rewards=kept(files.rewards),
        kl=run_metrics.run_kl(answers),
    )
    return run.with_bench(bench, left, stale)


def shorten(questions: Iterable[int]) -> str:
    """E.g. "questions 81, 82, 83 and 12 more"."""
    first, *others = sorted(questions)
    if not others:
        return f"question {first}"
    shown = [first, *others][:5]
    more = len(others) + 1 - len(shown)
    return f"questions {', '.join(map(str, shown))}" + (f" and {more} more" if more else "")


# ---- judgements: of these answers ---------------------------------------------------------------


def check_judgements(run: Run, bench: str, answers_of: dict[str, dict], data: BenchData) -> Run:
    """Take out, judge by judge, ratings that are not all of the run's answers, and comparisons that
    are not all of its answers and the baseline's.

    All of a judge's, not just those: a run with few questions left would take the others from every
    run that it is compared with.

    answers_of: run id -> answers of the runs that were read; of other baselines they are read here.
    """
    files, stale = run.bench(bench), []
    again = judge_command(bench)

    judged = {}
    for key, rows in files.judged.items():
        if why := why_not_its_judgements(run, bench, rows, [files.answers]):
            name = rows[0].get("title") or key.judge
            stale.append(Stale(f"scores by {name}{of_bench(bench)}", why, again))
        else:
            judged[key] = rows

    def sides_of(baseline: str | None) -> list[dict]:
        other = None
        if baseline:
            other = baseline_answers(run.path.parent, baseline, bench, answers_of, data)
        return [files.answers] if other is None else [files.answers, other]

    rewards = []
    for (key, baseline), rows in by_judge(files.rewards).items():
        if why := why_not_its_judgements(run, bench, rows, sides_of(baseline)):
            what, command = "rewards", again
            if judge_identity.is_program(key.judge):
                what, command = "scores", f"{again} --judge {key.judge}"
            stale.append(Stale(f"{what} by {key.judge}{of_bench(bench)}", why, command))
        else:
            rewards += rows

    pairs = []
    for (key, baseline), rows in by_judge(files.pairs).items():
        sides = sides_of(baseline)
        if why := why_not_its_judgements(run, bench, rows, sides):
            next_step = f"{again} --grading pair" if bench == MT_BENCH else again
            if bench == MT_BENCH or baseline not in data.baselines:
                next_step += f" --baseline {baseline}"
            name = rows[0].get("title") or judge_identity.plain_title(key)
            what = f"pairwise judgements{of_bench(bench)} against {baseline} by {name}"
            stale.append(Stale(what, why, next_step))
        else:
            pairs += rows
    if not stale:
        return run
    left = replace(files, judged=judged, pairs=pairs, rewards=rewards)
    return run.with_bench(bench, left, *stale)


def by_judge(rows: list[dict]) -> dict[tuple[JudgeKey, str | None], list[dict]]:
    """Judgements by judge and baseline."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        groups[judge_identity.key_of(row), row["baseline"]].append(row)
    return groups


def why_not_its_judgements(run: Run, bench: str, rows: list[dict], sides: list[dict]) -> str | None:
    """Why judgements are not of the answers that are there; None if they are, or may be.

    sides: the run's answers, and the baseline's for comparisons.
    """
    names = {run.run_id, run.args.get("run_id"), None}
    if others := {row["model_id"] for row in rows} - names:
        return f"judgements.csv is of another run ({', '.join(sorted(others))})"
    if not run.bench(bench).answers:
        folder = run.path / bench
        if (folder / "answers.old.jsonl").exists() or any(folder.glob("turns.*.jsonl")):
            return "its judgements are of answers that are being made again"
        return None
    changed = [row for row in rows if not is_of(row, sides)]
    if changed:
        return (
            f"{len(changed)} of its {len(rows)} judgements are of answers that have been replaced "
            f"since ({shorten({row['question_id'] for row in changed})})"
        )
    return None


def is_of(row: dict, sides: list[dict]) -> bool:
    """Whether a judgement is of the answers in `sides`, as far as its hash tells."""
    key = mt_bench.AnswerKey(row["question_id"], row["choice"])
    if key not in sides[0] or any(answer_of(side, key) is None for side in sides[1:]):
        return False
    if row["answer_sha256"] is None or (row["baseline"] and len(sides) < 2):
        return True
    shown = [answer_of(side, key)["turns"] for side in sides]
    return row["answer_sha256"] == mt_bench.answer_sha256(row["turn"], *shown)


def answer_of(answers: dict, key: mt_bench.AnswerKey) -> dict | None:
    """The answer that a run's answer `key` is compared with: a baseline may have a single one to
    each question.
    """
    return answers.get(key) or answers.get(mt_bench.AnswerKey(key.question_id, 0))


def baseline_answers(
    results_dir: Path, baseline: str, bench: str, answers_of: dict[str, dict], data: BenchData
) -> dict | None:
    """The answers of a baseline, a run or an official one; None if they are not there, so that
    nothing can be checked.

    A baseline whose answers were taken out has none that its old judgements could be of.
    """
    if not run_folders.is_run_id(baseline):  # what judge.py imports may be called anything
        return data.baselines.get(baseline)
    path = results_dir / baseline / bench / "answers.jsonl"
    if not path.is_file():
        return data.baselines.get(baseline)
    if baseline not in answers_of:
        turns = 2 if bench == MT_BENCH else None
        answers_of[baseline] = mt_bench.read_answers(path, turns)
    return answers_of[baseline]
