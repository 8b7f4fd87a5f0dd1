"""annotations.json: judgements of AlpacaEval in the columns of the package alpaca_eval.

`write_annotations` puts it beside judgements.csv, where the package reads it:

    cd results/RUN
    alpaca_eval --model_outputs alpaca_eval/model_outputs.json --output_path alpaca_eval ...

The package finds an instruction's difficulty by its position in the file, so that one missing row
would move its length-controlled rate by several points. The file therefore has a row for every
instruction, in the order of questions.json; what has no verdict has no preference.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from pref.files import disk, judgements, win_rates
from pref.judging.benchmark import Bench
from pref.judging.identity import Identity
from pref.judging.run_answers import Baselines

FILE = "annotations.json"
# The package's annotators whose requests are AlpacaEval 2's, and their judges.
ANNOTATORS = {
    "weighted_alpaca_eval_gpt4_turbo": "gpt-4-1106-preview",
    "weighted_alpaca_eval_gpt4.1": "gpt-4.1-2025-04-14",
}


def write_annotations(
    bench: Bench, runs: dict[Path, dict], baselines: Baselines, who: Identity
) -> None:
    """Write annotations.json of every run that has a judgement by `who`.

    runs: answers by run folder.
    """
    annotator = annotator_of(who.judge, bench)
    incomplete: dict[str, str] = {}  # by run: what it lacks
    for run, answers in runs.items():
        name, folder = run.resolve().name, run / bench.name
        if not (folder / "judgements.csv").is_file():
            continue
        rows = [
            row
            for row in judgements.read_judgements(folder / "judgements.csv")
            if row["judge_id"] == who.id
            and row["choice"] == 0
            and row["baseline"] == baselines.names.get(row["question_id"])
        ]
        if not rows:
            continue
        keys = [(question["question_id"], 0) for question in bench.questions]
        lacking = [
            key[0] for key in keys if key not in answers or key not in baselines.answers_to(key[0])
        ]
        if lacking:
            (folder / FILE).unlink(missing_ok=True)
            incomplete[name] = f"{len(lacking)} of {len(keys)} answers"
            continue
        names = {"generator_2": name, "annotator": annotator}
        made = [row | names for row in annotation_rows(bench, answers, baselines, rows)]
        disk.write_text(folder / FILE, json.dumps(made, indent=2, ensure_ascii=False) + "\n")
    if incomplete:
        first = next(iter(incomplete))
        more = f" and {len(incomplete) - 1} more runs" * (len(incomplete) > 1)
        print(
            f"no {FILE} of {first}{more}: alpaca_eval counts instructions by position, and "
            f"{incomplete[first]} are missing ({first})"
        )


def annotation_rows(
    bench: Bench, answers: dict, baselines: Baselines, rows: list[dict]
) -> Iterator[dict]:
    """One object for each question, in their order. rows: the run's, of judgements.csv."""
    preferences = win_rates.by_question(rows)
    of_question: dict[int, list[dict]] = defaultdict(list)
    for row in rows:
        of_question[row["question_id"]].append(row)
    for question in bench.questions:
        question_id = question["question_id"]
        yield {
            "dataset": question.get("dataset"),
            "instruction": question["turns"][0],
            "output_1": baselines.answers_to(question_id)[question_id, 0]["turns"][0],
            "generator_1": baselines.names[question_id],
            "output_2": answers[question_id, 0]["turns"][0],
            "generator_2": None,
            "annotator": None,
            "preference": preferences.get(question_id),
            "raw_completion": raw_completion(of_question[question_id]),
        }


def raw_completion(rows: list[dict]) -> dict | None:
    """A reply as the package keeps it, as far as it is known; None for none, or several."""
    if len(rows) != 1 or rows[0]["judgement"] is None:
        return None
    completion: dict = {"text": rows[0]["judgement"]}
    if top := json.loads(rows[0]["token_logprobs"] or "{}"):
        found = [{"token": token, "logprob": value} for token, value in top.items()]
        completion["logprobs"] = {"content": [{"top_logprobs": found}]}
    return completion


def annotator_of(judge: str, bench: Bench) -> str:
    """The package's name of this annotator, or one that says what was done instead."""
    if bench.label == bench.name:
        for name, model in ANNOTATORS.items():
            if model == judge:
                return name
    parts = [bench.options.get("preference", "weighted"), judge]
    if bench.label == "own":
        parts.append("own")
    return re.sub(r"[^\w.-]+", "_", "_".join(parts))
