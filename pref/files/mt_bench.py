"""MT-Bench's questions, and the answers to them, as every stage reads them.

A run's answers.jsonl has the form of FastChat's reference answers, so `read_answers` reads both.
mt_bench_download.py brings the official files here.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pref.files import disk
from pref.files.console import UserError

# SHA-256 of the official files, by their names in data/mt_bench/.
OFFICIAL_SHA256 = {
    "question.jsonl": "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    "reference_answer/gpt-4.jsonl": (
        "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f"
    ),
    "judge_prompts.jsonl": "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
}
# FastChat's later reference answers to the same 30 questions, by gpt-4-0125-preview, which correct
# wrong ones among GPT-4's: --refs corrected.
IMPROVED_REFERENCES = "reference_answer/gpt-4-0125-preview.jsonl"
IMPROVED_SHA256 = "e484037da5cc14007dde1d821ef76046fccbd0b2f095237fad9ead2c4fc66800"
CATEGORIES = (
    "writing",
    "roleplay",
    "reasoning",
    "math",
    "coding",
    "extraction",
    "stem",
    "humanities",
)
# Questions whose GPT-4 reference answer is known to be wrong: FastChat's pull request 3158 names
# them, except 107 and 127 (both turn 2), which were checked by hand.
WRONG_REFERENCES = frozenset(
    (104, 105, 107, 109, 111, 113, 114, 120, 122, 124, 125, 126, 127, 128, 130)
)


class AnswerKey(NamedTuple):
    question_id: int
    choice: int  # index of the answer, 0 unless several were sampled


def read_questions(path: Path, mt_bench: bool = True) -> list[dict]:
    """The questions in `path`, checked, in file order.

    Each has `question_id` (int), `category` (one of CATEGORIES) and `turns` (two strings). With
    mt_bench False any category, or none, and any number of turns will do, and AlpacaEval's
    `instruction` in place of `turns`; other keys of a row (`uid`, `dataset` ...) are kept. Raises
    UserError with file and line.
    """
    if mt_bench and not path.is_file():
        raise UserError(
            f"{path}: no such file; run python prep_data.py --mt_bench, "
            "or give the folder that holds it with --mt_bench"
        )
    questions, ids, uids = [], set(), set()
    for place, row in question_rows(path):
        if not mt_bench:
            row = as_turns(row, number=len(questions) + 1)
        check_question(row, place, mt_bench)
        if row["question_id"] in ids:
            raise UserError(f"{place}: question_id {row['question_id']} appears twice")
        ids.add(row["question_id"])
        if "uid" in row:
            check_uid(row["uid"], uids, place)
        questions.append(row)
    if not questions:
        remedy = "; run python prep_data.py --mt_bench" if mt_bench else ""
        raise UserError(f"{path}: no questions{remedy}")
    return questions


def question_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(place, object) of a JSON Lines file, or of a file that holds one JSON list."""
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except (FileNotFoundError, IsADirectoryError):
        content = b""  # read_jsonl reports it
    if not content.lstrip().startswith(b"["):
        for number, line in enumerate(content.splitlines(), 1):
            if line.strip():
                yield f"{path}:{number}", disk.parse_object(line, f"{path}:{number}")
        if not content:
            yield from ((f"{path}:{number}", row) for number, row in disk.read_jsonl(path))
        return
    try:
        rows = json.loads(content.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    for number, row in enumerate(rows, 1):
        place = f"{path}: entry {number}"
        yield place, disk.as_object(row, place)


def as_turns(row: dict, number: int) -> dict:
    """AlpacaEval's {instruction, dataset} as a question of one turn; others as they are."""
    if "turns" in row or "instruction" not in row:
        return row
    return {
        "question_id": number,
        "category": None,
        "turns": [row["instruction"]],
        "dataset": row.get("dataset"),
    }


def check_question(row: dict, place: str, mt_bench: bool) -> None:
    """Raises UserError, beginning with `place`, if `row` is not a question (see read_questions)."""
    number, turns = row.get("question_id"), row.get("turns")
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise UserError(
            f"{place}: 'question_id' must be a whole number, 0 or above, not {number!r}"
        )
    if mt_bench and row.get("category") not in CATEGORIES:
        known = ", ".join(CATEGORIES)
        raise UserError(f"{place}: unknown category {row.get('category')!r}; known: {known}")
    non_empty = (
        isinstance(turns, list)
        and turns
        and all(isinstance(turn, str) and turn.strip() for turn in turns)
    )
    if not non_empty or (mt_bench and len(turns) != 2):
        count = "two" if mt_bench else "a list of"
        raise UserError(f"{place}: 'turns' must be {count} non-empty strings")
    for turn in turns:
        try:
            turn.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{place}: a turn is not valid Unicode ({error.reason} at character {error.start})"
            ) from None


def check_uid(uid, known: set[str], place: str) -> None:
    """Add a question's published id to `known`. Raises UserError if it is no text, or known."""
    if not isinstance(uid, str) or not uid:
        raise UserError(f"{place}: 'uid' must be non-empty text, not {uid!r}")
    if uid in known:
        raise UserError(f"{place}: uid {uid} appears twice")
    known.add(uid)


def pick_questions(questions: list[dict], count: int | None) -> list[dict]:
    """`count` questions at equal distances in the file, hence from all categories; None: all."""
    if count is None or count >= len(questions):
        return questions
    if count < 1:
        raise UserError(f"--num_questions {count}: must be at least 1")
    return [questions[i * len(questions) // count] for i in range(count)]


def answer_sha256(turn: int, *answers: list[str]) -> str:
    """Hash of the text that is judged at `turn`: one answer's turns up to it, or those of a pair.

    Turn 2 is judged together with turn 1, hence its hash covers both.
    """
    shown = [answer[:turn] for answer in answers]
    return disk.sha256_json(shown[0] if len(shown) == 1 else shown)


def question_sha256(turns: list[str], temperature: float) -> str:
    """Hash of what is asked: the question's turns, and the temperature it is answered with."""
    return disk.sha256_json([turns, temperature])


def is_answer_to(row: dict, turns: list[str]) -> bool:
    """Whether a row of answers.jsonl answers a question with these turns. A row without a hash of
    its question, as other programs write them, cannot be checked, and is taken to.
    """
    asked = row.get("question_sha256")
    return not asked or asked == question_sha256(turns, row.get("temperature"))


def read_answers(path: Path, turns: int | None = 2) -> dict[AnswerKey, dict]:
    """Answers by question and choice: the row of the file with `choice` (int) and the choice's
    `turns` (strings) added.

    turns: how many each answer has; None for one or more. Raises UserError with file and line for a
    row of another form or an answer that appears twice.
    """
    answers: dict[AnswerKey, dict] = {}
    for number, row in disk.read_jsonl(path):
        place = f"{path}:{number}"
        try:
            for choice in row["choices"]:
                key = AnswerKey(whole(row["question_id"]), choice=whole(choice["index"]))
                texts = choice["turns"]
                is_text = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
                if not is_text or not texts or len(texts) != (turns or len(texts)):
                    count = {1: "one turn", 2: "two turns"}.get(turns, "turns")
                    raise UserError(f"{place}: a choice needs {count} of text")
                for name in ("adapter_sha256", "question_sha256"):
                    if not isinstance(row.get(name), str | None):
                        raise UserError(f"{place}: '{name}' must be text, not {row[name]!r}")
                if key in answers:
                    answer = f"question {key.question_id}, choice {key.choice}"
                    raise UserError(f"{place}: {answer} is answered twice")
                answers[key] = {**row, "turns": texts, "choice": choice["index"]}
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{place}: not an answer row (question_id, choices: [{{index, turns}}]); delete "
                "the file and rerun the stage that wrote it: gen_mtbench.py for answers, "
                "prep_data.py --mt_bench for references"
            ) from None
    return answers


def whole(value) -> int:
    """A number of a question or a choice, 0 or above, also as text. Raises ValueError."""
    if isinstance(value, bool | float) or (number := int(value)) < 0:
        raise ValueError(f"not a whole number: {value!r}")
    return number
