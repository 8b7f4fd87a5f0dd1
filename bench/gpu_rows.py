"""What the parts of the GPU benchmark share: rows, and what the card can do.

A part prints one JSON object a line for each of its rows, as soon as it has it, so that nothing is
lost if the part fails or runs out of time. bench/gpu_run.py collects them.
"""

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Dense bf16 TFLOP/s and memory bandwidth in GB/s, from the makers' data sheets; the first name that
# a card's name contains.
CARDS = {
    "H200": (989, 4800),
    "H100 NVL": (835, 3900),
    "H100 PCIe": (756, 2000),
    "H100": (989, 3350),
    "A100-SXM4-80GB": (312, 2039),
    "A100 80GB": (312, 1935),
    "A100": (312, 1555),
}


def emit(row: str, **values) -> dict:
    """Print a row, and return it."""
    line = {"row": row, **values}
    print(json.dumps(line), flush=True)
    return line


def attempt(row: str, work: Callable[[], dict]) -> dict:
    """The row with what `work` returns, or with why it failed: no failure ends a part."""
    begun = time.monotonic()
    try:
        values = work()
    except (Exception, SystemExit) as error:  # whatever it is, the next row may still be had
        values = {"failed": reason_of(str(error) or type(error).__name__)}
    return emit(row, **values, took_s=round(time.monotonic() - begun, 1))


def reason_of(text: str) -> str:
    """One line for what a process printed before it failed."""
    if found := re.search(r"out of memory", text, re.IGNORECASE):
        return found.group().lower()
    errors = re.findall(r"^(?:\w+\.)*(?:\w*Error|error)\b.*$", text, re.MULTILINE)
    lines = [line.strip() for line in errors or text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


def card() -> str:
    """The name of the GPU, or 'cpu'."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def peaks_of(name: str) -> tuple[float, float] | None:
    """(bf16 FLOP/s, bytes/s) of a card by its name; None if it is not known."""
    for part, (tflops, gigabytes) in CARDS.items():
        if part.replace("-", " ").lower() in name.replace("-", " ").lower():
            return tflops * 1e12, gigabytes * 1e9
    return None
