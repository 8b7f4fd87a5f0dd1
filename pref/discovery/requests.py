"""requests.sqlite: what a search asked language models, what they replied, and what that cost.

How money is protected:

1. A request is a model, messages, parameters and the number of a sample. Its reply is committed as
   it returns, and from then on the same request is answered from here: it is paid once, also when
   the search is killed and started again.
2. A request is noted before it is sent. If the process ends before the reply is here, the call may
   have been charged: its highest price counts as spent (`lost_usd`), and it is made again.
3. A proposal is asked for only if what is spent, what the calls in flight can cost at most and what
   it can cost itself at most fit under --max_usd. Further tries are made here and not by the
   client, which would not say how many there were: one that broke may have been charged, is noted
   at its highest price, and is followed by another only if that fits too.
4. An error that each later request would meet (a refused key, no credit, no such model, a server
   that is gone) ends the search with what to do about it.
"""

import json
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pref.discovery.model_calls import Model, Reply, call, is_passing
from pref.files import disk
from pref.files.console import UserError
from pref.model import server
from pref.training.signals import Stopped

SCHEMA_VERSION = 1  # PRAGMA user_version
SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
    request_sha256 TEXT PRIMARY KEY,  -- SHA-256 of the request's JSON with sorted keys
    model TEXT NOT NULL,              -- --proposer, as given
    request TEXT NOT NULL,            -- JSON: model, messages, parameters, sample
    sent_parameters TEXT,             -- JSON: in the form that the server accepts
    status TEXT NOT NULL,             -- "ok", why there is no text, or "sent": no reply yet
    reply TEXT,                       -- the model's text, or that of an error
    finish_reason TEXT,
    served_model TEXT,                -- the model that the server says it ran
    system_fingerprint TEXT,          -- the server's own version mark
    prompt_tokens INTEGER,
    completion_tokens INTEGER,        -- thoughts included
    cost_usd REAL NOT NULL,           -- of the reply; 0 without a price
    sent_usd REAL NOT NULL,           -- while it is "sent": the most that one try costs
    lost_usd REAL NOT NULL,           -- of earlier calls without a reply that counts
    tries INTEGER NOT NULL,
    tstamp REAL NOT NULL              -- Unix time in seconds
)"""

LOOK_EVERY_S = 0.5  # how often waiting threads look for a signal
GIVE_UP_AFTER = 10  # calls of a model in a row without a reply
NOT_KEPT = ("http_status", "unsent", "wait_s")  # of an answer


class OutOfBudget(Exception):
    """The next call could pass --max_usd. `str()` is a message to the user."""


class Missing(Exception):
    """A request that has no stored reply."""

    def __init__(self, request: dict):
        super().__init__("not stored")
        self.request = request


class Requests:
    """The store, and what keeps the total within `cap` dollars. Threads share it.

    rpm: calls a minute at most, over all models. stop_level: above 0 once a signal asks to stop; no
    call begins then, and whatever waits raises Stopped.
    """

    def __init__(
        self,
        path: Path,
        cap: float | None = None,
        rpm: float | None = None,
        stop_level: Callable[[], int] = lambda: 0,
    ):
        self.path, self.cap, self.stop_level = path, cap, stop_level
        self.db = open_store(path)
        self.lock = threading.Condition()
        self.reserved = 0.0
        self.in_flight = 0  # proposals that hold a reservation
        self.interval_s = 60 / rpm if rpm else 0.0
        self.next_start_s = 0.0  # no call starts before this reading of time.monotonic()
        self.fatal: str | None = None  # why no further call is made

    def close(self) -> None:
        self.db.close()

    def __enter__(self) -> "Requests":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def spent(self) -> float:
        """Dollars, of all models and of all starts; a call in flight counts when it is back."""
        with self.lock:
            return self._spent()

    def _spent(self) -> float:
        query = "SELECT COALESCE(SUM(cost_usd + lost_usd), 0) FROM requests"
        return self.db.execute(query).fetchone()[0]

    def find(self, request: dict) -> Reply | None:
        """The stored reply; None if it is not stored, or said nothing about the request."""
        query = "SELECT status, reply, cost_usd, finish_reason FROM requests WHERE request_sha256=?"
        with self.lock:
            row = self.db.execute(query, (disk.sha256_json(request),)).fetchone()
        if row is None or is_passing(row[0]):
            return None
        status, text, cost, finish = row
        return Reply(status, text or "", cost, finish or "")

    def stored(self, request: dict) -> Reply:
        """Like `find`. Raises Missing."""
        reply = self.find(request)
        if reply is None:
            raise Missing(request)
        return reply

    # ---- the cap

    def reserve(self, most: float) -> float:
        """Reserve dollars for a proposal, waiting for those in flight where they may make room.

        Raises OutOfBudget, and changes nothing, where they do not. Callers come one at a time, in
        the order of their proposals: which ones still fit then does not depend on who is faster.
        """
        with self.lock:
            while self.cap is not None and self._spent() + self.reserved + most > self.cap:
                if not self.in_flight:
                    raise OutOfBudget(
                        f"--max_usd {self.cap:g}: the next call could pass it; every reply so far "
                        "is kept: raise --max_usd and run the same command again to continue"
                    )
                self.wait(LOOK_EVERY_S)
            self.reserved += most
            self.in_flight += 1
            return most

    def has_room(self) -> bool:
        """Whether all reservations still fit: a try that may have been charged uses one up."""
        with self.lock:
            return self.cap is None or self._spent() + self.reserved <= self.cap

    def release(self, most: float) -> None:
        """Give a reservation back: what the calls cost is stored by now."""
        with self.lock:
            self.in_flight -= 1
            self.reserved = self.reserved - most if self.in_flight else 0.0  # no dust of rounding
            self.lock.notify_all()

    # ---- a call

    def ask(self, model: Model, request: dict) -> Reply:
        """The reply to a request, from the store or, paid for, from the model's server.

        Tried again after HTTP 408, 409, 429, 5xx or a lost connection, but not after a timeout: it
        was sent, and would take as long again. The caller holds a reservation for one try. Raises
        UserError for what each later request would meet, and Stopped.
        """
        if reply := self.find(request):
            return reply
        for attempt in range(1, model.tries + 1):
            self.await_turn()
            answer, cost = self.ask_once(model, request)
            if attempt == model.tries or not is_passing(answer["status"]) or not self.has_room():
                break
            self.pause(answer, attempt)
        with self.lock:
            self.count(model, answer)
        return Reply(answer["status"], answer["reply"], cost, answer.get("finish_reason") or "")

    def ask_once(self, model: Model, request: dict) -> tuple[dict, float]:
        """One try: noted, sent, and its answer stored. Returns that and its dollars."""
        with self.lock, self.written():
            self.note_sent(model, request)
        try:
            answer = call(model, request)
        except UserError as error:
            self.stop(str(error))
            with self.lock, self.written():
                self.keep(request, {"status": "stopped", "reply": str(error)}, cost=0.0)
            raise
        with self.lock, self.written():
            cost = model.bill.cost(request, answer) or 0.0
            self.keep(request, answer, cost)
        return answer, cost

    def pause(self, answer: dict, attempt: int) -> None:
        """Wait before the next try: as long as the server says, else 0.5, 1, 2, ... 8 s."""
        wait_s = answer.get("wait_s")
        if wait_s is None:
            wait_s = min(0.5 * 2 ** (attempt - 1), 8.0) * random.uniform(0.75, 1.0)
        with self.lock:
            self.wait_until(time.monotonic() + wait_s)

    def await_turn(self) -> None:
        """Wait until the rate allows another call. Raises UserError or Stopped once there are to be
        none.
        """
        with self.lock:
            self.wait_until(self.next_start_s)
            if self.fatal:
                raise UserError(self.fatal)
            self.next_start_s = max(time.monotonic(), self.next_start_s) + self.interval_s

    def wait_until(self, time_s: float) -> None:
        """Wait with the lock, at most until this reading of time.monotonic(), or a fatal error."""
        self.wait(0)
        while not self.fatal and (left_s := time_s - time.monotonic()) > 0:
            self.wait(left_s)

    def wait(self, seconds: float) -> None:
        """Wait a moment for a change. Raises Stopped."""
        if seconds > 0:
            self.lock.wait(min(seconds, LOOK_EVERY_S))
        if self.stop_level():
            raise Stopped

    def stop(self, why: str) -> None:
        """Let no further call begin."""
        with self.lock:
            self.fatal = self.fatal or why
            self.lock.notify_all()

    def count(self, model: Model, answer: dict) -> None:
        """Notice a server that is gone. Raises UserError."""
        lost = is_passing(answer["status"]) or answer["status"] == "timeout"
        model.lost_in_a_row = model.lost_in_a_row + 1 if lost else 0
        if model.lost_in_a_row >= GIVE_UP_AFTER and not self.fatal:
            why = Reply(answer["status"], answer["reply"], 0.0).why
            self.fatal = (
                f"--proposer {model.name}: {server.address(model.client)} takes no more "
                f"({GIVE_UP_AFTER} calls in a row without a reply, the last one: {why}); every "
                "reply so far is kept: when it answers again, run the same command again"
            )
            self.lock.notify_all()
            raise UserError(self.fatal)

    # ---- the table

    def note_sent(self, model: Model, request: dict) -> None:
        row = {
            "request_sha256": disk.sha256_json(request),
            "model": model.name,
            "request": json.dumps(request, ensure_ascii=False),
            "status": "sent",
            "cost_usd": 0.0,
            "sent_usd": model.most(request),
            "lost_usd": 0.0,
            "tries": 1,
            "tstamp": time.time(),
        }
        self.db.execute(
            f"INSERT INTO requests ({', '.join(row)}) VALUES ({', '.join('?' * len(row))}) "
            "ON CONFLICT (request_sha256) DO UPDATE SET status = 'sent', reply = NULL, "
            "lost_usd = lost_usd + cost_usd, cost_usd = 0, sent_usd = excluded.sent_usd, "
            "tries = tries + 1, tstamp = excluded.tstamp",
            tuple(row.values()),
        )

    def keep(self, request: dict, answer: dict, cost: float) -> None:
        row = answer | {"cost_usd": cost, "sent_usd": 0.0, "tstamp": time.time()}
        row = {name: value for name, value in row.items() if name not in NOT_KEPT}
        self.db.execute(
            f"UPDATE requests SET {', '.join(f'{name} = ?' for name in row)} "
            "WHERE request_sha256 = ?",
            (*row.values(), disk.sha256_json(request)),
        )

    @contextmanager
    def written(self) -> Iterator[None]:
        """Turn an error of SQLite into a UserError."""
        try:
            yield
        except sqlite3.Error as error:
            self.fatal = self.fatal or (
                f"{self.path}: cannot be written ({error}); replies that could not be stored are "
                "lost, though they may have been charged for. Free disk space and run the same "
                "command again: it asks for what is missing"
            )
            self.lock.notify_all()
            raise UserError(self.fatal) from None

    def known_form(self, model: Model) -> dict | None:
        """Parameters in the form that the model last accepted, of the same ones."""
        with self.lock:
            rows = self.db.execute(
                "SELECT request, sent_parameters FROM requests WHERE model = ? "
                "AND sent_parameters IS NOT NULL ORDER BY tstamp DESC LIMIT 1",
                (model.name,),
            ).fetchall()
        for request, sent in rows:
            if json.loads(request)["parameters"] == model.parameters:
                return json.loads(sent)
        return None


def open_store(path: Path) -> sqlite3.Connection:
    """Open or create the store. Calls that were in flight when its last process ended count as
    paid. Raises UserError for a file that cannot be used.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Every statement is a transaction of its own, and on disk when it returns: calls take
        # seconds, a sync takes milliseconds.
        db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise UserError(
                f"{path}: written by a newer version of this toolkit (schema {version}, expected "
                f"{SCHEMA_VERSION}); continue with that version, or search in a new folder"
            )
        db.execute(SCHEMA)
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        db.execute(
            "UPDATE requests SET status = 'lost', lost_usd = lost_usd + sent_usd, sent_usd = 0 "
            "WHERE status = 'sent'"
        )
    except sqlite3.Error as error:
        raise UserError(
            f"{path}: cannot be used ({error}); if another program has it open, close that "
            "program; if the disk is full, free some space; if the file is damaged, restore it: "
            "without it every request is paid for again"
        ) from None
    return db
