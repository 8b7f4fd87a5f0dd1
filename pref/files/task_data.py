"""A task's questions as a benchmark's data folder, and the checks of a task before it is used.

    prep_data.py --task FILE            data/<task>/, once the task has passed the checks
    prep_data.py --task FILE --check    the checks alone

    train_questions.jsonl    to sample from and to make pairs of: the set <task>_train
    test_questions.jsonl     to measure on: the benchmark <task>
    manifest.json            written last; `task` has the identity, the seed and the numbers

Every check compares two processes with different PYTHONHASHSEED: what depends on the order of a
set, on an unseeded generator or on earlier calls differs between them.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from pref.files import benchmarks, console, disk, mt_bench, tasks
from pref.files.console import UserError
from pref.files.row_pairs import prompt_key
from pref.files.tasks import TEST, TRAIN, Scored, Task, TaskFault

FILES = {TRAIN: "train_questions.jsonl", TEST: "test_questions.jsonl"}
# Answers that a model may give, besides sensible ones.
MADE_UP = {
    "nothing": "",
    "white space": " \n\t ",
    "a word": "Yes",
    "a paragraph": "There are two reasons. It is cheap; secondly, it works!\n\n- one\n- two\n",
    "odd characters": "\u202eab\u200b \U0001f600\u0301 \x00\x1b[0m ÄÖß \ufeff 漢字 {0} %s \\n \r\r",
    "JSON": '{"a": [1, null, "x"]}',
    "one long line": "word " * 2000,
    "100,000 characters": "abcdefghi " * 10_000,
}
CHECKED_QUESTIONS = 24  # that made-up answers are given to
SHOWN = 40  # characters of an answer
SLOW_S = 1.0  # a score; worth a note


class Sizes(NamedTuple):
    """How many questions are asked for, and with which seed."""

    train: int
    test: int
    seed: int


# ---- the questions -------------------------------------------------------------------------------


def make_questions(task: Task, again: Task, sizes: Sizes) -> dict[str, list[dict]]:
    """The rows of both splits, checked. again: the same task in another process.

    Raises UserError for rows that are no questions, differ between the two processes, or share a
    prompt.
    """
    rows = {}
    for split, number in ((TRAIN, sizes.train), (TEST, sizes.test)):
        rows[split] = task.questions(split, number, sizes.seed)
        place = f"{task.path.name}: questions({split!r}, {number}, {sizes.seed})"
        check_rows(rows[split], place, number)
        if again.questions(split, number, sizes.seed) != rows[split]:
            raise UserError(
                f"{place}: gives other rows in another process; draw with random.Random(seed) "
                "alone, and sort sets before you draw from them"
            )
    check_disjoint(rows, f"{task.path.name}: questions(...)")
    return rows


def check_rows(rows: list[dict], place: str, number: int) -> None:
    """Raise UserError for rows that are no questions of one turn with ids of their own."""
    if len(rows) != number:
        remedy = f"ask for {len(rows)} at most" if rows else "correct the task"
        raise UserError(f"{place}: gave {len(rows)} rows, not {number}; {remedy}")
    ids: dict[int, int] = {}
    for count, row in enumerate(rows, 1):
        where = f"{place}: row {count}"
        mt_bench.check_question(row, where, mt_bench=False)
        if len(row["turns"]) != 1:
            raise UserError(f"{where}: has {len(row['turns'])} turns; a task's questions have one")
        if not isinstance(row.get("category"), str) or not row["category"].strip():
            raise UserError(f"{where}: 'category' must be text, not {row.get('category')!r}")
        if "temperature" in row:
            raise UserError(f"{where}: has 'temperature', which GENERATION sets for all questions")
        if (first := ids.setdefault(row["question_id"], count)) != count:
            raise UserError(f"{where}: has the question_id {row['question_id']} of row {first}")


def check_disjoint(rows: dict[str, list[dict]], place: str) -> None:
    """Raise UserError for a prompt that comes twice: a model would be measured on what it was
    trained on, or one question would count twice.
    """
    seen: dict[str, str] = {}
    for split, questions in rows.items():
        for row in questions:
            where = f"{split} question {row['question_id']}"
            prompt = prompt_key([{"role": "user", "content": row["turns"][0]}])
            if prompt in seen:
                raise UserError(
                    f"{place}: {where} has the prompt of {seen[prompt]}; no prompt may come twice, "
                    "and none may be in both splits"
                )
            seen[prompt] = where


# ---- the scores ----------------------------------------------------------------------------------

Answer = tuple[dict, str]  # question, answer


def made_up_answers(rows: dict[str, list[dict]]) -> list[Answer]:
    """Made-up answers to a question of each category, and to more of them up to a number."""
    questions = [row for split in rows.values() for row in split]
    first_of = {row["category"]: row for row in reversed(questions)}
    step = max(1, len(questions) // CHECKED_QUESTIONS)
    chosen = [*first_of.values(), *questions[::step]][: max(CHECKED_QUESTIONS, len(first_of))]
    return [(row, answer) for row in chosen for answer in MADE_UP.values()]


class Checked(NamedTuple):
    """Answers with their scores, which two processes agree about."""

    scores: list[Scored]
    seconds: float  # of one score


def check_scores(task: Task, again: Task, answers: Sequence[Answer]) -> Checked:
    """Score every answer in two processes, in the second in reverse order.

    Raises TaskFault for the first that has no score, and UserError for one that has two.
    """
    begun = time.monotonic()
    scores = scores_of(task, answers)
    seconds = (time.monotonic() - begun) / max(1, len(answers))
    others = scores_of(again, answers[::-1])[::-1]
    for (row, answer), one, two in zip(answers, scores, others):
        tasks.check_same(task, row, answer, one, two)
    return Checked(scores, seconds)


def scores_of(task: Task, answers: Sequence[Answer]) -> list[Scored]:
    """The score of every answer. Raises TaskFault for the first that has none."""
    scores: list[Scored] = []
    while len(scores) < len(answers):
        for found in task.score_some(answers[len(scores) :]):
            if isinstance(found, TaskFault):
                _, answer = answers[len(scores)]
                length = f", {len(answer):,} characters" if len(answer) > SHOWN else ""
                text = f"{found.text} (the answer: {answer[:SHOWN]!r}{length})"
                raise TaskFault(found.status, text)
            scores.append(found)
    return scores


# ---- the scores of real answers ------------------------------------------------------------------


def read_real_answers(task: Task, path: Path, data: Path) -> list[Answer]:
    """The answers in RESULTS/RUN/SET, each with its question from the task's data folder.

    Raises UserError for a set of other questions than the task's, and for answers to a question
    that was changed since.
    """
    path = path if path.name == "answers.jsonl" else path / "answers.jsonl"
    name = path.resolve().parent.name
    splits = {task.name + benchmarks.TRAIN_SET: TRAIN, task.name: TEST}
    if name not in splits:
        raise UserError(
            f"--answers {path.parent}: a folder named {' or '.join(splits)} is expected, with the "
            f"answers to the questions of {task.path.name}"
        )
    answers = mt_bench.read_answers(path, turns=1)
    file = data / FILES[splits[name]]
    if not file.is_file():
        remedy = f"run python prep_data.py --task {task.path.name} without --answers first"
        raise UserError(f"{file}: no such file; {remedy}")
    rows = {row["question_id"]: row for row in mt_bench.read_questions(file, mt_bench=False)}
    found = []
    for key, answer in answers.items():
        row = rows.get(key.question_id)
        if row is None or not mt_bench.is_answer_to(answer, row["turns"]):
            raise UserError(
                f"{path}: question {key.question_id} is not the one in {file}; give --out DIR, the "
                "folder whose questions were answered"
            )
        found.append((row, answer["turns"][0]))
    return found


def rates(answers: Sequence[Answer], scores: Sequence[Scored]) -> list[list[str]]:
    """A table: each category's scores on real answers, and what it can teach.

    Pairs are made of a question's answers whose scores differ. A category whose answers all have
    the same score gives none.
    """
    by_category: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for (row, _), scored in zip(answers, scores):
        by_category[row["category"]].append((row["question_id"], scored.score))
    table = [["category", "questions", "answers", "mean", "score 1", "score 0", "differ", ""]]
    for name, found in sorted(by_category.items()):
        values = [score for _, score in found]
        of_question: dict[int, set[float]] = defaultdict(set)
        for question_id, score in found:
            of_question[question_id].add(score)
        share = {x: sum(value == x for value in values) / len(values) for x in (0, 1)}
        mark = {(1, 0): "always met: teaches nothing", (0, 1): "never met: teaches nothing"}
        line = [name, str(len(of_question)), str(len(values)), f"{sum(values) / len(values):.3f}"]
        line += [f"{share[1]:.2f}", f"{share[0]:.2f}"]
        line += [f"{sum(len(x) > 1 for x in of_question.values())}"]
        table.append([*line, mark.get((share[1], share[0]), "")])
    return table


# ---- the whole -----------------------------------------------------------------------------------

NUMBER = 300  # of questions in each split


def add_arguments(add: Callable) -> None:
    """prep_data.py's arguments of --task."""
    train_help = f"questions to sample from and make pairs of (default: {NUMBER})"
    add("--num_train", type=int, metavar="N", help=train_help)
    test_help = f"other questions, to measure on (default: {NUMBER})"
    add("--num_test", type=int, metavar="N", help=test_help)
    add("--check", action="store_true", help="check the task and write nothing")
    add(
        "--answers",
        type=Path,
        metavar="RESULTS/RUN/SET",
        help="also score a run's answers to the questions in the task's data folder, and print "
        "each category's scores: which ones are always or never met",
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UserError for arguments that only --task has, and for numbers that cannot be."""
    if args.task is None:
        for name in ("num_train", "num_test", "answers"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name}: only with --task FILE")
        if args.check:
            raise UserError("--check: only with --task FILE")
        return
    for name in ("num_train", "num_test"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")


def prepare(args: argparse.Namespace) -> None:
    """Check the task in --task and, unless --check is given, write its data folder.

    Raises UserError, with nothing written, for a task that does not pass.
    """
    sizes = Sizes(args.num_train or NUMBER, args.num_test or NUMBER, args.seed)
    with tasks.open_task(args.task) as task, tasks.open_task(args.task, hash_seed=1) as again:
        benchmarks.check_task_name(task.name, task.path)
        out = Path(args.out) if args.out else benchmarks.DATA / task.name
        if not args.check:
            check_folder(out, task)
        # 1) Questions, then scores of made-up answers.
        rows = make_questions(task, again, sizes)
        made_up = made_up_answers(rows)
        checked = check_scores(task, again, made_up)
        print_checks(task, rows, len(made_up), checked.seconds)
        # 2) Scores of real ones.
        if args.answers is not None:
            answers = read_real_answers(task, args.answers, out)
            real_scores = check_scores(task, again, answers).scores
            print(f"\nscores of the {len(answers)} answers in {args.answers}")
            print(console.format_table(rates(answers, real_scores), right_from=1))
        print_notes(task)
        if args.check:
            print("checked; nothing was written")
            return
    write_folder(task, rows, sizes, out)
    print(f"wrote {out}/: {', '.join([*FILES.values(), 'manifest.json'])}")
    train = f"{task.name}{benchmarks.TRAIN_SET}"
    print(f"next: python gen_mtbench.py results/ --base --bench {train} --num_choices 4")


def check_folder(out: Path, task: Task) -> None:
    """Raise UserError if the folder has the data of something else."""
    manifest = out / "manifest.json"
    if manifest.is_file() and disk.read_json(manifest).get("bench") != task.name:
        raise UserError(f"{out}: holds other data than the task {task.name}'s; give another --out")


def print_checks(task: Task, rows: dict[str, list[dict]], made_up: int, seconds: float) -> None:
    counts = [f"{len(questions):,} {split}" for split, questions in rows.items()]
    categories = {row["category"] for questions in rows.values() for row in questions}
    of = "one category" if len(categories) == 1 else f"{len(categories)} categories"
    print(f"{task.path.name}: {' + '.join(counts)} questions of {of}")
    print("  questions  the same in another process; no prompt comes twice")
    speed = f"{1e3 * seconds:.2g} ms a score, long answers included"
    print(
        f"  score      {made_up} made-up answers: from 0 to 1, the same in another process; {speed}"
    )
    how = ", ".join(f"{name} {value:g}" for name, value in task.generation.items())
    print(f"  answers    {how}")
    versions = task.identity["packages"].items()
    others = [f"{name} {version or '(of no known version)'}" for name, version in versions]
    print(f"  depends on {', '.join([*task.identity['sha256'], *others])}")
    if seconds > SLOW_S:
        print(f"  note       1,000 answers take {1e3 * seconds / 60:.0f} minutes")


def print_notes(task: Task) -> None:
    for name in sorted(task.late_files):
        print(f"  note       {tasks.late_file_note(name)}")


def write_folder(task: Task, rows: dict[str, list[dict]], sizes: Sizes, out: Path) -> None:
    """Write the questions, then the manifest."""
    (out / "manifest.json").unlink(missing_ok=True)
    for split, name in FILES.items():
        disk.write_jsonl(out / name, rows[split])
    files = {
        name: {"source": task.path.name, "sha256": disk.sha256_file(out / name), "official": None}
        for name in FILES.values()
    }
    manifest = {
        "bench": task.name,
        "label": task.name,
        "questions": FILES[TEST],
        "train_questions": FILES[TRAIN],
        "generation": task.generation,
        "task": {
            "identity": task.identity,
            "seed": sizes.seed,
            "numbers": {TRAIN: sizes.train, TEST: sizes.test},
        },
        "files": files,
        "versions": disk.versions(),
    }
    disk.write_json(out / "manifest.json", manifest)
