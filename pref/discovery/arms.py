"""Which proposer is asked next, and a round of proposals from all of them.

Each proposer is an arm of a bandit. A proposal succeeds if it enters the upper half of all measured
candidates, as the archive stands now. An arm with s successes in n of N proposals has the index

    (s / n + sqrt(log N / (2 n))) / (1 + price / fair)

The numerator is Hoeffding's upper limit for its rate of success, exceeded with probability 1 / N.
A proposal takes two things that are scarce, a place among --max_proposals and dollars: `price` is
what this arm's have cost on average, `fair` what --max_usd leaves for each place, or without a cap
the average price of the arms that have one. So an arm without a price is preferred to an equally
good one that costs the fair price until that one is twice as good.

Everything follows from the archive at the start of the round and from the seed. Replies come in any
order; a search that was killed asks the same again, and finds what it has paid for in the store.
"""

import math
import os
import random
import signal
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple, Protocol

from pref.discovery.model_proposer import Job, ModelProposer
from pref.discovery.proposals import Proposal, View
from pref.discovery.requests import LOOK_EVERY_S, OutOfBudget
from pref.files import console
from pref.files.console import UserError


class Proposer(Protocol):
    """evolve.py's, or a ModelProposer."""

    name: str

    def propose(self, view: View, *, round: int, number: int, rng: random.Random) -> Proposal: ...


class Breeding(NamedTuple):
    """A round of proposals."""

    proposals: list[Proposal]  # in order of number; fewer than asked for once all arms have ended
    ended: dict[str, str]  # why a proposer is not asked any more, by name


class Asked(NamedTuple):
    """A proposal to come; with a job if a model is asked for it."""

    future: Future
    proposer: ModelProposer | None = None
    job: Job | None = None

    def give_up(self) -> None:
        """Let it make no further call."""
        if self.job is not None:
            self.proposer.requests.stop("the search is ending")
            if self.future.cancel():
                self.proposer.cancel(self.job)


class Arm(NamedTuple):
    """What the archive says about a proposer."""

    name: str
    proposals: int
    successes: float
    price: float  # mean dollars of a proposal

    def rate(self) -> float:
        return self.successes / self.proposals


class Arms:
    """The proposers of a search.

    cap: --max_usd. most_proposals: --max_proposals. concurrency: requests in flight at a time.
    stop_level: 1 once a signal asks to stop, 2 if it is not to wait for the calls in flight.
    """

    def __init__(
        self,
        proposers: Sequence[Proposer],
        *,
        most_proposals: int,
        cap: float | None = None,
        concurrency: int = 8,
        stop_level: Callable[[], int] = lambda: 0,
    ):
        self.proposers = {proposer.name: proposer for proposer in proposers}
        self.most_proposals, self.cap, self.concurrency = most_proposals, cap, concurrency
        self.stop_level = stop_level

    def check(self) -> None:
        """Ask each model one short question, before anything takes time. Raises UserError."""
        for proposer in self.proposers.values():
            if isinstance(proposer, ModelProposer):
                try:
                    proposer.check()
                except OutOfBudget as out:
                    if len(self.proposers) == 1:
                        raise UserError(str(out)) from None

    def propose(self, view: View, *, round: int, size: int, seed: int) -> Breeding:
        """`size` proposals, from the archive as of the end of the round before.

        Raises UserError for what each later request would meet, and if no proposer is left for
        another reason than the cap. Raises signals.Stopped after a signal, with the replies of
        the calls in flight stored.
        """
        # 1) Who is still asked.
        ended = {
            name: why
            for name, proposer in self.proposers.items()
            if isinstance(proposer, ModelProposer) and (why := proposer.useless(view))
        }
        if len(ended) == len(self.proposers):
            raise UserError(" ".join(ended.values()))
        arms = [arm_of(name, view) for name in self.proposers if name not in ended]
        fair = self.fair_price(arms, view)
        paid = any(isinstance(self.proposers[arm.name], ModelProposer) for arm in arms)
        asked: list[Asked] = []
        with (
            ThreadPoolExecutor(self.concurrency) as pool,
            console.Progress("asking models", "proposals", enabled=paid) as bar,
        ):
            try:
                # 2) In order: which arm, its request, room for it under the cap. Meanwhile the
                #    threads ask.
                for number in range(size):
                    where = {"round": round, "number": number}
                    where["rng"] = f"{seed}:{round}:{number}"
                    one = self.begin(pool, view, arms, ended, fair, where)
                    if one is None:
                        break
                    one.future.add_done_callback(lambda _: bar.update())
                    asked.append(one)
                # 3) The proposals, in order.
                self.await_all(asked)
                return Breeding([one.future.result() for one in asked], ended)
            except BaseException:
                # No further call begins; those in flight are waited for, and stored.
                for one in asked:
                    one.give_up()
                self.await_all(asked)
                raise

    def begin(
        self,
        pool: ThreadPoolExecutor,
        view: View,
        arms: list[Arm],
        ended: dict[str, str],
        fair: float,
        where: dict,
    ) -> Asked | None:
        """Ask the best of `arms` for a proposal, and count it there; None if all have ended.

        An arm that the cap ends is moved from `arms` to `ended`. where: the arguments of
        `Proposer.propose`, with the generator's seed in its place.
        """
        while arms:
            arm = choose(arms, fair)
            proposer = self.proposers[arm.name]
            given = where | {"rng": random.Random(where["rng"])}
            try:
                if isinstance(proposer, ModelProposer):
                    job = proposer.prepare(view, **given)
                    one = Asked(pool.submit(proposer.finish, job), proposer, job)
                else:
                    one = Asked(Future())
                    one.future.set_result(proposer.propose(view, **given))
            except OutOfBudget as out:
                ended[arm.name] = str(out)
                arms.remove(arm)
                continue
            expected = arm.rate() if arm.proposals else 0.5
            arms[arms.index(arm)] = arm._replace(
                proposals=arm.proposals + 1, successes=arm.successes + expected
            )
            return one
        return None

    def await_all(self, asked: list[Asked]) -> None:
        """Wait for all of them, or end the process at a second Ctrl-C."""
        said = False
        while wait([one.future for one in asked], timeout=LOOK_EVERY_S).not_done:
            if self.stop_level() and not said:
                print(
                    "stopping: waiting for the calls in flight, to keep their replies; press "
                    "Ctrl-C again to stop at once (they are paid for all the same)",
                    file=sys.stderr,
                )
                said = True
            if self.stop_level() > 1:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)

    def fair_price(self, arms: list[Arm], view: View) -> float:
        """Dollars; see the module's text. 0 if no arm has a price."""
        prices = [arm.price for arm in arms if arm.price > 0]
        if self.cap is None or not prices:
            return statistics.mean(prices) if prices else 0.0
        left = self.cap - sum(one.usd for one in view.known)
        places = self.most_proposals - sum(one.by in self.proposers for one in view.known)
        return max(left, 0.0) / max(places, 1)


def arm_of(name: str, view: View) -> Arm:
    """What the archive says about a proposer."""
    gains = [one.gain for one in view.known if one.gain is not None]
    middle = statistics.median(gains) if gains else 0.0
    own = [one for one in view.known if one.by == name]
    return Arm(
        name,
        proposals=len(own),
        successes=sum(one.gain is not None and one.gain > middle for one in own),
        price=statistics.fmean(one.usd for one in own) if own else 0.0,
    )


def choose(arms: Sequence[Arm], fair: float) -> Arm:
    """The arm with the highest index; the first of those that were never asked, or are equal."""
    total = sum(arm.proposals for arm in arms)

    def index(arm: Arm) -> float:
        if not arm.proposals:
            return math.inf
        upper = arm.rate() + math.sqrt(math.log(total) / (2 * arm.proposals))
        return upper / (1 + arm.price / fair) if arm.price > 0 and fair > 0 else upper

    return max(arms, key=index)
