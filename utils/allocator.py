"""What the C library's malloc does with memory that was freed."""

from __future__ import annotations

import ctypes
import os
import platform

# of malloc.h; see mallopt(3)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
NEVER = -1
BLOCK_SIZES = (2**30, 2**25)  # bytes; not every glibc takes more than the second


def keep_freed_memory() -> bool:
    """Let glibc reuse what is freed, where it would give large blocks back to the system.

    A training step on a CPU frees and asks for the same large tensors as the one before. Given
    back, each of their pages is zeroed and mapped anew. Settings from outside (`MALLOC_...`,
    `GLIBC_TUNABLES`) are left as they are.

    Returns:
        Whether it was done.
    """
    is_set = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if is_set or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Setting one ends glibc's own adjustment of both, so it is both or none.
    taken = any(mallopt(M_MMAP_THRESHOLD, size) for size in BLOCK_SIZES)
    return taken and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
