"""Arena-Hard-Auto: each answer against a baseline's, in two games, with five verdicts.

The judge sees the question and two answers, and ends with a label from [[A>>B]] to [[B>>A]]. In
game 1 the baseline's answer is A, in game 2 the run's. Messages are those of arena-hard-auto
(gen_judgment.py, utils/judge_utils.py), byte for byte. The two versions differ in their questions
and baselines (files), and in two points here:

    version   judge's parameters               labels that differ within one judgement
    v0.1      temperature 0, 4,096 tokens      no verdict (version 0.1's own code)
    v2.0      temperature 0, 16,000 tokens     the last one counts, column `reading` "several"

A judgement that was cut off has no verdict: its last label may be missing. Version 0.1's own code
made a second call where the first brought no label; here that is status "parse" (or "length").

How verdicts become a score is pref/analysis/arena_hard.py's matter.
"""

import argparse
import functools
import re
import sys
from collections import defaultdict
from pathlib import Path

from pref.files import benchmarks, disk
from pref.files.arena_hard_download import SETTINGS, check_settings
from pref.files.benchmarks import BenchFolder
from pref.files.console import UserError
from pref.files.judgements import RUN_IS_A, RUN_IS_B
from pref.files.verdict_labels import LABELS, from_run_side, read_label
from pref.judging import benchmark, reading
from pref.judging.benchmark import PAIR, Ask, Bench, Benchmark, Choices
from pref.judging.reading import FALLBACK, SEVERAL, Reply, Verdict

V01, V20 = "arena_hard_v0.1", "arena_hard_v2.0"
MAX_TOKENS = {V01: 4096, V20: 16000}  # of a judgement
COMPLETION_TOKENS = {V01: 600, V20: 1200}  # roughly; the judge writes its own answer first
GAMES = (RUN_IS_B, RUN_IS_A)  # column `order`, of game 1 and game 2

# Labels in double brackets, and failing that in single ones: of the first pattern that matches.
PATTERNS = (re.compile(r"\[\[([AB<>=]+)\]\]"), re.compile(r"\[([AB<>=]+)\]"))
WINNER = {1.0: "A", 0.5: "tie", 0.0: "B"}
REMARKS = {
    FALLBACK: "have their label in single brackets, [A>B], and none in double ones",
    SEVERAL: "have several labels, which differ; the last one counts",
}
# How a judge that is asked for probabilities begins its answer: the prompt's example has
# 'My final verdict is tie: [[A=B]]'.
PREFIX = "My final verdict is: [["


# ---- the folder ----------------------------------------------------------------------------------


def read(name: str, folder: Path, args: argparse.Namespace) -> Bench:
    """Questions, judge prompts and baselines of the version `name`.

    Raises UserError, with place and remedy, for anything that would spoil a judgement.
    """
    data, path = benchmarks.open_folder(name, folder), folder / SETTINGS
    if not path.is_file():
        version = name.removeprefix("arena_hard_")
        raise UserError(f"{path}: no such file; run python prep_data.py --arena_hard {version}")
    questions = benchmarks.read_questions(data)
    content = check_settings(disk.read_json(path), str(path))
    settings, template = content["settings"], content["prompt_template"]
    for question in questions:
        if question.get("category") not in settings:
            raise UserError(
                f"{data.questions_file}: question {question['question_id']} has category "
                f"{question.get('category')!r}; {path} has {', '.join(settings)}"
            )
    used = dict.fromkeys(question["category"] for question in questions)
    prompts = {
        category: {
            "system_prompt": settings[category]["system_prompt"],
            "prompt_template": template,
        }
        for category in used
    }
    names = {q["question_id"]: settings[q["category"]]["baseline"] for q in questions}
    return Bench(
        benchmark=BENCHMARKS[name],
        folder=folder,
        questions=questions,
        grading=PAIR,
        prompts=prompts,
        label=benchmarks.label_of(data),
        parameters={"temperature": 0, "max_tokens": MAX_TOKENS[name]},
        baselines=names if args.baseline else with_answers(data, names),
    )


def with_answers(data: BenchFolder, names: dict[int, str]) -> dict[int, str]:
    """`names` (baseline by question_id) without the baselines whose answers the folder lacks.

    Says which questions are not judged therefore. Raises UserError if none would be.
    """
    there = benchmarks.read_baselines(data.folder, turns=1)
    kept = {question_id: name for question_id, name in names.items() if name in there}
    for name in dict.fromkeys(names.values()):
        if name in there:
            continue
        without = sum(one == name for one in names.values())
        version = data.name.removeprefix("arena_hard_")
        message = (
            f"{data.folder / 'baseline'}: no answers of {name}, the baseline of {without} of "
            f"{len(names)} questions; fetch them with python prep_data.py --arena_hard {version} "
            "(with a network, or from a folder that has them), or compare with a run: "
            "--baseline RUN"
        )
        if not kept:
            raise UserError(message)
        print(f"{message}; these questions are not judged", file=sys.stderr)
    return kept


# ---- what is sent --------------------------------------------------------------------------------


def asks(
    bench: Bench, question: dict, turn: int, answer: list[str], other: list[str] | None
) -> list[Ask]:
    """The two games of an answer and the baseline's, `other`."""
    prompt, asked = bench.prompts[question["category"]], []
    for order in GAMES:
        first, second = (answer, other) if order == RUN_IS_A else (other, answer)
        fields = {"QUESTION": question["turns"][0], "ANSWER_A": first[0], "ANSWER_B": second[0]}
        asked.append(Ask(benchmark.fill(prompt, fields), order))
    return asked


# ---- what comes back -----------------------------------------------------------------------------


def read_reply(name: str, reply: Reply, request: dict, which: str) -> Verdict:
    """The verdict of a judgement, as the version `name` reads it."""
    find = functools.partial(find_label, one_label=name == V01)
    return reading.read_text(reply, find, needs_end=True)


def find_label(text: str, one_label: bool) -> Verdict | None:
    """The label of a judgement: the last one, of the first pattern that matches.

    one_label: labels that differ are no verdict.

    "... [[B>A]] ... [[a>>b]]" -> A>>B, several; None with one_label
    "... [A>B]"                -> A>B, fallback
    """
    for pattern, kind in zip(PATTERNS, ("", FALLBACK)):
        if marks := pattern.findall(text.upper()):
            label, several = read_label(marks[-1]), len(set(map(read_label, marks))) > 1
            if label is None or (several and one_label):
                return None
            return verdict_of(label, SEVERAL if several else kind)
    return None


def verdict_of(label: str, how: str = "") -> Verdict:
    return Verdict("ok", winner=WINNER[LABELS[label].score], reading=how, label=label)


def choices(bench: Bench) -> Choices:
    """How a local judge answers: with the most probable of the five labels. It writes no answer of
    its own first, which the prompt asks for: its verdicts are not those of the same model behind a
    server.
    """

    def most_probable(probabilities: list[float]) -> Verdict:
        return verdict_of(max(zip(probabilities, LABELS))[1])

    return Choices(prefix=PREFIX, texts=tuple(LABELS), closing="]]", read=most_probable)


# ---- the table at the end ------------------------------------------------------------------------


def summarise(outcomes: list) -> dict[str, str]:
    """One run's columns: a value for each baseline, in the order in which the title names them."""
    by_baseline = defaultdict(list)
    for item, result in outcomes:
        by_baseline[item.baseline].append((item, result))
    columns = [against_one(games) for games in by_baseline.values()]
    return {name: " / ".join(column[name] for column in columns) for name in columns[0]}


def against_one(games: list) -> dict[str, str]:
    """The columns against one baseline. games: (item, result). `orders disagree` counts pairs of
    games with different winners, `n` questions, however often each was judged.
    """
    # 1) The labels of each question from the run's side, None without a verdict.
    labels_of = defaultdict(list)
    for item, result in games:
        label = from_run_side(result.label, item.order) if result.status == "ok" else None
        labels_of[item.question_id, item.choice, item.repeat].append(label)
    complete = {key: labels for key, labels in labels_of.items() if None not in labels}
    # 2) Rows, as pref/analysis/arena_hard.py counts them.
    counted = complete
    if games[0][0].bench == V01:  # one of the two games is enough
        counted = {key: labels for key, labels in labels_of.items() if any(labels)}
    labels = [LABELS[label] for labels in counted.values() for label in labels if label is not None]
    rows = sum(label.rows for label in labels)
    score = sum(label.score * label.rows for label in labels)
    decided = [{LABELS[label].score for label in labels} for labels in complete.values()]
    questions, asked = ({question for question, *_ in keys} for keys in (counted, labels_of))
    return {
        "win rate": f"{100 * score / rows:.2f} %" if rows else "-",
        "n": f"{len(questions)}/{len(asked)}",
        "orders disagree": str(sum({0.0, 1.0} <= scores for scores in decided)),
    }


BENCHMARKS = {
    name: Benchmark(
        name=name,
        title=f"Arena-Hard {name.removeprefix('arena_hard_')}",
        read=functools.partial(read, name),
        asks=asks,
        read_reply=functools.partial(read_reply, name),
        choices=choices,
        summarise=summarise,
        remarks=REMARKS,
        completion_tokens=COMPLETION_TOKENS[name],
    )
    for name in (V01, V20)
}
