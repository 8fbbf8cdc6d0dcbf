"""A body's answers and a task's labels as text in the study's frame, for intervals over examples."""

import base64
import zlib

import numpy as np
from numpy.typing import NDArray


def packed(values: NDArray[np.generic]) -> str:
    """Return (n,) classes or scores as text: base64 of what zlib made of uint8 classes, or of float16 scores."""
    dtype = np.float16 if np.issubdtype(values.dtype, np.floating) else np.uint8
    return base64.b64encode(zlib.compress(values.astype(dtype).tobytes(), 9)).decode()


def unpacked(text: str, regression: bool) -> NDArray[np.generic]:
    """Return what `packed` was given: (n,) int64 classes, or float32 scores with the digits that float16 has."""
    raw = zlib.decompress(base64.b64decode(text))
    return np.frombuffer(raw, np.float16).astype(np.float32) if regression else np.frombuffer(raw, np.uint8).astype(int)
