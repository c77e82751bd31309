"""What the C library does with memory that is no longer needed, counted by the system."""

import os
import subprocess
import sys

import pytest

PAGES = """
import ctypes, resource
from lit_llama.devices.memory import keep_freed_memory

libc, size = ctypes.CDLL(None), 2**26
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def use():
    block = libc.malloc(ctypes.c_size_t(size))
    libc.memset(block, 1, size)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

keep_freed_memory()
first = use()
print(use() - first)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
@pytest.mark.parametrize(("setting", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "100000"}, False)])
def test_freed_memory_is_used_again(setting, kept):
    """64 MB take 16,384 pages, or 32 large ones; they are new ones if what starts the process says so."""
    run = subprocess.run([sys.executable, "-c", PAGES], env=os.environ | setting, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (int(run.stdout) < 20) == kept
