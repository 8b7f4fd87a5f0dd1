"""Peak memory of this process."""

import sys

import torch


def resident_bytes() -> int:
    """The largest resident set of this process so far."""
    import resource  # Unix only: imported here so that the module can be imported anywhere

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 2**10  # bytes on macOS, KiB on Linux


def peak_gib(device: torch.device) -> float:
    """Peak memory of this rank so far, GiB: allocated on its GPU, or resident in RAM on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resident_bytes() / 2**30
