"""Pairs from a model's own answers: several to one question, with a judge's score of each.

    read     answers.jsonl, judgements.csv and the questions -> AnswerSet: one judge's scores
    rows     a row of the layout 'scored' per question, for audit.read_split
    trace    the pairs that came of them, with question_id and both scores
    describe what the manifest says of where the pairs come from

Answers that cannot be in a pair are left out before the pairs are made, each with its reason, so
that the question keeps its others. answer_scores.py reads the scores.
"""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pref.files import audit, benchmarks, control_tokens, disk, mt_bench, run_folders
from pref.files.answer_scores import Judge, Scores, read_scores
from pref.files.audit import PlacedPair
from pref.files.console import UserError
from pref.files.mt_bench import AnswerKey
from pref.files.pairs import visible
from pref.files.row_pairs import MISSING
from pref.files.tables import Rows

RULE = "best_worst"  # where --rule is not given
FAILED = "$ERROR$"  # what FastChat writes in place of an answer that could not be made
NEVER_JUDGED = "not judged"
SIDES = ("chosen", "rejected")
# See sides.REMEDIES.
REMEDIES = {
    "^tie": "The scores of a question's answers must differ by --min_margin. Give a lower one, or "
    "sample more answers: gen_mtbench.py --num_choices 8",
    "^fewer than two": "Two answers to a question must differ, and have scores. Sample more, at a "
    "--temperature above 0.",
    "no score": "judgements.csv says why; judge.py --retry_failed asks again.",
}
FOLDER = "pairs"  # in the folder of the answers; where the pairs go unless --out is given


class Answer(NamedTuple):
    """An answer that may be in a pair."""

    choice: int
    text: str
    score: float  # mean over repeats; over several choices too, if their text is the same
    cut_off: bool  # at the limit of tokens


class AnswerSet(NamedTuple):
    """The answers of one run to one set of questions, as one judge scores them."""

    folder: Path  # RESULTS/RUN/SET
    run: str
    name: str  # of the set
    judge: Judge
    questions: dict[int, str]  # the prompt, by question_id, of questions that have answers
    answers: dict[int, list[Answer]]  # distinct ones, by question_id
    left_out: list[dict]  # answers that can be in no pair, as records of dropped.jsonl
    counts: dict[str, int]
    settings: dict  # what the answers were made with, see `settings_of`
    adapter_sha256: str | None  # None: the untrained model
    files: dict[str, str]  # SHA-256 of what was read, by name
    notes: list[str]

    @property
    def label(self) -> str:
        """The `source` of the pairs."""
        return f"{self.run}/{self.name}"

    def place(self, question_id: int) -> str:
        return f"{self.folder / 'answers.jsonl'}: question {question_id}"


# ---- reading -------------------------------------------------------------------------------------


def read(folder: Path, judge: str | None = None, questions: Path | None = None) -> AnswerSet:
    """The scored answers in `folder`, RESULTS/RUN/SET.

    judge: name or judge_id, where several have judged. questions: the file that was answered, where
    it is not in a folder of data. Raises UserError for answers, questions or judgements that are
    missing, do not belong together, or hold no scores.
    """
    # 1) The answers, all of one model.
    path = find_answers(folder)
    given = mt_bench.read_answers(path, turns=None)
    check_answers(path, given)
    check_adapter(folder, given)
    first = next(iter(given.values()))

    # 2) What they answer.
    asked_in = questions or find_questions(folder.resolve().name)
    prompts = read_prompts(asked_in, path, given)

    # 3) What one judge says of them.
    table = folder / "judgements.csv"
    scores = read_scores(table, given, judge)

    # 4) Those that can be in a pair.
    left_out: list[dict] = []
    answers: dict[int, list[Answer]] = {}
    for question_id, group in by_question(given).items():
        usable = [usable_answer(path, key, given[key], scores, left_out) for key in group]
        answers[question_id] = distinct([answer for answer in usable if answer])
    counts = {
        "questions": len(answers),
        "answers": len(given),
        "scored": len(scores.means),
        "usable": len(given) - len(left_out),
        "distinct": sum(map(len, answers.values())),
        "cut_off": sum(is_marked(row, "truncated") for row in given.values()),
        "num_choices": max(key.choice for key in given) + 1,
    }
    return AnswerSet(
        folder=folder,
        run=folder.resolve().parent.name,
        name=folder.resolve().name,
        judge=scores.judge,
        questions={number: prompts[number] for number in answers},
        answers=answers,
        left_out=left_out,
        counts=counts,
        settings=settings_of(first),
        adapter_sha256=first.get("adapter_sha256"),
        files={file.name: disk.sha256_file(file) for file in (path, table, asked_in)},
        notes=[*incomplete(given, prompts, counts["num_choices"]), *scores.notes],
    )


def settings_of(row: dict) -> dict:
    """What an answer was made with, as far as it is recorded."""
    settings = row.get("settings")
    known = settings if isinstance(settings, dict) else {}
    return {**known, "temperature": row.get("temperature")}


def find_answers(folder: Path) -> Path:
    """answers.jsonl in `folder`. Raises UserError, with what is there instead, if there is none."""
    path = folder / "answers.jsonl"
    if path.is_file():
        return path
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give RESULTS/RUN/SET, which has answers.jsonl")
    if any(folder.glob("turns.*.jsonl")):
        raise UserError(
            f"{folder}: no question is answered to the end yet; run the same gen_mtbench.py again"
        )
    inside = sorted(str(file.parent) for file in folder.glob("*/answers.jsonl"))
    remedy = f"give one of {', '.join(inside)}" if inside else "run gen_mtbench.py first"
    raise UserError(f"{path}: no such file; {remedy}")


def check_answers(path: Path, answers: dict[AnswerKey, dict]) -> None:
    """Raise UserError for answers of which no pair can be made."""
    if not answers:
        raise UserError(f"{path}: no answers; delete the file and run gen_mtbench.py again")
    for key, row in answers.items():
        if len(row["turns"]) > 1:
            raise UserError(
                f"{path}: question {key.question_id} has {len(row['turns'])} turns; a pair is two "
                "answers to one prompt, and a later turn's prompt holds each choice's own first "
                "answer. Use questions of one turn"
            )
    if len(answers) == len({key.question_id for key in answers}):
        raise UserError(
            f"{path}: one answer to each question, and a pair needs two; move the file away and "
            "answer again with gen_mtbench.py --num_choices 4 and a --temperature above 0"
        )
    if len({row.get("adapter_sha256") for row in answers.values()}) > 1:
        raise UserError(
            f"{path}: holds answers of several adapters; run gen_mtbench.py again to replace the "
            "old ones"
        )


def check_adapter(folder: Path, answers: dict[AnswerKey, dict]) -> None:
    """Raise UserError for answers of weights that the run no longer has."""
    answered_by = next(iter(answers.values())).get("adapter_sha256")
    now = run_folders.weights_sha256(folder.parent) if answered_by else None
    if now is not None and answered_by != now:
        weights = run_folders.weight_files(folder.parent)[0]
        raise UserError(
            f"{folder}: these answers are from an older {weights.parent.name} than {weights}; run "
            "gen_mtbench.py and judge.py again"
        )


def find_questions(name: str) -> Path:
    """The file of questions that the set `name` answers, in data/<name>/ or, of <task>_train, in
    data/<task>/. Raises UserError if there is none.
    """
    if not benchmarks.usual_folder(name).is_dir():
        raise UserError(
            f"{benchmarks.DATA / name}: no such folder, so the questions of the set {name} are not "
            "known; give the file that was answered: --questions FILE"
        )
    return benchmarks.open_folder(name).questions_file


def read_prompts(path: Path, answers_path: Path, answers: dict[AnswerKey, dict]) -> dict[int, str]:
    """The prompts by question_id. Raises UserError if they are not what was answered."""
    questions = mt_bench.read_questions(path, mt_bench=False)
    turns_of = {question["question_id"]: question["turns"] for question in questions}
    for (question_id, _), row in answers.items():
        turns = turns_of.get(question_id)
        if turns is None or not mt_bench.is_answer_to(row, turns):
            raise UserError(
                f"{answers_path}: question {question_id} is not the one in {path}: give the file "
                "that was answered (--questions FILE)"
            )
    return {question_id: turns[0] for question_id, turns in turns_of.items()}


def by_question(answers: Iterable[AnswerKey]) -> dict[int, list[AnswerKey]]:
    """The choices of each question, in order."""
    groups: dict[int, list[AnswerKey]] = defaultdict(list)
    for key in sorted(answers):
        groups[key.question_id].append(key)
    return groups


def incomplete(answers: dict[AnswerKey, dict], asked: Iterable[int], choices: int) -> list[str]:
    """A line for questions without answers, and for those that have fewer than the others."""
    given = Counter(key.question_id for key in answers)
    lines = []
    if none := sorted(set(asked) - given.keys()):
        lines.append(f"questions without answers: {len(none):,} (first: {none[0]})")
    if few := sorted(number for number, count in given.items() if count < choices):
        text = f"questions with fewer than {choices} answers"
        lines.append(f"{text}: {len(few):,} (first: {few[0]})")
    return lines


# ---- answers that can be in a pair ---------------------------------------------------------------


def usable_answer(
    path: Path, key: AnswerKey, row: dict, scores: Scores, left_out: list[dict]
) -> Answer | None:
    """The answer of a row, or None and a record in `left_out`."""
    (text,) = row["turns"]
    if reason := why_unusable(row, text, key, scores):
        place = f"{path}: question {key.question_id}, choice {key.choice}"
        left_out.append(audit.drop_record("train", place, f"answer: {reason}", text))
        return None
    return Answer(key.choice, text, scores.means[key], is_marked(row, "truncated"))


def why_unusable(row: dict, text: str, key: AnswerKey, scores: Scores) -> str | None:
    if key not in scores.means:
        return f"no score ({scores.failures.get(key, NEVER_JUDGED)})"
    if not visible(text):
        return "empty"
    if text.strip() == FAILED:
        return "could not be made ($ERROR$)"
    if is_marked(row, "overflow"):
        return "the prompt was cut off to fit the context"
    if "\0" in text:
        return "a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "not valid Unicode (half a surrogate pair)"
    if text.strip() in MISSING:
        return "a missing value written as text"
    if token := control_tokens.find_carried(text):
        return f"{audit.CARRIED} ({token})"
    return None


def is_marked(row: dict, name: str) -> bool:
    """Whether the answer of a row of `mt_bench.read_answers` has `truncated` or `overflow`."""
    choice = next(choice for choice in row["choices"] if choice["index"] == row["choice"])
    return choice.get(name) in (True, [True])


def distinct(answers: list[Answer]) -> list[Answer]:
    """One of each text, as a reader sees it: the first, with the mean of all their scores."""
    same: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        same[visible(answer.text)].append(answer)
    # statistics.mean is exact: the sum of three 0.1 by 3 is above 0.1, and would beat another 0.1.
    return [
        group[0]._replace(score=statistics.mean(answer.score for answer in group))
        for group in same.values()
    ]


# ---- from rows to pairs --------------------------------------------------------------------------


def rows(found: AnswerSet) -> Rows:
    """(place, row) of each question, in the layout 'scored'. Prompt and answers are messages, so
    that a text which looks like something else, such as JSON, stays the text that it is.
    """
    for question_id, answers in found.answers.items():
        row = {
            "context": [{"role": "user", "content": found.questions[question_id]}],
            "responses": [[{"role": "assistant", "content": a.text}] for a in answers],
            "scores": [answer.score for answer in answers],
        }
        yield found.place(question_id), row


def trace(found: AnswerSet, pairs: list[PlacedPair]) -> list[PlacedPair]:
    """`pairs` with `question_id`, `chosen_score` and `rejected_score`."""
    question_at = {found.place(question_id): question_id for question_id in found.answers}
    score_of = {
        (question_id, answer.text): answer.score
        for question_id, answers in found.answers.items()
        for answer in answers
    }
    traced = []
    for place, pair in pairs:
        question_id = question_at[place]
        texts = {side: pair[side][0]["content"] for side in SIDES}
        scores = {f"{side}_score": score_of[question_id, texts[side]] for side in SIDES}
        traced.append(PlacedPair(place, {**pair, "question_id": question_id, **scores}))
    return traced


def describe(found: AnswerSet, pairs: list[PlacedPair]) -> dict:
    """`from_answers` of the manifest: where the pairs come from. pairs: those of `trace`."""
    margins = [item.pair["chosen_score"] - item.pair["rejected_score"] for item in pairs]
    cut_off = {
        (question_id, answer.text)
        for question_id, answers in found.answers.items()
        for answer in answers
        if answer.cut_off
    }
    every_score = [answer.score for answers in found.answers.values() for answer in answers]
    means = {f"mean_{side}": mean(i.pair[f"{side}_score"] for i in pairs) for side in SIDES}
    cut = {
        side: sum((i.pair["question_id"], i.pair[side][0]["content"]) in cut_off for i in pairs)
        for side in SIDES
    }
    return {
        "results": str(run_folders.folder_of(found.folder.parent)),
        "run": found.run,
        "set": found.name,
        "judge": found.judge.name,
        "judge_id": found.judge.judge_id,
        "grading": found.judge.grading,
        "judge_settings": found.judge.settings,
        "sha256": found.files,
        "model": found.settings.get("model"),
        "adapter_sha256": found.adapter_sha256,
        "generation": found.settings,
        **found.counts,
        "pairs": len(pairs),
        "questions_with_pairs": len({item.pair["question_id"] for item in pairs}),
        "cut_off_in_pairs": cut,
        "scores": {"mean": mean(every_score), **means, "mean_margin": mean(margins)},
    }


def mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return math.fsum(values) / len(values) if values else None


def summary_lines(record: dict) -> list[str]:
    """What the terminal says of `from_answers`."""
    scores, judge = record["scores"], record["judge"]
    if record["judge_id"]:
        judge += f" ({record['judge_id']})"
    lines = [
        f"answers  {record['answers']:,} to {record['questions']:,} questions: "
        f"{record['usable']:,} usable, {record['distinct']:,} distinct",
        f"scores   by {judge}: mean {scores['mean']:.3g}; chosen {scores['mean_chosen']:.3g}, "
        f"rejected {scores['mean_rejected']:.3g}, {scores['mean_margin']:.3g} apart",
    ]
    if record["cut_off"]:
        cut = record["cut_off_in_pairs"]
        lines.append(
            f"cut off  {record['cut_off']:,} answers at the limit of tokens; kept, as "
            f"{cut['chosen']:,} chosen and {cut['rejected']:,} rejected, as if they ended there"
        )
    return lines


# ---- where they go -------------------------------------------------------------------------------


def check_out(out: Path, folder: Path) -> None:
    """Raise UserError if `out` has other data: a benchmark's, or pairs of another source."""
    path = out / "manifest.json"
    if not path.is_file():
        if (out / "answers.jsonl").is_file() or (out / "args.json").is_file():
            raise UserError(f"{out}: has a run's own files; give another --out")
        return
    manifest = disk.read_json(path)
    record = manifest.get("from_answers")
    own = (folder.resolve().parent.name, folder.resolve().name)
    if isinstance(record, dict) and (record.get("run"), record.get("set")) == own:
        return
    content = manifest.get("bench") or manifest.get("source") or "something else"
    raise UserError(f"{out}: holds other data ({content}); give another --out")
