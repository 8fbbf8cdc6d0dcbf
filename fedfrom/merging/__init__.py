"""Merging: pure functions over the layers of n clients. Imports torch and numpy alone.

Where the paper's equations (arXiv 2506.02478) are: Eq. 1, the weights, and Eq. 5, their sum, in
methods/frobenius.py; Eq. 6, adapters solved back to a rank, in solve.py, with Eq. 7, Eq. 8 and Algorithm 1.

The way of the data: `merge` (merge.py) checks what clients sent (clients.py, inputs.py, sources.py) and walks the
layers in batches (batches.py). One layer's updates (updates.py, what a method sees of them; deltas.py, how they are
formed) are an `AdapterUpdates` (adapters.py) or a `TensorUpdates` (tensors.py). `weigh` (stability.py) asks the method
for its weights; `LayerUpdates.merge` (layer.py) asks it for theta*, writes T and reports.
"""

from fedfrom.merging.linalg.lowrank import LowRank
from fedfrom.merging.merge import merge
from fedfrom.merging.methods.actmat import ACTMat
from fedfrom.merging.methods.average import Average, FactorAverage
from fedfrom.merging.methods.core_space import CoreDareTies, CoreTies
from fedfrom.merging.methods.ctm import CtM
from fedfrom.merging.methods.dare import Dare, DareFroM, DareTies
from fedfrom.merging.methods.fisher import Fisher
from fedfrom.merging.methods.frobenius import FroM
from fedfrom.merging.methods.iso import Iso, IsoCTS
from fedfrom.merging.methods.knots import KnotsDareTies, KnotsTA, KnotsTies
from fedfrom.merging.methods.lorm import LoRM
from fedfrom.merging.methods.registry import methods
from fedfrom.merging.methods.regmean import RegMean
from fedfrom.merging.methods.soups import GreedySoup
from fedfrom.merging.methods.svc import SVC
from fedfrom.merging.methods.task_arithmetic import TaskArithmetic
from fedfrom.merging.methods.ties import Ties
from fedfrom.merging.methods.tsv import TSV
from fedfrom.merging.report import LayerReport, MergeReport

__all__ = [
    "ACTMat",
    "Average",
    "CoreDareTies",
    "CoreTies",
    "CtM",
    "Dare",
    "DareFroM",
    "DareTies",
    "FactorAverage",
    "Fisher",
    "FroM",
    "GreedySoup",
    "Iso",
    "IsoCTS",
    "KnotsDareTies",
    "KnotsTA",
    "KnotsTies",
    "LayerReport",
    "LoRM",
    "LowRank",
    "MergeReport",
    "RegMean",
    "SVC",
    "TSV",
    "TaskArithmetic",
    "Ties",
    "merge",
    "methods",
]
