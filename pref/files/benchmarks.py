"""A benchmark's data folder as the stages read it: data/<bench>/, whose manifest.json names it.

    manifest.json        bench, label, licence, questions, generation, files
    <questions>          the questions, in a form that mt_bench.read_questions takes
    baseline/*.jsonl     answers of other models, as in results/<run>/<bench>/answers.jsonl

prep_data.py writes these folders. One written by hand works as well: a manifest with `bench` and
`questions` is enough for gen_mtbench.py to answer its questions.
"""

import string
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pref.files import console, disk, mt_bench, run_folders
from pref.files.console import UserError
from pref.files.mt_bench import AnswerKey

DATA = Path("data")  # prep_data.py puts each folder there, under the benchmark's name
MT_BENCH = "mt_bench"  # the benchmark of a stage that is given none
# The options of prep_data.py that make a folder.
PREPARED_BY = {
    MT_BENCH: "--mt_bench",
    "alpaca_eval": "--alpaca_eval",
    "arena_hard_v0.1": "--arena_hard v0.1",
    "arena_hard_v2.0": "--arena_hard v2.0",
    "mt_bench_human": "--mt_bench_human",
    "llmbar": "--llmbar",
}
TRAIN_SET = "_train"  # a task's train questions are the set <task>_train
HAVE_ANSWERS = ("mt_bench_human", "llmbar")  # for judge.py --validate; no run answers them
SPELLINGS = {"arena_hard_v2": "arena_hard_v2.0", "alpaca_eval_2": "alpaca_eval"}


class BenchFolder(NamedTuple):
    """A benchmark's data folder."""

    name: str
    folder: Path
    manifest: dict  # {} of an MT-Bench folder without one

    @property
    def questions_file(self) -> Path:
        return self.folder / self.manifest.get("questions", "question.jsonl")

    @property
    def generation(self) -> dict:
        """How its questions are answered unless the user says otherwise: `temperature` and
        `max_new_tokens`, either of which may be missing.
        """
        return self.manifest.get("generation") or {}


# ---- finding a folder ----------------------------------------------------------------------------


def name_of(text: str) -> str:
    """The name of a benchmark as it may be spelled: Arena-Hard-v2.0 -> arena_hard_v2.0. One's own
    is spelled as its folder. Raises UserError for what cannot name a folder.
    """
    usual = text.lower().replace("-", "_")
    usual = SPELLINGS.get(usual, usual)
    return usual if usual in PREPARED_BY else run_folders.check_run_id(text)


def check_task_name(name: str, place: str | Path) -> None:
    """Raise UserError for a task whose name is another benchmark's, or cannot name a folder. place:
    the task's file, for the message.
    """
    run_folders.check_run_id(name, place)
    if name_of(name) in PREPARED_BY or name.endswith(TRAIN_SET):
        raise UserError(
            f"{place}: the file's name is the task's, and {name} is a benchmark's name, or ends "
            f"with {TRAIN_SET} as the sets of train questions do; rename the file"
        )


def open_folder(name: str, folder: Path | None = None) -> BenchFolder:
    """The data folder of the benchmark `name`. folder: instead of data/<name>.

    A task's train questions, the set <task>_train, are in the task's folder. Raises UserError if
    there is none, if it is not complete, or if it is another benchmark's.
    """
    name = name_of(name)
    folder = folder or usual_folder(name)
    path = folder / "manifest.json"
    options, how = PREPARED_BY.get(name), how_to_make(name)
    if not folder.is_dir():
        known = "" if options else f" (known to prep_data.py: {', '.join(PREPARED_BY)})"
        raise UserError(f"{folder}: no such folder, so no data of benchmark {name}{known}; {how}")
    if not path.is_file():
        if name == MT_BENCH:
            return BenchFolder(name, folder, {})
        raise UserError(f"{path}: no such file: the folder is not complete; {how}")
    with console.remedy(how):
        manifest = disk.read_json(path)
    found = manifest.get("bench", MT_BENCH if "prompts" in manifest else None)
    if name == f"{found}{TRAIN_SET}" and "train_questions" in manifest:
        manifest = {**manifest, "questions": manifest["train_questions"]}
    elif found != name:
        raise UserError(f"{folder}: holds the data of benchmark {found}, not of {name}; {how}")
    with console.remedy(how):
        return BenchFolder(name, folder, check_manifest(manifest, path))


def usual_folder(name: str) -> Path:
    """Where the data of the benchmark `name` are unless the user says otherwise."""
    folder, of_task = DATA / name, DATA / name.removesuffix(TRAIN_SET)
    return folder if folder.is_dir() or not of_task.is_dir() else of_task


def how_to_make(name: str) -> str:
    """How a user gets the data folder of the benchmark `name`."""
    if options := PREPARED_BY.get(name):
        return f"run python prep_data.py {options}"
    return "run python prep_data.py --task FILE if it is a task's, else give --bench_data DIR"


def check_manifest(manifest: dict, path: Path) -> dict:
    """`manifest`, if what the stages read of it can be used. Raises UserError."""
    for name, entry in disk.as_object(manifest.get("files", {}), f"{path}: 'files'").items():
        disk.as_object(entry, f"{path}: 'files': {name}")
    for key in ("questions", "train_questions"):
        name = manifest.get(key)
        if name is not None and not (isinstance(name, str) and Path(name).name == name):
            raise UserError(f"{path}: '{key}' must name a file in the folder, not {name!r}")
    if (how := manifest.get("generation")) is not None:
        check_generation(disk.as_object(how, f"{path}: 'generation'"), str(path))
    return manifest


def check_generation(how: dict, place: str) -> dict:
    """`how`, if its temperature and max_new_tokens can be used. Raises UserError."""
    temperature, tokens = how.get("temperature"), how.get("max_new_tokens")
    if temperature is not None and not (disk.is_number(temperature) and 0 <= temperature < 10):
        raise UserError(f"{place}: 'temperature' must be from 0 to below 10, not {temperature!r}")
    if tokens is not None and not (type(tokens) is int and tokens >= 1):
        raise UserError(f"{place}: 'max_new_tokens' must be a whole number above 0, not {tokens!r}")
    return how


def folder_of_questions(path: Path) -> BenchFolder | None:
    """The data folder whose questions `path` holds, if its manifest says so."""
    manifest = path.parent / "manifest.json"
    try:
        content = disk.read_json(manifest)
    except UserError:  # there is none, or it is another program's
        return None
    name = content.get("bench")
    if isinstance(name, str) and path.name == content.get("train_questions"):
        name, content = name + TRAIN_SET, {**content, "questions": path.name}
    if not isinstance(name, str) or path.name != content.get("questions"):
        return None
    return BenchFolder(name_of(name), path.parent, check_manifest(content, manifest))


def task_file(folder: Path) -> str | None:
    """The name of the task's file whose questions a data folder holds; None: it is no task's."""
    manifest = folder / "manifest.json"
    task = disk.read_json(manifest).get("task") if manifest.is_file() else None
    identity = task.get("identity") if isinstance(task, dict) else None
    name = identity.get("file") if isinstance(identity, dict) else None
    return name if isinstance(name, str) else None


# ---- reading one ---------------------------------------------------------------------------------


def read_questions(bench: BenchFolder) -> list[dict]:
    """The questions: question_id, category, turns, and what else a row has. Raises UserError."""
    if bench.name == MT_BENCH:
        return mt_bench.read_questions(bench.questions_file)
    with console.remedy(how_to_make(bench.name)):
        return mt_bench.read_questions(bench.questions_file, mt_bench=False)


def label_of(bench: BenchFolder) -> str:
    """The benchmark's name if all its files are the official ones, as the manifest says and their
    hashes show now; else "own": such scores are not comparable with published ones.
    """
    official = bench.manifest.get("label") == bench.name and all(
        entry.get("official") is not False
        and (bench.folder / name).is_file()
        and disk.sha256_file(bench.folder / name) == entry.get("sha256")
        for name, entry in bench.manifest.get("files", {}).items()
    )
    return bench.name if official else "own"


def read_baselines(
    folder: Path, turns: int | None, check: Callable[[Path, dict], None] | None = None
) -> dict[str, dict[AnswerKey, dict]]:
    """Answers of the models that runs are compared with, by model_id, else by the file's name.

    folder: the benchmark's. turns, and errors: see `mt_bench.read_answers`. check: called with each
    file and its answers.
    """
    found: dict[str, dict[AnswerKey, dict]] = {}
    for path in sorted((folder / "baseline").glob("*.jsonl")):
        answers = mt_bench.read_answers(path, turns)
        if check is not None:
            check(path, answers)
        for key, row in answers.items():
            name = row.get("model_id") or path.stem
            if not isinstance(name, str):
                raise UserError(f"{path}: 'model_id' must be text, found {name!r}")
            if found.setdefault(name, {}).setdefault(key, row) is not row:
                raise UserError(
                    f"{path}: {name} has an answer to question {key[0]} in another file of this "
                    "folder too; keep one of the two, or give one model another 'model_id'"
                )
    return found


def read_model_answers(folder: Path) -> dict[str, dict[AnswerKey, dict]]:
    """Answers by model, from FastChat's files model_answer/<model>.jsonl in `folder`.

    Raises UserError if there are none, or a file names another model than its rows.
    """
    answers = {}
    for path in sorted((folder / "model_answer").glob("*.jsonl")):
        answers[path.stem] = mt_bench.read_answers(path)
        for row in answers[path.stem].values():
            if row.get("model_id", path.stem) != path.stem:
                raise UserError(f"{path}: has an answer of {row['model_id']}")
    if not answers:
        raise UserError(
            f"{folder / 'model_answer'}: no *.jsonl with answers; run python prep_data.py "
            "--mt_bench_human"
        )
    return answers


def first_answers(folder: Path) -> dict[str, dict[int, list[str]]]:
    """The turns of choice 0 by question_id, by model. See `read_model_answers`."""
    return {
        model: {key.question_id: row["turns"] for key, row in rows.items() if key.choice == 0}
        for model, rows in read_model_answers(folder).items()
    }


def fields_of(template: str) -> set[str]:
    """The fields of a judge prompt: "Q: {question} {{literal}}" -> {"question"}.

    Raises ValueError for single braces.
    """
    pieces = string.Formatter().parse(template)
    return {field for _, field, _, _ in pieces if field is not None}
