"""glibc's allocator, told to keep what it has: large results are reused instead of faulted in anew.

By default glibc returns every block above a few MiB to the kernel as soon as it is freed, and the next
operator pays a page fault for each 4 KiB it writes. `python -m experiments.bench allocator` measures it.
"""

from __future__ import annotations

import ctypes
import platform

# mallopt parameter numbers, from <malloc.h>
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_SETTINGS = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next results; call once, before the first tensor.

    True when set; False, and nothing is done, where the C library is not glibc (other systems, musl).
    The price is that memory, once used, stays with the process. A preloaded tcmalloc or jemalloc takes
    glibc's place and ignores it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(ctypes.c_int(name), ctypes.c_int(value)) == 1 for name, value in _SETTINGS)
