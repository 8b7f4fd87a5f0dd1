"""What a stage says to its user: errors, exit codes, progress, tables of text."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO, TypeVar

from tqdm import tqdm

LOG_EVERY_S = 60  # in a log file, progress is one line per minute

Item = TypeVar("Item")


class UserError(Exception):
    """A mistake of the user's that the program can name: place, fact, remedy. Printed without a
    traceback.
    """


def run_main(main: Callable[[], int | None]) -> None:
    """Run a stage's `main`. Exit codes: 0 done, 1 incomplete, 2 user's mistake (one line on
    stderr), 130 Ctrl-C.
    """
    try:
        code = main() or 0
    except UserError as error:
        if (rank := os.environ.get("RANK", "0")) != "0":
            # Under torchrun most mistakes meet every rank. Rank 0 says so and torchrun ends the
            # others meanwhile; what only this rank has met is said all the same.
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


def print_rows(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


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
