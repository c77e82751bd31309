"""What the C library does with memory that is no longer needed."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_SETTINGS = "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"  # of who starts the process


def keep_freed_memory() -> None:
    """From now on let the memory of tensors that are gone serve new ones, as on a GPU.

    Otherwise glibc returns each large tensor to the system and asks for new memory at the next step, whose pages the
    system first fills with zeros: a tenth of a training step on a CPU, and its noise. The price is that the process
    stays as large as it was at its largest. Settings of glibc in the environment take precedence, and other C libraries
    stay as they are. See mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and not any(name in os.environ for name in _SETTINGS):
        mallopt(_M_MMAP_THRESHOLD, 2**30)  # bytes from which on a tensor has memory of its own
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
