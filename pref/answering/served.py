"""the same through a server"""

import argparse
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from pref.answering import work
from pref.answering.turns import Store
from pref.answering.work import Item
from pref.files.console import UserError
from pref.model import server


def ask_server_all(
    args: argparse.Namespace, client, base: dict, store: Store, items: list[Item]
) -> None:
    """Answer `items` through an OpenAI-compatible server. Raises UserError for what no later
    request will cure.
    """
    names = {
        run.run_id: run.run_id if run.adapter else args.served_base or base["model"]
        for run in store.runs
    }
    check_served(client, set(names.values()))
    begun, tokens, stop, refused = time.monotonic(), Counter(), threading.Event(), set()

    def answer(item: Item) -> None:
        while not stop.is_set() and (turn := len(answers := store.texts(*item))) < len(
            item.question["turns"]
        ):
            name = names[item.run.run_id]
            choice, used = ask_server(
                client,
                refused,
                model=name,
                messages=work.conversation_of(item, answers),
                temperature=item.question["temperature"],
                max_tokens=args.max_new_tokens,
                seed=work.seed_of(args.seed, item.question["question_id"], turn, item.choice)
                % 2**31,
            )
            text, cut = (choice.message.content or "").strip(), choice.finish_reason == "length"
            store.add(*item, turn, text=text, tokens=used, truncated=cut, overflow=False)
            tokens["all"] += used
            bar.set_postfix_str(f"{tokens['all'] / (time.monotonic() - begun):.0f} tok/s")
        bar.update(not stop.is_set())

    with (
        work.progress(len(items), "answers", 0) as bar,
        ThreadPoolExecutor(args.concurrency) as pool,
    ):
        futures = [pool.submit(answer, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:  # what is in flight is kept, what waits is not sent
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def ask_server(client, refused: set[str], **request) -> tuple:
    """One answer: the reply's choice and its number of tokens. The client has retried what is worth
    retrying. A `seed` that the server does not take is left out from then on (`refused`), and that
    is said.
    """
    import openai

    try:
        reply = client.chat.completions.create(
            **{k: value for k, value in request.items() if k not in refused}
        )
        return reply.choices[0], reply.usage.completion_tokens if reply.usage else 0
    except openai.APIStatusError as error:
        if (
            error.status_code in (400, 422)
            and "seed" in error.message
            and "seed" in request.keys() - refused
        ):
            print(
                f"{server.server_of(client)} takes no seed: sampled answers will differ in another start",
                flush=True,
            )
            refused.add("seed")
            return ask_server(client, refused, **request)
        hint = "; is its context long enough for the conversation and --max_new_tokens?"
        too_long = hint if error.status_code == 400 else ""
        raise UserError(
            server.explain(client, "model", request["model"], error) + too_long
        ) from None
    except openai.APIConnectionError as error:
        raise UserError(server.explain(client, "model", request["model"], error)) from None
    except (AttributeError, IndexError, TypeError):
        raise UserError(
            f"{server.server_of(client)} is no OpenAI-compatible server; does --base_url lack its /v1?"
        ) from None


def check_served(client, names: set[str]) -> None:
    """Raise UserError if the server does not list a model that will be asked for."""
    import openai

    try:
        served = {model.id for model in client.with_options(max_retries=1).models.list().data or []}
    except openai.APIConnectionError as error:
        raise UserError(server.explain(client, "--base_url", str(client.base_url), error)) from None
    except (openai.APIStatusError, AttributeError):
        return  # no list there; the first answer will say what is wrong
    if served and (missing := sorted(names - served)):
        raise UserError(
            f"{server.server_of(client)} does not serve {missing[0]} ({len(missing)} of {len(names)} are missing); it serves "
            f"{server.clean(client, ', '.join(sorted(served)[:5]))}. Adapters go by their run ids (vLLM: --lora-modules "
            "RUN_ID=results/RUN_ID/adapter ...), the base by --served_base"
        )
