"""The C library's heap, set up for training on a CPU under Linux.

A step allocates and frees the same large tensors over and over. As it comes, glibc asks the system
for every block above 32 MiB and gives it back when it is freed, and gives back the free end of its
heap. The system clears each page again before it hands it out: a fifth of the time of a step.
"""

import ctypes
import mmap
import platform
import sys

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory(expected: int) -> bool:
    """Let freed memory stay in this process for its next step, and let the first `expected` bytes
    of its heap lie on huge pages, where the system has them for programs that ask (THP "madvise").

    Returns whether the C library could be told so: glibc on Linux. Numbers do not depend on it.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    # 1) No block is mapped on its own, and the heap is never cut. In this order: the first one
    #    alone would move large blocks to where the second one's default gives them back.
    if not (libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1)):
        return False

    # 2) A block of the expected size makes the heap grow. Its pages are marked and, freed, are
    #    where later blocks go. No page of it is touched, so this takes no memory.
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.argtypes = (ctypes.c_void_p,)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if block := libc.malloc(expected):  # NULL where the system limits address space
        start = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
        libc.madvise(start, block + expected - start, mmap.MADV_HUGEPAGE)
        libc.free(block)
    return True
