"""SIGTERM, SIGUSR1 and Ctrl-C: a run stops at the same place on all ranks, and is saved."""

import os
import signal

from pref.model.ranks import Ranks

EXIT_STOPPED = 75  # saved and stopped by SIGTERM or SIGUSR1; EX_TEMPFAIL of sysexits.h
EXIT_INTERRUPTED = 130  # by Ctrl-C, as shells report it


class Stopped(Exception):
    """A signal asked the run to stop."""


class SignalHandler:
    """A context manager in which `note` handles SIGNALS. Signals the process already ignores stay
    ignored; the handlers before it are put back at the end.
    """

    SIGNALS: tuple[signal.Signals, ...]

    def __enter__(self):
        # A shell script's background job ignores Ctrl-C, which is meant for the foreground.
        handled = [number for number in self.SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.note) for number in handled}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _frame) -> None:
        raise NotImplementedError


class Stop(SignalHandler):
    """Answers SIGTERM, SIGUSR1 (sent by schedulers before they preempt a job) and Ctrl-C.

    Until `deferred` is set there is nothing to save, and the process exits at once. After that the
    signal is only noted, and `check`, called before every micro-batch, raises Stopped on all ranks.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, ranks: Ranks):
        self.ranks, self.signal, self.deferred = ranks, 0, False

    def note(self, number: int, _frame) -> None:
        name = signal.Signals(number).name
        if not self.deferred:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            self.report(f"stopped by {name} before the first step; nothing to save")
            raise SystemExit(EXIT_STOPPED)
        if not self.signal:
            self.report(f"{name}: stopping after this micro-batch")
        self.signal = number

    def report(self, message: str) -> None:
        if self.ranks.main:
            # Not print: the signal may have interrupted a print, which must not be entered again.
            os.write(2, f"{message}\n".encode())

    def check(self) -> None:
        """Raise Stopped on every rank if any rank got a signal. A collective of the hosts: the
        devices do not wait. A signal that arrives meanwhile is answered by the next call.
        """
        if received := self.ranks.largest(self.signal):
            self.signal = received
            raise Stopped(signal.Signals(received).name)

    @property
    def exit_code(self) -> int:
        return EXIT_INTERRUPTED if self.signal == signal.SIGINT else EXIT_STOPPED
