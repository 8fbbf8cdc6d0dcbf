"""The warnings that rounds may swing, or with k < 0 drift to one client: k too far from 0 in some layer."""

from __future__ import annotations

import logging

from fedfrom.merging import MergeReport
from fedfrom.merging.stability import attracts, stable

log = logging.getLogger("flwr")  # where Flower's own strategies log


def warn_of_swinging(merge: MergeReport) -> bool:
    """Log where a layer is beyond the bounds 0 <= alpha c (1 + k lambda_max) < 2 at c = 1; return whether one is."""
    clients = len(merge.clients)
    beyond = [
        layer.server_lr * layer.step * (1 + max(float(layer.k), 0.0) * layer.lambda_max)
        for layer in merge.layers
        if layer.is_update and not stable(layer.server_lr * layer.step, float(layer.k), layer.lambda_max, clients)
    ]
    if beyond:
        log.warning(
            "aggregate_train: server_lr (1 + k lambda_max) reaches %.2f: at 2 and above, clients whose updates "
            "oppose each other can make rounds swing for ever; if the scores do, lower k, or say server_lr='safe' "
            "(where k is finite)",
            max(beyond),
        )
    drifting = [
        float(layer.k) * layer.lambda_max
        for layer in merge.layers
        if layer.is_update and not attracts(float(layer.k), layer.lambda_max, clients)
    ]
    if drifting:
        log.warning(
            "aggregate_train: k lambda_max reaches %.2f: below -1 a round moves towards the nearest of clients whose "
            "updates oppose each other, not between them; if the scores fall, take a k nearer 0",
            min(drifting),
        )
    return bool(beyond or drifting)
