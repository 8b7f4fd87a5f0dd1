"""The paid loop: makes the pending requests, several at a time, and stores each reply.

`judge_pending` starts the workers and waits for them; `Calls` holds what they share. How money is
protected:

- A request is made only if its highest possible cost fits under the cap (`costs.Budget`).
- A worker stores a reply before it takes the next request. Whatever ends the program, at most the
  calls then in flight are paid for without being stored.
- Ctrl-C stops new calls and waits for those in flight.
- An error that would stop every later request too (no credit, a refused key, a full disk, a server
  that is gone) ends the loop.
"""

import os
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import NamedTuple

from pref.files import console
from pref.files.console import UserError
from pref.judging import store
from pref.judging.costs import Budget
from pref.judging.judges import Judge

GIVE_UP_AFTER = 10  # calls in a row without a reply: the server is gone, or takes no more
NO_VERDICT_AFTER = 20  # replies, and none of them with a verdict: the rest would have none either
LOOK_EVERY_S = 0.5  # how often waiting threads look for a change
SYNC_EVERY_S = 5.0  # how often the store is synced to disk
SAVE_EVERY_S = 60.0  # how often the judgements.csv files are rewritten meanwhile


@contextmanager
def catch_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that the calls in flight can be waited for and kept.

    A second Ctrl-C ends the program at once.
    """
    interrupted = threading.Event()
    message = (
        b"\nstopping: waiting for the calls in flight, to keep their replies; press Ctrl-C again "
        b"to stop at once (they are paid for all the same)\n"
    )

    def handle(signum, frame):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        interrupted.set()
        os.write(2, message)  # not print, which the signal may have interrupted halfway

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


class Call(NamedTuple):
    """A request to make, and its hash."""

    key: str
    request: dict
    reserved: float = 0.0  # dollars, see costs.Budget


class Calls:
    """What the workers share: the queue, the budget, the rate limit and the store.

    One lock guards all of it. No worker holds the lock while it waits for the judge.
    """

    def __init__(
        self,
        judge: Judge,
        pending: dict[str, dict],
        db: sqlite3.Connection,
        interrupted: threading.Event,
        budget: Budget,
        rpm: float | None,
        bar: console.Progress,
    ):
        self.judge, self.db, self.budget, self.bar = judge, db, budget, bar
        self.interrupted = interrupted
        self.lock = threading.Condition()
        self.queue = [Call(key, request) for key, request in pending.items()]
        self.queue.reverse()  # the next call is the last element
        self.interval_s = 60 / rpm if rpm else 0.0  # between the starts of two calls
        self.next_start_s = 0.0  # no call starts before this reading of time.monotonic()
        self.in_flight = 0
        self.lost_in_a_row: Counter[str] = Counter()  # why, since the last call with a reply
        self.failures: Counter[str] = Counter()  # by status
        self.unread: Counter[str] | None = Counter()  # replies by status; None after a verdict
        self.first_unread = ""  # what it says
        self.tried = store.known_requests(db)  # --retry_failed repeats what is known to fail
        self.fatal: str | None = None  # why no further call is made

    def work(self) -> None:
        """What each worker does, until there is nothing left to do."""
        # 1) Wait until rate and budget allow a call, and reserve the most that it can cost.
        while call := self.take():
            # 2) Ask, without the lock: this takes seconds.
            try:
                reply = self.judge.ask(call.request)
            except UserError as error:
                reply, self.fatal = None, str(error)
            except BaseException as error:
                self.stop(f"unexpected {type(error).__name__}")
                raise
            # 3) Store the reply and its cost, before this worker takes the next call.
            self.keep(call, reply)

    def stop(self, reason: str) -> None:
        """Let no further call begin, and wake the workers that wait for one."""
        with self.lock:
            self.fatal = self.fatal or reason
            self.lock.notify_all()

    def take(self) -> Call | None:
        """The next call, as soon as rate and budget allow it; None if there is nothing to do."""
        with self.lock:
            while self.queue and not self.fatal and not self.interrupted.is_set():
                call, now = self.queue[-1], time.monotonic()
                if now < self.next_start_s:
                    self.lock.wait(self.next_start_s - now)
                elif (reserved := self.budget.reserve(call.request)) is not None:
                    self.queue.pop()
                    self.in_flight += 1
                    self.next_start_s = max(now, self.next_start_s) + self.interval_s
                    return call._replace(reserved=reserved)
                elif self.in_flight:
                    # A call in flight may cost less than is reserved for it, and make room.
                    self.lock.wait(LOOK_EVERY_S)
                else:
                    self.fatal = (
                        f"--max_usd {self.budget.cap}: {self.budget.spent:.4f} dollars are spent, "
                        f"and the next call could pass the cap; {len(self.queue)} requests are "
                        "left. All judgements so far are kept: raise --max_usd and run the command "
                        "again to continue"
                    )
            self.lock.notify_all()
            return None

    def keep(self, call: Call, reply: dict | None) -> None:
        """Store a reply and record its cost. None: the judge refused this and all later calls."""
        with self.lock:
            cost = None if reply is None else self.budget.cost(call.request, reply)
            self.in_flight -= 1
            self.budget.settle(call.reserved, cost)
            if reply is not None:
                self.save(call, reply | {"cost_usd": cost})
                self.count(reply)
                self.count_unread(call, reply)
            self.lock.notify_all()

    def save(self, call: Call, reply: dict) -> None:
        """Write a reply to the store; if that fails, no further call is made."""
        try:
            store.save_reply(self.db, call.key, call.request, reply, self.judge.params_b)
        except sqlite3.Error as error:
            self.fatal = (
                f"judgements.sqlite cannot be written ({error}); replies that could not be stored "
                "are lost, though they may have been charged for. Free disk space and run the same "
                "command again: it asks for what is missing"
            )

    def count(self, reply: dict) -> None:
        """Count a reply as done, for the progress line and to notice a server that is gone."""
        status = reply["status"]
        if status != "ok":
            self.failures[status] += 1
        if is_lost(reply):
            self.lost_in_a_row[status] += 1
        else:
            self.lost_in_a_row.clear()
        if (lost := self.lost_in_a_row.total()) >= GIVE_UP_AFTER:
            why = ", ".join(f"{count} {status}" for status, count in self.lost_in_a_row.items())
            gone = (
                "the server is gone" if why.endswith("connection") else "the server takes no more"
            )
            self.fatal = (
                f"--judge {self.judge.name}: {gone} ({lost} calls in a row without a reply: "
                f"{why}); when it answers again, run the same command with --retry_failed, which "
                "repeats these calls too"
            )
        notes = [f"{self.budget.spent:.2f} dollars"] if self.judge.prices else []
        notes += [f"{count} {failure}" for failure, count in self.failures.items()]
        self.bar.update(note=", ".join(notes))

    def count_unread(self, call: Call, reply: dict) -> None:
        """Notice a judge whose replies never have a verdict, before all of them are paid for."""
        if self.unread is None or call.key in self.tried:
            return
        if reply["status"] == "ok":
            self.unread = None
            return
        self.unread[reply["status"]] += 1
        text = " ".join((reply.get("judgement") or "").split())[:300]
        self.first_unread = self.first_unread or (text and f" The first: {text}")
        if (replies := self.unread.total()) >= NO_VERDICT_AFTER:
            why = ", ".join(f"{count} {status}" for status, count in self.unread.most_common())
            self.fatal = self.fatal or (
                f"--judge {self.judge.name}: none of the first {replies} replies has a verdict "
                f"({why}), so nothing more is asked; read them in the column judgement of "
                "judgements.csv, and see the remarks above. The same command asks for the next "
                f"{NO_VERDICT_AFTER}.{self.first_unread}"
            )


def is_lost(reply: dict) -> bool:
    """Whether a call failed in a way that says more of the server than of the request."""
    refused, lost = reply.get("http_status", 0), ("connection", "timeout", "not_openai")
    return reply["status"] in lost or refused in (403, 429) or refused >= 500


def judge_pending(
    judge: Judge,
    pending: dict[str, dict],
    db: sqlite3.Connection,
    save: Callable[[], None],
    interrupted: threading.Event,
    budget: Budget,
    rpm: float | None = None,
) -> str | None:
    """Make all `pending` requests and store their replies.

    pending: requests by hash. save: rewrites the judgements.csv files. interrupted: ends the loop
    early when set. rpm: calls per minute at most. Returns None, or the reason for stopping early as
    a message to the user.
    """
    saved_at = synced_at = time.monotonic()
    with (
        ThreadPoolExecutor(judge.concurrency) as pool,
        console.Progress("judging", "judgements", total=len(pending)) as bar,
    ):
        # 1) The workers ask and store until nothing is left to do, or something stops them.
        calls = Calls(judge, pending, db, interrupted, budget, rpm, bar)
        workers = [pool.submit(calls.work) for _ in range(min(judge.concurrency, len(pending)))]
        try:
            # 2) Meanwhile this thread syncs the store and rewrites the CSV files.
            while wait(workers, timeout=LOOK_EVERY_S).not_done:
                with calls.lock:
                    if time.monotonic() - synced_at > SYNC_EVERY_S:
                        store.sync(db)
                        synced_at = time.monotonic()
                    if time.monotonic() - saved_at > SAVE_EVERY_S:
                        save()
                        saved_at = time.monotonic()
        except BaseException as error:
            # Leaving the pool waits for the workers, which would ask and pay for all that is left.
            calls.stop(f"unexpected {type(error).__name__}")
            raise
        # 3) An exception in a worker is raised here.
        for worker in workers:
            worker.result()
    return calls.fatal
