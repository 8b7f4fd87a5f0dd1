"""Ctrl-C while a stage still imports its libraries, which takes seconds: one line and exit code
130, as later, instead of a traceback. Every stage imports this module before anything else.
"""

import os
import signal
import sys
from pathlib import Path

from pref import ROOT


def end_at_once(number: int, frame) -> None:
    """Not an exception: libraries that are half imported turn it into another one."""
    os.write(2, b"interrupted: nothing was begun\n")
    os._exit(130)


def is_stage() -> bool:
    """Whether this process runs a script of the toolkit, rather than imports one."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    return script is not None and Path(script).resolve().parent in (ROOT, ROOT / "pref/sweeping")


def hand_over() -> None:
    """The imports are done: Ctrl-C is Python's KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# What a parent has told the process to ignore stays ignored.
if is_stage() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_at_once)
