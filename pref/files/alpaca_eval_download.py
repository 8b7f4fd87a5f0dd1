"""AlpacaEval 2's files into data/alpaca_eval/ (prep_data.py --alpaca_eval).

    questions.json           the 805 instructions, in the package's order
    baseline/answers.jsonl   the answers of gpt4_1106_preview
    judge_prompt.txt         the prompt of alpaca_eval_clf_gpt4_turbo
    df_gamed.csv             what length control is regularised with; may be missing
    published/               the baseline's file as it is published

The data are CC BY-NC 4.0, so they are fetched to the user's machine and are not part of the
toolkit. Commit and revision are fixed.
"""

import csv
import io
import json
from pathlib import Path

from pref.files import benchmarks, disk, fetching
from pref.files.console import UserError
from pref.files.fetching import Contents, Fetched, Published

BENCH = "alpaca_eval"
BASELINE = "gpt4_1106_preview"
LICENCE = "CC BY-NC 4.0 (tatsu-lab/alpaca_eval): no commercial use"
COMMIT = "cd543a149df89434d8a54582c0151c0b945c3d20"
REVISION = "2edc6fad8be6b14ea7230aabfd08188da6b8b814"  # of the hub dataset
GITHUB = f"https://raw.githubusercontent.com/tatsu-lab/alpaca_eval/{COMMIT}"
HUB = f"https://huggingface.co/datasets/tatsu-lab/alpaca_eval/resolve/{REVISION}"
GAMED_SHA256 = "97aeec3f1c7de6dee6fd31fe66f1702623f4614c3efe1c6fc5f4927cd5fd674d"
OUTPUTS, PROMPT, GAMED = "published/model_outputs.json", "judge_prompt.txt", "df_gamed.csv"
FILES = [
    Published(
        OUTPUTS,
        f"{GITHUB}/results/{BASELINE}/model_outputs.json",
        "83db546b872ddebee8965fd05fa48461ee3c32bc695c62fb57f2d214ff741ec4",
        local=("alpaca_eval_gpt4_baseline.json", f"results/{BASELINE}/model_outputs.json"),
    ),
    Published(
        PROMPT,
        f"{GITHUB}/src/alpaca_eval/evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt",
        "784227e6dc2832fc08c43d2c8ea3a308e7523780187a1aaad2f85e30bac85f62",
        local=(
            "alpaca_eval_clf.txt",
            "src/alpaca_eval/evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt",
        ),
    ),
    Published(
        GAMED,
        f"{HUB}/{GAMED}",
        GAMED_SHA256,
        without="Without it there is no length-controlled win rate as published: analyze.py gives "
        "lc_unregularised, fitted on the run's own judgements alone, which is another number. The "
        "win rate is not affected.",
    ),
]
START, END = "<|im_start|>", "<|im_end|>"  # what the prompt's messages begin and end with
GAMED_COLUMNS = ("preference", "index", "std_delta_len", "instruction_difficulty")
# The package's own settings of most open models. Nothing in the benchmark fixes them.
GENERATION = {"temperature": 0.7, "max_new_tokens": 2048}


def prepare(where: str, out: Path, allow_modified: bool) -> None:
    """Write the folder. where: fetching.DOWNLOAD or a folder with the published files.

    Raises UserError for a missing file, and for one that is not the official one unless
    `allow_modified`.
    """
    fetched = fetching.fetch(FILES, where, out, "--alpaca_eval", allow_modified)
    rows = read_outputs(fetched[OUTPUTS])
    check_prompt(fetched[PROMPT])
    if GAMED in fetched:
        check_gamed(fetched[GAMED])
    else:
        (out / GAMED).unlink(missing_ok=True)  # of an earlier call, and another file
    questions = [{"instruction": row["instruction"], "dataset": row["dataset"]} for row in rows]
    answers = [
        {
            "question_id": number,
            "model_id": row["generator"],
            "choices": [{"index": 0, "turns": [row["output"]]}],
            "dataset": row["dataset"],
        }
        for number, row in enumerate(rows, 1)
    ]
    made = {
        "questions.json": json.dumps(questions, indent=1, ensure_ascii=False) + "\n",
        "baseline/answers.jsonl": "".join(map(disk.jsonl_line, answers)),
    }
    about = {"questions": "questions.json", "generation": GENERATION}
    fetching.write_folder(out, Contents(BENCH, fetched, made, LICENCE, about))
    more = "" if out == benchmarks.DATA / BENCH else f" --bench_data {out}"
    print(f"next: python gen_mtbench.py results/ --base --bench {BENCH}{more}")


def read_outputs(file: Fetched) -> list[dict]:
    """The baseline's rows: instruction, output, dataset, generator. Raises UserError with the
    number of a row that is none, or whose instruction is an earlier one's.
    """
    rows = fetching.read_json(file)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{file.source}: expected a JSON list of outputs")
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        place = f"{file.source}: entry {number}"
        disk.as_object(row, place)
        for key in ("instruction", "output", "dataset", "generator"):
            if not isinstance(row.get(key), str) or not (row[key].strip() or key == "output"):
                raise UserError(f"{place}: {key!r} must be text, not {row.get(key)!r}")
        if row["generator"] != rows[0]["generator"]:
            raise UserError(f"{place}: of {row['generator']}, not of {rows[0]['generator']}")
        if (first := seen.setdefault(row["instruction"], number)) != number:
            raise UserError(f"{place}: the same instruction as entry {first}")
    return rows


def check_prompt(file: Fetched) -> None:
    """Raises UserError for a prompt that lacks a part."""
    for part in ("{instruction}", "{output_1}", "{output_2}", START, END):
        if part not in file.text:
            raise UserError(f"{file.source}: not a judge prompt of AlpacaEval: it has no {part}")


def check_gamed(file: Fetched) -> None:
    """Raises UserError unless it is a CSV file with the columns that length control reads."""
    rows = csv.DictReader(io.StringIO(file.text))
    if missing := sorted({*GAMED_COLUMNS} - {*(rows.fieldnames or ())}):
        raise UserError(f"{file.source}: no column {', '.join(missing)}")
