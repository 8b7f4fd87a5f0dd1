"""the paid loop"""

import os
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

from tqdm import tqdm

from pref.files.console import UserError
from pref.judging import store
from pref.judging.costs import Budget
from pref.judging.protocol import Judge

GIVE_UP_AFTER = 10  # calls in a row without a connection: the server is gone
LOOK_EVERY_S = 0.5  # how often the waiting main thread looks up
SYNC_EVERY_S = 5.0  # how often the store is synced to the disk
SAVE_EVERY_S = 60.0  # how often judgements.csv is written during a run


@contextmanager
def catch_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that paid calls in flight are kept. A second one ends
    the program.
    """
    interrupted = threading.Event()

    def handle(signum, frame):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        interrupted.set()
        os.write(
            2, b"\nstopping: waiting for what is in flight; Ctrl-C again to drop it\n"
        )  # print may be mid-line

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


class Calls:
    """The requests still to be made, and the workers that take one, ask, keep the reply, and take
    the next.

    One lock guards queue, budget and store. A reply is in the store before its worker asks again,
    so that a kill can cost no more than the calls then in flight.
    """

    def __init__(
        self,
        judge: Judge,
        pending: dict[str, dict],
        db: sqlite3.Connection,
        interrupted: threading.Event,
        budget: Budget,
        rpm: float | None,
        bar: tqdm,
    ):
        self.judge, self.db, self.interrupted, self.budget, self.bar = (
            judge,
            db,
            interrupted,
            budget,
            bar,
        )
        self.queue, self.lock = list(pending.items())[::-1], threading.Condition()
        self.pause, self.next_call = 60 / rpm if rpm else 0.0, 0.0
        self.in_flight, self.lost, self.failures, self.fatal = 0, 0, Counter(), None

    def work(self) -> None:
        while entry := self.take():
            try:
                reply = self.judge.ask(entry[1])
            except UserError as error:
                reply, self.fatal = None, str(error)
            except BaseException as error:
                self.stop(f"unexpected {type(error).__name__}")
                raise
            self.keep(*entry, reply)

    def stop(self, why: str) -> None:
        """No further call; whoever waits is woken."""
        with self.lock:
            self.fatal = self.fatal or why
            self.lock.notify_all()

    def take(self) -> tuple[str, dict] | None:
        """The next request, when rate and budget allow it; None if there is nothing more to do."""
        with self.lock:
            while self.queue and not self.fatal and not self.interrupted.is_set():
                key, request = self.queue[-1]
                now = time.monotonic()
                if now < self.next_call:
                    self.lock.wait(self.next_call - now)
                elif self.budget.allows(request):
                    self.queue.pop()
                    self.budget.begin(request)
                    self.in_flight += 1
                    self.next_call = max(now, self.next_call) + self.pause
                    return key, request
                elif self.in_flight:
                    self.lock.wait(LOOK_EVERY_S)  # for one that may have cost less than it could
                else:
                    self.fatal = (
                        f"--max_usd {self.budget.cap}: {self.budget.spent:.4f} dollars spent, and the next "
                        f"call could pass the cap; {len(self.queue)} requests wait, raise it"
                    )
            self.lock.notify_all()
            return None

    def keep(self, key: str, request: dict, reply: dict | None) -> None:
        """Book a reply; None is one that the server refused for good."""
        cost = None if reply is None else self.budget.cost(request, reply)
        with self.lock:
            self.in_flight -= 1
            self.budget.end(request, cost)
            if reply is not None:
                try:
                    store.save_reply(
                        self.db, key, request, reply | {"cost_usd": cost}, self.judge.params_b
                    )
                except sqlite3.Error as error:
                    self.fatal = f"judgements.sqlite cannot be written ({error}); make room and run the command again"
                self.failures.update([reply["status"]] if reply["status"] != "ok" else [])
                self.lost = self.lost + 1 if reply["status"] == "connection" else 0
                if self.lost >= GIVE_UP_AFTER:
                    self.fatal = (
                        f"--judge {self.judge.name}: the server is gone ({self.lost} calls without a "
                        "connection); start it again"
                    )
                self.bar.update()
                spent = {"usd": f"{self.budget.spent:.2f}"} if self.judge.prices else {}
                self.bar.set_postfix(spent | self.failures, refresh=False)
            self.lock.notify_all()


def judge_pending(
    judge: Judge,
    pending: dict[str, dict],
    db: sqlite3.Connection,
    save: Callable,
    interrupted: threading.Event,
    budget: Budget,
    rpm: float | None = None,
) -> str | None:
    """Ask for all `pending` and keep each reply as it comes. Returns why it stopped early, or
    None.
    """
    saved_at = synced_at = time.monotonic()
    with (
        ThreadPoolExecutor(judge.concurrency) as pool,
        tqdm(total=len(pending), unit="judgement", disable=None) as bar,
    ):
        calls = Calls(judge, pending, db, interrupted, budget, rpm, bar)
        workers = [pool.submit(calls.work) for _ in range(min(judge.concurrency, len(pending)))]
        try:
            while wait(workers, timeout=LOOK_EVERY_S).not_done:
                with calls.lock:
                    if time.monotonic() - synced_at > SYNC_EVERY_S:
                        db.execute("PRAGMA wal_checkpoint(PASSIVE)")
                        synced_at = time.monotonic()
                    if time.monotonic() - saved_at > SAVE_EVERY_S:
                        save()
                        saved_at = time.monotonic()
        except BaseException as error:  # or the workers would go on asking until all is paid
            calls.stop(f"unexpected {type(error).__name__}")
            raise
        for worker in workers:
            worker.result()
    return calls.fatal
