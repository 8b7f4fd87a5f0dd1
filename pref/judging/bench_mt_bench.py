"""MT-Bench: each answer rated from 1 to 10, or compared with a baseline run's in both orders.

`read` reads and checks questions, reference answers and judge prompts. `single_messages` and
`pair_messages` turn them and a run's answers into chat messages; `read_reply` interprets what the
judge writes back. Messages and reading are those of FastChat (fastchat/llm_judge/common.py, version
0.2.36), byte for byte; tests/test_judge.py compares them with FastChat's own code. reading.py puts
limits on the reading: a number in single brackets counts only in a judgement that came to its end
and has no double bracket.
"""

import argparse
import functools
import re
import string
from pathlib import Path

from pref.files import disk, mt_bench
from pref.files.console import UserError
from pref.judging import reading
from pref.judging.benchmark import ORDERS, PAIR, RUN_IS_A, SINGLE, Ask, Bench, Benchmark
from pref.judging.reading import FALLBACK, FIRST, LAST, SEVERAL, Reply, Verdict

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


ARGUMENTS = {
    "grading": {
        "choices": (SINGLE, PAIR),
        "default": SINGLE,
        "help": "rate each answer, or compare it with --baseline's in both orders (default single)",
    },
    "refs": {
        "default": "original",
        "metavar": "original|corrected[:FILE]",
        "help": "reference answers: GPT-4's as published; FastChat's improved ones, by "
        "gpt-4-0125-preview; or with those in FILE replacing the published ones (default original)",
    },
    "verdict": {
        "choices": (FIRST, LAST),
        "default": FIRST,
        "help": "which of several verdicts in one judgement counts: the first, as in FastChat, or "
        "the last, a reading of its own that is labelled as such; what is judged already is read "
        f"again at no cost (default {FIRST})",
    },
    "mt_bench": {"type": Path, "metavar": "DIR", "help": "the same as --bench_data DIR"},
    "import_fastchat": {
        "type": Path,
        "metavar": "FILE",
        "help": "store the judgements of FastChat's model_judgment/*.jsonl that belong to these "
        "answers, prompts and --judge; send nothing",
    },
}


def check(args: argparse.Namespace) -> None:
    """Raise UserError for arguments of which one is missing or has no meaning."""
    if (args.grading == PAIR) != (args.baseline is not None):
        raise UserError("--grading pair needs --baseline RUN, and --baseline needs --grading pair")
    if args.refs != "original" and not re.fullmatch(r"corrected(:.+)?", args.refs):
        raise UserError(f"--refs {args.refs}: must be original, corrected or corrected:FILE")
    if args.import_results and args.import_fastchat:
        raise UserError("--import_results and --import_fastchat: give one of them")


# ---- questions, references, prompts --------------------------------------------------------------


def read(folder: Path, args: argparse.Namespace) -> Bench:
    """Questions, references and the judge prompts of --grading.

    --refs corrected takes the improved references in `folder`, corrected:FILE replaces those that
    FILE contains. Raises UserError, with file, line and remedy, for anything that would spoil a
    judgement.
    """
    if not folder.is_dir():
        raise UserError(f"--mt_bench {folder}: no such folder; run python prep_data.py --mt_bench")
    questions = mt_bench.read_questions(folder / BENCHMARK.question_file)
    references = read_references(folder / "reference_answer/gpt-4.jsonl", questions)
    refs = args.refs
    if refs != "original":
        path = corrections_file(folder, refs)
        references |= read_corrections(path, questions)
        refs = f"corrected:{disk.sha256_file(path)[:12]}"
    return Bench(
        benchmark=BENCHMARK,
        folder=folder,
        questions=questions,
        grading=args.grading,
        references=references,
        refs=refs,
        prompts=read_prompts(folder / "judge_prompts.jsonl", args.grading),
        label=label_prompts(folder),
        parameters={"temperature": TEMPERATURE, "max_tokens": MAX_TOKENS},
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


def corrections_file(folder: Path, refs: str) -> Path:
    """The file of "corrected" or "corrected:FILE". Raises UserError if `folder` has none."""
    _, _, given = refs.partition(":")
    path = Path(given) if given else folder / mt_bench.IMPROVED_REFERENCES
    if not given and not path.is_file():
        raise UserError(
            f"--refs corrected: no {path}; run python prep_data.py --mt_bench --out {folder}, or "
            "give your own with --refs corrected:FILE"
        )
    return path


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
                f"--refs corrected: {path}: question {question_id} is not in the question file"
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


def asks(
    bench: Bench, question: dict, turn: int, answer: list[str], other: list[str] | None
) -> list[Ask]:
    """A rating of `answer`, or its comparison with the `other`, once in each order."""
    reference = bench.references.get(question["question_id"], [])
    if bench.grading == SINGLE:
        return [Ask(single_messages(bench.prompts, question, answer, turn, reference))]
    comparisons = []
    for order in ORDERS:
        answer_a, answer_b = (answer, other) if order == RUN_IS_A else (other, answer)
        messages = pair_messages(bench.prompts, question, answer_a, answer_b, turn, reference)
        comparisons.append(Ask(messages, order))
    return comparisons


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


def read_reply(reply: Reply, request: dict, which: str = FIRST) -> Verdict:
    """The verdict in a reply to `request`. which: of several verdicts, FIRST or LAST."""
    # The last verdict of a text that was cut off may not have been written.
    needs_end = which == LAST
    if request.get("grading") == PAIR:
        find = functools.partial(find_winner, which=which)
        return reading.read_text(reply, find, needs_end=needs_end)
    return reading.read_text(
        reply,
        find=functools.partial(find_rating, which=which),
        fallback=functools.partial(find_single_brackets, which=which),
        needs_end=needs_end,
    )


def find_winner(text: str, which: str) -> Verdict | None:
    """The letter in double brackets. FIRST is FastChat's: A before B before C, wherever they are.

    SEVERAL if the first in the text and the last differ.
    """
    marks = [VERDICTS[mark] for mark in re.findall(r"\[\[[ABC]\]\]", text)]
    if not marks:
        return None
    winner = read_verdict(text) if which == FIRST else marks[-1]
    return Verdict("ok", winner=winner, reading=SEVERAL if marks[0] != marks[-1] else "")


def find_rating(text: str, which: str) -> Verdict | None:
    """The rating in double brackets; FIRST is FastChat's.

    SEVERAL if the first and the last differ.
    """
    numbers = RATING.findall(text)
    first, last = (rating_of(numbers[i]) if numbers else None for i in (0, -1))
    rating = first if which == FIRST else last
    if rating is None:
        return None
    return Verdict("ok", score=rating, reading=SEVERAL if first != last else "")


def find_single_brackets(text: str, which: str) -> Verdict | None:
    """FastChat's second try: a rating in single brackets, if there are no double ones."""
    numbers = RATING_BACKUP.findall(text) if "[[" not in text else []
    rating = rating_of(numbers[0 if which == FIRST else -1]) if numbers else None
    return None if rating is None else Verdict("ok", score=rating, reading=FALLBACK)


def rating_of(number: str) -> float | None:
    """A number as a rating; None if it is not from 1 to 10."""
    rating = float(number)
    return rating if 1 <= rating <= 10 else None


BENCHMARK = Benchmark(
    name="mt_bench",
    title="MT-Bench",
    read=read,
    asks=asks,
    read_reply=read_reply,
    turns=2,
    arguments=ARGUMENTS,
    check=check,
)
