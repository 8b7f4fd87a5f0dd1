"""AlpacaEval through a real OpenAI-compatible server: with log-probabilities, and without.

    python bench/eval_server.py model.gguf results/ --bench_data data/alpaca_eval [--python PYTHON]

PYTHON has llama-cpp-python[server] (`pip install "llama-cpp-python[server]"`), which is no
dependency of the toolkit. Its server is started on loopback with --logits_all, without which it
gives no log-probabilities. judge.py is killed with SIGKILL after --kill_after judgements and run
again: what is stored must not be asked again. The server is then started without --logits_all:
judge.py must stop before it judges, and name the ways without log-probabilities. The last lines
are one JSON object. A small model's win rates say nothing.
"""

import argparse
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import closing, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The AMX kernels of llama.cpp crash on some virtual machines; a judge needs no speed.
LAUNCH = """
import runpy
from llama_cpp import llama_cpp
original = llama_cpp.llama_model_default_params
def without_amx():
    params = original()
    params.use_extra_bufts = False
    return params
llama_cpp.llama_model_default_params = without_amx
runpy.run_module("llama_cpp.server", run_name="__main__", alter_sys=True)
"""


@contextmanager
def served(args: argparse.Namespace, logprobs: bool):
    """The address of a server of the model, which is stopped afterwards."""
    options = {
        "model": args.model,
        "model_alias": "judge",
        "host": "127.0.0.1",
        "port": args.port,
        "n_ctx": args.n_ctx,
        "logits_all": logprobs,
    }
    command = [args.python, "-c", LAUNCH]
    command += [text for key, value in options.items() for text in (f"--{key}", str(value))]
    url = f"http://127.0.0.1:{args.port}/v1"
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=log, stderr=log) as server,
    ):
        try:
            wait_for(f"{url}/models", server)
            yield url
        finally:
            server.terminate()


def wait_for(url: str, server: subprocess.Popen) -> None:
    for _ in range(300):
        if server.poll() is not None:
            sys.exit(f"the server ended with {server.returncode}; is llama-cpp-python installed?")
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    sys.exit(f"{url}: no server after 150 s")


def judge(args: argparse.Namespace, url: str, name: str, kill_after: int | None = None) -> dict:
    """Run judge.py, and kill it once `kill_after` judgements are stored. Its exit code, how many
    judgements are stored, and the end of what it printed.
    """
    command = [sys.executable, "judge.py", str(args.results.resolve()), "--bench", "alpaca_eval"]
    command += ["--bench_data", str(args.bench_data.resolve()), "--judge", "judge"]
    command += ["--base_url", url, "--server_name", name, "--concurrency", "1"]
    environment = os.environ | {"OPENAI_API_KEY": "none"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            if kill_after is not None and count_stored(args.results, name) >= kill_after:
                process.kill()
            time.sleep(0.1)
        log.seek(0)
        printed = log.read().strip().splitlines()[-10:]
    stored = count_stored(args.results, name)
    return {"exit": process.returncode, "stored": stored, "printed": printed}


def count_stored(results: Path, name: str) -> int:
    """Judgements of the server `name`."""
    if not (results / "judgements.sqlite").is_file():
        return 0
    query = "SELECT COUNT(*) FROM judgements WHERE json_extract(request, '$.server') = ?"
    try:
        with closing(sqlite3.connect(results / "judgements.sqlite")) as db:
            return db.execute(query, (name,)).fetchone()[0]
    except sqlite3.OperationalError:  # the tables are being made
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("results", type=Path, help="with answers to AlpacaEval's instructions")
    parser.add_argument("--bench_data", type=Path, default=Path("data/alpaca_eval"))
    parser.add_argument(
        "--python", default=sys.executable, help="that has llama-cpp-python[server]"
    )
    parser.add_argument("--kill_after", type=int, default=2, help="judgements")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--n_ctx", type=int, default=2048)
    args = parser.parse_args()

    with served(args, logprobs=True) as url:
        killed = judge(args, url, "with log-probabilities", args.kill_after)
        resumed = judge(args, url, "with log-probabilities")
    with served(args, logprobs=False) as url:
        refused = judge(args, url, "without log-probabilities")
    print(json.dumps({"killed": killed, "resumed": resumed, "without": refused}, indent=1))


if __name__ == "__main__":
    main()
