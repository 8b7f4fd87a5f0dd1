"""What a sweep makes of a crash, a diverging run, a lost adapter, a judge that goes down, and a
full disk.

    sudo python bench/sweep_faults.py --out OUT      # root mounts a small tmpfs for the full disk

A random two-layer model, a judge on loopback; every fault is a real one. After each the end of the
sweep's output and its exit code; the same command, once the fault is gone, must do the rest.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from kill_sweep import make_inputs, rate
from kill_train import ROOT

sys.path.insert(0, str(ROOT / "tests"))
from doubles import HANG_UP, Server  # noqa: E402

CRASH = """
import os
import traceback
import torch.nn.functional as F

def crash(pairs, *, beta: float = 0.1):
    training = any(frame.name == "take_step" for frame in traceback.extract_stack())
    if training and os.path.exists(os.environ["CRASH_IN"]):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    losses = F.softplus(-beta * pairs.rho)
    return losses, {"preference": losses}
"""
TRAIN = (
    "--global_batch 8 --per_device_batch 4 --packing off --prefix_sharing off --eval_steps 4 "
    "--save_steps 2 "
    "--max_nonfinite 2 --lora_r 64 --max_length 256 --dtype float32 --compile off --epochs 1"
)


def sweep(out: Path, url: str, **settings) -> subprocess.Popen:
    env = os.environ | {
        "MODEL": str(out / "model"),
        "DATA": str(out / "pairs"),
        "MT_BENCH": str(out / "mt_bench"),
        "RESULTS": str(out / "results"),
        "JUDGE": "counting-judge-7b",
        "BASE_URL": url,
        "OPENAI_API_KEY": "x",
        "JOBS": "2",
        "TRAIN_ARGS": TRAIN,
        "GEN_ARGS": "--num_questions 8 --max_new_tokens 12 --dtype float32",
        "JUDGE_ARGS": "--concurrency 2 --max_retries 1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
        "LRS": "2e-2",
        "CRASH_IN": str(out / "crash"),
        **settings,
    }
    command = ["bash", str(ROOT / "sweep.sh"), "quick", "--yes"]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def tell(title: str, process: subprocess.Popen) -> tuple[int, str]:
    """Print the events in the output, and everything after the last of them."""
    output = process.communicate()[0]
    print(f"== {title}: exit code {process.returncode}")
    event = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  (crashed|failed|diverged|end)")
    lines = output.splitlines()
    end = max((n for n, line in enumerate(lines) if event.match(line)), default=0)
    shown = [line[:200] for n, line in enumerate(lines) if n >= end or event.match(line)]
    print("\n".join(shown), flush=True)
    return process.returncode, output


def full_disk(out: Path, url: str) -> list[bool]:
    """Results on a small file system that somebody fills while the third run trains."""
    disk = out / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=150m", "tmpfs", str(disk)], check=True)
    try:
        given = {
            "RESULTS": str(disk / "results"),
            "STAGES": "train",
            "LOSSES": "dpo td_dpo",
            "BETAS": "0.05 0.5",
        }
        process = sweep(out, url, **given)
        while len(list(disk.glob("results/*/summary.json"))) < 2 and process.poll() is None:
            time.sleep(0.05)
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "filler").write_bytes(b"x" * (free - 300_000))
        code, output = tell("a full disk", process)
        (disk / "filler").unlink()
        code_then, _ = tell("the same command with room", sweep(out, url, **given))
        whole = len(list(disk.glob("results/*/adapter/adapter_model.safetensors")))
        return [code == 1, "No space left on device" in output, code_then == 0, whole == 4]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True)
    make_inputs(out)
    (out / "crash.py").write_text(CRASH)
    (out / "crash").touch()
    server = Server()

    def answer(body: dict) -> tuple[int, dict]:
        if len(server.requests) < 20:
            return rate(body)
        server.httpd.socket.close()  # nobody listens there from now on
        return HANG_UP, {}

    server.answer = answer
    given = {
        "LOSSES": "dpo crash discopop td_dpo",
        "BETAS": "0.05",
        "BETAS_discopop": "2.5",
        "TRAIN_ARGS_discopop": "--discopop_form published --learning_rate 3 --lora_targets "
        "q_proj,lm_head",
        "TRAIN_ARGS_crash": f"--loss_file {out / 'crash.py'}:crash",
    }
    checks = []
    code, output = tell(
        "a crash, a diverging run, a judge that goes down", sweep(out, server.url, **given)
    )
    checks += [
        code == 1,
        "diverged, which is a result: discopop_b2.5" in output,
        "illegal memory access" in output,
        output.count("once more, from its last checkpoint") == 1,
        "judgements are missing" in output,
    ]

    (out / "crash").unlink()
    server = Server()
    server.answer = rate
    (adapter,) = (out / "results").glob("dpo_*/adapter")
    adapter.rename(out / "adapter")
    code, output = tell("repaired, but an adapter is lost", sweep(out, server.url, **given))
    checks += [code == 1, "its adapter is missing; restore it" in output]

    (out / "adapter").rename(adapter)
    code, output = tell("put back", sweep(out, server.url, **given))
    statuses = [
        json.loads(p.read_text())["status"]
        for p in sorted((out / "results").glob("*/summary.json"))
    ]
    checks += [code == 0, statuses == ["finished", "diverged", "finished", "finished"]]
    checks += full_disk(out, server.url)
    print(f"{sum(checks)} of {len(checks)} checks hold: {checks}")
    return 0 if all(checks) else 1


if __name__ == "__main__":
    sys.exit(main())
