"""From the files of runs to the parts of each measure: one `find` for each line of measures.py.
Those of Arena-Hard are in arena_sources.py.

find_accuracy            training: summary.json and val_pairs.jsonl
find_mt_bench            ratings of results/<run>/mt_bench/judgements.csv, by judge
find_ratings             the same of other benchmarks
find_rewards             scores by reward models, by benchmark (those by a task's program are in
                         task_sources.py)
find_alpaca_eval         preferences on AlpacaEval 2, against a baseline
find_length_controlled   the same at equal length
find_win_rates           preferences on any other benchmark
find_tasks               imported results, by task

Every number is over the questions that all runs were judged on. A question whose judgement failed
counts as judged: it is counted, and is in no mean.
"""

import math
from collections import defaultdict
from statistics import fmean

from pref.analysis import (
    cell_rows,
    imported,
    judge_identity,
    length_control,
    parts,
    run_metrics,
    stats,
)
from pref.analysis.parts import Common, Part, Source, Sources
from pref.analysis.runs import MT_BENCH, Run
from pref.files import alpaca_eval, win_rates
from pref.files.alpaca_eval_download import BASELINE, END, START

ALPACA_EVAL, ARENA_HARD = "alpaca_eval", "arena_hard"
HEADINGS = {"single": "Rating", "reward": "Reward", "program": "Task"}  # by column `grading`
EQUAL = "equal"  # column `reading` of two answers that are the same text


# ---- training -----------------------------------------------------------------------------------


def find_accuracy(runs: list[Run], sources: Sources) -> list[Part]:
    numbers = {run.run_id: cell_rows.accuracy_numbers(run) for run in runs if run.summary}
    # The pairs of later rounds are each run's own, whatever they are called.
    values = {run.run_id: run_metrics.accuracy_values(run) for run in runs if run.round == 1}
    return [Part(facts={}, numbers=numbers, values=values)]


# ---- ratings and rewards ------------------------------------------------------------------------


def find_mt_bench(runs: list[Run], sources: Sources) -> list[Part]:
    """MT-Bench by each judge, with both turns, categories, and what is known of the judge."""
    found = []
    for key in sorted({key for run in runs for key in run.judged}, key=str):
        judged = {run.run_id: run.judged[key] for run in runs if key in run.judged}
        facts = judge_identity.describe_judge(
            key, [row for rows in judged.values() for row in rows]
        )
        common = parts.keep_common(judged)
        answers = {run.run_id: run.answers for run in runs if key in run.judged}
        found.append(
            Part(
                facts=facts,
                numbers={
                    run_id: run_metrics.score_ratings(rows) for run_id, rows in common.rows.items()
                },
                values={
                    run_id: run_metrics.rating_values(run_metrics.turn_means(rows))
                    for run_id, rows in common.rows.items()
                },
                judged=judged,
                questions=common.questions,
                extra=run_metrics.judge_reliability(common.rows, answers),
            )
        )
    return found


def find_ratings(runs: list[Run], sources: Sources) -> list[Part]:
    """Ratings from 1 to 10 on other benchmarks than MT-Bench."""
    return [
        part
        for bench in parts.other_benches(runs)
        for part in scored_parts(runs, bench, sources, "single")
    ]


def find_rewards(runs: list[Run], sources: Sources) -> list[Part]:
    """Scores by reward models; rewards on different questions are never averaged."""
    return [
        part
        for bench in [MT_BENCH, *parts.other_benches(runs)]
        for part in scored_parts(runs, bench, sources, "reward")
    ]


def scored_parts(runs: list[Run], bench: str, sources: Sources, grading: str) -> list[Part]:
    """Parts of answers that were scored one by one, a mean over questions.

    grading: one of HEADINGS. Of a reward model, against whichever baseline it was asked: its score
    of an answer does not depend on that.
    """

    def key_of(row: dict) -> Source | None:
        if row["grading"] != grading:
            return None
        return Source(bench, judge_identity.key_of(row), grading)

    found = []
    for source, judged in parts.group_rows(runs, bench, lambda f: f.judgements(), key_of).items():
        common = parts.keep_common(judged)
        scores = {run_id: question_means(rows) for run_id, rows in common.rows.items()}
        facts = parts.describe_source(source, [row for rows in judged.values() for row in rows])
        facts["heading"] = f"{HEADINGS[grading]}, {parts.bench_title(bench)}"
        found.append(mean_part(source, facts, judged, common, scores, runs, sources))
    return found


def question_means(rows: list[dict]) -> dict[int, float]:
    """question -> mean score: over choices and repeats within a turn, then over turns."""
    by_turn = run_metrics.turn_means(rows)
    by_question: dict[int, list[float]] = defaultdict(list)
    for (question, _), score in by_turn.items():
        by_question[question].append(score)
    return {question: fmean(scores) for question, scores in by_question.items()}


def mean_part(
    source: Source,
    facts: dict,
    judged: dict[str, list[dict]],
    common: Common,
    scores: dict[str, dict[int, float]],
    runs: list[Run],
    sources: Sources,
) -> Part:
    """A part whose number is the mean of scores by question.

    scores: run id -> question -> score.
    """
    answers = {run.run_id: run.bench(source.bench).answers for run in runs}
    numbers = {}
    for run_id, rows in common.rows.items():
        values = list(scores[run_id].values())
        lengths = parts.answer_lengths(rows, answers.get(run_id, {}), {})
        numbers[run_id] = {
            "score": stats.mean(values),
            "se_over_questions": stats.standard_error(values),
            "length": parts.mean_length(lengths),
            **counted(source, rows, scores[run_id], common, sources),
        }
    return Part(
        facts=facts,
        numbers=numbers,
        values={run_id: as_values(by_question) for run_id, by_question in scores.items()},
        judged=judged,
        questions=common.questions,
    )


def as_values(by_question: dict[int, float]) -> dict:
    """As `Values` hold one number a question: question -> 0 -> number."""
    return {question: {0: float(value)} for question, value in by_question.items()}


def counted(source: Source, rows: list[dict], scored, common: Common, sources: Sources) -> dict:
    size = parts.bench_size(
        source.bench, source.category, common.questions, sources.of(source.bench)
    )
    return parts.count_rows(rows, scored, size)


# ---- preferences: AlpacaEval 2 and others --------------------------------------------------------


def question_shares(rows: list[dict]) -> dict[int, float]:
    """question -> mean preference, from 0 (the baseline's answer) to 1 (the run's)."""
    return {question: one - 1 for question, one in win_rates.by_question(rows).items()}


def find_alpaca_eval(runs: list[Run], sources: Sources) -> list[Part]:
    return preference_parts(runs, ALPACA_EVAL, sources)


def find_win_rates(runs: list[Run], sources: Sources) -> list[Part]:
    """Preferences on benchmarks that have no measure of their own for them. MT-Bench's pairwise
    verdicts have tables of their own (pairwise.py).
    """
    benches = [MT_BENCH, *parts.other_benches(runs)]
    return [
        part
        for bench in benches
        if bench != ALPACA_EVAL
        for part in preference_parts(runs, bench, sources)
    ]


def preference_source(row: dict, bench: str) -> Source | None:
    """None for rows that the benchmark's own measure counts."""
    if row["preference"] is None and (bench == MT_BENCH or bench.startswith(ARENA_HARD)):
        return None
    return Source(bench, judge_identity.key_of(row), row["grading"], row["baseline"])


def preference_parts(runs: list[Run], bench: str, sources: Sources) -> list[Part]:
    """Win rates in percent, by judge and baseline."""
    found = []
    groups = parts.group_rows(
        runs, bench, parts.comparisons, lambda row: preference_source(row, bench)
    )
    for source, judged in groups.items():
        common = parts.keep_common(judged)
        scores = {
            run_id: {q: 100 * y for q, y in question_shares(rows).items()}
            for run_id, rows in common.rows.items()
        }
        facts = parts.describe_source(source, [row for rows in judged.values() for row in rows])
        if bench != ALPACA_EVAL:
            facts["heading"] = f"Win rate, {parts.bench_title(bench)}"
        part = mean_part(source, facts, judged, common, scores, runs, sources)
        for run_id, numbers in part.numbers.items():
            numbers |= win_counts(common.rows[run_id])
        if bench == ALPACA_EVAL:
            part.notes.extend(note_control_tokens(runs, common))
        found.append(part)
    return found


def note_control_tokens(runs: list[Run], common: Common) -> list[str]:
    """Runs whose answers hold what separates the messages of AlpacaEval's judge prompt: such an
    answer cuts the prompt off, the instructions to the judge included.
    """
    found = []
    for run in runs:
        answers = run.bench(ALPACA_EVAL).answers.values() if run.run_id in common.rows else ()
        texts = [text for row in answers for text in row["turns"]]
        if n := sum(any(token in text for token in (START, END)) for text in texts):
            found.append(
                f"{run.run_id}: {n} of {len(texts)} answers hold {START} or {END}, "
                "which cut or split the judge's prompt unless judge.py was given --neutralise"
            )
    return found


def win_counts(rows: list[dict]) -> dict:
    """Wins, draws, and the share of wins and half of the draws, in percent."""
    found = win_rates.win_rate(win_rates.by_question(rows).values())
    return {name: getattr(found, name) for name in ("n_wins", "n_draws", "discrete")}


# ---- at equal length ----------------------------------------------------------------------------


def find_length_controlled(runs: list[Run], sources: Sources) -> list[Part]:
    """AlpacaEval's length-controlled win rate, by judge and baseline. The values of its questions
    are their influences on it (length_control.py).
    """
    groups = parts.group_rows(
        runs, ALPACA_EVAL, parts.comparisons, lambda row: preference_source(row, ALPACA_EVAL)
    )
    return [
        length_controlled_part(source, judged, runs, sources) for source, judged in groups.items()
    ]


def length_controlled_part(
    source: Source, judged: dict[str, list[dict]], runs: list[Run], sources: Sources
) -> Part:
    common = parts.keep_common(judged)
    theirs = parts.baseline_answers(source, runs, sources)
    ours = {run.run_id: run.bench(source.bench).answers for run in runs}
    numbers, values, without_gamed, notes, labels = {}, {}, {}, [], set()
    for run_id, rows in common.rows.items():
        y = question_shares(rows)
        lengths = parts.answer_lengths(rows, ours.get(run_id, {}), theirs)
        row = {
            "score": None,
            "se_over_questions": None,
            "win_rate": 100 * fmean(y.values()) if y else None,
            "length": parts.mean_length(lengths),
            "C": None,
            **counted(source, rows, y, common, sources),
        }
        try:
            compared = as_compared(y, lengths)
            fitted, by_question = length_control.control(compared, source.baseline, sources.gamed)
        except length_control.CannotControl as reason:
            notes.append(f"{run_id}: no length-controlled win rate: {reason}")
        else:
            labels.add(fitted.label)
            if fitted.label == length_control.OFFICIAL:
                without_gamed[run_id] = length_control.control(
                    compared, source.baseline, sources.gamed, regularise=False
                ).values
            se = fitted.se if math.isfinite(fitted.se) else None
            row |= {"score": fitted.lc, "se_over_questions": se, "C": fitted.C}
            values[run_id] = by_question
        numbers[run_id] = row
    notes += note_difficulty(source.baseline, sources)
    facts = parts.describe_source(source, [row for rows in judged.values() for row in rows])
    facts["definition"] = ", ".join(sorted(labels)) or None
    facts["heading"] = LC_HEADINGS.get(facts["definition"], f"AlpacaEval 2, {facts['definition']}")
    return Part(facts, numbers, values, judged, common.questions, notes, without_gamed)


LC_HEADINGS = {
    length_control.OFFICIAL: "AlpacaEval 2 length-controlled win rate",
    None: "AlpacaEval 2 length-controlled win rate",
}


def note_difficulty(baseline: str, sources: Sources) -> list[str]:
    """Why length-controlled rates against the official baseline may not be AlpacaEval's."""
    if sources.gamed is None or baseline != BASELINE:
        return []
    data = sources.of(ALPACA_EVAL)
    if data.questions and not alpaca_eval.is_official(
        {question: turns[0] for question, turns in data.questions.items()}
    ):
        return [
            f"the questions in {data.folder} are not AlpacaEval's 805 in their order, but their "
            "difficulty is looked up by question_id, the place in that list: it is wrong wherever "
            "the list was cut, sorted or changed"
        ]
    return []


def as_compared(
    y: dict[int, float], lengths: dict[int, parts.Lengths]
) -> dict[int, length_control.Compared]:
    """What length control needs of one run. Raises CannotControl where something is missing."""
    if lacking := [question for question in y if None in lengths[question]]:
        raise length_control.CannotControl(
            f"the length of {len(lacking)} of its answers, or of the baseline's, is not known (no "
            "`shape` in judgements.csv, and not both answers)"
        )
    if not y:
        raise length_control.CannotControl("no judgement has a preference")
    return {
        question: length_control.Compared(y.get(question), of.baseline, of.run)
        for question, of in lengths.items()
    }


# ---- imported tasks -----------------------------------------------------------------------------


def find_tasks(runs: list[Run], sources: Sources) -> list[Part]:
    """Results of lm-evaluation-harness, each task over the questions that all of its runs have."""
    found = {run.run_id: run.imported for run in runs if run.imported and run.imported.tasks}
    tasks, notes = imported.compare(found)
    return [
        task_part(task, [note for note in notes if f": {task.name} is not compared" in note])
        for task in tasks
    ]  # the notes on files are in notes.note_runs


def task_part(task: imported.ImportedTask, notes: list[str]) -> Part:
    shared = set.intersection(*(set(of_run) for of_run in task.values.values()))
    numbers, values = {}, {}
    for run_id, of_run in task.values.items():
        values[run_id] = {question: of_run[question] for question in sorted(shared)}
        scores = [value for (value,) in map(dict.values, values[run_id].values())]
        numbers[run_id] = {
            "score": stats.mean(scores),
            "se_over_questions": stats.standard_error(scores),
            "n_scored": len(scores),
            "n_judged": len(of_run),
            "n_bench": len(of_run),
            "failures": {},
        }
    partial = f", {task.partial}" if task.partial else ""
    facts = {"task": task.name, "heading": f"Imported task {task.title}{partial}", "title": None}
    others = {
        title: {
            run_id: stats.mean(value for parts_of in of_run.values() for value in parts_of.values())
            for run_id, of_run in of_runs.items()
        }
        for title, of_runs in task.others.items()
    }
    return Part(facts, numbers, values, notes=notes, extra={"others": others})
