"""Stages as processes of their own, without six seconds for each of them to import its libraries.

A server process imports torch, transformers and peft once, and forks a child for every script. The
child runs the script as `__main__` with its own arguments, environment and output. Nothing of the
toolkit or of a test is loaded in it before that.
"""

import faulthandler
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

TIMEOUT_S = 240
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(
    ["torch", "torch.distributed.fsdp", "transformers.modeling_utils", "bitsandbytes", "peft"]
)


def run_forked(
    script: Path, arguments: list[str], environment: dict[str, str], ranks: int = 1
) -> subprocess.CompletedProcess:
    """Run `script` in one process, or in several that join as torchrun's ranks do. Like torchrun,
    the first that fails ends the others.
    """
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        code = wait_for(started(script, arguments, environment, ranks, stdout, stderr))
        return subprocess.CompletedProcess(
            args=[str(script), *arguments],
            returncode=code,
            stdout=stdout.read_text(encoding="utf-8"),
            stderr=stderr.read_text(encoding="utf-8"),
        )


def run_ranks(
    script: Path, environment: dict[str, str], ranks: int, within_s: float
) -> tuple[list[int | None], str]:
    """Run `script` in several ranks of which none is ended because another one fails. Returns their
    exit codes, None for one that is still running after `within_s`, and what they said on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        processes = started(script, [], environment, ranks, stdout, stderr)
        until = time.monotonic() + within_s
        for process in processes:
            process.join(max(0, until - time.monotonic()))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
        return codes, stderr.read_text(encoding="utf-8")


def started(
    script: Path,
    arguments: list[str],
    environment: dict[str, str],
    ranks: int,
    stdout: Path,
    stderr: Path,
) -> list[BaseProcess]:
    """The processes of `script`, with their output in these two files."""
    stdout.touch()
    stderr.touch()
    environments = [environment]
    if ranks > 1:
        environments = [environment | variables for variables in rank_variables(ranks)]
    processes = []
    for variables in environments:
        given = (str(script), arguments, variables, str(stdout), str(stderr))
        processes.append(forkserver.Process(target=run_as_main, args=given, daemon=True))
        processes[-1].start()
    return processes


def run_as_main(
    script: str, arguments: list[str], environment: dict[str, str], stdout: str, stderr: str
) -> None:
    """In the child: become `python script arguments`."""
    for number, path in ((1, stdout), (2, stderr)):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    faulthandler.enable(sys.__stderr__)  # a crash in native code leaves its Python stack there
    os.environ.clear()
    os.environ.update(environment)
    tests = str(Path(__file__).parent)
    sys.path[:] = [str(Path(script).parent), *(path for path in sys.path if path != tests)]
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def rank_variables(ranks: int) -> list[dict[str, str]]:
    """The environment variables that torchrun gives its ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def wait_for(processes: list[BaseProcess]) -> int:
    """The exit code of the first process that fails, after which the others are ended; 0 if none
    does.
    """
    until = time.monotonic() + TIMEOUT_S
    while any(process.exitcode is None for process in processes):
        failed = [process.exitcode for process in processes if process.exitcode]
        if failed or time.monotonic() > until:
            for process in processes:
                process.terminate()
                process.join()
            assert failed, f"still running after {TIMEOUT_S} s"
            return failed[0]
        time.sleep(0.01)
    return next((process.exitcode for process in processes if process.exitcode), 0)
