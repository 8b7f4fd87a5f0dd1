"""train_pref.py, whose seconds of a step end when the device has finished it: for benchmarks.

    python bench/timed_train.py [--own_forward] ARGUMENTS OF train_pref.py

train_pref.py reads the clock once the host knows the step's loss, when the optimiser's kernels may
still run on a GPU. --own_forward: log-probs from the model's own forward, which gives logits of
every position, prompts and padding included.
"""

import sys
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import train_pref  # noqa: E402
from pref.files import console  # noqa: E402
from pref.model import head  # noqa: E402
from pref.model.logps import ResponseLogps  # noqa: E402

take_step, packed_forward = train_pref.take_step, ResponseLogps.forward


def timed_step(*args, **kwargs) -> dict:
    begun = time.perf_counter()
    line = take_step(*args, **kwargs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return line | {"tok_per_s": line["tokens"] / (time.perf_counter() - begun)}


def own_forward(policy, batch, *_, **__):
    return packed_forward(policy, batch, own_attention="sdpa")


if __name__ == "__main__":
    train_pref.take_step = timed_step
    if "--own_forward" in sys.argv:
        sys.argv.remove("--own_forward")
        ResponseLogps.forward = own_forward
        head.wide = lambda _: nullcontext()  # its logits in bf16, as in its own training
    console.run_main(train_pref.main)
