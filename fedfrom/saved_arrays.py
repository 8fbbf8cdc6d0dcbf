"""A record's arrays as safetensors holds them, and back: their order, layout in memory and bfloat16 are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from safetensors.torch import load_file

from fedfrom.wire.records import BF16, to_record, to_state_dict

_DTYPES = {"bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))}
_DTYPES |= {"float16", "float32", "float64"}


def words(error: Exception) -> str:
    """Return an error's type and what it says."""
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"


def to_tensors(record: ArrayRecord) -> tuple[dict[str, torch.Tensor], list[list[str]]]:
    """Return a record's arrays, and [key, order in memory] in its order, which safetensors keeps neither of."""
    arrays: dict[str, torch.Tensor] = {}
    layout = []
    for key, array in record.items():
        if key == "__metadata__" or key != key.encode(errors="replace").decode():  # the one is safetensors' own
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
    arrays = load_file(path)
    record = ArrayRecord()
    for key, order in layout:
        tensor = arrays.pop(key)
        if tensor.dtype == torch.bfloat16:
            record.update(to_record({key: tensor}))
        else:
            record[key] = Array(np.asarray(tensor.numpy(), order=order))  # type: ignore[call-overload]
    return record
