"""The tests of `second_device.py`, in a process of their own: what torch imitates cannot be taken back."""

import subprocess
import sys

from conftest import ROOT


def test_on_a_second_device():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/second_device.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
