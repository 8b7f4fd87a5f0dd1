"""The arguments of analyze.py, checked."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from pref.analysis import stats
from pref.files import console, run_folders
from pref.files.console import UserError


def parse_args(argv: list[str] | None, description: str) -> argparse.Namespace:
    """Raises UserError for values that make no analysis."""
    args = make_parser(description).parse_args(argv)
    args.run_ids = parse_run_ids(args.run_ids) if args.run_ids else None
    if args.draws < 200:
        raise UserError(f"--draws {args.draws}: a 95 % interval needs at least 200")
    if args.baseline == args.proposed:
        raise UserError(f"--baseline and --proposed are both {args.baseline}: name two losses")
    return args


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=console.HelpFormatter)
    add = parser.add_argument
    add("results_dir", type=Path, help="results folder: a folder of run folders")
    add("--run_ids", nargs="+", metavar="RUN", help="the runs to use (default: all)")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for report, tables and figures (default: RESULTS_DIR/comparison)",
    )
    add("--baseline", default="dpo", help="loss that differences are measured from (default: dpo)")
    add(
        "--proposed",
        default="td_dpo",
        help="loss whose improvement --verbose prints (default: td_dpo)",
    )
    add_files(add)
    add(
        "--draws",
        type=int,
        default=stats.DRAWS,
        help="draws for the interval of a ratio of variances over beta (default: %(default)s)",
    )
    add(
        "--verbose",
        action="store_true",
        help="print the tables, claims, notes and names of files too, which are in the report",
    )
    add("--skip_bad", action="store_true", help="leave out runs whose files cannot be read")
    return parser


def add_files(add: Callable) -> None:
    """The files that are read besides the runs."""
    add(
        "--claims", type=Path, help="JSON file of claims (default: RESULTS_DIR/claims.json, if any)"
    )
    add(
        "--mt_bench",
        type=Path,
        default=Path("data/mt_bench"),
        metavar="DIR",
        help="folder with question.jsonl for the report's texts (default: data/mt_bench, if any)",
    )
    add(
        "--alpaca_eval",
        type=Path,
        default=Path("data/alpaca_eval"),
        metavar="DIR",
        help="folder with AlpacaEval's instructions, its baseline's answers, and df_gamed.csv, "
        "which the length-controlled win rate needs (default: data/alpaca_eval, if any)",
    )
    add(
        "--data",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="folder with the folders of other benchmarks, for the report's texts (default: data)",
    )


def parse_run_ids(words: list[str]) -> list[str]:
    """Run ids given one by one, or as a JSON list."""
    text = " ".join(words)
    run_ids: object = words
    if text.lstrip().startswith(("[", '"', "{")):
        try:
            run_ids = json.loads(text)
        except json.JSONDecodeError:
            run_ids = None
    if isinstance(run_ids, list) and run_ids and all(isinstance(one, str) for one in run_ids):
        return [run_folders.check_run_id(run_id) for run_id in run_ids]
    raise UserError(
        f"--run_ids {text}: expected run ids, such as base dpo_b0.1_s42, or a JSON list of them in "
        "quotes"
    )


def output_folder(args: argparse.Namespace) -> Path:
    """Where the comparison is written. Raises UserError for a folder that holds anything else: old
    tables and figures are removed there.
    """
    if args.out is None:
        return args.results_dir / "comparison"
    if args.out.is_file():
        raise UserError(f"--out {args.out}: is a file")
    if (args.out / "args.json").exists() or (
        args.out.is_dir()
        and any(args.out.iterdir())
        and not (args.out / "aggregated_metrics.json").is_file()
    ):
        raise UserError(
            f"--out {args.out}: holds other files than those of a comparison; name a new folder"
        )
    return args.out
