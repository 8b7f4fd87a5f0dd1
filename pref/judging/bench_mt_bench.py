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
from pathlib import Path

from pref.files import disk, mt_bench
from pref.files.console import UserError
from pref.files.judgements import ORDERS, RUN_IS_A
from pref.judging import benchmark, mt_bench_files, reading
from pref.judging.benchmark import PAIR, SINGLE, Ask, Bench, Benchmark, Choices
from pref.judging.reading import FALLBACK, FIRST, LAST, SEVERAL, Reply, Verdict

TEMPERATURE = 0  # as in FastChat
MAX_TOKENS = 2048  # of a judgement, as in FastChat

# Single grading: a rating from 1 to 10 in double brackets, or failing that in single ones.
RATINGS = tuple(range(1, 11))
PREFIX = "Rating: [["  # of a local judge's answer, if the prompts have no example of one
RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
RATING_BACKUP = re.compile(r"\[(\d+\.?\d*)\]")

# Pair grading: a letter in double brackets. A text with two of them counts as the first in this
# order, as in FastChat. Each pair is judged twice: the run's answer is shown as A, then as B.
VERDICTS = {"[[A]]": "A", "[[B]]": "B", "[[C]]": "tie"}


ARGUMENTS = {
    "grading": {
        "choices": (SINGLE, PAIR),
        "help": "rate each answer, or compare it with --baseline's in both orders (default single; "
        "with --validate pair)",
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


# ---- questions, references, prompts --------------------------------------------------------------


def read(folder: Path, args: argparse.Namespace) -> Bench:
    """Questions, references and the judge prompts of --grading.

    --refs corrected takes the improved references in `folder`, corrected:FILE replaces those that
    FILE contains. Raises UserError, with file, line and remedy, for anything that would spoil a
    judgement.
    """
    if not folder.is_dir():
        raise UserError(f"--mt_bench {folder}: no such folder; run python prep_data.py --mt_bench")
    mt_bench_files.check_folder(folder)
    questions = mt_bench.read_questions(folder / BENCHMARK.question_file)
    references = mt_bench_files.read_references(folder / "reference_answer/gpt-4.jsonl", questions)
    refs, grading = args.refs, args.grading or SINGLE
    if refs != "original":
        path = mt_bench_files.corrections_file(folder, refs)
        references |= mt_bench_files.read_corrections(path, questions)
        refs = f"corrected:{disk.sha256_file(path)[:12]}"
    return Bench(
        benchmark=BENCHMARK,
        folder=folder,
        questions=questions,
        grading=grading,
        references=references,
        refs=refs,
        prompts=mt_bench_files.read_prompts(folder / "judge_prompts.jsonl", grading),
        label=mt_bench_files.label_prompts(folder),
        parameters={"temperature": TEMPERATURE, "max_tokens": MAX_TOKENS},
    )


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
    """Messages of the judge prompt that fits the question's category and the turn."""
    name = mt_bench_files.PLAIN_PROMPTS[grading]
    if question["category"] in mt_bench_files.NEEDS_REFERENCE:
        name = f"{grading}-math-v1"
        fields = fields | numbered("ref_answer", reference[:turn])
    return benchmark.fill(prompts[name if turn == 1 else f"{name}-multi-turn"], fields)


# ---- what comes back -----------------------------------------------------------------------------


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


# ---- what a local judge may say ------------------------------------------------------------------


def choices(bench: Bench) -> Choices:
    """Of a rating the numbers 1 to 10, of a pair the letters."""
    prefix = answer_prefix(bench.prompts, bench.grading)
    if bench.grading == PAIR:
        return Choices(prefix, tuple(mark.strip("[]") for mark in VERDICTS), "]]", likeliest_winner)
    return Choices(prefix, tuple(map(str, RATINGS)), "]]", mean_rating)


def answer_prefix(prompts: dict[str, dict], grading: str) -> str:
    """How an answer to the judge prompts begins: as in their own example of a rating.

    'for example: "Mark: [[5]]"' -> "Mark: [["
    """
    if grading == PAIR:
        return "[["
    texts = [prompt["prompt_template"] for prompt in prompts.values()]
    examples = {match[1] for text in texts for match in re.finditer(r"(\w+: ?\[\[)\d+\]\]", text)}
    return examples.pop() if len(examples) == 1 else PREFIX


def mean_rating(weights: list[float]) -> Verdict:
    """The mean of the ratings r = 1 ... 10, weighted by their probabilities p_r: sum_r r p_r."""
    score = sum(rating * weight for rating, weight in zip(RATINGS, weights))
    return Verdict("ok", score=min(max(score, 1.0), 10.0))  # rounding may overshoot the scale


def likeliest_winner(weights: list[float]) -> Verdict:
    """The most probable of A, B and C."""
    return Verdict("ok", winner=list(VERDICTS.values())[weights.index(max(weights))])


BENCHMARK = Benchmark(
    name="mt_bench",
    title="MT-Bench",
    read=read,
    asks=asks,
    read_reply=read_reply,
    turns=2,
    arguments=ARGUMENTS,
    check=check,
    choices=choices,
)
