"""What a judge can be validated against: comparisons of two answers whose outcome is known.

- MT-Bench's human votes (Zheng et al. 2023, arXiv:2306.05685; CC BY 4.0): 3,355 votes on 1,814
  pairs of answers, by 65 people. `read_votes` reads and checks them.
- LLMBar (Zeng et al. 2024, arXiv:2310.07641; MIT): 419 pairs of which one follows the instruction
  and the other does not. `read_llmbar` reads them.

A pair is oriented: model_a comes before model_b in the alphabet. The outcome of a vote, or of a
verdict, is A, TIE or B.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pref.files import benchmarks, disk
from pref.files.console import UserError

A, TIE, B = "a", "tie", "b"
OUTCOMES = (A, TIE, B)
MIRRORED = {A: B, TIE: TIE, B: A}
WINNERS = {"model_a": A, "model_b": B, "tie": TIE, "tie (inconsistent)": TIE}
EXPERT = "expert"  # voters whose name begins so; the others are authors of the paper

HUMAN, LLMBAR = "mt_bench_human", "llmbar"  # folders in data/
DATA = (HUMAN, LLMBAR)
LLMBAR_SUBSETS = (
    "Natural",
    "Adversarial_Neighbor",
    "Adversarial_GPTInst",
    "Adversarial_GPTOut",
    "Adversarial_Manual",
)


class Pair(NamedTuple):
    """Two models' answers to one question, as they stand after `turn` (1 or 2)."""

    question_id: int
    turn: int
    model_a: str
    model_b: str


class Vote(NamedTuple):
    voter: str
    outcome: str  # A, TIE or B

    @property
    def by_expert(self) -> bool:
        return self.voter.startswith(EXPERT)


class Known(NamedTuple):
    """Comparisons with a known outcome, and the texts that were compared."""

    name: str  # HUMAN or LLMBAR
    questions: dict[int, dict]  # by question_id: question_id, category, turns
    answers: dict[str, dict[int, list[str]]]  # turns by question_id, by model
    votes: dict[Pair, list[Vote]]
    published: dict[Pair, str]  # GPT-4's verdicts of 2023, where the folder has them
    inconsistent: set[Pair]  # those of them whose two orders disagreed
    sha256: str  # of the votes


# ---- MT-Bench's human votes ----------------------------------------------------------------------


def read_votes(folder: Path, questions: list[dict]) -> Known:
    """The votes in `folder`, on answers to `questions` (see `mt_bench.read_questions`).

    Reads human.jsonl, model_answer/*.jsonl and, if it is there, gpt4_pair.jsonl. Raises UserError,
    with file and line, for a vote that names an unknown question, turn, winner or model.
    """
    path = folder / "human.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; run python prep_data.py --mt_bench_human")
    answers = benchmarks.first_answers(folder)
    by_id = {question["question_id"]: question for question in questions}
    votes: dict[Pair, list[Vote]] = defaultdict(list)
    for number, row in disk.read_jsonl(path):
        pair, outcome = read_comparison(row, f"{path}:{number}", by_id, answers)
        votes[pair].append(Vote(row["judge"], outcome))
    if not votes:
        raise UserError(f"{path}: no votes; run python prep_data.py --mt_bench_human again")
    published, inconsistent = {}, set()
    if (verdicts := folder / "gpt4_pair.jsonl").is_file():
        for number, row in disk.read_jsonl(verdicts):
            pair, outcome = read_comparison(row, f"{verdicts}:{number}", by_id, answers)
            if pair in published:
                raise UserError(f"{verdicts}:{number}: a second verdict on {describe(pair)}")
            published[pair] = outcome
            if row["winner"] == "tie (inconsistent)":
                inconsistent.add(pair)
    sha256 = disk.sha256_file(path)
    return Known(HUMAN, by_id, answers, dict(votes), published, inconsistent, sha256)


def read_comparison(
    row: dict, place: str, questions: dict[int, dict], answers: dict[str, dict[int, list[str]]]
) -> tuple[Pair, str]:
    """The pair and the outcome in a row of human.jsonl or gpt4_pair.jsonl, oriented.

    Raises UserError, beginning with `place`.
    """
    names = ("judge", "model_a", "model_b", "question_id", "turn", "winner")
    if missing := [name for name in names if name not in row]:
        raise UserError(f"{place}: no {', '.join(missing)}; a vote has {', '.join(names)}")
    question_id, turn, winner = row["question_id"], row["turn"], row["winner"]
    if type(question_id) is not int or question_id not in questions:
        raise UserError(
            f"{place}: question_id {question_id!r} is not among the questions; give --mt_bench the "
            "folder with MT-Bench's own"
        )
    if type(turn) is not int or turn not in (1, 2):
        raise UserError(f"{place}: turn {turn!r} must be 1 or 2")
    if not isinstance(winner, str) or winner not in WINNERS:
        raise UserError(f"{place}: winner {winner!r} must be one of {', '.join(WINNERS)}")
    if not isinstance(row["judge"], str):
        raise UserError(f"{place}: judge {row['judge']!r} must be text")
    for model in (row["model_a"], row["model_b"]):
        if not isinstance(model, str) or model not in answers:
            raise UserError(
                f"{place}: model {model!r} has no file in model_answer/, which has "
                f"{', '.join(sorted(answers))}"
            )
        if question_id not in answers[model]:
            raise UserError(f"{place}: {model} has no answer to question {question_id}")
    if row["model_a"] == row["model_b"]:
        raise UserError(f"{place}: {row['model_a']} is compared with itself")
    first, second = sorted((row["model_a"], row["model_b"]))
    outcome = WINNERS[winner]
    if first != row["model_a"]:
        outcome = MIRRORED[outcome]
    return Pair(question_id, turn, first, second), outcome


def describe(pair: Pair) -> str:
    return f"question {pair.question_id}, turn {pair.turn}, {pair.model_a} and {pair.model_b}"


def repeated_votes(votes: dict[Pair, list[Vote]]) -> int:
    """How many votes are a voter's second, or later, one on the same pair."""
    return sum(len(some) - len({vote.voter for vote in some}) for some in votes.values())


# ---- LLMBar --------------------------------------------------------------------------------------


def read_llmbar(folder: Path) -> Known:
    """LLMBar's pairs, as votes of one voter each; the category is the subset.

    Numbered from 1, subset after subset. Raises UserError, with file and entry.
    """
    questions, votes, texts = {}, {}, {}
    answers: dict[str, dict[int, list[str]]] = {"output_1": {}, "output_2": {}}
    for subset in LLMBAR_SUBSETS:
        path = folder / f"{subset}.json"
        if not path.is_file():
            raise UserError(f"{path}: no such file; run python prep_data.py --llmbar")
        rows = disk.read_json_value(path)
        if not isinstance(rows, list):
            raise UserError(f"{path}: expected a JSON list")
        for number, row in enumerate(rows, 1):
            check_llmbar(row, f"{path}: entry {number}")
            question_id = len(questions) + 1
            question = {"question_id": question_id, "category": subset, "turns": [row["input"]]}
            questions[question_id] = question
            for name in answers:
                answers[name][question_id] = [row[name]]
            pair = Pair(question_id, 1, "output_1", "output_2")
            votes[pair] = [Vote("label", A if row["label"] == 1 else B)]
        texts[subset] = rows
    if not votes:
        raise UserError(f"{folder}: no pairs; run python prep_data.py --llmbar again")
    return Known(LLMBAR, questions, answers, votes, {}, set(), disk.sha256_json(texts))


def check_llmbar(row: dict, place: str) -> None:
    """Raise UserError, beginning with `place`, for a row that is no pair with a label."""
    disk.as_object(row, place)
    for name in ("input", "output_1", "output_2"):
        if not isinstance(row.get(name), str):
            raise UserError(f"{place}: '{name}' must be text")
    if type(row.get("label")) is not int or row["label"] not in (1, 2):
        raise UserError(f"{place}: 'label' must be 1 or 2, not {row.get('label')!r}")


# ---- outcomes, and a sample of pairs -------------------------------------------------------------


def majority(outcomes: Iterable[str]) -> str:
    """The most frequent outcome; TIE where two are equally frequent."""
    counts = Counter(outcomes).most_common(2)
    return TIE if len(counts) == 2 and counts[0][1] == counts[1][1] else counts[0][0]


def in_sample_order(known: Known) -> list[Pair]:
    """All pairs in an order whose every beginning is a stratified sample.

    Strata are category, turn and the majority of the votes; each has the same share in a beginning
    as in the whole, to within one pair. The order depends on the pairs and votes alone, so that
    the first 400 are a part of the first 800.
    """
    strata: dict[tuple, list[Pair]] = defaultdict(list)
    for pair, votes in known.votes.items():
        outcome = majority(vote.outcome for vote in votes)
        strata[known.questions[pair.question_id]["category"], pair.turn, outcome].append(pair)
    place = {}
    for stratum, pairs in strata.items():
        # Pair i of n stands at (i + offset) / n of the way, in a random order of the pairs.
        offset = random_number(stratum)
        for i, pair in enumerate(sorted(pairs, key=random_number)):
            place[pair] = ((i + offset) / len(pairs), pair)
    return sorted(place, key=lambda pair: place[pair])


def random_number(key: tuple) -> float:
    """A number in [0, 1) that is always the same for `key`, on any machine and version."""
    return int(hashlib.sha256(repr(tuple(key)).encode()).hexdigest()[:13], 16) / 16**13
