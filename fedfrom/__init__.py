"""fedfrom: FroM (arXiv 2506.02478) in place of FedAvg, as a Flower strategy and as a merge of adapters on disk."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import fedfrom.client as client
    import fedfrom.loggers as loggers
    from fedfrom.merging import Average, FactorAverage, FroM, LowRank, MergeReport, merge, methods
    from fedfrom.strategy import FedFroM, FedMerge
    from fedfrom.wire.records import to_record, to_state_dict

__version__ = "0.1.0"
__all__ = [
    "Average",
    "FactorAverage",
    "FedFroM",
    "FedMerge",
    "FroM",
    "LowRank",
    "MergeReport",
    "client",
    "loggers",
    "merge",
    "methods",
    "to_record",
    "to_state_dict",
]
_HOME = {
    "FedFroM": "fedfrom.strategy",
    "FedMerge": "fedfrom.strategy",
    "to_record": "fedfrom.wire.records",
    "to_state_dict": "fedfrom.wire.records",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import fedfrom` loads neither torch nor flwr."""
    if name not in __all__:
        raise AttributeError(f"module 'fedfrom' has no attribute {name!r}")
    if name in ("client", "loggers"):
        return importlib.import_module(f"fedfrom.{name}")
    return getattr(importlib.import_module(_HOME.get(name, "fedfrom.merging")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
