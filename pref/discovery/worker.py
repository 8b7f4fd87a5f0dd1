"""The process in which candidates are read and tried: started by workers.py, shut in by confine.py.

    python -m pref.discovery.worker

The first line of stdin has the settings, the first line of stdout what confines it, or {"fault"}.
After that, each line of JSON is answered by one. What it costs to start, the import of torch above
all, is paid once and not once a candidate. Who ends what:

    a candidate that computes too long      SIGPROF, after its seconds of CPU time
    one that waits for ever                 the parent kills this process
    memory                                  RLIMIT_AS: an error, which stops the candidate
    the parent has died, or is done         the end of stdin
"""

import json
import os
import signal
import sys
import warnings
from pathlib import Path

from pref.discovery import confine
from pref.files.console import UserError

# Before torch is imported. One thread: a confined process cannot start others, and candidates run
# side by side in workers. No GPU: the work is small.
ENVIRONMENT = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
) | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}


def main() -> None:
    settings = json.loads(sys.stdin.readline())
    replies = sys.stdout
    os.environ.update(ENVIRONMENT)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # it ends the process, whoever started it
    # 1) What may confine this process, while it has a single thread and can still fork.
    layers = confine.usable(settings["without"])
    # 2) All that is needed later, used once.
    import torch

    from pref.discovery import stages
    from pref.discovery.features import Features

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    given = {"scale": settings["visited"], "batch": settings["batch"], "features": None}
    try:
        if settings["features"] is not None:
            given["features"] = Features.load(Path(settings["features"]))
    except UserError as error:
        say(replies, {"fault": str(error)})
        return
    stages.warm_up(**given)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stderr.fileno())
    # 3) From here on: candidates.
    say(replies, {"sandbox": confine.confine(layers)})
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        reply = stages.answer(request["do"], request["job"], **given)
        signal.setitimer(signal.ITIMER_PROF, 0)
        say(replies, reply)


def say(stream, reply: dict) -> None:
    stream.write(json.dumps(reply, allow_nan=False) + "\n")
    stream.flush()


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the parent has died
        os._exit(1)
