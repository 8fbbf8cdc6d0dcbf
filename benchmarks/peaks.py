"""The peak of this process's resident memory, from any moment on; Linux."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path


def status(field: str) -> int:
    """Return a number of bytes from /proc/self/status; getrusage would count what the parent had before exec."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def forget_peak() -> int:
    """Start a new peak of resident memory here, and return what it starts from."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what others left there would be used again, and not be seen
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def since(start: int) -> int:
    """Return the bytes that were taken at the peak beyond what it started from."""
    return status("VmHWM") - start
