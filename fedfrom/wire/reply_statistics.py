"""Reading and checking the Gram matrices or Fisher diagonals that a reply carries beside its model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from fedfrom.wire.contents import STATISTICS_KEY, records_of
from fedfrom.wire.frozen import statistics_names
from fedfrom.wire.records import to_state
from fedfrom.wire.sent import Sent
from fedfrom.wire.sizes import check_size


def read_statistics(content: RecordDict, sent: Sent, needs: str) -> dict[str, Tensor]:
    """Return a reply's Gram matrices by layer or Fisher diagonals by key, or raise ValueError where one is invalid."""
    record = records_of(content, ArrayRecord).get(STATISTICS_KEY)
    if not record:
        raise ValueError(
            f"expected {needs} statistics beside the arrays, in a record {STATISTICS_KEY!r}, found none: the client "
            f"computes them with fedfrom.client.{needs} and sends them with fedfrom.client.reply(statistics=)"
        )
    shapes: Mapping[str, tuple[int, ...]] = _gram_shapes(sent) if needs == "gram" else _fisher_shapes(sent)
    unread = statistics_names(sent.frozen) - shapes.keys()
    statistics = to_state(ArrayRecord({n: array for n, array in record.items() if n not in unread}), "statistics")
    for name, tensor in statistics.items():
        if name not in shapes:
            raise ValueError(
                f"statistics, {name[:80]!r}: expected the name of a layer that was sent, as fedfrom.client.{needs} "
                f"gives them, such as {next(iter(shapes), None)!r}, found another"
            )
        found = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        if tuple(tensor.shape) != shapes[name] or not tensor.is_floating_point():
            raise ValueError(f"statistics, {name!r}: expected floating-point {shapes[name]}, found {found}")
        check_size(tensor, name, "statistics")
        if (tensor.diagonal() if needs == "gram" else tensor).lt(0).any():
            raise ValueError(f"statistics, {name!r}: expected mean squares >= 0, found some below 0")
        if needs == "gram" and not _may_be_gram(tensor):
            raise ValueError(
                f"statistics, {name!r}: expected a Gram matrix X^T X, found one that is not symmetric or has "
                "an entry beyond its diagonal's"
            )
    return statistics


def _may_be_gram(matrix: Tensor) -> bool:
    """Return whether a matrix is symmetric with |G_ij|^2 <= G_ii G_jj, up to the rounding of half precision."""
    roots = matrix.diagonal().to(torch.float64).sqrt()
    slack = 1e-2 * roots[:, None] * roots
    wide = matrix.to(torch.float64)
    return bool(((wide - wide.T).abs() <= slack).all() and (wide.abs() <= roots[:, None] * roots + slack).all())


def _fisher_shapes(sent: Sent) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor's Fisher diagonal, which is the tensor's own, by key."""
    return {name: tuple(sent.state[key].shape) for name, layer in sent.layers.items() for key in layer.keys.values()}


def _gram_shapes(sent: Sent) -> dict[str, tuple[int, int]]:
    """Return the shape (d_in, d_in) of each layer's Gram matrix, for LoRA modules and 2-D weights, by layer name."""
    shapes = {}
    for name, layer in sent.layers.items():
        if layer.is_adapter and not layer.is_embedding:
            shapes[name] = sent.state[layer.keys["A"]]
        elif name.endswith("weight") and sent.state[layer.keys["tensor"]].ndim == 2:
            shapes[name.removesuffix(".weight")] = sent.state[layer.keys["tensor"]]
    return {name: (matrix.shape[1], matrix.shape[1]) for name, matrix in shapes.items() if matrix.ndim == 2}
