"""What `merge_folders` is told where method and scale are chosen by what the inputs hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fedfrom.files.folders import Model
from fedfrom.files.heads import Head
from fedfrom.merging.merge import LayerByLayer
from fedfrom.merging.methods.base import Method


@dataclass(frozen=True)
class Chosen:
    """A method and a scale, and what goes into the folder beside the merge.

    Attributes
    ----------
    method : Method
        The method.
    scale : float
        What its merged updates are multiplied by: `server_lr`.
    heads : Sequence[Head]
        Each input's own head, to be written under heads/; empty where there are none.
    card : str
        A section of the model card, in Markdown.
    record : Any
        What was tried, as tuning.json has it.
    """

    method: Method
    scale: float
    heads: Sequence[Head]
    card: str
    record: Any


Prepared = Callable[[Method], LayerByLayer]
"""A method -> the inputs' merge by it, not yet begun."""

Choose = Callable[[Sequence[Model], Sequence[Head], Prepared], Chosen]
"""The opened inputs, each one's head, and what prepares their merge -> what is chosen."""
