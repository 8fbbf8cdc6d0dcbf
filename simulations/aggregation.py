"""Distance of a merged adapter from the mean of the clients' products BA, which the mean of the factors is not."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedfrom.merging import LowRank
from fedfrom.merging.peft import layers as L


def distance_from_mean(
    before: Mapping[str, Tensor],
    states: Sequence[Mapping[str, Tensor]],
    examples: Sequence[float],
    merged: Mapping[str, Tensor],
) -> float | None:
    """Return ||merged - M||_F / ||M - W||_F over all LoRA modules, M = sum_i n_i/n W_i the mean of the products.

    0 means FedAvg on products without truncation. Other weights and truncation make the distance larger.

    Parameters
    ----------
    before : Mapping[str, Tensor]
        W, the global adapter's state that the clients received.
    states : Sequence[Mapping[str, Tensor]]
        W_i, each client's reply, all at one scaling.
    examples : Sequence[float]
        n_i.
    merged : Mapping[str, Tensor]
        The strategy's result, in the shapes of `before`.

    Returns
    -------
    float | None
        None without LoRA modules, and where no client changed any.
    """
    layers = [layer for layer in L.find_layers(before, "global arrays").values() if layer.is_adapter]
    of = [{layer.name: layer for layer in L.find_layers(state, "reply").values()} for state in states]
    shares = [count / sum(examples) for count in examples]
    off = moved = 0.0
    for layer in layers:
        products = [L.read_adapter(own[layer.name], state, 1.0, "reply") for own, state in zip(of, states, strict=True)]
        mean = LowRank.sum(products, shares)
        off += (L.read_adapter(layer, merged, 1.0, "merged") - mean).norm() ** 2
        moved += (mean - L.read_adapter(layer, before, 1.0, "global arrays")).norm() ** 2
    return (off / moved) ** 0.5 if moved else None
