"""MT-Bench as FastChat asks it and reads it"""

import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pref.files import disk, mt_bench
from pref.files.console import UserError

NEEDS_REFERENCE = frozenset(("math", "reasoning", "coding"))  # FastChat's NEED_REF_CATS
QUESTIONS, REFERENCES = {"question_1", "question_2"}, {"ref_answer_1", "ref_answer_2"}
PAIR_ANSWERS = {"answer_a_1", "answer_a_2", "answer_b_1", "answer_b_2"}
# By grading: the judge prompts that are used, and what each must have a place for
PROMPT_FIELDS = {
    "single": {
        "single-v1": {"question", "answer"},
        "single-math-v1": {"question", "answer", "ref_answer_1"},
        "single-v1-multi-turn": {*QUESTIONS, "answer_1", "answer_2"},
        "single-math-v1-multi-turn": {*QUESTIONS, *REFERENCES, "answer_1", "answer_2"},
    },
    "pair": {
        "pair-v2": {"question", "answer_a", "answer_b"},
        "pair-math-v1": {"question", "answer_a", "answer_b", "ref_answer_1"},
        "pair-v2-multi-turn": {*QUESTIONS, *PAIR_ANSWERS},
        "pair-math-v1-multi-turn": {*QUESTIONS, *REFERENCES, *PAIR_ANSWERS},
    },
}
OUTPUT_FORMATS = {"single": "[[rating]]", "pair": "[[A]]"}
VERDICTS = {
    "[[A]]": "A",
    "[[B]]": "B",
    "[[C]]": "tie",
}  # looked for in this order, as FastChat does
ORDERS = ("1", "2")  # of a pair: the run's answer is shown as A, or as B
RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
RATING_BACKUP = re.compile(r"\[(\d+\.?\d*)\]")
RATINGS = tuple(range(1, 11))
RATING_STRINGS = tuple(f"[[{rating}]]" for rating in RATINGS)
TEMPERATURE, MAX_TOKENS = 0, 2048  # FastChat's


@dataclass
class Judge:
    """A judge: `ask` maps a request (`messages`, `parameters`) to a reply, a dict with at least
    `status`.
    """

    name: str  # as given with --judge
    params_b: float | None  # billions of parameters, None if unknown
    parameters: dict  # all that is sent beside the messages, or that determines a local score
    ask: Callable[[dict], dict]
    concurrency: int
    probe: Callable[[dict], dict] | None = None  # parameters -> parameters that the server accepts
    prices: tuple[float, float] | None = (
        None  # dollars per million prompt and completion tokens; None: unknown
    )
    local: bool = False

    def cost(self, prompt_tokens: int | None, completion_tokens: int | None) -> float | None:
        """Dollars, or None without a price or a count."""
        if self.prices is None or prompt_tokens is None or completion_tokens is None:
            return None
        return (prompt_tokens * self.prices[0] + completion_tokens * self.prices[1]) / 1e6


def read_bench(folder: Path, grading: str, refs: str) -> dict:
    """`questions`, `references` by question, `prompts` by name, `label` ("mt_bench" or "own"),
    `refs`. All checked.

    Raises UserError with file, line and remedy for whatever would spoil a judgement.
    """
    if not folder.is_dir():
        raise UserError(f"--mt_bench {folder}: no such folder; run python prep_data.py --mt_bench")
    questions = mt_bench.read_questions(folder / "question.jsonl")
    references = read_references(folder / "reference_answer/gpt-4.jsonl", questions)
    if refs != "original":
        refs = correct_references(references, Path(refs.removeprefix("corrected:")), questions)
    return {
        "folder": folder,
        "questions": questions,
        "references": references,
        "refs": refs,
        "prompts": read_prompts(folder / "judge_prompts.jsonl", grading),
        "label": label_prompts(folder),
    }


def correct_references(references: dict[int, list[str]], path: Path, questions: list[dict]) -> str:
    """Put the reference answers in `path` (FastChat's form, any number of questions) over the
    others. Returns the name under which their judgements stand. Raises UserError for one that
    belongs to no question.
    """
    known = {question["question_id"] for question in questions}
    for (question_id, choice), row in mt_bench.read_answers(path).items():
        if question_id not in known:
            raise UserError(
                f"--refs corrected:{path}: question {question_id} is not in the question file"
            )
        if choice == 0:
            references[question_id] = row["turns"]
    return f"corrected:{disk.sha256_file(path)[:12]}"


def read_references(path: Path, questions: list[dict]) -> dict[int, list[str]]:
    """The two reference turns by question id. Raises UserError if a question that needs them has
    none.
    """
    references = {
        key[0]: row["turns"] for key, row in mt_bench.read_answers(path).items() if key[1] == 0
    }
    for question in questions:
        turns = references.get(question["question_id"], [])
        if question["category"] in NEEDS_REFERENCE and not (
            turns and all(turn.strip() for turn in turns)
        ):
            raise UserError(
                f"{path}: no reference for question {question['question_id']} ({question['category']}); "
                "run python prep_data.py --mt_bench again"
            )
    return references


def read_prompts(path: Path, grading: str) -> dict[str, dict]:
    """The judge prompts of PROMPT_FIELDS by name. Raises UserError if one is missing or lacks a
    field.
    """
    prompts, wanted = {}, PROMPT_FIELDS[grading]
    for number, row in disk.read_jsonl(path):
        if row.get("name") in wanted:
            check_prompt(f"{path}:{number}", row, grading)
            prompts[row["name"]] = row
    if missing := sorted(wanted.keys() - prompts.keys()):
        raise UserError(
            f"{path}: no prompt named {', '.join(missing)}; run python prep_data.py --mt_bench again"
        )
    return prompts


def check_prompt(place: str, row: dict, grading: str) -> None:
    if not all(isinstance(row.get(key), str) for key in ("system_prompt", "prompt_template")):
        raise UserError(f"{place}: 'system_prompt' and 'prompt_template' must be text")
    if row.get("output_format") != OUTPUT_FORMATS[grading]:
        raise UserError(
            f"{place}: 'output_format' of {row['name']} must be \"{OUTPUT_FORMATS[grading]}\""
        )
    try:
        fields = {
            field
            for _, field, _, _ in string.Formatter().parse(row["prompt_template"])
            if field is not None
        }
    except ValueError as error:
        raise UserError(
            f"{place}: prompt_template: {error}; write literal braces as {{{{ and }}}}"
        ) from None
    if fields != PROMPT_FIELDS[grading][row["name"]]:
        wanted = ", ".join(f"{{{field}}}" for field in sorted(PROMPT_FIELDS[grading][row["name"]]))
        raise UserError(
            f"{place}: prompt_template of {row['name']} must hold exactly the fields {wanted}"
        )


def label_prompts(folder: Path) -> str:
    """ "mt_bench" if the judge is asked with MT-Bench's own files, else "own": such scores compare
    with nothing else.

    Raises UserError if manifest.json says "mt_bench" of prompts that are not.
    """
    differing = [
        name
        for name, sha256 in mt_bench.OFFICIAL_SHA256.items()
        if disk.sha256_file(folder / name) != sha256
    ]
    if not (folder / "manifest.json").is_file():
        return "own" if differing else "mt_bench"
    label = disk.read_json(folder / "manifest.json").get("prompts")
    if label not in ("mt_bench", "own"):
        raise UserError(
            f'{folder / "manifest.json"}: \'prompts\' must be "mt_bench" or "own"; rerun prep_data.py'
        )
    if label == "mt_bench" and "judge_prompts.jsonl" in differing:
        raise UserError(
            f"{folder / 'judge_prompts.jsonl'}: not MT-Bench's prompts, though manifest.json says so; "
            'run python prep_data.py --mt_bench again, or write "prompts": "own" there'
        )
    return label


def judge_messages(
    prompts: dict, question: dict, answer: list[str], turn: int, reference: list[str]
) -> list[dict]:
    """What FastChat sends to judge `turn` (1 or 2) of a two-turn `answer`: `run_judge_single`, byte
    for byte.

    Turn 2 shows both turns. Texts are put in with str.format, so that braces in an answer stay as
    they are.
    """
    if turn == 1:
        fields = {"question": question["turns"][0], "answer": answer[0]}
    else:
        fields = {f"question_{i}": text for i, text in enumerate(question["turns"], 1)}
        fields |= {f"answer_{i}": text for i, text in enumerate(answer, 1)}
    return fill(
        prompts,
        "single-math-v1" if question["category"] in NEEDS_REFERENCE else "single-v1",
        fields,
        question,
        turn,
        reference,
    )


def pair_messages(
    prompts: dict,
    question: dict,
    answer_a: list[str],
    answer_b: list[str],
    turn: int,
    reference: list[str],
) -> list[dict]:
    """What FastChat sends to compare `turn` of two answers: `run_judge_pair`, byte for byte."""
    if turn == 1:
        fields = {
            "question": question["turns"][0],
            "answer_a": answer_a[0],
            "answer_b": answer_b[0],
        }
    else:
        fields = {f"question_{i}": text for i, text in enumerate(question["turns"], 1)}
        fields |= {f"answer_a_{i}": text for i, text in enumerate(answer_a, 1)}
        fields |= {f"answer_b_{i}": text for i, text in enumerate(answer_b, 1)}
    return fill(
        prompts,
        "pair-math-v1" if question["category"] in NEEDS_REFERENCE else "pair-v2",
        fields,
        question,
        turn,
        reference,
    )


def fill(
    prompts: dict, name: str, fields: dict, question: dict, turn: int, reference: list[str]
) -> list[dict]:
    """Messages of the prompt `name`, or of its form for turn 2. As in FastChat's
    `to_openai_api_messages`, an empty system prompt sends no system message.
    """
    if question["category"] in NEEDS_REFERENCE:
        fields |= {f"ref_answer_{i}": text for i, text in enumerate(reference[:turn], 1)}
    prompt = prompts[name if turn == 1 else f"{name}-multi-turn"]
    messages = [{"role": "user", "content": prompt["prompt_template"].format(**fields)}]
    if prompt["system_prompt"]:
        messages.insert(0, {"role": "system", "content": prompt["system_prompt"]})
    return messages


def read_rating(text: str) -> float | None:
    """The rating as FastChat finds it: the first [[x]], else the first [x]; None if there is none
    from 1 to 10.
    """
    match = RATING.search(text) or RATING_BACKUP.search(text)
    rating = float(match[1]) if match else 0.0
    return rating if 1 <= rating <= 10 else None


def read_verdict(text: str) -> str | None:
    """'A', 'B' or 'tie' as FastChat finds it, else None."""
    return next((verdict for mark, verdict in VERDICTS.items() if mark in text), None)
