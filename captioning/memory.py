"""What becomes of large blocks of memory that are no longer needed."""

import ctypes
import platform

# The parameters of mallopt(3), malloc.h of glibc.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_KEPT = {_MMAP_MAX: 0, _TRIM_THRESHOLD: (1 << 31) - 1, _TOP_PAD: 64 << 20}


def keep_memory() -> bool:
    """Let this process keep what it frees, for the next batch or step wants the same again.

    glibc gives blocks from 32 MiB on back to the system and gets them anew, page by page and filled with zeros. The
    feature maps of a CNN are such blocks; docs/performance.md has what keeping them is worth. A process never takes
    more memory for it than it needed at its highest, but for what lies between blocks in use. There is no way back:
    once a threshold is set, glibc no longer adapts it.

    Returns:
        Whether that was done; only glibc can be told.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    done = [mallopt(name, value) for name, value in _KEPT.items()]
    return all(done)
