import json
import os
import shutil
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from processes import run_forked, started
from tiny import chatml_tokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Tests never reach for a hub. One thread: the models are tiny, and threads waiting for each other
# cost more than they compute, above all beside the subprocesses that tests start.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, dealt out to the halves that the two processes of `-n 2` begin
    with: what one of them takes over from the other at the end is then short.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    slow = lambda tests: sum(test.get_closest_marker("slow") is not None for test in tests)  # noqa: E731
    files_in_order = sorted(files.values(), key=slow, reverse=True)
    halves = [*files_in_order[::2], *files_in_order[1::2]]
    items[:] = [item for tests in halves for item in tests]


def example_rows(count: int) -> list[dict]:
    """Pairs in prep_data.py's format from examples/preferences.jsonl."""
    lines = (
        (ROOT / "examples" / "preferences.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    )
    rows = [json.loads(line) for line in lines]
    message = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    return [
        {
            "id": f"pair{i}",
            "prompt": message("user", row["prompt"]),
            "chosen": message("assistant", row["chosen"]),
            "rejected": message("assistant", row["rejected"]),
            "source": row["topic"],
        }
        for i, row in enumerate(rows)
    ]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random two-layer Llama with a byte-level BPE tokenizer of 600 tokens, as a model folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "model"
    texts = [row["chosen"][0]["content"] for row in example_rows(200)]
    chatml_tokenizer(texts, 600, more_special=["<|endoftext|>"]).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=600,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory) -> Path:
    """Data folder of 30 training and 8 validation pairs."""
    folder = tmp_path_factory.mktemp("pairs") / "examples"
    rows = example_rows(38)
    write_jsonl(folder / "train.jsonl", rows[:30])
    write_jsonl(folder / "val.jsonl", rows[30:])
    return folder


@pytest.fixture(scope="module")
def own_pairs(pairs_folder, tmp_path_factory) -> Path:
    """A data folder whose reference/ is not shared with other test files."""
    without = shutil.ignore_patterns("reference")  # what other tests have left there
    return shutil.copytree(pairs_folder, tmp_path_factory.mktemp("own") / "pairs", ignore=without)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """torch.compile falls back to eager code, without a word, when a function has been compiled too
    often in one process: what a test compiles is forgotten after it.
    """
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["stats"]:
        dynamo.reset()
        dynamo.utils.counters.clear()


@pytest.fixture(autouse=True)
def no_group_left_open():
    """A run that ends with an error in this process leaves its process group to the process's
    end.
    """
    yield
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def own_losses_are_forgotten():
    """A loss of one's own that a test registers in this process is no other test's loss."""
    losses = sys.modules.get("losses")
    tables = (losses.LOSSES, losses.COUPLES_BATCH, losses.NEEDS_TWO_PAIRS) if losses else ()
    before = [table.copy() for table in tables]
    yield
    for table, content in zip(tables, before):
        table.clear()
        table.update(content)


@pytest.fixture
def server():
    from doubles import Server

    double = Server()
    yield double
    double.httpd.shutdown()
    double.httpd.server_close()


def run_script(
    name: str | Path, *args, torchrun: int = 0, **environment
) -> subprocess.CompletedProcess:
    """Run a stage as a user would, in a process of its own (see processes.py). torchrun: number of
    ranks, which start without torchrun itself.
    """
    env = {**os.environ, **environment}
    return run_forked(ROOT / name, list(map(str, args)), env, ranks=max(1, torchrun))


def start_script(name: str | Path, arguments: list, output: Path, **environment) -> BaseProcess:
    """A stage that runs while the test goes on, with its output in the file `output`."""
    env, given = {**os.environ, **environment}, list(map(str, arguments))
    (process,) = started(ROOT / name, given, env, 1, output, output)
    return process
