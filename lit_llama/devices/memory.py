"""What the C library does with memory that is no longer needed."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
GLIBC_SETTINGS = "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"  # of who starts the process


def keep_freed_memory() -> None:
    """From now on let the memory of tensors that are gone serve new ones, as on a GPU.

    Otherwise glibc gives each large tensor back to the system and asks for new memory at the next step, whose pages the
    system first fills with zeros. That takes up to a tenth of a training step on a CPU. The price is that the process
    stays as large as it was at its largest from now on. Settings of glibc in the environment take precedence, and other
    C libraries stay as they are. See mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or any(name in os.environ for name in GLIBC_SETTINGS):
        return
    # Bytes from which on a tensor has memory of its own, which is given back; older versions refuse more than 32 MB.
    if mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25):
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
