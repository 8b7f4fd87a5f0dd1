"""What a stage says to its user: errors, exit codes, progress, tables of text."""

import argparse
import codecs
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeVar

from tqdm import tqdm

from pref.files import interrupts, output

LOG_EVERY_S = 60  # in a log file, progress is one line per minute

Item = TypeVar("Item")


class UserError(Exception):
    """A mistake that the user can correct. The message names the place, the fact and the remedy,
    e.g. "pairs.jsonl:217: empty 'rejected'; rerun prep_data.py", and is shown without a traceback.
    """


@contextmanager
def remedy(text: str) -> Iterator[None]:
    """Add a remedy to a UserError that is raised within."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; {text}") from None


def run_main(main: Callable[[], int | None]) -> None:
    """Run a stage's `main` and exit with its code.

    0 done, 1 something is missing (`main` has named it), 2 a mistake of the user's (UserError) or
    of the system's (OSError: permission, full disk), 130 Ctrl-C. pref/files/README.md lists them.
    """
    interrupts.hand_over()
    print_on_any_terminal()
    with output.lasting():
        code = exit_code_of(main)
    sys.exit(code)


def exit_code_of(main: Callable[[], int | None]) -> int:
    """Run `main` and report how it ended."""
    try:
        code = main() or 0
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            # Under torchrun most mistakes reach every rank. Rank 0 reports first, and torchrun ends
            # the other ranks within these seconds; a mistake of this rank alone is still reported.
            time.sleep(5)
        print(f"error{f' (rank {rank})' if rank != '0' else ''}: {error}", file=sys.stderr)
        code = 2
    except OSError as error:  # its message names the path
        remedy = ""
        if isinstance(error, NotADirectoryError):
            remedy = "; a part of this path is a file: give another path"
        print(f"error: {error}{remedy}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        code = 130
    return code


# What tables and messages have beside ASCII, for terminals that have nothing else.
PLAIN = {"β": "b", "τ": "t", "±": "+-", "−": "-", "–": "-", "—": "-", "…": "..."}
PLAIN |= {"→": "->", "×": "x", "≈": "~", "≤": "<=", "≥": ">=", "²": "2", "“": '"', "”": '"'}


def plain_text(error: UnicodeError) -> tuple[str, int]:
    """For `codecs.register_error`: characters that an encoding lacks, in ones that every encoding
    has.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    escaped = (PLAIN.get(x) or x.encode("ascii", "backslashreplace").decode() for x in letters)
    return "".join(escaped), error.end


codecs.register_error("plain", plain_text)


def print_on_any_terminal() -> None:
    """From now on a character that stdout or stderr cannot encode is printed in plain letters: a
    terminal with another encoding than UTF-8 must not end hours of work.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="plain")


def format_table(
    rows: list[list[str]], right_from: int | None = None, underline: bool = False, indent: int = 0
) -> str:
    """Rows of cells as lines of aligned text; the first row is the header.

    right_from: index of the first column that is aligned right (numbers); None for no column.
    underline: a line of dashes below the header. indent: spaces before each line.

        >>> print(format_table([["run", "n"], ["dpo", "80"]], right_from=1, underline=True))
        run   n
        ---  --
        dpo  80
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    if underline:
        header, *body = rows
        rows = [header, ["-" * width for width in widths], *body]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if right_from is None or i < right_from else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append((" " * indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def usable_cores() -> int:
    """Number of cores that this process may use: fewer than the machine's in a job or container."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """--help with the description as it is written, and with every default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        unset = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        if unset or not text or "default" in text:
            return text
        return f"{text} (default: %(default)s)"


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:300]


class Progress:
    """How far a loop has come, on stderr: a bar at a terminal, elsewhere one line per minute.

        with console.Progress("judging", "judgements", total=160) as bar:
            ...
            bar.update()

    The line, which loops shorter than a minute never print:

        judging: 124 of 160 judgements, 3.2 per s, 0:00:11 left

    what: names the work. unit: what is counted, in the plural. total: None if unknown. enabled:
    False shows nothing (ranks other than 0). Several threads may call `update`.
    """

    def __init__(
        self,
        what: str,
        unit: str,
        total: int | None = None,
        enabled: bool = True,
        stream: TextIO | None = None,  # default: sys.stderr
        clock: Callable[[], float] = time.monotonic,
    ):
        self.what, self.unit, self.total, self.enabled = what, unit, total, enabled
        self.stream, self.clock = stream or sys.stderr, clock
        self.done, self.begun = 0, clock()
        self.logged, self.lock, self.bar = self.begun, threading.Lock(), None
        if enabled and self.stream.isatty():
            shape = {"leave": False, "dynamic_ncols": True, "file": self.stream}
            self.bar = tqdm(desc=what, total=total, unit=f" {unit}", **shape)

    def update(self, n: int = 1, note: str = "") -> None:
        """Count `n` more as done. note: shown behind the numbers, e.g. the cost so far."""
        with self.lock:
            self.done += n
            if self.bar is not None:
                self.bar.set_postfix_str(note, refresh=False)
                self.bar.update(n)
            elif self.enabled and (now := self.clock()) - self.logged >= LOG_EVERY_S:
                self.logged = now
                print(self.line(now, note), file=self.stream, flush=True)

    def line(self, now: float, note: str = "") -> str:
        """Count, rate since the start and time left, as a line of a log."""
        count = f"{self.done:,}" if self.total is None else f"{self.done:,} of {self.total:,}"
        parts = [f"{self.what}: {count} {self.unit}"]
        if self.done:
            rate = self.done / (now - self.begun)
            parts.append(f"{rate:.1f} per s" if rate >= 1 else f"{60 * rate:.1f} per min")
            if self.total is not None:
                minutes, seconds = divmod(round((self.total - self.done) / rate), 60)
                parts.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
        return ", ".join([*parts, note] if note else parts)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def progress(
    items: Iterable[Item], what: str, unit: str, total: int | None = None, enabled: bool = True
) -> Iterator[Item]:
    """`items`, with a `Progress` that counts each once it has been dealt with."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    with Progress(what, unit, total, enabled) as bar:
        for item in items:
            yield item
            bar.update()
