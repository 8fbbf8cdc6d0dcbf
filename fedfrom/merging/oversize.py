"""The warning that a merged update is far longer than every client's."""

from __future__ import annotations

import logging

from fedfrom.merging.report import LayerReport, MergeReport

log = logging.getLogger("flwr")  # where Flower's own strategies log
FAR = 3.0  # times the longest update


def times_the_longest(layer: LayerReport) -> float:
    """Return ||theta*|| / max_i ||theta_i||, after clipping; 0 where all updates are zero."""
    lengths = [
        norm * factor for norm, factor in zip(layer.norms, layer.clipped or [1.0] * len(layer.norms), strict=True)
    ]
    longest = max(lengths, default=0.0)
    # a mean of quotients, so that norms near the end of a float's range don't overflow
    return layer.size_ratio * sum(own / longest for own in lengths) / len(lengths) if longest > 0 else 0.0


def warn_of_size(report: MergeReport) -> None:
    """Log, once a merge, in how many layers the merged update is longer than `FAR` times every client's."""
    sizes = {layer.name: times_the_longest(layer) for layer in report.layers if layer.is_update}
    beyond = {name: size for name, size in sizes.items() if size > FAR * (1 + 1e-9)}
    if not beyond:
        return
    worst = max(beyond, key=lambda name: beyond[name])
    log.warning(
        "merge: in %d of %d layers the merged update is more than %g times as long as the longest client's, up to "
        "%.1f times in %r: if the merge scores worse than the clients, lower the method's coefficient, or server_lr",
        len(beyond),
        len(sizes),
        FAR,
        beyond[worst],
        worst,
    )
