"""A record's arrays <-> the tensors of a safetensors file: bfloat16, and the orders of keys and memory, are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from safetensors.torch import load_file

from fedfrom.wire.records import BF16, to_array, to_state_dict

_DTYPES = {"bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))}
_DTYPES |= {"float16", "float32", "float64"}


def words(error: Exception) -> str:
    """Return an error's type and what it says."""
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"


def to_tensors(record: ArrayRecord) -> tuple[dict[str, torch.Tensor], list[list[str]]]:
    """Return a record's arrays by key, and a list of [key, "C" or "F", the order in memory] in the record's order.

    safetensors keeps neither of the two orders.

    Raises
    ------
    ValueError
        safetensors can't hold a key or an array. The error names the key.
    """
    arrays: dict[str, torch.Tensor] = {}
    layout = []
    for key, array in record.items():
        if key == "__metadata__" or key != key.encode(errors="replace").decode():  # safetensors uses __metadata__
            raise ValueError(f"checkpoint, {key!r}: expected a key that safetensors can hold: UTF-8, not __metadata__")
        try:
            if array.stype == BF16:
                arrays |= to_state_dict(ArrayRecord({key: array}))
                layout.append([key, "C"])
                continue
            value = array.numpy()
        except Exception as error:  # malformed bytes fail in numpy in many ways
            raise ValueError(f"checkpoint, {key!r}: expected a readable array, found {words(error)}") from error
        if value.dtype.name not in _DTYPES or not value.dtype.isnative:
            raise ValueError(
                f"checkpoint, {key!r}: expected a dtype that safetensors holds ({', '.join(sorted(_DTYPES))}, in this "
                f"machine's byte order), found {value.dtype} ({value.dtype.str})"
            )
        is_fortran = value.flags.f_contiguous and not value.flags.c_contiguous
        layout.append([key, "F" if is_fortran else "C"])
        # ascontiguousarray would give a number a dimension
        arrays[key] = torch.from_numpy(np.asarray(value, order="C"))
    return arrays, layout


def read_arrays(path: Path, layout: list[list[str]]) -> ArrayRecord:
    """Return the record whose arrays `to_tensors` returned, from the file that they were saved to."""
    arrays = load_file(path)
    record = ArrayRecord()
    for key, order in layout:
        tensor = arrays.pop(key)
        record[key] = Array(np.asfortranarray(tensor.numpy())) if order == "F" else to_array(key, tensor)
    return record
