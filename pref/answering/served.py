"""Answers from an OpenAI-compatible server, which serves each adapter under its run id."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from pref.answering import work
from pref.answering.turns import Store
from pref.answering.work import Item, Sampling
from pref.files import console
from pref.files.console import UserError
from pref.model import server

# What the server's own message does not tell, by HTTP status.
HINTS = {
    400: "Is its context long enough for the conversation and --max_new_tokens?",
    404: "Adapters are asked for under their run ids, the base model under --served_base.",
}


class Reply(NamedTuple):
    text: str
    tokens: int  # 0 if the server does not count them
    truncated: bool  # cut off at max_new_tokens


class Meter:
    """Tokens generated since the start; threads share it."""

    def __init__(self):
        self.begun, self.tokens, self.lock = time.monotonic(), 0, threading.Lock()

    def add(self, tokens: int) -> None:
        with self.lock:
            self.tokens += tokens

    def rate(self) -> str:
        return f"{self.tokens / (time.monotonic() - self.begun):.0f} tokens/s"


def answer_all(
    client,
    store: Store,
    items: list[Item],
    sampling: Sampling,
    base_name: str,
    concurrency: int,
) -> None:
    """Answer `items`, `concurrency` conversations at a time. client: from `server.open_client`.
    base_name: the server's name for the untrained model.

    Raises UserError for an error that a later request would meet again.
    """
    # 1) The server must know every name that will be asked for.
    names = {run.run_id: run.run_id if run.adapter else base_name for run in store.runs}
    check_served(client, set(names.values()))
    meter, stop, unsupported = Meter(), threading.Event(), set()

    # 2) One conversation, turn after turn, in a thread of the pool.
    def answer(item: Item) -> None:
        turns = len(item.question["turns"])
        while not stop.is_set() and (turn := len(answers := store.texts(item))) < turns:
            seed = work.seed_of(sampling.seed, item, turn)
            reply = ask(
                client,
                unsupported,
                model=names[item.run.run_id],
                messages=work.conversation(item.question, answers),
                temperature=item.question["temperature"],
                max_tokens=sampling.max_new_tokens,
                seed=seed % 2**31,  # servers take a signed 32-bit integer
            )
            store.add(item, turn, **reply._asdict(), overflow=False)
            meter.add(reply.tokens)
            bar.update(0, note=meter.rate())
        bar.update(int(not stop.is_set()), note=meter.rate())

    # 3) All of them. On an error or Ctrl-C, requests in flight are completed and stored, and no
    # further one is sent.
    with (
        console.Progress("answering", "answers", len(items)) as bar,
        ThreadPoolExecutor(concurrency) as pool,
    ):
        futures = [pool.submit(answer, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def ask(client, unsupported: set[str], **request) -> Reply:
    """One request. The client has retried what is worth retrying.

    unsupported: parameters that this server has refused and that are left out. A refused `seed` is
    added to it, with a message to the user.
    """
    import openai

    sent = {name: value for name, value in request.items() if name not in unsupported}
    try:
        completion = client.chat.completions.create(**sent)
        choice, usage = completion.choices[0], completion.usage
        return Reply(
            text=(choice.message.content or "").strip(),
            tokens=usage.completion_tokens if usage else 0,
            truncated=choice.finish_reason == "length",
        )
    except openai.APIStatusError as error:
        if error.status_code in (400, 422) and "seed" in error.message and "seed" in sent:
            if "seed" not in unsupported:  # else another thread has told the user
                unsupported.add("seed")
                print(
                    f"{server.address(client)}: does not accept a seed, so sampled answers cannot "
                    "be reproduced; continuing without",
                    flush=True,
                )
            return ask(client, unsupported, **request)
        text = server.explain(client, "model", request["model"], error)
        hint = HINTS.get(error.status_code)
        raise UserError(f"{text.rstrip('.')}. {hint}" if hint else text) from None
    except openai.APIConnectionError as error:
        raise UserError(server.explain(client, "model", request["model"], error)) from None
    except (AttributeError, IndexError, TypeError):
        raise UserError(server.explain_other_api(client)) from None


def check_served(client, names: set[str]) -> None:
    """Raise UserError if the server lists its models and one of `names` is not among them."""
    import openai

    try:
        models = client.with_options(max_retries=1).models.list().data or []
        served = sorted({model.id for model in models})
    except openai.APIConnectionError as error:
        raise UserError(server.explain(client, "--base_url", str(client.base_url), error)) from None
    except (openai.APIStatusError, AttributeError):
        return  # it has no list of models; the first answer will tell what is wrong
    missing = sorted(names - set(served))
    if served and missing:
        raise UserError(
            f"{server.address(client)}: does not serve {missing[0]} ({len(missing)} of "
            f"{len(names)} names are missing); it serves "
            f"{server.clean(client, ', '.join(served[:5]))}. Load each adapter under its run id "
            "(vLLM: --lora-modules RUN_ID=results/RUN_ID/adapter ...), and give --served_base with "
            "the server's name for the base model"
        )
