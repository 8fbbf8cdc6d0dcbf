"""Which layers spectral methods merge as matrices: those of linear layers, not tables of embeddings."""

from __future__ import annotations

from fedfrom.merging.updates import Updates

# parts of names that transformers gives embedding tables
_TABLES = ("embed", "wte", "wpe", "shared")


def is_linear(updates: Updates) -> bool:
    """Return whether the updates are matrices of a linear layer: a table's rows are vectors each for itself."""
    parts = updates.name.lower().split(".")
    return len(updates.shape) == 2 and not any(part.startswith(_TABLES) or "embed" in part for part in parts)
