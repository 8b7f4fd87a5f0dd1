"""The MT-Bench judging protocol: what a judge is asked, and how its reply is read.

`read_bench` reads and checks questions, reference answers and judge prompts. `single_messages` and
`pair_messages` turn them and a run's answers into chat messages; `read_rating`, `read_verdict` and
`winner_of` interpret what the judge writes back. Messages and reading are those of FastChat
(fastchat/llm_judge/common.py, version 0.2.36), byte for byte; tests/test_judge.py compares them
with FastChat's own code.

reading.py puts limits on the reading. Nothing here contacts a judge: `Judge` describes one, and
server_judge.py and local_judge.py make it.
"""

import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pref.files import disk, mt_bench
from pref.files.console import UserError

TEMPERATURE = 0  # as in FastChat
MAX_TOKENS = 2048  # of a judgement, as in FastChat
NEEDS_REFERENCE = frozenset(("math", "reasoning", "coding"))  # FastChat's NEED_REF_CATS

# The judge prompts of each grading, and the fields that each template must contain. "math" prompts
# show the reference answer and are used for the categories in NEEDS_REFERENCE; "multi-turn" prompts
# judge turn 2 and show both turns.
QUESTIONS = {"question_1", "question_2"}
REFERENCES = {"ref_answer_1", "ref_answer_2"}
ANSWERS = {"answer_1", "answer_2"}
PAIR_ANSWERS = {"answer_a_1", "answer_a_2", "answer_b_1", "answer_b_2"}
PROMPT_FIELDS = {
    "single": {
        "single-v1": {"question", "answer"},
        "single-math-v1": {"question", "answer", "ref_answer_1"},
        "single-v1-multi-turn": QUESTIONS | ANSWERS,
        "single-math-v1-multi-turn": QUESTIONS | REFERENCES | ANSWERS,
    },
    "pair": {
        "pair-v2": {"question", "answer_a", "answer_b"},
        "pair-math-v1": {"question", "answer_a", "answer_b", "ref_answer_1"},
        "pair-v2-multi-turn": QUESTIONS | PAIR_ANSWERS,
        "pair-math-v1-multi-turn": QUESTIONS | REFERENCES | PAIR_ANSWERS,
    },
}
PLAIN_PROMPTS = {"single": "single-v1", "pair": "pair-v2"}  # of the other categories, turn 1
OUTPUT_FORMATS = {"single": "[[rating]]", "pair": "[[A]]"}

# Single grading: a rating from 1 to 10 in double brackets, or failing that in single ones.
RATINGS = tuple(range(1, 11))
RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
RATING_BACKUP = re.compile(r"\[(\d+\.?\d*)\]")

# Pair grading: a letter in double brackets. A text with two of them counts as the first in this
# order, as in FastChat. Each pair is judged twice: the run's answer is shown as A, then as B.
VERDICTS = {"[[A]]": "A", "[[B]]": "B", "[[C]]": "tie"}
RUN_IS_A, RUN_IS_B = "1", "2"
ORDERS = (RUN_IS_A, RUN_IS_B)


@dataclass(frozen=True)
class Judge:
    """A judge, local or behind a server.

    `ask` maps a request (see identity.Identity.request) to a reply: a dict with `status` and, where
    they are known, `score` (single grading), `winner` (pair grading: A, B or tie), `reading`,
    `judgement` (the judge's text), `finish_reason`, `rating_mass`, `served_model`,
    `system_fingerprint`, `prompt_tokens` and `completion_tokens`. The status is "ok" if the reply
    has a score or a winner, else the reason why it has none (README.md lists them). `ask` raises
    UserError for an error that would stop every later request as well.
    """

    name: str  # --judge, as given
    params_b: float | None  # billions of parameters; None if unknown
    parameters: dict  # everything besides the messages that determines a judgement
    ask: Callable[[dict], dict]
    concurrency: int  # requests in flight at a time
    probe: Callable[[dict], dict] | None = None  # parameters -> parameters that the server accepts
    server: str = ""  # address or name, see identity.py; "" for a local judge
    prices: tuple[float, float] | None = None  # dollars per million prompt, completion tokens
    local: bool = False

    def cost(self, prompt_tokens: float | None, completion_tokens: float | None) -> float | None:
        """Dollars, or None if the prices or a count are unknown."""
        if self.prices is None or prompt_tokens is None or completion_tokens is None:
            return None
        price_in, price_out = self.prices
        return (prompt_tokens * price_in + completion_tokens * price_out) / 1e6


# ---- questions, references, prompts --------------------------------------------------------------


class Bench(NamedTuple):
    """What judging needs besides the answers, read from a folder and checked."""

    folder: Path
    questions: list[dict]  # question_id, category, turns (two strings); in file order
    references: dict[int, list[str]]  # the reference answer's two turns, by question_id
    refs: str  # "original", or "corrected:" and a hash of the file with the corrections
    prompts: dict[str, dict]  # by name: system_prompt, prompt_template
    label: str  # "mt_bench", or "own" for other files than MT-Bench's


def read_bench(folder: Path, grading: str, refs: str) -> Bench:
    """Read questions, references and the judge prompts of `grading` ("single" or "pair").

    refs: "original", or "corrected:FILE" to replace the reference answers that FILE contains.
    Raises UserError, with file, line and remedy, for anything that would spoil a judgement.
    """
    if not folder.is_dir():
        raise UserError(f"--mt_bench {folder}: no such folder; run python prep_data.py --mt_bench")
    questions = mt_bench.read_questions(folder / "question.jsonl")
    references = read_references(folder / "reference_answer/gpt-4.jsonl", questions)
    if refs != "original":
        path = Path(refs.removeprefix("corrected:"))
        references |= read_corrections(path, questions)
        refs = f"corrected:{disk.sha256_file(path)[:12]}"
    return Bench(
        folder=folder,
        questions=questions,
        references=references,
        refs=refs,
        prompts=read_prompts(folder / "judge_prompts.jsonl", grading),
        label=label_prompts(folder),
    )


def read_references(path: Path, questions: list[dict]) -> dict[int, list[str]]:
    """The two reference turns by question_id.

    Raises UserError if a question of the categories in NEEDS_REFERENCE has no reference.
    """
    references = first_choices(mt_bench.read_answers(path))
    for question in questions:
        turns = references.get(question["question_id"], [])
        complete = turns and all(turn.strip() for turn in turns)
        if question["category"] in NEEDS_REFERENCE and not complete:
            raise UserError(
                f"{path}: no reference for question {question['question_id']} "
                f"({question['category']}); run python prep_data.py --mt_bench again"
            )
    return references


def read_corrections(path: Path, questions: list[dict]) -> dict[int, list[str]]:
    """Reference turns by question_id from the file of --refs corrected:FILE.

    The file has FastChat's answer format and any number of questions. Raises UserError for a
    question that is not in `questions`.
    """
    known = {question["question_id"] for question in questions}
    answers = mt_bench.read_answers(path)
    for question_id, _ in answers:
        if question_id not in known:
            raise UserError(
                f"--refs corrected:{path}: question {question_id} is not in the question file"
            )
    return first_choices(answers)


def first_choices(answers: dict[tuple[int, int], dict]) -> dict[int, list[str]]:
    """Turns by question_id from answers by (question_id, choice): those of choice 0."""
    return {
        question_id: row["turns"] for (question_id, choice), row in answers.items() if choice == 0
    }


def read_prompts(path: Path, grading: str) -> dict[str, dict]:
    """The judge prompts that `grading` uses, by name; other prompts in the file are ignored.

    Raises UserError if one is missing or malformed.
    """
    prompts, needed = {}, PROMPT_FIELDS[grading]
    for number, row in disk.read_jsonl(path):
        if row.get("name") in needed:
            check_prompt(f"{path}:{number}", row, grading)
            prompts[row["name"]] = row
    if missing := sorted(needed.keys() - prompts.keys()):
        raise UserError(
            f"{path}: no prompt named {', '.join(missing)}; "
            "run python prep_data.py --mt_bench again"
        )
    return prompts


def check_prompt(place: str, row: dict, grading: str) -> None:
    """Raise UserError, beginning with `place`, for a judge prompt that cannot be filled in."""
    if not all(isinstance(row.get(key), str) for key in ("system_prompt", "prompt_template")):
        raise UserError(f"{place}: 'system_prompt' and 'prompt_template' must be text")
    name, expected_format = row["name"], OUTPUT_FORMATS[grading]
    if row.get("output_format") != expected_format:
        raise UserError(f"{place}: 'output_format' of {name} must be \"{expected_format}\"")
    try:
        # "Q: {question} {{literal}}" -> {"question"}; pieces without a field have None
        pieces = list(string.Formatter().parse(row["prompt_template"]))
    except ValueError as error:
        raise UserError(
            f"{place}: prompt_template: {error}; write literal braces as {{{{ and }}}}"
        ) from None
    fields = {field for _, field, _, _ in pieces if field is not None}
    if fields != (expected := PROMPT_FIELDS[grading][name]):
        listed = ", ".join(f"{{{field}}}" for field in sorted(expected))
        raise UserError(
            f"{place}: prompt_template of {name} must contain exactly the fields {listed}"
        )


def label_prompts(folder: Path) -> str:
    """Return "mt_bench" if the judge is asked with MT-Bench's own files, else "own".

    Scores labelled "own" are not comparable with published MT-Bench scores. The label in
    manifest.json, which prep_data.py writes, decides; without one, the hashes of the files do.
    Raises UserError if the manifest claims "mt_bench" for prompts that are not MT-Bench's.
    """
    differing = [
        name
        for name, sha256 in mt_bench.OFFICIAL_SHA256.items()
        if disk.sha256_file(folder / name) != sha256
    ]
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return "own" if differing else "mt_bench"
    label = disk.read_json(manifest).get("prompts")
    if label not in ("mt_bench", "own"):
        raise UserError(f'{manifest}: \'prompts\' must be "mt_bench" or "own"; rerun prep_data.py')
    if label == "mt_bench" and "judge_prompts.jsonl" in differing:
        raise UserError(
            f"{folder / 'judge_prompts.jsonl'}: these are not MT-Bench's prompts, but "
            "manifest.json says that they are; run python prep_data.py --mt_bench again, or write "
            '"prompts": "own" in manifest.json'
        )
    return label


# ---- what is sent --------------------------------------------------------------------------------


def single_messages(
    prompts: dict[str, dict], question: dict, answer: list[str], turn: int, reference: list[str]
) -> list[dict]:
    """Messages that ask for a rating of `turn` (1 or 2) of a two-turn `answer`.

    Equal to those of FastChat's `run_judge_single`. Turn 2 is judged with both turns shown.
    """
    if turn == 1:
        fields = {"question": question["turns"][0], "answer": answer[0]}
    else:
        fields = numbered("question", question["turns"]) | numbered("answer", answer)
    return fill_prompt(prompts, "single", fields, question, turn, reference)


def pair_messages(
    prompts: dict[str, dict],
    question: dict,
    answer_a: list[str],
    answer_b: list[str],
    turn: int,
    reference: list[str],
) -> list[dict]:
    """Messages that ask which of two answers is better at `turn` (1 or 2).

    Equal to those of FastChat's `run_judge_pair`.
    """
    if turn == 1:
        fields = {
            "question": question["turns"][0],
            "answer_a": answer_a[0],
            "answer_b": answer_b[0],
        }
    else:
        fields = numbered("question", question["turns"])
        fields |= numbered("answer_a", answer_a) | numbered("answer_b", answer_b)
    return fill_prompt(prompts, "pair", fields, question, turn, reference)


def numbered(name: str, texts: list[str]) -> dict[str, str]:
    """Field values of a prompt: ("answer", ["a", "b"]) -> {"answer_1": "a", "answer_2": "b"}."""
    return {f"{name}_{number}": text for number, text in enumerate(texts, 1)}


def fill_prompt(
    prompts: dict[str, dict],
    grading: str,
    fields: dict[str, str],
    question: dict,
    turn: int,
    reference: list[str],
) -> list[dict]:
    """Messages of the judge prompt that fits the question's category and the turn.

    str.format puts each text in as it is, so that braces in an answer need no escaping. An empty
    system prompt sends no system message, as in FastChat's `to_openai_api_messages`.
    """
    name = PLAIN_PROMPTS[grading]
    if question["category"] in NEEDS_REFERENCE:
        name = f"{grading}-math-v1"
        fields = fields | numbered("ref_answer", reference[:turn])
    prompt = prompts[name if turn == 1 else f"{name}-multi-turn"]
    messages = [{"role": "user", "content": prompt["prompt_template"].format(**fields)}]
    if prompt["system_prompt"]:
        messages.insert(0, {"role": "system", "content": prompt["system_prompt"]})
    return messages


# ---- what comes back -----------------------------------------------------------------------------


def read_rating(text: str) -> float | None:
    """The rating that FastChat reads from a judgement: the first [[x]], else the first [x].

    None if there is no such number, or if it is not from 1 to 10.
    """
    match = RATING.search(text) or RATING_BACKUP.search(text)
    rating = float(match[1]) if match else 0.0
    return rating if 1 <= rating <= 10 else None


def read_verdict(text: str) -> str | None:
    """The verdict that FastChat reads from a comparison: 'A', 'B', 'tie', or None without one."""
    return next((verdict for mark, verdict in VERDICTS.items() if mark in text), None)


def winner_of(order: str, verdict: str | None, run: str, baseline: str) -> str | None:
    """Translate one order's verdict into the winner: the run's name, the baseline's, or 'tie'.

    Example: in order "2" the run's answer is shown as B, so that verdict 'A' is the baseline's win.
    """
    if verdict in (None, "tie"):
        return verdict
    return run if (verdict == "A") == (order == RUN_IS_A) else baseline
