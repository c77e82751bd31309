"""What the C library does with memory that is no longer needed, counted by the system."""

import os
import platform
import subprocess
import sys

import pytest

from lit_llama.devices.memory import GLIBC_SETTINGS

PAGES = """
import ctypes, resource
from lit_llama.devices.memory import keep_freed_memory

libc, size = ctypes.CDLL(None), 2**24
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has these settings")
@pytest.mark.parametrize(("setting", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "100000"}, False)])
def test_freed_memory_is_used_again(setting, kept):
    """16 MB take 4,096 pages, or 8 large ones; they are new ones if what starts the process says so."""
    env = {name: value for name, value in os.environ.items() if name not in GLIBC_SETTINGS} | setting
    run = subprocess.run([sys.executable, "-c", PAGES], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (int(run.stdout) < 6) == kept
