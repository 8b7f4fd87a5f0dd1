"""SIGTERM, SIGUSR1, Ctrl-C"""

import os
import signal

from pref.model.ranks import Ranks

EXIT_STOPPED = 75  # saved and left after SIGTERM or SIGUSR1; sysexits.h calls it "try again later"


class Stopped(Exception):
    """A signal asked the run to stop."""


class Heard:
    """Within it, `note` hears SIGNALS; what the process ignores it goes on ignoring."""

    SIGNALS: tuple[signal.Signals, ...]

    def __enter__(self):
        # A job in the background of a script ignores Ctrl-C, which is meant for others there.
        heard = [number for number in self.SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.note) for number in heard}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _frame) -> None:
        raise NotImplementedError


class Stop(Heard):
    """SIGTERM, SIGUSR1 (what schedulers send before they preempt) and Ctrl-C: while steps are made,
    all ranks leave at the same micro-batch and the run is saved; before that there is nothing to
    save and the process ends at once.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, ranks: Ranks):
        self.ranks, self.signal, self.deferred = ranks, 0, False

    def note(self, number: int, _frame) -> None:
        if not self.deferred:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            self.say(
                f"stopped by {signal.Signals(number).name} before the first step; nothing to save"
            )
            raise SystemExit(EXIT_STOPPED)
        if not self.signal:
            self.say(f"{signal.Signals(number).name}: stopping after this micro-batch")
        self.signal = number

    def say(self, words: str) -> None:
        if self.ranks.main:
            os.write(2, f"{words}\n".encode())  # print may be interrupted in the middle of printing

    def check(self) -> None:
        """Raise Stopped on every rank if any rank was signalled (a collective between hosts, none
        of the devices).
        """
        if found := self.ranks.largest(self.signal):  # one that comes meanwhile is found next time
            self.signal = found
            raise Stopped(signal.Signals(found).name)

    @property
    def exit_code(self) -> int:
        return 130 if self.signal == signal.SIGINT else EXIT_STOPPED
