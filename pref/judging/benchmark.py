"""What a benchmark is to judge.py: questions, what is asked about an answer, how a reply is read.

A benchmark is a file `bench_<name>.py` that ends with a `Benchmark`, and a line in benchmarks.py.
Everything else (the store, the cap, resuming, batch files, judgements.csv) is the same for all.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pref.files import disk
from pref.files.judgements import RUN_IS_A
from pref.judging.reading import Reply, Verdict

# Column `grading`; REWARD: by a reward model, PROGRAM: by a task's function.
SINGLE, PAIR, REWARD, PROGRAM = "single", "pair", "reward", "program"
SCORE_GRADINGS = (REWARD, PROGRAM)  # asked for with no prompt


class Ask(NamedTuple):
    """One question to the judge about one answer."""

    messages: list[dict]
    order: str = ""  # of a pair: judgements.RUN_IS_A or RUN_IS_B
    known: Verdict | None = None  # a verdict for which nobody needs to be asked
    extra: dict = {}  # noqa: RUF012  further keys of the request, see identity.Identity.request


class Choices(NamedTuple):
    """How a local judge answers, which is asked for probabilities instead of a text."""

    prefix: str  # the beginning of its answer
    texts: tuple[str, ...]  # what may follow
    closing: str  # what ends each of them, such as "]]"; "": anything may follow
    read: Callable[[list[float]], Verdict]  # from the texts' probabilities, which sum to 1


class Benchmark(NamedTuple):
    """A benchmark, as its module describes it."""

    name: str  # data in data/<name>, answers in results/<run>/<name>
    title: str  # in messages
    # (folder, arguments) -> what the folder holds. Raises UserError, with place and remedy.
    read: Callable[[Path, argparse.Namespace], "Bench"]
    # (bench, question, turn, answer, the baseline's answer or None) -> what is asked.
    # An answer is a list of turns; what is judged is `turn`, from 1.
    asks: Callable[["Bench", dict, int, list[str], list[str] | None], list[Ask]]
    # (reply, its request, which of several verdicts: reading.FIRST or LAST) -> the verdict
    read_reply: Callable[[Reply, dict, str], Verdict]
    turns: int = 1  # that are judged; an answer has as many
    question_file: str = "question.jsonl"  # in its folder
    # Arguments that only this benchmark has: keywords of add_argument, by name.
    arguments: dict[str, dict] = {}  # noqa: RUF012  never changed
    # Raises UserError for arguments that do not fit together, before any file is read.
    check: Callable[[argparse.Namespace], None] | None = None
    # (bench, log-probabilities of the first token of the probe's reply, None without) -> a
    # complaint that stops the command, or None.
    check_probe: Callable[["Bench", dict | None], str | None] | None = None
    choices: Callable[["Bench"], Choices] | None = None  # None: an hf: judge cannot judge it
    # (items with their results) -> one run's columns of the table that is printed at the end,
    # beside name, failures and cost; None: as the summary does it for the grading.
    summarise: Callable[[list], dict[str, str]] | None = None
    # (bench, items) -> what a reader must know of them before they are judged.
    notes: Callable[["Bench", list], list[str]] | None = None
    # (bench, answers by run folder, run_answers.Baselines, identity.Identity): writes further files
    # beside judgements.csv, which is there.
    export: Callable | None = None
    # What is printed of judgements with these values of the column `reading`.
    remarks: dict[str, str] = {}  # noqa: RUF012  never changed
    completion_tokens: int = 250  # of a judgement, for an estimate before there are any


class Bench(NamedTuple):
    """A benchmark's files, read and checked, and what the arguments make of it."""

    benchmark: Benchmark
    folder: Path
    questions: list[dict]  # question_id, category (text or None), turns; in file order
    grading: str  # SINGLE, PAIR, REWARD or PROGRAM
    prompts: dict[str, dict]  # by name: system_prompt, prompt_template
    label: str  # the benchmark's name, or "own" for other files than its own
    parameters: dict  # sent with each request
    references: dict[int, list[str]] = {}  # noqa: RUF012  reference answers by question_id
    refs: str = "original"  # or "corrected:" and a hash of the file with the corrections
    baselines: dict[int, str] = {}  # noqa: RUF012  by question_id: whom --baseline replaces
    options: dict = {}  # noqa: RUF012  own arguments with which it is another judge; no defaults
    samples: int = 1  # judgements of each answer; --repeats multiplies them

    @property
    def name(self) -> str:
        return self.benchmark.name

    @property
    def title(self) -> str:
        return self.benchmark.title

    @property
    def question_file(self) -> Path:
        return self.folder / self.benchmark.question_file

    @property
    def turns(self) -> range:
        """The turns that are judged, from 1."""
        return range(1, self.benchmark.turns + 1)


def question_up_to(question: dict, turn: int) -> dict:
    """The question as a program gets it: with the turns up to the judged one."""
    return {**question, "turns": question["turns"][:turn]}


def question_sha256(question: dict, turn: int) -> str:
    """Hash of the whole row, since the program may read all of it."""
    return disk.sha256_json(question_up_to(question, turn))


def fill(prompt: dict, fields: dict[str, str]) -> list[dict]:
    """The messages of a judge prompt (`Bench.prompts`).

    str.format puts each text in as it is, so that braces in an answer need no escaping. An empty
    system prompt sends no system message.
    """
    messages = [{"role": "user", "content": prompt["prompt_template"].format(**fields)}]
    if prompt["system_prompt"]:
        messages.insert(0, {"role": "system", "content": prompt["system_prompt"]})
    return messages


def winner_of(order: str, verdict: str | None, run: str, baseline: str) -> str | None:
    """Translate one order's verdict into the winner: the run's name, the baseline's, or 'tie'.

    Example: in order "2" the run's answer is shown as B, so that verdict 'A' is the baseline's win.
    """
    if verdict in (None, "tie"):
        return verdict
    return run if (verdict == "A") == (order == RUN_IS_A) else baseline


def preference_of(order: str, preference: float | None) -> float | None:
    """The preference for the run, from 1 (the baseline) to 2 (the run), of one order's preference,
    from 1 (the answer shown first) to 2.
    """
    return 3 - preference if preference is not None and order == RUN_IS_A else preference
