"""How torch's allocator takes memory from a GPU. train_pref.py imports this module before torch,
which reads the settings once.

Micro-batches differ in length, and so do their tensors. By default the allocator would keep blocks
of each size that no other size can use. Expandable segments grow instead, and every size shares
them. They are not the default in torch because some uses of its memory by other processes and
libraries, which there are none of here, do not work with them.
"""

import os
from collections.abc import MutableMapping

# The name since torch 2.9, and the one before. torch reads the first that is set.
NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def expand_segments(environment: MutableMapping[str, str]) -> None:
    """Set the variables, unless the user has set one of them."""
    if not any(name in environment for name in NAMES):
        environment.update(dict.fromkeys(NAMES, "expandable_segments:True"))


expand_segments(os.environ)
