"""The warning that rounds may swing: server_lr (1 + k lambda_max) at 2 or above in some layer."""

from __future__ import annotations

import logging

from fedfrom.merging import MergeReport
from fedfrom.merging.stability import stable

log = logging.getLogger("flwr")  # where Flower's own strategies log


def warn_of_swinging(merge: MergeReport) -> bool:
    """Log where a layer's step is beyond the bound alpha c (1 + k lambda_max) < 2 at c = 1; return whether one is."""
    clients = len(merge.clients)
    beyond = [
        layer.server_lr * (1 + float(layer.k) * layer.lambda_max)
        for layer in merge.layers
        if layer.is_update and not stable(layer.server_lr, float(layer.k), layer.lambda_max, clients)
    ]
    if beyond:
        log.warning(
            "aggregate_train: server_lr (1 + k lambda_max) reaches %.2f: at 2 and above, clients whose updates "
            "oppose each other can make rounds swing for ever; if the scores do, lower k, or say server_lr='safe' "
            "(where k is finite)",
            max(beyond),
        )
    return bool(beyond)
