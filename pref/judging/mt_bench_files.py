"""MT-Bench's reference answers and judge prompts, read from their files and checked."""

from pathlib import Path

from pref.files import benchmarks, console, disk, mt_bench
from pref.files.console import UserError

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
        fields = benchmarks.fields_of(row["prompt_template"])
    except ValueError as error:
        raise UserError(
            f"{place}: prompt_template: {error}; write literal braces as {{{{ and }}}}"
        ) from None
    if fields != (expected := PROMPT_FIELDS[grading][name]):
        listed = ", ".join(f"{{{field}}}" for field in sorted(expected))
        raise UserError(
            f"{place}: prompt_template of {name} must contain exactly the fields {listed}"
        )


def check_folder(folder: Path) -> None:
    """Raise UserError for the data folder of another benchmark. MT-Bench's may lack a manifest."""
    path, how = folder / "manifest.json", benchmarks.how_to_make(benchmarks.MT_BENCH)
    if not path.is_file():
        return
    with console.remedy(how):
        found = disk.read_json(path).get("bench", benchmarks.MT_BENCH)
    if found != benchmarks.MT_BENCH:
        raise UserError(
            f"{folder}: holds the data of benchmark {found}, not of {benchmarks.MT_BENCH}; {how}"
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
