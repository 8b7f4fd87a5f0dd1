"""The files between the stages: reading, checking, and writing them so that they are never torn.

Shared by every stage, because a row that two stages understand differently is a wrong number:
pairs (`data/<name>/*.jsonl`), run directories (`results/<run_id>/`), the MT-Bench files,
answers (FastChat's schema) and judgement rows. Formats are described in README.md, "Files".
"""

import csv
import fcntl
import hashlib
import io
import json
import logging
import math
import os
import re
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

# What libraries say about themselves, not about the user's work: bitsandbytes on CPU misses a kernel package that this
# toolkit does not use; PEFT 0.21 calls an attribute that transformers has renamed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

BASE_RUN = "base"  # run id of the untrained model

MT_BENCH_FILES = {
    "question.jsonl": "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    "reference_answer/gpt-4.jsonl": "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
    "judge_prompts.jsonl": "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
}
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
# GPT-4 reference answers known to be wrong: FastChat PR 3158, and 107 and 127 (turn 2) checked by hand.
WRONG_REFERENCES = frozenset((104, 105, 107, 109, 111, 113, 114, 120, 122, 124, 125, 126, 127, 128, 130))
SMOKE_TEST_BELOW_B = 7.0  # judges with fewer billions of parameters test the path, they measure nothing

JUDGEMENT_COLUMNS = (
    "question_id", "turn", "category", "model_id", "choice", "grading", "order", "baseline", "judge",
    "judge_params_b", "prompts", "repeat", "refs", "score", "winner", "status", "judgement", "request_sha256",
    "answer_sha256", "served_model", "system_fingerprint", "prompt_tokens", "completion_tokens", "cost_usd", "tstamp",
)  # fmt: skip


class UserError(Exception):
    """A mistake of the user's that the program can name: place, fact, remedy. Printed without a traceback."""


def run_main(main: Callable[[], int | None]) -> None:
    """Run a stage's `main`. Exit codes: 0 done, 1 incomplete, 2 user's mistake (one line on stderr), 130 Ctrl-C."""
    try:
        code = main() or 0
    except UserError as error:
        if (rank := os.environ.get("RANK", "0")) != "0":
            # Under torchrun most mistakes meet every rank. Rank 0 says so and torchrun ends the others meanwhile; what
            # only this rank has met is said all the same.
            time.sleep(5)
        print(f"error{f' (rank {rank})' if rank != '0' else ''}: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # the reader (`| head`) went away: not a mistake
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:  # no permission, disk full, a file where a folder should be: the message names the path
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        code = 130
    sys.exit(code)


# ---- one process at a time ----------------------------------------------------------------------


@contextmanager
def locked(folder: Path, name: str, what: str) -> Iterator[None]:
    """Hold the lock file `name` in `folder`. The lock is the kernel's and dies with its process, however that dies; the
    file only says whose it is. Raises UserError, saying `what` is being done, if another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: {what} by {lock_holder(file)}; wait for it, or stop it first") from None
        except OSError as error:  # some cluster file systems are mounted without locks
            print(
                f"warning: {folder}: no locks on this file system ({error.strerror}); never start this twice at a time"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield


def lock_holder(file) -> str:
    file.seek(0)
    return file.read().strip() or "another process"


# ---- reading and writing ------------------------------------------------------------------------


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield (line number from 1, object) of a JSONL file; blank lines are passed over.

    Raises UserError with file and line for a missing file, bad UTF-8, bad JSON or a line that is no object.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start})") from None
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}:{number}: not valid JSON: {error.msg} (column {error.colno})") from None
                if not isinstance(row, dict):
                    raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
                yield number, row
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, expected a JSONL file") from None


def read_json_value(path: Path):
    """The JSON value in `path`, of any kind. Raises UserError if the file is missing or torn."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises UserError if it is missing, torn or no object."""
    value = read_json_value(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_text(path: Path, text: str) -> None:
    """Write beside, flush to disk, rename: a reader sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: dict) -> None:
    """Write `value` as indented JSON. NaN and inf become null: JSON has neither, and readers choke on them."""
    write_text(path, json.dumps(finite_or_null(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    write_text(path, "".join(jsonl_line(row) for row in rows))


def jsonl_line(row: dict) -> str:
    return json.dumps(finite_or_null(row), ensure_ascii=False, allow_nan=False) + "\n"


def finite_or_null(value):
    """`value` with every non-finite float replaced by None, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return value


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value) -> str:
    """Hash of a JSON value that does not depend on key order or spacing."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of what can change a number, and the git commit of this toolkit ('+' = uncommitted changes)."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("torch", "transformers", "peft", "bitsandbytes", "datasets", "numpy", "scipy", "openai"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return found
    if commit.returncode == 0:
        found["git"] = commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")
    return found


# ---- pairs --------------------------------------------------------------------------------------


def check_pair(row: dict) -> str | None:
    """Why `row` is no usable preference pair, or None. The reasons are prep_data.py's drop reasons."""
    for key in ("prompt", "chosen", "rejected"):
        messages = row.get(key)
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        ):
            return f"{key} is not a list of messages"
    for key in ("chosen", "rejected"):
        if [m["role"] for m in row[key]] != ["assistant"]:
            return "last message not the assistant's"
        if not row[key][0]["content"].strip():
            return f"empty {key}"
    roles = [m["role"] for m in row["prompt"] if m["role"] != "system"]
    if any(m["role"] == "system" for m in row["prompt"][1:]) or roles != ["user", "assistant"] * (len(roles) // 2) + [
        "user"
    ]:
        return "roles do not alternate"
    if not any(m["content"].strip() for m in row["prompt"] if m["role"] == "user"):
        return "empty prompt"
    if row["chosen"][0]["content"].strip() == row["rejected"][0]["content"].strip():
        return "chosen == rejected"
    return None


def read_pairs(path: Path, limit: int | None = None) -> list[dict]:
    """Pairs of one split, checked. Raises UserError with file, line and remedy for the first bad one."""
    pairs = []
    for number, row in read_jsonl(path):
        if not isinstance(row.get("id"), str):
            raise UserError(f"{path}:{number}: no 'id'; rerun prep_data.py")
        if reason := check_pair(row):
            raise UserError(f"{path}:{number}: {reason}; rerun prep_data.py")
        pairs.append(row)
        if limit and len(pairs) == limit:
            break
    if not pairs:
        raise UserError(f"{path}: no pairs; rerun prep_data.py and see dropped.jsonl beside it")
    return pairs


# ---- runs ---------------------------------------------------------------------------------------


def check_run_id(run_id: str, path: Path | None = None) -> str:
    """Return `run_id` if it is a plain folder name that cannot leave its results folder, else raise UserError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}", run_id) or ".." in run_id:
        place = f"{path}: " if path else ""
        raise UserError(f"{place}run id {run_id!r}: use letters, digits and . _ + - only (at most 128, no '..')")
    return run_id


def find_runs(paths: Iterable[Path], check: bool = True) -> list[Path]:
    """Run directories among `paths`: each is one itself (it has args.json) or is a results folder full of them.

    Order: the base model first, then by run id. Raises UserError if nothing is found, and with `check` for a folder
    whose name is no run id.
    """
    runs: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"{path}: no such folder")
        found = [path] if (path / "args.json").is_file() else sorted(p.parent for p in path.glob("*/args.json"))
        if not found:
            raise UserError(f"{path}: no runs here (a run is a folder with args.json); train one with train_pref.py")
        runs.update(dict.fromkeys(found))
    for run in runs if check else ():
        check_run_id(run.resolve().name)
    return sorted(runs, key=lambda run: (run.resolve().name != BASE_RUN, run.resolve().name))


# ---- MT-Bench: questions, references, answers ---------------------------------------------------


def read_questions(path: Path, mt_bench: bool = True) -> list[dict]:
    """Questions: `question_id` int, `category` str, `turns` list of two str. Checked, in file order.

    mt_bench False: any category or none, any number of turns.
    """
    questions, seen = [], set()
    if mt_bench and not path.is_file():
        raise UserError(f"{path}: no such file; run python prep_data.py --mt_bench, or give its folder with --mt_bench")
    for number, row in read_jsonl(path):
        place = f"{path}:{number}"
        if not isinstance(row.get("question_id"), int) or row["question_id"] < 0:
            raise UserError(f"{place}: 'question_id' must be a whole number")
        if row["question_id"] in seen:
            raise UserError(f"{place}: question_id {row['question_id']} appears twice")
        if mt_bench and row.get("category") not in CATEGORIES:
            raise UserError(f"{place}: unknown category {row.get('category')!r}; known: {', '.join(CATEGORIES)}")
        turns = row.get("turns")
        whole = isinstance(turns, list) and turns and all(isinstance(t, str) and t.strip() for t in turns)
        if not whole or (mt_bench and len(turns) != 2):
            raise UserError(f"{place}: 'turns' must be {'two' if mt_bench else 'a list of'} non-empty strings")
        seen.add(row["question_id"])
        questions.append(row)
    if not questions:
        raise UserError(f"{path}: no questions" + ("; run prep_data.py --mt_bench" if mt_bench else ""))
    return questions


def pick_questions(questions: list[dict], count: int | None) -> list[dict]:
    """`count` questions spread evenly over the file, hence over MT-Bench's categories; all of them for None."""
    if count is None or count >= len(questions):
        return questions
    if count < 1:
        raise UserError(f"--num_questions {count}: must be at least 1")
    return [questions[i * len(questions) // count] for i in range(count)]


def read_answers(path: Path) -> dict[tuple[int, int], dict]:
    """Answers of one run by (question_id, choice index): the row of answers.jsonl, its `turns` two strings.

    Raises UserError with file and line for a row of another form or an answer that stands twice.
    """
    answers: dict[tuple[int, int], dict] = {}
    for number, row in read_jsonl(path):
        try:
            for choice in row["choices"]:
                key = (int(row["question_id"]), int(choice["index"]))
                if len(choice["turns"]) != 2 or not all(isinstance(t, str) for t in choice["turns"]):
                    raise UserError(f"{path}:{number}: a choice needs two turns of text")
                if key in answers:
                    raise UserError(f"{path}:{number}: question {key[0]}, choice {key[1]} is answered twice")
                answers[key] = {**row, "turns": choice["turns"], "choice": choice["index"]}
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{path}:{number}: not an answer row (question_id, choices: [{{index, turns}}]); delete the file and "
                "rerun the stage that wrote it (gen_mtbench.py for answers, prep_data.py for references)"
            ) from None
    return answers


# ---- judgements ---------------------------------------------------------------------------------


def write_judgements(path: Path, rows: Iterable[dict]) -> None:
    """Write judgements.csv: JUDGEMENT_COLUMNS, empty where a value is None."""
    buffer = io.StringIO()
    # All text quoted: a lone \r in a judgement would otherwise end the row when it is read back.
    writer = csv.DictWriter(buffer, JUDGEMENT_COLUMNS, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    for row in rows:
        writer.writerow({key: "" if row.get(key) is None else row[key] for key in JUDGEMENT_COLUMNS})
    write_text(path, buffer.getvalue())


def read_judgements(path: Path) -> list[dict]:
    """Rows of judgements.csv with numbers as numbers and empty fields as None. Raises UserError with file and line."""
    rows = []
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a judge may write
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [c for c in JUDGEMENT_COLUMNS if c not in (reader.fieldnames or [])]
            if missing:
                raise UserError(f"{path}: missing columns {', '.join(missing)}; rerun judge.py to write it again")
            for row in reader:
                rows.append(_typed_judgement(row, f"{path}:{reader.line_num}"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a UTF-8 CSV file: {error}") from None
    return rows


def _typed_judgement(row: dict, place: str) -> dict:
    if None in row or None in row.values():
        raise UserError(f"{place}: wrong number of fields (a torn line?); rerun judge.py to write the file again")
    typed = {key: value if value != "" else None for key, value in row.items()}
    try:
        for key in ("question_id", "turn", "choice", "repeat", "prompt_tokens", "completion_tokens"):
            typed[key] = int(typed[key]) if typed[key] is not None else None
        for key in ("score", "judge_params_b", "cost_usd", "tstamp"):
            typed[key] = float(typed[key]) if typed[key] is not None else None
    except ValueError as error:
        raise UserError(f"{place}: {error}; rerun judge.py to write the file again") from None
    if typed["status"] == "ok" and typed["grading"] == "single":
        if typed["score"] is None or not 1 <= typed["score"] <= 10:
            raise UserError(f"{place}: status ok but score {typed['score']} is not a rating from 1 to 10")
    return typed


def params_from_name(model: str) -> float | None:
    """Billions of parameters as a model's name states them ('Qwen-72B' 72, 'SmolLM2-135M' 0.135, '8x7B' 56)."""
    sizes = re.findall(r"(?<![a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", model.lower())
    found = [int(times or 1) * float(size) / (1 if unit == "b" else 1000) for times, size, unit in sizes]
    return max(found) if found else None
