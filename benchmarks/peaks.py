"""The peak of this process's resident memory since a chosen moment; Linux."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path


def status(field: str) -> int:
    """Return a number of bytes from /proc/self/status; getrusage would include the parent's memory before exec."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def forget_peak() -> int:
    """Reset the peak of resident memory, and return the resident bytes now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc keeps would be reused, and not raise the peak
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def since(start: int) -> int:
    """Return the peak's bytes above `start`."""
    return status("VmHWM") - start
