"""requests.sqlite: what a search asked language models, what they replied, and what that cost.

How money is protected:

1. A request is a model, messages, parameters and the number of a sample. Its reply is committed as
   it returns, and from then on the same request is answered from here: it is paid once, also when
   the search is killed and started again.
2. A request is noted before it is sent. If the process ends before the reply is here, the call may
   have been charged: its highest price counts as spent (`lost_usd`), and it is made again.
3. A proposal is asked for only if what is spent, what the calls in flight can cost at most and what
   it can cost itself at most fit under --max_usd, every try included. Tries are made here and not
   by the client, which would not say how many there were: one that timed out or broke may have
   been charged, and is noted at its highest price.
4. An error that each later request would meet (a refused key, no credit, no such model, a server
   that is gone) ends the search with what to do about it.
"""

import functools
import json
import random
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pref.files import disk
from pref.files.console import UserError
from pref.judging import costs, server_judge
from pref.model import completions, server

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

MOST_BYTES = 4 * 2**20  # of a server's reply
MOST_CHARS = 100_000  # of a text that is kept; a program has 6,000 at most
GIVE_UP_AFTER = 10  # calls of a model in a row without a reply
PARAMETERS = {"temperature": 1.0, "max_tokens": 4096}  # unless --parameters says otherwise
# Failures that say nothing about the request: asked again when the search is started again.
PASSING = ("sent", "lost", "stopped", "connection", "http_408", "http_409", "http_429")


NOT_KEPT = ("http_status", "unsent", "wait_s")  # of an answer
MOST_WAIT_S = 60  # that a server's Retry-After is heeded


def is_passing(status: str) -> bool:
    """Whether a status says nothing about the request, which is asked again at the next start."""
    return status in PASSING or status.startswith("http_5")


def is_lost(status: str) -> bool:
    """Whether a try brought nothing, and another one may."""
    return is_passing(status) or status == "timeout"


class OutOfBudget(Exception):
    """The next call could pass --max_usd. `str()` is a message to the user."""


class Missing(Exception):
    """A request that has no stored reply."""

    def __init__(self, request: dict):
        super().__init__("not stored")
        self.request = request


class Reply(NamedTuple):
    """What a request brought."""

    status: str  # "ok", or why there is no text to read
    text: str
    cost_usd: float
    finish_reason: str = ""

    @property
    def why(self) -> str:
        """Why there is no text to read, in words."""
        words = {
            "length": "its reply was cut off at the limit of tokens; --parameters can raise it",
            "refused": "a content filter refused it",
            "failed": "the server gave it up halfway",
            "thoughts": "its reply holds thoughts alone",
            "tools": "its reply calls tools in place of an answer",
            "empty": "its reply is empty",
            "endless": "its reply had no end within --timeout_s and "
            f"{MOST_BYTES / 2**20:.0f} MiB, or broke off",
            "timeout": "no reply within --timeout_s",
            "connection": "the connection was lost",
        }
        if self.status in words:
            return words[self.status]
        what = self.status.replace("http_", "the server answers ").replace("_", " ")
        return f"{what} ({' '.join(self.text.split())[:200]})"


class Model:
    """A model behind a server: who it is, what is sent to it and what it costs.

    parameters: sent with each request; `exactly`: as they are, else in the form that the server
    accepts. prices: dollars per million prompt and completion tokens, None if unknown.
    """

    def __init__(
        self,
        name: str,
        client,
        parameters: dict | None = None,
        prices: tuple[float, float] | None = None,
    ):
        self.name, self.prices = name, prices
        self.client = client.with_options(max_retries=0)  # `Requests.ask` tries again itself
        self.exactly = parameters is not None
        self.parameters = dict(PARAMETERS if parameters is None else parameters)
        self.sent_parameters = dict(self.parameters)
        self.tries = 1 + client.max_retries
        # Its rules alone: what a try costs at most, and what a reply has cost.
        self.bill = costs.Budget(self, cap=None, spent=0.0)
        self.lost_in_a_row = 0

    def cost(self, prompt_tokens: float | None, completion_tokens: float | None) -> float | None:
        """Dollars, or None if the prices or a count are unknown."""
        if self.prices is None or prompt_tokens is None or completion_tokens is None:
            return None
        price_in, price_out = self.prices
        return (prompt_tokens * price_in + completion_tokens * price_out) / 1e6

    def request(self, messages: list[dict], sample: str) -> dict:
        """Everything that tells one request from another."""
        return {
            "model": self.name,
            "messages": messages,
            "parameters": self.parameters,
            "sample": sample,
        }

    def most(self, request: dict) -> float:
        """Upper bound on the dollars of one try."""
        return self.bill.most(request)


class Requests:
    """The store, and what keeps the total within `cap` dollars. Threads share it.

    rpm: calls a minute at most, over all models.
    """

    def __init__(self, path: Path, cap: float | None = None, rpm: float | None = None):
        self.path, self.cap = path, cap
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
                self.lock.wait()
            self.reserved += most
            self.in_flight += 1
            return most

    def release(self, most: float) -> None:
        """Give a reservation back: what the calls cost is stored by now."""
        with self.lock:
            self.in_flight -= 1
            self.reserved = self.reserved - most if self.in_flight else 0.0  # no dust of rounding
            self.lock.notify_all()

    # ---- a call

    def ask(self, model: Model, request: dict) -> Reply:
        """The reply to a request, from the store or, paid for, from the model's server.

        Tried again after HTTP 408, 409, 429, 5xx, a timeout or a lost connection. Raises UserError
        for what each later request would meet.
        """
        if reply := self.find(request):
            return reply
        for attempt in range(1, model.tries + 1):
            self.await_turn()
            answer, cost = self.ask_once(model, request)
            if not is_lost(answer["status"]):
                break
            if attempt < model.tries:
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
        until_s = time.monotonic() + wait_s
        with self.lock:
            while not self.fatal and (left_s := until_s - time.monotonic()) > 0:
                self.lock.wait(left_s)

    def await_turn(self) -> None:
        """Wait until the rate allows another call. Raises UserError once there are to be none."""
        with self.lock:
            while not self.fatal and (wait_s := self.next_start_s - time.monotonic()) > 0:
                self.lock.wait(wait_s)
            if self.fatal:
                raise UserError(self.fatal)
            self.next_start_s = max(time.monotonic(), self.next_start_s) + self.interval_s

    def stop(self, why: str) -> None:
        """Let no further call begin."""
        with self.lock:
            self.fatal = self.fatal or why
            self.lock.notify_all()

    def count(self, model: Model, answer: dict) -> None:
        """Notice a server that is gone. Raises UserError."""
        model.lost_in_a_row = model.lost_in_a_row + 1 if is_lost(answer["status"]) else 0
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


# ---- the server ----------------------------------------------------------------------------------


def call(model: Model, request: dict) -> dict:
    """Send a request. Returns columns of the table, and what `costs.Budget.cost` looks at.

    Parameters that the server refuses are dropped or renamed, unless they are to be sent exactly.
    Raises UserError for what each later request would meet.
    """
    import openai

    while True:
        sent = model.sent_parameters
        body = {"model": model.name, "messages": request["messages"], **sent}
        try:
            text = server.complete(model.client, body)
        except (openai.APIConnectionError, openai.APIStatusError) as error:
            adapted = None if model.exactly else server_judge.adapt_parameters(sent, error)
            if adapted is None:
                return failed(model, error)
            if model.sent_parameters == sent:  # else another thread has done it
                model.sent_parameters = adapted
                print(
                    f"{model.name} refuses these parameters; trying {json.dumps(adapted)}",
                    file=sys.stderr,
                )
            continue
        return read(model, text) | {"sent_parameters": json.dumps(sent)}


def failed(model: Model, error) -> dict:
    """What is kept of a call without a reply. Raises UserError."""
    answer = server_judge.failed_call(model.client, "--proposer", model.name, error)
    # Unlike a judge, a proposer is not asked about texts that a firewall may stop at.
    if answer.get("http_status") == 403 and not server_judge.names_moderation(str(error)):
        raise UserError(server.explain(model.client, "--proposer", model.name, error)) from None
    return {"reply": answer.pop("judgement", ""), "wait_s": asked_wait_s(error)} | answer


def asked_wait_s(error) -> float | None:
    """The seconds that a server asks to wait, if it does and they are few."""
    headers = error.response.headers if hasattr(error, "response") else {}
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            seconds = float(headers[name]) / unit
        except (KeyError, ValueError):
            continue
        if 0 <= seconds <= MOST_WAIT_S:
            return seconds
    return None


def read(model: Model, body: str) -> dict:
    """What is kept of a server's reply, without the key should it be echoed."""
    completion = completions.read(functools.partial(server.clean, model.client), body)
    if completion is None:
        if len(body) >= MOST_BYTES or is_torn(body):
            return {"status": "endless", "reply": ""}
        return {"status": "not_openai", "reply": completions.other_reply(model.client, body)}
    text = completion.text
    prompt, tokens = server_judge.count_tokens(
        completion.usage, has_text=bool(text or completion.thoughts)
    )
    return {
        "status": status_of(completion),
        "reply": (text or completion.refusal)[:MOST_CHARS],
        "finish_reason": completion.finish_reason,
        "served_model": completion.model[:200],
        "system_fingerprint": completion.fingerprint[:200],
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
    }


def is_torn(body: str) -> bool:
    """Whether a body begins like a reply, or with nothing but blanks, and has no end."""
    text = body.strip()
    return not text or (text.startswith("{") and not text.endswith("}"))


def status_of(completion: completions.Completion) -> str:
    """ "ok" if the text is the model's whole answer, else why it is not."""
    if completion.cut_off:
        return "length"
    if completion.refusal or completion.finish_reason in completions.FILTERED:
        return "refused"
    if completion.finish_reason in completions.FAILED:
        return "failed"
    if completion.text.strip():
        return "ok" if len(completion.text) <= MOST_CHARS else "endless"
    if completion.thoughts.strip():
        return "thoughts"
    return "tools" if completion.calls_tools else "empty"
