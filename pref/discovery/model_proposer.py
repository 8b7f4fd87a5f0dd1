"""A language model as a proposer.

    request (prompts.py) -> reply (requests.py) -> text (replies.py) -> Proposal

A reply whose program is refused is answered once, with the words of the refusal. What a model wrote
is never executed here or elsewhere.
"""

import functools
import random
from collections.abc import Callable
from typing import NamedTuple

from pref.discovery import form, form_tables, prompts, replies
from pref.discovery.model_calls import Model, Reply
from pref.discovery.proposals import Proposal, View
from pref.discovery.requests import Missing, Requests
from pref.files.console import UserError
from pref.model import server

HELLO = [{"role": "user", "content": "Reply with the single word OK."}]
UNREAD_AFTER = 16  # proposals, and none of them readable: the rest would not be either
Ask = Callable[[dict], Reply]


class Job(NamedTuple):
    """A proposal that is to be asked for, and the dollars that are reserved for it."""

    prompt: prompts.Prompt
    sample: str
    reserved: float
    done: Proposal | None  # it is stored already


class ModelProposer:
    """Asks `model` for proposals.

    refusal_of: why a program's text would be refused, or None; what it says goes back to the model.
    Default: what form.py says. coupled: a loss may look at the batch.
    """

    def __init__(
        self,
        model: Model,
        requests: Requests,
        refusal_of: Callable[[str], str | None] | None = None,
        coupled: bool = False,
    ):
        self.model, self.requests, self.coupled = model, requests, coupled
        self.refusal_of = refusal_of or functools.partial(refusal_by_form, coupled=coupled)
        self.clean = functools.partial(server.clean, model.client)
        if not model.exactly:
            model.sent_parameters = requests.known_form(model) or model.sent_parameters

    @property
    def name(self) -> str:
        return self.model.name

    def check(self) -> None:
        """Ask one short question, before anything else takes time: a wrong key, address or name
        ends the search here. A search that continues does not ask again. Raises UserError, or
        OutOfBudget where the cap is below the price of a question.
        """
        request = self.model.request(HELLO, sample="hello")
        if self.requests.find(request):
            return
        most = self.requests.reserve(self.model.most(request))
        try:
            reply = self.requests.ask(self.model, request)
        finally:
            self.requests.release(most)
        # A model that thinks long about it is no reason to stop.
        if reply.status not in ("ok", "length", "thoughts", "empty"):
            detail = reply.text if reply.status == "not_openai" else reply.why
            raise UserError(
                f"--proposer {self.name}: {server.address(self.model.client)} did not answer a "
                f"short question: {detail}"
            )

    def useless(self, view: View) -> str | None:
        """Why nothing more should be paid for, by what the archive holds, or None."""
        own = [one for one in view.known if one.by == self.name]
        if len(own) < UNREAD_AFTER or any(one.stopped is None for one in own):
            return None
        if any(one.stopped["at"] != "parse" for one in own):
            return None
        return (
            f"--proposer {self.name}: none of its {len(own)} replies could be read (the last one: "
            f"{own[-1].stopped['why']}); choose another model, or raise its limit of tokens: "
            "--parameters '{\"max_tokens\": 16384}'"
        )

    def propose(self, view: View, *, round: int, number: int, rng: random.Random) -> Proposal:
        """A proposal, paid for or from the store. Raises OutOfBudget and UserError."""
        return self.finish(self.prepare(view, round=round, number=number, rng=rng))

    def prepare(self, view: View, *, round: int, number: int, rng: random.Random) -> Job:
        """The first half of `propose`: the request, and room for it under the cap. Waits, and sends
        nothing. Callers come in the order of their proposals. Raises OutOfBudget.
        """
        prompt, sample = prompts.prompt(view, rng, self.coupled), f"{round}:{number}"
        try:
            done = self.converse(prompt, sample, self.requests.stored)
        except Missing as missing:
            most = self.model.most(missing.request)
            if len(missing.request["messages"]) == len(prompt.messages):  # a repair may follow
                worst = prompts.repair(prompt.messages, MOST_CODE, MOST_WHY)
                most += self.model.most(self.model.request(worst, sample))
            reserved = self.requests.reserve(most)
            return Job(prompt, sample, reserved, done=None)
        return Job(prompt, sample, reserved=0.0, done=done)

    def finish(self, job: Job) -> Proposal:
        """The second half of `propose`: ask, and read the reply. Raises UserError."""
        if job.done is not None:
            return job.done
        try:
            ask = functools.partial(self.requests.ask, self.model)
            return self.converse(job.prompt, job.sample, ask)
        finally:
            self.requests.release(job.reserved)

    def cancel(self, job: Job) -> None:
        """Give up a prepared job that is not to be finished."""
        if job.done is None:
            self.requests.release(job.reserved)

    def converse(self, prompt: prompts.Prompt, sample: str, ask: Ask) -> Proposal:
        """The proposal that comes out of one request, and of a second one if it is refused."""
        # 1) The reply, or why there is none.
        reply = ask(self.model.request(prompt.messages, sample))
        proposal = self.read(reply, prompt.task)
        if reply.status != "ok":
            return proposal
        # 2) The program, or why it is refused.
        why = proposal.stopped["why"] if proposal.stopped else self.refusal_of(proposal.text)
        if why is None:
            return proposal
        # 3) Once more with these words. A second one that is worse does not replace the first.
        messages = prompts.repair(prompt.messages, proposal.text or reply.text, self.clean(why))
        second = ask(self.model.request(messages, sample))
        repaired = self.read(second, prompt.task)
        usd = proposal.usd + second.cost_usd
        if repaired.stopped:
            proposal.usd = usd
            return proposal
        repaired.operator += ", repaired"
        repaired.original = f"{proposal.original}\n\n---- repaired ----\n\n{repaired.original}"
        repaired.usd = usd
        return repaired

    def read(self, reply: Reply, task: prompts.Task) -> Proposal:
        """The proposal in a reply; one without a program says why."""
        draft, why = replies.Draft("", "unread", ""), reply.why
        if reply.status == "ok":
            try:
                draft, why = replies.read(reply.text, self.clean), ""
            except replies.Unreadable as error:
                why = str(error)
        return Proposal(
            text=draft.code,
            by=self.name,
            operator=task.operator,
            parents=task.parents,
            name=draft.name,
            thought=draft.thought,
            original=reply.text,
            usd=reply.cost_usd,
            stopped={"at": "parse", "why": why} if why else None,
        )


# As long as what a repair can quote.
MOST_CODE, MOST_WHY = "x" * form_tables.MAX_CHARACTERS, "x" * prompts.MOST_WHY


def refusal_by_form(text: str, coupled: bool) -> str | None:
    """Why form.py refuses a text, or None. It parses the text and executes nothing."""
    try:
        form.translate(text, coupled=coupled)
    except form_tables.Refusal as refusal:
        return str(refusal)
    return None
