"""Sampling of a round's nodes: the same nodes for the same seed, round and kind of message."""

from __future__ import annotations

import logging
import random
import time

from flwr.serverapp import Grid

log = logging.getLogger("flwr")  # where Flower's own strategies log


def sample_nodes(
    grid: Grid,
    server_round: int,
    message_type: str,
    share: float,
    least: int,
    available: int,
    seed: int,
    timeout: float,
) -> list[int]:
    """Wait for enough nodes, and return the ids of those drawn; candidates are ordered by when they registered.

    Parameters
    ----------
    grid : Grid
        Knows the connected nodes.
    server_round : int
        The round.
    message_type : str
        "train" or "evaluate": the two draw different nodes.
    share : float
        Share of the connected nodes to draw.
    least : int
        Fewest nodes to draw, where the share is fewer.
    available : int
        Fewest connected nodes to wait for.
    seed : int
        Seed of the draw, together with round and message type.
    timeout : float
        Seconds to wait.

    Raises
    ------
    RuntimeError
        Too few nodes connected within `timeout`.
    """
    start = time.monotonic()
    while True:
        nodes = sorted(grid.get_nodes(), key=lambda node: (node.registered_at, node.node_id))
        size = max(int(len(nodes) * share), least)
        required = max(available, size)
        if len(nodes) >= required:
            break
        if time.monotonic() - start >= timeout:
            raise RuntimeError(
                f"round {server_round}: expected {required} nodes within {timeout:g} s, found {len(nodes)}: start "
                "more, or lower min_available_nodes and min_train_nodes, or raise node_timeout"
            )
        log.info("Waiting for nodes to connect: %d connected (minimum required: %d).", len(nodes), required)
        time.sleep(1)
    drawn = random.Random(f"{seed}:{server_round}:{message_type}").sample(nodes, size)
    log.info("configure_%s: Sampled %d nodes (out of %d)", message_type, len(drawn), len(nodes))
    return [node.node_id for node in drawn]
