"""What lm-evaluation-harness (lm_eval) leaves on disk for one run, read and checked.

`--output_path results/RUN/lm_eval --log_samples` gives a folder there with results_<time>.json and,
for each task, samples_<task>_<time>.jsonl: a row for each question and filter. `read_run` makes of
them the values of each task by question (format as of lm_eval 0.4.3 to 0.4.13). imported.py says
which metric counts, and compares runs.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pref.files import disk
from pref.files.console import UserError

FOLDER = "lm_eval"
# Of a task's metrics, the first of these is its value; any other comes after them.
METRICS = ("prompt_level_strict_acc", "exact_match", "acc_norm", "pass@1", "pass_at_1", "acc")
ADAPTERS = ("peft", "lora_local_path", "lora", "adapter", "delta")  # arguments that name an adapter
MODELS = ("pretrained", "model", "path", "engine")  # and those that name a model
# What must be equal for two runs' values to be compared, and how a note calls it.
SETTINGS = {
    "version": "version of the task",
    "n_shot": "number of examples in the prompt",
    "chat_template_sha": "chat template",
    "system_instruction_sha": "system message",
    "fewshot_as_multiturn": "examples as turns of a conversation",
    "gen_kwargs": "generation arguments",
}


class Metric(NamedTuple):
    """A metric and the filter that the answers went through; "none" if there was none."""

    name: str
    filter: str

    @property
    def title(self) -> str:
        return self.name if self.filter == "none" else f"{self.name}, {self.filter}"


@dataclass(frozen=True)
class Task:
    """One task, or group of tasks, of one run. Questions are document numbers; in a group, pairs of
    task and number.
    """

    name: str
    values: dict[Metric, dict]  # the metric that counts first -> question -> percent points
    hashes: dict  # question -> hash of its text and prompt; "" in old files
    settings: dict  # by the keys of SETTINGS
    n_questions: int | None  # of the whole task; None if not known
    path: Path  # of the results file

    @property
    def metric(self) -> Metric:
        return next(iter(self.values))


@dataclass(frozen=True)
class Imported:
    """What the lm_eval folder of a run holds."""

    tasks: dict[str, Task] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Source(NamedTuple):
    """A results file."""

    path: Path
    results: dict

    @property
    def time(self) -> str:
        return self.path.stem.removeprefix("results_")


# ---- one run -------------------------------------------------------------------------------------


def read_run(folder: Path, run_id: str, args: dict) -> Imported:
    """The tasks of one run, from the files in `folder`/lm_eval; empty if there is no such folder.

    args: the run's args.json; of it, `model` and `loss` (None: the untrained model). Of a task that
    was evaluated several times the newest counts, with a note. Raises UserError, by file, for one
    that cannot be read or is of another model.
    """
    newest: dict[str, Source] = {}
    times, notes = Counter(), []
    paths = sorted((folder / FOLDER).glob("**/results_*.json"), key=lambda path: path.name)
    if not paths and (folder / FOLDER).is_dir():
        notes.append(f"{run_id}: no results_<time>.json in {folder / FOLDER}")
    for path in paths:
        source = Source(path, read_results(path))
        if doubt := check_model(source, run_id, args):
            notes.append(doubt)
        tasks = leaf_tasks(source.results)
        newest |= dict.fromkeys(tasks, source)
        times.update(tasks)
    for path in dict.fromkeys(newest[name].path for name in times if times[name] > 1):
        names = [name for name in newest if newest[name].path == path and times[name] > 1]
        notes.append(f"{run_id}: {', '.join(names)}: of several evaluations {path.name} counts")

    leaves: dict[str, Task] = {}
    missing: dict[Path, list[str]] = {}
    for name, source in newest.items():
        samples = source.path.with_name(f"samples_{name}_{source.time}.jsonl")
        if not samples.exists():
            missing.setdefault(source.path, []).append(name)
            continue
        task, skipped = read_task(name, source, samples)
        if task:
            leaves[name] = task
        if skipped:
            listed = ", ".join(f"{metric.title} ({why})" for metric, why in skipped.items())
            notes.append(f"{name}: left out: {listed}")
    for path, names in missing.items():
        notes.append(
            f"{run_id}: no values by question of {', '.join(names)}: there is no samples_*.jsonl "
            f"beside {path}; evaluate again with --log_samples"
        )
    return Imported(*join_groups(leaves, newest, run_id, notes))


def read_results(path: Path) -> dict:
    """A results file, checked as far as it is used. Raises UserError."""
    results = disk.read_json(path)
    for key in ("results", "config"):
        if not isinstance(results.get(key), dict):
            raise UserError(f"{path}: no {key!r}: not a results file of lm_eval; remove it")
    for key in ("n-samples", "n-shot", "versions", "group_subtasks", "higher_is_better"):
        # Files of some versions have null here, or no such key.
        results[key] = results[key] if isinstance(results.get(key), dict) else {}
    for name, task in results["results"].items():
        if not isinstance(task, dict):
            raise UserError(f"{path}: results of {name!r} are no object; remove the file")
    return results


def check_model(source: Source, run_id: str, args: dict) -> str | None:
    """Whether a results file is of this run, by the model that lm_eval was given. A doubt as a
    note; raises UserError if it is of another model.
    """
    given = model_args(source.results["config"])
    adapters = {key: given[key] for key in ADAPTERS if given.get(key)}
    models = {key: given[key] for key in MODELS if given.get(key)}
    shown = ", ".join(f"{key}={value}" for key, value in (adapters | models).items())
    base = last_part(str(args["model"]))
    is_base = any(last_part(value) == base for value in models.values())
    remedy = "move the file to the run it belongs to"
    if args["loss"] is None:
        if adapters:
            raise UserError(
                f"{source.path}: was evaluated with an adapter ({shown}), but {run_id} is the "
                f"untrained model; {remedy}"
            )
        named = is_base
    else:
        named = any(run_id in parts(value) for value in (adapters or models).values())
        if not named and (adapters or is_base):
            what = "another adapter" if adapters else "the untrained model"
            raise UserError(f"{source.path}: is of {what} ({shown}), not of {run_id}; {remedy}")
    if named:
        return None
    return (
        f"{run_id}: {source.path.name} does not say that it is of this run ({shown or 'no model'})"
    )


def model_args(config: dict) -> dict[str, str]:
    """lm_eval's --model_args, which a results file has as text or as an object."""
    given = config.get("model_args")
    if isinstance(given, str):
        pairs = (pair.partition("=") for pair in given.split(","))
        given = {key.strip(): value.strip() for key, _, value in pairs}
    if not isinstance(given, dict):
        return {}
    return {key: str(value) for key, value in given.items() if value is not None}


def parts(path: str) -> list[str]:
    """The names in a path of any system, without empty ones."""
    return [part for part in re.split(r"[/\\]", path) if part]


def last_part(path: str) -> str:
    return (parts(path) or [""])[-1]


def subtasks(results: dict, name: str) -> list[str]:
    """Names of the tasks and groups directly below a group; empty of a task."""
    below = results["group_subtasks"].get(name)
    return [task for task in below if isinstance(task, str)] if isinstance(below, list) else []


def leaf_tasks(results: dict) -> list[str]:
    return [name for name in results["results"] if not subtasks(results, name)]


# ---- one task ------------------------------------------------------------------------------------


def read_task(name: str, source: Source, samples: Path) -> tuple[Task | None, dict[Metric, str]]:
    """The values of one task, and the metrics that were left out, with the reason.

    Raises UserError for a samples file that cannot be read or is not complete.
    """
    results = source.results
    reported = {}  # in the order of the file: of the task's filters
    for key, value in results["results"][name].items():
        metric, _, used_filter = key.partition(",")
        if disk.is_number(value) and not metric.endswith("_stderr") and metric != "sample_len":
            reported[Metric(metric, used_filter or "none")] = value
    values, hashes = read_samples(samples, reported)

    size = results["n-samples"].get(name)
    size = size if isinstance(size, dict) else {}
    if disk.is_number(size.get("effective")) and size["effective"] != len(hashes):
        raise UserError(
            f"{samples}: has {len(hashes)} questions, but {source.path.name} says that "
            f"{size['effective']} were answered; copy the whole file again"
        )
    better = results["higher_is_better"].get(name)
    better = better if isinstance(better, dict) else {}
    skipped = {}
    for metric in reported:
        if why := find_fault(values[metric], reported[metric], better.get(metric.name)):
            skipped[metric] = why
    usable = sorted((metric for metric in reported if metric not in skipped), key=rank)
    if not usable:
        return None, skipped
    settings = {key: results.get(key) for key in SETTINGS}
    settings["version"] = results["versions"].get(name)
    settings["n_shot"] = results["n-shot"].get(name)
    settings["gen_kwargs"] = results["config"].get("gen_kwargs")
    percent = {
        metric: {question: 100 * float(value) for question, value in values[metric].items()}
        for metric in usable
    }
    original = size.get("original") if disk.is_number(size.get("original")) else None
    return Task(name, percent, hashes, settings, original, source.path), skipped


def rank(metric: Metric) -> int:
    """Place of a metric in METRICS; sorting by it keeps the task's own order of filters."""
    return METRICS.index(metric.name) if metric.name in METRICS else len(METRICS)


def read_samples(path: Path, metrics: dict[Metric, float]) -> tuple[dict[Metric, dict], dict]:
    """(metric -> question -> value as it is in the file, question -> hash)."""
    values: dict[Metric, dict] = {metric: {} for metric in metrics}
    hashes: dict[int, str] = {}
    seen = set()
    filters = list(dict.fromkeys(metric.filter for metric in metrics))
    for number, row in disk.read_jsonl(path):
        question = row.get("doc_id")
        if not isinstance(question, int) or isinstance(question, bool):
            raise UserError(f"{path}:{number}: no doc_id: not a samples file of lm_eval")
        used = row.get("filter", filters[0] if len(filters) == 1 else None)
        if not isinstance(used, str):
            raise UserError(
                f"{path}:{number}: does not say to which of the filters {', '.join(filters)} it "
                "belongs; evaluate again with a later lm_eval"
            )
        if (question, used) in seen:
            raise UserError(f"{path}:{number}: doc_id {question} appears twice ({used})")
        seen.add((question, used))
        hashes[question] = "".join(
            str(row.get(key, ""))[:16] for key in ("doc_hash", "prompt_hash")
        )
        for metric in metrics:
            if metric.filter == used and metric.name in row:
                values[metric][question] = row[metric.name]
    return values, hashes


def find_fault(values: dict, reported: float, higher_is_better: bool | None) -> str | None:
    """Why the values of a metric cannot be compared question by question; None if they can."""
    if higher_is_better is False:
        return "less is better"
    if not values:
        return "no values by question"
    if not all(isinstance(value, bool) or disk.is_number(value) for value in values.values()):
        return "values that are no numbers"
    if not all(0 <= value <= 1 for value in values.values()):  # NaN too
        return "values that are not from 0 to 1"
    if not abs(math.fsum(values.values()) / len(values) - reported) < 1e-6:
        return f"lm_eval's {reported:.4g} is not the mean of its values"
    return None


# ---- groups --------------------------------------------------------------------------------------


def join_groups(
    leaves: dict[str, Task], newest: dict[str, Source], run_id: str, notes: list[str]
) -> tuple[dict[str, Task], list[str]]:
    """(tasks, notes) with the tasks of a group in one, for each group that has a result of its own
    and whose tasks all have values of that evaluation. Of nested groups the outermost is made.
    """
    tasks, notes = dict(leaves), list(notes)
    for source in {source.path: source for source in newest.values()}.values():
        results = source.results
        inner = {child for name in results["group_subtasks"] for child in subtasks(results, name)}
        for name in results["group_subtasks"]:
            below = leaves_below(results, name)
            whole = all(leaf in tasks and tasks[leaf].path == source.path for leaf in below)
            if name in inner or not below or not whole:
                continue
            metric = tasks[below[0]].metric
            own = results["results"].get(name, {}).get(f"{metric.name},{metric.filter}")
            if not disk.is_number(own) or any(tasks[leaf].metric != metric for leaf in below):
                continue
            tasks[name] = pooled(name, [tasks.pop(leaf) for leaf in below])
            mean = math.fsum(tasks[name].values[metric].values()) / len(tasks[name].hashes)
            if abs(mean - 100 * own) > 0.05:
                notes.append(
                    f"{run_id}: {name}: {mean:.2f} is the mean over questions, which counts; "
                    f"lm_eval's {100 * own:.2f} is one over tasks"
                )
    return tasks, notes


def leaves_below(results: dict, name: str, depth: int = 0) -> list[str]:
    """The tasks in a group, however deep, each once."""
    if depth > 20:
        raise UserError(f"group {name!r} of a results file of lm_eval contains itself")
    found = []
    for child in subtasks(results, name):
        found += leaves_below(results, child, depth + 1) if subtasks(results, child) else [child]
    return list(dict.fromkeys(found))


def pooled(name: str, tasks: list[Task]) -> Task:
    """The questions of several tasks as one task."""
    shared = [m for m in tasks[0].values if all(m in task.values for task in tasks)]
    sizes = [task.n_questions for task in tasks]
    settings = {}
    for key in SETTINGS:
        found = list(dict.fromkeys(str(task.settings[key]) for task in tasks))
        settings[key] = tasks[0].settings[key] if len(found) == 1 else ", ".join(found)
    return Task(
        name,
        values={
            metric: {(t.name, q): v for t in tasks for q, v in t.values[metric].items()}
            for metric in shared
        },
        hashes={(task.name, q): text for task in tasks for q, text in task.hashes.items()},
        settings=settings,
        n_questions=None if None in sizes else sum(sizes),
        path=tasks[0].path,
    )
