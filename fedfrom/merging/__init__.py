"""Merging: pure functions over the layers of n clients. Imports torch alone."""

from fedfrom.merging.average import Average, FactorAverage
from fedfrom.merging.frobenius import FroM
from fedfrom.merging.lowrank import LowRank
from fedfrom.merging.merge import merge
from fedfrom.merging.methods import methods
from fedfrom.merging.report import LayerReport, MergeReport

__all__ = ["Average", "FactorAverage", "FroM", "LayerReport", "LowRank", "MergeReport", "merge", "methods"]
