"""What analyze.py prints: the answer in at most 25 lines. `--verbose` prints terminal.py's tables.

    results: 61 runs (60 finished, 1 untrained); writing the report

    DECIDED  the opening statement
      decided       each score in a line, the most trustworthy first
      supported     each claim on runs that are there
      note, missing
    report: results/comparison/report.html

Where a part has more lines than there is room for, its last line counts the others.
"""

import textwrap
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from pref.analysis import notes, texts

MOST_LINES = 25
WIDTH, STATEMENT_WIDTH = 110, 100
MOST_STATEMENT = 7  # lines


class Section(NamedTuple):
    """Lines of one kind."""

    lines: list[str]
    least: int  # as many are shown in any case
    more: str  # what the others are


def head_line(results_dir: Path, comparison: dict) -> str:
    statuses = Counter(run["status"] for run in comparison["runs"])
    by_status = ", ".join(f"{n} {status}" for status, n in sorted(statuses.items()))
    runs = texts.count_text(len(comparison["runs"]), "runs")
    return f"{results_dir}: {runs} ({by_status}); writing the report"


def lines(comparison: dict, folder: Path, printed: int) -> list[str]:
    """The lines to print.

    comparison: aggregated_metrics.json. folder: where the results are. printed: lines that were
    printed already.
    """
    first = ["", *statement_lines(comparison["answer"]), ""]
    last = [
        f"report: {folder / 'report.html'}",
        f"numbers: {folder / 'aggregated_metrics.json'}; tables/ and figures/ beside it",
        "The tables, claims and notes on the terminal: --verbose",
    ]
    shown, folded = notes.fold_claims(comparison["claims"])
    folded = [f"  {notes.folded_text(folded, bool(shown))}"] if folded else []
    sections = [
        Section(score_lines(comparison["answers"]), 3, "scores"),
        Section(list(map(claim_line, shown)), 3, "claims"),
        Section(folded, 1, "claims"),
        Section(note_lines(comparison["notes"]), 2, "notes"),
        Section(list(map(missing_line, comparison["missing"])), 2, "missing things"),
    ]
    room = MOST_LINES - printed - len(first) - len(last)
    return [*first, *map(shortened, fit(sections, room)), *last]


def fit(sections: list[Section], room: int) -> list[str]:
    """The lines of all sections, or as many as there is room for: the first sections have more."""
    sizes = [min(len(section.lines), section.least) for section in sections]
    for number, section in enumerate(sections):
        sizes[number] += min(len(section.lines) - sizes[number], max(0, room - sum(sizes)))
    fitted = []
    for section, size in zip(sections, sizes):
        if size == len(section.lines):
            fitted += section.lines
        else:
            others = len(section.lines) - (size - 1)
            fitted += [
                *section.lines[: size - 1],
                f"  ... and {others} more {section.more} in the report",
            ]
    return fitted


def shortened(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1].rstrip()}…"


def statement_lines(answer: dict) -> list[str]:
    """The verdict and the statement; of a long one, the beginning."""
    text = f"{answer['verdict'].upper()}: {answer['statement']}"
    return textwrap.wrap(text, STATEMENT_WIDTH, max_lines=MOST_STATEMENT, placeholder=" …")


def score_lines(answers: list[dict]) -> list[str]:
    """What each score decides; nothing where there is one, which the statement is about."""
    if len(answers) < 2:
        return []
    found = []
    for one in answers:
        finding = one["finding"]
        found.append(f"  {finding['verdict']:<12}  {finding['name']}: {finding['text']}")
    return found


def claim_line(row: dict) -> str:
    said = texts.verdict_texts(row)
    estimate = (said["estimate"] or "").split(" (")[0]
    numbers = " ".join(filter(None, (estimate, said["interval"])))
    claim = f"{row['id']}: {row['claim']}"
    return f"  {row['verdict']:<12}  {f'{numbers}  ' if numbers else ''}{claim}"


def note_lines(all_notes: list[str]) -> list[str]:
    """Those first that say what the answer is without."""
    return [f"  note: {note}" for note in sorted(all_notes, key=lambda n: not notes.is_caveat(n))]


def missing_line(gap: dict) -> str:
    of = f" of {texts.count_text(len(gap['runs']), 'runs')}" if gap["runs"] else ""
    return f"  missing: {gap['what']}{of}; next: {gap['next']}"
