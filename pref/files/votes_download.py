"""What judges are validated against: MT-Bench's human votes, and LLMBar.

    data/mt_bench_human/human.jsonl, gpt4_pair.jsonl   one vote or verdict per line
    data/mt_bench_human/model_answer/<model>.jsonl     the six models' answers, in FastChat's form
    data/llmbar/Natural.json, Adversarial_*.json       pairs with an objectively better answer

The votes are the hub dataset lmsys/mt_bench_human_judgments at a fixed revision, whose rows hold
the two conversations too; LLMBar is a repository at a fixed commit.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from pref.files import benchmarks, disk, fetching, sources
from pref.files.console import UserError
from pref.files.fetching import Contents, Fetched, Published

# ---- human votes ---------------------------------------------------------------------------------

HUMAN, OPTION = "mt_bench_human", "--mt_bench_human"
DATASET = "lmsys/mt_bench_human_judgments"
REVISION = "f7d2896d2cc5d80f8b55c2bbc722613555233c25"
HUMAN_LICENCE = "CC BY 4.0 (lmsys/mt_bench_human_judgments, arXiv:2306.05685)"
# SHA-256 of the files that `vote_text` makes of the dataset's splits at REVISION.
VOTES_SHA256 = {
    "human": "7ae1ff9ad4a01c30936342dd5494493da9a7fe6538265df1f4c04d44e76fa5f3",
    "gpt4_pair": "ef1d3c8d0eb9824cd9ecdd50a4d5690f0c05382148a24801128cb5facb121238",
}
# The same of the files that `answer_lines` makes of the six models' answers in FastChat's
# repository, which the dataset's conversations need not equal in every character.
ANSWERS_SHA256 = {
    "alpaca-13b": "5e356cd0b18081c86924f7f608b458f5dfd724851bc82fc10908c7882119f9b5",
    "claude-v1": "ac44343bb3d202f4498ea48dea5573e4df9bff387589a73b90a8f2f9d2893812",
    "gpt-3.5-turbo": "2254cdfedcca43dde856047360ca610cdb9fe02f4de02e8f9814d62d850bc8ad",
    "gpt-4": "a0bdb26688ea9c5335472186004d0e0345cc120821b58a169b2b44282f1ac8f7",
    "llama-13b": "e2357908fdd1af95c09659289f3112c711b2111173a6fd280d87eff4e9d9b091",
    "vicuna-13b-v1.2": "fcd7512ce05d895b5b6a639c61e45854de027ba77eaf47ecdb609e490931a6e7",
}
NEEDS = (
    "Run the same command again when the hub can be reached. On a machine without network, copy "
    f"the dataset's Parquet files (https://huggingface.co/datasets/{DATASET}/tree/{REVISION}) into "
    f"a folder DIR and give {OPTION} DIR."
)
VOTE_KEYS = ("judge", "model_a", "model_b", "question_id", "turn", "winner")
WINNERS = ("model_a", "model_b", "tie", "tie (inconsistent)")


Answers = dict[str, dict[int, list[str]]]  # by model and question: the two turns


def prepare_human(where: str, out: Path, allow_modified: bool) -> None:
    """Write the folder. where: fetching.DOWNLOAD for the hub (or its cache), or a folder: one like
    the result, or one with the dataset's Parquet files.

    Raises UserError for rows that are no votes, for two texts of one answer, and for other votes
    than the published ones unless `allow_modified`.
    """
    # 1) Votes and answers, from files like those that are written, or from the dataset's rows.
    folder = None if where == fetching.DOWNLOAD else fetching.check_folder(where, OPTION)
    source = str(folder or f"hub: {DATASET} at {REVISION}")
    as_files = folder is not None and (folder / "human.jsonl").is_file()
    if as_files:
        votes = {name: read_lines(folder / f"{name}.jsonl") for name in VOTES_SHA256}
        answers = benchmarks.first_answers(folder)
    else:
        rows = open_votes(folder)
        votes = {name: votes_of(placed) for name, placed in rows.items()}
        answers = answers_of(row for placed in rows.values() for _, row in placed)
    check_answered(votes, answers)

    # 2) Whether they are the published ones.
    files = {f"{name}.jsonl": vote_file(name, rows, source) for name, rows in votes.items()}
    files |= answer_files(answers, source, folder if as_files else None)
    refuse_modified(files, allow_modified)

    # 3) To disk.
    fetching.write_folder(out, Contents(HUMAN, files, {}, HUMAN_LICENCE, {}))
    print_next("", out, HUMAN)


def open_votes(folder: Path | None) -> dict[str, list[tuple[str, dict]]]:
    """(place, row) by split, from the hub at REVISION or from the Parquet files in `folder`."""
    if folder is None:
        try:
            loaded, _ = sources.open_hub(DATASET, REVISION, None)
        except UserError as error:
            reason = str(error).splitlines()[0].partition("; no such file")[0]
            raise UserError(f"{reason}\n{NEEDS}") from None
        splits = {name: sources.dataset_rows(DATASET, name, rows) for name, rows in loaded.items()}
    else:
        splits, _ = sources.open_folder(folder, None)
    if missing := sorted(VOTES_SHA256.keys() - splits.keys()):
        has = f"it has {', '.join(splits)}"
        raise UserError(f"{folder or DATASET}: no split {', '.join(missing)}; {has}\n{NEEDS}")
    return {name: list(splits[name]) for name in VOTES_SHA256}


def read_lines(path: Path) -> list[dict]:
    return votes_of((f"{path}:{number}", row) for number, row in disk.read_jsonl(path))


def votes_of(placed: Iterable[tuple[str, dict]]) -> list[dict]:
    """The keys of each vote, in the order of the file. Raises UserError for a row that is none."""
    votes = []
    for place, row in placed:
        vote = {key: row.get(key) for key in VOTE_KEYS}
        texts = [vote[key] for key in ("judge", "model_a", "model_b")]
        numbers = [vote[key] for key in ("question_id", "turn")]
        if not all(isinstance(text, str) and text for text in texts):
            raise UserError(f"{place}: judge, model_a and model_b must be text")
        if not all(type(number) is int for number in numbers) or vote["turn"] not in (1, 2):
            raise UserError(f"{place}: question_id must be a whole number, turn 1 or 2")
        if vote["winner"] not in WINNERS:
            raise UserError(f"{place}: winner {vote['winner']!r} is none of {', '.join(WINNERS)}")
        if vote["model_a"] == vote["model_b"]:
            raise UserError(f"{place}: {vote['model_a']} is compared with itself")
        votes.append(vote)
    order = ("question_id", "turn", "model_a", "model_b", "judge")
    return sorted(votes, key=lambda vote: [vote[key] for key in order])


def vote_file(name: str, votes: list[dict], source: str) -> Fetched:
    """The votes as bytes whose hash is known: keys sorted, no spaces."""
    content = "".join(
        json.dumps(vote, sort_keys=True, separators=(",", ":")) + "\n" for vote in votes
    ).encode()
    file = Fetched(source, content, None)
    return file._replace(official=file.sha256 == VOTES_SHA256[name])


def answer_files(answers: Answers, source: str, folder: Path | None) -> dict[str, Fetched]:
    """The files of model_answer/. folder: where they were, if they were files.

    Files without the known hash are as good if a manifest says that they were made of the dataset.
    """
    files = {}
    for model, turns in sorted(answers.items()):
        name, content = f"model_answer/{model}.jsonl", answer_lines(model, turns).encode()
        file = Fetched(source, content, None)
        if file.sha256 == ANSWERS_SHA256.get(model):
            file = file._replace(official=True)
        elif folder and fetching.recorded_sha256(name, folder) != file.sha256:
            file = file._replace(official=False)
        files[name] = file
    return files


def refuse_modified(fetched: dict[str, Fetched], allow_modified: bool) -> None:
    """Raises UserError for votes or answers that are known not to be the published ones."""
    modified = []
    for name, file in fetched.items():
        if file.official is False:
            count = f"{len(file.text.splitlines()):,} rows"
            known = (VOTES_SHA256 | ANSWERS_SHA256).get(Path(name).stem, "none")
            modified.append(
                f"{file.source}: {name} has {count}, sha256 {file.sha256}, official {known}"
            )
    if modified and not allow_modified:
        raise UserError(
            "\n".join(["not the published votes and answers:", *modified])
            + "\nGet them again, or give --allow_modified if they are meant to differ."
        )


def answers_of(rows: Iterable[dict]) -> Answers:
    """{model: {question: its two turns}} from the conversations in the votes' rows.

    Raises UserError for a row without them, and for an answer that two rows give differently.
    """
    answers: Answers = {}
    for row in rows:
        for side in ("a", "b"):
            model, question = row[f"model_{side}"], row["question_id"]
            place = f"{DATASET}: question {question}, {model}"
            try:
                messages = list(row[f"conversation_{side}"])
                turns = [m["content"] for m in messages if m["role"] == "assistant"]
            except (KeyError, TypeError):
                raise UserError(f"{place}: no conversation_{side} of messages") from None
            if len(turns) != 2 or not all(isinstance(turn, str) for turn in turns):
                raise UserError(f"{place}: a conversation needs two answers")
            if answers.setdefault(model, {}).setdefault(question, turns) != turns:
                raise UserError(f"{place}: two votes show different answers")
    return answers


def check_answered(votes: dict[str, list[dict]], answers: Answers) -> None:
    """Raises UserError if an answer that was voted on is not there."""
    for vote in (vote for rows in votes.values() for vote in rows):
        for model in (vote["model_a"], vote["model_b"]):
            if vote["question_id"] not in answers.get(model, {}):
                raise UserError(
                    f"a vote is about the answer of {model} to question {vote['question_id']}, "
                    "and that is not there"
                )


def answer_lines(model: str, turns: dict[int, list[str]]) -> str:
    """The content of model_answer/<model>.jsonl."""
    return "".join(
        disk.jsonl_line(
            {
                "question_id": question,
                "model_id": model,
                "choices": [{"index": 0, "turns": texts}],
            }
        )
        for question, texts in sorted(turns.items())
    )


# ---- LLMBar --------------------------------------------------------------------------------------

LLMBAR = "llmbar"
LLMBAR_LICENCE = "MIT (princeton-nlp/LLMBar)"
LLMBAR_COMMIT = "900616bff90b6c6c8e1681f7d079250637c55992"
LLMBAR_SHA256 = {
    "Natural": "f7127b7aa78104cb8e03a2b1b3ac0077e95b125714dd441a8ee63666145a3375",
    "Adversarial_GPTInst": "1002425f73c2cf54b6e6de99bce3f6c60fa2a17d13194772e37d7481c1351d42",
    "Adversarial_GPTOut": "1ff56e520d7607750a9866a3be0f5b850392ca4477a1f69d80f32bd3e310f561",
    "Adversarial_Manual": "0d9598769a39cdbbd265778c37e49939d41d5f76dcfb17bd75dcfa07516d3837",
    "Adversarial_Neighbor": "6712c7eda6342602e0bc7c06c282fa95e2110d4e741a284026a62d937f9780a0",
}


def llmbar_files() -> list[Published]:
    files = []
    for name, sha256 in LLMBAR_SHA256.items():
        path = f"Dataset/LLMBar/{name.replace('_', '/')}/dataset.json"
        url = f"https://raw.githubusercontent.com/princeton-nlp/LLMBar/{LLMBAR_COMMIT}/{path}"
        files.append(Published(f"{name}.json", url, sha256, local=(path,)))
    return files


def prepare_llmbar(where: str, out: Path, allow_modified: bool) -> None:
    """Write the folder. where: fetching.DOWNLOAD or a folder with the published files.

    Raises UserError for a missing file, and for one that is not the official one unless
    `allow_modified`.
    """
    files = fetching.fetch(llmbar_files(), where, out, f"--{LLMBAR}", allow_modified)
    for file in files.values():
        check_llmbar(file)
    fetching.write_folder(out, Contents(LLMBAR, files, {}, LLMBAR_LICENCE, {}))
    print_next(f" {LLMBAR}", out, LLMBAR)


def print_next(what: str, out: Path, name: str) -> None:
    """The command that measures a judge on these data. what: the value of --validate."""
    more = "" if out == Path("data") / name else f" --bench_data {out}"
    print(f"next: python judge.py results/ --validate{what}{more} --judge MODEL")


def check_llmbar(file: Fetched) -> None:
    """Raises UserError unless the file is a list of pairs with the number of the better output."""
    rows = fetching.read_json(file)
    if not isinstance(rows, list):
        raise UserError(f"{file.source}: expected a JSON list")
    for number, row in enumerate(rows, 1):
        place = f"{file.source}: entry {number}"
        disk.as_object(row, place)
        for key in ("input", "output_1", "output_2"):
            if not isinstance(row.get(key), str):
                raise UserError(f"{place}: {key!r} must be text, not {row.get(key)!r}")
        if row.get("label") not in (1, 2):
            raise UserError(f"{place}: 'label' must be 1 or 2, not {row.get('label')!r}")
