"""Keep freed memory in the process: a training step frees and asks for the same blocks again and again."""

from __future__ import annotations

import ctypes

# From glibc's malloc.h. 32 MiB is the largest size that it takes from its own heap.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
MEBIBYTE = 2**20


def keep_freed_memory() -> None:
    """Stop glibc from giving freed memory back, for the rest of the process; do nothing elsewhere.

    By default glibc gives large blocks back at once, and the kernel clears and maps each page anew when the next step
    asks for them: some 10,000 page faults and an eighth of the time of a training step on the CPU.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc
        return
    set_option(M_MMAP_THRESHOLD, 32 * MEBIBYTE)
    set_option(M_TRIM_THRESHOLD, 2**31 - 1)
    set_option(M_TOP_PAD, 64 * MEBIBYTE)
