"""Merging: pure functions over the layers of n clients. Imports torch alone."""

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
