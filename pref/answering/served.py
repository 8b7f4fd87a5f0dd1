"""Answers from an OpenAI-compatible server, which serves each run under its run id.

A turn that the server will not answer (a content filter, a conversation beyond its context) is a
`Failure`: the others go on, the next start asks for it again. What every request would meet ends
the work at once, with what to do about it.
"""

import functools
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from pref.answering import work
from pref.answering.turns import Failure, Store
from pref.answering.work import Item, Sampling
from pref.files import console
from pref.files.console import UserError
from pref.model import completions, server, template
from pref.model.completions import Completion

# What the server's own message does not tell, by HTTP status.
HINTS = {
    400: "Is its context long enough for the conversation and --max_new_tokens?",
    404: "Adapters are asked for under their run ids, the base model under --served_base.",
}
ABOUT_LENGTH = re.compile(r"context|length|too long|max_(?:model_len|tokens)", re.IGNORECASE)
# A request may meet these for what it says; 403 is a firewall's or a moderation's.
OF_ONE_REQUEST = (400, 403, 409, 413, 422, 451, 500)
TRIES_AT_THE_START = 3  # conversations one after another, before the first answer
GIVE_UP_AFTER = 10  # failures in a row

# Sent with a request, and left out for a server that refuses them.
OPTIONAL = {
    "seed": "sampled answers cannot be reproduced",
    "top_p": "the server's own default acts",
    "chat_template_kwargs": "its chat template may open thoughts or print today's date, which "
    "training does not",
}


class Reply(NamedTuple):
    """An answered turn, as the store takes it."""

    text: str
    tokens: int | None  # None if the server does not count them
    truncated: bool  # cut off at max_new_tokens
    overflow: bool  # the server has read less than the conversation
    sent: dict  # what was sent besides model and messages


class Refused(Exception):
    """The server does not answer one request, for the reason `str(error)`."""

    def __init__(self, reason: str, message: str):
        super().__init__(reason)
        self.message = message  # to a user whose work ends here


class Conversations:
    """Asks one server, turn after turn. Threads share it."""

    def __init__(self, client, store: Store, sampling: Sampling, base_name: str):
        self.client, self.store, self.sampling = client, store, sampling
        # The server's names of the runs.
        self.names = {run.run_id: run.run_id if run.is_trained else base_name for run in store.runs}
        self.unsupported: set[str] = set()  # parameters that the server has refused
        self.stop = threading.Event()
        self.lock, self.begun = threading.Lock(), time.monotonic()
        self.tokens = self.failed_in_a_row = 0

    def answer(self, item: Item, bar: console.Progress) -> Refused | None:
        """All turns of a conversation. Returns why it ends before its last one, or None."""
        turns = len(item.question["turns"])
        while not self.stop.is_set() and (turn := len(self.store.texts(item))) < turns:
            try:
                reply = self.ask(item, turn)
            except Refused as refused:
                self.fail(item, turn, refused)
                bar.update()
                return refused
            self.store.add(item, turn, **reply._asdict())
            with self.lock:
                self.tokens += reply.tokens or 0
                self.failed_in_a_row = 0
            bar.update(0, note=self.rate())
        bar.update(int(not self.stop.is_set()), note=self.rate())
        return None

    def ask(self, item: Item, turn: int) -> Reply:
        seed = work.seed_of(self.sampling.seed, item, turn)
        return ask(
            self.client,
            self.unsupported,
            model=self.names[item.run.run_id],
            messages=work.conversation(item.question, self.store.texts(item)),
            temperature=item.question["temperature"],
            max_tokens=self.sampling.max_new_tokens,
            seed=seed % 2**31,  # servers take a signed 32-bit integer
            top_p=1,  # else the model's generation config may set another
            chat_template_kwargs=template.TEMPLATE_OPTIONS,
        )

    def fail(self, item: Item, turn: int, refused: Refused) -> None:
        self.store.fail(Failure(item, turn, str(refused)))
        with self.lock:
            self.failed_in_a_row += 1
            count = self.failed_in_a_row
        if count >= GIVE_UP_AFTER:
            raise UserError(f"{count} failures in a row, the last one: {refused.message}")

    def rate(self) -> str:
        return f"{self.tokens / (time.monotonic() - self.begun):.0f} tokens/s" * bool(self.tokens)


def answer_all(
    client,
    store: Store,
    items: list[Item],
    sampling: Sampling,
    base_name: str,
    concurrency: int,
) -> None:
    """Answer `items`, `concurrency` conversations at a time. client: from `server.open_client`.
    base_name: the server's name for the untrained model. Turns that the server refuses are added to
    `store.failures`.

    Raises UserError for an error that a later request would meet again.
    """
    # 1) The server must know every name that will be asked for.
    conversations = Conversations(client, store, sampling, base_name)
    check_served(client, set(conversations.names.values()))

    with console.Progress("answering", "answers", len(items)) as bar:
        # 2) One after another up to the first answer: what is wrong with all of them ends here.
        waiting, refused = list(items), None
        for _ in range(TRIES_AT_THE_START):
            if waiting and not store.turns:
                refused = conversations.answer(waiting.pop(0), bar)
        if refused is not None and not store.turns:
            raise UserError(refused.message)

        # 3) The rest together. On an error or Ctrl-C, requests in flight are completed and stored,
        # and no further one is sent.
        with ThreadPoolExecutor(concurrency) as pool:
            futures = [pool.submit(conversations.answer, item, bar) for item in waiting]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                conversations.stop.set()
                pool.shutdown(cancel_futures=True)
                raise


def ask(client, unsupported: set[str], **request) -> Reply:
    """One request. The client has retried what is worth retrying.

    unsupported: parameters that this server has refused and that are left out. A newly refused one
    of OPTIONAL is added to it, with a message to the user. Raises Refused.
    """
    import openai

    sent = {name: value for name, value in request.items() if name not in unsupported}
    if "max_tokens" in unsupported:
        sent["max_completion_tokens"] = request["max_tokens"]
    try:
        body = server.complete(client, sent)
    except openai.APIStatusError as error:
        if name := refused_option(error, sent):
            if name not in unsupported:  # else another thread has told the user
                unsupported.add(name)
                effect = OPTIONAL.get(name, "it is sent as max_completion_tokens")
                print(f"{server.address(client)}: does not accept {name}: {effect}", flush=True)
            return ask(client, unsupported, **request)
        raise explained(client, request["model"], error) from None
    except openai.APIConnectionError as error:
        raise UserError(server.explain(client, "model", request["model"], error)) from None
    return reply_of(client, body, sent)


def refused_option(error, sent: dict) -> str | None:
    """The parameter that an `openai.APIStatusError` is about and that a request can do without."""
    if error.status_code not in (400, 422):
        return None
    if isinstance(error.param, str) and error.param in OPTIONAL.keys() & sent.keys():
        return error.param
    complaint = f"{error.param} {server.message_of(error)}"
    too_long = server.TOO_LONG.search(complaint)
    if "max_tokens" in sent and "max_completion_tokens" in complaint and not too_long:
        return "max_tokens"
    return next((name for name in OPTIONAL if name in sent and name in complaint), None)


def explained(client, model: str, error) -> Exception:
    """What an `openai.APIStatusError` means: Refused for this request, UserError for all."""
    text = server.explain(client, "model", model, error)
    hint = HINTS.get(error.status_code)
    if hint and (error.status_code != 400 or ABOUT_LENGTH.search(server.message_of(error))):
        text = f"{text.rstrip('.')}. {hint}"
    if error.status_code not in OF_ONE_REQUEST or server.is_out_of_credit(error):
        return UserError(text)
    message = " ".join(server.clean(client, server.message_of(error)).split())[:300]
    message = message.removeprefix(f"Error code: {error.status_code} - ")
    return Refused(f"HTTP {error.status_code}: {message}", text)


def reply_of(client, body: str, sent: dict) -> Reply:
    """The answer in the body of a reply. Raises Refused if there is none."""
    completion = completions.read(functools.partial(server.clean, client), body)
    if completion is None:
        message = completions.other_reply(client, body)
        raise Refused(message, message)
    if problem := completion.problem:
        raise Refused(problem, f"{server.address(client)}: {problem}")
    return Reply(
        text=completion.text.strip(),
        tokens=completion.completion_tokens,
        truncated=completion.cut_off,
        overflow=is_cut(completion, sent["messages"]),
        sent={name: value for name, value in sent.items() if name not in ("model", "messages")},
    )


def is_cut(completion: Completion, messages: list[dict]) -> bool:
    """Whether the server has read fewer tokens than the conversation has words, each of which is a
    token at least: it has cut the start off without a word, as ollama does beyond num_ctx.
    """
    words = sum(len(message["content"].split()) for message in messages)
    return completion.prompt_tokens is not None and completion.prompt_tokens < words


def check_served(client, names: set[str]) -> None:
    """Raise UserError if the server lists its models and one of `names` is not among them."""
    import openai

    try:
        listed = json.loads(client.with_options(max_retries=1).get("/models", cast_to=str))["data"]
        served = sorted({str(model["id"]) for model in listed})
    except openai.APIConnectionError as error:
        raise UserError(server.explain(client, "--base_url", str(client.base_url), error)) from None
    except (openai.APIStatusError, ValueError, KeyError, TypeError):
        return  # it has no list of models; the first answer will tell what is wrong
    missing = sorted(names - set(served))
    if served and missing:
        raise UserError(
            f"{server.address(client)}: does not serve {missing[0]} ({len(missing)} of "
            f"{len(names)} names are missing); it serves "
            f"{server.clean(client, ', '.join(served[:5]))}. Load each adapter under its run id "
            "(vLLM: --lora-modules RUN_ID=results/RUN_ID/adapter ...), and give --served_base with "
            "the server's name for the base model. A run of --tune full is served by itself (vLLM: "
            "vllm serve results/RUN_ID/model --served-model-name RUN_ID), and its folder alone is "
            "given to gen_mtbench.py"
        )
