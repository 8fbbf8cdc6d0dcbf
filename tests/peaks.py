"""Peaks of resident memory, each of a process of its own: a process's peak only ever rises."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# getrusage would count what the parent had before exec
PEAK = """
import re
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
"""

reads_peaks = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def printed_last(code: str, *arguments: str) -> float:
    """Return the number that the code prints last, which may call peak(): the MiB resident at most so far.

    glibc is told to map what is larger than 128 KiB: on its heap freed blocks stay for as long as what lies behind
    them, by chance of the addresses (54 to 106 MiB were measured where 36 were held).
    """
    found = subprocess.run(
        [sys.executable, "-c", PEAK + code, *arguments],
        cwd=ROOT,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 17)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    return float(found.stdout.split()[-1])
