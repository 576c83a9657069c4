"""Keeps glibc's allocator from returning memory to the system in each training step.

Training frees and allocates tensors of many megabytes all the time. By default glibc maps each of them anew,
and the kernel has to clear its pages first, which takes a third of the time of a step.
"""
import ctypes
from contextlib import suppress

# Parameters of mallopt(3), and the largest value that they can have.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MAX_BYTES = 2 ** 31 - 1


def keep_freed_memory():
    """Reuse freed memory of this process instead of returning it. Without glibc, nothing happens."""
    with suppress(AttributeError, TypeError):  # other C libraries have no mallopt, and Windows none at all
        mallopt = ctypes.CDLL(None).mallopt
        # older versions of glibc refuse thresholds of more than 32 MiB
        if mallopt(M_MMAP_THRESHOLD, MAX_BYTES) or mallopt(M_MMAP_THRESHOLD, 2 ** 25):
            mallopt(M_TRIM_THRESHOLD, MAX_BYTES)
