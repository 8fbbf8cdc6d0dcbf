"""Digests of arrays' numbers, by key, which tell whether a resumed run was given its own initial arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from flwr.app import Array, ArrayRecord

from fedfrom.tensor_bytes import bytes_of
from fedfrom.wire.records import to_state

_BYTES = 8  # enough against mistakes, not against attacks


def digests(record: ArrayRecord) -> dict[str, str]:
    """Return a digest of the numbers of each array, as hexadecimal text, by key."""
    return {key: hashlib.blake2b(_numbers(array), digest_size=_BYTES).hexdigest() for key, array in record.items()}


def differing(saved: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """Return the keys whose digests differ, in the order of `here`."""
    return [key for key, digest in here.items() if saved.get(key) != digest]


def _numbers(array: Array) -> memoryview | bytes:
    """Return the bytes of an array's numbers in C order, whatever the order in which the array stores them."""
    try:
        (tensor,) = to_state(ArrayRecord({"": array})).values()
    except ValueError:  # an unreadable array is an error of the merge, not of its digest
        return array.data
    return bytes_of(tensor.contiguous().reshape(-1))
