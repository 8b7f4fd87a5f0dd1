"""Results of lm-evaluation-harness (lm_eval) as values by question: the alignment tax.

    lm_eval --model hf --model_args pretrained=BASE,peft=results/RUN/adapter --tasks ifeval,gsm8k \\
        --log_samples --output_path results/RUN/lm_eval

writes, in a folder below results/RUN/lm_eval, results_<time>.json and for each task
samples_<task>_<time>.jsonl. For the untrained model it is `pretrained=BASE` alone, and
results/base/lm_eval. Nothing is computed again here: the harness has scored each question.

How analyze.py uses this:

    found = lm_eval_files.read_run(run.path, run.run_id, run.args)     # UserError: a bad file
    tasks, notes = imported.compare({run_id: found, ...})

`found.tasks` is {name: Task} of one run, and is empty if the run has no lm_eval folder. `compare`
returns, by name of the task or group,

    ImportedTask.values     run id -> question -> {0: value}, in percent points: 0 or 100 where an
                            answer is right or wrong. This is `Values`, and goes through
                            estimates.compare_cells like any other metric. All runs answer the same
                            questions, so differences are paired.
    ImportedTask.title      "gsm8k (exact_match, strict-match, 5-shot)"
    ImportedTask.others     further metrics of the task: title -> Values, in the same form
    ImportedTask.partial    "100 of 1,319 questions (--limit)", or "" if all were answered

and notes, sentences for the report: which file was taken if there are several, what could not be
read of a task, and runs that were left out because they were evaluated otherwise than the rest.

Which metric: the first of METRICS (lm_eval_files.py) that a task has; of several filters the one
that it lists first (gsm8k: strict-match). The others are in `others`. A value must be a number from
0 to 1, more being better: perplexities, BLEU and lists are named in a note and left out. Values are
checked: their mean must be what the results file says.

A group (mmlu, bbh, mmlu_pro ...) is one task: the questions of all its tasks, each counted once.
"""

from collections import Counter
from typing import NamedTuple

from pref.analysis.lm_eval_files import SETTINGS, Imported, Task
from pref.analysis.runs import Values


class ImportedTask(NamedTuple):
    """One task over the runs that can be compared (see above)."""

    name: str
    title: str
    values: Values
    others: dict[str, Values]
    partial: str


def compare(found: dict[str, Imported]) -> tuple[list[ImportedTask], list[str]]:
    """The tasks of several runs, by run id, and notes (those of `found` too). Runs that were
    evaluated otherwise than most are left out of a task, with a note.
    """
    notes = [note for imported in found.values() for note in imported.notes]
    compared = []
    for name in dict.fromkeys(name for imported in found.values() for name in imported.tasks):
        tasks = {run: found[run].tasks[name] for run in found if name in found[run].tasks}
        kept, left_out = keep_alike(tasks)
        notes += [
            f"{run}: {name} is not compared ({why}); evaluate it like the other runs"
            for run, why in left_out.items()
        ]
        first = next(iter(kept.values()))
        metrics = [m for m in first.values if all(m in task.values for task in kept.values())]
        values = {
            metric: {
                run: {question: {0: value} for question, value in task.values[metric].items()}
                for run, task in kept.items()
            }
            for metric in metrics
        }
        shots = first.settings["n_shot"]
        title = first.metric.title + (f", {shots}-shot" if shots is not None else "")
        compared.append(
            ImportedTask(
                name,
                title=f"{name} ({title})",
                values=values.pop(first.metric),
                others={metric.title: by_run for metric, by_run in values.items()},
                partial=partial_text(list(kept.values())),
            )
        )
    return compared, list(dict.fromkeys(notes))


def keep_alike(tasks: dict[str, Task]) -> tuple[dict[str, Task], dict[str, str]]:
    """(runs that were evaluated in the way of most, run -> why it was not)."""
    left_out = {}
    usual = most_common([(task.metric, settings_key(task)) for task in tasks.values()])
    kept = {}
    for run, task in tasks.items():
        metric, settings = usual
        others = [
            f"{title} {mine} instead of {theirs}"
            for title, mine, theirs in zip(SETTINGS.values(), settings_key(task), settings)
            if mine != theirs
        ]
        if task.metric != metric:
            others.append(f"metric {task.metric.title} instead of {metric.title}")
        if others:
            left_out[run] = "; ".join(others)
        else:
            kept[run] = task

    def other_prompts(a: Task, b: Task) -> int:
        pairs = ((a.hashes[question], b.hashes.get(question)) for question in a.hashes)
        return sum(bool(mine and theirs) and mine != theirs for mine, theirs in pairs)

    runs = list(kept)
    reference = kept[runs[0]]
    if any(other_prompts(reference, kept[run]) for run in runs):
        agree = {r: sum(not other_prompts(kept[r], kept[other]) for other in runs) for r in runs}
        reference = kept[max(runs, key=agree.get)]
    for run in runs:
        if n := other_prompts(kept[run], reference):
            left_out[run] = (
                f"{n} of {len(kept[run].hashes)} questions were other ones or asked otherwise"
            )
            del kept[run]
    return kept, left_out


def settings_key(task: Task) -> tuple[str, ...]:
    """What must be equal for two runs to be compared; 0, an empty object and null are the same."""
    return tuple(str(task.settings[key] or "none")[:16] for key in SETTINGS)


def most_common(items: list) -> tuple:
    return Counter(items).most_common(1)[0][0]


def partial_text(tasks: list[Task]) -> str:
    """How many of a task's questions all runs have answered; "" if all."""
    shared = set.intersection(*(set(task.hashes) for task in tasks))
    sizes = [task.n_questions or len(task.hashes) for task in tasks]
    if len(shared) == max(sizes):
        return ""
    limited = " (--limit)" if min(len(task.hashes) for task in tasks) < max(sizes) else ""
    return f"{len(shared):,} of {max(sizes):,} questions{limited}"
