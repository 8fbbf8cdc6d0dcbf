"""MultiKrum (Blanchard et al., 2017): which of the clients' whole updates lie among the others, and are merged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedfrom.merging.batches import updated
from fedfrom.merging.clients import Client, Round
from fedfrom.merging.deltas import adapter_deltas, plain_tensors
from fedfrom.merging.inputs import check_inputs
from fedfrom.merging.linalg import samples
from fedfrom.merging.linalg.lowrank import norms_and_cosines
from fedfrom.merging.sources import check_norms


def multikrum(inner: Tensor, attackers: int) -> list[int]:
    """Return the n - f clients with the lowest Krum scores, in the order given.

    A client's score is the sum of its squared distances to its n - f - 2 nearest others.

    Parameters
    ----------
    inner : Tensor
        (n, n) float64 inner products of the clients' updates: see `gram_of_updates`.
    attackers : int
        f >= 0, how many clients may be attackers.

    Raises
    ------
    ValueError
        n < 2f + 3: the attackers could outvote the others.

    Notes
    -----
    Blanchard et al. (2017), section 4: Multi-Krum averages the m best of n; m = n - f, the number of honest clients.
    Here what is selected is handed to the merging method instead. Ties go to who comes first.
    """
    n = len(inner)
    if n < 2 * attackers + 3:
        raise ValueError(f"select: expected at least 2 * {attackers} + 3 valid replies for MultiKrum, found {n}")
    sizes = inner.diagonal()
    distances = (sizes[:, None] + sizes - 2 * inner).clamp_min(0).fill_diagonal_(float("inf"))
    scores = distances.sort(dim=1).values[:, : n - attackers - 2].sum(dim=1).tolist()
    return sorted(sorted(range(n), key=scores.__getitem__)[: n - attackers])


def gram_of_updates(clients: Sequence[Client], shared: Round) -> Tensor:
    """Return the (n, n) float64 inner products of the clients' whole updates, adapters as products BA.

    So they do not depend on the factors that a product is sent as: for any invertible G, B G and G^-1 A are the same
    client, which distances between factors would tell apart. Buffers, integers and what goes beside a LoRA module
    (biases, magnitudes) are left out. Without configs all scalings count as 1, also where adapters stand beside plain
    tensors.
    """
    inputs = check_inputs(clients, shared, needs=None, pair=True)
    total = torch.zeros(len(clients), len(clients), dtype=torch.float64)
    for name in updated(inputs):
        if inputs.sent[0].layers[name].is_adapter:
            found = adapter_deltas(inputs, name)[2]
            norms, cosines = norms_and_cosines(found)
            assert cosines is not None
            sizes = torch.tensor(check_norms(norms, inputs, name), dtype=torch.float64)
            total += sizes[:, None] * cosines * sizes
        else:
            _, values, references = plain_tensors(inputs, name)
            total += samples.gram(values, references)
    return total
