"""Heads whose bias is fitted anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedfrom.errors import BadInput
from fedfrom.files.folders import Model
from fedfrom.files.heads import Head
from fedfrom.tuning.answers import ACCURACY, Answers


def bias_key(head: Head, outputs: int) -> str | None:
    """Return the name of the bias that is added to a head's outputs: that beside its matrix of as many rows."""
    for key, tensor in head.items():
        beside = key.removesuffix("weight") + "bias"
        if key.endswith(".weight") and tensor.ndim == 2 and tensor.shape[0] == outputs and beside in head:
            return beside
    return None


def check_biases(models: Sequence[Model], heads: Sequence[Head], outputs: Sequence[int]) -> None:
    """Raise BadInput for the first input whose head has no bias."""
    for model, head, number in zip(models, heads, outputs, strict=True):
        if bias_key(head, number) is None:
            raise BadInput(
                f"--refit-bias: {model.name}: expected a classifier's head with a bias, saved in the adapter, found "
                f"{', '.join(head) or 'no head'}: leave --refit-bias out"
            )


def with_biases(heads: Sequence[Head], answers: Sequence[Answers]) -> list[Head]:
    """Return the heads with what `Answers.bias` gives added to their bias; a regression head as it is."""
    found = []
    for head, answer in zip(heads, answers, strict=True):
        bias, key = answer.bias(), bias_key(head, answer.outputs.shape[1])
        if bias is None or key is None or answer.metric != ACCURACY:
            found.append(head)
            continue
        old = head[key]
        new = old.double() + torch.from_numpy(bias).to(old.device)
        found.append({**head, key: new.to(old.dtype)})
    return found
