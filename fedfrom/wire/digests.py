"""Digests of arrays' numbers, by key: whether a run that goes on was given what it started from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from flwr.app import Array, ArrayRecord

from fedfrom.wire.records import to_state

_BYTES = 8  # a slip is told apart, not an attack


def digests(record: ArrayRecord) -> dict[str, str]:
    """Return a digest of the numbers of each array, as hexadecimal text, by key."""
    return {key: hashlib.blake2b(_numbers(array), digest_size=_BYTES).hexdigest() for key, array in record.items()}


def differing(saved: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """Return the keys, in the order of `here`, whose digests are not the same."""
    return [key for key, digest in here.items() if saved.get(key) != digest]


def _numbers(array: Array) -> memoryview | bytes:
    """Return the bytes of an array's numbers in C order: the same for arrays that are stored in other orders."""
    try:
        (tensor,) = to_state(ArrayRecord({"": array})).values()
    except ValueError:  # whoever merges it says what is wrong
        return array.data
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
