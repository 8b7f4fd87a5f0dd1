"""Arena-Hard-Auto's files into data/arena_hard_<version>/ (prep_data.py --arena_hard VERSION).

    question.jsonl           question_id (1, 2 ... in file order), uid, category, cluster or
                             subcategory, turns
    baseline/<model>.jsonl   the answers that runs are compared with
    judge_settings.json      settings (baseline and system prompt by category), prompt_template
    published/               the files as they are published

Commit and licence (Apache-2.0) are fixed. The judge's prompts are published as Python and YAML:
they are parsed as literals, and nothing of them is executed.
"""

import ast
import json
import re
from pathlib import Path
from typing import NamedTuple

from pref.files import benchmarks, disk, fetching, mt_bench
from pref.files.console import UserError
from pref.files.fetching import Contents, Fetched, Published

COMMIT = "196f6b826783b3da7310e361a805fa36f0be83f3"
GITHUB = f"https://raw.githubusercontent.com/lmarena/arena-hard-auto/{COMMIT}"
LICENCE = "Apache-2.0 (lmarena/arena-hard-auto)"
QUESTIONS, SETTINGS = "published/question.jsonl", "judge_settings.json"
FIELDS = {"QUESTION", "ANSWER_A", "ANSWER_B"}  # of the judge's prompt
# Of the settings below, of both versions, as `disk.sha256_json` counts it.
SETTINGS_SHA256 = "e18c709166415078b99f92481b1ef9b5dd0943dcfa71dbc5c43a80162a566aea"
# Upstream's setting of its own answers, config/gen_answer_config.yaml.
GENERATION = {"temperature": 0.0, "max_new_tokens": 4096}


class Version(NamedTuple):
    """What differs between the versions of the benchmark."""

    questions_sha256: str
    baselines: dict[str, str | None]  # model -> SHA-256 of its answers; None: not known
    without: dict[str, str]  # model that can be done without -> what follows


VERSIONS = {
    "v0.1": Version(
        questions_sha256="2650242d2883f22b2abd498f273b6a7e02253cce533f5c91a858e1d44aa3002f",
        baselines={
            "gpt-4-0314": "0f6abc84de4600fde987d9db70f838f4ecdbd27a2f1f4058c12aa322a6f791b2"
        },
        without={},
    ),
    "v2.0": Version(
        questions_sha256="a75cef6623db6b27aec810497b059f0659705d7ff48dcbccc5bd5b130728ac73",
        baselines={
            "o3-mini-2025-01-31": (
                "c23a7c255eead99f7f86ad48aa1d8ccdb5b3334f2097e0e1e09184df87265e03"
            ),
            "gemini-2.0-flash-001": None,
        },
        without={
            "gemini-2.0-flash-001": "Without it the category creative_writing cannot be judged "
            "against its published baseline; hard_prompt can, and any run can be the baseline "
            "(--baseline RUN)."
        },
    ),
}


def published(version: str) -> list[Published]:
    """The files of questions and answers of a version."""
    bench, about = f"arena-hard-{version}", VERSIONS[version]
    folder = f"data/{bench}"

    def file(name: str, path: str, sha256: str | None, without: str = "") -> Published:
        local = (f"{version}/{Path(name).name}", f"{folder}/{path}", path)
        return Published(name, f"{GITHUB}/{folder}/{path}", sha256, local, without)

    answers = [
        file(
            answers_file(model), f"model_answer/{model}.jsonl", sha256, about.without.get(model, "")
        )
        for model, sha256 in about.baselines.items()
    ]
    return [file(QUESTIONS, "question.jsonl", about.questions_sha256), *answers]


def answers_file(model: str) -> str:
    return f"published/{model}.jsonl"


def prepare(version: str, where: str, out: Path, allow_modified: bool) -> None:
    """Write the folder of a version ("v0.1" or "v2.0"). where: fetching.DOWNLOAD or a folder with
    the published files.

    Raises UserError for a missing file, and for one that is not the official one unless
    `allow_modified`.
    """
    bench = f"arena_hard_{version}"
    offline = fetching.listed(prompt_files(version))
    option = f"--arena_hard {version}"
    fetched = fetching.fetch(published(version), where, out, option, allow_modified, offline)
    fetched[SETTINGS] = fetch_settings(version, where, out, allow_modified)
    questions = make_questions(fetched[QUESTIONS])
    check_categories(questions, fetched[SETTINGS])
    ids = {question["uid"]: question for question in questions}
    made = {"question.jsonl": "".join(map(disk.jsonl_line, questions))}
    for model in VERSIONS[version].baselines:
        if file := fetched.get(answers_file(model)):
            rows = make_answers(file, model, ids)
            made[f"baseline/{model}.jsonl"] = "".join(map(disk.jsonl_line, rows))
        else:
            (out / f"baseline/{model}.jsonl").unlink(missing_ok=True)  # of an earlier call
    about = {"questions": "question.jsonl", "generation": GENERATION}
    fetching.write_folder(out, Contents(bench, fetched, made, LICENCE, about))
    more = "" if out == benchmarks.DATA / bench else f" --bench_data {out}"
    print(f"next: python gen_mtbench.py results/ --base --bench {bench}{more}")


# ---- the judge's prompts -------------------------------------------------------------------------


def fetch_settings(version: str, where: str, out: Path, allow_modified: bool) -> Fetched:
    """judge_settings.json, from the data folder, a local folder, or upstream's code and its
    configuration. Raises UserError as `prepare` does.
    """
    # 1) Where it is there as JSON.
    folder = None if where == fetching.DOWNLOAD else Path(where).expanduser()
    ready = [folder / name for name in (SETTINGS, f"../{SETTINGS}")] if folder else []
    found = next((path for path in [*ready, out / SETTINGS] if path.is_file()), None)
    if found is not None:
        file = Fetched(str(found), found.read_bytes(), None)
        content = check_settings(disk.as_object(fetching.read_json(file), file.source), file.source)
        if is_official(content) or found != out / SETTINGS:
            return accepted(file._replace(official=is_official(content)), allow_modified)

    # 2) Else from upstream's files.
    wanted = prompt_files(version)
    try:
        files = [
            fetching.from_folder(file, folder, out) if folder else fetching.from_web(file, out)
            for file in wanted
        ]
    except fetching.Missing as missing:
        help_text = fetching.remedy(wanted, folder, f"--arena_hard {version}")
        raise UserError(f"{missing}{help_text}") from None
    content = {"settings": read_code(files[0]), "prompt_template": read_config(files[1])}
    check_settings(content, files[0].source)
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    made = Fetched(files[0].source, text.encode(), is_official(content))
    return accepted(made, allow_modified)


def prompt_files(version: str) -> list[Published]:
    """Upstream's files that hold the judge's prompts."""
    paths = ("utils/judge_utils.py", f"config/arena-hard-{version}.yaml")
    return [Published(Path(path).name, f"{GITHUB}/{path}", None, local=(path,)) for path in paths]


def is_official(content: dict) -> bool:
    known = {key: content[key] for key in ("settings", "prompt_template")}
    return disk.sha256_json(known) == SETTINGS_SHA256


def accepted(file: Fetched, allow_modified: bool) -> Fetched:
    if file.official is False and not allow_modified:
        raise UserError(
            f"{file.source}: not the official judge prompts of Arena-Hard; get them again, or give "
            '--allow_modified if they are meant to differ: scores are then labelled "own"'
        )
    return file


def check_settings(content: dict, source: str) -> dict:
    """`content` if it has the form of judge_settings.json. Raises UserError."""
    settings, template = content.get("settings"), content.get("prompt_template")
    is_text = isinstance(settings, dict) and all(
        isinstance(one, dict)
        and all(isinstance(one.get(key), str) for key in ("baseline", "system_prompt"))
        for one in settings.values()
    )
    if not is_text or not settings:
        raise UserError(
            f"{source}: 'settings' must have 'baseline' and 'system_prompt' per category"
        )
    try:
        fields = benchmarks.fields_of(template)
    except (TypeError, ValueError):
        fields = set()
    if fields != FIELDS:
        listed = ", ".join(f"{{{field}}}" for field in sorted(FIELDS))
        raise UserError(
            f"{source}: 'prompt_template' must have exactly the fields {listed}, and literal "
            "braces written as {{ and }}"
        )
    return content


def read_code(file: Fetched) -> dict:
    """JUDGE_SETTINGS of upstream's judge_utils.py: a dictionary of literals and of names that were
    assigned one above. The code is parsed, never executed. Raises UserError for another form.
    """
    known: dict[str, object] = {}

    def value(node: ast.expr):
        if isinstance(node, ast.Name) and node.id in known:
            return known[node.id]
        if isinstance(node, ast.Dict):
            return {value(key): value(item) for key, item in zip(node.keys, node.values)}
        return ast.literal_eval(node)

    try:
        for statement in ast.parse(file.text).body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                try:
                    known[statement.targets[0].id] = value(statement.value)
                except ValueError:  # not a literal: not what is looked for
                    continue
        return disk.as_object(known["JUDGE_SETTINGS"], "JUDGE_SETTINGS")
    except (SyntaxError, KeyError, RecursionError):
        raise UserError(f"{file.source}: no JUDGE_SETTINGS that can be read") from None


def read_config(file: Fetched) -> str:
    """prompt_template of upstream's YAML: one line, quoted as JSON quotes it. Raises UserError."""
    found = re.search(r'^prompt_template:\s*(".*")\s*$', file.text, re.MULTILINE)
    try:
        return json.loads(found[1])
    except (TypeError, ValueError):  # TypeError: not found
        raise UserError(f"{file.source}: no prompt_template on one line") from None


# ---- questions and answers -----------------------------------------------------------------------


def rows_of(file: Fetched) -> list[tuple[str, dict]]:
    """(place, object) per line. Raises UserError for a line that is none."""
    lines = enumerate(file.content.splitlines(), 1)
    places = ((f"{file.source}:{number}", line) for number, line in lines if line.strip())
    return [(place, disk.parse_object(line, place)) for place, line in places]


def make_questions(file: Fetched) -> list[dict]:
    """Rows of question.jsonl. Raises UserError for a row without uid or prompt, or with the uid of
    an earlier one.
    """
    questions, uids = [], set()
    for number, (place, row) in enumerate(rows_of(file), 1):
        mt_bench.check_uid(row.get("uid"), uids, place)
        for key in ("category", "prompt"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise UserError(f"{place}: {key!r} must be non-empty text, not {row.get(key)!r}")
        kept = ("uid", "category", "subcategory", "cluster")
        known = {key: row[key] for key in kept if key in row}
        questions.append({"question_id": number, **known, "turns": [row["prompt"]]})
    if not questions:
        raise UserError(f"{file.source}: no questions")
    return questions


def check_categories(questions: list[dict], settings: Fetched) -> None:
    """Raises UserError for a category that the judge's settings lack."""
    known = fetching.read_json(settings)["settings"]
    for question in questions:
        if question["category"] not in known:
            raise UserError(
                f"question {question['uid']} has category {question['category']!r}; "
                f"{settings.source} has {', '.join(known)}"
            )


def make_answers(file: Fetched, model: str, questions: dict[str, dict]) -> list[dict]:
    """Rows as in a run's answers.jsonl, of all `questions` (by uid), in their order.

    Raises UserError for a row of another form or another model, and for a question that has no
    answer or two.
    """
    rows: dict[str, dict] = {}
    for place, row in rows_of(file):
        try:
            uid, answer = row["uid"], row["messages"][-1]["content"]
            text = answer["answer"] if isinstance(answer, dict) else answer
            if not isinstance(text, str) or row["messages"][-1]["role"] != "assistant":
                raise ValueError("no text")
        except (KeyError, TypeError, IndexError, ValueError):
            raise UserError(f"{place}: not an answer (uid, model, messages)") from None
        if row.get("model") != model:
            raise UserError(f"{place}: an answer of {row.get('model')}, not of {model}")
        if uid not in questions or uid in rows:
            what = "is answered twice" if uid in rows else "is no question"
            raise UserError(f"{place}: uid {uid} {what}")
        rows[uid] = {
            "question_id": questions[uid]["question_id"],
            "model_id": model,
            "choices": [{"index": 0, "turns": [text]}],
            "tstamp": row.get("tstamp"),
            "category": questions[uid]["category"],
            "uid": uid,
        }
    if missing := questions.keys() - rows.keys():
        first = min(missing, key=lambda uid: questions[uid]["question_id"])
        raise UserError(
            f"{file.source}: {len(missing)} questions have no answer (uid {first} first)"
        )
    return [rows[uid] for uid in questions]
