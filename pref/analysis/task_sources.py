"""Scores by a task's program (judge.py --judge py:FILE): the parts of the measure `task`.

A question's value is the mean of its choices' scores, from 0 to 1; a run's score is the mean of its
questions. Beside it stand the task's other readings of the same answers, and what shows a score
that was gained by breaking the text: length, repetition, answers that were cut off.
"""

import json
import re
from statistics import fmean

from pref.analysis import part_sources, parts, row_checks, run_metrics, stats
from pref.analysis.parts import Part, Sources
from pref.analysis.runs import Run

PROGRAM = "program"  # column `grading`
READING = "reading: "  # begins the field of another reading in a run's numbers
# Word pairs of a block. The share of different ones falls with the number of pairs: it is taken of
# blocks of one size, so that longer answers do not look more repetitive.
BLOCK = 500


def find_task(runs: list[Run], sources: Sources) -> list[Part]:
    """One part for each benchmark and version of its task file. The answers to the questions that
    pairs were made from are not read at all (results_folder.find_benches).
    """
    return [
        with_texts(part, runs)
        for bench in parts.other_benches(runs)
        for part in part_sources.scored_parts(runs, bench, sources, PROGRAM)
    ]


def with_texts(part: Part, runs: list[Run]) -> Part:
    """Add what is said of the answers besides their score to the numbers of a part."""
    names = sorted(
        {name for rows in part.judged.values() for row in rows for name in readings(row)}
    )
    for run in runs:
        if run.run_id not in part.numbers:
            continue
        rows = [
            row for row in part.judged[run.run_id] if row["question_id"] in part.questions.common
        ]
        answers = {
            key: row
            for key, row in run.bench(part.facts["bench"]).answers.items()
            if key.question_id in part.questions.common
        }
        part.numbers[run.run_id] |= {
            **{f"{READING}{name}": mean_reading(rows, name) for name in names},
            "distinct_2": distinct_pairs(answers),
            "cut_off": run_metrics.answer_shape(answers).cut_off,
            "categories": {
                name: category_score([row for row in rows if row["category"] == name])
                for name in sorted({row["category"] for row in rows} - {None})
            },
        }
    part.facts["readings"] = names
    return part


# ---- readings -----------------------------------------------------------------------------------


def explained(row: dict) -> dict:
    """What the task's `explain` gave: {"text", "scores"}; {} if it explained nothing, or failed."""
    try:
        found = json.loads(row["judgement"] or "{}") if row["status"] == "ok" else {}
    except (ValueError, RecursionError):
        found = {}
    return found if isinstance(found, dict) else {}


def readings(row: dict) -> dict[str, float]:
    """The other scores of an answer, by name."""
    scores = explained(row).get("scores")
    if not isinstance(scores, dict):
        return {}
    return {name: score for name, score in scores.items() if row_checks.is_share(score)}


def explanation(row: dict) -> str | None:
    """The checker's words for a reader, then the other readings; of a failure, its reason."""
    found = explained(row)
    if not found:
        return row["judgement"]
    others = [f"{name}: {score:.3g}" for name, score in readings(row).items()]
    return "\n".join([str(found.get("text") or ""), *others]).strip() or None


def mean_reading(rows: list[dict], name: str) -> float | None:
    """Mean over questions of the mean over choices, as the score is."""
    scored = [row | {"score": readings(row)[name]} for row in rows if name in readings(row)]
    return stats.mean(part_sources.question_means(scored).values())


def category_score(rows: list[dict]) -> dict:
    """The score on one category's questions, with the numbers of questions scored and judged."""
    by_question = list(part_sources.question_means(rows).values())
    return {
        "score": stats.mean(by_question),
        "se": stats.standard_error(by_question),
        "n_scored": len(by_question),
        "n_judged": len({row["question_id"] for row in rows}),
    }


# ---- repetition ---------------------------------------------------------------------------------


def distinct_pairs(answers: dict) -> float | None:
    """Distinct-2 of a run's answers: the share of different ones among BLOCK pairs of neighbouring
    words, mean over the blocks.

    answers: (question, choice) -> row of answers.jsonl. The pairs of all answers (of choice 0 by
    question, then of choice 1 ...) are cut into blocks; a last block that is not full is left out.
    None with fewer than BLOCK pairs.

    Notes
    -----
    Distinct-2 (Li et al. 2016) in segments of equal size, as the mean segmental type-token ratio
    (Johnson 1944) has it. Words are runs of letters and digits, in lower case. A loop within an
    answer lowers it, and so does a phrase with which all answers begin.
    """
    pairs: list[tuple[str, str]] = []
    for key in sorted(answers, key=lambda key: (key.choice, key.question_id)):
        for text in answers[key]["turns"]:
            words = re.findall(r"\w+", text.lower())
            pairs += zip(words, words[1:])
    blocks = [pairs[start : start + BLOCK] for start in range(0, len(pairs) - BLOCK + 1, BLOCK)]
    return fmean(len(set(block)) / BLOCK for block in blocks) if blocks else None
