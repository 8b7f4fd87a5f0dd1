"""Answers and their log-probabilities, from the engine in this process.

    Item -> Author.request -> Engine -> Author.finished -> Store.add, and the next turn's Request

An author has one model in memory: the base with all adapters, or the model of one run whose
parameters were all trained (work.Loaded). gen_mtbench.py takes them one after the other.
`served.py` does the same through a server.
"""

import gc
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pref.answering import fitness, work
from pref.answering.generation import Engine, Request, TurnTokens
from pref.answering.plain import PlainEngine
from pref.answering.turns import Store
from pref.answering.work import Base, Bench, Item, Key, Loaded, Run, Sampling, Workers
from pref.files import console, disk
from pref.files.console import UserError
from pref.model import chat, loading, weights

ROWS_ON_CPU, MOST_ROWS = 32, 128
SCORED_TOGETHER = 8  # turns in one pass of --kl
CACHE_SHARE = 0.8  # of the GPU memory that the weights leave, for keys and values


class Tag(NamedTuple):
    """What a request of the engine belongs to."""

    item: Item
    turn: int
    overflow: bool  # the start of the prompt was cut off


class Author:
    """Turns items into requests and answered requests into stored turns."""

    def __init__(
        self,
        engine: Engine | PlainEngine,
        tokenizer: PreTrainedTokenizerBase,
        store: Store,
        sampling: Sampling,
        loaded: Loaded,
    ):
        self.engine, self.tokenizer, self.store = engine, tokenizer, store
        self.sampling, self.loaded = sampling, loaded
        self.room = engine.length - sampling.max_new_tokens  # tokens of a prompt at most

    def request(self, item: Item) -> Request | None:
        """The next turn to answer, or None if all are answered."""
        answers = self.store.texts(item)
        turn = len(answers)
        if turn == len(item.question["turns"]):
            return None
        prompt = chat.prompt_ids(self.tokenizer, work.conversation(item.question, answers))
        return Request(
            prompt=prompt[max(0, len(prompt) - self.room) :],
            adapter=item.run.adapter_name,
            temperature=item.question["temperature"],
            seed=work.seed_of(self.sampling.seed, item, turn),
            max_new_tokens=self.sampling.max_new_tokens,
            tag=Tag(item, turn, overflow=len(prompt) > self.room),
        )

    def finished(self, request: Request) -> Request | None:
        """Store an answered turn. Returns the next turn of the same conversation, if any."""
        item, turn, overflow = request.tag
        ended = request.tokens[-1] in self.engine.ends
        tokens = request.tokens[:-1] if ended else request.tokens
        text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        self.store.add(
            item, turn, text=text, tokens=len(tokens), truncated=not ended, overflow=overflow
        )
        return self.request(item)


# ---- from a model to an author ------------------------------------------------------------------


def load_author(
    store: Store,
    loaded: Loaded,
    dtype: torch.dtype,
    device: torch.device,
    sampling: Sampling,
    batch_size: int,
) -> Author:
    """The model of `loaded`, with all adapters if it is the base, ready to answer. Sets the store's
    `batch_size` to the rows in flight. Raises UserError if the model cannot be loaded, an adapter
    does not fit it, or `max_new_tokens` exceeds its context.
    """
    max_new_tokens, name = sampling.max_new_tokens, loaded.model
    # It says best what is wrong with a model.
    weights.find_model(name, "--model " if loaded.full is None else "")
    tokenizer = chat.load_tokenizer(name)
    model = loading.load_base(name, dtype, loaded.quant, device).eval()
    if loaded.full is None:
        check_base(model, store.runs, Base(name, loaded.quant), dtype)
        check_untrained(store, Base(name, loaded.quant))
    window = context_of(model.config.get_text_config())
    if max_new_tokens >= window:
        raise UserError(
            f"--max_new_tokens {max_new_tokens}: the context of {name} is {window} tokens, "
            "prompt included; give fewer"
        )
    ends = chat.end_token_ids(tokenizer, model.generation_config)
    if not ends:
        print(
            f"warning: the tokenizer of {name} has no end token and its chat template writes "
            "none: no answer will end before --max_new_tokens",
            flush=True,
        )
    length = cache_length(tokenizer, store.bench, max_new_tokens, window)
    # Never more rows than one run has conversations: a number that follows from what is asked, not
    # from the other runs of this call or from what is answered already.
    conversations = len(store.bench.questions) * store.settings.get("num_choices", 1)
    store.batch_size = min(rows_in_flight(model, length, batch_size), conversations)
    engine = fitness.make_engine(
        model,
        folders={run.run_id: run.adapter for run in loaded.runs if run.adapter},
        rows=store.batch_size,
        length=length,
        ends=ends,
        prompt=chat.prompt_ids(tokenizer, work.conversation(store.bench.questions[0], [])),
    )
    store.batch_size, store.device = engine.rows, device_name(device)
    return Author(engine, tokenizer, store, sampling, loaded)


def free_memory() -> None:
    """Return what is left of a model that nobody refers to any more. Layers with an adapter and the
    engine refer to each other, so that only the collector frees them.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_base(model: PreTrainedModel, runs: list[Run], base: Base, dtype: torch.dtype) -> None:
    """Raise UserError if a run was trained from other weights of the same name."""
    files, sampled = weights.identity(weights.find_model(base.model)), loading.fingerprint(model)
    for run in runs:
        trained = run.record
        same = trained.get("model_sha256", files) == files
        # A run of version 1.0.0 has only a sample of the weights as they were loaded.
        if run.model is None and (trained.get("dtype"), trained.get("quant")) == (
            dtype_name(dtype),
            base.quant,
        ):
            same = same and trained.get("base_sha256", sampled) == sampled
        if not same:
            raise UserError(
                f"{run.folder}: was trained on other weights than {base.model} holds now; "
                "give --model with the old weights, or train it again"
            )


def check_untrained(store: Store, base: Base) -> None:
    """Raise UserError if the base model has other weights now than when its own answers were begun.
    What it had then is in weights.json of its run folder.
    """
    for run in store.runs:
        if run.is_trained:
            continue
        path, now = run.folder / "weights.json", weights.identity(weights.find_model(base.model))
        known = disk.read_json(path) if path.is_file() else {}
        if known.get("model_sha256", now) != now:
            raise UserError(
                f"{run.folder}: holds answers of other weights than {base.model} has now; remove "
                "the folder, or bring the old weights back"
            )
        if not known and store.rank == 0:
            disk.write_json(path, {"model_sha256": now})


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def context_of(config) -> int:
    """Most tokens of a conversation; a model without positions has no limit."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if getattr(config, name, None):
            return getattr(config, name)
    return sys.maxsize


def cache_length(
    tokenizer: PreTrainedTokenizerBase, bench: Bench, max_new_tokens: int, window: int
) -> int:
    """The most tokens that a whole conversation can reach, within the model's context window."""
    longest = 0
    for question in bench.questions:
        turns = len(question["turns"])
        messages = work.conversation(question, ["."] * (turns - 1))
        prompt = chat.prompt_ids(tokenizer, messages)
        longest = max(longest, len(prompt) + turns * max_new_tokens)
    # An answer read back as text may be a few tokens longer than it was written.
    return min(window, longest * 9 // 8 + 32)


def rows_in_flight(model: PreTrainedModel, length: int, batch_size: int) -> int:
    """`batch_size`, or for 0 what suits the device."""
    if batch_size or model.device.type != "cuda":
        return batch_size or ROWS_ON_CPU
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    channels = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head
    row_bytes = 2 * config.num_hidden_layers * channels * length * model.dtype.itemsize
    free = torch.cuda.mem_get_info()[0]
    fitting = max(1, min(MOST_ROWS, int(CACHE_SHARE * free / row_bytes)))
    return 1 << (fitting.bit_length() - 1)  # a power of two, so that it varies less between calls


# ---- answering -----------------------------------------------------------------------------------


def answer_all(author: Author, items: list[Item], workers: Workers) -> None:
    """Answer this process's share of `items`."""
    begun, tokens = time.monotonic(), 0

    def source() -> Iterator[Request]:
        for number in workers.take(f"answers {author.loaded.name}", len(items)):
            yield author.request(items[number])

    def finished(request: Request) -> Request | None:
        nonlocal tokens
        tokens += len(request.tokens)
        follow_up = author.finished(request)
        name = request.tag.item.run.run_id
        rate = tokens / (time.monotonic() - begun)
        bar.update(int(follow_up is None), note=f"{name}, {rate:.0f} tokens/s")
        return follow_up

    total = workers.share(len(items))
    with console.Progress("answering", "answers", total, enabled=workers.is_main) as bar:
        author.engine.run(source(), finished)


# ---- log-probabilities ---------------------------------------------------------------------------


def score_all(
    author: Author, items: list[Item], unscored: list[tuple[int, int]], workers: Workers
) -> None:
    """For --kl: store log-probabilities (nats, summed over the answer's tokens) of answered turns
    under their run and under the base model, as far as the author's model computes them. unscored:
    (position in `items`, turn), from `Store.unscored`.
    """
    total, missing = workers.share(len(unscored)), set(unscored)
    batches = scoring_batches(author, items, missing)
    with console.Progress("log-probabilities", "turns", total, enabled=workers.is_main) as bar:
        for index in workers.take(f"scores {author.loaded.name}", len(batches)):
            score_batch(author, [(items[number], turn) for number, turn in batches[index]])
            bar.update(len(missing.intersection(batches[index])))


def scoring_batches(
    author: Author, items: list[Item], missing: set[tuple[int, int]]
) -> list[list[tuple[int, int]]]:
    """The answered turns of each run, SCORED_TOGETHER at a time, but for batches without
    `missing` ones. What goes together does not depend on what is scored already, since in bf16 a
    result can change with its batch.
    """
    size = min(SCORED_TOGETHER, author.engine.rows)
    by_run: dict[str, list[tuple[int, int]]] = {}
    for number, item in enumerate(items):
        turns = [(number, turn) for turn in range(len(author.store.texts(item)))]
        by_run.setdefault(item.run.run_id, []).extend(turns)
    batches = (turns[i : i + size] for turns in by_run.values() for i in range(0, len(turns), size))
    return [batch for batch in batches if not missing.isdisjoint(batch)]


def score_batch(author: Author, batch: list[tuple[Item, int]]) -> None:
    """Store the log-probabilities of answered turns of one run: `logp` under it and `logp_base`
    under the base, or of a run with a model of its own the one that the author's model gives.
    """
    tokens = [turn_tokens(author, item, turn) for item, turn in batch]
    written = [turn for turn in tokens if turn.answer]
    run = batch[0][0].run

    # 1) The model without adapters, then with the run's.
    plain = author.engine.score(written, None) if written else []
    under = {"logp" if author.loaded.full else "logp_base": plain}
    if run.model is None:
        adapter = run.adapter_name
        adapted = author.engine.score(written, adapter) if adapter and written else plain
        under = {"logp": adapted, **under}

    # 2) To the store, 0 for an empty answer.
    rows = iter(zip(*under.values(), strict=True))
    for (item, turn), (_, answer) in zip(batch, tokens, strict=True):
        values = next(rows) if answer else (0.0,) * len(under)
        author.store.add(item, turn, **dict(zip(under, values)), logp_tokens=len(answer))


def turn_tokens(author: Author, item: Item, turn: int) -> TurnTokens:
    """An answered turn as the chat template writes it. The end token belongs to the answer unless
    the answer was cut off. What exceeds the cache is cut: the end of the answer, then the start of
    the context.
    """
    store, tokenizer, length = author.store, author.tokenizer, author.engine.length
    answers = store.texts(item)
    messages = work.conversation(item.question, answers[:turn])
    asked = chat.render(tokenizer, messages, generation_prompt=True)
    prompt = chat.encode(tokenizer, asked)
    messages.append({"role": "assistant", "content": answers[turn]})
    ids = chat.encode(tokenizer, chat.render_answered(tokenizer, asked, messages))

    # The answer is what follows the prompt, up to the first end token: the template may write more.
    #   ids      <user> Hi <assistant> Hello . <end> \n       split 3, end 5
    #   answer                         Hello . <end>
    split = chat.common_prefix(prompt, ids)
    ends = (i for i in range(split, len(ids)) if ids[i] in author.engine.ends)
    end = next(ends, len(ids))
    truncated = store.turns[Key.of(item, turn)]["truncated"]
    answer = ids[split : end if truncated else end + 1][: length - 1]
    context = ids[:split][-(length - len(answer)) :]
    return TurnTokens(context, answer)
