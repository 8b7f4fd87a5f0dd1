"""A stage's output when its reader leaves: `python train_pref.py ... | head -1`, a closed pager, a
terminal multiplexer that dies. The work goes on; what it would have printed goes to a file.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

NOTE = "The reader of this process's output has left. The work goes on; its further output:\n"


class LastingStream:
    """A text stream that outlives its reader. What is written after the reader has left goes to the
    file `rest`, or nowhere if there is none.
    """

    rest: Path | None = None  # one for stdout and stderr

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self.redirect()
            if self.write_through:  # else the stream's buffer has kept it
                self.stream.write(text)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except BrokenPipeError:
            self.redirect()
            self.stream.flush()

    def redirect(self) -> None:
        """From here on, write to the file, under the same file descriptor."""
        path = self.rest or Path(os.devnull)
        with open(path, "a", encoding="utf-8") as file:
            file.write(NOTE)
            file.flush()
            os.dup2(file.fileno(), self.stream.fileno())


def keep_rest_in(path: Path) -> None:
    """Where output goes after its reader has left."""
    LastingStream.rest = path


@contextmanager
def lasting() -> Iterator[None]:
    """Context in which sys.stdout and sys.stderr outlive their readers."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(LastingStream, before)
    try:
        yield
    finally:
        sys.stdout.flush()  # at Python's own end a reader that has left would be an error
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
        LastingStream.rest = None
