"""The precision of the model's arithmetic, settled once: results depend on it."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from simulations import models, training
from simulations.studies.paper.options import PaperOptions


def settled(options: PaperOptions) -> PaperOptions:
    """Return the options with bfloat16 in place of "auto" where the CPU has instructions for it, else float32.

    bfloat16 takes less than half of the time. On a GPU `simulations.training` sets the precision.
    """
    if options.precision != "auto":
        return options
    supported = training.device().type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return replace(options, precision="bfloat16" if supported else "float32")


def computing(model: nn.Module, options: PaperOptions) -> nn.Module:
    """Return the model itself, or a wrapper that computes in bfloat16."""
    return _Halved(model) if options.precision == "bfloat16" else model


class _Halved(nn.Module):
    """A model that computes in bfloat16 where autocast allows it, with its weights in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return the logits."""
        with torch.autocast("cpu", torch.bfloat16):
            return models.logits(self.model, inputs)
