"""Merging: pure functions over the layers of n clients. Imports torch alone.

Where the paper's equations (arXiv 2506.02478) are: Eq. 1, the weights, in weights.py; Eq. 5, their sum, in
frobenius.py's FroM and blocks.weighted_sum; Eq. 6, adapters solved back to a rank, in solve.py, and there Eq. 7, Eq. 8
and Algorithm 1 too. `merge` in merge.py walks the layers: adapters.py merges one LoRA module, tensors.py one tensor.
"""

from fedfrom.merging.average import Average, FactorAverage
from fedfrom.merging.dare import Dare, DareFroM, DareTies
from fedfrom.merging.fisher import Fisher
from fedfrom.merging.frobenius import FroM
from fedfrom.merging.knots import KnotsDareTies, KnotsTA, KnotsTies
from fedfrom.merging.lorm import LoRM
from fedfrom.merging.lowrank import LowRank
from fedfrom.merging.merge import merge
from fedfrom.merging.methods import methods
from fedfrom.merging.regmean import RegMean
from fedfrom.merging.report import LayerReport, MergeReport
from fedfrom.merging.soups import GreedySoup
from fedfrom.merging.task_arithmetic import TaskArithmetic
from fedfrom.merging.ties import Ties

__all__ = [
    "Average",
    "Dare",
    "DareFroM",
    "DareTies",
    "FactorAverage",
    "Fisher",
    "FroM",
    "GreedySoup",
    "KnotsDareTies",
    "KnotsTA",
    "KnotsTies",
    "LayerReport",
    "LoRM",
    "LowRank",
    "MergeReport",
    "RegMean",
    "TaskArithmetic",
    "Ties",
    "merge",
    "methods",
]
